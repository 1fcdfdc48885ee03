"""From a MODEL to an SVDQ file: capturing calibration, reading weights with their LoRAs, the nodes."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.nodes import calibration, prompt_server
from svdq_pack.nodes import quantize as quantize_node
from svdq_pack.nodes.calibration import SVDQCaptureCalibration, files, folder, path_of, stamp
from svdq_pack.nodes.compare import SVDQCompare
from svdq_pack.nodes.host import capture
from svdq_pack.nodes.host.load import load_model
from svdq_pack.nodes.host.source import ModelSource, flux_shape
from svdq_pack.nodes.quantize import NONE, SVDQQuantize
from svdq_pack.svdq import checkpoint, compare
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.quantize.calibration import Statistics, inputs
from svdq_pack.tests.comfy.inprocess.support import STRENGTH, distance, noise, sample, with_lora
from svdq_pack.tests.unit.helpers import metadata_of

import comfy.model_management   # noqa: E402, comes from the tree that support has chosen
import comfy.patcher_extension  # noqa: E402
import comfy.sd                 # noqa: E402
import folder_paths             # noqa: E402

CPU = torch.device("cpu")
LAYERS = ["double_blocks.0.img_mod.lin", "double_blocks.0.txt_attn.qkv", "double_blocks.0.img_mlp.2",
          "single_blocks.0.linear2"]
FORMS = ["fp32", "bf16", "fp8", "scaled fp8"]


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def dense(golden_dir, tmp_path_factory):
    """The golden model's weights as an ordinary FLUX file, fp32."""
    path = tmp_path_factory.mktemp("dense") / "flux.safetensors"
    checkpoint.dequantize(golden_dir / "model_nvfp4_flux_dev_like.safetensors", path, torch.float32)
    return path


@pytest.fixture
def stock(dense, tmp_path):
    """stock(form) -> ComfyUI's own model of these weights."""
    def stock(form="fp32"):
        path = dense
        if form == "fp32":
            return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
        if form != "scaled fp8":
            dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[form]
            return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
        tensors = {}
        for name, value in load_file(path).items():
            if value.ndim == 2 and "_blocks" in name:
                scale, layer = value.abs().max() / 448, name.removesuffix("weight")
                form = torch.frombuffer(bytearray(json.dumps({"format": "float8_e4m3fn"}), "utf-8"), dtype=torch.uint8)
                tensors |= {name: (value / scale).to(torch.float8_e4m3fn), f"{layer}weight_scale": scale,
                            f"{layer}comfy_quant": form}
            else:
                tensors[name] = value.bfloat16()
        save_file(tensors, tmp_path / "scaled.safetensors")
        return comfy.sd.load_diffusion_model(str(tmp_path / "scaled.safetensors"))
    return stock


@pytest.fixture
def lora(golden):
    return golden("lora_model_nvfp4_flux_dev_like_peft")


def watched(model):
    """(the MODEL watched, list that its statistics go to)"""
    seen = []
    return capture.watch(model, flux_shape(model), seen.append), seen


# ---- capture

def test_statistics(stock):
    """Mean, square and maximum of what the layers see, as another pair of eyes sees it; tokens are among them."""
    model, seen = watched(stock())
    fed = {layer: [] for layer in LAYERS}
    for layer, rows in fed.items():
        module = model.model.diffusion_model.get_submodule(layer)
        module.register_forward_hook(lambda _, given, __, rows=rows: rows.append(given[0].flatten(0, -2).double()))
    sample(model, steps=3)
    result, = seen
    assert result.calls == len(fed[LAYERS[0]]) == 3
    assert result.layers.keys() == inputs(result.shape).keys() and len(result.layers) == 13
    for layer, rows in fed.items():
        rows, found = torch.cat(rows), result[layer]
        assert distance(found.mean, rows.mean(0)) <= 1e-6 and distance(found.square, rows.square().mean(0)) <= 1e-6
        assert torch.equal(found.max, rows.abs().amax(0).float())
        known = {tuple(row) for row in rows.bfloat16().tolist()}
        assert len(found.tokens) == min(64, len(rows)) and all(tuple(row) in known for row in found.tokens.tolist())


