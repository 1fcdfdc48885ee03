"""LoRA files of every dialect load through diffusers' own doors, and mean what they mean elsewhere."""

import json
import logging

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from svdq_pack.svdq.errors import LoraError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.hf import lora_files
from svdq_pack.tests.hf.inside.support import LORA, ROUNDED, STRENGTH, distance, layers, noise


@pytest.fixture
def model(nvfp4):
    return nvfp4.load()


def pipeline(model):
    """What pipelines are at least: a transformer to give LoRAs to."""
    return FluxPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
                        transformer=model)


@pytest.mark.parametrize("door", ["model", "pipeline"])
@pytest.mark.parametrize("dialect", ["peft", "kohya_bfl"])
def test_golden_files(nvfp4, model, golden_dir, door, dialect):
    path, wanted = golden_dir / f"{LORA}_{dialect}.safetensors", load_file(golden_dir / f"{LORA}_expected.safetensors")
    one = model if door == "model" else pipeline(model)
    (one.load_lora_adapter if door == "model" else one.load_lora_weights)(path, adapter_name="one")
    one.set_adapters("one", STRENGTH)
    assert distance(nvfp4.run(model), wanted["weight_only.out"]) <= ROUNDED


def bfl(plain):
    """The same LoRA by BFL's names: q, k, v (and the MLP) of one layer above one another, each with ranks of its own."""
    found, shape = {}, flux1.bfl_to_diffusers(1, 1)
    for theirs, modules, swapped in shape:
        pairs = [plain[module] for module in modules if module in plain]
        if not pairs or len(pairs) < len(modules):
            continue
        ranks, rows = sum(len(down) for down, _ in pairs), sum(len(up) for _, up in pairs)
        wide, row, rank = torch.zeros(rows, ranks), 0, 0
        for down, up in pairs:
            wide[row:row + len(up), rank:rank + len(down)] = up
            row, rank = row + len(up), rank + len(down)
        found[theirs] = torch.cat([down for down, _ in pairs]), torch.cat(wide.chunk(2)[::-1]) if swapped else wide
    return found


SPELLINGS = {
    "diffusers": lambda plain: {f"transformer.{name}.lora_{half}.weight": tensor for name, pair in plain.items()
                                for half, tensor in zip("AB", pair)},
    "bare": lambda plain: {f"{name}.lora_{half}.weight": tensor for name, pair in plain.items()
                           for half, tensor in zip("AB", pair)},
    "peft's own": lambda plain: {f"base_model.model.{name}.lora_{half}.weight": tensor for name, pair in plain.items()
                                 for half, tensor in zip("AB", pair)},
    "with an adapter's name": lambda plain: {f"base_model.model.{name}.lora_{half}.default.weight": tensor
                                             for name, pair in plain.items() for half, tensor in zip("AB", pair)},
    "kohya": lambda plain: {f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight": tensor for name, pair in plain.items()
                            for half, tensor in zip(("down", "up"), pair)},
    "onetrainer": lambda plain: {f"lora_transformer_{name.replace('.', '_')}.lora_{half}.weight": tensor
                                 for name, pair in plain.items() for half, tensor in zip(("down", "up"), pair)},
    "comfyui": lambda plain: {f"diffusion_model.{name}.lora_{half}.weight": tensor for name, pair in bfl(plain).items()
                              for half, tensor in zip("AB", pair)},
    "kohya bfl": lambda plain: {f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight": tensor
                                for name, pair in bfl(plain).items() for half, tensor in zip(("down", "up"), pair)},
    "fal": lambda plain: {f"base_model.model.{name}.lora_{half}.weight": tensor for name, pair in bfl(plain).items()
                          for half, tensor in zip("AB", pair)}}


def some(model, names=None, rank=4):
    """A LoRA for every module that one may be for, or for some."""
    modules = {name: module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and not name.endswith(("to_qkv", "to_added_qkv"))}
    return {name: (noise(rank, module.in_features, seed=i) * 0.05, noise(module.out_features, rank, seed=-i - 1) * 0.05)
            for i, (name, module) in enumerate(modules.items()) if names is None or name in names}


