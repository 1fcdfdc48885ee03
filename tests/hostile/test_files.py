"""One hostile file per case: a CheckpointError that names the path and the thing, or a model loaded with a notice."""

import json
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import checkpoint, report
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.container import MAX_HEADER, TensorFile
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families.family import MAX_BLOCKS
from svdq_pack.tests.unit.helpers import BLOCKS, MODELS, REST, join, limit, metadata_of, save, save_legacy, split

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
FC1 = "transformer_blocks.0.mlp_fc1"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def golden_model(golden_dir):
    return {kind: load_file(golden_dir / f"{name}.safetensors") for kind, name in MODELS.items()}


@pytest.fixture
def int4(golden_model):
    return dict(golden_model["int4"])


@pytest.fixture
def nvfp4(golden_model):
    return dict(golden_model["nvfp4"])


@pytest.fixture
def raw(golden_dir):
    """A good file as (header, data), to be spoilt."""
    return split((golden_dir / f"{MODELS['nvfp4']}.safetensors").read_bytes())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "svdq-int4_r32-flux.safetensors"


def read_all(path):
    opened = Checkpoint(path).require()
    for _ in opened.layers(opened.shape.comfy_places()):
        pass
    for _ in opened.plain(opened.shape.comfy_plain()):
        pass
    return opened


def refused(path, *words):
    """Reading must fail with one message that has the path and all `words`, and stays readable."""
    with pytest.raises(CheckpointError) as caught, limit(60):
        read_all(path)
    message = str(caught.value)
    assert str(path) in message
    assert all(word in message for word in words), message
    assert len(message) < len(str(path)) + 600 and message.replace("\n", "").isprintable()


def noticed(path, *words):
    with limit(60):
        opened = read_all(path)
    assert any(all(word in notice for word in words) for notice in opened.notices), opened.notices
    assert all(len(notice) < 500 and notice.isprintable() for notice in opened.notices)


# No safetensors file at all

@pytest.mark.parametrize("content, words", [
    (b"", ["not a complete safetensors file", "0 bytes"]),
    (b"1234567", ["not a complete safetensors file", "7 bytes"]),
    (struct.pack("<Q", 8) + b"{}", ["not a complete safetensors file", "10 bytes", "cut short"]),
    (struct.pack("<Q", 2**63) + b"{}" * 50, ["not a complete safetensors file", "cut short"]),
    (struct.pack("<Q", 2**64 - 1) + b"{}" * 50, ["not a complete safetensors file"]),
    (struct.pack("<Q", 0), ["not a complete safetensors file"]),
    (bytes(10_000), ["not a complete safetensors file"]),
    (join(b"\xff\xfe{}", b""), ["not a complete safetensors file"]),
    (join(b"[]", b""), ["not a complete safetensors file"]),
    (join(b"{}", b""), ["no tensors", "svdq-int4_r32"]),
    (join({}, b"data behind the last tensor"), ["not a complete safetensors file"]),
    (b"GGUF\3\0\0\0" + bytes(100), ["GGUF", "ComfyUI-GGUF"]),
    (pickle.dumps({"a": list(range(1000))}, 2), ["pickle", "safetensors"]),
    (pickle.dumps({"a": list(range(1000))}, 5), ["pickle", "safetensors"]),
    (b"<!DOCTYPE html><html><body>Sign in</body></html>", ["text page"]),
    (b"<html>", ["text page"]),
    (b'{"error":"Repository not found"}', ["text page"]),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6768309832\n", ["git-lfs pointer", "6 to 7 GB"]),
], ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "")
def test_not_safetensors(path, content, words):
    path.write_bytes(content)
    refused(path, *words)


def test_checkpoint_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    refused(path, "pickle")


def test_low_byte_of_a_pickle(path, raw):
    """A cut file whose header length happens to begin like a pickle is still a cut file."""
    header, data = raw
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) - 0x80) % 256)
    path.write_bytes(join(text, data)[:-1])
    assert path.read_bytes()[0] == 0x80
    refused(path, "not a complete safetensors file", "cut short")


@pytest.mark.parametrize("keep", [9, 100, 10_000, 0.5, -1])
def test_truncated(path, raw, keep):
    whole = join(*raw)
    path.write_bytes(whole[:int(len(whole) * keep) if isinstance(keep, float) else keep])
    refused(path, "not a complete safetensors file", "cut short")


