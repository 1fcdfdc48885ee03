// w4a4_normal: the main loop of W4A4 kernels of sm_80, 86 and 89 with scales brought to one size, which fp16 can take: half the
// registers of w4a4_ring.cuh, which does the same in fp32, or fewer instructions
//
//   y[m,n]   = up[m] * column[n] * sum_g p_g + ...                    the rest as in w4a4_tile.cuh
//   p_g      = round16(a_g d_g) * wscales[n,g]                        a_g = ascales[m,g] / up[m]
//   d_g      = sum_{k in g} qact[m,k] * qweight[n,k]                  g: 64 consecutive k
//
//   ascales  [M/64][K/64 + 1][4 m16][8 g][2] fp32: behind those of the groups each row's largest, from quant_down_normal
//   up[m]    the power of two above that, so that a < 1; of NaN and Inf NaN
//   wscales  [N/128][K/64][8 n16][4 t][4] fp16, columns as in the checkpoint, divided by column[n]: |wscales| <= 2^-C
//   column   [N] fp32, powers of two      NormalWeight.pack of variants/w4a4_normal.py makes the two, and chooses C by K
//
// 4 FFMA per MMA take the offset away and scale by a (ptx.cuh, mma_i4_offset), 2 F2FP make two pairs of fp16 of its sums. From
// there on the two forms differ:
//
//   fp16n  2 HFMA2 per MMA: acc += pair * w, accumulators in fp16. 64 registers instead of 128, so three CTAs of 168 fit a
//          multiprocessor: 12 warps. A ring of three steps of one group each.
//   diag   1 HMMA per two MMAs: the pairs of groups g and g+1 are, as they lie, the two halves of an A fragment of m16n8k16,
//          whose k is (group, column). B is diag(w of g) over diag(w of g+1): lane 4r + t holds columns 2t and 2t+1 of both,
//          keeps the one that is r, and zero elsewhere. Accumulators in fp32, 8 warps. Two steps of two groups each. For sm_80,
//          whose tensor cores multiply fp16 into fp32 at full rate and where an FFMA takes two cycles.
//
// I1  fp16n cannot overflow. |a d| <= 7680 = 64 * 15 * 8, which fp16 has, so rounding does not lead beyond it. A sum below
//     65520 is off by at most 16 when it is rounded to fp16. So after g groups |acc| <= g * (7680 * 2^-C + 16); pack chooses C
//     such that this is at most 65504 after the last. No order of signs matters, and no size of x or of the weight.
// I2  Error of fp16n in units of up * column: a group adds at most 2^-11 (|p| + |acc|) + 2^-25 (|a d| + |w| + 1), the last for
//     numbers that are subnormal in fp16, and what is there grows by 1 + 2^-11. Of G terms of like size and any sign that is
//     0.2 % at K = 12288. Where the first is large and each other is less than half a step of it, all others are lost.
//     Error of diag: 2^-11 |p| + 2^-25 (|a d| + |w|) per group, and that of fp32 sums: 0.02 %.
// I3  Largest scales of rows are below 2^126, as those of bf16 / 7 are, largest scales of columns below 2^107.
// I4  What is filled in a step was last read in the step before: one barrier per step is enough.
// Tried  an unrolled ring: 11.2 instructions per MMA by nvcc 13.0, 12.0 by NVRTC 12.6. Addresses by the number of a group, as
//     in w4a4_tile.cuh: NVRTC 12.6 spilled a register.
// Spec reference.py gemm_w4a4    Test tests/kernels/families/test_w4a4_normal.py, test_mlp.py
#pragma once
#include "w4a4_tile.cuh"

namespace w4a4_normal {

using namespace w4a4_tile;

typedef float Factors[2][4][8][2];      // 1 / up: [m64][m16][g][row g, g+8], as ascales of a stage

// The factors of this CTA's rows, from behind their scales. Threads are as many as rows.
PX void fill(Factors& factors, const words4* ascales, int M, int K) {
    const u32 thread = threadIdx.x, groups = K / 64, last64 = (M + 63) / 64 - 1, block64 = 2 * blockIdx.y + thread / 64;
    const u32 peak = ((const u32*)ascales)[((block64 < last64 ? block64 : last64) * (groups + 1) + groups) * 64 + thread % 64];
    const u32 nan = 0x7fffffffu, exponent = peak & 0x7f800000u;                 // 2^-x for a peak from 2^(x-1) on
    ((u32*)factors)[thread] = exponent == 0x7f800000u ? nan : 0x7e800000u - exponent;
}

// What a warp reads of the activations of a stage.
struct NormalRows {
    words4 qact[4];                     // [m16]
    float ascale[4][2], less[4][2];     // [m16][row g, g+8]: a, and the OFFSET that fma takes away

