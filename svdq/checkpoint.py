"""An SVDQ checkpoint on disk: opened, checked against what a model of its family and sizes must hold, read layer by layer.

Opening reads headers only. Tensors are read one after the other to where the numbers will lie, so a model out of a 6.8 GB file
costs its own size in memory and no more.

Source: checkpoint-format 1, 2, 3, 10.
"""

import json
import math
import os
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from . import foreign
from .container import DTYPES, TensorFile, TensorInfo, write_tensors
from .errors import CheckpointError, shown
from .families import FAMILIES, FAMILY_NAMES, recognise, unprefixed
from .families.family import by_layer, swap_halves
from .files import read_text, while_free
from .format import PackedTiles, Tile, blank_slot, bounds, copy_weight, fill_slot, with_memory
from .kernels import weights
from .kernels.errors import command
from .kernels.layout import GROUP, RANK_ALIGN

BLOCKS_FILE, REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
JSON_FILES = {"config": "config.json", "comfy_config": "comfy_config.json"}      # what they are in a single file's metadata
HALF, FP8 = ("BF16", "F16"), ("F8_E4M3", "F8_E5M2")
FLOATS = (*HALF, "F32")

# Bounds of the size of numbers, far from those of any model: within them the fp32 arithmetic of a layer does not overflow.
LARGEST, LARGEST_SMOOTH, LEAST_SMOOTH = 1e5, 1e12, 1e-12
PRECISIONS = {"int4": ("int4", None, None), "nvfp4": ("fp4_e2m1_all", [None, "fp8_e4m3_nan"], "fp8_e4m3_nan")}


