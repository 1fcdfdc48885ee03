// gemm_w4a4: out = int4 part + low-rank part + bias, on sm_80 and later: w4a4_tile.cuh behind a ring of background copies
//
//   in time, one column per group, STAGES stages:
//     copy   g+3  g+4  g+5     cp.async into the stage that MMA g-1 has left
//     mma    g    g+1  g+2     int32, * ascale * wscale into fp32, in registers
//
// I1  The stage filled in step g was last read in step g-1: one barrier per group is enough.
// Tried  a rolled main loop: 13.3 instructions per MMA and a spill. Sums by I2FP, times products of scales: 15.4.
// Arch  s4 MMA is native on sm_80..89; for sm_90 and later the compiler emulates it: correct, slow, good for testing.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_sm80.py
#include "w4a4_tile.cuh"

namespace gemm_w4a4 {

using namespace w4a4_tile;
constexpr int STAGES = 4;

template <Half T, bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int K,
            const Operands& to) {
    __shared__ Shared<STAGES> shared;
    const Pieces pieces(qact, ascales, qweight, wscales, to.M, K);
    auto copy_stage = [&](u32 group, int stage) {
        words4* to = (words4*)&shared.stages[stage] + threadIdx.x;
        auto copy = [&](int i, const words4* from) { px::copy16(to + i * THREADS, from); };
        pieces.of_activations(group, copy);
        pieces.of_weights(group, copy);
        if (threadIdx.x < SCALES)
            pieces.of_scales(group, copy);
    };

    Sums acc;
    clear(acc);
    int offset[4];
    px::offset_bits(offset, K % 64);
    const int groups = K / 64;
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
            const Rows rows(shared.stages[i]);
#pragma unroll
            for (int j = 0; j < 4; j++)
                multiply<T, UNSIGNED>(acc, rows, shared.stages[i], j, offset);
        }

    px::copy_wait<0>();
    px::barrier();                                              // other warps may still read the last stage
    store<T>([&](float(&y)[8][4], int m16) { take(y, acc, m16); }, shared.staging, to);
}

}  // namespace gemm_w4a4

#define GEMM_W4A4(NAME, T, UNSIGNED)                                                                                      \
    extern "C" __global__ void __launch_bounds__(gemm_w4a4::THREADS, 2)                                                   \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, TILE_PARAMETERS) {      \
        gemm_w4a4::run<T, UNSIGNED>(qact, ascales, qweight, wscales, K, TILE_OPERANDS);                                   \
    }

// Grid: (N / 128, M / 128 rounded up). Block: 128. The name says dtype and signedness of the activation codes.
GEMM_W4A4(gemm_w4a4_bf16_s4, BF16, false)
GEMM_W4A4(gemm_w4a4_bf16_u4, BF16, true)
GEMM_W4A4(gemm_w4a4_fp16_s4, FP16, false)
GEMM_W4A4(gemm_w4a4_fp16_u4, FP16, true)
