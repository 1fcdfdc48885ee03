"""quant_down_normal and gemm_w4a4_normal, W4A4 with scales that fp16 can take: what test_w4a4_sm80.py asks, by the bounds that
the head of w4a4_normal.cuh proves instead of fp32's; sums that reach for them; the order of the weight.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import check, layout, w4a4
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.rows import row_blocks
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import w4a4_normal
from svdq_pack.svdq.kernels.variants.w4a4_normal import FORMS, NormalWeight, gemm, headroom, quant_down
from svdq_pack.svdq.kernels.weights import W4A4Weight
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded
from svdq_pack.tests.kernels.families.layers import (
    BF16,
    FP16,
    GOLDEN,
    Layer,
    golden_layer,
    launch_feeding,
    launch_modulated,
    layer,
)
from svdq_pack.tests.kernels.families.w4a4 import W4A4, blank, gemm_operands, pack, quant_operands, unpack, w4a4_bugs
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

VARIANT, DIAGONAL = (variant for variant in w4a4_normal.VARIANTS if variant.on_request)
SUM_ERROR = {variant.name.split("_")[1]: variant.sum_error for variant in w4a4_normal.VARIANTS}
GPU_SLACK = 1e-6                            # tensor cores cut off where simulators round
HALF_STEP = 2.0**-11                        # of fp16, relative; half its least step is 2^-25
N, K = 256, 640                             # two tiles; ten groups: more than a ring of stages, or the warps of the quantiser


@functools.cache
def packed(layer):
    return NormalWeight.pack(layer.weight)


@dataclass(frozen=True)
class Normal(W4A4):
    """The two operators in one form. What stands between them is without the largest scales, which are checked."""
    form: str

    def quantise(self, executor, layer, x, **how):
        qact, ascales, low = super().quantise(executor, layer, x, **how)
        assert torch.equal(*(part.view(torch.int32) for part in (ascales, with_largest(ascales[:, :-1]))))
        return [qact, ascales[:, :-1], low]

    def multiply(self, executor, layer, quantised, out, *, bias=True, accumulate=False, **how):
        weight, there, (qact, ascales, low) = executor.put(packed(layer)), executor.put(out), quantised
        with executor.set(**how):
            gemm(*executor.put([qact, with_largest(ascales), low]), weight.qweight, weight.wscales, weight.proj_up,
                 executor.put(layer.bias) if bias else None, there, weight.unsigned, accumulate, columns=weight.columns,
                 form=self.form)
        return there.cpu()

    def check_product(self, executor, layer, quantised, out, rows=slice(None), before=None, bias=True, one_sign=False):
        """Against float64 from the same codes: within the proven bound, element by element; together, within sum_error, but
        where terms are of one sign, so that errors may be, too."""
        parts = [part[:len(out)][rows] for part in unpack(quantised, layer.unsigned)]
        want, size = layer.product(*parts, bias=bias)
        if before is not None:
            want, size = want + before.double(), size + before.double().abs()
        assert_rounded(out[rows], want, bound(layer, *parts[:2], self.form) + executor.slack * size, "out", 1.0)
        limit = SUM_ERROR[self.form] + 1.01 * check.ROUNDED[out.dtype]
        assert one_sign or (out[rows].double() - want).norm() <= limit * want.norm()


def with_largest(ascales):
    """[M/64, G, 4, 8, 2] -> [M/64, G + 1, ...], the last the largest of a row by its bits, where NaN is above Inf."""
    return torch.cat((ascales, ascales.contiguous().view(torch.int32).amax(1, keepdim=True).view(torch.float32)), 1)


def bound(layer, codes, scales, form):
    """The most by which sums may be off, [M, N]: I2 of w4a4_normal.cuh, from the exact sums."""
    groups, largest = scales.shape[1], scales.amax(1).double()
    up = torch.where(largest > 0, 2.0**(largest.clamp(min=2.0**-126).log2().floor() + 1), 0)[:, None]
    column = packed(layer).columns.double()[None]
    total, error = torch.zeros(len(codes), layer.shape[0], dtype=torch.float64), 0.0
    values = layout.signed(layer.logical.codes).double()
    for group in range(groups):
        k = slice(64 * group, 64 * group + 64)
        a = scales[:, group, None].double() / up.clamp(min=2.0**-140)
        w = layer.logical.wscales[:, group].double()[None] / column
        ad = a * (codes[:, k].double() @ values[:, k].T)
        total = total + ad * w
        own = HALF_STEP * (ad * w).abs() + 2.0**-25 * (ad.abs() + w.abs())
        error = error + own if form == "diag" else (error + own) * (1 + HALF_STEP) + HALF_STEP * total.abs() + 2.0**-25
    return error * 1.001 * up * column


FP16N, DIAG = BOTH = [Normal(quant_down, gemm, form) for form in FORMS]
EACH = pytest.mark.parametrize("both", BOTH, ids=FORMS)
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])


# The order of the weight

@DTYPES
@pytest.mark.parametrize("kind", ["usual", "far apart", "not finite"])
def test_pack_and_back(dtype, kind):
    """To the bit, sharing what it does not change; scales are below 2^-C; those of the file are kept where they must be."""
    weight = check.random_weight("int4", dtype, 384, 1280)[0]
    scales = layout.unpack_scales(weight.wscales).clone()
    scales[:, 3], scales[5], scales[7] = -scales[:, 3], 0, scales[7] * 2.0**-10
    if kind == "far apart":
        scales[9, :2] = torch.tensor([1.0, {BF16: 2.0**-15 + 2.0**-22, FP16: 2.0**-13 + 2.0**-23}[dtype]])
    elif kind == "not finite":
        scales[9, :2] = torch.tensor([float("nan"), float("inf")])
    weight = replace(weight, wscales=layout.pack_scales(scales))
    it = NormalWeight.pack(weight)
    back = it.unpack()
    assert all(torch.equal(got.view(torch.int8), getattr(weight, name).view(torch.int8))
               for name, got in back.tensors().items())
    assert back.tensors().keys() == weight.tensors().keys() and back.unsigned == weight.unsigned
    assert all(getattr(it, name) is getattr(weight, name) for name in ("qweight", "smooth", "proj_down", "proj_up"))
    assert (it.kept is None) == (kind != "far apart") and it.shape == weight.shape and it.dtype == dtype and it.rank == 32
    got = layout.unpack_scales(it.wscales).float()
    assert got[got.isfinite()].abs().max() < 2.0**-headroom(20)
    exact = scales.float() / it.columns[:, None]
    near = exact.isfinite()
    assert (got - exact)[near].abs().max() <= (0 if it.kept is None else 2.0**-25) and torch.equal(got.isfinite(), near)
    part = it.cut(128, 384)
    assert all(torch.equal(got.view(torch.int8), want.view(torch.int8)) for got, want in zip(
        part.unpack().tensors().values(), weight.cut(128, 384).tensors().values(), strict=True))
    assert torch.equal(part.columns, it.columns[128:])


def test_headroom():
    """Sums of the largest products, each rounded as far up as can be, stay in fp16; one less would not do."""
    for groups in (1, 2, 8, 9, 48, 192, 240, 255, 256, 481, 1000, 3316):
        c = headroom(groups)
        assert groups * (7680 / 2**c + 16) <= 65504
        assert c == 0 or groups * (7680 / 2**(c - 1) + 16) > 65504
    with pytest.raises(ShapeError, match="K is 212288. Sums in fp16 have room for 212224"):
        headroom(3317)
    with pytest.raises(ShapeError, match="is nvfp4. Needs int4"):
        NormalWeight.pack(check.random_weight("nvfp4", BF16, 128, 128)[0])


@UNSIGNED
def test_decode(unsigned):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(*((0, 16) if unsigned else (-8, 8)), (128, 192), generator=random)
    qact, ascales, low = pack(codes, torch.rand(128, 3, generator=random), torch.randn(128, 48, generator=random).to(BF16))
    want = w4a4.decode((qact, ascales, low), layer(128, 128, unsigned=unsigned).weight)
    got = w4a4.decode((qact, with_largest(ascales), low), layer(128, 128, unsigned=unsigned).weight)
    assert all(map(torch.equal, got, want)) and torch.equal(got[0], codes.float())


# Both kernels

CASES = [(1, 0, N, K), (17, 128, N, K), (65, 16, 128, K), (130, 32, N, 256)]


@EACH
@UNSIGNED
@DTYPES
@on("tokens, rank, n, k", emulator=CASES, interpreter=[(21, 48, 128, 256)],
    gpu=[*CASES, *((rows, rank, N, K) for rows in (16, 64, 257) for rank in (0, 48, 112)), (4608, 32, N, K)])
def test_linear(executor, both, tokens, rank, n, k, dtype, unsigned):
    both.check_linear(executor, layer(n, k, rank, dtype, unsigned), tokens)


@EACH
@on("k", emulator=[128, 256, 384, 3072], gpu=[128, 256, 384, 3072])
def test_depth(executor, both, k):
    """Fewer groups than stages of the ring, ends in any of them; FLUX's width."""
    both.check_linear(executor, layer(128, k, 32, BF16), 70)