@pytest.mark.parametrize("form", FORMS)
def test_sampling_is_the_same_to_the_bit(form, stock, lora):
    for model in (stock(form), with_lora(stock(form), lora)):
        expected = sample(model, latent=noise(2, 16, 12, 10))
        copy, seen = watched(model)
        assert torch.equal(sample(copy, latent=noise(2, 16, 12, 10)), expected) and len(seen) == 1
        assert not any(module._forward_pre_hooks for module in model.model.modules())
        seen.clear()
        assert torch.equal(sample(model, latent=noise(2, 16, 12, 10)), expected) and not seen


def test_offloaded(stock, lora, monkeypatch):
    """With half of the layers left behind, which get their LoRA as they are used, the same statistics."""
    whole, seen_whole = watched(with_lora(stock(), lora))
    expected = sample(whole)
    comfy.model_management.unload_all_models()
    model, seen = watched(with_lora(stock(), lora))
    size = model.model_size()
    original = type(model).partially_load
    monkeypatch.setattr(type(model), "partially_load", lambda self, device, extra_memory=0, **rest: original(
        self, device, size // 2, **rest))
    result = sample(model)
    assert any(hasattr(module, "prev_comfy_cast_weights") for module in model.model.modules())
    assert distance(result, expected) <= 1e-5
    for layer, found in seen[0].layers.items():
        assert distance(found.mean, seen_whole[0][layer].mean) <= 1e-4, layer


def test_svdq_model_can_be_watched_too(dev):
    model = dev.load()
    copy, seen = watched(model)
    assert torch.equal(sample(copy), sample(model))
    assert seen[0].shape == Checkpoint(dev.path).shape


def test_two_samplings_are_one_of_both(stock):
    """Files grow: what is merged equals what one capture of everything sees."""
    model, seen = watched(stock())
    sample(model, latent=noise(1, 16, 12, 10))
    sample(model, latent=noise(1, 16, 12, 10, seed=5), steps=4)
    seen = seen[:]
    both = capture.merged(*seen)
    assert both.calls == 6 and both.tokens == seen[0].tokens + seen[1].tokens
    inputs = []
    module = model.model.diffusion_model.get_submodule(LAYERS[1])
    module.register_forward_hook(lambda _, given, __: inputs.append(given[0].flatten(0, -2).double()))
    sample(model, latent=noise(1, 16, 12, 10))
    sample(model, latent=noise(1, 16, 12, 10, seed=5), steps=4)
    rows, found = torch.cat(inputs), both[LAYERS[1]]
    assert distance(found.mean, rows.mean(0)) <= 1e-6 and distance(found.square, rows.square().mean(0)) <= 1e-6
    assert torch.equal(found.max, rows.abs().amax(0).float())
    for layer, found in both.layers.items():
        ours = [{tuple(row) for row in one[layer].tokens.tolist()} for one in seen]
        counts = [sum(tuple(row) in known for row in found.tokens.tolist()) for known in ours]
        assert len(found.tokens) == min(64, sum(len(one[layer].tokens) for one in seen)), layer
        if len(found.tokens) == 64:
            assert abs(counts[1] - 64 * 4 / 6) <= 1, counts
    again = capture.merged(*seen)
    assert again.fingerprint() == both.fingerprint()


def test_interrupted_sampling_adds_nothing(stock):
    model, seen = watched(stock())
    calls = []

    def stop(module, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise comfy.model_management.InterruptProcessingException

    handle = model.model.diffusion_model.get_submodule(LAYERS[1]).register_forward_pre_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, steps=3)
    handle.remove()
    assert not seen and not any(module._forward_pre_hooks for module in model.model.modules())
    sample(model, steps=3)
    assert seen[0].calls == 3


def test_sampling_within_a_sampling(stock):
    """Some nodes do it; what the inner one sees belongs to the outer one."""
    model, seen = watched(stock())

    def twice(executor, *args, **kwargs):
        model.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "twice")
        sample(model, steps=3)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "twice", twice)
    sample(model, steps=2)
    result, = seen
    assert result.calls == 5
    sample(model, steps=2)
    assert seen[1].calls == 2


