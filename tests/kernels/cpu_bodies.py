"""The CPU kernels, body by body: those that this machine runs, those whose instructions it lacks, emulated, and edited ones.

    own()                               -> CPUKernels of this machine
    emulated(folder)                    -> CPUKernels in which the bodies of VNNI run, too
    compiled(folder, edits, keep, ...)  -> CPUKernels of edited sources
    serving(kernels, body)              context in which that body serves

Emulated: simulators/vnni.hpp has the instructions of AVX-VNNI and AVX-512 in plain C++ under the names of their intrinsics, and
the sources are compiled with AVX2 in the place of the instruction sets that they name.
"""

import re
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from svdq_pack.svdq.kernels import build
from svdq_pack.svdq.kernels.errors import BuildError
from svdq_pack.svdq.kernels.variants import cpu

SIMULATORS = Path(__file__).parent / "simulators"
VNNI = {"avxvnni": "avx2,fma,f16c,avxvnni", "avx512vnni": "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"}


def needs_compiler():
    """Skips where no library can be built."""
    try:
        build.host_compiler()
    except BuildError as error:
        pytest.skip(str(error).partition(":")[0])


def compiled(folder, edits=(), keep=None, flags=(), name="edited"):
    """CPUKernels of the sources of cpu/ with edits [(file, old, new)], which must be found; of the bodies `keep`, None: all."""
    texts = build.CPULibrary(name, "cpu.cpp").texts()
    for file, old, new in edits:
        assert old in texts[file], f"{file} has no {old}"
        texts[file] = texts[file].replace(old, new)
    if keep is not None:
        for body in ("avx2", "avxvnni", "avx512vnni"):
            if body not in keep:
                text = re.sub(rf"namespace {body} {{.*?\n}}\n", "", texts["cpu.cpp"], flags=re.S)
                texts["cpu.cpp"] = text.replace(f"    BODY({body}),\n", "")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for file, text in texts.items():
        (folder / file).write_text(text)
    made = folder / "made.so"
    subprocess.run([*build.host_compiler(), *build.HOST_FLAGS, *flags, str(folder / "cpu.cpp"), "-o", str(made), "-ldl"],
                   check=True)
    build.store(folder / f"{name}.so", made.read_bytes())
    return build.CPUKernels(folder / f"{name}.so")


def emulated(folder):
    """CPUKernels in which the bodies of VNNI run on any CPU with AVX2."""
    edits = [edit for body, target in VNNI.items() for edit in (
        ("cpu.cpp", f'TARGET("{target}")', 'TARGET("avx2,fma,f16c")'),
        ("cpu.cpp", f"static bool has_{body}() {{", f"static bool has_{body}() {{ return has_avx2(); }}\n"
                    f"[[maybe_unused]] static bool real_{body}() {{"))]
    return compiled(folder, edits, tuple(VNNI), ("-include", str(SIMULATORS / "vnni.hpp"), "-O1"), "emulated")


@cache
def own():
    """The kernels of this machine. Skips where there is no compiler."""
    needs_compiler()
    return build.kernels_for(cpu.LIBRARY, None)


@contextmanager
def serving(kernels, body=None):
    """A body of these kernels in the place of the one that serves."""
    place, before = (cpu.LIBRARY, None), build._kernels.get((cpu.LIBRARY, None))
    usual = kernels.body
    try:
        kernels.body = body or usual
        build._kernels[place] = kernels
        yield
    finally:
        kernels.body = usual
        if before is None:
            del build._kernels[place]
        else:
            build._kernels[place] = before
