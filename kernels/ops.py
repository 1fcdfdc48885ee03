"""The operators of a 4-bit linear: their contracts, and the table that says which implementation serves them.

Operands are packed as checkpoints store them (layout.py). reference.py says in fp32 what each operator computes.
"""

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch

from . import build, fused, layout, reference
from .epilogues import Gated, rounded
from .errors import ShapeError
from .hopper import FP8Weight, repack
from .weights import AWQWeight, W4A4Weight, chunks

log = logging.getLogger(__name__)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def linear(x, weight, out, bias=None, accumulate=False, act_bits=None, epilogue=None):
    """out = weight(x) + bias, or out += that. With an epilogue: out = epilogue(weight(x) + bias (+ out as it was)).

    x         [tokens, K]  bf16 | fp16 | fp32             any strides
    weight    W4A4Weight | FP8Weight | AWQWeight          on x's device
    out       [tokens, N]  x.dtype                        may be a slice of a wider tensor
    bias      [N]          x.dtype                        or None
    act_bits  None | 4 | 8                                what activations may be rounded to: see Request
    epilogue  None | Gelu | Gated | QKV                   in the kernel where `fuses` says so, elsewhere in torch after it

    Raises ShapeError when shapes, dtypes or devices do not fit together. Source: SVDQuant, arXiv 2411.05007.
    """
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k or tuple(out.shape) != (x.shape[0], n):
        raise ShapeError(f"linear: x is {list(x.shape)} and out is {list(out.shape)}. The weight is [{n}, {k}], so x must "
                         f"be [tokens, {k}] and out [tokens, {n}]. Check which layer this x belongs to.")
    if x.dtype not in FLOATS or out.dtype != x.dtype:
        raise ShapeError(f"linear: x is {x.dtype} and out {out.dtype}. Both must be the same of {FLOATS}; convert x.")
    if not x.device == out.device == weight.qweight.device:
        raise ShapeError(f"linear: x is on {x.device}, out on {out.device}, the weight on {weight.qweight.device}. "
                         "All three must be on one device; move them there.")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ShapeError(f"linear: bias is {list(bias.shape)} {bias.dtype} on {bias.device}. "
                         f"Needs [{n}] {x.dtype} on {x.device}.")
    problem = None if epilogue is None else epilogue.problem(out, accumulate)
    if problem:
        raise ShapeError(f"linear: the epilogue {type(epilogue).__name__} does not fit out {list(out.shape)}: {problem}")
    variant = choose(request_for(x, weight, act_bits))
    if epilogue is None:
        variant.run(x, weight, out, bias, accumulate)
    elif variant.epilogues:
        variant.run(x, weight, out, bias, accumulate, epilogue)
    else:
        _then(variant.run, x, weight, out, bias, accumulate, epilogue)


def fuses(request):
    """Whether the variant that serves a request does epilogues in its kernel: elsewhere they cost what torch's would."""
    return choose(request).epilogues


def prepare(weight, dtype, act_bits=None):
    """The weight as the fastest kernels of its device want it, once after loading: repacked, or the weight itself.

    weight  any that `linear` takes, on the device where it will run
    dtype   of the x to come
    """
    if not isinstance(weight, W4A4Weight) or weight.precision != "int4":
        return weight
    index = weight.qweight.device.index if weight.qweight.device.type == "cuda" else None
    asked = Request("linear_w4a4", dtype, None if index is None else capability_of(index), index, weight.precision,
                    weight.smooth.dtype, None, act_bits)
    return repack(weight) if wants_repack(asked) else weight


def wants_repack(request):
    """Whether a request of "linear_w4a4" that no kernel serves would find one as "linear_fp8"."""
    return choose(request).capability is None and choose(request._replace(op="linear_fp8")).capability is not None


def add_low_rank(x, down, up, out):
    """out += x down^T up^T, two plain matmuls in x's dtype: x [tokens, K], down [r, K], up [N, r], out [tokens, N]."""
    out.addmm_(x @ down.to(x.dtype).t(), up.to(x.dtype).t())


# ---- implementations: run(x, weight, out, bias, accumulate), those with `epilogues` also run(..., epilogue)

