"""Every kernel variant, from its own PTX, against the formulas of reference.py in float64: small shapes with all the tails.

What runs here is what nvcc made of the kernel for sm_80, so inline assembly, its constraints and the fragment tables of
ptx.cuh are covered; what ptxas makes of it is not.
"""

import re
from functools import cache

import numpy as np
import pytest
import torch
from svdq_pack.kernels import layout, reference
from svdq_pack.tests.kernels import test_emulated as emulated
from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.ptx_interpreter import Fault, Module

pytestmark = toolchain.needs_nvcc
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def module(name):
    return Module(toolchain.ptx(toolchain.KERNELS / f"{name}.cuh", "sm_80"))


def random(seed):
    return torch.Generator().manual_seed(seed)


def array(tensor):
    """The memory of a tensor as numpy: 16-bit floats as their bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype in TYPES.values() else tensor).numpy()


def constant(tensor):
    """As array, and the kernel must not write to it."""
    result = array(tensor)
    result.flags.writeable = False
    return result


def assert_rounded(got, exact, slack=1e-6):
    """got is `exact` (float64) rounded to got.dtype, give or take `slack` of the largest value before the rounding."""
    info = torch.finfo(got.dtype)
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1) * info.eps
    error = (got.double() - exact).abs() - ulp / 2 - slack * exact.abs().max()
    worst = int(error.argmax())
    assert not got.isnan().any()
    assert error.max() <= 0, f"element {worst}: {got.flatten()[worst]} for {exact.flatten()[worst]}"


# Activations in fragment order, appendix A of the design. mb: 64 rows, mt: 16 rows, h: 8 rows, g: a row; kb: 64 columns,
# kh: half of them, t: 8 columns, i: one. low: rt: 16 columns, rh: half of them, j: one of two.

def pack_qact(codes):
    """[M, K] -> words [M/64][K/64][4][32][4]"""
    m, k = codes.shape
    axes = codes.numpy().astype(np.uint32).reshape(m // 64, 4, 2, 8, k // 64, 2, 4, 8) & 15
    words = (axes << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)        # mb mt h g kb kh t
    return np.ascontiguousarray(words.transpose(0, 4, 1, 3, 6, 5, 2)).reshape(-1)


def unpack_qact(words, m, k, unsigned):
    nibbles = words.reshape(m // 64, k // 64, 4, 8, 4, 2, 2)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    codes = torch.from_numpy(nibbles.astype(np.uint8)).permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(m, k)
    return codes if unsigned else layout.signed(codes)


def pack_ascales(scales):
    """[M, G] -> [M/64][G][4][8][2]"""
    m, groups = scales.shape
    return array(scales.float().view(m // 64, 4, 2, 8, groups).permute(0, 4, 1, 3, 2))


def unpack_ascales(scales, m, groups):
    return torch.from_numpy(scales).view(m // 64, groups, 4, 8, 2).permute(0, 2, 4, 3, 1).reshape(m, groups)


def pack_low(low):
    """[M, R] -> [M/16][R/16][32][4] words of two"""
    m, r = low.shape
    return array(low.view(m // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6))


def unpack_low(bits, m, r, dtype):
    return torch.from_numpy(bits).view(dtype).view(m // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(m, r)


@pytest.mark.parametrize("m, n, k, rank, bias, accumulate, order", [
    (77, 128, 320, 32, True, False, "forward"),         # more groups than stages, rows that end in the second half
    (130, 256, 64, 16, False, True, "reverse"),         # four CTAs, one group, the second row of tiles nearly empty
    (128, 128, 128, 0, True, False, 1)])
@pytest.mark.parametrize("kind", ["s4", "u4"])
@pytest.mark.parametrize("dtype", TYPES)
def test_gemm_w4a4(dtype, kind, m, n, k, rank, bias, accumulate, order):
    T, make = TYPES[dtype], random(m)
    rows, groups = -(-m // 64) * 64, k // 64
    low_code, top = (0, 16) if kind == "u4" else (-8, 8)
    qact = torch.randint(low_code, top, (rows, k), generator=make, dtype=torch.int8)
    codes = torch.randint(-8, 8, (n, k), generator=make, dtype=torch.int8)
    ascales = (torch.rand(rows, groups, generator=make) + 0.25).to(T).float()
    wscales = (torch.randn(n, groups, generator=make) / 16).to(T)
    low, up = (torch.randn(size, rank, generator=make).to(T) for size in (rows, n))
    offset = torch.randn(n, generator=make).to(T) if bias else None
    old = torch.randn(m, n + 8, generator=make).to(T)            # rows of out lie 8 elements further apart
    out = array(old.clone())
    module("gemm_w4a4").launch(
        f"gemm_w4a4_{dtype}_{kind}", (n // 128, -(-m // 128)), 128, 0,
        [pack_qact(qact), pack_ascales(ascales), constant(layout.pack_codes(codes)), constant(layout.pack_scales(wscales)),
         pack_low(low), constant(layout.pack_up(up)) if rank else 0, 0 if offset is None else constant(offset), out,
         m, n, k, rank, n + 8, int(accumulate)], order)
    got = torch.from_numpy(out).view(T)
    assert torch.equal(got[:, n:], old[:, n:])

    products = torch.einsum("mgk,ngk->mng", qact[:m].double().view(m, groups, 64), codes.double().view(n, groups, 64))
    exact = torch.einsum("mng,mg,ng->mn", products, ascales[:m].double(), wscales.double())
    exact += low[:m].double() @ up.double().T
    if bias:
        exact += offset.double()
    if accumulate:                                               # rounds twice: the product, then the sum
        exact = exact.to(T).double() + old[:, :n].double()
    assert_rounded(got[:, :n], exact, slack=torch.finfo(T).eps / 2 if accumulate else 1e-6)
    spec = reference.gemm_w4a4(qact[:m].float(), ascales[:m], codes, wscales, low[:m], up, offset, precision="int4")
    assert accumulate or (exact - spec).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype, kind, largest, m, k, rank, order", [
    (dtype, kind, largest, m, k, rank, order)
    for (largest, m, k, rank, order) in [(32, 21, 640, 32, "forward"), (128, 64, 128, 48, 2)]      # more groups than warps; fewer
    for kind in ("s4", "u4") for dtype in TYPES])
def test_quant_down(dtype, kind, largest, m, k, rank, order):
    T, make = TYPES[dtype], random(k)
    unsigned = kind == "u4"
    wide = (torch.randn(m, k + 8, generator=make) * 3).to(T)     # x is a part of a wider tensor
    if unsigned:
        wide = reference.gelu_tanh(wide).to(T)
    wide[3, 64:128] = 0 if not unsigned else -reference.SHIFT    # a group of nothing
    x, smooth = wide[:, :k], (torch.rand(k, generator=make) + 0.5).to(T)
    down = (torch.randn(k, rank, generator=make) / 8).to(T)
    got = quant_down(f"quant_down_{dtype}_{kind}_r{largest}", wide, x, smooth, down, unsigned, order)
    codes, scales, low = got
    want_codes, want_scales, _ = reference.quant_down(x, smooth, down, precision="int4", unsigned=unsigned)
    assert torch.equal(codes[:m], want_codes)                    # divisions are exact here: no excuse for a tie
    assert torch.equal(scales[:m], want_scales.float())
    assert_rounded(low[:m], x.double() @ down.double())
    assert not codes[m:].any() and not scales[m:].any() and not low[m:].any()


def quant_down(kernel, wide, x, smooth, down, unsigned, order="forward"):
    """-> codes, scales, low of all rows, also those past M"""
    (m, k), rank = x.shape, down.shape[1]
    rows = -(-m // 64) * 64
    qact, low = (np.full(size, 0x7E7E7E7E, np.uint32) for size in (rows * k // 8, rows * rank // 2))
    ascales = np.full(rows * k // 64, np.nan, np.float32)
    module("quant_down").launch(kernel, rows // 16, 256, 0,
                                [constant(wide), constant(layout.pack_vector(padded(smooth))[:k].clone()),
                                 constant(layout.pack_down(down)), qact, ascales, low, m, k, rank, wide.shape[1]], order)
    return (unpack_qact(qact, rows, k, unsigned), unpack_ascales(ascales, rows, k // 64),
            unpack_low(low.view(np.int16), rows, rank, x.dtype))


def padded(vector):
    return layout.pad(vector, 128, fill=1)


def test_quant_down_of_nan_and_infinity():
    """The scale tells; codes are 0."""
    T = torch.bfloat16
    x = torch.randn(16, 128, generator=random(5)).to(T)
    x[2, 70], x[5, 3], x[9, 127] = float("nan"), float("inf"), -float("inf")
    smooth, down = torch.ones(128, dtype=T), torch.randn(128, 16, generator=random(6)).to(T)
    codes, scales, _ = quant_down("quant_down_bf16_s4_r32", x, x, smooth, down, False)
    want_codes, want_scales, _ = reference.quant_down(x, smooth, down, precision="int4")
    assert torch.equal(codes[:16], want_codes)
    assert torch.equal(scales[:16].nan_to_num(nan=-1), want_scales.float().nan_to_num(nan=-1))


@pytest.mark.parametrize("dtype, largest, batch, order", [("bf16", 1, 1, "forward"), ("fp16", 1, 1, "reverse"),
                                                          ("bf16", 8, 3, 3), ("fp16", 8, 8, "forward")])
def test_awq_gemv(dtype, largest, batch, order):
    T, k, make = TYPES[dtype], 1216, random(batch)               # 19 groups: more than one chunk of x, and a rest
    x = torch.randn(batch, k, generator=make).to(T)
    layers = []
    for n, with_bias in ((64, True), (36, False)):
        codes = torch.randint(0, 16, (n, k), generator=make, dtype=torch.uint8)
        scales, zeros, bias = ((torch.randn(size, generator=make) / 8).to(T) for size in ((k // 64, n), (k // 64, n), (n,)))
        layers.append((codes, scales, zeros, bias if with_bias else None))
    outs = awq_gemv(f"awq_gemv_{dtype}_b{largest}", x, [(layout.pack_awq(codes), *rest) for codes, *rest in layers], order)
    for (codes, scales, zeros, bias), out in zip(layers, outs, strict=True):
        weight = codes.double() * scales.double().T.repeat_interleave(64, 1) + zeros.double().T.repeat_interleave(64, 1)
        exact = x.double() @ weight.T + (0 if bias is None else bias.double())
        assert_rounded(out, exact)


def awq_gemv(kernel, x, layers, order="forward"):
    """layers: (qweight, wscales, wzeros, bias) as stored"""
    batch, columns = x.shape
    outs = [np.full((batch, scales.shape[1]), 0x7E7E, np.int16) for _, scales, _, _ in layers]
    items = []
    for (*tensors, bias), out in zip(layers, outs, strict=True):
        items += [*map(constant, tensors), 0 if bias is None else constant(bias), out, out.shape[1]]
    widest = max(out.shape[1] for out in outs)
    module("awq_gemv").launch(kernel, (-(-widest // 32), len(layers)), 256, 0, [constant(x), items, batch, columns], order)
    return [torch.from_numpy(out).view(x.dtype) for out in outs]


# Saturation, by the checks of test_emulated.py

def test_gemm_w4a4_saturates_in_fp16():
    def gemm(layer, quantised, out, accumulate):
        (qact, ascales, low), packed, (m, n) = quantised, layer.packed, out.shape
        result = array(out)
        module("gemm_w4a4").launch(
            f"gemm_w4a4_{layer.name}", (n // 128, -(-m // 128)), 128, 0,
            [*map(constant, (qact, ascales, packed["qweight"], packed["wscales"], low, packed["proj_up"], packed["bias"])),
             result, m, n, layer.K, layer.R, n, int(accumulate)])
        return torch.from_numpy(result).view(out.dtype)
    emulated.check_saturation_of_gemm(gemm)


def test_low_saturates_in_fp16():
    def low(layer, x):
        return quant_down("quant_down_fp16_s4_r32", x, x, layer.smooth, layer.proj_down, False)[2]
    emulated.check_saturation_of_low(emulated.Layer(16, torch.float16, False, rows=128, columns=128), low)


def test_awq_gemv_saturates_in_fp16():
    emulated.check_saturation_of_awq(lambda x, layers: awq_gemv("awq_gemv_fp16_b8", x, layers))


# A kernel's file with one barrier taken out must not pass: neither kernel has one too many, nor is the interpreter blind.

ONE_CASE = {
    "gemm_w4a4": lambda: test_gemm_w4a4("bf16", "s4", 77, 128, 640, 32, True, False, "forward"),
    "quant_down": lambda: test_quant_down("bf16", "s4", 32, 21, 640, 32, "forward"),
    "awq_gemv": lambda: test_awq_gemv("bf16", 1, 1, "forward"),
}


@pytest.mark.parametrize("kernel", ONE_CASE)
def test_every_barrier_is_needed(kernel, monkeypatch):
    source = (toolchain.KERNELS / f"{kernel}.cuh").read_text()
    barriers = list(re.finditer(r"px::barrier\(\);", source))
    assert barriers
    for barrier in barriers:
        text = source[:barrier.start()] + ";" + source[barrier.end():]
        without = Module(toolchain.ptx(text))
        monkeypatch.setitem(globals(), "module", lambda name, without=without: without)
        with pytest.raises(Fault, match="races|never written"):
            ONE_CASE[kernel]()
