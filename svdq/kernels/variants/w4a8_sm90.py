"""4-bit weights on Hopper, whose tensor cores multiply FP8: two kernels, and an order of the weight made for them.

    FP8Weight    the layer as they read it, made once from the checkpoint's tensors and back to the bit
    quant_fp8    x -> e4m3 codes, one scale per token (W4A8) or int4 codes in e4m3, one per 64 channels (W4A4); x @ proj_down
    gemm_fp8     those and the weight -> out, with an epilogue        cuda/quant_fp8.cuh, cuda/gemm_fp8.cuh

The values of a repacked layer are the same; what changes is their order, the scales' dtype and, for a layer that has a code
-8, the size of a code. Repacking runs on the device of the weight.

Test: tests/kernels/families/test_w4a8_sm90.py
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from .. import adaln, epilogues, launch, layout
from ..build import Library
from ..errors import ShapeError
from ..launch import Updated
from ..rows import row_blocks
from ..variant import HALVES, Variant
from ..weights import W4A4Weight, Weight

TILE_N, TILE_K = 256, 128       # of gemm_fp8.cuh
SCALE = 512.0                   # an e4m3 byte 0..15 is its number times 2^-9
CODES_AT_ONCE = 1 << 24         # repacked at a time: their temporaries are a few bytes each
CLUSTER = 2                     # CTAs that share each token tile of gemm_fp8; 1 is the form without
STAGED = {16384: 216144, 32768: 193584}     # bytes of a tile of codes -> sizeof(gemm_fp8::Shared<BYTES>)

SIGNS = {False: "s", True: "u"}
MODES = {False: "token", True: "group"}      # what shares a scale of the activations
RANKS = {False: "r32", True: "r128"}         # whether the rank is above 32
CODES = {16384: "w4", 32768: "w8"}           # bytes of a tile of codes

LIBRARY = Library("w4a8_sm90", {
    "quant_fp8.cuh": tuple(f"quant_fp8_{half}_{mode}_{sign}_{rank}" for half in HALVES.values() for mode in MODES.values()
                           for sign in SIGNS.values() for rank in RANKS.values()),
    "gemm_fp8.cuh": tuple(f"gemm_fp8_{half}_{mode}_{codes}_c{cluster}" for half in HALVES.values() for mode in MODES.values()
                          for codes in CODES.values() for cluster in (1, 2)),
    "adaln_fp8.cuh": tuple(f"adaln_fp8_{half}_{mode}" for half in HALVES.values() for mode in MODES.values())}, specific=True)

# f: features of a tile, k: inputs of a tile. Warpgroup wg, sub-tile sub and warp w own 16 features, rows 8h + g of a wgmma's
# A; group gr, k32 step s; byte j of the register (q, h) of thread (w g t) is input 16q + 4t + j of the step.
_BYTES  = layout.Layout("nt wg sub w h g   kt gr s q t j", "nt kt wg sub gr s w g t q h j", wg=2, sub=2, w=4, h=2, g=8,
                         gr=2, s=2, q=2, t=4, j=4)
_SCALES = layout.Layout("nt b h g   kt gr", "nt kt gr b g h", b=16, h=2, g=8, gr=2)
_DOWN   = layout.Layout("gr t c kb j   r", "gr c kb t j r", t=4, c=4, kb=2, j=2)


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
    read_first = "inverse", "proj_down"

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

    def cut(self, start, stop):
        if start % TILE_N or stop % TILE_N and stop != self.n:
            return super().cut(start, stop)
        part = slice(start // TILE_N, -(-stop // TILE_N))
        return replace(self, n=stop - start, qweight=self.qweight[part], wscales=self.wscales[part],
                       proj_up=None if self.proj_up is None else self.proj_up[start:stop])

    def branch(self):
        if self.proj_down is None:
            return None
        down, up = super().branch()
        return _DOWN.unpack(down, down.shape, gr=len(down) // 64, r=down.shape[1]), up

    @staticmethod
    def pack_down(factor):
        return layout.pack_down(_DOWN.pack(factor, factor.shape, gr=len(factor) // 64, r=factor.shape[1]))

    @classmethod
    def pack(cls, weight):
        """A W4A4Weight, int4 -> the same on the same device. The weight's own tensors are not changed; proj_up is shared.

        Raises ShapeError where the kernels cannot serve: nvfp4, or K not a multiple of 128.
        """
        n, k = weight.shape
        if weight.precision != "int4" or n % 128 or k % TILE_K:
            raise ShapeError(f"FP8Weight: the weight is {weight.precision} [{n}, {k}]. Needs int4 with N and K multiples of "
                             "128; other layers keep the checkpoint's layout.")
        scales = _SCALES.pack(_whole_tiles(layout.unpack_scales(weight.wscales).float() * SCALE), (-1, k // TILE_K, 512),
                              nt=-(-n // TILE_N), kt=k // TILE_K)
        bytes_ = weight.qweight.view(torch.uint8)
        wide = bool((bytes_ & 15 == 8).any() | (bytes_ >> 4 == 8).any())
        step = max(CODES_AT_ONCE // (k * TILE_N), 1) * TILE_N
        parts = [_pack_codes(layout.unpack_int4(weight.cut(start, min(start + step, n)).qweight), wide)
                 for start in range(0, n, step)]
        down = None if weight.proj_down is None else cls.pack_down(layout.unpack_down(weight.proj_down))
        return cls(weight.unsigned, weight.smooth.dtype, n, parts[0] if len(parts) == 1 else torch.cat(parts), scales,
                   1 / layout.unpack_vector(weight.smooth).float(), down, weight.proj_up)

    def unpack(self):
        (n, k), tiles = self.shape, self.qweight.shape[:2]
        wscales = _SCALES.unpack(self.wscales, (tiles[0] * TILE_N, k // 64), nt=tiles[0], kt=tiles[1])[:n] / SCALE
        return W4A4Weight("int4", self.unsigned, layout.pack_codes(self.codes()), layout.pack_scales(wscales.to(self.dtype)),
                          layout.pack_vector((1 / self.inverse).to(self.dtype)),
                          None if self.proj_down is None else layout.pack_down(self.branch()[0]), self.proj_up)


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


@torch.library.custom_op("svdq::quant_fp8", mutates_args=())
def quant_fp8(x: torch.Tensor, inverse: torch.Tensor, proj_down: torch.Tensor | None, unsigned: bool,
              per_group: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to e4m3, one scale per token, or to int4 in e4m3, one per 64 channels; low-rank down beside it.

    x          [M, K] bf16 | fp16, last stride 1, K % 128 == 0, 16-byte aligned rows
    inverse    [K] fp32       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128: both from FP8Weight.pack

    qact       [M/16, K/128, 16, 128] uint8, e4m3 bytes      ascales    [M/16, 4, 4] fp32, per_group: [M/16, K/128, 2, 4, 4]
    low        [M/16, 2, R/8, 8, 8] x.dtype, in the order quant_fp8.cuh describes, M rounded up to 16; rows past M are zero

    Spec: reference.quant_down, precision e4m3, per_group: int4. Source: SVDQuant, arXiv 2411.05007; e4m3 is our own.
    """
    tokens, k = launch.check_x("quant_fp8", x, 128, 16)
    rank = 0 if proj_down is None else proj_down.shape[-1]
    launch.check_rank("quant_fp8", rank)
    launch.check("quant_fp8", x, inverse=(inverse, (k,), torch.float32), proj_down=(proj_down, (k, rank), x.dtype))
    outputs = quant_fp8_outputs(x, rank, per_group)
    if tokens:
        name = f"quant_fp8_{HALVES[x.dtype]}_{MODES[per_group]}_{SIGNS[unsigned]}_{RANKS[rank > 32]}"
        launch.launch(LIBRARY, x, name, (row_blocks(tokens, 16), 1), 256,
                      [x, inverse, proj_down, *outputs, tokens, k, rank, x.stride(0)])
    return outputs


