"""Between an operator and the driver: whose kernels, which stream, what a launch looks like to CUDA."""

import ctypes
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import build, launch
from svdq_pack.svdq.kernels.errors import BuildError
from svdq_pack.svdq.kernels.launch import Structs, Updated, Written
from svdq_pack.svdq.kernels.variants import awq_gemv


@pytest.fixture
def gpu_tensor(monkeypatch):
    """What a tensor on a GPU looks like to launch(); the current stream is number 9."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=9))
    with FakeTensorMode():
        return torch.empty(1, device="cuda")


def test_no_kernels(monkeypatch, gpu_tensor):
    """A GPU whose kernels could not be built: BuildError, not an AttributeError."""
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    with pytest.raises(BuildError, match="name: there are no kernels awq_gemv for cuda:0; the log"):
        launch.launch(awq_gemv.LIBRARY, gpu_tensor, "name", (1, 1), 1, [])


def test_what_a_kernel_gets(monkeypatch, gpu_tensor):
    """Tensors as their addresses, None as a null pointer, numbers as C has them, structs of 8 bytes a field."""
    calls, x = [], torch.zeros(4)
    structs = Structs([[x, None, 7], [Written(x), x, 2**40]], 3)
    kernels = types.SimpleNamespace(launch=lambda *call: calls.append(call))
    monkeypatch.setattr(build, "kernels_for", lambda library, index: kernels)
    launch.launch(awq_gemv.LIBRARY, gpu_tensor, "name", (5, 2), 96, [x, Updated(x), None, 7, 0.5, structs], 1000, 2)
    (name, grid, block, values, *rest), = calls
    assert (name, grid, block, rest) == ("name", (5, 2), 96, [9, 1000, 2])
    assert [type(value) for value in values[:5]] == [ctypes.c_void_p] * 3 + [ctypes.c_int, ctypes.c_float]
    assert [value.value for value in values[:5]] == [x.data_ptr(), x.data_ptr(), None, 7, 0.5]
    assert list(values[5]) == [x.data_ptr(), 0, 7, x.data_ptr(), x.data_ptr(), 2**40, 0, 0, 0]


def test_launch_through_the_driver():
    """More than 48 KiB of shared memory are asked for once per kernel and size; a cluster is an attribute of the launch."""
    seen = []

    def launch_ex(config, function, addresses, extra):
        config = config._obj
        attribute = config.attributes[0]
        seen.append((list(config.grid), list(config.block), config.shared, config.stream, config.count, attribute.id,
                     list(attribute.value)[:3], function, ctypes.c_int.from_address(addresses[0]).value))
        return 0

    cubins = object.__new__(build.CubinKernels)
    cubins.functions, cubins.allowed, cubins.context = {"a": 7, "b": 8}, {}, None
    cubins.driver = types.SimpleNamespace(
        cuCtxSetCurrent=lambda context: 0, cuLaunchKernelEx=launch_ex,
        cuFuncSetAttribute=lambda *asked: seen.append(asked) or 0,
        cuLaunchKernel=lambda function, *rest: seen.append((function, rest[6])) or 0)
    cubins.launch("a", (6, 1), 384, [ctypes.c_int(5)], 9, 200000, 2)
    config = ([6, 1, 1], [384, 1, 1], 200000, 9, 1, 4, [2, 1, 1], 7, 5)
    assert seen == [(7, 8, 200000), config]
    cubins.launch("a", (6, 1), 384, [ctypes.c_int(5)], 9, 200000, 2)
    cubins.launch("b", (6, 1), 384, [ctypes.c_int(5)], 9, 200000, 1)
    cubins.launch("b", (6, 1), 384, [ctypes.c_int(5)], 9)
    assert seen[2:] == [config, (8, 8, 200000), (8, 200000), (8, 0)]
    cubins.launch("b", (6, 1), 384, [ctypes.c_int(5)], 9, 210000)
    cubins.launch("b", (6, 1), 384, [ctypes.c_int(5)], 9, 60000)
    assert seen[6:] == [(8, 8, 210000), (8, 210000), (8, 60000)]
    assert ctypes.sizeof(build._Attribute) == 72 and ctypes.sizeof(build._Config) == 56        # cuda.h
