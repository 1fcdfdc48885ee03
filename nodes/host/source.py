"""A FLUX MODEL as it stands in a graph, LoRAs and merges included, for whoever reads its weights one layer at a time."""

import hashlib
import zlib
from dataclasses import replace
from pathlib import Path

import comfy.ldm.flux.model
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import torch

from ...svdq.errors import CheckpointError, shown
from ...svdq.families import flux1
from ...svdq.families.family import by_layer
from ...svdq.format import finite
from .patcher import SVDQPatcher

PREFIX = "diffusion_model."
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LOAD_ORIGINAL = "Load the bf16, fp16 or fp8 original with 'Load Diffusion Model'"


def flux_shape(model):
    """The flux1.Shape of a MODEL, which must be FLUX.1 in whatever precision. Raises CheckpointError."""
    _require_model(model)
    network, kind = getattr(model.model, "diffusion_model", None), type(model.model).__name__
    if not isinstance(network, comfy.ldm.flux.model.Flux):
        raise CheckpointError(f"the MODEL is {kind}, and this node knows FLUX.1 and what was made from it")
    params = network.params
    odd = next((f"{name} {getattr(params, name)}" for name, value in flux1.COMFY_CONSTANTS.items()
                if getattr(params, name, value) != value), None)
    if odd or params.vec_in_dim is None or params.hidden_size != params.num_heads * flux1.HEAD_DIM:
        odd = odd or f"{params.hidden_size} wide, {params.num_heads} heads, vec_in_dim {params.vec_in_dim}"
        raise CheckpointError(f"the MODEL is {kind}, which is built like FLUX and is not FLUX.1 ({odd}). Load a FLUX.1, or "
                              "something made from it")
    # Control LoRAs widen img_in, so the weight knows better than the parameters.
    found = _found(model, PREFIX + "img_in.weight")
    weight = _patched(found, PREFIX + "img_in.weight", torch.device("cpu")) if len(found) > 1 else found[0][0]
    return replace(flux1.Shape.from_comfy(vars(params)), in_features=weight.shape[1])


def _require_model(model):
    """A prompt over HTTP can have a number where a link is due."""
    if getattr(model, "model", None) is None:
        raise CheckpointError(f"'model' is a {type(model).__name__}, which is no MODEL. Connect a model loader to it")


class ModelSource:
    """What svdq.quantize takes for a source: every weight with the MODEL's patches in it, made when asked for.

    Raises CheckpointError, at once where the MODEL cannot be written as weights.
    """

    def __init__(self, model, device, say=lambda text: None):
        """say: called with a text for people, now and then while everything is read."""
        _require_model(model)
        _require_weights(model)
        self.device, self.shape = device, flux_shape(model)
        self.name = _name(model)
        self._patches = {key: _found(model, key) for key, _ in model.model.named_parameters() if key.startswith(PREFIX)}
        self._say, self._fingerprint = say, None
        self._plain = {place.name: self._key(place.name, place.alias) for place in self.shape.comfy_plain()}
        self._check()

    def check(self, progress):
        """Read everything, the first time it is asked for: raise CheckpointError where a number is NaN or Inf, and make the
        fingerprint. progress(share done)
        """
        if self._fingerprint is not None:
            return
        digest = hashlib.sha256()
        for done, (key, ((weight, convert), *patches)) in enumerate(sorted(self._patches.items())):
            comfy.model_management.throw_exception_if_processing_interrupted()
            weight = _floats(weight, convert)
            if not finite(weight):
                raise CheckpointError(f"{self.name}: {shown(key)} contains NaN or Inf. The file is damaged, or a merge "
                                      "overflowed; get it again")
            if patches and not finite(_patched(self._patches[key], key, self.device)):
                raise CheckpointError(f"{self.name}: with its LoRAs, {shown(key)} contains NaN or Inf. Leave out one at a "
                                      "time to find the damaged one")
            digest.update(f"{key} {_checksum(weight)} {_described(patches)}\n".encode())
            progress((done + 1) / len(self._patches))
        self._fingerprint = digest.hexdigest()

    @property
    def fingerprint(self):
        """Differs when any number of any weight or patch does."""
        if self._fingerprint is None:
            self.check(lambda share: self._say(f"checking {self.name}, {share:.0%}"))
        return self._fingerprint

    def layer(self, name):
        """(weight [N, K], bias [N] or None) of a linear."""
        return self._value(self._key(f"{name}.weight")), self._value(self._key(f"{name}.bias", required=False))

    def plain(self):
        """(name, tensor) of everything that is not quantised."""
        for ours, key in self._plain.items():
            yield ours, self._value(key)

    def _value(self, key):
        if key is None:
            return None
        comfy.model_management.throw_exception_if_processing_interrupted()
        found = self._patches[key]
        return _floats(*found[0]) if len(found) == 1 else _patched(found, key, self.device)

    def _key(self, ours, alias=None, required=True):
        """The MODEL's key of a tensor, which other versions of ComfyUI may know by its alias."""
        for name in (ours, alias):
            if name is not None and PREFIX + name in self._patches:
                return PREFIX + name
        if required:
            raise CheckpointError(f"{self.name}: the MODEL has no {ours}. Another node has replaced parts of it; take it "
                                  "straight from its loader")
        return None

    def _check(self):
        for layer in by_layer(self.shape.comfy_places()):
            key = self._key(f"{layer.name}.weight")
            (weight, _), *_ = self._patches[key]
            if tuple(weight.shape) != (layer.n, layer.k):
                raise CheckpointError(f"{self.name}: {key} is {list(weight.shape)}, FLUX of these sizes has "
                                      f"{[layer.n, layer.k]}. {LOAD_ORIGINAL}")
        for key, ((weight, _), *_) in self._patches.items():
            why = _not_plain(weight)
            if why:
                raise CheckpointError(f"{self.name}: {shown(key)} is {why}: this MODEL is quantised already, and a second "
                                      f"time would add the errors of both. {LOAD_ORIGINAL}")


