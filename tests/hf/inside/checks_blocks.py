"""Fused blocks compute what diffusers' own do, and step aside wherever somebody would notice that they fuse."""

import copy
import functools
import io
import logging
import shutil

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry as Hooks
from diffusers.hooks import ModelHook
from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry
from diffusers.models import activations, attention, attention_dispatch, normalization
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from svdq_pack.svdq import SVDQFluxTransformer2DModel, fused
from svdq_pack.svdq.hf import blocks, operators
from svdq_pack.svdq.hf.attention import SVDQFluxAttnProcessor, rotation
from svdq_pack.svdq.hf.layer import SVDQLinear
from svdq_pack.svdq.kernels import launch
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.tests.hf.inside.checks_offload import sequential
from svdq_pack.tests.hf.inside.checks_pipelines import STEPS, TEXT, made
from svdq_pack.tests.hf.inside.support import distance, epilogues_in_kernels, layers, noise, write
from svdq_pack.tests.kernels.executors import Emulator

WORDS, IMAGE, WIDTH = 5, 12, 256
STOCK = {"double": transformer_flux.FluxTransformerBlock, "single": transformer_flux.FluxSingleTransformerBlock}
FLOAT = 1e-5                            # of what a block adds to its input: one way of computing in fp32 and another
BF16 = 1.5e-2
both = pytest.mark.parametrize("kind", STOCK)


@pytest.fixture
def fuses():
    """The blocks that run fused; kernels do epilogues."""
    seen, found = [], blocks._found

    def counted(block, *given):
        parts = found(block, *given)
        if parts is not None:
            seen.append(block)
        return parts

    with epilogues_in_kernels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_found", counted)
        yield seen


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(precision) -> that of a random model, two heads wide"""
    return functools.cache(lambda precision: write(tmp_path_factory.mktemp("files"), precision))


@pytest.fixture
def model(files):
    """model(dtype, precision, act_bits) -> the model of such a file, with activations that nobody rounds"""
    return lambda dtype=torch.float32, precision="int4", act_bits=16: SVDQFluxTransformer2DModel.from_pretrained(
        files(precision), dtype=dtype, act_bits=act_bits)


class Block:
    """The first block of a kind, and arguments for it."""

    def __init__(self, kind, model, batch=1, dtype=torch.float32):
        self.kind, self.model = kind, model
        self.module = (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]
        ids = (10 * noise(WORDS + IMAGE, 3, seed=5)).round()
        self.given = {"hidden_states": noise(batch, IMAGE, WIDTH).to(dtype),
                      "encoder_hidden_states": noise(batch, WORDS, WIDTH, seed=1).to(dtype),
                      "temb": noise(batch, WIDTH, seed=2).to(dtype), "image_rotary_emb": model.pos_embed(ids)}

    def run(self, forward, **changes):
        """[what it adds to the text, to the image]"""
        given = self.given | changes
        before = [given["encoder_hidden_states"].clone(), given["hidden_states"].clone()]
        out = forward(**given)
        assert torch.equal(given["encoder_hidden_states"], before[0]) and torch.equal(given["hidden_states"], before[1])
        return [new - old for new, old in zip(out, before)]

    def ours(self, **changes):
        return self.run(self.module, **changes)

    def stock(self, **changes):
        """With diffusers' own processor, too."""
        ours, self.module.attn.processor = self.module.attn.processor, transformer_flux.FluxAttnProcessor()
        try:
            return self.run(STOCK[self.kind].forward.__get__(self.module), **changes)
        finally:
            self.module.attn.processor = ours

    def check(self, fuses, tolerance=FLOAT, **changes):
        """It fuses, and computes what diffusers' own does."""
        before = len(fuses)
        errors = [distance(*pair) for pair in zip(self.ours(**changes), self.stock(**changes), strict=True)]
        assert all(error <= tolerance for error in errors), errors
        assert fuses[before:] == [self.module]

    def check_falls_back(self, fuses, **changes):
        before = len(fuses)
        for ours, stock in zip(self.ours(**changes), self.stock(**changes), strict=True):
            assert distance(ours, stock) <= FLOAT          # its processor may still fuse
        assert len(fuses) == before


