"""Fused blocks compute what ComfyUI's own do, and step aside wherever somebody would notice that they fuse.

A CPU has no kernels with epilogues, so the checks say it had: what the epilogues compute then comes from torch.
"""

import functools
import importlib.util
import inspect
import logging
import shutil
import sys
import types
from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from svdq_pack.svdq import fused
from svdq_pack.svdq.kernels import epilogues, registry
from svdq_pack.svdq.kernels.prologues import Modulated
from svdq_pack.svdq.kernels.variant import Target, usual_dtype
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.nodes.host import blocks
from svdq_pack.nodes.host.layer import SVDQLinear, SVDQOps
from svdq_pack.nodes.host.load import load_model
from svdq_pack.tests.comfy.inprocess import adapters
from svdq_pack.tests.comfy.inprocess.support import distance, noise, pretend_gpu, sample, with_lora

import comfy.ldm.flux.layers as layers  # noqa: E402, comes from the tree that support has chosen
import comfy.ldm.flux.math as math      # noqa: E402
import comfy.model_management           # noqa: E402
import comfy.ops                        # noqa: E402
import comfy.quant_ops                  # noqa: E402
import comfy.sd                         # noqa: E402
import comfy_aimdo.model_vbar           # noqa: E402

CPU = torch.device("cpu")
TEXT, IMAGE, WIDTH = 5, 12, 256
STOCK = {"double": layers.DoubleStreamBlock, "single": layers.SingleStreamBlock}
PRODUCTS = {"double": 8, "single": 2}   # layers of a block that run_together runs, and its calls
CALLS = {"double": 6, "single": 2}
ALL = PRODUCTS["double"] + PRODUCTS["single"]
FLOAT = 1e-5                            # of what a block adds to its input: one way of computing in fp32 and another
BF16 = 1.5e-2
KERNELS_DO_EPILOGUES = SVDQLinear.kernels_do_epilogues


@pytest.fixture
def runs(monkeypatch):
    """The layers that blocks have `run_together` run, and kernels that fuse."""
    seen, original = [], SVDQLinear.run_together

    def run_together(layers):
        seen.extend(layer for layer, _ in layers)
        return original(layers)

    monkeypatch.setattr(SVDQLinear, "run_together", staticmethod(run_together))
    monkeypatch.setattr(SVDQLinear, "kernels_do_epilogues", lambda layer, x: True)
    return seen


@pytest.fixture
def model(make_model):
    return make_model(hidden=WIDTH)


class Block:
    """The first block of a kind, and arguments for it."""

    def __init__(self, kind, patcher, batch=1, dtype=torch.float32):
        comfy.model_management.load_models_gpu([patcher])
        self.kind, self.network = kind, patcher.model.diffusion_model
        self.module = getattr(self.network, f"{kind}_blocks")[0]
        tokens = {"img": IMAGE, "txt": TEXT} if kind == "double" else {"x": TEXT + IMAGE}
        self.given = {name: noise(batch, n, WIDTH, seed=n).to(dtype) for name, n in tokens.items()}
        ids = 10 * noise(batch, TEXT + IMAGE, 3, seed=5)       # every token of every picture somewhere else
        self.given |= {"vec": noise(batch, WIDTH, seed=3).to(dtype), "pe": self.network.pe_embedder(ids)}
        self.given["transformer_options"] = {"block_index": 0}

    def run(self, forward, **changes):
        """[what it adds to each of its streams]"""
        given = {name: value.clone() if isinstance(value, torch.Tensor) and name in ("img", "txt", "x") else value
                 for name, value in (self.given | changes).items()}
        before = [given[name].clone() for name in ("img", "txt", "x") if name in given]
        out = forward(**given)
        return [new - old for new, old in zip(out if self.kind == "double" else [out], before)]

    def ours(self, **changes):
        return self.run(self.module, **changes)

    def stock(self, **changes):
        return self.run(STOCK[self.kind].forward.__get__(self.module), **changes)

    def check(self, tolerance=FLOAT, **changes):
        errors = [distance(ours, stock) for ours, stock in zip(self.ours(**changes), self.stock(**changes), strict=True)]
        assert all(error <= tolerance for error in errors), errors

    def check_falls_back(self, runs, **changes):
        before = len(runs)
        for ours, stock in zip(self.ours(**changes), self.stock(**changes), strict=True):
            assert torch.equal(ours, stock)
        assert len(runs) == before


@pytest.fixture
def block(model):
    """block(kind) -> Block in fp32, one picture."""
    return lambda kind, **options: Block(kind, model.load(), **options)


both = pytest.mark.parametrize("kind", STOCK)


