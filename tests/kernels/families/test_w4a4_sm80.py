"""quant_down and gemm_w4a4, the kernels of RTX 30 and 40 and of the A100: results against float64 and reference.py, element by
element, on every executor; conduct by the checks of the simulators; the operators by themselves.
"""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import layout, reference, w4a4
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.rows import row_blocks
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import w4a4_sm80
from svdq_pack.svdq.kernels.variants.w4a4_sm80 import gemm_w4a4, quant_down
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.layers import BF16, FP16, GOLDEN, golden_layer, launch_feeding, launch_modulated, layer
from svdq_pack.tests.kernels.families.w4a4 import (
    W4A4,
    barriers,
    blank,
    check_product,
    gemm_operands,
    pack,
    quant_operands,
    unpack,
    w4a4_bugs,
)
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

BOTH = W4A4(quant_down, gemm_w4a4)
VARIANT = next(variant for variant in w4a4_sm80.VARIANTS if variant.name == "w4a4_emulated")    # which also runs on later GPUs
GPU_SLACK = 1e-6                            # tensor cores cut off where simulators round
RANKS = (0, 16, 32, 128)
N, K = 256, 640                             # two tiles; ten groups: more than a ring of stages, or the warps of quant_down
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])


@UNSIGNED
def test_decode(unsigned):
    """The variant's own decoder, and the one of this file, undo `pack`."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(*((0, 16) if unsigned else (-8, 8)), (128, 192), generator=random)
    scales, low = torch.rand(128, 3, generator=random), torch.randn(128, 48, generator=random).to(BF16)
    prepared = pack(codes, scales, low)
    want = codes.float(), scales, low
    assert all(map(torch.equal, w4a4.decode(prepared, layer(128, 128, unsigned=unsigned).weight), want))
    assert all(map(torch.equal, (part.to(like.dtype) for part, like in zip(unpack(prepared, unsigned), want)), want))


# Both kernels, every shape

def tails(*tokens):
    """Each number of tokens with one of the ranks in turn."""
    return [(rows, RANKS[i % 4], N, K) for i, rows in enumerate(tokens)]


TAILS = tails(1, 15, 16, 17, 63, 64, 65, 255, 257)


@UNSIGNED
@DTYPES
@on("tokens, rank, n, k", emulator=[*TAILS, (17, 0, N, K), (65, 16, N, K), (1, 128, N, K)],
    interpreter=[(21, 32, 128, 640), (70, 48, 128, 128)],
    gpu=[*TAILS, *((rows, rank, N, K) for rows in (17, 130) for rank in (0, 16, 48, 112, 128)), (4608, 32, N, K)])
def test_linear(executor, tokens, rank, n, k, dtype, unsigned):
    BOTH.check_linear(executor, layer(n, k, rank, dtype, unsigned), tokens)


@UNSIGNED
@on("k, dtype", emulator=[(128, BF16), (256, FP16), (3072, BF16)], gpu=[(k, d) for k in (128, 256, 3072) for d in HALVES])
def test_depth(executor, k, dtype, unsigned):
    """Fewer groups than stages of the ring; FLUX's width."""
    BOTH.check_linear(executor, layer(128, k, 32, dtype, unsigned), 70)


@on("n, k, unsigned, tokens, every",
    emulator=[(3072, 3072, False, 17, 1), (12288, 128, False, 17, 1), (128, 12288, True, 17, 1)],
    gpu=[(9216, 3072, False, 129, 7), (3072, 12288, True, 129, 7), (12288, 3072, False, 129, 7)])
def test_flux_layers(executor, n, k, unsigned, tokens, every):
    """Whole layers of FLUX.1, all tiles; in the emulator a small one, and the widest and the deepest."""
    BOTH.check_linear(executor, layer(n, k, 32, BF16, unsigned), tokens, slice(None, None, every))


OPERANDS_OF = [(128, 320, 77, 32),      # an odd number of groups
               (256, 64, 130, 16)]      # four CTAs, two of them nearly without rows


