"""Adapters of every kind on layers of every kind, beside float64 and beside stock FLUX on the dequantised weights.

`-s` prints the table of test_table: rows are kinds of adapter, columns layers.
"""

import itertools
import logging

import pytest
import torch

from svdq_pack.svdq.errors import LoraError
from svdq_pack.tests.comfy.inprocess import adapters
from svdq_pack.tests.comfy.inprocess.adapters import KINDS, LAYERS
from svdq_pack.tests.comfy.inprocess.support import FLOAT_LAYER, LAYER, STRENGTH, distance, hooks, noise, sample, with_lora

import comfy.hooks              # noqa: E402, comes from the tree that support has chosen
import comfy.lora               # noqa: E402
import comfy.model_management   # noqa: E402

# Relative L2 errors of the change an adapter makes in the network's output; support has those of a layer.
NETWORK = 1e-2          # LAYER, and what the blocks behind the layer make of it
FLOAT_NETWORK = 2e-4    # fp32 holds the sum, of which the change is a hundredth
HALF = 1e-2             # of a change as large as the output, where weights and both outputs have 16 bit too
ROUNDING = 1e-6         # of a whole output: one way of computing in fp32 and another


class Pair:
    """Ours and stock FLUX on the same weights, loaded once for all tests, and what both compute without adapters."""

    def __init__(self, case, folder):
        self.case, self.ours, self.stock = case, case.load(), case.stock(folder)
        self.weights = {name: self.stock.model.get_parameter(layer.key).clone() for name, layer in LAYERS.items()}
        # Exact in 16 bit, too.
        self.inputs = {name: noise(2, 5, weight.shape[1], seed=7).bfloat16().half().float()
                       for name, weight in self.weights.items()}
        self.base, self.stock_base = case.run(self.ours), case.run(self.stock)
        self.plain = self.outputs(self.ours)

    def make(self, kind, name, **options):
        return adapters.make(kind, LAYERS[name], self.weights[name], **options)

    def everywhere(self, *kinds, seed=0, **options):
        """One file with an adapter on every layer, of these kinds in turn."""
        file = {}
        for at, (name, kind) in enumerate(zip(LAYERS, itertools.cycle(kinds))):
            file |= self.make(kind, name, seed=100 * seed + at, **options)
        return file

    def outputs(self, patcher, names=LAYERS, dtype=torch.float32):
        comfy.model_management.load_models_gpu([patcher])
        modules = {name: patcher.model.get_submodule(f"diffusion_model.{LAYERS[name].name}") for name in names}
        return {name: module(self.inputs[name].to(dtype)) for name, module in modules.items()}

    def expected(self, build, name):
        """What the patches ComfyUI parses for stock FLUX change in the layer's output, in float64."""
        patches, key, weight = build(self.stock).patches, LAYERS[name].key, self.weights[name].double()
        changed = comfy.lora.calculate_weight(patches.get(key, []), weight.clone(), key)
        bias = f"diffusion_model.{LAYERS[name].name}.bias"
        added = comfy.lora.calculate_weight(patches.get(bias, []), weight.new_zeros(len(weight)), bias)
        return self.inputs[name].double() @ (changed - weight).t() + added

    def layer_errors(self, build, names=LAYERS):
        """{layer: error of the change in its output} that build(patcher) makes."""
        return {name: distance(output.double() - self.plain[name], self.expected(build, name))
                for name, output in self.outputs(build(self.ours), names).items()}

    def network_error(self, build):
        """Of the change in the network's output that build(patcher) makes."""
        ours, stock = self.case.run(build(self.ours)), self.case.run(build(self.stock))
        return distance(ours - self.base, stock - self.stock_base)

    def check(self, build, names=LAYERS):
        errors = self.layer_errors(build, names)
        assert all(error <= LAYER for error in errors.values()), errors
        assert self.network_error(build) <= NETWORK
        self.check_untouched()

    def check_untouched(self):
        assert torch.equal(self.case.run(self.ours), self.base)


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def pair(kept, dev, int4, folders):
    """pair(precision) -> Pair of a golden model."""
    def get(precision):
        if precision not in kept:
            kept[precision] = Pair({"nvfp4": dev, "int4": int4}[precision], folders)
        return kept[precision]

    return get


