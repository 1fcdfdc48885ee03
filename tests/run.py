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

Paths of both halves, which all tests are, run in two pytest processes side by side: tests/kernels with tests/unit, and the
rest, whose output comes after the first one's. With an option of pytest's other than -k all run in one process: -x is to end
everything, --pdb wants the keyboard, --junitxml names one file.
"""

import argparse
import collections
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(ROOT / "workflows"))
from headless import maker  # noqa: E402

# Not `-m pytest`: that puts the repository on sys.path, where nodes/ hides ComfyUI's nodes.py.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


# Of each area what needs no ComfyUI, no compiler but g++, and few seconds. `--durations=20` shows what a file costs.
FAST = ("unit", "hostile/test_files.py", "hostile/test_quantize.py", "kernels/test_layout.py", "kernels/test_reference.py",
        "kernels/test_launch.py", "kernels/families/test_every_variant.py")
# What runs beside all the rest. tests/kernels stays whole: its last test looks back at what passed in its own process.
HALF = (TESTS / "kernels", TESTS / "unit")
NO_TESTS = 5                    # pytest's exit code where -k leaves none


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    parser = argparse.ArgumentParser(usage="python3 tests/run.py --help", add_help=False, allow_abbrev=False)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--comfyui", metavar="FOLDER")
    parser.add_argument("-k", metavar="EXPRESSION")
    ours, wanted = parser.parse_known_args(arguments)
    if ours.fast:
        wanted = [*(str(TESTS / name) for name in FAST), *wanted]
    elif not any(map(is_path, wanted)):
        wanted = [str(TESTS), *wanted]
    runs = [[*part, *([] if ours.k is None else ["-k", ours.k])] for part in parts(wanted)]
    packages = os.environ.get("PYTHONPATH", "")
    try:
        if ours.comfyui:
            newest, first = maker.given_tree(ours.comfyui)
            packages = os.pathsep.join(filter(None, [str(first), packages]))
        comfy = maker.make(TESTS / "requirements.txt")
        old = maker.comfy_tree(maker.OLD_COMFYUI)
    except maker.SetupError as error:
        print(f"tests/run.py: {error}", file=sys.stderr)
        return 3
    frontend = or_nothing("the oldest web page", maker.old_frontend)
    headers = or_nothing("CUTLASS", maker.cutlass_headers)
    hf = hf_variables() if not ours.fast and any(map(has_hf, wanted)) else {}
    signal.signal(signal.SIGINT, lambda *_: None)       # Ctrl-C reaches pytest too, which ends by itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))        # which reaches us alone
    if ours.comfyui:
        print(f"newest: {newest}", file=sys.stderr)
    env = {"OMP_WAIT_POLICY": "passive", **os.environ,          # threads with nothing to do sleep: tests share their cores
           "COMFYUI_DIR": str(newest if ours.comfyui else comfy.comfy), "COMFYUI_OLD_DIR": str(old),
           "COMFYUI_OLD_FRONTEND": str(frontend), "CUTLASS_INCLUDE": str(headers), "PYTHONPATH": packages, **hf}
    with tempfile.TemporaryDirectory(prefix="tests-", dir=maker.HOME) as folder:
        reports = [Path(folder, f"{number}.xml") for number in range(len(runs))]
        codes = side_by_side([[str(comfy.python), "-c", PYTEST, f"--rootdir={ROOT}", "-p", "no:cacheprovider",
                               "--import-mode=importlib", "-ra", f"--junitxml={report}", *run]
                              for run, report in zip(runs, reports)], env, Path(folder))
        found = [xml.parse(report) for report in reports if report.is_file()]
        lost = [code for code, report in zip(codes, reports) if not report.is_file()]
    code = exit_code(codes)
    if lost and len(runs) > 1:
        print(f"\ntests/run.py: a pytest process ended with code {lost[0]} and without a report; its tests are not counted")
    if found:
        print(summary(*found) + (f"\nleft out: {', '.join(left_out(*found))}" if ours.fast and code in (0, 1) else ""))
    return code


def is_path(argument):
    return Path(argument.split("::")[0]).exists()


def parts(wanted):
    """What each pytest process is asked for: [of HALF, of the rest] if all that is wanted is paths and both have some."""
    half, rest = [], []
    for argument in wanted:
        path = Path(argument.split("::")[0]).resolve()
        if not path.exists():
            return [wanted]
        if any(folder in (path, *path.parents) for folder in HALF):
            half.append(argument)
        elif inside := [str(folder) for folder in HALF if path in folder.parents]:
            half += inside
            rest += [argument, *(f"--ignore={folder}" for folder in inside)]
        else:
            rest.append(argument)
    return [half, rest] if half and rest else [wanted]


def side_by_side(commands, env, folder):
    """The exit codes of commands. The first says what it says at once, the next when that one has ended; until then a file in
    `folder` has it."""
    if len(commands) > 1:
        print(f"tests/run.py: {len(commands)} pytest processes side by side; this is the first", file=sys.stderr, flush=True)
    running = []
    try:
        for number, command in enumerate(commands):
            with open(folder / f"{number}.txt", "wb") as said:
                out = {"stdout": said, "stderr": subprocess.STDOUT} if number else {}
                running.append(subprocess.Popen(command, env=env, **out))
        running[0].wait()
        for number, process in enumerate(running[1:], 1):
            print("", flush=True)
            with open(folder / f"{number}.txt", "rb") as said:
                ended = False
                while not ended:
                    time.sleep(0.1)
                    ended = process.poll() is not None          # asked first: then the file is whole
                    shutil.copyfileobj(said, sys.stdout.buffer)
                    sys.stdout.buffer.flush()
    except BaseException:
        for process in running:
            process.send_signal(signal.SIGINT)      # not SIGTERM, at which pytest leaves servers behind
        raise
    finally:
        for process in running:
            process.wait()
    return [process.returncode for process in running]


def exit_code(codes):
    """The first that is no success; that no test was chosen counts if none was anywhere."""
    return next((code for code in codes if code not in (0, NO_TESTS)), min(codes))


def or_nothing(what, get):
    """What get() returns; "" where it cannot be had, and its tests skip."""
    try:
        return get()
    except maker.SetupError as error:
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
        return {"SVDQ_HF_PYTHON": str(maker.make_hf(TESTS / "hf" / "requirements.txt")),
                "SVDQ_HF_LOWEST": str(maker.lowest_hf())}
    except maker.SetupError as error:
        print(f"tests/run.py: without diffusers: {error}", file=sys.stderr)
        return {}


def left_out(*reports):
    """The files that no test in the reports is of; a whole folder of them by its name."""
    files = {path.relative_to(ROOT) for path in TESTS.rglob("test_*.py")}
    run = {Path(case.get("file")) for report in reports for case in report.iter("testcase") if case.get("file")}
    folders = {file.parent for file in files} - {file.parent for file in run}
    return sorted({(file.parent if file.parent in folders else file).as_posix() for file in files - run})


def summary(*reports):
    """'3 passed, 0 failed, 2 skipped (2: no GPU)'"""
    cases = [case for report in reports for case in report.iter("testcase")]
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
