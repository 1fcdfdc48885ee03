"""Numbers. float64 holds every fp32 and smaller, and sums of two with one rounding to odd, after which another to fp32, bf16
or fp16 is as if there had been only one."""

import numpy as np

from .memory import Fault

HALVES = ("f16", "bf16", "f16x2", "bf16x2")
FP8 = {"e4m3": (3, 6, 0x7E), "e5m2": (2, 14, 0x7B)}          # stored mantissa bits, lowest exponent negated, largest code


def odd(rounded, error):
    """float64 `rounded`, where exact is rounded + error: the odd one of the two neighbours if not exact."""
    bits = rounded.view(np.int64)
    step = np.where((error > 0) == (rounded > 0), 1, -1)
    nudge = (error != 0) & (bits & 1 == 0) & np.isfinite(rounded)
    # from 0 a step would change the sign; a sum of two that rounds to 0 is exact, so there is none
    return np.where(nudge, bits + step, bits).view(np.float64)


def add(a, b):
    """a + b in float64, rounded to odd."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    return odd(s, np.where(np.isfinite(error), error, 0))


def wide(bits, kind):
    """Bits of a float type -> float64."""
    if kind in FP8:
        return VALUES[kind][bits].astype(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).astype(np.float64)


def narrow(value, kind):
    """float64 -> bits of a float type, nearest even. NaN becomes the one NaN that the hardware makes."""
    if kind == "f64":
        return value.view(np.uint64)
    if kind == "f32":
        return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), value.astype(np.float32).view(np.uint32))
    if kind == "f16":
        return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16))
    if kind == "bf16":
        single = value.astype(np.float32)
        bits = single.view(np.uint32).astype(np.int64)
        short = value - single.astype(np.float64)                # to odd first, as in odd()
        finite = np.isfinite(single)
        nudge = finite & (short != 0) & (bits & 1 == 0)
        bits = np.where(nudge, bits + np.where(np.abs(value) > np.abs(single), 1, -1), bits)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded = np.where(finite, rounded, bits >> 16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
    if kind in FP8:                                              # .satfinite, the only form there is
        mantissa, low, top = FP8[kind]
        size = np.minimum(np.abs(np.where(np.isnan(value), 0, value)), 2.0**16)
        exponent = np.where(size < 2.0**-low, -low, np.frexp(size)[1] - 1)
        code = (exponent + low << mantissa) + np.rint(np.ldexp(size, mantissa - exponent)).astype(np.int64)
        code = np.where(np.isnan(value), 0x7F, np.minimum(code, top) | np.signbit(value) * 0x80)
        return code.astype(np.uint8)
    raise Fault(f"no conversion to {kind}")


def flush(x):
    """Subnormal fp32 becomes a zero of its sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# FP8

def _decode(kind):
    """Values and exponents of the 256 codes; a zero has an exponent below all."""
    mantissa, low, top = FP8[kind]
    code = np.arange(256)
    field, rest = (code & 0x7F) >> mantissa, code & (1 << mantissa) - 1
    exponent = np.maximum(field, 1) - 1 - low
    value = np.ldexp((rest + np.where(field, 1 << mantissa, 0)).astype(np.float64), exponent - mantissa)
    value[(code & 0x7F) > top] = np.nan
    if kind == "e5m2":
        value[code & 0x7F == 0x7C] = np.inf
    value = np.where(code & 0x80, -value, value)
    return value.astype(np.float32), np.where(value == 0, ZERO, exponent).astype(np.int16)


ZERO = -1000
VALUES, EXPONENTS = ({kind: _decode(kind)[i] for kind in FP8} for i in (0, 1))


def multiply_fp8(a, b, c, kinds, bits):
    """c + a b as Hopper's FP8 wgmma computes it: codes a [m, k] and b [n, k], c [m, n] fp32.

    The products and c are aligned to the largest exponent (of a product: the sum of its factors' exponents), each is
    truncated to `bits` fraction bits there, and their sum is truncated to `bits` fraction bits again (MMA-Sim, arXiv
    2511.10909; 13 on Hopper). bits None: exact, rounded once.
    """
    x, y = (VALUES[kind][codes] for kind, codes in zip(kinds, (a, b), strict=True))
    if bits is None:
        return (x.astype(np.float64) @ y.T.astype(np.float64) + c).astype(np.float32)
    ex, ey = (EXPONENTS[kind][codes] for kind, codes in zip(kinds, (a, b), strict=True))
    top = np.where(c == 0, ZERO, np.frexp(c)[1] - 1).astype(np.int16)
    one = np.empty_like(top)
    for k in range(x.shape[1]):
        np.add(ex[:, k, None], ey[None, :, k], out=one)
        np.maximum(top, one, out=top)
    top[top < -200] = 0                                          # nothing but zeros
    scale = np.ldexp(np.float32(1), bits - top.astype(np.int32))
    total, term = np.trunc(c * scale), np.empty_like(scale)      # integers below 2^22: exact in fp32
    for k in range(x.shape[1]):
        np.multiply(x[:, k, None], y[None, :, k], out=term)
        term *= scale
        np.trunc(term, out=term)
        total += term
    total /= scale
    total.view(np.uint32)[...] &= np.uint32(0xFFFFFFFF << 23 - bits & 0xFFFFFFFF)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(c).all()):
        plain = x @ y.T + c
        total = np.where(np.isfinite(plain), total, plain)
    return total
