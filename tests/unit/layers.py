"""Random weights of every kind, and what they stand for in float64. Import as `svdq_pack.tests.unit.layers`."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq.kernels import build, check, epilogues, layout, registry
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.svdq.kernels.variants import cpu
from svdq_pack.svdq.kernels.weights import AWQWeight

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Relative error of a K = 384 product whose weight, input and sum are rounded to the dtype; twice what was measured.
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 1.5e-2}
KINDS = ("int4", "int4 unsigned", "nvfp4", "nvfp4 wcscales", "int4 no branch", "awq")
CPU_VARIANTS = [v for v in registry.VARIANTS if v.device in (None, ("cpu",)) and not v.on_request]       # may serve on a CPU
EPILOGUES = {kind.__name__: kind for kind in (epilogues.Gelu, epilogues.Gated, epilogues.QKV)}

# name -> view(m, n): an fp32 matrix of threes in a wider memory of threes, `_base`
VIEWS = {
    "slice of a wider one": lambda m, n: torch.full((m, n + 256), 3.0)[:, 128:n + 128],
    "columns at an odd offset": lambda m, n: torch.full((m, n + 9), 3.0)[:, 1:n + 1],
    "every second row": lambda m, n: torch.full((2 * m, n), 3.0)[::2],
    "every third column": lambda m, n: torch.full((m, 3 * n), 3.0)[:, ::3],
    "transposed": lambda m, n: torch.full((n, m + 3), 3.0)[:, 1:m + 1].t(),
}


def make(kind, n=256, k=384, rank=32, half=BF16):
    """A weight of one of KINDS with full-range codes, -8 included."""
    base = {"nvfp4 wcscales": "nvfp4", "int4 no branch": "int4"}.get(kind, kind)
    weight, _ = check.random_weight(base, half, n, k, 0 if kind == "int4 no branch" else rank)
    if kind == "nvfp4 wcscales":
        scales = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5
        weight = replace(weight, wcscales=layout.pack_vector((scales * weight.wtscale).to(half)), wtscale=1.0)
    return weight


def exact(weight):
    """(W, bias) in float64, from the definition in checkpoint-format 6.1 and 5.7."""
    n, k = weight.shape
    if isinstance(weight, AWQWeight):
        group = torch.arange(k) // 64
        return layout.unpack_awq(weight.qweight).double() * weight.wscales.t().double()[:, group] + \
            weight.wzeros.t().double()[:, group], torch.zeros(n, dtype=torch.float64)
    codes = layout.unpack_codes(weight.qweight)
    values = layout.signed(codes).double() if weight.precision == "int4" else layout.e2m1(codes).double()
    values *= layout.unpack_scales(weight.wscales).double()[:, torch.arange(k) // layout.GROUP[weight.precision]]
    values *= weight.wtscale
    if weight.wcscales is not None:
        values *= layout.unpack_vector(weight.wcscales).double()[:, None]
    dense = values / layout.unpack_vector(weight.smooth).double()
    bias = dense.sum(1) * (0.171875 if weight.unsigned else 0)
    if weight.proj_down is not None:
        dense = dense + layout.unpack_up(weight.proj_up).double() @ layout.unpack_down(weight.proj_down).double().t()
    return dense, bias


def cpu_pairs(kinds, *more):
    """Parameters (kind, name of a variant): each that may serve this kind on a CPU, and these others."""
    return [(kind, name) for kind in kinds for name in [
        *(variant.name for variant in CPU_VARIANTS if kind.split()[0] in variant.precisions), *more]]


def needs_kernels(variant=None):
    """Skips the running test where kernels of the CPU, if the variant has any, cannot be built."""
    if (variant is None or variant.library is cpu.LIBRARY) and build.kernels_for(cpu.LIBRARY, None) is None:
        pytest.skip("no C++ compiler")


@contextmanager
def served_by(name):
    """registry.using for a variant that this machine has; skips where it has not."""
    needs_kernels(next(variant for variant in registry.VARIANTS if variant.name == name))
    with registry.using(name):
        yield


def wanted(x, weight):
    """What whoever serves now should make of x on the CPU, in float64: activations are rounded as it says, and nothing else."""
    variant = registry.plan(weight, Target("cpu"), x.dtype).variant
    return wanted_exactly(x, weight) if variant.activations is None else check.wanted(variant, x, weight, None).double()


def wanted_exactly(x, weight):
    dense, bias = exact(weight)
    return x.double() @ dense.t() + bias


def inputs(tokens, k, dtype=F32):
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def assert_close(got, want, tolerance):
    error = ((got.double() - want).norm() / want.norm()).item() if want.numel() else 0
    assert got.isfinite().all() and error <= tolerance, f"relative error {error:.1e}"
