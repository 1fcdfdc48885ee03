// int8_codes: z, scales and codes of quant_int8.cuh, which says what they are, for it and adaln_int8.cuh
#pragma once
#include "quantiser.cuh"

namespace quant_int8 {

using namespace quantiser;

// A pair of 16-bit x -> two z.
template <Half T> PX void smoothed(float* z, u32 x, u32 smooth, float shift) {
    z[0] = px::divide(px::low_half<T>(x) + shift, px::low_half<T>(smooth));
    z[1] = px::divide(px::high_half<T>(x) + shift, px::high_half<T>(smooth));
}

// Every other z from here, four of them, as the bytes of a word: bits of 1.5 * 2^23 + code, whose lowest byte the code is.
PX u32 codes(const float* z, float inverse) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        bits[i] = px::as_bits(px::multiply(z[2 * i], inverse) + 12582912.0f);
    return px::permute_bytes(px::permute_bytes(bits[0], bits[1], 0x0040), px::permute_bytes(bits[2], bits[3], 0x0040), 0x5410);
}

// The scale of row g + 8h, whose largest |z| is `bits`. 1 / it; 0 where that is none: codes are then 0.
PX float store_scale(u32 bits, float* ascales, int h) {
    const float scale = px::divide(px::as_float(bits), 127.0f);
    if (threadIdx.x / 32 == 0 && threadIdx.x % 4 == 0)
        ascales[(blockIdx.x * 8 + threadIdx.x % 32 / 4) * 2 + h] = scale;
    const float inverse = px::divide(1.0f, scale);
    return px::as_bits(inverse) - 1 < 0x7f7fffffu ? inverse : 0.0f;                     // 0 < inverse < Inf
}

// Where the codes of 32 columns of 16 rows begin.
PX u64 tile_of(int groups, int group, int half) {
    return (((u64)(blockIdx.x / 4) * groups + group) * 4 + blockIdx.x % 4) * 2 + half;
}

}  // namespace quant_int8
