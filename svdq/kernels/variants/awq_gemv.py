"""W4A16 modulation for up to 8 rows on every GPU since sm_75: one kernel, which reads the file's order.

Test: tests/kernels/families/test_awq_gemv.py
"""

import torch

from .. import launch
from ..build import Library
from ..errors import ShapeError
from ..launch import Structs, Written
from ..rows import aligned, row_blocks
from ..variant import HALVES, LATER, Variant

MAX_BATCH = 8               # rows of x
MAX_LAYERS = 80             # layers of one launch: awq_gemv.cuh

LIBRARY = Library("awq_gemv", {"awq_gemv.cuh": tuple(f"awq_gemv_{half}_{rows}" for half in HALVES.values()
                                                     for rows in ("b1", "b8"))})


@torch.library.custom_op("svdq::awq_gemv", mutates_args=())
def awq_gemv(x: torch.Tensor, qweights: list[torch.Tensor], wscales: list[torch.Tensor], wzeros: list[torch.Tensor],
             biases: list[torch.Tensor]) -> list[torch.Tensor]:
    """Modulation: [x * W + bias for every layer], one launch for all layers that read the same x.

    x [batch, K] bf16 | fp16 contiguous, batch <= 8; per layer qweight [N/4, K/2] int32, wscales and wzeros [K/64, N]
    x.dtype, bias [N] x.dtype; `biases` may be empty. Returns [batch, N] x.dtype per layer, channels in stored order.

    Spec: reference.awq_gemv. Source: checkpoint-format 5.7, 6.8.
    """
    batch, k = launch.check_x("awq_gemv", x, 64, 4)
    if batch > MAX_BATCH or len(qweights) > MAX_LAYERS or not x.is_contiguous() or x.data_ptr() % 16:
        raise ShapeError(f"awq_gemv: x is {list(x.shape)}, strides {x.stride()}, for {len(qweights)} layers. Needs a "
                         f"contiguous, 16-byte aligned x of at most {MAX_BATCH} rows and at most {MAX_LAYERS} layers; "
                         "clone x or split the call.")
    if not len(qweights) == len(wscales) == len(wzeros) or len(biases) not in (0, len(qweights)):
        raise ShapeError(f"awq_gemv: got {len(qweights)} qweights, {len(wscales)} wscales, {len(wzeros)} wzeros and "
                         f"{len(biases)} biases. Needs one of each per layer, biases also none at all.")
    outputs = awq_gemv_outputs(x, qweights)
    layers = []
    for i, (qweight, scales, zeros) in enumerate(zip(qweights, wscales, wzeros)):
        n, bias = qweight.shape[0] * 4, biases[i] if biases else None
        launch.check("awq_gemv", x, qweight=(qweight, (n // 4, k // 2), torch.int32),
                     wscales=(scales, (k // 64, n), x.dtype), wzeros=(zeros, (k // 64, n), x.dtype))
        launch.check("awq_gemv", x, 4, bias=(bias, (n,), x.dtype))
        layers.append([qweight, scales, zeros, bias, Written(outputs[i]), n])       # awq_gemv::Layer
    if batch and qweights:
        widest = max(output.shape[1] for output in outputs)
        launch.launch(LIBRARY, x, f"awq_gemv_{HALVES[x.dtype]}_{'b1' if batch == 1 else 'b8'}",
                      (row_blocks(widest, 32), len(qweights)), 256,
                      [x, Structs(layers, MAX_LAYERS), batch, k])
    return outputs


@awq_gemv.register_fake
def _(x, qweights, wscales, wzeros, biases):
    return awq_gemv_outputs(x, qweights)


def awq_gemv_outputs(x, qweights):
    return [x.new_empty(x.shape[0], qweight.shape[0] * 4) for qweight in qweights]


def prepare(x, weight):
    return aligned(x, 16).contiguous()


def product(x, weight, out, bias, accumulate, epilogue=None):
    y, = awq_gemv(x, [weight.qweight], [weight.wscales], [weight.wzeros], [] if bias is None else [bias])
    out.add_(y) if accumulate else out.copy_(y)


def products(x, weights, biases):
    x, outs = prepare(x, None), []
    for first in range(0, len(weights), MAX_LAYERS):
        some = weights[first:first + MAX_LAYERS]
        outs += awq_gemv(x, [weight.qweight for weight in some], [weight.wscales for weight in some],
                         [weight.wzeros for weight in some], biases[first:first + MAX_LAYERS])
    return outs


VARIANTS = (
    Variant("awq_gemv", "fused W4A16 kernel", prepare, product, precisions=("awq",), device=("cuda", (7, 5), LATER),
            dtypes=tuple(HALVES), library=LIBRARY, same_dtype=True, max_rows=MAX_BATCH, products=products, preference=10),)
