"""The host half of W4A4 kernels that share their buffers: the operators of a library, and what these buffers hold.

    quant_down, gemm, fields = operators(library, dtypes, forms)

    quant_down   x -> int4 codes, scales, x @ proj_down      cuda/w4a4_quant.cuh; after adaptive LayerNorm: cuda/adaln_w4a4.cuh
    gemm         those and the weight -> out                  cuda/w4a4_tile.cuh
    fields       what the Variants of the library have in common, as keywords
    forms        {form: of what K is a multiple} where scales are normalised, cuda/w4a4_normal.cuh; else none

Buffers between them are laid out as the .cuh files say; `decode` brings them into plain order.

Test: tests/kernels/families/test_w4a4_sm80.py, test_w4a4_sm75.py, test_w4a4_normal.py
"""

from functools import partial
from pathlib import Path

import torch

from . import adaln, epilogues, launch
from .build import Library
from .errors import ShapeError
from .launch import Updated
from .rows import row_blocks
from .variant import HALVES, short

SIGNS = {False: "s4", True: "u4"}
STAGE = 8960                                # bytes of a stage of cuda/w4a4_tile.cuh
RANKS = {False: "r32", True: "r128"}         # whether the rank is above 32


def library(name, quant_down, gemm, adaln, dtypes, forms=("",), more=None):
    """The Library of files of cuda/ with a kernel for each choice that the operators have, and `more` of its kind."""
    halves = [HALVES[dtype] for dtype in dtypes]
    return Library(name, {
        quant_down: tuple(f"{Path(quant_down).stem}_{half}_{sign}_{rank}" for half in halves for sign in SIGNS.values()
                          for rank in RANKS.values()),
        gemm: tuple("_".join(filter(None, (Path(gemm).stem, half, sign, form))) for form in forms for half in halves
                    for sign in SIGNS.values()),
        adaln: tuple(f"{Path(adaln).stem}_{half}" for half in halves), **(more or {})})


