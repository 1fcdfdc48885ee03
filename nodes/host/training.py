"""ComfyUI's own 'Train LoRA' on an SVDQ model.

That node asks a layer's weight for its shape to make an adapter, and packed bytes have none that would do: `teach` puts a
function around the node's own, for the whole process, which changes nothing for other models. Everything else of training is
ComfyUI's: adapters as hooks around a layer or on its weight as numbers, checkpointing, offloading, the file.

Test: tests/comfy/inprocess/checks_training.py
"""

import functools
import sys
from typing import NamedTuple

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

from ...svdq.errors import LoraError
from .layer import SVDQLinear

_NODE, _FUNCTION = "TrainLoraNode", "_create_weight_adapter"


class _Shaped(NamedTuple):
    """What stands for a layer where only the shape of its weight is asked for."""
    weight: "_Weight"


class _Weight(NamedTuple):
    shape: torch.Size
    device: torch.device

    def dim(self):
        return len(self.shape)


def teach():
    """Let ComfyUI's training node, where there is one, make adapters for our layers."""
    node = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(_NODE)
    scope = getattr(getattr(node, "execute", None), "__globals__", {})
    create = scope.get(_FUNCTION)
    if create is None or hasattr(create, "svdq"):
        return

    @functools.wraps(create)
    def with_our_layers(module, *args, **kwargs):
        if isinstance(module, SVDQLinear) and module.quantised:
            shape = torch.Size((module.out_features, module.in_features))
            module = _Shaped(_Weight(shape, module.weight.device))
        return create(module, *args, **kwargs)

    with_our_layers.svdq = True
    scope[_FUNCTION] = with_our_layers


def refuse(layer, wrapper):
    """Raise LoraError where a training node takes a layer's bytes for numbers to train: it asks for shapes in a way that
    `teach` does not know."""
    trained = getattr(wrapper, "bias", None)
    if isinstance(trained, torch.Tensor) and trained.shape == layer.weight.shape:
        raise LoraError("this ComfyUI trains LoRAs in a way this pack does not know yet, so not on a 4-bit SVDQ model. Update "
                        "the pack, or train on the 16-bit model; the LoRA can be used here")


def refuse_without_checkpoints(patcher):
    """Raise LoraError before a training that ComfyUI's FLUX cannot do: its blocks add to tensors in place, which autograd
    allows only where they are computed again. Modules that ComfyUI's node computes again have an `org_forward`."""
    wrappers = [wrapper for some in patcher.weight_wrapper_patches.values() for wrapper in some]
    if not any(isinstance(wrapper, torch.nn.Module) and any(p.requires_grad for p in wrapper.parameters())
               for wrapper in wrappers):
        return
    flux = patcher.model.diffusion_model
    block = next((module for module in flux.modules() if isinstance(module, (DoubleStreamBlock, SingleStreamBlock))), flux)
    if not any(hasattr(module, "org_forward") for module in (flux, block, *block.children())):
        raise LoraError("FLUX trains with gradient_checkpointing on and checkpoint_depth 1 to 3 only, whether in 4 bit or not: "
                        "without them ComfyUI's blocks overwrite what gradients need. Set them so")
