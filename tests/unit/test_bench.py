"""python PACK/svdq bench: what it does without a GPU; data, checks, rows and table of one with a GPU."""

import contextlib
import json
import math
import types
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from svdq_pack.svdq import bench, bench_file, cli, data_sheets
from svdq_pack.svdq.kernels import build, check, launch, registry, tuner
from svdq_pack.svdq.kernels.errors import command
from svdq_pack.svdq.kernels.variant import HALVES, Target, usual_dtype
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.tests.kernels.executors import Emulator
from svdq_pack.tests.unit.test_doctor import needs_gxx

MACHINE = {"card": "NVIDIA GeForce RTX 4090", "capability": [8, 9], "power_cap": "450.00 W", "driver": "580.1",
           "torch": "2.11", "cuda": "13.0", "commit": "abc", "date": "2026-11-22"}
OUT = torch.ones(4, 4)


def clock(work, runs):
    """A timer whose runs take 100 us, give or take."""
    return [100.0 + i % 3 for i in range(runs)], "graph", True


def work(what="both", error=1e-3, **fields):
    checks = None if what == "bf16" else lambda got: [check.Check("output", error, 2e-3)]
    return bench.Work(what, "fused", what in ("bf16", "both"), lambda: OUT.clone(), checks,
                      **({"operations": 2e9, "bytes": 1e6} | fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu(capsys, tmp_path):
    assert cli.main(["bench", "--quick", "--out", str(tmp_path / "b.md")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "needs a CUDA GPU" in err and err.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--tokens", "0"), ("--tokens", "x"), ("--tokens",), ("--rank", "20"),
                                       ("--out",)])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments])
    assert end.value.code == 2 and f"usage: {command()} bench" in capsys.readouterr().err


def test_command(monkeypatch, capsys, tmp_path):
    """Options arrive, the file is written and named, a wrong row is the exit code."""
    asked = []

    def measure(tokens, rank, runs, save):
        asked.append((list(tokens), rank, runs))
        rows = bench.timed([work(), work(error=error)], {"layer": "out", "M": 7, "rank": 32}, 5, clock, {})
        facts = {"machine": MACHINE, "runs": runs, "rows": rows, "notices": [], "passed": all(r["passed"] for r in rows),
                 "complete": True}
        save(facts)
        return facts
    monkeypatch.setattr(bench, "missing", lambda: None)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: MACHINE["card"])
    monkeypatch.chdir(tmp_path)
    error, path = 1e-3, tmp_path / "b.md"
    assert cli.main(["bench", "--tokens", "7", "9", "--rank", "64", "--quick", "--out", str(path)]) == 0
    facts = bench_file.read(path.read_text())
    assert len(facts["rows"]) == 2 and facts["machine"] == MACHINE
    out = capsys.readouterr().out
    assert out.endswith(f"Please paste this file into an issue: {path}\n")
    assert "\nPREDICTION for 4090, not measured: a step of " in out
    error = 1
    assert cli.main(["bench"]) == 1
    said, (file,) = capsys.readouterr().out, tmp_path.glob("svdq-bench-nvidia-geforce-rtx-4090-*.md")
    assert asked == [([7, 9], 64, 10), ([4608, 512], 32, 50)] and "WRONG" in said and str(file) in said.splitlines()[-1]
    assert "json" not in said and not bench_file.read(file.read_text())["passed"]
    assert cli.main(["bench", "--out", str(tmp_path / "no" / "b.md")]) == 1 and len(asked) == 2


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
    assert data_sheets.limits(card).get("memory") == memory


def test_share():
    limits = {"bf16": 100, "int4": 400, "memory": 1000}
    assert bench.share(work(operations=4e12, unit="int4", bytes=1), 0.02, limits) == pytest.approx(0.5)
    assert bench.share(work(operations=1e9, unit="int4", bytes=1e9), 0.002, limits) == pytest.approx(0.5)
    assert bench.share(work(operations=0, unit="int4", bytes=1e9), 0.001, limits | {"int4": None}) == pytest.approx(1)
    assert bench.share(work(unit="int4"), 1, limits | {"int4": None}) is None and bench.share(work(), 1, {}) is None


def test_rows():
    works = [work("bf16"), work(unit="int4"), work("product")]
    bf16, both, part = bench.timed(works, {"layer": "out"}, 30, clock, data_sheets.limits("RTX 4090"))
    assert (bf16["us"], bf16["runs"], bf16["error"], bf16["vs_bf16"]) == (101.0, 30, None, 1.0)
    assert both["tops"] == pytest.approx(2e9 / 101e-6 / 1e12) and both["gbs"] == pytest.approx(1e6 / 101e-6 / 1e9)
    assert both["share"] == pytest.approx(2e9 / 1321e12 / 101e-6, rel=1e-3) and both["error"] == 1e-3
    assert part["vs_bf16"] is None                              # half of a linear


