"""svdq/kernels/check.py sees what is wrong: each of its comparisons fails on the damage that it is for, and passes without."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq.kernels import build, check, epilogues, launch, layout, reference, registry
from svdq_pack.svdq.kernels.variant import HALVES, Variant
from svdq_pack.svdq.kernels.variants import cpu
from svdq_pack.tests.kernels.executors import Emulator
from svdq_pack.tests.unit.layers import BF16, EPILOGUES, F16, F32, needs_kernels

SHAPE = 21, 384, 256, 32            # tokens, N, K, rank: a tail of 11 rows in blocks of 16; heads for QKV
WEIGHT_ONLY = next(variant for variant in registry.VARIANTS if variant.name == "weight_only")
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


# The specification as a variant that fuses everything: what `decode` gives is what `prepare` made

def prepare(x, weight, activations):
    layer = weight.logical()
    codes, scales, low = reference.quant_down(x, layer.smooth, layer.proj_down, precision=activations, unsigned=weight.unsigned)
    codes = layout.e2m1(codes) if activations == "nvfp4" else codes.float()
    return tuple(torch.cat((part, part.new_zeros(-len(x) % 16, *part.shape[1:])))
                 for part in (codes, scales.float(), low.to(x.dtype)))


def product(prepared, weight, out, bias, accumulate, epilogue):
    layer = weight.logical()
    codes, scales, low = (part[:len(out)].double() for part in prepared)
    scales = scales[:, None] if scales.ndim == 1 else scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    dense = reference.dequantize_weight(layer.codes, layer.wscales, layer.precision, layer.wcscales, layer.wtscale).double()
    y = (codes * scales) @ dense.T + low @ layer.proj_up.double().T + bias
    out.copy_(y.float() if epilogue is None else epilogue.of(y.float()))


def variant_of(activations, spoil_prepared=None, spoil_out=None, precision="int4"):
    """spoil_prepared(codes, scales, low) and spoil_out(out, epilogue) may damage what the halves made."""
    def damaged_prepare(x, weight):
        prepared = prepare(x, weight, activations)
        if spoil_prepared:
            spoil_prepared(*prepared)
        return prepared

    def damaged_product(prepared, weight, out, bias, accumulate, epilogue):
        product(prepared, weight, out, bias, accumulate, epilogue)
        if spoil_out:
            spoil_out(out, epilogue)
    return Variant("spec", "the specification", damaged_prepare, damaged_product, (precision,), activations,
                   dtypes=tuple(HALVES), epilogues=epilogues.ALL, decode=lambda prepared, weight: prepared)


def failed(variant, kind="int4", dtype=BF16, shape=SHAPE):
    return {one.what for one in check.checks_of(variant, kind, dtype, shape, "cpu") if not one.passed}


MODES = pytest.mark.parametrize("activations, kind", [
    ("int4", "int4"), ("int4", "int4 unsigned"), ("nvfp4", "nvfp4"), ("e4m3", "int4"), ("e4m3", "int4 unsigned"),
    ("int8", "int4"), ("int8", "int4 unsigned"), ("int8_group", "int4"), ("int8_group", "int4 unsigned"), ("e4m3", "nvfp4")])
MODE = pytest.mark.parametrize("activations, precision", [("int4", "int4"), ("nvfp4", "nvfp4"), ("e4m3", "int4"),
                                                          ("int8", "int4"), ("int8_group", "int4")])


@MODES
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_specification_passes(activations, kind, dtype):
    variant = variant_of(activations, precision=kind.split()[0])
    for rank in (0, 32):
        checks = check.checks_of(variant, kind, dtype, (*SHAPE[:3], rank), "cpu")
        assert all(one.passed for one in checks), [str(one) for one in checks]
        assert [one.what for one in checks] == ["linear", "not finite", "codes", "scales", "rows past the end",
                                                *["low rank"] * bool(rank), "product", "not finite", "Gated", "Gelu", "QKV"]


# Damage to what `prepare` made

def shifted_codes(codes, scales, low):
    codes[:21, ::7] += torch.where(codes[:21, ::7] > 0, -0.5, 0.5)


def one_code_far_off(codes, scales, low):
    row, column = divmod(int(codes.abs().argmax()), codes.shape[1])
    codes[row, column] *= -1


def scaled_scales(codes, scales, low):
    scales.mul_(1.02)


def one_scale(codes, scales, low):
    scales[20] *= 1.02


def nan_scale(codes, scales, low):
    scales[20] = math.nan


def scaled_low(codes, scales, low):
    low.mul_(1.01)


def no_low(codes, scales, low):
    low.zero_()


def codes_in_the_tail(codes, scales, low):
    codes[-1, -1] = 1


def scales_in_the_tail(codes, scales, low):
    scales[-1] = 1


def low_in_the_tail(codes, scales, low):
    low[-1, -1] = 1


@MODE
@pytest.mark.parametrize("damage, what", [
    (shifted_codes, "codes"), (one_code_far_off, "codes"), (scaled_scales, "scales"), (one_scale, "scales"),
    (nan_scale, "scales"), (scaled_low, "low rank"), (no_low, "low rank"), (codes_in_the_tail, "rows past the end"),
    (scales_in_the_tail, "rows past the end"), (low_in_the_tail, "rows past the end")])
def test_damage_to_the_input(activations, precision, damage, what):
    """Seen where it is: by the check of that part, and not by the product's, which multiplies what it is given."""
    seen = failed(variant_of(activations, damage, precision=precision), precision)
    assert what in seen and (seen <= {what, "linear"} or damage is nan_scale and {"linear", "not finite"} <= seen)


