"""Which file a user means: a path, or a name on Hugging Face. What is here goes before what is there.

Test: tests/hf/inside/checks_source.py
"""

import os
from pathlib import Path

import torch

from .. import hub
from ..checkpoint import BLOCKS_FILE, JSON_FILES, REST_FILE
from ..container import TensorFile
from ..errors import CheckpointError, shown
from ..families import recognise, unprefixed
from ..kernels import registry
from ..kernels.variant import Target

LEGACY = [BLOCKS_FILE, REST_FILE, *JSON_FILES.values()]


def find(where, *, filename=None, subfolder=None, revision="main", cache_dir=None, local_files_only=False, token=None,
         device=None, dtype=torch.bfloat16, act_bits=None):
    """The path that Checkpoint opens. Raises CheckpointError, which says what is needed."""
    try:
        where = os.fspath(where)
        if not isinstance(where, str) or not where.strip() or os.path.isabs(subfolder or ""):
            raise TypeError
    except TypeError:
        raise CheckpointError(f"from_pretrained: got {shown(where)}. Needs a file, a folder, or owner/name on Hugging "
                              "Face") from None
    path = Path(where, subfolder or "").expanduser()
    if os.path.lexists(path):
        if path.is_dir():
            return _in_folder(path, filename)
        if filename not in (None, path.name):
            raise CheckpointError(f"{path} is a file, and filename is {shown(filename)}. Give one of them")
        return path
    parts = where.strip("/").split("/")
    if where.startswith((".", "/", "~")) or len(parts) < 2 or os.path.isabs(where):
        raise CheckpointError(f"{path}: no such file or folder. On Hugging Face, a model is owner/name")
    if where.endswith(".safetensors"):
        if len(parts) == 2:
            raise CheckpointError(f"{path}: no such file. On Hugging Face, a file is owner/name/FILE.safetensors")
        if filename not in (None, "/".join(parts[2:])):
            raise CheckpointError(f"{where} names a file, and filename is {shown(filename)}. Give one of them")
        filename = "/".join(parts[2:])
    elif len(parts) > 2:
        raise CheckpointError(f"{path}: no such folder. On Hugging Face, a model is owner/name; a folder in it is the argument "
                              "subfolder")
    fp4 = filename is None and _wants_fp4(device, dtype, act_bits)
    return hub.cached("/".join(parts[:2]), filename, revision, subfolder=subfolder, cache_dir=cache_dir,
                      local_files_only=local_files_only, token=token, wants_fp4=fp4, legacy=LEGACY)


def _in_folder(folder, filename):
    if filename is not None:
        if not (folder / filename).is_file():
            raise CheckpointError(f"{folder / filename}: no such file")
        return folder / filename
    if (folder / BLOCKS_FILE).is_file():
        return folder
    files = sorted(folder.glob("*.safetensors"))
    ours = files if len(files) < 2 else [file for file in files if _is_svdq(file)]
    if not files and (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder}: is the folder of a pipeline. Its transformer is in a folder of it: add "
                              'subfolder="transformer", or load the pipeline with DiffusionPipeline.from_pretrained')
    if len(ours) != 1:
        what = ", ".join(shown(file.name) for file in (ours or files)[:3]) or "no .safetensors file"
        raise CheckpointError(f"{folder}: holds {what}. Needs one SVDQ file" + (": name it with the argument filename" if ours
                                                                              else f", or {BLOCKS_FILE} and {REST_FILE}"))
    return ours[0]


def _is_svdq(file):
    try:
        return unprefixed(TensorFile(file).tensors, recognise)[1] is not None
    except CheckpointError:
        return False


def _wants_fp4(device, dtype, act_bits):
    """Whether the fp4 file is the better one where the model is to run: on this device, or on the GPU where none is given."""
    if (device is None or device.type == "cpu") and torch.cuda.is_available():
        device = torch.device("cuda")
    return device is not None and registry.precision_for(Target.of(device), dtype, act_bits) == "nvfp4"
