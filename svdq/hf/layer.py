"""Our linear as a module of diffusers' transformer, and rows of it as modules of their own.

    SVDQLinear   `packed` (uint8) and `bias` are parameters, which diffusers and accelerate move, count and offload; `lora`, the
                 bytes of LoRAs, is a plain tensor beside them, which stays where the layer computes
    SVDQRows     a layer that has no bytes: q, k or v of a fused projection, for whoever calls or adapts them one by one

`weight` has the shape, dtype and device of the logical weight and no memory: PEFT places adapters by it. Writing to it fails.

Test: tests/hf/inside/checks_layer.py, tests/hf/inside/checks_kernels.py
"""

import logging
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from ..errors import LoraError
from ..format import pack_tiles, view_layer
from ..kernels import registry
from ..kernels.errors import RangeError
from ..kernels.variant import HALVES, Target, short
from ..kernels.weights import cast, example
from ..layer import BoundLinear, SVDQLayer
from ..lora import LowRank
from ..replaced import is_unhooked
from .operators import Operands, kernels_fuse, linear_of, sections_text

log = logging.getLogger(__name__)


@cache
def _log_once(text):
    log.warning(text)


class Change(NamedTuple):
    """What an adapter does to a layer: W -> (1 + strength (output_scale - 1)) W + low_rank.

    output_scale   fp32 [n] of the rows that low_rank changes, on the CPU; None but for a DoRA
    """
    low_rank: LowRank
    output_scale: torch.Tensor | None = None


class SVDQLinear(SVDQLayer):
    """A quantised linear of a diffusers model.

    text        JSON of its tiles, see format.PackedTiles.description
    adapters    [(PEFT's module around this layer or around rows of it, the first of these rows)]
    merged      [Change] of LoRAs that were fused
    parts       for a fused projection the module that holds its rows, and their names in it; () elsewhere
    stale       whether `adapters` or `merged` have changed since the low-rank branch was written
    training_now  {(row, name)} of adapters that are beside the branch for their gradients
    """

    def __init__(self, in_features, out_features, packed, bias, text):
        super().__init__(in_features, out_features)
        del self._parameters["lora"]
        self.lora, self.sections = None, ""
        self.register_parameter("packed", None)
        self.hold(packed, text)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.adapters, self.merged, self.parts = [], [], ()
        self.stale, self.training_now = False, frozenset()

    def hold(self, packed, text):
        """Take other bytes."""
        self.packed = torch.nn.Parameter(packed, requires_grad=False)
        self.text, self.linear = text, linear_of(text, self.in_features, self.out_features)

    @property
    def weight(self):
        return stand_in(self.bias, self.out_features, self.in_features)

    def keep_lora(self, stored):
        return stored

    # ---- computing

    def forward(self, x, start=0, stop=None):
        """y [..., out_features] of x [..., in_features], or its channels [start, stop)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        foreign = self._foreign_parts() if stop is None else ()
        if foreign:                     # an adapter that is not ours to know is asked for its part
            return torch.cat([part(x) for part in foreign], -1)
        if self.adapters or self.stale:
            if torch.is_grad_enabled() or not torch.compiler.is_compiling():     # else the model's methods have done it
                self._follow_adapters()
        y = self._product(x, [] if stop is None else [start, stop])
        for wrapper, row in self.adapters:
            if start <= row and (stop is None or row < stop):
                y = wrapper.added_beside(x, y, row - start, self.names_in_training(row))
        return y

    def _product(self, x, rows):
        self._bring_lora(x.device)
        bias = (self.bias[slice(*rows)] if rows else self.bias).to(x.dtype)
        if rows or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.ops.svdq.linear(x, self.packed, bias, self.lora, self.text, self.sections,
                                         [self.in_features, self.out_features], rows)
        return self.linear.forward(x, self.packed, bias, self.stored_lora(x.device))

    def fuses(self, x, places):
        """Whether tiles of this layer do what calling it does, with any epilogue in their kernels, see SVDQLayer.fuses."""
        return (not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type) and is_unhooked(self)
                and not self._foreign_parts()
                and not any(any(wrapper.lora_bias.values()) or set(wrapper.lora_A) - wrapper.loaded
                            for wrapper, _ in self.adapters)
                and self.packed.device == x.device
                and kernels_fuse(self.text, self.in_features, self.out_features, x.device, x.dtype, places)
                and self._fits_now())

    def _fits_now(self):
        if (self.adapters or self.stale) and not torch.compiler.is_compiling():
            self._follow_adapters()
        return self.lora_fits_in_branch

    def bound(self, x):
        """The layer with its tensors of now, for an x."""
        self._bring_lora(x.device)
        return BoundLinear(self.linear, self.packed, self.bias.to(x.dtype), self.stored_lora(x.device))

    def operands(self, x):
        """The same for operators."""
        self._bring_lora(x.device)
        return Operands(self.packed, self.bias.to(x.dtype), self.lora, self.text, self.sections,
                        (self.in_features, self.out_features))

    def _bring_lora(self, device):
        """Of a layer that is offloaded: LoRAs stay where it computes."""
        if self.lora is not None and self.lora.device != device:
            self.lora = self.lora.to(device)

    def _foreign_parts(self):
        """The modules of the rows, where one of them is neither bare nor adapted by ours; else ()."""
        if not self.parts:
            return ()
        holder, names = self.parts
        found = [holder._modules[name] for name in names]
        return () if all(getattr(part, "follows_svdq", False) for part in found) else found

    # ---- adapters

    def _follow_adapters(self):
        """Have in the branch what adapters say now. Those in training are beside it, as their numbers change all the time."""
        for wrapper, _ in self.adapters:
            if wrapper.disable_adapters and wrapper.merged:         # as PEFT does in its forward
                wrapper.unmerge()
        training = frozenset((row, name) for wrapper, row in self.adapters for name in wrapper.training_now) \
            if torch.is_grad_enabled() else frozenset()
        self.stale = self.stale or training != self.training_now or any(wrapper.written for wrapper, _ in self.adapters)
        self.training_now = training
        if self.stale:
            self.adopt()
            if self.stale:
                raise LoraError("the numbers of a LoRA are not in memory while the model is offloaded. Load it before "
                                "offloading is enabled, or by the pipeline's load_lora_weights")

    def adopt(self):
        """Write the LoRAs of now into the low-rank branch. Where numbers are not in memory, `stale` remains and a later call
        will."""
        self.stale = True
        if self.packed.is_meta or any(wrapper.unreachable for wrapper, _ in self.adapters):
            return
        changes = list(self.merged)
        for wrapper, row in self.adapters:
            changes += wrapper.changes(row, self.names_in_training(row))
        with torch.no_grad():
            self.use_lora([change.low_rank for change in changes], self._output_scale(changes))
        self.sections = "" if self.factors is None else sections_text(self.factors.sections)
        self.stale = False

    def empty_branch(self):
        """The bytes are others, with which a branch begins: it is written anew when it is needed next."""
        self.use_lora()
        self.sections, self.stale = "", bool(self.adapters or self.merged)

    def names_in_training(self, row):
        return [name for where, name in self.training_now if where == row]

    def _output_scale(self, changes):
        """fp32 [out_features] or None: what DoRAs make of the rows they scale, each beside the others."""
        scaling = [change for change in changes if change.output_scale is not None]
        if not scaling:
            return None
        total = torch.ones(self.out_features)
        for low_rank, scale in scaling:
            total[low_rank.row:low_rank.row + len(scale)] += low_rank.strength * (scale - 1)
        return total

    # ---- where the bytes are

    def _apply(self, fn, recurse=True):
        before = self.packed.device, self.bias.dtype
        super()._apply(fn, recurse)
        if self.lora is not None:
            self.lora = fn(self.lora)
        if self.packed.device.type == "cuda" and (self.packed.device, self.bias.dtype) != before:
            self.repack()
        return self

    def repack(self):
        """Bring the bytes into the order that the best kernels of their device read, for x of the layer's dtype."""
        dtype, target = self.bias.dtype, Target.of(self.packed.device)
        tiles = before = view_layer(self.packed.detach(), self.linear.description)
        if dtype in HALVES and any(tile.weight.dtype != dtype for tile in tiles):
            try:
                tiles = [replace(tile, weight=cast(tile.weight.unpack(), dtype)) for tile in tiles]
            except RangeError as error:
                _log_once(f"SVDQ: a layer of {self.in_features} inputs and {self.out_features} outputs stays in "
                          f"{short(tiles[0].weight.dtype)}, as {short(dtype)} has not all its numbers: {error}")
        plans = [registry.plan(example(tile.weight.precision, tile.weight.dtype), target, dtype, self.act_bits, repack=True)
                 for tile in tiles]
        if tiles is before and all(plan.variant.reads(tile.weight) for plan, tile in zip(plans, tiles)):
            return
        self.hold(*repacked(tiles, dtype, self.act_bits))
        self.empty_branch()

    # ---- in a state dict, where what the bytes mean goes with them

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        getattr(destination, "_metadata", {}).get(prefix[:-1], {})["svdq"] = self.text

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *more):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)
        text, given = local_metadata.get("svdq", self.text), state_dict.get(f"{prefix}packed")
        if given is not None and "svdq" not in local_metadata:
            _log_once("SVDQ: a state dict without the metadata that model.state_dict() gives it: nothing says which 16-bit "
                      "dtype the scales in its bytes have, so they are taken to be as in the model. Where pictures come out "
                      "wrong, load the file instead, in the dtype that the model is to compute in")
        if text != self.text and given is not None and given.shape == self.packed.shape:
            self.hold(self.packed.data, text)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={self.packed.numel()}"


