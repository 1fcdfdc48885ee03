// epilogue: what a GEMM does to its result before it stores it, chosen by an argument at run time
//
//   STORE   out = y                                            y: the product, + what out held before if `accumulate`
//   GATED   out = residual[m,n] + gate[n] * y                  y likewise
//   GELU    out = y/2 * (1 + tanh(0.79788456 * (y + 0.044715 y^3)))
//   QKV     out = per head of 128 of q and k, the first two thirds of N:
//               z = y * rsqrt(mean(y^2) + eps) * weight        weight: query or key
//               (out[2i], out[2i+1]) = rotation[m,i] (z[2i], z[2i+1])
//           out = y of v, the last third
//
//   residual [M, N] bf16 | fp16 as out, row stride ldr elements, 16-byte aligned rows; may be `out` if not `accumulate`
//   gate     [N] of the same type      query, key  [128] of the same type, N % 384 == 0 with these; all three 4-byte aligned
//   rotation [M][64][2][2] fp32, 2 x 2 matrices row by row; 16-byte aligned, null but for QKV
//
// Spec reference.py gate_residual, gelu_tanh, qk_norm_rope    Test tests/kernels/families/test_epilogues.py
#pragma once
#include "ptx.cuh"

enum Kind { STORE, GATED, GELU, QKV };          // as KINDS of epilogues.py

struct Epilogue {
    int kind, ldr;
    const u16 *residual, *gate, *query, *key;
    const float* rotation;
    float eps;
};

constexpr int HEAD = 128;

// The last parameters of a kernel, and an Epilogue of them.
#define EPILOGUE_PARAMETERS                                                                                               \
    int kind, const u16 *residual, int ldr, const u16 *gate, const u16 *query, const u16 *key, const float *rotation, float eps
#define EPILOGUE {kind, ldr, residual, gate, query, key, rotation, eps}

// y/2 * (1 + tanh(u)) by tanh.approx, whose error of 2^-11 leaves |y| * 2^-12.
PX float gelu(float y) {
    const float half = 0.5f * y;
    return half + half * px::tanh(y * (0.79788456f + 0.79788456f * 0.044715f * y * y));
}
