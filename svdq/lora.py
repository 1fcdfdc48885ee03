"""Rank concatenation: a user's LoRA inside the low-rank branch of a quantised layer.

    y = 4-bit part + U D x             the checkpoint's branch
      + strength * up (down x)         a LoRA of rank r

is one branch with r more: `up` makes further columns of U, `strength * down` further rows of D. That is exact, nothing is
quantised anew, and the branch sees x as it comes, so smoothing and shift do not matter. Rank that does not fit the fused
kernels, and every LoRA of a modulation, which has no branch, runs beside them as a pair of 16-bit matmuls.

The factors of a layer lie in one byte tensor, for the reason its weights do: the host moves and counts just that.

Source: checkpoint-format 8.1. Test: tests/unit/test_lora.py
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import LoraError
from .format import lay_out, view_section
from .kernels import layout
from .kernels.launch import MAX_RANK
from .kernels.weights import dequantize

MOST_RANK = 256         # of what is factored: more than LoRAs in use have, little beside the layers of FLUX
GOOD_ENOUGH = 1e-3      # relative error at which factoring stops: rounding the factors to 16 bit costs that anyway
MOST = 1e12             # of a factor and of two: layers sum thousands, times activations of thousands, and norms square that


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a layer's weight: W[row:row + n, col:col + k] += strength * scale * up @ down.

    down [r, k], up [n, r]   any float dtype. strength goes into down and scale into up: another strength leaves up as it is
    """
    down: torch.Tensor
    up: torch.Tensor
    row: int = 0
    col: int = 0
    scale: float = 1.0
    strength: float = 1.0

    def same_factors(self, other):
        return (self.down is other.down and self.up is other.up
                and (self.row, self.col, self.scale) == (other.row, other.col, other.scale))


class Branch(NamedTuple):
    """The low-rank branch of one tile with LoRAs in it; None where there is nothing of the kind.

    proj_down [K, R], proj_up [N, R]   packed: the checkpoint's factors, then the LoRAs', for the fused kernels
    down [r, K], up [N, r]             the rank that is left over, in plain order
    """
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None


@dataclass
class SharedDown:
    """Changes of one tile that share their down factor; their rows do not overlap.

    q, k and v of a fused qkv that were trained with one down [r, K] are three changes, but one SharedDown: r rows of D once,
    and in U three blocks of r columns under one another, at rows 0, H and 2H.

    down      [r, k]
    col       where it begins in the tile
    ups       [(row in the tile, up [n, r], scale)]
    changes   indices of the changes
    """
    down: torch.Tensor
    col: int
    ups: list
    changes: list


@dataclass(frozen=True, eq=False)
class LoraSections:
    """Where in a byte tensor the factors of all LoRAs on one layer lie.

    tiles   [{field of Branch: section}], see format.lay_out
    scale   {"scale": section, "constant": section}, or empty
    """
    tiles: list
    scale: dict

    def view(self, stored):
        """[Branch] of the tiles, as views of the byte tensor."""
        return [Branch(**{name: view_section(stored, section) for name, section in sections.items()})
                for sections in self.tiles]

    def view_scale(self, stored):
        """(scale, constant) as views of the byte tensor, or (None, None): output * scale + constant + bias.

        The constant keeps what an unsigned layer adds to its output, and takes back in its bias, out of the scaling.
        """
        return tuple(view_section(stored, self.scale[name]) for name in ("scale", "constant")) if self.scale else (None, None)

    @property
    def fits_in_branch(self):
        """Whether nothing is left to do after the kernels: no rank beside the branches, no scale for the output."""
        return not self.scale and not any("down" in sections for sections in self.tiles)


