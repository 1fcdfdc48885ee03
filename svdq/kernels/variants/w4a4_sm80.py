"""W4A4 on sm_80, 86 and 89, whose tensor cores multiply 4-bit integers: two kernels, which read the file's order.

    quant_down   x -> int4 codes, scales, x @ proj_down          cuda/quant_down.cuh
    gemm_w4a4    those and the weight -> out                      cuda/gemm_w4a4.cuh

Buffers between them are laid out as the .cuh files say; `decode` brings them into plain order.

Test: tests/kernels/families/test_w4a4_sm80.py
"""

import torch

from .. import launch
from ..build import Library
from ..errors import ShapeError
from ..launch import Updated
from ..rows import row_blocks
from ..variant import HALVES, LATER, Variant

SIGNS = {False: "s4", True: "u4"}
RANKS = {False: "r32", True: "r128"}         # whether the rank is above 32

LIBRARY = Library("w4a4_sm80", {
    "quant_down.cuh": tuple(f"quant_down_{half}_{sign}_{rank}" for half in HALVES.values() for sign in SIGNS.values()
                            for rank in RANKS.values()),
    "gemm_w4a4.cuh": tuple(f"gemm_w4a4_{half}_{sign}" for half in HALVES.values() for sign in SIGNS.values())})


@torch.library.custom_op("svdq::quant_down", mutates_args=())
def quant_down(x: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor | None,
               unsigned: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to int4 and run the low-rank down projection, in one pass over x.

    x          [M, K] bf16 | fp16, last stride 1, K % 64 == 0, 4-byte aligned rows
    smooth     [K] x.dtype       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128      both packed (layout.py)

    qact       [M/64, K/64, 4, 32, 4] int32, ascales [M/64, K/64, 4, 8, 2] fp32, low [M/16, R/16, 32, 8] x.dtype, in the
               order quant_down.cuh describes, M rounded up to 64; rows past M are zero

    Spec: reference.quant_down. Source: SVDQuant, arXiv 2411.05007.
    """
    tokens, k = launch.check_x("quant_down", x, 64, 4)
    rank = 0 if proj_down is None else proj_down.shape[-1]
    launch.check_rank("quant_down", rank)
    launch.check("quant_down", x, smooth=(smooth, (k,), x.dtype), proj_down=(proj_down, (k, rank), x.dtype))
    outputs = quant_down_outputs(x, rank)
    if tokens:
        name = f"quant_down_{HALVES[x.dtype]}_{SIGNS[unsigned]}_{RANKS[rank > 32]}"
        launch.launch(LIBRARY, x, name, (row_blocks(tokens, 64) * 4, 1), 256,
                      [x, smooth, proj_down, *outputs, tokens, k, rank, x.stride(0)])
    return outputs


@quant_down.register_fake
def _(x, smooth, proj_down, unsigned):
    return quant_down_outputs(x, 0 if proj_down is None else proj_down.shape[1])


def quant_down_outputs(x, rank):
    blocks, groups = row_blocks(x.shape[0], 64), x.shape[1] // 64
    return (x.new_empty(blocks, groups, 4, 32, 4, dtype=torch.int32),
            x.new_empty(blocks, groups, 4, 8, 2, dtype=torch.float32), x.new_empty(blocks * 4, rank // 16, 32, 8))


@torch.library.custom_op("svdq::gemm_w4a4", mutates_args=("out",))
def gemm_w4a4(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor,
              wscales: torch.Tensor, proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
              unsigned: bool, accumulate: bool) -> None:
    """out = qact * qweight + low * proj_up + bias, or out += that.

    qact, ascales, low   from quant_down          qweight [N, K/2] int8, wscales [K/64, N], proj_up [N, R]: packed
    bias [N] plain order or None          out [M, N] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows

    Spec: reference.gemm_w4a4. Source: SVDQuant, arXiv 2411.05007.
    """
    n, k = qweight.shape[0], qweight.shape[-1] * 2
    launch.check_out("gemm_w4a4", out, n)
    tokens, rank, half = out.shape[0], low.shape[1] * 16 if low.ndim == 4 else 0, out.dtype
    if rank and proj_up is None:
        raise ShapeError(f"gemm_w4a4: low has rank {rank} but proj_up is missing.")
    blocks, groups = row_blocks(tokens, 64), k // 64
    launch.check("gemm_w4a4", out, qact=(qact, (blocks, groups, 4, 32, 4), torch.int32),
                 ascales=(ascales, (blocks, groups, 4, 8, 2), torch.float32),
                 low=(low, (blocks * 4, rank // 16, 32, 8), half),
                 qweight=(qweight, (n, groups * 32), torch.int8), wscales=(wscales, (groups, n), half),
                 proj_up=(proj_up, (n, rank), half))
    launch.check("gemm_w4a4", out, 4, bias=(bias, (n,), half))
    if tokens:
        launch.launch(LIBRARY, out, f"gemm_w4a4_{HALVES[half]}_{SIGNS[unsigned]}", (n // 128, row_blocks(tokens, 128)),
                      128, [qact, ascales, qweight, wscales, low, proj_up, bias, Updated(out) if accumulate else out, tokens,
                            n, k, rank, out.stride(0), int(accumulate)])


def prepare(x, weight):
    """(qact, ascales, low), see quant_down."""
    return quant_down(x, weight.smooth, weight.proj_down, weight.unsigned)


def product(prepared, weight, out, bias, accumulate, epilogue=None):
    gemm_w4a4(*prepared, weight.qweight, weight.wscales, weight.proj_up, bias, out, weight.unsigned, accumulate)


def decode(prepared, weight):
    """(codes fp32 [M, K], scales [M, K/64], low [M, R]) in plain order, M rounded up to 64."""
    qact, ascales, low = prepared
    words = qact.view(*qact.shape[:2], 4, 8, 4, 2, 2)               # g t, half of K, half of the rows; 8 codes each
    codes = torch.stack([(words >> 4 * i & 15).to(torch.int8) for i in range(8)], -1)
    codes = codes.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(qact.shape[0] * 64, -1)
    codes = codes if weight.unsigned else (codes ^ 8) - 8
    scales = ascales.permute(0, 2, 4, 3, 1).reshape(ascales.shape[0] * 64, -1)
    low = low.view(*low.shape[:2], 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, -1)
    return codes.float(), scales, low


_FUSED = dict(prepare=prepare, product=product, decode=decode, activations="int4", dtypes=tuple(HALVES), library=LIBRARY,
              same_dtype=True, row_bytes=16, max_rank=launch.MAX_RANK)
VARIANTS = (
    Variant("w4a4_sm80", "fused W4A4 kernels", device=("cuda", (8, 0), (8, 9)), preference=20, **_FUSED),
    # Later GPUs run the same kernels through the compiler's emulation of the 4-bit MMA: right, and slow.
    Variant("w4a4_emulated", "fused W4A4 kernels, 4-bit MMA emulated by the compiler", device=("cuda", (8, 0), LATER),
            on_request=True, **_FUSED))
