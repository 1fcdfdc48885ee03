"""Our layers in ComfyUI's own FLUX compute what the golden files say, and what stock FLUX does with dense weights."""

import gc
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdq_pack.svdq.kernels import layout, ops, registry
from svdq_pack.svdq.kernels.variant import HALVES, Target
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.nodes.host.layer import SVDQLinear
from svdq_pack.nodes.host.load import load_model
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families.family import by_layer
from svdq_pack.svdq.format import read_slot, view_layer
from svdq_pack.tests.comfy.inprocess.support import GOLDEN, distance, emulate_kernels, noise, pretend_gpu, sample, with_lora

import comfy.model_base         # noqa: E402, comes from the tree that support has chosen
import comfy.model_management   # noqa: E402
import comfy.supported_models   # noqa: E402


FP16 = torch.float16
CPU_DEFAULT = 0.012     # relative L2 of a network whose activations are rounded to 8 bits: 0.0075 to 0.0090 of 21 inputs


def intermediates(patcher, run):
    """{name as in the golden files: value} that `run()` leaves at every point of the network."""
    model, seen, handles = patcher.model.diffusion_model, {}, []

    def copy(value):                                    # blocks add to their input in place
        return value.clone() if isinstance(value, torch.Tensor) else [part.clone() for part in value]

    def after(module, name):
        def take(module, args, out):
            seen[name] = copy(out)
        handles.append(module.register_forward_hook(take))

    def before(module, name, keep=lambda x: x):
        def take(module, args):
            seen[name] = copy(keep(args[0]))
        handles.append(module.register_forward_pre_hook(take))

    after(model.img_in, "img_in")
    after(model.txt_in, "txt_in")
    after(model.final_layer, "out")
    before(model.double_blocks[0].img_mod, "vec")
    for i, block in enumerate(model.double_blocks):
        at = f"double_blocks.{i}."
        for stream in ("img", "txt"):
            after(getattr(block, f"{stream}_mod").lin, f"{at}{stream}_mod")
            after(getattr(block, f"{stream}_attn").qkv, f"{at}{stream}_qkv")
            before(getattr(block, f"{stream}_attn").proj, f"{at}{stream}_attended")
        after(block, at + "both")
    for i, block in enumerate(model.single_blocks):
        at = f"single_blocks.{i}."
        after(block.modulation.lin, f"{at}mod")
        before(block.linear2, f"{at}attn", lambda x: x[..., :model.hidden_size])
        after(block, f"{at}x")
    try:
        seen["out_latent"] = run()
    finally:
        for handle in handles:
            handle.remove()
    for i in range(len(model.double_blocks)):
        at = f"double_blocks.{i}."
        seen[at + "img"], seen[at + "txt"] = seen.pop(at + "both")
        seen[at + "attn"] = torch.cat([seen.pop(f"{at}{stream}_attended") for stream in ("txt", "img")], 1)
    return seen


def compare(seen, io, kind, tolerance):
    wanted = {name.removeprefix(f"{kind}."): value for name, value in io.items() if name.startswith(f"{kind}.")}
    found = {name: distance(seen[name], value) for name, value in wanted.items()}
    print(kind, {name: f"{value:.1e}" for name, value in found.items()})
    assert len(found) >= 5
    assert not {name: value for name, value in found.items() if not value <= tolerance}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, GOLDEN), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_weight_only_everywhere(case, dtype, tolerance):
    patcher = case.load(dtype)
    compare(intermediates(patcher, lambda: case.run(patcher, dtype)), case.io, "weight_only", tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-2), (torch.bfloat16, 0.15)])
def test_quantised_activations(case, dtype, tolerance):
    patcher = case.load(dtype, act_bits=None)
    with registry.using("reference"):
        compare(intermediates(patcher, lambda: case.run(patcher, dtype)), case.io, "act_quant", tolerance)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, CPU_DEFAULT), (torch.bfloat16, 1.5 * CPU_DEFAULT)])
