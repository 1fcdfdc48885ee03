"""What a model's layers are fed: statistics of every quantised linear's input, gathered while the host samples, kept in one
small file, used by the quantiser to smooth and to correct biases.

    L.mean    fp32 [K]      mean of x over all tokens seen          L: ComfyUI's name of the linear
    L.square  fp32 [K]      mean of x^2                             K: its input features
    L.max     fp32 [K]      largest |x|
    L.tokens  bf16 [T, K]   T <= 64 tokens drawn at random from all

The metadata's `svdq_calibration` is JSON: version, the fields of the family's Shape, calls, tokens, note.

Test: tests/unit/test_calibration.py
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

import torch

from ..container import NAMES, TensorFile, TensorInfo, write_tensors
from ..errors import CheckpointError, shown
from ..families import shape_of
from ..families.family import MAX_BLOCKS, by_layer
from ..format import finite

KEY = "svdq_calibration"
VERSION = 1
MOST_TOKENS = 64
MOST_NOTE = 10_000      # characters: the note goes into the header of every model made with it
CHUNK = 1024            # tokens summed in fp32 before the sum goes to fp64
PARTS = {"mean": torch.float32, "square": torch.float32, "max": torch.float32, "tokens": torch.bfloat16}
AGAIN = "Capture it again with the model that will be quantised ('SVDQ Capture Calibration')"


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer's input; fields as in the file, on the CPU."""
    mean: torch.Tensor
    square: torch.Tensor
    max: torch.Tensor
    tokens: torch.Tensor

    def columns(self, start, stop):
        """The same for input channels [start, stop): tiles that lie side by side have their own."""
        part = slice(start, stop)
        return LayerStatistics(self.mean[part], self.square[part], self.max[part], self.tokens[:, part])


class Collector:
    """Statistics of one layer's input while it is seen. Collectors of one layer that are merged need seeds of their own."""

    def __init__(self, k, seed=0, most=MOST_TOKENS):
        self.k, self.most, self.count = k, most, 0
        self.sum, self.square = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        self.max = torch.zeros(k)
        self.tokens, self.keys = torch.zeros(0, k, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.float64)
        self._random = torch.Generator().manual_seed(seed)      # a user's seeds are not ours

    def update(self, x):
        """x [tokens, K], any float dtype on any device."""
        for part in x.detach().split(CHUNK):
            values = part.float()
            sums = torch.stack((values.sum(0), values.square().sum(0), values.abs().amax(0))).cpu()
            self.sum += sums[0].double()
            self.square += sums[1].double()
            self.max = torch.maximum(self.max, sums[2])
            self.count += len(part)
            # Every token draws a lot and the lowest lots stay: a fair sample, however the tokens come and are merged.
            keys = torch.rand(len(part), dtype=torch.float64, generator=self._random)
            mine = keys.argsort()[:self.most]
            if len(self.keys) == self.most:
                mine = mine[keys[mine] < self.keys.max()]
            if len(mine):
                self._keep(part[mine.to(part.device)].to(torch.bfloat16).cpu(), keys[mine])

    def merge(self, other):
        """Add what another collector of the same layer has seen."""
        self.sum += other.sum
        self.square += other.square
        self.max = torch.maximum(self.max, other.max)
        self.count += other.count
        self._keep(other.tokens, other.keys)

    def _keep(self, tokens, keys):
        keys = torch.cat((self.keys, keys))
        best = keys.argsort(stable=True)[:self.most]
        self.tokens, self.keys = torch.cat((self.tokens, tokens))[best], keys[best]

    def result(self):
        """LayerStatistics of what was seen, which must be something."""
        return LayerStatistics((self.sum / self.count).float(), (self.square / self.count).float(), self.max, self.tokens)


def inputs(shape):
    """{ComfyUI layer name: input features} of every layer a calibration file describes."""
    return {layer.name: layer.k for layer in by_layer(shape.comfy_places())}


