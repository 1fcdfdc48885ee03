// mlp_nvfp4: mlp.cuh around nvfp4_ring.cuh, three stages of 64 columns, and nvfp4_codes.cuh
//
// Test tests/kernels/families/test_mlp.py
#include "mlp.cuh"
#include "nvfp4_codes.cuh"
#include "nvfp4_ring.cuh"

namespace mlp_nvfp4 {

using namespace nvfp4_ring;

template <Half T>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const u16* wcscales,
            float wtscale, int K, const Operands& of, const u16* smooth, words4* qact2, u32* ascales2, const mlp::Second& to) {
    typedef Stage<1> Ring[mlp::STAGES];
    mlp::run<T, Ring>(
        of, to,
        [&](Ring& ring, int n_tile) {
            Accumulators sums;
            multiply(sums.acc, ring, Pieces<1>(qact, ascales, qweight, wscales, n_tile, of.M, K), K / 64);
            scale_columns<T>(sums.acc, wcscales, wtscale, n_tile);
            return sums;
        },
        [&](const u32(&pairs)[2][8], const bool(&)[2], int tile16, int group) {
            quant_nvfp4::quantise<T>(pairs, smooth, qact2, ascales2, tile16, group, of.N / 64);
        });
}

}  // namespace mlp_nvfp4

#define MLP_NVFP4(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(mlp_nvfp4::THREADS, 2)                                                   \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const u16* wcscales,    \
         float wtscale, const words4* low, const words4* proj_up, const u16* bias, const u16* smooth,                     \
         const words4* proj_down, words4* qact2, u32* ascales2, words4* shares, int M, int N, int K, int R,               \
         int R2, int in_shared) {                                                                                         \
        mlp_nvfp4::run<T>(qact, ascales, qweight, wscales, wcscales, wtscale, K,                                          \
                          {low, proj_up, bias, nullptr, M, N, R, 0, 0, {}}, smooth, qact2, ascales2,                      \
                          {proj_down, shares, R2, in_shared});                                                            \
    }

// Grid: (shares, M / 128 rounded up). Block: 128. Dynamic shared memory: three stages, and with in_shared 512 R2 bytes.
MLP_NVFP4(mlp_nvfp4_bf16, BF16)
MLP_NVFP4(mlp_nvfp4_fp16, FP16)
