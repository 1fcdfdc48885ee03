"""mlp_w4a4, mlp_w4a4_normal, mlp_nvfp4 and mlp_low: codes and scales for the second layer of an MLP are those of the two
kernels that they stand for, to the bit; its low rank against float64, the same bits wherever its sums lie; conduct by the
checks of the simulators; planted bugs.
"""

import types

import pytest
import torch

from svdq_pack.svdq.kernels import epilogues, launch, mlp
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import nvfp4_sm120, w4a4_normal, w4a4_sm75, w4a4_sm80
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import TOP, assert_rounded
from svdq_pack.tests.kernels.families.layers import BF16, FP16, layer, nvfp4_layer
from svdq_pack.tests.kernels.families.w4a4 import gemm_operands, unpack_low
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

W4A4 = next(variant for variant in w4a4_sm80.VARIANTS if variant.name == "w4a4_emulated")
FP16N, DIAG = NORMAL = [variant for variant in w4a4_normal.VARIANTS if variant.on_request]
NVFP4, = nvfp4_sm120.VARIANTS
SM75, = w4a4_sm75.VARIANTS
GPU_SLACK = 1e-4
N, K = 384, 128                             # of the first layer: three tiles of the second one's K
# (variant, whether the second layer's codes are unsigned)
EACH = pytest.mark.parametrize("variant, unsigned", [
    pytest.param(W4A4, False, id="s4"), pytest.param(W4A4, True, id="u4"), pytest.param(FP16N, True, id="fp16n"),
    pytest.param(DIAG, False, id="diag"), pytest.param(NVFP4, False, id="nvfp4"),
    pytest.param(SM75, False, id="sm75-s4"), pytest.param(SM75, True, id="sm75-u4")])
INT4 = pytest.mark.parametrize("variant", [W4A4, *NORMAL], ids=["w4a4", "fp16n", "diag"])
ONE = pytest.mark.parametrize("variant", [W4A4], ids=["w4a4"])


def pair(variant, n, k, rank, rank2, dtype=BF16, unsigned=True):
    """The two layers of an MLP, the second one 128 wide; in fp16 where a variant takes nothing else."""
    dtype = dtype if dtype in variant.dtypes else FP16
    if variant is NVFP4:
        return nvfp4_layer(n, k, rank, dtype), nvfp4_layer(128, n, rank2, dtype, columns=True)
    return layer(n, k, rank, dtype), layer(128, n, rank2, dtype, unsigned)


def packed(variant, weight):
    """As the variant reads it."""
    return weight if variant.layout is None else variant.layout.pack(weight)


def check(executor, variant, first, second, tokens, sources=None, x=None, in_shared=None, **how):
    """What the second layer's product takes, when it is what the quantiser makes of GELU of the first one's product.

    in_shared   whether sums lie in shared memory; None: as launch.runs_twice says
    """
    one, two = (executor.put(packed(variant, each.weight)) for each in (first, second))
    bias = executor.put(first.bias)
    prepared = variant.prepare(executor.put(first.x(tokens) if x is None else x), one)
    h = executor.put(torch.zeros(tokens, first.shape[0], dtype=first.dtype))
    variant.product(prepared, one, h, bias, False, epilogues.Gelu())
    want = variant.prepare(h, two)
    with executor.set(sources=sources or {}, **how), pytest.MonkeyPatch.context() as patch:
        if in_shared is not None:
            patch.setattr(launch, "runs_twice", lambda device, shared: in_shared)
        got = variant.feeds(prepared, one, bias, two, tokens)
    got, want, h = [part.cpu() for part in got], [part.cpu() for part in want], h.cpu()
    assert torch.equal(got[0], want[0]), "codes"
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32)), "scales"
    low, (exact, size), numbers = unpack_low(got[2]), second.low(h), h.isfinite().all(1)
    exact = exact.clamp(-TOP, TOP) if h.dtype == FP16 else exact
    assert_rounded(low[:tokens][numbers], exact[numbers], size[numbers], "low", executor.slack)
    assert not low[tokens:].any()
    return got


