"""The CPU kernels: every body against the reference, element by element; emulated where this CPU lacks the instructions.

Test of cpu/*.hpp and variants/cpu.py. simulators/vnni.hpp has the emulated instructions, simulators/neon.cpp runs the body for
ARM under qemu where Debian's cross compiler is.
"""

import concurrent.futures
import math
import platform
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from svdq_pack.svdq.kernels import build, check, layout, reference, registry
from svdq_pack.svdq.kernels.errors import BuildError, ShapeError
from svdq_pack.svdq.kernels.variant import FLOATS, Target
from svdq_pack.svdq.kernels.variants import cpu
from svdq_pack.tests.kernels import cpu_bodies
from svdq_pack.tests.kernels.cpu_bodies import compiled, serving

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
W4A8, EXACT = (variant for variant in registry.VARIANTS if variant.library is cpu.LIBRARY)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 63, 64, 65, 127, 128, 129, 255, 256, 257]
FLUX = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (21504, 3072)]     # N, K
SOURCES = Path(build.CPU)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    cpu_bodies.needs_compiler()
    return cpu_bodies.emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["generic", "neon"] if platform.machine() in ("aarch64", "arm64") else
                ["generic", "avx2", "avxvnni", "avx512vnni"])
def body(request):
    """The body of this name serves, of this machine's own kernels if it runs there, else emulated."""
    kernels = cpu_bodies.own()
    if request.param not in kernels.bodies and "avx2" in kernels.bodies:
        kernels = request.getfixturevalue("emulated")
    if request.param not in kernels.bodies:
        pytest.skip(f"this CPU has no {request.param}")
    with serving(kernels, request.param):
        yield request.param


@cache
def layer(kind="int4", n=256, k=384, rank=32, dtype=BF16):
    return check.random_weight(kind, dtype, n, k, rank)


def passed(checks):
    failed = [str(one) for one in checks if not one.passed]
    assert not failed, failed


def check_w4a8(weight, x, bias, **strides):
    """Codes and scales equal those of the reference to the bit, products differ by one rounding."""
    prepared = W4A8.prepare(x, weight)
    out = torch.full((len(x), weight.shape[0]), math.nan, dtype=x.dtype)
    W4A8.product(prepared, weight, out, bias, False)
    passed(check.check_prepared(W4A8, x, weight, prepared) + check.check_product(W4A8, prepared, weight, bias, out))
    codes, scales, sums, _ = prepared
    assert torch.equal(sums, -8 * codes.view(len(x), -1, 64).int().sum(-1).int())
    spec_codes, spec_scales, _ = reference.quant_down(x, layout.unpack_vector(weight.smooth), x.new_zeros(x.shape[1], 0),
                                                      precision="int8_group", unsigned=weight.unsigned)
    got_codes, got_scales, _ = W4A8.decode(prepared, weight)
    assert torch.equal(got_codes, spec_codes.float()) and torch.equal(got_scales, spec_scales)
    return out


# 8-bit activations

@pytest.mark.parametrize("tokens", TOKENS)
def test_token_counts(body, tokens):
    weight, bias = layer("int4 unsigned" if tokens % 2 else "int4")
    check_w4a8(weight, check.random_x(tokens, 384, F32, weight.unsigned), bias.float())


@pytest.mark.parametrize("n, k", FLUX)
def test_shapes_of_flux(body, n, k):
    """A few outputs at each end of them: the rest is the same code."""
    if body == "generic" and n * k > 3072 * 12288:
        n = 3072
    weight, bias = layer("int4 unsigned" if k > 3072 else "int4", n, k)
    x = check.random_x(5, k, F32, weight.unsigned)
    prepared, out = W4A8.prepare(x, weight), torch.empty(5, n)
    W4A8.product(prepared, weight, out, bias.float(), False)
    for start in (0, n - 128):
        part = weight.cut(start, start + 128)
        passed(check.check_product(W4A8, prepared, part, bias[start:start + 128].float(), out[:, start:start + 128]))
    passed(check.check_prepared(W4A8, x, weight, prepared))


