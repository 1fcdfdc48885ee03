"""From a 4-bit T5 and a CLIP-L file to a CLIP, through ComfyUI's own loader: its FLUX text encoders with our linear layer."""

import logging

import comfy.sd
import comfy.utils
import torch

from ...svdq.text_encoder import T5XXL, TextEncoder
from .layer import SVDQOps
from .patcher import adopt

log = logging.getLogger(__name__)


def load_clip(t5_path, clip_path, embeddings, model_options=None, shape=T5XXL, disable_dynamic=False):
    """The CLIP of FLUX.1 from two files, the T5 4-bit.

    embeddings        folders of textual inversions
    model_options     ComfyUI's, for the devices
    shape             that the T5 must have
    disable_dynamic   ComfyUI asks for it when it needs a plain patcher of the same model

    Raises CheckpointError before any model exists.
    """
    encoder = TextEncoder(t5_path, shape)
    options = {**(model_options or {}), "custom_operations": SVDQOps, "t5xxl_model_config": vars(encoder.shape)}
    state_dicts = [comfy.utils.load_torch_file(str(clip_path), safe_load=True), _state_dict(encoder)]
    clip = comfy.sd.load_text_encoder_state_dicts(state_dicts, embeddings, comfy.sd.CLIPType.FLUX, options, disable_dynamic)
    adopt(clip.patcher)
    clip.patcher.cached_patcher_init = (_patcher, (t5_path, clip_path, embeddings, model_options, shape))
    log.info("SVDQ: %d linears of the T5 stay 4-bit in memory and are multiplied in the dtype of the prompt",
             len(clip.patcher.layers()))
    return clip


def _patcher(*args, **kwargs):
    return load_clip(*args, **kwargs).patcher


def _state_dict(encoder):
    state_dict = {}
    for module, tiles, plain in encoder.layers():
        if tiles is None:
            state_dict[f"{module}.weight"] = plain
        else:
            state_dict[f"{module}.weight"] = tiles.stored
            state_dict[f"{module}.svdq"] = torch.frombuffer(bytearray(tiles.description(), "utf-8"), dtype=torch.uint8)
    return state_dict
