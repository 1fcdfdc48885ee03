// gemm_int8: out = (8-bit activations) x (4-bit weights) + low-rank part + bias
//
//   out[m,n] = ascales[m] * sum_g wscales[n,g] * sum_{k in g} qact[m,k] * qweight[n,k]         g: 64 consecutive k
//            + sum_r low[m,r] * proj_up[n,r] + bias[n]
//            (+ what out held before, if `accumulate`), then an epilogue (epilogue.cuh)
//
//   qact, ascales, low   as quant_int8 writes them, M rounded up to 64
//   qweight  [N/128][K/64][8 n16][32 lanes] 16 bytes: two B fragments of m16n8k64, as in the checkpoint
//   wscales  [N/128][K/64][8 n16][4 t][4]   bf16 | fp16, as in the checkpoint: columns 2t, 2t+1, 8+2t, 9+2t of an n16 tile
//   proj_up  [N/16][R/16][32 lanes] 16 bytes: two B fragments of m16n8k16, as in the checkpoint     R % 16 == 0
//   bias     [N] bf16 | fp16 in plain order, or null
//   out      [M, N] bf16 | fp16, row stride ldo elements, 16-byte aligned rows                      N % 128 == 0
//
// A word of 4-bit codes w, columns 8t..8t+7 of 32, becomes two words of bytes, each 16 times its code:
//   (w << 4) & 0xf0f0f0f0   columns 8t, 8t+2, 8t+4, 8t+6        w & 0xf0f0f0f0   columns 8t+1, 8t+3, 8t+5, 8t+7
// Together they are the B fragment of one m16n8k32, whose k is in the order that quant_int8 gives A. The factor 16 leaves with
// the token's scale.
//
// One CTA = one 128 x 128 tile of out, 4 warps as 2 (M) x 2 (N), each 64 x 64 = 4 x 8 x 2 MMAs per group and 128 fp32
// accumulators per thread:
//
//               N ->   64    64             in time, one column per group, STAGES stages of 12.25 KiB:
//            +------+-----+-----+             copy   g+2  g+3  g+4     cp.async into the stage that MMA g-1 has left
//   M   64   | qact | w0  | w1  |             mma    g    g+1  g+2     int32, * wscale into fp32, in registers
//   |        | tile +-----+-----+
//   v   64   |      | w2  | w3  |           every shared read is 16 or 8 consecutive bytes per lane: no bank conflicts
//            +------+-----+-----+
//
// I1  Two MMAs span exactly one group, so an int32 never crosses a scale: |sum| <= 64 * 127 * 128 = 1040384 < 2^22, exact in
//     fp32, and so are its products with 1/16.
// I2  Accumulators are fp32: products of scales and sums reach beyond fp16, and bf16 accumulators cost 0.9 % at K = 3072.
// I3  The stage filled in step g was last read in step g-1: one barrier per group is enough.
// I4  Rows past M hold zeros or garbage of this CTA alone and are not stored.
// I5  A group is multiplied in two parts with the copy between them, a border to the compiler: what it fetches and unpacks ahead
//     fits into registers.
// Tried  a group at once: 255 registers and up to 144 bytes spilled; 8 warps of 64 x 32: 7.7 to 8.8 instructions per MMA.
// Arch  s8 MMA is native on sm_80 and every later one so far.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a8_int8.py
// Source arXiv 2411.05007, checkpoint-format 6.1, 6.5
#include "tile.cuh"