@pytest.fixture
def nvfp4(pair):
    return pair("nvfp4")


def chain(*files):
    """build(patcher) for (tensors, strength) after (tensors, strength)."""
    def build(patcher):
        for tensors, strength in files:
            patcher = with_lora(patcher, tensors, strength)
        return patcher

    return build


# ---- the table

@pytest.fixture(scope="module")
def table():
    """{(precision, kind, layer): (error of the layer, error of the network)}, printed at the end."""
    found = {}
    yield found
    for precision in dict.fromkeys(precision for precision, _, _ in found):
        print(f"\n{precision}: error of the change, layer|network")
        print(" " * 16, *(f"{name:^15}" for name in LAYERS))
        for kind in KINDS:
            cells = (found.get((precision, kind, name)) for name in LAYERS)
            print(f"{kind:16}", *(f"{'':15}" if cell is None else f"{cell[0]:.1e}|{cell[1]:.1e}" for cell in cells))


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_table(kind, name, precision, pair, table, caplog, record_property):
    models, limits = pair(precision), (LAYER, NETWORK)
    # Plain layers and biases go ComfyUI's way, in fp32; but a plain layer's bias stays in 16 bit, as the file has it.
    if (name == "img_in") != (kind == "diff_b"):
        limits = FLOAT_LAYER, FLOAT_NETWORK
    build = chain((models.make(kind, name), STRENGTH))
    with caplog.at_level(logging.WARNING):
        errors = models.layer_errors(build, [name])[name], models.network_error(build)
    assert not caplog.text                              # of keys that were not loaded, of adapters that did not fit
    table[precision, kind, name] = errors
    record_property("layer_error", errors[0])
    record_property("network_error", errors[1])
    assert all(error <= limit for error, limit in zip(errors, limits)), (errors, limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_compute_in_16_bit(precision, dtype, pair):
    """At a strength that makes the change as large as the output, which is rounded to 16 bit itself."""
    models = pair(precision)
    patcher = models.case.load(dtype)
    plain = models.outputs(patcher, dtype=dtype)
    for kind in ("lora", "dora_out", "lokr", "diff"):
        build = chain((models.everywhere(kind), 8.0))
        for name, output in models.outputs(build(patcher), dtype=dtype).items():
            assert output.dtype == dtype
            assert distance(output.double() - plain[name].double(), models.expected(build, name)) <= HALF, (kind, name)


# ---- several, many ranks, parts

def test_several_at_once(nvfp4):
    """Files of ranks 1, 5 and 40 in the names of different trainers, each at its strength, in any order."""
    files = [(nvfp4.everywhere("lora", seed=1, rank=1), 0.75), (nvfp4.everywhere("lora_parts", seed=2, rank=5), -0.5),
             (nvfp4.everywhere("lora_shared_down", seed=3, rank=40), 1.25)]
    nvfp4.check(chain(*files))
    nvfp4.check(chain(*files[::-1]))


def test_a_kind_per_layer(pair):
    """One file, another kind on every layer."""
    for precision, first in (("nvfp4", 0), ("int4", 7)):
        models = pair(precision)
        kinds = (list(KINDS) * 2)[first:first + len(LAYERS) - 1] + ["lora"]
        models.check(chain((models.everywhere(*kinds), 1.0)))


@pytest.mark.parametrize("rank", [200, 600])
@pytest.mark.parametrize("kind", ["lora", "lora_parts", "dora_out"])
def test_rank_beyond_the_fused_limit(kind, rank, nvfp4):
    nvfp4.check(chain((nvfp4.everywhere(kind, rank=rank), STRENGTH)))


@pytest.mark.parametrize("strength", [-1.0, 0.05, 1.0, 20.0])
@pytest.mark.parametrize("kind", ["lora", "lora_parts", "dora_out", "loha"])
def test_strength(kind, strength, nvfp4):
    nvfp4.check(chain((nvfp4.everywhere(kind), strength)))


@pytest.mark.parametrize("kind", ["lora_parts", "dora_parts", "lokr_parts"])
@pytest.mark.parametrize("name, part", [("qkv", "to_q"), ("qkv", "to_v"), ("linear1", "to_k"), ("linear1", "proj_mlp")])
def test_one_part_of_a_fused_layer(name, part, kind, nvfp4):
    """The other parts' outputs stay what they are."""
    build = chain((nvfp4.make(kind, name, only=part), STRENGTH))
    nvfp4.check(build, [name])
    plain, changed = nvfp4.plain[name], nvfp4.outputs(build(nvfp4.ours), [name])[name]
    for other, rows in LAYERS[name].rows(plain.shape[-1]):
        error = distance(changed[..., rows], plain[..., rows])
        assert error > 1e-2 if other.endswith(part) else error <= ROUNDING, other


@pytest.mark.parametrize("kinds", [("lora", "dora_out", "lora_parts"), ("lora", "dora_in", "dora_parts"),
                                   ("oft", "lora", "diff"), ("dora_out", "set_weight", "lokr")])
def test_order(kinds, nvfp4):
    """DoRA and rotations change what came before them."""
    files = [(nvfp4.everywhere(kind, seed=at), 1.0 - 0.25 * at) for at, kind in enumerate(kinds)]
    forth, back = chain(*files), chain(*files[::-1])
    for name in LAYERS:
        assert distance(nvfp4.expected(back, name), nvfp4.expected(forth, name)) > 3 * LAYER
    nvfp4.check(forth)
    nvfp4.check(back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_files_in_few_bits(dtype, nvfp4):
    files = [{name: tensor.to(dtype) for name, tensor in nvfp4.everywhere(kind).items()} for kind in ("lora", "loha")]
    nvfp4.check(chain(*((tensors, STRENGTH) for tensors in files)))


def test_flux_tools_lora(nvfp4):
    """It widens img_in for a control picture and sets norms and biases: ComfyUI's way, beside factors on our layers."""
    control = {"concat_latent_image": noise(1, 16, 12, 10, seed=3)}
    before = sample(nvfp4.ours), sample(nvfp4.stock)
    build = chain((adapters.flux_tools(nvfp4.weights), STRENGTH))
    ours, stock = sample(build(nvfp4.ours), **control), sample(build(nvfp4.stock), **control)
    assert distance(ours - before[0], stock - before[1]) <= NETWORK
    assert distance(sample(build(nvfp4.ours)), ours) > 1e-2             # the control picture counts
    assert torch.equal(sample(nvfp4.ours, **control), before[0])
    nvfp4.check_untouched()


# ---- strength 0, going back, clones, hooks, memory

@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "set_weight"])
def test_strength_zero_is_bitwise(kind, nvfp4):
    assert torch.equal(nvfp4.case.run(with_lora(nvfp4.ours, nvfp4.everywhere(kind), 0.0)), nvfp4.base)


