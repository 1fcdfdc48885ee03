"""From kernel sources to something that launches: compile, cache, load.

A variant brings a Library: its sources and the names of their kernels. Libraries are built one by one, each for the archs
that its variant is made for, so that one can hold what another arch cannot compile, and one that fails costs no other.

Two routes give the same CUDA kernels. `cpp_extension`: torch.utils.cpp_extension.load builds the sources and launch.cuh with
nvcc and the host compiler. `nvrtc`: NVRTC, which comes with torch, compiles each source to a cubin and the driver loads
it; it needs neither. A CPULibrary is one C++ file with plain C functions and has one route, `host compiler`: g++ or clang++ by
itself, as nothing of torch's builder (its headers, ninja, setuptools) is needed. `kernels_for` takes what is in the cache, else
the first that builds; without any it says why, once, and the torch path serves.

Built binaries lie in the user's cache (cache.py) under a name that hashes everything that can change them.

Test: tests/kernels/test_build.py
"""

import ctypes
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from .cache import cache_folder, folder_to_build_in, load_library, remove, scratch_folder, store, stored
from .errors import BuildError, printable

log = logging.getLogger(__name__)
CUDA = Path(__file__).resolve().parent / "cuda"
CPU = CUDA.with_name("cpu")
ABI = 1                     # raise when the meaning of a kernel's arguments changes without its text
ENVIRONMENT = ("CC", "CXX", "CPATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")   # what compilers read


@dataclass(frozen=True, eq=False)
class Library:
    """Kernels that are compiled and loaded together.

    name       of the binaries, and for people
    sources    {file of cuda/: names of its kernels}
    specific   whether they use instructions of one generation of GPUs only ("sm_90a"), as wgmma is
    """
    name: str
    sources: dict
    specific: bool = False
    missing: ClassVar[str] = ("To have them, install a torch with its CUDA libraries, or a CUDA toolkit of torch's version "
                              "with a host compiler and ninja, and start again")

    def __deepcopy__(self, memo):
        return self                 # known by its identity

    @property
    def kernels(self):
        return [name for names in self.sources.values() for name in names]

    def source_of(self, kernel):
        """The path of the file that holds a kernel."""
        for file, names in self.sources.items():
            if kernel in names:
                return CUDA / file
        raise ValueError(f"{kernel}: not a kernel of {self.name}, but {', '.join(self.kernels)}")

    def arch(self, capability):
        """The name nvcc gives a compute capability for these kernels: "sm_86", "sm_90a"."""
        return f"sm_{capability[0]}{capability[1]}{'a' * self.specific}"

    def texts(self):
        """{file: text} of the sources and of all that they include."""
        texts, waiting = {}, list(self.sources)
        while waiting:
            name = waiting.pop()
            if name not in texts:
                texts[name] = (CUDA / name).read_text(encoding="utf-8")
                waiting += re.findall(r'^\s*#include "(.+?)"', texts[name], re.M)
        return dict(sorted(texts.items()))

    def routes(self):
        return ("cpp_extension", build_extension), ("nvrtc", build_cubins)

    def place(self, device_index):
        """(the arch of a CUDA device for these kernels, the device in words)"""
        capability = torch.cuda.get_device_capability(device_index)
        return self.arch(capability), (f"cuda:{device_index} ({torch.cuda.get_device_name(device_index)}, "
                                       f"sm_{capability[0]}{capability[1]})")

    def launcher(self):
        """The text that nvcc compiles: sources, the table of kernels, launch.cuh."""
        entries = "".join(f'    {{"{name}", (const void*){name}}},\n' for name in self.kernels)
        includes = "".join(f'#include "{file}"\n' for file in self.sources)
        table = f"static const struct {{ const char* name; const void* kernel; }} TABLE[] = {{\n{entries}}};\n"
        return f'{includes}\n{table}\n#include "launch.cuh"\n'


@dataclass(frozen=True, eq=False)
class CPULibrary:
    """Plain C functions for the CPU in one C++ file, which chooses among instruction sets as it runs.

    name       of the binary, and for people
    source     the file of cpu/ that includes the others
    """
    name: str
    source: str
    missing: ClassVar[str] = ("To have them, install g++ or clang++, see that CXX is unset or names one of them, and start "
                              "again")

    def __deepcopy__(self, memo):
        return self

    def arch(self, capability=None):
        """As the system calls the machine: "x86_64"."""
        return platform.machine().lower()

    def texts(self):
        """{file: text} of all files of cpu/."""
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(CPU.glob("*.[ch]pp"))}

    def routes(self):
        return ("host compiler", build_host),

    def place(self, device_index=None):
        return self.arch(), f"the CPU ({self.arch()})"


