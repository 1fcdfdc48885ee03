"""Packed layouts of the operands, as SVDQuant checkpoints store them. The one file that knows nibble order.

Everything is a permutation of bits: no value is computed, rounded or checked, and each pack_x / unpack_x are exact
inverses on any device. A permutation is written in letters, one per axis: split the logical tensor into the axes on the
left, put them in the order on the right, forget the axes. Read right to left it unpacks.

Logical tensors are what the formulas in reference.py use: one code per byte, [N, ...] for weights, [K, R] for proj_down.

Source: checkpoint-format 5. Test: tests/kernels/test_layout.py
"""

import math
from functools import lru_cache

import torch

from .errors import ShapeError

GROUP = {"int4": 64, "nvfp4": 16}  # input channels that share one scale
TILE_N = 128                       # N and K of a stored layer are multiples of it
RANK_ALIGN = 16                    # so is the rank, of this

_BYTES = (torch.uint8, torch.int8)
_HALVES = (torch.bfloat16, torch.float16)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}        # of elements that are only moved, by their size


class Layout:
    """`logical` axes -> `stored` axes, with the sizes that never change; the others are given per tensor."""

    def __init__(self, logical, stored, **sizes):
        self.logical, self.stored, self.sizes = logical.split(), stored.split(), sizes

    def pack(self, tensor, shape, **tiles):
        return self._reorder(tensor, self.logical, self.stored, shape, tiles)

    def unpack(self, tensor, shape, **tiles):
        return self._reorder(tensor, self.stored, self.logical, shape, tiles)

    def _reorder(self, tensor, source, target, shape, tiles):
        sizes = self.sizes | tiles
        axes = tensor.reshape([sizes[axis] for axis in source])
        return axes.permute([source.index(axis) for axis in target]).reshape(-1).view(shape)


class Tiled(Layout):
    """A Layout whose stored axes of unchanging size come last: they are a tile, the others count tiles.

    CPUs unpack it in two steps, places in a tile and then runs of elements: a third of the time of one, element by element.
    """

    def __init__(self, logical, stored, **sizes):
        super().__init__(logical, stored, **sizes)
        self.counts, within = self.stored[:-len(sizes)], self.stored[-len(sizes):]
        self.tile = [axis for axis in self.logical if axis in sizes]
        self.places = self._reorder(torch.arange(math.prod(sizes.values()), device="cpu"), within, self.tile, (1, -1), {})

    def unpack(self, tensor, shape, **tiles):
        if not on_cpu(tensor):
            return super().unpack(tensor, shape, **tiles)
        places = self.places.expand(tensor.numel() // self.places.numel(), -1)
        bits = tensor.reshape(places.shape).view(_BITS[tensor.element_size()]).gather(1, places)
        return self._reorder(bits, self.counts + self.tile, self.logical, shape, tiles).view(tensor.dtype)


#                    logical, slowest axis first   stored                    sizes; the rest are counts of tiles
_CODES    = Tiled ("nt np nb nr  kt kb kq",    "nt kt np nr kq nb kb",    np=8, nb=2, nr=8, kb=2, kq=4)
_SCALES16 = Tiled ("nt a c b d   g",           "nt g a b c d",            a=8, c=2, b=4, d=2)
_SCALES8  = Tiled ("nt p q l     kt",          "nt kt l q p",             p=4, q=4, l=8)
_DOWN     = Tiled ("rt nb nr     ct kb kq",    "ct rt nr kq nb kb",       kb=2, kq=4, nb=2, nr=8)
_UP       = Tiled ("ct nb nr     rt kb kq",    "ct rt nr kq nb kb",       nb=2, nr=8, kb=2, kq=4)
_AWQ      = Layout("nb ni        kc h v e",    "nb kc ni h e v",          ni=4, h=2, v=4, e=8)


def on_cpu(tensor):
    """Whether its numbers are here: not those of a fake tensor."""
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu"


def _tiles(who, tensor, dtypes, *axes):
    """How many units each axis of `tensor` holds; axes are (name, unit) pairs, dtypes None takes any."""
    shape = tensor.shape
    fits = len(shape) == len(axes) and not any(size % unit for size, (_, unit) in zip(shape, axes))
    if fits and (dtypes is None or tensor.dtype in dtypes):
        return [size // unit for size, (_, unit) in zip(shape, axes)]
    kind = "" if dtypes is None else " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) + " "
    rules = " and ".join(f"{name} % {unit} == 0" for name, unit in axes if unit > 1)
    raise ShapeError(f"{who}: got {list(shape)} {tensor.dtype}. "
                     f"Needs {kind}[{', '.join(name for name, _ in axes)}]{rules and ' with ' + rules}.")


def _join(codes):
    """Neighbours of the last axis become one byte, the even one in the low half."""
    codes = codes.view(torch.uint8)
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def _split(stored, dtype=torch.uint8):
    """The inverse of _join, from a contiguous tensor of any integer dtype. As int8, codes are -8..7."""
    pairs = stored.view(dtype)
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), -1).flatten(-2)         # shifts of int8 carry the sign along


