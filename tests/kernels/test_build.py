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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from svdq_pack.svdq.kernels import build, cache, registry
from svdq_pack.svdq.kernels.errors import BuildError
from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.executors import lowest

ROOT, CUDA = Path(__file__).resolve().parents[2], build.CUDA
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
needs_nvrtc = pytest.mark.skipif(build.load_nvrtc() is None, reason="no NVRTC library beside torch or on the system")

LIBRARIES = tuple(dict.fromkeys(variant.library for variant in registry.VARIANTS
                                if isinstance(variant.library, build.Library)))
EACH_LIBRARY = pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
ELF = b"\x7fELF of "

# A library that a C++ compiler builds, where cuda_runtime.h is this one: a kernel adds to its argument, which then is the
# launch's code. 1: first_one, 2: first_two, 3: second; 10 for each CTA of a cluster; 100: too much shared memory.
TOY = build.Library("toy", {"first.cuh": ("first_one", "first_two"), "second.cuh": ("second",)})
SOURCES = {
    "shared.cuh": "#pragma once\n#define KERNEL(name, by) extern \"C\" void name(int* code) { *code += by; }\n",
    "first.cuh": '#include "shared.cuh"\nKERNEL(first_one, 1)\nKERNEL(first_two, 2)\n',
    "second.cuh": '#include "shared.cuh"\nKERNEL(second, 3)\n',
    "unrelated.cuh": "// of another library\n"}
CUDA_RUNTIME = """
#include <cstddef>
#include <cstdio>
typedef int cudaError_t;
typedef void* cudaStream_t;
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute { int id; struct { struct { unsigned x, y, z; } clusterDim; } val; };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute* attrs; unsigned numAttrs;
};
static int cudaFuncSetAttribute(const void*, int, int bytes) { return bytes > 227 << 10 ? 100 : 0; }
static int cudaLaunchKernel(const void* kernel, dim3, dim3, void** args, size_t, cudaStream_t) {
    ((void (*)(int*))kernel)((int*)args[0]);
    return *(int*)args[0];
}
static int cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
    return cudaLaunchKernel(kernel, 1, 1, args, 0, 0) + 10 * config->attrs[0].val.clusterDim.x;
}
static const char* cudaGetErrorString(int code) {
    static char text[40];
    snprintf(text, sizeof text, "the stub says %d", code);
    return text;
}
"""


def write_sources(folder):
    """The folder of TOY's sources, with the real launch.cuh."""
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    shutil.copy(CUDA / "launch.cuh", folder)
    return folder


def pretend_toolkit(folder, patch, nvcc="Cuda compilation tools, release 13.0, V13.0.88"):
    """A CUDA_HOME in `folder`, and a cpp_extension.load that has g++ for nvcc. Returns the list of its calls."""
    calls = []

    def load(name, sources, *, extra_cuda_cflags, extra_include_paths, extra_ldflags, build_directory, is_python_module,
             is_standalone, with_cuda):
        source, = sources
        calls.append((name, Path(source).read_text(), extra_cuda_cflags))
        assert cache.NAME.fullmatch(Path(build_directory).name)["scratch"]
        assert is_standalone and extra_ldflags == ["-shared"]           # built, and not loaded from there
        path = Path(build_directory, name)
        includes = [f"-I{include}" for include in (folder, *extra_include_paths)]
        subprocess.run(["g++", "-shared", "-fPIC", *includes, "-x", "c++", source, "-o", path], check=True)
        return str(path)

    script = Path(folder, "bin", "nvcc")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!/bin/sh\necho '{nvcc}'\n")
    script.chmod(0o755)
    (script.parent.parent / "cuda_runtime.h").write_text(CUDA_RUNTIME)
    build._version.cache_clear()
    patch(cpp_extension, "CUDA_HOME", str(folder))
    patch(cpp_extension, "load", load)
    patch(torch.version, "cuda", "13.0")
    return calls


def empty_library(path):
    subprocess.run(["g++", "-shared", "-x", "c++", "-", "-o", path], input="", text=True, check=True)
    return path


class PretendNvrtc:
    version = 13, 0

    def __init__(self):
        self.calls = []

    def compile(self, name, sources, arch):
        self.calls.append((name, arch))
        return ELF + f"{name} {arch}".encode()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The folder of sources, which is TOY's."""
    monkeypatch.setattr(build, "CUDA", write_sources(tmp_path / "sources"))
    return build.CUDA


@pytest.fixture
def toolkit(tmp_path, monkeypatch, sources):
    yield pretend_toolkit(tmp_path / "cuda", monkeypatch.setattr)
    build._version.cache_clear()


