// adaln: adaptive LayerNorm in front of quantisers: 16 whole rows in registers, normalised and modulated, from one read of x
//
//   n[m,k]   = round16((x[m,k] - mean[m]) / sqrt(var[m] + eps))              var: mean of (x - mean)^2, both in fp32
//   y[m,k]   = round16(n[m,k] * round16(1 + scale[b,k]) + shift[b,k])        b = m / rows_per_item
//   low[m,r] = sum_k y[m,k] * proj_down[k,r]
//
//   x             [M, K]  bf16 | fp16, row stride ldx elements, 16-byte aligned rows      K % 64 == 0, K <= 3072
//   scale, shift  [B, K]  of the same dtype, row strides ld_scale, ld_shift, 16-byte aligned rows
//   proj_down, low   as in quantiser.cuh, or as the family has them
//
// The roundings are those of LayerNorm, 1 + scale and addcmul on 16-bit tensors, which is how ComfyUI modulates.
//
// A launch is for one layer or two. Two of one x: a CTA does both, from one read of its rows (per_cta 2). Two of an x each, as
// the image and the text of a block have: blockIdx.y is the layer (per_cta 1), and so no CTA waits for another launch.
//
//   blockIdx      x ->  rows 16x..
//           +----+----+----+----+----+
//     y  0  |    |    |    |    |    |      CTAs past the rows of the shorter x leave at once. Where it is the second, they
//        1  |    |    |                     are the last of the grid
//           +----+----+
//
// One CTA owns 16 rows, its 16 warps take turns at the groups of 64 columns, each up to three times: a lane then holds, of rows
// g and g+8, 16 columns of three groups, 48 words of two, and nothing is read again for the statistics, the maximum of a row,
// the low rank or a second set of codes. An Order says which columns of a group are a lane's:
//
//   Fragments    16c + {2t, 2t+1, 8+2t, 9+2t}, c = 0..3: A fragments of m16n8k16 in the order of a checkpoint. It loads 8 bytes
//                of a 32-byte sector, columns 4q..4q+3 with q = 2 (t % 2) + t / 2, and once they are modulated each of
//                two neighbouring lanes gives the other one of its two words
//   Runs         16t..16t+15, two loads of 16 bytes, for families that bring proj_down into that order
//
// Ranks are the outer loop of the low-rank product, 16 at a time: any number of them takes the same registers.
//
// I1  Rows past M become zero, not shift: codes 0, scales 0, low 0. Nothing past M is read, neither x nor an item's scale.
//     A CTA beyond the last BLOCK of rows leaves as a whole, before the first barrier, and writes nothing.
// I2  Sums are taken in one order: words of a lane, 4 lanes, 16 warps. The variance comes from a second pass over registers;
//     E[x^2] - E[x]^2 would cancel.
// I3  A NaN or Inf in a row makes all of that row NaN, as LayerNorm does, and no other row.
// Spec reference.py modulated    Test tests/kernels/families/test_adaln.py    Source arXiv 2212.09748, design of our own
#pragma once
#include "quantiser.cuh"

namespace adaln {

using namespace quantiser;

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int MOST = 3;                     // groups of 64 columns that a warp holds

// A layer: its input, and what is made of it. Pointers and 64-bit numbers, as a launch passes them by value.
template <class Smooth, class Codes, class Scales> struct Layer {
    const u16 *x, *scale, *shift;
    const Smooth* smooth;
    const words4* proj_down;
    Codes* qact;
    Scales* ascales;
    u32* low;
    u64 R, rows_per_item, M, ldx, ld_scale, ld_shift;
};

template <class Smooth, class Codes, class Scales> struct Layers { Layer<Smooth, Codes, Scales> layer[2]; };

// What a thread has of 16 rows. A warp's groups are numbers `warp`, warp + 16 ..; there is none from `groups` on.
struct Rows {
    u32 pairs[MOST][2][8];                  // of columns: [group of the warp][row g or g+8][word of the Order]
    bool inside[2];                         // whether these rows are
    int warp, groups;
};

struct Fragments {
    static PX void load(u32 (&words)[8], const u16* group) {
        const int t = threadIdx.x % 4, q = t % 2 * 2 + t / 2;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const words2 two = *(const words2*)(group + 16 * c + 4 * q);
            words[2 * c] = two.x, words[2 * c + 1] = two.y;
        }
    }
    // Pairs 2q and 2q+1 of eight -> t and t+4.
    static PX void arrange(u32 (&words)[8]) {
        const bool odd = threadIdx.x % 2;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const u32 got = px::swap_lanes(odd ? words[2 * c] : words[2 * c + 1], 1);
            (odd ? words[2 * c] : words[2 * c + 1]) = got;
        }
    }
};

struct Runs {
    static PX void load(u32 (&words)[8], const u16* group) {
        const words4* from = (const words4*)(group + threadIdx.x % 4 * 16);
        const words4 first = from[0], second = from[1];
        words[0] = first.x, words[1] = first.y, words[2] = first.z, words[3] = first.w;
        words[4] = second.x, words[5] = second.y, words[6] = second.z, words[7] = second.w;
    }
    static PX void arrange(u32 (&)[8]) {}
};

// work(words, group) for each group of a warp, by one copy of its code: the groups take turns in the first place.
template <class Work> PX void each_group(Rows& rows, Work work) {
#pragma unroll 1
    for (int i = 0; i < MOST; i++) {
        u32 first[2][8];
#pragma unroll
        for (int word = 0; word < 16; word++)
            first[word / 8][word % 8] = px::anew(rows.pairs[0][word / 8][word % 8]);
        if (rows.warp + i * WARPS < rows.groups)
            work(first, rows.warp + i * WARPS);
#pragma unroll
        for (int word = 0; word < 16; word++) {
            const int h = word / 8, w = word % 8;
#pragma unroll
            for (int place = 1; place < MOST; place++)
                rows.pairs[place - 1][h][w] = rows.pairs[place][h][w];
            rows.pairs[MOST - 1][h][w] = first[h][w];
        }
    }
}

