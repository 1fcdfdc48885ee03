"""Which variant serves, on every kind of device, and why no better one; what costs a variant its service, and only its own."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from svdq_pack.svdq.kernels import build, check, epilogues, ops, registry, weights
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import ACT_BITS, FLOATS, Target, Variant, usual_dtype
from svdq_pack.svdq.kernels.variants import reference, w4a4_sm80, w4a8_sm90
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.tests.unit.layers import BF16, F16, F32, inputs, make

FP8Weight = w4a8_sm90.FP8Weight
CPU, ADA, ADA0, HOPPER, HOPPER0 = (Target("cpu"), Target("cuda", (8, 9)), Target("cuda", (8, 9), 0), Target("cuda", (9, 0)),
                                   Target("cuda", (9, 0), 0))
TARGETS = (CPU, Target("rocm", None, 0), Target("mps"),
           *(Target("cuda", capability) for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))))
PRECISIONS = ("int4", "nvfp4", "awq")


def named(name):
    return next(variant for variant in registry.VARIANTS if variant.name == name)


def chosen(weight, target, dtype=BF16, act_bits=None, **more):
    return registry.plan(weight if isinstance(weight, weights.Weight) else example(weight), target, dtype, act_bits,
                         **more).variant.name


def reasons(plan):
    return [(variant.name, why) for variant, why in plan.declined]


@pytest.fixture(autouse=True)
def forget():
    """What was trusted in one test is not in the next."""
    registry.trusted.cache_clear()
    yield
    registry.trusted.cache_clear()


@pytest.fixture
def register(monkeypatch):
    """register(*variants): they stand in the registry beside the others."""
    def add(*variants):
        monkeypatch.setattr(registry, "VARIANTS", tuple(sorted((*variants, *registry.VARIANTS), key=lambda v: -v.preference)))
    return add


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels are there, and their self-test runs on the CPU in the GPU's place."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: object())
    small = check.small
    monkeypatch.setattr(check, "small", lambda variant, device: small(variant, "cpu"))


@pytest.fixture
def trusting(monkeypatch):
    """Whoever could serve is said to be built and right."""
    monkeypatch.setattr(registry, "trusted", lambda variant, target: True)


@pytest.fixture
def no_compiler(monkeypatch):
    """No library of kernels can be built."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)


@pytest.fixture(scope="module")
def fp8():
    """A layer in the file's order, and repacked."""
    weight = make("int4 unsigned", 128, 128, 16)
    return weight, FP8Weight.pack(weight)


# The table

