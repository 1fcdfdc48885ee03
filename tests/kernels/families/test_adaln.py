"""Adaptive LayerNorm inside quantisers: what is made of an x is, to the bit, what the quantiser makes of the modulated x, for
every variant that has it; and that x is the one of float64. A low rank of columns of the identity shows it.
"""

import functools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import adaln, check, layout, registry
from svdq_pack.svdq.kernels.build import CUDA
from svdq_pack.svdq.kernels.check import STEP
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.prologues import Modulated
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded
from svdq_pack.tests.kernels.families.layers import BF16, FP16
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

# One for those that differ in where they serve only: the one that runs on most GPUs.
VARIANTS = list({variant.modulates: variant for variant in registry.VARIANTS if variant.modulates}.values())
EACH = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
GPU_SLACK = 1e-6


def of(name):
    return next(variant for variant in VARIANTS if variant.name == name)


@functools.cache
def weight(variant, k, rank, dtype, seed=0):
    """One with a low-rank branch of this rank, in the file's order; and as the variant reads it."""
    it, _ = check.random_weight(check.kinds_of(variant)[0], dtype, 128, k, rank, seed=seed)
    return it, it if variant.layout is None else variant.layout.pack(it)


def operands(tokens, k, dtype, items=1, seed=0):
    random = torch.Generator().manual_seed(tokens + seed)
    x = torch.randn(tokens, k, generator=random) * 2 + 1
    table = torch.randn(items, 3 * k, generator=random)             # as chunks of one modulation layer lie
    return Modulated(x.to(dtype), table[:, k:2 * k].to(dtype), table[:, 2 * k:].to(dtype), 1e-6)


def exact(modulated):
    """y with statistics in float64 and the roundings between; how far it may be off where n falls to the other side of one."""
    x, dtype = modulated.x.double(), modulated.x.dtype
    scale, shift = (each.repeat_interleave(modulated.rows_per_item, 0).double() for each in (modulated.scale, modulated.shift))
    n = (x - x.mean(1, keepdim=True)) * (x.var(1, keepdim=True, unbiased=False) + modulated.eps).rsqrt()
    by = (1 + scale).to(dtype).double()
    y = (n.to(dtype).double() * by + shift).to(dtype)
    return y, STEP[dtype] * (2.1 * (n * by).abs() + 2 * y.double().abs()) + 2.0**-24


def showing(executor, variant, k, dtype):
    """[a layer whose low ranks are 128 columns of the identity each], so that they are what the kernel makes of x."""
    it, _ = weight(variant, k, 128, dtype)
    windows = [layout.pack_down(window.contiguous()) for window in torch.eye(k, dtype=dtype).split(128, 1)]
    shows = [it.with_branch(window, it.proj_up) for window in windows]
    return [executor.put(show if variant.layout is None else variant.layout.pack(show)) for show in shows]


def shown(executor, variant, modulated):
    """The y that the kernel makes of x, 128 columns of it by each layer."""
    layers = showing(executor, variant, modulated.x.shape[1], modulated.dtype)
    there = executor.put(modulated)
    made = of_one(variant, there, layers)
    return torch.cat([low_of(variant, each)[:len(modulated)] for each in made], 1)


def of_one(variant, modulated, layers):
    """What layers make of one x."""
    return variant.modulates([(modulated, layer) for layer in layers])


def low_of(variant, prepared):
    it, _ = weight(variant, 128, 16, variant.dtypes[0])
    return variant.decode([part.cpu() for part in prepared], it)[2]


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_modulated(executor, variant, modulated, ranks, is_ordinary=True, order="forward"):
    """Of one layer or two: the kernel's numbers are the quantiser's of y, which is that of float64. Returns y."""
    k, dtype = modulated.x.shape[1], modulated.dtype
    y = shown(executor, variant, modulated)
    if is_ordinary:
        check_y(modulated, y)
    layers = [weight(variant, k, rank, dtype, seed) for seed, rank in enumerate(ranks)]
    packed = [executor.put(each) for _, each in layers]
    with executor.set(order=order):
        made = of_one(variant, executor.put(modulated), packed)
    for (it, _), there, prepared in zip(layers, packed, made, strict=True):
        check_prepared(executor, variant, y, it, there, prepared, is_ordinary)
    return y


