"""One layer of a checkpoint: logical parameters <-> the tensors of a file <-> one byte tensor the host can move around.

    file tensors   fill_slot / slot_tensors    operands   PackedTiles / view_layer   bytes + description
    (packed)       <----------------------->   (packed)   <---------------------->   (packed)

Operands keep the order of the file; a host may have them repacked for its kernels in between (kernels.registry.pack). Only
AWQ modulation rows are put back into logical order, in which hosts chunk them.

Source: checkpoint-format 3, 4, 5. Test: tests/unit/test_checkpoint.py
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .kernels import layout
from .kernels.weights import AWQWeight, W4A4Weight, Weight, cast

PIECE = 4 << 20     # bytes of modulation codes that are put in order at a time
ALIGN = 256         # every section of a layer's bytes starts here: any vector load and any copy engine is content


@dataclass(frozen=True)
class Tile:
    """A rectangle of a host's layer: y[..., row:row+N] += weight(x[..., col:col+K])."""
    row: int
    col: int
    weight: Weight

    @cached_property
    def n(self):
        return self.weight.shape[0]

    @cached_property
    def k(self):
        return self.weight.shape[1]


# Fields of a weight and what files call them
_NAMES = {"qweight": "qweight", "wscales": "wscales", "wzeros": "wzeros", "smooth": "smooth", "proj_down": "lora_down",
          "proj_up": "lora_up", "wcscales": "wcscales"}

def blank_slot(slot, precision, info):
    """The weight of one quantised linear before its numbers are read, on the meta device.

    slot        families.family.Slot
    precision   "int4" or "nvfp4"; AWQ layers are the same in both
    info        tensor name -> (torch dtype, shape) as stored, or None when the file has none

    Scales, smoothing and factors have one 16-bit dtype in the end, whatever a tool has made of theirs.
    """
    found = {field: kind for field, name in _NAMES.items() if (kind := info(f"{slot.module}.{name}")) is not None}
    half = next((dtype for dtype, _ in found.values() if dtype in (torch.bfloat16, torch.float16)), torch.bfloat16)

    def blank(field):
        if field not in found:
            return None
        dtype, shape = found[field]
        return torch.empty(shape, dtype=half if dtype.is_floating_point and dtype.itemsize > 1 else dtype, device="meta")

    if slot.kind == "awq":
        groups = slot.k // 64                               # writers pad them to a multiple of 16
        return AWQWeight(blank("qweight"), blank("wscales")[:groups], blank("wzeros")[:groups])
    rank = found["proj_down"][1][1] if "proj_down" in found else 0
    return W4A4Weight(precision, slot.unsigned(precision), blank("qweight"), blank("wscales"), blank("smooth"),
                      *(blank(field) if rank else None for field in ("proj_down", "proj_up")), blank("wcscales"))


def fill_slot(slot, weight, get):
    """Read the operands of one quantised linear, and its bias.

    weight   as blank_slot gives it, but with memory, which is written
    get      (tensor name, out=None, rows=None) -> the stored tensor or rows of it, see TensorFile.reading; None when the file
             has none

    Returns (weight, bias): bias is fp32 [N] in logical order, without the 1 that checkpoints fold into the scale rows of a
    modulation, or None where the model has none.
    """
    def read(name, out=None, rows=None):
        return get(f"{slot.module}.{name}", out, rows)

    if slot.kind == "awq":
        _read_deinterleaved(slot, weight.qweight, read)
        for name, out in (("wscales", weight.wscales), ("wzeros", weight.wzeros)):
            stored = read(name)[:len(out)].view(len(out), -1, slot.chunks)
            out.view(len(out), slot.chunks, -1).copy_(stored.transpose(1, 2))
        bias = read("bias")
        bias = torch.zeros(slot.n) if bias is None else bias.float()
        return weight, bias[deinterleave(slot)] - folded_one(slot)
    for field, out in weight.tensors().items():
        read(_NAMES[field], out)
    wtscale = read("wtscale")
    if wtscale is not None:
        weight = replace(weight, wtscale=float(wtscale))
    if not slot.bias:
        return weight, None
    bias = read("bias")
    return weight, torch.zeros(slot.n) if bias is None else layout.unpack_vector(bias).float()