def test_overflow_is_named(stock):
    model, seen = watched(stock())
    model.model.diffusion_model.single_blocks[0].pre_norm.register_forward_hook(lambda *given: given[2] / 0)
    with pytest.raises(CheckpointError, match="single_blocks.0.linear1.* has NaN or Inf: the model overflowed"):
        sample(model, steps=1)
    assert not seen


def test_node(stock, tmp_path):
    """Every sampling adds to the file, of this run and of the next; the quantize node's list knows it."""
    model = stock("bf16")
    copy, = SVDQCaptureCalibration.execute(model, "mine").args
    assert not files() and not folder().exists()
    for expected in (2, 4):
        sample(copy)
        assert Statistics.load(path_of("mine.safetensors"), flux_shape(model)).calls == expected
    again, = SVDQCaptureCalibration.execute(with_lora(model, {}), "mine.safetensors").args
    before = stamp("mine.safetensors")
    sample(again, steps=3)
    assert stamp("mine.safetensors") != before and Statistics.load(path_of("mine")).calls == 7
    other, = SVDQCaptureCalibration.execute(model, "mine", add_to_file=False).args
    sample(other, steps=3)
    assert Statistics.load(path_of("mine")).calls == 3
    assert files() == ["mine.safetensors"] and not list(folder().glob(".*"))