@EACH
@on("n, k, rank, rank2, tokens, dtype, ctas",
    emulator=[(N, K, 16, 32, 130, BF16, 2), (N, K, 0, 16, 17, FP16, 6), (N, 256, 32, 0, 64, BF16, 2),
              (128, K, 16, 48, 1, FP16, 2), (1024, K, 16, 32, 65, BF16, 1)],
    interpreter=[(256, K, 16, 32, 21, BF16, 1), (256, K, 0, 48, 3, FP16, 2)],
    gpu=[(1024, 3072, rank, rank2, tokens, dtype, None) for rank, rank2, tokens in ((0, 16, 1), (16, 32, 17), (32, 48, 129),
                                                                                    (128, 0, 257)) for dtype in HALVES])
def test_mlp(executor, variant, n, k, rank, rank2, tokens, dtype, ctas, unsigned):
    """More tiles than CTAs, which then walk, and fewer; tails of both kinds of blocks; sums in both places."""
    check(executor, variant, *pair(variant, n, k, rank, rank2, dtype, unsigned), tokens, ctas=ctas, order=tokens)


@EACH
@on("tokens", gpu=[512, 4608], rehearsal=[20])
def test_flux_layers(executor, variant, unsigned, tokens):
    n, k = (12288, 3072) if tokens > 20 else (N, K)
    check(executor, variant, *pair(variant, n, k, 32, 32, BF16, unsigned), tokens)


@INT4
@on(emulator=True)
def test_order_changes_nothing(executor, variant):
    results = [check(executor, variant, *pair(variant, N, K, 16, 48), 145, order=order, ctas=2, in_shared=in_shared)
               for order in ("forward", "reverse", 1, 2) for in_shared in (False, True)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@EACH
@on("rank2, tokens, ctas", emulator=[(16, 70, 1), (64, 145, 2), (128, 129, 1)], interpreter=[(48, 20, 1)],
    gpu=[(rank2, 300, None) for rank2 in (16, 32, 48, 64)])
def test_places_of_sums_agree_to_the_bit(executor, variant, unsigned, rank2, tokens, ctas):
    """At 64 ranks one CTA has room in the shared memory of any GPU."""
    n, dtype = (256, BF16) if executor.device == "cpu" else (12288, BF16)
    one, two = (check(executor, variant, *pair(variant, n, 128, 16, rank2, dtype, unsigned), tokens, ctas=ctas,
                      in_shared=in_shared) for in_shared in (False, True))
    assert all(map(torch.equal, one, two))


@EACH
@on("runs", gpu=[50], rehearsal=[2])
def test_runs_agree_to_the_bit(executor, variant, unsigned, runs):
    first, *others = (check(executor, variant, *pair(variant, 1024, 256, 16, 32, BF16, unsigned), 300) for _ in range(runs))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first))


@INT4
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

@EACH
@on("rank2", emulator=[32, 128])
def test_feeds(executor, variant, unsigned, rank2):
    first, second = pair(variant, N, K, 16, rank2, unsigned=unsigned)
    one, two = packed(variant, first.weight), packed(variant, second.weight)
    prepared = variant.prepare(first.x(20), one)
    made = variant.feeds(prepared, one, first.bias, two, 20)
    h, (out, want) = torch.empty(20, N, dtype=first.dtype), torch.zeros(2, 20, 128, dtype=first.dtype)
    variant.product(prepared, one, h, first.bias, False, epilogues.Gelu())
    variant.run(h, two, want, second.bias)
    variant.product(made, two, out, second.bias, False, None)
    assert (out.double() - want.double()).norm() <= 2e-3 * want.double().norm()


@INT4
def test_feeds_no_branch_that_runs_beside(launches, variant):
    one, two = packed(variant, layer(N, K, 16).weight), packed(variant, layer(128, N, 144).weight)
    assert variant.feeds(variant.prepare(layer(N, K, 16).x(20), one), one, None, two, 20) is None


@pytest.mark.parametrize("n, tokens, processors, ctas", [
    (12288, 512, 128, 48), (12288, 4096, 128, 8), (12288, 4608, 128, 7), (12288, 512, 170, 48), (12288, 1 << 20, 128, 1),
    (12288, 1, 170, 96), (384, 20, 2, 3), (384, 20, 1, 2)])
