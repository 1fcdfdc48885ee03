// adaln_fp8: adaln.cuh in front of quant_fp8.cuh, for one layer or two that share an input
//
//   y                   as adaln.cuh has it, K % 128 == 0
//   qact, ascales, low  of y for each layer, as quant_fp8.cuh has them: signed, inverse, proj_down, R the layer's own
//
// TOKEN takes the maximum of a row from the registers, and the codes, too. The second layer is left out where `qact1` is null.
//
// I1 to I3 of adaln.cuh, I1 and I2 of quant_fp8.cuh.
// Arch  sm_90a: empty elsewhere, so that every build has every name.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007, design of our own
#include "adaln.cuh"
#include "fp8_codes.cuh"

namespace adaln_fp8 {

template <Half T, quant_fp8::Mode MODE>
PX void run(const u16* x, const u16* scale, const u16* shift, const float* inverse0, const words4* proj_down0, u8* qact0,
            float* ascales0, u32* low0, const float* inverse1, const words4* proj_down1, u8* qact1, float* ascales1, u32* low1,
            float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {
    using namespace quant_fp8;
    const int groups = K / 64;
    adaln::Rows rows;
    adaln::load<T, adaln::Runs>(rows, x, scale, shift, eps, rows_per_item, M, K, ldx, ld_scale, ld_shift);
    for (int set = 0; set < (qact1 ? 2 : 1); set++) {
        const float* inverse = set ? inverse1 : inverse0;
        u8* qact = set ? qact1 : qact0;
        float* ascales = set ? ascales1 : ascales0;
        adaln::multiply_down<T, CoreMatrices>(rows, set ? proj_down1 : proj_down0, set ? low1 : low0, set ? R1 : R0);
        u32 peak[2] = {0u, 0u};
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float z[16];
                smooth<T, MODE, false>(z, pairs[h], inverse, group);
                const u32 bits = rows.inside[h] ? largest(z) : 0u;
                if (MODE == TOKEN)
                    peak[h] = larger(peak[h], bits);
                else
                    store_group<T, false>(z, bits, qact, ascales, groups, group, h);
            }
        });
        if (MODE == TOKEN) {
            adaln::max_rows(peak, set);
            const Scale scales[2] = {store_scale(peak[0], ascales, 0), store_scale(peak[1], ascales, 1)};
            adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float z[16];
                    smooth<T, MODE, false>(z, pairs[h], inverse, group);
                    store<MODE, false>(z, scales[h], qact, groups, group, h);
                }
            });
        }
    }
}

}  // namespace adaln_fp8

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ADALN_FP8_RUN(T, MODE)                                                                                            \
    adaln_fp8::run<T, quant_fp8::MODE>(x, scale, shift, inverse0, proj_down0, qact0, ascales0, low0, inverse1, proj_down1, \
                                       qact1, ascales1, low1, eps, rows_per_item, M, K, R0, R1, ldx, ld_scale, ld_shift)
#else
#define ADALN_FP8_RUN(T, MODE)
#endif
#define ADALN_FP8(NAME, T, MODE)                                                                                          \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const u16* x, const u16* scale, const u16* shift, const float* inverse0, const words4* proj_down0, u8* qact0,    \
         float* ascales0, u32* low0, const float* inverse1, const words4* proj_down1, u8* qact1, float* ascales1,         \
         u32* low1, float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {    \
        ADALN_FP8_RUN(T, MODE);                                                                                           \
    }

// Grid: M / 16 rounded up. Block: 512. The name says dtype and what a scale is for.
ADALN_FP8(adaln_fp8_bf16_token, BF16, TOKEN)
ADALN_FP8(adaln_fp8_bf16_group, BF16, GROUP)
ADALN_FP8(adaln_fp8_fp16_token, FP16, TOKEN)
ADALN_FP8(adaln_fp8_fp16_group, FP16, GROUP)
