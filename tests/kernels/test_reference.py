"""The reference operators against the golden files, against float64 formulas, and against comfy-kitchen's eager backend."""

import dataclasses

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from svdq_pack.svdq.kernels import layout, reference
from svdq_pack.svdq.kernels.errors import ShapeError

# fp32 arithmetic against float64 truth: measured 4e-8 to 2.8e-7, here and over all golden files; twice that for other CPUs.
FP32 = 6e-7

LINEARS = ["linear_int4_r32", "linear_int4_nobias_r16", "linear_int4_padded_n192_k192_r20", "linear_int4_unsigned_fc2_r16",
           "linear_int4_smooth_fused_r16", "linear_nvfp4_wtscale_r32", "linear_nvfp4_wcscales_qkv_r16"]


def rel_l2(got, want):
    error, size = (got.double() - want.double()).norm(), want.double().norm()
    return (error / size).item() if size else error.item()


def assert_close(got, want, limit):
    assert got.shape == want.shape
    error = rel_l2(got, want)
    worst = (got.double() - want.double()).abs().nan_to_num(nan=float("inf")).argmax().item()
    assert error <= limit, f"relative L2 {error:.2e} > {limit:.0e}; worst at flat index {worst}: " \
                           f"{got.flatten()[worst]} instead of {want.flatten()[worst]}"


def read_layer(tensors, prefix="packed.", unsigned=False):
    packed = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    wcscales = packed.get("wcscales")
    return reference.W4A4(
        codes=layout.unpack_codes(packed["qweight"]),
        wscales=layout.unpack_scales(packed["wscales"]),
        smooth=layout.unpack_vector(packed["smooth"]),
        proj_down=layout.unpack_down(packed["lora_down"]),
        proj_up=layout.unpack_up(packed["lora_up"]),
        bias=layout.unpack_vector(packed["bias"]),
        wcscales=None if wcscales is None else layout.unpack_vector(wcscales),
        wtscale=packed.get("wtscale"),
        precision="nvfp4" if packed["wscales"].dtype == torch.float8_e4m3fn else "int4",
        unsigned=unsigned,
    )


def random_layer(precision, N=128, K=192, R=32, unsigned=False, seed=0):
    """Codes over the whole range including -8, int4 scales of both signs."""
    torch.manual_seed(seed)
    nvfp4 = precision == "nvfp4"
    wscales = torch.randn(N, K // layout.GROUP[precision]) / 8
    return reference.W4A4(
        codes=torch.randint(0, 16, (N, K)).to(torch.uint8),
        wscales=(wscales.abs() * 64).to(torch.float8_e4m3fn) if nvfp4 else wscales.bfloat16(),
        smooth=(torch.rand(K) + 0.5).bfloat16(),
        proj_down=(torch.randn(K, R) / 16).bfloat16(),
        proj_up=(torch.randn(N, R) / 8).bfloat16(),
        bias=torch.randn(N).bfloat16(),
        wcscales=(torch.rand(N) / 64).bfloat16() if nvfp4 else None,
        precision=precision, unsigned=unsigned,
    )


def random_x(M, K, dtype=torch.bfloat16, unsigned=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator)
    return (reference.gelu_tanh(x) if unsigned else x).to(dtype)


def dense(layer):
    """W_eff [N, K] and b_eff [N] of checkpoint-format 6.1 in float64, element by element as written there."""
    group = layout.GROUP[layer.precision]
    if layer.precision == "nvfp4":
        values = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6]).double()[layer.codes.long()]
    else:
        values = layer.codes.double() - 16 * (layer.codes >= 8)
    weight = values * layer.wscales.double().repeat_interleave(group, 1)
    weight *= 1 if layer.wcscales is None else layer.wcscales.double()[:, None]
    weight *= 1 if layer.wtscale is None else layer.wtscale.double()
    smoothed = weight / layer.smooth.double()
    delta = 0.171875 if layer.unsigned else 0
    return (smoothed + layer.proj_up.double() @ layer.proj_down.double().T,
            layer.bias.double() + delta * smoothed.sum(1))


