"""Seeded state dicts of the adapters ComfyUI parses, in the names their trainers write.

A maker gives the tensors of one adapter on one weight, {suffix: tensor}; KINDS says under whose names they go into a file.
At strength 1 an adapter moves its weight by about SIZE of the weight's spread, as trained ones do.
"""

from dataclasses import dataclass
from functools import partial

import torch

SIZE = 0.1
RANK = 4
ALPHA = 3.0                     # not the rank, so that forgetting to divide one by the other shows
KOHYA, PEFT = ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")


@dataclass(frozen=True)
class Layer:
    """A linear of ComfyUI's FLUX and the linears diffusers has in its place, with their shares of its rows."""
    name: str
    parts: tuple
    shares: tuple = (1,)

    @property
    def key(self):
        """What ComfyUI's patch lists call its weight."""
        return f"diffusion_model.{self.name}.weight"

    def rows(self, n):
        """(diffusers name, rows) of every part, when the layer has n rows."""
        unit, end = n // sum(self.shares), 0
        for part, share in zip(self.parts, self.shares):
            start, end = end, end + share * unit
            yield part, slice(start, end)


def _parts(block, *names):
    return tuple(f"{block}.{name}" for name in names)


_DOUBLE, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
LAYERS = {
    "qkv": Layer("double_blocks.0.img_attn.qkv", _parts(_DOUBLE, "attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1)),
    "proj": Layer("double_blocks.0.img_attn.proj", _parts(_DOUBLE, "attn.to_out.0")),
    "mlp.0": Layer("double_blocks.0.img_mlp.0", _parts(_DOUBLE, "ff.net.0.proj")),
    "mlp.2": Layer("double_blocks.0.img_mlp.2", _parts(_DOUBLE, "ff.net.2")),
    "linear1": Layer("single_blocks.0.linear1", _parts(_SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                     (1, 1, 1, 4)),
    "linear2": Layer("single_blocks.0.linear2", _parts(_SINGLE, "proj_out")),
    "img_mod": Layer("double_blocks.0.img_mod.lin", _parts(_DOUBLE, "norm1.linear")),
    "modulation": Layer("single_blocks.0.modulation.lin", _parts(_SINGLE, "norm.linear")),
    "img_in": Layer("img_in", ("x_embedder",))}


# ---- makers: maker(weight, random) -> {suffix: tensor}

def lora(weight, random, names=KOHYA, rank=RANK, alpha=None):
    (n, k), (up, down) = weight.shape, names
    size = _size(weight) * (k / rank) ** 0.5 * (1 if alpha is None else rank / alpha)
    tensors = {down: _randn(random, rank, k) / k ** 0.5, up: _randn(random, n, rank) * size}
    return tensors if alpha is None else tensors | {"alpha": torch.tensor(alpha)}


def dora(weight, random, axis, **options):
    """`axis` 1: a scale per output, the norm of its row of the weight, moved by 2%; 0: per input, of the changed weight."""
    tensors = lora(weight, random, alpha=ALPHA, **options)
    up, down = (tensors[name] for name in KOHYA)
    changed = weight if axis else weight + ALPHA / len(down) * up @ down
    norm = changed.norm(dim=axis, keepdim=True)
    return tensors | {"dora_scale": norm * (1 + 0.02 * _randn(random, *norm.shape))}


def lokr(weight, random, factor=8):
    n, k = weight.shape
    return {"lokr_w1": _randn(random, factor, factor) * _size(weight), "lokr_w2": _randn(random, n // factor, k // factor)}


def lokr_factored(weight, random, factor=8):
    n, k = weight.shape
    return {"lokr_w1": _randn(random, factor, factor) * _size(weight), "alpha": torch.tensor(ALPHA),
            "lokr_w2_a": _randn(random, n // factor, RANK), "lokr_w2_b": _randn(random, RANK, k // factor) / RANK ** 0.5}


def loha(weight, random):
    n, k = weight.shape
    return {"hada_w1_a": _randn(random, n, RANK) * _size(weight), "hada_w1_b": _randn(random, RANK, k) / RANK ** 0.5,
            "hada_w2_a": _randn(random, n, RANK), "hada_w2_b": _randn(random, RANK, k) / RANK ** 0.5,
            "alpha": torch.tensor(ALPHA)}


def oft(weight, random, block=16):
    return {"oft_blocks": _randn(random, len(weight) // block, block, block) * SIZE / (8 * block) ** 0.5}


def boft(weight, random, block=16, stages=2):
    """ComfyUI applies it only with an alpha, the limit of the rotations' norm; this one is too high to matter."""
    return {"oft_blocks": _randn(random, stages, len(weight) // block, block, block) * SIZE / (8 * block * stages) ** 0.5,
            "rescale": 1 + 0.02 * _randn(random, len(weight), 1), "alpha": torch.tensor(1000.0)}


def glora(weight, random):
    n, k = weight.shape
    return {"a1.weight": _randn(random, k, RANK) / k ** 0.5, "a2.weight": _randn(random, RANK, k) * SIZE / RANK ** 0.5,
            "b1.weight": _randn(random, n, RANK) * _size(weight), "b2.weight": _randn(random, RANK, k) / RANK ** 0.5}


def diff(weight, random):
    return {"diff": _randn(random, *weight.shape) * _size(weight)}


def diff_b(weight, random):
    return {"diff_b": _randn(random, len(weight)) * SIZE}


def set_weight(weight, random):
    """The strength does not matter to ComfyUI here: the weight becomes this one."""
    return {"set_weight": weight + diff(weight, random)["diff"]}


def _randn(random, *shape):
    return torch.randn(shape, generator=random)


def _size(weight):
    return SIZE * weight.std()


# ---- files

PREFIXES = {                    # of a whole layer's or a part's tensors: by ComfyUI's name, then by diffusers' names
    "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}.",
    "plain": lambda name: f"diffusion_model.{name}.",
    "peft": lambda name: f"transformer.{name}.",
    "onetrainer": lambda name: f"lora_transformer_{name.replace('.', '_')}.",
    "lycoris": lambda name: f"lycoris_{name.replace('.', '_')}."}

_PEFT = partial(lora, names=PEFT)
KINDS = {                       # kind: (maker, whose names)
    "lora": (partial(lora, alpha=ALPHA), "kohya"),
    "lora_parts": (_PEFT, "peft"),              # on fused layers every part has a down of its own
    "lora_shared_down": (_PEFT, "peft"),
    "dora_out": (partial(dora, axis=1), "kohya"),
    "dora_in": (partial(dora, axis=0), "kohya"),
    "dora_parts": (partial(dora, axis=1), "onetrainer"),
    "lokr": (lokr, "kohya"),
    "lokr_factored": (lokr_factored, "kohya"),
    "lokr_parts": (lokr, "lycoris"),
    "loha": (loha, "kohya"),
    "oft": (oft, "kohya"),
    "boft": (boft, "kohya"),
    "glora": (glora, "kohya"),
    "diff": (diff, "plain"),
    "diff_b": (diff_b, "plain"),
    "set_weight": (set_weight, "plain")}


def make(kind, layer, weight, seed=0, only="", **options):
    """The state dict of one adapter on one layer, whose dense weight is `weight`; `only` for the parts so called."""
    maker, style = KINDS[kind]
    random, prefix = torch.Generator().manual_seed(seed), PREFIXES[style]
    whole = style in ("kohya", "plain")
    pieces = [(layer.name, slice(None))] if whole else [(part, rows) for part, rows in layer.rows(len(weight))
                                                        if part.endswith(only)]
    tensors, shared = {}, {}
    for name, rows in pieces:
        made = maker(weight[rows], random, **options)
        if kind == "lora_shared_down":
            shared = shared or {PEFT[1]: made[PEFT[1]]}
        tensors |= {prefix(name) + suffix: tensor.clone() for suffix, tensor in (made | shared).items()}
    return tensors


def flux_tools(weights):
    """A file like BFL's Canny and Depth LoRAs: their names, biases, q/k norms, and an img_in for twice the channels."""
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, layer in LAYERS.items():
        weight = weights[name]
        if name == "img_in":
            weight = torch.cat([weight, torch.zeros_like(weight)], 1)
        tensors |= {f"{layer.name}.{suffix}": tensor for suffix, tensor in lora(weight, random, names=PEFT).items()}
        tensors[f"{layer.name}.lora_B.bias"] = _randn(random, len(weight)) * SIZE
    for norm in ("double_blocks.0.img_attn.norm", "single_blocks.0.norm"):
        for which in ("query", "key"):
            tensors[f"{norm}.{which}_norm.scale"] = 1 + SIZE * _randn(random, 128)
    return tensors