@pytest.mark.parametrize("door", ["model", "pipeline"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_means_the_same(nvfp4, model, spelling, door, tmp_path):
    plain, reference = some(model), nvfp4.load()
    reference.load_lora_adapter(SPELLINGS["diffusers"](plain), adapter_name="one")
    save_file(SPELLINGS[spelling](plain), tmp_path / "lora.safetensors")
    if door == "model":
        model.load_lora_adapter(tmp_path / "lora.safetensors")
    else:
        pipeline(model).load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert distance(nvfp4.run(model), nvfp4.run(reference)) <= 1e-5
    assert distance(nvfp4.run(reference), nvfp4.run(nvfp4.load())) > 0.05


def test_alpha(nvfp4, model):
    plain, other = some(model), nvfp4.load()
    tensors = SPELLINGS["kohya"](plain)
    tensors |= {key.replace(".lora_down.weight", ".alpha"): torch.tensor(1.0) for key in tensors if ".lora_down." in key}
    model.load_lora_adapter(tensors)
    other.load_lora_adapter(SPELLINGS["diffusers"](plain), adapter_name="one")
    other.set_adapters("one", 0.25)                                     # alpha 1 of rank 4
    assert distance(nvfp4.run(model), nvfp4.run(other)) <= 1e-6


def test_alpha_of_a_files_header(nvfp4, model, tmp_path):
    """Where diffusers saves PEFT's config."""
    plain, other = some(model), nvfp4.load()
    config = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"proj_mlp": 8}}
    save_file(SPELLINGS["diffusers"](plain), tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    pipeline(model).load_lora_weights(tmp_path / "lora.safetensors")
    scaled = {name: (down, up * (2.0 if name.endswith("proj_mlp") else 0.5)) for name, (down, up) in plain.items()}
    other.load_lora_adapter(SPELLINGS["diffusers"](scaled))
    assert distance(nvfp4.run(model), nvfp4.run(other)) <= 1e-5


def test_rank_stabilised(nvfp4, model, tmp_path):
    """use_rslora: alpha / sqrt(rank). By a file's header, and given beside a dictionary."""
    plain, other, third = some(model), nvfp4.load(), nvfp4.load()
    config = {"r": 4, "lora_alpha": 3, "use_rslora": True}
    save_file(SPELLINGS["diffusers"](plain), tmp_path / "lora.safetensors",
              {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})})
    model.load_lora_adapter(tmp_path / "lora.safetensors")
    third.load_lora_adapter(SPELLINGS["diffusers"](plain), metadata=config)
    other.load_lora_adapter(SPELLINGS["diffusers"]({name: (down, up * 1.5) for name, (down, up) in plain.items()}))
    for one in (model, third):
        assert distance(nvfp4.run(one), nvfp4.run(other)) <= ROUNDED


def test_biases_by_bfls_names(nvfp4, model):
    """Cut by rows like the factors, and swapped where BFL has the halves the other way round."""
    qkv, out = noise(384, seed=1), noise(256, seed=2)
    tensors = {}
    for name, bias in (("double_blocks.0.img_attn.qkv", qkv), ("final_layer.adaLN_modulation.1", out)):
        tensors |= {f"diffusion_model.{name}.lora_A.weight": noise(4, 128) * 0.1, f"diffusion_model.{name}.diff_b": bias,
                    f"diffusion_model.{name}.lora_B.weight": torch.zeros(len(bias), 4)}
    x, layer = noise(1, 3, 128), model.transformer_blocks[0].attn.to_qkv
    before, last = layer(x), model.norm_out.linear(x)
    model.load_lora_adapter(tensors)
    assert distance(layer(x) - before, qkv.expand(1, 3, -1)) <= 1e-4
    assert distance(model.norm_out.linear(x) - last, torch.cat(out.chunk(2)[::-1]).expand(1, 3, -1)) <= 1e-4


def weight_change(model, before):
    """{module: W - W before} of the 4-bit layers."""
    return {name: layer.dense_with_lora(layer.packed)[0] - before[name] for name, layer in layers(model).items()}


@pytest.fixture
def dense(model):
    return {name: layer.dense(layer.packed)[0] for name, layer in layers(model).items()}


