// quant_fp8: quantise activations to e4m3 and run the low-rank down projection, as gemm_fp8 wants both
//
//   TOKEN   z[m,k]       = (x[m,k] + shift) * inverse[k]                       fp32; shift 0.171875 if UNSIGNED, else none
//           ascales[m]   = max |z[m,k]| over the token / 448
//           qact[m,k]    = e4m3(z[m,k] / ascales[m])
//   GROUP   z[m,k]       = round16(round16(x[m,k] + shift) * inverse[k])
//           ascales[m,g] = max |z[m,k]| over the group / 7                     UNSIGNED: / 15       g: 64 consecutive k
//           qact[m,k]    = round_even(z[m,k] / ascales[m,g])                   -8..7 or 0..15, exact in e4m3
//   both    low[m,r]     = sum_k x[m,k] * proj_down[k,r]                       x as it comes: not shifted, not smoothed
//
//   x          [M, K]  bf16 | fp16, row stride ldx elements, 16-byte aligned rows      K % 128 == 0
//   inverse    [K]     fp32: 1 / smooth in plain order
//   proj_down  [K, R]  packed as in the checkpoint after its rows were put in the order below      R % 16 == 0
//   qact       [M/16][K/128][16 rows][128 bytes], M rounded up to 16; the 16-byte chunk c of row r lies at chunk c ^ (r & 7)
//   ascales    fp32, TOKEN [M/16][4 t][4], GROUP [M/16][K/128][2 groups][4 t][4]: rows 2t, 2t+1, 8+2t, 9+2t of 16. GROUP:
//              rounded to 16 bit, the codes not
//   low        [M/16][2][R/8][8 rows][8] 16 bit: what wgmma calls core matrices
//
// One CTA owns 16 rows, its 8 warps take turns at the groups of 64 columns. Lane 4g+t holds columns 16t..16t+15 of rows g
// and g+8: two 16-byte loads each, and 16 codes are one chunk of qact. As an A fragment of m16n8k16, words 2c and 2c+1 of a
// row are columns 16t + 4c + {0, 1} and {2, 3}; the order of k is free as long as proj_down has the same:
//
//   k of m16n8k16 number c   2t, 2t+1            8+2t, 9+2t
//   column of the group      16t+4c, 16t+4c+1    16t+4c+2, 16t+4c+3
//
// TOKEN reads x twice, the second time mostly from L1: the scale is known only after a whole row.
//
// I1  Rows past M read as zero: codes 0, scales 0, low 0.
// I2  Maxima are taken on the bits of |z|, where NaN > Inf > numbers: the scale becomes NaN or Inf and the codes 0, so the
//     whole token becomes NaN, as in a 16-bit layer. fmaxf would drop a NaN.
// I3  Each warp keeps its share of `low` in registers; shares are added in warp order, so two runs agree bit for bit.
// Arch  sm_90a: empty elsewhere, so that every build has every name.
// Spec reference.py quant_down    Test tests/kernels/families/test_w4a8_sm90.py    Source arXiv 2411.05007, design of our own
#include "fp8_codes.cuh"

namespace quant_fp8 {

template <Half T, Mode MODE, bool UNSIGNED, int RANK_TILES>
PX void run(const u16* x, const float* inverse, const words4* proj_down, u8* qact, float* ascales, u32* low, int M, int K,
            int R, int ldx) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int groups = K / 64, rank_tiles = R / 16, row = blockIdx.x * 16 + g;
    const bool inside[2] = {row < M, row + 8 < M};
    const u16* x_row[2] = {x + (u64)row * ldx + 16 * t, x + (u64)(row + 8) * ldx + 16 * t};

    auto load = [&](u32 (&pairs)[8], int group, int h) {
        const words4 none = {0, 0, 0, 0};
        const words4* from = (const words4*)(x_row[h] + group * 64);
        const words4 first = inside[h] ? from[0] : none, second = inside[h] ? from[1] : none;
        pairs[0] = first.x, pairs[1] = first.y, pairs[2] = first.z, pairs[3] = first.w;
        pairs[4] = second.x, pairs[5] = second.y, pairs[6] = second.z, pairs[7] = second.w;
    };

    float share[2 * RANK_TILES][4];
    clear<RANK_TILES>(share);
    u32 peak[2] = {0, 0};

