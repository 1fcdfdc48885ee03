// mlp: the first layer of an MLP and what the second one multiplies: product, GELU, codes and the second low-rank down
//
//   y                     int4 or NVFP4 part + low-rank part + bias of the first layer, as its GEMM has it
//   h[m,n]       = round16(gelu(y[m,n]))                 never in memory
//   qact2, ascales2       of h, as the family's quantiser has them, with `smooth` of the second layer
//   share[m,r]   = sum of h[m,n] * proj_down[n,r] over the columns of this CTA
//   low2[m,r]    = the sum of all shares, rounded once: mlp_shares.cuh
//
//   low, proj_up, bias  of the first layer, as in tile.cuh                                  N % 128 == 0
//   smooth, proj_down   of the second, as its quantiser has them, K there being N here      R2 % 16 == 0
//   shares  [grid x][M/16][R2/16][2][32 lanes] 16 bytes fp32, M rounded up to 64: C fragments of m16n8k16, two per 16 ranks
//
// One CTA = 128 rows and every gridDim.x-th tile of 128 columns, one after the other. Its share of low2, 128 x R2 fp32, lies in
// shared memory beside the ring of the main loop and goes to `shares` with the last tile, or is there from the first on, where
// two CTAs with so much shared memory do not fit on a multiprocessor. A warp tile of 64 columns is whole groups of the second
// layer, and a lane's accumulators are in the order that the quantiser takes, so codes leave from registers:
//
//               N ->   64    64          64    64
//            +------+-----+-----+     +-----+-----+
//   M   64   |      | w0  | w1  |     | w0  | w1  |  ...
//   |        |      +-----+-----+     +-----+-----+
//   v   64   |      | w2  | w3  |     | w2  | w3  |
//            +------+-----+-----+     +-----+-----+
//
// I1  Of each pair of rank tiles the sums of the left one belong to the left warp of their rows, those of the right one to the
//     right warp: a thread alone reads and writes a sum, and adds its own share, then what the other warp has given it through
//     the stages that the product has left. So sums have one order, in both places, and two runs agree bit for bit.
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
    int R, in_shared;                   // whether sums lie in shared memory until the last tile
};

typedef words4 Given[2][WARPS][2][32];  // shares on their way to the other warp: [turn][warp][half of 16 ranks][lane]

struct LowSums {                         // where a CTA's sums of low2 are, [m16 of the CTA][rank tile][half][lane]
    const words4* from;                 // null before the first tile
    words4* to;
};

PX words4 sum_of(const words4& old, const float (&mine)[4], const words4& theirs) {
    return words4{px::as_bits(px::as_float(old.x) + mine[0] + px::as_float(theirs.x)),
                  px::as_bits(px::as_float(old.y) + mine[1] + px::as_float(theirs.y)),
                  px::as_bits(px::as_float(old.z) + mine[2] + px::as_float(theirs.z)),
                  px::as_bits(px::as_float(old.w) + mine[3] + px::as_float(theirs.w))};
}

// Rows 16 m16 to 16 m16 + 15 of a warp tile: quantise(pairs, inside, tile16, group of 64 columns) writes their codes, and their
// shares of low2 are added to `sums`.
template <Half T, class Quantise>
PX void finish(const float (&y)[8][4], int n_tile, int m16, Given& given, const LowSums& sums, const Operands& of,
               const Second& to, const Quantise& quantise) {
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
    const bool stored = tile16 / 4 < (of.M + 63) / 64;
    if (stored)
        quantise(pairs, inside, tile16, group);

    const int turns = (rank_tiles + 1) / 2, place = (warp_m * 4 + m16) * rank_tiles * 64 + lane;
#pragma unroll 1
    for (int turn = 0; turn < turns; turn++) {
        const int r = 2 * turn, own = r + warp_n, first = place + own * 64;     // I1
        const bool owns = stored && own < rank_tiles;
        words4 old[2] = {};
        if (owns && sums.from)
            old[0] = sums.from[first], old[1] = sums.from[first + 32];
        float share[2][2][4] = {};      // [rank tile][half of its 16 ranks]
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (r + i < rank_tiles)
                quantiser::multiply_down<T, 1>(share[i], pairs, to.proj_down + (r + i) * 32, group, rank_tiles);
        auto& gifts = given[(m16 * turns + turn) % 2];
        float mine[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 gift[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                mine[half][e] = warp_n ? share[1][half][e] : share[0][half][e];
                gift[e] = px::as_bits(warp_n ? share[0][half][e] : share[1][half][e]);
            }
            gifts[warp][half][lane] = words4{gift[0], gift[1], gift[2], gift[3]};
        }
        px::barrier();
        if (owns)
#pragma unroll
            for (int half = 0; half < 2; half++)
                sums.to[first + 32 * half] = sum_of(old[half], mine[half], gifts[warp ^ 1][half][lane]);
    }
}

// multiply(ring, n_tile) is the first layer's product of a tile, whose take(y, m16) gives scaled rows, as `store` of tile.cuh has
// it. A ring begins with its stages.
template <Half T, class Ring, class Multiply, class Quantise>
PX void run(const Operands& of, const Second& to, const Multiply& multiply, const Quantise& quantise) {
    extern __shared__ __align__(16) u8 memory[];
    Ring& ring = *(Ring*)memory;
    static_assert(sizeof(Given) <= sizeof(Ring), "what warps give each other lies in the first stage");
    const int tiles = (of.M + 63) / 64 * 4;
#pragma unroll 1
    for (int n_tile = blockIdx.x; n_tile < of.N / TILE; n_tile += gridDim.x) {
        auto product = multiply(ring, n_tile);
        px::barrier();                                          // others may still read the last stage
        Operands now = of;
        now.R = px::anew(of.R);                                 // or what follows from it stays in registers during a product
        const bool first = n_tile < gridDim.x, last = n_tile + gridDim.x >= of.N / TILE;
        words4* shares = to.shares + ((u64)blockIdx.x * tiles + blockIdx.y * 8) * (to.R / 16 * 64);
        words4* kept = to.in_shared ? (words4*)(memory + sizeof(Ring)) : shares;
        const LowSums sums = {first ? nullptr : kept, last ? shares : kept};
#pragma unroll 1
        for (int m16 = 0; m16 < 4; m16++) {
            float y[8][4];
            product.take(y, m16);
            add_low_rank_and_bias<T>(y, n_tile, m16, now);
            finish<T>(y, n_tile, m16, *(Given*)memory, sums, of, to, quantise);
        }
        px::barrier();                                          // others may still read what they were given
    }
}

}  // namespace mlp
