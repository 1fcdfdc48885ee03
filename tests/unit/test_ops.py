"""The contract of ops.linear: values against float64, any strides, epilogues, what is refused and in which words."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from svdq_pack.svdq.kernels import check, epilogues, ops, reference, registry, rows, weights
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import ACT_BITS, FLOATS, Target
from svdq_pack.tests.unit.helpers import relative
from svdq_pack.tests.unit.layers import (
    BF16,
    CPU_VARIANTS,
    EPILOGUES,
    F16,
    F32,
    KINDS,
    TOLERANCE,
    VIEWS,
    assert_close,
    cpu_pairs,
    inputs,
    make,
    served_by,
    wanted,
    wanted_exactly,
)


def pairs(kinds, *more):
    return pytest.mark.parametrize("kind, variant", cpu_pairs(kinds, *more))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pairs(KINDS)
def test_linear(kind, variant, dtype):
    """By each variant that may serve on a CPU: exact, or with activations rounded as it says and nothing else."""
    weight = make(kind)
    x = inputs(33, 384, dtype)
    out = torch.zeros(33, 256, dtype=dtype)
    with served_by(variant):
        assert registry.plan(weight, Target("cpu"), dtype).variant.name == variant
        ops.linear(x, weight, out)
        assert_close(out, wanted(x, weight), TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 17, 255, 257])
@pairs(["int4 unsigned", "nvfp4", "awq"])
def test_token_counts(kind, variant, tokens):
    weight = make(kind, n=128, k=128)
    x, out = inputs(tokens, 128), torch.zeros(tokens, 128)
    with served_by(variant):
        ops.linear(x, weight, out)
        assert_close(out, wanted(x, weight), TOLERANCE[F32])


@pairs(["int4", "awq"])
def test_fp16_parameters(kind, variant):
    weight = make(kind, half=F16)
    x, out = inputs(5, 384), torch.zeros(5, 256)
    with served_by(variant):
        ops.linear(x, weight, out)
        assert_close(out, wanted(x, weight), TOLERANCE[F32])


@pairs(KINDS)
def test_accumulates(kind, variant):
    """Two linears into one out, as linear2 of a single block does."""
    first, second = make(kind), make("int4", k=128)
    x, y = inputs(9, 384), inputs(9, 128)
    out, added = torch.full((9, 256), float("nan")), torch.randn(256)
    with served_by(variant):
        ops.linear(x, first, out, added)
        ops.linear(y, second, out, accumulate=True)
        assert_close(out, wanted(x, first) + added + wanted(y, second), TOLERANCE[F32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 2 * 128 * 128])
def test_chunks(monkeypatch, kind, chunk):
    weight, x = make(kind, n=384, k=128), inputs(5, 128)
    whole, out = torch.zeros(5, 384), torch.zeros(5, 384)
    with registry.using("weight_only"):
        ops.linear(x, weight, whole)
        monkeypatch.setattr(weights, "CHUNK", chunk)
        ops.linear(x, weight, out)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)


def test_threads_at_once():
    """Each unpacks into memory of its own."""
    layers = [(make(kind, n=512, k=128 * (i + 1)), inputs(7, 128 * (i + 1))) for i, kind in enumerate(("int4", "nvfp4", "awq"))]

    def run(weight, x):
        out = torch.zeros(7, 512)
        ops.linear(x, weight, out)
        return out

    wanted = [run(*layer) for layer in layers]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(lambda i: run(*layers[i % 3]), range(90)), wanted * 30):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["int4", "int4 unsigned", "nvfp4", "nvfp4 wcscales", "int4 no branch"])
@pytest.mark.parametrize("act_bits, act, most", [(None, None, 0.2), (8, "e4m3", 0.06)])
def test_reference_on_request(kind, act_bits, act, most):
    """Activations are rounded to what is asked for: noisy, but the same layer."""
    weight, x = make(kind), torch.nn.functional.gelu(inputs(6, 384)).to(BF16)       # what unsigned layers are for
    out, plain = torch.zeros(6, 256, dtype=BF16), torch.zeros(6, 256, dtype=BF16)
    with registry.using("reference"):
        ops.linear(x, weight, out, act_bits=act_bits)
    ops.linear(x, weight, plain)
    assert torch.equal(out, reference.linear_w4a4(x, weight.logical(), act=act).to(BF16))
    assert 1e-3 < relative(out, plain) < most


# Strides

VIEW = pytest.mark.parametrize("view", VIEWS)
SERVED = pytest.mark.parametrize("variant", [*(variant.name for variant in CPU_VARIANTS), "reference"])


@VIEW
@pairs(["int4", "nvfp4 wcscales", "awq"], "reference")
def test_strides_of_x(kind, variant, view):
    weight, x, plain, out = make(kind), inputs(7, 384), torch.zeros(7, 256), torch.zeros(7, 256)
    strided = VIEWS[view](7, 384)
    strided.copy_(x)
    kept = strided._base.clone()
    with served_by(variant):
        ops.linear(x, weight, plain)
        ops.linear(strided, weight, out)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(strided._base, kept)


@SERVED
def test_one_row_for_all_tokens(variant):
    """x with a stride of 0, as `expand` makes it."""
    weight, row, plain, out = make("int4"), inputs(1, 384), torch.zeros(1, 256), torch.zeros(5, 256)
    with served_by(variant):
        ops.linear(row, weight, plain)
        ops.linear(row.expand(5, 384), weight, out)
    torch.testing.assert_close(out, plain.expand(5, 256), rtol=1e-5, atol=1e-5)


@VIEW
@SERVED
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("epilogue", [None, "Gated"])
def test_strides_of_out(epilogue, accumulate, variant, view):
    """What lies between stays untouched."""
    weight, x, plain = make("int4"), inputs(7, 384), torch.full((7, 256), 3.0)
    epilogue = epilogue and check.random_epilogue(EPILOGUES[epilogue], 7, 256, F32)
    out = VIEWS[view](7, 256)
    with served_by(variant):
        ops.linear(x, weight, plain, torch.ones(256), accumulate, epilogue=epilogue)
        ops.linear(x, weight, out, torch.ones(256), accumulate, epilogue=epilogue)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    out.fill_(3)
    assert (out._base == 3).all()


@pairs(["int4", "nvfp4 wcscales", "awq"])
def test_columns_of_wide_tensors(kind, variant):
    """A tile of a ComfyUI layer reads columns of a wide x and adds to columns of a wide y; the rest stays untouched."""
    weight = make(kind)
    wide_x, wide_out = inputs(14, 384 + 128)[::2], torch.full((7, 640), 3.0)
    kept = wide_x.clone()
    with served_by(variant):
        ops.linear(wide_x[:, 128:], weight, wide_out[:, 256:512], accumulate=True)
        assert_close(wide_out[:, 256:512] - 3, wanted(wide_x[:, 128:], weight), 2 * TOLERANCE[F32])
    assert (wide_out[:, :256] == 3).all() and (wide_out[:, 512:] == 3).all() and torch.equal(wide_x, kept)


# x and out in one memory

APART = {"columns beside": lambda both: (both[:7, :384], both[:7, 384:640]),
         "columns before": lambda both: (both[:7, 256:640], both[:7, :256]),
         "rows in turn": lambda both: (both[0:14:2, :384], both[1:14:2, :256]),
         "rows below": lambda both: (both[:7, :384], both[7:14, 100:356]),
         "one row each": lambda both: (both[:1, :384], both[1:2, :256])}
TOGETHER = {"the same": lambda both: (both[:7, :384], both[:7, :256]),
            "one column": lambda both: (both[:7, :384], both[:7, 383:639]),
            "the last column of out": lambda both: (both[:7, 255:639], both[:7, :256]),
            "the last row": lambda both: (both[:7, :384], both[6:13, :256]),
            "transposed": lambda both: (both[:7, :384], both[:256, :7].t()),
            "other strides": lambda both: (both[:7, :384], both[0:14:2, 300:556])}


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_x_and_out_apart_in_one_memory(views):
    weight = make("int4")
    x, out = views(torch.randn(256, 640, generator=torch.Generator().manual_seed(0)))
    want, kept = torch.zeros(out.shape), x.clone()
    ops.linear(kept, weight, want)
    ops.linear(x, weight, out)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("views", TOGETHER.values(), ids=TOGETHER)
def test_out_that_overlaps_x(views):
    both = torch.randn(256, 640)
    x, out = views(both)
    kept = both.clone()
    with pytest.raises(ShapeError, match=r"linear: out \[7, 256\] shares memory with x \[7, 384\].*clone of x"):
        ops.linear(x, make("int4"), out)
    assert torch.equal(both, kept)


def test_overlaps_against_every_element():
    """Random views of one memory. Never apart where they share an element; and, with the same strides or with memory of
    their own, never together where they do not."""
    random, memory = torch.Generator().manual_seed(3), torch.arange(400)
    seen = {True: 0, False: 0}

    def number(most):
        return int(torch.randint(1, most + 1, (), generator=random))
    for _ in range(3000):
        m, strides = number(4), (number(20), number(3))
        first, second = ((m, number(5)), (m, number(5)))
        strides = [strides, strides if number(2) == 1 else (number(20), number(3))]
        a, b = (torch.as_strided(memory, shape, stride, number(120)) for shape, stride in zip((first, second), strides))
        in_a, in_b, said = set(a.flatten().tolist()), set(b.flatten().tolist()), rows.overlaps(a, b)
        shared, apart = bool(in_a & in_b), max(in_a) < min(in_b) or max(in_b) < min(in_a)
        assert said or not shared, (a, b)
        columns = strides[0] == strides[1] and strides[0][1] == 1 and strides[0][0] >= first[1] + second[1]
        if apart or columns:
            assert said == shared, (a, b)
            seen[shared] += 1
    assert min(seen.values()) > 50
    assert not rows.overlaps(memory[:0].view(0, 4), memory[:4].view(1, 4))


@pytest.mark.parametrize("shape, strides, said", [
    ((7, 256), (256, 1), False), ((7, 256), (640, 1), False), ((7, 256), (1, 7), False), ((1, 256), (0, 1), False),
    ((7, 1), (1, 0), False), ((0, 256), (0, 0), False), ((7, 256), (0, 1), True), ((7, 256), (256, 0), True),
    ((7, 256), (255, 1), True), ((7, 256), (1, 6), True), ((7, 1), (0, 1), True)])
def test_out_that_overlaps_itself(shape, strides, said):
    out = torch.zeros(7000).as_strided(shape, strides)
    assert rows.overlaps_itself(out) == said
    if said and shape[1] == 256:
        with pytest.raises(ShapeError, match=r"linear: numbers of out \[7, 256\] share memory, its strides are"):
            ops.linear(torch.randn(7, 384), make("int4"), out)


# Epilogues

EPILOGUE = pytest.mark.parametrize("name", EPILOGUES)


@EPILOGUE
@pytest.mark.parametrize("accumulate", [False, True])
@pairs(["int4 unsigned", "nvfp4", "awq"], "reference")
def test_epilogue_after_any_variant(kind, variant, accumulate, name):
    """Of the product as that variant stores it, plus what out held; out may be columns of a wider tensor."""
    weight, epilogue = make(kind, n=384, k=128), check.random_epilogue(EPILOGUES[name], 5, 384, F32)
    x, wide = inputs(5, 128), torch.full((5, 400), 3.0)
    out, plain = wide[:, :384], torch.full((5, 384), 3.0)
    with served_by(variant):
        ops.linear(x, weight, plain, accumulate=accumulate)
        ops.linear(x, weight, out, accumulate=accumulate, epilogue=epilogue)
    torch.testing.assert_close(out, epilogue.of(plain), rtol=1e-6, atol=1e-6)
    assert (wide[:, 384:] == 3).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@EPILOGUE
def test_epilogue_rounds_once(name, dtype):
    weight, epilogue = make("int4", n=384, k=128), check.random_epilogue(EPILOGUES[name], 5, 384, dtype)
    x, plain, out = inputs(5, 128, dtype), torch.zeros(5, 384, dtype=dtype), torch.zeros(5, 384, dtype=dtype)
    ops.linear(x, weight, plain)
    ops.linear(x, weight, out, epilogue=epilogue)
    assert torch.equal(out, epilogue.of(plain).to(dtype))


def test_epilogue_in_fp16_ends_at_its_largest_number():
    weight, out = make("int4", n=384, k=128, half=F16), torch.zeros(2, 384, dtype=F16)
    gated = epilogues.Gated(torch.full((2, 384), -60000.0).half(), torch.full((384,), 1.0).half())
    ops.linear(inputs(2, 128, F16), weight, out, torch.full((384,), -30000.0).half(), epilogue=gated)
    assert (out == -65504).all()


def test_residual_may_be_out():
    weight, gated = make("int4", n=384, k=128), check.random_epilogue(epilogues.Gated, 5, 384, F32)
    out, want = gated.residual.clone(), torch.zeros(5, 384)
    ops.linear(inputs(5, 128), weight, want, epilogue=gated)
    ops.linear(inputs(5, 128), weight, out, epilogue=epilogues.Gated(out, gated.gate))
    assert torch.equal(out, want)


def test_epilogues_that_do_not_fit():
    weight, x, out = make("int4", n=256, k=128), inputs(5, 128), torch.zeros(5, 256)
    residual, gate, turn, norm = torch.zeros(5, 256), torch.ones(256), torch.zeros(5, 64, 2, 2), torch.ones(128)
    for epilogue, accumulate, words in [
            (epilogues.Gated(residual[:4], gate), False, r"residual is \[4, 256\]"),
            (epilogues.Gated(residual, gate[1:]), False, r"gate is \[255\]"),
            (epilogues.Gated(residual.bfloat16(), gate), False, "residual is .*bfloat16"),
            (epilogues.Gated(out, gate), True, "clone it"),
            (epilogues.Gated(out.view(-1)[:5].expand(256, 5).t(), gate), False, "other strides"),
            (epilogues.QKV(norm, norm, turn), False, "N is 256")]:
        with pytest.raises(ShapeError, match=words):
            ops.linear(x, weight, out, accumulate=accumulate, epilogue=epilogue)
    weight, out = make("int4", n=384, k=128), torch.zeros(5, 384)
    for epilogue, words in [(epilogues.QKV(norm[1:], norm, turn), "query is"),
                            (epilogues.QKV(norm, norm.half(), turn), "key is"),
                            (epilogues.QKV(norm, norm, turn[:3]), r"rotation is \[3"),
                            (epilogues.QKV(norm, norm, turn.half()), "float32")]:
        with pytest.raises(ShapeError, match=words):
            ops.linear(x, weight, out, epilogue=epilogue)


# What is refused

@pytest.mark.parametrize("x, out, words", [
    ((3, 256), (3, 256), ["x is [3, 256]", "weight is [256, 384]", "x must be [tokens, 384]"]),
    ((3, 384), (3, 128), ["out is [3, 128]", "out [tokens, 256]"]),
    ((3, 384), (4, 256), ["x is [3, 384]", "out is [4, 256]"]),
    ((1, 3, 384), (3, 256), ["x is [1, 3, 384]"]),
    ((384,), (256,), ["x is [384]"]),
])
@pytest.mark.parametrize("kind", ["int4", "awq"])
def test_wrong_shapes(kind, x, out, words):
    with pytest.raises(ShapeError) as error:
        ops.linear(torch.zeros(x), make(kind), torch.zeros(out))
    assert all(word in str(error.value) for word in ["linear:", *words])


@pytest.mark.parametrize("x, out, word", [
    (torch.float64, torch.float64, "float64"), (F32, BF16, "out torch.bfloat16"), (torch.int8, torch.int8, "int8")])
def test_wrong_dtypes(x, out, word):
    with pytest.raises(ShapeError, match=f"linear: .*{word}.*Both must be the same"):
        ops.linear(torch.zeros(3, 384, dtype=x), make("int4"), torch.zeros(3, 256, dtype=out))


@pytest.mark.parametrize("bias", [torch.zeros(384), torch.zeros(256, dtype=BF16), torch.zeros(256, device="meta")])
def test_wrong_bias(bias):
    with pytest.raises(ShapeError, match=r"linear: bias is .*Needs \[256\] torch.float32 on cpu"):
        ops.linear(torch.zeros(3, 384), make("int4"), torch.zeros(3, 256), bias)


def test_wrong_devices():
    with pytest.raises(ShapeError, match="x is on meta, out on cpu.*one device"):
        ops.linear(torch.zeros(3, 384, device="meta"), make("int4"), torch.zeros(3, 256))


@pytest.mark.parametrize("act_bits", [5, 0, 32, True, False, "4", "16", 4.0, [4]], ids=repr)
def test_wrong_act_bits(act_bits):
    with pytest.raises(ShapeError) as error:
        ops.linear(torch.zeros(3, 384), make("int4"), torch.zeros(3, 256), act_bits=act_bits)
    assert str(error.value).startswith(f"linear: act_bits is {act_bits!r}. Needs 4, 8 or 16")


@pytest.mark.parametrize("act_bits", [None, 4, 8, 16])
@pytest.mark.parametrize("variant", [variant.name for variant in CPU_VARIANTS if variant.activations is None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_act_bits_where_no_activation_is_rounded(dtype, variant, act_bits):
    """It serves whatever is asked for."""
    weight, x = make("int4"), inputs(3, 384, dtype)
    out, want = torch.zeros(3, 256, dtype=dtype), torch.zeros(3, 256, dtype=dtype)
    with served_by(variant):
        ops.linear(x, weight, out, act_bits=act_bits)
        ops.linear(x, weight, want)
    assert torch.equal(out, want)
    assert_close(out, wanted_exactly(x, weight), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_act_bits_without_a_request(dtype):
    """16 rounds nothing, None is as whoever serves rounds, and two that one variant serves give the same."""
    weight, x = make("int4"), inputs(3, 384, dtype)
    outs = {bits: torch.zeros(3, 256, dtype=dtype) for bits in (None, *ACT_BITS)}
    for bits, out in outs.items():
        ops.linear(x, weight, out, act_bits=bits)
    assert_close(outs[16], wanted_exactly(x, weight), TOLERANCE[dtype])
    assert_close(outs[None], wanted(x, weight), TOLERANCE[dtype])
    serves = {bits: registry.plan(weight, Target("cpu"), dtype, bits).variant for bits in outs}
    for bits in outs:
        assert torch.equal(outs[bits], outs[None]) == (serves[bits] is serves[None])


def test_a_plan_that_was_kept():
    """It is not asked for again, and act_bits is part of it."""
    weight, x = make("int4"), inputs(3, 384, BF16)
    with registry.using("reference"):
        plan = registry.plan(weight, Target("cpu"), BF16, 8)
        want = torch.zeros(3, 256, dtype=BF16)
        ops.linear(x, weight, want, act_bits=8)
    out, plain = torch.zeros(3, 256, dtype=BF16), torch.zeros(3, 256, dtype=BF16)
    plan.run(x, weight, out)
    ops.linear(x, weight, plain)
    assert torch.equal(out, want) and not torch.equal(out, plain)
