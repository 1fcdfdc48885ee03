// ptx: every instruction the kernels use that C++ has no word for, and the few types they share.
//
// Each wrapper has two bodies: PTX for the GPU, and a call into namespace emu, which the CPU emulator defines
// (tests/kernels/simulators/emulator). Kernel files include nothing else, so nvcc, NVRTC and g++ read the same text.
//
// Fragments, after the PTX ISA; lane = 4 * g + t:
//   m16n8k64  A word 0: row g, k 8t..8t+7   1: row g+8   2: row g, k 32+8t..   3: row g+8, k 32+8t..    4-bit, low nibble first
//             B word 0: col g, k 8t..8t+7   1: col g, k 32+8t..
//   m16n8k32  A word 0: row g, k 4t..4t+3   1: row g+8   2: row g, k 16+4t..   3: row g+8, k 16+4t..    8-bit, low byte first
//             B word 0: col g, k 4t..4t+3   1: col g, k 16+4t..
//   m16n8k16  A word 0: row g, k 2t,2t+1    1: row g+8   2: row g, k 8+2t,9+2t  3: row g+8, k 8+2t..    16-bit, low half first
//             B word 0: col g, k 2t,2t+1    1: col g, k 8+2t,9+2t
//   all       C, D 0, 1: row g, col 2t,2t+1    2, 3: row g+8, col 2t,2t+1
// of sm_75, where two or four make one of those, word by word:
//   m8n8k32   A row g, k 8t..8t+7    B col g, k 8t..8t+7    C, D row g, col 2t,2t+1                                    4-bit
//   m16n8k8   A word 0: row g, k 2t,2t+1    1: row g+8      B col g, k 2t,2t+1     C, D as m16n8k16                    16-bit
// and of Hopper, where warp w of a warpgroup has rows 16w.. of 64:
//   m64n128k32  A word 0: row g, k 4t..4t+3    1: row g+8    2: row g, k 16+4t..    3: row g+8, k 16+4t..         e4m3
//   m64n128k16  A as m16n8k16
//   both        D 4j, 4j+1: row g, col 8j + 2t, +1    4j+2, 4j+3: row g+8         B: in shared memory, see `operand`
// and of Blackwell (sm_120a), block-scaled: A, B, C and D as m16n8k64 above. Scales are words of four ue4m3, byte i that of
// k 16i..16i+15, and lie in the lanes that the instruction selects:
//   A_PAIR 0, 1    row g: lane t = 2 A_PAIR    row g+8: lane t = 2 A_PAIR + 1         B_LANE 0..3    col g: lane t = B_LANE
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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800       // not so in nvcc's pass for the host, which reads device code, too
#define PX_SM75 1
#else
#define PX_SM75 0
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

#if PX_SM75
// d = a b + c, m8n8k32: all that sm_75 has for 4-bit integers.
template <bool A_UNSIGNED> PX void mma_i4(int& d0, int& d1, u32 a, u32 b, int c0, int c1) {
    if (A_UNSIGNED)
        asm("mma.sync.aligned.m8n8k32.row.col.s32.u4.s4.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
            : "=r"(d0), "=r"(d1) : "r"(a), "r"(b), "r"(c0), "r"(c1));
    else
        asm("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
            : "=r"(d0), "=r"(d1) : "r"(a), "r"(b), "r"(c0), "r"(c1));
}

