"""A SVDQ FLUX checkpoint on disk: opened, checked against what a FLUX of its sizes must hold, read layer by layer.

Opening reads headers only. Reading goes through a memory map that is dropped after every layer, so a model that is
copied out of a 6.8 GB file costs its own size in memory and no more.

Source: checkpoint-format 1, 2, 3, 10.
"""

import json
import os
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path

import torch

from ..kernels import weights
from ..kernels.errors import command
from ..kernels.layout import GROUP, RANK_ALIGN
from . import names
from .container import TensorFile, TensorInfo, write_tensors
from .errors import CheckpointError, shown
from .format import Tile, finite, read_slot

BLOCKS_FILE, REST_FILE = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
HALF = ("BF16", "F16")
MAX_BLOCKS = 200        # of one kind; FLUX.1 has 19 and 38. A header can claim millions, each with 40 tensors missing
PRECISIONS = {"int4": ("int4", None, None), "nvfp4": ("fp4_e2m1_all", [None, "fp8_e4m3_nan"], "fp8_e4m3_nan")}


class Checkpoint:
    """An SVDQ FLUX model: one file, or a legacy folder of two.

    path        as given
    metadata    {str: str} of the file, or made from the folder's JSON files
    tensors     {canonical name: TensorInfo}
    shape       names.FluxShape
    precision   "int4" or "nvfp4"
    ranks       Counter {rank: W4A4 layers that have it}
    problems    what makes it unusable, one line each; empty when it can be loaded
    notices     what is odd but harmless

    Raises CheckpointError at once for anything that is no SVDQ FLUX model; `require()` raises for problems.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.problems, self.notices = [], []
        self.files = self._open_files()
        self.tensors, self._where = {}, {}
        twice = []
        for file in self.files:
            for stored, info in file.tensors.items():
                name = names.canonical(stored)
                if name in self.tensors:                    # in a legacy folder the block file comes first and wins
                    twice.append(name)
                else:
                    self.tensors[name], self._where[name] = info, (file, stored)
        if twice:
            self.notices.append(f"{len(twice)} tensors are there twice, the first is used: {_some(twice)}")
        if not names.is_svdq_flux(self.tensors):
            raise CheckpointError(f"{self.path}: {self._what_instead()}.")
        self.shape = self._shape()
        self.precision = "nvfp4" if self._any_nvfp4() else "int4"
        self.slots = list(names.slots(self.shape)) if self.shape else []
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
            if missing:
                raise CheckpointError(f"{path}: not an SVDQ model folder, {' and '.join(missing)} missing. A legacy SVDQ "
                                      f"model is a folder with {BLOCKS_FILE} and {REST_FILE}; download the other file too")
            files = [TensorFile(half) for half in halves]
            self.metadata = {key: text for key, name in (("config", "config.json"), ("comfy_config", "comfy_config.json"))
                             if (text := _read_text(path / name)) is not None}
            return files
        file = TensorFile(path)
        self.metadata = file.metadata
        return [file]

    def _what_instead(self):
        dtypes = {info.dtype for info in self.tensors.values()}
        found = names.identify_foreign(self.tensors, dtypes)
        if found:
            return f"this is {found}"
        return (f"not an SVDQ FLUX model: it holds {_some(self.tensors) or 'no tensors'}. "
                "Get a file named svdq-int4_r32-... or svdq-fp4_r32-..., "
                "which has transformer_blocks.0.qkv_proj.qweight")

    def _shape(self):
        """Sizes from the tensors; a file that lacks the few it takes cannot be checked any further."""
        sizes = {}
        for field, name, axis in (("hidden", "x_embedder.weight", 0), ("in_features", "x_embedder.weight", 1),
                                  ("context_dim", "context_embedder.weight", 1),
                                  ("vec_dim", "time_text_embed.text_embedder.linear_1.weight", 1)):
            info = self.tensors.get(name)
            if info is None or len(info.shape) != 2:
                self.problems.append(f"{name}: {'missing' if info is None else f'is {list(info.shape)}, needs two axes'}")
                return None
            sizes[field] = info.shape[axis]
        empty = next((field for field, size in sizes.items() if size == 0), None)
        if empty:
            self.problems.append(f"the tensor that sets {empty} is empty")
            return None
        if sizes["hidden"] % names.HEAD_DIM or sizes["in_features"] % 4:
            self.problems.append(f"x_embedder.weight: is [{sizes['hidden']}, {sizes['in_features']}]; FLUX needs a multiple "
                                 f"of {names.HEAD_DIM} rows and of 4 columns")
            return None
        for field, prefix in (("depth", "transformer_blocks."), ("depth_single", "single_transformer_blocks.")):
            blocks = {name[len(prefix):].split(".")[0] for name in self.tensors if name.startswith(prefix)}
            wanted = {str(i) for i in range(len(blocks))}
            if blocks != wanted or len(blocks) > MAX_BLOCKS:
                odd = sorted(blocks - wanted)
                self.problems.append(f"{prefix}*: {len(blocks)} blocks" + (
                    f" with gaps: '{prefix}{shown(odd[0])}' is there, block {min(map(int, wanted - blocks))} is not"
                    if odd else f", more than {MAX_BLOCKS}"))
                return None
            sizes[field] = len(blocks)
        return names.FluxShape(guidance="time_text_embed.guidance_embedder.linear_1.weight" in self.tensors, **sizes)

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
                self.problems.append(f"{name}: is {info.dtype} {list(info.shape)}; "
                                     f"needs {' or '.join(dtypes)} {list(shape)}{self._hint(name, info)}")
        extra = sorted(set(self.tensors) - known)
        if extra:
            self.notices.append(f"{len(extra)} tensors FLUX does not have are ignored: {_some(extra)}")
        self._check_metadata()

    def _hint(self, name, info):
        if not name.endswith(".wscales"):
            return ""
        if info.dtype in ("U8", "F8_E8M0"):                 # MXFP4 files look like NVFP4 ones but for these scales
            return ". This is the MXFP4 variant, which no published FLUX file uses; get the int4 or fp4 file"
        if self.precision == "nvfp4" and info.dtype in HALF:
            return ". Layers of an int4 and of an fp4 file are mixed here"
        return ""

    def _expected(self):
        """(name, dtypes, shape, needed) of every tensor; a first axis of (n,) means "at least n"."""
        for slot in self.slots:
            yield from self._expected_awq(slot) if slot.kind == "awq" else self._expected_w4a4(slot)
        for ours, _, shape in names.plain_modules(self.shape):
            yield f"{ours}.weight", (*HALF, "F32"), shape, True
            yield f"{ours}.bias", (*HALF, "F32"), shape[:1], True
        for ours, _ in names.norms(self.shape):
            yield ours, (*HALF, "F32"), (names.HEAD_DIM,), True

    def _expected_w4a4(self, slot):
        n, k, at = slot.n, slot.k, f"{slot.module}."
        yield at + "qweight", ("I8",), (n, k // 2), True
        scale = ("F8_E4M3",) if self.precision == "nvfp4" else HALF
        yield at + "wscales", scale, (k // GROUP[self.precision], n), True
        yield at + "smooth", HALF, (k,), True
        yield at + "smooth_orig", HALF, (k,), False
        yield at + "bias", HALF, (n,), False
        down, up = (self.tensors.get(at + name) for name in ("lora_down", "lora_up"))
        rank = self.rank(slot)
        padded = -(-rank // RANK_ALIGN) * RANK_ALIGN            # a rank that is no multiple of 16 fails as a wrong shape
        yield at + "lora_down", HALF, (k, padded), up is not None
        yield at + "lora_up", HALF, (n, padded), down is not None
        if self.precision == "nvfp4":
            yield at + "wcscales", HALF, (n,), False
            yield at + "wtscale", (*HALF, "F32"), (1,), False

    def _expected_awq(self, slot):
        n, k, at = slot.n, slot.k, f"{slot.module}."
        yield at + "qweight", ("I32",), (n // 4, k // 2), True
        yield at + "wscales", HALF, ((k // 64,), n), True   # writers pad the groups to a multiple of 16
        yield at + "wzeros", HALF, ((k // 64,), n), True
        yield at + "bias", HALF, (n,), False

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
        """A function canonical name -> stored tensor (None if absent), views valid inside the block only."""
        with ExitStack() as stack:
            getters = {id(file): stack.enter_context(file.reading()) for file in self.files}

            def get(name):
                file, stored = self._where.get(name, (None, None))
                return None if file is None else getters[id(file)](stored)

            yield get

    def layers(self):
        """(ComfyUI layer name, [Tile], bias fp32 [N]) for every quantised layer; tiles are views until the next step."""
        for layer, group in groupby(self.slots, key=lambda slot: slot.layer):
            with self.reading() as get:
                yield layer, *self._layer(list(group), get)

    def _layer(self, slots, get):
        tiles, bias = [], torch.zeros(max(slot.row + slot.n for slot in slots))
        try:
            for slot in slots:
                weight, tile_bias = read_slot(slot, self.precision, get)
                tiles.append(Tile(slot.row, slot.col, weight))
                bias[slot.row:slot.row + slot.n] += tile_bias
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        return tiles, bias

    def plain(self):
        """(ComfyUI tensor name, tensor) for everything that is not quantised; fresh tensors."""
        with self.reading() as get:
            for ours, comfy, _ in names.plain_modules(self.shape):
                for part in ("weight", "bias"):
                    tensor = self._finite(f"{ours}.{part}", get)
                    yield f"{comfy}.{part}", swap_halves(tensor) if ours == "norm_out.linear" else tensor.clone()
            for ours, comfy in names.norms(self.shape):
                yield comfy, self._finite(ours, get).clone()

    def _finite(self, name, get):
        tensor = get(name)
        if not finite(tensor):
            raise CheckpointError(f"{self.path}: {name}: contains NaN or Inf. The file is damaged; download it again")
        return tensor


def swap_halves(tensor):
    """norm_out.linear is (scale, shift), BFL's adaLN_modulation.1 is (shift, scale). Its own inverse; a fresh tensor."""
    return torch.cat(tensor.chunk(2)[::-1])