def test_lokr(nvfp4, model, dense):
    mlp, out = "lycoris_single_transformer_blocks_0_proj_mlp", "diffusion_model.single_blocks.0.linear2"
    w1, a, b = noise(4, 2, seed=3), noise(128, 3, seed=4) * 0.1, noise(3, 64, seed=5) * 0.1
    w3, w4 = noise(8, 4, seed=1), noise(16, 160, seed=2) * 0.02
    pipeline(model).load_lora_weights({
        f"{mlp}.lokr_w1": w1, f"{mlp}.lokr_w2_a": a, f"{mlp}.lokr_w2_b": b, f"{mlp}.alpha": torch.tensor(1.5),
        f"{out}.lokr_w1": w3, f"{out}.lokr_w2": w4})
    found = weight_change(model, dense)
    assert distance(found["single_transformer_blocks.0.proj_mlp"], torch.kron(w1, a @ b) * 1.5 / 3) <= 5e-3
    assert distance(found["single_transformer_blocks.0.proj_out"], torch.kron(w3, w4)) <= 5e-3


def test_alpha_of_whole_factors_says_nothing(model, dense):
    """As LyCORIS and ComfyUI have it: alpha is divided by a rank, which whole factors have none of."""
    w1, w2 = noise(8, 4, seed=1), noise(16, 160, seed=2) * 0.02
    name = "diffusion_model.single_blocks.0.linear2"
    model.load_lora_adapter({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(7.0)})
    assert distance(weight_change(model, dense)["single_transformer_blocks.0.proj_out"], torch.kron(w1, w2)) <= 5e-3


def test_dora_of_a_fused_layer(model, dense):
    """BFL's linear1 is q, k, v and the MLP: each gets its own rows of the scale."""
    weight = torch.cat([dense["single_transformer_blocks.0.attn.to_qkv"], dense["single_transformer_blocks.0.proj_mlp"]])
    down, up = noise(4, 128) * 0.1, noise(len(weight), 4, seed=1) * 0.1
    magnitude = weight.norm(dim=1, keepdim=True) * (1 + 0.3 * noise(len(weight), 1, seed=2).abs())
    changed = weight + up @ down
    wanted = changed * magnitude / changed.norm(dim=1, keepdim=True) - weight
    name = "diffusion_model.single_blocks.0.linear1"
    model.load_lora_adapter({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.dora_scale": magnitude})
    found = weight_change(model, dense)
    assert distance(found["single_transformer_blocks.0.attn.to_qkv"], wanted[:384]) <= 6e-3
    assert distance(found["single_transformer_blocks.0.proj_mlp"], wanted[384:]) <= 6e-3


def test_two_doras_add_up(model, dense):
    name, parts = "single_transformer_blocks.0.proj_mlp", []
    weight = dense[name]
    for i, adapter in enumerate(("one", "two")):
        down, up = noise(4, 128, seed=i) * 0.1, noise(512, 4, seed=i + 5) * 0.1
        magnitude = weight.norm(dim=1) * (1.1 + 0.2 * noise(512, seed=i).abs())
        changed = weight + up @ down
        parts.append(changed * (magnitude / changed.norm(dim=1))[:, None] - weight)
        model.load_lora_adapter({f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up,
                                 f"transformer.{name}.lora_magnitude_vector": magnitude}, adapter_name=adapter)
    model.set_adapters(["one", "two"], [0.5, 2.0])
    assert distance(weight_change(model, dense)[name], 0.5 * parts[0] + 2 * parts[1]) <= 6e-3


def test_loha_and_diff(model, dense):
    a, b, c, d = noise(384, 2, seed=1), noise(2, 128, seed=2), noise(384, 2, seed=3), noise(2, 128, seed=4) * 0.05
    delta = noise(512, 3, seed=5) @ noise(3, 128, seed=6) * 0.05
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    model.load_lora_adapter({f"{qkv}.hada_w1_a": a, f"{qkv}.hada_w1_b": b, f"{qkv}.hada_w2_a": c, f"{qkv}.hada_w2_b": d,
                             "diffusion_model.double_blocks.0.img_mlp.0.diff": delta})
    found = weight_change(model, dense)
    assert distance(found["transformer_blocks.0.attn.to_qkv"], (a @ b) * (c @ d)) <= 5e-3
    assert distance(found["transformer_blocks.0.ff.net.0.proj"], delta) <= 5e-3


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.75])
@pytest.mark.parametrize("key", ["lora_magnitude_vector", "dora_scale", "over columns"])
def test_dora(nvfp4, model, dense, strength, key):
    """m (W + U D) / |W + U D|, as the paper has it, on a fused layer and on another; strength scales the whole change."""
    names = {"transformer_blocks.0.attn.to_k": ("transformer_blocks.0.attn.to_qkv", slice(128, 256)),
             "single_transformer_blocks.0.proj_mlp": ("single_transformer_blocks.0.proj_mlp", slice(None))}
    tensors, wanted = {}, {}
    for i, (name, (layer, rows)) in enumerate(names.items()):
        weight = dense[layer][rows]
        down, up = noise(4, 128, seed=i) * 0.1, noise(len(weight), 4, seed=i + 9) * 0.1
        axis = 0 if key == "over columns" else 1
        magnitude = weight.norm(dim=axis) * (1 + 0.3 * noise(weight.shape[1 - axis], seed=i).abs())
        changed = weight + up @ down
        size = magnitude / changed.norm(dim=axis)
        wanted[layer] = strength * (changed * (size[:, None] if axis else size) - weight), rows
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        if key == "lora_magnitude_vector":
            tensors[f"transformer.{name}.lora_magnitude_vector"] = magnitude
        else:
            tensors[f"transformer.{name}.dora_scale"] = magnitude[:, None] if axis else magnitude[None]
    pipe = pipeline(model)
    pipe.load_lora_weights(tensors, adapter_name="one")
    pipe.set_adapters("one", strength)
    found = weight_change(model, dense)
    for layer, (want, rows) in wanted.items():
        most = 0.05 if key == "over columns" else 6e-3          # over columns it is of full rank
        assert distance(found[layer][rows], want) <= most, layer
    base = nvfp4.run(nvfp4.load())
    assert distance(nvfp4.run(model), base) > 1e-3
    pipe.disable_lora()
    assert torch.equal(nvfp4.run(model), base)


