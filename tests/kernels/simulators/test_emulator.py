"""The CPU emulator itself: instructions against numpy and torch, and each kind of fault against a kernel that has it."""

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch

from svdq_pack.tests.kernels.simulators.emulator import build
from svdq_pack.tests.kernels.simulators.emulator.build import InOut, KernelFault, Rows

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
ORDERS = ["forward", "reverse", 1, 2]


def kernel(body, parameters="const u32* x, u32* y, int n", before=""):
    """launch(grid, block, args, shared_bytes=0, order=...) of a kernel with this body."""
    module = build.load(f'#include "ptx.cuh"\n{before}\nextern "C" __global__ void k({parameters}) {{\n'
                        f"    const int thread = threadIdx.x;\n{body}\n}}\n")
    return lambda grid, block, args, shared_bytes=0, order="forward": \
        module.launch("k", grid, block, shared_bytes, args, order)


def words(*shape):
    return np.zeros(shape, np.uint32)


def faulty(message, launch, *args, **more):
    with pytest.raises(KernelFault, match=message):
        launch(*args, **more)


# Instructions

LANES = [(lane // 4, lane % 4) for lane in range(32)]


@pytest.mark.parametrize("is_unsigned", [False, True])
def test_mma_i4(is_unsigned):
    """Element by element after the PTX ISA. a_i: row g or, for bit 3 of i, g + 8, column 8t + i % 8 + (32 for i >= 16)."""
    random = np.random.default_rng(int(is_unsigned))
    a = random.integers(0, 16, (16, 64)) if is_unsigned else random.integers(-8, 8, (16, 64))
    b = random.integers(-8, 8, (64, 8))
    a[0], b[:, 0] = (15 if is_unsigned else -8), -8             # the largest sums there are
    fragments, d = words(32, 6), np.zeros((32, 4), np.int32)
    for lane, (g, t) in enumerate(LANES):
        for i in range(32):
            code = a[g + (8 if i & 8 else 0), 8 * t + i % 8 + (32 if i >= 16 else 0)]
            fragments[lane, i // 8] |= np.uint32((int(code) & 15) << 4 * (i % 8))
        for i in range(16):
            code = b[8 * t + i % 8 + (32 if i >= 8 else 0), g]
            fragments[lane, 4 + i // 8] |= np.uint32((int(code) & 15) << 4 * (i % 8))
    launch = kernel(f"""
        x += 6 * thread;
        int d[4], c[4] = {{3, 3, 3, 3}};
        px::mma_i4<{'true' if is_unsigned else 'false'}>(d, words4{{x[0], x[1], x[2], x[3]}}, x[4], x[5], c);
        for (int i = 0; i < 4; i++)
            y[4 * thread + i] = d[i];""")
    launch(1, 32, [fragments, d, 0])
    want = a @ b + 3
    for lane, (g, t) in enumerate(LANES):
        for i in range(4):
            assert d[lane, i] == want[g + 8 * (i // 2), 2 * t + i % 2], (lane, i)


def test_mma_i8():
    """a_i: row g or, for bit 2 of i, g + 8, column 4t + i % 4 + (16 for i >= 8), a byte each."""
    random = np.random.default_rng(2)
    a, b, c = random.integers(-128, 128, (16, 32)), random.integers(-128, 128, (32, 8)), random.integers(-2**30, 2**30, (16, 8))
    a[0], b[:, 0] = -128, -128                                  # the largest sum there is
    fragments, d = np.zeros((32, 24), np.int8), np.zeros((32, 4), np.int32)
    for lane, (g, t) in enumerate(LANES):
        for i in range(16):
            fragments[lane, i] = a[g + (8 if i & 4 else 0), 4 * t + i % 4 + (16 if i >= 8 else 0)]
        for i in range(8):
            fragments[lane, 16 + i] = b[4 * t + i % 4 + (16 if i >= 4 else 0), g]
        for i in range(4):
            d[lane, i] = c[g + 8 * (i // 2), 2 * t + i % 2]
    launch = kernel("""
        x += 6 * thread, y += 4 * thread;
        const words4 a = {x[0], x[1], x[2], x[3]};
        int c[4] = {y[0], y[1], y[2], y[3]}, d[4];
        px::mma_i8(d, a, x[4], x[5], c);
        px::mma_i8(d, a, x[4], x[5], d);
        for (int i = 0; i < 4; i++)
            y[i] = d[i];""", "const u32* x, int* y")
    launch(1, 32, [fragments.view(np.uint32), InOut(d)])
    want = 2 * (a @ b) + c
    for lane, (g, t) in enumerate(LANES):
        for i in range(4):
            assert d[lane, i] == want[g + 8 * (i // 2), 2 * t + i % 2], (lane, i)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_half(dtype):
    """a_i: row g or, for bit 1 of i, g + 8, column 2t + i % 2 + (8 for i >= 4)."""
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    a[3, 4], b[5, 6], c[7, 1] = float("inf"), float("nan"), -float("inf")
    fragments, d = torch.zeros(32, 12, dtype=dtype), torch.zeros(32, 4)
    for lane, (g, t) in enumerate(LANES):
        for i in range(8):
            fragments[lane, i] = a[g + (8 if i & 2 else 0), 2 * t + i % 2 + (8 if i >= 4 else 0)]
        for i in range(4):
            fragments[lane, 8 + i] = b[2 * t + i % 2 + (8 if i >= 2 else 0), g]
            d[lane, i] = c[g + 8 * (i // 2), 2 * t + i % 2]
    launch = kernel(f"""
        x += 6 * thread, y += 4 * thread;
        float c[4] = {{y[0], y[1], y[2], y[3]}};
        px::mma_half<{'BF16' if dtype == torch.bfloat16 else 'FP16'}>(c, words4{{x[0], x[1], x[2], x[3]}}, x[4], x[5]);
        for (int i = 0; i < 4; i++)
            y[i] = c[i];""", "const u32* x, float* y")
    launch(1, 32, [fragments, InOut(d)])
    want = (a.double() @ b.double() + c.double()).float()
    got = torch.zeros(16, 8)
    for lane, (g, t) in enumerate(LANES):
        for i in range(4):
            got[g + 8 * (i // 2), 2 * t + i % 2] = d[lane, i]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_swap_lanes(mask):
    x, y = np.arange(64, dtype=np.uint32) * 3, words(64)
    for order in ORDERS:
        kernel("y[thread] = px::swap_lanes(x[thread], n);")(1, 64, [x, y, mask], order=order)
        np.testing.assert_array_equal(y, 3 * (np.arange(64) ^ mask))


HARD = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e6, -1e6, float("inf"), -float("inf"), float("nan"), 6e-8, 2.9e-8, 3e-8,
        6.1035e-5, 6.1e-5, 2.0**-25, 3 * 2.0**-25, 1e-40, 3.4e38, 2049.0, 2051.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_conversions(dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.tensor(HARD), torch.randn(2000) * torch.exp2(torch.randint(-30, 18, (2000,)).float())])
    x = x[:len(x) // 64 * 64]
    kind = "BF16" if dtype == torch.bfloat16 else "FP16"
    pairs, back = torch.zeros(len(x), dtype=dtype), torch.zeros(len(x))
    launch = kernel(f"""
        const u32 pair = px::pack_half<{kind}>(x[2 * thread], x[2 * thread + 1]);
        pairs[thread] = pair;
        back[2 * thread] = px::low_half<{kind}>(pair), back[2 * thread + 1] = px::high_half<{kind}>(pair);""",
                    "const float* x, u32* pairs, float* back")
    for i in range(0, len(x), 64):
        launch(1, 32, [x[i:i + 64], pairs[i:i + 64], back[i:i + 64]])
    want = x.to(dtype)
    torch.testing.assert_close(pairs, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, want.float(), rtol=0, atol=0, equal_nan=True)


def rounded_fp16(exact):
    """The nearest fp16 number to a Fraction, of two the one with an even mantissa."""
    if abs(exact) >= 65520:
        return np.float16(np.inf if exact > 0 else -np.inf)
    near = np.float16(float(exact))
    near = near if np.isfinite(near) else np.copysign(np.float16(65504), near)
    with np.errstate(over="ignore"):
        around = near, *(np.nextafter(near, np.float16(to)) for to in (-np.inf, np.inf))
    return min(filter(np.isfinite, around), key=lambda other: (abs(Fraction(float(other)) - exact), other.view(np.uint16) & 1))


def test_fma_fp16():
    """One rounding, where fp32 on the way would make it two; subnormals; the end of the numbers."""
    bits = np.random.default_rng(7).integers(0, 1 << 16, (3, 640), dtype=np.uint16)
    hard = np.array([[1 + 2**-10, 1 - 2**-10, 2050], [1 + 2**-10, 2**-10 - 1, -2050], [2.0**-24, 2.0**-24, 32752],
                     [2.0**-24, -2.0**-24, 2049], [2.0**-14, 2.0**-11, 2.0**-24], [-2.0**-14, 2.0**-11, 2.0**-24],
                     [181, 181, 32752], [256, 255.75, 64], [-256, 255.875, -16], [2.0**-24, 0.5, 0]]).T.astype(np.float16)
    bits[:, :hard.shape[1]] = hard.view(np.uint16)
    got = np.zeros(640, np.uint16)
    kernel("y[thread] = px::fma_fp16(x[thread], x[n + thread], x[2 * n + thread]);")(
        1, 320, [bits.view(np.uint32), got.view(np.uint32), 320])
    got = got.view(np.float16)
    for a, b, c, result in zip(*bits.view(np.float16), got, strict=True):
        if np.isfinite([a, b, c]).all():
            want = rounded_fp16(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))
            assert result == want, (a, b, c)
        else:
            with np.errstate(all="ignore"):
                np.testing.assert_equal(float(result), float(a) * float(b) + float(c))


def test_round_even():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 7.49999, 3e9, -3e9, np.nan, np.inf, -np.inf, 2147483520.0], np.float32)
    y = np.zeros(len(x), np.int32)
    kernel("y[thread] = px::round_even(x[thread]);", "const float* x, int* y")(1, len(x), [x, y])
    assert y.tolist() == [0, 2, 2, 0, -2, 7, 2**31 - 1, -2**31, 0, 2**31 - 1, -2**31, 2147483520]


def test_permute_bytes():
    y = words(3)
    kernel("y[thread] = px::permute_bytes(x[0], x[1], x[2 + thread]);")(
        1, 3, [np.array([0x33221100, 0x77665544, 0x3210, 0x7654, 0x3715], np.uint32), y, 0])
    assert [hex(value) for value in y] == ["0x33221100", "0x77665544", "0x33771155"]


# cp.async

RING = """
    __shared__ words4 ring[3][64];
    for (int i = 0; i < 2; i++) {
        px::copy16(&ring[i][thread], (const words4*)x + 64 * i + thread);
        px::copy_commit();
    }
    u32 sum = 0;
    for (int i = 0; i < n; i++) {
        WAIT
        px::barrier();
        if (i + 2 < n)
            px::copy16(&ring[FILL][thread], (const words4*)x + 64 * (i + 2) + thread);
        px::copy_commit();
        sum += ring[i % 3][thread ^ 33].x;
    }
    px::copy_wait<0>();
    y[thread] = sum;"""


def ring(wait="px::copy_wait<1>();", fill="(i + 2) % 3"):
    return kernel(RING.replace("WAIT", wait).replace("FILL", fill))


@pytest.mark.parametrize("order", ORDERS)
def test_ring(order):
    x, y = np.random.default_rng(0).integers(0, 1 << 20, (7, 64, 4)).astype(np.uint32), words(64)
    ring()(1, 64, [x, y, 7], order=order)
    np.testing.assert_array_equal(y, x[:, np.arange(64) ^ 33, 0].sum(0))


@pytest.mark.parametrize("order", ORDERS)
def test_ring_faults(order):
    x, y = words(7, 64, 4), words(64)
    faulty("has not landed", ring(wait=""), 1, 64, [x, y, 7], order=order)
    faulty("has not landed", ring(wait="px::copy_wait<2>();"), 1, 64, [x, y, 7], order=order)
    faulty("race", ring(fill="i % 3"), 1, 64, [x, y, 7], order=order)       # into the stage others still read
    faulty(r"reads 16 bytes at byte \d+ of x", ring(), 1, 64, [x[:6], y, 7], order=order)


@pytest.mark.parametrize("body, message", [
    ("px::copy16(s, x); px::copy_commit(); px::copy_wait<0>(); y[0] = s[1].x;", "nobody has written"),
    ("px::copy16(s, x); px::copy_wait<0>(); y[0] = s[0].x;", "has not landed"),           # in no group
    ("px::copy16(s, x); px::copy_commit(); s[0].y = 1;", "writes .* has not landed"),
    ("px::copy16(s, x); px::copy16(s, x);", "has not landed"),
    ("px::copy16(s, x); px::copy_commit();", "ends with a copy on its way"),
    ("px::copy16(s, x);", "ends with a copy in no group"),
    ("px::copy16((u32*)s + 1, x);", "not 16-byte aligned"),
    ("px::copy16(s, x + 1);", "not aligned"),
    ("px::copy16(s + 4, x);", "not 16 bytes of shared memory"),
    ("px::copy16(y, x);", "not 16 bytes of shared memory"),
    ("px::copy16(s, s + 1);", "which is shared memory"),
])
def test_copy_faults(body, message):
    faulty(message, kernel(f"__shared__ words4 s[4]; {body}"), 1, 1, [words(64), words(64), 0])


def test_copy_of_another_thread():
    """A thread waits for its own copies only: another's need a barrier too."""
    launch = kernel("""
        __shared__ words4 s[64];
        px::copy16(s + thread, (const words4*)x + thread);
        px::copy_commit();
        px::copy_wait<0>();
        y[thread] = s[63 - thread].x;""")
    for order in ORDERS:
        faulty("race|has not landed|nobody has written", launch, 1, 64, [words(64, 4), words(64), 0], order=order)


# Races

REDUCE = """
    __shared__ u32 sums[2];
    u32 sum = x[thread];
    for (int mask = 16; mask; mask /= 2)
        sum += px::swap_lanes(sum, mask);
    if (thread % 32 == 0)
        sums[thread / 32] = sum;
    FIRST
    y[thread] = sums[0] + sums[1];
    SECOND
    if (thread % 32 == 0)
        sums[thread / 32] = 0;"""


@pytest.mark.parametrize("order", ORDERS)
def test_reduction(order):
    def launch(first, second):
        return kernel(REDUCE.replace("FIRST", first).replace("SECOND", second))
    x, y = np.arange(64, dtype=np.uint32), words(64)
    launch("px::barrier();", "px::barrier();")(1, 64, [x, y, 0], order=order)
    assert (y == x.sum()).all()
    faulty("race|nobody has written", launch("", "px::barrier();"), 1, 64, [x, y, 0], order=order)
    faulty("race: (writes|reads) sums", launch("px::barrier();", ""), 1, 64, [x, y, 0], order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_order_within_a_warp(order):
    """Lanes run in any order until a collective of their warp brings them together."""
    body = "__shared__ u32 s[64]; s[thread] = x[thread]; {} y[thread] = s[thread ^ n];"
    x, y = np.arange(64, dtype=np.uint32), words(64)
    faulty("race|nobody has written", kernel(body.format("")), 1, 64, [x, y, 1], order=order)
    kernel(body.format("px::swap_lanes(0, 1);"))(1, 64, [x, y, 1], order=order)
    np.testing.assert_array_equal(y, x ^ 1)
    faulty("race|nobody has written", kernel(body.format("px::swap_lanes(0, 1);")), 1, 64, [x, y, 32], order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_same_word_by_two_threads(order):
    faulty("race: writes y", kernel("y[0] = thread;"), 1, 2, [words(1), words(1), 0], order=order)
    faulty("race: writes y.*another block", kernel("y[0] = 1;"), 2, 1, [words(1), words(1), 0], order=order)
    faulty("race", kernel("if (blockIdx.x) y[0] = 1; else y[1] = y[0];"), 2, 1, [words(1), InOut(words(2)), 0], order=order)
    kernel("((u8*)y)[thread] = thread;")(1, 4, [words(1), words(1), 0], order=order)      # bytes of one word are no race


def test_accumulating_blocks_race():
    faulty("race.*another block", kernel("y[thread] += 1;"), 2, 4, [words(1), InOut(words(4)), 0])


# Divergence

@pytest.mark.parametrize("body, message", [
    ("if (thread < 32)\n px::barrier();\n else\n px::barrier();",
     r"threads 0-31 wait at the barrier in \S+:6; threads 32-63 wait at the barrier in \S+:8"),
    ("if (thread < 63)\n px::barrier();", "threads 0-62 wait at the barrier in .*; threads 63 have ended"),
    ("if (thread == 5) return;\n y[thread] = px::swap_lanes(1, 1);",
     "threads 0-4 6-31 wait at the shuffle .*; threads 5 have ended"),
    ("if (thread & 1)\n y[thread] = px::swap_lanes(1, 1);\n else\n y[thread] = px::swap_lanes(2, 1);", "divergent"),
    ("if (thread < 40)\n px::swap_lanes(1, 1);\n px::barrier();", "stuck"),
    ("int d[4], c[4] = {};\n if (thread & 1)\n px::mma_i4<true>(d, words4{0, 0, 0, 0}, 0, 0, c);\n"
     "else\n px::mma_i4<false>(d, words4{0, 0, 0, 0}, 0, 0, c);\n y[thread] = d[0];", "divergent"),
    ("int c[4] = {};\n if (thread < 31)\n px::mma_i8(c, words4{0, 0, 0, 0}, 0, 0, c);\n y[thread] = c[0];",
     "wait at the 8-bit MMA"),
])
@pytest.mark.parametrize("order", ORDERS)
def test_divergence(body, message, order):
    faulty(message, kernel(body), 1, 64, [words(64), words(64), 0], order=order)


def test_partial_warp():
    faulty("stuck", kernel("y[thread] = px::swap_lanes(1, 1);"), 1, 16, [words(64), words(64), 0])
    kernel("px::barrier(); y[thread] = 1;")(1, 16, [words(1), words(16), 0])


def test_branches_that_meet():
    """A branch before a collective is no divergence, even where the compiler gives each side its own call."""
    body = "u32 v;\n if (thread & 1)\n v = x[thread] * 3;\n else\n v = x[thread] + n;\n y[thread] = px::swap_lanes(v, 1);"
    y = words(32)
    kernel(body)(1, 32, [np.arange(32, dtype=np.uint32), y, 5])
    assert y.tolist() == [(i ^ 1) * 3 if (i ^ 1) & 1 else (i ^ 1) + 5 for i in range(32)]


# Memory

@pytest.mark.parametrize("body, message", [
    ("y[thread] = x[thread + 1];",
     r"thread 63: reads 4 bytes at byte 256 of x, which has 256, in \S+:5, outside every buffer"),
    ("y[thread] = x[thread - 1];", "thread 0: reads 4 bytes at byte -4 of x"),
    ("y[thread + 100000] = 0;", "writes 4 bytes at byte 400000 of y"),
    ("y[thread] = *(u32*)((u8*)x + 253);", "not aligned"),
    ("y[thread] = ((words4*)(x + 1))->x;", "not aligned"),
    ("((u32*)x)[thread] = 0;", r"writes x\[0\], uint32 \[64\], in .*read-only"),
    ("y[thread] = y[thread] + 1;", r"reads y\[0\].*nobody has written"),
    ("y[thread] = *(u32*)(u64)(n + 1);", "reads 4 bytes at 0x4 "),
    ("y[thread] = ((words2*)(x + 62))[1].x;", "byte 256 of x"),
    ("__shared__ u32 s[64]; y[thread] = s[thread];", r"reads s \+ 0 bytes of shared memory in .*nobody has written"),
    ("__shared__ u32 s[64]; s[thread + n] = 0;", "index 64 .*outside its array"),
    ("extern __shared__ u32 s[]; s[thread + 1] = 0;", "writes 4 bytes at byte 256 of dynamic shared memory"),
    ("extern __shared__ u32 s[]; y[thread] = s[thread];", "nobody has written"),
    ("u32 a[4] = {1, 2, 3, 4}; y[thread] = a[n + thread];", "index 4 "),
    ("y[thread] = 1u << (n + thread);", "shift by 32 "),
    ("y[thread] = 1 / (n - 3 - thread);", "division by zero"),
    ("y[thread] = (int)(n * 1e9f);", "float beyond the integer"),
])
def test_memory_faults(body, message):
    faulty(message, kernel(body), 1, 64, [np.arange(64, dtype=np.uint32), words(64), 3], shared_bytes=256)


def test_fault_leaves_outputs_and_process():
    y = words(64)
    faulty("outside", kernel("y[thread] = 7; if (thread == 63) y[64] = 0;"), 1, 64, [words(1), y, 0])
    assert not y.any()
    kernel("y[thread] = 7;")(1, 64, [words(1), y, 0])
    assert (y == 7).all()


def test_report_names_the_line():
    helper = "PX u32 get(const u32* p, int i) {\n    return p[i];\n}"
    faulty(r"^k, block \(1, 0, 0\), thread 2: reads .* of x.* in \S+\.cuh:3 \(from \S+\.cuh:8\)",
           kernel("if (blockIdx.x == 1 && thread == 2)\ny[0] = get(x, 64);", before=helper), 2, 32, [words(64), words(1), 0])


def test_block_shapes():
    y = words(2, 3, 4, 2)
    kernel("y[((blockIdx.y * 3 + threadIdx.z) * 4 + threadIdx.y) * 2 + threadIdx.x] = blockDim.y * 10 + gridDim.y;")(
        (1, 2), (2, 4, 3), [words(1), y, 0])
    assert (y == 42).all()


def test_arguments():
    y = torch.zeros(8, dtype=torch.float64)
    kernel("y[0] = a, y[1] = b, y[2] = c, y[3] = d, y[4] = e, y[5] = !p;",
           "double* y, int a, u64 b, float c, bool d, u8 e, const u16* p")(1, 1, [y, -3, 1 << 40, 0.5, True, 255, None])
    assert y.tolist() == [-3, 2.0**40, 0.5, 1, 255, 1, 0, 0]
    launch = kernel("y[thread] = x[thread] + y[thread];")
    both = np.arange(4, dtype=np.uint32)
    launch(1, 4, [both, both, 0])                                       # an output over an input
    assert both.tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="overlaps"):
        launch(1, 3, [both[1:], both[:3], 0])
    with pytest.raises(ValueError, match="not contiguous"):
        launch(1, 2, [both[::2], words(2), 0])
    with pytest.raises(ValueError, match="3 arguments|Needs x, y, n"):
        launch(1, 2, [both, words(2)])


def test_rows():
    """Pointers in memory: an array of structs."""
    launch = kernel("y[thread] = 1; rows[thread].to[0] = rows[thread].from[0] + rows[thread].plus;",
                    "const Row* rows, u32* y", before="struct Row { const u32* from; u32* to; u64 plus; };")
    a, b, to = np.array([5], np.uint32), np.array([6], np.uint32), words(2)
    launch(1, 2, [Rows([(a, build.Out(to[:1]), 10), (b, build.Out(to[1:]), 20)]), words(2)])
    assert to.tolist() == [15, 26]
    by_value = kernel("y[thread] = all.rows[thread].from[0]; all.rows[thread].to[0] = all.rows[thread].plus;",
                      "const __grid_constant__ All all, u32* y",
                      before="struct Row { const u32* from; u32* to; u64 plus; }; struct All { Row rows[40]; };")
    by_value(1, 2, [Rows([(a, build.Out(to[:1]), 30), (b, build.Out(to[1:]), 40)]), words(2)])
    assert to.tolist() == [30, 40]
    faulty("read-only", launch, 1, 2, [Rows([(a, to[:1], 10), (b, to[1:], 20)]), words(2)])


# All of it

GEMM = """
    // y[16, 8 * blocks] = x x^T of s4: 2 warps share K, a ring of 2 stages, a sum through dynamic shared memory
    extern __shared__ alignas(16) u8 memory[];
    words4* stages = (words4*)memory;                           // [2][2 warps][32]
    float* sums = (float*)(memory + 2 * 2 * 512);               // [2 warps][128]
    const int warp = thread / 32, lane = thread % 32, block = blockIdx.x;
    const words4* b = (const words4*)x;
    float acc[4] = {0, 0, 0, 0};
    px::copy16(stages + thread, b + warp * 32 + lane);
    px::copy_commit();
    for (int i = 0; i < n; i++) {
        px::copy_wait<0>();
        px::barrier();
        if (i + 1 < n)
            px::copy16(stages + (i + 1) % 2 * 64 + thread, b + ((i + 1) * 2 + warp) * 32 + lane);
        px::copy_commit();
        const words4 a = stages[i % 2 * 64 + thread];
        int d[4], c[4] = {};
        px::mma_i4<false>(d, a, block ? a.y : a.x, block ? a.w : a.z, c);
        for (int j = 0; j < 4; j++)
            acc[j] += 0.1f * (float)d[j];
    }
    for (int j = 0; j < 4; j++)
        sums[warp * 128 + lane * 4 + j] = acc[j];
    px::barrier();
    for (int j = thread; j < 128; j += 64)
        y[block * 128 + j] = px::as_bits(sums[j] + sums[128 + j]);"""


def test_order_changes_nothing():
    launch = kernel(GEMM)
    a = np.random.default_rng(0).integers(-8, 8, (16, 6 * 64))
    packed = words(6, 32, 4)                                            # [group][lane][word]
    for lane, (g, t) in enumerate(LANES):
        for word in range(4):
            for i in range(8):
                k = np.arange(6) * 64 + word // 2 * 32 + 8 * t + i
                packed[:, lane, word] |= ((a[g + word % 2 * 8, k] & 15) << 4 * i).astype(np.uint32)
    outputs = []
    for order in ["forward", "reverse", *range(6)]:
        y = np.zeros((2, 32, 4), np.float32)
        launch(2, 64, [packed, y, 3], shared_bytes=2 * 2 * 512 + 1024, order=order)
        outputs.append(y)
    want = 0.1 * (a @ a.T)
    for lane, (g, t) in enumerate(LANES):
        for i in range(4):
            row, column = g + 8 * (i // 2), 2 * t + i % 2
            np.testing.assert_allclose(outputs[0][:, lane, i], want[row, [column, column + 8]], rtol=1e-5, atol=1e-4)
    assert all(np.array_equal(output, outputs[0]) for output in outputs)
