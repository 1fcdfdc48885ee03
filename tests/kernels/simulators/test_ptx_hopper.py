"""The interpreter's sm_90 instructions against numpy, on toy kernels that nvcc compiles; and that it notices mistakes,
planted in the PTX or in the arguments."""

import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault, Module

pytestmark = toolchain.needs_nvcc
LANES, GROUP = 32, 128
ORDERS = ["forward", "reverse", 1, 2]

# All kernels are one source, so nvcc runs once: those of toys.cu, and those that this file makes of a pattern.

TOYS = Path(__file__).parent / "hopper_toys.cu"
KERNELS = {}


def kernel(name, signature, body):
    """Adds a kernel; i is the thread."""
    KERNELS[name] = f'KERNEL({name}, {signature}) {{ const int i = threadIdx.x; {body} }}\n'


@cache
def text():
    """Of all kernels that the file has added: not to be called on import."""
    return toolchain.ptx(TOYS.read_text() + "".join(KERNELS.values()), "sm_90a")


@cache
def module():
    return Module(text())


def run(name, *args, grid=1, block=LANES, shared=0, planted=None, **how):
    (planted or module()).launch(name, grid, block, shared, list(args), **how)


def planted(name, *changes):
    """The module with (regular expression, text) replaced in one kernel, everywhere."""
    start = text().index(f".entry {name}(")
    end = text().find(".visible .entry", start)
    part = text()[start:end if end > 0 else None]
    for pattern, instead in changes:
        part, count = re.subn(pattern, instead, part)
        assert count, f"{pattern} is not in {name}"
    return Module(text()[:text().index(".visible .entry")] + ".visible " + part)


def faults(message, name, *args, **how):
    with pytest.raises(Fault, match=message):
        run(name, *args, **how)


def words(seed, n=LANES, top=2**32):
    return np.random.default_rng(seed).integers(0, top, n, dtype=np.uint64).astype(np.uint32)


def same(got, expected):
    np.testing.assert_array_equal(got, np.asarray(expected, got.dtype))


# Lanes and warps

ASM = {
    "to_e4m3": "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, %1, %2; cvt.u32.u16 %0, h; }",
    "to_e5m2": "{ .reg .b16 h; cvt.rn.satfinite.e5m2x2.f32 h, %1, %2; cvt.u32.u16 %0, h; }",
    "half_to_e4m3": "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f16x2 h, %1; cvt.u32.u16 %0, h; }",
    "from_e4m3": "{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e4m3x2 %0, h; }",
    "from_e5m2": "{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e5m2x2 %0, h; }",
    "shf_l": "shf.l.wrap.b32 %0, %1, %2, %3;", "shf_r": "shf.r.clamp.b32 %0, %1, %2, %3;",
    "ballot": "{ .reg .pred p; setp.gt.u32 p, %1, %2; vote.sync.ballot.b32 %0, p, -1; }",
    "any": "{ .reg .pred p; setp.gt.u32 p, %1, %2; vote.sync.any.pred p, p, -1; selp.u32 %0, 1, 0, p; }",
    "all": "{ .reg .pred p; setp.gt.u32 p, %1, %2; vote.sync.all.pred p, !p, -1; selp.u32 %0, 1, 0, p; }",
    "elect": "{ .reg .pred p; .reg .b32 l; elect.sync l|p, -1; selp.u32 %0, 77, l, p; }",
    "bfi64": "{ .reg .b64 x, y; cvt.u64.u32 x, %1; mov.b64 y, {%2, %2}; bfi.b64 x, x, y, 20, 30; mov.b64 {%0, _}, x; }",
} | {f"redux_{op}_{kind}": f"redux.sync.{op}.{kind} %0, %1, -1;" for op, kind in (
    ("add", "u32"), ("min", "s32"), ("max", "u32"), ("and", "b32"), ("or", "b32"), ("xor", "b32"))}
for name, instruction in ASM.items():
    inputs = ", ".join(f'"r"({x}[i])' for x in "abc"[:max(map(int, re.findall(r"%([123])", instruction)), default=0)])
    kernel("lane_" + name, "u32* d, const u32* a, const u32* b, const u32* c",
           f'u32 r; asm volatile("{instruction}" : "=r"(r) : {inputs}); d[i] = r;')


def lanes(name, *inputs, block=LANES):
    d = np.zeros(block, np.uint32)
    inputs = [np.asarray(x).view(np.uint32) for x in inputs]
    run("lane_" + name, d, *inputs, *[d] * (3 - len(inputs)), block=block)
    return d


FLOATS = np.concatenate([
    np.float32([0, -0.0, 448, 449, 463.9, 464, 1e9, -1e9, np.inf, -np.inf, 2**-9, 2**-10, 1.5 * 2**-10, 2**-10 * 1.0001,
                3 * 2**-10, 0.0175, 1.0625, 1.1875, -1.0625, 57344, 61440, 2**-16, 2**-17, 1.5 * 2**-17, 240, 15.5, 16.5]),
    np.float32(np.random.default_rng(0).standard_normal(37) * 2.0 ** np.random.default_rng(1).integers(-12, 10, 37))])