@MODE
def test_a_tie_may_round_the_other_way(activations, precision):
    """A code a step off, once; a scale by the last bit. Both are not the specification's, and right."""
    def tip(codes, scales, low):
        at = int(codes[:21].abs().flatten().argsort()[-40])
        value = codes.view(-1)[at]
        codes.view(-1)[at] = value * (15 / 16) if activations == "e4m3" else value - value.sign()
        scales[0] *= 1 + 1e-6
    assert failed(variant_of(activations, tip, precision=precision), precision) == set()


def test_damage_to_some_rows_is_seen_in_those():
    """bench checks rows spread over all tiles."""
    weight, bias = check.random_weight("int4", BF16, *SHAPE[1:])
    x, variant = check.random_x(21, 256, BF16), variant_of("int4", one_scale)
    prepared, out = variant.prepare(x, weight), torch.zeros(21, 384, dtype=BF16)
    variant.product(prepared, weight, out, bias, False, None)
    out[3, 3] = 1000
    for rows, wrong in (([0, 5, 19], set()), ([3, 20], {"scales", "product"})):
        checks = [*check.check_prepared(variant, x, weight, prepared, torch.tensor(rows)),
                  *check.check_product(variant, prepared, weight, bias, out, torch.tensor(rows))]
        assert {one.what for one in checks if not one.passed} == wrong and len(checks) == 6


# Damage to the output

DAMAGES = {"scaled": lambda out: out.mul_(1.05), "no last row": lambda out: out[-1].zero_(),
           "one NaN": lambda out: out[0, 0].fill_(math.nan), "one Inf": lambda out: out[-1, -1].fill_(math.inf),
           "flipped": lambda out: out.copy_(out.flip(1)), "not written": lambda out: out.fill_(math.nan)}


@pytest.mark.parametrize("damage", DAMAGES, ids=DAMAGES)
def test_damage_to_the_output(damage):
    seen = failed(variant_of("int4", spoil_out=lambda out, epilogue: DAMAGES[damage](out) if epilogue is None else None))
    assert {"product", "linear"} <= seen
    assert ("not finite" in seen) == (damage in ("one NaN", "one Inf", "not written"))
    assert not {"codes", "scales", "low rank", "rows past the end"} & seen


@pytest.mark.parametrize("damage", DAMAGES, ids=DAMAGES)
@pytest.mark.parametrize("name", EPILOGUES)
def test_damage_to_an_epilogue(name, damage):
    """Seen by its own check only."""
    assert failed(variant_of("int4", spoil_out=lambda out, epilogue: (
        DAMAGES[damage](out) if type(epilogue).__name__ == name else None))) == {name}


@pytest.mark.parametrize("damage", DAMAGES, ids=DAMAGES)
@pytest.mark.parametrize("kind", check.KINDS)
def test_damage_to_a_variant_without_halves(kind, damage):
    def spoiled(x, weight, out, *rest):
        WEIGHT_ONLY.product(x, weight, out, *rest)
        DAMAGES[damage](out)
    assert failed(WEIGHT_ONLY, kind) == set()
    assert "linear" in failed(replace(WEIGHT_ONLY, product=spoiled), kind)


@pytest.mark.parametrize("variant, claim", [
    (WEIGHT_ONLY, "int4"), (WEIGHT_ONLY, "e4m3"), (variant_of("e4m3"), "int4"), (variant_of("int4"), "e4m3"),
    (variant_of("int4"), None)])
def test_a_variant_that_rounds_otherwise_than_it_says(variant, claim):
    assert "linear" in failed(replace(variant, activations=claim, decode=None))


@pytest.mark.parametrize("variant", [v for v in registry.VARIANTS if v.device in (None, ("cpu",))],
                         ids=lambda v: f"{v.name} {v.activations}")