def test_rows_are_unique():
    rows = [(variant.name, precision, variant.activations) for variant in registry.VARIANTS for precision in variant.precisions]
    assert len(set(rows)) == len(rows) and registry.BROKEN == {}
    assert [v.preference for v in registry.VARIANTS] == sorted((v.preference for v in registry.VARIANTS), reverse=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_something_serves_everywhere(precision, no_compiler):
    """Every float dtype on any device, at any act_bits, without being asked, and where nothing can be built."""
    last, = (v for v in registry.VARIANTS if precision in v.precisions and v.device is None and not v.on_request)
    assert (last.name, last.activations, set(last.dtypes), last.max_rows) == ("weight_only", None, set(FLOATS), None)
    for target in TARGETS:
        for act_bits in (None, *ACT_BITS):
            assert chosen(precision, target, F32, act_bits) == "weight_only"


def test_act_bits_mean_one_thing():
    """Every variant states the bits that it rounds to, and serves only who asked for them, or for nothing, or rounds none."""
    for variant in registry.VARIANTS:
        assert variant.act_bits in ACT_BITS
        for bits in ACT_BITS:
            refused = [why for target in TARGETS for dtype in variant.dtypes for precision in variant.precisions
                       if (why := variant.declines(target, dtype, example(precision, dtype), bits) or "").startswith("rounds")]
            assert bool(refused) == (variant.act_bits not in (bits, 16))
    for target in TARGETS:
        for precision in PRECISIONS:
            for repack in (False, True):
                for bits in ACT_BITS:
                    for name in ("weight_only", "reference", "w4a4_emulated"):
                        with registry.using(name):
                            plan = registry.plan(example(precision), target, BF16, bits, repack)
                            assert plan.variant.act_bits in (bits, 16)


@pytest.mark.parametrize("act_bits", [5, True, "4", 2, 4.0])
def test_other_act_bits(act_bits):
    for repack in (False, True):
        with pytest.raises(ShapeError, match="act_bits is .*Needs 4, 8 or 16"):
            registry.plan(example("int4"), CPU, BF16, act_bits, repack)


# The choice

@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", [Target("mps"), Target("rocm", None, 0)], ids=str)
def test_choice_without_kernels(target, precision):
    """Nobody there reads of kernels that he can never have."""
    for dtype in FLOATS:
        plan = registry.plan(example(precision), target, dtype)
        assert (plan.variant.name, plan.declined, plan.unpack, plan.fallback) == ("weight_only", (), False, None)
        assert plan.variant.epilogues == frozenset()


@pytest.mark.parametrize("precision, act_bits, name", [
    ("int4", None, "w4a8_cpu"), ("int4", 8, "w4a8_cpu"), ("int4", 16, "exact_cpu"),
    *((precision, bits, "exact_cpu") for precision in ("nvfp4", "awq") for bits in (None, *ACT_BITS))])
def test_choice_on_a_cpu(precision, act_bits, name, trusting):
    for dtype in FLOATS:
        for half in (BF16, F16):                    # of the scales
            plan = registry.plan(example(precision, half), CPU, dtype, act_bits)
            assert (plan.variant.name, plan.unpack, plan.fallback) == (name, False, None)
            why = "rounds activations to 8 bits, not 16" if (precision, act_bits) == ("int4", 16) else None
            assert dict(reasons(plan)).get("w4a8_cpu") == why
            assert all(variant.device == ("cpu",) for variant, _ in plan.declined)


@pytest.mark.parametrize("precision, act_bits, declined", [
    ("int4", None, ["w4a8_cpu", "exact_cpu"]), ("int4", 16, ["exact_cpu"]), ("nvfp4", None, ["exact_cpu"]),
    ("awq", None, ["exact_cpu"])])
def test_choice_on_a_cpu_without_a_compiler(precision, act_bits, declined, no_compiler):
    """Torch serves, and the plan says what would have."""
    plan = registry.plan(example(precision), CPU, BF16, act_bits)
    assert plan.variant.name == "weight_only"
    assert [name for name, why in reasons(plan) if "did not build, or failed its self-test" in why] == declined
    said = plan.shortfall(example(precision), CPU)
    assert all(f"{name} did not build, or failed its self-test; `" in said and "doctor` says why" in said for name in declined)
    assert all(f"not '{name}', which did not build" in str(plan) for name in declined)


@pytest.mark.parametrize("capability, int4, awq, nvfp4", [
    ((7, 0), "weight_only", "weight_only", "weight_only"), ((7, 5), "dequant", "awq_gemv", "dequant"),
    ((8, 0), "w4a4_sm80", "awq_gemv", "dequant"), ((8, 6), "w4a4_sm80", "awq_gemv", "dequant"),
    ((8, 9), "w4a4_sm80", "awq_gemv", "dequant"), ((9, 0), "w4a8_int8", "awq_gemv", "dequant"),
    ((10, 0), "w4a8_int8", "awq_gemv", "dequant"), ((12, 0), "w4a8_int8", "awq_gemv", "nvfp4_sm120"),
    ((12, 1), "w4a8_int8", "awq_gemv", "nvfp4_sm120"), ((13, 0), "w4a8_int8", "awq_gemv", "dequant")])
def test_choice_on_gpus(capability, int4, awq, nvfp4):
    """Where 4-bit MMAs are native the fused kernels serve; the emulated ones only on request. 8-bit ones are native on later
    GPUs, too, those that nobody knows yet included."""
    target = Target("cuda", capability)
    assert (chosen("int4", target), chosen("awq", target), chosen("nvfp4", target)) == (int4, awq, nvfp4)
    with registry.using("w4a4_emulated"):
        assert chosen("int4", target) == (int4 if capability < (8, 0) else "w4a4_emulated")
    with registry.using("weight_only"):
        assert chosen("int4", target) == "weight_only"


@pytest.mark.parametrize("target, act_bits, plain, repacked", [
    (HOPPER, None, "w4a8_int8", "w4a8_sm90"), (HOPPER, 8, "w4a8_int8", "w4a8_sm90"),
    (HOPPER, 4, "dequant", "w4a4_sm90"), (HOPPER, 16, "dequant", "dequant"),
    (ADA, None, "w4a4_sm80", "w4a4_sm80"), (ADA, 4, "w4a4_sm80", "w4a4_sm80"), (ADA, 8, "w4a8_int8", "w4a8_int8"),
    (ADA, 16, "dequant", "dequant"), (CPU, None, "w4a8_cpu", "w4a8_cpu"), (CPU, 8, "w4a8_cpu", "w4a8_cpu"),
    (CPU, 16, "exact_cpu", "exact_cpu"), (Target("cuda", (12, 0)), 8, "w4a8_int8", "w4a8_int8"),
    (Target("cuda", (12, 0)), 4, "dequant", "dequant"), (Target("cuda", (13, 0)), None, "w4a8_int8", "w4a8_int8")])
def test_choice_by_act_bits(target, act_bits, plain, repacked, fp8, trusting):
    """act_bits has one meaning: what a variant may round activations to. What rounds none serves whatever is asked."""
    weight, packed = fp8
    assert chosen(weight, target, act_bits=act_bits) == plain
    assert chosen(packed, target, act_bits=act_bits) == repacked
    assert chosen(weight, target, act_bits=act_bits, repack=True) == repacked      # as it would be packed
    assert registry.plan(packed, target, BF16, act_bits).unpack == (repacked not in ("w4a8_sm90", "w4a4_sm90"))


@pytest.mark.parametrize("dtype, weight, target, why", [
    (F32, example("int4"), ADA, "takes bfloat16, float16, not float32"),
    (F16, example("int4"), ADA, "needs scales of the compute dtype float16, the file has bfloat16")])
def test_why_not(dtype, weight, target, why):
    plan = registry.plan(weight, target, dtype)
    assert plan.variant.name == "weight_only"
    assert str(plan).startswith("'weight_only': weights dequantised in chunks, 16-bit matmul; not '")
    assert {name: dict(reasons(plan))[name] for name in ("w4a4_sm80", "w4a8_int8", "dequant")} == dict.fromkeys(
        ("w4a4_sm80", "w4a8_int8", "dequant"), why) and f"; not 'w4a4_sm80', which {why}" in str(plan)


def test_no_kernel_reads_scales_of_another_dtype():
    """Those are layers that fp16 has not all numbers of; kernels take 16 bits for what they are compiled for."""
    assert all(variant.same_dtype for variant in registry.VARIANTS if isinstance(variant.library, build.Library))


def test_why_not_by_act_bits():
    assert reasons(registry.plan(example("int4"), ADA, BF16, 8)) == [("w4a4_sm80", "rounds activations to 4 bits, not 8")]
    plan = registry.plan(example("int4"), Target("cuda", (12, 0)), BF16, 4)
    assert ("w4a8_int8", "rounds activations to 8 bits, not 4") in reasons(plan)
    plan = registry.plan(example("int4"), HOPPER, BF16, 4, repack=True)
    assert (plan.variant.name, reasons(plan)[0]) == ("w4a4_sm90", ("w4a8_sm90", "rounds activations to 8 bits, not 4"))
    why = dict(reasons(registry.plan(example("int4", F16), HOPPER, BF16, repack=True)))
    assert why["w4a8_sm90"] == why["w4a4_sm90"] == "needs scales of the compute dtype bfloat16, the file has float16"


@pytest.mark.parametrize("kind, target, act_bits, words", [
    ("int4", CPU, None, None), ("int4", CPU, 16, None), ("nvfp4", CPU, None, None), ("awq", CPU, None, None),
    ("int4", Target("mps"), None, "no kernel of this pack runs there"),
    ("int4", Target("rocm", None, 0), None, "no kernel of this pack runs there"),
    ("int4", Target("cuda", (7, 5)), None, "w4a4_sm75 takes float16, not bfloat16"),
    ("int4", Target("cuda", (7, 0)), None, "no kernel of this pack multiplies INT4 weights on sm_70"),
    ("nvfp4", Target("cuda", (7, 0)), None, "no kernel of this pack multiplies NVFP4 weights on sm_70"),
    ("int4", Target("cuda", (12, 0)), None, None), ("int4", Target("cuda", (13, 0)), None, None),
    ("int4", Target("cuda", (12, 0)), 4, "w4a8_int8 rounds activations to 8 bits, not 4"),
    ("int4", ADA, 8, None),
    ("int4", ADA, 16, "w4a4_sm80 rounds activations to 4 bits, not 16; w4a4_fp16n rounds activations to 4 bits, not 16; "
                      "w4a8_int8 rounds activations to 8 bits, not 16"),
    ("nvfp4", ADA, None, "no kernel of this pack multiplies NVFP4 weights on sm_89"),
    ("nvfp4", Target("cuda", (12, 0)), None, None),
    ("int4", ADA, None, None), ("int4", HOPPER, None, None)])
def test_shortfall(kind, target, act_bits, words, trusting):
    """In one clause, without what is made for other GPUs."""
    assert registry.plan(example(kind), target, BF16, act_bits, repack=True).shortfall(example(kind), target) == words


def test_who_does_epilogues():
    """Whose kernels multiply; nobody who unpacks."""
    for target in (HOPPER, ADA):
        for act_bits in (None, 4, 8):
            assert registry.plan(example("int4"), target, BF16, act_bits, repack=True).variant.epilogues == epilogues.ALL
    for kind, target in (("int4", CPU), ("nvfp4", ADA), ("awq", ADA)):
        assert not registry.plan(example(kind), target, BF16, repack=True).variant.epilogues


def test_more_rows_than_a_variant_takes():
    """Its plan holds who serves then, and nothing is asked again."""
    plan = registry.plan(example("awq"), ADA, BF16)
    assert plan.variant.name == "awq_gemv" and all(plan.for_rows(rows) is plan for rows in (0, 1, 8))
    assert plan.for_rows(9) is plan.for_rows(4608) is plan.fallback
    assert plan.fallback.variant.name == "weight_only" and plan.fallback.fallback is None
    alone = registry.plan(example("int4"), ADA, BF16)
    assert alone.fallback is None and alone.for_rows(10**6) is alone


def test_linear_asks_for_its_rows(register):
    """Two rows by a variant that takes two, three by the other."""
    seen, usual = [], chosen("int4", CPU, F32)

    def product(x, weight, out, bias, accumulate, epilogue):
        seen.append(len(x))
        named("weight_only").run(x, weight, out, bias, accumulate)
    register(Variant("two_rows", "for this test", lambda x, weight: x, product, max_rows=2, preference=99,
                     last_resort=True))
    weight = make("int4", 128, 128)
    for rows in (2, 3):
        out, want = torch.zeros(rows, 128), torch.zeros(rows, 128)
        ops.linear(inputs(rows, 128), weight, out)
        with registry.using("weight_only" if rows == 2 else usual):
            ops.linear(inputs(rows, 128), weight, want)
        assert torch.equal(out, want)
    assert seen == [2]


def test_nothing_serves():
    with pytest.raises(ShapeError) as error:
        registry.plan(example("int4"), ADA, torch.float64)
    assert str(error.value).startswith("linear: no variant serves int4 weights and x in float64 on cuda: ")
    assert "w4a4_sm80 takes bfloat16, float16, not float64" in str(error.value) and "weight_only takes" in str(error.value)
    with pytest.raises(ShapeError, match="no variant serves.* on cpu"):
        registry.plan(example("int4"), CPU, torch.float64)


# A weight in an order of its own

@pytest.mark.parametrize("act_bits", [None, 4, 8, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_repacked_weight_off_its_gpu(dtype, act_bits, fp8):
    """It still gives what the layer's own gives, as a product and as numbers; every plan says that this is slow."""
    weight, packed = fp8
    x, bias = inputs(5, 128, dtype), inputs(1, 128, dtype)[0]
    got, want = torch.zeros(5, 128, dtype=dtype), torch.zeros(5, 128, dtype=dtype)
    ops.linear(x, packed, got, bias, act_bits=act_bits)
    ops.linear(x, weight, want, bias, act_bits=act_bits)
    assert torch.equal(got, want)
    assert all(map(torch.equal, weights.dequantize(packed), weights.dequantize(weight)))
    plan = registry.plan(packed, CPU, dtype, act_bits)
    assert plan.unpack and all(variant.meant_for(CPU) for variant, _ in plan.declined)
    assert "restored each time, which is very slow" in str(plan)
    assert not registry.plan(weight, CPU, dtype, act_bits).unpack


def test_reference_of_a_repacked_weight(fp8):
    """The specification reads the file's order."""
    weight, packed = fp8
    x, got, want = inputs(5, 128, BF16), torch.zeros(5, 128, dtype=BF16), torch.zeros(5, 128, dtype=BF16)
    for act_bits in (None, 8):
        with registry.using("reference"):
            ops.linear(x, packed, got, act_bits=act_bits)
            ops.linear(x, weight, want, act_bits=act_bits)
        assert torch.equal(got, want)


@pytest.mark.parametrize("target, dtype, act_bits, half, packed", [
    (HOPPER, BF16, None, BF16, True), (HOPPER, BF16, 4, BF16, True), (HOPPER, BF16, 8, BF16, True),
    (HOPPER, F16, None, F16, True), (HOPPER, BF16, 16, BF16, False), (HOPPER, F32, None, BF16, False),
    (HOPPER, BF16, None, F16, False), (CPU, BF16, None, BF16, False), (ADA, BF16, None, BF16, False),
    (ADA, BF16, 8, BF16, False), (Target("cuda", (12, 0)), BF16, None, BF16, False)])
def test_pack(monkeypatch, target, dtype, act_bits, half, packed):
    monkeypatch.setattr(registry.Target, "of", lambda device: target)
    weight = make("int4", 128, 128, 16, half)
    got = registry.pack(weight, dtype, act_bits)
    assert isinstance(got, FP8Weight) if packed else got is weight
    assert registry.pack(got, dtype, act_bits) is got
    if packed:
        assert torch.equal(got.qweight, FP8Weight.pack(weight).qweight)
        plan = registry.plan(got, target, dtype, act_bits)
        assert (plan.variant.name, plan.unpack) == (chosen(weight, target, dtype, act_bits, repack=True), False)


@pytest.mark.parametrize("kind", ["nvfp4", "awq", "int4"])
def test_nothing_to_pack(kind, monkeypatch):
    """On this machine, and for precisions that no variant has an order for."""
    weight = make(kind, 128, 128)
    assert registry.pack(weight, BF16) is weight
    if kind != "int4":
        monkeypatch.setattr(registry.Target, "of", lambda device: HOPPER)
        assert registry.pack(weight, BF16) is weight


@pytest.mark.parametrize("capability, names", [
    ((7, 0), set()), ((7, 5), {"w4a4_sm75", "dequant", "awq_gemv"}),
    *((capability, {"w4a4_sm80", "w4a4_normal", "w4a8_int8", "dequant", "awq_gemv"})
      for capability in ((8, 0), (8, 6), (8, 9))),
    ((9, 0), {"w4a8_sm90", "w4a8_int8", "dequant", "awq_gemv"}),
    ((12, 0), {"w4a8_int8", "nvfp4_sm120", "dequant", "awq_gemv"}), ((13, 0), {"w4a8_int8", "dequant", "awq_gemv"}),
    (None, {"cpu"})])
def test_libraries(capability, names):
    """What must be built for a GPU or the CPU, each once; not what only serves on request."""
    target = Target("cuda", capability) if capability else Target("cpu")
    found = [library.name for library in registry.libraries(target)]
    assert set(found) == names and len(found) == len(names)


# Which file for which card

def faster(name, precision, device, dtypes=(BF16, F16), preference=20, **more):
    """A variant that is nowhere, of a card to come."""
    return replace(named("weight_only"), name=name, precisions=(precision,), device=("cuda", *device), dtypes=dtypes,
                   preference=preference, last_resort=False, **more)


def test_precision_for(register):
    """The file whose variant is preferred; INT4 where neither is, or both are."""
    for target in (*TARGETS, Target("cuda", (13, 0))):
        for dtype in (BF16, F16):
            int4, nvfp4 = (registry.plan(example(precision, dtype), target, dtype, repack=True).variant.preference
                           for precision in ("int4", "nvfp4"))
            assert registry.precision_for(target, dtype) == ("nvfp4" if nvfp4 > int4 else "int4")
    register(faster("for fp4", "nvfp4", ((40, 0), (40, 1))), faster("rounds", "int4", ((40, 1), (40, 1)), (F16,), 30),
             faster("for both", "int4", ((41, 0), (41, 0))), faster("and", "nvfp4", ((41, 0), (41, 0))))
    asked = {capability: [registry.precision_for(Target("cuda", capability), dtype) for dtype in (BF16, F16, F32)]
             for capability in ((40, 0), (40, 1), (41, 0))}
    assert asked == {(40, 0): ["nvfp4"] * 3, (40, 1): ["nvfp4", "int4", "nvfp4"], (41, 0): ["int4"] * 3}


def test_precision_by_act_bits(register):
    """What is asked of activations counts, too."""
    register(faster("for fp4", "nvfp4", ((40, 0), (40, 0)), activations="nvfp4"),
             faster("for int4", "int4", ((40, 0), (40, 0)), activations="int8", preference=10))
    card = Target("cuda", (40, 0))
    assert [registry.precision_for(card, BF16, bits) for bits in (None, 4, 8)] == ["nvfp4", "nvfp4", "int4"]


def test_usual_dtype():
    assert [usual_dtype(target) for target in (CPU, ADA, HOPPER, Target("mps"), Target("rocm", None, 0))] == [BF16] * 5
    assert usual_dtype(Target("cuda", (7, 5))) == usual_dtype(Target("cuda", (7, 0), 0)) == F16


# On request

def test_using(trusting):
    def name(precision="int4"):
        return chosen(precision, CPU)

    with registry.using("reference"):
        assert registry.requested() == "reference"
        assert name() == name("nvfp4") == name("awq") == "reference"
        for other in ("weight_only", "exact_cpu"):
            with registry.using(other):
                assert name() == other
        assert name() == "reference"
    assert name() == "w4a8_cpu" and registry.requested() is None
    with pytest.raises(ZeroDivisionError), registry.using("reference"):
        raise ZeroDivisionError
    assert name() == "w4a8_cpu"


def test_using_an_unknown_name():
    everyone = ", ".join(sorted({variant.name for variant in registry.VARIANTS}))
    with pytest.raises(ValueError, match=re.escape(f"there is no variant 'fused', but {everyone}.")):
        with registry.using("fused"):
            pytest.fail("entered")
    assert registry.requested() is None


def test_a_request_that_cannot_be_met(trusting):
    """The best of the others serves."""
    with registry.using("w4a8_sm90"):
        assert chosen("int4", ADA) == "w4a4_sm80" and chosen("awq", CPU) == "exact_cpu"
    with registry.using("w4a8_cpu"):
        assert chosen("int4", CPU, act_bits=16) == chosen("nvfp4", CPU) == "exact_cpu" and chosen("int4", ADA) == "w4a4_sm80"
    with registry.using("reference"):
        assert chosen("int4", CPU, act_bits=8) == "reference" and chosen("int4", CPU, act_bits=16) == "exact_cpu"


# Trust

def last_row_wrong(prepared, weight, out, bias, accumulate, epilogue=None):
    reference.product(prepared, weight, out, bias, accumulate)
    out[-1] *= 2                                            # of the tail


def refused(*arguments):
    raise RuntimeError("launch failed")


def divided(*arguments):
    return 1 / 0


BROKEN = pytest.mark.parametrize("broken", [last_row_wrong, refused, divided])


def in_torch(name, product=reference.product):
    """A row of a GPU's variant with torch in the place of its kernels."""
    prepare = partial(reference.prepare, act=named(name).activations)
    return replace(named(name), prepare=prepare, product=product, decode=None, layout=None, epilogues=frozenset(),
                   modulates=None, feeds=None)


def test_kernels_that_do_not_build(monkeypatch):
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    plan = registry.plan(example("int4"), ADA0, BF16)
    assert plan.variant.name == "weight_only" and "did not build" in dict(reasons(plan))["w4a4_sm80"]


def test_a_library_that_does_not_build_costs_no_other(monkeypatch, on_cpu, register):
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None if library is w4a4_sm80.LIBRARY else object())
    monkeypatch.setattr(check, "small", lambda variant, device: [])
    assert (chosen("int4", ADA0), chosen("awq", ADA0)) == ("w4a8_int8", "awq_gemv")


@pytest.mark.parametrize("broken", [None, last_row_wrong, refused, divided])
def test_kernels_serve_only_after_their_self_test(on_cpu, caplog, broken):
    variant = in_torch("w4a4_sm80", broken or reference.product)
    assert registry.trusted(variant, ADA0) == (broken is None)
    assert ("w4a4_sm80 fails its self-test on cuda:0" in caplog.text) == (broken is not None)


def test_trust_is_asked_once_and_said_once(monkeypatch, register, caplog):
    """For each device and variant: of one that passes, and of one that does not."""
    asked, small = [], check.small
    monkeypatch.setattr(check, "small", lambda variant, device: asked.append((variant.name, device)) or small(variant, device))
    good = replace(named("weight_only"), name="good", device=("cpu",), preference=50, last_resort=False)
    bad = replace(good, name="bad", product=last_row_wrong, prepare=reference.prepare, preference=60, precisions=("int4",))
    register(good, bad)
    for _ in range(3):
        assert chosen("int4", CPU) == "good" and chosen("awq", CPU) == "good"
    assert asked == [("bad", "cpu"), ("good", "cpu")]
    message, = caplog.messages
    assert "bad fails its self-test on cpu" in message and "another variant serves" in message and "int4" in message
    assert "failed its self-test" in dict(reasons(registry.plan(example("int4"), CPU, BF16)))["bad"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_is_full_says_nothing_of_a_variant(monkeypatch, register, caplog, error):
    full = [True]

    def small(variant, device):
        if full[0]:
            raise error("full")
        return []

    monkeypatch.setattr(check, "small", small)
    register(replace(named("weight_only"), name="good", device=("cpu",), preference=50, last_resort=False))
    assert chosen("int4", CPU) == "weight_only" and "could not be tested on cpu (full)" in caplog.text
    full[0] = False
    assert chosen("int4", CPU) == "good"


def test_a_variant_that_cannot_be_asked(monkeypatch, register, no_compiler):
    """A row whose rules raise costs nobody else anything, and is said."""
    odd = replace(named("weight_only"), name="odd", device=("cpu",), preference=50, last_resort=False)
    real = type(odd).declines
    monkeypatch.setattr(type(odd), "declines", lambda this, *asked: 1 / 0 if this.name == "odd" else real(this, *asked))
    register(odd)
    found = registry.plan(example("int4"), CPU, BF16)
    assert found.variant.name == "weight_only" and "cannot be asked (ZeroDivisionError" in dict(reasons(found))["odd"]


def test_nobody_serves_untested_but_the_last_resort(register, no_compiler):
    """A variant for any device, too, is asked whether it is right."""
    register(replace(named("weight_only"), name="anywhere", product=last_row_wrong, prepare=reference.prepare, preference=60,
                     precisions=("int4",), last_resort=False))
    assert chosen("int4", CPU) == "weight_only"
    assert [variant.name for variant in registry.VARIANTS if variant.last_resort] == ["weight_only"]


@pytest.mark.parametrize("field, value, words", [
    ("preference", "50", "needs int"), ("dtypes", BF16, "needs tuple"), ("precisions", "int4", "needs tuple"),
    ("precisions", ("int5",), "int5"), ("activations", "int6", "int6"), ("device", "cpu", "device is 'cpu'"),
    ("device", ("cuda", (8, 0)), "device is"), ("epilogues", (), "needs frozenset"), ("name", None, "needs str")])
def test_rows_that_nobody_could_use(field, value, words):
    with pytest.raises((TypeError, ValueError), match=words):
        replace(named("weight_only"), **{field: value})


def test_a_device_that_cannot_be_asked_is_not(monkeypatch):
    """A hypothetical GPU, and variants of plain torch. A CPU is there, and is."""
    monkeypatch.setattr(registry, "trusted", refused)
    assert chosen("int4", HOPPER, repack=True) == "w4a8_sm90" and chosen("int4", Target("mps")) == "weight_only"
    for target in (HOPPER0, CPU):
        with pytest.raises(RuntimeError, match="launch failed"):
            chosen("int4", target, repack=True)


@BROKEN
def test_kernels_of_a_cpu_that_are_wrong(monkeypatch, caplog, broken):
    """They cost themselves: others of the same library serve, and the log says so once."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: object())
    monkeypatch.setattr(registry, "VARIANTS", tuple(
        in_torch(v.name, broken) if v.name == "w4a8_cpu" else
        replace(named("weight_only"), name=v.name, device=("cpu",), preference=v.preference, last_resort=False)
        if v.name == "exact_cpu" else v for v in registry.VARIANTS))
    for _ in range(2):
        plan = registry.plan(example("int4"), CPU, BF16)
        assert plan.variant.name == "exact_cpu" and "failed its self-test" in dict(reasons(plan))["w4a8_cpu"]
    message, = caplog.messages
    assert "w4a8_cpu fails its self-test on cpu" in message and "another variant serves" in message


@BROKEN
def test_a_variant_that_fails_takes_only_itself_out(on_cpu, register, monkeypatch, caplog, broken):
    """Of the same library, the same precision and the same device."""
    monkeypatch.setattr(registry, "VARIANTS", tuple(
        in_torch(v.name) if v.name in ("w4a4_sm90", "w4a8_int8") else in_torch(v.name, broken) if v.name == "w4a8_sm90" else v
        for v in registry.VARIANTS))
    assert chosen("int4", HOPPER0, repack=True) == "w4a4_sm90"
    assert chosen("int4", HOPPER0, act_bits=8, repack=True) == "w4a8_int8"
    message, = caplog.messages
    assert "w4a8_sm90 fails its self-test on cuda:0" in message


@pytest.mark.parametrize("failing, repacked, awq", [
    ({"w4a4_sm80", "awq_gemv"}, "w4a8_sm90", "weight_only"), ({"w4a8_sm90", "w4a4_sm90"}, "w4a8_int8", "awq_gemv"),
    ({"w4a8_sm90", "w4a4_sm90", "w4a8_int8"}, "dequant", "awq_gemv"),
    ({"w4a8_sm90", "w4a4_sm90", "w4a8_int8", "dequant"}, "weight_only", "awq_gemv"),
    ({"w4a8_sm90"}, "w4a4_sm90", "awq_gemv"), (set(), "w4a8_sm90", "awq_gemv")])
def test_trust_is_of_its_own(monkeypatch, failing, repacked, awq):
    monkeypatch.setattr(registry, "trusted", lambda variant, target: variant.name not in failing)
    assert chosen("int4", HOPPER0, repack=True) == repacked and chosen("awq", HOPPER0) == awq


def test_no_trust_is_asked_on_request(monkeypatch):
    """Whoever asks for kernels that are slow, or wrong, by name is given them."""
    monkeypatch.setattr(registry, "trusted", lambda variant, target: False)
    with registry.using("w4a4_emulated"):
        assert chosen("int4", HOPPER0) == "w4a4_emulated"
    assert chosen("int4", HOPPER0) == "weight_only"


# Files of variants/

SERVES = """
from ..variant import Variant
from .weight_only import prepare, product
VARIANTS = (Variant("extra", "for this test", prepare, product, max_rank=0, preference=1),)
"""
FILES = {
    "syntax": ("VARIANTS = (", "SyntaxError"), "imports": ("import no_such_module", "ModuleNotFoundError: No module named"),
    "raises": ("1 / 0", "ZeroDivisionError"), "nothing": ("", "AttributeError: .* no attribute 'VARIANTS'"),
    "one_row": ("from .weight_only import VARIANTS as V\nVARIANTS = V[0]", "TypeError: 'Variant' object is not iterable"),
    "a_row": (SERVES.replace("preference=1", "preference='1'"), "TypeError: preference is '1', needs int"),
    "taken": (SERVES.replace('"extra"', '"weight_only"').replace("max_rank=0", 'precisions=("awq",)'),
              "ValueError: the name weight_only is taken"),
    "other_rows": ("VARIANTS = ('weight_only',)", "TypeError: VARIANTS holds something else than Variant")}


def test_files_are_found_and_broken_ones_left_out(monkeypatch, tmp_path, caplog):
    """Each with one line in the log; the others serve."""
    for name, (text, _) in FILES.items():
        (tmp_path / f"broken_{name}.py").write_text(text)
    (tmp_path / "extra.py").write_text(SERVES)
    monkeypatch.setattr(registry.variants, "__path__", [*registry.variants.__path__, str(tmp_path)])
    rows, broken = registry._found()
    assert [row.name for row in rows] == [v.name for v in registry.VARIANTS if v.preference > 0] + ["extra"] + [
        v.name for v in registry.VARIANTS if v.preference <= 0]
    assert broken.keys() == {f"broken_{name}.py" for name in FILES} and len(caplog.messages) == len(FILES)
    for name, (_, words) in FILES.items():
        assert re.search(words, broken[f"broken_{name}.py"])
        line, = (message for message in caplog.messages if f"broken_{name}.py" in message)
        assert "cannot be used" in line and "the other variants serve" in line
