"""No test meets a real GPU first: each that runs on one has run here, with a simulator in the GPU's place."""

import shutil

import pytest

from svdq_pack.tests.kernels.executors import LEFT_OUT, PASSED


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_every_test_for_a_gpu_was_rehearsed(request):
    """conftest.py puts this last. It speaks of the tests that were chosen with all their cases."""
    wanted = {(item.path, item.originalname) for item in request.session.items if item.get_closest_marker("gpu")}
    passed = {(path, name) for path, name, executor in request.config.stash[PASSED] if executor in ("emulator", "rehearsal")}
    missing = sorted(f"{path.name}::{name}" for path, name in wanted - passed - request.config.stash[LEFT_OUT])
    assert not missing, f"no passed rehearsal of {', '.join(missing)}"
