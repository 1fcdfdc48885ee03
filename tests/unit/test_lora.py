"""LoRAs in the low-rank branch, without ComfyUI: against the dense weight they stand for, in float64."""

from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq import lora
from svdq_pack.svdq.errors import LoraError
from svdq_pack.svdq.format import Tile
from svdq_pack.svdq.kernels import layout, weights
from svdq_pack.svdq.kernels.launch import MAX_RANK
from svdq_pack.svdq.lora import LoraFactors, LowRank

HALF = torch.bfloat16
ROUNDED = 4e-3              # two factors of a product rounded to bf16, relative to the product


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.randn(size, generator=generator)


@pytest.fixture
def w4a4(random):
    """w4a4(n, k, rank=16, unsigned=False) -> W4A4Weight of random numbers."""
    def make(n, k, rank=16, unsigned=False, dtype=HALF):
        codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(n + k))
        return weights.W4A4Weight(
            "int4", unsigned, layout.pack_codes(codes.to(torch.int8)),
            layout.pack_scales(random(n, k // 64).to(dtype) * 0.01), layout.pack_vector(random(k).abs().to(dtype) + 0.5),
            layout.pack_down(random(k, rank).to(dtype)) if rank else None,
            layout.pack_up(random(n, rank).to(dtype)) if rank else None)
    return make


@pytest.fixture
def awq(random):
    def make(n, k):
        codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
        return weights.AWQWeight(layout.pack_awq(codes), random(k // 64, n).to(HALF) * 0.01, random(k // 64, n).to(HALF) * 0.01)
    return make


@pytest.fixture
def layers(w4a4, awq):
    """The kinds of layers FLUX has, as tiles: (tiles, out features, in features)."""
    return {"qkv": ([Tile(0, 0, w4a4(384, 128))], 384, 128),
            "no_branch": ([Tile(0, 0, w4a4(128, 128, 0))], 128, 128),
            "unsigned": ([Tile(0, 0, w4a4(128, 256, unsigned=True))], 128, 256),
            "fp16": ([Tile(0, 0, w4a4(128, 128, dtype=torch.float16))], 128, 128),
            "linear1": ([Tile(0, 0, w4a4(384, 128)), Tile(384, 0, w4a4(512, 128))], 896, 128),
            "linear2": ([Tile(0, 0, w4a4(128, 128)), Tile(0, 128, w4a4(128, 512, unsigned=True))], 128, 640),
            "modulation": ([Tile(0, 0, awq(768, 128))], 768, 128)}


def dense(tiles, shape, branches=None):
    """The weight of a layer, its branches replaced, in float64."""
    weight = torch.zeros(shape, dtype=torch.float64)
    for tile, branch in zip(tiles, branches or [lora.Branch()] * len(tiles)):
        operand = tile.weight
        if branch.proj_down is not None:
            operand = replace(operand, proj_down=branch.proj_down, proj_up=branch.proj_up)
        n, k = operand.shape
        part = weights.dequantize(operand)[0].double()
        if branch.down is not None:
            part += branch.up.double() @ branch.down.double()
        weight[tile.row:tile.row + n, tile.col:tile.col + k] += part
    return weight


def change_of(tiles, shape, factors, stored):
    return dense(tiles, shape, factors.sections.view(stored)) - dense(tiles, shape)


def expected(changes, shape):
    weight = torch.zeros(shape, dtype=torch.float64)
    for one in changes:
        part = weight[one.row:one.row + len(one.up), one.col:one.col + one.down.shape[1]]
        part += one.strength * one.scale * one.up.double() @ one.down.double()
    return weight


def distance(actual, wanted):
    return ((actual - wanted).norm() / wanted.norm()).item()


def low_rank(random, n, k, rank, **where):
    return LowRank(random(rank, k).to(HALF), random(n, rank).to(HALF), **where)


# ---- rank concatenation

@pytest.mark.parametrize("rank", [1, 4, 16, 17, 64, 112, 113, 200, 600])
@pytest.mark.parametrize("kind", ["qkv", "no_branch", "unsigned", "fp16", "linear1", "linear2", "modulation"])
def test_one_lora(layers, random, kind, rank):
    tiles, n, k = layers[kind]
    changes = [low_rank(random, n, k, rank, scale=0.5, strength=0.75)]
    factors = LoraFactors(tiles, changes)
    stored = factors.store(tiles)
    assert distance(change_of(tiles, (n, k), factors, stored), expected(changes, (n, k))) <= ROUNDED
    assert len(stored) == factors.nbytes == lora.nbytes(tiles, [(0, n, 0, k, rank)])
    for tile, branch in zip(tiles, factors.sections.view(stored)):
        base = 0 if kind == "modulation" else tile.weight.rank
        fused = 0 if branch.proj_down is None else branch.proj_down.shape[1]
        beside = 0 if branch.down is None else len(branch.down)
        assert fused <= MAX_RANK and fused % 16 == 0
        assert beside == (rank if kind == "modulation" else max(base + rank - MAX_RANK, 0))
        assert branch.proj_down is None or branch.proj_down.dtype == tile.weight.smooth.dtype
        if base and fused:                      # the checkpoint's own factors come first, untouched
            for packed, own, unpack in ((branch.proj_down, tile.weight.proj_down, layout.unpack_down),
                                        (branch.proj_up, tile.weight.proj_up, layout.unpack_up)):
                assert torch.equal(unpack(packed)[:, :base], unpack(own))


def test_a_branch_beyond_the_fused_rank_stays(w4a4, random):
    tiles = [Tile(0, 0, w4a4(128, 128, 144))]
    changes = [low_rank(random, 128, 128, 8)]
    factors = LoraFactors(tiles, changes)
    branch, = factors.sections.view(factors.store(tiles))
    assert branch.proj_down is None and branch.down.shape == (8, 128)
    assert distance(change_of(tiles, (128, 128), factors, factors.store(tiles)), expected(changes, (128, 128))) <= ROUNDED


def test_several_loras(layers, random):
    """Of any rank, each with a strength of its own, as exact together as alone."""
    for tiles, n, k in layers.values():
        changes = [low_rank(random, n, k, rank, strength=strength) for rank, strength in ((5, 0.3), (40, -2.0), (9, 11.0))]
        changes.append(low_rank(random, 128, k, 3, row=n - 128))
        factors = LoraFactors(tiles, changes)
        assert distance(change_of(tiles, (n, k), factors, factors.store(tiles)), expected(changes, (n, k))) <= ROUNDED


def test_slices(layers, random):
    """Parts of a fused layer: rows of linear1 and qkv, columns of linear2. Where none fall on a tile, it stays as it is."""
    tiles, n, k = layers["linear1"]
    changes = [low_rank(random, 512, k, 4, row=384)]
    factors = LoraFactors(tiles, changes)
    stored = factors.store(tiles)
    assert distance(change_of(tiles, (n, k), factors, stored), expected(changes, (n, k))) <= ROUNDED
    first, second = factors.sections.view(stored)
    assert first == lora.Branch() and second.proj_down is not None
    tiles, n, k = layers["linear2"]
    changes = [low_rank(random, n, 200, 4, col=100)]
    factors = LoraFactors(tiles, changes)
    assert distance(change_of(tiles, (n, k), factors, factors.store(tiles)), expected(changes, (n, k))) <= ROUNDED


def test_a_down_in_common_is_there_once(layers, random):
    tiles, n, k = layers["qkv"]
    down, ups = random(6, k).to(HALF), [random(128, 6).to(HALF) for _ in range(3)]
    changes = [LowRank(down.clone(), up, row=128 * i) for i, up in enumerate(ups)]
    factors = LoraFactors(tiles, changes)
    stored = factors.store(tiles)
    assert factors.sections.view(stored)[0].proj_down.shape == (k, 32)           # 16 + 6, not 16 + 18
    assert distance(change_of(tiles, (n, k), factors, stored), expected(changes, (n, k))) <= ROUNDED
    apart = [replace(one, strength=strength) for one, strength in zip(changes, (1, 2, 3))]
    assert not factors.rescale(stored, apart)                           # one down cannot have three strengths
    factors = LoraFactors(tiles, apart)
    assert factors.sections.view(factors.store(tiles))[0].proj_down.shape == (k, 48)
    assert distance(change_of(tiles, (n, k), factors, factors.store(tiles)), expected(apart, (n, k))) <= ROUNDED


def test_block_diagonal_factors_shed_their_zeros(layers, random):
    """A kohya LoRA of linear1 was made of one for each part: each tile takes its own columns."""
    tiles, n, k = layers["linear1"]
    up = torch.zeros(n, 40, dtype=HALF)
    up[:384, :24], up[384:, 24:] = random(384, 24).to(HALF), random(512, 16).to(HALF)
    changes = [LowRank(random(40, k).to(HALF), up)]
    factors = LoraFactors(tiles, changes)
    first, second = factors.sections.view(factors.store(tiles))
    assert (first.proj_down.shape[1], second.proj_down.shape[1]) == (16 + 32, 16 + 16)
    assert distance(change_of(tiles, (n, k), factors, factors.store(tiles)), expected(changes, (n, k))) <= ROUNDED


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_files_of_other_dtypes(layers, random, dtype):
    """Rounded once: strength and factor are multiplied in fp32."""
    tiles, n, k = layers["qkv"]
    change = LowRank(random(16, k).to(dtype), random(n, 16).to(dtype), scale=0.3, strength=0.7)
    factors = LoraFactors(tiles, [change])
    branch, = factors.sections.view(factors.store(tiles))
    assert torch.equal(layout.unpack_down(branch.proj_down)[:, 16:], (change.down.float() * 0.7).to(HALF).t())
    assert torch.equal(layout.unpack_up(branch.proj_up)[:, 16:], (change.up.float() * 0.3).to(HALF))


# ---- strength

def test_widened_for_a_file(w4a4, random):
    """Of any rank, at the strength, in the columns and rows that a change is for."""
    weight = w4a4(128, 256)
    change = LowRank(random(150, 64), random(100, 150), row=20, col=128, scale=2.0, strength=0.25)
    down, up = lora.widened(Tile(0, 0, weight), [change])
    base, wide = (weights.dequantize(one)[0] for one in (weight, replace(weight, proj_down=down, proj_up=up)))
    want = torch.zeros(128, 256)
    want[20:120, 128:192] = 0.5 * change.up @ change.down
    assert down.shape == (256, 176) and (wide - base - want).norm() <= 4e-3 * want.norm()
    assert lora.widened(Tile(0, 0, weight), []) == (weight.proj_down, weight.proj_up)


def test_another_strength(layers, random):
    """In place, to the same bits as from scratch, and the ups are not touched."""
    for tiles, n, k in layers.values():
        changes = [low_rank(random, n, k, 20), low_rank(random, n, k, 130, strength=0.5)]
        factors = LoraFactors(tiles, changes)
        stored = factors.store(tiles)
        for strengths in ((0.3, 0.3), (1.7, -2.0), (1.0, 0.5)):
            other = [replace(one, strength=strength) for one, strength in zip(changes, strengths)]
            assert not factors.same(other) or strengths == (1.0, 0.5)
            place = stored.data_ptr()
            assert factors.rescale(stored, other) and factors.same(other)
            assert stored.data_ptr() == place
            fresh = LoraFactors(tiles, other)
            for ours, theirs in zip(factors.sections.view(stored), fresh.sections.view(fresh.store(tiles))):
                assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs))


def test_other_factors_are_not_another_strength(layers, random):
    tiles, n, k = layers["qkv"]
    changes = [low_rank(random, n, k, 4)]
    factors = LoraFactors(tiles, changes)
    stored = factors.store(tiles)
    before = stored.clone()
    for other in ([], changes * 2, [replace(changes[0], up=changes[0].up.clone())], [replace(changes[0], scale=2.0)]):
        assert not factors.rescale(stored, other)
        assert torch.equal(stored, before)


# ---- what is not low-rank as it comes

@pytest.mark.parametrize("rank", [1, 7, 64])
def test_factorise_finds_the_rank(random, rank):
    delta = random(384, rank) @ random(rank, 300)
    down, up, error = lora.factorise(delta)
    assert len(down) == up.shape[1] == rank and error <= 1e-3
    assert distance((up @ down).double(), delta.double()) <= 1e-3


def test_factorise_says_what_is_lost(random):
    delta = random(600, 400)
    down, up, error = lora.factorise(delta)
    assert len(down) == lora.MOST_RANK
    assert distance((up @ down).double(), delta.double()) == pytest.approx(error, rel=1e-3) and error > 0.2


def test_factorise_nothing():
    down, up, error = lora.factorise(torch.zeros(128, 64))
    assert down.shape == (0, 64) and up.shape == (128, 0) and error == 0


def test_factorise_repeats_itself_and_leaves_the_seed_alone(random):
    delta = random(300, 300)
    torch.manual_seed(1)
    first, after = lora.factorise(delta), torch.rand(1)
    torch.manual_seed(2)
    second = lora.factorise(delta)
    torch.manual_seed(1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and torch.equal(after, torch.rand(1))


def test_scaled_rows(random):
    """DoRA on a layer wider than any factorisation: (1 + e) * (W + B A), of which SVD alone keeps little."""
    weight, rows = random(1024, 700), 1 + 0.02 * random(1024)
    delta = rows[:, None] * (weight + 0.01 * random(1024, 8) @ random(8, 700)) - weight
    down, up, found, error = lora.factorise_with_output_scale(delta, weight)
    change = (found - 1)[:, None] * weight + up @ down
    assert distance(change.double(), delta.double()) == pytest.approx(error, rel=0.05, abs=1e-4)
    assert error <= 1e-3 and len(down) == 8
    assert lora.factorise(delta)[2] > 0.2
    assert lora.factorise_with_output_scale(random(1024, 8) @ random(8, 700), weight)[2] is None


def test_rows_leave_the_changes_alone(layers, random):
    """rows scales the checkpoint's part of the output only."""
    for tiles, n, k in layers.values():
        changes, rows = [low_rank(random, n, k, 8, strength=0.5)], 1 + 0.1 * random(n)
        factors = LoraFactors(tiles, changes, rows)
        stored = factors.store(tiles)
        weight = dense(tiles, (n, k), factors.sections.view(stored)) * factors.sections.view_scale(stored)[0][:, None]
        assert distance(weight - rows[:, None] * dense(tiles, (n, k)), expected(changes, (n, k))) <= ROUNDED
        shift = torch.zeros(n)
        for tile in tiles:
            shift[tile.row:tile.row + tile.weight.shape[0]] += weights.dequantize(tile.weight)[1]
        assert torch.allclose(factors.sections.view_scale(stored)[1] + rows * shift, shift, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["down", "up"])
def test_not_a_number(layers, random, which, bad):
    tiles, n, k = layers["qkv"]
    change = low_rank(random, n, k, 4)
    getattr(change, which)[0, 0] = bad
    with pytest.raises(LoraError, match="NaN or Inf"):
        LoraFactors(tiles, [change])
    with pytest.raises(LoraError, match="NaN"):
        lora.factorise(torch.full((64, 64), bad))


@pytest.mark.parametrize("down, up, options", [
    (1e38, 1, {"strength": 10.0}), (-1e38, 1e-9, {"strength": 10.0}), (1, 1e38, {"scale": 10.0}), (1, -1e38, {"scale": 0.1}),
    (1e9, 1e9, {}), (1, 1, {"strength": float("nan")}), (1, 1, {"strength": float("inf")}), (1, 1, {"scale": float("nan")}),
    (1, 1, {"scale": 1e300}), (0, 0, {"strength": 1e300}), (1e30, 0, {})])
@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.float64])
def test_numbers_that_overflow(layers, down, up, options, dtype):
    """With strength and scale, one by one and multiplied: said before anything is written, from scratch and in place."""
    tiles, n, k = layers["qkv"]
    good = LowRank(torch.ones(4, k, dtype=dtype), torch.ones(n, 4, dtype=dtype))
    bad = LowRank(torch.full((4, k), down, dtype=dtype), torch.full((n, 4), up, dtype=dtype), **options)
    with pytest.raises(LoraError, match="becomes Inf at strength "):
        LoraFactors(tiles, [good, bad])
    if "strength" in options and abs(down) <= 1 and options["strength"] > 0:
        factors = LoraFactors(tiles, [good, replace(bad, strength=1.0)])
        stored = factors.store(tiles)
        before = stored.clone()
        with pytest.raises(LoraError, match="becomes Inf at strength "):
            factors.rescale(stored, [good, bad])
        assert torch.equal(stored, before) and factors.same([good, replace(bad, strength=1.0)])


def test_what_fp16_cannot_hold(layers):
    """A checkpoint in fp16 has factors in fp16."""
    for name, allowed in (("qkv", True), ("fp16", False)):
        tiles, n, k = layers[name]
        for down, up, options in ((700, 1, {"strength": 100.0}), (1, 700, {"scale": 100.0})):
            change = LowRank(torch.full((4, k), float(down)), torch.full((n, 4), float(up)), **options)
            if allowed:
                factors = LoraFactors(tiles, [change])
                assert all(part.isfinite().all() for part in factors.sections.view(factors.store(tiles))[0][:2])
            else:
                with pytest.raises(LoraError, match="becomes Inf"):
                    LoraFactors(tiles, [change])


@pytest.mark.parametrize("size, most", [(1e-2, 4e-4), (1e-4, 4e-4), (1e-5, 2.5e-3), (1e-6, 2.5e-2)])
def test_small_numbers_in_fp16(w4a4, random, size, most):
    """Closer than in bf16, 2.3e-3, down to factors of 1e-5, which change a layer by a millionth of its weights."""
    tiles, (n, k) = [Tile(0, 0, w4a4(128, 128, 0, dtype=torch.float16))], (128, 128)
    changes = [LowRank(random(16, k) * 0.02, random(n, 16) * size)]
    factors = LoraFactors(tiles, changes)
    branch, = factors.sections.view(factors.store(tiles))
    got = layout.unpack_up(branch.proj_up).double() @ layout.unpack_down(branch.proj_down).double().t()
    error = distance(got, expected(changes, (n, k)))
    print(f"fp16, up of {size:g}: {error:.1e}")
    assert branch.proj_down.dtype == torch.float16 and error <= most


@pytest.mark.parametrize("least", [0.0, 1e-12, -1e-12, float("nan")])
def test_a_scale_of_the_output_that_makes_inf(layers, random, least):
    """The ups are divided by it."""
    tiles, n, k = layers["qkv"]
    scale = torch.ones(n)
    scale[5] = least
    with pytest.raises(LoraError, match="becomes Inf"):
        LoraFactors(tiles, [low_rank(random, n, k, 4)], scale)


def test_largest():
    for dtype in (HALF, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64):
        assert lora.largest(torch.tensor([[1, -3], [2, 0]]).to(dtype)) == 3
        assert lora.largest(torch.empty(0, 4, dtype=dtype)) == 0
    tensor = torch.tensor([1.0, float("nan")])
    assert lora.largest(tensor) != lora.largest(tensor) and lora.largest(torch.tensor([-float("inf")])) == float("inf")


def test_nbytes_is_no_less_than_what_it_takes(layers, random):
    tiles, n, k = layers["linear1"]
    changes = [low_rank(random, 384, k, 20), low_rank(random, n, k, 100), low_rank(random, 512, k, 7, row=384)]
    ranks = [(one.row, len(one.up), one.col, one.down.shape[1], len(one.down)) for one in changes]
    assert LoraFactors(tiles, changes).nbytes == lora.nbytes(tiles, ranks)