class Checkpoint:
    """An SVDQ model: one file, or a legacy folder of two.

    path        as given
    metadata    {str: str} of the file, or made from the folder's JSON files
    family      module of families
    tensors     {canonical name: TensorInfo}; once the shape is known, of the model alone
    shape       the family's Shape; None where the problems leave it open
    slots       [families.family.Slot] of such a shape
    precision   "int4" or "nvfp4"
    ranks       Counter {rank: W4A4 layers that have it}
    problems    what makes it unusable, one line each; empty when it can be loaded
    notices     what is odd but harmless

    Raises CheckpointError at once for anything that is no SVDQ model of a known family; `require()` raises for problems.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.problems, self.notices = [], []
        self.files = self._open_files()
        names, self.family = unprefixed((name for file in self.files for name in file.tensors), recognise)
        if self.family is None:
            raise CheckpointError(f"{self.path}: {self._what_instead()}.")
        canonical = {stored: self.family.canonical(name) for name, stored in names.items()}
        self.tensors, self._where = {}, {}
        twice, others = [], []
        for file in self.files:
            for stored, info in file.tensors.items():
                name = canonical.get(stored)
                if name is None:
                    others.append(stored)
                elif name in self.tensors:                  # in a legacy folder the block file comes first and wins
                    twice.append(name)
                else:
                    self.tensors[name], self._where[name] = info, (file, stored)
        if others:
            self.notices.append(f"{len(others)} tensors beside the model are ignored: {_some(others)}")
        if twice:
            self.notices.append(f"{len(twice)} tensors are there twice, the first is used: {_some(twice)}")
        self.shape = self._shape()
        self.precision = "nvfp4" if self._any_nvfp4() else "int4"
        self.slots = list(self.shape.slots()) if self.shape else []
        self.ranks = Counter(self.rank(slot) for slot in self.slots if slot.kind == "w4a4")
        self._check()

    # ---- opening

    def _open_files(self):
        path = self.path
        if path.name in (BLOCKS_FILE, REST_FILE) and os.path.isfile(path):
            path = path.parent                              # one half of a legacy folder was picked
        if os.path.isdir(path):
            halves = [path / BLOCKS_FILE, path / REST_FILE]
            missing = [half.name for half in halves if not os.path.isfile(half)]
            files = sorted(path.glob("*.safetensors"))
            if len(missing) == 2 and len(files) == 1:       # as diffusers keeps a model
                return self._open_file(files[0])
            if missing:
                raise CheckpointError(f"{path}: not an SVDQ model folder, {' and '.join(missing)} missing. A legacy SVDQ "
                                      f"model is a folder with {BLOCKS_FILE} and {REST_FILE}; download the other file too")
            files, self.metadata = [TensorFile(half) for half in halves], {}
            for key, name in JSON_FILES.items():
                try:
                    if (path / name).exists():
                        self.metadata[key] = read_text(path / name)
                except CheckpointError as error:
                    self.notices.append(f"{error}; the model is read without it")
            return files
        return self._open_file(path)

    def _open_file(self, path):
        file = TensorFile(path)
        self.metadata = file.metadata
        return [file]

    def _what_instead(self):
        tensors = {name: info for file in self.files for name, info in file.tensors.items()}
        found = foreign.identify(tensors, {info.dtype for info in tensors.values()})
        if found:
            return f"this is {found}"
        return (f"not an SVDQ {FAMILY_NAMES} model: it holds {_some(tensors) or 'no tensors'}. "
                "Get a file named svdq-int4_r32-... or svdq-fp4_r32-..., "
                f"which has {' or '.join(family.MARKS[0] for family in FAMILIES)}")

    def _shape(self):
        """None for a file whose sizes cannot be told: it cannot be checked any further."""
        try:
            return self.family.read_shape(self.tensors)
        except CheckpointError as error:
            self.problems.append(str(error))
            return None

    def _any_nvfp4(self):
        return any(info.dtype == "F8_E4M3" and name.endswith(".wscales") or name.endswith((".wtscale", ".wcscales"))
                   for name, info in self.tensors.items())

    def rank(self, slot):
        found = (self.tensors.get(f"{slot.module}.{name}") for name in ("lora_down", "lora_up"))
        return next((info.shape[1] for info in found if info and len(info.shape) == 2), 0)

    # ---- checking

    def _check(self):
        if self.shape is None:
            return
        known = set()
        for name, dtypes, shape, needed in self._expected():
            known.add(name)
            info = self.tensors.get(name)
            if info is None:
                if needed:
                    self.problems.append(f"{name}: missing; needs {' or '.join(dtypes)} {list(shape)}")
            elif info.dtype not in dtypes or not _fits(info.shape, shape):
                self.problems.append(f"{name}: is {info.dtype} {shown(list(info.shape))}; "
                                     f"needs {' or '.join(dtypes)} {list(shape)}{self._hint(name, info)}")
        without = [slot.module for slot in self.slots if slot.kind == "w4a4" and not self.rank(slot)]
        if without and not self.problems:
            self.notices.append(f"{len(without)} 4-bit layers have no low-rank branch (lora_down, lora_up), the first is "
                                f"{without[0]}. Unless the file was made without, it is not whole, and pictures are worse")
        extra = sorted(set(self.tensors) - known)
        if extra:
            self.notices.append(f"{len(extra)} tensors {self.family.NAME} does not have are ignored: {_some(extra)}")
            self.tensors = {name: info for name, info in self.tensors.items() if name in known}
        self._check_metadata()

    def _hint(self, name, info):
        if not name.endswith(".wscales"):
            return ""
        if info.dtype in ("U8", "F8_E8M0"):                 # MXFP4 files look like NVFP4 ones but for these scales
            return (f". This is the MXFP4 variant, which no published {self.family.NAME} file uses; get the int4 or fp4 "
                    "file")
        if self.precision == "nvfp4" and info.dtype in HALF:
            return ". Layers of an int4 and of an fp4 file are mixed here"
        return ""

    def _expected(self):
        """(name, dtypes, shape, needed) of every tensor; a first axis of (n,) means "at least n"."""
        for slot in self.slots:
            yield from self._expected_awq(slot) if slot.kind == "awq" else self._expected_w4a4(slot)
        for name, shape in self.shape.plain():
            yield name, (*FLOATS, *FP8), shape, True
            scale = self._scale_of(name)
            if scale:
                yield scale, FLOATS, (1,), True

    def _expected_w4a4(self, slot):
        n, k, at = slot.n, slot.k, f"{slot.module}."
        yield at + "qweight", ("I8",), (n, k // 2), True
        scale = ("F8_E4M3",) if self.precision == "nvfp4" else FLOATS
        yield at + "wscales", scale, (k // GROUP[self.precision], n), True
        yield at + "smooth", FLOATS, (k,), True
        yield at + "smooth_orig", FLOATS, (k,), False
        if slot.bias:
            yield at + "bias", FLOATS, (n,), False
        down, up = (self.tensors.get(at + name) for name in ("lora_down", "lora_up"))
        rank = self.rank(slot)
        padded = -(-rank // RANK_ALIGN) * RANK_ALIGN            # a rank that is no multiple of 16 fails as a wrong shape
        yield at + "lora_down", FLOATS, (k, padded), up is not None
        yield at + "lora_up", FLOATS, (n, padded), down is not None
        if self.precision == "nvfp4":
            yield at + "wcscales", FLOATS, (n,), False
            yield at + "wtscale", FLOATS, (1,), False

    def _expected_awq(self, slot):
        n, k, at = slot.n, slot.k, f"{slot.module}."
        yield at + "qweight", ("I32",), (n // 4, k // 2), True
        yield at + "wscales", FLOATS, ((k // 64,), n), True # writers pad the groups to a multiple of 16
        yield at + "wzeros", FLOATS, ((k // 64,), n), True
        yield at + "bias", FLOATS, (n,), False

    def _check_metadata(self):
        """The tensors are the truth; metadata that contradicts them is worth a word, missing metadata is not."""
        text = self.metadata.get("quantization_config")
        if text is None:
            return
        try:
            weight = json.loads(text)["weight"]
            claimed = shown(weight["dtype"]), shown(weight["group_size"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self.notices.append("quantization_config in the metadata is not readable; the tensors decide")
            return
        actual = PRECISIONS[self.precision][0], str(GROUP[self.precision])
        if claimed != actual:
            self.notices.append(f"the metadata says {claimed[0]} in groups of {claimed[1]}, the tensors are "
                                f"{actual[0]} in groups of {actual[1]}; the tensors decide")

    def require(self):
        """Raise CheckpointError unless the model can be loaded."""
        if self.problems:
            more = len(self.problems) - 1
            rest = f" ({more} more; `{command('info', self.path.absolute())}` lists them)" if more else ""
            raise CheckpointError(f"{self.path}: cannot be loaded. {self.problems[0]}{rest}. The file is damaged, or not of "
                                  "the published SVDQ format; download it again")
        return self

    # ---- reading

    @property
    def nbytes(self):
        return sum(info.nbytes for info in self.tensors.values())

    @contextmanager
    def reading(self):
        """A function (canonical name, out=None, rows=None) -> stored tensor, see TensorFile.reading; None if absent.

        Raises CheckpointError on leaving, too, when a file has changed meanwhile.
        """
        with ExitStack() as stack:
            getters = {id(file): stack.enter_context(file.reading()) for file in self.files}

            def get(name, out=None, rows=None):
                file, stored = self._where.get(name, (None, None))
                return None if file is None else self._checked(name, getters[id(file)](stored, out, rows))

            yield get

    def layers(self, places):
        """(layer name, format.PackedTiles, bias fp32 [N] or None) for every layer of a host; all is new memory.

        places   families.family.Place of the slots in that host, as shape.comfy_places() are
        """
        with self.reading() as get:
            for layer in by_layer(places):
                yield layer.name, *self._layer(layer, get)

    def _layer(self, layer, get):
        tiles, blanks = [], [blank_slot(place.slot, self.precision, self._info) for place in layer.places]
        for place, blank in zip(layer.places, blanks):
            whole = place.n == place.slot.n
            tiles.append(Tile(place.row, place.col, blank if whole else blank.cut(place.start, place.start + place.n)))
        tiles, bias = PackedTiles(tiles), torch.zeros(layer.n) if layer.bias else None
        for i, (place, blank, tile) in enumerate(zip(layer.places, blanks, tiles)):
            rows = slice(place.start, place.start + place.n)
            if place.n == place.slot.n:
                weight, slot_bias = fill_slot(place.slot, tile.weight, get)
            else:
                weight, slot_bias = fill_slot(place.slot, with_memory(blank), get)
                copy_weight(weight.cut(rows.start, rows.stop), tile.weight)
                weight = replace(weight, **tile.weight.tensors())
            tiles[i] = replace(tile, weight=weight)
            if slot_bias is not None:
                bias[place.row:place.row + place.n] += slot_bias[rows]
        return tiles, bias

    def _scale_of(self, name):
        """The tensor that an fp8 one is to be multiplied with, by either of its names; None where there is none."""
        module = name.removesuffix(".weight")
        return next((scale for scale in (f"{module}.scale_weight", f"{module}.weight_scale") if scale in self.tensors), None)

    def _info(self, name):
        info = self.tensors.get(name)
        return info and (DTYPES[info.dtype], info.shape)

    def _checked(self, name, tensor):
        """The tensor, if its numbers are possible: NaN, Inf, or one far too large blackens every image, far from its cause."""
        smooth, (low, high) = name.endswith(".smooth"), bounds(tensor)
        size, largest = max(-low, high), LARGEST_SMOOTH if smooth else LARGEST
        if not math.isfinite(high - low):
            wrong = "contains NaN or Inf"
        elif name.endswith(".wscales") and tensor.itemsize == 1 and int(tensor.view(torch.int8).min()) < 0:
            wrong = "contains a block scale with a sign, which NVFP4 has not: an RTX 50 would not see it"
        elif size > largest:
            wrong = f"contains a number of size {size:.3g}, and no model has one above {largest:g} there"
        elif smooth and (least := float(tensor.abs().min())) < LEAST_SMOOTH:
            wrong = f"contains {least:.3g}, and activations are divided by it: no model has less than {LEAST_SMOOTH:g}"
        else:
            return tensor
        raise CheckpointError(f"{self.path}: {name}: {wrong}. The file is damaged or was written by a broken quantiser; get it "
                              "again")

    def plain(self, places):
        """(tensor name, tensor) for everything that is not quantised; fresh tensors.

        places   families.family.PlainPlace of the host, as shape.comfy_plain() are
        """
        with self.reading() as get:
            for place in places:
                tensor = get(place.tensor.name)
                if tensor.itemsize == 1:                    # a tool has made fp8 of what the format keeps in 16 bit
                    scale = self._scale_of(place.tensor.name)
                    tensor = (tensor.float() * (get(scale).float() if scale else 1)).bfloat16()
                yield place.name, swap_halves(tensor) if place.swapped else tensor


def _fits(actual, wanted):
    return wanted == (1,) and actual == () or len(actual) == len(wanted) and all(
        have >= want[0] if isinstance(want, tuple) else have == want for have, want in zip(actual, wanted))


def _some(tensors):
    return ", ".join(map(shown, sorted(tensors)[:3])) + (" ..." if len(tensors) > 3 else "")




# ---- writing

def metadata_for(shape, precision, rank, existing=None):
    """The metadata of a published file. `existing` texts (config, comfy_config) are kept verbatim."""
    weight, weight_scale, act_scale = PRECISIONS[precision]
    group = GROUP[precision]
    quantization = {"method": "svdquant",
                    "weight": {"dtype": weight, "scale_dtype": weight_scale, "group_size": group},
                    "activation": {"dtype": weight, "scale_dtype": act_scale, "group_size": group}, "rank": rank}
    return shape.metadata() | {"quantization_config": json.dumps(quantization)} | (existing or {})


def merge(folder, out):
    """A legacy folder -> one file with metadata; the model's tensors keep their bytes. Returns the opened result."""
    source = Checkpoint(folder).require()
    if len(source.files) == 1:
        raise CheckpointError(f"{folder}: already a single file. 'merge' takes a legacy folder")
    rank = max(source.ranks, key=source.ranks.get, default=0)
    metadata = metadata_for(source.shape, source.precision, rank, source.metadata)

    with source.reading() as get:
        write_tensors(out, source.tensors, metadata, while_free(out, ((name, get(name)) for name in source.tensors)))
    return Checkpoint(out).require()


