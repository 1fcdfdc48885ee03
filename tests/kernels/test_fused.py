"""The kernels as torch operators: shapes, errors, what torch.compile sees, and the arguments that reach a kernel."""

import ctypes
import re
import shutil

import pytest
import torch
from svdq_pack.kernels import build, launch, layout
from svdq_pack.kernels.errors import BuildError, ShapeError
from svdq_pack.kernels.rows import row_blocks
from svdq_pack.kernels.variant import HALVES
from svdq_pack.kernels.variants import awq_gemv, w4a4_sm80
from svdq_pack.kernels.variants.awq_gemv import MAX_BATCH, MAX_LAYERS, Layer
from svdq_pack.kernels.variants.w4a4_sm80 import gemm_w4a4, quant_down
from svdq_pack.tests.kernels import test_cuda as on_gpu
from svdq_pack.tests.kernels import test_emulated as emulated
from svdq_pack.tests.kernels.emulator import launcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

K, N, RANK = 128, 256, 32
BF16 = torch.bfloat16
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def quant_down_operands(tokens=3, rank=RANK, dtype=BF16, **changes):
    return [*({"x": torch.zeros(tokens, K, dtype=dtype), "smooth": torch.ones(K, dtype=dtype),
               "proj_down": torch.zeros(K, rank, dtype=dtype)} | changes).values(), False]