@pytest.mark.parametrize("rank", [0, 16, 32, 48, 128, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ranks_and_dtypes(body, dtype, rank):
    for half in (BF16, FP16):
        weight, bias = layer("int4", 128, 256, rank, half)
        for tokens in (6, 11):                  # as lines, and as tiles
            check_w4a8(weight, check.random_x(tokens, 256, dtype), bias.to(dtype))


@pytest.mark.parametrize("code, activation", [(7, 1.0), (7, -1.0), (-8, 1.0), (-8, -1.0)])
def test_largest_sums(body, code, activation):
    """All codes and all activations at one end: sums of 16 bits that took one product more would overflow."""
    weight, _ = layer("int4", 128, 3072, 0)
    weight = replace(weight, qweight=layout.pack_codes(torch.full((128, 3072), code, dtype=torch.int8)),
                     wscales=torch.ones_like(weight.wscales), smooth=torch.ones_like(weight.smooth))
    for tokens in (5, 12):                      # as lines, and as tiles
        x, out = torch.full((tokens, 3072), activation), torch.empty(tokens, 128)
        W4A8.product(W4A8.prepare(x, weight), weight, out, None, False)
        assert torch.allclose(out, torch.full_like(out, 3072 * code * activation), rtol=1e-6)


def test_zero_groups(body):
    weight, bias = layer()
    x = check.random_x(4, 384, F32)
    x[0, :64], x[1], x[2, 320:] = 0, 0, 0
    out = check_w4a8(weight, x, bias.float())
    assert torch.allclose(out[1], bias.float())


def test_subnormal_scales(body):
    """Of so few bits that a ratio is beyond 127, where codes end."""
    weight, _ = layer("int4", 128, 384, 0)
    weight = replace(weight, smooth=torch.ones_like(weight.smooth))
    x = torch.zeros(2, 384)
    x[0, 3], x[1, 70] = 190 * 2.0**-149, -190 * 2.0**-149
    codes, scales, sums, _ = W4A8.prepare(x, weight)
    spec, _, _ = reference.quant_down(x, torch.ones(384), x.new_zeros(384, 0), precision="int8_group")
    assert torch.equal(W4A8.decode((codes, scales, sums, None), weight)[0], spec.float()) and spec.abs().max() == 127
    assert torch.equal(sums, -8 * spec.view(2, -1, 64).int().sum(-1).int())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-42])
def test_odd_numbers(body, value):
    """A NaN or Inf spoils its own token and no other; a subnormal is a number."""
    weight, bias = layer()
    x = check.random_x(5, 384, F32)
    clean = check_w4a8(weight, x, bias.float())
    x[2, 100] = value
    out = torch.empty_like(clean)
    W4A8.run(x, weight, out, bias.float())
    rows = torch.tensor([0, 1, 3, 4])
    assert torch.equal(out[rows], clean[rows]) and bool(out[2].isfinite().all()) == math.isfinite(value)
    x[2] = value
    W4A8.run(x, weight, out, bias.float())
    assert torch.equal(out[rows], clean[rows]) and bool(out[2].isfinite().all()) == math.isfinite(value)