def _then(run, x, weight, out, bias, accumulate, epilogue):
    """The epilogue in torch, in fp32, after a product that is rounded to out.dtype."""
    apart = isinstance(epilogue, Gated) and not accumulate          # out may be the residual, which is read last
    y = torch.empty_like(out) if apart else out
    run(x, weight, y, bias, accumulate)
    out.copy_(rounded(epilogue.of(y), out.dtype))


def _weight_only_w4a4(x, weight, out, bias, accumulate):
    _weight_only(weight.smoothed(x), weight, out, bias, accumulate)
    _add_low_rank(x, weight, out)


def _weight_only(x, weight, out, bias, accumulate):
    _start(out, bias, accumulate)
    for rows in chunks(*weight.shape):
        out[:, rows].addmm_(x, weight.cut(rows.start, rows.stop).dense(x.dtype).t())


def _add_low_rank(x, weight, out):
    if weight.proj_down is not None:
        down, up = weight.branch()
        add_low_rank(x, down.t(), up, out)


def _start(out, bias, accumulate):
    """Bring out to what the product is then added to."""
    if not accumulate:
        out.zero_()
    if bias is not None:
        out += bias


def _reference_w4a4(x, weight, out, bias, accumulate):
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 else x      # activations are quantised from 16 bit
    y = reference.linear_w4a4(half, weight.logical(bias)).to(x.dtype)
    out.add_(y) if accumulate else out.copy_(y)


def _reference_awq(x, weight, out, bias, accumulate):
    y = x.float() @ weight.dense(torch.float32).t() + (0 if bias is None else bias.float())
    out.add_(y.to(x.dtype)) if accumulate else out.copy_(y)


def _fused_w4a4(x, weight, out, bias, accumulate):
    fits = weight.rank <= fused.MAX_RANK
    down, up = (weight.proj_down, weight.proj_up) if fits else (None, None)
    qact, ascales, low = fused.quant_down(x, weight.smooth, down, weight.unsigned)
    fused.gemm_w4a4(qact, ascales, low, weight.qweight, weight.wscales, up, bias, out, weight.unsigned, accumulate)
    if not fits:
        _add_low_rank(x, weight, out)


def _fp8_w4a8(x, weight, out, bias, accumulate, epilogue=None):
    _fp8(x, weight, out, bias, accumulate, epilogue, per_group=False)


def _fp8_w4a4(x, weight, out, bias, accumulate, epilogue=None):
    _fp8(x, weight, out, bias, accumulate, epilogue, per_group=True)


def _fp8(x, weight, out, bias, accumulate, epilogue, per_group):
    fits = weight.rank <= fused.MAX_RANK
    # It comes after what add_low_rank adds; and only one of them adds what `out` held.
    if epilogue is not None and (not fits or accumulate and not isinstance(epilogue, Gated)):
        _then(partial(_fp8, epilogue=None, per_group=per_group), x, weight, out, bias, accumulate, epilogue)
        return
    down, up = (weight.proj_down, weight.proj_up) if fits else (None, None)
    qact, ascales, low = fused.quant_fp8(fused.rows16(x), weight.inverse, down, weight.unsigned, per_group)
    fused.gemm_fp8(qact, ascales, low, weight.qweight, weight.wscales, up, bias, out, accumulate, **operands_of(epilogue))
    if not fits:
        _add_low_rank(x, weight, out)


def operands_of(epilogue):
    """An epilogue, or None, as fused.gemm_fp8 takes it."""
    return {} if epilogue is None else {"epilogue": type(epilogue).__name__.lower(), **vars(epilogue)}


def _restored(x, weight, out, bias, accumulate):
    _weight_only_w4a4(x, weight.unpack(), out, bias, accumulate)


def _reference_fp8(x, weight, out, bias, accumulate):
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 else x
    y = reference.linear_w4a4(half, weight.unpack().logical(bias), act="e4m3").to(x.dtype)
    out.add_(y) if accumulate else out.copy_(y)


def _fused_awq(x, weight, out, bias, accumulate):
    y, = fused.awq_gemv(x.contiguous(), [weight.qweight], [weight.wscales], [weight.wzeros],
                        [] if bias is None else [bias])
    out.add_(y) if accumulate else out.copy_(y)


