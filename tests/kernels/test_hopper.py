"""The Hopper kernels, run by the CPU emulator: results against float64 and reference.py, conduct by the emulator's checks.

Also what goes with them: the repack, the torch operators, the dispatch. What ptxas made of them: test_hopper_budgets.py.
"""

import ctypes
import itertools
import re
import shutil
import types
from dataclasses import replace

import pytest
import torch
from svdq_pack.kernels import build as kernels
from svdq_pack.kernels import check, epilogues, layout, ops, reference, registry, weights
from svdq_pack.kernels import launch as launching
from svdq_pack.kernels.errors import ShapeError
from svdq_pack.kernels.variant import FLOATS, HALVES, Target
from svdq_pack.kernels.variants import w4a8_sm90
from svdq_pack.kernels.variants.w4a8_sm90 import FP8Weight, gemm_fp8, quant_fp8, quant_fp8_outputs
from svdq_pack.tests.kernels import test_emulated as emulated
from svdq_pack.tests.kernels.emulator import build
from svdq_pack.tests.kernels.emulator import launcher
from svdq_pack.tests.kernels.emulator.build import InOut, KernelFault
from svdq_pack.tests.kernels.test_emulated import DTYPES, KINDS, RANKS, assert_rounded, one_thread, spread_rows  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
TOKENS = [1, 15, 16, 17, 63, 127, 128, 129, 257]
MODES = pytest.mark.parametrize("mode", ["token", "group"])
UNSIGNED = pytest.mark.parametrize("unsigned", [False, True], ids=["s", "u"])
W4A8, W4A4 = w4a8_sm90.VARIANTS
N, K = 384, 768                             # a tile and a half; a step more than a ring of stages


class Layer(emulated.Layer):
    """A random layer, logical, packed and repacked. `wide`: with codes -8."""

    def __init__(self, rank=32, dtype=torch.bfloat16, unsigned=False, rows=N, columns=K, wide=False):
        super().__init__(rank, dtype, unsigned, rows, columns)
        if not wide:
            self.codes[self.codes == 8] = 9
            self.packed["qweight"] = layout.pack_codes(self.codes)
        self.fp8 = FP8Weight.pack(self.weight)
        assert self.fp8.wide == wide

    @property
    def weight(self):
        packed, branch = self.packed, self.R > 0
        return weights.W4A4Weight("int4", self.unsigned, packed["qweight"], packed["wscales"], packed["smooth"],
                              packed["proj_down"] if branch else None, packed["proj_up"] if branch else None)


# The layouts quant_fp8 writes and gemm_fp8 reads

def unpack_qact(qact):
    """Granules [M/16][K/128][16][128] with swizzled chunks -> values [M, K] fp32."""
    granule, step = qact.shape[:2]
    row, chunk = torch.arange(16)[:, None], torch.arange(8)
    chunks = qact.view(granule, step, 16, 8, 16)[:, :, row, chunk ^ row & 7]
    return chunks.permute(0, 2, 1, 3, 4).reshape(granule * 16, step * 128).view(torch.float8_e4m3fn).float()


def unpack_ascales(ascales):
    """[M/16][t][h j] -> [M], [M/16][K/128][2][t][h j] -> [M, K/64]: row 8h + 2t + j."""
    rows = ascales.view(*ascales.shape[:-1], 2, 2).transpose(-3, -2).flatten(-3)
    return rows.flatten() if rows.ndim == 2 else rows.permute(0, 3, 1, 2).reshape(rows.shape[0] * 16, -1)


def unpack_low(low):
    """[M/16][h][R/8][row][8] -> [M, R]."""
    return low.permute(0, 1, 3, 2, 4).reshape(low.shape[0] * 16, low.shape[2] * 8)


def quant(layer, x, mode, *, order="forward", ldx=None, source=None):
    tokens, k = x.shape[0], layer.K
    qact, ascales, low = quant_fp8_outputs(x, layer.R, mode == "group")
    kernel = f"quant_fp8_{KINDS[x.dtype]}_{mode}_{'u' if layer.unsigned else 's'}_r{32 if layer.R <= 32 else 128}"
    module = build.load(source or build.KERNELS / "quant_fp8.cuh")
    module.launch(kernel, qact.shape[0], 256, 0,
                  [spread_rows(x, ldx) if ldx else x, layer.fp8.inverse, layer.fp8.proj_down, qact, ascales,
                   low, tokens, k, layer.R, ldx or k], order=order)
    return qact, ascales, low


def operands_of(epilogue):
    return {} if epilogue is None else {"epilogue": type(epilogue).__name__.lower(), **vars(epilogue)}


def last_arguments(epilogue):
    """Those of gemm_fp8 after `accumulate`."""
    given = operands_of(epilogue)
    residual, kind = given.get("residual"), list(w4a8_sm90.EPILOGUES).index(given.get("epilogue", "store"))
    rows = [None, 0] if residual is None else [launcher.flat(residual), residual.stride(0)]
    return [kind, *rows, *(given.get(name) for name in ("gate", "query", "key", "rotation")), given.get("eps", 0.0)]


def gemm(layer, quantised, out, *, bias=True, accumulate=False, ctas=2, cluster=1, order="forward", source=None, fp8_bits=0,
         epilogue=None):
    (qact, ascales, low), fp8 = quantised, layer.fp8
    mode, width = "group" if ascales.ndim == 5 else "token", "w8" if fp8.wide else "w4"
    module = build.load(source or build.KERNELS / "gemm_fp8.cuh")
    module.launch(f"gemm_fp8_{KINDS[out.dtype]}_{mode}_{width}_c{cluster}", ctas, 384, w4a8_sm90.STAGED[fp8.qweight.shape[2]],
                  [qact, ascales, fp8.qweight, fp8.wscales, low, fp8.proj_up,
                   layer.packed["bias"] if bias else None, InOut(out) if accumulate else out, out.shape[0], layer.N, layer.K,
                   layer.R, out.shape[1], int(accumulate), *last_arguments(epilogue)], order=order, cluster=cluster,
                  fp8_bits=fp8_bits)
    return out


