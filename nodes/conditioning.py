"""Keep encoded prompts on disk, so that a graph can run without its text encoders in memory. A file has

    {index}.cond      of every entry, [batch, tokens, channels]
    {index}.{name}    every tensor among the options beside it: pooled_output [batch, channels]

and in the metadata's `svdq_conditioning` a JSON list: of every entry, its options that are numbers, texts or None. In files
without it, which older versions wrote, tensors without axes are numbers.

Test: tests/comfy/inprocess/checks_conditioning.py
"""

import json
import math
import os
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..svdq.container import MAX_TENSORS, NAMES, TensorFile, TensorInfo, write_tensors
from ..svdq.errors import CheckpointError, shown
from ..svdq.files import new_name, writing
from ..svdq.format import bounds, finite

FOLDER = "conditioning"
KEY = "svdq_conditioning"
SUFFIX = ".safetensors"
# What ComfyUI's samplers and its FLUX read, and break on if it is something else. Options that they do not read are for those
# who wrote them.
# Objects and lists of ComfyUI's own:
OBJECTS = ("cond", "cross_attn", "model_conds", "uuid", "area", "control", "gligen", "hooks", "self", "additional_models",
           "reference_latents", "attention_mask_img_shape")
NUMBERS = ("strength", "mask_strength", "set_area_to_bounds", "control_apply_to_uncond", "start_percent", "end_percent",
           "clip_start_percent", "clip_end_percent", "timestep_start", "timestep_end", "guidance")
# Tensors of floats: name -> (axes, bits) that they have at least. What is calculated with as it is cannot be fp8.
TENSORS = {"cond": (3, 8), "pooled_output": (2, 8), "cross_attn_controlnet": (3, 8), "mask": (2, 16), "noise_concat": (4, 16),
           "concat_latent_image": (4, 16), "concat_mask": (4, 16), "denoise_mask": (4, 16)}
# None is as if they were not there:
OPTIONAL = ("cross_attn", "uuid", "reference_latents", "attention_mask_img_shape", "guidance", "pooled_output",
            "cross_attn_controlnet", "noise_concat", "concat_latent_image", "concat_mask", "denoise_mask")
# The largest number in any of these. Real ones stay far below: text encoders give some thousands at most, ComfyUI's nodes
# strengths up to 1000. And the end of fp32 is far enough for products of strengths and masks, and for squares that norms add.
LARGEST = 1e6
SAVE_EARLIER = "Save the output of the text encoder itself, before areas, ControlNets or hooks"
NO_FILE = "none yet: make one with Save Conditioning, or put one into the input folder, and press R"
SAVE_AGAIN = "Write it again with 'Save Conditioning'"


class SVDQSaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQSaveConditioning", display_name="Save Conditioning", is_output_node=True,
            search_aliases=["export conditioning", "cache prompt", "save prompt embedding"],
            description="Writes an encoded prompt to output/conditioning. 'Load Conditioning' reads it back without "
                        "loading the text encoders.",
            inputs=[io.Conditioning.Input("conditioning"),
                    io.String.Input("filename_prefix", default="prompt",
                                    tooltip="Start of the file's name, if you like with folders in front.")],
            outputs=[io.Conditioning.Output(tooltip="The same conditioning, for a sampler.")])

    @classmethod
    def execute(cls, conditioning, filename_prefix):
        prefix = new_name(filename_prefix, "prompt", SUFFIX, folders=True).with_suffix("")
        why = _wrong(conditioning)
        if why:
            raise CheckpointError(f"Save Conditioning: {why}. {SAVE_EARLIER}")
        tensors, others = {}, []
        for index, (cond, options) in enumerate(conditioning):
            others.append({name: value for name, value in options.items() if not isinstance(value, torch.Tensor)})
            tensors |= {f"{index}.{name}": value for name, value in {"cond": cond, **options}.items()
                        if isinstance(value, torch.Tensor)}
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"Save Conditioning: this has {len(tensors):,} tensors, and no file with more than "
                                  f"{MAX_TENSORS:,} is read again. Save its entries in several files")
        specs = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        path = _claimed(prefix)
        try:
            write_tensors(path, specs, {KEY: json.dumps(others)}, tensors.items())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        file = path.relative_to(folder_paths.get_output_directory()).as_posix()
        return io.NodeOutput(conditioning, ui={"text": (file,)})


class SVDQLoadConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQLoadConditioning", display_name="Load Conditioning",
            search_aliases=["import conditioning", "prompt embedding", "without text encoder"],
            description="Reads an encoded prompt that 'Save Conditioning' wrote, from the input folder or from "
                        "output/conditioning.",
            inputs=[io.Combo.Input("file", options=_files() or [NO_FILE],
                                   tooltip="A file with an encoded prompt, in the input folder or in output/conditioning.")],
            outputs=[io.Conditioning.Output(tooltip="The prompt, for FluxGuidance or a sampler.")])

    @classmethod
    def fingerprint_inputs(cls, file):
        try:
            stat = os.stat(_path(file))
        except OSError as error:
            raise CheckpointError(f"{shown(file)}: cannot be read: {shown(error.strerror)}. {SAVE_AGAIN}") from error
        return file, stat.st_size, stat.st_mtime_ns

    @classmethod
    def execute(cls, file):
        opened = TensorFile(_path(file))
        entries = _entries(file, opened)
        with opened.reading() as get:
            for key in opened.tensors:
                index, _, name = key.partition(".")
                tensor = get(key)
                old_number = tensor.ndim == 0 and KEY not in opened.metadata
                entries[int(index)][name] = tensor.item() if old_number else tensor
        conditioning = [[options.pop("cond"), options] for options in entries]
        why = _wrong(conditioning)
        if why:
            raise CheckpointError(f"{file}: {why}. {SAVE_AGAIN}")
        return io.NodeOutput(conditioning)


