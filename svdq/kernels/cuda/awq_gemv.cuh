// awq_gemv: modulation, out = x * W + bias with 4-bit weights and 16-bit activations, for a few rows of x
//
//   out[b,n] = bias[n] + sum_g ( wscales[g,n] * sum_{k in g} u[n,k] * x[b,k]  +  wzeros[g,n] * sum_{k in g} x[b,k] )
//
//   x        [batch, K]      bf16 | fp16, batch <= 8, K % 64 == 0        shared by all layers of the launch
//   qweight  [N/4][K/64][4 rows][2 halves][8] 16-bit words of 4 codes: bits 4v are k = 32 half + 8v + e for word e
//   wscales, wzeros  [K/64, N] bf16 | fp16         bias [N] bf16 | fp16 or null       out [batch, N] bf16 | fp16
//
// All 76 modulations of a FLUX step read one vector, so one launch takes many layers: blockIdx.y picks a Layer. They are
// passed by value, 80 fit into the 4 KiB of arguments: no table in device memory, nothing to copy before the launch.
//
// A warp owns 4 outputs: 128 bytes of qweight per group of 64. Lane = 8 q + 2 r + h works on group 4i+q, row r, half h:
// 16 bytes, 32 codes. The zero point is not applied per weight but to the sum of x, once per 32.
//
//   x in shared memory, CHUNK inputs at a time. Lanes of different q read 128 bytes apart, the same bank, so each starts
//   at its own v: v = (step + q) % 4 spreads the four over all banks.
//
// I1  Sums run in a fixed order within a lane and are added by shuffles: bit-identical runs.
// I2  Rows of x past `batch` are zero in shared memory; their sums are not stored.
// Spec reference.py awq_gemv    Test tests/kernels/families/test_awq_gemv.py    Source checkpoint-format 5.7, 6.8
#include "ptx.cuh"

namespace awq_gemv {

constexpr int WARPS = 8, CHUNK = 1024;

struct Layer {
    const words4* qweight;
    const u16* wscales;
    const u16* wzeros;
    const u16* bias;
    u16* out;
    u64 N;
};

constexpr int MAX_LAYERS = 80;

struct Layers { Layer layer[MAX_LAYERS]; };

template <Half T, int BATCH>
PX void run(const u16* x, const Layers& layers, int batch, int K) {
    __shared__ alignas(16) u16 inputs[BATCH][CHUNK];
    const Layer& layer = layers.layer[blockIdx.y];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 8, r = lane / 2 % 4, h = lane % 2;
    const u64 quad = (u64)blockIdx.x * WARPS + warp;
    const bool inside = quad * 4 < layer.N;
    const int groups = K / 64;

    float sums[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++)
        sums[b] = 0.0f;

    for (int start = 0; start < K; start += CHUNK) {
        const int length = K - start < CHUNK ? K - start : CHUNK;
        for (int i = threadIdx.x; i < BATCH * (CHUNK / 8); i += 32 * WARPS) {
            const int b = i / (CHUNK / 8), k = i % (CHUNK / 8) * 8;
            *(words4*)&inputs[b][k] = b < batch && k < length ? *(const words4*)(x + (u64)b * K + start + k)
                                                              : words4{0u, 0u, 0u, 0u};
        }
        px::barrier();
        if (inside)
            for (int local = q; local < length / 64; local += 4) {
                const u64 group = start / 64 + local;
                const words4 codes = layer.qweight[(quad * groups + group) * 8 + r * 2 + h];
                const u32 word[4] = {codes.x, codes.y, codes.z, codes.w};
                const float scale = px::low_half<T>(layer.wscales[group * layer.N + quad * 4 + r]);
                const float zero = px::low_half<T>(layer.wzeros[group * layer.N + quad * 4 + r]);
                float dot[BATCH], sum[BATCH];
#pragma unroll
                for (int b = 0; b < BATCH; b++)
                    dot[b] = sum[b] = 0.0f;
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    const int v = (step + q) % 4;
#pragma unroll
                    for (int b = 0; b < BATCH; b++) {
                        const words4 eight = *(const words4*)&inputs[b][local * 64 + h * 32 + v * 8];
                        const u32 pair[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float first = px::low_half<T>(pair[i]), second = px::high_half<T>(pair[i]);
                            dot[b] += (float)((word[i] >> 4 * v) & 15u) * first;
                            dot[b] += (float)((word[i] >> (4 * v + 16)) & 15u) * second;
                            sum[b] += first + second;
                        }
                    }
                }
#pragma unroll
                for (int b = 0; b < BATCH; b++)
                    sums[b] += scale * dot[b] + zero * sum[b];
            }
        px::barrier();
    }

    // Lanes of one row differ in q and h: bits 4, 3 and 0.
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
        const int bits[3] = {16, 8, 1};
#pragma unroll
        for (int i = 0; i < 3; i++)
            sums[b] += px::as_float(px::swap_lanes(px::as_bits(sums[b]), bits[i]));
        if (inside && b < batch && q == 0 && h == 0) {
            const u64 n = quad * 4 + r;
            const float bias = layer.bias ? px::low_half<T>(layer.bias[n]) : 0.0f;
            layer.out[(u64)b * layer.N + n] = (u16)px::pack_half<T>(px::clamped<T>(sums[b] + bias), 0.0f);
        }
    }
}

}  // namespace awq_gemv

#define AWQ_GEMV(NAME, T, BATCH)                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * awq_gemv::WARPS)                                                    \
    NAME(const u16* x, const __grid_constant__ awq_gemv::Layers layers, int batch, int K) {                               \
        awq_gemv::run<T, BATCH>(x, layers, batch, K);                                                                     \
    }

// Grid: (largest N / 32 rounded up, layers). Block: 256. The name says dtype and the largest batch.
AWQ_GEMV(awq_gemv_bf16_b1, BF16, 1)
AWQ_GEMV(awq_gemv_bf16_b8, BF16, 8)
AWQ_GEMV(awq_gemv_fp16_b1, FP16, 1)
AWQ_GEMV(awq_gemv_fp16_b8, FP16, 8)
