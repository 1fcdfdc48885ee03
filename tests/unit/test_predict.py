"""svdq/predict.py: the arithmetic of a prediction, and that it says what it is."""

import json
import re

import pytest

from svdq_pack.svdq import bench, cli, data_sheets, predict
from svdq_pack.tests.conftest import ROOT

ROW = {"kind": "glue", "name": "mul", "shapes": "128x128 128x128", "calls": 1, "activations": 0, "weights": 0, "macs": 0,
       "low_rank_macs": 0, "low_rank_bytes": 0}


def sm_120(card):
    return data_sheets.CARDS[card].arch == "sm_120"


@pytest.mark.parametrize("card", data_sheets.CARDS)
def test_step(card):
    facts = predict.predict(card)
    assert facts["prediction"] and facts["seconds"] == pytest.approx(sum(row["seconds"] for row in facts["rows"]))
    products = [row for row in facts["rows"] if row["name"].startswith(("svdq::gemm", "svdq::mlp"))]
    assert sum(row["macs"] for row in products) == 57 * 12 * 4608 * 3072**2
    assert facts["low_rank"]["of_step_at_peak"] <= 0.03
    assert facts["bytes"]["between"] <= 27e9 and 0.3e9 < facts["bytes"]["low_rank"] <= (1.1e9 if sm_120(card) else 1e9)
    assert all(row["seconds"] >= max(row["bounds"].values()) for row in facts["rows"])
    assert json.loads(json.dumps(facts, allow_nan=False))
    stock = predict.bf16(card)
    assert stock["seconds"] > 1.5 * facts["seconds"] and not any(row["name"].startswith("svdq") for row in stock["rows"])
    assert sum(row["macs"] for row in stock["rows"] if row["kind"] == "gemm") == pytest.approx(
        sum(row["macs"] for row in facts["rows"] if row["kind"] == "gemm"), rel=1e-3)


@pytest.mark.parametrize("card", data_sheets.CARDS)
def test_linear(card):
    """One layer alone is what the step has of it, its launches apart."""
    facts = predict.predict(card)
    for k, n, _ in bench.LAYERS.values():
        alone = predict.linear(card, 4608, n, k, 32)
        rows = [row for row in facts["rows"] if row["kind"] == "gemm" and row["shapes"].endswith(f" 4608x{n}")
                and row["macs"] == row["calls"] * 4608 * n * k]
        each = max(row["seconds"] / row["calls"] for row in rows)
        assert 0.9 * each < alone < 2 * each, (k, n)


def test_floats():
    """What an FFMA of two cycles costs an A100, and nobody else: its form for sums in fp32 is limited by them."""
    for card, limit in (("A100", "floats"), ("4090", "MMA")):
        sheet = data_sheets.CARDS[card]
        row = predict._timed({"kind": "gemm", "name": "svdq::gemm", "shapes": "1x1 16384x16384", "calls": 1, "activations": 0,
                              "weights": 0, "macs": 10**13, "low_rank_macs": 0}, sheet, predict.GEMMS["sm_89"])
        assert row["limit"] == limit
        assert row["bounds"]["floats"] == pytest.approx(
            10**13 / 8192 * 8.5 * (2 if card == "A100" else 1) / (4 * sheet.sms * sheet.clock * 1e9) / 0.8 * row["tail"])


def test_bounds():
    def of(**more):
        row, = predict.predict("4090", [ROW | more])["rows"]
        return row
    row = of(activations=1008e9 * 0.85)
    assert (row["limit"], row["seconds"]) == ("bytes", pytest.approx(1 + 1e-6))
    gemm = {"kind": "gemm", "name": "svdq::gemm_w4a4", "shapes": f"1x1 {256 * 128}x128", "macs": 128 * 2.52e9 * 2048 * 0.8}
    assert (of(**gemm)["limit"], of(**gemm)["seconds"]) == ("MMA", pytest.approx(1 + 1e-6))
    late = of(**gemm | {"shapes": f"1x1 {257 * 128}x128"})
    assert late["tail"] == pytest.approx(512 / 257)
    few = of(**gemm | {"shapes": f"1x1 {64 * 128}x128"})
    assert few["tail"] == 2                     # half of the multiprocessors have nothing to do
    assert of(**gemm | {"shapes": f"1x1 {192 * 128}x128"})["tail"] == pytest.approx(256 / 192)
    assert of(activations=1008e9 * 0.85, calls=500)["seconds"] == pytest.approx(1.0005)
    row, = predict.predict("A100", [ROW | gemm], instructions=17.05)["rows"]
    assert row["limit"] == "issue" and row["bounds"]["issue"] > 2 * row["bounds"]["MMA"]


