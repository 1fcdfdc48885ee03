"""Epilogues of the GEMMs that share tile.cuh, in every family: results against float64, element by element; conduct by the
checks of the simulators; planted bugs. Hopper's, which are its own, are in test_w4a8_sm90.py.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from svdq_pack.svdq.kernels import epilogues
from svdq_pack.svdq.kernels.variant import HALVES, Variant
from svdq_pack.svdq.kernels.variants import nvfp4_sm120, w4a4_normal, w4a4_sm75, w4a4_sm80, w4a8_int8
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded, finished
from svdq_pack.tests.kernels.families.layers import ENDINGS, FP16, epilogue_of, layer, nvfp4_layer, old_out
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

GPU_SLACK = 1e-4
N = 384                                     # one head of q, k and v each
FLUX = (("qkv", 9216, 3072), ("gated", 3072, 3072), ("gelu", 12288, 3072), ("gated +=", 3072, 12288))


@dataclass(frozen=True)
class Family:
    """A variant, the file of its GEMM, how its layers are made, and by how much its sums may be off, in magnitudes."""
    variant: Variant
    file: str
    make: object = layer
    slack: float = 0.0

    def weight(self, executor, it):
        """As the variant reads it, where kernels run."""
        there = executor.put(it.weight)
        return there if self.variant.layout is None else self.variant.layout.pack(there)

    def __repr__(self):
        return self.variant.name


W4A4 = Family(next(variant for variant in w4a4_sm80.VARIANTS if variant.name == "w4a4_emulated"), "gemm_w4a4.cuh")
FAMILIES = (W4A4, *(Family(module.VARIANTS[0], file, make) for module, file, make in (
    (w4a4_sm75, "gemm_w4a4_sm75.cuh", layer), (w4a8_int8, "gemm_int8.cuh", layer),
    (nvfp4_sm120, "gemm_nvfp4.cuh", nvfp4_layer))),
            *(Family(variant, "gemm_w4a4_normal.cuh", slack=2.0**-9) for variant in w4a4_normal.VARIANTS if variant.on_request))
CASES = [(family, dtype) for family in FAMILIES for dtype in family.variant.dtypes]
EACH = pytest.mark.parametrize("variant, family, dtype", [
    pytest.param(family.variant, family, dtype, id=f"{family}-{HALVES[dtype]}") for family, dtype in CASES])
ONE = pytest.mark.parametrize("variant, family", [pytest.param(W4A4.variant, W4A4, id=repr(W4A4))])


def finish(executor, family, it, prepared, kind, **changes):
    """`out` after the family's product of `prepared` with one of ENDINGS."""
    tokens, n = changes.pop("tokens"), it.shape[0]
    epilogue, before = replace(epilogue_of(kind, tokens, n, it.dtype), **changes), old_out(kind, tokens, n, it.dtype)
    out = executor.put(torch.full((tokens, n), float("nan"), dtype=it.dtype) if before is None else before.clone())
    family.variant.product(prepared, family.weight(executor, it), out, executor.put(it.bias), before is not None,
                           executor.put(epilogue))
    return out.cpu(), epilogue, before


def check_epilogue(executor, family, it, tokens, kind, rows=slice(None), sources=None, **how):
    """`out`, when these rows of it are right."""
    prepared = family.variant.prepare(executor.put(it.x(tokens)), family.weight(executor, it))
    with executor.set(sources=sources or {}, **how):
        out, epilogue, before = finish(executor, family, it, prepared, kind, tokens=tokens)
    codes, scales, low = (part[:tokens][rows] for part in family.variant.decode([p.cpu() for p in prepared], it.weight))
    y, size = it.product(codes, scales, low)
    of_rows = replace(epilogue, **{field: value[rows] for field, value in vars(epilogue).items()
                                   if field in ("residual", "rotation")})
    slack = max(executor.slack, family.slack)
    want, error = finished(of_rows, y, size, None if before is None else before[rows])
    if kind == "gelu":
        error = error + y.abs() / 2 * executor.tanh / slack
    assert_rounded(out[rows], want, error, kind, slack)
    return out


@EACH
@on("n, rank, tokens, kind", emulator=[(N, 16, tokens, kind) for tokens, kind in zip((17, 65, 130, 129), ENDINGS)],
    interpreter=[(N, 16, 21, "qkv"), (128, 0, 3, "gated +=")],
    gpu=[(N * (1 + tokens % 3), rank, tokens, kind) for tokens, rank in ((1, 0), (15, 16), (17, 32), (129, 64), (257, 128))
         for kind in ENDINGS])
