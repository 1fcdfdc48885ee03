"""The host half of kernels that include adaln.cuh: LayerNorm, modulation and a family's quantiser in one read of x.

    operator, modulates = operators(library, file, outputs)

    operator    x, scale, shift, smooth and proj_down of one or two layers -> the buffers of each layer's quantiser
    modulates   Variant.modulates of it

Test: tests/kernels/families/test_adaln.py
"""

from pathlib import Path

import torch

from . import launch
from .errors import ShapeError
from .launch import Structs, Written
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
    def operator(x: list[torch.Tensor], scale: list[torch.Tensor], shift: list[torch.Tensor], eps: float,
                 smooth: list[torch.Tensor], proj_down: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """LayerNorm and modulation of x, then what the family's quantiser does, for one layer or two, in one launch.

        x             one that both layers read, or one for each: [M, K] of one of `dtypes`, last stride 1, K a multiple of
                      `step` up to 3072, 16-byte aligned rows; M of its own each
        scale, shift  as many as x, [B, K] x.dtype, the same, M a multiple of B
        smooth        one or two of the family's, [K]     proj_down  as many [K, R] x.dtype or None, R % 16 == 0, R <= 128

        Returns the three buffers of the family's quantiser for each layer.

        Spec: reference.modulated, quant_down. Source: arXiv 2212.09748, SVDQuant, arXiv 2411.05007.
        """
        if not len(smooth) == len(proj_down) in (1, 2) or not len(x) == len(scale) == len(shift) in (1, len(smooth)):
            raise ShapeError(f"{who}: {len(x)} x, {len(scale)} scale, {len(shift)} shift, {len(smooth)} smooth and "
                             f"{len(proj_down)} proj_down. Needs one smooth and proj_down, or two, and one x, scale and shift "
                             "for all or one for each.")
        k = x[0].shape[-1]
        for rows, by, plus in zip(x, scale, shift):
            check_input(rows, by, plus, x[0])
        ranks = [_rank(down) for down in proj_down]
        for each, down, rank in zip(smooth, proj_down, ranks):
            launch.check_rank(who, rank)
            launch.check(who, x[0], smooth=(each, (k,), smooth_dtype or x[0].dtype), proj_down=(down, (k, rank), x[0].dtype))
        inputs = list(zip(x, scale, shift)) + [None] * (len(smooth) - len(x))
        made = [outputs(rows, rank) for rows, rank in zip(x * (len(smooth) // len(x)), ranks)]
        longest = max(map(len, x))
        if longest:
            structs = [_struct(*row) for row in zip(inputs, smooth, proj_down, made, ranks)]
            launch.launch(library, x[0], f"{stem}_{HALVES[x[0].dtype]}{kind}",
                          (row_blocks(longest, block) * (block // 16), len(x)), THREADS,
                          [Structs(structs, 2), eps, k, len(smooth) // len(x)])
        return [buffer for buffers in made for buffer in buffers]

    def check_input(x, scale, shift, like):
        tokens, k = launch.check_x(who, x, step, 16)
        if x.dtype not in dtypes or k > WIDEST or (k, x.dtype, x.device) != (like.shape[1], like.dtype, like.device):
            raise ShapeError(f"{who}: x is {list(x.shape)} {x.dtype} on {x.device}. Needs K up to {WIDEST} and "
                             f"{' or '.join(map(short, dtypes))}, and of two the same on the same device.")
        items = scale.shape[0] if scale.ndim else 0
        for name, tensor in (("scale", scale), ("shift", shift)):
            if (tensor.shape != (items, k) or tensor.dtype != x.dtype or tensor.device != x.device or not items
                    or tokens % items or not is_aligned(tensor, 16)):
                raise ShapeError(f"{who}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
                                 f"{tensor.stride()}. Needs [items, {k}] {x.dtype} on {x.device}, as many items as scale has, "
                                 f"{tokens} rows a multiple of them, last stride 1 and rows aligned to 16 bytes.")

    @operator.register_fake
    def _(x, scale, shift, eps, smooth, proj_down):
        return [buffer for rows, down in zip(x * (len(smooth) // len(x)), proj_down) for buffer in outputs(rows, _rank(down))]

    def modulates(jobs):
        made = [None] * len(jobs)
        for places in _launches([(place, x) for place, (x, weight) in enumerate(jobs) if fits(x, weight)]):
            inputs = list(dict.fromkeys(jobs[place][0] for place in places))
            weights = [jobs[place][1] for place in places]
            buffers = operator([x.x for x in inputs], [x.scale for x in inputs], [x.shift for x in inputs], inputs[0].eps,
                               [getattr(weight, smooth) for weight in weights], [weight.proj_down for weight in weights])
            for i, place in enumerate(places):
                made[place] = tuple(buffers[3 * i:3 * i + 3])
        return made

    def fits(modulated, weight):
        return (not weight.unsigned and modulated.x.shape[1] <= WIDEST
                and all(is_aligned(rows, 16) for rows in (modulated.x, modulated.scale, modulated.shift)))

    return operator, modulates


def _launches(inputs):
    """[(place, Modulated)] -> [one or two places]: those of one Modulated together, what is left of these with another like
    it."""
    of_one, launches, left = {}, [], {}
    for place, x in inputs:
        of_one.setdefault(x, []).append(place)
    for x, places in of_one.items():
        launches += zip(places[::2], places[1::2])
        if len(places) % 2:
            left.setdefault((x.x.shape[1], x.dtype, x.device, x.eps), []).append(places[-1])
    return launches + [places[i:i + 2] for places in left.values() for i in range(0, len(places), 2)]


def _struct(given, smooth, proj_down, buffers, rank):
    """The fields of adaln::Layer. given: (x, scale, shift), or None for a layer that reads the first one's."""
    x, scale, shift = given or (None, None, None)
    sizes = (0,) * 5 if x is None else (len(x) // len(scale), len(x), x.stride(0), scale.stride(0), shift.stride(0))
    return [x, scale, shift, smooth, proj_down, *map(Written, buffers), rank, *sizes]


def _rank(proj_down):
    return 0 if proj_down is None else proj_down.shape[-1]