def check_y(modulated, y):
    want, off = exact(modulated)
    apart = (y.double() - want.double()).abs()
    assert bool((apart <= off).all()), f"y: {int((~(apart <= off)).sum())} wrong"
    assert (apart > 0).sum() <= 2 + 2e-3 * apart.numel(), f"y: {int((apart > 0).sum())} rounded otherwise"


def check_prepared(executor, variant, y, it, there, prepared, is_ordinary=True):
    """Codes and scales to the bit, the low rank against float64. `there` is the layer where kernels run."""
    for part, like in zip(prepared[:2], variant.prepare(executor.put(y), there)):
        assert same_bits(part.cpu(), like.cpu())
    low = low_of(variant, prepared)
    assert not low[len(y):].any()
    if it.rank and is_ordinary:
        down = it.logical().proj_down.double()
        assert_rounded(low[:len(y)], y.double() @ down, y.double().abs() @ down.abs(), "low", executor.slack)


# Rows, ranks, layers

CASES = [(1, 128, 1, (0,)), (17, 640, 1, (16, 32)), (21, 1152, 3, (32,)), (16, 128, 4, (128, 0)), (65, 256, 5, (0, 48))]
FLUX = [(1025, 3072, 1, (32, 32))]


@EACH
@on("tokens, k, items, ranks", emulator=CASES, gpu=[*CASES, *FLUX])
def test_modulated(executor, variant, tokens, k, items, ranks):
    """Tails, groups that only some warps have, items whose rows begin inside a CTA, one layer and two, of any ranks."""
    for dtype in variant.dtypes:
        check_modulated(executor, variant, operands(tokens, k, dtype, items), ranks, order=tokens)


@EACH
@on(interpreter=True)
def test_as_ptx(executor, variant):
    """Two layers at once, of which the first shows y."""
    modulated = operands(6, 128, variant.dtypes[-1], 2)
    it, packed = weight(variant, 128, 16, modulated.dtype)
    first, second = of_one(variant, modulated, [*showing(executor, variant, 128, modulated.dtype), packed])
    y = low_of(variant, first)[:len(modulated)]
    check_y(modulated, y)
    check_prepared(executor, variant, y, it, packed, second)


# Two layers, each of an x of its own

def check_apart(executor, variant, k, dtype, *streams, order="forward"):
    """(rows, items, rank) of each: in one launch they make what they make in one each, to the bit, and nothing past it."""
    jobs = [executor.put(job) for seed, (tokens, items, rank) in enumerate(streams)
            for job in [[strided(operands(tokens, k, dtype, items, seed), 8 * seed), weight(variant, k, rank, dtype, seed)[1]]]]
    executor.launched.clear()
    with executor.set(order=order):
        made = variant.modulates(jobs)
    assert len(executor.launched) == -(-len(jobs) // 2)
    for job, parts in zip(jobs, made, strict=True):
        alone, = variant.modulates([job])
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(parts, alone, strict=True))


def strided(modulated, more):
    """The same with rows of x, scale and shift further apart."""
    def wide(rows):
        return torch.nn.functional.pad(rows, (0, more))[:, :rows.shape[1]]
    return Modulated(wide(modulated.x), wide(modulated.scale), wide(modulated.shift), modulated.eps)


APART = [(128, (65, 1, 32), (17, 1, 16)), (640, (1, 1, 0), (130, 2, 48)), (256, (16, 4, 16), (16, 1, 16)),
         (128, (5, 1, 16), (0, 1, 16)), (128, (20, 2, 16), (7, 1, 0), (3, 1, 32))]


@EACH
@on("k, streams", emulator=[(k, streams) for k, *streams in APART],
    gpu=[(k, streams) for k, *streams in (*APART, (3072, (4096, 1, 32), (512, 1, 64)))])
def test_apart(executor, variant, k, streams):
    """The longer one first or last, of other ranks, items and strides; one of no rows; a third goes by itself."""
    for dtype in variant.dtypes:
        check_apart(executor, variant, k, dtype, *streams, order=k)


@EACH
@on(interpreter=True)
def test_apart_as_ptx(executor, variant):
    check_apart(executor, variant, 128, variant.dtypes[-1], (17, 1, 16), (3, 3, 32))


@on(emulator=True)
def test_widest_row(executor):
    """FLUX's: all three groups of every warp. K is no power of two, and still the mean of one number is that number."""
    modulated = operands(3, adaln.WIDEST, BF16)
    modulated.x[1] = 100.5
    y = check_modulated(executor, of("w4a4_emulated"), modulated, (16,))
    assert torch.equal(y[1], modulated.shift[0])


