// quant_int8: quantise activations to int8, one scale per token, and run the low-rank down projection beside it
//
//   z[m,k]       = (x[m,k] + shift) / smooth[k]            fp32; shift: that of unsigned layers, else 0
//   ascales[m]   = max |z[m,k]| over the token / 127
//   qact[m,k]    = round_even(z[m,k] * (1 / ascales[m]))   -127..127; z = max / 2, which 16-bit x often has, is a tie
//   low[m,r]     = sum_k x[m,k] * proj_down[k,r]           x as it comes: not shifted, not smoothed
//
//   x          [M, K]  bf16 | fp16, row stride ldx elements, 16-byte aligned rows      K % 64 == 0
//   smooth     [K]     packed as in the checkpoint (layout.pack_vector)
//   proj_down  [K, R]  packed as in the checkpoint (layout.pack_down)    R % 16 == 0, R <= 16 * RANK_TILES
//   qact       [M/64][K/64][4 m16][2 halves of k][32 lanes] 16 bytes: A fragments of m16n8k32 (ptx.cuh), M rounded up to 64
//   ascales    [M/64][4 m16][8 g][2] fp32: rows g and g+8 of an m16 tile
//   low        [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, 16 bit
//
// The product takes weights out of words of eight 4-bit codes, the even ones and the odd ones, four bytes each (gemm_int8.cuh).
// So k of an A fragment runs in that order over the 32 columns of its half of a group:
//
//   k of m16n8k32     4t + i         16 + 4t + i            i = 0..3
//   column of 32      8t + 2i        8t + 2i + 1
//
// One CTA owns 16 rows, its 8 warps take turns at the groups of 64 columns, twice, for the scale is known only after a whole
// row; the second time x comes mostly from L1. Lane 4g+t holds, of rows g and g+8, columns
//   1st  16c + {2t, 2t+1, 8+2t, 9+2t}, c = 0..3: an A fragment of m16n8k16, and proj_down and smooth are stored in this order
//   2nd  8t..8t+7 and 32+8t..32+8t+7: one 16-byte load each, and their codes are two words of an A fragment of m16n8k32
//
// I1  Rows past M read as zero: codes 0, scales 0, low 0. Nothing of them can reach a stored row.
// I2  Maxima are taken on the bits of |z|, where NaN > Inf > numbers: the scale becomes NaN or Inf and the codes 0, so the
//     whole token becomes NaN, as in a 16-bit layer. fmaxf would drop a NaN.
// I3  Each warp keeps its share of `low` in registers; shares are added in warp order, so two runs agree bit for bit.
// I4  Both times z comes from the same operations, so no code is beyond 127.
// Spec reference.py quant_down    Test tests/kernels/families/test_w4a8_int8.py
// Source arXiv 2411.05007, checkpoint-format 6.2; int8 is our own
#include "int8_codes.cuh"

namespace quant_int8 {

template <Half T, int RANK_TILES>
PX void run(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, float* ascales, u32* low,
            float shift, int M, int K, int R, int ldx) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int groups = K / 64, rank_tiles = R / 16, row = blockIdx.x * 16 + g;
    const u16* x_row[2] = {x + (u64)row * ldx, x + (u64)(row + 8) * ldx};
    const bool inside[2] = {row < M, row + 8 < M};

    float share[2 * RANK_TILES][4];
    clear<RANK_TILES>(share);
    u32 peak[2] = {0u, 0u};

    for (int group = warp; group < groups; group += WARPS)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int column = group * 64 + c * 16;
            u32 pairs[4];                   // an A fragment
#pragma unroll
            for (int i = 0; i < 4; i++)
                pairs[i] = inside[i % 2] ? *(const u32*)(x_row[i % 2] + column + i / 2 * 8 + 2 * t) : 0u;
            const words4 a = {pairs[0], pairs[1], pairs[2], pairs[3]};
            multiply_down<T, RANK_TILES>(share, a, proj_down, group * 4 + c, rank_tiles);
            const words2 by = *(const words2*)(smooth + column + t * 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float z[2];
                smoothed<T>(z, pairs[i], i / 2 ? by.y : by.x, shift);
                peak[i % 2] = larger(peak[i % 2], larger(px::as_bits(z[0]) & 0x7fffffffu, px::as_bits(z[1]) & 0x7fffffffu));
            }
        }

    __shared__ u32 peaks[WARPS][16];
    for (int h = 0; h < 2; h++) {
        const u32 bits = max_of_row(peak[h]);
        if (t == 0)
            peaks[warp][8 * h + g] = bits;
    }
    px::barrier();
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 bits = 0;
        for (int w = 0; w < WARPS; w++)
            bits = larger(bits, peaks[w][8 * h + g]);
        inverse[h] = store_scale(inside[h] ? bits : 0u, ascales, h);
    }

#pragma unroll
    for (int r = 0; r < RANK_TILES; r++)
        if (r < rank_tiles)
            store_low<T>(share[2 * r], share[2 * r + 1], low, r, rank_tiles);

    for (int group = warp; group < groups; group += WARPS)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = group * 64 + half * 32 + 8 * t;
            const u32* by = (const u32*)smooth + (column / 16 * 8 + t % 2);             // columns 2i, 2i+1 of 8: by[2 * i]
            u32 words[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const words4 from = inside[h] ? *(const words4*)(x_row[h] + column) : words4{0u, 0u, 0u, 0u};
                float z[8];
                smoothed<T>(z, from.x, by[0], shift);
                smoothed<T>(z + 2, from.y, by[2], shift);
                smoothed<T>(z + 4, from.z, by[4], shift);
                smoothed<T>(z + 6, from.w, by[6], shift);
                words[h][0] = inverse[h] != 0.0f ? codes(z, inverse[h]) : 0u;
                words[h][1] = inverse[h] != 0.0f ? codes(z + 1, inverse[h]) : 0u;
            }
            qact[tile_of(groups, group, half) * 32 + lane] = words4{words[0][0], words[1][0], words[0][1], words[1][1]};
        }
}

}  // namespace quant_int8

#define QUANT_INT8(NAME, T, RANK_TILES)                                                                                   \
    extern "C" __global__ void __launch_bounds__(32 * quant_int8::WARPS)                                                  \
    NAME(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, float* ascales, u32* low,               \
         float shift, int M, int K, int R, int ldx) {                                                                     \
        quant_int8::run<T, RANK_TILES>(x, smooth, proj_down, qact, ascales, low, shift, M, K, R, ldx);                    \
    }

// Grid: M rounded up to 64, divided by 16. Block: 256. The name says dtype and the largest rank.
QUANT_INT8(quant_int8_bf16_r32, BF16, 2)
QUANT_INT8(quant_int8_bf16_r128, BF16, 8)
QUANT_INT8(quant_int8_fp16_r32, FP16, 2)
QUANT_INT8(quant_int8_fp16_r128, FP16, 8)
