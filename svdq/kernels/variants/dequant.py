"""Weights written as 16-bit numbers by one kernel, a piece at a time, then a product of torch's library: what serves on a CUDA
GPU where no kernel multiplies 4-bit weights. No activation is rounded to fewer than 16 bits. It reads the file's order.

    dequant   rows of a weight -> numbers [N, K], to the bit those of W4A4Weight.dense          cuda/dequant.cuh

The low-rank branch and the bias are further columns of both operands, so that one product does all and `out` is written once
(torch adds a bias in a pass of its own, where `out` is a part of a wider tensor):

    [ x / smooth | x proj_down | 1 ]  [ W | proj_up | bias 0 .. ]^T

Turing (sm_75) is the oldest GPU that NVRTC 13 compiles for; before it torch serves (weight_only.py).

Test: tests/kernels/families/test_dequant.py
"""

import torch

from .. import launch, layout
from ..build import Library
from ..errors import ShapeError
from ..rows import is_aligned
from ..variant import HALVES, LATER, Variant
from ..weights import chunks, clamped, scratch

PRECISIONS = ("int4", "nvfp4")
FILE = {torch.bfloat16: 0, torch.float16: 1}            # ptx.cuh: Half
ONES = 16                                               # columns for the bias: rows stay aligned

LIBRARY = Library("dequant", {"dequant.cuh": tuple(f"dequant_{half}_{precision}" for half in HALVES.values()
                                                   for precision in PRECISIONS)})


@torch.library.custom_op("svdq::dequant", mutates_args=("out",))
def dequant(qweight: torch.Tensor, wscales: torch.Tensor, wcscales: torch.Tensor | None, wtscale: float,
            out: torch.Tensor) -> None:
    """out = what 4-bit weights stand for: qweight * (wscales * wtscale * wcscales) in fp32, rounded once.

    qweight [N, K/2] int8          wscales [K/64, N] bf16 | fp16 of integers, [K/16, N] e4m3 of e2m1: packed (layout.py)
    wcscales [N] bf16 | fp16, packed, or None          out [N, K] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows

    Spec: weights.W4A4Weight.dense. Source: checkpoint-format 6.1.
    """
    n, k = qweight.shape[0], qweight.shape[-1] * 2
    precision = "nvfp4" if wscales.dtype == torch.float8_e4m3fn else "int4"
    kinds = {tensor.dtype for tensor in (wscales, wcscales) if tensor is not None} - {torch.float8_e4m3fn}
    if (out.ndim != 2 or tuple(out.shape) != (n, k) or out.dtype not in HALVES or n % 128 or k % 64 or len(kinds) > 1
            or not kinds <= HALVES.keys() or not is_aligned(out, 16)):
        raise ShapeError(f"dequant: out is {list(out.shape)} {out.dtype}, strides {out.stride()}, for a weight [{n}, {k}] with "
                         f"wscales {wscales.dtype}. Needs out [{n}, {k}] bf16 or fp16, N % 128 == 0, K % 64 == 0, last stride "
                         "1, rows aligned to 16 bytes, wscales in bf16, fp16 or e4m3 and wcscales in their 16-bit dtype.")
    launch.check("dequant", out, qweight=(qweight, (n, k // 2), torch.int8),
                 wscales=(wscales, (k // layout.GROUP[precision], n), wscales.dtype),
                 wcscales=(wcscales, (n,), None if wcscales is None else wcscales.dtype))
    if n and k:
        launch.launch(LIBRARY, out, f"dequant_{HALVES[out.dtype]}_{precision}", (k // 64, n // 128), 256,
                      [qweight, wscales, wcscales, out, float(wtscale), FILE[kinds.pop()] if kinds else 0, k, out.stride(0)])


@dequant.register_fake
def _(qweight, wscales, wcscales, wtscale, out):
    return None


def prepare(x, weight):
    """[tokens, K + R + 16]: x as the 4-bit part takes it, x proj_down, ones."""
    (tokens, k), rank = x.shape, weight.rank
    both = x.new_empty(tokens, k + rank + ONES)
    weight.smoothed(x, both[:, :k])
    if rank:
        clamped(both[:, k:k + rank].addmm_(x, layout.unpack_down(weight.proj_down).to(x.dtype), beta=0))
    both[:, k + rank:] = 1
    return both


def product(both, weight, out, bias, accumulate, epilogue=None):
    if not len(out):
        return
    (n, k), rank, width = weight.shape, weight.rank, both.shape[1]
    beside = both.new_zeros(n, width - k)
    if rank:
        beside[:, :rank] = layout.unpack_up(weight.proj_up)
    if bias is not None:
        beside[:, rank] = bias
    pieces = chunks(n, width)
    # A piece, at most 32 MiB, stays in the L2 of a 4090, 5090 or H100 until it is read, as all are written to one place.
    # Smaller ones would have fewer tiles of a product than these have multiprocessors, and read x more often.
    numbers = scratch(both, (max(rows.stop - rows.start for rows in pieces), width), both.dtype)
    for rows in pieces:
        part, into = weight.cut(rows.start, rows.stop), out[:, rows]
        dense = numbers[:len(part.qweight)]
        dequant(part.qweight, part.wscales, part.wcscales, part.wtscale, dense[:, :k])
        dense[:, k:] = beside[rows]
        into.addmm_(both, dense.t(), beta=int(accumulate))      # 0: whatever `out` holds is not read


VARIANTS = (Variant("dequant", "weights dequantised by a kernel, 16-bit matmul", prepare, product, precisions=PRECISIONS,
                    device=("cuda", (7, 5), LATER), dtypes=tuple(HALVES), library=LIBRARY, same_dtype=True, preference=5,
                    weight_only=True),)
