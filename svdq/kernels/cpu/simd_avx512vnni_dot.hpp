// The tile of w4a8.hpp with AVX-512 VNNI: as with AVX-VNNI, a panel's 16 outputs in one register.

static const int TOKENS = 8;

template <int T>
static inline void tile(const uint8_t* panel, const float* wscales, const int8_t* codes, int64_t k, const float* scales,
                        const int32_t* sums, int64_t groups, int64_t count, float* acc) {
    for (int64_t g = 0; g < count; g++, codes += GROUP, wscales += PANEL) {
        __m512i total[T];
        for (int t = 0; t < T; t++) total[t] = _mm512_set1_epi32(sums[t * groups + g]);
#pragma GCC unroll 16
        for (int q = 0; q < 16; q++, panel += 64) {
            const __m512i w = _mm512_load_si512(panel);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                int32_t four;
                std::memcpy(&four, codes + t * k + q * 4, 4);
                total[t] = _mm512_dpbusd_epi32(total[t], w, _mm512_set1_epi32(four));
            }
        }
        const __m512 s = _mm512_loadu_ps(wscales);
        for (int t = 0; t < T; t++) {
            float* out = acc + t * PANEL;
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[t * groups + g]), s);
            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[t]), scale, _mm512_load_ps(out)));
        }
    }
}
