// w4a4_registers: the main loop of W4A4 kernels of sm_75, which has no background copies: w4a4_tile.cuh behind two stages that
// are filled through registers
//
//   in time, one column per group:
//     load    g+1   g+2   g+3       global memory -> registers: activations, scales, after half of the MMAs weights
//     mma     g     g+1   g+2
//     store   g+1   g+2   g+3       registers -> the stage that MMA g-1 has left: two pieces at most are on their way
//
// An MMA of m16n8k64 is four of m8n8k32, whose fragments are single words of its own, and one of m16n8k16 is two of m16n8k8
// (ptx.cuh): operands lie as on sm_80, and the checkpoint's order needs no repacking.
//
// I1  The stage stored in step g was last read in step g-1: one barrier per group is enough, and all warps have left the last.
// I2  fp16 only: sm_75 multiplies no bf16. Results are clamped to its range.
// Tried  all pieces loaded before the MMAs: 20 registers instead of 8, and the compiler spills; scales loaded with activations:
//        12, and it spills in mlp_w4a4_sm75.
// Test tests/kernels/families/test_w4a4_sm75.py
#pragma once
#include "w4a4_tile.cuh"

namespace w4a4_registers {

using namespace w4a4_tile;
constexpr int STAGES = 2;

template <bool UNSIGNED> PX void multiply(Sums& acc, Stage (&stages)[STAGES], const Pieces& pieces, int groups) {
    words4 loaded[PIECES];
    auto load = [&](int i, const words4* from) { loaded[i] = *from; };
    auto fill = [&](Stage& stage, int i) { ((words4*)&stage)[i * THREADS + threadIdx.x] = loaded[i]; };

    int offset[4];
    px::offset_bits(offset, groups >> 30);
    pieces.of_activations(0, load);
    pieces.of_weights(0, load);
    pieces.of_scales(0, load);
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (i < 4 || threadIdx.x < SCALES)
            fill(stages[0], i);
    px::barrier();
#pragma unroll 1
    for (int start = 0; start < groups; start += 2)
#pragma unroll
        for (int i = 0; i < 2; i++) {                           // unrolled, so that stages have constant addresses
            const int group = start + i;
            if (group >= groups)
                break;
            const int next = group + 1 < groups ? group + 1 : group;        // the last one is loaded twice
            const Stage& stage = stages[i];
            Stage& other = stages[1 - i];
            const Rows rows(stage);
            pieces.of_activations(next, load);
            w4a4_tile::multiply<FP16, UNSIGNED>(acc, rows, stage, 0, offset);
            fill(other, 0);
            pieces.of_scales(next, load);
            w4a4_tile::multiply<FP16, UNSIGNED>(acc, rows, stage, 1, offset);
            fill(other, 1);
            if (threadIdx.x < SCALES)
                fill(other, 4);
            pieces.of_weights(next, load);
            w4a4_tile::multiply<FP16, UNSIGNED>(acc, rows, stage, 2, offset);
            w4a4_tile::multiply<FP16, UNSIGNED>(acc, rows, stage, 3, offset);
            fill(other, 2);
            fill(other, 3);
            px::barrier();
        }
}

}  // namespace w4a4_registers
