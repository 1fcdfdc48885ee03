// w4a4_quant: what quant_down and quant_down_sm75 are: quantise activations to int4 and run the low-rank down projection, in
// one pass over x
//
//   z[m,k]       = round16(round16(x[m,k] + shift) / smooth[k])        shift 0.171875 if UNSIGNED, else none
//   ascales[m,g] = max |z[m,k]| over the group / 7                     UNSIGNED: / 15       g: 64 consecutive k
//   qact[m,k]    = round_even(z[m,k] / ascales[m,g])                   with the scale before it is rounded to 16 bit
//   low[m,r]     = sum_k x[m,k] * proj_down[k,r]                       x as it comes: no shift, smoothing, quantisation
//
//   x          [M, K]  bf16 | fp16, row stride ldx elements (even), 4-byte aligned      K % 64 == 0
//   smooth     [K]     packed as in the checkpoint (layout.pack_vector)
//   proj_down  [K, R]  packed as in the checkpoint (layout.pack_down)    R % 16 == 0, R <= 16 * RANK_TILES
//   qact       [M/64][K/64][4 m16][32 lanes] 16 bytes: A fragments of m16n8k64 (ptx.cuh), M rounded up to 64
//   ascales    [M/64][K/64][4 m16][8 g][2] fp32, rounded to 16 bit: rows g and g+8 of an m16 tile
//              with PEAKS [M/64][K/64 + 1]: the last is each row's largest, see w4a4_normal.cuh
//   low        [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, 16 bit
//
// One CTA owns 16 rows, its 8 warps take turns at the groups of 64 columns. Lane 4g+t holds, of rows g and g+8, columns
// 16c + {2t, 2t+1, 8+2t, 9+2t}, c = 0..3, because then
//   - each c is an A fragment of m16n8k16, and proj_down and smooth are stored in just this order
//   - two neighbouring codes are one byte, and a 4 x 4 transpose of bytes among the four lanes of a row makes the word
//     of eight consecutive columns that m16n8k64 wants: 2 shuffles for 4 bytes instead of moving the 16-bit values.
//
// I1  Rows past M read as zero: codes 0, scales 0, low 0. Nothing of them can reach a stored row.
// I2  Maxima are taken on the bits of |z|, where NaN > Inf > numbers: a NaN makes its group's scale NaN, its codes 0 and so
//     the whole token NaN, as in a 16-bit layer. fmaxf would drop it.
// I3  Each warp keeps its share of `low` in registers; shares are added in warp order, so two runs agree bit for bit.
// Spec reference.py quant_down    Test tests/kernels/families/test_w4a4_sm80.py, test_w4a4_sm75.py
// Source arXiv 2411.05007, checkpoint-format 6.2, 6.4
#pragma once
#include "quantiser.cuh"

