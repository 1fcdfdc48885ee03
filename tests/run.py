#!/usr/bin/env python3
"""All tests, from a fresh clone: python3 tests/run.py [pytest arguments]

Makes the private ComfyUI (.environment) if needed and runs pytest in it. COMFYUI_DIR and COMFYUI_OLD_DIR are the newest
and the oldest ComfyUI tree that the tests know.
"""

import collections
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflows"))
from headless import environment  # noqa: E402

# Not `-m pytest`: that puts the repository on sys.path, where nodes/ hides ComfyUI's nodes.py.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


def main(arguments):
    try:
        comfy = environment.make(ROOT / "tests" / "requirements.txt")
        old = environment.comfy_tree(environment.OLD_COMFYUI)
    except environment.SetupError as error:
        print(f"tests/run.py: {error}", file=sys.stderr)
        return 3
    report = environment.HOME / f"tests-{os.getpid()}.xml"
    paths = [] if any(Path(a.split("::")[0]).exists() for a in arguments) else [str(ROOT / "tests")]
    signal.signal(signal.SIGINT, lambda *_: None)       # Ctrl-C reaches pytest too, which ends by itself
    code = subprocess.run(
        [str(comfy.python), "-c", PYTEST, f"--rootdir={ROOT}", "-p", "no:cacheprovider", "--import-mode=importlib",
         "-ra", f"--junitxml={report}", *paths, *arguments],
        env={"OMP_WAIT_POLICY": "passive", **os.environ,        # threads with nothing to do sleep: tests share their cores
             "COMFYUI_DIR": str(comfy.comfy), "COMFYUI_OLD_DIR": str(old)}).returncode
    if report.is_file():
        print(summary(xml.parse(report)))
        report.unlink()
    return code


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