@pytest.fixture
def nvrtc(monkeypatch, sources):
    pretended = PretendNvrtc()
    monkeypatch.setattr(build, "load_nvrtc", lambda: pretended)
    return pretended


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Nothing of one test is known to the next."""
    monkeypatch.setattr(build, "_kernels", {})
    cached = build.build, build.cache_folder, build.folder_to_build_in
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


# Names

@pytest.mark.parametrize("capability, arch", [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_103"),
                                              ((12, 0), "sm_120"), ((99, 1), "sm_991")])
def test_arch(capability, arch):
    assert TOY.arch(capability) == arch
    assert replace(TOY, specific=True).arch(capability) == arch + "a"


def test_texts_are_the_sources_and_what_they_include(sources):
    assert TOY.texts() == {name: SOURCES[name] for name in ("first.cuh", "second.cuh", "shared.cuh")}
    assert TOY.kernels == ["first_one", "first_two", "second"]
    assert TOY.source_of("first_two") == sources / "first.cuh" and TOY.source_of("second") == sources / "second.cuh"


@EACH_LIBRARY
def test_key_changes_with_each_source_of_its_own(library, tmp_path, monkeypatch):
    """And with no source of another library."""
    before = build.key(library, "route")
    folder = shutil.copytree(CUDA, tmp_path / "cuda")
    monkeypatch.setattr(build, "CUDA", folder)
    assert build.key(library, "route") == before        # where the pack lies does not matter
    own = {file for file in folder.iterdir() if build.key(library, "route") != edited(library, file)}
    assert {file.name for file in own} == library.texts().keys() >= library.sources.keys() | {"ptx.cuh"}


def edited(library, file):
    """The key of a library while a file has one line more."""
    text = file.read_text()
    file.write_text(text + "\n")
    try:
        return build.key(library, "route")
    finally:
        file.write_text(text)


def test_key_changes_with_its_parts(monkeypatch):
    library, other = LIBRARIES[:2]
    keys = {build.key(library, "a", "b"), build.key(library, "ab"), build.key(library, "a"), build.key(other, "a")}
    monkeypatch.setattr(build, "ABI", build.ABI + 1)
    assert len(keys | {build.key(library, "a")}) == 5


@needs_gxx
def test_binary_name_changes_with_its_makers(tmp_path, monkeypatch, sources):
    folder, patch = tmp_path / "cache", monkeypatch.setattr
    folder.mkdir(0o700)
    pretend_toolkit(tmp_path / "cuda", patch)
    names = [build.build_extension(TOY, "sm_86", folder), build.build_extension(TOY, "sm_89", folder)]
    pretend_toolkit(tmp_path / "cuda", patch, nvcc="Cuda compilation tools, release 13.1")
    names.append(build.build_extension(TOY, "sm_86", folder))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    names.append(build.build_extension(TOY, "sm_86", folder))
    patch(torch, "__version__", "99.0")
    names.append(build.build_extension(TOY, "sm_86", folder))
    host = tmp_path / "another-c++"
    host.write_text("#!/bin/sh\necho another 1.0\n")
    host.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: str(host))
    names.append(build.build_extension(TOY, "sm_86", folder))
    for file in ("shared.cuh", "launch.cuh"):
        (sources / file).write_text((sources / file).read_text() + "\n")
        names.append(build.build_extension(TOY, "sm_86", folder))
    names.append(build.build_extension(build.Library("toy", {"first.cuh": ("first_one",)}), "sm_86", folder))
    assert all(cache.NAME.fullmatch(path.name) for path in names)          # so old ones are known as ours, and removed
    assert len(set(names)) == 9 and {path.name.split("_sm")[0] for path in names} == {"svdq_toy"}


def test_cubin_name_changes_with_arch_nvrtc_and_sources(tmp_path, nvrtc, sources):
    names = build.build_cubins(TOY, "sm_86", tmp_path) + build.build_cubins(TOY, "sm_89", tmp_path)
    nvrtc.version = 13, 1
    names += build.build_cubins(TOY, "sm_86", tmp_path)
    (sources / "shared.cuh").write_text("")
    names += build.build_cubins(TOY, "sm_86", tmp_path)
    assert len(set(names)) == 4 * len(TOY.sources) and all(cache.NAME.fullmatch(path.name) for path in names)
    (sources / "launch.cuh").write_text("")                         # which NVRTC never sees
    assert build.build_cubins(TOY, "sm_86", tmp_path) == names[-2:]


def test_libraries_name_the_kernels():
    """Every kernel of the .cuh files is in a library, under its file."""
    defined = {path.name: re.findall(r"^[A-Z]\w+\((\w+),.*\)$", path.read_text(), re.M) for path in CUDA.glob("*.cuh")}
    named = [(file, kernel) for library in LIBRARIES for file, kernels in library.sources.items() for kernel in kernels]
    assert sorted(set(named)) == sorted((file, kernel) for file, kernels in defined.items() for kernel in kernels)
    assert len(set(named)) == len({kernel for _, kernel in named}) > 0
    assert len({library.name for library in LIBRARIES}) == len(LIBRARIES)


def test_launcher_text(sources):
    """What nvcc is given: the sources, a table of their kernels, and the half that all libraries share."""
    assert TOY.launcher() == """#include "first.cuh"
#include "second.cuh"

