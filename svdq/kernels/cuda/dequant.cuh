// dequant: the numbers that 4-bit weights stand for, in 16 bit, for a product of the library
//
//   out[n,k] = round( code[n,k] * ( wscales[n, k / group] * wtscale * wcscales[n] ) )
//
// in fp32, scales first and from the left, rounded once to T: to the bit what W4A4Weight.dense makes. A code times a 16-bit
// scale is exact in fp32.
//
//   qweight   [N/128][K/64][8 strips][8 rows][4 quarters] of 16 bytes, 4 words [row, row + 8][first, second 32 of k], which
//             hold k 8 quarter .. +7 each, low nibble first                      int4: two's complement   nvfp4: e2m1
//   wscales   int4:  bf16 | fp16 [N/128][K/64][128], in each 16 the rows 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15
//             nvfp4: e4m3 [N/128][K/64][8 rows][4][4] words; word (q, p) of row l is row 32p + 8q + l, its bytes the 4 groups of
//             16 of these 64 k
//   wcscales  bf16 | fp16 [N], in each 16 as above, or null
//   out       [N, K] bf16 | fp16, rows `ld` numbers apart, 16-byte aligned
//
// A CTA takes 128 rows x 64 k, a thread 16 bytes: 32 weights, of which 8 make the 16 bytes of a store.
//   read   a warp: 512 bytes in a row
//   write  a warp: rows of 64 bytes, whole sectors; the other half of their line follows at once
// So the bytes set the time: 0.5 read and 2 written per weight, beside 8 or 9 instructions. Nothing is shared, nothing waits.
//
// No conversion of integers or of 8-bit floats, which are slow or missing: a code or scale becomes the bits of a float.
//   int4    the last bits of 2^23 + 8 + value, less 2^23 + 8
//   e2m1    its bits as the last of an exponent and the first of a mantissa are a float 2^126 times too small
//   e4m3    likewise 2^120 times; NaN, which would be 480, stays NaN
// Code 8 of e2m1, -0, is 0.
//
// Spec weights.py W4A4Weight.dense    Test tests/kernels/families/test_dequant.py    Source checkpoint-format 5.2-5.5, 6.1
#include "ptx.cuh"

namespace dequant {

enum Codes { INT4, NVFP4 };

// What nibble i of a word stands for.
template <Codes C> PX float value(u32 word, int i) {
    if (C == INT4)
        return px::as_float((word >> 4 * i & 15u) ^ 0x4b000008u) - 8388616.0f;
    const u32 bits = (u32)((int)(word << (28 - 4 * i)) >> 6) & 0x81c00000u;         // the sign, and the rest 6 bits below
    return px::as_float(bits) * 0x1p126f + 0.0f;
}

PX float e4m3(u32 byte) {
    const u32 rest = byte & 0x7fu;
    return px::as_float(rest == 0x7fu ? 0x7fc00000u : (byte & 0x80u) << 24 | rest << 20) * 0x1p120f;
}

// A number of the file's 16-bit type, without a branch.
PX float half_value(u16 bits, int file) {
    const float bf16 = px::low_half<BF16>(bits), fp16 = px::low_half<FP16>(bits);
    return file == BF16 ? bf16 : fp16;
}

template <Half T, Codes C>
PX void run(const words4* qweight, const void* wscales, const u16* wcscales, u16* out, float wtscale, int file, int K, int ld) {
    const int strip = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    const u64 tile = (u64)blockIdx.y * (K / 64) + blockIdx.x, rows = (u64)blockIdx.y * 128;
    const words4 codes = qweight[tile * 256 + threadIdx.x];
    const u32 word[4] = {codes.x, codes.y, codes.z, codes.w};

    float factor[4];                                    // of each word
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int place = strip * 16 + row / 2 * 4 + i * 2 + row % 2, q = strip % 2 * 2 + i, p = strip / 2;
        if (C == INT4)
            factor[2 * i] = factor[2 * i + 1] = half_value(((const u16*)wscales)[tile * 128 + place], file);
        else {
            const u32 groups = ((const u32*)wscales)[tile * 128 + row * 16 + q * 4 + p] >> 8 * (quarter / 2);
            factor[2 * i] = e4m3(groups & 0xffu), factor[2 * i + 1] = e4m3(groups >> 16 & 0xffu);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        factor[i] *= wtscale;
    if (wcscales) {
        const u16* here = wcscales + rows + strip * 16 + row / 2 * 4 + row % 2;
        const float first = half_value(here[0], file), second = half_value(here[2], file);
        factor[0] *= first, factor[1] *= first, factor[2] *= second, factor[3] *= second;
    }

#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 pair[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            pair[j] = px::pack_half<T>(value<C>(word[i], 2 * j) * factor[i], value<C>(word[i], 2 * j + 1) * factor[i]);
        u16* to = out + (rows + strip * 16 + i / 2 * 8 + row) * ld + blockIdx.x * 64 + i % 2 * 32 + quarter * 8;
        *(words4*)to = words4{pair[0], pair[1], pair[2], pair[3]};
    }
}

}  // namespace dequant

#define DEQUANT(NAME, T, C)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
    NAME(const words4* qweight, const void* wscales, const u16* wcscales, u16* out, float wtscale, int file, int K,       \
         int ld) {                                                                                                        \
        dequant::run<T, dequant::C>(qweight, wscales, wcscales, out, wtscale, file, K, ld);                               \
    }

// Grid: (K / 64, N / 128). Block: 256. The name says the dtype of out and the codes; `file` is the Half of the scales.
DEQUANT(dequant_bf16_int4, BF16, INT4)
DEQUANT(dequant_bf16_nvfp4, BF16, NVFP4)
DEQUANT(dequant_fp16_int4, FP16, INT4)
DEQUANT(dequant_fp16_nvfp4, FP16, NVFP4)
