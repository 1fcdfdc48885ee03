// gemm_fp8: out = epilogue(int4 weights * fp8 activations + low-rank part + bias), on Hopper
//
//   TOKEN   y[m,n] = ascales[m] * sum_g wscales[n,g] * sum_{k in g} qact[m,k] * qweight[n,k]        g: 64 consecutive k
//   GROUP   y[m,n] = sum_g ascales[m,g] * wscales[n,g] * sum_{k in g} qact[m,k] * qweight[n,k]
//   both           + sum_r low[m,r] * proj_up[n,r] + bias[n]
//
//   epilogue STORE, GATED, GELU or QKV of y: epilogue.cuh
//
//   qact     [M/16][K/128][16 rows][128 bytes] e4m3; the 16-byte chunk c of row r lies at chunk c ^ (r & 7). GROUP: integers
//   ascales  fp32, TOKEN [M/16][4 t][4], GROUP [M/16][K/128][2 groups][4 t][4]: rows 2t, 2t+1, 8+2t, 9+2t of 16
//   low      [M/16][2][R/8][8 rows][8] bf16 | fp16              R % 16 == 0, R <= 128; all four as quant_fp8 writes them
//   qweight  [N/256][K/128][2 warpgroups][2 sub][2 groups][128 threads] 16 bytes: sign-magnitude nibbles, see `unpack`
//            BYTES: [N/256][K/128][2][2][2][2 k32][128] 16 bytes of e4m3, for a layer with a code -8
//   wscales  [N/256][K/128][2 groups][16 n16][8 g][2] fp32 * 512: rows g and g+8 of 16
//   proj_up  [N/16][R/16][32 lanes] 16 bytes, as in the checkpoint: with its middle words swapped, an A fragment of m64k16
//   bias     [N] bf16 | fp16 in plain order, or null
//   out      [M, N] bf16 | fp16, row stride ldo elements, 16-byte aligned rows             N % 128 == 0, K % 128 == 0
//
// A CTA walks over tiles of 128 tokens x 256 features. One thread keeps a ring of STAGES stages full by bulk copies; two
// warpgroups of 128 features each multiply, features as the M of wgmma (weights come from registers) and tokens as its N:
//
//                 tokens  128
//              +-------------+            stage: 128 k    qact 16 KiB, qweight 16 KiB, wscales 2 KiB, ascales 1 KiB
//   warp- sub 0|  64 x 128   |            per stage and warpgroup: 2 groups x 2 sub x
//   group sub 1|  64 x 128   |                unpack 8 words, 2 wgmma k32 into 64 registers, 64 FFMA into 64 of acc
//     0        +-------------+            while one warpgroup promotes, the other multiplies
//   warp- sub 0|  64 x 128   |
//   group sub 1|  64 x 128   |            after the last stage one more: `low`, and TOKEN's ascales
//     1        +-------------+            QKV, where a head of q or k is: four more of 32 rotations each
//
// STORE and GELU go through shared memory as 16-bit numbers, 64 features of all tokens at a time. GATED and QKV go as fp32,
// 32 tokens of all 128 features at a time, so that a half-warp has a whole head of one token and nothing is rounded twice.
//
// CLUSTER 2: two CTAs, neighbours in N, work on the same tokens. Each fetches half of the granules of qact, ascales, low and
// rotations, for both: 26 instead of 34 bytes per clock and SM from L2 at the full rate of the tensor cores.
//
// I1  e4m3 bytes 0..15 are the values 0..15 times 2^-9, so a weight is its magnitude and a sign bit, and nothing is
//     converted; wscales make up for the 2^-9.
// I2  wgmma is said to align products to the largest and to keep 13 bits below it (arXiv 2511.10909; not yet seen on a GPU).
//     GROUP: the sum of a group is an integer of at most 64 * 15 * 8 = 7680 units, exact, because each starts at zero.
//     TOKEN: going to fp32 after each group leaves 4e-5 of error (simulated).
// I3  acc is final before `low` comes: ascales[m] is applied first, so `low` needs no scaling that fp16 might not hold.
// I4  full[s] ends a phase when all bytes of the stage have come; empty[s] when each of the 8 warps (of both CTAs) has read
//     it, wgmmas included: their reads end at wgmma_wait.
// I5  Rows past M are copies of the last 16 and are not stored. Features past N (N % 256 == 128) have weight 0, likewise.
//     Rotations past M are not fetched: what a stage holds there is old, and not read.
// I6  Both CTAs of a cluster fetch rotations, or none: `has_rotations` looks at the cluster's first feature. A warp that needs
//     none waits for those stages all the same, for it must not be a phase behind.
// I7  A thread reads an element of `residual` and of the old `out` before it writes it, and nobody else does either.
// Tried, by SASS alone, no GPU: GROUP with ascale * sum first, or scaling sums in place, spills 76 to 1540 bytes. A cluster
//     barrier at the end of a CTA spills 336; the producer waiting for its stages once more does without. An arrive with
//     release.cluster is a MEMBAR.ALL.GPU per stage. Fragments of proj_up loaded early, without naming those in use at the
//     wait: nvcc loaded into the registers of a wgmma on its way, which the PTX interpreter refused. Epilogues
//     without `uniform`: the ring's place leaves the uniform registers, 48.4 instructions per QGMMA instead of 46.4 and in
//     GROUP 52 bytes of spills; with `at` moved inside their branch: 8 bytes.
// Arch  sm_90a only: empty elsewhere, so that every build has every name.
// Spec reference.py gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope
// Test tests/kernels/families/test_w4a8_sm90.py    Source arXiv 2411.05007, design of our own
#include "epilogue.cuh"

