"""Load FLUX.1's text encoders, the T5 4-bit or of any other kind.

Test: tests/comfy/inprocess/checks_text_encoder.py
"""

from pathlib import Path

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..svdq import foreign, text_encoder
from ..svdq.container import TensorFile
from ..svdq.errors import CheckpointError, shown
from .host.text_encoder import load_clip
from .models import stamp

FOLDER = "text_encoders"
DEVICES = ("default", "cpu")
MIN_LENGTH, LONGEST = 256, 4096      # tokens: ComfyUI's own for FLUX, and what nobody needs
# A weight of T5-XXL and of CLIP-L, by both names that it has there, and its shape
T5_MARKS = {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}
CLIP_MARKS = {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768), "transformer.resblocks.0.mlp.c_fc.weight": (3072, 768)}


class SVDQTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list(FOLDER)
        return io.Schema(
            category="svdq/loaders", node_id="SVDQTextEncoderLoader", display_name="SVDQ Text Encoder Loader",
            search_aliases=["nunchaku", "svdquant", "svdq", "4bit", "4-bit", "awq", "t5", "t5xxl", "clip", "text encoder",
                            "dual clip loader", "nunchaku text encoder"],
            description="Loads the two text encoders of FLUX.1, in any order: CLIP-L, and a T5-XXL that may be the 4-bit one "
                        "(awq-int4-flux.1-t5xxl), which stays 4-bit in memory.",
            inputs=[io.Combo.Input("clip_name1", options=files, tooltip="The T5-XXL or the CLIP-L, of models/text_encoders."),
                    io.Combo.Input("clip_name2", options=files, tooltip="The other one."),
                    io.Int.Input("t5_min_length", default=MIN_LENGTH, min=1, max=LONGEST, optional=True, advanced=True,
                                 tooltip="Shorter prompts are filled up to so many tokens for the T5. ComfyUI's loaders take "
                                         "256, graphs of the Nunchaku nodes 512."),
                    io.Combo.Input("device", options=list(DEVICES), default=DEVICES[0], optional=True, advanced=True,
                                   tooltip="cpu: encode there, which leaves the GPU's memory to the model.")],
            outputs=[io.Clip.Output(tooltip="For CLIP Text Encode and every other node that takes a CLIP.")])

    @classmethod
    def fingerprint_inputs(cls, clip_name1, clip_name2, **rest):
        """A file that was replaced under the same name is loaded again."""
        return [(name, stamp(_path(name))) for name in (clip_name1, clip_name2)], rest

    @classmethod
    def execute(cls, clip_name1, clip_name2, t5_min_length=MIN_LENGTH, device=DEVICES[0]):
        if device not in DEVICES:
            raise CheckpointError(f"device is {shown(device)}, needs to be {' or '.join(DEVICES)}. Choose one of these")
        if not isinstance(t5_min_length, int) or not 1 <= t5_min_length <= LONGEST:     # linked, it may be anything
            raise CheckpointError(f"t5_min_length is {shown(t5_min_length)}, needs to be 1 to {LONGEST}. Choose {MIN_LENGTH}")
        paths = {_kind(path): path for path in map(_path, (clip_name1, clip_name2))}
        t5 = next((kind for kind in (_FOUR_BIT, _T5) if kind in paths), None)
        if t5 is None or _CLIP not in paths:
            raise CheckpointError(f"clip_name1 and clip_name2 are both {next(iter(paths))}, needs one CLIP-L and one T5-XXL. "
                                  "Choose the other file in one of them" if len(paths) == 1 else
                                  "clip_name1 and clip_name2 are both a T5, needs one CLIP-L and one T5-XXL. Choose "
                                  "clip_l.safetensors in one of them")
        cpu = torch.device("cpu")
        options = {"load_device": cpu, "offload_device": cpu} if device == "cpu" else {}
        embeddings = folder_paths.get_folder_paths("embeddings")
        if t5 == _FOUR_BIT:
            clip = load_clip(paths[t5], paths[_CLIP], embeddings, options, text_encoder.T5XXL)
        else:
            clip = comfy.sd.load_clip([paths[_CLIP], paths[t5]], embeddings, comfy.sd.CLIPType.FLUX, options)
        if t5_min_length != MIN_LENGTH:
            clip.set_tokenizer_option("t5xxl_min_length", t5_min_length)
        return io.NodeOutput(clip)


_FOUR_BIT, _T5, _CLIP = "a 4-bit T5", "a T5", "a CLIP"


def _path(name):
    path = folder_paths.get_full_path(FOLDER, name) if isinstance(name, str) else None      # linked, it may be anything
    if path is None:
        raise CheckpointError(f"{shown(name)}: no such file in models/{FOLDER}. Press R to refresh the list, or put the file "
                              "there")
    return path


def _kind(path):
    """Which of the two a file is; files that are no safetensors are for ComfyUI to read."""
    if Path(path).suffix.lower() not in (".safetensors", ".sft"):
        return _T5 if "t5" in Path(path).name.lower() else _CLIP
    tensors = TensorFile(path).tensors
    if text_encoder.is_4bit(tensors):
        return _FOUR_BIT
    needed = f"Needs clip_l.safetensors, {text_encoder.ORDINARY} or {text_encoder.NEEDED}"
    for kind, marks in ((_T5, T5_MARKS), (_CLIP, CLIP_MARKS)):
        mark = next(filter(tensors.get, marks), None)
        if mark:
            if tensors[mark].shape != marks[mark]:
                raise CheckpointError(f"{path}: this is {kind} of another size or packing, {mark} being "
                                      f"{shown(list(tensors[mark].shape))} and not {list(marks[mark])}. {needed}")
            return kind
    found = foreign.identify(tensors, {info.dtype for info in tensors.values()})
    raise CheckpointError(f"{path}: this is {found or 'no text encoder that is known here'}. {needed}")
