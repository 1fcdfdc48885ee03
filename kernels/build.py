"""From kernel sources to something that launches: compile, cache, load.

Two routes give the same kernels. `cpp_extension`: torch.utils.cpp_extension.load builds launch.cu with nvcc and the
host compiler. `nvrtc`: NVRTC, which comes with torch, compiles each .cuh to a cubin and the driver loads it; it needs
neither. `kernels_for` takes what is in the cache, else the first that builds; without either it says why, once, and the
torch path serves.

Built binaries lie in the user's cache folder under a name that hashes everything that can change them, each followed by
its own SHA-256 (loaders stop before it). They are written under another name and renamed: nobody sees half a file, two
processes do no harm, and a file that is not whole is built again before anything maps it.

Test: tests/kernels/test_build.py
"""

import atexit
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
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .errors import BuildError

log = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
SOURCES = ("quant_down.cuh", "gemm_w4a4.cuh", "awq_gemv.cuh", "quant_fp8.cuh", "gemm_fp8.cuh")
LOWEST = (8, 0)             # mma.sync m16n8k64 begins here
ABI = 1                     # raise when the meaning of a kernel's arguments changes without its text
ENVIRONMENT = ("CC", "CXX", "CPATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")   # what compilers read
DIGEST = hashlib.sha256().digest_size


def arch_of(capability):
    """The name nvcc gives a compute capability, "sm_86"; None below the lowest the kernels run on. Hopper's wgmma is not in
    sm_90 but in sm_90a, which no other GPU runs."""
    return f"sm_{capability[0]}{capability[1]}{'a' * (capability == (9, 0))}" if capability >= LOWEST else None


# ---- the cache

@cache
def cache_folder():
    """The user's folder for what can be made again, made if need be; if it cannot be written, one of this process."""
    folder = "the user's cache"
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "comfyui-svdq")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except (OSError, RuntimeError) as error:        # RuntimeError: nobody's home
        fallback = Path(tempfile.mkdtemp(prefix="comfyui-svdq-"))       # ours alone: what lies here is executed
        atexit.register(shutil.rmtree, fallback, ignore_errors=True)
        log.warning("SVDQ: the cache folder cannot be used (%s), so kernels are built again at every start, in %s. "
                    "Make %s writable to keep them", error, fallback, folder)
        return fallback


def source_text():
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((*HERE.glob("*.cuh"), HERE / "launch.cu"))}


def key(*parts):
    """A short name for everything that can change a binary: sources, ABI, and whatever the route adds."""
    digest = hashlib.sha256(repr((ABI, source_text(), *parts)).encode())
    return digest.hexdigest()[:20]


def stored(path):
    """The binary that `store` wrote there; None if there is none, or not as it was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    binary, digest = data[:-DIGEST], data[-DIGEST:]
    return binary if binary and hashlib.sha256(binary).digest() == digest else None


def store(path, binary):
    """Write a binary whole or not at all. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        scratch.write_bytes(binary + hashlib.sha256(binary).digest())
        os.replace(scratch, path)
    except OSError:
        if stored(path) is None:                    # Windows: another process made it and has it open
            raise
    finally:
        scratch.unlink(missing_ok=True)


# ---- route 1: nvcc and the host compiler, through torch

