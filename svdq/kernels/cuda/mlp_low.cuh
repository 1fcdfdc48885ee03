// mlp_low: the shares of a low-rank down projection that several CTAs have made, added up and rounded
//
//   low[m,r] = round16(sum_i shares[i][m,r])
//
//   shares  [count][M/16][R/16][2][32 lanes] 16 bytes fp32: C fragments of m16n8k16, the two of 16 ranks
//   low     [M/16][R/16][32 lanes] 16 bytes: A fragments of m16n8k16, 16 bit
//
// A thread adds 16 rows x 16 ranks' words of one lane: what a lane has of both C fragments is what it has of the A fragment.
//
// I1  Shares are added in order, so two runs agree bit for bit.
// I2  fp16 ends at 65504 instead of Inf: what is packed is clamped before.
// Spec reference.py quant_down    Test tests/kernels/families/test_mlp.py    Source design of our own
#include "ptx.cuh"

namespace mlp_low {

template <Half T> PX void run(const words4* shares, words4* low, int count, int tiles) {
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

}  // namespace mlp_low

#define MLP_LOW(NAME, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) NAME(const words4* shares, words4* low, int count, int tiles) {     \
        mlp_low::run<T>(shares, low, count, tiles);                                                                       \
    }

// Grid: tiles / 4 rounded up, tiles being those of 16 rows x 16 ranks. Block: 128.
MLP_LOW(mlp_low_bf16, BF16)
MLP_LOW(mlp_low_fp16, FP16)