def test_default_on_a_cpu(int4, dtype, tolerance):
    """Without a wish, INT4 layers round activations to 8 bits: near golden numbers, and each time the same to the bit."""
    patcher = int4.load(dtype, act_bits=None)
    serve = {plan.variant.name for layer in patcher.layers().values() for plan in layer.plans(torch.device("cpu"), dtype)}
    assert serve == {"w4a8_cpu", "exact_cpu"}
    seen = intermediates(patcher, lambda: int4.run(patcher, dtype))
    compare(seen, int4.io, "weight_only", 0.02)                     # the most is 0.014, in fp32, behind the first attention
    assert distance(seen["out_latent"], int4.io["weight_only.out_latent"]) <= tolerance
    assert distance(seen["out_latent"], int4.run(int4.load(dtype), dtype)) > 1e-3         # it does round
    for again in (patcher, int4.load(dtype, act_bits=None)):
        assert torch.equal(int4.run(again, dtype), seen["out_latent"])


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_default_on_a_cpu_with_a_lora(int4):
    """In the branch, which nobody rounds: it changes what it changes in the exact model, and off again it leaves no trace."""
    patcher, exact = int4.load(act_bits=None), int4.load()
    tensors = {f"{key.removesuffix('weight')}lora_{name}.weight": 0.12 * noise(*size, seed=seed)
               for key, layer in exact.layers().items()
               for seed, (name, size) in enumerate({"A": (20, layer.in_features), "B": (layer.out_features, 20)}.items())}
    before, plain = int4.run(patcher), int4.run(exact)
    changed, wanted = (int4.run(with_lora(one, tensors)) for one in (patcher, exact))
    assert distance(changed, wanted) <= CPU_DEFAULT < 0.1 < distance(plain, wanted)
    assert torch.equal(int4.run(patcher), before)
    assert torch.equal(int4.run(with_lora(patcher, tensors)), changed)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_fused_kernels_on_the_emulator(int4, monkeypatch):
    """A whole network through the CUDA kernels' own code, where the real ones would serve a GPU."""
    names = emulate_kernels(monkeypatch, "w4a4_sm80", "awq_gemv")
    patcher = int4.load(torch.bfloat16, act_bits=None)
    compare(intermediates(patcher, lambda: int4.run(patcher, torch.bfloat16)), int4.io, "act_quant", 0.15)
    launched = [name.split("_")[0] for name in names]
    tiles = sum(len(module.description["tiles"]) for module in patcher.model.modules()
                if isinstance(module, SVDQLinear) and module.quantised)
    assert launched.count("gemm") == launched.count("quant") == tiles - launched.count("awq") == 12