def build_extension(arch, folder, may_compile=True):
    """Compile launch.cu for one arch with torch's own extension builder. Returns the path of the shared library.

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
    name = f"svdq_{arch}_" + key("cpp_extension", flags, torch.__version__, ours, sys.platform, platform.machine(),
                                 nvcc, host, [os.environ.get(variable) for variable in ENVIRONMENT])
    final = folder / f"{name}{cpp_extension.LIB_EXT}"
    if stored(final) is None:
        _announce_compiling("launch.cu", arch, "nvcc", may_compile)
        scratch = tempfile.mkdtemp(prefix=f".{name}.", dir=folder)
        try:
            made = cpp_extension.load(name, [str(HERE / "launch.cu")], extra_cuda_cflags=flags, build_directory=scratch,
                                      is_python_module=False, with_cuda=True)
            store(final, Path(made).read_bytes())
        except Exception as error:      # ninja, compilers, linker and loader fail in ways of their own
            raise BuildError(f"{HERE / 'launch.cu'} for {arch}: {_gist(str(error))}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    try:
        ExtensionKernels(final)
    except (OSError, AttributeError) as error:
        final.unlink(missing_ok=True)               # whole, and yet not ours, or made for libraries that have gone
        raise BuildError(f"{final} could not be loaded and was removed: {error}") from error
    return final


def _announce_compiling(source, arch, compiler, may_compile):
    if not may_compile:
        raise BuildError(f"no {source} for {arch} in the cache")
    log.info("SVDQ: compiling %s for %s with %s, once; this may take a minute", source, arch, compiler)


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
        self.library = ctypes.CDLL(str(path))
        self.library.svdq_error.restype = ctypes.c_char_p
        self.library.svdq_launch.argtypes = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint,
                                             ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

    def launch(self, name, grid, block, arguments, stream, shared=0, cluster=1):
        code = self.library.svdq_launch(name.encode(), *grid, block, _addresses(arguments), stream, shared, cluster)
        if code:
            raise RuntimeError(f"{name}: launch failed: {self.library.svdq_error(code).decode()}")


# ---- route 2: NVRTC and the driver

def build_cubins(arch, folder, may_compile=True):
    """Compile every source for one arch with NVRTC, side by side. Returns the paths of the cubins.

    Raises BuildError when NVRTC is missing or refuses, with its log, and as build_extension does.
    """
    nvrtc, sources = load_nvrtc(), source_text()
    if nvrtc is None:
        raise BuildError("no NVRTC library beside torch or on the system")

    def make(name):
        path = folder / f"{Path(name).stem}_{arch}_{key('nvrtc', nvrtc.version, OPTIONS)}.cubin"
        if stored(path) is None:
            _announce_compiling(name, arch, "NVRTC", may_compile)
            store(path, nvrtc.compile(name, sources, arch))
        return path

    with ThreadPoolExecutor(len(SOURCES)) as pool:          # ctypes lets go of the GIL
        return list(pool.map(make, SOURCES))


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
                raise BuildError(f"NVRTC {self.version[0]}.{self.version[1]} refuses {HERE / name} for {arch}:\n"
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

    def __init__(self, paths, device, names=None):
        self.driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self.context = ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.synchronize()                            # makes the device's context current
            self._check("cuCtxGetCurrent", self.driver.cuCtxGetCurrent(ctypes.byref(self.context)))
            modules = [self._load(path) for path in paths]
        self.functions = {name: self._function(modules, name) for name in names or kernel_names()}
        self.allowed = set()                                    # kernels that may have more than 48 KiB of shared memory

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
        self.driver.cuCtxSetCurrent(self.context)               # a thread that has called no CUDA yet has none
        function, addresses = self.functions[name], _addresses(arguments)
        if shared > 48 << 10 and name not in self.allowed:
            self._check(name, self.driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared))
            self.allowed.add(name)
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


def kernel_names():
    """All kernels, as launch.cu lists them."""
    return re.findall(r"\bENTRY\(([a-z]\w+)\)", source_text()["launch.cu"])


def _addresses(arguments):
    """void** over ctypes values, as both CUDA launch calls take them."""
    return (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))


# ---- choosing

@dataclass(frozen=True)
class Built:
    """What building for one arch came to. `path` is a library or a list of cubins; None: neither route works."""
    arch: str
    route: str | None
    path: object
    seconds: float
    reasons: tuple              # why a better route declined

    def load(self, device):
        return ExtensionKernels(self.path) if self.route == "cpp_extension" else CubinKernels(self.path, device)


@cache
def build(arch, folder=None):
    """Kernels for one arch: what either route left in the cache, else built. Once per process, also if it fails. Never
    raises for a missing or failing tool: `reasons` says what went wrong."""
    start = time.perf_counter()
    for may_compile in (False, True):       # a start that had to do without nvcc must not compile again at the next
        reasons = []
        for route, make in (("cpp_extension", build_extension), ("nvrtc", build_cubins)):
            try:
                path = make(arch, folder or cache_folder(), may_compile)
                return Built(arch, route, path, time.perf_counter() - start, tuple(reasons))
            except (BuildError, OSError) as error:
                reasons.append(f"{route}: {error}")
    return Built(arch, None, None, time.perf_counter() - start, tuple(reasons))


NEXT_STEP = ("To have them, install a torch with its CUDA libraries, or a CUDA toolkit of torch's version with a host "
             "compiler and ninja, and start again")
_kernels, _lock = {}, threading.Lock()


def kernels_for(device_index):
    """The kernels of one CUDA device, built if need be; None, said once, where they cannot be had. Never raises."""
    if device_index not in _kernels:            # no lock when there is an answer: torch.compile can read a dict
        with _lock:
            if device_index not in _kernels:
                _kernels[device_index] = _first_kernels(device_index)
    return _kernels[device_index]


def _first_kernels(device_index):
    try:
        capability = torch.cuda.get_device_capability(device_index)
        who = f"cuda:{device_index} ({torch.cuda.get_device_name(device_index)}, sm_{capability[0]}{capability[1]})"
        if torch.version.hip:
            log.info("SVDQ: the kernels are CUDA, %s is not; layers run weight-only", who)
            return None
        arch = arch_of(capability)
        if arch is None:
            log.info("SVDQ: %s lacks the 4-bit MMA the kernels use (sm_80 and later); layers run weight-only", who)
            return None
        built = build(arch)
        if built.route is None:
            log.warning("SVDQ: no kernels for %s, layers run weight-only. %s. %s", who, "; ".join(built.reasons),
                        NEXT_STEP)
            return None
        kernels = built.load(device_index)
        log.info("SVDQ: kernels for %s by %s, ready in %.1f s%s", who, built.route, built.seconds,
                 "".join(f"; not {reason}" for reason in built.reasons))
        return kernels
    except Exception as error:                  # a driver may fail in its own ways; the torch path still serves
        log.warning("SVDQ: no kernels for cuda:%s, layers run weight-only. %s. Update the driver: it may be older than "
                    "torch's CUDA", device_index, error)
        return None