namespace gemm_fp8 {

enum Mode { TOKEN, GROUP };
constexpr int TOKENS = 128, FEATURES = 256, DEPTH = 128;
constexpr int GRANULES = TOKENS / 16;           // what a bulk copy brings of qact, ascales and low: 16 tokens
constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
[[maybe_unused]] constexpr int WARPS = 4 * CONSUMERS;
constexpr int ROW = 64 + 8;                     // 16-bit elements of a staged row of out: padding spreads rows over banks
constexpr int TOKEN_BLOCK = 32;         // tokens that are staged in fp32
constexpr int WIDE = HEAD + 4;                  // fp32 elements of a staged row

template <bool BYTES> struct Stage {
    u8 qact[GRANULES][16][DEPTH];
    words4 qweight[CONSUMERS][2][2][BYTES ? 2 : 1][128];        // [warpgroup][sub][group][k32][thread]
    float wscales[2][FEATURES / 16][8][2];                      // [group][n16][g][row g, g+8]
    words4 ascales[GRANULES][2][4];                             // GROUP: [granule][group][t]. TOKEN: [granule][0][t]
};
static_assert(sizeof(Stage<false>) >= TOKEN_BLOCK * HEAD * 8, "rotations of TOKEN_BLOCK tokens fit");
static_assert(sizeof(Stage<false>) == 35840 && sizeof(Stage<true>) == 52224, "swizzled tiles begin at multiples of 1024");

template <bool BYTES> struct Shared {
    static constexpr int STAGES = BYTES ? 3 : 5;
    Stage<BYTES> stages[STAGES];
    union {
        u16 rounded[TOKENS][ROW];
        float exact[TOKEN_BLOCK][WIDE];
    } out[CONSUMERS];
    u64 full[STAGES], empty[STAGES];
};

// Where the ring is: both sides walk it in step, and the parity of the phase turns with each round.
template <int STAGES> struct RingPosition {
    int stage = 0;
    u32 parity = 0;
    PX void next() {
        if (++stage == STAGES)
            stage = 0, parity ^= 1;
    }
};

// The tiles of `out`, N first. The CTAs of a cluster share 128 tokens and have one tile of features each.
template <int CLUSTER> struct Tiles {
    int n, columns, count;                      // columns of clusters: tiles of features / CLUSTER, rounded up
    PX Tiles(int M, int N)
        : n((N + FEATURES - 1) / FEATURES), columns((n + CLUSTER - 1) / CLUSTER),
          count(columns * ((M + TOKENS - 1) / TOKENS)) {}

    struct Walk {
        const Tiles& tiles;
        int index, rank;
        PX Walk(const Tiles& all, int place) : tiles(all), index(blockIdx.x / CLUSTER), rank(place) {}
        PX bool more() const { return index < tiles.count; }
        PX void next() { index += gridDim.x / CLUSTER; }
        PX int m() const { return index / tiles.columns; }
        PX int n() const { return index % tiles.columns * CLUSTER + rank; }
        PX bool inside() const { return n() < tiles.n; }
        // Whether any CTA of the cluster has features of q or k.
        PX bool has_rotations(int N) const { return 3 * (n() - rank) * FEATURES < 2 * N; }
    };
};

// Sum of two pairs of 16-bit floats.
template <Half T> PX u32 add(u32 a, u32 b) {
    return px::pack_half<T>(px::clamped<T>(px::low_half<T>(a) + px::low_half<T>(b)),
                            px::clamped<T>(px::high_half<T>(a) + px::high_half<T>(b)));
}

// Two A fragments of four e4m3 weights per word. A word is p | rotate_left(q, 4), p and q of bytes s0000mmm.
PX void unpack(words4 (&a)[2], const words4& packed) {
    const u32 mask = 0x87878787u;
    auto p = [&](u32 word) { return word & mask; };
    auto q = [&](u32 word) { return px::rotate_right(word, 4) & mask; };
    a[0] = words4{p(packed.x), q(packed.x), p(packed.y), q(packed.y)};
    a[1] = words4{p(packed.z), q(packed.z), p(packed.w), q(packed.w)};
}

PX void read(float (&to)[4], const words4& from) {
    to[0] = px::as_float(from.x), to[1] = px::as_float(from.y), to[2] = px::as_float(from.z), to[3] = px::as_float(from.w);
}

template <Mode MODE, bool BYTES, int CLUSTER>
PX void produce(Shared<BYTES>& shared, const u8* qact, const float* ascales, const words4* qweight, const float* wscales,
                const u8* low, const float* rotation, int M, int N, const Tiles<CLUSTER>& tiles, int rank, int steps,
                int R) {
    using Tile = typename Tiles<CLUSTER>::Walk;
    constexpr int STAGES = Shared<BYTES>::STAGES;
    constexpr u32 QACT = 16 * DEPTH, ASCALES = MODE == GROUP ? 128 : 64;
    constexpr u32 QWEIGHT = sizeof(Stage<BYTES>::qweight), WSCALES = sizeof(Stage<BYTES>::wscales);
    const int last = (M + 15) / 16 - 1;
    // 16 tokens for all CTAs of the cluster, from the one whose turn it is.
    auto copy = [&](int turn, void* to, const void* from, u32 bytes, u64* full) {
        if (CLUSTER == 1)
            px::bulk_copy(to, from, bytes, full);
        else if (turn % CLUSTER == rank)
            px::bulk_copy_to((1 << CLUSTER) - 1, to, from, bytes, full);
    };
    RingPosition<STAGES> at;
    for (Tile tile(tiles, rank); tile.more(); tile.next()) {
        const int n_tile = tile.inside() ? tile.n() : tiles.n - 1, granule0 = tile.m() * GRANULES;
        for (int step = 0; step < steps; step++, at.next()) {
            Stage<BYTES>& to = shared.stages[at.stage];
            u64* full = &shared.full[at.stage];
            px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
            px::mbarrier_expect(full, GRANULES * (QACT + (MODE == GROUP ? ASCALES : 0)) + QWEIGHT + WSCALES);
            const u64 place = (u64)n_tile * steps + step;
            px::bulk_copy(to.qweight, qweight + place * (QWEIGHT / 16), QWEIGHT, full);
            px::bulk_copy(to.wscales, wscales + place * (WSCALES / 4), WSCALES, full);
#pragma unroll
            for (int i = 0; i < GRANULES; i++) {
                const u64 granule = (u64)(granule0 + i < last ? granule0 + i : last) * steps + step;
                copy(i, to.qact[i], qact + granule * QACT, QACT, full);
                if (MODE == GROUP)
                    copy(i, to.ascales[i], ascales + granule * (ASCALES / 4), ASCALES, full);
            }
        }
        if (MODE == TOKEN || R) {
            Stage<BYTES>& to = shared.stages[at.stage];
            u64* full = &shared.full[at.stage];
            const u32 bytes = 32 * R;
            px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
            px::mbarrier_expect(full, GRANULES * (bytes + (MODE == TOKEN ? ASCALES : 0)));
#pragma unroll 1
            for (int i = 0; i < GRANULES; i++) {
                const u64 granule = granule0 + i < last ? granule0 + i : last;
                if (R)
                    copy(i, (u8*)&to + i * bytes, low + granule * bytes, bytes, full);
                if (MODE == TOKEN)
                    copy(i, to.ascales[i], ascales + granule * (ASCALES / 4), ASCALES, full);
            }
            at.next();
        }
        if (!rotation || !tile.has_rotations(N))
            continue;
        int token = tile.m() * TOKENS;
#pragma unroll 1
        for (int token_block = 0; token_block < TOKENS / TOKEN_BLOCK; token_block++, token += TOKEN_BLOCK, at.next()) {
            constexpr int SHARE = TOKEN_BLOCK / 2;
            u64* full = &shared.full[at.stage];
            auto rows = [&](int first, int most) { return M - first < 0 ? 0 : M - first < most ? M - first : most; };
            px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
            px::mbarrier_expect(full, rows(token, TOKEN_BLOCK) * HEAD * 8);
#pragma unroll 1
            for (int i = 0, first = token; i < 2 && first < M; i++, first += SHARE)
                copy(i, (u8*)&shared.stages[at.stage] + i * SHARE * HEAD * 8, rotation + (u64)first * HEAD * 2,
                     rows(first, SHARE) * HEAD * 8, full);
        }
    }
    // A CTA whose stages the others have yet to leave must not end: they arrive at its mbarriers.
    for (int i = 0; i < (CLUSTER > 1 ? STAGES : 0); i++, at.next())
        px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
}

template <Half T, Mode MODE, bool BYTES, int CLUSTER>
PX void consume(Shared<BYTES>& shared, const words4* proj_up, const u16* bias, u16* out, int M, int N,
                const Tiles<CLUSTER>& tiles, int rank, int steps, int R, int ldo, int accumulate, const Epilogue& epilogue) {
    using Tile = typename Tiles<CLUSTER>::Walk;
    const int group_of_warps = px::uniform(threadIdx.x / 128);
    const int thread = threadIdx.x % 128, warp = px::uniform(thread / 32), lane = thread % 32;
    const int g = lane / 4, t = lane % 4, ranks = R / 16;
    RingPosition<Shared<BYTES>::STAGES> at;

    auto release = [&](RingPosition<Shared<BYTES>::STAGES>& from) {
        px::warp_barrier();
        if (CLUSTER == 1 && lane == 0)
            px::mbarrier_arrive(&shared.empty[from.stage]);
        if (CLUSTER > 1 && lane < CLUSTER)                      // whose producers all write to this stage
            px::mbarrier_arrive_at(&shared.empty[from.stage], lane);
        from.next();
    };

    for (Tile tile(tiles, rank); tile.more(); tile.next()) {
        float acc[2][64], sum[64];                              // [sub][fragment of 64 features x 128 tokens]
#pragma unroll
        for (int i = 0; i < 64; i++)
            acc[0][i] = acc[1][i] = 0.0f;

#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            const Stage<BYTES>& from = shared.stages[at.stage];
            px::mbarrier_wait(&shared.full[at.stage], at.parity);
            const u64 b = px::operand(from.qact, 16, 1024, true);
            auto load = [&](words4 (&a)[2], int quarter) {         // 2 * group + sub
                const auto& packed = from.qweight[group_of_warps][quarter % 2][quarter / 2];
                if (BYTES)
                    a[0] = packed[0][thread], a[1] = packed[BYTES ? 1 : 0][thread];
                else
                    unpack(a, packed[0][thread]);
            };
            words4 a[2], next[2] = {};
            load(a, 0);
#pragma unroll
            for (int quarter = 0; quarter < 4; quarter++) {
                const int group = quarter / 2, sub = quarter % 2;
                px::wgmma_fence();
                px::wgmma_e4m3<false>(sum, a[0], b + 4 * group);            // 16-byte units: 32 bytes per k32
                px::wgmma_e4m3<true>(sum, a[1], b + 4 * group + 2);
                px::wgmma_commit();
                const words2 bits = *(const words2*)from.wscales[group][8 * group_of_warps + 4 * sub + warp][g];
                const float wscale[2] = {px::as_float(bits.x), px::as_float(bits.y)};
                if (quarter < 3)
                    load(next, quarter + 1);
                px::wgmma_wait(sum, a[0], a[1]);
                a[0] = next[0], a[1] = next[1];
#pragma unroll
                for (int i = 0; i < GRANULES; i++) {
                    float ascale[4] = {};
                    if (MODE == GROUP)
                        read(ascale, from.ascales[i][group][t]);
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        const float by = wscale[e / 2 % 2];     // times ascale first: the other order spills
                        acc[sub][8 * i + e] += (MODE == GROUP ? by * ascale[e / 4 * 2 + e % 2] : by) * sum[8 * i + e];
                    }
                }
            }
            release(at);
        }