def test_variants_of_a_cpu_pass(variant):
    """In all their dtypes, fp32 among them."""
    needs_kernels(variant)
    for kind in check.kinds_of(variant):
        for dtype in variant.dtypes:
            assert failed(variant, kind, dtype) == set()


# The real kernels' orders: damage to what they wrote is seen through their `decode`

def damage_codes(codes, scales, *rest):
    codes.bitwise_xor_(3)


def damage_scales(codes, scales, *rest):
    if scales.dtype == torch.int32:                         # words of e4m3, each a step up; none past the last row
        scales.view(torch.uint8).add_((scales.view(torch.uint8) > 0).byte())
    else:
        scales.mul_(1.02)


def damage_tail(codes, scales, *rest):
    codes.view(torch.uint8).view(-1)[-1] = 1                # the last row's last code in either order


def damage_low(codes, scales, *rest):
    rest[-1].mul_(1.01)


KERNELS = [variant for variant in registry.VARIANTS if variant.decode and not variant.on_request]
ROWS_PAST = {variant for variant in KERNELS if variant.device[0] == "cuda"}        # those that pad to whole tiles


@pytest.fixture(scope="module")
def prepared_by_kernels():
    """{variant: (x, weight in the file's order, what its kernel prepared)}, by the emulator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", Emulator().launch)
        made = {}
        for variant in KERNELS:
            if variant.library is cpu.LIBRARY and build.kernels_for(cpu.LIBRARY, None) is None:
                continue
            dtype = next(dtype for dtype in HALVES if dtype in variant.dtypes)
            weight, _ = check.random_weight(check.kinds_of(variant)[0], dtype, 128, 128, 32)
            x = check.random_x(21, 128, dtype)
            made[variant] = x, weight, variant.prepare(x, weight if variant.layout is None else variant.layout.pack(weight))
    return made


@needs_gxx
@pytest.mark.parametrize("variant, damage, what", [
    pytest.param(variant, damage, what, id=f"{variant.name} {what}") for variant in KERNELS for damage, what in (
        (None, None), (damage_codes, "codes"), (damage_scales, "scales"), (damage_low, "low rank"),
        (damage_tail, "rows past the end")) if variant in ROWS_PAST or damage is not damage_tail])
def test_damage_to_what_a_kernel_wrote(prepared_by_kernels, variant, damage, what):
    needs_kernels(variant)
    x, weight, prepared = prepared_by_kernels[variant]
    prepared = tuple(part.clone() for part in prepared)
    if damage:
        damage(*prepared)
    checks = check.check_prepared(variant, x, weight, prepared)
    assert {one.what for one in checks if not one.passed} == ({what} if what else set()) | (
        {"rows past the end"} if damage is damage_codes and variant in ROWS_PAST else set())


def test_damage_to_sums_of_codes():
    """What the kernels of a CPU keep beside the codes is no part of them: the product's check sees it."""
    variant, = (variant for variant in KERNELS if variant.name == "w4a8_cpu")
    needs_kernels(variant)
    weight, bias = check.random_weight("int4", BF16, 128, 128, 32)
    x, out = check.random_x(21, 128, BF16), torch.zeros(21, 128, dtype=BF16)
    for damage, wrong in ((0, set()), (-8, {"product"})):
        prepared = variant.prepare(x, weight)
        prepared[2].add_(damage)
        variant.product(prepared, weight, out, bias, False, None)
        checks = check.check_prepared(variant, x, weight, prepared) + check.check_product(variant, prepared, weight, bias, out)
        assert {one.what for one in checks if not one.passed} == wrong


# What is asked: small before a variant may serve, wide for people

def test_small():
    """Every kind and dtype of a variant, the failed ones in words; one that raises costs only its own."""
    def spoiled(x, weight, out, *rest):
        if weight.precision == "nvfp4" and out.dtype == F16:
            raise RuntimeError("the driver is on fire")
        WEIGHT_ONLY.product(x, weight, out, *rest)
        if weight.unsigned and out.dtype == BF16:
            out.mul_(1.05)
    assert check.small(WEIGHT_ONLY, "cpu") == []
    first, second = check.small(replace(WEIGHT_ONLY, product=spoiled, dtypes=(BF16, F16)), "cpu")
    assert re.fullmatch(r"int4 unsigned bfloat16 linear: \d\.\de-02 of at most 1.5e-02", first)
    assert second == "nvfp4 float16: the driver is on fire"
    with pytest.raises(ZeroDivisionError):
        check.small(replace(WEIGHT_ONLY, product=lambda *_: 1 / 0), "cpu")