@pytest.fixture
def block(model, fuses):
    """block(kind) -> Block in fp32, one picture."""
    return lambda kind, **options: Block(kind, model(), **options)


# ---- the same numbers

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("batch", [1, 2])
@both
def test_equals_stock(kind, batch, precision, dtype, tolerance, model, fuses):
    this = Block(kind, model(dtype, precision=precision), batch, dtype)
    this.check(fuses, tolerance)
    this.check(fuses, tolerance, joint_attention_kwargs={})
    this.check(fuses, tolerance, joint_attention_kwargs={"ip_hidden_states": [noise(1, 4, 128)], "ip_adapter_masks": None})
    wide = noise(batch, WIDTH, IMAGE, seed=7).to(dtype).mT              # of any strides
    this.check(fuses, tolerance, hidden_states=wide)


@pytest.mark.parametrize("batch", [1, 2])
def test_one_read_of_the_input(batch, block, fuses, monkeypatch):
    """Each norm's modulation is one input of its layers, an item's; those of a single block share it."""
    made_of, modulated = [], fused.Modulated
    monkeypatch.setattr(fused, "Modulated", lambda *given: made_of.append(modulated(*given)) or made_of[-1])
    for kind, norms in (("double", 4), ("single", 1)):
        made_of.clear()
        block(kind, batch=batch).check(fuses)
        assert len(made_of) == norms * batch


@pytest.mark.parametrize("batch", [1, 2])
def test_single_blocks_hand_on_one_tensor(batch, block, fuses, monkeypatch):
    """Text and image are parts of it: no copy between two of them, and one where something lies between."""
    this, copies, cat = block("single", batch=batch), [], torch.cat

    def counted(tensors, dim=0):
        copies.extend([tensors] if [one.ndim for one in tensors] == [3, 3] else [])
        return cat(tensors, dim)

    monkeypatch.setattr(torch, "cat", counted)
    given, first, second = this.given, *this.model.single_transformer_blocks
    text, image = first(**given)
    assert len(copies) == 1
    apart = {"encoder_hidden_states": text.clone(), "hidden_states": image.clone()}
    wanted = [part.clone() for part in second(**given | apart)]
    assert len(copies) == 2
    found = second(**given | {"encoder_hidden_states": text, "hidden_states": image})
    assert len(copies) == 2 and all(torch.equal(*pair) for pair in zip(found, wanted))
    other = given | {"encoder_hidden_states": image[:, :WORDS], "hidden_states": image}      # parts that are no neighbours
    wanted = [part.clone() for part in second(**other | {"encoder_hidden_states": image[:, :WORDS].clone()})]
    assert all(torch.equal(*pair) for pair in zip(second(**other), wanted)) and len(copies) == 4


@both
def test_fp16_ends_where_diffusers_ends(kind, model, fuses, monkeypatch):
    """At 65504 instead of Inf: all of a single block, the text of a double one."""
    this = Block(kind, model(torch.float16), dtype=torch.float16)
    linear = (this.module.norm1_context if kind == "double" else this.module.norm).linear
    linear.bias.data[-WIDTH:] = 1000                        # of the last gate
    loud = this.given["encoder_hidden_states"].clone()
    loud[0, 1] = 65504 * loud[0, 1].sign()
    attended = noise(1, WORDS + IMAGE, 2, 128).half()       # of the others' tokens: attention would carry it everywhere
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", lambda *given, **more: attended)
    ours, stock = (forward(**this.given | {"encoder_hidden_states": loud})[0]
                   for forward in (this.module, STOCK[kind].forward.__get__(this.module)))
    assert fuses == [this.module] and ours.isfinite().all() and stock.isfinite().all()
    assert 20 < (stock[0, 1].abs() == 65504).sum() < WIDTH and ((ours == 65504) == (stock == 65504)).all()
    ordinary = [at for at in range(WORDS) if at != 1]
    assert distance(ours[0, 1], stock[0, 1]) <= 2e-3 and distance(ours[0, ordinary], stock[0, ordinary]) <= 2e-3


