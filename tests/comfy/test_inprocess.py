"""The checks of inprocess/, once inside the newest and once inside the oldest ComfyUI.

Two ComfyUI versions cannot live in one process, so each runs in a pytest of its own; every check is reported here.
"""

import os
import sys
from pathlib import Path

import pytest

from svdq_pack.tests import inner

FOLDER = Path(__file__).resolve().parent / "inprocess"
CHECKS = inner.names(FOLDER)
TREES = {"newest": "COMFYUI_DIR", "oldest": "COMFYUI_OLD_DIR"}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """{tree: what inner.read gives} of the selected checks."""
    selected = {(item.callspec.params["check"], item.callspec.params["tree"]) for item in request.session.items
                if item.path == Path(__file__)}
    folder, running = tmp_path_factory.mktemp("inprocess"), {}
    for tree, variable in TREES.items():
        checks = [check for check in CHECKS if (check, tree) in selected]
        if checks and os.environ.get(variable):
            running[tree] = inner.start(sys.executable, FOLDER, checks, folder / f"{tree}.xml",
                                        {"SVDQ_COMFYUI": os.environ[variable]}, ["-o", "junit_logging=all"])
    said = {tree: process.communicate()[0] for tree, process in running.items()}
    return {tree: inner.read(folder / f"{tree}.xml", said[tree]) for tree in running}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check, tree, results):
    if not os.environ.get(TREES[tree]):
        pytest.skip(f"{TREES[tree]} is not set; tests/run.py sets it")
    inner.tell(results[tree].get(check))
