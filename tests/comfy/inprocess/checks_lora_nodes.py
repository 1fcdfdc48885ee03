"""The pack's own LoRA nodes: what they do is what ComfyUI's nodes do, and what they say about it is true."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.nodes import demo, loras
from svdq_pack.nodes.host import lora as host_lora
from svdq_pack.nodes.loras import NONE, SLOTS, SVDQLoraLoader, SVDQLoraStack
from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.comfy.inprocess import adapters
from svdq_pack.tests.comfy.inprocess.adapters import KINDS, LAYERS
from svdq_pack.tests.comfy.inprocess.support import STRENGTH, hooks, noise, stack, with_lora
from svdq_pack.tests.unit.helpers import limit

import comfy.hooks              # noqa: E402, comes from the tree that support has chosen
import comfy.model_management   # noqa: E402
import comfy.utils              # noqa: E402
import folder_paths             # noqa: E402
from comfy.weight_adapter import WeightAdapterBase      # noqa: E402

MODEL = r"FLUX-like \(dev, Krea or Kontext\), 128 wide, 1 double_blocks and 1 single_blocks"
pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def weights(dev, tmp_path_factory):
    """{name of a layer: its dense weight}"""
    stock = dev.stock(tmp_path_factory.mktemp("dense"))
    return {name: stock.model.get_parameter(layer.key).clone() for name, layer in LAYERS.items()}


@pytest.fixture
def reads(monkeypatch):
    """The paths of the files that were read, as they are."""
    paths, read = [], loras.read_lora
    monkeypatch.setattr(loras, "read_lora", lambda path: paths.append(os.path.basename(path)) or read(path))
    return paths


def load(model, name, strength=STRENGTH):
    """(the MODEL, the lines of the report below its heading)"""
    patched, report = SVDQLoraLoader.execute(model, name, strength).args
    heading, *lines = report.split("\n")
    assert heading == f"{name}, strength {strength:g}"
    return patched, {line[2:16].rstrip(): line[16:] for line in lines}


def random_lora(layers, rank=4, scale=0.3, names=("lora_B.weight", "lora_A.weight")):
    """{layer as it is written: (out, in)} -> tensors"""
    tensors = {}
    for seed, (layer, (n, k)) in enumerate(layers.items()):
        tensors |= {f"{layer}.{names[0]}": noise(n, rank, seed=seed) * scale,
                    f"{layer}.{names[1]}": noise(rank, k, seed=seed + 100) / k ** 0.5}
    return tensors


def plain(patches):
    """A patch list without the objects around its tensors, for comparing."""
    return {key: [(strength, type(adapter), adapter.weights if isinstance(adapter, WeightAdapterBase) else adapter[1],
                   strength_model, offset, function) for strength, adapter, strength_model, offset, function in some]
            for key, some in patches.items()}


def assert_same(mine, theirs):
    """Nested tuples, lists and dicts with tensors in them."""
    if isinstance(theirs, torch.Tensor):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        assert_same(list(mine.values()), list(theirs.values()))
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs):
            assert_same(one, other)
    else:
        assert mine == theirs


# ---- what they do

@pytest.mark.parametrize("name", ["peft", "kohya_bfl"])
def test_like_the_stock_node(dev, folder, name):
    """Bit for bit, and the model that came in is as it was."""
    model, stock = dev.load(), dev.load()
    before = dev.run(model)
    mine = load(model, f"{name}.safetensors")[0]
    theirs = with_lora(stock, load_file(folder / f"{name}.safetensors"))
    assert_same(plain(mine.patches), plain(theirs.patches))
    assert torch.equal(dev.run(mine), dev.run(theirs))
    assert not model.patches and torch.equal(dev.run(model), before)


@pytest.mark.parametrize("kind", [*KINDS, "flux_tools"])
def test_patches_of_every_kind(dev, weights, write, kind):
    """On every layer: the patches that the stock node leaves."""
    file = adapters.flux_tools(weights) if kind == "flux_tools" else {}
    if not file:
        for name, layer in LAYERS.items():
            file |= adapters.make(kind, layer, weights[name])
    model = dev.load()
    mine, facts = load(model, write(kind, file))
    assert_same(plain(mine.patches), plain(with_lora(model, file).patches))
    assert facts["keys"].endswith(" matched, 0 not")


STYLES = {                      # style: (layer of a double block, of a single block, suffix of up, of down)
    "kohya (BFL names)": ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_0_linear2", "lora_up.weight",
                          "lora_down.weight"),
    "diffusers/PEFT": ("transformer.transformer_blocks.0.attn.to_out.0", "transformer.single_transformer_blocks.0.proj_out",
                       "lora_B.weight", "lora_A.weight"),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_out_0",
                   "lora_transformer_single_transformer_blocks_0_proj_out", "lora_up.weight", "lora_down.weight"),
    "LyCORIS (diffusers names)": ("lycoris_transformer_blocks_0_attn_to_out_0",
                                  "lycoris_single_transformer_blocks_0_proj_out", "lora_up.weight", "lora_down.weight"),
    "ComfyUI (diffusion_model.)": ("diffusion_model.double_blocks.0.img_attn.proj",
                                   "diffusion_model.single_blocks.0.linear2", "lora_B.weight", "lora_A.weight"),
    "XLabs": ("double_blocks.0.processor.proj_lora1", "single_blocks.0.processor.proj_lora", "up.weight", "down.weight"),
    "BFL": ("double_blocks.0.img_attn.proj", "single_blocks.0.linear2", "lora_B.weight", "lora_A.weight"),
    "fal / PEFT on BFL names": ("base_model.model.double_blocks.0.img_attn.proj", "base_model.model.single_blocks.0.linear2",
                                "lora_B.weight", "lora_A.weight")}


MORE_STYLES = {                 # the same, (what the report calls it, ...)
    "kohya on diffusers names": ("kohya", "lora_unet_transformer_blocks_0_attn_to_out_0",
                                 "lora_unet_single_transformer_blocks_0_proj_out", "lora_up.weight", "lora_down.weight"),
    "trailing _": ("kohya", "lora_unet_transformer_blocks_0_attn_to_out_0_", "lora_unet_single_transformer_blocks_0_proj_out_",
                   "lora_up.weight", "lora_down.weight"),
    "unet.": ("diffusers/PEFT", "unet.transformer_blocks.0.attn.to_out.0", "unet.single_transformer_blocks.0.proj_out",
              "lora_B.weight", "lora_A.weight"),
    "model.diffusion_model.": ("ComfyUI (diffusion_model.)", "model.diffusion_model.double_blocks.0.img_attn.proj",
                               "model.diffusion_model.single_blocks.0.linear2", "lora_B.weight", "lora_A.weight"),
    "old processor": ("diffusers/PEFT", "unet.transformer_blocks.0.attn.processor.to_out_lora",
                      "unet.single_transformer_blocks.0.proj_out_lora", "up.weight", "down.weight")}


@pytest.mark.parametrize("name", [*STYLES, *MORE_STYLES])
def test_key_styles(dev, write, name):
    """One LoRA in every spelling, by our node, the stock one and a hook: the same model as in kohya's through the stock one."""
    style, *names = MORE_STYLES[name] if name in MORE_STYLES else (name, *STYLES[name])

    def spelt(style):
        double, single, *suffixes = names if style == name else STYLES[style]
        return random_lora({double: (128, 128), single: (128, 640)}, names=suffixes)

    model = dev.load()
    mine, facts = load(model, write("styles", spelt(name)))
    assert facts["key style"] == style and facts["keys"] == "4 matched, 0 not"
    out = dev.run(with_lora(model, spelt("kohya (BFL names)")))
    assert torch.equal(dev.run(mine), out)
    assert torch.equal(dev.run(with_lora(model, spelt(name))), out)
    hooked, group = model.clone(), hooks(spelt(name), (0.0, STRENGTH))
    hooked.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    comfy.model_management.load_models_gpu([hooked])
    hooked.patch_hooks(group)
    assert torch.equal(dev.network(hooked), out)
    hooked.unpatch_hooks()