def _read_deinterleaved(slot, qweight, read):
    """Codes of a modulation, from the order of a file: in pieces that are still in the caches when they are put in order."""
    step = slot.chunks * max(1, PIECE // (slot.chunks * qweight[0].nbytes))
    memory = torch.empty_like(qweight[:step])
    for start in range(0, len(qweight), step):
        stop = min(start + step, len(qweight))
        piece = read("qweight", memory[:stop - start], (start, stop))
        for i, chunk in enumerate(qweight.chunk(slot.chunks)):
            layout.permute_awq_rows(piece, torch.arange(i, 4 * len(piece), slot.chunks),
                                    out=chunk[start // slot.chunks:stop // slot.chunks])


def read_slot(slot, precision, tensors):
    """(weight, bias) of one quantised linear, see fill_slot, from {tensor name: stored tensor}; in memory of its own."""
    def info(name):
        return (tensors[name].dtype, tensors[name].shape) if name in tensors else None

    def get(name, out=None, rows=None):
        stored = tensors.get(name)
        stored = stored if rows is None else stored[slice(*rows)]
        return stored if out is None else out.copy_(stored)

    return fill_slot(slot, with_memory(blank_slot(slot, precision, info)), get)


def with_memory(blank):
    """A weight as blank_slot gives it -> one on the CPU, of any numbers."""
    return replace(blank, **{name: torch.empty_like(tensor, device="cpu") for name, tensor in blank.tensors().items()})


def slot_tensors(slot, weight, bias, dtype=torch.bfloat16):
    """The inverse of read_slot: {tensor name: stored tensor} of one quantised linear.

    `smooth_orig`, which no reader uses at run time, is written equal to `smooth`.
    """
    if slot.kind == "awq":
        order = interleave(slot)
        tensors = {"qweight": layout.permute_awq_rows(weight.qweight, order), "bias": (bias + folded_one(slot))[order],
                   "wscales": weight.wscales[:, order].contiguous(), "wzeros": weight.wzeros[:, order].contiguous()}
    else:
        tensors = {"qweight": weight.qweight, "wscales": weight.wscales,
                   "bias": layout.pack_vector(bias) if slot.bias else None,
                   "smooth": weight.smooth, "smooth_orig": weight.smooth, "lora_down": weight.proj_down,
                   "lora_up": weight.proj_up, "wcscales": weight.wcscales}
        if weight.precision == "nvfp4" and weight.wcscales is None:
            tensors["wtscale"] = torch.tensor([weight.wtscale], dtype=dtype)
    if slot.bias:
        tensors["bias"] = tensors["bias"].to(dtype)
    return {f"{slot.module}.{suffix}": tensor for suffix, tensor in tensors.items() if tensor is not None}


def finite(tensor):
    """Whether a tensor holds no NaN and no Inf."""
    return all(map(math.isfinite, bounds(tensor)))


def bounds(tensor):
    """(least, greatest) number of a tensor in one pass over it: NaN where any is, (0, 0) for integers and empty tensors; of
    fp8 e4m3 the bounds of the dtype."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 0.0, 0.0
    if tensor.dtype == torch.float8_e4m3fn:                 # has no infinities, and is not compared; S.1111.111 is NaN
        codes = tensor.view(torch.uint8)
        sound = int(codes.max()) < 0x7F or not ((codes & 0x7F) == 0x7F).any()
        return (torch.finfo(tensor.dtype).min, torch.finfo(tensor.dtype).max) if sound else (math.nan, math.nan)
    low, high = (tensor.bfloat16() if tensor.itemsize == 1 else tensor).aminmax()
    return float(low), float(high)


def deinterleave(slot):
    """Stored row of every logical row: stored i*chunks + c is logical c*H + i."""
    return torch.arange(slot.n).view(-1, slot.chunks).t().reshape(-1)


def interleave(slot):
    return torch.arange(slot.n).view(slot.chunks, -1).t().reshape(-1)


def folded_one(slot):
    """1 on the rows of the scale chunks (the 2nd of every shift, scale, gate), where the file's bias contains it."""
    one = torch.zeros(slot.chunks // 3, 3, slot.n // slot.chunks)
    one[:, 1] = 1
    return one.reshape(-1)


class PackedTiles(list):
    """The tiles of a layer as views of one byte tensor, which is all a host needs to move, pin and count.

    stored   uint8 [bytes]
    """

    def __init__(self, tiles):
        """Room for tiles of such shapes and dtypes, on the CPU; their numbers are for the caller to write."""
        self.sections, nbytes = lay_out([{name: (value.shape, value.dtype) for name, value in tile.weight.tensors().items()}
                                         for tile in tiles])
        self.stored = torch.empty(nbytes, dtype=torch.uint8)
        end = 0
        for section in (section for sections in self.sections for section in sections.values()):
            self.stored[end:section["at"]] = 0              # the same layer is the same bytes
            end = section["at"] + view_section(self.stored, section).nbytes
        super().__init__(self._viewed(tiles))

    def _viewed(self, tiles):
        """The same tiles, with what lies in the bytes for numbers."""
        return [replace(tile, weight=replace(tile.weight, **{name: view_section(self.stored, section)
                                                             for name, section in sections.items()}))
                for tile, sections in zip(tiles, self.sections)]

    def cast(self, dtype):
        """Bring scales, smoothing and factors into another 16-bit dtype, in the places they have: see kernels.weights.cast.
        For tiles in the file's order. Raises RangeError, and does nothing, where one of them has not all of these numbers."""
        new = [cast(tile.weight, dtype).tensors() for tile in self]
        for sections, tensors in zip(self.sections, new):
            for name, section in sections.items():
                section["dtype"] = _name(tensors[name].dtype)
        old, self[:] = list(self), self._viewed(self)
        for tile, before, tensors in zip(self, old, new):
            for name, tensor in tensors.items():
                if tensor is not getattr(before.weight, name):
                    getattr(tile.weight, name).copy_(tensor)

    def description(self, **settings):
        """JSON text that view_layer turns back into the tiles, beside the settings."""
        entries = [{"row": tile.row, "col": tile.col, "kind": tile.weight.kind, **vars(tile.weight), **sections}
                   for tile, sections in zip(self, self.sections)]
        return json.dumps({"tiles": entries, **settings}, default=lambda dtype: {"dtype": _name(dtype)})


def pack_tiles(tiles):
    """Tiles from anywhere, copied into PackedTiles."""
    packed = PackedTiles(tiles)
    for tile, view in zip(tiles, packed):
        copy_weight(tile.weight, view.weight)
    return packed


def copy_weight(source, target):
    """Write the tensors of a weight into those of another of the same shapes."""
    for name, value in source.tensors().items():
        getattr(target, name).copy_(value)


def view_layer(weight, description):
    """The tiles of a layer as views of its bytes, on whatever device they are."""
    return [_view_tile(weight, entry) for entry in description["tiles"]]


def _view_tile(weight, entry):
    fields = {name: value if not isinstance(value, dict) else view_section(weight, value) if "at" in value
              else getattr(torch, value["dtype"]) for name, value in entry.items()}
    row, col, kind = fields.pop("row"), fields.pop("col"), fields.pop("kind")
    return Tile(row, col, Weight.KINDS[kind](**fields))


def lay_out(groups):
    """Where tensors lie in one byte tensor: [{name: (shape, dtype)}] -> ([{name: section}], bytes in all)."""
    sections, end = [], 0
    for group in groups:
        sections.append({})
        for name, (shape, dtype) in group.items():
            start = -(-end // ALIGN) * ALIGN
            end = start + torch.Size(shape).numel() * dtype.itemsize
            sections[-1][name] = {"at": start, "dtype": _name(dtype), "shape": list(shape)}
    return sections, end


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def view_section(stored, section):
    """The tensor that lies in a section of a byte tensor."""
    dtype, shape = getattr(torch, section["dtype"]), section["shape"]
    size = torch.Size(shape).numel() * dtype.itemsize
    return stored[section["at"]:section["at"] + size].view(dtype).view(shape)
