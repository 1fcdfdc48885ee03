// w4a4_tile: what gemm_w4a4 and gemm_w4a4_sm75 share: all but how operands come into shared memory
//
//   out[m,n] = sum_g ascales[m,g] * wscales[n,g] * sum_{k in g} qact[m,k] * qweight[n,k]       g: 64 consecutive k
//            + sum_r low[m,r] * proj_up[n,r] + bias[n]
//            (+ what out held before, if `accumulate`)
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
#include "ptx.cuh"

namespace w4a4_tile {

constexpr int TILE = 128, WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW = 64 + 8;             // 16-bit elements of a staged row of out: the padding spreads rows over the banks

struct Stage {
    words4 qact[2][4][32];              // [m64][m16][lane]
    words4 qweight[8][32];              // [n16][lane]
    float ascales[2][4][8][2];          // [m64][m16][g][row g, g+8]
    u16 wscales[8][4][4];               // [n16][t][column]
};
static_assert(sizeof(Stage) == 8960, "a stage is copied in 16-byte pieces");

template <int STAGES> union Shared {
    Stage stages[STAGES];
    u16 out[WARPS][32][ROW];            // after the main loop: half a warp tile on its way to 16-byte stores
};

// The pieces of a stage that this thread copies: two of codes of activations, two of weights, and in the first SCALES threads
// one of scales. Piece i of thread t goes to the 16 bytes 128 i + t of the stage. M * K and N * K are below 2^37.
constexpr int PIECES = 5, SCALES = 48;

struct Pieces {
    const words4 *qact, *qweight, *scales;
    u32 first, second, weight, scale;       // where those of group 0 lie; group g is a constant stride further

    // An m64 block past the end is replaced by the last one: I3.
    PX Pieces(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int M, int K)
        : qact(qact), qweight(qweight), scales(threadIdx.x < 32 ? ascales : wscales) {
        const u32 thread = threadIdx.x, groups = K / 64, last64 = (M + 63) / 64 - 1;
        const u32 first64 = 2 * blockIdx.y, second64 = first64 < last64 ? first64 + 1 : last64;
        first = first64 * groups * 128 + thread;
        second = second64 * groups * 128 + thread;
        weight = blockIdx.x * groups * 256 + thread;
        scale = (thread < 16 ? first64 : thread < 32 ? second64 : blockIdx.x) * groups * 16 + thread % 16;
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
template <Half T> PX void store(const Sums& acc, u16 (&staged)[WARPS][32][ROW], u16* out, int M, int ldo, int accumulate) {
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

}  // namespace w4a4_tile