def key(library, *parts):
    """A short name for everything that can change a library's binaries: sources, ABI, and whatever the route adds."""
    digest = hashlib.sha256(repr((ABI, library.texts(), *parts)).encode())
    return digest.hexdigest()[:20]


# ---- route 1: nvcc and the host compiler, through torch

def build_extension(library, arch, folder, may_compile=True):
    """Compile a library for one arch with torch's own extension builder. Returns the path of the shared library.

    Raises BuildError with the compiler's words when nvcc, the host compiler or ninja is missing or fails, and when
    there is nothing in the cache and it must not compile.
    """
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        raise BuildError("no CUDA toolkit: nvcc is not on the PATH and CUDA_HOME is not set")
    nvcc = _version(os.environ.get("PYTORCH_NVCC") or os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))
    release, ours = re.search(r"release (\d+)", nvcc), torch.version.cuda
    if release and ours and release[1] != ours.split(".")[0]:
        raise BuildError(f"nvcc is of CUDA {release[1]}, torch of CUDA {ours}; set CUDA_HOME to a toolkit like torch's")
    host = "" if sys.platform == "win32" else _version(*shlex.split(cpp_extension.get_cxx_compiler()))
    flags = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}", "-O3"]
    launcher = library.launcher()
    name = f"svdq_{library.name}_{arch}_" + key(
        library, "cpp_extension", launcher, (CUDA / "launch.cuh").read_text(encoding="utf-8"), flags, torch.__version__, ours,
        sys.platform, platform.machine(), nvcc, host, [os.environ.get(variable) for variable in ENVIRONMENT])
    final = folder / f"{name}{cpp_extension.LIB_EXT}"
    if stored(final) is None:
        _announce_compiling(library.name, arch, "nvcc", may_compile)
        try:
            with scratch_folder(folder, name) as scratch:
                source = scratch / f"{library.name}.cu"
                source.write_text(launcher, encoding="utf-8")
                # "standalone" makes no program, as it has SHARED_FLAG, but keeps torch from loading it by its path
                made = cpp_extension.load(name, [str(source)], extra_cuda_cflags=flags, extra_include_paths=[str(CUDA)],
                                          extra_ldflags=[cpp_extension.SHARED_FLAG], build_directory=str(scratch),
                                          is_python_module=False, is_standalone=True, with_cuda=True)
                store(final, Path(made).read_bytes())
        except Exception as error:      # ninja, compilers and linker fail in ways of their own
            files = ", ".join(library.sources)
            raise BuildError(f"{library.name} ({files} of {CUDA}) for {arch}: {_gist(str(error))}") from error
    try:
        ExtensionKernels(final)
    except (OSError, AttributeError) as error:
        remove(final)                               # whole, and yet not ours, or made for libraries that have gone
        raise BuildError(f"{final} could not be loaded and was removed: {error}") from error
    return final


def _announce_compiling(what, arch, compiler, may_compile):
    if not may_compile:
        raise BuildError(f"no {what} for {arch} in the cache")
    text = f"compiling {what} for {arch} with {compiler}, once; this may take a minute"
    log.info("SVDQ: %s", text)
    for say in list(_listeners):
        say(text)


_listeners = []


@contextmanager
def telling(say):
    """say(text), too, before anything is compiled inside the block, on whatever thread."""
    _listeners.append(say)
    try:
        yield
    finally:
        _listeners.remove(say)


