"""python -m svdq bench: what it does without a GPU; data, checks, rows and table of one with a GPU."""

import contextlib
import json
import math
import types

import pytest
import torch
from svdq_pack.svdq import bench, cli, doctor
from svdq_pack.tests.unit.test_doctor import emulate, needs_gcc

MACHINE = {"card": "NVIDIA GeForce RTX 4090", "capability": [8, 9], "power_cap": "450.00 W", "driver": "580.1",
           "torch": "2.11", "cuda": "13.0", "commit": "abc", "date": "2026-11-22"}
OUT = torch.ones(4, 4)


def clock(work, runs):
    """A timer whose runs take 100 us, give or take."""
    return [100.0 + i % 3 for i in range(runs)], "graph", True


def work(what="both", error=1e-3, **fields):
    check = None if what == "bf16" else lambda got: [doctor.Check("output", error, 2e-3)]
    return bench.Work(what, "fused", lambda: OUT.clone(), check, **({"operations": 2e9, "bytes": 1e6} | fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu(capsys, tmp_path):
    assert cli.main(["bench", "--quick", "--json", str(tmp_path / "b.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "needs a CUDA GPU" in err and err.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--tokens", "0"), ("--tokens", "x"), ("--tokens",), ("--rank", "20"),
                                       ("--json",)])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments])
    assert end.value.code == 2 and "usage: python -m svdq bench" in capsys.readouterr().err


def test_command(monkeypatch, capsys, tmp_path):
    """Options arrive, the rows are written, a wrong row is the exit code."""
    asked = []

    def measure(tokens, rank, runs):
        asked.append((list(tokens), rank, runs))
        rows = bench.timed([work(), work(error=error)], {"layer": "out", "M": 7, "rank": 32}, 5, clock, {})
        return {"machine": MACHINE, "runs": runs, "rows": rows, "notices": [], "passed": all(r["passed"] for r in rows)}
    monkeypatch.setattr(bench, "missing", lambda: None)
    monkeypatch.setattr(bench, "measure", measure)
    error, path = 1e-3, tmp_path / "b.json"
    assert cli.main(["bench", "--tokens", "7", "9", "--rank", "64", "--quick", "--json", str(path)]) == 0
    facts = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert len(facts["rows"]) == 2 and facts["machine"] == MACHINE
    error = 1
    assert cli.main(["bench"]) == 1
    assert asked == [([7, 9], 64, 10), ([4608, 512], 32, 50)] and "WRONG" in capsys.readouterr().out
    assert cli.main(["bench", "--json", str(tmp_path / "no" / "b.json")]) == 1 and len(asked) == 2


def test_summary():
    assert bench.summary([5.0])[0] == 5.0 and math.isnan(bench.summary([5.0])[1])
    assert bench.summary([2.0] * 30) == (2.0, 0.0)
    median, spread = bench.summary([*map(float, range(1, 12))])
    assert (median, spread) == (6.0, pytest.approx(8 / 6))
    assert bench.summary([10.0] * 49 + [1000.0])[1] == 0.0          # one hiccup is no spread


@pytest.mark.parametrize("card, memory", [
    ("NVIDIA GeForce RTX 4090", 1008), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA H200", 4800), ("NVIDIA H200 NVL", None),
    ("NVIDIA A100-SXM4-80GB", 2039), ("NVIDIA A100-PCIE-40GB", None)])
def test_limits(card, memory):
    assert bench.limits_of(card).get("memory") == memory


def test_share():
    limits = {"bf16": 100, "int4": 400, "memory": 1000}
    assert bench.share(work(operations=4e12, unit="int4", bytes=1), 0.02, limits) == pytest.approx(0.5)
    assert bench.share(work(operations=1e9, unit="int4", bytes=1e9), 0.002, limits) == pytest.approx(0.5)
    assert bench.share(work(operations=0, unit="int4", bytes=1e9), 0.001, limits | {"int4": None}) == pytest.approx(1)
    assert bench.share(work(unit="int4"), 1, limits | {"int4": None}) is None and bench.share(work(), 1, {}) is None


