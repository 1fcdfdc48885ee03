"""The interpreter against numpy, one family of instructions at a time, on toy kernels that nvcc compiles; and that it
notices what is wrong with a kernel."""

import re
from functools import cache

import numpy as np
import pytest
import torch

from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.simulators.ptx.floats import add, narrow
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault, Module

pytestmark = toolchain.needs_nvcc
LANES = 32
ODD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 65520.0, -65520.0, 3e38, 0.5, 1.5, 2.5, -0.5, -1.5, 1e-8, 7.5, -8.5]


def run(source, *args, kernel="k", grid=1, block=LANES, shared=0, order="forward", arch="sm_80"):
    return Module(toolchain.ptx(source, arch)).launch(kernel, grid, block, shared, args, order)


def toy(signature, body):
    """A kernel k of one statement per thread; i is the thread."""
    return f"""#include "ptx.cuh"
    extern "C" __global__ void k({signature}) {{ const int i = threadIdx.x; {body} }}"""


@cache
def one_instruction(reads):
    """PTX of a kernel k that writes d from a, b and c, as far as it reads them, lane by lane; and its line for that."""
    inputs = ", ".join(f'"r"({name}[i])' for name in "abc"[:reads])
    operands = ", ".join(f"%{n}" for n in range(1 + reads))
    text = toolchain.ptx(toy("u32* d, const u32* a, const u32* b, const u32* c", (
        f'u32 r; asm volatile("INSTRUCTION {operands};" : "=r"(r) : {inputs}); d[i] = r;')))
    return text, re.search(r"INSTRUCTION (.*);", text)


def words(seed, n=LANES, top=2**32):
    return np.random.default_rng(seed).integers(0, top, n, dtype=np.uint64).astype(np.uint32)


def floats(seed, n=LANES, scale=3.0):
    """Random fp32 with all the odd ones among them."""
    random = np.random.default_rng(seed)
    values = (random.standard_normal(n) * scale ** random.integers(-8, 8, n)).astype(np.float32)
    values[random.permutation(n)[:len(ODD)]] = np.array(ODD, np.float32)
    return values


def same(got, expected):
    """Bit for bit, but one NaN is as good as another."""
    got, expected = np.asarray(got), np.asarray(expected, got.dtype)
    np.testing.assert_array_equal(got, expected)
    if got.dtype.kind == "f":
        number = ~np.isnan(got)
        np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(expected[number]))


def apply(text, *inputs):
    """What an instruction writes to %0 per lane, of 32-bit words %1 ...: nvcc compiles its surroundings, which do not depend on
    it, once for all."""
    ptx, line = one_instruction(len(inputs))
    registers = line[1].split(", ")
    instruction = re.sub(r"%(\d)", lambda operand: registers[int(operand[1])], text)
    d, inputs = np.zeros(LANES, np.uint32), [x.view(np.uint32) for x in inputs]
    Module(ptx.replace(line[0], f"{instruction};")).launch("k", 1, LANES, 0, [d, *inputs, *[d] * (3 - len(inputs))])
    return d


# Arithmetic

