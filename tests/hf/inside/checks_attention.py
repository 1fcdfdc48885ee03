"""q and k normed and rotated in the kernels of their projection: the same numbers, and only where nothing is stepped over."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from svdq_pack.svdq.hf import blocks, operators
from svdq_pack.svdq.hf.attention import SVDQFluxAttnProcessor
from svdq_pack.tests.hf.inside.support import GOLDEN, LORA, STRENGTH, distance, epilogues_in_kernels, layers


@pytest.fixture
def fusing(monkeypatch):
    """Kernels with epilogues, and blocks that leave attention to its processor. A list that grows by the inputs of fused
    projections."""
    seen, stock = [], operators.joint_qkv

    def joint_qkv(layers, x, *rest):
        seen.extend(x)
        return stock(layers, x, *rest)

    monkeypatch.setattr(operators, "joint_qkv", joint_qkv)
    monkeypatch.setattr(blocks, "_found", lambda *given: None)
    with epilogues_in_kernels():
        yield seen


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, GOLDEN), (torch.bfloat16, 1.5e-2)])
def test_golden(golden_model, fusing, dtype, tolerance):
    model = golden_model.load(dtype)
    assert all(isinstance(one, SVDQFluxAttnProcessor) for one in model.attn_processors.values())
    assert distance(golden_model.run(model, dtype), golden_model.io["weight_only.out"]) <= tolerance
    assert len(fusing) == 2 * len(model.transformer_blocks) + len(model.single_transformer_blocks)


def test_batch(nvfp4, fusing):
    model = nvfp4.load()
    given = {name: value if name.endswith("ids") else torch.cat([value, value.flip(-1)])
             for name, value in nvfp4.inputs().items()}
    ours = model(**given).sample
    model.set_attn_processor(FluxAttnProcessor())
    assert fusing and distance(ours, model(**given).sample) <= 2e-6


def test_with_a_lora(nvfp4, fusing, golden_dir):
    model = nvfp4.load()
    model.load_lora_adapter(golden_dir / f"{LORA}_peft.safetensors", adapter_name="one")
    model.set_adapters("one", STRENGTH)
    ours = nvfp4.run(model)
    model.set_attn_processor(FluxAttnProcessor())
    assert fusing and distance(ours, nvfp4.run(model)) <= 2e-6


def test_follows_what_is_stale(nvfp4, fusing, golden_dir):
    """Strengths that change, and LoRAs that go, where the projection's own forward is stepped over."""
    model, other = nvfp4.load(), nvfp4.load()
    base = nvfp4.run(model)
    for one in (model, other):
        one.load_lora_adapter(golden_dir / f"{LORA}_peft.safetensors", adapter_name="one")
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 0.3)                        # PEFT's own, without the model's methods
    other.set_adapters("one", 0.3)
    assert torch.equal(nvfp4.run(model), nvfp4.run(other))
    model.unload_lora()
    for one in layers(model).values():
        one.stale = True
    assert torch.equal(nvfp4.run(model), base)


def hook(model):
    model.transformer_blocks[0].attn.to_qkv.register_forward_hook(lambda *_: None)


def hook_before(model):
    model.transformer_blocks[0].attn.to_qkv.register_forward_pre_hook(lambda *_: None)


def other_eps(model):
    model.transformer_blocks[0].attn.norm_k.eps = 1e-3


def other_dtype(model):
    model.transformer_blocks[0].attn.norm_q.double()


def hook_norm(model):
    model.transformer_blocks[0].attn.norm_q.register_forward_pre_hook(lambda *_: None)


def other_norm(model):
    model.transformer_blocks[0].attn.norm_k = torch.nn.LayerNorm(128)


def replaced_forward(model):
    layer = model.transformer_blocks[0].attn.to_added_qkv
    forward = layer.forward
    layer.forward = lambda x: forward(x)


@pytest.mark.parametrize("change", [hook, hook_before, hook_norm, other_norm, other_eps, other_dtype,
                                    replaced_forward])
def test_what_is_patched_is_not_stepped_over(nvfp4, fusing, change):
    model = nvfp4.load()
    change(model)
    ours = nvfp4.run(model)
    assert len(fusing) == 2 * len(model.transformer_blocks) + len(model.single_transformer_blocks) - 2
    model.set_attn_processor(FluxAttnProcessor())
    assert distance(ours, nvfp4.run(model)) <= 2e-6


def test_not_with_biases_of_a_lora(nvfp4, fusing):
    """They come after the product, and norms after them."""
    model = nvfp4.load()
    name = "single_transformer_blocks.0.attn.to_k"
    model.load_lora_adapter({f"transformer.{name}.lora_A.weight": torch.ones(4, 128) * 0.01,
                             f"transformer.{name}.lora_B.weight": torch.ones(128, 4) * 0.01,
                             f"transformer.{name}.lora_B.bias": torch.linspace(-3, 3, 128)})
    ours = nvfp4.run(model)
    model.set_attn_processor(FluxAttnProcessor())
    assert distance(ours, nvfp4.run(model)) <= 2e-6


def test_not_for_training(nvfp4, fusing):
    with torch.enable_grad():
        nvfp4.load()(**nvfp4.inputs())
    assert not fusing


def test_not_where_kernels_do_not(nvfp4):
    model = nvfp4.load()
    assert not any(one.fuses(torch.zeros(1, 1, 128), [(0, 0)]) for one in layers(model).values())


def test_another_processor_gets_stock_behaviour(nvfp4, fusing):
    model = nvfp4.load()
    model.set_attn_processor(FluxAttnProcessor())
    assert distance(nvfp4.run(model), nvfp4.io["weight_only.out"]) <= GOLDEN and not fusing
