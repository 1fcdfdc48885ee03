// adaln_w4a4: adaln.cuh in front of w4a4_quant.cuh, for one layer or two
//
//   y                   as adaln.cuh has it
//   qact, ascales, low  of y for each layer, as w4a4_quant.cuh has them: signed; with PEAKS the largest scale of each row
//                       behind its others
//
// I1 to I3 of adaln.cuh, I1 and I2 of w4a4_quant.cuh.
// Test tests/kernels/families/test_adaln.py    Source arXiv 2411.05007
#pragma once
#include "adaln.cuh"
#include "w4a4_quant.cuh"

namespace adaln_w4a4 {

using Layers = adaln::Layers<u16, words4, words2>;

template <Half T, bool PEAKS = false> PX void run(const Layers& layers, float eps, int K, int per_cta) {
    const int groups = K / 64, first = blockIdx.y;
    adaln::Rows rows;
    if (!adaln::load<T, adaln::Fragments, 64>(rows, layers.layer[first], eps, K))
        return;
    for (int i = first; i < first + per_cta; i++) {
        const auto& of = layers.layer[i];
        adaln::multiply_down<T>(rows, of.proj_down, of.low, (int)of.R);
        u32 largest[2] = {0, 0};
        adaln::each_group(rows, [&](u32 (&pairs)[2][8], int group) {
            const words2 bits = w4a4_quant::quantise<T, false, PEAKS>(pairs, of.smooth, of.qact, of.ascales, rows.inside,
                                                                      blockIdx.x, group, groups);
            largest[0] = quantiser::larger(largest[0], bits.x), largest[1] = quantiser::larger(largest[1], bits.y);
        });
        if (PEAKS) {
            adaln::max_rows(largest, i);
            const int lane = threadIdx.x, tile = (blockIdx.x / 4 * (groups + 1) + groups) * 4 + blockIdx.x % 4;
            if (lane < 32 && lane % 4 == 0)
                of.ascales[(u64)tile * 8 + lane / 4] = words2{largest[0], largest[1]};
        }
    }
}

}  // namespace adaln_w4a4
