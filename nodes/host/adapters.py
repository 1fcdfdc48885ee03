"""A LoRA file's tensors -> ComfyUI's adapters, and what became of every key.

ComfyUI knows most key styles and reads one layer at a time: what it takes for a layer, and what it makes of that, is noted
here. Where a file has two adapters for one weight, the last one counts, as in ComfyUI.

Its own loaders and hooks know fewer names, and would apply a DoRA of PEFT without the magnitudes: `teach` puts a function
around ComfyUI's reader, for the whole process, which changes nothing for other models.
"""

import functools
from dataclasses import dataclass, field

import comfy.lora
import comfy.lora_convert
import comfy.sd
import torch

from ...svdq import lora_keys
from ...svdq.errors import LoraError, shown
from . import lora


@dataclass
class Parsed:
    """The adapters of a file by patch key, as add_patches wants them, and the file's keys: each is in one place.

    keys    {patch key: [keys of its adapter]}
    left    keys nobody asked for            twice   keys of adapters whose weight got another one of the same file
    empty   keys of adapters without numbers: pairs of rank 0
    half    keys of pairs whose other factor the file lacks
    """
    adapters: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    left: list = field(default_factory=list)
    twice: list = field(default_factory=list)
    empty: list = field(default_factory=list)
    half: list = field(default_factory=list)


def parse(tensors, model):
    """Parsed of {key: tensor} for ComfyUI's model. Raises LoraError where ComfyUI's parsers fail."""
    parsed, layers = Parsed(), comfy.lora.model_lora_keys_unet(model, {})
    try:
        given, origin = _for_comfy(tensors, parsed)
        given, taken = _Given(given), set()
        for layer, place in layers.items():
            given.taken = set()
            made = comfy.lora.load_lora(given, {layer: place}, log_missing=False)
            _note(parsed, made, given, origin)
            if made:
                taken |= given.taken
    except Exception as error:              # whatever ComfyUI's parsers do with a stranger's keys
        raise LoraError(f"its adapters are incomplete or malformed: {shown(error)}. The file is damaged; get it "
                        "again") from error
    rest = sorted(origin[key] for key in given.keys() - taken if key in origin)
    parsed.half = [key for key in rest if lora_keys.is_half(key, tensors)]
    parsed.left = [key for key in rest if key not in parsed.half]
    return parsed


def _note(parsed, made, given, origin):
    """What ComfyUI made of the keys that it took for one layer."""
    rest = given.taken & origin.keys()
    for key, adapter in made.items():
        tensors = lora.tensors_of(adapter)
        names = {name for name in rest if any(given.get(name) is tensor for tensor in tensors)
                 or not isinstance(adapter, tuple) and name.endswith((".alpha", ".reshape_weight"))}
        rest = rest - names
        names = sorted(origin[name] for name in names)
        if not all(tensor.numel() for tensor in tensors):
            parsed.empty += names
            continue
        parsed.twice += parsed.keys.get(key, [])
        parsed.adapters[key], parsed.keys[key] = adapter, names
    if made:
        parsed.twice += sorted(origin[name] for name in rest)


class _Given(dict):
    """Tensors by key that remember which of them ComfyUI took."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.taken = set()

    def __getitem__(self, key):
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


def _for_comfy(tensors, parsed):
    """({name: tensor} as ComfyUI knows them for FLUX, {name: the file's key}). XLabs files it converts only where they cover
    every block. What it adds is no key of the file."""
    encoder = {key: tensor for key, tensor in tensors.items() if lora_keys.is_text_encoder(key)}    # stays as it is
    tensors = {key: tensor for key, tensor in tensors.items() if key not in encoder}
    converted = comfy.lora_convert.convert_lora(tensors)
    if converted is tensors and lora_keys.style(tensors) == lora_keys.XLABS:
        converted = comfy.lora_convert.convert_uso_lora(tensors)
    keys = {id(tensor): key for key, tensor in tensors.items()}
    given, origin = encoder, {key: key for key in encoder}
    for name, tensor in converted.items():
        key, name = keys.get(id(tensor)), lora_keys.unwrapped(name)
        if name in given:
            parsed.twice.append(key)
            continue
        peft = name.endswith(".dora_scale") and isinstance(tensor, torch.Tensor) and tensor.ndim == 1
        given[name] = tensor[:, None] if peft else tensor
        if key is not None:
            origin[name] = key
    return given, origin


def teach():
    """Let ComfyUI's loaders and hooks read for our models what our nodes read, by the same names. Its bypass loaders, which run
    a LoRA beside the weight and leave out parts of fused layers and DoRA scales, patch our models instead, whose 4-bit weights
    stay as they are anyway."""
    load_lora, load_bypass = comfy.lora.load_lora, comfy.sd.load_bypass_lora_for_models
    if hasattr(load_lora, "svdq"):
        return

    @functools.wraps(load_lora)
    def with_our_names(lora, to_load, *args, **kwargs):
        ours = any(name.endswith(".svdq") for name in to_load)      # a buffer that only our layers have
        if ours and not isinstance(lora, _Given) and all(isinstance(key, str) for key in lora):
            lora = _for_comfy(lora, Parsed())[0]
        return load_lora(lora, to_load, *args, **kwargs)

    with_our_names.svdq = True
    comfy.lora.load_lora = with_our_names

    @functools.wraps(load_bypass)
    def without_bypass(model, clip, lora, strength_model, strength_clip):
        if not hasattr(model, "give_layers_their_patches"):
            return load_bypass(model, clip, lora, strength_model, strength_clip)
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength_model, 0)
        return patched, None if clip is None else load_bypass(None, clip, lora, 0, strength_clip)[1]

    comfy.sd.load_bypass_lora_for_models = without_bypass
