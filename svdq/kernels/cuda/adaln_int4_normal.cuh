// adaln_int4_normal: adaln_w4a4.cuh for gemm_w4a4_normal.cuh, which wants the largest scale of each row
#include "adaln_w4a4.cuh"

#define ADALN_INT4_NORMAL(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(adaln::THREADS)                                                          \
    NAME(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,   \
         words2* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, words2* ascales1,      \
         u32* low1, float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {    \
        adaln_w4a4::run<T, true>(x, scale, shift, smooth0, proj_down0, qact0, ascales0, low0, smooth1, proj_down1, qact1, \
                                 ascales1, low1, eps, rows_per_item, M, K, R0, R1, ldx, ld_scale, ld_shift);              \
    }

// Grid: M rounded up to 64, divided by 16. Block: 512.
ADALN_INT4_NORMAL(adaln_int4_normal_bf16, BF16)
ADALN_INT4_NORMAL(adaln_int4_normal_fp16, FP16)
