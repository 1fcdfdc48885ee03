"""The file that bench leaves on a pretended card: what is in it, its size, that it is read as it was written; the rows of the
table of cards that it gives."""

import json
import re
import sys
from dataclasses import asdict

import pytest

from svdq_pack.svdq import bench, bench_file, predict
from svdq_pack.svdq.kernels.tuner import Choice
from svdq_pack.tools import card_rows

MACHINE = {"card": "NVIDIA GeForce RTX 4090", "capability": [8, 9], "power_cap": "450.00 W", "driver": "580.95.05",
           "torch": "2.13.0+cu130", "cuda": "13.0", "commit": "c3f89fcabc", "date": "2026-12-01", "system": "Linux-6.8",
           "python": "3.12.3", "memory_bytes": 24 << 30}
KERNELS = [{"variant": name, "weights": ["int4"], "act_bits": 4, "library": name, "route": route, "reasons": reasons,
            "self_test": said}
           for name, route, reasons, said in (
               ("w4a4_sm80", "cpp_extension", [], "passed"), ("w4a4_fp16n", "nvrtc", ["cpp_extension: no nvcc"], "passed"),
               ("w4a4_new", "nvrtc", ["int4 bfloat16 linear: 2.0e-01 of at most 1.5e-02"], "failed"),
               ("dequant", None, ["nvrtc: a | b"], "not built"))]
FASTEST = Choice("w4a4", "cuda:0", ("w4a4_fp16n", "w4a4_sm80"), "timed", us={"w4a4_fp16n": 812.4, "w4a4_sm80": 1034.2},
                 seconds=0.41)


def rows(layers=tuple(bench.LAYERS), tokens=(4608, 512), variants=("w4a4_sm80", "w4a4_fp16n", "w4a8_int8"), kitchen=True,
         modulated=False):
    """As many as a card gives."""
    found = []
    for m in tokens:
        for layer in layers:
            plain = layer.partition(" ")[0]
            name = bench.EPILOGUES[plain].__name__ if plain in bench.EPILOGUES else None
            about = {"layer": layer, "M": m, "rank": 32, "passed": True, "spread": 0.0123456, "runs": 50, "how": "graph",
                     "tops": 123.45678, "gbs": 456.789, "share": 0.612345, "vs_bf16": 2.98765, "error": 1.2345e-3}
            what = ["quantise", "product", "both", *([f"both with {name}", f"both, then {name}"] if name else []),
                    *(["both with Modulated", "Modulated, then both"] if modulated and plain in bench.MODULATED else [])]
            found += [about | {"what": "bf16", "variant": "F.linear", "us": 3000.0, "error": None, "tops": None},
                      about | {"what": "weight_only", "variant": "weight_only", "us": 9000.0}]
            found += [about | {"what": one, "variant": variant, "us": 1000.1234 + 100 * i + 10 * j}
                      for i, variant in enumerate(variants) for j, one in enumerate(what)]
            found += [about | {"what": "both", "variant": "comfy-kitchen", "us": 1500.0}] * kitchen
    return found


def facts(found=None, **more):
    found = rows() if found is None else found
    return {"machine": MACHINE, "kernels": KERNELS, "fastest": [asdict(FASTEST)], "runs": 50, "rows": found,
            "notices": ["A notice."], "passed": all(row["passed"] for row in found), "complete": True} | more


# What is in it

def test_what_people_read():
    text = bench_file.as_text(facts())
    shown = text.partition("<details>")[0]
    for words in ("### svdq bench: NVIDIA GeForce RTX 4090", "All 132 rows are right. 24 GiB, sm_89, Linux-6.8, Python 3.12.3.",
                  "| w4a4_sm80 | int4 | 4 bits | cpp_extension | passed |  |",
                  "| w4a4_fp16n | int4 | 4 bits | nvrtc | passed | cpp_extension: no nvcc |", "2.0e-01 of at most",
                  "| dequant | int4 | 4 bits | none | not built | nvrtc: a / b |",
                  "Fastest of w4a4 in a block's MLP: w4a4_fp16n 812 us, w4a4_sm80 1034 us; timed.",
                  "power cap 450.00 W", "A notice.",
                  "| int4 | 4608 | w4a4_sm80 | 4110 | 4140 |",
                  "| qkv | 4608 | both | w4a4_sm80 | 1020.1 | 1.2% | 123 | 457 | 61% | 2.99 | 1.2e-03 |"):
        assert words in shown, words
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", shown, re.M)]
    assert len(tables) == 4 and all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_predicted_beside_measured():
    """Whole linears of the variant that the prediction is of, on a card that it knows."""
    found = bench_file.foretold(facts())
    assert [(row["layer"], row["M"]) for row in found] == [(layer, m) for m in (4608, 512) for layer in bench.LAYERS]
    assert all(row["variant"] == "w4a4_sm80" and row["us"] == 1020.1234 for row in found)
    qkv = found[0]["predicted"]
    assert qkv == pytest.approx(1e6 * predict.linear("4090", 4608, 9216, 3072, 32)) and found[4]["predicted"] < qkv / 4
    shown = bench_file.as_text(facts()).partition("<details>")[0]
    assert f"| qkv | 4608 | 32 | w4a4_sm80 | 1020 | {qkv:.0f} | {1020.1234 / qkv:.2f} |" in shown
    unknown = facts(machine=MACHINE | {"card": "NVIDIA GeForce RTX 4090 Laptop GPU"})
    assert bench_file.foretold(unknown) == [] and "predicted" not in bench_file.as_text(unknown)
    assert bench_file.foretold(facts([row | {"us": None, "passed": False} for row in rows()])) == []


