// 4-bit linears on a CPU: the door of the library, one plain C function per job, and which body serves it.
//
//     quantise   x -> int8 codes, scales, x @ proj_down       w4a8.hpp
//     product    those and an INT4 weight -> out               w4a8.hpp
//     dequantise rows of a weight -> numbers                   exact.hpp
//     gemv       few rows of x, exact                          exact.hpp
//     factor     a low-rank factor -> numbers in plain order   exact.hpp
//
// All read the order of the file (layout.py; order.hpp says where what lies), so nothing is repacked at loading.
//
// A body is one set of instructions, in a namespace of its own: simd_*.hpp has what differs, w4a8.hpp and exact.hpp are
// compiled into each. `body` is its number in BODIES. Callers pass one that `svdq_runs` says this CPU has.
//
// I1  Every element of a result is computed by one thread, in an order that neither the number of threads nor the other rows
//     change: the same bits for any number of threads.
// I2  Nothing is kept between calls but each thread's scratch memory.
// I3  Nothing is checked here: variants/cpu.py checks shapes, dtypes, strides and null pointers before it calls.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#define X86 1
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__GNUC__)
#define ARM 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#include "numbers.hpp"
#include "order.hpp"
#include "threads.hpp"

#if defined(__clang__)
#define TARGET(names) _Pragma(STRING(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define TARGET(names) _Pragma("GCC push_options") _Pragma(STRING(GCC target(names)))
#define TARGET_END _Pragma("GCC pop_options")
#else
#define TARGET(names)               // MSVC compiles every intrinsic anywhere
#define TARGET_END
#endif
#define STRING(...) #__VA_ARGS__
#if defined(_MSC_VER)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

namespace generic {
#include "simd_generic.hpp"
#include "simd_generic_dot.hpp"
#include "w4a8.hpp"
#include "exact.hpp"
}

#ifdef X86
TARGET("avx2,fma,f16c")
namespace avx2 {
#include "simd_avx2.hpp"
#include "simd_avx2_dot.hpp"
#include "w4a8.hpp"
#include "exact.hpp"
}
TARGET_END

#if defined(__clang__) && __clang_major__ >= 13 || !defined(__clang__) && __GNUC__ >= 11      // earlier: no such name
#define AVXVNNI 1
TARGET("avx2,fma,f16c,avxvnni")
namespace avxvnni {
#include "simd_avx2.hpp"
#include "simd_avxvnni_dot.hpp"
#include "w4a8.hpp"
#include "exact.hpp"
}
TARGET_END
#endif

TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
namespace avx512vnni {
#include "simd_avx2.hpp"
#include "simd_avx512vnni_dot.hpp"
#include "w4a8.hpp"
#include "exact.hpp"
}
TARGET_END
#endif

#ifdef ARM
#if defined(__clang__)
TARGET("dotprod")
#else
TARGET("arch=armv8.2-a+dotprod")
#endif
namespace neon {
#include "simd_generic.hpp"
#include "simd_neon_dot.hpp"
#include "w4a8.hpp"
#include "exact.hpp"
}
TARGET_END
#endif

struct Body {
    const char* name;
    bool (*runs)();             // on this CPU
    void (*quantise)(const Quantise&);
    void (*product)(const Product&);
    void (*dequantise)(const Dequantise&);
    void (*gemv)(const Gemv&);
    void (*factor)(const Factor&);
};

#define BODY(name) {#name, has_##name, name::quantise, name::product, name::dequantise, name::gemv, name::factor}

static bool has_generic() { return true; }
#if defined(X86) && (defined(__clang__) || defined(__GNUC__) && !defined(_WIN32))   // GCC's stack on Windows: PR54412
static uint32_t cpuid(uint32_t leaf, uint32_t part, int which) {     // for features that compilers know by no name yet
    uint32_t result[4];
    __asm__("cpuid" : "=a"(result[0]), "=b"(result[1]), "=c"(result[2]), "=d"(result[3]) : "a"(leaf), "c"(part));
    return result[which];
}
static bool has_avx2() {                                             // and F16C: ECX bit 29
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid(1, 0, 2) >> 29 & 1;
}
static bool has_avxvnni() {                                          // leaf 7.1, EAX bit 4
    return has_avx2() && cpuid(0, 0, 0) >= 7 && cpuid(7, 0, 0) >= 1 && cpuid(7, 1, 0) >> 4 & 1;
}
static bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#elif defined(X86)
static bool has_avx2() { return false; }            // nobody has tried it
static bool has_avxvnni() { return false; }
static bool has_avx512vnni() { return false; }
#endif
#if defined(ARM) && defined(__linux__)
static bool has_neon() { return getauxval(AT_HWCAP) >> 20 & 1; }       // HWCAP_ASIMDDP
#elif defined(ARM)
static bool has_neon() { return true; }             // every Mac
#endif

static const Body BODIES[] = {
    BODY(generic),
#ifdef X86
    BODY(avx2),
#ifdef AVXVNNI
    BODY(avxvnni),
#endif
    BODY(avx512vnni),
#endif
#ifdef ARM
    BODY(neon),
#endif
};
static const int COUNT = sizeof BODIES / sizeof *BODIES;

// The name of a body, or null where there are no more. The last that runs is the fastest.
API const char* svdq_body(int body) { return body < COUNT ? BODIES[body].name : nullptr; }
API int svdq_runs(int body) { return body < COUNT && BODIES[body].runs(); }

// 0, or 1: no memory for scratch
template <class Job>
static int done(void (*run)(const Job&), const Job& job) {
    try {
        run(job);
        return 0;
    } catch (...) {
        return 1;
    }
}

API int svdq_quantise(int body, const Quantise* job) { return done(BODIES[body].quantise, *job); }
API int svdq_product(int body, const Product* job) { return done(BODIES[body].product, *job); }
API int svdq_dequantise(int body, const Dequantise* job) { return done(BODIES[body].dequantise, *job); }
API int svdq_gemv(int body, const Gemv* job) { return done(BODIES[body].gemv, *job); }
API int svdq_factor(int body, const Factor* job) { return done(BODIES[body].factor, *job); }