@pytest.mark.parametrize("arch, kernel", [
    ("sm_75", "gemm_w4a4_sm75_"), ("sm_80", "gemm_w4a4_normal_{bf16,fp16}_{s4,u4}_diag"),
    ("sm_86", "gemm_w4a4_{bf16"), ("sm_89", "gemm_w4a4_{bf16"),
    ("sm_90", "gemm_fp8_{bf16,fp16}_token_w4_c1"), ("sm_120", "gemm_nvfp4_")])
def test_instructions_are_those_of_the_docs(arch, kernel):
    lines = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    counts = next(line for line in lines if line.startswith(f"| {kernel}") and arch in line)
    names = (f"| {kernel}", f"| {kernel.replace('{bf16', 'bf16')}")
    mix = [line for line in lines if line.startswith(names) and arch in line][-1]
    gemm = predict.GEMMS[arch]
    assert f" {gemm.instructions:.2f} (" in counts, counts
    floats = sum(float(count) for count, op in re.findall(r"([\d.]+) (\w+)", mix) if op in ("FFMA", "FMUL", "FADD"))
    assert floats == pytest.approx(gemm.floats), mix


def test_nunchaku():
    """Bytes of activations as design/kernels.md 2.3 has them for Nunchaku's sequence: 43.3 GB, by all of them."""
    moved = sum(row["activations"] for row in predict.nunchaku_rows()) / 1e9
    assert moved == pytest.approx(43.3, rel=0.06)


@pytest.mark.parametrize("name, card", [("NVIDIA GeForce RTX 4090", "4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
                                        ("NVIDIA L20", "L20"),
                                        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", None)])
def test_named(name, card):
    assert data_sheets.named(name) == card


def test_what_people_read():
    """All launches, bytes and milliseconds are there, whatever has a line of its own."""
    facts = predict.predict("4090")
    text = predict.as_markdown(facts)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][1:]
    assert sum(int(line[3]) for line in lines) == facts["launches"]
    assert sum(float(line[-1]) for line in lines) == pytest.approx(1000 * facts["seconds"], abs=0.005 * len(lines))
    assert lines[-1][0] == "the rest" and 10 < len(lines) < 45
    limits = re.search(r"Limited by MMA (\d+) ms, bytes (\d+) ms", text)
    assert sum(map(int, limits.groups())) == pytest.approx(1000 * facts["seconds"], abs=1)
    assert f"{facts['bytes']['low_rank'] / 1e9:.2f} GB for the low-rank branch" in text


@pytest.mark.parametrize("name, unit, dense", [
    ("NVIDIA GeForce RTX 2080 Ti", "int8", 215.2), ("NVIDIA GeForce RTX 3060", "bf16", 25.5),
    ("NVIDIA GeForce RTX 3090", "int8", 284.7),
    ("NVIDIA GeForce RTX 4070", "int8", 233.2), ("NVIDIA GeForce RTX 4090", "int4", 1321.2), ("NVIDIA L20", "bf16", 119.5),
    ("NVIDIA L20", "int8", 239), ("NVIDIA GeForce RTX 5070 Ti", "fp4", 703), ("NVIDIA GeForce RTX 5090", "fp4", 1676),
    ("NVIDIA A100-SXM4-80GB", "int8", 624), ("NVIDIA H200", "fp8", 1979)])
def test_rates_give_what_data_sheets_print(name, unit, dense):
    """Teraoperations per second without sparsity."""
    assert data_sheets.limits(name)[unit] == pytest.approx(dense, rel=0.01)


def test_command(capsys):
    assert cli.main(["bench", "--predict", "4090"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTION for 4090") and "assumed" in out
    assert cli.main(["bench", "--predict", "4090", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]
    assert cli.main(["bench", "--predict", "NVIDIA GeForce RTX 4090", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == "4090"
    with pytest.raises(SystemExit):
        cli.main(["bench", "--predict", "4080"])
    assert "choose from" in capsys.readouterr().err
