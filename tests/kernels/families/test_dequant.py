"""dequant, what serves a GPU without 4-bit products: its numbers to the bit those of torch, on every executor; the linear
against float64; how many bytes move; the operator by itself.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdq_pack.svdq.kernels import check, layout, reference, weights
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.layout import GROUP
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import dequant as family
from svdq_pack.svdq.kernels.variants import weight_only
from svdq_pack.svdq.kernels.variants.dequant import PRECISIONS, dequant
from svdq_pack.svdq.kernels.weights import W4A4Weight
from svdq_pack.tests.kernels import executors
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded
from svdq_pack.tests.kernels.families.layers import BF16, FP16, GOLDEN
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault

VARIANT, = family.VARIANTS
GPU_SLACK = 4e-3                # a library may add in 16 bit what it split K into
FILE = "dequant.cuh"
KINDS = ("int4", "nvfp4", "nvfp4 wcscales")
GOLDEN_LINEARS = [*(f"int4_{name}" for name in GOLDEN), "nvfp4_wtscale_r32", "nvfp4_wcscales_qkv_r16"]
BITS = {1: torch.uint8, 2: torch.int16}
EACH = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())


def any_bits(*shape, dtype, seed=0):
    """Every pattern of bits as likely as another: infinite, NaN, subnormal, of either sign."""
    size = dtype.itemsize
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 8 * size - 1), 1 << 8 * size - 1, shape, generator=random).to(
        {1: torch.int8, 2: torch.int16}[size]).view(dtype)


@functools.cache
def weight(kind, n, k, half=BF16, rank=0):
    """A random weight whose codes are any, and whose scales are of every sign and size that does not overflow."""
    precision, random = kind.split()[0], torch.Generator().manual_seed(n + k)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=random) * scale

    scales = normal(n, k // GROUP[precision]).to(half if precision == "int4" else torch.float8_e4m3fn)
    return W4A4Weight(
        precision, False, any_bits(n, k // 2, dtype=torch.int8), layout.pack_scales(scales),
        layout.pack_vector((normal(-(-k // 128) * 128).abs() + 0.5).to(half)),       # numbers alone take other k as well
        layout.pack_down(normal(k, rank, scale=0.05).to(half)) if rank else None,
        layout.pack_up(normal(n, rank).to(half)) if rank else None,
        layout.pack_vector(normal(n).to(half)) if kind.endswith("wcscales") else None, 0.3 if kind == "nvfp4" else 1.0)


def numbers(executor, weight, dtype, beside=0, **how):
    """dequant of a weight on the CPU, into a tensor whose rows have this much room between them."""
    (n, k), there = weight.shape, executor.put(weight)
    wide = executor.put(torch.full((n, k + beside), 9.0, dtype=dtype))
    with executor.set(**how):
        dequant(there.qweight, there.wscales, there.wcscales, there.wtscale, wide[:, :k])
    assert (wide[:, k:] == 9).all()
    return wide[:, :k].cpu()


def assert_same_bits(got, want):
    """All bits but those of a NaN, and what torch makes of a weight both on a CPU and with its operations for GPUs."""
    assert torch.equal(got.isnan(), want.isnan()) and got.shape == want.shape
    bits = [part.contiguous().view(BITS[part.element_size()])[~want.isnan()] for part in (got, want)]
    assert torch.equal(*bits), f"{int((bits[0] != bits[1]).sum())} of {want.numel()} differ"


def torch_numbers(weight, dtype):
    """W4A4Weight.dense as torch computes it for a GPU, here; its way for a CPU has the same bits."""
    on_cpu = weight.dense(dtype).clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "on_cpu", lambda tensor: False)
        on_gpu = weight.dense(dtype)
    assert_same_bits(on_gpu, on_cpu)
    return on_gpu


# The numbers

SHAPES = [(128, 128), (128, 384), (384, 128), (256, 640)]


@EACH
@DTYPES
@pytest.mark.parametrize("half", HALVES, ids=[f"of-{name}" for name in HALVES.values()])
@on("n, k, beside", emulator=[(n, k, 8 * i) for i, (n, k) in enumerate(SHAPES)] + [(128, 64, 0)],
    interpreter=[(256, 128, 16)], gpu=[*((n, k, 8) for n, k in SHAPES), (3072, 12288, 32), (12288, 3072, 0)])
def test_numbers(executor, n, k, beside, kind, dtype, half):
    """Every row and column of every shape, whatever 16-bit type the file has, into rows that lie apart."""
    it = weight(kind, n, k, half)
    assert_same_bits(numbers(executor, it, dtype, beside, order=n + k), torch_numbers(it, dtype))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@on("kind, dtype", interpreter=[(kind, dtype) for kind in KINDS for dtype in HALVES])
def test_numbers_on_later_gpus(executor, capability, kind, dtype, monkeypatch):
    """The PTX for sm_75, which the others interpret, packs halves by other instructions."""
    monkeypatch.setattr(executors, "lowest", lambda library: capability)
    it = weight(kind, 128, 64)
    assert_same_bits(numbers(executor, it, dtype), torch_numbers(it, dtype))


@EACH
@DTYPES
@on(emulator=True, interpreter=True, gpu=True)
def test_scales_of_any_bits(executor, kind, dtype):
    """Codes and scales infinite, NaN, subnormal, beyond the dtype, and -0 of both kinds: as torch has them."""
    it = weight(kind, 128, 128)
    scales = any_bits(*it.wscales.shape, dtype=it.wscales.dtype, seed=1)
    scales[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0]).to(scales.dtype)
    it = replace(it, wscales=scales, wcscales=None if it.wcscales is None else any_bits(128, dtype=BF16, seed=2))
    got, want = numbers(executor, it, dtype), torch_numbers(it, dtype)
    assert_same_bits(got, want)
    assert want.isnan().any() and (want == 0).any() and (kind == "nvfp4" or want.isinf().any())


@DTYPES
@pytest.mark.parametrize("precision", PRECISIONS)
@on(emulator=True, gpu=True)
def test_every_code_with_every_scale(executor, precision, dtype):
    """All 256 e4m3 scales, and 16-bit ones of every exponent, sign and end of the mantissa, with all 16 codes."""
    n, k, group = 128, 64 if precision == "nvfp4" else 512, GROUP[precision]
    patterns = (torch.arange(512).to(torch.int8).view(torch.float8_e4m3fn) if precision == "nvfp4" else
                (torch.arange(0, 1 << 16, 1 << 6) + torch.arange(1 << 10) % 64).to(torch.int16).view(BF16))
    it = W4A4Weight(precision, False, layout.pack_codes(torch.arange(16, dtype=torch.uint8).repeat(n, k // 16)),
                    layout.pack_scales(patterns.view(n, k // group)), torch.ones(128, dtype=BF16))
    assert_same_bits(numbers(executor, it, dtype), torch_numbers(it, dtype))


@EACH
@on(emulator=True, gpu=True)
def test_every_way_of_cutting(executor, kind, monkeypatch):
    """A part is the rows of the whole; and the product with 1 is the weight, in pieces of any size."""
    it = replace(weight(kind, 512, 128), smooth=torch.ones(128, dtype=BF16))
    whole = torch_numbers(it, BF16)
    for start, stop in ((0, 128), (128, 384), (384, 512)):
        assert_same_bits(numbers(executor, it.cut(start, stop), BF16), whole[start:stop])
    there, one = executor.put(it), executor.put(torch.eye(128, dtype=BF16))
    for chunk, pieces in ((1, 4), (256 * 144, 2), (384 * 144, 2), (1 << 24, 1)):
        monkeypatch.setattr(weights, "CHUNK", chunk)
        executor.launched.clear()
        out = executor.put(torch.full((128, 512), float("nan"), dtype=BF16))
        VARIANT.run(one, there, out)
        assert torch.equal(out.cpu().t(), whole) and len(executor.launched) == pieces


@DTYPES
@on("kind", emulator=KINDS, gpu=KINDS)
def test_branch_and_bias_of_every_piece(executor, kind, dtype, monkeypatch):
    """In four pieces as in one: each has its own rows of them."""
    it, random = weight(kind, 512, 128, dtype, 32), torch.Generator().manual_seed(3)
    x, bias = (torch.randn(*shape, generator=random).to(dtype) for shape in ((5, 128), (512,)))
    outs = []
    for chunk in (1 << 24, 1):
        monkeypatch.setattr(weights, "CHUNK", chunk)
        outs.append(linear(executor, it, x, torch.full((5, 512), float("nan"), dtype=dtype), bias))
    assert len(executor.launched) == 1 + 4
    assert (outs[0] - outs[1]).double().norm() <= 1e-3 * outs[0].double().norm()
    without = linear(executor, it.with_branch(None, None), x, torch.empty(5, 512, dtype=dtype))
    assert (outs[1] - without).view(5, 4, 128).double().norm(dim=(0, 2)).min() > 0.01 * outs[0].double().norm()


def test_low_rank_saturates():
    """In fp16, as in every other kernel: Inf times a factor of another sign would be NaN."""
    it = weight("int4", 128, 128, FP16, 16)
    large = replace(it, proj_down=it.proj_down * 2.0**14)
    low = family.prepare(torch.full((2, 128), 60.0, dtype=FP16), large)[:, 128:144]
    assert low.isfinite().all() and (low.abs() == 65504).any()


# The linear

def linear(executor, weight, x, out, bias=None, accumulate=False):
    out = executor.put(out)
    VARIANT.run(executor.put(x), executor.put(weight), out, executor.put(bias), accumulate)
    return out.cpu()


@pytest.mark.parametrize("unsigned", [False, True])
@DTYPES
@on("kind, tokens, rank, accumulate",
    emulator=[("int4", 1, 0, False), ("nvfp4", 17, 16, True), ("nvfp4 wcscales", 65, 144, False), ("int4", 9, 272, True)],
    interpreter=[("int4", 3, 32, False), ("nvfp4", 3, 32, True)],
    gpu=[(kind, tokens, rank, accumulate) for kind in KINDS for tokens in (1, 65, 4608) for rank in (0, 16, 272)
         for accumulate in (False, True)])
def test_linear(executor, kind, tokens, rank, accumulate, dtype, unsigned):
    """Sums in fp32 of what was rounded to 16 bit, once, for a branch of any rank; `out` is a part of a wider tensor."""
    n, k, random = 256, 128, torch.Generator().manual_seed(tokens)
    it = replace(weight(kind, n, k, BF16, rank), unsigned=unsigned)
    x, bias = (torch.randn(*shape, generator=random).to(dtype) for shape in ((tokens, k), (n,)))
    before = torch.randn(tokens, n + 7, generator=random).to(dtype)
    out = before[:, 3:n + 3] if accumulate else torch.full((tokens, n), float("nan"), dtype=dtype)
    got = linear(executor, it, x, out, bias, accumulate)
    factors, numbers = [it.smoothed(x).double()], [torch_numbers(it, dtype).double()]
    if rank:
        down, up = (part.to(dtype).double() for part in it.branch())
        low = family.prepare(executor.put(x), executor.put(it))[:, k:k + rank].cpu()
        assert_rounded(low, x.double() @ down, x.double().abs() @ down.abs(), "low rank", executor.slack)
        factors.append(low.double())
        numbers.append(up)
    a, b = torch.cat(factors, 1), torch.cat(numbers, 1)
    want, size = a @ b.t() + bias.double(), a.abs() @ b.abs().t() + bias.double().abs()
    if accumulate:
        want, size = want + before[:, 3:n + 3].double(), size + before[:, 3:n + 3].double().abs()
    assert_rounded(got, want, size, "out", executor.slack)


@pytest.mark.parametrize("dtype, limit", [(BF16, 1.5e-2), (FP16, 2e-3)], ids=HALVES.values())
@on("name", emulator=GOLDEN_LINEARS, gpu=GOLDEN_LINEARS)
def test_golden_linear(executor, golden, name, dtype, limit):
    """A layer as a checkpoint has it, against the exact result of its file; scales stay bf16 where x is fp16."""
    tensors, it = golden(f"linear_{name}"), golden_weight(golden, name)
    x, want = layout.pad(tensors["io.x"], 1, it.shape[1]).to(dtype), tensors["io.y_weight_only"].double()
    bias = layout.unpack_vector(tensors["packed.bias"]).to(dtype)
    got = linear(executor, it, x, torch.empty(len(x), it.shape[0], dtype=dtype), bias)[:, :want.shape[1]].double()
    assert (got - want).norm() <= limit * want.norm()


def golden_weight(golden, name):
    tensors = golden(f"linear_{name}")
    packed = {key.removeprefix("packed."): value for key, value in tensors.items() if key.startswith("packed.")}
    return W4A4Weight(name.split("_")[0], "unsigned" in name, packed["qweight"], packed["wscales"], packed["smooth"],
                      packed["lora_down"], packed["lora_up"], packed.get("wcscales"), float(packed.get("wtscale", 1.0)))


@DTYPES
@on("name", emulator=GOLDEN_LINEARS, interpreter=["int4_r32", "nvfp4_wcscales_qkv_r16"], gpu=GOLDEN_LINEARS)
def test_golden_numbers(executor, golden, name, dtype):
    it = golden_weight(golden, name)
    got, layer = numbers(executor, it, dtype), it.logical()
    exact = reference.dequantize_weight(layer.codes, layer.wscales, layer.precision, layer.wcscales, layer.wtscale)
    assert_same_bits(got, exact.to(dtype))
    assert_same_bits(got, torch_numbers(it, dtype))


# Bugs of value, planted one at a time: the comparisons above must fail. Nothing is shared, so there is no barrier to take out

PLANTED = {
    "rows 8 apart swapped": ("i / 2 * 8 + row", "(1 - i / 2) * 8 + row"),
    "halves of k swapped": ("i % 2 * 32 + quarter * 8", "(1 - i % 2) * 32 + quarter * 8"),
    "scale of the row before": ("row / 2 * 4 + i * 2 + row % 2, q", "row / 2 * 4 + i * 2, q"),
    "scale of the row 8 apart": ("q = strip % 2 * 2 + i", "q = strip % 2 * 2 + 1 - i"),
    "scale of the strip 2 apart": ("p = strip / 2", "p = (strip / 2) ^ 1"),
    "scale of the group before": (">> 8 * (quarter / 2)", ">> 0"),
    "channel scale of the row 8 apart": ("half_value(here[2], file)", "half_value(here[0], file)"),
    "channel scales of the first rows": ("wcscales + rows +", "wcscales +"),
    "nibbles swapped": ("value<C>(word[i], 2 * j)", "value<C>(word[i], (2 * j) ^ 1)"),
    "codes unsigned": ("0x4b000008u) - 8388616.0f", "0x4b000000u) - 8388608.0f"),
    "NaN forgotten": ("rest == 0x7fu ? 0x7fc00000u : (", "false ? 0u : ("),
    "negative zero": ("* 0x1p126f + 0.0f", "* 0x1p126f"),
    "no tensor scale": ("factor[i] *= wtscale", "factor[i] *= 1.0f"),
    "always bf16": ("file == BF16 ?", "true ?"),
    "scales rounded": ("const u32 word[4]", "wtscale = px::low_half<T>(px::pack_half<T>(wtscale, 0.0f)); const u32 word[4]"),
}


def check_planted(executor):
    for kind in KINDS:
        for half in HALVES:
            for shape in ((256, 64), (128, 192)):
                it = weight(kind, *shape, half)
                assert_same_bits(numbers(executor, it, BF16), torch_numbers(it, BF16))
    it = weight("nvfp4", 128, 64)
    it = replace(it, wscales=any_bits(*it.wscales.shape, dtype=it.wscales.dtype))
    assert_same_bits(numbers(executor, it, BF16), torch_numbers(it, BF16))


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    text = mutations.only(FILE, "dequant_bf16_(int4|nvfp4)", mutations.planted(FILE, *PLANTED[bug]))
    with executor.set(sources={FILE: text}), pytest.raises((AssertionError, KernelFault)):
        check_planted(executor)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    with executor.set(sources={FILE: mutations.only(FILE, "dequant_bf16_(int4|nvfp4)")}):
        check_planted(executor)


# Bytes: what every operation of torch and every launch reads and writes

class Traffic(TorchDispatchMode):
    """Bytes of the tensors that each operator is given to read, or writes; views cost nothing, nor does new memory."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, kinds, arguments=(), more=None):
        result, name = function(*arguments, **(more or {})), function._schema.name.split("::")[1]
        given = {argument.name: (value, argument.alias_info is not None and argument.alias_info.is_write)
                 for argument, value in zip(function._schema.arguments, arguments)}
        given |= {name: (value, name == "out") for name, value in (more or {}).items()}
        written = [tensor for value, writes in given.values() if writes for tensor in self.tensors(value)]
        if not written:
            memory = {tensor.untyped_storage().data_ptr() for value, _ in given.values() for tensor in self.tensors(value)}
            written = [tensor for tensor in self.tensors(result) if tensor.untyped_storage().data_ptr() not in memory]
        if written and "empty" not in name:
            fills = name.startswith("new_") or name in ("copy_", "fill_") or (more or {}).get("beta") == 0
            read = [tensor for argument, (value, writes) in given.items() for tensor in self.tensors(value)
                    if argument != "out" and not (fills and argument == "self")]        # which are not read
            self.bytes[name] = self.bytes.get(name, 0) + sum(map(self.size, read + written))
        return result

    @staticmethod
    def tensors(value):
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]

    @staticmethod
    def size(tensor):
        """Of its numbers, each once: those along a stride of 0 are one."""
        return math.prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride) * tensor.element_size()


