// The tile of w4a8.hpp with NEON's dot product: sdot multiplies four signed bytes and adds them to 32 bits; codes + 8 are such.

static const int TOKENS = 4;

template <int T, int QUAD>
static inline void add_quad(const uint8_t* panel, const int8x16_t (&a)[T], int32x4_t (&total)[T][4]) {
    for (int i = 0; i < 4; i++) {
        const int8x16_t w = vld1q_s8((const int8_t*)panel + QUAD * 64 + i * 16);
        for (int t = 0; t < T; t++) total[t][i] = vdotq_laneq_s32(total[t][i], w, a[t], QUAD);
    }
}

template <int T>
static inline void tile(const uint8_t* panel, const float* wscales, const int8_t* codes, int64_t k, const float* scales,
                        const int32_t* sums, int64_t groups, int64_t count, float* acc) {
    for (int64_t g = 0; g < count; g++, wscales += PANEL) {
        int32x4_t total[T][4];
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 4; i++) total[t][i] = vdupq_n_s32(sums[t * groups + g]);
        for (int sixteen = 0; sixteen < 4; sixteen++, codes += 16, panel += 256) {
            int8x16_t a[T];
            for (int t = 0; t < T; t++) a[t] = vld1q_s8(codes + t * k);
            add_quad<T, 0>(panel, a, total);
            add_quad<T, 1>(panel, a, total);
            add_quad<T, 2>(panel, a, total);
            add_quad<T, 3>(panel, a, total);
        }
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < 4; i++) {
                float* const out = acc + t * PANEL + i * 4;
                const float32x4_t scale = vmulq_n_f32(vld1q_f32(wscales + i * 4), scales[t * groups + g]);
                vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vcvtq_f32_s32(total[t][i]), scale));
            }
        }
    }
}
