"""svdq/step_counts.json is what tools/count_step.py counts: blocks of a kind are alike, so one and two of each tell all."""

import collections
import importlib.util
import json

import pytest

from svdq_pack.tests.conftest import ROOT

import comfyui_version      # noqa: E402, comes from the tree that support has chosen

spec = importlib.util.spec_from_file_location("count_step", ROOT / "tools" / "count_step.py")
count_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(count_step)


@pytest.mark.parametrize("card", ["RTX 2080 Ti", "A100", "RTX 3090", "H200", "RTX 5090", "bf16"])
def test_counts(card):
    if card == "bf16" and not comfyui_version.__version__.startswith("0.30."):
        pytest.skip("this ComfyUI's own blocks are not those that were counted")
    one, doubles, singles = (summed(count_step.count(card, *depths)) for depths in ((1, 1), (2, 1), (1, 2)))
    stored = summed(json.loads((ROOT / "svdq" / "step_counts.json").read_text())[card])
    assert stored == {what: each + (doubles[what] - each) * 18 + (singles[what] - each) * 37 for what, each in one.items()}


def summed(rows):
    """{(name of an operator, "calls", "activations", ...): what all its rows have of it}"""
    found = collections.Counter()
    for row in rows:
        for field in set(row) - {"kind", "name", "shapes"}:
            found[row["name"], field] += row[field]
    return found