def test_wide(monkeypatch):
    """The check nearest to its limit, over all shapes; one beyond it before any other; it says where."""
    seen = []

    def spoiled(x, weight, out, *rest):
        WEIGHT_ONLY.product(x, weight, out, *rest)
        seen.append((len(x), *weight.shape))
        if len(x) == 17:
            out[-1] = math.nan
    worst = check.wide(WEIGHT_ONLY, "int4", BF16, "cpu")
    assert worst.passed and worst.error > 1e-3 and worst.what.startswith("linear, tokens ")
    bad = check.wide(replace(WEIGHT_ONLY, product=spoiled), "int4", BF16, "cpu")
    assert not bad.passed and "tokens 17, 640 -> 384, rank 32" in bad.what
    assert seen == [(tokens, n, k) for tokens, n, k, _ in check.WIDE]
    with pytest.raises(ZeroDivisionError):
        check.wide(replace(WEIGHT_ONLY, product=lambda *_: 1 / 0), "int4", BF16, "cpu")


def test_most_rows_of_a_variant():
    seen = []
    variant = replace(WEIGHT_ONLY, max_rows=8, product=lambda x, *rest: seen.append(len(x)) or WEIGHT_ONLY.product(x, *rest))
    assert failed(variant, "awq") == set() and seen == [8]


def test_a_check():
    one = check.Check("output", 2e-3, 1e-2)
    assert one.passed and str(one) == "output: 2.0e-03 of at most 1.0e-02"
    assert check.Check("output", 1e-2, 1e-2).passed and not check.Check("output", 1.01e-2, 1e-2).passed
    assert not check.Check("output", math.nan, 1e-2).passed and not check.Check("codes", math.inf, 1e-2).passed
    assert check.relative(torch.ones(4) * 1.5, torch.ones(4)) == 0.5
    assert math.isnan(check.relative(torch.tensor([1.0, math.nan]), torch.ones(2)))
    assert check.finite(torch.tensor([1.0, math.nan, math.inf])).error == 2


# Random layers

@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", check.KINDS)
def test_random_weight(kind, dtype):
    """Outputs of the order of 1 for a unit x; every code; the same each time, another one for another seed."""
    weight, bias = check.random_weight(kind, dtype, 256, 1024, 32)
    assert (weight.precision, weight.unsigned, weight.shape) == (kind.split()[0], kind == "int4 unsigned", (256, 1024))
    assert weight.dtype == bias.dtype == dtype and weight.rank == 32 * weight.has_branch
    codes = layout.unpack_awq(weight.qweight) if kind == "awq" else layout.unpack_codes(weight.qweight)
    assert set(codes.unique().tolist()) == set(range(16)) - ({8} if kind == "int4 without -8" else set())
    x = check.random_x(64, 1024, F32, weight.unsigned)
    assert 0.4 < check.wanted(WEIGHT_ONLY, x, weight, bias * 0).std() < 3
    again, _ = check.random_weight(kind, dtype, 256, 1024, 32)
    other, _ = check.random_weight(kind, dtype, 256, 1024, 32, seed=1)
    assert torch.equal(again.qweight, weight.qweight) and not torch.equal(other.qweight, weight.qweight)
    if weight.has_branch:
        assert check.random_weight(kind, dtype, 256, 1024, 0)[0].rank == 0


def test_random_x():
    x, unsigned = check.random_x(64, 256, F32), check.random_x(64, 256, F16, unsigned=True)
    assert (x.dtype, unsigned.dtype, x.shape) == (F32, F16, (64, 256)) and 0.9 < x.std() < 1.1
    assert unsigned.min() >= -reference.SHIFT and x.min() < -2
    assert torch.equal(x, check.random_x(64, 256, F32))


@pytest.mark.parametrize("name", EPILOGUES)
def test_random_epilogue(name):
    epilogue = check.random_epilogue(EPILOGUES[name], 5, 384, BF16)
    out = torch.zeros(5, 384, dtype=BF16)
    assert type(epilogue) is EPILOGUES[name] and epilogue.problem(out, accumulate=False) is None
    assert 0.1 < epilogue.of(torch.randn(5, 384)).std() < 10
    there = check.moved(epilogue, "meta")
    assert type(there) is type(epilogue)
    assert all(value.device.type == "meta" for value in vars(there).values() if isinstance(value, torch.Tensor))


def test_kinds_of_a_variant():
    assert check.kinds_of(WEIGHT_ONLY) == list(check.KINDS)
    assert check.kinds_of(variant_of("nvfp4", precision="nvfp4")) == ["nvfp4"]
    assert check.kinds_of(variant_of("int4")) == ["int4", "int4 unsigned", "int4 without -8"]
