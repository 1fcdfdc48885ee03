#!/usr/bin/env python3
"""Run the tests, from a fresh clone.

    python3 tests/run.py                                all of them
    python3 tests/run.py --fast                         while you edit: those that find the most in the least time
    python3 tests/run.py tests/unit                     one area: unit, kernels, hostile, comfy, hf or headless
    python3 tests/run.py tests/unit/test_lora.py -x     a file; what is no path goes to pytest
    python3 tests/run.py --comfyui FOLDER tests/comfy   with a ComfyUI that you fetched, in place of the newest one

Makes the private ComfyUI (.environment) if needed and runs pytest in it; for tests/hf and tests/headless a Python with
diffusers, too, which SVDQ_HF_PYTHON names, SVDQ_HF_LOWEST being a folder with the oldest diffusers. COMFYUI_DIR and
COMFYUI_OLD_DIR are the newest and the oldest ComfyUI tree that the tests know, COMFYUI_OLD_FRONTEND is the oldest one's web
page, CUTLASS_INCLUDE has NVIDIA's headers. The exit code is pytest's (0: nothing failed), or 3: no environment.
"""

import argparse
import collections
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(ROOT / "workflows"))
from headless import environment  # noqa: E402

# Not `-m pytest`: that puts the repository on sys.path, where nodes/ hides ComfyUI's nodes.py.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


# Of each area what needs no ComfyUI, no compiler but g++, and few seconds. `--durations=20` shows what a file costs.
FAST = ("unit", "hostile/test_files.py", "hostile/test_quantize.py", "kernels/test_layout.py", "kernels/test_reference.py",
        "kernels/test_launch.py", "kernels/families/test_every_variant.py")


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    parser = argparse.ArgumentParser(usage="python3 tests/run.py --help", add_help=False, allow_abbrev=False)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--comfyui", metavar="FOLDER")
    ours, arguments = parser.parse_known_args(arguments)
    if ours.fast:
        paths = [str(TESTS / name) for name in FAST]
    else:
        paths = [] if any(Path(a.split("::")[0]).exists() for a in arguments) else [str(TESTS)]
    packages = os.environ.get("PYTHONPATH", "")
    try:
        if ours.comfyui:
            newest, first = environment.given_tree(ours.comfyui)
            packages = os.pathsep.join(filter(None, [str(first), packages]))
        comfy = environment.make(TESTS / "requirements.txt")
        old = environment.comfy_tree(environment.OLD_COMFYUI)
    except environment.SetupError as error:
        print(f"tests/run.py: {error}", file=sys.stderr)
        return 3
    frontend = or_nothing("the oldest web page", environment.old_frontend)
    headers = or_nothing("CUTLASS", environment.cutlass_headers)
    hf = hf_variables() if not ours.fast and any(map(has_hf, paths or arguments)) else {}
    report = environment.HOME / f"tests-{os.getpid()}.xml"
    signal.signal(signal.SIGINT, lambda *_: None)       # Ctrl-C reaches pytest too, which ends by itself
    if ours.comfyui:
        print(f"newest: {newest}", file=sys.stderr)
    code = subprocess.run(
        [str(comfy.python), "-c", PYTEST, f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--import-mode=importlib",
         "-ra", f"--junitxml={report}", *paths, *arguments],
        env={"OMP_WAIT_POLICY": "passive", **os.environ,        # threads with nothing to do sleep: tests share their cores
             "COMFYUI_DIR": str(newest if ours.comfyui else comfy.comfy), "COMFYUI_OLD_DIR": str(old),
             "COMFYUI_OLD_FRONTEND": str(frontend), "CUTLASS_INCLUDE": str(headers), "PYTHONPATH": packages, **hf}).returncode
    if report.is_file():
        found = xml.parse(report)
        print(summary(found) + (f"\nleft out: {', '.join(left_out(found))}" if ours.fast and code < 2 else ""))
        report.unlink()
    return code


def or_nothing(what, get):
    """What get() returns; "" where it cannot be had, and its tests skip."""
    try:
        return get()
    except environment.SetupError as error:
        print(f"tests/run.py: without {what}: {error}", file=sys.stderr)
        return ""


def has_hf(argument):
    """Whether what is named, if it is a path, holds tests inside diffusers."""
    path = Path(argument.split("::")[0]).absolute()
    folders = (TESTS / "hf", TESTS / "headless")
    return path.exists() and any(folder in (path, *path.parents) or path in folder.parents for folder in folders)


def hf_variables():
    """{variable: value} for tests inside diffusers; {} where its environment cannot be made, and they skip."""
    try:
        return {"SVDQ_HF_PYTHON": str(environment.make_hf(TESTS / "hf" / "requirements.txt")),
                "SVDQ_HF_LOWEST": str(environment.lowest_hf())}
    except environment.SetupError as error:
        print(f"tests/run.py: without diffusers: {error}", file=sys.stderr)
        return {}


def left_out(report):
    """The files that no test in the report is of; a whole folder of them by its name."""
    files = {path.relative_to(ROOT) for path in TESTS.rglob("test_*.py")}
    run = {Path(case.get("file")) for case in report.iter("testcase") if case.get("file")}
    folders = {file.parent for file in files} - {file.parent for file in run}
    return sorted({(file.parent if file.parent in folders else file).as_posix() for file in files - run})


def summary(report):
    """'3 passed, 0 failed, 2 skipped (2: no GPU)'"""
    cases = list(report.iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skips = [case.find("skipped") for case in cases if case.find("skipped") is not None]
    reasons = collections.Counter(map(reason, skips)).most_common()
    text = f" ({'; '.join(f'{count}: {why}' for why, count in reasons)})" if reasons else ""
    return f"{len(cases) - failed - len(skips)} passed, {failed} failed, {len(skips)} skipped{text}"


def reason(skip):
    """A module that skips itself as a whole says why in a quoted tuple."""
    whole = re.search(r"Skipped: (.*?)['\"]\)$", skip.text or "")
    return whole[1] if skip.get("message") == "collection skipped" and whole else skip.get("message")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