def test_a_control_lora_in_a_hook(dev, weights, caplog):
    """It changes nothing, as on stock FLUX, and here the log says so."""
    model, group = dev.load(), hooks(adapters.flux_tools(weights), (0.0, STRENGTH))
    model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    assert not model.hook_patches[group.hooks[0].hook_ref]
    assert "a LoRA that widens img_in, such as BFL's Canny and Depth, changes nothing in a hook" in caplog.text
    caplog.clear()
    group = hooks({"img_in.reshape_weight": torch.tensor([128, 128])} | random_lora({"img_in": (128, 128)}), (0.0, STRENGTH))
    model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    assert not model.hook_patches[group.hooks[0].hook_ref] and "changes nothing in a hook" in caplog.text


def test_half_pairs(dev, write, caplog):
    """In a good file they are left out by name, all of them, and a file of nothing else is refused for what it is."""
    whole = random_lora({"transformer.transformer_blocks.0.attn.to_out.0": (128, 128)})
    halves = {key: tensor for key, tensor in random_lora({"transformer.single_transformer_blocks.0.proj_out": (128, 640),
                                                          "transformer.x_embedder": (128, 64)}).items() if "lora_A" in key}
    halves["transformer.context_embedder.lora_magnitude_vector.weight"] = torch.ones(128)
    _, facts = load(dev.load(), write("some", whole | halves))
    assert facts["keys"] == "2 matched, 0 not"
    assert facts["half a pair"] == f"3 keys left out, their other factor is missing: {', '.join(sorted(halves))}"
    with pytest.raises(LoraError, match=r"halves.safetensors: its pairs are half, the other factors are missing: transform"):
        load(dev.load(), write("halves", halves))


