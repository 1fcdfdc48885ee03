// Kinds of numbers, one at a time, and the jobs that Python describes.

enum Kind : int64_t { FP32, BF16, FP16 };                   // variants/cpu.py: KINDS
enum Precision : int64_t { INT4, NVFP4, AWQ };              // variants/cpu.py: PRECISIONS

static const float SHIFT = 0.171875f;                       // reference.SHIFT
static const float LARGEST_FP16 = 65504.0f;

static inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float fp16_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float value = float(mantissa) * 5.9604645e-8f;    // 2^-24
    return sign ? -value : value;
}

static inline float e4m3_to_float(uint8_t byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    if ((byte & 127) == 127) return NAN;
    const float value = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return byte & 128 ? -value : value;
}

// Rounded half to even; beyond the largest number to the largest, as kernels store fp16.
static inline uint16_t float_to_fp16(float value) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000;
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(sign | 0x7e00);
    const float size = std::min(std::fabs(value), LARGEST_FP16);
    if (size < 6.103515625e-5f)                             // 2^-14: a subnormal, in steps of 2^-24
        return uint16_t(sign | uint32_t(std::nearbyint(size * 16777216.0f)));
    const uint32_t normal = as_bits(size) - (112u << 23);
    return uint16_t(sign | (normal + 0xfff + (normal >> 13 & 1)) >> 13);
}

static inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float number(Kind kind, const void* numbers, int64_t i) {
    if (kind == FP32) return ((const float*)numbers)[i];
    const uint16_t half = ((const uint16_t*)numbers)[i];
    return kind == BF16 ? as_float(uint32_t(half) << 16) : fp16_to_float(half);
}

// The arguments of each job, as variants/cpu.py lays them out: 8 bytes each, in this order.

struct Quantise {
    int64_t threads, tokens, k, rank;
    Kind x_kind;
    const void* x;              // [tokens, k], rows `x_stride` numbers apart
    int64_t x_stride;
    Kind half;                  // of smooth and down
    const void* smooth;         // [k], packed
    const void* down;           // [k, rank], packed
    int64_t shifted;            // whether SHIFT is added to x
    int8_t* codes;              // [tokens, k], order.hpp
    float* scales;              // [tokens, k / 64]
    int32_t* sums;              // [tokens, k / 64]: -8 times the sum of a group's codes
    float* low;                 // [tokens, rank]
};

struct Product {
    int64_t threads, tokens, n, k, rank;
    const int8_t* codes;        // as of Quantise
    const float* scales;
    const int32_t* sums;
    const float* low;
    const uint8_t* qweight;     // packed INT4
    Kind half;                  // of wscales and up
    const void* wscales;        // packed
    const void* up;             // [n, rank], packed
    Kind kind;                  // of bias and out
    const void* bias;           // [n] or null
    void* out;                  // [tokens, n], rows `out_stride` numbers apart
    int64_t out_stride, accumulate;
};

struct Dequantise {
    int64_t threads, n, k, start, stop;     // rows start..stop, multiples of 16
    Precision precision;
    const uint8_t* qweight;
    Kind half;                  // of wscales (but those of NVFP4), wzeros and wcscales
    const void* wscales;
    const void* wzeros;         // AWQ
    const void* wcscales;       // [n], packed, or null
    double wtscale;
    Kind kind;                  // of out
    void* out;                  // [stop - start, k]
};

struct Gemv {
    Dequantise weight;          // kind and out unused
    int64_t tokens;             // 1..8
    const float* x;             // [tokens, k]
    float* out;                 // [tokens, n]: rows start..stop of it are written
};

struct Factor {
    int64_t threads, rows, rank;
    Kind half;
    const void* factor;         // [rows, rank], packed: k rows of proj_down, n of proj_up
    float* out;                 // of the 16 x 16 block at 16 * i, 16 * r: number j of its 16 contiguous ones is at
    int64_t row_step, rank_step, stride;        // i * row_step + r * rank_step + j * stride
};
