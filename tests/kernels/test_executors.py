"""What stands between a kernel test and whoever runs the kernel: what it passes on, where it skips, its stand-ins."""

import pytest
import torch

from svdq_pack.svdq.kernels import build, launch
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.svdq.kernels.variants import awq_gemv, w4a8_sm90
from svdq_pack.tests.kernels.executors import Executor, Gpu, RecordedGraph, TextLibrary, constants


def test_recorded_graph():
    """It does what a CUDA graph does: the same operators on the same memory."""
    x, graph = torch.ones(3), RecordedGraph()
    with graph:
        y = x.new_empty(3)
        y.copy_(x * 2)
        z = y[1:].add_(1) + x[0]
    before = x.data_ptr(), y.data_ptr(), z.data_ptr()
    x.fill_(10)
    assert z.tolist() == [4, 4]
    graph.replay()
    assert (y.tolist(), z.tolist()) == ([20, 21, 21], [31, 31]) and (x.data_ptr(), y.data_ptr(), z.data_ptr()) == before


W4A8, AWQ = w4a8_sm90.VARIANTS[0], awq_gemv.VARIANTS[0]


@pytest.fixture
def card(monkeypatch):
    """card((9, 0)): a GPU that is the CPU. Gives the launches that reach it."""
    def pretend(capability):
        launches = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(Target, "of", lambda device: Target("cuda", capability, 0))
        monkeypatch.setattr(launch, "launch", lambda *call: launches.append(call))
        monkeypatch.setattr(Gpu, "device", "cpu")
        return launches
    return pretend


def test_skips_where_there_is_no_gpu_for_the_kernels(monkeypatch, card):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="^no CUDA GPU$"):
        Gpu(W4A8, 1e-4)
    for capability, variant, why in (((8, 9), W4A8, "GPU is sm_89, kernels are for sm_90$"),
                                     ((7, 0), AWQ, "GPU is sm_70, kernels are for sm_75 to ")):
        card(capability)
        with pytest.raises(pytest.skip.Exception, match=why):
            Gpu(variant, 1e-4)


def test_a_gpu_is_given_every_launch(monkeypatch, card):
    launches = card((9, 0))
    gpu = Gpu(W4A8, 1e-4)
    gpu.install(monkeypatch)
    x = gpu.put(torch.ones(20, 128, dtype=torch.bfloat16))
    parts = w4a8_sm90.quant_fp8(x, torch.ones(128), None, False, False)
    (library, like, name, *_), = launches
    assert (library, name, [name]) == (w4a8_sm90.LIBRARY, "quant_fp8_bf16_token_s_r32", gpu.launched) and like is x
    assert len(parts) == 3 and gpu.devices == ("cuda:0", "cuda:1", "cuda:2") and gpu.slack == 1e-4
    with gpu.set(ctas=7):
        assert launch.processors(torch.device("cpu")) == 7
    assert launch.processors(torch.device("cpu")) == 2
    with gpu.set(sources={"quant_fp8.cuh": ""}), pytest.raises(ValueError, match="kernels of this checkout"):
        w4a8_sm90.quant_fp8(x, torch.ones(128), None, False, False)


def test_kernels_of_a_text_are_built_on_a_gpu(monkeypatch, card, tmp_path):
    card((9, 0))
    library, made = TextLibrary("toy", {"toy.cuh": ("k",)}, True, {"toy.cuh": '#include "ptx.cuh"\n'}), []
    monkeypatch.setattr(build, "load_nvrtc", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="no NVRTC"):
        Gpu(W4A8, 1e-4).build(library, tmp_path)
    monkeypatch.setattr(build, "load_nvrtc", lambda: object())
    monkeypatch.setattr(build, "build_cubins", lambda *call: made.append(call) or [])
    monkeypatch.setattr(build.Built, "load", lambda built, device: (built.route, device))
    monkeypatch.setattr(build, "_kernels", {})
    Gpu(W4A8, 1e-4).build(library, tmp_path)
    assert made == [(library, "sm_90a", tmp_path)] and build._kernels == {(library, 0): ("nvrtc", 0)}
    assert library.texts().keys() == {"toy.cuh", "ptx.cuh"} and "TABLE[]" in library.launcher()


def test_what_is_put_is_aligned_and_keeps_its_strides():
    put, odd = Executor().put, torch.arange(41.0)[1:]
    assert put(odd).data_ptr() % 16 == 0 and torch.equal(put(odd), odd)
    rows = odd.view(5, 8)[:, :6]
    assert put(rows).stride() == (8, 1) and torch.equal(put(rows), rows) and put(None) is None
    aligned = torch.ones(4)
    assert put([aligned, None])[0] is aligned


def test_constants_are_read_off_the_text():
    text = 'extern "C" __global__ void\nkernel(const u16* x, u32* y, const Table table, int n, float eps) {\n}'
    assert constants(text, "kernel") == [True, False, True, True, True]
    for library in (W4A8.library, AWQ.library):
        for name in library.kernels:
            outputs = [i for i, is_constant in enumerate(constants(library.source_of(name), name)) if not is_constant]
            assert outputs == {"quant_fp8": [3, 4, 5], "gemm_fp8": [7], "adaln_fp8": [],
                               "awq_gemv": []}["_".join(name.split("_")[:2])]
    with pytest.raises(ValueError, match="^other: its file has no `other"):
        constants(text, "other")
