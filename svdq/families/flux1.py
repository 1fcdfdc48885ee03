"""FLUX.1 and what was made from it: every name, size and rule that is this family's own.

Its tensors have three sets of names. "Ours" are those of published SVDQ files; diffusers has the same for what is not in
blocks; BFL's are those of the original and of ComfyUI.

To add a family, write a module like this one and list it in FAMILIES (__init__.py). The rest of the pack asks it for:

    NAME, FULL_NAME             what messages call it
    MARKS                       tensors (our names) it is recognised by: no file of another family has them all
    STACKS                      {first part of a block's names: word for it}, in the order the model runs them
    canonical(name)             a tensor's name in any SVDQ file of it -> our name
    read_shape(tensors)         {our name: TensorInfo} -> Shape; CheckpointError says what is wrong with the sizes
    facts(shape)                what `info` says in numbers: <word>_blocks, hidden_size, latent_channels and more
    is_16_bit(names)            whether these are names of such a model before it was quantised
    ORIGINALS, NOT_WHOLE        [family.Spelling] of 16-bit files, for the quantiser; what to say where tensors are missing
    Shape                       a frozen dataclass of ints and bools, which calibration files keep. Has `hidden` and
        variant, model_class    for people; ComfyUI's class
        slots(), plain()        Slots and Plains: all of a file
        comfy_places(), comfy_plain()   where they lie in ComfyUI's model: Places and PlainPlaces
        layer_in_words(layer)   "double block 7 of 19, img_mlp.2"
        metadata()              what a file says of its model
        assumed_inputs(model)   an object whose tokens(layer) are what the layer is fed, where nobody has captured it

What may differ from FLUX.1 has a place in family.py: a slot cut by rows over several of a host's layers (Place.start, stop),
layers without bias (Slot.bias), other activations than GELU (Slot.activation; None: signed codes). Slots that only some files
have depend on a field of Shape. The quantiser so far expects a slot to lie within one layer of ComfyUI's. Then take the family
out of foreign.py, give its blocks to nodes/host, and hold it to files that somebody else has written (tests/fixtures).

Source: checkpoint-format 1.3, 2, 3, 3.1, 4, 6.4. Test: tests/unit/test_families.py
"""

import json
import math
import re
from dataclasses import dataclass

import torch

from ..errors import CheckpointError, shown
from ..kernels.reference import gelu_tanh
from .family import MAX_BLOCKS, Place, Plain, PlainPlace, Slot, Spelling, Stored, by_layer, numbers

NAME, FULL_NAME = "FLUX", "FLUX.1"
HEAD_DIM = 128
PATCH = 4                       # latent pixels of a token: 2 x 2
LATENT_FEATURES = 16 * PATCH    # of an output token
TIME_FEATURES = 256             # sinusoids that stand for timestep and guidance

MARKS = "transformer_blocks.0.qkv_proj.qweight", "single_transformer_blocks.0.mlp_fc1.qweight"
STACKS = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
DOUBLE, SINGLE = STACKS
BFL_STACKS = {stack: f"{word}_blocks" for stack, word in STACKS.items()}

