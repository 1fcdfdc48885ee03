// adaln_fp8: adaln.cuh in front of quant_fp8.cuh, for one layer or two
//
//   y                   as adaln.cuh has it, K % 128 == 0
//   qact, ascales, low  of y for each layer, as quant_fp8.cuh has them: signed, the inverse of smooth in its place
//
// TOKEN takes the maximum of a row from the registers, and the codes, too.
//
// I1 to I3 of adaln.cuh, I1 and I2 of quant_fp8.cuh.
// Arch  sm_90a: empty elsewhere, so that every build has every name.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007, design of our own
#include "adaln.cuh"
#include "fp8_codes.cuh"

namespace adaln_fp8 {

using Layers = adaln::Layers<float, u8, float>;

template <Half T, quant_fp8::Mode MODE> PX void run(const Layers& layers, float eps, int K, int per_cta) {
    using namespace quant_fp8;
    const int groups = K / 64, first = blockIdx.y;
    adaln::Rows rows;
    if (!adaln::load<T, adaln::Runs, 16>(rows, layers.layer[first], eps, K))
        return;
    for (int i = first; i < first + per_cta; i++) {
        const auto& of = layers.layer[i];
        adaln::multiply_down<T, CoreMatrices>(rows, of.proj_down, of.low, (int)of.R);
        u32 peak[2] = {0u, 0u};
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float z[16];
                smooth<T, MODE, false>(z, pairs[h], of.smooth, group);
                const u32 bits = rows.inside[h] ? largest(z) : 0u;
                if (MODE == TOKEN)
                    peak[h] = larger(peak[h], bits);
                else
                    store_group<T, false>(z, bits, of.qact, of.ascales, groups, group, h);
            }
        });
        if (MODE == TOKEN) {
            adaln::max_rows(peak, i);
            const Scale scales[2] = {store_scale(peak[0], of.ascales, 0), store_scale(peak[1], of.ascales, 1)};
            adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float z[16];
                    smooth<T, MODE, false>(z, pairs[h], of.smooth, group);
                    store<MODE, false>(z, scales[h], of.qact, groups, group, h);
                }
            });
        }
    }
}

}  // namespace adaln_fp8

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ADALN_FP8_RUN(T, MODE) adaln_fp8::run<T, quant_fp8::MODE>(layers, eps, K, per_cta)
#else
#define ADALN_FP8_RUN(T, MODE)
#endif
#define ADALN_FP8(NAME, T, MODE)                                                                                          \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const __grid_constant__ adaln_fp8::Layers layers, float eps, int K, int per_cta) {                               \
        ADALN_FP8_RUN(T, MODE);                                                                                           \
    }

// Grid: (the longer M / 16 rounded up; layers / per_cta). Block: 512. The name says dtype and what a scale is for.
ADALN_FP8(adaln_fp8_bf16_token, BF16, TOKEN)
ADALN_FP8(adaln_fp8_bf16_group, BF16, GROUP)
ADALN_FP8(adaln_fp8_fp16_token, FP16, TOKEN)
ADALN_FP8(adaln_fp8_fp16_group, FP16, GROUP)