def test_appended(path, raw):
    path.write_bytes(join(*raw) + b"\0")
    refused(path, "not a complete safetensors file")


@pytest.mark.parametrize("name, words", [
    ("nowhere.safetensors", ["no such file"]), ("a/b/c", ["no such file"]), ("x" * 5000, ["no such file"]),
    ("a\0b", ["no such file"])])
def test_no_such_path(tmp_path, name, words):
    with pytest.raises(CheckpointError, match="no such file"):
        Checkpoint(tmp_path / name)


def test_a_name_that_is_no_text(path, raw):
    """Other systems write other bytes than UTF-8: the file loads."""
    odd = os.path.join(path.parent, os.fsdecode(b"svdq-\xff.safetensors"))
    path.write_bytes(join(*raw))
    path.rename(odd)
    assert read_all(odd).notices == [] and r"svdq-\udcff.safetensors" in report.as_text(report.describe(odd))


def test_devices_and_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "pipe")
    refused("/dev/zero", "device")


def test_unreadable(path, raw, monkeypatch):
    path.write_bytes(join(*raw))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    refused(path, "cannot be read", "Permission denied")


# A header that lies or never ends

@pytest.mark.parametrize("header, data", [
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 0),
    (b"[" * 1_000_000, 0),
    (b'{"__metadata__":' + b'{"a":' * 10_000, 0),
    ({"__metadata__": {"a": 1}}, 0),
    ({"__metadata__": ["a"]}, 0),
    ({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, 8),
    ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 8),
    ({"a": {"dtype": "bf16", "shape": [8], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "x" * 1_000_000, "shape": [8], "data_offsets": [0, 8]}}, 8),
    ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
      "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}, 12),
    ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
      "b": {"dtype": "U8", "shape": [8], "data_offsets": [10, 18]}}, 18),
], ids=["deep", "deep list", "deep metadata", "metadata of numbers", "metadata list", "10^12 elements", "overflow",
        "2^70", "negative", "backwards", "short", "dtype", "long dtype", "overlap", "hole"])
def test_lying_header(path, header, data):
    path.write_bytes(join(header, bytes(data)))
    refused(path, "not a complete safetensors file")


def test_header_bomb(path):
    """Half a million tensors that take no space. Refused before it is parsed."""
    length = MAX_HEADER + 8
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * length)
    refused(path, f"its header has {length:,} bytes")


@pytest.mark.parametrize("pattern", ["transformer_blocks.{}.", "x{}", "transformer_blocks.0.{}.qweight"])
def test_many_tensors_are_read_in_time(path, raw, pattern):
    header, data = raw
    nothing = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(join(header | {pattern.format(i): nothing for i in range(1, 19_000)}, data))
    if pattern.startswith("transformer_blocks.{"):
        refused(path, "transformer_blocks.*: 19000 blocks", f"more than {MAX_BLOCKS}")
        assert len(json.dumps(report.describe(path))) < 10_000
    else:
        noticed(path, "18999 tensors", "ignored")


def test_too_many_tensors(path, raw):
    header, data = raw
    nothing = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(join(header | {f"x{i}": nothing for i in range(100_000)}, data))
    refused(path, "its header lists ", " tensors or more", "20,000")


ESCAPED = '"%d":{"dtype":"U8","shape":[0],"data_offset\\u0073":[0,0]}'


@pytest.mark.parametrize("entry, count", [(ESCAPED, 25_000), (ESCAPED, 100_000), ('"%d":{}', 500_000)],
                         ids=range(3))
