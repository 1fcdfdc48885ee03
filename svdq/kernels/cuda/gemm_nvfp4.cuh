// gemm_nvfp4: out = NVFP4 part + low-rank part + bias
//
//   out[m,n] = wtscale * wcscales[n] * sum_k (qact[m,k] * ascales[m,k/16]) * (qweight[n,k] * wscales[n,k/16])
//            + sum_r low[m,r] * proj_up[n,r] + bias[n]
//            (+ what out held before, if `accumulate`), then an epilogue (epilogue.cuh)
//
//   qact, ascales, low   as quant_nvfp4 writes them, M rounded up to 64
//   qweight, wscales     as in nvfp4_ring.cuh
//   wcscales  [N] bf16 | fp16 as in the checkpoint: columns 2t, 2t+1, 8+2t, 9+2t of an n16 tile are neighbours; null: all 1
//   proj_up   [N/16][R/16][32 lanes] 16 bytes: two B fragments of m16n8k16, as in the checkpoint     R % 16 == 0
//   bias      [N] bf16 | fp16 in plain order, or null
//   out       [M, N] bf16 | fp16, row stride ldo elements, 16-byte aligned rows                      N % 128 == 0
//
// One CTA = one 128 x 128 tile of out: nvfp4_ring.cuh with two stages of 128 columns, then tile.cuh.
//
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_nvfp4_sm120.py
// Source arXiv 2411.05007, checkpoint-format 6.1, 6.5, PTX ISA 9 (9.7.14.5.14)
#include "nvfp4_ring.cuh"

namespace gemm_nvfp4 {

using namespace nvfp4_ring;

union Shared {
    Stage<2> stages[2];
    Staging staging;                    // after the main loop
};

template <Half T>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const u16* wcscales,
            float wtscale, int K, const Operands& to) {
    __shared__ Shared shared;
    Sums acc;
    clear(acc);
    multiply(acc, shared.stages, Pieces<2>(qact, ascales, qweight, wscales, blockIdx.x, to.M, K), K / 128);
    scale_columns<T>(acc, wcscales, wtscale, blockIdx.x);
    px::barrier();                                              // other warps may still read the last stage
    store<T>([&](float(&y)[8][4], int) { take(y, acc); }, shared.staging, to);
}

}  // namespace gemm_nvfp4

#define GEMM_NVFP4(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(gemm_nvfp4::THREADS, 2)                                                  \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const u16* wcscales,    \
         float wtscale, TILE_PARAMETERS) {                                                                                \
        gemm_nvfp4::run<T>(qact, ascales, qweight, wscales, wcscales, wtscale, K, TILE_OPERANDS);                         \
    }

// Grid: (N / 128, M / 128 rounded up). Block: 128. The name says dtype.
GEMM_NVFP4(gemm_nvfp4_bf16, BF16)
GEMM_NVFP4(gemm_nvfp4_fp16, FP16)