def test_blocks():
    """The sum of what a stream runs, with its epilogues in kernels where they do them."""
    found = bench_file.blocks(rows(variants=("fuses",)))
    assert [(row["M"], row["variant"]) for row in found] == [(4608, "fuses"), (512, "fuses")]
    assert found[0]["fused"] == pytest.approx(3 * 1030.1234 + 1020.1234)
    assert found[0]["apart"] == pytest.approx(3 * 1040.1234 + 1020.1234)
    apart = [row for row in rows(variants=("not",)) if not row["what"].startswith("both with")]
    assert [row["fused"] for row in bench_file.blocks(apart)] == [None, None]
    assert bench_file.blocks([row for row in apart if row["layer"] != "out"]) == []
    wrong = [row | ({"passed": False, "us": None} if row["layer"] == "fc1" else {}) for row in apart]
    assert bench_file.blocks(wrong) == []
    more = [row | {"what": what, "us": us} for row in rows(("qkv",), (512,), ("fuses",))[2:3]
            for what, us in (("both with Modulated", 1040.1234), ("Modulated, then both", 1120.1234))]
    found = bench_file.blocks([*rows(tokens=(512,), variants=("fuses",)), *more])[0]
    assert found["fused"] == pytest.approx(3 * 1030.1234 + 1020.1234 + 20)
    assert found["apart"] == pytest.approx(3 * 1040.1234 + 1020.1234 + 100)
    fp4 = bench_file.blocks(rows([f"{layer} nvfp4" for layer in bench.LAYERS], (7,), ("four",)))
    assert [(row["weights"], row["M"]) for row in fp4] == [("nvfp4", 7)]


def test_what_is_wrong_or_missing_is_said():
    bad = {"layer": "out", "M": 7, "rank": 32, "what": "both", "variant": "x", "passed": False, "wrong": "output: 1 | of\n2"}
    text = bench_file.as_text(facts([*rows()[:3], bad], complete=False, fastest=[], kernels=[]))
    assert "CUT: not all rows are there. 1 of 4 rows are WRONG." in text and "WRONG: output: 1 / of" in text


@pytest.mark.parametrize("many", [1, 3, 12])
def test_it_can_be_pasted(many):
    """Under 60 kB with every row in the JSON, as many kinds of weights and tokens as there may be."""
    layers = [*bench.LAYERS, *(f"{layer} nvfp4" for layer in bench.LAYERS)]
    found = rows(layers, tuple(range(512, 512 + many)), tuple(f"w4a4_variant{i}" for i in range(4)))
    text = bench_file.as_text(facts(found))
    assert len(bench_file.read(text)["rows"]) == len(found)
    assert "</details>" in text and (len(text.encode()) < bench_file.MOST or many == 12)
    assert ("more lines did not fit" in text) == (many > 1)


def test_a_card_of_today_fits():
    """FLUX's two lengths, INT4 and NVFP4, all variants of an RTX 4090 and comfy-kitchen: tables and JSON whole."""
    found = rows(variants=("w4a4_sm80", "w4a4_fp16n", "w4a8_int8", "dequant"), modulated=True) + rows(
        [f"{layer} nvfp4" for layer in bench.LAYERS], variants=("dequant",), kitchen=False)
    text = bench_file.as_text(facts(found))
    assert len(text.encode()) < bench_file.MOST and "did not fit" not in text, len(text)


# As it was written

def test_it_is_read_as_it_was_written(tmp_path):
    bench_file.write(tmp_path / "b.md", facts())
    left = (tmp_path / "b.md").read_text()
    for text in (left, "### Card\r\n\r\n" + left.replace("\n", "\r\n") + "\r\nbye"):
        got = bench_file.read(text)
        assert got["machine"] == MACHINE and got["kernels"] == KERNELS and got["complete"] and len(got["rows"]) == 132
        assert Choice(**got["fastest"][0] | {"order": tuple(got["fastest"][0]["order"])}).order == FASTEST.order
        assert all(row["us"] == pytest.approx(want["us"], rel=1e-3) and row["variant"] == want["variant"]
                   for row, want in zip(got["rows"], rows()))
    data = left.partition(bench_file.BEGIN)[2].partition(bench_file.END)[0]
    assert json.loads(data, parse_constant=pytest.fail) and "\n" not in data


