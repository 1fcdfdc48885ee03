"""The SVDQ checkpoint format and the method behind it. Torch only: no ComfyUI, no GPU needed.

    from svdq import SVDQFluxTransformer2DModel

is the door for diffusers, which is imported then and not before.
"""

from importlib import import_module

_HF = {"SVDQFluxTransformer2DModel": "model",
       "ModelMixin": "model"}       # diffusers asks the module that a saved pipeline names for the base class of its component


def __getattr__(name):
    if name not in _HF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.hf.{_HF[name]}"), name)
