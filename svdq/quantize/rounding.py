"""A matrix on the 4-bit grids of the format: which scale each group gets, and which code each weight.

Scales are searched: every group takes the one of a few candidates that leaves the least squared error, measured with the
scale as it will be stored. INT4 uses the whole range -8..7: the largest weight of a group may sit on -8, so a scale may be
negative.

Test: tests/unit/test_quantize.py
"""

import torch

from ..kernels import layout, reference
from ..kernels.weights import AWQWeight

# Weights rounded at a time on a CPU. Less fits the cache better (one thread: 2^19 is 1.4 times as fast), but every pass ends
# with the threads waiting for one another, which on a machine that is busy otherwise costs far more than the pass.
CACHE = 1 << 21
GPU_CHUNK = 1 << 26
AWQ_GROUP = 64
E4M3_MAX = reference.E4M3_MAX

# Factors on the scale that reaches the largest weight of a group. Few of them serve where the search is repeated.
INT4_TO_7 = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.70)
INT4_TO_8 = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82)
INT4_QUICK = (0.94, 0.82), (0.97, 0.88)
NVFP4_FACTORS = (1.0, 1.5, 0.95, 0.9, 0.85, 1.1, 1.2, 1.35)
NVFP4_QUICK = (1.0, 1.5, 0.9, 1.2)