# Our name of a module -> BFL's. In blocks without the stack and the number in front.
BFL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BFL_IN_BLOCKS = {
    DOUBLE: {
        "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
        "qkv_proj": "img_attn.qkv", "qkv_proj_context": "txt_attn.qkv",
        "out_proj": "img_attn.proj", "out_proj_context": "txt_attn.proj",
        "mlp_fc1": "img_mlp.0", "mlp_context_fc1": "txt_mlp.0",
        "mlp_fc2": "img_mlp.2", "mlp_context_fc2": "txt_mlp.2",
        "norm_q": "img_attn.norm.query_norm", "norm_added_q": "txt_attn.norm.query_norm",
        "norm_k": "img_attn.norm.key_norm", "norm_added_k": "txt_attn.norm.key_norm",
    },
    SINGLE: {
        "norm.linear": "modulation.lin",
        "qkv_proj": "linear1", "mlp_fc1": "linear1",
        "out_proj": "linear2", "mlp_fc2": "linear2",
        "norm_q": "norm.query_norm", "norm_k": "norm.key_norm",
    },
}
# BFL's linears of a block -> the diffusers modules whose rows they stack.
DIFFUSERS_IN_BLOCKS = {
    DOUBLE: {
        "img_mod.lin": ["norm1.linear"], "txt_mod.lin": ["norm1_context.linear"],
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn.proj": ["attn.to_out.0"], "txt_attn.proj": ["attn.to_add_out"],
        "img_mlp.0": ["ff.net.0.proj"], "txt_mlp.0": ["ff_context.net.0.proj"],
        "img_mlp.2": ["ff.net.2"], "txt_mlp.2": ["ff_context.net.2"],
    },
    SINGLE: {
        "modulation.lin": ["norm.linear"],
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2": ["proj_out"],
    },
}
# Where diffusers has slots: q, k and v in one layer, which is its own fused form of them.
DIFFUSERS_SLOTS = {
    DOUBLE: {
        "norm1.linear": "norm1.linear", "norm1_context.linear": "norm1_context.linear",
        "qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.to_added_qkv",
        "out_proj": "attn.to_out.0", "out_proj_context": "attn.to_add_out",
        "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2",
        "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
    },
    SINGLE: {
        "norm.linear": "norm.linear", "qkv_proj": "attn.to_qkv", "mlp_fc1": "proj_mlp",
        "out_proj": "proj_out", "mlp_fc2": "proj_out",
    },
}
# XLabs' names of adapters in a double block -> BFL's linears.
XLABS = {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj"}
# A fused layer -> the modules beside it that are its rows.
DIFFUSERS_ROWS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
SCALE_FIRST = "norm_out.linear"     # its rows are (scale, shift) here and in diffusers, (shift, scale) in BFL's
# What the tensors of any FLUX are called up to the first dot.
BFL_ROOTS = (*BFL_STACKS.values(), *dict.fromkeys(name.partition(".")[0] for name in BFL.values()))
DIFFUSERS_ROOTS = (*STACKS, *dict.fromkeys(name.partition(".")[0] for name in BFL))

# Parameters of ComfyUI's Flux that FLUX.1 does not vary, and models that are built like it do.
COMFY_CONSTANTS = {"global_modulation": False, "mlp_silu_act": False, "yak_mlp": False, "txt_norm": False, "ops_bias": True,
                   "qkv_bias": True, "mlp_ratio": 4.0}


@dataclass(frozen=True)
class Shape:
    """What sets one FLUX apart from another. `in_features` counts token features: 4 x latent channels."""
    hidden: int
    depth: int
    depth_single: int
    in_features: int
    context_dim: int
    vec_dim: int
    guidance: bool

    @classmethod
    def from_comfy(cls, config):
        """Of the parameters of ComfyUI's Flux, by name."""
        return cls(config["hidden_size"], config["depth"], config["depth_single_blocks"], PATCH * config["in_channels"],
                   config["context_in_dim"], config["vec_in_dim"], config["guidance_embed"])

    # ---- in words

    @property
    def variant(self):
        """The published model family these sizes belong to; dev, Krea and Kontext share one architecture."""
        kind = {64: "dev, Krea or Kontext" if self.guidance else "schnell", 128: "Canny or Depth",
                384: "Fill"}.get(self.in_features, f"{self.in_features // PATCH} latent channels")
        full = (self.hidden, self.depth, self.depth_single) == (3072, 19, 38)
        return f"FLUX.1 {kind}" if full else f"FLUX-like ({kind})"

    @property
    def model_class(self):
        """ComfyUI's."""
        return "Flux" if self.guidance else "FluxSchnell"

    @property
    def depths(self):
        """{stack: number of its blocks}"""
        return {DOUBLE: self.depth, SINGLE: self.depth_single}

    def in_words(self):
        blocks = " and ".join(f"{depth} {BFL_STACKS[stack]}" for stack, depth in self.depths.items())
        return f"{self.variant}, {self.hidden} wide, {blocks}"

    def layer_in_words(self, layer):
        """Of a layer's BFL name: "double block 7 of 19, img_mlp.2"."""
        stack, number, part = layer.split(".", 2)
        stack, = (ours for ours, theirs in BFL_STACKS.items() if theirs == stack)
        return f"{STACKS[stack]} block {int(number) + 1} of {self.depths[stack]}, {part}"

    # ---- what a checkpoint holds

    def slots(self):
        """Every quantised linear: Slots, block by block."""
        h = self.hidden
        for i in range(self.depth):
            at = f"{DOUBLE}.{i}."
            for context in ("", "_context"):
                yield Slot(f"{at}norm1{context}.linear", 6 * h, h, kind="awq", chunks=6)
                yield Slot(f"{at}qkv_proj{context}", 3 * h, h, parts=3)
                yield Slot(f"{at}out_proj{context}", h, h)
                yield Slot(f"{at}mlp{context}_fc1", 4 * h, h)
                yield Slot(f"{at}mlp{context}_fc2", h, 4 * h, activation="gelu")
        for i in range(self.depth_single):
            at = f"{SINGLE}.{i}."
            yield Slot(f"{at}norm.linear", 3 * h, h, kind="awq", chunks=3)
            yield Slot(f"{at}qkv_proj", 3 * h, h, parts=3)
            yield Slot(f"{at}mlp_fc1", 4 * h, h)
            yield Slot(f"{at}out_proj", h, h)
            yield Slot(f"{at}mlp_fc2", h, 4 * h, activation="gelu")

    def plain(self):
        """Every tensor that stays in 16 bit: the linears outside of blocks, then the scales of q/k norms."""
        h, inputs = self.hidden, {"x_embedder": self.in_features, "context_embedder": self.context_dim,
                                  "time_text_embed.timestep_embedder.linear_1": TIME_FEATURES,
                                  "time_text_embed.guidance_embedder.linear_1": TIME_FEATURES,
                                  "time_text_embed.text_embedder.linear_1": self.vec_dim}
        outputs = {"norm_out.linear": 2 * h, "proj_out": LATENT_FEATURES}
        for module in BFL:
            if self.guidance or "guidance_embedder" not in module:
                n, k = outputs.get(module, h), inputs.get(module, h)
                yield Plain(f"{module}.weight", (n, k))
                yield Plain(f"{module}.bias", (n,))
        for stack, norms in ((DOUBLE, ("q", "k", "added_q", "added_k")), (SINGLE, ("q", "k"))):
            for i in range(self.depths[stack]):
                for norm in norms:
                    yield Plain(f"{stack}.{i}.norm_{norm}.weight", (HEAD_DIM,))

    # ---- where it lies in ComfyUI's model, which has BFL's names

    def comfy_places(self):
        """A Place for every slot. A single block's linear1 is (q, k, v) above the MLP, linear2 has the MLP to the right."""
        corners = {f"{SINGLE}.mlp_fc1": {"row": 3 * self.hidden}, f"{SINGLE}.mlp_fc2": {"col": self.hidden}}
        for slot in self.slots():
            stack, _, part = slot.module.split(".", 2)
            yield Place(slot, _bfl(slot.module), **corners.get(f"{stack}.{part}", {}))

    def comfy_plain(self):
        """A PlainPlace for every plain tensor. Norms have BFL's `.scale`: older ComfyUI knows only that one, newer ones have
        `.weight` and rename it while loading.
        """
        for tensor in self.plain():
            module, _, part = tensor.name.rpartition(".")
            theirs = _bfl(module)
            if module in BFL:
                yield PlainPlace(tensor, f"{theirs}.{part}", swapped=module == SCALE_FIRST)
            else:
                yield PlainPlace(tensor, f"{theirs}.scale", alias=f"{theirs}.weight")

    # ---- where it lies in diffusers' model

    def diffusers_places(self):
        """A Place for every slot. A single block's proj_out has the MLP to the right of the attention."""
        for slot in self.slots():
            stack, number, part = slot.module.split(".", 2)
            col = self.hidden if (stack, part) == (SINGLE, "mlp_fc2") else 0
            yield Place(slot, f"{stack}.{number}.{DIFFUSERS_SLOTS[stack][part]}", col=col)

    def diffusers_plain(self):
        """A PlainPlace for every plain tensor."""
        for tensor in self.plain():
            yield PlainPlace(tensor, _diffusers_plain(tensor.name))

    def diffusers_config(self):
        """The arguments of diffusers' FluxTransformer2DModel."""
        config = json.loads(self.metadata()["config"])
        return {name: value for name, value in config.items() if not name.startswith("_")}

    # ---- for the quantiser

    def metadata(self):
        """{key: text} that a published file says of its model, but for the quantisation."""
        heads, channels = self.hidden // HEAD_DIM, self.in_features // PATCH
        config = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0", "attention_head_dim": HEAD_DIM,
                  "axes_dims_rope": [16, 56, 56], "guidance_embeds": self.guidance, "in_channels": self.in_features,
                  "joint_attention_dim": self.context_dim, "num_attention_heads": heads, "num_layers": self.depth,
                  "num_single_layers": self.depth_single, "out_channels": LATENT_FEATURES, "patch_size": 1,
                  "pooled_projection_dim": self.vec_dim}
        comfy = {"model_class": self.model_class, "model_config": {
            "image_model": "flux", "in_channels": channels, "out_channels": LATENT_FEATURES // PATCH, "patch_size": 2,
            "vec_in_dim": self.vec_dim, "context_in_dim": self.context_dim, "hidden_size": self.hidden, "mlp_ratio": 4.0,
            "num_heads": heads, "depth": self.depth, "depth_single_blocks": self.depth_single, "axes_dim": [16, 56, 56],
            "theta": 10000, "qkv_bias": True, "guidance_embed": self.guidance, "disable_unet_model_creation": True}}
        return {"config": json.dumps(config, indent=2), "comfy_config": json.dumps(comfy, indent=2),
                "model_class": "NunchakuFluxTransformer2dModel"}

    def assumed_inputs(self, model):
        return AssumedInputs(self, model)


