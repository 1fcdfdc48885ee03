// Products and a store of matrices in layouts that NVIDIA wrote down: CuTe's tables say which element lies where in which
// thread. Every matrix comes and goes in rows, B as its transpose; an element of a and b is the bits of its type in 16.
// -DTHEIRS: one instruction of a warp as CuTe's wrapper has it; OURS: the same shape by ours; GROUP: wgmma, and stmatrix.
// Test: test_nvidia_tables.py
#ifdef GROUP
#include <cutlass/arch/barrier.h>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#else
#include <cute/tensor_zip.hpp>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm120.hpp>
#endif
#include "ptx.cuh"

using namespace cute;

template <typename T> __device__ T element(u32 bits) {
    if constexpr (is_same_v<T, int4b_t>)
        return T(int(bits ^ 8) - 8);
    else if constexpr (is_same_v<T, uint4b_t> || is_same_v<T, int8_t>)
        return T(bits);
    else
        return T::bitcast(bits);
}

// The elements of this thread, from a matrix and to one: the table has the place of each.
template <typename Table, typename Shape, typename Elements, typename Bits>
__device__ void load(Elements&& elements, Table table, Shape shape, const Bits* matrix, int columns) {
    CUTE_UNROLL
    for (int i = 0; i < size(elements); i++) {
        const auto place = idx2crd(table(threadIdx.x, i), shape);
        const Bits bits = matrix[get<0>(place) * columns + get<1>(place)];
        if constexpr (is_same_v<Bits, u16>)
            elements(i) = element<typename remove_cvref_t<Elements>::value_type>(bits);
        else
            elements(i) = bits;
    }
}
template <typename Table, typename Shape, typename Elements, typename C>
__device__ void save(const Elements& elements, Table table, Shape shape, C* matrix, int columns) {
    CUTE_UNROLL
    for (int i = 0; i < size(elements); i++) {
        const auto place = idx2crd(table(threadIdx.x, i), shape);
        matrix[get<0>(place) * columns + get<1>(place)] = elements(i);
    }
}

#ifndef GROUP

// d = a b + c of a warp, where multiply(left, right, sum) issues the instructions and Op has the tables
template <typename Op, typename C, typename Multiply>
__device__ void warp_product(const u16* a, const u16* b, const C* c, C* d, Multiply multiply) {
    using Tables = MMA_Traits<Op>;
    constexpr typename Tables::Shape_MNK shape;
    constexpr int N = get<1>(shape), K = get<2>(shape);
    auto left = make_tensor<typename Tables::ValTypeA>(make_layout(size<1>(typename Tables::ALayout{})));
    auto right = make_tensor<typename Tables::ValTypeB>(make_layout(size<1>(typename Tables::BLayout{})));
    auto sum = make_tensor<C>(make_layout(size<1>(typename Tables::CLayout{})));
    load(left, typename Tables::ALayout{}, select<0, 2>(shape), a, K);
    load(right, typename Tables::BLayout{}, select<1, 2>(shape), b, K);
    load(sum, typename Tables::CLayout{}, select<0, 1>(shape), c, N);
    multiply(left, right, sum);
    save(sum, typename Tables::CLayout{}, select<0, 1>(shape), d, N);
}

#ifdef THEIRS
// A thread's scales of a matrix with 64 columns, four in a row of `scales`: the table places one per element, so 16 are one.
template <typename Table, typename Rows> __device__ auto scales_of(const u16* scales, Table table, Rows rows) {
    auto fragment = make_tensor<float_ue4m3_t>(Layout<Shape<Shape<_16, _4>>, Stride<Stride<_0, _1>>>{});
    CUTE_UNROLL
    for (int i = 0; i < 64; i++) {
        const auto place = idx2crd(table(threadIdx.x, i), make_shape(rows, _64{}));
        fragment(i) = element<float_ue4m3_t>(scales[get<0>(place) * 4 + get<1>(place) / 16]);
    }
    return fragment;
}