        const int token0 = tile.m() * TOKENS, feature0 = tile.n() * FEATURES + group_of_warps * 128;
        const bool inside = feature0 < N;
        if (MODE == TOKEN || R) {
            const words4* up = proj_up + (u64)((inside ? feature0 / 16 : 0) + warp) * ranks * 32 + lane;
            words4 a[2] = {};
            if (R)
                a[0] = up[0], a[1] = up[4 * ranks * 32];        // early: it takes longer than the copies
            const Stage<BYTES>& from = shared.stages[at.stage];
            px::mbarrier_wait(&shared.full[at.stage], at.parity);
            if (MODE == TOKEN)
#pragma unroll
                for (int i = 0; i < GRANULES; i++) {
                    float ascale[4];
                    read(ascale, from.ascales[i][0][t]);
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        acc[0][8 * i + e] *= ascale[e / 4 * 2 + e % 2];
                        acc[1][8 * i + e] *= ascale[e / 4 * 2 + e % 2];
                    }
                }
            const u64 b = px::operand(&from, 128, 16 * R, false);
#pragma unroll 1
            for (int r = 0; r < ranks; r++) {
                const words4 now[2] = {{a[0].x, a[0].z, a[0].y, a[0].w}, {a[1].x, a[1].z, a[1].y, a[1].w}};
                px::wgmma_fence();
                px::wgmma_half<T>(acc[0], now[0], b + 16 * r);
                px::wgmma_half<T>(acc[1], now[1], b + 16 * r);
                px::wgmma_commit();
                if (r + 1 < ranks)
                    a[0] = up[(r + 1) * 32], a[1] = up[(4 * ranks + r + 1) * 32];
                px::wgmma_wait(acc[0], now[0], now[1]);
                px::wgmma_wait(acc[1], now[0], now[1]);
            }
            release(at);
        }

        if (bias && inside)
