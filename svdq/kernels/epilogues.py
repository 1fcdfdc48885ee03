"""What can be done to the output of a linear before it is stored: in the kernel where it can, in torch after it elsewhere.

Spec: reference.py. Test: tests/unit/test_ops.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from . import reference
from .rows import overlaps


@dataclass(frozen=True)
class Gelu:
    """gelu_tanh(y). Spec: reference.gelu_tanh"""
    accumulates: ClassVar[bool] = False     # whether kernels add what `out` held to y

    def of(self, y):
        """The epilogue of y [tokens, N] in torch: fp32 [tokens, N]."""
        return reference.gelu_tanh(y)

    def problem(self, out, accumulate):
        """What is wrong with the operands for this out and what they need, or None."""


@dataclass(frozen=True)
class Gated:
    """residual + gate * y. Spec: reference.gate_residual

    residual  [tokens, N]  x.dtype      any strides; may be `out` itself, but not with accumulate
    gate      [N]          x.dtype      contiguous
    """
    residual: torch.Tensor
    gate: torch.Tensor
    accumulates: ClassVar[bool] = True

    def of(self, y):
        return reference.gate_residual(y, self.residual, self.gate)

    def problem(self, out, accumulate):
        wrong = _misfit(out, residual=(self.residual, tuple(out.shape), out.dtype),
                        gate=(self.gate, (out.shape[1],), out.dtype))
        if wrong is None and overlaps(self.residual, out):
            if self.residual.data_ptr() != out.data_ptr() or self.residual.stride() != out.stride():
                return ("residual shares memory with out and is not out, or has other strides. "
                        "Needs out itself or memory of its own.")
            if accumulate:
                return "residual is out, which is to be added to. Needs a residual of its own: clone it."
        return wrong


@dataclass(frozen=True)
class QKV:
    """RMSNorm and rotary embedding of q and k, N being q, k and v in this order, heads of 128. Spec: reference.qk_norm_rope

    query     [128]               x.dtype   weight of the norm of q        key   the same of k
    rotation  [tokens, 64, 2, 2]  fp32      contiguous: one matrix per channels 2i, 2i+1, ComfyUI's `pe` of one batch item
    eps       float                         of both norms
    """
    query: torch.Tensor
    key: torch.Tensor
    rotation: torch.Tensor
    eps: float = 1e-6
    accumulates: ClassVar[bool] = False

    def of(self, y):
        return reference.qk_norm_rope(y, self.query, self.key, self.rotation, self.eps)

    def problem(self, out, accumulate):
        tokens, n = out.shape
        if n % (3 * reference.HEAD):
            return f"N is {n}. Needs q, k and v of as many heads of {reference.HEAD} each."
        return _misfit(out, query=(self.query, (reference.HEAD,), out.dtype), key=(self.key, (reference.HEAD,), out.dtype),
                       rotation=(self.rotation, (tokens, reference.HEAD // 2, 2, 2), torch.float32))


ALL = frozenset((Gelu, Gated, QKV))
KINDS = {"store": (), "gated": ("residual", "gate"), "gelu": (), "qkv": ("query", "key", "rotation")}   # Kind of epilogue.cuh


def arguments(epilogue):
    """What an operator takes for an epilogue, by name; for None, nothing."""
    return {} if epilogue is None else {"epilogue": type(epilogue).__name__.lower(), **vars(epilogue)}


def rounded(y, dtype):
    """y as kernels store it: fp16 ends at 65504 instead of Inf."""
    return (y.clamp(-65504.0, 65504.0) if dtype == torch.float16 else y).to(dtype)


def _misfit(like, **operands):
    """Says which operand is not of its shape and dtype on the device of `like`, or None: name -> (tensor, shape, dtype)."""
    for name, (tensor, shape, dtype) in operands.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != like.device:
            return (f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}. "
                    f"Needs {list(shape)} {dtype} on {like.device}.")
