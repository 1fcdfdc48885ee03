"""Compile, cache, choose: with compilers that only pretend, and with the real ones where they are."""

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from svdq_pack.kernels import build
from svdq_pack.kernels.errors import BuildError
from svdq_pack.tests.kernels import toolchain
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
needs_nvrtc = pytest.mark.skipif(build.load_nvrtc() is None, reason="no NVRTC library beside torch or on the system")

# Stands for launch.cu: the first argument is the error code that comes back.
LIBRARY = """
int svdq_launch(const char* name, unsigned x, unsigned y, unsigned block, void** args, void* stream) {
    return *(int*)args[0];
}
const char* svdq_error(int code) { return "the stub says no"; }
"""
ELF = b"\x7fELF of "


def pretend_toolkit(folder, patch, nvcc="Cuda compilation tools, release 13.0, V13.0.88"):
    """A CUDA_HOME in `folder` and a cpp_extension.load that compiles LIBRARY instead. Returns the list of its calls."""
    calls = []

    def load(name, sources, *, extra_cuda_cflags, build_directory, is_python_module, with_cuda):
        calls.append((name, sources, extra_cuda_cflags))
        path = Path(build_directory, name + cpp_extension.LIB_EXT)
        subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=LIBRARY, text=True, check=True)
        return str(path)

    script = Path(folder, "bin", "nvcc")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!/bin/sh\necho '{nvcc}'\n")
    script.chmod(0o755)
    build._version.cache_clear()
    patch(cpp_extension, "CUDA_HOME", str(folder))
    patch(cpp_extension, "load", load)
    patch(torch.version, "cuda", "13.0")
    return calls


def empty_library(path):
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", path], input="", text=True, check=True)
    return path


class PretendNvrtc:
    version = 13, 0

    def __init__(self):
        self.calls = []

    def compile(self, name, sources, arch):
        self.calls.append((name, arch))
        return ELF + f"{name} {arch}".encode()


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    yield pretend_toolkit(tmp_path / "cuda", monkeypatch.setattr)
    build._version.cache_clear()


