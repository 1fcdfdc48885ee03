"""NVFP4 on sm_120 and 121, whose tensor cores multiply e2m1 with scales of e4m3: two kernels, which read the file's order.

    quant_nvfp4   x -> e2m1 codes, scales, x @ proj_down          cuda/quant_nvfp4.cuh
    gemm_nvfp4    those and the weight -> out                      cuda/gemm_nvfp4.cuh

Buffers between them are laid out as the .cuh files say; `decode` brings them into plain order.

Test: tests/kernels/families/test_nvfp4_sm120.py
"""

import torch

from .. import adaln, epilogues, launch, layout, mlp
from ..build import Library
from ..errors import ShapeError
from ..launch import Updated
from ..rows import row_blocks
from ..variant import HALVES, Variant

RANKS = {False: "r32", True: "r128"}         # whether the rank is above 32
LIBRARY = Library("nvfp4_sm120", {
    "quant_nvfp4.cuh": tuple(f"quant_nvfp4_{half}_{rank}" for half in HALVES.values() for rank in RANKS.values()),
    "gemm_nvfp4.cuh": tuple(f"gemm_nvfp4_{half}" for half in HALVES.values()),
    "adaln_nvfp4.cuh": tuple(f"adaln_nvfp4_{half}" for half in HALVES.values()),
    **mlp.kernels("mlp_nvfp4.cuh", mlp.ONLY_SIGNED)}, specific=True)
RINGS = {"": 3 * 9216}      # bytes: three stages of 64 columns, of nvfp4_ring.cuh