# ---- the table

class Request(NamedTuple):
    """What the choice of an implementation depends on. Fields that None leaves open fit every rule: `doctor` asks so."""
    op: str                             # "linear_w4a4", "linear_fp8": the same repacked for Hopper, or "linear_awq"
    dtype: torch.dtype                  # of x
    capability: tuple | None            # compute capability of a CUDA device, None on any other
    device: int | None = None           # its index
    precision: str | None = None        # "int4" | "nvfp4"
    scales: torch.dtype | None = None   # of smooth or of an AWQ layer's scales
    tokens: int | None = None
    # The user's choice. 4: activations in 4 bits, as in the paper and on most GPUs. 8: in 8 bits, one scale per token, more
    # accurate. None: whichever is faster on this GPU. What rounds no activation serves any of them.
    act_bits: int | None = None


@dataclass(frozen=True)
class Variant:
    """One implementation of one operator, and where it can run: every rule is data, so that errors can quote it."""
    op: str
    name: str
    run: object
    how: str
    dtypes: tuple = FLOATS
    precision: str | None = None
    capability: tuple | None = None     # lowest and highest compute capability; the kernels must build, too
    tokens: int | None = None           # most rows of x
    same_scales: bool = False           # packed 16-bit tensors must be of x's dtype
    on_request: bool = False            # never chosen by itself: `using(name)` asks for it
    act_bits: int | None = None         # what it rounds activations to; None: nothing, or what the reference is asked for
    epilogues: bool = False             # `run` takes them, and its kernel does them on the way out

    def declines(self, request):
        """Why this variant cannot serve, or None."""
        if request.dtype not in self.dtypes:
            return f"takes {', '.join(_short(d) for d in self.dtypes)}, not {_short(request.dtype)}"
        if self.precision and request.precision and request.precision != self.precision:
            return f"takes {self.precision} weights, not {request.precision}"
        if self.tokens and request.tokens is not None and request.tokens > self.tokens:
            return f"takes at most {self.tokens} rows, not {request.tokens}"
        if self.same_scales and request.scales and request.scales != request.dtype:
            return f"needs scales of the compute dtype {_short(request.dtype)}, the file has {_short(request.scales)}"
        if self.act_bits and request.act_bits and request.act_bits != self.act_bits:
            return f"rounds activations to {self.act_bits} bits, not {request.act_bits}"
        if self.on_request and _requested.get() != self.name:
            return "runs only on request, for tests and comparisons"
        if self.capability:
            if request.capability is None:
                return "needs a CUDA GPU"
            lowest, highest = self.capability
            if not lowest <= request.capability <= highest:
                return (f"made for sm_{lowest[0]}{lowest[1]} to sm_{highest[0]}{highest[1]}, "
                        f"this GPU is sm_{request.capability[0]}{request.capability[1]}")
            if request.device is not None and not (trusted_fp8 if self.op == "linear_fp8" else trusted)(
                    request.device):
                return "the kernels did not build, or failed their self-test; 'python -m svdq doctor' says why"
        return None


def _short(dtype):
    return str(dtype).removeprefix("torch.")


_requested = ContextVar("svdq_variant", default=None)

NATIVE_S4 = (8, 0), (8, 9)      # mma.sync on 4-bit integers in hardware
ANY_S4 = (8, 0), (99, 0)        # later GPUs run the same kernels through the compiler's emulation: correct, slow
HOPPER = (9, 0), (9, 0)         # wgmma