# Golden files

@pytest.mark.parametrize("name", LINEARS)
def test_golden_linear(golden, name):
    tensors = golden(name)
    layer = read_layer(tensors, unsigned="unsigned" in name)
    N, K = tensors["logical.codes"].shape
    x = layout.pad(tensors["io.x"], 1, layer.codes.shape[1])

    qact, ascales, proj_act = reference.quant_down(x, layer.smooth, layer.proj_down, precision=layer.precision,
                                                   unsigned=layer.unsigned)
    live = (ascales.float() != 0).repeat_interleave(layout.GROUP[layer.precision], 1)
    assert torch.equal(qact.int()[live], tensors["io.q_act"].int()[live])
    assert not qact[~live].any()
    assert ascales.dtype == tensors["io.ascales"].dtype
    assert torch.equal(ascales.float(), tensors["io.ascales"].float())
    assert_close(proj_act, tensors["io.lora_act"], FP32)

    assert_close(reference.linear_w4a4(x, layer)[:, :N], tensors["io.y_act_quant"], FP32)
    assert_close(reference.linear_weight_only(x, layer)[:, :N], tensors["io.y_weight_only"], FP32)
    b_eff = reference.linear_weight_only(torch.zeros(1, x.shape[1]), layer)
    assert_close(b_eff[0, :N], tensors["logical.b_effective"], FP32)
    if "logical.w_effective" in tensors:
        w_eff = (reference.linear_weight_only(torch.eye(x.shape[1]), layer) - b_eff).T
        # A difference of two outputs loses digits: measured 6e-7.
        assert_close(w_eff[:N, :K], tensors["logical.w_effective"], 2 * FP32)


def test_golden_mlp(golden):
    tensors = golden("mlp_int4_fused_gelu")
    fc1, fc2 = read_layer(tensors, "packed.fc1."), read_layer(tensors, "packed.fc2.", unsigned=True)
    hidden = reference.linear_w4a4(tensors["io.x"], fc1)
    assert_close(hidden, tensors["io.h_act_quant"], FP32)
    # Where GELU is below 1e-14 the golden value has itself cancelled to nothing.
    torch.testing.assert_close(reference.gelu_tanh(tensors["io.h_act_quant"]).bfloat16(), tensors["io.gelu_bf16"],
                               rtol=0, atol=1e-14)
    qact, ascales, proj_act = reference.gelu_quant_down(hidden, fc2.smooth, fc2.proj_down, fc2.precision)
    assert torch.equal(qact.int(), tensors["io.fc2_q_act"].int())
    assert torch.equal(ascales, tensors["io.fc2_ascales"])
    assert_close(proj_act, tensors["io.fc2_lora_act"], FP32)
    y = reference.gemm_w4a4(qact, ascales, fc2.codes, fc2.wscales, proj_act, fc2.proj_up, fc2.bias, precision="int4")
    assert_close(y, tensors["io.y_act_quant"], FP32)

    exact = reference.linear_weight_only(reference.gelu_tanh(reference.linear_weight_only(tensors["io.x"], fc1)), fc2)
    assert_close(exact, tensors["io.y_weight_only"], FP32)


def turns(cos, sin):
    """[M, 64] each -> the rotations [M, 64, 2, 2]"""
    return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))


@pytest.mark.parametrize("linear, name", [("linear_w4a4", "act_quant"), ("linear_weight_only", "weight_only")])
def test_golden_qkv(golden, linear, name):
    tensors = golden("qkv_rmsnorm_rope_int4")
    qkv = getattr(reference, linear)(tensors["io.x"], read_layer(tensors))
    got = reference.qk_norm_rope(qkv, tensors["norm_q.weight"], tensors["norm_k.weight"],
                                 turns(tensors["io.cos"], tensors["io.sin"]))
    assert_close(got, tensors[f"io.y_{name}"], FP32)