using Nvfp4 = SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<float_e2m1_t, float_e2m1_t, float, float_ue4m3_t, 16>;
template <typename Multiply>
__device__ void nvfp4_product(const u16* a, const u16* b, const float* c, float* d, const u16* a_scales, const u16* b_scales,
                              Multiply multiply) {
    const auto left_scales = scales_of(a_scales, MMA_Traits<Nvfp4>::SFALayout{}, _16{});
    const auto right_scales = scales_of(b_scales, MMA_Traits<Nvfp4>::SFBLayout{}, _8{});
    warp_product<Nvfp4>(a, b, c, d, [&](auto& left, auto& right, auto& sum) {
        multiply(left, right, left_scales, right_scales, sum);
    });
}
extern "C" __global__ void m16n8k64_e2m1_e2m1(const u16* a, const u16* b, const float* c, float* d, const u16* a_scales,
                                              const u16* b_scales) {
    nvfp4_product(a, b, c, d, a_scales, b_scales, [](auto& left, auto& right, auto& of_left, auto& of_right, auto& sum) {
        mma_unpack(MMA_Traits<Nvfp4>{}, sum, make_zip_tensor(left, of_left), make_zip_tensor(right, of_right), sum);
    });
}
extern "C" __global__ void m16n8k64_e2m1_e2m1_ours(const u16* a, const u16* b, const float* c, float* d, const u16* a_scales,
                                                   const u16* b_scales) {
    nvfp4_product(a, b, c, d, a_scales, b_scales, [](auto& left, auto& right, auto& of_left, auto& of_right, auto& sum) {
        const auto a = recast<u32>(left);
        const auto b = recast<u32>(right);
        const u32 as = recast<u32>(filter_zeros(of_left))(0), bs = recast<u32>(filter_zeros(of_right))(0);
        float d[4] = {sum(0), sum(1), sum(2), sum(3)};
        px::mma_nvfp4<0, 0>(d, words4{a(0), a(1), a(2), a(3)}, b(0), b(1), as, bs);
        for (int i = 0; i < 4; i++)
            sum(i) = d[i];
    });
}

#define PRODUCT(NAME, OP, C) \
    extern "C" __global__ void NAME(const u16* a, const u16* b, const C* c, C* d) { \
        warp_product<OP>(a, b, c, d, [](auto& left, auto& right, auto& sum) { \
            mma_unpack(MMA_Traits<OP>{}, sum, left, right, sum); \
        }); \
    }
PRODUCT(m16n8k64_s4_s4, SM80_16x8x64_S32S4S4S32_TN, int)
PRODUCT(m16n8k64_u4_s4, SM80_16x8x64_S32U4S4S32_TN, int)
PRODUCT(m16n8k32_s8_s8, SM80_16x8x32_S32S8S8S32_TN, int)
PRODUCT(m8n8k32_s4_s4, SM80_8x8x32_S32S4S4S32_TN, int)
PRODUCT(m8n8k32_u4_s4, SM80_8x8x32_S32U4S4S32_TN, int)
PRODUCT(m16n8k16_bf16_bf16, SM80_16x8x16_F32BF16BF16F32_TN, float)
PRODUCT(m16n8k16_f16_f16, SM80_16x8x16_F32F16F16F32_TN, float)
PRODUCT(m16n8k8_f16_f16, SM75_16x8x8_F32F16F16F32_TN, float)
#undef PRODUCT
#endif

#ifdef OURS
// CALL makes d, which begins as c, a b + c.
#define PRODUCT(NAME, OP, C, CALL) \
    extern "C" __global__ void NAME##_ours(const u16* a, const u16* b, const C* c, C* d) { \
        warp_product<OP>(a, b, c, d, [](auto& left, auto& right, auto& sum) { \
            const auto words = recast<u32>(left); \
            const auto b = recast<u32>(right); \
            const words4 a = {words(0), words(1), words(2), words(3)}; \
            const C c[4] = {sum(0), sum(1), sum(2), sum(3)}; \
            C d[4] = {c[0], c[1], c[2], c[3]}; \
            CALL; \
            for (int i = 0; i < 4; i++) \
                sum(i) = d[i]; \
        }); \
    }
PRODUCT(m16n8k64_s4_s4, SM80_16x8x64_S32S4S4S32_TN, int, px::mma_i4<false>(d, a, b[0], b[1], c))
PRODUCT(m16n8k64_u4_s4, SM80_16x8x64_S32U4S4S32_TN, int, px::mma_i4<true>(d, a, b[0], b[1], c))
PRODUCT(m16n8k16_f16_f16, SM80_16x8x16_F32F16F16F32_TN, float, px::mma_half<FP16>(d, a, b[0], b[1]))
#ifdef THEIRS                       // sm_75 has neither of these
PRODUCT(m16n8k32_s8_s8, SM80_16x8x32_S32S8S8S32_TN, int, px::mma_i8(d, a, b[0], b[1], c))
PRODUCT(m16n8k16_bf16_bf16, SM80_16x8x16_F32BF16BF16F32_TN, float, px::mma_half<BF16>(d, a, b[0], b[1]))
#endif
#endif

