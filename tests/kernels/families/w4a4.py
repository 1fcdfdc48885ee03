"""What tests of W4A4 kernels share: their buffers in plain order, running them, and checks of what they wrote."""

from dataclasses import dataclass

import torch

from svdq_pack.svdq.kernels import reference

from . import mutations
from .comparisons import assert_rounded, assert_saturated
from .layers import FP16, layer

# The buffers between the kernels, by hand and not by the variant's `decode`; axes as in ptx.cuh, lane = 4 g + t

def unpack_codes(qact, unsigned):
    """[M/64][K/64][m16][g][t][k half][row half] words -> codes [M, K]."""
    words = qact.view(*qact.shape[:2], 4, 8, 4, 2, 2)
    nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)          # int32: the shift's sign bits fall to & 15
    codes = nibbles.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(qact.shape[0] * 64, qact.shape[1] * 64)
    return codes if unsigned else (codes ^ 8) - 8


def unpack_scales(ascales):
    """[M/64][K/64][m16][g][row half] -> [M, K/64]."""
    return ascales.permute(0, 2, 4, 3, 1).reshape(ascales.shape[0] * 64, ascales.shape[1])


def unpack_low(low):
    """[M/16][R/16][g][t][k half][row half][2] -> [M, R]."""
    words = low.view(*low.shape[:2], 8, 4, 2, 2, 2)
    return words.permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, low.shape[1] * 16)


