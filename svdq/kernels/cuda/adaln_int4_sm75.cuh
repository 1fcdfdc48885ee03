// adaln_int4_sm75: adaln_w4a4.cuh for sm_75, which multiplies fp16 only
#include "adaln_w4a4.cuh"

#define ADALN_INT4_SM75(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const __grid_constant__ adaln_w4a4::Layers layers, float eps, int K, int per_cta) {                              \
        adaln_w4a4::run<T>(layers, eps, K, per_cta);                                                                      \
    }

// Grid: (the longer M rounded up to 64, divided by 16; layers / per_cta). Block: 512.
ADALN_INT4_SM75(adaln_int4_sm75_fp16, FP16)
