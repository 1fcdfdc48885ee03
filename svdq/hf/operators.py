"""A packed linear as an operator of torch, opaque to torch.compile, with the gradients of its input and bias; and the steps of
a block with norms, rotation, GELU and gates in the kernels of several.

Everything a layer is stands in the arguments, so that whoever copies, saves or traces a model needs to know nothing of us:

    packed    uint8 [bytes]            bias   [out_features] of x's dtype, or None          lora   uint8 [bytes] or None
    text      JSON of format.PackedTiles.description
    sections  JSON of the LoRAs' sections, see sections_text; "" without
    features  [in, out] of the whole layer
    rows      [start, stop) of its output, of layers of one tile; [] for all

Steps take lists of the first three, texts joined by line feeds, and features one after the other.

Test: tests/hf/inside/checks_layer.py, tests/hf/inside/checks_blocks.py
"""

import json
from functools import lru_cache
from typing import NamedTuple

import torch

from .. import fused
from ..layer import BoundLinear, PackedLinear, StoredLora, run_together
from ..lora import LoraSections
from ..serving import announce


class AnnouncedLinear(PackedLinear):
    """A PackedLinear that says once which path serves it."""

    def plans(self, device, dtype):
        before = len(self._plans)
        found, precision = super().plans(device, dtype), self.tiles[0].weight.precision
        if len(self._plans) > before and precision != "awq":
            announce(precision, device, dtype, self.act_bits, found[0])
        return found


@lru_cache(maxsize=4096)
def linear_of(text, in_features, out_features, rows=()):
    """The PackedLinear of a description."""
    linear = AnnouncedLinear(in_features, out_features, json.loads(text))
    return linear.rows(*rows) if rows else linear


@torch.compiler.assume_constant_result
def kernels_fuse(text, in_features, out_features, device, dtype, places):
    """Whether the kernels of a layer whose tiles begin at these (row, col) do all epilogues; asked once while a model is
    traced."""
    linear = linear_of(text, in_features, out_features)
    return ([(tile.row, tile.col) for tile in linear.tiles] == list(places)
            and linear.kernels_do_epilogues(device, dtype))


@lru_cache(maxsize=4096)
def sections_of(text):
    return LoraSections(**json.loads(text))


def sections_text(sections):
    """LoraSections as text for the operators; sections_of reads it."""
    return json.dumps({"tiles": sections.tiles, "scale": sections.scale})


def stored_lora(lora, sections):
    return None if lora is None else StoredLora(sections_of(sections), lora)


@torch.library.custom_op("svdq::linear", mutates_args=())
def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, lora: torch.Tensor | None, text: str,
           sections: str, features: list[int], rows: list[int]) -> torch.Tensor:
    """y [..., out] of x [..., in_features]: see PackedLinear.forward."""
    this = linear_of(text, *features, tuple(rows))
    return this.forward(x, packed, bias, stored_lora(lora, sections))


@linear.register_fake
def _(x, packed, bias, lora, text, sections, features, rows):
    return x.new_empty(*x.shape[:-1], rows[1] - rows[0] if rows else features[1])


@torch.library.custom_op("svdq::linear_input_gradient", mutates_args=())
def linear_input_gradient(dy: torch.Tensor, packed: torch.Tensor, lora: torch.Tensor | None, text: str, sections: str,
                          features: list[int], rows: list[int]) -> torch.Tensor:
    """dx [..., in_features] of dy [..., out]: see PackedLinear.input_gradient."""
    return linear_of(text, *features, tuple(rows)).input_gradient(dy, packed, stored_lora(lora, sections))


@linear_input_gradient.register_fake
def _(dy, packed, lora, text, sections, features, rows):
    return dy.new_empty(*dy.shape[:-1], features[0])


def _setup_context(ctx, inputs, output):
    _, packed, _, lora, *ctx.rest = inputs
    ctx.save_for_backward(packed, lora)


def _backward(ctx, dy):
    of_x, _, of_bias, *_ = ctx.needs_input_grad
    packed, lora = ctx.saved_tensors
    dx = torch.ops.svdq.linear_input_gradient(dy, packed, lora, *ctx.rest) if of_x else None
    return dx, None, dy.flatten(0, -2).sum(0) if of_bias else None, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_setup_context)


# ---- steps of a block. Layers are modules of layer.py; none of their hooks is called

class Operands(NamedTuple):
    """A layer as operators take it: see above."""
    packed: torch.Tensor
    bias: torch.Tensor
    lora: torch.Tensor | None
    text: str
    sections: str
    features: tuple

    def bound(self):
        return BoundLinear(linear_of(self.text, *self.features), self.packed, self.bias, stored_lora(self.lora, self.sections))


def _step(name, plain, layers, x, *rest):
    """plain([BoundLinear], *rest), which the operator of a name is, too."""
    if not torch.compiler.is_compiling():
        return plain([layer.bound(x) for layer in layers], *rest)
    packed, bias, lora, text, sections, features = zip(*(layer.operands(x) for layer in layers))
    return getattr(torch.ops.svdq, name)(list(packed), list(bias), list(lora), "\n".join(text), "\n".join(sections),
                                         [size for pair in features for size in pair], *rest)