def exact(layer, quantised, bias=True):
    """What gemm_fp8 computes from these operands, in float64, and the sum of absolute terms."""
    qact, ascales, low = quantised
    scales = unpack_ascales(ascales).double()
    act = unpack_qact(qact).double() * (scales[:, None] if scales.ndim == 1 else scales.repeat_interleave(64, 1))
    weight = layout.signed(layer.codes).double() * layer.wscales.double().repeat_interleave(64, 1)
    low, up = unpack_low(low).double(), layer.proj_up.double()
    out, size = act @ weight.T + low @ up.T, act.abs() @ weight.abs().T + low.abs() @ up.abs().T
    return (out + layer.bias.double(), size + layer.bias.double().abs()) if bias else (out, size)


def check_quant(layer, x, mode, quantised):
    """Codes and scales of reference.quant_down with smooth as its reciprocal, to the bit; rows past M are zero."""
    tokens = x.shape[0]
    codes, scales, low = unpack_qact(quantised[0]), unpack_ascales(quantised[1]), unpack_low(quantised[2])
    v = x.float() + (reference.SHIFT if layer.unsigned else 0)
    inverse = 1 / layer.smooth.float()
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
    spec_codes, spec_scales, _ = reference.quant_down(x, layer.smooth, layer.proj_down, unsigned=layer.unsigned,
                                                      precision="e4m3" if mode == "token" else "int4")
    off = (codes[:tokens] - spec_codes.float()).abs()           # by a step, where the reciprocal tips a tie
    assert (off > 0).sum() <= 1e-3 * off.numel() + 1
    assert (off <= (spec_codes.float().abs() / 8).clamp(min=2**-9) if mode == "token" else off <= 1).all()
    torch.testing.assert_close(scales[:tokens], spec_scales.float(), rtol=1e-6 if mode == "token" else 2**-8, atol=0)
    for values in (codes, scales, low):
        assert not values[tokens:].any()
    down = layer.proj_down.double()
    assert_rounded(low[:tokens], x.double() @ down, x.double().abs() @ down.abs(), "low")


def check_linear(layer, tokens, mode, *, cluster=1, ctas=2, quant_source=None, gemm_source=None):
    x = layer.x(tokens)
    quantised = quant(layer, x, mode, order=tokens, source=quant_source)
    check_quant(layer, x, mode, quantised)
    out = gemm(layer, quantised, torch.zeros(tokens, layer.N, dtype=layer.dtype), order=tokens, cluster=cluster, ctas=ctas,
               source=gemm_source)
    want, size = exact(layer, quantised)
    assert_rounded(out, want[:tokens], size[:tokens], "out")


# Both kernels, every shape

@needs_gxx
@MODES
@UNSIGNED
@DTYPES
@pytest.mark.parametrize("rank, tokens", [(RANKS[i % 4], tokens) for i, tokens in enumerate(TOKENS)] + [
    (rank, 17) for rank in RANKS[:3]])
