"""Golden bf16 files at fp16: cast as at load, through every variant whose kernels want scales of x's dtype."""

import pytest

from svdq_pack.svdq.kernels import check, layout, registry
from svdq_pack.svdq.kernels.weights import AWQWeight, W4A4Weight, cast, dequantize
from svdq_pack.tests.kernels.executors import on
from svdq_pack.tests.kernels.families.layers import FP16

LINEARS = {"int4": ("linear_int4_r32", "linear_int4_unsigned_fc2_r16", "linear_int4_nobias_r16"),
           "nvfp4": ("linear_nvfp4_wtscale_r32", "linear_nvfp4_wcscales_qkv_r16"), "awq": ("awq_plain_k1024",)}
CASES = [(variant, name) for variant in registry.VARIANTS for precision in variant.precisions for name in LINEARS[precision]
         if variant.same_dtype and FP16 in variant.dtypes and not variant.on_request]


def layer(tensors, precision, unsigned):
    """(weight, bias in plain order) of a golden linear, as in its file."""
    packed = {name.removeprefix("packed."): value for name, value in tensors.items() if name.startswith("packed.")}
    if precision == "awq":
        groups = packed["qweight"].shape[1] * 2 // 64
        return AWQWeight(packed["qweight"], packed["wscales"][:groups], packed["wzeros"][:groups]), packed["bias"]
    wtscale = packed.get("wtscale")
    return W4A4Weight(precision, unsigned, *(packed.get(name) for name in (
        "qweight", "wscales", "smooth", "lora_down", "lora_up", "wcscales")), 1.0 if wtscale is None else float(wtscale)), \
        layout.unpack_vector(packed["bias"])


@pytest.mark.parametrize("variant, name", CASES, ids=lambda value: getattr(value, "name", value))
@on(emulator=True, gpu=True)
def test_golden_linear(executor, variant, name, golden):
    """By the figures of check.py against the file's own numbers, which the cast has not changed: each half against float64 on
    the same operands, the whole against the layer with its activations rounded."""
    tensors = golden(name)
    precision = next(kind for kind in variant.precisions if name in LINEARS[kind])
    file, bias = layer(tensors, precision, "unsigned" in name)
    weight, bias, x = cast(file, FP16), bias.to(FP16), layout.pad(tensors["io.x"], 1, file.shape[1]).to(FP16)
    x = x[:variant.max_rows]
    (dense, shift), (want, wanted_shift) = dequantize(weight), dequantize(file)
    assert (dense - want).norm() <= 1e-6 * want.norm() and (shift - wanted_shift).abs().max() <= 1e-6
    packed = executor.put(weight) if variant.layout is None else variant.layout.pack(executor.put(weight))
    out = executor.put(x.new_zeros(len(x), file.shape[0]))
    variant.run(executor.put(x), packed, out, executor.put(bias))
    out, checks = out.cpu(), check.check_linear(variant, x, file, bias, out.cpu())
    if variant.decode is not None:
        prepared = tuple(part.cpu() for part in variant.prepare(executor.put(x), packed))
        checks += check.check_prepared(variant, x, file, prepared) + check.check_product(variant, prepared, file, bias, out)
    print(variant.name, name, *checks, sep="; ")
    assert all(each.passed for each in checks), checks
    assert executor.launched