# First match wins, so the fastest comes first.
VARIANTS = (
    Variant("linear_w4a4", "reference", _reference_w4a4, "4-bit activations in fp32 torch", on_request=True),
    Variant("linear_w4a4", "fused", _fused_w4a4, "fused W4A4 kernels", fused.HALVES, "int4", NATIVE_S4, same_scales=True,
            act_bits=4),
    Variant("linear_w4a4", "fused_emulated", _fused_w4a4, "fused W4A4 kernels, 4-bit MMA emulated by the compiler",
            fused.HALVES, "int4", ANY_S4, same_scales=True, on_request=True, act_bits=4),
    Variant("linear_fp8", "reference", _reference_fp8, "8-bit activations in fp32 torch", on_request=True),
    Variant("linear_fp8", "fp8_w4a8", _fp8_w4a8, "fused kernels, 4-bit weights, 8-bit activations", fused.HALVES, "int4",
            HOPPER, same_scales=True, act_bits=8, epilogues=True),
    Variant("linear_fp8", "fp8_w4a4", _fp8_w4a4, "fused kernels, 4-bit weights and activations", fused.HALVES, "int4",
            HOPPER, same_scales=True, act_bits=4, epilogues=True),
    Variant("linear_fp8", "weight_only", _restored, "the checkpoint's layout restored, then weights dequantised: very slow"),
    Variant("linear_w4a4", "weight_only", _weight_only_w4a4, "weights dequantised in chunks, 16-bit matmul"),
    Variant("linear_awq", "reference", _reference_awq, "fp32 torch", on_request=True),
    Variant("linear_awq", "fused", _fused_awq, "fused W4A16 kernel", fused.HALVES, capability=ANY_S4,
            tokens=fused.MAX_BATCH, same_scales=True),
    Variant("linear_awq", "weight_only", _weight_only, "weights dequantised in chunks, 16-bit matmul"),
)


def request_for(x, weight, act_bits=None):
    """The Request that a call of `linear` makes."""
    index = x.device.index if x.device.type == "cuda" else None
    op, precision, scales = (
        ("linear_awq", None, weight.wscales.dtype) if isinstance(weight, AWQWeight) else
        ("linear_fp8", "int4", weight.dtype) if isinstance(weight, FP8Weight) else
        ("linear_w4a4", weight.precision, weight.smooth.dtype))
    return Request(op, x.dtype, None if index is None else capability_of(index), index, precision, scales, x.shape[0],
                   act_bits)


@cache
def capability_of(index):
    return torch.cuda.get_device_capability(index)


def choose(request):
    """The variant that serves a request, or a ShapeError that says why each one declined."""
    reasons = []
    for variant in sorted(VARIANTS, key=lambda variant: variant.name != _requested.get()):     # a stable sort
        if variant.op == request.op:
            reason = variant.declines(request)
            if reason is None:
                return variant
            reasons.append(f"{variant.name}: {reason}")
    raise ShapeError(f"{request.op}: no implementation serves {request}. " + "; ".join(reasons))


def reference_of(op):
    return next(variant.run for variant in VARIANTS if (variant.op, variant.name) == (op, "reference"))


@cache
def trusted(device):
    """Whether the kernels of a CUDA device were built and agree with the reference there; asked once, said once."""
    from .selftest import check                 # which needs this module

    return _passed(device, lambda dtype: check(f"cuda:{device}", dtype, _fused_w4a4, _fused_awq))


@cache
def trusted_fp8(device):
    """`trusted` for the kernels that only Hopper has: a fault in them must not cost a GPU the others, nor the other way."""
    from .selftest import check_fp8

    return _passed(device, lambda dtype: check_fp8(f"cuda:{device}", dtype, _fp8_w4a8, _fp8_w4a4))


def _passed(device, check):
    if build.kernels_for(device) is None:
        return False
    try:
        failed = [f"{result.what}: {result.error:.1e}" for dtype in fused.HALVES
                  for result in check(dtype) if not result.passed]
    except RuntimeError as error:               # a launch the driver refuses
        failed = [str(error)]
    if failed:
        log.warning("SVDQ: the kernels fail their self-test on cuda:%d (%s), so layers run weight-only. Please report this "
                    "with the output of 'python -m svdq doctor'", device, "; ".join(failed))
    return not failed


def declined(request):
    """[(variant, why)] of the better variants that do not serve a request."""
    chosen, reasons = choose(request), []
    for variant in VARIANTS:
        if variant is chosen:
            return reasons
        if variant.op == request.op and not variant.on_request:
            reasons.append((variant, variant.declines(request)))


@contextmanager
def using(name):
    """Prefer the variants of this name inside the block: `with using("reference"): ...`"""
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)
