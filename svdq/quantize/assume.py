"""What the layers are probably fed, from the weights alone: the data-free mode.

Everything a modulation does depends on timestep, guidance and pooled text only, and the model's own small layers say how;
what follows a linear can be computed from assumed inputs of it. What stays unknown is the residual stream itself: each
token's LayerNorm is taken as Gaussian, louder where the weights that read a channel are small, which is how trained
networks make up for loud channels. For drafts; captured statistics are better.

Test: tests/unit/test_quantize.py
"""

import math

import torch

from ...kernels.reference import gelu_tanh
from ..statistics import LayerStatistics

TOKENS = 192
TIMES, GUIDANCES = 64, (1.0, 2.5, 3.5, 5.0)
SPREAD_OF_ATTENTION = 0.5       # of averaged values against single ones


class Assumed:
    """layer(name) -> LayerStatistics of one of the layers of a source, computed when asked for."""

    def __init__(self, source, seed=0, device="cpu"):
        self.source, self.shape, self.seed, self.device = source, source.shape, seed, torch.device(device)
        wanted = ("time_in", "vector_in", "guidance_in")
        modules = {name: tensor.float().cpu() for name, tensor in source.plain() if name.startswith(wanted)}
        self.vec = torch.nn.functional.silu(self._vectors(modules)).to(device)

    def _vectors(self, modules):
        """vec for every combination of timestep and guidance, each with a random pooled text: [TIMES * 4, hidden]."""
        times = (torch.arange(TIMES) + 0.5) / TIMES
        times, guidance = (axis.flatten() for axis in torch.meshgrid(times, torch.tensor(GUIDANCES), indexing="ij"))
        pooled = torch.randn(len(times), self.shape.vec_dim, generator=self._random("vec"))
        total = _mlp(modules, "time_in", _embedding(times)) + _mlp(modules, "vector_in", pooled)
        return total + _mlp(modules, "guidance_in", _embedding(guidance)) if self.shape.guidance else total

    def _random(self, name):
        return torch.Generator().manual_seed(self.seed + sum(map(ord, name)))

    def __getitem__(self, layer):
        block, _, part = layer.partition(".")[2].partition(".")
        prefix = f"{layer.partition('.')[0]}.{block}."
        if part.endswith(("_mod.lin", "modulation.lin")):
            return _describe(self.vec[self._order(layer)])
        if layer.startswith("single_blocks."):
            if part == "linear1":
                return _describe(self._modulated(f"{prefix}modulation.lin", 0, layer))
            h, first = self.shape.hidden, f"{prefix}linear1"
            x = self._modulated(f"{prefix}modulation.lin", 0, first)
            weight, bias = self._linear(first)
            return _describe(torch.cat((_averaged(x @ weight[2 * h:3 * h].t() + bias[2 * h:3 * h]),
                                        gelu_tanh(x @ weight[3 * h:].t() + bias[3 * h:])), 1))
        stream, part = part[:3], part[4:]
        modulation, qkv, fc1 = (f"{prefix}{stream}_{name}" for name in ("mod.lin", "attn.qkv", "mlp.0"))
        if part == "attn.qkv":
            return _describe(self._modulated(modulation, 0, qkv))
        if part == "mlp.0":
            return _describe(self._modulated(modulation, 3, fc1))
        if part == "attn.proj":
            weight, bias = self._linear(qkv)
            h = self.shape.hidden
            return _describe(_averaged(self._modulated(modulation, 0, qkv) @ weight[2 * h:].t() + bias[2 * h:]))
        weight, bias = self._linear(fc1)
        return _describe(gelu_tanh(self._modulated(modulation, 3, fc1) @ weight.t() + bias))

    def _linear(self, layer):
        weight, bias = self.source.layer(layer)
        weight = weight.to(self.device).float()
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.to(self.device).float()

    def _order(self, name):
        """Which vectors the tokens of a layer belong to."""
        return torch.randint(len(self.vec), (TOKENS,), generator=self._random(name)).to(self.device)

    def _modulated(self, modulation, chunk, reader):
        """Tokens of LN(h) (1 + scale) + shift; chunk is the index of the shift, reader the linear they go to."""
        h = self.shape.hidden
        weight, bias = self._linear(modulation)
        rows = slice(chunk * h, (chunk + 2) * h)
        shift, scale = (self.vec[self._order(reader)] @ weight[rows].t() + bias[rows]).chunk(2, 1)
        norms = self._linear(reader)[0].square().mean(0)
        loud = (norms.mean() / norms.clamp(min=1e-3 * float(norms.mean()) + 1e-30)).pow(0.25)
        normal = torch.randn(TOKENS, h, generator=self._random(reader)).to(self.device) * loud
        return normal * (1 + scale) + shift


def _mlp(modules, name, x):
    hidden = torch.nn.functional.silu(x @ modules[f"{name}.in_layer.weight"].t() + modules[f"{name}.in_layer.bias"])
    return hidden @ modules[f"{name}.out_layer.weight"].t() + modules[f"{name}.out_layer.bias"]


def _embedding(times, size=256):
    """Sinusoids of 1000 t, as FLUX embeds timestep and guidance."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(size // 2) / (size // 2))
    angles = 1000 * times[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1)


def _averaged(values):
    """What attention makes of values: the mean stays, the rest shrinks."""
    mean = values.mean(0)
    return mean + SPREAD_OF_ATTENTION * (values - mean)


def _describe(tokens):
    return LayerStatistics(tokens.mean(0), tokens.square().mean(0), tokens.abs().amax(0), tokens)
