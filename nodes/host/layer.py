"""SVDQLinear: the layer ComfyUI's own Flux is built from.

A layer is a list of tiles, rectangles of the logical weight, whose packed tensors all lie in one byte tensor called
`weight`. ComfyUI moves, pins, counts and streams exactly `weight` and `bias`, so offloading is its business alone.
Layers the checkpoint does not quantise use the same class with a float weight.
"""

import functools
import json
from dataclasses import replace

import comfy.model_management
import comfy.ops
import torch

from ...kernels import ops, weights
from ...svdq.format import view_layer
from ...svdq.lora import LoraFactors


class SVDQLinear(torch.nn.Linear, comfy.ops.CastWeightBiasOp):
    """A linear layer whose weight is packed bytes (or plain floats), loaded from a ComfyUI state dict.

    weight   uint8 [bytes]; plain layers: float [out_features, in_features]
    bias     float [out_features] or None
    svdq     uint8 buffer: JSON text of the tiles in `weight`; None on plain layers
    lora     uint8 [bytes] or None: the low-rank branch with LoRAs in it, as `factors` (svdq.lora.LoraFactors) tells. A
             parameter of its own: weight stays as it is, and ComfyUI moves and counts both
    """
    comfy_cast_weights = True

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        torch.nn.Module.__init__(self)          # allocates nothing: a 12B model is built in a moment
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_parameter("lora", None)
        self.register_buffer("svdq", None)
        self.dtype = dtype if dtype in ops.FLOATS else None         # None: plain weights stay as the file has them
        self.description = None
        self.factors, self._parked = None, None

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
            weight, bias = weight.to(self.dtype), None if bias is None else bias.to(self.dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.svdq = svdq

    @property
    def quantised(self):
        return self.description is not None

    @functools.cached_property
    def tiles(self):
        """The tiles without their numbers, for whoever asks for shapes."""
        return view_layer(torch.empty_like(self.weight, device="meta"), self.description)

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
        y = self._packed_forward(x, weight, bias) if not hooks else self._dense_forward(x, weight, bias, hooks)
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
        tiles, scale, constant = self._tiles(weight)
        early = bias if scale is None else None
        for part in tiles:
            tile, (n, k) = part[0], part[0].weight.shape
            self._product(part, flat[:, tile.col:tile.col + k], out[:, tile.row:tile.row + n], early)
        if scale is not None:                   # which is not for the bias
            out.mul_(scale).add_(constant if bias is None else constant + bias)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, part, x, out, bias, epilogue=None):
        """One of the _tiles: x [tokens, its columns] -> out [tokens, its rows]."""
        tile, down, up = part
        first = tile.col == 0                   # of the tiles that share these rows: it brings the bias, others add to it
        bias = bias[tile.row:tile.row + tile.weight.shape[0]] if first and bias is not None else None
        ops.linear(x, tile.weight, out, bias, accumulate=not first, act_bits=self.description.get("act_bits"),
                   epilogue=epilogue)
        if down is not None:
            ops.add_low_rank(x, down, up, out)

    @torch.compiler.disable
    def into(self, products):
        """Products of single tiles, in this order and with one transfer of the weights where the layer is offloaded.

        products   [(index of the tile, x [tokens, its columns], out [tokens, its rows], epilogue)], see kernels.ops.linear

        For quantised layers without weight_function that `ends_with_products`: an epilogue is the last to touch out.
        """
        comfy.ops.run_every_op()
        x = products[0][1]
        weight, bias, release = self._cast(x.device, torch.uint8, x.dtype)
        tiles, _, _ = self._tiles(weight)
        for at, x, out, epilogue in products:
            self._product(tiles[at], x, out, bias, epilogue)
        release()

    @property
    def ends_with_products(self):
        """Whether LoRAs leave nothing to do after the kernels: none beside them, none that scales the output."""
        return self.factors is None or self.factors.rows is None and not any(
            "down" in sections for sections in self.factors.sections)

    def _tiles(self, weight):
        """([(tile, down, up)], scale, constant): LoRAs are in the branch of each tile, in a plain pair where they do not
        fit, and in what follows the product, see LoraFactors.view_rows."""
        tiles = view_layer(weight, self.description)
        if self.factors is None:
            return [(tile, None, None) for tile in tiles], None, None
        lora, device = self.lora, weight.device
        if lora.device != device:               # the layer is offloaded
            lora = comfy.model_management.cast_to(
                lora, device=device, non_blocking=comfy.model_management.device_supports_non_blocking(device))
        extended = []
        for tile, branch in zip(tiles, self.factors.view(lora)):
            if branch.proj_down is not None:
                tile = replace(tile, weight=replace(tile.weight, proj_down=branch.proj_down, proj_up=branch.proj_up))
            extended.append((tile, branch.down, branch.up))
        return extended, *self.factors.view_rows(lora)

    def _dense_forward(self, x, weight, bias, hooks):
        """For whoever changes weights as numbers: weight wrappers of other nodes."""
        tiles, scale, _ = self._tiles(weight)
        dense, shift = self._dense(tiles)
        if scale is not None:
            dense *= scale[:, None]
        dense = dense.to(x.dtype)
        for hook in hooks:
            dense = hook(dense)
        y = torch.nn.functional.linear(x, dense, bias)
        return y.add_(shift.to(x.dtype))

    def dense(self, weight):
        """(W fp32 [out, in], bias fp32 [out] the shift adds) equivalent to these bytes with unquantised activations and
        without LoRA."""
        return self._dense([(tile, None, None) for tile in view_layer(weight, self.description)])

    def _dense(self, tiles):
        device = tiles[0][0].weight.qweight.device
        dense = torch.zeros(self.out_features, self.in_features, device=device)
        shift = torch.zeros(self.out_features, device=device)
        for tile, down, up in tiles:
            part, extra = weights.dequantize(tile.weight)
            rows, cols = (slice(at, at + size) for at, size in zip((tile.row, tile.col), part.shape))
            dense[rows, cols] = part if down is None else part.addmm_(up.float(), down.float())
            shift[rows] += extra
        return dense, shift

    def uses_lora(self, changes=(), rows=None):
        """Whether these LoRAs, with their strengths of now, and no others are in the low-rank branch."""
        if self.factors is None:
            return not changes and rows is None and self._parked is None
        return self.factors.rows is rows and self.factors.same(changes)

    def use_lora(self, changes=(), rows=None):
        """Put these LoRAs into the low-rank branch instead of those that are there. changes, rows: see LoraFactors.

        Where only strengths differ from the last time, only what depends on them is written.
        """
        factors, stored = (self.factors, self.lora) if self._parked is None else self._parked
        self.factors = self.lora = self._parked = None
        if not changes and rows is None:
            return
        with torch.inference_mode(False):       # so that strengths can be written in and out of ComfyUI's inference mode
            if factors is None or factors.rows is not rows or not factors.rescale(stored, changes):
                tiles = view_layer(self.weight, self.description)
                factors = LoraFactors(tiles, changes, rows)
                stored = torch.nn.Parameter(factors.store(tiles), requires_grad=False)
        self.factors, self.lora = factors, stored

    def park_lora(self):
        """Compute without LoRA from now on, but keep the factors at hand: the next use_lora may want them."""
        if self.factors is not None:
            self._parked = self.factors, self.lora
            self.factors = self.lora = None

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
