"""One linear of a FLUX as an SVDQuant layer. Everything here is a function of its arguments: the same in, the same out.

    y = Q(x / s) . What  +  x . down . up  +  b          x: the input, shifted after GELU (INT4)

    smooth     s_k = (E x_k^2 / |R_k|^2)^(1/4), R what the low-rank branch leaves: the smoothing that minimises the product
               of weight and activation error, in closed form, three fixed-point rounds
    low rank   the largest singular directions of W s, then in turn: round what is left, fit the branch to what is missing
    round      every group's scale searched; with a second moment of the input, GPTQ
    bias       the mean output error goes into it, and the shift of the weights as they were rounded

Tried and left out, on the layers of tools/quantizer_table.py: a gradient search for s after the closed form (0.7 % worse
with the 64 tokens of a calibration file, 0.4 % better with 1024), least squares for the scales after the search (no
difference), more than 10 turns of the branch (20: 0.5 % better), more than 3 rounds of smoothing (no difference).

Tensors are fp32 on one device. Source: SVDQuant, arXiv 2411.05007. Test: tests/unit/test_quantize.py
"""

import math
from dataclasses import dataclass

import torch

from ..kernels import layout, reference
from ..kernels.weights import AWQWeight, W4A4Weight
from .rounding import Awq, Int4, Nvfp4, restore, round_to, row_chunks

OVERSAMPLE = 8          # directions more than the rank, which make the randomised SVD exact enough
HELD_OUT = 4            # one token of so many takes no part in anything but the report
GPTQ_BLOCK = 128
GPTQ_DAMPING = 0.05     # of the mean diagonal: a second moment from few tokens is not to be trusted further


@dataclass(frozen=True)
class Recipe:
    """How a layer is made. The defaults are the ones to use; the table of quantisers varies them."""
    precision: str = "int4"
    rank: int = 32
    alternations: int = 10
    smooth_rounds: int = 3
    symmetric: bool = False     # INT4 codes -7..7 and positive scales only


@dataclass(frozen=True)
class Input:
    """What the quantiser knows of a layer's input, on its device: mean, mean square [K], tokens [T, K]."""
    mean: torch.Tensor
    square: torch.Tensor
    tokens: torch.Tensor

    @property
    def used(self):
        return self.tokens[torch.arange(len(self.tokens)) % HELD_OUT != HELD_OUT - 1]

    @property
    def held_out(self):
        """For the report alone; all tokens where they are too few to hold one out."""
        return self.tokens[HELD_OUT - 1::HELD_OUT] if len(self.tokens) >= HELD_OUT else self.tokens


def low_rank(matrix, rank, start=None, iterations=2, seed=0):
    """(up [n, rank], down [rank, k]): the product closest to matrix [n, k], singular values split evenly.

    Randomised subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061). start [k, *] is where to look first: a
    former answer needs one iteration. Random numbers come from the CPU and a generator of their own.
    """
    n, k = matrix.shape
    size = min(rank + OVERSAMPLE, n, k)
    more = size if start is None else max(size - start.shape[1], 0)
    random = torch.randn(k, more, generator=torch.Generator().manual_seed(seed)).to(matrix.device)
    right = random if start is None else torch.cat((start, random), 1)
    for _ in range(iterations):
        left = _orthonormal(matrix @ _orthonormal(right))
        right = matrix.t() @ left
    # right = matrix^T left, so matrix ~ left right^T, and the SVD of right is small: via its Gram matrix.
    values, vectors = torch.linalg.eigh((right.t() @ right).double().cpu())
    values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank].float().to(matrix.device)
    root = values.sqrt().sqrt().float().to(matrix.device)       # of the singular values
    up = (left @ vectors) * root
    down = (right @ vectors).t() * torch.where(root > 0, 1 / root, 0.0)[:, None]
    return up, down