def test_epilogue(executor, variant, family, dtype, n, rank, tokens, kind):
    check_epilogue(executor, family, family.make(n, 128, rank, dtype), tokens, kind, order=tokens)


@EACH
@on("kind, n, k, tokens, every", rehearsal=[("qkv", N, 128, 20, 13)], gpu=[(*layer, 300, 13) for layer in FLUX])
def test_epilogue_of_flux_layers(executor, variant, family, dtype, kind, n, k, tokens, every):
    check_epilogue(executor, family, family.make(n, k, 32, dtype), tokens, kind, slice(None, None, every))


@ONE
@on("kind", emulator=ENDINGS)
def test_order_changes_no_epilogue(executor, variant, family, kind):
    it = layer(2 * N, 128, 16)
    results = [check_epilogue(executor, family, it, 145, kind, order=order) for order in ("forward", "reverse", 1, 2)]
    assert all(torch.equal(result, results[0]) for result in results)


@EACH
@on("kind, n, k, tokens, runs", gpu=[(kind, 9216 if kind == "qkv" else 3072, 1024, 1000, 100) for kind in ENDINGS],
    rehearsal=[("gated +=", N, 128, 20, 2)])
def test_epilogues_agree_to_the_bit(executor, variant, family, dtype, kind, n, k, tokens, runs):
    it = family.make(n, k, 32, dtype)
    prepared = family.variant.prepare(executor.put(it.x(tokens)), family.weight(executor, it))
    first, *others = (finish(executor, family, it, prepared, kind, tokens=tokens)[0] for _ in range(runs))
    assert all(torch.equal(other, first) for other in others)


@EACH
@on(emulator=True, gpu=True)
def test_store_is_what_it_was(executor, variant, family, dtype):
    """The product as stored is what an epilogue of nothing gives: residual 0, gate 1."""
    it = family.make(N, 256, 16, dtype)
    weight = family.weight(executor, it)
    prepared = family.variant.prepare(executor.put(it.x(20)), weight)
    nothing = epilogues.Gated(torch.zeros(20, N, dtype=dtype), torch.ones(N, dtype=dtype))
    plain, gated = (executor.put(torch.full((20, N), float("nan"), dtype=dtype)) for _ in range(2))
    for out, epilogue in ((plain, None), (gated, executor.put(nothing))):
        family.variant.product(prepared, weight, out, executor.put(it.bias), False, epilogue)
    assert torch.equal(plain, gated)


# fp16 ends at 65504