def test_many_of_anything(path, entry, count):
    """Whatever the spelling. What is parsed at all is done in time, and what is left to parse is little."""
    text = ("{" + ",".join(entry % i for i in range(count)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    start = time.process_time()
    refused(path, " tensors or more", "20,000")
    assert time.process_time() - start < 5


def test_texts_with_braces(path, raw):
    """JSON in the metadata, as trainers write it, counts for nothing."""
    header, data = raw
    text = json.dumps({"tags": [{f"tag {i}": [i, "{\\\\", '\\"{']} for i in range(30_000)]})
    path.write_bytes(join(header | {"__metadata__": {"ss_tag_frequency": text}}, data))
    assert TensorFile(path).metadata["ss_tag_frequency"] == text


def test_duplicated_name(path, raw):
    """The library takes the last entry of a name; then the data of the first belongs to nobody."""
    header, data = raw
    twice = json.dumps(header).encode()[:-1] + b',"x_embedder.bias":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path.write_bytes(join(twice, data))
    refused(path, "not a complete safetensors file")


def test_names_that_would_spoil_a_terminal(path, int4):
    save(path, int4 | {"\x1b[2J\x07" + "x" * 1_000_000: torch.zeros(1)})
    noticed(path, "1 tensors", r"\x1b[2J")


# Another model

def header_only(path, names, dtype="BF16", size=2):
    path.write_bytes(join({name: {"dtype": dtype, "shape": [1], "data_offsets": [i * size, (i + 1) * size]}
                           for i, name in enumerate(names)}, bytes(size * len(names))))


BFL = ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"]
PREFIXED = [f"model.diffusion_model.{name}" for name in BFL]
DIFFUSERS = ["x_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight",
             "transformer_blocks.0.attn.to_out.0.weight", "single_transformer_blocks.0.attn.to_q.weight"]


@pytest.mark.parametrize("names, dtype, words", [
    (BFL, "BF16", ["16-bit FLUX", "Load Diffusion Model", "UNETLoader"]),
    (BFL, "F16", ["16-bit FLUX", "UNETLoader"]),
    (BFL, "F8_E4M3", ["fp8 FLUX", "UNETLoader"]),
    (BFL, "F8_E5M2", ["fp8 FLUX", "UNETLoader"]),
    (BFL, "F32", ["FLUX model that is not SVDQ", "UNETLoader"]),
    (DIFFUSERS, "BF16", ["16-bit FLUX", "UNETLoader"]),
    ([*PREFIXED, "first_stage_model.decoder.conv_in.weight"], "F8_E4M3", ["all-in-one", "CheckpointLoaderSimple"]),
    ([*PREFIXED, "vae.decoder.conv_in.weight"], "BF16", ["all-in-one", "CheckpointLoaderSimple"]),
    (PREFIXED, "BF16", ["UNETLoader"]),
    (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "BF16",
     ["LoRA", "LoraLoaderModelOnly", "models/loras"]),
    (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "BF16", ["LoRA", "LoraLoaderModelOnly"]),
    (["transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"], "BF16", ["LoRA"]),
    (["double_blocks.0.img_attn.qkv.lora_up.weight"], "BF16", ["LoRA"]),
    (["controlnet_blocks.0.weight", *DIFFUSERS], "BF16", ["a ControlNet", "ControlNetLoader"]),
    (["transformer_blocks.0.attn.to_qkv.qweight", "transformer_blocks.0.img_mlp.net.2.qweight"], "I8", ["Qwen-Image"]),
    (["layers.0.attention.to_qkv.qweight", "layers.0.feed_forward.net.2.qweight"], "I8", ["Z-Image"]),
    (["transformer_blocks.0.ff.inverted_conv.qweight"], "I8", ["Sana"]),
    (["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.qweight"], "I8", ["SDXL"]),
    (["encoder.block.0.layer.0.SelfAttention.q.qweight"], "I16", ["T5 text encoder", "SVDQ Text Encoder Loader"]),
    (["model.layers.0.self_attn.q_proj.qweight"], "I32", ["4-bit", "does not know"]),
    (["encoder.block.0.layer.0.SelfAttention.q.weight"], "F16", ["T5", "DualCLIPLoader"]),
    (["text_model.encoder.layers.0.self_attn.k_proj.weight"], "F16", ["CLIP", "DualCLIPLoader"]),
    (["decoder.conv_in.weight", "encoder.conv_in.weight"], "F32", ["VAE", "VAELoader"]),
    (["blocks.0.self_attn.q.weight"], "BF16", ["not SVDQ FLUX", "UNETLoader"]),
    (["a.weight"], "F32", ["it holds a.weight", "svdq-int4_r32", "svdq-fp4_r32"]),
    ([f"{i}" * 500_000 for i in range(5)], "F32", ["not an SVDQ FLUX model"]),
    (["transformer_blocks.0.qkv_proj.qweight"], "I8", ["4-bit"]),
    (["single_transformer_blocks.0.mlp_fc1.qweight"], "I8", ["4-bit"]),
])
def test_other_models(path, names, dtype, words):
    header_only(path, names, dtype, {"F32": 4, "I32": 4, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}.get(dtype, 2))
    refused(path, *words)


# Folders

def test_folder_without_its_second_file(tmp_path, int4, golden_dir):
    folder = save_legacy(tmp_path / "legacy", int4, metadata_of(golden_dir / f"{MODELS['int4']}.safetensors"))
    (folder / REST).rename(folder / "elsewhere")
    refused(folder, REST, "missing", "download the other file too")
    with pytest.raises(CheckpointError, match=f"legacy: .*{REST} missing"):
        Checkpoint(folder / BLOCKS)
    (folder / "elsewhere").rename(folder / REST)
    (folder / BLOCKS).unlink()
    refused(folder, BLOCKS, "missing")


def test_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, BLOCKS, REST, "missing")
    (tmp_path / BLOCKS).mkdir()
    (tmp_path / REST).mkdir()
    refused(tmp_path, "missing")
    with pytest.raises(CheckpointError, match="folder"):
        Checkpoint(tmp_path / BLOCKS)


def test_folder_with_a_damaged_half(tmp_path, int4, golden_dir):
    folder = save_legacy(tmp_path / "legacy", int4, metadata_of(golden_dir / f"{MODELS['int4']}.safetensors"))
    whole = (folder / REST).read_bytes()
    (folder / REST).write_bytes(whole[:-1])
    refused(folder / REST, "not a complete safetensors file")
    (folder / REST).write_bytes(whole)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    (folder / "comfy_config.json").write_text("[" * 100_000)
    noticed(folder, "config.json: cannot be read", "the model is read without it")
    (folder / "config.json").write_text(" " * 20_000_000)
    noticed(folder, "config.json: has more than 1,048,576 bytes")
    merged = checkpoint.merge(folder, tmp_path / "merged.safetensors")
    assert json.loads(merged.metadata["config"])["_class_name"] == "FluxTransformer2DModel"
    read_all(tmp_path / "merged.safetensors")


@needs_pipes
def test_folder_with_a_pipe(tmp_path, int4, golden_dir):
    folder = save_legacy(tmp_path / "legacy", int4, metadata_of(golden_dir / f"{MODELS['int4']}.safetensors"))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    noticed(folder, "config.json: this is a device or a pipe")


def test_folder_of_two_models(tmp_path, int4, nvfp4):
    folder = save_legacy(tmp_path / "legacy", int4, {"config": "{}", "comfy_config": "{}"})
    other = save_legacy(tmp_path / "other", nvfp4, {"config": "{}", "comfy_config": "{}"})
    (folder / REST).write_bytes((other / REST).read_bytes())
    refused(folder, "transformer_blocks.0.norm1.linear.qweight", "[192, 64]")


# Tensors that are missing, misshapen, or of another kind

def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=BF16):
    return lambda tensors: tensors.update({name: torch.zeros(shape).to(dtype)})


