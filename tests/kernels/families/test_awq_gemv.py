"""awq_gemv, the modulation kernel of every GPU since sm_80: results against float64, on every executor; conduct by the checks
of the simulators; the operator by itself.
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels.build import CUDA
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import awq_gemv as family
from svdq_pack.svdq.kernels.variants.awq_gemv import MAX_BATCH, MAX_LAYERS, awq_gemv
from svdq_pack.svdq.kernels.weights import AWQWeight
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded, assert_saturated
from svdq_pack.tests.kernels.families.layers import BF16, FP16, modulation
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

VARIANT, = family.VARIANTS
GPU_SLACK = 1e-6
FILE = "awq_gemv.cuh"


def run(executor, x, layers, **how):
    """awq_gemv of these Modulations, all with a bias or none, on the CPU."""
    weights, biases = executor.put([layer.weight for layer in layers]), [layer.logical.bias for layer in layers]
    with executor.set(**how):
        outs = awq_gemv(executor.put(x), *([getattr(weight, field) for weight in weights]
                                           for field in ("qweight", "wscales", "wzeros")),
                        executor.put(biases) if layers[0].has_bias else [])
    return [out.cpu() for out in outs]


def random_x(batch, k, dtype):
    return torch.nn.functional.silu(torch.randn(batch, k, generator=torch.Generator().manual_seed(batch))).to(dtype)


@on("batch, k, dtype, heights, has_bias",
    emulator=[(batch, k, dtype, (4, 100), k != 64) for dtype in HALVES for batch, k in (
        (1, 64), (1, 1024), (1, 3072), (2, 1088), (5, 3072), (8, 64), (8, 1024))] + [(3, 128, BF16, (768, 384, 128), True)],
    interpreter=[(1, 1216, BF16, (64, 36), True), (1, 1216, FP16, (64, 36), False), (3, 1216, BF16, (64, 36), False),
                 (8, 1216, FP16, (64, 36), True)],
    gpu=[(batch, k, dtype, tuple(range(96, 400, 4)), k != 64) for batch in (1, 2, 5, 8) for k in (64, 1088, 3072)
         for dtype in HALVES])
def test_linear(executor, batch, k, dtype, heights, has_bias):
    """Layers of unequal height in one launch, on a GPU as many as a FLUX step has; less, more and a rest of a chunk of x."""
    x, modulations = random_x(batch, k, dtype), [modulation(n, k, dtype, has_bias) for n in heights]
    for it, out in zip(modulations, run(executor, x, modulations, order=batch), strict=True):
        assert_rounded(out, *it.product(x), "out", executor.slack)


@on("name", emulator=["awq_adanorm_zero", "awq_plain_k1024"], gpu=["awq_adanorm_zero", "awq_plain_k1024"])
def test_golden(executor, golden, name):
    tensors = golden(name)
    weight = executor.put(AWQWeight(tensors["packed.qweight"], *(tensors[f"packed_trimmed.{field}"]
                                                                 for field in ("wscales", "wzeros"))))
    out, = awq_gemv(executor.put(tensors["io.x"]), [weight.qweight], [weight.wscales], [weight.wzeros],
                    [executor.put(tensors["packed.bias"])])
    want = tensors["io.y_stored_order"].double()
    assert (out.cpu().double() - want).norm() <= 5e-3 * want.norm()


# Saturation: a result beyond fp16 is stored as its largest number of that sign, not as Inf, and NaN stays NaN

def check_saturation(executor):
    it, x = modulation(36, 128, FP16, scale=2.0**10), torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).half()
    x[3, 100] = float("nan")
    out, = run(executor, x, [it])
    assert_saturated(out, *it.product(x), executor.slack)


@on(emulator=True, interpreter=True, gpu=True)
def test_fp16_saturates(executor):
    check_saturation(executor)


@on("file, words, index", emulator=mutations.places(FILE, mutations.CLAMP))
def test_every_clamp_is_needed(executor, file, words, index):
    text = mutations.only(file, "awq_gemv_fp16_b8", mutations.without(file, words, index, "("))
    with executor.set(sources={file: text}), pytest.raises(AssertionError, match="beyond fp16: -?inf"):
        check_saturation(executor)


BARRIERS = mutations.places(FILE, "px::barrier();")


@on("file, words, index", emulator=BARRIERS, interpreter=BARRIERS)
def test_nothing_to_spare(executor, file, words, index):
    """Every barrier is needed: a simulator must see it gone."""
    text = mutations.only(file, "awq_gemv_bf16_b1", mutations.without(file, words, index))
    with executor.set(sources={file: text}), pytest.raises((KernelFault, Fault), match="race|nobody has written|never written"):
        run(executor, random_x(1, 2048, BF16), [modulation(32, 2048)])


PLANTED = {
    "a layer's scales for its zeros": ("layer.wzeros[group", "layer.wscales[group"),
    "second half of a pair as the first": ("px::high_half<T>(pair[i])", "px::low_half<T>(pair[i])"),
    "lanes of a row not all added": ("bits[3] = {16, 8, 1}", "bits[3] = {16, 8, 0}"),
    "last groups dropped": ("local < length / 64", "local < length / 64 - 1"),
    "no bias": ("px::clamped<T>(sums[b] + bias)", "px::clamped<T>(sums[b])"),
    "always the first layer": ("layers.layer[blockIdx.y]", "layers.layer[0]"),
}


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    text = mutations.only(FILE, "awq_gemv_bf16_b8", mutations.planted(FILE, *PLANTED[bug]))
    with executor.set(sources={FILE: text}), pytest.raises((AssertionError, KernelFault)):
        check_two(executor)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={FILE: mutations.only(FILE, "awq_gemv_bf16_b8")}):
        check_two(executor)


def check_two(executor):
    x, modulations = random_x(2, 1088, BF16), [modulation(36, 1088), modulation(64, 1088)]
    for it, out in zip(modulations, run(executor, x, modulations), strict=True):
        assert_rounded(out, *it.product(x), "out")


# The operator: what it launches, what it refuses, what torch.compile sees of it

N, K = 256, 128


def operands(batch=1, layers=2, dtype=BF16, **changes):
    half = [torch.zeros(K // 64, N, dtype=dtype)] * layers
    return [*({"x": torch.zeros(batch, K, dtype=dtype),
               "qweights": [torch.zeros(N // 4, K // 2, dtype=torch.int32)] * layers, "wscales": half, "wzeros": half,
               "biases": [torch.zeros(N, dtype=dtype)] * layers} | changes).values()]


def launch_every_kernel():
    """Calls the operator in every way that picks a kernel, for test_every_variant.py."""
    for dtype in HALVES:
        for batch in range(1, MAX_BATCH + 1):
            awq_gemv(*operands(batch, dtype=dtype))


def test_grid(launches):
    """The widest layer decides; no layer or no row launches nothing."""
    wide = (torch.zeros(N, K // 2, dtype=torch.int32), torch.zeros(K // 64, 4 * N, dtype=BF16),
            torch.zeros(4 * N, dtype=BF16))
    x, qweights, wscales, wzeros, biases = operands()
    awq_gemv(x, [*qweights, wide[0]], [*wscales, wide[1]], [*wzeros, wide[1]], [*biases, wide[2]])
    assert launches.pop().grid == (4 * N // 32, 3)
    assert awq_gemv(x, [], [], [], []) == []
    assert [tuple(out.shape) for out in awq_gemv(*operands(0))] == [(0, N)] * 2
    assert launches == []


def test_layer_struct(launches):
    """The fields of awq_gemv::Layer: five pointers and a 64-bit number. All fit into 4 KiB of arguments."""
    text, (x, qweights, wscales, wzeros, biases) = (CUDA / FILE).read_text(), operands(layers=1)
    out, = awq_gemv(x, qweights, wscales, wzeros, biases)
    structs = launches.pop().arguments[1]
    assert re.findall(r"(\w+);", re.search(r"struct Layer {(.*?)};", text, re.S)[1]) == [
        "qweight", "wscales", "wzeros", "bias", "out", "N"]
    assert all(a is b for a, b in zip(structs.rows[0], [qweights[0], wscales[0], wzeros[0], biases[0]]))
    assert structs.rows[0][4].tensor is out and structs.rows[0][5:] == [N]
    assert int(re.search(r"MAX_LAYERS = (\d+)", text)[1]) == structs.count == MAX_LAYERS
    assert MAX_LAYERS * 48 + 16 <= 4096


@pytest.mark.parametrize("batch, layers, changes, words", [
    (9, 1, {}, r"x is \[9, 128\].*at most 8 rows.* split"),
    (1, 81, {}, "for 81 layers.*at most 80 layers"),
    (2, 1, dict(x=torch.zeros(2, K + 64, dtype=BF16)[:, :K]), "contiguous"),
    (1, 1, dict(x=torch.zeros(K + 2, dtype=BF16)[2:].view(1, K)), "16-byte aligned"),
    (1, 1, dict(x=torch.zeros(1, K)), "float32"),
    (1, 2, dict(wscales=[]), "got 2 qweights, 0 wscales"),
    (1, 2, dict(biases=[torch.zeros(N, dtype=BF16)]), "and 1 biases"),
    (1, 1, dict(qweights=[torch.zeros(N // 4, K // 2, dtype=torch.int8)]), r"qweight is .*int8.*\.int32"),
    (1, 1, dict(qweights=[torch.zeros(N // 4, K, dtype=torch.int32)]), r"qweight is \[64, 128\].* Needs .*\[64, 64\]"),
    (1, 1, dict(wscales=[torch.zeros(1, N, dtype=BF16)]), r"wscales is \[1, 256\].* Needs .*\[2, 256\]"),
    (1, 1, dict(wzeros=[torch.zeros(K // 64, N, dtype=FP16)]), "wzeros is .*float16"),
])
def test_refuses(launches, batch, layers, changes, words):
    with pytest.raises(ShapeError, match="^awq_gemv: .*" + words):
        awq_gemv(*operands(batch, layers, **changes))
    assert launches == []


@pytest.mark.parametrize("operand, words", [(1, "qweight"), (4, "bias")])
def test_operand_on_another_device(launches, operand, words):
    """Called past the dispatcher, for which "meta", the only other device of every machine, means a fake tensor."""
    given = operands()
    given[operand] = [tensor.to("meta") for tensor in given[operand]]
    with pytest.raises(ShapeError, match=f"{words} is .* on meta.* Needs .* on cpu"):
        awq_gemv._init_fn(*given)
    assert launches == []


def test_cpu_tensors():
    with pytest.raises(ShapeError, match="awq_gemv.*: tensors are on cpu. Needs a CUDA GPU"):
        awq_gemv(*operands())


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_fake(launches, tokens):
    real = awq_gemv(*operands(tokens, dtype=FP16))
    with FakeTensorMode(), torch.device("cuda"):
        fake = awq_gemv(*operands(tokens, dtype=FP16))
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


@on(emulator=True)
def test_what_torch_compile_sees(executor):
    """Shapes and dtypes without a launch, and no argument changed."""
    it = modulation(64, 128)
    torch.library.opcheck(awq_gemv, (random_x(2, 128, BF16), [it.weight.qweight], [it.weight.wscales], [it.weight.wzeros],
                                     [it.logical.bias]), test_utils=("test_schema", "test_faketensor"))