BAD_NAMES = ["", "  ", ".hidden", "../a", "a\\b", "c:a", "/a", ".", "*", "a?", "[a]", "a|b", "a<b", "a\0b", "a\nb", "\x1b[2J",
             "nul", "a" * 300, "\udcff"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a/b"])
def test_bad_names(name, stock):
    with pytest.raises(CheckpointError, match="is no name for a new file.*'flux', without folders") as caught:
        SVDQCaptureCalibration.execute(stock(), name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", ".", "../a", "/etc/passwd", "a\0b", "a" * 5000, "\x1b[2J"])
def test_only_what_is_listed_is_chosen(name, tmp_path):
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(CheckpointError, match="no such file in .*svdq_calibration") as caught:
        path_of(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_samplings_that_end_at_once(stock, monkeypatch):
    """Of two graphs, or of two threads that work on one: what each saw is in the file."""
    model, seen = watched(stock())
    sample(model, steps=2)
    monkeypatch.setattr(calibration, "watch", lambda model, shape, save: save)
    saves = [SVDQCaptureCalibration.execute(model, "mine").args[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: saves[i % 4](seen[0]), range(12)))
    assert Statistics.load(path_of("mine")).calls == 24 and not list(folder().glob(".*"))


def test_a_link_where_the_statistics_belong(stock):
    folder().mkdir()
    (folder() / "mine.safetensors").symlink_to("mine.safetensors")
    with pytest.raises(CheckpointError, match="mine.safetensors: "):
        SVDQCaptureCalibration.execute(stock(), "mine")
    with pytest.raises(CheckpointError, match="mine.safetensors: cannot be read"):
        stamp("mine.safetensors")
    assert (folder() / "mine.safetensors").is_symlink()


def test_statistics_that_cannot_be_written(stock, monkeypatch):
    model, seen = watched(stock())
    sample(model, steps=1)
    monkeypatch.setattr(calibration, "watch", lambda model, shape, save: save)
    save = SVDQCaptureCalibration.execute(model, "mine").args[0]
    folder().write_text("a file")
    with pytest.raises(CheckpointError, match="svdq_calibration: cannot be written: "):
        save(seen[0])
    folder().unlink()
    save(seen[0])
    before = path_of("mine").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="mine.safetensors: .*(disk is full|No space left)"):
        save(seen[0])
    assert path_of("mine").read_bytes() == before and files() == ["mine.safetensors"] and not list(folder().glob(".*"))


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_wrong_file_is_refused_before_sampling(stock, make_model, tmp_path):
    model = stock()
    sample(SVDQCaptureCalibration.execute(model, "mine").args[0])
    other = make_model(hidden=256, depth_single=2).stock(tmp_path)
    with pytest.raises(CheckpointError, match="another kind of model: hidden 128, the model has 256; depth_single"):
        SVDQCaptureCalibration.execute(other, "mine")
    (folder() / "torn.safetensors").write_bytes(path_of("mine").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="torn.safetensors: not a complete safetensors file"):
        SVDQCaptureCalibration.execute(model, "torn")
    with pytest.raises(CheckpointError, match="gone.safetensors: no such file"):
        path_of("gone.safetensors")


# ---- the source of the weights

def layers_of(source):
    return dict.fromkeys(place.layer for place in source.shape.comfy_places())


@pytest.mark.parametrize("form", FORMS)
def test_source(form, stock, dense):
    """Every tensor under its name: exact where the MODEL is, and as fp8 holds it."""
    source, dense = ModelSource(stock(form), CPU), load_file(dense)
    assert source.shape == flux1.Shape(128, 1, 1, 64, 128, 64, True)
    tensors = dict(source.plain())
    for layer in layers_of(source):
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = source.layer(layer)
    assert tensors.keys() == dense.keys()
    for name, value in tensors.items():
        assert value.dtype in (torch.float32, torch.bfloat16) and value.shape == dense[name].shape
        limit = 0 if form == "fp32" else 4e-3 if form == "bf16" or form == "scaled fp8" and "_blocks" not in name else 4e-2
        assert distance(value, dense[name]) <= limit, name
    assert source.name.endswith(".safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_source_with_lora(form, stock, lora):
    """The change is exact in fp32, not rounded to the dtype of the MODEL: at fp8, most of it would be lost."""
    model = stock(form)
    plain, changed = ModelSource(model, CPU), ModelSource(with_lora(model, lora), CPU)
    exact = ModelSource(stock("fp32"), CPU), ModelSource(with_lora(stock("fp32"), lora), CPU)
    moved = 0
    for layer in layers_of(plain):
        delta, expected = ((after.layer(layer)[0].float() - before.layer(layer)[0].float())
                           for before, after in ((plain, changed), exact))
        moved += bool(expected.any())
        assert torch.equal(delta, expected) or distance(delta, expected) <= 1e-5, layer
    assert moved >= 6
    assert plain.fingerprint != changed.fingerprint


def test_source_is_the_same_loaded_and_offloaded(stock, lora):
    """ComfyUI keeps patched weights in the model and the originals aside."""
    model = with_lora(stock(), lora)
    before = ModelSource(model, CPU)
    values = {layer: before.layer(layer)[0].clone() for layer in layers_of(before)}
    for memory in (1e9, model.model_size() // 2):
        model.partially_load(CPU, memory)
        now = ModelSource(model, CPU)
        assert now.fingerprint == before.fingerprint
        assert all(torch.equal(now.layer(layer)[0], value) for layer, value in values.items())
        model.detach()


def test_fingerprint(stock, lora):
    """It follows every number of weights and patches."""
    model, key = stock(), next(key for key in lora if "lora_A" in key)
    found = [ModelSource(changed, CPU).fingerprint for changed in (
        model, stock(), with_lora(model, lora), with_lora(model, lora, 0.5), with_lora(model, lora),
        with_lora(model, lora | {key: lora[key] * 1.01}))]
    assert found[0] == found[1] and found[2] == found[4] and len(set(found)) == 4
    model.model.diffusion_model.single_blocks[0].linear2.weight.data[5, 7] += 1e-3
    assert ModelSource(model, CPU).fingerprint not in found


def test_merge_is_read(stock, lora):
    """ModelMergeSimple: the other model's weights are patches."""
    model, other = stock(), with_lora(stock("bf16"), lora)
    merge = model.clone()
    merge.add_patches(other.get_key_patches("diffusion_model."), 0.25, 0.75)
    source, parts = ModelSource(merge, CPU), [ModelSource(one, CPU) for one in (model, other)]
    for layer in layers_of(source):
        first, second = (part.layer(layer)[0].float() for part in parts)
        assert distance(source.layer(layer)[0], 0.75 * first + 0.25 * second) <= 1e-6, layer
    assert source.fingerprint != parts[0].fingerprint


def test_svdq_models_are_refused(dev):
    with pytest.raises(CheckpointError, match="a 4-bit SVDQ model already. Load the bf16, fp16 or fp8 original"):
        ModelSource(dev.load(), CPU)


class GGMLTensor(torch.Tensor):
    """As the GGUF pack has them."""


@pytest.mark.parametrize("weight, what", [
    (lambda value: value.to(torch.int8), "in torch.int8"),
    (lambda value: value.to(torch.float64), "in torch.float64"),
    (lambda value: value.as_subclass(GGMLTensor), "a GGMLTensor")])
def test_quantised_models_are_refused(weight, what, stock):
    model = stock()
    layer = model.model.diffusion_model.double_blocks[0].txt_mlp[2]
    value = weight(layer.weight.data)
    del layer.weight
    layer.weight = torch.nn.Parameter(value, requires_grad=False)
    with pytest.raises(CheckpointError, match=f"txt_mlp.2.weight is {what}: this MODEL is quantised already"):
        ModelSource(model, CPU)


def test_other_quantised_tensors_are_refused(stock):
    model = stock("scaled fp8")
    layer = model.model.diffusion_model.double_blocks[0].img_mlp[0]
    weight = layer.weight
    del layer.weight
    changed = type(weight)(weight._qdata, "TensorCoreNVFP4Layout", weight._params)
    layer.weight = torch.nn.Parameter(changed, requires_grad=False)
    with pytest.raises(CheckpointError, match="img_mlp.0.weight is in TensorCoreNVFP4Layout: this MODEL is quantised"):
        ModelSource(model, CPU)


def test_what_is_no_weight_is_refused(stock, golden):
    lora = golden("lora_model_nvfp4_flux_dev_like_kohya_bfl")
    bypass = comfy.sd.load_bypass_lora_for_models(stock(), None, lora, STRENGTH, 0)[0]
    with pytest.raises(CheckpointError, match="'bypass'.* Load it with 'Load LoRA"):
        ModelSource(bypass, CPU)
    wrapped = stock()
    wrapped.add_weight_wrapper("diffusion_model.single_blocks.0.linear1.weight", lambda weight: weight * 2)
    with pytest.raises(CheckpointError, match="another node changes diffusion_model.single_blocks.0.linear1.weight"):
        ModelSource(wrapped, CPU)


def test_other_models_are_refused(stock):
    model = stock()
    network = model.model.diffusion_model
    for field, value in (("global_modulation", True), ("vec_in_dim", None), ("num_heads", 2), ("mlp_ratio", 3.0)):
        kept = getattr(network.params, field)
        setattr(network.params, field, value)
        with pytest.raises(CheckpointError, match="the MODEL is Flux, which is built like FLUX and is not FLUX.1"):
            flux_shape(model)
        setattr(network.params, field, kept)
    other = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2)))
    for refuse in (lambda: flux_shape(other), lambda: SVDQCaptureCalibration.execute(other, "mine")):
        with pytest.raises(CheckpointError, match="the MODEL is SimpleNamespace, and this node knows FLUX.1"):
            refuse()


def test_nan_is_named(stock, lora):
    model, shares = stock(), []
    model.model.diffusion_model.txt_in.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="diffusion_model.txt_in.weight contains NaN or Inf"):
        ModelSource(model, CPU).check(shares.append)
    assert 0 < shares[-1] < 1
    key = next(key for key in lora if key.endswith("lora_B.weight") and "single" in key)
    source = ModelSource(with_lora(stock(), lora | {key: torch.full_like(lora[key], float("inf"))}), CPU)
    with pytest.raises(CheckpointError, match="with its LoRAs, diffusion_model.single_blocks.0.* contains NaN or Inf"):
        source.check(shares.append)
    shares.clear()
    ModelSource(stock(), CPU).check(shares.append)
    assert shares == sorted(shares) and shares[-1] == 1


def test_control_lora_makes_a_wider_model(stock):
    """FLUX control LoRAs widen img_in: the result is a model of the Canny kind."""
    random = torch.Generator().manual_seed(3)
    tensors = {"img_in.lora_A.weight": torch.randn(4, 128, generator=random), "img_in.lora_B.weight": torch.randn(
        128, 4, generator=random), "img_in.lora_B.bias": torch.randn(128, generator=random),
        "single_blocks.0.norm.key_norm.scale": torch.ones(128)}
    model = stock()
    changed = with_lora(model, tensors, 1.0)
    assert flux_shape(changed).in_features == 128 and flux_shape(model).in_features == 64
    weight = dict(ModelSource(changed, CPU).plain())["img_in.weight"]
    assert weight.shape == (128, 128) and distance(
        weight[:, 64:], (tensors["img_in.lora_B.weight"] @ tensors["img_in.lora_A.weight"])[:, 64:]) <= 1e-5


# ---- the quantize node

@pytest.fixture
def destination(tmp_path, monkeypatch):
    """Where models/diffusion_models is in this test."""
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folder_paths.folder_names_and_paths | {
        "diffusion_models": ([str(folder)], {".safetensors"})})
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision, name", [("int4", "made/svdq-int4_r16-x"), ("nvfp4", "made/svdq-fp4_r16-x")])
def test_quantize_node(precision, name, form, stock, lora, destination):
    """The LoRA baked in, a calibration file used: close to the MODEL, and what the node says is true."""
    model = with_lora(stock(form), lora)
    expected = sample(SVDQCaptureCalibration.execute(model, "mine").args[0], steps=4)
    output = SVDQQuantize.execute(model, precision, 16, "mine.safetensors", "made/svdq-{precision}_r{rank}-x")
    file, text, picture = output.args
    path = destination / file
    assert file == f"{name}.safetensors" and list(destination.rglob("*work*")) == []
    assert text.startswith(f"{file}, ") and "4 calls" in text and output.ui["text"] == (text,)
    assert picture.shape == (1, 640, 1200, 3) and len(picture.view(-1, 3).unique(dim=0)) > 20
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["precision"] == precision and len(told["layers"]) == 15 and told["source"].endswith(".safetensors")
    assert Checkpoint(path).require().ranks == {16: 12}
    error = distance(sample(load_model(path, torch.float32), steps=4), expected)
    plain = distance(sample(stock(form), steps=4), expected)
    print(form, precision, error, plain)
    assert error < 0.15 < 0.3 < plain