@pytest.fixture
def nvrtc(monkeypatch):
    pretended = PretendNvrtc()
    monkeypatch.setattr(build, "load_nvrtc", lambda: pretended)
    return pretended


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Nothing of one test is known to the next."""
    monkeypatch.setattr(build, "_kernels", {})
    for cached in (build.build, build.cache_folder):
        cached.cache_clear()
    yield
    for cached in (build.build, build.cache_folder):
        cached.cache_clear()


# Names

@pytest.mark.parametrize("capability, arch", [
    ((7, 5), None), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_87"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"),
    ((10, 3), "sm_103"), ((12, 0), "sm_120"), ((99, 1), "sm_991")])
def test_arch(capability, arch):
    assert build.arch_of(capability) == arch


@pytest.mark.parametrize("file", ["launch.cu", "ptx.cuh", *build.SOURCES])
def test_key_changes_with_each_source(file, tmp_path, monkeypatch):
    before = build.key("route")
    folder = shutil.copytree(build.HERE, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "HERE", folder)
    assert build.key("route") == before                 # where the pack lies does not matter
    (folder / file).write_text((folder / file).read_text() + "\n")
    assert build.key("route") != before


def test_key_changes_with_its_parts(monkeypatch):
    keys = {build.key("a", "b"), build.key("ab"), build.key("a")}
    monkeypatch.setattr(build, "ABI", build.ABI + 1)
    assert len(keys | {build.key("a")}) == 4


@needs_gcc
def test_library_name_changes_with_its_makers(tmp_path, monkeypatch):
    folder, patch = tmp_path / "cache", monkeypatch.setattr
    folder.mkdir()
    pretend_toolkit(tmp_path / "cuda", patch)
    names = [build.build_extension("sm_86", folder), build.build_extension("sm_89", folder)]
    pretend_toolkit(tmp_path / "cuda", patch, nvcc="Cuda compilation tools, release 13.1")
    names.append(build.build_extension("sm_86", folder))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    names.append(build.build_extension("sm_86", folder))
    patch(torch, "__version__", "99.0")
    names.append(build.build_extension("sm_86", folder))
    host = tmp_path / "another-c++"
    host.write_text("#!/bin/sh\necho another 1.0\n")
    host.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: str(host))
    names.append(build.build_extension("sm_86", folder))
    assert len(set(names)) == 6


def test_cubin_name_changes_with_arch_and_nvrtc(tmp_path, nvrtc):
    names = build.build_cubins("sm_86", tmp_path) + build.build_cubins("sm_89", tmp_path)
    nvrtc.version = 13, 1
    assert len({*names, *build.build_cubins("sm_86", tmp_path)}) == 3 * len(build.SOURCES)


def test_table_lists_the_kernels():
    """launch.cu names each kernel of the .cuh files once; SOURCES names the files that have any."""
    defined = {path.name: re.findall(r"^[A-Z]\w+\((\w+),.*\)$", path.read_text(), re.M)
               for path in build.HERE.glob("*.cuh")}
    assert {name for name, kernels in defined.items() if kernels} == set(build.SOURCES)
    assert sorted(build.kernel_names()) == sorted(sum(defined.values(), []))
    assert len(set(build.kernel_names())) == len(build.kernel_names()) > 0


# The cache

def test_store(tmp_path):
    path = tmp_path / "binary"
    assert build.stored(path) is None
    build.store(path, b"content")
    assert build.stored(path) == b"content"
    assert os.listdir(tmp_path) == ["binary"]


def damaged(path, how):
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        flipped = bytes([data[0], data[1] ^ 1]) + data[2:]
        path.write_bytes({"half": data[:len(data) // 2], "empty": b"", "flipped": flipped, "longer": data + b"\0",
                          "only digest": hashlib.sha256(b"").digest(), "foreign": b"hello"}[how])


DAMAGES = pytest.mark.parametrize("how", ["missing", "half", "empty", "flipped", "longer", "only digest", "foreign"])


@DAMAGES
def test_damaged_cubin_is_built_again(tmp_path, nvrtc, how):
    first, *_ = paths = build.build_cubins("sm_86", tmp_path)
    nvrtc.calls.clear()
    assert build.build_cubins("sm_86", tmp_path) == paths
    assert nvrtc.calls == []                            # a second start compiles nothing
    good = first.read_bytes()
    damaged(first, how)
    assert build.build_cubins("sm_86", tmp_path) == paths
    assert nvrtc.calls == [(build.SOURCES[0], "sm_86")]
    assert first.read_bytes() == good


@needs_gcc
@DAMAGES
def test_damaged_library_is_built_again(tmp_path, toolkit, how):
    path = build.build_extension("sm_86", tmp_path)
    damaged(path, how)
    assert build.build_extension("sm_86", tmp_path) == path
    assert len(toolkit) == 2
    assert build.build_extension("sm_86", tmp_path) == path
    assert len(toolkit) == 2                            # a second start compiles nothing
    build.ExtensionKernels(path)


@needs_gcc
def test_foreign_library(tmp_path, toolkit, nvrtc):
    """Whole, but no library: built again. A library without our functions, which stays mapped: removed."""
    empty_library(tmp_path / "other.so")
    name = build.build_extension("sm_86", tmp_path).name
    for i, (content, route) in enumerate([(b"no library", "cpp_extension"),
                                          ((tmp_path / "other.so").read_bytes(), "nvrtc")]):
        (tmp_path / str(i)).mkdir()
        path = tmp_path / str(i) / name
        build.store(path, content)
        assert build.build("sm_86", path.parent).route == route
        assert path.exists() == (route == "cpp_extension")
    assert len(toolkit) == 3


TWO = """
import sys, types
from pathlib import Path
pack = types.ModuleType("svdq_pack"); pack.__path__ = [{root!r}]; sys.modules["svdq_pack"] = pack
from svdq_pack.tests.kernels import test_build
folder = Path({folder!r})
test_build.pretend_toolkit(folder / "cuda", setattr)
test_build.build.load_nvrtc = test_build.PretendNvrtc
sys.stdin.read()                        # both start together
print(test_build.build.build_extension("sm_86", folder), *test_build.build.build_cubins("sm_86", folder))
"""


@needs_gcc
def test_two_processes_at_once(tmp_path):
    script = TWO.format(root=str(ROOT), folder=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=tmp_path) for _ in range(2)]
    for process in both:
        process.stdin.close()
    said = [process.stdout.read() for process in both]
    assert [process.wait() for process in both] == [0, 0]
    assert said[0] == said[1]
    paths = list(map(Path, said[0].split()))
    assert len(paths) == 1 + len(build.SOURCES) and all(map(build.stored, paths))
    build.ExtensionKernels(paths[0])
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == sorted(paths)       # no scratch left


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert build.cache_folder() == tmp_path / "comfyui-svdq"
    assert list(build.cache_folder().iterdir()) == []


@pytest.mark.parametrize("obstacle", ["file", "read-only"])
def test_unwritable_cache_folder(tmp_path, monkeypatch, caplog, obstacle):
    home = tmp_path / "home"
    if obstacle == "file":
        home.write_text("in the way")
    else:
        (home / "comfyui-svdq").mkdir(parents=True)

        def refuse(dir=None):                           # root may write anywhere, so chmod proves nothing
            raise PermissionError(13, "Permission denied", str(dir))
        monkeypatch.setattr(build.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("LOCALAPPDATA", str(home))
    fallback = build.cache_folder()
    assert fallback == build.cache_folder() and fallback.is_dir() and home not in fallback.parents
    message, = caplog.messages                          # said once
    assert str(fallback) in message and "again at every start" in message and "Make " in message
    fallback.rmdir()


def test_full_disk_is_a_reason(tmp_path, toolkit, nvrtc, monkeypatch):
    def full(path, binary):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(build, "store", full)
    built = build.build("sm_86", tmp_path)
    assert built.route is None and all("No space left" in reason for reason in built.reasons)


# Routes

@needs_gcc
def test_extension_comes_first(tmp_path, toolkit, nvrtc):
    built = build.build("sm_86", tmp_path)
    assert (built.route, built.reasons, nvrtc.calls) == ("cpp_extension", (), [])
    (name, sources, flags), = toolkit
    assert sources == [str(build.HERE / "launch.cu")] and "-gencode=arch=compute_86,code=sm_86" in flags
    built.load(0).launch("kernel", (1, 1), 32, [ctypes.c_int(0)], 0)
    with pytest.raises(RuntimeError, match="kernel: launch failed: the stub says no"):
        built.load(0).launch("kernel", (1, 1), 32, [ctypes.c_int(700)], 0)


def test_nvrtc_comes_second(tmp_path, nvrtc, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    built = build.build("sm_86", tmp_path)
    assert built.route == "nvrtc" and [path.name.split("_sm")[0] for path in built.path] == [
        Path(name).stem for name in build.SOURCES]
    reason, = built.reasons
    assert reason.startswith("cpp_extension: no CUDA toolkit") and "CUDA_HOME" in reason


def test_neither(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(build, "load_nvrtc", lambda: None)
    built = build.build("sm_86", tmp_path)
    assert (built.route, built.path) == (None, None)
    assert [reason.split(":")[0] for reason in built.reasons] == ["cpp_extension", "nvrtc"]
    assert build.build("sm_86", tmp_path) is built      # not tried again


def test_what_nvrtc_left_serves_before_nvcc_compiles(tmp_path, nvrtc, toolkit):
    """A toolkit that fails, or comes and goes with the PATH, must not cost a compilation at each start."""
    paths = build.build_cubins("sm_86", tmp_path)
    built = build.build("sm_86", tmp_path)
    assert (built.path, toolkit, len(nvrtc.calls)) == (paths, [], len(build.SOURCES))


@pytest.mark.parametrize("error", [RuntimeError("Error building\n" + "ninja: noise\n" * 99 + "launch.cu(7): error: no"),
                                   OSError("error: no ninja"), ImportError("cannot open: no"), KeyError("error no")])
def test_compilers_words_reach_the_reason(tmp_path, toolkit, monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(BuildError, match="launch.cu for sm_86: (?s:.*)no") as raised:
        build.build_extension("sm_86", tmp_path)
    assert len(str(raised.value)) < 400 and "noise" not in str(raised.value)
    assert [path for path in tmp_path.iterdir() if path.name != "cuda"] == []


def test_nvcc_that_does_not_run(tmp_path, toolkit):
    (tmp_path / "cuda/bin/nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(BuildError, match="bin/nvcc does not run: .*exit status 3"):
        build.build_extension("sm_86", tmp_path)


def test_toolkit_of_another_cuda(tmp_path, toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(BuildError, match="nvcc is of CUDA 13, torch of CUDA 12.8; set CUDA_HOME"):
        build.build_extension("sm_86", tmp_path)
    assert toolkit == []


# NVRTC

def pretend_libnvrtc(result=0, log=b"fine\0"):
    """The functions of libnvrtc that Nvrtc calls."""
    seen = types.SimpleNamespace(destroyed=0)

    def create(program, source, name, count, texts, names):
        seen.source, seen.headers = source, dict(zip(list(names), list(texts)))
        return 0

    def compile_(program, count, options):
        seen.options = list(options)
        return result

    def destroy(program):
        seen.destroyed += 1

    def getter(content):
        def size(program, out):
            out._obj.value = len(content)
            return 0

        def get(program, buffer):
            ctypes.memmove(buffer, content, len(content))
            return 0
        return size, get

    def version(major, minor):
        major._obj.value, minor._obj.value = 13, 2
        return 0

    (log_size, get_log), (cubin_size, get_cubin) = getter(log), getter(ELF + b"\0cubin")
    seen.library = types.SimpleNamespace(
        nvrtcGetErrorString=lambda code: b"code %d" % code, nvrtcVersion=version, nvrtcCreateProgram=create,
        nvrtcCompileProgram=compile_, nvrtcDestroyProgram=destroy, nvrtcGetProgramLogSize=log_size,
        nvrtcGetProgramLog=get_log, nvrtcGetCUBINSize=cubin_size, nvrtcGetCUBIN=get_cubin)
    return seen


def test_nvrtc_calls():
    seen = pretend_libnvrtc()
    nvrtc = build.Nvrtc(seen.library)
    assert nvrtc.version == (13, 2)
    assert nvrtc.compile("a.cuh", {"a.cuh": "text of a", "b.cuh": "text of b"}, "sm_86") == ELF + b"\0cubin"
    assert (seen.source, seen.headers, seen.destroyed) == (b"text of a", {b"b.cuh": b"text of b"}, 1)
    assert seen.options[0] == b"--gpu-architecture=sm_86"


def test_nvrtc_log_reaches_the_error():
    seen = pretend_libnvrtc(result=6, log=b"a.cuh(3): error: expected a ;\n\0")
    with pytest.raises(BuildError, match=r"NVRTC 13.2 refuses .*a.cuh for sm_86:\n.*expected a ;$"):
        build.Nvrtc(seen.library).compile("a.cuh", {"a.cuh": ""}, "sm_86")
    assert seen.destroyed == 1
    seen.library.nvrtcCreateProgram = lambda *_: 2
    with pytest.raises(BuildError, match="NVRTC: code 2"):
        build.Nvrtc(seen.library).compile("a.cuh", {"a.cuh": ""}, "sm_86")


@needs_gcc
def test_no_nvrtc_is_found_out_once(tmp_path, monkeypatch):
    """Neither a file that is missing nor one that is no NVRTC raises, and nobody looks twice."""
    other = empty_library(tmp_path / "other.so")
    looks = []
    monkeypatch.setattr(build, "nvrtc_candidates",
                        lambda: looks.append(1) or [tmp_path / "libnvrtc.so.13", "libno-nvrtc.so", other])
    load = build.cache(build.load_nvrtc.__wrapped__)
    assert load() is load() is None and looks == [1]


@needs_nvrtc
def test_nvrtc_compiles_every_kernel(tmp_path):
    for name, path in zip(build.SOURCES, build.build_cubins("sm_86", tmp_path)):
        cubin = build.stored(path)
        assert cubin.startswith(b"\x7fELF")
        assert all(kernel.encode() in cubin for kernel in build.kernel_names() if kernel.startswith(Path(name).stem))


@needs_nvrtc
def test_nvrtc_that_does_not_know_an_arch(tmp_path):
    with pytest.raises(BuildError, match="refuses .* for sm_991"):
        build.build_cubins("sm_991", tmp_path)


# cpp_extension, in earnest

REAL = """
import sys, types
from pathlib import Path
pack = types.ModuleType("svdq_pack"); pack.__path__ = [{root!r}]; sys.modules["svdq_pack"] = pack
from svdq_pack.kernels import build
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = {home!r}
build.HERE = Path({here!r})
try:
    print(build.build_extension({arch!r}, Path({folder!r})))
    path = build.build_extension({arch!r}, Path({folder!r}), may_compile=False)
    build.ExtensionKernels(path).launch("none", (1, 1), 1, [], 0)
