"""Tiny models for the classes, made once per class in a folder of ComfyUI's kind."""

import shutil

import folder_paths
import torch

from svdq_pack.svdq import checkpoint
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.quantize.calibration import Collector, Statistics, inputs
from svdq_pack.tests import random_models

GOLDEN = random_models.Path(__file__).resolve().parents[1] / "fixtures" / "format"
SHAPE = flux1.Shape(hidden=128, depth=1, depth_single=1, in_features=64, context_dim=128, vec_dim=64, guidance=True)


def folders(folder):
    """ComfyUI's folders below `folder` from now on."""
    for kind in ("diffusion_models", "loras", "input", "output", "temp"):
        (folder / kind).mkdir(exist_ok=True)
    for kind in ("diffusion_models", "loras"):
        folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], folder_paths.supported_pt_extensions)
    for kind in ("input", "output", "temp"):
        getattr(folder_paths, f"set_{kind}_directory")(str(folder / kind))
    folder_paths.models_dir = str(folder)


def write(path, in_features=64, precision="int4", **changes):
    """A random SVDQ FLUX, 1 MB."""
    shape = flux1.Shape(**vars(SHAPE) | {"in_features": in_features} | changes)
    random_models.write_model(path, torch.Generator().manual_seed(in_features), shape, 16, precision)
    return path


def write_dense(path, folder):
    """The same as a 16-bit model."""
    write(folder / "sixteen-bit.part")
    checkpoint.dequantize(folder / "sixteen-bit.part", path, torch.bfloat16)
    (folder / "sixteen-bit.part").unlink()
    return path


def statistics():
    """What 'SVDQ Capture Calibration' would have seen of it."""
    collectors = {layer: Collector(k) for layer, k in inputs(SHAPE).items()}
    for collector in collectors.values():
        collector.update(torch.randn(6, collector.k, generator=torch.Generator().manual_seed(collector.k)))
    return Statistics.from_collectors(SHAPE, collectors, calls=2, note="a note")


def network_input(channels=16):
    """What these models are called with."""
    def noise(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    return {"x": noise(1, channels, 4, 4), "timestep": torch.tensor([0.5]), "context": noise(1, 4, 128), "y": noise(1, 64),
            "guidance": torch.tensor([3.5])}


def golden(name, path):
    shutil.copy(GOLDEN / f"{name}.safetensors", path)
    return path
