// adaln_int4_normal: adaln_w4a4.cuh for w4a4_normal.cuh, which wants the largest scale of each row
#include "adaln_w4a4.cuh"

#define ADALN_INT4_NORMAL(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS) NAME(ADALN_W4A4_PARAMETERS) {                            \
        adaln_w4a4::run<T, true>(ADALN_W4A4_ARGUMENTS);                                                                   \
    }

// Grid: M rounded up to 64, divided by 16. Block: 512.
ADALN_INT4_NORMAL(adaln_int4_normal_bf16, BF16)
ADALN_INT4_NORMAL(adaln_int4_normal_fp16, FP16)
