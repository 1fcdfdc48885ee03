// mlp_w4a4_sm75: mlp.cuh around w4a4_registers.cuh and w4a4_quant.cuh, for INT4 on sm_75, in fp16; the codes of the second
// layer are signed or not, as it wants them, those of the first are signed
//
// Test tests/kernels/families/test_mlp.py
#include "mlp.cuh"
#include "w4a4_quant.cuh"
#include "w4a4_registers.cuh"

namespace mlp_w4a4_sm75 {

using namespace w4a4_registers;

// Sums begin at zero by an MMA, whose registers are an aligned four: else the compiler scatters them, has no pairs left for
// integer sums, and moves and spills.
struct Product : Accumulators {
    PX Product() {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                px::mma_half<FP16>(acc[i][j], words4{0, 0, 0, 0}, 0, 0);
    }
};

template <bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int K,
            const Operands& of, const u16* smooth, words4* qact2, words2* ascales2, const mlp::Second& to) {
    typedef Stage Ring[STAGES];
    mlp::run<FP16, Ring>(
        of, to,
        [&](Ring& ring, int n_tile) {
            Product product;
            w4a4_registers::multiply<false>(product.acc, ring, {qact, ascales, qweight, wscales, n_tile, of.M, K}, K / 64);
            return product;
        },
        [&](const u32(&pairs)[2][8], const bool(&inside)[2], int tile16, int group) {
            w4a4_quant::quantise<FP16, UNSIGNED>(pairs, smooth, qact2, ascales2, inside, tile16, group, of.N / 64);
        });
}

}  // namespace mlp_w4a4_sm75

#define MLP_W4A4_SM75(NAME, UNSIGNED)                                                                                     \
    extern "C" __global__ void __launch_bounds__(mlp_w4a4_sm75::THREADS, 2)                                               \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const words4* low,      \
         const words4* proj_up, const u16* bias, const u16* smooth, const words4* proj_down, words4* qact2,               \
         words2* ascales2, words4* shares, int M, int N, int K, int R, int R2, int in_shared) {                           \
        mlp_w4a4_sm75::run<UNSIGNED>(qact, ascales, qweight, wscales, K,                                                  \
                                     {low, proj_up, bias, nullptr, M, N, R, 0, 0, {}}, smooth, qact2, ascales2,           \
                                     {proj_down, shares, R2, in_shared});                                                 \
    }

// Grid: (shares, M / 128 rounded up). Block: 128. Dynamic shared memory: two stages, and with in_shared 512 R2 bytes. The name
// says dtype and signedness of the second layer's codes.
MLP_W4A4_SM75(mlp_w4a4_sm75_fp16_s4, false)
MLP_W4A4_SM75(mlp_w4a4_sm75_fp16_u4, true)