@pytest.mark.parametrize("bad, words", [
    (work(error=3e-3), "output: 3.0e-03 of at most 2.0e-03"), (work(error=math.nan), "output: nan"),
    (work(error=math.inf), "output: inf")])
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
    row, good = bench.timed([bench.Work("both", "fused", True, crash, lambda got: []), work()], {}, 30, clock, {})
    assert "illegal" in row["wrong"] and good["passed"]


def test_outputs_are_spoiled_before_they_are_checked():
    """A kernel that writes nothing must not live on what lay there."""
    kept = OUT.clone()
    lazy = bench.Work("both", "fused", True, lambda: kept, lambda got: [check.Check("output", float(got.sum()), 100)])
    with pytest.raises(bench.Wrong, match="nan"):
        bench.accepted(lazy)
    codes = torch.zeros(3, dtype=torch.int32)
    bench.spoil([codes, kept])
    assert codes.tolist() == [-1] * 3 and kept.isnan().all()


def test_table():
    rows = bench.timed([work("bf16"), work(unit="int4")], {"layer": "out", "M": 7, "rank": 32}, 30, clock,
                       data_sheets.limits(MACHINE["card"]))
    text = bench.as_markdown({"machine": MACHINE, "runs": 30, "rows": rows, "notices": ["No comfy-kitchen rows: x."]})
    first, _, head, line, *body, _, notice = text.splitlines()
    assert "RTX 4090, power cap 450.00 W, driver 580.1, torch 2.11, CUDA 13.0, commit abc, 2026-11-22" in first
    assert {row.count("|") for row in (head, line, *body)} == {12} and notice.startswith("No comfy-kitchen")
    assert body[0] == "| out | 7 | bf16 | fused | 101.0 | 2.0% | 20 | 10 | 12% | 1.00 |  |"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0), None], ids=str)
def test_who_is_measured(monkeypatch, capability):
    """Every variant whose rules fit, first choice or not; none that fails, that runs on request, or that suits any device."""
    monkeypatch.setattr(registry, "trusted", lambda variant, target: True)
    target = Target("cpu") if capability is None else Target("cuda", capability)
    here = ("cpu",) if capability is None else ("cuda", capability, capability)
    more = [replace(*named("weight_only"), name=name, device=device, on_request=on_request, precisions=("int4", "nvfp4"),
                    last_resort=False)
            for name, device, on_request in (("last", here, False), ("asked for", here, True), ("anywhere", None, False),
                                             ("broken", here, False))]
    monkeypatch.setattr(registry, "VARIANTS", (*registry.VARIANTS, *more))
    for precision in ("int4", "awq", "nvfp4"):
        weight = example(precision, usual_dtype(target))
        fit = [variant.name for variant in registry.VARIANTS if variant.device and not variant.on_request
               and variant.declines(target, weight.dtype, weight) is None]
        assert [variant.name for variant in bench.serving(precision, target)] == fit
        assert ("last" in fit) == (precision != "awq") and "anywhere" not in fit and "asked for" not in fit
    if capability is None:
        monkeypatch.setattr(registry, "trusted", lambda variant, target: variant.name != "broken")
        assert "broken" not in [variant.name for variant in bench.serving("int4", target)]


# The data and the checks of every row, on the CPU

def kitchen_of(eager):
    """comfy-kitchen with its reference in the place of its CUDA backend."""
    return types.SimpleNamespace(use_backend=lambda name: contextlib.nullcontext(),
                                 quantize_svdquant_w4a4=eager.quantize_svdquant_w4a4,
                                 scaled_mm_svdquant_w4a4=eager.scaled_mm_svdquant_w4a4)


def rows_of(works, limits=None):
    return bench.timed(works, {}, 30, clock, limits or {})


def named(*names):
    """Variants by their names, the preferred first."""
    return [variant for variant in registry.VARIANTS if variant.name in names]


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(launch, "launch", Emulator().launch)