ANY = [("fp16n", 128, 320, 77, 32), ("fp16n", 256, 64, 130, 16), ("diag", 128, 384, 77, 32)]


@UNSIGNED
@DTYPES
@on("form, n, k, tokens, rank", emulator=ANY, gpu=ANY)
def test_product_of_any_operands(executor, form, n, k, tokens, rank, dtype, unsigned):
    """All 16 codes, -8 included, which the quantiser never makes; any scales; an odd number of groups."""
    random, it, rows = torch.Generator().manual_seed(1), layer(n, k, rank, dtype, unsigned), row_blocks(tokens, 64) * 64
    quantised = pack(torch.randint(*((0, 16) if unsigned else (-8, 8)), (rows, k), generator=random),
                     (torch.rand(rows, k // 64, generator=random) + 0.25).to(dtype).float(),
                     torch.randn(rows, rank, generator=random).to(dtype))
    both = Normal(quant_down, gemm, form)
    both.check_product(executor, it, quantised, both.multiply(executor, it, quantised, blank(tokens, it)))


@EACH
@UNSIGNED
@on(emulator=True, gpu=True)
def test_error_of_sums(executor, both, unsigned):
    """The deepest layer of FLUX.1: at most 0.3 % of the norm in fp16n, before out is rounded; fp16 rounds it the least. The
    mean is off by less, so that errors are no bias."""
    it, tokens = layer(128, 12288, 0, FP16, unsigned), 20
    quantised = both.quantise(executor, it, it.x(tokens))
    out = both.multiply(executor, it, quantised, blank(tokens, it), bias=False)
    both.check_product(executor, it, quantised, out, bias=False)
    want, _ = it.product(*(part[:tokens] for part in unpack(quantised, unsigned)), bias=False)
    error = (out.double() - want) / want.norm(dim=1, keepdim=True) * 128**0.5
    assert error.pow(2).mean().sqrt() <= SUM_ERROR[both.form] and error.mean().abs() <= SUM_ERROR[both.form] / 4


def uniform(k, dtype, unsigned, code, scales):
    """A Layer [128, k] of one code and these scales [k/64] in every column."""
    codes = torch.full((128, k), code, dtype=torch.int8)
    wscales = layout.pack_scales(torch.as_tensor(scales).expand(128, k // 64).to(dtype))
    weight = W4A4Weight("int4", unsigned, layout.pack_codes(codes), wscales, torch.ones(k, dtype=dtype))
    return Layer(weight, torch.zeros(128, dtype=dtype))


@EACH
@on("k, exponent", emulator=[(128, -110), (15360, 0), (16512, 100)], gpu=[(15360, 0), (16320, 100), (16512, -110)])
def test_nothing_overflows(executor, both, k, exponent):
    """All codes at their extremes, all scales just below a power of two, and one sign: the largest sums that there are."""
    largest = 2.0 - 2.0**-7
    it = uniform(k, BF16, True, -8, torch.full((k // 64,), largest * 2.0**exponent))
    quantised = pack(torch.full((64, k), 15), torch.full((64, k // 64), largest * 2.0**(exponent // -2)),
                     torch.zeros(64, 0, dtype=BF16))
    out = both.multiply(executor, it, quantised, blank(2, it))
    want = -k * 120 * largest**2 * 2.0**(exponent + exponent // -2)
    assert out.isfinite().all() and (out.double() - want).abs().max() <= (2.0**-8 + k // 64 * HALF_STEP) * abs(want)
    both.check_product(executor, it, quantised, out, one_sign=True)


@on(emulator=True, gpu=True)
def test_error_reaches_its_bound(executor):
    """One large product, then as many as there can be of just less than half a step of it, which fp16 all loses."""
    k, tokens = 15360, 1
    scales = torch.full((k // 64,), 1.9921875)
    scales[0] = 1.0
    it = uniform(k, FP16, False, 0, scales)
    codes, weights = torch.zeros(64, k, dtype=torch.int32), torch.zeros(128, k, dtype=torch.int8)
    codes[:, :64], weights[:, :64] = -8, -8                     # 4096, whose step is 4
    codes[:, 64::64], weights[:, 64::64] = 1, 1
    it = it.changed(qweight=layout.pack_codes(weights))
    quantised = pack(codes, torch.ones(64, k // 64), torch.zeros(64, 0, dtype=FP16))
    want, most = 4096 + 239 * 1.9921875, bound(it, *unpack(quantised, False)[:2], "fp16n")[0, 0]
    out = FP16N.multiply(executor, it, quantised, blank(tokens, it))
    assert (out == 4096).all() and 0.8 * most <= want - 4096 <= most
    assert (DIAG.multiply(executor, it, quantised, blank(tokens, it)).double() - want).abs().max() <= 2 + 2.0**-10


@EACH
@on("dtype, lowest, highest", emulator=[(BF16, -40, 60), (FP16, -24, 3)], gpu=[(BF16, -40, 60), (FP16, -24, 3)])
def test_scales_of_any_size(executor, both, dtype, lowest, highest):
    check_scales_of_any_size(executor, both, dtype, lowest, highest)


def check_scales_of_any_size(executor, both, dtype, lowest, highest):
    """Of activations and weights, and as far apart within a row and a column: what is far below the largest is nothing beside
    it, what is not is exact."""
    random, n, k, tokens = torch.Generator().manual_seed(2), 128, 256, 70

    def sizes(*shape):
        exponents, mantissas = torch.randint(lowest, highest, shape, generator=random), torch.rand(shape, generator=random)
        return torch.ldexp(1 + mantissas, exponents).to(dtype)

    it = layer(n, k, 0, dtype)
    wscales = sizes(n, k // 64)
    wscales[0], wscales[1, 1:] = 0, 0
    it = it.changed(wscales=layout.pack_scales(wscales))
    ascales = (sizes(128, k // 64).float() * 2.0**-20).to(dtype).float()
    ascales[0], ascales[1, 1:] = 0, 0
    quantised = pack(torch.randint(-8, 8, (128, k), generator=random), ascales, torch.zeros(128, 0, dtype=dtype))
    out = both.multiply(executor, it, quantised, blank(tokens, it), bias=False)
    both.check_product(executor, it, quantised, out, bias=False)
    assert (out[0] == 0).all() and (out[:, 0] == 0).all()


@EACH
@on("tokens, dtype", emulator=[(20, BF16)], interpreter=[(16, BF16)], gpu=[(130, BF16), (130, FP16)])
def test_bad_tokens(executor, both, tokens, dtype):
    """A NaN or Inf makes its own token NaN, as in reference.py, and no other. In a scale of the weight, its column."""
    it = layer(128, 128, 16, dtype)
    x, bad = it.x(tokens), [2, 5, 9]
    clean = both.multiply(executor, it, both.quantise(executor, it, x), blank(tokens, it))
    x[2, 70], x[5, 3], x[9, 127] = float("nan"), float("inf"), -float("inf")
    out = both.multiply(executor, it, both.quantise(executor, it, x), blank(tokens, it))
    others = [row for row in range(tokens) if row not in bad]
    assert out[bad].isnan().all() and torch.equal(out[others], clean[others])
    scales = layout.unpack_scales(it.weight.wscales).clone()
    scales[3, 1], scales[4, 0] = float("nan"), float("inf")
    it = it.changed(wscales=layout.pack_scales(scales))
    out = both.multiply(executor, it, both.quantise(executor, it, it.x(tokens)), blank(tokens, it))
    assert not out[:, 3:5].isfinite().any() and torch.equal(out[:, 5:], clean[:, 5:])


@EACH
@on("name", emulator=GOLDEN, gpu=GOLDEN)
def test_golden_linear(executor, golden, both, name):
    """Tensors as in a checkpoint."""
    tensors = golden(f"linear_int4_{name}")
    it = golden_layer(tensors, unsigned="unsigned" in name)
    want = tensors["io.y_act_quant"].double()
    got = both.check_golden(executor, it, layout.pad(tensors["io.x"], 1, it.shape[1]), *(tensors[f"io.{part}"] for part in (
        "q_act", "ascales", "lora_act")))[:, :want.shape[1]].double()
    assert (got - want).norm() <= 4e-3 * want.norm()                            # bf16 output; fixtures/format/README.md


@EACH
@DTYPES
@on("n, k", emulator=[(N, K)], interpreter=[(128, 128)], gpu=[(N, K)])
def test_bias_and_accumulate(executor, both, n, k, dtype):
    it, tokens = layer(n, k, 16, dtype), 17
    quantised = both.quantise(executor, it, it.x(tokens))
    out = both.multiply(executor, it, quantised, blank(tokens, it), bias=False, order="reverse")
    both.check_product(executor, it, quantised, out, bias=False)
    before = torch.randn(tokens, n, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = both.multiply(executor, it, quantised, before.clone(), bias=False, accumulate=True)
    both.check_product(executor, it, quantised, total, before=before, bias=False)


@EACH
@on("tokens, n, k, orders", emulator=[(130, N, K, ("forward", "reverse", 1, 2))],
    interpreter=[(21, 128, 384, ("forward", "reverse"))])
def test_order_changes_nothing(executor, both, tokens, n, k, orders):
    it = layer(n, k)
    x, results = it.x(tokens), []
    for order in orders:
        quantised = both.quantise(executor, it, x, order=order)
        results.append((*quantised, both.multiply(executor, it, quantised, blank(tokens, it), order=order)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@EACH
@on(emulator=True, gpu=True)
def test_fp16_saturates(executor, both):
    with executor.set(slack=2 * SUM_ERROR[both.form]):
        both.check_saturation_of_product(executor)


# Every barrier and wait is needed: a simulator must see it gone

KERNELS = {"quant_down_normal.cuh": "quant_down_normal_bf16_s4_r32", "gemm_w4a4_normal.cuh": "gemm_w4a4_normal_bf16_s4_{}"}
QUANT, GEMM = KERNELS
OWN = "namespace w4a4_normal {"                                 # tile.cuh, which comes before it, has tests of its own


def own(*words):
    """(file, words, index) of each place in the GEMM's own text."""
    return [(file, each, index) for file, each, index in mutations.places(GEMM, *words)
            if OWN in each.join(mutations.whole(file).split(each)[:index + 1])]


BARRIERS = [("fp16n", *place) for place in mutations.places(QUANT, "px::barrier();")]
BARRIERS += [(form, *place) for form in FORMS for place in own("px::barrier();")]
WAITS = [(form, *place) for form in FORMS for place in own("px::copy_commit();", "px::copy_wait<AHEAD - 1>();")]


@on("form, file, words, index", emulator=[*BARRIERS, *WAITS], interpreter=BARRIERS)
def test_nothing_to_spare(executor, form, file, words, index):
    it, both = layer(128, 640), Normal(quant_down, gemm, form)
    x, text = it.x(20), mutations.only(file, KERNELS[file].format(form), mutations.without(file, words, index))
    quantised = both.quantise(executor, it, x) if file == GEMM else None
    with executor.set(sources={file: text}), pytest.raises(
            (KernelFault, Fault), match="race|nobody has written|never written|has not landed|on its way|in no group"):
        if quantised is None:
            both.quantise(executor, it, x)
        else:
            both.multiply(executor, it, quantised, blank(20, it))


# Bugs of value, planted one at a time: the comparisons above must fail

SHARED = w4a4_bugs(QUANT, GEMM)
PLANTED = {
    **{bug: SHARED[bug] for bug in ("low rank of the wrong tile", "bytes transposed halfway")},
    "last step dropped": (GEMM, "step < steps; step++", "step < steps - 1; step++"),
    "the other half of the weights": (GEMM, "(warp - 2) * 128", "(3 - warp) * 128"),
    "fragments of B swapped": (GEMM, "h ? b.z : b.x", "h ? b.x : b.z"),
    "rows of an activation scale swapped": (GEMM, "rows.ascale[i][e / 2]", "rows.ascale[i][1 - e / 2]"),
    "the offset not taken away": (GEMM, "rows.less[i][e / 2])", "0.0f)"),
    "columns of a pair swapped": (GEMM, "pack_half<FP16>(sum[0], sum[1])", "pack_half<FP16>(sum[1], sum[0])"),
    "scales of the other columns": (GEMM, "h ? w.y : w.x", "h ? w.x : w.y"),
    "factors of the other row": (GEMM, "* px::as_float(by.x)", "* px::as_float(by.y)"),
    "columns' factors of the other warp": (GEMM, "n_tile * TILE + warp_n * 64", "n_tile * TILE"),
    "rows' factors not multiplied again": (GEMM, "(e % 2 ? column.y : column.x) * up[e / 2]", "(e % 2 ? column.y : column.x)"),
    "scales of the second block one short": (GEMM, "(groups + 1) * 16", "groups * 16"),
    "largest scale of a warp forgotten": (QUANT, "for (int w = 0; w < WARPS; w++)\n            largest",
                                          "for (int w = 1; w < WARPS; w++)\n            largest"),
    "largest scale of the other row": (QUANT, "= peak[h];", "= peak[1 - h];"),
}
OF_DIAG = {
    "diagonal of the other group": (GEMM, "(h ? v.y : v.x) & kept", "(h ? w.y : w.x) & kept"),
    "off the diagonal": (GEMM, "lane / 8 == lane % 4 ? half", "lane / 8 == lane % 2 ? half"),
    "halves of the diagonal swapped": (GEMM, "lane / 4 % 2 ? 0xffff0000u : 0x0000ffffu",
                                       "lane / 4 % 2 ? 0x0000ffffu : 0xffff0000u"),
    "second group as the first": (GEMM, "{left.x, left.y, right.x, right.y}", "{left.x, left.y, left.x, left.y}"),
}


@on("bug, form", emulator=[*((bug, "fp16n") for bug in PLANTED), *((bug, "diag") for bug in OF_DIAG)])
def test_planted_bug_is_caught(executor, bug, form):
    both, (file, right, wrong) = Normal(quant_down, gemm, form), (PLANTED | OF_DIAG)[bug]
    text = mutations.only(file, KERNELS[file].format(form), mutations.planted(file, right, wrong))
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        both.check_linear(executor, layer(N, K), 130)


@on(emulator=True)
def test_wrong_factors_are_caught(executor):
    """Those of another row multiply what they divided: results are the same, but for what does not fit into fp16."""
    right = "2 * blockIdx.y + thread / 64;\n"
    text = mutations.only(GEMM, KERNELS[GEMM].format("fp16n"), mutations.planted(GEMM, right, "2 * blockIdx.y;\n"))
    with executor.set(sources={GEMM: text}), pytest.raises(AssertionError, match="out: "):
        check_scales_of_any_size(executor, FP16N, BF16, -40, 60)


@EACH
@on(emulator=True)
def test_unplanted_source_passes(executor, both):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={file: mutations.only(file, kernel.format(both.form)) for file, kernel in KERNELS.items()}):
        both.check_linear(executor, layer(N, K), 130)


# The operators: what they launch, what they refuse, what torch.compile sees of them

def operands(tokens=3, rank=32, dtype=BF16, k=128, n=256, form="fp16n", columns=True, **changes):
    """Positional operands of gemm, and those by name."""
    changes = {"ascales": torch.zeros(-(-tokens // 64), k // 64 + 1, 4, 8, 2),
               "wscales": torch.zeros(k // 64, n, dtype=FP16)} | changes
    return (gemm_operands(tokens, rank, dtype, k, n, **changes),
            {"form": form, "columns": torch.ones(n) if columns is True else columns})


def launch_every_kernel():
    """Calls the operators in every way that picks a kernel, for test_every_variant.py."""
    for dtype in HALVES:
        for unsigned in (False, True):
            for rank in (0, 32, 48, 128):
                quant_down(*quant_operands(rank=rank, dtype=dtype)[:-1], unsigned)
            for form in FORMS:
                given, named = operands(dtype=dtype, form=form)
                gemm(*given[:-2], unsigned, False, **named)
        launch_modulated(VARIANT, dtype)
        for variant in (VARIANT, DIAGONAL):
            launch_feeding(variant, dtype)


@pytest.mark.parametrize("changes, words", [
    (dict(form=""), "form ''.* Needs 'fp16n' with K a multiple of 64 or 'diag' with K a multiple of 128, and columns"),
    (dict(columns=None), "columns missing"),
    (dict(k=192, form="diag"), "form 'diag', K 192"),
    (dict(columns=torch.ones(256, dtype=BF16)), r"columns is .*bfloat16.* Needs \[256\] torch.float32"),
    (dict(wscales=torch.zeros(2, 256, dtype=BF16)), "wscales is .*bfloat16.* Needs .*float16"),
    (dict(ascales=torch.zeros(1, 2, 4, 8, 2)), r"ascales is \[1, 2, 4, 8, 2\].* Needs \[1, 3, 4, 8, 2\]"),
])
def test_gemm_refuses(launches, changes, words):
    given, named = operands(**changes)
    with pytest.raises(ShapeError, match="^gemm_w4a4_normal: .*" + words):
        gemm(*given, **named)
    assert launches == []


@pytest.mark.parametrize("tokens", [0, 1, 65])
def test_fake_quant_down(launches, tokens):
    real = quant_down(*quant_operands(tokens))
    with FakeTensorMode(), torch.device("cuda"):
        fake = quant_down(*quant_operands(tokens))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@on(emulator=True)
def test_what_torch_compile_sees(executor):
    """Shapes and dtypes without a launch, and no argument changed but `out`."""
    it = layer(128, 128, 16)
    weight, arguments = packed(it), (it.x(3), it.weight.smooth, it.weight.proj_down, False)
    check_of = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    check_of(quant_down, arguments)
    check_of(gemm, (*quant_down(*arguments), weight.qweight, weight.wscales, weight.proj_up, it.bias,
                    torch.zeros(3, 128, dtype=BF16), False, False), {"columns": weight.columns, "form": "diag"})