def row_chunks(matrix):
    size = GPU_CHUNK if matrix.is_cuda else CACHE
    step = max(size // matrix.shape[1], 1)
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


class Int4:
    """Groups of 64, a bf16 scale each, codes -8..7 (symmetric: -7..7, scales of one sign)."""
    group = layout.GROUP["int4"]

    def __init__(self, symmetric=False):
        self.low = -7 if symmetric else -8

    def fit(self, matrix):
        """What the scales of single groups depend on; nothing here."""
        return self

    def part(self, rows):
        """The grid for these rows of the matrix it was fitted to."""
        return self

    def search(self, matrix, quick=False):
        """The best scale of every group: matrix [n, k] -> fp32 [n, k / 64], each a bf16 value."""
        groups = matrix.unflatten(1, (-1, self.group))
        high, low = groups.amax(2), groups.amin(2)
        largest = torch.where(high >= -low, high, low)
        to_7, to_8 = INT4_QUICK if quick else (INT4_TO_7, INT4_TO_8)
        candidates = [largest.abs() * (factor / 7) for factor in to_7]
        if self.low == -8:
            candidates += [largest * (-factor / 8) for factor in to_8]
        return best(groups, (_bf16(scale) for scale in candidates), self.snap_scaled)

    def absmax(self, matrix):
        """The scales of the original quantiser: max / 7."""
        return _bf16(matrix.unflatten(1, (-1, self.group)).abs().amax(2) / 7)

    def snap_scaled(self, scaled):
        """Nearest grid values of weights in units of their scale. May overwrite."""
        return scaled.round_().clamp_(self.low, 7)

    def multiplier(self, scales):
        return scales

    def pack(self, values, scales):
        """Grid values [n, k] and scales [n, g] -> the fields of a W4A4Weight."""
        return {"qweight": layout.pack_codes(values.to(torch.int8)),
                "wscales": layout.pack_scales(scales.to(torch.bfloat16))}


class Nvfp4:
    """Groups of 16, an E4M3 scale each, one bf16 scale for every block of rows; E2M1 values.

    blocks  how many blocks of rows have a scale of their own: 3 in a fused qkv
    """
    group = layout.GROUP["nvfp4"]

    def __init__(self, blocks=1, outer=None):
        self.blocks, self.outer = blocks, outer             # outer [n, 1] fp32, bf16 values

    def fit(self, matrix):
        """With the outer scales that bring the largest group of each block to E4M3's largest value."""
        peaks = torch.stack([part.abs().amax() for part in matrix.chunk(self.blocks)])
        outer = _bf16(peaks / 6 / E4M3_MAX)
        outer = torch.where(outer == 0, 1.0, outer)
        return Nvfp4(self.blocks, outer.repeat_interleave(len(matrix) // self.blocks)[:, None])

    def part(self, rows):
        return Nvfp4(self.blocks, self.outer[rows])

    def search(self, matrix, quick=False):
        groups = matrix.unflatten(1, (-1, self.group))
        reach = groups.abs().amax(2) / (6 * self.outer)
        factors = NVFP4_QUICK if quick else NVFP4_FACTORS
        return best(groups, (_e4m3(reach * factor) for factor in factors), self.snap_scaled, self.outer)

    def absmax(self, matrix):
        return _e4m3(matrix.unflatten(1, (-1, self.group)).abs().amax(2) / 6 / self.outer)

    def snap_scaled(self, scaled):
        size = scaled.abs().clamp_(max=6)
        step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
        return size.div_(step).round_().mul_(step).copysign_(scaled)

    def multiplier(self, scales):
        return scales * self.outer

    def pack(self, values, scales):
        codes = reference.to_e2m1(values)
        codes[codes == 8] = 0                               # -0, which writers avoid (checkpoint-format 5.2)
        packed = {"qweight": layout.pack_codes(codes), "wscales": layout.pack_scales(scales.to(torch.float8_e4m3fn))}
        if self.blocks == 1:
            return packed | {"wtscale": self.outer[0, 0].item()}
        return packed | {"wcscales": layout.pack_vector(self.outer[:, 0].to(torch.bfloat16))}


def best(groups, candidates, snap_scaled, outer=1.0):
    """Of each group [n, g, size] the candidate scale [n, g] that leaves the least error; 1 where a group is zero."""
    scales = least = None
    for scale in candidates:
        multiplier = scale * outer
        scaled = groups * _inverse(multiplier)[..., None]
        error = torch.linalg.vector_norm(snap_scaled(scaled.clone()).sub_(scaled), dim=2).mul_(multiplier.abs())
        if scales is None:
            scales, least = scale, error
        else:
            better = error < least
            scales, least = torch.where(better, scale, scales), torch.where(better, error, least)
    return scales


def round_to(grid, matrix, scales):
    """Grid values, in units of the scales: fp32 [n, k]."""
    scaled = matrix.unflatten(1, (-1, grid.group)) * _inverse(grid.multiplier(scales))[..., None]
    return grid.snap_scaled(scaled).flatten(1)


def restore(grid, values, scales):
    """What grid values stand for. Overwrites them."""
    values.unflatten(1, (-1, grid.group)).mul_(grid.multiplier(scales)[..., None])
    return values


def _inverse(scale):
    return torch.where(scale == 0, 0.0, 1 / scale)          # a group of zeros: codes 0 whatever its scale


def _bf16(values):
    values = values.to(torch.bfloat16).float()
    return torch.where(values == 0, 1.0, values)            # readers divide by it


def _e4m3(values):
    return values.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


# ---- modulation layers: 4-bit weights with a zero per group, 16-bit activations

class Awq:
    """Groups of 64, codes 0..15: weight = code * scale + zero, both bf16."""
    group = AWQ_GROUP

    def search(self, matrix):
        """(scales, zeros) fp32 [n, k / 64], bf16 values: ranges cut by a few factors, then twice the least-squares line."""
        groups = matrix.unflatten(1, (-1, self.group))
        high, low = groups.amax(2), groups.amin(2)
        found = None
        for factor in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
            scale = _bf16((high - low) * (factor / 15))
            zero = ((high + low) / 2 - 7.5 * scale).to(torch.bfloat16).float()
            for again in (True, True, False):
                codes = self.codes(groups, scale[..., None], zero[..., None])
                error = (codes * scale[..., None] + zero[..., None] - groups).square_().sum(2)
                if found is None:
                    found = [scale, zero, error]
                else:
                    better = error < found[2]
                    found = [torch.where(better, new, old) for new, old in zip((scale, zero, error), found)]
                if again:
                    scale, zero = _line(codes, groups, scale)
        return found[:2]

    def codes(self, weights, scales, zeros):
        return ((weights - zeros) * _inverse(scales)).round_().clamp_(0, 15)

    def pack(self, codes, scales, zeros):
        return AWQWeight(qweight=layout.pack_awq(codes.to(torch.uint8)), wscales=scales.t().to(torch.bfloat16).contiguous(),
                         wzeros=zeros.t().to(torch.bfloat16).contiguous())


def _line(codes, groups, scale):
    """The scale and zero that fit weights to given codes best; the old scale where all codes are one."""
    code, weight = codes.mean(2), groups.mean(2)
    spread = (codes - code[..., None]).square_().sum(2)
    slope = ((codes - code[..., None]) * groups).sum(2) / spread
    scale = _bf16(torch.where((spread > 0) & slope.isfinite(), slope, scale))
    return scale, (weight - code * scale).to(torch.bfloat16).float()