// c += a b, m16n8k8 of fp16: sm_75 has no longer k, and no bf16.
PX void mma_fp16(float (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}
#endif

// d = a b + c, 4-bit integers times signed 4-bit integers into int32; d is not c. A_UNSIGNED: a is 0..15.
template <bool A_UNSIGNED> PX void mma_i4(int (&d)[4], const words4& a, u32 b0, u32 b1, const int (&c)[4]) {
#if PX_SM75
    mma_i4<A_UNSIGNED>(d[0], d[1], a.x, b0, c[0], c[1]);
    mma_i4<A_UNSIGNED>(d[2], d[3], a.y, b0, c[2], c[3]);
    mma_i4<A_UNSIGNED>(d[0], d[1], a.z, b1, d[0], d[1]);
    mma_i4<A_UNSIGNED>(d[2], d[3], a.w, b1, d[2], d[3]);
#elif PX_DEVICE
    if (A_UNSIGNED)
        asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
    emu::mma_i4(A_UNSIGNED, d, a, b0, b1);
    for (int i = 0; i < 4; i++)
        d[i] += c[i];
#endif
}

// c += a b, 16-bit floats into fp32.
template <Half T> PX void mma_half(float (&c)[4], const words4& a, u32 b0, u32 b1) {
#if PX_SM75
    static_assert(T == FP16, "sm_75 multiplies no bf16");
    mma_fp16(c, a.x, a.y, b0);
    mma_fp16(c, a.z, a.w, b1);
#elif PX_DEVICE
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

// d = a b + c, signed 8-bit integers into int32. d may be c.
PX void mma_i8(int (&d)[4], const words4& a, u32 b0, u32 b1, const int (&c)[4]) {
#if PX_DEVICE
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
    for (int i = 0; i < 4; i++)
        d[i] = c[i];
    emu::mma_i8(d, a, b0, b1);
#endif
}

// threadIdx.x, asked for again: what a loop must not keep in registers for the code behind it.
PX int thread_index() {
#if PX_DEVICE
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
#else
    return threadIdx.x;
#endif
}

// x, which all lanes of the warp have: the compiler then knows, and a branch on it is one that a warp takes whole.
PX int uniform(int x) {
#if PX_DEVICE
    return __shfl_sync(0xffffffffu, x, 0);
#else
    return x;
#endif
}

// x, of which the compiler forgets what it has computed from it: it would keep numbers unpacked in registers for a second use.
PX u32 anew(u32 x) {
#if PX_DEVICE
    asm volatile("" : "+r"(x));
#endif
    return x;
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

#if PX_DEVICE
// fp32 to the bits of a bf16, nearest even, which is no instruction before sm_80.
PX u32 bf16_bits(float value) {
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
#endif

// Two fp32 to a pair of 16-bit floats, nearest even, `low` in the low half.
template <Half T> PX u32 pack_half(float low, float high) {
#if PX_DEVICE
    u32 pair;
#if __CUDA_ARCH__ >= 800
    if (T == BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    if (T == BF16)
        pair = bf16_bits(low) | bf16_bits(high) << 16;
    else
        asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
            : "=r"(pair) : "f"(low), "f"(high));
#endif
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

// a b + c, rounded once.
PX float fma(float a, float b, float c) {
#if PX_DEVICE
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// a b + c of pairs of fp16, each rounded once.
PX u32 fma_fp16(u32 a, u32 b, u32 c) {
#if PX_DEVICE
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return emu::fma_fp16(a, b, c);
#endif
}

// The product of mma_i4 as floats, OFFSET too large: a sum that starts at OFFSET's bits is, read as a float, OFFSET + sum,
// exactly, for any |sum| < 2^22. No instruction converts it, and fma(that, w, -OFFSET * w) is w * sum, exactly where w has at
// most 11 significant bits and w * sum at most 24: one instruction in the place of a conversion and a product.
constexpr float OFFSET = 12582912.0f;           // 1.5 * 2^23

template <bool A_UNSIGNED> PX void mma_i4_offset(float (&sum)[4], const words4& a, u32 b0, u32 b1, const int (&offset)[4]) {
    int d[4];
    mma_i4<A_UNSIGNED>(d, a, b0, b1, offset);
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum[i] = as_float((u32)d[i]);
}

// OFFSET's bits for mma_i4_offset. `zero` is 0, which the compiler cannot know: constants it would copy before each MMA anew,
// by one MOV per register.
PX void offset_bits(int (&offset)[4], int zero) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#if PX_DEVICE
        offset[i] = __shfl_sync(0xffffffffu, 0x4b400000 + (int)threadIdx.x * zero, i);
#else
        offset[i] = 0x4b400000 + zero;
#endif
#if PX_SM75                             // whose MMAs have rows g or g+8: two registers serve both, where four are too many
    offset[2] = offset[0], offset[3] = offset[1];
#endif
}

// Where sums of integers start, |sum| < 2^22, and what they then are as floats. sm_80 lacks I2FP, see mma_i4: there they start
// at the bits of 1.5 * 2^23, plus a zero of which the compiler does not know: constants it would move into place for every MMA.
PX void start_sum(int (&start)[4], int not_negative) {
    for (int i = 0; i < 4; i++)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
        start[i] = 0x4b400000 + (not_negative >> 31 & i);
#else
        start[i] = 0;
#endif
}

PX float sum_value(int sum) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
    return as_float((u32)sum) - 12582912.0f;
#else
    return (float)sum;
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

// a b, rounded, and not a part of a multiply-add.
PX float multiply(float a, float b) {
#if PX_DEVICE
    return __fmul_rn(a, b);
#else
    return a * b;
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

// To within 2^-11 of the result.
PX float tanh(float x) {
#if PX_DEVICE
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return __builtin_tanhf(x);
#endif
}

// 1 / sqrt(x) to within 2^-22 of the result.
PX float rsqrt(float x) {
#if PX_DEVICE
    float result;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / __builtin_sqrtf(x);
#endif
}

// Orders what the lanes of a warp wrote and read before.
PX void warp_barrier() {
#if PX_DEVICE
    __syncwarp();
#else
    emu::warp_barrier(__LINE__);
#endif
}

// ---- Hopper (sm_90a): copies that a barrier counts, and matrix instructions of four warps

// e4m3, nearest even, at most 448: `low` in the low byte. NaN becomes 0x7f.
PX u32 pack_e4m3(float low, float high) {
#if PX_DEVICE
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return emu::pack_e4m3(low, high);
#endif
}

PX u32 rotate_right(u32 x, int by) {
#if PX_DEVICE
    return __funnelshift_r(x, x, by);
#else
    return x >> by | x << (32 - by);
#endif
}

// A barrier for `threads` threads of the CTA, of one number 1..15.
PX void barrier_of(int number, int threads) {
#if PX_DEVICE
    asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
#else
    emu::barrier_of(number, threads, __LINE__);
#endif
}

// More or fewer registers per thread, for a whole warpgroup. The block starts with what __launch_bounds__ leaves.
template <int COUNT> PX void grow_registers() {
#if PX_DEVICE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
#endif
}

template <int COUNT> PX void shrink_registers() {
#if PX_DEVICE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
#endif
}

// mbarrier: a phase ends when `count` threads have arrived and all bytes it was told to expect have come. Phases are
// numbered from 0; waiting for parity p returns once the running phase has another parity.
PX void mbarrier_init(u64* barrier, int count) {
#if PX_DEVICE
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
#else
    emu::mbarrier_init(barrier, count);
#endif
}

// Shows initialised mbarriers to the copy engine and to the other CTA of a cluster.
PX void mbarrier_fence() {
#if PX_DEVICE
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emu::mbarrier_fence();
#endif
}

PX void mbarrier_arrive(u64* barrier) {
#if PX_DEVICE
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
#else
    emu::mbarrier_arrive(barrier, 0);
#endif
}

// Arrives at the mbarrier that CTA `rank` of the cluster has at the same place. This orders what the thread has read, not
// what it has written for the other CTA: release.cluster would, by a fence to the whole GPU.
PX void mbarrier_arrive_at(u64* barrier, u32 rank) {
#if PX_DEVICE
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
                 :: "r"(shared_address(barrier)), "r"(rank) : "memory");
#else
    emu::mbarrier_arrive_at(barrier, rank);
#endif
}

// Arrives, and tells the running phase to wait for this many bytes more.
PX void mbarrier_expect(u64* barrier, u32 bytes) {
#if PX_DEVICE
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
#else
    emu::mbarrier_arrive(barrier, bytes);
#endif
}

PX void mbarrier_wait(u64* barrier, u32 parity) {
#if PX_DEVICE
    u32 done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    while (!done);
#else
    emu::mbarrier_wait(barrier, parity);
#endif
}

// bytes % 16 == 0, both sides 16-byte aligned; `barrier` counts them as they come.
PX void bulk_copy(void* to_shared, const void* from_global, u32 bytes, u64* barrier) {
#if PX_DEVICE
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to_shared)), "l"(from_global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
#else
    emu::bulk_copy(to_shared, from_global, bytes, barrier);
#endif
}

// The same into every CTA of a cluster that has its bit in `mask`, at the same place, counted by its own mbarrier there.
PX void bulk_copy_to(u16 mask, void* to_shared, const void* from_global, u32 bytes, u64* barrier) {
#if PX_DEVICE
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;"
                 :: "r"(shared_address(to_shared)), "l"(from_global), "r"(bytes), "r"(shared_address(barrier)), "h"(mask)
                 : "memory");
#else
    emu::bulk_copy_to(mask, to_shared, from_global, bytes, barrier);
#endif
}

// This CTA's place in its cluster.
PX u32 cluster_rank() {
#if PX_DEVICE
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return emu::cluster_rank();
#endif
}

// A barrier for all threads of the cluster.
PX void cluster_barrier() {
#if PX_DEVICE
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#else
    emu::cluster_barrier(__LINE__);
#endif
}

// An operand of wgmma in shared memory, K along the rows. `stride`: bytes from 8 rows to the next 8.
//   swizzled   rows of 128 bytes, 8 of them 1024-byte aligned; the 16-byte chunk c of row r lies at chunk c ^ (r & 7)
//   plain      8 rows of 16 bytes each lie together; `leading`: bytes to the same rows' next 16 bytes
PX u64 operand(const void* start, u32 leading, u32 stride, bool swizzled) {
#if PX_DEVICE
    const u32 address = shared_address(start);
#else
    const u32 address = emu::shared_address(start);
#endif
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)swizzled << 62;
}

// Between what the threads did to a wgmma's registers and the wgmma.
PX void wgmma_fence() {
#if PX_DEVICE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emu::wgmma_fence();
#endif
}

PX void wgmma_commit() {
#if PX_DEVICE
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emu::wgmma_commit();
#endif
}

#define PX_EIGHT(d, i)                                                                                                    \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),          \
        "+f"(d[i + 7])
#define PX_SIXTY_FOUR(d)                                                                                                  \
    PX_EIGHT(d, 0), PX_EIGHT(d, 8), PX_EIGHT(d, 16), PX_EIGHT(d, 24), PX_EIGHT(d, 32), PX_EIGHT(d, 40), PX_EIGHT(d, 48),  \
        PX_EIGHT(d, 56)
#define PX_REGISTERS                                                                                                      \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
    "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"    \
    "%59,%60,%61,%62,%63}"

// Waits for all of this thread's wgmmas. `d` is what they write: no use of it moves before the wait. `a` and `b` are what
// they read in registers: no other value takes those before the wait, as it would if the compiler saw no use after it.
PX void wgmma_wait(float (&d)[64], const words4& a, const words4& b) {
#if PX_DEVICE
    asm volatile("wgmma.wait_group.sync.aligned 0;" : PX_SIXTY_FOUR(d)
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w) : "memory");
#else
    emu::wgmma_wait(d);
#endif
}

// d = a b, or d += a b: e4m3 into fp32, m64n128k32. Only wgmma_wait makes d readable, and a and b writable again.
template <bool ADD> PX void wgmma_e4m3(float (&d)[64], const words4& a, u64 b) {
#if PX_DEVICE
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " PX_REGISTERS ", {%64,%65,%66,%67}, %68, %69, 1, 1;"
                 : PX_SIXTY_FOUR(d) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "n"(ADD) : "memory");
#else
    emu::wgmma_e4m3(ADD, d, a, b);
#endif
}