def traffic(variant, precision, tokens, rank=0):
    """{operation: bytes} of a linear 3072 -> 512 in bf16, as torch runs it on a GPU."""
    it, x, out = weight(precision, 512, 3072, rank=rank), *(torch.zeros(tokens, size, dtype=BF16) for size in (3072, 512))
    with Traffic() as seen:
        variant.run(x, it, out)
    return seen.bytes


WEIGHT_ONLY, = weight_only.VARIANTS


@on("precision, by_kernel, by_torch", emulator=[("int4", 4.60, 11.12), ("nvfp4", 4.63, 14.71)])
def test_bytes_per_weight(executor, precision, by_kernel, by_torch, monkeypatch):
    """The figures of docs/measurements.md, which -s prints: all bytes of a linear of one token, whose own are next to none."""
    monkeypatch.setattr(layout, "on_cpu", lambda tensor: False)
    traffic(WEIGHT_ONLY, precision, 1)                                  # tables are made once
    for variant, most in ((VARIANT, by_kernel), (WEIGHT_ONLY, by_torch)):
        found = {name: size / (512 * 3072) for name, size in traffic(variant, precision, 1).items()}
        print(f"\n{precision} {variant.name}: {sum(found.values()):.2f} bytes per weight: "
              + ", ".join(f"{name} {size:.2f}" for name, size in found.items()))
        assert sum(found.values()) == pytest.approx(most, abs=0.01)