def test_integers():
    source = toy("u32* d, const u32* a, const u32* b", """
        const u32 x = a[i], y = b[i]; const int s = (int)x, t = (int)y; u32* to = d + i * 24;
        to[0] = x + y; to[1] = x - y; to[2] = x * y; to[3] = __umulhi(x, y); to[4] = __mulhi(s, t);
        to[5] = s / (t | 1); to[6] = s % (t | 1); to[7] = x / (y | 1); to[8] = x % (y | 1);
        to[9] = s < t ? s : t; to[10] = x < y ? y : x; to[11] = (u32)(((long long)s * t) >> 13);
        to[12] = (u32)(((u64)x * y + 7) >> 17); to[13] = x << (y & 31); to[14] = x >> (y & 31); to[15] = s >> (y & 31);
        to[16] = (x & y) ^ (~x | y << 3); to[17] = -s; to[18] = s < 0 ? -s : s; to[19] = __byte_perm(x, y, x >> 7);
        to[20] = __funnelshift_l(x, y, y & 31); to[21] = (int)(signed char)(x >> 8); to[22] = (u32)(short)x * 3;
        to[23] = (x >> 5 & 0x1ff) + (u32)((u64)(long long)s >> 40);""")
    a, b, d = words(1), words(2), np.zeros((LANES, 24), np.uint32)
    b[0], a[0] = 0, 0x80000000
    run(source, d, a, b)
    x, y = a.astype(object), b.astype(object)
    s, t = a.view(np.int32).astype(object), b.view(np.int32).astype(object)
    ushort = [int(v) for v in y & 31]

    def towards_zero(p, q):
        return np.array([abs(m) // abs(n) * (1 if (m < 0) == (n < 0) else -1) for m, n in zip(p, q, strict=True)], object)

    def perm(p, q, selector):
        eight = int(q) << 32 | int(p)
        byte = [eight >> 8 * (int(selector) >> 4 * n & 7) & 255 for n in range(4)]
        return sum(v << 8 * n for n, v in enumerate(byte))
    odd = t | 1                             # __byte_perm drops the bit that spreads the sign, prmt has it
    expected = [x + y, x - y, x * y, x * y >> 32, s * t >> 32, towards_zero(s, odd), s - towards_zero(s, odd) * odd,
                x // (y | 1), x % (y | 1), np.minimum(s, t), np.maximum(x, y), s * t >> 13, x * y + 7 >> 17,
                x << ushort, x >> ushort, s >> ushort, (x & y) ^ (~x | y << 3), -s, np.abs(s),
                np.array([perm(p, q, p >> 7) for p, q in zip(a, b, strict=True)], object),
                (y << 32 | x) << ushort >> 32, (x >> 8 & 255 ^ 128) - 128, ((x & 0xFFFF ^ 0x8000) - 0x8000) * 3,
                (x >> 5 & 0x1FF) + ((s & (1 << 64) - 1) >> 40)]
    for column, values in enumerate(expected):
        got = d[:, column].astype(object)
        assert (got == (values & 0xFFFFFFFF)).all(), column


def test_bytes_with_their_sign():
    a, b, selector = words(1), words(2), np.uint32(0xF81B)
    eight = np.stack((a, b), 1).view(np.uint8).reshape(LANES, 8)
    spread = np.where(eight & 128, 255, 0)
    expected = np.stack((spread[:, 3], eight[:, 1], spread[:, 0], spread[:, 7]), 1).astype(np.uint8).view(np.uint32)[:, 0]
    same(apply(f"prmt.b32 %0, %1, %2, {selector}", a, b), expected)


def test_lop3_of_every_table():
    a, b, c = words(3), words(4), words(5)
    for table in (0x80, 0x96, 0xE8, 0xCA, 0x1B, 0xFE, 0x00, 0xFF):
        expected = np.zeros(LANES, np.uint32)
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
            expected |= (table >> index & 1).astype(np.uint32) << np.uint32(bit)
        same(apply(f"lop3.b32 %0, %1, %2, %3, {table}", a, b, c), expected)


def test_shifts_clamp():
    a, n = words(6), np.resize([0, 1, 31, 32, 33, 255, 2**31], LANES).astype(np.uint32)
    small = np.minimum(n, 31)
    same(apply("shl.b32 %0, %1, %2", a, n), np.where(n > 31, 0, a << small))
    same(apply("shr.u32 %0, %1, %2", a, n), np.where(n > 31, 0, a >> small))
    same(apply("shr.s32 %0, %1, %2", a, n), (a.view(np.int32) >> small.astype(np.int32)).view(np.uint32))


@pytest.mark.parametrize("start, length", [(0, 4), (5, 9), (28, 4), (24, 16), (3, 0), (0, 32)])
def test_bit_fields(start, length):
    a, b = words(7), words(8)
    mask = (1 << length) - 1
    field = a.astype(np.uint64) >> start & mask
    same(apply(f"bfe.u32 %0, %1, {start}, {length}", a), field.astype(np.uint32))
    if start + length <= 32 and length:
        same(apply(f"bfe.s32 %0, %1, {start}, {length}", a),
             ((field.astype(np.int64) ^ 1 << length - 1) - (1 << length - 1)).astype(np.uint32))
    hole = np.uint32(mask << start & 0xFFFFFFFF)
    moved = (a.astype(np.uint64) << start).astype(np.uint32)
    same(apply(f"bfi.b32 %0, %1, %2, {start}, {length}", a, b), b & ~hole | moved & hole)


def test_float_arithmetic():
    a, b, c = floats(1), floats(2), floats(3)
    with np.errstate(all="ignore"):
        same(apply("add.f32 %0, %1, %2", a, b).view(np.float32), a + b)
        same(apply("sub.rn.f32 %0, %1, %2", a, b).view(np.float32), a - b)
        same(apply("mul.f32 %0, %1, %2", a, b).view(np.float32), a * b)
        same(apply("div.rn.f32 %0, %1, %2", a, b).view(np.float32), a / b)
        same(apply("rcp.rn.f32 %0, %1", a).view(np.float32), np.float32(1) / a)
        same(apply("ex2.approx.f32 %0, %1", a).view(np.float32), np.exp2(a.astype(np.float64)).astype(np.float32))
        same(apply("abs.f32 %0, %1", a).view(np.float32), np.abs(a))
        product = torch.addcmul(torch.tensor(c).double(), torch.tensor(a).double(), torch.tensor(b).double()).numpy()
        got = apply("fma.rn.f32 %0, %1, %2, %3", a, b, c).view(np.float32)
        finite = np.isfinite(got) & (got != 0)
        assert (np.abs(got - product)[finite] <= np.spacing(np.abs(got))[finite] * 0.5000001).all()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(product))


def test_flush_to_zero():
    a, b = np.resize(np.float32([1e-40, -1e-40, 1e-38, 2.0]), LANES), np.resize(np.float32([1.0, 0.01]), LANES)

    def flush(x):
        return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
    same(apply("mul.ftz.f32 %0, %1, %2", a, b).view(np.float32), flush(flush(a) * b))
    same(apply("mul.f32 %0, %1, %2", a, b).view(np.float32), a * b)


def test_fma_rounds_once():
    """Where a float64 sum rounded to fp32 would round twice: 1 + 2^-24 (a tie) + a little."""
    a, b = np.float32(1 + 2**-12), np.float32(2**-12 * (1 - 2**-12))       # a * b = 2^-12 - 2^-36
    for c, tiny in ((np.float32(1.0), 2.0**-60), (np.float32(1.0), -2.0**-60)):
        got = narrow(add(np.array([float(c) + 2.0**-24]), np.array([tiny])), "f32").view(np.float32)[0]
        assert got == (np.float32(1 + 2**-23) if tiny > 0 else np.float32(1.0))
        assert narrow(add(np.array([1 + 2.0**-8]), np.array([tiny])), "bf16")[0] == (0x3F81 if tiny > 0 else 0x3F80)
        assert narrow(add(np.array([1 + 2.0**-11]), np.array([tiny])), "f16")[0] == (0x3C01 if tiny > 0 else 0x3C00)
    x = np.full(LANES, a), np.full(LANES, b), np.full(LANES, np.float32(-(2**-12)))
    same(apply("fma.rn.f32 %0, %1, %2, %3", *x).view(np.float32), np.full(LANES, -(2.0**-36)))


def test_min_max_and_nan():
    a, b = floats(4), floats(5)
    a[:4], b[:4] = [0.0, -0.0, np.nan, 1.0], [-0.0, 0.0, 1.0, np.nan]
    for name, pick, zero in (("min", np.fmin, -0.0), ("max", np.fmax, 0.0)):
        expected = pick(a, b)
        expected[:2] = zero
        same(apply(f"{name}.f32 %0, %1, %2", a, b).view(np.float32)[:4], expected[:4])
        np.testing.assert_array_equal(apply(f"{name}.f32 %0, %1, %2", a, b).view(np.float32), expected)
        nan = apply(f"{name}.NaN.f32 %0, %1, %2", a, b).view(np.float32)
        np.testing.assert_array_equal(np.isnan(nan), np.isnan(a) | np.isnan(b))


@pytest.mark.parametrize("compare, function", [
    ("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal), ("eq", np.equal),
    ("ne", np.not_equal)])
def test_comparisons(compare, function):
    a, b = floats(6), floats(7)
    b[::3] = a[::3]
    ordered = ~(np.isnan(a) | np.isnan(b))
    text = "{{ .reg .pred p; setp.{}.{} p, %1, %2; selp.b32 %0, 1, 0, p; }}"
    same(apply(text.format(compare, "f32"), a, b), function(a, b) & ordered)
    same(apply(text.format(compare + "u", "f32"), a, b), function(a, b) | ~ordered)
    same(apply(text.format(compare, "s32"), a, b), function(a.view(np.int32), b.view(np.int32)))
    name = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}.get(compare, compare)
    same(apply(text.format(name, "u32"), a, b), function(a.view(np.uint32), b.view(np.uint32)))
    text = "{{ .reg .pred p, q; setp.gt.u32 q, %2, 2147483648; setp.{}.and.f32 p, %1, %2, !q; selp.b32 %0, 7, 3, p; }}"
    same(apply(text.format(compare), a, b), np.where(function(a, b) & ordered & ~(b.view(np.uint32) > 2**31), 7, 3))


# Conversions

def halves(x, dtype):
    return torch.tensor(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_float_to_half_pairs(name, dtype):
    low, high = floats(8), floats(9)
    low[:6] = np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 2**-24 * 1.5])        # ties
    got = apply(f"cvt.rn.{name}x2.f32 %0, %1, %2", high, low)
    for half, x in ((got & 0xFFFF, low), (got >> 16, high)):
        same(half[~np.isnan(x)], halves(x, dtype)[~np.isnan(x)])
        assert (half[np.isnan(x)] == 0x7FFF).all()


