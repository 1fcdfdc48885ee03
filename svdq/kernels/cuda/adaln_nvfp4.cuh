// adaln_nvfp4: adaln.cuh in front of quant_nvfp4.cuh, for one layer or two that share an input
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as quant_nvfp4.cuh has them: smooth, proj_down, R the layer's own
//
// I1 to I3 of adaln.cuh, I1 to I3 of quant_nvfp4.cuh. The second layer is left out where `qact1` is null.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007
#include "adaln.cuh"
#include "nvfp4_codes.cuh"

namespace adaln_nvfp4 {

template <Half T>
PX void run(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,
            u32* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, u32* ascales1, u32* low1,
            float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {
    const int steps = K / 64;
    adaln::Rows rows;
    adaln::load<T, adaln::Fragments>(rows, x, scale, shift, eps, rows_per_item, M, K, ldx, ld_scale, ld_shift);
    for (int set = 0; set < (qact1 ? 2 : 1); set++) {
        adaln::multiply_down<T>(rows, set ? proj_down1 : proj_down0, set ? low1 : low0, set ? R1 : R0);
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int step) {
            quant_nvfp4::quantise<T>(pairs, set ? smooth1 : smooth0, set ? qact1 : qact0, set ? ascales1 : ascales0, blockIdx.x,
                                     step, steps);
        });
    }
}

}  // namespace adaln_nvfp4

#define ADALN_NVFP4(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,   \
         u32* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, u32* ascales1, u32* low1, \
         float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {               \
        adaln_nvfp4::run<T>(x, scale, shift, smooth0, proj_down0, qact0, ascales0, low0, smooth1, proj_down1, qact1,      \
                            ascales1, low1, eps, rows_per_item, M, K, R0, R1, ldx, ld_scale, ld_shift);                   \
    }

// Grid: M rounded up to 64, divided by 16. Block: 512.
ADALN_NVFP4(adaln_nvfp4_bf16, BF16)
ADALN_NVFP4(adaln_nvfp4_fp16, FP16)