def test_twenty_cycles_of_attach_change_remove(nvfp4):
    for kind in itertools.islice(itertools.cycle(KINDS), 20):
        tensors = nvfp4.everywhere(kind)
        attached = nvfp4.case.run(with_lora(nvfp4.ours, tensors, 0.5))
        changed = nvfp4.case.run(with_lora(nvfp4.ours, tensors, -1.0))
        assert distance(attached, nvfp4.base) > 1e-3
        assert torch.equal(attached, changed) == (kind == "set_weight")     # which has no strength
        nvfp4.check_untouched()


def test_clones_do_not_disturb_each_other(nvfp4):
    """Taking turns, each stays bitwise what it was the first time, and is what stock FLUX is with the same adapters."""
    builds = [chain((nvfp4.everywhere(kind, seed=at), strength))
              for at, (kind, strength) in enumerate([("lora", 1.0), ("dora_parts", 0.5), ("loha", -1.0), ("lora", 0.0)])]
    clones = [build(nvfp4.ours) for build in builds]
    clones.append(with_lora(clones[0], nvfp4.everywhere("diff_b")))         # a clone's clone
    first = [nvfp4.case.run(clone) for clone in clones]
    assert torch.equal(first[3], nvfp4.base)
    for at in (2, 0, 4, 3, 1, 0, 1, 4, 2, 3):
        assert torch.equal(nvfp4.case.run(clones[at]), first[at]), at
    for build in builds[:3]:
        assert nvfp4.network_error(build) <= NETWORK