def test_as_few_ctas_share_rows_as_keep_the_longest_walk_short(n, tokens, processors, ctas):
    tiles, most = n // 128, min(n // 128, max(1, 2 * processors // -(-tokens // 128)))
    assert mlp.ctas_of_rows(n, tokens, processors) == ctas <= most
    assert -(-tiles // ctas) == -(-tiles // most) and (ctas == 1 or -(-tiles // (ctas - 1)) > -(-tiles // most))


# Shared memory of a multiprocessor of RTX 20, RTX 30 to 50, A100; ranks for which the stages leave enough beside two CTAs.
@pytest.mark.parametrize("major, memory, ring, ranks", [
    (7, 64, w4a4_sm75.RINGS[""], 16), (7, None, w4a4_sm75.RINGS[""], 16), (8, 100, w4a4_sm80.RINGS[""], 32),
    (8, None, w4a4_sm80.RINGS[""], 32), (8, 164, w4a4_sm80.RINGS[""], 96), (8, 100, w4a4_normal.RINGS["fp16n"], 32),
    (8, 100, w4a4_normal.RINGS["diag"], 16), (8, 164, w4a4_normal.RINGS["diag"], 80), (12, 100, nvfp4_sm120.RINGS[""], 32)])
def test_sums_lie_in_shared_memory_where_two_ctas_fit(monkeypatch, major, memory, ring, ranks):
    launch.shared_memory.cache_clear()
    asked = {"major": major} | ({} if memory is None else {"shared_memory_per_multiprocessor": memory << 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**asked))
    found = {rank: mlp.shared_memory(torch.device("cuda:0"), ring, rank) for rank in range(16, 144, 16)}
    launch.shared_memory.cache_clear()
    assert found == {rank: (ring + 512 * rank, True) if rank <= ranks else (ring, False) for rank in found}


@INT4
def test_feeds_from_signed_codes_alone(launches, variant):
    unsigned, second = layer(N, K, 16, unsigned=True), layer(128, N, 16)
    one, two = packed(variant, unsigned.weight), packed(variant, second.weight)
    assert variant.feeds(variant.prepare(unsigned.x(20), one), one, None, two, 20) is None


@pytest.mark.parametrize("changes, words", [
    (dict(smooth=torch.ones(256)), "smooth torch.float32"),
    (dict(smooth=torch.ones(128, dtype=BF16)), r"smooth is \[128\]"),
    (dict(proj_down=torch.zeros(256, 24, dtype=BF16)), "rank 24"),
    (dict(proj_down=torch.zeros(128, 32, dtype=BF16)), r"proj_down is \[128, 32\]"),
    (dict(proj_up=None), "proj_up missing"),
    (dict(tokens=65), "qact is"),
    (dict(form="diag"), "form 'diag', columns missing. Needs neither form nor columns"),
    (dict(columns=torch.ones(256)), "form '', columns given"),
])
def test_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match=f"^mlp_w4a4: .*{words}"):
        w4a4_sm80.mlp_w4a4(**operands() | changes)
    assert launches == []


@pytest.mark.parametrize("changes, words", [
    (dict(form=""), "form '', columns given. Needs 'fp16n' or 'diag', and columns"),
    (dict(columns=None), "columns missing"),
    (dict(columns=torch.ones(256, dtype=BF16)), r"columns is .*bfloat16.* Needs \[256\] torch.float32"),
    (dict(wscales=torch.zeros(2, 256, dtype=BF16)), "wscales is .*bfloat16.* Needs .*float16"),
    (dict(ascales=torch.zeros(1, 2, 4, 8, 2)), r"ascales is \[1, 2, 4, 8, 2\].* Needs \[1, 3, 4, 8, 2\]"),
])
def test_normal_refuses(launches, changes, words):
    given = operands() | dict(ascales=torch.zeros(1, 3, 4, 8, 2), wscales=torch.zeros(2, 256, dtype=FP16),
                              columns=torch.ones(256), form="fp16n")
    with pytest.raises(ShapeError, match=f"^mlp_w4a4_normal: .*{words}"):
        w4a4_normal.mlp_w4a4_normal(**given | changes)
    assert launches == []


def operands():
    """Of mlp_w4a4, by name."""
    qact, ascales, low, qweight, wscales, proj_up, bias, *_ = gemm_operands()
    return dict(qact=qact, ascales=ascales, low=low, qweight=qweight, wscales=wscales, wcscales=None, wtscale=1.0,
                proj_up=proj_up, bias=bias, smooth=torch.ones(256, dtype=BF16),
                proj_down=torch.zeros(256, 32, dtype=BF16), unsigned=True, tokens=3)


