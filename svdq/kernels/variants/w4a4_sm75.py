"""W4A4 on sm_75 (RTX 20, T4, Quadro RTX, TITAN RTX), fp16 only: two kernels, which read the file's order.

    quant_down_sm75   x -> int4 codes, scales, x @ proj_down          cuda/quant_down_sm75.cuh
    gemm_w4a4_sm75    those and the weight -> out                      cuda/gemm_w4a4_sm75.cuh
    mlp_w4a4_sm75     the same -> GELU -> codes of the next layer      cuda/mlp_w4a4_sm75.cuh

GTX 16 and its relatives run them, too, without tensor cores: some fifty times slower, so that they never get them.

Test: tests/kernels/families/test_w4a4_sm75.py
"""

import torch

from .. import mlp, w4a4
from ..variant import Variant

DTYPES = (torch.float16,)
LIBRARY = w4a4.library("w4a4_sm75", "quant_down_sm75.cuh", "gemm_w4a4_sm75.cuh", "adaln_int4_sm75.cuh",
                       DTYPES, more=mlp.kernels("mlp_w4a4_sm75.cuh", mlp.SIGNS, DTYPES, low="mlp_low_sm75.cuh"))
quant_down_sm75, gemm_w4a4_sm75, _FUSED = w4a4.operators(LIBRARY, DTYPES)
RINGS = {"": 2 * w4a4.STAGE}
mlp_w4a4_sm75, _FUSED["feeds"] = mlp.operators(LIBRARY, "mlp_w4a4_sm75.cuh", RINGS, w4a4.quant_down_outputs, mlp.SIGNS)

VARIANTS = (
    Variant("w4a4_sm75", "fused W4A4 kernels", device=("cuda", (7, 5), (7, 5)), tensor_cores=True, preference=20,
            **_FUSED),)