def change(name, how):
    return lambda tensors: tensors.update({name: how(tensors[name])})


def rank_20(tensors):
    put(f"{FC1}.lora_down", 256, 20)(tensors)
    put(f"{FC1}.lora_up", 1024, 20)(tensors)


def mxfp4(tensors):
    for name in tensors:
        if name.endswith(".wscales") and ".norm" not in name:
            rows, columns = tensors[name].shape
            tensors[name] = torch.zeros(2 * rows, columns, dtype=torch.uint8)


MOD = "single_transformer_blocks.0.norm.linear"
VEC = "time_text_embed.text_embedder.linear_1.weight"
GUIDANCE = "time_text_embed.guidance_embedder.linear_1.weight"
SPOIL = {  # what is done to the int4 model, words of the message
    "no qweight": (without(f"{FC1}.qweight"), [f"{FC1}.qweight: missing", "I8 [1024, 128]"]),
    "no wscales": (without(f"{FC1}.wscales"), [f"{FC1}.wscales: missing"]),
    "no smooth": (without(f"{FC1}.smooth"), [f"{FC1}.smooth: missing"]),
    "no wzeros": (without(f"{MOD}.wzeros"), [f"{MOD}.wzeros: missing"]),
    "no norm": (without("single_transformer_blocks.0.norm_k.weight"), ["norm_k.weight: missing", "[128]"]),
    "no proj_out": (without("proj_out.weight"), ["proj_out.weight: missing"]),
    "no x_embedder": (without("x_embedder.weight"), ["x_embedder.weight: missing"]),
    "no context": (without("context_embedder.weight"), ["context_embedder.weight: missing"]),
    "no vec": (without(VEC), [f"{VEC}: missing"]),
    "half a guidance": (put(GUIDANCE, 256, 256), ["guidance_embedder.linear_1.bias: missing"]),
    "down only": (without(f"{FC1}.lora_up"), [f"{FC1}.lora_up: missing", "[1024, 16]"]),
    "up only": (without(f"{FC1}.lora_down"), [f"{FC1}.lora_down: missing", "[256, 16]"]),
    "ranks differ": (put(f"{FC1}.lora_up", 1024, 32), [f"{FC1}.lora_up: is BF16 [1024, 32]", "[1024, 16]"]),
    "rank 20": (rank_20, [f"{FC1}.lora_down: is BF16 [256, 20]", "[256, 32]"]),
    "rank axis": (put(f"{FC1}.lora_down", 16, 256), [f"{FC1}.lora_down: is BF16 [16, 256]"]),
    "qweight shape": (put(f"{FC1}.qweight", 1024, 127, dtype=torch.int8), [f"{FC1}.qweight: is I8 [1024, 127]"]),
    "qweight dtype": (put(f"{FC1}.qweight", 1024, 128, dtype=torch.uint8), [f"{FC1}.qweight: is U8"]),
    "bf16 weight": (put(f"{FC1}.qweight", 1024, 256), [f"{FC1}.qweight: is BF16"]),
    "flat wscales": (change(f"{FC1}.wscales", torch.flatten), [f"{FC1}.wscales: is BF16 [4096]"]),
    "group 128": (put(f"{FC1}.wscales", 2, 1024), [f"{FC1}.wscales: is BF16 [2, 1024]", "[4, 1024]"]),
    "scalar bias": (put(f"{FC1}.bias"), [f"{FC1}.bias: is BF16 []"]),
    "fp64 smooth": (change(f"{FC1}.smooth", torch.Tensor.double), [f"{FC1}.smooth: is F64"]),
    "awq groups": (put(f"{MOD}.wscales", 3, 768), [f"{MOD}.wscales: is BF16 [3, 768]"]),
    "plain shape": (put("proj_out.weight", 64, 255), ["proj_out.weight: is BF16 [64, 255]"]),
    "plain int8": (put("proj_out.weight", 64, 256, dtype=torch.int8), ["proj_out.weight: is I8"]),
    "fp8 of block scales": (lambda tensors: (put("proj_out.weight", 64, 256, dtype=FP8)(tensors),
                                             put("proj_out.scale_weight", 64)(tensors)), ["scale_weight: is BF16 [64]"]),
    "hidden 192": (put("x_embedder.weight", 192, 64), ["x_embedder.weight", "[192, 64]", "multiple of 128"]),
    "hidden 384": (put("x_embedder.weight", 384, 64), ["transformer_blocks.0.norm1.linear.qweight: is I32"]),
    "odd features": (put("x_embedder.weight", 256, 63), ["x_embedder.weight", "of 4 columns"]),
    "flat embedder": (put("x_embedder.weight", 256), ["x_embedder.weight", "two axes"]),
    "no hidden": (put("x_embedder.weight", 0, 64), ["hidden", "empty"]),
    "no features": (put("x_embedder.weight", 256, 0), ["in_features", "empty"]),
    "no context dim": (put("context_embedder.weight", 256, 0), ["context_dim", "empty"]),
    "empty qweight": (put(f"{FC1}.qweight", 0, 128, dtype=torch.int8), [f"{FC1}.qweight: is I8 [0, 128]"]),
    "empty smooth": (put(f"{FC1}.smooth", 0), [f"{FC1}.smooth: is BF16 [0]"]),
    "gap": (put("transformer_blocks.2.x", 1), ["transformer_blocks.*", "'transformer_blocks.2'", "block 1 is not"]),
    "far block": (put("transformer_blocks.999999999.x", 1), ["'transformer_blocks.999999999'", "block 1 is not"]),
    "endless block": (put(f"transformer_blocks.{'9' * 100_000}.x", 1), ["block 1 is not"]),
    "single gap": (put("single_transformer_blocks.7.x", 1), ["'single_transformer_blocks.7'", "block 1 is not"]),
    "no number": (put("transformer_blocks.final.x", 1), ["'transformer_blocks.final'"]),
    "arabic digits": (put("transformer_blocks.\u0661.x", 1), ["'transformer_blocks.\u0661'"]),
    "leading zero": (put("transformer_blocks.00.x", 1), ["'transformer_blocks.00'"]),
    "half a block": (put("transformer_blocks.1.qkv_proj.bias", 768),
                     ["transformer_blocks.1.norm1.linear.qweight: missing", "more; `", " info ", "` lists them)"]),
    "one fp8 layer": (change(f"{FC1}.wscales", lambda scales: scales.to(FP8)), ["wscales: is BF16", "mixed"]),
    "wtscale in int4": (put(f"{FC1}.wtscale", 1), ["wscales: is BF16", "int4 and of an fp4 file are mixed"]),
    "mxfp4": (mxfp4, ["wscales: is U8", "MXFP4", "int4 or fp4"]),
}


