"""A model back into a folder: config.json and the one file of the published format.

Test: tests/hf/inside/checks_saving.py
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint import metadata_for
from ..container import NAMES, TensorInfo, write_tensors
from ..errors import CheckpointError, LoraError
from ..families import flux1
from ..families.family import by_layer
from ..format import slot_tensors, view_layer
from ..lora import widened

FILE = "svdq.safetensors"       # no name of diffusers': its own class would read the file and fill layers with random numbers


def save(model, folder):
    """Write the folder. Raises LoraError, CheckpointError before anything is written, OSError."""
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder}: is a file. Name a folder")
    for module in model.modules():
        if getattr(module, "merged_adapters", None) and module.disable_adapters:
            module.unmerge()                                # as PEFT does where adapters are off
    _refuse(model)
    shape = _shape(model)
    tensors = dict(_quantised(model, shape))
    tensors |= {place.tensor.name: _plain(model, place.name) for place in shape.diffusers_plain()}
    ranks = [tensor.shape[1] for name, tensor in tensors.items() if name.endswith(".lora_down")]
    metadata = metadata_for(shape, _precision(model, shape), max(ranks, default=0))
    Path(folder).mkdir(parents=True, exist_ok=True)
    specs = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(Path(folder, FILE), specs, metadata, tensors.items())
    model.save_config(folder)


def _refuse(model):
    for name, module in model.named_modules():
        if not hasattr(module, "base_layer") or module.disable_adapters:
            continue
        names = set(module.active_adapters) - set(module.merged_adapters)
        if names:
            raise LoraError(f"the LoRA {', '.join(sorted(names))} is loaded and not fused, in {name}. Call fuse_lora() to save "
                            "it inside the model, or unload_lora_weights() to save the model without it")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"{name}: is not in memory, as the model is offloaded. Save it before offloading is enabled")


def _shape(model):
    config = model.config
    return flux1.Shape(config.num_attention_heads * config.attention_head_dim, config.num_layers, config.num_single_layers,
                       config.in_channels, config.joint_attention_dim, config.pooled_projection_dim, config.guidance_embeds)


def _precision(model, shape):
    place = next(place for place in shape.diffusers_places() if place.slot.kind == "w4a4")
    return _base(model, place.layer).tiles[0].weight.precision


def _base(model, name):
    module = model.get_submodule(name)
    return getattr(module, "base_layer", module)


def _quantised(model, shape):
    for group in by_layer(shape.diffusers_places()):
        layer = _base(model, group.name)
        tiles = view_layer(layer.packed.detach(), layer.description)
        changes = layer.merged
        for place, tile in zip(group.places, tiles):
            tile = replace(tile, weight=tile.weight.unpack().to("cpu"))
            scales = any(change.output_scale is not None for change in changes)
            if scales or changes and not tile.weight.has_branch:
                what = "a DoRA, which scales outputs" if scales else "a LoRA of a modulation, which has no branch"
                raise LoraError(f"{group.name}: {what}, cannot be saved inside a 4-bit file. Unload it, save the model and "
                                "keep the LoRA's own file")
            if changes:
                down, up = widened(tile, [change.low_rank for change in changes])
                tile = replace(tile, weight=replace(tile.weight, proj_down=down, proj_up=up))
            bias = torch.zeros(place.n) if place.col else layer.bias.detach().float().cpu()[place.row:place.row + place.n]
            yield from slot_tensors(place.slot, tile.weight, bias, layer.bias.dtype).items()


def _plain(model, name):
    module, _, leaf = name.rpartition(".")
    return getattr(_base(model, module), leaf).detach().cpu().contiguous()