def test_half_to_float():
    pairs = words(10)
    source = toy("float* d, const u32* a", """
        d[4 * i] = px::low_half<FP16>(a[i]); d[4 * i + 1] = px::high_half<FP16>(a[i]);
        d[4 * i + 2] = px::low_half<BF16>(a[i]); d[4 * i + 3] = px::high_half<BF16>(a[i]);""")
    d = np.zeros((LANES, 4), np.float32)
    run(source, d, pairs)
    both = pairs.view(np.uint16).reshape(LANES, 2)
    same(d[:, :2], both.view(np.float16).astype(np.float32))
    same(d[:, 2:], (both.astype(np.uint32) << 16).view(np.float32))


def test_float_to_integer():
    a = floats(11)
    for mode, whole in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        signed = np.nan_to_num(np.clip(whole(a.astype(np.float64)), -2**31, 2**31 - 1), nan=0).astype(np.int32)
        same(apply(f"cvt.{mode}.s32.f32 %0, %1", a).view(np.int32), signed)
        unsigned = np.nan_to_num(np.clip(whole(a.astype(np.float64)), 0, 2**32 - 1), nan=0).astype(np.uint32)
        same(apply(f"cvt.{mode}.u32.f32 %0, %1", a), unsigned)
        same(apply(f"cvt.{mode}.f32.f32 %0, %1", a).view(np.float32), whole(a))


