"""Safetensors on disk: open without reading, read tensors to where they belong, write a large file tensor by tensor.

Both are ours. The safetensors library reads through memory maps: a file that is cut or written over while a map of it is in
use ends the process with a signal, or changes numbers in use. And it writes from memory only, while a quantised FLUX is made
one layer at a time. What we take for a whole file is what the library takes for one: tests/hostile/test_container.py.
"""

import json
import math
import os
import re
import struct
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError, shown
from .files import open_regular, writing
from .ways_out import way_out

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CLOCK_STEP = 10_000_000     # nanoseconds; file systems take the time of a change from a clock of this step or a finer one
MAX_HEADER = 8 << 20        # bytes. FLUX.1 takes 0.4 MB; a longer one is treated as hostile
SCRATCH = 4 << 20           # bytes that are read at a time, at most
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{,15}")     # the format gains dtypes that we do not know
MAX_AXES = 64               # of torch
_STRING = re.compile(rb'"[^"]*"')
MAX_TENSORS = 20_000        # FLUX.1 has 2,604, and a LyCORIS for every layer of it less than 5,000


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
        refusal = _no_file(self.path)
        if refusal:
            raise CheckpointError(f"{self.path}: {refusal}")
        with self._refusing():
            with open_regular(self.path) as file:
                self._stamp = self._settled(file)
                self._header(file, self._stamp[0])

    def _header(self, file, size):
        head = file.read(8)
        length = int.from_bytes(head, "little")                 # of the header, which comes next
        refusal = _refusal(head, length, size)
        if refusal:
            raise CheckpointError(f"{self.path}: {refusal}")
        text = bytearray(length)
        _read_all(file, text)
        self._refuse_many(_objects(text) - 2)           # before it is parsed, which takes seconds for a million
        try:
            self.metadata, self.tensors, self._spans = _parse(text, size - 8 - length)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: not a complete safetensors file: {shown(error, 200)}. "
                                  "The download was cut short or is damaged; get it again") from error
        self._refuse_many(len(self.tensors))
        self._start = 8 + length

    def _refuse_many(self, count):
        if count > MAX_TENSORS:
            raise CheckpointError(f"{self.path}: its header lists {count:,} tensors or more, and no model needs more than "
                                  f"{MAX_TENSORS:,}. Get the file elsewhere")

    @contextmanager
    def reading(self):
        """A function get(name, out=None, rows=None) -> tensor that reads a tensor into memory of its own, or into `out`: a
        contiguous CPU tensor of as many numbers, to whose dtype they are converted. rows (start, stop) of its first axis:
        these alone.

        Raises CheckpointError on leaving, too, when the file has changed since its header was read: what was read is then
        not to be used.
        """
        with self._refusing():
            file = open_regular(self.path)
        with file:
            self._require_unchanged(file)
            largest = max((info.nbytes for info in self.tensors.values()), default=0)
            scratch = torch.empty(min(largest, SCRATCH), dtype=torch.uint8)

            def get(name, out=None, rows=None):
                if name not in self.tensors:
                    raise CheckpointError(f"{self.path}: has no tensor {shown(name)}. Get the whole file")
                info, (start, _) = self.tensors[name], self._spans[name]
                if info.dtype not in DTYPES:
                    raise CheckpointError(f"{self.path}: {shown(name)} is {shown(info.dtype)}, which this pack cannot read. It "
                                          f"knows {', '.join(DTYPES)}")
                shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
                with self._refusing():
                    stored = out
                    if out is None or out.dtype != DTYPES[info.dtype]:
                        stored = torch.empty(shape, dtype=DTYPES[info.dtype])
                    if stored.numel():
                        skipped = 0 if rows is None else rows[0] * info.nbytes // info.shape[0]
                        file.seek(self._start + start + skipped)
                        self._fill(stored.view(-1).view(torch.uint8), file, None if rows else scratch)
                return stored if out is None or stored is out else out.copy_(stored.view(out.shape))

            yield get
            self._require_unchanged(file)

    def _settled(self, file):
        """The stamp of a file that nobody has just written to: a further change within the same step of the clock would not
        show."""
        for _ in range(20):
            stamp = _stamp(file)
            if not 0 <= time.time_ns() - stamp[1] < CLOCK_STEP:
                return stamp
            time.sleep(CLOCK_STEP / 1e9)
        raise self._changed()

    def _fill(self, out, file, scratch):
        """Read bytes from where a file stands: into scratch memory that is used again and again, and from there to `out`. To
        touch new memory costs several times what reading does, and torch, which copies, shares that among the cores.
        scratch None: straight into `out`, which is in use itself."""
        for part in out.split(len(out) if scratch is None else len(scratch)):
            memory = part if scratch is None else scratch[:len(part)]
            if not _read_all(file, memory.numpy()):
                raise self._changed()
            if memory is not part:
                part.copy_(memory)

    def _require_unchanged(self, file):
        with self._refusing():
            if _stamp(file) != self._stamp:
                raise self._changed()

    def _changed(self):
        return CheckpointError(f"{self.path}: has changed while it was being read. Wait until it is written, then run this "
                               "again")

    @contextmanager
    def _refusing(self):
        """What the system raises about a file, as ours."""
        try:
            yield
        except (OSError, OverflowError, RuntimeError, MemoryError) as error:        # of torch: no tensor can have that shape
            raise CheckpointError(f"{self.path}: cannot be read: {shown(str(error) or 'out of memory', 200)}") from error


