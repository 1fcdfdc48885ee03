"""The operators of a 4-bit linear: their contracts, and the table that says which implementation serves them.

Operands are packed as checkpoints store them (layout.py). reference.py says in fp32 what each operator computes.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

from . import layout, reference
from .errors import ShapeError

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
        """The 4-bit part in smoothed space, codes * scales [N, K], rounded once to dtype. Spec: reference.dequantize_weight"""
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


def linear(x, weight, out):
    """out += weight(x), without bias.

    x       [tokens, K]  bf16 | fp16 | fp32   any strides
    weight  W4A4Weight | AWQWeight            on x's device
    out     [tokens, N]  x.dtype              may be a slice of a wider tensor

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
    op = "linear_awq" if isinstance(weight, AWQWeight) else "linear_w4a4"
    choose(op, x.device, x.dtype).run(x, weight, out)


def dequantize(weight):
    """The weight-only equivalent of a layer: (W fp32 [N, K], bias fp32 [N] to add).

    W acts on the activation as it comes: smoothing and the low-rank branch are inside. The bias is what the shift of
    an unsigned layer contributes, zero elsewhere. Source: checkpoint-format 6.1.
    """
    n, k = weight.shape
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


def _weight_only_w4a4(x, weight, out):
    smoothed = (x + reference.SHIFT if weight.unsigned else x) / layout.unpack_vector(weight.smooth).float()
    _weight_only(smoothed.to(x.dtype), weight, out)
    if weight.proj_down is not None:
        down, up = layout.unpack_down(weight.proj_down).to(x.dtype), layout.unpack_up(weight.proj_up).to(x.dtype)
        out.addmm_(x @ down, up.t())


def _weight_only(x, weight, out):
    for rows in _chunks(*weight.shape):
        out[:, rows].addmm_(x, weight.rows(rows.start, rows.stop).dense(x.dtype).t())


def _reference_w4a4(x, weight, out):
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 else x      # activations are quantised from 16 bit
    out += reference.linear_w4a4(half, weight.logical()).to(x.dtype)


@dataclass(frozen=True)
class Variant:
    """One implementation of one operator, and where it can run."""
    op: str
    name: str
    run: object
    dtypes: tuple
    how: str
    on_request: bool = False        # never chosen by itself: `using(name)` asks for it

    def declines(self, device, dtype):
        """Why this variant cannot serve, or None."""
        if dtype not in self.dtypes:
            return f"takes {', '.join(str(d) for d in self.dtypes)}, not {dtype}"
        if self.on_request and _requested.get() != self.name:
            return "for tests and comparisons; runs only on request"
        return None


_requested = ContextVar("svdq_variant", default=None)

# First match wins, so the fastest comes first.
VARIANTS = (
    Variant("linear_w4a4", "reference", _reference_w4a4, FLOATS, "4-bit activations in fp32 torch", on_request=True),
    Variant("linear_w4a4", "weight_only", _weight_only_w4a4, FLOATS, "weights dequantised in chunks, 16-bit matmul"),
    Variant("linear_awq", "weight_only", _weight_only, FLOATS, "weights dequantised in chunks, 16-bit matmul"),
)


def choose(op, device, dtype):
    """The variant that serves `op` on this device, or a ShapeError that says why each one declined."""
    reasons = []
    for variant in VARIANTS:
        if variant.op == op:
            reason = variant.declines(device, dtype)
            if reason is None:
                return variant
            reasons.append(f"{variant.name}: {reason}")
    raise ShapeError(f"{op}: no implementation for {dtype} on {device}. " + "; ".join(reasons))


@contextmanager
def using(name):
    """Prefer the variants of this name inside the block: `with using("reference"): ...`"""
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)
