""".ci/gpu is rehearsed: each of its steps with an emulator in the GPU's place, its limits, and what a cut run leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch

from svdq_pack.svdq import bench_file
from svdq_pack.svdq.kernels import registry
from svdq_pack.svdq.kernels.variant import Target

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "gpu"
STEPS = dict(re.findall(r"^step (\w+) +(\d+) ", SCRIPT.read_text(), re.M))
MOST = 8 * 60               # seconds of one call

pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="no bash")


def tools(folder, **scripts):
    """Programs in a folder that comes first on the PATH."""
    folder.mkdir()
    for name, text in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_limits():
    """One loan is 15 minutes, starts and transfers included, and a run that found something is run again."""
    assert list(STEPS) == ["gpu", "build", "doctor", "bench", "tests", "memcheck", "racecheck"]
    assert sum(int(seconds) + 5 for seconds in STEPS.values()) <= MOST         # 5 for whoever does not end when told
    assert "timeout -k 5" in SCRIPT.read_text()


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_rehearsal(tmp_path):
    """Every command as a GPU would get it, in each every variant that the GPU can run, its first choice or not. pytest gets the
    real Python: its tests have a rehearsal of their own."""
    stand_in = ROOT / "tests" / "kernels" / "gpu_stand_in.py"
    real = f"'{sys.executable}'"
    env = tools(tmp_path / "bin", python3=f'[ "$1" = -m ] && exec {real} "$@"; exec {real} \'{stand_in}\' "$@"',
                nvidia_smi="echo 'Pretended H100, 580.1'",
                compute_sanitizer='while [[ $1 == -* ]]; do [ $1 = --tool ] && shift; [ $1 = --error-exitcode ] && shift; '
                                  'shift; done; exec "$@"')
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=900, cwd=tmp_path,
                          env={**env, "OUT": str(tmp_path / "out"), "XDG_CACHE_HOME": str(tmp_path / "cache"),
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    out = tmp_path / "out"
    rows = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
    assert [(name, code) for name, code, _ in rows] == [(name, "0") for name in STEPS]
    facts = json.loads((out / "doctor.json").read_text())
    able = [variant for variant in registry.VARIANTS if not variant.on_request and variant.made_for(Target("cuda", (9, 0)))]
    assert facts["passed"] and {row["variant"] for row in facts["self_test"]} == {variant.name for variant in able}
    table = bench_file.read((out / "bench.md").read_text())
    assert table["complete"] and table["passed"]
    kernels = [variant for variant in able if variant.library is not None]
    assert {(row["variant"], row["self_test"]) for row in table["kernels"]} == {(v.name, "passed") for v in kernels}
    assert {(row["what"], row["variant"]) for row in table["rows"]} >= {
        ("both with QKV", "w4a4_sm90"), ("both with Gated", "w4a8_sm90"), *(
            ("modulation" if variant.precisions == ("awq",) else "both", variant.name) for variant in kernels)}
    cases = list(xml.parse(out / "tests.xml").iter("testcase"))
    assert cases
    if not torch.cuda.is_available():
        assert all(case.find("skipped") is not None for case in cases)
    said = (out / "gpu.log").read_text()
    assert said.count("\n    right\n") == 2 * len(kernels) and "all steps passed" in said             # memcheck, racecheck
    assert all(said.count(f"{library.name}\n    sm_90") == 1 for library in {variant.library for variant in kernels})


BENCH = "rows so far"
PYTHON = f"""
case "$1 $2" in
    "svdq doctor") hang doctor; echo '{{"passed": true}}' ;;
    "svdq bench") echo '{BENCH}' >"$4"; hang bench ;;
    "tools/gpu_steps.py build") hang build ;;
    "tools/gpu_steps.py once") hang "$TOOL" ;;
    *) hang tests ;;
esac"""
HANG = 'hang() { [ "$1" != "$HANG" ] || { touch "$OUT/hangs"; sleep 600; }; }\n'


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_is_cut_leaves_what_it_had(step, tmp_path):
    """The machine goes back in the middle of each step in turn."""
    out = tmp_path / "out"
    out.mkdir()
    env = tools(tmp_path / "bin", python3=HANG + PYTHON, nvidia_smi=HANG + "hang gpu; echo a card",
                compute_sanitizer='while [[ $1 == -* ]]; do [ $1 = --tool ] && { export TOOL=$2; shift; }; '
                                  '[ $1 = --error-exitcode ] && shift; shift; done; exec "$@"')
    run = subprocess.Popen(["bash", str(SCRIPT)], env={**env, "OUT": str(out), "HANG": step}, start_new_session=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if (out / "hangs").exists():
                break
            time.sleep(0.1)
        else:
            pytest.fail("the step never began")
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    done = list(STEPS)[:list(STEPS).index(step)]
    rows = [line.split("\t")[:2] for line in (out / "steps.tsv").read_text().splitlines()] if done else []
    assert rows == [[name, "0"] for name in done]
    if "doctor" in done:
        assert json.loads((out / "doctor.json").read_text())["passed"]
    if "bench" in done or step == "bench":
        assert (out / "bench.md").read_text() == BENCH + "\n"
    assert all(f"== {name}: exit 0" in (out / "gpu.log").read_text() for name in done)


def test_one_step_again(tmp_path):
    env = tools(tmp_path / "bin", python3="echo python3 $*; exit 1", nvidia_smi="echo a card")
    env |= {"OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", str(SCRIPT), "--only", "gpu", "build"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "failed: build. Again: .ci/gpu --only build" in done.stdout
    assert "a card" in done.stdout and "python3 tools/gpu_steps.py build" in done.stdout and "doctor" not in done.stdout
    for wrong in (["--only"], ["--only", "nothing"], ["build"]):
        done = subprocess.run(["bash", str(SCRIPT), *wrong], capture_output=True, text=True, env=env)
        assert done.returncode == 2 and "gpu build doctor" in done.stderr
