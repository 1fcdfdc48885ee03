// gemm_nvfp4: out = NVFP4 part + low-rank part + bias
//
//   out[m,n] = wtscale * wcscales[n] * sum_k (qact[m,k] * ascales[m,k/16]) * (qweight[n,k] * wscales[n,k/16])
//            + sum_r low[m,r] * proj_up[n,r] + bias[n]
//            (+ what out held before, if `accumulate`), then an epilogue (epilogue.cuh)
//
//   qact, ascales, low   as quant_nvfp4 writes them, M rounded up to 64
//   qweight   [N/128][K/64][8 n16][32 lanes] 16 bytes: two B fragments of m16n8k64, e2m1, as in the checkpoint
//   wscales   [N/128][K/64][32 lanes][4 n32] words of four ue4m3, as in the checkpoint: lane 4g+t has column 8t + g of each n32
//   wcscales  [N] bf16 | fp16 as in the checkpoint: columns 2t, 2t+1, 8+2t, 9+2t of an n16 tile are neighbours; null: all 1
//   proj_up   [N/16][R/16][32 lanes] 16 bytes: two B fragments of m16n8k16, as in the checkpoint     R % 16 == 0
//   bias      [N] bf16 | fp16 in plain order, or null
//   out       [M, N] bf16 | fp16, row stride ldo elements, 16-byte aligned rows                      N % 128 == 0
//
// One CTA = one 128 x 128 tile of out, 4 warps as 2 (M) x 2 (N), each 64 x 64 = 2 x 4 x 8 MMAs per step of 128 columns and 128
// fp32 accumulators per thread:
//
//               N ->   64    64             in time, one column per step, two stages of 18 KiB:
//            +------+-----+-----+             copy   s+1  s+2  s+3     cp.async into the stage that MMA s-1 has left
//   M   64   | qact | w0  | w1  |             mma    s    s+1  s+2     scales are part of the instruction, sums are fp32
//   |        | tile +-----+-----+
//   v   64   |      | w2  | w3  |
//            +------+-----+-----+
//
// An MMA takes the scales of its 16 rows from two lanes of each four and those of its 8 columns from one (ptx.cuh), so one word
// per lane serves 32 rows, and one 32 columns: a lane reads 2 + 2 words per 64 columns, and moves none.
//
// I1  A product of two codes and their sum over 16 columns are exact in fp32. How the unit rounds sums of scaled ones is not
//     documented; simulators round once per MMA.
// I2  wtscale and wcscales come before the low rank, which they must not scale.
// I3  The stage filled in step s was last read in step s-1: one barrier per step is enough.
// I4  Rows past M hold zeros or garbage of this CTA alone and are not stored.
// Tried  four stages of 64 columns: 3.5 instructions per MMA, as the scales then are half a piece per thread and need a branch.
// Arch  sm_120a and sm_121a only: no other GPU has the instruction, and the compiler emulates it nowhere.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_nvfp4_sm120.py
// Source arXiv 2411.05007, checkpoint-format 6.1, 6.5, PTX ISA 9 (9.7.14.5.14)
#include "tile.cuh"

