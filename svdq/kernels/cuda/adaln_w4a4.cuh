// adaln_w4a4: adaln.cuh in front of w4a4_quant.cuh, for one layer or two that share an input
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as w4a4_quant.cuh has them: signed, smooth, proj_down, R the layer's own
//
// I1 to I3 of adaln.cuh, I1 and I2 of w4a4_quant.cuh. The second layer is left out where `qact1` is null.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007
#pragma once
#include "adaln.cuh"
#include "w4a4_quant.cuh"

namespace adaln_w4a4 {

template <Half T>
PX void run(const u16* x, const u16* scale, const u16* shift, const u16* smooth0, const words4* proj_down0, words4* qact0,
            words2* ascales0, u32* low0, const u16* smooth1, const words4* proj_down1, words4* qact1, words2* ascales1,
            u32* low1, float eps, int rows_per_item, int M, int K, int R0, int R1, int ldx, int ld_scale, int ld_shift) {
    const int groups = K / 64;
    adaln::Rows rows;
    adaln::load<T, adaln::Fragments>(rows, x, scale, shift, eps, rows_per_item, M, K, ldx, ld_scale, ld_shift);
    for (int set = 0; set < (qact1 ? 2 : 1); set++) {
        adaln::multiply_down<T>(rows, set ? proj_down1 : proj_down0, set ? low1 : low0, set ? R1 : R0);
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
            w4a4_quant::quantise<T, false>(pairs, set ? smooth1 : smooth0, set ? qact1 : qact0, set ? ascales1 : ascales0,
                                           rows.inside, blockIdx.x, group, groups);
        });
    }
}

}  // namespace adaln_w4a4