@pytest.mark.parametrize("tokens", [1, 8, 9, 130])
@pytest.mark.parametrize("variant", [W4A8, EXACT], ids=lambda variant: variant.name)
def test_threads_and_rows_change_no_bit(body, variant, tokens):
    """1 to 4 threads; and a token is the same whatever others there are. Not so with exact_cpu, whose products are torch's."""
    weight, bias = layer("int4", 512, 3072)
    x, outs = check.random_x(tokens, 3072, F32), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        try:
            outs.append(torch.empty(tokens, 512))
            variant.run(x, weight, outs[-1], bias.float())
        finally:
            torch.set_num_threads(1)
    if variant is W4A8:
        assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(check.relative(out, outs[0]) < 1e-6 for out in outs)
    if variant is W4A8:
        alone = torch.empty(1, 512)
        variant.run(x[tokens // 2, None], weight, alone, bias.float())
        assert torch.equal(alone[0], outs[0][tokens // 2])


@pytest.mark.parametrize("variant", [W4A8, EXACT], ids=lambda variant: variant.name)
def test_threads_of_the_caller(body, variant):
    """Four callers at once, each with memory of its own."""
    weight, bias = layer("int4", 256, 1152)
    xs = [check.random_x(tokens, 1152, F32) for tokens in (8, 70, 200, 257)]

    def run(x):
        out = torch.empty(len(x), 256)
        variant.run(x, weight, out, bias.float())
        return out

    want = [run(x) for x in xs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(15):
            assert all(map(torch.equal, pool.map(run, xs), want))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["int4", "nvfp4", "awq"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 70])
def test_parts_of_wide_tensors(body, kind, dtype, tokens, accumulate):
    """x and out are columns of wider tensors, whose others stay."""
    weight, bias = layer(kind, 256, 384, 0 if kind == "awq" else 32)
    wide_x = torch.randn(tokens, 390, generator=torch.Generator().manual_seed(3)).to(dtype)
    x = wide_x[:, 3:387]
    for variant in (W4A8, EXACT) if kind == "int4" else (EXACT,):
        wide = torch.ones(tokens, 270, dtype=dtype)
        variant.run(x, weight, wide[:, 7:263], bias.to(dtype), accumulate)
        want = check.wanted(variant, x, weight, bias) + accumulate
        assert (wide[:, :7] == 1).all() and (wide[:, 263:] == 1).all()
        assert not tokens or check.relative(wide[:, 7:263], want) < {F32: 1e-5, FP16: 2e-3, BF16: 8e-3}[dtype]


def test_fp16_ends_at_its_largest_number(body):
    weight, _ = layer("int4", 128, 3072, 0)
    weight = replace(weight, wscales=torch.full_like(weight.wscales, 300.0))
    for variant in (W4A8, EXACT):
        for tokens in (2, 20):
            out = torch.empty(tokens, 128, dtype=FP16)
            variant.run(torch.ones(tokens, 3072, dtype=FP16) * 9, weight, out)
            assert out.isfinite().all() and out.abs().max() == 65504


# Exact

@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["int4", "nvfp4", "nvfp4 wcscales", "awq"])
def test_numbers_are_those_of_torch(body, kind, dtype):
    """To the bit, part by part."""
    weight, _ = layer(kind.split()[0], 256, 640, 0)
    if "wcscales" in kind:
        weight = replace(weight, wcscales=torch.rand(256).to(BF16) + 0.5)
    want = weight.dense(dtype)
    for start, stop in ((0, 256), (128, 256), (16, 48)):
        assert torch.equal(cpu.numbers(weight, start, stop, dtype), want[start:stop])


@pytest.mark.parametrize("half", [BF16, FP16])
def test_every_code_and_scale(body, half):
    """All 16 codes with all 256 scales of NVFP4 but NaN, and every finite 16-bit scale of INT4."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(128, 8)
    scales = torch.arange(128 * 8).view(128, 8).to(torch.uint8)
    scales[scales % 128 == 127] = 0
    weight = replace(layer("nvfp4", 128, 128, 0)[0], qweight=layout.pack_codes(codes),
                     wscales=layout.pack_scales(scales.view(torch.float8_e4m3fn)))
    assert torch.equal(cpu.numbers(weight, 0, 128, F32), weight.dense(F32))
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(half)
    bits = torch.where(bits.isfinite(), bits, 0).view(128, 512)
    weight, _ = layer("int4", 128, 512 * 64, 0, half)
    weight = replace(weight, wscales=layout.pack_scales(bits))
    assert torch.equal(cpu.numbers(weight, 0, 128, F32), weight.dense(F32))


def test_roundings_to_16_bit(body):
    """Of every kind: half way, subnormal, too large, not a number."""
    base = torch.tensor([1.0, 2.0**-14, 2.0**-20, 65504.0])
    weight, _ = layer("int4", 128, 128, 0)
    for dtype in (BF16, FP16):
        # what was in out, plus the bias: sums of two 16-bit numbers, whose last bits must be rounded away
        bias = (base.repeat(32) * torch.linspace(-1, 1, 128)).to(dtype)
        out = (base.repeat(32) * torch.linspace(-0.01, 0.7, 128)).to(dtype).repeat(2, 1)
        want = out[0].float() + bias.float()
        x = torch.zeros(2, 128, dtype=dtype)
        W4A8.run(x, weight, out, bias, True)
        assert torch.equal(out[0], (want.clamp(-65504, 65504) if dtype == FP16 else want).to(dtype))
        x.fill_(math.nan)
        bias = bias.abs()
        W4A8.run(x, weight, out, bias.to(dtype))
        assert out.isnan().all()


@pytest.mark.parametrize("kind", check.KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 65])
def test_exact(body, kind, tokens):
    weight, bias = layer(kind, 256, 1152, 0 if kind == "awq" else 48)
    x, out = check.random_x(tokens, 1152, F32, weight.unsigned), torch.full((tokens, 256), math.nan)
    EXACT.run(x, weight, out, bias.float())
    assert check.relative(out, check.wanted(EXACT, x, weight, bias)) < 1e-6


@pytest.mark.parametrize("is_down", [True, False])
@pytest.mark.parametrize("half", [BF16, FP16])
def test_factors(body, half, is_down):
    factor = torch.randn(384, 48).to(half)
    if is_down:
        assert torch.equal(cpu.plain_factor(layout.pack_down(factor), True), factor.float())
    else:
        assert torch.equal(cpu.plain_factor(layout.pack_up(factor), False), factor.float().t())


def test_16_bit_products(monkeypatch):
    """On a CPU that multiplies bf16 the weight is written as bf16; here torch's slow product stands in for the fast one."""
    cpu_bodies.own()
    monkeypatch.setattr(cpu, "cpu_multiplies", lambda dtype: True)
    weight, bias = layer("nvfp4")
    x, out = check.random_x(20, 384, BF16), torch.empty(20, 256, dtype=BF16)
    EXACT.run(x, weight, out, bias)
    passed(check.check_linear(EXACT, x, weight, bias, out))


# What is refused, and tracing

def test_refusals():
    cpu_bodies.own()
    weight, bias = layer()
    x = check.random_x(3, 384, F32)
    with pytest.raises(ShapeError, match="x is .*3, 383"):
        cpu.quantise_cpu(x[:, :383], weight.smooth, weight.proj_down, False)
    with pytest.raises(ShapeError, match="fp32, bf16 or fp16"):
        cpu.quantise_cpu(x.double(), weight.smooth, weight.proj_down, False)
    with pytest.raises(ShapeError, match="last stride 1"):
        cpu.quantise_cpu(x.t().contiguous().t(), weight.smooth, weight.proj_down, False)
    with pytest.raises(ShapeError, match="proj_down is"):
        cpu.quantise_cpu(x, weight.smooth, weight.proj_down[:128], False)
    with pytest.raises(ShapeError, match="smooth in bf16 or fp16"):
        cpu.quantise_cpu(x, weight.smooth.double(), None, False)
    prepared, out = W4A8.prepare(x, weight), torch.empty(3, 256)
    with pytest.raises(ShapeError, match="product_cpu: out is .*3, 255"):
        W4A8.product(prepared, weight, out[:, :255], None, False)
    with pytest.raises(ShapeError, match="as many rows"):
        W4A8.product(prepared, weight, out[:2], None, False)
    with pytest.raises(ShapeError, match="proj_up for a rank"):
        W4A8.product(prepared, weight.with_branch(None, None), out, None, False)
    with pytest.raises(ShapeError, match="bias is"):
        W4A8.product(prepared, weight, out, bias, False)
    with pytest.raises(ShapeError, match="out is .*3, 256"):
        W4A8.product(prepared, weight.cut(0, 128), out, None, False)
    with pytest.raises(ShapeError, match="exact_cpu: x is"):
        EXACT.product(x[:, :128], weight, out, None, False)
    with pytest.raises(ShapeError, match="exact_cpu: x is"):
        EXACT.product(x[0], weight, out, None, False)
    for name, wrong in (("wscales", weight.wscales[:3]), ("wscales", weight.wscales.half()), ("smooth", weight.smooth[:128]),
                        ("proj_up", weight.proj_up[:128]), ("qweight", weight.qweight.int())):
        with pytest.raises(ShapeError):
            EXACT.product(x, replace(weight, **{name: wrong}), out, None, False)
    awq, _ = layer("awq", 256, 384, 0)
    with pytest.raises(ShapeError, match="wzeros is"):
        EXACT.product(x, replace(awq, wzeros=awq.wzeros[:3]), out, None, False)


def test_no_library(monkeypatch):
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    weight, _ = layer()
    with pytest.raises(BuildError, match="no kernels cpu for this CPU"):
        W4A8.prepare(check.random_x(3, 384, F32), weight)


def test_a_bias_with_strides():
    cpu_bodies.own()
    weight, bias = layer()
    x, out, want = check.random_x(3, 384, F32), torch.empty(3, 256), torch.empty(3, 256)
    for variant in (W4A8, EXACT):
        variant.run(x, weight, want, bias.float())
        variant.run(x, weight, out, bias.float().repeat_interleave(2)[::2])
        assert torch.equal(out, want)


def test_a_part_of_an_awq_weight(body):
    weight, bias = layer("awq", 256, 384, 0)
    x, out, part = check.random_x(3, 384, F32), torch.empty(3, 256), torch.empty(3, 128)
    EXACT.run(x, weight, out, bias.float())
    EXACT.run(x, weight.cut(128, 256), part, bias[128:].float())
    assert torch.equal(part, out[:, 128:])


def test_no_gradients_without_a_word():
    cpu_bodies.own()
    weight, bias = layer()
    for variant in (W4A8, EXACT):
        x, out = check.random_x(3, 384, F32).requires_grad_(), torch.empty(3, 256)
        with pytest.raises(RuntimeError, match="wants gradients, and this kernel has none"):
            variant.run(x, weight, out, bias.float())
        with torch.no_grad():
            variant.run(x, weight, out, bias.float())


@pytest.mark.parametrize("settings", ["dtype", "device"])
def test_defaults_of_torch(settings):
    """What others have set for tensors that they make."""
    cpu_bodies.own()
    weight, bias = layer("int4", 256, 3072)
    for variant in (W4A8, EXACT):
        for tokens in (3, 20):
            x = check.random_x(tokens, 3072, F32)
            want, out = torch.empty(2, tokens, 256)
            variant.run(x, weight, want, bias.float())
            if settings == "dtype":
                torch.set_default_dtype(BF16)
                try:
                    variant.run(x, weight, out, bias.float())
                finally:
                    torch.set_default_dtype(F32)
            else:
                with torch.device("meta"):
                    variant.run(x, weight, out, bias.float())
            assert torch.equal(out, want)


def test_trusted_inside_autocast():
    cpu_bodies.own()
    registry.trusted.cache_clear()
    with torch.autocast("cpu", dtype=BF16):
        assert all(registry.trusted(variant, Target("cpu")) for variant in (W4A8, EXACT))


def test_operators():
    """What a tracer sees: shapes, dtypes, and what is written."""
    cpu_bodies.own()
    weight, bias = layer()
    x, out = check.random_x(3, 384, F32), torch.zeros(3, 256)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(cpu.quantise_cpu.operator, (x, weight.smooth, weight.proj_down, False), test_utils=tests)
    prepared = W4A8.prepare(x, weight)
    packed, branch = (weight.qweight, weight.wscales), (weight.proj_down, weight.proj_up)
    torch.library.opcheck(cpu.product_cpu.operator, (*prepared, *packed, weight.proj_up, bias.float(), out, True),
                          test_utils=tests)
    torch.library.opcheck(cpu.exact_cpu.operator, (x, *packed, None, weight.smooth, None, *branch, 1.0, "int4", False,
                                                   bias.float(), out, False), test_utils=tests)


@pytest.mark.parametrize("variant", [W4A8, EXACT], ids=lambda variant: variant.name)
def test_compiles_without_a_break(variant):
    cpu_bodies.own()
    weight, bias = layer()

    def f(x):
        out = torch.empty(len(x), 256)
        variant.product(variant.prepare(x, weight), weight, out, bias.float(), False)
        return out + 1

    x = check.random_x(9, 384, F32)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_who_serves():
    cpu_bodies.own()
    weight, _ = layer()
    names = {bits: registry.plan(weight, Target("cpu"), F32, bits).variant.name for bits in (None, 4, 8, 16)}
    assert names == {None: "w4a8_cpu", 8: "w4a8_cpu", 4: "exact_cpu", 16: "exact_cpu"}
    for kind in ("nvfp4", "awq"):
        assert registry.plan(layer(kind, 256, 384, 0)[0], Target("cpu"), F32).variant is EXACT


def test_bodies():
    """All are compiled on x86, and the best one serves."""
    kernels = cpu_bodies.own()
    assert kernels.bodies and kernels.body == list(kernels.bodies)[-1] and set(kernels.bodies) <= set(kernels.compiled)
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().replace("\n", " ").split())
    assert ("avx2" in kernels.bodies) == {"avx2", "fma", "f16c"}.issubset(flags)
    assert ("avxvnni" in kernels.bodies) == {"avx2", "avx_vnni"}.issubset(flags)
    assert ("avx512vnni" in kernels.bodies) == {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}.issubset(flags)


# Planted bugs

def symptoms():
    """Names of the checks that fail with the kernels that serve."""
    found = []
    for name, looks_right in (
            ("many tokens", lambda: many_tokens("int4 unsigned", F32)), ("bf16", lambda: many_tokens("int4", BF16)),
            ("fp16", lambda: many_tokens("int4", FP16)), ("accumulate", accumulates),
            ("zero groups", lambda: test_zero_groups(None)),
            ("largest sums", lambda: [test_largest_sums(None, code, one) for code in (7, -8) for one in (1.0, -1.0)]),
            ("largest fp16", lambda: test_fp16_ends_at_its_largest_number(None)),
            ("roundings", lambda: test_roundings_to_16_bit(None)),
            ("numbers", lambda: [test_numbers_are_those_of_torch(None, kind, F32)
                                 for kind in ("int4", "nvfp4", "nvfp4 wcscales", "awq")]),
            ("few rows", lambda: [test_exact(None, kind, 3) for kind in check.KINDS]),
            ("threads", lambda: test_threads_and_rows_change_no_bit(None, W4A8, 130))):
        try:
            looks_right()
        except AssertionError:
            found.append(name)
    return found


def many_tokens(kind, dtype):
    weight, bias = layer(kind, 256, 1152, 48)
    check_w4a8(weight, check.random_x(133, 1152, dtype, weight.unsigned), bias.to(dtype))


def accumulates():
    weight, bias = layer()
    for tokens in (3, 9):
        x = check.random_x(tokens, 384, F32)
        check_w4a8(weight, x, bias.float())
        outs = [torch.full((tokens, 256), value) for value in (0.0, 5.0)]
        for out in outs:
            W4A8.run(x, weight, out, bias.float(), True)
        assert torch.allclose(outs[1] - outs[0], torch.full_like(outs[0], 5.0), atol=1e-4)


OVERFLOW = [("simd_avx2_dot.hpp", *edit) for edit in (
    ("half < 2", "half < 1"), ("q < 8", "q < 16"), ("codes += 32", "codes += 64"))]
BUGS = {        # name -> edits, and what must fail
    "16-bit sums of 16 products": (OVERFLOW, "largest sums"),
    "the 8 of codes taken off wrongly": ([("w4a8.hpp", "-8 * sum(total)", "-7 * sum(total)")], "many tokens"),
    "no shift": ([("w4a8.hpp", "job.shifted ? SHIFT : 0.0f", "0.0f")], "many tokens"),
    "scales of 128 steps": ([("w4a8.hpp", "largest_of(most) / 127.0f", "largest_of(most) / 128.0f")], "many tokens"),
    "a zero group divided by zero": ([("w4a8.hpp", "if (scale > 0 && scale < INFINITY)", "if (true)")], "zero groups"),
    "a panel of its neighbour": ([("order.hpp", "* 8 + panel % 8) * BLOCK", "* 8 + (panel + 1) % 8) * BLOCK")], "many tokens"),
    "scales of the panel's other half": ([("simd_avx2.hpp", "store(out + 8, {kind == BF16 ? from_bf16(high)",
                                          "store(out + 8, {kind == BF16 ? from_bf16(low)")], "many tokens"),
    "scales of the first block again": ([("w4a8.hpp", "const int64_t at = (first + t) * groups + run;",
                                         "const int64_t at = t * groups + run;")], "many tokens"),
    "accumulate ignored": ([("w4a8.hpp", "job.accumulate ? add(", "false ? add(")], "accumulate"),
    "half a bias twice": ([("w4a8.hpp", "panel * PANEL + 8);", "panel * PANEL);")], "many tokens"),
    "ranks left out": ([("w4a8.hpp", "block < job.rank / 16; block++", "block < job.rank / 32; block++")], "many tokens"),
    "pairs of a factor swapped": ([("simd_avx2.hpp", "store(to, {even});", "store(to, {odd});")], "many tokens"),
    "sums that depend on the threads": ([("w4a8.hpp", "const F8 y = load(acc + t * PANEL + half * 8);",
                                          "F8 y = load(acc + t * PANEL + half * 8);\n"
                                          "y = mul(y, all(1.0f + 1e-6f * float(job.threads)));")], "threads"),
    "fp16 that ends in Inf": ([("simd_avx2.hpp", "_mm256_min_ps(most, a.v)", "a.v"),
                               ("simd_avx2.hpp", "_mm256_max_ps(least, a.v)", "a.v")], "largest fp16"),
    "bf16 cut off": ([("simd_avx2.hpp", "_mm256_set1_epi32(0x7fff)", "_mm256_setzero_si256()")], "roundings"),
    "scale of NVFP4 from elsewhere": ([("order.hpp", "place / 32 * 4 + group % 4", "(3 - place / 32) * 4 + group % 4")],
                                      "numbers"),
    "no zeros of AWQ": ([("exact.hpp", "add(mul(awq_values(codes + i / 4 * 16, i % 4), scale), zero)",
                          "mul(awq_values(codes + i / 4 * 16, i % 4), scale), (void)zero")], "few rows"),
    "no wcscales": ([("exact.hpp", "if (P != AWQ && w.wcscales) {", "if (false && w.wcscales) {")], "numbers"),
    "halves of a line swapped": ([("simd_avx2.hpp", "spread[1] = _mm256_unpackhi_epi64(a, a)",
                                   "spread[1] = _mm256_unpacklo_epi64(a, a)")], "accumulate"),
    "half the inputs of few rows": ([("exact.hpp", "add(y[o][m], add(even, odd))", "add(y[o][m], even)")], "few rows"),
}


@pytest.fixture(scope="module")
def buggy(tmp_path_factory):
    """{name of a bug: CPUKernels with it}, compiled side by side."""
    kernels = cpu_bodies.own()
    if "avx2" not in kernels.bodies:
        pytest.skip("this CPU has no avx2")
    folder = tmp_path_factory.mktemp("bugs")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda i_edits: compiled(folder / str(i_edits[0]), i_edits[1], keep=("avx2",), flags=("-O0",)),
                         enumerate([[], *(edits for edits, _ in BUGS.values())]))
        return dict(zip([None, *BUGS], built))


def test_no_symptoms_without_a_bug(buggy):
    with serving(buggy[None]):
        assert symptoms() == []


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(buggy, bug):
    with serving(buggy[bug], "avx2"):
        assert BUGS[bug][1] in symptoms()


# ARM

NEON = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(not all(map(shutil.which, NEON)), reason=f"no {' and '.join(NEON)}")
@pytest.mark.parametrize("bug", [None, "vdotq_laneq_s32(total[t][i], w, a[t], QUAD)"])
def test_neon_equals_generic(tmp_path, bug):
    """cpu.cpp cross-compiled, and its two bodies beside each other under qemu."""
    for path in SOURCES.glob("*.hpp"):
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace(bug, bug.replace("QUAD", "0")) if bug else text)
    (tmp_path / "cpu.cpp").write_text((SOURCES / "cpu.cpp").read_text())
    main, program = cpu_bodies.SIMULATORS / "neon.cpp", tmp_path / "neon"
    subprocess.run([NEON[0], "-std=c++17", "-O2", "-static", "-ffp-contract=off", "-I", str(tmp_path), str(main), "-o",
                    str(program), "-pthread"], check=True)
    done = subprocess.run([NEON[1], "-cpu", "max", str(program)], capture_output=True, text=True, timeout=300)
    assert "bodies generic neon" in done.stdout and (done.returncode == 0) == (bug is None), done.stdout