# ---- the same numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("batch", [1, 2])
@both
def test_equals_stock(kind, batch, precision, dtype, tolerance, make_model, runs):
    this = Block(kind, make_model(precision, hidden=WIDTH).load(dtype), batch, dtype)
    this.check(tolerance)
    assert len(runs) == PRODUCTS[kind]
    this.check(tolerance, pe=this.given["pe"][:1])
    this.check(tolerance, vec=this.given["vec"][:, None])
    this.check(tolerance, attn_mask=noise(1, 1, TEXT + IMAGE, TEXT + IMAGE, seed=6).to(dtype))
    assert len(runs) == 4 * PRODUCTS[kind]


NORMS = {"double": ["img_norm1", "img_norm2", "txt_norm1", "txt_norm2"], "single": ["pre_norm"]}


@pytest.fixture
def prologues(monkeypatch):
    """The Modulated inputs that blocks make."""
    made = []
    monkeypatch.setattr(fused, "Modulated", lambda *given: made.append(Modulated(*given)) or made[-1])
    return made


@pytest.mark.parametrize("batch", [1, 2])
@both
def test_modulation_inside(kind, batch, block, runs, prologues):
    """Each norm's is one input of its layers, a picture's where rotations are."""
    this = block(kind, batch=batch)
    this.check()
    assert len(prologues) == {"double": 4 * batch, "single": batch}[kind]
    assert all(one.problem() is None for one in prologues)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in STOCK for name in NORMS[kind]])
def test_hooks_on_a_layer_norm(kind, name, block, runs, prologues):
    """It runs, and the block stays fused but for its modulation."""
    this, seen = block(kind), []
    norm, plain = this.module.get_submodule(name), this.stock()

    def louder(*given):
        seen.append(name)
        return 1.5 * given[-1]

    def check_runs():
        prologues.clear()
        runs.clear()
        this.check()
        assert seen and len(prologues) == len(NORMS[kind]) - 1 and len(runs) == PRODUCTS[kind]
        assert any(distance(*pair) > 1e-3 for pair in zip(this.ours(), plain))
        seen.clear()

    handle = norm.register_forward_hook(louder)
    check_runs()
    handle.remove()
    original = norm.forward
    norm.forward = lambda x: louder(original(x))
    check_runs()
    norm.forward = original
    norm.weight = torch.nn.Parameter(torch.full((WIDTH,), 1.5))
    seen.append(name)
    check_runs()
    norm.weight = None
    this.module.set_submodule(name, torch.nn.LayerNorm(WIDTH, eps=0.5, elementwise_affine=False))
    seen.append(name)
    check_runs()
    this.module.set_submodule(name, norm)
    prologues.clear()
    this.check()
    assert len(prologues) == len(NORMS[kind]) and not seen


@pytest.mark.parametrize("where, attribute", [
    (next(kind for kind in SVDQOps.LayerNorm.__mro__ if "forward" in vars(kind)), "forward"),
    (next(kind for kind in SVDQOps.LayerNorm.__mro__ if "forward_comfy_cast_weights" in vars(kind)),
     "forward_comfy_cast_weights"), (torch.nn.functional, "layer_norm")])
@both
def test_replaced_layer_norm(kind, where, attribute, block, runs, prologues, monkeypatch):
    this, original, seen = block(kind), getattr(where, attribute), []

    def louder(*args, **kwargs):
        seen.append(attribute)
        return 1.5 * original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, louder)
        this.check()
    assert len(seen) == 2 * len(NORMS[kind]) and not prologues and len(runs) == PRODUCTS[kind]
    this.check()
    assert len(prologues) == len(NORMS[kind])


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("capability, kernel", [((8, 9), "adaln_int4_bf16"), ((12, 0), "adaln_int8_bf16")])
def test_modulation_on_the_emulator(capability, kernel, int4, runs, prologues, monkeypatch):
    """A network through the kernels' own code, with its modulation in the quantisers, and in torch: one launch for both streams
    of a double block, or one each where their layers cannot be borrowed together."""
    launched = pretend_gpu(monkeypatch, capability)
    patcher = load_model(int4.path, torch.bfloat16)
    network, borrow = patcher.model.diffusion_model, SVDQLinear.borrow
    ours = int4.run(patcher, torch.bfloat16)
    assert len(prologues) == 4 * len(network.double_blocks) + len(network.single_blocks)
    assert launched.count(kernel) == 2 * len(network.double_blocks) + len(network.single_blocks)
    launched.clear(), prologues.clear()
    with monkeypatch.context() as patch:
        patch.setattr(SVDQLinear, "borrow", lambda layer, *where: borrow(layer, *where)._replace(kept=False))
        assert torch.equal(ours, int4.run(patcher, torch.bfloat16))
    assert launched.count(kernel) == len(prologues)
    launched.clear()
    monkeypatch.setattr(blocks, "_is_plain_layer_norm", lambda *given: False)
    assert distance(ours, int4.run(patcher, torch.bfloat16)) <= 1e-2        # a rounding apart, if at all
    assert kernel not in launched