// d += a b, 16-bit floats into fp32, m64n128k16.
template <Half T> PX void wgmma_half(float (&d)[64], const words4& a, u64 b) {
#if PX_DEVICE
    if (T == BF16)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PX_REGISTERS
                     ", {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                     : PX_SIXTY_FOUR(d) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b) : "memory");
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " PX_REGISTERS
                     ", {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                     : PX_SIXTY_FOUR(d) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b) : "memory");
#else
    emu::wgmma_half(T == BF16, d, a, b);
#endif
}

// Four 8 x 8 matrices of 16-bit values, of which word i holds row g, columns 2t and 2t+1, go to shared memory transposed:
// lane 8i + c says where column c of matrix i goes, 16 bytes.
PX void store_transposed(void* to_shared, const words4& matrices) {
#if PX_DEVICE
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" :: "r"(shared_address(to_shared)),
                 "r"(matrices.x), "r"(matrices.y), "r"(matrices.z), "r"(matrices.w) : "memory");
#else
    emu::store_transposed(to_shared, matrices);
#endif
}

// ---- Blackwell (sm_120a, 121a)

// c += (a * a_scales) (b * b_scales), e2m1 times ue4m3 into fp32, m16n8k64; the lanes whose scales count are selected.
template <int A_PAIR, int B_LANE>
PX void mma_nvfp4(float (&c)[4], const words4& a, u32 b0, u32 b1, u32 a_scales, u32 b_scales) {
#if PX_DEVICE
    asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {0,%12}, {%11}, {0,%13};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(a_scales), "r"(b_scales), "n"(A_PAIR), "n"(B_LANE));
#else
    emu::mma_nvfp4(c, a, b0, b1, a_scales, b_scales, A_PAIR, B_LANE);
#endif
}

// 1 / x, rounded to nearest, of a normal x whose reciprocal is normal; else anything, NaN included. What the compiler makes of
// 1 / x, without its call for the other numbers.
PX float reciprocal(float x) {
#if PX_DEVICE
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(x));
    return __fmaf_rn(near, __fmaf_rn(-x, near, 1.0f), near);
#else
    return 1.0f / x;
#endif
}

// Eight fp32 to e2m1, nearest even, at most 6, the first in the lowest nibble. NaN becomes 6.
PX u32 pack_e2m1(const float (&x)[8]) {
#if PX_DEVICE
    u32 codes;
    asm("{ .reg .b8 a, b, c, d; cvt.rn.satfinite.e2m1x2.f32 a, %2, %1; cvt.rn.satfinite.e2m1x2.f32 b, %4, %3; "
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5; cvt.rn.satfinite.e2m1x2.f32 d, %8, %7; mov.b32 %0, {a, b, c, d}; }"
        : "=r"(codes) : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
    return codes;
#else
    return emu::pack_e2m1(x);
#endif
}

}  // namespace px