@pytest.mark.parametrize("kind", ["lora", "dora_out", "lokr", "diff"])
def test_hooks(kind, nvfp4):
    """Scheduled strengths on top of a loaded LoRA."""
    loaded, hooked = chain((nvfp4.everywhere("lora", seed=1), 0.5)), nvfp4.everywhere(kind)
    frames = [(0.0, 0.75), (0.3, 0.0), (0.6, -0.5)]

    def change(patcher):
        return sample(loaded(patcher), steps=4, hooks=hooks(hooked, *frames)) - sample(loaded(patcher), steps=4)

    assert distance(change(nvfp4.ours), change(nvfp4.stock)) <= NETWORK
    nvfp4.check_untouched()


@pytest.mark.parametrize("kind", ["lora", "dora_out", "lokr"])
def test_beside_weight_wrappers(kind, pair):
    """Whoever wraps weights gets those with the adapters in them."""
    models, seen = pair("int4"), []

    def build(patcher):
        patcher = patcher.clone()
        for layer in LAYERS.values():
            patcher.add_weight_wrapper(layer.key, lambda weight: seen.append(weight.shape) or weight)
        return with_lora(patcher, models.everywhere(kind))

    models.check(build)
    assert set(seen) == {weight.shape for weight in models.weights.values()}


def test_partial_loading(nvfp4):
    """Layers that stay behind have their adapters too, and so have those that leave later."""
    build = chain((nvfp4.everywhere("dora_out", "lora_parts", "lokr"), STRENGTH))
    expected = nvfp4.case.run(build(nvfp4.stock)) - nvfp4.stock_base
    patcher, cpu = build(nvfp4.ours), torch.device("cpu")
    size = patcher.model_size()
    for step in (lambda: patcher.partially_load(cpu, size // 3), lambda: patcher.partially_load(cpu, size // 3),
                 lambda: patcher.partially_load(cpu, 2 * size), lambda: patcher.partially_unload(cpu, size // 2)):
        step()
        assert distance(nvfp4.case.network(patcher) - nvfp4.base, expected) <= NETWORK
    patcher.detach()
    assert torch.equal(nvfp4.case.network(nvfp4.ours), nvfp4.base)          # nothing loaded anew


# ---- bad files

def without(file, part):
    return {name: tensor for name, tensor in file.items() if name not in part}


def last_cut_off(file, suffix, axis):
    """`file` with one tensor a row or column short."""
    name, = (name for name in file if name.endswith(f".{suffix}"))
    return file | {name: file[name].narrow(axis, 0, file[name].shape[axis] - 1)}


@pytest.mark.parametrize("kind, suffix, axis", [
    ("lora", "lora_up.weight", 0), ("lora", "lora_down.weight", 1), ("lora", "lora_down.weight", 0),
    ("lora_parts", "lora_B.weight", 0), ("dora_out", "lora_up.weight", 0), ("dora_out", "dora_scale", 0),
    ("lokr", "lokr_w2", 1), ("loha", "hada_w2_b", 1), ("oft", "oft_blocks", 0), ("glora", "b2.weight", 1),
    ("diff", "diff", 0)])
def test_an_adapter_that_does_not_fit(kind, suffix, axis, nvfp4, caplog):
    """As in stock FLUX: the layer goes without it, the log names the layer, the other layers have theirs."""
    misfit = last_cut_off(nvfp4.make(kind, "qkv", only="to_k"), suffix, axis)
    build = chain((without(nvfp4.everywhere("lora"), nvfp4.make("lora", "qkv")) | misfit, STRENGTH))
    with caplog.at_level(logging.WARNING):
        outputs = nvfp4.outputs(build(nvfp4.ours))
    assert LAYERS["qkv"].key in caplog.text
    assert distance(outputs["qkv"], nvfp4.plain["qkv"]) <= ROUNDING
    for name in LAYERS:
        if name != "qkv":
            assert distance(outputs[name].double() - nvfp4.plain[name], nvfp4.expected(build, name)) <= LAYER, name
    assert nvfp4.network_error(build) <= NETWORK
    nvfp4.check_untouched()


@pytest.mark.parametrize("kind, suffix", [("lora", "lora_up.weight"), ("lokr", "lokr_w2"), ("diff", "diff")])
def test_what_does_not_fit_is_logged_once(kind, suffix, nvfp4, caplog):
    """Not at every step of every image."""
    patcher = with_lora(nvfp4.ours, last_cut_off(nvfp4.make(kind, "qkv"), suffix, -1))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            nvfp4.case.run(patcher)
    assert caplog.text.count(LAYERS["qkv"].key) == 1


def test_what_comfyui_cannot_apply(nvfp4, caplog):
    """BOFT without an alpha, in every version so far."""
    file = without(nvfp4.make("boft", "qkv"), ["lora_unet_double_blocks_0_img_attn_qkv.alpha"])
    with caplog.at_level(logging.WARNING):
        outputs = nvfp4.outputs(with_lora(nvfp4.ours, file))
    assert LAYERS["qkv"].key in caplog.text
    assert not nvfp4.expected(chain((file, 1.0)), "qkv").any()
    assert distance(outputs["qkv"], nvfp4.plain["qkv"]) <= ROUNDING


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind, suffix, name", [
    ("lora", "lora_up.weight", "qkv"), ("lora", "lora_down.weight", "img_mod"), ("dora_out", "dora_scale", "linear2"),
    ("lora_parts", "proj_mlp.lora_A.weight", "linear1"), ("lokr", "lokr_w2", "proj"), ("diff", "diff", "mlp.2")])
def test_no_numbers(kind, suffix, name, value, nvfp4):
    """One NaN would blacken every image; the run says where it is, and the model is what it was."""
    tensors = nvfp4.everywhere("lora", seed=1) | nvfp4.make(kind, name)
    damaged = next(key for key in tensors if key.endswith(suffix))
    tensors[damaged] = tensors[damaged].clone()
    tensors[damaged].view(-1)[-1] = value
    with pytest.raises(ValueError, match="NaN"):
        nvfp4.case.run(with_lora(nvfp4.ours, tensors))
    nvfp4.check_untouched()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["qkv", "img_in"])
