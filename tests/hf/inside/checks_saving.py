"""Saved models are published files again, LoRAs inside where they were fused, and pipelines load them."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import SVDQFluxTransformer2DModel
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import CheckpointError, LoraError
from svdq_pack.svdq.hf.saving import FILE
from svdq_pack.tests.hf.inside.support import distance, layers, noise, random_model
from svdq_pack.tests.unit.helpers import metadata_of


def lora(model, *modules, rank=4):
    tensors = {}
    for i, name in enumerate(modules):
        module = model.get_submodule(name)
        tensors[f"transformer.{name}.lora_A.weight"] = noise(rank, module.in_features, seed=i) * 0.1
        tensors[f"transformer.{name}.lora_B.weight"] = noise(module.out_features, rank, seed=-i - 1) * 0.1
    return tensors


IN_BRANCHES = ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v", "transformer_blocks.0.ff.net.2",
               "single_transformer_blocks.0.proj_out", "x_embedder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(golden_model, tmp_path, dtype):
    """Bit by bit in what is computed; in the file what of the published one is numbers, scales in the model's 16-bit dtype."""
    model = golden_model.load(dtype)
    model.save_pretrained(tmp_path)
    other = SVDQFluxTransformer2DModel.from_pretrained(tmp_path, dtype=dtype, act_bits=16)
    assert torch.equal(golden_model.run(other, dtype), golden_model.run(model, dtype))
    assert Checkpoint(tmp_path / FILE).require().notices == []
    before, after = load_file(golden_model.path), load_file(tmp_path / FILE)
    codes = [name for name in before if name.endswith((".qweight", ".wscales", ".wzeros", ".smooth", ".lora_down", ".lora_up"))]
    assert len(codes) > 20
    for name in codes:
        was = before[name][:len(after[name])]
        was = was.half() if dtype == torch.float16 and was.dtype == torch.bfloat16 else was
        assert was.dtype == after[name].dtype and torch.equal(was.view(torch.uint8), after[name].view(torch.uint8)), name
    assert {"quantization_config", "config", "comfy_config"} <= metadata_of(tmp_path / FILE).keys()
    assert (tmp_path / "config.json").is_file()


def test_fused_loras_are_inside(nvfp4, tmp_path):
    model = nvfp4.load()
    model.load_lora_adapter(lora(model, *IN_BRANCHES, rank=40))
    wanted = nvfp4.run(model)
    model.fuse_lora()
    model.save_pretrained(tmp_path / "with its adapter")
    model.unload_lora()
    model.save_pretrained(tmp_path / "without")
    for name in ("with its adapter", "without"):
        other = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / name, dtype=torch.float32, act_bits=16)
        assert distance(nvfp4.run(other), wanted) <= 1e-5
    assert distance(nvfp4.run(nvfp4.load()), wanted) > 0.01
    ranks = Checkpoint(tmp_path / "without" / FILE).ranks
    assert len(ranks) > 1 and all(rank % 16 == 0 for rank in ranks) and max(ranks) >= 40 + min(ranks)


def test_strengths_are_inside_and_what_is_off_is_not(nvfp4, tmp_path):
    model = nvfp4.load()
    model.load_lora_adapter(lora(model, *IN_BRANCHES), adapter_name="one")
    model.set_adapters("one", 0.4)
    wanted = nvfp4.run(model)
    model.load_lora_adapter(lora(model, *IN_BRANCHES), adapter_name="two")
    model.set_adapters(["one", "two"], [0.4, 1.0])
    model.fuse_lora(adapter_names=["one"])
    with pytest.raises(LoraError, match="the LoRA two is loaded and not fused"):
        model.save_pretrained(tmp_path / "a")
    model.unfuse_lora()
    model.set_adapters("one", 0.4)
    model.fuse_lora()
    model.save_pretrained(tmp_path / "b")
    other = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "b", dtype=torch.float32, act_bits=16)
    assert distance(nvfp4.run(other), wanted) <= 1e-5
    said = json.loads(metadata_of(tmp_path / "b" / FILE)["quantization_config"])
    assert said["rank"] == max(Checkpoint(tmp_path / "b" / FILE).ranks)
    plain = nvfp4.load()
    base = nvfp4.run(plain)
    plain.load_lora_adapter(lora(plain, *IN_BRANCHES))
    plain.disable_lora()
    plain.save_pretrained(tmp_path / "c")
    other = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "c", dtype=torch.float32, act_bits=16)
    assert torch.equal(nvfp4.run(other), base)


