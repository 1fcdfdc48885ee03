"""Results of a kernel against float64, element by element: sums in fp32, rounded once to 16 bit."""

import torch

from svdq_pack.svdq.kernels import epilogues
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


def finished(epilogue, y, size, before=None):
    """The epilogue of float64 y, and the sum of absolute terms: by how much an fp32 rounding of each can move the result."""
    if before is not None:
        y, size = y + before.double(), size + before.double().abs()
    if isinstance(epilogue, epilogues.Gelu):
        return torch.nn.functional.gelu(y, approximate="tanh"), 1.2 * size
    if isinstance(epilogue, epilogues.Gated):
        residual, gate = epilogue.residual.double(), epilogue.gate.double()
        return residual + gate * y, residual.abs() + gate.abs() * size
    heads, sizes = (part.view(len(y), 3, -1, 64, 2) for part in (y, size))
    squares = heads.square().mean((-2, -1), keepdim=True)
    norm = (squares + epilogue.eps).rsqrt()
    off = (sizes * heads.abs()).mean((-2, -1), keepdim=True) / squares + 1              # of the norm, relative
    weight, turn = torch.stack((epilogue.query, epilogue.key)).double().view(2, 1, 64, 2), epilogue.rotation.double()
    z = (heads * norm)[:, :2] * weight
    z_size = ((sizes + heads.abs() * off) * norm)[:, :2] * weight.abs()
    out, out_size = heads.clone(), sizes.clone()
    out[:, :2] = torch.einsum("mirc,mghic->mghir", turn, z)
    out_size[:, :2] = torch.einsum("mirc,mghic->mghir", turn.abs(), z_size)
    return out.view(y.shape), out_size.view(y.shape)
