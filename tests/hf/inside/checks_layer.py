"""Our layers in diffusers' own FLUX compute what the golden files say, alone, moved, copied, saved and as rows."""

import copy
import io
import pickle

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.hf.layer import SVDQLinear, SVDQRows
from svdq_pack.svdq.kernels import registry
from svdq_pack.tests.hf.inside.support import GOLDEN, dense_twin, distance, layers, noise, random_model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, GOLDEN), (torch.bfloat16, 1.5e-2)])
def test_weight_only(golden_model, dtype, tolerance):
    model = golden_model.load(dtype)
    assert isinstance(model, FluxTransformer2DModel) and model.dtype == dtype and not model.training
    assert distance(golden_model.run(model, dtype), golden_model.io["weight_only.out"]) <= tolerance


def test_quantised_activations(golden_model):
    model = golden_model.load(act_bits=None)
    with registry.using("reference"):
        assert distance(golden_model.run(model), golden_model.io["act_quant.out"]) <= 5e-2


def test_every_layer_alone(golden_model):
    """Against the golden probes, which say what one slot makes of one input."""
    model, shape = golden_model.load(), None
    shape = flux1.Shape(model.config.num_attention_heads * 128, model.config.num_layers, model.config.num_single_layers,
                        model.config.in_channels, model.config.joint_attention_dim, model.config.pooled_projection_dim,
                        model.config.guidance_embeds)
    inputs, outputs = {}, {}
    for place in shape.diffusers_places():                  # of proj_out two slots add up, side by side
        x, y = (golden_model.io[f"probe.{place.slot.module}.{end}"] for end in "xy")
        inputs[place.layer] = torch.cat([inputs[place.layer], x]) if place.layer in inputs else x
        outputs[place.layer] = outputs.get(place.layer, 0) + y
    assert inputs.keys() == layers(model).keys()
    for name, layer in layers(model).items():
        assert distance(layer(inputs[name][None])[0], outputs[name]) <= 1e-5, name


def test_like_a_dense_twin(tmp_path):
    """diffusers' own model with the same numbers, one by one."""
    model = random_model(tmp_path)
    twin = dense_twin(model)
    given = dict(hidden_states=noise(2, 12, 64), encoder_hidden_states=noise(2, 5, 128, seed=1),
                 timestep=torch.tensor([0.5, 0.2]), pooled_projections=noise(2, 64, seed=2),
                 guidance=torch.tensor([3.5, 1.0]), img_ids=noise(12, 3, seed=3).round(), txt_ids=torch.zeros(5, 3))
    assert distance(model(**given).sample, twin(**given).sample) <= 2e-6


def test_rows_are_those_of_the_fused_layer(golden_model):
    model = golden_model.load()
    seen = 0
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        attention = block.attn
        assert attention.fused_projections
        for fused, parts in flux1.DIFFUSERS_ROWS.items():
            if hasattr(attention, fused):
                x = noise(2, 3, model.inner_dim)
                alone = [getattr(attention, part)(x) for part in parts]
                assert all(type(getattr(attention, part)) is SVDQRows for part in parts)
                assert torch.equal(torch.cat(alone, -1), getattr(attention, fused)(x))
                seen += 1
    assert seen == 2 * len(model.transformer_blocks) + len(model.single_transformer_blocks)


def test_a_weight_has_a_shape_and_no_memory(nvfp4):
    model = nvfp4.load()
    for name, module in model.named_modules():
        if isinstance(module, (SVDQLinear, SVDQRows)):
            assert module.weight.shape == (module.out_features, module.in_features), name
            assert module.weight.untyped_storage().nbytes() <= 4 * module.out_features * 4
            with pytest.raises(RuntimeError, match="memory"):
                module.weight.data += torch.ones_like(module.weight)
            with pytest.raises((AttributeError, TypeError, KeyError)):
                module.weight = torch.nn.Parameter(torch.zeros(1))


def test_only_bytes_and_biases_are_parameters(nvfp4):
    model, stored = nvfp4.load(torch.bfloat16), load_file(nvfp4.path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size <= sum(tensor.nbytes for tensor in stored.values()) + 300 * len(layers(model)) * 8      # aligned to 256
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)                          # bytes cannot, and do not stand in the way
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("cast, dtype", [(lambda model: model.to(torch.bfloat16), torch.bfloat16),
                                         (lambda model: model.half(), torch.float16),
                                         (lambda model: model.float(), torch.float32)],
                         ids=["bfloat16", "half", "float"])
def test_casting_leaves_bytes_alone(nvfp4, cast, dtype):
    model = nvfp4.load(torch.float32)
    before = {name: layer.packed.clone() for name, layer in layers(model).items()}
    assert cast(model).dtype == dtype
    assert all(torch.equal(layer.packed, before[name]) for name, layer in layers(model).items())
    assert distance(nvfp4.run(model, dtype), nvfp4.io["weight_only.out"]) <= 1.5e-2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(nvfp4, copied):
    model = nvfp4.load()
    wanted = nvfp4.run(model)
    other = copied(model)
    assert torch.equal(nvfp4.run(other), wanted)
    for name, layer in layers(other).items():
        assert layer.packed.data_ptr() != layers(model)[name].packed.data_ptr()
        assert not layer.parts or layer.parts[0] is other.get_submodule(name.rpartition(".")[0])    # its own attention


def test_state_dict_there_and_back(nvfp4):
    model, other = nvfp4.load(), nvfp4.load()
    for parameter in other.parameters():
        parameter.data.zero_()
    state = model.state_dict()
    assert not any(name.endswith((".to_q.weight", ".to_qkv.weight")) for name in state)
    assert state["transformer_blocks.0.attn.to_q.weight"].shape == (128, 128)       # asked for, it has a shape
    with pytest.raises(KeyError):
        state["transformer_blocks.0.attn.to_nothing.weight"]
    assert other.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(nvfp4.run(other), nvfp4.run(model))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert type(torch.load(file)).__name__ == "OrderedDict"         # plain, and loads where only tensors may


@pytest.mark.parametrize("act_bits", [16, None])
def test_autocast(golden_model, act_bits):
    model = golden_model.load(act_bits=act_bits)
    with torch.autocast("cpu", torch.bfloat16):
        out = golden_model.run(model)
    assert distance(out, golden_model.io["weight_only.out"]) <= (1.8e-2 if act_bits is None else 1.5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        layer = layers(model)["transformer_blocks.0.ff.net.2"]
        assert layer(noise(1, 3, layer.in_features)).dtype == torch.bfloat16


def test_a_wrong_input_is_said(nvfp4):
    layer = layers(nvfp4.load())["transformer_blocks.0.attn.to_qkv"]
    with pytest.raises(ValueError, match=r"The layer has 128 inputs"):
        layer(noise(1, 3, 64))
