"""A packed linear as an operator of torch: opaque to torch.compile, with the gradients of its input and bias.

Everything a layer is stands in the arguments, so that whoever copies, saves or traces a model needs to know nothing of us:

    packed    uint8 [bytes]            bias   [out_features] of x's dtype, or None          lora   uint8 [bytes] or None
    text      JSON of format.PackedTiles.description
    sections  JSON of the LoRAs' sections, see sections_text; "" without
    features  [in, out] of the whole layer
    rows      [start, stop) of its output, of layers of one tile; [] for all

Test: tests/hf/inside/checks_layer.py
"""

import json
from functools import lru_cache

import torch

from ..kernels.epilogues import QKV
from ..layer import PackedLinear, StoredLora
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
def kernels_do_epilogues(text, in_features, out_features, device, dtype):
    """See PackedLinear.kernels_do_epilogues; asked once while a model is traced."""
    return linear_of(text, in_features, out_features).kernels_do_epilogues(torch.empty(0, dtype=dtype, device=device))


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


@torch.library.custom_op("svdq::qkv", mutates_args=())
def qkv(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, lora: torch.Tensor | None, text: str, sections: str,
        features: list[int], query: torch.Tensor, key: torch.Tensor, rotation: torch.Tensor, eps: float) -> torch.Tensor:
    """q, k, v [batch, tokens, 3 * heads * 128] of x [batch, tokens, in_features], q and k normed and rotated: epilogues.QKV.
    For layers of one tile whose LoRAs fit in the branch."""
    this = linear_of(text, *features)
    out = x.new_empty(*x.shape[:-1], features[1])
    jobs = [(0, rows, part, QKV(query, key, rotation, eps)) for rows, part in zip(x, out)]
    this.run_tiles(jobs, packed, bias, stored_lora(lora, sections))
    return out


@qkv.register_fake
def _(x, packed, bias, lora, text, sections, features, query, key, rotation, eps):
    return x.new_empty(*x.shape[:-1], features[1])
