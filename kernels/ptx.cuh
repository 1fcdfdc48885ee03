// ptx: every instruction the kernels use that C++ has no word for, and the few types they share.
//
// Each wrapper has two bodies: PTX for the GPU, and a call into namespace emu, which the CPU emulator defines
// (tests/kernels/emulator). Kernel files include nothing else, so nvcc, NVRTC and g++ read the same text.
//
// Fragments, after the PTX ISA; lane = 4 * g + t:
//   m16n8k64  A word 0: row g, k 8t..8t+7   1: row g+8   2: row g, k 32+8t..   3: row g+8, k 32+8t..    4-bit, low nibble first
//             B word 0: col g, k 8t..8t+7   1: col g, k 32+8t..
//   m16n8k16  A word 0: row g, k 2t,2t+1    1: row g+8   2: row g, k 8+2t,9+2t  3: row g+8, k 8+2t..    16-bit, low half first
//             B word 0: col g, k 2t,2t+1    1: col g, k 8+2t,9+2t
//   both      C, D 0, 1: row g, col 2t,2t+1    2, 3: row g+8, col 2t,2t+1
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) words2 { u32 x, y; };
struct alignas(16) words4 { u32 x, y, z, w; };

enum Half { BF16, FP16 };               // the model's 16-bit type, handled as bits

#if defined(__CUDA_ARCH__) || defined(__CUDACC__)
#define PX __device__ __forceinline__
#define PX_DEVICE 1
#else
#define PX inline
#define PX_DEVICE 0
#endif

namespace px {

#if PX_DEVICE
PX u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
#endif

// 16 bytes from global to shared memory, in the background.
PX void copy16(void* to_shared, const void* from_global) {
#if PX_DEVICE
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(to_shared)), "l"(from_global) : "memory");
#else
    emu::copy16(to_shared, from_global);
#endif
}

// Ends a group of copies.
PX void copy_commit() {
#if PX_DEVICE
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu::copy_commit();
#endif
}

// Waits until at most PENDING of this thread's groups are on their way.
template <int PENDING> PX void copy_wait() {
#if PX_DEVICE
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#else
    emu::copy_wait(PENDING);
#endif
}

PX void barrier() {
#if PX_DEVICE
    __syncthreads();
#else
    emu::barrier(__LINE__);
#endif
}

// d = a b + c, 4-bit integers times signed 4-bit integers into int32; c is the same for all. A_UNSIGNED: a is 0..15.
template <bool A_UNSIGNED> PX void mma_i4(int (&d)[4], const words4& a, u32 b0, u32 b1, int c) {
#if PX_DEVICE
    if (A_UNSIGNED)
        asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c));
    else
        asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c));
#else
    emu::mma_i4(A_UNSIGNED, d, a, b0, b1);
    for (int i = 0; i < 4; i++)
        d[i] += c;
#endif
}

// c += a b, 16-bit floats into fp32.
template <Half T> PX void mma_half(float (&c)[4], const words4& a, u32 b0, u32 b1) {
#if PX_DEVICE
    if (T == BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
    emu::mma_half(T == BF16, c, a, b0, b1);
#endif
}

// The value that lane ^ mask of this warp has in x.
PX u32 swap_lanes(u32 x, int mask) {
#if PX_DEVICE
    return __shfl_xor_sync(0xffffffffu, x, mask);
#else
    return emu::swap_lanes(x, mask, __LINE__);
#endif
}

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes b:a.
PX u32 permute_bytes(u32 a, u32 b, u32 selector) {
#if PX_DEVICE
    return __byte_perm(a, b, selector);
#else
    u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++)
        result |= (u32)(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
    return result;
#endif
}

PX float as_float(u32 bits) {
#if PX_DEVICE
    return __uint_as_float(bits);
#else
    return emu::as_float(bits);
#endif
}

PX u32 as_bits(float value) {
#if PX_DEVICE
    return __float_as_uint(value);
#else
    return emu::as_bits(value);
#endif
}

// Two fp32 to a pair of 16-bit floats, nearest even, `low` in the low half.
template <Half T> PX u32 pack_half(float low, float high) {
#if PX_DEVICE
    u32 pair;
    if (T == BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return emu::pack_half(T == BF16, low, high);
#endif
}

// A number as the layer stores it: fp16 ends at 65504 instead of Inf. NaN stays NaN, which fminf would lose.
template <Half T> PX float clamped(float value) {
    const float top = 65504.0f;
    return T == BF16 ? value : value > top ? top : value < -top ? -top : value;
}

// The low or high half of a pair of 16-bit floats.
template <Half T> PX float low_half(u32 pair) {
    if (T == BF16)
        return as_float(pair << 16);
#if PX_DEVICE
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
    return value;
#else
    return emu::from_fp16((u16)pair);
#endif
}

template <Half T> PX float high_half(u32 pair) {
    if (T == BF16)
        return as_float(pair & 0xffff0000u);
#if PX_DEVICE
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
    return value;
#else
    return emu::from_fp16((u16)(pair >> 16));
#endif
}

// The product of mma_i4 as floats. sm_80 lacks I2FP and its I2F is taken to be slow (not measured), so there the sum
// starts at the bits of 1.5 * 2^23: read as a float it is 12582912 + sum, exactly, for any |sum| < 2^22.
template <bool A_UNSIGNED> PX void mma_i4(float (&sum)[4], const words4& a, u32 b0, u32 b1) {
    int d[4];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
    mma_i4<A_UNSIGNED>(d, a, b0, b1, 0x4b400000);
    for (int i = 0; i < 4; i++)
        sum[i] = as_float((u32)d[i]) - 12582912.0f;
#else
    mma_i4<A_UNSIGNED>(d, a, b0, b1, 0);
    for (int i = 0; i < 4; i++)
        sum[i] = (float)d[i];
#endif
}

// fp32 to the nearest integer, half to even.
PX int round_even(float value) {
#if PX_DEVICE
    return __float2int_rn(value);
#else
    return emu::round_even(value);
#endif
}

// a / b to within 2 ulp.
PX float divide(float a, float b) {
#if PX_DEVICE
    float quotient;
    asm("div.approx.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
    return quotient;
#else
    return a / b;
#endif
}

}  // namespace px