def test_whole_network(model, fuses):
    """A pipeline's steps with a LoRA in branches, two pictures, and ControlNet residuals between blocks."""
    transformer = model()
    tensors = {}
    for seed, (name, layer) in enumerate(layers(transformer).items()):
        if not name.endswith(("to_qkv", "to_added_qkv")):
            tensors |= {f"transformer.{name}.lora_A.weight": 0.1 * noise(4, layer.in_features, seed=seed),
                        f"transformer.{name}.lora_B.weight": 0.1 * noise(layer.out_features, 4, seed=seed)}
    tensors |= {f"transformer.transformer_blocks.0.attn.{name}.lora_{half}.weight": 0.1 * noise(*size)
                for name in ("to_q", "add_v_proj") for half, size in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))}
    given = {"hidden_states": noise(2, 16, 64), "encoder_hidden_states": noise(2, 7, 128), "pooled_projections": noise(2, 64),
             "timestep": torch.tensor([0.5, 0.7]), "guidance": torch.tensor([3.5, 3.5]), "img_ids": noise(16, 3).round(),
             "txt_ids": torch.zeros(7, 3)}
    control = {"controlnet_block_samples": [noise(2, 16, WIDTH)], "controlnet_single_block_samples": [noise(2, 16, WIDTH)]}

    def check(**more):
        fuses.clear()
        ours = transformer(**given, **more).sample
        assert len(fuses) == 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_found", lambda *given: None)
            assert distance(ours, transformer(**given, **more).sample) <= FLOAT
        return ours

    plain = check()
    assert distance(check(**control), plain) > 1e-3
    transformer.load_lora_adapter(tensors, adapter_name="one")
    with_it = check()
    assert distance(with_it, plain) > 1e-2
    transformer.set_adapters("one", 0.3)
    assert distance(check(), with_it) > 1e-3
    assert distance(check(joint_attention_kwargs={"scale": 0.0}), plain) <= FLOAT
    transformer.fuse_lora()
    check()
    transformer.unfuse_lora()
    transformer.disable_lora()
    assert distance(check(), plain) <= FLOAT
    transformer.unload_lora()
    assert distance(check(), plain) <= FLOAT


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability) -> names of the kernels that the emulator launches, which grows; models loaded from then on are served as
    by such a GPU."""
    def pretend(capability):
        emulator = Emulator()
        monkeypatch.setattr(launch, "launch", emulator.launch)
        monkeypatch.setattr(Target, "of", lambda device: Target("cuda", capability))
        operators.linear_of.cache_clear()
        return emulator.launched

    yield pretend
    operators.linear_of.cache_clear()


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("capability, precision, feeds", [
    ((8, 0), "int4", True), ((8, 9), "int4", True), ((12, 0), "int4", False), ((12, 0), "nvfp4", True)])
def test_kernels_on_the_emulator(capability, precision, feeds, model, gpu):
    """The CUDA kernels' own code, where a block of such a GPU has it: one product per tile, one modulation per norm, which a
    single block's two layers share, and the MLP's middle never written where its kernel feeds the next."""
    reference, launched = model(torch.bfloat16, precision=precision), gpu(capability)
    transformer = model(torch.bfloat16, precision=precision, act_bits=None)
    for layer in layers(transformer).values():
        layer.repack()                          # into the order that its kernels read
    with pytest.MonkeyPatch.context() as patch:
        for kind, products, norms, between in (("double", 8, 4, 2), ("single", 4, 1, 1)):
            this = Block(kind, transformer, dtype=torch.bfloat16)
            launched.clear()
            ours = this.ours()
            kinds = [name.split("_")[0] for name in launched if name.startswith(("gemm", "mlp_w4a4", "mlp_nvfp4", "adaln"))]
            assert len(kinds) == products + norms and kinds.count("adaln") == norms and kinds.count("mlp") == between * feeds
            patch.setattr(blocks, "_found", lambda *given: None)
            unfused = this.ours()
            patch.undo()
            exact = Block(kind, reference, dtype=torch.bfloat16).ours()
            errors = [tuple(distance(*pair) for pair in zip(one, other)) for one, other in (
                (ours, unfused), (ours, exact), (unfused, exact))]
            assert max(errors[0]) <= 0.15, errors               # a code of 4 bits may be another
            assert all(one <= 1.1 * other for one, other in zip(*errors[1:])), errors


# ---- what stays

def test_only_the_class_of_a_block_differs(model, fuses):
    transformer = model()
    ours = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert all(type(one) is not kind and isinstance(one, kind) and type(one).__name__ == kind.__name__
               for one, kind in zip(ours, (STOCK["double"], STOCK["single"], STOCK["single"])))
    names = list(transformer.state_dict())
    for one in ours:
        one.__class__ = next(kind for kind in STOCK.values() if isinstance(one, kind))
    assert list(transformer.state_dict()) == names


def test_diffusers_knows_the_classes(model):
    """Whoever hooks blocks or attentions looks them up."""
    transformer = model()
    for block, kind in ((transformer.transformer_blocks[0], "double"), (transformer.single_transformer_blocks[0], "single")):
        known, stock = (TransformerBlockRegistry.get(one) for one in (type(block), STOCK[kind]))
        assert known is not stock and known.return_hidden_states_index == stock.return_hidden_states_index == 1
        assert known.return_encoder_hidden_states_index == stock.return_encoder_hidden_states_index == 0
        processor = type(block.attn.processor)
        assert AttentionProcessorRegistry.get(processor) == AttentionProcessorRegistry.get(transformer_flux.FluxAttnProcessor)


def test_copies_and_pickles(block, fuses):
    this, stream = block("single"), io.BytesIO()
    wanted = this.ours()
    torch.save(this.module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(this.module), torch.load(stream, weights_only=False)):
        assert all(torch.equal(*pair) for pair in zip(this.run(other), wanted)) and fuses[-1] is other


def test_where_kernels_do_not_fuse(model):
    """To the bit what diffusers' own block computes."""
    for kind in STOCK:
        this = Block(kind, model())
        assert all(torch.equal(*pair) for pair in zip(this.ours(), this.stock()))


