"""The file that `svdq bench` leaves, for people and programs: tables first, then the same as JSON, to paste into an issue.

GitHub shows a pasted Markdown file as tables with the JSON folded away, and takes 65,536 characters: where there are more
rows than fit, the tables end early and the JSON has them all.

Test: tests/unit/test_bench_file.py
"""

import json
import math
import re
from pathlib import Path

from . import bench, data_sheets, predict
from .container import replacing
from .kernels.errors import printable
from .kernels.tuner import Choice

FORMAT = 1
MOST = 60_000               # bytes of a file that can be pasted
COLUMNS = ("layer", "M", "rank", "what", "variant", "passed", "us", "spread", "runs", "how", "tops", "gbs", "share", "vs_bf16",
           "error", "wrong")
TEXTS = {"layer", "what", "variant", "how", "wrong"}        # the others are numbers, or null
BEGIN, END = "<details><summary>The same as JSON, for tools/card_rows.py</summary>\n\n```json\n", "\n```\n\n</details>\n"


def blocks(rows):
    """A stream of a double block, summed up from rows: its linears with what FLUX does to their inputs (by the difference that
    modulation makes) and outputs, in the kernels and in torch around them.

    [{"M", "weights", "variant", "fused" us | None, "apart" us}] of the variants whose linears are all there and right
    """
    found = {}
    for row in rows:
        layer, _, weights = row["layer"].partition(" ")
        if layer in bench.LAYERS and row.get("us"):
            found.setdefault((row["M"], weights or "int4", row["variant"]), {})[layer, row["what"]] = row["us"]
    answers = []
    for (m, weights, variant), us in found.items():
        fused, apart = _summed(us, "both with {}", "both with Modulated"), _summed(us, "both, then {}", "Modulated, then both")
        if apart is not None:
            answers.append({"M": m, "weights": weights, "variant": variant, "fused": fused, "apart": apart})
    return answers


def _summed(us, with_epilogue, modulated):
    """The sum over the layers of {(layer, what): us}, or None where one is missing."""
    total = 0.0
    for layer in bench.LAYERS:
        plain = us.get((layer, "both"))
        done = us.get((layer, with_epilogue.format(bench.EPILOGUES[layer].__name__))) if layer in bench.EPILOGUES else plain
        if plain is None or done is None:
            return None
        total += done + us.get((layer, modulated), plain) - plain
    return total


def foretold(facts):
    """[{"layer", "M", "rank", "variant", "us", "predicted" us}]: linears that predict.py foretells on this card, quantiser and
    product, without what FLUX does before and after."""
    card = data_sheets.named(facts["machine"]["card"])
    if card is None:
        return []
    serving = predict.GEMMS[data_sheets.CARDS[card].arch].variant
    answers = []
    for row in facts["rows"]:
        layer = row["layer"].partition(" ")[0]
        if layer in bench.LAYERS and row["variant"] == serving and row["what"] == "both" and row.get("us"):
            k, n, _ = bench.LAYERS[layer]
            seconds = predict.linear(card, row["M"], n, k, row["rank"])
            answers.append({key: row[key] for key in ("layer", "M", "rank", "variant", "us")} | {"predicted": 1e6 * seconds})
    return answers


def name(card, date):
    """Of the file, where none is given."""
    return f"svdq-bench-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-') or 'gpu'}-{date}.md"


# ---- writing

def write(path, facts):
    """Whole or not at all: whoever reads meanwhile, or stops us, finds what was there before."""
    with replacing(Path(path)) as file:
        file.write(as_text(facts).encode())


def as_text(facts):
    data = BEGIN + json.dumps(_rounded(_compact(facts)), separators=(",", ":"), ensure_ascii=True) + END
    lines = printable(_tables(facts), lines=True).split("\n")
    room, kept = MOST - len(data) - 100, []
    for line in lines:
        room -= len(line.encode()) + 1
        if room < 0:
            kept.append(f"\n{len(lines) - len(kept)} more lines did not fit; the JSON has all rows.")
            break
        kept.append(line)
    return "\n".join(kept) + "\n\n" + data