def _bfl(module):
    """Our name of a module -> BFL's."""
    if module in BFL:
        return BFL[module]
    stack, number, part = module.split(".", 2)
    return f"{BFL_STACKS[stack]}.{number}.{BFL_IN_BLOCKS[stack][part]}"


def bfl_to_diffusers(depth, depth_single):
    """(BFL's name of a linear, the diffusers modules whose rows it stacks, whether diffusers has its halves the other way
    round) of a model with so many blocks."""
    for stack, count in ((DOUBLE, depth), (SINGLE, depth_single)):
        for part, modules in DIFFUSERS_IN_BLOCKS[stack].items():
            for i in range(count):
                yield f"{BFL_STACKS[stack]}.{i}.{part}", [f"{stack}.{i}.{module}" for module in modules], False
    for module, theirs in BFL.items():
        yield theirs, [module], module == SCALE_FIRST


def _diffusers_plain(name):
    """Our name of a plain tensor -> diffusers'."""
    block, in_block, norm = name.partition(".norm_")
    return f"{block}.attn.norm_{norm}" if in_block and name.split(".")[0] in STACKS else name


# What sets a field of Shape in a file: (field, module, axis of its weight)
_SIZES = (("hidden", "x_embedder", 0), ("in_features", "x_embedder", 1), ("context_dim", "context_embedder", 1),
          ("vec_dim", "time_text_embed.text_embedder.linear_1", 1))
