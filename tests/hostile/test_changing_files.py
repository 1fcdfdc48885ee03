"""A few times of tools/changing_files.py, which tries 200."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "changing_files.py"
TIMES = 20


def test_no_signal_and_no_other_picture():
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is not set; tests/run.py sets it")
    done = subprocess.run([sys.executable, str(SCRIPT), "--times", str(TIMES)], capture_output=True, text=True)
    print(done.stdout, done.stderr[-2000:])
    outcomes = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and sum(int(count) for count, _ in outcomes) == TIMES
    assert {outcome.partition(" (")[0] for _, outcome in outcomes} == {"the right latent", "one error of ours"}