def dequantize(source, out, dtype):
    """Write the weight-only equivalent under ComfyUI's names: a 16-bit model any loader of its family takes.

    source   path of an SVDQ file or folder
    dtype    torch.bfloat16 or torch.float32

    Memory is one layer. Raises CheckpointError.
    """
    source = Checkpoint(source).require()
    kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    places, plain = list(source.shape.comfy_places()), list(source.shape.comfy_plain())
    shapes = {name: shape for layer in by_layer(places) for name, shape in layer.tensors().items()}
    shapes |= {place.name: place.tensor.shape for place in plain}
    specs = {name: TensorInfo(kind, shape) for name, shape in shapes.items()}

    def stream():
        for layer, tiles, bias in source.layers(places):
            dense = torch.zeros(shapes[f"{layer}.weight"])
            for tile in tiles:
                part, extra = weights.dequantize(tile.weight)
                rows, cols = (slice(at, at + size) for at, size in zip((tile.row, tile.col), part.shape))
                dense[rows, cols] = part
                if bias is not None:
                    bias[rows] += extra
            yield f"{layer}.weight", dense.to(dtype)
            if bias is not None:
                yield f"{layer}.bias", bias.to(dtype)
        for name, tensor in source.plain(plain):
            yield name, tensor.to(dtype)

    write_tensors(out, specs, {"format": "pt"}, while_free(out, stream()))
