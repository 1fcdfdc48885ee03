"""The CUDA kernels, run by the CPU emulator: results against float64 and reference.py, conduct by the emulator's checks."""

import functools
import re
import shutil

import pytest
import torch
from svdq_pack.kernels import layout, reference
from svdq_pack.tests.kernels.emulator import build
from svdq_pack.tests.kernels.emulator.build import InOut, KernelFault, Out, Rows

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")

TOKENS = [1, 15, 16, 17, 63, 64, 65, 255, 257]
RANKS = [0, 16, 32, 128]
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = pytest.mark.parametrize("dtype", KINDS, ids=KINDS.values())
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])
N, K = 256, 640                             # two tiles; ten groups: more than a ring of stages, or the warps of quant_down
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}       # half a step, relative
FP32 = 3e-7                                 # per sum of absolute terms: fp32 accumulation, measured below 1e-7


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors here are small: torch's threads would only wait for each other, on a busy machine most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_rounded(got, want, magnitude, who):
    """`got` is float64 `want` computed in fp32 and rounded once; `magnitude` is the sum of absolute terms."""
    assert got.shape == want.shape
    step = EPS[got.dtype] * want.abs() + (2.0**-25 if got.dtype == torch.float16 else 0)
    bad = ((got.double() - want).abs() > step + FP32 * magnitude) | ~got.isfinite()
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{who}: {int(bad.sum())} of {bad.numel()} wrong, first {at}: {got[at].item()} "
                             f"instead of {want[at].item()}, magnitude {magnitude[at].item()}")


