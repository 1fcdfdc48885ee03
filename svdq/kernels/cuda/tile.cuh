// tile: what all GEMMs of mma.sync share: the accumulators of a CTA, and all that comes after its main loop
//
//   out[m,n] = acc[m,n] + sum_r low[m,r] * proj_up[n,r] + bias[n]      (+ what out held before, if `accumulate`)
//
//   low      [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, M rounded up to 64                R % 16 == 0
//   proj_up  [N/16][R/16][32 lanes] 16 bytes: two B fragments of m16n8k16, as in the checkpoint
//   bias     [N] bf16 | fp16 in plain order, or null
//   out      [M, N] bf16 | fp16, row stride ldo elements, 16-byte aligned rows                           N % 128 == 0
//
// One CTA = one 128 x 128 tile of out, 4 warps as 2 (M) x 2 (N), each 64 x 64: 128 fp32 accumulators per thread, which all MMAs
// of 16 x 8 lay out alike, so the low rank is added where the main loop left its sums.
//
//               N ->   64    64
//            +------+-----+-----+
//   M   64   |      | w0  | w1  |           grid: (N / 128, M / 128 rounded up)
//   |        |      +-----+-----+
//   v   64   |      | w2  | w3  |
//            +------+-----+-----+
//
// I1  Rows past M hold zeros or garbage of this CTA alone and are not stored.
// I2  fp16 ends at 65504 instead of Inf: what is packed is clamped before.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_sm80.py and those of the kernels that include it
// Source arXiv 2411.05007, checkpoint-format 6.5
#pragma once
#include "ptx.cuh"

namespace tile {

constexpr int TILE = 128, WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW = 64 + 8;             // 16-bit elements of a staged row of out: the padding spreads rows over the banks

typedef u16 Staged[WARPS][32][ROW];     // half a warp tile on its way to 16-byte stores
typedef float Sums[4][8][4];            // accumulators of a thread: [m16][n8][fragment]

PX void clear(Sums& acc) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[i][j][e] = 0.0f;
}

// acc += low * proj_up + bias.
template <Half T> PX void add_low_rank_and_bias(Sums& acc, const words4* low, const words4* proj_up, const u16* bias, int M,
                                                int R) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4, warp_m = warp / 2, warp_n = warp % 2;
    const int n_tile = blockIdx.x, rank_tiles = R / 16, block64 = 2 * blockIdx.y + warp_m;
    if (block64 < (M + 63) / 64)
        for (int r = 0; r < rank_tiles; r++) {                  // the two MMAs share the layout of C
            words4 b[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                b[j] = proj_up[((u64)(n_tile * 8 + warp_n * 4 + j) * rank_tiles + r) * 32 + lane];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const words4 a = low[((u64)(block64 * 4 + i) * rank_tiles + r) * 32 + lane];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    px::mma_half<T>(acc[i][2 * j], a, b[j].x, b[j].y);
                    px::mma_half<T>(acc[i][2 * j + 1], a, b[j].z, b[j].w);
                }
            }
        }

    if (bias)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 pair = *(const u32*)(bias + n_tile * TILE + warp_n * 64 + j * 8 + 2 * t);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][j][e] += e % 2 ? px::high_half<T>(pair) : px::low_half<T>(pair);
        }
}

// Sum of two pairs of 16-bit floats.
template <Half T> PX u32 add(u32 a, u32 b) {
    return px::pack_half<T>(px::clamped<T>(px::low_half<T>(a) + px::low_half<T>(b)),
                            px::clamped<T>(px::high_half<T>(a) + px::high_half<T>(b)));
}

// out = acc, or out += acc, through shared memory to whole 128-byte row segments, 32 rows of the warp tile at a time. All
// warps must have left the stages.
template <Half T> PX void store(const Sums& acc, Staged& staged, u16* out, int M, int ldo, int accumulate) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_m = warp / 2, column0 = blockIdx.x * TILE + warp % 2 * 64;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float* pair = &acc[2 * half + i][j][2 * e];
                    *(u32*)&staged[warp][i * 16 + e * 8 + g][j * 8 + 2 * t] =
                        px::pack_half<T>(px::clamped<T>(pair[0]), px::clamped<T>(pair[1]));
                }
        px::barrier();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int r = i * 4 + lane / 8, row = blockIdx.y * TILE + warp_m * 64 + half * 32 + r;
            words4 piece = *(const words4*)&staged[warp][r][lane % 8 * 8];
            if (row < M) {
                words4* to = (words4*)(out + (u64)row * ldo + column0 + lane % 8 * 8);
                if (accumulate) {
                    const words4 old = *to;
                    piece = words4{add<T>(piece.x, old.x), add<T>(piece.y, old.y), add<T>(piece.z, old.z),
                                   add<T>(piece.w, old.w)};
                }
                *to = piece;
            }
        }
        px::barrier();
    }
}

}  // namespace tile
