"""Whether the operators of this machine compute what the reference says, on layers small enough to ask at start-up.

ops.py asks before it lets built kernels serve; `python -m svdq doctor` shows the figures.
"""

from typing import NamedTuple

import torch

from . import layout, ops
from .epilogues import QKV, Gated, Gelu
from .hopper import repack
from .weights import AWQWeight, W4A4Weight

LIMIT = 1e-2        # relative L2: 16-bit rounding of the output gives 2e-3, a flipped code here and there a little more
N, K, RANK, TOKENS = 256, 384, 32, 70       # two tiles, more groups than a ring of stages, a tail of 6 rows
HEADS = 384         # one head each of q, k and v


class Result(NamedTuple):
    what: str
    error: float                # relative L2 against the reference; NaN where an output is not finite

    @property
    def passed(self):
        return self.error <= LIMIT


def check(device, dtype, w4a4, awq):
    """[Result] for signed, unsigned and modulation layers.

    device, dtype   where and in what to run
    w4a4, awq       run(x, weight, out, bias, accumulate) of a variant in ops.VARIANTS; None leaves it out
    """
    random = torch.Generator().manual_seed(0)

    def half(*shape, scale=1.0, offset=0.0):
        return (torch.randn(*shape, generator=random) * scale + offset).to(dtype)

    results = []
    for unsigned in (False, True) if w4a4 else ():
        codes = torch.randint(0, 16, (N, K), generator=random, dtype=torch.uint8)
        x = half(TOKENS, K).abs() if unsigned else half(TOKENS, K)
        weight = W4A4Weight("int4", unsigned, layout.pack_codes(codes), layout.pack_scales(half(N, K // 64, scale=0.1)),
                                layout.pack_vector(half(K, scale=0.1, offset=1)), layout.pack_down(half(K, RANK, scale=0.05)),
                                layout.pack_up(half(N, RANK)))
        error = _compare(device, w4a4, ops.reference_of("linear_w4a4"), x, weight, half(N))
        results.append(Result("linear_w4a4 " + ("unsigned" if unsigned else "signed"), error))
    if awq:
        codes = torch.randint(0, 16, (N, K), generator=random, dtype=torch.uint8)
        weight = AWQWeight(layout.pack_awq(codes), half(K // 64, N, scale=0.1), half(K // 64, N, scale=0.5))
        results.append(Result("linear_awq", _compare(device, awq, ops.reference_of("linear_awq"), half(2, K), weight, half(N))))
    return results


def check_fp8(device, dtype, w4a8, w4a4):
    """[Result] for Hopper's kernels: 8-bit and 4-bit activations, signed and unsigned, nibbles and, for a code -8, bytes;
    and every epilogue.

    device, dtype   as for `check`          w4a8, w4a4   run of the variants of "linear_fp8"
    """
    random = torch.Generator().manual_seed(1)

    def half(*shape, scale=1.0, offset=0.0):
        return (torch.randn(*shape, generator=random) * scale + offset).to(dtype)

    results = []
    for unsigned in (False, True):
        codes = torch.randint(-7 - unsigned, 8, (N, K), generator=random, dtype=torch.int8)
        x = half(TOKENS, K).abs() if unsigned else half(TOKENS, K)
        weight = W4A4Weight("int4", unsigned, layout.pack_codes(codes), layout.pack_scales(half(N, K // 64, scale=0.1)),
                                layout.pack_vector(half(K, scale=0.1, offset=1)), layout.pack_down(half(K, RANK, scale=0.05)),
                                layout.pack_up(half(N, RANK)))
        packed, bias = repack(weight), half(N)
        for what, run, op in (("w4a8", w4a8, "linear_fp8"), ("w4a4", w4a4, "linear_w4a4")):
            spec = ops.reference_of(op)
            error = _compare(device, run, lambda x, _, *rest: spec(x, packed if op == "linear_fp8" else weight, *rest),
                             x, packed, bias)
            results.append(Result(f"linear_fp8 {what} " + ("unsigned" if unsigned else "signed"), error))
    codes = torch.randint(-7, 8, (HEADS, HEADS), generator=random, dtype=torch.int8)
    scales, smooth = half(HEADS, HEADS // 64, scale=0.1), half(HEADS, scale=0.1, offset=1)
    weight = repack(W4A4Weight("int4", False, layout.pack_codes(codes), layout.pack_scales(scales),
                                   layout.pack_vector(smooth)))
    x, bias = half(TOKENS, HEADS), half(HEADS)
    epilogues = (Gelu(), Gated(half(TOKENS, HEADS), half(HEADS)),
                 QKV(half(128, offset=2), half(128, offset=2), torch.randn(TOKENS, 64, 2, 2, generator=random)))
    for what, run in (("w4a8", w4a8), ("w4a4", w4a4)):
        plain = torch.empty(TOKENS, HEADS, dtype=dtype, device=device)
        run(x.to(device), weight.to(device), plain, bias.to(device), False)
        for epilogue in epilogues:
            out = torch.empty_like(plain)
            run(x.to(device), weight.to(device), out, bias.to(device), False, _moved(epilogue, device))
            name = f"linear_fp8 {what} {type(epilogue).__name__}"
            results.append(Result(name, _distance(out, epilogue.of(plain.cpu()))))
    return results


def _compare(device, run, reference, x, weight, bias):
    """Relative L2 between `run` on the device and `reference` on the CPU, in fp32."""
    out, want = torch.empty(len(x), N, dtype=x.dtype, device=device), torch.empty(len(x), N, dtype=x.dtype)
    run(x.to(device), weight.to(device), out, bias.to(device), False)
    reference(x, weight, want, bias, False)
    return _distance(out, want)


def _moved(epilogue, device):
    return type(epilogue)(**{field: value.to(device) if isinstance(value, torch.Tensor) else value
                             for field, value in vars(epilogue).items()})


def _distance(got, want):
    return ((got.cpu().float() - want.float()).norm() / want.float().norm()).item()
