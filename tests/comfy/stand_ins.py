"""A custom node of the tests' ComfyUI: what takes the place of text encoders and of the eye, whose sizes ComfyUI fixes.

Random numbers of the right shapes, seeded by what they stand for. And the projector of USO, whose class is made for a FLUX of
full width, is made for the width of tests/random_models.py.
"""

import functools
import sys
import zlib

import torch

import nodes

TOKENS, CONTEXT, POOLED = 16, 4096, 768
PATCHES, SEEN, LAYERS = 729, 1152, 24       # of SigLIP
HIDDEN = 256                                # of the tests' FLUX


class StandInText:
    """For CLIPTextEncode and its encoders."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def encode(self, text):
        random = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        cond, pooled = (torch.randn(*size, generator=random) for size in ((1, TOKENS, CONTEXT), (1, POOLED)))
        return ([[cond, {"pooled_output": pooled}]],)


class Seen:
    """The fields of a CLIP_VISION_OUTPUT that the nodes of the templates read."""

    def __init__(self, image):
        random = torch.Generator().manual_seed(int(image.sum()))
        self.all_hidden_states = torch.randn(1, LAYERS, PATCHES, SEEN, generator=random)
        self.last_hidden_state, self.penultimate_hidden_states = self.all_hidden_states[:, -1], self.all_hidden_states[:, -2]


class StandInVision:
    """For CLIPVisionEncode and its model."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION_OUTPUT",), "look", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def look(self, image):
        return (Seen(image),)


NODE_CLASS_MAPPINGS = {"StandInText": StandInText, "StandInVision": StandInVision}
patches = sys.modules[nodes.NODE_CLASS_MAPPINGS["ModelPatchLoader"].__module__]
patches.SigLIPMultiFeatProjModel = functools.partial(patches.SigLIPMultiFeatProjModel, hidden_size=HIDDEN)
