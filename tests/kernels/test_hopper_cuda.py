"""The Hopper kernels on an H100, H200 or GH200: each instruction against the emulator, then results as in test_hopper.py.

Skipped elsewhere. Nothing here has run yet: .ci/gpu does it in one call.
"""

import ctypes
import shutil
from functools import cache

import pytest
import torch
from svdq_pack.kernels import build, check, epilogues, layout, ops, registry, weights
from svdq_pack.kernels.variant import HALVES, Target
from svdq_pack.kernels.variants import w4a8_sm90
from svdq_pack.kernels.variants.w4a8_sm90 import FP8Weight, gemm_fp8, quant_fp8
from svdq_pack.tests.kernels import test_emulated as emulated
from svdq_pack.tests.kernels import test_hopper as checks
from svdq_pack.tests.kernels import test_hopper_emulator as instructions

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
MODES = pytest.mark.parametrize("mode", ["token", "group"])


@pytest.fixture(autouse=True)
def sums_of_tensor_cores(monkeypatch):
    """Beyond fp32: FP8 sums keep 13 bits, which leaves 4e-5 of the terms in the token mode and nothing in the group mode."""
    monkeypatch.setattr(emulated, "FP32", 1e-4)


# Instructions

@cache
def compiled(text, folder):
    path = folder / "k.cubin"
    build.store(path, build.load_nvrtc().compile("k.cuh", {**w4a8_sm90.LIBRARY.texts(), "k.cuh": text}, "sm_90a"))
    return build.CubinKernels([path], 0, ["k"])


@pytest.mark.skipif(build.load_nvrtc() is None or not shutil.which("g++"), reason="no NVRTC or no g++")
@pytest.mark.parametrize("case", instructions.CASES)
def test_instruction(case, tmp_path):
    """Bit for bit, but for sums of 16-bit floats; sums of e4m3 as the emulator cuts them to 13 bits."""
    parameters, body, arguments, block, shared, cluster = instructions.CASES[case]()
    moved = [a if isinstance(a, int) else torch.from_numpy(a.view("int8").copy()).cuda() for a in arguments]
    values = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in moved]
    compiled(instructions.text_of(parameters, body), tmp_path).launch(
        "k", (cluster, 1), block, values, torch.cuda.current_stream().cuda_stream, shared, cluster)
    got, want = moved[-1].cpu().numpy().view(arguments[-1].dtype), instructions.emulate(case, fp8_bits=13)
    if "16" in case:
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want), rtol=1e-5, atol=1e-4)
    else:
        assert (got.view("uint8") == want.view("uint8")).all()


# The kernels

def on_gpu(fp8):
    return type(fp8)(**{name: value.cuda() if isinstance(value, torch.Tensor) else value
                        for name, value in vars(fp8).items()})


def run(layer, x, mode, cluster=2, accumulate=None, epilogue=None):
    """(quantised, out) on the CPU, from the GPU."""
    given = {name: value.cuda() if isinstance(value, torch.Tensor) else value
             for name, value in checks.operands_of(epilogue).items()}
    weight = on_gpu(layer.fp8)
    out = torch.full((x.shape[0], layer.N), float("nan"), dtype=x.dtype) if accumulate is None else accumulate
    out = out.cuda()
    quantised = quant_fp8(x.cuda(), weight.inverse, weight.proj_down, layer.unsigned, mode == "group")
    gemm_fp8(*quantised, weight.qweight, weight.wscales, weight.proj_up, layer.bias.cuda(), out,
                   accumulate is not None, cluster, **given)
    return [part.cpu() for part in quantised], out.cpu()


def check(layer, tokens, mode, cluster=2):
    x = layer.x(tokens)
    quantised, out = run(layer, x, mode, cluster)
    checks.check_quant(layer, x, mode, quantised)
    want, size = checks.exact(layer, quantised)
    emulated.assert_rounded(out, want[:tokens], size[:tokens], "out")


@MODES
@pytest.mark.parametrize("unsigned", [False, True], ids=["s", "u"])
@checks.DTYPES
@pytest.mark.parametrize("tokens, rank", [(1, 0), (15, 16), (17, 32), (63, 48), (127, 64), (129, 112), (257, 128),
                                          (4250, 32)])
def test_linear(tokens, rank, dtype, unsigned, mode):
    check(checks.Layer(rank, dtype, unsigned), tokens, mode, cluster=1 + tokens % 2)


