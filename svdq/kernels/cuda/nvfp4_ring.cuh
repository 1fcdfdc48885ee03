// nvfp4_ring: the main loop of NVFP4 kernels: operands behind a ring of background copies, products by block-scaled MMA
//
//   acc[m,n] = sum_k (qact[m,k] * ascales[m,k/16]) * (qweight[n,k] * wscales[n,k/16])
//
//   qact, ascales   as quant_nvfp4 writes them, M rounded up to 64
//   qweight   [N/128][K/64][8 n16][32 lanes] 16 bytes: two B fragments of m16n8k64, e2m1, as in the checkpoint
//   wscales   [N/128][K/64][32 lanes][4 n32] words of four ue4m3, as in the checkpoint: lane 4g+t has column 8t + g of each n32
//
// One CTA = 128 rows x 128 columns, 4 warps as 2 (M) x 2 (N), each 64 x 64 = 4 x 8 MMAs per 64 columns of K. Of these a stage
// has one or two (K64), 9 KiB each:
//
//               N ->   64    64             in time, one column per step, STAGES stages:
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
// I2  The stage filled in step s was last read in step s-1: one barrier per step is enough. At the end all copies have come,
//     but other warps may still read the last stage.
// I3  Rows past M hold zeros or garbage of this CTA alone.
// I4  There are at least STAGES - 1 steps: K is a multiple of 128.
// Tried  four stages of 64 columns for gemm_nvfp4: 3.5 instructions per MMA in the place of 2.8, as scales are half a piece per
//     thread and need a branch.
// Arch  sm_120a and sm_121a only: no other GPU has the instruction, and the compiler emulates it nowhere.
// Test tests/kernels/families/test_nvfp4_sm120.py    Source arXiv 2411.05007, PTX ISA 9 (9.7.14.5.14)
#pragma once
#include "tile.cuh"

namespace nvfp4_ring {

using namespace tile;

template <int K64> struct Stage {
    words4 qact[2][K64][4][32];         // [m64][k64][m16][lane]
    words4 qweight[K64][8][32];         // [k64][n16][lane]
    words2 ascales[2][K64][32];         // [m64][k64][lane]: of two m32
    words2 wscales[K64][32][2];         // [k64][lane][n64]: of two n32
};

// Where this thread's pieces of 16 bytes of step 0 lie; step s is a constant stride further, one multiply-add per pointer.
template <int K64> struct Pieces {
    const words4 *qact[2], *qweight, *scales;
    bool is_weight;                     // which of the scales this thread copies

    // An m64 block past the end is replaced by the last one: I3.
    PX Pieces(const words4* qact_of_all, const words4* ascales, const words4* qweight_of_all, const words4* wscales, int n_tile,
              int M, int K) {
        const int thread = threadIdx.x, groups = K / 64, last64 = (M + 63) / 64 - 1;
        const int first64 = 2 * blockIdx.y, second64 = first64 < last64 ? first64 + 1 : last64;
        qact[0] = qact_of_all + (u64)first64 * groups * 128 + thread;
        qact[1] = qact_of_all + (u64)second64 * groups * 128 + thread;
        qweight = qweight_of_all + (u64)n_tile * groups * 256 + thread;
        is_weight = thread >= 32 * K64;
        scales = is_weight ? wscales + (u64)n_tile * groups * 32 + (thread - 32 * K64)
                           : ascales + (u64)(thread < 16 * K64 ? first64 : second64) * groups * 16 + thread % (16 * K64);
    }

    PX void copy(Stage<K64>& to, u32 step) const {
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < 2 * K64; i++) {
            px::copy16(&to.qact[0][0][0][0] + i * THREADS + thread, qact[i / K64] + (step * K64 + i % K64) * 128);
            px::copy16(&to.qweight[0][0][0] + i * THREADS + thread, qweight + (step * K64 * 256 + i * THREADS));
        }
        if (64 * K64 == THREADS || thread < 64 * K64)           // wscales follow ascales
            px::copy16((words4*)to.ascales + thread, scales + step * K64 * (is_weight ? 32 : 16));
        px::copy_commit();
    }
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

template <int K64> PX void multiply(Sums& acc, const Stage<K64>& from) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / 2, warp_n = warp % 2;
#pragma unroll
    for (int k64 = 0; k64 < K64; k64++) {
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
}

template <int K64, int STAGES> PX void multiply(Sums& acc, Stage<K64> (&stages)[STAGES], const Pieces<K64>& pieces, int steps) {
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++)
        pieces.copy(stages[step], step);
#pragma unroll 1
    for (int start = 0; start < steps; start += STAGES)
#pragma unroll
        for (int i = 0; i < STAGES; i++) {                      // unrolled, so that stages have constant addresses
            const int step = start + i;
            if (step >= steps)
                break;
            px::copy_wait<STAGES - 2>();
            px::barrier();
            if (step + STAGES - 1 < steps)
                pieces.copy(stages[(i + STAGES - 1) % STAGES], step + STAGES - 1);
            else
                px::copy_commit();                              // empty, so that the count above stays true
            multiply<K64>(acc, stages[i]);
        }
}

// Scales of the tensor and of its columns, which the low rank must not have.
template <Half T> PX void scale_columns(Sums& acc, const u16* wcscales, float wtscale, int n_tile) {
    const int column0 = n_tile * TILE + threadIdx.x / 32 % 2 * 64, t = threadIdx.x % 4;
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
}

}  // namespace nvfp4_ring
