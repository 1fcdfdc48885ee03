"""The modulations of all blocks in one launch: they read the same vector, and one by one each would wait for the one before.

The first block of a step has its own alone, because caches of whole steps run no other; the second has those of all that follow
computed, too.

Test: tests/comfy/inprocess/checks_modulations.py
"""

import torch
from comfy.ldm.flux import layers
from torch.nn import functional

from .layer import SVDQLinear


class Modulations:
    """What the modulations of a model make of the vector of now.

    modules   comfy.ldm.flux.layers.Modulation, in the order in which blocks ask for them
    is_plain  (module) -> whether calling it does what ComfyUI wrote, with a quantised linear, and nothing else
    """

    def __init__(self, modules, is_plain):
        self.order, self.is_plain, self._vec, self._made = list(modules), is_plain, None, {}

    def __reduce__(self):
        """A copy of a block shall not copy the rest of its model."""
        return Modulations, ((), self.is_plain)

    @torch.compiler.disable
    def of(self, modules, vec, ahead):
        """[module(vec)] of the modules of a block, a list.

        vec     [B, channels] or [B, 1, channels]
        ahead   whether later blocks of the step ask for the same tensor with the same numbers in it
        """
        if not all(map(self.is_plain, modules)):
            return [module(vec) for module in modules]
        if vec is not self._vec:
            self._vec, self._made = vec, {}
        if not all(module in self._made for module in modules):
            wanted = modules
            if ahead and self._made and modules[0] in self.order:
                wanted = list(filter(self.is_plain, self.order[self.order.index(modules[0]):]))
            x = functional.silu(vec if vec.ndim == 3 else vec[:, None])
            self._made |= zip(wanted, SVDQLinear.forward_all([module.lin for module in wanted], x))
        outs = [self._made[module].chunk(module.multiplier, dim=-1) for module in modules]
        if modules[-1:] == self.order[-1:]:
            self._vec, self._made = None, {}
        return [(layers.ModulationOut(*out[:3]), layers.ModulationOut(*out[3:]) if module.is_double else None)
                for module, out in zip(modules, outs)]