def _orthonormal(columns):
    """An orthonormal basis of the span of columns [n, r], zero where the rank is less: from the Gram matrix, which is far
    faster than Householder on a GPU; twice, because once loses half the digits."""
    for _ in range(2):
        columns = columns / torch.linalg.vector_norm(columns, dim=0).clamp(min=1e-30)
        values, vectors = torch.linalg.eigh((columns.t() @ columns).double().cpu())
        scale = torch.where(values > 1e-10 * values[-1], values.clamp(min=1e-300).rsqrt(), 0.0)
        columns = columns @ (vectors * scale).float().to(columns.device)
    return columns


def smoothing(weights, given, recipe, unsigned=False, seed=0):
    """s [K] fp32, bf16 values, for linears that share their input.

    weights  [W fp32 [n, K]], each with its own low-rank branch        given  Input

    To first order the error is (rounding of W s) . x/s + W s . (rounding of x/s). Both rounding steps follow the largest
    value of a group, so both parts are (sum_k s_k^2 r_k) (sum_k m_k / s_k^2), least when s_k^4 = m_k / r_k.
    """
    shift = reference.SHIFT if unsigned else 0.0
    variance = (given.square - given.mean.square()).clamp(min=0)
    shifted = variance + (given.mean + shift).square()
    # The steps are max/7 and, unsigned, max/15; shifted inputs weigh on the activation part by their square of that.
    moment = _floored(shifted * (49 / 225) + variance if unsigned else shifted)
    smooth, downs = torch.ones_like(moment), [None] * len(weights)
    for turn in range(recipe.smooth_rounds):
        energy = 0
        for i, weight in enumerate(weights):
            if not turn:
                energy = energy + weight.square().sum(0)
                continue
            scaled = weight * smooth
            if recipe.rank:
                start = None if downs[i] is None else (downs[i] * smooth).t()
                up, down = low_rank(scaled, recipe.rank, start, iterations=2 if start is None else 1, seed=seed)
                scaled, downs[i] = scaled.addmm_(up, down, alpha=-1), down / smooth
            energy = energy + scaled.square_().sum(0) / smooth.square()
        smooth = (moment / _floored(energy)).pow(0.25)
        smooth = smooth / smooth.log().mean().exp()
    if recipe.precision == "nvfp4":                     # bring the scales of activations into the middle of E4M3's range
        groups = (given.tokens / smooth).unflatten(1, (-1, layout.GROUP["nvfp4"])).abs().amax(2)
        middle = (groups / 6).median()
        smooth = smooth * (middle if middle > 0 else 1.0)
    return smooth.to(torch.bfloat16).float()


def _floored(values):
    """Positive: a channel that is never used or has no weights may be smoothed by anything but 0 and infinity."""
    mean = values.double().mean()
    return values.clamp(min=float(mean) * 1e-8 if mean > 0 else 1.0)


def quantise_w4a4(weight, bias, given, recipe, *, smooth=None, unsigned=False, blocks=1, covariance=None, seed=0):
    """One linear: weight fp32 [N, K], bias fp32 [N], given Input -> (W4A4Weight on the CPU, bias fp32 [N], facts).

    smooth      [K], or None to find it        unsigned    after GELU, which INT4 shifts
    blocks      NVFP4: row blocks with a scale of their own
    covariance  [K, K] of the input as it comes: GPTQ
    facts       {"sqnr", "smooth_min", "smooth_max", "rank_energy", "weight_error", "gptq"}
    """
    unsigned = unsigned and recipe.precision == "int4"
    if smooth is None:
        smooth = smoothing([weight], given, recipe, unsigned, seed)
    grid = Int4(recipe.symmetric) if recipe.precision == "int4" else Nvfp4(blocks)
    target = weight * smooth
    up, down = branch(target, grid, recipe, seed)
    # From here on the factors are what the file will hold; the residual is what they leave.
    up, down = up.to(torch.bfloat16).float(), (down / smooth).to(torch.bfloat16).float()
    residual = torch.addmm(target, up, down * smooth, alpha=-1)
    energy = 1 - float(residual.square().sum() / target.square().sum().clamp(min=1e-30))
    grid = grid.fit(residual)
    scales = torch.cat([grid.part(rows).search(residual[rows]) for rows in row_chunks(residual)])
    values, method = None, "none"
    if covariance is not None:
        noise = activation_noise(given.used, smooth, recipe.precision, unsigned)
        moment = covariance / smooth / smooth[:, None]
        moment.diagonal().add_(noise.square().mean(0))
        values, method = gptq(residual, moment, columns_of(grid, scales))
    if values is None:
        values = torch.cat([round_to(grid.part(rows), residual[rows], scales[rows]) for rows in row_chunks(residual)])
    packed = W4A4Weight(precision=recipe.precision, unsigned=unsigned, smooth=layout.pack_vector(smooth.to(torch.bfloat16)),
                        **_branch_fields(up, down, recipe.rank), **grid.pack(values, scales))
    rounded = restore(grid, values, scales)
    new_bias = corrected_bias(weight, bias, rounded, up, down, smooth, given, recipe.precision, unsigned)
    facts = {"smooth_min": float(smooth.min()), "smooth_max": float(smooth.max()), "rank_energy": energy,
             "weight_error": float((residual - rounded).norm() / target.norm().clamp(min=1e-30)), "gptq": method,
             "sqnr": sqnr(packed, new_bias, weight, bias, given.held_out)}
    return _to_cpu(packed), new_bias.cpu(), facts


