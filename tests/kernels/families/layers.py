"""Layers for tests of the kernels: random ones, and those of the golden files. Made once and shared: do not change them."""

import functools
from dataclasses import dataclass, replace

import torch

from svdq_pack.svdq.kernels import check, epilogues, layout, reference
from svdq_pack.svdq.kernels.weights import AWQWeight, W4A4Weight

BF16, FP16 = torch.bfloat16, torch.float16
GOLDEN = ("r32", "nobias_r16", "padded_n192_k192_r20", "unsigned_fc2_r16", "smooth_fused_r16")      # linear_int4_*
ENDINGS = ("gated", "gated +=", "gelu", "qkv")


@dataclass(frozen=True, eq=False)
class Layer:
    """A W4A4 layer: as a checkpoint has it, and `logical`, as reference.py does."""
    weight: W4A4Weight
    bias: torch.Tensor

    @functools.cached_property
    def logical(self):
        return self.weight.logical(self.bias)

    @property
    def shape(self):
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype

    @property
    def unsigned(self):
        return self.weight.unsigned

    def changed(self, bias=None, **fields):
        """Another layer, with other tensors in its weight."""
        return Layer(replace(self.weight, **fields), self.bias if bias is None else bias)

    def x(self, tokens):
        """Random activations [tokens, K] of which the first row has two groups of zeros."""
        x = torch.randn(tokens, self.shape[1], generator=torch.Generator().manual_seed(tokens))
        x[0, :128] = 0
        return (reference.gelu_tanh(x) if self.unsigned else x).to(self.dtype)

    @functools.cached_property
    def dense(self):
        """[N, K] float64, and its absolute values."""
        layer = self.logical
        values = layout.signed(layer.codes) if layer.precision == "int4" else layout.e2m1(layer.codes)
        dense = values.double() * layer.wscales.double().repeat_interleave(layout.GROUP[layer.precision], 1) * layer.wtscale
        dense = dense if layer.wcscales is None else dense * layer.wcscales.double()[:, None]
        return dense, dense.abs()

    def product(self, codes, scales, low, bias=True):
        """What a kernel makes of quantised activations, in float64, and the sum of absolute terms.

        codes [M, K], scales [M] or [M, groups], low [M, R]
        """
        scales = scales.double()[:, None] if scales.ndim == 1 else scales.double()
        act = codes.double() * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        (dense, size), low, up = self.dense, low.double(), self.logical.proj_up.double()
        out, size = act @ dense.T + low @ up.T, act.abs() @ size.T + low.abs() @ up.abs().T
        return (out + self.bias.double(), size + self.bias.double().abs()) if bias else (out, size)

    def low(self, x):
        """x @ proj_down in float64, and the sum of absolute terms."""
        down = self.logical.proj_down.double()
        return x.double() @ down, x.double().abs() @ down.abs()


