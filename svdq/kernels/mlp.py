"""The host half of kernels that multiply, apply GELU and quantise for the next layer, so that what lies between never reaches
memory as numbers.

    operator, feeds = operators(library, file, rings, outputs, signs)

    operator   what the first layer's product takes, and the second layer's smooth and proj_down -> its quantiser's buffers
    feeds      Variant.feeds of it; where there are several forms, with `form` as a keyword

Test: tests/kernels/families/test_mlp.py
"""

from pathlib import Path

import torch

from . import launch
from .errors import ShapeError
from .launch import Updated
from .rows import row_blocks
from .variant import HALVES

SIGNS = {False: "_s4", True: "_u4"}
ONLY_SIGNED = {False: ""}   # of families that know no other codes


def kernels(file, signs, dtypes=tuple(HALVES), forms=("",), low="mlp_low.cuh"):
    """{file: names of its kernels}, for a Library. low is the file of those that add up shares."""
    halves = [HALVES[dtype] for dtype in dtypes]
    return {file: tuple(_name(file, half, sign, form) for form in forms for half in halves for sign in signs.values()),
            low: tuple(f"{Path(low).stem}_{half}" for half in halves)}


def _name(file, half, sign, form):
    return f"{Path(file).stem}_{half}{sign}{form and '_'}{form}"


def shared_memory(device, ring, rank):
    """(bytes of dynamic shared memory of mlp.cuh, whether sums of 128 rows and this rank lie there beside the main loop's
    ring): where two CTAs then still run on a multiprocessor."""
    beside = ring + 128 * rank * 4
    return (beside, True) if launch.runs_twice(device, beside) else (ring, False)


