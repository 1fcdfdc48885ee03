// fp8_codes: codes, scales and the order of `low` of quant_fp8.cuh, which says what they are, for it and adaln_fp8.cuh
//
// A lane's 16 columns of a row's group lie in eight words, columns 16t + 2i, 16t + 2i + 1 in word i.
#pragma once
#include "quantiser.cuh"

namespace quant_fp8 {

using namespace quantiser;

enum Mode { TOKEN, GROUP };

[[maybe_unused]] constexpr int DEPTH = 128;
[[maybe_unused]] constexpr float SHIFT = 0.171875f;

template <Half T> PX float round16(float value) { return px::low_half<T>(px::pack_half<T>(value, 0.0f)); }

template <Half T, Mode MODE, bool UNSIGNED> PX float smoothed(float x, float inverse) {
    if (MODE == TOKEN)
        return (UNSIGNED ? x + SHIFT : x) * inverse;
    return round16<T>((UNSIGNED ? round16<T>(x + SHIFT) : x) * inverse);
}

// Half to even for |value| < 2^22.
PX float rounded(float value) { return (value + 12582912.0f) - 12582912.0f; }

// A scale from the bits of the largest |z|. `inverse` turns z into a code; `live` masks codes whose scale is no number.
struct Scale {
    float value, inverse;
    u32 live;
};

PX Scale scale_of(u32 bits, float per_top) {
    const float value = px::as_float(bits) * per_top;
    const bool number = bits && bits < 0x7f800000u;
    return {value, number ? 1.0f / value : 0.0f, number ? 0xffffffffu : 0u};
}

template <Mode MODE, bool UNSIGNED> PX u32 codes(const float* z, const Scale& scale) {
    float q[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        q[i] = z[i] * scale.inverse;
        if (MODE == GROUP)                                      // a NaN becomes a bound here, and its codes are masked
            q[i] = rounded(max(UNSIGNED ? 0.0f : -8.0f, min(UNSIGNED ? 15.0f : 7.0f, q[i])));
    }
    return (px::pack_e4m3(q[0], q[1]) | px::pack_e4m3(q[2], q[3]) << 16) & scale.live;
}

// A row's 16 columns of a group -> z.
template <Half T, Mode MODE, bool UNSIGNED>
PX void smooth(float (&z)[16], const u32 (&pairs)[8], const float* inverse, int group) {
    const words4* from = (const words4*)(inverse + group * 64 + threadIdx.x % 4 * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const words4 by = from[i];
        z[4 * i] = smoothed<T, MODE, UNSIGNED>(px::low_half<T>(pairs[2 * i]), px::as_float(by.x));
        z[4 * i + 1] = smoothed<T, MODE, UNSIGNED>(px::high_half<T>(pairs[2 * i]), px::as_float(by.y));
        z[4 * i + 2] = smoothed<T, MODE, UNSIGNED>(px::low_half<T>(pairs[2 * i + 1]), px::as_float(by.z));
        z[4 * i + 3] = smoothed<T, MODE, UNSIGNED>(px::high_half<T>(pairs[2 * i + 1]), px::as_float(by.w));
    }
}

PX u32 largest(const float (&z)[16]) {
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 16; i++)
        bits = larger(bits, px::as_bits(z[i]) & 0x7fffffffu);
    return bits;
}

// The codes of row g + 8h.
template <Mode MODE, bool UNSIGNED>
PX void store(const float (&z)[16], const Scale& scale, u8* qact, int groups, int group, int h) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int chunk = (group % 2 * 4 + t) ^ g;
    words4* to = (words4*)(qact + ((u64)blockIdx.x * (groups / 2) + group / 2) * (16 * DEPTH) + (g + 8 * h) * DEPTH);
    to[chunk] = words4{codes<MODE, UNSIGNED>(z, scale), codes<MODE, UNSIGNED>(z + 4, scale),
                       codes<MODE, UNSIGNED>(z + 8, scale), codes<MODE, UNSIGNED>(z + 12, scale)};
}

// GROUP: codes and scale of a group of row g + 8h, whose largest |z| of this lane is `bits`.
template <Half T, bool UNSIGNED>
PX void store_group(const float (&z)[16], u32 bits, u8* qact, float* ascales, int groups, int group, int h) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Scale scale = scale_of(max_of_row(bits), UNSIGNED ? 1.0f / 15.0f : 1.0f / 7.0f);
    if (t == 0)
        ascales[(((u64)blockIdx.x * groups + group) * 4 + g / 2) * 4 + 2 * h + g % 2] = round16<T>(scale.value);
    store<GROUP, UNSIGNED>(z, scale, qact, groups, group, h);
}

// TOKEN: the scale of row g + 8h, whose largest |z| is `bits`.
PX Scale store_scale(u32 bits, float* ascales, int h) {
    const int g = threadIdx.x % 32 / 4;
    const Scale scale = scale_of(bits, 1.0f / 448.0f);
    if (threadIdx.x / 32 == 0 && threadIdx.x % 4 == 0)
        ascales[((u64)blockIdx.x * 4 + g / 2) * 4 + 2 * h + g % 2] = scale.value;
    return scale;
}

// The order of `low`. A thread's two sums are of lane threadIdx.x / 4: rank half n8, row g + 8h, ranks 2t, 2t+1 of n8.
struct CoreMatrices {
    static PX u64 place(int r, int rank_tiles) {
        const int of = threadIdx.x / 4, n8 = threadIdx.x % 4 / 2, h = threadIdx.x % 2;
        const u64 place = ((u64)(blockIdx.x * 2 + h) * 2 * rank_tiles + 2 * r + n8) * 8 + of / 4;
        return place * 4 + of % 4;
    }
};

}  // namespace quant_fp8
