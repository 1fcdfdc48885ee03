"""What can be done to the input of a linear before it is quantised: in the quantiser's kernel where it can, in torch elsewhere.

Spec: reference.py. Test: tests/unit/test_prologues.py
"""

from dataclasses import dataclass

import torch

from . import reference


@dataclass(frozen=True, eq=False)
class Modulated:
    """LayerNorm(x) * (1 + scale) + shift, in the place of an x [tokens, K]. Spec: reference.modulated

    x             [B * tokens of an item, K]  bf16 | fp16 | fp32      any strides
    scale, shift  [B, K]                      x.dtype                 any strides
    eps           float

    Layers that get the same object can share what is read and computed of it: Variant.prepared.
    """
    x: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    eps: float = 1e-6

    device = property(lambda self: self.x.device)
    dtype = property(lambda self: self.x.dtype)

    def __len__(self):
        return len(self.x)

    @property
    def rows_per_item(self):
        return len(self.x) // max(len(self.scale), 1)

    def of(self):
        """The x [tokens, K] that layers multiply, in torch."""
        rows = self.x.unflatten(0, (len(self.scale), self.rows_per_item))
        return reference.modulated(rows, self.scale, self.shift, self.eps).flatten(0, 1)

    def problem(self):
        """What is wrong with the operands and what they need, or None."""
        x, items = self.x, len(self.scale) if self.scale.ndim else 0
        if x.ndim != 2 or not x.is_floating_point():
            return f"x is {list(x.shape)} {x.dtype}. Needs [tokens, K], floating point."
        for name, tensor in (("scale", self.scale), ("shift", self.shift)):
            if tensor.shape != (items, x.shape[1]) or tensor.dtype != x.dtype or tensor.device != x.device:
                return (f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}. "
                        f"Needs [items, {x.shape[1]}] {x.dtype} on {x.device}, scale and shift of as many items.")
        if not items or len(x) % items:
            return f"x has {len(x)} rows for {items} items. Needs as many rows for each item."
        return None


def plain(x):
    """The tensor that an x is: itself, or what a Modulated makes."""
    return x.of() if isinstance(x, Modulated) else x