def ctas_of_rows(n, tokens, processors):
    """How many CTAs share the n / 128 tiles of 128 rows: two per multiprocessor, and no more than it takes for the longest walk
    over tiles to be as short as theirs, as each leaves a share of its own."""
    tiles = n // 128
    most = min(tiles, max(1, 2 * processors // row_blocks(tokens, 128)))
    return row_blocks(tiles, row_blocks(tiles, most))


def operators(library, file, rings, outputs, signs):
    """(operator, feeds) of a library of `kernels`.

    rings     {form: bytes of shared memory of its main loop}, {"": bytes} of a family with a single one; forms have normalised
              scales, and a quantiser that stores the largest of each row behind them
    outputs   (x, rank) -> the empty buffers of the family's quantiser, for x [tokens, K]
    signs     SIGNS, or ONLY_SIGNED
    """
    who, normal = Path(file).stem, "" not in rings
    add_up = next(Path(each).stem for each in library.sources if each.startswith("mlp_low"))

    @torch.library.custom_op(f"svdq::{who}", mutates_args=())
    def operator(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor,
                 wcscales: torch.Tensor | None, wtscale: float, proj_up: torch.Tensor | None, bias: torch.Tensor | None,
                 smooth: torch.Tensor, proj_down: torch.Tensor | None, unsigned: bool, tokens: int,
                 columns: torch.Tensor | None = None, form: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the family's quantiser would make of gelu(qact * qweight + low * proj_up + bias) for a second layer.

        qact, ascales, low   from the quantiser, signed, of x [tokens, K]
        qweight [N, K/2] int8, wscales [K/64, N] 16 bit or [K/16, N] e4m3, wcscales [N] | None, wtscale, proj_up [N, R],
        bias [N] | None      of the first layer, as its gemm takes them; wcscales and wtscale are of NVFP4
        smooth [N], proj_down [N, R2] | None, unsigned: of the second, packed; R2 % 16 == 0, R2 <= 128
        columns [N] fp32, form                        where there are forms: of a NormalWeight, whose wscales are fp16

        Returns qact, ascales and low of the second layer as the quantiser does; rows past the tokens are zero.

        Spec: reference.gemm_w4a4, gelu_tanh, quant_down. Source: SVDQuant, arXiv 2411.05007.
        """
        n, k, half, nvfp4 = qweight.shape[0], qweight.shape[-1] * 2, smooth.dtype, wscales.dtype == torch.float8_e4m3fn
        rank, rank2 = low.shape[1] * 16 if low.ndim == 4 else 0, _rank(proj_down)
        name = _name(file, HALVES.get(half), signs.get(unsigned), form)
        if form not in rings or (columns is not None) != normal:
            raise ShapeError(f"{who}: form {form!r}, columns {'missing' if columns is None else 'given'}. Needs "
                             + (f"{' or '.join(map(repr, rings))}, and columns." if normal else "neither form nor columns."))
        if name not in library.sources[file] or n % 128 or k % 128 or rank and proj_up is None:
            raise ShapeError(f"{who}: qweight is {list(qweight.shape)}, smooth {half}, low of rank {rank}, proj_up "
                             f"{'missing' if proj_up is None else 'given'}, unsigned {unsigned}. Needs N and K multiples of "
                             "128, a dtype that its kernels multiply, proj_up where low has ranks, unsigned for INT4 alone.")
        launch.check_rank(who, rank2)
        buffers = outputs(smooth[:1].expand(tokens, k).to("meta"), rank)
        launch.check(who, smooth, **{name: (tensor, tuple(like.shape), like.dtype) for name, tensor, like in zip(
            ("qact", "ascales", "low"), (qact, ascales, low), buffers)}, qweight=(qweight, (n, k // 2), torch.int8),
                     wscales=(wscales, (k // 16, n), wscales.dtype) if nvfp4 else (
                         wscales, (k // 64, n), torch.float16 if normal else half), columns=(columns, (n,), torch.float32),
                     wcscales=(wcscales, (n,), half), proj_up=(proj_up, (n, rank), half), smooth=(smooth, (n,), half),
                     proj_down=(proj_down, (n, rank2), half))
        launch.check(who, smooth, 4, bias=(bias, (n,), half))
        made = outputs(smooth.expand(tokens, n), rank2)
        if not tokens:
            return made
        tiles = row_blocks(tokens, 64) * 4
        ctas = ctas_of_rows(n, tokens, launch.processors(smooth.device))
        shares = torch.empty(ctas, tiles, rank2 // 16, 2, 32, 4, dtype=torch.float32, device=smooth.device)
        shared, in_shared = shared_memory(smooth.device, rings[form], rank2)
        launch.launch(library, smooth, name, (ctas, row_blocks(tokens, 128)), 128,
                      [qact, ascales, qweight, wscales, *((wcscales, wtscale) if nvfp4 else ()), *[columns] * normal, low,
                       proj_up, bias, smooth, proj_down, made[0], made[1], shares, tokens, n, k, rank, rank2, int(in_shared)],
                      shared)
        of_low = tiles * (rank2 // 16)
        if of_low or normal:
            launch.launch(library, smooth, f"{add_up}_{HALVES[half]}", (row_blocks(of_low, 4) + tiles * normal, 1), 128,
                          [shares, made[2], ctas, of_low, Updated(made[1]) if normal else None, n // 64])
        return made

    @operator.register_fake
    def _(qact, ascales, low, qweight, wscales, wcscales, wtscale, proj_up, bias, smooth, proj_down, unsigned, tokens,
          columns=None, form=""):
        return outputs(smooth.expand(tokens, qweight.shape[0]), _rank(proj_down))

    def feeds(prepared, weight, bias, following, tokens, form=""):
        if weight.unsigned or following.rank > launch.MAX_RANK:
            return None
        wcscales, wtscale, columns = (None, 1.0, weight.columns) if normal else (weight.wcscales, float(weight.wtscale), None)
        return operator(*prepared, weight.qweight, weight.wscales, wcscales, wtscale, weight.proj_up, bias, following.smooth,
                        following.proj_down, following.unsigned, tokens, columns, form)

    return operator, feeds


def _rank(proj_down):
    return 0 if proj_down is None else proj_down.shape[-1]