@pytest.mark.parametrize("name", ["awq_adanorm_zero", "awq_plain_k1024"])
def test_golden_awq(golden, name):
    tensors = golden(name)
    x, bias = tensors["io.x"], tensors["packed.bias"]
    wscales, wzeros = tensors["packed_trimmed.wscales"].t(), tensors["packed_trimmed.wzeros"].t()
    y = reference.awq_gemv(x, layout.unpack_awq(tensors["packed.qweight"]), wscales, wzeros, bias)
    assert_close(y, tensors["io.y_stored_order"], FP32)
    if name == "awq_adanorm_zero":  # stored row 6i + c is row i of chunk c; chunks 1 and 4 carry the 1
        order = torch.arange(len(bias)).view(-1, 6).t().flatten()
        codes = layout.unpack_awq(layout.permute_awq_rows(tensors["packed.qweight"], order))
        logical = reference.awq_gemv(x, codes, wscales[order], wzeros[order], bias[order]).view(len(x), 6, -1)
        logical[:, [1, 4]] -= 1
        assert_close(logical.flatten(1), tensors["io.y_logical_order_without_plus_one"], FP32)


def test_golden_awq_text_encoder(golden):
    tensors = golden("awq_text_encoder_g128")
    codes = layout.unpack_awq(tensors["packed.qweight"])
    groups = codes.shape[1] // 128  # stored rows beyond are padding
    y = reference.awq_gemv(tensors["io.x"], codes, tensors["packed.scales"][:groups].t(),
                           tensors["packed.scaled_zeros"][:groups].t(), torch.zeros(len(codes)))
    assert_close(y, tensors["io.y"], FP32)


# Layers with the whole range of codes and scales

@pytest.mark.parametrize("precision, unsigned", [("int4", False), ("int4", True), ("nvfp4", False)])
@pytest.mark.parametrize("R", [0, 16, 128])
def test_weight_only_is_the_formula(precision, unsigned, R):
    layer = random_layer(precision, R=R, unsigned=unsigned)
    x = random_x(17, 192)
    weight, bias = dense(layer)
    assert_close(reference.linear_weight_only(x, layer), x.double() @ weight.T + bias, FP32)


@pytest.mark.parametrize("precision, unsigned", [("int4", False), ("int4", True), ("nvfp4", False)])
@pytest.mark.parametrize("act", [None, "e4m3", "int8"])
@pytest.mark.parametrize("R", [0, 16, 128])
def test_gemm_is_the_dequantised_product(precision, unsigned, act, R):
    layer = random_layer(precision, R=R, unsigned=unsigned)
    x = random_x(17, 192, unsigned=unsigned)
    qact, ascales, _ = reference.quant_down(x, layer.smooth, layer.proj_down, precision=act or precision, unsigned=unsigned)
    values = reference.dequantize_act(qact, ascales, act or precision).double()
    # Without smoothing and low rank the formula leaves the weight itself.
    weight, _ = dense(dataclasses.replace(layer, smooth=torch.ones(192), proj_down=torch.zeros(192, R)))
    low_rank = (x.double() @ layer.proj_down.double()) @ layer.proj_up.double().T
    assert_close(reference.linear_w4a4(x, layer, act), values @ weight.T + layer.bias.double() + low_rank, FP32)
    assert_close(reference.dequantize_weight(layer.codes, layer.wscales, precision, layer.wcscales), weight, FP32)


def test_both_forms_of_int4_codes():
    layer = random_layer("int4")
    values = dataclasses.replace(layer, codes=layout.signed(layer.codes))
    assert (values.codes == -8).any() and (layer.wscales < 0).any()
    x = random_x(5, 192)
    assert torch.equal(reference.linear_w4a4(x, layer), reference.linear_w4a4(x, values))


def test_group_sums_are_exact():
    """The extreme sums, and an odd one above 2048 that fp16 could not hold; scales 1, so y is the sum itself."""
    codes = torch.full((128, 64), -8, dtype=torch.int8)
    codes[1] = 7
    codes[1, 0] = 6
    qact = torch.full((1, 64), 15, dtype=torch.uint8)
    ones, none = torch.ones(1, 1), torch.zeros(1, 0)
    y = reference.gemm_w4a4(qact, ones, codes, ones.expand(128, 1), none, none.expand(128, 0), None, precision="int4")
    assert y[0, :2].tolist() == [-7680, 6705]