@dataclass(frozen=True)
class Statistics:
    """Of all layers of one model.

    shape    the family's Shape of the model they were gathered from
    layers   {ComfyUI layer name: LayerStatistics}, all of inputs(shape)
    calls    model calls seen        tokens   tokens seen, of all layers        note   anything, for people
    """
    shape: object
    layers: dict
    calls: int = 0
    tokens: int = 0
    note: str = ""

    def __getitem__(self, layer):
        return self.layers[layer]

    @classmethod
    def from_collectors(cls, shape, collectors, calls=0, note=""):
        """collectors {ComfyUI layer name: Collector}. Raises CheckpointError when a layer was never seen, or saw NaN."""
        wanted = inputs(shape)
        unseen = [layer for layer in wanted if layer not in collectors or not collectors[layer].count]
        if unseen:
            raise CheckpointError(f"calibration: {len(unseen)} of {len(wanted)} layers were never used, the first is "
                                  f"{unseen[0]}. Run the whole model at least once while capturing")
        layers = {layer: collectors[layer].result() for layer in wanted}
        tokens = sum(collector.count for collector in collectors.values())
        return cls(shape, layers, calls, tokens, note)._checked("calibration")

    def tensors(self):
        return {f"{layer}.{part}": tensor for layer, statistics in self.layers.items()
                for part, tensor in vars(statistics).items()}

    def description(self):
        return json.dumps({"version": VERSION, **asdict(self.shape), "calls": self.calls, "tokens": self.tokens,
                           "note": self.note})

    def save(self, path):
        """Write the file; `path` is either whole or untouched."""
        tensors = self.tensors()
        specs = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(path, specs, {KEY: self.description()}, tensors.items())

    @classmethod
    def load(cls, path, shape=None):
        """Statistics from a file, for a model of this shape. Raises CheckpointError for any file that is not that."""
        file = TensorFile(path)
        if KEY not in file.metadata:
            raise CheckpointError(f"{path}: not a calibration file, its metadata has no {KEY}. "
                                  "Make one with 'SVDQ Capture Calibration'")
        found, about = _describe(file.metadata[KEY], path)
        if shape is not None and found != shape:
            differing = [f"{field} {getattr(found, field)}, the model has {getattr(shape, field)}"
                         for field in vars(shape) if getattr(found, field) != getattr(shape, field)]
            raise CheckpointError(f"{path}: captured from another kind of model: {'; '.join(differing)}. {AGAIN}")
        wanted = inputs(found)
        for layer, k in wanted.items():
            for part, dtype in PARTS.items():
                _check_info(path, f"{layer}.{part}", file.tensors.get(f"{layer}.{part}"), k, dtype)
        with file.reading() as get:
            layers = {layer: LayerStatistics(*(get(f"{layer}.{part}") for part in PARTS)) for layer in wanted}
        return cls(found, layers, **about)._checked(path)

    def fingerprint(self):
        """A text that differs when any number does."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _checked(self, name):
        for tensor_name, tensor in self.tensors().items():
            if not finite(tensor):
                raise CheckpointError(f"{name}: {tensor_name} has NaN or Inf: the model overflowed. Load it in bfloat16 and "
                                      "capture again")
        for layer, statistics in self.layers.items():
            if statistics.square.min() < 0 or statistics.max.min() < 0:
                raise CheckpointError(f"{name}: {layer} has a mean square or a maximum below zero. {AGAIN}")
        return self


def _check_info(path, name, info, k, dtype):
    """Raise CheckpointError unless a tensor of the file is what it must be. info: its TensorInfo, None where it is missing."""
    if info is None:
        raise CheckpointError(f"{path}: {name} is missing. {AGAIN}")
    wanted = (k,)
    if name.endswith(".tokens"):
        wanted = (min(max(info.shape[0] if info.shape else 1, 1), MOST_TOKENS), k)
    if info != TensorInfo(NAMES[dtype], wanted):
        raise CheckpointError(f"{path}: {name} is {shown(list(info.shape))} {shown(info.dtype)}, needs {list(wanted)} "
                              f"{NAMES[dtype]}. {AGAIN}")


def _describe(text, name):
    """(Shape, {"calls", "tokens", "note"}) of a `svdq_calibration` text."""
    try:
        described = json.loads(text)
        version, shape = described["version"], shape_of(described)
        about = {"calls": described.get("calls", 0), "tokens": described.get("tokens", 0), "note": described.get("note", "")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name}: its description is not readable: {shown(error)}. {AGAIN}") from error
    if version != VERSION:
        raise CheckpointError(f"{name}: calibration version {shown(version)}, this pack reads {VERSION}. Update the pack, "
                              "or capture again")
    if not all(_possible(getattr(shape, field.name), field) for field in fields(shape)):
        raise CheckpointError(f"{name}: its description has impossible sizes: {shown(vars(shape))}. {AGAIN}")
    for field in ("calls", "tokens"):
        if type(about[field]) is not int or not 0 <= about[field] < 1 << 62:
            raise CheckpointError(f"{name}: its description says {field} {shown(about[field])}, needs a whole number. {AGAIN}")
    if not isinstance(about["note"], str) or len(about["note"]) > MOST_NOTE:
        raise CheckpointError(f"{name}: its note is {shown(about['note'])}, needs a text of at most {MOST_NOTE:,} characters. "
                              f"{AGAIN}")
    return shape, about


def _possible(value, field):
    if field.type is bool:
        return isinstance(value, bool)
    return type(value) is int and 0 < value <= (MAX_BLOCKS if field.name.startswith("depth") else 1 << 20)
