"""mlp_w4a4 and mlp_low: the codes for the second layer of an MLP are those of the two kernels that they stand for, to the bit;
its low rank against float64; conduct by the checks of the simulators; planted bugs.
"""

import pytest
import torch

from svdq_pack.svdq.kernels import epilogues, launch, mlp
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import nvfp4_sm120, w4a4_sm80
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import TOP, assert_rounded
from svdq_pack.tests.kernels.families.layers import BF16, FP16, layer, nvfp4_layer
from svdq_pack.tests.kernels.families.w4a4 import gemm_operands, unpack_low
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

W4A4 = next(variant for variant in w4a4_sm80.VARIANTS if variant.name == "w4a4_emulated")
NVFP4, = nvfp4_sm120.VARIANTS
GPU_SLACK = 1e-4
N, K = 384, 128                             # of the first layer: three tiles of the second one's K
# (variant, whether the second layer's codes are unsigned)
EACH = pytest.mark.parametrize("variant, unsigned", [
    pytest.param(W4A4, False, id="s4"), pytest.param(W4A4, True, id="u4"), pytest.param(NVFP4, False, id="nvfp4")])
ONE = pytest.mark.parametrize("variant", [W4A4], ids=["w4a4"])


def pair(variant, n, k, rank, rank2, dtype=BF16, unsigned=True):
    """The two layers of an MLP, the second one 128 wide."""
    if variant is NVFP4:
        return nvfp4_layer(n, k, rank, dtype), nvfp4_layer(128, n, rank2, dtype, columns=True)
    return layer(n, k, rank, dtype), layer(128, n, rank2, dtype, unsigned)


def check(executor, variant, first, second, tokens, sources=None, x=None, **how):
    """What the second layer's product takes, when it is what the quantiser makes of GELU of the first one's product."""
    one, two, bias = executor.put(first.weight), executor.put(second.weight), executor.put(first.bias)
    prepared = variant.prepare(executor.put(first.x(tokens) if x is None else x), one)
    h = executor.put(torch.zeros(tokens, first.shape[0], dtype=first.dtype))
    variant.product(prepared, one, h, bias, False, epilogues.Gelu())
    want = variant.prepare(h, two)
    with executor.set(sources=sources or {}, **how):
        got = variant.feeds(prepared, one, bias, two, tokens)
    got, want, h = [part.cpu() for part in got], [part.cpu() for part in want], h.cpu()
    assert torch.equal(got[0], want[0]), "codes"
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32)), "scales"
    low, (exact, size), numbers = unpack_low(got[2]), second.low(h), h.isfinite().all(1)
    exact = exact.clamp(-TOP, TOP) if h.dtype == FP16 else exact
    assert_rounded(low[:tokens][numbers], exact[numbers], size[numbers], "low", executor.slack)
    assert not low[tokens:].any()
    return got


@pytest.fixture
def room(monkeypatch):
    """Enough shared memory for two CTAs, whatever the rank."""
    monkeypatch.setattr(launch, "runs_twice", lambda device, shared: True)


@EACH
@on("n, k, rank, rank2, tokens, dtype, ctas",
    emulator=[(N, K, 16, 32, 130, BF16, 2), (N, K, 0, 16, 17, FP16, 6), (N, 256, 32, 0, 64, BF16, 2),
              (128, K, 16, 48, 1, FP16, 2), (1024, K, 16, 32, 65, BF16, 1)],
    interpreter=[(256, K, 16, 32, 21, BF16, 1), (256, K, 0, 48, 3, FP16, 2)],
    gpu=[(1024, 3072, rank, rank2, tokens, dtype, None) for rank, rank2, tokens in ((0, 16, 1), (16, 32, 17), (32, 48, 129),
                                                                                    (128, 0, 257)) for dtype in HALVES])
def test_mlp(executor, variant, room, n, k, rank, rank2, tokens, dtype, ctas, unsigned):
    """More tiles than CTAs, which then walk, and fewer; tails of both kinds of blocks."""
    check(executor, variant, *pair(variant, n, k, rank, rank2, dtype, unsigned), tokens, ctas=ctas, order=tokens)


@EACH
@on("tokens", gpu=[512, 4608], rehearsal=[20])
def test_flux_layers(executor, variant, unsigned, tokens):
    n, k = (12288, 3072) if tokens > 20 else (N, K)
    check(executor, variant, *pair(variant, n, k, 32, 32, BF16, unsigned), tokens)


@ONE
@on(emulator=True)
def test_order_changes_nothing(executor, variant, room):
    results = [check(executor, variant, *pair(variant, N, K, 16, 48), 145, order=order, ctas=3)
               for order in ("forward", "reverse", 1, 2)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@EACH
@on("runs", gpu=[50], rehearsal=[2])
def test_runs_agree_to_the_bit(executor, variant, unsigned, runs):
    first, *others = (check(executor, variant, *pair(variant, 1024, 256, 16, 32, BF16, unsigned), 300) for _ in range(runs))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first))


@ONE
@on("tokens", emulator=[20], interpreter=[16], gpu=[130])
def test_bad_tokens(executor, variant, tokens):
    """A NaN makes its own token's scales NaN and its codes 0, and no other's."""
    first, second = pair(variant, N, K, 16, 16, unsigned=False)
    x, bad = first.x(tokens), [2, 5]
    x[2, 70], x[5, 3] = float("nan"), float("inf")
    codes, scales, low = variant.decode(check(executor, variant, first, second, tokens, x=x), second.weight)
    assert scales[bad].isnan().all() and not codes[bad].any() and low[bad].isnan().all()
    assert scales[[row for row in range(tokens) if row not in bad]].isfinite().all()


