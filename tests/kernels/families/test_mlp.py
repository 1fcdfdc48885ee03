"""mlp_w4a4 and mlp_low: the codes for the second layer of an MLP are those of the two kernels that they stand for, to the bit;
its low rank against float64; conduct by the checks of the simulators; planted bugs.
"""

import pytest
import torch

from svdq_pack.svdq.kernels import epilogues, launch, mlp
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import w4a4_sm80
from svdq_pack.svdq.kernels.variants.w4a4_sm80 import gemm_w4a4, mlp_w4a4, quant_down
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import TOP, assert_rounded
from svdq_pack.tests.kernels.families.layers import BF16, FP16, layer
from svdq_pack.tests.kernels.families.w4a4 import gemm_operands, unpack, unpack_low
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

VARIANT = next(variant for variant in w4a4_sm80.VARIANTS if variant.name == "w4a4_emulated")
GPU_SLACK = 1e-6
N, K = 384, 128                             # of the first layer: three tiles of the second one's K
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])


def check(executor, first, second, tokens, sources=None, x=None, **how):
    """(qact, ascales, low) of the second layer, when they are what quant_down makes of the first one's product after GELU."""
    x = executor.put(first.x(tokens) if x is None else x)
    one, two, bias = executor.put(first.weight), executor.put(second.weight), executor.put(first.bias)
    prepared = quant_down(x, one.smooth, one.proj_down, False)
    h = executor.put(torch.zeros(tokens, first.shape[0], dtype=first.dtype))
    gemm_w4a4(*prepared, one.qweight, one.wscales, one.proj_up, bias, h, False, False, epilogue="gelu")
    want = quant_down(h, two.smooth, two.proj_down, two.unsigned)
    with executor.set(sources=sources or {}, **how):
        got = mlp_w4a4(*prepared, one.qweight, one.wscales, one.proj_up, bias, two.smooth, two.proj_down, two.unsigned, tokens)
    got, want, h = [part.cpu() for part in got], [part.cpu() for part in want], h.cpu()
    assert torch.equal(got[0], want[0]), "codes"
    assert torch.equal(got[1].nan_to_num(nan=-1), want[1].nan_to_num(nan=-1)), "scales"
    low, (exact, size), numbers = unpack_low(got[2]), second.low(h), h.isfinite().all(1)
    exact = exact.clamp(-TOP, TOP) if h.dtype == FP16 else exact
    assert_rounded(low[:tokens][numbers], exact[numbers], size[numbers], "low", executor.slack)
    assert not low[tokens:].any()
    return got


@UNSIGNED
@on("n, k, rank, rank2, tokens, dtype, ctas",
    emulator=[(N, K, 16, 32, 130, BF16, 2), (N, K, 0, 16, 17, FP16, 6), (N, 256, 32, 0, 64, BF16, 2),
              (128, K, 16, 48, 1, FP16, 2), (1024, K, 16, 32, 65, BF16, 1)],
    interpreter=[(256, K, 16, 32, 21, BF16, 1), (256, K, 0, 48, 3, FP16, 2)],
    gpu=[(1024, 3072, rank, rank2, tokens, dtype, None) for rank, rank2, tokens in ((0, 16, 1), (16, 32, 17), (32, 48, 129),
                                                                                    (128, 0, 257)) for dtype in HALVES])
def test_mlp(executor, n, k, rank, rank2, tokens, dtype, ctas, unsigned):
    """More tiles than CTAs, which then walk, and fewer; tails of both kinds of blocks."""
    check(executor, layer(n, k, rank, dtype), layer(128, n, rank2, dtype, unsigned), tokens, ctas=ctas, order=tokens)


@on("tokens", gpu=[512, 4608], rehearsal=[20])
def test_flux_layers(executor, tokens):
    n, k = (12288, 3072) if tokens > 20 else (N, K)
    check(executor, layer(n, k), layer(128, n, 32, BF16, True), tokens)


@on(emulator=True)
def test_order_changes_nothing(executor):
    results = [check(executor, layer(N, K, 16), layer(128, N, 48, BF16, True), 145, order=order, ctas=3)
               for order in ("forward", "reverse", 1, 2)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@on("runs", gpu=[50], rehearsal=[2])
def test_runs_agree_to_the_bit(executor, runs):
    first, *others = (check(executor, layer(1024, 256, 16), layer(128, 1024, 32), 300) for _ in range(runs))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first))


@on("tokens", emulator=[20], interpreter=[16], gpu=[130])
def test_bad_tokens(executor, tokens):
    """A NaN makes its own token's scales NaN and its codes 0, and no other's."""
    first, second = layer(N, K, 16), layer(128, N, 16)
    x, bad = first.x(tokens), [2, 5]
    x[2, 70], x[5, 3] = float("nan"), float("inf")
    codes, scales, low = unpack(check(executor, first, second, tokens, x=x), False)
    assert scales[bad].isnan().all() and not codes[bad].any() and low[bad].isnan().all()
    assert scales[[row for row in range(tokens) if row not in bad]].isfinite().all()


def check_saturation(executor, sources=None):
    """h beyond fp16, and its low rank."""
    first = layer(128, K, 0, FP16).changed(bias=torch.full((128,), 65504.0, dtype=FP16))
    first = first.changed(wscales=(first.weight.wscales.abs() * 2**14))
    second = layer(128, 128, 16, FP16)
    check(executor, first, second.changed(proj_down=16 * second.weight.proj_down), 20, sources)


@on(emulator=True, gpu=True)
def test_fp16_saturates(executor):
    check_saturation(executor)


# The variant's side