def test_many_keys_that_do_not_match(dev, write, caplog):
    """The report names twenty, the log all."""
    file = random_lora({"transformer.transformer_blocks.0.attn.to_out.0": (128, 128),
                        **{f"transformer.nothing.{i:02}": (128, 128) for i in range(15)}})
    with caplog.at_level("INFO"):
        _, facts = load(dev.load(), write("many", file))
    assert facts["keys"] == "2 matched, 30 not" and facts["not matched"].count("nothing") == 20
    assert facts["not matched"].endswith(", ... (the log has all)")
    assert all(f"transformer.nothing.{i:02}.lora_B.weight" in caplog.text for i in range(15))


def test_stacks_and_loaders_in_a_row(dev, folder):
    """In any mix with stock nodes; what matters is the order."""
    model, peft, kohya = dev.load(), "peft.safetensors", "kohya_bfl.safetensors"
    tensors = {name: load_file(folder / name) for name in (peft, kohya)}
    expected = model
    for name, strength in ((peft, 0.5), (kohya, -0.25), (peft, 0.75)):
        expected = with_lora(expected, tensors[name], strength)
    stacked = stack(model, (NONE, 1.0), (peft, 0.5), (kohya, -0.25), (peft, 0.0), (peft, 0.75))[0]
    mixed = stack(with_lora(load(model, peft, 0.5)[0], tensors[kohya], -0.25), (peft, 0.75))[0]
    out = dev.run(expected)
    for one in (stacked, mixed):
        assert_same(plain(one.patches), plain(expected.patches))
        assert torch.equal(dev.run(one), out)


def test_last_slot(dev):
    slots = {f"lora_{SLOTS}": "peft.safetensors", f"strength_{SLOTS}": 0.5}
    model = dev.load()
    assert_same(plain(SVDQLoraStack.execute(model, **slots).args[0].patches),
                plain(load(model, "peft.safetensors", 0.5)[0].patches))


def test_nothing_to_do(dev):
    """The model itself comes out."""
    model = dev.load()
    assert stack(model) == (model, "no LoRA chosen")
    assert stack(model, (NONE, 1.0), ("peft.safetensors", 0)) == (
        model, "peft.safetensors, strength 0\n  at strength 0: not applied")
    assert SVDQLoraLoader.execute(model, "peft.safetensors", 0.0).args[0] is model


# ---- img_in of models and LoRAs that take more than latents

@pytest.mark.parametrize("width", [32, 96, 128])
def test_other_widths_are_refused(make_model, write, width):
    """Nobody knows what such columns are."""
    with pytest.raises(LoraError, match="fit 1 of its 1 weights, the first is img_in"):
        load(make_model(in_features=384).load(), write("odd", random_lora({"transformer.x_embedder": (128, width)})))


# ---- files are read once, and again when they changed

def test_strength_reads_no_file(dev, reads):
    model = dev.load()
    dev.run(load(model, "peft.safetensors", 0.5)[0])
    factors = {key: layer.factors for key, layer in model.layers().items()}
    for strength in (1.0, -0.25):
        again = load(model, "peft.safetensors", strength)[0]
        stack(model, ("peft.safetensors", strength))
        dev.run(again)
        assert {key: layer.factors for key, layer in model.layers().items()} == factors     # written into, not built anew
    assert reads == ["peft.safetensors"]


def test_replaced_file(dev, folder, reads):
    model, kohya = dev.load(), load_file(folder / "kohya_bfl.safetensors")
    before, stamp = load(model, "peft.safetensors")[0], SVDQLoraLoader.fingerprint_inputs("peft.safetensors", strength=1.0)
    out = dev.run(before)
    assert SVDQLoraLoader.fingerprint_inputs("peft.safetensors") == stamp
    assert SVDQLoraStack.fingerprint_inputs(lora_1=NONE, lora_3="peft.safetensors") == [stamp]
    model.detach()
    (folder / "peft.safetensors").write_bytes((folder / "kohya_bfl.safetensors").read_bytes()[:100])     # in place
    assert torch.equal(dev.run(before), out)                    # what is loaded does not hang on the file
    shutil.copy(folder / "kohya_bfl.safetensors", folder / "peft.safetensors")
    assert SVDQLoraLoader.fingerprint_inputs("peft.safetensors") != stamp
    after = load(model, "peft.safetensors")[0]
    assert torch.equal(dev.run(after), dev.run(with_lora(model, kohya)))
    assert reads == ["peft.safetensors"] * 2


def test_memory_for_files_is_bounded(dev, folder, reads, monkeypatch):
    """Those used last are kept."""
    model = dev.load()
    size = (folder / "peft.safetensors").stat().st_size
    for name in "abc":
        shutil.copy(folder / "peft.safetensors", folder / f"{name}.safetensors")
    monkeypatch.setattr(loras, "KEPT", int(2.5 * size))
    for name in "abaca":                                        # c makes b go
        load(model, f"{name}.safetensors")
    assert reads == ["a.safetensors", "b.safetensors", "c.safetensors"]
    load(model, "b.safetensors")
    assert reads[3:] == ["b.safetensors"] and len(loras._files) == 2
    monkeypatch.setattr(loras, "KEPT", 0)
    load(model, "c.safetensors")
    assert len(loras._files) == 1                               # the one in use stays


