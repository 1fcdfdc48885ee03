"""SVDQLinear: the layer ComfyUI's own Flux is built from.

What it computes is svdq/layer.py's. Here is how it lives in ComfyUI, which moves, pins, counts and streams exactly `weight`
and `bias`, so that offloading is ComfyUI's business alone. Layers the checkpoint does not quantise use the same class with a
float weight.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import comfy.model_management
import comfy.ops
import comfy_aimdo.model_vbar
import torch
from torch.utils.checkpoint import checkpoint

from ...svdq.kernels.variant import FLOATS
from ...svdq.layer import BoundLinear, Hidden, SVDQLayer, forward_all, run_together


class Borrowed(NamedTuple):
    """What ComfyUI gave of a layer for a while.

    weight, bias   where x is
    kept           whether they stay what they are until they are given back, whatever is borrowed meanwhile, where they are in
                   any case: ComfyUI streams layers that have no place on the GPU through a buffer, one after the other, or
                   makes copies, which must not all be there at once
    release        () -> None gives them back
    """
    weight: torch.Tensor
    bias: torch.Tensor | None
    kept: bool
    release: Callable


class SVDQLinear(SVDQLayer, comfy.ops.CastWeightBiasOp):
    """A linear layer whose weight is packed bytes (or plain floats), loaded from a ComfyUI state dict.

    weight   uint8 [bytes]; plain layers: float [out_features, in_features]
    bias     float [out_features] or None
    svdq     uint8 buffer: JSON text of the tiles in `weight`; None on plain layers
    lora     uint8 [bytes] or None: the low-rank branch with LoRAs in it, as `factors` (svdq.lora.LoraFactors) tells. A
             parameter of its own: weight stays as it is, and ComfyUI moves and counts both
    """
    comfy_cast_weights = True
    packed = property(lambda self: self.weight, doc="The byte tensor of a quantised layer where it rests.")

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features)
        self.register_parameter("weight", None)
        self.register_buffer("svdq", None)
        self.dtype = dtype if dtype in FLOATS else None             # None: plain weights stay as the file has them

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        weight, bias, svdq = (state_dict.get(prefix + name) for name in ("weight", "bias", "svdq"))
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        if svdq is not None:
            self.describe(json.loads(bytes(svdq.tolist())))
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{prefix}weight is {list(weight.shape)}; needs [{self.out_features}, {self.in_features}]")
            return
        else:
            weight, bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.svdq = svdq

    @torch.compiler.disable         # Dynamo would trace the unpacking anew for every layer, which takes minutes
    def forward(self, x):
        comfy.ops.run_every_op()                # lets the user interrupt between two layers
        if not self.quantised:
            weight, bias, _, release = self._cast(x.device, x.dtype, x.dtype)
            y = torch.nn.functional.linear(x, weight, bias)
            release()
            return y
        if self.weight_function:                # of other nodes, which change weights as numbers
            if not torch.is_grad_enabled():
                return self._forward_dense(x)
            return checkpoint(self._forward_dense, x, use_reentrant=False)      # keeps no weights as numbers
        weight, bias, _, release = self.borrow(x.device, x.dtype)
        trains = torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
        y = (self.forward_for_training if trains else self.forward_packed)(x, weight, bias)
        release()
        return y

    def run_tiles(self, jobs):
        """SVDQLinear.run_together of this one."""
        self.run_together([(self, jobs)])

    @staticmethod
    @torch.compiler.disable
    def run_together(layers):
        """Products of single tiles of layers, one after the other, see svdq.layer.run_together, with one transfer of the
        weights where a layer is offloaded; what kernels make of their inputs comes in as few launches as the places of their
        bytes allow.

        layers   [(layer, jobs)] without weight_function
        """
        jobs, x = dict(layers), layers[0][1][0][1]
        for held in _borrow_all(jobs, x.device, x.dtype):
            parts = [(layer._bound(it), jobs[layer]) for layer, it in held]
            _lend_to([out for _, those in parts for _, _, out, _ in those if isinstance(out, Hidden)], held)
            run_together(parts)

    @staticmethod
    @torch.compiler.disable
    def forward_all(layers, x):
        """[layer(x)] of quantised layers without weight_function that read one x, in as few launches as their kernels and the
        places of their bytes allow."""
        return [out for held in _borrow_all(layers, x.device, x.dtype)
                for out in forward_all(x, [layer._bound(it) for layer, it in held])]

    def _bound(self, it):
        return BoundLinear(self.linear, it.weight, it.bias, self.stored_lora(it.weight.device))

    def hidden(self, place, rows, like):
        """See SVDQLayer.hidden. Where ComfyUI has the layer in its memory bar run_together lends the bytes."""
        made = super().hidden(place, rows, like)
        made.to = self, place
        return made

    def borrow(self, device, dtype):
        """The Borrowed of a quantised layer on a device; the bias in x's dtype."""
        return self._cast(device, torch.uint8, dtype)

    def _cast(self, device, weight_dtype, bias_dtype):
        weight, bias, offload = comfy.ops.cast_bias_weight(self, dtype=weight_dtype, device=device, bias_dtype=bias_dtype,
                                                           offloadable=True)
        _, place, _ = offload or (None, None, None)             # place: the device, where it is pinned in ComfyUI's memory bar
        kept = weight is self.weight or place is not None and not isinstance(place, torch.Tensor)
        return Borrowed(weight, bias, kept, lambda: comfy.ops.uncast_bias_weight(self, weight, bias, offload))

    @contextmanager
    def borrowed(self, device):
        weight, _, _, release = self.borrow(device, torch.float32)
        try:
            yield weight
        finally:
            release()

    def _forward_dense(self, x):
        hooks, self.weight_function = self.weight_function, []      # they expect numbers, not packed bytes
        try:
            weight, bias, _, release = self.borrow(x.device, x.dtype)
        finally:
            self.weight_function = hooks
        with torch.no_grad():
            dense, shift = self.dense_with_lora(weight)
        dense = dense.to(x.dtype)
        for hook in hooks:
            dense = hook(dense)
        y = torch.nn.functional.linear(x, dense, bias)
        release()
        return y.add_(shift.to(y.dtype))

    def lora_on(self, device):
        if self.lora.device == device:
            return self.lora
        return comfy.model_management.cast_to(             # the layer is offloaded
            self.lora, device=device, non_blocking=comfy.model_management.device_supports_non_blocking(device))

    def convert_weight(self, weight, inplace=False, **kwargs):
        """ComfyUI asks for numbers, for instance to merge from this model. The bytes may come as any dtype."""
        return self.dense(weight.to(torch.uint8))[0] if self.quantised else weight

    def bias_with_shift(self, bias, **kwargs):
        return bias + self.dense(self.weight)[1].to(bias)