#pragma unroll
            for (int sub = 0; sub < 2; sub++) {
                float offset[2];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    offset[h] = px::low_half<T>(bias[feature0 + 64 * sub + 16 * warp + 8 * h + g]);
#pragma unroll
                for (int i = 0; i < 64; i++)
                    acc[sub][i] += offset[i / 2 % 2];
            }

        // Rotations are waited for and released by a place of their own, so that `at` moves where all warps go the same way.
        RingPosition<Shared<BYTES>::STAGES> rotation_stage = at;
        const bool has_rotations = epilogue.kind == QKV && tile.has_rotations(N);
        if (has_rotations)
#pragma unroll 1
            for (int token_block = 0; token_block < TOKENS / TOKEN_BLOCK; token_block++)
                at.next();
        const bool qk = epilogue.kind == QKV && 3 * feature0 < 2 * N;
        if (inside && (epilogue.kind == GATED || qk)) {
            // Lane l of a half-warp has the pairs 2l + 32q of a token. 16-bit pairs of global memory are read as words.
            float(&staged)[TOKEN_BLOCK][WIDE] = shared.out[group_of_warps].exact;
            const int first = 2 * (lane % 16);
            const u16* factors = epilogue.kind == GATED ? epilogue.gate + feature0
                                 : 3 * feature0 < N     ? epilogue.query
                                                        : epilogue.key;
            u32 factor[4];
#pragma unroll
            for (int q = 0; q < 4; q++)
                factor[q] = *(const u32*)(factors + first + 32 * q);
#pragma unroll
            for (int token_block = 0; token_block < TOKENS / TOKEN_BLOCK; token_block++) {
                const int row0 = 8 * warp + lane / 16, token = token0 + TOKEN_BLOCK * token_block + row0;  // and every 2nd of 8
                u32 residual[4][4] = {}, before[4][4] = {};
                if (epilogue.kind == GATED)                     // early: it takes longer than staging
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int q = 0; q < 4; q++)
                            if (const u64 row = token + 2 * i; row < M) {
                                const int feature = feature0 + first + 32 * q;
                                residual[i][q] = *(const u32*)(epilogue.residual + row * epilogue.ldr + feature);
                                if (accumulate)
                                    before[i][q] = *(const u32*)(out + row * ldo + feature);
                            }
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const int sub = i / 16, j = i / 4 % 4, e = i % 4;
                    staged[8 * j + 2 * t + e % 2][64 * sub + 16 * warp + 8 * (e / 2) + g] = acc[sub][16 * token_block + i % 16];
                }
                const words4* turn = (const words4*)&shared.stages[rotation_stage.stage] + row0 * (HEAD / 2) + lane % 16;
                if (has_rotations)
                    px::mbarrier_wait(&shared.full[rotation_stage.stage], rotation_stage.parity);
                px::barrier_of(1 + group_of_warps, 128);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float y[4][2], squares = 0.0f;
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const words2 bits = *(const words2*)&staged[row0 + 2 * i][first + 32 * q];
                        y[q][0] = px::as_float(bits.x), y[q][1] = px::as_float(bits.y);
                        squares += y[q][0] * y[q][0] + y[q][1] * y[q][1];
                    }
                    float norm = 1.0f;
                    if (qk) {
#pragma unroll
                        for (int mask = 8; mask; mask /= 2)
                            squares += px::as_float(px::swap_lanes(px::as_bits(squares), mask));
                        norm = px::rsqrt(squares / HEAD + epilogue.eps);
                    }
                    if (token + 2 * i >= M)
                        continue;
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const float by[2] = {px::low_half<T>(factor[q]), px::high_half<T>(factor[q])};
                        float z[2];
                        if (qk) {
                            float r[4];
                            read(r, turn[2 * i * (HEAD / 2) + 16 * q]);
                            const float v[2] = {y[q][0] * norm * by[0], y[q][1] * norm * by[1]};
                            z[0] = r[0] * v[0] + r[1] * v[1], z[1] = r[2] * v[0] + r[3] * v[1];
                        } else {
                            const u32 old = before[i][q], rest = residual[i][q];
                            z[0] = px::low_half<T>(rest) + by[0] * (y[q][0] + px::low_half<T>(old));
                            z[1] = px::high_half<T>(rest) + by[1] * (y[q][1] + px::high_half<T>(old));
                        }
                        *(u32*)(out + (u64)(token + 2 * i) * ldo + feature0 + first + 32 * q) =
                            px::pack_half<T>(px::clamped<T>(z[0]), px::clamped<T>(z[1]));
                    }
                }
                px::barrier_of(1 + group_of_warps, 128);
                if (has_rotations)
                    release(rotation_stage);
            }
        } else {
            for (int token_block = 0; token_block < (has_rotations ? TOKENS / TOKEN_BLOCK : 0); token_block++) {
                px::mbarrier_wait(&shared.full[rotation_stage.stage], rotation_stage.parity);
                release(rotation_stage);
            }

            if (epilogue.kind == GELU)
#pragma unroll
                for (int i = 0; i < 64; i++)
                    acc[0][i] = gelu(acc[0][i]), acc[1][i] = gelu(acc[1][i]);
            // Through shared memory to whole 128-byte row segments, 64 features at a time.
            u16(&staged)[TOKENS][ROW] = shared.out[group_of_warps].rounded;
#pragma unroll
            for (int sub = 0; sub < 2; sub++) {
                const int feature = feature0 + 64 * sub;
#pragma unroll
                for (int j = 0; j < 16; j += 2) {
                    u32 pairs[4];                                   // [token half][feature half]
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* pair = &acc[sub][4 * (j + i / 2) + 2 * (i % 2)];
                        pairs[i] = px::pack_half<T>(px::clamped<T>(pair[0]), px::clamped<T>(pair[1]));
                    }
                    px::store_transposed(&staged[8 * (j + lane / 16) + lane % 8][16 * warp + lane / 8 % 2 * 8],
                                         words4{pairs[0], pairs[1], pairs[2], pairs[3]});
                }
                px::barrier_of(1 + group_of_warps, 128);
                if (inside)
#pragma unroll 4
                    for (int i = 0; i < 8; i++) {
                        const int r = warp * 32 + i * 4 + lane / 8, row = token0 + r;
                        words4 piece = *(const words4*)&staged[r][lane % 8 * 8];
                        if (row < M) {
                            words4* to = (words4*)(out + (u64)row * ldo + feature + lane % 8 * 8);
                            if (accumulate) {
                                const words4 old = *to;
                                piece = words4{add<T>(piece.x, old.x), add<T>(piece.y, old.y), add<T>(piece.z, old.z),
                                               add<T>(piece.w, old.w)};
                            }
                            *to = piece;
                        }
                    }
                px::barrier_of(1 + group_of_warps, 128);
            }
        }
    }
}

