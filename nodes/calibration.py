"""Gather what a FLUX's layers are fed while a normal graph samples, for 'Quantize to SVDQ'."""

import logging
import os
import threading
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..svdq.errors import CheckpointError, shown
from ..svdq.files import new_name, writing
from ..svdq.quantize.calibration import Statistics
from .host.capture import merged, watch
from .host.source import flux_shape
from .prompt_server import show

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
_adding = threading.Lock()          # what one sampling adds to a file, another that ends at the same time must not undo


class SVDQCaptureCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/quantize", node_id="SVDQCaptureCalibration", display_name="SVDQ Capture Calibration",
            is_experimental=True,
            search_aliases=["calibrate", "calibration data", "activation statistics", "quantize"],
            description="Put it between a FLUX loader and the sampler: every sampling adds statistics of what the layers "
                        "see to a file in models/svdq_calibration, for 'Quantize to SVDQ'. The pictures stay the same.",
            inputs=[io.Model.Input("model"),
                    io.String.Input("filename", default="flux", tooltip="Name of the file in models/svdq_calibration."),
                    io.Boolean.Input("add_to_file", default=True, optional=True,
                                     tooltip="On: every sampling adds to what the file holds. Off: it replaces it.")],
            outputs=[io.Model.Output(tooltip="The same MODEL, watched.")], hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, model, filename, add_to_file=True):
        path, shape = folder() / new_name(filename, "flux", SUFFIX), flux_shape(model)
        if add_to_file and os.path.lexists(path):
            Statistics.load(path, shape)                        # say now, not after sampling, that it cannot be added to

        def save(seen):
            with _adding:
                if add_to_file and os.path.lexists(path):
                    seen = merged(Statistics.load(path, shape), seen)
                with writing(path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True)
                seen.save(path)
            text = show(f"{path.name}: {seen.calls} calls of the model so far", cls)
            log.info("SVDQ calibration: %s, in %s", text, path.parent)

        return io.NodeOutput(watch(model, shape, save))


def folder():
    return Path(folder_paths.models_dir) / "svdq_calibration"


def files():
    """Names of the calibration files there are."""
    return sorted(path.name for path in folder().glob(f"*{SUFFIX}"))


def path_of(name):
    """The file behind an entry of files(), which may be given without its suffix."""
    found = next((entry for entry in files() if entry in (name, f"{name}{SUFFIX}")), None)
    if found is None:
        raise CheckpointError(f"{shown(name)}: no such file in {folder()}. Press R to refresh the list, or make it with 'SVDQ "
                              "Capture Calibration'")
    return folder() / found


def stamp(name):
    """What changes when the file does."""
    path = path_of(name)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {shown(error.strerror)}. Remove it, and capture again") from error
    return stat.st_size, stat.st_mtime_ns
