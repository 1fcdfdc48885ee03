"""W4A8 with 8-bit integers: INT4 files on every GPU from sm_80 on whose tensor cores have no faster way. Two kernels, which
read the file's order.

    quant_int8   x -> int8 codes with one scale per token, x @ proj_down     cuda/quant_int8.cuh
    gemm_int8    those and the weight -> out                                 cuda/gemm_int8.cuh

Activations keep twice the bits of W4A4. Buffers between the kernels are laid out as the .cuh files say; `decode` brings them
into plain order.

Test: tests/kernels/families/test_w4a8_int8.py
"""

import torch

from .. import adaln, epilogues, launch
from ..build import Library
from ..errors import ShapeError
from ..launch import Updated
from ..reference import SHIFT
from ..rows import row_blocks
from ..variant import HALVES, LATER, Variant

RANKS = {False: "r32", True: "r128"}         # whether the rank is above 32

LIBRARY = Library("w4a8_int8", {
    "quant_int8.cuh": tuple(f"quant_int8_{half}_{rank}" for half in HALVES.values() for rank in RANKS.values()),
    "gemm_int8.cuh": tuple(f"gemm_int8_{half}" for half in HALVES.values()),
    "adaln_int8.cuh": tuple(f"adaln_int8_{half}" for half in HALVES.values())})


@torch.library.custom_op("svdq::quant_int8", mutates_args=())
def quant_int8(x: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor | None,
               unsigned: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to int8, one scale per token, and run the low-rank down projection beside it.

    x          [M, K] bf16 | fp16, last stride 1, K % 64 == 0, 16-byte aligned rows
    smooth     [K] x.dtype       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128      both packed (layout.py)

    qact       [M/64, K/64, 4, 2, 32, 4] int32, ascales [M/64, 4, 8, 2] fp32, low [M/16, R/16, 32, 8] x.dtype, in the order
               quant_int8.cuh describes, M rounded up to 64; rows past M are zero

    Spec: reference.quant_down, precision int8. Source: SVDQuant, arXiv 2411.05007; int8 is our own.
    """
    tokens, k = launch.check_x("quant_int8", x, 64, 16)
    rank = 0 if proj_down is None else proj_down.shape[-1]
    launch.check_rank("quant_int8", rank)
    launch.check("quant_int8", x, smooth=(smooth, (k,), x.dtype), proj_down=(proj_down, (k, rank), x.dtype))
    outputs = quant_int8_outputs(x, rank)
    if tokens:
        launch.launch(LIBRARY, x, f"quant_int8_{HALVES[x.dtype]}_{RANKS[rank > 32]}", (row_blocks(tokens, 64) * 4, 1), 256,
                      [x, smooth, proj_down, *outputs, SHIFT if unsigned else 0.0, tokens, k, rank, x.stride(0)])
    return outputs


@quant_int8.register_fake
def _(x, smooth, proj_down, unsigned):
    return quant_int8_outputs(x, 0 if proj_down is None else proj_down.shape[1])


def quant_int8_outputs(x, rank):
    blocks, groups = row_blocks(x.shape[0], 64), x.shape[1] // 64
    return (x.new_empty(blocks, groups, 4, 2, 32, 4, dtype=torch.int32),
            x.new_empty(blocks, 4, 8, 2, dtype=torch.float32), x.new_empty(blocks * 4, rank // 16, 32, 8))


@torch.library.custom_op("svdq::gemm_int8", mutates_args=("out",))
def gemm_int8(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor,
              wscales: torch.Tensor, proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
              accumulate: bool,
              epilogue: str = "store", residual: torch.Tensor | None = None, gate: torch.Tensor | None = None,
              query: torch.Tensor | None = None, key: torch.Tensor | None = None, rotation: torch.Tensor | None = None,
              eps: float = 0.0) -> None:
    """out = epilogue(y), where y = qact * qweight + low * proj_up + bias, with accumulate (store, gated) + out as it was.

    qact, ascales, low   from quant_int8          qweight [N, K/2] int8, wscales [K/64, N], proj_up [N, R]: packed
    bias [N] plain order or None          out [M, N] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows

    epilogue ... and its operands, see launch.epilogue_arguments

    Spec: reference.gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope. Source: SVDQuant, arXiv 2411.05007.
    """
    n, k = qweight.shape[0], qweight.shape[-1] * 2
    launch.check_out("gemm_int8", out, n)
    tokens, rank, half = out.shape[0], low.shape[1] * 16 if low.ndim == 4 else 0, out.dtype
    if rank and proj_up is None:
        raise ShapeError(f"gemm_int8: low has rank {rank} but proj_up is missing.")
    last = launch.epilogue_arguments("gemm_int8", out, accumulate, epilogue, residual, gate, query, key, rotation, eps)
    blocks, groups = row_blocks(tokens, 64), k // 64
    launch.check("gemm_int8", out, qact=(qact, (blocks, groups, 4, 2, 32, 4), torch.int32),
                 ascales=(ascales, (blocks, 4, 8, 2), torch.float32), low=(low, (blocks * 4, rank // 16, 32, 8), half),
                 qweight=(qweight, (n, groups * 32), torch.int8), wscales=(wscales, (groups, n), half),
                 proj_up=(proj_up, (n, rank), half))
    launch.check("gemm_int8", out, 4, bias=(bias, (n,), half))
    if tokens:
        launch.launch(LIBRARY, out, f"gemm_int8_{HALVES[half]}", (n // 128, row_blocks(tokens, 128)), 128,
                      [qact, ascales, qweight, wscales, low, proj_up, bias, Updated(out) if accumulate else out, tokens, n, k,
                       rank, out.stride(0), int(accumulate), *last])


def prepare(x, weight):
    """(qact, ascales, low), see quant_int8."""
    return quant_int8(x, weight.smooth, weight.proj_down, weight.unsigned)


def product(prepared, weight, out, bias, accumulate, epilogue=None):
    gemm_int8(*prepared, weight.qweight, weight.wscales, weight.proj_up, bias, out, accumulate, **epilogues.arguments(epilogue))


def decode(prepared, weight):
    """(codes fp32 [M, K], scales [M], low [M, R]) in plain order, M rounded up to 64."""
    qact, ascales, low = prepared
    bytes_ = qact.view(torch.int8).view(*qact.shape[:4], 8, 4, 2, 2, 4)     # g t, even or odd columns, half of the rows, 4
    codes = bytes_.permute(0, 2, 7, 4, 1, 3, 5, 8, 6).reshape(qact.shape[0] * 64, -1)
    scales = ascales.transpose(2, 3).flatten()
    low = low.view(*low.shape[:2], 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, -1)
    return codes.float(), scales, low


VARIANTS = (Variant("w4a8_int8", "fused kernels, 4-bit weights, 8-bit integer activations", prepare, product, decode=decode,
                    activations="int8", device=("cuda", (8, 0), LATER), dtypes=tuple(HALVES), library=LIBRARY, same_dtype=True,
                    row_bytes=16, max_rank=launch.MAX_RANK, epilogues=epilogues.ALL, preference=10,
                    modulates=adaln.operators(LIBRARY, "adaln_int8.cuh", quant_int8_outputs)[1]),)
