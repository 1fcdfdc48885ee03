// adaln_w4a4: adaln.cuh in front of w4a4_quant.cuh, for one layer or two that share an input
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as w4a4_quant.cuh has them: signed, smooth, proj_down, R the layer's own; with
//                       PEAKS the largest scale of each row behind its others
//
// I1 to I3 of adaln.cuh, I1 and I2 of w4a4_quant.cuh. The second layer is left out where `qact1` is null.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007
#pragma once
#include "adaln.cuh"
#include "w4a4_quant.cuh"

namespace adaln_w4a4 {

template <Half T, bool PEAKS = false>
PX void run(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,
            words2* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, words2* ascales1,
            u32* low1, float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {
    const int groups = K / 64;
    adaln::Rows rows;
    adaln::load<T, adaln::Fragments>(rows, x, scale, shift, eps, rows_per_item, M, K, ldx, ld_scale, ld_shift);
    for (int set = 0; set < (qact1 ? 2 : 1); set++) {
        adaln::multiply_down<T>(rows, set ? proj_down1 : proj_down0, set ? low1 : low0, set ? R1 : R0);
        words2* ascales = set ? ascales1 : ascales0;
        u32 largest[2] = {0, 0};
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
            const words2 bits = w4a4_quant::quantise<T, false, PEAKS>(pairs, set ? smooth1 : smooth0, set ? qact1 : qact0,
                                                                      ascales, rows.inside, blockIdx.x, group, groups);
            largest[0] = quantiser::larger(largest[0], bits.x), largest[1] = quantiser::larger(largest[1], bits.y);
        });
        if (PEAKS) {
            adaln::max_rows(largest, set);
            const int lane = threadIdx.x, tile = (blockIdx.x / 4 * (groups + 1) + groups) * 4 + blockIdx.x % 4;
            if (lane < 32 && lane % 4 == 0)
                ascales[(u64)tile * 8 + lane / 4] = words2{largest[0], largest[1]};
        }
    }
}

}  // namespace adaln_w4a4

// The parameters of a kernel, and what `run` takes of them.
#define ADALN_W4A4_PARAMETERS                                                                                             \
    const u16 *x, const u16 *scale, const u16 *shift, const u16 *smooth0, const words4 *proj_down0, words4 *qact0,        \
        words2 *ascales0, u32 *low0, const u16 *smooth1, const words4 *proj_down1, words4 *qact1, words2 *ascales1,       \
        u32 *low1, float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift
#define ADALN_W4A4_ARGUMENTS                                                                                              \
    x, scale, shift, smooth0, proj_down0, qact0, ascales0, low0, smooth1, proj_down1, qact1, ascales1, low1, eps,         \
        rows_per_item, M, K, R0, R1, ldx, ld_scale, ld_shift
