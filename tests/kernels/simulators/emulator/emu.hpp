// emu: what a kernel file needs to be C++. build.py puts this before the file, emu.cpp runs the result.
//
// Kernels keep __global__ and __shared__ as plain words; build.py turns them into C++ after the preprocessor:
//   __shared__ T x[4];           a static of the function, of which one exists because CTAs run one after another
//   extern __shared__ T x[];     a pointer to emu::dynamic_shared(), which each CTA of a cluster has for itself
#pragma once
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __grid_constant__

struct words4;

struct Index { unsigned x, y, z; };
// const, for a thread never sees its own change, and the instrumentation leaves constants alone
extern const Index threadIdx, blockIdx, blockDim, gridDim;

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }

namespace emu {

// What all threads of a CTA or all lanes of a warp do together. The runtime takes the place from the return address,
// because the line ptx.cuh can pass is its own.
void barrier(int);
unsigned swap_lanes(unsigned x, int mask, int);
void mma_i4(bool a_unsigned, int (&d)[4], const words4& a, unsigned b0, unsigned b1);
void mma_half(bool bf16, float (&c)[4], const words4& a, unsigned b0, unsigned b1);
void mma_i8(int (&c)[4], const words4& a, unsigned b0, unsigned b1);

void copy16(void* to_shared, const void* from_global);
void copy_commit();
void copy_wait(int pending);

unsigned pack_half(bool bf16, float low, float high);
float from_fp16(unsigned short bits);
unsigned fma_fp16(unsigned a, unsigned b, unsigned c);
int round_even(float value);
inline float as_float(unsigned bits) { float value; __builtin_memcpy(&value, &bits, 4); return value; }
inline unsigned as_bits(float value) { unsigned bits; __builtin_memcpy(&bits, &value, 4); return bits; }

void* dynamic_shared();

// Hopper
void warp_barrier(int);
void barrier_of(int number, int count, int);
void mbarrier_init(void* at, int count);
void mbarrier_fence();
void mbarrier_arrive(void* at, unsigned bytes);
void mbarrier_arrive_at(void* at, unsigned rank);
void mbarrier_wait(void* at, unsigned parity);
void bulk_copy(void* to_shared, const void* from_global, unsigned bytes, void* mbarrier);
void bulk_copy_to(unsigned mask, void* to_shared, const void* from_global, unsigned bytes, void* mbarrier);
unsigned cluster_rank();
void cluster_barrier(int);
unsigned shared_address(const void* pointer);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(float* d);
void wgmma_e4m3(bool add, float* d, const words4& a, unsigned long long b);
void wgmma_half(bool bf16, float* d, const words4& a, unsigned long long b);
void store_transposed(void* to_shared, const words4& matrices);
unsigned pack_e4m3(float low, float high);
extern unsigned char memory[];

// Blackwell
void mma_nvfp4(float (&c)[4], const words4& a, unsigned b0, unsigned b1, unsigned a_scales, unsigned b_scales, int a_pair,
               int b_lane);
unsigned pack_e2m1(const float (&x)[8]);

// Per argument a letter and its size: p pointer, r pointer to const, s struct, else as in Python's struct.
template <class T> struct Letter { static constexpr char is = 's'; };
template <class T> struct Letter<T*> { static constexpr char is = 'p'; };
template <class T> struct Letter<const T*> { static constexpr char is = 'r'; };
#define EMU_LETTER(LETTER, TYPE) template <> struct Letter<TYPE> { static constexpr char is = LETTER; };
EMU_LETTER('?', bool) EMU_LETTER('f', float) EMU_LETTER('d', double)
EMU_LETTER('b', signed char) EMU_LETTER('h', short) EMU_LETTER('i', int) EMU_LETTER('q', long) EMU_LETTER('q', long long)
EMU_LETTER('B', unsigned char) EMU_LETTER('H', unsigned short) EMU_LETTER('I', unsigned) EMU_LETTER('Q', unsigned long)
EMU_LETTER('Q', unsigned long long)

template <class... A> void letters(void (*)(A...), char* to) {
    ((to += __builtin_sprintf(to, "%c%zu ", Letter<A>::is, sizeof(A))), ...);
}

template <int... I> struct Numbers {};
template <class... A, int... I>
__attribute__((noipa, no_sanitize("thread", "alignment")))      // the values are no memory of the kernel's
void spread(void (*kernel)(A...), void** values, Numbers<I...>) {
    kernel(*(A*)values[I]...);
}
template <class... A> void call(void (*kernel)(A...), void** values) {
    spread(kernel, values, Numbers<__integer_pack(sizeof...(A))...>());
}

}  // namespace emu
