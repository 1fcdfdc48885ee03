"""LoRA files: the border at which what others wrote becomes tensors that the rest can trust.

Safetensors are read by svdq/container.py. Archives of torch.save (.pt, .ckpt, .bin) are read here, with Python's own zipfile
and pickle: torch.load takes sizes out of the file, and its answers differ between versions of torch.

Test: tests/hostile/test_lora_files.py
"""

import io
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from . import lora_keys
from .container import MAX_TENSORS, NAMES, TensorFile
from .errors import CheckpointError, LoraError, shown
from .files import open_regular
from .kernels.errors import printable
from .lora import largest

FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64")
WHOLE = ("I64", "I32", "I16", "I8", "U8")       # for an alpha, or the shape that a LoRA wants
LONGEST_KEY = 250           # characters; of FLUX, with all wrappers, 120
MOST_AXES = 8
MOST_TEXT = 4 << 20         # bytes of an archive's pickle and of its directory: 200 per tensor. More is never read at a time
SHARED = 4                  # how often a number of an archive may be used: q, k and v of one down use it three times


def read_lora(path):
    """{key: tensor} of a file: plain CPU tensors of floats or a few whole numbers, without NaN and Inf, in memory of ours.

    Raises LoraError for what is no readable LoRA file, and for files that are something else, before they are read where the
    format allows it.
    """
    read = _read_safetensors if path.lower().endswith((".safetensors", ".sft")) else _read_archive
    try:
        tensors = read(path)
    except CheckpointError as error:
        reason = str(error).removeprefix(printable(f"{Path(path)}: ")).partition(". ")[0]
        raise LoraError(f"not a readable LoRA file: {reason}. The download was cut short or is damaged, or a web page was "
                        "saved in its place; get it again") from error
    for key, tensor in tensors.items():
        if not math.isfinite(largest(tensor)):
            raise LoraError(f"{shown(key)} contains NaN or Inf. The file is damaged or was made by a broken trainer; get it "
                            "again")
    return tensors


def _read_safetensors(path):
    file = TensorFile(path)
    _refuse({key: (info.dtype, info.shape) for key, info in file.tensors.items()})
    with file.reading() as get:
        return {key: get(key) for key in file.tensors}


def _refuse(tensors):
    """Raise for {key: (safetensors dtype, shape)} that can be no LoRA for FLUX.1."""
    if len(tensors) > MAX_TENSORS or any(len(key) > LONGEST_KEY for key in tensors):
        raise LoraError(f"it has {len(tensors):,} tensors, with names of up to {max(map(len, tensors))} characters. A LoRA has "
                        f"{MAX_TENSORS:,} at most, of {LONGEST_KEY} characters. Get the file elsewhere")
    why = lora_keys.refusal(tensors, {dtype for dtype, _ in tensors.values()})
    if why:
        raise LoraError(f"this is {why}")
    for key, (dtype, shape) in tensors.items():
        few = math.prod(shape) == 1 or key.endswith(".reshape_weight")
        if len(shape) > MOST_AXES or dtype not in FLOATS and not (few and dtype in WHOLE):
            raise LoraError(f"{shown(key)} is {shown(dtype)} {list(shape)[:8]}, and the numbers of a LoRA are one of "
                            f"{', '.join(FLOATS)}. Get this LoRA in one of these, or have the trainer save it so")


# ---- archives of torch.save

_STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
             "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
             "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
             "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
             "UntypedStorage": torch.uint8}
# Opcodes that torch.save writes, whatever the protocol. Others call what the file says, hash what it made up, or take memory
# by its word.
_USED = {code[0] for code in (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BINPERSID,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE, pickle.NONE, pickle.NEWTRUE,
    pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT)}