# ---- the report

def test_report(dev):
    assert load(dev.load(), "peft.safetensors")[1] == {
        "key style": "diffusers/PEFT", "adapters": "15 LoRA", "keys": "30 matched, 0 not",
        "layers": "6 in 4 bit, 4 in 16 bit",
        "rank": "0 + 4 on 2, 16 + 4 on 2, 16 + 12 on 2 layers: of the model's file + of all LoRAs so far"}


def test_names_are_on_one_line(dev, folder):
    """A file's name writes no lines of the report."""
    name = "a\n  keys          30 matched, 0 not\n.safetensors"
    shutil.copy(folder / "peft.safetensors", folder / name)
    lines = SVDQLoraLoader.execute(dev.load(), name).args[1].split("\n")
    assert lines[0] == "a\\n  keys          30 matched, 0 not\\n.safetensors, strength 1"
    assert sum(line.startswith("  keys") for line in lines) == 1


def test_report_of_a_stack(dev):
    """One part per LoRA, and the frontend gets it too."""
    output = SVDQLoraStack.execute(dev.load(), lora_1="peft.safetensors", strength_1=0.5, lora_2="kohya_bfl.safetensors")
    assert output.ui == {"text": (output.args[1],)}
    first, second = output.args[1].split("kohya_bfl.safetensors, strength 1\n")
    assert first.startswith("peft.safetensors, strength 0.5\n") and "diffusers/PEFT" in first
    assert "kohya (BFL names)" in second and "0 + 8 on 2, 16 + 8 on 2, 16 + 24 on 2 layers" in second


def test_what_is_left_out(int4, write):
    """Keys nobody knows, those for text encoders, and layers that this variant of FLUX has not."""
    file = random_lora({**{f"transformer.unheard.{i}": (4, 4) for i in range(3)}, "transformer.x_embedder": (256, 64),
                        "transformer.time_text_embed.guidance_embedder.linear_2": (256, 256),
                        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (4, 4)})
    facts = load(int4.load(), write("odd", file))[1]
    assert facts["keys"] == "4 matched, 6 not" and facts["layers"] == "0 in 4 bit, 1 in 16 bit" and "rank" not in facts
    assert facts["not matched"] == ", ".join(sorted(key for key in file if "unheard" in key))
    assert facts["absent"] == "1 weights this model does not have, the first is guidance_in.out_layer"
    assert facts["text encoder"].startswith("2 keys left out") and "(LoraLoader)" in facts["text encoder"]


@pytest.mark.parametrize("kind, rank", [("lora_parts", "12"), ("lora_shared_down", "4")])
def test_rank(dev, weights, write, kind, rank):
    """q, k and v that share their down need it once."""
    patched, facts = load(dev.load(), write(kind, adapters.make(kind, LAYERS["qkv"], weights["qkv"])))
    assert facts["rank"].startswith(f"16 + {rank} on 1 layers")
    dev.run(patched)
    layer = patched.layers()[LAYERS["qkv"].key]
    assert sum(len(part.down) for part in layer.factors.shared_downs[0]) == int(rank)


def test_rank_beyond_the_fused(dev, weights, write):
    file = {}
    for name, rank in (("proj", 112), ("mlp.0", 113), ("linear2", 160), ("img_mod", 200)):
        file |= adapters.make("lora", LAYERS[name], weights[name], rank=rank)
    patched, facts = load(dev.load(), write("much", file))
    assert facts["beyond 128"] == "up to 48 on 2 layers: 16-bit matmuls beside the fused kernels"
    dev.run(patched)
    over = {name: layer.factors.sections.view(layer.lora)[0].down for name, layer in patched.layers().items() if layer.factors}
    assert {LAYERS[name].key: rank for name, rank in (("mlp.0", 1), ("linear2", 48), ("img_mod", 200))} == {
        key: len(down) for key, down in over.items() if down is not None}


@pytest.fixture
def factorings(monkeypatch):
    """The shapes of what was factored."""
    shapes = []
    for name in ("factorise", "factorise_with_output_scale"):
        def count(delta, *rest, original=getattr(host_lora, name)):         # noqa: B008, of this turn
            shapes.append(tuple(delta.shape))
            return original(delta, *rest)
        monkeypatch.setattr(host_lora, name, count)
    return shapes


