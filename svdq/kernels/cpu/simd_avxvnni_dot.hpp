// The tile of w4a8.hpp with AVX-VNNI: vpdpbusd multiplies four bytes and adds them to 32 bits, which never overflow.

static const int TOKENS = 4;

template <int T>
static inline void tile(const uint8_t* panel, const float* wscales, const int8_t* codes, int64_t k, const float* scales,
                        const int32_t* sums, int64_t groups, int64_t count, float* acc) {
    for (int64_t g = 0; g < count; g++, codes += GROUP, wscales += PANEL) {
        __m256i total[T][2];
        for (int t = 0; t < T; t++) total[t][0] = total[t][1] = _mm256_set1_epi32(sums[t * groups + g]);
#pragma GCC unroll 16
        for (int q = 0; q < 16; q++) {
            const __m256i w0 = _mm256_load_si256((const __m256i*)panel);
            const __m256i w1 = _mm256_load_si256((const __m256i*)(panel + 32));
            panel += 64;
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                int32_t four;
                std::memcpy(&four, codes + t * k + q * 4, 4);
                const __m256i a = _mm256_set1_epi32(four);
                total[t][0] = _mm256_dpbusd_avx_epi32(total[t][0], w0, a);
                total[t][1] = _mm256_dpbusd_avx_epi32(total[t][1], w1, a);
            }
        }
        add_scaled<T>(total, wscales, scales + g, groups, acc);
    }
}
