"""The torch paths on a real GPU against the same on the CPU. Skipped where there is none."""

import pytest
import torch
from svdq_pack.kernels import layout, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
N, K, RANK = 384, 512, 32


def weights(kind):
    """A random weight of this kind, on the CPU."""
    random = torch.Generator().manual_seed(1)

    def half(*size):
        return (torch.rand(*size, generator=random) + 0.5).to(torch.bfloat16)

    if kind == "awq":
        codes = torch.randint(0, 16, (N, K), generator=random, dtype=torch.uint8)
        return ops.AWQWeight(layout.pack_awq(codes), half(K // 64, N), -7 * half(K // 64, N))
    precision = kind.removesuffix("_unsigned")
    scales = half(N, K // layout.GROUP[precision])
    if precision == "nvfp4":
        scales = scales.to(torch.float8_e4m3fn)
    codes = torch.randint(0, 16, (N, K), generator=random, dtype=torch.uint8)
    return ops.W4A4Weight(precision, kind.endswith("_unsigned"), layout.pack_codes(codes), layout.pack_scales(scales),
                          half(K), half(K, RANK), half(N, RANK),
                          wcscales=half(N) if precision == "nvfp4" else None)


def on_gpu(weight):
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in vars(weight).items()}
    return type(weight)(**moved)


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("variant", ["weight_only", "reference"])
@pytest.mark.parametrize("kind", ["int4", "int4_unsigned", "nvfp4", "awq"])
def test_linear_on_gpu_equals_cpu(kind, variant, dtype):
    weight, x = weights(kind), torch.randn(17, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    with ops.using(variant):
        cpu, first, again = (torch.zeros(17, N, dtype=dtype, device=device) for device in ("cpu", "cuda", "cuda"))
        ops.linear(x, weight, cpu)
        moved = on_gpu(weight)
        ops.linear(x.cuda(), moved, first)
        ops.linear(x.cuda(), moved, again)
    assert torch.equal(first, again)
    error = (first.cpu().double() - cpu.double()).norm() / cpu.double().norm()
    # 16 bit: both round, in another order; the reference may flip a code of one activation
    assert error < {torch.float32: 1e-5 if variant == "weight_only" else 5e-3}.get(dtype, 1e-2)