def test_of_dev_for_a_model_with_more_inputs(tmp_path, caplog):
    """x_embedder of Fill, Canny and Depth has the latents first."""
    from svdq_pack.tests.hf.inside.support import random_model
    model = random_model(tmp_path, in_features=384)
    down, up = noise(4, 64), noise(256, 4, seed=1)
    model.load_lora_adapter({"diffusion_model.img_in.lora_A.weight": down, "diffusion_model.img_in.lora_B.weight": up})
    x = noise(1, 3, 384)
    model.disable_lora()
    base = model.x_embedder(x)
    model.enable_lora()
    assert distance(model.x_embedder(x) - base, x[..., :64] @ down.t() @ up.t()) <= 1e-5


def test_an_alpha_is_for_the_module_it_names(model, dense):
    """proj_out is also how the names of modules in blocks end, for which PEFT would take it."""
    plain = some(model, {"proj_out", "single_transformer_blocks.0.proj_out"})
    tensors = SPELLINGS["diffusers"](plain)
    tensors["transformer.proj_out.alpha"] = torch.tensor(64.0)
    model.load_lora_adapter(tensors)
    down, up = plain["single_transformer_blocks.0.proj_out"]
    assert distance(weight_change(model, dense)["single_transformer_blocks.0.proj_out"], up @ down) <= 4e-3
    assert model.proj_out.scaling == {"default_0": 16.0}


def test_diff_b_is_not_scaled_by_alpha(model):
    """As ComfyUI has it; lora_B.bias is PEFT's, and is."""
    name, bias, x = "diffusion_model.double_blocks.0.img_mlp.0", noise(512, seed=3), noise(1, 3, 128)
    layer = model.transformer_blocks[0].ff.net[0].proj
    before = layer(x)
    model.load_lora_adapter({f"{name}.lora_down.weight": noise(4, 128) * 0.1, f"{name}.lora_up.weight": torch.zeros(512, 4),
                             f"{name}.alpha": torch.tensor(1.0), f"{name}.diff_b": bias})
    assert distance(layer(x) - before, bias.expand(1, 3, -1)) <= 1e-4