class LoraFactors:
    """The factors of all LoRAs on one layer: what they are, and where they lie in a byte tensor of `nbytes`.

    tiles          [format.Tile] of the layer
    changes        [LowRank]
    sections       LoraSections
    output_scale   fp32 [N] or None: a factor for the layer's output, the changes and the bias excepted

    Raises LoraError when a factor has NaN or Inf, or would at its strength. The downs are kept in host memory as they will
    lie in the bytes, but without strength: another strength is one multiplication, and needs no file.
    """

    def __init__(self, tiles, changes, output_scale=None):
        self.most = min(torch.finfo(tile.weight.dtype).max for tile in tiles)
        self.least_scale = 1.0 if output_scale is None else min(float(output_scale.abs().min()), 1.0)
        self._refuse(changes)
        self.changes, self.output_scale = list(changes), output_scale
        self.shared_downs = [_shared_downs(tile, changes) for tile in tiles]
        scale = {} if output_scale is None else {name: (output_scale.shape, torch.float32) for name in ("scale", "constant")}
        (scale, *sections), self.nbytes = lay_out([scale, *(
            _shapes(tile.weight, sum(len(part.down) for part in parts)) for tile, parts in zip(tiles, self.shared_downs))])
        self.sections = LoraSections(sections, scale)
        self.downs = [_downs(tile.weight, parts, sections) if parts else (None, None)
                      for tile, parts, sections in zip(tiles, self.shared_downs, self.sections.tiles)]

    def store(self, tiles):
        """A new byte tensor on the tiles' device, with everything in it."""
        stored = torch.empty(self.nbytes, dtype=torch.uint8, device=tiles[0].weight.device)
        if self.output_scale is not None:
            scale, constant = self.sections.view_scale(stored)
            scale.copy_(self.output_scale)
            constant.zero_()
            for tile in tiles:
                if tile.weight.unsigned:
                    part = slice(tile.row, tile.row + tile.weight.shape[0])
                    constant[part] += (1 - scale[part]) * dequantize(tile.weight)[1]
        for tile, branch, parts in zip(tiles, self.sections.view(stored), self.shared_downs):
            if not parts:
                continue
            up = _ups(tile, parts, self.output_scale)
            fused = up.shape[1] - (0 if branch.up is None else branch.up.shape[1])
            if branch.up is not None:
                branch.up.copy_(up[:, fused:])
            if fused:
                base = tile.weight.rank // layout.RANK_ALIGN
                if base:
                    _blocks(branch.proj_up)[:, :base] = _blocks(tile.weight.proj_up)
                    _blocks(branch.proj_down)[:, :base] = _blocks(tile.weight.proj_down)
                _blocks(branch.proj_up)[:, base:] = _blocks(layout.pack_up(_aligned(up[:, :fused])))
        self._write_downs(stored)
        return stored

    def same(self, changes):
        """Whether these are the changes, and the strengths, that are stored."""
        return self._same_factors(changes) and all(
            one.strength == other.strength for one, other in zip(changes, self.changes))

    def rescale(self, stored, changes):
        """Write the downs for the strengths of `changes`. False, and nothing done, where more than strengths differ.

        Raises LoraError, and does nothing, where a strength makes NaN or Inf of a factor.
        """
        if not self._same_factors(changes) or any(changes[i].strength != changes[part.changes[0]].strength
                                                  for parts in self.shared_downs for part in parts for i in part.changes):
            return False
        if not self.same(changes):
            self._refuse(changes)
            self.changes = list(changes)
            self._write_downs(stored)
        return True

    def _refuse(self, changes):
        for change in changes:
            down, up, scale = largest(change.down), largest(change.up), abs(change.scale)
            if not (math.isfinite(down) and math.isfinite(up)):
                raise LoraError("contains NaN or Inf")
            by_strength, by_scale = down * abs(change.strength), up * scale
            if self.least_scale:
                by_scale /= self.least_scale
            fits = (max(by_strength, by_scale) <= self.most and by_strength <= MOST and by_strength * by_scale <= MOST
                    and abs(change.strength) <= MOST and scale <= MOST and self.least_scale > 0)
            if not fits:                # NaN does not fit either
                raise LoraError(f"becomes Inf at strength {change.strength:g} and scale {change.scale:g}: its factors reach "
                                f"{down:.2g} and {up:.2g}")

    def _same_factors(self, changes):
        return len(changes) == len(self.changes) and all(map(LowRank.same_factors, changes, self.changes))

    def _write_downs(self, stored):
        for branch, parts, (fused, rest) in zip(self.sections.view(stored), self.shared_downs, self.downs):
            strengths = [self.changes[part.changes[0]].strength for part in parts for _ in part.down]
            at = len(strengths) - (0 if rest is None else len(rest))
            if fused is not None:
                _multiply(fused, strengths[:at], lambda ranks: _blocks(layout.pack_down(_aligned(ranks.expand(16, -1)))),
                          _blocks(branch.proj_down)[:, -fused.shape[1]:])
            if rest is not None:
                _multiply(rest, strengths[at:], lambda ranks: ranks[:, None], branch.down)


