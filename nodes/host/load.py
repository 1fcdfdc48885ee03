"""From a checkpoint to a MODEL, through ComfyUI's own loader."""

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...kernels import ops
from ...svdq.checkpoint import Checkpoint
from ...svdq.errors import CheckpointError
from ...svdq.format import pack_layer
from .layer import SVDQLinear, SVDQOps
from .patcher import adopt

log = logging.getLogger(__name__)
_announced = set()


def load_model(path, dtype=None, disable_dynamic=False):
    """A ComfyUI MODEL (model patcher) of the SVDQ checkpoint at `path`, a file or a legacy folder.

    dtype             compute dtype; None lets ComfyUI choose as for any FLUX on this device
    disable_dynamic   ComfyUI asks for it when it needs a plain patcher of the same model

    Raises CheckpointError before any model exists.
    """
    checkpoint = Checkpoint(path).require()
    for notice in checkpoint.notices:
        log.warning("SVDQ: %s: %s", checkpoint.path.name, notice)
    state_dict = _state_dict(checkpoint)
    device = comfy.model_management.get_torch_device()
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(device=device, model_params=checkpoint.nbytes,
                                                  supported_dtypes=[torch.bfloat16, torch.float16, torch.float32])
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options={"custom_operations": SVDQOps, "dtype": dtype}, disable_dynamic=disable_dynamic)
    if patcher is None:
        raise CheckpointError(f"{path}: this ComfyUI does not recognise the model as FLUX ({checkpoint.shape}). "
                              "Update ComfyUI")
    _require_complete(patcher.model.diffusion_model, path)
    _announce(checkpoint, device, patcher.model.get_dtype_inference())
    patcher = adopt(patcher)
    patcher.cached_patcher_init = (load_model, (path, dtype))
    return patcher


def _state_dict(checkpoint):
    """The checkpoint under ComfyUI's names. Every tensor is new: loaded ones may be read-only memory maps."""
    state_dict = {}
    progress = comfy.utils.ProgressBar(len({slot.layer for slot in checkpoint.slots}))
    for layer, tiles, bias in checkpoint.layers():
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight, description = pack_layer(tiles)
        state_dict[f"{layer}.weight"], state_dict[f"{layer}.bias"] = weight, bias
        state_dict[f"{layer}.svdq"] = torch.frombuffer(bytearray(description, "utf-8"), dtype=torch.uint8)
        progress.update(1)
    state_dict.update(checkpoint.plain())
    return state_dict


def _require_complete(model, path):
    empty = [name for name, module in model.named_modules() if isinstance(module, SVDQLinear) and module.weight is None]
    if empty:
        raise CheckpointError(f"{path}: this ComfyUI's FLUX has {len(empty)} layers the file has no weights for, the first "
                              f"is {empty[0]}. Update ComfyUI, or report this with its version")


def _announce(checkpoint, device, dtype):
    """Say once per kind of model which path serves it: nobody should have to guess why it is as fast as it is."""
    cuda = device.type == "cuda"
    request = ops.Request("linear_w4a4", dtype, torch.cuda.get_device_capability(device) if cuda else None,
                          device.index or 0 if cuda else None, checkpoint.precision)
    variant, better = ops.choose(request), ops.declined(request)
    text = f"SVDQ: {checkpoint.precision} layers run on {device} in {dtype} as '{variant.name}': {variant.how}" + "".join(
        f"; not '{other.name}', which {why}" for other, why in better)
    if text not in _announced:
        _announced.add(text)
        log.info(text)
