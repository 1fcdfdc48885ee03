"""Fixtures of the kernel tests: who runs the kernels, and the proof that every test for a GPU was rehearsed."""

import types

import pytest
import torch

from svdq_pack.svdq.kernels import launch
from svdq_pack.tests.kernels import executors
from svdq_pack.tests.kernels.executors import LEFT_OUT, PASSED


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs its kernels on a GPU")
    config.stash[PASSED], config.stash[LEFT_OUT] = set(), set()


def pytest_collection_modifyitems(items):
    """What looks back at the other tests comes last."""
    items.sort(key=lambda item: item.path.name == "test_rehearsal.py")


def pytest_deselected(items):
    for item in items:
        item.config.stash[LEFT_OUT].add((item.path, getattr(item, "originalname", item.name)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.passed and "executor" in getattr(getattr(item, "callspec", None), "params", {}):
        item.config.stash[PASSED].add((item.path, item.originalname, item.callspec.params["executor"]))
    return report


@pytest.fixture
def executor(request, monkeypatch):
    """The Executor that `on` asks for, in the place of kernels.launch.launch."""
    module, params = request.module, request.node.callspec.params
    chosen = executors.EXECUTORS[request.param](params.get("variant", getattr(module, "VARIANT", None)),
                                                getattr(module, "GPU_SLACK", executors.FP32))
    chosen.install(monkeypatch)
    return chosen


@pytest.fixture
def launches(monkeypatch):
    """Launches that tests ask for, none of which happens: name, grid, block, arguments, shared, cluster."""
    calls = []

    def note(library, like, name, grid, block, arguments, shared=0, cluster=1):
        calls.append(types.SimpleNamespace(name=name, grid=grid, block=block, arguments=arguments, shared=shared,
                                           cluster=cluster))

    monkeypatch.setattr(launch, "launch", note)
    return calls


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are small: torch's threads would only wait for each other, on a busy machine most of the time. Those that a
    GPU is compared with are not."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
