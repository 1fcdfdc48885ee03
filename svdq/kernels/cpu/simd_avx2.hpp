// Eight numbers at a time with AVX2, FMA and F16C. Each function is that of simd_generic.hpp.

struct F8 {
    __m256 v;
};

struct I8 {
    __m256i v;
};

static inline F8 all(float x) { return {_mm256_set1_ps(x)}; }
static inline F8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float* p, F8 a) { _mm256_storeu_ps(p, a.v); }
static inline F8 add(F8 a, F8 b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline F8 mul(F8 a, F8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline F8 div(F8 a, F8 b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline F8 fma(F8 a, F8 b, F8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline float sum(F8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline I8 zeros() { return {_mm256_setzero_si256()}; }
static inline int32_t sum(I8 a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static inline I8 largest(I8 most, F8 a) {
    const __m256i size = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff));
    return {_mm256_max_epi32(most.v, size)};
}
static inline float largest_of(I8 most) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most.v), _mm256_extracti128_si256(most.v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return as_float(uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)))));
}

static inline __m256i evens_first() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }

static inline void round_to_codes(F8 a, int8_t* codes, I8& total) {
    const __m256 ratio = _mm256_max_ps(_mm256_set1_ps(-127), _mm256_min_ps(_mm256_set1_ps(127), a.v));
    const __m256i n = _mm256_permutevar8x32_epi32(_mm256_cvtps_epi32(ratio), evens_first());
    total.v = _mm256_add_epi32(total.v, n);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64((__m128i*)codes, _mm_packs_epi16(words, words));
}

static inline __m256 from_bf16(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

static inline F8 load_as(Kind kind, const void* p, int64_t at) {
    if (kind == FP32) return load((const float*)p + at);
    const __m128i halves = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + at));
    return {kind == BF16 ? from_bf16(halves) : _mm256_cvtph_ps(halves)};
}

static inline void store_as(Kind kind, void* p, int64_t at, F8 a) {
    if (kind == FP32) {
        store((float*)p + at, a);
    } else if (kind == FP16) {                      // min and max give their second operand where one is NaN
        const __m256 most = _mm256_set1_ps(LARGEST_FP16), least = _mm256_set1_ps(-LARGEST_FP16);
        const __m128i halves = _mm256_cvtps_ph(_mm256_max_ps(least, _mm256_min_ps(most, a.v)), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i*)((uint16_t*)p + at), halves);
    } else {
        const __m256i bits = _mm256_castps_si256(a.v), low = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(low, _mm256_set1_epi32(1));
        __m256i half = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        half = _mm256_srli_epi32(half, 16);
        const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
        half = _mm256_blendv_epi8(half, _mm256_or_si256(low, _mm256_set1_epi32(64)), _mm256_castps_si256(nan));
        const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        _mm_storeu_si128((__m128i*)((uint16_t*)p + at), halves);
    }
}

static inline F8 int4_values(uint32_t word) {
    const __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(int(word)), _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28))};
}
static inline F8 e2m1_values(uint32_t word) {                       // code 8 is -0, which no sum tells from 0
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256 sizes = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6), codes);    // by bits 0..2
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28));
    return {_mm256_xor_ps(sizes, sign)};
}
static inline F8 awq_values(const uint8_t* words, int v) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)words));
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(wide, 4 * v), _mm256_set1_epi32(15)))};
}

static inline void load_panel(Kind kind, const void* p, int64_t at, float* out) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)((const uint16_t*)p + at));
    const __m256i plain = _mm256_permutevar8x32_epi32(pairs, evens_first());        // a pair of outputs stays a pair
    const __m128i low = _mm256_castsi256_si128(plain), high = _mm256_extracti128_si256(plain, 1);
    store(out, {kind == BF16 ? from_bf16(low) : _mm256_cvtph_ps(low)});
    store(out + 8, {kind == BF16 ? from_bf16(high) : _mm256_cvtph_ps(high)});
}