def widened(tile, changes):
    """(proj_down [K, R], proj_up [N, R]) packed: a tile's own branch with these changes in it, of whatever rank; for files.

    tile   format.Tile, its weight in the file's order
    """
    weight, parts = tile.weight, _shared_downs(tile, changes)
    if not parts:
        return weight.proj_down, weight.proj_up
    k, downs = weight.shape[1], []
    for part in parts:
        strength = changes[part.changes[0]].strength
        downs.append(torch.nn.functional.pad(part.down.float() * strength, (part.col, k - part.col - part.down.shape[1])))
    down, up = torch.cat(downs).t().to(weight.dtype), _ups(tile, parts, None)
    base = weight.branch() or (down[:, :0], up[:, :0])
    return tuple(pack(_aligned(torch.cat(pair, 1))) for pack, pair in (
        (layout.pack_down, (base[0], down)), (layout.pack_up, (base[1], up))))


def largest(tensor):
    """The largest magnitude in a tensor, Inf or NaN if it has one. Found once: another strength asks in a moment."""
    if not hasattr(tensor, "svdq_largest"):
        low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor) if tensor.numel() else (0, 0)
        tensor.svdq_largest = max(-float(low), float(high))
    return tensor.svdq_largest


def nbytes(tiles, ranks):
    """The bytes of the factors of a layer at most, for changes of (row, n, col, k, rank) each."""
    groups = []
    for tile in tiles:
        n, k = tile.weight.shape
        groups.append(_shapes(tile.weight, sum(rank for row, rows, col, cols, rank in ranks
                                               if row < tile.row + n and tile.row < row + rows
                                               and col < tile.col + k and tile.col < col + cols)))
    return lay_out(groups)[1]


def appended_rank(tile, changes):
    """How much rank these changes add to a tile."""
    return sum(len(part.down) for part in _shared_downs(tile, changes))


def _shared_downs(tile, changes):
    """[SharedDown]: what of the changes falls on a tile."""
    parts = []
    for i, change in enumerate(changes):
        rows, row = _overlap(change.row, len(change.up), tile.row, tile.weight.shape[0])
        cols, col = _overlap(change.col, change.down.shape[1], tile.col, tile.weight.shape[1])
        down, up = change.down[:, cols], change.up[rows]
        if not up.numel() or not down.numel():
            continue
        if len(up) < len(change.up):            # factors of several layers fused into one are block diagonal
            used = up.count_nonzero(0) > 0
            if not used.all():
                down, up = down[used], up[:, used]
        if not len(down):
            continue
        for part in parts:                      # q, k and v trained with one down: once is enough
            if (col == part.col and changes[part.changes[0]].strength == change.strength
                    and not any(row < other + len(theirs) and other < row + len(up) for other, theirs, _ in part.ups)
                    and (down is part.down or down.dtype == part.down.dtype and torch.equal(_bits(down), _bits(part.down)))):
                part.ups.append((row, up, change.scale))
                part.changes.append(i)
                break
        else:
            parts.append(SharedDown(down, col, [(row, up, change.scale)], [i]))
    return parts


