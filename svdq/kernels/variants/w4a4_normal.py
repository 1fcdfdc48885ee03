"""W4A4 on sm_80, 86 and 89 with scales that fp16 can take: kernels, and an order of the weight made for them.

    NormalWeight        the layer as they read it, made once from the checkpoint's tensors and back to the bit
    quant_down_normal   x -> int4 codes, scales and the largest of each row, x @ proj_down          cuda/quant_down_normal.cuh
    gemm_w4a4_normal    those and the weight -> out; sums in packed fp16 (fp16n) or by the tensor cores in fp32 (diag)
    mlp_w4a4_normal     the same product, GELU, and what quant_down_normal makes of it       cuda/mlp_w4a4_normal.cuh

Both forms read the same weight and the same activations. w4a4_sm80 does all of it in fp32: the most exact of the three.

Test: tests/kernels/families/test_w4a4_normal.py
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from .. import layout, mlp, w4a4
from ..errors import ShapeError
from ..variant import HALVES, LATER, Variant
from ..weights import W4A4Weight, Weight

FORMS = {"fp16n": 64, "diag": 128}
LIBRARY = w4a4.library("w4a4_normal", "quant_down_normal.cuh", "gemm_w4a4_normal.cuh", "adaln_int4_normal.cuh", HALVES,
                       FORMS, mlp.kernels("mlp_w4a4_normal.cuh", mlp.SIGNS, forms=FORMS))
quant_down, gemm, _FUSED = w4a4.operators(LIBRARY, tuple(HALVES), FORMS)
RINGS = {form: stages * w4a4.STAGE + 512 for form, stages in (("fp16n", 3), ("diag", 4))}       # and factors of 128 rows
mlp_w4a4_normal, feeds = mlp.operators(LIBRARY, "mlp_w4a4_normal.cuh", RINGS, partial(w4a4.quant_down_outputs, peaks=1),
                                       mlp.SIGNS)

# Of w4a4_normal.cuh: the largest sum of a group, half a step of the largest fp16 numbers, and the largest of them.
GROUP_SUM, HALF_STEP, TOP = 64 * 15 * 8, 16, 65504


@dataclass(frozen=True)
class NormalWeight(Weight, kind="normal"):
    """One W4A4 int4 linear, [N, K], for w4a4_normal.cuh.

    qweight    [N, K/2]   int8                  as in the checkpoint, as are smooth, proj_down and proj_up
    wscales    [K/64, N]  fp16                  in its order, divided by their column's power of two
    columns    [N]        fp32                  these
    kept       [K/64, N]  bf16 | fp16 | None    the checkpoint's scales where one is no fp16 number then, being far below its
                                                column's largest
    """
    unsigned: bool
    qweight: torch.Tensor
    wscales: torch.Tensor
    columns: torch.Tensor
    smooth: torch.Tensor
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    precision = "int4"

    @property
    def shape(self):
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def dtype(self):
        return self.smooth.dtype

    def cut(self, start, stop):
        def part(tensor):                       # every tensor but smooth and proj_down runs over N in blocks of 128 first
            if tensor is None:
                return None
            flat, per_row = tensor.reshape(-1), tensor.numel() // self.shape[0]
            return flat[start * per_row:stop * per_row]

        rows = slice(start, stop)
        wscales, kept = (None if each is None else part(each).view(-1, stop - start) for each in (self.wscales, self.kept))
        return replace(self, qweight=self.qweight[rows], wscales=wscales, columns=self.columns[rows], kept=kept,
                       proj_up=None if self.proj_up is None else self.proj_up[rows])

    @classmethod
    def pack(cls, weight):
        """A W4A4Weight, int4 -> the same on the same device, which shares all tensors but the scales.

        Raises ShapeError for nvfp4, and where K is too large for sums in fp16.
        """
        n, k = weight.shape
        if weight.precision != "int4":
            raise ShapeError(f"NormalWeight: the weight is {weight.precision}. Needs int4; others keep the file's layout.")
        scales = layout.unpack_scales(weight.wscales).float()
        largest = torch.where(scales.isfinite(), scales.abs(), 0).amax(1)
        _, exponents = largest.frexp()                          # of the power of two above it
        columns = torch.ldexp(scales.new_ones(n), (exponents + headroom(k // 64)).clamp(-126, 127))
        wscales = layout.pack_scales((scales / columns[:, None]).half())
        packed = cls(weight.unsigned, weight.qweight, wscales, columns, weight.smooth, weight.proj_down, weight.proj_up)
        if weight.qweight.is_meta:                              # there are no numbers to compare
            return packed
        same = torch.equal(packed.unpack().wscales.view(torch.int16), weight.wscales.view(torch.int16))
        return packed if same else replace(packed, kept=weight.wscales)

    def unpack(self):
        scales = self.kept
        if scales is None:
            plain = layout.unpack_scales(self.wscales).float() * self.columns[:, None]
            scales = layout.pack_scales(plain.to(self.dtype))
        return W4A4Weight("int4", self.unsigned, self.qweight, scales, self.smooth, self.proj_down, self.proj_up)


def headroom(groups):
    """The least C such that sums over so many groups stay in fp16 when scales are below 2^-C: I1 of w4a4_normal.cuh.

    Raises ShapeError where there is none.
    """
    rooms = [int(TOP / (GROUP_SUM / 2**c + HALF_STEP)) for c in range(12)]
    if groups > rooms[-1]:
        raise ShapeError(f"NormalWeight: K is {64 * groups}. Sums in fp16 have room for {64 * rooms[-1]}.")
    return next(c for c, room in enumerate(rooms) if groups <= room)


def _variants(name, how, form, device, **more):
    """The Variant of a form, and the same for later GPUs, by the compiler's emulation of the 4-bit MMA: right, and slow."""
    fields = _FUSED | dict(layout=NormalWeight, product=partial(_FUSED["product"], form=form),
                           feeds=partial(feeds, form=form)) | more
    return (Variant(name, how, device=device, **fields),
            Variant(f"{name}_emulated", f"{how}, 4-bit MMA emulated by the compiler", device=("cuda", (8, 0), LATER),
                    **fields | dict(preference=0, on_request=True)))


# Preferences, which decide where nothing can be timed, are by data sheets (docs/kernels.md): on an A100 an MMA takes w4a4_sm80
# 17 cycles, by its FFMAs, diag 12 and fp16n, which is the least exact, 11.6. On RTX 30 and 40 tensor cores limit w4a4_sm80 and
# fp16n alike, so the exact one comes first.
_FUSED["rivals"] = "w4a4"
VARIANTS = (
    *_variants("w4a4_fp16n", "fused W4A4 kernels, sums in fp16", "fp16n", ("cuda", (8, 0), (8, 9)), preference=19,
               sum_error=3e-3),
    *_variants("w4a4_diag", "fused W4A4 kernels, sums by tensor cores", "diag", ("cuda", (8, 0), (8, 0)), preference=21,
               sum_error=1e-3))
