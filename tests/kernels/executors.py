"""Who runs the kernels that a test launches: the g++ emulator, the interpreter of nvcc's PTX, or a GPU.

    @on("tokens, rank", emulator=[(1, 0), (65, 32)], interpreter=[(17, 16)], gpu=[(4608, 32)])
    def test_linear(executor, tokens, rank):
        y = operator(executor.put(x), ...)              CPU tensors stay where they are or go to the GPU

An executor stands in the place of kernels.launch.launch while the test runs; on a GPU it passes every launch on. So a test
is the same on all three, and all of the Python between it and the kernel runs as it does for a user.

What a GPU alone can do (graphs, streams, a second one) is rehearsed by the emulator with stand-ins for torch.cuda, so that
no test sees a real card first: `on` adds that by itself, test_rehearsal.py looks that it happened.

The fixture `executor` is in conftest.py. A test file says in VARIANT whose kernels it tests, which skips its tests on other
GPUs, and in GPU_SLACK how far fp32 sums of a tensor core may be off.
"""

import functools
import re
import shutil
import types
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdq_pack.svdq.kernels import build as kernel_build
from svdq_pack.svdq.kernels import epilogues, launch, registry
from svdq_pack.svdq.kernels.build import CUDA, Library
from svdq_pack.svdq.kernels.launch import Structs, Updated, Written
from svdq_pack.svdq.kernels.prologues import Modulated
from svdq_pack.svdq.kernels.variant import Target, short, sm
from svdq_pack.svdq.kernels.weights import Weight

from . import toolchain
from .simulators.emulator import build as emulator
from .simulators.ptx import interpreter

PASSED, LEFT_OUT = pytest.StashKey(), pytest.StashKey()      # of pytest's config: {(file, test, executor)}, {(file, test)}
FP32 = 3e-7             # per sum of absolute terms: fp32 accumulation, measured below 1e-7
UNWRITTEN = 0x7e        # bytes of an output before its launch: what a kernel leaves out shows


def on(names="", **cases):
    """Parametrises a test by executor, and by cases of each: tuples of the values of `names`, True for one without values.

    A test for "gpu" that has no cases for "emulator" is rehearsed with those of "rehearsal", else with those of "gpu".
    """
    assert cases.keys() <= EXECUTORS.keys(), f"on: {', '.join(cases)}. Executors are {', '.join(EXECUTORS)}."
    if "gpu" in cases and "emulator" not in cases:
        cases.setdefault("rehearsal", cases["gpu"])
    names = ["executor", *filter(None, re.split(r",\s*", names))]
    rows = [pytest.param(executor, *(case if isinstance(case, tuple) else (case,)),
                         marks=pytest.mark.gpu if executor == "gpu" else ())
            for executor, given in cases.items() for case in ([()] if given is True else given)]
    return pytest.mark.parametrize(names, rows, indirect=["executor"],
                                   ids=lambda value: short(value) if isinstance(value, torch.dtype) else None)


@dataclass(frozen=True, eq=False)
class TextLibrary(Library):
    """A Library of texts in the place of files of cuda/: {file: text}, which include nothing but ptx.cuh."""
    own: dict = None

    def texts(self):
        return {**self.own, "ptx.cuh": (CUDA / "ptx.cuh").read_text(encoding="utf-8")}

    def launcher(self):
        launcher = super().launcher()
        for file, text in self.own.items():
            launcher = launcher.replace(f'#include "{file}"\n', text)
        return launcher


class Executor:
    """What all have in common. This class alone runs nothing.

    launched   names of the kernels, in the order of their launches
    order      of threads and CTAs in a simulator: "forward", "reverse", or a seed
    sources    {file of cuda/: text to run instead}, simulators only
    fp8_bits   fraction bits that a simulated FP8 product and sum keep, as Hopper is said to keep 13; None: all
    ctas       most CTAs of a persistent kernel
    slack      how far fp32 sums may be off, in sums of absolute terms
    ties       share of codes that may round the other way: a simulator's division is exact
    tanh       how far the kernels' tanh may be off, relative
    """
    device, devices, target, ties, tanh = "cpu", ("cpu", "cpu"), None, 0.0, 0.0

    def __init__(self):
        self.launched, self.order, self.sources = [], "forward", {}
        self.fp8_bits, self.ctas, self.slack = None, None, FP32

    def install(self, monkeypatch):
        """Stands in the place of kernels.launch.launch until the monkeypatch is undone."""
        processors = launch.processors
        monkeypatch.setattr(launch, "launch", self.launch)
        monkeypatch.setattr(launch, "processors", lambda device: self.ctas or processors(device))

    @contextmanager
    def set(self, **given):
        """Within the block: other values of the attributes."""
        before = {name: getattr(self, name) for name in given}
        vars(self).update(given)
        try:
            yield self
        finally:
            vars(self).update(before)

    def put(self, thing):
        """A tensor, weight or epilogue, or a list of them, on the device where kernels run: aligned as a GPU's allocator does,
        rows as far apart as they were."""
        if isinstance(thing, (list, tuple)):
            return type(thing)(map(self.put, thing))
        if isinstance(thing, (Weight, Modulated, *epilogues.ALL)):
            return replace(thing, **{field: self.put(value) for field, value in vars(thing).items()})
        if not isinstance(thing, torch.Tensor) or thing.device.type == self.device and not thing.data_ptr() % 16:
            return thing
        there = flat(thing).to(self.device, copy=True)
        return there if thing.is_contiguous() else there.as_strided(thing.shape, thing.stride())

    def build(self, library, folder):
        """Makes the kernels of a TextLibrary ready for launches."""

    def launch(self, library, like, name, grid, block, arguments, shared=0, cluster=1):
        """In the place of kernels.launch.launch."""
        self.launched.append(name)
        self.run(library, like, name, grid, block, arguments, shared, cluster)


