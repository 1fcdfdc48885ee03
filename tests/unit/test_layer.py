"""svdq/layer.py without a host: what a forward computes, and what a second one no longer does."""

import copy
import gc
import io
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from svdq_pack.svdq import format, layer
from svdq_pack.svdq.format import Tile, pack_tiles
from svdq_pack.svdq.kernels import check, registry
from svdq_pack.svdq.kernels.epilogues import QKV, Gelu
from svdq_pack.svdq.kernels.errors import RangeError, ShapeError
from svdq_pack.svdq.kernels.prologues import Modulated
from svdq_pack.svdq.kernels.weights import dequantize
from svdq_pack.svdq.layer import BoundLinear, PackedLinear, SVDQLayer, run_together
from svdq_pack.svdq.lora import LowRank

F32 = torch.float32


class Layer(SVDQLayer):
    """A host whose layers keep their bytes in `weight`."""
    packed = property(lambda self: self.weight)


def tiles(*places, kind="int4"):
    """Random tiles of 128 x 128 at these (row, col)."""
    return [Tile(row, col, check.random_weight(kind, torch.bfloat16, 128, 128, 16, seed=i)[0])
            for i, (row, col) in enumerate(places)]


def make(*places, kind="int4", act_bits=None):
    """A layer of such tiles, as a host loads it."""
    made = pack_tiles(tiles(*places, kind=kind))
    new = Layer(128 + max(col for _, col in places), 128 + max(row for row, _ in places))
    new.weight = torch.nn.Parameter(made.stored, requires_grad=False)
    new.bias = torch.nn.Parameter(torch.randn(new.out_features, generator=torch.Generator().manual_seed(5)),
                                  requires_grad=False)
    new.describe(json.loads(made.description(act_bits=act_bits)))
    return new


def forward(this, x):
    return this.forward_packed(x, this.weight, this.bias.to(x.dtype))


def x_for(this, tokens=3, dtype=F32):
    return torch.randn(2, tokens, this.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def lora_for(this, rank=4, seed=1):
    random = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(size, generator=random) for size in ((rank, this.in_features), (this.out_features, rank)))
    return LowRank(down, up)


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "awq"])
def test_cast_in_place(kind):
    """The same bytes with other scales in them, and a description that says so; or, where a number does not fit, nothing."""
    made = pack_tiles(tiles((0, 0), (128, 0), kind=kind))
    before, stored, text = [dequantize(tile.weight)[0] for tile in made], made.stored.clone(), made.description()
    at = made.stored.data_ptr()
    made.cast(torch.float16)
    assert made.stored.data_ptr() == at and '"float16"' in made.description() and '"bfloat16"' not in made.description()
    for tile, viewed, want in zip(made, format.view_layer(made.stored, json.loads(made.description())), before, strict=True):
        assert tile.weight.dtype == viewed.weight.dtype == torch.float16
        for weight in (tile.weight, viewed.weight):
            assert (dequantize(weight)[0] - want).norm() <= 1e-6 * want.norm()
    made.cast(torch.bfloat16)
    assert made.description() == text and (made.stored != stored).float().mean() < 1e-3    # the smallest numbers of a factor
    spoilt = made[1].weight.smooth if kind != "awq" else made[1].weight.wscales
    spoilt.flatten()[7] = 1e5
    stored = made.stored.clone()
    with pytest.raises(RangeError, match="1e.05, which would be inf"):
        made.cast(torch.float16)
    assert torch.equal(made.stored, stored) and made.description() == text


PLACES = pytest.mark.parametrize("places", [[(0, 0)], [(0, 0), (128, 0)], [(0, 0), (0, 128)]],
                                 ids=["one", "rows of linear1", "columns of linear2"])