def test_no_number_is_null():
    row = rows()[0] | {"spread": float("nan"), "share": None}
    assert bench_file.read(bench_file.as_text(facts([row])))["rows"][0]["spread"] is None


def test_a_fence_in_what_a_compiler_says():
    hostile = [KERNELS[0] | {"reasons": ["x\n```\n</details>\x1b[2J"]}]
    text = bench_file.as_text(facts(kernels=hostile))
    assert "\x1b" not in text and bench_file.read(text)["kernels"] == hostile


def test_its_name():
    assert bench_file.name("NVIDIA GeForce RTX 4090", "2026-12-01") == "svdq-bench-nvidia-geforce-rtx-4090-2026-12-01.md"
    assert bench_file.name("../..", "2026-12-01") == "svdq-bench-gpu-2026-12-01.md"


def changed(**more):
    data = json.loads(bench_file.as_text(facts()).partition(bench_file.BEGIN)[2].partition(bench_file.END)[0])
    return f"```json\n{json.dumps(data | more)}\n```\n"


@pytest.mark.parametrize("text, words", [
    ("", "no JSON in it"), (bench_file.as_text(facts())[:-200], "no JSON in it"), ("```json\n{]\n```", "cannot be read"),
    ("```json\n[]\n```", "format is"), ("```json\n{}\n```", "format is None"),
    *((changed(**more), words) for more, words in (
        ({"format": 2}, "format is 2"), ({"machine": 3}, "machine, columns or rows"), ({"columns": ["us"]}, "columns or rows"),
        ({"rows": [[1]]}, "columns or rows"), ({"rows": None}, "columns or rows"),
        ({"rows": [["out", "many", *[None] * 14]]}, "M of a row is 'many'"),
        ({"rows": [["out", 7, 32, "both", "x", 1, *[None] * 10]]}, "passed of a row is '1'"),
        ({"rows": [["out", 7, 32, "both", "x", True, True, *[None] * 9]]}, "us of a row is 'True'")))])
def test_damaged_files(text, words):
    with pytest.raises(ValueError, match=re.escape(words) + ".*Needs"):
        bench_file.read(text)


# The table of cards

def test_rows_of_cards():
    got = card_rows.rows_of(bench_file.read(bench_file.as_text(facts())))
    assert len(got) == 4 and got[0] == (
        "| RTX 4090, 450.00 W | qkv | 4608 | w4a4_sm80 | 1020 | 61% | 2.99 | 1500 | driver 580.95.05, torch 2.13.0+cu130, "
        "CUDA 13.0, c3f89fcabc, 2026-12-01 |")
    alone = card_rows.rows_of(facts(rows(kitchen=False)))
    assert " | 2.99 |  | driver" in alone[0]


def test_wrong_rows_are_no_rows():
    found = [row | {"passed": row["variant"] != "w4a4_sm80"} for row in rows(("out",), (512,))]
    line, = card_rows.rows_of(facts(found))
    assert "| out | 512 | w4a4_fp16n |" in line
    with pytest.raises(ValueError, match="no layer of ours.*Needs a run"):
        card_rows.rows_of(facts(rows(variants=())))


def test_a_strangers_text_is_no_markup():
    line = card_rows.rows_of(facts(machine=MACHINE | {"card": "a|b\n<img src=x>[c](d)`" + "e" * 100, "driver": None}))[0]
    assert line.count("|") == 10 and "\n" not in line and not set("<>[]`=/") & set(line) and "driver None" in line


def test_one_command_puts_them_into_the_page(tmp_path, monkeypatch, capsys):
    """In order and once, whatever else stands there; a bad file changes nothing."""
    page = tmp_path / "measurements.md"
    page.write_text(card_rows.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(card_rows, "PAGE", page)
    before, file = page.read_text(), tmp_path / "card.md"
    bench_file.write(file, facts())

    def run(*files):
        monkeypatch.setattr(sys, "argv", ["card_rows.py", *map(str, files)])
        return card_rows.main()
    assert run(file) == 0 and capsys.readouterr().out.count("| RTX 4090, 450.00 W |") == 4
    after = page.read_text()
    assert len(after.splitlines()) == len(before.splitlines()) + 4
    assert re.sub(r"^\| RTX 4090, 450.00 W .*\n", "", after, flags=re.M) == before
    assert run(file) == 0 and page.read_text() == after and "are there" in capsys.readouterr().out
    bad = tmp_path / "bad.md"
    bad.write_bytes(b"\xff\xfe")
    for wrong in (bad, tmp_path / "none.md"):
        assert run(file, wrong) == 1 and page.read_text() == after
        assert capsys.readouterr().err.startswith(f"card_rows: {wrong}: ")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the line <!-- written by"):
        run(file)
