// mlp: the first layer of an MLP and what the second one multiplies: product, GELU, codes and the second low-rank down
//
//   y                     int4 or NVFP4 part + low-rank part + bias of the first layer, as its GEMM has it
//   h[m,n]       = round16(gelu(y[m,n]))                 never in memory
//   qact2, ascales2       of h, as the family's quantiser has them, with `smooth` of the second layer
//   share[m,r]   = sum of h[m,n] * proj_down[n,r] over the columns of this CTA
//   low2[m,r]    = the sum of all shares, rounded once: mlp_low.cuh
//
//   low, proj_up, bias  of the first layer, as in tile.cuh                                  N % 128 == 0
//   smooth, proj_down   of the second, as its quantiser has them, K there being N here      R2 % 16 == 0
//   shares  [grid x][M/16][R2/16][2][32 lanes] 16 bytes fp32, M rounded up to 64: C fragments of m16n8k16, two per 16 ranks
//
// One CTA = 128 rows and every gridDim.x-th tile of 128 columns, one after the other; its share of low2 lies in shared memory
// beside the ring of the main loop, 128 x R2 fp32. A warp tile of 64 columns is whole groups of the second layer, and a lane's
// accumulators are in the order that the quantiser takes, so codes leave from registers:
//
//               N ->   64    64          64    64
//            +------+-----+-----+     +-----+-----+
//   M   64   |      | w0  | w1  |     | w0  | w1  |  ...
//   |        |      +-----+-----+     +-----+-----+
//   v   64   |      | w2  | w3  |     | w2  | w3  |
//            +------+-----+-----+     +-----+-----+
//
// I1  The two warps of the same rows add to the same sums: of each pair of rank tiles the left one first to the first, then to
//     the second, the right one the other way, with a barrier between. So sums have one order, and two runs agree bit for bit.
// I2  Rows past M give codes 0, scales 0 and shares 0, as the quantiser's do. What is stored past M reaches no stored row.
// I3  fp16 ends at 65504 instead of Inf: h is clamped before it is packed.
// Spec reference.py gemm_w4a4, gelu_tanh, quant_down    Test tests/kernels/families/test_mlp.py
// Source arXiv 2411.05007, design of our own
#pragma once
#include "quantiser.cuh"
#include "tile.cuh"

namespace mlp {

using namespace tile;

constexpr int STAGES = 3;

struct Second {                         // what the second layer gives and takes, but for its codes
    const words4* proj_down;
    words4* shares;
    int R;
};

PX void add(words4& sum, float (&share)[4], bool first) {
    if (!first) {
        const words4 old = sum;
        share[0] += px::as_float(old.x), share[1] += px::as_float(old.y);
        share[2] += px::as_float(old.z), share[3] += px::as_float(old.w);
    }
    sum = words4{px::as_bits(share[0]), px::as_bits(share[1]), px::as_bits(share[2]), px::as_bits(share[3])};
}

// Rows 16 m16 to 16 m16 + 15 of a warp tile: quantise(pairs, inside, tile16, group of 64 columns) writes their codes, and shares
// of low2 go to `sums`, [m16 of the CTA][rank tile][half][lane].
template <Half T, class Quantise>
PX void finish(const float (&y)[8][4], int n_tile, int m16, bool first, words4* sums, const Operands& of, const Second& to,
               const Quantise& quantise) {
    const int thread = px::thread_index(), warp = thread / 32, lane = thread % 32, warp_m = warp / 2, warp_n = warp % 2;
    const int tile16 = blockIdx.y * 8 + warp_m * 4 + m16, row = tile16 * 16 + lane / 4, rank_tiles = to.R / 16;
    const bool inside[2] = {row < of.M, row + 8 < of.M};
    u32 pairs[2][8];                    // [row][2c + half]: columns 16c + 8half + 2t, +1, as accumulators lie
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 pair = px::pack_half<T>(px::clamped<T>(gelu(y[j][2 * h])), px::clamped<T>(gelu(y[j][2 * h + 1])));
            pairs[h][j] = inside[h] ? pair : 0u;
        }
    const int group = 2 * n_tile + warp_n;
    if (tile16 / 4 < (of.M + 63) / 64)
        quantise(pairs, inside, tile16, group);

    sums += (warp_m * 4 + m16) * rank_tiles * 64 + lane;
#pragma unroll 1
    for (int r = 0; r < rank_tiles; r += 2) {
        float share[2][2][4] = {};      // [rank tile][half of its 16 ranks]
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (r + i < rank_tiles)
                quantiser::multiply_down<T, 1>(share[i], pairs, to.proj_down + (r + i) * 32, group, rank_tiles);
#pragma unroll
        for (int turn = 0; turn < 2; turn++) {
            const bool left = turn == warp_n;                   // I1
            if (left || r + 1 < rank_tiles)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float mine[4];
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        mine[e] = left ? share[0][half][e] : share[1][half][e];
                    add(sums[((r + !left) * 2 + half) * 32], mine, first && turn == 0);
                }
            if (turn == 0)
                px::barrier();
        }
    }
}

// multiply(ring, n_tile) is the first layer's product of a tile, whose take(y, m16) gives scaled rows, as `store` of tile.cuh has
// it.
template <Half T, class Ring, class Multiply, class Quantise>
PX void run(const Operands& of, const Second& to, const Multiply& multiply, const Quantise& quantise) {
    extern __shared__ __align__(16) u8 memory[];
    Ring& ring = *(Ring*)memory;
    words4* sums = (words4*)(memory + sizeof(Ring));
    bool first = true;
#pragma unroll 1
    for (int n_tile = blockIdx.x; n_tile < of.N / TILE; n_tile += gridDim.x, first = false) {
        auto product = multiply(ring, n_tile);
#pragma unroll 1
        for (int m16 = 0; m16 < 4; m16++) {
            float y[8][4];
            product.take(y, m16);
            add_low_rank_and_bias<T>(y, n_tile, m16, of);
            finish<T>(y, n_tile, m16, first, sums, of, to, quantise);
        }
        px::barrier();                                          // others may still read the last stage, or add to sums
    }
    const int per_tile = to.R / 16 * 64, tiles = (of.M + 63) / 64 * 4, tile0 = blockIdx.y * 8;
    words4* shares = to.shares + ((u64)blockIdx.x * tiles + tile0) * per_tile;
    for (int i = px::thread_index(); i < 8 * per_tile && tile0 + i / per_tile < tiles; i += THREADS)
        shares[i] = sums[i];
}

}  // namespace mlp
