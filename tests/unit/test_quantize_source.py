"""A FLUX on disk, in every form it comes in: the same weights under ComfyUI's names, or a refusal that says why."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.kernels.errors import printable
from svdq_pack.svdq.quantize import FileSource
from svdq_pack.tests.unit.helpers import MODELS, limit, save

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def flux(golden_dir, tmp_path_factory):
    """{BFL name: bf16 tensor} of a FLUX of 128 channels with guidance, one block of each kind."""
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    checkpoint.dequantize(golden_dir / f"{MODELS['nvfp4']}.safetensors", path, BF16)
    return load_file(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flux.safetensors"


def everything(source):
    """{ComfyUI name: tensor} of all a source gives."""
    tensors = dict(source.plain())
    for layer in {place.layer for place in source.shape.comfy_places()}:
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = source.layer(layer)
    return tensors


def assert_gives(path, flux, exact=True):
    got = everything(FileSource(path))
    assert got.keys() == flux.keys()
    for name, tensor in flux.items():
        assert got[name].shape == tensor.shape, name
        if exact:
            assert torch.equal(got[name].float(), tensor.float()), name
        else:
            assert (got[name].float() - tensor.float()).norm() <= 0.04 * tensor.float().norm(), name


def in_diffusers_names(flux):
    """Written down from the diffusers model, not from the code under test."""
    h, out = 128, {}
    for name, tensor in flux.items():
        module, _, part = name.rpartition(".")
        double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
        if module.startswith("double_blocks.0."):
            stream, inner = module.split(".", 2)[2].split("_", 1)
            img = stream == "img"
            if inner == "attn.qkv":
                for i, theirs in enumerate(("to_q", "to_k", "to_v") if img else ("add_q_proj", "add_k_proj", "add_v_proj")):
                    out[f"{double}attn.{theirs}.{part}"] = tensor[i * h:(i + 1) * h]
                continue
            theirs = {"mod.lin": "norm1.linear" if img else "norm1_context.linear",
                      "attn.proj": "attn.to_out.0" if img else "attn.to_add_out",
                      "mlp.0": "ff.net.0.proj" if img else "ff_context.net.0.proj",
                      "mlp.2": "ff.net.2" if img else "ff_context.net.2",
                      "attn.norm.query_norm": "attn.norm_q" if img else "attn.norm_added_q",
                      "attn.norm.key_norm": "attn.norm_k" if img else "attn.norm_added_k"}[inner]
            out[f"{double}{theirs}.{part.replace('scale', 'weight')}"] = tensor
        elif module == "single_blocks.0.linear1":
            for theirs, rows in (("attn.to_q", slice(0, h)), ("attn.to_k", slice(h, 2 * h)),
                                 ("attn.to_v", slice(2 * h, 3 * h)), ("proj_mlp", slice(3 * h, 7 * h))):
                out[f"{single}{theirs}.{part}"] = tensor[rows]
        elif module.startswith("single_blocks.0."):
            theirs = {"modulation.lin": "norm.linear", "linear2": "proj_out", "norm.query_norm": "attn.norm_q",
                      "norm.key_norm": "attn.norm_k"}[module.removeprefix("single_blocks.0.")]
            out[f"{single}{theirs}.{part.replace('scale', 'weight')}"] = tensor
        else:
            theirs = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
                      "final_layer.adaLN_modulation.1": "norm_out.linear"}.get(module)
            if theirs is None:
                embedder, layer = module.split(".")
                embedder = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}[embedder]
                theirs = f"time_text_embed.{embedder}_embedder.linear_{1 if layer == 'in_layer' else 2}"
            if theirs == "norm_out.linear":             # diffusers has scale, shift; BFL shift, scale
                tensor = torch.cat((tensor[h:], tensor[:h]))
            out[f"{theirs}.{part}"] = tensor
    return out


# Forms

@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("naming", [lambda flux: flux, in_diffusers_names], ids=["BFL", "diffusers"])
def test_names(path, flux, naming, prefix):
    tensors = {prefix + name: tensor for name, tensor in naming(flux).items()}
    if prefix == "model.diffusion_model.":              # an all-in-one checkpoint has more
        tensors |= {"vae.decoder.conv_in.weight": torch.ones(3), "text_encoders.t5xxl.x": torch.ones(2)}
    source = FileSource(save(path, tensors))
    assert source.shape == flux1.Shape(hidden=128, depth=1, depth_single=1, in_features=64,
                                       context_dim=flux["txt_in.weight"].shape[1],
                                       vec_dim=flux["vector_in.in_layer.weight"].shape[1], guidance=True)
    assert source.dtypes == ["BF16"] and source.name == "flux.safetensors"
    assert_gives(path, flux)


def test_norms_of_newer_comfyui(path, flux):
    assert_gives(save(path, {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in flux.items()}), flux)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_dtypes(path, flux, dtype):
    small = {name: tensor.to(dtype) for name, tensor in flux.items()}
    assert_gives(save(path, small), small)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_fp8(path, flux, dtype):
    small = {name: tensor.to(dtype) if tensor.ndim == 2 else tensor for name, tensor in flux.items()}
    source = FileSource(save(path, small))
    assert len(source.dtypes) == 1 and source.dtypes[0].startswith("F8_")
    assert_gives(path, small)
    assert all(tensor.dtype != dtype for tensor in everything(source).values())


@pytest.mark.parametrize("suffix, shape", [("scale_weight", ()), ("weight_scale", (1,))])
def test_scaled_fp8(path, flux, suffix, shape):
    tensors = {"scaled_fp8": torch.zeros(2).to(FP8)}
    for name, tensor in flux.items():
        tensors[name] = tensor
        if name.endswith(".weight") and "_blocks" in name:
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(FP8)
            tensors[f"{name.removesuffix('.weight')}.{suffix}"] = scale.view(shape)
            tensors[f"{name.removesuffix('.weight')}.scale_input"] = torch.ones(())
    assert_gives(save(path, tensors), flux, exact=False)


@pytest.mark.parametrize("where", ["index", "folder", "pipeline"])
def test_in_parts(tmp_path, flux, where):
    """With q in one file and k, v in the other."""
    folder = tmp_path / "model" / "transformer" if where == "pipeline" else tmp_path / "model"
    folder.mkdir(parents=True)
    tensors, index = in_diffusers_names(flux), {}
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        save(folder / f"part-{i}.safetensors", part)
        index |= {name: f"part-{i}.safetensors" for name in part}
    (folder / "diffusion.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    path = {"index": folder / "diffusion.safetensors.index.json", "folder": folder, "pipeline": tmp_path / "model"}[where]
    assert_gives(path, flux)


def test_folder_with_one_file(tmp_path, flux):
    save(tmp_path / "a.safetensors", flux)
    assert_gives(tmp_path, flux)
    save(tmp_path / "b.safetensors", flux)
    refused(tmp_path, "a folder with 2 models")


def test_results_outlive_the_file(path, flux):
    source = FileSource(save(path, flux))
    weight, _ = source.layer("single_blocks.0.linear1")
    path.write_bytes(b"")
    assert torch.equal(weight, flux["single_blocks.0.linear1.weight"])


def test_fingerprint(path, flux):
    one = FileSource(save(path, flux)).fingerprint
    assert FileSource(path).fingerprint == one
    changed = dict(flux, **{"img_in.bias": flux["img_in.bias"] + 1})
    assert FileSource(save(path, changed)).fingerprint != one


# Refusals

def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        FileSource(path).check(lambda share: None)
    message = str(caught.value)
    assert printable(path) in message and all(word in message for word in words), message
    assert len(message) < len(str(path)) + 500, message


@pytest.mark.parametrize("edit, words", [
    (lambda t: t.pop("single_blocks.0.linear2.bias"), ["1 tensors are missing: single_blocks.0.linear2.bias"]),
    (lambda t: t.pop("img_in.weight"), ["img_in.weight is missing"]),
    (lambda t: t.update({"img_in.weight": torch.zeros(100, 64)}), ["img_in.weight is [100, 64]", "multiple of 128"]),
    (lambda t: t.update({"img_in.weight": torch.zeros(0, 64)}), ["img_in.weight is [0, 64]"]),
    (lambda t: t.update({"img_in.weight": torch.zeros(128)}), ["img_in.weight is [128], needs 2 axes"]),
    (lambda t: t.update({"double_blocks.0.img_mlp.0.weight": torch.zeros(384, 128)}), ["[384, 128], needs [512, 128]"]),
    (lambda t: t.update({"double_blocks.0.img_mlp.0.weight": torch.tensor(1.0)}), ["[], needs [512, 128]"]),
    (lambda t: t.update({"double_blocks.0.img_mlp.0.weight": torch.zeros(512, 64, dtype=torch.uint8)}),
     ["img_mlp.0.weight is U8: quantised already"]),
    (lambda t: t.update({"double_blocks.0.img_mlp.0.weight.absmax": torch.zeros(9)}), ["is quantised already", "absmax"]),
    (lambda t: t.update({"double_blocks.0.img_mlp.0.weight_scale": torch.zeros(512, 8)}), ["weight_scale is [512, 8]"]),
    (lambda t: t.update({"double_blocks.2.img_mlp.0.weight": torch.zeros(1)}), ["2 blocks", "not numbered", "1, 2"]),
    (lambda t: t["single_blocks.0.linear1.weight"][5].fill_(float("nan")), ["0.linear1.weight has NaN or Inf in 128"]),
    (lambda t: t["img_in.bias"][5:7].fill_(float("inf")), ["img_in.bias has NaN or Inf in 2"])])
def test_broken(path, flux, edit, words):
    tensors = {name: tensor.clone() for name, tensor in flux.items()}
    edit(tensors)
    refused(save(path, tensors), *words)


@pytest.mark.parametrize("name", ["img_in.weight", "txt_in.bias", "single_blocks.0.linear1.weight"])
def test_shapes_of_many_axes(path, flux, name):
    """The message shows the beginning."""
    save(path, flux | {name: torch.zeros((1,) * 60)})
    with pytest.raises(CheckpointError, match=r"\[1, 1, 1, .*1, \.\.\..* needs "):
        FileSource(path)


def test_missing_in_diffusers_names(path, flux):
    tensors = in_diffusers_names(flux)
    for part in ("q", "k"):
        del tensors[f"single_transformer_blocks.0.attn.to_{part}.weight"]
    refused(save(path, tensors), "2 tensors are missing: single_transformer_blocks.0.attn.to_k.weight")


def test_other_files(path, model, flux, tmp_path):
    refused(model, "SVDQ model already", "bf16, fp16 or fp8 original")
    refused(save(path, {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2)}), "this is a LoRA")
    refused(save(path, {"decoder.conv_in.weight": torch.ones(2)}), "this is a VAE")
    refused(save(path, {"x": torch.ones(2)}), "not a FLUX transformer: it holds x")
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    refused(path, "GGUF")
    path.write_bytes(b"\x80\x02" + bytes(100))
    refused(path, "pickle")
    refused(tmp_path / "none.safetensors", "no such file")


@pytest.mark.parametrize("text, words", [
    ("", "not a readable index"), ("[]", "not a readable index"), ('{"weight_map": 3}', "not a readable index"),
    ('{"weight_map": {}}', "names no files"), ('{"weight_map": {"a": "../b.safetensors"}}', "needs files beside it"),
    ('{"weight_map": {"a": 3}}', "needs files beside it"), ('{"weight_map": {"a": ["b"]}}', "not a readable index"),
    ('{"weight_map": {"a": "b", "c": 3}}', "not a readable index"), ("[" * 100_000, "not a readable index"),
    ('{"weight_map": {"a": ' + "9" * 5000 + "}}", "not a readable index"), (" " * (2 << 20), "no such file needs"),
    ('{"weight_map": {"a": "b\\u0000"}}', "parts are missing: 'b\\x00'"),
    ('{"weight_map": {"a": ".."}}', "1 parts are missing"),
    ('{"weight_map": {"a": "' + "x" * 300 + '"}}', "1 parts are missing"), ('{"weight_map": {"a": "\\ud800"}}', "are missing"),
    ('{"weight_map": {"a": "b.safetensors"}}', "1 of its 1 parts are missing: b.safetensors")])
def test_bad_index(tmp_path, text, words):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    refused(path, words)


def test_indices_that_are_no_files(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    os.mkfifo(path)
    with limit(5):
        refused(path, "a device or a pipe")
        refused(tmp_path, "a device or a pipe")
    for name in ("a\0b", "x" * 300, "no"):
        refused(tmp_path / f"{name}.safetensors.index.json", "cannot be read")
        refused(tmp_path / f"{name}.safetensors", "no such file")
