"""Runs a program of .ci/gpu with an H100 that is not there: python3 gpu_stand_in.py PROGRAM [ARGUMENTS]

torch.cuda describes the card, devices called "cuda" are the CPU, launches go to the g++ emulator, shapes are small. What is
rehearsed is everything else: options, names, checks, tables, files.

Test: tests/kernels/test_ci_gpu.py
"""

import runpy
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[2]
pack = types.ModuleType("svdq_pack")
pack.__path__ = [str(ROOT)]
sys.modules[pack.__name__] = pack

from svdq_pack.svdq import bench  # noqa: E402
from svdq_pack.svdq.kernels import build, check, launch  # noqa: E402
from svdq_pack.svdq.kernels.variant import Target  # noqa: E402
from svdq_pack.tests.kernels.executors import Emulator  # noqa: E402

CAPABILITY = 9, 0


class CudaIsTheCpu(TorchFunctionMode):
    """Whoever asks for a device called cuda gets the CPU."""

    def __torch_function__(self, function, kinds, arguments=(), more=None):
        more = {name: cpu(value) for name, value in (more or {}).items()}
        return function(*map(cpu, arguments), **more)


def cpu(value):
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class Generator(torch.Generator):
    """Classes are seen by no function mode."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, cpu(device))


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


class NoGraph:
    """What cannot be captured is launched: bench knows that, too."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        raise RuntimeError("a stand-in captures nothing")

    def __exit__(self, *_):
        pass


def pretend():
    properties = types.SimpleNamespace(name="Pretended H100", major=9, minor=0, total_memory=80 << 30, L2_cache_size=1 << 10,
                                       multi_processor_count=2)
    for name, stand_in in {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "synchronize": lambda: None,
            "get_device_name": lambda *_: properties.name, "get_device_capability": lambda *_: CAPABILITY,
            "get_device_properties": lambda *_: properties, "Event": Event, "CUDAGraph": NoGraph, "graph": NoGraph}.items():
        setattr(torch.cuda, name, stand_in)
    folder, torch.Generator, Target.of = Path(tempfile.mkdtemp()), Generator, lambda device: Target("cuda", CAPABILITY, 0)

    def built(library, arch, folder=folder):
        path = folder / f"{library.name}.so"
        path.write_bytes(b"no kernel")
        return build.Built(library, arch, "cpp_extension", path, 0.1, ())

    build.build, build.kernels_for = built, lambda library, index: object()
    launch.launch = Emulator().launch
    check.SMALL, check.WIDE = (18, 384, 128, 16), ((18, 384, 128, 16),)
    bench.LAYERS = {name: (128, 384, kind) for name, (_, _, kind) in bench.LAYERS.items() if name in ("qkv", "fc2")}
    bench.MODULATION, bench.CudaTimer.__init__ = (128, (384, 128)), lambda timer: setattr(timer, "flush", torch.empty(1))
    measure = bench.measure
    bench.measure = lambda tokens, rank, runs, save: measure((18,), 16, 3, save)


if __name__ == "__main__":
    pretend()
    del sys.argv[0]
    sys.path[0] = ""
    for name in [name for name in sys.modules if name.startswith("svdq_pack.svdq")]:     # `python svdq` has these names
        sys.modules[name.removeprefix("svdq_pack.")] = sys.modules[name]
    with CudaIsTheCpu():
        runpy.run_path(str(Path(sys.argv[0]).resolve()), run_name="__main__")