def _read_archive(path):
    try:
        with _Limited(open_regular(path)) as file:
            before = os.fstat(file.fileno())
            if file.read(4) != b"PK\3\4":
                raise CheckpointError("this is no archive of PyTorch 1.6 or newer")
            tensors = _Archive(file, before.st_size).tensors()
            after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise CheckpointError("it changed while it was read")
    except (CheckpointError, LoraError):
        raise
    except Exception as error:              # of parsers that were given a stranger's bytes: they may raise anything
        raise CheckpointError(f"{type(error).__name__}: {shown(error, 200)}") from error
    _refuse({key: (NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for key, tensor in tensors.items()})
    return tensors


class _Limited(io.BufferedReader):
    """zipfile reads a directory of whatever size the file claims."""

    def read(self, size=-1, /):
        return super().read(MOST_TEXT if size < 0 else min(size, MOST_TEXT))


class _Names(dict):
    """A dictionary of the file. Keys of nested tuples take for ever to hash."""

    def __setitem__(self, key, value):
        if not isinstance(key, (str, int)):
            raise CheckpointError("its names are no text")
        super().__setitem__(key, value)


class _Storage(NamedTuple):
    """bytes: uint8 [bytes]"""
    bytes: torch.Tensor
    dtype: torch.dtype


class _Archive(pickle._Unpickler):          # the one in Python: that in C takes memory as its opcodes tell it to
    """torch.save's archive of tensors in dictionaries. Nothing in it is imported, called or built but what is named here."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code in _USED}

    def __init__(self, file, size):
        self.archive = zipfile.ZipFile(file)
        parts = self.archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
            raise CheckpointError("its parts are compressed or overlap, and torch.save writes them plain")
        names = [part.filename for part in parts if part.filename.endswith("/data.pkl")]
        if len(names) != 1 or len(parts) > MAX_TENSORS + 100:
            raise CheckpointError(f"it has {len(parts):,} parts, {len(names)} of them data.pkl")
        self.folder, self.parts, self.storages = names[0].removesuffix("data.pkl"), set(self.archive.namelist()), {}
        if f"{self.folder}byteorder" in self.parts and bytes(self.part("byteorder").numpy()).strip() != b"little":
            raise CheckpointError("it is of a computer with another order of bytes")
        self.size, self.left, self.made = size, SHARED * size, 0
        super().__init__(io.BytesIO(self.part("data.pkl", MOST_TEXT).numpy()))

    def part(self, name, most=math.inf):
        """uint8 [bytes]"""
        size = self.archive.getinfo(self.folder + name).file_size       # all together are not more than the file has
        if size > most:
            raise CheckpointError(f"its {shown(name)} has {size:,} bytes, and a LoRA needs {most:,} at most")
        content, filled = torch.empty(size, dtype=torch.uint8), 0
        with self.archive.open(self.folder + name) as file:
            while piece := file.read(MOST_TEXT):                        # more at once it would put together piece by piece
                content[filled:filled + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
                filled += len(piece)
        if filled != size:
            raise CheckpointError(f"its {shown(name)} ends early")
        return content

    def tensors(self):
        """{key: tensor}; from within what ComfyUI's load_torch_file looks into."""
        content = self.load()
        if isinstance(content, dict):
            only = next(iter(content.values()), None)
            if "state_dict" in content:
                content = content["state_dict"]
            elif len(content) == 1 and isinstance(only, dict):
                content = only
        found = {} if not isinstance(content, dict) else {
            key: tensor for key, tensor in content.items() if isinstance(tensor, torch.Tensor)}
        if not found or not all(isinstance(key, str) for key in found):
            raise CheckpointError("it holds no tensors by name")
        if sum(tensor.nbytes for tensor in found.values()) > SHARED * self.size:
            raise CheckpointError("its tensors claim more numbers than the file has")
        return {key: tensor.detach() for key, tensor in found.items()}      # an object of its own for every key

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return _new_names
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return self.tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _same
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise CheckpointError(f"it holds a {shown(module)} {shown(name)}, and a LoRA holds plain tensors")

    def persistent_load(self, pid):
        """A _Storage. Its name must be a text: nested tuples take for ever to hash, or end the process."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[1], torch.dtype) and isinstance(pid[2], str)):
            raise CheckpointError("it refers to numbers in another way than torch.save does")
        _, dtype, name, _, _ = pid
        if name not in self.storages:
            self.storages[name] = self.part(f"data/{name}")
        return _Storage(self.storages[name], dtype)

    def tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, dtype=None, metadata=None):
        """A tensor in memory of its own."""
        if not isinstance(storage, _Storage) or not all(isinstance(axes, tuple) and len(axes) <= MOST_AXES and all(
                type(n) is int and 0 <= n < 1 << 63 for n in axes) for axes in (size, stride, (offset,))):
            raise CheckpointError("its tensors have no such sizes as tensors have")
        dtype = dtype if isinstance(dtype, torch.dtype) else storage.dtype      # of version 3; version 2 has metadata there
        nbytes = math.prod(size) * dtype.itemsize
        self.left -= nbytes
        self.made += 1
        if nbytes > len(storage.bytes) or self.left < 0 or self.made > MAX_TENSORS:
            raise CheckpointError("its tensors claim more numbers than the file has")
        whole = storage.bytes[:len(storage.bytes) // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def within(self, kind):
        """The innermost thing that is being filled, which is one of ours."""
        if type(self.stack[-1]) is not kind:
            raise CheckpointError("it puts things where torch.save puts none")
        return self.stack[-1]

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.within(_Names)[key] = value

    def load_setitems(self):
        items = self.pop_mark()
        names = self.within(_Names)
        for key, value in zip(items[::2], items[1::2], strict=True):
            names[key] = value

    def load_append(self):
        value = self.stack.pop()
        self.within(list).append(value)

    def load_appends(self):
        items = self.pop_mark()
        self.within(list).extend(items)

    def load_build(self):
        self.stack.pop()                    # attributes of dictionaries, which nobody reads

    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
                 pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends}
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Names())


def _new_names():
    return _Names()


def _same(tensor, requires_grad=False, hooks=None):
    return tensor