@pytest.mark.parametrize("name, kind, top", [("e4m3", torch.float8_e4m3fn, 448), ("e5m2", torch.float8_e5m2, 57344)])
def test_fp8_conversions(name, kind, top):
    low, high = FLOATS, FLOATS[::-1].copy()
    got = lanes(f"to_{name}", high, low, block=64)
    expected = [torch.tensor(x).clamp(-top, top).to(kind).view(torch.uint8).numpy().astype(np.uint32) for x in (low, high)]
    same(got, expected[0] | expected[1] << 8)
    same(lanes(f"to_{name}", np.full(32, np.nan, np.float32), np.ones(32, np.float32)) >> 8, np.full(32, 0x7F))
    codes = np.arange(0, 256, 2, dtype=np.uint32)
    codes = codes | codes + 1 << 8
    got = lanes(f"from_{name}", codes, block=128).view(np.float16).astype(np.float32)
    expected = torch.arange(256, dtype=torch.uint8).view(kind).float().numpy()
    np.testing.assert_array_equal(got, expected)


def test_halves_to_fp8():
    pairs = np.random.default_rng(3).standard_normal(64).astype(np.float16) * 30
    expected = torch.tensor(pairs).float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    same(lanes("half_to_e4m3", pairs).astype(np.uint16).view(np.uint8), expected)


def test_funnel_shifts():
    a, b, n = words(1), words(2), words(3, top=64)
    both = (b.astype(object) << 32) | a.astype(object)
    same(lanes("shf_l", a, b, n), [int(v) << int(k % 32) >> 32 & 0xFFFFFFFF for v, k in zip(both, n, strict=True)])
    same(lanes("shf_r", a, b, n), [int(v) >> min(int(k), 32) & 0xFFFFFFFF for v, k in zip(both, n, strict=True)])


def test_64_bit_fields():
    a, b = words(1), words(2)
    whole = b.astype(object) | b.astype(object) << 32
    same(lanes("bfi64", a, b), (whole & ~(((1 << 30) - 1) << 20) | (a.astype(object) & (1 << 30) - 1) << 20) & 0xFFFFFFFF)


def test_votes_and_reductions_stay_within_a_warp():
    a, b = words(4, 96), words(5, 96)
    a[32:64], b[64:] = 0, 0
    more = (a > b).reshape(3, 32)
    per_warp = [(more * (1 << np.arange(32, dtype=np.uint64))).sum(1), more.any(1), (~more).all(1)]
    for name, value in zip(("ballot", "any", "all"), per_warp, strict=True):
        same(lanes(name, a, b, block=96), np.repeat(value, 32))
    s, u = a.view(np.int32).reshape(3, 32), a.reshape(3, 32)
    for name, value in (("add_u32", u.sum(1, dtype=np.uint32)), ("min_s32", s.min(1).view(np.uint32)), ("max_u32", u.max(1)),
                        ("and_b32", np.bitwise_and.reduce(u, 1)), ("or_b32", np.bitwise_or.reduce(u, 1)),
                        ("xor_b32", np.bitwise_xor.reduce(u, 1))):
        same(lanes("redux_" + name, a, block=96), np.repeat(value, 32))


def test_elect():
    same(lanes("elect", block=64), np.where(np.arange(64) % 32, 0, 77))


MATRICES = {"x4": 4, "x2": 2, "x1": 1}
for trans in ("", ".trans"):
    for count, n in MATRICES.items():
        regs = ", ".join(f"%{r}" for r in range(n))
        kernel(f"ldmatrix_{count}{trans[1:]}", "u32* d, const words4* a", f"""
            __shared__ words4 rows[64]; u32 r[4];
            rows[i] = a[i]; rows[32 + i] = a[32 + i]; __syncwarp();
            asm volatile("ldmatrix.sync.aligned.m8n8.{count}{trans}.shared.b16 {{{regs}}}, [%{n}];"
                : {", ".join(f'"=r"(r[{k}])' for k in range(n))} : "r"(at(&rows[i * 5 % 64])));
            for (int k = 0; k < {n}; k++) d[k * 32 + i] = r[k];""")
        regs = ", ".join(f"%{r + 1}" for r in range(n))
        kernel(f"stmatrix_{count}{trans[1:]}", "words4* d, const u32* a", f"""
            __shared__ words4 rows[32]; rows[i] = words4{{1, 2, 3, 4}}; __syncwarp();
            asm volatile("stmatrix.sync.aligned.m8n8.{count}{trans}.shared.b16 [%0], {{{regs}}};"
                :: "r"(at(&rows[i * 5 % 32])), {", ".join(f'"r"(a[{k} * 32 + i])' for k in range(n))} : "memory");
            __syncwarp(); d[i] = rows[i];""")


@pytest.mark.parametrize("trans", ["", "trans"])
@pytest.mark.parametrize("count", MATRICES)
def test_matrices_to_and_from_shared_memory(count, trans):
    n = MATRICES[count]
    a, d = words(6, 256).reshape(64, 4), np.zeros((n, 32), np.uint32)
    run(f"ldmatrix_{count}{trans}", d, a)
    rows = a.view(np.uint16)[np.arange(8 * n) * 5 % 64].reshape(n, 8, 8)
    rows = rows.swapaxes(1, 2) if trans else rows
    same(d.view(np.uint16).reshape(n, 8, 8), rows)              # lane 4g + t has row g, columns 2t and 2t + 1
    back, registers = np.zeros((32, 4), np.uint32), words(7, n * 32)
    run(f"stmatrix_{count}{trans}", back, registers)
    expected = np.tile(np.uint32([1, 2, 3, 4]), (32, 1)).view(np.uint16)
    matrices = registers.view(np.uint16).reshape(n, 8, 8)
    expected[np.arange(8 * n) * 5 % 32] = (matrices.swapaxes(1, 2) if trans else matrices).reshape(-1, 8)
    same(back.view(np.uint16), expected)


# wgmma