namespace gemm_int8 {

using namespace tile;
constexpr int STAGES = 3;
constexpr u32 CODES = 0xf0f0f0f0;       // where a byte has sixteen times its code

struct Stage {
    words4 qact[2][4][2][32];           // [m64][m16][half of k][lane]
    words4 qweight[8][32];              // [n16][lane]
    u16 wscales[8][4][4];               // [n16][t][column]
};
static_assert(sizeof(Stage) == 12544, "a stage is copied in 16-byte pieces");

union Shared {
    Stage stages[STAGES];
    Staging staging;                    // after the main loop
};

template <Half T>
PX void run(const words4* qact, const words2* ascales, const words4* qweight, const words4* wscales, int K,
            const Operands& to) {
    __shared__ Shared shared;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int warp_m = warp / 2, warp_n = warp % 2;
    const int groups = K / 64, blocks64 = (to.M + 63) / 64;
    const int n_tile = blockIdx.x, m_tile = blockIdx.y;

    // Where group 0 of this CTA lies, in 16-byte units: 32 bits are enough, and registers are short. An m64 block past the end
    // is replaced by the last one: I4.
    const u32 last64 = blocks64 - 1, first64 = 2 * m_tile, second64 = first64 < last64 ? first64 + 1 : last64;
    const u32 qact_at[2] = {first64 * groups * 256, second64 * groups * 256}, qweight_at = n_tile * groups * 256;
    u32 next = thread;                                          // this thread's piece of the group to be copied next

    auto copy_stage = [&](int stage) {
        Stage& into = shared.stages[stage];
        const words4* from[3] = {qact + (qact_at[0] + next), qact + (qact_at[1] + next), qweight + (qweight_at + next)};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            px::copy16(&into.qact[0][0][0][0] + i * THREADS + thread, from[0] + i * THREADS);
            px::copy16(&into.qact[1][0][0][0] + i * THREADS + thread, from[1] + i * THREADS);
            px::copy16(&into.qweight[0][0] + i * THREADS + thread, from[2] + i * THREADS);
        }
        if (thread < 16)
            px::copy16((words4*)into.wscales + thread, wscales + ((qweight_at + next) / 16 + thread));
        next += 256;
    };

    Sums acc;
    clear(acc);

    int zero[4];
    px::start_sum(zero, to.M);
    // Columns 32 * part .. 32 * part + 31 of the warp tile.
    auto multiply = [&](const Stage& from, int part) {
        u32 b[4][2][2];                                         // [n8][half of k]: fragment
        float wscale[4][2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const words4 w = from.qweight[warp_n * 4 + 2 * part + j][lane];
            const words2 s = *(const words2*)from.wscales[warp_n * 4 + 2 * part + j][t];
            b[2 * j][0][0] = w.x << 4 & CODES, b[2 * j][0][1] = w.x & CODES;
            b[2 * j][1][0] = w.y << 4 & CODES, b[2 * j][1][1] = w.y & CODES;
            b[2 * j + 1][0][0] = w.z << 4 & CODES, b[2 * j + 1][0][1] = w.z & CODES;
            b[2 * j + 1][1][0] = w.w << 4 & CODES, b[2 * j + 1][1][1] = w.w & CODES;
            wscale[2 * j][0] = px::low_half<T>(s.x), wscale[2 * j][1] = px::high_half<T>(s.x);
            wscale[2 * j + 1][0] = px::low_half<T>(s.y), wscale[2 * j + 1][1] = px::high_half<T>(s.y);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const words4 a[2] = {from.qact[warp_m][i][0][lane], from.qact[warp_m][i][1][lane]};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int sum[4];
                px::mma_i8(sum, a[0], b[j][0][0], b[j][0][1], zero);
                px::mma_i8(sum, a[1], b[j][1][0], b[j][1][1], sum);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][4 * part + j][e] += wscale[j][e % 2] * px::sum_value(sum[e]);
            }
        }
    };

#pragma unroll
    for (int group = 0; group < STAGES - 1; group++) {
        if (group < groups)
            copy_stage(group);
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
            multiply(shared.stages[i], 0);
            if (group + STAGES - 1 < groups)
                copy_stage((i + STAGES - 1) % STAGES);
            px::copy_commit();                                  // empty at the end, so that the count above stays true
            multiply(shared.stages[i], 1);
        }

    px::copy_wait<0>();
    px::barrier();                                              // other warps may still read the last stage
    store<T>([&](float(&y)[8][4], int m16) {
        take(y, acc);
        const int block64 = 2 * m_tile + warp_m;
        const words2 bits = ascales[((block64 < blocks64 ? block64 : blocks64 - 1) * 4 + m16) * 8 + g];
        const float ascale[2] = {px::as_float(bits.x) / 16, px::as_float(bits.y) / 16};
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                y[j][e] *= ascale[e / 2];
    }, shared.staging, to);
}

}  // namespace gemm_int8

#define GEMM_INT8(NAME, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(gemm_int8::THREADS, 2)                                                   \
    NAME(const words4* qact, const words2* ascales, const words4* qweight, const words4* wscales, TILE_PARAMETERS) {      \
        gemm_int8::run<T>(qact, ascales, qweight, wscales, K, TILE_OPERANDS);                                             \
    }

// Grid: (N / 128, M / 128 rounded up). Block: 128. The name says the dtype.
GEMM_INT8(gemm_int8_bf16, BF16)
GEMM_INT8(gemm_int8_fp16, FP16)