    for (int group = warp; group < groups; group += WARPS) {
        u32 pairs[2][8];
        load(pairs[0], group, 0);
        load(pairs[1], group, 1);
        multiply_down<T, RANK_TILES>(share, pairs, proj_down, group, rank_tiles);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float z[16];
            smooth<T, MODE, UNSIGNED>(z, pairs[h], inverse, group);
            const u32 bits = inside[h] ? largest(z) : 0u;
            if (MODE == TOKEN)
                peak[h] = larger(peak[h], bits);
            else
                store_group<T, UNSIGNED>(z, bits, qact, ascales, groups, group, h);
        }
    }

    if (MODE == TOKEN) {
        __shared__ u32 peaks[WARPS][16];
        for (int h = 0; h < 2; h++) {
            const u32 bits = max_of_row(peak[h]);
            if (t == 0)
                peaks[warp][8 * h + g] = bits;
        }
        px::barrier();
        Scale scale[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 bits = 0;
            for (int w = 0; w < WARPS; w++)
                bits = larger(bits, peaks[w][8 * h + g]);
            scale[h] = store_scale(bits, ascales, h);
        }
        for (int group = warp; group < groups; group += WARPS)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 pairs[8];
                float z[16];
                load(pairs, group, h);
                smooth<T, MODE, UNSIGNED>(z, pairs, inverse, group);
                store<MODE, UNSIGNED>(z, scale[h], qact, groups, group, h);
            }
    }

#pragma unroll
    for (int r = 0; r < RANK_TILES; r++)
        if (r < rank_tiles)
            store_low<T, CoreMatrices>(share[2 * r], share[2 * r + 1], low, r, rank_tiles);
}

}  // namespace quant_fp8

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QUANT_FP8_RUN(T, MODE, UNSIGNED, RANK_TILES)                                                                      \
    quant_fp8::run<T, quant_fp8::MODE, UNSIGNED, RANK_TILES>(x, inverse, proj_down, qact, ascales, low, M, K, R, ldx)
#else
#define QUANT_FP8_RUN(T, MODE, UNSIGNED, RANK_TILES)
#endif
#define QUANT_FP8(NAME, T, MODE, UNSIGNED, RANK_TILES)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * quant_fp8::WARPS)                                                   \
    NAME(const u16* x, const float* inverse, const words4* proj_down, u8* qact, float* ascales, u32* low,                 \
         int M, int K, int R, int ldx) {                                                                                  \
        QUANT_FP8_RUN(T, MODE, UNSIGNED, RANK_TILES);                                                                     \
    }

// Grid: M / 16 rounded up. Block: 256. The name says dtype, what a scale is for, signedness and the largest rank.
QUANT_FP8(quant_fp8_bf16_token_s_r32, BF16, TOKEN, false, 2)
QUANT_FP8(quant_fp8_bf16_token_s_r128, BF16, TOKEN, false, 8)
QUANT_FP8(quant_fp8_bf16_token_u_r32, BF16, TOKEN, true, 2)
QUANT_FP8(quant_fp8_bf16_token_u_r128, BF16, TOKEN, true, 8)
QUANT_FP8(quant_fp8_bf16_group_s_r32, BF16, GROUP, false, 2)
QUANT_FP8(quant_fp8_bf16_group_s_r128, BF16, GROUP, false, 8)
QUANT_FP8(quant_fp8_bf16_group_u_r32, BF16, GROUP, true, 2)
QUANT_FP8(quant_fp8_bf16_group_u_r128, BF16, GROUP, true, 8)
QUANT_FP8(quant_fp8_fp16_token_s_r32, FP16, TOKEN, false, 2)
QUANT_FP8(quant_fp8_fp16_token_s_r128, FP16, TOKEN, false, 8)
QUANT_FP8(quant_fp8_fp16_token_u_r32, FP16, TOKEN, true, 2)
QUANT_FP8(quant_fp8_fp16_token_u_r128, FP16, TOKEN, true, 8)
QUANT_FP8(quant_fp8_fp16_group_s_r32, FP16, GROUP, false, 2)
QUANT_FP8(quant_fp8_fp16_group_s_r128, FP16, GROUP, false, 8)
QUANT_FP8(quant_fp8_fp16_group_u_r32, FP16, GROUP, true, 2)
QUANT_FP8(quant_fp8_fp16_group_u_r128, FP16, GROUP, true, 8)
