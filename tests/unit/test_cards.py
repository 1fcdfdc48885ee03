"""The READMEs' table of cards is what the registry plans, and its rows are all cards that variants are made for."""

from dataclasses import replace

import pytest

from svdq_pack.svdq.kernels import registry
from svdq_pack.tools import card_table
from svdq_pack.tools.card_table import ROWS, Row, cells, cuda

TARGETS = [target for row in ROWS for target in row.targets]


@pytest.fixture
def register(monkeypatch):
    """register(precision, lowest, highest, how): a variant of weight_only's kind that is preferred there."""
    def add(precision, lowest, highest, how):
        kind, = (variant for variant in registry.VARIANTS if variant.name == "weight_only")
        new = replace(kind, name="new", how=how, precisions=(precision,), device=("cuda", lowest, highest), preference=50,
                      last_resort=False, library=object())
        monkeypatch.setattr(registry, "VARIANTS", (replace(new, weight_only=False) if hasattr(new, "weight_only") else new,
                                                   *registry.VARIANTS))
    return add


@pytest.mark.parametrize("language, heading", [(None, "## Which file for my card"), ("zh", "## 我的显卡该用哪个文件")])
def test_a_readme_has_the_table(language, heading):
    before, between, _ = card_table.split(card_table.READMES[language].read_text(encoding="utf-8"))
    assert before.rstrip().endswith(heading)
    assert between == card_table.table(language), "The registry plans otherwise. Run: python tools/card_table.py --write"


def test_every_translation_is_in_use():
    """Those that lack are an error of table()."""
    assert card_table.words("zh").keys() <= {cell for row in card_table.texts() for cell in row}


def test_a_new_variant_is_in_it(register):
    """Its own words, and the file to take; as soon as its file is there."""
    row, = (row for row in ROWS if cuda((12, 0))[0] in row.targets)
    register("nvfp4", (12, 0), (12, 1), "something new")
    assert cells(row)[::2] == ("fp4", "something new")
    register("int4", (12, 0), (12, 1), "newer")
    assert cells(row)[:3] == ("int4", "newer", "something new")
    with pytest.raises(ValueError, match=r"cards.zh.json lacks \['newer', 'something new'\]"):
        card_table.table("zh")


def test_cards_that_differ_are_no_row(register):
    row = Row("two cards", cuda((8, 6), (8, 9)))
    assert cells(row)
    register("int4", (8, 9), (8, 9), "for one of them")
    with pytest.raises(ValueError, match="two cards: no longer the same for all"):
        cells(row)


def test_no_card_is_forgotten():
    """Each variant that may be chosen by itself has its first GPU in the table, and no GPU is there twice."""
    assert len(set(TARGETS)) == len(TARGETS)
    lowest = {variant.device[1] for variant in registry.VARIANTS
              if variant.device and variant.device[0] == "cuda" and not variant.on_request}
    assert lowest <= {target.capability for target in TARGETS}


@pytest.mark.parametrize("text", ["", card_table.BEGIN, card_table.END, card_table.END + card_table.BEGIN])
def test_a_readme_without_the_marks(text):
    with pytest.raises(ValueError, match="lacks the line <!--"):
        card_table.split(text)