def test_outer_scales_do_not_touch_bias_or_low_rank():
    layer = random_layer("nvfp4")
    x = random_x(5, 192)
    without = x.float() @ layer.proj_down.float() @ layer.proj_up.float().T + layer.bias.float()
    for zero in ({"wcscales": torch.zeros(128)}, {"wtscale": torch.zeros(1)}):
        assert_close(reference.linear_w4a4(x, dataclasses.replace(layer, **zero)), without, FP32)
    # A power of two is exact, as wtscale and as wcscales.
    tensor = dataclasses.replace(layer, wcscales=None, wtscale=torch.tensor([0.5]))
    channel = dataclasses.replace(layer, wcscales=torch.full((128,), 0.5))
    assert torch.equal(reference.linear_w4a4(x, tensor), reference.linear_w4a4(x, channel))


@pytest.mark.parametrize("act", [None, "e4m3", "int8"])
@pytest.mark.parametrize("precision, unsigned", [("int4", False), ("int4", True), ("nvfp4", False)])
@pytest.mark.parametrize("M", [0, 1, 17])
def test_a_token_does_not_depend_on_the_others(precision, unsigned, act, M):
    layer = random_layer(precision, unsigned=unsigned)
    x = random_x(32, 192)
    few = reference.linear_w4a4(x[:M], layer, act)
    assert few.shape == (M, 128)
    # A matmul adds in another order for another M: measured 2e-6 on values up to 30.
    torch.testing.assert_close(few, reference.linear_w4a4(x, layer, act)[:M], rtol=0, atol=6e-6)


# Quantisers

def test_int4_rounds_half_to_even():
    x = torch.zeros(1, 64)
    x[0, :7] = torch.tensor([7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    qact, ascales = reference.quantize_act_int4(x, torch.ones(64))
    assert qact[0, :7].tolist() == [7, 0, 2, 2, 0, -2, -2] and ascales.tolist() == [[1]]
    x[0, :4] = torch.tensor([15, 0.5, 1.5, 14.5])
    qact, ascales = reference.quantize_act_int4(x, torch.ones(64), unsigned=True)
    assert qact[0, :7].tolist() == [15, 0, 2, 14, 0, 0, 0] and ascales.tolist() == [[1]]
    assert qact.dtype == torch.uint8


def test_int4_codes_use_the_scale_before_rounding():
    """1.7890625 * 7 / 1.921875 = 6.516; with the scale rounded to bf16 first it would be 6.499."""
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.921875, 1.7890625])
    qact, ascales = reference.quantize_act_int4(x, torch.ones(64))
    assert qact[0, :2].tolist() == [7, 7]
    assert ascales.dtype == torch.bfloat16 and 1.7890625 / ascales.item() < 6.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smoothing_divides_and_rounds_to_the_dtype_of_x(dtype):
    _, ascales = reference.quantize_act_int4(torch.ones(1, 64, dtype=dtype), torch.full((64,), 3.0))
    third = torch.tensor([1 / 3]).to(dtype).float()
    assert ascales.dtype == dtype
    assert torch.equal(ascales[0], (third * (1 / 7)).to(dtype))


def test_the_shift_comes_before_smoothing_and_is_rounded_too():
    x = torch.full((1, 64), -0.17, dtype=torch.bfloat16)
    x[0, 1] = 4.03125
    qact, ascales = reference.quantize_act_int4(x, torch.full((64,), 0.5), unsigned=True, shift=reference.SHIFT)
    shifted = torch.tensor(4.03125 + 11 / 64).bfloat16().float()
    assert shifted != 4.03125 + 11 / 64
    assert ascales.item() == (2 * shifted * (1 / 15)).bfloat16().item()
    assert qact[0, :3].tolist() == [0, 15, 0]