@EACH
@on(emulator=True, gpu=True)
def test_rows_of_any_size(executor, variant):
    """Rows of one number, huge ones, tiny ones that eps hides, and a mean a thousand times the spread: E[x^2] would cancel."""
    for dtype in variant.dtypes:
        modulated = operands(9, 256, dtype)
        x = modulated.x
        x[1], x[2] = 0, 3.5
        x[3] *= 1e4
        x[4] *= 1e-6 if dtype == FP16 else 1e-30
        x[5] = (1000 + x[5].float()).to(dtype)
        if dtype == BF16:
            x[6] *= 1e16
        y = check_modulated(executor, variant, modulated, (32,))
        assert torch.equal(y[1:3], modulated.shift.expand(2, -1))               # nothing but shift is left of them
        assert torch.equal(y, modulated.of()) or check.relative(y, modulated.of()) < STEP[dtype]


@EACH
@on(emulator=True, gpu=True)
def test_bad_rows(executor, variant):
    """A NaN or Inf makes its own row NaN, in every code's scale or in the low rank, and no other row."""
    dtype = variant.dtypes[0]
    modulated = operands(20, 256, dtype)
    clean = check_modulated(executor, variant, modulated, (16, 32))
    bad = [2, 5, 13]
    modulated.x[2, 70], modulated.x[5, 3], modulated.x[13, 255] = float("nan"), float("inf"), -float("inf")
    y = check_modulated(executor, variant, modulated, (16, 32), is_ordinary=False)
    others = [row for row in range(20) if row not in bad]
    assert y[bad].isnan().all() and torch.equal(y[others], clean[others])
    out = torch.empty(20, 128, dtype=dtype, device=executor.device)
    variant.run(executor.put(modulated), executor.put(weight(variant, 256, 16, dtype)[1]), out)
    assert out[bad].isnan().all() and out[others].isfinite().all()


@EACH
@on(emulator=True)
def test_strides_and_order(executor, variant):
    """x as columns of a wider tensor; threads and CTAs in any order: the same bits."""
    dtype = variant.dtypes[0]
    modulated = operands(21, 256, dtype)
    wide = torch.full((21, 272), float("nan"), dtype=dtype)
    wide[:, 8:264] = modulated.x
    packed = [weight(variant, 256, 32, dtype)[1]] * 2
    results = []
    for x, order in ((modulated.x, "forward"), (wide[:, 8:264], "reverse"), (modulated.x, 7)):
        with executor.set(order=order):
            results.append(of_one(variant, Modulated(x, modulated.scale, modulated.shift, modulated.eps), packed))
    assert all(same_bits(a, b) for result in results for pair, like in zip(result, results[0]) for a, b in zip(pair, like))
    assert all(same_bits(a, b) for a, b in zip(*results[0]))


# Every barrier is needed: a simulator must see it gone. That of a token's maximum is the last of adaln.cuh

BARRIERS = mutations.places("adaln_int8.cuh", "px::barrier();")


@on("file, words, index", emulator=BARRIERS, interpreter=BARRIERS)
def test_nothing_to_spare(executor, file, words, index):
    """Two layers: their low ranks use the same memory one after the other."""
    variant, text = of("w4a8_int8"), mutations.only(file, "adaln_int8_bf16", mutations.without(file, words, index))
    with executor.set(sources={file: text}), pytest.raises(
            (KernelFault, Fault), match="race|nobody has written|never written"):
        of_one(variant, operands(16, 128, BF16), [weight(variant, 128, 32, BF16)[1]] * 2)


# Bugs of value, planted one at a time: the comparisons above must fail

