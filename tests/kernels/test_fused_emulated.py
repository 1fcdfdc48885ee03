"""The Python half of the fused path, arguments, grids and buffers included, with the emulator in the place of the GPU."""

import shutil

import pytest
import torch
from svdq_pack.kernels import check, launch, layout, weights
from svdq_pack.kernels.variants import awq_gemv, reference, w4a4_sm80
from svdq_pack.tests.kernels.emulator import launcher

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the kernels launched, on the emulator."""
    names = []

    def run(library, like, name, *rest):
        names.append(name)
        launcher.launch(library, like, name, *rest)

    monkeypatch.setattr(launch, "launch", run)
    return names


@pytest.mark.parametrize("variant", [w4a4_sm80.VARIANTS[0], awq_gemv.VARIANTS[0]], ids=lambda variant: variant.name)
def test_self_test_passes(variant, launched):
    assert check.small(variant, "cpu") == []
    kinds = [kind for kind in ("bf16", "fp16") for _ in range(2)]
    if variant.name == "w4a4_sm80":
        assert {name for name in launched if "gemm" in name} == {f"gemm_w4a4_{kind}_{sign}" for kind in kinds for sign in ("s4", "u4")}
    else:
        assert launched == [f"awq_gemv_{kind}_b8" for kind in kinds[::2]]


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
    w4a4_sm80.VARIANTS[0].run(x, weight, got, bias, accumulate)
    reference.VARIANTS[0].run(x, weight, want, bias, accumulate)
    assert (got.double() - want.double()).norm() <= check.LIMIT * want.double().norm()


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
    outs = awq_gemv.awq_gemv(x, [w.qweight for w in layers], [w.wscales for w in layers], [w.wzeros for w in layers], biases)
    for weight, bias, out in zip(layers, biases, outs, strict=True):
        want = x.double() @ weight.dense(torch.float32).double().t() + bias.double()
        assert (out.double() - want).norm() <= 4e-3 * want.norm()                   # bf16 output
