// The tile of w4a8.hpp in plain C++.

static const int TOKENS = 4;

// acc [T][16] += scales[t, g] * wscales[g, output] * (sums[t, g] + codes x panel), group by group.
template <int T>
static inline void tile(const uint8_t* panel, const float* wscales, const int8_t* codes, int64_t k, const float* scales,
                        const int32_t* sums, int64_t groups, int64_t count, float* acc) {
    for (int64_t g = 0; g < count; g++, panel += 1024, wscales += PANEL) {
        for (int t = 0; t < T; t++) {
            const int8_t* a = codes + t * k + g * GROUP;
            for (int output = 0; output < PANEL; output++) {
                int32_t total = sums[t * groups + g];
                for (int i = 0; i < GROUP; i++) total += panel[i / 4 * 64 + output * 4 + i % 4] * a[i];
                acc[t * PANEL + output] += float(total) * (scales[t * groups + g] * wscales[output]);
            }
        }
    }
}