def _tables(facts):
    where = facts["machine"]
    memory = f"{where['memory_bytes'] / 2**30:.0f} GiB, " if where.get("memory_bytes") else ""
    lines = [f"### svdq bench: {where['card']}", "",
             f"{_state(facts)} {memory}sm_{''.join(map(str, where['capability']))}, {where.get('system', 'system unknown')}, "
             f"Python {where.get('python', 'unknown')}.", "",
             "| kernels | weights | activations | built by | self-test | why not |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join((row["variant"], ", ".join(row["weights"]), f"{row['act_bits']} bits", row["route"] or "none",
                                 row["self_test"], "; ".join(row["reasons"]).replace("|", "/"))) + " |"
              for row in facts.get("kernels", ())]
    lines += ["", *(f"Fastest of {choice['rivals']} in a block's MLP: {Choice(**choice)}."
                   for choice in facts.get("fastest", ())), ""]
    lines += ["| a stream of a double block, modulation to epilogues | M | variant | in the kernels, us | around them, us |",
              "|---|---|---|---|---|"]
    lines += [f"| {row['weights']} | {row['M']} | {row['variant']} | "
              f"{'' if row['fused'] is None else format(row['fused'], '.0f')} | {row['apart']:.0f} |"
              for row in blocks(facts["rows"])]
    told = foretold(facts)
    if told:
        lines += ["", "| a linear alone | M | rank | variant | measured, us | predicted, us | measured / predicted |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| {row['layer']} | {row['M']} | {row['rank']} | {row['variant']} | {row['us']:.0f} | "
                  f"{row['predicted']:.0f} | {row['us'] / row['predicted']:.2f} |" for row in told]
    return "\n".join(lines) + "\n\n" + bench.as_markdown(facts)


def _state(facts):
    wrong = sum(not row["passed"] for row in facts["rows"])
    return ("" if facts["complete"] else "CUT: not all rows are there. ") + (
        f"{wrong} of {len(facts['rows'])} rows are WRONG." if wrong else f"All {len(facts['rows'])} rows are right.")


def _compact(facts):
    rows = [[row.get(column) for column in COLUMNS] for row in facts["rows"]]
    return facts | {"format": FORMAT, "columns": COLUMNS, "rows": rows}


def _rounded(value):
    """Numbers with four digits, texts of 300 characters at most: a file has hundreds of them. What is no number is null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return value[:300]
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


# ---- reading

def read(text):
    """The facts of a file, or of an issue that one was pasted into. Raises ValueError: what is wrong, what is needed."""
    text = text.replace("\r\n", "\n")
    found = re.findall(r"^```json\n(.*?)\n```", text, re.M | re.S)
    if not found:
        raise ValueError("no JSON in it. Needs the whole file that `svdq bench` leaves, down to its last line")
    try:
        facts = json.loads(found[-1])
    except ValueError as error:
        raise ValueError(f"its JSON cannot be read ({error}). Needs the file as `svdq bench` left it") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"its format is {facts.get('format') if isinstance(facts, dict) else facts!r}. Needs {FORMAT}, which "
                         "`svdq bench` of this version writes")
    machine, columns, rows = (facts.get(name) for name in ("machine", "columns", "rows"))
    if (not isinstance(machine, dict) or columns != list(COLUMNS) or not isinstance(rows, list)
            or not all(isinstance(row, list) and len(row) == len(COLUMNS) for row in rows)):
        raise ValueError("its machine, columns or rows are not those that `svdq bench` writes. Needs the file as it was left")
    facts["rows"] = [dict(zip(COLUMNS, row)) for row in rows]
    for row in facts["rows"]:
        for column, value in row.items():
            kinds = (str,) if column in TEXTS else (bool,) if column == "passed" else (int, float)
            if not (value is None and column not in ("layer", "M", "what", "variant", "passed") or isinstance(value, kinds)
                    and (column == "passed" or not isinstance(value, bool))):
                raise ValueError(f"{column} of a row is {str(value)[:40]!r}. Needs what `svdq bench` writes")
    return facts
