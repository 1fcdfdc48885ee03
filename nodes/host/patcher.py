"""ComfyUI's ModelPatcher, kept away from packed bytes.

Stock code applies weight patches (LoRA and others) by doing arithmetic on `weight`, which packed bytes do not survive.
So the keys of our layers are hidden from its patch list while it runs, and every layer is handed its own list: before
loading, so that ComfyUI moves and counts what LoRAs add, and after hooks. That serves full, partial and dynamic loading.
"""

import collections
import functools
import logging
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
from comfy.patcher_extension import CallbacksMP

from ...svdq.kernels.errors import command
from . import lora, training
from .layer import SVDQLinear

log = logging.getLogger(__name__)

_Backup = collections.namedtuple("Dimension", ["weight", "inplace_update"])     # what ModelPatcher.backup holds


def adopt(patcher):
    """Give a ModelPatcher our class. ComfyUI chose the base (plain or dynamic); constructing ours would bypass that."""
    if not isinstance(patcher, SVDQPatcher):
        patcher.__class__ = _over(type(patcher))
    return patcher


@functools.cache
def _over(base):
    return type(f"SVDQ{base.__name__}", (SVDQPatcher, base), {})


class SVDQPatcher:
    """Mixin over ModelPatcher or ModelPatcherDynamic. Extra arguments pass through: newer versions of ComfyUI add some."""

    def layers(self):
        """{patch key: layer} of every quantised layer."""
        return {f"{name}.weight": module for name, module in self.model.named_modules()
                if isinstance(module, SVDQLinear) and module.quantised}

    @contextmanager
    def _hidden(self):
        """Run stock code that must not see our keys among the patches."""
        before = self.patches, self._hiding             # stock methods call one another, so this nests
        self._hiding = self.layers()
        self.patches = {key: value for key, value in self.patches.items() if key not in self._hiding}
        try:
            yield
        finally:
            self.patches, self._hiding = before

    _hiding = {}

    def give_layers_their_patches(self, hooks=None):
        """Give every quantised layer its patches: the model's own, then those of the active hooks."""
        if self._hiding:                                # the outermost call does it, when the weights are final
            return
        hooked = self.get_combined_hook_patches(hooks) if hooks is not None else {}
        factored, misfits = [], []
        for key, layer in self.layers().items():
            changes, scale, also, wrong = lora.changes(layer, key, self.patches.get(key, []) + hooked.get(key, []),
                                                       self.load_device)
            factored, misfits = factored + also, misfits + wrong
            if not layer.uses_lora(changes, scale):
                self._release(key, layer)
                with lora.naming(key):
                    layer.use_lora(changes, scale)
        if [factored, misfits] != getattr(self.model, "svdq_said", [[], []]):
            lora.say(factored, misfits)
        self.model.svdq_said = [factored, misfits]

    def _release(self, key, layer):
        """Before its factors change: ComfyUI may have them pinned, or a copy of them on the device."""
        key = f"{key.removesuffix('weight')}lora"
        if key in self.pinned:
            self.unpin_weight(key)
        if key in self.backup:
            comfy.utils.set_attr_param(self.model, key, self.backup.pop(key).weight)

    def clone(self, *args, **kwargs):
        copy = adopt(super().clone(*args, **kwargs))
        copy.size = self.size                           # stock code passes model_size(), which is more
        return copy

    def model_size(self):
        """The bytes of the weights and of what the patches add to them."""
        if self.size == 0:
            self.size = comfy.model_management.module_size(self.model) - sum(
                layer.lora.nbytes for layer in self.layers().values() if layer.lora is not None)
        if self._planned[0] != self.patches_uuid:
            self._planned = self.patches_uuid, sum(lora.planned_bytes(layer, self.patches[key])
                                                   for key, layer in self.layers().items() if key in self.patches)
        return self.size + self._planned[1]

    _planned = None, 0

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, **kwargs):
        if force_patch_weights and (self.is_clip or any(key in self.patches for key in self.layers())):
            raise RuntimeError(_NO_SAVING_CLIP if self.is_clip else _NO_SAVING)
        self.give_layers_their_patches()
        with self._hidden():
            super().load(device_to, lowvram_model_memory=lowvram_model_memory, force_patch_weights=force_patch_weights,
                         **kwargs)
        if self.current_hooks is not None:
            self.give_layers_their_patches(self.current_hooks)
        self.model.svdq_loaded = self._loading()

    def partially_unload(self, *args, **kwargs):
        with self._hidden():
            return super().partially_unload(*args, **kwargs)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """Another LoRA or strength on a loaded model: stock code carries all weights to the host and back, ours stay."""
        model = self.model
        if (not self.is_dynamic() and not force_patch_weights and not model.model_lowvram
                and model.current_weight_patches_uuid not in (None, self.patches_uuid)
                and model.model_loaded_weight_memory + extra_memory > self.model_size()):
            if self._loads_as(getattr(model, "svdq_loaded", None)):
                self._reload()
            else:
                extra_memory += model.model_loaded_weight_memory
                self.unpatch_model(device_to)
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)

    def _reload(self):
        """What load() does where nothing but our own layers differs from what is loaded."""
        try:
            self.unpatch_hooks()
            self.give_layers_their_patches()
        except BaseException:               # the user's interrupt is one: some layers have the new LoRA, others the old
            self.detach()
            raise
        self.model.current_weight_patches_uuid = self.patches_uuid
        self.model.model_loaded_weight_memory = self.model_size()

    def _loading(self):
        """What load() reads, apart from the patches of our layers; None if others take part in it."""
        if self.weight_wrapper_patches or self.get_all_callbacks(CallbacksMP.ON_LOAD):
            return None
        layers = self.layers()
        return [self.force_cast_weights, *(item for key, patches in self.patches.items() if key not in layers
                                           for item in (key, *patches))]

    def _loads_as(self, loaded):
        wanted = self._loading()
        return (None not in (loaded, wanted) and len(wanted) == len(loaded)
                and all(ours is theirs or isinstance(ours, str) and ours == theirs for ours, theirs in zip(wanted, loaded)))

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights=unpatch_weights)
        if unpatch_weights:
            for key, layer in self.layers().items():
                self._release(key, layer)
                layer.park_lora()

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **kwargs):
        layer = (self._hiding or self.layers()).get(key)
        if layer is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
        if kwargs.get("return_weight"):
            raise RuntimeError(_NO_SAVING)
        if kwargs.get("force_cast"):                # the dynamic loader moves small layers this way
            if key not in self.backup:
                self.backup[key] = _Backup(layer.weight, False)
            comfy.utils.set_attr_param(self.model, key, layer.weight.to(device_to))
        return layer.weight

    def get_key_patches(self, *args, **kwargs):
        """What a merge reads from this model: our layers as numbers, what their shift adds to the bias included."""
        found = super().get_key_patches(*args, **kwargs)
        for key, layer in self.layers().items():
            name = key.removesuffix("weight")
            found.pop(name + "svdq", None)
            found.pop(name + "lora", None)
            if layer.shifted and name + "bias" in found:
                (bias, _), *patches = found[name + "bias"]
                found[name + "bias"] = [(bias, layer.bias_with_shift), *patches]
        return found

    def add_patches(self, patches, strength_patch=1.0, *args, **kwargs):
        lora.refuse_numbers(patches, strength_patch)    # at the LoRA's node, not when it samples
        patches = lora.padded(self.model, patches, self.patches)
        return super().add_patches(patches, strength_patch, *args, **kwargs)

    def add_weight_wrapper(self, name, function):
        layer = self.layers().get(name)
        if layer is not None:
            training.refuse(layer, function)
        super().add_weight_wrapper(name, function)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, *args, **kwargs):
        lora.refuse_numbers(patches, strength_patch)
        if lora.widens(self.model, patches, self.patches):
            log.error("SVDQ: a LoRA that widens img_in, such as BFL's Canny and Depth, changes nothing in a hook, which cannot "
                      "do that while it samples. Load it with a LoRA node")
            patches = {}
        patches = lora.padded(self.model, patches, self.patches)
        return super().add_hook_patches(hook, patches, strength_patch, *args, **kwargs)

    def pre_run(self, *args, **kwargs):
        training.refuse_without_checkpoints(self)
        super().pre_run(*args, **kwargs)

    def get_combined_hook_patches(self, hooks):
        combined = super().get_combined_hook_patches(hooks)
        for patches in combined.values():               # those of keyframes
            lora.refuse_strengths(patches)
        return {key: value for key, value in combined.items() if key not in self._hiding}

    def patch_hooks(self, hooks):
        with self._hidden():
            super().patch_hooks(hooks)
        self.give_layers_their_patches(hooks)

    def unpatch_hooks(self, *args, **kwargs):
        active = self.current_hooks is not None
        super().unpatch_hooks(*args, **kwargs)
        if active:
            self.give_layers_their_patches()

    def state_dict_for_saving(self, *args, **kwargs):
        raise RuntimeError(_NO_SAVING)

    def model_state_dict_for_saving(self, *args, **kwargs):     # what newer versions of ComfyUI save of a CLIP
        raise RuntimeError(_NO_SAVING_CLIP)


_NO_SAVING = ("4-bit SVDQ layers cannot be saved by 'Save Model'. Keep the original file and load LoRAs beside it, or "
              f"write 16-bit weights with `{command('dequantize', 'FILE', 'OUT')}`")
_NO_SAVING_CLIP = ("a 4-bit text encoder cannot be saved by 'Save CLIP' (CLIPSave). Keep its own file and load LoRAs beside "
                   "it, or save the CLIP of an ordinary T5")
