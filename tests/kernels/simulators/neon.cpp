// The bodies of cpu.cpp beside each other on random numbers, in one program for a CPU that only an emulator has. Prints the
// largest relative difference of each function; exit code 1 if one is above the rounding of fp32.

#include <cstdio>
#include <random>

#include "cpu.cpp"

static std::mt19937 random_bits(7);

static float uniform() { return float(random_bits()) / 4294967296.0f + 0.5f; }

template <class Number>
static std::vector<Number> bytes(size_t count) {
    std::vector<Number> result(count);
    for (auto& one : result) one = Number(random_bits());
    return result;
}

static std::vector<uint16_t> halves(size_t count) {
    std::vector<uint16_t> result(count);
    for (auto& one : result) one = float_to_bf16(uniform());
    return result;
}

static bool failed = false;

static void compare(const char* what, const std::vector<float>& a, const std::vector<float>& b) {
    double most = 0, size = 0;
    for (size_t i = 0; i < a.size(); i++) {
        most = std::max(most, double(std::fabs(a[i] - b[i])));
        size = std::max(size, double(std::fabs(a[i])));
    }
    std::printf("%s %.1e\n", what, most / size);
    failed = failed || !(most <= 2e-6 * size) || size == 0;
}

int main() {
    std::printf("bodies");
    for (int i = 0; svdq_body(i); i++)
        if (svdq_runs(i)) std::printf(" %s", svdq_body(i));
    std::printf("\n");
    const int64_t tokens = 71, n = 256, k = 1152, rank = 48, groups = k / 64;
    std::vector<float> x(tokens * k);
    for (auto& one : x) one = uniform() - 1;
    const auto smooth = halves(k), down = halves(k * rank), up = halves(n * rank), wscales = halves(groups * n);
    const auto qweight = bytes<uint8_t>(n * k / 2);
    std::vector<float> outs[2], lows[2], numbers[2], few[2];
    std::vector<int8_t> codes[2];
    for (int body = 0; body < 2; body++) {
        std::vector<float> scales(tokens * groups);
        std::vector<int32_t> sums(tokens * groups);
        codes[body].resize(tokens * k);
        lows[body].resize(tokens * rank);
        outs[body].resize(tokens * n);
        numbers[body].resize(n * k);
        few[body].resize(5 * n);
        const Quantise quantise{2, tokens, k, rank, FP32, x.data(), k, BF16, smooth.data(), down.data(), 1, codes[body].data(),
                                scales.data(), sums.data(), lows[body].data()};
        svdq_quantise(body, &quantise);
        const Product product{2, tokens, n, k, rank, codes[body].data(), scales.data(), sums.data(), lows[body].data(),
                              qweight.data(), BF16, wscales.data(), up.data(), FP32, nullptr, outs[body].data(), n, 0};
        svdq_product(body, &product);
        const Dequantise weight{2, n, k, 0, n, INT4, qweight.data(), BF16, wscales.data(), nullptr, nullptr, 1.0, FP32,
                                numbers[body].data()};
        svdq_dequantise(body, &weight);
        const Gemv gemv{weight, 5, x.data(), few[body].data()};
        svdq_gemv(body, &gemv);
    }
    failed = codes[0] != codes[1];
    std::printf("codes %s\n", failed ? "differ" : "equal");
    compare("low", lows[0], lows[1]);
    compare("product", outs[0], outs[1]);
    compare("numbers", numbers[0], numbers[1]);
    compare("few rows", few[0], few[1]);
    return failed;
}