def served_at_fp16(capability):
    """The variant whose kernels serve the golden INT4 file at fp16 there."""
    weight, target = example("int4", FP16), Target("cuda", capability)
    plan = registry.plan(weight, target, FP16, repack=True)
    assert plan.shortfall(weight, target) is None
    return plan.variant


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("capability, dtype", [((7, 5), None), ((7, 5), torch.bfloat16), ((8, 6), FP16), ((9, 0), FP16)])
def test_bf16_file_at_fp16(int4, monkeypatch, caplog, capability, dtype):
    """As ComfyUI computes on RTX 20, whatever is asked, and elsewhere on request: kernels serve all layers, with LoRAs, too."""
    variant, plain, said = served_at_fp16(capability), int4.load(), []
    tensors = {f"{key.removesuffix('weight')}lora_{name}.weight": 0.12 * noise(*size, seed=seed)
               for key, layer in plain.layers().items()
               for seed, (name, size) in enumerate({"A": (20, layer.in_features), "B": (layer.out_features, 20)}.items())}
    before, with_it = int4.run(plain), int4.run(with_lora(plain, tensors))
    launched = pretend_gpu(monkeypatch, capability)
    patcher = load_model(int4.path, dtype, say=said.append)
    assert patcher.model.get_dtype_inference() == FP16
    assert f"rank 16 · {variant.how} on" in said[-1] and "because" not in said[-1] and "has not" not in caplog.text
    for key, layer in patcher.layers().items():
        assert all(tile.weight.dtype == FP16 for tile in layer.tiles)
        assert {plan.variant for plan in layer.plans(torch.device("cpu"), FP16)} <= {variant, *(
            other for other in registry.VARIANTS if "awq" in other.precisions)}
        (dense, shift), (want, _) = (one.dense(one.weight) for one in (layer, plain.layers()[key]))
        assert distance(dense, want) <= 1e-6
    result, tolerance = ("act_quant", 0.15) if variant.act_bits == 4 else ("weight_only", 0.04)
    compare(intermediates(patcher, lambda: int4.run(patcher, FP16)), int4.io, result, tolerance)
    assert sum(name.startswith("gemm") for name in launched) == 12 and all("fp16" in name for name in launched)
    assert distance(int4.run(with_lora(patcher, tensors), FP16), with_it) <= 2 * tolerance < distance(before, with_it)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_numbers_that_fp16_has_not(int4, monkeypatch, caplog, tmp_path):
    """The layer that has one stays as the file has it, said once in the log and on the node; the rest is fast. Nothing is said
    where it makes no difference."""
    name, tensors = "transformer_blocks.0.mlp_fc1", load_file(int4.path)
    tensors[f"{name}.smooth"][3] = 1e5
    save_file(tensors, tmp_path / "large.safetensors")
    case, said = type(int4)(tmp_path / "large.safetensors", int4.io), []
    wanted = case.run(case.load())
    assert case.load(FP16).model is not None and "has not" not in caplog.text
    launched = pretend_gpu(monkeypatch, (8, 6))
    patcher = load_model(case.path, FP16, say=said.append)
    message, = (record.message for record in caplog.records if "has not" in record.message)
    slow = registry.plan(example("int4", torch.bfloat16), Target("cuda", (8, 6)), FP16).how
    assert message == ("SVDQ: large.safetensors: float16 has not all numbers of these layers, which stay as they are and "
                       f"run as {slow}, not as fused W4A4 kernels: double_blocks.0.img_mlp.0 "
                       "(smooth has 1e+05, which would be inf)")
    assert said[-1].endswith(f"; 1 of its layers as {slow}, because float16 has not all their numbers")
    assert {layer.tiles[0].weight.dtype for layer in patcher.layers().values()} == {FP16, torch.bfloat16}
    assert distance(case.run(patcher, FP16), wanted) <= 0.15
    assert sum(name.startswith(("gemm", "mlp_w4a4")) for name in launched) == 11


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dequantising_kernel_on_the_emulator(case, dtype, monkeypatch):
    """A network of either precision whose weights a kernel unpacks: near the exact one, nearer to what torch unpacks, with a
    LoRA and without."""
    plain = case.load(dtype)
    tensors = {f"{key.removesuffix('weight')}lora_{name}.weight": 0.12 * noise(*size, seed=seed)
               for key, layer in plain.layers().items()
               for seed, (name, size) in enumerate({"A": (20, layer.in_features), "B": (layer.out_features, 20)}.items())}
    with registry.using("weight_only"):
        before, wanted = (case.run(model, dtype) for model in (plain, with_lora(plain, tensors)))
    launched = emulate_kernels(monkeypatch, "dequant")
    patcher = case.load(dtype, act_bits=None)
    seen = intermediates(patcher, lambda: case.run(patcher, dtype))
    compare(seen, case.io, "weight_only", 1.5e-2)
    assert launched == [f"dequant_{HALVES[dtype]}_{'int4' if 'int4' in case.path.name else 'nvfp4'}"] * 12
    assert distance(seen["out_latent"], before) <= 1.5e-2
    changed = case.run(with_lora(patcher, tensors), dtype)
    assert distance(changed, wanted) <= 1.5e-2 < 0.1 < distance(before, wanted)
    assert torch.equal(case.run(patcher, dtype), seen["out_latent"])


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("act_bits, result, tolerance", [(None, "weight_only", 0.04), (8, "weight_only", 0.04),
                                                         (4, "act_quant", 0.15)])