@functools.cache
def layer(n, k, rank=32, dtype=BF16, unsigned=False, lowest=-8):
    """A random Layer [n, k]: weight scales of both signs, codes from `lowest` to 7."""
    random = torch.Generator().manual_seed(rank + 2 * unsigned)

    def half(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    codes = torch.randint(lowest, 8, (n, k), generator=random, dtype=torch.int8)
    codes[0, 0] = lowest
    smooth = (torch.rand(-(-k // 128) * 128, generator=random) + 0.5).to(dtype)     # a product alone takes other k as well
    scales = half(n, k // 64, scale=0.1)
    down, up = (layout.pack_down(half(k, rank, scale=0.05)), layout.pack_up(half(n, rank))) if rank else (None, None)
    return Layer(W4A4Weight("int4", unsigned, layout.pack_codes(codes), layout.pack_scales(scales), layout.pack_vector(smooth),
                            down, up), half(n))


@functools.cache
def nvfp4_layer(n, k, rank=32, dtype=BF16, columns=False):
    """A random Layer [n, k] of nvfp4: all 16 codes, scales over all binades of e4m3, scales of columns or of the tensor."""
    random = torch.Generator().manual_seed(rank + 5)

    def half(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    codes = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
    scales = torch.exp2(torch.rand(n, k // 16, generator=random) * 19 - 10).to(torch.float8_e4m3fn)
    smooth = (torch.rand(k, generator=random) + 0.5).to(dtype)
    down, up = (layout.pack_down(half(k, rank, scale=0.05)), layout.pack_up(half(n, rank))) if rank else (None, None)
    wcscales = layout.pack_vector((torch.rand(n, generator=random) + 0.5).to(dtype) / 256) if columns else None
    return Layer(W4A4Weight("nvfp4", False, layout.pack_codes(codes), layout.pack_scales(scales), layout.pack_vector(smooth),
                            down, up, wcscales, 1.0 if columns else 3e-3), half(n))


def golden_layer(tensors, unsigned, prefix="packed."):
    """The Layer in a golden file."""
    packed = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    precision = "int4" if packed["wscales"].dtype in (BF16, FP16) else "nvfp4"
    return Layer(W4A4Weight(precision, unsigned, packed["qweight"], packed["wscales"], packed["smooth"], packed["lora_down"],
                            packed["lora_up"], packed.get("wcscales"), float(packed.get("wtscale", 1))),
                 layout.unpack_vector(packed["bias"]))


@dataclass(frozen=True, eq=False)
class Modulation:
    """An AWQ layer: as a checkpoint has it, and `logical`, as reference.py does."""
    logical: reference.AWQ
    has_bias: bool = True

    @functools.cached_property
    def weight(self):
        layer = self.logical
        return AWQWeight(layout.pack_awq(layer.codes), layer.wscales.T.contiguous(), layer.wzeros.T.contiguous())

    def product(self, x):
        """What the kernel makes of x, in float64, and the sum of absolute terms."""
        layer = self.logical
        scales, zeros = (values.double().repeat_interleave(64, 1) for values in (layer.wscales, layer.wzeros))
        codes, bias = layer.codes.double(), layer.bias.double() * self.has_bias
        return (x.double() @ (codes * scales + zeros).T + bias,
                x.double().abs() @ (codes * scales.abs() + zeros.abs()).T + bias.abs())


@functools.cache
def modulation(n, k, dtype=BF16, has_bias=True, scale=1.0):
    """A random Modulation [n, k]."""
    random = torch.Generator().manual_seed(n)

    def half(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    codes = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
    return Modulation(reference.AWQ(codes, half(n, k // 64, scale=scale), half(n, k // 64, scale=scale), half(n)), has_bias)


def epilogue_of(kind, tokens, n, dtype):
    """One of ENDINGS with operands of the order of what they meet: rows of a residual apart, an eps that shows, rotations of
    any kind."""
    random = torch.Generator().manual_seed(n + tokens)

    def normal(*shape, scale=1.0, offset=0.0):
        return torch.randn(*shape, generator=random) * scale + offset

    if kind == "gelu":
        return epilogues.Gelu()
    if kind == "qkv":
        query, key = normal(2, 128, scale=0.3, offset=1).to(dtype)
        return epilogues.QKV(query, key, normal(tokens, 64, 2, 2), eps=0.5)
    return epilogues.Gated(normal(tokens, n + 8, scale=20).to(dtype)[:, :n], normal(n).to(dtype))


def launch_modulated(variant, dtype):
    """Calls the kernel of a variant's `modulates`."""
    weight, _ = check.random_weight(check.kinds_of(variant)[0], dtype, 128, 128, 16)
    weight = weight if variant.layout is None else variant.layout.pack(weight)
    variant.prepared([(check.random_modulated(3, 128, dtype), weight)])


def launch_feeding(variant, dtype):
    """Calls the kernels of a variant's `feeds`."""
    weights = [check.random_weight(kind, dtype, 128, 128, 16)[0] for kind in check.kinds_of(variant)[:2]]
    weights = weights if variant.layout is None else list(map(variant.layout.pack, weights))
    prepared = variant.prepare(check.random_x(3, 128, dtype), weights[0])
    for following in weights:
        variant.feeds(prepared, weights[0], None, following, 3)


def old_out(kind, tokens, n, dtype):
    """What `out` holds before, where the kind adds to it, else None."""
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(9)).to(dtype) if kind.endswith("+=") else None
