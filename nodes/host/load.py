"""From a checkpoint to a MODEL, through ComfyUI's own loader."""

import logging
from dataclasses import replace

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...svdq.checkpoint import Checkpoint
from ...svdq.errors import CheckpointError
from ...svdq.format import pack_tiles
from ...svdq.kernels import build, registry
from ...svdq.kernels.errors import printable
from ...svdq.kernels.variant import FLOATS, HALVES
from ...svdq.serving import Cast, announce, plan_for
from . import adapters, training
from .blocks import fuse
from .layer import SVDQLinear, SVDQOps
from .patcher import adopt

log = logging.getLogger(__name__)


def load_model(path, dtype=None, act_bits=None, disable_dynamic=False, say=lambda text: None):
    """A ComfyUI MODEL (model patcher) of the SVDQ checkpoint at `path`, a file or a legacy folder.

    dtype             compute dtype; None lets ComfyUI choose as for any FLUX on this device
    act_bits          to how many bits activations are rounded, see kernels.registry.plan
    disable_dynamic   ComfyUI asks for it when it needs a plain patcher of the same model
    say               called with what is going on, and at the end with the path that serves, for people

    Raises CheckpointError before any model exists.
    """
    checkpoint = Checkpoint(path).require()
    for notice in checkpoint.notices:
        log.warning("SVDQ: %s: %s", printable(checkpoint.path.name), notice)
    device = comfy.model_management.get_torch_device()
    dtype = compute_dtype(device, checkpoint.nbytes, dtype)
    what = in_words(checkpoint)
    say(f"loading {what}")
    cast = Cast(printable(checkpoint.path.name), device, dtype, act_bits)
    patcher = comfy.sd.load_diffusion_model_state_dict(
        _state_dict(checkpoint, device, dtype, act_bits, say, cast),
        model_options={"custom_operations": SVDQOps, "dtype": dtype}, disable_dynamic=disable_dynamic)
    if patcher is None:
        raise CheckpointError(f"{path}: this ComfyUI does not recognise the model as FLUX ({checkpoint.shape}). "
                              "Update ComfyUI")
    _require_complete(patcher.model.diffusion_model, path)
    fuse(patcher.model.diffusion_model)
    adapters.teach()
    training.teach()
    say(f"{what} · {announce(checkpoint.precision, device, patcher.model.get_dtype_inference(), act_bits)}{cast.told()}")
    patcher = adopt(patcher)
    patcher.cached_patcher_init = (load_model, (path, dtype, act_bits))
    return patcher


def compute_dtype(device, nbytes, asked=None):
    """The dtype that a model computes in: what is asked for, or what ComfyUI picks for any FLUX; on a GPU that lacks it, the
    one that ComfyUI would cast to.

    nbytes   of the model
    """
    dtype = _picked(device, nbytes) if asked is None else asked
    instead = comfy.model_management.unet_manual_cast(dtype, device, [*FLOATS])
    return instead if instead in HALVES or instead is not None and device.type == "cuda" else dtype


def _picked(device, nbytes):
    """What ComfyUI picks; flags for the dtype of weights aside, which these have already."""
    dtype = comfy.model_management.unet_dtype(device=device, model_params=nbytes, supported_dtypes=[*FLOATS])
    if dtype in FLOATS:
        return dtype
    ours = torch.float32 if dtype == torch.float64 else comfy.model_management.unet_manual_cast(dtype, device, [*FLOATS])
    log.warning("SVDQ: ComfyUI was started with a flag that keeps diffusion models in %s. An SVDQ model is 4-bit as it is and "
                "computes in bfloat16, float16 or float32: here in %s", dtype, ours)
    return ours


def _state_dict(checkpoint, device, dtype, act_bits, say, cast):
    """The checkpoint under ComfyUI's names, in the order and the 16-bit dtype that the kernels of `device` want."""
    state_dict = {}
    places = list(checkpoint.shape.comfy_places())
    progress = comfy.utils.ProgressBar(len({place.layer for place in places}))
    with build.telling(say):
        plans = [plan_for(precision, device, dtype, act_bits) for precision in (checkpoint.precision, "awq")]
    repacks = plans[0].variant.layout is not None
    for layer, tiles, bias in checkpoint.layers(places):
        comfy.model_management.throw_exception_if_processing_interrupted()
        cast(layer, tiles)
        if repacks:
            tiles = pack_tiles([replace(tile, weight=registry.pack(tile.weight.to(device), dtype, act_bits)) for tile in tiles])
        state_dict[f"{layer}.weight"], state_dict[f"{layer}.bias"] = tiles.stored, bias
        description = tiles.description(act_bits=act_bits)
        state_dict[f"{layer}.svdq"] = torch.frombuffer(bytearray(description, "utf-8"), dtype=torch.uint8)
        progress.update(1)
    state_dict.update(checkpoint.plain(checkpoint.shape.comfy_plain()))
    return state_dict


def _require_complete(model, path):
    empty = [name for name, module in model.named_modules() if isinstance(module, SVDQLinear) and module.weight is None]
    if empty:
        raise CheckpointError(f"{path}: this ComfyUI's FLUX has {len(empty)} layers the file has no weights for, the first "
                              f"is {empty[0]}. Update ComfyUI, or report this with its version")


def in_words(checkpoint):
    """"INT4, rank 32"."""
    ranks = sorted(checkpoint.ranks)
    return f"{checkpoint.precision.upper()}, rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"