#else

// d = a b + c of a warpgroup, a in registers, b in shared memory in this order. operands: the words that describe b to
// each instruction, CuTe's and that of px::operand for the same place.
template <typename Op, typename T, int K, typename Order>
__device__ void group_product(const u16* a, const u16* b, const float* c, float* d, u64* operands, Order order, u32 leading,
                              u32 stride, bool swizzled) {
    using Tables = MMA_Traits<Op>;
    constexpr auto step = get<2>(typename Tables::Shape_MNK{});
    __shared__ alignas(1024) u8 shared[128 * K * sizeof(T)];
    auto left = make_tensor<T>(make_shape(size<1>(typename Tables::ALayout{}), Int<K / step>{}));
    auto right = make_tensor(make_smem_ptr((T*)shared), order);
    auto sum = make_tensor<float>(make_layout(size<1>(typename Tables::CLayout{})));
    CUTE_UNROLL
    for (int k = 0; k < K / step; k++)
        load(left(_, k), typename Tables::ALayout{}, make_shape(_64{}, step), a + k * step, K);
    for (int i = threadIdx.x; i < 128 * K; i += 128)
        right(i / K, i % K) = element<T>(b[i]);
    load(sum, typename Tables::CLayout{}, Shape<_64, _128>{}, c, 128);
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    warpgroup_fence_operand(left);
    warpgroup_fence_operand(sum);
    warpgroup_arrive();
    GmmaDescriptor theirs[K / step];
    CUTE_UNROLL
    for (int k = 0; k < K / step; k++) {
        theirs[k] = GMMA::make_gmma_desc<GMMA::Major::K>(local_tile(right, make_shape(_128{}, step), make_coord(0, k)));
        mma_unpack(Tables{}, sum, left(_, k), make_tensor(GMMA::DescriptorIterator{theirs[k]}, Layout<_1, _0>{}), sum);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sum);
    save(sum, typename Tables::CLayout{}, Shape<_64, _128>{}, d, 128);
    if (threadIdx.x == 0)
        for (int k = 0; k < K / step; k++) {
            operands[2 * k] = theirs[k].desc_;
            operands[2 * k + 1] = px::operand(shared, leading, stride, swizzled) + k * (swizzled ? 2 : 16);
        }
}

extern "C" __global__ void m64n128k32_e4m3_e4m3(const u16* a, const u16* b, const float* c, float* d, u64* operands) {
    group_product<SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_RS_TN<>, float_e4m3_t, 128>(
        a, b, c, d, operands, tile_to_shape(GMMA::Layout_K_SW128_Atom<float_e4m3_t>{}, Shape<_128, _128>{}), 16, 1024, true);
}

#define HALVES(NAME, OP, T, R) \
    extern "C" __global__ void NAME(const u16* a, const u16* b, const float* c, float* d, u64* operands) { \
        group_product<SM90::GMMA::OP<GMMA::Major::K, GMMA::Major::K>, T, R>(a, b, c, d, operands, \
            tile_to_shape(GMMA::Layout_K_INTER_Atom<T>{}, Shape<_128, Int<R>>{}, Step<_2, _1>{}), 128, 16 * R, false); \
    }
HALVES(m64n128k16_bf16_bf16_r32, MMA_64x128x16_F32BF16BF16_RS, bfloat16_t, 32)
HALVES(m64n128k16_bf16_bf16_r128, MMA_64x128x16_F32BF16BF16_RS, bfloat16_t, 128)
HALVES(m64n128k16_f16_f16_r32, MMA_64x128x16_F32F16F16_RS, half_t, 32)

// The tables of a store count bits, of what the lanes have and of the rows that they give the address of.
extern "C" __global__ void stmatrix_trans(const u16* from, u16* to) {
    using Tables = Copy_Traits<SM90_U16x8_STSM_T>;
    __shared__ alignas(16) u16 rows[32][8];
    u16 values[8];
    CUTE_UNROLL
    for (int i = 0; i < 8; i++)
        values[i] = from[typename Tables::SrcLayout{}(threadIdx.x, 16 * i) / 16];
    const u32* words = (const u32*)values;
    SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3], *(uint128_t*)rows[threadIdx.x]);
    __syncthreads();
    for (int i = 0; i < 8; i++)
        to[typename Tables::DstLayout{}(threadIdx.x, 16 * i) / 16] = rows[threadIdx.x][i];
}

#endif
