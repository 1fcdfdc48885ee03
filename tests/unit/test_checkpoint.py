"""The golden models through Checkpoint, and every variant of a file that exists or is allowed to."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import checkpoint, format, report
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.container import DTYPES, TensorInfo
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.families.family import Slot
from svdq_pack.svdq.format import Tile, deinterleave, interleave, pack_tiles, read_slot, slot_tensors, view_layer
from svdq_pack.svdq.kernels import layout, weights
from svdq_pack.svdq.kernels.weights import AWQWeight, W4A4Weight
from svdq_pack.tests.random_models import write_model
from svdq_pack.tests.unit.helpers import (
    BLOCKS,
    MODELS,
    REST,
    assert_same_tensors,
    bits,
    join,
    metadata_of,
    relative,
    save,
    save_legacy,
    split,
)

FC1 = "transformer_blocks.0.mlp_fc1"
QKV = "transformer_blocks.0.qkv_proj"


@pytest.fixture
def int4(golden_dir):
    return load_file(golden_dir / f"{MODELS['int4']}.safetensors")


def everything(opened):
    """All a loader reads: {layer: (bytes, description, bias)}, {tensor: value}."""
    opened.require()
    layers = {}
    for layer, tiles, bias in opened.layers(opened.shape.comfy_places()):
        layers[layer] = tiles.stored, tiles.description(), bias
    return layers, dict(opened.plain(opened.shape.comfy_plain()))


def comfy_layers(opened):
    return opened.layers(opened.shape.comfy_places())


def assert_same_model(got, want):
    (layers, plain), (wanted, plain_wanted) = everything(got), everything(want)
    assert_same_tensors(plain, plain_wanted)
    assert layers.keys() == wanted.keys()
    for layer, (weight, description, bias) in wanted.items():
        assert layers[layer][1] == description, layer
        assert torch.equal(layers[layer][0], weight) and torch.equal(layers[layer][2], bias), layer


# The golden models

def test_facts(model, precision):
    opened = Checkpoint(model)
    facts = report.describe(model)
    assert (opened.problems, opened.notices, opened.precision) == ([], [], precision)
    assert opened.ranks == {16: 12}
    expected = {"int4": dict(hidden_size=256, guidance=False, model_class="FluxSchnell", tensors=118),
                "nvfp4": dict(hidden_size=128, guidance=True, model_class="Flux", tensors=134)}[precision]
    assert expected.items() <= facts.items()
    assert (facts["double_blocks"], facts["single_blocks"], facts["latent_channels"]) == (1, 1, 16)
    assert facts["tensor_bytes"] == sum(tensor.nbytes for tensor in load_file(model).values())
    assert json.loads(json.dumps(facts)) == facts
    text = report.as_text(facts)
    assert precision in text and "16 (12 layers)" in text and "problems        none" in text


def test_write_inverts_read(model, precision):
    """Every tensor of every quantised layer, byte for byte."""
    stored, opened = load_file(model), Checkpoint(model)
    written = {}
    for slot in opened.slots:
        weight, bias = read_slot(slot, precision, stored)
        written |= slot_tensors(slot, weight, bias)
    plain = {tensor.name for tensor in opened.shape.plain()}
    assert_same_tensors(written, {name: tensor for name, tensor in stored.items() if name not in plain})


def test_logical_codes(model, precision, golden_dir):
    fixture = metadata_of(golden_dir / f"{MODELS[precision]}.io.safetensors")["fixture"]
    want = json.loads(fixture)["logical_codes_sha256"]
    opened, stored, got = Checkpoint(model), load_file(model), {}
    for slot in opened.slots:
        weight = read_slot(slot, precision, stored)[0]
        if slot.kind == "awq":
            codes = layout.unpack_awq(weight.qweight)
        else:
            codes = layout.unpack_codes(weight.qweight)
            codes = layout.signed(codes) if precision == "int4" else codes
        got[slot.module] = hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()
    assert got == want


@pytest.mark.parametrize("rows", [1, 5, 5.5])
def test_modulation_in_pieces(rows, model, precision, monkeypatch):
    """As many rows of codes at a time as fit, the last piece shorter: the same bits."""
    stored = load_file(model)
    for slot in (slot for slot in Checkpoint(model).slots if slot.kind == "awq"):
        whole, _ = read_slot(slot, precision, stored)
        monkeypatch.setattr(format, "PIECE", int(rows * slot.chunks * whole.qweight[0].nbytes) + 1)
        parts, _ = read_slot(slot, precision, stored)
        assert len(whole.qweight) // slot.chunks % int(rows) or rows == 1
        assert_same_tensors(parts.tensors(), whole.tensors())
        monkeypatch.undo()


def test_minus_eight_is_kept(int4):
    """The format's range is -8..7; a reader that assumes +-7 would clip."""
    codes = layout.signed(layout.unpack_codes(torch.full((128, 64), -0x78, dtype=torch.int8)))      # 0x88
    assert (codes == -8).all()
    tensors = dict(int4) | {f"{FC1}.qweight": torch.full_like(int4[f"{FC1}.qweight"], -0x78)}
    slot = Slot(FC1, 1024, 256)
    weight, _ = read_slot(slot, "int4", tensors)
    dense, _ = weights.dequantize(weight)
    scales = layout.unpack_scales(weight.wscales).float().repeat_interleave(64, 1)
    torch.testing.assert_close(dense, -8 * scales / layout.unpack_vector(weight.smooth).float() + low_rank(weight))