def test_nvfp4_ties():
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    x = torch.zeros(1, 16)
    x[0, :9] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -2.5])
    qact, ascales = reference.quantize_act_nvfp4(x, torch.ones(16))
    assert layout.e2m1(qact)[0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -2] and ascales.float().tolist() == [[1]]
    assert layout.e2m1(reference.to_e2m1(torch.tensor(grid))).tolist() == grid
    assert reference.to_e2m1(torch.tensor([-6.0, 7.0, -1e30])).tolist() == [15, 7, 15]


def test_e2m1_is_the_nearest_grid_value():
    values = torch.linspace(-6.5, 6.5, 4001)
    nearest = (values[:, None] - layout.E2M1).abs().amin(1)
    assert torch.equal((values - layout.e2m1(reference.to_e2m1(values))).abs(), nearest)


def test_nvfp4_scale_saturates():
    x = torch.full((1, 16), 1e5)
    qact, ascales = reference.quantize_act_nvfp4(x, torch.ones(16))
    assert ascales.float().item() == 448 and (qact == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_modes(dtype):
    x, smooth = random_x(33, 192, dtype), torch.rand(192) + 0.5
    x[2, 5] = 40
    z = x.double() / smooth.double()
    for quantize, top in ((reference.quantize_act_e4m3, 448), (reference.quantize_act_int8, 127)):
        q, scale = quantize(x, smooth)
        assert scale.shape == (33,) and scale.dtype == torch.float32
        torch.testing.assert_close(scale.double(), z.abs().amax(1) / top, rtol=2e-7, atol=0)
        assert (q.float().abs().amax(1) == top).all()
        error = (z - q.double() * scale.double()[:, None]).abs()
        # Half a step: int8 has one step, E4M3 has 3 bits of mantissa down to 2^-6 and steps of 2^-9 below.
        ulp = 1 if top == 127 else torch.maximum(2 ** (z / scale[:, None]).abs().log2().floor() / 8, torch.tensor(2.0 ** -9))
        assert (error <= ulp * scale[:, None] * (0.5 + 1e-5)).all()


def test_8_bit_modes_keep_the_shift():
    layer = random_layer("int4", unsigned=True)
    x = random_x(64, 192, unsigned=True)
    exact = reference.linear_weight_only(x, layer)
    errors = {act: rel_l2(reference.linear_w4a4(x, layer, act), exact) for act in (None, "e4m3", "int8")}
    # Measured 0.060, 0.021 and 0.010.
    assert errors[None] < 0.075 and errors["e4m3"] < 0.026 and errors["int8"] < 0.013


def test_quant_down_feeds_the_low_rank_branch_with_raw_x():
    x, smooth = random_x(9, 128), torch.full((128,), 0.25)
    down = torch.randn(128, 16).bfloat16()
    for precision, unsigned in (("int4", True), ("int4", False), ("nvfp4", False), ("e4m3", True), ("int8", True)):
        proj_act = reference.quant_down(x, smooth, down, precision=precision, unsigned=unsigned)[2]
        assert proj_act.dtype == torch.float32
        assert_close(proj_act, x.double() @ down.double(), FP32)


# Inputs that must not crash or spread

QUANTISERS = ["int4", "nvfp4", "e4m3", "int8"]


@pytest.mark.parametrize("precision", QUANTISERS)
def test_zero_tokens(precision):
    qact, ascales, _ = reference.quant_down(torch.zeros(3, 128).bfloat16(), torch.ones(128), torch.ones(128, 16),
                                            precision=precision)
    assert not qact.float().any() and not ascales.float().any()


@pytest.mark.parametrize("precision", QUANTISERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_token(precision, bad):
    weights = "nvfp4" if precision == "nvfp4" else "int4"
    layer = random_layer(weights)
    x = random_x(4, 192)
    clean = reference.linear_w4a4(x, layer, precision)
    x[1, 70] = bad
    y = reference.linear_w4a4(x, layer, precision)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])

    qact, ascales, _ = reference.quant_down(x, layer.smooth, layer.proj_down, precision=precision)
    if precision == "nvfp4" and bad == bad:
        assert ascales.float()[1, 4] == 448 and layout.e2m1(qact)[1, 70] == (6 if bad > 0 else -6)
    else:
        group = {"int4": slice(64, 128), "nvfp4": slice(64, 80)}.get(precision, slice(None))
        assert not qact.float()[1, group].any()
        assert (~ascales.float()[1].isfinite()).sum() == 1