@pytest.mark.parametrize("case", SPOIL)
def test_spoilt_tensors(path, int4, case):
    spoil, words = SPOIL[case]
    spoil(int4)
    refused(save(path, int4), *words)
    json.dumps(report.describe(path))
    assert "PROBLEM" in report.as_text(report.describe(path))


def test_mxfp4_with_its_own_dtype(path, raw):
    header, data = raw
    for name, entry in header.items():
        if name.endswith(".wscales") and entry["dtype"] == "F8_E4M3":
            entry["dtype"] = "F8_E8M0"
    path.write_bytes(join(header, data))
    refused(path, "wscales: is F8_E8M0", "MXFP4")


def test_nvfp4_layer_with_int4_scales(path, nvfp4):
    name = "single_transformer_blocks.0.mlp_fc2.wscales"
    refused(save(path, nvfp4 | {name: torch.ones(8, 128, dtype=BF16)}), f"{name}: is BF16 [8, 128]", "mixed")


def test_two_tensor_scales(path, nvfp4):
    refused(save(path, nvfp4 | {f"{FC1}.wtscale": torch.ones(2, dtype=BF16)}), f"{FC1}.wtscale: is BF16 [2]", "[1]")


# Values that blacken every image

VALUES = [
    ("nvfp4", f"{FC1}.wscales", NAN), ("nvfp4", f"{FC1}.wtscale", NAN), ("nvfp4", f"{FC1}.wtscale", INF),
    ("nvfp4", "transformer_blocks.0.qkv_proj.wcscales", NAN),
    ("int4", f"{FC1}.wscales", NAN), ("int4", f"{FC1}.wscales", -INF),
    ("int4", f"{FC1}.lora_down", NAN), ("int4", f"{FC1}.lora_up", INF), ("int4", f"{FC1}.bias", NAN),
    ("int4", f"{FC1}.smooth", NAN), ("int4", f"{FC1}.smooth", INF),
    ("int4", "single_transformer_blocks.0.norm.linear.wzeros", NAN), ("int4", "x_embedder.weight", NAN),
    ("int4", "single_transformer_blocks.0.norm.linear.wscales", INF),
    ("int4", "single_transformer_blocks.0.norm.linear.bias", NAN),
    ("int4", "proj_out.bias", INF), ("int4", "norm_out.linear.weight", NAN),
    ("int4", "transformer_blocks.0.norm_added_k.weight", NAN),
]


