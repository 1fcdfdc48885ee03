"""The host half of kernels that include adaln.cuh: LayerNorm, modulation and a family's quantiser in one read of x.

    operator, modulates = operators(library, file, outputs)

    operator    x, scale, shift and one or two layers' smooth and proj_down -> the buffers of each layer's quantiser
    modulates   Variant.modulates of it

Test: tests/kernels/families/test_adaln.py
"""

from pathlib import Path

import torch

from . import launch
from .errors import ShapeError
from .rows import is_aligned, row_blocks
from .variant import HALVES, short

THREADS = 512
WIDEST = 64 * 16 * 3        # K: groups of 64 columns, by 16 warps, of which each holds three


def operators(library, file, outputs, dtypes=tuple(HALVES), smooth="smooth", smooth_dtype=None, block=64, step=64,
              kind=""):
    """(operator, modulates) of a file of cuda/.

    outputs        (x, rank) -> the empty buffers of one layer, three
    smooth         the field of the weight that the kernel takes as smooth; smooth_dtype: None for that of x
    block, step    rows that the buffers are rounded up to; what K is a multiple of
    kind           what a kernel's name ends in after the dtype; the operator's name, too
    """
    stem = Path(file).stem
    who = stem + kind

    @torch.library.custom_op(f"svdq::{who}", mutates_args=())
    def operator(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, smooth: list[torch.Tensor],
                 proj_down: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """LayerNorm and modulation of x, then what the family's quantiser does, for one layer or two.

        x             [M, K] of one of `dtypes`, last stride 1, K a multiple of `step` up to 3072, 16-byte aligned rows
        scale, shift  [B, K] x.dtype, the same, M a multiple of B
        smooth        one or two of the family's, [K]     proj_down  as many [K, R] x.dtype or None, R % 16 == 0, R <= 128

        Returns the three buffers of the family's quantiser for each layer.

        Spec: reference.modulated, quant_down. Source: arXiv 2212.09748, SVDQuant, arXiv 2411.05007.
        """
        tokens, k = launch.check_x(who, x, step, 16)
        if x.dtype not in dtypes or k > WIDEST:
            raise ShapeError(f"{who}: x is {list(x.shape)} {x.dtype}. Needs K up to {WIDEST} and "
                             f"{' or '.join(map(short, dtypes))}.")
        items = scale.shape[0] if scale.ndim else 0
        for name, tensor in (("scale", scale), ("shift", shift)):
            if (tensor.shape != (items, k) or tensor.dtype != x.dtype or tensor.device != x.device or not items
                    or tokens % items or not is_aligned(tensor, 16)):
                raise ShapeError(f"{who}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
                                 f"{tensor.stride()}. Needs [items, {k}] {x.dtype} on {x.device}, as many items as scale has, "
                                 f"{tokens} rows a multiple of them, last stride 1 and rows aligned to 16 bytes.")
        if not len(smooth) == len(proj_down) in (1, 2):
            raise ShapeError(f"{who}: {len(smooth)} smooth and {len(proj_down)} proj_down. Needs one of each, or two.")
        ranks = [_rank(down) for down in proj_down]
        for each, down, rank in zip(smooth, proj_down, ranks):
            launch.check_rank(who, rank)
            launch.check(who, x, smooth=(each, (k,), smooth_dtype or x.dtype), proj_down=(down, (k, rank), x.dtype))
        made = [outputs(x, rank) for rank in ranks]
        if tokens:
            sets = [argument for each, down, buffers in zip(smooth, proj_down, made) for argument in (each, down, *buffers)]
            launch.launch(library, x, f"{stem}_{HALVES[x.dtype]}{kind}", (row_blocks(tokens, block) * (block // 16), 1),
                          THREADS, [x, scale, shift, *sets, *[None] * (10 - len(sets)), eps, tokens // items, tokens, k,
                                    *ranks, *[0] * (2 - len(ranks)), x.stride(0), scale.stride(0), shift.stride(0)])
        return [buffer for buffers in made for buffer in buffers]

    @operator.register_fake
    def _(x, scale, shift, eps, smooth, proj_down):
        return [buffer for down in proj_down for buffer in outputs(x, _rank(down))]

    def modulates(modulated, weights):
        x, scale, shift = modulated.x, modulated.scale, modulated.shift
        if (x.shape[1] > WIDEST or not all(is_aligned(rows, 16) for rows in (x, scale, shift))
                or any(weight.unsigned for weight in weights)):
            return None
        made = operator(x, scale, shift, modulated.eps, [getattr(weight, smooth) for weight in weights],
                        [weight.proj_down for weight in weights])
        return [tuple(made[i:i + 3]) for i in range(0, len(made), 3)]

    return operator, modulates


def _rank(proj_down):
    return 0 if proj_down is None else proj_down.shape[-1]
