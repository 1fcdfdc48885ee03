"""What every variant is given for nothing: rules that say why it declines, and a `run` that does what its product leaves."""

from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq.kernels import check, epilogues, ops, registry
from svdq_pack.svdq.kernels.rows import is_aligned
from svdq_pack.svdq.kernels.variant import Target, Variant, sm
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.tests.unit.layers import BF16, EPILOGUES, F16, F32, VIEWS, inputs, make

WEIGHT_ONLY = next(variant for variant in registry.VARIANTS if variant.name == "weight_only")


# run

class Picky:
    """A variant whose halves insist on what its row promises them, and keep what they were asked for."""

    def __init__(self, **row):
        self.calls = []
        self.row = Variant("picky", "for this test", self.prepare, self.product, row_bytes=16, max_rank=16,
                           epilogues=frozenset((epilogues.Gelu, epilogues.Gated)), **row)

    def prepare(self, x, weight):
        assert is_aligned(x, 16) and weight.rank <= 16
        return x

    def product(self, x, weight, out, bias, accumulate, epilogue):
        assert is_aligned(out, 16) and weight.rank <= 16
        assert epilogue is None or type(epilogue) in self.row.epilogues and (epilogue.accumulates or not accumulate)
        assert not isinstance(epilogue, epilogues.Gated) or is_aligned(epilogue.residual, 16)
        self.calls.append((weight.rank, accumulate, epilogue and type(epilogue).__name__))
        y = torch.empty_like(out)
        WEIGHT_ONLY.run(x, weight, y, bias)
        y = y + out if accumulate else y
        out.copy_(y if epilogue is None else epilogue.of(y))


@pytest.mark.parametrize("epilogue", [None, *EPILOGUES])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rank", [0, 16, 32])
@pytest.mark.parametrize("view", ["slice of a wider one", "columns at an odd offset", "transposed"])
def test_run(view, rank, accumulate, epilogue):
    """Rows that kernels cannot load, a branch too wide, an epilogue that the product does not do."""
    weight, bias, picky = make("int4", n=384, k=128, rank=rank), torch.ones(384), Picky()
    plain, out, x = torch.full((5, 384), 3.0), VIEWS[view](5, 384), VIEWS[view](5, 128).copy_(inputs(5, 128))
    after = epilogue and check.random_epilogue(EPILOGUES[epilogue], 5, 384, F32)
    if epilogue == "Gated":
        after = replace(after, residual=VIEWS[view](5, 384).copy_(after.residual))
    WEIGHT_ONLY.run(x.contiguous(), weight, plain, bias, accumulate, after)
    picky.row.run(x, weight, out, bias, accumulate, after)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    inside = epilogue in ("Gelu", "Gated") and rank <= 16 and not (accumulate and epilogue == "Gelu")
    assert picky.calls == [(rank if rank <= 16 else 0, accumulate, epilogue if inside else None)]
    out.fill_(3)
    assert (out._base == 3).all()


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("view", VIEWS)
def test_residual_that_is_out(view, rank):
    weight, picky = make("int4", rank=rank), Picky()
    residual, gate = inputs(5, 256), torch.randn(256, generator=torch.Generator().manual_seed(1))
    x, want = inputs(5, 384), torch.zeros(5, 256)
    out = VIEWS[view](5, 256).copy_(residual)
    WEIGHT_ONLY.run(x, weight, want, epilogue=epilogues.Gated(residual, gate))
    picky.row.run(x, weight, out, epilogue=epilogues.Gated(out, gate))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_rows_that_need_no_alignment_are_not_copied():
    """The row stride of a single row means nothing, and last stride 1 with whole rows is what kernels load."""
    seen = []
    row = Variant("seeing", "", lambda x, weight: seen.append(x) or x, lambda *_, **__: None, row_bytes=16)
    for x in (torch.zeros(1, 385)[:, :384], torch.zeros(7, 640)[:, 128:512], torch.zeros(14, 384)[::2]):
        row.run(x, make("int4"), torch.zeros(len(x), 256))
        assert seen.pop() is x
    row.run(torch.zeros(7, 385)[:, 1:], make("int4"), torch.zeros(7, 256))
    assert seen.pop().stride() == (384, 1)