def _fits(actual, wanted):
    return len(actual) == len(wanted) and all(
        have >= want[0] if isinstance(want, tuple) else have == want for have, want in zip(actual, wanted))


def _some(tensors):
    return ", ".join(map(shown, sorted(tensors)[:3])) + (" ..." if len(tensors) > 3 else "")


def _read_text(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


# ---- writing

def metadata_for(shape, precision, rank, existing=None):
    """The metadata of a published file. `existing` texts (config, comfy_config) are kept verbatim."""
    weight, weight_scale, act_scale = PRECISIONS[precision]
    group = GROUP[precision]
    config = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0", "attention_head_dim": names.HEAD_DIM,
              "axes_dims_rope": [16, 56, 56], "guidance_embeds": shape.guidance, "in_channels": shape.in_features,
              "joint_attention_dim": shape.context_dim, "num_attention_heads": shape.hidden // names.HEAD_DIM,
              "num_layers": shape.depth, "num_single_layers": shape.depth_single, "out_channels": names.LATENT_FEATURES,
              "patch_size": 1, "pooled_projection_dim": shape.vec_dim}
    comfy = {"model_class": shape.model_class, "model_config": {
        "image_model": "flux", "in_channels": shape.in_features // 4, "out_channels": 16, "patch_size": 2,
        "vec_in_dim": shape.vec_dim, "context_in_dim": shape.context_dim, "hidden_size": shape.hidden, "mlp_ratio": 4.0,
        "num_heads": shape.hidden // names.HEAD_DIM, "depth": shape.depth, "depth_single_blocks": shape.depth_single,
        "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": shape.guidance,
        "disable_unet_model_creation": True}}
    quantization = {"method": "svdquant",
                    "weight": {"dtype": weight, "scale_dtype": weight_scale, "group_size": group},
                    "activation": {"dtype": weight, "scale_dtype": act_scale, "group_size": group}, "rank": rank}
    made = {"config": json.dumps(config, indent=2), "comfy_config": json.dumps(comfy, indent=2),
            "model_class": "NunchakuFluxTransformer2dModel", "quantization_config": json.dumps(quantization)}
    return made | (existing or {})