@cache
def _version(*command):
    """What a compiler says of itself."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BuildError(f"{' '.join(command)} does not run: {error}") from error


def _gist(text, most=12):
    """The lines of a long log that name an error, or its last ones."""
    lines = text.strip().splitlines()
    telling = [line for line in lines if re.search(r"error|fatal|cannot|not found", line, re.I)]
    return "\n".join((telling or lines[-most:])[:most])


class ExtensionKernels:
    """Kernels of a library that build_extension made."""
    route = "cpp_extension"

    def __init__(self, path):
        self.library = load_library(path)
        self.library.svdq_error.restype = ctypes.c_char_p
        self.library.svdq_launch.argtypes = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint,
                                             ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

    def launch(self, name, grid, block, arguments, stream, shared=0, cluster=1):
        code = self.library.svdq_launch(name.encode(), *grid, block, _addresses(arguments), stream, shared, cluster)
        if code:
            raise RuntimeError(f"{name}: launch failed: {self.library.svdq_error(code).decode()}")


# ---- route 2: NVRTC and the driver

def build_cubins(library, arch, folder, may_compile=True):
    """Compile a library's sources for one arch with NVRTC, side by side. Returns the paths of the cubins.

    Raises BuildError when NVRTC is missing or refuses, with its log, and as build_extension does.
    """
    nvrtc, texts = load_nvrtc(), library.texts()
    if nvrtc is None:
        raise BuildError("no NVRTC library beside torch or on the system")

    def make(name):
        path = folder / f"{Path(name).stem}_{arch}_{key(library, 'nvrtc', nvrtc.version, OPTIONS)}.cubin"
        if stored(path) is None:
            _announce_compiling(name, arch, "NVRTC", may_compile)
            store(path, nvrtc.compile(name, texts, arch))
        return path

    with ThreadPoolExecutor(len(library.sources)) as pool:          # ctypes lets go of the GIL
        return list(pool.map(make, library.sources))


OPTIONS = (b"--std=c++17",)


class Nvrtc:
    """The few calls of libnvrtc that are needed."""

    def __init__(self, library):
        self.library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = major.value, minor.value

    def compile(self, name, sources, arch):
        """The cubin of one source, bytes."""
        headers = {other: text for other, text in sources.items() if other != name}
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(other.encode() for other in headers))
        program = ctypes.c_void_p()
        self._check(self.library.nvrtcCreateProgram(ctypes.byref(program), sources[name].encode(), name.encode(),
                                                    len(headers), texts, names))
        try:
            options = (ctypes.c_char_p * (1 + len(OPTIONS)))(f"--gpu-architecture={arch}".encode(), *OPTIONS)
            if self.library.nvrtcCompileProgram(program, len(options), options):
                raise BuildError(f"NVRTC {self.version[0]}.{self.version[1]} refuses {CUDA / name} for {arch}:\n"
                                 + self._get(program, "ProgramLog").decode(errors="replace").strip("\0\n"))
            return self._get(program, "CUBIN")
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program, what):
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, code):
        if code:
            raise BuildError(f"NVRTC: {self.library.nvrtcGetErrorString(code).decode()}")


@cache
def load_nvrtc():
    """libnvrtc: the copy torch uses first, then the system's. None when there is none."""
    for path in nvrtc_candidates():
        try:
            for builtins in sorted(Path(path).parent.glob("*nvrtc-builtins*")) if Path(path).is_absolute() else ():
                if ".alt." not in builtins.name:
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)     # it looks for this one by its bare name
            return Nvrtc(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
        except (OSError, AttributeError, BuildError) as error:
            log.debug("SVDQ: %s: %s", path, error)
    return None


def nvrtc_candidates():
    """Where libnvrtc may be, best first."""
    major, lib = (torch.version.cuda or "13").split(".")[0], Path(torch.__file__).parent / "lib"
    if sys.platform == "win32":
        yield from sorted(lib.glob("nvrtc64_*_0.dll"))
        yield f"nvrtc64_{major}0_0.dll"
        return
    for package in (f"nvidia-cuda-nvrtc-cu{major}", "nvidia-cuda-nvrtc"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from (Path(file.locate()) for file in files if file.name.startswith("libnvrtc.so"))
    yield from (path for path in sorted(lib.glob("libnvrtc*.so*")) if "builtins" not in path.name)
    yield f"libnvrtc.so.{major}"
    yield Path(sys.prefix, "lib", f"libnvrtc.so.{major}")       # conda


MAX_DYNAMIC_SHARED, CLUSTER_DIMENSION = 8, 4        # CUfunction_attribute, CUlaunchAttributeID of cuda.h


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: the value is a union of 64 bytes."""
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig"""
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)]


