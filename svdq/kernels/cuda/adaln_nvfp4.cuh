// adaln_nvfp4: adaln.cuh in front of quant_nvfp4.cuh, for one layer or two
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as quant_nvfp4.cuh has them
//
// I1 to I3 of adaln.cuh, I1 to I3 of quant_nvfp4.cuh.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007
#include "adaln.cuh"
#include "nvfp4_codes.cuh"

namespace adaln_nvfp4 {

using Layers = adaln::Layers<u16, words4, u32>;

template <Half T> PX void run(const Layers& layers, float eps, int K, int per_cta) {
    const int steps = K / 64, first = blockIdx.y;
    adaln::Rows rows;
    if (!adaln::load<T, adaln::Fragments, 64>(rows, layers.layer[first], eps, K))
        return;
    for (int i = first; i < first + per_cta; i++) {
        const auto& of = layers.layer[i];
        adaln::multiply_down<T>(rows, of.proj_down, of.low, (int)of.R);
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int step) {
            quant_nvfp4::quantise<T>(pairs, of.smooth, of.qact, of.ascales, blockIdx.x, step, steps);
        });
    }
}

}  // namespace adaln_nvfp4

#define ADALN_NVFP4(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const __grid_constant__ adaln_nvfp4::Layers layers, float eps, int K, int per_cta) {                             \
        adaln_nvfp4::run<T>(layers, eps, K, per_cta);                                                                     \
    }

// Grid: (the longer M rounded up to 64, divided by 16; layers / per_cta). Block: 512.
ADALN_NVFP4(adaln_nvfp4_bf16, BF16)
ADALN_NVFP4(adaln_nvfp4_fp16, FP16)
