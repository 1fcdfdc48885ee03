"""Weights dequantised in chunks and multiplied in the dtype of x: any device, any precision, no activation rounded.

Test: tests/unit/test_ops.py
"""

from ..variant import Variant
from ..weights import PRECISIONS, chunks


def prepare(x, weight):
    return weight.smoothed(x)


def product(x, weight, out, bias, accumulate, epilogue=None):
    if not accumulate:
        out.zero_()
    if bias is not None:
        out += bias
    for rows in chunks(*weight.shape):
        out[:, rows].addmm_(x, weight.cut(rows.start, rows.stop).dense(x.dtype).t())


VARIANTS = (Variant("weight_only", "weights dequantised in chunks, 16-bit matmul", prepare, product,
                    precisions=PRECISIONS, max_rank=0, last_resort=True),)
