"""quant_nvfp4 and gemm_nvfp4, the kernels of RTX 50 for NVFP4 files: results against float64 and reference.py, element by
element, on every executor; conduct by the checks of the simulators; the operators by themselves.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import layout, reference
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.rows import row_blocks
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import nvfp4_sm120
from svdq_pack.svdq.kernels.variants.nvfp4_sm120 import gemm_nvfp4, quant_nvfp4
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded, assert_saturated
from svdq_pack.tests.kernels.families.layers import BF16, FP16, golden_layer, launch_feeding, launch_modulated, nvfp4_layer
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

VARIANT, = nvfp4_sm120.VARIANTS
GPU_SLACK = 1e-4                            # how the unit rounds sums of scaled products is not documented
RANKS = (0, 16, 32, 128)
N, K = 256, 640                             # two tiles; five steps, ten turns for the warps of quant_nvfp4
GOLDEN = ("wtscale_r32", "wcscales_qkv_r16")
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())


# The buffers between the kernels, by hand and not by the variant's `decode`; axes as in ptx.cuh, lane = 4 g + t

def unpack_codes(qact):
    """[M/64][K/64][m16][g][t][k half][row half] words -> codes [M, K]."""
    words = qact.view(*qact.shape[:2], 4, 8, 4, 2, 2)
    nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
    return nibbles.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(qact.shape[0] * 64, qact.shape[1] * 64)


def place_of_scales(m, k):
    """(block, step, lane, word, byte) of the scale of rows [M] and groups [K/16]: a lane has rows g + 8t of each 32."""
    row, group = torch.arange(m)[:, None], torch.arange(k // 16)
    lane = row % 8 * 4 + row % 32 // 8
    return torch.broadcast_tensors(row // 64, group // 4, lane, row % 64 // 32, group % 4)


def unpack_scales(ascales):
    """[M/64][K/64][lane][m32] words of four e4m3 -> [M, K/16] fp32."""
    bytes_ = ascales.view(torch.uint8).view(*ascales.shape, 4)
    return bytes_[place_of_scales(ascales.shape[0] * 64, ascales.shape[1] * 64)].view(torch.float8_e4m3fn).float()


def unpack_low(low):
    """[M/16][R/16][g][t][k half][row half][2] -> [M, R]."""
    words = low.view(*low.shape[:2], 8, 4, 2, 2, 2)
    return words.permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, low.shape[1] * 16)


def pack(codes, scales, low):
    """The other way: codes [M, K] int, scales [M, K/16] e4m3, low [M, R], M a multiple of 64."""
    (m, k), r = codes.shape, low.shape[1]
    nibbles = codes.int().view(m // 64, 4, 2, 8, k // 64, 2, 4, 8)              # block m16 row half, g, step, k half, t, 8
    words = sum(nibbles[..., i].long() << 4 * i for i in range(8)).int()
    ascales = torch.zeros(m // 64, k // 64, 32, 2, 4, dtype=torch.uint8)
    ascales[place_of_scales(m, k)] = scales.view(torch.uint8)
    return (words.permute(0, 4, 1, 3, 6, 5, 2).reshape(m // 64, k // 64, 4, 32, 4).contiguous(),
            ascales.view(torch.int32).squeeze(-1),
            low.view(m // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6).reshape(m // 16, r // 16, 32, 8))


def unpack(quantised):
    qact, ascales, low = quantised
    return unpack_codes(qact), unpack_scales(ascales), unpack_low(low)


def values(codes):
    return layout.e2m1(codes.to(torch.uint8))


def test_decode():
    """The variant's own decoder, and the one of this file, undo `pack`."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 192), generator=random)
    scales = torch.randint(0, 127, (128, 12), generator=random, dtype=torch.uint8).view(torch.float8_e4m3fn)
    low = torch.randn(128, 48, generator=random).to(BF16)
    prepared = pack(codes, scales, low)
    assert all(map(torch.equal, nvfp4_sm120.decode(prepared, None), (values(codes), scales.float(), low)))
    assert all(map(torch.equal, unpack(prepared), (codes.int(), scales.float(), low)))


