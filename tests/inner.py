"""Checks that run in a pytest of their own, inside another Python or another ComfyUI, and are reported one by one outside."""

import ast
import os
import subprocess
import xml.etree.ElementTree as xml

import pytest

# Not `-m pytest`: that puts the repository on sys.path, where nodes/ hides ComfyUI's nodes.py.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"


def names(folder):
    """["checks_x-test_y"] of a folder's files, read without importing them."""
    files = sorted(folder.glob("checks_*.py"))
    return [f"{file.stem}-{node.name}" for file in files for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def start(python, folder, checks, report, variables, options=()):
    """A pytest at work on checks of a folder. It writes a JUnit report."""
    paths = [f"{folder}/{check.replace('-', '.py::')}" for check in checks]
    return subprocess.Popen(
        [python, "-c", PYTEST, "-p", "no:cacheprovider", "--import-mode=importlib", "-q", "--tb=short", f"--junitxml={report}",
         *options, *paths], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"})                    # they run side by side


def read(report, said):
    """{check: [(parameters, why it failed or None, why it was skipped or None)]}; said is what its pytest printed."""
    found = {}
    if not report.is_file():
        pytest.fail(f"the inner pytest gave no report:\n{said[-5000:]}")
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


def tell(found):
    """Fail or skip as one check did, of which read() gave `found`; None where it did not run."""
    if found is None:
        pytest.fail("did not run: its file could not be imported, or pytest ended early")
    failed = [f"[{parameters}]\n{text}" for parameters, text, _ in found if text is not None]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    if all(skipped for _, _, skipped in found):
        pytest.skip(found[0][2])