_GUIDANCE = "time_text_embed.guidance_embedder.linear_1"        # where there is one, the model takes guidance


# ---- SVDQ files

# Class V2 spells some names differently. Order matters: the first match of each group wins.
_V2 = [(re.compile(pattern), name) for pattern, name in (
    (r"\.proj_down$", ".lora_down"), (r"\.proj_up$", ".lora_up"),
    (r"\.smooth_factor$", ".smooth"), (r"\.smooth_factor_orig$", ".smooth_orig"),
    (r"\.attn\.to_qkv\.", ".qkv_proj."), (r"\.attn\.add_qkv_proj\.", ".qkv_proj_context."),
    (r"\.attn\.to_out\.0\.", ".out_proj."), (r"\.attn\.to_out\.", ".out_proj."),
    (r"\.attn\.to_add_out\.", ".out_proj_context."),
    (r"\.ff\.net\.0\.proj\.", ".mlp_fc1."), (r"\.ff\.net\.2\.", ".mlp_fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".mlp_context_fc1."), (r"\.ff_context\.net\.2\.", ".mlp_context_fc2."),
    (r"\.attn\.norm_", ".norm_"))]


def canonical(name):
    """A tensor's name in any SVDQ FLUX file -> the name in published ones."""
    if name.startswith((f"{DOUBLE}.", f"{SINGLE}.")):
        for pattern, plain in _V2:
            name = pattern.sub(plain, name)
    return name


def read_shape(tensors):
    """The Shape of an SVDQ file. Raises CheckpointError for one that lacks the few tensors it takes, or has odd sizes.

    tensors   {our name: container.TensorInfo}
    """
    sizes = {}
    for field, module, axis in _SIZES:
        name = f"{module}.weight"
        info = tensors.get(name)
        if info is None or len(info.shape) != 2:
            raise CheckpointError(f"{name}: {'missing' if info is None else f'is {shown(list(info.shape))}, needs two axes'}")
        sizes[field] = info.shape[axis]
    empty = next((field for field, size in sizes.items() if size == 0), None)
    if empty:
        raise CheckpointError(f"the tensor that sets {empty} is empty")
    if sizes["hidden"] % HEAD_DIM or sizes["in_features"] % PATCH:
        raise CheckpointError(f"x_embedder.weight: is [{sizes['hidden']}, {sizes['in_features']}]; FLUX needs a multiple "
                              f"of {HEAD_DIM} rows and of {PATCH} columns")
    for field, stack in (("depth", DOUBLE), ("depth_single", SINGLE)):
        blocks, wanted = numbers(tensors, f"{stack}.")
        if blocks != wanted or len(blocks) > MAX_BLOCKS:
            odd = sorted(blocks - wanted)
            raise CheckpointError(f"{stack}.*: {len(blocks)} blocks" + (
                f" with gaps: '{stack}.{shown(odd[0])}' is there, block {min(map(int, wanted - blocks))} is not"
                if odd else f", more than {MAX_BLOCKS}"))
        sizes[field] = len(blocks)
    return Shape(guidance=f"{_GUIDANCE}.weight" in tensors, **sizes)


def facts(shape):
    """What is said of a model in numbers; None for all of them where its shape is not known."""
    return {"double_blocks": shape and shape.depth, "single_blocks": shape and shape.depth_single,
            "hidden_size": shape and shape.hidden, "latent_channels": shape and shape.in_features // PATCH,
            "guidance": shape and shape.guidance}


# ---- 16-bit files

def is_16_bit(names):
    """Whether the names are those of a FLUX that was not quantised to SVDQ, by BFL's names or by diffusers'."""
    def has(*parts):
        return any(all(part in name for part in parts) for name in names)

    return has("double_blocks.", "img_attn.qkv") or (has("transformer_blocks.", "attn.add_q_proj")
                                                     and has("single_transformer_blocks."))


NOT_WHOLE = "The model is not FLUX.1, or the file is not whole; get all of it"


def _read_16_bit(tensors, spelt, stacks):
    """The Shape of a 16-bit file. spelt: our name of a module -> the file's; stacks: the file's names of them."""
    sizes = {}
    for field, module, axis in _SIZES:
        name = f"{spelt(module)}.weight"
        if name not in tensors:
            raise CheckpointError(f"{name} is missing. {NOT_WHOLE}")
        size = tensors[name].shape
        if len(size) != 2:
            raise CheckpointError(f"{name} is {shown(list(size))}, needs 2 axes. This is no {FULL_NAME}")
        sizes[field] = size[axis]
    hidden, in_features = sizes["hidden"], sizes["in_features"]
    if not hidden or hidden % HEAD_DIM or not in_features or in_features % PATCH:
        raise CheckpointError(f"{spelt('x_embedder')}.weight is [{hidden}, {in_features}]. The format holds models whose "
                              f"hidden size is a multiple of {HEAD_DIM} and that have {PATCH} features per channel")
    for field, stack in zip(("depth", "depth_single"), stacks):
        blocks, wanted = numbers(tensors, f"{stack}.")
        if blocks != wanted or not 0 < len(blocks) <= MAX_BLOCKS:
            odd = sorted(map(shown, blocks ^ wanted))[:3]
            raise CheckpointError(f"{stack}.* are {len(blocks)} blocks"
                                  + (f" that are not numbered 0, 1, 2 ...: {', '.join(odd)}" if odd else "")
                                  + f". {NOT_WHOLE}")
        sizes[field] = len(blocks)
    return Shape(guidance=f"{spelt(_GUIDANCE)}.weight" in tensors, **sizes)


def _stored_as_bfl(shape, names):
    for layer in by_layer(shape.comfy_places()):
        yield from ((name, Stored([name])) for name in layer.tensors())
    for place in shape.comfy_plain():
        yield place.name, Stored([place.name if place.alias is None or place.name in names else place.alias])


def _stored_as_diffusers(shape, names):
    ours = {theirs: stack for stack, theirs in BFL_STACKS.items()}
    for layer in by_layer(shape.comfy_places()):
        stack, number, part = layer.name.split(".", 2)
        modules = DIFFUSERS_IN_BLOCKS[ours[stack]][part]
        for name in layer.tensors():
            yield name, Stored([f"{ours[stack]}.{number}.{module}{name.removeprefix(layer.name)}" for module in modules])
    for place in shape.comfy_plain():
        yield place.name, Stored([_diffusers_plain(place.tensor.name)], place.swapped)


ORIGINALS = (
    Spelling("BFL", "double_blocks.0.img_attn.qkv.weight", lambda tensors: _read_16_bit(tensors, _bfl, BFL_STACKS.values()),
             _stored_as_bfl),
    Spelling("diffusers", "transformer_blocks.0.attn.to_q.weight",
             lambda tensors: _read_16_bit(tensors, lambda module: module, STACKS), _stored_as_diffusers))


# ---- what the layers are fed, by assumption

TIMES, GUIDANCES = 64, (1.0, 2.5, 3.5, 5.0)


class AssumedInputs:
    """What each layer is probably fed. Everything a modulation does depends on timestep, guidance and pooled text only, and
    the model's own small layers say how; what follows a linear can be computed from assumed inputs of it.

    model   quantize.assume.Assumed, which gives weights and random numbers
    """

    def __init__(self, shape, model):
        self.shape, self.model = shape, model
        modules = model.plain("time_in", "vector_in", "guidance_in")
        self.vec = torch.nn.functional.silu(self._vectors(modules)).to(model.device)

    def _vectors(self, modules):
        """vec for every combination of timestep and guidance, each with a random pooled text: [TIMES * 4, hidden]."""
        times = (torch.arange(TIMES) + 0.5) / TIMES
        times, guidance = (axis.flatten() for axis in torch.meshgrid(times, torch.tensor(GUIDANCES), indexing="ij"))
        pooled = torch.randn(len(times), self.shape.vec_dim, generator=self.model.random("vec"))
        total = _mlp(modules, "time_in", _embedding(times)) + _mlp(modules, "vector_in", pooled)
        return total + _mlp(modules, "guidance_in", _embedding(guidance)) if self.shape.guidance else total

    def tokens(self, layer):
        """Inputs of a layer, by its BFL name: fp32 [tokens, K]."""
        stack, number, part = layer.split(".", 2)
        prefix, h = f"{stack}.{number}.", self.shape.hidden
        if part.endswith(("_mod.lin", "modulation.lin")):
            return self._vec_of(layer)
        if stack == BFL_STACKS[SINGLE]:
            first = f"{prefix}linear1"
            x = self._modulated(f"{prefix}modulation.lin", 0, first)
            if part == "linear1":
                return x
            weight, bias = self.model.linear(first)
            return torch.cat((self.model.averaged(x @ weight[2 * h:3 * h].t() + bias[2 * h:3 * h]),
                              gelu_tanh(x @ weight[3 * h:].t() + bias[3 * h:])), 1)
        stream, part = part[:3], part[4:]
        modulation, qkv, fc1 = (f"{prefix}{stream}_{name}" for name in ("mod.lin", "attn.qkv", "mlp.0"))
        if part == "attn.qkv":
            return self._modulated(modulation, 0, qkv)
        if part == "mlp.0":
            return self._modulated(modulation, 3, fc1)
        if part == "attn.proj":
            weight, bias = self.model.linear(qkv)
            return self.model.averaged(self._modulated(modulation, 0, qkv) @ weight[2 * h:].t() + bias[2 * h:])
        weight, bias = self.model.linear(fc1)
        return gelu_tanh(self._modulated(modulation, 3, fc1) @ weight.t() + bias)

    def _vec_of(self, layer):
        """The vec that each token of a layer belongs to."""
        return self.vec[self.model.drawn(len(self.vec), layer)]

    def _modulated(self, modulation, chunk, reader):
        """Tokens of LN(h) (1 + scale) + shift; chunk is the index of the shift, reader the linear they go to."""
        h = self.shape.hidden
        weight, bias = self.model.linear(modulation)
        rows = slice(chunk * h, (chunk + 2) * h)
        shift, scale = (self._vec_of(reader) @ weight[rows].t() + bias[rows]).chunk(2, 1)
        return self.model.normed(reader) * (1 + scale) + shift


def _mlp(modules, name, x):
    hidden = torch.nn.functional.silu(x @ modules[f"{name}.in_layer.weight"].t() + modules[f"{name}.in_layer.bias"])
    return hidden @ modules[f"{name}.out_layer.weight"].t() + modules[f"{name}.out_layer.bias"]


def _embedding(times):
    """Sinusoids of 1000 t, as FLUX embeds timestep and guidance."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(TIME_FEATURES // 2) / (TIME_FEATURES // 2))
    angles = 1000 * times[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1)
