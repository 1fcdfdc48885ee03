"""The benchmark of the CPU with stand-ins: what is timed, what a second run leaves out, and the table."""

import json
import subprocess

import pytest
import torch

from svdq_pack.svdq.kernels import check
from svdq_pack.tools import cpu_bench

LAYERS = {"tiny": (128, 256, "int4"), "tiny modulation": (128, 256, "awq")}
MACHINE = {"cpu": "stand-in", "flags": ["avx2", "fma"], "before": None}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cpu_bench, "SECONDS", 0)
    yield
    torch.set_num_threads(1)                # as unit/conftest.py has it


def stand_in(name, loaded, off=0.0, right=None, takes=lambda precision, tokens: True):
    """A candidate that computes the layer, `off` apart from it."""
    def load(data):
        loaded.append(name)
        return lambda x, threads: lambda: lambda: torch.nn.functional.linear(x, data.dense, data.dense_bias) + off

    return cpu_bench.Candidate(name, takes, load, right)


def test_a_second_run_measures_what_is_missing(tmp_path, capsys):
    path, loaded = tmp_path / "results.json", []
    fp32, other = stand_in("fp32", loaded), stand_in("other", loaded, takes=lambda precision, tokens: tokens < 17)

    def run(*candidates, tokens=(1, 17)):
        loaded.clear()
        results = cpu_bench.Results(path, MACHINE, lambda: {"int8 of this": 2.0})
        cpu_bench.measure(LAYERS, tokens, (1, 2), candidates, results)
        return results

    results = run(fp32, tokens=(1,))
    assert loaded == ["fp32", "fp32"]                                       # once a layer
    assert [cpu_bench._key(line) for line in results.lines] == [("tiny", 1, 1), ("tiny", 1, 2), ("tiny modulation", 1, 1),
                                                                ("tiny modulation", 1, 2)]
    assert json.loads(path.read_text()) == {"machine": MACHINE | {"peaks": {"int8 of this": 2.0}}, "lines": results.lines}
    run(fp32)
    assert loaded == ["fp32"]                                               # for the 17 tokens
    kept = run(fp32).lines
    assert loaded == [] and len(kept) == 6
    lines = run(fp32, other).lines                                          # lines of 17 tokens lack nothing
    assert loaded == ["fp32", "other"] * 2 and [line for line in lines if line["tokens"] == 17] == kept[4:]
    assert all(set(line["ms"]) == {"fp32", "other"} for line in lines if line["tokens"] == 1) and len(lines) == 6
    assert capsys.readouterr().out.count("tiny, 1 tokens, 2 threads: fp32 ") == 2


def test_figures_of_something_else_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": MACHINE | {"peaks": {}}, "lines": []}))
    with pytest.raises(cpu_bench.Problem, match="before None, here c423482"):
        cpu_bench.Results(path, MACHINE | {"before": "c423482"})
    path.write_text("[]")
    with pytest.raises(cpu_bench.Problem, match="holds no results"):
        cpu_bench.Results(path, MACHINE)


def test_what_is_wrong_is_not_timed():
    def right(x, data, out):
        return [check.Check("linear", float(out.abs().max() > 100), 0.0)]

    results = cpu_bench.Results(None, MACHINE)
    cpu_bench.measure({"tiny": LAYERS["tiny"]}, (3,), (1,), [
        stand_in("fp32", []), stand_in("far", [], off=1000.0, right=right), stand_in("near", [], right=right),
        stand_in("broken", [], right=lambda x, data, out: 1 / 0)], results)
    line, = results.lines
    assert list(line["ms"]) == list(line["errors"]) == ["fp32", "near"] and line["errors"]["near"] < 1e-5
    assert line["wrong"] == {"far": "linear: 1.0e+00 of at most 0.0e+00", "broken": "division by zero"}
    assert "far WRONG: linear" in cpu_bench.as_text(line)


def test_table():
    def line(tokens, threads, **ms):
        return {"layer": "out", "K": 3000, "N": 2000, "tokens": tokens, "threads": threads, "serves": "ours", "ms": ms,
                "errors": {name: 1e-3 * tokens for name in ms}, "wrong": {} if "ours" in ms else {"ours": "too far off"}}

    text = cpu_bench.as_markdown(MACHINE | {"peaks": {"fp32 FMA": 50.0, "int8 of old": 75.0, "int8 of new": 100.0}},
                                 [line(64, 2, fp32=20.0, bf16=300.0, ours=10.0), line(1, 1, fp32=2.0)])
    assert [row for row in text.splitlines() if row.startswith("| ")] == [
        "| layer | tokens | threads | fp32, ms | bf16 | ours | GMAC/s | of int8 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| out | 1 | 1 | 2.00 |  | WRONG |  |  |",
        "| out | 64 | 2 | 20.00 | 15 | 0.50 | 38.4 | 19% |"]
    assert text.startswith("cpu stand-in, flags avx2 fma.\n") and "int8 of new 100.0." in text
    assert "fp32 6.4e-02, bf16 6.4e-02, ours 6.4e-02." in text and text.endswith("WRONG: out, 1, 1, ours: too far off")


def test_every_variant_of_the_cpu_is_a_candidate():
    """On a layer small enough: found, checked, timed, and one of them is what the pack picks."""
    candidates, results = cpu_bench.ours(), cpu_bench.Results(None, MACHINE)
    cpu_bench.measure(LAYERS, (1,), (1,), candidates, results)
    for line in results.lines:
        assert line["serves"] in line["ms"] and "weight_only" in line["ms"] and "reference" not in line["ms"], line
        assert not line["wrong"] and cpu_bench.rate(line) > 0
    assert "w4a4_sm80" not in {candidate.name for candidate in candidates}


def test_peaks(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_bench.shutil, "which", lambda name: None)
    assert cpu_bench.peaks(tmp_path) == {"not measured": "no g++ here"}
    monkeypatch.setattr(cpu_bench.shutil, "which", lambda name: name)
    monkeypatch.setattr(cpu_bench.subprocess, "run",
                        lambda command, **how: subprocess.CompletedProcess(command, 1, "", "no such processor\n"))
    assert cpu_bench.peaks(tmp_path)["not measured"].endswith(": no such processor")
    assert cpu_bench.int8_peak({"peaks": {"not measured": "no g++ here"}}) is None


def test_folders_without_ggml(tmp_path):
    with pytest.raises(cpu_bench.Problem, match="no libggml-base there"):
        cpu_bench.Ggml(tmp_path)
