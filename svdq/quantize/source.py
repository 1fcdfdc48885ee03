"""Where the weights come from: a 16-bit model on disk, under ComfyUI's names whatever its own are.

Nothing is read before it is asked for: a 24 GB model costs one layer of memory.

Test: tests/unit/test_quantize_source.py
"""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import foreign
from ..container import TensorFile
from ..errors import CheckpointError, shown
from ..families import FAMILIES, FAMILY_NAMES, recognise, unprefixed
from ..families.family import by_layer, swap_halves
from ..files import read_text
from ..format import finite

INDEX = ".safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2")
ORIGINAL = "Quantise from the bf16, fp16 or fp8 original"
SAMPLES, SAMPLE_BYTES = 16, 1 << 16     # read of each file to tell it from another


class FileSource:
    """A model in one of its family's spellings, 16-bit or fp8, in one file or several with an index.

    name         for messages        shape    the family's Shape
    dtypes       the safetensors dtypes its linears have
    fingerprint  differs for any other file, or one that has changed

    Raises CheckpointError at once for what is not that, or is not whole.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = [TensorFile(file) for file in _files(self.path)]
        self.name = self.path.name
        self._where = {}
        for file in self.files:
            for name in file.tensors:
                self._where.setdefault(name, file)
        self._unwrap()
        self.shape = self._shape()
        self._stored = dict(self._spelling.stored(self.shape, self._where))
        self._check()
        self.dtypes = sorted({self._info(part).dtype for layer in by_layer(self.shape.comfy_places())
                              for part in self._stored[f"{layer.name}.weight"].names})

    # ---- what it is

    def _unwrap(self):
        """Leave away the prefix of the transformer's names, and with it everything that is not the transformer."""
        names, found = unprefixed(self._where, lambda names: next(
            ((family, spelling) for family in FAMILIES for spelling in family.ORIGINALS if spelling.mark in names), None))
        if found is None:
            raise CheckpointError(f"{self.path}: {self._what_instead()}")
        self.family, self._spelling = found
        self._stored_name = names
        self._where = {name: self._where[stored] for name, stored in names.items()}
        foreign = next((name for name in self._where if name.endswith((".qweight", ".quant_state.bitsandbytes__nf4",
                                                                       ".quant_state.bitsandbytes__fp4", ".absmax"))), None)
        if foreign:
            raise CheckpointError(f"{self.path}: is quantised already, it has {shown(foreign)}. {ORIGINAL}")

    def _what_instead(self):
        if unprefixed(self._where, recognise)[1]:
            return f"this is an SVDQ model already. {ORIGINAL}"
        found = foreign.identify(self._where, {info.dtype for file in self.files for info in file.tensors.values()})
        some = ", ".join(map(shown, sorted(self._where)[:3])) or "no tensors"
        what = f"this is {found}" if found else f"not a {FAMILY_NAMES} transformer: it holds {some}"
        takes = " or ".join(f"a {family.FULL_NAME} transformer in {' or '.join(one.name for one in family.ORIGINALS)} names"
                            for family in FAMILIES)
        return f"{what}. Quantising takes {takes}"

    def _info(self, name):
        return self._where[name].tensors[self._stored_name[name]]

    def _shape(self):
        try:
            return self._spelling.shape({name: self._info(name) for name in self._where})
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _expected(self):
        """(ComfyUI tensor, shape)"""
        for layer in by_layer(self.shape.comfy_places()):
            yield from layer.tensors().items()
        for place in self.shape.comfy_plain():
            yield place.name, place.tensor.shape

    def _check(self):
        expected = list(self._expected())
        missing = sorted({part for name, _ in expected for part in self._stored[name].names if part not in self._where})
        if missing:
            raise CheckpointError(f"{self.path}: {len(missing)} tensors are missing: {', '.join(missing[:3])}"
                                  f"{' ...' if len(missing) > 3 else ''}. {self.family.NOT_WHOLE}")
        for name, shape in expected:
            parts = self._stored[name].names
            infos = [self._info(part) for part in parts]
            odd = next((part for part, info in zip(parts, infos) if info.dtype not in FLOATS), None)
            if odd:
                raise CheckpointError(f"{self.path}: {odd} is {self._info(odd).dtype}: quantised already. {ORIGINAL}")
            fits = (all(info.shape[1:] == shape[1:] for info in infos if info.shape)
                    and sum(info.shape[0] if info.shape else 0 for info in infos) == shape[0])
            if not fits or any(not info.shape for info in infos):
                raise CheckpointError(f"{self.path}: {', '.join(parts)}: "
                                      f"{' + '.join(shown(list(info.shape)) for info in infos)}, needs {list(shape)}. "
                                      f"This is no {self.family.FULL_NAME} transformer, or one whose layers were pruned")
            for part in parts:
                scale = self._scale_name(part)
                if scale and self._info(scale).shape not in ((), (1,)):
                    raise CheckpointError(f"{self.path}: {scale} is {shown(list(self._info(scale).shape))}: a block-scaled "
                                          f"8-bit or 4-bit model. {ORIGINAL} with at most one scale per layer")

    def _scale_name(self, name):
        """The scale of a tensor in ComfyUI's scaled fp8 files, by either of its names; None where there is none."""
        if not name.endswith(".weight"):
            return None
        layer = name.removesuffix(".weight")
        return next((scale for scale in (f"{layer}.scale_weight", f"{layer}.weight_scale") if scale in self._where), None)

    # ---- reading

    @property
    def fingerprint(self):
        digest = hashlib.sha256()
        for file in self.files:
            about = os.stat(file.path)
            digest.update(f"{about.st_size} {about.st_mtime_ns} {sorted(file.tensors.items())}".encode())
            with open(file.path, "rb") as raw:
                for i in range(SAMPLES):
                    raw.seek(about.st_size * i // SAMPLES)
                    digest.update(raw.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def layer(self, name):
        """(weight, bias or None) of a ComfyUI layer, 16 bit or fp32; fresh tensors."""
        bias = f"{name}.bias"
        return self._read(f"{name}.weight"), self._read(bias) if bias in self._stored else None

    def plain(self):
        """(ComfyUI tensor name, tensor) of all that is not quantised."""
        for place in self.shape.comfy_plain():
            yield place.name, self._read(place.name)

    def check(self, progress):
        """Raise CheckpointError where any tensor holds NaN or Inf: reads everything once. progress(share done)."""
        todo = list(self._stored)
        for done, name in enumerate(todo):
            self._read(name, count=True)
            progress((done + 1) / len(todo))

    def _read(self, name, count=False):
        parts, stored = [], self._stored[name]
        with ExitStack() as stack:
            getters = {}
            for part in stored.names:
                file = self._where[part]
                if id(file) not in getters:
                    getters[id(file)] = stack.enter_context(file.reading())
                tensor = getters[id(file)](self._stored_name[part])
                if tensor.dtype.itemsize == 1:
                    scale = self._scale_name(part)
                    tensor = tensor.to(torch.bfloat16)      # exact: bf16 has more of everything
                    if scale:
                        source = self._where[scale]
                        with source.reading() as get:
                            tensor = tensor.float() * get(self._stored_name[scale]).float()
                if not finite(tensor):
                    bad = int((~tensor.isfinite()).sum())
                    raise CheckpointError(f"{self.path}: {part} has NaN or Inf in {bad} places. The model is broken: a "
                                          "merge that went wrong, or a damaged file. Make or get it again")
                if not count:
                    parts.append(tensor)
        if count:
            return None
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        return swap_halves(stacked) if stored.swapped else stacked


def _files(path):
    """The safetensors files behind a path: itself, those an index names, or those of a folder."""
    if os.path.isdir(path):
        inside = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if not inside and os.path.isdir(path / "transformer"):          # a whole diffusers pipeline
            return _files(path / "transformer")
        if len(inside) != 1:
            raise CheckpointError(f"{path}: a folder with {len(inside)} models. Name the .safetensors file, or the "
                                  f"{INDEX} of a model in parts")
        return _files(inside[0])
    if not path.name.endswith(INDEX):
        return [path]
    try:
        listed = sorted(set(json.loads(read_text(path))["weight_map"].values()))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable index of a model in parts: {shown(error)}. Get it again") from error
    odd = [name for name in listed if not isinstance(name, str) or Path(name).name != name]
    if odd or not listed:
        raise CheckpointError(f"{path}: names {'no files' if not listed else shown(odd[0])}, needs files beside it")
    missing = [name for name in listed if not os.path.isfile(path.parent / name)]       # names may be anything
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of its {len(listed)} parts are missing: {shown(missing[0])}. "
                              "Download them too")
    return [path.parent / name for name in listed]
