"""SVDQ models in ComfyUI's folders, and the choices the loaders share."""

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..svdq.checkpoint import BLOCKS_FILE, REST_FILE
from ..svdq.errors import CheckpointError
from .demo import MODELS

FOLDER = "diffusion_models"
DEMO_MODELS = {path.name for path in (MODELS / FOLDER).glob("*.safetensors")}
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACT_BITS = {"auto": None, "4": 4, "8": 8, "16": 16}


def names():
    """Entries of models/diffusion_models; the two files of a legacy folder appear as their folder. A new loader shows the
    first: the user's own SVDQ models come before the demo's, and both before what is no SVDQ model by its name."""
    found = set()
    for name in folder_paths.get_filename_list(FOLDER):
        path = Path(name)
        if path.name == BLOCKS_FILE:
            found.add(path.parent.as_posix())
        elif path.name != REST_FILE:
            found.add(name)
    return sorted(found, key=lambda name: ("svdq" not in name.lower(), name in DEMO_MODELS, name.lower()))


def path_of(name):
    """The file or folder behind an entry of names()."""
    inner = f"{name}/{BLOCKS_FILE}"
    path = folder_paths.get_full_path(FOLDER, name) or folder_paths.get_full_path(FOLDER, inner)
    if path is None:
        raise CheckpointError(f"{name}: no such model in models/{FOLDER}. Press R to refresh the list, or put the file there")
    return path


def compute_dtype_input():
    return io.Combo.Input("compute_dtype", options=list(DTYPES), default="auto", optional=True, advanced=True,
                          tooltip="Type of the 16-bit arithmetic around the 4-bit weights. auto: what ComfyUI picks for "
                                  "FLUX on this device.")


def act_bits_input():
    return io.Combo.Input("act_bits", options=list(ACT_BITS), default="auto", optional=True, advanced=True,
                          tooltip="To how many bits activations are rounded. 4: as in the SVDQuant paper. 8: more accurate. "
                                  "16: never. auto: the fastest this GPU has. Without kernels for what is asked nothing is "
                                  "rounded; the log says what runs.")


def download_folder():
    """Where a downloaded model belongs. The first folder ComfyUI lists is the old models/unet."""
    folders = folder_paths.get_folder_paths(FOLDER)
    return next((folder for folder in folders if Path(folder).name == FOLDER), folders[0])
