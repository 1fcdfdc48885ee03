"""quant_fp8 and gemm_fp8, the kernels of Hopper, in both modes and with every epilogue: results against float64 and
reference.py, element by element, on every executor; conduct by the checks of the simulators; the repacked weight, the
operators.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_pack.svdq.kernels import epilogues, launch, layout, ops, reference, registry
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import w4a8_sm90
from svdq_pack.svdq.kernels.variants.w4a8_sm90 import STAGED, FP8Weight, gemm_fp8, quant_fp8, quant_fp8_outputs
from svdq_pack.svdq.kernels.weights import W4A4Weight, dequantize
from svdq_pack.tests.kernels.executors import Emulator, on
from svdq_pack.tests.kernels.families import layers, mutations
from svdq_pack.tests.kernels.families.comparisons import assert_rounded, assert_saturated, finished
from svdq_pack.tests.kernels.families.layers import (
    BF16,
    ENDINGS,
    FP16,
    GOLDEN,
    epilogue_of,
    golden_layer,
    launch_modulated,
    old_out,
)
from svdq_pack.tests.kernels.simulators.emulator import build
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Fault

W4A8, W4A4 = w4a8_sm90.VARIANTS
VARIANT = W4A8
# Beyond fp32: FP8 sums keep 13 bits, which leaves 4e-5 of the terms with a scale per token and nothing with one per group.
GPU_SLACK = 1e-4
N, K = 384, 768                             # a tile and a half; a step more than a ring of stages
RANKS = (0, 16, 32, 128)
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=HALVES.values())
MODES = pytest.mark.parametrize("mode", ["token", "group"])
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s", "u"])


def layer(n=N, k=K, rank=32, dtype=BF16, unsigned=False, wide=False):
    """A random layer. `wide`: with codes -8, which no nibble of sign and magnitude holds."""
    return layers.layer(n, k, rank, dtype, unsigned, -8 if wide else -7)


@functools.lru_cache(8)
def packed(layer):
    return FP8Weight.pack(layer.weight)


# The buffers between the kernels, by hand and not by the variant's `decode`

def unpack_codes(qact):
    """Granules [M/16][K/128][16][128] with swizzled chunks -> values [M, K] fp32."""
    granule, step = qact.shape[:2]
    row, chunk = torch.arange(16)[:, None], torch.arange(8)
    chunks = qact.view(granule, step, 16, 8, 16)[:, :, row, chunk ^ row & 7]
    return chunks.permute(0, 2, 1, 3, 4).reshape(granule * 16, step * 128).view(torch.float8_e4m3fn).float()


def unpack_scales(ascales):
    """[M/16][t][h j] -> [M], [M/16][K/128][2][t][h j] -> [M, K/64]: row 8h + 2t + j."""
    rows = ascales.view(*ascales.shape[:-1], 2, 2).transpose(-3, -2).flatten(-3)
    return rows.flatten() if rows.ndim == 2 else rows.permute(0, 3, 1, 2).reshape(rows.shape[0] * 16, -1)


def unpack_low(low):
    """[M/16][h][R/8][row][8] -> [M, R]."""
    return low.permute(0, 1, 3, 2, 4).reshape(low.shape[0] * 16, low.shape[2] * 8)


def pack_codes(codes):
    """Numbers [M, K] that e4m3 holds -> granules."""
    m, k = codes.shape
    chunks = codes.to(torch.float8_e4m3fn).view(torch.uint8).view(m // 16, 16, k // 128, 8, 16).permute(0, 2, 1, 3, 4)
    row, chunk = torch.arange(16)[:, None], torch.arange(8)
    return chunks[:, :, row, chunk ^ row & 7].reshape(m // 16, k // 128, 16, 128).contiguous()


def pack_scales(scales):
    """[M] or [M, K/64] -> as unpack_scales takes them."""
    if scales.ndim == 1:
        return scales.view(-1, 2, 4, 2).transpose(1, 2).reshape(-1, 4, 4)
    m, groups = scales.shape
    return scales.view(m // 16, 2, 4, 2, groups // 2, 2).permute(0, 4, 5, 2, 1, 3).reshape(m // 16, groups // 2, 2, 4, 4)


def unpack(quantised):
    qact, ascales, low = quantised
    return unpack_codes(qact), unpack_scales(ascales), unpack_low(low)


@pytest.mark.parametrize("groups", [None, 4])
def test_decode(groups):
    """The variants' own decoder, and the one of this file, undo `pack_`."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(32, 256, generator=random).to(torch.float8_e4m3fn).float()
    scales = torch.rand(*((32,) if groups is None else (32, groups)), generator=random)
    low = torch.randn(32, 48, generator=random).to(BF16)
    prepared = pack_codes(codes), pack_scales(scales), low.view(2, 2, 8, 6, 8).permute(0, 1, 3, 2, 4).contiguous()
    assert prepared[1].shape == quant_fp8_outputs(torch.zeros(32, 256), 48, groups is not None)[1].shape
    assert all(map(torch.equal, w4a8_sm90.decode(prepared, None), (codes, scales, low)))
    assert all(map(torch.equal, unpack(prepared), (codes, scales, low)))


# Running them

def quantise(executor, layer, x, mode, **how):
    """quant_fp8's (qact, ascales, low) of x, on the CPU."""
    weight = executor.put(packed(layer))
    with executor.set(**how):
        return [part.cpu() for part in quant_fp8(executor.put(x), weight.inverse, weight.proj_down, weight.unsigned,
                                                 mode == "group")]


def multiply(executor, layer, quantised, out, *, bias=True, accumulate=False, cluster=1, epilogue=None, **how):
    """gemm_fp8 of these operands into `out`, which is returned, on the CPU."""
    product = multiplier(executor, layer, quantised, out, bias=bias, accumulate=accumulate, epilogue=epilogue)
    with executor.set(**how):
        return product(cluster).cpu()


def multiplier(executor, layer, quantised, out, *, bias=True, accumulate=False, epilogue=None):
    """f(cluster) -> `out` after gemm_fp8, every operand being in its place."""
    weight, bias = executor.put(packed(layer)), executor.put(layer.bias) if bias else None
    quantised, given = executor.put(list(quantised)), epilogues.arguments(executor.put(epilogue))

    def product(cluster):
        there = executor.put(out.clone())
        gemm_fp8(*quantised, weight.qweight, weight.wscales, weight.proj_up, bias, there, accumulate, cluster, **given)
        return there
    return product


def blank(tokens, layer):
    return torch.full((tokens, layer.shape[0]), float("nan"), dtype=layer.dtype)


