// mlp_w4a4_normal: mlp.cuh around w4a4_normal.cuh and w4a4_quant.cuh; the largest scale of each row of the second layer, which
// no CTA sees all of, comes from mlp_low.cuh
//
// Test tests/kernels/families/test_mlp.py
#include "mlp.cuh"
#include "w4a4_normal.cuh"
#include "w4a4_quant.cuh"

namespace mlp_w4a4_normal {

using namespace w4a4_normal;

template <class Form> struct Memory {
    Stage stages[STAGES<Form>];
    Factors factors;
};

template <class Form, Half T, bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const float* columns,
            int K, const Operands& of, const u16* smooth, words4* qact2, words2* ascales2, const mlp::Second& to) {
    static_assert(sizeof(mlp::Given) <= sizeof(Memory<Form>::stages), "factors are needed after the product");
    mlp::run<T, Memory<Form>>(
        of, to,
        [&](Memory<Form>& memory, int n_tile) {
            return multiply<Form, false>(memory.stages, memory.factors, qact, ascales, qweight, wscales, columns, n_tile, of.M,
                                         K);
        },
        [&](const u32(&pairs)[2][8], const bool(&inside)[2], int tile16, int group) {
            w4a4_quant::quantise<T, UNSIGNED, true>(pairs, smooth, qact2, ascales2, inside, tile16, group, of.N / 64);
        });
}

}  // namespace mlp_w4a4_normal

#define MLP_W4A4_NORMAL(NAME, FORM, T, UNSIGNED)                                                                          \
    extern "C" __global__ void __launch_bounds__(mlp_w4a4_normal::THREADS, mlp_w4a4_normal::FORM::CTAS)                   \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const float* columns,   \
         const words4* low, const words4* proj_up, const u16* bias, const u16* smooth, const words4* proj_down,           \
         words4* qact2, words2* ascales2, words4* shares, int M, int N, int K, int R, int R2, int in_shared) {            \
        mlp_w4a4_normal::run<mlp_w4a4_normal::FORM, T, UNSIGNED>(                                                         \
            qact, ascales, qweight, wscales, columns, K, {low, proj_up, bias, nullptr, M, N, R, 0, 0, {}}, smooth, qact2, \
            ascales2, {proj_down, shares, R2, in_shared});                                                                \
    }

// Grid: (shares, M / 128 rounded up). Block: 128. Dynamic shared memory: Memory of the form, and with in_shared 512 R2 bytes.
// The name says dtype, signedness of the second layer's codes, and the form; diag needs K % 128 == 0.
MLP_W4A4_NORMAL(mlp_w4a4_normal_bf16_s4_fp16n, FP16N, BF16, false)
MLP_W4A4_NORMAL(mlp_w4a4_normal_bf16_u4_fp16n, FP16N, BF16, true)
MLP_W4A4_NORMAL(mlp_w4a4_normal_fp16_s4_fp16n, FP16N, FP16, false)
MLP_W4A4_NORMAL(mlp_w4a4_normal_fp16_u4_fp16n, FP16N, FP16, true)
MLP_W4A4_NORMAL(mlp_w4a4_normal_bf16_s4_diag, Diag, BF16, false)
MLP_W4A4_NORMAL(mlp_w4a4_normal_bf16_u4_diag, Diag, BF16, true)
MLP_W4A4_NORMAL(mlp_w4a4_normal_fp16_s4_diag, Diag, FP16, false)
MLP_W4A4_NORMAL(mlp_w4a4_normal_fp16_u4_diag, Diag, FP16, true)