except (build.BuildError, RuntimeError) as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def real(tmp_path):
    """real(folder of the sources) -> what came of building sm_86 in another process. CPU-only torch gets stubs."""
    home = next((Path(line.partition("=")[2]).parent for line in toolchain._dryrun().splitlines()
                 if line.startswith("#$ _HERE_=")), None)
    if home is None or not any((home / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
        pytest.skip("this nvcc has no libcudart.so beside it")
    ours, release = torch.version.cuda, re.search(r"release (\d+)", toolchain._version())[1]
    if ours and ours.split(".")[0] != release:
        pytest.skip("nvcc and torch are of different CUDA versions")
    if not cpp_extension.is_ninja_available():
        pytest.skip("no ninja")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in () if torch.version.cuda else ("c10_cuda", "torch_cuda"):
        empty_library(stubs / f"lib{name}.so")

    def run(here):
        script = REAL.format(root=str(ROOT), home=str(home), here=str(here), arch="sm_86", folder=str(tmp_path))
        env = {**os.environ, "LIBRARY_PATH": str(stubs), "LD_LIBRARY_PATH": f"{stubs}:{home / 'lib64'}:{home / 'lib'}"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


@needs_gcc
@toolchain.needs_nvcc
def test_real_extension(real):
    path, error = real(build.HERE).splitlines()
    assert b"gemm_w4a4_bf16_s4" in build.stored(Path(path))
    assert error.startswith("RuntimeError none: launch failed: ")       # no such kernel: an error, not a crash


@needs_gcc
@toolchain.needs_nvcc
def test_real_compiler_error(real, tmp_path):
    here = shutil.copytree(build.HERE, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (here / "launch.cu").write_text("int f() { return }\n")
    said = real(here)
    assert said.startswith("BuildError") and "launch.cu(1): error: expected an expression" in said


# kernels_for

@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(capability): torch.cuda describes one such GPU as number 0; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Pretended")

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    return pretend


@needs_gcc
def test_threads_share_one_build(gpu, toolkit, caplog):
    gpu((8, 6))
    caplog.set_level(logging.INFO)
    got = []
    threads = [threading.Thread(target=lambda: got.append(build.kernels_for(0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(toolkit) == 1 and len(set(map(id, got))) == 1 and got[0].route == "cpp_extension"
    said, = (message for message in caplog.messages if "ready in" in message)
    assert "cuda:0 (Pretended, sm_86) by cpp_extension" in said


def test_no_kernels_is_said_once(gpu, monkeypatch, caplog):
    gpu((8, 6))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(build, "load_nvrtc", lambda: None)
    assert build.kernels_for(0) is build.kernels_for(0) is None
    message, = caplog.messages
    assert all(part in message for part in ("sm_86", "weight-only", "no CUDA toolkit", "no NVRTC", "To have them"))


@pytest.mark.parametrize("capability, hip, words", [((7, 5), None, "sm_75.* lacks"), ((11, 0), "7.0", "are CUDA")])
def test_gpus_without_the_instruction(gpu, monkeypatch, caplog, capability, hip, words):
    gpu(capability)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert build.kernels_for(0) is None and re.search(words, caplog.text)


def test_driver_that_fails(gpu, nvrtc, monkeypatch, caplog):
    """Cubins are built, but the driver cannot load them: the torch path serves."""
    gpu((8, 6))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)

    def no_driver(*_):
        raise OSError("libcuda.so.1: cannot open shared object file")
    monkeypatch.setattr(build, "CubinKernels", no_driver)
    assert build.kernels_for(0) is None and "libcuda.so.1" in caplog.text and "driver" in caplog.text


def test_gpu_that_cannot_be_asked(monkeypatch, caplog):
    def broken(index):
        raise AssertionError("Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert build.kernels_for(0) is None and "not compiled with CUDA" in caplog.text


def pretend_driver(monkeypatch, load=0, find=lambda name: 0):
    """torch.cuda and libcuda with a context 7, for CubinKernels."""
    seen = types.SimpleNamespace(loaded=[], launched=[])

    def current(context):
        context._obj.value = 7
        return 0

    def module(out, cubin):
        seen.loaded.append(cubin)
        return load

    def launch(function, *arguments):
        seen.launched.append((*arguments[:6], [ctypes.c_int.from_address(a).value for a in arguments[8]]))
        return 0

    def text(code, out):
        out._obj.value = b"no binary for GPU"

    driver = types.SimpleNamespace(
        cuCtxGetCurrent=current, cuCtxSetCurrent=lambda context: seen.__setattr__("context", context.value),
        cuModuleLoadData=module, cuModuleGetFunction=lambda out, module, name: find(name), cuLaunchKernel=launch,
        cuGetErrorString=text)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())      # any context manager
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return seen


def test_cubins_through_the_driver(tmp_path, nvrtc, monkeypatch):
    seen, paths = pretend_driver(monkeypatch), build.build_cubins("sm_86", tmp_path)
    kernels = build.CubinKernels(paths, 0)
    assert seen.loaded == [ELF + f"{name} sm_86".encode() for name in build.SOURCES]        # without the digest
    kernels.launch("gemm_w4a4_bf16_s4", (3, 2), 128, [ctypes.c_int(5), ctypes.c_int(6)], 0)
    assert seen.launched == [(3, 2, 1, 128, 1, 1, [5, 6])] and seen.context == 7


def test_cubins_that_do_not_load(tmp_path, nvrtc, monkeypatch):
    paths = build.build_cubins("sm_86", tmp_path)
    pretend_driver(monkeypatch, load=209)
    with pytest.raises(RuntimeError, match="CUDA driver says no binary for GPU"):
        build.CubinKernels(paths, 0)
    pretend_driver(monkeypatch, find=lambda name: 500 * (name == b"gemm_w4a4_fp16_u4"))
    with pytest.raises(BuildError, match="gemm_w4a4_fp16_u4: not in the built kernels"):
        build.CubinKernels(paths, 0)
    damaged(paths[1], "half")
    with pytest.raises(BuildError, match="changed while"):
        build.CubinKernels(paths, 0)