INT4, INT8, NVFP4, FP8 = "adaln_int4.cuh", "adaln_int8.cuh", "adaln_nvfp4.cuh", "adaln_fp8.cuh"
OF = {INT4: "w4a4_emulated", INT8: "w4a8_int8", NVFP4: "nvfp4_sm120", FP8: "w4a8_sm90"}
PLANTED = {
    "variance by E[x^2]": (INT4, "- mean[h], high = px::high_half<T>(pair) - mean[h];", ", high = px::high_half<T>(pair);"),
    "eps forgotten": (INT4, "/ K + eps)", "/ K)"),
    "a warp's sum forgotten": (INT4, "for (int w = 0; w < WARPS; w++)\n            sums",
                               "for (int w = 1; w < WARPS; w++)\n            sums"),
    "groups of nobody in the variance": (INT4, "            if (rows.warp + i * WARPS < rows.groups)\n#pragma",
                                         "#pragma"),
    "scale not rounded": (INT4, "px::fma(px::low_half<T>(n), px::low_half<T>(m),",
                          "px::fma(px::low_half<T>(n), 1.0f + px::low_half<T>(a),"),
    "norm not rounded": (INT4, "px::fma(px::low_half<T>(n),", "px::fma((px::low_half<T>(pair) - mean[h]) * inverse[h],"),
    "item of the first row": (INT4, "(row < M ? row : M - 1) / rows_per_item", "blockIdx.x * 16 / rows_per_item"),
    "tail rows have shift": (INT4, "rows.inside[h] ? y : 0u", "y"),
    "tail rows' items": (INT4, "(row < M ? row : M - 1)", "row"),
    "words not exchanged": (INT4, "Order::arrange(words[h]);", ""),
    "a group forgotten": (INT4, "i < MOST; i++) {\n        u32 first", "i < MOST - 1; i++) {\n        u32 first"),
    "ranks of the first tile": (INT4, "proj_down + r * 32", "proj_down"),
    "one layer's smooth": (INT4, "of.smooth", "layers.layer[first].smooth"),
    "one layer's number of ranks": (INT4, "(int)of.R)", "(int)layers.layer[first].R)"),
    "the second x read as the first": (INT4, "rows, layers.layer[first], eps", "rows, layers.layer[0], eps"),
    "the second x's rows": (INT4, "M = (int)of.M", "M = (int)(&of - blockIdx.y)->M"),
    "the second x's items": (INT4, "(int)of.rows_per_item", "(int)(&of - blockIdx.y)->rows_per_item"),
    "the second x's stride": (INT4, "(u32)of.ldx", "(u32)(&of - blockIdx.y)->ldx"),
    "the second x's scale": (INT4, "of.scale + ", "(&of - blockIdx.y)->scale + "),
    "the second layer for the first x": (INT4, "int i = first; i < first + per_cta", "int i = 0; i < per_cta"),
    "both layers of every x": (INT4, "i < first + per_cta", "i < 2"),
    "CTAs past the shorter x": (INT4, "16 / BLOCK * BLOCK >= M)", "16 / BLOCK * BLOCK >= M && !blockIdx.y)"),
    "rows that fill the last block": (INT4, "16 / BLOCK * BLOCK >= M)", "16 >= M)"),
    "a warp's maximum forgotten": (INT8, "for (int w = 0; w < WARPS; w++)\n            bits[h]",
                                   "for (int w = 1; w < WARPS; w++)\n            bits[h]"),
    "even and odd codes swapped": (INT8, "words[h][odd] =", "words[h][1 - odd] ="),
    "one layer's divisors": (INT8, "of.smooth", "layers.layer[first].smooth"),
    "one x's layer, int8": (INT8, "layers.layer[i]", "layers.layer[0]"),
    "one layer's scales, nvfp4": (NVFP4, "of.ascales", "layers.layer[first].ascales"),
    "one x's layer, nvfp4": (NVFP4, "layers.layer[i]", "layers.layer[0]"),
    "one layer's inverse": (FP8, "of.smooth", "layers.layer[first].smooth"),
    "one x's layer, fp8": (FP8, "layers.layer[i]", "layers.layer[0]"),
    "blocks as other families have them": (FP8, "adaln::Runs, 16>", "adaln::Runs, 64>"),
    "scales of rows swapped": (FP8, "scales[h], of.qact, groups", "scales[1 - h], of.qact, groups"),
    "low rank as other families have it": (FP8, "adaln::multiply_down<T, CoreMatrices>", "adaln::multiply_down<T>"),
    "maximum of tail rows": (FP8, "? largest(z) : 0u", "? largest(z) : 1u"),
}


def text_of(file, right=None, wrong=None):
    variant = of(OF[file])
    kernels = [name for name in variant.library.sources[file] if name.endswith(("bf16", "bf16_token"))]
    return variant, mutations.only(file, kernels[0], right and mutations.planted(file, right, wrong))