@torch.library.custom_op("svdq::quant_nvfp4", mutates_args=())
def quant_nvfp4(x: torch.Tensor, smooth: torch.Tensor,
                proj_down: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to e2m1 and run the low-rank down projection, in one pass over x.

    x          [M, K] bf16 | fp16, last stride 1, K % 64 == 0, 4-byte aligned rows
    smooth     [K] x.dtype       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128      both packed (layout.py)

    qact       [M/64, K/64, 4, 32, 4] int32, ascales [M/64, K/64, 32, 2] int32, four e4m3 each, low [M/16, R/16, 32, 8]
               x.dtype, in the order quant_nvfp4.cuh describes, M rounded up to 64; rows past M are zero

    Spec: reference.quant_down. Source: SVDQuant, arXiv 2411.05007.
    """
    tokens, k = launch.check_x("quant_nvfp4", x, 64, 4)
    rank = 0 if proj_down is None else proj_down.shape[-1]
    launch.check_rank("quant_nvfp4", rank)
    launch.check("quant_nvfp4", x, smooth=(smooth, (k,), x.dtype), proj_down=(proj_down, (k, rank), x.dtype))
    outputs = quant_nvfp4_outputs(x, rank)
    if tokens:
        launch.launch(LIBRARY, x, f"quant_nvfp4_{HALVES[x.dtype]}_{RANKS[rank > 32]}", (row_blocks(tokens, 64) * 4, 1), 256,
                      [x, smooth, proj_down, *outputs, tokens, k, rank, x.stride(0)])
    return outputs


@quant_nvfp4.register_fake
def _(x, smooth, proj_down):
    return quant_nvfp4_outputs(x, 0 if proj_down is None else proj_down.shape[1])


def quant_nvfp4_outputs(x, rank):
    blocks, steps = row_blocks(x.shape[0], 64), x.shape[1] // 64
    return (x.new_empty(blocks, steps, 4, 32, 4, dtype=torch.int32),
            x.new_empty(blocks, steps, 32, 2, dtype=torch.int32), x.new_empty(blocks * 4, rank // 16, 32, 8))


@torch.library.custom_op("svdq::gemm_nvfp4", mutates_args=("out",))
def gemm_nvfp4(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor,
               wcscales: torch.Tensor | None, wtscale: float, proj_up: torch.Tensor | None, bias: torch.Tensor | None,
               out: torch.Tensor, accumulate: bool,
               epilogue: str = "store", residual: torch.Tensor | None = None, gate: torch.Tensor | None = None,
               query: torch.Tensor | None = None, key: torch.Tensor | None = None, rotation: torch.Tensor | None = None,
               eps: float = 0.0) -> None:
    """out = epilogue(y), where y = qact * qweight * wtscale * wcscales + low * proj_up + bias, with accumulate (store,
    gated) + out as it was.

    qact, ascales, low   from quant_nvfp4         qweight [N, K/2] int8, wscales [K/16, N] e4m3, wcscales [N] out.dtype or None,
    bias [N] plain order or None                  proj_up [N, R] out.dtype: packed        K % 128 == 0
    out [M, N] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows

    epilogue ... and its operands, see launch.epilogue_arguments

    Spec: reference.gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope. Source: SVDQuant, arXiv 2411.05007.
    """
    n, k = qweight.shape[0], qweight.shape[-1] * 2
    launch.check_out("gemm_nvfp4", out, n)
    tokens, rank, half = out.shape[0], low.shape[1] * 16 if low.ndim == 4 else 0, out.dtype
    if rank and proj_up is None:
        raise ShapeError(f"gemm_nvfp4: low has rank {rank} but proj_up is missing.")
    if k % 128:
        raise ShapeError(f"gemm_nvfp4: qweight is {list(qweight.shape)}. Needs [N, K/2] with K a multiple of 128.")
    last = launch.epilogue_arguments("gemm_nvfp4", out, accumulate, epilogue, residual, gate, query, key, rotation, eps)
    blocks, steps = row_blocks(tokens, 64), k // 64
    launch.check("gemm_nvfp4", out, qact=(qact, (blocks, steps, 4, 32, 4), torch.int32),
                 ascales=(ascales, (blocks, steps, 32, 2), torch.int32),
                 low=(low, (blocks * 4, rank // 16, 32, 8), half), qweight=(qweight, (n, steps * 32), torch.int8),
                 wscales=(wscales, (steps * 4, n), torch.float8_e4m3fn), wcscales=(wcscales, (n,), half),
                 proj_up=(proj_up, (n, rank), half))
    launch.check("gemm_nvfp4", out, 4, bias=(bias, (n,), half))
    if tokens:
        launch.launch(LIBRARY, out, f"gemm_nvfp4_{HALVES[half]}", (n // 128, row_blocks(tokens, 128)), 128,
                      [qact, ascales, qweight, wscales, wcscales, wtscale, low, proj_up, bias,
                       Updated(out) if accumulate else out, tokens, n, k, rank, out.stride(0), int(accumulate), *last])


def prepare(x, weight):
    """(qact, ascales, low), see quant_nvfp4."""
    return quant_nvfp4(x, weight.smooth, weight.proj_down)


def product(prepared, weight, out, bias, accumulate, epilogue=None):
    gemm_nvfp4(*prepared, weight.qweight, weight.wscales, weight.wcscales, float(weight.wtscale), weight.proj_up, bias, out,
               accumulate, **epilogues.arguments(epilogue))


def decode(prepared, weight):
    """(values of the codes fp32 [M, K], scales fp32 [M, K/16], low [M, R]) in plain order, M rounded up to 64."""
    qact, ascales, low = prepared
    words = qact.view(*qact.shape[:2], 4, 8, 4, 2, 2)               # g t, half of K, half of the rows; 8 codes each
    codes = torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in range(8)], -1)
    codes = codes.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(qact.shape[0] * 64, -1)
    scales = ascales.view(torch.float8_e4m3fn).float()
    scales = scales.view(*ascales.shape[:2], 8, 2, 2, 2, 4)         # g, m16, half of the rows, m32; 4 groups
    scales = scales.permute(0, 5, 3, 4, 2, 1, 6).reshape(ascales.shape[0] * 64, -1)
    low = low.view(*low.shape[:2], 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, -1)
    return layout.e2m1(codes), scales, low


mlp_nvfp4, feeds = mlp.operators(LIBRARY, "mlp_nvfp4.cuh", RINGS, quant_nvfp4_outputs, mlp.ONLY_SIGNED)
VARIANTS = (
    Variant("nvfp4_sm120", "fused NVFP4 kernels", prepare, product, precisions=("nvfp4",), activations="nvfp4",
            device=("cuda", (12, 0), (12, 1)), dtypes=tuple(HALVES), library=LIBRARY, same_dtype=True, row_bytes=16,
            max_rank=launch.MAX_RANK, epilogues=epilogues.ALL, preference=20, decode=decode,
            modulates=adaln.operators(LIBRARY, "adaln_nvfp4.cuh", quant_nvfp4_outputs)[1], feeds=feeds),)
