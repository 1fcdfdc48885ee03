// w4a4_tile: what gemm_w4a4 and gemm_w4a4_sm75 share: all but how operands come into shared memory
//
//   out[m,n] = sum_g ascales[m,g] * wscales[n,g] * sum_{k in g} qact[m,k] * qweight[n,k]       g: 64 consecutive k
//            + sum_r low[m,r] * proj_up[n,r] + bias[n]
//            (+ what out held before, if `accumulate`), then an epilogue (epilogue.cuh)
//
//   qact, ascales, low   as quant_down writes them, M rounded up to 64
//   qweight  [N/128][K/64][8 n16][32 lanes] 16 bytes: two B fragments of m16n8k64, as in the checkpoint
//   wscales  [N/128][K/64][8 n16][4 t][4]   bf16 | fp16, as in the checkpoint: columns 2t, 2t+1, 8+2t, 9+2t of an n16 tile
//   proj_up  [N/16][R/16][32 lanes] 16 bytes: two B fragments of m16n8k16, as in the checkpoint     R % 16 == 0
//   bias     [N] bf16 | fp16 in plain order, or null
//   out      [M, N] bf16 | fp16, row stride ldo elements, 16-byte aligned rows                      N % 128 == 0
//
// One CTA = one 128 x 128 tile of out, 4 warps as 2 (M) x 2 (N), each 64 x 64 = 4 x 8 MMAs per group and 128 fp32
// accumulators per thread. The operands of one group are a stage of 8.75 KiB, copied in 16-byte pieces:
//
//               N ->   64    64
//            +------+-----+-----+
//   M   64   | qact | w0  | w1  |
//   |        | tile +-----+-----+
//   v   64   |      | w2  | w3  |           every shared read is 16 or 8 consecutive bytes per lane: no bank conflicts
//            +------+-----+-----+
//
// I1  One MMA spans exactly one group, so an int32 never crosses a scale: |sum| <= 64 * 15 * 8 = 7680, exact in fp32.
// I2  Accumulators are fp32: products of scales and sums reach beyond fp16, and bf16 accumulators cost 0.9 % at K = 3072.
//     Per sum two FFMA: wscale * sum from what the MMA left (ptx.cuh, mma_i4_offset), exactly: 11 and 13 bits. It takes wscales
//     below 2^103, beyond which bf16 goes and no layer.
// I3  Rows past M hold zeros or garbage of this CTA alone and are not stored.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_sm80.py, test_w4a4_sm75.py
// Source arXiv 2411.05007, checkpoint-format 6.1, 6.5
#pragma once
#include "tile.cuh"

namespace w4a4_tile {

using namespace tile;

struct Stage {
    words4 qact[2][4][32];              // [m64][m16][lane]
    words4 qweight[8][32];              // [n16][lane]
    float ascales[2][4][8][2];          // [m64][m16][g][row g, g+8]
    u16 wscales[8][4][4];               // [n16][t][column]
};
static_assert(sizeof(Stage) == 8960, "a stage is copied in 16-byte pieces");

template <int STAGES> union Shared {
    Stage stages[STAGES];
    Staging staging;                    // after the main loop
};

// The pieces of a stage that this thread copies: two of codes of activations, two of weights, and in the first SCALES threads
// one of scales. Piece i of thread t goes to the 16 bytes 128 i + t of the stage. M * K and N * K are below 2^37.
constexpr int PIECES = 5, SCALES = 48;

struct Pieces {
    const words4 *qact, *qweight, *scales;
    u32 first, second, weight, scale;       // where those of group 0 lie; group g is a constant stride further

    // An m64 block past the end is replaced by the last one: I3.
    PX Pieces(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int n_tile, int M, int K)
        : qact(qact), qweight(qweight), scales(threadIdx.x < 32 ? ascales : wscales) {
        const u32 thread = threadIdx.x, groups = K / 64, last64 = (M + 63) / 64 - 1;
        const u32 first64 = 2 * blockIdx.y, second64 = first64 < last64 ? first64 + 1 : last64;
        first = first64 * groups * 128 + thread;
        second = second64 * groups * 128 + thread;
        weight = n_tile * groups * 256 + thread;
        scale = (thread < 16 ? first64 : thread < 32 ? second64 : n_tile) * groups * 16 + thread % 16;
    }

    // copy(i, where it lies) of each piece of a kind.
    template <class Copy> PX void of_activations(u32 group, const Copy& copy) const {
        copy(0, qact + (first + group * 128));
        copy(1, qact + (second + group * 128));
    }
    template <class Copy> PX void of_weights(u32 group, const Copy& copy) const {
        copy(2, qweight + (weight + group * 256));
        copy(3, qweight + (weight + group * 256) + THREADS);
    }
    // For threads from SCALES on as well, which read one of the others'.
    template <class Copy> PX void of_scales(u32 group, const Copy& copy) const {
        copy(4, scales + (scale + group * 16));
    }
};

// What a warp reads of the activations of a stage.
struct Rows {
    words4 qact[4];                     // [m16]
    float ascale[4][2];                 // [m16][row g, g+8]

    PX explicit Rows(const Stage& from) {
        const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 64;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            qact[i] = from.qact[warp_m][i][lane];
            const words2 bits = *(const words2*)from.ascales[warp_m][i][lane / 4];
            ascale[i][0] = px::as_float(bits.x), ascale[i][1] = px::as_float(bits.y);
        }
    }
};

// acc += the product of one group with columns 16j to 16j + 15 of the warp's 64.
template <Half T, bool UNSIGNED>
PX void multiply(Sums& acc, const Rows& rows, const Stage& from, int j, const int (&offset)[4]) {
    const int lane = threadIdx.x % 32, n16 = threadIdx.x / 32 % 2 * 4 + j;
    const words4 b = from.qweight[n16][lane];
    const words2 s = *(const words2*)from.wscales[n16][lane % 4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 pair = h ? s.y : s.x;
        const float wscale[2] = {px::low_half<T>(pair), px::high_half<T>(pair)};
        const float less[2] = {-px::OFFSET * wscale[0], -px::OFFSET * wscale[1]};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float sum[4];
            px::mma_i4_offset<UNSIGNED>(sum, rows.qact[i], h ? b.z : b.x, h ? b.w : b.y, offset);
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[i][2 * j + h][e] += rows.ascale[i][e / 2] * px::fma(sum[e], wscale[e % 2], less[e % 2]);
        }
    }
}

}  // namespace w4a4_tile
