// quantiser: what quantisers share that read x row by row: the low-rank down projection beside the codes
//
//   low[m,r] = sum_k x[m,k] * proj_down[k,r]          x as it comes
//
//   proj_down  [K, R]  packed as in the checkpoint (layout.pack_down)    R % 16 == 0, R <= 16 * RANK_TILES
//   low        [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, 16 bit
//
// One CTA owns 16 rows, its 8 warps take turns at 64 columns:
//
//          K ->   64   64   64        each warp keeps its share of all 16 x R sums, as C fragments of m16n8k16
//        +------+----+----+----+
//   M 16 |      | w0 | w1 | w2 | ...
//        +------+----+----+----+
//
// Those that normalise first (adaln.cuh) have 16 warps, and all of a row before they begin.
//
// I1  Shares are added in warp order, 16 ranks at a time, so two runs agree bit for bit.
// I2  fp16 ends at 65504 instead of Inf: what is packed is clamped before.
// Spec reference.py quant_down    Test tests/kernels/families/test_w4a4_sm80.py and those of the kernels that include it
// Source arXiv 2411.05007, checkpoint-format 6.2
#pragma once
#include "ptx.cuh"

namespace quantiser {

constexpr int WARPS = 8;

// Byte t of lane s of four lanes -> byte s of lane t.
PX u32 transpose_bytes(u32 word, int t) {
    u32 other = px::swap_lanes(word, 1);
    word = px::permute_bytes(word, other, t & 1 ? 0x3715 : 0x6240);
    other = px::swap_lanes(word, 2);
    return px::permute_bytes(word, other, t & 2 ? 0x3276 : 0x5410);
}

PX u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// The largest of `bits` among the four lanes of a row.
PX u32 max_of_row(u32 bits) {
    bits = larger(bits, px::swap_lanes(bits, 1));
    return larger(bits, px::swap_lanes(bits, 2));
}

template <int RANK_TILES> PX void clear(float (&share)[2 * RANK_TILES][4]) {
#pragma unroll
    for (int i = 0; i < 2 * RANK_TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            share[i][j] = 0.0f;
}

// share += a * rows 16 `k16` to 16 `k16` + 15 of proj_down.
template <Half T, int RANK_TILES>
PX void multiply_down(float (&share)[2 * RANK_TILES][4], const words4& a, const words4* proj_down, int k16, int rank_tiles) {
#pragma unroll
    for (int r = 0; r < RANK_TILES; r++)
        if (r < rank_tiles) {
            const words4 b = proj_down[((u64)k16 * rank_tiles + r) * 32 + threadIdx.x % 32];
            px::mma_half<T>(share[2 * r], a, b.x, b.y);
            px::mma_half<T>(share[2 * r + 1], a, b.z, b.w);
        }
}

// share += 64 columns of 16 rows * those rows of proj_down.   pairs [row g, g+8][2c + half]: columns 16c + 8half + 2t, +1
template <Half T, int RANK_TILES>
PX void multiply_down(float (&share)[2 * RANK_TILES][4], const u32 (&pairs)[2][8], const words4* proj_down, int group,
                      int rank_tiles) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const words4 a = {pairs[0][2 * c], pairs[1][2 * c], pairs[0][2 * c + 1], pairs[1][2 * c + 1]};
        multiply_down<T, RANK_TILES>(share, a, proj_down, group * 4 + c, rank_tiles);
    }
}

// Where a thread's two sums of ranks 16r to 16r + 15 go in low, in words. Other orders are of families that have another.
struct LowFragments {
    static PX u64 place(int r, int rank_tiles) { return ((u64)blockIdx.x * rank_tiles + r) * 128 + threadIdx.x; }
};

// Ranks 16r to 16r + 15 of low = the sum of all warps' shares of them: 256 sums, two per thread of the first four warps.
template <Half T, class Order = LowFragments, int WARPS = quantiser::WARPS>
PX void store_low(const float (&first)[4], const float (&second)[4], u32* low, int r, int rank_tiles) {
    __shared__ float shares[WARPS][256];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; i++)
        shares[warp][lane * 8 + i] = i < 4 ? first[i % 4] : second[i % 4];
    px::barrier();
    if (threadIdx.x < 128) {
        float sum[2] = {0.0f, 0.0f};
        for (int w = 0; w < WARPS; w++)
            for (int i = 0; i < 2; i++)
                sum[i] += shares[w][2 * threadIdx.x + i];
        low[Order::place(r, rank_tiles)] = px::pack_half<T>(px::clamped<T>(sum[0]), px::clamped<T>(sum[1]));
    }
    px::barrier();
}

}  // namespace quantiser
