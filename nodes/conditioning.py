"""Keep encoded prompts on disk, so that a graph can run without its text encoders in memory."""

import os
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FOLDER = "conditioning"


class SVDQSaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq", node_id="SVDQSaveConditioning", display_name="Save Conditioning", is_output_node=True,
            search_aliases=["export conditioning", "cache prompt", "save prompt embedding"],
            description="Writes an encoded prompt to output/conditioning. 'Load Conditioning' reads it back without "
                        "loading the text encoders.",
            inputs=[io.Conditioning.Input("conditioning"),
                    io.String.Input("filename_prefix", default="prompt", tooltip="Start of the file's name.")],
            outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning, filename_prefix):
        tensors = {}
        for index, (cond, options) in enumerate(conditioning):
            tensors[f"{index}.cond"] = cond.contiguous()
            for name, value in options.items():
                if isinstance(value, (int, float)):
                    tensors[f"{index}.{name}"] = torch.tensor(float(value))
                elif isinstance(value, torch.Tensor):
                    tensors[f"{index}.{name}"] = value.contiguous()
                elif value is not None:
                    raise ValueError(f"Save Conditioning: '{name}' is a {type(value).__name__}, which a file cannot hold. "
                                     "Save the output of the text encoder itself, before areas, masks or hooks")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(f"{FOLDER}/{filename_prefix}",
                                                                               folder_paths.get_output_directory())
        file = f"{name}_{counter:05}_.safetensors"
        save_file(tensors, os.path.join(folder, file))
        return io.NodeOutput(conditioning, ui={"text": (f"{subfolder}/{file}",)})


class SVDQLoadConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq", node_id="SVDQLoadConditioning", display_name="Load Conditioning",
            search_aliases=["import conditioning", "prompt embedding", "without text encoder"],
            description="Reads an encoded prompt that 'Save Conditioning' wrote, from the input folder or from "
                        "output/conditioning.",
            inputs=[io.Combo.Input("file", options=_files(), tooltip="A .safetensors file with an encoded prompt.")],
            outputs=[io.Conditioning.Output()])

    @classmethod
    def fingerprint_inputs(cls, file):
        stat = os.stat(folder_paths.get_annotated_filepath(file))
        return file, stat.st_size, stat.st_mtime_ns

    @classmethod
    def execute(cls, file):
        path = folder_paths.get_annotated_filepath(file)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}). Write it again with "
                             "'Save Conditioning'") from error
        parts = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            parts.setdefault(index, {})[name] = tensor.item() if tensor.ndim == 0 else tensor
        if not parts or not all(index.isdecimal() and "cond" in part for index, part in parts.items()):
            raise ValueError(f"{file}: holds no conditioning but {', '.join(sorted(tensors)[:3]) or 'nothing'}. "
                             "Pick a file that 'Save Conditioning' wrote")
        ordered = (parts[index] for index in sorted(parts, key=int))
        return io.NodeOutput([[part.pop("cond"), part] for part in ordered])


def _files():
    """What LoadLatent does for latents, plus what this pack saved, under ComfyUI's own '[output]' mark."""
    found = []
    for folder, mark, below in ((folder_paths.get_input_directory(), "", ""),
                                (folder_paths.get_output_directory(), " [output]", FOLDER)):
        root = Path(folder)
        found += sorted(path.relative_to(root).as_posix() + mark for path in (root / below).glob("*.safetensors"))
    return found