@pytest.mark.parametrize("kind, name, value", VALUES)
@pytest.mark.parametrize("place", [0, -1])
def test_not_finite(path, golden_model, kind, name, value, place):
    tensors = dict(golden_model[kind])
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[place] = value
    refused(save(path, tensors), name, "NaN or Inf", "get it again")


TOO_LARGE = [("nvfp4", f"{FC1}.wtscale", 3e38), ("nvfp4", "transformer_blocks.0.qkv_proj.wcscales", -3e38),
             ("int4", f"{FC1}.wscales", 3e38), ("int4", f"{FC1}.wscales", -1e6), ("int4", f"{FC1}.lora_down", 1e38),
             ("int4", f"{FC1}.lora_up", -3e38), ("int4", f"{FC1}.bias", 3e38), ("int4", f"{MOD}.wzeros", 3e38),
             ("int4", f"{MOD}.wscales", 3e38), ("int4", f"{MOD}.bias", -3e38), ("int4", "proj_out.weight", 3e38),
             *((kind, f"{FC1}.smooth", 3e38) for kind in MODELS)]


@pytest.mark.parametrize("kind, name, value", TOO_LARGE)
def test_too_large(path, golden_model, kind, name, value):
    """Finite in the file, Inf in the picture."""
    tensors = dict(golden_model[kind])
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    refused(save(path, tensors), name, "contains a number of size", "get it again")


