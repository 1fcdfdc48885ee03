"""Adaptive LayerNorm inside quantisers: what is made of an x is, to the bit, what the quantiser makes of the modulated x, for
every variant that has it; and that x is the one of float64. A low rank of columns of the identity shows it.
"""

import functools

import pytest
import torch

from svdq_pack.svdq.kernels import check, layout, registry
from svdq_pack.svdq.kernels.check import STEP
from svdq_pack.svdq.kernels.prologues import Modulated
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families.comparisons import assert_rounded

# One for those that differ in where they serve only: the one that runs on most GPUs.
VARIANTS = list({variant.modulates: variant for variant in registry.VARIANTS if variant.modulates}.values())
EACH = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
GPU_SLACK = 1e-6
ROW = 3e-6          # how far fp32 sums of a row are off, relative


@functools.cache
def weight(variant, k, rank, dtype, seed=0):
    """One with a low-rank branch of this rank, in the file's order; and as the variant reads it."""
    it, _ = check.random_weight(check.kinds_of(variant)[0], dtype, 128, k, rank, seed=seed)
    return it, it if variant.layout is None else variant.layout.pack(it)


def operands(tokens, k, dtype, items=1, seed=0):
    random = torch.Generator().manual_seed(tokens + seed)
    x = torch.randn(tokens, k, generator=random) * 2 + 1
    table = torch.randn(items, 3 * k, generator=random)             # as chunks of one modulation layer lie
    return Modulated(x.to(dtype), table[:, k:2 * k].to(dtype), table[:, 2 * k:].to(dtype), 1e-6)


def exact(modulated):
    """(y in float64 from statistics in float64, with the roundings between; how far fp32 may be off)"""
    x, dtype = modulated.x.double(), modulated.x.dtype
    scale, shift = (each.repeat_interleave(modulated.rows_per_item, 0) for each in (modulated.scale, modulated.shift))
    n = (x - x.mean(1, keepdim=True)) * (x.var(1, keepdim=True, unbiased=False) + modulated.eps).rsqrt()
    by = (1 + scale.float()).to(dtype).double()
    off = STEP[dtype] * n.abs() + ROW * (n.abs() + (x.mean(1, keepdim=True) / x.std(1, keepdim=True)).abs().nan_to_num())
    return n * by + shift.double(), off * by.abs()


def shown(executor, variant, modulated):
    """The y that the kernel makes of x, from low ranks that are columns of the identity."""
    k, dtype = modulated.x.shape[1], modulated.dtype
    parts = []
    for first in range(0, k, 128):
        it, _ = weight(variant, k, 128, dtype)
        it = it.with_branch(layout.pack_down(torch.eye(k, dtype=dtype)[:, first:first + 128].contiguous()), it.proj_up)
        packed = it if variant.layout is None else variant.layout.pack(it)
        made, = variant.modulates(executor.put(modulated), [executor.put(packed)])
        parts.append(variant.decode([part.cpu() for part in made], it)[2][:len(modulated)])
    return torch.cat(parts, 1)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_modulated(executor, variant, modulated, ranks, is_ordinary=True):
    """Of one layer or two: the kernel's numbers are the quantiser's of y, which is that of float64."""
    k, dtype = modulated.x.shape[1], modulated.dtype
    y = shown(executor, variant, modulated)
    if is_ordinary:
        want, off = exact(modulated)
        late = ((y.double() - want).abs() > STEP[dtype] * want.abs() + off + 2.0**-24).nonzero()
        assert y.isfinite().all() and not len(late), f"y: {len(late)} wrong, first {late[0].tolist()}"
    layers = [weight(variant, k, rank, dtype, seed) for seed, rank in enumerate(ranks)]
    packed = [executor.put(each) for _, each in layers]
    made = variant.modulates(executor.put(modulated), packed)
    for (it, _), there, prepared in zip(layers, packed, made, strict=True):
        codes, scales, low = (part.cpu() for part in prepared)
        for part, like in zip((codes, scales), variant.prepare(executor.put(y), there)):
            assert same_bits(part, like.cpu())
        low = variant.decode((codes, scales, low), it)[2]
        assert not low[len(y):].any()
        if it.rank and is_ordinary:
            down = it.logical().proj_down.double()
            assert_rounded(low[:len(y)], y.double() @ down, y.double().abs() @ down.abs(), "low", executor.slack)
    return y


@EACH
@on("tokens, k, ranks", emulator=[(1, 128, (0,)), (17, 640, (16, 32)), (70, 1152, (32,)), (16, 128, (128, 0))])
def test_modulated(executor, variant, tokens, k, ranks):
    for dtype in variant.dtypes:
        check_modulated(executor, variant, operands(tokens, k, dtype), ranks)
