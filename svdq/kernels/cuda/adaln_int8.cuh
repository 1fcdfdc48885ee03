// adaln_int8: adaln.cuh in front of quant_int8.cuh, for one layer or two
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as quant_int8.cuh has them, not shifted
//
// The maximum of a row comes from the registers, and so do the codes. Lane t has, of block b of eight columns, b = 0..3 of 32,
// the t-th pair, and a fragment wants all even columns of block t, and all odd ones: a 4 x 4 transpose of bytes, as for 4 bits.
//
// I1 to I3 of adaln.cuh, I1, I2 and I4 of quant_int8.cuh.
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

using Layers = adaln::Layers<u16, words4, float>;

template <Half T> PX void run(const Layers& layers, float eps, int K, int per_cta) {
    const int groups = K / 64, lane = threadIdx.x % 32, t = lane % 4, first = blockIdx.y;
    adaln::Rows rows;
    if (!adaln::load<T, adaln::Fragments, 64>(rows, layers.layer[first], eps, K))
        return;
    for (int i = first; i < first + per_cta; i++) {
        const auto& of = layers.layer[i];
        adaln::multiply_down<T>(rows, of.proj_down, of.low, (int)of.R);
        u32 peak[2] = {0u, 0u};
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float z[2][4];
                smooth<T>(z, pairs, of.smooth, group, c);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    peak[j / 4] = larger(peak[j / 4], px::as_bits(z[j / 4][j % 4]) & 0x7fffffffu);
            }
        });
        adaln::max_rows(peak, i);
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            inverse[h] = store_scale(rows.inside[h] ? peak[h] : 0u, of.ascales, h);
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float z[2][2][4];                                   // [16 columns of 32][row]
                smooth<T>(z[0], pairs, of.smooth, group, 2 * half);
                smooth<T>(z[1], pairs, of.smooth, group, 2 * half + 1);
                u32 words[2][2];
#pragma unroll
                for (int j = 0; j < 4; j++) {                       // even columns of both rows, then odd ones
                    const int h = j / 2, odd = j % 2;
                    const float of[8] = {z[0][h][odd], 0.0f, z[0][h][2 + odd], 0.0f, z[1][h][odd], 0.0f, z[1][h][2 + odd]};
                    const u32 word = transpose_bytes(codes(of, inverse[h]), t);
                    words[h][odd] = inverse[h] != 0.0f ? word : 0u;
                }
                of.qact[tile_of(groups, group, half) * 32 + lane] = words4{words[0][0], words[1][0], words[0][1], words[1][1]};
            }
        });
    }
}

}  // namespace adaln_int8

#define ADALN_INT8(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const __grid_constant__ adaln_int8::Layers layers, float eps, int K, int per_cta) {                              \
        adaln_int8::run<T>(layers, eps, K, per_cta);                                                                      \
    }

// Grid: (the longer M rounded up to 64, divided by 16; layers / per_cta). Block: 512.
ADALN_INT8(adaln_int8_bf16, BF16)
ADALN_INT8(adaln_int8_fp16, FP16)
