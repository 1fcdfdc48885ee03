"""A W4A4 layer as the Hopper kernels read it, made once from the checkpoint's tensors and convertible back.

The values are the same; what changes is their order, the scales' dtype and, for a layer that has a code -8, the size of a
code. Everything runs on the device of the weight.

    repack(W4A4Weight) -> FP8Weight          FP8Weight.unpack() -> W4A4Weight, equal to the bit

Test: tests/kernels/test_hopper.py
"""

from dataclasses import dataclass

import torch

from . import layout
from .errors import ShapeError
from .weights import W4A4Weight, Weight

TILE_N, TILE_K = 256, 128       # of gemm_fp8.cuh
SCALE = 512.0                   # an e4m3 byte 0..15 is its number times 2^-9
CODES_AT_ONCE = 1 << 24         # repacked at a time: their temporaries are a few bytes each

# f: features of a tile, k: inputs of a tile. Warpgroup wg, sub-tile sub and warp w own 16 features, rows 8h + g of a wgmma's
# A; group gr, k32 step s; byte j of the register (q, h) of thread (w g t) is input 16q + 4t + j of the step.
_BYTES  = layout._Layout("nt wg sub w h g   kt gr s q t j", "nt kt wg sub gr s w g t q h j", wg=2, sub=2, w=4, h=2, g=8,
                         gr=2, s=2, q=2, t=4, j=4)
_SCALES = layout._Layout("nt b h g   kt gr", "nt kt gr b g h", b=16, h=2, g=8, gr=2)
_DOWN   = layout._Layout("gr t c kb j   r", "gr c kb t j r", t=4, c=4, kb=2, j=2)


@dataclass(frozen=True)
class FP8Weight(Weight, kind="fp8"):
    """One W4A4 int4 linear, [N, K], for gemm_fp8.cuh and quant_fp8.cuh, which say more of the order.

    qweight    [N/256, K/128, B]    uint8        B = 16384: two 4-bit codes per byte, 32768: one e4m3 code per byte
    wscales    [N/256, K/128, 512]  fp32         512 times the checkpoint's, one per feature and 64 inputs
    inverse    [K]                  fp32         1 / smooth
    proj_down  [K, R]               bf16 | fp16 | None
    proj_up    [N, R]               bf16 | fp16 | None      as in the checkpoint
    dtype                                        of the checkpoint's scales
    unsigned   bool                              activations are shifted by 0.171875
    """
    unsigned: bool
    dtype: torch.dtype
    n: int
    qweight: torch.Tensor
    wscales: torch.Tensor
    inverse: torch.Tensor
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None

    precision = "int4"

    @property
    def shape(self):
        return self.n, self.inverse.shape[0]

    @property
    def wide(self):
        """Whether codes are bytes, because one of them is -8."""
        return self.qweight.shape[2] == TILE_N * TILE_K

    def codes(self):
        """[N, K] int8 -8..7"""
        tiles = self.qweight.shape[:2]
        if self.wide:
            stored = self.qweight
        else:
            words = self.qweight.view(*tiles, 2, 2, 2, 128, 2, 2, 4)              # wg sub gr thread s q j
            p = words & 0x87
            q = (words >> 4 | words.roll(-1, -1) << 4) & 0x87
            stored = torch.stack((p, q), -2).movedim(6, 5)
        n, k = tiles[0] * TILE_N, tiles[1] * TILE_K
        plain = _BYTES.unpack(stored.contiguous(), (n, k), nt=tiles[0], kt=tiles[1])[:self.n]
        magnitude = (plain & 15).view(torch.int8)
        return torch.where(plain >= 128, -magnitude, magnitude)

    def branch(self):
        if self.proj_down is None:
            return None
        down, up = super().branch()
        return _DOWN.unpack(down, down.shape, gr=len(down) // 64, r=down.shape[1]), up

    @staticmethod
    def pack_down(factor):
        return layout.pack_down(_DOWN.pack(factor, factor.shape, gr=len(factor) // 64, r=factor.shape[1]))

    def unpack(self):
        (n, k), tiles = self.shape, self.qweight.shape[:2]
        wscales = _SCALES.unpack(self.wscales, (tiles[0] * TILE_N, k // 64), nt=tiles[0], kt=tiles[1])[:n] / SCALE
        return W4A4Weight("int4", self.unsigned, layout.pack_codes(self.codes()), layout.pack_scales(wscales.to(self.dtype)),
                          layout.pack_vector((1 / self.inverse).to(self.dtype)),
                          None if self.proj_down is None else layout.pack_down(self.branch()[0]), self.proj_up)


def repack(weight):
    """A W4A4Weight, int4 -> FP8Weight on the same device. The weight's own tensors are not changed; proj_up is shared.

    Raises ShapeError where the kernels cannot serve: nvfp4, or K not a multiple of 128.
    """
    n, k = weight.shape
    if weight.precision != "int4" or n % 128 or k % TILE_K:
        raise ShapeError(f"repack: the weight is {weight.precision} [{n}, {k}]. Needs int4 with N and K multiples of 128; "
                         "other layers keep the checkpoint's layout.")
    scales = _SCALES.pack(_whole_tiles(layout.unpack_scales(weight.wscales).float() * SCALE), (-1, k // TILE_K, 512),
                          nt=-(-n // TILE_N), kt=k // TILE_K)
    wide = bool((weight.qweight.view(torch.uint8) & 15 == 8).any() | (weight.qweight.view(torch.uint8) >> 4 == 8).any())
    step = max(CODES_AT_ONCE // (k * TILE_N), 1) * TILE_N
    parts = [_pack_codes(layout.unpack_int4(weight.cut(start, min(start + step, n)).qweight), wide)
             for start in range(0, n, step)]
    down = None if weight.proj_down is None else FP8Weight.pack_down(layout.unpack_down(weight.proj_down))
    return FP8Weight(weight.unsigned, weight.smooth.dtype, n, parts[0] if len(parts) == 1 else torch.cat(parts), scales,
                     1 / layout.unpack_vector(weight.smooth).float(), down, weight.proj_up)


def _pack_codes(codes, wide):
    """[N, K] int8 -> [N/256, K/128, B] uint8"""
    n, k = codes.shape
    tiles = -(-n // TILE_N), k // TILE_K
    plain = codes.abs().view(torch.uint8) | (codes < 0).to(torch.uint8) << 7                # sign and magnitude
    stored = _BYTES.pack(_whole_tiles(plain), (*tiles, 2, 2, 2, 2, 128, 2, 2, 4), nt=tiles[0], kt=tiles[1])
    if not wide:
        p, q = stored.movedim(5, 6).unbind(-2)                                              # the registers of h = 0 and 1
        stored = p | q << 4 | q.roll(1, -1) >> 4                                            # p | rotate_left(q, 4)
    return stored.reshape(*tiles, -1)


def _whole_tiles(rows):
    """Zero rows up to a multiple of TILE_N."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % TILE_N))