def _entries(file, opened):
    """Of every entry that a file has, its options that are no tensors."""
    indices = {key.partition(".")[0] for key in opened.tensors}
    wanted = range(len(indices))
    if not indices or not all(f"{index}.cond" in opened.tensors for index in wanted):
        held = ", ".join(map(shown, sorted(opened.tensors)[:3])) or "nothing"
        raise CheckpointError(f"{file}: holds no conditioning but {held}. Pick a file that 'Save Conditioning' wrote")
    try:
        others = json.loads(opened.metadata[KEY]) if KEY in opened.metadata else [{} for _ in wanted]
    except (ValueError, RecursionError):
        others = None
    if not isinstance(others, list) or len(others) != len(wanted) or not all(isinstance(entry, dict) for entry in others):
        raise CheckpointError(f"{file}: its {KEY} does not fit its tensors. {SAVE_AGAIN}")
    return others


def _wrong(conditioning):
    """Why a conditioning cannot be kept in a file or sampled with, in words that name the entry; None if it can."""
    if not isinstance(conditioning, list) or not all(
            isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict) for entry in conditioning):
        return f"'conditioning' is a {type(conditioning).__name__} that is no CONDITIONING"
    for index, (cond, options) in enumerate(conditioning):
        for name, why in (("cond", _not_kept(cond) or _misfit("cond", cond)),
                          *((name, _wrong_option(name, value)) for name, value in options.items())):
            if why:
                return f"'{shown(name)}' {why} (entry {index})"
        if "clip_start_percent" in options and "clip_end_percent" not in options:
            return f"'clip_start_percent' is without a 'clip_end_percent' (entry {index})"
    return None if conditioning else "the conditioning is empty"


def _wrong_option(name, value):
    if not isinstance(name, str) or not name.isidentifier():
        return "is no name of an option"
    if value is None and name in OPTIONAL:
        return None
    if name in OBJECTS:
        return f"is a {type(value).__name__}, where ComfyUI keeps objects that a file cannot hold"
    return _not_kept(value) or _misfit(name, value)


def _not_kept(value):
    """Why no file gives this value back, to follow its name; None if one does."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
            return f"is a {type(value).__name__} without numbers of its own, which a file cannot hold"
        if value.dtype not in NAMES:
            return f"is a tensor of {value.dtype}, which a file cannot hold"
        return None if finite(value) else "has NaN or Inf, which makes black pictures"
    if value is not None and not isinstance(value, (bool, int, float, str)):
        return f"is a {type(value).__name__}, which a file cannot hold"
    if isinstance(value, float) and not math.isfinite(value) or isinstance(value, int) and value.bit_length() > 64:
        return "is no number that an option can be"
    return None


def _misfit(name, value):
    """Why ComfyUI cannot sample with this, to follow its name; None if it can or does not look at it."""
    if name not in TENSORS and name not in NUMBERS:
        return None
    is_tensor = isinstance(value, torch.Tensor)
    what = f"is {list(value.shape)} {value.dtype}" if is_tensor else f"is a {type(value).__name__}"
    if name in NUMBERS:
        if not isinstance(value, (bool, int, float)):
            return f"{what}, needs a number"
        size = abs(value)
    else:
        axes, bits = TENSORS[name]
        if not (is_tensor and value.is_floating_point() and value.itemsize * 8 >= bits
                and value.ndim >= axes and value.numel()):
            return f"{what}, needs a tensor of floats with at least {axes} axes, none of them 0, and {bits} bits a number"
        size = max(map(abs, bounds(value)))
    return f"reaches {size:.3g}, and no real one is above {LARGEST:g}" if size > LARGEST else None


def _claimed(prefix):
    """An empty file under the next free name that begins so, as ComfyUI numbers files: nobody else takes it. Its folder is
    made."""
    where = f"{FOLDER}/{prefix}"
    with writing(where):
        try:
            folder, name, counter, *_ = folder_paths.get_save_image_path(where, folder_paths.get_output_directory())
        except OSError:
            raise
        except Exception as error:      # ComfyUI raises no other class where a link leads out of the output folder
            raise CheckpointError(f"{where}: cannot be written: {shown(error, 200)}. Choose another name") from error
        while True:
            path = Path(folder, f"{name}_{counter:05}_{SUFFIX}")
            try:
                path.touch(exist_ok=False)
                return path
            except FileExistsError:     # of somebody who looked at the same time
                counter += 1


def _files():
    """What LoadLatent does for latents, plus what this pack saved, under ComfyUI's own '[output]' mark."""
    given, saved = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory(), FOLDER)
    found, _ = folder_paths.recursive_search(str(saved))
    return [*sorted(path.name for path in given.glob(f"*{SUFFIX}")),
            *sorted(f"{FOLDER}/{Path(name).as_posix()} [output]" for name in found if name.endswith(SUFFIX))]


def _path(file):
    """Of an entry of _files()."""
    if file not in _files():            # a linked text reaches us unchecked, and may lead anywhere
        raise CheckpointError(f"{shown(file)}: no such file in the input folder or in output/{FOLDER}. Press R to refresh the "
                              "list, or make it with 'Save Conditioning'")
    try:
        return folder_paths.get_annotated_filepath(file)
    except ValueError as error:         # its word for a link that leads out of the folder
        raise CheckpointError(f"{shown(file)}: leads out of ComfyUI's folders. Put the file itself there") from error