def test_quantize_without_calibration(stock, destination):
    model = stock("bf16")
    file, text, _ = SVDQQuantize.execute(model, "int4", 32, NONE, "svdq-free.safetensors").args
    assert file == "svdq-free.safetensors" and "data-free" in text
    assert distance(sample(load_model(destination / file, torch.float32)), sample(model)) < 0.15


def test_interrupted_between_layers(stock, destination, monkeypatch):
    """Where ComfyUI's stop button is looked at, and what the node says meanwhile."""
    said, sampled = [], sample(stock())
    server = SimpleNamespace(send_progress_text=lambda text, node: said.append(text))
    monkeypatch.setattr(prompt_server, "running", lambda: server)
    monkeypatch.setattr(SVDQQuantize, "hidden", SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None))

    def stop_at(place):
        def say(text, node):
            said.append(text)
            if text.startswith(place):
                comfy.model_management.interrupt_current_processing()

        server.send_progress_text = say
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            SVDQQuantize.execute(stock(), "int4", 16, NONE, "svdq-x")
        assert not list(destination.glob("*.safetensors"))
        return sorted(path.name for path in (destination / "svdq-x.safetensors.svdq-work").glob("*.safetensors"))

    assert stop_at("checking") == stop_at("double block 1 of 1, img_mlp.2") == []
    assert stop_at("single block 1 of 1") == ["transformer_blocks.0.safetensors"]
    assert stop_at("writing transformer_blocks.0") == ["single_transformer_blocks.0.safetensors",
                                                       "transformer_blocks.0.safetensors"]
    assert said[0].startswith("checking flux.safetensors, ")
    assert any(re.search(r", \d+:\d\d left$", text) for text in said)
    server.send_progress_text = lambda text, node: said.append(text)
    SVDQQuantize.execute(stock(), "int4", 16, NONE, "svdq-x")
    SVDQQuantize.execute(stock(), "int4", 16, NONE, "svdq-y")
    assert (destination / "svdq-x.safetensors").read_bytes() == (destination / "svdq-y.safetensors").read_bytes()
    assert torch.equal(sample(stock()), sampled)            # the MODEL was only read


