"""A LoRA comes out of every door as its file has it: beside W + s B A, written out here in float64.

`-s` prints the table of errors: rows are cases, columns doors.
"""

import inspect
import itertools
import logging

import pytest
import torch
from torch.nn.functional import pad

from svdq_pack.nodes.host.lora import IMG_IN
from svdq_pack.nodes.loras import SVDQLoraLoader
from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.comfy.inprocess import adapters
from svdq_pack.tests.comfy.inprocess.adapters import ALPHA, LAYERS, SIZE, Layer
from svdq_pack.tests.comfy.inprocess.support import FLOAT_LAYER, LAYER, STRENGTH, distance, hooks, noise, stack, with_lora

import comfy.hooks              # noqa: E402, comes from the tree that support has chosen
import comfy.lora               # noqa: E402
import comfy.model_management   # noqa: E402

# Every linear of FLUX.
ALL = {**LAYERS, **{name: Layer(name, parts, (1,) * len(parts)) for name, parts in {
    "double_blocks.0.txt_attn.qkv": tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn.to_add_out",),
    "double_blocks.0.txt_mlp.0": ("transformer_blocks.0.ff_context.net.0.proj",),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2",),
    "double_blocks.0.txt_mod.lin": ("transformer_blocks.0.norm1_context.linear",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",)}.items()}}
SWAPPED = "final_layer.adaLN_modulation.1"      # diffusers has the scale first, BFL the shift
LATENT = 64                                     # columns of img_in that are for the latents
DORA = {name: LAYERS[name] for name in ("qkv", "mlp.0", "mlp.2", "linear1", "linear2", "img_in")}
MAGNITUDE = ".lora_magnitude_vector"
STRENGTHS = {"dev": 0.75, "control": 0.5, "wide": -1.25, "fill": 1.25, "dora": 0.75}


# ---- the reference

def changed(weight, layer, file, strength):
    """A weight [n, k], float64, under the pairs of a file. Those in BFL's names may widen it; of others, what is too wide is
    left out, and what is too narrow is for the first columns."""
    places = [(layer.name, slice(None)), *((f"transformer.{part}", rows) for part, rows in layer.rows(len(weight)))]
    for name, rows in places:
        if f"{name}.lora_B.weight" not in file:
            continue
        up, down = (file[f"{name}.lora_{which}.weight"].double() for which in "BA")
        alpha, more = file.get(f"{name}.alpha", torch.tensor(len(down))).double(), down.shape[1] - weight.shape[1]
        if more > 0 and name == layer.name:
            weight = pad(weight, (0, more))
        elif more > 0:
            continue
        change = alpha / len(down) * up @ down
        part = weight[rows][:, :change.shape[1]]
        if layer.name == SWAPPED:
            change = change.roll(len(change) // 2, 0)
        for magnitude in (tensor for key, tensor in file.items() if key.startswith(name + MAGNITUDE)):
            norm = part.square().sum(1).sqrt() + torch.finfo(torch.float32).eps
            change = (magnitude.double() / norm)[:, None] * (part + change) - part
        change = pad(change, (0, max(0, -more)))
        weight = weight.clone()
        weight[rows] += strength * change
    return weight


# ---- the doors

DOORS = {                       # ways of the first LoRA of a chain, the second, ...; the last way is that of all others
    "node": ("node",), "stack": ("stack",), "stock": ("stock",), "hook": ("hook",), "stock, hook": ("stock", "hook"),
    "hook, stock": ("hook", "stock")}
FOUR = ["node", "stack", "stock", "hook"]


def through(door, model, write, files, chain):
    """(MODEL, group of hooks, reports of our nodes) after [(name of a file, strength)] through a door."""
    group, reports = comfy.hooks.HookGroup(), []
    if door == "stack":
        model, report = stack(model, *((write(name, files[name]), strength) for name, strength in chain))
        return model, group, [report]
    for way, (name, strength) in zip(_ways(door), chain):
        if way == "node":
            model, report = SVDQLoraLoader.execute(model, write(name, files[name]), strength).args
            reports.append(report)
        elif way == "stock":
            model = with_lora(model, files[name], strength)
        else:
            group = group.clone_and_combine(hooks(files[name], (0.0, strength)))
    return model, group, reports


def _ways(door):
    return itertools.chain(DOORS[door], itertools.repeat(DOORS[door][-1]))


def applied(door, chain):
    """A chain in the order that counts: what hooks bring comes last. A control LoRA changes nothing there."""
    ways = list(zip(_ways(door), chain))
    return [one for way, one in ways if way != "hook"] + [one for way, one in ways if way == "hook" and one[0] != "control"]


def weights(model, group=None):
    """{name: the weight, float64}, of 4-bit layers what they multiply by."""
    if group is not None:
        model = model.clone()
        model.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    comfy.model_management.load_models_gpu([model])
    if group is not None:
        model.patch_hooks(group)
    found = {}
    for name, layer in ALL.items():
        module = model.model.get_submodule(f"diffusion_model.{layer.name}")
        if module.quantised:
            nothing, *columns = module(pad(torch.eye(module.in_features), (0, 0, 1, 0)))
            found[name] = torch.stack(columns, 1).double() - nothing.double()[:, None]
        else:
            found[name] = module.weight.double()
    model.unpatch_hooks()
    return found


class Bench:
    """One case: a model, and the errors of LoRAs on it."""

    def __init__(self, model, table, case):
        self.model, self.table, self.case, self.base = model, table, case, weights(model)

    def check(self, door, write, files, chain):
        """{name: weight}, reports: every layer is what the reference says, and without LoRA again what it was."""
        model, group, reports = through(door, self.model, write, files, chain)
        found, errors = weights(model, group if group.hooks else None), {True: [0.0], False: [0.0]}
        for name, layer in ALL.items():
            before = expected = self.base[name]
            for one, strength in applied(door, chain):
                expected = changed(expected, layer, files[one], strength)
            before = pad(before, (0, expected.shape[1] - before.shape[1]))
            if torch.equal(expected, before):
                assert torch.equal(found[name], before), name
            else:
                plain = f"diffusion_model.{layer.name}.weight" not in self.model.layers()
                errors[plain].append(distance(found[name] - before, expected - before))
                assert errors[plain][-1] <= (FLOAT_LAYER if plain else LAYER), (name, errors[plain][-1])
        self.table[self.case, door] = f"{max(errors[False]):.1e}|{max(errors[True]):.1e}"
        again = weights(self.model)
        assert all(torch.equal(again[name], weight) for name, weight in self.base.items())
        return found, reports


@pytest.fixture(scope="module")
def table():
    """{(case, door): "greatest error of a 4-bit layer|of a 16-bit one"}, printed at the end."""
    found = {}
    yield found
    print(f"\nerror of the change, layers in 4 bit|in 16 bit\n{'':28}", *(f"{door:15}" for door in DOORS))
    for case in dict.fromkeys(case for case, _ in found):
        print(f"{case:28}", *(f"{found.get((case, door), ''):15}" for door in DOORS))


def pairs(bench, layers=ALL, rank=8, width=LATENT, alpha=None, seed=0):
    """A LoRA as diffusers saves it: {key: tensor}, a pair on every part of these layers; of img_in, `width` columns."""
    file, random = {}, torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        weight = bench.base[name].float()
        if name == "img_in":
            weight = weight[:, :1].expand(-1, width)
        for part, rows in layer.rows(len(weight)):
            made = adapters.lora(weight[rows], random, adapters.PEFT, rank, alpha)
            file |= {f"transformer.{part}.{suffix}": tensor for suffix, tensor in made.items()}
    return file


# ---- every linear

@pytest.mark.parametrize("door", FOUR)
@pytest.mark.parametrize("width", [384, 128])
@pytest.mark.parametrize("precision, alpha", [("int4", None), ("nvfp4", ALPHA)])
def test_pairs_on_every_linear(precision, alpha, width, door, make_model, write, table, caplog):
    """As FLUX.1-Turbo-Alpha has them. Fill and Canny take the latents first: img_in's other columns stay, bit for bit."""
    bench = Bench(make_model(precision, in_features=width).load(), table, f"turbo on {precision}, {width} wide")
    file = pairs(bench, alpha=alpha)
    found, reports = bench.check(door, write, {"turbo": file}, [("turbo", STRENGTH)])
    assert found["img_in"].shape == (128, width)
    assert torch.equal(found["img_in"][:, LATENT:], bench.base["img_in"][:, LATENT:])
    assert all(f"keys          {len(file)} matched, 0 not" in report for report in reports)
    assert all(f"img_in        padded with zeros from {LATENT} to {width} inputs" in report for report in reports)
    assert not caplog.text


@pytest.mark.parametrize("door", FOUR)
@pytest.mark.parametrize("kind", ["lora", "convolution", "loha", "lokr", "diff"])
def test_narrow_img_in_of_every_kind(kind, door, make_model, write, table, caplog):
    """Whatever a LoRA of FLUX.1 dev has for img_in: what does not depend on the weight is for its first columns."""
    bench, layer = Bench(make_model(in_features=384).load(), table, kind), LAYERS["img_in"]
    narrow = bench.base["img_in"][:, :LATENT].float()
    file = adapters.make("lora" if kind == "convolution" else kind, layer, narrow)
    if kind == "convolution":
        file = {key: tensor[..., None, None] if tensor.ndim == 2 else tensor for key, tensor in file.items()}
    file |= pairs(bench, {"proj": LAYERS["proj"]})
    model, group, reports = through(door, bench.model, write, {"it": file}, [("it", STRENGTH)])
    change = weights(model, group if group.hooks else None)["img_in"] - bench.base["img_in"]
    names = {name: IMG_IN for name in ("lora_unet_img_in", "diffusion_model.img_in")}
    adapter = comfy.lora.load_lora(file, names, log_missing=False)[IMG_IN]
    expected = comfy.lora.calculate_weight([(STRENGTH, adapter, 1.0, None, None)], torch.zeros_like(narrow), IMG_IN)
    assert distance(change[:, :LATENT], expected) < 1e-5 and not change[:, LATENT:].any()
    assert all(f"padded with zeros from {LATENT} to 384 inputs" in report for report in reports)
    assert not caplog.text


def test_set_weight_at_strength_0(make_model, table):
    """To ComfyUI the strength of a weight that replaces another does not matter."""
    bench = Bench(make_model().load(), table, "set")
    file = adapters.make("set_weight", LAYERS["proj"], bench.base["proj"].float())
    found, (wanted,) = weights(with_lora(bench.model, file, 0.0))["proj"], file.values()
    assert distance(found - bench.base["proj"], wanted - bench.base["proj"]) < LAYER


# ---- what is no LoRA of numbers

@pytest.mark.parametrize("door", ["stock", "hook"])
@pytest.mark.parametrize("spoil, said", [(lambda factor: factor.to(torch.complex64), "complex64"), (torch.Tensor.bool, "bool"),
                                         (torch.Tensor.to_sparse, "sparse"), (lambda factor: factor.to("meta"), "meta")])
def test_numbers_that_are_none(spoil, said, door, make_model, table):
    """One sentence from ComfyUI's nodes, too, which read what our nodes refuse to."""
    bench = Bench(make_model().load(), table, "odd")
    file = pairs(bench, {"proj": LAYERS["proj"]})
    file |= {key: spoil(tensor) for key, tensor in file.items()}
    with pytest.raises(LoraError, match=f"img_attn.proj.weight: the LoRA is .*{said}.*needs floating point numbers"):
        weights(*through(door, bench.model, None, {"odd": file}, [("odd", 1.0)])[:2])


@pytest.mark.parametrize("value", [3, None, [1.0]])
def test_a_scale_that_is_no_tensor(value, make_model, table):
    """Nobody asks for it, so it changes nothing."""
    bench = Bench(make_model().load(), table, "odd")
    file = pairs(bench, {"proj": LAYERS["proj"]})
    assert len(with_lora(bench.model, file | {"of.another.dora_scale": value}).patches) == 1


# ---- chains

CHAINS = [chain for n in (2, 3) for chain in itertools.permutations(["dev", "control", "wide"], n)]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("names", CHAINS, ids=", ".join)
def test_chain(names, door, make_model, write, table, caplog):
    """A control LoRA widens img_in to 128. A LoRA of the widened model is for after it: before it, our nodes refuse it, and
    elsewhere img_in goes without it, which the log says."""
    bench = Bench(make_model().load(), table, ", ".join(names))
    files = {"dev": pairs(bench, seed=1, alpha=ALPHA), "control": adapters.flux_tools(
        {name: bench.base[name].float() for name in LAYERS}), "wide": pairs(bench, width=2 * LATENT, seed=2)}
    alone = weights(with_lora(bench.model, files["control"], STRENGTHS["control"]))["img_in"]      # stays loaded
    chain = [(name, STRENGTHS[name]) for name in names]
    order = [name for name, _ in applied(door, chain)]
    early = "wide" in order and "control" not in order[:order.index("wide")]
    if early and door in ("node", "stack"):
        with pytest.raises(LoraError, match=rf"^wide.safetensors: .*fit 1 of its {len(ALL)} weights, the first is img_in: .*"
                                            r"is \[128, 64\]"):
            through(door, bench.model, write, files, chain)
        assert not bench.model.patches
        table[bench.case, door] = "refused"
        return
    with caplog.at_level(logging.ERROR):
        found, reports = bench.check(door, write, files, chain)
    assert (IMG_IN in caplog.text) == early
    assert found["img_in"].shape == (128, 2 * LATENT if "control" in order else LATENT)
    if "control" in order and "wide" not in order:
        assert torch.equal(found["img_in"][:, LATENT:], alone[:, LATENT:])
    padded = "dev" in order and "control" in order[:order.index("dev")]
    assert ("padded with zeros" in "".join(reports)) == (padded and bool(reports))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("names", [("dev", "fill"), ("fill", "dev")], ids=", ".join)
def test_chain_on_fill(names, door, make_model, write, table):
    bench = Bench(make_model(in_features=384).load(), table, ", ".join(names))
    files = {"dev": pairs(bench, seed=1), "fill": pairs(bench, width=384, seed=2, alpha=ALPHA)}
    bench.check(door, write, files, [(name, STRENGTHS[name]) for name in names])


# ---- DoRA

@pytest.mark.parametrize("door", FOUR)
@pytest.mark.parametrize("suffix, strength", [("", 1.0), (".weight", 0.5), (".default.weight", -0.75)])
def test_dora_of_peft(suffix, strength, door, make_model, write, table, caplog):
    """m / |W| (W + s B A), a row of W at a time; the strength is for what that is more than W."""
    bench = Bench(make_model().load(), table, f"DoRA, strength {strength}")
    file = dora(bench, suffix, alpha=ALPHA)
    _, reports = bench.check(door, write, {"dora": file}, [("dora", strength)])
    parts = sum(len(layer.parts) for layer in DORA.values())
    assert all(f"keys          {len(file)} matched, 0 not" in report for report in reports)
    assert all(f"adapters      {parts} DoRA" in report for report in reports)
    assert not caplog.text


@pytest.mark.parametrize("door", FOUR)
def test_dora_on_fill(door, make_model, write, table):
    """Of img_in it scales the part that takes the latents, as it was trained; the other columns stay, bit for bit."""
    bench = Bench(make_model(in_features=384).load(), table, "DoRA on 384 wide")
    file = dora(bench)
    found, reports = bench.check(door, write, {"dora": file}, [("dora", 0.75)])
    assert torch.equal(found["img_in"][:, LATENT:], bench.base["img_in"][:, LATENT:])
    assert all(f"keys          {len(file)} matched, 0 not" in report and "applied to the first 64 inputs" in report
               for report in reports)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("names", [("dev", "dora"), ("dora", "dev")], ids=", ".join)
def test_chain_with_dora(names, door, make_model, write, table):
    """It scales what came before it."""
    bench = Bench(make_model().load(), table, ", ".join(names))
    files = {"dev": pairs(bench, seed=1), "dora": dora(bench)}
    bench.check(door, write, files, [(name, STRENGTHS[name]) for name in names])


def test_other_models(make_model, table, folders):
    """Stock FLUX reads a file as without this pack."""
    case = make_model()
    case.load()
    bench = Bench(case.load(), table, "stock")          # a second model, so that wrapping twice would show
    patches = with_lora(case.stock(folders), dora(bench)).patches
    assert len(patches) == len(DORA)
    assert all(adapter.weights[4] is None for some in patches.values() for _, adapter, *_ in some)
    assert not hasattr(comfy.lora.load_lora.__wrapped__, "svdq")           # wrapped once


@pytest.mark.parametrize("style", ["PEFT", "XLabs"])
def test_text_encoders(style, make_model, table):
    """'Load LoRA' asks for the model's and the text encoder's part at once: the latter is what it is without this pack."""
    bench = Bench(make_model().load(), table, "encoder")
    file = dora(bench) if style == "PEFT" else {
        f"double_blocks.0.processor.proj_lora1.{way}.weight": noise(*shape)
        for way, shape in (("down", (4, 128)), ("up", (128, 4)))}
    names = ["lora_te1_text_model_encoder_layers_0_mlp_fc1",
             "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2"]
    for name, (up, down) in zip(names, (adapters.KOHYA, adapters.PEFT)):
        file |= {f"{name}.{up}": noise(8, 4), f"{name}.{down}": noise(4, 6), f"{name}.dora_scale": noise(8)}
        file[name + MAGNITUDE] = noise(8)
    wanted = {**comfy.lora.model_lora_keys_unet(bench.model.model, {}), **{name: name for name in names}}
    readers = comfy.lora.load_lora, inspect.unwrap(comfy.lora.load_lora)
    ours, stock = (read(file, wanted, log_missing=False) for read in readers)
    for name in names:
        assert all(one is other for one, other in zip(ours[name].weights, stock[name].weights, strict=True))
    assert len(ours) > len(names)


def dora(bench, suffix=".weight", **options):
    """A LoRA as PEFT saves it that was trained with use_dora: a magnitude [n] for every part."""
    file = pairs(bench, DORA, **options)
    for name, layer in DORA.items():
        for at, (part, rows) in enumerate(layer.rows(len(bench.base[name]))):
            weight = bench.base[name][rows, :LATENT] if name == "img_in" else bench.base[name][rows]
            norm = weight.norm(dim=1).float()
            file[f"transformer.{part}{MAGNITUDE}{suffix}"] = norm * (1 + SIZE * noise(len(norm), seed=at))
    return file