def _words(tensor):
    """Four bytes of the last axis as one number."""
    return tensor.contiguous().view(torch.int32)


def pack_codes(codes):
    """The 4-bit codes of a W4A4 weight, in the order an m16n8k64 MMA reads its B operand.

    codes    [N, K]    uint8 0..15 | int8 -8..7   N % 128 == 0, K % 64 == 0; only the low nibble is stored
    qweight  [N, K/2]  int8                       n = nt np nb nr, k = kt kb kq + 8 codes, which make one 32-bit word
                                                  (even k in the low nibble), stored as nt kt np nr kq nb kb

    A tile of 128 x 64 codes is 4096 consecutive bytes, tiles run over K first, so row n of qweight is not output n.
    Spec: 5.2, for int4 and nvfp4 alike.
    """
    nt, kt = _tiles("pack_codes", codes, _BYTES, ("N", TILE_N), ("K", 64))
    words = _words(_join(codes))
    return _CODES.pack(words, -1, nt=nt, kt=kt).view(torch.int8).view(nt * TILE_N, kt * 32)


def unpack_codes(qweight):
    """qweight [N, K/2] int8 -> codes [N, K] uint8 0..15, the inverse of pack_codes. `signed` and `e2m1` give values."""
    return _split(_unpack_pairs("unpack_codes", qweight))


def unpack_int4(qweight):
    """qweight [N, K/2] int8 -> values [N, K] int8 -8..7: signed(unpack_codes(qweight)), in fewer passes over memory."""
    return _split(_unpack_pairs("unpack_int4", qweight), torch.int8)


def unpack_e2m1(qweight, dtype):
    """qweight [N, K/2] int8 -> values [N, K] of any float dtype: e2m1(unpack_codes(qweight)), by a table of pairs."""
    pairs = _unpack_pairs("unpack_e2m1", qweight).view(torch.uint8)
    return _table_of_pairs(pairs.device, dtype).index_select(0, pairs.flatten().int()).view(dtype).view(len(pairs), -1)


def unpack_values(qweight, precision, out):
    """qweight [N, K/2] int8 -> what the codes stand for, in `out` [N, K] fp32 | bf16 | fp16. On CPUs: a table of four values is
    what takes them the fewest passes."""
    pairs = _unpack_pairs("unpack_values", qweight).view(torch.uint16)
    fours = torch.complex128 if out.element_size() == 4 else torch.int64
    table = _fours(precision, out.dtype).view(fours)
    torch.gather(table.expand(len(pairs), -1), 1, pairs.long(), out=out.view(fours))
    return out


@lru_cache
def _table_of_pairs(device, dtype):
    return _pairs(_values("nvfp4", torch.uint8).to(device, dtype))


@lru_cache
def _fours(precision, dtype):
    """What each 16 bits stand for, [65536 * 4]: 1 MiB in fp32."""
    return _values(precision, torch.int16).to(dtype)


def _values(precision, stored):
    """What the codes in every bit pattern of an integer dtype stand for, pattern by pattern."""
    patterns = torch.arange(1 << 8 * stored.itemsize, device="cpu").to(stored)
    return e2m1(_split(patterns)) if precision == "nvfp4" else _split(patterns, torch.int8)