def _bound(packed, bias, lora, text, sections, features):
    return [Operands(*given).bound() for given in zip(packed, bias, lora, text.split("\n"), sections.split("\n"),
                                                      zip(features[::2], features[1::2]))]


def joint_qkv(layers, x, modulation, norms, rotation, eps):
    """q, k, v [B, tokens of all streams, 3 * heads * 128] of the streams of a block, q and k normed and rotated.

    layers      [SVDQLinear] of one tile, one per stream, as the lists that follow
    x           [[B, tokens, K]]
    modulation  [scale, shift, ...] [B, 1, K], one pair per stream, of a LayerNorm that goes before the layer; [] where x comes
                modulated
    norms       [weight for q, weight for k, ...] [128], one pair per stream
    rotation    fp32 [tokens of all streams, 64, 2, 2]
    eps         [that of the norms of q and k, of each stream] + [that of the LayerNorm, of each stream]
    """
    return _step("joint_qkv", _joint_qkv, layers, x[0], x, modulation, norms, rotation, eps)


def _joint_qkv(layers, x, modulation, norms, rotation, eps):
    joint, start = x[0].new_empty(len(x[0]), len(rotation), layers[0].linear.out_features), 0
    for i, (layer, rows) in enumerate(zip(layers, x)):
        stop = start + rows.shape[1]
        given = fused.modulated(rows, *modulation[2 * i:2 * i + 2], eps[len(x) + i]) if modulation else rows
        rotations = rotation[start:stop].expand(len(rows), -1, -1, -1, -1)
        layer.run_tiles(fused.qkv_jobs(given, joint[:, start:stop], *norms[2 * i:2 * i + 2], rotations, eps[i]))
        start = stop
    return joint


@torch.library.custom_op("svdq::joint_qkv", mutates_args=())
def _joint_qkv_operator(
        packed: list[torch.Tensor], bias: list[torch.Tensor], lora: list[torch.Tensor | None], text: str, sections: str,
        features: list[int], x: list[torch.Tensor], modulation: list[torch.Tensor], norms: list[torch.Tensor],
        rotation: torch.Tensor, eps: list[float]) -> torch.Tensor:
    return _joint_qkv(_bound(packed, bias, lora, text, sections, features), x, modulation, norms, rotation, eps)


@_joint_qkv_operator.register_fake
def _(packed, bias, lora, text, sections, features, x, modulation, norms, rotation, eps):
    return x[0].new_empty(len(x[0]), rotation.shape[0], features[1])


def stream_end(layers, attn, x, modulation, eps):
    """A stream of a double block after attention [B, tokens, heads * 128]: y + gate2 * MLP(LayerNorm(y), modulated), where
    y = x + gate1 * projection(attn).

    layers      [SVDQLinear]: the projection and the two of the MLP
    modulation  [gate1, scale, shift, gate2] [B, 1, K]
    eps         of the LayerNorm
    """
    return _step("stream_end", _stream_end, layers, x, attn, x, modulation, eps)


def _stream_end(layers, attn, x, modulation, eps):
    projection, first, second = layers
    gate1, scale, shift, gate2 = modulation
    y = torch.empty_like(x)
    fused.gated(projection, attn, y, x, gate1)
    fused.add_mlps(run_together, (first, second, fused.modulated(y, scale, shift, eps), y, gate2))
    return y


@torch.library.custom_op("svdq::stream_end", mutates_args=())
def _stream_end_operator(
        packed: list[torch.Tensor], bias: list[torch.Tensor], lora: list[torch.Tensor | None], text: str, sections: str,
        features: list[int], attn: torch.Tensor, x: torch.Tensor, modulation: list[torch.Tensor], eps: float) -> torch.Tensor:
    return _stream_end(_bound(packed, bias, lora, text, sections, features), attn, x, modulation, eps)


@_stream_end_operator.register_fake
def _(packed, bias, lora, text, sections, features, attn, x, modulation, eps):
    return torch.empty_like(x)


def single_end(layers, attn, x, modulation, eps):
    """x + gate * layer([attn, GELU(MLP(LayerNorm(x), modulated))]): a single block after attention [B, tokens, heads * 128].

    layers      [SVDQLinear]: that of the MLP and the last one, of two column tiles
    modulation  [scale, shift, gate] [B, 1, K]
    eps         of the LayerNorm
    """
    return _step("single_end", _single_end, layers, x, attn, x, modulation, eps)


def _single_end(layers, attn, x, modulation, eps):
    first, last = layers
    scale, shift, gate = modulation
    between = fused.hidden(last, (0, attn.shape[-1]), x)
    first.run_tiles(fused.gelu_jobs(0, fused.modulated(x, scale, shift, eps), between))
    return fused.gated_sum(last, attn, between, x, gate)


@torch.library.custom_op("svdq::single_end", mutates_args=())
def _single_end_operator(
        packed: list[torch.Tensor], bias: list[torch.Tensor], lora: list[torch.Tensor | None], text: str, sections: str,
        features: list[int], attn: torch.Tensor, x: torch.Tensor, modulation: list[torch.Tensor], eps: float) -> torch.Tensor:
    return _single_end(_bound(packed, bias, lora, text, sections, features), attn, x, modulation, eps)


@_single_end_operator.register_fake
def _(packed, bias, lora, text, sections, features, attn, x, modulation, eps):
    return torch.empty_like(x)