def test_integer_to_float():
    a = words(12)
    same(apply("cvt.rn.f32.s32 %0, %1", a).view(np.float32), a.view(np.int32).astype(np.float32))
    same(apply("cvt.rn.f32.u32 %0, %1", a).view(np.float32), a.astype(np.float32))


def test_pack_with_saturation():
    a, b, c = (np.random.default_rng(n).integers(-12, 20, LANES, dtype=np.int32) for n in range(3))
    for kind, low, high in (("s4", -8, 7), ("u4", 0, 15)):
        expected = (c.astype(np.int64) & 0xFFFFFF) << 8 | (np.clip(a, low, high) & 15) << 4 | np.clip(b, low, high) & 15
        same(apply(f"cvt.pack.sat.{kind}.s32.b32 %0, %1, %2, %3", a, b, c), expected.astype(np.uint32))


@pytest.mark.parametrize("name, dtype", [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_half_arithmetic(name, dtype):
    a, b, c = (halves(np.random.default_rng(n).standard_normal(64).astype(np.float32), dtype).view(np.uint32) for n in range(3))
    x, y, z = (torch.tensor(v.view(np.int16)).view(dtype).double() for v in (a, b, c))
    got = torch.tensor(apply(f"fma.rn.{name} %0, %1, %2, %3", a, b, c).view(np.int16)).view(dtype)
    assert torch.equal(got, (x * y + z).to(dtype))      # double is exact for these
    if name == "f16x2":
        got = torch.tensor(apply(f"mul.{name} %0, %1, %2", a, b).view(np.int16)).view(dtype)
        assert torch.equal(got, (x * y).to(dtype))


# Warps: fragments, shuffles, branches

def fragments(matrix, bits, k_half):
    """Words of an A operand [16, k] (for B pass its transpose [8, k]) by the table in ptx.cuh: -> [words, 32]."""
    per_word, rows = 32 // bits, matrix.shape[0] // 8
    out = np.zeros((2 * rows, LANES), np.uint32)
    for lane in range(LANES):
        g, t = lane // 4, lane % 4
        for word in range(2 * rows):
            row, start = g + 8 * (word % rows), k_half * (word // rows) + per_word * t
            for i in range(per_word):
                out[word, lane] |= np.uint32(int(matrix[row, start + i]) & (1 << bits) - 1) << np.uint32(bits * i)
    return out


MMA = """#include "ptx.cuh"
extern "C" __global__ void k(u32* d, const u32* a, const u32* b) {
    const int i = threadIdx.x;
    const words4 x = {a[i], a[32 + i], a[64 + i], a[96 + i]};
    CALL
    for (int e = 0; e < 4; e++) d[(i / 4 + e / 2 * 8) * 8 + i % 4 * 2 + e % 2] = (u32)c[e];
}"""


def mmas(source, arch):
    """The shapes of the MMAs in the PTX of a source, in order."""
    return re.findall(r"mma\.sync\.aligned\.(\w+)", toolchain.ptx(source, arch))


@pytest.mark.parametrize("arch, shapes", [("sm_75", ["m8n8k32"] * 4), ("sm_80", ["m16n8k64"])])
@pytest.mark.parametrize("unsigned", [False, True])
def test_mma_of_4_bit_integers(unsigned, arch, shapes):
    random = np.random.default_rng(13)
    a = random.integers(0, 16, (16, 64)) if unsigned else random.integers(-8, 8, (16, 64))
    b = random.integers(-8, 8, (64, 8))
    d = np.zeros((16, 8), np.int32)
    source = MMA.replace("CALL", f"""int c[4]; const int start[4] = {{-9, -9, -9, -9}};
    px::mma_i4<{str(unsigned).lower()}>(c, x, b[i], b[32 + i], start);""")
    assert mmas(source, arch) == shapes
    run(source, d, fragments(a, 4, 32), fragments(b.T, 4, 32), arch=arch)
    same(d, a @ b - 9)


def test_mma_of_8_bit_integers():
    random = np.random.default_rng(15)
    a, b = random.integers(-128, 128, (16, 32)), random.integers(-128, 128, (32, 8))
    a[0], b[:, 0] = -128, -128                                  # the largest sum there is
    d = np.zeros((16, 8), np.int32)
    twice = "int c[4] = {1, 2, 3, 4}; px::mma_i8(c, x, b[i], b[32 + i], c); px::mma_i8(c, x, b[i], b[32 + i], c);"
    run(MMA.replace("CALL", twice), d, fragments(a, 8, 16), fragments(b.T, 8, 16))
    start = np.arange(1, 5).reshape(2, 1, 1, 2) + np.zeros((2, 8, 4, 2), int)
    same(d, 2 * (a @ b) + start.reshape(16, 8))


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_sums_as_floats(arch):
    """On sm_80 by the bits of a float, which a sum starts at."""
    sums = np.array([0, 1, -1, 1040384, -1040384, 2**22 - 1, -(2**22) + 1, 12345] * 4, np.int32)
    d = np.zeros(LANES, np.float32)
    source = toy("float* d, const u32* a, int n", "int start[4]; px::start_sum(start, n); "
                 "d[i] = px::sum_value(start[i % 4] + (int)a[i]);")
    Module(toolchain.ptx(source, arch)).launch("k", 1, LANES, 0, (d, sums.view(np.uint32), 5))
    same(d, sums.astype(np.float32))


@pytest.mark.parametrize("unsigned", [False, True])
def test_mma_of_4_bit_integers_as_floats(unsigned):
    """Sums that start at the bits of a float; the largest of either sign are exact, also times a scale of 11 bits."""
    a = np.full((16, 64), 15 if unsigned else -8)
    b = np.repeat([[-8, 7, 1, 0, -1, 3, -8, 7]], 64, 0)
    scale = np.float32(2047 * 2.0**-21)
    source = MMA.replace("CALL", f"""float c[4]; int offset[4]; px::offset_bits(offset, 0);
    px::mma_i4_offset<{str(unsigned).lower()}>(c, x, b[i], b[32 + i], offset);
    const float scale = 2047 * 0x1p-21f;
    for (int e = 0; e < 4; e++) c[e] = px::fma(c[e], scale, -px::OFFSET * scale);""").replace("(u32)c[e]", "px::as_bits(c[e])")
    for arch in ("sm_75", "sm_80"):
        d = np.zeros((16, 8), np.uint32)
        assert "cvt.rn.f32.s32" not in toolchain.ptx(source, arch)
        run(source, d, fragments(a, 4, 32), fragments(b.T, 4, 32), arch=arch)
        same(d.view(np.float32), (a @ b * np.float64(scale)).astype(np.float32))


@pytest.mark.parametrize("signs", ["s4", "u4"])
def test_m8n8k32(signs):
    """By itself, with another start for each sum."""
    random, other = np.random.default_rng(19), words(20, 64, 1000).astype(np.int32).reshape(8, 8)
    a = random.integers(0, 16, (8, 32)) if signs == "u4" else random.integers(-8, 8, (8, 32))
    b = random.integers(-8, 8, (32, 8))
    source = f"""#include "ptx.cuh"
    extern "C" __global__ void k(int* d, const u32* a, const u32* b, const int* c) {{
        const int i = threadIdx.x, at = i / 4 * 8 + i % 4 * 2;
        px::mma_i4<{"true" if signs == "u4" else "false"}>(d[at], d[at + 1], a[i], b[i], c[at], c[at + 1]);
    }}"""
    assert f"m8n8k32.row.col.s32.{signs}.s4.s32" in toolchain.ptx(source, "sm_75")
    d = np.zeros((8, 8), np.int32)
    run(source, d, fragments(a, 4, 0), fragments(b.T, 4, 0), other, arch="sm_75")
    same(d, a @ b + other)


@pytest.mark.parametrize("name, dtype, arch, shapes", [
    ("BF16", torch.bfloat16, "sm_80", ["m16n8k16"]), ("FP16", torch.float16, "sm_80", ["m16n8k16"]),
    ("FP16", torch.float16, "sm_75", ["m16n8k8"] * 2)])
def test_mma_of_halves(name, dtype, arch, shapes):
    random = np.random.default_rng(14)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8)))
    ah, bh = (halves(m, dtype) for m in (a, b))
    d = np.full((16, 8), 7, np.uint32)
    source = MMA.replace("CALL", f"float c[4] = {{1, 1, 1, 1}}; px::mma_half<{name}>(c, x, b[i], b[32 + i]);")
    source = source.replace("(u32)c[e]", "px::as_bits(c[e])")
    assert mmas(source, arch) == shapes
    run(source, d, fragments(ah, 16, 8), fragments(bh.T, 16, 8), arch=arch)
    exact = torch.tensor(a).to(dtype).double() @ torch.tensor(b).to(dtype).double() + 1
    steps = dict(rtol=3e-7, atol=3e-7) if len(shapes) > 1 else dict(rtol=0, atol=0)         # rounded after each MMA
    np.testing.assert_allclose(d.view(np.float32), exact.float().numpy(), **steps)