def test_said_once(block, fuses, caplog):
    fused.announce.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            block("double").ours()
    assert caplog.text.count("run fused") == 1


def test_attention_is_diffusers(block, fuses, monkeypatch):
    """Backends, parallel configurations and whoever replaces the function get q, k and v as from its own processor."""
    for kind in STOCK:
        this, seen = block(kind), []
        monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", lambda *given, seen=seen, **more: seen.append(
            (given, more)) or attention_dispatch.dispatch_attention_fn(*given, **more))
        this.module.attn.set_attention_backend("native")
        this.module.attn.processor._parallel_config = None
        this.ours()
        assert fuses[-1] is this.module
        this.stock()
        (ours, of_ours), (stock, of_stock) = seen
        assert all(distance(*pair) <= FLOAT for pair in zip(ours, stock)) and ours[0].shape == (1, WORDS + IMAGE, 2, 128)
        assert of_ours.keys() == of_stock.keys() and of_ours["backend"] == this.module.attn.processor._attention_backend


# ---- stepping aside

BYPASSED = {"double": ["norm1", "norm1.norm", "norm1_context", "norm1_context.norm", "norm2", "norm2_context", "attn",
                       "attn.to_qkv", "attn.to_added_qkv", "attn.norm_q", "attn.norm_k", "attn.norm_added_q",
                       "attn.norm_added_k", "attn.to_out.0", "attn.to_out.1", "attn.to_add_out", "ff", "ff.net.0",
                       "ff.net.0.proj", "ff.net.1", "ff.net.2", "ff_context", "ff_context.net.0", "ff_context.net.0.proj",
                       "ff_context.net.1", "ff_context.net.2"],
            "single": ["norm", "norm.norm", "attn", "attn.to_qkv", "attn.norm_q", "attn.norm_k", "proj_mlp", "act_mlp",
                       "proj_out"]}
MODULES = [(kind, name) for kind in STOCK for name in BYPASSED[kind]]


def louder(out):
    return tuple(1.5 * part for part in out) if isinstance(out, tuple) else 1.5 * out


class Louder(ModelHook):
    def post_forward(self, module, output):
        return louder(output)