@pytest.mark.parametrize("call, message", [
    (lambda: reference.quantize_act_int4(torch.zeros(2, 96), torch.ones(96)), r"quantize_act_int4: got x \[2, 96\].*K % 64"),
    (lambda: reference.quantize_act_nvfp4(torch.zeros(2, 24), torch.ones(24)), r"quantize_act_nvfp4: .*K % 16"),
    (lambda: reference.quant_down(torch.zeros(2, 64), torch.ones(64), torch.zeros(64, 0), precision="nvfp4", unsigned=True),
     r"quant_down: got precision nvfp4, unsigned True"),
    (lambda: reference.dequantize_weight(torch.zeros(128, 128, dtype=torch.int8), torch.zeros(2, 128), "int4"),
     r"dequantize_weight: got codes \[128, 128\] and scales \[2, 128\].*\[N, K/64\]"),
    (lambda: reference.dequantize_awq(torch.zeros(32, 128, dtype=torch.uint8), torch.zeros(2, 32), torch.zeros(2, 32)),
     r"dequantize_awq: got codes \[32, 128\] and scales \[2, 32\]"),
])
def test_errors_say_what_is_needed(call, message):
    with pytest.raises(ShapeError, match=message):
        call()


# Prologue and epilogues, against torch's own operators in float64

def test_modulated():
    x, (scale, shift) = random_x(6, 192).view(2, 3, 192), torch.randn(2, 2, 192)
    want = layer_norm(x.double(), (192,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert_close(reference.modulated(x.float(), scale, shift), want, FP32)
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    want = layer_norm(x.double(), (192,), eps=1e-6) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    got = reference.modulated(x, scale, shift)
    assert got.dtype == x.dtype
    assert_close(got, want, 4e-3)   # three roundings to bf16
    n, by = layer_norm(x.float(), (192,), eps=1e-6).to(x.dtype).float(), (1 + scale.float()).to(x.dtype).float()
    assert torch.equal(got, (n * by[:, None] + shift.float()[:, None]).to(x.dtype))


def test_gate_residual():
    y, residual, gate, addend = random_x(4, 128, torch.float32).view(4, 1, 128).expand(4, 4, 128)
    assert torch.equal(reference.gate_residual(y, residual, gate[0]), residual + gate[0] * y)
    assert torch.equal(reference.gate_residual(y, residual, gate, addend), residual + gate * (y + addend))


def test_qk_norm_rope():
    M, heads = 5, 3
    qkv, angle = torch.randn(M, 3 * heads * 128), torch.randn(M, 64)
    norms = torch.randn(2, 128)
    got = reference.qk_norm_rope(qkv, *norms, turns(angle.cos(), angle.sin()))
    q, k, v = qkv.double().view(M, 3, heads, 128).unbind(1)
    turn = torch.polar(torch.ones(M, 1, 64).double(), angle.double()[:, None])
    want = [torch.view_as_real(torch.view_as_complex(rms_norm(x, (128,), norm.double(), 1e-6).view(M, heads, 64, 2)) * turn)
            for x, norm in zip((q, k), norms)]
    want = torch.cat((*(x.flatten(1) for x in want), v.flatten(1)), 1)
    assert_close(got, want, FP32)
    assert torch.equal(got[:, 2 * heads * 128:], qkv[:, 2 * heads * 128:])


def test_qk_norm_rope_takes_any_matrix():
    qkv, rotation = torch.randn(2, 3 * 128), torch.randn(2, 64, 2, 2)
    got = reference.qk_norm_rope(qkv, torch.ones(128), torch.full((128,), 2.0), rotation, eps=0.5)
    for part, factor in ((0, 1), (1, 2)):
        x = qkv[:, 128 * part:128 * (part + 1)].double()
        x = factor * x / (x.square().mean(1, keepdim=True) + 0.5).sqrt()
        want = torch.einsum("mirc,mic->mir", rotation.double(), x.view(2, 64, 2)).flatten(1)
        assert_close(got[:, 128 * part:128 * (part + 1)], want, FP32)


def test_gelu_tanh():
    y = torch.linspace(-12, 12, 2001)
    want = torch.nn.functional.gelu(y.double(), approximate="tanh")
    torch.testing.assert_close(reference.gelu_tanh(y).double(), want, rtol=2e-6, atol=1e-9)
    assert reference.gelu_tanh(y).min() > -reference.SHIFT


def test_gelu_quant_down_shifts_int4_only():
    y = random_x(8, 128, torch.float32)
    smooth, down = torch.ones(128).bfloat16(), torch.randn(128, 16).bfloat16()
    h = reference.gelu_tanh(y).bfloat16()
    for precision, act in (("int4", None), ("int4", "e4m3"), ("nvfp4", None), ("nvfp4", "e4m3")):
        got = reference.gelu_quant_down(y, smooth, down, precision, act=act)
        want = reference.quant_down(h, smooth, down, precision=act or precision, unsigned=precision == "int4")
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))