template <Half T, Mode MODE, bool BYTES, int CLUSTER>
PX void run(const u8* qact, const float* ascales, const words4* qweight, const float* wscales, const u8* low,
            const words4* proj_up, const u16* bias, u16* out, int M, int N, int K, int R, int ldo, int accumulate,
            const Epilogue& epilogue) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared<BYTES>& shared = *(Shared<BYTES>*)memory;
    const Tiles<CLUSTER> tiles(M, N);
    const int steps = K / DEPTH, rank = CLUSTER == 1 ? 0 : px::cluster_rank();
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shared<BYTES>::STAGES; i++) {
            px::mbarrier_init(&shared.full[i], 1);
            px::mbarrier_init(&shared.empty[i], WARPS * CLUSTER);
        }
        px::mbarrier_fence();
    }
    auto everyone = [] {
        if (CLUSTER == 1)
            px::barrier();
        else
            px::cluster_barrier();
    };
    everyone();
    if (threadIdx.x >= 128 * CONSUMERS) {
        px::shrink_registers<24>();
        if (threadIdx.x == 128 * CONSUMERS)
            produce<MODE, BYTES, CLUSTER>(shared, qact, ascales, qweight, wscales, low, epilogue.rotation, M, N, tiles, rank,
                                         steps, R);
    } else {
        px::grow_registers<240>();
        consume<T, MODE, BYTES, CLUSTER>(shared, proj_up, bias, out, M, N, tiles, rank, steps, R, ldo, accumulate, epilogue);
    }
}

}  // namespace gemm_fp8

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GEMM_FP8_RUN(T, MODE, BYTES, CLUSTER)                                                                             \
    gemm_fp8::run<T, gemm_fp8::MODE, BYTES, CLUSTER>(qact, ascales, qweight, wscales, low, proj_up, bias, out, M, N, K, R,\
                                                     ldo, accumulate, EPILOGUE)