def test_factored(dev, weights, write, factorings):
    """What is said is what the host did, which it need not do again: not for sampling, strengths or further LoRAs."""
    file = {}
    for name, kind in (("proj", "lokr_factored"), ("mlp.0", "lokr_factored"), ("linear2", "loha"), ("qkv", "lora")):
        file |= adapters.make(kind, LAYERS[name], weights[name])
    model, name = dev.load(), write("zoo", file)
    patched, facts = load(model, name)
    assert sorted(facts["adapters"].split(", ")) == ["1 LoHa", "1 LoRA", "2 LoKr"]
    dev.run(patched)
    found = patched.model.svdq_said[0]
    ranks, worst = sorted(one.rank for one in found), max(found, key=lambda one: one.error)
    assert len(found) == 3 and facts["factored"] == (
        f"3 adapters that are no LoRA, at rank {ranks[0]} to {ranks[-1]}; relative error of the change at most "
        f"{worst.error:.1e}, in {worst.key.removeprefix('diffusion_model.').removesuffix('.weight')}")
    assert len(factorings) == 3
    dev.run(stack(load(model, name, -0.5)[0], ("peft.safetensors", 0.5))[0])
    assert len(factorings) == 3
    assert "factored" not in load(patched, "peft.safetensors")[1]       # that was the LoRA before it


def test_dora_is_factored_once(dev, weights, write, factorings):
    """It depends on the weight and on the LoRAs before it, on which strengths too."""
    model = dev.load()
    patched, facts = load(model, write("dora", adapters.make("dora_out", LAYERS["proj"], weights["proj"])))
    assert facts["adapters"] == "1 DoRA" and facts["factored"].startswith("1 adapters that are no LoRA, at rank ")
    dev.run(patched)
    assert len(factorings) == 1


@pytest.mark.parametrize("kind", ["lora", "lokr", "diff"])
def test_adapters_without_effect(dev, weights, write, kind):
    """They are named; a file that has no others is refused."""
    good = adapters.make("lora", LAYERS["proj"], weights["proj"])
    zero = {key: torch.zeros_like(tensor) if "alpha" not in key else tensor
            for name in ("img_in", "mlp.0") for key, tensor in adapters.make(kind, LAYERS[name], weights[name]).items()}
    facts = load(dev.load(), write("half", good | zero))[1]
    assert facts["no effect"] == "2 adapters, which are zero, the first for img_in"
    with pytest.raises(LoraError, match="would change nothing: its 2 adapters, or their alphas, are zero, the first for"):
        load(dev.load(), write("idle", zero))


def test_alpha_of_zero(dev, weights, write):
    file = adapters.make("lora", LAYERS["proj"], weights["proj"])
    file[next(key for key in file if key.endswith(".alpha"))] = torch.zeros(())
    with pytest.raises(LoraError, match="would change nothing"):
        load(dev.load(), write("alpha", file))


def test_pairs_of_rank_0(dev, weights, write):
    """Left out and named, on layers in 4 bit and in 16; the rest is what it is without them."""
    good, model = adapters.make("lora", LAYERS["proj"], weights["proj"]), dev.load()
    none = random_lora({"lora_unet_img_in": (128, 64), "lora_unet_single_blocks_0_linear2": (128, 640)}, 0, names=KOHYA)
    mine, facts = load(model, write("some", good | none | {"lora_unet_img_in.alpha": torch.ones(())}))
    assert facts["keys"] == "3 matched, 0 not"
    assert facts["rank 0"].startswith("5 keys left out, their adapters have no numbers: lora_unet_img_in.alpha, lora_unet_im")
    assert torch.equal(dev.run(mine), dev.run(load(model, write("good", good))[0]))
    with pytest.raises(LoraError, match="of rank 0, without numbers: lora_unet_img_in.lora_down.weight, .*, \\.\\.\\."):
        load(model, write("none", none))


def test_two_names_of_one_weight(dev, weights, write):
    """The one that ComfyUI would take is applied, and the report says what is not."""
    first, second = (random_lora({layer: (128, 64)}, names=KOHYA)
                     for layer in ("lora_unet_img_in", "lora_transformer_x_embedder"))
    second = {key: tensor * 2 for key, tensor in second.items()}
    diff = {"lora_unet_img_in.diff": noise(128, 64)}
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in random_lora({"transformer.x_embedder": (128, 64)}).items()}
    bare = random_lora({"transformer.x_embedder": (128, 64)})
    for file, kept in ((first | second, second), (second | first, second), (first | diff, diff), (bare | wrapped, bare)):
        model = dev.load()
        mine, facts = load(model, write("twice", file))
        assert facts["keys"] == f"{len(kept)} matched, 0 not"
        assert facts["twice"].startswith("2 keys left out, others are for the same weights: ")
        assert_same(plain(mine.patches), plain(load(model, write("once", kept))[0].patches))


def test_every_key_is_accounted_for(dev, weights, write):
    file = random_lora({"transformer.x_embedder": (128, 64), "transformer.unheard": (4, 4), "text_encoder.text_model.x": (4, 4),
                        "transformer.transformer_blocks.0.attn.to_q": (128, 128)})
    file |= random_lora({"transformer.context_embedder": (128, 128)}, 0)
    file |= random_lora({"lora_unet_img_in": (128, 64)}, names=KOHYA)
    facts = load(dev.load(), write("all", file))[1]
    counts = {name: int(facts[name].split()[0]) for name in ("rank 0", "twice", "text encoder")}
    matched, other = facts["keys"].split(" matched, ")
    assert counts == {"rank 0": 2, "twice": 2, "text encoder": 2} and (matched, other) == ("4", "2 not")
    assert sum(counts.values()) + int(matched) + int(other.split()[0]) == len(file)