def test_changed_model_does_not_resume(stock, lora, destination):
    model = stock()

    def stop(text):
        if text.startswith("single"):
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_node._Say, "text", lambda self, text: stop(text))
        SVDQQuantize.execute(model, "int4", 16, NONE, "svdq-x")
    with pytest.raises(CheckpointError, match="svdq-work: holds a run that was begun with another source"):
        SVDQQuantize.execute(with_lora(model, lora), "int4", 16, NONE, "svdq-x")


@pytest.mark.parametrize("name", [*BAD_NAMES, "a/../b", "a/.b", "a/"])
def test_bad_target(name, stock, destination):
    with pytest.raises(CheckpointError, match="is no name for a new file.* with folders in front") as caught:
        SVDQQuantize.execute(stock(), "int4", 16, NONE, name)
    assert list(destination.iterdir()) == [] and str(caught.value).isprintable()


@pytest.mark.parametrize("precision, rank, filename, words", [
    ("int8", 16, "new", "precision is int8, needs to be one of int4, nvfp4"), (["int4"], 16, "new", "precision is "),
    ("int4", "16", "new", "rank 16: needs a multiple of 16"), ("int4", None, "new", "rank None: needs"),
    ("int4", 16.0, "new/er/new", "rank 16.0: needs"), ("int4", 16, None, "is no text"),
    ("int4", 16, 5, "is no text")])
