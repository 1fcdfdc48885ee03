// gemm_w4a4_sm75: out = int4 part + low-rank part + bias, on sm_75, which has no background copies: w4a4_tile.cuh behind two
// stages that are filled through registers
//
//   in time, one column per group:
//     load    g+1   g+2   g+3       global memory -> registers: activations and scales; after half of the MMAs, weights
//     mma     g     g+1   g+2
//     store   g+1   g+2   g+3       registers -> the stage that MMA g-1 has left: after half of the MMAs, after the other half
//
// An MMA of m16n8k64 is four of m8n8k32, whose fragments are single words of its own, and one of m16n8k16 is two of m16n8k8
// (ptx.cuh): operands lie as on sm_80, and the checkpoint's order needs no repacking.
//
// I1  The stage stored in step g was last read in step g-1: one barrier per group is enough.
// I2  fp16 only: sm_75 multiplies no bf16. Results are clamped to its range.
// Tried  all pieces loaded before the MMAs: 20 registers instead of 12, and the compiler spills.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_sm75.py
#include "w4a4_tile.cuh"

namespace gemm_w4a4_sm75 {

using namespace w4a4_tile;

template <bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int K,
            const Operands& to) {
    __shared__ Shared<2> shared;
    const Pieces pieces(qact, ascales, qweight, wscales, blockIdx.x, to.M, K);
    words4 loaded[PIECES];
    auto load = [&](int i, const words4* from) { loaded[i] = *from; };
    auto fill = [&](Stage& stage, int i) { ((words4*)&stage)[i * THREADS + threadIdx.x] = loaded[i]; };

    Sums acc;
    clear(acc);
    int offset[4];
    px::offset_bits(offset, K % 64);
    const int groups = K / 64;
    pieces.of_activations(0, load);
    pieces.of_weights(0, load);
    pieces.of_scales(0, load);
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (i < 4 || threadIdx.x < SCALES)
            fill(shared.stages[0], i);
    px::barrier();
#pragma unroll 1
    for (int start = 0; start < groups; start += 2)
#pragma unroll
        for (int i = 0; i < 2; i++) {                           // unrolled, so that stages have constant addresses
            const int group = start + i;
            if (group >= groups)
                break;
            const int next = group + 1 < groups ? group + 1 : group;        // the last one is loaded twice
            const Stage& stage = shared.stages[i];
            Stage& other = shared.stages[1 - i];
            const Rows rows(stage);
            pieces.of_activations(next, load);
            pieces.of_scales(next, load);
            multiply<FP16, UNSIGNED>(acc, rows, stage, 0, offset);
            multiply<FP16, UNSIGNED>(acc, rows, stage, 1, offset);
            fill(other, 0);
            fill(other, 1);
            if (threadIdx.x < SCALES)
                fill(other, 4);
            pieces.of_weights(next, load);
            multiply<FP16, UNSIGNED>(acc, rows, stage, 2, offset);
            multiply<FP16, UNSIGNED>(acc, rows, stage, 3, offset);
            fill(other, 2);
            fill(other, 3);
            px::barrier();
        }

    store<FP16>([&](float(&y)[8][4], int m16) {
#pragma unroll
        for (int i = 0; i < 4; i++)                             // without a move of accumulators, which would spill
            if (i == m16)
#pragma unroll
                for (int e = 0; e < 32; e++)
                    y[e / 4][e % 4] = acc[i][e / 4][e % 4];
    }, shared.staging, to);
}

}  // namespace gemm_w4a4_sm75

#define GEMM_W4A4_SM75(NAME, UNSIGNED)                                                                                    \
    extern "C" __global__ void __launch_bounds__(gemm_w4a4_sm75::THREADS, 2)                                              \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, TILE_PARAMETERS) {      \
        gemm_w4a4_sm75::run<UNSIGNED>(qact, ascales, qweight, wscales, K, TILE_OPERANDS);                                 \
    }

// Grid: (N / 128, M / 128 rounded up). Block: 128. The name says dtype and signedness of the activation codes.
GEMM_W4A4_SM75(gemm_w4a4_sm75_fp16_s4, false)
GEMM_W4A4_SM75(gemm_w4a4_sm75_fp16_u4, true)