    PX NormalRows(const Stage& from, const Factors& factors) {
        const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 64;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            qact[i] = from.qact[warp_m][i][lane];
            const words2 bits = *(const words2*)from.ascales[warp_m][i][lane / 4];
            const words2 by = *(const words2*)factors[warp_m][i][lane / 4];
            ascale[i][0] = px::as_float(bits.x) * px::as_float(by.x), ascale[i][1] = px::as_float(bits.y) * px::as_float(by.y);
            less[i][0] = -px::OFFSET * ascale[i][0], less[i][1] = -px::OFFSET * ascale[i][1];
        }
    }
};

// a d of one MMA as pairs of fp16, in the places of its results: of row g, and of row g+8.
template <bool UNSIGNED>
PX words2 multiply(const NormalRows& rows, int i, u32 b0, u32 b1, const int (&offset)[4]) {
    float sum[4];
    px::mma_i4_offset<UNSIGNED>(sum, rows.qact[i], b0, b1, offset);
#pragma unroll
    for (int e = 0; e < 4; e++)
        sum[e] = px::fma(sum[e], rows.ascale[i][e / 2], rows.less[i][e / 2]);
    return {px::pack_half<FP16>(sum[0], sum[1]), px::pack_half<FP16>(sum[2], sum[3])};
}

// What a thread copies of one stage after the other: four pieces of 16 bytes, 32 pieces apart, of its warp's operand, and in
// the first SCALES threads one of scales. It moves pointers instead of numbering groups, which takes fewer registers.
//
//   warp 0, 1   the two m64 blocks of qact; one past the end is replaced by the last one: I3 of w4a4_tile.cuh
//   warp 2, 3   the halves of qweight
struct Source {
    const words4 *operand, *scale;
    u32 step;                           // of `operand`, from group to group

    PX Source(const words4* qact, const words4* ascales, const words4* qweight, const words4* wscales, int n_tile, int M,
              int K) {
        const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, groups = K / 64, last64 = (M + 63) / 64 - 1;
        const u32 first64 = 2 * blockIdx.y, second64 = first64 < last64 ? first64 + 1 : last64;
        step = warp < 2 ? 128 : 256;
        operand = (warp < 2 ? qact + (u64)(warp ? second64 : first64) * groups * 128
                            : qweight + (u64)n_tile * groups * 256 + (warp - 2) * 128) + lane;
        scale = (thread < 32 ? ascales + (u64)(thread < 16 ? first64 : second64) * (groups + 1) * 16
                             : wscales + (u64)n_tile * groups * 16) + thread % 16;
    }

    PX void copy(Stage& stage) {
        const u32 thread = threadIdx.x;
        words4* to = (words4*)&stage;
#pragma unroll
        for (int i = 0; i < 4; i++)
            px::copy16(to + thread / 32 * 128 + thread % 32 + 32 * i, operand + 32 * i);
        if (thread < SCALES)
            px::copy16(to + 4 * THREADS + thread, scale);
        operand += step;
        scale += 16;
    }
};

struct FP16N {
    static constexpr int CTAS = 3, GROUPS = 1, STEPS = 3;       // CTAs per multiprocessor, groups of a step, steps of the ring
    u32 acc[4][8][2];                   // [m16][n8][row g, g+8]: pairs

    PX FP16N() {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                acc[i][j][0] = acc[i][j][1] = 0;
    }

    template <bool UNSIGNED> PX void add(const Stage* stage, const Factors& factors, const int (&offset)[4]) {
        const int lane = threadIdx.x % 32;
        const NormalRows rows(stage[0], factors);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int n16 = threadIdx.x / 32 % 2 * 4 + j;
            const words4 b = stage[0].qweight[n16][lane];
            const words2 w = *(const words2*)stage[0].wscales[n16][lane % 4];
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const words2 pairs = multiply<UNSIGNED>(rows, i, h ? b.z : b.x, h ? b.w : b.y, offset);
                    u32(&to)[2] = acc[i][2 * j + h];
                    to[0] = px::fma_fp16(pairs.x, h ? w.y : w.x, to[0]);
                    to[1] = px::fma_fp16(pairs.y, h ? w.y : w.x, to[1]);
                }
        }
    }

    // Rows 16 m16 to 16 m16 + 15, as `take` of tile.cuh.
    PX void take(float (&y)[8][4], int m16) const {
        u32 pairs[8][2];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i == m16)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    pairs[j][0] = acc[i][j][0], pairs[j][1] = acc[i][j][1];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                y[j][2 * h] = px::low_half<FP16>(pairs[j][h]), y[j][2 * h + 1] = px::high_half<FP16>(pairs[j][h]);
    }
};

