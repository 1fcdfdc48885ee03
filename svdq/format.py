"""One layer of a checkpoint: logical parameters <-> the tensors of a file <-> one byte tensor the host can move around.

    file tensors   read_slot / slot_tensors    operands   pack_layer / view_layer    bytes + description
    (packed)       <----------------------->   (packed)   <--------------------->    (packed)

Operands keep the order of the file; a host may have them repacked for its kernels in between (kernels.registry.pack). Only
AWQ modulation rows are put back into logical order, in which hosts chunk them.

Source: checkpoint-format 3, 4, 5. Test: tests/unit/test_checkpoint.py
"""

import json
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels import layout
from ..kernels.weights import AWQWeight, W4A4Weight, Weight
from .errors import CheckpointError

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


def read_slot(slot, precision, get):
    """The operands of one quantised linear and its bias.

    slot        families.family.Slot
    precision   "int4" or "nvfp4"; AWQ layers are the same in both
    get         tensor name -> stored tensor, or None when the file has none

    Returns (weight, bias): weight shares memory with what `get` returned where it can; bias is fp32 [N] in logical
    order, without the 1 that checkpoints fold into the scale rows of a modulation, or None where the model has none.
    """
    read = _Finite(slot.module, get)
    if slot.kind == "awq":
        groups = slot.k // 64
        weight = AWQWeight(qweight=get(f"{slot.module}.qweight"), wscales=read("wscales")[:groups],
                           wzeros=read("wzeros")[:groups])
        bias = read("bias")
        bias = torch.zeros(slot.n) if bias is None else bias.float()
        order = deinterleave(slot)
        weight = AWQWeight(layout.permute_awq_rows(weight.qweight, order), weight.wscales[:, order].contiguous(),
                           weight.wzeros[:, order].contiguous())
        return weight, bias[order] - folded_one(slot)
    wtscale = read("wtscale")
    smooth = read("smooth")
    if not smooth.all():
        raise CheckpointError(f"{slot.module}.smooth: contains 0, and activations are divided by it. "
                              "The file is damaged or was written by a broken quantiser; get it again")
    rank = read("lora_down").shape[1] if read("lora_down") is not None else 0
    weight = W4A4Weight(precision=precision, unsigned=slot.unsigned(precision),
                        qweight=get(f"{slot.module}.qweight"), wscales=read("wscales"), smooth=smooth,
                        proj_down=read("lora_down") if rank else None, proj_up=read("lora_up") if rank else None,
                        wcscales=read("wcscales"), wtscale=1.0 if wtscale is None else float(wtscale))
    if not slot.bias:
        return weight, None
    bias = read("bias")
    return weight, torch.zeros(slot.n) if bias is None else layout.unpack_vector(bias).float()


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


class _Finite:
    """get() that refuses NaN and Inf: one would blacken every image, far from its cause."""

    def __init__(self, module, get):
        self.module, self.get = module, get

    def __call__(self, suffix):
        name = f"{self.module}.{suffix}"
        tensor = self.get(name)
        if tensor is not None and not finite(tensor):
            raise CheckpointError(f"{name}: contains NaN or Inf. The file is damaged; download it again")
        return tensor


def finite(tensor):
    """Whether a tensor holds no NaN and no Inf."""
    if tensor.dtype == torch.float8_e4m3fn:                 # no infinities; S.1111.111 is NaN
        return not ((tensor.view(torch.uint8) & 0x7F) == 0x7F).any()
    if not tensor.is_floating_point():
        return True
    # A sum is finite only if every term is, and costs one pass where isfinite makes several.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


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


def pack_layer(tiles, **settings):
    """Every packed tensor of a layer in one byte tensor, which is all a host needs to move, pin and count.

    Returns (weight uint8 [bytes], description: JSON text that view_layer turns back into the tiles, beside the settings).
    """
    fields = [tile.weight.tensors() for tile in tiles]
    sections, nbytes = lay_out([{name: (value.shape, value.dtype) for name, value in tensors.items()} for tensors in fields])
    weight = torch.zeros(nbytes, dtype=torch.uint8)
    entries = []
    for tile, tensors, places in zip(tiles, fields, sections):
        for name, value in tensors.items():
            view_section(weight, places[name]).copy_(value)
        entries.append({"row": tile.row, "col": tile.col, "kind": tile.weight.kind, **vars(tile.weight), **places})
    return weight, json.dumps({"tiles": entries, **settings}, default=lambda dtype: {"dtype": _name(dtype)})


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
