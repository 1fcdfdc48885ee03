"""Training through PEFT: gradients are those of the weights that 4-bit numbers stand for, and what is trained is what runs."""

import pytest
import torch
from peft import HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.hf.inside.support import dense_twin, distance, layers, noise

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.2", "proj_mlp", "proj_out", "norm1.linear"]
CONFIGS = pytest.mark.parametrize("config", [LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
                                             LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
                                             LoKrConfig(r=4, alpha=4, target_modules=TARGETS),
                                             LoHaConfig(r=4, alpha=4, target_modules=TARGETS)],
                                  ids=["lora", "with biases", "lokr", "loha"])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_gradient_of_every_layer(nvfp4, dtype, tolerance):
    for name, layer in layers(nvfp4.load(dtype)).items():
        x, dy = noise(2, 5, layer.in_features).to(dtype).requires_grad_(), noise(2, 5, layer.out_features, seed=1).to(dtype)
        layer.bias.requires_grad_()
        with torch.enable_grad():
            layer(x).backward(dy)
        weight, _ = layer.dense(layer.packed)
        assert distance(x.grad, dy.float() @ weight) <= tolerance, name
        assert distance(layer.bias.grad, dy.float().sum((0, 1))) <= tolerance, name


def trained(nvfp4, model, config, steps=3):
    """({name: first gradient}, losses)"""
    torch.manual_seed(0)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():        # the same start, and no factor that is zero
        if parameter.requires_grad:
            parameter.data = noise(*parameter.shape, seed=len(name)) * 0.05
    mine = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, first, losses, wanted = torch.optim.SGD(mine.values(), 0.3), {}, [], noise(1, 12, 64, seed=9)
    with torch.enable_grad():
        for _ in range(steps):
            loss = (model(**nvfp4.inputs()).sample - wanted).square().mean()
            loss.backward()
            first = first or {name: parameter.grad.clone() for name, parameter in mine.items()}
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return first, losses


@CONFIGS
def test_like_a_dense_model(nvfp4, config):
    import copy
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    ours, our_losses = trained(nvfp4, model, copy.deepcopy(config))
    theirs, their_losses = trained(nvfp4, twin, copy.deepcopy(config))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert max(distance(ours[name], theirs[name]) for name in ours) <= 1e-4
    assert all(abs(one - other) <= 1e-4 * other for one, other in zip(our_losses, their_losses))
    assert our_losses[-1] < our_losses[0]
    # What is trained is what runs without gradients, in the branch
    assert distance(nvfp4.run(model), nvfp4.run(twin)) <= 2e-3
    with torch.enable_grad():
        assert distance(model(**nvfp4.inputs()).sample, nvfp4.run(model)) <= 2e-3


def test_what_is_trained_can_be_saved_and_loaded(nvfp4, tmp_path):
    model, fresh = nvfp4.load(), nvfp4.load()
    trained(nvfp4, model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    assert len(get_peft_model_state_dict(model, adapter_name="default")) > 20
    model.save_lora_adapter(tmp_path)
    fresh.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None)
    assert distance(nvfp4.run(fresh), nvfp4.run(model)) <= 2e-3         # in the branch, and beside it


