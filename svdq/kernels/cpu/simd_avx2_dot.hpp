// The tile of w4a8.hpp with AVX2: vpmaddubsw multiplies bytes and adds pairs, in 16 bits.
//
// I4  A 16-bit sum takes 8 of them, 32 inputs: 8 * 2 * 15 * 127 = 30480 < 32767. Sixteen would overflow.
// I5  Eight 16-bit sums (4 tokens x 2 halves of the panel), two of weights, one of activations: no register is spilled inside.

static const int TOKENS = 4;

// Keeps the compiler from adding products up as a tree, which holds all of them at once and spills them.
#if defined(__GNUC__)
#define IN_ORDER(a, b) __asm__("" : "+x"(a), "+x"(b))
#else
#define IN_ORDER(a, b)
#endif

template <int T>
static inline void tile(const uint8_t* panel, const float* wscales, const int8_t* codes, int64_t k, const float* scales,
                        const int32_t* sums, int64_t groups, int64_t count, float* acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t g = 0; g < count; g++) {
        __m256i total[T][2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256i part[T][2];
#pragma GCC unroll 8
            for (int q = 0; q < 8; q++) {
                const __m256i w0 = _mm256_load_si256((const __m256i*)panel);
                const __m256i w1 = _mm256_load_si256((const __m256i*)(panel + 32));
                panel += 64;
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    int32_t four;
                    std::memcpy(&four, codes + t * k + q * 4, 4);
                    const __m256i a = _mm256_set1_epi32(four);
                    const __m256i p0 = _mm256_maddubs_epi16(w0, a), p1 = _mm256_maddubs_epi16(w1, a);
                    part[t][0] = q ? _mm256_add_epi16(part[t][0], p0) : p0;
                    part[t][1] = q ? _mm256_add_epi16(part[t][1], p1) : p1;
                    IN_ORDER(part[t][0], part[t][1]);
                }
            }
            codes += 32;
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m256i first = half ? total[t][0] : _mm256_set1_epi32(sums[t * groups + g]);
                const __m256i second = half ? total[t][1] : first;
                total[t][0] = _mm256_add_epi32(first, _mm256_madd_epi16(part[t][0], ones));
                total[t][1] = _mm256_add_epi32(second, _mm256_madd_epi16(part[t][1], ones));
            }
        }
        add_scaled<T>(total, wscales, scales + g, groups, acc);
        wscales += PANEL;
    }
}
