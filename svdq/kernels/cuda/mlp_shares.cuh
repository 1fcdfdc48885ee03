// mlp_shares: what of a low-rank down projection and of scales each CTA of mlp.cuh has a part of, brought together
//
//   low[m,r] = round16(sum_i shares[i][m,r])
//   peak[m]  = the largest of ascales[m,:], by its bits, where NaN > Inf > numbers        where the family has it
//
//   shares   [count][M/16][R/16][2][32 lanes] 16 bytes fp32: C fragments of m16n8k16, the two of 16 ranks
//   low      [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, 16 bit
//   ascales  [M/64][groups + 1][4 m16][8 g][2] fp32, not negative: the last of a row is its peak
//
// A thread adds 16 rows x 16 ranks' words of one lane: what a lane has of both C fragments is what it has of the A fragment.
// The CTAs after those of `low` have 16 rows of scales each, whose groups their 16 x 8 threads take turns at.
//
// I1  Shares are added in order, so two runs agree bit for bit.
// I2  fp16 ends at 65504 instead of Inf: what is packed is clamped before.
// Spec reference.py quant_down    Test tests/kernels/families/test_mlp.py    Source design of our own
#pragma once
#include "ptx.cuh"

namespace mlp_shares {

template <Half T> PX void add(const words4* shares, words4* low, int count, int tiles) {
    const int place = blockIdx.x * 128 + threadIdx.x;           // lane of a tile
    if (place >= tiles * 32)
        return;
    float sum[8] = {};
    for (int i = 0; i < count; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const words4 bits = shares[((u64)i * tiles + place / 32) * 64 + half * 32 + place % 32];
            sum[4 * half] += px::as_float(bits.x), sum[4 * half + 1] += px::as_float(bits.y);
            sum[4 * half + 2] += px::as_float(bits.z), sum[4 * half + 3] += px::as_float(bits.w);
        }
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = px::pack_half<T>(px::clamped<T>(sum[2 * i]), px::clamped<T>(sum[2 * i + 1]));
    low[place] = words4{pairs[0], pairs[1], pairs[2], pairs[3]};
}

PX u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// The peaks of rows 16 tile16 to 16 tile16 + 15.
PX void store_peaks(words2* ascales, int tile16, int groups) {
    __shared__ words2 parts[16][8];
    const int g = threadIdx.x % 8, part = threadIdx.x / 8;
    words2* rows = ascales + (u64)(tile16 / 4) * (groups + 1) * 32 + tile16 % 4 * 8 + g;
    words2 largest = {0u, 0u};
    for (int group = part; group < groups; group += 16) {
        const words2 bits = rows[group * 32];
        largest = words2{larger(largest.x, bits.x), larger(largest.y, bits.y)};
    }
    parts[part][g] = largest;
    px::barrier();
    if (threadIdx.x < 8) {
        for (int i = 1; i < 16; i++)
            largest = words2{larger(largest.x, parts[i][g].x), larger(largest.y, parts[i][g].y)};
        rows[groups * 32] = largest;
    }
}

template <Half T> PX void run(const words4* shares, words4* low, int count, int tiles, words2* ascales, int groups) {
    const int of_low = (tiles + 3) / 4;
    if ((int)blockIdx.x < of_low)
        add<T>(shares, low, count, tiles);
    else
        store_peaks(ascales, blockIdx.x - of_low, groups);
}

}  // namespace mlp_shares