def test_rows():
    works = [work("bf16"), work(unit="int4"), work("gemm_w4a4")]
    bf16, both, part = bench.timed(works, {"layer": "out"}, 30, clock, bench.limits_of("RTX 4090"))
    assert (bf16["us"], bf16["runs"], bf16["error"], bf16["vs_bf16"]) == (101.0, 30, None, 1.0)
    assert both["tops"] == pytest.approx(2e9 / 101e-6 / 1e12) and both["gbs"] == pytest.approx(1e6 / 101e-6 / 1e9)
    assert both["share"] == pytest.approx(2e9 / 1321e12 / 101e-6) and both["error"] == 1e-3
    assert part["vs_bf16"] is None                              # half of a linear


@pytest.mark.parametrize("bad, words", [
    (work(error=3e-3), "output: error 3.0e-03 of at most 2.0e-03"), (work(error=math.nan), "error nan"),
    (work(error=math.inf), "error inf")])
def test_what_is_wrong_is_not_timed(bad, words):
    timed = []
    row, = bench.timed([bad], {"layer": "out", "M": 7, "rank": 32}, 30, lambda *asked: timed.append(asked), {})
    assert not row["passed"] and words in row["wrong"] and "us" not in row and not timed
    assert f"WRONG: {row['wrong']}" in bench.as_markdown({"machine": MACHINE, "runs": 30, "rows": [row], "notices": []})


def test_unstable_and_failing_work():
    row, = bench.timed([work()], {}, 30, lambda *_: ([1.0], "graph", False), {})
    assert not row["passed"] and "differ" in row["wrong"]

    def crash():
        raise RuntimeError("an illegal memory access was encountered")
    row, good = bench.timed([bench.Work("both", "fused", crash, lambda got: []), work()], {}, 30, clock, {})
    assert "illegal" in row["wrong"] and good["passed"]


def test_outputs_are_spoiled_before_they_are_checked():
    """A kernel that writes nothing must not live on what lay there."""
    kept = OUT.clone()
    lazy = bench.Work("both", "fused", lambda: kept, lambda got: [doctor.Check("output", float(got.sum()), 100)])
    with pytest.raises(bench.Wrong, match="nan"):
        bench.accepted(lazy)
    codes = torch.zeros(3, dtype=torch.int32)
    bench.spoil([codes, kept])
    assert codes.tolist() == [-1] * 3 and kept.isnan().all()


def test_table():
    rows = bench.timed([work("bf16"), work(unit="int4")], {"layer": "out", "M": 7, "rank": 32}, 30, clock,
                       bench.limits_of(MACHINE["card"]))
    emulated = [row | {"variant": "fused_emulated"} for row in rows]
    text = bench.as_markdown({"machine": MACHINE, "runs": 30, "rows": rows, "notices": ["No comfy-kitchen rows: x."]})
    first, _, head, line, *body, _, notice = text.splitlines()
    assert "RTX 4090, power cap 450.00 W, driver 580.1, torch 2.11, CUDA 13.0, commit abc, 2026-11-22" in first
    assert {row.count("|") for row in (head, line, *body)} == {12} and notice.startswith("No comfy-kitchen")
    assert body[0] == "| out | 7 | bf16 | fused | 101.0 | 2.0% | 20 | 10 | 12% | 1.00 |  |"
    text = bench.as_markdown({"machine": MACHINE, "runs": 30, "rows": emulated, "notices": []})
    assert "the compiler emulates it" in text


@pytest.mark.parametrize("capability, variant", [((7, 5), None), ((8, 0), "fused"), ((8, 9), "fused"),
                                                 ((9, 0), "fused_emulated"), ((12, 0), "fused_emulated")])
def test_kernels_are_labelled(capability, variant):
    assert bench.kernel_variant(capability) == variant


# The data and the checks of every row, on the CPU

def kitchen_of(eager):
    """comfy-kitchen with its reference in the place of its CUDA backend."""
    return types.SimpleNamespace(use_backend=lambda name: contextlib.nullcontext(),
                                 quantize_svdquant_w4a4=eager.quantize_svdquant_w4a4,
                                 scaled_mm_svdquant_w4a4=eager.scaled_mm_svdquant_w4a4)


