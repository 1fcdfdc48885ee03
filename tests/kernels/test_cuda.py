"""The torch paths and the fused kernels on a real GPU, against the CPU. Skipped where there is none."""

import threading
from dataclasses import replace

import pytest
import torch
from svdq_pack.kernels import build, layout, ops, reference, registry, weights
from svdq_pack.kernels.errors import BuildError
from svdq_pack.kernels.launch import MAX_RANK
from svdq_pack.kernels.variant import FLOATS, HALVES
from svdq_pack.kernels.variants import awq_gemv, w4a4_sm80
from svdq_pack.tests.kernels import test_emulated as emulated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
N, K, RANK = 384, 512, 32


def random_weight(kind):
    """A random weight of this kind, on the CPU."""
    random = torch.Generator().manual_seed(1)

    def half(*size):
        return (torch.rand(*size, generator=random) + 0.5).to(torch.bfloat16)

    if kind == "awq":
        codes = torch.randint(0, 16, (N, K), generator=random, dtype=torch.uint8)
        return weights.AWQWeight(layout.pack_awq(codes), half(K // 64, N), -7 * half(K // 64, N))
    precision = kind.removesuffix("_unsigned")
    scales = half(N, K // layout.GROUP[precision])
    if precision == "nvfp4":
        scales = scales.to(torch.float8_e4m3fn)
    codes = torch.randint(0, 16, (N, K), generator=random, dtype=torch.uint8)
    return weights.W4A4Weight(precision, kind.endswith("_unsigned"), layout.pack_codes(codes), layout.pack_scales(scales),
                          half(K), half(K, RANK), half(N, RANK),
                          wcscales=half(N) if precision == "nvfp4" else None)


def moved(weight, device):
    return type(weight)(**{name: value.to(device) if isinstance(value, torch.Tensor) else value
                           for name, value in vars(weight).items()})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", ["weight_only", "reference"])
@pytest.mark.parametrize("kind", ["int4", "int4_unsigned", "nvfp4", "awq"])
def test_linear_on_gpu_equals_cpu(kind, variant, dtype):
    weight, x = random_weight(kind), torch.randn(17, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    with registry.using(variant):
        cpu, first, again = (torch.zeros(17, N, dtype=dtype, device=device) for device in ("cpu", "cuda", "cuda"))
        ops.linear(x, weight, cpu)
        there = moved(weight, "cuda")
        ops.linear(x.cuda(), there, first)
        ops.linear(x.cuda(), there, again)
    assert torch.equal(first, again)
    error = (first.cpu().double() - cpu.double()).norm() / cpu.double().norm()
    # 16 bit: both round, in another order; the reference may flip a code of one activation
    assert error < {torch.float32: 1e-5 if variant == "weight_only" else 5e-3}.get(dtype, 1e-2)


# The fused kernels, on a GPU that has their instruction or emulates it. tests/kernels/test_emulated.py asks the CPU
# emulator the same with the same helpers.

NATIVE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_kernels = pytest.mark.skipif(not NATIVE, reason="no CUDA GPU" + " of sm_80 or later" * torch.cuda.is_available())
TOKENS = [1, 15, 16, 17, 63, 64, 65, 255, 257, 4608]
RANKS = [0, 16, 32, 128, 144]
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])


@pytest.fixture(autouse=True)
def sums_of_tensor_cores(monkeypatch):
    """They cut off where the emulator rounds: fp32 sums may be off by this much of the sum of absolute terms."""
    monkeypatch.setattr(emulated, "FP32", 1e-6)


def weight_of(layer):
    """The W4A4Weight of a layer of test_emulated, on the CPU."""
    p, branch = layer.packed, layer.R > 0
    return weights.W4A4Weight("int4", layer.unsigned, p["qweight"], p["wscales"], p["smooth"],
                          p["proj_down"] if branch else None, p["proj_up"] if branch else None)


def run_layer(layer, x, bias=True, out=None, accumulate=False):
    """(quant_down's results, out) of the fused operators on x's device."""
    w = moved(weight_of(layer), x.device)
    b = layer.packed["bias"].to(x.device) if bias else None
    quantised = w4a4_sm80.quant_down(x, w.smooth, w.proj_down, w.unsigned)
    out = x.new_zeros(x.shape[0], layer.N) if out is None else out
    w4a4_sm80.gemm_w4a4(*quantised, w.qweight, w.wscales, w.proj_up, b, out, w.unsigned, accumulate)
    return quantised, out


def as_emulated(quantised):
    """quant_down's results in the shapes that test_emulated's helpers take, on the CPU."""
    qact, ascales, low = (tensor.cpu() for tensor in quantised)
    return qact.view(*qact.shape[:3], 8, 4, 2, 2), ascales, low.view(*low.shape[:2], 8, 4, 2, 2, 2)


def check_quantised(layer, x, quantised):
    """Codes and scales as in reference.py, but for ties; `low` against float64; nothing in the rows past M."""
    qact, ascales, low = as_emulated(quantised)
    tokens, x = x.shape[0], x.cpu()
    codes, scales, _ = reference.quant_down(x, layer.smooth, layer.proj_down, precision="int4", unsigned=layer.unsigned)
    got = emulated.unpack_act(qact, layer.unsigned)
    apart = (got[:tokens] - codes.int()).abs()
    assert apart.max() <= 1 and apart.sum() <= max(1, 1e-4 * apart.numel())         # ties
    assert torch.equal(emulated.unpack_ascales(ascales)[:tokens], scales.float())
    for values in (got, emulated.unpack_ascales(ascales), emulated.unpack_low(low)):
        assert not values[tokens:].any()
    if layer.R:
        down = layer.proj_down.double()
        low, size = emulated.unpack_low(low)[:tokens], x.double().abs() @ down.abs()
        emulated.assert_rounded(low, x.double() @ down, size, "low")


def check_gemm(layer, quantised, out):
    """Against float64 from the same codes: fp32 sums, rounded once."""
    want, size = emulated.exact(layer, as_emulated(quantised))
    tokens = out.shape[0]
    emulated.assert_rounded(out.cpu(), want[:tokens], size[:tokens], "out")


@needs_kernels
@UNSIGNED
@DTYPES
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_fused(tokens, rank, dtype, unsigned):
    layer = emulated.Layer(rank, dtype, unsigned)
    x = layer.x(tokens).cuda()
    if rank > MAX_RANK:           # in parts, by the linear that users call
        with registry.using("w4a4_emulated"):
            out = x.new_zeros(tokens, layer.N)
            ops.linear(x, moved(weight_of(layer), "cuda"), out, layer.packed["bias"].cuda())
        want = reference.linear_w4a4(x.cpu(), replace(weight_of(layer).logical(), bias=layer.bias)).double()
        assert (out.cpu().double() - want).norm() <= 1e-2 * want.norm()
        return
    quantised, out = run_layer(layer, x)
    check_quantised(layer, x, quantised)
    check_gemm(layer, quantised, out)


@needs_kernels
@DTYPES
@pytest.mark.parametrize("rows, columns, unsigned", [(9216, 3072, False), (3072, 12288, True), (12288, 3072, False)])
def test_flux_shapes(rows, columns, unsigned, dtype):
    layer, tokens = emulated.Layer(32, dtype, unsigned, rows=rows, columns=columns), 129
    x = layer.x(tokens).cuda()
    quantised, out = run_layer(layer, x)
    check_quantised(layer, x, quantised)
    check_gemm(layer, quantised, out)


@needs_kernels
@pytest.mark.parametrize("name", ["r32", "nobias_r16", "padded_n192_k192_r20", "unsigned_fc2_r16", "smooth_fused_r16"])
def test_golden_linear(golden, name):
    tensors = golden(f"linear_int4_{name}")
    layer = emulated.read_layer(tensors, unsigned="unsigned" in name)
    x = layout.pad(tensors["io.x"], 1, layer.K).cuda()
    (qact, ascales, low), out = run_layer(layer, x)
    want = tensors["io.y_act_quant"].double()
    live = (tensors["io.ascales"] != 0).repeat_interleave(64, 1)
    codes = emulated.unpack_act(as_emulated((qact, ascales, low))[0], layer.unsigned)[:len(x)]
    assert (codes != tensors["io.q_act"].int())[live].float().mean() < 1e-4
    assert torch.equal(emulated.unpack_ascales(ascales.cpu())[:len(x)], tensors["io.ascales"].float())
    assert (out.cpu()[:, :want.shape[1]].double() - want).norm() <= 4e-3 * want.norm()


@needs_kernels
@DTYPES
@pytest.mark.parametrize("columns", [64, 1088, 3072])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_awq_gemv(batch, columns, dtype):
    """76 layers of unequal height in one launch, as a FLUX step has them."""
    random = torch.Generator().manual_seed(batch)
    layers = [emulated.awq_layer(random, 96 + 4 * i, columns, dtype) for i in range(76)]
    x = torch.nn.functional.silu(torch.randn(batch, columns, generator=random)).to(dtype)
    outs = awq_gemv.awq_gemv(x.cuda(), [layout.pack_awq(a.codes).cuda() for a in layers],
                          [a.wscales.T.contiguous().cuda() for a in layers],
                          [a.wzeros.T.contiguous().cuda() for a in layers], [a.bias.cuda() for a in layers])
    for layer, out in zip(layers, outs):
        scales, zeros = (values.double().repeat_interleave(64, 1) for values in (layer.wscales, layer.wzeros))
        want = x.double() @ (layer.codes.double() * scales + zeros).T + layer.bias.double()
        size = x.double().abs() @ (layer.codes.double() * scales.abs() + zeros.abs()).T + layer.bias.double().abs()
        emulated.assert_rounded(out.cpu(), want, size, "out")


@needs_kernels
@pytest.mark.parametrize("name", ["awq_adanorm_zero", "awq_plain_k1024"])
def test_golden_awq(golden, name):
    tensors = golden(name)
    out, = awq_gemv.awq_gemv(tensors["io.x"].cuda(), [tensors["packed.qweight"].cuda()],
                          [tensors["packed_trimmed.wscales"].cuda()], [tensors["packed_trimmed.wzeros"].cuda()],
                          [tensors["packed.bias"].cuda()])
    want = tensors["io.y_stored_order"].double()
    assert (out.cpu().double() - want).norm() <= 5e-3 * want.norm()


@needs_kernels
def test_accumulate_and_strides():
    """x and out as columns of wider tensors; what lies between stays; out += on request."""
    layer, tokens = emulated.Layer(32, torch.bfloat16, False), 65
    x, wide = layer.x(tokens).cuda(), torch.full((tokens, layer.N + 8), 9.0, dtype=torch.bfloat16, device="cuda")
    _, plain = run_layer(layer, x)
    room = torch.zeros(tokens, layer.K + 6, dtype=x.dtype, device="cuda")
    room[:, :layer.K] = x
    run_layer(layer, room[:, :layer.K], out=wide[:, :layer.N])
    assert torch.equal(wide[:, :layer.N], plain) and (wide[:, layer.N:] == 9).all()
    before = torch.randn(tokens, layer.N, generator=torch.Generator().manual_seed(3)).to(x.dtype).cuda()
    _, total = run_layer(layer, x, out=before.clone(), accumulate=True)
    assert torch.equal(total, (before.float() + plain.float()).to(x.dtype))


@needs_kernels
@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_token(value, dtype):
    """It ruins its own token and no other."""
    layer, tokens = emulated.Layer(32, dtype, False), 130
    x = layer.x(tokens).cuda()
    _, clean = run_layer(layer, x)
    x[5, 77] = value
    _, out = run_layer(layer, x)
    others = torch.arange(tokens) != 5
    assert out[5].isnan().all() and torch.equal(out[others.cuda()], clean[others.cuda()])


@needs_kernels
def test_runs_are_identical():
    layer = emulated.Layer(32, torch.bfloat16, False, rows=3072, columns=3072)
    x = layer.x(257).cuda()
    (*first, _), want = run_layer(layer, x)
    for _ in range(100):
        (*again, _), out = run_layer(layer, x)
        assert torch.equal(out, want) and all(map(torch.equal, first, again))


@needs_kernels
def test_streams_and_threads():
    """The current stream orders the kernels behind what made x; a fresh thread has no CUDA context yet."""
    layer = emulated.Layer(32, torch.bfloat16, False)
    x = layer.x(65)
    _, want = run_layer(layer, x.cuda())
    stream, got = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        _, out = run_layer(layer, x.pin_memory().to("cuda", non_blocking=True))
    stream.synchronize()
    assert torch.equal(out, want)
    thread = threading.Thread(target=lambda: got.append(run_layer(layer, x.cuda())[1]))
    thread.start()
    thread.join()
    assert torch.equal(got[0], want)


def layer_and_modulation(device):
    """f(x) through all three operators, and its x, on this device."""
    layer = emulated.Layer(32, torch.bfloat16, False)
    w, bias = moved(weight_of(layer), device), layer.packed["bias"].to(device)
    awq = moved(random_weight("awq"), device)
    awq_x = torch.ones(1, K, dtype=torch.bfloat16, device=device)

    def f(x):
        out = torch.empty(x.shape[0], layer.N, dtype=x.dtype, device=x.device)
        w4a4_sm80.gemm_w4a4(*w4a4_sm80.quant_down(x * 2, w.smooth, w.proj_down, False), w.qweight, w.wscales, w.proj_up, bias,
                        out, False, False)
        y, = awq_gemv.awq_gemv(awq_x, [awq.qweight], [awq.wscales], [awq.wzeros], [])
        return out + y[:, :layer.N]
    return f, layer.x(65).to(device)


@needs_kernels
def test_graph_capture():
    f, x = layer_and_modulation("cuda")
    other = x.flip(0)
    want = f(x), f(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f(x)
    graph.replay()
    assert torch.equal(out, want[0])
    x.copy_(other)
    graph.replay()
    assert torch.equal(out, want[1])


@needs_kernels
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiles_without_a_break(mode):
    f, x = layer_and_modulation("cuda")
    want, compiled = f(x), torch.compile(f, fullgraph=True, mode=mode)
    for _ in range(3):                  # the third of "reduce-overhead" replays a graph
        assert torch.equal(compiled(x), want)


@needs_kernels
@pytest.mark.parametrize("kind", ["int4", "int4_unsigned", "awq"])
def test_linear_serves_fused(kind):
    """Through the table, as a model calls it, against the reference on the CPU."""
    weight, x = random_weight(kind), torch.randn(8, K, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    x = x.abs() if kind == "int4_unsigned" else x
    want, out = torch.zeros(8, N, dtype=x.dtype), torch.zeros(8, N, dtype=x.dtype, device="cuda")
    with registry.using("reference"):
        ops.linear(x, weight, want)
    with registry.using("w4a4_emulated"):
        ops.linear(x.cuda(), moved(weight, "cuda"), out)
    assert (out.cpu().double() - want.double()).norm() <= 1e-2 * want.double().norm()


@needs_kernels
@pytest.mark.parametrize("route", ["cpp_extension", "nvrtc"])
def test_both_routes(route, monkeypatch, tmp_path):
    """Each by itself, from an empty cache, and to the same bits. What a machine lacks is the reason to skip."""
    f, x = layer_and_modulation("cuda")
    want = f(x)
    make = {"cpp_extension": build.build_extension, "nvrtc": build.build_cubins}[route]
    arch = build.arch_of(torch.cuda.get_device_capability())
    try:
        path = make(arch, tmp_path)
    except BuildError as error:
        pytest.skip(str(error))
    kernels = build.Built(arch, route, path, 0.0, ()).load(x.device.index)
    monkeypatch.setitem(build._kernels, x.device.index, kernels)
    assert torch.equal(f(x), want)


@needs_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_second_gpu():
    (f, x), (g, y) = layer_and_modulation("cuda:0"), layer_and_modulation("cuda:1")
    with torch.cuda.device(0):
        assert torch.equal(g(y).cpu(), f(x).cpu())
