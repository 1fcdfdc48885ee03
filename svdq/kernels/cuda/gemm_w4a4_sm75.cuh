// gemm_w4a4_sm75: out = int4 part + low-rank part + bias, then an epilogue, on sm_75: w4a4_registers.cuh and tile.cuh
//
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_sm75.py
#include "w4a4_registers.cuh"

namespace gemm_w4a4_sm75 {

using namespace w4a4_registers;

template <bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int K,
            const Operands& to) {
    __shared__ Shared<STAGES> shared;
    Sums acc;
    clear(acc);
    w4a4_registers::multiply<UNSIGNED>(acc, shared.stages, {qact, ascales, qweight, wscales, (int)blockIdx.x, to.M, K},
                                       K / 64);
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