def test_interrupt(dev, weights, write):
    """Cancel ends the factoring; the next run works."""
    model = dev.load()
    name = write("zoo", adapters.make("lokr", LAYERS["proj"], weights["proj"]))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load(model, name)
    assert "factored" in load(model, name)[1]


def test_progress(dev, monkeypatch):
    """A step per weight."""
    model, steps = dev.load(), []

    class Bar:
        def __init__(self, total):
            steps.append(total)

        def update(self, by):
            steps.append(by)

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    mine = load(model, "peft.safetensors")[0]
    assert steps == [len(mine.patches)] + [1] * len(mine.patches)


# ---- when things go wrong

WIDER = {"transformer.transformer_blocks.0.attn.to_q": (256, 256), "transformer.x_embedder": (256, 64)}
QWEN = {f"transformer_blocks.0.{layer}": (128, 128) for layer in ("attn.to_q", "attn.add_k_proj", "img_mlp.net.2")}
HUNYUAN = {f"lora_unet_double_blocks_0_{layer}": (128, 128) for layer in ("img_attn_proj", "txt_mlp_fc1")}
SDXL = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (64, 64)}
KOHYA, PROJ = ("lora_up.weight", "lora_down.weight"), "lora_unet_double_blocks_0_img_attn_proj"
BAD = {                         # name: (file, what is said)
    "sdxl": (random_lora(SDXL, names=KOHYA), "a LoRA for SD 1.5 or SDXL with kohya keys, and the model is FLUX.1"),
    "qwen": (random_lora(QWEN), "a LoRA for Qwen-Image with diffusers/PEFT keys.*Get this LoRA for FLUX.1"),
    "hunyuan": (random_lora(HUNYUAN, names=KOHYA), "a LoRA for HunyuanVideo with kohya"),
    "unheard-of": (random_lora({"lora_unet_transformers_0_attn_to_q": (128, 128)}, names=KOHYA),
                   "none of its 2 keys is for a layer of the model. Its key style is kohya, for instance "
                   rf"lora_unet_transformers_0_attn_to_q.lora_down.weight, .*; the model is {MODEL}. Get this LoRA"),
    "text-encoder": (random_lora({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 4)}, names=KOHYA),
                     r"text encoders alone.*'Load LoRA' \(LoraLoader\)"),
    "embedding": ({"clip_l": torch.zeros(2, 8), "t5xxl": torch.zeros(2, 8)}, "an embedding, not a LoRA.*models/embeddings"),
    "nunchaku": ({f"transformer_blocks.0.{layer}.lora_{way}": torch.zeros(16, 16) for layer in ("qkv_proj", "mlp_fc1")
                  for way in ("down", "up")}, "Nunchaku's own format.*that file's branch too.*Load the original LoRA"),
    "controlnet": ({"controlnet_blocks.0.weight": torch.zeros(8, 8)}, "a ControlNet; put it in models/controlnet"),
    "empty": ({}, "none of its 0 keys.*key style is unknown, for instance nothing"),
    "wider": (random_lora(WIDER), r"does not fit 2 of its 2 weights, the first is double_blocks.0.img_attn.qkv: its factors "
              rf"are \[256, 4\] and \[4, 256\], the weight is \[128, 128\].*the model is {MODEL}. Get the LoRA made for it"),
    "wide-in-16-bit": (random_lora({"transformer.x_embedder": (128, 128)}), "fit 1 of its 1 weights, the first is img_in"),
    "half": ({"transformer.x_embedder.lora_B.weight": torch.zeros(128, 4)},
             "incomplete or malformed: 'transformer.x_embedder.lora_A.weight'. The file is damaged"),
    "odd-alpha": (random_lora({"lora_unet_img_in": (128, 64)}, names=KOHYA) | {"lora_unet_img_in.alpha": torch.zeros(2)},
                  "incomplete or malformed: a Tensor with 2 elements"),
    "nan": (random_lora({"transformer.x_embedder": (128, 64)}, scale=float("nan")), "lora_B.weight contains NaN or Inf"),
    "inf": (random_lora({"lora_unet_img_in": (128, 64)}, names=KOHYA) | {"lora_unet_img_in.alpha": torch.tensor(torch.inf)},
            "lora_unet_img_in.alpha contains NaN or Inf"),
    "large": ({f"{PROJ}.diff": torch.full((128, 128), 3e38)},
              "double_blocks.0.img_attn.proj.*numbers up to 3e.38, which become Inf"),
    "flat": ({f"{PROJ}.lora_up.weight": torch.ones(128), f"{PROJ}.lora_down.weight": torch.tensor(1.0)},
             "it does not fit 1 of its 1 weights, the first is double_blocks.0.img_attn.proj: its factors"),
    "flat-in-16-bit": ({f"lora_unet_img_in.{suffix}": torch.ones(()) for suffix in KOHYA},
                       "it does not fit 1 of its 1 weights, the first is img_in: its factors are .. and ..,"),
    "odd-shapes": ({f"{PROJ}.hada_{factor}": torch.ones(3, 4) for factor in ("w1_a", "w1_b", "w2_a", "w2_b")},
                   r"fit 1 of its 1 weights, the first is double_blocks.0.img_attn.proj: its factors are \[3, 4\], .*is \[128"),
    "product": ({f"{PROJ}.lokr_w1": torch.ones(4000, 1000), f"{PROJ}.lokr_w2": torch.ones(1000, 4000)},     # of 64 TB
                r"fit 1 of its 1 weights.*its factors are \[4000, 1000\], \[1000, 4000\], the weight is \[128, 128\]"),
    "wide-product": ({f"{PROJ}.a1.weight": torch.ones(128, 1), f"{PROJ}.a2.weight": torch.ones(1, 10**6),
                      f"{PROJ}.b1.weight": torch.ones(128, 1), f"{PROJ}.b2.weight": torch.ones(1, 128)}, "fit 1 of its 1"),
    "dora-scale": (random_lora({PROJ: (128, 128)}, names=KOHYA) | {f"{PROJ}.dora_scale": torch.ones(10**6, 1)},
                   r"its DoRA scale is \[1000000, 1\], the weight is \[128, 128\]"),
    "half-of-a-lokr": ({f"{PROJ}.lokr_w1_a": torch.ones(8, 4), f"{PROJ}.lokr_w2": torch.ones(16, 16)}, "fit 1 of its 1"),
    "reshape-of-0-axes": (random_lora({"lora_unet_img_in": (128, 64)}, names=KOHYA) | {
        "lora_unet_img_in.reshape_weight": torch.tensor(128)}, "img_in: it wants a weight of 128, which is"),
    "reshape-of-floats": (random_lora({"lora_unet_img_in": (128, 64)}, names=KOHYA) | {
        "lora_unet_img_in.reshape_weight": torch.tensor([128.0, 64.0])}, r"img_in: it wants a weight of \[128.0, 64.0\]"),
    "reshape-of-a-terabyte": (random_lora({"lora_unet_img_in": (128, 64)}, names=KOHYA) | {
        "lora_unet_img_in.reshape_weight": torch.tensor([10**6, 10**6])}, r"img_in: it wants a weight of \[1000000, 1000000\]"),
    "reshape-in-4-bit": (random_lora({PROJ: (128, 128)}, names=KOHYA) | {f"{PROJ}.reshape_weight": torch.tensor([128, 256])},
                         r"img_attn.proj: it wants a weight of \[128, 256\]"),
    "bias": ({"diffusion_model.img_in.diff_b": torch.ones(1)}, r"img_in.bias: it is \[1\], the weight is \[128\]")}