def operators(library, dtypes, forms=None):
    """(quant_down, gemm, fields) of a library of `library`. The two are torch operators, named as its files are."""
    peaks = int(forms is not None)              # scales of a row behind those of its groups: the largest of these
    quant_name, gemm_name, *_ = (Path(file).stem for file in library.sources)

    def check_dtype(who, what, tensor):
        if tensor.dtype in HALVES and tensor.dtype not in dtypes:
            raise ShapeError(f"{who}: {what} is {short(tensor.dtype)}. Needs {' or '.join(map(short, dtypes))}, which is all "
                             "that these kernels multiply.")

    @torch.library.custom_op(f"svdq::{quant_name}", mutates_args=())
    def quant_down(x: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor | None,
                   unsigned: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise activations to int4 and run the low-rank down projection, in one pass over x.

        x          [M, K] of one of `dtypes`, last stride 1, K % 64 == 0, 4-byte aligned rows
        smooth     [K] x.dtype       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128      both packed (layout.py)

        qact       [M/64, K/64, 4, 32, 4] int32, ascales [M/64, K/64, 4, 8, 2] fp32, low [M/16, R/16, 32, 8] x.dtype, in the
                   order w4a4_quant.cuh describes, M rounded up to 64; rows past M are zero. For forms ascales have K/64 + 1

        Spec: reference.quant_down. Source: SVDQuant, arXiv 2411.05007.
        """
        tokens, k = launch.check_x(quant_name, x, 64, 4)
        check_dtype(quant_name, "x", x)
        rank = 0 if proj_down is None else proj_down.shape[-1]
        launch.check_rank(quant_name, rank)
        launch.check(quant_name, x, smooth=(smooth, (k,), x.dtype), proj_down=(proj_down, (k, rank), x.dtype))
        outputs = quant_down_outputs(x, rank, peaks)
        if tokens:
            name = f"{quant_name}_{HALVES[x.dtype]}_{SIGNS[unsigned]}_{RANKS[rank > 32]}"
            launch.launch(library, x, name, (row_blocks(tokens, 64) * 4, 1), 256,
                          [x, smooth, proj_down, *outputs, tokens, k, rank, x.stride(0)])
        return outputs

    @quant_down.register_fake
    def _(x, smooth, proj_down, unsigned):
        return quant_down_outputs(x, 0 if proj_down is None else proj_down.shape[1], peaks)

    @torch.library.custom_op(f"svdq::{gemm_name}", mutates_args=("out",))
    def gemm(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor,
             wscales: torch.Tensor, proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
             unsigned: bool, accumulate: bool,
             epilogue: str = "store", residual: torch.Tensor | None = None, gate: torch.Tensor | None = None,
             query: torch.Tensor | None = None, key: torch.Tensor | None = None, rotation: torch.Tensor | None = None,
             eps: float = 0.0, columns: torch.Tensor | None = None, form: str = "") -> None:
        """out = epilogue(y), where y = qact * qweight + low * proj_up + bias, with accumulate (store, gated) + out as it was.

        qact, ascales, low   from quant_down          qweight [N, K/2] int8, wscales [K/64, N], proj_up [N, R]: packed
        bias [N] plain order or None      out [M, N] of one of `dtypes`, N % 128 == 0, last stride 1, 16-byte aligned rows
        epilogue ... and its operands     see launch.epilogue_arguments
        columns [N] fp32, form            where there are forms, of a NormalWeight, whose wscales are fp16

        Spec: reference.gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope. Source: SVDQuant, arXiv 2411.05007.
        """
        n, k = qweight.shape[0], qweight.shape[-1] * 2
        launch.check_out(gemm_name, out, n)
        check_dtype(gemm_name, "out", out)
        tokens, rank, half = out.shape[0], low.shape[1] * 16 if low.ndim == 4 else 0, out.dtype
        if rank and proj_up is None:
            raise ShapeError(f"{gemm_name}: low has rank {rank} but proj_up is missing.")
        if form not in (forms or [""]) or (columns is not None) != bool(peaks) or peaks and k % forms[form]:
            raise ShapeError(f"{gemm_name}: form {form!r}, K {k}, columns {'missing' if columns is None else 'given'}. Needs "
                             + (" or ".join(f"{name!r} with K a multiple of {by}" for name, by in forms.items())
                                + ", and columns." if peaks else "neither form nor columns."))
        last = launch.epilogue_arguments(gemm_name, out, accumulate, epilogue, residual, gate, query, key, rotation, eps)
        blocks, groups = row_blocks(tokens, 64), k // 64
        launch.check(gemm_name, out, qact=(qact, (blocks, groups, 4, 32, 4), torch.int32),
                     ascales=(ascales, (blocks, groups + peaks, 4, 8, 2), torch.float32),
                     low=(low, (blocks * 4, rank // 16, 32, 8), half),
                     qweight=(qweight, (n, groups * 32), torch.int8),
                     wscales=(wscales, (groups, n), torch.float16 if peaks else half), columns=(columns, (n,), torch.float32),
                     proj_up=(proj_up, (n, rank), half))
        launch.check(gemm_name, out, 4, bias=(bias, (n,), half))
        if tokens:
            name = "_".join(filter(None, (gemm_name, HALVES[half], SIGNS[unsigned], form)))
            launch.launch(library, out, name, (n // 128, row_blocks(tokens, 128)), 128,
                          [qact, ascales, qweight, wscales, *[columns] * peaks, low, proj_up, bias,
                           Updated(out) if accumulate else out, tokens, n, k, rank, out.stride(0), int(accumulate), *last])

    def prepare(x, weight):
        """(qact, ascales, low), see quant_down."""
        return quant_down(x, weight.smooth, weight.proj_down, weight.unsigned)

    def product(prepared, weight, out, bias, accumulate, epilogue=None, form=""):
        more = {"columns": weight.columns, "form": form} if peaks else {}
        gemm(*prepared, weight.qweight, weight.wscales, weight.proj_up, bias, out, weight.unsigned, accumulate,
             **epilogues.arguments(epilogue), **more)

    modulates = None
    for file in library.sources:
        if file.startswith("adaln"):
            _, modulates = adaln.operators(library, file, partial(quant_down_outputs, peaks=peaks), dtypes)
    return quant_down, gemm, dict(prepare=prepare, product=product, decode=decode, activations="int4", dtypes=dtypes,
                                  library=library, same_dtype=True, row_bytes=16, max_rank=launch.MAX_RANK,
                                  epilogues=epilogues.ALL, modulates=modulates)


def quant_down_outputs(x, rank, peaks=0):
    blocks, groups = row_blocks(x.shape[0], 64), x.shape[1] // 64
    return (x.new_empty(blocks, groups, 4, 32, 4, dtype=torch.int32),
            x.new_empty(blocks, groups + peaks, 4, 8, 2, dtype=torch.float32), x.new_empty(blocks * 4, rank // 16, 32, 8))


def decode(prepared, weight):
    """(codes fp32 [M, K], scales [M, K/64], low [M, R]) in plain order, M rounded up to 64."""
    qact, ascales, low = prepared
    words = qact.view(*qact.shape[:2], 4, 8, 4, 2, 2)               # g t, half of K, half of the rows; 8 codes each
    codes = torch.stack([(words >> 4 * i & 15).to(torch.int8) for i in range(8)], -1)
    codes = codes.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(qact.shape[0] * 64, -1)
    codes = codes if weight.unsigned else (codes ^ 8) - 8
    scales = ascales[:, :qact.shape[1]].permute(0, 2, 4, 3, 1).reshape(ascales.shape[0] * 64, -1)
    low = low.view(*low.shape[:2], 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, -1)
    return codes.float(), scales, low