def merge(folder, out):
    """A legacy folder -> one file with metadata; tensors keep their bytes. Returns the opened result."""
    source = Checkpoint(folder).require()
    if len(source.files) == 1:
        raise CheckpointError(f"{folder}: already a single file. 'merge' takes a legacy folder")
    rank = max(source.ranks, key=source.ranks.get, default=0)
    metadata = metadata_for(source.shape, source.precision, rank, source.metadata)

    with source.reading() as get:
        write_tensors(out, source.tensors, metadata, ((name, get(name)) for name in source.tensors))
    return Checkpoint(out).require()


def dequantize(source, out, dtype):
    """Write the weight-only equivalent under BFL/ComfyUI names: a 16-bit model any loader of FLUX takes.

    source   path of an SVDQ file or folder
    dtype    torch.bfloat16 or torch.float32

    Memory is one layer. Raises CheckpointError.
    """
    source = Checkpoint(source).require()
    kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    specs = {}
    for layer, group in groupby(source.slots, key=lambda slot: slot.layer):
        group = list(group)
        rows, cols = max(slot.row + slot.n for slot in group), max(slot.col + slot.k for slot in group)
        specs[f"{layer}.weight"], specs[f"{layer}.bias"] = TensorInfo(kind, (rows, cols)), TensorInfo(kind, (rows,))
    for _, comfy, shape in names.plain_modules(source.shape):
        specs[f"{comfy}.weight"], specs[f"{comfy}.bias"] = TensorInfo(kind, shape), TensorInfo(kind, shape[:1])
    for _, comfy in names.norms(source.shape):
        specs[comfy] = TensorInfo(kind, (names.HEAD_DIM,))

    def stream():
        for layer, tiles, bias in source.layers():
            dense = torch.zeros(specs[f"{layer}.weight"].shape)
            for tile in tiles:
                part, extra = weights.dequantize(tile.weight)
                rows, cols = (slice(at, at + size) for at, size in zip((tile.row, tile.col), part.shape))
                dense[rows, cols] = part
                bias[rows] += extra
            yield f"{layer}.weight", dense.to(dtype)
            yield f"{layer}.bias", bias.to(dtype)
        for name, tensor in source.plain():
            yield name, tensor.to(dtype)

    write_tensors(out, specs, {"format": "pt"}, stream())
