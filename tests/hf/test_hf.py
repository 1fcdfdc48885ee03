"""The checks of inside/, once with the newest and once with the lowest diffusers and PEFT that the pack supports.

They need a Python in which transformers imports, so each runs in a pytest of its own there; every check is reported here.
"""

import ast
import os
import subprocess
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "inside"
FILES = sorted(FOLDER.glob("checks_*.py"))
CHECKS = [f"{file.stem}-{node.name}" for file in FILES for node in ast.parse(file.read_text()).body
          if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
VERSIONS = {"newest": None, "lowest": "SVDQ_HF_LOWEST"}         # -> the variable with the folder that comes first on the path
PYTHON = "SVDQ_HF_PYTHON"                                       # the variable with the interpreter; tests/run.py sets all three
# Not `-m pytest`: that puts the repository on sys.path.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """{version: {check: [(parameters, why it failed or None, why it was skipped or None)]}} of the selected checks."""
    selected = {(item.callspec.params["check"], item.callspec.params["version"]) for item in request.session.items
                if item.path == Path(__file__)}
    folder, running = tmp_path_factory.mktemp("hf"), {}
    for version, first in VERSIONS.items():
        checks = [f"{FOLDER}/{check.replace('-', '.py::')}" for check in CHECKS if (check, version) in selected]
        if checks and os.environ.get(PYTHON) and (first is None or os.environ.get(first)):
            path = os.environ[first] if first else ""
            running[version] = subprocess.Popen(
                [os.environ[PYTHON], "-c", PYTEST, "-p", "no:cacheprovider", "--import-mode=importlib", "-q", "--tb=short",
                 "--show-capture=no", f"--junitxml={folder / version}.xml", *checks], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})     # side by side
    said = {version: process.communicate()[0] for version, process in running.items()}
    return {version: _read(folder / f"{version}.xml", said[version]) for version in running}


def _read(report, said):
    found = {}
    if not report.is_file():
        pytest.fail(f"pytest with diffusers gave no report:\n{said[-5000:]}")
    for case in xml.parse(report).iter("testcase"):
        name, _, parameters = case.get("name").partition("[")
        file = case.get("classname").rpartition(".")[2]
        bad = [part for kind in ("failure", "error") for part in case.findall(kind)]
        text = "\n".join(part.text or part.get("message") for part in bad) if bad else None
        skip = case.find("skipped")
        skipped = None if skip is None else skip.get("message")
        found.setdefault(f"{file}-{name}", []).append((parameters.rstrip("]"), text, skipped))
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check, version, results):
    if version not in results:
        pytest.skip(f"{PYTHON} or {VERSIONS['lowest']} is not set; tests/run.py sets them")
    found = results[version].get(check)
    if found is None:
        pytest.fail("did not run: its file could not be imported, or pytest ended early")
    failed = [f"[{parameters}]\n{text}" for parameters, text, _ in found if text is not None]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    if all(skipped for _, _, skipped in found):
        pytest.skip(found[0][2])