namespace w4a4_quant {

using namespace quantiser;

template <Half T, bool UNSIGNED> PX float smoothed(float x, float smooth) {
    if (UNSIGNED)
        x = px::low_half<T>(px::pack_half<T>(x + 0.171875f, 0.0f));
    return px::low_half<T>(px::pack_half<T>(px::divide(x, smooth), 0.0f));
}

template <bool UNSIGNED> PX u32 code(float z, float inverse) {
    int q = px::round_even(z * inverse);
    const int low = UNSIGNED ? 0 : -8, high = UNSIGNED ? 15 : 7;
    q = q < low ? low : q > high ? high : q;
    return (u32)q & 15u;
}

// Codes and scales of one group of rows 16 `tile16` to 16 `tile16` + 15, whose words lie in `pairs` as multiply_down has them.
// Returns the bits of the two scales.
template <Half T, bool UNSIGNED, bool PEAKS = false>
PX words2 quantise(const u32 (&pairs)[2][8], const u16* smooth, words4* qact, words2* ascales, const bool (&inside)[2],
                   u32 tile16, int group, int groups) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float z[2][16];
    u32 peak[2] = {0u, 0u};
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const words2 s = *(const words2*)(smooth + group * 64 + c * 16 + t * 4);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 pair = pairs[h][2 * c + half], divisor = half ? s.y : s.x;
                float* to = &z[h][4 * c + 2 * half];
                to[0] = smoothed<T, UNSIGNED>(px::low_half<T>(pair), px::low_half<T>(divisor));
                to[1] = smoothed<T, UNSIGNED>(px::high_half<T>(pair), px::high_half<T>(divisor));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u32 bits = px::as_bits(to[i]) & 0x7fffffffu;
                    peak[h] = bits > peak[h] ? bits : peak[h];
                }
            }
    }
    u32 words[2][2];
    float scales[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 bits = max_of_row(inside[h] ? peak[h] : 0u);          // past M: scale 0, and so codes 0
        const float scale = px::as_float(bits) * (UNSIGNED ? 1.0f / 15.0f : 1.0f / 7.0f);
        const float inverse = bits ? 1.0f / scale : 0.0f;
        scales[h] = px::low_half<T>(px::pack_half<T>(scale, 0.0f));
#pragma unroll
        for (int set = 0; set < 2; set++) {
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* from = &z[h][8 * set + 2 * i];
                const u32 byte = code<UNSIGNED>(from[0], inverse) | code<UNSIGNED>(from[1], inverse) << 4;
                word |= byte << 8 * i;
            }
            words[h][set] = transpose_bytes(word, t);
        }
    }
    const u64 tile = ((u64)(tile16 / 4) * groups + group) * 4 + tile16 % 4, of_scales = tile + PEAKS * (tile16 / 4) * 4;
    qact[tile * 32 + lane] = words4{words[0][0], words[1][0], words[0][1], words[1][1]};
    const words2 bits = {px::as_bits(scales[0]), px::as_bits(scales[1])};
    if (t == 0)
        ascales[of_scales * 8 + g] = bits;
    return bits;
}

// The largest scale of each row, behind its others: the maximum, by their bits, of what each warp has seen of them.
PX void store_peaks(const u32 (&peak)[2], words2* ascales, int groups) {
    __shared__ u32 peaks[WARPS][16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane % 4 == 0)
        for (int h = 0; h < 2; h++)
            peaks[warp][lane / 4 * 2 + h] = peak[h];
    px::barrier();
    if (threadIdx.x < 16) {
        u32 largest = 0;
        for (int w = 0; w < WARPS; w++)
            largest = larger(largest, peaks[w][threadIdx.x]);
        const int block64 = blockIdx.x / 4, m16 = blockIdx.x % 4;
        u32* to = (u32*)(ascales + (((u64)block64 * (groups + 1) + groups) * 4 + m16) * 8);
        to[threadIdx.x] = largest;
    }
}

template <Half T, bool UNSIGNED, int RANK_TILES, bool PEAKS = false>
PX void run(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, words2* ascales, u32* low,
            int M, int K, int R, int ldx) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int groups = K / 64, rank_tiles = R / 16, row = blockIdx.x * 16 + g;
    const u16* x_row[2] = {x + (u64)row * ldx, x + (u64)(row + 8) * ldx};
    const bool inside[2] = {row < M, row + 8 < M};

    float share[2 * RANK_TILES][4];
    clear<RANK_TILES>(share);
    u32 largest[2] = {0u, 0u};

    for (int group = warp; group < groups; group += WARPS) {
        u32 pairs[2][8];                    // [row][2c + half of the 16 columns]: columns 16c + 8half + 2t, +1
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int h = i / 8, column = group * 64 + i % 8 * 8 + 2 * t;
            pairs[h][i % 8] = inside[h] ? *(const u32*)(x_row[h] + column) : 0u;
        }
        multiply_down<T, RANK_TILES>(share, pairs, proj_down, group, rank_tiles);
        const words2 bits = quantise<T, UNSIGNED, PEAKS>(pairs, smooth, qact, ascales, inside, blockIdx.x, group, groups);
        largest[0] = larger(largest[0], bits.x), largest[1] = larger(largest[1], bits.y);
    }

    if (PEAKS)
        store_peaks(largest, ascales, groups);
#pragma unroll
    for (int r = 0; r < RANK_TILES; r++)
        if (r < rank_tiles)
            store_low<T>(share[2 * r], share[2 * r + 1], low, r, rank_tiles);
}

}  // namespace w4a4_quant
