"""SVDQ models in ComfyUI's folders, and the choices the loaders share."""

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..svdq.checkpoint import BLOCKS_FILE, JSON_FILES, REST_FILE
from ..svdq.errors import CheckpointError, shown
from . import demo

FOLDER = "diffusion_models"
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACT_BITS = {"auto": None, "4": 4, "8": 8, "16": 16}


def names():
    """Entries of models/diffusion_models, the two files of a legacy folder as their folder, and the demo's. A new loader shows
    the first: the user's own SVDQ models come before the demo's, and both before what is no SVDQ model by its name."""
    found = {listed(name) for name in folder_paths.get_filename_list(FOLDER) if Path(name).name != REST_FILE}
    demos = demo.files(FOLDER)
    return sorted({*found, *demos}, key=lambda name: ("svdq" not in name.lower(), name in demos, name.lower()))


def listed(name):
    """The entry of names() for a file of models/diffusion_models."""
    path = Path(name)
    return path.parent.as_posix() if path.name in (BLOCKS_FILE, REST_FILE) else name


def path_of(name):
    """The file or folder behind an entry of names()."""
    given = (name, f"{name}/{BLOCKS_FILE}") if isinstance(name, str) else ()    # linked to an input, it may be anything
    path = next(filter(None, (folder_paths.get_full_path(FOLDER, one) for one in given)), None)
    if path is None and given:
        path = demo.files(FOLDER).get(name)
    if path is None:
        raise CheckpointError(f"{shown(name)}: no such model in models/{FOLDER}. Press R to refresh the list, or put the file "
                              "there")
    return path


def stamp(path):
    """Another value once a file that loading `path` reads is replaced, comes or goes."""
    path = Path(path)
    files = [path]
    if path.name in (BLOCKS_FILE, REST_FILE):           # of a legacy folder all are read, whichever is named
        files = [path.with_name(name) for name in (BLOCKS_FILE, REST_FILE, *JSON_FILES.values())]
    stats = [file.stat() if file.exists() else None for file in files]
    return [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]


def settings(compute_dtype, act_bits):
    """What the choices of these names mean to load_model."""
    for name, value, choices in (("compute_dtype", compute_dtype, DTYPES), ("act_bits", act_bits, ACT_BITS)):
        if not isinstance(value, str) or value not in choices:
            raise CheckpointError(f"{name} is {shown(value)}, needs to be one of {', '.join(choices)}. Choose one of these")
    return DTYPES[compute_dtype], ACT_BITS[act_bits]


def model_output():
    return io.Model.Output(tooltip="The model, for a sampler, a LoRA or any other node that takes a FLUX.")


def compute_dtype_input():
    return io.Combo.Input("compute_dtype", options=list(DTYPES), default="auto", optional=True, advanced=True,
                          tooltip="Type of the 16-bit arithmetic around the 4-bit weights. auto: what ComfyUI picks for "
                                  "FLUX on this device.")


def act_bits_input():
    return io.Combo.Input("act_bits", options=list(ACT_BITS), default="auto", optional=True, advanced=True,
                          tooltip="To how many bits activations are rounded. 4: as in the SVDQuant paper. 8: more accurate. "
                                  "16: never. auto: the fastest here. Without kernels for what is asked nothing is "
                                  "rounded; the node says what runs.")


def download_folder():
    """Where a downloaded model belongs. The first folder ComfyUI lists is the old models/unet."""
    folders = folder_paths.get_folder_paths(FOLDER)
    return next((folder for folder in folders if Path(folder).name == FOLDER), folders[0])
