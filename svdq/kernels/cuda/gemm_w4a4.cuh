// gemm_w4a4: out = int4 part + low-rank part + bias, then an epilogue, on sm_80 and later: w4a4_ring.cuh and tile.cuh
//
// Arch  s4 MMA is native on sm_80..89; for sm_90 and later the compiler emulates it: correct, slow, good for testing.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_sm80.py
#include "w4a4_ring.cuh"

namespace gemm_w4a4 {

using namespace w4a4_tile;
constexpr int STAGES = 4;

template <Half T, bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int K,
            const Operands& to) {
    __shared__ Shared<STAGES> shared;
    Sums acc;
    clear(acc);
    w4a4_ring::multiply<T, UNSIGNED>(acc, shared.stages, {qact, ascales, qweight, wscales, (int)blockIdx.x, to.M, K}, K / 64);
    px::barrier();                                              // other warps may still read the last stage
    store<T>([&](float(&y)[8][4], int) { take(y, acc); }, shared.staging, to);
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