def test_probes(model, precision, golden):
    """W_eff x + b_eff of every layer against the independent float64 model."""
    io, stored, opened = golden(f"{MODELS[precision]}.io"), load_file(model), Checkpoint(model)
    for slot in opened.slots:
        weight, bias = read_slot(slot, precision, stored)
        dense, extra = weights.dequantize(weight)
        y = dense @ io[f"probe.{slot.module}.x"].float() + extra + bias
        assert relative(y, io[f"probe.{slot.module}.y"]) <= 1e-5, slot.module


def test_layers_are_the_comfyui_layers(model):
    opened = Checkpoint(model)
    h = opened.shape.hidden
    layers = {layer: ([(tile.row, tile.col, *tile.weight.shape) for tile in tiles], bias)
              for layer, tiles, bias in comfy_layers(opened)}
    assert len(layers) == 10 + 3
    assert layers["double_blocks.0.txt_attn.qkv"][0] == [(0, 0, 3 * h, h)]
    assert layers["single_blocks.0.linear1"][0] == [(0, 0, 3 * h, h), (3 * h, 0, 4 * h, h)]
    assert layers["single_blocks.0.linear2"][0] == [(0, 0, h, h), (0, h, h, 4 * h)]


def test_linear2_has_the_bias_of_both_parts(int4, tmp_path):
    """Official files keep out_proj's at zero, but nothing says others must."""
    parts = [f"single_transformer_blocks.0.{name}.bias" for name in ("out_proj", "mlp_fc2")]
    int4 |= {part: torch.randn(256).bfloat16() for part in parts}
    opened = Checkpoint(save(tmp_path / "m.safetensors", int4))
    bias = next(bias for layer, _, bias in comfy_layers(opened) if layer == "single_blocks.0.linear2")
    both = sum(layout.unpack_vector(int4[part]).float() for part in parts)
    torch.testing.assert_close(bias, both, rtol=0, atol=1e-6)


def test_only_int4_fc2_is_unsigned(model, precision):
    unsigned = {slot.module.rpartition(".")[2] for slot in Checkpoint(model).slots if slot.kind == "w4a4"
                and read_slot(slot, precision, load_file(model))[0].unsigned}
    assert unsigned == ({"mlp_fc2", "mlp_context_fc2"} if precision == "int4" else set())


def test_plain_tensors(model):
    stored, (_, plain) = load_file(model), everything(Checkpoint(model))
    h = stored["x_embedder.weight"].shape[0]
    assert torch.equal(plain["img_in.weight"], stored["x_embedder.weight"])
    assert torch.equal(plain["double_blocks.0.txt_attn.norm.key_norm.scale"],
                       stored["transformer_blocks.0.norm_added_k.weight"])
    for part in ("weight", "bias"):                         # scale, shift -> shift, scale
        ours, theirs = plain[f"final_layer.adaLN_modulation.1.{part}"], stored[f"norm_out.linear.{part}"]
        assert torch.equal(ours[:h], theirs[h:]) and torch.equal(ours[h:], theirs[:h])


