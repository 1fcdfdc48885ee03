// Eight numbers at a time in plain C++: what any CPU can do, and what the other bodies must equal.

#undef LINES            // no way of its own for few tokens: w4a8.hpp

struct F8 {
    float v[8];
};

struct I8 {
    int32_t v[8];
};

#define EACH for (int i = 0; i < 8; i++)

static inline F8 all(float x) { F8 r; EACH r.v[i] = x; return r; }
static inline F8 load(const float* p) { F8 r; EACH r.v[i] = p[i]; return r; }
static inline void store(float* p, F8 a) { EACH p[i] = a.v[i]; }
static inline F8 add(F8 a, F8 b) { EACH a.v[i] += b.v[i]; return a; }
static inline F8 mul(F8 a, F8 b) { EACH a.v[i] *= b.v[i]; return a; }
static inline F8 div(F8 a, F8 b) { EACH a.v[i] /= b.v[i]; return a; }
static inline F8 fma(F8 a, F8 b, F8 c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
static inline float sum(F8 a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

static inline I8 zeros() { return I8{}; }
static inline int32_t sum(I8 a) { int32_t s = 0; EACH s += a.v[i]; return s; }

// The larger of what `most` holds and |a|, as bits: a NaN is larger than any number, and stays.
static inline I8 largest(I8 most, F8 a) {
    EACH most.v[i] = std::max(most.v[i], int32_t(as_bits(a.v[i]) & 0x7fffffff));
    return most;
}
static inline float largest_of(I8 most) {
    int32_t bits = 0;
    EACH bits = std::max(bits, most.v[i]);
    return as_float(uint32_t(bits));
}

// The nearest integers in -127..127, half to even, as codes in CODE_ORDER; `total` grows by them. Beyond these are only ratios
// to a subnormal scale.
static inline void round_to_codes(F8 a, int8_t* codes, I8& total) {
    EACH {
        const float ratio = std::max(-127.0f, std::min(127.0f, a.v[CODE_ORDER[i]]));
        const int32_t code = int32_t(std::nearbyint(ratio));
        codes[i] = int8_t(code);
        total.v[i] += code;
    }
}

static inline F8 load_as(Kind kind, const void* p, int64_t at) { F8 r; EACH r.v[i] = number(kind, p, at + i); return r; }
static inline void store_as(Kind kind, void* p, int64_t at, F8 a) {
    if (kind == FP32) { store((float*)p + at, a); return; }
    uint16_t* out = (uint16_t*)p + at;
    EACH out[i] = kind == BF16 ? float_to_bf16(a.v[i]) : float_to_fp16(a.v[i]);
}

// Eight 4-bit codes as numbers: two's complement, E2M1, and nibble v of eight words of an AWQ weight.
static inline F8 int4_values(uint32_t word) { F8 r; EACH r.v[i] = float(int32_t(word << (28 - 4 * i)) >> 28); return r; }
static inline F8 e2m1_values(uint32_t word) {
    static const float VALUES[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6};
    F8 r;
    EACH r.v[i] = VALUES[word >> 4 * i & 15];
    return r;
}
static inline F8 awq_values(const uint8_t* words, int v) {
    F8 r;
    EACH r.v[i] = float((words[2 * i] | words[2 * i + 1] << 8) >> 4 * v & 15);
    return r;
}

// The 16 numbers of a panel in plain order, from the file's (pack_vector of layout.py).
static inline void load_panel(Kind kind, const void* p, int64_t at, float* out) {
    for (int i = 0; i < PANEL; i++) out[i] = number(kind, p, at + scale_of(i));
}

// A block of the file as codes + 8: per 4 inputs (two steps: 0 2 4 6 and 1 3 5 7 of 8) 16 outputs of 4 bytes.
static inline void unpack_block(const uint8_t* block, uint8_t* out) {
    for (int step = 0; step < 8; step++, out += 128) {
        for (int output = 0; output < PANEL; output++) {
            const uint8_t* word = block + 4 * word_of(output, step);
            for (int j = 0; j < 4; j++) {
                out[output * 4 + j] = (word[j] & 15) ^ 8;
                out[64 + output * 4 + j] = word[j] >> 4 ^ 8;
            }
        }
    }
}

// A block of a factor as [16 numbers of a row][16 rows].
static inline void unpack_factor(Kind kind, const void* p, int64_t at, float* out, int64_t stride) {
    for (int i = 0; i < 16; i++)
        for (int row = 0; row < 16; row++)
            out[i * stride + row] = number(kind, p, at + 2 * (row % 8 * 16 + i % 8 / 2 * 4 + row / 8 * 2 + i / 8) + i % 2);
}