@needs_gxx
@pytest.mark.parametrize("kind, dtype", [("int4", torch.bfloat16), ("int4 unsigned", torch.bfloat16), ("int4", torch.float16)])
def test_linear_works_are_right(monkeypatch, emulated, kind, dtype):
    monkeypatch.setitem(bench.LAYERS, "small", (256, 128, kind))
    try:
        from comfy_kitchen.backends.eager import svdquant
        kitchen = kitchen_of(svdquant)
    except ImportError:
        kitchen = None
    rows = rows_of(bench.linear_works("small", 70, 32, named("w4a4_sm80"), kitchen, dtype, "cpu"))
    what = [HALVES[dtype], "weight_only", "quantise", "product", "both", "both"]
    assert [row["what"] for row in rows] == what[:5 + bool(kitchen)]
    assert [row["variant"] for row in rows[:5]] == ["F.linear", "weight_only"] + ["w4a4_sm80"] * 3
    assert all(row["passed"] for row in rows), rows
    product = 2 * 70 * 256 * 128
    assert rows[4]["tops"] == pytest.approx(product / 101 / 1e6)
    moved = 70 * 256 * 2 + 256 * 128 // 2 + 4 * 128 * 2 + 128 * 32 * 2 + 256 * 2 + 256 * 32 * 2 + 128 * 2 + 70 * 128 * 2
    between = 128 * 256 // 2 + 128 * 4 * 4 + 128 * 32 * 2                                   # 70 rows padded to 128
    assert rows[4]["gbs"] == pytest.approx((moved + 2 * between) / 101 / 1e3)
    assert (rows[2]["gbs"] + rows[3]["gbs"]) == pytest.approx(rows[4]["gbs"])


@needs_gxx
@pytest.mark.parametrize("kind", ["int4", "int4 unsigned"])
def test_hopper_works_are_right(monkeypatch, emulated, kind):
    monkeypatch.setitem(bench.LAYERS, "small", (256, 256, kind))
    rows = rows_of(bench.linear_works("small", 70, 32, named("w4a8_sm90", "w4a4_sm90"), None, device="cpu"),
                   {"fp8": 1, "memory": 1})
    assert [(row["what"], row["variant"]) for row in rows[2:]] == [
        (what, variant) for variant in ("w4a8_sm90", "w4a4_sm90") for what in ("quantise", "product", "both")]
    assert all(row["passed"] for row in rows), rows
    assert rows[4]["share"] and rows[7]["share"] and rows[4]["vs_bf16"] and rows[3]["vs_bf16"] is None


@needs_gxx
@pytest.mark.parametrize("layer, name", [("qkv", "QKV"), ("fc1", "Gelu"), ("fc2", "Gated")])
def test_works_with_an_epilogue_are_right(monkeypatch, emulated, layer, name):
    """In the kernel where it does it, in torch after it everywhere."""
    monkeypatch.setitem(bench.LAYERS, layer, (128, 384, "int4"))
    rows = rows_of(bench.linear_works(layer, 70, 32, [*named("w4a8_sm90", "w4a4_sm90"), *named("w4a4_sm80")], None,
                                      device="cpu"),
                   {"fp8": 1, "int4": 1, "memory": 1})
    what = ["quantise", "product", "both", f"both with {name}", f"both, then {name}"]
    modulated = ["both with Modulated", "Modulated, then both"] if layer in bench.MODULATED else []
    assert [row["what"] for row in rows[2:]] == 3 * [*what, *modulated]
    assert all(row["passed"] for row in rows), rows
    assert rows[5]["vs_bf16"] and rows[6]["vs_bf16"]


@pytest.mark.parametrize("layer, name", [("small", None), ("fc1", "Gelu")])
def test_works_of_a_variant_without_halves(monkeypatch, layer, name):
    """One that shows nothing between them, and rounds no activation."""
    monkeypatch.setitem(bench.LAYERS, layer, (256, 128, "int4 unsigned"))
    weight_only, = (variant for variant in registry.VARIANTS if variant.name == "weight_only")
    variant = replace(weight_only, name="extra", device=("cpu",))
    rows = rows_of(bench.linear_works(layer, 70, 32, [variant], None, device="cpu"), {"bf16": 1, "memory": 1})
    assert [(row["what"], row["variant"]) for row in rows[2:]] == [
        (what, "extra") for what in ("both", f"both, then {name}")[:1 + bool(name)]]
    assert all(row["passed"] and row["share"] and row["vs_bf16"] for row in rows), rows

    def wrong(*arguments):
        weight_only.product(*arguments)
        arguments[2].mul_(1.05)
    rows = rows_of(bench.linear_works(layer, 70, 32, [replace(variant, product=wrong)], None, device="cpu"))
    assert not rows[2]["passed"] and "output" in rows[2]["wrong"]