@PLACES
@pytest.mark.parametrize("kind", ["int4", "int4 unsigned", "nvfp4"])
def test_forward(places, kind):
    this = make(*places, kind=kind, act_bits=16)
    x, (dense, shift) = x_for(this), this.dense(this.weight)
    want = x.double() @ dense.double().t() + (this.bias + shift).double()
    assert (forward(this, x).double() - want).norm() <= 1e-5 * want.norm()
    for tile in format.view_layer(this.weight, this.description):
        part, _ = dequantize(tile.weight)
        assert torch.equal(dense[tile.row:tile.row + 128, tile.col:tile.col + 128], part)


@pytest.fixture
def counted(monkeypatch):
    """How often JSON was parsed, a view built, a plan asked for."""
    counts = {"json": 0, "views": 0, "plans": 0}

    def count(where, name, what):
        original = getattr(where, name)

        def counting(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)
        monkeypatch.setattr(where, name, counting)

    count(json, "loads", "json")
    count(format, "view_section", "views")
    count(layer, "view_layer", "views")
    count(registry, "plan", "plans")
    return counts


@PLACES
@pytest.mark.parametrize("with_lora", [False, True])
def test_a_second_forward_parses_nothing_and_builds_no_view(places, with_lora, counted):
    this = make(*places)
    if with_lora:
        this.use_lora([lora_for(this)])
    x = x_for(this)
    first = forward(this, x)
    assert counted["views"] and counted["plans"] == len(places)
    counted.update(dict.fromkeys(counted, 0))
    for _ in range(3):
        assert torch.equal(forward(this, x), first)
    assert not any(counted.values()), counted
    forward(this, x.bfloat16())
    assert counted == {"json": 0, "views": 0, "plans": len(places)}     # another dtype is another plan


def test_another_lora_is_seen_at_once():
    this = make((0, 0))
    x = x_for(this)
    plain = forward(this, x)
    one, other = lora_for(this, seed=1), lora_for(this, seed=2)
    this.use_lora([one])
    with_one = forward(this, x)
    want = (plain.double() + x.double() @ one.down.double().t() @ one.up.double().t()).float()
    assert (with_one - want).norm() <= 1e-2 * want.norm() and not torch.equal(with_one, plain)
    this.use_lora([other])
    assert not torch.equal(forward(this, x), with_one)
    this.use_lora([LowRank(one.down, one.up, strength=1.0)])
    assert torch.equal(forward(this, x), with_one)
    this.use_lora([LowRank(one.down, one.up, strength=0.5)])            # written into the same bytes
    assert not torch.equal(forward(this, x), with_one)
    this.park_lora()
    assert torch.equal(forward(this, x), plain)


def test_views_end_with_the_bytes():
    """A host that exchanges or moves a parameter frees its memory, whatever was computed with it."""
    this = make((0, 0))
    forward(this, x_for(this))
    view = weakref.ref(this.views(this.weight).tiles[0].weight.qweight)
    this.weight = torch.nn.Parameter(this.weight.detach().clone(), requires_grad=False)
    gc.collect()
    assert view() is None
    forward(this, x_for(this))
    view = weakref.ref(this.views(this.weight).tiles[0].weight.qweight)
    this._apply(lambda tensor: tensor.clone())                          # what .to(device) does to the parameter's data
    gc.collect()
    assert view() is None


def test_bytes_that_were_exchanged_under_a_parameter_are_read_anew():
    this, other = make((0, 0)), make((0, 0), kind="int4 unsigned")
    x = x_for(this)
    first, kind = forward(this, x), this.description
    this.weight.data = other.weight.detach().clone()
    this.describe(other.description)
    assert torch.equal(forward(this, x), other.forward_packed(x, other.weight, this.bias))
    this.weight.data = make((0, 0)).weight.detach().clone()
    this.describe(kind)
    assert torch.equal(forward(this, x), first)


def test_the_same_bytes_read_another_way():
    """Described anew in place: the tiles have changed rows."""
    this = make((0, 0), (128, 0))
    x = x_for(this)
    first, swapped = forward(this, x), copy.deepcopy(this.description)
    swapped["tiles"][0]["row"], swapped["tiles"][1]["row"] = 128, 0
    this.describe(swapped)
    assert not torch.equal(forward(this, x), first)


