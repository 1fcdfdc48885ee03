"""LoRA through diffusers' own API is exact in the low-rank branch, at every strength and in every state; undoing is bitwise."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig
from safetensors.torch import load_file

from svdq_pack.svdq.errors import LoraError
from svdq_pack.svdq.hf.adapters import SVDQLora
from svdq_pack.tests.hf.inside.support import LORA, ROUNDED, STRENGTH, dense_twin, distance, layers, noise


@pytest.fixture
def file(golden_dir):
    return golden_dir / f"{LORA}_peft.safetensors"


@pytest.fixture
def expected(golden_dir):
    return load_file(golden_dir / f"{LORA}_expected.safetensors")["weight_only.out"]


@pytest.fixture
def model(nvfp4, file):
    """With the golden LoRA, active at its golden strength."""
    model = nvfp4.load()
    model.load_lora_adapter(file, adapter_name="one")
    model.set_adapters("one", STRENGTH)
    return model


def test_golden(nvfp4, model, expected):
    assert distance(nvfp4.run(model), expected) <= ROUNDED
    assert distance(nvfp4.run(nvfp4.load()), expected) > 0.5


def test_at_every_strength_like_peft_on_a_dense_model(nvfp4, file):
    """diffusers' own model with the same numbers and PEFT's own arithmetic."""
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    base = nvfp4.run(model)
    for one in (model, twin):
        one.load_lora_adapter(load_file(file), adapter_name="one")
    for strength in (1.0, 0.3, -0.5, 1.7, 0.0):
        for one in (model, twin):
            one.set_adapters("one", strength)
        ours, theirs = nvfp4.run(model), nvfp4.run(twin)
        assert distance(ours - base, theirs - base) <= 4e-3 if strength else torch.equal(ours, base)


def test_states(nvfp4, model):
    """Off, on, scaled per call, gone: each like the one before it, to the bit."""
    base, wanted = nvfp4.run(nvfp4.load()), nvfp4.run(model)
    for off, on in (("disable_lora", "enable_lora"), ("disable_adapters", "enable_adapters")):
        getattr(model, off)()
        assert torch.equal(nvfp4.run(model), base)
        getattr(model, on)()
        assert torch.equal(nvfp4.run(model), wanted)
    model.set_adapters("one", 1.0)
    assert torch.equal(nvfp4.run(model, joint_attention_kwargs={"scale": STRENGTH}), wanted)
    assert not torch.equal(nvfp4.run(model), wanted)                    # the scale was for that call
    model.delete_adapters("one")
    assert torch.equal(nvfp4.run(model), base)


def test_strength_writes_into_the_same_bytes(nvfp4, model):
    nvfp4.run(model)
    def places():
        return {name: (layer.lora.data_ptr(), layer.sections) for name, layer in layers(model).items()
                if layer.lora is not None}

    before = places()
    packed = {name: layer.packed.clone() for name, layer in layers(model).items()}
    model.set_adapters("one", 0.2)
    nvfp4.run(model)
    assert len(before) > 3 and places() == before
    assert all(torch.equal(layer.packed, packed[name]) for name, layer in layers(model).items())


def test_two_halves_are_a_whole(nvfp4, file):
    model = nvfp4.load()
    for name in ("left", "right", "whole"):
        model.load_lora_adapter(file, adapter_name=name)
    model.set_adapters("whole", 0.8)
    whole = nvfp4.run(model)
    model.set_adapters(["left", "right"], [0.5, 0.3])
    assert distance(nvfp4.run(model), whole) <= ROUNDED
    assert sorted(model.peft_config) == ["left", "right", "whole"]


def test_fuse(nvfp4, model, file):
    base, wanted = nvfp4.run(nvfp4.load()), nvfp4.run(model)
    model.fuse_lora()
    assert distance(nvfp4.run(model), wanted) <= 2e-6               # plain layers are merged by PEFT
    model.unfuse_lora()
    assert distance(nvfp4.run(model), wanted) <= 2e-6
    model.fuse_lora()
    model.unload_lora()
    assert not any(isinstance(module, SVDQLora) for module in model.modules())
    assert distance(nvfp4.run(model), wanted) <= 2e-6               # stays without the adapter
    assert distance(nvfp4.run(model), base) > 0.3
    model.load_lora_adapter(file, adapter_name="one")               # once more on top, and off again
    model.fuse_lora()
    assert distance(nvfp4.run(model), wanted) > 0.1
    other = copy.deepcopy(model)
    for one in (model, other):
        one.unfuse_lora()
        one.disable_lora()
        assert distance(nvfp4.run(one), wanted) <= 2e-6


def test_fused_and_off(nvfp4, model):
    """PEFT takes out what is fused where adapters are off."""
    base = nvfp4.run(nvfp4.load())
    model.fuse_lora()
    model.disable_lora()
    assert distance(nvfp4.run(model), base) <= 2e-6


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_numbers_that_change_behind_our_back(nvfp4, model, half, how):
    """By whoever edits PEFT's factors: seen with the next call of its API."""
    wanted = nvfp4.run(model)
    for module in model.modules():
        if isinstance(module, SVDQLora):
            factor = getattr(module, half)["one"]
            if how == "in place":
                factor.weight.mul_(2)
            else:
                factor.weight = torch.nn.Parameter(factor.weight * 2)
    model.set_adapters("one", STRENGTH)
    twice = nvfp4.run(model)
    assert distance(twice, wanted) > 0.1
    for module in model.modules():
        if isinstance(module, SVDQLora):
            getattr(module, half)["one"].weight.div_(2)
    model.set_adapters("one", STRENGTH)
    assert distance(nvfp4.run(model), wanted) <= 1e-6