# Running them

def quantise(executor, layer, x, **how):
    """quant_nvfp4's (qact, ascales, low) of x, on the CPU."""
    weight = executor.put(layer.weight)
    with executor.set(**how):
        return [part.cpu() for part in quant_nvfp4(executor.put(x), weight.smooth, weight.proj_down)]


def multiply(executor, layer, quantised, out, *, bias=True, accumulate=False, **how):
    """gemm_nvfp4 of these operands into `out`, which is returned, on the CPU."""
    weight, there = executor.put(layer.weight), executor.put(out)
    with executor.set(**how):
        gemm_nvfp4(*executor.put(list(quantised)), weight.qweight, weight.wscales, weight.wcscales, weight.wtscale,
                   weight.proj_up, executor.put(layer.bias) if bias else None, there, accumulate)
    return there.cpu()


def blank(tokens, layer):
    return torch.full((tokens, layer.shape[0]), float("nan"), dtype=layer.dtype)


def check_quantised(executor, layer, x, quantised):
    """Codes and scales as in reference.py, on a GPU but for ties; `low` against float64; nothing in the rows past M."""
    codes, scales, low = unpack(quantised)
    tokens = len(x)
    spec_codes, spec_scales, _ = reference.quant_down(x, layer.logical.smooth, layer.logical.proj_down, precision="nvfp4")
    apart = (codes[:tokens] != spec_codes) & (x != 0)                           # to torch, -0 + 0 is 0
    steps = (rank_of(codes[:tokens]) - rank_of(spec_codes)).abs()
    assert apart.sum() <= executor.ties * apart.numel() + (executor.ties > 0)
    assert steps.max() <= 1 and not steps[x == 0].any()
    assert torch.equal(scales[:tokens], spec_scales.float())
    for part in (codes, scales, low):
        assert not part[tokens:].any()
    assert_rounded(low[:tokens], *layer.low(x), "low", executor.slack)


def rank_of(codes):
    """Codes in the order of their values: -7..7, with one 0."""
    return torch.where(codes.int() >= 8, 8 - codes.int(), codes.int())


def check_product(executor, layer, quantised, out, rows=slice(None), before=None, **more):
    """Against float64 from the same codes, added to what was there before: fp32 sums, rounded once."""
    codes, scales, low = (part[:len(out)][rows] for part in unpack(quantised))
    want, size = layer.product(values(codes), scales, low, **more)
    if before is not None:
        want, size = want + before.double(), size + before.double().abs()
    assert_rounded(out[rows], want, size, "out", executor.slack)


def check_linear(executor, layer, tokens, rows=slice(None)):
    x = layer.x(tokens)
    quantised = quantise(executor, layer, x, order=tokens)
    check_quantised(executor, layer, x, quantised)
    check_product(executor, layer, quantised, multiply(executor, layer, quantised, blank(tokens, layer), order=tokens), rows)


# Both kernels, every shape

def tails(*tokens):
    """Each number of tokens with one of the ranks in turn."""
    return [(rows, RANKS[i % 4], N, K) for i, rows in enumerate(tokens)]


TAILS = tails(1, 15, 16, 17, 63, 64, 65, 255, 257)


@pytest.mark.parametrize("columns", [False, True], ids=["wtscale", "wcscales"])
@DTYPES
@on("tokens, rank, n, k", emulator=[*TAILS, (17, 0, N, K), (65, 16, N, K), (1, 128, N, K)],
    interpreter=[(21, 32, 128, 640), (70, 48, 128, 128)],
    gpu=[*TAILS, *((rows, rank, N, K) for rows in (17, 130) for rank in (0, 16, 48, 112, 128)), (4608, 32, N, K)])
def test_linear(executor, tokens, rank, n, k, dtype, columns):
    check_linear(executor, nvfp4_layer(n, k, rank, dtype, columns), tokens)


@on("k, dtype", emulator=[(128, FP16), (256, BF16), (3072, BF16)], gpu=[(k, d) for k in (128, 256, 3072) for d in HALVES])
def test_depth(executor, k, dtype):
    """As many steps as stages, and fewer; FLUX's width."""
    check_linear(executor, nvfp4_layer(128, k, 32, dtype), 70)


