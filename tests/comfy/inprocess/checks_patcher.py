"""What ComfyUI and other nodes do with a MODEL once it is loaded: offload, clone, patch, hook, merge, compile, save."""

import asyncio
import inspect
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.nodes.host import lora as host_lora
from svdq_pack.nodes.host.patcher import SVDQPatcher
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.comfy.inprocess.support import GOLDEN, ROUNDED, STRENGTH, distance, hooks, sample, with_lora

import comfy.model_management   # noqa: E402, comes from the tree that support has chosen
import comfy.model_patcher      # noqa: E402
import comfy.sd                 # noqa: E402

CPU = torch.device("cpu")
LAYER = "diffusion_model.double_blocks.0.img_mlp.0.weight"
LORAS = ["peft", "kohya_bfl"]


@pytest.fixture
def lora(golden):
    """lora(name) -> the tensors of a golden LoRA."""
    return lambda name: golden(f"lora_model_nvfp4_flux_dev_like_{name}")


# ---- memory

def test_partial_loading(case):
    """In every state of loading the same bits come out, and the counters know the packed bytes."""
    patcher = case.load()
    size, expected = patcher.model_size(), case.run(patcher)
    patcher.detach()
    assert patcher.loaded_size() == 0

    def check(loaded):
        assert loaded(patcher.loaded_size()), patcher.loaded_size()
        assert torch.equal(case.network(patcher), expected)

    patcher.partially_load(CPU, size // 3)
    check(lambda bytes: 0 < bytes < size / 2)
    offloaded = [module for module in patcher.model.modules() if hasattr(module, "prev_comfy_cast_weights")]
    assert offloaded and patcher.model.model_lowvram
    patcher.partially_load(CPU, size // 3)
    check(lambda bytes: size / 3 < bytes < size)
    patcher.partially_unload(CPU, size // 3)
    check(lambda bytes: 0 < bytes < size * 0.67)
    patcher.partially_load(CPU, 2 * size)
    check(lambda bytes: bytes == size)
    patcher.detach()
    check(lambda bytes: bytes == 0)
    patcher.partially_load(CPU, 1)                      # nothing fits
    check(lambda bytes: bytes < size / 10)
    patcher.unpatch_model(CPU)
    check(lambda bytes: bytes == 0)


def test_model_size_is_that_of_the_file(make_model):
    model = make_model(hidden=256, depth=1, depth_single=2, context_dim=256, vec_dim=128)
    assert model.load(torch.bfloat16).model_size() == pytest.approx(Checkpoint(model.path).nbytes, rel=0.02)


@pytest.mark.parametrize("name", LORAS)
def test_partial_loading_with_lora(dev, lora, name, tmp_path):
    """A LoRA works for layers that stay behind too, and for those that leave later; ComfyUI counts its bytes."""
    patcher, expected = with_lora(dev.load(), lora(name)), dev.run(with_lora(dev.load(), lora(name)))
    size, plain = patcher.model_size(), dev.load().model_size()
    # ComfyUI, with models of its own too, patches a layer twice that one partial load took and the next left behind. At
    # these sizes it does not.
    for step, loaded in ((lambda: patcher.partially_load(CPU, size * 44 // 100), size * 44 // 100),
                         (lambda: patcher.partially_load(CPU, size * 30 // 100), size),
                         (lambda: patcher.partially_load(CPU, 2 * size), size),
                         (lambda: patcher.partially_unload(CPU, size // 2), size)):
        step()
        assert 0 < patcher.loaded_size() <= loaded
        assert distance(dev.network(patcher), expected) <= 2e-6
    added = sum(layer.lora.nbytes for layer in patcher.layers().values() if layer.lora is not None)
    assert added and size == plain + added == comfy.model_management.module_size(patcher.model)


def test_other_dtypes_leave_the_bytes_alone(dev):
    """Third parties call model.to(dtype)."""
    patcher = dev.load()
    before = patcher.model.get_parameter(LAYER).clone()
    patcher.model.to(torch.bfloat16)
    assert patcher.model.get_parameter(LAYER).dtype == torch.uint8
    assert torch.equal(patcher.model.get_parameter(LAYER), before)
    assert distance(dev.run(patcher, torch.bfloat16), dev.io["weight_only.out_latent"]) <= 1.5e-2


# ---- clones, saving, merging

def test_clone(dev, lora):
    patcher = dev.load()
    clone = patcher.clone()
    assert type(clone) is type(patcher) and isinstance(clone, SVDQPatcher)
    assert isinstance(clone, comfy.model_patcher.ModelPatcher)
    assert clone.model is patcher.model and clone.is_clone(patcher)
    assert clone.cached_patcher_init == patcher.cached_patcher_init
    clone.set_model_attn1_patch(lambda q, k, v, **rest: (q, k, v))
    changed = with_lora(clone, lora("peft"))
    assert isinstance(changed, SVDQPatcher) and changed.patches
    assert not clone.patches and not patcher.patches
    assert patcher.model_options == {"transformer_options": {}}


def test_made_anew(dev):
    """ComfyUI makes the model again from cached_patcher_init when it needs one of its own."""
    patcher = dev.load()
    load, arguments = patcher.cached_patcher_init[:2]
    again = load(*arguments, disable_dynamic=True)
    assert isinstance(again, SVDQPatcher) and again.model is not patcher.model
    assert torch.equal(dev.run(again), dev.run(patcher))


def test_multigpu_clone(dev, lora):
    patcher = with_lora(dev.load(), lora("peft"))
    if not hasattr(patcher, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no multi-GPU clones")
    copy = patcher.deepclone_multigpu(CPU)
    assert isinstance(copy, SVDQPatcher) and copy.model is not patcher.model
    assert torch.equal(dev.run(copy), dev.run(patcher))


def test_saving_is_refused(dev, lora):
    patcher = dev.load()
    for lowvram in (0, 1):
        patcher.partially_load(CPU, lowvram)
        with pytest.raises(RuntimeError, match="cannot be saved by 'Save Model'.*dequantize FILE OUT`"):
            patcher.state_dict_for_saving()
    with pytest.raises(RuntimeError, match="cannot be saved"):
        with_lora(patcher, lora("peft")).partially_load(CPU, 1e9, force_patch_weights=True)
    assert distance(dev.run(patcher), dev.io["weight_only.out_latent"]) <= GOLDEN         # and the model survives


def test_merge_with_ours_as_target(dev, tmp_path):
    """ModelMergeSimple with an SVDQ model first: our message, and the model is usable again."""
    patcher = dev.load()
    merged = patcher.clone()
    merged.add_patches(dev.stock(tmp_path).get_key_patches("diffusion_model."), 0.5, 0.5)
    with pytest.raises(RuntimeError, match="target of a model merge.*source of a merge"):
        comfy.model_management.load_models_gpu([merged])
    assert distance(dev.run(patcher), dev.io["weight_only.out_latent"]) <= GOLDEN


def test_subtraction_from_ours(dev, tmp_path):
    """What a LoRA is to be extracted from: the same message, whoever asks; the other way round it works."""
    from comfy_extras.nodes_model_merging import ModelSubtract
    ours, stock = dev.load(), dev.stock(tmp_path)
    difference, = ModelSubtract().merge(ours, stock, 1.0)
    with pytest.raises(RuntimeError, match="nor the first model of a subtraction.*dequantize FILE OUT`"):
        comfy.model_management.load_models_gpu([difference])
    nothing, = ModelSubtract().merge(stock, ours, 1.0)
    comfy.model_management.load_models_gpu([nothing])
    for key in ours.layers():
        assert nothing.model.state_dict()[key].abs().max() < 1e-5, key


@pytest.mark.parametrize("loaded", [False, True])
def test_merge_with_ours_as_source(case, tmp_path, loaded):
    """A 16-bit model replaced by 100% of ours computes what ours computes, the shift of unsigned layers included."""
    ours, target = case.load(), case.stock(tmp_path)
    if loaded:
        ours.partially_load(CPU, ours.model_size() // 2)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.mul_(0.5)
    damaged = case.run(target)
    patches = ours.get_key_patches("diffusion_model.")
    weight, convert = patches[LAYER][0]
    assert convert(weight.float(), inplace=True).shape == target.model.get_parameter(LAYER).shape
    merged = target.clone()
    merged.add_patches(patches, 1.0, 0.0)
    assert distance(case.run(merged), case.io["weight_only.out_latent"]) <= GOLDEN
    assert distance(damaged, case.io["weight_only.out_latent"]) > 0.1


# ---- LoRA

@pytest.mark.parametrize("name", LORAS)
def test_golden_factors(dev, lora, name):
    """Appended to the low-rank branch, bit for bit as the original tools do it."""
    patcher = with_lora(dev.load(), lora(name))
    comfy.model_management.load_models_gpu([patcher])
    golden, modules = lora("expected"), patcher.model.diffusion_model
    block, single = modules.double_blocks[0], modules.single_blocks[0]
    tiles = {"transformer_blocks.0.qkv_proj": (block.img_attn.qkv, 0), "transformer_blocks.0.mlp_fc2": (block.img_mlp[2], 0),
             "single_transformer_blocks.0.qkv_proj": (single.linear1, 0),
             "single_transformer_blocks.0.out_proj": (single.linear2, 0),
             "single_transformer_blocks.0.mlp_fc2": (single.linear2, 1)}
    pairs = {"transformer_blocks.0.norm1.linear": (block.img_mod.lin, 6),
             "single_transformer_blocks.0.norm.linear": (single.modulation.lin, 3)}
    expected = {key.split(".", 1)[1]: value for key, value in golden.items() if key.startswith("packed.")}
    assert {key.rpartition(".")[0] for key in expected} == tiles.keys() | pairs.keys()
    for module, (layer, tile) in tiles.items():
        branch = layer.factors.sections.view(layer.lora)[tile]
        assert torch.equal(branch.proj_down, expected[f"{module}.lora_down"]), module
        assert torch.equal(branch.proj_up, expected[f"{module}.lora_up"]), module
        assert branch.down is None and branch.up is None
    for module, (layer, chunks) in pairs.items():       # theirs have their rows interleaved and their rank padded
        branch, = layer.factors.sections.view(layer.lora)
        up = branch.up.view(chunks, -1, branch.up.shape[1]).transpose(0, 1).flatten(0, 1)
        assert torch.equal(pad(branch.down.t(), 0, (0, 12)).t(), expected[f"{module}.lora_down"]), module
        assert torch.equal(pad(up, 0, (0, 12)), expected[f"{module}.lora_up"]), module


def pad(factor, value, by):
    return torch.nn.functional.pad(factor, by, value=value)


@pytest.mark.parametrize("name", LORAS)
def test_lora(dev, lora, name, tmp_path, caplog):
    """Stock loader, golden result; strength 0 and going back are bitwise."""
    patcher = dev.load()
    before, golden = dev.run(patcher), lora("expected")["weight_only.out_latent"]
    with caplog.at_level(logging.WARNING):
        changed = with_lora(patcher, lora(name))
    assert "not loaded" not in caplog.text
    out = dev.run(changed)
    assert distance(out, golden) <= ROUNDED
    assert distance(out - before, golden - before) <= ROUNDED
    assert distance(out, dev.run(with_lora(dev.stock(tmp_path), lora(name)))) <= ROUNDED
    # The golden result has the factors of unquantised layers rounded to bf16 too. Rounded alike, it is the same.
    for key, patches in changed.patches.items():
        if key not in changed.layers():
            (strength, adapter, _, _, function), = patches
            alpha = adapter.weights[2]
            up, down = adapter.weights[0].float(), adapter.weights[1].float()
            up = up if alpha is None else up * (alpha / len(down))
            delta = up @ (down * strength).bfloat16().float()
            weight = patcher.model.get_parameter(key)
            weight.copy_(changed.backup[key].weight + (delta if function is None else function(delta)))
    assert distance(dev.network(changed), golden) <= GOLDEN
    assert torch.equal(dev.run(patcher), before)
    assert torch.equal(dev.run(with_lora(patcher, lora(name), 0.0)), before)
    assert torch.equal(dev.run(changed), out)
    changed.detach()
    assert torch.equal(dev.network(patcher), before)


def test_lora_in_bfloat16(dev, lora):
    patcher = with_lora(dev.load(torch.bfloat16), lora("peft"))
    assert distance(dev.run(patcher, torch.bfloat16), lora("expected")["weight_only.out_latent"]) <= 1.5e-2


def test_two_clones_with_different_loras(dev, lora, tmp_path):
    """Taking turns, each is what it is alone, bit for bit, and what stock FLUX is with the same LoRAs."""
    def variants(patcher):
        strong = with_lora(patcher, lora("peft"), 1.5)
        both = with_lora(strong, lora("kohya_bfl"), 0.25)
        return [strong, with_lora(patcher, lora("kohya_bfl"), -0.5), both, patcher]

    stock = [dev.run(patcher) for patcher in variants(dev.stock(tmp_path))]
    assert all(distance(a, b) > 1e-2 for i, a in enumerate(stock) for b in stock[:i])
    alone = [dev.run(variants(dev.load())[i]) for i in range(4)]
    mine = variants(dev.load())
    for i in (0, 1, 2, 3, 1, 0, 3, 2):
        out = dev.run(mine[i])
        assert torch.equal(out, alone[i]) and distance(out, stock[i]) <= ROUNDED, i


def test_strength_is_rewritten_in_place(dev, lora):
    """Another strength, another LoRA node, the same file: the factors stay where they are, and no weight is moved."""
    patcher, tensors = dev.load(), lora("peft")
    dev.run(with_lora(patcher, tensors, 0.5))
    layers = {key: layer for key, layer in patcher.layers().items() if layer.factors}
    places = {key: (id(layer.factors), layer.lora.data_ptr(), layer.weight.data_ptr()) for key, layer in layers.items()}
    for strength in (1.0, -0.25, 0.5):
        again = with_lora(patcher, tensors, strength)
        out = dev.run(again)
        assert again.loaded_size() == again.model_size() > dev.load().model_size()
        assert {key: (id(layer.factors), layer.lora.data_ptr(), layer.weight.data_ptr())
                for key, layer in layers.items()} == places
        assert torch.equal(out, dev.run(with_lora(dev.load(), tensors, strength)))


def test_loads_anew_where_more_than_our_layers_differs(dev, lora):
    """A LoRA on quantised layers alone changes in place, whatever stands between: others' patches, wrappers, hooks."""
    tensors = {key: value for key, value in lora("peft").items() if "_blocks" in key}
    patcher, loads = dev.load(), []
    original = comfy.model_patcher.ModelPatcher.load

    def counted(self, *args, **kwargs):
        loads.append(self)
        return original(self, *args, **kwargs)

    def run(changed):
        loads.clear()
        return dev.run(changed), len(loads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_patcher.ModelPatcher, "load", counted)
        plain = run(patcher)
        first, second = with_lora(patcher, tensors, 0.5), with_lora(patcher, tensors, 1.5)
        with_img_in = with_lora(first, lora("peft"), 0.25)
        assert [run(one)[1] for one in (first, second, patcher, second, with_img_in, with_img_in)] == [0, 0, 0, 0, 1, 0]
        assert torch.equal(run(patcher)[0], plain[0])
        assert torch.equal(run(second)[0], dev.run(with_lora(dev.load(), tensors, 1.5)))
        wrapped = second.clone()
        wrapped.add_weight_wrapper(LAYER, lambda weight: weight * 0.5)
        wrapped.patches_uuid = object()
        assert run(wrapped)[1] == 1 and run(first)[1] == 1
        assert torch.equal(run(patcher)[0], plain[0])
    sample(patcher, steps=2, hooks=hooks(tensors, (0.0, 0.75)))
    assert torch.equal(dev.run(first), dev.run(with_lora(dev.load(), tensors, 0.5)))


def test_interrupted_between_layers(dev, lora, monkeypatch):
    """While LoRAs are exchanged: no layer keeps one of the next model."""
    tensors = {key: value for key, value in lora("peft").items() if "_blocks" in key}
    patcher = dev.load()
    first, second = with_lora(patcher, tensors, 0.5), with_lora(patcher, tensors, 1.5)
    expected, seen, changes = dev.run(first), [], host_lora.changes

    def stop(layer, key, *rest):
        seen.append(key)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return changes(layer, key, *rest)

    monkeypatch.setattr(host_lora, "changes", stop)
    with pytest.raises(KeyboardInterrupt):
        dev.run(second)
    monkeypatch.undo()
    assert torch.equal(dev.run(first), expected)


def test_strength_zero_keeps_the_packed_path(dev, lora):
    """A LoRA at strength 0 (a hook between its keyframes, say) costs nothing."""
    patcher = with_lora(dev.load(), lora("peft"), 0.0)
    comfy.model_management.load_models_gpu([patcher])
    assert patcher.patches and not any(layer.factors or layer.lora is not None for layer in patcher.layers().values())


def test_cycles_of_attaching_and_removing(dev, lora):
    """Fifty times on and off: the same bits, and nothing is left behind."""
    patcher = dev.load()
    before, parameters = dev.run(patcher), dict(patcher.model.named_parameters())
    for i in range(50):
        dev.run(with_lora(patcher, lora("peft" if i % 2 else "kohya_bfl"), 0.1 * i + 0.1))
        comfy.model_management.load_models_gpu([patcher])
    assert torch.equal(dev.network(patcher), before)
    assert dict(patcher.model.named_parameters()).keys() == parameters.keys()
    assert not any(layer._parked for layer in patcher.layers().values())


@pytest.mark.parametrize("name", ["peft", "kohya_bfl"])
def test_bypass_lora(dev, lora, name):
    """ComfyUI's other loaders: what its ordinary ones do, parts of fused layers included. Other models keep theirs."""
    patcher = dev.load()
    before = dev.run(patcher)
    changed, clip = comfy.sd.load_bypass_lora_for_models(patcher, None, lora(name), STRENGTH, 0)
    assert clip is None and not changed.injections
    assert torch.equal(dev.run(changed), dev.run(with_lora(patcher, lora(name))))
    assert torch.equal(dev.run(patcher), before)
    bad = {key: tensor * math.nan for key, tensor in lora(name).items()}
    with pytest.raises(LoraError, match="contains NaN or Inf"):
        comfy.sd.load_bypass_lora_for_models(patcher, None, bad, 1, 0)


def test_bypass_lora_of_other_models(dev, lora, tmp_path):
    """As without this pack."""
    dev.load()
    changed, _ = comfy.sd.load_bypass_lora_for_models(dev.stock(tmp_path), None, lora("kohya_bfl"), STRENGTH, 0)
    assert changed.injections and not changed.patches


def test_bypass_injections(dev, lora, tmp_path):
    """What training and other packs put around each module's forward."""
    patcher = dev.load()
    before, inject = dev.run(patcher), inspect.unwrap(comfy.sd.load_bypass_lora_for_models)
    changed = inject(patcher, None, lora("kohya_bfl"), STRENGTH, 0)[0]
    assert changed.injections
    assert distance(dev.run(changed), dev.run(with_lora(dev.stock(tmp_path), lora("kohya_bfl")))) <= 5e-6
    assert torch.equal(dev.run(patcher), before)


# ---- hooks, wrappers, compilation

def test_lora_hooks_with_keyframes(dev, lora, tmp_path):
    """Strength changes while sampling; then on top of a loaded LoRA; then the plain model again, bitwise."""
    ours, stock = dev.load(), dev.stock(tmp_path)
    plain = sample(ours, steps=4)
    schedule = [(0.0, 0.75), (0.5, -0.5)]

    def run(patcher, *frames):
        return sample(patcher, steps=4, hooks=hooks(lora("peft"), *frames))

    expected = run(stock, *schedule)
    assert distance(expected, plain) > 1e-2 and distance(expected, run(stock, schedule[0])) > 1e-2
    assert distance(run(ours, *schedule), expected) <= ROUNDED
    assert distance(run(with_lora(ours, lora("kohya_bfl"), 0.5), *schedule),
                    run(with_lora(stock, lora("kohya_bfl"), 0.5), *schedule)) <= ROUNDED
    assert torch.equal(sample(ours, steps=4), plain)


def test_weight_wrappers(dev, tmp_path):
    """Whoever wraps weights gets numbers in the shape of a linear layer."""
    ours, stock = dev.load(), dev.stock(tmp_path)
    before, seen = dev.run(ours), []

    def halve(weight):
        seen.append((weight.shape, weight.dtype))
        return weight * 0.5

    def wrapped(patcher):
        clone = patcher.clone()
        for key in (LAYER, "diffusion_model.single_blocks.0.linear2.weight", "diffusion_model.img_in.weight"):
            clone.add_weight_wrapper(key, halve)
        clone.patches_uuid = object()                   # loads the model anew, as nodes that wrap weights must see to
        return clone

    changed = dev.run(wrapped(ours))
    assert {dtype for _, dtype in seen} == {torch.float32} and len(seen) == 3
    assert distance(changed, before) > 1e-2
    assert distance(changed, dev.run(wrapped(stock))) <= 2e-6


@pytest.mark.parametrize("keys", [["diffusion_model"],
                                  ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.0"]])
def test_torch_compile(dev, lora, keys):
    """The 'TorchCompileModel' node, without a code generator behind it; then with a LoRA."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    compiled = dev.load()
    plain, with_it = sample(compiled), sample(with_lora(compiled, lora("peft")))
    set_torch_compile_wrapper(compiled, backend="eager", keys=keys)
    assert distance(sample(compiled), plain) <= 1e-6
    assert distance(sample(with_lora(compiled, lora("peft"))), with_it) <= 1e-6


def test_load_custom_node():
    """ComfyUI's own way of importing the pack."""
    import nodes
    from pathlib import Path
    root = Path(__file__).resolve().parents[3]
    assert asyncio.run(nodes.load_custom_node(str(root)))
    for name in ("SVDQModelLoader", "SVDQHubLoader", "SVDQLoraLoader", "SVDQLoraStack", "SVDQCaptureCalibration",
                 "SVDQQuantize", "SVDQCompare", "SVDQInfo", "SVDQTextEncoderLoader", "SVDQLoadConditioning",
                 "SVDQSaveConditioning"):
        info = nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1()
        assert info["category"].startswith("svdq/") and info["description"]