static const struct { const char* name; const void* kernel; } TABLE[] = {
    {"first_one", (const void*)first_one},
    {"first_two", (const void*)first_two},
    {"second", (const void*)second},
};

#include "launch.cuh"
"""


# The cache: what is built again. Whom it trusts: test_cache.py

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
    first, *_ = paths = build.build_cubins(TOY, "sm_86", tmp_path)
    nvrtc.calls.clear()
    assert build.build_cubins(TOY, "sm_86", tmp_path) == paths
    assert nvrtc.calls == []                            # a second start compiles nothing
    good = first.read_bytes()
    damaged(first, how)
    assert build.build_cubins(TOY, "sm_86", tmp_path) == paths
    assert nvrtc.calls == [("first.cuh", "sm_86")]
    assert first.read_bytes() == good


@needs_gxx
@DAMAGES
def test_damaged_library_is_built_again(tmp_path, toolkit, how):
    path = build.build_extension(TOY, "sm_86", tmp_path)
    damaged(path, how)
    assert build.build_extension(TOY, "sm_86", tmp_path) == path
    assert len(toolkit) == 2
    assert build.build_extension(TOY, "sm_86", tmp_path) == path
    assert len(toolkit) == 2                            # a second start compiles nothing
    build.ExtensionKernels(path)


@needs_gxx
def test_foreign_library(tmp_path, toolkit, nvrtc):
    """Whole, but no library, or a library without our functions, which stays mapped: removed and built again."""
    empty_library(tmp_path / "other.so")
    name = build.build_extension(TOY, "sm_86", tmp_path).name
    for i, content in enumerate([b"no library", (tmp_path / "other.so").read_bytes()]):
        (tmp_path / str(i)).mkdir(0o700)
        path = tmp_path / str(i) / name
        build.store(path, content)
        with pytest.raises(BuildError, match="could not be loaded and was removed"):
            build.build_extension(TOY, "sm_86", path.parent)
        assert not path.exists()
        build.store(path, content)
        assert build.build(TOY, "sm_86", path.parent).route == "cpp_extension" and path.exists()
    assert len(toolkit) == 3


TWO = """
import sys, types
from pathlib import Path
pack = types.ModuleType("svdq_pack"); pack.__path__ = [{root!r}]; sys.modules["svdq_pack"] = pack
from svdq_pack.tests.kernels import test_build
folder = Path({folder!r})
test_build.build.CUDA = folder / "sources"
test_build.pretend_toolkit(folder / "cuda", setattr)
test_build.build.load_nvrtc = test_build.PretendNvrtc
sys.stdin.read()                        # both start together
print(test_build.build.build_extension(test_build.TOY, "sm_86", folder),
      *test_build.build.build_cubins(test_build.TOY, "sm_86", folder))
"""


@needs_gxx
def test_two_processes_at_once(tmp_path):
    write_sources(tmp_path / "sources")
    script = TWO.format(root=str(ROOT), folder=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=tmp_path) for _ in range(2)]
    for process in both:
        process.stdin.close()
    said = [process.stdout.read() for process in both]
    assert [process.wait() for process in both] == [0, 0]
    assert said[0] == said[1]
    paths = list(map(Path, said[0].split()))
    assert len(paths) == 1 + len(TOY.sources) and all(map(build.stored, paths))
    build.ExtensionKernels(paths[0])
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == sorted(paths)       # no scratch left


@pytest.mark.skipif(not cache.OWNERS, reason="no owners and modes")
def test_cache_open_to_others(tmp_path, nvrtc, monkeypatch, caplog):
    """Nothing is taken from it or put there, and kernels are built all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    planted = build.build(TOY, "sm_86").paths
    planted[0].parent.chmod(0o777)
    for function in (build.build, build.cache_folder, build.folder_to_build_in, cache._opened):
        function.cache_clear()
    built = build.build(TOY, "sm_86")
    assert built.route == "nvrtc" and not any(path.is_relative_to(tmp_path) for path in built.paths) and len(nvrtc.calls) == 4
    message, = caplog.messages
    assert "has mode 0777" in message and all(map(build.stored, built.paths))


@needs_gxx
def test_full_disk_is_a_reason(tmp_path, toolkit, nvrtc, monkeypatch):
    def full(path, binary):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(build, "store", full)
    built = build.build(TOY, "sm_86", tmp_path)
    assert built.route is None and all("No space left" in reason for reason in built.reasons)