def branch(target, grid, recipe, seed=0):
    """(up, down) of the smoothed weight: the low-rank branch that leaves a rounded rest the least error."""
    if not recipe.rank:
        return target.new_zeros(target.shape[0], 0), target.new_zeros(0, target.shape[1])
    up, down = low_rank(target, recipe.rank, iterations=3, seed=seed)
    rest = torch.empty_like(target)
    for turn in range(recipe.alternations):
        torch.addmm(target, up, down, alpha=-1, out=rest)
        fitted = grid.fit(rest)
        for rows in row_chunks(rest):
            mine = fitted.part(rows)
            scales = mine.search(rest[rows], quick=turn < recipe.alternations - 1)
            torch.sub(target[rows], restore(mine, round_to(mine, rest[rows], scales), scales), out=rest[rows])
        up, down = low_rank(rest, recipe.rank, start=down.t(), iterations=1, seed=seed + turn + 1)
    return up, down


def activation_noise(x, smooth, precision, unsigned):
    """Q(x / s) - x / s of tokens x [T, K], as the run time rounds them."""
    half, divisor = x.to(torch.bfloat16), smooth.to(torch.bfloat16)
    shift = reference.SHIFT if unsigned else 0.0
    if precision == "int4":
        codes, scales = reference.quantize_act_int4(half, divisor, unsigned=unsigned, shift=shift)
    else:
        codes, scales = reference.quantize_act_nvfp4(half, divisor)
    return reference.dequantize_act(codes, scales, precision) - (x + shift) / smooth


def corrected_bias(weight, bias, rounded, up, down, smooth, given, precision, unsigned):
    """The bias with which the mean output is right: E y = W mean + b.

    The mean is known from all tokens; the mean rounding error of the activations only from a few, so of each channel's it
    takes what stands out of chance.
    """
    shift = reference.SHIFT if unsigned else 0.0
    noise = activation_noise(given.used, smooth, precision, unsigned)
    average = noise.mean(0)
    if len(noise) > 1:
        chance = noise.var(0) / len(noise)
        average = average * (1 - chance / average.square().clamp(min=1e-30)).clamp(min=0)
    fed = (given.mean + shift) / smooth + average
    return bias + weight @ given.mean - rounded @ fed - up @ (down @ given.mean)


def sqnr(packed, new_bias, weight, bias, x):
    """Signal to noise of the layer as packed, in dB: what the reference computes from it against W x + b."""
    x = x.to(torch.bfloat16)
    exact = x.float() @ weight.t() + bias
    error = run_packed(packed, new_bias, x) - exact
    spread = (exact - exact.mean(0)).square().sum() if len(x) > 1 else exact.square().sum()
    return decibel(float(error.square().sum()), float(spread))


def decibel(noise, signal):
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30 + 1e-12 * signal))


