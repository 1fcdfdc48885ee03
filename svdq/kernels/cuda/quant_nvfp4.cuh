// quant_nvfp4: quantise activations to e2m1 and run the low-rank down projection, in one pass over x
//
//   z[m,k]       = round16(x[m,k] / smooth[k])
//   s[m,g]       = min(max |z[m,k]| over the group / 6, 448)           g: 16 consecutive k
//   qact[m,k]    = e2m1(z[m,k] / s[m,g])                               nearest even, at most 6, s not yet rounded
//   ascales[m,g] = e4m3(s[m,g])                                        nearest even
//   low[m,r]     = sum_k x[m,k] * proj_down[k,r]                       x as it comes: no smoothing, quantisation
//
//   x          [M, K]  bf16 | fp16, row stride ldx elements (even), 4-byte aligned      K % 64 == 0
//   smooth     [K]     packed as in the checkpoint (layout.pack_vector)
//   proj_down  [K, R]  packed as in the checkpoint (layout.pack_down)    R % 16 == 0, R <= 16 * RANK_TILES
//   qact       [M/64][K/64][4 m16][32 lanes] 16 bytes: A fragments of m16n8k64 (ptx.cuh), M rounded up to 64
//   ascales    [M/64][K/64][32 lanes][2 m32] words of four e4m3: lane 4g+t has row g + 8t of each m32, where mma_nvfp4 looks
//              for it with A_PAIR 0 and 1
//   low        [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, 16 bit
//
// One CTA owns 16 rows, its 8 warps take turns at 64 columns. Lane 4g+t holds, of rows g and g+8, columns
// 16c + {2t, 2t+1, 8+2t, 9+2t}, c = 0..3, because then
//   - each c is an A fragment of m16n8k16, and proj_down and smooth are stored in just this order
//   - each c is a group, whose maximum is one of four lanes
//   - two neighbouring codes are one byte, and a 4 x 4 transpose of bytes among the four lanes of a row makes the word
//     of eight consecutive columns that m16n8k64 wants: 2 shuffles for 4 bytes instead of moving the 16-bit values.
//
// I1  Rows past M read as zero: codes 0, scales 0, low 0. Nothing of them can reach a stored row.
// I2  Maxima are taken on the bits of |z|, where NaN > Inf > numbers: a NaN makes its group's scale NaN, its codes 0 and so
//     the whole token NaN, as in a 16-bit layer. fmaxf would drop it. Inf saturates, as in reference.py.
// I3  Codes of a group of zeros are 0 and not -0, whatever the signs in it.
// I4  Each warp keeps its share of `low` in registers; shares are added in warp order, so two runs agree bit for bit.
// Spec reference.py quant_down    Test tests/kernels/families/test_nvfp4_sm120.py
// Source arXiv 2411.05007, checkpoint-format 6.3
#include "nvfp4_codes.cuh"

namespace quant_nvfp4 {

template <Half T, int RANK_TILES>
PX void run(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, u32* ascales, u32* low, int M, int K,
            int R, int ldx) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int steps = K / 64, rank_tiles = R / 16, row = blockIdx.x * 16 + g;
    const u16* x_row[2] = {x + (u64)row * ldx, x + (u64)(row + 8) * ldx};
    const bool inside[2] = {row < M, row + 8 < M};

    float share[2 * RANK_TILES][4];
    clear<RANK_TILES>(share);

    for (int step = warp; step < steps; step += WARPS) {
        u32 pairs[2][8];                    // [row][2c + half of the 16 columns]: columns 16c + 8half + 2t, +1
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int h = i / 8, column = step * 64 + i % 8 * 8 + 2 * t;
            pairs[h][i % 8] = inside[h] ? *(const u32*)(x_row[h] + column) : 0u;
        }
        multiply_down<T, RANK_TILES>(share, pairs, proj_down, step, rank_tiles);
        quantise<T>(pairs, smooth, qact, ascales, blockIdx.x, step, steps);
    }

#pragma unroll
    for (int r = 0; r < RANK_TILES; r++)
        if (r < rank_tiles)
            store_low<T>(share[2 * r], share[2 * r + 1], low, r, rank_tiles);
}

}  // namespace quant_nvfp4

#define QUANT_NVFP4(NAME, T, RANK_TILES)                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * quant_nvfp4::WARPS)                                                  \
    NAME(const u16* x, const u16* smooth, const words4* proj_down, words4* qact, u32* ascales, u32* low,                  \
         int M, int K, int R, int ldx) {                                                                                  \
        quant_nvfp4::run<T, RANK_TILES>(x, smooth, proj_down, qact, ascales, low, M, K, R, ldx);                          \
    }

// Grid: M rounded up to 64, divided by 16. Block: 256. The name says dtype and the largest rank.
QUANT_NVFP4(quant_nvfp4_bf16_r32, BF16, 2)
QUANT_NVFP4(quant_nvfp4_bf16_r128, BF16, 8)
QUANT_NVFP4(quant_nvfp4_fp16_r32, FP16, 2)
QUANT_NVFP4(quant_nvfp4_fp16_r128, FP16, 8)
