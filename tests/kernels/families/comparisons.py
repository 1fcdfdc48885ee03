"""Results of a kernel against float64, element by element: sums in fp32, rounded once to 16 bit."""

import torch

from svdq_pack.svdq.kernels.check import STEP

from ..executors import FP32

TOP = 65504.0           # the largest fp16 number


def assert_rounded(got, want, magnitude, who, slack=FP32):
    """`got` is float64 `want` computed in fp32 and rounded once.

    magnitude   the sum of absolute terms       slack   how far fp32 sums may be off, in magnitudes
    """
    assert got.shape == want.shape
    step = STEP[got.dtype] * want.abs() + (2.0**-25 if got.dtype == torch.float16 else 0)
    bad = ((got.double() - want).abs() > step + slack * magnitude) | ~got.isfinite()
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{who}: {int(bad.sum())} of {bad.numel()} wrong, first {at}: {got[at].item()} "
                             f"instead of {want[at].item()}, magnitude {magnitude[at].item()}")


def assert_saturated(got, want, magnitude, slack=FP32):
    """As assert_rounded, but beyond 65504 `got` is exactly that, and NaN where `want` is NaN.

    want [M, N] must go beyond in both signs and in both halves of a word.
    """
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()
    beyond = want.abs() > TOP + slack * magnitude
    for half in (0, 1):
        assert {-1.0, 1.0} <= set(want[:, half::2][beyond[:, half::2]].sign().tolist())
    off = got[beyond].double() != TOP * want[beyond].sign()
    assert not off.any(), f"beyond fp16: {got[beyond][off][0].item()} for {want[beyond][off][0].item()}"
    inside = ~(beyond | want.isnan())
    assert inside.any()
    assert_rounded(got[inside], want[inside].clamp(-TOP, TOP), magnitude[inside], "within fp16", slack)