def test_xlabs(nvfp4, model):
    """Their names of q, k, v and of the output, of image (1) and text (2)."""
    other, at, tensors, plain = nvfp4.load(), "double_blocks.0.processor", {}, {}
    for seed, (theirs, ours, n) in enumerate((("qkv_lora1", "img_attn.qkv", 384), ("qkv_lora2", "txt_attn.qkv", 384),
                                              ("proj_lora1", "img_attn.proj", 128), ("proj_lora2", "txt_attn.proj", 128))):
        down, up = noise(4, 128, seed=seed) * 0.1, noise(n, 4, seed=seed + 9) * 0.1
        tensors |= {f"{at}.{theirs}.down.weight": down, f"{at}.{theirs}.up.weight": up}
        plain |= {f"diffusion_model.double_blocks.0.{ours}.lora_{half}.weight": factor
                  for half, factor in zip("AB", (down, up))}
    for one, given in ((model, tensors), (other, plain)):
        pipeline(one).load_lora_weights(given)
    assert torch.equal(nvfp4.run(model), nvfp4.run(other))
    assert distance(nvfp4.run(model), nvfp4.run(nvfp4.load())) > 0.05


def dora(model, name, seed=0):
    n, k = model.get_submodule(name).out_features, model.get_submodule(name).in_features
    return {f"transformer.{name}.lora_A.weight": noise(4, k, seed=seed) * 0.1,
            f"transformer.{name}.lora_B.weight": noise(n, 4, seed=seed + 1) * 0.1,
            f"transformer.{name}.lora_magnitude_vector": 1 + noise(n, seed=seed + 2).abs()}


@pytest.mark.parametrize("hotswap", [False, True])
def test_a_doras_scale_goes_with_it(nvfp4, model, hotswap):
    """A plain LoRA that takes its name has none."""
    name, fresh = "transformer_blocks.0.ff.net.2", nvfp4.load()
    model.load_lora_adapter(dora(model, name), adapter_name="one")
    plain = SPELLINGS["diffusers"](some(fresh, {name}, len(model.get_submodule(name).lora_A["one"].weight)))
    if not hotswap:
        model.delete_adapters("one")
    model.load_lora_adapter(dict(plain), adapter_name="one", hotswap=hotswap)
    fresh.load_lora_adapter(dict(plain), adapter_name="one")
    assert distance(nvfp4.run(model), nvfp4.run(fresh)) <= ROUNDED


def test_a_dora_is_not_saved_without_its_scale(model, tmp_path):
    model.load_lora_adapter(dora(model, "transformer_blocks.0.ff.net.2"), adapter_name="one")
    with pytest.raises(LoraError, match="is a DoRA"):
        model.save_lora_adapter(tmp_path, adapter_name="one")