@quant_fp8.register_fake
def _(x, inverse, proj_down, unsigned, per_group):
    return quant_fp8_outputs(x, 0 if proj_down is None else proj_down.shape[1], per_group)


def quant_fp8_outputs(x, rank, per_group):
    blocks, steps = row_blocks(x.shape[0], 16), x.shape[1] // 128
    return (x.new_empty(blocks, steps, 16, 128, dtype=torch.uint8),
            x.new_empty((blocks, steps, 2, 4, 4) if per_group else (blocks, 4, 4), dtype=torch.float32),
            x.new_empty(blocks, 2, rank // 8, 8, 8))


@torch.library.custom_op("svdq::gemm_fp8", mutates_args=("out",))
def gemm_fp8(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor,
             proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor, accumulate: bool,
             cluster: int = CLUSTER, epilogue: str = "store", residual: torch.Tensor | None = None,
             gate: torch.Tensor | None = None, query: torch.Tensor | None = None, key: torch.Tensor | None = None,
             rotation: torch.Tensor | None = None, eps: float = 0.0) -> None:
    """out = epilogue(y), where y = qact * qweight + low * proj_up + bias, with accumulate (store, gated) + out as it was.

    qact, ascales, low   from quant_fp8          qweight, wscales, proj_up   of an FP8Weight
    bias [N] plain order or None          out [M, N] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows
    cluster              CTAs that share a token tile: 1 or 2. The result is the same

    epilogue ...         and its operands, see launch.epilogue_arguments

    Spec: reference.gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope. Source: SVDQuant, arXiv 2411.05007.
    """
    n, half = out.shape[-1], out.dtype
    launch.check_out("gemm_fp8", out, n)
    if qweight.ndim != 3 or qweight.shape[0] != -(-n // 256) or qweight.shape[2] not in STAGED or cluster not in (1, 2):
        raise ShapeError(f"gemm_fp8: qweight is {list(qweight.shape)}, out {list(out.shape)}, cluster {cluster}. Needs "
                         f"[{-(-n // 256)}, K/128, 16384 or 32768], as FP8Weight.pack makes it, and a cluster of 1 or 2.")
    tokens, steps, rank = out.shape[0], qweight.shape[1], low.shape[2] * 8 if low.ndim == 5 else 0
    if rank and proj_up is None:
        raise ShapeError(f"gemm_fp8: low has rank {rank} but proj_up is missing.")
    last = launch.epilogue_arguments("gemm_fp8", out, accumulate, epilogue, residual, gate, query, key, rotation, eps)
    blocks, per_group = row_blocks(tokens, 16), ascales.ndim == 5
    launch.check("gemm_fp8", out, qact=(qact, (blocks, steps, 16, 128), torch.uint8),
                 ascales=(ascales, (blocks, steps, 2, 4, 4) if per_group else (blocks, 4, 4), torch.float32),
                 low=(low, (blocks, 2, rank // 8, 8, 8), half), qweight=(qweight, tuple(qweight.shape), torch.uint8),
                 wscales=(wscales, (qweight.shape[0], steps, 512), torch.float32), proj_up=(proj_up, (n, rank), half))
    launch.check("gemm_fp8", out, 4, bias=(bias, (n,), half))
    if tokens:
        tiles = row_blocks(qweight.shape[0], cluster) * cluster * row_blocks(tokens, 128)
        ctas = min(tiles, launch.processors(out.device) // cluster * cluster)
        name = f"gemm_fp8_{HALVES[half]}_{MODES[per_group]}_{CODES[qweight.shape[2]]}_c{cluster}"
        launch.launch(LIBRARY, out, name, (ctas, 1), 384,
                      [qact, ascales, qweight, wscales, low, proj_up, bias, Updated(out) if accumulate else out, tokens, n,
                       steps * 128, rank, out.stride(0), int(accumulate), *last], STAGED[qweight.shape[2]], cluster)


def prepare(x, weight, per_group):
    """(qact, ascales, low), see quant_fp8."""
    return quant_fp8(x, weight.inverse, weight.proj_down, weight.unsigned, per_group)


def product(prepared, weight, out, bias, accumulate, epilogue=None):
    gemm_fp8(*prepared, weight.qweight, weight.wscales, weight.proj_up, bias, out, accumulate, **epilogues.arguments(epilogue))


def decode(prepared, weight):
    """(codes fp32 [M, K], scales [M] or [M, K/64], low [M, R]) in plain order, M rounded up to 16."""
    qact, ascales, low = prepared
    blocks, steps = qact.shape[:2]
    row, chunk = torch.arange(16)[:, None], torch.arange(8)         # chunks of 16 bytes are swizzled by their row
    codes = qact.view(blocks, steps, 16, 8, 16)[:, :, row, chunk ^ row & 7].permute(0, 2, 1, 3, 4)
    codes = codes.reshape(blocks * 16, -1).view(torch.float8_e4m3fn).float()
    scales = ascales.view(*ascales.shape[:-1], 2, 2).transpose(-3, -2).flatten(-3)
    scales = scales.flatten() if scales.ndim == 2 else scales.permute(0, 3, 1, 2).reshape(blocks * 16, -1)
    return codes, scales, low.permute(0, 1, 3, 2, 4).reshape(blocks * 16, -1)


def _modulates(per_group):
    return adaln.operators(LIBRARY, "adaln_fp8.cuh", partial(quant_fp8_outputs, per_group=per_group), smooth="inverse",
                           smooth_dtype=torch.float32, block=16, step=128, kind=f"_{MODES[per_group]}")[1]


_FUSED = dict(product=product, decode=decode, layout=FP8Weight, device=("cuda", (9, 0), (9, 0)), dtypes=tuple(HALVES),
              library=LIBRARY, same_dtype=True, row_bytes=16, max_rank=launch.MAX_RANK, epilogues=epilogues.ALL, unit="fp8")
VARIANTS = (
    Variant("w4a8_sm90", "fused kernels, 4-bit weights, 8-bit activations", partial(prepare, per_group=False),
            modulates=_modulates(False), activations="e4m3", preference=30, sum_error=2e-3, **_FUSED),  # FP8 units cut sums off
    Variant("w4a4_sm90", "fused kernels, 4-bit weights and activations", partial(prepare, per_group=True),
            modulates=_modulates(True), activations="int4", preference=20, **_FUSED))
