"""What every family is described with: the tensors of its checkpoints, and where they lie in a host's model.

    Slot    a quantised linear of a checkpoint             Place        where it, or some of its rows, lies in a host's layer
    Plain   a tensor that stays in 16 bit                  PlainPlace   which of a host's tensors it becomes

Slot and Plain know no host. Each host has a map of its own, which is no more than an iterable of Place and one of PlainPlace.
"""

from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

MAX_BLOCKS = 200        # of one stack; FLUX.1 has 19 and 38. A header can claim millions, each with 40 tensors missing


@dataclass(frozen=True)
class Slot:
    """One quantised linear of a checkpoint.

    module      its name in the file
    n, k        output and input features
    kind        "w4a4", or "awq": a modulation
    activation  what its input has just come out of: "gelu", or None
    chunks      awq: how many chunks of rows the file interleaves (checkpoint-format 5.8)
    parts       equal blocks of rows that have an NVFP4 tensor scale each: a fused q, k, v has 3
    bias        whether the model has one
    """
    module: str
    n: int
    k: int
    kind: str = "w4a4"
    activation: str | None = None
    chunks: int = 0
    parts: int = 1
    bias: bool = True

    def unsigned(self, precision):
        """Whether its activations are unsigned codes of shifted inputs: INT4 after GELU (checkpoint-format 6.4)."""
        return self.activation == "gelu" and precision == "int4"


@dataclass(frozen=True)
class Place:
    """Rows of a slot, and where they lie in the weight of a host's layer: from `row` down and from `col` to the right.

    A slot may be cut by rows over several layers: it has a Place in each. Several slots may share a layer.
    """
    slot: Slot
    layer: str                  # the host's name
    row: int = 0
    col: int = 0
    start: int = 0              # rows [start, stop) of the slot; multiples of 128
    stop: int | None = None     # None: to its end

    @property
    def n(self):
        return (self.slot.n if self.stop is None else self.stop) - self.start

    @property
    def k(self):
        return self.slot.k


@dataclass(frozen=True)
class Layer:
    """A linear of a host with the places that fill it."""
    name: str
    places: tuple

    @property
    def n(self):
        return max(place.row + place.n for place in self.places)

    @property
    def k(self):
        return max(place.col + place.k for place in self.places)

    @property
    def bias(self):
        return any(place.slot.bias for place in self.places)

    def tensors(self):
        """{host's tensor name: shape}"""
        weight = {f"{self.name}.weight": (self.n, self.k)}
        return weight | {f"{self.name}.bias": (self.n,)} if self.bias else weight


def by_layer(places):
    """[Layer] of all places, in the order in which their names first come."""
    found = {}
    for place in places:
        found.setdefault(place.layer, []).append(place)
    return [Layer(name, tuple(group)) for name, group in found.items()]


class Plain(NamedTuple):
    """A tensor of a checkpoint that is not quantised."""
    name: str
    shape: tuple


@dataclass(frozen=True)
class PlainPlace:
    """Which tensor of a host a Plain becomes."""
    tensor: Plain
    name: str                   # the host's name
    swapped: bool = False       # the host has its halves the other way round
    alias: str | None = None    # another name of it, in other versions of the host


class Stored(NamedTuple):
    """Where a 16-bit file has a tensor of ComfyUI's."""
    names: list                 # the tensors whose rows it stacks
    swapped: bool = False       # the file has its halves the other way round


@dataclass(frozen=True)
class Spelling:
    """One way of naming the tensors of a 16-bit model.

    name     for people             mark   a tensor every file with such names has
    shape    {name: TensorInfo} -> Shape. Raises CheckpointError in words that can follow a path
    stored   (Shape, names in the file) -> iterable of (ComfyUI's tensor name, Stored)
    """
    name: str
    mark: str
    shape: Callable
    stored: Callable


def swap_halves(tensor):
    """The two halves of the rows, the second first: (scale, shift) <-> (shift, scale). A fresh tensor."""
    return torch.cat(tensor.chunk(2)[::-1])


def numbers(names, prefix):
    """What stands after `prefix` in names where the number of a block is due, and the numbers that as many blocks have."""
    found = {name[len(prefix):].split(".")[0] for name in names if name.startswith(prefix)}
    return found, {str(i) for i in range(len(found))}