@pytest.mark.parametrize("name", BAD)
def test_bad_lora(dev, write, name):
    """One message that begins with the file's name; nothing of a stack is applied, and all works as before."""
    tensors, message = BAD[name]
    model, file = dev.load(), write(name, tensors)
    good = dev.run(load(model, "peft.safetensors")[0])
    with pytest.raises(LoraError, match=f"^{file}: .*{message}"):
        stack(model, ("peft.safetensors", 0.5), (file, 1.0))
    with pytest.raises(LoraError, match=f"^{file}: "):                  # not from a cache, either
        load(model, file)
    assert not model.patches
    assert torch.equal(dev.run(load(model, "peft.safetensors")[0]), good)


@pytest.mark.parametrize("name, content", [
    ("cut.safetensors", None), ("page.safetensors", b"<!DOCTYPE html><html></html>"), ("none.safetensors", b""),
    ("short.safetensors", b"\0\0"), ("cut.sft", None), ("page.pt", b"<!DOCTYPE html>"), ("none.ckpt", b""),
    ("cut.pt", None)])
def test_unreadable_file(dev, folder, name, content):
    whole = (folder / "peft.safetensors").read_bytes()
    if name == "cut.pt":
        torch.save(load_file(folder / "peft.safetensors"), folder / name)
        whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:len(whole) // 2] if content is None else content)
    with pytest.raises(LoraError, match=f"^{name}: not a readable LoRA file: .+ get it again$"):
        load(dev.load(), name)


@pytest.mark.parametrize("key", ["{}", "lora_unet_double_blocks_0_img_attn_proj.x{}",
                                 "transformer.transformer_blocks.{}.attn.to_q.lora_A.weight"])