def test_loras_move_with_the_bytes(nvfp4, model):
    wanted, before = nvfp4.run(model), {}
    for name, layer in layers(model).items():
        before[name] = None if layer.lora is None else layer.lora.data_ptr()
        layer._apply(lambda tensor: tensor.clone())
    assert any(before.values()) and torch.equal(nvfp4.run(model), wanted)
    assert all(layer.lora is None or layer.lora.data_ptr() != before[name] for name, layer in layers(model).items())


def test_unload(nvfp4, model):
    base = nvfp4.run(nvfp4.load())
    model.unload_lora()
    assert torch.equal(nvfp4.run(model), base)
    assert all(layer.lora is None and not layer.adapters for layer in layers(model).values())


def test_hotswap(nvfp4, model, file):
    """Other numbers under the same names: PEFT writes them where neither identity nor version of a tensor moves."""
    before = nvfp4.run(model)
    other = {key: tensor.flip(0) if ".lora_B." in key else tensor for key, tensor in load_file(file).items()}
    model.load_lora_adapter(dict(other), adapter_name="one", hotswap=True)
    fresh = nvfp4.load()
    fresh.load_lora_adapter(dict(other), adapter_name="one")
    model.set_adapters("one", STRENGTH)
    fresh.set_adapters("one", STRENGTH)
    assert distance(nvfp4.run(model), nvfp4.run(fresh)) <= ROUNDED      # older PEFT keeps another dtype in one of them
    assert distance(nvfp4.run(model), before) > 0.3


def test_more_rank_than_kernels_fuse(nvfp4):
    """Rank 150 beside the branch's own: what does not fit runs as a pair of matmuls."""
    model, twin, tensors = nvfp4.load(), dense_twin(nvfp4.load()), {}
    for i, name in enumerate(("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2",
                              "single_transformer_blocks.0.proj_out")):
        layer = model.get_submodule(name)
        tensors[f"transformer.{name}.lora_A.weight"] = noise(150, layer.in_features, seed=i) * 0.05
        tensors[f"transformer.{name}.lora_B.weight"] = noise(layer.out_features, 150, seed=-i - 1) * 0.05
    base = nvfp4.run(model)
    for one in (model, twin):
        one.load_lora_adapter(dict(tensors), adapter_name="wide")
    assert distance(nvfp4.run(model) - base, nvfp4.run(twin) - base) <= 5e-3


def test_biases_of_a_lora(nvfp4):
    tensors = {}
    for name, n in (("single_transformer_blocks.0.proj_mlp", 512), ("single_transformer_blocks.0.attn.to_k", 128)):
        for seed, (half, shape) in enumerate((("A.weight", (4, 128)), ("B.weight", (n, 4)), ("B.bias", (n,)))):
            tensors[f"transformer.{name}.lora_{half}"] = noise(*shape, seed=seed) * 0.1
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    base = nvfp4.run(model)
    for one in (model, twin):
        one.load_lora_adapter(dict(tensors), adapter_name="biased")
        one.set_adapters("biased", 0.5)
    assert distance(nvfp4.run(model) - base, nvfp4.run(twin) - base) <= 4e-3
    attention, x = model.single_transformer_blocks[0].attn, noise(1, 3, 128)
    rows = [attention.to_q(x), attention.to_k(x), attention.to_v(x)]        # one by one: each with its own bias
    assert torch.equal(torch.cat(rows, -1), attention.to_qkv(x))
    theirs = twin.single_transformer_blocks[0].attn
    assert distance(rows[1], theirs.to_k(x)) <= 4e-3 and distance(rows[0], theirs.to_q(x)) <= 1e-5
    with pytest.raises(LoraError, match="biases"):
        model.fuse_lora()


