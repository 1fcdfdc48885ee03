"""The operators of a 4-bit linear: their contracts, and the table that says which implementation serves them.

Operands are packed as checkpoints store them (layout.py). reference.py says in fp32 what each operator computes.
"""

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch

from . import build, fused, layout, reference
from .errors import ShapeError
from .hopper import FP8Weight, repack

log = logging.getLogger(__name__)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 1 << 24         # weights dequantised at a time: 32 MiB in 16 bit, a fraction of one FLUX layer


@dataclass(frozen=True)
class W4A4Weight:
    """One W4A4 linear, [N, K] when unpacked.

    qweight    [N, K/2]  int8                    4-bit codes
    wscales    [G, N]    bf16 | fp16 | fp8 e4m3  one per group of 64 (int4) or 16 (nvfp4) input channels
    smooth     [K]       bf16 | fp16             divides the activation before it is quantised
    proj_down  [K, R]    bf16 | fp16 | None      low-rank branch, acts on the activation as it comes
    proj_up    [N, R]    bf16 | fp16 | None
    wcscales   [N]       bf16 | fp16 | None      nvfp4: scale per output channel
    wtscale    float                             nvfp4: scale per tensor
    unsigned   bool                              int4 after GELU: codes 0..15 of x + 0.171875
    """
    precision: str
    unsigned: bool
    qweight: torch.Tensor
    wscales: torch.Tensor
    smooth: torch.Tensor
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    wcscales: torch.Tensor | None = None
    wtscale: float = 1.0

    @property
    def shape(self):
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def rank(self):
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    def rows(self, start, stop):
        """Output channels [start, stop), multiples of 128: every packed tensor runs over N in blocks of 128 first."""
        part, n = slice(start, stop), self.qweight.shape[0]

        def cut(tensor):
            per_row = tensor.numel() // n
            return tensor.reshape(-1)[start * per_row:stop * per_row].view(-1, stop - start)

        return replace(self, qweight=self.qweight[part], wscales=cut(self.wscales),
                       proj_up=None if self.proj_up is None else self.proj_up[part],
                       wcscales=None if self.wcscales is None else self.wcscales[part])

    def logical(self):
        """The same layer in the layouts of reference.py. No branch becomes one of rank 0."""
        n, k = self.shape
        down, up = self.proj_down, self.proj_up
        return reference.W4A4(
            codes=layout.unpack_codes(self.qweight), wscales=layout.unpack_scales(self.wscales),
            smooth=layout.unpack_vector(self.smooth), precision=self.precision, unsigned=self.unsigned,
            proj_down=self.smooth.new_zeros(k, 0) if down is None else layout.unpack_down(down),
            proj_up=self.smooth.new_zeros(n, 0) if up is None else layout.unpack_up(up),
            wcscales=None if self.wcscales is None else layout.unpack_vector(self.wcscales), wtscale=self.wtscale)

    def dense(self, dtype):
        """The 4-bit part in smoothed space, codes * scales [N, K], rounded to dtype. Spec: reference.dequantize_weight"""
        n, k = self.shape
        scales = layout.unpack_scales(self.wscales).float() * self.wtscale
        if self.wcscales is not None:
            scales *= layout.unpack_vector(self.wcscales).float()[:, None]
        values = (layout.unpack_int4(self.qweight) if self.precision == "int4"
                  else layout.e2m1(layout.unpack_codes(self.qweight)))
        dense = torch.empty(n, k, dtype=dtype, device=values.device)
        groups = n, scales.shape[1], layout.GROUP[self.precision]
        torch.mul(values.view(groups), scales[..., None], out=dense.view(groups))      # fp32 inside, no fp32 copy
        return dense


