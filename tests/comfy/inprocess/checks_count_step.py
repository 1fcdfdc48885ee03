"""svdq/step_counts.json is what tools/count_step.py counts: blocks of a kind are alike, so one and two of each tell all."""

import collections
import importlib.util
import json

import pytest

from svdq_pack.tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("count_step", ROOT / "tools" / "count_step.py")
count_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(count_step)


@pytest.mark.parametrize("card", ["A100", "RTX 3090", "H200", "bf16"])
def test_counts(card):
    def of(double, single):
        return collections.Counter({row["name"]: row["calls"] for row in summed(count_step.count(card, double, single))})
    one, doubles, singles = of(1, 1), of(2, 1), of(1, 2)
    stored = {row["name"]: row["calls"] for row in summed(json.loads((ROOT / "svdq" / "step_counts.json").read_text())[card])}
    assert stored == {name: calls + (doubles[name] - calls) * 18 + (singles[name] - calls) * 37 for name, calls in one.items()}


def summed(rows):
    calls = collections.Counter()
    for row in rows:
        calls[row["name"]] += row["calls"]
    return [{"name": name, "calls": n} for name, n in calls.items()]