def test_through_linear(monkeypatch):
    """ops.linear gives a variant everything it was given."""
    picky, x, out, bias = Picky(device=("cpu",), preference=99), inputs(5, 384), torch.zeros(5, 256), torch.ones(256)
    monkeypatch.setattr(registry, "VARIANTS", (picky.row, *registry.VARIANTS))
    monkeypatch.setattr(registry, "trusted", lambda variant, target: True)
    weight, want = make("int4", rank=16), torch.zeros(5, 256)
    WEIGHT_ONLY.run(x, weight, want, bias, True, epilogues.Gelu())
    ops.linear(x, weight, out, bias, True, epilogue=epilogues.Gelu())
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert picky.calls == [(16, True, None)]


# Rules

ROW = Variant("row", "for this test", None, None, ("int4", "nvfp4"), "int4", device=("cuda", (8, 0), (8, 9)),
              dtypes=(BF16, F16), same_dtype=True)
ADA = Target("cuda", (8, 9))


@pytest.mark.parametrize("changes, target, dtype, weight, act_bits, why", [
    ({}, ADA, BF16, "int4", None, None), ({}, ADA, BF16, "int4", 4, None),
    ({}, Target("cuda", (8, 0)), BF16, "int4", None, None),
    ({}, ADA, BF16, "awq", None, "takes int4 and nvfp4 weights, not awq"),
    ({}, Target("cpu"), BF16, "int4", None, "needs a cuda device"),
    ({}, Target("rocm", None, 0), BF16, "int4", None, "needs a cuda device"),
    ({"device": ("cpu",)}, ADA, BF16, "int4", None, "needs a cpu device"),
    ({"device": ("cpu",)}, Target("cpu"), BF16, "int4", None, None),
    ({"device": None}, Target("mps"), BF16, "int4", None, None),
    ({}, Target("cuda", (7, 5)), BF16, "int4", None, "is made for sm_80 to sm_89, and this GPU is sm_75"),
    ({}, Target("cuda", (9, 0)), BF16, "int4", None, "is made for sm_80 to sm_89, and this GPU is sm_90"),
    ({"tensor_cores": True}, ADA._replace(lacking="X"), BF16, "int4", None, "needs tensor cores, which X lacks"),
    ({"tensor_cores": True}, ADA, BF16, "int4", None, None), ({}, ADA._replace(lacking="X"), BF16, "int4", None, None),
    ({}, ADA, F32, "int4", None, "takes bfloat16, float16, not float32"),
    ({}, ADA, F16, "int4", None, "needs scales of the compute dtype float16, the file has bfloat16"),
    ({"same_dtype": False}, ADA, F16, "int4", None, None),
    ({}, ADA, BF16, "int4", 8, "rounds activations to 4 bits, not 8"),
    ({}, ADA, BF16, "int4", 16, "rounds activations to 4 bits, not 16"),
    ({"activations": "e4m3"}, ADA, BF16, "int4", 4, "rounds activations to 8 bits, not 4"),
    ({"activations": "e4m3"}, ADA, BF16, "int4", 8, None),
    ({"activations": None}, ADA, BF16, "int4", 4, None), ({"activations": None}, ADA, BF16, "int4", 16, None)])
def test_why_it_declines(changes, target, dtype, weight, act_bits, why):
    assert replace(ROW, **changes).declines(target, dtype, example(weight), act_bits) == why


@pytest.mark.parametrize("activations, bits", [(None, 16), ("int4", 4), ("nvfp4", 4), ("e4m3", 8), ("int8", 8)])
def test_act_bits(activations, bits):
    assert replace(ROW, activations=activations).act_bits == bits


def test_whom_it_is_meant_for():
    """No CPU runs CUDA kernels: nobody there wants to read why not. An old GPU does."""
    assert ROW.meant_for(Target("cuda", (7, 5))) and not ROW.meant_for(Target("cpu")) and not ROW.meant_for(Target("rocm"))
    assert replace(ROW, device=None).meant_for(Target("cpu")) and replace(ROW, device=("cpu",)).meant_for(Target("cpu"))


def test_target(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 6), (9, 0)][index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Target.of("cpu") == Target("cpu", None, None) and Target.of(torch.device("meta")).type == "meta"
    assert Target.of("cuda:0") == Target("cuda", (8, 6), 0) and Target.of(torch.device("cuda")) == Target("cuda", (9, 0), 1)
    assert [Target.of(device).name for device in ("cpu", "cuda:0", "cuda")] == ["cpu", "cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert Target.of("cuda:0") == Target("rocm", None, 0) and Target.of("cuda:0").name == "cuda:0"
    assert (sm((9, 0)), sm((12, 1)), ADA.name) == ("sm_90", "sm_121", "cuda")