def _borrow_all(layers, device, dtype):
    """Lists of (layer, Borrowed), which are given back when the next one is asked for, with what is added to them: as many
    layers at once as ComfyUI keeps, and one more, since nothing is borrowed after it."""
    held = []
    try:
        for layer, is_last in zip(layers, [False] * (len(layers) - 1) + [True]):
            if not held:
                comfy.ops.run_every_op()        # lets the user interrupt between two layers
            held.append((layer, layer.borrow(device, dtype)))
            if is_last or not held[-1][1].kept:
                yield held
                while held:
                    held.pop()[1].release()
    finally:
        for _, it in held:                      # after an error
            it.release()


def _has_room(layer):
    return comfy_aimdo.model_vbar.vbar_fault(layer._v) is not None


def _lend_to(hiddens, held):
    """Give each Hidden that has none the bytes of the layer that it goes to, until those `held` are given back: of layers that
    are in ComfyUI's memory bar or have room there. To stream others for this alone would cost more than it saves."""
    if not all(it.kept for _, it in held):      # its buffer may be the one that is needed
        return
    lent = {}
    for hidden in hiddens:
        if hidden.following is None and hasattr(hidden.to[0], "_v"):
            layer, place = hidden.to
            if layer not in lent:
                lent[layer] = layer.borrow(hidden.device, hidden.dtype) if _has_room(layer) else None
                if lent[layer] is not None:
                    held.append((layer, lent[layer]))
            if lent[layer] is not None:
                hidden.following = layer._bound(lent[layer]).following(place, hidden)


class SVDQOps(comfy.ops.manual_cast):
    """The operations ComfyUI builds an SVDQ model with."""
    Linear = SVDQLinear