namespace gemm_nvfp4 {

using namespace tile;
constexpr int STAGES = 2;

struct Stage {
    words4 qact[2][2][4][32];           // [m64][k64][m16][lane]
    words4 qweight[2][8][32];           // [k64][n16][lane]
    words2 ascales[2][2][32];           // [m64][k64][lane]: of two m32
    words2 wscales[2][32][2];           // [k64][lane][n64]: of two n32
};
static_assert(sizeof(Stage) == 9 * 16 * THREADS, "each thread copies nine pieces of 16 bytes");

union Shared {
    Stage stages[STAGES];
    Staging staging;                    // after the main loop
};

// 16 rows of a warp tile, which are the first or the second of their m32.
template <int SECOND>
PX void multiply_row(float (&acc)[8][4], const words4& a, u32 ascales, const words4 (&b)[4], const words2& wscales) {
#pragma unroll
    for (int n32 = 0; n32 < 2; n32++) {
        const words4 &left = b[2 * n32], &right = b[2 * n32 + 1];
        const u32 scales = n32 ? wscales.y : wscales.x;
        px::mma_nvfp4<SECOND, 0>(acc[4 * n32], a, left.x, left.y, ascales, scales);
        px::mma_nvfp4<SECOND, 1>(acc[4 * n32 + 1], a, left.z, left.w, ascales, scales);
        px::mma_nvfp4<SECOND, 2>(acc[4 * n32 + 2], a, right.x, right.y, ascales, scales);
        px::mma_nvfp4<SECOND, 3>(acc[4 * n32 + 3], a, right.z, right.w, ascales, scales);
    }
}

template <Half T>
PX void run(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, const u16* wcscales,
            float wtscale, int K, const Operands& to) {
    __shared__ Shared shared;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, t = lane % 4;
    const int warp_m = warp / 2, warp_n = warp % 2;
    const int steps = K / 128, blocks64 = (to.M + 63) / 64;
    const int n_tile = blockIdx.x, m_tile = blockIdx.y;

    // Where this thread's pieces of step 0 lie; step s is a constant stride further, one multiply-add per pointer.
    // An m64 block past the end is replaced by the last one: I4.
    const int last64 = blocks64 - 1, first64 = 2 * m_tile, second64 = first64 < last64 ? first64 + 1 : last64;
    const words4* from_qact[2] = {qact + (u64)first64 * steps * 256 + thread, qact + (u64)second64 * steps * 256 + thread};
    const words4* from_qweight = qweight + (u64)n_tile * steps * 512 + thread;
    const bool is_weight = thread >= 64;                        // threads 0..63 copy scales of activations
    const words4* from_scales = is_weight ? wscales + (u64)n_tile * steps * 64 + thread % 64
                                          : ascales + (u64)(thread < 32 ? first64 : second64) * steps * 32 + thread % 32;

    auto copy_stage = [&](u32 step, int stage) {
        Stage& into = shared.stages[stage];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            px::copy16(&into.qact[0][0][0][0] + i * THREADS + thread, from_qact[i / 2] + step * 256 + i % 2 * THREADS);
            px::copy16(&into.qweight[0][0][0] + i * THREADS + thread, from_qweight + step * 512 + i * THREADS);
        }
        px::copy16((words4*)into.ascales + thread, from_scales + step * (is_weight ? 64 : 32));   // wscales follow ascales
        px::copy_commit();
    };

    Sums acc;
    clear(acc);

    auto multiply = [&](const Stage& from) {
#pragma unroll
        for (int k64 = 0; k64 < 2; k64++) {
            words4 b[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                b[j] = from.qweight[k64][warp_n * 4 + j][lane];
            const words2 w = from.wscales[k64][lane][warp_n], a = from.ascales[warp_m][k64][lane];
            multiply_row<0>(acc[0], from.qact[warp_m][k64][0][lane], a.x, b, w);
            multiply_row<1>(acc[1], from.qact[warp_m][k64][1][lane], a.x, b, w);
            multiply_row<0>(acc[2], from.qact[warp_m][k64][2][lane], a.y, b, w);
            multiply_row<1>(acc[3], from.qact[warp_m][k64][3][lane], a.y, b, w);
        }
    };

    copy_stage(0, 0);
#pragma unroll 1
    for (int start = 0; start < steps; start += STAGES)
#pragma unroll
        for (int i = 0; i < STAGES; i++) {                      // unrolled, so that stages have constant addresses
            const int step = start + i;
            if (step >= steps)
                break;
            px::copy_wait<0>();
            px::barrier();
            if (step + 1 < steps)
                copy_stage(step + 1, (i + 1) % STAGES);
            multiply(shared.stages[i]);
        }

    // scales of the tensor and of its columns
    const int column0 = n_tile * TILE + warp_n * 64;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float scale[4] = {wtscale, wtscale, wtscale, wtscale};  // columns 2t, 2t+1, 8+2t, 9+2t of this n16
        if (wcscales) {
            const words2 pairs = *(const words2*)(wcscales + column0 + j * 16 + t * 4);
            scale[0] *= px::low_half<T>(pairs.x), scale[1] *= px::high_half<T>(pairs.x);
            scale[2] *= px::low_half<T>(pairs.y), scale[3] *= px::high_half<T>(pairs.y);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 8; e++)
                acc[i][2 * j + e / 4][e % 4] *= scale[e / 4 * 2 + e % 2];
    }

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