@on("n, k, columns, tokens, every",
    emulator=[(9216, 128, True, 17, 1), (128, 12288, False, 17, 1)],
    gpu=[(9216, 3072, True, 129, 7), (3072, 12288, False, 129, 7), (12288, 3072, False, 129, 7)])
def test_flux_layers(executor, n, k, columns, tokens, every):
    """Whole layers of FLUX.1, all tiles; in the emulator as wide and as deep as they are."""
    check_linear(executor, nvfp4_layer(n, k, 32, BF16, columns), tokens, slice(None, None, every))


OPERANDS_OF = [(128, 384, 77, 32),      # an odd number of steps
               (256, 128, 130, 16)]     # four CTAs, two of them nearly without rows


@pytest.mark.parametrize("columns", [False, True], ids=["wtscale", "wcscales"])
@DTYPES
@on("n, k, tokens, rank", emulator=OPERANDS_OF, interpreter=OPERANDS_OF, gpu=OPERANDS_OF)
def test_product_of_any_operands(executor, n, k, tokens, rank, dtype, columns):
    """All 16 codes and all scales that are numbers, up to 448 and down to 2^-9, from both sides."""
    random, it, padded = torch.Generator().manual_seed(1), nvfp4_layer(n, k, rank, dtype, columns), row_blocks(tokens, 64) * 64
    codes = torch.randint(0, 16, (padded, k), generator=random)
    scales = torch.randint(0, 127, (padded, k // 16), generator=random, dtype=torch.uint8).view(torch.float8_e4m3fn)
    quantised = pack(codes, scales, torch.randn(padded, rank, generator=random).to(dtype))
    it = it.changed(wtscale=it.weight.wtscale / 64)                             # within fp16
    out = multiply(executor, it, quantised, blank(tokens, it))
    check_product(executor, it, quantised, out)
    codes, scales, low = (part[:tokens] for part in unpack(quantised))
    logical = it.logical
    spec = reference.gemm_w4a4(codes.to(torch.uint8), scales, logical.codes, logical.wscales, low, logical.proj_up, it.bias,
                               precision="nvfp4", wcscales=logical.wcscales, wtscale=logical.wtscale)
    exact, _ = it.product(values(codes), scales, low)
    assert (exact - spec).norm() < 1e-6 * exact.norm()


@on("name", emulator=GOLDEN, interpreter=GOLDEN, gpu=GOLDEN)
def test_golden_linear(executor, golden, name):
    """Tensors as in a checkpoint: codes but of groups of nothing, scales, low rank and result."""
    tensors = golden(f"linear_nvfp4_{name}")
    it, x, want = golden_layer(tensors, False), tensors["io.x"], tensors["io.y_act_quant"].double()
    quantised, tokens = quantise(executor, it, x), len(x)
    codes, scales, low = (part[:tokens] for part in unpack(quantised))
    golden_scales = tensors["io.ascales"].float()
    live = (golden_scales != 0).repeat_interleave(16, 1)
    assert (codes != tensors["io.q_act"].int())[live].float().mean() <= executor.ties and not codes[~live].any()
    assert torch.equal(scales, golden_scales)
    torch.testing.assert_close(low.float(), tensors["io.lora_act"], rtol=4e-3, atol=1e-5)
    out = multiply(executor, it, quantised, blank(tokens, it))
    assert (out.double() - want).norm() <= 4e-3 * want.norm()                   # bf16 output; fixtures/format/README.md
    check_product(executor, it, quantised, out)


# Options

@on("tokens, k, dtype", emulator=[(65, K, BF16), (65, K, FP16)], interpreter=[(20, 128, BF16), (20, 128, FP16)],
    gpu=[(65, K, BF16), (65, K, FP16)])
def test_row_strides(executor, tokens, k, dtype):
    """x and out as columns of wider tensors; what lies between stays."""
    it = nvfp4_layer(128, k, 16, dtype)
    x, weight = it.x(tokens), executor.put(it.weight)
    room = executor.put(torch.full((tokens, k + 6), float("nan"), dtype=dtype))
    room[:, :k] = executor.put(x)
    strided, plain = quant_nvfp4(room[:, :k], weight.smooth, weight.proj_down), quantise(executor, it, x)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(strided, plain))
    wide = executor.put(torch.full((tokens, 128 + 8), 9.0, dtype=dtype))
    gemm_nvfp4(*strided, weight.qweight, weight.wscales, None, weight.wtscale, weight.proj_up, executor.put(it.bias),
               wide[:, :128], False)
    assert torch.equal(wide[:, :128].cpu(), multiply(executor, it, plain, blank(tokens, it))) and (wide[:, 128:] == 9).all()


@on("n, k, dtype", emulator=[(N, K, BF16), (N, K, FP16)], interpreter=[(128, 128, BF16), (128, 128, FP16)],
    gpu=[(N, K, BF16), (N, K, FP16)])
def test_bias_and_accumulate(executor, n, k, dtype):
    it, tokens = nvfp4_layer(n, k, 16, dtype), 17
    quantised = quantise(executor, it, it.x(tokens))
    out = multiply(executor, it, quantised, blank(tokens, it), bias=False, order="reverse")
    check_product(executor, it, quantised, out, bias=False)
    before = torch.randn(tokens, n, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = multiply(executor, it, quantised, before.clone(), bias=False, accumulate=True)
    check_product(executor, it, quantised, total, before=before, bias=False)


@on("tokens, dtype", emulator=[(20, BF16), (20, FP16)], interpreter=[(16, BF16)], gpu=[(130, BF16), (130, FP16)])
def test_bad_tokens(executor, tokens, dtype):
    """A NaN makes its own token NaN, as in reference.py, and no other: its scale tells, its codes are 0. Inf saturates, and
    shows where the low rank has it."""
    it = nvfp4_layer(128, 128, 16, dtype)
    x, bad = it.x(tokens), [2, 5, 9]
    clean = multiply(executor, it, quantise(executor, it, x), blank(tokens, it))
    x[2, 70], x[5, 3], x[9, 127] = float("nan"), float("inf"), -float("inf")
    quantised = quantise(executor, it, x)
    codes, scales, _ = (part[:tokens] for part in unpack(quantised))
    spec_codes, spec_scales, _ = reference.quant_down(x, it.logical.smooth, it.logical.proj_down, precision="nvfp4")
    assert torch.equal(codes[bad], spec_codes[bad].int()) and codes[5, 3] == 7 and codes[9, 127] == 15
    assert torch.equal(scales.nan_to_num(nan=-1), spec_scales.float().nan_to_num(nan=-1))
    out = multiply(executor, it, quantised, blank(tokens, it))
    others = [row for row in range(tokens) if row not in bad]
    assert out[2].isnan().all() and torch.equal(out[others], clean[others])
    assert dtype == FP16 or not out[[5, 9]].isfinite().any()                    # fp16 clamps the low rank


@on("dtype", emulator=[BF16, FP16], interpreter=[BF16], gpu=[BF16, FP16])
def test_sizes_of_activations(executor, dtype):
    """Groups of nothing in both signs, scales that e4m3 holds as subnormals or not at all, scales beyond 448."""
    it = nvfp4_layer(128, 128, 16, dtype)
    sizes = torch.exp2(torch.linspace(-22, 14, 24))
    x = (it.x(25)[1:].float() * sizes[:, None]).to(dtype)
    x[4, :16], x[5, 16:32] = 0, -0.0
    x[6, 32:48] = torch.tensor([0.0, -0.0] * 8)
    quantised = quantise(executor, it, x)
    check_quantised(executor, it, x, quantised)
    codes, scales, _ = unpack(quantised)
    assert not codes[4, :16].any() and not codes[5, 16:32].any() and not codes[6, 32:48].any()
    assert scales[:24].max() == 448 and (scales[10:24, 2:] > 0).all() and scales[0].max() == 0


@on("dtype", emulator=[BF16], interpreter=[BF16], gpu=[BF16])
def test_tiniest_activations(executor, dtype):
    """Where 1 / scale is beyond fp32: the scale is stored as 0, so codes may be any, and no NaN comes of it."""
    it = nvfp4_layer(128, 128, 16, dtype).changed(smooth=torch.ones(128, dtype=dtype))
    x = it.x(16)
    x[3], x[3, ::2] = 2.0**-133, 0
    quantised = quantise(executor, it, x)
    codes, scales, _ = unpack(quantised)
    assert not scales[3].any() and not codes[3, ::2].any()
    assert multiply(executor, it, quantised, blank(16, it)).isfinite().all()


@on("tokens, n, k, orders", emulator=[(130, N, K, ("forward", "reverse", 1, 2))],
    interpreter=[(21, 128, 384, ("forward", "reverse"))])
def test_order_changes_nothing(executor, tokens, n, k, orders):
    it = nvfp4_layer(n, k)
    x, results = it.x(tokens), []
    for order in orders:
        quantised = quantise(executor, it, x, order=order)
        results.append((*quantised, multiply(executor, it, quantised, blank(tokens, it), order=order)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


# Saturation: a result beyond fp16 is stored as its largest number of that sign, not as Inf, and NaN stays NaN

def check_saturation_of_product(executor):
    it, tokens = nvfp4_layer(128, 128, 16, FP16), 20
    it = it.changed(wtscale=it.weight.wtscale * 2**11)
    x = it.x(tokens)
    x[5, 77] = float("nan")
    with executor.set(sources={}):
        quantised = quantise(executor, it, x)
    out = multiply(executor, it, quantised, blank(tokens, it))
    codes, scales, low = (part[:tokens] for part in unpack(quantised))
    assert_saturated(out, *it.product(values(codes), scales, low), executor.slack)
    before = torch.full((tokens, 128), 60000.0, dtype=FP16)
    before[::2], before[7] = -60000, float("nan")
    total = multiply(executor, it, quantised, before.clone(), accumulate=True)
    want, size = it.product(values(codes), scales, low)
    assert_saturated(total, want + before.double(), size + before.double().abs(), executor.slack)


def check_saturation_of_low(executor):
    """Row m of x has the signs of column m of proj_down, or all others, so that the sums of the diagonal go beyond."""
    it = nvfp4_layer(128, 128, 16, FP16)
    x = 30000 * it.logical.proj_down.T.sign() * torch.tensor([1.0, 1, -1, -1]).repeat(4)[:, None]
    x = torch.cat((x, x[:1] * float("nan"))).to(FP16)
    assert_saturated(unpack_low(quantise(executor, it, x)[2])[:17], *it.low(x), executor.slack)


SATURATING = {"gemm_nvfp4.cuh": ("gemm_nvfp4_fp16", check_saturation_of_product),
              "quant_nvfp4.cuh": ("quant_nvfp4_fp16_r32", check_saturation_of_low)}


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

KERNELS = {"quant_nvfp4.cuh": "quant_nvfp4_bf16_r32", "gemm_nvfp4.cuh": "gemm_nvfp4_bf16"}
BARRIERS = [*mutations.places("quant_nvfp4.cuh", "px::barrier();"),
            *mutations.places("gemm_nvfp4.cuh", "px::barrier();", outside=("tile.cuh",))]


# With two stages the empty groups at the end could be spared; those of mlp_nvfp4, which has three, are in test_mlp.py.
COPIES = [("gemm_nvfp4.cuh", "px::copy_commit();", 0), ("gemm_nvfp4.cuh", "px::copy_wait<STAGES - 2>();", 0)]


@on("file, words, index", interpreter=BARRIERS, emulator=[*BARRIERS, *COPIES])
def test_nothing_to_spare(executor, file, words, index):
    it = nvfp4_layer(128, 384)
    x, text = it.x(20), mutations.only(file, KERNELS[file], mutations.without(file, words, index))
    quantised = quantise(executor, it, x) if file == "gemm_nvfp4.cuh" else None
    with executor.set(sources={file: text}), pytest.raises(
            (KernelFault, Fault), match="race|nobody has written|never written|has not landed|on its way|in no group"):
        if quantised is None:
            quantise(executor, it, x)
        else:
            multiply(executor, it, quantised, blank(20, it))


# Bugs of value, planted one at a time: the comparisons above must fail

PLANTED = {
    "scales of the other 16 rows": ("gemm_nvfp4.cuh", "multiply_row<1>(acc[1]", "multiply_row<0>(acc[1]"),
    "scales of the other 32 rows": ("gemm_nvfp4.cuh", "[2][lane], a.y", "[2][lane], a.x"),
    "scales of the wrong 8 columns": ("gemm_nvfp4.cuh", "px::mma_nvfp4<SECOND, 2>", "px::mma_nvfp4<SECOND, 1>"),
    "scales of the other 32 columns": ("gemm_nvfp4.cuh", "n32 ? wscales.y : wscales.x", "wscales.x"),
    "scales of the other 64 columns": ("gemm_nvfp4.cuh", "from.wscales[k64][lane][warp_n]", "from.wscales[k64][lane][0]"),
    "scales of the other 64 of K": ("gemm_nvfp4.cuh", "from.ascales[warp_m][k64][lane]", "from.ascales[warp_m][0][lane]"),
    "fragments of B swapped": ("gemm_nvfp4.cuh", "left.z, left.w", "left.w, left.z"),
    "last step dropped": ("gemm_nvfp4.cuh", "if (step >= steps)", "if (step >= steps - 1)"),
    "columns' scales swapped": ("gemm_nvfp4.cuh", "scale[e / 4 * 2 + e % 2]", "scale[e % 2 * 2 + e / 4]"),
    "the tensor's scale forgotten": ("gemm_nvfp4.cuh", "{wtscale, wtscale, wtscale, wtscale}", "{1, 1, 1, 1}"),
    "bytes transposed halfway": ("quant_nvfp4.cuh", "t & 2 ? 0x3276 : 0x5410", "0x5410"),
    "tail rows leak": ("quant_nvfp4.cuh", "inside[h] ? *(const u32*)(x_row[h] + column) : 0u",
                       "*(const u32*)(x_row[h] + column)"),
    "smoothing multiplied": ("quant_nvfp4.cuh", "px::divide(x, smooth)", "x * smooth"),
    "smoothing not rounded": ("quant_nvfp4.cuh", "px::low_half<T>(px::pack_half<T>(px::divide(x, smooth), 0.0f))",
                              "px::divide(x, smooth)"),
    "scale rounded before the codes": (
        "quant_nvfp4.cuh", "px::reciprocal(scale[c])", "px::reciprocal(scale[c] * 1.02f)"),
    "maximum of two lanes of four": ("quant_nvfp4.cuh", "larger(bits, px::swap_lanes(bits, 2))", "bits"),
    "groups' scales swapped": ("quant_nvfp4.cuh", "px::pack_e4m3(scale[0], scale[1])", "px::pack_e4m3(scale[1], scale[0])"),
    "scales of rows swapped": ("quant_nvfp4.cuh", "t ? scales[1] : scales[0]", "t ? scales[0] : scales[1]"),
    "-0 in a group of nothing": ("quant_nvfp4.cuh", "peak - 1u < 0x7f800000u", "peak < 0x7f800001u"),
    "low rank fed the other row": ("quant_nvfp4.cuh", "{pairs[0][2 * c], pairs[1][2 * c],",
                                   "{pairs[1][2 * c], pairs[0][2 * c],"),
    "a warp's share forgotten": ("quant_nvfp4.cuh", "for (int w = 0; w < WARPS; w++)", "for (int w = 1; w < WARPS; w++)"),
}


def check_all(executor):
    """A layer with both kinds of outer scales, and activations with a -0 in a group of nothing."""
    columns = nvfp4_layer(N, K, columns=True)
    check_linear(executor, columns.changed(wtscale=0.5), 65)
    it = nvfp4_layer(128, 128, 16)
    x = it.x(17)
    x[0, 3] = -0.0
    quantised = quantise(executor, it, x)
    check_quantised(executor, it, x, quantised)
    assert not unpack(quantised)[0][0, :16].any()


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    text = mutations.only(file, KERNELS[file], mutations.planted(file, right, wrong))
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        check_all(executor)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={file: mutations.only(file, kernel) for file, kernel in KERNELS.items()}):
        check_all(executor)


# The operators: what they launch, what they refuse, what torch.compile sees of them

RANK = 32


def quant_operands(tokens=3, rank=RANK, dtype=BF16, k=128, **changes):
    return [*({"x": torch.zeros(tokens, k, dtype=dtype), "smooth": torch.ones(k, dtype=dtype),
               "proj_down": torch.zeros(k, rank, dtype=dtype)} | changes).values()]


def gemm_operands(tokens=3, rank=RANK, dtype=BF16, k=128, n=256, **changes):
    blocks, steps = row_blocks(tokens, 64), k // 64
    return [*({"qact": torch.zeros(blocks, steps, 4, 32, 4, dtype=torch.int32),
               "ascales": torch.zeros(blocks, steps, 32, 2, dtype=torch.int32),
               "low": torch.zeros(blocks * 4, rank // 16, 32, 8, dtype=dtype),
               "qweight": torch.zeros(n, k // 2, dtype=torch.int8),
               "wscales": torch.zeros(steps * 4, n, dtype=torch.float8_e4m3fn), "wcscales": torch.zeros(n, dtype=dtype),
               "wtscale": 1.0, "proj_up": torch.zeros(n, rank, dtype=dtype), "bias": torch.zeros(n, dtype=dtype),
               "out": torch.zeros(tokens, n, dtype=dtype)} | changes).values(), False]


OPERANDS = {quant_nvfp4: quant_operands, gemm_nvfp4: gemm_operands}


def launch_every_kernel():
    """Calls the operators in every way that picks a kernel, for test_every_variant.py."""
    for dtype in HALVES:
        for rank in (0, 16, 32, 48, 128):
            quant_nvfp4(*quant_operands(rank=rank, dtype=dtype))
        gemm_nvfp4(*gemm_operands(dtype=dtype))
        launch_modulated(VARIANT, dtype)
        launch_feeding(VARIANT, dtype)


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (64, 1), (65, 2), (4608, 72)])
def test_grids(launches, tokens, blocks):
    quant_nvfp4(*quant_operands(tokens))
    gemm_nvfp4(*gemm_operands(tokens))
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
    (dict(x=torch.zeros(3, 100, dtype=BF16)), "multiple of 64"),
    (dict(x=strided(3, 128)), r"strides \(256, 2\).* call .contiguous"),
    (dict(x=shifted(3, 128)), "aligned to 4 bytes"),
    (dict(smooth=torch.ones(128, dtype=FP16)), "smooth is .*float16.* Needs .*bfloat16"),
    (dict(smooth=torch.ones(64, dtype=BF16)), r"smooth is \[64\].* Needs .*\[128\]"),
    (dict(smooth=shifted(128)), "smooth .*aligned"),
    (dict(proj_down=torch.zeros(128, 24, dtype=BF16)), "rank 24. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(64, RANK, dtype=BF16)), r"proj_down is \[64, 32\].* Needs .*\[128, 32\]"),
])
def test_quant_nvfp4_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^quant_nvfp4: .*" + words):
        quant_nvfp4(*quant_operands(**changes))
    assert launches == []


@pytest.mark.parametrize("changes, words", [
    (dict(out=torch.zeros(3, 256)), "out is .*float32"),
    (dict(out=torch.zeros(3, 384, dtype=BF16)), r"out is \[3, 384\].* Needs \[tokens, 256\]"),
    (dict(out=shifted(3, 256)), "aligned to 16 bytes"),
    (dict(qweight=torch.zeros(192, 64, dtype=torch.int8), out=torch.zeros(3, 192, dtype=BF16)), "multiple of 128"),
    (dict(qweight=torch.zeros(256, 96, dtype=torch.int8)), r"qweight is \[256, 96\].* K a multiple of 128"),
    (dict(out=torch.zeros(65, 256, dtype=BF16)), r"qact is \[1, 2, 4, 32, 4\].* Needs .*\[2, 2, 4, 32, 4\]"),
    (dict(qact=torch.zeros(1, 2, 4, 32, 4)), r"qact is .*float32.*\.int32"),
    (dict(ascales=torch.zeros(1, 2, 4, 8, 2)), "ascales is .*float32.* Needs .*int32"),
    (dict(low=torch.zeros(4, 2, 32, 8, dtype=FP16)), "low is .*float16"),
    (dict(low=torch.zeros(4, 1, 32, 8, dtype=BF16)), r"proj_up is \[256, 32\].* Needs .*\[256, 16\]"),
    (dict(low=torch.zeros(4, dtype=BF16)), "low is"),
    (dict(qweight=torch.zeros(256, 64, dtype=torch.uint8)), r"qweight is .*uint8.*\.int8"),
    (dict(wscales=torch.zeros(8, 256, dtype=BF16)), "wscales is .*bfloat16.* Needs .*float8_e4m3fn"),
    (dict(wscales=torch.zeros(2, 256, dtype=torch.float8_e4m3fn)), r"wscales is \[2, 256\].* Needs .*\[8, 256\]"),
    (dict(wcscales=torch.zeros(256)), "wcscales is .*float32"),
    (dict(proj_up=None), "rank 32 but proj_up is missing"),
    (dict(bias=torch.zeros(256)), "bias is .*float32"),
])
def test_gemm_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^gemm_nvfp4: .*" + words):
        gemm_nvfp4(*gemm_operands(**changes))
    assert launches == []


def test_what_needs_no_alignment(launches):
    """The row stride of a single row means nothing; a bias may be a piece of a longer one."""
    quant_nvfp4(*quant_operands(x=torch.zeros(1, 129, dtype=BF16)[:, :128]))
    gemm_nvfp4(*gemm_operands(1, out=torch.zeros(1, 260, dtype=BF16)[:, :256], bias=shifted(256, by=2)))
    gemm_nvfp4(*gemm_operands(rank=0, proj_up=None, bias=None, wcscales=None))
    assert len(launches) == 3


@pytest.mark.parametrize("op, operand, words", [(quant_nvfp4, 1, "smooth"), (gemm_nvfp4, 1, "ascales"),
                                                (gemm_nvfp4, 5, "wcscales")])
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
def test_fake_quant_nvfp4(launches, tokens, rank):
    real = quant_nvfp4(*quant_operands(tokens, rank))
    with FakeTensorMode(), torch.device("cuda"):
        fake = quant_nvfp4(*quant_operands(tokens, rank))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert {f.device.type for f in fake} == {"cuda"}


@pytest.mark.parametrize("tokens", [0, 65])
def test_fake_gemm(tokens):
    """Nothing comes back, `out` is what it was."""
    with FakeTensorMode(), torch.device("cuda"):
        operands = gemm_operands(tokens)
        assert gemm_nvfp4(*operands) is None
        assert operands[9].shape == (tokens, 256)


@on(emulator=True)
def test_what_torch_compile_sees(executor):
    """Shapes and dtypes without a launch, and no argument changed but `out`."""
    it = nvfp4_layer(128, 128, 16)
    arguments = it.x(3), it.weight.smooth, it.weight.proj_down
    check = torch.library.opcheck
    check(quant_nvfp4, arguments, test_utils=("test_schema", "test_faketensor"))
    prepared, out = quant_nvfp4(*arguments), torch.zeros(3, 128, dtype=BF16)
    operands = [*prepared, it.weight.qweight, it.weight.wscales, None, it.weight.wtscale, it.weight.proj_up, it.bias, out,
                False]
    before = [operand.clone() for operand in operands if isinstance(operand, torch.Tensor)]
    check(gemm_nvfp4, tuple(operands), test_utils="test_faketensor")            # test_schema cannot compare e4m3
    gemm_nvfp4(*operands)
    changed = [a is out for a, b in zip(filter(torch.is_tensor, operands), before)
               if not torch.equal(a.view(torch.uint8), b.view(torch.uint8))]
    assert changed == [True]
