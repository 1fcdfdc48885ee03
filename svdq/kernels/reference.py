"""Every operator in plain fp32 torch, on logical layouts: the specification of the kernels.

Arithmetic is fp32 on any device (on CUDA that needs TF32 matmuls off, torch's default). A result that is neither a code
nor a scale is fp32: where a kernel stores 16 bit, round once. Where the original rounds an input or an intermediate to
16 bit, so do we if x is 16 bit, and not if x is fp32.

Logical layouts, with M tokens, K inputs, N outputs, G groups along K (64 wide int4, 16 nvfp4), R the rank:
    codes      [N, K]  int4: int8 -8..7, or uint8 nibbles 0..15 in two's complement      nvfp4: uint8 E2M1
    wscales    [N, G]  may be negative
    qact       [M, K]  int4: int8 -8..7, unsigned: uint8 0..15     nvfp4: uint8 E2M1     8-bit modes: float8_e4m3fn | int8
    ascales    [M, G]  8-bit modes: [M], int8_group: [M, K/64]
    smooth [K]   proj_down [K, R]   proj_up [N, R]   bias, wcscales [N]   wtscale a number

NaN and Inf never raise. A NaN makes the scale of its group (8-bit modes: its token) NaN and the codes there 0, so every
output of that token is NaN, as a 16-bit layer would have it. Inf does the same through an infinite scale, but for nvfp4,
whose scale saturates: Inf becomes 6 * 448 there and shows in proj_act only.

Source: SVDQuant, arXiv 2411.05007. Spec: checkpoint-format 6. Test: tests/kernels/test_reference.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .errors import ShapeError
from .layout import GROUP, e2m1, signed

SHIFT = 0.171875  # 11/64, just above -min(gelu_tanh): makes an unsigned layer's input non-negative. Part of the format.
HEAD = 128        # channels of an attention head
E4M3_MAX = 448.0


@dataclass(frozen=True)
class W4A4:
    """The parameters of one SVDQuant layer, logical layouts as above. bias None is zero, wcscales and wtscale None are 1."""
    codes: Tensor
    wscales: Tensor
    smooth: Tensor
    proj_down: Tensor
    proj_up: Tensor
    bias: Tensor | None = None
    wcscales: Tensor | None = None
    wtscale: Tensor | float | None = None
    precision: str = "int4"
    unsigned: bool = False


@dataclass(frozen=True)
class AWQ:
    """The parameters of one modulation layer: codes [N, K] uint8 0..15, wscales and wzeros [N, G], bias [N]."""
    codes: Tensor
    wscales: Tensor
    wzeros: Tensor
    bias: Tensor


# Activations

def modulated(x, scale, shift, eps=1e-6):
    """LayerNorm without weight or bias, then the modulation of an adaptive one: LN(x) * (1 + scale) + shift.

    x [B, tokens, K]; scale, shift [B, K] of its dtype. Each of LN, 1 + scale and the rest is computed in fp32 and rounded to
    x.dtype: ComfyUI's LayerNorm and addcmul.

    Source: arXiv 2212.09748. Test: tests/kernels/test_reference.py
    """
    return torch.addcmul(shift[:, None], layer_norm(x, x.shape[-1:], eps=eps), 1 + scale[:, None])


def quantize_act_int4(x, smooth, *, unsigned=False, shift=0.0):
    """Quantise activations to int4, per token and 64 consecutive channels.

        v     = x + shift                    rounded to x.dtype
        z     = v / smooth                   rounded to x.dtype
        s     = max|z| * fp32(1/7)           unsigned: fp32(1/15)
        qact  = z * (1/s)                    half to even, clamped to -8..7, unsigned: 0..15. s is not yet rounded here
        ascales = s                          rounded to x.dtype. An all-zero group: s = 0, qact = 0

    x [M, K] bf16 | fp16 | fp32, K % 64 == 0; smooth [K] -> qact [M, K] int8, unsigned: uint8; ascales [M, K/64] x.dtype

    Source: checkpoint-format 6.2, 6.4. Test: tests/kernels/test_reference.py
    """
    low, high, kind = (0, 15, torch.uint8) if unsigned else (-8, 7, torch.int8)
    z = _grouped("quantize_act_int4", _smoothed(x, smooth, shift), "int4")
    scale = z.abs().amax(-1, keepdim=True) * (1 / (15 if unsigned else 7))
    codes = _finite(z * (1 / scale)).round().clamp(low, high).to(kind)
    return codes.flatten(1), scale.squeeze(-1).to(x.dtype)


def quantize_act_nvfp4(x, smooth):
    """Quantise activations to nvfp4, per token and 16 consecutive channels. Signed, never shifted.

        z     = x / smooth                   rounded to x.dtype
        s     = min(max|z| * fp32(1/6), 448)
        qact  = z * (1/s)                    to the E2M1 grid, half to even, saturating at 6. s is not yet rounded here
        ascales = s                          to E4M3, half to even. An all-zero group: s = 0, qact = 0

    Ties of the grid 0 0.5 1 1.5 2 3 4 6: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.

    x [M, K] bf16 | fp16 | fp32, K % 16 == 0; smooth [K] -> qact [M, K] uint8 E2M1, ascales [M, K/16] float8_e4m3fn

    Source: checkpoint-format 6.3. Test: tests/kernels/test_reference.py
    """
    z = _grouped("quantize_act_nvfp4", _smoothed(x, smooth), "nvfp4")
    scale = (z.abs().amax(-1, keepdim=True) * (1 / 6)).clamp(max=E4M3_MAX)
    return to_e2m1(_finite(z * (1 / scale))).flatten(1), scale.squeeze(-1).to(torch.float8_e4m3fn)


def to_e2m1(values):
    """fp32 -> uint8 E2M1 code of the nearest grid value, half to even, saturating at 6.

    A small negative value becomes -0, code 8, as hardware converts it. Weights must not contain it (checkpoint-format 5.2).
    """
    magnitude = values.abs().clamp(max=6)
    octave = (magnitude >= 2).int() + (magnitude >= 4)  # steps of 0.5, 1, 2; even codes are the even mantissas
    code = torch.ldexp(magnitude, 1 - octave).round().to(torch.uint8) + 2 * octave.to(torch.uint8)
    return code | (values.signbit().to(torch.uint8) << 3)


def quantize_act_e4m3(x, smooth, *, shift=0.0):
    """Quantise activations to E4M3, one scale per token: the 8-bit mode where 4-bit MMAs are slow or emulated.

        z = (x + shift) / smooth             fp32
        S = max|z| / 448                     over the token
        q = z / S                            half to even. An all-zero token: S = 0, q = 0

    x [M, K]; smooth [K] -> q [M, K] float8_e4m3fn, S [M] fp32

    A kernel may multiply by 1 / smooth and by 448 / max|z|: codes then differ by one step where z / S is within some ulps of
    a tie.
    Source: FP8 mode of our own. Test: tests/kernels/test_reference.py
    """
    q, scale = _per_token(x, smooth, shift, E4M3_MAX)
    return q.to(torch.float8_e4m3fn), scale


def quantize_act_int8(x, smooth, *, shift=0.0, group=None):
    """Quantise activations to int8, one scale per token: as quantize_act_e4m3 with S = max|z| / 127 and q in -127..127.

    x [M, K]; smooth [K] -> q [M, K] int8, S [M] fp32; with a group one scale per so many channels: S [M, K/group]

    Test: tests/kernels/test_reference.py
    """
    if group is None:
        q, scale = _per_token(x, smooth, shift, 127.0)
        return q.round().to(torch.int8), scale
    z = ((x.float() + shift) / smooth.float()).unflatten(1, (-1, group))
    scale = z.abs().amax(-1) / 127.0
    return _finite(z / scale[..., None]).clamp(-127.0, 127.0).round().flatten(1).to(torch.int8), scale


def quant_down(x, smooth, proj_down, *, precision, unsigned=False):
    """Quantise activations and run the low-rank down projection, in one pass over x.

        qact, ascales = quantize_act_<precision>(x, smooth)      unsigned: of x + SHIFT
        proj_act      = x @ proj_down                            fp32; x neither shifted, smoothed nor quantised

    precision  int4 | nvfp4, or an 8-bit mode e4m3 | int8, int8_group: int8 with a scale per 64 channels. unsigned is a property
               of the layer: in the 8-bit modes codes stay signed but the shift remains, because the checkpoint's bias undoes
               it. nvfp4 never has it.
    x [M, K]   smooth [K]   proj_down [K, R], R may be 0  ->  qact [M, K], ascales [M, G] | [M], proj_act [M, R] fp32

    Source: SVDQuant, arXiv 2411.05007; checkpoint-format 6.1-6.4. Test: tests/kernels/test_reference.py
    """
    proj_act = x.float() @ proj_down.float()
    shift = SHIFT if unsigned else 0.0
    if precision == "int4":
        return *quantize_act_int4(x, smooth, unsigned=unsigned, shift=shift), proj_act
    if precision == "nvfp4" and not unsigned:
        return *quantize_act_nvfp4(x, smooth), proj_act
    if precision == "e4m3":
        return *quantize_act_e4m3(x, smooth, shift=shift), proj_act
    if precision == "int8":
        return *quantize_act_int8(x, smooth, shift=shift), proj_act
    if precision == "int8_group":
        return *quantize_act_int8(x, smooth, shift=shift, group=GROUP["int4"]), proj_act
    raise ShapeError(f"quant_down: got precision {precision}, unsigned {unsigned}. Needs int4, e4m3, int8 or int8_group, or "
                     "signed nvfp4.")


def _smoothed(x, smooth, shift=0.0):
    """(x + shift) / smooth in fp32, both steps rounded to x.dtype."""
    shifted = (x.float() + shift).to(x.dtype)
    return (shifted.float() / smooth.float()).to(x.dtype).float()


def _grouped(who, z, precision):
    group = GROUP[precision]
    if z.shape[1] % group:
        raise ShapeError(f"{who}: got x {list(z.shape)}. Needs K % {group} == 0, the {precision} group; "
                         f"pad x with zeros as the layer's weights were.")
    return z.unflatten(1, (-1, group))


def _per_token(x, smooth, shift, limit):
    z = (x.float() + shift) / smooth.float()
    scale = z.abs().amax(1) / limit
    return _finite(z / scale[:, None]).clamp(-limit, limit), scale


def _finite(ratio):
    """0 for NaN, which is 0/0 in an all-zero group or comes from x; a scale that is NaN or Inf then tells the two apart."""
    return ratio.nan_to_num(nan=0.0)


# Codes back to values

def dequantize_act(qact, ascales, precision):
    """What the codes stand for, fp32 [M, K]: qact * ascales. precision tells E2M1 from unsigned integers, both uint8."""
    values = _act_values(qact, precision)
    ascales = _per_group(ascales)
    return (values.unflatten(1, (ascales.shape[1], -1)) * ascales[..., None]).flatten(1)


def dequantize_weight(codes, wscales, precision, wcscales=None, wtscale=None):
    """What a W4A4 weight stands for, fp32 [N, K], in smoothed space: codes * wscales * wtscale * wcscales.

    Source: checkpoint-format 6.1. Test: tests/kernels/test_reference.py
    """
    _check_scales("dequantize_weight", codes, wscales, GROUP[precision])
    scale = _tensor_scaled(wscales.float(), wcscales, wtscale)
    weight = _weight_values(codes, precision)
    weight.unflatten(1, (scale.shape[1], -1)).mul_(scale[..., None])  # in place: this is the largest tensor of a layer
    return weight


def dequantize_awq(codes, wscales, wzeros):
    """What an AWQ weight stands for, fp32 [N, K]: codes * wscales + wzeros.

    codes [N, K] uint8 0..15; wscales, wzeros [N, G], a group being K/G wide: 64 in FLUX, 128 in text encoders.

    Source: checkpoint-format 5.7. Test: tests/kernels/test_reference.py
    """
    for scales in (wscales, wzeros):
        _check_scales("dequantize_awq", codes, scales, codes.shape[1] // max(scales.shape[1], 1))
    weight = codes.float()
    weight.unflatten(1, (wscales.shape[1], -1)).mul_(wscales.float()[..., None]).add_(wzeros.float()[..., None])
    return weight


def _act_values(qact, precision):
    return e2m1(qact) if precision == "nvfp4" and qact.dtype == torch.uint8 else qact.float()


def _weight_values(codes, precision):
    if precision == "nvfp4":
        return e2m1(codes)
    return (signed(codes) if codes.dtype == torch.uint8 else codes).float()


def _per_group(ascales):
    """fp32 [M, G]; one scale per token is one group."""
    return ascales.float() if ascales.dim() == 2 else ascales.float()[:, None]


def _tensor_scaled(scale, wcscales, wtscale):
    """[N, ...] fp32 times the two outer scales of nvfp4, where present."""
    if wtscale is not None:
        scale = scale * wtscale
    if wcscales is not None:
        scale = scale * wcscales.float()[:, None]
    return scale


def _check_scales(who, codes, scales, group):
    N, K = codes.shape
    if scales.shape[0] != N or scales.shape[1] * group != K:
        raise ShapeError(f"{who}: got codes {[N, K]} and scales {list(scales.shape)}. "
                         f"Needs scales [N, K/{group}]; stored scales go through layout.unpack_scales or, AWQ, a transpose.")


# Matrix products

def gemm_w4a4(qact, ascales, codes, wscales, proj_act, proj_up, bias, *, precision, wcscales=None, wtscale=None):
    """The quantised product, plus bias, plus the low-rank branch.

        acc[m,n] = sum_g ascales[m,g] * wscales[n,g] * sum_{k in g} qact[m,k] * codes[n,k]        inner sum exact
        y[m,n]   = acc * wtscale * wcscales[n]  +  bias[n]  +  sum_r proj_act[m,r] * proj_up[n,r]

    In that order: wcscales never touches the low rank. Inner sums are exact in fp32: int4 |sum| <= 64*15*8 = 7680,
    nvfp4 multiples of 1/4 up to 16*6*6 = 576.

    precision  int4 | nvfp4, of the weights; qact may come from an 8-bit mode, whose E4M3 sums are fp32 and not exact
    bias       may be None
    result     [M, N] fp32

    Source: SVDQuant, arXiv 2411.05007; checkpoint-format 6.1, 6.5. Test: tests/kernels/test_reference.py
    """
    group = GROUP[precision]
    _check_scales("gemm_w4a4", codes, wscales, group)
    act, weight = _act_values(qact, precision), _weight_values(codes, precision)
    groups = wscales.shape[1]
    ascales = _per_group(ascales)
    ascales = ascales.repeat_interleave(groups // ascales.shape[1], 1)
    acc = act.new_zeros(act.shape[0], weight.shape[0])
    for g in range(groups):
        k = slice(g * group, (g + 1) * group)
        acc += ascales[:, g, None] * wscales[:, g].float() * (act[:, k] @ weight[:, k].T)
    y = _tensor_scaled(acc.T, wcscales, wtscale).T
    if bias is not None:
        y = y + bias.float()
    return y + proj_act.float() @ proj_up.float().T


def linear_w4a4(x, layer, act=None):
    """A whole SVDQuant layer: quant_down, then gemm_w4a4. x [M, K] -> [M, N] fp32.

    act  e4m3 | int8 | int8_group runs the layer with 8-bit activations; None is the layer's own precision
    """
    quantised = quant_down(x, layer.smooth, layer.proj_down, precision=act or layer.precision, unsigned=layer.unsigned)
    return _gemm(quantised, layer)


def linear_weight_only(x, layer):
    """The same layer with exact activations, as x @ W_eff.T + b_eff of the format. x [M, K] -> [M, N] fp32.

        W_eff = W / smooth + proj_up @ proj_down.T       W = dequantize_weight(...)
        b_eff = bias + SHIFT * sum_k W[n,k] / smooth[k]  for unsigned layers, whose bias expects the shift

    Computed as ((x + shift) / smooth) @ W.T + bias + (x @ proj_down) @ proj_up.T, the same without a second [N, K].

    Source: checkpoint-format 6.1. Test: tests/kernels/test_reference.py
    """
    weight = dequantize_weight(layer.codes, layer.wscales, layer.precision, layer.wcscales, layer.wtscale)
    z = (x.float() + (SHIFT if layer.unsigned else 0.0)) / layer.smooth.float()
    y = z @ weight.T + (x.float() @ layer.proj_down.float()) @ layer.proj_up.float().T
    return y if layer.bias is None else y + layer.bias.float()


def awq_gemv(x, codes, wscales, wzeros, bias):
    """A modulation layer: x @ dequantize_awq(codes, wscales, wzeros).T + bias. x [M, K] is silu(vec) -> [M, N] fp32.

    Output channels stay in stored order (chunk c of S at i*S + c), with 1 folded into the bias of the scale chunks.

    Source: checkpoint-format 6.8. Test: tests/kernels/test_reference.py
    """
    return x.float() @ dequantize_awq(codes, wscales, wzeros).T + bias.float()


def _gemm(quantised, layer):
    qact, ascales, proj_act = quantised
    return gemm_w4a4(qact, ascales, layer.codes, layer.wscales, proj_act, layer.proj_up, layer.bias,
                     precision=layer.precision, wcscales=layer.wcscales, wtscale=layer.wtscale)


# Epilogues: what a kernel does to y [M, N] before it stores

def gate_residual(y, residual, gate, addend=None):
    """E1: residual + gate * (y + addend). gate [N] or broadcast to y; addend is a single block's attention half.

    Test: tests/kernels/test_reference.py
    """
    y = y.float() if addend is None else y.float() + addend.float()
    return residual.float() + gate.float() * y


def gelu_quant_down(y, smooth, proj_down, precision, act=None):
    """E2, fc1 -> fc2: h = gelu_tanh(y) rounded to smooth.dtype, then quant_down of h. smooth and proj_down are fc2's.

    y          [M, K] fp32, or 16 bit as the original has it
    precision  fc2's: int4 shifts and is unsigned, nvfp4 is neither
    act        as in linear_w4a4

    Source: checkpoint-format 6.4, 6.6. Test: tests/kernels/test_reference.py
    """
    h = gelu_tanh(y).to(smooth.dtype)
    return quant_down(h, smooth, proj_down, precision=act or precision, unsigned=precision == "int4")


def gelu_tanh(y):
    """y/2 * (1 + tanh(u)) with u = 0.79788456 * (y + 0.044715 y^3), fp32."""
    y = y.float()
    # (1 + tanh(u)) / 2 is sigmoid(2u), which does not cancel where tanh(u) is near -1.
    return y * torch.sigmoid(2 * 0.79788456 * (y + 0.044715 * y ** 3))


def qk_norm_rope(qkv, q_norm, k_norm, rotation, eps=1e-6):
    """E3: RMSNorm and rotary embedding of q and k per head of 128, v untouched.

        q = q * rsqrt(mean(q^2) + eps) * q_norm                                      over the head; k likewise
        q[2i]   = r[i,0,0] * q[2i] + r[i,0,1] * q[2i+1]                              r: the token's rotation
        q[2i+1] = r[i,1,0] * q[2i] + r[i,1,1] * q[2i+1]                              ((cos, -sin), (sin, cos)) in FLUX

    qkv [M, 3H], q then k then v, head-major; q_norm, k_norm [128]; rotation [M, 64, 2, 2] fp32 -> [M, 3H] fp32

    Source: checkpoint-format 6.7. Test: tests/kernels/test_reference.py
    """
    q, k, v = qkv.float().chunk(3, dim=1)
    rotation = rotation[:, None]

    def norm_rope(x, norm):
        x = x.unflatten(1, (-1, HEAD))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
        even, odd = x[..., 0::2, None], x[..., 1::2, None]
        return (rotation[..., 0] * even + rotation[..., 1] * odd).flatten(1)

    return torch.cat((norm_rope(q, q_norm), norm_rope(k, k_norm), v), 1)
