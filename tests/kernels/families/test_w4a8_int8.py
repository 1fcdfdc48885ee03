"""quant_int8 and gemm_int8, INT4 files with 8-bit activations on any GPU from sm_80 on: results against float64 and
reference.py, element by element, on every executor; conduct by the checks of the simulators; the operators by themselves.
"""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import layout, reference
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.rows import row_blocks
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import w4a8_int8
from svdq_pack.svdq.kernels.variants.w4a8_int8 import gemm_int8, quant_int8
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded, assert_saturated
from svdq_pack.tests.kernels.families.layers import BF16, FP16, GOLDEN, golden_layer, launch_modulated, layer
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

VARIANT, = w4a8_int8.VARIANTS
GPU_SLACK = 1e-6                            # tensor cores cut off where simulators round
TIES = 1e-4                                 # share of codes that 1 / scale in place of a division may round the other way
RANKS = (0, 16, 32, 128)
N, K = 256, 640                             # two tiles; ten groups: more than a ring of stages, or the warps of quant_int8
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "shifted"])


# The buffers between the kernels, by hand and not by the variant's `decode`; as the heads of the files say, lane = 4 g + t

@functools.cache
def places(tokens, k):
    """[M, K]: the byte of qact that holds a code."""
    row, column = torch.arange(tokens)[:, None], torch.arange(k)
    m64, m16, row_half, g = row // 64, row % 64 // 16, row % 16 // 8, row % 8
    group, half, t, i, odd = column // 64, column % 64 // 32, column % 32 // 8, column % 8 // 2, column % 2
    tile = ((m64 * (k // 64) + group) * 4 + m16) * 2 + half
    return (tile * 32 + 4 * g + t) * 16 + (2 * odd + row_half) * 4 + i


def unpack(quantised):
    """(codes [M, K] int, scales [M], low [M, R]), M in whole blocks."""
    qact, ascales, low = quantised
    tokens, k = qact.shape[0] * 64, qact.shape[1] * 64
    words = low.view(*low.shape[:2], 8, 4, 2, 2, 2)                             # g t, half of k, half of the rows, 2
    return (qact.flatten().view(torch.int8)[places(tokens, k)].int(), ascales.permute(0, 1, 3, 2).flatten(),
            words.permute(0, 5, 2, 1, 4, 3, 6).reshape(tokens, -1))


def pack(codes, scales, low):
    """The other way."""
    (m, k), r = codes.shape, low.shape[1]
    qact = torch.empty(m * k, dtype=torch.int8)
    qact[places(m, k)] = codes.to(torch.int8)
    return (qact.view(torch.int32).view(m // 64, k // 64, 4, 2, 32, 4), scales.view(m // 64, 4, 2, 8).mT.contiguous(),
            low.view(m // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6).reshape(m // 16, r // 16, 32, 8))


def test_decode():
    """The variant's own decoder, and the one of this file, undo `pack`."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (128, 192), generator=random)
    want = codes.float(), torch.rand(128, generator=random), torch.randn(128, 48, generator=random).to(BF16)
    prepared = pack(codes, *want[1:])
    assert all(map(torch.equal, w4a8_int8.decode(prepared, layer(128, 128).weight), want))
    assert all(map(torch.equal, (part.to(like.dtype) for part, like in zip(unpack(prepared), want)), want))


# Running them

def quantise(executor, layer, x, **how):
    """quant_int8's (qact, ascales, low) of x, on the CPU."""
    weight = executor.put(layer.weight)
    with executor.set(**how):
        return [part.cpu() for part in quant_int8(executor.put(x), weight.smooth, weight.proj_down, weight.unsigned)]


def multiply(executor, layer, quantised, out, *, bias=True, accumulate=False, **how):
    """gemm_int8 of these operands into `out`, which is returned, on the CPU."""
    weight, there = executor.put(layer.weight), executor.put(out)
    with executor.set(**how):
        gemm_int8(*executor.put(list(quantised)), weight.qweight, weight.wscales, weight.proj_up,
                  executor.put(layer.bias) if bias else None, there, accumulate)
    return there.cpu()


def blank(tokens, layer):
    return torch.full((tokens, layer.shape[0]), float("nan"), dtype=layer.dtype)


def spec(layer, x):
    codes, scales, _ = reference.quant_down(x, layer.logical.smooth, layer.logical.proj_down, precision="int8",
                                            unsigned=layer.unsigned)
    return codes.int(), scales


def check_quantised(executor, layer, x, quantised, ties=TIES):
    """Codes as in reference.py but for ties, scales too, on a GPU to some ulps; `low` against float64; nothing in the rows
    past M."""
    codes, scales, low = unpack(quantised)
    tokens, (spec_codes, spec_scales) = len(x), spec(layer, x)
    apart = (codes[:tokens] - spec_codes).abs()
    ties = max(ties, executor.ties)
    assert apart.max() <= 1 and apart.sum() <= ties * apart.numel() + (ties > 0)
    torch.testing.assert_close(scales[:tokens], spec_scales, rtol=1e-6 if executor.ties else 0, atol=0)
    for values in (codes, scales, low):
        assert not values[tokens:].any()
    assert_rounded(low[:tokens], *layer.low(x), "low", executor.slack)


def check_product(executor, layer, quantised, out, rows=slice(None), before=None, **more):
    """Against float64 from the same codes, added to what was there before: fp32 sums, rounded once."""
    want, size = layer.product(*(part[:len(out)][rows] for part in unpack(quantised)), **more)
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


@UNSIGNED
@DTYPES
@on("tokens, rank, n, k", emulator=[*TAILS, (17, 0, N, K), (65, 16, N, K), (1, 128, N, K)],
    interpreter=[(21, 32, 128, 384), (70, 48, 128, 128)],
    gpu=[*TAILS, *((rows, rank, N, K) for rows in (17, 130) for rank in (0, 16, 48, 112, 128)), (4608, 32, N, K)])
def test_linear(executor, tokens, rank, n, k, dtype, unsigned):
    check_linear(executor, layer(n, k, rank, dtype, unsigned), tokens)


@UNSIGNED
@on("k, dtype", emulator=[(128, BF16), (256, FP16), (3072, BF16)], gpu=[(k, d) for k in (64, 128, 256, 3072) for d in HALVES])
def test_depth(executor, k, dtype, unsigned):
    """Fewer groups than stages of the ring; FLUX's width."""
    check_linear(executor, layer(128, k, 32, dtype, unsigned), 70)


@on("n, k, unsigned, tokens, every",
    emulator=[(3072, 3072, False, 17, 1), (12288, 128, False, 17, 1), (128, 12288, True, 17, 1)],
    gpu=[(9216, 3072, False, 129, 7), (3072, 12288, True, 129, 7), (12288, 3072, False, 129, 7)])
def test_flux_layers(executor, n, k, unsigned, tokens, every):
    """Whole layers of FLUX.1, all tiles; in the emulator a small one, and the widest and the deepest."""
    check_linear(executor, layer(n, k, 32, BF16, unsigned), tokens, slice(None, None, every))


OPERANDS_OF = [(128, 320, 77, 32),      # an odd number of groups
               (256, 64, 130, 16)]      # four CTAs, two of them nearly without rows


@DTYPES
@on("n, k, tokens, rank", emulator=OPERANDS_OF, interpreter=OPERANDS_OF, gpu=OPERANDS_OF)
def test_product_of_any_operands(executor, n, k, tokens, rank, dtype):
    """All 255 codes, any scales; against reference.py as well."""
    random, it, padded = torch.Generator().manual_seed(1), layer(n, k, rank, dtype), row_blocks(tokens, 64) * 64
    codes = torch.randint(-127, 128, (padded, k), generator=random)
    quantised = pack(codes, torch.rand(padded, generator=random) + 0.25, torch.randn(padded, rank, generator=random).to(dtype))
    check_product(executor, it, quantised, multiply(executor, it, quantised, blank(tokens, it)))
    codes, scales, low = (part[:tokens] for part in unpack(quantised))
    spec = reference.gemm_w4a4(codes.float(), scales, layout.signed(it.logical.codes), it.logical.wscales, low,
                               it.logical.proj_up, it.bias, precision="int4")
    exact, _ = it.product(codes, scales, low)
    assert (exact - spec).norm() < 1e-6 * exact.norm()


@on("code, act", emulator=[(-8, -127), (-8, 127), (7, 127)], interpreter=[(-8, -127), (-8, 127)], gpu=[(-8, -127), (-8, 127)])
def test_largest_sums_are_exact(executor, code, act):
    """Every product of a group the largest there is, with scales that are powers of two: nothing is rounded but the output."""
    it = layer(128, 128, 0, FP16)
    scales = torch.full((128, 2), 2.0**-10, dtype=FP16)
    codes = torch.full((128, 128), code, dtype=torch.int8)
    it = it.changed(qweight=layout.pack_codes(codes), wscales=layout.pack_scales(scales))
    out = multiply(executor, it, pack(torch.full((64, 128), act), torch.full((64,), 0.5), torch.zeros(64, 0, dtype=FP16)),
                   blank(3, it), bias=False)
    assert (out == torch.tensor(code * act * 128 / 2**11, dtype=FP16)).all()


@UNSIGNED
@on(emulator=True, gpu=True)
def test_against_the_layer_itself(executor, unsigned):
    """Near exact activations, nearer than 4-bit ones."""
    it, tokens = layer(256, 1280, 32, BF16, unsigned), 40
    x = it.x(tokens)
    want = reference.linear_weight_only(x, it.logical).double()
    out = multiply(executor, it, quantise(executor, it, x), blank(tokens, it)).double()
    four = reference.linear_w4a4(x, it.logical).double()
    assert (out - want).norm() < 0.015 * want.norm() < 0.05 * want.norm() < (four - want).norm()


@on("name", emulator=GOLDEN, interpreter=GOLDEN, gpu=GOLDEN)
def test_golden_linear(executor, golden, name):
    """Tensors as in a checkpoint: codes and scales exactly those of reference.py."""
    tensors = golden(f"linear_int4_{name}")
    it = golden_layer(tensors, unsigned="unsigned" in name)
    check_golden(executor, it, layout.pad(tensors["io.x"], 1, it.shape[1]), tensors["io.lora_act"])


@on(emulator=True, interpreter=True, gpu=True)
def test_golden_mlp(executor, golden):
    """fc1, and fc2 from the golden GELU of its output."""
    tensors = golden("mlp_int4_fused_gelu")
    fc1, fc2 = golden_layer(tensors, False, "packed.fc1."), golden_layer(tensors, True, "packed.fc2.")
    check_golden(executor, fc1, tensors["io.x"])
    check_golden(executor, fc2, tensors["io.gelu_bf16"], tensors["io.fc2_lora_act"])


def check_golden(executor, layer, x, low=None):
    quantised, tokens = quantise(executor, layer, x), len(x)
    check_quantised(executor, layer, x, quantised, ties=0)
    if low is not None:
        torch.testing.assert_close(unpack(quantised)[2][:tokens].float(), low, rtol=4e-3, atol=1e-5)
    out = multiply(executor, layer, quantised, blank(tokens, layer))
    check_product(executor, layer, quantised, out)
    want = reference.linear_w4a4(x, layer.logical, act="int8").double()
    assert (out.double() - want).norm() <= 3e-3 * want.norm()                   # bf16 output and low


# Options

@on("tokens, k, dtype", emulator=[(65, K, BF16), (65, K, FP16)], interpreter=[(20, 128, BF16)],
    gpu=[(65, K, BF16), (65, K, FP16)])
def test_row_strides(executor, tokens, k, dtype):
    """x and out as columns of wider tensors; what lies between stays."""
    it = layer(128, k, 16, dtype)
    x, weight = it.x(tokens), executor.put(it.weight)
    room = executor.put(torch.full((tokens, k + 8), float("nan"), dtype=dtype))
    room[:, :k] = executor.put(x)
    strided, plain = quant_int8(room[:, :k], weight.smooth, weight.proj_down, False), quantise(executor, it, x)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(strided, plain))
    wide = executor.put(torch.full((tokens, 128 + 8), 9.0, dtype=dtype))
    gemm_int8(*strided, weight.qweight, weight.wscales, weight.proj_up, executor.put(it.bias), wide[:, :128], False)
    assert torch.equal(wide[:, :128].cpu(), multiply(executor, it, plain, blank(tokens, it))) and (wide[:, 128:] == 9).all()


@on("n, k, dtype", emulator=[(N, K, BF16), (N, K, FP16)], interpreter=[(128, 128, BF16), (128, 128, FP16)],
    gpu=[(N, K, BF16), (N, K, FP16)])
def test_bias_and_accumulate(executor, n, k, dtype):
    it, tokens = layer(n, k, 16, dtype), 17
    quantised = quantise(executor, it, it.x(tokens))
    out = multiply(executor, it, quantised, blank(tokens, it), bias=False, order="reverse")
    check_product(executor, it, quantised, out, bias=False)
    before = torch.randn(tokens, n, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = multiply(executor, it, quantised, before.clone(), bias=False, accumulate=True)
    check_product(executor, it, quantised, total, before=before, bias=False)


@on("tokens, dtype", emulator=[(20, BF16), (20, FP16)], interpreter=[(16, BF16)], gpu=[(130, BF16), (130, FP16)])
def test_bad_tokens(executor, tokens, dtype):
    """A NaN or Inf makes its own token NaN, as in reference.py, and no other: its scale tells, its codes are 0."""
    it = layer(128, 128, 16, dtype)
    x, bad = it.x(tokens), [2, 5, 9]
    clean = multiply(executor, it, quantise(executor, it, x), blank(tokens, it))
    x[2, 70], x[5, 3], x[9, 127] = float("nan"), float("inf"), -float("inf")
    quantised = quantise(executor, it, x)
    codes, scales, _ = (part[:tokens] for part in unpack(quantised))
    spec_codes, spec_scales = spec(it, x)
    assert torch.equal(codes[bad], spec_codes[bad]) and not codes[bad].any()
    torch.testing.assert_close(scales, spec_scales, equal_nan=True, rtol=1e-6, atol=0)
    out = multiply(executor, it, quantised, blank(tokens, it))
    others = [row for row in range(tokens) if row not in bad]
    assert out[bad].isnan().all() and torch.equal(out[others], clean[others])


@pytest.mark.parametrize("unsigned, fill", [(False, 0.0), (True, -reference.SHIFT), (False, 1e-38), (False, 2.0**-133)])
@on(emulator=True, interpreter=True, gpu=True)
def test_token_of_nothing(executor, unsigned, fill):
    """Activations of zero, after the shift of an unsigned layer if it has one, and those too small to divide by: codes 0."""
    it = layer(128, 128, 0, unsigned=unsigned)
    x = it.x(16)
    x[3] = fill
    codes, scales, _ = unpack(quantise(executor, it, x))
    assert scales[2] > 0 and 0 <= scales[3] < 1e-39 and not codes[3].any() and codes[2].any()


@on("tokens, n, k, orders", emulator=[(130, N, K, ("forward", "reverse", 1, 2))],
    interpreter=[(21, 128, 384, ("forward", "reverse"))])
def test_order_changes_nothing(executor, tokens, n, k, orders):
    it = layer(n, k)
    x, results = it.x(tokens), []
    for order in orders:
        quantised = quantise(executor, it, x, order=order)
        results.append((*quantised, multiply(executor, it, quantised, blank(tokens, it), order=order)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


# Saturation: a result beyond fp16 is stored as its largest number of that sign, not as Inf, and NaN stays NaN

def check_saturation_of_product(executor):
    it, tokens = layer(128, 128, 16, FP16), 20
    it = it.changed(wscales=it.weight.wscales * 2**14)
    x = it.x(tokens)
    x[5, 77] = float("nan")
    with executor.set(sources={}):
        quantised = quantise(executor, it, x)
    out = multiply(executor, it, quantised, blank(tokens, it))
    assert_saturated(out, *it.product(*(part[:tokens] for part in unpack(quantised))), executor.slack)
    before = torch.full((tokens, 128), 60000.0, dtype=FP16)
    before[::2], before[7] = -60000, float("nan")
    total = multiply(executor, it, quantised, before.clone(), accumulate=True)
    want, size = it.product(*(part[:tokens] for part in unpack(quantised)))
    assert_saturated(total, want + before.double(), size + before.double().abs(), executor.slack)


def check_saturation_of_low(executor):
    """Row m of x has the signs of column m of proj_down, or all others, so that the sums of the diagonal go beyond."""
    it = layer(128, 128, 16, FP16)
    x = 30000 * it.logical.proj_down.T.sign() * torch.tensor([1.0, 1, -1, -1]).repeat(4)[:, None]
    x = torch.cat((x, x[:1] * float("nan"))).to(FP16)
    assert_saturated(unpack(quantise(executor, it, x))[2][:17], *it.low(x), executor.slack)


SATURATING = {"gemm_int8.cuh": ("gemm_int8_fp16", check_saturation_of_product),
              "quant_int8.cuh": ("quant_int8_fp16_r32", check_saturation_of_low)}


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

KERNELS = {"quant_int8.cuh": "quant_int8_bf16_r32", "gemm_int8.cuh": "gemm_int8_bf16"}
BARRIERS = [*mutations.places("quant_int8.cuh", "px::barrier();"),
            *mutations.places("gemm_int8.cuh", "px::barrier();", outside=("tile.cuh",))]


@on("file, words, index", interpreter=BARRIERS, emulator=[*BARRIERS, *mutations.places(
    "gemm_int8.cuh", "px::copy_commit();", "px::copy_wait<STAGES - 2>();")])
def test_nothing_to_spare(executor, file, words, index):
    it = layer(128, 640)
    x, text = it.x(20), mutations.only(file, KERNELS[file], mutations.without(file, words, index))
    quantised = quantise(executor, it, x) if file == "gemm_int8.cuh" else None
    with executor.set(sources={file: text}), pytest.raises(
            (KernelFault, Fault), match="race|nobody has written|never written|has not landed|on its way|in no group"):
        if quantised is None:
            quantise(executor, it, x)
        else:
            multiply(executor, it, quantised, blank(20, it))


# Bugs of value, planted one at a time: the comparisons above must fail

PLANTED = {
    "fragments of B swapped": ("gemm_int8.cuh", "b[2 * j][0][0] = w.x << 4 & CODES, b[2 * j][0][1] = w.x & CODES",
                               "b[2 * j][0][0] = w.x & CODES, b[2 * j][0][1] = w.x << 4 & CODES"),
    "a half of k twice": ("gemm_int8.cuh", "w.w << 4 & CODES", "w.z << 4 & CODES"),
    "codes not masked": ("gemm_int8.cuh", "b[2 * j][1][1] = w.y & CODES", "b[2 * j][1][1] = w.y"),
    "sixteen times too much": ("gemm_int8.cuh", "px::as_float(bits.y) / 16", "px::as_float(bits.y)"),
    "rows of an activation scale swapped": ("gemm_int8.cuh", "ascale[e / 2]", "ascale[1 - e / 2]"),
    "columns of a weight scale swapped": ("gemm_int8.cuh", "wscale[j][e % 2]", "wscale[j][1 - e % 2]"),
    "low rank under the token's scale": ("gemm_int8.cuh", "y[j][e] *= ascale[e / 2]",
                                         "y[j][e] *= e < 3 ? ascale[e / 2] : 1.0f"),
    "last group dropped": ("gemm_int8.cuh", "if (group >= groups)", "if (group >= groups - 1)"),
    "a group copied twice": ("gemm_int8.cuh", "next += 256;", "next += next < 1024 ? 256 : 0;"),
    "scales of the group before": ("gemm_int8.cuh", "(qweight_at + next) / 16 + thread",
                                   "(qweight_at + next - (next > 255) * 256) / 16 + thread"),
    "even and odd codes swapped": ("quant_int8.cuh", "codes(z + 1, inverse[h])", "codes(z, inverse[h])"),
    "bytes in the wrong order": ("quant_int8.cuh", "0x5410", "0x1054"),
    "tail rows leak": ("quant_int8.cuh", "store_scale(inside[h] ? bits : 0u,", "store_scale(bits,"),
    "smoothing multiplied": ("quant_int8.cuh", "px::divide(px::high_half<T>(x) + shift, px::high_half<T>(smooth))",
                             "(px::high_half<T>(x) + shift) * px::high_half<T>(smooth)"),
    "smoothing of the neighbour": ("quant_int8.cuh", "by[6]", "by[4]"),
    "shift forgotten": ("quant_int8.cuh", "px::low_half<T>(x) + shift", "px::low_half<T>(x)"),
    "shift in the low rank": ("quant_int8.cuh", "const words4 a = {pairs[0],",
                              "const words4 a = {px::pack_half<T>(px::low_half<T>(pairs[0]) + shift, "
                              "px::high_half<T>(pairs[0])),"),
    "a warp's maximum forgotten": ("quant_int8.cuh", "for (int w = 0; w < WARPS; w++)\n            bits",
                                   "for (int w = 1; w < WARPS; w++)\n            bits"),
    "a lane's maximum forgotten": ("quant_int8.cuh", "larger(bits, px::swap_lanes(bits, 2))", "bits"),
    "codes cut off": ("quant_int8.cuh",
                      "px::as_bits(px::multiply(z[2 * i], inverse) + 12582912.0f)", "(u32)(int)(z[2 * i] * inverse)"),
    "codes to 128": ("quant_int8.cuh", ", 127.0f)", ", 128.0f)"),
    "low rank fed the other row": ("quant_int8.cuh", "{pairs[0], pairs[1],", "{pairs[1], pairs[0],"),
    "a warp's share forgotten": ("quant_int8.cuh", "for (int w = 0; w < WARPS; w++)\n            for",
                                 "for (int w = 1; w < WARPS; w++)\n            for"),
}


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    text = mutations.only(file, KERNELS[file], mutations.planted(file, right, wrong))
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        check_linear(executor, layer(N, K, unsigned=True), 65)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={file: mutations.only(file, kernel) for file, kernel in KERNELS.items()}):
        check_linear(executor, layer(N, K, unsigned=True), 65)


# The operators: what they launch, what they refuse, what torch.compile sees of them

RANK = 32


def quant_operands(tokens=3, rank=RANK, dtype=BF16, k=128, **changes):
    return [*({"x": torch.zeros(tokens, k, dtype=dtype), "smooth": torch.ones(k, dtype=dtype),
               "proj_down": torch.zeros(k, rank, dtype=dtype)} | changes).values(), False]


def gemm_operands(tokens=3, rank=RANK, dtype=BF16, k=128, n=256, **changes):
    blocks, groups = row_blocks(tokens, 64), k // 64
    return [*({"qact": torch.zeros(blocks, groups, 4, 2, 32, 4, dtype=torch.int32),
               "ascales": torch.zeros(blocks, 4, 8, 2), "low": torch.zeros(blocks * 4, rank // 16, 32, 8, dtype=dtype),
               "qweight": torch.zeros(n, k // 2, dtype=torch.int8), "wscales": torch.zeros(groups, n, dtype=dtype),
               "proj_up": torch.zeros(n, rank, dtype=dtype), "bias": torch.zeros(n, dtype=dtype),
               "out": torch.zeros(tokens, n, dtype=dtype)} | changes).values(), False]


OPERANDS = {quant_int8: quant_operands, gemm_int8: gemm_operands}


def launch_every_kernel():
    """Calls the operators in every way that picks a kernel, for test_every_variant.py."""
    for dtype in HALVES:
        for rank in (0, 16, 32, 48, 128):
            quant_int8(*quant_operands(rank=rank, dtype=dtype))
        gemm_int8(*gemm_operands(dtype=dtype))
        launch_modulated(VARIANT, dtype)


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (64, 1), (65, 2), (4608, 72)])
def test_grids(launches, tokens, blocks):
    quant_int8(*quant_operands(tokens))
    gemm_int8(*gemm_operands(tokens))
    if tokens == 0:
        assert launches == []
        return
    down, gemm = launches
    assert (down.grid, down.block) == ((blocks * 4, 1), 256)
    assert (gemm.grid, gemm.block) == ((256 // 128, -(-tokens // 128)), 128)


@pytest.mark.parametrize("unsigned", [False, True])
def test_shift(launches, unsigned):
    quant_int8(*quant_operands()[:-1], unsigned)
    assert [value for value in launches[0].arguments if isinstance(value, float)] == [reference.SHIFT if unsigned else 0.0]


def strided(*shape, dtype=BF16):
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def shifted(*shape, dtype=BF16, by=1):
    return torch.zeros(by + torch.Size(shape).numel(), dtype=dtype)[by:].view(shape)


@pytest.mark.parametrize("changes, words", [
    (dict(x=torch.zeros(3, 128)), r"x is \[3, 128\] torch.float32"),
    (dict(x=torch.zeros(3, 100, dtype=BF16)), "multiple of 64"),
    (dict(x=strided(3, 128)), r"strides \(256, 2\).* call .contiguous"),
    (dict(x=torch.zeros(3, 130, dtype=BF16)[:, :128]), r"strides \(130, 1\)"),
    (dict(x=shifted(3, 128, by=2)), "aligned to 16 bytes"),
    (dict(smooth=torch.ones(128, dtype=FP16)), "smooth is .*float16.* Needs .*bfloat16"),
    (dict(smooth=torch.ones(64, dtype=BF16)), r"smooth is \[64\].* Needs .*\[128\]"),
    (dict(smooth=shifted(128)), "smooth .*aligned"),
    (dict(proj_down=torch.zeros(128, 24, dtype=BF16)), "rank 24. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(128, 144, dtype=BF16)), "rank 144. .*multiples of 16 up to 128"),
    (dict(proj_down=torch.zeros(64, RANK, dtype=BF16)), r"proj_down is \[64, 32\].* Needs .*\[128, 32\]"),
])
def test_quant_int8_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^quant_int8: .*" + words):
        quant_int8(*quant_operands(**changes))
    assert launches == []


@pytest.mark.parametrize("changes, words", [
    (dict(out=torch.zeros(3, 256)), "out is .*float32"),
    (dict(out=torch.zeros(3, 384, dtype=BF16)), r"out is \[3, 384\].* Needs \[tokens, 256\]"),
    (dict(out=torch.zeros(3, 260, dtype=BF16)[:, :256]), r"strides \(260, 1\).*16 bytes"),
    (dict(out=shifted(3, 256)), "aligned to 16 bytes"),
    (dict(qweight=torch.zeros(192, 64, dtype=torch.int8), out=torch.zeros(3, 192, dtype=BF16)), "multiple of 128"),
    (dict(out=torch.zeros(65, 256, dtype=BF16)), r"qact is \[1, 2, 4, 2, 32, 4\].* Needs .*\[2, 2, 4, 2, 32, 4\]"),
    (dict(qact=torch.zeros(1, 2, 4, 32, 4, dtype=torch.int32)), "qact is"),
    (dict(qact=torch.zeros(1, 2, 4, 2, 32, 4)), r"qact is .*float32.*\.int32"),
    (dict(ascales=torch.zeros(1, 4, 8, 2, dtype=BF16)), "ascales is .*bfloat16.* Needs .*float32"),
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
def test_gemm_int8_refuses(launches, changes, words):
    with pytest.raises(ShapeError, match="^gemm_int8: .*" + words):
        gemm_int8(*gemm_operands(**changes))
    assert launches == []


def test_what_needs_no_alignment(launches):
    """The row stride of a single row means nothing; a bias may be a piece of a longer one."""
    quant_int8(*quant_operands(x=torch.zeros(1, 129, dtype=BF16)[:, :128]))
    gemm_int8(*gemm_operands(1, out=torch.zeros(1, 260, dtype=BF16)[:, :256], bias=shifted(256, by=2)))
    gemm_int8(*gemm_operands(rank=0, proj_up=None, bias=None))
    assert len(launches) == 3


@pytest.mark.parametrize("op, operand, words", [(quant_int8, 1, "smooth"), (quant_int8, 2, "proj_down"), (gemm_int8, 0, "qact"),
                                                (gemm_int8, 3, "qweight"), (gemm_int8, 6, "bias")])
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


@pytest.mark.parametrize("rank", [0, 128])
@pytest.mark.parametrize("tokens", [0, 1, 65])
def test_fake_quant_int8(launches, tokens, rank):
    real = quant_int8(*quant_operands(tokens, rank))
    with FakeTensorMode(), torch.device("cuda"):
        fake = quant_int8(*quant_operands(tokens, rank))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert {f.device.type for f in fake} == {"cuda"}


@pytest.mark.parametrize("tokens", [0, 65])
def test_fake_gemm_int8(tokens):
    """Nothing comes back, `out` is what it was."""
    with FakeTensorMode(), torch.device("cuda"):
        operands = gemm_operands(tokens)
        assert gemm_int8(*operands) is None
        assert operands[7].shape == (tokens, 256)


@on(emulator=True)
def test_what_torch_compile_sees(executor):
    """Shapes and dtypes without a launch, and no argument changed but `out`."""
    it = layer(128, 128, 16)
    arguments = it.x(3), it.weight.smooth, it.weight.proj_down, False
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    check(quant_int8, arguments)
    check(gemm_int8, (*quant_int8(*arguments), it.weight.qweight, it.weight.wscales, it.weight.proj_up, it.bias,
                      torch.zeros(3, 128, dtype=BF16), False))
