"""The host half of kernels that multiply, apply GELU and quantise for the next layer, so that what lies between never reaches
memory as numbers.

    operator, feeds = operators(library, file, outputs)

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

SIGNS = {False: "s4", True: "u4"}
STAGES = 3 * 8960           # bytes of the ring of mlp_w4a4.cuh


def shared_bytes(rank):
    """Dynamic shared memory of the kernel for a second layer of this rank: the ring, and sums of 128 rows."""
    return STAGES + 128 * rank * 4


def kernels(file, low_file):
    """{file: names of its kernels}, for a Library."""
    return {file: tuple(f"{Path(file).stem}_{half}_{sign}" for half in HALVES.values() for sign in SIGNS.values()),
            low_file: tuple(f"{Path(low_file).stem}_{half}" for half in HALVES.values())}


def operators(library, file, outputs):
    """(operator, feeds) of a library of `kernels`.

    outputs   (x, rank) -> the empty buffers of the quantiser
    """
    who = Path(file).stem

    @torch.library.custom_op(f"svdq::{who}", mutates_args=())
    def operator(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor,
                 proj_up: torch.Tensor | None, bias: torch.Tensor | None, smooth: torch.Tensor,
                 proj_down: torch.Tensor | None, unsigned: bool,
                 tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What quant_down would make of gelu(qact * qweight + low * proj_up + bias) for a second layer.

        qact, ascales, low   from quant_down, signed, of x [tokens, K]
        qweight [N, K/2] int8, wscales [K/64, N], proj_up [N, R], bias [N] | None: of the first layer, as its gemm takes them
        smooth [N], proj_down [N, R2] | None, unsigned: of the second, packed; R2 % 16 == 0, R2 <= 128

        Returns qact, ascales and low of the second layer as quant_down does; rows past the tokens are zero.

        Spec: reference.gemm_w4a4, gelu_tanh, quant_down. Source: SVDQuant, arXiv 2411.05007.
        """
        n, k, half = qweight.shape[0], qweight.shape[-1] * 2, smooth.dtype
        rank, rank2 = low.shape[1] * 16 if low.ndim == 4 else 0, _rank(proj_down)
        if half not in HALVES or n % 128 or rank and proj_up is None:
            raise ShapeError(f"{who}: qweight is {list(qweight.shape)}, smooth {half}, low of rank {rank}, proj_up "
                             f"{'missing' if proj_up is None else 'given'}. Needs N a multiple of 128, bf16 or fp16, and "
                             "proj_up where low has ranks.")
        launch.check_rank(who, rank2)
        blocks, groups = row_blocks(tokens, 64), k // 64
        launch.check(who, smooth, qact=(qact, (blocks, groups, 4, 32, 4), torch.int32),
                     ascales=(ascales, (blocks, groups, 4, 8, 2), torch.float32),
                     low=(low, (blocks * 4, rank // 16, 32, 8), half),
                     qweight=(qweight, (n, groups * 32), torch.int8), wscales=(wscales, (groups, n), half),
                     proj_up=(proj_up, (n, rank), half), smooth=(smooth, (n,), half), proj_down=(proj_down, (n, rank2), half))
        launch.check(who, smooth, 4, bias=(bias, (n,), half))
        made = outputs(smooth.expand(tokens, n), rank2)
        if not tokens:
            return made
        ctas = min(n // 128, max(1, 2 * launch.processors(smooth.device) // row_blocks(tokens, 128)))
        shares = torch.empty(ctas, blocks * 4, rank2 // 16, 2, 32, 4, dtype=torch.float32, device=smooth.device)
        launch.launch(library, smooth, f"{who}_{HALVES[half]}_{SIGNS[unsigned]}", (ctas, row_blocks(tokens, 128)), 128,
                      [qact, ascales, qweight, wscales, low, proj_up, bias, smooth, proj_down, made[0], made[1], shares, tokens,
                       n, k, rank, rank2], shared_bytes(rank2))
        if rank2:
            tiles = blocks * 4 * (rank2 // 16)
            launch.launch(library, smooth, f"mlp_low_{HALVES[half]}", (row_blocks(tiles, 4), 1), 128,
                          [shares, made[2], ctas, tiles])
        return made

    @operator.register_fake
    def _(qact, ascales, low, qweight, wscales, proj_up, bias, smooth, proj_down, unsigned, tokens):
        return outputs(smooth.expand(tokens, qweight.shape[0]), _rank(proj_down))

    def feeds(prepared, weight, bias, following, tokens):
        device = following.device
        if weight.unsigned or following.rank > launch.MAX_RANK or not launch.runs_twice(device, shared_bytes(following.rank)):
            return None
        return operator(*prepared, weight.qweight, weight.wscales, weight.proj_up, bias, following.smooth, following.proj_down,
                        following.unsigned, tokens)

    return operator, feeds


def _rank(proj_down):
    return 0 if proj_down is None else proj_down.shape[-1]
