// quant_down_sm75: w4a4_quant.cuh for sm_75, which multiplies fp16 only and by m16n8k8: one of m16n8k16 is two (ptx.cuh)
#include "w4a4_quant.cuh"

#define QUANT_DOWN_SM75(NAME, UNSIGNED, RANK_TILES)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * w4a4_quant::WARPS)                                                  \
    NAME(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, words2* ascales, u32* low,               \
         int M, int K, int R, int ldx) {                                                                                  \
        w4a4_quant::run<FP16, UNSIGNED, RANK_TILES>(x, smooth, proj_down, qact, ascales, low, M, K, R, ldx);              \
    }

// Grid: M rounded up to 64, divided by 16. Block: 256. The name says dtype, signedness and the largest rank.
QUANT_DOWN_SM75(quant_down_sm75_fp16_s4_r32, false, 2)
QUANT_DOWN_SM75(quant_down_sm75_fp16_s4_r128, false, 8)
QUANT_DOWN_SM75(quant_down_sm75_fp16_u4_r32, true, 2)
QUANT_DOWN_SM75(quant_down_sm75_fp16_u4_r128, true, 8)
