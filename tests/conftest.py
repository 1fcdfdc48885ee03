"""Lets tests import the pack without ComfyUI: `import svdq_pack.svdq.kernels.layout` skips the root's __init__.py.

Run with --import-mode=importlib. The repository root must not be on sys.path: there, `import nodes` would find this
pack's folder where ComfyUI means its own file.
"""

import sys
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # "" is the working folder
pack = sys.modules.setdefault("svdq_pack", types.ModuleType("svdq_pack"))
pack.__path__ = [str(ROOT)]
# A checkout whose folder name is an identifier looks like a package to pytest, which would import its __init__.py and with
# it ComfyUI. It takes what is already imported under that name.
sys.modules.setdefault(ROOT.name, pack)


@pytest.fixture(scope="session")
def golden_dir():
    """The folder of golden files; its README.md says what they hold."""
    return ROOT / "tests" / "fixtures" / "format"


@pytest.fixture(scope="session")
def golden(golden_dir):
    """golden(name) -> the tensors of one golden file."""
    return lambda name: load_file(golden_dir / f"{name}.safetensors")
