"""The modulations of all blocks in one launch: they read the same vector, and one by one each would wait for the one before.

The first block of a step has its own alone, because caches of whole steps run no other; the second has those of all that follow
computed, too, up to one that is hooked: whoever hooks it may change the vector where it lies.

Test: tests/comfy/inprocess/checks_modulations.py
"""

from itertools import takewhile
from weakref import ref

import torch
from comfy.ldm.flux import layers
from torch.nn import functional

from .layer import SVDQLinear


class Modulations:
    """What the modulations of a model make of the vector of now.

    blocks    that ask for theirs, in this order, with `modulation_modules`: comfy.ldm.flux.layers.Modulation
    is_plain  (block) -> whether what becomes of the vector there is what ComfyUI wrote, with quantised linears
    """

    def __init__(self, blocks, is_plain):
        self._blocks, self.is_plain, self._vec, self._made = [ref(block) for block in blocks], is_plain, None, {}

    def __reduce__(self):
        """A copy of a block shall not copy the rest of its model."""
        return Modulations, ((), self.is_plain)

    @property
    def blocks(self):
        """Those that still live: they have this object, not it them."""
        return [block for each in self._blocks if (block := each()) is not None]

    @torch.compiler.disable
    def of(self, block, vec, ahead):
        """[module(vec)] of the modules of a block, a list.

        vec     [B, channels] or [B, 1, channels]
        ahead   whether later blocks of the step ask for the same tensor with the same numbers in it
        """
        modules, blocks = block.modulation_modules, self.blocks
        captured = vec.is_cuda and torch.cuda.is_current_stream_capturing()         # and so replayed with other numbers
        if captured or not self.is_plain(block):
            self._made, outs = {}, [module(vec) for module in modules]
        else:
            outs = self._outs(modules, vec, takewhile(self.is_plain, blocks[blocks.index(block):])
                              if ahead and vec is self._vec and block in blocks else [block])
        if blocks[-1:] == [block]:
            self._vec, self._made = None, {}
        return outs

    def _outs(self, modules, vec, blocks):
        """What `of` returns; where it is not there yet, for all these blocks in one go."""
        if vec is not self._vec:
            self._vec, self._made = vec, {}
        if not all(module in self._made for module in modules):
            wanted = [module for block in blocks for module in block.modulation_modules]
            x = functional.silu(vec if vec.ndim == 3 else vec[:, None])
            self._made |= zip(wanted, SVDQLinear.forward_all([module.lin for module in wanted], x))
        outs = [self._made[module].chunk(module.multiplier, dim=-1) for module in modules]
        return [(layers.ModulationOut(*out[:3]), layers.ModulationOut(*out[3:]) if module.is_double else None)
                for module, out in zip(modules, outs)]