def test_a_fused_dora_cannot_be_saved(nvfp4, tmp_path):
    model = nvfp4.load()
    tensors = lora(model, "transformer_blocks.0.ff.net.2")
    tensors["transformer.transformer_blocks.0.ff.net.2.lora_magnitude_vector"] = 1 + torch.rand(128)
    model.load_lora_adapter(tensors)
    model.fuse_lora()
    with pytest.raises(LoraError, match="DoRA"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_saved(nvfp4, tmp_path):
    model = nvfp4.load()
    model.load_lora_adapter(lora(model, *IN_BRANCHES))
    with pytest.raises(LoraError, match="fuse_lora"):
        model.save_pretrained(tmp_path / "a")
    model.unload_lora()
    model.load_lora_adapter(lora(model, "transformer_blocks.0.norm1.linear"))
    model.fuse_lora()
    with pytest.raises(LoraError, match="modulation"):
        model.save_pretrained(tmp_path / "a")
    for options in ({"safe_serialization": False}, {"push_to_hub": True}, {"variant": "fp16"}, {"save_function": torch.save}):
        with pytest.raises(ValueError, match="one safetensors file"):
            nvfp4.load().save_pretrained(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        nvfp4.load().save_pretrained(tmp_path / "file")
    nvfp4.load().save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()


def test_over_an_earlier_one(nvfp4, tmp_path):
    model = nvfp4.load()
    model.save_pretrained(tmp_path)
    model.load_lora_adapter(lora(model, *IN_BRANCHES))
    model.fuse_lora()
    wanted = nvfp4.run(model)
    model.save_pretrained(tmp_path)
    other = SVDQFluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32, act_bits=16)
    assert distance(nvfp4.run(other), wanted) <= 1e-5


def test_a_pipeline(tmp_path):
    """Its folder names the module that has the class; whoever has imported that loads it whole."""
    model = random_model(tmp_path)
    without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
                                  vae=diffusers.AutoencoderTiny(latent_channels=16), transformer=model, **without)
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float32, **without)
    assert type(loaded.transformer) is SVDQFluxTransformer2DModel
    for one, other in zip(layers(model).values(), layers(loaded.transformer).values(), strict=True):
        assert torch.equal(one.packed, other.packed) and torch.equal(one.bias, other.bias)
    # diffusers' own class finds no file of its own there, instead of random numbers
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "pipe" / "transformer")


def test_a_controlnet_cannot_start_from_it(nvfp4):
    """diffusers would leave its blocks at random without a word."""
    with pytest.raises(CheckpointError, match="16-bit model"):
        diffusers.FluxControlNetModel.from_transformer(nvfp4.load(), num_layers=1, num_single_layers=1, num_attention_heads=1)


def test_casting_layers_leaves_ours(nvfp4):
    model = nvfp4.load(torch.bfloat16)
    wanted = nvfp4.run(model, torch.bfloat16)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert all(layer.bias.dtype == torch.bfloat16 for layer in layers(model).values())
    assert model.x_embedder.weight.dtype == torch.float8_e4m3fn or model.proj_out.weight.dtype == torch.float8_e4m3fn
    assert distance(nvfp4.run(model, torch.bfloat16), wanted) <= 0.1


def test_qkv_stay_fused(nvfp4):
    model = nvfp4.load()
    wanted = nvfp4.run(model)
    model.unfuse_qkv_projections()
    assert torch.equal(nvfp4.run(model), wanted)
    model.fuse_qkv_projections()
    assert torch.equal(nvfp4.run(model), wanted)
