"""torch.compile takes our layers whole, and sees what a LoRA does later."""

import pytest
import torch

from svdq_pack.tests.hf.inside.checks_saving import lora
from svdq_pack.tests.hf.inside.support import distance, layers

IN_BLOCKS = ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out",
             "single_transformer_blocks.0.norm.linear")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("act_bits", [16, None])
def test_whole(golden_model, act_bits):
    model = golden_model.load(act_bits=act_bits)
    wanted = golden_model.run(model)
    assert torch.equal(golden_model.run(torch.compile(model, fullgraph=True, backend="aot_eager")), wanted)


def test_blocks_with_loras(nvfp4):
    """Another strength is other bytes and no other graph; another LoRA is seen."""
    model, reference = nvfp4.load(), nvfp4.load()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(nvfp4.run(model), nvfp4.run(reference))
    for one in (model, reference):
        one.load_lora_adapter(lora(one, *IN_BLOCKS), adapter_name="one")
    assert torch.equal(nvfp4.run(model), nvfp4.run(reference))
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for strength in (0.5, -1.0, 2.0):
        for one in (model, reference):
            one.set_adapters("one", strength)
        assert torch.equal(nvfp4.run(model), nvfp4.run(reference))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    for one in (model, reference):
        one.disable_lora()
    assert torch.equal(nvfp4.run(model), nvfp4.run(reference))
    for one in (model, reference):
        one.enable_lora()
        one.load_lora_adapter({key: tensor.flip(0) for key, tensor in lora(one, IN_BLOCKS[0]).items()}, adapter_name="two")
        one.set_adapters(["one", "two"], [0.5, 0.5])
    assert torch.equal(nvfp4.run(model), nvfp4.run(reference))


def test_scale_of_a_call(nvfp4):
    """diffusers changes strengths inside the forward for that."""
    model = nvfp4.load()
    model.load_lora_adapter(lora(model, *IN_BLOCKS), adapter_name="one")
    wanted = nvfp4.run(model, joint_attention_kwargs={"scale": 0.5})
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(nvfp4.run(model, joint_attention_kwargs={"scale": 0.5}), wanted)
    assert not torch.equal(nvfp4.run(model), wanted)


def test_gradients(nvfp4):
    layer = layers(nvfp4.load())["single_transformer_blocks.0.proj_mlp"]
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0))
    grads = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert distance(*grads) <= 1e-6
