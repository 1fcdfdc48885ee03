"""W4A4 on sm_80, 86 and 89, whose tensor cores multiply 4-bit integers: two kernels, which read the file's order.

    quant_down   x -> int4 codes, scales, x @ proj_down          cuda/quant_down.cuh
    gemm_w4a4    those and the weight -> out                      cuda/gemm_w4a4.cuh

Test: tests/kernels/families/test_w4a4_sm80.py
"""

from .. import mlp, w4a4
from ..variant import HALVES, LATER, Variant

DTYPES = tuple(HALVES)
LIBRARY = w4a4.library("w4a4_sm80", "quant_down.cuh", "gemm_w4a4.cuh", "adaln_int4.cuh", DTYPES,
                       more=mlp.kernels("mlp_w4a4.cuh", mlp.SIGNS))
quant_down, gemm_w4a4, _FUSED = w4a4.operators(LIBRARY, DTYPES)
RINGS = {"": 3 * w4a4.STAGE}
mlp_w4a4, _FUSED["feeds"] = mlp.operators(LIBRARY, "mlp_w4a4.cuh", RINGS, w4a4.quant_down_outputs, mlp.SIGNS)

VARIANTS = (
    Variant("w4a4_sm80", "fused W4A4 kernels", device=("cuda", (8, 0), (8, 9)), preference=20, rivals="w4a4", **_FUSED),
    # Later GPUs run the same kernels through the compiler's emulation of the 4-bit MMA: right, and slow.
    Variant("w4a4_emulated", "fused W4A4 kernels, 4-bit MMA emulated by the compiler", device=("cuda", (8, 0), LATER),
            on_request=True, **_FUSED))
