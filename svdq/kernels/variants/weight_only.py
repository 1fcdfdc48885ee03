"""Weights dequantised in chunks and multiplied in the dtype of x: any device, any precision, no activation rounded.

Test: tests/unit/test_ops.py
"""

import torch

from ..variant import Variant
from ..weights import PRECISIONS, chunks, scratch


def prepare(x, weight):
    return weight.smoothed(x)


def product(x, weight, out, bias, accumulate, epilogue=None):
    if accumulate and bias is not None:
        out += bias
    for rows in chunks(*weight.shape):
        part, into = weight.cut(rows.start, rows.stop), out[:, rows]
        dense = part.dense(x.dtype, scratch(x, part.shape, x.dtype)).t()
        if accumulate:
            into.addmm_(x, dense)
        elif bias is None:
            torch.mm(x, dense, out=into)
        else:
            torch.addmm(bias[rows], x, dense, out=into)


VARIANTS = (Variant("weight_only", "weights dequantised in chunks, 16-bit matmul", prepare, product,
                    precisions=PRECISIONS, max_rank=0, last_resort=True, weight_only=True),)