class CubinKernels:
    """Kernels of cubins, launched through the CUDA driver. A module belongs to a context, so this serves one device."""
    route = "nvrtc"

    def __init__(self, paths, device, names):
        self.driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self.context = ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.synchronize()                            # makes the device's context current
            self._check("cuCtxGetCurrent", self.driver.cuCtxGetCurrent(ctypes.byref(self.context)))
            modules = [self._load(path) for path in paths]
        self.functions = {name: self._function(modules, name) for name in names}
        self.allowed = {}       # the most shared memory, in bytes, of kernels that may have more than 48 KiB

    def _load(self, path):
        module, cubin = ctypes.c_void_p(), stored(path)
        if cubin is None:
            raise BuildError(f"{path} changed while it was being loaded; start again")
        self._check(path, self.driver.cuModuleLoadData(ctypes.byref(module), cubin))
        return module

    def _function(self, modules, name):
        function = ctypes.c_void_p()
        if all(self.driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()) for module in modules):
            raise BuildError(f"{name}: not in the built kernels")
        return function

    def launch(self, name, grid, block, arguments, stream, shared=0, cluster=1):
        if name not in self.functions:
            raise RuntimeError(f"{name}: launch failed: no kernel of this name is in the library")
        self.driver.cuCtxSetCurrent(self.context)               # a thread that has called no CUDA yet has none
        function, addresses = self.functions[name], _addresses(arguments)
        if shared > self.allowed.get(name, 48 << 10):
            self._check(name, self.driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared))
            self.allowed[name] = shared
        if cluster == 1:
            code = self.driver.cuLaunchKernel(function, *grid, 1, block, 1, 1, shared, ctypes.c_void_p(stream), addresses,
                                              None)
        else:
            attribute = _Attribute(id=CLUSTER_DIMENSION, value=(ctypes.c_uint * 16)(cluster, 1, 1))
            config = _Config((*grid, 1), (block, 1, 1), shared, stream, ctypes.pointer(attribute), 1)
            code = self.driver.cuLaunchKernelEx(ctypes.byref(config), function, addresses, None)
        self._check(name, code)

    def _check(self, what, code):
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: CUDA driver says {(text.value or str(code).encode()).decode()}")


def _addresses(arguments):
    """void** over ctypes values, as both CUDA launch calls take them."""
    return (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))


# ---- the CPU: the host compiler

HOST_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fvisibility=hidden",
              *(("-static",) if sys.platform == "win32" else ("-fPIC", "-pthread")))     # what is rounded is said in the text


def build_host(library, arch, folder, may_compile=True):
    """Compile a CPULibrary. Returns the path of the shared library. Raises BuildError with the compiler's words, and as
    build_extension does."""
    compiler = host_compiler()
    name = f"svdq_{library.name}_cpu_{arch}_" + key(
        library, "host", HOST_FLAGS, _version(*compiler), sys.platform,
        [os.environ.get(variable) for variable in ENVIRONMENT])
    final = folder / f"{name}.{'pyd' if sys.platform == 'win32' else 'so'}"
    if stored(final) is None:
        _announce_compiling(f"{library.name} kernels", arch, Path(compiler[0]).stem, may_compile)
        with scratch_folder(folder, name) as scratch:
            made = scratch / final.name
            try:
                subprocess.run([*compiler, *HOST_FLAGS, str(CPU / library.source), "-o", str(made),
                                *(["-ldl"] if sys.platform == "linux" else [])],
                               capture_output=True, text=True, errors="replace", check=True, timeout=900)
            except subprocess.CalledProcessError as error:
                raise BuildError(f"{library.name} ({CPU / library.source}): {_gist(error.stderr or str(error))}") from error
            except (OSError, subprocess.SubprocessError) as error:
                raise BuildError(f"{library.name} ({CPU / library.source}): {error}") from error
            if not made.is_file():
                raise BuildError(f"{library.name} ({CPU / library.source}): {' '.join(compiler)} wrote nothing")
            store(final, made.read_bytes())
    try:
        CPUKernels(final)
    except (OSError, AttributeError) as error:
        remove(final)
        raise BuildError(f"{final} could not be loaded and was removed: {error}") from error
    return final