def test_interleave_is_inverse():
    slot = Slot("", 12, 64, kind="awq", chunks=6)
    assert torch.equal(torch.arange(12)[deinterleave(slot)][interleave(slot)], torch.arange(12))
    assert deinterleave(slot).tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]    # logical c*2 + i, stored i*6 + c


# The bytes a host carries

def test_pack_and_view(model):
    for layer, tiles, _ in comfy_layers(Checkpoint(model)):
        packed = pack_tiles(tiles)
        weight, entries = packed.stored, json.loads(packed.description())
        seen = view_layer(weight, entries)
        assert torch.equal(weight, tiles.stored) and entries == json.loads(tiles.description())
        assert len(seen) == len(tiles)
        for tile, other in zip(tiles, seen):
            assert (tile.row, tile.col, type(tile.weight)) == (other.row, other.col, type(other.weight))
            for field, value in vars(tile.weight).items():
                got = getattr(other.weight, field)
                if isinstance(value, torch.Tensor):
                    assert got.dtype == value.dtype and got.shape == value.shape and torch.equal(bits(got), bits(value))
                    assert got.untyped_storage().data_ptr() == weight.data_ptr(), f"{layer} {field} is a copy"
                else:
                    assert got == value, field
        starts = [part["at"] for entry in entries["tiles"] for part in entry.values() if isinstance(part, dict)]
        assert len(set(starts)) == len(starts) and all(start % 256 == 0 for start in starts)
        assert weight.nbytes < sum(value.nbytes for tile in tiles for value in vars(tile.weight).values()
                                   if isinstance(value, torch.Tensor)) + 256 * len(starts)


def test_pack_odd_sizes_and_missing_parts():
    small = AWQWeight(torch.arange(96, dtype=torch.int32).view(3, 32), torch.ones(1, 12).bfloat16(),
                      torch.zeros(1, 12).half())
    weight = W4A4Weight("int4", True, torch.zeros(128, 32, dtype=torch.int8), torch.ones(1, 128, dtype=torch.float16),
                        torch.ones(64, dtype=torch.float16), wtscale=0.5)
    tiles = pack_tiles([Tile(0, 0, small), Tile(3, 5, weight)])
    packed, text = tiles.stored, tiles.description()
    assert int(packed[384:512].sum()) == int(packed[536:768].sum()) == 0            # what no tensor covers
    starts = [part["at"] for entry in json.loads(text)["tiles"] for part in entry.values() if isinstance(part, dict)]
    assert starts == [0, 512, 768, 1024, 5120, 5376] and len(packed) == 5376 + 128
    first, tile = view_layer(packed, json.loads(text))
    assert torch.equal(first.weight.qweight, small.qweight) and torch.equal(first.weight.wzeros, small.wzeros)
    assert (tile.row, tile.col, tile.weight.proj_down, tile.weight.wtscale) == (3, 5, None, 0.5)
    assert tile.weight.wscales.dtype == torch.float16 and tile.weight.unsigned


# Metadata: the tensors decide