def pack(codes, scales, low):
    """The other way: codes [M, K] int, scales [M, K/64], low [M, R], M a multiple of 64."""
    (m, k), r = codes.shape, low.shape[1]
    nibbles = codes.int().view(m // 64, 4, 2, 8, k // 64, 2, 4, 8) & 15         # block m16 row half, g, group, k half, t, 8
    words = sum(nibbles[..., i].long() << 4 * i for i in range(8)).int()
    return (words.permute(0, 4, 1, 3, 6, 5, 2).reshape(m // 64, k // 64, 4, 32, 4).contiguous(),
            scales.view(m // 64, 4, 2, 8, k // 64).permute(0, 4, 1, 3, 2).contiguous(),
            low.view(m // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6).reshape(m // 16, r // 16, 32, 8))


def unpack(quantised, unsigned):
    qact, ascales, low = quantised
    return unpack_codes(qact, unsigned), unpack_scales(ascales), unpack_low(low)


def blank(tokens, layer):
    return torch.full((tokens, layer.shape[0]), float("nan"), dtype=layer.dtype)


@dataclass(frozen=True)
class W4A4:
    """Two operators of svdq/kernels/w4a4.py, whatever GPU their kernels are for."""
    quant_down: object
    gemm: object

    # Running them

    def quantise(self, executor, layer, x, **how):
        """quant_down's (qact, ascales, low) of x, on the CPU."""
        weight = executor.put(layer.weight)
        with executor.set(**how):
            return [part.cpu() for part in self.quant_down(executor.put(x), weight.smooth, weight.proj_down, weight.unsigned)]

    def multiply(self, executor, layer, quantised, out, *, bias=True, accumulate=False, **how):
        """gemm of these operands into `out`, which is returned, on the CPU."""
        weight, there = executor.put(layer.weight), executor.put(out)
        with executor.set(**how):
            self.gemm(*executor.put(list(quantised)), weight.qweight, weight.wscales, weight.proj_up,
                      executor.put(layer.bias) if bias else None, there, weight.unsigned, accumulate)
        return there.cpu()

    # Checks

    @staticmethod
    def check_product(*arguments, **more):
        check_product(*arguments, **more)

    def check_linear(self, executor, layer, tokens, rows=slice(None)):
        x = layer.x(tokens)
        quantised = self.quantise(executor, layer, x, order=tokens)
        check_quantised(executor, layer, x, quantised)
        out = self.multiply(executor, layer, quantised, blank(tokens, layer), order=tokens)
        self.check_product(executor, layer, quantised, out, rows)

    def check_golden(self, executor, layer, x, codes, scales, low):
        """`out` of this x, when codes where they are not of a group of nothing, scales and low rank are these."""
        quantised, tokens = self.quantise(executor, layer, x), len(x)
        got_codes, got_scales, got_low = (part[:tokens] for part in unpack(quantised, layer.unsigned))
        live = (scales != 0).repeat_interleave(64, 1)
        assert (got_codes != codes.int())[live].float().mean() <= executor.ties
        assert torch.equal(got_scales, scales.float())
        torch.testing.assert_close(got_low.float(), low, rtol=4e-3, atol=1e-5)
        return self.multiply(executor, layer, quantised, blank(tokens, layer))

    # Saturation: a result beyond fp16 is stored as its largest number of that sign, not as Inf, and NaN stays NaN

    def check_saturation_of_product(self, executor):
        it, tokens = layer(128, 128, 16, FP16), 20
        it = it.changed(wscales=it.weight.wscales * 2**14)
        x = it.x(tokens)
        x[5, 77] = float("nan")
        with executor.set(sources={}):
            quantised = self.quantise(executor, it, x)
        out = self.multiply(executor, it, quantised, blank(tokens, it))
        assert_saturated(out, *it.product(*(part[:tokens] for part in unpack(quantised, False))), executor.slack)
        before = torch.full((tokens, 128), 60000.0, dtype=FP16)
        before[::2], before[7] = -60000, float("nan")
        total = self.multiply(executor, it, quantised, before.clone(), accumulate=True)
        want, size = it.product(*(part[:tokens] for part in unpack(quantised, False)))
        assert_saturated(total, want + before.double(), size + before.double().abs(), executor.slack)

    def check_saturation_of_low(self, executor):
        """Row m of x has the signs of column m of proj_down, or all others, so that the sums of the diagonal go beyond."""
        it = layer(128, 128, 16, FP16)
        x = 30000 * it.logical.proj_down.T.sign() * torch.tensor([1.0, 1, -1, -1]).repeat(4)[:, None]
        x = torch.cat((x, x[:1] * float("nan"))).to(FP16)
        assert_saturated(unpack_low(self.quantise(executor, it, x)[2])[:17], *it.low(x), executor.slack)


def check_quantised(executor, layer, x, quantised):
    """Codes and scales as in reference.py, on a GPU but for ties; `low` against float64; nothing in the rows past M."""
    codes, scales, low = unpack(quantised, layer.unsigned)
    tokens = len(x)
    spec_codes, spec_scales, _ = reference.quant_down(x, layer.logical.smooth, layer.logical.proj_down, precision="int4",
                                                      unsigned=layer.unsigned)
    apart = (codes[:tokens] - spec_codes.int()).abs()
    assert apart.max() <= 1 and apart.sum() <= executor.ties * apart.numel() + (executor.ties > 0)
    assert torch.equal(scales[:tokens], spec_scales.float())
    for values in (codes, scales, low):
        assert not values[tokens:].any()
    assert_rounded(low[:tokens], *layer.low(x), "low", executor.slack)


def check_product(executor, layer, quantised, out, rows=slice(None), before=None, **more):
    """Against float64 from the same codes, added to what was there before: fp32 sums, rounded once."""
    want, size = layer.product(*(part[:len(out)][rows] for part in unpack(quantised, layer.unsigned)), **more)
    if before is not None:
        want, size = want + before.double(), size + before.double().abs()
    assert_rounded(out[rows], want, size, "out", executor.slack)


def barriers(file):
    """(file, words, index) of the barriers of a quantiser that does not note the largest scales."""
    words = "px::barrier();"
    return [place for place in mutations.places(file, words)
            if "PX void store_peaks" not in mutations.whole(file).split(words)[place[2]]]


# Bugs of value, to be planted one at a time

def w4a4_bugs(quant_down, gemm):
    """{bug: (file, right, wrong)} of kernels in two files."""
    return {
        "fragments of B swapped": (gemm, "h ? b.z : b.x", "h ? b.x : b.z"),
        "rows of an activation scale swapped": (gemm, "ascale[i][e / 2]", "ascale[i][1 - e / 2]"),
        "columns of a weight scale swapped": (gemm, "wscale[e % 2], less", "wscale[1 - e % 2], less"),
        "the offset not taken away": (gemm, "less[e % 2])", "0.0f)"),
        "scales of the other columns": (gemm, "h ? s.y : s.x", "h ? s.x : s.y"),
        "last group dropped": (gemm, "if (group >= groups)", "if (group >= groups - 1)"),
        "low rank of the wrong tile": (gemm, "((n16 + j)", "((n16 % 8 + j)"),
        "bias of the wrong column": (gemm, "j * 8 + lane % 4 * 2)", "j * 8 + lane % 4)"),
        "bytes transposed halfway": (quant_down, "t & 2 ? 0x3276 : 0x5410", "0x5410"),
        "tail rows leak": (quant_down, "inside[h] ? *(const u32*)(x_row[h] + column) : 0u", "*(const u32*)(x_row[h] + column)"),
        "smoothing multiplied": (quant_down, "px::divide(x, smooth)", "x * smooth"),
        "scale rounded before the codes": (quant_down, "bits ? 1.0f / scale",
                                           "bits ? 1.0f / px::low_half<T>(px::pack_half<T>(scale, 0.0f))"),
        "low rank fed the other row": (quant_down, "{pairs[0][2 * c], pairs[1][2 * c],", "{pairs[1][2 * c], pairs[0][2 * c],"),
        "a warp's share forgotten": (quant_down, "for (int w = 0; w < WARPS; w++)", "for (int w = 1; w < WARPS; w++)"),
    }


# Operands of the operators by themselves

def quant_operands(tokens=3, rank=32, dtype=torch.bfloat16, k=128, **changes):
    return [*({"x": torch.zeros(tokens, k, dtype=dtype), "smooth": torch.ones(k, dtype=dtype),
               "proj_down": torch.zeros(k, rank, dtype=dtype)} | changes).values(), False]


def gemm_operands(tokens=3, rank=32, dtype=torch.bfloat16, k=128, n=256, **changes):
    blocks, groups = -(-tokens // 64), k // 64
    return [*({"qact": torch.zeros(blocks, groups, 4, 32, 4, dtype=torch.int32),
               "ascales": torch.zeros(blocks, groups, 4, 8, 2),
               "low": torch.zeros(blocks * 4, rank // 16, 32, 8, dtype=dtype),
               "qweight": torch.zeros(n, k // 2, dtype=torch.int8), "wscales": torch.zeros(groups, n, dtype=dtype),
               "proj_up": torch.zeros(n, rank, dtype=dtype), "bias": torch.zeros(n, dtype=dtype),
               "out": torch.zeros(tokens, n, dtype=dtype)} | changes).values(), False, False]