def test_what_a_link_gives(precision, rank, filename, words, stock, destination):
    """Texts and numbers that ComfyUI has not checked."""
    with pytest.raises(CheckpointError, match=words):
        SVDQQuantize.execute(stock(), precision, rank, NONE, filename)
    assert not list(destination.iterdir())


def test_name_of_the_target(stock, destination, monkeypatch):
    """Braces that are not ours stay, and so do dots."""
    asked = []
    monkeypatch.setattr(quantize_node, "quantize", lambda source, target, *_, **__: asked.append(target) or {}["no report"])
    with pytest.raises(KeyError, match="no report"):
        SVDQQuantize.execute(stock(), "nvfp4", 16, NONE, " a/svdq-{precision}_r{rank}-{other}v1.0.safetensors ")
    assert asked == [destination / "a" / "svdq-fp4_r16-{other}v1.0.safetensors"]


@pytest.mark.parametrize("content", ["", "precious", "[]", '{"tool": 3}', "[" * 100_000])
def test_a_file_where_the_report_belongs(content, stock, destination, monkeypatch):
    """One of somebody else is left alone, and said before any work."""
    (destination / "svdq-x.json").write_text(content)
    monkeypatch.setattr(quantize_node, "ModelSource", None)
    with pytest.raises(CheckpointError, match="svdq-x.json: exists already and is no report of this program"):
        SVDQQuantize.execute(stock(), "int4", 16, NONE, "svdq-x")
    assert [(path.name, path.read_text()) for path in destination.iterdir()] == [("svdq-x.json", content)]