@both
def test_quantised_activations(kind, model, runs):
    this = Block(kind, model.load(act_bits=None))
    with registry.using("reference"):
        this.check(3e-2)                # a code of an activation may fall to the other side of a tie
    assert len(runs) == PRODUCTS[kind]


@both
def test_what_is_written_to(kind, block, runs):
    """A double block adds to its streams in place, as ComfyUI's does; a single one leaves its input to whoever holds it."""
    this = block(kind)
    given = dict(this.given)
    before = {name: given[name].clone() for name in ("img", "txt", "x") if name in given}
    out = this.module(**given)
    assert len(runs) == PRODUCTS[kind]
    if kind == "double":
        assert out[0] is given["img"] and out[1] is given["txt"]
        assert not torch.equal(out[0], before["img"]) and not torch.equal(out[1], before["txt"])
    else:
        assert torch.equal(given["x"], before["x"])


@both
def test_fp16_stays_finite(kind, model, runs):
    """Where ComfyUI's blocks take NaN and Inf out of float16, these do."""
    this = Block(kind, model.load(torch.float16), dtype=torch.float16)
    name = {"double": "txt", "single": "x"}[kind]
    loud = this.given[name].clone()
    loud[0, 1, 7], loud[0, 2, 7] = float("inf"), float("nan")
    attended = noise(1, TEXT + IMAGE, WIDTH).half()     # of the others' tokens: attention would carry NaN everywhere
    options = {"optimized_attention_override": lambda *args, **kwargs: attended}
    ours, stock = (out if kind == "single" else out[1] for out in (
        forward(**this.given | {name: loud.clone(), "transformer_options": options}
                | ({"img": this.given["img"].clone()} if kind == "double" else {}))
        for forward in (this.module, STOCK[kind].forward.__get__(this.module))))
    assert len(runs) == PRODUCTS[kind] and ours.isfinite().all() and stock.isfinite().all()
    assert not ours[0, 2].any() and not stock[0, 2].any()
    ordinary = [at for at in range(loud.shape[1]) if at not in (1, 2)]
    assert distance(ours[0, ordinary], stock[0, ordinary]) <= 2e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_override(batch, block, runs):
    """SageAttention and the like get the same q, k and v, text first, and the same options as from ComfyUI's block."""
    for kind in STOCK:
        this, seen = block(kind, batch=batch), []

        def override(func, q, k, v, heads, *args, seen=seen, **kwargs):
            seen.append((q, k, v, heads, args, kwargs["mask"], kwargs["skip_reshape"], kwargs["transformer_options"]))
            return func(q, k, v, heads, *args, **kwargs) * 2

        options = {"optimized_attention_override": override, "block_index": 7, "img_slice": [TEXT, TEXT + IMAGE]}
        this.check(transformer_options=options)
        (ours, stock) = seen
        assert all(distance(*pair) <= FLOAT for pair in zip(ours[:3], stock[:3]))
        assert all(one.shape == (batch, WIDTH // 128, TEXT + IMAGE, 128) for one in ours[:3])
        assert ours[3:7] == stock[3:7] and ours[7] is stock[7] is options
    assert len(runs) == ALL


def test_an_override_with_another_dtype(block, runs):
    this = block("double")
    this.check(BF16, transformer_options={"optimized_attention_override": lambda func, *args, **kwargs: func(
        *args, **kwargs).bfloat16()})
    assert len(runs) == PRODUCTS["double"]


@contextmanager
def unfused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVDQLinear, "kernels_do_epilogues", lambda layer, x: False)
        yield


def same_network(run, runs, tolerance=FLOAT):
    """run() with fused blocks and without; returns the former."""
    runs.clear()
    ours = run()
    calls = len(runs)
    with unfused():
        assert distance(ours, run()) <= tolerance
    assert calls and calls == len(runs)
    return ours


def everywhere(patcher, rank=4):
    """A LoRA on every quantised layer."""
    return {f"{key.removesuffix('weight')}lora_{name}.weight": 0.1 * noise(*size, seed=seed) / rank ** 0.5
            for seed, (key, layer) in enumerate(patcher.layers().items())
            for name, size in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank)))}


def test_sampling(model, runs):
    """Whole sampling runs: two pictures of an odd size, with a LoRA in the branch."""
    patcher = model.load()
    plain = same_network(lambda: sample(patcher, noise(2, 16, 9, 13)), runs)
    changed = with_lora(patcher, everywhere(patcher))
    with_it = same_network(lambda: sample(changed, noise(2, 16, 9, 13)), runs)
    assert distance(with_it, plain) > 1e-2
    assert all(layer.factors for name, layer in patcher.layers().items() if name.endswith("linear2.weight"))