# What a simulator must see, and what the comparisons must

FILES = {"mlp_w4a4.cuh": "mlp_w4a4_bf16_u4", "mlp_w4a4_normal.cuh": "mlp_w4a4_normal_bf16_u4_(fp16n|diag)",
         "mlp_nvfp4.cuh": "mlp_nvfp4_bf16", "mlp_low.cuh": "mlp_low_bf16", "mlp_w4a4_sm75.cuh": "mlp_w4a4_sm75_fp16_u4"}
# And of nvfp4_ring.cuh what gemm_nvfp4, with two stages, could spare.
BARRIERS = [(W4A4, *place) for place in mutations.places("mlp_w4a4.cuh", "px::barrier();", outside=(
    "tile.cuh", "quantiser.cuh", "w4a4_quant.cuh"))]
OF_NORMAL = [(variant, *place) for variant in NORMAL for place in mutations.places(
    "mlp_w4a4_normal.cuh", "px::barrier();", "px::copy_commit();", "px::copy_wait<AHEAD - 1>();",
    outside=("tile.cuh", "quantiser.cuh", "w4a4_quant.cuh"))]
OF_PEAKS = [(FP16N, *place) for place in mutations.places("mlp_low.cuh", "px::barrier();")]
COPIES = [(NVFP4, *place) for place in mutations.places("mlp_nvfp4.cuh", "px::copy_commit();", "px::copy_wait<STAGES - 2>();")]


def planted(file, text):
    return {file: mutations.only(file, FILES[file], text)}


@on("variant, file, words, index", emulator=[*BARRIERS, *OF_NORMAL, *OF_PEAKS, *COPIES],
    interpreter=[*BARRIERS[1:], *OF_PEAKS])
def test_nothing_to_spare(executor, variant, file, words, index):
    """A second layer without a branch has no sums, and so no barriers of theirs. The last step of a product lies in the stage
    that gifts come to."""
    sources, k = planted(file, mutations.without(file, words, index)), 384 if variant is DIAG else 256
    with pytest.raises((KernelFault, Fault),
                       match="race|nobody has written|never written|has not landed|on its way|in no group"):
        for rank2 in (0, 32):
            check(executor, variant, *pair(variant, 256, k, 0, rank2), 145, sources, ctas=1)


PLANTED = {
    "group of the other warp": ("mlp_w4a4.cuh", "group = 2 * n_tile + warp_n", "group = 2 * n_tile + 1 - warp_n"),
    "rows of the other half": ("mlp_w4a4.cuh", "warp_m * 4 + m16, row", "(1 - warp_m) * 4 + m16, row"),
    "no GELU": ("mlp_w4a4.cuh", "gelu(y[j][2 * h])", "y[j][2 * h]"),
    "a row too many": ("mlp_w4a4.cuh", "{row < of.M, row + 8 < of.M}", "{row <= of.M, row + 8 <= of.M}"),
    "sums begun anew by each tile": ("mlp_w4a4.cuh", "first ? nullptr : kept", "nullptr"),
    "sums not begun": ("mlp_w4a4.cuh", "first ? nullptr : kept", "kept"),
    "sums kept to themselves": ("mlp_w4a4.cuh", "last ? shares : kept", "kept"),
    "sums given away before the last tile": ("mlp_w4a4.cuh", "last ? shares : kept", "shares"),
    "the other warp's share lost": ("mlp_w4a4.cuh", " + px::as_float(theirs.z)", ""),
    "its own share given back": ("mlp_w4a4.cuh", "gifts[warp ^ 1]", "gifts[warp]"),
    "the share of another row given": ("mlp_w4a4.cuh", "gifts[warp ^ 1]", "gifts[warp ^ 3]"),
    "always the same turn": ("mlp_w4a4.cuh", "(m16 * turns + turn) % 2", "0"),
    "tiles of another CTA": ("mlp_w4a4.cuh", "n_tile += gridDim.x)", "n_tile += 1)"),
    "ranks swapped": ("mlp_w4a4.cuh", "warp_n ? share[1][half][e] : share[0][half][e]",
                      "warp_n ? share[0][half][e] : share[1][half][e]"),
    "shares of the rows above": ("mlp_w4a4.cuh", "blockIdx.y * 8) * (to.R", "0) * (to.R"),
    "rows that nobody has stored": ("mlp_w4a4.cuh", "const bool owns = stored && own", "const bool owns = own"),
    "weights of the first tile again": ("mlp_w4a4_sm75.cuh", "wscales, n_tile, of.M", "wscales, (int)blockIdx.x, of.M"),
    "scales of another row of groups": ("mlp_w4a4_sm75.cuh", "group, of.N / 64", "group, K / 64"),
    "a share forgotten": ("mlp_low.cuh", "for (int i = 0; i < count; i++)", "for (int i = 1; i < count; i++)"),
    "halves swapped": ("mlp_low.cuh", "half * 32 + place % 32", "(1 - half) * 32 + place % 32"),
}


