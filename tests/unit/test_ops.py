"""The operators on packed operands: values against float64, contracts, and the choice of implementation."""

import pytest
import torch

from svdq_pack.kernels import epilogues, layout, ops, reference, selftest, weights
from svdq_pack.kernels.errors import ShapeError
from svdq_pack.kernels.weights import AWQWeight, W4A4Weight

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Relative error of a K = 384 product whose weight, input and sum are rounded to the dtype; twice what was measured.
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 1.5e-2}
KINDS = ("int4", "int4 unsigned", "nvfp4", "nvfp4 wcscales", "int4 no branch", "awq")


def make(kind, n=256, k=384, rank=32, half=BF16):
    """Random operands with full-range codes, -8 included."""
    random = torch.Generator().manual_seed(n + k)

    def uniform(*shape, low=0.5, high=1.5):
        return (low + (high - low) * torch.rand(shape, generator=random)).to(half)

    if kind == "awq":
        return AWQWeight(layout.pack_awq(torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)),
                         uniform(k // 64, n, high=0.6), uniform(k // 64, n, low=-4, high=-3))
    precision, _, rest = kind.partition(" ")
    scales = uniform(n, k // layout.GROUP[precision])
    proj_down, proj_up = (torch.randn(size, rank, generator=random).to(half) for size in (k, n))
    return W4A4Weight(
        precision=precision, unsigned=rest == "unsigned",
        qweight=layout.pack_codes(torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)),
        wscales=layout.pack_scales(scales if precision == "int4" else scales.to(torch.float8_e4m3fn)),
        smooth=layout.pack_vector(uniform(k)), wtscale=0.75 if precision == "nvfp4" and not rest else 1.0,
        wcscales=layout.pack_vector(uniform(n)) if rest == "wcscales" else None,
        proj_down=None if rest == "no branch" else layout.pack_down(proj_down),
        proj_up=None if rest == "no branch" else layout.pack_up(proj_up))


def exact(weight):
    """(W, bias) in float64, from the definition in checkpoint-format 6.1 and 5.7."""
    n, k = weight.shape
    if isinstance(weight, AWQWeight):
        group = torch.arange(k) // 64
        return layout.unpack_awq(weight.qweight).double() * weight.wscales.t().double()[:, group] + \
            weight.wzeros.t().double()[:, group], torch.zeros(n, dtype=torch.float64)
    codes = layout.unpack_codes(weight.qweight)
    values = layout.signed(codes).double() if weight.precision == "int4" else layout.e2m1(codes).double()
    values *= layout.unpack_scales(weight.wscales).double()[:, torch.arange(k) // layout.GROUP[weight.precision]]
    values *= weight.wtscale
    if weight.wcscales is not None:
        values *= layout.unpack_vector(weight.wcscales).double()[:, None]
    dense = values / layout.unpack_vector(weight.smooth).double()
    bias = dense.sum(1) * (0.171875 if weight.unsigned else 0)
    if weight.proj_down is not None:
        dense = dense + layout.unpack_up(weight.proj_up).double() @ layout.unpack_down(weight.proj_down).double().t()
    return dense, bias


def inputs(tokens, k, dtype=F32):
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def assert_close(got, want, tolerance):
    error = ((got.double() - want).norm() / want.norm()).item() if want.numel() else 0
    assert got.isfinite().all() and error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(kind):
    dense, bias = weights.dequantize(weight := make(kind))
    want, want_bias = exact(weight)
    assert (dense.dtype, bias.dtype) == (F32, F32)
    assert_close(dense, want, 1e-6)
    assert bias.any() == (kind == "int4 unsigned")
    torch.testing.assert_close(bias.double(), want_bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind, dtype):
    weight = make(kind)
    dense, bias = exact(weight)
    x = inputs(33, 384, dtype)
    out = torch.zeros(33, 256, dtype=dtype)
    ops.linear(x, weight, out)
    assert_close(out, x.double() @ dense.t() + bias, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 17, 255, 257])
@pytest.mark.parametrize("kind", ["int4 unsigned", "nvfp4", "awq"])
def test_token_counts(kind, tokens):
    weight = make(kind, n=128, k=128)
    dense, bias = exact(weight)
    x, out = inputs(tokens, 128), torch.zeros(tokens, 128)
    ops.linear(x, weight, out)
    assert_close(out, x.double() @ dense.t() + bias, TOLERANCE[F32])


def epilogue_of(name, tokens, n, dtype):
    random = torch.Generator().manual_seed(tokens + n)
    query, key = torch.randn(2, 128, generator=random).to(dtype)
    return {"Gelu": lambda: epilogues.Gelu(),
            "Gated": lambda: epilogues.Gated(torch.randn(tokens, n, generator=random).to(dtype),
                                       torch.randn(n, generator=random).to(dtype)),
            "QKV": lambda: epilogues.QKV(query, key, torch.randn(tokens, 64, 2, 2, generator=random), 0.5)}[name]()


EPILOGUES = pytest.mark.parametrize("name", ["Gelu", "Gated", "QKV"])


@EPILOGUES
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("variant", ["weight_only", "reference"])
@pytest.mark.parametrize("kind", ["int4 unsigned", "nvfp4", "awq"])
def test_epilogue_after_any_variant(kind, variant, accumulate, name):
    """Of the product as that variant stores it, plus what out held; out may be columns of a wider tensor."""
    weight, epilogue = make(kind, n=384, k=128), epilogue_of(name, 5, 384, F32)
    x, wide = inputs(5, 128), torch.full((5, 400), 3.0)
    out, plain = wide[:, :384], torch.full((5, 384), 3.0)
    with ops.using(variant):
        ops.linear(x, weight, plain, accumulate=accumulate)
        ops.linear(x, weight, out, accumulate=accumulate, epilogue=epilogue)
    torch.testing.assert_close(out, epilogue.of(plain), rtol=1e-6, atol=1e-6)
    assert (wide[:, 384:] == 3).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@EPILOGUES
def test_epilogue_rounds_once(name, dtype):
    weight, epilogue = make("int4", n=384, k=128), epilogue_of(name, 5, 384, dtype)
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
    weight, gated = make("int4", n=384, k=128), epilogue_of("Gated", 5, 384, F32)
    out, want = gated.residual.clone(), torch.zeros(5, 384)
    ops.linear(inputs(5, 128), weight, want, epilogue=gated)
    ops.linear(inputs(5, 128), weight, out, epilogue=epilogues.Gated(out, gated.gate))
    assert torch.equal(out, want)


def test_epilogues_that_do_not_fit():
    weight, x, out = make("int4", n=256, k=128), inputs(5, 128), torch.zeros(5, 256)
    rows, gate, turn, norm = torch.zeros(5, 256), torch.ones(256), torch.zeros(5, 64, 2, 2), torch.ones(128)
    for epilogue, accumulate, words in [
            (epilogues.Gated(rows[:4], gate), False, r"residual is \[4, 256\]"),
            (epilogues.Gated(rows, gate[1:]), False, r"gate is \[255\]"),
            (epilogues.Gated(rows.bfloat16(), gate), False, "residual is .*bfloat16"), (epilogues.Gated(out, gate), True, "clone it"),
            (epilogues.Gated(out.view(-1)[:5].expand(256, 5).t(), gate), False, "other strides"),
            (epilogues.QKV(norm, norm, turn), False, "N is 256")]:
        with pytest.raises(ShapeError, match=words):
            ops.linear(x, weight, out, accumulate=accumulate, epilogue=epilogue)
    weight, out = make("int4", n=384, k=128), torch.zeros(5, 384)
    for epilogue, words in [(epilogues.QKV(norm[1:], norm, turn), "query is"), (epilogues.QKV(norm, norm.half(), turn), "key is"),
                            (epilogues.QKV(norm, norm, turn[:3]), r"rotation is \[3"),
                            (epilogues.QKV(norm, norm, turn.half()), "float32")]:
        with pytest.raises(ShapeError, match=words):
            ops.linear(x, weight, out, epilogue=epilogue)


def test_nothing_fuses_epilogues_here():
    for kind in ("int4", "nvfp4", "awq"):
        assert not ops.fuses(ops.request_for(inputs(5, 384), make(kind)))


@pytest.mark.parametrize("kind", ["int4", "awq"])
def test_fp16_parameters(kind):
    weight = make(kind, half=F16)
    dense, bias = exact(weight)
    x, out = inputs(5, 384), torch.zeros(5, 256)
    ops.linear(x, weight, out)
    assert_close(out, x.double() @ dense.t() + bias, TOLERANCE[F32])


@pytest.mark.parametrize("kind", ["int4", "nvfp4 wcscales", "awq"])
def test_strided_x_and_slice_of_out(kind):
    """A tile of a ComfyUI layer reads columns of a wide x and adds to columns of a wide y; the rest stays untouched."""
    weight = make(kind)
    dense, bias = exact(weight)
    wide_x, wide_out = inputs(14, 384 + 128)[::2], torch.full((7, 640), 3.0)
    kept = wide_x.clone()
    ops.linear(wide_x[:, 128:], weight, wide_out[:, 256:512], accumulate=True)
    assert_close(wide_out[:, 256:512] - 3, wide_x[:, 128:].double() @ dense.t() + bias, 2 * TOLERANCE[F32])
    assert (wide_out[:, :256] == 3).all() and (wide_out[:, 512:] == 3).all() and torch.equal(wide_x, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulates(kind):
    """Two linears into one out, as linear2 of a single block does."""
    first, second = make(kind), make("int4", k=128)
    x, y = inputs(9, 384), inputs(9, 128)
    out, added = torch.full((9, 256), float("nan")), torch.randn(256)
    ops.linear(x, first, out, added)
    ops.linear(y, second, out, accumulate=True)
    (dense, bias), (other, _) = exact(first), exact(second)
    assert_close(out, x.double() @ dense.t() + bias + added + y.double() @ other.t(), TOLERANCE[F32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk, pieces", [(1, 3), (128 * 128, 3), (2 * 128 * 128, 2), (1 << 24, 1)])
def test_chunks(monkeypatch, kind, chunk, pieces):
    """Chunks only bound memory. One chunk is at least 128 rows, the last one may be shorter."""
    weight, x = make(kind, n=384, k=128), inputs(5, 128)
    whole, (dense, bias) = torch.zeros(5, 384), weights.dequantize(weight)
    ops.linear(x, weight, whole)
    monkeypatch.setattr(weights, "CHUNK", chunk)
    assert len(list(weights.chunks(384, 128))) == pieces
    out = torch.zeros(5, 384)
    ops.linear(x, weight, out)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    again, bias_again = weights.dequantize(weight)
    assert torch.equal(again, dense) and torch.equal(bias_again, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind):
    weight = make(kind, n=512)
    dense, bias = weights.dequantize(weight)
    for start, stop in ((0, 128), (128, 384), (384, 512), (0, 512)):
        part, part_bias = weights.dequantize(weight.cut(start, stop))
        assert weight.cut(start, stop).shape == (stop - start, 384)
        torch.testing.assert_close(part, dense[start:stop], rtol=0, atol=1e-5)
        torch.testing.assert_close(part_bias, bias[start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "int4 unsigned", "nvfp4", "nvfp4 wcscales", "int4 no branch"])
def test_reference_on_request(kind):
    weight, x = make(kind), torch.nn.functional.gelu(inputs(6, 384)).to(BF16)       # what unsigned layers are for
    out, plain = torch.zeros(6, 256, dtype=BF16), torch.zeros(6, 256, dtype=BF16)
    with ops.using("reference"):
        ops.linear(x, weight, out)
    ops.linear(x, weight, plain)
    assert torch.equal(out, reference.linear_w4a4(x, weight.logical()).to(BF16))
    error = ((out.float() - plain.float()).norm() / plain.float().norm()).item()
    assert 1e-3 < error < 0.2                               # 4-bit activations: noisy, but the same layer


# Contracts

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


# The choice of implementation

def request(op="linear_w4a4", dtype=BF16, capability=None, **rest):
    return ops.Request(op, dtype, capability, **rest)


def test_choice_on_cpu():
    for op in ("linear_w4a4", "linear_awq"):
        for dtype in ops.FLOATS:
            assert ops.choose(request(op, dtype)).name == "weight_only"
            assert [why for _, why in ops.declined(request(op, BF16))] == ["needs a CUDA GPU"]


@pytest.mark.parametrize("capability, w4a4, awq", [
    ((7, 5), "weight_only", "weight_only"), ((8, 0), "fused", "fused"), ((8, 6), "fused", "fused"), ((8, 9), "fused", "fused"),
    ((9, 0), "weight_only", "fused"), ((12, 0), "weight_only", "fused")])
def test_choice_on_gpus(capability, w4a4, awq):
    """Where 4-bit MMAs are native the fused kernels serve; the emulated ones only on request."""
    assert ops.choose(request(capability=capability, precision="int4")).name == w4a4
    assert ops.choose(request("linear_awq", capability=capability)).name == awq
    with ops.using("fused_emulated"):
        assert ops.choose(request(capability=capability)).name == ("weight_only" if capability < (8, 0) else "fused_emulated")
    with ops.using("weight_only"):
        assert ops.choose(request(capability=capability)).name == "weight_only"


@pytest.mark.parametrize("rest, why", [
    ({"precision": "nvfp4"}, "takes int4 weights, not nvfp4"), ({"dtype": F32}, "takes bfloat16, float16, not float32"),
    ({"dtype": F16, "scales": BF16}, "needs scales of the compute dtype float16, the file has bfloat16"),
    ({"capability": (9, 0)}, "made for sm_80 to sm_89, this GPU is sm_90")])
def test_why_not_fused(rest, why):
    asked = request(**{"capability": (8, 9)} | rest)
    assert ops.choose(asked).name == "weight_only"
    assert [(variant.name, reason) for variant, reason in ops.declined(asked)] == [("fused", why)]


def test_kernels_that_do_not_build(monkeypatch):
    ops.trusted.cache_clear()
    monkeypatch.setattr(ops.build, "kernels_for", lambda device: None)
    asked = request(capability=(8, 9), device=0)
    assert ops.choose(asked).name == "weight_only"
    assert "did not build" in ops.declined(asked)[0][1]


def last_row_wrong(x, weight, out, bias, accumulate):
    ops.reference_of("linear_w4a4")(x, weight, out, bias, accumulate)
    out[-1] *= 2                                            # of the tail


def refused(*arguments):
    raise RuntimeError("launch failed")


@pytest.mark.parametrize("broken", [None, last_row_wrong, refused])
def test_kernels_serve_only_after_their_self_test(monkeypatch, caplog, broken):
    """On the CPU, with the torch path in the kernels' place."""

    monkeypatch.setattr(ops.build, "kernels_for", lambda device: object())
    monkeypatch.setattr(ops, "_fused_w4a4", broken or ops.reference_of("linear_w4a4"))
    monkeypatch.setattr(ops, "_fused_awq", ops._weight_only)
    check = selftest.check
    monkeypatch.setattr(selftest, "check", lambda device, *rest: check("cpu", *rest))
    ops.trusted.cache_clear()
    assert ops.trusted(0) == (broken is None)
    assert ("fail their self-test on cuda:0" in caplog.text) == (broken is not None)
    ops.trusted.cache_clear()


def test_using():
    def name(op="linear_w4a4"):
        return ops.choose(request(op)).name

    with ops.using("reference"):
        assert name() == "reference"
        assert name("linear_awq") == "reference"
        with ops.using("weight_only"):
            assert name() == "weight_only"
        assert name() == "reference"
    assert name() == "weight_only"
    with pytest.raises(ZeroDivisionError), ops.using("reference"):
        1 / 0
    assert name() == "weight_only"


def test_no_implementation_says_why():
    with pytest.raises(ShapeError) as error:
        ops.choose(request(dtype=torch.float64))
    considered = [variant.name for variant in ops.VARIANTS if variant.op == "linear_w4a4"]
    assert all(f"{name}: " in str(error.value) for name in considered)
    assert str(error.value).startswith("linear_w4a4: no implementation serves")


def test_table():
    """Every operator has a variant that serves every float dtype anywhere, and names are unique."""
    pairs = [(variant.op, variant.name) for variant in ops.VARIANTS]
    assert len(set(pairs)) == len(pairs)
    for op in {variant.op for variant in ops.VARIANTS}:
        last = [variant for variant in ops.VARIANTS if variant.op == op][-1]
        assert last.name == "weight_only" and set(last.dtypes) == set(ops.FLOATS) and not last.on_request