def gemm_operands(tokens=3, rank=RANK, dtype=BF16, **changes):
    blocks, groups = row_blocks(tokens, 64), K // 64
    return [*({"qact": torch.zeros(blocks, groups, 4, 32, 4, dtype=torch.int32),
               "ascales": torch.zeros(blocks, groups, 4, 8, 2),
               "low": torch.zeros(blocks * 4, rank // 16, 32, 8, dtype=dtype),
               "qweight": torch.zeros(N, K // 2, dtype=torch.int8), "wscales": torch.zeros(groups, N, dtype=dtype),
               "proj_up": torch.zeros(N, rank, dtype=dtype), "bias": torch.zeros(N, dtype=dtype),
               "out": torch.zeros(tokens, N, dtype=dtype)} | changes).values(), False, False]


def awq_operands(batch=1, layers=2, dtype=BF16, **changes):
    half = [torch.zeros(K // 64, N, dtype=dtype)] * layers
    return [*({"x": torch.zeros(batch, K, dtype=dtype),
               "qweights": [torch.zeros(N // 4, K // 2, dtype=torch.int32)] * layers, "wscales": half, "wzeros": half,
               "biases": [torch.zeros(N, dtype=dtype)] * layers} | changes).values()]


OPERANDS = {quant_down: quant_down_operands, gemm_w4a4: gemm_operands, awq_gemv.awq_gemv: awq_operands}
EACH = pytest.mark.parametrize("op", OPERANDS, ids=lambda op: op._name)


@pytest.fixture
def launched(monkeypatch):
    """The (name, grid, block, arguments) of each launch, none of which happens."""
    calls = []
    monkeypatch.setattr(launch, "launch", lambda library, like, *call: calls.append(call))
    return calls


# What is launched

@pytest.mark.parametrize("dtype", HALVES)
def test_names_exist(launched, dtype):
    """Every name that the operators can ask for is a kernel, and there is no other kernel. Hopper's: test_hopper.py."""
    for unsigned in (False, True):
        for rank in (0, 16, 32, 48, 128):
            quant_down(*quant_down_operands(rank=rank, dtype=dtype)[:-1], unsigned)
        gemm_w4a4(*gemm_operands(dtype=dtype)[:-2], unsigned, False)
    for batch in range(1, MAX_BATCH + 1):
        awq_gemv.awq_gemv(*awq_operands(batch, dtype=dtype))
    names = {name for name, *_ in launched}
    assert names == {name for library in (w4a4_sm80.LIBRARY, awq_gemv.LIBRARY) for name in library.kernels if HALVES[dtype] in name}


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (64, 1), (65, 2), (4608, 72)])
def test_grids(launched, tokens, blocks):
    quant_down(*quant_down_operands(tokens))
    gemm_w4a4(*gemm_operands(tokens))
    if tokens == 0:
        assert launched == []
        return
    (_, down, threads, _), (_, gemm, gemm_threads, _) = launched
    assert (down, threads) == ((blocks * 4, 1), 256) and (gemm, gemm_threads) == ((N // 128, -(-tokens // 128)), 128)


def test_awq_grid(launched):
    """The widest layer decides; no layer or no row launches nothing."""
    wide = (torch.zeros(N, K // 2, dtype=torch.int32), torch.zeros(K // 64, 4 * N, dtype=BF16),
            torch.zeros(4 * N, dtype=BF16))
    x, qweights, wscales, wzeros, biases = awq_operands()
    awq_gemv.awq_gemv(x, [*qweights, wide[0]], [*wscales, wide[1]], [*wzeros, wide[1]], [*biases, wide[2]])
    assert launched.pop()[1] == (4 * N // 32, 3)
    assert awq_gemv.awq_gemv(x, [], [], [], []) == []
    assert [tuple(out.shape) for out in awq_gemv.awq_gemv(*awq_operands(0))] == [(0, N)] * 2
    assert launched == []


def test_layer_struct():
    """As the compiler lays out awq_gemv::Layer: five pointers and a 64-bit number. All fit into 4 KiB of arguments."""
    text = (build.CUDA / "awq_gemv.cuh").read_text()
    fields = re.findall(r"(\w+);", re.search(r"struct Layer {(.*?)};", text, re.S)[1])
    assert fields == [name for name, _ in Layer._fields_] and ctypes.sizeof(Layer) == 48
    assert int(re.search(r"MAX_LAYERS = (\d+)", text)[1]) == MAX_LAYERS
    assert MAX_LAYERS * 48 + 16 <= 4096


# Errors

def strided(*shape, dtype=BF16):
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def shifted(*shape, dtype=BF16, by=1):
    return torch.zeros(by + torch.Size(shape).numel(), dtype=dtype)[by:].view(shape)


@pytest.mark.parametrize("changes, words", [
    (dict(x=torch.zeros(3, K)), r"x is \[3, 128\] torch.float32"),
    (dict(x=torch.zeros(K, dtype=BF16)), r"x is \[128\]"),
    (dict(x=torch.zeros(3, 100, dtype=BF16)), "multiple of 64"),
    (dict(x=strided(3, K)), r"strides \(256, 2\).* call .contiguous"),
    (dict(x=torch.zeros(3, K + 1, dtype=BF16)[:, :K]), r"strides \(129, 1\)"),
    (dict(x=shifted(3, K)), "aligned to 4 bytes"),
    (dict(smooth=torch.ones(K, dtype=torch.float16)), "smooth is .*float16.* Needs .*bfloat16"),
    (dict(smooth=torch.ones(K // 2, dtype=BF16)), r"smooth is \[64\].* Needs .*\[128\]"),
    (dict(smooth=strided(K)), "smooth .*strides"),
    (dict(smooth=shifted(K)), "smooth .*aligned"),
    (dict(proj_down=torch.zeros(K, 24, dtype=BF16)), "rank 24. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(K, 144, dtype=BF16)), "rank 144. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(64, RANK, dtype=BF16)), r"proj_down is \[64, 32\].* Needs .*\[128, 32\]"),
])
def test_quant_down_refuses(launched, changes, words):
    with pytest.raises(ShapeError, match="^quant_down: .*" + words):
        quant_down(*quant_down_operands(**changes))
    assert launched == []


@pytest.mark.parametrize("changes, words", [
    (dict(out=torch.zeros(3, N)), "out is .*float32"),
    (dict(out=torch.zeros(N, dtype=BF16)), r"out is \[256\]"),
    (dict(out=torch.zeros(3, N + 128, dtype=BF16)), r"out is \[3, 384\].* Needs \[tokens, 256\]"),
    (dict(out=torch.zeros(3, N + 4, dtype=BF16)[:, :N]), r"strides \(260, 1\).*16 bytes"),
    (dict(out=strided(3, N)), r"strides \(512, 2\)"),
    (dict(out=shifted(3, N)), "aligned to 16 bytes"),
    (dict(qweight=torch.zeros(192, K // 2, dtype=torch.int8), out=torch.zeros(3, 192, dtype=BF16)), "multiple of 128"),
    (dict(out=torch.zeros(65, N, dtype=BF16)), r"qact is \[1, 2, 4, 32, 4\].* Needs .*\[2, 2, 4, 32, 4\]"),
    (dict(qact=torch.zeros(1, 3, 4, 32, 4, dtype=torch.int32)), "qact is"),
    (dict(qact=torch.zeros(1, 2, 4, 32, 4)), r"qact is .*float32.*\.int32"),
    (dict(ascales=torch.zeros(1, 2, 4, 8, 2, dtype=BF16)), "ascales is .*bfloat16.* Needs .*float32"),
    (dict(low=torch.zeros(4, 2, 32, 8, dtype=torch.float16)), "low is .*float16"),
    (dict(low=torch.zeros(4, 1, 32, 8, dtype=BF16)), r"proj_up is \[256, 32\].* Needs .*\[256, 16\]"),
    (dict(low=torch.zeros(4, dtype=BF16)), "low is"),
    (dict(qweight=torch.zeros(N, K // 2, dtype=torch.uint8)), r"qweight is .*uint8.*\.int8"),
    (dict(qweight=shifted(N, K // 2, dtype=torch.int8, by=8)), "qweight .*aligned"),
    (dict(wscales=torch.zeros(N, K // 64, dtype=BF16)), r"wscales is \[256, 2\].* Needs .*\[2, 256\]"),
    (dict(wscales=torch.zeros(K // 64, N, dtype=torch.float16)), "wscales is .*float16"),
    (dict(proj_up=None), "rank 32 but proj_up is missing"),
    (dict(bias=torch.zeros(N)), "bias is .*float32"),
    (dict(bias=torch.zeros(N // 2, dtype=BF16)), r"bias is \[128\]"),
])
def test_gemm_refuses(launched, changes, words):
    with pytest.raises(ShapeError, match="^gemm_w4a4: .*" + words):
        gemm_w4a4(*gemm_operands(**changes))
    assert launched == []


@pytest.mark.parametrize("batch, layers, changes, words", [
    (9, 1, {}, r"x is \[9, 128\].*at most 8 rows.* split"),
    (1, 81, {}, "for 81 layers.*at most 80 layers"),
    (2, 1, dict(x=torch.zeros(2, K + 64, dtype=BF16)[:, :K]), "contiguous"),
    (1, 1, dict(x=shifted(1, K, by=2)), "16-byte aligned"),
    (1, 1, dict(x=torch.zeros(1, K)), "float32"),
    (1, 2, dict(wscales=[]), "got 2 qweights, 0 wscales"),
    (1, 2, dict(biases=[torch.zeros(N, dtype=BF16)]), "and 1 biases"),
    (1, 1, dict(qweights=[torch.zeros(N // 4, K // 2, dtype=torch.int8)]), r"qweight is .*int8.*\.int32"),
    (1, 1, dict(qweights=[torch.zeros(N // 4, K, dtype=torch.int32)]), r"qweight is \[64, 128\].* Needs .*\[64, 64\]"),
    (1, 1, dict(wscales=[torch.zeros(1, N, dtype=BF16)]), r"wscales is \[1, 256\].* Needs .*\[2, 256\]"),
    (1, 1, dict(wzeros=[torch.zeros(K // 64, N, dtype=torch.float16)]), "wzeros is .*float16"),
])
def test_awq_refuses(launched, batch, layers, changes, words):
    with pytest.raises(ShapeError, match="^awq_gemv: .*" + words):
        awq_gemv.awq_gemv(*awq_operands(batch, layers, **changes))
    assert launched == []


def test_what_needs_no_alignment(launched):
    """The row stride of a single row means nothing; a bias may be a piece of a longer one."""
    quant_down(*quant_down_operands(x=torch.zeros(1, K + 1, dtype=BF16)[:, :K]))
    gemm_w4a4(*gemm_operands(1, out=torch.zeros(1, N + 4, dtype=BF16)[:, :N], bias=shifted(N, by=2)))
    gemm_w4a4(*gemm_operands(rank=0, proj_up=None, bias=None))
    assert len(launched) == 3


@pytest.mark.parametrize("op, operand, words", [
    (quant_down, 1, "smooth"), (quant_down, 2, "proj_down"), (gemm_w4a4, 0, "qact"),
    (gemm_w4a4, 3, "qweight"), (gemm_w4a4, 6, "bias"), (awq_gemv.awq_gemv, 1, "qweight"),
    (awq_gemv.awq_gemv, 4, "bias")])
def test_operand_on_another_device(launched, op, operand, words):
    """Called past the dispatcher, for which "meta", the only other device of every machine, means a fake tensor."""
    operands = OPERANDS[op]()
    operands[operand] = torch.utils._pytree.tree_map(lambda tensor: tensor.to("meta"), operands[operand])
    with pytest.raises(ShapeError, match=f"{words} is .* on meta.* Needs .* on cpu"):
        op._init_fn(*operands)
    assert launched == []


@EACH
def test_cpu_tensors(op):
    with pytest.raises(ShapeError, match=f"{op._name.removeprefix('svdq::')}.*: tensors are on cpu. Needs a CUDA GPU"):
        op(*OPERANDS[op]())


def test_no_kernels(monkeypatch):
    """A GPU whose kernels could not be built: BuildError, not an AttributeError."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(build, "kernels_for", lambda library, index: None)
    with FakeTensorMode():
        like = torch.empty(1, device="cuda")
    with pytest.raises(BuildError, match="name: there are no kernels awq_gemv for cuda:0; the log"):
        launch.launch(awq_gemv.LIBRARY, like, "name", (1, 1), 1, [])


# torch.compile and fake tensors

@pytest.mark.parametrize("rank", [0, 16, 128])
@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_fake_quant_down(launched, tokens, rank):
    real = quant_down(*quant_down_operands(tokens, rank))
    with FakeTensorMode(), torch.device("cuda"):
        fake = quant_down(*quant_down_operands(tokens, rank))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert {f.device.type for f in fake} == {"cuda"}


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_fake_awq_gemv(launched, tokens):
    real = awq_gemv.awq_gemv(*awq_operands(tokens, dtype=torch.float16))
    with FakeTensorMode(), torch.device("cuda"):
        fake = awq_gemv.awq_gemv(*awq_operands(tokens, dtype=torch.float16))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_fake_gemm(tokens):
    """Nothing comes back, `out` is what it was."""
    with FakeTensorMode(), torch.device("cuda"):
        operands = gemm_operands(tokens)
        assert gemm_w4a4(*operands) is None
        assert operands[7].shape == (tokens, N)


def chain(x, smooth, down, qweight, wscales, up, bias, x_awq, awq, scales, zeros):
    """All three operators, with ordinary torch between them."""
    out = x.new_empty(x.shape[0], qweight.shape[0])
    gemm_w4a4(*quant_down(x * 2, smooth, down, False), qweight, wscales, up, bias, out, False, False)
    y, = awq_gemv.awq_gemv(x_awq, [awq], [scales], [zeros], [])
    return out + y


def chain_operands(tokens=3):
    layer = emulated.Layer(RANK, BF16, False, rows=N, columns=K)
    awq = emulated.awq_layer(torch.Generator().manual_seed(0), N, K, BF16)
    p = layer.packed
    return (layer.x(tokens), p["smooth"], p["proj_down"], p["qweight"], p["wscales"], p["proj_up"], p["bias"],
            torch.ones(1, K, dtype=BF16), layout.pack_awq(awq.codes), awq.wscales.T.contiguous(),
            awq.wzeros.T.contiguous())


def test_traces_as_three_calls():
    graph = make_fx(chain, tracing_mode="fake")(*chain_operands())
    called = [str(node.target) for node in graph.graph.nodes if "svdq" in str(node.target)]
    assert called == ["svdq.quant_down.default", "svdq.gemm_w4a4.default", "svdq.awq_gemv.default"]


# The kernels, through the operators

@pytest.fixture
def on_emulator(monkeypatch):
    monkeypatch.setattr(launch, "launch", launcher.launch)


@needs_gxx
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(on_emulator, backend):
    operands = chain_operands()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(chain, fullgraph=True, backend=backend)(*operands), chain(*operands))


@needs_gxx
@pytest.mark.parametrize("rank, unsigned", [(0, False), (16, True), (48, False)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_arguments_reach_the_kernels(on_emulator, rank, unsigned, accumulate):
    """Names, grids and order of arguments, and the checks that test_cuda makes on a GPU."""
    layer, tokens = emulated.Layer(rank, BF16, unsigned, rows=N, columns=K), 70
    x = layer.x(tokens)
    quantised, out = on_gpu.run_layer(layer, x, accumulate=accumulate)
    on_gpu.check_quantised(layer, x, quantised)
    on_gpu.check_gemm(layer, quantised, out)
    again = torch.zeros_like(out)
    w4a4_sm80.VARIANTS[0].run(x, on_gpu.weight_of(layer), again, layer.packed["bias"], accumulate)
    assert torch.equal(again, out)


@needs_gxx
@pytest.mark.parametrize("batch", [1, 3])
def test_arguments_reach_awq_gemv(on_emulator, batch):
    random = torch.Generator().manual_seed(batch)
    layers = [emulated.awq_layer(random, rows, K, BF16) for rows in (N, 64)]
    x = torch.randn(batch, K, generator=random).to(BF16)
    outs = awq_gemv.awq_gemv(x, [layout.pack_awq(a.codes) for a in layers], [a.wscales.T.contiguous() for a in layers],
                          [a.wzeros.T.contiguous() for a in layers], [a.bias for a in layers])
    for layer, out in zip(layers, outs):
        scales, zeros = (values.double().repeat_interleave(64, 1) for values in (layer.wscales, layer.wzeros))
        want = x.double() @ (layer.codes.double() * scales + zeros).T + layer.bias.double()
        size = x.double().abs() @ (layer.codes.double() * scales.abs() + zeros.abs()).T + layer.bias.double().abs()
        emulated.assert_rounded(out, want, size, "out")