def test_x_of_one_row():
    this = make((0, 0))
    x = x_for(this)[0, :1]
    assert torch.equal(forward(this, x[0]), forward(this, x)[0])


def test_a_used_layer_is_saved_as_a_fresh_one():
    """The views and plans of a forward are left behind; they would carry a device and a process."""
    this = make((0, 0))
    x = x_for(this)
    wanted = forward(this, x)
    back = io.BytesIO()
    torch.save(this, back)
    back.seek(0)
    loaded = torch.load(back, weights_only=False)
    assert this.weight.svdq_views is not None and loaded.weight.svdq_views is None and not loaded.linear._plans
    assert torch.equal(forward(loaded, x), wanted)


def test_a_plan_is_of_the_variant_asked_for():
    this, x = make((0, 0)), x_for(make((0, 0)))
    kept = this.plans(x.device, x.dtype)[0].variant.name
    with registry.using("reference"):
        assert this.plans(x.device, x.dtype)[0].variant.name == "reference" != kept
    assert this.plans(x.device, x.dtype)[0].variant.name == kept


def test_a_copy_of_the_loras_does_not_outlive_a_forward(monkeypatch):
    """An offloaded layer: its LoRAs rest elsewhere, and what is copied to the bytes is nobody's to keep."""
    this = make((0, 0))
    this.use_lora([lora_for(this)])
    real, x = this.lora, x_for(this)
    wanted = forward(this, x)
    this.lora, copies = torch.nn.Parameter(torch.empty_like(real, device="meta"), requires_grad=False), []
    this.forget_views()

    def lora_on(device):
        copies.append(real.detach().clone())
        return copies[-1]

    monkeypatch.setattr(this, "lora_on", lora_on)
    for _ in range(2):
        assert torch.equal(forward(this, x), wanted)
    assert len(copies) == 2 and "svdq_views" not in this.weight.__dict__


def test_streamed_bytes_keep_their_own_views():
    this = make((0, 0), (128, 0))
    x, copy_there = x_for(this), this.weight.detach().clone()
    assert torch.equal(this.forward_packed(x, copy_there, this.bias), forward(this, x))
    assert this.views(copy_there) is not this.views(this.weight)
    there, here = (this.views(packed).tiles[0].weight.qweight for packed in (copy_there, this.weight))
    assert there.data_ptr() != here.data_ptr()


def test_run_tiles_are_the_forward():
    this = make((0, 0), (128, 0))
    x = x_for(this)[0]
    out = torch.empty(len(x), this.out_features)
    this.run_tiles_packed([(0, x, out[:, :128], None), (1, x, out[:, 128:], None)], this.weight, this.bias)
    assert torch.equal(out, forward(this, x))


def test_layers_run_as_one_after_another(monkeypatch):
    """What is made of their inputs is asked for once; a job that does not fit is said before anything is written."""
    asked, original = [], registry.shared_inputs
    monkeypatch.setattr(registry, "shared_inputs", lambda jobs: asked.append(len(jobs)) or original(jobs))
    layers = [make((0, 0), (128, 0)), make((0, 0))]
    inputs = [check.random_modulated(6, each.in_features, torch.float32) for each in layers]
    outs, alone = ([torch.zeros(6, each.out_features) for each in layers] for _ in range(2))

    def jobs(which):
        return [(each, [(i, x, out[:, 128 * i:128 * i + 128], None) for i in range(len(each.tiles))])
                for each, x, out in zip(layers, inputs, which)]

    run_together([(BoundLinear(each.linear, each.weight, each.bias), of) for each, of in jobs(outs)])
    assert asked == [3]
    for each, of in jobs(alone):
        each.run_tiles_packed(of, each.weight, each.bias)
    assert all(map(torch.equal, outs, alone)) and outs[1].any()
    wrong = [(BoundLinear(each.linear, each.weight, each.bias), of) for each, of in jobs(list(map(torch.zeros_like, outs)))]
    wrong[1][1][0] = (0, Modulated(inputs[1].x, inputs[1].scale[:, :1], inputs[1].shift), wrong[1][1][0][2], None)
    with pytest.raises(ShapeError, match="the operands of Modulated do not fit"):
        run_together(wrong)
    assert not any(out.any() for _, of in wrong for _, _, out, _ in of)