def _unpack_pairs(who, qweight):
    """The words of qweight in plain order, whose bytes are pairs of codes: [N, K/8] int32."""
    nt, kt = _tiles(who, qweight, _BYTES, ("N", TILE_N), ("K/2", 32))
    return _CODES.unpack(_words(qweight), (nt * TILE_N, kt * 8), nt=nt, kt=kt)


def pack_vector(vector):
    """bias, smooth, wcscales: [N] -> [N], any dtype, N % 128 == 0.

    In each run of 16 the stored order is 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. smooth is indexed by K and stored so too;
    the bias of an AWQ layer and the norm weights are not. Spec: 5.4.
    """
    nt, = _tiles("pack_vector", vector, None, ("N", TILE_N))
    return _SCALES16.pack(vector, -1, nt=nt, g=1)


def unpack_vector(stored):
    """[N] -> [N], the inverse of pack_vector."""
    nt, = _tiles("unpack_vector", stored, None, ("N", TILE_N))
    return _SCALES16.unpack(stored, -1, nt=nt, g=1)


def pack_scales(wscales):
    """Group scales of a W4A4 weight; the dtype says which of the two orders.

    wscales  [N, G]  bf16 | fp16     N % 128 == 0               n = nt a c b d          stored as nt g a b c d      (int4)
                     float8_e4m3fn   N % 128 == 0, G % 4 == 0   n = nt p q l, g = kt m  stored as nt kt l q p m    (nvfp4)
    stored   [G, N]  same dtype      row g is group g only when N == 128

    The four m make one 32-bit word. Spec: 5.3, 5.5.
    """
    if wscales.dtype == torch.float8_e4m3fn:
        nt, kt = _tiles("pack_scales", wscales, None, ("N", TILE_N), ("G", 4))
        return _SCALES8.pack(_words(wscales), -1, nt=nt, kt=kt).view(wscales.dtype).view(kt * 4, nt * TILE_N)
    nt, g = _tiles("pack_scales", wscales, (*_HALVES, torch.float8_e4m3fn), ("N", TILE_N), ("G", 1))
    return _SCALES16.pack(wscales, (g, nt * TILE_N), nt=nt, g=g)


def unpack_scales(stored):
    """[G, N] -> wscales [N, G], the inverse of pack_scales."""
    if stored.dtype == torch.float8_e4m3fn:
        kt, nt = _tiles("unpack_scales", stored, None, ("G", 4), ("N", TILE_N))
        return _SCALES8.unpack(_words(stored), (nt * TILE_N, kt), nt=nt, kt=kt).view(stored.dtype)
    g, nt = _tiles("unpack_scales", stored, (*_HALVES, torch.float8_e4m3fn), ("G", 1), ("N", TILE_N))
    return _SCALES16.unpack(stored, (nt * TILE_N, g), nt=nt, g=g)


def pack_down(proj_down):
    """proj_down [K, R] -> stored [K, R], any dtype, K and R multiples of 16: B fragments of m16n8k16, tiles run over R first.

    k = ct kb kq + a pair, r = rt nb nr, stored as ct rt nr kq nb kb + the pair. The files' own logical tensor is the
    transpose, D[R, K]. In units of 16 x 16, further rank is further blocks. Spec: 5.6.
    """
    ct, rt = _tiles("pack_down", proj_down, None, ("K", 16), ("R", RANK_ALIGN))
    return _DOWN.pack(_pairs(proj_down.t()), -1, ct=ct, rt=rt).view(proj_down.dtype).view(proj_down.shape)


def unpack_down(stored):
    """[K, R] -> proj_down [K, R], the inverse of pack_down."""
    ct, rt = _tiles("unpack_down", stored, None, ("K", 16), ("R", RANK_ALIGN))
    return _DOWN.unpack(_pairs(stored), (rt * 16, ct * 8), ct=ct, rt=rt).view(stored.dtype).t()


def pack_up(proj_up):
    """proj_up [N, R] -> stored [N, R], any dtype, N and R multiples of 16; n = ct nb nr, r = rt kb kq + a pair, else as
    pack_down."""
    ct, rt = _tiles("pack_up", proj_up, None, ("N", 16), ("R", RANK_ALIGN))
    return _UP.pack(_pairs(proj_up), -1, ct=ct, rt=rt).view(proj_up.dtype).view(proj_up.shape)


