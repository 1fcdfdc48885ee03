"""The 4-bit weights of a linear: what a checkpoint holds, in the order it holds it, and what every order can be asked.

A variant whose kernels want another order brings a class of its own (layouts are classes: `pack` makes one from the file's
order, `unpack` gives it back to the bit). layout.py knows the bits, reference.py says what they stand for.

Source: checkpoint-format 5, 6. Test: tests/unit/test_weights.py
"""

import math
import threading
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from . import layout, reference
from .errors import RangeError

PRECISIONS = ("int4", "nvfp4", "awq")
# Weights dequantised at a time: 32 MiB in 16 bit, a fraction of one FLUX layer. On CPUs a quarter of it is slower where others
# compute, as each operation waits for all threads; twice of it is slower anywhere, as malloc keeps no blocks above 32 MiB.
CHUNK = 1 << 24

# The most that casting scales, smoothing and factors may cost: half a step of bf16, by which the file's own may be off already.
LOSS = 2.0**-8

_kept = threading.local()


class Weight:
    """A packed weight, [N, K] when unpacked: a frozen dataclass whose tensors lie on one device. Subclasses add

    kind       a word for the class, in descriptions of stored bytes
    precision  "int4" | "nvfp4" | "awq"
    unsigned   whether activations are shifted by 0.171875 and their int4 codes are 0..15: layers after GELU
    shape      (N, K)
    dtype      bf16 | fp16, of scales and low-rank factors
    proj_down, proj_up     the branch as packed, or None

    and, in the file's order,
    dense(dtype, out)      the 4-bit part, which `smoothed(x)` is multiplied with: [N, K], rounded once to dtype; in `out`,
                           contiguous, where that is given
    """
    KINDS: ClassVar[dict] = {}
    has_branch: ClassVar[bool] = True       # whether a low-rank branch can be part of it
    read_first: ClassVar[tuple] = ("smooth", "proj_down")       # fields that quantising the input reads

    def __init_subclass__(cls, kind):
        taken = Weight.KINDS.get(kind)
        if taken is not None and taken.__module__ != cls.__module__:
            raise ValueError(f"kind {kind!r} is {taken.__module__}.{taken.__name__}'s. Needs a kind of its own")
        cls.kind = kind
        Weight.KINDS[kind] = cls

    @property
    def device(self):
        return self.qweight.device

    @property
    def rank(self):
        """Of the low-rank branch, 0 without one."""
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    def cut(self, start, stop):
        """Output channels [start, stop), multiples of 128, as views where the order of bytes allows it."""
        return self.unpack().cut(start, stop)

    def tensors(self):
        """{field: tensor}, without fields that are None."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self, device):
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def with_branch(self, proj_down, proj_up):
        """The same 4-bit part with another branch, packed as this class packs it; None, None: without one."""
        return replace(self, proj_down=proj_down, proj_up=proj_up)

    def branch(self):
        """(proj_down [K, R], proj_up [N, R]) in plain order, or None without a branch."""
        if self.proj_down is None:
            return None
        return layout.unpack_down(self.proj_down), layout.unpack_up(self.proj_up)

    @staticmethod
    def pack_down(factor):
        """proj_down [K, R] in plain order -> as this class keeps it. Further rank is further blocks of 16 x 16."""
        return layout.pack_down(factor)

    @classmethod
    def pack(cls, weight):
        """A weight in the file's order -> the same in this class's. The file's own classes give it back as it is."""
        return weight

    def unpack(self):
        """The weight in the file's order."""
        return self

    def smoothed(self, x):
        """x as the 4-bit part takes it: shifted and divided by `smooth`, rounded to x.dtype."""
        return x

    def add_branch(self, x, out):
        """out += x proj_down proj_up^T, in x's dtype."""
        down, up = self.branch()
        matmul_branch(x, down.t(), up, out)