// Eight rows of eight words -> eight columns
static inline void transpose(const uint8_t* p, int64_t stride, __m256i (&column)[8]) {
    __m256i row[8], pair[8], four[8];
    for (int i = 0; i < 8; i++) row[i] = _mm256_loadu_si256((const __m256i*)(p + i * stride));
    for (int i = 0; i < 4; i++) {
        pair[2 * i] = _mm256_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        four[4 * i] = _mm256_unpacklo_epi64(pair[4 * i], pair[4 * i + 2]);
        four[4 * i + 1] = _mm256_unpackhi_epi64(pair[4 * i], pair[4 * i + 2]);
        four[4 * i + 2] = _mm256_unpacklo_epi64(pair[4 * i + 1], pair[4 * i + 3]);
        four[4 * i + 3] = _mm256_unpackhi_epi64(pair[4 * i + 1], pair[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        column[i] = _mm256_permute2x128_si256(four[i], four[4 + i], 0x20);
        column[4 + i] = _mm256_permute2x128_si256(four[i], four[4 + i], 0x31);
    }
}

static inline void unpack_block(const uint8_t* block, uint8_t* out) {
    const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    for (int half = 0; half < 2; half++) {                          // words kq = 2*half and 2*half + 1 of every nr
        __m256i column[8];                                          // kq, nb, kb: the eight outputs of nb in its lanes
        transpose(block + half * 32, 64, column);
        for (int i = 0; i < 8; i++) {
            const int step = i % 2 * 4 + half * 2 + i / 4, nb = i / 2 % 2;
            uint8_t* to = out + step * 128 + nb * 32;
            const __m256i low = _mm256_and_si256(column[i], nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(column[i], 4), nibble);
            _mm256_store_si256((__m256i*)to, _mm256_xor_si256(low, eight));
            _mm256_store_si256((__m256i*)(to + 64), _mm256_xor_si256(high, eight));
        }
    }
}

static inline __m256 from_fp16(__m256i words) {
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

static inline void unpack_factor(Kind kind, const void* p, int64_t at, float* out, int64_t stride) {
    const uint8_t* block = (const uint8_t*)((const uint16_t*)p + at);
    for (int half = 0; half < 2; half++) {
        __m256i column[8];                                          // kq, nb, kb: pairs of the eight rows of nb
        transpose(block + half * 32, 64, column);
        for (int i = 0; i < 8; i++) {
            float* to = out + (i % 2 * 8 + half * 4 + i / 4 * 2) * stride + i / 2 % 2 * 8;
            __m256 even, odd;
            if (kind == BF16) {
                even = _mm256_castsi256_ps(_mm256_slli_epi32(column[i], 16));
                odd = _mm256_castsi256_ps(_mm256_and_si256(column[i], _mm256_set1_epi32(int(0xffff0000))));
            } else {
                even = from_fp16(_mm256_and_si256(column[i], _mm256_set1_epi32(0xffff)));
                odd = from_fp16(_mm256_srli_epi32(column[i], 16));
            }
            store(to, {even});
            store(to + stride, {odd});
        }
    }
}

// acc [T][16] += scales[t] * wscales[output] * total, what a tile ends a group with. Scales of tokens are `groups` apart.
template <int T>
static inline void add_scaled(const __m256i (&total)[T][2], const float* wscales, const float* scales, int64_t groups,
                              float* acc) {
    const __m256 s0 = _mm256_loadu_ps(wscales), s1 = _mm256_loadu_ps(wscales + 8);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        const __m256 scale = _mm256_broadcast_ss(scales + t * groups);
        for (int half = 0; half < 2; half++) {
            float* const out = acc + t * PANEL + half * 8;
            const __m256 y = _mm256_cvtepi32_ps(total[t][half]);
            _mm256_store_ps(out, _mm256_fmadd_ps(y, _mm256_mul_ps(scale, half ? s1 : s0), _mm256_load_ps(out)));
        }
    }
}

// Few tokens: a block multiplied as it lies, two outputs (nr and nr + 8) to a line of 64 bytes, nothing unpacked to memory.
//
// I9  Sums take 4 products of 16 bits: 4 * 2 * 15 * 127 = 15240 < 32767. They are those of `tile`, and meet the same fma.

#define LINES 4                     // tokens at a time: w4a8.hpp

// A group's codes of one token in the order of a line, kq nb kb: even codes of kq 0 and 1, odd ones, and those of kq 2 and 3.
static inline void spread_codes(const int8_t* codes, __m256i (&spread)[4]) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)codes), second = _mm256_loadu_si256((const __m256i*)(codes + 32));
    const __m256i low = _mm256_unpacklo_epi32(first, second), high = _mm256_unpackhi_epi32(first, second);
    const __m256i a = _mm256_permute2x128_si256(low, high, 0x20), b = _mm256_permute2x128_si256(low, high, 0x31);
    spread[0] = _mm256_unpacklo_epi64(a, a);
    spread[1] = _mm256_unpackhi_epi64(a, a);
    spread[2] = _mm256_unpacklo_epi64(b, b);
    spread[3] = _mm256_unpackhi_epi64(b, b);
}

// Place of an output in accumulators of lines
static inline int line_of(int output) { return output % 8 * 2 + output / 8; }

// acc [T][16], outputs in the order of lines, tokens `acc_stride` apart.
template <int T>
static inline void multiply_lines(const uint8_t* block, Kind half, const void* wscales, int64_t at, const __m256i (*spread)[4],
                                  const float* scales, const int32_t* sums, int64_t groups, float* acc, int64_t acc_stride) {
    const __m256i nibble = _mm256_set1_epi8(15), eights = _mm256_set1_epi8(int8_t(0x88)), ones = _mm256_set1_epi16(1);
    __m256i line[T][8];
    for (int nr = 0; nr < 8; nr++) {
        const __m256i x = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(block + nr * 64)), eights);
        const __m256i y = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(block + nr * 64 + 32)), eights);
        const __m256i low0 = _mm256_and_si256(x, nibble), high0 = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
        const __m256i low1 = _mm256_and_si256(y, nibble), high1 = _mm256_and_si256(_mm256_srli_epi16(y, 4), nibble);
        for (int t = 0; t < T; t++) {
            const __m256i p0 = _mm256_maddubs_epi16(low0, spread[t][0]), p1 = _mm256_maddubs_epi16(high0, spread[t][1]);
            const __m256i p2 = _mm256_maddubs_epi16(low1, spread[t][2]), p3 = _mm256_maddubs_epi16(high1, spread[t][3]);
            line[t][nr] = _mm256_madd_epi16(_mm256_add_epi16(_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3)), ones);
        }
    }
    for (int i = 0; i < 2; i++) {                                   // outputs nr = 4 * i .. + 3
        const __m256 plain = load_as(half, wscales, at + i * 8).v;  // nr / 2, nb, nr % 2
        const __m256 wscale = _mm256_shuffle_ps(plain, plain, 0xd8);
        for (int t = 0; t < T; t++) {
            const __m256i a = _mm256_hadd_epi32(line[t][4 * i], line[t][4 * i + 1]);
            const __m256i b = _mm256_hadd_epi32(line[t][4 * i + 2], line[t][4 * i + 3]);
            __m256i total = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
            total = _mm256_add_epi32(total, _mm256_set1_epi32(sums[t * groups]));
            float* const out = acc + t * acc_stride + i * 8;
            const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(scales[t * groups]), wscale);
            _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, _mm256_loadu_ps(out)));
        }
    }
}
