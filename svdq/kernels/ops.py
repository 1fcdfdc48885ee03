"""The linear of a packed weight: its contract. registry.py chooses who computes it.

Test: tests/unit/test_ops.py
"""

from . import registry
from .errors import ShapeError
from .prologues import Modulated
from .rows import overlaps, overlaps_itself
from .variant import FLOATS, Target


def linear(x, weight, out, bias=None, accumulate=False, act_bits=None, epilogue=None):
    """out = weight(x) + bias, or out += that. With an epilogue: out = epilogue(weight(x) + bias (+ out as it was)).

    x         [tokens, K]  bf16 | fp16 | fp32             any strides; or prologues.Modulated, in the quantiser's kernel where
                                                          the variant does it, elsewhere in torch before it
    weight    Weight       in any order                   on x's device
    out       [tokens, N]  x.dtype                        any strides without overlap: a slice of a wider tensor, say. Not x's
                                                          memory
    bias      [N]          x.dtype                        or None
    act_bits  None | 4 | 8 | 16                           the bits activations are rounded to: registry.plan
    epilogue  None | Gelu | Gated | QKV                   in the kernel where the variant does it, elsewhere in torch after it

    Raises ShapeError when shapes, dtypes, devices or act_bits do not fit together. Source: SVDQuant, arXiv 2411.05007.
    """
    modulated = isinstance(x, Modulated)
    problem = x.problem() if modulated else None
    if problem:
        raise ShapeError(f"linear: the operands of Modulated do not fit: {problem}")
    _check(x.x if modulated else x, weight, out, bias)
    problem = None if epilogue is None else epilogue.problem(out, accumulate)
    if problem:
        raise ShapeError(f"linear: the epilogue {type(epilogue).__name__} does not fit out {list(out.shape)}: {problem}")
    registry.plan(weight, Target.of(x.device), x.dtype, act_bits).run(x, weight, out, bias, accumulate, epilogue)


def _check(x, weight, out, bias):
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k or tuple(out.shape) != (x.shape[0], n):
        raise ShapeError(f"linear: x is {list(x.shape)} and out is {list(out.shape)}. The weight is [{n}, {k}], so x must "
                         f"be [tokens, {k}] and out [tokens, {n}]. Check which layer this x belongs to.")
    if x.dtype not in FLOATS or out.dtype != x.dtype:
        raise ShapeError(f"linear: x is {x.dtype} and out {out.dtype}. Both must be the same of {FLOATS}; convert x.")
    if not x.device == out.device == weight.device:
        raise ShapeError(f"linear: x is on {x.device}, out on {out.device}, the weight on {weight.device}. "
                         "All three must be on one device; move them there.")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ShapeError(f"linear: bias is {list(bias.shape)} {bias.dtype} on {bias.device}. "
                         f"Needs [{n}] {x.dtype} on {x.device}.")
    if overlaps_itself(out):
        raise ShapeError(f"linear: numbers of out {list(out.shape)} share memory, its strides are {out.stride()}. Needs an out "
                         "of its own: torch.empty.")
    if overlaps(x, out):
        raise ShapeError(f"linear: out {list(out.shape)} shares memory with x {list(x.shape)}, which is read while out is "
                         "written. Needs an out of its own: torch.empty or a clone of x.")