def test_a_report_that_came_during_the_run(stock, destination, monkeypatch):
    """It stays, and so does the model."""
    report = destination / "svdq-x.json"

    def run_of_an_hour(source, target, *_, **__):
        target.touch()
        report.write_text("precious")
        return {"seconds": 3600}

    monkeypatch.setattr(quantize_node, "quantize", run_of_an_hour)
    with pytest.raises(CheckpointError, match="svdq-x.json: exists already and is no report of this program"):
        SVDQQuantize.execute(stock(), "int4", 16, NONE, "svdq-x")
    assert report.read_text() == "precious" and (destination / "svdq-x.safetensors").exists()


def test_what_a_disk_refuses(stock, destination, monkeypatch):
    """The folder, the report, the plot: one error that names the path. The report of an earlier run is replaced or whole."""
    model, old = stock(), '{"tool": "ComfyUI-SVDQ"}'
    (destination / "a").write_text("a file")
    with pytest.raises(CheckpointError, match="diffusion_models/a: cannot be written: "):
        SVDQQuantize.execute(model, "int4", 16, NONE, "a/svdq-x")
    report, replace = destination / "svdq-x.json", os.replace
    report.write_text(old)
    monkeypatch.setattr(os, "replace", lambda old, new: full() if str(new) == str(report) else replace(old, new))
    with pytest.raises(CheckpointError, match="svdq-x.json: .*(disk is full|No space left)"):
        SVDQQuantize.execute(model, "int4", 16, NONE, "svdq-x")
    assert report.read_text() == old and sorted(path.name for path in destination.iterdir()) == [
        "a", "svdq-x.json", "svdq-x.safetensors"]
    monkeypatch.undo()
    made = json.loads(metadata_of(destination / "svdq-x.safetensors")["svdq_quantizer"]) | {"seconds": 1}
    monkeypatch.setattr(folder_paths, "models_dir", str(destination.parent))
    monkeypatch.setattr(quantize_node, "quantize", lambda *_, **__: made)
    monkeypatch.setattr(quantize_node, "_target", lambda *_: destination / "svdq-x.safetensors")
    monkeypatch.setattr(quantize_node, "download_folder", lambda: destination)
    monkeypatch.setattr(quantize_node.ui, "PreviewImage", full)
    with pytest.raises(CheckpointError, match="temp: cannot be written: the disk is full"):
        SVDQQuantize.execute(model, "int4", 16, NONE, "svdq-x")
    assert json.loads(report.read_text()) == made


def test_result_follows_the_calibration_file(stock):
    assert SVDQQuantize.fingerprint_inputs(model=None, precision="int4", calibration=NONE) is None
    watched_model, = SVDQCaptureCalibration.execute(stock(), "mine").args
    sample(watched_model)
    before = SVDQQuantize.fingerprint_inputs(calibration="mine.safetensors")
    assert SVDQQuantize.fingerprint_inputs(calibration="mine.safetensors") == before
    sample(watched_model)
    assert SVDQQuantize.fingerprint_inputs(calibration="mine.safetensors") != before
    assert [option for entry in SVDQQuantize.define_schema().inputs if entry.id == "calibration"
            for option in entry.options] == [NONE, "mine.safetensors"]


# ---- comparing

def test_compare_node():
    random = torch.Generator().manual_seed(4)
    reference = torch.rand(2, 24, 32, 3, generator=random)
    other = (reference + 0.05 * torch.randn(reference.shape, generator=random)).clamp(0, 1)
    latents = [{"samples": noise(2, 16, 3, 4, seed=seed)} for seed in (1, 2)]
    output = SVDQCompare.execute(reference, other, *latents)
    text, sheet = output.args
    assert text == compare.as_text(compare.compare((reference, other), tuple(one["samples"] for one in latents)))
    assert "latent error" in text and torch.equal(sheet[0], compare.sheet(reference, other))
    assert output.ui["text"] == (text,) and output.ui["images"][0]["type"] == "temp"
    assert "latent" not in SVDQCompare.execute(reference, other).args[0].replace("latents", "")
    with pytest.raises(compare.CompareError, match="one latent is connected and the other is not"):
        SVDQCompare.execute(reference, other, latents[0])