@UNSIGNED
@DTYPES
@on("n, k, tokens, rank", emulator=OPERANDS_OF, interpreter=OPERANDS_OF, gpu=OPERANDS_OF)
def test_product_of_any_operands(executor, n, k, tokens, rank, dtype, unsigned):
    """All 16 codes, -8 included, which quant_down never makes; any scales."""
    random, it, padded = torch.Generator().manual_seed(1), layer(n, k, rank, dtype, unsigned), row_blocks(tokens, 64) * 64
    codes = torch.randint(*((0, 16) if unsigned else (-8, 8)), (padded, k), generator=random)
    quantised = pack(codes, (torch.rand(padded, k // 64, generator=random) + 0.25).to(dtype).float(),
                     torch.randn(padded, rank, generator=random).to(dtype))
    out = BOTH.multiply(executor, it, quantised, blank(tokens, it))
    check_product(executor, it, quantised, out)
    codes, scales, low = (part[:tokens] for part in unpack(quantised, unsigned))
    spec = reference.gemm_w4a4(codes.float(), scales, layout.signed(it.logical.codes), it.logical.wscales, low,
                               it.logical.proj_up, it.bias, precision="int4")
    exact, _ = it.product(codes, scales, low)
    assert (exact - spec).norm() < 1e-6 * exact.norm()


@on("dtype, lowest, highest", emulator=[(BF16, -110, 90), (FP16, -24, 6)], gpu=[(BF16, -110, 90), (FP16, -24, 6)])
def test_scales_of_any_size(executor, dtype, lowest, highest):
    """A sum times its scale is the difference of two numbers a thousand times as large or more, and exact."""
    random, n, k, tokens = torch.Generator().manual_seed(2), 128, 256, 17
    sizes = 2.0**torch.randint(lowest, highest, (k // 64, n), generator=random)
    it = layer(n, k, 0, dtype).changed(wscales=(sizes * (1 + torch.rand(k // 64, n, generator=random))).to(dtype))
    quantised = pack(torch.randint(-8, 8, (64, k), generator=random), torch.full((64, k // 64), 0.125),
                     torch.zeros(64, 0, dtype=dtype))
    check_product(executor, it, quantised, BOTH.multiply(executor, it, quantised, blank(tokens, it), bias=False), bias=False)


@on("name", emulator=GOLDEN, gpu=GOLDEN)
def test_golden_linear(executor, golden, name):
    """Tensors as in a checkpoint."""
    tensors = golden(f"linear_int4_{name}")
    it = golden_layer(tensors, unsigned="unsigned" in name)
    want = tensors["io.y_act_quant"].double()
    got = BOTH.check_golden(executor, it, layout.pad(tensors["io.x"], 1, it.shape[1]), *(tensors[f"io.{part}"] for part in (
        "q_act", "ascales", "lora_act")))[:, :want.shape[1]].double()
    assert (got - want).norm() <= 4e-3 * want.norm()                            # bf16 output; fixtures/format/README.md


@on(emulator=True, gpu=True)
def test_golden_mlp(executor, golden):
    """fc1, GELU, fc2: each stage from the golden input of that stage, since a rounded GELU may flip a code."""
    tensors = golden("mlp_int4_fused_gelu")
    fc1, fc2 = golden_layer(tensors, False, "packed.fc1."), golden_layer(tensors, True, "packed.fc2.")
    x = tensors["io.x"]
    got = BOTH.multiply(executor, fc1, BOTH.quantise(executor, fc1, x), blank(len(x), fc1)).double()
    want = tensors["io.h_act_quant"].double()
    assert (got - want).norm() <= 4e-3 * want.norm()                            # bf16 output
    got = BOTH.check_golden(executor, fc2, tensors["io.gelu_bf16"], *(tensors[f"io.fc2_{part}"] for part in (
        "q_act", "ascales", "lora_act"))).double()
    want = tensors["io.y_act_quant"].double()
    assert (got - want).norm() <= 4e-3 * want.norm()


# Options

@on("tokens, k, dtype", emulator=[(65, K, BF16), (65, K, FP16)], interpreter=[(20, 128, BF16), (20, 128, FP16)],
    gpu=[(65, K, BF16), (65, K, FP16)])
def test_row_strides(executor, tokens, k, dtype):
    """x and out as columns of wider tensors; what lies between stays."""
    it = layer(128, k, 16, dtype)
    x, weight = it.x(tokens), executor.put(it.weight)
    room = executor.put(torch.full((tokens, k + 6), float("nan"), dtype=dtype))
    room[:, :k] = executor.put(x)
    strided, plain = quant_down(room[:, :k], weight.smooth, weight.proj_down, False), BOTH.quantise(executor, it, x)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(strided, plain))
    wide = executor.put(torch.full((tokens, 128 + 8), 9.0, dtype=dtype))
    gemm_w4a4(*strided, weight.qweight, weight.wscales, weight.proj_up, executor.put(it.bias), wide[:, :128], False, False)
    assert torch.equal(wide[:, :128].cpu(), BOTH.multiply(executor, it, plain, blank(tokens, it)))
    assert (wide[:, 128:] == 9).all()


@on("n, k, dtype", emulator=[(N, K, BF16), (N, K, FP16)], interpreter=[(128, 128, BF16), (128, 128, FP16)],
    gpu=[(N, K, BF16), (N, K, FP16)])
def test_bias_and_accumulate(executor, n, k, dtype):
    it, tokens = layer(n, k, 16, dtype), 17
    quantised = BOTH.quantise(executor, it, it.x(tokens))
    out = BOTH.multiply(executor, it, quantised, blank(tokens, it), bias=False, order="reverse")
    check_product(executor, it, quantised, out, bias=False)
    before = torch.randn(tokens, n, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = BOTH.multiply(executor, it, quantised, before.clone(), bias=False, accumulate=True)
    check_product(executor, it, quantised, total, before=before, bias=False)


@on("tokens, dtype", emulator=[(20, BF16), (20, FP16)], interpreter=[(16, BF16)], gpu=[(130, BF16), (130, FP16)])
def test_bad_tokens(executor, tokens, dtype):
    """A NaN or Inf makes its own token NaN, as in reference.py, and no other: its scale tells, its codes are 0."""
    it = layer(128, 128, 16, dtype)
    x, bad = it.x(tokens), [2, 5, 9]
    clean = BOTH.multiply(executor, it, BOTH.quantise(executor, it, x), blank(tokens, it))
    x[2, 70], x[5, 3], x[9, 127] = float("nan"), float("inf"), -float("inf")
    quantised = BOTH.quantise(executor, it, x)
    codes, scales, _ = (part[:tokens] for part in unpack(quantised, False))
    spec_codes, spec_scales, _ = reference.quant_down(x, it.logical.smooth, it.logical.proj_down, precision="int4")
    assert torch.equal(codes[bad], spec_codes[bad].int())
    assert torch.equal(scales.nan_to_num(nan=-1), spec_scales.float().nan_to_num(nan=-1))
    out = BOTH.multiply(executor, it, quantised, blank(tokens, it))
    others = [row for row in range(tokens) if row not in bad]
    assert out[bad].isnan().all() and torch.equal(out[others], clean[others])


@on("tokens, n, k, orders", emulator=[(130, N, K, ("forward", "reverse", 1, 2))],
    interpreter=[(21, 128, 384, ("forward", "reverse"))])
def test_order_changes_nothing(executor, tokens, n, k, orders):
    it = layer(n, k)
    x, results = it.x(tokens), []
    for order in orders:
        quantised = BOTH.quantise(executor, it, x, order=order)
        results.append((*quantised, BOTH.multiply(executor, it, quantised, blank(tokens, it), order=order)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@on(emulator=True, interpreter=True)
def test_group_of_nothing(executor):
    """Activations that the shift of an unsigned layer makes zero: scale 0, codes 0."""
    it = layer(128, 128, 16, unsigned=True)
    x = it.x(16)
    x[3, 64:] = -reference.SHIFT
    codes, scales, _ = unpack(BOTH.quantise(executor, it, x), True)
    assert scales[3, 0] > 0 and scales[3, 1] == 0 and not codes[3, 64:].any()


# Saturation

SATURATING = {"gemm_w4a4.cuh": ("gemm_w4a4_fp16_s4", BOTH.check_saturation_of_product),
              "quant_down.cuh": ("quant_down_fp16_s4_r32", BOTH.check_saturation_of_low)}


@on("file", emulator=SATURATING, interpreter=SATURATING, gpu=SATURATING)
def test_fp16_saturates(executor, file):
    SATURATING[file][1](executor)


@on("file, words, index", emulator=[case for file in SATURATING for case in mutations.places(file, mutations.CLAMP)])
def test_every_clamp_is_needed(executor, file, words, index):
    kernel, check = SATURATING[file]
    text = mutations.only(file, kernel, mutations.without(file, words, index, "("))
    with executor.set(sources={file: text}), pytest.raises(AssertionError, match="beyond fp16: -?inf"):
        check(executor)


# Every barrier and wait is needed: a simulator must see it gone

KERNELS = {"quant_down.cuh": "quant_down_bf16_s4_r32", "gemm_w4a4.cuh": "gemm_w4a4_bf16_s4"}
BARRIERS = [*barriers("quant_down.cuh"),
            *mutations.places("gemm_w4a4.cuh", "px::barrier();", outside=("tile.cuh",))]


@on("file, words, index", interpreter=BARRIERS, emulator=[*BARRIERS, *mutations.places(
    "gemm_w4a4.cuh", "px::copy_commit();", "px::copy_wait<STAGES - 2>();")])
def test_nothing_to_spare(executor, file, words, index):
    it = layer(128, 640)
    x, text = it.x(20), mutations.only(file, KERNELS[file], mutations.without(file, words, index))
    quantised = BOTH.quantise(executor, it, x) if file == "gemm_w4a4.cuh" else None
    with executor.set(sources={file: text}), pytest.raises(
            (KernelFault, Fault), match="race|nobody has written|never written|has not landed|on its way|in no group"):
        if quantised is None:
            BOTH.quantise(executor, it, x)
        else:
            BOTH.multiply(executor, it, quantised, blank(20, it))


# Bugs of value, planted one at a time: the comparisons above must fail

PLANTED = w4a4_bugs(*KERNELS)


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    text = mutations.only(file, KERNELS[file], mutations.planted(file, right, wrong))
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        BOTH.check_linear(executor, layer(N, K), 65)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={file: mutations.only(file, kernel) for file, kernel in KERNELS.items()}):
        BOTH.check_linear(executor, layer(N, K), 65)


# The operators: what they launch, what they refuse, what torch.compile sees of them

OPERANDS = {quant_down: quant_operands, gemm_w4a4: gemm_operands}


def launch_every_kernel():
    """Calls the operators in every way that picks a kernel, for test_every_variant.py."""
    for dtype in HALVES:
        for unsigned in (False, True):
            for rank in (0, 16, 32, 48, 128):
                quant_down(*quant_operands(rank=rank, dtype=dtype)[:-1], unsigned)
            gemm_w4a4(*gemm_operands(dtype=dtype)[:-2], unsigned, False)
        launch_modulated(VARIANT, dtype)
        launch_feeding(VARIANT, dtype)


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (64, 1), (65, 2), (4608, 72)])
def test_grids(launches, tokens, blocks):
    quant_down(*quant_operands(tokens))
    gemm_w4a4(*gemm_operands(tokens))
    if tokens == 0:
        assert launches == []
        return
    down, gemm = launches
    assert (down.grid, down.block) == ((blocks * 4, 1), 256)
    assert (gemm.grid, gemm.block) == ((256 // 128, -(-tokens // 128)), 128)


def strided(*shape, dtype=BF16):
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def shifted(*shape, dtype=BF16, by=1):
    return torch.zeros(by + torch.Size(shape).numel(), dtype=dtype)[by:].view(shape)


@pytest.mark.parametrize("changes, words", [
    (dict(x=torch.zeros(3, 128)), r"x is \[3, 128\] torch.float32"),
    (dict(x=torch.zeros(128, dtype=BF16)), r"x is \[128\]"),
    (dict(x=torch.zeros(3, 100, dtype=BF16)), "multiple of 64"),
    (dict(x=strided(3, 128)), r"strides \(256, 2\).* call .contiguous"),
    (dict(x=torch.zeros(3, 129, dtype=BF16)[:, :128]), r"strides \(129, 1\)"),
    (dict(x=shifted(3, 128)), "aligned to 4 bytes"),
    (dict(smooth=torch.ones(128, dtype=FP16)), "smooth is .*float16.* Needs .*bfloat16"),
    (dict(smooth=torch.ones(64, dtype=BF16)), r"smooth is \[64\].* Needs .*\[128\]"),
    (dict(smooth=strided(128)), "smooth .*strides"),
    (dict(smooth=shifted(128)), "smooth .*aligned"),
    (dict(proj_down=torch.zeros(128, 24, dtype=BF16)), "rank 24. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(128, 144, dtype=BF16)), "rank 144. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(64, 32, dtype=BF16)), r"proj_down is \[64, 32\].* Needs .*\[128, 32\]"),
])
def test_quant_down_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^quant_down: .*" + words):
        quant_down(*quant_operands(**changes))
    assert launches == []


@pytest.mark.parametrize("changes, words", [
    (dict(out=torch.zeros(3, 256)), "out is .*float32"),
    (dict(out=torch.zeros(256, dtype=BF16)), r"out is \[256\]"),
    (dict(out=torch.zeros(3, 384, dtype=BF16)), r"out is \[3, 384\].* Needs \[tokens, 256\]"),
    (dict(out=torch.zeros(3, 260, dtype=BF16)[:, :256]), r"strides \(260, 1\).*16 bytes"),
    (dict(out=strided(3, 256)), r"strides \(512, 2\)"),
    (dict(out=shifted(3, 256)), "aligned to 16 bytes"),
    (dict(qweight=torch.zeros(192, 64, dtype=torch.int8), out=torch.zeros(3, 192, dtype=BF16)), "multiple of 128"),
    (dict(out=torch.zeros(65, 256, dtype=BF16)), r"qact is \[1, 2, 4, 32, 4\].* Needs .*\[2, 2, 4, 32, 4\]"),
    (dict(qact=torch.zeros(1, 3, 4, 32, 4, dtype=torch.int32)), "qact is"),
    (dict(qact=torch.zeros(1, 2, 4, 32, 4)), r"qact is .*float32.*\.int32"),
    (dict(ascales=torch.zeros(1, 2, 4, 8, 2, dtype=BF16)), "ascales is .*bfloat16.* Needs .*float32"),
    (dict(low=torch.zeros(4, 2, 32, 8, dtype=FP16)), "low is .*float16"),
    (dict(low=torch.zeros(4, 1, 32, 8, dtype=BF16)), r"proj_up is \[256, 32\].* Needs .*\[256, 16\]"),
    (dict(low=torch.zeros(4, dtype=BF16)), "low is"),
    (dict(qweight=torch.zeros(256, 64, dtype=torch.uint8)), r"qweight is .*uint8.*\.int8"),
    (dict(qweight=shifted(256, 64, dtype=torch.int8, by=8)), "qweight .*aligned"),
    (dict(wscales=torch.zeros(256, 2, dtype=BF16)), r"wscales is \[256, 2\].* Needs .*\[2, 256\]"),
    (dict(wscales=torch.zeros(2, 256, dtype=FP16)), "wscales is .*float16"),
    (dict(proj_up=None), "rank 32 but proj_up is missing"),
    (dict(bias=torch.zeros(256)), "bias is .*float32"),
    (dict(bias=torch.zeros(128, dtype=BF16)), r"bias is \[128\]"),
])
def test_gemm_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^gemm_w4a4: .*" + words):
        gemm_w4a4(*gemm_operands(**changes))
    assert launches == []


def test_what_needs_no_alignment(launches):
    """The row stride of a single row means nothing; a bias may be a piece of a longer one."""
    quant_down(*quant_operands(x=torch.zeros(1, 129, dtype=BF16)[:, :128]))
    gemm_w4a4(*gemm_operands(1, out=torch.zeros(1, 260, dtype=BF16)[:, :256], bias=shifted(256, by=2)))
    gemm_w4a4(*gemm_operands(rank=0, proj_up=None, bias=None))
    assert len(launches) == 3


@pytest.mark.parametrize("op, operand, words", [(quant_down, 1, "smooth"), (quant_down, 2, "proj_down"), (gemm_w4a4, 0, "qact"),
                                                (gemm_w4a4, 3, "qweight"), (gemm_w4a4, 6, "bias")])
def test_operand_on_another_device(launches, op, operand, words):
    """Called past the dispatcher, for which "meta", the only other device of every machine, means a fake tensor."""
    operands = OPERANDS[op]()
    operands[operand] = operands[operand].to("meta")
    with pytest.raises(ShapeError, match=f"{words} is .* on meta.* Needs .* on cpu"):
        op._init_fn(*operands)
    assert launches == []


@pytest.mark.parametrize("op", OPERANDS, ids=lambda op: op._name)
def test_cpu_tensors(op):
    with pytest.raises(ShapeError, match=f"{op._name.removeprefix('svdq::')}.*: tensors are on cpu. Needs a CUDA GPU"):
        op(*OPERANDS[op]())


@pytest.mark.parametrize("rank", [0, 16, 128])
@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_fake_quant_down(launches, tokens, rank):
    real = quant_down(*quant_operands(tokens, rank))
    with FakeTensorMode(), torch.device("cuda"):
        fake = quant_down(*quant_operands(tokens, rank))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert {f.device.type for f in fake} == {"cuda"}


@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_fake_gemm(tokens):
    """Nothing comes back, `out` is what it was."""
    with FakeTensorMode(), torch.device("cuda"):
        operands = gemm_operands(tokens)
        assert gemm_w4a4(*operands) is None
        assert operands[7].shape == (tokens, 256)


@on(emulator=True)
def test_what_torch_compile_sees(executor):
    """Shapes and dtypes without a launch, and no argument changed but `out`."""
    it = layer(128, 128, 16)
    arguments = it.x(3), it.weight.smooth, it.weight.proj_down, False
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    check(quant_down, arguments)
    check(gemm_w4a4, (*quant_down(*arguments), it.weight.qweight, it.weight.wscales, it.weight.proj_up, it.bias,
                      torch.zeros(3, 128, dtype=BF16), False, False))
