"""Steps of a FLUX block with modulation, norms, rotary embedding, GELU, gates and residuals inside the linears' kernels.

A layer is anything that has `run_tiles` and `hidden`, see svdq/layer.py. Which layers, norms and tensors these are, and whether
a block may take them, hosts say: nodes/host/blocks.py, svdq/hf/blocks.py. Gates and rotations are those of one batch item, so
products with them are one per item.

    x, residual, out     [B, tokens, K or N]        scale, shift, gate   [B, 1, K or N]

Test: tests/unit/test_layer.py, and through the hosts
"""

import logging
from functools import cache

import torch

from .kernels import epilogues
from .kernels.prologues import Modulated

log = logging.getLogger(__name__)


@cache
def announce():
    log.info("SVDQ: the blocks of this model run fused: norms, rotary embedding, GELU and gates inside the kernels")


def modulated(x, scale, shift, eps):
    """[LayerNorm(x) * (1 + scale) + shift of each item, as a Modulated]"""
    return [Modulated(*given, eps) for given in zip(x, scale, shift)]


def qkv_jobs(x, out, query, key, rotations, eps):
    """Jobs of run_tiles: x of each item -> out [B, tokens, 3 * heads * 128], q and k normed, and rotated by rotations
    [B, tokens, 64, 2, 2], see epilogues.QKV."""
    return [(0, *job, epilogues.QKV(query, key, rotation, eps)) for *job, rotation in zip(x, out, rotations)]


def gelu_jobs(tile, x, out):
    """Jobs of run_tiles: x of each item -> layer.Hidden of each."""
    return [(tile, *job, epilogues.Gelu()) for job in zip(x, out)]


def hidden(layer, place, x):
    """[layer.Hidden for each item of x] on its way to the tile of a layer at (row, col)."""
    return [layer.hidden(place, x.shape[1], x) for _ in x]


def gated(layer, x, out, residual, gate):
    """out = residual + gate * layer(x), out being residual or memory of its own. x: of each item, numbers or Hidden"""
    layer.run_tiles([(0, *job, epilogues.Gated(*of)) for *job, of in zip(x, out, zip(residual, gate.squeeze(1)))])


def add_mlps(run, *streams):
    """x += gate * second(GELU(first(normed))) of each stream (first, second, normed, x, gate), normed being x of each item,
    normed and modulated.

    run   ([(layer, jobs)]) -> None: the host's run_together
    """
    between = [hidden(second, (0, 0), x) for _, second, _, x, _ in streams]
    run([(first, gelu_jobs(0, normed, outs)) for (first, _, normed, _, _), outs in zip(streams, between)])
    for (_, second, _, x, gate), ins in zip(streams, between):
        gated(second, ins, x, x, gate)


def gated_sum(layer, attn, mlp, x, gate):
    """x + gate * layer([attn, mlp]), the two column tiles of a layer one after the other. x itself stays as it is."""
    out = torch.empty_like(x)
    layer.run_tiles([(0, attn.flatten(0, 1), out.flatten(0, 1), None),
                     *((1, *job, epilogues.Gated(*of)) for *job, of in zip(mlp, out, zip(x, gate.squeeze(1))))])
    return out