@needs_gxx
def test_modulation_works_are_right(monkeypatch, emulated):
    monkeypatch.setattr(bench, "MODULATION", (128, (64, 32, 64)))
    row, = rows_of(bench.modulation_works(3, named("awq_gemv"), device="cpu"))
    assert row["passed"] and row["tops"] is None and row["vs_bf16"] is None and row["variant"] == "awq_gemv", row


@needs_gxx
@pytest.mark.parametrize("capability, names, rows", [
    ((9, 0), ("w4a8_sm90", "w4a4_sm90", "dequant", "awq_gemv"), 9 + 3 + 2), ((7, 0), (), 2)])
def test_measure(monkeypatch, emulated, capability, names, rows):
    """A whole run, the emulator in the place of a GPU: every row is there, right, and can be written."""
    monkeypatch.setattr(registry, "VARIANTS", named(*names, "weight_only"))
    monkeypatch.setattr(bench, "machine", lambda: MACHINE)
    monkeypatch.setattr(bench, "CudaTimer", lambda: clock)
    monkeypatch.setattr(bench, "kernels_made_for", lambda target: [])
    monkeypatch.setattr(bench.Target, "of", lambda device: Target("cuda", capability) if device == "cuda" else Target("cpu"))
    monkeypatch.setattr(bench, "LAYERS", {"out": (256, 128, "int4")})
    monkeypatch.setattr(bench, "MODULATION", (128, (64, 32)))
    for works in ("linear_works", "modulation_works"):
        monkeypatch.setattr(bench, works, partial(getattr(bench, works), device="cpu"))
    monkeypatch.setattr(bench, "_kitchen", lambda: (None, "not here"))
    asked = []
    monkeypatch.setattr(tuner, "forget", lambda: asked.append("again"))
    facts = bench.measure((17,), 16, 5)
    assert asked == ["again"] and facts["fastest"] == [asdict(choice) for choice in tuner.choices()]
    assert facts["passed"] and len(facts["rows"]) == rows, facts["rows"]
    assert facts["notices"][0] == "No comfy-kitchen rows: not here."
    none = [f"No kernels of ours serve here; `{command('doctor')}` says why."]
    assert facts["notices"][1:] == (none if capability == (7, 0) else [])
    modulations = {"1 modulation", "2 modulation"} if capability == (9, 0) else set()
    assert {row["layer"] for row in facts["rows"]} == {"out", *["out nvfp4"] * (rows > 2)} | modulations
    assert bench.as_markdown(facts).count("| 17 |") == rows - len(modulations)
    assert json.loads(json.dumps(facts, allow_nan=False)) and len(bench_file.read(bench_file.as_text(facts))["rows"]) == rows


def test_kernels_of_a_card(monkeypatch):
    """Each variant made for it, with why it does not serve."""
    monkeypatch.setattr(registry, "VARIANTS", named("w4a4_sm80", "w4a8_int8", "dequant", "awq_gemv", "w4a4_sm90"))
    monkeypatch.setattr(build, "build", lambda library, arch: build.Built(
        library, arch, None if library.name == "awq_gemv" else "nvrtc", [], 0.1, ("cpp_extension: no nvcc\nlong",)))
    monkeypatch.setattr(registry, "trusted", lambda variant, target: variant.name == "w4a4_sm80")

    def small(variant, device):
        return ["int4: wrong"] if variant.name == "dequant" else 1 / 0
    monkeypatch.setattr(check, "small", small)
    rows = {row["variant"]: (row["route"], row["self_test"], row["reasons"])
            for row in bench.kernels_made_for(Target("cuda", (8, 9), 0))}
    assert rows == {"w4a4_sm80": ("nvrtc", "passed", ["cpp_extension: no nvcc"]),
                    "dequant": ("nvrtc", "failed", ["cpp_extension: no nvcc", "int4: wrong"]),
                    "w4a8_int8": ("nvrtc", "failed", ["cpp_extension: no nvcc", "ZeroDivisionError: division by zero"]),
                    "awq_gemv": (None, "not built", ["cpp_extension: no nvcc"])}


def test_kitchen_that_cannot_serve(monkeypatch):
    monkeypatch.setenv("COMFY_KITCHEN_SVDQUANT_REUSE_WORKSPACE", "0")

    def imported(name):
        return types.SimpleNamespace(list_backends=lambda: {"cuda": {
            "available": False, "disabled": False, "unavailable_reason": "no CUDA", "capabilities": []}})
    monkeypatch.setattr(bench.importlib, "import_module", imported)
    assert bench._kitchen() == (None, "no CUDA")
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: 1 / 0)
    assert "ZeroDivisionError" in bench._kitchen()[1]