@pytest.mark.parametrize("kind, name", MODULES)
def test_hooks_and_wrappers(kind, name, block, fuses):
    """torch's, diffusers' and by hand, on every module that a fused block steps over; without them it fuses again."""
    this = block(kind)
    module, plain = this.module.get_submodule(name), this.stock()

    def check_heard():
        this.check_falls_back(fuses)
        assert any(distance(*pair) > 1e-6 for pair in zip(this.ours(), plain))

    handle = module.register_forward_hook(lambda module, given, out: louder(out))
    check_heard()
    handle.remove()
    seen = []
    handle = module.register_forward_pre_hook(lambda module, given: seen.append(name))
    this.check_falls_back(fuses)
    assert seen
    handle.remove()
    hooks = Hooks.check_if_exists_or_initialize(module)
    hooks.register_hook(Louder(), "louder")
    check_heard()
    hooks.remove_hook("louder")
    original = module.forward
    module.forward = lambda *given, **more: louder(original(*given, **more))
    check_heard()
    module.forward = original
    this.check(fuses)


@pytest.mark.parametrize("kind, name", [("double", "norm1.linear"), ("double", "norm1_context.silu"),
                                        ("single", "norm.linear")])
def test_hooks_that_fused_blocks_call(kind, name, block, fuses):
    this, plain = block(kind), block(kind).stock()
    this.module.get_submodule(name).register_forward_hook(lambda module, given, out: louder(out))
    this.check(fuses)
    assert any(distance(*pair) > 1e-3 for pair in zip(this.ours(), plain))


@pytest.mark.parametrize("kind, name", [("double", "norm1.linear"), ("double", "norm1_context.linear"),
                                        ("single", "norm.linear")])
def test_modulations_of_another_dtype(kind, name, model, fuses):
    """A hook may make them fp32, which no kernel takes."""
    this = Block(kind, model(torch.bfloat16), dtype=torch.bfloat16)
    handle = this.module.get_submodule(name).register_forward_hook(lambda module, given, out: 1.5 * out.float())
    for ours, stock in zip(this.ours(), this.stock(), strict=True):
        assert ours.dtype == stock.dtype == torch.float32 and distance(ours, stock) <= BF16
    handle.remove()
    this.check(fuses, BF16)


@pytest.mark.parametrize("kind, name, other", [
    ("double", "ff.net.0", activations.GELU(WIDTH, 4 * WIDTH)), ("double", "norm2", torch.nn.LayerNorm(WIDTH)),
    ("double", "attn.norm_q", torch.nn.RMSNorm(128, 1e-3)), ("double", "attn.norm_added_k", torch.nn.LayerNorm(128)),
    ("double", "ff_context.net.1", torch.nn.SiLU()), ("double", "attn.to_out.0", torch.nn.Linear(WIDTH, WIDTH)),
    ("single", "act_mlp", torch.nn.GELU()), ("single", "norm.norm", torch.nn.LayerNorm(WIDTH)),
    ("single", "proj_mlp", torch.nn.Linear(WIDTH, 4 * WIDTH))])
def test_replaced_modules(kind, name, other, block, fuses):
    this = block(kind)
    if name == "ff.net.0":
        other.proj = this.module.ff.net[0].proj
    this.module.set_submodule(name, other)
    this.check_falls_back(fuses)


@both
def test_processors(kind, block, fuses):
    """Of others, and derived from ours."""
    this = block(kind)
    for processor in (transformer_flux.FluxAttnProcessor(), type("Other", (SVDQFluxAttnProcessor,), {})()):
        this.module.attn.set_processor(processor)
        this.check_falls_back(fuses)
    if kind == "double":
        this.module.attn.set_processor(transformer_flux.FluxIPAdapterAttnProcessor(WIDTH, 128))
        given = {"joint_attention_kwargs": {"ip_hidden_states": [noise(1, 4, 128)]}}
        ours = this.ours(**given)
        stock = this.run(STOCK[kind].forward.__get__(this.module), **given)
        assert all(torch.equal(*pair) for pair in zip(ours, stock)) and not fuses