@pytest.mark.parametrize("value", [-0.0, -1.5])
def test_block_scales_with_a_sign(path, golden_model, value):
    """The unit of an RTX 50 reads them as ue4m3, which has none; everything else would honour it."""
    scales = golden_model["nvfp4"][f"{FC1}.wscales"].clone()
    scales.view(-1)[7] = value
    changed = golden_model["nvfp4"] | {f"{FC1}.wscales": scales}
    refused(save(path, changed), f"{FC1}.wscales: contains a block scale with a sign", "get it again")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("value", [9e-41, -1e-20])
def test_too_small_to_divide_by(path, golden_model, kind, value):
    smooth = golden_model[kind][f"{FC1}.smooth"].clone()
    smooth[5] = value
    refused(save(path, golden_model[kind] | {f"{FC1}.smooth": smooth}), f"{FC1}.smooth: contains ", "divided")


@pytest.mark.parametrize("name, value", [
    (f"{FC1}.wscales", 9e4), (f"{FC1}.lora_up", -9e4), (f"{FC1}.bias", 9e4), (f"{MOD}.wscales", 9e4), (f"{MOD}.wzeros", -9e4),
    ("proj_out.weight", 9e4), (f"{FC1}.smooth", 9e11), (f"{FC1}.smooth", 2e-12)])
def test_odd_and_possible(path, int4, name, value):
    """The bounds are far from what models have."""
    int4[name] = int4[name].clone()
    int4[name].view(-1)[-1] = value
    read_all(save(path, int4))


# What tools make of published files: it means the same, and loads as the same

def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def fp32(part):
    return lambda tensors: {name: tensor.float() if name.endswith(part) and tensor.dtype == BF16 else tensor
                            for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind, change", [
    *((kind, renamed(prefix)) for kind in MODELS for prefix in ("model.diffusion_model.", "diffusion_model.", "transformer.")),
    *(("int4", fp32(part)) for part in (".smooth", ".lora_down", ".lora_up", ".wscales", ".wzeros", ".bias", ".weight")),
    ("nvfp4", fp32(".wcscales")), ("nvfp4", fp32("")),
    ("nvfp4", lambda tensors: {name: tensor[0] if name.endswith(".wtscale") else tensor for name, tensor in tensors.items()}),
], ids=str)
def test_the_same_in_other_words(path, golden_model, kind, change):
    tensors = golden_model[kind]
    with limit(60):
        found, whole = (read_layers(save(at, one)) for at, one in (
            (path, change(dict(tensors))), (path.with_name("whole.safetensors"), tensors)))
    assert found == whole


def read_layers(path):
    """{layer: its bytes and all that is said of them}; notices must be none."""
    opened = Checkpoint(path).require()
    assert not opened.notices
    return {layer: (bytes(tiles.stored.tolist()), tiles.description(), bias.tolist())
            for layer, tiles, bias in opened.layers(opened.shape.comfy_places())} | {
        name: tensor.float().tolist() for name, tensor in opened.plain(opened.shape.comfy_plain())}


def test_prefix_beside_other_models(path, int4):
    save(path, renamed("model.diffusion_model.")(int4) | {"vae.decoder.conv_in.weight": torch.zeros(3)})
    noticed(path, "1 tensors beside the model are ignored: vae.decoder.conv_in.weight")


