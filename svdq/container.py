"""Safetensors on disk: open without reading, read a few tensors, write a large file tensor by tensor.

Reading is the safetensors library's, which checks the header against the file. Writing is ours: the library wants the
whole model in memory at once, and a quantised FLUX is made one layer at a time.
"""

import json
import math
import os
import struct
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, shown

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 << 20       # bytes. FLUX.1 takes 0.4 MB; a longer one is treated as hostile


@dataclass(frozen=True)
class TensorInfo:
    dtype: str                  # safetensors name: "BF16", "F8_E4M3", ...
    shape: tuple

    @property
    def nbytes(self):
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 0


class TensorFile:
    """A safetensors file: `tensors` {name: TensorInfo} and `metadata` {str: str}, data still on disk.

    Raises CheckpointError for anything that is no whole safetensors file.
    """

    def __init__(self, path):
        self.path = Path(path)
        with self._refusing():
            refusal = _refusal(self.path)
        if refusal:
            raise CheckpointError(f"{self.path}: {refusal}")
        with self._refusing(), safe_open(str(self.path), framework="pt") as file:
            self.metadata = file.metadata() or {}
            self.tensors = {}
            for name in file.keys():
                piece = file.get_slice(name)
                self.tensors[name] = TensorInfo(piece.get_dtype(), tuple(piece.get_shape()))

    @contextmanager
    def reading(self):
        """A function name -> tensor over a memory map of the file.

        Tensors are views of the map: copy what must outlive it, never write to them. The map is dropped on leaving, so
        what was read stops counting as this process's memory; open it once per layer, not once per model.
        """
        with ExitStack() as stack:
            with self._refusing():
                file = stack.enter_context(safe_open(str(self.path), framework="pt"))

            def get(name):
                with self._refusing():
                    return file.get_tensor(name)

            yield get

    @contextmanager
    def _refusing(self):
        """What the system and the library raise about a file, as ours."""
        try:
            yield
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: not a complete safetensors file: {shown(error, 200)}. "
                                  "The download was cut short or is damaged; get it again") from error
        except (OSError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {shown(error, 200)}") from error


def _refusal(path):
    """Why this path is no safetensors file, in words a user can act on; None if it looks like one."""
    if os.path.isdir(path):
        return "this is a folder without the two files of a legacy SVDQ model. Pick a .safetensors file"
    if not os.path.exists(path):
        return "no such file. Check the name, or download the model again"
    if not os.path.isfile(path):
        return "this is a device or a pipe. Pick a .safetensors file"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    length = int.from_bytes(head, "little")                 # of the header, which comes next
    if len(head) == 8 and length <= min(size - 8, MAX_HEADER):
        return None
    if head[:4] == b"GGUF":
        return "this is a GGUF file; load it with 'Unet Loader (GGUF)' of the ComfyUI-GGUF pack"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "this is a PyTorch pickle (.pt, .ckpt), not safetensors. Get the model's .safetensors file"
    if head[:2] in (b"ve", b"<!", b"<h", b'{"'):
        return "this is a text page or a git-lfs pointer, not a model. Download the file itself (6 to 7 GB for FLUX.1)"
    if MAX_HEADER < length <= size - 8:
        return f"its header has {length:,} bytes, and no model needs more than {MAX_HEADER:,}. Get the file elsewhere"
    return (f"not a complete safetensors file: it ends after {size:,} bytes. The download was cut short or is damaged; "
            "get it again")


def write_tensors(path, specs, metadata, tensors):
    """Write a safetensors file without holding it in memory.

    specs      {name: TensorInfo}, every tensor of the file in the order its data will come
    metadata   {str: str}
    tensors    iterable of (name, tensor), exactly those of `specs` in that order

    The data goes to a temporary name beside `path` and is renamed when complete, so `path` is either whole or untouched.
    """
    path = Path(path)
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, info in specs.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{path.name}: {shown(name)} is {info.dtype}, which this pack cannot write. "
                                  f"It knows {', '.join(DTYPES)}")
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + info.nbytes]}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        waiting = iter(specs.items())
        for name, tensor in tensors:
            expected, info = next(waiting, (None, None))
            if name != expected or DTYPES[info.dtype] != tensor.dtype or tuple(tensor.shape) != info.shape:
                raise CheckpointError(f"{path.name}: writer got {name} {tuple(tensor.shape)} {tensor.dtype} where the "
                                      f"header says {expected} {info}. This is a bug of the program that writes")
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy())
        missing = next(waiting, (None, None))[0]
        if missing:
            raise CheckpointError(f"{path.name}: writer ended before {missing}. This is a bug of the program that writes")


@contextmanager
def replacing(path):
    """A new binary file that takes the name `path` only if the block ends well."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