@both
def test_arguments(kind, block, fuses):
    """Anything but those of FLUX, and of another kind."""
    this = block(kind, batch=2)
    cos, sin = this.given["image_rotary_emb"]
    cases = [{"image_rotary_emb": None}, {"joint_attention_kwargs": {"attention_mask": torch.zeros(17, 17)}},
             {"joint_attention_kwargs": {"of_tomorrow": 1}}, {"temb": this.given["temb"][:1]}]
    for changes in cases:
        this.check_falls_back(fuses, **changes)
    with pytest.raises(TypeError, match="of_tomorrow"):
        this.ours(of_tomorrow=None)
    for given in ((cos[1:], sin[1:]), (cos[None], sin[None])):
        with pytest.raises(RuntimeError):
            this.ours(image_rotary_emb=given)
    assert not fuses
    given = list(this.given.values())
    before = this.ours()
    found = this.module(*given)                         # by place, as gradient checkpoints call it
    assert len(fuses) == 2 and torch.equal(found[1] - given[0], before[1])


REPLACED = {
    "rope": (transformer_flux, "apply_rotary_emb"), "projections": (transformer_flux, "_get_qkv_projections"),
    "double": (STOCK["double"], "forward"), "single": (STOCK["single"], "forward"),
    "processor": (transformer_flux.FluxAttnProcessor, "__call__"), "our processor": (SVDQFluxAttnProcessor, "__call__"),
    "attention": (transformer_flux.FluxAttention, "forward"),
    "ff": (attention.FeedForward, "forward"), "act": (activations.GELU, "forward"), "its gelu": (activations.GELU, "gelu"),
    "norm": (normalization.AdaLayerNormZero, "forward"), "norm of one": (normalization.AdaLayerNormZeroSingle, "forward"),
    "LayerNorm": (torch.nn.LayerNorm, "forward"), "RMSNorm": (torch.nn.RMSNorm, "forward"), "GELU": (torch.nn.GELU, "forward"),
    "Dropout": (torch.nn.Dropout, "forward"), "linear": (SVDQLinear, "forward"),
    "layer_norm": (torch.nn.functional, "layer_norm"), "rms_norm": (torch.nn.functional, "rms_norm"),
    "gelu": (torch.nn.functional, "gelu")}


@pytest.mark.parametrize("way", ["wraps", "lambda"])
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_code(name, way, block, fuses, monkeypatch):
    """Whoever replaces code that a fused forward steps over is heard; and when he puts it back, blocks fuse again."""
    where, attribute = REPLACED[name]
    original = getattr(where, attribute)

    def other(*given, **more):
        return original(*given, **more)

    for kind in STOCK:
        this = block(kind)
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, functools.wraps(original)(other) if way == "wraps" else other)
            this.check_falls_back(fuses)
        this.check(fuses)


@both
def test_hooks_on_every_module(kind, block, fuses):
    """torch's, of a profiler for instance."""
    this, seen = block(kind), []
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda module, *_: seen.append(type(module)))
        try:
            this.check_falls_back(fuses)
        finally:
            handle.remove()
        assert torch.nn.LayerNorm in seen
        seen.clear()
    this.check(fuses)