def run_packed(packed, bias, x):
    """y [tokens, N] fp32 of a packed layer with 4-bit activations, as svdq/kernels/reference.py defines it."""
    if isinstance(packed, AWQWeight):
        return x.float() @ packed.dense(torch.float32).t() + bias
    return reference.linear_w4a4(x, packed.logical()) + bias


def _branch_fields(up, down, rank):
    if not rank:
        return {}
    return {"proj_down": layout.pack_down(down.t().to(torch.bfloat16).contiguous()),
            "proj_up": layout.pack_up(up.to(torch.bfloat16).contiguous())}


def _to_cpu(packed):
    moved = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in vars(packed).items()}
    return type(packed)(**moved)


# ---- GPTQ

def gptq(target, moment, columns, damping=GPTQ_DAMPING):
    """Round column after column, each time moving what was lost onto the columns to come (arXiv 2210.17323).

    target   fp32 [n, k]        moment  fp32 [k, k], E x x^T of what it is multiplied with
    columns  (values, restored): two functions of (column [n], its index)

    Returns (grid values [n, k], "gptq"), or (None, reason) when the moment is too degenerate to be inverted.
    """
    k = target.shape[1]
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor, reason = _inverse_factor(moment[order][:, order], damping)
    if factor is None:
        return None, reason
    snap, back = columns
    rest = target.t()[order].contiguous()               # a column is a row here: contiguous
    values = torch.empty_like(rest)
    indices = order.tolist()
    for start in range(0, k, GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, k)
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            values[i] = snap(rest[i], indices[i])
            errors[i - start] = (rest[i] - back(values[i], indices[i])) / factor[i, i]
            if i + 1 < stop:
                rest[i + 1:stop].addr_(factor[i, i + 1:stop], errors[i - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(target)
    result[:, order] = values.t()
    return result, "gptq"


def _inverse_factor(moment, damping):
    """Upper Cholesky factor of the inverse of the damped moment."""
    mean = moment.diagonal().mean()
    if not mean > 0:
        return None, "no second moment"
    for _ in range(5):
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, None
        damping *= 2
    return None, "the second moment is degenerate"


def columns_of(grid, scales):
    """(snap, back) of a W4A4 grid for gptq."""
    multiplier = grid.multiplier(scales).t().contiguous()
    inverse = torch.where(multiplier == 0, 0.0, 1 / multiplier)

    def snap(column, k):
        return grid.snap_scaled(column * inverse[k // grid.group])

    def back(values, k):
        return values * multiplier[k // grid.group]

    return snap, back


# ---- modulation layers

def quantise_awq(weight, bias, given):
    """A modulation linear -> (AWQWeight on the CPU, bias, facts). Its input is a smooth function of few numbers, so a
    handful of tokens says nearly all about it, and GPTQ leaves almost no error."""
    grid = Awq()
    found = [grid.search(weight[part]) for part in row_chunks(weight)]
    scales, zeros = (torch.cat(parts) for parts in zip(*found))
    by_group, of_group = scales.t().contiguous(), zeros.t().contiguous()
    centred = given.used - given.mean
    # Tokens say what the input does; the rest of its variance, which they cannot place, is spread over the diagonal.
    moment = centred.t() @ centred / max(len(centred), 1)
    codes, method = gptq(weight, moment,
                         (lambda column, k: grid.codes(column, by_group[k // grid.group], of_group[k // grid.group]),
                          lambda codes, k: codes * by_group[k // grid.group] + of_group[k // grid.group]))
    if codes is None:
        codes = grid.codes(weight.unflatten(1, (-1, grid.group)), scales[..., None], zeros[..., None]).flatten(1)
    packed = grid.pack(codes, scales, zeros)
    rounded = packed.dense(torch.float32)
    new_bias = bias + (weight - rounded) @ given.mean
    facts = {"weight_error": float((weight - rounded).norm() / weight.norm().clamp(min=1e-30)), "gptq": method,
             "sqnr": sqnr(packed, new_bias, weight, bias, given.held_out)}
    return _to_cpu(packed), new_bias.cpu(), facts
