"""ComfyUI's own 'Train LoRA' on an SVDQ model, gradients against the dequantised weights, and the LoRA that comes out."""

import inspect
import math

import pytest
import torch

from svdq_pack.nodes.host import training
from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.comfy.inprocess import adapters
from svdq_pack.tests.comfy.inprocess.support import distance, noise, sample, with_lora

import comfy.model_management       # noqa: E402, comes from the tree that support has chosen
import comfy.ops                    # noqa: E402
import nodes                        # noqa: E402
from comfy_extras import nodes_train        # noqa: E402

FLOAT = 2e-5


@pytest.fixture(autouse=True)
def core(monkeypatch):
    """ComfyUI's training nodes, as it finds them when it starts."""
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TrainLoraNode", nodes_train.TrainLoraNode)
    monkeypatch.setattr(nodes_train, "_create_weight_adapter", nodes_train._create_weight_adapter)     # undone afterwards


@pytest.fixture(params=["int4", "nvfp4"])
def model(request, make_model):
    return make_model(request.param).load()


def train(patcher, **changes):
    """What 'Train LoRA' gives for four noisy pictures of one prompt: (LoRA, losses)."""
    params = patcher.model.diffusion_model.params
    prompt = [[noise(1, 7, params.context_in_dim, seed=1), {"pooled_output": noise(1, params.vec_in_dim, seed=2),
                                                            "guidance": 3.5}]]
    settings = {"batch_size": 1, "steps": 12, "grad_accumulation_steps": 1, "learning_rate": 5e-3, "rank": 4,
                "optimizer": "AdamW", "loss_function": "MSE", "seed": 3, "training_dtype": "fp32", "lora_dtype": "fp32",
                "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
                "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": True} | changes
    wanted = inspect.signature(nodes_train.TrainLoraNode.execute).parameters
    torch.manual_seed(0)
    with torch.inference_mode(), torch.enable_grad():
        lora, losses, *_ = nodes_train.TrainLoraNode.execute(
            model=[patcher], latents=[{"samples": noise(1, 16, 8, 8, seed=5)}], positive=[prompt],
            **{name: [value] for name, value in settings.items() if name in wanted}).args
    return lora, losses["loss"]


def adapters_for(patcher, kind):
    """Of every layer that has a name in `adapters`; of more rank than fits into a branch, with a scale of outputs, or small."""
    file, layers = {}, patcher.layers()
    for layer in adapters.LAYERS.values():
        if layer.key in layers:
            weight = layers[layer.key].dense(layers[layer.key].weight)[0]
            wide = {"rank": 140} if kind == "wide" else {}
            file |= adapters.make("dora_out" if kind == "dora" else "lora", layer, weight, **wide)
    return file


@pytest.mark.parametrize("kind", [None, "lora", "wide", "dora"])
def test_gradients(kind, model):
    """Of a layer's input and bias, without and with a LoRA, against the weights as numbers."""
    changed = model if kind is None else with_lora(model, adapters_for(model, kind))
    comfy.model_management.load_models_gpu([changed])
    layers = [layer for layer in changed.layers().values() if layer.factors is not None]
    assert bool(layers) == bool(kind)
    if kind == "wide":
        assert any(down is not None for layer in layers for down, _ in layer.views(layer.weight).pairs)
    if kind == "dora":
        assert any(layer.views(layer.weight).scale is not None for layer in layers)
    for key, layer in changed.layers().items():
        x = noise(2, 3, layer.in_features).requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()
        dy = noise(2, 3, layer.out_features, seed=1)
        with torch.enable_grad():
            layer.forward_for_training(x, layer.weight, bias).backward(dy)
        assert distance(x.grad, dy @ layer.dense_with_lora(layer.weight)[0]) < FLOAT, key
        assert kind is None or layer.factors is None or distance(x.grad, dy @ layer.dense(layer.weight)[0]) > 1e-3, key
        assert distance(bias.grad, dy.sum((0, 1))) < FLOAT, key


@pytest.mark.parametrize("changes", [
    {}, {"bypass_mode": False}, {"bypass_mode": False, "offloading": True}, {"offloading": True, "checkpoint_depth": 3},
    {"training_dtype": "bf16", "lora_dtype": "bf16"}, {"algorithm": "LoKr"}, {"algorithm": "LoHa", "bypass_mode": False},
    {"algorithm": "OFT"},
], ids=str)
def test_training(changes, model):
    """The loss falls, in both of the ways that ComfyUI has, and every 4-bit layer takes part."""
    lora, losses = train(model, **changes)
    assert min(losses[-3:]) < 0.97 * losses[0], losses
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in losses)
    for key, layer in model.layers().items():
        parts = {name: tensor for name, tensor in lora.items() if name.startswith(key.removesuffix("weight"))}
        assert len(parts) > 1 and all(torch.isfinite(tensor).all() for tensor in parts.values()), key
        if changes.get("algorithm", "LoRA") == "LoRA":
            up, down = (parts[f"{key.removesuffix('weight')}lora_{name}.weight"] for name in ("up", "down"))
            assert up.shape == (layer.out_features, 4) and down.shape == (4, layer.in_features)
            assert up.any() and down.any(), key


def test_default_on_a_cpu(make_model):
    """Without a wish, activations are rounded to 8 bits, on the way forward alone; a training is none the worse."""
    model = make_model("int4").load(act_bits=None)
    comfy.model_management.load_models_gpu([model])
    for key, layer in model.layers().items():
        x, dy = noise(2, 3, layer.in_features), noise(2, 3, layer.out_features, seed=1)
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            y = layer(leaf)
            y.backward(dy)
        assert torch.equal(y, layer(x)), key
        assert distance(leaf.grad, dy @ layer.dense(layer.weight)[0]) < FLOAT, key
    _, losses = train(model)
    assert min(losses[-3:]) < 0.97 * losses[0], losses
    assert losses == pytest.approx(train(make_model("int4").load())[1], rel=0.05)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bypass", [True, False])