def test_many_tensors(dev, write, key):
    """Without numbers, and as many as a file may have: one error, in time."""
    name = write("many", {key.format(i): torch.empty(0, 4) for i in range(19_990)})
    with limit(120), pytest.raises(LoraError, match="^many.safetensors: ") as caught:
        load(dev.load(), name)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_name_that_is_no_text(dev, folder, suffix):
    """Other systems write other bytes than UTF-8: the file loads, and is reported with them escaped."""
    tensors, name, model = load_file(folder / "peft.safetensors"), os.fsdecode(b"lora-\xff.") + suffix, dev.load()
    torch.save(tensors, folder / "a") if suffix == "pt" else save_file(tensors, folder / "a")
    (folder / "a").rename(folder / name)
    mine, report = SVDQLoraLoader.execute(model, name, STRENGTH).args
    assert_same(plain(mine.patches), plain(load(model, "peft.safetensors")[0].patches))
    assert report.startswith(rf"lora-\udcff.{suffix}, strength")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"x": 1}, {1: torch.zeros(3)}, {"state_dict": 5}])
def test_odd_pickles(dev, folder, content):
    torch.save(content, folder / "odd.pt")
    with pytest.raises(LoraError, match="^odd.pt: (not a readable LoRA file|none of its 0 keys)"):
        load(dev.load(), "odd.pt")


def test_pickle(dev, folder):
    torch.save(load_file(folder / "peft.safetensors"), folder / "old.pt")
    model = dev.load()
    assert torch.equal(dev.run(load(model, "old.pt")[0]), dev.run(load(model, "peft.safetensors")[0]))


def test_whole_models(case, dev, folder, tmp_path_factory):
    """In the wrong folder. They are refused before they are read."""
    shutil.copy(case.path, folder / "svdq.safetensors")
    dense = tmp_path_factory.mktemp("dense")
    case.stock(dense)
    shutil.copy(next(dense.iterdir()), folder / "dense.safetensors")
    for name, message in (("svdq", "a whole SVDQ FLUX model.*SVDQ Loader"), ("dense", "a FLUX model that is not SVDQ")):
        with pytest.raises(LoraError, match=f"^{name}.safetensors: this is {message}"):
            load(dev.load(), f"{name}.safetensors")


def test_missing_file(dev):
    """It went after ComfyUI had checked the list."""
    with pytest.raises(LoraError, match="^gone.safetensors: no such file in models/loras. Press R"):
        load(dev.load(), "gone.safetensors")


def test_misfits_of_an_earlier_node(dev, write):
    """A stock node leaves out what does not fit; that is no fault of the LoRA after it."""
    model = dev.load()
    earlier = with_lora(model, random_lora(WIDER))
    mine, facts = load(earlier, "peft.safetensors")
    assert facts["keys"] == "30 matched, 0 not" and mine.patches
    with pytest.raises(LoraError, match="does not fit 2 of its 2"):
        load(earlier, write("wider", random_lora(WIDER)))


@pytest.mark.parametrize("name", [5, None, ["peft.safetensors"]])
def test_names_that_are_none(dev, name):
    """What is linked to an input reaches a node unchecked."""
    for node, slot in ((SVDQLoraLoader, "lora_name"), (SVDQLoraStack, "lora_1")):
        with pytest.raises(LoraError, match="^(5|None|..peft.safetensors..): no such file in models/loras"):
            node.execute(dev.load(), **{slot: name})
        with pytest.raises(LoraError, match="no such file in models/loras"):
            node.fingerprint_inputs(**{slot: name})


@pytest.mark.parametrize("strength", [float("nan"), "abc", "1", "", [1], [], None])
def test_strengths_that_are_none(dev, strength):
    """NaN passes ComfyUI's limits, and JSON of Python has it; what is linked to an input reaches a node unchecked."""
    model = dev.load()
    for node in (SVDQLoraLoader.execute, lambda model, *pair: stack(model, pair)):
        with pytest.raises(LoraError) as caught:
            node(model, "peft.safetensors", strength)
        assert str(caught.value).startswith(f"peft.safetensors: the strength of a LoRA is {strength!r}. Give a number")
    with pytest.raises(LoraError, match="^the strength of a LoRA is "):         # of a node of ComfyUI
        model.add_patches({}, strength)
    assert not model.patches


def test_model_that_is_not_svdq(dev, tmp_path_factory):
    model = dev.stock(tmp_path_factory.mktemp("dense"))
    for node, slot in ((SVDQLoraLoader, "lora_name"), (SVDQLoraStack, "lora_1")):
        with pytest.raises(LoraError, match="ordinary one. Use 'Load LoRA .Model.' .*'SVDQ Loader'"):
            node.execute(model, **{slot: "peft.safetensors"})


def test_the_demos_lora_comes_after_the_users(folder, monkeypatch):
    """In both nodes, and one of the user's under its name is the user's."""
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    name, = demos = demo.files("loras")
    users = ["kohya_bfl.safetensors", "peft.safetensors"]
    for node, key, before in ((SVDQLoraLoader, "lora_name", []), (SVDQLoraStack, "lora_5", [NONE])):
        chosen, = (given for given in node.define_schema().inputs if given.id == key)
        assert chosen.options == [*before, *users, name]
    assert loras._stamp(name)[0] == demos[name]
    shutil.copy(folder / users[0], folder / name)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert loras._stamp(name)[0] == str(folder / name) and loras._names().count(name) == 1