def test_validation_between_steps_sees_the_newest_numbers(nvfp4):
    model = nvfp4.load()
    trained(nvfp4, model, LoraConfig(r=4, target_modules=TARGETS), steps=1)
    before = nvfp4.run(model)
    with torch.enable_grad():
        model(**nvfp4.inputs()).sample.square().mean().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                with torch.no_grad():
                    parameter -= 0.5 * parameter.grad
    after = nvfp4.run(model)
    assert distance(after, before) > 1e-3
    with torch.enable_grad():
        assert distance(model(**nvfp4.inputs()).sample, after) <= 2e-3


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_one_half_alone(nvfp4, half):
    """The other is frozen, as some recipes have it."""
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    for one in (model, twin):
        one.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
        for name, parameter in one.named_parameters():
            if ".lora_" in name:
                parameter.data = noise(*parameter.shape, seed=len(name)) * 0.05
                parameter.requires_grad_(half in name)
    grads = []
    with torch.enable_grad():
        for one in (model, twin):
            one(**nvfp4.inputs()).sample.square().mean().backward()
            grads.append({name: parameter.grad for name, parameter in one.named_parameters() if parameter.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    assert max(distance(grads[0][name], grads[1][name]) for name in grads[0]) <= 1e-4


def test_which_of_two_trains(nvfp4):
    """Frozen and thawed between forwards with gradients: each counts once."""
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    for one in (model, twin):
        for i, name in enumerate(("a", "b")):
            tensors = {f"transformer.single_transformer_blocks.0.{module}.lora_{half}.weight": noise(*shape, seed=seed + i)
                       for module, n in (("attn.to_q", 128), ("proj_mlp", 512))
                       for seed, (half, shape) in enumerate((("A", (4, 128)), ("B", (n, 4))))}
            one.load_lora_adapter(tensors, adapter_name=name)
        one.set_adapters(["a", "b"], [0.1, 0.1])
    for trains in ("ab", "a", "b", "", "b", "ab"):
        for one in (model, twin):
            for name, parameter in one.named_parameters():
                if ".lora_" in name:
                    parameter.requires_grad_(name.split(".")[-2] in trains)
        with torch.enable_grad():
            assert distance(model(**nvfp4.inputs()).sample, twin(**nvfp4.inputs()).sample) <= 4e-3, trains


def test_numbers_that_are_set_after_an_adapter_was_added(nvfp4):
    """As training scripts go on where they stopped, and averages of weights are put in."""
    model, twin = nvfp4.load(), dense_twin(nvfp4.load())
    for one in (model, twin):
        one.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    nvfp4.run(model)
    state = {name: noise(*tensor.shape, seed=len(name)) * 0.1 for name, tensor in get_peft_model_state_dict(model).items()}
    for one in (model, twin):
        set_peft_model_state_dict(one, dict(state))
    assert distance(nvfp4.run(model), nvfp4.run(twin)) <= 1e-5
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            if ".lora_" in name:
                parameter.data.copy_(parameter.data * 2)        # moves no version
    assert distance(nvfp4.run(model), nvfp4.run(twin)) <= 1e-5


@pytest.mark.parametrize("config", [LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
                                    HRAConfig(r=4, target_modules=["ff.net.2"])], ids=["dora", "hra"])
def test_who_asks_for_the_weights_finds_nan(nvfp4, config):
    """By a door that is not ours."""
    found = get_peft_model(nvfp4.load(), config)(**nvfp4.inputs()).sample
    assert found.isnan().any()


def test_adapters_in_fp32_beside_a_model_in_bf16(nvfp4):
    model = nvfp4.load(torch.bfloat16)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = noise(*parameter.shape, seed=len(name)) * 0.05
    with torch.enable_grad():
        out = model(**nvfp4.inputs(torch.bfloat16)).sample
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and distance(out, nvfp4.run(model, torch.bfloat16)) <= 2e-2


def test_gradient_checkpointing(nvfp4):
    model, plain = nvfp4.load(), nvfp4.load()
    model.enable_gradient_checkpointing()
    model.train()
    config = LoraConfig(r=4, target_modules=TARGETS)
    ours, theirs = trained(nvfp4, model, config, 1)[0], trained(nvfp4, plain, LoraConfig(r=4, target_modules=TARGETS), 1)[0]
    assert max(distance(ours[name], theirs[name]) for name in ours) <= 1e-5


def test_a_target_that_is_none(nvfp4):
    """An error, after which another adapter can be added."""
    model = nvfp4.load()
    with pytest.raises(ValueError, match="Target modules"):
        model.add_adapter(LoraConfig(target_modules=["nothing"]))
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))


def test_an_adapter_of_training_cannot_be_fused_unless_it_is_plain(nvfp4):
    model = nvfp4.load()
    model.add_adapter(LoKrConfig(r=4, target_modules=TARGETS))
    with pytest.raises(LoraError, match="LoKr"):
        model.fuse_lora()