class Simulator(Executor):
    """An executor on the CPU. Of the arguments it knows from the kernel's text which ones the kernel only reads.

    Matrices whose rows lie apart keep what lies between them.
    """

    def source(self, library, name):
        path = library.source_of(name)
        own = library.own if isinstance(library, TextLibrary) else self.sources
        return own.get(path.name, path)

    def arguments(self, source, name, arguments):
        """Launch arguments as the simulator takes them."""
        constant = constants(source, name)
        inputs = {argument.data_ptr() for argument, is_constant in zip(arguments, constant, strict=True)
                  if is_constant and isinstance(argument, torch.Tensor)}
        for argument, is_constant in zip(arguments, constant):
            if isinstance(argument, Structs):
                yield self.table([[self.field(field) for field in row] for row in argument.rows])
            elif isinstance(argument, Updated):
                yield self.output(argument.tensor, True)
            elif not isinstance(argument, torch.Tensor):
                yield argument
            elif is_constant:
                yield self.read(argument)
            else:
                if argument.data_ptr() not in inputs and argument.numel():
                    argument.view(torch.uint8).fill_(UNWRITTEN)
                yield self.output(argument, False)

    def read(self, tensor):
        """An input; of a wider tensor a copy: another argument may be other columns of it."""
        return self.input(tensor if tensor.is_contiguous() else flat(tensor).clone())

    def field(self, value):
        """A member of a struct, of launch.Structs."""
        if isinstance(value, Written):
            if value.tensor.numel():
                value.tensor.view(torch.uint8).fill_(UNWRITTEN)
            return self.written(value.tensor)
        return self.read(value) if isinstance(value, torch.Tensor) else value or 0


class Emulator(Simulator):
    """The kernels' text compiled by g++: fast, and sees every race and every access outside."""

    def __init__(self, variant=None, slack=FP32):
        super().__init__()
        if not shutil.which("g++"):
            pytest.skip("no g++")

    def run(self, library, like, name, grid, block, arguments, shared, cluster):
        source = self.source(library, name)
        emulator.load(source).launch(name, grid, block, shared, list(self.arguments(source, name, arguments)),
                                     order=self.order, cluster=cluster, fp8_bits=self.fp8_bits or 0)

    def input(self, tensor):
        return tensor

    def output(self, rows, is_read):
        return emulator.InOut(flat(rows)) if is_read or not rows.is_contiguous() else rows

    def written(self, tensor):
        return emulator.Out(tensor)

    def table(self, rows):
        return emulator.Rows(rows)


class Interpreter(Simulator):
    """The PTX that nvcc made of the text, for the first arch of its variant: inline assembly included, and slow."""

    def __init__(self, variant=None, slack=FP32):
        super().__init__()
        try:
            toolchain.nvcc()
        except toolchain.Missing as missing:
            pytest.skip(str(missing))

    def run(self, library, like, name, grid, block, arguments, shared, cluster):
        source = self.source(library, name)
        given = [0 if argument is None else argument for argument in self.arguments(source, name, arguments)]
        module(source, library.arch(lowest(library))).launch(name, grid, block, shared, given, self.order, cluster=cluster,
                                                             fp8_bits=self.fp8_bits)

    def input(self, tensor):
        array = self.output(tensor, False)
        if tensor.numel():
            array.flags.writeable = False
        return array

    def output(self, rows, is_read):
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        return flat(rows).view(integers[rows.element_size()]).numpy() if rows.numel() else 0

    def written(self, tensor):
        return self.output(tensor, False)

    def table(self, rows):
        return [member for row in rows for member in row]


@functools.cache
def module(source, arch):
    return interpreter.Module(toolchain.ptx(source, arch))