// Sums over whole rows g and g+8, from each thread's share of them. `pass` 0 and 1 have memory of their own.
PX void sum_rows(float (&sums)[2], int pass) {
    __shared__ alignas(16) float shares[2][16][WARPS + 4];          // the padding spreads rows over the banks
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sums[h] += px::as_float(px::swap_lanes(px::as_bits(sums[h]), 1));
        sums[h] += px::as_float(px::swap_lanes(px::as_bits(sums[h]), 2));
        if (threadIdx.x % 4 == 0)
            shares[pass][8 * h + g][warp] = sums[h];
    }
    px::barrier();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sums[h] = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            sums[h] += shares[pass][8 * h + g][w];
    }
}

// Rows 16 blockIdx.x.. of y, of the x of a layer. False where its buffers, whole blocks of BLOCK rows, have no such rows.
template <Half T, class Order, int BLOCK, class Layer> PX bool load(Rows& rows, const Layer& of, float eps, int K) {
    const int g = threadIdx.x % 32 / 4, M = (int)of.M, rows_per_item = (int)of.rows_per_item;
    if ((int)blockIdx.x * 16 / BLOCK * BLOCK >= M)
        return false;
    rows.warp = px::uniform(threadIdx.x / 32), rows.groups = K / 64;
    float mean[2] = {0.0f, 0.0f}, inverse[2] = {0.0f, 0.0f};        // at first sums
    const u16 *by[2], *plus[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = blockIdx.x * 16 + 8 * h + g, item = (row < M ? row : M - 1) / rows_per_item;
        rows.inside[h] = row < M;
        by[h] = of.scale + (u64)item * (u32)of.ld_scale, plus[h] = of.shift + (u64)item * (u32)of.ld_shift;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
#pragma unroll
            for (int word = 0; word < 8; word++)
                rows.pairs[i][h][word] = 0u;
            if (rows.inside[h] && rows.warp + i * WARPS < rows.groups)
                Order::load(rows.pairs[i][h], of.x + (u64)row * (u32)of.ldx + (rows.warp + i * WARPS) * 64);
        }
    }

#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < MOST; i++)
#pragma unroll
            for (int word = 0; word < 8; word++)
                mean[h] += px::low_half<T>(rows.pairs[i][h][word]) + px::high_half<T>(rows.pairs[i][h][word]);
    sum_rows(mean, 0);
    mean[0] /= K, mean[1] /= K;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (rows.warp + i * WARPS < rows.groups)
#pragma unroll
                for (int word = 0; word < 8; word++) {
                    const u32 pair = px::anew(rows.pairs[i][h][word]);
                    const float low = px::low_half<T>(pair) - mean[h], high = px::high_half<T>(pair) - mean[h];
                    inverse[h] = px::fma(high, high, px::fma(low, low, inverse[h]));
                }
    sum_rows(inverse, 1);
    inverse[0] = px::rsqrt(inverse[0] / K + eps), inverse[1] = px::rsqrt(inverse[1] / K + eps);

    each_group(rows, [&](u32 (&words)[2][8], int group) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 scales[8], shifts[8];
            Order::load(scales, by[h] + group * 64);
            Order::load(shifts, plus[h] + group * 64);
#pragma unroll
            for (int word = 0; word < 8; word++) {
                const u32 pair = words[h][word], a = scales[word], b = shifts[word];
                const u32 n = px::pack_half<T>((px::low_half<T>(pair) - mean[h]) * inverse[h],
                                               (px::high_half<T>(pair) - mean[h]) * inverse[h]);
                const u32 m = px::pack_half<T>(1.0f + px::low_half<T>(a), 1.0f + px::high_half<T>(a));
                const u32 y = px::pack_half<T>(px::fma(px::low_half<T>(n), px::low_half<T>(m), px::low_half<T>(b)),
                                               px::fma(px::high_half<T>(n), px::high_half<T>(m), px::high_half<T>(b)));
                words[h][word] = rows.inside[h] ? y : 0u;
            }
            Order::arrange(words[h]);
        }
    });
    return true;
}

// The largest of whole rows g and g+8, from each thread's largest. Each of two layers has memory of its own.
PX void max_rows(u32 (&bits)[2], int layer) {
    __shared__ alignas(16) u32 peaks[2][16][WARPS + 4];
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        bits[h] = max_of_row(bits[h]);
        if (threadIdx.x % 4 == 0)
            peaks[layer][8 * h + g][warp] = bits[h];
    }
    px::barrier();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            bits[h] = larger(bits[h], peaks[layer][8 * h + g][w]);
}

// low = y * proj_down.
template <Half T, class LowOrder = LowFragments>
PX void multiply_down(const Rows& rows, const words4* proj_down, u32* low, int R) {
    const int rank_tiles = R / 16;
    for (int r = 0; r < rank_tiles; r++) {
        float share[2][4];
        clear<1>(share);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (rows.warp + i * WARPS < rows.groups)
                quantiser::multiply_down<T, 1>(share, rows.pairs[i], proj_down + r * 32, rows.warp + i * WARPS, rank_tiles);
        store_low<T, LowOrder, WARPS>(share[0], share[1], low, r, rank_tiles);
    }
}

}  // namespace adaln
