"""The checks of inside/, once with the newest and once with the lowest diffusers and PEFT that the pack supports.

They need a Python in which transformers imports, so each runs in a pytest of its own there; every check is reported here.
"""

import os
from pathlib import Path

import pytest

from svdq_pack.tests import inner

FOLDER = Path(__file__).resolve().parent / "inside"
CHECKS = inner.names(FOLDER)
VERSIONS = {"newest": None, "lowest": "SVDQ_HF_LOWEST"}         # -> the variable with the folder that comes first on the path
PYTHON = "SVDQ_HF_PYTHON"                                       # the variable with the interpreter; tests/run.py sets all three


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """{version: what inner.read gives} of the selected checks."""
    selected = {(item.callspec.params["check"], item.callspec.params["version"]) for item in request.session.items
                if item.path == Path(__file__)}
    folder, running = tmp_path_factory.mktemp("hf"), {}
    for version, first in VERSIONS.items():
        checks = [check for check in CHECKS if (check, version) in selected]
        if checks and os.environ.get(PYTHON) and (first is None or os.environ.get(first)):
            running[version] = inner.start(os.environ[PYTHON], FOLDER, checks, folder / f"{version}.xml",
                                           {"PYTHONPATH": os.environ[first] if first else ""}, ["--show-capture=no"])
    said = {version: process.communicate()[0] for version, process in running.items()}
    return {version: inner.read(folder / f"{version}.xml", said[version]) for version in running}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check, version, results):
    if version not in results:
        pytest.skip(f"{PYTHON} or {VERSIONS['lowest']} is not set; tests/run.py sets them")
    inner.tell(results[version].get(check))
