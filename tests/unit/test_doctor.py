"""python -m svdq doctor: on this machine, on pretended GPUs, on broken ones; its self-test finds what is wrong."""

import json
import math
import os
import shutil
import time
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from svdq_pack.kernels import build, fused, ops
from svdq_pack.svdq import cli, doctor
from svdq_pack.tests.kernels.emulator import fused as emulated

CPU = doctor.Device("cpu")
needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def emulate(monkeypatch, spoil=None):
    """The kernels of fused.py run in the CPU emulator; spoil(name, arguments) may then damage what they wrote."""
    def launch(like, name, grid, block, arguments, *rest):
        emulated.launch(like, name, grid, block, arguments, *rest)
        if spoil:
            spoil(name, arguments)
    monkeypatch.setattr(fused, "_launch", launch)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """pretend((8, 6), ...): the facts with these GPUs and built kernels; named arguments replace fields of Built."""
    def gpus(*capabilities, **built):
        made = {"route": "nvrtc", "path": [tmp_path / "a.cubin"], "seconds": 1.5,
                "reasons": ("cpp_extension: no nvcc",)}
        made["path"][0].write_bytes(b"x" * 1000)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(
            name=f"Card {index}", major=capabilities[index][0], minor=capabilities[index][1], total_memory=24 << 30))
        monkeypatch.setattr(build, "build", lambda arch: build.Built(**({"arch": arch} | made | built)))
        usable = (made | built)["route"] is not None
        monkeypatch.setattr(build, "kernels_for",
                            lambda index: object() if usable and capabilities[index] >= (8, 0) else None)
        for trust in ("trusted", "trusted_fp8"):
            monkeypatch.setattr(ops, trust, lambda index: build.kernels_for(index) is not None)
        monkeypatch.setattr(doctor, "self_test", lambda device: [])
        monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
        return doctor.describe()
    return gpus


def dispatch(facts, op, precision=None):
    """{device: (variant, reasons)} where both dtypes agree."""
    rows = [row for row in facts["dispatch"] if (row["op"], row["precision"]) == (op, precision)]
    answers = {row["device"]: (row["variant"], [no["why"] for no in row["declined"]]) for row in rows}
    assert all(answers[row["device"]][0] == row["variant"] for row in rows) and len(rows) == 2 * len(answers)
    return answers


# This machine

@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in ("none that torch can use", "none: no CUDA GPU to build for", "not fused: needs a CUDA GPU",
                 "not fused: takes int4 weights, not nvfp4", "the torch path and the reference. No CUDA kernel ran",
                 "passed"):
        assert line in out
    assert "FAILED" not in out and max(map(len, out.splitlines())) < 160


def test_json_has_the_same_facts(capsys):
    code = cli.main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)      # no NaN: that is not JSON
    assert (code, facts["passed"]) == (0, True)
    assert facts.keys() == {"python", "system", "torch", "cuda", "driver", "gpus", "compilers", "kernels", "dispatch",
                            "self_test", "cache", "passed"}
    for row in facts["self_test"]:
        assert row["passed"] and row["relative_error"] <= row["limit"]
        assert str(facts["torch"]) in doctor.as_text(facts) and row["what"] in doctor.as_text(facts)


# Pretended GPUs

def test_each_generation_gets_its_variant_and_the_reasons(pretend):
    facts = pretend((7, 5), (8, 6), (9, 0), (12, 0))
    w4a4, awq = dispatch(facts, "linear_w4a4", "int4"), dispatch(facts, "linear_awq")
    assert {device: answer[0] for device, answer in w4a4.items()} == {
        "cuda:0": "weight_only", "cuda:1": "fused", "cuda:2": "weight_only", "cuda:3": "weight_only"}
    assert {device: answer[0] for device, answer in awq.items()} == {
        "cuda:0": "weight_only", "cuda:1": "fused", "cuda:2": "fused", "cuda:3": "fused"}
    assert w4a4["cuda:0"][1] == ["made for sm_80 to sm_89, this GPU is sm_75"] and w4a4["cuda:1"][1] == []
    assert w4a4["cuda:2"][1] == ["made for sm_80 to sm_89, this GPU is sm_90"]
    assert w4a4["cuda:3"][1] == ["made for sm_80 to sm_89, this GPU is sm_120"]
    assert all(answer[0] == "weight_only" for answer in dispatch(facts, "linear_w4a4", "nvfp4").values())
    assert [(built["arch"], built["route"]) for built in facts["kernels"]] == [
        ("sm_75", None), ("sm_86", "nvrtc"), ("sm_90a", "nvrtc"), ("sm_120", "nvrtc")]
    text = doctor.as_text(facts)
    assert "gpu 1          Card 1, sm_86, 24.0 GiB" in text and "the kernels begin at sm_80" in text
    assert "not cpp_extension: no nvcc" in text and "fused W4A16 kernel, up to 8 rows (bfloat16, float16)" in text
    json.dumps(facts)


def test_cached_or_built_now(monkeypatch, tmp_path):
    path = tmp_path / "b.cubin"

    def built(arch):
        path.touch()
        os.utime(path, (time.time() + seconds,) * 2)
        return build.Built(arch, "cpp_extension", path, 2.0, ())
    monkeypatch.setattr(build, "build", built)
    for seconds, cached, words in ((1, False, "built in 2.0 s"), (-1, True, "from the cache")):
        facts = doctor._kernels((8, 6))
        assert (facts["cached"], facts["paths"]) == (cached, [str(path)]) and words in doctor._kernel_lines(facts)[0]


def test_failed_build(pretend):
    facts = pretend((8, 9), route=None, path=None, reasons=("cpp_extension: nvcc: error 1\nlong log", "nvrtc: none"))
    variant, reasons = dispatch(facts, "linear_w4a4", "int4")["cuda:0"]
    assert variant == "weight_only" and "did not build" in reasons[0]
    text = doctor.as_text(facts)
    assert "cpp_extension: nvcc: error 1" in text and "nvrtc: none" in text and "long log" not in text


