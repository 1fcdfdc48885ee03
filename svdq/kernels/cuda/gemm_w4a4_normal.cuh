// gemm_w4a4_normal: out = int4 part + low-rank part + bias, on sm_80, 86 and 89: tile.cuh behind w4a4_normal.cuh
//
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_normal.py
#include "w4a4_normal.cuh"

namespace gemm_w4a4_normal {

using namespace w4a4_normal;

template <class Form, Half T, bool UNSIGNED>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const float* columns,
            int K, const Operands& to) {
    __shared__ Shared<STAGES<Form>> shared;
    __shared__ Factors factors;
    auto product = multiply<Form, UNSIGNED>(shared.stages, factors, qact, ascales, qweight, wscales, columns, blockIdx.x, to.M,
                                            K);
    px::barrier();                                              // others may still read the last step
    store<T>([&](float(&y)[8][4], int m16) { product.take(y, m16); }, shared.staging, to);
}

}  // namespace gemm_w4a4_normal

#define GEMM_W4A4_NORMAL(NAME, FORM, T, UNSIGNED)                                                                         \
    extern "C" __global__ void __launch_bounds__(gemm_w4a4_normal::THREADS, gemm_w4a4_normal::FORM::CTAS)                 \
    NAME(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const float* columns,   \
         TILE_PARAMETERS) {                                                                                               \
        gemm_w4a4_normal::run<gemm_w4a4_normal::FORM, T, UNSIGNED>(qact, ascales, qweight, wscales, columns, K,            \
                                                                   TILE_OPERANDS);                                        \
    }

// Grid: (N / 128, M / 128 rounded up). Block: 128. The name says dtype, signedness of the activation codes, and the form;
// diag needs K % 128 == 0.
GEMM_W4A4_NORMAL(gemm_w4a4_normal_bf16_s4_fp16n, FP16N, BF16, false)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_bf16_u4_fp16n, FP16N, BF16, true)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_fp16_s4_fp16n, FP16N, FP16, false)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_fp16_u4_fp16n, FP16N, FP16, true)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_bf16_s4_diag, Diag, BF16, false)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_bf16_u4_diag, Diag, BF16, true)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_fp16_s4_diag, Diag, FP16, false)
GEMM_W4A4_NORMAL(gemm_w4a4_normal_fp16_u4_diag, Diag, FP16, true)