def test_hopper_kernels_on_the_emulator(int4, monkeypatch, act_bits, result, tolerance):
    """Repacked on loading, as on an H100: the network, what a merge reads of it, and a LoRA in its branch."""
    plain = int4.load(torch.bfloat16)
    tensors = {f"{key.removesuffix('weight')}lora_{name}.weight": 0.12 * torch.randn(size, generator=torch.Generator())
               for key, layer in plain.layers().items()
               for name, size in (("A", (20, layer.in_features)), ("B", (layer.out_features, 20)))}
    before, with_it = int4.run(plain, torch.bfloat16), int4.run(with_lora(plain, tensors), torch.bfloat16)
    launched = emulate_kernels(monkeypatch, "w4a8_sm90", "w4a4_sm90", "awq_gemv")
    patcher = load_model(int4.path, torch.bfloat16, act_bits)
    compare(intermediates(patcher, lambda: int4.run(patcher, torch.bfloat16)), int4.io, result, tolerance)
    mode = "group" if act_bits == 4 else "token"
    assert sum(name.startswith("gemm_fp8") and mode in name for name in launched) == 12
    for key, layer in patcher.layers().items():
        assert torch.equal(layer.dense(layer.weight)[0], plain.layers()[key].dense(plain.layers()[key].weight)[0])
    assert distance(int4.run(with_lora(patcher, tensors), torch.bfloat16), with_it) <= 1.5 * tolerance
    assert distance(before, with_it) > 4 * tolerance


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("rank", [20, 140])
def test_nvfp4_kernels_on_the_emulator(dev, monkeypatch, rank):
    """An NVFP4 network as on an RTX 50, and a LoRA in its branch, or beside it where that is too wide to fuse."""
    plain = dev.load(torch.bfloat16)
    tensors = {f"{key.removesuffix('weight')}lora_{name}.weight": 0.12 * (20 / rank) ** 0.5 * noise(*size, seed=seed)
               for key, layer in plain.layers().items()
               for seed, (name, size) in enumerate({"A": (rank, layer.in_features), "B": (layer.out_features, rank)}.items())}
    before, with_it = dev.run(plain, torch.bfloat16), dev.run(with_lora(plain, tensors), torch.bfloat16)
    launched = emulate_kernels(monkeypatch, "nvfp4_sm120", "awq_gemv")
    patcher = dev.load(torch.bfloat16, act_bits=None)
    compare(intermediates(patcher, lambda: dev.run(patcher, torch.bfloat16)), dev.io, "act_quant", 0.12)
    kinds = [name.split("_bf16")[0] for name in launched]
    assert kinds.count("gemm_nvfp4") == kinds.count("quant_nvfp4") == 12 and "awq_gemv" in kinds
    assert distance(dev.run(with_lora(patcher, tensors), torch.bfloat16), with_it) <= 0.12 < 0.2 < distance(before, with_it)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_int8_kernels_on_the_emulator(int4, monkeypatch):
    """As on an RTX 50, and with act_bits=8 on older cards: the network in the file's order, and with a LoRA in its branch."""
    plain = int4.load(torch.bfloat16)
    tensors = {f"{key.removesuffix('weight')}lora_{name}.weight": 0.12 * torch.randn(size, generator=torch.Generator())
               for key, layer in plain.layers().items()
               for name, size in (("A", (20, layer.in_features)), ("B", (layer.out_features, 20)))}
    before, with_it = int4.run(plain, torch.bfloat16), int4.run(with_lora(plain, tensors), torch.bfloat16)
    launched = emulate_kernels(monkeypatch, "w4a8_int8", "awq_gemv")
    patcher = int4.load(torch.bfloat16, act_bits=8)
    compare(intermediates(patcher, lambda: int4.run(patcher, torch.bfloat16)), int4.io, "weight_only", 0.04)
    assert sum(name.startswith("gemm_int8") for name in launched) == 12
    assert distance(int4.run(with_lora(patcher, tensors), torch.bfloat16), with_it) <= 0.06
    assert distance(before, with_it) > 0.16


def test_every_layer_alone(case):
    """Each ComfyUI layer against the golden probes; layers made of two, also tile by tile."""
    patcher, checkpoint, stored = case.load(), Checkpoint(case.path), load_file(case.path)
    comfy.model_management.load_models_gpu([patcher])
    for layer in by_layer(checkpoint.shape.comfy_places()):
        places, module = layer.places, patcher.model.get_submodule(f"diffusion_model.{layer.name}")
        assert isinstance(module, SVDQLinear) and module.quantised
        probes = [tuple(case.io[f"probe.{place.slot.module}.{io}"].float() for io in "xy") for place in places]
        if places[-1].col:                                      # side by side: their outputs add up
            x, y = (torch.cat([probe[0] for probe in probes]), sum(probe[1] for probe in probes))
            assert distance(module(x[None]), y) <= 1e-5, layer.name
        else:
            for place, (x, y) in zip(places, probes):
                assert distance(module(x[None])[0, place.row:place.row + place.n], y) <= 1e-5, place.slot.module
        tiles = view_layer(module.weight, module.description)
        for place, tile, (x, y) in zip(places, tiles, probes, strict=True):
            bias = read_slot(place.slot, checkpoint.precision, stored)[1]
            ops.linear(x[None], tile.weight, out := torch.empty(1, place.n), bias, act_bits=16)
            assert (tile.row, tile.col) == (place.row, place.col)
            assert distance(out, y) <= 1e-5, place.slot.module