# Odd machines

def fail(*_, **__):
    raise RuntimeError("the driver is on fire\nsecond line")


@pytest.mark.parametrize("module, name, shown", [
    (torch.cuda, "device_count", "gpu            unknown: the driver is on fire"),
    (torch.cuda, "get_device_properties", "gpu 0          unknown: the driver is on fire"),
    (build, "build", "kernels\n  unknown: the driver is on fire"),
    (build, "cache_folder", "cache          unknown: the driver is on fire"),
    (build, "load_nvrtc", "nvrtc          unknown: the driver is on fire"),
    (ops, "choose", "cuda:0  unknown: the driver is on fire"),
    (doctor, "_said", "ninja          unknown: the driver is on fire"),
    (doctor.platform, "platform", "system         unknown: the driver is on fire")])
def test_a_failing_probe_costs_one_answer(pretend, monkeypatch, module, name, shown):
    pretend((8, 6))
    monkeypatch.setattr(module, name, fail)
    facts = doctor.describe()
    assert shown in doctor.as_text(facts) and "second line" not in doctor.as_text(facts)
    json.dumps(facts)


def test_a_self_test_that_cannot_start_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_test", fail)
    assert cli.main(["doctor"]) == 1 and "FAILED cpu     the driver is on fire" in capsys.readouterr().out


@pytest.mark.parametrize("script, words", [
    ("exit 3", "ended with 3"), ("echo broken >&2; exit 1", "broken"), ("exit 0", "ended with 0"),
    (None, "no tool on the PATH")])
@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh")
def test_a_broken_tool(monkeypatch, tmp_path, script, words):
    if script:
        (tmp_path / "tool").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "tool").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert words in doctor.probe(doctor._said, "tool", "--version")["error"]


# The self-test

DAMAGES = {"scaled": lambda out: out.mul_(1.05), "no last row": lambda out: out[-1].zero_(),
           "one NaN": lambda out: out[0, 0].fill_(math.nan), "raises": fail,
           "flipped": lambda out: out.copy_(out.flip(1))}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_self_test_catches_a_broken_operator(monkeypatch, capsys, damage):
    def broken(x, weight, out, bias, accumulate, *, run):
        run(x, weight, out, bias, accumulate)
        damage(out)
    monkeypatch.setattr(ops, "VARIANTS", tuple(
        replace(v, run=partial(broken, run=v.run)) if (v.op, v.name) == ("linear_awq", "weight_only") else v
        for v in ops.VARIANTS))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED cpu     linear_awq awq             weight_only" in out
    assert out.count("FAILED") == 2 and "2 of 16 failed" in out


def kernel_errors(kind, name, dtype=torch.bfloat16):
    row = doctor._row(CPU, name, "fused", dtype, doctor._test_kernel, name, kind)
    assert row.get("error") is None, row["error"]
    return row


KERNELS = [("quant_down", "int4"), ("quant_down", "int4 unsigned"), ("gemm_w4a4", "int4"),
           ("gemm_w4a4", "int4 unsigned"), ("awq_gemv", "awq")]


@needs_gcc
@pytest.mark.parametrize("dtype", fused.HALVES, ids=str)
@pytest.mark.parametrize("name, kind", KERNELS)
def test_kernels_pass_in_the_emulator(monkeypatch, name, kind, dtype):
    emulate(monkeypatch)
    row = kernel_errors(kind, name, dtype)
    assert row["passed"], row


def damage_codes(name, arguments):
    if name.startswith("quant_down"):
        arguments[3].bitwise_xor_(3)


def damage_scales(name, arguments):
    if name.startswith("quant_down"):
        arguments[4].mul_(1.02)


def damage_tail(name, arguments):
    if name.startswith("quant_down"):
        arguments[4][-1, :, -1, -1, -1] = 1


def damage_low(name, arguments):
    if name.startswith("quant_down"):
        arguments[5].mul_(1.01)


def damage_out(name, arguments):
    if name.startswith("gemm_w4a4"):
        arguments[7][-1, -1] = math.inf


@needs_gcc
@pytest.mark.parametrize("spoil, name, check", [
    (damage_codes, "quant_down", "codes"), (damage_scales, "quant_down", "scales"),
    (damage_low, "quant_down", "low rank"), (damage_tail, "quant_down", "rows past the end"),
    (damage_out, "gemm_w4a4", "output")])
def test_kernel_checks_see_damage(monkeypatch, spoil, name, check):
    emulate(monkeypatch, spoil)
    row = kernel_errors("int4", name)
    assert (row["passed"], row["check"]) == (False, check)
    json.dumps(row, allow_nan=False)


@needs_gcc
def test_whole_self_test_of_a_gpu(monkeypatch):
    """All rows of an sm_90 card, the CPU in its place: W4A4 through the emulated variant, AWQ through the fused one."""
    emulate(monkeypatch)
    monkeypatch.setattr(build, "kernels_for", lambda index: object())
    monkeypatch.setattr(doctor, "SHAPES", doctor.SHAPES[1:2])
    rows = doctor.self_test(doctor.Device("cpu", (9, 0), 0))
    assert all(row["passed"] for row in rows), rows
    seen = {(row["what"], row["variant"]) for row in rows}
    assert {("gemm_w4a4 int4 unsigned", "fused_emulated"), ("awq_gemv awq", "fused"), ("linear_awq awq", "fused"),
            ("linear_w4a4 int4", "fused_emulated"), ("linear_w4a4 nvfp4", "weight_only")} <= seen
    assert ("linear_w4a4 int4", "fused") not in seen