@MODES
@pytest.mark.parametrize("rows, columns, unsigned", [
    (9216, 3072, False), (3072, 3072, False), (12288, 3072, False), (3072, 12288, True)], ids=["qkv", "out", "fc1", "fc2"])
def test_flux_layers(rows, columns, unsigned, mode):
    check(checks.Layer(32, torch.bfloat16, unsigned, rows, columns), 300, mode)


@MODES
@pytest.mark.parametrize("cluster", [1, 2])
def test_bytes(cluster, mode):
    check(checks.Layer(16, rows=512, columns=1280, wide=True), 130, mode, cluster)


@MODES
def test_runs_and_clusters_agree_to_the_bit(mode):
    layer = checks.Layer(32, rows=3072, columns=3072)
    x = layer.x(1000)
    first = run(layer, x, mode)
    for i in range(100):
        quantised, out = run(layer, x, mode, 1 + i % 2)
        assert torch.equal(out, first[1])
        assert all(map(torch.equal, quantised, first[0]))


@MODES
def test_accumulate(mode):
    layer = checks.Layer(16)
    x, before = layer.x(77), torch.randn(77, layer.N).to(layer.dtype)
    fresh, total = run(layer, x, mode)[1], run(layer, x, mode, accumulate=before)[1]
    assert torch.equal(total, (before.float() + fresh.float()).to(layer.dtype))


# Epilogues

def check_epilogue(layer, tokens, mode, kind, cluster):
    epilogue = checks.epilogue_of(kind, tokens, layer.N, layer.dtype)
    before = torch.randn(tokens, layer.N).to(layer.dtype) if "+=" in kind else None
    quantised, out = run(layer, layer.x(tokens), mode, cluster, before, epilogue)
    y, size = checks.exact(layer, quantised)
    want, size = checks.finished(epilogue, y[:tokens], size[:tokens], before)
    if kind == "gelu":                                      # tanh.approx is off by up to 2^-11 of itself
        size = size + y[:tokens].abs() * 2.0**-12 / emulated.FP32
    emulated.assert_rounded(out, want, size, kind)


@MODES
@checks.DTYPES
@checks.EPILOGUES
@pytest.mark.parametrize("tokens, rank", [(1, 0), (15, 16), (17, 32), (129, 64), (257, 128)])
def test_epilogue(tokens, rank, kind, dtype, mode):
    check_epilogue(checks.Layer(rank, dtype, rows=384 * (1 + tokens % 3)), tokens, mode, kind, 1 + tokens % 2)


@MODES
@pytest.mark.parametrize("rows, columns, unsigned, kind", [
    (9216, 3072, False, "qkv"), (3072, 3072, False, "gated"), (12288, 3072, False, "gelu"), (3072, 12288, True, "gated +=")])
def test_epilogue_of_flux_layers(rows, columns, unsigned, kind, mode):
    check_epilogue(checks.Layer(32, torch.bfloat16, unsigned, rows, columns), 300, mode, kind, 2)


@MODES
@checks.EPILOGUES
def test_epilogues_agree_to_the_bit(kind, mode):
    """100 runs, alone and in pairs of CTAs, into memory that held other things."""
    layer, tokens = checks.Layer(32, rows=3072, columns=1024), 1000
    x, epilogue = layer.x(tokens), checks.epilogue_of(kind, tokens, layer.N, layer.dtype)
    before = torch.randn(tokens, layer.N).to(layer.dtype) if "+=" in kind else None
    first = run(layer, x, mode, 2, before, epilogue)[1]
    for i in range(100):
        assert torch.equal(run(layer, x, mode, 1 + i % 2, before, epilogue)[1], first)


@pytest.mark.parametrize("wide", [False, True])
def test_residual_may_be_out(wide):
    layer, tokens = checks.Layer(32, rows=384, columns=768, wide=wide), 1000
    weight, x = on_gpu(layer.fp8), layer.x(tokens).cuda()
    gate = torch.randn(layer.N, device="cuda").to(x.dtype)
    joint = torch.randn(2, tokens + 77, layer.N, device="cuda").to(x.dtype)
    kept, want = joint.clone(), torch.empty(tokens, layer.N, dtype=x.dtype, device="cuda")
    out = joint[1, 77:]
    checks.W4A8.run(x, weight, want, None, False, epilogues.Gated(kept[1, 77:], gate))
    checks.W4A8.run(x, weight, out, None, False, epilogues.Gated(out, gate))
    assert torch.equal(out, want) and torch.equal(joint[0], kept[0]) and torch.equal(joint[1, :77], kept[1, :77])


