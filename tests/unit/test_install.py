"""install.py: what it says with no, one and several GPUs, that it builds for each kind, that it never fails."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdq_pack.svdq.kernels import build, registry
from svdq_pack.tests.unit.layers import needs_kernels

ROOT = Path(__file__).resolve().parents[2]
ARCH = platform.machine().lower()
spec = importlib.util.spec_from_file_location("svdq_install", ROOT / "install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def run(tmp_path, python="pass", **env):
    """As a manager runs it: by path, from anywhere. `python` is code that runs before it."""
    start = f"import runpy; {python}; runpy.run_path({str(ROOT / 'install.py')!r}, run_name='__main__')"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), **env}
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_gpu(tmp_path):
    """The kernels of the CPU come from the user's cache, where needs_kernels has put them."""
    needs_kernels()
    said = run(tmp_path, XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", ""))
    assert torch.__version__ in said and "SVDQ: no CUDA GPU found; layers run on the CPU\n" in said
    assert f"SVDQ: kernels cpu for {ARCH} by host compiler, ready in " in said and "compiling" not in said
    assert [line.split(":")[1].strip() for line in lines_of(said, "cpu\n")] == ["'w4a8_cpu'", "'exact_cpu'", "'exact_cpu'"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_and_a_compiler(tmp_path):
    first, second = (run(tmp_path, PATH=str(tmp_path), CXX="") for _ in range(2))
    assert first == second and "no CUDA GPU found" in first and "not host compiler: no C++ compiler: neither g++" in first
    assert f"no kernels cpu for {ARCH}; another path serves. To have them, install g++ or clang++" in first
    int4, nvfp4, awq = lines_of(first, "cpu\n")
    assert int4.startswith("int4: 'weight_only': ") and "not 'w4a8_cpu', which did not build" in int4
    assert nvfp4.startswith("nvfp4: 'weight_only': ") and awq.startswith("awq: 'weight_only': ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]         # nothing built, nothing left behind


def lines_of(said, start):
    """The lines of plans after the one that starts so."""
    _, found, rest = said.partition(f"SVDQ: {start}")
    assert found, said
    lines = [line.removeprefix("SVDQ:     ") for line in rest.splitlines() if line.startswith("SVDQ:     ")]
    return lines[:3]            # one for each precision


def test_without_torch(tmp_path):
    said = run(tmp_path, "import importlib.util; importlib.util.find_spec = lambda name: None")
    assert "no torch in this Python" in said and "ComfyUI" in said


def test_broken_driver(tmp_path):
    """torch that raises when asked for GPUs; a console that cannot show its words."""
    said = run(tmp_path, "import torch; torch.cuda.device_count = lambda: 1; "
               "torch.cuda.get_device_name = lambda index: (_ for _ in ()).throw(RuntimeError('kaputt \\xfc'))",
               PYTHONIOENCODING="ascii")
    assert "could not look at this machine: kaputt \\xfc" in said and "doctor" in said


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """gpus((name, capability), ...): what torch.cuda shows; `failing` names libraries that do not build. `gpus.built`: the
    (arch, library) that were built."""
    asked = []

    def describe(*devices, failing=()):
        def built(library, arch):
            if library.name in failing:
                return build.Built(library, arch, None, None, 0.1, ("cpp_extension: a", "nvrtc: b"))
            return build.Built(library, arch, "nvrtc", [tmp_path / f"{library.name}_{arch}.cubin"], 2.5, ("why",))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: devices[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index][1])
        monkeypatch.setattr(build, "build", lambda library, arch: asked.append((arch, library.name)) or built(library, arch))
        monkeypatch.setattr(registry, "trusted", lambda variant, target: (
            variant.library is None or built(variant.library, variant.library.arch(target.capability)).route is not None))
    describe.built = asked
    return describe


def test_several_kinds_of_gpu(gpus, capsys):
    gpus(("RTX 3090", (8, 6)), ("H100", (9, 0)), ("RTX 3090", (8, 6)))
    install.main()
    said = capsys.readouterr().out
    assert sorted(gpus.built) == [        # for each kind once, and only what it can run
        ("sm_86", "awq_gemv"), ("sm_86", "dequant"), ("sm_86", "w4a4_normal"), ("sm_86", "w4a4_sm80"), ("sm_86", "w4a8_int8"),
        ("sm_90", "awq_gemv"), ("sm_90", "dequant"), ("sm_90", "w4a8_int8"), ("sm_90a", "w4a8_sm90")]
    assert "kernels w4a4_sm80 for sm_86 by nvrtc, ready in 2.5 s:\n    " in said and "w4a8_sm90_sm_90a.cubin" in said
    assert "not why" in said
    for gpu, fused in (("cuda:0 RTX 3090, sm_86", "'w4a4_sm80': fused W4A4"),
                       ("cuda:1 H100, sm_90", "'w4a8_sm90': fused kernels"),
                       ("cuda:2 RTX 3090, sm_86", "'w4a4_sm80': fused W4A4")):
        int4, nvfp4, awq = lines_of(said, gpu)
        assert int4.startswith(f"int4: {fused}") and awq.startswith("awq: 'awq_gemv': fused")
        assert nvfp4.startswith("nvfp4: 'dequant': ")


def test_kernels_that_cannot_be_built(gpus, capsys):
    gpus(("RTX 3090", (8, 6)), failing=("w4a4_sm80", "w4a4_normal", "w4a8_int8", "awq_gemv", "dequant"))
    install.main()
    said = capsys.readouterr().out
    for name in ("w4a4_sm80", "w4a4_normal", "w4a8_int8", "awq_gemv", "dequant"):
        assert f"no kernels {name} for sm_86; another path serves. To have them" in said
    assert said.count("not cpp_extension: a") == said.count("not nvrtc: b") == 5
    int4, _, awq = lines_of(said, "cuda:0 RTX 3090, sm_86")
    assert "weight_only" in int4 and "weight_only" in awq and "doctor" in int4


def test_a_library_that_fails_costs_no_other(gpus, capsys):
    gpus(("RTX 3090", (8, 6)), failing=("w4a4_sm80",))
    install.main()
    int4, _, awq = lines_of(capsys.readouterr().out, "cuda:0 RTX 3090, sm_86")
    assert "w4a4_fp16n" in int4 and "not 'w4a4_sm80'" in int4 and "'awq_gemv'" in awq


@pytest.mark.parametrize("name, libraries", [
    ("RTX 2080", ["w4a4_sm75", "awq_gemv", "dequant"]), ("GTX 1660 Ti", ["awq_gemv", "dequant"])])
def test_turing(gpus, capsys, name, libraries):
    """With tensor cores and without."""
    gpus((name, (7, 5)))
    install.main()
    assert sorted(gpus.built) == sorted(("sm_75", library) for library in libraries)
    int4, _, awq = lines_of(capsys.readouterr().out, f"cuda:0 {name}, sm_75")
    assert awq.startswith("awq: 'awq_gemv': fused")
    assert int4.startswith(f"int4: '{'w4a4_sm75' if 'w4a4_sm75' in libraries else 'dequant'}': ")


def test_old_gpu(gpus, capsys):
    gpus(("V100", (7, 0)))
    install.main()
    int4, _, awq = lines_of(capsys.readouterr().out, "cuda:0 V100, sm_70")
    assert gpus.built == [] and "weight_only" in int4 and "weight_only" in awq and "sm_70" in int4


def test_gpu_of_another_maker(gpus, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    gpus(("Radeon", (11, 0)))
    install.main()
    int4, _, awq = lines_of(capsys.readouterr().out, "cuda:0 Radeon")
    assert gpus.built == [] and "weight_only" in int4 and "not " not in int4 + awq       # nothing of kernels for CUDA
