"""ComfyUI's dynamic patcher ('dynamic VRAM'), its own loading code, without a GPU.

The memory bar is a stand-in that never has room, so what is not run is the fault of a weight into it. The device is
called cpu:0, which ComfyUI then does not take for a CPU.
"""

import inspect

import pytest
import torch

from svdq_pack.nodes.host.patcher import SVDQPatcher
from svdq_pack.nodes.host.text_encoder import load_clip
from svdq_pack.svdq.text_encoder import Shape
from svdq_pack.tests import random_models
from svdq_pack.tests.comfy.inprocess.support import GOLDEN, distance, hooks, sample, with_lora, write_clip_l

import comfy.memory_management      # noqa: E402, comes from the tree that support has chosen
import comfy.model_management       # noqa: E402
import comfy.model_patcher          # noqa: E402
import comfy.sd                     # noqa: E402
import comfy_aimdo.host_buffer      # noqa: E402
import comfy_aimdo.model_vbar       # noqa: E402

DEVICE = torch.device("cpu", 0)


class Bar:
    def __init__(self, size, device):
        pass

    def alloc(self, size):
        return self, 0, size

    def prioritize(self):
        pass

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        return 0


class Buffer:
    size = 0

    def __init__(self, *sizes):
        pass


@pytest.fixture(autouse=True)
def dynamic(monkeypatch):
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: DEVICE)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", Bar)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda weight: None)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", Buffer)


@pytest.mark.parametrize("name", ["peft", "kohya_bfl"])
def test_dynamic_patcher(dev, golden, name):
    """Loading, a LoRA, and back, as with the plain patcher that ComfyUI makes of it when it needs one."""
    patcher = dev.load()
    assert patcher.is_dynamic() and isinstance(patcher, SVDQPatcher)
    patcher.partially_load(DEVICE)
    before = dev.network(patcher)
    assert distance(before, dev.io["weight_only.out_latent"]) <= GOLDEN

    # On a CPU ComfyUI leaves out the LoRA of its own layers that are in the bar, so it has none for them here.
    tensors = golden(f"lora_model_nvfp4_flux_dev_like_{name}")
    tensors = {key: value for key, value in tensors.items() if "_blocks" in key}
    changed = with_lora(patcher, tensors)
    assert isinstance(changed, SVDQPatcher) and changed.is_dynamic()
    plain = changed.get_non_dynamic_delegate()
    assert isinstance(plain, SVDQPatcher) and not plain.is_dynamic() and plain.model is not changed.model
    expected = dev.run(plain)
    assert distance(expected, before) > 1e-2
    changed.partially_load(DEVICE)
    assert torch.equal(dev.network(changed), expected)
    patcher.partially_load(DEVICE)
    assert torch.equal(dev.network(patcher), before)
    changed.partially_load(DEVICE)
    changed.detach()
    assert torch.equal(dev.network(patcher), before)


def test_small_layers_are_moved_at_once(make_model, tmp_path):
    """ComfyUI keeps layers under 16 KiB out of the bar. With no low-rank branch the smallest of ours are."""
    if "force_cast" not in inspect.signature(comfy.model_patcher.ModelPatcher.patch_weight_to_device).parameters:
        pytest.skip("this ComfyUI moves every layer to the bar")
    model = make_model(rank=0)
    patcher = model.load()
    stored = {key: layer.weight for key, layer in patcher.layers().items()}
    patcher.partially_load(DEVICE)
    moved = {key for key in stored if key in patcher.backup}
    assert 0 < len(moved) < len(stored)
    expected = sample(patcher)
    assert distance(expected, sample(model.stock(tmp_path))) <= 1e-5
    assert torch.equal(sample(patcher.get_non_dynamic_delegate()), expected)
    patcher.detach()
    assert not patcher.backup
    assert all(torch.equal(layer.weight, stored[key]) for key, layer in patcher.layers().items())


def test_saving_is_refused(dev):
    with pytest.raises(RuntimeError, match="cannot be saved by 'Save Model'"):
        dev.load().state_dict_for_saving()


def test_hooks_make_it_a_plain_one(dev, golden, monkeypatch):
    """Weight hooks are not for dynamic patchers; the sampler asks for the plain one of the same model."""
    tensors = golden("lora_model_nvfp4_flux_dev_like_kohya_bfl")
    schedule = [(0.0, 0.75), (0.5, -0.5)]
    dynamic = sample(dev.load(), steps=4, hooks=hooks(tensors, *schedule))
    monkeypatch.undo()
    assert torch.equal(dynamic, sample(dev.load(), steps=4, hooks=hooks(tensors, *schedule)))


def test_text_encoder(tmp_path):
    """The 4-bit T5 of a dynamic patcher gives what that of a plain one gives, with a LoRA and without."""
    random, shape = torch.Generator().manual_seed(9), Shape(d_model=256, d_ff=384, d_kv=32, num_heads=4, num_layers=2)
    files = tmp_path / "t5.safetensors", tmp_path / "clip_l.safetensors"
    random_models.write_text_encoder(files[0], random, shape)
    write_clip_l(files[1], random)
    cpu, key = torch.device("cpu"), "lora_te2_encoder_block_1_layer_1_DenseReluDense_wo.lora"
    lora = {f"{key}_down.weight": torch.randn(8, 384, generator=random),
            f"{key}_up.weight": torch.randn(256, 8, generator=random)}
    results = []
    for device in (DEVICE, cpu):
        clip = load_clip(*files, None, {"load_device": device, "offload_device": cpu}, shape=shape)
        assert clip.patcher.is_dynamic() == (device == DEVICE) and isinstance(clip.patcher, SVDQPatcher)
        tokens = [[token for token, *_ in clip.tokenize("a fox")["t5xxl"][0]]]
        for one in (clip, comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)[1]):
            one.patcher.partially_load(device) if device == DEVICE else one.load_model()
            results.append(one.cond_stage_model.t5xxl(tokens)[0])
    assert distance(results[0], results[1]) > 1e-2
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