def test_control_residual(model, runs):
    """What a ControlNet adds between blocks."""
    patcher = model.load()
    comfy.model_management.load_models_gpu([patcher])
    given = {"x": noise(1, 16, 8, 8), "timestep": torch.tensor([0.5]), "context": noise(1, TEXT, 128, seed=1),
             "y": noise(1, 64, seed=2), "guidance": torch.tensor([3.5])}
    control = {"input": [noise(1, 16, WIDTH, seed=3)], "output": [noise(1, 16, WIDTH, seed=4)]}
    network = patcher.model.diffusion_model
    with_it = same_network(lambda: network(**given, control=control), runs)
    assert distance(with_it, network(**given)) > 1e-2


def test_block_replacements(model, runs):
    """A node that wraps a block by patches_replace: SkipLayerGuidance, caches and others."""
    patcher, seen = model.load(), []

    def wrap(args, extra):
        seen.append(sorted(args))
        return extra["original_block"](args)

    for kind in STOCK:
        patcher.set_model_patch_replace(wrap, "dit", f"{kind}_block", 0)
    same_network(lambda: sample(patcher), runs)
    assert len(seen) == 8


@pytest.mark.parametrize("room", [True, False, "first"])
@both
def test_offloaded(kind, room, block, runs, monkeypatch):
    """Streamed weights are released once each, and nothing reads them afterwards: before the next come where all get the same
    buffer, a pair at once where the first of it has a place of its own."""
    this, out, streamed, most = block(kind), [], [], []
    cast, uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight

    def stream(layer, *args, **kwargs):
        weight, bias, used = cast(layer, *args, **kwargs)
        assert not out or out[-1][1]                    # the next layer may get the same buffer
        kept = room is True or room == "first" and not out
        out.append((layer, kept))
        most.append(len(out))
        streamed.append(layer)
        return weight.clone(), None if bias is None else bias.clone(), (
            "a stream", CPU if kept else weight, used)

    def reuse(layer, weight, bias, used):
        if weight is None:                              # norms without parameters
            return
        out.remove(next(each for each in out if each[0] is layer))
        uncast(layer, weight, bias, used[-1])
        weight.fill_(255 if weight.dtype == torch.uint8 else float("nan"))
        if bias is not None:
            bias.fill_(float("nan"))

    expected = this.stock()
    with monkeypatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", stream)
        patch.setattr(comfy.ops, "uncast_bias_weight", reuse)
        ours, layers_of_ours = this.ours(), streamed.copy()
        assert max(most) == (2 if room and kind == "double" else 1)
        streamed.clear()
        this.stock()
    assert all(distance(*pair) <= FLOAT for pair in zip(ours, expected))
    assert len(runs) == PRODUCTS[kind] and not out
    assert sorted(map(id, layers_of_ours)) == sorted(map(id, streamed))


