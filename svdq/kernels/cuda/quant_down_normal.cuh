// quant_down_normal: w4a4_quant.cuh for sm_80 and later, with the largest scale of each row behind the others
#include "w4a4_quant.cuh"

#define QUANT_DOWN_NORMAL(NAME, T, UNSIGNED, RANK_TILES)                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * w4a4_quant::WARPS)                                                  \
    NAME(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, words2* ascales, u32* low,               \
         int M, int K, int R, int ldx) {                                                                                  \
        w4a4_quant::run<T, UNSIGNED, RANK_TILES, true>(x, smooth, proj_down, qact, ascales, low, M, K, R, ldx);           \
    }

// Grid: M rounded up to 64, divided by 16. Block: 256. The name says dtype, signedness and the largest rank.
QUANT_DOWN_NORMAL(quant_down_normal_bf16_s4_r32, BF16, false, 2)
QUANT_DOWN_NORMAL(quant_down_normal_bf16_s4_r128, BF16, false, 8)
QUANT_DOWN_NORMAL(quant_down_normal_bf16_u4_r32, BF16, true, 2)
QUANT_DOWN_NORMAL(quant_down_normal_bf16_u4_r128, BF16, true, 8)
QUANT_DOWN_NORMAL(quant_down_normal_fp16_s4_r32, FP16, false, 2)
QUANT_DOWN_NORMAL(quant_down_normal_fp16_s4_r128, FP16, false, 8)
QUANT_DOWN_NORMAL(quant_down_normal_fp16_u4_r32, FP16, true, 2)
QUANT_DOWN_NORMAL(quant_down_normal_fp16_u4_r128, FP16, true, 8)