def unpack_up(stored):
    """[N, R] -> proj_up [N, R], the inverse of pack_up."""
    ct, rt = _tiles("unpack_up", stored, None, ("N", 16), ("R", RANK_ALIGN))
    return _UP.unpack(_pairs(stored), (ct * 16, rt * 8), ct=ct, rt=rt).view(stored.dtype)


def _pairs(tensor):
    """Neighbours of the last axis as one number: what stays together is moved together, which is several times faster."""
    return tensor.reshape(-1).view(_BITS[2 * tensor.element_size()])


def pack_awq(codes):
    """The 4-bit codes of an AWQ weight. Its scales, zeros and bias are plain row-major, so only this has a layout.

    codes    [N, K]      uint8 0..15   N % 4 == 0, K % 64 == 0
    qweight  [N/4, K/2]  int32         n = nb ni, k = kc h v e, stored as nb kc ni h e v; the four v make one 16-bit word

    Spec: 5.7.
    """
    nb, kc = _tiles("pack_awq", codes, _BYTES, ("N", 4), ("K", 64))
    return _join(_AWQ.pack(codes, (nb, -1), nb=nb, kc=kc)).view(torch.int32)


def unpack_awq(qweight):
    """qweight [N/4, K/2] int32, or [N/4, K] int16 as text encoders declare it -> codes [N, K] uint8, undoes pack_awq."""
    nb, kc = _awq_tiles("unpack_awq", qweight)
    rows = qweight.contiguous().view(torch.int64).view(nb, kc, 4, 4).transpose(1, 2).contiguous()
    words = rows.view(torch.int16)                                              # ... h e, whose nibbles are the v
    runs = [run for half in (words, words >> 8) for byte in [half.to(torch.uint8)] for run in (byte & 15, byte >> 4)]
    return torch.stack([run.view(torch.int64) for run in runs], -1).view(torch.uint8).view(nb * 4, kc * 64)     # of 8 e


def permute_awq_rows(qweight, order, out=None):
    """Row i of the result is row order[i] of qweight, without unpacking: the nibbles of one row never leave their 32 bytes.

    qweight [N/4, K/2] int32 | [N/4, K] int16, order [rows] with rows % 4 == 0 -> [rows/4, ...] of the same dtype, in `out`
    where that is given.
    """
    _, kc = _awq_tiles("permute_awq_rows", qweight)
    rows, = _tiles("permute_awq_rows, order", order, None, ("rows", 4))
    out = qweight.new_empty(rows, qweight.shape[1]) if out is None else out
    first = (order // 4 * kc * 4 + order % 4).int().view(rows, 1, 4)            # of a row's runs of 32 bytes, which lie 4 apart
    runs = (first + torch.arange(0, kc * 4, 4, dtype=torch.int32, device=order.device)[:, None]).view(-1)
    torch.index_select(qweight.contiguous().view(torch.int64).view(-1, 4), 0, runs, out=out.view(torch.int64).view(-1, 4))
    return out


def _awq_tiles(who, qweight):
    if qweight.dtype == torch.int16:
        return _tiles(who, qweight, None, ("N/4", 1), ("K", 64))
    return _tiles(who, qweight, (torch.int32, torch.int16), ("N/4", 1), ("K/2", 32))


def signed(codes):
    """uint8 nibble 0..15 -> int8 -8..7, two's complement."""
    return (codes ^ 8).view(torch.int8) - 8


# bit 3 sign, two bits exponent, one bit mantissa. Code 8 is -0: writers avoid it, readers take it as 0.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e2m1(codes):
    """uint8 E2M1 code 0..15 -> fp32 value."""
    # index_select, because E2M1[codes] would widen the index to int64.
    return E2M1.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def pad(tensor, *multiples, fill=0):
    """Grow every axis to its multiple, as the formats want it before packing (5.1).

    codes (128, 128)   proj_down, proj_up (128, 16)   with zeros
    wscales (128, 128 // GROUP)   smooth, bias (128,)   with fill=1
    """
    shape = [-(-size // multiple) * multiple for size, multiple in zip(tensor.shape, multiples, strict=True)]
    padded = tensor.new_full(shape, fill)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded
