"""python -m svdq doctor: on this machine, on pretended GPUs, on broken ones; its self-test runs what serves, and finds what is
wrong with it."""

import json
import math
import os
import platform
import shutil
import time
import types
from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq import cli, doctor
from svdq_pack.svdq.kernels import build, check, launch, registry, tuner
from svdq_pack.svdq.kernels.variant import HALVES, Target
from svdq_pack.tests.kernels.executors import Emulator
from svdq_pack.tests.unit.layers import CPU_VARIANTS, needs_kernels

ARCH = platform.machine().lower()

CPU = Target("cpu")
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def emulate(monkeypatch):
    """Kernels run in the CPU emulator; gives the list of those that did."""
    emulator = Emulator()
    monkeypatch.setattr(launch, "launch", emulator.launch)
    return emulator.launched


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """One small shape instead of FLUX's: which ones there are does not matter here."""
    monkeypatch.setattr(check, "WIDE", ((17, 128, 128, 16),))


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """pretend((8, 6), ...): the facts with these GPUs, or none, and built kernels. Named arguments replace fields of Built;
    `failing` names libraries that do not build. The self-test runs nothing."""
    def gpus(*capabilities, failing=(), **built):
        made = {"route": "nvrtc", "path": [tmp_path / "a.cubin"], "seconds": 1.5,
                "reasons": ("cpp_extension: no nvcc",)} | built
        (tmp_path / "a.cubin").write_bytes(b"x" * 1000)

        def built_of(library, arch, folder=None):
            lost = {"route": None, "path": None} if library.name in failing else {}
            return build.Built(**{"library": library, "arch": arch} | made | lost)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(
            name=f"Card {index}", major=capabilities[index][0], minor=capabilities[index][1], total_memory=24 << 30))
        monkeypatch.setattr(build, "build", built_of)
        monkeypatch.setattr(build, "kernels_for", lambda library, index: (
            object() if built_of(library, library.arch(None if index is None else capabilities[index])).route else None))
        monkeypatch.setattr(registry, "trusted", lambda variant, target: (
            variant.library is None or build.kernels_for(variant.library, target.index) is not None))
        monkeypatch.setattr(doctor, "self_test", lambda target: [])
        monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
        return doctor.describe()
    return gpus


def dispatch(facts, precision, dtype=None):
    """{device: (variant, reasons)} of a dtype, or where both agree."""
    rows = [row for row in facts["dispatch"] if row["precision"] == precision and dtype in (None, row["dtype"])]
    answers = {row["device"]: (row["variant"], {no["variant"]: no["why"] for no in row["declined"]}) for row in rows}
    assert all(answers[row["device"]][0] == row["variant"] for row in rows)
    assert len(rows) == len(answers) * (2 if dtype is None else 1)
    return answers


@pytest.fixture(autouse=True)
def nothing_timed(monkeypatch):
    """What the tuner chose in one test is not in the next."""
    monkeypatch.setattr(tuner, "_choices", {})


# This machine

@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu(capsys):
    """And nothing of kernels that he can never have."""
    needs_kernels()
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in ("none that torch can use", f"kernels\n  {ARCH:<9}cpu           host compiler, ",
                 "  cpu     int4   w4a8_cpu     fused kernels, 4-bit weights, 8-bit activations (bfloat16, float16, float32)\n",
                 "  cpu     nvfp4  exact_cpu    4-bit weights, exact activations (bfloat16, float16, float32)\n",
                 "  cpu     awq    exact_cpu ", "On the CPU: no CUDA kernel ran"):
        assert line in out
    assert f"all {3 * sum(len(check.kinds_of(variant)) for variant in CPU_VARIANTS)} passed" in out
    assert "FAILED" not in out and "BROKEN" not in out and max(map(len, out.splitlines())) < 160
    who = out.split("who serves")[1].split("self-test")[0]
    assert [line.strip() for line in who.splitlines() if " not " in line] == []
    for variant in registry.VARIANTS:
        assert variant.device in (None, ("cpu",)) or variant.name not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_and_a_compiler(capsys, monkeypatch):
    """Torch serves, and everything says why."""
    monkeypatch.setattr(build, "build", lambda library, arch: build.Built(library, arch, None, None, 0.1, (
        "host compiler: no C++ compiler: neither g++",)))
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    registry.trusted.cache_clear()
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in (f"kernels\n  {ARCH:<9}cpu           none\n{' ' * 25}host compiler: no C++ compiler: neither g++\n",
                 "  cpu     int4   weight_only  weights dequantised in chunks, 16-bit matmul (bfloat16, float16, float32)\n"
                 "          not w4a8_cpu: did not build, or failed its self-test", "\n          not exact_cpu: did not build",
                 "  cpu     nvfp4  weight_only ", "  cpu     awq    weight_only ", "all 15 passed"):
        assert line in out
    said = doctor.summary(doctor.describe())
    assert "kernels: cpu not built: host compiler: no C++ compiler: neither g++" in said
    for precision in ("INT4", "NVFP4"):
        assert (f"{precision} files: weight-only, slower than with kernels, and pictures differ a little from theirs, because "
                f"{'w4a8_cpu' if precision == 'INT4' else 'exact_cpu'} did not build") in said
    registry.trusted.cache_clear()


def test_json_has_the_same_facts(capsys):
    code = cli.main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)      # no NaN: that is not JSON
    assert (code, facts["passed"]) == (0, True)
    assert facts.keys() == {"python", "system", "torch", "cuda", "driver", "gpus", "compilers", "kernels", "broken_variants",
                            "files", "dispatch", "fastest", "self_test", "cache", "passed"}
    text = doctor.as_text(facts)
    assert str(facts["torch"]) in text and facts["self_test"]
    for row in facts["self_test"]:
        assert row["passed"] and row["relative_error"] <= row["limit"]
        assert row["what"] in text and row["check"] in text


# Pretended GPUs

def test_each_generation_gets_its_variant_and_the_reasons(pretend):
    facts = pretend((7, 5), (8, 6), (9, 0), (12, 0))
    int4, awq = dispatch(facts, "int4", "bfloat16"), dispatch(facts, "awq")
    assert dispatch(facts, "int4", "float16") == int4 | {"cuda:0": ("w4a4_sm75", {})}
    assert {device: answer[0] for device, answer in int4.items()} == {
        "cuda:0": "dequant", "cuda:1": "w4a4_sm80", "cuda:2": "w4a8_sm90", "cuda:3": "w4a8_int8"}
    assert {device: answer[0] for device, answer in awq.items()} == {
        "cuda:0": "awq_gemv", "cuda:1": "awq_gemv", "cuda:2": "awq_gemv", "cuda:3": "awq_gemv"}
    assert int4["cuda:0"][1] == {"w4a8_sm90": "is made for sm_90 to sm_90, and this GPU is sm_75",
                                 "w4a4_sm75": "takes float16, not bfloat16",
                                 "w4a4_sm80": "is made for sm_80 to sm_89, and this GPU is sm_75",
                                 "w4a4_fp16n": "is made for sm_80 to sm_89, and this GPU is sm_75",
                                 "w4a4_diag": "is made for sm_80 to sm_80, and this GPU is sm_75",
                                 "w4a4_sm90": "is made for sm_90 to sm_90, and this GPU is sm_75",
                                 "w4a8_int8": "is made for sm_80 and later, and this GPU is sm_75"}
    assert int4["cuda:2"][1] == int4["cuda:3"][1] == awq["cuda:1"][1] == {}
    assert {device: answer[0] for device, answer in dispatch(facts, "nvfp4").items()} == {
        "cuda:0": "dequant", "cuda:1": "dequant", "cuda:2": "dequant", "cuda:3": "nvfp4_sm120"}
    assert [(row["arch"], row["library"], row["route"]) for row in facts["kernels"]] == [
        (arch, library, "nvrtc") for arch, library in (
            ("sm_75", "w4a4_sm75"), ("sm_75", "awq_gemv"), ("sm_75", "dequant"),
            ("sm_86", "w4a4_sm80"), ("sm_86", "w4a4_normal"), ("sm_86", "awq_gemv"), ("sm_86", "w4a8_int8"),
            ("sm_86", "dequant"), ("sm_90a", "w4a8_sm90"), ("sm_90", "awq_gemv"), ("sm_90", "w4a8_int8"), ("sm_90", "dequant"),
            ("sm_120a", "nvfp4_sm120"), ("sm_120", "awq_gemv"), ("sm_120", "w4a8_int8"), ("sm_120", "dequant"))]
    assert {row["variant"]: row["act_bits"] for row in facts["dispatch"]} == {
        "dequant": 16, "w4a4_sm75": 4, "w4a4_sm80": 4, "w4a8_sm90": 8, "w4a8_int8": 8, "awq_gemv": 16,
        "nvfp4_sm120": 4}
    text = doctor.as_text(facts)
    assert "gpu 1          Card 1, sm_86, 24.0 GiB" in text
    assert "not cpp_extension: no nvcc" in text and "fused W4A16 kernel, up to 8 rows (bfloat16, float16)" in text
    assert "  sm_86    w4a4_sm80     nvrtc, " in text and "w4a4_emulated" not in text
    json.dumps(facts)
    assert "no variant is made for this device" in doctor.as_text(pretend((7, 0)))


def test_what_the_tuner_chose(pretend, monkeypatch):
    """With the times, where rivals were timed on one of these GPUs."""
    def choose(device, how, **more):
        return tuner.Choice("w4a4", device, ("one", "w4a4_sm80"), how, us={"one": 812.4, "w4a4_sm80": 1034.0}, **more)
    monkeypatch.setattr(tuner, "_choices", {1: choose("cuda:0", "remembered", wrong={"two": "linear: 1"}),
                                            2: choose("cuda:7", "timed")})
    facts = pretend((8, 9))
    found, = [row for row in facts["fastest"] if row["order"][0] == "one"]
    assert found["device"] == "cuda:0" and found["us"]["one"] == 812.4 and json.loads(json.dumps(facts))["fastest"]
    who = doctor.as_text(facts).partition("who serves")[2].partition("self-test")[0]
    assert ("  cuda:0  fastest of w4a4: one 812 us, w4a4_sm80 1034 us, two WRONG: linear: 1; remembered\n") in who
    monkeypatch.setattr(tuner, "choices", lambda: 1 / 0)
    assert "fastest: unknown: ZeroDivisionError" in doctor.as_text(pretend((8, 9)))


def test_summary(pretend, monkeypatch):
    """A line for each question, and the reason where the answer is no good one."""
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *_: "570.1")
    lines = doctor.summary(pretend((8, 6))).splitlines()
    assert lines[0] == "GPU: Card 0, sm_86, 24.0 GiB" and lines[1].endswith(", driver 570.1")
    assert lines[2].startswith("compilers: ") and lines[3:] == [
        "INT4 files: fused W4A4 kernels",
        "NVFP4 files: weight-only, slower than a 16-bit model, because no kernel of this pack multiplies NVFP4 weights on "
        "sm_86",
        "best here: INT4 files", "self-test: all 0 passed"]
    text = doctor.summary(pretend((12, 0), (9, 0), (7, 5), (7, 0)))
    assert "INT4 files on cuda:0: fused kernels, 4-bit weights, 8-bit integer activations\n" in text
    assert "INT4 files on cuda:2: fused W4A4 kernels\n" in text
    assert ("INT4 files on cuda:3: weight-only, slower than a 16-bit model, because no kernel of this pack multiplies INT4 "
            "weights on sm_70") in text
    assert "INT4 files on cuda:1: fused kernels, 4-bit weights, 8-bit activations" in text
    monkeypatch.setattr(registry, "precision_for", lambda target, dtype: {(12, 0): "nvfp4"}.get(target.capability, "int4"))
    text = doctor.summary(pretend((12, 0), (9, 0)))
    assert "best on cuda:0: NVFP4 files\nbest on cuda:1: INT4 files\n" in text
    assert "INT4 files: fused kernels, 4-bit weights, 8-bit activations" in doctor.summary(pretend()).splitlines()
    text = doctor.summary(pretend((8, 9), failing=("w4a4_sm80", "w4a4_normal", "w4a8_int8")))
    assert "kernels: w4a4_sm80 not built: cpp_extension: no nvcc" in text and "because w4a4_sm80 did not build" in text


def test_summary_speaks_of_the_dtype_that_a_gpu_computes_in(pretend, monkeypatch):
    """fp16 on an RTX 20, whatever serves bf16 there."""
    like, = (variant for variant in registry.VARIANTS if variant.name == "w4a4_sm80")
    kernels = replace(like, name="for fp16", how="fast", device=("cuda", (7, 5), (7, 5)), dtypes=(torch.float16,))
    monkeypatch.setattr(registry, "VARIANTS", (kernels, *registry.VARIANTS))
    facts = pretend((7, 5))
    assert facts["files"] == [{"device": "cuda:0", "take": "int4", "dtype": "float16"}]
    assert "INT4 files: fast" in doctor.summary(facts).splitlines()


def test_summary_of_what_failed(pretend, monkeypatch):
    facts = pretend((8, 6)) | {"gpus": {"error": "no driver"}, "broken_variants": {"new.py": "SyntaxError"}, "self_test": [
        {"device": "cuda:0", "what": "int4", "variant": "w4a4_sm80", "dtype": "bfloat16", "passed": False, "error": "Inf"}]}
    text = doctor.summary(facts)
    for line in ("GPU: unknown: no driver", "kernels: new.py is broken: SyntaxError", "self-test: 1 of 1 failed",
                 "  FAILED cuda:0  int4            w4a4_sm80      bfloat16  Inf"):
        assert line in text.splitlines()
    facts["dispatch"] = facts["kernels"] = [{"error": "on fire", "device": "cuda:0"}]
    assert "files: unknown: on fire" in doctor.summary(facts) and "kernels: unknown: on fire" in doctor.summary(facts)


def test_gpus_of_one_kind_share_their_kernels(pretend):
    facts = pretend((8, 6), (8, 6))
    assert [row["library"] for row in facts["kernels"]] == ["w4a4_sm80", "w4a4_normal", "awq_gemv", "w4a8_int8", "dequant"]
    assert dispatch(facts, "int4").keys() == {"cuda:0", "cuda:1"}


def test_gpu_of_another_maker(pretend, monkeypatch):
    """No kernel is built for it, and none declines."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    facts = pretend((11, 0))
    assert [(row["arch"], row["library"], row["reasons"]) for row in facts["kernels"]] == [
        ("rocm", None, ["no variant is made for this device"])]
    assert all(row["declined"] == [] for row in facts["dispatch"])
    assert dispatch(facts, "int4") == {"cuda:0": ("weight_only", {})}


def test_cached_or_built_now(monkeypatch, tmp_path):
    path, age = tmp_path / "b.cubin", []

    def built(library, arch):
        path.touch()
        os.utime(path, (time.time() + age[-1],) * 2)
        return build.Built(library, arch, "cpp_extension", path, 2.0, ())
    monkeypatch.setattr(build, "build", built)
    for seconds, cached, words in ((1, False, "built in 2.0 s"), (-1, True, "from the cache")):
        age.append(seconds)
        rows = doctor._kernels(Target("cuda", (8, 6)))
        assert [row["library"] for row in rows] == ["w4a4_sm80", "w4a4_normal", "awq_gemv", "w4a8_int8", "dequant"]
        for row in rows:
            assert (row["cached"], row["paths"]) == (cached, [str(path)]) and words in doctor._kernel_lines(row)[0]


def test_failed_build(pretend):
    facts = pretend((8, 9), route=None, path=None, reasons=("cpp_extension: nvcc: error 1\nlong log", "nvrtc: none"))
    for precision in ("int4", "awq"):
        variant, declined = dispatch(facts, precision)["cuda:0"]
        assert variant == "weight_only" and any("did not build" in why for why in declined.values())
    text = doctor.as_text(facts)
    assert "cpp_extension: nvcc: error 1" in text and "nvrtc: none" in text and "long log" not in text


def test_colours_of_compilers_and_drivers(pretend, monkeypatch):
    """What a terminal would obey is shown, in every row."""
    colour = "\x1b[2J\x1b[31mred\u202e"
    monkeypatch.setattr(doctor, "run_tool", lambda *_: colour)
    monkeypatch.setattr(registry, "BROKEN", {"new.py": colour})
    text = doctor.as_text(pretend((8, 9), route=None, path=None, reasons=(f"nvrtc: {colour}",)))
    assert text.replace("\n", "").isprintable() and text.count("\\x1b[2J\\x1b[31mred\\u202e") >= 4


def test_a_library_that_fails_costs_no_other(pretend):
    facts = pretend((8, 9), failing=("w4a4_sm80",))
    assert [(row["library"], row["route"]) for row in facts["kernels"]] == [
        ("w4a4_sm80", None), ("w4a4_normal", "nvrtc"), ("awq_gemv", "nvrtc"), ("w4a8_int8", "nvrtc"), ("dequant", "nvrtc")]
    assert (dispatch(facts, "int4")["cuda:0"][0], dispatch(facts, "awq")["cuda:0"][0]) == ("w4a4_fp16n", "awq_gemv")


def test_broken_variants(pretend, monkeypatch):
    monkeypatch.setattr(registry, "BROKEN", {"new.py": "SyntaxError: invalid syntax"})
    facts = pretend((8, 6))
    assert not facts["passed"] and "  BROKEN new.py: SyntaxError: invalid syntax" in doctor.as_text(facts)


# Odd machines

def fail(*_, **__):
    raise RuntimeError("the driver is on fire\nsecond line")


@pytest.mark.parametrize("module, name, shown", [
    (torch.cuda, "device_count", "gpu            unknown: the driver is on fire"),
    (torch.cuda, "get_device_properties", "gpu 0          unknown: the driver is on fire"),
    (build, "build", "kernels\n  unknown: the driver is on fire"),
    (build, "cache_folder", "cache          unknown: the driver is on fire"),
    (build, "load_nvrtc", "nvrtc          unknown: the driver is on fire"),
    (registry, "libraries", "kernels\n  unknown: the driver is on fire"),
    (registry, "plan", "cuda:0  unknown: the driver is on fire"),
    (doctor, "run_tool", "ninja          unknown: the driver is on fire"),
    (doctor.platform, "platform", "system         unknown: the driver is on fire")])
def test_a_failing_question_costs_one_answer(pretend, monkeypatch, module, name, shown):
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
    assert words in doctor.or_error(doctor.run_tool, "tool", "--version")["error"]


# The self-test. What each of its checks sees: test_check.py

@pytest.mark.parametrize("damage, words", [
    (lambda out: out[-1].zero_(), "(linear"), (lambda out: out.fill_(math.nan), "(linear"), (fail, "the driver is on fire")])
def test_self_test_catches_a_broken_variant(monkeypatch, capsys, damage, words):
    """It costs the rows it is in, its exit code, and nothing else."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    weight_only = next(variant for variant in registry.VARIANTS if variant.name == "weight_only")

    def broken(x, weight, out, *rest):
        weight_only.product(x, weight, out, *rest)
        if weight.precision == "awq":
            damage(out)
    monkeypatch.setattr(registry, "VARIANTS", tuple(
        replace(v, product=broken) if v is weight_only else v for v in registry.VARIANTS))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.startswith("  FAILED")]
    assert len(failed) == 3 and "3 of 15 failed" in out
    assert all(line.startswith("  FAILED cpu     awq             weight_only ") and words in line for line in failed)
    json.dumps(doctor.describe(), allow_nan=False)


def who_is_tested(target):
    """(variant, kind) of each row of a self-test that runs nothing."""
    return {(row["variant"], row["what"]) for row in doctor.self_test(target)}


@pytest.mark.parametrize("target, kernels", [
    (CPU, {"w4a8_cpu", "exact_cpu"}), (Target("rocm", None, 0), set()),
    (Target("cuda", (7, 5), 0), {"w4a4_sm75", "awq_gemv", "dequant"}),
    (Target("cuda", (7, 5), 0, "GTX 1660"), {"awq_gemv", "dequant"}),
    (Target("cuda", (8, 9), 0), {"w4a4_sm80", "w4a4_fp16n", "w4a8_int8", "awq_gemv", "dequant"}),
    (Target("cuda", (9, 0), 0), {"w4a8_sm90", "w4a4_sm90", "w4a8_int8", "awq_gemv", "dequant"}),
    (Target("cuda", (12, 0), 0), {"w4a8_int8", "nvfp4_sm120", "awq_gemv", "dequant"})], ids=str)
def test_self_test_runs_what_may_serve(monkeypatch, target, kernels):
    """Every kind that a variant takes, and no variant that only runs on request."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: object())
    monkeypatch.setattr(check, "wide", lambda variant, kind, dtype, device: check.Check(device, 0.0, 1.0))
    serving = [variant for variant in registry.VARIANTS if variant.name in kernels | {"weight_only"}]
    assert who_is_tested(target) == {(variant.name, kind) for variant in serving for kind in check.kinds_of(variant)}
    assert {row["check"] for row in doctor.self_test(target)} == {target.name}
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    assert {variant for variant, _ in who_is_tested(target)} == {"weight_only"}        # nothing to test; dispatch says why


@needs_gxx
def test_whole_self_test_of_a_hopper(monkeypatch):
    """All rows of an sm_90 card, the emulator in its place: every kernel that serves there, and none that does not."""
    launched = emulate(monkeypatch)
    monkeypatch.setattr(build, "kernels_for", lambda library, index: object())
    rows = doctor.self_test(Target("cuda", (9, 0), 0), device="cpu")
    assert all(row["passed"] for row in rows), rows
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16"} and len(rows) == 2 * (5 + 4 + 3 + 3 + 3 + 1)
    json.dumps(rows, allow_nan=False)
    libraries = registry.libraries(Target("cuda", (9, 0)))
    own = {name for library in libraries for name in library.kernels}
    assert set(launched) <= own and {library.name for library in libraries} == {"w4a8_sm90", "w4a8_int8", "awq_gemv", "dequant"}
    for half in HALVES.values():
        for part in ("quant_fp8_{}_token_s_r32", "quant_fp8_{}_group_u_r32", "gemm_fp8_{}_token_w4_c2",
                     "gemm_fp8_{}_group_w8_c2", "quant_int8_{}_r32", "gemm_int8_{}", "awq_gemv_{}_b8", "dequant_{}_int4",
                     "dequant_{}_nvfp4"):
            assert part.format(half) in launched