def test_every_loss_is_that_of_the_stock_model(bypass, lora, make_model, tmp_path):
    """Step by step: noise levels differ more than training does, so a loss that falls tells little."""
    case = make_model("int4")
    ours, stock = case.load(), case.stock(tmp_path)
    if lora:
        file = adapters_for(ours, "lora")
        file = {key: 5 * tensor if "up" in key else tensor for key, tensor in file.items()}
        ours, stock = with_lora(ours, file), with_lora(stock, file)
    found, wanted = (train(patcher, bypass_mode=bypass, steps=6)[1] for patcher in (ours, stock))
    assert found == pytest.approx(wanted, rel=1e-3 if lora else 1e-4)      # ours rounds the LoRA's factors to bf16


def test_bias_alone(model):
    """Its gradient does not need one of x."""
    for key, layer in model.layers().items():
        layer.bias.requires_grad_(True)
        with torch.enable_grad():
            layer(noise(2, 3, layer.in_features)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 6)), key
        layer.bias.requires_grad_(False)
        layer.bias.grad = None


def test_autocast(model):
    """As torch's linear has it: half precision in, half precision out, the gradient in the dtype of x."""
    layer = next(iter(model.layers().values()))
    x = noise(2, layer.in_features).requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_weight_functions_keep_no_weights(model):
    """For the way back only what came in is kept: all layers as numbers are the 16-bit model."""
    layer, kept = next(iter(model.layers().values())), []
    layer.weight_function = [lambda weight: weight * 2]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        layer(noise(2, layer.in_features).requires_grad_())
    assert max(kept, default=0) <= 2 * layer.in_features


def test_weight_functions_survive_a_failed_transfer(model, monkeypatch):
    """The device is out of memory: what hangs on the layer still does."""
    layer, function = next(iter(model.layers().values())), lambda weight: weight

    def fail(*args, **kwargs):
        raise MemoryError

    layer.weight_function = [function]
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", fail)
    with pytest.raises(MemoryError):
        layer(noise(2, layer.in_features))
    assert layer.weight_function == [function]


def test_the_model_is_left_alone(model):
    """What was trained on is the model it was, bit for bit, and no gradient or hook stays behind."""
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    pictures = sample(model), train(model, steps=1), sample(model)
    assert torch.equal(pictures[0], pictures[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert not any(layer.weight_function or layer.bias_function for layer in model.layers().values())


@pytest.mark.parametrize("bypass", [True, False])
def test_what_was_trained_is_what_loads(bypass, make_model, tmp_path):
    """By the stock node, on our model and on the 16-bit one: the same change, which is what training saw."""
    case = make_model("int4")
    ours, stock = case.load(), case.stock(tmp_path)
    lora, losses = train(ours, bypass_mode=bypass, steps=8)
    file = {name: tensor.detach() for name, tensor in lora.items()}
    changed = [sample(with_lora(patcher, file, 1.0)) - sample(patcher) for patcher in (ours, stock)]
    assert changed[1].std() > 1e-3
    assert distance(*changed) < 2e-2
    _, again = train(with_lora(ours, file, 1.0), bypass_mode=bypass, steps=1)
    assert again[0] < losses[0]


def test_training_goes_on(model, folders, monkeypatch):
    """From a file of an earlier training: its loss, not that of the beginning."""
    import folder_paths
    from safetensors.torch import save_file
    lora, losses = train(model)
    save_file({name: tensor.contiguous() for name, tensor in lora.items()}, folders / "me_12_steps_x.safetensors")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(folders / name))
    _, more = train(model, existing_lora="me_12_steps_x.safetensors", steps=1)
    assert more[0] < losses[0]


def test_other_ways_of_training_are_refused(model, monkeypatch):
    """A ComfyUI whose node asks for shapes elsewhere: one sentence before anything is trained."""
    monkeypatch.setattr(training, "_FUNCTION", "_another")
    monkeypatch.setattr(nodes_train, "_create_weight_adapter", inspect.unwrap(nodes_train._create_weight_adapter))
    training.teach()
    with pytest.raises(LoraError, match="trains LoRAs in a way this pack does not know yet"):
        train(model)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": False}, {"checkpoint_depth": 4}, {"checkpoint_depth": 5}],
                         ids=str)
def test_training_that_flux_cannot_do(changes, make_model, tmp_path):
    """One sentence before it starts, where the stock model fails inside."""
    case = make_model("int4")
    with pytest.raises(LoraError, match="^FLUX trains with gradient_checkpointing on and checkpoint_depth 1 to 3 only"):
        train(case.load(), steps=1, **changes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(case.stock(tmp_path), steps=1, **changes)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depths(depth, model):
    assert math.isfinite(train(model, steps=1, checkpoint_depth=depth)[1][0])


def test_others_are_not_touched(make_model, tmp_path):
    """The stock model trains as it did."""
    stock = make_model("int4").stock(tmp_path)
    losses = [train(stock, steps=3)[1]]
    monkey = nodes_train._create_weight_adapter
    nodes_train._create_weight_adapter = inspect.unwrap(monkey)
    losses.append(train(stock, steps=3)[1])
    nodes_train._create_weight_adapter = monkey
    assert losses[0] == losses[1]