@pytest.mark.parametrize("name", ["BF16", "FP16"])
def test_pairs_of_halves_on_sm_75(name):
    """Which has no instruction for a pair: packed and taken apart as sm_80 does."""
    source = toy("u32* pair, u32* low, u32* high, const float* a, const float* b", (
        f"pair[i] = px::pack_half<{name}>(a[i], b[i]); low[i] = px::as_bits(px::low_half<{name}>(pair[i]));"
        f"high[i] = px::as_bits(px::high_half<{name}>(pair[i]));"))
    a, b = floats(21), floats(22)
    got = {arch: [np.zeros(LANES, np.uint32) for _ in range(3)] for arch in ("sm_75", "sm_80")}
    for arch, outputs in got.items():
        run(source, *outputs, a, b, arch=arch)
    assert "x2.f32" not in toolchain.ptx(source, "sm_75") and "x2.f32" in toolchain.ptx(source, "sm_80")
    for old, new in zip(got["sm_75"], got["sm_80"], strict=True):
        np.testing.assert_array_equal(old, new)


def test_shuffles():
    a = words(15)
    lane = np.arange(LANES)
    for text, source in (("bfly", lane ^ 5), ("idx", np.full(LANES, 5)), ("down", np.where(lane + 5 < 32, lane + 5, lane))):
        same(apply(f"shfl.sync.{text}.b32 %0, %1, 5, 31, -1", a), a[source])
    same(apply("shfl.sync.up.b32 %0, %1, 5, 0, -1", a), a[np.where(lane >= 5, lane - 5, lane)])
    same(apply("shfl.sync.bfly.b32 %0, %1, 1, 0x1c03, -1", a), a[lane ^ 1])             # within quads