def test_linear(tokens, rank, dtype, unsigned, mode):
    """Clusters of one and of two in turn."""
    check_linear(Layer(rank, dtype, unsigned), tokens, mode, cluster=1 + (tokens + rank // 16) % 2)


@needs_gxx
@MODES
@DTYPES
@pytest.mark.parametrize("cluster", [1, 2])
def test_bytes(cluster, dtype, mode):
    """A layer with codes -8, which no nibble of sign and magnitude holds."""
    check_linear(Layer(16, dtype, rows=256, wide=True), 130, mode, cluster=cluster, ctas=4)


@needs_gxx
@MODES
@pytest.mark.parametrize("columns", [128, 640, 1280])
def test_depth(columns, mode):
    """Fewer steps than stages, as many, twice as many."""
    check_linear(Layer(48, rows=128, columns=columns), 20, mode)


@needs_gxx
@pytest.mark.parametrize("rows, columns, unsigned, mode", [
    (9216, 3072, False, "token"), (3072, 12288, True, "token"), (12288, 3072, False, "group"), (3072, 12288, True, "group")],
    ids=["qkv", "fc2", "fc1", "fc2 w4a4"])
def test_flux_layers(rows, columns, unsigned, mode):
    """Layers of FLUX.1 at their depth: whole ones."""
    check_linear(Layer(32, torch.bfloat16, unsigned, rows, columns), 17, mode, cluster=2, ctas=4)


@needs_gxx
@UNSIGNED
def test_against_the_layer_itself(unsigned):
    """Both modes against exact activations: 8 bits must be better than 4, and both near."""
    layer, tokens = Layer(32, torch.bfloat16, unsigned, rows=256, columns=1280), 40
    x = layer.x(tokens)
    want = reference.linear_weight_only(x, replace(layer.weight.logical(), bias=layer.bias)).double()
    errors = {}
    for mode in ("token", "group"):
        out = gemm(layer, quant(layer, x, mode), torch.zeros(tokens, layer.N, dtype=x.dtype)).double()
        errors[mode] = ((out - want).norm() / want.norm()).item()
    assert errors["token"] < 0.04 < 0.05 < errors["group"] < 0.2, errors


@needs_gxx
@pytest.mark.parametrize("name", ["r32", "nobias_r16", "padded_n192_k192_r20", "unsigned_fc2_r16", "smooth_fused_r16"])
def test_golden_linear(golden, name):
    """Tensors as in a checkpoint, in the bit-faithful mode."""
    tensors = golden(f"linear_int4_{name}")
    layer = emulated.read_layer(tensors, unsigned="unsigned" in name)
    x = layout.pad(tensors["io.x"], 1, 128 * -(-layer.K // 128))
    layer.fp8 = FP8Weight.pack(Layer.weight.fget(layer))
    tokens = x.shape[0]
    quantised = quant(layer, x, "group")
    live = (tensors["io.ascales"] != 0).repeat_interleave(64, 1)
    off = (unpack_qact(quantised[0])[:tokens] - tensors["io.q_act"].float()).abs()[live]
    assert (off > 0).sum() <= 1e-3 * off.numel() + 1 and off.max() <= 1
    want = tensors["io.y_act_quant"].double()
    out = gemm(layer, quantised, torch.zeros(tokens, layer.N, dtype=layer.dtype))[:, :want.shape[1]].double()
    assert (out - want).norm() <= 6e-3 * want.norm()                            # bf16 output, and a code here and there


# Options

@needs_gxx
@MODES
def test_row_strides(mode):
    """x and out as columns of wider tensors; what lies between stays."""
    layer, tokens = Layer(16), 65
    x = layer.x(tokens)
    plain, strided = quant(layer, x, mode), quant(layer, x, mode, ldx=K + 8)
    assert all(map(torch.equal, plain, strided))
    out = gemm(layer, plain, torch.full((tokens, N + 8), 9.0, dtype=x.dtype))
    assert torch.equal(out[:, :N], gemm(layer, plain, torch.zeros(tokens, N, dtype=x.dtype)))
    assert (out[:, N:] == 9).all()


@needs_gxx
@DTYPES
@MODES
def test_bias_and_accumulate(mode, dtype):
    layer, tokens = Layer(16, dtype), 17
    quantised = quant(layer, layer.x(tokens), mode)
    want, size = exact(layer, quantised, bias=False)
    out = gemm(layer, quantised, torch.zeros(tokens, N, dtype=dtype), bias=False)
    assert_rounded(out, want[:tokens], size[:tokens], "without bias")
    before = torch.randn(tokens, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    total = gemm(layer, quantised, before.clone(), bias=False, accumulate=True)
    assert torch.equal(total, (before.float() + out.float()).to(dtype))


@needs_gxx
@MODES
@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_token(value, dtype, mode):
    """A NaN or Inf makes its own token NaN, as in reference.py, and no other."""
    layer, tokens = Layer(16, dtype, rows=128), 20
    x = layer.x(tokens)
    clean = gemm(layer, quant(layer, x, mode), torch.zeros(tokens, 128, dtype=dtype))
    x[5, 77] = value
    quantised = quant(layer, x, mode)
    codes = unpack_qact(quantised[0])[5]
    assert not (codes if mode == "token" else codes[64:128]).any()
    out = gemm(layer, quantised, torch.zeros(tokens, 128, dtype=dtype))
    assert out[5].isnan().all()
    others = torch.arange(tokens) != 5
    assert torch.equal(out[others], clean[others])


@needs_gxx
@MODES
@pytest.mark.parametrize("unsigned, fill", [(False, 0.0), (True, -reference.SHIFT)])
def test_token_of_nothing(unsigned, fill, mode):
    """No largest value to divide by: the low-rank part and the bias remain."""
    layer = Layer(16, unsigned=unsigned, rows=128)
    x = layer.x(3)
    x[1] = fill
    quantised = quant(layer, x, mode)
    assert not unpack_qact(quantised[0])[1].any() and not unpack_ascales(quantised[1])[1].any()
    out = gemm(layer, quantised, torch.zeros(3, 128, dtype=x.dtype))
    want = unpack_low(quantised[2])[1].double() @ layer.proj_up.double().T + layer.bias.double()
    torch.testing.assert_close(out[1].double(), want, rtol=2**-8, atol=1e-6)


@needs_gxx
@MODES
def test_order_and_grid_change_nothing(mode):
    """Any order of threads, CTAs and landing copies; any number of CTAs; alone or in pairs."""
    layer, tokens = Layer(32), 130
    x = layer.x(tokens)
    first, results = None, []
    for order in ["forward", "reverse", 1, 2]:
        quantised = quant(layer, x, mode, order=order)
        first = first or quantised
        assert all(map(torch.equal, quantised, first))
        for ctas, cluster in ((1, 1), (4, 1), (2, 2), (4, 2)) if order == 1 else ((2, 1), (2, 2)):
            out = torch.zeros(tokens, N, dtype=x.dtype)
            results.append(gemm(layer, first, out, order=order, ctas=ctas, cluster=cluster))
    assert all(torch.equal(result, results[0]) for result in results)


# Epilogues

EPILOGUES = pytest.mark.parametrize("kind", ["gated", "gated +=", "gelu", "qkv"])


def epilogue_of(kind, tokens, n, dtype):
    """Operands of the order of what they meet: rows of a residual apart, an eps that shows, rotations of any kind."""
    random = torch.Generator().manual_seed(n + tokens)

    def normal(*shape, scale=1.0, offset=0.0):
        return torch.randn(*shape, generator=random) * scale + offset

    if kind == "gelu":
        return epilogues.Gelu()
    if kind == "qkv":
        query, key = normal(2, 128, scale=0.3, offset=1).to(dtype)
        return epilogues.QKV(query, key, normal(tokens, 64, 2, 2), eps=0.5)
    return epilogues.Gated(normal(tokens, n + 2, scale=20).to(dtype)[:, :n], normal(n).to(dtype))


def finished(epilogue, y, size, before=None):
    """The epilogue of float64 y, and the sum of absolute terms: by how much an fp32 rounding of each can move the result."""
    if before is not None:
        y, size = y + before.double(), size + before.double().abs()
    if isinstance(epilogue, epilogues.Gelu):
        return torch.nn.functional.gelu(y, approximate="tanh"), 1.2 * size
    if isinstance(epilogue, epilogues.Gated):
        residual, gate = epilogue.residual.double(), epilogue.gate.double()
        return residual + gate * y, residual.abs() + gate.abs() * size
    heads, sizes = (part.view(len(y), 3, -1, 64, 2) for part in (y, size))
    squares = heads.square().mean((-2, -1), keepdim=True)
    norm = (squares + epilogue.eps).rsqrt()
    off = (sizes * heads.abs()).mean((-2, -1), keepdim=True) / squares + 1              # of the norm, relative
    weight, turn = torch.stack((epilogue.query, epilogue.key)).double().view(2, 1, 64, 2), epilogue.rotation.double()
    z = (heads * norm)[:, :2] * weight
    z_size = ((sizes + heads.abs() * off) * norm)[:, :2] * weight.abs()
    out, out_size = heads.clone(), sizes.clone()
    out[:, :2] = torch.einsum("mirc,mghic->mghir", turn, z)
    out_size[:, :2] = torch.einsum("mirc,mghic->mghir", turn.abs(), z_size)
    return out.view(y.shape), out_size.view(y.shape)


def check_epilogue(layer, tokens, mode, kind, source=None, **how):
    quantised = quant(layer, layer.x(tokens), mode)
    epilogue = epilogue_of(kind, tokens, layer.N, layer.dtype)
    before, out = None, torch.zeros(tokens, layer.N, dtype=layer.dtype)
    if kind.endswith("+="):
        before = out.normal_(generator=torch.Generator().manual_seed(9)).clone()
    gemm(layer, quantised, out, accumulate=before is not None, source=source, epilogue=epilogue, **how)
    y, size = exact(layer, quantised)
    want, size = finished(epilogue, y[:tokens], size[:tokens], before)
    assert_rounded(out, want, size, kind)
    return quantised, out


@needs_gxx
@MODES
@DTYPES
@EPILOGUES
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tokens", [1, 15, 17, 129])
def test_epilogue(tokens, cluster, kind, dtype, mode):
    """Heads of q and k in one tile, v and nothing in the other; and with two heads each."""
    check_epilogue(Layer(16, dtype, rows=768 if tokens == 17 else 384, columns=256), tokens, mode, kind, cluster=cluster,
                   order=tokens)


@needs_gxx
@EPILOGUES
@MODES
def test_epilogue_of_bytes(mode, kind):
    """Stages of another size, fewer of them than rotations need; no branch, so no stage for it in the group mode."""
    check_epilogue(Layer(0, rows=768, columns=128, wide=True), 145, mode, kind, cluster=2, ctas=4)


@needs_gxx
@EPILOGUES
def test_order_and_grid_change_no_epilogue(kind):
    layer, results = Layer(16, rows=768, columns=256), []
    for order, ctas, cluster in (("forward", 1, 1), ("reverse", 4, 1), (1, 2, 2), (2, 4, 2)):
        results.append(check_epilogue(layer, 145, "token", kind, order=order, ctas=ctas, cluster=cluster)[1])
    assert all(torch.equal(result, results[0]) for result in results)


@needs_gxx
def test_store_is_what_it_was():
    """The product as stored is what an epilogue of nothing gives: residual 0, gate 1."""
    layer = Layer(16, columns=256)
    quantised = quant(layer, layer.x(20), "token")
    plain, gated = torch.zeros(20, N, dtype=layer.dtype), torch.zeros(20, N, dtype=layer.dtype)
    gemm(layer, quantised, plain)
    gemm(layer, quantised, gated, epilogue=epilogues.Gated(torch.zeros_like(plain), torch.ones(N, dtype=layer.dtype)))
    assert torch.equal(plain, gated)


@needs_gxx
@pytest.mark.parametrize("kind", ["gated", "gated +=", "qkv"])
def test_fp16_ends_at_its_largest_number(kind):
    layer = Layer(0, torch.float16, columns=128)
    layer.packed["bias"].fill_(60000.0)
    epilogue = epilogue_of(kind, 3, N, torch.float16)
    much = {"rotation": torch.full((3, 64, 2, 2), -1e6)} if kind == "qkv" else {"gate": torch.full((N,), -100.0).half()}
    out = gemm(layer, quant(layer, layer.x(3), "token"), torch.zeros(3, N, dtype=torch.float16), accumulate="+=" in kind,
               epilogue=replace(epilogue, **much))
    assert (out[:, :256] == -65504).all() and ((out[:, 256:] > 50000).all() if kind == "qkv" else (out == -65504).all())


def check_saturation_of_low(mode, quant=quant, **source):
    layer = Layer(16, torch.float16, rows=128, columns=128)
    emulated.check_saturation_of_low(layer, lambda layer, x: unpack_low(quant(layer, x, mode, **source)[2]))


@needs_gxx
@MODES
def test_low_saturates_in_fp16(mode):
    check_saturation_of_low(mode)


@needs_gxx
@pytest.mark.parametrize("file, words, index", emulated.cases("quant_fp8.cuh", emulated.CLAMP))
def test_every_clamp_of_low_is_needed(file, words, index):
    with pytest.raises(AssertionError, match="beyond fp16: -?inf"):
        check_saturation_of_low("token", source=emulated.unclamped(file, "quant_fp8_fp16_token_s_r32", index))


# What Hopper's FP8 units are said to do to a sum: keep 13 bits below its largest term

@needs_gxx
@pytest.mark.parametrize("kind", ["all 15 x 7", "all 15 x -8", "alternating", "random", "one large"])
def test_integers_survive_short_sums(kind):
    """GROUP: every sum of a group is exact, so the output is the one of full sums, to the bit."""
    layer, tokens = Layer(0, torch.bfloat16, True, rows=128, columns=256, wide=True), 16
    random = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (128, 256), generator=random)
    act = torch.randint(0, 16, (tokens, 256), generator=random)
    if kind.startswith("all"):
        codes[:], act[:] = int(kind.split()[-1]), 15
    if kind == "alternating":
        codes[:], act[:] = 7 - 14 * (torch.arange(256) % 2), 15
        codes[:, ::64] = 1
    if kind == "one large":
        codes[:], act[:] = 1, 1
        codes[:, ::64], act[:, ::64] = 7, 15
    layer.codes = (codes & 15).to(torch.uint8)
    layer.packed["qweight"] = layout.pack_codes(layer.codes)
    layer.fp8 = FP8Weight.pack(layer.weight)
    x = act.float()
    qact = x.to(torch.float8_e4m3fn).view(torch.uint8).view(1, 16, 2, 8, 16).permute(0, 2, 1, 3, 4)
    row, chunk = torch.arange(16)[:, None], torch.arange(8)
    quantised = (qact[:, :, row, chunk ^ row & 7].reshape(1, 2, 16, 128).contiguous(),
                 torch.rand(1, 2, 2, 4, 4, generator=random), torch.zeros(1, 2, 0, 8, 8, dtype=torch.bfloat16))
    assert torch.equal(unpack_qact(quantised[0]), x)
    full, short = (gemm(layer, quantised, torch.zeros(tokens, 128, dtype=torch.bfloat16), fp8_bits=bits) for bits in (0, 13))
    assert torch.equal(full, short)
    want, size = exact(layer, quantised)
    assert_rounded(short, want, size, "out")


@needs_gxx
def test_short_sums_of_eight_bit_activations(monkeypatch):
    """TOKEN: what is cut off stays far below what e4m3 has already rounded away."""
    layer, tokens = Layer(0, rows=128, columns=1280), 16
    quantised = quant(layer, layer.x(tokens), "token")
    out = gemm(layer, quantised, torch.zeros(tokens, 128, dtype=layer.dtype), fp8_bits=13)
    want, size = exact(layer, quantised)
    monkeypatch.setattr(emulated, "FP32", 1e-4)
    assert_rounded(out, want, size, "out")
    full = gemm(layer, quantised, torch.zeros(tokens, 128, dtype=layer.dtype))
    assert not torch.equal(out, full)                           # so the rule was in force


# Every barrier, wait and fence is needed: the emulator must see it gone

def first_shells(file, words=None, index=0, mode="token"):
    """The file without its index-th `words`, and with its shells of bf16, `mode` and nibbles only, which compiles faster."""
    text = (build.KERNELS / file).read_text()
    if words:
        parts = text.split(words)
        text = words.join(parts[:index + 1]) + ";" + words.join(parts[index + 1:])
    macro = file.removesuffix(".cuh").upper()
    return re.sub(rf"^{macro}\((?!\w*bf16_{mode}_(?:w4|s_r32)).*\n", "", text, flags=re.M)


def cases(file, *words):
    text = (build.KERNELS / file).read_text()
    assert all(each in text for each in words)
    return [(file, each, i) for each in words for i in range(text.count(each))]


NEEDED = [*cases("quant_fp8.cuh", "px::barrier();"),
          *cases("gemm_fp8.cuh", "px::wgmma_fence();", "px::wgmma_commit();", "px::warp_barrier();",
                 "px::wgmma_wait(sum, a[0], a[1]);", "px::mbarrier_wait(&shared.full[at.stage], at.parity);",
                 "px::mbarrier_fence();", "px::cluster_barrier();",
                 "px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);",
                 "px::mbarrier_arrive(&shared.empty[from.stage]);",
                 "px::mbarrier_arrive_at(&shared.empty[from.stage], lane);",
                 "px::barrier_of(1 + group_of_warps, 128);", "release(at);", "release(turning);",
                 "px::mbarrier_wait(&shared.full[turning.stage], turning.parity);",
                 "px::wgmma_wait(acc[0], now[0], now[1]);\n                px::wgmma_wait(acc[1], now[0], now[1]);")]


@needs_gxx
@pytest.mark.parametrize("file, words, index", NEEDED)
def test_nothing_to_spare(file, words, index):
    mode = "group" if "warp_barrier" in words else "token"     # which reads a stage after its last wgmma
    source = first_shells(file, words, index, mode)
    layer, tokens = Layer(32), 145 if "turning" in words else 20    # with a tile after the first
    x = layer.x(tokens)
    with pytest.raises(KernelFault, match="race|nobody has written|has not landed|stuck|without a wgmma_fence|not commit|on its "
                                          "way|has shown to the copy engine|no mbarrier|has ended|divergent|too often"):
        if file == "quant_fp8.cuh":
            quant(layer, x, mode, source=source)
        else:
            quantised = quant(layer, x, mode)
            for epilogue in ("gelu", "qkv"):        # by both ways to memory
                for cluster, order in ((1, "forward"), (2, "forward"), (2, "reverse"), (2, 1)):
                    gemm(layer, quantised, torch.zeros(tokens, N, dtype=x.dtype), cluster=cluster, order=order,
                         source=source, epilogue=epilogue_of(epilogue, tokens, N, x.dtype))


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
    "a warp's share forgotten": ("quant_fp8.cuh", "for (int w = 0; w < WARPS; w++)\n                    for",
                                 "for (int w = 1; w < WARPS; w++)\n                    for"),
    "low rank in the order of rows": ("quant_fp8.cuh", "2 * r + n8) * 8 + of / 4;", "2 * r) * 8 + of / 4;"),
}


@needs_gxx
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug):
    file, right, wrong = PLANTED[bug]
    text = first_shells(file)
    assert right in text
    with pytest.raises((AssertionError, KernelFault)):
        check_linear(Layer(32), 145, "token", **{f"{file.split('_')[0]}_source": text.replace(right, wrong)})


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


@needs_gxx
@pytest.mark.parametrize("bug", IN_EPILOGUES)
def test_planted_bug_of_an_epilogue_is_caught(bug):
    kind, right, wrong = IN_EPILOGUES[bug]
    text = first_shells("gemm_fp8.cuh")
    assert right in text
    with pytest.raises((AssertionError, KernelFault)):
        check_epilogue(Layer(16, columns=128), 145, "token", kind, source=text.replace(right, wrong))


@needs_gxx
@EPILOGUES
def test_unplanted_epilogue_passes(kind):
    check_epilogue(Layer(16, columns=128), 145, "token", kind, source=first_shells("gemm_fp8.cuh"))


@needs_gxx
def test_unplanted_source_passes():
    """So that the failures above are the bugs' and not the harness's."""
    check_linear(Layer(32), 145, "token", quant_source=first_shells("quant_fp8.cuh"),
                 gemm_source=first_shells("gemm_fp8.cuh"))


# Repack

@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows, rank, dtype, unsigned", [(128, 0, torch.bfloat16, False), (384, 16, torch.float16, True),
                                                         (512, 48, torch.bfloat16, True)])
