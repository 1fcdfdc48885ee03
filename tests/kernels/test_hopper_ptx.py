"""The Hopper kernels from their own PTX for sm_90a: inline assembly, constraints and descriptors as nvcc left them.

Shapes, layouts and expectations are those of test_hopper.py; what ptxas makes of the PTX is left to a GPU.
"""

from functools import cache

import pytest
import torch
from svdq_pack.kernels.variants.w4a8_sm90 import STAGED, quant_fp8_outputs
from svdq_pack.tests.kernels import test_emulated as emulated
from svdq_pack.tests.kernels import test_hopper as hopper
from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.ptx_interpreter import Fault, Module

pytestmark = toolchain.needs_nvcc


@cache
def module(source):
    return Module(toolchain.ptx(toolchain.KERNELS / source if source.endswith(".cuh") else source, "sm_90a"))


def array(tensor):
    """The memory of a tensor as numpy, floats as their bits."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def constant(tensor):
    if tensor is None or not tensor.numel():
        return 0
    result = array(tensor.contiguous())
    result.flags.writeable = False
    return result


def quant(layer, x, mode, order="forward", source="quant_fp8.cuh"):
    outputs = quant_fp8_outputs(x, layer.R, mode == "group")
    for output in outputs:
        output.view(torch.uint8).fill_(0x7e)                                    # what is not written shows
    name = f"quant_fp8_{hopper.KINDS[x.dtype]}_{mode}_{'u' if layer.unsigned else 's'}_r{32 if layer.R <= 32 else 128}"
    module(source).launch(name, outputs[0].shape[0], 256, 0,
                          [constant(x), constant(layer.fp8.inverse), constant(layer.fp8.proj_down),
                           *(array(output) if output.numel() else 0 for output in outputs), *x.shape, layer.R, x.shape[1]],
                          order)
    return outputs


def gemm(layer, quantised, out, cluster=1, ctas=2, accumulate=False, order="forward", source="gemm_fp8.cuh", fp8_bits=None,
         epilogue=None):
    kind, residual, ldr, *operands, eps = hopper.last_arguments(epilogue)
    mode, width = "group" if quantised[1].ndim == 5 else "token", "w8" if layer.fp8.wide else "w4"
    module(source).launch(f"gemm_fp8_{hopper.KINDS[out.dtype]}_{mode}_{width}_c{cluster}", ctas, 384,
                          STAGED[layer.fp8.qweight.shape[2]],
                          [constant(quantised[0]), constant(quantised[1]), constant(layer.fp8.qweight),
                           constant(layer.fp8.wscales), constant(quantised[2]), constant(layer.fp8.proj_up),
                           constant(layer.packed["bias"]), array(out), out.shape[0], layer.N, layer.K, layer.R, out.shape[1],
                           int(accumulate), kind, constant(residual), ldr, *map(constant, operands), eps],
                          order, cluster=cluster, fp8_bits=fp8_bits)
    return out


@hopper.MODES
@hopper.UNSIGNED
@hopper.DTYPES
@pytest.mark.parametrize("tokens, rank, order", [(21, 32, "forward"), (16, 48, "reverse")])
def test_quant(tokens, rank, order, dtype, unsigned, mode):
    layer = hopper.Layer(rank, dtype, unsigned, rows=128, columns=640)          # more groups than warps
    x = layer.x(tokens)
    hopper.check_quant(layer, x, mode, quant(layer, x, mode, order))


@hopper.MODES
@hopper.DTYPES
@pytest.mark.parametrize("rows, columns, tokens, rank, cluster, ctas, wide, order", [
    (128, 128, 17, 16, 1, 1, False, "forward"),         # half a tile, one step
    (384, 768, 20, 32, 2, 2, False, 1),                 # a pair, more steps than stages
    (128, 128, 3, 0, 1, 1, True, "reverse")])
def test_gemm(rows, columns, tokens, rank, cluster, ctas, wide, order, dtype, mode):
    layer = hopper.Layer(rank, dtype, rows=rows, columns=columns, wide=wide)
    quantised = hopper.quant(layer, layer.x(tokens), mode)
    want, size = hopper.exact(layer, quantised)
    out = gemm(layer, quantised, torch.full((tokens, rows), float("nan"), dtype=dtype), cluster, ctas, order=order)
    emulated.assert_rounded(out, want[:tokens], size[:tokens], "out")


@hopper.MODES
@hopper.DTYPES
@hopper.EPILOGUES
@pytest.mark.parametrize("tokens, cluster, ctas, order", [(1, 1, 1, "forward"), (15, 2, 2, 1), (17, 1, 2, "reverse"),
                                                          (129, 2, 2, "forward")])
def test_epilogue(tokens, cluster, ctas, order, kind, dtype, mode):
    layer = hopper.Layer(16, dtype, rows=384, columns=128)
    quantised, epilogue = hopper.quant(layer, layer.x(tokens), mode), hopper.epilogue_of(kind, tokens, 384, dtype)
    before = torch.randn(tokens, 384, generator=torch.Generator().manual_seed(9)).to(dtype) if "+=" in kind else None
    out = torch.full((tokens, 384), float("nan"), dtype=dtype) if before is None else before.clone()
    gemm(layer, quantised, out, cluster, ctas, before is not None, order, epilogue=epilogue)
    y, size = hopper.exact(layer, quantised)
    want, size = hopper.finished(epilogue, y[:tokens], size[:tokens], before)
    emulated.assert_rounded(out, want, size, kind)


def test_low_saturates_in_fp16():
    hopper.check_saturation_of_low("token", quant)


def test_both_emulators_agree():
    """To the bit, also where sums are cut as Hopper cuts them."""
    layer = hopper.Layer(16, rows=256, columns=256)
    quantised = hopper.quant(layer, layer.x(9), "token")
    for bits in (0, 13):
        ours = hopper.gemm(layer, quantised, torch.zeros(9, 256, dtype=layer.dtype), fp8_bits=bits)
        theirs = gemm(layer, quantised, torch.zeros(9, 256, dtype=layer.dtype), fp8_bits=bits or None)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("words, with_cluster", [
    ("px::wgmma_fence();", 1), ("px::mbarrier_wait(&shared.full[at.stage], at.parity);", 1), ("px::mbarrier_fence();", 1),
    ("px::mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);", 1), ("px::barrier_of(1 + group_of_warps, 128);", 1),
    ("px::mbarrier_wait(&shared.full[turning.stage], turning.parity);", 1), ("px::cluster_barrier();", 2)])
def test_nothing_to_spare(words, with_cluster):
    """The first of each taken out."""
    source = hopper.first_shells("gemm_fp8.cuh", words)
    layer = hopper.Layer(16, rows=384 if with_cluster == 2 or "turning" in words else 128, columns=768)
    epilogue = hopper.epilogue_of("qkv" if "turning" in words else "gated", 5, layer.N, layer.dtype)
    quantised = hopper.quant(layer, layer.x(5), "token")
    with pytest.raises(Fault):
        for order in ("forward", "reverse", 1):
            gemm(layer, quantised, torch.zeros(5, layer.N, dtype=layer.dtype), with_cluster, with_cluster, order=order,
                 source=source, epilogue=epilogue)