def test_branches_and_loops_meet_again():
    source = toy("u32* d, const u32* a", """
        u32 x = a[i], steps = 0;
        if (x & 1) { while (x > 1) { x = x & 1 ? 3 * x + 1 : x >> 1; if (++steps > 50) break; } }
        else if (x & 2) steps = x * 7;
        else return;
        d[i] = steps;""")
    a, d = words(16, top=1000), np.zeros(LANES, np.uint32)

    def collatz(x):
        steps = 0
        while x > 1:
            x, steps = 3 * x + 1 if x & 1 else x >> 1, steps + 1
            if steps > 50:
                break
        return steps
    run(source, d, a)
    same(d, [collatz(int(x)) if x & 1 else int(x) * 7 if x & 2 else 0 for x in a])


def test_a_shuffle_after_a_branch():
    source = toy("u32* d, const u32* a", """
        u32 x = a[i];
        const int count = x & 7; for (int n = 0; n < count; n++) x = x * 5 + (x & 4 ? 1 : 3);
        d[i] = px::swap_lanes(x, 16);""")
    a, d = words(17), np.zeros(LANES, np.uint32)
    run(source, d, a)
    expected = []
    for x in map(int, a):
        for _ in range(x & 7):
            x = (x * 5 + (1 if x & 4 else 3)) & 0xFFFFFFFF
        expected.append(x)
    same(d, np.array(expected, np.uint32)[np.arange(LANES) ^ 16])