@needs_gcc
@pytest.mark.parametrize("kind", ["int4", "int4 unsigned"])
def test_linear_works_are_right(monkeypatch, kind):
    emulate(monkeypatch)
    monkeypatch.setitem(bench.LAYERS, "small", (256, 128, kind))
    try:
        from comfy_kitchen.backends.eager import svdquant
        kitchen = kitchen_of(svdquant)
    except ImportError:
        kitchen = None
    rows = bench.timed(bench.linear_works("small", 70, 32, "fused", kitchen, device="cpu"), {}, 30, clock, {})
    what = ["bf16", "weight_only", "quant_down", "gemm_w4a4", "both", "both"]
    assert [row["what"] for row in rows] == what[:5 + bool(kitchen)]
    assert all(row["passed"] for row in rows), rows
    product = 2 * 70 * 256 * 128
    assert rows[4]["tops"] == pytest.approx(product / 101 / 1e6)
    moved = 70 * 256 * 2 + 256 * 128 // 2 + 4 * 128 * 2 + 128 * 32 * 2 + 256 * 2 + 256 * 32 * 2 + 128 * 2 + 70 * 128 * 2
    between = 128 * 256 // 2 + 128 * 4 * 4 + 128 * 32 * 2                                   # 70 rows padded to 128
    assert rows[4]["gbs"] == pytest.approx((moved + 2 * between) / 101 / 1e3)


@needs_gcc
@pytest.mark.parametrize("kind", ["int4", "int4 unsigned"])
def test_hopper_works_are_right(monkeypatch, kind):
    emulate(monkeypatch)
    monkeypatch.setitem(bench.LAYERS, "small", (256, 256, kind))
    rows = bench.timed(bench.linear_works("small", 70, 32, None, None, True, "cpu"), {}, 30, clock, {"fp8": 1, "memory": 1})
    assert [(row["what"], row["variant"]) for row in rows[2:]] == [
        (what, variant) for variant in ("fp8_w4a8", "fp8_w4a4") for what in ("quant_fp8", "gemm_fp8", "both")]
    assert all(row["passed"] for row in rows), rows
    assert rows[4]["share"] and rows[4]["vs_bf16"] and rows[3]["vs_bf16"] is None


@needs_gcc
@pytest.mark.parametrize("layer, name", [("qkv", "QKV"), ("fc1", "Gelu"), ("fc2", "Gated")])
def test_hopper_works_with_an_epilogue_are_right(monkeypatch, layer, name):
    emulate(monkeypatch)
    monkeypatch.setitem(bench.LAYERS, layer, (128, 384, "int4"))
    rows = bench.timed(bench.linear_works(layer, 70, 32, None, None, True, "cpu"), {}, 30, clock, {"fp8": 1, "memory": 1})
    assert [row["what"] for row in rows[2:7]] == ["quant_fp8", "gemm_fp8", "both", f"both with {name}", f"both, then {name}"]
    assert len(rows) == 12 and all(row["passed"] for row in rows), rows
    assert rows[5]["vs_bf16"] and rows[6]["vs_bf16"]


@needs_gcc
def test_modulation_works_are_right(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(bench, "MODULATION", (128, (64, 32, 64)))
    row, = bench.timed(bench.modulation_works(3, "cpu"), {}, 30, clock, {})
    assert row["passed"] and row["tops"] is None and row["vs_bf16"] is None, row


def test_kitchen_that_cannot_serve(monkeypatch):
    monkeypatch.setenv("COMFY_KITCHEN_SVDQUANT_REUSE_WORKSPACE", "0")

    def imported(name):
        return types.SimpleNamespace(list_backends=lambda: {"cuda": {
            "available": False, "disabled": False, "unavailable_reason": "no CUDA", "capabilities": []}})
    monkeypatch.setattr(bench.importlib, "import_module", imported)
    assert bench._kitchen() == (None, "no CUDA")
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: 1 / 0)
    assert "ZeroDivisionError" in bench._kitchen()[1]
