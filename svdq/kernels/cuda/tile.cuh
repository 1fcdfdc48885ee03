// tile: what all GEMMs of mma.sync share: the accumulators of a CTA, and all that comes after its main loop
//
//   y[m,n] = acc[m,n] + sum_r low[m,r] * proj_up[n,r] + bias[n]      (+ what out held before, if `accumulate`)
//   out    = epilogue(y)                                             see epilogue.cuh
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
// Results leave 16 rows of a warp tile at a time, as fp32 through shared memory: there a lane has 8 neighbours of a row, so it
// reads and writes 16 bytes, and nothing is rounded twice. A tile of QKV is one head: the two warps that have its halves
// exchange their sums of squares.
//
// I1  Rows past M hold zeros or garbage of this CTA alone and are not stored.
// I2  fp16 ends at 65504 instead of Inf: what is packed is clamped before.
// I3  A thread reads an element of `residual` and of the old `out` before it writes it, and nobody else does either.
// I4  What is staged belongs to one warp. Squares of each 16 rows have a place of their own, so one barrier is enough for them.
// Spec reference.py gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope
// Test tests/kernels/families/test_w4a4_sm80.py and those of the kernels that include it
// Source arXiv 2411.05007, checkpoint-format 6.5
#pragma once
#include "epilogue.cuh"

namespace tile {

constexpr int TILE = 128, WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW = 64 + 8;             // fp32 elements of a staged row: padding spreads rows over the banks
static_assert(TILE == HEAD, "a tile of q or k is a head");

struct Staging {
    float rows[WARPS][16][ROW];         // results of 16 rows; see `place` for the order of columns
    float squares[4][WARPS][16];        // [m16]: sums over the 64 columns of a warp
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

struct Operands {                       // of what comes after the main loop
    const words4 *low, *proj_up;
    const u16* bias;
    u16* out;
    int M, N, R, ldo, accumulate;
    Epilogue epilogue;
};

// The last parameters of a kernel, and its Operands.
#define TILE_PARAMETERS                                                                                                   \
    const words4 *low, const words4 *proj_up, const u16 *bias, u16 *out, int M, int N, int K, int R, int ldo,             \
        int accumulate, EPILOGUE_PARAMETERS
#define TILE_OPERANDS {low, proj_up, bias, out, M, N, R, ldo, accumulate, EPILOGUE}

// y += low * proj_up + bias, for rows 16 m16 to 16 m16 + 15 of the warp tile of columns from 128 n_tile on.
template <Half T> PX void add_low_rank_and_bias(float (&y)[8][4], int n_tile, int m16, const Operands& of) {
    const int thread = px::thread_index(), warp = thread / 32, lane = thread % 32, warp_m = warp / 2, warp_n = warp % 2;
    const int n16 = n_tile * 8 + warp_n * 4, rank_tiles = of.R / 16, last64 = (of.M + 63) / 64 - 1;
    const int block64 = 2 * blockIdx.y + warp_m < last64 ? 2 * blockIdx.y + warp_m : last64;        // I1
    for (int r = 0; r < rank_tiles; r++) {
        const words4 a = of.low[((block64 * 4 + m16) * rank_tiles + r) * 32 + lane];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const words4 b = of.proj_up[((n16 + j) * rank_tiles + r) * 32 + lane];
            px::mma_half<T>(y[2 * j], a, b.x, b.y);
            px::mma_half<T>(y[2 * j + 1], a, b.z, b.w);
        }
    }

    if (of.bias)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 pair = *(const u32*)(of.bias + n16 * 16 + j * 8 + lane % 4 * 2);
#pragma unroll
            for (int e = 0; e < 4; e++)
                y[j][e] += e % 2 ? px::high_half<T>(pair) : px::low_half<T>(pair);
        }
}

// Where a column of a staged row is, the last 32 with neighbouring fours swapped: lanes that read 8 columns each then meet
// different banks. `first` of 8 columns that begin at `eight`, which a caller knows at compile time where it can.
PX int place(int eight, int first) { return eight + (eight < 32 ? first : first ^ 4); }

template <Half T> PX void read_pairs(float (&to)[8], const words4& from) {
    const u32 pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = i % 2 ? px::high_half<T>(pairs[i / 2]) : px::low_half<T>(pairs[i / 2]);
}

// What a tile is part of: q, k, or v and everything else, which no norm is for.
enum Part { QUERY, KEY, OTHER };

PX Part part_of(const Operands& of) {
    return of.epilogue.kind == QKV ? (Part)(3 * TILE * blockIdx.x / of.N) : OTHER;
}

// The next 16 rows of the accumulators, which have no address: they move up, so that what is done with them is in a loop.
PX void take(float (&y)[8][4], Sums& acc) {
#pragma unroll
    for (int e = 0; e < 32; e++) {
        y[e / 4][e % 4] = acc[0][e / 4][e % 4];
#pragma unroll
        for (int i = 1; i < 4; i++)
            acc[i - 1][e / 4][e % 4] = acc[i][e / 4][e % 4];
    }
}