def product(name, n, kind, a_from, majors="0, 0", signs="1, 1", steps=1):
    """A kernel: d [n / 2][128] = a b + d, or, unless `adds`, a b, by one warpgroup.

    Operands come into shared memory by plain stores. a: 4 words per thread and step, or from_a of an image. Each step starts
    advance_a, advance_b further, in descriptor units.
    """
    k, size = ("32", 1) if kind[0] == "e" else ("16", 2)
    registers, parts = n // 2, 4 if a_from == "registers" else 1
    majors = "" if size == 1 else ", " + (majors.split(", ")[1] if parts == 4 else majors)
    types = kind if size == 1 else f"{kind}.{kind}"
    left = ", ".join(f"%{registers + j}" for j in range(parts))
    left, sources = (f"{{{left}}}", '"r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3])') if parts == 4 else (left, '"l"(from_a)')
    kernel(name, "float* d, const words4* a, const words4* b, int size_a, int size_b, u64 from_a, u64 from_b, "
           "int advance_a, int advance_b, int adds", f"""
        extern __shared__ __align__(1024) words4 memory[];
        float x[{registers}];
        #pragma unroll
        for (int j = 0; j < {registers}; j++) x[j] = d[j * 128 + i];
        for (int j = i; j < size_b; j += 128) memory[j] = b[j];
        if ({parts} == 1) for (int j = i; j < size_a; j += 128) memory[size_b + j] = a[j];
        proxy_fence(); __syncthreads();
        from_a += at(memory + size_b) >> 4; from_b += at(memory) >> 4;
        #pragma unroll 1
        for (int s = 0; s < {steps}; s++) {{
            u32 f[4];
            if ({parts} == 4) for (int j = 0; j < 4; j++) f[j] = ((const u32*)a)[(s * 4 + j) * 128 + i];
            fence();
            asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{registers + parts + 1}, 0; "
                "wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{types} {{{", ".join(f"%{j}" for j in range(registers))}}}, "
                "{left}, %{registers + parts}, p, {signs}{majors}; }}"
                : {", ".join(f'"+f"(x[{j}])' for j in range(registers))}
                : {sources}, "l"(from_b), "r"(adds | s) : "memory");
            commit();
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            from_a += advance_a; from_b += advance_b;
        }}
        #pragma unroll
        for (int j = 0; j < {registers}; j++) d[j * 128 + i] = x[j];""")


