"""quant_down_sm75 and gemm_w4a4_sm75, the kernels of RTX 20: what test_w4a4_sm80.py asks, of fp16 and of what is theirs alone:
MMAs of two or four instructions, stages that are filled through registers. The operators' own checks are asked there.
"""

from dataclasses import replace

import pytest
import torch

from svdq_pack.svdq.kernels import layout, registry
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.rows import row_blocks
from svdq_pack.svdq.kernels.variant import Target
from svdq_pack.svdq.kernels.variants import w4a4_sm75
from svdq_pack.svdq.kernels.variants.w4a4_sm75 import gemm_w4a4_sm75, quant_down_sm75
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.layers import (
    BF16,
    FP16,
    GOLDEN,
    Layer,
    golden_layer,
    launch_feeding,
    launch_modulated,
    layer,
)
from svdq_pack.tests.kernels.families.w4a4 import (
    W4A4,
    barriers,
    blank,
    check_product,
    check_quantised,
    gemm_operands,
    pack,
    quant_operands,
    w4a4_bugs,
)
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

BOTH = W4A4(quant_down_sm75, gemm_w4a4_sm75)
VARIANT, = w4a4_sm75.VARIANTS
GPU_SLACK = 1e-6                            # tensor cores cut off where simulators round
N, K = 256, 640                             # two tiles; ten groups: both stages again and again
QUANT, GEMM, *_ = w4a4_sm75.LIBRARY.sources
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])

# Each number of tokens that ends a tile somewhere else, with one of the ranks in turn.
TAILS = [(rows, (0, 16, 32, 128)[i % 4], N, K) for i, rows in enumerate((1, 15, 16, 17, 63, 64, 65, 255, 257))]


@UNSIGNED
@on("tokens, rank, n, k",
    emulator=[*TAILS, (70, 48, 128, 128), (9, 112, 128, 256), (17, 32, 128, 3072)],
    interpreter=[(21, 32, 128, 256), (70, 48, 128, 128)],
    gpu=[*TAILS, *((rows, rank, N, K) for rows in (17, 130) for rank in (0, 16, 48, 112, 128)), (4608, 32, N, K)])
def test_linear(executor, tokens, rank, n, k, unsigned):
    BOTH.check_linear(executor, layer(n, k, rank, FP16, unsigned), tokens)


@UNSIGNED
@on("n, k, tokens, rank", emulator=[(128, 320, 77, 32), (256, 64, 130, 16)], interpreter=[(128, 192, 77, 16)],
    gpu=[(128, 320, 77, 32), (256, 64, 130, 16)])