# An independent implementation

@pytest.fixture(scope="module")
def kitchen():
    return pytest.importorskip("comfy_kitchen.backends.eager.svdquant", reason="comfy-kitchen is not installed")


@pytest.mark.parametrize("dtype, flips", [
    (torch.float32, 1e-4),    # m * fp32(1/7) against m / 7: one code in 1e5 sits on a boundary
    (torch.bfloat16, 1e-2),   # kitchen divides by the scale already rounded to bf16: measured 5e-3 and 7e-3
])
@pytest.mark.parametrize("unsigned", [False, True])
def test_kitchen_quantises_alike(kitchen, dtype, flips, unsigned):
    layer = random_layer("int4", K=512)
    x = random_x(64, 512, dtype, unsigned)
    shift = reference.SHIFT if unsigned else 0
    theirs = kitchen.quantize_svdquant_w4a4(x + shift, layer.smooth.to(dtype), layer.proj_down, 1, unsigned, lora_x=x)
    qact, ascales, proj_act = reference.quant_down(x, layer.smooth, layer.proj_down, precision="int4", unsigned=unsigned)
    unpack = kitchen._unpack_uint4_row_major if unsigned else kitchen._unpack_int4_row_major
    difference = (unpack(theirs[0]).int() - qact.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() <= flips
    torch.testing.assert_close(ascales, theirs[1].t(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert_close(proj_act, theirs[2], FP32)


@pytest.mark.parametrize("unsigned", [False, True])
def test_kitchen_multiplies_alike(kitchen, unsigned):
    layer = random_layer("int4", K=512, unsigned=unsigned)
    x = random_x(64, 512, torch.float32, unsigned)
    qact, ascales, proj_act = reference.quant_down(x, layer.smooth, layer.proj_down, precision="int4", unsigned=unsigned)
    pack = kitchen._pack_int4_row_major
    theirs = kitchen.scaled_mm_svdquant_w4a4(
        pack(qact), pack(layer.codes), ascales.t(), layer.wscales.float().t(), proj_act, layer.proj_up.float(),
        layer.bias.float(), unsigned)
    assert_close(reference.linear_w4a4(x, layer), theirs, FP32)


def test_kitchen_multiplies_awq_alike(kitchen):
    from comfy_kitchen.backends.eager.awq import gemv_awq_w4a16
    torch.manual_seed(2)
    codes = torch.randint(0, 16, (24, 192)).to(torch.uint8)
    wscales, wzeros, bias = torch.rand(24, 3), torch.randn(24, 3), torch.randn(24)
    x = random_x(2, 192, torch.float32)
    # Kitchen counts codes from 8: (u - 8) * scale + zero.
    theirs = gemv_awq_w4a16(x, kitchen._pack_int4_row_major(codes), wscales.t(), (wzeros + 8 * wscales).t(), bias)
    assert_close(reference.awq_gemv(x, codes, wscales, wzeros, bias), theirs, FP32)
