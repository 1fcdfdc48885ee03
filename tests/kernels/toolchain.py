"""nvcc and nvdisasm for tests: finds them, compiles a kernel to PTX or to a cubin, caches the result by content.

    ptx(source, arch, defines=(), cute=False)     -> PTX text
    cubin(source, arch, defines=())               -> Built: path of the cubin, and what ptxas said with -v
    sass(cubin path)                              -> SASS text

source is a file of this repository, or CUDA text; with `cute` it may include CuTe. Missing says what is missing; needs_nvcc,
needs_nvdisasm and needs_cute skip a test.

nvcc      of CUDA 12.8 or later: $CUDA_HOME, PATH, or the wheel nvidia-cuda-nvcc and its companions; and a host compiler
nvdisasm  beside nvcc, or of the wheels triton and nvidia-cuda-nvdisasm
CuTe      NVIDIA's headers, in the folder that CUTLASS_INCLUDE names; tests/run.py fetches them

Test: tests/kernels/test_budgets.py
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "svdq" / "kernels" / "cuda"
CACHE = ROOT / "build" / "kernels"                  # ignored by git
FLAGS = ("-x", "cu", "-std=c++17", "-I", str(KERNELS))


class Missing(Exception):
    """A tool is not on this machine."""


class BuildFailed(Exception):
    """The compiler's own words."""


@dataclass(frozen=True)
class Built:
    path: Path
    log: str


def ptx(source, arch="sm_80", defines=(), cute=False):
    # NDEBUG, or CuTe's integers print
    extra = ("-DNDEBUG", "--expt-relaxed-constexpr", "-isystem", _cute()) if cute else ()
    return _build(source, arch, defines, "-ptx", ".ptx", *extra).path.read_text()


def cubin(source, arch, defines=()):
    return _build(source, arch, defines, "-cubin", ".cubin", "-Xptxas", "-v")


def sass(path):
    return _run([nvdisasm(), "-c", str(path)])


@cache
def nvcc():
    """The path of a working nvcc."""
    found = _find("nvcc", [_bin(os.environ.get("CUDA_HOME")), *map(Path, os.get_exec_path()), *_wheels("nvidia/*/bin")])
    if not found:
        raise Missing("no nvcc")
    if os.name != "nt" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Missing("nvcc needs a host compiler, no g++ or clang++")
    return found


@cache
def nvdisasm():
    beside = [Path(line.partition("=")[2]) for line in _dryrun().splitlines() if line.startswith("#$ _HERE_=")]
    found = _find("nvdisasm", [*beside, *_wheels("nvidia/*/bin"), *_wheels("triton/backends/nvidia/bin"),
                               *map(Path, os.get_exec_path())])
    if not found:
        raise Missing("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    return found


def _cute():
    folder = os.environ.get("CUTLASS_INCLUDE")
    if not folder or not Path(folder, "cute").is_dir():
        raise Missing("no CuTe headers (CUTLASS_INCLUDE)")
    return folder


def _bin(home):
    return Path(home) / "bin" if home else None


def _wheels(pattern):
    return sorted(Path(sysconfig.get_path("purelib")).glob(pattern))


def _find(name, folders):
    return next((str(folder / file) for folder in folders if folder for file in (name, name + ".exe")
                 if os.access(folder / file, os.X_OK) and (folder / file).is_file()), None)


@cache
def _dryrun():
    """What nvcc would do, where its folder is named: nvcc on the PATH may be a script that calls the real one."""
    return subprocess.run([nvcc(), "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr


@cache
def _about():
    return _run([nvcc(), "--version"])


def version():
    """That of nvcc, as 13.0.88."""
    return re.search(r"release .*, V([\d.]+)", _about())[1]


def _build(source, arch, defines, kind, suffix, *extra):
    """Compiles unless the same text, headers, flags and nvcc did so before."""
    is_file = isinstance(source, Path)
    text = source.read_bytes() if is_file else source.encode()
    flags = [*FLAGS, kind, f"-arch={arch}", *(f"-D{define}" for define in defines), *extra]
    # flags without the folder, so that a checkout may move
    key = hashlib.sha256(b"\0".join([text, *_included(text), " ".join(flags).replace(str(ROOT), "").encode(),
                                     _about().encode()])).hexdigest()[:24]
    out, log = CACHE / (key + suffix), CACHE / (key + suffix + ".log")
    if not (out.is_file() and log.is_file()):
        CACHE.mkdir(parents=True, exist_ok=True)
        input_, partial, words = (CACHE / f"{key}.{os.getpid()}{end}" for end in (".cu", suffix, ".log"))
        try:
            if not is_file:
                input_.write_bytes(text)
            said = _run([nvcc(), *flags, str(source if is_file else input_), "-o", str(partial)], stderr=True)
            words.write_text(said)
            words.replace(log)                      # whole or not at all, also with two test runs at a time
            partial.replace(out)
        finally:
            input_.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
            words.unlink(missing_ok=True)
    return Built(out, log.read_text())


def _included(text):
    """The contents of the kernel headers that this text includes, and of those that they do."""
    for name in re.findall(rb'^\s*#include "(.+?)"', text, re.M):
        header = (KERNELS / name.decode()).read_bytes()
        yield header
        yield from _included(header)


def _run(command, stderr=False):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + (done.stderr if stderr else "")


def _needs(find):
    try:
        find()
    except Missing as missing:
        return pytest.mark.skipif(True, reason=str(missing))
    return pytest.mark.skipif(False, reason="")


needs_nvcc, needs_nvdisasm, needs_cute = _needs(nvcc), _needs(nvdisasm), _needs(_cute)
