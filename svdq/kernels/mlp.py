"""The host half of kernels that multiply, apply GELU and quantise for the next layer, so that what lies between never reaches
memory as numbers.

    operator, feeds = operators(library, file, stage, outputs, signs)

    operator   what the first layer's product takes, and the second layer's smooth and proj_down -> its quantiser's buffers
    feeds      Variant.feeds of it

Test: tests/kernels/families/test_mlp.py
"""

from pathlib import Path

import torch

from . import launch
from .errors import ShapeError
from .rows import row_blocks
from .variant import HALVES

SIGNS = {False: "_s4", True: "_u4"}
ONLY_SIGNED = {False: ""}   # of families that know no other codes
LOW = "mlp_low.cuh"


def kernels(file, signs):
    """{file: names of its kernels}, for a Library."""
    return {file: tuple(f"{Path(file).stem}_{half}{sign}" for half in HALVES.values() for sign in signs.values()),
            LOW: tuple(f"mlp_low_{half}" for half in HALVES.values())}


def shared_bytes(stage, rank):
    """Dynamic shared memory of mlp.cuh for a second layer of this rank: three stages, and sums of 128 rows."""
    return 3 * stage + 128 * rank * 4


def operators(library, file, stage, outputs, signs):
    """(operator, feeds) of a library of `kernels`.

    stage     bytes of a stage of the main loop
    outputs   (x, rank) -> the empty buffers of the family's quantiser, for x [tokens, K]
    signs     SIGNS, or ONLY_SIGNED
    """
    who = Path(file).stem

    @torch.library.custom_op(f"svdq::{who}", mutates_args=())
    def operator(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor,
                 wcscales: torch.Tensor | None, wtscale: float, proj_up: torch.Tensor | None, bias: torch.Tensor | None,
                 smooth: torch.Tensor, proj_down: torch.Tensor | None, unsigned: bool,
                 tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the family's quantiser would make of gelu(qact * qweight + low * proj_up + bias) for a second layer.

        qact, ascales, low   from the quantiser, signed, of x [tokens, K]
        qweight [N, K/2] int8, wscales [K/64, N] 16 bit or [K/16, N] e4m3, wcscales [N] | None, wtscale, proj_up [N, R],
        bias [N] | None      of the first layer, as its gemm takes them; wcscales and wtscale are of NVFP4
        smooth [N], proj_down [N, R2] | None, unsigned: of the second, packed; R2 % 16 == 0, R2 <= 128

        Returns qact, ascales and low of the second layer as the quantiser does; rows past the tokens are zero.

        Spec: reference.gemm_w4a4, gelu_tanh, quant_down. Source: SVDQuant, arXiv 2411.05007.
        """
        n, k, half, nvfp4 = qweight.shape[0], qweight.shape[-1] * 2, smooth.dtype, wscales.dtype == torch.float8_e4m3fn
        rank, rank2 = low.shape[1] * 16 if low.ndim == 4 else 0, _rank(proj_down)
        if half not in HALVES or n % 128 or k % 128 or rank and proj_up is None or unsigned not in signs:
            raise ShapeError(f"{who}: qweight is {list(qweight.shape)}, smooth {half}, low of rank {rank}, proj_up "
                             f"{'missing' if proj_up is None else 'given'}, unsigned {unsigned}. Needs N and K multiples of "
                             "128, bf16 or fp16, proj_up where low has ranks, and unsigned for INT4 alone.")
        launch.check_rank(who, rank2)
        buffers = outputs(smooth[:1].expand(tokens, k).to("meta"), rank)
        launch.check(who, smooth, **{name: (tensor, tuple(like.shape), like.dtype) for name, tensor, like in zip(
            ("qact", "ascales", "low"), (qact, ascales, low), buffers)}, qweight=(qweight, (n, k // 2), torch.int8),
                     wscales=(wscales, (k // 16, n), wscales.dtype) if nvfp4 else (wscales, (k // 64, n), half),
                     wcscales=(wcscales, (n,), half), proj_up=(proj_up, (n, rank), half), smooth=(smooth, (n,), half),
                     proj_down=(proj_down, (n, rank2), half))
        launch.check(who, smooth, 4, bias=(bias, (n,), half))
        made = outputs(smooth.expand(tokens, n), rank2)
        if not tokens:
            return made
        tiles = row_blocks(tokens, 64) * 4
        ctas = min(n // 128, max(1, 2 * launch.processors(smooth.device) // row_blocks(tokens, 128)))
        shares = torch.empty(ctas, tiles, rank2 // 16, 2, 32, 4, dtype=torch.float32, device=smooth.device)
        launch.launch(library, smooth, f"{who}_{HALVES[half]}{signs[unsigned]}", (ctas, row_blocks(tokens, 128)), 128,
                      [qact, ascales, qweight, wscales, *((wcscales, wtscale) if nvfp4 else ()), low, proj_up, bias, smooth,
                       proj_down, made[0], made[1], shares, tokens, n, k, rank, rank2], shared_bytes(stage, rank2))
        if rank2:
            launch.launch(library, smooth, f"mlp_low_{HALVES[half]}", (row_blocks(tiles * (rank2 // 16), 4), 1), 128,
                          [shares, made[2], ctas, tiles * (rank2 // 16)])
        return made

    @operator.register_fake
    def _(qact, ascales, low, qweight, wscales, wcscales, wtscale, proj_up, bias, smooth, proj_down, unsigned, tokens):
        return outputs(smooth.expand(tokens, qweight.shape[0]), _rank(proj_down))

    def feeds(prepared, weight, bias, following, tokens):
        rank = following.rank
        if (weight.unsigned or rank > launch.MAX_RANK
                or not launch.runs_twice(following.device, shared_bytes(stage, rank))):
            return None
        return operator(*prepared, weight.qweight, weight.wscales, weight.wcscales, float(weight.wtscale), weight.proj_up, bias,
                        following.smooth, following.proj_down, following.unsigned, tokens)

    return operator, feeds


def _rank(proj_down):
    return 0 if proj_down is None else proj_down.shape[-1]