@dataclass(frozen=True)
class W4A4Weight(Weight, kind="w4a4"):
    """One W4A4 linear as in a checkpoint.

    qweight    [N, K/2]  int8                    4-bit codes
    wscales    [G, N]    bf16 | fp16 | fp8 e4m3  one per group of 64 (int4) or 16 (nvfp4) input channels
    smooth     [K]       bf16 | fp16             divides the activation before it is quantised
    proj_down  [K, R]    bf16 | fp16 | None      low-rank branch, acts on the activation as it comes
    proj_up    [N, R]    bf16 | fp16 | None
    wcscales   [N]       bf16 | fp16 | None      nvfp4: scale per output channel
    wtscale    float                             nvfp4: scale per tensor
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
    def dtype(self):
        return self.smooth.dtype

    def cut(self, start, stop):
        part, n = slice(start, stop), self.qweight.shape[0]

        def rows(tensor):                       # every packed tensor runs over N in blocks of 128 first
            per_row = tensor.numel() // n
            return tensor.reshape(-1)[start * per_row:stop * per_row].view(-1, stop - start)

        return replace(self, qweight=self.qweight[part], wscales=rows(self.wscales),
                       proj_up=None if self.proj_up is None else self.proj_up[part],
                       wcscales=None if self.wcscales is None else self.wcscales[part])

    def logical(self, bias=None):
        """The layer in the layouts of reference.py. No branch becomes one of rank 0."""
        n, k = self.shape
        down, up = self.branch() or (self.smooth.new_zeros(k, 0), self.smooth.new_zeros(n, 0))
        return reference.W4A4(
            codes=layout.unpack_codes(self.qweight), wscales=layout.unpack_scales(self.wscales),
            smooth=layout.unpack_vector(self.smooth), precision=self.precision, unsigned=self.unsigned, proj_down=down,
            proj_up=up, bias=bias, wcscales=None if self.wcscales is None else layout.unpack_vector(self.wcscales),
            wtscale=self.wtscale)

    def smoothed(self, x, out=None):
        shifted, smooth = x + reference.SHIFT if self.unsigned else x, layout.unpack_vector(self.smooth)
        smooth = smooth if smooth.dtype == x.dtype else smooth.float()          # the same result, or of fewer bytes
        if out is None or torch.compiler.is_compiling():                # which traces no out= of a slice, and fuses the copy
            z = (shifted / smooth).to(x.dtype)
            return z if out is None else out.copy_(z)
        return torch.div(shifted, smooth, out=out)

    def dense(self, dtype, out=None):
        scales = layout.unpack_scales(self.wscales)
        if scales.dtype != dtype or self.wtscale != 1 or self.wcscales is not None:     # else one rounding as it is
            scales = scales.float() * self.wtscale
        if self.wcscales is not None:
            scales *= layout.unpack_vector(self.wcscales).float()[:, None]
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        groups, scales = (*scales.shape, layout.GROUP[self.precision]), scales[..., None]
        if layout.on_cpu(self.qweight):         # where an operation on two dtypes takes ten times as long
            values = layout.unpack_values(self.qweight, self.precision, in_dtype(scales.dtype, out))
            values.view(groups).mul_(scales)
            return values if values is out else out.copy_(values)
        values = layout.unpack_int4(self.qweight) if self.precision == "int4" else layout.unpack_e2m1(self.qweight, dtype)
        torch.mul(values.view(groups), scales, out=out.view(groups))
        return out


@dataclass(frozen=True)
class AWQWeight(Weight, kind="awq"):
    """One W4A16 modulation linear as in a checkpoint: weight[n, k] = code * wscales[k/64, n] + wzeros[k/64, n].

    qweight  [N/4, K/2]  int32          codes 0..15
    wscales  [K/64, N]   bf16 | fp16
    wzeros   [K/64, N]   bf16 | fp16
    """
    qweight: torch.Tensor
    wscales: torch.Tensor
    wzeros: torch.Tensor

    precision, unsigned = "awq", False
    has_branch, proj_down, proj_up = False, None, None

    @property
    def shape(self):
        return self.qweight.shape[0] * 4, self.qweight.shape[1] * 2

    @property
    def dtype(self):
        return self.wscales.dtype

    def cut(self, start, stop):
        part = slice(start, stop)
        return AWQWeight(self.qweight[start // 4:stop // 4], self.wscales[:, part], self.wzeros[:, part])

    def dense(self, dtype, out=None):
        out = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        scales, zeros = (part.t().float()[..., None] for part in (self.wscales, self.wzeros))
        values = in_dtype(torch.float32, out).copy_(layout.unpack_awq(self.qweight))
        values.view(len(values), -1, 64).mul_(scales).add_(zeros)
        return values if values is out else out.copy_(values)


@dataclass(frozen=True)
class AWQ128Weight(Weight, kind="awq_g128"):
    """One W4A16 linear of a text encoder as in its file: AWQWeight in groups of 128, and the other spelling of qweight.

    qweight  [N/4, K]    int16          codes 0..15
    wscales  [K/128, N]  bf16 | fp16
    wzeros   [K/128, N]  bf16 | fp16    anything, where those of a modulation are -7 scales

    What computes reads AWQWeight: a group of 128 is two of 64 with the same scale, and `unpack` costs a sixteenth of the bytes.
    """
    qweight: torch.Tensor
    wscales: torch.Tensor
    wzeros: torch.Tensor

    precision, unsigned = "awq", False
    has_branch, proj_down, proj_up = False, None, None

    @property
    def shape(self):
        return self.qweight.shape[0] * 4, self.qweight.shape[1]

    @property
    def dtype(self):
        return self.wscales.dtype

    def unpack(self):
        return AWQWeight(self.qweight.view(torch.int32), self.wscales.repeat_interleave(2, 0),
                         self.wzeros.repeat_interleave(2, 0))


def matmul_branch(x, down, up, out):
    """out += x down^T up^T, two plain matmuls: x [tokens, K], down [r, K], up [N, r], out [tokens, N].

    In x's dtype; in fp32 where factors of 16 bit have another, as that one may lack their numbers (`cast`).
    """
    if down.dtype == x.dtype:
        out.addmm_(clamped(x @ down.t()), up.t())
    elif x.dtype == torch.float32:
        out.addmm_(x @ down.float().t(), up.float().t())
    else:
        out.copy_(out.float().addmm_(x.float() @ down.float().t(), up.float().t()))


def clamped(x):
    """x, in fp16 with 65504 in the place of Inf, as kernels store it: the next product would make NaN of two of them."""
    return x.clamp_(-65504, 65504) if x.dtype == torch.float16 else x


def chunks(n, k):
    """Row ranges of at most CHUNK weights, cut at multiples of 128, as few and as even as can be."""
    tiles = -(-n // layout.TILE_N)
    pieces = -(-tiles // max(CHUNK // k // layout.TILE_N, 1)) or 1
    edges = [min(tiles * i // pieces * layout.TILE_N, n) for i in range(pieces + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


def scratch(like, shape, dtype):
    """A tensor where `like` is, to write and read until this thread asks for one of this dtype again.

    On CPUs these are bytes that the thread keeps, as many as it ever asked for, 64 MiB for a CHUNK in fp32, 96 for exact_cpu of
    thousands of tokens: writing to new memory takes longer than unpacking. Elsewhere torch's allocator does that.
    """
    if not layout.on_cpu(like):
        return like.new_empty(shape, dtype=dtype)
    kept, size = vars(_kept), math.prod(shape)
    if dtype not in kept or len(kept[dtype]) < size:
        with torch.inference_mode(False):
            kept[dtype] = like.new_empty(size, dtype=dtype)
    return kept[dtype][:size].view(shape)


def cast(weight, dtype):
    """A weight in the file's order with scales, smoothing and factors in another 16-bit dtype; E4M3 scales stay.

    To bf16 they are rounded, which costs at most LOSS of each. To fp16 numbers of bf16 go as they are from 2^-17 to 65504, are
    off by up to 2^-25 below that, and are Inf above. What is off may be at most LOSS of

        smooth          each number: it divides a channel, whose codes depend on it
        proj_*          each rank: what is small in one factor may meet something large in the other
        scales, zeros   all of the tensor: its smallest numbers are nothing beside the layer's output

    Where that does not hold as they are, each rank's factors are brought to one size by a power of two, which leaves their
    product. Raises RangeError, which names a field and a number of it, where that does not help.
    """
    try:
        return _cast_all(weight, dtype)
    except RangeError as error:
        if not isinstance(weight, W4A4Weight) or weight.proj_down is None:
            raise
        try:
            return _cast_all(_evened(weight), dtype)
        except RangeError:
            raise error from None           # which names a number of the file


def _cast_all(weight, dtype):
    return replace(weight, **{name: _cast(name, tensor, dtype) for name, tensor in weight.tensors().items()
                              if tensor.is_floating_point() and tensor.itemsize == 2 and tensor.dtype != dtype})


def _evened(weight):
    """The weight with a power of two moved between the factors of each rank, so that their largest numbers are of one size."""
    down, up = layout.unpack_down(weight.proj_down).float(), layout.unpack_up(weight.proj_up).float()
    tops = [factor.abs().amax(0) for factor in (down, up)]
    by = torch.where((tops[0] > 0) & (tops[1] > 0), ((tops[1].log2() - tops[0].log2()) / 2).round(), 0)
    return weight.with_branch(*(pack(torch.ldexp(factor, shift).to(weight.dtype)) for pack, factor, shift in (
        (layout.pack_down, down, by), (layout.pack_up, up, -by))))


def _cast(name, tensor, dtype):
    new = tensor.to(dtype)
    if dtype == torch.bfloat16 or torch.equal(new.to(tensor.dtype), tensor):
        return new
    plain = {"proj_down": layout.unpack_down, "proj_up": layout.unpack_up}.get(name, lambda tensor: tensor)
    was, now = plain(tensor).double(), plain(new).double()
    off, size = (now - was).abs(), was.abs()
    lost, of = (off, size) if name == "smooth" else (
        torch.linalg.vector_norm(part, dim=0 if name.startswith("proj") else None, keepdim=True) for part in (off, size))
    much = ~(lost <= LOSS * of)
    if not much.any():
        return new
    worst = int(torch.where(much, off / size, -1).nan_to_num(nan=-1, posinf=math.inf).argmax())
    raise RangeError(f"{name} has {float(was.flatten()[worst]):.2g}, which would be {float(now.flatten()[worst]):.2g}")


def in_dtype(dtype, out):
    """`out`, or scratch of its shape where it is of another dtype."""
    return out if out.dtype == dtype else scratch(out, out.shape, dtype)


def dequantize(weight):
    """The 16-bit equivalent of a layer with exact activations: (W fp32 [N, K], bias fp32 [N] to add).

    W acts on the activation as it comes: smoothing and the low-rank branch are inside. The bias is what the shift of
    an unsigned layer contributes, zero elsewhere. Source: checkpoint-format 6.1.
    """
    weight = weight.unpack()
    n, k = weight.shape
    dense = torch.empty(n, k, device=weight.device)
    for rows in chunks(n, k):
        weight.cut(rows.start, rows.stop).dense(torch.float32, dense[rows])
    bias = torch.zeros(n, device=dense.device)
    if isinstance(weight, W4A4Weight):
        dense /= layout.unpack_vector(weight.smooth).float()
        if weight.unsigned:
            torch.sum(dense, 1, out=bias).mul_(reference.SHIFT)
        if weight.proj_down is not None:
            dense.addmm_(layout.unpack_up(weight.proj_up).float(), layout.unpack_down(weight.proj_down).float().t())
    return dense, bias


def input_gradient(weight, dy):
    """dy W [tokens, K] fp32 of dy [tokens, N], W being what `dequantize` gives: the gradient of a layer's input where rounding
    activations counts as exact. Products are in dy's dtype, sums of them in fp32; memory is that of one chunk."""
    weight = weight.unpack()
    n, k = weight.shape
    dx = torch.zeros(len(dy), k, device=dy.device)
    for rows in chunks(n, k):
        part = weight.cut(rows.start, rows.stop)
        dx += dy[:, rows] @ part.dense(dy.dtype, scratch(dy, part.shape, dy.dtype))
    if isinstance(weight, W4A4Weight):
        dx /= layout.unpack_vector(weight.smooth).float()
        if weight.proj_down is not None:
            down, up = weight.branch()
            dx += dy @ up.to(dy.dtype) @ down.to(dy.dtype).t()
    return dx


def example(precision, dtype=torch.bfloat16):
    """A weight without bytes (on the meta device) of this precision, for questions that need no numbers."""
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    n = k = layout.TILE_N
    if precision == "awq":
        return AWQWeight(empty(n // 4, k // 2, dtype=torch.int32), empty(k // 64, n), empty(k // 64, n))
    scales = dtype if precision == "int4" else torch.float8_e4m3fn
    return W4A4Weight(precision, False, empty(n, k // 2, dtype=torch.int8),
                      empty(k // layout.GROUP[precision], n, dtype=scales), empty(k))
