// nvfp4_codes: codes and scales of quant_nvfp4.cuh, which says what they are, for it and adaln_nvfp4.cuh
#pragma once
#include "quantiser.cuh"

namespace quant_nvfp4 {

using namespace quantiser;

template <Half T> PX float smoothed(float x, float smooth) {
    return px::low_half<T>(px::pack_half<T>(px::divide(x, smooth), 0.0f));
}

// Codes and scales of 64 columns of rows 16 `tile16` to 16 `tile16` + 15, whose words lie in `pairs` as multiply_down has them:
// two groups of a row at a time, a word of codes.
template <Half T>
PX void quantise(const u32 (&pairs)[2][8], const u16* smooth, words4* qact, u32* ascales, u32 tile16, int step, int steps) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, m16 = tile16 % 4;
    u32 words[2][2], scales[2] = {0u, 0u};
#pragma unroll
    for (int set = 0; set < 2; set++) {
        words2 divisors[2];
#pragma unroll
        for (int c = 0; c < 2; c++)
            divisors[c] = *(const words2*)(smooth + step * 64 + set * 32 + c * 16 + t * 4);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float z[8], scale[2];
            u32 live = 0;
#pragma unroll
            for (int c = 0; c < 2; c++) {
                u32 peak = 0;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 pair = pairs[h][4 * set + 2 * c + half], divisor = half ? divisors[c].y : divisors[c].x;
                    float* to = z + 4 * c + 2 * half;
                    to[0] = smoothed<T>(px::low_half<T>(pair), px::low_half<T>(divisor));
                    to[1] = smoothed<T>(px::high_half<T>(pair), px::high_half<T>(divisor));
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const u32 bits = px::as_bits(to[i]) & 0x7fffffffu;
                        peak = bits > peak ? bits : peak;
                    }
                }
                peak = max_of_row(peak);
                scale[c] = px::as_float(peak) * (1.0f / 6.0f);
                scale[c] = scale[c] > 448.0f ? 448.0f : scale[c];           // NaN stays
                float inverse = px::reciprocal(scale[c]);
                inverse = inverse < 3.4e38f ? inverse : 3.4e38f;            // NaN too, where the scale is stored as 0
#pragma unroll
                for (int i = 0; i < 4; i++)
                    z[4 * c + i] *= inverse;
                const bool counts = peak - 1u < 0x7f800000u;                // neither zero nor NaN
                live |= counts ? 0xffffu << 16 * c : 0u;
            }
            words[h][set] = transpose_bytes(px::pack_e2m1(z) & live, t);
            scales[h] |= px::pack_e4m3(scale[0], scale[1]) << 16 * set;
        }
    }
    const u64 tile = (u64)(tile16 / 4) * steps + step;
    qact[(tile * 4 + m16) * 32 + lane] = words4{words[0][0], words[1][0], words[0][1], words[1][1]};
    if (t < 2)
        ascales[tile * 64 + (4 * g + m16 % 2 * 2 + t) * 2 + m16 / 2] = t ? scales[1] : scales[0];
}

}  // namespace quant_nvfp4