def test_repack_is_undone_to_the_bit(rows, rank, dtype, unsigned, wide):
    layer = Layer(rank, dtype, unsigned, rows, 256, wide)
    weight, again = layer.weight, layer.fp8.unpack()
    assert (layer.fp8.shape, layer.fp8.rank) == (weight.shape, rank)
    assert torch.equal(layer.fp8.codes(), layout.signed(layer.codes))
    for name, value in vars(weight).items():
        other = getattr(again, name)
        same = torch.equal(value, other) and value.dtype == other.dtype if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_repack_in_parts(monkeypatch):
    layer = Layer(0, rows=768, columns=256)
    monkeypatch.setattr(w4a8_sm90, "CODES_AT_ONCE", 1)
    assert torch.equal(FP8Weight.pack(layer.weight).qweight, layer.fp8.qweight)


def test_repack_keeps_four_bits():
    layer = Layer(32, rows=512, columns=1024)
    assert layer.fp8.qweight.numel() == layer.weight.qweight.numel()
    assert layer.fp8.wscales.numel() == layer.weight.wscales.numel() and layer.fp8.proj_up is layer.weight.proj_up


def test_one_code_by_hand():
    """Feature 8 + 3 of warp 2, sub-tile 1, warpgroup 1, input 64 + 32 + 16 + 4 * 1 + 2: code -5 is in the high nibble of its
    byte but for the sign, which rotate_left carried to the next byte."""
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    codes[128 + 64 + 32 + 8 + 3, 64 + 32 + 16 + 4 + 2] = -5 & 15
    weight = replace(Layer(0, rows=256, columns=128).weight, qweight=layout.pack_codes(codes))
    stored = FP8Weight.pack(weight).qweight.view(2, 2, 2, 4, 8, 4, 2, 2, 4)          # wg sub group w g t step q byte
    assert stored[1, 1, 1, 2, 3, 1, 1, 1].tolist() == [0, 0, 5 << 4, 8] and stored.count_nonzero() == 2