def test_layers_that_run_together(monkeypatch):
    """What they would by themselves, and one reading of the modulated input that they share."""
    layers = [make((0, 0)), make((0, 0), (128, 0))]
    x = x_for(layers[0])[0]
    modulated, made = Modulated(x, *torch.randn(2, 1, x.shape[1], generator=torch.Generator().manual_seed(4))), []
    monkeypatch.setattr(Modulated, "of", lambda this, of=Modulated.of: made.append(this) or of(this))
    bound = [BoundLinear(this.linear, this.weight.detach(), this.bias) for this in layers]
    outs = [torch.empty(len(x), this.out_features) for this in layers]
    jobs = [[(i, modulated, out.narrow(1, tile.row, tile.n), None) for i, tile in enumerate(this.tiles)]
            for this, out in zip(layers, outs)]
    run_together(list(zip(bound, jobs)))
    assert len(made) == 1
    for this, out in zip(layers, outs):
        assert torch.equal(out, forward(this, modulated.of()))
    jobs[1][0] = 0, modulated, outs[1][:, :128], QKV(*torch.ones(2, 128), torch.zeros(len(x), 64, 2, 2))
    with pytest.raises(ShapeError, match="QKV does not fit out"):
        run_together(list(zip(bound, jobs)))


def variant(**fields):
    """The reference, with fields of another."""
    return replace(next(each for each in registry.VARIANTS if each.name == "reference" and "int4" in each.precisions), **fields)


FEEDS = variant(name="feeds", feeds=lambda prepared, weight, bias, following, tokens: ("fed", following, tokens))


@pytest.mark.parametrize("first, second, rank, fed", [
    (registry.Plan(FEEDS), registry.Plan(FEEDS), 16, True), (registry.Plan(FEEDS), None, 16, False),
    (registry.Plan(FEEDS), registry.Plan(variant()), 16, False), (registry.Plan(variant()), registry.Plan(FEEDS), 16, False),
    (registry.Plan(FEEDS, unpack=True), registry.Plan(FEEDS), 16, False),
    (registry.Plan(FEEDS), registry.Plan(FEEDS, unpack=True), 16, False),
    (few := registry.Plan(replace(FEEDS, max_rows=5), fallback=registry.Plan(variant())), few, 16, False),
    (few._replace(fallback=registry.Plan(FEEDS)), registry.Plan(FEEDS), 16, True),
    (few._replace(fallback=registry.Plan(FEEDS, unpack=True)), registry.Plan(FEEDS), 16, False),
    (registry.Plan(narrow := replace(FEEDS, max_rank=16)), registry.Plan(narrow), 16, True),
    (registry.Plan(narrow), registry.Plan(narrow), 32, False)])
def test_hidden(first, second, rank, fed):
    """It is fed where one variant serves both layers, in the order in which they lie, and multiplies the first one's branch."""
    weight, bias = check.random_weight("int4", torch.bfloat16, 128, 128, rank)
    x, following, given = x_for(make((0, 0)), 6)[0], object(), SimpleNamespace(unpack=lambda: weight, rank=rank)
    hidden = layer.Hidden((6, 128), x, second and (second, following))
    hidden.fill(first, x, given if first.for_rows(6).unpack else weight, bias.float(), None)
    assert hidden.following is None                             # lets go of bytes that may be lent
    if fed:
        assert hidden.prepared == ("fed", following, 6) and hidden.tensor is None
    else:
        want = torch.empty(6, 128)
        variant().run(x, weight, want, bias.float(), epilogue=Gelu())
        assert hidden.prepared is None and torch.allclose(hidden.tensor, want, rtol=2e-2, atol=2e-2)