def test_full_disk_elsewhere_serves(tmp_path, nvrtc, monkeypatch, caplog):
    """What is in the cache is read from there; what is built goes where there is room."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    kept = build.build(TOY, "sm_86")

    def full(dir=None):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", full)
    for function in (build.build, build.folder_to_build_in):
        function.cache_clear()
    assert build.build(TOY, "sm_86").paths == kept.paths and not caplog.messages
    built = build.build(TOY, "sm_89")
    assert built.route == "nvrtc" and all(map(build.stored, built.paths))
    assert built.paths[0].parent != kept.paths[0].parent and not build.build(TOY, "sm_90").paths[0].is_relative_to(tmp_path)
    message, = caplog.messages
    assert "No space left on device" in message and "32 MiB" in message


# Routes

@needs_gxx
def test_extension_comes_first(tmp_path, toolkit, nvrtc):
    built = build.build(TOY, "sm_86", tmp_path)
    assert (built.route, built.reasons, nvrtc.calls) == ("cpp_extension", (), [])
    (name, text, flags), = toolkit
    assert name.startswith("svdq_toy_sm_86_") and text == TOY.launcher()
    assert "-gencode=arch=compute_86,code=sm_86" in flags


@needs_gxx
def test_launches_of_an_extension(tmp_path, toolkit):
    """The kernel of that name, with the shared memory and the cluster that are asked for; errors in the driver's words."""
    kernels = build.ExtensionKernels(build.build_extension(TOY, "sm_86", tmp_path))
    for name, adds in (("first_one", 1), ("first_two", 2), ("second", 3)):
        kernels.launch(name, (1, 1), 32, [ctypes.c_int(-adds)], 0)
        kernels.launch(name, (1, 1), 32, [ctypes.c_int(-adds)], 0, shared=227 << 10)
        kernels.launch(name, (2, 1), 32, [ctypes.c_int(-adds - 20)], 0, cluster=2)
    with pytest.raises(RuntimeError, match="first_two: launch failed: the stub says 702"):
        kernels.launch("first_two", (1, 1), 32, [ctypes.c_int(700)], 0)
    with pytest.raises(RuntimeError, match="second: launch failed: the stub says 100"):
        kernels.launch("second", (1, 1), 32, [ctypes.c_int(-3)], 0, shared=228 << 10)
    with pytest.raises(RuntimeError, match="first: launch failed: no kernel of this name is in the library"):
        kernels.launch("first", (1, 1), 32, [ctypes.c_int(0)], 0)