struct Diag : Accumulators {
    static constexpr int CTAS = 2, GROUPS = 2, STEPS = 2;

    template <bool UNSIGNED> PX void add(const Stage* stage, const Factors& factors, const int (&offset)[4]) {
        const int lane = threadIdx.x % 32;
        const u32 half = lane / 4 % 2 ? 0xffff0000u : 0x0000ffffu, kept = lane / 8 == lane % 4 ? half : 0u;
        const NormalRows rows(stage[0], factors), next(stage[1], factors);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int n16 = threadIdx.x / 32 % 2 * 4 + j;
            const words4 b = stage[0].qweight[n16][lane], c = stage[1].qweight[n16][lane];
            const words2 v = *(const words2*)stage[0].wscales[n16][lane % 4];
            const words2 w = *(const words2*)stage[1].wscales[n16][lane % 4];
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const words2 left = multiply<UNSIGNED>(rows, i, h ? b.z : b.x, h ? b.w : b.y, offset);
                    const words2 right = multiply<UNSIGNED>(next, i, h ? c.z : c.x, h ? c.w : c.y, offset);
                    px::mma_half<FP16>(acc[i][2 * j + h], {left.x, left.y, right.x, right.y}, (h ? v.y : v.x) & kept,
                                       (h ? w.y : w.x) & kept);
                }
        }
    }
};

template <class Form> constexpr int STAGES = Form::STEPS * Form::GROUPS;

// What the main loop leaves: sums, and the factors that they lack.
template <class Form> struct Product {
    Form sums;
    const Factors& factors;
    const float* columns;
    int n_tile;

    // Rows 16 m16 to 16 m16 + 15, as `take` of tile.cuh.
    PX void take(float (&y)[8][4], int m16) {
        sums.take(y, m16);
        const int thread = px::thread_index(), lane = thread % 32, warp_m = thread / 64, warp_n = thread / 32 % 2;
        const float* of_columns = columns + n_tile * TILE + warp_n * 64 + lane % 4 * 2;
        const words2 down = *(const words2*)factors[warp_m][m16][lane / 4];
        const float up[2] = {px::as_float(0x7f000000u - down.x), px::as_float(0x7f000000u - down.y)};   // of NaN anything
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const words2 column = *(const words2*)(of_columns + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; e++)
                y[j][e] = y[j][e] * px::as_float(e % 2 ? column.y : column.x) * up[e / 2];
        }
    }
};

// The product of this CTA's rows and the columns from 128 n_tile on. Other warps may still read the last step; no copy comes.
template <class Form, bool UNSIGNED>
PX Product<Form> multiply(Stage (&stages)[STAGES<Form>], Factors& factors, const words4* qact, const words4* ascales,
                          const words4* qweight, const words4* wscales, const float* columns, int n_tile, int M, int K) {
    constexpr int AHEAD = Form::STEPS - 1;
    Source source(qact, ascales, qweight, wscales, n_tile, M, K);
    auto copy_step = [&](int at) {
#pragma unroll
        for (int i = 0; i < Form::GROUPS; i++)
            source.copy(stages[at * Form::GROUPS + i]);
    };
    fill(factors, ascales, M, K);                               // read behind the first barrier
    Product<Form> product{{}, factors, columns, n_tile};
    int offset[4];
    px::offset_bits(offset, K % 64);
    const int steps = K / (64 * Form::GROUPS);
#pragma unroll
    for (int step = 0; step < AHEAD; step++) {
        if (step < steps)
            copy_step(step);
        px::copy_commit();
    }
#pragma unroll 1
    for (int step = 0, at = 0, left = AHEAD; step < steps; step++) {
        px::copy_wait<AHEAD - 1>();
        px::barrier();
        if (step + AHEAD < steps)
            copy_step(left);
        px::copy_commit();                                      // empty at the end, so that the count above stays true
        product.sums.template add<UNSIGNED>(stages + at * Form::GROUPS, factors, offset);
        left = at;
        at = at == AHEAD ? 0 : at + 1;
    }
    return product;
}

}  // namespace w4a4_normal