def check_saturation(executor, family, kind, sources=None):
    """Both halves of a word, both signs; v stays below."""
    signs = torch.tensor([1.0, 1, -1, -1]).repeat(N // 4)
    it = family.make(N, 128, 0, FP16).changed(bias=(60000 * signs).to(FP16))
    much = {"rotation": torch.full((3, 64, 2, 2), -1e6)} if kind == "qkv" else {"gate": (-100 * torch.ones(N)).half()}
    prepared = family.variant.prepare(executor.put(it.x(3)), family.weight(executor, it))
    with executor.set(sources=sources or {}):
        out, *_ = finish(executor, family, it, prepared, kind, tokens=3, **much)
    if kind == "qkv":
        assert (out[:, :256].abs() == 65504).all() and (out[:, 256:].abs() > 50000).all(), "beyond fp16"
    else:
        assert torch.equal(out.float(), -65504 * signs.expand(3, -1)), "beyond fp16"


@pytest.mark.parametrize("variant, family", [pytest.param(it.variant, it, id=repr(it)) for it in FAMILIES])
@on("kind", emulator=("gated", "gated +=", "qkv"), gpu=("gated", "gated +=", "qkv"))
def test_fp16_ends_at_its_largest_number(executor, variant, family, kind):
    check_saturation(executor, family, kind)


# Every barrier is needed: a simulator must see it gone. Those of the main loop have tests in each family

OF_TILE = mutations.whole("tile.cuh")
BARRIERS = [(words, index) for words in ("px::barrier();", "px::warp_barrier();") for index in range(OF_TILE.count(words))]


@ONE
@on("words, index", emulator=BARRIERS, interpreter=BARRIERS)
def test_nothing_to_spare(executor, variant, family, words, index):
    text = mutations.whole(family.file).replace(OF_TILE_BODY, without_one(words, index))
    with pytest.raises((KernelFault, Fault), match="race|nobody has written|never written"):
        check_epilogue(executor, family, layer(N, 128, 0), 40, "qkv",           # an MMA of the low rank would order lanes, too
                       sources={family.file: mutations.only(family.file, "gemm_w4a4_bf16_s4", text)})


OF_TILE_BODY = OF_TILE[OF_TILE.index("namespace tile {"):]


def without_one(words, index):
    parts = OF_TILE_BODY.split(words)
    return words.join(parts[:index + 1]) + ";" + words.join(parts[index + 1:])


# Bugs of value, planted one at a time

PLANTED = {
    "pair of a rotation swapped": ("qkv", "(turn.x) * z[0] + px::as_float(turn.y) * z[1]",
                                   "(turn.x) * z[1] + px::as_float(turn.y) * z[0]"),
    "rotation transposed": ("qkv", "px::as_float(turn.z) * z[0]", "px::as_float(turn.y) * z[0]"),
    "rotations of the first tokens": ("qkv", "(u64)row * (HEAD / 2)", "(u64)(row % TILE) * (HEAD / 2)"),
    "rotations of other pairs": ("qkv", "in_tile / 2;", "in_tile / 4;"),
    "weight of q for a head of k": ("qkv", "? epilogue.key + in_tile", "? epilogue.query + in_tile"),
    "weight of the first half": ("qkv", "? epilogue.query + in_tile", "? epilogue.query + in_tile % 64"),
    "v normalised too": ("qkv", "(Part)(3 * TILE * blockIdx.x / of.N)", "(Part)(3 * TILE * blockIdx.x / of.N % 2)"),
    "squares of half a head": ("qkv", " + staging.squares[m16][warp_m * 2 + 1][r]", ""),
    "squares of half the lanes": ("qkv", "px::swap_lanes(px::as_bits(sum), 2)", "px::swap_lanes(px::as_bits(sum), 1)"),
    "squares of the rows below": ("qkv", "staging.squares[m16][warp][8 * h + g] = sum",
                                  "staging.squares[m16][warp][8 - 8 * h + g] = sum"),
    "no eps": ("qkv", " + epilogue.eps", ""),
    "gate of the first columns": ("gated", "epilogue.gate + column", "epilogue.gate + in_tile"),
    "rows of out for the residual": ("gated", "(u64)row * epilogue.ldr", "(u64)row * of.ldo"),
    "product left out": ("gated", "other[e] + by[e] * y[e]", "other[e]"),
    "old out forgotten": ("gated +=", "y[e] += other[e];", ";"),
    "rounded before the gate": ("gated", "words2{px::as_bits(pair[0]), px::as_bits(pair[1])}",
                                "words2{px::pack_half<T>(0.0f, pair[0]) & 0xffff0000u, px::as_bits(pair[1])}"),
    "staged rows swapped": ("gelu", "staging.rows[warp][8 * h + g]", "staging.rows[warp][8 - 8 * h + g]"),
    "a row too many": ("gelu", "if (row >= of.M)", "if (row > of.M)"),
    "a row too few": ("gelu", "if (row >= of.M)", "if (row + 1 >= of.M)"),
    "columns of a half not swapped back": ("gelu", "place(lane % 8 * 8, 4 * half)", "lane % 8 * 8 + 4 * half"),
    "accumulators of other rows": ("gelu", "= acc[0][e / 4][e % 4]", "= acc[1][e / 4][e % 4]"),
    "low rank of other rows": ("gelu", "(block64 * 4 + m16) * rank_tiles", "(block64 * 4) * rank_tiles"),
    "wrong cube": ("gelu", "0.044715f", "0.04f"),
}


@ONE
@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, variant, family, bug):
    kind, right, wrong = PLANTED[bug]
    text = mutations.only(family.file, "gemm_w4a4_bf16_s4", mutations.planted(family.file, right, wrong))
    with pytest.raises((AssertionError, KernelFault)):
        check_epilogue(executor, family, layer(N, 128, 16), 145, kind, sources={family.file: text})


@ONE
@on(emulator=True)
def test_unplanted_source_passes(executor, variant, family):
    """So that the failures above are the bugs' and not the harness's."""
    for kind in ENDINGS:
        check_epilogue(executor, family, layer(N, 128, 16), 145, kind,
                       sources={family.file: mutations.only(family.file, "gemm_w4a4_bf16_s4")})