NORMAL_FILE = "mlp_w4a4_normal.cuh"
PLANTED_IN_NORMAL = {
    "weights of the CTA's first tile": (NORMAL_FILE, "qweight + (u64)n_tile", "qweight + (u64)blockIdx.x"),
    "scales of the CTA's first tile": (NORMAL_FILE, "wscales + (u64)n_tile", "wscales + (u64)blockIdx.x"),
    "columns' factors of the CTA's first tile": (NORMAL_FILE, "columns + n_tile * TILE", "columns + blockIdx.x * TILE"),
    "no room for peaks": (NORMAL_FILE, "quantise<T, UNSIGNED, true>", "quantise<T, UNSIGNED>"),
    "a group of the scales forgotten": ("mlp_low.cuh", "int group = part;", "int group = part + 1;"),
    "a part of the groups forgotten": ("mlp_low.cuh", "int i = 1; i < 16", "int i = 2; i < 16"),
    "peaks of the other row": ("mlp_low.cuh", "larger(largest.x, parts[i][g].x)", "larger(largest.x, parts[i][g].y)"),
    "peaks in the place of the last scales": ("mlp_low.cuh", "rows[groups * 32] =", "rows[groups * 32 - 32] ="),
    "peaks of the block before": ("mlp_low.cuh", "blockIdx.x - of_low, groups", "0, groups"),
    "no peaks without a branch": ("mlp_low.cuh", "(int)blockIdx.x < of_low", "(int)blockIdx.x < of_low || !of_low"),
}


IN_SHARED = ("sums kept to themselves", "sums given away before the last tile")      # there alone they make a difference


@on("bug", emulator=[*PLANTED, *PLANTED_IN_NORMAL])
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = (PLANTED | PLANTED_IN_NORMAL)[bug]
    variant = SM75 if "sm75" in file else FP16N if bug in PLANTED_IN_NORMAL else W4A4
    sources = planted(file, mutations.planted(file, right, wrong))
    for in_shared in (True,) if bug in IN_SHARED else (False, True):
        with pytest.raises((AssertionError, KernelFault)):
            for rank2 in (32, *[0] * (variant is FP16N)):
                check(executor, variant, *pair(variant, N, K, 16, rank2), 145, sources, ctas=2, in_shared=in_shared)


CLAMPS = [place for file in ("mlp_w4a4.cuh", "mlp_low.cuh") for place in mutations.places(
    file, mutations.CLAMP, outside=() if file == "mlp_low.cuh" else ("tile.cuh", "quantiser.cuh"))]


@ONE
@on("file, words, index", emulator=CLAMPS)
def test_every_clamp_is_needed(executor, variant, file, words, index):
    text = mutations.without(file, words, index, "(")
    fp16 = {file: mutations.only(file, FILES[file].replace("bf16_u4", "fp16_s4").replace("bf16", "fp16"), text)}
    with pytest.raises(AssertionError):
        check_saturation(executor, variant, fp16)


@on("variant", emulator=[W4A4, FP16N, DIAG, SM75])
def test_unplanted_source_passes(executor, variant):
    sources = {file: mutations.only(file, kernel) for file, kernel in FILES.items() if file != "mlp_nvfp4.cuh"}
    check(executor, variant, *pair(variant, N, K, 16, 32), 145, sources, ctas=2)