@pytest.mark.parametrize("names", ["one", "all"])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [None, "scale_weight", "weight_scale"])
def test_plain_fp8(path, int4, scaled, dtype, names):
    """Some tools make fp8 of all that looks like a weight, some of everything: it loads as what that means in 16 bit."""
    same = Checkpoint(save(path, int4)).shape
    wide, narrow = dict(int4), dict(int4)
    for name in [name for name, _ in same.plain()] if names == "all" else ["x_embedder.weight"]:
        scale = 0.375 if scaled and name.endswith(".weight") else 1
        narrow[name] = (int4[name].float() / scale).to(dtype)
        wide[name] = (narrow[name].float() * scale).bfloat16()
        if scale != 1:
            narrow[name.replace(".weight", f".{scaled}")] = torch.tensor(scale)
    assert read_layers(save(path, narrow)) == read_layers(save(path.with_name("wide.safetensors"), wide))
    plain = dict(Checkpoint(path).plain(same.comfy_plain()))
    assert {tensor.dtype for tensor in plain.values()} == {BF16}
    assert (plain["img_in.weight"] - int4["x_embedder.weight"]).abs().max() <= int4["x_embedder.weight"].abs().max() / 8


def test_no_branch(path, int4):
    """What the file's own quantiser has put there is missing, and nobody would see why pictures are worse."""
    for part in ("lora_down", "lora_up"):
        del int4[f"{FC1}.{part}"]
    noticed(save(path, int4), f"1 4-bit layers have no low-rank branch (lora_down, lora_up), the first is {FC1}")


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_smooth_of_zero(path, int4, zero):
    name = "single_transformer_blocks.0.mlp_fc2.smooth"
    int4[name] = int4[name].clone()
    int4[name][-1] = zero
    refused(save(path, int4), f"{name}: contains 0,", "divided")


def test_unused_values_may_be_anything(path, int4):
    """smooth_orig is not read at run time, and neither are foreign tensors."""
    spoilt = {name: torch.full_like(tensor, NAN) for name, tensor in int4.items() if name.endswith("smooth_orig")}
    save(path, int4 | spoilt | {"foreign": torch.tensor([NAN])})
    noticed(path, "1 tensors", "foreign")


# Metadata

@pytest.mark.parametrize("text", [
    "", "nonsense", "[" * 100_000, '{"weight":' * 100_000, "1" * 100_000, "null", "3", '"weight"', "[]", "{}",
    '{"weight": 4}', '{"weight": []}', '{"weight": {}}', '{"weight": {"dtype": "int4"}}', "NaN", "\x00", "\ud83d\ude00",
], ids=lambda text: repr(text[:20]))
def test_unreadable_metadata(path, int4, text):
    save(path, int4, {"quantization_config": text.encode("utf-16", "surrogatepass").decode("utf-16")})
    noticed(path, "quantization_config", "not readable")


@pytest.mark.parametrize("claim", [
    {"dtype": "x" * 1_000_000, "group_size": 64}, {"dtype": "\x1b[2J", "group_size": 64},
    {"dtype": None, "group_size": None},
    {"dtype": "int4", "group_size": -(10**4000)}, {"dtype": ["int4"] * 100_000, "group_size": {}},
    {"dtype": "int4", "group_size": 1e308},
    {"dtype": "fp4_e2m1_all", "scale_dtype": "ue8m0", "group_size": 32},
], ids=lambda claim: str(claim)[:30])
def test_contradicting_metadata(path, int4, claim):
    save(path, int4, {"quantization_config": json.dumps({"weight": claim})})
    noticed(path, "the tensors decide")


def test_deep_claim(path, int4):
    """Deep enough to parse, too deep to print."""
    for depth in range(900, 1000, 7):
        deep = "[" * depth + "]" * depth
        save(path, int4, {"quantization_config": f'{{"weight": {{"group_size": 64, "dtype": {deep}}}}}'})
        noticed(path, "the tensors decide")


def test_much_metadata(path, int4):
    save(path, int4, {f"key{i}": "x" * 100 for i in range(20_000)} | {"config": "{" * 1_000_000})
    assert read_all(path).notices == []
    assert report.describe(path)["problems"] == []