def fragments(a):
    """A [64, 32 bytes per step] -> words [steps, 4, 128]. Element by element, after the figures of 9.7.15.5.1.1."""
    per_word, out = 4 // a.itemsize, []
    for step in np.split(a, a.shape[1] * a.itemsize // 32, axis=1):
        words_ = np.zeros((4, GROUP, per_word), a.dtype)
        for thread in range(GROUP):
            warp, g, t = thread // 32, thread % 32 // 4, thread % 4
            for word in range(4):
                row, start = 16 * warp + g + 8 * (word % 2), (word // 2) * 4 * per_word + per_word * t
                words_[word, thread] = step[row, start:start + per_word]
        out.append(words_.view(np.uint32)[..., 0])
    return np.ascontiguousarray(np.stack(out))


def accumulators(d):
    """d [n / 2, 128] -> [64, n], after the same."""
    out = np.zeros((64, 2 * len(d)), d.dtype)
    for thread in range(GROUP):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for register in range(len(d)):
            out[16 * warp + g + register // 2 % 2 * 8, register // 4 * 8 + 2 * t + register % 2] = d[register, thread]
    return out


MODES = {"none": (0, 1, 0), "32": (3, 2, 1), "64": (2, 4, 2), "128": (1, 8, 3)}   # -> descriptor bits, W, bits of the XOR


def image(matrix, major, swizzle, leading, stride):
    """The bytes of a matrix operand [M or N, K] in shared memory, after the table of canonical layouts in 9.7.15.5.1.2.

        MN-major   none  ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))        else  ((T,W,m),(8,k)):((1,T,LBO),(WT,SBO))
        K-major    none  ((8,m),(T,2k)):((1T,SBO),(1,LBO))           else  ((8,m),(T,2k)):((WT,SBO),(1,T))
    """
    size = matrix.itemsize
    T, (_, W, bits) = 16 // size, MODES[swizzle]
    leading, stride = leading // size, stride // size
    (row, column), plain = np.indices(matrix.shape), swizzle == "none"
    if major == "k":
        place = row % 8 * W * T + row // 8 * stride + column % T + column // T * (leading if plain else T)
    else:
        place = row % T + row // T % W * T + row // (T * W) * (stride if plain else leading)
        place += column % 8 * W * T + column // 8 * (leading if plain else stride)
    byte = place * size
    byte ^= (byte >> 7 & (1 << bits) - 1) << 4
    out = np.zeros(-(-(byte.max() + size) // 16) * 16, np.uint8)
    for k in range(size):
        out[byte + k] = matrix.view(np.uint8).reshape(*matrix.shape, size)[..., k]
    assert len(np.unique(byte)) == byte.size
    return out


def descriptor(swizzle, leading, stride, start=0):
    """Of 9.7.15.5.1.2.2. start: in bytes from a 1024-byte boundary, from which the swizzle counts."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | (start >> 7 & 7) << 49 | MODES[swizzle][0] << 62


def fp8(seed, shape, kind, scale=1.0):
    """Random codes, and their values."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    codes = torch.tensor(values).float().to(TYPES[kind])
    return codes.view(torch.uint8).numpy(), codes.double().numpy()


def halves(seed, shape, kind):
    values = torch.tensor(np.random.default_rng(seed).standard_normal(shape)).to(TYPES[kind])
    return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()


def launch(name, n, a, b, from_a, from_b, advance_a, advance_b, old=None, **how):
    """A kernel of `product` -> [64, n] fp32. a: fragments or an image, b: an image; from_a, from_b: their descriptors"""
    index = accumulators(np.arange(n // 2 * GROUP).reshape(n // 2, GROUP))
    registers = np.zeros((n // 2, GROUP), np.float32)
    registers.reshape(-1)[index] = 0 if old is None else old
    a, b = (np.pad(memory, (0, -len(memory) % 1024)) for memory in (a.reshape(-1).view(np.uint8), b))
    run(name, registers, a, b, len(a) // 16, len(b) // 16, from_a, from_b, advance_a, advance_b, int(old is not None),
        block=GROUP, shared=len(a) + len(b), **how)
    return registers.reshape(-1)[index]


def multiply(name, a, b, swizzle="128", strides=(16, 1024), advance=2, major="k", stored=None, fp8_bits=None, **how):
    """old + a b^T, a in registers. stored: a swizzle other than what the descriptor says"""
    memory = image(b, major, stored or swizzle, *strides)
    return launch(name, len(b), fragments(a), memory, 0, descriptor(swizzle, *strides), 0, advance, fp8_bits=fp8_bits, **how)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "f16": torch.float16}
for n in (8, 24, 128, 256):
    product(f"fp8_{n}", n, "e4m3.e4m3", "registers", steps=2)
for kinds in ("e4m3.e5m2", "e5m2.e4m3", "e5m2.e5m2"):
    product("fp8_" + kinds.replace(".", "_"), 16, kinds, "registers", signs="-1, 1")
product("fp8_shared", 64, "e4m3.e4m3", "shared", steps=2)
for half in ("bf16", "f16"):
    product(f"half_{half}", 128, half, "registers", steps=2)
product("half_mn", 64, "bf16", "registers", majors="0, 1", steps=2, signs="1, -1")
product("half_shared_mn", 64, "bf16", "shared", majors="1, 1", steps=2)


@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_wgmma_of_fp8_from_registers(n):
    a, x = fp8(1, (64, 64), "e4m3")
    b, y = fp8(2, (n, 64), "e4m3")
    old = np.random.default_rng(3).standard_normal((64, n)).astype(np.float32)
    close(multiply(f"fp8_{n}", a, b), x @ y.T)
    close(multiply(f"fp8_{n}", a, b, old=old), x @ y.T + old)


@pytest.mark.parametrize("kinds", ["e4m3.e5m2", "e5m2.e4m3", "e5m2.e5m2"])
def test_wgmma_of_both_fp8_types_and_a_sign(kinds):
    left, right = kinds.split(".")
    a, x = fp8(1, (64, 32), left)
    b, y = fp8(2, (16, 32), right)
    close(multiply("fp8_" + kinds.replace(".", "_"), a, b), -x @ y.T)


# swizzle, (leading, stride), advance to the next 32 bytes of k in 16 bytes
K_LAYOUTS = [("128", (16, 1024), 2), ("128", (0, 2048), 2), ("64", (16, 512), 2), ("32", (16, 256), 128),
             ("none", (128, 1024), 16), ("none", (1024, 128), 128)]


@pytest.mark.parametrize("start", [0, 256, 896])
@pytest.mark.parametrize("swizzle, strides, advance", K_LAYOUTS)
def test_wgmma_operands_along_k(swizzle, strides, advance, start):
    """Both in shared memory, two steps; where a row of the atom is 32 bytes, the second step is in other atoms."""
    a, x = fp8(1, (64, 64), "e4m3")
    b, y = fp8(2, (64, 64), "e4m3")

    def stored(matrix):
        steps = [matrix] if swizzle != "32" else np.split(matrix, 2, axis=1)
        parts = [image(part, "k", swizzle, *strides) for part in steps]
        return np.concatenate([np.zeros(start, np.uint8), *(np.pad(part, (0, -len(part) % 16)) for part in parts)])
    where = descriptor(swizzle, *strides, 0 if swizzle == "none" else start) | (start >> 4)
    got = launch("fp8_shared", 64, stored(a), stored(b), where, where, advance, advance, fp8_bits=None)
    close(got, x @ y.T)


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_wgmma_of_halves(half):
    a, x = halves(1, (64, 32), half)
    b, y = halves(2, (128, 32), half)
    old = np.random.default_rng(3).standard_normal((64, 128)).astype(np.float32)
    close(multiply(f"half_{half}", a, b, old=old), x @ y.T + old)
    close(multiply(f"half_{half}", a, b, "none", (128, 512), 16), x @ y.T)


# leading: to the next rows, stride: to the next 8 of k; without a swizzle the other way round
MN_LAYOUTS = [("128", (16, 1024), 128), ("64", (2048, 512), 64), ("64", (512, 1024), 128), ("32", (1024, 256), 32),
              ("none", (1024, 128), 128)]


@pytest.mark.parametrize("swizzle, strides, advance", MN_LAYOUTS)
def test_wgmma_operands_along_m_and_n(swizzle, strides, advance):
    """Rows contiguous: of B, then of both. 16 of k are two atoms."""
    a, x = halves(1, (64, 32), "bf16")
    b, y = halves(2, (64, 32), "bf16")
    close(multiply("half_mn", a, b, swizzle, strides, advance, "mn"), -x @ y.T)
    left, right = (image(matrix, "mn", swizzle, *strides) for matrix in (a, b))
    where = descriptor(swizzle, *strides)
    close(launch("half_shared_mn", 64, left, right, where, where, advance, advance), x @ y.T)


def test_a_wrong_layout_gives_a_wrong_product():
    """The tests above would show it."""
    a, x = fp8(1, (64, 64), "e4m3")
    b, y = fp8(2, (8, 64), "e4m3")
    close(multiply("fp8_8", a, b), x @ y.T)
    for wrong in (multiply("fp8_8", a, b, strides=(128, 1024), stored="none"), multiply("fp8_8", a, b, "64", stored="128"),
                  multiply("fp8_8", np.roll(a, 4, axis=1), b), multiply("fp8_8", a[np.arange(64) ^ 8], b)):
        assert np.abs(wrong - x @ y.T).max() > 0.1


# FP8 sums: design 4.5. Products and accumulator aligned to the largest, 13 fraction bits, truncated; the sum likewise.

def truncated(a, b, c, bits=13):
    """One dot product of e4m3 values by the words of arXiv 2511.10909, in Python's own numbers."""
    def parts(v, low):
        significand, exponent = math.frexp(v)
        significand, exponent = significand * 2, exponent - 1
        return (significand * 2.0 ** (exponent - low), low) if exponent < low else (significand, exponent)
    terms = []
    for x, y in zip(a, b, strict=True):
        (sx, ex), (sy, ey) = parts(x, -6), parts(y, -6)
        terms.append((sx * sy, ex + ey))
    terms.append(parts(c, -126))
    top = max((e for s, e in terms if s), default=0)
    total = sum(math.trunc(s * 2.0 ** (bits + e - top)) for s, e in terms) * 2.0 ** (top - bits)
    if not total:
        return 0.0
    _, exponent = math.frexp(total)
    unit = 2.0 ** (exponent - 1 - bits)
    return math.trunc(total / unit) * unit


def test_fp8_sums_are_truncated_as_on_hopper():
    a, x = fp8(4, (64, 64), "e4m3", 8.0)
    b, y = fp8(5, (8, 64), "e4m3", 0.3)
    a[:, :3], x[:, :3] = 0, 0
    got = multiply("fp8_8", a, b, fp8_bits=13)
    expected = np.zeros((64, 8))
    for i, j in np.ndindex(64, 8):
        for k in (0, 32):
            expected[i, j] = truncated(x[i, k:k + 32], y[j, k:k + 32], expected[i, j])
    same(got, expected)
    exact = x @ y.T
    assert 1e-6 < np.abs(got - exact).max() / np.abs(exact).max() < 2e-3
    assert not np.array_equal(got, multiply("fp8_8", a, b))


@pytest.mark.parametrize("unsigned", [False, True])
def test_integer_sums_below_2_14_are_exact(unsigned):
    """Bytes 0..15 are the integers in units of 2^-9. A group of 64: at most 64 * 15 * 8. Rows are worst cases and random."""
    random = np.random.default_rng(6)
    top, bottom = (15, 0) if unsigned else (7, -7)
    codes = random.integers(bottom, top + 1, (8, 64))
    weights = random.integers(-8, 8, (64, 64))
    codes[0], codes[1], codes[2, ::2] = top, bottom, top
    weights[0], weights[1], weights[2] = -8, 7, np.where(np.arange(64) % 2, 7, -8)

    def byte(v):
        return (np.abs(v) | np.where(v < 0, 0x80, 0)).astype(np.uint8)
    exact = weights @ codes.T
    assert np.abs(exact).max() == (7680 if unsigned else 3584)
    same(multiply("fp8_8", byte(weights), byte(codes), fp8_bits=13) * 2.0**18, exact)


def test_integer_sums_are_exact_up_to_2_14_and_no_further():
    """An accumulator of 2^14 - 1 and of 2^14, plus 1: the second is cut."""
    a, b, old = np.zeros((64, 64), np.uint8), np.zeros((8, 64), np.uint8), np.zeros((64, 8), np.float32)
    a[:, 0], b[:, 0] = 1, 1
    old[:32], old[32:] = (2**14 - 2) * 2.0**-18, 2.0**14 * 2.0**-18
    got = multiply("fp8_8", a, b, old=old, fp8_bits=13) * 2.0**18
    same(got[:32], np.full((32, 8), 2**14 - 1))
    same(got[32:], np.full((32, 8), 2**14))
    same(multiply("fp8_8", a, b, old=old) * 2.0**18, old * 2.0**18 + 1)


# Registers of a wgmma

def misuse(name, body):
    """m64n8k32: fragment `f` of a, descriptor `from` of b; accumulators x, which start at 1, 2, 3, 4, and y, at 0 or 1."""
    kernel(name, "float* d, const u32* a, const words4* b, u64 from", f"""
        __shared__ __align__(1024) words4 memory[64];
        if (i < 64) memory[i] = b[i];
        proxy_fence(); __syncthreads();
        from += at(memory) >> 4;
        u32 f[4]; float x[4] = {{1, 2, 3, 4}}, y[4];
        for (int j = 0; j < 4; j++) f[j] = a[j * 128 + i], y[j] = a[j * 128 + i] & 1;
        {body}
        for (int j = 0; j < 4; j++) d[j * 128 + i] = x[j], d[(4 + j) * 128 + i] = y[j];""")


def asm(text, accumulator, inputs=""):
    outputs = ", ".join(f'"+f"({accumulator}[{j}])' for j in range(4))
    return f'asm volatile("{text}" : {outputs} : {inputs} : "memory");'


def wgmma(accumulator, types="k32.f32.e4m3.e4m3", immediates="1, 1, 1"):
    return asm(f"wgmma.mma_async.sync.aligned.m64n8{types} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, %8, {immediates};",
               accumulator, '"r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "l"(from)')


def wait(accumulator, keep=0):
    return asm(f"wgmma.wait_group.sync.aligned {keep};", accumulator)


DOUBLE = "for (int j = 0; j < 4; j++) x[j] *= 2;"
SECOND = 'asm volatile("wgmma.fence.sync.aligned; /*second*/" ::: "memory");'
misuse("two_groups", f'fence(); {wgmma("x")} commit(); {wgmma("y")} commit(); {wait("x", 1)} {DOUBLE} {wait("y")}')
misuse("one_chain", f'fence(); {wgmma("x")} commit(); {wgmma("x")} commit(); {wait("x")} {DOUBLE}')
misuse("two_rounds", f'fence(); {wgmma("x")} commit(); {wait("x")} {DOUBLE} {SECOND} {wgmma("x")} commit(); {wait("x")}')
misuse("two_shapes", f'fence(); {wgmma("x")} {SECOND} {wgmma("x", "k16.f32.bf16.bf16", "1, 1, 1, 0")} commit(); {wait("x")}')
misuse("fragment", f"""fence();
    asm volatile("/*fenced %0*/" :: "r"(f[0]));
    {wgmma("x")} commit();
    asm volatile("/*early %0*/" :: "r"(f[0]));
    {wait("x")}
    asm volatile("/*late %0*/" :: "r"(f[0]));""")
misuse("skewed", f'from += i < 64 ? 0 : (u64)d[0]; fence(); {wgmma("x")} commit(); {wait("x")}')


def operands(first=0):
    """Arguments of a misuse, the product of a and b."""
    a, x = fp8(1, (64, 32), "e4m3")
    b, y = fp8(2, (8, 32), "e4m3")
    memory = np.zeros(1024, np.uint8)
    stored = image(b, "k", "128", 16, 1024)
    memory[:len(stored)] = stored
    return (np.full((8, GROUP), first, np.float32), fragments(a)[0], memory, descriptor("128", 16, 1024)), x @ y.T


def test_groups_of_wgmma_end_in_order():
    args, exact = operands()
    run("two_groups", *args, block=GROUP, fp8_bits=None)
    close(accumulators(args[0][:4]), 2 * (accumulators(np.repeat(np.float32([[1], [2], [3], [4]]), GROUP, 1)) + exact))
    close(accumulators(args[0][4:]), accumulators((args[1] & 1).astype(np.float32)) + exact)


def test_mistakes_with_registers_of_wgmma_are_caught():
    args, _ = operands()
    for name in ("two_groups", "one_chain", "two_rounds", "two_shapes", "fragment"):
        run(name, *args, block=GROUP)
    waited, fenced, add = "nobody has waited for", "after the last wgmma.fence", r"add.u32 \1, \1, 1;"
    for message, name, *change in [
            (waited, "two_groups", r"wait_group.sync.aligned 1", "wait_group.sync.aligned 2"),
            (waited, "two_groups", r"wgmma.wait_group.sync.aligned 0;", ""),
            (waited, "one_chain", r"wait_group.sync.aligned 0", "wait_group.sync.aligned 1"),
            (waited, "one_chain", r"wgmma.commit_group.sync.aligned;", ""),          # nothing to wait for
            (fenced, "two_rounds", r".*/\*second\*/", ""),
            ("no wgmma.fence before", "two_rounds", r"wgmma.fence.sync.aligned;", ""),
            ("no wgmma.fence between", "two_shapes", r".*/\*second\*/", ""),
            (fenced, "fragment", r"/\*fenced (%r\d+)\*/", add), (waited, "fragment", r"/\*early (%r\d+)\*/", add)]:
        faults(message, name, *args, block=GROUP, planted=planted(name, change))
    run("fragment", *args, block=GROUP, planted=planted("fragment", (r"/\*late (%r\d+)\*/", add)))
    move = r"mov.u32 \1, \1;"                          # the compiler's own business before a wgmma, not during one
    run("fragment", *args, block=GROUP, planted=planted("fragment", (r"/\*fenced (%r\d+)\*/", move)))
    faults(waited, "fragment", *args, block=GROUP, planted=planted("fragment", (r"/\*early (%r\d+)\*/", move)))


def test_mistakes_with_operands_of_wgmma_are_caught():
    (d, a, memory, where), _ = operands()

    def caught(message, *changes, name="fragment", where=where, d=d, block=GROUP):
        faults(message, name, d, a, memory, where, block=block, planted=planted(name, *changes) if changes else None)
    caught("no fence.proxy.async between", (r"fence.proxy.async;", ""))
    caught("races", (r"bar.sync\s+0;", ""))
    caught("outside of every array", where=where + (1024 >> 4))
    caught("never wrote|never written", (r"ld.global.u32", "@!%p1 ld.global.u32"))
    caught("no warpgroup", block=64)
    run("skewed", d, a, memory, where, block=GROUP)
    caught("different values for one matrix descriptor", name="skewed", d=np.ones_like(d))


# Barriers

@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers(order):
    a, d = words(8, 3 * 64).reshape(3, 64), np.zeros(128, np.uint32)
    run("handoff", d, a, 128, 1, block=128, order=order)
    same(d[64:], a[:, ::-1].sum(0, dtype=np.uint32))


def test_mistakes_with_named_barriers_are_caught():
    a, d = words(8, 3 * 64).reshape(3, 64), np.zeros(128, np.uint32)
    faults("for .* threads, while others arrived at it for", "handoff", d, a, 96, 1, block=128)
    faults("deadlock", "handoff", d, a, 128, 3, block=128)
    faults("there are 16", "handoff", d, a, 128, 16, block=128)
    faults("races|never written", "handoff", d, a, 128, 1, block=128, planted=planted("handoff", (r".*/\*filled\*/", "")))
    faults("twice|races", "handoff", d, a, 128, 1, block=128, planted=planted("handoff", (r".*/\*emptied\*/", "")))


@pytest.mark.parametrize("order", ORDERS)
def test_phases_of_an_mbarrier(order):
    d, seen = np.full(128, 9, np.uint32), np.zeros(64, np.uint64)
    run("states", d, seen, block=64, order=order)
    same(d, np.repeat([0, 5], 64))                               # phase 0 is over; parity 1 is the phase that runs
    same(seen, np.full(64, 7))


def test_mistakes_with_an_mbarrier_are_caught():
    d, seen = np.full(128, 9, np.uint32), np.zeros(64, np.uint64)
    faults("belongs to an mbarrier", "states", d, seen, block=64, planted=planted("states", (r".*/\*inval\*/", "")))
    faults("no mbarrier was initialised", "states", d, seen, block=64, planted=planted("states", (r"mbarrier.init.*;", "")))
    faults("races|no mbarrier", "states", d, seen, block=64, planted=planted("states", (r"bar.sync\s+0;", "")))
    faults("(?s)deadlock.*lacks 32 arrivals", "states", d[:64 + 32], seen, block=32)
    faults("arrivals, but", "states", np.zeros(192, np.uint32), np.zeros(96, np.uint64), block=96)


# Copies in the background

TRUE = "setp.eq.u32 p, 0, 0;"                                    # in place of a wait


@pytest.mark.parametrize("order", ORDERS)
def test_a_bulk_copy(order):
    a, d = words(9, 256).reshape(64, 4), np.zeros((64, 4), np.uint32)
    run("fetch", d, a, 1024, block=64, order=order)
    same(d, a[::-1])
    d = np.ones((128, 4), np.uint32)
    run("clear_and_fetch", d, a, block=64, order=order)
    zeros = np.zeros((32, 4), np.uint32)
    same(d, np.concatenate([a[:32], zeros, a[32:], zeros]))


def test_mistakes_with_bulk_copies_are_caught():
    a, d = words(9, 256).reshape(64, 4), np.zeros((128, 4), np.uint32)

    def caught(message, name, *changes, args=(1024,)):
        faults(message, name, d, a, *args, block=64, planted=planted(name, *changes) if changes else None)
    caught("nobody has waited for", "fetch", (r"mbarrier.try_wait.*?;", TRUE))
    caught("nobody has waited for|races", "fetch", (r".*/\*one waits\*/", ""))
    caught("no fence.mbarrier_init", "fetch", (r"fence.mbarrier_init.*;", ""))
    caught("(?s)deadlock.*lacks 0 arrivals and 16 bytes", "fetch", args=(1040,))
    caught("underflow", "fetch", args=(1008,))
    caught("nobody has waited for", "fetch", args=(0,))
    caught("out of range", "fetch", args=(2**20,))
    caught("ends with a bulk copy", "fetch", (r"mbarrier.try_wait.*?;", TRUE), (r"(ld.shared|st.global)[^;]*;", ""))
    caught("not in 16 bytes", "clear_and_fetch", (r"add.s64 ([^,]*), ([^,]*), 512;", r"add.s64 \1, \2, 8;"), args=())
    caught("no fence.proxy.async between", "clear_and_fetch", (r"fence.proxy.async.shared::cta;", ""), args=())
    caught("races", "clear_and_fetch", (r".*/\*read\*/", ""), args=())
    faults("outside of every array", "fetch", d, a[:63].copy(), 1024, block=64)


# Clusters

def test_cluster_registers():
    d = np.zeros((2, 4, 8), np.uint32)
    run("registers", d, grid=(4, 2))
    for y, x in np.ndindex(2, 4):
        same(d[y, x], [x % 2, y, 2, x // 2, 0, 2, x % 2 + 2 * y, 4])
    faults("no multiple of the cluster", "registers", d, grid=(3, 2))
    faults("made for", "registers", d, grid=(4, 2), cluster=4)


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_of_a_cluster(order):
    a, d = words(10, 256).reshape(4, 64), np.zeros((4, 64), np.uint32)
    run("neighbours", d, a, grid=4, block=64, cluster=4, order=order)
    # CTA r reads r + 1 from its end and stores to it: what lies in r came from r itself
    same(d, a[:, ::-1] + np.arange(4, dtype=np.uint32)[:, None])


def test_mistakes_in_a_cluster_are_caught():
    a, d = words(10, 256).reshape(4, 64), np.zeros((4, 64), np.uint32)

    def caught(message, *changes, **how):
        faults(message, "neighbours", d, a, grid=4, block=64, cluster=4, planted=planted("neighbours", *changes), **how)
    relaxed = r"arrive.release.aligned; /\*first\*/", r"arrive.relaxed.aligned;"
    caught("never written|races", relaxed)
    caught("twice", (r".*/\*first\*/", "barrier.cluster.arrive; barrier.cluster.arrive;"))
    caught("without barrier.cluster.arrive", (r".*/\*first\*/", ""))
    caught("races", (r"bar.warp.sync.*;", ""))
    faults("rank 1 of a cluster of 1", "neighbours", d, a, grid=1, block=64)


@pytest.mark.parametrize("order", ORDERS)
def test_a_fence_and_a_relaxed_barrier_show_mbarriers_to_the_cluster(order):
    d, how = np.zeros(128, np.uint32), {"grid": 2, "block": 64, "cluster": 2, "order": order}
    run("relaxed_start", d, 0, 0, **how)
    same(d, np.tile(np.arange(64), 2))
    unseen, fence = "use of the mbarrier .* races", "fence.mbarrier_init.release.cluster;"
    for thread in (1, 32, 64):                                   # of the same warp, of another, none
        faults(unseen, "relaxed_start", d, thread, 0, **how)
    late = planted("relaxed_start", (fence, ""), (r"(barrier.cluster.arrive.relaxed.aligned;).*", r"\1 " + fence))
    faults(unseen, "relaxed_start", d, 0, 0, planted=late, **how)
    faults("read of shared byte .* races: thread 0 of rank . wrote", "relaxed_start", d, 0, 1, **how)


def test_a_cluster_of_one_number():
    d = np.zeros((2, 4, 8), np.uint32)
    run("registers", d, grid=(4, 2), planted=planted("registers", (r"\.reqnctapercluster [\d, ]+", ".reqnctapercluster 2\n")))
    for y, x in np.ndindex(2, 4):
        same(d[y, x], [x % 2, 0, 2, x // 2, y, 2, x % 2, 2])


# All of it: a producer warp, a warpgroup, a ring of two stages, 16 tokens for two CTAs

STEPS = 5


def pipeline(ctas=2, arrivals=None, size=2048 + 64, high=None, flip_full=0, flip_empty=0, early=0, **how):
    """-> d [64 * ctas, 16], and what it should be"""
    a, x = fp8(11, (64 * ctas, 128 * STEPS), "e4m3")
    b, y = fp8(12, (16, 128 * STEPS), "e4m3")
    scales = np.random.default_rng(13).random((STEPS, 16)).astype(np.float32)
    tiles = np.stack([image(part, "k", "128", 16, 1024) for part in np.split(b, STEPS, axis=1)])
    d = np.zeros((ctas, 8, GROUP), np.float32)
    run("pipeline", d, np.stack([fragments(part) for part in np.split(a, ctas)]), tiles, scales, STEPS,
        4 * ctas if arrivals is None else arrivals, size, descriptor("128", 16, 1024) if high is None else high,
        flip_full, flip_empty, early, grid=ctas, block=256, shared=2 * (2048 + 64), cluster=ctas, **how)
    exact = sum(x[:, 128 * s:128 * s + 128] @ y[:, 128 * s:128 * s + 128].T * scales[s] for s in range(STEPS))
    return np.concatenate([accumulators(part) for part in d]), exact


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ctas", [1, 2])
def test_a_pipeline_of_specialised_warps(ctas, order):
    got, exact = pipeline(ctas, order=order, fp8_bits=None)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)
    got, _ = pipeline(ctas, order=order)
    assert 0 < np.abs(got - exact).max() < 2e-3 * np.abs(exact).max()


BUGS = {
    "no wait for a full stage": ("nobody has waited|races|never written", (r"mbarrier.try_wait.*?; /\*full\*/", TRUE)),
    "no wait for an empty stage": ("arrivals, but|races", (r"mbarrier.try_wait.*?;(?! /)", TRUE)),
    "no wgmma.fence": ("used after the last wgmma.fence|no wgmma.fence", (r".*/\*fence\*/", "")),
    "no wgmma wait": ("wgmma that nobody has waited for", (r"wgmma.wait_group.sync.aligned 0;", "")),
    "no warp barrier before a lane arrives for all": ("races", (r"bar.warp.sync.*;", "")),
    "mbarriers not shown to the copies": ("no fence.mbarrier_init", (r"fence.mbarrier_init.*;", "")),
    "no barrier after the start": ("no mbarrier was|races", (r"barrier.cluster.arrive.release.aligned;.*", "")),
    "no barrier before the end": ("have exited", (r".*/\*last\*/", "")),
    "registers nobody gave back": ("deadlock", (r"setmaxnreg.dec.*;", ""), (r"aligned.u32 232", "aligned.u32 256")),
    "half of the copy": ("deadlock|never written", (r", 1024, \[", ", 512, [")),
}


@pytest.mark.parametrize("order", ["forward", "reverse", 1])
@pytest.mark.parametrize("bug", BUGS)
def test_mistakes_in_the_pipeline_are_caught(bug, order):
    message, *changes = BUGS[bug]
    with pytest.raises(Fault, match=message):
        pipeline(planted=planted("pipeline", *changes), order=order)


@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_wrong_arguments_of_the_pipeline_are_caught(order):
    for message, wrong in [
            ("never written|nobody has waited|races", {"flip_full": 1}), ("deadlock", {"flip_empty": 1}),
            ("(?s)deadlock.*lacks 1 arrivals", {"arrivals": 9}), ("arrivals, but|races", {"arrivals": 4}),
            ("underflow|nobody has waited", {"size": 2048}),
            ("(?s)deadlock.*lacks 0 arrivals and 64 bytes", {"size": 2048 + 128}),
            ("races: wgmma of warps 0-3 of CTA . may still read", {"early": 1})]:
        with pytest.raises(Fault, match=message):
            pipeline(order=order, **wrong)
    got, exact = pipeline(order=order, high=descriptor("64", 16, 1024))
    assert np.abs(got - exact).max() > 0.1 * np.abs(exact).max()


def test_registers_move_between_warpgroups():
    d = np.zeros(384, np.uint32)
    run("share", d, block=384)                                   # 65536 / 384 = 168 each: 40 + 232 + 232 = 3 * 168
    same(d, np.arange(384))
    faults("deadlock", "share", d, block=384, planted=planted("share", (r"u32 232", "u32 240")))
    faults("but the warps have 168", "share", d, block=384, planted=planted("share", (r"u32 232", "u32 160")))
    faults("multiple of 8", "share", d, block=384, planted=planted("share", (r"u32 40", "u32 20")))
    faults("more than 384", "share", np.zeros(512, np.uint32), block=512)
