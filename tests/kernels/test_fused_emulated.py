"""The Python half of the fused path, arguments, grids and buffers included, with the emulator in the place of the GPU."""

import shutil

import pytest
import torch
from svdq_pack.kernels import fused, layout, ops, selftest, weights
from svdq_pack.tests.kernels.emulator import fused as emulated

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the kernels launched, on the emulator."""
    names = []

    def launch(like, name, *rest):
        names.append(name)
        emulated.launch(like, name, *rest)

    monkeypatch.setattr(fused, "_launch", launch)
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_self_test_passes(dtype, launched):
    results = selftest.check("cpu", dtype, ops._fused_w4a4, ops._fused_awq)
    assert len(results) == 3 and all(result.passed for result in results), results
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert launched == [f"quant_down_{kind}_s4_r32", f"gemm_w4a4_{kind}_s4", f"quant_down_{kind}_u4_r32", f"gemm_w4a4_{kind}_u4",
                        f"awq_gemv_{kind}_b8"]


@pytest.mark.parametrize("tokens, rank", [(0, 32), (1, 0), (65, 144), (130, 48)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear(tokens, rank, accumulate):
    """No tokens, no branch, a branch too wide to fuse, more than one tile of rows."""
    random = torch.Generator().manual_seed(rank)

    def half(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(torch.bfloat16)

    n, k = 128, 256
    codes = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
    weight = weights.W4A4Weight("int4", False, layout.pack_codes(codes), layout.pack_scales(half(n, k // 64, scale=0.1)),
                            layout.pack_vector(half(k, scale=0.1) + 1),
                            layout.pack_down(half(k, rank, scale=0.05)) if rank else None,
                            layout.pack_up(half(n, rank)) if rank else None)
    x, bias, before = half(tokens, k), half(n), half(tokens, n)
    got, want = before.clone(), before.clone()
    ops._fused_w4a4(x, weight, got, bias, accumulate)
    ops.reference_of("linear_w4a4")(x, weight, want, bias, accumulate)
    assert (got.double() - want.double()).norm() <= selftest.LIMIT * want.double().norm()


def test_many_modulations_in_one_launch():
    """Layers of unequal height share x, as all modulations of a step do."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 128, generator=random).to(torch.bfloat16)
    layers, biases = [], []
    for n in (768, 384, 128):
        codes = torch.randint(0, 16, (n, 128), generator=random, dtype=torch.uint8)
        scales, zeros = (torch.randn(2, n, generator=random).to(torch.bfloat16) for _ in range(2))
        layers.append(weights.AWQWeight(layout.pack_awq(codes), scales, zeros))
        biases.append(torch.randn(n, generator=random).to(torch.bfloat16))
    outs = fused.awq_gemv(x, [w.qweight for w in layers], [w.wscales for w in layers], [w.wzeros for w in layers], biases)
    for weight, bias, out in zip(layers, biases, outs, strict=True):
        want = x.double() @ weight.dense(torch.float32).double().t() + bias.double()
        assert (out.double() - want).norm() <= 4e-3 * want.norm()                   # bf16 output