@pytest.mark.parametrize("edit, words", [
    (lambda m: {}, None),
    (lambda m: {"format": "pt"}, None),
    (lambda m: {"config": m["config"]}, None),
    (lambda m: m | {"comfy_config": "not JSON", "config": "[", "model_class": ""}, None),
    (lambda m: m | {"quantization_config": '{"weight": {"dtype": "int8", "group_size": 64}}'}, "int8 in groups of 64"),
    (lambda m: m | {"quantization_config": '{"weight": {"dtype": "int4", "group_size": 32}}'}, "groups of 32"),
    (lambda m: m | {"quantization_config": '{"weight": {"scale_dtype": "ue8m0"}}'}, "not readable"),
    (lambda m: m | {"quantization_config": "int4"}, "not readable"),
    (lambda m: m | {"quantization_config": "[1, 2]"}, "not readable"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_metadata(model, tmp_path, edit, words):
    path = save(tmp_path / "m.safetensors", load_file(model), edit(metadata_of(model)))
    opened = Checkpoint(path)
    assert_same_model(opened, Checkpoint(model))
    if words is None:
        assert opened.notices == []
    else:
        notice, = opened.notices
        assert words in notice and "the tensors decide" in notice


# Other names, other containers

V2 = [(r"(_blocks\.\d+)\.qkv_proj_context\.", r"\1.attn.add_qkv_proj."),
      (r"(_blocks\.\d+)\.qkv_proj\.", r"\1.attn.to_qkv."),
      (r"^(transformer_blocks\.\d+)\.out_proj\.", r"\1.attn.to_out.0."),
      (r"^(single_transformer_blocks\.\d+)\.out_proj\.", r"\1.attn.to_out."),
      (r"\.out_proj_context\.", ".attn.to_add_out."),
      (r"^(transformer_blocks\.\d+)\.mlp_fc1\.", r"\1.ff.net.0.proj."),
      (r"^(transformer_blocks\.\d+)\.mlp_fc2\.", r"\1.ff.net.2."),
      (r"\.mlp_context_fc1\.", ".ff_context.net.0.proj."), (r"\.mlp_context_fc2\.", ".ff_context.net.2."),
      (r"(_blocks\.\d+)\.norm_", r"\1.attn.norm_"), (r"\.lora_down$", ".proj_down"), (r"\.lora_up$", ".proj_up"),
      (r"\.smooth$", ".smooth_factor"), (r"\.smooth_orig$", ".smooth_factor_orig")]


def v2_name(name):
    for pattern, new in V2:
        name = re.sub(pattern, new, name)
    return name


def test_v2_names(model, tmp_path):
    stored = load_file(model)
    renamed = {v2_name(name): tensor for name, tensor in stored.items()}
    assert len(renamed) == len(stored)
    assert {"transformer_blocks.0.attn.to_out.0.proj_down", "single_transformer_blocks.0.attn.to_out.smooth_factor",
            "transformer_blocks.0.ff_context.net.2.qweight",
            "single_transformer_blocks.0.attn.norm_q.weight"} <= set(renamed)
    opened = Checkpoint(save(tmp_path / "v2.safetensors", renamed, metadata_of(model)))
    assert opened.notices == [] and set(opened.tensors) == set(stored)
    assert_same_model(opened, Checkpoint(model))


def test_legacy_folder(model, tmp_path):
    folder = save_legacy(tmp_path / "svdq-int4-flux", load_file(model), metadata_of(model))
    for picked in (folder, folder / BLOCKS, folder / REST, str(folder)):
        opened = Checkpoint(picked)
        assert opened.notices == [] and len(opened.files) == 2
        assert_same_model(opened, Checkpoint(model))
    assert report.describe(folder)["container"] == "legacy folder"


def test_legacy_folder_without_json(model, tmp_path):
    folder = save_legacy(tmp_path / "flux", load_file(model), metadata_of(model))
    for path in folder.glob("*.json"):
        path.unlink()
    assert Checkpoint(folder).metadata == {}
    assert_same_model(Checkpoint(folder), Checkpoint(model))


def test_legacy_block_file_wins(model, tmp_path):
    stored = load_file(model)
    folder = save_legacy(tmp_path / "flux", stored, metadata_of(model))
    rest = load_file(folder / REST) | {f"{QKV}.bias": torch.full_like(stored[f"{QKV}.bias"], 7)}
    save(folder / REST, rest)
    opened = Checkpoint(folder)
    assert "there twice" in opened.notices[0] and f"{QKV}.bias" in opened.notices[0]
    assert_same_model(opened, Checkpoint(model))


def test_merge(model, precision, tmp_path):
    stored, metadata = load_file(model), metadata_of(model)
    folder = save_legacy(tmp_path / "flux", stored, metadata)
    out = tmp_path / "merged.safetensors"
    merged = checkpoint.merge(folder, out)
    assert_same_tensors(load_file(out), stored)
    assert merged.notices == [] and set(merged.metadata) == set(metadata)
    for key in ("config", "comfy_config", "model_class"):
        assert merged.metadata[key] == metadata[key]
    assert json.loads(merged.metadata["quantization_config"]) == json.loads(metadata["quantization_config"])


def test_merge_makes_missing_metadata(model, tmp_path):
    """Without the folder's JSON files the configs come from the tensors, and agree with the published ones."""
    want = metadata_of(model)
    folder = save_legacy(tmp_path / "flux", load_file(model), want)
    for path in folder.glob("*.json"):
        path.unlink()
    made = checkpoint.merge(folder, tmp_path / "merged.safetensors").metadata
    assert json.loads(made["comfy_config"]) == json.loads(want["comfy_config"])
    ours, theirs = json.loads(made["config"]), json.loads(want["config"])
    assert {key: ours[key] for key in theirs if key != "_diffusers_version"} == \
        {key: value for key, value in theirs.items() if key != "_diffusers_version"}


def test_merge_of_a_file_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="already a single file"):
        checkpoint.merge(model, tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_shapes_and_reports_of_any_size(int4, tmp_path):
    """A message shows the beginning of a shape, a report the first keys and problems."""
    many = {f"{FC1}.smooth": torch.zeros((1,) * 60), "x_embedder.weight": torch.zeros((1,) * 60)}
    opened = Checkpoint(save(tmp_path / "a.safetensors", int4 | {f"{FC1}.smooth": many[f"{FC1}.smooth"]}))
    assert [len(problem) < 250 and "[1, 1, 1, " in problem for problem in opened.problems] == [True]
    opened = Checkpoint(save(tmp_path / "b.safetensors", int4 | {"x_embedder.weight": many["x_embedder.weight"]}))
    assert [len(problem) < 250 and "needs two axes" in problem for problem in opened.problems] == [True]

    few = {name: tensor for name, tensor in int4.items() if not name.endswith((".smooth", ".wscales"))}
    facts = report.describe(save(tmp_path / "c.safetensors", few, {f"key {i:05}": "" for i in range(10_000)}))
    text = report.as_text(facts)
    assert len(facts["problems"]) == 27 and text.count("PROBLEM") == 21
    assert text.splitlines()[21] == "  PROBLEM         and 7 more"             # right after the file's name
    assert text.endswith("key 00019, and 9,980 more") and len(text) < 10_000 and len(facts["metadata_keys"]) == 10_000


# What may differ from layer to layer

def with_rank(tensors, module, rank):
    """The low-rank factors of one layer cut or zero-padded to another rank: the same layer if it grows."""
    down, up = (tensors[f"{module}.{name}"] for name in ("lora_down", "lora_up"))
    down, up = layout.unpack_down(down)[:, :rank], layout.unpack_up(up)[:, :rank]
    down, up = layout.pad(down, 16, 16), layout.pad(up, 16, 16)
    grown = max(-(-rank // 16) * 16 - down.shape[1], 0)
    down, up = (torch.cat([half, half.new_zeros(len(half), grown)], 1) for half in (down, up))
    return tensors | {f"{module}.lora_down": layout.pack_down(down), f"{module}.lora_up": layout.pack_up(up)}


def low_rank(weight):
    return layout.unpack_up(weight.proj_up).float() @ layout.unpack_down(weight.proj_down).float().t()


def layer_of(path, layer):
    tiles, bias = next((tiles, bias) for name, tiles, bias in comfy_layers(Checkpoint(path).require()) if name == layer)
    dense, extra = weights.dequantize(tiles[0].weight)
    return tiles[0].weight, dense, bias + extra


@pytest.mark.parametrize("rank, stored", [(20, 32), (5, 16), (16, 16), (128, 128)])
def test_rank_per_layer_and_padded(int4, tmp_path, rank, stored):
    path = save(tmp_path / "m.safetensors", with_rank(int4, FC1, rank))
    opened = Checkpoint(path)
    assert opened.ranks == ({16: 12} if stored == 16 else {16: 11, stored: 1})
    weight, dense, _ = layer_of(path, "double_blocks.0.img_mlp.0")
    assert weight.proj_down.shape == (256, stored)
    if rank >= 16:
        _, before, _ = layer_of(save(tmp_path / "old.safetensors", int4), "double_blocks.0.img_mlp.0")
        torch.testing.assert_close(dense, before)


@pytest.mark.parametrize("how", ["absent", "rank 0"])
def test_no_branch(int4, tmp_path, how):
    tensors = {name: tensor for name, tensor in int4.items() if not name.startswith(f"{FC1}.lora_")}
    if how == "rank 0":
        tensors |= {f"{FC1}.lora_down": torch.zeros(256, 0, dtype=torch.bfloat16),
                    f"{FC1}.lora_up": torch.zeros(1024, 0, dtype=torch.bfloat16)}
    path = save(tmp_path / "m.safetensors", tensors)
    assert Checkpoint(path).ranks == {16: 11, 0: 1}
    weight, dense, _ = layer_of(path, "double_blocks.0.img_mlp.0")
    assert weight.proj_down is None and weight.proj_up is None
    before, whole, _ = layer_of(save(tmp_path / "old.safetensors", int4), "double_blocks.0.img_mlp.0")
    torch.testing.assert_close(dense, whole - low_rank(before))


def without(tensors, *suffixes):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(suffixes)}


def test_missing_bias_is_zero(int4, tmp_path):
    drop = [name for name in int4 if name.endswith(".bias") and f"{name[:-5]}.qweight" in int4]
    opened = Checkpoint(save(tmp_path / "m.safetensors", without(int4, *drop)))
    assert opened.notices == []
    for layer, _, bias in comfy_layers(opened.require()):
        h = 256
        chunks = bias.view(-1, h)
        if layer.endswith(("_mod.lin", "modulation.lin")):          # a file without bias has no 1 folded into it either
            assert (chunks[1::3] == -1).all() and (chunks[0::3] == 0).all() and (chunks[2::3] == 0).all()
        else:
            assert not bias.any(), layer


def test_missing_tensor_scale_is_one(golden_dir, tmp_path):
    stored = load_file(golden_dir / f"{MODELS['nvfp4']}.safetensors")
    ones = {name: torch.ones_like(tensor) if name.endswith((".wtscale", ".wcscales")) else tensor
            for name, tensor in stored.items()}
    opened = Checkpoint(save(tmp_path / "m.safetensors", without(stored, ".wtscale", ".wcscales")))
    assert opened.precision == "nvfp4" and opened.notices == []
    got = {layer: [weights.dequantize(tile.weight)[0] for tile in tiles] for layer, tiles, _ in comfy_layers(opened.require())}
    for layer, tiles, _ in comfy_layers(Checkpoint(save(tmp_path / "ones.safetensors", ones))):
        for tile, dense in zip(tiles, got[layer]):
            assert torch.equal(weights.dequantize(tile.weight)[0], dense), layer


def test_missing_smooth_orig(model, tmp_path):
    opened = Checkpoint(save(tmp_path / "m.safetensors", without(load_file(model), ".smooth_orig"), metadata_of(model)))
    assert opened.notices == []
    assert_same_model(opened, Checkpoint(model))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_tensor_scale_in_other_dtypes(golden_dir, tmp_path, kind):
    stored = load_file(golden_dir / f"{MODELS['nvfp4']}.safetensors")
    other = {name: tensor.to(kind) if name.endswith(".wtscale") else tensor for name, tensor in stored.items()}
    weight, _, _ = layer_of(save(tmp_path / "m.safetensors", other), "double_blocks.0.img_mlp.0")
    assert weight.wtscale == pytest.approx(stored[f"{FC1}.wtscale"].item(), rel=1e-3)


def test_float16_model(model, tmp_path, precision):
    """Files for Turing cards: every 16-bit tensor is fp16. Same weights to fp16's precision."""
    half = {name: tensor.half() if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in load_file(model).items()}
    opened = Checkpoint(save(tmp_path / "m.safetensors", half, metadata_of(model)))
    assert opened.notices == []
    want = {layer: (tiles, bias) for layer, tiles, bias in comfy_layers(Checkpoint(model))}
    for layer, tiles, bias in comfy_layers(opened.require()):
        for got, tile in zip(tiles, want[layer][0]):
            assert relative(weights.dequantize(got.weight)[0], weights.dequantize(tile.weight)[0]) < 1e-3, layer
        torch.testing.assert_close(bias, want[layer][1], rtol=1e-3, atol=1e-3)
    for slot in opened.slots:
        weight, bias = read_slot(slot, precision, half)
        written = slot_tensors(slot, weight, bias, torch.float16)
        assert_same_tensors(written, {name: half[name] for name in written})


def test_awq_rows_padded_to_16(model, tmp_path):
    """The original quantiser's own form (5.7). The padding is garbage here, and must not be read as groups."""
    stored = load_file(model)
    padded = {name: torch.cat([tensor, tensor.new_full((16 - len(tensor), tensor.shape[1]), 9)])
              for name, tensor in stored.items() if ".norm" in name and name.endswith((".wscales", ".wzeros"))}
    assert len(padded) == 3 * 2
    assert_same_model(Checkpoint(save(tmp_path / "m.safetensors", stored | padded)), Checkpoint(model))


def test_golden_awq_layer(golden):
    """The single golden layer as the quantiser emits it: 16 scale rows, interleaved, +1 folded."""
    tensors = golden("awq_adanorm_zero")
    slot = Slot("packed", 6 * 64, tensors["packed.qweight"].shape[1] * 2, kind="awq", chunks=6)
    weight, bias = read_slot(slot, "int4", tensors)
    y = tensors["io.x"].float() @ weights.dequantize(weight)[0].t() + bias
    assert relative(y, tensors["io.y_logical_order_without_plus_one"]) < 1e-5
    assert isinstance(weight, AWQWeight) and len(weight.wscales) == slot.k // 64


def test_unknown_tensors_are_a_notice(model, tmp_path):
    extra = {f"something.{i}": torch.zeros(3) for i in range(5)}
    opened = Checkpoint(save(tmp_path / "m.safetensors", load_file(model) | extra))
    notice, = opened.notices
    assert "5 tensors" in notice and "something.0" in notice and "ignored" in notice and "something.4" not in notice
    assert_same_model(opened, Checkpoint(model))


def test_two_names_of_one_tensor_are_a_notice(int4, tmp_path):
    opened = Checkpoint(save(tmp_path / "m.safetensors", int4 | {f"{FC1}.proj_down": int4[f"{FC1}.lora_down"]}))
    notice, = opened.notices
    assert "there twice" in notice and f"{FC1}.lora_down" in notice
    everything(opened)


def test_file_replaced_after_opening(int4, tmp_path):
    path = save(tmp_path / "m.safetensors", int4)
    opened = Checkpoint(path).require()
    save(path, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="m.safetensors"):
        list(comfy_layers(opened))
    path.unlink()
    with pytest.raises(CheckpointError, match="m.safetensors"):
        list(opened.plain(opened.shape.comfy_plain()))


# Random models of other shapes, and FLUX.1 itself

@pytest.mark.parametrize("precision, rank, in_features, guidance", [
    ("int4", 32, 128, True), ("nvfp4", 0, 384, False), ("nvfp4", 48, 64, True)])
def test_written_models(tmp_path, precision, rank, in_features, guidance):
    shape = flux1.Shape(hidden=128, depth=2, depth_single=1, in_features=in_features, context_dim=32, vec_dim=16,
                        guidance=guidance)
    write_model(tmp_path / "m.safetensors", torch.Generator().manual_seed(1), shape, rank, precision)
    opened = Checkpoint(tmp_path / "m.safetensors")
    assert (opened.shape, opened.precision, opened.ranks) == (shape, precision, {rank: 20})
    assert bool(opened.notices) == (not rank) and all("20 4-bit layers have no low-rank" in one for one in opened.notices)
    layers, plain = everything(opened)
    assert len(layers) == 2 * 10 + 3 and len(plain) == (20 if guidance else 16) + 2 * 4 + 2


PUBLISHED = {  # checkpoint-format 3: in_features, guidance, then tensors and bytes for int4 and nvfp4, rank 32
    "dev, Krea or Kontext": (64, True, (2604, 6_767_999_104), (2908, 7_038_360_136)),
    "schnell": (64, False, (2600, 6_747_539_584), (2904, 7_017_900_616)),
    "Canny or Depth": (128, True, (2604, 6_768_392_320), (2908, 7_038_753_352)),
    "Fill": (384, True, (2604, 6_769_965_184), (2908, 7_040_326_216)),
}


def inventory(shape, precision, rank):
    """{name: (dtype, shape)} of a published file, from the tables of checkpoint-format 3 alone."""
    h, group = shape.hidden, 64 if precision == "int4" else 16
    tensors = {}

    def w4a4(name, n, k):
        tensors[f"{name}.qweight"] = "I8", (n, k // 2)
        tensors[f"{name}.wscales"] = "BF16" if precision == "int4" else "F8_E4M3", (k // group, n)
        for suffix, size in (("bias", (n,)), ("smooth", (k,)), ("smooth_orig", (k,)), ("lora_down", (k, rank)),
                             ("lora_up", (n, rank))):
            tensors[f"{name}.{suffix}"] = "BF16", size
        if precision == "nvfp4":
            fused = "qkv" in name
            tensors[f"{name}.{'wcscales' if fused else 'wtscale'}"] = "BF16", (n,) if fused else (1,)

    def awq(name, n):
        tensors[f"{name}.qweight"] = "I32", (n // 4, h // 2)
        tensors[f"{name}.wscales"] = tensors[f"{name}.wzeros"] = "BF16", (h // 64, n)
        tensors[f"{name}.bias"] = "BF16", (n,)

    def plain(name, rows, columns):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = ("BF16", (rows, columns)), ("BF16", (rows,))

    for i in range(shape.depth):
        at = f"transformer_blocks.{i}."
        for c in ("", "_context"):
            awq(f"{at}norm1{c}.linear", 6 * h)
            w4a4(f"{at}qkv_proj{c}", 3 * h, h)
            w4a4(f"{at}out_proj{c}", h, h)
            w4a4(f"{at}mlp{c}_fc1", 4 * h, h)
            w4a4(f"{at}mlp{c}_fc2", h, 4 * h)
        tensors |= {f"{at}norm_{name}.weight": ("BF16", (128,)) for name in ("q", "k", "added_q", "added_k")}
    for i in range(shape.depth_single):
        at = f"single_transformer_blocks.{i}."
        awq(f"{at}norm.linear", 3 * h)
        for name, n, k in (("qkv_proj", 3 * h, h), ("out_proj", h, h), ("mlp_fc1", 4 * h, h), ("mlp_fc2", h, 4 * h)):
            w4a4(at + name, n, k)
        tensors |= {f"{at}norm_{name}.weight": ("BF16", (128,)) for name in "qk"}
    plain("x_embedder", h, shape.in_features)
    plain("context_embedder", h, shape.context_dim)
    embedders = {"timestep": 256, "text": shape.vec_dim} | ({"guidance": 256} if shape.guidance else {})
    for embedder, size in embedders.items():
        plain(f"time_text_embed.{embedder}_embedder.linear_1", h, size)
        plain(f"time_text_embed.{embedder}_embedder.linear_2", h, h)
    plain("norm_out.linear", 2 * h, h)
    plain("proj_out", 64, h)
    return tensors


@pytest.mark.parametrize("precision", MODELS)
@pytest.mark.parametrize("variant", PUBLISHED)
def test_flux1_sized_file(tmp_path, variant, precision):
    """A real header over a sparse 6.8 GB file: every published variant opens, and has the published number of bytes."""
    in_features, guidance, *counts = PUBLISHED[variant]
    shape = flux1.Shape(hidden=3072, depth=19, depth_single=38, in_features=in_features, context_dim=4096, vec_dim=768,
                        guidance=guidance)
    tensors, header, end = inventory(shape, precision, 32), {}, 0
    for name, (dtype, size) in tensors.items():
        start, end = end, end + TensorInfo(dtype, size).nbytes
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [start, end]}
    path = tmp_path / "flux.safetensors"
    path.write_bytes(raw := join(header, b""))
    with path.open("r+b") as file:
        file.truncate(len(raw) + end)
    opened = Checkpoint(path).require()
    assert (len(opened.tensors), opened.nbytes) == counts[precision == "nvfp4"]
    assert (opened.shape, opened.precision, opened.ranks, opened.notices) == (shape, precision, {32: 304}, [])
    assert opened.shape.variant == f"FLUX.1 {variant}"
    assert path.stat().st_blocks * 512 < 8 << 20
    with path.open("r+b") as file:
        file.truncate(len(raw) + end - 1)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Checkpoint(path)


def test_dtypes_have_the_sizes_the_format_says():
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
        "U8": 1, "BOOL": 1}


def test_split_join(model):
    raw = model.read_bytes()
    header, data = split(raw)
    assert split(join(header, data)) == (header, data)
