#!/usr/bin/env python3
"""The READMEs' table "Which file for my card", by what the registry plans for each: nobody keeps it by hand.

    python tools/card_table.py            the table as markdown
    python tools/card_table.py --write    puts it into README.md and, in Chinese, into README.zh.md

`python` is one with torch. No GPU is needed: cards are asked for by their compute capability, and kernels are taken for built.
What its texts are in another language is in tools/translations/cards.*.json, {English: translation}.

Test: tests/unit/test_cards.py
"""

import argparse
import json
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
pack = types.ModuleType("svdq_pack")            # the pack without its root, which imports ComfyUI
pack.__path__ = [str(ROOT)]
sys.modules.setdefault(pack.__name__, pack)

from svdq_pack.svdq.kernels import registry  # noqa: E402
from svdq_pack.svdq.kernels.variant import Target, short, usual_dtype  # noqa: E402
from svdq_pack.svdq.kernels.weights import example  # noqa: E402

READMES = {None: ROOT / "README.md", "zh": ROOT / "README.zh.md"}         # language -> file
BEGIN, END = "<!-- written by: python tools/card_table.py --write -->\n", "<!-- end of what is written -->\n"
HEADING = ("card", "take", "int4 files run as", "fp4 files run as", "computes in", "speed")
FILES = {"int4": "int4", "nvfp4": "fp4"}         # precision -> as names of published files have it


class Row(NamedTuple):
    """Cards that one answer fits. speed: what was measured."""
    cards: str
    targets: tuple
    dtype: torch.dtype | None = None            # None: the usual one of these GPUs
    speed: str = "unmeasured"


def cuda(*capabilities):
    return tuple(Target("cuda", capability) for capability in capabilities)


ROWS = (
    Row("RTX 30, RTX 40 (3060, 4090 ...)", cuda((8, 6), (8, 9))),
    Row("A100", cuda((8, 0))),
    Row("RTX 50, DGX Spark (5060, 5090 ...)", cuda((12, 0), (12, 1))),
    Row("H100, H200", cuda((9, 0))),
    Row("B200, B300", cuda((10, 0), (10, 3))),
    Row("RTX 20, T4", cuda((7, 5))),
    Row("GTX 16", (Target.gpu((7, 5), None, "GTX 1660"),), torch.float32),         # ComfyUI takes none of these for fp16
    Row("a later NVIDIA card", cuda((13, 0))),
    Row("AMD, Intel, Mac (tried by nobody yet)", (Target("rocm"), Target("xpu"), Target("mps"))),
    Row("CPU", (Target("cpu"),), torch.float32, "int4: 0.52 to 0.56 of a float32 model's time, which needs 48 GB "
        "([measured](docs/measurements.md#linears-on-the-cpu))"))


def path(precision, target, dtype):
    """How layers of such a file run there, in words."""
    weight = example(precision, dtype if dtype.itemsize == 2 else torch.bfloat16)
    plan = registry.plan(weight, target, dtype, repack=True)
    return plan.how if plan.shortfall(weight, target) is None else "weight-only"


def cells(row):
    """(file to take, how an int4 file runs, how an fp4 file does, dtype) of a Row. Raises ValueError where its cards differ."""
    with mock.patch.object(registry, "trusted", lambda variant, target: True):
        found = [(FILES[registry.precision_for(target, dtype)], *(path(precision, target, dtype) for precision in FILES),
                  short(dtype)) for target in row.targets for dtype in [row.dtype or usual_dtype(target)]]
    if len(set(found)) > 1:
        raise ValueError(f"{row.cards}: no longer the same for all: {found}. Split that row in ROWS of tools/card_table.py")
    return found[0]


def texts():
    """The table as rows of cells, in English; names of files and types stay in every language."""
    return [HEADING, *((row.cards, *cells(row), row.speed) for row in ROWS)]


def words(language):
    """{English: translation} of texts of the table."""
    return json.loads((ROOT / "tools" / "translations" / f"cards.{language}.json").read_text(encoding="utf-8"))


def table(language=None):
    """The table in Markdown. Raises ValueError for a text that the language lacks."""
    rows, names = texts(), {*FILES.values(), "bfloat16", "float16", "float32"}
    if language:
        said = words(language)
        missing = sorted({cell for row in rows for cell in row} - said.keys() - names)
        if missing:
            raise ValueError(f"tools/translations/cards.{language}.json lacks {missing}. Translate them there")
        rows = [[said.get(cell, cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(HEADING) + "|", *lines[1:]]) + "\n"


def split(text):
    """Text of the README -> what stands before, between and after the marks around the table."""
    before, begin, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a README lacks the line {(END if begin else BEGIN).strip()}, one of two around the table")
    return before, between, after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the READMEs")
    if parser.parse_args().write:
        for language, path in READMES.items():
            before, _, after = split(path.read_text(encoding="utf-8"))
            path.write_text(before + BEGIN + table(language) + END + after, encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