def test_codes_reach_the_layers_unchanged(case):
    """What lies in ComfyUI's parameters is bit for bit what the file holds."""
    patcher, stored = case.load(), load_file(case.path)
    for place in Checkpoint(case.path).shape.comfy_places():
        slot, module = place.slot, patcher.model.get_submodule(f"diffusion_model.{place.layer}")
        tile, = (tile for tile in view_layer(module.weight, module.description)
                 if (tile.row, tile.col) == (place.row, place.col))
        if slot.kind == "w4a4":
            assert torch.equal(tile.weight.qweight, stored[f"{slot.module}.qweight"])
            scales = stored[f"{slot.module}.wscales"]
            assert torch.equal(tile.weight.wscales.view(torch.uint8), scales.view(torch.uint8))
        else:
            codes = layout.unpack_awq(stored[f"{slot.module}.qweight"])     # rows are interleaved in the file only
            logical = codes.view(-1, slot.chunks, slot.k).transpose(0, 1).reshape(slot.n, slot.k)
            assert torch.equal(layout.unpack_awq(tile.weight.qweight), logical)


def test_dequantised_file_in_the_stock_loader(case, tmp_path):
    """python -m svdq dequantize: an ordinary FLUX with the same output. Measured 4e-7."""
    assert distance(case.run(case.load()), case.run(case.stock(tmp_path))) <= 2e-6


SHAPES = {
    "dev": ({}, "Flux", "FLUX"),
    "schnell": ({"guidance": False}, "FluxSchnell", "FLOW"),
    "fill": ({"in_features": 384}, "FluxInpaint", "FLUX"),
    "canny-depth": ({"in_features": 128}, "Flux", "FLUX"),
    "larger": ({"hidden": 256, "depth": 1, "depth_single": 2, "context_dim": 256, "vec_dim": 128}, "Flux", "FLUX"),
}


@pytest.mark.parametrize("kind, precision", [*((kind, "int4") for kind in SHAPES), ("dev", "nvfp4")])
def test_detection_and_sampling(kind, precision, make_model, tmp_path):
    """ComfyUI picks the right model; a whole sampling run equals that of stock FLUX on the dequantised file."""
    changes, config, model_type = SHAPES[kind]
    model = make_model(precision, **changes)
    ours = model.load()
    assert type(ours.model.model_config) is getattr(comfy.supported_models, config)
    assert type(ours.model) is comfy.model_base.Flux
    assert ours.model.model_type is comfy.model_base.ModelType[model_type]
    assert ours.model.diffusion_model.in_channels == changes.get("in_features", 64)
    assert "svdq" in "".join(ours.model.diffusion_model.state_dict())
    stock = model.stock(tmp_path)
    assert type(stock.model.model_config) is type(ours.model.model_config)
    extra = {}
    if kind in ("fill", "canny-depth"):
        extra["concat_latent_image"] = noise(1, 16, 12, 10, seed=3)
    if kind == "fill":
        extra["concat_mask"] = (noise(1, 1, 96, 80, seed=4) > 0).float()
    assert distance(sample(ours, **extra), sample(stock, **extra)) <= 1e-5


def test_kontext_reference_latents(make_model, tmp_path):
    ours, stock = make_model().load(), make_model().stock(tmp_path)
    reference = {"reference_latents": [noise(1, 16, 6, 8, seed=5), noise(1, 16, 4, 4, seed=6)]}
    with_reference = sample(ours, **reference)
    assert distance(with_reference, sample(stock, **reference)) <= 1e-5
    assert distance(with_reference, sample(ours)) > 1e-2