def _require_weights(model):
    """Raise unless patching the weights once gives this MODEL."""
    if isinstance(model, SVDQPatcher):
        raise CheckpointError(f"the MODEL is a 4-bit SVDQ model already. {LOAD_ORIGINAL}")
    if model.injections:
        raise CheckpointError("the MODEL has a LoRA that works beside the weights ('bypass') and cannot be put into them. "
                              "Load it with 'Load LoRA (Model)' instead")
    if model.weight_wrapper_patches:
        first = shown(next(iter(model.weight_wrapper_patches)))
        raise CheckpointError(f"another node changes {first} while the model runs, which cannot be put into weights. Take "
                              "that node out for this")


def _found(model, key):
    """[(weight without patches, function that makes numbers of it), *patches], as ModelPatcher.get_key_patches has it, which
    fails on scaled fp8 models."""
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    for backup in (model.backup, model.hook_backup):
        weight = backup[key][0] if key in backup else weight
    return [(weight, convert or (lambda given, **_: given)), *model.patches.get(key, ())]


def _name(model):
    made = getattr(model, "cached_patcher_init", None)
    path = made[1][0] if made and made[1] else None
    return Path(path).name if isinstance(path, (str, Path)) else "the MODEL"


def _not_plain(weight):
    """What a weight is that is neither 16-bit, 32-bit nor fp8; None if it is."""
    if isinstance(getattr(weight, "data", weight), comfy.quant_ops.QuantizedTensor):
        layout = str(getattr(weight, "_layout_cls", None) or getattr(weight, "_layout_type", None))
        return None if layout.startswith("TensorCoreFP8") else f"in {shown(layout)}"
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {shown(type(weight).__name__)}"
    return None if weight.dtype in (*FLOATS, *FP8) else f"in {weight.dtype}"


def _floats(weight, convert):
    """A weight without patches as 16 or 32 bit floats. bf16 holds every fp8 number, but not a scaled one."""
    weight = weight.detach()
    if isinstance(weight, comfy.quant_ops.QuantizedTensor):
        return convert(comfy.model_management.cast_to_device(weight, weight.device, torch.float32, copy=True), inplace=True)
    return weight.to(torch.bfloat16) if weight.dtype in FP8 else weight


def _patched(found, key, device):
    """What ModelPatcher.patch_weight_to_device makes of a weight, without rounding it to the weight's dtype."""
    (weight, convert), *patches = found
    value = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    return comfy.lora.calculate_weight(patches, convert(value, inplace=True), key)


def _checksum(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return f"{tensor.dtype} {list(tensor.shape)} {zlib.crc32(tensor.view(-1).view(torch.uint8).numpy()):08x}"


def _described(value):
    """A text of a list of patches that differs when any number in it does."""
    if isinstance(value, torch.Tensor):
        return _checksum(_floats(value, lambda given, **_: given.dequantize()))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, dict):
        return _described(sorted(value.items()))
    if hasattr(value, "weights"):                       # an adapter
        return f"{value.name} {_described(value.weights)}"
    return getattr(value, "__qualname__", None) or str(value)