@both
def test_gradients_and_autocast(kind, block, fuses):
    this = block(kind)
    with torch.enable_grad():
        this.check_falls_back(fuses)
        this.given["hidden_states"].requires_grad_()
        this.module(**this.given)[1].sum().backward()
    assert this.given["hidden_states"].grad.abs().sum() > 0 and not fuses
    this.given["hidden_states"] = this.given["hidden_states"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        this.module(**this.given)
    assert not fuses
    this.check(fuses)


def test_dropout(block, fuses):
    this = block("double")
    this.module.train()
    this.check(fuses)                           # of none
    this.module.ff.net[1].p = 0.5
    torch.manual_seed(0)
    assert distance(this.ours()[1], this.stock()[1]) > 1e-3 and len(fuses) == 1
    this.module.eval()
    this.check(fuses)


def test_adapters_beside_a_layer(model, fuses):
    """In training, of a rank that no branch has, with biases, or of another kind than LoRA: what they add comes after."""
    for config in ({"r": 4}, {"r": 140}, {"r": 4, "lora_bias": True}):
        transformer = model()
        transformer.add_adapter(LoraConfig(target_modules=["proj_out", "ff.net.2"], **config))
        for name, parameter in transformer.named_parameters():
            if ".lora_" in name:
                parameter.data = 0.05 * noise(*parameter.shape, seed=len(name))
        for kind in STOCK:
            Block(kind, transformer).check_falls_back(fuses)
        transformer.disable_lora()
        for kind in STOCK:
            Block(kind, transformer).check_falls_back(fuses)
        transformer.delete_adapters("default")
        transformer.unload_lora()
        Block("single", transformer).check(fuses)
        fuses.clear()


def test_loras_of_more_rank_than_branches_have(model, fuses):
    transformer = model()
    transformer.load_lora_adapter({f"transformer.single_transformer_blocks.0.proj_mlp.lora_{half}.weight": 0.1 * noise(*size)
                                   for half, size in (("A", (140, WIDTH)), ("B", (4 * WIDTH, 140)))}, adapter_name="one")
    Block("single", transformer).check_falls_back(fuses)
    Block("double", transformer).check(fuses)
    transformer.disable_lora()
    Block("single", transformer).check(fuses)


def test_loras_with_biases(model, fuses):
    """They come after the product, and gates after them."""
    transformer, name = model(), "transformer.single_transformer_blocks.0.proj_mlp"
    transformer.load_lora_adapter({f"{name}.lora_A.weight": 0.1 * noise(4, WIDTH), f"{name}.lora_B.bias": noise(4 * WIDTH),
                                   f"{name}.lora_B.weight": 0.1 * noise(4 * WIDTH, 4)}, adapter_name="one")
    Block("single", transformer).check_falls_back(fuses)
    transformer.unload_lora()
    Block("single", transformer).check(fuses)


def test_other_positions(block, fuses):
    """What is made of them once for all blocks follows them: another sin to the same cos, and numbers written in place."""
    this = block("single")
    cos, sin = this.given["image_rotary_emb"]
    this.check(fuses)
    this.check(fuses, image_rotary_emb=(cos, sin.flip(0)))
    before = this.ours()
    sin.neg_()
    this.check(fuses)
    assert distance(this.ours()[1], before[1]) > 1e-3


# ---- in diffusers' hands

def test_norms_of_any_eps(block, fuses):
    """Each LayerNorm has one of its own."""
    for kind, names in (("double", ("norm1.norm", "norm1_context.norm", "norm2", "norm2_context")), ("single", ("norm.norm",))):
        this = block(kind)
        for i, name in enumerate(names):
            this.module.get_submodule(name).eps = 0.1 * (i + 1)
        this.check(fuses)


def test_a_norm_with_an_embedding(block, fuses):
    this = block("double")

    class Embedding(torch.nn.Module):
        def forward(self, *given, **more):
            return noise(1, WIDTH, seed=9)

    this.module.norm1.emb = Embedding()
    this.check_falls_back(fuses)


@pytest.mark.parametrize("batch", [1, 2])
def test_joined(batch):
    """Text before image, whatever memory the two have."""
    whole = noise(batch, WORDS + IMAGE + 3, 2 * WIDTH)
    parts = [whole[:, :WORDS], whole[:, WORDS:WORDS + IMAGE]]
    cases = [parts, [part.contiguous() for part in parts], [part[..., :WIDTH] for part in parts],
             [whole[:, IMAGE:], whole[:, :IMAGE]], [whole[:, :WORDS], whole[:, WORDS + 1:]],
             [whole[:, :WORDS], whole[:, WORDS:]]]
    for text, image in cases:
        assert torch.equal(blocks._joined(text, image), torch.cat([text, image], 1))
    assert blocks._joined(*cases[-1]).data_ptr() == whole.data_ptr() != blocks._joined(*cases[1]).data_ptr()


def test_positions_of_a_graph(monkeypatch):
    """A captured graph makes its rotations itself: it is replayed with other numbers in the same tensors."""
    class OnGPU(torch.Tensor):
        is_cuda = True

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    cos, sin = (noise(6, 128, seed=seed).as_subclass(OnGPU) for seed in (1, 2))
    kept = rotation(cos, sin)
    assert rotation(cos, sin) is kept
    capturing = True
    made = rotation(cos, sin)
    assert made is not kept and torch.equal(made, kept)


def paint(pipe, **more):
    return pipe(**TEXT, **STEPS | more, height=64, width=64, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("config", [
    diffusers.FirstBlockCacheConfig(threshold=10.0),
    diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500)], ids=["first block", "pyramid"])
def test_caches(config, model, fuses):
    """They find blocks and attentions of ours as any other's: equal with fused blocks and without."""
    transformer = model()
    pipe, results = made(diffusers.FluxPipeline, transformer), []
    plain = paint(pipe, num_inference_steps=4)
    whole = len(fuses)
    for stock in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if stock:
                patch.setattr(blocks, "_found", lambda *given: None)
            transformer.enable_cache(config)
            fuses.clear()
            results.append(paint(pipe, num_inference_steps=4))
            if not stock:
                assert len(fuses) < whole
            transformer.disable_cache()
    assert distance(*results) <= FLOAT and distance(results[0], plain) > 1e-4
    fuses.clear()
    assert torch.equal(paint(pipe, num_inference_steps=4), plain) and len(fuses) == whole


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind, model, fuses):
    """Blocks that come as a whole fuse; where single layers come and go by hooks, they do not."""
    transformer = model()
    pipe = made(diffusers.FluxPipeline, transformer)
    wanted, whole = paint(pipe), len(fuses)
    fuses.clear()
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    try:
        transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **more)
    except AttributeError:
        if torch.accelerator.current_accelerator() is not None:
            raise
        pytest.skip("this diffusers offloads groups beside an accelerator only")
    assert distance(paint(pipe), wanted) <= FLOAT
    assert len(fuses) == (whole if kind == "block_level" else 0)