def test_batch_and_odd_size(make_model, tmp_path):
    """Two pictures at once, of a latent that has to be padded to whole patches."""
    ours, stock = make_model().load(), make_model().stock(tmp_path)
    both = sample(ours, latent=noise(2, 16, 9, 13))
    assert both.shape == (2, 16, 9, 13)
    assert distance(both, sample(stock, latent=noise(2, 16, 9, 13))) <= 1e-5
    assert distance(both[0], both[1]) > 1e-2


def test_the_file_is_not_needed_after_loading(dev, tmp_path):
    """Neither deleting it nor zeroing it in place, which a memory map would see, changes anything."""
    path = shutil.copy(dev.path, tmp_path / "copy.safetensors")
    patcher = load_model(path, torch.float32)
    before = dev.run(patcher)
    os.truncate(path, 0)
    os.truncate(path, dev.path.stat().st_size)
    assert torch.equal(dev.run(patcher), before)
    os.unlink(path)
    assert torch.equal(dev.run(patcher), before)


def test_a_damaged_file_leaves_no_model(dev, tmp_path):
    tensors = load_file(dev.path)
    name = "single_transformer_blocks.0.mlp_fc2.smooth"         # one of the last to be read
    tensors[name][3] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    gc.collect()
    alive = models_alive()
    with pytest.raises(CheckpointError, match="NaN"):
        load_model(tmp_path / "nan.safetensors")
    gc.collect()
    assert models_alive() == alive


def models_alive():
    return sum(issubclass(type(thing), comfy.model_base.BaseModel) for thing in gc.get_objects())


@pytest.mark.parametrize("flag, wanted", [
    ("fp64_unet", torch.float32), ("fp8_e4m3fn_unet", None), ("fp8_e5m2_unet", None), ("fp8_e8m0fnu_unet", None),
    ("fp32_unet", torch.float32)])
def test_flags_for_the_dtype_of_weights(dev, monkeypatch, caplog, flag, wanted):
    """They are about weights in 16 bit: an SVDQ model computes in a dtype that its layers know, and says so."""
    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    patcher = load_model(dev.path)
    dtype = patcher.model.get_dtype_inference()
    assert dtype == wanted if wanted else dtype in (torch.bfloat16, torch.float16, torch.float32)
    out = dev.run(patcher, dtype)
    monkeypatch.setattr(comfy.cli_args.args, flag, False)
    assert torch.equal(out, dev.run(load_model(dev.path, dtype), dtype))
    assert ("SVDQ: ComfyUI was started with a flag" in caplog.text) == (flag != "fp32_unet")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1, 0.375])
def test_plain_layers_in_fp8(dev, tmp_path, dtype, scale):
    """Of a tool that made fp8 of all that is not 4-bit: the model of the same numbers in 16 bit."""
    tensors = load_file(dev.path)
    wide = dict(tensors)
    for name, _ in Checkpoint(dev.path).shape.plain():
        tensors[name] = (tensors[name].float() / scale).to(dtype)
        wide[name] = (tensors[name].float() * scale).bfloat16()
        if scale != 1:
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = torch.tensor(scale)
    outs = []
    for name, one in (("fp8", tensors), ("wide", wide)):
        save_file(one, tmp_path / f"{name}.safetensors")
        outs.append(dev.run(load_model(tmp_path / f"{name}.safetensors", torch.float32)))
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_dtype_auto_is_comfyuis_choice(dev):
    """Without a wish, what ComfyUI picks for FLUX: fp32 on a CPU. The bytes of the checkpoint have no say."""
    assert load_model(dev.path).model.get_dtype() == torch.float32


def test_names_in_the_log_are_printable(golden_dir, tmp_path, caplog):
    """Those of files and of what is in them."""
    name, path = "\x1b[2Jx", tmp_path / "\x1b[31mred.safetensors"
    save_file(load_file(golden_dir / "model_int4_flux_schnell_like.safetensors") | {name: torch.ones(1)}, path)
    load_model(path)
    told, = (record.getMessage() for record in caplog.records if "are ignored" in record.getMessage())
    assert told.isprintable() and "red.safetensors" in told