def test_partly_loaded(model, runs):
    """A LoRA, half of the layers not loaded: the same bits as with all of them."""
    patcher = model.load()
    patcher = with_lora(patcher, everywhere(patcher))
    comfy.model_management.load_models_gpu([patcher])
    network, given = patcher.model.diffusion_model, {
        "x": noise(1, 16, 8, 8), "timestep": torch.tensor([0.5]), "context": noise(1, TEXT, 128, seed=1),
        "y": noise(1, 64, seed=2), "guidance": torch.tensor([3.5])}
    expected, size = network(**given), patcher.model_size()
    for part in (0, size // 2):
        patcher.detach()
        patcher.partially_load(CPU, part + 1)
        assert patcher.model.model_lowvram
        runs.clear()
        assert torch.equal(network(**given), expected) and len(runs) == ALL


@pytest.mark.parametrize("after", range(CALLS["double"]))
def test_interrupt(after, block, runs, monkeypatch):
    """The user may stop between any two layers of a fused block that do not share a launch."""
    this, calls = block("double"), []
    original = SVDQLinear.run_together

    def run_together(layers):
        calls.append(layers)
        if len(calls) == after + 1:
            comfy.model_management.interrupt_current_processing()
        return original(layers)

    monkeypatch.setattr(SVDQLinear, "run_together", staticmethod(run_together))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        this.ours()
    assert len(calls) == after + 1


@pytest.mark.parametrize("keys", [["diffusion_model"],
                                  ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.0"]])
def test_torch_compile(model, runs, keys):
    """The 'TorchCompileModel' node, without a code generator behind it: fused, with a LoRA, and fallen back."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    patcher = model.load()
    changed = with_lora(patcher, everywhere(patcher))
    plain, with_it = sample(patcher), sample(changed)
    set_torch_compile_wrapper(patcher, backend="eager", keys=keys)
    runs.clear()
    assert distance(sample(patcher), plain) <= 1e-6 and runs
    changed = with_lora(patcher, everywhere(patcher))
    assert distance(sample(changed), with_it) <= 1e-6
    runs.clear()
    with unfused():
        assert distance(sample(patcher), plain) <= FLOAT and not runs


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("capability, file, result, tolerance", [
    ((7, 5), "int4", "act_quant", 0.15), ((8, 0), "int4", "act_quant", 0.15), ((8, 9), "int4", "act_quant", 0.15),
    ((9, 0), "int4", "weight_only", 0.04), ((12, 0), "int4", "weight_only", 0.04), ((12, 0), "dev", "act_quant", 0.12)])
def test_kernels_on_the_emulator(capability, file, result, tolerance, request, monkeypatch):
    """The epilogues of the CUDA kernels' own code, where a block of such a GPU has them, alone and with a LoRA of 64 ranks,
    whose sums shared memory has no room for."""
    case, calls, original = request.getfixturevalue(file), [], SVDQLinear.run_together
    dtype = usual_dtype(Target("cuda", capability))
    launched = pretend_gpu(monkeypatch, capability)
    patcher = load_model(case.path, None if dtype == torch.float16 else dtype)
    monkeypatch.setattr(SVDQLinear, "run_together", staticmethod(lambda layers: (calls.extend(layers), original(layers))))
    network = patcher.model.diffusion_model
    changed = with_lora(patcher, everywhere(patcher, 64))
    for one in (patcher, changed):
        calls.clear(), launched.clear()
        ours = case.run(one, dtype)
        assert len(calls) == 8 * len(network.double_blocks) + 2 * len(network.single_blocks)
        products = [name.split("_")[0] for name in launched if name.startswith(("gemm", "mlp_w4a4", "mlp_nvfp4"))]
        feeds = capability < (9, 0) or file == "dev"
        assert len(products) == 12 and products.count("mlp") == 3 * feeds
        # a single block's two tiles share one, and so do both streams of a double block
        assert sum(name.startswith("adaln") for name in launched) == 3
        if one is patcher:
            assert distance(ours, case.io[f"{result}.out_latent"]) <= tolerance
        with unfused():                 # both are a network's rounding to 16 bit away from fp32; codes of 4 bits may differ
            assert distance(ours, case.run(one, dtype)) <= (2 * BF16 if result == "weight_only" else tolerance)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("room", ["all", "none", "not for what follows", "for what follows alone"])
def test_layers_in_the_memory_bar(room, int4, monkeypatch):
    """ComfyUI has weights in a bar of its own while `weight` stays in the host's memory. MLPs feed there, too, where the bar
    has room for the second layer; else it comes once, when its turn is. Nothing reads weights that are given back."""
    launched, out, cast = pretend_gpu(monkeypatch, (8, 9)), [], comfy.ops.cast_bias_weight
    patcher = load_model(int4.path, torch.bfloat16)
    patcher = with_lora(patcher, everywhere(patcher))
    expected = int4.run(patcher, torch.bfloat16)
    feeds = [name for name in launched if name.startswith("mlp")]
    assert any(name.startswith("mlp_w4a4") for name in feeds)
    ours = {layer: name for name, layer in patcher.model.diffusion_model.named_modules()
            if isinstance(layer, SVDQLinear) and layer.quantised}
    elsewhere = {layer: layer.weight.to("meta") for layer in ours}
    second = {layer for layer, name in ours.items() if name.endswith(("mlp.2", "linear2"))}
    comes = []

    def has_room(layer):
        return room == "all" or (layer in second) == (room == "for what follows alone") and room != "none"

    def from_bar(layer, *given, **more):
        weight, bias, offload = cast(layer, *given, **more)
        if layer not in ours:
            return weight, bias, offload
        comes.append(layer)
        out.append(layer)
        return weight.clone(), None if bias is None else bias.clone(), ("a stream", CPU if has_room(layer) else weight, None)

    def give_back(layer, weight, bias, offload):
        if layer in ours:
            out.remove(layer)
            weight.fill_(255)
            bias.fill_(float("nan"))

    for layer in ours:
        monkeypatch.setattr(layer, "_v", layer, raising=False)
    monkeypatch.setattr(SVDQLinear, "packed", property(elsewhere.get))
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda layer: "a signature" if has_room(layer) else None)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", from_bar)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", give_back)
    launched.clear()
    got = int4.network(patcher, torch.bfloat16)
    assert distance(got, expected) <= (0 if room == "all" else 1e-2) and not out
    assert [name for name in launched if name.startswith("mlp")] == (feeds if room == "all" else [])
    assert all(comes.count(layer) == 1 + (layer in second and room == "all") for layer in ours)


# ---- stepping aside

def test_only_the_class_of_a_block_differs(model):
    network = model.load().model.diffusion_model
    ours = [*network.double_blocks, *network.single_blocks]
    assert [type(one) for one in ours] == [blocks.FusedDouble, blocks.FusedSingle]
    names = list(network.state_dict())
    for one, kind in zip(ours, STOCK.values()):
        one.__class__ = kind
    assert list(network.state_dict()) == names


def test_where_kernels_do_not_fuse(model, runs, monkeypatch):
    """ComfyUI's blocks run on a CPU, and where weights are unpacked for torch's library."""
    monkeypatch.setattr(SVDQLinear, "kernels_do_epilogues", KERNELS_DO_EPILOGUES)
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        target = Target("cuda", capability)
        for precision in ("int4", "nvfp4", "awq"):
            dtype = usual_dtype(target)
            plan = registry.plan(example(precision, dtype), target, dtype, repack=True)
            assert (plan.variant.epilogues == epilogues.ALL) is ((precision, capability) == ("nvfp4", (12, 0))
                                                                 or precision == "int4")
    for kind in STOCK:
        Block(kind, model.load()).check_falls_back(runs)


def test_said_once(model, runs, caplog):
    fused.announce.cache_clear()
    with caplog.at_level(logging.INFO):
        sample(model.load())
        sample(model.load())
    assert caplog.text.count("run fused") == 1


@pytest.mark.parametrize("name", ["attn1_patch", "attn1_output_patch"])
@both
def test_patches(kind, name, block, runs):
    this, seen = block(kind), []

    def patch(*args, **kwargs):
        seen.append((args, kwargs))
        return args[0] if name == "attn1_output_patch" else {}

    this.check_falls_back(runs, transformer_options={"patches": {name: [patch]}, "block_index": 0})
    this.check(transformer_options={"patches": {"post_input": [patch]}, "block_index": 0})
    assert len(runs) == PRODUCTS[kind]


@both
def test_arguments(kind, block, runs):
    """Anything but one modulation and one position per token, in the shapes of FLUX."""
    this = block(kind, batch=2)
    pe, vec = this.given["pe"], this.given["vec"]
    stream, tokens = {"double": ("img", IMAGE), "single": ("x", TEXT + IMAGE)}[kind]
    cases = [{"pe": None}, {"pe": pe.bfloat16()}, {"pe": pe.mT}, {"pe": pe.expand(-1, 2, -1, -1, -1, -1).contiguous()},
             {"vec": vec[:1]}, {stream: noise(2, WIDTH, tokens, seed=8).mT}]
    if kind == "single":
        cases.append({"vec": noise(2, tokens, WIDTH, seed=8)})
    for changes in cases:
        this.check_falls_back(runs, **changes)
    with pytest.raises(TypeError, match="of_tomorrow"):
        this.ours(of_tomorrow=None)
    assert not runs
    this.check()
    assert len(runs) == PRODUCTS[kind]


@pytest.mark.parametrize("kind, name, tokens", [
    ("double", "modulation_dims_img", IMAGE), ("double", "modulation_dims_txt", TEXT),
    ("single", "modulation_dims", TEXT + IMAGE)])
def test_modulation_dims(kind, name, tokens, block, runs):
    this = block(kind)
    this.check_falls_back(runs, **{name: [(0, tokens, 0)]})
    this.check(**{name: None})
    assert len(runs) == PRODUCTS[kind]


def test_longer_positions(block, runs):
    """Newer versions of ComfyUI cut them, older ones refuse: theirs to decide."""
    this = block("single")
    ids = torch.arange((TEXT + IMAGE + 2) * 3).view(1, -1, 3).float()
    try:
        this.check_falls_back(runs, pe=this.network.pe_embedder(ids))
    except RuntimeError:
        assert not runs


BYPASSED = {"double": [f"{stream}_{name}" for stream in ("img", "txt") for name in (
                "attn.qkv", "attn.proj", "attn.norm", "attn.norm.query_norm", "attn.norm.key_norm", "mlp", "mlp.0", "mlp.1",
                "mlp.2")],
            "single": ["linear1", "linear2", "norm", "norm.query_norm", "norm.key_norm", "mlp_act"]}
MODULES = [(kind, name) for kind in STOCK for name in BYPASSED[kind]]


@pytest.mark.parametrize("kind, name", MODULES)
def test_hooks_and_wrappers(kind, name, block, runs):
    """On every module that a fused block steps over; without them it fuses again."""
    this = block(kind)
    module, plain = this.module.get_submodule(name), block(kind).stock()
    seen = []

    def louder(out):
        seen.append(name)
        return tuple(1.5 * part for part in out) if isinstance(out, tuple) else 1.5 * out

    def differs():
        this.check_falls_back(runs)
        assert seen and any(distance(*pair) > 1e-6 for pair in zip(this.ours(), plain))
        seen.clear()

    handle = module.register_forward_hook(lambda module, args, out: louder(out))
    differs()
    handle.remove()
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(name))
    this.check_falls_back(runs)
    assert seen
    handle.remove()
    original = module.forward
    module.forward = lambda *args: louder(original(*args))      # as the bypass LoRA loader does ...
    differs()
    assert not runs
    module.forward = original                                   # ... and leaves it
    this.check()
    assert len(runs) == PRODUCTS[kind] and not seen


@pytest.mark.parametrize("kind, name", [("double", "img_attn.proj"), ("single", "linear2"), ("single", "norm.key_norm")])
@pytest.mark.parametrize("which", ["weight_function", "bias_function"])
def test_weight_functions(kind, name, which, block, runs):
    this = block(kind)
    module, plain, seen = this.module.get_submodule(name), block(kind).stock(), []

    def double(weight):
        seen.append(weight)
        return weight * 2

    setattr(module, which, [double])
    this.check_falls_back(runs)
    if "norm" not in name or which == "weight_function":        # this norm has no bias
        assert seen and any(distance(*pair) > 1e-3 for pair in zip(this.ours(), plain))
    setattr(module, which, [])
    this.check()
    assert len(runs) == PRODUCTS[kind]


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, name in MODULES
                                        if name.split(".")[-1] in ("qkv", "proj", "0", "2", "linear1", "linear2")])
def test_plain_layer(kind, name, block, runs):
    """A layer whose weight is numbers."""
    this = block(kind)
    layer = this.module.get_submodule(name)
    weight, shift = layer.dense(layer.weight)
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(layer.bias + shift)
    layer.svdq = None
    layer.describe(None)
    this.check_falls_back(runs)


@both
def test_gradients(kind, block, runs):
    """ComfyUI samples without; a node that trains asks for them."""
    this = block(kind)
    with torch.enable_grad():
        this.check_falls_back(runs)
    this.check()
    assert len(runs) == PRODUCTS[kind]


@pytest.mark.parametrize("louder", [lambda out: 1.5 * out.float(), lambda out: out * noise(1, TEXT + IMAGE, 1).to(out)])
def test_modulations_of_another_kind(louder, model, runs):
    """A hook may make them fp32, or one for each token."""
    this = Block("single", model.load(torch.bfloat16), dtype=torch.bfloat16)
    plain = this.stock()
    handle = this.module.modulation.lin.register_forward_hook(lambda module, args, out: louder(out))
    this.check_falls_back(runs)
    assert distance(this.ours()[0], plain[0]) > 1e-2
    handle.remove()
    this.check(BF16)
    norm = this.module.pre_norm.register_forward_hook(lambda module, args, out: out.float())
    this.check(BF16)
    norm.remove()
    assert len(runs) == 2 * PRODUCTS["single"]


@both
def test_norms_of_two_eps(kind, block, runs):
    """Kernels have one for q and k."""
    this = block(kind)
    norm = this.module.norm if kind == "single" else this.module.txt_attn.norm
    norm.key_norm.eps = 0.5
    this.check_falls_back(runs)
    norm.query_norm.eps = 0.5
    this.check()
    assert len(runs) == PRODUCTS[kind]


@pytest.mark.parametrize("kind, name, other", [
    ("double", "img_mlp.1", torch.nn.GELU()), ("double", "img_attn.norm.query_norm", torch.nn.RMSNorm(128)),
    ("double", "txt_mlp", torch.nn.Identity()), ("single", "mlp_act", torch.nn.GELU()),
    ("single", "mlp_act", torch.nn.SiLU()), ("single", "norm.query_norm", torch.nn.RMSNorm(128, 1e-3))])
def test_replaced_modules(kind, name, other, block, runs):
    """Object patches put others' modules into blocks."""
    this = block(kind)
    this.module.set_submodule(name, other)
    this.check_falls_back(runs)


REPLACED = {
    "layers.attention": (layers, "attention"), "math.attention": (math, "attention"), "apply_rope": (math, "apply_rope"),
    "apply_mod": (layers, "apply_mod"), "double": (layers.DoubleStreamBlock, "forward"),
    "single": (layers.SingleStreamBlock, "forward"), "QKNorm": (layers.QKNorm, "forward"),
    "RMSNorm": (next(kind for kind in SVDQOps.RMSNorm.__mro__ if "forward" in vars(kind)), "forward"),
    "GELU": (torch.nn.GELU, "forward"), "Sequential": (torch.nn.Sequential, "forward"), "linear": (SVDQLinear, "forward"),
    # what these call
    "rope of one": (math, "apply_rope1"), "kitchen's rope": (comfy.quant_ops.ck, "apply_rope"),
    "kitchen's rope of one": (math if hasattr(math, "q_apply_rope1") else comfy.quant_ops.ck,
                              "q_apply_rope1" if hasattr(math, "q_apply_rope1") else "apply_rope1"),
    "RMSNorm that casts": (next(kind for kind in SVDQOps.RMSNorm.__mro__ if "forward_comfy_cast_weights" in vars(kind)),
                           "forward_comfy_cast_weights"),
    "rms_norm": (torch.nn.functional, "rms_norm"), "gelu": (torch.nn.functional, "gelu")}


WAYS = {"wraps": lambda original, louder: functools.wraps(original)(louder), "lambda": lambda original, louder: louder,
        "partial": lambda original, louder: functools.partial(louder)}


@pytest.mark.parametrize("kind, name, way", [
    (kind, name, way) for kind in STOCK for name in REPLACED for way in WAYS
    if (kind, name) != ("single", "Sequential") and not (way == "partial" and isinstance(REPLACED[name][0], type))])
def test_replaced_code(kind, name, way, block, runs, monkeypatch):
    """Whoever replaces code of ComfyUI that the fused forward steps over is heard, whether he says that he wraps it or not;
    and when he puts it back, blocks fuse again."""
    this, (where, attribute) = block(kind), REPLACED[name]
    original = getattr(where, attribute)

    def louder(*args, **kwargs):
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, WAYS[way](original, louder))
        this.check_falls_back(runs)
    this.check()
    assert len(runs) == PRODUCTS[kind]


@pytest.mark.parametrize("named, says_so", [("louder", False), ("apply_rope", True)])
def test_wrappers_of_the_same_file(named, says_so, block, runs, monkeypatch):
    """A decorator's wrapper has the file of the decorator, which may be ComfyUI's."""
    this, original = block("double"), math.apply_rope

    def call(*args):
        return original(*args)

    code = call.__code__.replace(co_filename=math.__file__, co_name=named)
    wrapper = functools.wraps(original)(types.FunctionType(code, {}, named, closure=call.__closure__))
    if not says_so:
        del wrapper.__wrapped__
    monkeypatch.setattr(math, "apply_rope", wrapper)
    this.check_falls_back(runs)


@pytest.mark.parametrize("name", sorted(REPLACED.keys() - {"linear"}))
def test_replaced_before_our_import(name, block, runs, monkeypatch):
    """The same where a pack came first: our module is made again after it."""
    this, (where, attribute) = block("double"), REPLACED[name]
    original = getattr(where, attribute)
    monkeypatch.setattr(where, attribute, lambda *args, **kwargs: original(*args, **kwargs))
    again = importlib.util.module_from_spec(blocks.__spec__)
    monkeypatch.setitem(sys.modules, blocks.__name__, again)
    again.__spec__.loader.exec_module(again)
    this.module.__class__ = STOCK["double"]
    again.fuse(this.network)
    assert type(this.module) is again.FusedDouble
    this.check_falls_back(runs)


@both
def test_hooks_on_every_module(kind, block, runs):
    """torch's, of a profiler for instance: they would be called for the modules that a fused block steps over."""
    this, seen = block(kind), []
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda module, *_: seen.append(type(module)))
        try:
            this.check_falls_back(runs)
        finally:
            handle.remove()
        assert torch.nn.GELU in seen
        seen.clear()
    this.check()
    assert len(runs) == PRODUCTS[kind]


@both
def test_replaced_classes(kind, block, runs, monkeypatch):
    """A pack's own QKNorm in a block, or its own block in ComfyUI's place: never taken for what they replace."""
    this = block(kind)

    class QKNorm(layers.QKNorm):
        pass

    for norm in ([this.module.norm] if kind == "single" else [this.module.img_attn.norm, this.module.txt_attn.norm]):
        norm.__class__ = QKNorm
    monkeypatch.setattr(layers, "QKNorm", QKNorm)
    this.check_falls_back(runs)


@pytest.mark.parametrize("adapter", ["dora", "rank"])
def test_loras_beside_the_kernels(adapter, model, runs):
    """One that scales outputs, or of more rank than fits: what it adds comes after the product, so the block falls back."""
    patcher = model.load()
    layer = adapters.LAYERS["proj"]
    weight = patcher.layers()[layer.key].dense(patcher.layers()[layer.key].weight)[0]
    file = adapters.make("dora_out", layer, weight) if adapter == "dora" else adapters.make("lora", layer, weight, rank=140)
    changed = with_lora(patcher, file)
    Block("double", changed).check_falls_back(runs)
    assert not patcher.layers()[layer.key].lora_fits_in_branch
    Block("single", changed).check()
    assert len(runs) == PRODUCTS["single"]
    Block("double", patcher).check()
    assert len(runs) == ALL


def test_bypass_lora(model, runs):
    """ComfyUI's other way to run a LoRA, on one block: it falls back as long as it is there."""
    patcher = model.load()
    plain = same_network(lambda: sample(patcher), runs)
    calls, layer = len(runs), adapters.LAYERS["linear1"]
    file = adapters.make("lora", layer, noise(7 * WIDTH, WIDTH))
    runs.clear()
    changed = inspect.unwrap(comfy.sd.load_bypass_lora_for_models)(patcher, None, file, 1.0, 0)[0]
    assert distance(sample(changed), plain) > 1e-3
    assert len(runs) * ALL == calls * PRODUCTS["double"]
    runs.clear()
    assert torch.equal(sample(patcher), plain) and len(runs) == calls