@pytest.mark.parametrize("changes, words", [({"precision": "nvfp4"}, r"nvfp4 \[128, 128\]"),
                                            ({"qweight": torch.zeros(128, 96, dtype=torch.int8)}, r"int4 \[128, 192\]")])
def test_layers_that_cannot_be_repacked(changes, words):
    with pytest.raises(ShapeError, match=words):
        FP8Weight.pack(replace(Layer(0, rows=128, columns=128).weight, **changes))


# The torch operators and the dispatch, with the emulator in the place of the GPU

@pytest.fixture
def launched(monkeypatch):
    names = []

    def launch(library, like, name, *rest):
        names.append(name)
        launcher.launch(library, like, name, *rest)
    monkeypatch.setattr(launching, "launch", launch)
    return names


@needs_gxx
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_self_test_passes(dtype, launched):
    for variant in (W4A8, W4A4):
        failed = [check_ for kind in check.kinds_of(variant) for check_ in check.checks_of(variant, kind, dtype, check.SMALL, "cpu")
                  if not check_.passed]
        assert failed == []
    assert {name.split("_", 2)[-1] for name in launched if name.startswith("gemm")} == {
        f"{HALVES[dtype]}_{mode}_{width}_c2" for mode in ("token", "group") for width in ("w4", "w8")}


