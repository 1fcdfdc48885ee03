"""tools/ holds the programs that are no tests: each starts from any folder and says how it is used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def programs(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py")
                  if re.search('^if __name__ == "__main__":', path.read_text(encoding="utf-8"), re.M))


def test_tests_hold_no_program_but_what_runs_them():
    """gpu_stand_in.py is started in the place of python3."""
    assert programs("tests") == [ROOT / "tests" / "kernels" / "gpu_stand_in.py", ROOT / "tests" / "run.py"]


def test_every_tool_says_how_it_is_used(tmp_path):
    """All at once, because some import torch and ComfyUI first."""
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is not set; tests/run.py sets it")
    running = {path: subprocess.Popen([sys.executable, str(path), "--help"], cwd=tmp_path, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      env=os.environ | {"SVDQ_COMFYUI": os.environ["COMFYUI_DIR"]})
               for path in programs("tools")}
    assert len(running) >= 5
    for path, process in running.items():
        said, complaint = process.communicate()
        assert process.returncode == 0, complaint
        assert said.startswith(f"usage: {path.name} [-h]") and f" {path.relative_to(ROOT).as_posix()} " in said