def check_two(executor, variant):
    """Small, with all that a bug may need: 20 groups for 16 warps, two items and a tail, two layers of other ranks, two x."""
    modulated = operands(18, 128, BF16, 3)
    modulated.x[3] = 0.5
    modulated.x[4] = (300 + modulated.x[4].float()).to(BF16)
    check_modulated(executor, variant, modulated, (32, 16))
    check_modulated(executor, variant, operands(3, 1280, BF16), (16,))
    check_apart(executor, variant, 128, BF16, (66, 3, 32), (18, 2, 16))


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    variant, text = text_of(file, right, wrong)
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        check_two(executor, variant)


@on("file", emulator=OF)
def test_unplanted_source_passes(executor, file):
    variant, text = text_of(file)
    with executor.set(sources={file: text}):
        check_two(executor, variant)


# The operators by themselves

def arguments(tokens=3, k=128, rank=32, layers=2, **changes):
    given = {"x": torch.zeros(tokens, k, dtype=BF16), "scale": torch.zeros(1, k, dtype=BF16),
             "shift": torch.zeros(1, k, dtype=BF16), "eps": 1e-6, "smooth": [torch.ones(k, dtype=BF16)] * layers,
             "proj_down": [torch.zeros(k, rank, dtype=BF16)] * layers} | changes
    return [[value] if isinstance(value, torch.Tensor) else value for value in given.values()]


OPERATOR = torch.ops.svdq.adaln_int4


@pytest.mark.parametrize("changes, words", [
    (dict(x=torch.zeros(3, 128)), r"x is \[3, 128\] torch.float32"),
    (dict(x=torch.zeros(3, 3136, dtype=BF16)), r"x is \[3, 3136\].* Needs K up to 3072"),
    (dict(x=torch.zeros(3, 132, dtype=BF16)[:, :128]), "rows aligned to 16 bytes"),
    (dict(scale=torch.zeros(1, 128)), r"scale is \[1, 128\] torch.float32.* Needs \[items, 128\] torch.bfloat16"),
    (dict(shift=torch.zeros(2, 128, dtype=BF16)), r"shift is \[2, 128\].* as many items as scale"),
    (dict(scale=torch.zeros(2, 128, dtype=BF16)), "3 rows a multiple"),
    (dict(scale=torch.zeros(0, 128, dtype=BF16)), r"scale is \[0, 128\]"),
    (dict(scale=torch.zeros(1, 132, dtype=BF16)[:, 4:]), "aligned to 16 bytes"),
    (dict(x=[torch.zeros(3, 128, dtype=BF16), torch.zeros(3, 128, dtype=FP16)], scale=[torch.zeros(1, 128, dtype=BF16)] * 2,
          shift=[torch.zeros(1, 128, dtype=BF16)] * 2), "float16.* of two the same"),
    (dict(smooth=[torch.ones(128, dtype=BF16)] * 3), "3 smooth and 2 proj_down. Needs one smooth and proj_down, or two"),
    (dict(smooth=[]), "0 smooth and 2 proj_down"),
    (dict(x=[torch.zeros(3, 128, dtype=BF16)] * 2), "2 x, 1 scale, 1 shift"),
    (dict(smooth=[torch.ones(64, dtype=BF16)] * 2), r"smooth is \[64\].* Needs .*\[128\]"),
    (dict(proj_down=[torch.zeros(128, 144, dtype=BF16)] * 2), "rank 144. .*multiples of 16 up to 128")])
def test_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^adaln_int4: .*" + words):
        OPERATOR(*arguments(**changes))
    assert launches == []


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 4), (64, 4), (65, 8), (4608, 288)])
def test_grids(launches, tokens, blocks):
    OPERATOR(*arguments(tokens))
    assert [(one.grid, one.block) for one in launches] == [((blocks, 1), 512)] * bool(tokens)