def check_quantised(executor, layer, x, mode, quantised):
    """Codes and scales of reference.quant_down with smooth as its reciprocal, to the bit; rows past M are zero."""
    tokens, (codes, scales, low) = len(x), unpack(quantised)
    v = x.float() + (reference.SHIFT if layer.unsigned else 0)
    inverse = 1 / layer.logical.smooth.float()
    if mode == "token":
        z = v * inverse
        scale = z.abs().amax(1) * (1 / 448)
        want = (z * (1 / scale).nan_to_num(posinf=0)[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        z = (v.to(x.dtype).float() * inverse).to(x.dtype).float().view(tokens, -1, 64)
        unrounded = z.abs().amax(-1) * (1 / (15 if layer.unsigned else 7))
        want = (z * (1 / unrounded).nan_to_num(posinf=0)[..., None]).round().flatten(1)
        scale = unrounded.to(x.dtype).float()
    assert torch.equal(codes[:tokens], want) and torch.equal(scales[:tokens], scale)
    spec_codes, spec_scales, _ = reference.quant_down(x, layer.logical.smooth, layer.logical.proj_down,
                                                      unsigned=layer.unsigned, precision="e4m3" if mode == "token" else "int4")
    off = (codes[:tokens] - spec_codes.float()).abs()           # by a step, where the reciprocal tips a tie
    assert (off > 0).sum() <= 1e-3 * off.numel() + 1
    assert (off <= (spec_codes.float().abs() / 8).clamp(min=2**-9) if mode == "token" else off <= 1).all()
    torch.testing.assert_close(scales[:tokens], spec_scales.float(), rtol=1e-6 if mode == "token" else 2**-8, atol=0)
    for values in (codes, scales, low):
        assert not values[tokens:].any()
    assert_rounded(low[:tokens], *layer.low(x), "low", executor.slack)


def check_product(executor, layer, quantised, out, slack=None, rows=slice(None), **more):
    want, size = layer.product(*(part[:len(out)][rows] for part in unpack(quantised)), **more)
    assert_rounded(out[rows], want, size, "out", slack or executor.slack)


def check_linear(executor, layer, tokens, mode, cluster=1, rows=slice(None), **how):
    x = layer.x(tokens)
    quantised = quantise(executor, layer, x, mode, order=tokens)
    check_quantised(executor, layer, x, mode, quantised)
    check_product(executor, layer, quantised, multiply(executor, layer, quantised, blank(tokens, layer), order=tokens,
                                                       cluster=cluster, **how), rows=rows)


# Both kernels, every shape

def mixed(cases):
    """Each case with half of all dtypes, signs and modes, the next one with the other half."""
    return [(*case, dtype, unsigned, mode) for i, case in enumerate(cases)
            for j, (dtype, unsigned, mode) in enumerate(itertools.product(HALVES, (False, True), ("token", "group")))
            if (i + j + j // 2 + j // 4) % 2 == 0]


def everything(cases):
    return [(*case, *rest) for case in cases for rest in itertools.product(HALVES, (False, True), ("token", "group"))]


TAILS = [(tokens, RANKS[i % 4], 1 + (i // 2 + i) % 2) for i, tokens in enumerate((1, 15, 16, 17, 63, 127, 128, 129, 257))]


@on("tokens, rank, cluster, dtype, unsigned, mode",
    emulator=mixed(TAILS + [(17, 0, 1), (18, 16, 2), (17, 128, 2)]), gpu=everything(
        [(1, 0, 2), (15, 16, 2), (17, 32, 2), (63, 48, 2), (127, 64, 1), (129, 112, 2), (257, 128, 1), (4250, 32, 1)]))
def test_linear(executor, tokens, rank, cluster, dtype, unsigned, mode):
    check_linear(executor, layer(rank=rank, dtype=dtype, unsigned=unsigned), tokens, mode, cluster)


@on("tokens, rank, order, dtype, unsigned, mode", interpreter=mixed([(21, 32, "forward"), (16, 48, "reverse")]))
def test_quant(executor, tokens, rank, order, dtype, unsigned, mode):
    """More groups than warps."""
    it = layer(128, 640, rank, dtype, unsigned)
    x = it.x(tokens)
    check_quantised(executor, it, x, mode, quantise(executor, it, x, mode, order=order))


HALF_A_TILE, PAIR, BYTES = (            # one step; more steps than stages; codes -8
    (128, 128, 17, 16, 1, 1, False, "forward"), (384, 768, 20, 32, 2, 2, False, 1), (128, 128, 3, 0, 1, 1, True, "reverse"))


@on("n, k, tokens, rank, cluster, ctas, wide, order, dtype, mode", interpreter=[
    (*shape, dtype, mode) for shape, modes in ((HALF_A_TILE, ("token", "group")), (PAIR, ("group", "token")),
                                               (BYTES, ("token", "group"))) for dtype, mode in zip(HALVES, modes)])
def test_product(executor, n, k, tokens, rank, cluster, ctas, wide, order, dtype, mode):
    """Of operands by the specification, not by quant_fp8."""
    it = layer(n, k, rank, dtype, wide=wide)
    quantised = specified(it, it.x(tokens), mode)
    check_product(executor, it, quantised, multiply(executor, it, quantised, blank(tokens, it), cluster=cluster, ctas=ctas,
                                                    order=order))


def specified(layer, x, mode):
    """What quant_fp8 should make of x, by reference.py."""
    codes, scales, low = reference.quant_down(x, layer.logical.smooth, layer.logical.proj_down, unsigned=layer.unsigned,
                                              precision="e4m3" if mode == "token" else "int4")
    codes, scales, low = (torch.nn.functional.pad(part.float(), (*(0, 0) * (part.ndim - 1), 0, -len(x) % 16))
                          for part in (codes, scales, low))
    return (pack_codes(codes), pack_scales(scales).contiguous(),
            low.to(x.dtype).view(len(low) // 16, 2, 8, low.shape[1] // 8, 8).permute(0, 1, 3, 2, 4).contiguous())


@MODES
@on("cluster, dtype, ctas", emulator=[(1, BF16, 4), (2, FP16, 4), (2, BF16, 2), (1, FP16, 2)], gpu=[(1, BF16, None),
                                                                                                   (2, FP16, None)])
def test_bytes(executor, cluster, dtype, ctas, mode):
    """A layer with codes -8."""
    check_linear(executor, layer(256, K, 16, dtype, wide=True), 130, mode, cluster, ctas=ctas)


@MODES
@on("k", emulator=[128, 640, 1280], gpu=[128, 640, 1280])
def test_depth(executor, k, mode):
    """Fewer steps than stages, as many, twice as many."""
    check_linear(executor, layer(128, k, 48), 20, mode)


FLUX = {"qkv": (9216, 3072, False), "out": (3072, 3072, False), "fc1": (12288, 3072, False), "fc2": (3072, 12288, True)}


@on("n, k, unsigned, mode, tokens, every, ctas", emulator=[
    (*shape, mode, 17, 1, 4) for *shape, mode in ((3072, 3072, False, "token"), (12288, 128, False, "group"),
                                                  (128, 12288, True, "group"), (128, 12288, True, "token"))],
    gpu=[(*shape, mode, 300, 13, None) for shape in FLUX.values() for mode in ("token", "group")])
def test_flux_layers(executor, n, k, unsigned, mode, tokens, every, ctas):
    """Whole layers of FLUX.1; in the emulator a small one, and the widest and the deepest."""
    check_linear(executor, layer(n, k, 32, BF16, unsigned), tokens, mode, 2, slice(None, None, every), ctas=ctas)


@UNSIGNED
@on(emulator=True, gpu=True)
def test_against_the_layer_itself(executor, unsigned):
    """Both modes against exact activations: 8 bits must be better than 4, and both near."""
    it, tokens = layer(256, 1280, 32, BF16, unsigned), 40
    x = it.x(tokens)
    want = reference.linear_weight_only(x, it.logical).double()
    errors = {}
    for mode in ("token", "group"):
        out = multiply(executor, it, quantise(executor, it, x, mode), blank(tokens, it)).double()
        errors[mode] = ((out - want).norm() / want.norm()).item()
    assert errors["token"] < 0.04 < 0.05 < errors["group"] < 0.2, errors


@on("name", emulator=GOLDEN, gpu=GOLDEN)
def test_golden_linear(executor, golden, name):
    """Tensors as in a checkpoint, in the bit-faithful mode."""
    tensors = golden(f"linear_int4_{name}")
    it = golden_layer(tensors, unsigned="unsigned" in name)
    x = layout.pad(tensors["io.x"], 1, 128 * -(-it.shape[1] // 128))
    tokens = len(x)
    quantised = quantise(executor, it, x, "group")
    live = (tensors["io.ascales"] != 0).repeat_interleave(64, 1)
    off = (unpack_codes(quantised[0])[:tokens] - tensors["io.q_act"].float()).abs()[live]
    assert (off > 0).sum() <= 1e-3 * off.numel() + 1 and off.max() <= 1
    want = tensors["io.y_act_quant"].double()
    out = multiply(executor, it, quantised, blank(tokens, it))[:, :want.shape[1]].double()
    assert (out - want).norm() <= 6e-3 * want.norm()                            # bf16 output, and a code here and there


# Options

@MODES
@on(emulator=True, gpu=True)
def test_row_strides(executor, mode):
    """x and out as columns of wider tensors; what lies between stays."""
    it, tokens = layer(rank=16), 65
    x, weight = it.x(tokens), executor.put(packed(it))
    room = executor.put(torch.full((tokens, K + 8), float("nan"), dtype=x.dtype))
    room[:, :K] = executor.put(x)
    plain = quantise(executor, it, x, mode)
    strided = quant_fp8(room[:, :K], weight.inverse, weight.proj_down, False, mode == "group")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(strided, plain))
    wide = executor.put(torch.full((tokens, N + 8), 9.0, dtype=x.dtype))
    gemm_fp8(*strided, weight.qweight, weight.wscales, weight.proj_up, executor.put(it.bias), wide[:, :N], False)
    assert torch.equal(wide[:, :N].cpu(), multiply(executor, it, plain, blank(tokens, it))) and (wide[:, N:] == 9).all()


@DTYPES
@MODES
@on(emulator=True, gpu=True)
def test_bias_and_accumulate(executor, mode, dtype):
    it, tokens = layer(rank=16, dtype=dtype), 17
    quantised = quantise(executor, it, it.x(tokens), mode)
    out = multiply(executor, it, quantised, blank(tokens, it), bias=False)
    check_product(executor, it, quantised, out, bias=False)
    before = torch.randn(tokens, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = multiply(executor, it, quantised, before.clone(), bias=False, accumulate=True)
    assert torch.equal(total, (before.float() + out.float()).to(dtype))


@MODES
@DTYPES
@on("tokens", emulator=[20], gpu=[40])
def test_bad_tokens(executor, tokens, dtype, mode):
    """A NaN or Inf makes its own token NaN, as in reference.py, and no other."""
    it, bad = layer(128, K, 16, dtype), [2, 5, 9]
    x = it.x(tokens)
    clean = multiply(executor, it, quantise(executor, it, x, mode), blank(tokens, it))
    x[2, 77], x[5, 77], x[9, 77] = float("nan"), float("inf"), -float("inf")
    quantised = quantise(executor, it, x, mode)
    codes = unpack_codes(quantised[0])[bad]
    assert not (codes if mode == "token" else codes[:, 64:128]).any()
    out = multiply(executor, it, quantised, blank(tokens, it))
    others = [row for row in range(tokens) if row not in bad]
    assert out[bad].isnan().all() and torch.equal(out[others], clean[others])


@MODES
@pytest.mark.parametrize("unsigned, fill", [(False, 0.0), (True, -reference.SHIFT)])
@on(emulator=True, gpu=True)
def test_token_of_nothing(executor, unsigned, fill, mode):
    """No largest value to divide by: the low-rank part and the bias remain."""
    it = layer(128, K, 16, unsigned=unsigned)
    x = it.x(3)
    x[1] = fill
    quantised = quantise(executor, it, x, mode)
    codes, scales, low = unpack(quantised)
    assert not codes[1].any() and not scales[1].any()
    out = multiply(executor, it, quantised, blank(3, it))
    want = low[1].double() @ it.logical.proj_up.double().T + it.bias.double()
    torch.testing.assert_close(out[1].double(), want, rtol=2**-8, atol=1e-6)


@MODES
@on(emulator=True)
def test_order_and_grid_change_nothing(executor, mode):
    """Any order of threads, CTAs and landing copies; any number of CTAs; alone or in pairs."""
    it, tokens = layer(), 130
    x = it.x(tokens)
    first, results = None, []
    for order in ["forward", "reverse", 1, 2]:
        quantised = quantise(executor, it, x, mode, order=order)
        first = first or quantised
        assert all(map(torch.equal, quantised, first))
        for ctas, cluster in ((1, 1), (4, 1), (2, 2), (4, 2)) if order == 1 else ((2, 1), (2, 2)):
            results.append(multiply(executor, it, first, blank(tokens, it), order=order, ctas=ctas, cluster=cluster))
    assert all(torch.equal(result, results[0]) for result in results)


@MODES
@on("n, k, tokens, runs", gpu=[(3072, 3072, 1000, 100)], rehearsal=[(384, 128, 20, 2)])
def test_runs_and_clusters_agree_to_the_bit(executor, n, k, tokens, runs, mode):
    it = layer(n, k)
    x, weight = executor.put(it.x(tokens)), executor.put(packed(it))
    first = quantise(executor, it, it.x(tokens), mode)
    product, results = multiplier(executor, it, first, blank(tokens, it)), []
    for i in range(runs):
        again = quant_fp8(x, weight.inverse, weight.proj_down, False, mode == "group")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(again, first))
        results.append(product(1 + i % 2))
        assert torch.equal(results[-1], results[0])


# Epilogues

def check_epilogue(executor, layer, tokens, mode, kind, rows=slice(None), **how):
    """`out`, when these rows of it are right."""
    n = layer.shape[0]
    quantised, epilogue = specified(layer, layer.x(tokens), mode), epilogue_of(kind, tokens, n, layer.dtype)
    before = old_out(kind, tokens, n, layer.dtype)
    out = multiply(executor, layer, quantised, blank(tokens, layer) if before is None else before,
                   accumulate=before is not None, epilogue=epilogue, **how)
    y, size = layer.product(*(part[:tokens][rows] for part in unpack(quantised)))
    of_rows = replace(epilogue, **{field: value[rows] for field, value in vars(epilogue).items()
                                   if field in ("residual", "rotation")})
    want, error = finished(of_rows, y, size, None if before is None else before[rows])
    if kind == "gelu":
        error = error + y.abs() / 2 * executor.tanh / executor.slack
    assert_rounded(out[rows], want, error, kind, executor.slack)
    return out


def alternating():
    """(tokens, kind, dtype, mode, cluster): every kind with each dtype, mode and cluster, the tokens in turn."""
    rows = itertools.product(ENDINGS, HALVES, ("token", "group"), (1, 2))
    return [((1, 15, 17, 129)[(i + i // 8) % 4], *row) for i, row in enumerate(rows)]


@on("n, rank, tokens, kind, dtype, mode, cluster", emulator=[(384, 16, *row) for row in alternating()],
    interpreter=[(384, 16, *row) for i, row in enumerate(alternating()) if (i + i // 2) % 2],
    gpu=[(384 * (1 + tokens % 3), rank, tokens, kind, dtype, mode, 1 + i % 2)
         for i, (tokens, rank) in enumerate(((1, 0), (15, 16), (17, 32), (129, 64), (257, 128)))
         for kind in ENDINGS for dtype in HALVES for mode in ("token", "group")])
def test_epilogue(executor, n, rank, tokens, kind, dtype, mode, cluster):
    """Heads of q and k in one tile, v and nothing in the other; on a GPU also two heads of each."""
    check_epilogue(executor, layer(n, 128, rank, dtype), tokens, mode, kind, cluster=cluster, order=tokens)


@MODES
@on("n, k, unsigned, kind, tokens, every", rehearsal=[(384, 128, True, "qkv", 20, 13)], gpu=[
    (*FLUX[name], kind, 300, 13) for name, kind in (("qkv", "qkv"), ("out", "gated"), ("fc1", "gelu"), ("fc2", "gated +="))])
def test_epilogue_of_flux_layers(executor, n, k, unsigned, kind, tokens, every, mode):
    check_epilogue(executor, layer(n, k, 32, BF16, unsigned), tokens, mode, kind, slice(None, None, every), cluster=2)


@MODES
@on("kind, ctas", emulator=[(kind, 4) for kind in ENDINGS], gpu=[(kind, None) for kind in ENDINGS])
def test_epilogue_of_bytes(executor, kind, ctas, mode):
    """Stages of another size, fewer of them than rotations need; no branch, so no stage for it in the group mode; two heads of
    q, k and v each."""
    check_epilogue(executor, layer(768, 128, 0, wide=True), 145, mode, kind, cluster=2, ctas=ctas)


@on("kind", emulator=ENDINGS)
def test_order_and_grid_change_no_epilogue(executor, kind):
    it, results = layer(768, 256, 16), []
    for order, ctas, cluster in (("forward", 1, 1), ("reverse", 4, 1), (1, 2, 2), (2, 4, 2)):
        results.append(check_epilogue(executor, it, 145, "token", kind, order=order, ctas=ctas, cluster=cluster))
    assert all(torch.equal(result, results[0]) for result in results)


@MODES
@on("kind, n, k, tokens, runs", gpu=[(kind, 3072, 1024, 1000, 100) for kind in ENDINGS],
    rehearsal=[("gated +=", 384, 128, 20, 2)])
def test_epilogues_agree_to_the_bit(executor, kind, n, k, tokens, runs, mode):
    """Alone and in pairs of CTAs, into memory that held other things."""
    n = 9216 if kind == "qkv" and n == 3072 else n
    it = layer(n, k)
    before = old_out(kind, tokens, n, it.dtype)
    product = multiplier(executor, it, specified(it, it.x(tokens), mode), blank(tokens, it) if before is None else before,
                         accumulate=before is not None, epilogue=epilogue_of(kind, tokens, n, it.dtype))
    first = product(2)
    for i in range(runs):
        assert torch.equal(product(1 + i % 2), first)


@on(emulator=True, gpu=True)
def test_store_is_what_it_was(executor):
    """The product as stored is what an epilogue of nothing gives: residual 0, gate 1."""
    it = layer(N, 256, 16)
    quantised = specified(it, it.x(20), "token")
    nothing = epilogues.Gated(torch.zeros(20, N, dtype=it.dtype), torch.ones(N, dtype=it.dtype))
    plain, gated = (multiply(executor, it, quantised, blank(20, it), epilogue=epilogue) for epilogue in (None, nothing))
    assert torch.equal(plain, gated)


@on("wide, tokens", emulator=[(False, 21), (True, 21)], gpu=[(False, 1000), (True, 1000)])
def test_residual_may_be_out(executor, wide, tokens):
    """One batch item's rows of a joint buffer, read before they are written."""
    it = layer(N, 128, 16, wide=wide)
    weight, random = executor.put(packed(it)), torch.Generator().manual_seed(2)
    joint = executor.put(torch.randn(2, tokens + 5, N, generator=random).to(it.dtype))
    kept, gate = joint.clone(), executor.put(torch.randn(N, generator=random).to(it.dtype))
    want, out, x = executor.put(blank(tokens, it)), joint[1, 5:], executor.put(it.x(tokens))
    W4A8.run(x, weight, want, None, False, epilogues.Gated(kept[1, 5:], gate))
    W4A8.run(x, weight, out, None, False, epilogues.Gated(out, gate))
    assert torch.equal(out, want) and torch.equal(joint[0], kept[0]) and torch.equal(joint[1, :5], kept[1, :5])


# Saturation

@on("kind", emulator=("gated", "gated +=", "qkv"), gpu=("gated", "gated +=", "qkv"))
def test_fp16_ends_at_its_largest_number(executor, kind):
    it = layer(N, 128, 0, FP16).changed(bias=torch.full((N,), 60000.0, dtype=FP16))
    much = {"rotation": torch.full((3, 64, 2, 2), -1e6)} if kind == "qkv" else {"gate": torch.full((N,), -100.0).half()}
    before = old_out(kind, 3, N, FP16)
    out = multiply(executor, it, specified(it, it.x(3), "token"), blank(3, it) if before is None else before,
                   accumulate=before is not None, epilogue=replace(epilogue_of(kind, 3, N, FP16), **much))
    assert (out[:, :256] == -65504).all() and ((out[:, 256:] > 50000).all() if kind == "qkv" else (out == -65504).all())


def check_saturation_of_low(executor, mode):
    """Row m of x has the signs of column m of proj_down, or all others, so that the sums of the diagonal go beyond."""
    it = layer(128, 128, 16, FP16)
    x = 30000 * it.logical.proj_down.T.sign() * torch.tensor([1.0, 1, -1, -1]).repeat(4)[:, None]
    x = torch.cat((x, x[:1] * float("nan"))).to(FP16)
    assert_saturated(unpack_low(quantise(executor, it, x, mode)[2])[:17], *it.low(x), executor.slack)


@on("mode", emulator=("token", "group"), interpreter=("token",), gpu=("token", "group"))
def test_low_saturates_in_fp16(executor, mode):
    check_saturation_of_low(executor, mode)


@on("file, words, index", emulator=mutations.places("quant_fp8.cuh", mutations.CLAMP))
def test_every_clamp_of_low_is_needed(executor, file, words, index):
    text = mutations.only(file, "quant_fp8_fp16_token_s_r32", mutations.without(file, words, index, "("))
    with executor.set(sources={file: text}), pytest.raises(AssertionError, match="beyond fp16: -?inf"):
        check_saturation_of_low(executor, "token")


# What Hopper's FP8 units are said to do to a sum: keep 13 bits below its largest term

@on("kind", emulator=("all 15 x 7", "all 15 x -8", "alternating", "random", "one large"))
def test_integers_survive_short_sums(executor, kind):
    """GROUP: every sum of a group is exact, so the output is the one of full sums, to the bit."""
    tokens, random = 16, torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (128, 256), generator=random)
    act = torch.randint(0, 16, (tokens, 256), generator=random)
    codes[0, 1] = -8
    if kind.startswith("all"):
        codes[:], act[:] = int(kind.split()[-1]), 15
    if kind == "alternating":
        codes[:], act[:] = 7 - 14 * (torch.arange(256) % 2), 15
        codes[:, ::64] = 1
    if kind == "one large":
        codes[:], act[:] = 1, 1
        codes[:, ::64], act[:, ::64] = 7, 15
    it = layer(128, 256, 0, BF16, True).changed(qweight=layout.pack_codes(codes.to(torch.int8)))
    scales = torch.rand(tokens, 4, generator=random)
    quantised = pack_codes(act.float()), pack_scales(scales).contiguous(), torch.zeros(1, 2, 0, 8, 8, dtype=BF16)
    full, short = (multiply(executor, it, quantised, blank(tokens, it), fp8_bits=bits) for bits in (None, 13))
    assert torch.equal(full, short)
    check_product(executor, it, quantised, short)


@on(emulator=True)
def test_short_sums_of_eight_bit_activations(executor):
    """TOKEN: what is cut off stays far below what e4m3 has already rounded away."""
    it, tokens = layer(128, 1280, 0), 16
    quantised = specified(it, it.x(tokens), "token")
    out, full = (multiply(executor, it, quantised, blank(tokens, it), fp8_bits=bits) for bits in (13, None))
    check_product(executor, it, quantised, out, slack=1e-4)
    assert not torch.equal(out, full)                           # so the rule was in force


@on("code, act, tokens", gpu=[(7, 15, 128), (-8, 15, 128), (-7, -7, 128), (None, 15, 128), (None, None, 128)],
    rehearsal=[(7, 15, 16), (None, 15, 16), (None, None, 16)])
def test_integers_are_exact(executor, code, act, tokens):
    """GROUP: sums of 64 integers to the bit, in an fp16 output that can show it: scales are powers of two."""
    n, k, random = 256, 256, torch.Generator().manual_seed(7)
    codes = torch.randint(-8, 8, (n, k), generator=random) if code is None else torch.full((n, k), code)
    values = torch.randint(0, 16, (tokens, k), generator=random) if act is None else torch.full((tokens, k), act)
    if code is None and act is not None:
        codes = torch.where(torch.arange(k) % 2 == 0, 7, -7).expand(n, k)
    weight = executor.put(FP8Weight.pack(W4A4Weight(
        "int4", False, layout.pack_codes(codes.to(torch.int8).contiguous()),
        layout.pack_scales(torch.ones(n, k // 64, dtype=FP16)), torch.ones(k, dtype=FP16))))
    low = executor.put(torch.zeros(tokens // 16, 2, 0, 8, 8, dtype=FP16))
    for group in range(k // 64):                            # one group at a time: its sum, at most 7680, is an fp16 number
        scales = torch.zeros(tokens, k // 64)               # or, where odd and above 2048, halfway between two
        scales[:, group] = 0.25
        out = executor.put(torch.zeros(tokens, n, dtype=FP16))
        gemm_fp8(executor.put(pack_codes(values.float())), executor.put(pack_scales(scales).contiguous()), low, weight.qweight,
                 weight.wscales, None, None, out, False)
        part = slice(64 * group, 64 * group + 64)
        assert torch.equal(out.cpu(), (values[:, part].double() @ codes[:, part].double().T / 4).half())


@on("bits", interpreter=[None, 13])
def test_both_simulators_agree(executor, bits, monkeypatch):
    """To the bit, also where sums are cut as Hopper cuts them."""
    it = layer(256, 256, 16)
    quantised = specified(it, it.x(9), "token")
    interpreted = multiply(executor, it, quantised, blank(9, it), fp8_bits=bits)
    other = Emulator()
    other.install(monkeypatch)
    assert torch.equal(multiply(other, it, quantised, blank(9, it), fp8_bits=bits), interpreted)


# Every barrier, wait and fence is needed: a simulator must see it gone

NEEDED = [*mutations.places("quant_fp8.cuh", "px::barrier();"), *mutations.places(
    "gemm_fp8.cuh", "px::wgmma_fence();", "px::wgmma_commit();", "px::warp_barrier();", "px::wgmma_wait(sum, a[0], a[1]);",
    "px::mbarrier_wait(&shared.full[at.stage], at.parity);", "px::mbarrier_fence();", "px::cluster_barrier();",
    "px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);", "px::mbarrier_arrive(&shared.empty[from.stage]);",
    "px::mbarrier_arrive_at(&shared.empty[from.stage], lane);", "px::barrier_of(1 + group_of_warps, 128);", "release(at);",
    "release(rotation_stage);", "px::mbarrier_wait(&shared.full[rotation_stage.stage], rotation_stage.parity);",
    "px::wgmma_wait(acc[0], now[0], now[1]);\n                px::wgmma_wait(acc[1], now[0], now[1]);")]
FIRST = ("px::wgmma_fence();", "px::mbarrier_wait(&shared.full[at.stage], at.parity);", "px::mbarrier_fence();",
         "px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);", "px::barrier_of(1 + group_of_warps, 128);",
         "px::mbarrier_wait(&shared.full[rotation_stage.stage], rotation_stage.parity);", "px::cluster_barrier();")


@on("file, words, index", emulator=NEEDED)
def test_nothing_to_spare(executor, file, words, index):
    """Found with the rotations of QKV in a pair of CTAs, of which one alone has its own way to free a stage."""
    mode = "group" if "warp_barrier" in words else "token"      # which reads a stage after its last wgmma
    cluster = 1 if words.startswith("px::mbarrier_arrive(") else 2
    kernels = {"quant_fp8.cuh": f"quant_fp8_bf16_{mode}_s_r32", "gemm_fp8.cuh": f"gemm_fp8_bf16_{mode}_w4_c{cluster}"}
    it, tokens = layer(), 145 if "rotation_stage" in words else 20     # with a tile after the first
    x, text = it.x(tokens), mutations.only(file, kernels[file], mutations.without(file, words, index))
    with executor.set(sources={file: text}), pytest.raises(
            KernelFault, match="race|nobody has written|has not landed|stuck|without a wgmma_fence|not commit|on its way|"
                               "has shown to the copy engine|no mbarrier|has ended|divergent|too often"):
        if file == "quant_fp8.cuh":
            quantise(executor, it, x, mode)
        quantised, epilogue = specified(it, x, mode), epilogue_of("qkv", tokens, N, x.dtype)
        for order in ("forward", "reverse", 1):
            multiply(executor, it, quantised, blank(tokens, it), cluster=cluster, order=order, epilogue=epilogue)


@on("words", interpreter=FIRST)
def test_nothing_to_spare_of_the_ptx(executor, words):
    """The first of each taken out."""
    cluster = 2 if "cluster" in words else 1
    text = mutations.only("gemm_fp8.cuh", f"gemm_fp8_bf16_token_w4_c{cluster}", mutations.without("gemm_fp8.cuh", words, 0))
    it = layer(384 if cluster == 2 or "rotation_stage" in words else 128, 768, 16)
    epilogue = epilogue_of("qkv" if "rotation_stage" in words else "gated", 5, it.shape[0], it.dtype)
    quantised = specified(it, it.x(5), "token")
    with executor.set(sources={"gemm_fp8.cuh": text}), pytest.raises(Fault):
        for order in ("forward", "reverse", 1):
            multiply(executor, it, quantised, blank(5, it), cluster=cluster, ctas=cluster, order=order, epilogue=epilogue)


# Bugs of value, planted one at a time: the comparisons above must fail

KERNELS = {"quant_fp8.cuh": "quant_fp8_bf16_token_s_r32", "gemm_fp8.cuh": "gemm_fp8_bf16_token_w4_c1"}
PLANTED = {
    "registers of A swapped": ("gemm_fp8.cuh", "{p(packed.x), q(packed.x),", "{q(packed.x), p(packed.x),"),
    "second half of a group from the first": ("gemm_fp8.cuh", "b + 4 * group + 2", "b + 4 * group"),
    "not swizzled": ("gemm_fp8.cuh", "px::operand(from.qact, 16, 1024, true)", "px::operand(from.qact, 16, 1024, false)"),
    "group not started at zero": ("gemm_fp8.cuh", "px::wgmma_e4m3<false>", "px::wgmma_e4m3<true>"),
    "rows of a weight scale swapped": ("gemm_fp8.cuh", "by = wscale[e / 2 % 2]", "by = wscale[1 - e / 2 % 2]"),
    "weight scales of the other warpgroup": ("gemm_fp8.cuh", "[8 * group_of_warps + 4 * sub + warp]",
                                             "[8 * (1 - group_of_warps) + 4 * sub + warp]"),
    "token scales of other tokens": ("gemm_fp8.cuh", "acc[0][8 * i + e] *= ascale[e / 4 * 2 + e % 2]",
                                     "acc[0][8 * i + e] *= ascale[e / 4 * 2]"),
    "last step dropped": ("gemm_fp8.cuh", "steps = K / DEPTH,", "steps = K / DEPTH - 1,"),
    "wrong tail: a row too many": ("gemm_fp8.cuh", "if (row < M)", "if (row <= M)"),
    "wrong tail: a row too few": ("gemm_fp8.cuh", "if (row < M)", "if (row < M - 1)"),
    "features past the end stored": ("gemm_fp8.cuh", "inside = feature0 < N;", "inside = true;"),
    "low rank of the first features": ("gemm_fp8.cuh", "(inside ? feature0 / 16 : 0)", "0"),
    "fragments of low rank as stored": ("gemm_fp8.cuh", "{{a[0].x, a[0].z, a[0].y, a[0].w},",
                                        "{{a[0].x, a[0].y, a[0].z, a[0].w},"),
    "low rank with its strides exchanged": ("gemm_fp8.cuh", "px::operand(&from, 128, 16 * R, false)",
                                         "px::operand(&from, 16 * R, 128, false)"),
    "bias of the wrong feature": ("gemm_fp8.cuh", "64 * sub + 16 * warp + 8 * h + g]);", "64 * sub + 16 * warp + g]);"),
    "granules from the first token": ("gemm_fp8.cuh", "granule0 + i < last ? granule0 + i : last) * steps",
                                      "i < last ? i : last) * steps"),
    "parity never turns": ("gemm_fp8.cuh", "stage = 0, parity ^= 1;", "stage = 0;"),
    "chunks not swizzled": ("quant_fp8.cuh", "(group % 2 * 4 + t) ^ g;", "(group % 2 * 4 + t);"),
    "tail rows leak": ("quant_fp8.cuh", "inside[h] ? from[0] : none", "from[0]"),
    "smoothing divided": ("quant_fp8.cuh", "(UNSIGNED ? x + SHIFT : x) * inverse;", "(UNSIGNED ? x + SHIFT : x) / inverse;"),
    "a warp's maximum forgotten": ("quant_fp8.cuh", "for (int w = 0; w < WARPS; w++)\n                bits",
                                   "for (int w = 1; w < WARPS; w++)\n                bits"),
    "a warp's share forgotten": ("quant_fp8.cuh", "for (int w = 0; w < WARPS; w++)\n            for",
                                 "for (int w = 1; w < WARPS; w++)\n                    for"),
    "low rank in the order of rows": ("quant_fp8.cuh", "2 * r + n8) * 8 + of / 4;", "2 * r) * 8 + of / 4;"),
}


def check_half(executor, file, tokens=145):
    """check_linear of the kernel that is in this file."""
    it = layer()
    x = it.x(tokens)
    if file == "quant_fp8.cuh":
        check_quantised(executor, it, x, "token", quantise(executor, it, x, "token", order=tokens))
    else:
        quantised = specified(it, x, "token")
        check_product(executor, it, quantised, multiply(executor, it, quantised, blank(tokens, it), order=tokens))


@on("bug", emulator=PLANTED)
def test_planted_bug_is_caught(executor, bug):
    file, right, wrong = PLANTED[bug]
    text = mutations.only(file, KERNELS[file], mutations.planted(file, right, wrong))
    with executor.set(sources={file: text}), pytest.raises((AssertionError, KernelFault)):
        check_half(executor, file)


IN_EPILOGUES = {
    "pair of a rotation swapped": ("qkv", "r[0] * v[0] + r[1] * v[1]", "r[0] * v[1] + r[1] * v[0]"),
    "rotation transposed": ("qkv", "r[1] * v[1], z[1] = r[2] * v[0]", "r[2] * v[1], z[1] = r[1] * v[0]"),
    "rotations of other pairs": ("qkv", "+ 16 * q]);", "]);"),
    "rotations of the first tokens": ("qkv", "rotation + (u64)first * HEAD", "rotation + (u64)(first % TOKENS) * HEAD"),
    "rotations of the other half": ("qkv", "i * SHARE * HEAD * 8", "(1 - i) * SHARE * HEAD * 8"),
    "weight of q for a head of k": ("qkv", "3 * feature0 < N ", "3 * feature0 <= N "),
    "v normalised too": ("qkv", "3 * feature0 < 2 * N;", "true;"),
    "k left as it is": ("qkv", "3 * feature0 < 2 * N;", "3 * feature0 < N;"),
    "squares of half a head": ("qkv", "mask = 8;", "mask = 4;"),
    "squares of two tokens": ("qkv", "mask = 8;", "mask = 16;"),
    "no eps": ("qkv", " + epilogue.eps", ""),
    "gate of the first features": ("gated", "epilogue.gate + feature0", "epilogue.gate"),
    "rows of out for the residual": ("gated", "row * epilogue.ldr", "row * ldo"),
    "product left out": ("gated", "by[0] * (y[q][0]", "by[0] * (0.0f"),
    "old out forgotten": ("gated +=", "(y[q][1] + px::high_half<T>(old))", "y[q][1]"),
    "rounded before the gate": ("gated", "as_float(bits.y);", "low_half<T>(px::pack_half<T>(px::as_float(bits.y), 0.0f));"),
    "a row too many": ("gated", "if (token + 2 * i >= M)", "if (token + 2 * i > M)"),
    "a row too few": ("gated", "if (token + 2 * i >= M)", "if (token + 2 * i + 1 >= M)"),
    "wrong cube": ("gelu", "0.044715f", "0.04f"),
}


@on("bug", emulator=IN_EPILOGUES)
def test_planted_bug_of_an_epilogue_is_caught(executor, bug):
    kind, right, wrong = IN_EPILOGUES[bug]
    text = mutations.only("gemm_fp8.cuh", KERNELS["gemm_fp8.cuh"], mutations.planted("gemm_fp8.cuh", right, wrong))
    with executor.set(sources={"gemm_fp8.cuh": text}), pytest.raises((AssertionError, KernelFault)):
        check_epilogue(executor, layer(N, 128, 16), 145, "token", kind)


@on(emulator=True)
def test_unplanted_source_passes(executor):
    """So that the failures above are the bugs' and not the harness's."""
    with executor.set(sources={file: mutations.only(file, kernel) for file, kernel in KERNELS.items()}):
        for file in KERNELS:
            check_half(executor, file)
        for kind in ENDINGS:
            check_epilogue(executor, layer(N, 128, 16), 145, "token", kind)


# The repacked weight

@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows, rank, dtype, unsigned", [(128, 0, BF16, False), (384, 16, FP16, True), (512, 48, BF16, True)])
def test_repack_is_undone_to_the_bit(rows, rank, dtype, unsigned, wide):
    it = layer(rows, 256, rank, dtype, unsigned, wide)
    weight, fp8 = it.weight, packed(it)
    again = fp8.unpack()
    assert (fp8.shape, fp8.rank, fp8.wide) == (weight.shape, rank, wide)
    assert torch.equal(fp8.codes(), layout.signed(it.logical.codes))
    for name, value in vars(weight).items():
        other = getattr(again, name)
        same = torch.equal(value, other) and value.dtype == other.dtype if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_repack_in_parts(monkeypatch):
    it = layer(768, 256, 0)
    whole = packed(it)
    monkeypatch.setattr(w4a8_sm90, "CODES_AT_ONCE", 1)
    assert torch.equal(FP8Weight.pack(it.weight).qweight, whole.qweight)


def test_repack_keeps_four_bits():
    it = layer(512, 1024)
    fp8, weight = packed(it), it.weight
    assert fp8.qweight.numel() == weight.qweight.numel()
    assert fp8.wscales.numel() == weight.wscales.numel() and fp8.proj_up is weight.proj_up


def test_one_code_by_hand():
    """Feature 8 + 3 of warp 2, sub-tile 1, warpgroup 1, input 64 + 32 + 16 + 4 * 1 + 2: code -5 is in the high nibble of its
    byte but for the sign, which rotate_left carried to the next byte."""
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    codes[128 + 64 + 32 + 8 + 3, 64 + 32 + 16 + 4 + 2] = -5 & 15
    weight = replace(layer(256, 128, 0).weight, qweight=layout.pack_codes(codes))
    stored = FP8Weight.pack(weight).qweight.view(2, 2, 2, 4, 8, 4, 2, 2, 4)         # wg sub group w g t step q byte
    assert stored[1, 1, 1, 2, 3, 1, 1, 1].tolist() == [0, 0, 5 << 4, 8] and stored.count_nonzero() == 2


@pytest.mark.parametrize("rank", [0, 32])
def test_rows_of_a_packed_weight(rank):
    """As views where whole tiles are cut, restored elsewhere; the same numbers either way."""
    plain = layer(768, 256, rank).weight
    weight = FP8Weight.pack(plain)
    for start, stop in ((0, 256), (256, 768), (0, 768), (128, 384), (0, 128)):
        part, want = weight.cut(start, stop), plain.cut(start, stop)
        assert isinstance(part, FP8Weight) == (start % 256 == stop % 256 == 0) and part.shape == (stop - start, 256)
        assert all(map(torch.equal, dequantize(part), dequantize(want)))
    assert weight.cut(256, 512).qweight.data_ptr() != weight.qweight.data_ptr()
    assert weight.cut(256, 512).qweight.untyped_storage().data_ptr() == weight.qweight.untyped_storage().data_ptr()
    odd = FP8Weight.pack(layer(384, 256, rank).weight)              # its last tile is half empty
    assert isinstance(odd.cut(256, 384), FP8Weight)
    assert all(map(torch.equal, dequantize(odd.cut(256, 384)), dequantize(odd.unpack().cut(256, 384))))


@pytest.mark.parametrize("changes, words", [({"precision": "nvfp4"}, r"nvfp4 \[128, 128\]"),
                                            ({"qweight": torch.zeros(128, 96, dtype=torch.int8)}, r"int4 \[128, 192\]")])
def test_layers_that_cannot_be_repacked(changes, words):
    with pytest.raises(ShapeError, match=words):
        FP8Weight.pack(replace(layer(128, 128, 0).weight, **changes))


# Through the dispatch, whose rules tests/unit/test_registry.py has

@DTYPES
@on(gpu=True)
def test_served(executor, dtype):
    """As a model calls it: repacked when loaded, then 8 bits by default, or the bits that are asked for."""
    it = layer(128, 128, 16, dtype)
    weight = registry.pack(executor.put(it.weight), dtype)
    assert isinstance(weight, FP8Weight) and torch.equal(weight.qweight.cpu(), packed(it).qweight)
    x, outs = executor.put(it.x(33)), {}
    for bits, name in ((None, "w4a8_sm90"), (8, "w4a8_sm90"), (4, "w4a4_sm90")):
        assert registry.plan(weight, executor.target, dtype, bits).variant.name == name
        outs[bits] = executor.put(blank(33, it))
        ops.linear(x, weight, outs[bits], executor.put(it.bias), act_bits=bits)
    assert torch.equal(outs[None], outs[8]) and not torch.equal(outs[8], outs[4])


# The operators: what they launch, what they refuse, what torch.compile sees of them

def quant_operands(dtype=BF16, **changes):
    return [*({"x": torch.zeros(3, K, dtype=dtype), "inverse": torch.ones(K),
               "proj_down": torch.zeros(K, 32, dtype=dtype)} | changes).values(), False, False]


def gemm_operands(tokens=3, **changes):
    operands = dict(zip(("qact", "ascales", "low"), quant_fp8_outputs(torch.zeros(tokens, K, dtype=BF16), 32, False)))
    return [*(operands | {"qweight": torch.zeros(2, K // 128, 16384, dtype=torch.uint8),
                          "wscales": torch.zeros(2, K // 128, 512), "proj_up": torch.zeros(N, 32, dtype=BF16),
                          "bias": torch.zeros(N, dtype=BF16),
                          "out": torch.zeros(tokens, N, dtype=BF16)} | changes).values(), False]


def launch_every_kernel():
    """Calls the operators in every way that picks a kernel, for test_every_variant.py."""
    for dtype, rank, unsigned, per_group in itertools.product(HALVES, (0, 32, 48), (False, True), (False, True)):
        x, down = torch.zeros(3, 128, dtype=dtype), torch.zeros(128, rank, dtype=dtype)
        quantised = quant_fp8(x, torch.ones(128), down, unsigned, per_group)
        for cluster, tile in itertools.product((1, 2), STAGED):
            gemm_fp8(*quantised, torch.zeros(1, 1, tile, dtype=torch.uint8), torch.zeros(1, 1, 512),
                     torch.zeros(128, rank, dtype=dtype), None, torch.zeros(3, 128, dtype=dtype), False, cluster)
    for variant, dtype in itertools.product(w4a8_sm90.VARIANTS, HALVES):
        launch_modulated(variant, dtype)


@pytest.mark.parametrize("cluster, tokens, ctas", [(1, 1, 2), (1, 129, 4), (2, 1, 2), (2, 4608, 72)])
def test_grid(monkeypatch, launches, cluster, tokens, ctas):
    """No more CTAs than run at once, whole clusters, none without a tile."""
    monkeypatch.setattr(launch, "processors", lambda device: 133)
    gemm_fp8(*gemm_operands(tokens, bias=None), cluster)
    call, = launches
    assert (call.grid, call.block, call.cluster) == ((ctas, 1), 384, cluster)
    assert call.shared == STAGED[16384] <= 227 << 10
    monkeypatch.setattr(launch, "processors", lambda device: 7)
    gemm_fp8(*gemm_operands(4608, bias=None), cluster)
    assert launches[1].grid == (7 // cluster * cluster, 1)


@on(emulator=True)
def test_shared_memory_is_what_the_kernel_declares(executor):
    """STAGED against sizeof(Shared<BYTES>): one byte less is an access outside."""
    for wide in (False, True):
        check_linear(executor, layer(128, 128, 0, wide=wide), 1, "group")
    source, sizes = mutations.only("gemm_fp8.cuh", KERNELS["gemm_fp8.cuh"]), torch.zeros(2, dtype=torch.int32)
    source += """extern "C" __global__ void sizes(u32* y) {
        y[0] = sizeof(gemm_fp8::Shared<false>), y[1] = sizeof(gemm_fp8::Shared<true>);
    }"""
    build.load(source).launch("sizes", 1, 1, 0, [sizes])
    assert sizes.tolist() == [STAGED[16384], STAGED[32768]]


@pytest.mark.parametrize("op, operands, words", [
    (quant_fp8, quant_operands(x=torch.zeros(3, 64, dtype=BF16)), "multiple of 128"),
    (quant_fp8, quant_operands(x=torch.zeros(3, K + 1, dtype=BF16)[:, 1:]), "rows aligned"),
    (quant_fp8, quant_operands(inverse=torch.ones(K, dtype=BF16)), "inverse is .* Needs .*float32"),
    (quant_fp8, quant_operands(proj_down=torch.zeros(K, 144, dtype=BF16)), "rank 144"),
    (gemm_fp8, gemm_operands(out=torch.zeros(3, 200, dtype=BF16)), "multiple of 128"),
    (gemm_fp8, gemm_operands(qweight=torch.zeros(1, K // 128, 16384, dtype=torch.uint8)), r"Needs \[2, K/128"),
    (gemm_fp8, gemm_operands(qweight=torch.zeros(2, K // 128, 100, dtype=torch.uint8)), "16384 or 32768"),
    (gemm_fp8, [*gemm_operands(), 3], "cluster 3"),
    (gemm_fp8, gemm_operands(proj_up=None), "proj_up is missing"),
    (gemm_fp8, gemm_operands(ascales=torch.zeros(1, 16)), "ascales"),
    (gemm_fp8, gemm_operands(wscales=torch.zeros(2, K // 128, 512, dtype=BF16)), "wscales"),
    (gemm_fp8, [*gemm_operands(), 1, "relu"], "epilogue relu with no operands"),
    (gemm_fp8, [*gemm_operands(), 1, "gated"], "gated with no operands"),
    (gemm_fp8, [*gemm_operands(), 1, "gelu", torch.zeros(3, N).bfloat16()], "gelu with residual"),
    (gemm_fp8, [*gemm_operands()[:-1], True, 1, "gelu"], "accumulate True"),
    (gemm_fp8, [*gemm_operands(), 1, "gated", torch.zeros(3, N), torch.zeros(N).bfloat16()], "residual is .*float32"),
    (gemm_fp8, [*gemm_operands(), 1, "gated", torch.zeros(3, N + 1).bfloat16()[:, :N], torch.zeros(N).bfloat16()],
     "rows aligned to 16"),
    (gemm_fp8, [*gemm_operands(), 1, "gated", torch.zeros(3, N).bfloat16(), torch.zeros(N)], "gate is"),
    (gemm_fp8, [*gemm_operands(), 1, "qkv", None, None, *torch.zeros(2, 128).bfloat16(), torch.zeros(2, 64, 2, 2)],
     "rotation is"),
])
def test_operands_that_do_not_fit(launches, op, operands, words):
    with pytest.raises(ShapeError, match=words):
        op(*operands)
    assert launches == []


@pytest.mark.parametrize("op, operands", [(quant_fp8, quant_operands()), (gemm_fp8, gemm_operands())],
                         ids=["quant_fp8", "gemm_fp8"])
def test_cpu_tensors(op, operands):
    with pytest.raises(ShapeError, match=f"{op._name.removeprefix('svdq::')}.*: tensors are on cpu. Needs a CUDA GPU"):
        op(*operands)


@MODES
@on("tokens", emulator=[0, 3, 20])
def test_what_torch_compile_sees(executor, tokens, mode):
    """Shapes and dtypes without a launch, and no argument changed but `out`."""
    it = layer(128, 128, 16)
    fp8, x = packed(it), torch.ones(tokens, 128, dtype=BF16)
    arguments = x, fp8.inverse, fp8.proj_down, False, mode == "group"
    quantised = quant_fp8(*arguments)
    with FakeTensorMode() as fakes:
        fake = quant_fp8(*(fakes.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments))
    assert [(f.shape, f.dtype) for f in fake] == [(q.shape, q.dtype) for q in quantised]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(quant_fp8, arguments, test_utils=tests)
    out = torch.zeros(tokens, 128, dtype=BF16)
    torch.library.opcheck(gemm_fp8, (*quantised, fp8.qweight, fp8.wscales, fp8.proj_up, None, out, False), test_utils=tests)
    assert bool(executor.launched) == bool(tokens)


@on("kind", emulator=["gated", "gelu", "qkv"])
def test_what_torch_compile_sees_of_an_epilogue(executor, kind):
    """Operands of an epilogue are not changed either; through functionalisation, with a residual that is `out`, too."""
    it = layer(N, 128, 16)
    fp8, epilogue = packed(it), epilogue_of(kind, 20, N, it.dtype)
    arguments = (*specified(it, it.x(20), "token"), fp8.qweight, fp8.wscales, fp8.proj_up, None)
    torch.library.opcheck(gemm_fp8, (*arguments, torch.zeros(20, N, dtype=it.dtype), False), epilogues.arguments(epilogue),
                          test_utils=("test_schema", "test_faketensor"))
    if kind == "gated":
        def gated(out):
            out = out + 1
            gemm_fp8(*arguments, out, False, epilogue="gated", residual=out, gate=epilogue.gate)
            return out

        start = torch.randn(20, N, generator=torch.Generator().manual_seed(4)).to(it.dtype)
        assert torch.equal(torch.compile(gated, backend="aot_eager")(start), gated(start))