def test_sequential_offload(model, fuses):
    pipe = made(diffusers.FluxPipeline, model())
    wanted = paint(pipe)
    fuses.clear()
    sequential(pipe, None)
    assert distance(paint(pipe), wanted) <= FLOAT and not fuses


@pytest.fixture
def steps(monkeypatch):
    """Names of the steps that run; kernels do epilogues, and Dynamo starts anew."""
    torch._dynamo.reset()
    seen = []
    for name in ("_joint_qkv", "_stream_end", "_single_end"):
        plain = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *rest, plain=plain, name=name: seen.append(name) or plain(*rest))
    with epilogues_in_kernels():
        yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [True, False])
def test_compile(whole, model, steps):
    """One graph, fused, and what a LoRA changes later is seen; another strength compiles nothing."""
    transformer, reference = model(), model()
    given = {"hidden_states": noise(2, 16, 64), "encoder_hidden_states": noise(2, 7, 128), "pooled_projections": noise(2, 64),
             "timestep": torch.tensor([0.5, 0.7]), "guidance": torch.tensor([3.5, 3.5]), "img_ids": noise(16, 3).round(),
             "txt_ids": torch.zeros(7, 3)}
    run = transformer
    if whole:
        run = torch.compile(transformer, fullgraph=True, backend="aot_eager")
    else:
        transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert distance(run(**given).sample, reference(**given).sample) <= 1e-6
    assert steps.count("_single_end") == 2          # of the compiled model alone
    before = reference(**given).sample
    for name, rank in (("one", 4), ("wide", 140)):          # of which the second falls back
        tensors = {f"transformer.single_transformer_blocks.0.proj_mlp.lora_{half}.weight": 0.1 * noise(*size)
                   for half, size in (("A", (rank, WIDTH)), ("B", (4 * WIDTH, rank)))}
        for one in (transformer, reference):
            one.load_lora_adapter(dict(tensors), adapter_name=name)
        for strength in (1.0, -0.5, 0.25):
            for one in (transformer, reference):
                one.set_adapters(name, strength)
            steps.clear()
            wanted, graphs = reference(**given).sample, torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert distance(run(**given).sample, wanted) <= 1e-6 < distance(before, wanted)
            assert steps.count("_single_end") == (2 if name == "one" else 1)
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
            assert compiled == 0 or strength == 1.0 and compiled > 0
    for one in (transformer, reference):
        one.unload_lora()
    assert distance(run(**given).sample, before) <= 1e-6