#else
#define GEMM_FP8_RUN(T, MODE, BYTES, CLUSTER)
#endif
#define GEMM_FP8(NAME, T, MODE, BYTES, CLUSTER)                                                                           \
    extern "C" __global__ void __launch_bounds__(gemm_fp8::THREADS, 1)                                                    \
    NAME(const u8* qact, const float* ascales, const words4* qweight, const float* wscales, const u8* low,                \
         const words4* proj_up, const u16* bias, u16* out, int M, int N, int K, int R, int ldo, int accumulate,           \
         EPILOGUE_PARAMETERS) {                                                                                           \
        GEMM_FP8_RUN(T, MODE, BYTES, CLUSTER);                                                                            \
    }

// Grid: as many CTAs as run at once, or fewer, whole clusters. Block: 384. Dynamic shared memory: sizeof(Shared<BYTES>). The
// name says dtype, what an activation scale is for, how a weight is stored, and how many CTAs are a cluster.
GEMM_FP8(gemm_fp8_bf16_token_w4_c1, BF16, TOKEN, false, 1)
GEMM_FP8(gemm_fp8_bf16_token_w4_c2, BF16, TOKEN, false, 2)
GEMM_FP8(gemm_fp8_bf16_token_w8_c1, BF16, TOKEN, true, 1)
GEMM_FP8(gemm_fp8_bf16_token_w8_c2, BF16, TOKEN, true, 2)
GEMM_FP8(gemm_fp8_bf16_group_w4_c1, BF16, GROUP, false, 1)
GEMM_FP8(gemm_fp8_bf16_group_w4_c2, BF16, GROUP, false, 2)
GEMM_FP8(gemm_fp8_bf16_group_w8_c1, BF16, GROUP, true, 1)
GEMM_FP8(gemm_fp8_bf16_group_w8_c2, BF16, GROUP, true, 2)
GEMM_FP8(gemm_fp8_fp16_token_w4_c1, FP16, TOKEN, false, 1)
GEMM_FP8(gemm_fp8_fp16_token_w4_c2, FP16, TOKEN, false, 2)
GEMM_FP8(gemm_fp8_fp16_token_w8_c1, FP16, TOKEN, true, 1)
GEMM_FP8(gemm_fp8_fp16_token_w8_c2, FP16, TOKEN, true, 2)
GEMM_FP8(gemm_fp8_fp16_group_w4_c1, FP16, GROUP, false, 1)
GEMM_FP8(gemm_fp8_fp16_group_w4_c2, FP16, GROUP, false, 2)
GEMM_FP8(gemm_fp8_fp16_group_w8_c1, FP16, GROUP, true, 1)
GEMM_FP8(gemm_fp8_fp16_group_w8_c2, FP16, GROUP, true, 2)
