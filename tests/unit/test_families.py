"""What a family says of its models fits together, and nothing the rest of the pack asks for is shaped like FLUX.1."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import checkpoint, families, report
from svdq_pack.svdq.checkpoint import Checkpoint, metadata_for
from svdq_pack.svdq.container import NAMES, TensorInfo, write_tensors
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import FAMILIES, flux1, recognise, shape_of
from svdq_pack.svdq.families.family import Place, Plain, PlainPlace, Slot, by_layer
from svdq_pack.svdq.format import read_slot, slot_tensors
from svdq_pack.svdq.kernels import weights
from svdq_pack.svdq.quantize import run
from svdq_pack.tests import random_models

SHAPE = flux1.Shape(hidden=256, depth=2, depth_single=3, in_features=64, context_dim=128, vec_dim=64, guidance=True)


# What flux1.py promises to say

def listed():
    """(whether it is Shape's, [names]) of every line of the list in flux1's docstring."""
    block = re.search(r"asks it for:\n\n(.*?)\n\n", flux1.__doc__, re.S)[1]
    for line in block.splitlines():
        names = re.sub(r"\(.*?\)", "", re.split(" {2,}", line.strip())[0])
        yield line.startswith(" " * 8), names.split(", ")


def test_families_offer_what_flux1_lists():
    of_shape, of_family = ({name for shapes, names in listed() if shapes == inner for name in names}
                           for inner in (True, False))
    assert {"NAME", "MARKS", "canonical", "ORIGINALS"} <= of_family and {"slots", "comfy_plain", "metadata"} <= of_shape
    for family in FAMILIES:
        assert not [name for name in of_family if not hasattr(family, name)]
        assert not [name for name in of_shape if not hasattr(family.Shape, name)]


def test_recognised():
    published = [f"{slot.module}.qweight" for slot in SHAPE.slots()]
    assert recognise(published) is flux1 and recognise(iter(published)) is flux1
    v2 = [name.replace(".qkv_proj.", ".attn.to_qkv.") for name in published]
    assert recognise(v2) is flux1
    for foreign in (["transformer_blocks.0.attn.to_qkv.qweight", "transformer_blocks.0.img_mlp.net.0.proj.qweight"],
                    ["layers.0.attention.to_qkv.qweight"], ["transformer_blocks.0.attn.qkv_proj.qweight"], v2[:5], []):
        assert recognise(foreign) is None


def test_shape_of():
    assert shape_of(vars(SHAPE) | {"version": 1}) == SHAPE
    with pytest.raises(KeyError, match="vec_dim"):
        shape_of({name: size for name, size in vars(SHAPE).items() if name != "vec_dim"})


def test_comfy_holds_every_number_once():
    """Places cover all rows of all slots, and each layer from corner to corner; plain tensors go to a name each."""
    places = list(SHAPE.comfy_places())
    assert [place.slot for place in places] == list(SHAPE.slots())
    assert all((place.start, place.n) == (0, place.slot.n) for place in places)
    layers = by_layer(places)
    assert len({layer.name for layer in layers}) == len(layers) == 2 * 10 + 3 * 3
    for layer in layers:
        filled = torch.zeros(layer.n, layer.k, dtype=torch.int8)
        for place in layer.places:
            filled[place.row:place.row + place.n, place.col:place.col + place.k] += 1
        assert (filled == 1).all(), layer.name
        assert layer.tensors() == {f"{layer.name}.weight": (layer.n, layer.k), f"{layer.name}.bias": (layer.n,)}
    plain = list(SHAPE.comfy_plain())
    assert [place.tensor for place in plain] == list(SHAPE.plain())
    names = [name for place in plain for name in (place.name, place.alias) if name]
    assert len(set(names)) == len(names) == len(plain) + 2 * 4 + 3 * 2
    assert {place.tensor.name for place in plain if place.swapped} == {"norm_out.linear.weight", "norm_out.linear.bias"}


def test_words():
    assert SHAPE.layer_in_words("double_blocks.1.img_mlp.2") == "double block 2 of 2, img_mlp.2"
    assert SHAPE.layer_in_words("single_blocks.0.modulation.lin") == "single block 1 of 3, modulation.lin"
    assert SHAPE.in_words() == "FLUX-like (dev, Krea or Kontext), 256 wide, 2 double_blocks and 3 single_blocks"


def test_unsigned():
    assert [Slot("", 1, 1, activation=given).unsigned(precision) for given in ("gelu", None)
            for precision in ("int4", "nvfp4")] == [True, False, False, False]


# Hosts and families that are not built like FLUX.1 in ComfyUI

def dense(tiles, bias, n, k):
    """(weight, bias) in full of what Checkpoint.layers gives."""
    weight = torch.zeros(n, k)
    for tile in tiles:
        part, extra = weights.dequantize(tile.weight)
        rows = slice(tile.row, tile.row + len(part))
        weight[rows, tile.col:tile.col + part.shape[1]] = part
        if bias is not None:
            bias[rows] += extra
    return weight, bias


def test_one_slot_over_several_layers(model):
    """q, k and v as layers of their own have the rows of the fused one, bit for bit; here k and v are upside down."""
    opened = Checkpoint(model)
    h = opened.shape.hidden
    qkv = next(slot for slot in opened.slots if slot.parts == 3)
    (_, *whole), = opened.layers([Place(qkv, "qkv")])
    weight, bias = dense(*whole, 3 * h, h)
    cut = [Place(qkv, "q", stop=h), Place(qkv, "vk", row=h, start=h, stop=2 * h), Place(qkv, "vk", start=2 * h)]
    (q, *q_parts), (vk, *vk_parts) = opened.layers(cut)
    assert (q, vk) == ("q", "vk")
    got = [dense(*q_parts, h, h), dense(*vk_parts, 2 * h, h)]
    order = [*range(2 * h, 3 * h), *range(h, 2 * h)]
    assert torch.equal(got[0][0], weight[:h]) and torch.equal(got[1][0], weight[order])
    assert torch.equal(got[0][1], bias[:h]) and torch.equal(got[1][1], bias[order])


def test_slot_without_bias(model, precision):
    stored, opened = load_file(model), Checkpoint(model)
    slot = replace(next(slot for slot in opened.slots if slot.kind == "w4a4"), bias=False)
    weight, bias = read_slot(slot, precision, stored)
    assert bias is None
    written = slot_tensors(slot, weight, torch.zeros(slot.n))
    assert f"{slot.module}.qweight" in written and f"{slot.module}.bias" not in written
    assert {name for name, _ in run._slot_specs([slot], precision, 16)} == set(written)
    (_, _, bias), = opened.layers([Place(slot, "a")])
    assert bias is None


@dataclass(frozen=True)
class ToyShape:
    """A family with another stack, without biases, without modulation, and whose MLP is two layers in the host."""
    hidden: int
    variant, model_class = "Toy 1", "Toy"

    def slots(self):
        yield Slot("layers.0.attention.to_qkv", 3 * self.hidden, self.hidden, parts=3, bias=False)
        yield Slot("layers.0.up_and_gate", 2 * self.hidden, self.hidden, bias=False)

    def plain(self):
        yield Plain("embed.weight", (self.hidden, 4))

    def comfy_places(self):
        qkv, mlp = self.slots()
        return [Place(qkv, "layers.0.qkv"), Place(mlp, "layers.0.w3", stop=self.hidden),
                Place(mlp, "layers.0.w1", start=self.hidden)]

    def comfy_plain(self):
        return [PlainPlace(tensor, "x_embedder.weight") for tensor in self.plain()]

    def metadata(self):
        return {"model_class": "Toy"}


def toy_shape(tensors):
    if "embed.weight" not in tensors:
        raise CheckpointError("embed.weight: missing")
    return ToyShape(tensors["embed.weight"].shape[0])


TOY = SimpleNamespace(
    NAME="Toy", MARKS=("layers.0.attention.to_qkv.qweight",), Shape=ToyShape, read_shape=toy_shape,
    canonical=lambda name: name.replace(".proj_down", ".lora_down").replace(".proj_up", ".lora_up"),
    facts=lambda shape: {"main_blocks": 1, "hidden_size": shape and shape.hidden, "latent_channels": 1})


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_another_family(tmp_path, monkeypatch, precision):
    """Opened, checked, described, read and dequantised by the code that serves FLUX.1."""
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, TOY))
    shape, random, tensors = ToyShape(256), torch.Generator().manual_seed(1), {"embed.weight": torch.ones(256, 4).half()}
    wanted = {}
    for slot in shape.slots():
        values = torch.randn(slot.n, slot.k, generator=random) / 16
        weight = random_models.w4a4(values, slot, 16, precision, random)
        wanted[slot.module] = weights.dequantize(weight)[0]
        tensors |= slot_tensors(slot, weight, None)
    tensors = {name.replace(".lora_", ".proj_"): tensor for name, tensor in tensors.items()}
    specs = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "toy.safetensors", specs, metadata_for(shape, precision, 16), tensors.items())
    opened = Checkpoint(tmp_path / "toy.safetensors").require()
    assert (opened.family, opened.shape, opened.precision, opened.notices) == (TOY, shape, precision, [])
    assert opened.ranks == {16: 2}
    text = report.as_text(report.describe(tmp_path / "toy.safetensors"))
    assert "Toy 1" in text and "1 main" in text and "16 (2 layers)" in text
    checkpoint.dequantize(tmp_path / "toy.safetensors", tmp_path / "16-bit.safetensors", torch.float32)
    made = load_file(tmp_path / "16-bit.safetensors")
    assert made.keys() == {"layers.0.qkv.weight", "layers.0.w3.weight", "layers.0.w1.weight", "x_embedder.weight"}
    assert torch.equal(made["layers.0.qkv.weight"], wanted["layers.0.attention.to_qkv"])
    halves = torch.cat((made["layers.0.w3.weight"], made["layers.0.w1.weight"]))
    assert torch.equal(halves, wanted["layers.0.up_and_gate"])
    del specs["embed.weight"]
    write_tensors(tmp_path / "cut.safetensors", specs, {}, ((name, tensors[name]) for name in specs))
    with pytest.raises(CheckpointError, match="embed.weight: missing"):
        Checkpoint(tmp_path / "cut.safetensors").require()
