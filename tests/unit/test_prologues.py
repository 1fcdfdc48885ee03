"""Modulated in the place of an x: the same numbers as its tensor, everywhere an x goes; what does not fit is said."""

from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq.kernels import check, ops, reference, registry
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.prologues import Modulated, plain
from svdq_pack.tests.unit.layers import BF16, EPILOGUES, F32, make


def modulated(tokens=6, k=384, items=2, dtype=F32):
    return check.random_modulated(tokens, k, dtype, items)


def test_of():
    """Each item's rows by its own scale and shift."""
    it = modulated()
    x, scale, shift = it.x.view(2, 3, 384), it.scale, it.shift
    assert torch.equal(it.of(), reference.modulated(x, scale, shift, it.eps).view(6, 384)) and plain(it.x) is it.x
    assert torch.equal(it.of()[3:], Modulated(it.x[3:], scale[1:], shift[1:], it.eps).of())
    assert (len(it), it.dtype, it.device, it.rows_per_item) == (6, F32, torch.device("cpu"), 3)
    assert torch.equal(it.of(), plain(it)) and not len(Modulated(it.x[:0], scale, shift).of())


@pytest.mark.parametrize("epilogue", [None, *EPILOGUES])
@pytest.mark.parametrize("name", ["weight_only", "reference"])
def test_linear(name, epilogue):
    weight, it = make("int4", n=384), modulated()
    after = epilogue and check.random_epilogue(EPILOGUES[epilogue], 6, 384, F32)
    out, want = torch.empty(2, 6, 384)
    with registry.using(name):
        ops.linear(it, weight, out, epilogue=after)
        ops.linear(it.of(), weight, want, epilogue=after)
    assert torch.equal(out, want)


@pytest.mark.parametrize("changes, words", [
    (dict(x=torch.zeros(6, 2, 192)), r"x is \[6, 2, 192\]"), (dict(x=torch.zeros(6, 384, dtype=torch.int8)), "int8"),
    (dict(scale=torch.zeros(384)), r"scale is \[384\].* Needs \[items, 384\]"),
    (dict(scale=torch.zeros(2, 384, dtype=BF16)), "scale is .*bfloat16.* Needs .*float32"),
    (dict(shift=torch.zeros(1, 384)), r"shift is \[1, 384\].* Needs \[items, 384\]"),
    (dict(scale=torch.zeros(4, 384), shift=torch.zeros(4, 384)), "6 rows for 4 items"),
    (dict(scale=torch.zeros(0, 384), shift=torch.zeros(0, 384)), "6 rows for 0 items")])
def test_what_does_not_fit(changes, words):
    it = Modulated(**{"x": torch.zeros(6, 384), "scale": torch.zeros(2, 384), "shift": torch.zeros(2, 384)} | changes)
    with pytest.raises(ShapeError, match=f"^linear: the operands of Modulated do not fit: .*{words}"):
        ops.linear(it, make("int4", n=384), torch.zeros(6, 384))


def test_torch_makes_it_once(monkeypatch):
    """Jobs whose kernels do not modulate share a tensor."""
    made, of = [], Modulated.of
    monkeypatch.setattr(Modulated, "of", lambda it: made.append(it) or of(it))
    plan, it, other = registry.plan(make("int4"), registry.Target("cpu"), F32), modulated(), modulated()
    given = registry.shared_inputs([(plan, it, None), (plan, it, None), (plan, other, None), (plan, other.x, None)])
    assert made == [it, other] and given[0][0] is given[1][0] and given[3][0] is other.x
    assert all(prepared is None for _, prepared in given)


def test_who_modulates():
    """The variant that serves so many rows, for weights that it reads as they lie."""
    plain = registry.plan(make("int4"), registry.Target("cpu"), F32).variant

    def modulating(name, **fields):
        return replace(plain, name=name, modulates=lambda jobs: [name for _ in jobs], **fields)

    few, many = modulating("few", max_rows=5), modulating("many")
    it, weight = modulated(), make("int4")
    plans = [registry.Plan(many), registry.Plan(few, fallback=registry.Plan(many)), registry.Plan(few, fallback=registry.Plan(
        plain)), registry.Plan(many, unpack=True), registry.Plan(replace(many, max_rank=16))]
    wide = make("int4", rank=32)
    given = registry.shared_inputs([(plan, it, wide if plan is plans[-1] else weight) for plan in plans])
    assert [prepared for _, prepared in given] == ["many", "many", None, None, None]
    assert given[0][0] is given[1][0] is it and given[2][0] is given[3][0] is given[4][0] and torch.equal(given[2][0], it.of())