def blocks(tokens):
    return -(-tokens // 64)


# The layouts quant_down writes and gemm_w4a4 reads; axes as in ptx.cuh, lane = 4 g + t

def unpack_act(qact, unsigned):
    """[M/64][K/64][m16][g][t][k half][row half] words -> codes [M, K]."""
    nibbles = torch.stack([qact >> 4 * i & 15 for i in range(8)], -1)          # int32: the shift's sign bits fall to & 15
    block, group = nibbles.shape[:2]
    codes = nibbles.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(block * 64, group * 64)
    return codes if unsigned else (codes ^ 8) - 8


def act_buffer(tokens, columns):
    return torch.zeros(blocks(tokens), columns // 64, 4, 8, 4, 2, 2, dtype=torch.int32)


def unpack_ascales(ascales):
    """[M/64][K/64][m16][g][row half] -> [M, K/64]."""
    block, group = ascales.shape[:2]
    return ascales.permute(0, 2, 4, 3, 1).reshape(block * 64, group)


def unpack_low(low):
    """[M/16][R/16][g][t][k half][row half][2] -> [M, R]."""
    return low.permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, low.shape[1] * 16)


class Layer:
    """A random layer, logical and packed."""

    def __init__(self, rank, dtype, unsigned, rows=N, columns=K):
        random = torch.Generator().manual_seed(rank + 2 * unsigned)

        def half(*shape, scale=1.0):
            return (torch.randn(*shape, generator=random) * scale).to(dtype)
        self.N, self.K, self.R, self.dtype, self.unsigned = rows, columns, rank, dtype, unsigned
        self.codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
        self.wscales = half(rows, columns // 64, scale=0.1)                     # of both signs
        self.smooth = (torch.rand(columns, generator=random) + 0.5).to(dtype)
        self.proj_down, self.proj_up = half(columns, rank, scale=0.05), half(rows, rank)
        self.bias = half(rows)
        self.name = f"{KINDS[dtype]}_{'u4' if unsigned else 's4'}"
        self.packed = dict(qweight=layout.pack_codes(self.codes), wscales=layout.pack_scales(self.wscales),
                           smooth=layout.pack_vector(self.smooth), proj_down=layout.pack_down(self.proj_down),
                           proj_up=layout.pack_up(self.proj_up), bias=self.bias)

    def x(self, tokens):
        x = torch.randn(tokens, self.K, generator=torch.Generator().manual_seed(tokens))
        x[0, :128] = 0                                                          # two groups without a largest value
        return (reference.gelu_tanh(x) if self.unsigned else x).to(self.dtype)


def quant_down(layer, x, *, name=None, order="forward", ldx=None, source=None):
    tokens = x.shape[0]
    qact, low = act_buffer(tokens, layer.K), torch.zeros(blocks(tokens) * 4, layer.R // 16, 8, 4, 2, 2, 2, dtype=layer.dtype)
    ascales = torch.zeros(blocks(tokens), layer.K // 64, 4, 8, 2)
    module = build.load(source or build.KERNELS / "quant_down.cuh")
    module.launch(name or f"quant_down_{layer.name}_r{32 if layer.R <= 32 else 128}", blocks(tokens) * 4, 256, 0,
                  [spread_rows(x, ldx) if ldx else x, layer.packed["smooth"], layer.packed["proj_down"], qact, ascales,
                   low, tokens, layer.K, layer.R, ldx or layer.K], order=order)
    return qact, ascales, low


def spread_rows(x, ldx):
    """The memory of x with rows ldx apart, which ends with the last element of x."""
    rows = torch.full((x.shape[0], ldx), float("nan"), dtype=x.dtype)
    rows[:, :x.shape[1]] = x
    return rows.flatten()[:(x.shape[0] - 1) * ldx + x.shape[1]].clone()


def gemm(layer, quantised, out, *, tokens=None, bias=True, accumulate=False, order="forward", source=None):
    qact, ascales, low = quantised
    tokens = tokens or out.shape[0]
    module = build.load(source or build.KERNELS / "gemm_w4a4.cuh")
    module.launch(f"gemm_w4a4_{layer.name}", (layer.N // 128, -(-tokens // 128)), 128, 0,
                  [qact, ascales, layer.packed["qweight"], layer.packed["wscales"], low, layer.packed["proj_up"],
                   layer.packed["bias"] if bias else None, InOut(out) if accumulate else out,
                   tokens, layer.N, layer.K, layer.R, out.shape[1], int(accumulate)], order=order)
    return out


def exact(layer, quantised, bias=True):
    """What gemm_w4a4 computes from these operands, in float64, and the sum of absolute terms."""
    qact, ascales, low = quantised
    act = unpack_act(qact, layer.unsigned).double() * unpack_ascales(ascales).double().repeat_interleave(64, 1)
    weight = layout.signed(layer.codes).double() * layer.wscales.double().repeat_interleave(64, 1)
    low, up = unpack_low(low).double(), layer.proj_up.double()
    out, size = act @ weight.T + low @ up.T, act.abs() @ weight.abs().T + low.abs() @ up.abs().T
    return (out + layer.bias.double(), size + layer.bias.double().abs()) if bias else (out, size)


# Both kernels, every shape

@UNSIGNED
@DTYPES
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear(tokens, rank, dtype, unsigned):
    check_linear(Layer(rank, dtype, unsigned), tokens)


def check_linear(layer, tokens, quant_source=None, gemm_source=None):
    x, dtype, unsigned = layer.x(tokens), layer.dtype, layer.unsigned
    quantised = qact, ascales, low = quant_down(layer, x, order=tokens, source=quant_source)
    codes, scales, _ = reference.quant_down(x, layer.smooth, layer.proj_down, precision="int4", unsigned=unsigned)
    assert torch.equal(unpack_act(qact, unsigned)[:tokens], codes.int())        # the same fp32 arithmetic, to the bit
    assert torch.equal(unpack_ascales(ascales)[:tokens], scales.float())
    for values in (unpack_act(qact, unsigned), unpack_ascales(ascales), unpack_low(low)):
        assert not values[tokens:].any()                                        # rows past M are zero
    down = layer.proj_down.double()
    assert_rounded(unpack_low(low)[:tokens], x.double() @ down, x.double().abs() @ down.abs(), "low")

    out = gemm(layer, quantised, torch.zeros(tokens, layer.N, dtype=dtype), order=tokens, source=gemm_source)
    want, size = exact(layer, quantised)
    assert_rounded(out, want[:tokens], size[:tokens], "out")


@UNSIGNED
@DTYPES
@pytest.mark.parametrize("columns", [128, 256, 3072])
def test_depth(columns, dtype, unsigned):
    """Fewer groups than stages of the ring; FLUX's width."""
    layer = Layer(32, dtype, unsigned, rows=128, columns=columns)
    quantised = quant_down(layer, layer.x(70))
    want, size = exact(layer, quantised)
    out = gemm(layer, quantised, torch.zeros(70, 128, dtype=dtype))
    assert_rounded(out, want[:70], size[:70], "out")


@pytest.mark.parametrize("rows, columns, unsigned", [(9216, 3072, False), (3072, 12288, True)], ids=["qkv", "fc2"])
def test_flux_layers(rows, columns, unsigned):
    """Whole layers of FLUX.1, every tile."""
    check_linear(Layer(32, torch.bfloat16, unsigned, rows, columns), 17)


def read_layer(tensors, unsigned, prefix="packed."):
    packed = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    layer = Layer.__new__(Layer)
    layer.codes = layout.unpack_codes(packed["qweight"])
    layer.N, layer.K = layer.codes.shape
    layer.R, layer.dtype, layer.unsigned = packed["lora_up"].shape[1], packed["lora_up"].dtype, unsigned
    layer.name = f"{KINDS[layer.dtype]}_{'u4' if unsigned else 's4'}"
    layer.packed = packed | dict(proj_down=packed["lora_down"], proj_up=packed["lora_up"],
                                 bias=layout.unpack_vector(packed["bias"]))
    return layer


@pytest.mark.parametrize("name", ["r32", "nobias_r16", "padded_n192_k192_r20", "unsigned_fc2_r16", "smooth_fused_r16"])
def test_golden_linear(golden, name):
    """Tensors as in a checkpoint."""
    tensors = golden(f"linear_int4_{name}")
    layer = read_layer(tensors, unsigned="unsigned" in name)
    x = layout.pad(tensors["io.x"], 1, layer.K)
    tokens = x.shape[0]
    quantised = qact, ascales, low = quant_down(layer, x)
    live = (tensors["io.ascales"] != 0).repeat_interleave(64, 1)
    assert torch.equal(unpack_act(qact, layer.unsigned)[:tokens][live], tensors["io.q_act"].int()[live])
    assert torch.equal(unpack_ascales(ascales)[:tokens], tensors["io.ascales"].float())
    torch.testing.assert_close(unpack_low(low)[:tokens].float(), tensors["io.lora_act"], rtol=4e-3, atol=1e-5)
    want = tensors["io.y_act_quant"].double()
    out = gemm(layer, quantised, torch.zeros(tokens, layer.N, dtype=layer.dtype))[:, :want.shape[1]].double()
    assert (out - want).norm() <= 4e-3 * want.norm()                            # bf16 output; fixtures/format/README.md


def test_golden_mlp(golden):
    """fc1, GELU, fc2: each stage from the golden input of that stage, since a rounded GELU may flip a code."""
    tensors = golden("mlp_int4_fused_gelu")
    fc1, fc2 = read_layer(tensors, False, "packed.fc1."), read_layer(tensors, True, "packed.fc2.")
    x, hidden = tensors["io.x"], tensors["io.gelu_bf16"]
    tokens = x.shape[0]
    got = gemm(fc1, quant_down(fc1, x), torch.zeros(tokens, fc1.N, dtype=fc1.dtype)).double()
    want = tensors["io.h_act_quant"].double()
    assert (got - want).norm() <= 4e-3 * want.norm()                            # bf16 output
    quantised = qact, ascales, low = quant_down(fc2, hidden)
    assert torch.equal(unpack_act(qact, True)[:tokens], tensors["io.fc2_q_act"].int())
    assert torch.equal(unpack_ascales(ascales)[:tokens], tensors["io.fc2_ascales"].float())
    torch.testing.assert_close(unpack_low(low)[:tokens].float(), tensors["io.fc2_lora_act"], rtol=4e-3, atol=1e-5)
    got, want = gemm(fc2, quantised, torch.zeros(tokens, fc2.N, dtype=fc2.dtype)).double(), tensors["io.y_act_quant"].double()
    assert (got - want).norm() <= 4e-3 * want.norm()


# Options

@DTYPES
def test_row_strides(dtype):
    """x and out as columns of wider tensors; what lies between stays."""
    layer, tokens = Layer(16, dtype, False), 65
    x = layer.x(tokens)
    plain, strided = quant_down(layer, x), quant_down(layer, x, ldx=K + 6)
    assert all(map(torch.equal, plain, strided))
    out = gemm(layer, plain, torch.full((tokens, N + 8), 9.0, dtype=dtype))
    assert torch.equal(out[:, :N], gemm(layer, plain, torch.zeros(tokens, N, dtype=dtype)))
    assert (out[:, N:] == 9).all()


@DTYPES
def test_bias_and_accumulate(dtype):
    layer, tokens = Layer(16, dtype, False), 17
    quantised = quant_down(layer, layer.x(tokens))
    want, size = exact(layer, quantised, bias=False)
    out = gemm(layer, quantised, torch.zeros(tokens, N, dtype=dtype), bias=False)
    assert_rounded(out, want[:tokens], size[:tokens], "without bias")
    before = torch.randn(tokens, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = gemm(layer, quantised, before.clone(), bias=False, accumulate=True)
    assert torch.equal(total, (before.float() + out.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_token(value, dtype):
    """A NaN or Inf makes its own token NaN, as in reference.py, and no other."""
    layer, tokens = Layer(16, dtype, False), 20
    x = layer.x(tokens)
    clean = gemm(layer, quant_down(layer, x), torch.zeros(tokens, N, dtype=dtype))
    x[5, 77] = value
    out = gemm(layer, quant_down(layer, x), torch.zeros(tokens, N, dtype=dtype))
    assert out[5].isnan().all()
    others = torch.arange(tokens) != 5
    assert torch.equal(out[others], clean[others])


def test_order_changes_nothing():
    layer, tokens = Layer(32, torch.bfloat16, False), 130
    x = layer.x(tokens)
    results = []
    for order in ["forward", "reverse", 1, 2]:
        quantised = quant_down(layer, x, order=order)
        results.append((*quantised, gemm(layer, quantised, torch.zeros(tokens, N, dtype=x.dtype), order=order)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


# awq_gemv

def awq_layer(random, rows, columns, dtype):
    def half(*shape):
        return torch.randn(*shape, generator=random).to(dtype)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    return reference.AWQ(codes, half(rows, columns // 64), half(rows, columns // 64), half(rows))


def awq_gemv(x, layers, *, order="forward", source=None):
    """layers: (qweight, wscales, wzeros, bias) as stored."""
    batch, columns = x.shape
    outs = [torch.zeros(batch, wscales.shape[1], dtype=x.dtype) for _, wscales, _, _ in layers]
    rows = [(qweight, wscales, wzeros, bias, Out(out), out.shape[1])
            for (qweight, wscales, wzeros, bias), out in zip(layers, outs)]
    grid = (max(-(-out.shape[1] // 32) for out in outs), len(layers))
    module = build.load(source or build.KERNELS / "awq_gemv.cuh")
    name = f"awq_gemv_{KINDS[x.dtype]}_b{1 if batch == 1 else 8}"
    module.launch(name, grid, 256, 0, [x, Rows(rows), batch, columns], order)
    return outs


@DTYPES
@pytest.mark.parametrize("columns", [64, 1024, 1088, 3072])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_awq_gemv(batch, columns, dtype):
    random = torch.Generator().manual_seed(batch)
    layers = [awq_layer(random, rows, columns, dtype) for rows in (4, 100)]      # of unequal height in one launch
    x = torch.nn.functional.silu(torch.randn(batch, columns, generator=random)).to(dtype)
    outs = awq_gemv(x, [(layout.pack_awq(layer.codes), layer.wscales.T.contiguous(), layer.wzeros.T.contiguous(),
                         None if layer is layers[0] else layer.bias) for layer in layers], order=batch)
    for layer, out in zip(layers, outs):
        scales, zeros = (values.double().repeat_interleave(64, 1) for values in (layer.wscales, layer.wzeros))
        bias = layer.bias.double() * (layer is not layers[0])
        want = x.double() @ (layer.codes.double() * scales + zeros).T + bias
        size = x.double().abs() @ (layer.codes.double() * scales.abs() + zeros.abs()).T + bias.abs()
        assert_rounded(out, want, size, "out")


@pytest.mark.parametrize("name", ["awq_adanorm_zero", "awq_plain_k1024"])
def test_golden_awq(golden, name):
    tensors = golden(name)
    out, = awq_gemv(tensors["io.x"], [(tensors["packed.qweight"], tensors["packed_trimmed.wscales"],
                                       tensors["packed_trimmed.wzeros"], tensors["packed.bias"])])
    want = tensors["io.y_stored_order"].double()
    assert (out.double() - want).norm() <= 5e-3 * want.norm()


# Every barrier and wait is needed: the emulator must see it gone

def without(file, words, index):
    """The file without its index-th `words`, and with its first shell only, which compiles faster."""
    text = (build.KERNELS / file).read_text()
    head, *shells = re.split(rf"^(?={file.removesuffix('.cuh').upper()}\()", text, flags=re.M)
    parts = (head + shells[0]).split(words)
    return words.join(parts[:index + 1]) + ";" + words.join(parts[index + 1:])


def cases(file, words):
    count = (build.KERNELS / file).read_text().count(words)
    assert count, f"{file} has no {words}"
    return [(file, words, i) for i in range(count)]


@pytest.mark.parametrize("file, words, index", [
    *cases("quant_down.cuh", "px::barrier();"), *cases("awq_gemv.cuh", "px::barrier();"),
    *cases("gemm_w4a4.cuh", "px::barrier();"), *cases("gemm_w4a4.cuh", "px::copy_commit();"),
    *cases("gemm_w4a4.cuh", "px::copy_wait<STAGES - 2>();")])
def test_nothing_to_spare(file, words, index):
    source = without(file, words, index)
    layer, tokens = Layer(32, torch.bfloat16, False, rows=128), 20
    with pytest.raises(KernelFault, match="race|nobody has written|has not landed|on its way|in no group"):
        if file == "quant_down.cuh":
            quant_down(layer, layer.x(tokens), source=source)
        elif file == "gemm_w4a4.cuh":
            gemm(layer, quant_down(layer, layer.x(tokens)), torch.zeros(tokens, 128, dtype=layer.dtype), source=source)
        else:
            weight = awq_layer(torch.Generator().manual_seed(0), 32, 2048, layer.dtype)
            awq_gemv(torch.ones(1, 2048, dtype=layer.dtype), [(layout.pack_awq(weight.codes), weight.wscales.T.contiguous(),
                                                               weight.wzeros.T.contiguous(), weight.bias)], source=source)


# Saturation: a result beyond fp16 is stored as its largest number of that sign, not as Inf, and NaN stays NaN. The checks take
# the function that runs the kernel, so that the PTX interpreter has the same ones.

TOP, CLAMP = 65504.0, "px::clamped<T>("


def assert_saturated(got, want, magnitude):
    """As assert_rounded, but beyond 65504 `got` is exactly that, and NaN where `want` is NaN.

    want [M, N] must go beyond in both signs and in both halves of a word.
    """
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()
    beyond = want.abs() > TOP + FP32 * magnitude
    for half in (0, 1):
        assert {-1.0, 1.0} <= set(want[:, half::2][beyond[:, half::2]].sign().tolist())
    off = got[beyond].double() != TOP * want[beyond].sign()
    assert not off.any(), f"beyond fp16: {got[beyond][off][0].item()} for {want[beyond][off][0].item()}"
    inside = ~(beyond | want.isnan())
    assert inside.any()
    assert_rounded(got[inside], want[inside].clamp(-TOP, TOP), magnitude[inside], "within fp16")


def check_saturation_of_gemm(gemm):
    """gemm(layer, quantised, out, accumulate=) as above"""
    layer, tokens = Layer(16, torch.float16, False, rows=128, columns=128), 20
    layer.wscales *= 2**14
    layer.packed["wscales"] = layout.pack_scales(layer.wscales)
    x = layer.x(tokens)
    x[5, 77] = float("nan")
    quantised = quant_down(layer, x)
    want, size = exact(layer, quantised)
    out = gemm(layer, quantised, torch.zeros(tokens, 128, dtype=x.dtype), accumulate=False)
    assert_saturated(out, want[:tokens], size[:tokens])
    before = torch.full((tokens, 128), 60000.0, dtype=x.dtype)
    before[::2], before[7] = -60000, float("nan")
    total = gemm(layer, quantised, before.clone(), accumulate=True)
    assert_saturated(total, before.double() + out.double(), torch.zeros(tokens, 128))


def check_saturation_of_low(layer, quant):
    """quant(layer, x) -> low [M, R] of a layer of rank 16. Row m of x has the signs of column m of proj_down, or all others, so
    that the sums of the diagonal go beyond; the last row is NaN."""
    x = 30000 * layer.proj_down.T.sign() * torch.tensor([1.0, 1, -1, -1]).repeat(4)[:, None]
    x = torch.cat((x, x[:1] * float("nan"))).to(layer.dtype)
    down = layer.proj_down.double()
    assert_saturated(quant(layer, x)[:17], x.double() @ down, x.double().abs() @ down.abs())


def check_saturation_of_awq(awq_gemv):
    """awq_gemv(x, layers) as above"""
    random = torch.Generator().manual_seed(0)
    weight, x = awq_layer(random, 36, 128, torch.float16), torch.randn(4, 128, generator=random).half()
    scales, zeros = weight.wscales * 2**10, weight.wzeros * 2**10
    x[3, 100] = float("nan")
    out, = awq_gemv(x, [(layout.pack_awq(weight.codes), scales.T.contiguous(), zeros.T.contiguous(), weight.bias)])
    scales, zeros = (values.double().repeat_interleave(64, 1) for values in (scales, zeros))
    size = x.double().abs() @ (weight.codes.double() * scales.abs() + zeros.abs()).T
    assert_saturated(out, x.double() @ (weight.codes.double() * scales + zeros).T + weight.bias.double(), size)


def check_saturation(file, source=None):
    """Of the kernels of a file, or of its text."""
    if file == "gemm_w4a4.cuh":
        check_saturation_of_gemm(functools.partial(gemm, source=source))
    elif file == "awq_gemv.cuh":
        check_saturation_of_awq(functools.partial(awq_gemv, source=source))
    else:
        check_saturation_of_low(Layer(16, torch.float16, False, rows=128, columns=128),
                                lambda layer, x: unpack_low(quant_down(layer, x, source=source)[2]))


CLAMPED = {"gemm_w4a4.cuh": "gemm_w4a4_fp16_s4", "quant_down.cuh": "quant_down_fp16_s4_r32", "awq_gemv.cuh": "awq_gemv_fp16_b8"}


@pytest.mark.parametrize("file", CLAMPED)
def test_fp16_saturates(file):
    check_saturation(file)


def unclamped(file, kernel, index):
    """The text of one kernel of the file without its index-th clamp."""
    text = (build.KERNELS / file).read_text()
    parts = re.sub(rf"^{file.removesuffix('.cuh').upper()}\((?!{kernel},).*\n", "", text, flags=re.M).split(CLAMP)
    return CLAMP.join(parts[:index + 1]) + "(" + CLAMP.join(parts[index + 1:])


@pytest.mark.parametrize("file, words, index", [case for file in CLAMPED for case in cases(file, CLAMP)])
def test_every_clamp_is_needed(file, words, index):
    with pytest.raises(AssertionError, match="beyond fp16: -?inf"):
        check_saturation(file, unclamped(file, CLAMPED[file], index))


# Bugs of value, planted one at a time: the comparisons above must fail

PLANTED = {
    "fragments of B swapped": ("gemm_w4a4.cuh", "j % 2 ? b[j / 2].z : b[j / 2].x", "j % 2 ? b[j / 2].x : b[j / 2].z"),
    "rows of an activation scale swapped": ("gemm_w4a4.cuh", "ascale[e / 2]", "ascale[1 - e / 2]"),
    "columns of a weight scale swapped": ("gemm_w4a4.cuh", "j % 2 * 2 + e % 2", "j % 2 * 2 + 1 - e % 2"),
    "last group dropped": ("gemm_w4a4.cuh", "if (group >= groups)", "if (group >= groups - 1)"),
    "wrong tail: a row too many": ("gemm_w4a4.cuh", "if (row < M)", "if (row <= M)"),
    "wrong tail: a row too few": ("gemm_w4a4.cuh", "if (row < M)", "if (row < M - 1)"),
    "low rank of the wrong tile": ("gemm_w4a4.cuh", "(n_tile * 8 + warp_n * 4 + j)", "(n_tile * 8 + j)"),
    "bias of the wrong column": ("gemm_w4a4.cuh", "bias + column0 + j * 8 + 2 * t", "bias + column0 + j * 8 + t"),
    "bytes transposed halfway": ("quant_down.cuh", "t & 2 ? 0x3276 : 0x5410", "0x5410"),
    "tail rows leak": ("quant_down.cuh", "inside[h] ? *(const u32*)(x_row[h] + column) : 0u", "*(const u32*)(x_row[h] + column)"),
    "smoothing multiplied": ("quant_down.cuh", "px::divide(x, smooth)", "x * smooth"),
    "scale rounded before the codes": ("quant_down.cuh", "const float inverse = bits ? 1.0f / scale",
                                       "const float inverse = bits ? 1.0f / px::low_half<T>(px::pack_half<T>(scale, 0.0f))"),
    "low rank fed the other row": ("quant_down.cuh", "{pairs[0][2 * c], pairs[1][2 * c],", "{pairs[1][2 * c], pairs[0][2 * c],"),
    "a warp's share forgotten": ("quant_down.cuh", "for (int w = 0; w < WARPS; w++)", "for (int w = 1; w < WARPS; w++)"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug):
    file, right, wrong = PLANTED[bug]
    text = (build.KERNELS / file).read_text()
    assert right in text
    head, *shells = re.split(rf"^(?={file.removesuffix('.cuh').upper()}\()", text.replace(right, wrong), flags=re.M)
    source = head + shells[0]
    with pytest.raises((AssertionError, KernelFault)):
        check_linear(Layer(32, torch.bfloat16, False), 65, **{f"{file.split('_')[0].removesuffix('.cuh')}_source": source})


def test_unplanted_source_passes():
    """So that the failures above are the bugs' and not the harness's."""
    sources = {f"{file.split('_')[0]}_source": (build.KERNELS / file).read_text() for file in ("quant_down.cuh", "gemm_w4a4.cuh")}
    check_linear(Layer(32, torch.bfloat16, False), 65, **sources)
