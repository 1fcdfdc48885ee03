#!/usr/bin/env python3
"""The rows of "Cards" in docs/measurements.md from files that `svdq bench` left, or issues that one was pasted into.

    python tools/card_rows.py FILE [FILE ...]    puts their rows into the table, once each, and prints those that are new

`python` is one with torch. No GPU is needed. A file comes from somebody: what it says is checked, and goes into cells as text.

Test: tests/unit/test_bench_file.py
"""

import argparse
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
pack = types.ModuleType("svdq_pack")            # the pack without its root, which imports ComfyUI
pack.__path__ = [str(ROOT)]
sys.modules.setdefault(pack.__name__, pack)

from svdq_pack.svdq import bench, bench_file  # noqa: E402

PAGE = ROOT / "docs" / "measurements.md"
BEGIN, END = "<!-- written by: python tools/card_rows.py FILE -->\n", "<!-- end of what is written -->\n"
OTHERS = "F.linear", "weight_only", "comfy-kitchen"


def rows_of(facts):
    """The lines of the table that the facts of a file give. Raises ValueError where there is nothing to show."""
    where = facts["machine"]
    conditions = ", ".join((f"driver {cell(where.get('driver'))}", f"torch {cell(where.get('torch'))}",
                            f"CUDA {cell(where.get('cuda'))}", cell(where.get("commit")), cell(where.get("date"))))
    card = re.sub("^NVIDIA |GeForce ", "", cell(where.get("card"))) + f", {cell(where.get('power_cap'))}"
    right = [row for row in facts["rows"] if row["passed"] and row["us"] and row["what"] == "both"]
    ours = [row for row in right if row["variant"] not in OTHERS and row["layer"].partition(" ")[0] in bench.LAYERS]
    if not ours:
        raise ValueError("no layer of ours in it was right and timed. Needs a run of `svdq bench` that came so far")
    most, lines = max(row["M"] for row in ours), []
    for layer in dict.fromkeys(row["layer"] for row in ours if row["M"] == most):
        same = [row for row in right if (row["layer"], row["M"]) == (layer, most)]
        best = min((row for row in same if row["variant"] not in OTHERS), key=lambda row: row["us"])
        kitchen = next((row["us"] for row in same if row["variant"] == "comfy-kitchen"), None)
        lines.append("| " + " | ".join((
            card, cell(layer), f"{most:.0f}", cell(best["variant"]), number(best["us"], ".0f"), number(best["share"], ".0%"),
            number(best["vs_bf16"], ".2f"), number(kitchen, ".0f"), conditions)) + " |")
    return lines


def cell(value):
    """Text for a cell of a table: no markup, no second line, not long."""
    return re.sub(r"[^\w .,+:()-]", "", str(value))[:60].strip() or "unknown"


def number(value, form):
    return "" if value is None else format(value, form)


def added(page, lines):
    """(the page with these lines in its table, in order; those that are new). Raises ValueError where the table is missing."""
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} lacks the line {(END if begin else BEGIN).strip()}, one of two around the table")
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    new = [line for line in dict.fromkeys(lines) if line not in rows]
    return "".join((before, begin, *(f"{line}\n" for line in [*head, *sorted([*rows, *new])]), end, after)), new


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    lines = []
    for path in parser.parse_args().files:
        try:
            lines += rows_of(bench_file.read(path.read_text(encoding="utf-8", errors="replace")))
        except (ValueError, OSError) as error:
            print(f"card_rows: {path}: {error}", file=sys.stderr)
            return 1
    page, new = added(PAGE.read_text(encoding="utf-8"), lines)
    PAGE.write_text(page, encoding="utf-8")
    print("\n".join(new) or "all of these rows are there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