def test_nvrtc_comes_second(tmp_path, nvrtc, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    built = build.build(TOY, "sm_86", tmp_path)
    assert built.route == "nvrtc" and [path.name.split("_sm")[0] for path in built.path] == ["first", "second"]
    reason, = built.reasons
    assert reason.startswith("cpp_extension: no CUDA toolkit") and "CUDA_HOME" in reason


def test_neither(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(build, "load_nvrtc", lambda: None)
    built = build.build(TOY, "sm_86", tmp_path)
    assert (built.route, built.path) == (None, None)
    assert [reason.split(":")[0] for reason in built.reasons] == ["cpp_extension", "nvrtc"]
    assert build.build(TOY, "sm_86", tmp_path) is built      # not tried again


def test_what_nvrtc_left_serves_before_nvcc_compiles(tmp_path, nvrtc, toolkit):
    """A toolkit that fails, or comes and goes with the PATH, must not cost a compilation at each start."""
    paths = build.build_cubins(TOY, "sm_86", tmp_path)
    built = build.build(TOY, "sm_86", tmp_path)
    assert (built.path, toolkit, len(nvrtc.calls)) == (paths, [], len(TOY.sources))


@needs_gxx
@pytest.mark.parametrize("error", [RuntimeError("Error building\n" + "ninja: noise\n" * 99 + "first.cuh(7): error: no"),
                                   OSError("error: no ninja"), ImportError("cannot open: no"), KeyError("error no")])
def test_compilers_words_reach_the_reason(tmp_path, toolkit, monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(BuildError, match=r"toy \(first.cuh, second.cuh of .*\) for sm_86: (?s:.*)no") as raised:
        build.build_extension(TOY, "sm_86", tmp_path)
    assert len(str(raised.value)) < 400 and "noise" not in str(raised.value)
    assert [path for path in tmp_path.iterdir() if path.name not in ("cuda", "sources")] == []


def test_nvcc_that_does_not_run(tmp_path, toolkit):
    (tmp_path / "cuda/bin/nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(BuildError, match="bin/nvcc does not run: .*exit status 3"):
        build.build_extension(TOY, "sm_86", tmp_path)


def test_toolkit_of_another_cuda(tmp_path, toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(BuildError, match="nvcc is of CUDA 13, torch of CUDA 12.8; set CUDA_HOME"):
        build.build_extension(TOY, "sm_86", tmp_path)
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


@needs_gxx
def test_no_nvrtc_is_found_out_once(tmp_path, monkeypatch):
    """Neither a file that is missing nor one that is no NVRTC raises, and nobody looks twice."""
    other = empty_library(tmp_path / "other.so")
    looks = []
    monkeypatch.setattr(build, "nvrtc_candidates",
                        lambda: looks.append(1) or [tmp_path / "libnvrtc.so.13", "libno-nvrtc.so", other])
    load = build.cache(build.load_nvrtc.__wrapped__)
    assert load() is load() is None and looks == [1]


def first_kernels(library, folder):
    """A library with the first kernel of each file only, which compiles faster; budgets.py compiles all. Writes its sources."""
    shutil.copytree(CUDA, folder)
    for file, names in library.sources.items():
        text = (CUDA / file).read_text()
        (folder / file).write_text(re.sub(rf"^[A-Z]\w+\((?:{'|'.join(names[1:])}),.*\)$", "", text, flags=re.M))
    return replace(library, sources={file: names[:1] for file, names in library.sources.items()})


@needs_nvrtc
@EACH_LIBRARY
def test_nvrtc_compiles_every_file(library, tmp_path, monkeypatch):
    library = first_kernels(library, tmp_path / "sources")
    monkeypatch.setattr(build, "CUDA", tmp_path / "sources")
    arch = library.arch(lowest(library) if library.specific else (8, 6))
    for names, path in zip(library.sources.values(), build.build_cubins(library, arch, tmp_path), strict=True):
        cubin = build.stored(path)
        assert cubin.startswith(b"\x7fELF") and all(kernel.encode() in cubin for kernel in names)


@needs_nvrtc
def test_nvrtc_that_does_not_know_an_arch(tmp_path):
    with pytest.raises(BuildError, match="refuses .* for sm_991"):
        build.build_cubins(LIBRARIES[0], "sm_991", tmp_path)


# cpp_extension, in earnest

REAL = """
import sys, types
from pathlib import Path
pack = types.ModuleType("svdq_pack"); pack.__path__ = [{root!r}]; sys.modules["svdq_pack"] = pack
from svdq_pack.svdq.kernels import build
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = {home!r}
build.CUDA = Path({sources!r})
library = build.Library({name!r}, {kernels!r}, {specific!r})
try:
    print(build.build_extension(library, {arch!r}, Path({folder!r})))
    path = build.build_extension(library, {arch!r}, Path({folder!r}), may_compile=False)
    build.ExtensionKernels(path).launch("none", (1, 1), 1, [], 0)
except (build.BuildError, RuntimeError) as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def real(tmp_path):
    """real(library, folder of the sources) -> what came of building it in another process. CPU-only torch gets stubs."""
    home = next((Path(line.partition("=")[2]).parent for line in toolchain._dryrun().splitlines()
                 if line.startswith("#$ _HERE_=")), None)
    if home is None or not any((home / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
        pytest.skip("this nvcc has no libcudart.so beside it")
    ours, release = torch.version.cuda, toolchain.version().partition(".")[0]
    if ours and ours.split(".")[0] != release:
        pytest.skip("nvcc and torch are of different CUDA versions")
    if not cpp_extension.is_ninja_available():
        pytest.skip("no ninja")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in () if torch.version.cuda else ("c10_cuda", "torch_cuda"):
        empty_library(stubs / f"lib{name}.so")

    def run(library, sources):
        arch = library.arch(lowest(library) if library.specific else (8, 6))
        script = REAL.format(root=str(ROOT), home=str(home), sources=str(sources), name=library.name, kernels=library.sources,
                             specific=library.specific, arch=arch, folder=str(tmp_path))
        env = {**os.environ, "LIBRARY_PATH": str(stubs), "LD_LIBRARY_PATH": f"{stubs}:{home / 'lib64'}:{home / 'lib'}"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


@needs_gxx
@toolchain.needs_nvcc
@EACH_LIBRARY
def test_real_extension(library, real, tmp_path):
    library = first_kernels(library, tmp_path / "sources")
    path, error = real(library, tmp_path / "sources").splitlines()
    assert all(kernel.encode() in build.stored(Path(path)) for kernel in library.kernels)
    assert error == "RuntimeError none: launch failed: no kernel of this name is in the library"


@needs_gxx
@toolchain.needs_nvcc
def test_real_compiler_error(real, tmp_path):
    library = first_kernels(LIBRARIES[0], tmp_path / "sources")
    (tmp_path / "sources" / "launch.cuh").write_text("int f() { return }\n")
    said = real(library, tmp_path / "sources")
    assert said.startswith("BuildError") and "launch.cuh(1): error: expected an expression" in said


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


@needs_gxx
def test_threads_share_one_build(gpu, toolkit, caplog):
    gpu((8, 6))
    caplog.set_level(logging.INFO)
    got = []
    threads = [threading.Thread(target=lambda: got.append(build.kernels_for(TOY, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(toolkit) == 1 and len(set(map(id, got))) == 1 and got[0].route == "cpp_extension"
    said, = (message for message in caplog.messages if "ready in" in message)
    assert "toy on cuda:0 (Pretended, sm_86) by cpp_extension" in said


def test_a_library_that_fails_costs_no_other(gpu, nvrtc, monkeypatch, caplog):
    """Two libraries of one GPU: each is built, kept and said by itself."""
    gpu((8, 6))
    pretend_driver(monkeypatch)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    other, compile_ = build.Library("other", {"unrelated.cuh": ("lonely",)}, specific=True), nvrtc.compile

    def refuse(name, texts, arch):
        if arch == "sm_86a":
            raise BuildError(f"NVRTC refuses {name}")
        return compile_(name, texts, arch)
    monkeypatch.setattr(nvrtc, "compile", refuse)
    assert build.kernels_for(other, 0) is None and "no kernels other on cuda:0" in caplog.text
    kernels = build.kernels_for(TOY, 0)
    assert kernels.functions.keys() == set(TOY.kernels) and build.kernels_for(TOY, 0) is kernels
    assert build.kernels_for(other, 0) is None and len(caplog.messages) == 1
    monkeypatch.setattr(nvrtc, "compile", compile_)
    build.build.cache_clear()
    build._kernels.clear()
    assert build.kernels_for(other, 0).functions.keys() == {"lonely"}


def test_no_kernels_is_said_once(gpu, sources, monkeypatch, caplog):
    gpu((8, 6))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(build, "load_nvrtc", lambda: None)
    assert build.kernels_for(TOY, 0) is build.kernels_for(TOY, 0) is None
    message, = caplog.messages
    assert all(part in message for part in ("no kernels toy on cuda:0", "sm_86", "another path serves", "no CUDA toolkit",
                                            "no NVRTC", "To have them"))


def test_driver_that_fails(gpu, nvrtc, monkeypatch, caplog):
    """Cubins are built, but the driver cannot load them: another path serves."""
    gpu((8, 6))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)

    def no_driver(*_):
        raise OSError("libcuda.so.1: cannot open shared object file")
    monkeypatch.setattr(build, "CubinKernels", no_driver)
    assert build.kernels_for(TOY, 0) is None and "libcuda.so.1" in caplog.text and "driver" in caplog.text


def test_gpu_that_cannot_be_asked(monkeypatch, caplog):
    def broken(index):
        raise AssertionError("Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert build.kernels_for(TOY, 0) is None and "not compiled with CUDA" in caplog.text


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
    seen, paths = pretend_driver(monkeypatch), build.build_cubins(TOY, "sm_86", tmp_path)
    kernels = build.CubinKernels(paths, 0, TOY.kernels)
    assert seen.loaded == [ELF + f"{name} sm_86".encode() for name in TOY.sources]            # without the digest
    kernels.launch("second", (3, 2), 128, [ctypes.c_int(5), ctypes.c_int(6)], 0)
    assert seen.launched == [(3, 2, 1, 128, 1, 1, [5, 6])] and seen.context == 7
    with pytest.raises(RuntimeError, match="none: launch failed: no kernel of this name is in the library"):
        kernels.launch("none", (3, 2), 128, [ctypes.c_int(5)], 0)


def test_cubins_that_do_not_load(tmp_path, nvrtc, monkeypatch):
    paths = build.build_cubins(TOY, "sm_86", tmp_path)
    pretend_driver(monkeypatch, load=209)
    with pytest.raises(RuntimeError, match="CUDA driver says no binary for GPU"):
        build.CubinKernels(paths, 0, TOY.kernels)
    pretend_driver(monkeypatch, find=lambda name: 500 * (name == b"first_two"))
    with pytest.raises(BuildError, match="first_two: not in the built kernels"):
        build.CubinKernels(paths, 0, TOY.kernels)
    damaged(paths[1], "half")
    with pytest.raises(BuildError, match="changed while"):
        build.CubinKernels(paths, 0, TOY.kernels)


# The CPU: the host compiler

TOY_CPU = build.CPULibrary("toy", "toy.cpp")
CPU_SOURCES = {
    "toy.hpp": "#include <cstdint>\nstruct Add { int64_t a, b, sum; };\n",
    "toy.cpp": """#include "toy.hpp"
#define API extern "C" __attribute__((visibility("default")))
API const char* svdq_body(int body) { return body == 0 ? "plain" : body == 1 ? "fast" : body == 2 ? "faster" : nullptr; }
API int svdq_runs(int body) { return body < 2; }
API int svdq_add(int body, Add* job) { job->sum = job->a + job->b + 100 * body; return job->a < 0; }
"""}


class Add(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int64), ("b", ctypes.c_int64), ("sum", ctypes.c_int64)]


@pytest.fixture
def cpu_sources(tmp_path, monkeypatch):
    """The folder of sources, which is TOY_CPU's."""
    folder = tmp_path / "cpu sources"
    folder.mkdir()
    for name, text in CPU_SOURCES.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(build, "CPU", folder)
    return folder


@pytest.fixture
def store_folder(tmp_path):
    (tmp_path / "store").mkdir(0o700)
    return tmp_path / "store"


@pytest.fixture
def compiler(tmp_path, monkeypatch, cpu_sources):
    """compiler(name, script): a program in a folder that is all of the PATH. Its `calls` are the arguments of those that wanted
    more than its version; `script` runs then, g++ without one. CXX is not set."""
    folder, log, real = tmp_path / "programs", tmp_path / "calls", shutil.which("g++")
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)

    def make(name, script=None, version="1.0"):
        program = folder / name
        program.write_text(f"""#!/bin/sh
case "$*" in *--version) echo {name.replace(" ", "_")} {version}; exit 0;; esac
echo "$*" >> '{log}'
{script or f'[ "$1" = --toy ] && shift; PATH={os.path.dirname(real or "/")}:/usr/bin:/bin exec {real} "$@"'}
""")
        program.chmod(0o755)
        build._version.cache_clear()
        return program
    make.calls = lambda: log.read_text().splitlines() if log.exists() else []
    make.folder = folder
    yield make
    build._version.cache_clear()


needs_sh = pytest.mark.skipif(not shutil.which("sh"), reason="no sh")


def test_no_host_compiler(compiler, monkeypatch, store_folder, tmp_path, caplog):
    """Said once, with what to install; the registry then has another path."""
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: neither g\+\+ nor clang\+\+ .* CXX"):
        build.build_host(TOY_CPU, "cpu", store_folder)
    built = build.build(TOY_CPU, "cpu", store_folder)
    assert (built.route, built.paths) == (None, []) and built.reasons[0].startswith("host compiler: no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.kernels_for(TOY_CPU, None) is build.kernels_for(TOY_CPU, None) is None
    message, = caplog.messages
    assert all(part in message for part in ("no kernels toy on the CPU (", "another path serves", "no C++ compiler",
                                            "To have them, install g++ or clang++"))
    assert "GPU" not in message and "driver" not in message


@needs_sh
def test_host_compiler_that_fails(compiler, store_folder, cpu_sources):
    compiler("g++", "for i in 1 2 3; do echo noise; done >&2; echo 'toy.cpp:3: error: no such number' >&2; exit 1")
    with pytest.raises(BuildError) as raised:
        build.build_host(TOY_CPU, "cpu", store_folder)
    assert str(raised.value) == f"toy ({cpu_sources / 'toy.cpp'}): toy.cpp:3: error: no such number"
    assert not any(store_folder.iterdir())
    built = build.build(TOY_CPU, "cpu", store_folder)
    assert built.route is None and "no such number" in built.reasons[0]


@needs_sh
@pytest.mark.parametrize("script, words", [
    ("exit 3", "exit status 3"), ("echo >&2 'last words'; exit 1", "last words"), ("exit 0", "wrote nothing")])
def test_host_compiler_that_says_little(compiler, store_folder, script, words):
    """Nothing but its status, no line that names an error, no output at all."""
    compiler("g++", script)
    built = build.build(TOY_CPU, "cpu", store_folder)
    assert built.route is None and words in built.reasons[0] and not any(store_folder.iterdir())


@needs_sh
def test_host_compiler_that_does_not_run(compiler, store_folder, monkeypatch):
    compiler("g++").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(BuildError, match=r"g\+\+ does not run: .*exit status 3"):
        build.build_host(TOY_CPU, "cpu", store_folder)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(BuildError, match="no-such-compiler -m64 does not run: .*No such file"):
        build.build_host(TOY_CPU, "cpu", store_folder)


@needs_sh
def test_which_host_compiler(compiler, monkeypatch):
    """CXX, its arguments and a path with spaces included; else g++ before clang++ before c++."""
    for name in ("c++", "clang++", "g++"):
        compiler(name)
        assert build.host_compiler() == [name]
    spaced = compiler("my c++")
    for text, command in (("clang++ -m64", ["clang++", "-m64"]), ("ccache 'g++' -pipe", ["ccache", "g++", "-pipe"]),
                          (str(spaced), [str(spaced)]), ("my c++", ["my c++"]), ("  ", ["g++"]), ("", ["g++"])):
        monkeypatch.setenv("CXX", text)
        assert build.host_compiler() == command
    monkeypatch.setenv("CXX", "g++ 'open")
    with pytest.raises(BuildError, match="CXX is .*'open.*, no command: No closing quotation"):
        build.host_compiler()
    assert build.build(TOY_CPU, "cpu").route is None            # a reason like any other


@needs_gxx
def test_host_compiler_with_arguments(compiler, monkeypatch, store_folder, cpu_sources):
    names = []
    for cxx in ("g++", "g++ --toy", None):
        compiler("g++")
        monkeypatch.setenv("CXX", cxx) if cxx else monkeypatch.delenv("CXX")
        names.append(build.build_host(TOY_CPU, "cpu", store_folder))
    plain, toy, unset = compiler.calls()
    assert toy.startswith("--toy -std=c++17 ") and plain.startswith("-std=c++17 ")
    assert all(str(cpu_sources / "toy.cpp") in call for call in compiler.calls())
    assert len(set(names)) == 3 and all(cache.NAME.fullmatch(name.name) for name in names)
    assert [path.name.startswith("svdq_toy_cpu_") for path in store_folder.iterdir()] == [True] * 3


@needs_gxx
def test_host_library_name_changes_with_its_makers(compiler, monkeypatch, store_folder, cpu_sources):
    def name():
        return build.build_host(TOY_CPU, "cpu", store_folder)
    compiler("g++")
    names = [name(), name()]
    assert names[0] == names[1] and len(compiler.calls()) == 1          # a second start compiles nothing
    compiler("g++", version="1.1")
    names.append(name())
    monkeypatch.setattr(build, "HOST_FLAGS", (*build.HOST_FLAGS, "-g0"))
    names.append(name())
    for file in CPU_SOURCES:
        (cpu_sources / file).write_text(CPU_SOURCES[file] + "// more\n")
        names.append(name())
    monkeypatch.setenv("CPATH", str(cpu_sources))
    names.append(name())
    assert len(set(names)) == len(compiler.calls()) == 6


@needs_gxx
@DAMAGES
def test_damaged_host_library_is_built_again(compiler, store_folder, how):
    compiler("g++")
    path = build.build_host(TOY_CPU, "cpu", store_folder)
    damaged(path, how)
    with pytest.raises(BuildError, match="no toy kernels for .* in the cache"):
        build.build_host(TOY_CPU, "cpu", store_folder, may_compile=False)
    assert build.build(TOY_CPU, "cpu", store_folder).path == path and len(compiler.calls()) == 2
    assert build.build_host(TOY_CPU, "cpu", store_folder, may_compile=False) == path and len(compiler.calls()) == 2


@needs_gxx
@pytest.mark.parametrize("is_library", [False, True])
def test_foreign_host_library(compiler, store_folder, tmp_path, is_library):
    """Whole, but no library, or one without our functions: removed and built again."""
    compiler("g++")
    content = empty_library(tmp_path / "other.so").read_bytes() if is_library else b"no library"
    calls = len(compiler.calls())
    path = build.build_host(TOY_CPU, "cpu", store_folder)
    path.unlink()
    build.store(path, content)
    with pytest.raises(BuildError, match="could not be loaded and was removed"):
        build.build_host(TOY_CPU, "cpu", store_folder)
    assert not path.exists()
    build.store(path, content)
    built = build.build(TOY_CPU, "cpu", store_folder)
    assert (built.route, built.path, built.reasons) == ("host compiler", path, ()) and len(compiler.calls()) == calls + 2
    assert built.load(None).compiled == ("plain", "fast", "faster")


@needs_gxx
def test_functions_of_a_host_library(compiler, store_folder):
    """The last body that this CPU runs serves; another is for who asks; 1 means no memory."""
    compiler("g++")
    kernels = build.CPUKernels(build.build_host(TOY_CPU, "cpu", store_folder))
    assert (kernels.compiled, kernels.bodies, kernels.body) == (("plain", "fast", "faster"), {"plain": 0, "fast": 1}, "fast")
    for body, total in ((None, 142), ("plain", 42), ("fast", 142)):
        job = Add(2, 40)
        kernels.call("add", job, body)
        assert job.sum == total
    with pytest.raises(KeyError):
        kernels.call("add", Add(), "faster")
    with pytest.raises(MemoryError, match="svdq_add: no memory for Add"):
        kernels.call("add", Add(-1, 0))


@needs_gxx
def test_kernels_of_a_cpu(compiler, monkeypatch, tmp_path, caplog):
    """Built once, said once; where they cannot be loaded, nothing is said of drivers."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler("g++")
    kernels = build.kernels_for(TOY_CPU, None)
    assert build.kernels_for(TOY_CPU, None) is kernels and kernels.route == "host compiler"
    compiling, ready = caplog.messages
    assert re.fullmatch(r"SVDQ: compiling toy kernels for \w+ with g\+\+, once; this may take a minute", compiling)
    assert re.fullmatch(r"SVDQ: kernels toy on the CPU \(\w+\) by host compiler for \w+, ready in \d+\.\d s", ready)
    build._kernels.clear()
    caplog.clear()

    def broken(path):
        raise OSError("out of handles")
    monkeypatch.setattr(build, "CPUKernels", broken)
    monkeypatch.setattr(build.Built, "load", lambda built, device: broken(built.path))
    assert build.kernels_for(TOY_CPU, None) is None
    message, = caplog.messages
    assert "no kernels toy on the CPU, another path serves. out of handles" in message and "driver" not in message


def test_key_of_a_cpu_library_changes_with_each_source(tmp_path, monkeypatch):
    library, = {variant.library for variant in registry.VARIANTS if isinstance(variant.library, build.CPULibrary)}
    before, folder = build.key(library), shutil.copytree(build.CPU, tmp_path / "cpu")
    monkeypatch.setattr(build, "CPU", folder)
    assert build.key(library) == before and library.source in library.texts()
    assert {file.name for file in folder.iterdir()} == library.texts().keys()
    included = {name for text in library.texts().values() for name in re.findall(r'^#include "(.+?)"', text, re.M)}
    assert included | {library.source} == library.texts().keys()
    for file in folder.iterdir():
        text = file.read_text()
        file.write_text(text + "\n")
        assert build.key(library) != before, file.name
        file.write_text(text)
