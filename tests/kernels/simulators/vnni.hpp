// The instructions of AVX-VNNI and AVX-512 that the CPU kernels use, in plain C++ under the names of their intrinsics: what Intel's
// intrinsics guide says of each, lane by lane. Compiled in front of cpu.cpp where the CPU has none of them.

#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

struct alignas(64) Words { int32_t at[16]; };
struct alignas(64) Floats { float at[16]; };

// vpdpbusd: each 32-bit lane grows by the products of its four bytes, unsigned times signed; nothing saturates.
template <class Register>
static inline Register emulated_dpbusd(Register sum, Register bytes, Register codes) {
    Register result = sum;
    uint8_t u[sizeof(Register)];
    int8_t s[sizeof(Register)];
    int32_t lanes[sizeof(Register) / 4];
    std::memcpy(u, &bytes, sizeof u);
    std::memcpy(s, &codes, sizeof s);
    std::memcpy(lanes, &sum, sizeof lanes);
    for (unsigned i = 0; i < sizeof u; i++) lanes[i / 4] += int32_t(u[i]) * s[i];
    std::memcpy(&result, lanes, sizeof lanes);
    return result;
}

struct Register256 { int64_t at[4]; };

static inline __attribute__((target("avx2"))) __m256i emulated_dpbusd256(__m256i sum, __m256i bytes, __m256i codes) {
    Register256 a, b, c;
    std::memcpy(&a, &sum, 32);
    std::memcpy(&b, &bytes, 32);
    std::memcpy(&c, &codes, 32);
    a = emulated_dpbusd(a, b, c);
    std::memcpy(&sum, &a, 32);
    return sum;
}

static inline Words emulated_set1_epi32(int32_t x) { Words r; for (auto& one : r.at) one = x; return r; }
static inline Floats emulated_set1_ps(float x) { Floats r; for (auto& one : r.at) one = x; return r; }
static inline Words emulated_load_si512(const void* p) { Words r; std::memcpy(&r, p, 64); return r; }
static inline Floats emulated_load_ps(const float* p) { Floats r; std::memcpy(&r, p, 64); return r; }
static inline void emulated_store_ps(float* p, Floats a) { std::memcpy(p, &a, 64); }
static inline Floats emulated_mul_ps(Floats a, Floats b) { for (int i = 0; i < 16; i++) a.at[i] *= b.at[i]; return a; }
static inline Floats emulated_cvtepi32_ps(Words a) { Floats r; for (int i = 0; i < 16; i++) r.at[i] = float(a.at[i]); return r; }
static inline Floats emulated_fmadd_ps(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 16; i++) c.at[i] = __builtin_fmaf(a.at[i], b.at[i], c.at[i]);
    return c;
}

#define __m512i Words
#define __m512 Floats
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd256
#define _mm512_dpbusd_epi32 emulated_dpbusd
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_load_si512 emulated_load_si512
#define _mm512_load_ps emulated_load_ps
#define _mm512_loadu_ps emulated_load_ps
#define _mm512_store_ps emulated_store_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