@on("rank2, fits", emulator=[(32, True), (48, False)])
def test_feeds(executor, rank2, fits):
    """Where two CTAs fit on a multiprocessor of the smallest kind; where they do not, a slower kernel is not better."""
    first, second = layer(N, K, 16), layer(128, N, rank2)
    prepared = VARIANT.prepare(first.x(20), first.weight)
    assert launch.runs_twice(torch.device("cpu"), mlp.shared_bytes(rank2)) is fits
    made = VARIANT.feeds(prepared, first.weight, first.bias, second.weight, 20)
    assert (made is not None) is fits
    if fits:
        h, out, want = torch.empty(20, N, dtype=BF16), *torch.zeros(2, 20, 128, dtype=BF16)
        VARIANT.product(prepared, first.weight, h, first.bias, False, epilogues.Gelu())
        VARIANT.run(h, second.weight, want, second.bias)
        VARIANT.product(made, second.weight, out, second.bias, False, None)
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert VARIANT.feeds(prepared, layer(N, K, 16, unsigned=True).weight, None, second.weight, 20) is None


@pytest.mark.parametrize("changes, words", [
    (dict(smooth=torch.ones(256)), "smooth torch.float32"),
    (dict(smooth=torch.ones(128, dtype=BF16)), r"smooth is \[128\]"),
    (dict(proj_down=torch.zeros(256, 24, dtype=BF16)), "rank 24"),
    (dict(proj_down=torch.zeros(128, 32, dtype=BF16)), r"proj_down is \[128, 32\]"),
    (dict(proj_up=None), "proj_up missing"),
    (dict(tokens=65), "qact is"),
])
def test_refuses(launches, changes, words):
    qact, ascales, low, qweight, wscales, proj_up, bias, *_ = gemm_operands()
    given = dict(qact=qact, ascales=ascales, low=low, qweight=qweight, wscales=wscales, proj_up=proj_up, bias=bias,
                 smooth=torch.ones(256, dtype=BF16), proj_down=torch.zeros(256, 32, dtype=BF16), unsigned=True, tokens=3)
    with pytest.raises(ShapeError, match=f"^mlp_w4a4: .*{words}"):
        mlp_w4a4(**given | changes)
    assert launches == []


# What a simulator must see, and what the comparisons must

FILES = {"mlp_w4a4.cuh": "mlp_w4a4_bf16_u4", "mlp_low.cuh": "mlp_low_bf16"}
BARRIERS = mutations.places("mlp_w4a4.cuh", "px::barrier();", outside=("tile.cuh", "quantiser.cuh"))


def planted(file, text):
    return {file: mutations.only(file, FILES[file], text)}


@on("file, words, index", emulator=BARRIERS, interpreter=BARRIERS[1:])
def test_nothing_to_spare(executor, file, words, index):
    """A second layer without a branch has no sums, and so no barriers of theirs."""
    sources = planted(file, mutations.without(file, words, index))
    with pytest.raises((KernelFault, Fault), match="race|nobody has written|never written|has not landed|on its way"):
        for rank2 in (0, 32):
            check(executor, layer(256, 256, 0), layer(128, 256, rank2, BF16, True), 145, sources, ctas=1)


PLANTED = {
    "group of the other warp": ("mlp_w4a4.cuh", "group = 2 * n_tile + warp_n", "group = 2 * n_tile + 1 - warp_n"),
    "rows of the other half": ("mlp_w4a4.cuh", "warp_m * 4 + m16, row", "(1 - warp_m) * 4 + m16, row"),
    "no GELU": ("mlp_w4a4.cuh", "gelu(y[j][2 * h])", "y[j][2 * h]"),
    "a row too many": ("mlp_w4a4.cuh", "{row < of.M, row + 8 < of.M}", "{row <= of.M, row + 8 <= of.M}"),
    "sums begun anew by each tile": ("mlp_w4a4.cuh", "first && turn == 0", "turn == 0"),
    "sums not begun": ("mlp_w4a4.cuh", "first && turn == 0", "false"),
    "the second warp's share lost": ("mlp_w4a4.cuh", "first && turn == 0", "first"),
    "tiles of another CTA": ("mlp_w4a4.cuh", "n_tile += gridDim.x", "n_tile += 1"),
    "ranks swapped": ("mlp_w4a4.cuh", "left ? share[0][half][e] : share[1][half][e]",
                      "left ? share[1][half][e] : share[0][half][e]"),
    "shares of the rows above": ("mlp_w4a4.cuh", "tile0 = blockIdx.y * 8;", "tile0 = 0;"),
    "a share forgotten": ("mlp_low.cuh", "for (int i = 0; i < count; i++)", "for (int i = 1; i < count; i++)"),
    "halves swapped": ("mlp_low.cuh", "half * 32 + place % 32", "(1 - half) * 32 + place % 32"),
}


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    sources = planted(file, mutations.planted(file, right, wrong))
    with pytest.raises((AssertionError, KernelFault)):
        check(executor, layer(N, K, 16), layer(128, N, 32, BF16, True), 145, sources, ctas=2)


CLAMPS = [place for file in FILES for place in mutations.places(
    file, mutations.CLAMP, outside=() if file == "mlp_low.cuh" else ("tile.cuh", "quantiser.cuh"))]


@on("file, words, index", emulator=CLAMPS)
def test_every_clamp_is_needed(executor, file, words, index):
    text = mutations.without(file, words, index, "(")
    fp16 = {file: mutations.only(file, FILES[file].replace("bf16_u4", "fp16_s4").replace("bf16", "fp16"), text)}
    with pytest.raises(AssertionError):
        check_saturation(executor, fp16)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    sources = {file: mutations.only(file, kernel) for file, kernel in FILES.items()}
    check(executor, layer(N, K, 16), layer(128, N, 32, BF16, True), 145, sources, ctas=2)
