"""Whether a variant computes what reference.py says: random layers, tolerances, comparisons.

One file for everybody who asks: trust (`small`, before a variant may serve), doctor (`wide`, with its figures), bench (before
it times) and the tests. A comparison is a Check; a NaN never passes.

Test: tests/unit/test_check.py
"""

import math
from typing import NamedTuple

import torch

from . import adaln, epilogues, layout, reference
from .prologues import Modulated
from .variant import HALVES, ROUNDED_TO, short
from .weights import AWQWeight, W4A4Weight

KINDS = ("int4", "int4 unsigned", "int4 without -8", "nvfp4", "awq")       # of random weights
SMALL = (70, 384, 384, 32)          # tokens, N, K, rank: tiles of 128, more groups than a ring of stages, a tail of 6 rows
# One row; a tail in the first tile; a second tile, FLUX's width and the widest fused branch.
WIDE = ((1, 256, 1152, 0), (17, 384, 640, 32), (130, 128, 3072, 128))

STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}      # half a step, relative
ROUNDED = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}      # one rounding, relative to the norm; fp32: sums
# Weights, inputs and sums are rounded, as in a 16-bit layer; fp32 where only sums are.
ROUNDED_OFTEN = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
TIES = {"int4": 1e-4, "nvfp4": 1e-4, "e4m3": 1e-3, "int8": 1e-3, "int8_group": 0.0}     # share of codes rounded the other way
LIMIT = 1e-2        # of a layer with its quantiser: 16-bit rounding gives 2e-3, a flipped code here and there a little more


class Check(NamedTuple):
    """One comparison: its error, and the most it may be."""
    what: str
    error: float
    limit: float

    @property
    def passed(self):
        return self.error <= self.limit

    def __str__(self):
        return f"{self.what}: {self.error:.1e} of at most {self.limit:.1e}"


def relative(got, want):
    """||got - want|| / ||want||. NaN wherever one is NaN."""
    got, want = got.double(), want.to(got.device).double()
    return float((got - want).norm() / want.norm())


# ---- random layers