def test_product_of_any_operands(executor, n, k, tokens, rank, unsigned):
    """An odd number of groups, and one. All 16 codes, -8 included, which quant_down never makes; any scales."""
    random, it, padded = torch.Generator().manual_seed(1), layer(n, k, rank, FP16, unsigned), row_blocks(tokens, 64) * 64
    codes = torch.randint(*((0, 16) if unsigned else (-8, 8)), (padded, k), generator=random)
    quantised = pack(codes, (torch.rand(padded, k // 64, generator=random) + 0.25).to(FP16).float(),
                     torch.randn(padded, rank, generator=random).to(FP16))
    check_product(executor, it, quantised, BOTH.multiply(executor, it, quantised, blank(tokens, it)))


def halved(golden):
    """A golden layer, which is bf16, as it is on a GPU that multiplies fp16. It holds all of its numbers."""
    halves = {name: value.to(FP16) for name, value in vars(golden.weight).items()
              if isinstance(value, torch.Tensor) and value.dtype == BF16}
    assert all(torch.equal(value.to(BF16), getattr(golden.weight, name)) for name, value in halves.items())
    return Layer(replace(golden.weight, **halves), golden.bias.to(FP16))


@on("name", emulator=GOLDEN, interpreter=GOLDEN, gpu=GOLDEN)
def test_golden_linear(executor, golden, name):
    """Codes and scales of the golden x as in reference.py, to the bit; the product of the golden codes near the golden one."""
    tensors = golden(f"linear_int4_{name}")
    it, x = halved(golden_layer(tensors, unsigned="unsigned" in name)), tensors["io.x"].to(FP16)
    x, want, tokens = layout.pad(x, 1, it.shape[1]), tensors["io.y_act_quant"].double(), len(x)
    quantised = BOTH.quantise(executor, it, x)
    check_quantised(executor, it, x, quantised)
    out = BOTH.multiply(executor, it, quantised, blank(tokens, it))
    check_product(executor, it, quantised, out)
    # the golden codes are of bf16: a few flip where rounding differs, each a tenth of what rounding to 4 bits does
    assert (out[:, :want.shape[1]].double() - want).norm() <= 4e-2 * want.norm()
    given = (layout.pad(tensors[f"io.{part}"], 64, 1) for part in ("q_act", "ascales", "lora_act"))
    out = BOTH.multiply(executor, it, pack(*(part.to(kind) for part, kind in zip(given, (torch.int8, torch.float32, FP16)))),
                        blank(tokens, it))
    assert (out[:, :want.shape[1]].double() - want).norm() <= 1e-3 * want.norm()


@on("n, k", emulator=[(N, K)], interpreter=[(128, 128)], gpu=[(N, K)])
def test_bias_accumulate_and_strides(executor, n, k):
    it, tokens = layer(n, k, 16, FP16), 17
    quantised = BOTH.quantise(executor, it, it.x(tokens))
    out = BOTH.multiply(executor, it, quantised, blank(tokens, it), bias=False, order="reverse")
    check_product(executor, it, quantised, out, bias=False)
    room = torch.randn(tokens, n + 8, generator=torch.Generator().manual_seed(3)).to(FP16)
    before = room.clone()
    total = BOTH.multiply(executor, it, quantised, room[:, :n], bias=False, accumulate=True)
    check_product(executor, it, quantised, total, before=before[:, :n], bias=False)
    assert torch.equal(room[:, n:], before[:, n:])


@on(emulator=True, interpreter=True)
def test_bad_tokens(executor):
    """A NaN or Inf makes its own token NaN and no other."""
    it = layer(128, 128, 16, FP16)
    x, bad = it.x(20), [2, 5, 9]
    clean = BOTH.multiply(executor, it, BOTH.quantise(executor, it, x), blank(20, it))
    x[2, 70], x[5, 3], x[9, 127] = float("nan"), float("inf"), -float("inf")
    out = BOTH.multiply(executor, it, BOTH.quantise(executor, it, x), blank(20, it))
    others = [row for row in range(20) if row not in bad]
    assert out[bad].isnan().all() and torch.equal(out[others], clean[others])


@on("tokens, n, k, orders", emulator=[(130, N, K, ("forward", "reverse", 1, 2))],
    interpreter=[(21, 128, 256, ("forward", "reverse"))])
def test_order_changes_nothing(executor, tokens, n, k, orders):
    it = layer(n, k, dtype=FP16)
    x, results = it.x(tokens), []
    for order in orders:
        quantised = BOTH.quantise(executor, it, x, order=order)
        results.append((*quantised, BOTH.multiply(executor, it, quantised, blank(tokens, it), order=order)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@on(emulator=True)
def test_as_sm_80(executor):
    """The same numbers to the bit: the same MMAs, in the same order."""
    from svdq_pack.tests.kernels.families.test_w4a4_sm80 import BOTH as SM80
    it = layer(N, K, 48, FP16)
    ours, theirs = (both.quantise(executor, it, it.x(70)) for both in (BOTH, SM80))
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(*(both.multiply(executor, it, ours, blank(70, it)) for both in (BOTH, SM80)))


# Saturation

SATURATING = {GEMM: ("gemm_w4a4_sm75_fp16_s4", BOTH.check_saturation_of_product),
              QUANT: ("quant_down_sm75_fp16_s4_r32", BOTH.check_saturation_of_low)}


@on("file", emulator=SATURATING, interpreter=SATURATING, gpu=SATURATING)
def test_fp16_saturates(executor, file):
    SATURATING[file][1](executor)


@on("file, words, index", emulator=[case for file in SATURATING for case in mutations.places(file, mutations.CLAMP)])
def test_every_clamp_is_needed(executor, file, words, index):
    kernel, check = SATURATING[file]
    text = mutations.only(file, kernel, mutations.without(file, words, index, "("))
    with executor.set(sources={file: text}), pytest.raises(AssertionError, match="beyond fp16: -?inf"):
        check(executor)


# Every barrier is needed, and bugs are caught

KERNELS = {QUANT: "quant_down_sm75_fp16_s4_r32", GEMM: "gemm_w4a4_sm75_fp16_s4"}
BARRIERS = [*barriers("quant_down_sm75.cuh"),
            *mutations.places("gemm_w4a4_sm75.cuh", "px::barrier();", outside=("tile.cuh",))]


@on("file, words, index", emulator=BARRIERS, interpreter=BARRIERS)
def test_nothing_to_spare(executor, file, words, index):
    it = layer(128, 256, 32, FP16)
    x, text = it.x(20), mutations.only(file, KERNELS[file], mutations.without(file, words, index))
    quantised = BOTH.quantise(executor, it, x) if file == GEMM else None
    with executor.set(sources={file: text}), pytest.raises((KernelFault, Fault), match="race|nobody has written|never written"):
        if quantised is None:
            BOTH.quantise(executor, it, x)
        else:
            BOTH.multiply(executor, it, quantised, blank(20, it))


# Those of the shared bodies are planted by test_w4a4_sm80.py; a few show that they would be seen here, too.
SHARED = ("rows of an activation scale swapped", "last group dropped", "low rank of the wrong tile",
          "low rank fed the other row")
PLANTED = {bug: w4a4_bugs(*KERNELS)[bug] for bug in SHARED} | {
    "a stage filled from this group": (GEMM, "next = group + 1 < groups ? group + 1 : group", "next = group"),
    "a piece to the stage in use": (GEMM, "fill(other, 2);", "fill(stages[i], 2);"),
    "a piece never stored": (GEMM, "fill(other, 3);", ""),
    "scales of activations only": (GEMM, "if (threadIdx.x < SCALES)", "if (threadIdx.x < 32)"),
    "weights loaded for activations": (GEMM, "pieces.of_activations(next, load)", "pieces.of_weights(next, load)"),
}


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    text = mutations.only(file, KERNELS[file], mutations.planted(file, right, wrong))
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        BOTH.check_linear(executor, layer(N, K, 32, FP16), 65)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={file: mutations.only(file, kernel) for file, kernel in KERNELS.items()}):
        BOTH.check_linear(executor, layer(N, K, 32, FP16), 65)


MMA = {"words of A swapped": ("mma_i4<A_UNSIGNED>(d[2], d[3], a.y, b0", "mma_i4<A_UNSIGNED>(d[2], d[3], a.x, b0"),
       "halves of K swapped": ("mma_i4<A_UNSIGNED>(d[0], d[1], a.z, b1, d[0], d[1])",
                               "mma_i4<A_UNSIGNED>(d[0], d[1], a.z, b0, d[0], d[1])"),
       "not added to the first half": ("a.w, b1, d[2], d[3])", "a.w, b1, c[2], c[3])"),
       "half of a 16-bit product": ("mma_fp16(c, a.z, a.w, b1);", "")}


@on("bug", interpreter=MMA)
def test_planted_bug_of_an_mma_is_caught(executor, bug):
    """What the emulator does not run: how the MMAs of sm_80 are made of those of sm_75."""
    right, wrong = MMA[bug]
    header = (toolchain.KERNELS / "ptx.cuh").read_text()
    assert right in header
    it = layer(128, 128, 16, FP16)
    quantised = BOTH.quantise(executor, it, it.x(20))
    text = mutations.only(GEMM, KERNELS[GEMM]).replace('#include "ptx.cuh"', header.replace(right, wrong))
    with executor.set(sources={GEMM: text}), pytest.raises(AssertionError, match="wrong, first"):
        check_product(executor, it, quantised, BOTH.multiply(executor, it, quantised, blank(20, it)))


# What they launch and refuse, and where they serve

def launch_every_kernel():
    """Calls the operators in every way that picks a kernel, for test_every_variant.py."""
    for unsigned in (False, True):
        for rank in (0, 16, 32, 48, 128):
            quant_down_sm75(*quant_operands(rank=rank, dtype=FP16)[:-1], unsigned)
        gemm_w4a4_sm75(*gemm_operands(dtype=FP16)[:-2], unsigned, False)
    launch_modulated(VARIANT, FP16)
    launch_feeding(VARIANT, FP16)


@pytest.mark.parametrize("tokens, blocks", [(1, 1), (65, 2), (4608, 72)])
def test_grids(launches, tokens, blocks):
    quant_down_sm75(*quant_operands(tokens, dtype=FP16))
    gemm_w4a4_sm75(*gemm_operands(tokens, dtype=FP16))
    down, gemm = launches
    assert (down.grid, down.block) == ((blocks * 4, 1), 256)
    assert (gemm.grid, gemm.block) == ((256 // 128, -(-tokens // 128)), 128)


@pytest.mark.parametrize("op, operands, what", [(quant_down_sm75, quant_operands, "x"), (gemm_w4a4_sm75, gemm_operands, "out")])
def test_bf16_is_refused(launches, op, operands, what):
    with pytest.raises(ShapeError, match=f"^{op._name.removeprefix('svdq::')}: {what} is bfloat16. Needs float16"):
        op(*operands(dtype=BF16))
    assert launches == []


@pytest.mark.parametrize("name, serves", [
    ("NVIDIA GeForce RTX 2080 Ti", True), ("NVIDIA GeForce RTX 2060 SUPER", True), ("Tesla T4", True), ("Tesla T10", True),
    ("Quadro RTX 5000 with Max-Q Design", True), ("NVIDIA TITAN RTX", True), ("GeForce GTX 1660 Ti", False),
    ("NVIDIA GeForce GTX 1650 with Max-Q Design", False), ("NVIDIA GeForce GTX 1630", False), ("NVIDIA GeForce MX450", False),
    ("NVIDIA GeForce MX550", False), ("NVIDIA T400 4GB", False), ("NVIDIA T500", False), ("NVIDIA T600 Laptop GPU", False),
    ("NVIDIA T1000 8GB", False), ("NVIDIA T1200 Laptop GPU", False), ("Quadro T2000 with Max-Q Design", False),
    ("NVIDIA CMP 30HX", False)])
def test_whom_it_serves(monkeypatch, name, serves):
    """Not those of sm_75 without tensor cores. Modulation needs none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    target = Target.of("cuda:0")._replace(index=None)
    plan = registry.plan(example("int4", FP16), target, FP16)
    assert (plan.variant is VARIANT) == serves
    assert registry.plan(example("awq", FP16), target, FP16).variant.name == "awq_gemv"
    assert (VARIANT.library in registry.libraries(target)) == serves
    if not serves:
        assert dict(plan.declined)[VARIANT] == f"needs tensor cores, which {name} lacks"
        assert plan.variant.library is not None or f"which {name} lacks" in plan.shortfall(example("int4", FP16), target)


def test_bf16_is_not_served():
    plan = registry.plan(example("int4", BF16), Target("cuda", (7, 5)), BF16)
    assert dict(plan.declined)[VARIANT] == "takes float16, not bfloat16"
