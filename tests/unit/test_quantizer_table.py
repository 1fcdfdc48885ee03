"""The table of quantisers in small: ours is at least as good as the reference algorithm, the rest in the right order."""

import pytest

from svdq_pack.tools import quantizer_table as table


@pytest.mark.parametrize("kind", ["adaln_hard", "gelu"])
def test_ours_beats_the_reference(kind, precision):
    case = table.make(kind, 3, n=256, k=256, images=12)
    errors = {name: table.measure(name, case, precision, 16)[0] for name in table.METHODS}
    assert errors["ours"] < errors["reference"] < errors["smooth + RTN"] < errors["RTN"]
    assert errors["ours + GPTQ"] < errors["reference + GPTQ"]
    assert 0.02 < errors["ours"] < 0.15


def test_modulation():
    errors = table.modulation(0)
    assert errors["ours"] < 0.5 * errors["reference (RTN)"]


def test_what_is_printed():
    rows = [{"method": method, "precision": "int4", "rank": None if method in table.WITHOUT_RANK else 16, "kind": kind,
             "seed": 0, "error": error, "seconds": 1.0}
            for method, error in zip(table.METHODS, (0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)) for kind in table.KINDS]
    rows += [row | {"precision": "nvfp4"} for row in rows if row["kind"] in table.NVFP4_KINDS]
    text = table.as_markdown(rows)
    assert "| ours | 16 | 0.1000 |" in text and "| -50.0% |" in text and text.count("| reference |") == 2
    assert table.losses(rows) == []
    assert table.losses([row | {"error": 0.3} if row["method"] == "ours" else row for row in rows]) == [
        ("ours", precision, 16, kind, 0) for precision, kinds in (("int4", table.KINDS), ("nvfp4", table.NVFP4_KINDS))
        for kind in kinds]
