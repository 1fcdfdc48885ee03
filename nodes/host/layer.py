"""SVDQLinear: the layer ComfyUI's own Flux is built from.

A layer is a list of tiles, rectangles of the logical weight, whose packed tensors all lie in one byte tensor called
`weight`. ComfyUI moves, pins, counts and streams exactly `weight` and `bias`, so offloading is its business alone.
Layers the checkpoint does not quantise use the same class with a float weight.
"""

import json

import comfy.lora
import comfy.ops
import torch

from ...kernels import ops
from ...svdq.format import view_layer


class SVDQLinear(torch.nn.Linear, comfy.ops.CastWeightBiasOp):
    """A linear layer whose weight is packed bytes (or plain floats), loaded from a ComfyUI state dict.

    weight   uint8 [bytes]; plain layers: float [out_features, in_features]
    bias     float [out_features] or None
    svdq     uint8 buffer: JSON text of the tiles in `weight`; None on plain layers
    patches  ComfyUI's patch list for `weight`, or None; while set, the layer computes with dense weights
    """
    comfy_cast_weights = True

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        torch.nn.Module.__init__(self)          # allocates nothing: a 12B model is built in a moment
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("svdq", None)
        self.dtype = dtype if dtype in ops.FLOATS else None         # None: plain weights stay as the file has them
        self.description = None
        self.patches, self.key = None, None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        weight, bias, svdq = (state_dict.get(prefix + name) for name in ("weight", "bias", "svdq"))
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        if svdq is not None:
            self.description = json.loads(bytes(svdq.tolist()))
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{prefix}weight is {list(weight.shape)}; needs [{self.out_features}, {self.in_features}]")
            return
        else:
            weight = weight.to(self.dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.svdq = svdq

    @property
    def quantised(self):
        return self.description is not None

    @torch.compiler.disable         # Dynamo would trace the unpacking anew for every layer, which takes minutes
    def forward(self, x):
        comfy.ops.run_every_op()                # lets the user interrupt between two layers
        if not self.quantised:
            weight, bias, release = self._cast(x.device, x.dtype, x.dtype)
            y = torch.nn.functional.linear(x, weight, bias)
            release()
            return y
        hooks, self.weight_function = self.weight_function, []      # they expect numbers, not packed bytes
        try:
            weight, bias, release = self._cast(x.device, torch.uint8, x.dtype)
        finally:
            self.weight_function = hooks
        if hooks or self.patches:
            y = self._dense_forward(x, weight, bias, hooks)
        else:
            y = self._packed_forward(x, weight, bias)
        release()
        return y

    def _cast(self, device, weight_dtype, bias_dtype):
        """weight and bias on `device`, and what to call when done with them."""
        weight, bias, stream = comfy.ops.cast_bias_weight(self, dtype=weight_dtype, device=device, bias_dtype=bias_dtype,
                                                          offloadable=True)
        return weight, bias, lambda: comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def _packed_forward(self, x, weight, bias):
        flat = x.reshape(-1, self.in_features)
        out = flat.new_empty(len(flat), self.out_features)
        for tile in view_layer(weight, self.description):
            n, k = tile.weight.shape
            rows = slice(tile.row, tile.row + n)
            first = tile.col == 0               # of the tiles that share these rows: it brings the bias, others add to it
            ops.linear(flat[:, tile.col:tile.col + k], tile.weight, out[:, rows],
                       bias[rows] if first and bias is not None else None, accumulate=not first)
        return out.view(*x.shape[:-1], self.out_features)

    def _dense_forward(self, x, weight, bias, hooks):
        """For whoever changes weights as numbers: patches that are not in the low-rank branch, weight wrappers."""
        dense, shift = self.dense(weight)
        if self.patches:
            dense = comfy.lora.calculate_weight(self.patches, dense, self.key)
        dense = dense.to(x.dtype)
        for hook in hooks:
            dense = hook(dense)
        y = torch.nn.functional.linear(x, dense, bias)
        return y.add_(shift.to(x.dtype))

    def dense(self, weight):
        """(W fp32 [out, in], bias fp32 [out] the shift adds) equivalent to these bytes with unquantised activations."""
        dense = torch.zeros(self.out_features, self.in_features, device=weight.device)
        shift = torch.zeros(self.out_features, device=weight.device)
        for tile in view_layer(weight, self.description):
            part, extra = ops.dequantize(tile.weight)
            rows, cols = (slice(at, at + size) for at, size in zip((tile.row, tile.col), part.shape))
            dense[rows, cols] = part
            shift[rows] += extra
        return dense, shift

    def convert_weight(self, weight, inplace=False, **kwargs):
        """ComfyUI asks for numbers, for instance to merge from this model. The bytes may come as any dtype."""
        return self.dense(weight.to(torch.uint8))[0] if self.quantised else weight

    @property
    def shifted(self):
        """Whether a tile shifts its activations, which adds a constant to the output."""
        return self.quantised and any(tile.get("unsigned") for tile in self.description["tiles"])

    def bias_with_shift(self, bias, **kwargs):
        return bias + self.dense(self.weight)[1].to(bias)


class SVDQOps(comfy.ops.manual_cast):
    """The operations ComfyUI builds an SVDQ model with."""
    Linear = SVDQLinear