@pytest.mark.parametrize("code, act", [(7, 15), (-8, 15), (-7, -7), (None, 15), (None, None)])
def test_integers_are_exact(code, act):
    """GROUP: sums of 64 integers to the bit, in an fp16 output that can show it: scales are powers of two."""
    rows, columns, tokens = 256, 256, 128
    random = torch.Generator().manual_seed(7)
    codes = torch.randint(-8, 8, (rows, columns), generator=random) if code is None else torch.full((rows, columns), code)
    values = torch.randint(0, 16, (tokens, columns), generator=random) if act is None else torch.full((tokens, columns), act)
    if code is None and act is not None:
        codes = torch.where(torch.arange(columns) % 2 == 0, 7, -7).expand(rows, columns)
    weight = FP8Weight.pack(weights.W4A4Weight(
        "int4", False, layout.pack_codes((codes & 15).to(torch.uint8).contiguous()),
        layout.pack_scales(torch.ones(rows, columns // 64, dtype=torch.float16)), torch.ones(columns, dtype=torch.float16)))
    weight = on_gpu(weight)
    chunks = values.float().to(torch.float8_e4m3fn).view(torch.uint8).view(tokens // 16, 16, 2, 8, 16).permute(0, 2, 1, 3, 4)
    row, chunk = torch.arange(16)[:, None], torch.arange(8)
    qact = chunks[:, :, row, chunk ^ row & 7].reshape(tokens // 16, 2, 16, 128).contiguous()
    for group in range(columns // 64):                      # one group at a time: its sum, at most 7680, is an fp16 number
        scales = torch.zeros(tokens // 16, 2, 2, 4, 4)      # or, where odd and above 2048, halfway between two
        scales.view(tokens // 16, 4, 16)[:, group] = 0.25
        out = torch.zeros(tokens, rows, dtype=torch.bfloat16, device="cuda").half()
        gemm_fp8(qact.cuda(), scales.cuda(), torch.zeros(tokens // 16, 2, 0, 8, 8, dtype=torch.float16, device="cuda"),
                       weight.qweight, weight.wscales, None, None, out, False)
        part = slice(64 * group, 64 * group + 64)
        want = (values[:, part].double() @ codes[:, part].double().T / 4).half()
        assert torch.equal(out.cpu(), want)


@MODES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_token(value, mode):
    layer = checks.Layer(16, rows=256)
    x = layer.x(40)
    clean = run(layer, x, mode)[1]
    x[5, 77] = value
    out = run(layer, x, mode)[1]
    others = torch.arange(40) != 5
    assert out[5].isnan().all() and torch.equal(out[others], clean[others])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_self_test_and_dispatch(dtype):
    assert [check.small(variant, "cuda:0") for variant in (checks.W4A8, checks.W4A4)] == [[], []]
    layer = checks.Layer(32, dtype)
    weight = type(layer.weight)(**{name: value.cuda() if isinstance(value, torch.Tensor) else value
                                   for name, value in vars(layer.weight).items()})
    prepared = registry.pack(weight, dtype)
    assert isinstance(prepared, FP8Weight) and torch.equal(prepared.qweight.cpu(), layer.fp8.qweight)
    x, outs = layer.x(33).cuda(), {}
    for bits, name in ((None, "w4a8_sm90"), (8, "w4a8_sm90"), (4, "w4a4_sm90")):
        assert registry.plan(prepared, Target.of("cuda:0"), dtype, bits).variant.name == name
        outs[bits] = torch.zeros(33, layer.N, dtype=dtype, device="cuda")
        ops.linear(x, prepared, outs[bits], layer.bias.cuda(), act_bits=bits)
    assert torch.equal(outs[None], outs[8]) and not torch.equal(outs[8], outs[4])


def test_cuda_graph():
    layer = checks.Layer(32)
    weight, x = on_gpu(layer.fp8), layer.x(129).cuda()
    out, want = (torch.zeros(129, layer.N, dtype=x.dtype, device="cuda") for _ in range(2))
    checks.W4A8.run(x, weight, want, None, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        checks.W4A8.run(x, weight, out, None, False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