def fusing_layer(module, x, places=((0, 0),)):
    """The SVDQLinear whose tiles, beginning at these (row, col), do with any epilogue what calling a module does: it, or
    PEFT's around it. None where somebody would notice, or where kernels do not."""
    if getattr(module, "follows_svdq", False) and is_unhooked(module):
        module = module._modules.get("base_layer")
    return module if type(module) is SVDQLinear and module.fuses(x, places) else None


def repacked(tiles, dtype, act_bits):
    """(bytes, text) of tiles in the order that the kernels of their device read."""
    packed = pack_tiles([replace(tile, weight=registry.pack(tile.weight.unpack(), dtype, act_bits)) for tile in tiles])
    return packed.stored.to(tiles[0].weight.device), packed.description(act_bits=act_bits)


class SVDQRows(torch.nn.Linear):
    """Rows [start, start + out_features) of a fused layer, which has the bytes."""
    follows_svdq = True

    def __init__(self, fused, start, out_features):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.start = fused.in_features, out_features, start
        self.__dict__["fused"] = fused              # not as a child: it is another module's
        self.register_parameter("bias", None)

    @property
    def weight(self):
        return stand_in(self.fused.bias, self.out_features, self.in_features)

    def forward(self, x):
        return self.fused(x, self.start, self.start + self.out_features)


def stand_in(bias, n, k):
    """[n, k] of a bias's dtype and device, in the memory of one number: NaN, so that whoever computes with it finds out."""
    return bias.new_full((1,), torch.nan).expand(n, k)