@on("precision", emulator=PRECISIONS)
def test_bytes_per_token(executor, precision, monkeypatch):
    """A branch in the same product spares 4 bytes for each number of `out`, which is not read and written again; 16 ones cost
    64."""
    monkeypatch.setattr(layout, "on_cpu", lambda tensor: False)
    ours, theirs = (sum(traffic(variant, precision, 48, 32).values()) - sum(traffic(variant, precision, 16, 32).values())
                    for variant in (VARIANT, WEIGHT_ONLY))
    assert theirs - ours == 32 * (512 * 4 - 64)


# The operator: what it launches, what it refuses, what torch.compile sees of it

def operands(precision="int4", dtype=BF16, n=256, k=128, half=BF16, **changes):
    scales = torch.zeros(k // GROUP[precision], n, dtype=half if precision == "int4" else torch.float8_e4m3fn)
    return {"qweight": torch.zeros(n, k // 2, dtype=torch.int8), "wscales": scales,
            "wcscales": torch.zeros(n, dtype=half) if precision == "nvfp4" else None, "wtscale": 1.0,
            "out": torch.zeros(n, k, dtype=dtype)} | changes


def launch_every_kernel():
    """Calls the operator in every way that picks a kernel, for test_every_variant.py."""
    for dtype in HALVES:
        for precision in PRECISIONS:
            dequant(*operands(precision, dtype).values())


@pytest.mark.parametrize("n, k", [(128, 64), (384, 128), (3072, 12288)])
def test_grids(launches, n, k):
    dequant(*operands(n=n, k=k).values())
    call, = launches
    assert (call.grid, call.block) == ((k // 64, n // 128), 256)


def test_nothing_to_write(launches):
    dequant(*operands(n=0).values())
    assert launches == []


@pytest.mark.parametrize("precision, changes, words", [
    ("int4", dict(out=torch.zeros(256, 128)), "out is .*float32"),
    ("int4", dict(out=torch.zeros(256, dtype=BF16)), r"out is \[256\]"),
    ("int4", dict(out=torch.zeros(256, 192, dtype=BF16)), r"out is \[256, 192\].* Needs out \[256, 128\]"),
    ("int4", dict(out=torch.zeros(256, 130, dtype=BF16)[:, :128]), r"strides \(130, 1\).*aligned to 16 bytes"),
    ("int4", dict(out=torch.zeros(128, 256, dtype=BF16).t()), "last stride 1"),
    ("int4", dict(n=192), "N % 128"), ("int4", dict(k=96, wscales=torch.zeros(1, 256, dtype=BF16)), "K % 64"),
    ("int4", dict(qweight=torch.zeros(256, 64, dtype=torch.uint8)), "qweight is .*uint8"),
    ("int4", dict(wscales=torch.zeros(2, 256)), "wscales torch.float32"),
    ("int4", dict(wscales=torch.zeros(4, 256, dtype=BF16)), r"wscales is \[4, 256\].*Needs \[2, 256\]"),
    ("nvfp4", dict(wscales=torch.zeros(2, 256).to(torch.float8_e4m3fn)), r"wscales is \[2, 256\].*Needs \[8, 256\]"),
    ("nvfp4", dict(wcscales=torch.zeros(128, dtype=BF16)), r"wcscales is \[128\].*Needs \[256\]"),
    ("nvfp4", dict(wcscales=torch.zeros(256)), "Needs .* wcscales in their 16-bit dtype"),
    ("int4", dict(wcscales=torch.zeros(256, dtype=FP16)), "wcscales in their 16-bit dtype"),
])
def test_refuses(launches, precision, changes, words):
    given = {key: changes.pop(key) for key in ("n", "k") if key in changes}
    with pytest.raises(ShapeError, match="^dequant: .*" + words):
        dequant(*operands(precision, **given, **changes).values())
    assert launches == []


@pytest.mark.parametrize("name", ["qweight", "wscales", "wcscales"])
def test_operand_on_another_device(launches, name):
    given = operands("nvfp4")
    with pytest.raises(ShapeError, match=f"{name} is .* on meta.* Needs .* on cpu"):
        dequant._init_fn(*(given | {name: given[name].to("meta")}).values())
    assert launches == []


def test_cpu_tensors():
    with pytest.raises(ShapeError, match="dequant_bf16_int4: tensors are on cpu. Needs a CUDA GPU"):
        dequant(*operands().values())


def test_fake(launches):
    with FakeTensorMode(), torch.device("cuda"):
        assert dequant(*operands("nvfp4").values()) is None
    assert launches == []


@on(emulator=True)
def test_what_torch_compile_sees(executor):
    it = weight("int4", 128, 128)            # which cannot compare e4m3
    torch.library.opcheck(dequant, (it.qweight, it.wscales, it.wcscales, it.wtscale, torch.zeros(128, 128, dtype=BF16)),
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["int4", "int4 unsigned", "nvfp4"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_smoothing_in_fewer_bytes(kind, dtype):
    """Divided in the dtype of x where smooth has it: the same bits as in fp32, rounded."""
    for half in HALVES:
        it, _ = check.random_weight(kind, half, 128, 384, 0)
        x = check.random_x(65, 384, dtype, it.unsigned)
        shifted = x + reference.SHIFT if it.unsigned else x
        assert torch.equal(it.smoothed(x), (shifted.float() / layout.unpack_vector(it.smooth).float()).to(dtype))