def test_grid_structs_and_arguments():
    source = """#include "ptx.cuh"
    struct Item { const u16* from; u64 scale; };
    struct Items { Item item[9]; };
    extern "C" __global__ void k(ITEMS items, u32* d, int add, float times, unsigned char small) {
        const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * (blockIdx.x + gridDim.x * blockIdx.y));
        d[i] = (u32)((items[blockIdx.y].from[threadIdx.x] * items[blockIdx.y].scale + (u64)add) / 2 * (u64)times) + small;
    }"""
    first, d = np.arange(32, dtype=np.uint16), np.zeros(32 * 2 * 3 * 2, np.uint32)
    second = first[::-1].copy()
    by_value = source.replace("ITEMS", "Items").replace("items[", "items.item[")
    for text in (source.replace("ITEMS", "const Item*"), by_value):
        d[:] = 0
        run(text, [first, 3, second, 5], d, -2, 6.5, 9, grid=(3, 2), block=(32, 2))
        columns = np.stack([np.tile(first * 3, 6), np.tile(second * 5, 6)]).reshape(-1).astype(object)
        same(d, [((int(x) - 2) % 2**64 // 2 * 6 % 2**32 + 9) % 2**32 for x in columns])


def test_local_and_constant_arrays():
    source = """#include "ptx.cuh"
    __constant__ float table[5] = {1.5f, -2.0f, 4.0f, 8.0f, 0.25f};
    extern "C" __global__ void k(float* d, const u32* a) {
        const int i = threadIdx.x;
        float local[5];
        for (int j = 0; j < 5; j++) local[j] = 0;
        for (int j = 0; j < 16; j++) local[(a[i] >> j) % 5] += table[j % 5];
        for (int j = 0; j < 5; j++) d[i * 5 + j] = local[j];
    }"""
    a, d = words(18), np.zeros((LANES, 5), np.float32)
    run(source, d, a)
    expected = np.zeros_like(d)
    for lane in range(LANES):
        for j in range(16):
            expected[lane, (int(a[lane]) >> j) % 5] += [1.5, -2, 4, 8, 0.25][j % 5]
    same(d, expected)


# Memory

VECTORS = """#include "ptx.cuh"
extern "C" __global__ void k(words4* d, const words4* a, int n) {
    __shared__ words4 box[64];
    extern __shared__ u16 more[];
    const int i = threadIdx.x;
    box[i] = a[i];
    more[i] = (u16)i;
    BARRIER
    words4 x = box[n - 1 - i];
    const words2 y = *(const words2*)&box[n - 1 - i].z;
    x.x += y.y + more[n - 1 - i];
    d[i] = x;
}"""


@pytest.mark.parametrize("order", ["forward", "reverse", 1, 2])
def test_shared_memory_between_barriers(order):
    a, d = words(19, 256).reshape(64, 4), np.zeros((64, 4), np.uint32)
    run(VECTORS.replace("BARRIER", "px::barrier();"), d, a, 64, block=64, shared=128, order=order)
    expected = a[::-1].copy()
    expected[:, 0] += expected[:, 3] + np.arange(64, dtype=np.uint32)[::-1]
    same(d, expected)


def faults(message, source, *args, **how):
    with pytest.raises(Fault, match=message):
        run(source, *args, **how)


def test_a_missing_barrier_is_caught():
    a, d = words(20, 256).reshape(64, 4), np.zeros((64, 4), np.uint32)
    for order in ("forward", "reverse"):
        faults("never written|races", VECTORS.replace("BARRIER", ""), d, a, 64, block=64, shared=128, order=order)


def test_a_barrier_that_is_too_early_for_the_next_write_is_caught():
    """The second round writes what another warp may still read: no order of warps shows it in the values."""
    source = toy("u32* d, int n", """
        __shared__ u32 box[64];
        u32 sum = 0;
        #pragma unroll 1
        for (int round = 0; round < n; round++) { box[i] = i + round; px::barrier(); sum += box[63 - i]; AFTER }
        d[i] = sum;""")
    d = np.zeros(64, np.uint32)
    run(source.replace("AFTER", "px::barrier();"), d, 3, block=64)
    same(d, (63 - np.arange(64)) * 3 + 3)
    faults("shared byte .* races", source.replace("AFTER", ""), d, 3, block=64)


def test_lanes_of_one_warp_need_a_barrier_too():
    source = toy("u32* d", "__shared__ u32 box[32]; box[i] = i; SYNC d[i] = box[31 - i];")
    d = np.zeros(LANES, np.uint32)
    run(source.replace("SYNC", "__syncwarp();"), d)
    same(d, np.arange(LANES)[::-1])
    faults("races", source.replace("SYNC", ""), d)
    faults("different values", toy("u32* d", "__shared__ u32 box[1]; box[0] = i; px::barrier(); d[i] = box[0];"), d)


def test_reads_of_what_was_never_written_are_caught():
    d = np.zeros(LANES, np.uint32)
    source = toy("u32* d", "__shared__ u32 box[32]; if (i != 7) box[i] = i; px::barrier(); d[i] = box[31 - i];")
    faults("never written", source, d)
    source = toy("u32* d", 'u32 x; asm volatile("{ .reg .b32 z; TEXT }" : "=r"(x) : "r"(i)); d[i] = x;')
    faults("register.* lanes 0-31 never", source.replace("TEXT", "add.u32 %0, z, 1;"), d)
    text = ".reg .pred p; setp.ne.u32 p, %1, 5; @p mov.u32 z, 1; mov.b32 %0, z;"       # a move passes it on
    faults("lanes 5 never wrote", source.replace("TEXT", text), d)


@pytest.mark.parametrize("index", ["i + 1", "i - 1", "i + 100000"])
def test_accesses_outside_are_caught(index):
    d, a = np.zeros(LANES, np.uint32), words(21)
    faults("read of global byte|outside", toy("u32* d, const u32* a", f"d[i] = a[{index}];"), d, a)
    faults("outside", toy("u32* d, const u32* a", f"d[{index}] = a[i];"), d, a)
    faults("outside", toy("u32* d, const u32* a", f"__shared__ u32 box[32], other[32]; box[{index}] = a[i];"
                          "other[i] = 1; px::barrier(); d[i] = box[i] + other[i];"), d, a)


def test_other_wrong_accesses_are_caught():
    d, a = np.zeros(LANES * 2, np.uint32), words(22, 64)
    faults("not aligned", toy("u32* d, const u32* a", "d[i] = (u32)*(const u64*)(a + i);"), d, a)
    a.flags.writeable = False
    faults("read-only", toy("u32* d, u32* a", "a[i] = d[i];"), d, a)
    faults("races", toy("u32* d, const u32* a", "d[i] = a[blockIdx.x];"), d, a, grid=2)        # of two CTAs
    faults("races", toy("u32* d, const u32* a", "d[i] = 1; d[i + 32] = d[(i + 1) & 31];"), d, a)


# Copies in the background

COPY = """#include "ptx.cuh"
extern "C" __global__ void k(words4* d, const words4* a, int n) {
    __shared__ words4 ring[3][32];
    const int i = threadIdx.x;
    words4 sum = {0, 0, 0, 0};
    for (int j = 0; j < 2; j++) { px::copy16(&ring[j][i], a + j * 32 + i); px::copy_commit(); }
    #pragma unroll 1
    for (int j = 0; j < n; j++) {
        px::copy_wait<PENDING>();
        BARRIER
        const int next = j + 2;
        if (next < n) px::copy16(&ring[(next + SLOT) % 3][i], a + next * 32 + i);
        px::copy_commit();
        const words4 x = ring[j % 3][31 - i];
        sum.x += x.x; sum.y ^= x.y; sum.z += x.z; sum.w += x.w;
    }
    d[i] = sum;
}"""


def ring(pending=1, barrier="px::barrier();", slot=0):
    return COPY.replace("PENDING", str(pending)).replace("BARRIER", barrier).replace("SLOT", str(slot))


def test_a_ring_of_copies():
    a, d = words(23, 5 * 128).reshape(5, 32, 4), np.zeros((32, 4), np.uint32)
    run(ring(), d, a, 5)
    kept = a[:, ::-1]
    expected = kept.sum(0, dtype=np.uint32)
    expected[:, 1] = np.bitwise_xor.reduce(kept[..., 1])
    same(d, expected)


def test_mistakes_with_copies_are_caught():
    a, d = words(24, 5 * 128).reshape(5, 32, 4), np.zeros((32, 4), np.uint32)
    faults("nobody has waited for", ring(pending=2), d, a, 5)           # reads what is on its way
    faults("races", ring(barrier=""), d, a, 5)                          # another lane's copy: landed for that lane alone
    faults("races|nobody has waited", ring(slot=2), d, a, 5)            # into the stage that the last step reads
    faults("outside", ring(), d, a[:4].copy(), 5)
    source = toy("words4* d, const words4* a", "__shared__ words4 box[32]; px::copy16(&box[i], a + i); px::copy_commit();")
    faults("ends with a cp.async", source, d, a)


# PTX of other compilers

ADD = toy("u32* d, const u32* a", "d[i] = a[i] + 1;")


def adds(text, block=LANES):
    """Runs ADD from this PTX."""
    a, d = words(25, 64), np.zeros(64, np.uint32)
    Module(text).launch("k", 1, block, 0, [d, a])
    same(d[:block], a[:block] + np.uint32(1))


@pytest.mark.parametrize("line", [".loc\t1 2 3\n", ".loc 1 2 3 ",
                                  ".loc 1 2 3, function_name $L__info_string0, inlined_at 1 20 5\n"])
def test_source_lines_swallow_no_instruction(line):
    """No `;` ends them."""
    text, count = re.subn(r"^\t(?=[a-z@])", "\t" + line, toolchain.ptx(ADD), flags=re.M)
    assert count > 5
    adds(text)


def test_names_of_source_files_are_no_ptx():
    text = toolchain.ptx(ADD)
    for line in ('.file 1 "/a//b /* c; { = .cu"\n', '.file\t2 "d.cu", 1700000000, 77\n'):
        adds(text.replace(".visible .entry", line + ".visible .entry"))
        adds(re.sub(r"^\t(?=[a-z@])", "\t" + line, text, flags=re.M))
    with pytest.raises(Fault, match="unknown directive"):
        adds(re.sub(r"^\t(?=st)", "\t.loc somewhere\n", text, flags=re.M))


def test_launch_bounds_of_one_number():
    text = toolchain.ptx(ADD)
    for bounds in (".reqntid 64", ".maxntid 64", ".maxntid 32, 2"):
        bound = re.sub(r"\)\s*\{", f")\n{bounds}\n{{", text, count=1)
        adds(bound, 64)
        with pytest.raises(Fault, match="more than 64"):
            adds(bound, 96)


@pytest.mark.parametrize("form", [".ptr", ".ptr .global", ".ptr .align 4", ".ptr .global .align 1", ".ptr.global.align 16"])
def test_parameters_that_say_what_they_point_to(form):
    text, count = re.subn(r"(\.param \.u64) (?=k_param)", rf"\1 {form} ", toolchain.ptx(ADD))
    assert count == 2
    adds(text)


# Warps that do not come

def test_a_collective_without_the_whole_warp_is_caught():
    d = np.zeros(64, np.uint32)
    source = toy("u32* d", """if (i < 20) {
        u32 x; asm volatile("shfl.sync.bfly.b32 %0, %1, 1, 31, -1;" : "=r"(x) : "r"(i)); d[i] = x; }""")
    faults("never come", source, d)
    source = toy("u32* d", 'if (i < 20) { asm volatile("bar.sync 0;"); d[i] = 3; }')
    faults("never come", source, d)
    source = toy("u32* d", 'if (i < 32) { asm volatile("bar.sync 0;"); d[i] = 3; }')
    faults("wait at different places", source, d, block=64)


def test_what_is_unknown_says_so():
    d = np.zeros(LANES, np.uint32)
    faults(r"line \d+: atom.*unknown opcode|line \d+: red.*unknown opcode", toy("u32* d", "atomicAdd(d, 1u);"), d)
    strange = toolchain.ptx(toy("u32* d", 'u32 x; asm("add.u32 %0, %1, 1;" : "=r"(x) : "r"(i)); d[i] = x;'))
    for text, message in (("add.strange.u32", "unknown type"), ("add.u32.strange", "unknown modifier"), ("add.u32", None)):
        module = Module(strange.replace("add.u32", text))
        if message:
            with pytest.raises(Fault, match=message):
                module.launch("k", 1, LANES, 0, [d])
        else:
            module.launch("k", 1, LANES, 0, [d])
    faults("takes 1", toy("u32* d", "d[i] = 1;"), d, d)
    faults("overlaps", toy("u32* d, u32* a", "d[i] = 1;"), d, d[1:])
