"""reference.py as variants: the specification itself, in fp32 torch on any device, on request for tests and comparisons.

Test: tests/unit/test_ops.py
"""

from functools import partial

import torch

from .. import reference
from ..variant import Variant


def prepare(x, weight, act=None):
    """(quant_down's results, the logical layer): activations are quantised from 16 bit."""
    half = x.to(torch.bfloat16) if x.dtype == torch.float32 else x
    layer = weight.logical()
    return reference.quant_down(half, layer.smooth, layer.proj_down, precision=act or layer.precision,
                                unsigned=layer.unsigned), layer


def product(prepared, weight, out, bias, accumulate, epilogue=None):
    (qact, ascales, proj_act), layer = prepared
    _store(reference.gemm_w4a4(qact, ascales, layer.codes, layer.wscales, proj_act, layer.proj_up, bias,
                               precision=layer.precision, wcscales=layer.wcscales, wtscale=layer.wtscale), out, accumulate)


def awq_product(x, weight, out, bias, accumulate, epilogue=None):
    _store(x.float() @ weight.dense(torch.float32).t() + (0 if bias is None else bias.float()), out, accumulate)


def _store(y, out, accumulate):
    y = y.to(out.dtype)
    out.add_(y) if accumulate else out.copy_(y)


def _row(how, precisions, activations, prepare=prepare, product=product):
    return Variant("reference", how, prepare, product, precisions, activations, on_request=True)


VARIANTS = (
    _row("4-bit activations in fp32 torch", ("int4",), "int4"),
    _row("4-bit activations in fp32 torch", ("nvfp4",), "nvfp4"),
    _row("8-bit activations in fp32 torch", ("int4", "nvfp4"), "e4m3", partial(prepare, act="e4m3")),
    _row("fp32 torch", ("awq",), None, lambda x, weight: x, awq_product))