@pytest.mark.parametrize("names", [["one"], ["two"], None])
def test_some_are_fused(nvfp4, file, names):
    """While one is fused, PEFT computes no other beside it."""
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    for one in (model, twin):
        for name, sign in (("one", 1), ("two", -1)):
            one.load_lora_adapter({key: tensor * sign if ".lora_B." in key else tensor.flip(0)
                                   for key, tensor in load_file(file).items()}, adapter_name=name)
        one.set_adapters(["one", "two"], [0.5, 0.2])
        one.fuse_lora(adapter_names=names)
    assert distance(nvfp4.run(model), nvfp4.run(twin)) <= 4e-3


def test_loading_under_inference_mode(nvfp4, file, expected):
    model = nvfp4.load()
    with torch.inference_mode():
        model.load_lora_adapter(file, adapter_name="one")
        model.set_adapters("one", STRENGTH)
        found = nvfp4.run(model)
    assert distance(found, expected) <= ROUNDED and torch.equal(nvfp4.run(model), found)


def test_arguments_by_place(nvfp4, model):
    """All of them, the scale of a call among them."""
    given = nvfp4.inputs()
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
    model.set_adapters("one", 1.0)
    found = model(*(given[name] for name in names), {"scale": STRENGTH}).sample
    assert torch.equal(found, nvfp4.run(model, joint_attention_kwargs={"scale": STRENGTH}))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", None])
def test_a_scale_that_is_none(nvfp4, model, scale):
    """An error, and nothing of it stays."""
    wanted = nvfp4.run(model)
    with pytest.raises(LoraError, match="the scale in joint_attention_kwargs"):
        nvfp4.run(model, joint_attention_kwargs={"scale": scale})
    assert torch.equal(nvfp4.run(model), wanted)


def test_a_state_dict_into_a_model_with_a_lora(nvfp4, model):
    """Its branches are written anew, with the bytes that came."""
    wanted, other = nvfp4.run(model), copy.deepcopy(model)
    for layer in layers(other).values():
        layer.packed.data.copy_(layer.packed.roll(256))
    for name, parameter in other.named_parameters():
        if ".lora_" in name:
            parameter.data.mul_(3)
    other.load_state_dict(model.state_dict())
    assert distance(nvfp4.run(other), wanted) <= 1e-6


def test_copies_are_apart(nvfp4, model):
    wanted = nvfp4.run(model)
    other = copy.deepcopy(model)
    other.set_adapters("one", 0.1)
    assert not torch.equal(nvfp4.run(other), wanted)
    assert torch.equal(nvfp4.run(model), wanted)


def test_a_second_pass_writes_nothing(nvfp4, model, monkeypatch):
    nvfp4.run(model)
    monkeypatch.setattr(type(next(iter(layers(model).values()))), "adopt", lambda layer: pytest.fail("written again"))
    nvfp4.run(model)


def test_adapters_that_need_numbers_are_refused(nvfp4):
    for config, words in ((LoraConfig(target_modules=["to_q"], use_dora=True), "DoRA"),
                          (LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "pissa")):
        with pytest.raises(LoraError, match=words):
            nvfp4.load().add_adapter(config)
    for config in (OFTConfig(target_modules=["to_q"], oft_block_size=4), IA3Config(target_modules=["to_q"],
                                                                                   feedforward_modules=[])):
        with pytest.raises(LoraError, match="Use LoRA, LoKr or LoHa"):
            nvfp4.load().add_adapter(config)


def test_a_lora_per_item_is_refused(nvfp4, model):
    layer = model.get_submodule("transformer_blocks.0.ff.net.2")
    with pytest.raises(LoraError, match="once per LoRA"):
        layer(noise(1, 3, 512), adapter_names=["one"])