def _objects(text):
    """How many objects there are in a JSON text: braces that are in no string."""
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")        # so that every quote begins or ends a string
    return _STRING.sub(b"", plain).count(b"{")


def _read_all(file, buffer):
    """Fill a buffer; False where the file ends before. Network disks read less than they are asked for, and no system more
    than 2 GB at once."""
    rest = memoryview(buffer)
    while len(rest):
        count = file.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True


def _stamp(file):
    """What changes when somebody writes to a file."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def _parse(text, size):
    """(metadata, {name: TensorInfo}, {name: (first byte, last + 1)}) of a header with `size` bytes of data behind it.

    Raises ValueError, which says what is wrong, unless every byte belongs to just one tensor, as the format demands. A dtype
    that is new to us is none of our business until somebody wants the tensor.
    """
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata in its header are no texts")
    tensors, spans = {}, {}
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its header does not say where {shown(name)} is") from None
        numbers = *shape, start, stop
        if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or len(shape) > MAX_AXES or not all(
                type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise ValueError(f"its header says of {shown(name)} what cannot be: {shown(entry)}")
        tensors[name], spans[name] = TensorInfo(dtype, shape), (start, stop)
        if dtype in DTYPES and stop - start != tensors[name].nbytes:
            raise ValueError(f"{shown(name)} {dtype} {list(shape)} has {tensors[name].nbytes:,} bytes, its header says "
                             f"{stop - start:,}")
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end or stop < start:
            raise ValueError(f"{shown(name)} begins at byte {start:,} of the data, and what comes before it ends at {end:,}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes, the file {size:,}")
    return metadata, tensors, spans


def _unique(pairs):
    """A JSON object without a name that is there twice, or is no text."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice in its header")
    "".join(found).encode()                     # half of a surrogate pair is a ValueError
    return found


def _no_file(path):
    """Why there is nothing to open at a path; None if there may be."""
    if os.path.isdir(path):
        return "this is a folder without the two files of a legacy SVDQ model. Pick a .safetensors file"
    if not os.path.exists(path):
        return "no such file. Check the name, or download the model again"
    if not os.path.isfile(path):
        return "this is a device or a pipe. Pick a .safetensors file"
    return None


def _refusal(head, length, size):
    """Why a file of this size that begins so is no safetensors file, in words a user can act on; None if it looks like one.

    head   its first 8 bytes        length   of the header that these claim
    """
    if len(head) == 8 and length <= min(size - 8, MAX_HEADER):
        return None
    if head[:4] == b"GGUF":
        return f"this is a GGUF file; {way_out('GGUF')}"
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
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{path}: its header would have {len(text):,} bytes, and nothing reads one of more than "
                              f"{MAX_HEADER:,}. Shorten the metadata")
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
    """A new binary file that takes the name `path` only if the block ends well.

    Raises CheckpointError where the system refuses: the disk is full, the folder cannot be written to.
    """
    path = Path(path)
    with writing(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:       # of writing; what names a file is about that one
            with writing(path):
                raise
        raise