def random_weight(kind, dtype, n, k, rank=32, device="cpu", seed=None):
    """(weight, bias) of one of KINDS in the file's order; outputs are of the order of 1 for a unit x.

    Codes take all 16 values, "without -8" all but one: layouts may store these in another way.
    """
    random = torch.Generator(device).manual_seed(n + k + rank if seed is None else seed)

    def uniform(*shape, scale=1.0):
        return (torch.rand(shape, generator=random, device=device) + 0.5) * scale

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    codes = torch.randint(0, 16, (n, k), generator=random, device=device, dtype=torch.uint8)
    bias, size = normal(n), 1 / (4 * math.sqrt(k))
    if kind == "awq":
        scales = uniform(k // 64, n, scale=size).to(dtype)
        return AWQWeight(layout.pack_awq(codes), scales, (scales * -7.5).to(dtype)), bias
    if kind == "int4 without -8":
        codes[codes == 8] = 9
    precision = kind.split()[0]
    scales = uniform(n, k // layout.GROUP[precision], scale=size if precision == "int4" else 1.0)
    return W4A4Weight(
        precision=precision, unsigned=kind == "int4 unsigned", qweight=layout.pack_codes(codes),
        wscales=layout.pack_scales(scales.to(dtype if precision == "int4" else torch.float8_e4m3fn)),
        smooth=layout.pack_vector(uniform(k).to(dtype)), wtscale=1.0 if precision == "int4" else size,
        proj_down=layout.pack_down(normal(k, rank, scale=k**-0.5)) if rank else None,
        proj_up=layout.pack_up(normal(n, rank, scale=rank**-0.5)) if rank else None), bias


def random_x(tokens, k, dtype, unsigned=False, device="cpu"):
    """Activations [tokens, K]: normal, those of an unsigned layer after GELU."""
    x = torch.randn(tokens, k, generator=torch.Generator(device).manual_seed(tokens), device=device)
    return (reference.gelu_tanh(x) if unsigned else x).to(dtype)


def random_epilogue(kind, tokens, n, dtype, device="cpu"):
    """One of the classes of epilogues.py, with operands of the order of 1 for out [tokens, N]."""
    random = torch.Generator(device).manual_seed(tokens + n)

    def normal(*shape, offset=0.0):
        return torch.randn(shape, generator=random, device=device) + offset

    if kind is epilogues.Gelu:
        return kind()
    if kind is epilogues.Gated:
        return kind(normal(tokens, n).to(dtype), normal(n).to(dtype))
    return kind(*normal(2, reference.HEAD, offset=2).to(dtype), normal(tokens, reference.HEAD // 2, 2, 2))


def random_modulated(tokens, k, dtype, items=1, device="cpu"):
    """A Modulated of the order of 1, scale and shift as chunks of one table."""
    random = torch.Generator(device).manual_seed(tokens + k)
    x = torch.randn(tokens, k, generator=random, device=device) * 2 + 1
    table = torch.randn(items, 3 * k, generator=random, device=device).to(dtype)
    return Modulated(x.to(dtype), table[:, k:2 * k], table[:, 2 * k:])


def moved(record, device):
    """A weight, an epilogue or a Modulated on another device."""
    return type(record)(**{field: value.to(device) if isinstance(value, torch.Tensor) else value
                           for field, value in vars(record).items()})


def kinds_of(variant):
    """The KINDS that a variant takes."""
    return [kind for kind in KINDS if kind.split()[0] in variant.precisions]


# ---- what a variant should compute

def wanted(variant, x, weight, bias):
    """fp32 [tokens, N]: the layer as reference.py has it, with activations rounded as the variant rounds them."""
    if weight.precision == "awq":
        return reference.awq_gemv(x, layout.unpack_awq(weight.qweight), weight.wscales.t(), weight.wzeros.t(), bias)
    layer = weight.logical(bias)
    if variant.activations is None:
        return reference.linear_weight_only(x, layer)
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 and variant.activations != "int8_group" else x
    return reference.linear_w4a4(half, layer, act=None if variant.activations == weight.precision else variant.activations)


def check_prepared(variant, x, weight, prepared, rows=slice(None)):
    """[Check] of what `prepare` made of these rows of x: codes but for ties, scales within a step, the low rank.

    weight   in the file's order; prepared on any device
    """
    layer, tokens = weight.logical(), len(x)
    codes, scales, low = (part.to(x.device) for part in variant.decode(prepared, weight))
    spec_codes, spec_scales, exact = reference.quant_down(x[rows], layer.smooth, layer.proj_down,
                                                          precision=variant.activations, unsigned=weight.unsigned)
    spec_codes = layout.e2m1(spec_codes) if variant.activations == "nvfp4" else spec_codes.float()
    off = (codes[:tokens][rows] - spec_codes).abs()
    step = {"e4m3": (spec_codes.abs() / 8).clamp(min=2.0**-9), "nvfp4": (spec_codes.abs() / 2).clamp(min=0.5)}.get(
        variant.activations, torch.ones_like(off))
    flipped = max(int((off > 0).sum()) - 1, 0) / off.numel()        # a single one proves nothing on a small shape
    spec_scales = spec_scales.float()
    live = spec_scales > 0
    apart = ((scales[:tokens][rows] - spec_scales).abs()[live] / spec_scales[live]).amax() if live.any() else 0.0
    tail = sum(int(part[tokens:].ne(0).sum()) for part in (codes, scales, low))
    checks = [Check("codes", flipped if bool((off <= step).all()) else math.inf, TIES[variant.activations]),
              Check("scales", float(apart), 1e-5 if ROUNDED_TO[variant.activations] == 8 else 2 * STEP[x.dtype]),
              Check("rows past the end", float(tail), 0.0)]
    return [*checks, Check("low rank", relative(low[:tokens][rows], exact), ROUNDED[x.dtype])] if weight.rank else checks


def check_product(variant, prepared, weight, bias, out, rows=slice(None)):
    """[Check] of rows of out against float64 on the same prepared operands: one rounding apart."""
    layer, tokens = weight.logical(), len(out)
    codes, scales, low = (part[:tokens][rows].double() for part in variant.decode(prepared, weight))
    scales = scales[:, None] if scales.ndim == 1 else scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    dense = reference.dequantize_weight(layer.codes, layer.wscales, layer.precision, layer.wcscales, layer.wtscale).double()
    exact = (codes * scales) @ dense.T + low @ layer.proj_up.double().T + bias.double()
    return [Check("product", relative(out[rows], exact), max(ROUNDED[out.dtype], variant.sum_error)), finite(out)]


def check_modulated(variant, weight, modulated):
    """The Check of what a variant's kernel makes of a Modulated for two layers, and of two for one each, by their outputs.
    `weight` in its order."""
    errors, other = [], random_modulated(2 * len(modulated) + 1, weight.shape[1], modulated.dtype, device=modulated.device)
    for inputs in ((modulated, modulated), (modulated, other)):
        for x, prepared in zip(inputs, variant.prepared([(x, weight) for x in inputs])):
            want, out = torch.full((2, len(x), weight.shape[0]), math.nan, dtype=x.dtype, device=x.device)
            variant.run(x.of(), weight, want)
            variant.run(x, weight, out, prepared=prepared)
            errors.append(math.inf if prepared is None else relative(out, want))
    return Check("Modulated", max(errors, key=lambda error: (math.isnan(error), error)), LIMIT)


def check_feeds(variant, x, weight, bias):
    """The Checks of what a variant's kernel makes of GELU of a product for a layer with signed codes, and one without, by their
    outputs. `weight` in its order."""
    (tokens, n), checks = (len(x), weight.shape[0]), []
    prepared = variant.prepare(x, weight)
    h = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    variant.product(prepared, weight, h, bias, False, epilogues.Gelu())
    for kind in kinds_of(variant)[:2]:
        following, last = random_weight(kind, x.dtype, 128, n, 16, x.device)
        following = following if variant.layout is None else variant.layout.pack(following)
        want, out = torch.empty(2, tokens, 128, dtype=h.dtype, device=h.device)
        variant.run(h, following, want, last)
        made = variant.feeds(prepared, weight, bias, following, tokens)
        if made is None:
            return checks
        variant.product(made, following, out.fill_(math.nan), last, False, None)
        checks.append(Check(f"product that feeds {kind}", relative(out, want), LIMIT))
    return checks


def finite(out):
    return Check("not finite", float((~out.isfinite()).sum()), 0.0)


def check_linear(variant, x, weight, bias, out, epilogue=None):
    """[Check] of a whole layer and an epilogue against `wanted`, which is computed where weight, x and bias are."""
    limit = ROUNDED_OFTEN[x.dtype] if variant.activations is None else max(ROUNDED_OFTEN[x.dtype], LIMIT)
    want = wanted(variant, x, weight, bias)
    return [Check("linear", relative(out, want if epilogue is None else epilogue.of(want)), limit), finite(out)]


# ---- a variant as a whole

def checks_of(variant, kind, dtype, shape, device):
    """[Check] of a variant on one random layer: the whole, both halves where they can be looked at, what it fuses."""
    tokens, n, k, rank = shape
    tokens = tokens if variant.max_rows is None else min(tokens, variant.max_rows)
    weight, bias = random_weight(kind, dtype if dtype in HALVES else torch.bfloat16, n, k, rank)
    x, bias = random_x(tokens, k, dtype, weight.unsigned), bias.to(dtype)
    there = weight.to(device)
    packed = there if variant.layout is None else variant.layout.pack(there)

    def run(epilogue=None):
        out = torch.full((tokens, n), math.nan, dtype=dtype, device=device)
        variant.run(x.to(device), packed, out, bias.to(device), epilogue=epilogue)
        return out.cpu()

    out = run()
    checks = check_linear(variant, x, weight, bias, out)
    if variant.decode is not None:
        prepared = tuple(part.cpu() for part in variant.prepare(x.to(device), packed))
        checks += check_prepared(variant, x, weight, prepared) + check_product(variant, prepared, weight, bias, out)
    for epilogue in sorted(variant.epilogues, key=lambda epilogue: epilogue.__name__):
        if epilogue is not epilogues.QKV or n % (3 * reference.HEAD) == 0:
            operands = random_epilogue(epilogue, tokens, n, dtype)
            checks.append(Check(epilogue.__name__, relative(run(moved(operands, device)), operands.of(out)), LIMIT))
    if variant.modulates is not None and not weight.unsigned and k <= adaln.WIDEST:
        checks.append(check_modulated(variant, packed, random_modulated(tokens, k, dtype, 1 + (tokens % 2 == 0), device)))
    if variant.feeds is not None and kind == kinds_of(variant)[0]:
        checks += check_feeds(variant, x.to(device), packed, bias.to(device))
    return checks


def small(variant, device):
    """The failed checks of a variant on a device, as texts: on layers small enough to ask before the first use."""
    failed = []
    for kind in kinds_of(variant):
        for dtype in variant.dtypes:
            try:
                failed += [f"{kind} {short(dtype)} {check}" for check in checks_of(variant, kind, dtype, SMALL, device)
                           if not check.passed]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:               # a launch that the driver refuses, kernels that were not built
                failed.append(f"{kind} {short(dtype)}: {error}")
    return failed


def wide(variant, kind, dtype, device):
    """The Check of a variant that came closest to its limit, or beyond it, over the shapes WIDE. Raises what it raises."""
    checks = []
    for tokens, n, k, rank in WIDE:
        where = f", tokens {tokens}, {k} -> {n}, rank {rank}"
        checks += [check._replace(what=check.what + where)
                   for check in checks_of(variant, kind, dtype, (tokens, n, k, rank), device)]
    return max(checks, key=lambda check: (not check.passed, check.error / check.limit if check.limit else 0))