def test_dora_of_halves_that_are_swapped(nvfp4, model):
    """final_layer.adaLN_modulation.1 is norm_out.linear with its halves the other way round."""
    other, weight = nvfp4.load(), model.norm_out.linear.weight
    down, up, magnitude = noise(4, 128) * 0.1, noise(256, 4, seed=1) * 0.1, 1 + noise(256, 1, seed=2).abs()
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    model.load_lora_adapter({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.dora_scale": magnitude})
    up, magnitude = (torch.cat(part.chunk(2)[::-1]) for part in (up, magnitude))
    other.load_lora_adapter({"transformer.norm_out.linear.lora_A.weight": down, "transformer.norm_out.linear.lora_B.weight": up,
                             "transformer.norm_out.linear.dora_scale": magnitude})
    assert weight.shape == (256, 128) and distance(nvfp4.run(model), nvfp4.run(other)) <= 1e-4


def test_dora_over_columns_of_a_stacked_layer(model, dense):
    """The norm of a column is that of q, k and v together."""
    weight, name = dense["transformer_blocks.0.attn.to_qkv"], "diffusion_model.double_blocks.0.img_attn.qkv"
    down, up, magnitude = noise(4, 128) * 0.1, noise(384, 4, seed=1) * 0.1, weight.norm(dim=0, keepdim=True) * 1.3
    changed = weight + up @ down
    model.load_lora_adapter({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.dora_scale": magnitude})
    wanted = changed * magnitude / changed.norm(dim=0, keepdim=True) - weight
    assert distance(weight_change(model, dense)["transformer_blocks.0.attn.to_qkv"], wanted) <= 0.05


NET = "transformer.transformer_blocks.0.ff.net.2"
WHOLE = {f"{NET}.lora_A.weight": torch.ones(4, 512), f"{NET}.lora_B.weight": torch.ones(128, 4)}
ODD = {"a pattern that is none": (WHOLE, {"lora_alpha": 4, "alpha_pattern": {"(": 1}}),
       "patterns that are no names": (WHOLE, {"lora_alpha": 4, "alpha_pattern": ["a"]}),
       "an alpha beyond numbers": (WHOLE, {"lora_alpha": 10 ** 400}),
       "three alphas": (WHOLE | {f"{NET}.alpha": torch.ones(3)}, None),
       "factors that are rows": ({f"{NET}.lora_A.weight": torch.ones(512), f"{NET}.lora_B.weight": torch.ones(128)}, None),
       "a bias of another length": (WHOLE | {f"{NET}.lora_B.bias": torch.ones(5)}, None),
       "a transposed difference": ({"diffusion_model.double_blocks.0.img_mlp.2.diff": torch.ones(512, 128)}, None),
       "a transposed product": ({"diffusion_model.double_blocks.0.img_mlp.2.lokr_w1": torch.ones(16, 8),
                                 "diffusion_model.double_blocks.0.img_mlp.2.lokr_w2": torch.ones(32, 16)}, None)}


@pytest.mark.parametrize("name", ODD)
def test_what_does_not_fit_together(nvfp4, model, name):
    tensors, metadata = ODD[name]
    before = nvfp4.run(model)
    with pytest.raises(LoraError, match="net.2|img_mlp.2"):
        model.load_lora_adapter(dict(tensors), metadata=metadata)
    assert torch.equal(nvfp4.run(model), before)


REFUSED = {
    "nothing that fits": ({"transformer.some_blocks.0.to_q.lora_A.weight": torch.zeros(4, 8),
                           "transformer.some_blocks.0.to_q.lora_B.weight": torch.zeros(8, 4)}, "nothing in this LoRA"),
    "another width": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 3072),
                       "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(3072, 4)}, "another model"),
    "SDXL": ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(4, 8)}, "SD 1.5 or SDXL"),
    "half a pair": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 128)}, "nothing in this LoRA"),
    "a text encoder's": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)}, "text encoder"),
    "NaN": ({"transformer.transformer_blocks.0.ff.net.2.lora_A.weight": torch.full((4, 512), torch.nan),
             "transformer.transformer_blocks.0.ff.net.2.lora_B.weight": torch.ones(128, 4)}, "NaN"),
    "a product that is Inf": ({"diffusion_model.single_blocks.0.linear2.lokr_w1": torch.full((8, 4), 1e30),
                               "diffusion_model.single_blocks.0.linear2.lokr_w2": torch.full((16, 160), 1e30)}, "NaN or Inf"),
    "no tensors": ({}, "nothing in this LoRA|not a LoRA|no LoRA")}


@pytest.mark.parametrize("door", ["model", "pipeline"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(nvfp4, model, name, door):
    tensors, words = REFUSED[name]
    before = nvfp4.run(model)
    with pytest.raises(LoraError, match=words):
        (model.load_lora_adapter if door == "model" else pipeline(model).load_lora_weights)(dict(tensors))
    assert torch.equal(nvfp4.run(model), before) and not getattr(model, "peft_config", {})


@pytest.mark.parametrize("path", ["/nope/lora.safetensors", "nope.safetensors", "./nope", "folder/nope.safetensors", "~/nope"])
def test_a_path_that_is_none(model, path):
    """Nobody asks Hugging Face for a typing error."""
    with pytest.raises(LoraError, match="no such file"):
        pipeline(model).load_lora_weights(path)


def test_what_is_left_out_is_said(nvfp4, model, caplog):
    tensors = SPELLINGS["diffusers"](some(model, {"transformer_blocks.0.attn.to_q"}))
    tensors["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = torch.zeros(4, 128)
    with caplog.at_level(logging.WARNING):
        model.load_lora_adapter(tensors)
    assert "1 tensors of the LoRA are not for this model" in caplog.text and "transformer_blocks.7" in caplog.text


def test_other_models_are_read_as_before(nvfp4, golden_dir):
    """The function around diffusers' own reads for ours alone."""
    from svdq_pack.tests.hf.inside.support import dense_twin
    twin = dense_twin(nvfp4.load())
    tensors = load_file(golden_dir / f"{LORA}_peft.safetensors")
    pipeline(twin).load_lora_weights(tensors, adapter_name="one")
    assert type(twin.get_submodule("transformer_blocks.0.ff.net.2")).__module__.startswith("peft.")
    lora_files.teach()
    assert lora_files.lora_pipeline.FluxLoraLoaderMixin.load_lora_weights.__wrapped__ is not None