def check_saturation(executor, variant, sources=None):
    """h beyond fp16, and its low rank."""
    first, second = pair(variant, 128, K, 0, 16, FP16, False)
    much = {"wtscale": 2.0**9} if variant is NVFP4 else {"wscales": first.weight.wscales.abs() * 2**14}
    first = first.changed(bias=torch.full((128,), 65504.0, dtype=FP16), **much)
    check(executor, variant, first, second.changed(proj_down=16 * second.weight.proj_down), 20, sources)


@EACH
@on(emulator=True, gpu=True)
def test_fp16_saturates(executor, variant, unsigned):
    check_saturation(executor, variant)


# The variant's side

@pytest.mark.parametrize("variant, stage", [pytest.param(W4A4, w4a4_sm80.STAGE, id="w4a4"),
                                            pytest.param(NVFP4, nvfp4_sm120.STAGE, id="nvfp4")])
@on("rank2, fits", emulator=[(32, True), (48, False)])
def test_feeds(executor, variant, stage, rank2, fits):
    """Where two CTAs fit on a multiprocessor of the smallest kind; where they do not, a slower kernel is not better."""
    first, second = pair(variant, N, K, 16, rank2)
    prepared = variant.prepare(first.x(20), first.weight)
    assert launch.runs_twice(torch.device("cpu"), mlp.shared_bytes(stage, rank2)) is fits
    made = variant.feeds(prepared, first.weight, first.bias, second.weight, 20)
    assert (made is not None) is fits
    if fits:
        h, (out, want) = torch.empty(20, N, dtype=BF16), torch.zeros(2, 20, 128, dtype=BF16)
        variant.product(prepared, first.weight, h, first.bias, False, epilogues.Gelu())
        variant.run(h, second.weight, want, second.bias)
        variant.product(made, second.weight, out, second.bias, False, None)
        assert (out.double() - want.double()).norm() <= 2e-3 * want.double().norm()


def test_feeds_from_signed_codes_alone(launches):
    unsigned, second = layer(N, K, 16, unsigned=True), layer(128, N, 16)
    prepared = W4A4.prepare(unsigned.x(20), unsigned.weight)
    assert W4A4.feeds(prepared, unsigned.weight, None, second.weight, 20) is None


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
    given = dict(qact=qact, ascales=ascales, low=low, qweight=qweight, wscales=wscales, wcscales=None, wtscale=1.0,
                 proj_up=proj_up, bias=bias, smooth=torch.ones(256, dtype=BF16),
                 proj_down=torch.zeros(256, 32, dtype=BF16), unsigned=True, tokens=3)
    with pytest.raises(ShapeError, match=f"^mlp_w4a4: .*{words}"):
        w4a4_sm80.mlp_w4a4(**given | changes)
    assert launches == []


# What a simulator must see, and what the comparisons must

FILES = {"mlp_w4a4.cuh": "mlp_w4a4_bf16_u4", "mlp_nvfp4.cuh": "mlp_nvfp4_bf16", "mlp_low.cuh": "mlp_low_bf16"}
# And of nvfp4_ring.cuh what gemm_nvfp4, with two stages, could spare.
BARRIERS = [(W4A4, *place) for place in mutations.places("mlp_w4a4.cuh", "px::barrier();", outside=(
    "tile.cuh", "quantiser.cuh", "w4a4_quant.cuh"))]
COPIES = [(NVFP4, *place) for place in mutations.places("mlp_nvfp4.cuh", "px::copy_commit();", "px::copy_wait<STAGES - 2>();")]


def planted(file, text):
    return {file: mutations.only(file, FILES[file], text)}


@on("variant, file, words, index", emulator=[*BARRIERS, *COPIES], interpreter=BARRIERS[1:])
def test_nothing_to_spare(executor, variant, file, words, index):
    """A second layer without a branch has no sums, and so no barriers of theirs."""
    sources = planted(file, mutations.without(file, words, index))
    with pytest.raises((KernelFault, Fault),
                       match="race|nobody has written|never written|has not landed|on its way|in no group"):
        for rank2 in (0, 32):
            check(executor, variant, *pair(variant, 256, 256, 0, rank2), 145, sources, ctas=1)


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


@ONE
@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, variant, bug):
    file, right, wrong = PLANTED[bug]
    sources = planted(file, mutations.planted(file, right, wrong))
    with pytest.raises((AssertionError, KernelFault)):
        check(executor, variant, *pair(variant, N, K, 16, 32), 145, sources, ctas=2)


CLAMPS = [place for file in ("mlp_w4a4.cuh", "mlp_low.cuh") for place in mutations.places(
    file, mutations.CLAMP, outside=() if file == "mlp_low.cuh" else ("tile.cuh", "quantiser.cuh"))]


@ONE
@on("file, words, index", emulator=CLAMPS)
def test_every_clamp_is_needed(executor, variant, file, words, index):
    text = mutations.without(file, words, index, "(")
    fp16 = {file: mutations.only(file, FILES[file].replace("bf16_u4", "fp16_s4").replace("bf16", "fp16"), text)}
    with pytest.raises(AssertionError):
        check_saturation(executor, variant, fp16)


@ONE
@on(emulator=True)
def test_unplanted_source_passes(executor, variant):
    sources = {file: mutations.only(file, kernel) for file, kernel in FILES.items() if file != "mlp_nvfp4.cuh"}
    check(executor, variant, *pair(variant, N, K, 16, 32), 145, sources, ctas=2)