def host_compiler():
    """The command of the compiler: CXX, else the first there is. Raises BuildError without one."""
    named = os.environ.get("CXX", "").strip()
    try:
        found = [named] if shutil.which(named) else shlex.split(named)          # a path may hold spaces
    except ValueError as error:
        raise BuildError(f"CXX is {named!r}, no command: {error}") from error
    if not found and sys.platform == "darwin" and subprocess.run(["xcode-select", "-p"], capture_output=True).returncode:
        raise BuildError("no C++ compiler: run xcode-select --install")         # g++ would ask for it in a window
    found = found or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
    if not found:
        raise BuildError("no C++ compiler: neither g++ nor clang++ is on the PATH, and CXX is not set")
    return found


class CPUKernels:
    """The functions of a CPULibrary. A body is one set of instructions, known by its number; the last that runs is the best.

    bodies    {name: number} of those that this CPU runs, the best one last
    body      the one that serves
    """
    route = "host compiler"

    def __init__(self, path):
        self.library = load_library(path)
        self.library.svdq_body.restype = ctypes.c_char_p
        names, number = {}, 0
        while (name := self.library.svdq_body(number)) is not None:
            names[name.decode()], number = number, number + 1
        self.compiled = tuple(names)
        self.bodies = {name: number for name, number in names.items() if self.library.svdq_runs(number)}
        self.body = list(self.bodies)[-1]

    def call(self, function, job, body=None):
        """Run a function on a job, a ctypes.Structure of its arguments. Raises MemoryError."""
        if getattr(self.library, f"svdq_{function}")(self.bodies[body or self.body], ctypes.byref(job)):
            raise MemoryError(f"svdq_{function}: no memory for {type(job).__name__}")


# ---- choosing

@dataclass(frozen=True)
class Built:
    """What building a library for one arch came to. `path` is a shared library or a list of cubins; None: no route works."""
    library: Library
    arch: str
    route: str | None
    path: object
    seconds: float
    reasons: tuple              # why a better route declined

    @property
    def paths(self):
        return self.path if isinstance(self.path, list) else [self.path] if self.path else []

    def load(self, device):
        if self.route == CPUKernels.route:
            return CPUKernels(self.path)
        if self.route == "cpp_extension":
            return ExtensionKernels(self.path)
        return CubinKernels(self.path, device, self.library.kernels)


@cache
def build(library, arch, folder=None):
    """A library for one arch: what either route left in the cache, else built. Once per process, also if it fails. Never
    raises for a missing or failing tool: `reasons` says what went wrong."""
    start = time.perf_counter()
    for may_compile in (False, True):       # a start that had to do without nvcc must not compile again at the next
        reasons = []
        for route, make in library.routes():
            try:
                place = folder or (folder_to_build_in() if may_compile else cache_folder())
                path = make(library, arch, place, may_compile)
                return Built(library, arch, route, path, time.perf_counter() - start, tuple(reasons))
            except (BuildError, OSError, UnicodeError) as error:
                reasons.append(f"{route}: {printable(error, lines=True)}")
    return Built(library, arch, None, None, time.perf_counter() - start, tuple(reasons))


_kernels, _lock = {}, threading.Lock()


def kernels_for(library, device_index):
    """A library's kernels on one CUDA device (None: the CPU), built if need be; None, said once, where they cannot be had.
    Never raises."""
    place = library, device_index
    if place not in _kernels:                   # no lock when there is an answer: torch.compile can read a dict
        with _lock:
            if place not in _kernels:
                _kernels[place] = _first_kernels(library, device_index)
    return _kernels[place]


def _first_kernels(library, device_index):
    try:
        arch, where = library.place(device_index)
        who = f"{library.name} on {where}"
        built = build(library, arch)
        if built.route is None:
            log.warning("SVDQ: no kernels %s, another path serves. %s. %s", who, "; ".join(built.reasons).rstrip("."),
                        library.missing)
            return None
        kernels = built.load(device_index)
        log.info("SVDQ: kernels %s by %s%s, ready in %.1f s%s", who, built.route,
                 f" for {kernels.body}" if isinstance(kernels, CPUKernels) else "", built.seconds,
                 "".join(f"; not {reason}" for reason in built.reasons))
        return kernels
    except Exception as error:                  # a driver may fail in its own ways; another path still serves
        log.warning("SVDQ: no kernels %s on %s, another path serves. %s%s", library.name,
                    "the CPU" if device_index is None else f"cuda:{device_index}", error,
                    "" if device_index is None else ". Update the driver: it may be older than torch's CUDA")
        return None
