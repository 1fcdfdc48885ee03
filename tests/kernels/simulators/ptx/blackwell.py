"""What sm_120a adds: mma with block scales, and e2m1. Section numbers are those of the PTX ISA 9."""

import numpy as np

from .floats import VALUES, narrow
from .memory import LANES, Fault
from .text import same, store

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
HALFWAY = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])      # between neighbours; odd codes have odd mantissas


def to_e2m1(value):
    """float64 -> codes, nearest even, at most 6. NaN becomes 6."""
    size = np.abs(value)[..., None]
    odd = np.arange(7) % 2 == 1                                  # the code below a half is odd: a tie goes up
    code = ((size > HALFWAY) | odd & (size == HALFWAY)).sum(-1)
    return np.where(np.isnan(value), 7, code | np.signbit(value) << 3).astype(np.uint16)


def cvt_e2m1(d, origin):
    """cvt.rn.satfinite.e2m1x2.f32 d, high, low: two codes in a byte (9.7.9.22)."""
    if origin != "f32":
        d.unknown("conversion")
    row, high, low = d.write(16), d.read(32), d.read(32)

    def run(w, mask):
        codes = [to_e2m1(w.view["f4"][source].astype(np.float64)) for source in (low, high)]
        store(w, "u2", row, codes[0] | codes[1] << 4, mask)
    return run


def _scales(w, row, mask):
    """[lanes, 4] float64 of words of ue4m3, and which of them have a sign, which ue4m3 has not."""
    codes = np.ascontiguousarray(w.view["u4"][row]).view(np.uint8).reshape(w.lanes, 4)
    return VALUES["e4m3"][codes].astype(np.float64), (codes & 0x80).any(1)


def mma_scaled(d):
    """d = (a scale_a) (b scale_b) + c (9.7.14.5.14), of e2m1 with one ue4m3 per 16 of k, fragments as those of 4-bit integers.

    Of the lanes 4g + t, t = 2 thread-id-a and the next one give the scales of rows g and g + 8, t = thread-id-b those of
    column g (9.7.14.5.15). In float64, which holds each product: the sum over k and c is rounded once.
    """
    d.need("sync", "kind::mxf4nvf4", "scale_vec::4X", "m16n8k64", "row", "col")
    d.flag("aligned")
    if [d.type() for _ in range(len(d.mods))] != ["f32", "e2m1", "e2m1", "f32", "ue4m3"]:
        d.unknown("types of a block-scaled mma")
    d.instruction.kind = "warp"
    to, a, b, c = [[d.write(32, t) for t in d.tokens()]] + [[d.read(32, t) for t in d.tokens()] for _ in range(3)]
    scales, selectors = [], []
    for _ in range(2):
        scales += [d.read(32, t) for t in d.tokens()]
        selectors.append([d.read(16, t) for t in d.tokens()])
    if list(map(len, (to, a, b, c, scales, *selectors))) != [4, 4, 2, 4, 2, 2, 2]:
        d.unknown("mma")

    def elements(w, rows):
        codes = w.view["u4"][rows][..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        return E2M1[codes]

    def selected(w, mask):
        (byte_a, pair), (byte_b, lane) = ([same(w.view["u2"][row], mask, "selector of scales") for row in rows]
                                          for rows in selectors)
        if byte_a or byte_b or pair > 1 or lane > 3:
            raise Fault(f"selectors {byte_a}, {pair} and {byte_b}, {lane}: of scale_vec::4X there are 0, 0..1 and 0, 0..3")
        pairs = [slice(2 * pair, 2 * pair + 2), slice(lane, lane + 1)]
        for row, lanes in zip(scales, pairs, strict=True):
            values, signed = _scales(w, row, mask)
            if signed.reshape(-1, 4)[:, lanes].any():
                raise Fault("a scale with a sign: ue4m3 has none")
            values = values.reshape(w.warps, 8, 4, 4)[:, :, lanes]               # g, one or two rows, blocks of k
            yield values.swapaxes(1, 2).reshape(w.warps, -1, 4)

    def run(w, mask):
        scale_a, scale_b = selected(w, mask)
        left = elements(w, a).reshape(2, 2, w.warps, 8, 4, 8)                    # half of k, half of the rows, g, t
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(w.warps, 16, 4, 16) * scale_a[..., None]
        right = elements(w, b).reshape(2, w.warps, 8, 4, 8)
        right = right.transpose(1, 2, 0, 3, 4).reshape(w.warps, 8, 4, 16) * scale_b[..., None]
        product = left.reshape(w.warps, 16, 64) @ right.reshape(w.warps, 8, 64).swapaxes(1, 2)
        product = product.reshape(w.warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, w.warps * LANES)
        for row, lanes in zip(to, narrow(product + w.view["f4"][c], "f32"), strict=True):
            store(w, "u4", row, lanes, mask)
    return run
