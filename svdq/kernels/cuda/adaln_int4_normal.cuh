// adaln_int4_normal: adaln_w4a4.cuh for w4a4_normal.cuh, which wants the largest scale of each row
#include "adaln_w4a4.cuh"

#define ADALN_INT4_NORMAL(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const __grid_constant__ adaln_w4a4::Layers layers, float eps, int K, int per_cta) {                              \
        adaln_w4a4::run<T, true>(layers, eps, K, per_cta);                                                                \
    }

// Grid: (the longer M rounded up to 64, divided by 16; layers / per_cta). Block: 512.
ADALN_INT4_NORMAL(adaln_int4_normal_bf16, BF16)
ADALN_INT4_NORMAL(adaln_int4_normal_fp16, FP16)
