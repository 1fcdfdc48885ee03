// adaln_int8: adaln.cuh in front of quant_int8.cuh, for one layer or two that share an input
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as quant_int8.cuh has them: not shifted, smooth, proj_down, R the layer's own
//
// The maximum of a row comes from the registers, and so do the codes. Lane t has, of block b of eight columns, b = 0..3 of 32,
// the t-th pair, and a fragment wants all even columns of block t, and all odd ones: a 4 x 4 transpose of bytes, as for 4 bits.
//
// I1 to I3 of adaln.cuh, I1, I2 and I4 of quant_int8.cuh. The second layer is left out where `qact1` is null.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007
#include "adaln.cuh"
#include "int8_codes.cuh"

namespace adaln_int8 {

using namespace quant_int8;

// The two rows' words of 16 columns, c = 0..3 -> z[h][4 * (column / 8 % 2) + 0, 1].
template <Half T> PX void smooth(float (&z)[2][4], const u32 (&pairs)[2][8], const u16* smooth, int group, int c) {
    const words2 by = *(const words2*)(smooth + group * 64 + c * 16 + threadIdx.x % 4 * 4);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        smoothed<T>(z[h], pairs[h][2 * c], by.x, 0.0f);
        smoothed<T>(z[h] + 2, pairs[h][2 * c + 1], by.y, 0.0f);
    }
}

template <Half T>
PX void run(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,
            float* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, float* ascales1, u32* low1,
            float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {
    const int groups = K / 64, lane = threadIdx.x % 32, t = lane % 4;
    adaln::Rows rows;
    adaln::load<T, adaln::Fragments>(rows, x, scale, shift, eps, rows_per_item, M, K, ldx, ld_scale, ld_shift);
    for (int set = 0; set < (qact1 ? 2 : 1); set++) {
        const u16* divisors = set ? smooth1 : smooth0;
        words4* qact = set ? qact1 : qact0;
        adaln::multiply_down<T>(rows, set ? proj_down1 : proj_down0, set ? low1 : low0, set ? R1 : R0);
        u32 peak[2] = {0u, 0u};
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float z[2][4];
                smooth<T>(z, pairs, divisors, group, c);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    peak[i / 4] = larger(peak[i / 4], px::as_bits(z[i / 4][i % 4]) & 0x7fffffffu);
            }
        });
        adaln::max_rows(peak, set);
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            inverse[h] = store_scale(rows.inside[h] ? peak[h] : 0u, set ? ascales1 : ascales0, h);
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float z[2][2][4];                                   // [16 columns of 32][row]
                smooth<T>(z[0], pairs, divisors, group, 2 * half);
                smooth<T>(z[1], pairs, divisors, group, 2 * half + 1);
                u32 words[2][2];
#pragma unroll
                for (int i = 0; i < 4; i++) {                       // even columns of both rows, then odd ones
                    const int h = i / 2, odd = i % 2;
                    const float of[8] = {z[0][h][odd], 0.0f, z[0][h][2 + odd], 0.0f, z[1][h][odd], 0.0f, z[1][h][2 + odd]};
                    const u32 word = transpose_bytes(codes(of, inverse[h]), t);
                    words[h][odd] = inverse[h] != 0.0f ? word : 0u;
                }
                qact[tile_of(groups, group, half) * 32 + lane] = words4{words[0][0], words[1][0], words[0][1], words[1][1]};
            }
        });
    }
}

}  // namespace adaln_int8

#define ADALN_INT8(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,   \
         float* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, float* ascales1,        \
         u32* low1, float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {    \
        adaln_int8::run<T>(x, scale, shift, smooth0, proj_down0, qact0, ascales0, low0, smooth1, proj_down1, qact1,       \
                           ascales1, low1, eps, rows_per_item, M, K, R0, R1, ldx, ld_scale, ld_shift);                    \
    }

// Grid: M rounded up to 64, divided by 16. Block: 512.
ADALN_INT8(adaln_int8_bf16, BF16)
ADALN_INT8(adaln_int8_fp16, FP16)
