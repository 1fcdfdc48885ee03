"""The checks of inprocess/, once inside the newest and once inside the oldest ComfyUI.

Two ComfyUI versions cannot live in one process, so each runs in a pytest of its own; every check is reported here.
"""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "inprocess"
FILES = sorted(FOLDER.glob("checks_*.py"))
CHECKS = [f"{file.stem}-{node.name}" for file in FILES for node in ast.parse(file.read_text()).body
          if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
TREES = {"newest": "COMFYUI_DIR", "oldest": "COMFYUI_OLD_DIR"}
# Not `-m pytest`: that puts the repository on sys.path, where nodes/ hides ComfyUI's nodes.py.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """{tree: {check: [(parameters, why it failed or None, why it was skipped or None)]}} of the selected checks."""
    selected = {(item.callspec.params["check"], item.callspec.params["tree"]) for item in request.session.items
                if item.path == Path(__file__)}
    folder, running = tmp_path_factory.mktemp("inprocess"), {}
    for tree, variable in TREES.items():
        checks = [f"{FOLDER}/{check.replace('-', '.py::')}" for check in CHECKS if (check, tree) in selected]
        if checks and os.environ.get(variable):
            running[tree] = subprocess.Popen(
                [sys.executable, "-c", PYTEST, "-p", "no:cacheprovider", "--import-mode=importlib", "-q", "--tb=short",
                 f"--junitxml={folder / tree}.xml", "-o", "junit_logging=all", *checks],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "SVDQ_COMFYUI": os.environ[variable], "OMP_NUM_THREADS": "1"})   # side by side
    said = {tree: process.communicate()[0] for tree, process in running.items()}
    return {tree: _read(folder / f"{tree}.xml", said[tree]) for tree in running}


def _read(report, said):
    found = {}
    if not report.is_file():
        pytest.fail(f"pytest inside ComfyUI gave no report:\n{said[-5000:]}")
    for case in xml.parse(report).iter("testcase"):
        name, _, parameters = case.get("name").partition("[")
        file = case.get("classname").rpartition(".")[2]
        bad = [part for kind in ("failure", "error") for part in case.findall(kind)]
        text = "\n".join([part.text or part.get("message") for part in bad]
                         + [case.findtext(out) or "" for out in ("system-out", "system-err")]) if bad else None
        skip = case.find("skipped")
        skipped = None if skip is None else skip.get("message")
        found.setdefault(f"{file}-{name}", []).append((parameters.rstrip("]"), text, skipped))
    return found


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check, tree, results):
    if not os.environ.get(TREES[tree]):
        pytest.skip(f"{TREES[tree]} is not set; tests/run.py sets it")
    found = results[tree][check]
    failed = [f"[{parameters}]\n{text}" for parameters, text, _ in found if text is not None]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    if all(skipped for _, _, skipped in found):
        pytest.skip(found[0][2])