def test_a_strength_that_is_no_number(name, strength, nvfp4):
    """HTTP brings NaN past ComfyUI's limits. The stock node fails, and so does a hook, whose keyframes multiply it."""
    file = nvfp4.make("lora", name)
    with pytest.raises(LoraError, match="the strength of a LoRA is "):
        with_lora(nvfp4.ours, file, strength)
    for group in (hooks(file, (0.0, strength)), comfy.hooks.create_hook_lora(file, strength, 0.0)):
        with pytest.raises(LoraError, match="the strength of a LoRA is "):
            sample(nvfp4.ours, hooks=group)
    nvfp4.check_untouched()


@pytest.mark.parametrize("kind, suffix, name", [
    ("lora", "lora_up.weight", "qkv"), ("lora", "alpha", "img_mod"), ("lora", "lora_down.weight", "img_in"),
    ("loha", "hada_w1_a", "proj"), ("lokr", "lokr_w1", "mlp.2"), ("dora_out", "dora_scale", "linear2"),
    ("diff", "diff", "img_in"), ("diff_b", "diff_b", "proj"), ("set_weight", "set_weight", "img_in")])
def test_numbers_that_overflow(kind, suffix, name, nvfp4):
    """Finite in the file, Inf with strength, alpha or the other factor: an error at the node, in 4 bit and in 16."""
    tensors = nvfp4.everywhere("lora", seed=1) | nvfp4.make(kind, name)
    for key in nvfp4.make(kind, name):
        if key.endswith(suffix):
            tensors[key] = torch.full_like(tensors[key], 1e38)
    with pytest.raises(LoraError, match="numbers up to 1e.38, which become Inf"):
        with_lora(nvfp4.ours, tensors, 10.0)
    nvfp4.check_untouched()


def test_a_keyframe_that_overflows(nvfp4):
    """The adapter fits, its strength of the second half of the steps does not."""
    file = nvfp4.everywhere("lora")
    with pytest.raises(LoraError, match="the strength of a LoRA is 1e.30"):
        sample(nvfp4.ours, steps=4, hooks=hooks(file, (0.0, 1.0), (0.5, 1e30)))
    nvfp4.check_untouched()