def test_one_launch_for_layers_that_read_one_x(monkeypatch):
    """Each gets what it would alone; those whose variant cannot do all of it run by themselves."""
    asked = []

    def products(x, weights, biases):
        asked.append(len(weights))
        return [variant().run(x, weight, out := torch.empty(len(x), 128), bias) or out for weight, bias in zip(weights, biases)]

    plan = registry.Plan(variant(products=products, max_rows=8), fallback=registry.Plan(variant()))
    monkeypatch.setattr(PackedLinear, "plans", lambda this, device, dtype: [plan] * len(this.tiles))
    plain, wide, scaled, bare, two = layers = [make((0, 0)), make((0, 0)), make((0, 0)), make((0, 0)), make((0, 0), (128, 0))]
    wide.use_lora([lora_for(wide, rank=150)])
    scaled.use_lora([lora_for(scaled)], 1.5 + torch.rand(128, generator=torch.Generator().manual_seed(1)))
    bound = [BoundLinear(each.linear, each.weight, None if each is bare else each.bias, each.stored_lora(each.weight.device))
             for each in layers]
    assert wide.stored_lora(wide.weight.device).sections.view(wide.lora)[0].down is not None
    for tokens, together in ((3, [2]), (4, [2]), (5, []), (0, [2])):
        asked.clear()
        x = x_for(plain, tokens)
        outs = layer.forward_all(x, bound)
        assert asked == together
        for out, each in zip(outs, bound):
            want = each.linear.forward(x, *each[1:])
            assert out.shape == want.shape and torch.allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_lora", [False, True])
def test_rows_are_rows(with_lora):
    """Of a layer of one tile, LoRAs beside the branch and an output scale included."""
    tile = Tile(0, 0, check.random_weight("int4 unsigned", torch.bfloat16, 384, 128, 16, seed=3)[0])
    made = pack_tiles([tile])
    this = Layer(128, 384)
    this.weight = torch.nn.Parameter(made.stored, requires_grad=False)
    this.describe(json.loads(made.description()))
    if with_lora:
        this.use_lora([lora_for(this, rank=150)], 1 + torch.rand(384, generator=torch.Generator().manual_seed(1)))
    x, lora = x_for(this), this.stored_lora(torch.device("cpu"))
    whole = this.linear.forward(x, this.weight, None, lora)
    for start, stop in ((0, 128), (128, 384), (0, 384)):
        rows = this.linear.rows(start, stop)
        assert rows.tiles[0].weight.shape == (stop - start, 128)
        assert torch.allclose(rows.forward(x, this.weight, None, lora), whole[..., start:stop], rtol=1e-5, atol=1e-5)
        dy = torch.randn(3, stop - start, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(rows.input_gradient(dy, this.weight, lora), dy @ rows.dense(this.weight, lora)[0], atol=1e-3)
    assert torch.equal(this.linear.forward(x, this.weight, None, lora), whole)


def test_act_bits_are_the_layers():
    with registry.using("reference"):
        rounded = {bits: forward(this := make((0, 0), act_bits=bits), x_for(this)) for bits in (None, 4, 8)}
    exact = forward(make((0, 0), act_bits=16), x_for(make((0, 0))))
    errors = {bits: ((y - exact).norm() / exact.norm()).item() for bits, y in rounded.items()}
    assert errors[None] == errors[4] > 3 * errors[8] > 0


def test_deep_copies_share_variants_and_nothing_else():
    this = make((0, 0))
    x = x_for(this)
    wanted = forward(this, x)
    other = copy.deepcopy(this)
    assert torch.equal(forward(other, x), wanted)
    assert other.weight.data_ptr() != this.weight.data_ptr()
    assert other.plans(x.device, x.dtype)[0].variant is this.plans(x.device, x.dtype)[0].variant