// What a main loop leaves where sums are all of it.
struct Accumulators {
    Sums acc;

    PX Accumulators() { clear(acc); }

    PX void take(float (&y)[8][4], int) { tile::take(y, acc); }
};

// Rows 16 m16 to 16 m16 + 15 of the warp tile into `staging`, whole sums, and their squares where a norm needs them.
template <Half T, class Take> PX void stage(const Take& take_rows, int m16, Staging& staging, const Operands& of) {
    float y[8][4];
    take_rows(y, m16);
    add_low_rank_and_bias<T>(y, blockIdx.x, m16, of);
    const int thread = px::thread_index(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    float squares[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float* pair = &y[j][2 * h];
            squares[h] += pair[0] * pair[0] + pair[1] * pair[1];
            float* to = &staging.rows[warp][8 * h + g][place(8 * j, 2 * t)];
            *(words2*)to = words2{px::as_bits(pair[0]), px::as_bits(pair[1])};
        }
    if (part_of(of) == OTHER)
        return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = squares[h];
        sum += px::as_float(px::swap_lanes(px::as_bits(sum), 1));
        sum += px::as_float(px::swap_lanes(px::as_bits(sum), 2));
        if (t == 0)
            staging.squares[m16][warp][8 * h + g] = sum;
    }
}

// Staged rows 16 m16 to 16 m16 + 15 through the epilogue into `out`.
template <Half T> PX void finish(int m16, const Staging& staging, const Operands& of) {
    const Epilogue& epilogue = of.epilogue;
    const Part part = part_of(of);
    const int thread = px::thread_index(), warp = thread / 32, lane = thread % 32, warp_m = warp / 2;
    const int in_tile = warp % 2 * 64 + lane % 8 * 8, column = blockIdx.x * TILE + in_tile;    // of 8 neighbours
    const u16* factors = epilogue.kind == GATED ? epilogue.gate + column
                         : part == QUERY        ? epilogue.query + in_tile
                         : part == KEY          ? epilogue.key + in_tile
                                                : nullptr;
    words4 factor = {0, 0, 0, 0};
    if (factors) {
        const u32* pairs = (const u32*)factors;
        factor = words4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = i * 4 + lane / 8, row = blockIdx.y * TILE + warp_m * 64 + m16 * 16 + r;
        if (row >= of.M)
            continue;
        words4* at = (words4*)(of.out + (u64)row * of.ldo + column);
        float y[8], by[8], other[8];
        read_pairs<T>(by, factor);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const words4 bits = *(const words4*)&staging.rows[warp][r][place(lane % 8 * 8, 4 * half)];
            y[4 * half] = px::as_float(bits.x), y[4 * half + 1] = px::as_float(bits.y);
            y[4 * half + 2] = px::as_float(bits.z), y[4 * half + 3] = px::as_float(bits.w);
        }
        if (of.accumulate) {
            read_pairs<T>(other, *at);
#pragma unroll
            for (int e = 0; e < 8; e++)
                y[e] += other[e];
        }
        if (epilogue.kind == GATED) {
            read_pairs<T>(other, *(const words4*)(epilogue.residual + (u64)row * epilogue.ldr + column));
#pragma unroll
            for (int e = 0; e < 8; e++)
                y[e] = other[e] + by[e] * y[e];
        } else if (epilogue.kind == GELU) {
#pragma unroll
            for (int e = 0; e < 8; e++)
                y[e] = gelu(y[e]);
        } else if (part != OTHER) {
            const float squares = staging.squares[m16][warp_m * 2][r] + staging.squares[m16][warp_m * 2 + 1][r];
            const float norm = px::rsqrt(squares / HEAD + epilogue.eps);
            const words4* rotation = (const words4*)epilogue.rotation + (u64)row * (HEAD / 2) + in_tile / 2;
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const words4 turn = rotation[e / 2];
                const float z[2] = {y[e] * norm * by[e], y[e + 1] * norm * by[e + 1]};
                y[e] = px::as_float(turn.x) * z[0] + px::as_float(turn.y) * z[1];
                y[e + 1] = px::as_float(turn.z) * z[0] + px::as_float(turn.w) * z[1];
            }
        }
        u32 pairs[4];
#pragma unroll
        for (int e = 0; e < 8; e += 2)
            pairs[e / 2] = px::pack_half<T>(px::clamped<T>(y[e]), px::clamped<T>(y[e + 1]));
        *at = words4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}

// out = epilogue(y + low * proj_up + bias (+ out)), where take_rows(y, m16) gives rows 16 m16 to 16 m16 + 15 of the warp tile:
// what a main loop left, scaled. All warps must have left the stages that `staging` takes the place of.
template <Half T, class Take> PX void store(const Take& take_rows, Staging& staging, const Operands& to) {
#pragma unroll 1
    for (int m16 = 0; m16 < 4; m16++) {
        stage<T>(take_rows, m16, staging, to);
        if (part_of(to) == OTHER)
            px::warp_barrier();
        else
            px::barrier();
        finish<T>(m16, staging, to);
        px::warp_barrier();
    }
}

}  // namespace tile
