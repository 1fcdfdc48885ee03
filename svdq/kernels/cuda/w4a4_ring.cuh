// w4a4_ring: the main loop of W4A4 kernels of sm_80 and later: w4a4_tile.cuh behind a ring of background copies
//
//   in time, one column per group, STAGES stages:
//     copy   g+3  g+4  g+5     cp.async into the stage that MMA g-1 has left
//     mma    g    g+1  g+2     int32, * ascale * wscale into fp32, in registers
//
// I1  The stage filled in step g was last read in step g-1: one barrier per group is enough.
// I2  At the end all copies have come, but other warps may still read the last stage.
// Tried  a rolled main loop: 13.3 instructions per MMA and a spill. Sums by I2FP, times products of scales: 15.4.
// Test tests/kernels/families/test_w4a4_sm80.py
#pragma once
#include "w4a4_tile.cuh"

namespace w4a4_ring {

using namespace w4a4_tile;

template <Half T, bool UNSIGNED, int STAGES>
PX void multiply(Sums& acc, Stage (&stages)[STAGES], const Pieces& pieces, int groups) {
    auto copy_stage = [&](u32 group, int stage) {
        words4* to = (words4*)&stages[stage] + threadIdx.x;
        auto copy = [&](int i, const words4* from) { px::copy16(to + i * THREADS, from); };
        pieces.of_activations(group, copy);
        pieces.of_weights(group, copy);
        if (threadIdx.x < SCALES)
            pieces.of_scales(group, copy);
    };

    int offset[4];
    px::offset_bits(offset, groups >> 30);
#pragma unroll
    for (int group = 0; group < STAGES - 1; group++) {
        if (group < groups)
            copy_stage(group, group);
        px::copy_commit();
    }
#pragma unroll 1
    for (int start = 0; start < groups; start += STAGES)
#pragma unroll
        for (int i = 0; i < STAGES; i++) {                      // unrolled, so that stages have constant addresses
            const int group = start + i;
            if (group >= groups)
                break;
            px::copy_wait<STAGES - 2>();
            px::barrier();
            if (group + STAGES - 1 < groups)
                copy_stage(group + STAGES - 1, (i + STAGES - 1) % STAGES);
            px::copy_commit();                                  // empty at the end, so that the count above stays true
            const Rows rows(stages[i]);
#pragma unroll
            for (int j = 0; j < 4; j++)
                w4a4_tile::multiply<T, UNSIGNED>(acc, rows, stages[i], j, offset);
        }
    px::copy_wait<0>();
}

}  // namespace w4a4_ring