class Gpu(Executor):
    """The GPU itself: launches are only noted."""
    device, ties, tanh = "cuda", 1e-4, 2.0**-11

    def __init__(self, variant=None, slack=FP32):
        super().__init__()
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU")
        self.slack, self.target, self.real = slack, Target.of("cuda"), launch.launch
        self.devices = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        _, first, last = variant.device if variant is not None and variant.device else ("cuda", (0, 0), (99, 0))
        if not first <= self.target.capability <= last:
            span = sm(first) + f" to {sm(last)}" * (first != last)
            pytest.skip(f"GPU is {sm(self.target.capability)}, kernels are for {span}")

    def run(self, library, like, name, grid, block, arguments, shared, cluster):
        if self.sources:
            raise ValueError(f"{name}: a GPU runs the kernels of this checkout, not other texts.")
        self.real(library, like, name, grid, block, arguments, shared, cluster)

    def build(self, library, folder):
        if kernel_build.load_nvrtc() is None:
            pytest.skip("no NVRTC")
        arch = library.arch(self.target.capability)
        built = kernel_build.Built(library, arch, "nvrtc", kernel_build.build_cubins(library, arch, folder), 0.0, ())
        kernel_build._kernels[library, self.target.index] = built.load(self.target.index)

    def compiler(self, mode):
        """Arguments of torch.compile."""
        return {"mode": mode}


class Rehearsal(Emulator):
    """The emulator, with stand-ins for what a test takes from torch.cuda and for builds of libraries."""

    def __init__(self, variant=None, slack=FP32):
        super().__init__()
        self.target = Target("cuda", variant.device[1]) if variant is not None and variant.device else Target("cpu")

    def install(self, monkeypatch):
        super().install(monkeypatch)
        stand_ins = {torch.cuda: dict(CUDAGraph=RecordedGraph, graph=RecordedGraph.recording, synchronize=lambda: None,
                                      Stream=lambda: types.SimpleNamespace(synchronize=lambda: None),
                                      stream=nullcontext, device=nullcontext, _sleep=lambda cycles: None),
                     torch.Tensor: dict(pin_memory=lambda tensor: tensor),
                     Target: dict(of=lambda device: self.target),
                     kernel_build: dict(build_extension=lambda library, arch, folder: folder / library.name,
                                        build_cubins=lambda library, arch, folder: [folder / library.name]),
                     kernel_build.Built: dict(load=lambda built, device: built)}
        for owner, replaced in stand_ins.items():
            for name, stand_in in replaced.items():
                monkeypatch.setattr(owner, name, stand_in)

    def compiler(self, mode):
        return {"backend": "aot_eager"}


class RecordedGraph(TorchDispatchMode):
    """What stands in for a CUDA graph: the operators that ran while it recorded; `replay` runs them on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def recording(self):
        return self

    def __torch_dispatch__(self, function, kinds, arguments=(), more=None):
        results = function(*arguments, **(more or {}))
        self.calls.append((function, arguments, more or {}, results))
        return results

    def replay(self):
        for function, arguments, more, results in self.calls:
            again = function(*arguments, **more)
            for new, old in zip(tree_leaves(again), tree_leaves(results), strict=True):
                if isinstance(old, torch.Tensor) and new is not old:
                    old.copy_(new)


EXECUTORS = {"emulator": Emulator, "interpreter": Interpreter, "gpu": Gpu, "rehearsal": Rehearsal}


def lowest(library):
    """The first compute capability that the kernels of a library, or some of them, are made for."""
    return min(variant.device[1] for variant in registry.VARIANTS if getattr(variant.library, "name", None) == library.name)


def flat(rows):
    """The memory from the first to the last element of rows that lie apart; rows that do not, as they are."""
    if rows.is_contiguous():
        return rows
    return rows.as_strided((1 + sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride())),), (1,))


@functools.cache
def constants(source, kernel):
    """Which arguments a kernel does not write to, by its text: a path, or the text itself."""
    text = _with_includes(source.read_text() if isinstance(source, Path) else source).replace("\\\n", "\n")
    found = re.search(rf"\b(?:NAME|{kernel})\(([^{{;]*?)\)\s*\{{", text)
    if not found:
        raise ValueError(f"{kernel}: its file has no `{kernel}(...) {{`, nor a macro with `NAME(...) {{`, where a simulator "
                         "reads which arguments are const. Write it in one of these forms.")
    parameters, lists = found[1], dict(re.findall(r"#define (\w+_PARAMETERS)\b((?:[^\n]*\n(?=    ))*[^\n]*)", text))
    while names := [name for name in lists if name in parameters]:
        parameters = parameters.replace(names[0], lists[names[0]])
    return [bool(re.match(r"\s*const\b", parameter)) or "*" not in parameter for parameter in parameters.split(",")]


def _with_includes(text):
    return re.sub(r'^#include "(\w+\.cuh)"$', lambda match: _with_includes((CUDA / match[1]).read_text()), text, flags=re.M)
