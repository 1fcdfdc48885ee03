"""Offloading moves our bytes like any weights: the same numbers with it, with a LoRA, and with one that is loaded meanwhile."""

import diffusers
import pytest
import torch

from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.hf.inside.checks_pipelines import STEPS, TEXT, made
from svdq_pack.tests.hf.inside.checks_saving import IN_BRANCHES, lora
from svdq_pack.tests.hf.inside.support import distance, layers, random_model

LORA = (*IN_BRANCHES, "single_transformer_blocks.1.attn.to_q", "transformer_blocks.0.norm1.linear")


@pytest.fixture
def pipe(tmp_path, request):
    """With activations that nobody rounds, or as a test's parameter says."""
    return made(diffusers.FluxPipeline, random_model(tmp_path, act_bits=getattr(request, "param", 16)))


def paint(pipe):
    return pipe(**TEXT, **STEPS, height=64, width=64, generator=torch.Generator().manual_seed(0)).images


def sequential(pipe, folder):
    """As the pipeline's enable_sequential_cpu_offload has it, which wants an accelerator: onto the CPU, from the CPU."""
    from accelerate import cpu_offload
    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert all(layer.packed.is_meta for layer in layers(pipe.transformer).values())


def group(kind, **more):
    def enable(pipe, folder):
        options = {name: str(folder / "disk") if value == "disk" else value for name, value in more.items()}
        try:
            pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
        except AttributeError:
            if torch.accelerator.current_accelerator() is not None:
                raise
            pytest.skip("this diffusers offloads groups beside an accelerator only")
    return enable


WAYS = {"sequential": sequential, "block": group("block_level", num_blocks_per_group=1), "leaf": group("leaf_level"),
        "leaf to disk": group("leaf_level", offload_to_disk_path="disk"),
        "disk": group("block_level", num_blocks_per_group=1, offload_to_disk_path="disk")}


@pytest.mark.parametrize("with_lora, pipe", [(False, 16), (True, 16), (True, None)], indirect=["pipe"],
                         ids=["", "lora", "lora, activations rounded"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same(pipe, tmp_path, way, with_lora):
    if with_lora:
        pipe.load_lora_weights(lora(pipe.transformer, *LORA), adapter_name="one")
    wanted, tolerance = paint(pipe), 0
    if "disk" in way:               # what is read back lies elsewhere, and a last bit may be another 8-bit code
        tolerance = 2e-2 if layers(pipe.transformer)["transformer_blocks.0.attn.to_qkv"].act_bits is None else 1e-6
    WAYS[way](pipe, tmp_path)
    for _ in range(2):
        assert distance(paint(pipe), wanted) <= tolerance
    if with_lora:
        pipe.set_adapters("one", 0.3)                   # while the bytes are away
        weaker = paint(pipe)
        assert distance(weaker, wanted) > 1e-3
        pipe.disable_lora()
        plain = paint(pipe)
        pipe.enable_lora()
        assert distance(paint(pipe), weaker) <= tolerance and distance(plain, weaker) > 1e-3


@pytest.mark.parametrize("way", ["block", "leaf"])
def test_a_lora_that_is_loaded_meanwhile(pipe, tmp_path, way):
    tensors = lora(pipe.transformer, *LORA)
    WAYS[way](pipe, tmp_path)
    before = paint(pipe)
    pipe.load_lora_weights(dict(tensors), adapter_name="one")
    found = paint(pipe)
    other = made(diffusers.FluxPipeline, random_model(tmp_path))
    other.load_lora_weights(dict(tensors), adapter_name="one")
    assert torch.equal(found, paint(other)) and not torch.equal(found, before)


def test_a_lora_for_a_model_whose_numbers_are_away(pipe, tmp_path):
    """Given to the model itself, nobody can bring them back, and it says so instead of painting without."""
    tensors = lora(pipe.transformer, *LORA)
    sequential(pipe, tmp_path)
    with pytest.raises(LoraError, match="the pipeline's load_lora_weights"):
        pipe.transformer.load_lora_adapter(tensors)


def test_numbers_of_a_lora_that_nobody_has(pipe, tmp_path):
    """Offloaded before any branch was written with them, and no copy kept."""
    pipe.transformer.load_lora_adapter(lora(pipe.transformer, *LORA))
    for layer in layers(pipe.transformer).values():
        for wrapper, _ in layer.adapters:
            wrapper.taken.clear()
            layer.stale = True
    sequential(pipe, tmp_path)
    with pytest.raises(LoraError, match="before offloading is enabled"):
        paint(pipe)


@pytest.mark.parametrize("call", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_with_an_accelerator_that_is_a_pretence(pipe, monkeypatch, call, tmp_path):
    """The pipelines' own calls, the CPU standing in for the accelerator, and a LoRA loaded in between by the pipeline."""
    tensors, fresh = lora(pipe.transformer, *LORA), paint(pipe)
    stock = diffusers.DiffusionPipeline.enable_model_cpu_offload
    on_cpu = {"enable_model_cpu_offload": lambda pipe, device="cpu": stock(pipe, device="cpu"),
              "enable_sequential_cpu_offload": lambda pipe, device="cpu": sequential(pipe, None)}
    monkeypatch.setattr(diffusers.DiffusionPipeline, call, on_cpu[call])
    getattr(pipe, call)()
    assert torch.equal(paint(pipe), fresh)
    pipe.load_lora_weights(dict(tensors), adapter_name="one")
    found = paint(pipe)
    assert all(hasattr(part, "_hf_hook") for part in (pipe.transformer, pipe.vae))          # offloaded as before
    other = made(diffusers.FluxPipeline, random_model(tmp_path))
    other.load_lora_weights(dict(tensors), adapter_name="one")
    assert torch.equal(found, paint(other)) and not torch.equal(found, fresh)