@needs_gxx
@EPILOGUES
@pytest.mark.parametrize("tokens, rank", [(0, 16), (21, 144), (21, 16)])
@pytest.mark.parametrize("run", [W4A8.run, W4A4.run], ids=["w4a8", "w4a4"])
def test_epilogue_of_the_table(run, tokens, rank, kind, launched):
    """Into one batch item's image rows of a joint buffer; the rest stays. A branch too wide to fuse comes before it."""
    layer = Layer(rank, columns=128)
    x, epilogue = layer.x(21)[:tokens], epilogue_of(kind, tokens, N, layer.dtype)
    joint = torch.ones(2, tokens + 5, N, dtype=layer.dtype)
    out, plain = joint[1, 5:], torch.ones(tokens, N, dtype=layer.dtype)
    accumulate = "+=" in kind
    run(x, layer.fp8, plain, layer.bias, accumulate)
    run(x, layer.fp8, out, layer.bias, accumulate, epilogue)
    want = epilogue.of(plain)
    assert (out.float() - want).norm() <= 4 * emulated.EPS[layer.dtype] * want.norm()
    assert (joint[0] == 1).all() and (joint[1, :5] == 1).all() and bool(launched) == bool(tokens)


@needs_gxx
def test_residual_may_be_out(launched):
    """Within a wider tensor, read before it is written."""
    layer, tokens = Layer(16, columns=128), 21
    x, wide = layer.x(tokens), torch.randn(tokens, N + 8, generator=torch.Generator().manual_seed(2)).to(layer.dtype)
    out, kept = wide[:, :N], wide.clone()
    epilogue = epilogue_of("gated", tokens, N, layer.dtype)
    want = torch.zeros(tokens, N, dtype=layer.dtype)
    W4A8.run(x, layer.fp8, want, layer.bias, False, replace(epilogue, residual=kept[:, :N].contiguous()))
    W4A8.run(x, layer.fp8, out, layer.bias, False, replace(epilogue, residual=out))
    assert torch.equal(out, want) and torch.equal(wide[:, N:], kept[:, N:])