def test_what_a_layer_is(launches):
    """The fields of adaln::Layer; a layer that reads the first one's x has none of its own."""
    x, scale, shift, _, smooth, proj_down = arguments(x=torch.zeros(6, 128, dtype=BF16), scale=torch.zeros(2, 128, dtype=BF16),
                                                      shift=torch.zeros(2, 136, dtype=BF16)[:, :128])
    made = OPERATOR(x, scale, shift, 1e-6, smooth, proj_down)
    first, second = launches.pop().arguments[0].rows
    fields = re.search(r"struct Layer {(.*?)};", (CUDA / "adaln.cuh").read_text(), re.S)[1]
    named = dict(zip(re.findall(r"(\w+)[,;]", fields), first, strict=True))
    assert list(named)[:3] == ["x", "scale", "shift"] and named["x"] is x[0] and named["shift"] is shift[0]
    assert all(named[name].tensor is buffer for name, buffer in zip(("qact", "ascales", "low"), made))
    assert {name: value for name, value in named.items() if isinstance(value, int)} == {
        "R": 32, "rows_per_item": 3, "M": 6, "ldx": 128, "ld_scale": 128, "ld_shift": 136}
    assert second[:3] == [None] * 3 and second[-6:] == [32, 0, 0, 0, 0, 0] and second[3] is smooth[1]


def test_grid_of_two(launches):
    x, scale, shift = ([torch.zeros(rows, 128, dtype=BF16) for rows in sizes] for sizes in ((3, 130), (1, 1), (1, 1)))
    OPERATOR(*arguments(x=x, scale=scale, shift=shift))
    assert [one.grid for one in launches] == [(12, 2)]


@pytest.mark.parametrize("layers, of_own", [(1, False), (2, False), (2, True)])
def test_fake(launches, layers, of_own):
    def given():
        of = {"scale": [torch.zeros(1, 128, dtype=BF16)] * 2, "shift": [torch.zeros(1, 128, dtype=BF16)] * 2} if of_own else {}
        return arguments(65, layers=layers, **of, **({"x": [torch.zeros(n, 128, dtype=BF16) for n in (65, 3)]} if of else {}))
    real = OPERATOR(*given())
    with FakeTensorMode(), torch.device("cuda"):
        fake = OPERATOR(*given())
    assert len(real) == 3 * layers
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert {f.device.type for f in fake} == {"cuda"}


def test_what_torch_compile_sees(launches):
    torch.library.opcheck(OPERATOR.default, tuple(arguments()), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("changes", [dict(unsigned=True), dict(k=3200), dict(shift=1)])
def test_steps_aside(launches, changes):
    """Where no kernel does it: torch does, and the streaming quantiser follows."""
    variant = of("w4a4_emulated")
    k = changes.get("k", 256)
    it, _ = check.random_weight("int4 unsigned" if "unsigned" in changes else "int4", BF16, 128, k, 16)
    modulated = operands(3, k, BF16)
    if "shift" in changes:
        modulated = Modulated(torch.zeros(3, k + 1, dtype=BF16)[:, 1:].copy_(modulated.x), modulated.scale, modulated.shift)
    assert variant.prepared([(modulated, it)]) == [None]
    variant.run(modulated, it, torch.zeros(3, 128, dtype=BF16))
    assert [one.name.split("_bf16")[0] for one in launches] == ["quant_down", "gemm_w4a4"]
    quantised = launches[0].arguments[0]
    assert torch.equal(quantised, modulated.of())


def test_a_wide_branch_runs_beside_it(launches):
    variant = of("w4a4_emulated")
    it, _ = check.random_weight("int4", BF16, 128, 256, 144)
    beside, inside = variant.prepared([(operands(3, 256, BF16), each) for each in (it, weight(variant, 256, 16, BF16)[1])])
    assert beside is None and len(inside) == 3


def test_layers_share_a_launch(launches):
    """Jobs with the same Modulated, two at a time; what is left with another; one with another eps by itself."""
    variant, (it, other) = of("w4a4_emulated"), [weight(of("w4a4_emulated"), 256, rank, BF16)[1] for rank in (16, 32)]
    plan, first, second = registry.Plan(variant), operands(3, 256, BF16), operands(3, 256, BF16)
    third = Modulated(first.x, first.scale, first.shift, 1e-5)
    given = registry.shared_inputs([(plan, first, it), (plan, third, it), (plan, first, other), (plan, first, it),
                                    (plan, second, it), (plan, first.x, it)])
    assert [one.name for one in launches] == ["adaln_int4_bf16"] * 3
    assert [one.grid[1] for one in launches] == [1, 2, 1] and [one.arguments[-1] for one in launches] == [2, 1, 1]
    assert [one.arguments[1] for one in launches] == [1e-6, 1e-6, 1e-5]
    assert [x for x, _ in given[:5]] == [first, third, first, first, second] and given[5] == (first.x, None)
    assert all(len(prepared) == 3 for _, prepared in given[:5])