@dataclass(frozen=True)
class AWQWeight:
    """One W4A16 modulation linear: weight[n, k] = code * wscales[k/64, n] + wzeros[k/64, n].

    qweight  [N/4, K/2]  int32          codes 0..15
    wscales  [K/64, N]   bf16 | fp16
    wzeros   [K/64, N]   bf16 | fp16
    """
    qweight: torch.Tensor
    wscales: torch.Tensor
    wzeros: torch.Tensor

    @property
    def shape(self):
        return self.qweight.shape[0] * 4, self.qweight.shape[1] * 2

    def rows(self, start, stop):
        part = slice(start, stop)
        return AWQWeight(self.qweight[start // 4:stop // 4], self.wscales[:, part], self.wzeros[:, part])

    def dense(self, dtype):
        """The weight [N, K], rounded once to dtype."""
        return reference.dequantize_awq(layout.unpack_awq(self.qweight), self.wscales.t(), self.wzeros.t()).to(dtype)


@dataclass(frozen=True)
class Gelu:
    """gelu_tanh(y). Spec: reference.gelu_tanh"""

    def of(self, y):
        """The epilogue of y [tokens, N] in torch: fp32 [tokens, N]."""
        return reference.gelu_tanh(y)

    def problem(self, out, accumulate):
        """What is wrong with the operands for this out and what they need, or None."""


@dataclass(frozen=True)
class Gated:
    """residual + gate * y. Spec: reference.gate_residual

    residual  [tokens, N]  x.dtype      rows like out's; may be `out` itself, but not with accumulate
    gate      [N]          x.dtype      contiguous
    """
    residual: torch.Tensor
    gate: torch.Tensor

    def of(self, y):
        return reference.gate_residual(y, self.residual, self.gate)

    def problem(self, out, accumulate):
        wrong = _misfit(out, residual=(self.residual, tuple(out.shape), out.dtype),
                        gate=(self.gate, (out.shape[1],), out.dtype))
        if wrong is None and out.numel() and self.residual.data_ptr() == out.data_ptr():
            if accumulate:
                return "residual is out, which is to be added to. Needs a residual of its own: clone it."
            if self.residual.stride() != out.stride():
                return "residual begins where out does, with other strides. Needs out itself or memory of its own."
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

    def of(self, y):
        return reference.qk_norm_rope(y, self.query, self.key, self.rotation, self.eps)

    def problem(self, out, accumulate):
        tokens, n = out.shape
        if n % (3 * reference.HEAD):
            return f"N is {n}. Needs q, k and v of as many heads of {reference.HEAD} each."
        return _misfit(out, query=(self.query, (reference.HEAD,), out.dtype), key=(self.key, (reference.HEAD,), out.dtype),
                       rotation=(self.rotation, (tokens, reference.HEAD // 2, 2, 2), torch.float32))


def _misfit(like, **operands):
    """Says which operand is not of its shape and dtype on the device of `like`, or None: name -> (tensor, shape, dtype)."""
    for name, (tensor, shape, dtype) in operands.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != like.device:
            return (f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}. "
                    f"Needs {list(shape)} {dtype} on {like.device}.")


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


def dequantize(weight):
    """The weight-only equivalent of a layer: (W fp32 [N, K], bias fp32 [N] to add).

    W acts on the activation as it comes: smoothing and the low-rank branch are inside. The bias is what the shift of
    an unsigned layer contributes, zero elsewhere. Source: checkpoint-format 6.1.
    """
    n, k = weight.shape
    if isinstance(weight, FP8Weight):
        weight = weight.restored()
    dense = torch.empty(n, k, device=weight.qweight.device)
    for rows in _chunks(n, k):
        dense[rows] = weight.rows(rows.start, rows.stop).dense(torch.float32)
    bias = torch.zeros(n, device=dense.device)
    if isinstance(weight, W4A4Weight):
        dense /= layout.unpack_vector(weight.smooth).float()
        if weight.unsigned:
            torch.sum(dense, 1, out=bias).mul_(reference.SHIFT)
        if weight.proj_down is not None:
            dense.addmm_(layout.unpack_up(weight.proj_up).float(), layout.unpack_down(weight.proj_down).float().t())
    return dense, bias


def _chunks(n, k):
    """Row ranges of at most CHUNK weights, cut at multiples of 128."""
    step = max(CHUNK // k // layout.TILE_N, 1) * layout.TILE_N
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


# ---- implementations: run(x, weight, out, bias, accumulate), those with `epilogues` also run(..., epilogue)

def _then(run, x, weight, out, bias, accumulate, epilogue):
    """The epilogue in torch, in fp32, after a product that is rounded to out.dtype."""
    apart = isinstance(epilogue, Gated) and not accumulate          # out may be the residual, which is read last
    y = torch.empty_like(out) if apart else out
    run(x, weight, y, bias, accumulate)
    out.copy_(_stored(epilogue.of(y), out.dtype))


def _stored(y, dtype):
    """y rounded as kernels store it: fp16 ends at 65504 instead of Inf."""
    return (y.clamp(-65504.0, 65504.0) if dtype == torch.float16 else y).to(dtype)


def _weight_only_w4a4(x, weight, out, bias, accumulate):
    smoothed = (x + reference.SHIFT if weight.unsigned else x) / layout.unpack_vector(weight.smooth).float()
    _weight_only(smoothed.to(x.dtype), weight, out, bias, accumulate)
    _add_low_rank(x, weight, out)


def _weight_only(x, weight, out, bias, accumulate):
    _start(out, bias, accumulate)
    for rows in _chunks(*weight.shape):
        out[:, rows].addmm_(x, weight.rows(rows.start, rows.stop).dense(x.dtype).t())


def _add_low_rank(x, weight, out):
    if weight.proj_down is not None:
        add_low_rank(x, layout.unpack_down(weight.proj_down).t(), layout.unpack_up(weight.proj_up), out)


def _start(out, bias, accumulate):
    """Bring out to what the product is then added to."""
    if not accumulate:
        out.zero_()
    if bias is not None:
        out += bias


def _reference_w4a4(x, weight, out, bias, accumulate):
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 else x      # activations are quantised from 16 bit
    y = reference.linear_w4a4(half, replace(weight.logical(), bias=bias)).to(x.dtype)
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
        add_low_rank(x, weight.down().t(), layout.unpack_up(weight.proj_up), out)


def operands_of(epilogue):
    """An epilogue, or None, as fused.gemm_fp8 takes it."""
    return {} if epilogue is None else {"epilogue": type(epilogue).__name__.lower(), **vars(epilogue)}


def _restored(x, weight, out, bias, accumulate):
    _weight_only_w4a4(x, weight.restored(), out, bias, accumulate)


def _reference_fp8(x, weight, out, bias, accumulate):
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 else x
    y = reference.linear_w4a4(half, replace(weight.restored().logical(), bias=bias), act="e4m3").to(x.dtype)
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
