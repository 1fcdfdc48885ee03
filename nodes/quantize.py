"""Turn the FLUX of a graph, with its LoRAs, into an SVDQ checkpoint."""

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont

from ..svdq.container import replacing
from ..svdq.errors import CheckpointError, shown
from ..svdq.files import folders_in_front, new_name, writing
from ..svdq.quantize import quantize
from ..svdq.quantize.picture import COLOURS, as_text, by_kind, order_of, require_ours
from .calibration import files, path_of, stamp
from .host.source import ModelSource
from .models import download_folder
from .prompt_server import show

NONE = "none (data-free)"
SUFFIX = ".safetensors"
WORKSPACE = 8 << 30     # bytes of GPU memory ComfyUI is asked to make free: more than any layer of FLUX.1 takes
IN_NAMES = {"int4": "int4", "nvfp4": "fp4"}             # what published files are called


class SVDQQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/quantize", node_id="SVDQQuantize", display_name="Quantize to SVDQ", is_output_node=True,
            is_experimental=True,
            search_aliases=["quantise", "convert to 4 bits", "save model", "deepcompressor"],
            description="Writes the FLUX model of the graph, with its LoRAs in it, as a 4-bit SVDQuant file in "
                        "models/diffusion_models. Stopped, it continues where it was when run again.",
            inputs=[io.Model.Input("model"),
                    io.Combo.Input("precision", options=[*IN_NAMES], default="int4",
                                   tooltip="int4 suits every GPU; nvfp4 is made for RTX 50 (sm_120)."),
                    io.Int.Input("rank", default=32, min=16, max=128, step=16,
                                 tooltip="Width of the 16-bit branch of every layer. More is closer to the original, larger "
                                         "and slower."),
                    io.Combo.Input("calibration", options=[NONE, *files()], default=NONE,
                                   tooltip="A file of 'SVDQ Capture Calibration' for a FLUX of these sizes makes the result "
                                           "better. None: from the weights alone."),
                    io.String.Input("filename", default="svdq-{precision}_r{rank}-flux",
                                    tooltip="Name of the new file in models/diffusion_models. {precision} and {rank} are "
                                            "filled in.")],
            outputs=[io.String.Output(display_name="model_name", tooltip="The file's name in models/diffusion_models."),
                     io.String.Output(display_name="report", tooltip="How well the layers came out, in words."),
                     io.Image.Output(display_name="plot", tooltip="How well the layers came out, as a picture.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo])

    @classmethod
    def fingerprint_inputs(cls, calibration=NONE, **rest):
        """With a calibration file that has grown, it is another result."""
        return None if calibration == NONE else stamp(calibration)

    @classmethod
    def execute(cls, model, precision, rank, calibration, filename):
        target, statistics = _target(filename, precision, rank), None if calibration == NONE else path_of(calibration)
        told = target.with_suffix(".json")
        require_ours(told)
        device, say = comfy.model_management.get_torch_device(), _Say(cls)
        source = ModelSource(model, device, say.text)
        if not comfy.model_management.is_device_cpu(device):
            comfy.model_management.free_memory(WORKSPACE, device)
        with folders_in_front(target):
            with writing(target.parent):
                target.parent.mkdir(parents=True, exist_ok=True)
            report = quantize(source, target, precision, rank, statistics, device=str(device), progress=say)
        require_ours(told)                              # somebody else had time to put something there
        with replacing(told) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
        name = target.relative_to(download_folder()).as_posix()
        text, picture = say.text(f"{name}, {report['seconds']:.0f} s\n{as_text(report)}"), plot(report)
        with writing(folder_paths.get_temp_directory()):
            preview = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(name, text, picture, ui={"text": (text,), **preview})


class _Say:
    """Feeds the quantiser's progress to the node's bar and to its text; an interrupt in the UI ends the run."""

    def __init__(self, node):
        self.node, self.bar = node, None

    def __call__(self, progress):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(progress.total)
        self.bar.update_absolute(progress.done, progress.total)
        left = progress.seconds_left
        self.text(progress.text if left is None else f"{progress.text}, {left // 60:.0f}:{left % 60:02.0f} left")

    def text(self, text):
        return show(text, self.node)


def _target(filename, precision, rank):
    if precision not in [*IN_NAMES]:                        # a link may give anything
        raise CheckpointError(f"precision is {shown(precision)}, needs to be one of {', '.join(IN_NAMES)}. Choose one of "
                              "these")
    if isinstance(filename, str):
        filename = filename.replace("{precision}", IN_NAMES[precision]).replace("{rank}", str(rank))
    return Path(download_folder(), new_name(filename, "svdq-int4_r32-mine", SUFFIX, folders=True))


def plot(report):
    """SQNR over the blocks, one line per kind of layer, as an IMAGE. svdq.quantize.picture draws the same as SVG."""
    width, height, left, right, top, bottom = 1200, 640, 60, 250, 60, 50
    series = by_kind(report)
    points = [point for line in series.values() for point in line]
    blocks = 1 + max(block for block, _ in points)
    low, high = (5 * int(bound // 5) for bound in (min(sqnr for _, sqnr in points), max(sqnr for _, sqnr in points) + 5))
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)

    def at(block, sqnr):
        return (left + (width - left - right) * (block + 0.5) / blocks,
                top + (height - top - bottom) * (high - sqnr) / max(high - low, 1))

    draw.text((left, 20), f"{report['source']}: {report['precision']}, rank {report['rank']}. SQNR in dB over the blocks, "
                          f"{order_of(report)}", "black", font)
    for sqnr in range(low, high + 1, 5):
        draw.line([at(-0.5, sqnr), at(blocks - 0.5, sqnr)], "#dddddd")
        draw.text((left - 8, at(0, sqnr)[1]), str(sqnr), "black", font, anchor="rm")
    for block in range(0, blocks, max(1, blocks // 12)):
        draw.text((at(block, low)[0], height - bottom + 18), str(block), "black", font, anchor="mm")
    for i, (kind, line) in enumerate(series.items()):
        colour, places = COLOURS[i % len(COLOURS)], [at(*point) for point in line]
        draw.line(places, colour, 2)
        for x, y in places:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        draw.text((width - right + 16, top + 18 * i), kind, colour, font)
    return torch.from_numpy(numpy.asarray(picture).astype(numpy.float32) / 255)[None]
