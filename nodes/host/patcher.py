"""ComfyUI's ModelPatcher, kept away from packed bytes.

Stock code applies weight patches (LoRA and others) by doing arithmetic on `weight`, which packed bytes do not survive.
So while it runs, the keys of our layers are hidden from its patch list; when it returns, every layer is handed its own
list. That one rule serves full, partial and dynamic loading, and hooks.
"""

import collections
import functools
from contextlib import contextmanager

import comfy.utils
from comfy.weight_adapter import WeightAdapterBase

from .layer import SVDQLinear

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

    def hand_over(self, hooks=None):
        """Give every quantised layer its patches: the model's own, then those of the active hooks."""
        if self._hiding:                                # the outermost call does it, when the weights are final
            return
        hooked = self.get_combined_hook_patches(hooks) if hooks is not None else {}
        for key, layer in self.layers().items():
            patches = self.patches.get(key, []) + hooked.get(key, [])
            for patch in patches:
                if patch[2] != 1.0 or isinstance(patch[1], list):
                    raise RuntimeError(f"{key}: a 4-bit SVDQ layer cannot be the target of a model merge. Merge the 16-bit "
                                       "models first, then quantise the result. An SVDQ model can be the source of a merge")
            # A hook between its keyframes has strength 0: the packed path serves it, bit for bit.
            patches = [patch for patch in patches if patch[0] or not isinstance(patch[1], WeightAdapterBase)]
            layer.patches, layer.key = patches or None, key

    def clone(self, *args, **kwargs):
        return adopt(super().clone(*args, **kwargs))

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, **kwargs):
        if force_patch_weights and any(key in self.patches for key in self.layers()):
            raise RuntimeError(_NO_SAVING)
        with self._hidden():
            super().load(device_to, lowvram_model_memory=lowvram_model_memory, force_patch_weights=force_patch_weights,
                         **kwargs)
        self.hand_over(self.current_hooks)

    def partially_unload(self, *args, **kwargs):
        with self._hidden():
            return super().partially_unload(*args, **kwargs)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights=unpatch_weights)
        if unpatch_weights:
            for layer in self.layers().values():
                layer.patches = None

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **kwargs):
        layer = self.layers().get(key)
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
            if layer.shifted and name + "bias" in found:
                (bias, _), *patches = found[name + "bias"]
                found[name + "bias"] = [(bias, layer.bias_with_shift), *patches]
        return found

    def get_combined_hook_patches(self, hooks):
        combined = super().get_combined_hook_patches(hooks)
        return {key: value for key, value in combined.items() if key not in self._hiding}

    def patch_hooks(self, hooks):
        with self._hidden():
            super().patch_hooks(hooks)
        self.hand_over(hooks)

    def unpatch_hooks(self, *args, **kwargs):
        super().unpatch_hooks(*args, **kwargs)
        self.hand_over()

    def state_dict_for_saving(self, *args, **kwargs):
        raise RuntimeError(_NO_SAVING)


_NO_SAVING = ("4-bit SVDQ layers cannot be saved by 'Save Model'. Keep the original file and load LoRAs beside it, or "
              "write 16-bit weights with 'python -m svdq dequantize FILE OUT'")