@needs_gxx
@pytest.mark.parametrize("tokens, rank", [(0, 32), (1, 0), (65, 144), (130, 48)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("run, act", [(W4A8.run, "e4m3"), (W4A4.run, None)])
def test_linear_of_the_table(run, act, tokens, rank, accumulate, launched):
    """No tokens, no branch, a branch too wide to fuse; x whose rows no kernel can load; out a part of a wider tensor."""
    layer = Layer(rank, rows=128, columns=256)
    x = torch.randn(tokens, 257, generator=torch.Generator().manual_seed(1)).to(layer.dtype)[:, 1:]
    wide = torch.ones(tokens, 144, dtype=layer.dtype)
    got, want = wide[:, 8:136], torch.ones(tokens, 128, dtype=torch.float64)
    run(x, layer.fp8, got, layer.bias, accumulate)
    y = reference.linear_w4a4(x.contiguous(), replace(layer.weight.logical(), bias=layer.bias), act=act).double()
    want = want + y if accumulate else y
    assert (got.double() - want).norm() <= check.LIMIT * want.norm()
    assert (wide[:, :8] == 1).all() and (wide[:, 136:] == 1).all() and bool(launched) == bool(tokens)


@pytest.mark.parametrize("act_bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_path(dtype, act_bits):
    """A repacked weight off its GPU still gives what the layer's own gives, as a product and as numbers."""
    layer = Layer(16, unsigned=True, rows=128, columns=128)
    x, bias = layer.x(5).to(dtype), layer.bias.to(dtype)
    got, want = torch.zeros(5, 128, dtype=dtype), torch.zeros(5, 128, dtype=dtype)
    ops.linear(x, layer.fp8, got, bias, act_bits=act_bits)
    ops.linear(x, layer.weight, want, bias)
    assert torch.equal(got, want)
    assert all(map(torch.equal, weights.dequantize(layer.fp8), weights.dequantize(layer.weight)))


def quant_operands(**changes):
    return [*({"x": torch.zeros(3, K, dtype=torch.bfloat16), "inverse": torch.ones(K),
               "proj_down": torch.zeros(K, 32, dtype=torch.bfloat16)} | changes).values(), False, False]


def gemm_operands(tokens=3, **changes):
    x = torch.zeros(tokens, K, dtype=torch.bfloat16)
    operands = dict(zip(("qact", "ascales", "low"), quant_fp8_outputs(x, 32, False)))
    return [*(operands | {"qweight": torch.zeros(2, K // 128, 16384, dtype=torch.uint8),
                          "wscales": torch.zeros(2, K // 128, 512),
                          "proj_up": torch.zeros(N, 32, dtype=torch.bfloat16), "bias": torch.zeros(N, dtype=torch.bfloat16),
                          "out": torch.zeros(tokens, N, dtype=torch.bfloat16)} | changes).values(), False]


@needs_gxx
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("tokens", [0, 3, 20])
def test_what_torch_compile_sees(tokens, per_group, launched):
    """Shapes and dtypes without a launch, and no argument changed but `out`."""
    layer = Layer(16, rows=128, columns=128)
    fp8, x = layer.fp8, torch.ones(tokens, 128, dtype=torch.bfloat16)
    quantised = quant_fp8(x, fp8.inverse, fp8.proj_down, False, per_group)
    with FakeTensorMode() as mode:
        fake = quant_fp8(*(mode.from_tensor(t) for t in (x, fp8.inverse, fp8.proj_down)), False, per_group)
    assert [(f.shape, f.dtype) for f in fake] == [(q.shape, q.dtype) for q in quantised]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(quant_fp8, (x, fp8.inverse, fp8.proj_down, False, per_group), test_utils=tests)
    out = torch.zeros(tokens, 128, dtype=torch.bfloat16)
    torch.library.opcheck(gemm_fp8, (*quantised, fp8.qweight, fp8.wscales, fp8.proj_up, None, out, False),
                          test_utils=tests)
    assert bool(launched) == bool(tokens)


@needs_gxx
@pytest.mark.parametrize("kind", ["gated", "gelu", "qkv"])
def test_what_torch_compile_sees_of_an_epilogue(kind, launched):
    """Operands of an epilogue are not changed either; through functionalisation, with a residual that is `out`, too."""
    layer = Layer(16, columns=128)
    fp8, epilogue = layer.fp8, epilogue_of(kind, 20, N, layer.dtype)
    quantised = quant_fp8(layer.x(20), fp8.inverse, fp8.proj_down, False, False)
    out = torch.zeros(20, N, dtype=layer.dtype)
    arguments = (*quantised, fp8.qweight, fp8.wscales, fp8.proj_up, None)
    torch.library.opcheck(gemm_fp8, (*arguments, out, False), operands_of(epilogue),
                          test_utils=("test_schema", "test_faketensor"))
    if kind == "gated":
        def gated(out):
            out = out + 1
            gemm_fp8(*arguments, out, False, epilogue="gated", residual=out, gate=epilogue.gate)
            return out

        start = torch.randn(20, N, generator=torch.Generator().manual_seed(4)).to(layer.dtype)
        assert torch.equal(torch.compile(gated, backend="aot_eager")(start), gated(start))


@pytest.mark.parametrize("op, operands, words", [
    (quant_fp8, quant_operands(x=torch.zeros(3, 64, dtype=torch.bfloat16)), "multiple of 128"),
    (quant_fp8, quant_operands(x=torch.zeros(3, K + 1, dtype=torch.bfloat16)[:, 1:]), "rows aligned"),
    (quant_fp8, quant_operands(inverse=torch.ones(K, dtype=torch.bfloat16)), "inverse is .* Needs .*float32"),
    (quant_fp8, quant_operands(proj_down=torch.zeros(K, 144, dtype=torch.bfloat16)), "rank 144"),
    (gemm_fp8, gemm_operands(out=torch.zeros(3, 200, dtype=torch.bfloat16)), "multiple of 128"),
    (gemm_fp8, gemm_operands(qweight=torch.zeros(1, K // 128, 16384, dtype=torch.uint8)), r"Needs \[2, K/128"),
    (gemm_fp8, gemm_operands(qweight=torch.zeros(2, K // 128, 100, dtype=torch.uint8)), "16384 or 32768"),
    (gemm_fp8, [*gemm_operands(), 3], "cluster 3"),
    (gemm_fp8, gemm_operands(proj_up=None), "proj_up is missing"),
    (gemm_fp8, gemm_operands(ascales=torch.zeros(1, 16)), "ascales"),
    (gemm_fp8, gemm_operands(wscales=torch.zeros(2, K // 128, 512, dtype=torch.bfloat16)), "wscales"),
    (gemm_fp8, [*gemm_operands(), 1, "relu"], "epilogue relu with no operands"),
    (gemm_fp8, [*gemm_operands(), 1, "gated"], "gated with no operands"),
    (gemm_fp8, [*gemm_operands(), 1, "gelu", torch.zeros(3, N).bfloat16()], "gelu with residual"),
    (gemm_fp8, [*gemm_operands()[:-1], True, 1, "gelu"], "accumulate True"),
    (gemm_fp8, [*gemm_operands(), 1, "gated", torch.zeros(3, N), torch.zeros(N).bfloat16()], "residual is .*float32"),
    (gemm_fp8, [*gemm_operands(), 1, "gated", torch.zeros(3, N + 1).bfloat16()[:, :N], torch.zeros(N).bfloat16()],
     "rows aligned to 4"),
    (gemm_fp8, [*gemm_operands(), 1, "gated", torch.zeros(3, N).bfloat16(), torch.zeros(N)], "gate is"),
    (gemm_fp8, [*gemm_operands(), 1, "qkv", None, None, *torch.zeros(2, 128).bfloat16(), torch.zeros(2, 64, 2, 2)],
     "rotation is"),
])
def test_operands_that_do_not_fit(op, operands, words):
    with pytest.raises(ShapeError, match=words):
        op(*operands)


@pytest.mark.parametrize("dtype", HALVES)
def test_names_exist(monkeypatch, dtype):
    """Every name that the operators can ask for is a kernel, and there is no other kernel."""
    names = set()
    monkeypatch.setattr(launching, "launch", lambda library, like, name, *rest: names.add(name))
    for rank, unsigned, per_group in itertools.product((0, 32, 48), (False, True), (False, True)):
        x, down = torch.zeros(3, 128, dtype=dtype), torch.zeros(128, rank, dtype=dtype)
        quantised = quant_fp8(x, torch.ones(128), down, unsigned, per_group)
        for cluster, tile in itertools.product((1, 2), w4a8_sm90.STAGED):
            gemm_fp8(*quantised, torch.zeros(1, 1, tile, dtype=torch.uint8), torch.zeros(1, 1, 512),
                           torch.zeros(128, rank, dtype=dtype), None, torch.zeros(3, 128, dtype=dtype), False, cluster)
    assert names == {name for name in w4a8_sm90.LIBRARY.kernels if HALVES[dtype] in name}


def test_launch_through_the_driver(monkeypatch):
    """More than 48 KiB of shared memory are asked for once per kernel; a cluster is an attribute of the launch."""
    seen = []

    def launch_ex(config, function, addresses, extra):
        config = config._obj
        attribute = config.attributes[0]
        seen.append((list(config.grid), list(config.block), config.shared, config.stream, config.count, attribute.id,
                     list(attribute.value)[:3], function, ctypes.c_int.from_address(addresses[0]).value))
        return 0

    cubins = object.__new__(kernels.CubinKernels)
    cubins.functions, cubins.allowed, cubins.context = {"a": 7, "b": 8}, set(), None
    cubins.driver = types.SimpleNamespace(
        cuCtxSetCurrent=lambda context: 0, cuLaunchKernelEx=launch_ex,
        cuFuncSetAttribute=lambda *asked: seen.append(asked) or 0,
        cuLaunchKernel=lambda function, *rest: seen.append((function, rest[6])) or 0)
    cubins.launch("a", (6, 1), 384, [ctypes.c_int(5)], 9, 200000, 2)
    config = ([6, 1, 1], [384, 1, 1], 200000, 9, 1, 4, [2, 1, 1], 7, 5)
    assert seen == [(7, 8, 200000), config]
    cubins.launch("a", (6, 1), 384, [ctypes.c_int(5)], 9, 200000, 2)
    cubins.launch("b", (6, 1), 384, [ctypes.c_int(5)], 9, 200000, 1)
    cubins.launch("b", (6, 1), 384, [ctypes.c_int(5)], 9)
    assert seen[2:] == [config, (8, 8, 200000), (8, 200000), (8, 0)]
    assert ctypes.sizeof(kernels._Attribute) == 72 and ctypes.sizeof(kernels._Config) == 56        # cuda.h


@pytest.mark.parametrize("cluster, tokens, ctas", [(1, 1, 2), (1, 129, 4), (2, 1, 2), (2, 4608, 132)])
def test_grid(monkeypatch, cluster, tokens, ctas):
    """No more CTAs than run at once, whole clusters, none without a tile."""
    calls = []
    monkeypatch.setattr(launching, "launch", lambda library, like, *call: calls.append(call))
    monkeypatch.setattr(launching, "processors", lambda device: 133)
    gemm_fp8(*gemm_operands(tokens, bias=None), cluster)
    (_, grid, block, _, shared, launched_cluster), = calls
    assert (grid, block, launched_cluster) == ((ctas if tokens < 4608 else min(2 * 36, 132), 1), 384, cluster)
    assert shared == w4a8_sm90.STAGED[16384] <= 227 << 10


@needs_gxx
def test_shared_memory_is_what_the_kernel_declares():
    """w4a8_sm90.STAGED against sizeof(Shared<BYTES>): one byte less is an access outside."""
    for wide, tile in ((False, 16384), (True, 32768)):
        layer = Layer(0, rows=128, columns=128, wide=wide)
        quantised = quant(layer, layer.x(1), "group")
        gemm(layer, quantised, torch.zeros(1, 128, dtype=layer.dtype))
        source = ('#include "gemm_fp8.cuh"\nextern "C" __global__ void k(u32* y) { '
                  f"y[0] = sizeof(gemm_fp8::Shared<{str(wide).lower()}>); }}\n")
        size = torch.zeros(1, dtype=torch.int32)
        build.load(source).launch("k", 1, 1, 0, [size])
        assert size.item() == w4a8_sm90.STAGED[tile]
