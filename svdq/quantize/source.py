"""Where the weights come from: a FLUX transformer on disk, under ComfyUI's names whatever its own are.

Nothing is read before it is asked for, and then through a memory map: a 24 GB model costs one layer of memory.

Test: tests/unit/test_quantize_source.py
"""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path

import torch

from .. import names
from ..checkpoint import MAX_BLOCKS, swap_halves
from ..container import TensorFile
from ..errors import CheckpointError, shown
from ..format import finite

INDEX = ".safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2")
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
FIRST = "double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.to_q.weight"
ORIGINAL = "Quantise from the bf16, fp16 or fp8 original"
SAMPLES, SAMPLE_BYTES = 16, 1 << 16     # read of each file to tell it from another


class FileSource:
    """A FLUX transformer in BFL or diffusers names, 16-bit or fp8, in one file or several with an index.

    name         for messages        shape    names.FluxShape
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
        self._diffusers = FIRST[1] in self._where
        self.shape = self._shape()
        self._parts = dict(self._map())
        self._check()
        self.dtypes = sorted({self._info(part).dtype for slot in names.slots(self.shape)
                              for part in self._parts[f"{slot.layer}.weight"]})

    # ---- what it is

    def _unwrap(self):
        """Leave away the prefix of the transformer's names, and with it everything that is not the transformer."""
        for prefix in PREFIXES:
            if any(prefix + first in self._where for first in FIRST):
                break
        else:
            raise CheckpointError(f"{self.path}: {self._what_instead()}")
        self._prefix = prefix
        self._where = {name[len(prefix):]: file for name, file in self._where.items() if name.startswith(prefix)}
        foreign = next((name for name in self._where if name.endswith((".qweight", ".quant_state.bitsandbytes__nf4",
                                                                       ".quant_state.bitsandbytes__fp4", ".absmax"))), None)
        if foreign:
            raise CheckpointError(f"{self.path}: is quantised already, it has {shown(foreign)}. {ORIGINAL}")

    def _what_instead(self):
        if names.is_svdq_flux({names.canonical(name) for name in self._where}):
            return f"this is an SVDQ model already. {ORIGINAL}"
        found = names.identify_foreign(self._where, {info.dtype for file in self.files for info in file.tensors.values()})
        some = ", ".join(map(shown, sorted(self._where)[:3])) or "no tensors"
        return ((f"this is {found}. " if found else f"not a FLUX transformer: it holds {some}. ")
                + "Quantising takes a FLUX.1 transformer in BFL or diffusers names")

    def _info(self, name):
        return self._where[name].tensors[self._prefix + name]

    def _need(self, name, axes):
        if name not in self._where:
            raise CheckpointError(f"{self.path}: {name} is missing. {self._hint()}")
        shape = self._info(name).shape
        if len(shape) != axes:
            raise CheckpointError(f"{self.path}: {name} is {list(shape)}, needs {axes} axes. This is no FLUX.1")
        return shape

    def _hint(self):
        return "The model is not FLUX.1, or the file is not whole; get all of it"

    def _shape(self):
        embed = {comfy: ours for ours, comfy, _ in names.plain_modules(names.FluxShape(*[1] * 6, guidance=True))}
        place = embed.get if self._diffusers else (lambda comfy: comfy)
        hidden, in_features = self._need(f"{place('img_in')}.weight", 2)
        _, context_dim = self._need(f"{place('txt_in')}.weight", 2)
        _, vec_dim = self._need(f"{place('vector_in.in_layer')}.weight", 2)
        if not hidden or hidden % names.HEAD_DIM or not in_features or in_features % 4:
            raise CheckpointError(f"{self.path}: {place('img_in')}.weight is [{hidden}, {in_features}]. The format holds "
                                  f"models whose hidden size is a multiple of {names.HEAD_DIM} and that have 4 features per "
                                  "channel")
        depths = []
        for prefix in ("transformer_blocks.", "single_transformer_blocks.") if self._diffusers else ("double_blocks.",
                                                                                                    "single_blocks."):
            blocks = {name[len(prefix):].split(".")[0] for name in self._where if name.startswith(prefix)}
            wanted = {str(i) for i in range(len(blocks))}
            if blocks != wanted or not 0 < len(blocks) <= MAX_BLOCKS:
                odd = sorted(map(shown, blocks ^ wanted))[:3]
                raise CheckpointError(f"{self.path}: {prefix}* are {len(blocks)} blocks"
                                      + (f" that are not numbered 0, 1, 2 ...: {', '.join(odd)}" if odd else "")
                                      + f". {self._hint()}")
            depths.append(len(blocks))
        guidance = f"{place('guidance_in.in_layer')}.weight" in self._where
        return names.FluxShape(hidden, *depths, in_features, context_dim, vec_dim, guidance)

    def _map(self):
        """(ComfyUI tensor, [stored tensors whose rows it stacks])"""
        stacked = dict(names.diffusers_modules(self.shape)) if self._diffusers else {}
        for layer in {slot.layer: None for slot in names.slots(self.shape)}:
            for part in ("weight", "bias"):
                yield f"{layer}.{part}", [f"{module}.{part}" for module in stacked.get(layer, [layer])]
        for ours, comfy, _ in names.plain_modules(self.shape):
            for part in ("weight", "bias"):
                yield f"{comfy}.{part}", [f"{ours if self._diffusers else comfy}.{part}"]
        for ours, comfy in names.norms(self.shape):
            if self._diffusers:
                block, _, norm = ours.partition(".norm_")
                yield comfy, [f"{block}.attn.norm_{norm}"]
            else:                                           # BFL's `.scale` is `.weight` in newer ComfyUI
                renamed = comfy.removesuffix("scale") + "weight"
                yield comfy, [comfy if comfy in self._where else renamed]

    def _expected(self):
        """(ComfyUI tensor, shape)"""
        rows, cols = {}, {}
        for slot in names.slots(self.shape):
            rows[slot.layer] = max(rows.get(slot.layer, 0), slot.row + slot.n)
            cols[slot.layer] = max(cols.get(slot.layer, 0), slot.col + slot.k)
        for layer in rows:
            yield f"{layer}.weight", (rows[layer], cols[layer])
            yield f"{layer}.bias", (rows[layer],)
        for _, comfy, shape in names.plain_modules(self.shape):
            yield f"{comfy}.weight", shape
            yield f"{comfy}.bias", shape[:1]
        for _, comfy in names.norms(self.shape):
            yield comfy, (names.HEAD_DIM,)

    def _check(self):
        expected = list(self._expected())
        missing = sorted({part for name, _ in expected for part in self._parts[name] if part not in self._where})
        if missing:
            raise CheckpointError(f"{self.path}: {len(missing)} tensors are missing: {', '.join(missing[:3])}"
                                  f"{' ...' if len(missing) > 3 else ''}. {self._hint()}")
        for name, shape in expected:
            infos = [self._info(part) for part in self._parts[name]]
            odd = next((part for part, info in zip(self._parts[name], infos) if info.dtype not in FLOATS), None)
            if odd:
                raise CheckpointError(f"{self.path}: {odd} is {self._info(odd).dtype}: quantised already. {ORIGINAL}")
            fits = (all(info.shape[1:] == shape[1:] for info in infos if info.shape)
                    and sum(info.shape[0] if info.shape else 0 for info in infos) == shape[0])
            if not fits or any(not info.shape for info in infos):
                raise CheckpointError(f"{self.path}: {', '.join(self._parts[name])}: "
                                      f"{' + '.join(str(list(info.shape)) for info in infos)}, needs {list(shape)}. "
                                      "This is no FLUX.1 transformer, or one whose layers were pruned")
            for part in self._parts[name]:
                scale = self._scale_name(part)
                if scale and self._info(scale).shape not in ((), (1,)):
                    raise CheckpointError(f"{self.path}: {scale} is {list(self._info(scale).shape)}: a block-scaled 8-bit "
                                          f"or 4-bit model. {ORIGINAL} with at most one scale per layer")

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
        """(weight, bias) of a ComfyUI layer, 16 bit or fp32; fresh tensors."""
        return self._read(f"{name}.weight"), self._read(f"{name}.bias")

    def plain(self):
        """(ComfyUI tensor name, tensor) of all that is not quantised."""
        for _, comfy, _ in names.plain_modules(self.shape):
            for part in ("weight", "bias"):
                yield f"{comfy}.{part}", self._read(f"{comfy}.{part}")
        for _, comfy in names.norms(self.shape):
            yield comfy, self._read(comfy)

    def check(self, progress):
        """Raise CheckpointError where any tensor holds NaN or Inf: reads everything once. progress(share done)."""
        todo = list(self._parts)
        for done, name in enumerate(todo):
            self._read(name, count=True)
            progress((done + 1) / len(todo))

    def _read(self, name, count=False):
        parts = []
        with ExitStack() as stack:
            getters = {}
            for part in self._parts[name]:
                file = self._where[part]
                if id(file) not in getters:
                    getters[id(file)] = stack.enter_context(file.reading())
                tensor = getters[id(file)](self._prefix + part)
                if tensor.dtype.itemsize == 1:
                    scale = self._scale_name(part)
                    tensor = tensor.to(torch.bfloat16)      # exact: bf16 has more of everything
                    if scale:
                        source = self._where[scale]
                        with source.reading() as get:
                            tensor = tensor.float() * get(self._prefix + scale).float()
                if not finite(tensor):
                    bad = int((~tensor.isfinite()).sum())
                    raise CheckpointError(f"{self.path}: {part} has NaN or Inf in {bad} places. The model is broken: a "
                                          "merge that went wrong, or a damaged file. Make or get it again")
                if not count:
                    parts.append(tensor.clone())
        if count:
            return None
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        swapped = self._diffusers and name.startswith("final_layer.adaLN_modulation")
        return swap_halves(stacked) if swapped else stacked


def _files(path):
    """The safetensors files behind a path: itself, those an index names, or those of a folder."""
    if path.is_dir():
        inside = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob("*.safetensors"))
        if not inside and (path / "transformer").is_dir():          # a whole diffusers pipeline
            return _files(path / "transformer")
        if len(inside) != 1:
            raise CheckpointError(f"{path}: a folder with {len(inside)} models. Name the .safetensors file, or the "
                                  f"{INDEX} of a model in parts")
        return _files(inside[0])
    if not path.name.endswith(INDEX):
        return [path]
    try:
        listed = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable index of a model in parts: {shown(error)}. Get it again") from error
    odd = [name for name in listed if not isinstance(name, str) or Path(name).name != name]
    if odd or not listed:
        raise CheckpointError(f"{path}: names {'no files' if not listed else shown(odd[0])}, needs files beside it")
    missing = [name for name in listed if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of its {len(listed)} parts are missing: {shown(missing[0])}. "
                              "Download them too")
    return [path.parent / name for name in listed]