def _bits(tensor):
    """For comparing what torch has no comparison of: fp8."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _overlap(start, length, tile_start, tile_length):
    """(the part of start..start+length that lies in the tile, counted from start; where it begins in the tile)"""
    first, last = max(start, tile_start), min(start + length, tile_start + tile_length)
    return slice(first - start, max(last, first) - start), first - tile_start


def _shapes(weight, rank):
    """{field of Branch: (shape, dtype)} for `rank` more."""
    if not rank:
        return {}
    (n, k), dtype, base = weight.shape, weight.dtype, weight.rank
    fused = min(rank, max(MAX_RANK - base, 0)) if weight.has_branch else 0
    shapes, total = {}, base + -(-fused // layout.RANK_ALIGN) * layout.RANK_ALIGN
    if fused:
        shapes = {"proj_down": ((k, total), dtype), "proj_up": ((n, total), dtype)}
    if rank > fused:
        shapes |= {"down": ((rank - fused, k), dtype), "up": ((n, rank - fused), dtype)}
    return shapes


def _downs(weight, parts, sections):
    """The downs of a tile, one after the other: (those that are fused, packed in blocks; those in plain order)."""
    k, dtype = weight.shape[1], weight.dtype
    if any(part.down.dtype != dtype for part in parts):
        dtype = torch.float32                   # rounded once, with the strength in it
    downs = torch.cat([torch.nn.functional.pad(part.down.to(dtype), (part.col, k - part.col - part.down.shape[1]))
                       for part in parts])
    fused = len(downs) - (sections["down"]["shape"][0] if "down" in sections else 0)
    packed = _blocks(weight.pack_down(_aligned(downs[:fused].t()))) if fused else None
    return packed, downs[fused:] if fused < len(downs) else None


def _ups(tile, parts, output_scale):
    """The ups of a tile beside one another, [N, r] in the dtype of its factors."""
    n, dtype, columns = tile.weight.shape[0], tile.weight.dtype, []
    for part in parts:
        row, up, scale = part.ups[0]
        if output_scale is None and len(up) == n and scale == 1:
            columns.append(up.to(dtype))
            continue
        column = torch.zeros(n, len(part.down))
        for row, up, scale in part.ups:
            column[row:row + len(up)] = up.float() * scale
        if output_scale is not None:
            column /= output_scale[tile.row:tile.row + n, None]
        columns.append(column.to(dtype))
    return torch.cat(columns, 1) if len(columns) > 1 else columns[0]


def _multiply(downs, strengths, spread, out):
    """out = downs * strengths, computed in fp32 and rounded once. `spread` brings one number per rank into downs' shape."""
    by = strengths[0]
    if any(strength != by for strength in strengths):           # one number for all is several times faster
        by = spread(torch.tensor(strengths, dtype=torch.float32)).to(out.device)
    torch.mul(downs.to(out.device), by, out=out)


def _aligned(factor):
    """[channels, r] with r grown to what layouts take."""
    more = -factor.shape[1] % layout.RANK_ALIGN
    return torch.nn.functional.pad(factor, (0, more)) if more else factor


def _blocks(packed):
    """[channels / 16, R / 16, 256]: the blocks a packed factor consists of. Rank grows along the second axis."""
    return packed.view(packed.shape[0] // 16, packed.shape[1] // 16, 256)


def factorise(delta, good_enough=GOOD_ENOUGH):
    """(down [r, k], up [n, r], relative error): the closest product of two factors, r at most MOST_RANK.

    delta fp32 [n, k]; r is the least that is good enough. Randomised SVD with a seed of its own: the same delta gives the
    same factors. Source: Halko, Martinsson and Tropp, arXiv 0909.4061, as torch.svd_lowrank has it.
    """
    total = delta.square().sum()
    if not total.isfinite():
        raise LoraError("contains NaN, Inf or numbers near it")
    total = delta.double().square().sum()
    size = min(MOST_RANK + 8, *delta.shape)
    with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):    # the user's seeds are not ours
        if delta.is_cuda:
            with torch.cuda.device(delta.device):
                torch.cuda.manual_seed(0)
        torch.default_generator.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta, size)
    s = s[:MOST_RANK]
    left = (total - s.double().square().cumsum(0)).clamp(min=0)
    rank = min(int((left > good_enough ** 2 * total).sum()) + 1, len(s)) if total > 0 else 0
    root = s[:rank].sqrt()
    error = float((left[rank - 1] / total).sqrt()) if rank else 0.0
    return (v[:, :rank] * root).t().contiguous(), (u[:, :rank] * root).contiguous(), error


def factorise_with_output_scale(delta, weight):
    """(down, up, scale, relative error): W + delta = scale * W + up @ down, as well as these can.

    A change that also scales output channels, as DoRA does, has full rank; with the scale taken out it has that of its
    LoRA. scale is fp32 [n], or None where scaling explains no more than chance would.
    """
    weight_norm = weight.square().sum(1).clamp(min=1e-30)

    def along_weight(what):
        return (what * weight).sum(1) / weight_norm

    rows = along_weight(delta)
    explained, total = (rows.square() * weight_norm).sum(), delta.square().sum()
    if explained <= 10 / weight.shape[1] * total or (1 + rows).abs().min() < 0.1:
        down, up, error = factorise(delta)
        return down, up, None, error
    for _ in range(3):          # the LoRA is not quite orthogonal to the weight: each turn finds most of what was missed
        down, up, _ = factorise(delta - rows[:, None] * weight, good_enough=0.05)
        rows = along_weight(delta - up @ down)
    rest = delta - rows[:, None] * weight
    down, up, error = factorise(rest)
    return down, up, 1 + rows, float(error * rest.norm() / delta.norm())
