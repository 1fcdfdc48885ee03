#!/usr/bin/env python3
"""What quantising leaves of the demo model's pictures, beside other ways of doing it.

    python3 tools/demo/quality.py [FOLDER] [--prompts 64] [--rows int4-r32,fp8] [--publish]

FOLDER (default: .environment/training) is where tools/demo/train.py left its files. Prints a table of the model alone and
one with the LoRA, and writes quality.jpg and quality-lora.jpg there, with --publish into docs/pictures, too. Prompts are
captions of scenes of a seed that nobody trained on; the noise of prompt i has seed i.

    16-bit            ComfyUI's Flux in bf16: the reference of the other rows
    16-bit-reseeded   the same with other noise: what two pictures of one prompt have in common
    fp8               ComfyUI's fp8_e4m3fn: all weights rounded, 16-bit activations
    rtn, rotation     W4A4 as in tools/quantizer_table.py, in groups of 64: rounding to nearest, plain and after a block
                      Hadamard transform of both sides. Modulation layers stay in 16 bit, which the other W4A4 rows pay for
    int4-*, nvfp4-*   SVDQ files in our loader, calibrated but for "data-free". Activations are rounded as kernels do it,
                      -a8: to 8 bits as on Hopper, -weight-only: not at all, as on a machine without kernels

The LoRA goes where it does in use: merged by ComfyUI into 16-bit and fp8 weights, beside rtn and rotation in 16 bit, in the
low-rank branch of SVDQ models. The judge is a small network that reads a caption's words off a picture.
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
import time
import types
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
parent = types.ModuleType("svdq_pack")          # the pack's folder name is not ours to assume, so name its package here
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
if __name__ == "__main__":                      # with any Python; what follows wants ComfyUI's
    from svdq_pack.workflows.headless import environment
    environment.enter(__file__)

import numpy as np                              # noqa: E402
import torch                                    # noqa: E402
from PIL import Image, ImageDraw, ImageFont     # noqa: E402
from safetensors.torch import load_file         # noqa: E402

from svdq_pack.tests.comfy.inprocess import support                     # noqa: E402, first: it imports ComfyUI
from svdq_pack.svdq.kernels import reference, registry                       # noqa: E402
from svdq_pack.svdq.kernels.variant import Variant                          # noqa: E402
from svdq_pack.svdq.kernels.weights import matmul_branch                    # noqa: E402
from svdq_pack.nodes.host.load import load_model                        # noqa: E402
from svdq_pack.svdq import compare                                      # noqa: E402
from svdq_pack.svdq.demo import encode                                  # noqa: E402
from svdq_pack.svdq.families.family import by_layer                     # noqa: E402
from svdq_pack.svdq.quantize import FileSource, quantize                # noqa: E402
from svdq_pack.tools import quantizer_table                             # noqa: E402
from svdq_pack.tools.demo import scenes                                 # noqa: E402
from svdq_pack.tools.demo.models import Autoencoder, Judge              # noqa: E402

import comfy.model_management                   # noqa: E402, comes from the tree that support has chosen
import comfy.sample                             # noqa: E402
import comfy.sd                                 # noqa: E402

LORA = ROOT / "workflows" / "models" / "loras" / "svdq-demo-sticker.safetensors"
PICTURES = ROOT / "docs" / "pictures"
SIZE, STEPS, GUIDANCE = 160, 20, 3.0
BATCH = 16                      # pictures sampled at a time; guidance doubles it
PROMPT_SEED, DRAWING_SEED = 2411, 5007          # of scenes; training has 11 to 41
RESEED = 1 << 20
DRAWINGS = 256
SHOWN, SHEET_BYTES = 8, 300_000
BF16 = torch.bfloat16


# ---- models: (Files, LoRA tensors or None) -> ComfyUI's patcher

class Files:
    """What training left, and SVDQ files made of it when they are asked for."""

    def __init__(self, folder):
        self.folder, self.model = folder, folder / "demo-bf16.safetensors"
        self.calibration = folder / "calibration.safetensors"
        missing = [path.name for path in (self.model, self.calibration, LORA, folder / "autoencoder.pt",
                                          folder / "judge.pt") if not path.is_file()]
        if missing:
            sys.exit(f"quality.py: {folder} has no {', '.join(missing)}. Run tools/demo/train.py {folder} first")
        self.shape = FileSource(self.model).shape
        self.lora = load_file(LORA)

    def trained(self, name, network):
        """The network with the averaged weights of a Trainer's file."""
        saved = torch.load(self.folder / f"{name}.pt")["mean"]
        for parameter, value in zip(network.parameters(), saved, strict=True):
            parameter.data.copy_(value)
        return network.eval()

    def svdq(self, precision, rank, calibrated):
        """The path of a quantised model, made once for these weights by this quantiser."""
        made_of = [self.model, self.calibration, *sorted((ROOT / "svdq" / "quantize").glob("*.py"))]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_of)).hexdigest()[:12]
        path = self.folder / f"quality-{digest}" / f"{precision}-r{rank}{'' if calibrated else '-data-free'}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            report = quantize(self.model, path, precision, rank, self.calibration if calibrated else None)
            print(f"{path.stem}: quantised in {report['seconds']:.0f} s", file=sys.stderr)
        return path


def float_model(files, lora, dtype=BF16):
    patcher = comfy.sd.load_diffusion_model(str(files.model), model_options={"dtype": dtype})
    return patcher if lora is None else support.with_lora(patcher, lora, 1.0)


def svdq_model(files, lora, precision="int4", rank=32, calibrated=True, act_bits=None):
    patcher = load_model(files.svdq(precision, rank, calibrated), BF16, act_bits)
    return patcher if lora is None else support.with_lora(patcher, lora, 1.0)


def rounded_model(files, lora, method):
    """The 16-bit model with other forwards on the layers that are W4A4 in an SVDQ file."""
    patcher = float_model(files, None)
    network = patcher.model.diffusion_model
    pairs = {} if lora is None else {name.removeprefix("diffusion_model.").removesuffix(".lora_A.weight"):
                                     (down, lora[name.replace("lora_A", "lora_B")])
                                     for name, down in lora.items() if "lora_A" in name}
    for layer in by_layer(place for place in files.shape.comfy_places() if place.slot.kind == "w4a4"):
        linear = network.get_submodule(layer.name)
        linear.forward = rounded_forward(linear, layer.places, method, pairs.pop(layer.name, None))
    if pairs:
        sys.exit(f"quality.py: the LoRA changes {', '.join(pairs)}, which stay in 16 bit. Add them to rounded_model")
    return patcher


def rounded_forward(linear, places, method, pair):
    bias, products = linear.bias.float(), []
    for place in places:
        weight = linear.weight[place.row:place.row + place.n, place.col:place.col + place.k].float()
        case = quantizer_table.Case(weight, None, None, place.slot.unsigned("int4"))
        products.append((place, quantizer_table.METHODS[method](case, "int4", None)))

    def forward(x):
        flat = x.flatten(0, -2)
        out = bias.repeat(len(flat), 1)
        for place, product in products:
            out[:, place.row:place.row + place.n] += product(flat[:, place.col:place.col + place.k].float())
        out = out.to(x.dtype)
        if pair is not None:
            matmul_branch(flat, *pair, out)
        return out.view(*x.shape[:-1], -1)

    return forward


@contextmanager
def activations_rounded(act8="e4m3"):
    """Layers run as `using("reference")` runs them but for the order of sums, with weights unpacked once: 64 groups of an
    NVFP4 layer are one product instead of 64. act8: what act_bits 8 is, a precision of reference.quant_down."""
    unpacked = {}

    def once(weight, make):
        """Its bytes say which weight it is, and live as long as what is kept of them."""
        if weight.qweight.data_ptr() not in unpacked:
            unpacked[weight.qweight.data_ptr()] = weight, make()
        return unpacked[weight.qweight.data_ptr()][1]

    def logical(weight):
        layer = weight.logical()
        return layer, reference.dequantize_weight(layer.codes, layer.wscales, layer.precision, layer.wcscales,
                                                  layer.wtscale).t()

    def w4a4(x, weight, out, bias, accumulate, epilogue, act=None):
        layer, dense = once(weight, partial(logical, weight))
        act = act or layer.precision
        half = x.to(BF16) if x.dtype == torch.float32 and not act.startswith("int8") else x     # as check.wanted
        qact, ascales, low = reference.quant_down(half, layer.smooth, layer.proj_down, precision=act,
                                                  unsigned=layer.unsigned)
        y = torch.addmm(low @ layer.proj_up.float().t(), reference.dequantize_act(qact, ascales, act), dense)
        put(y, out, bias, accumulate)

    def awq(x, weight, out, bias, accumulate, epilogue):
        put(x.float() @ once(weight, partial(weight.dense, torch.float32)).t(), out, bias, accumulate)

    def put(y, out, bias, accumulate):
        y = (y if bias is None else y + bias.float()).to(out.dtype)
        out.add_(y) if accumulate else out.copy_(y)

    def variant(product, precisions, activations):
        return Variant("unpacked", "the reference, unpacked once", lambda x, weight: x, product, precisions, activations,
                       on_request=True)

    before = registry.VARIANTS
    registry.VARIANTS += (variant(w4a4, ("int4",), "int4"), variant(w4a4, ("nvfp4",), "nvfp4"),
                          variant(partial(w4a4, act=act8), ("int4", "nvfp4"), act8), variant(awq, ("awq",), None))
    try:
        with registry.using("unpacked"):
            yield
    finally:
        registry.VARIANTS = before


@dataclass(frozen=True)
class Row:
    title: str
    make: object
    mode: object = nullcontext
    first_seed: int = 0


ROWS = {"16-bit": Row("16-bit", float_model),
        "16-bit-reseeded": Row("16-bit, another seed", float_model, first_seed=RESEED),
        "fp8": Row("FP8 weights", partial(float_model, dtype=torch.float8_e4m3fn)),
        "rtn": Row("RTN W4A4", partial(rounded_model, method="RTN")),
        "rotation": Row("rotation W4A4", partial(rounded_model, method="rotation")),
        "int4-r16": Row("SVDQ INT4, rank 16", partial(svdq_model, rank=16), activations_rounded),
        "int4-r32": Row("SVDQ INT4, rank 32", svdq_model, activations_rounded),
        "int4-r64": Row("SVDQ INT4, rank 64", partial(svdq_model, rank=64), activations_rounded),
        "int4-r32-data-free": Row("SVDQ INT4, rank 32, data-free", partial(svdq_model, calibrated=False),
                                  activations_rounded),
        "nvfp4-r32": Row("SVDQ NVFP4, rank 32", partial(svdq_model, precision="nvfp4"), activations_rounded),
        "int4-r32-a8": Row("SVDQ INT4, rank 32, 8-bit activations", partial(svdq_model, act_bits=8), activations_rounded),
        "int4-r32-weight-only": Row("SVDQ INT4, rank 32, weight-only", partial(svdq_model, act_bits=16))}
REFERENCE = "16-bit"


# ---- pictures

# latents fp32 [N, 16, h, w], as the decoder takes them    pictures fp32 [N, H, W, 3] in 0..1    readings: see read
Run = namedtuple("Run", "latents pictures readings seconds")


def run(row, files, lora, prompts, decoder, judge):
    """One row: Run of all prompts."""
    latents, patcher = [], row.make(files, lora)
    patcher.set_model_compute_dtype(BF16)       # as on a GPU; ComfyUI takes fp32 on CPUs
    start = time.perf_counter()
    with row.mode():
        for first in range(0, len(prompts), BATCH):
            part = prompts[first:first + BATCH]
            noise = torch.stack([torch.randn(16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(
                row.first_seed + first + i)) for i in range(len(part))])
            latents.append(sampled(patcher, noise, *map(torch.cat, zip(*(encode(scene.caption) for scene in part)))))
    seconds = time.perf_counter() - start
    comfy.model_management.unload_all_models()
    latents = torch.cat(latents)
    pictures = decoded(decoder, latents)
    return Run(latents, pictures.movedim(1, -1), read(judge, pictures, prompts), seconds)


def sampled(patcher, noise, context, pooled):
    """What KSampler does: Euler, 'simple', guidance against nothing."""
    positive, negative = [[context, {"pooled_output": pooled}]], [[context * 0, {"pooled_output": pooled * 0}]]
    latents = comfy.sample.sample(patcher, noise, STEPS, GUIDANCE, "euler", "simple", positive, negative,
                                  torch.zeros_like(noise), disable_pbar=True, seed=0)
    return patcher.model.process_latent_in(latents)


def decoded(decoder, latents):
    return torch.cat([decoder(part) for part in latents.split(BATCH)]).clamp(0, 1)


def drawings(prompts, seed):
    random = np.random.default_rng(seed)
    return torch.stack([torch.from_numpy(scenes.draw(scene, random, SIZE)).movedim(-1, 0) for scene in prompts])


def any_scenes(count, seed):
    random = np.random.default_rng(seed)
    return [scenes.any_scene(random) for _ in range(count)]


# ---- metrics

def read(judge, pictures, prompts):
    """What the judge makes of pictures [N, 3, H, W]: bool [N] each, shares are their means.

    words      of every word group of every caption, one after the other: whether it was read off the picture
    prompts    whether all of a caption was
    stickers   whether the things are stickers, which no word says
    """
    said = {name: logits.argmax(1) for name, logits in judge(pictures).items()}
    asked = {name: torch.tensor([scenes.labels(scene)[name] for scene in prompts]) for name in said if name != "sticker"}
    right = torch.stack([said[name] == wanted for name, wanted in asked.items()])
    open_ = torch.stack(list(asked.values())) == -100
    return {"words": right[~open_], "prompts": (right | open_).all(0), "stickers": said["sticker"] == 1}


def table(runs):
    """runs {row name: Run} -> a markdown table; PSNR and SSIM are means over prompts, ± their standard error."""
    lines = ["| | latent PSNR, dB | image PSNR, dB | SSIM | words right | prompts right | stickers | s |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    against = runs[REFERENCE]
    for name, made in runs.items():
        close = ["-"] * 3
        if name != REFERENCE:
            close = [as_text(compare.latent_psnr(against.latents, made.latents), 2),
                     as_text(compare.psnr(against.pictures, made.pictures), 2),
                     as_text(compare.ssim(against.pictures, made.pictures), 4)]
        shares = [share(made.readings[kind]) for kind in ("words", "prompts", "stickers")]
        lines.append(" | ".join([f"| {ROWS[name].title}", *close, *shares, f"{made.seconds:.0f} |"]))
    return "\n".join(lines)


def as_text(values, decimals):
    spread = f" ± {values.std() / math.sqrt(len(values)):.{decimals}f}" if len(values) > 1 else ""
    return f"{values.mean():.{decimals}f}{spread}"


def share(right):
    return f"{100 * right.float().mean():.1f} %"


def judged(judge, autoencoder):
    """How far the judge can be trusted, as text."""
    prompts = [scenes.as_sticker(scene) if i % 2 else scene for i, scene in enumerate(any_scenes(DRAWINGS, DRAWING_SEED))]
    drawn = drawings(prompts, DRAWING_SEED)
    coded = torch.cat([autoencoder.taesd_encoder(part) for part in drawn.split(BATCH)])
    stickers = torch.tensor([scene.sticker for scene in prompts])
    lines = []
    again = decoded(autoencoder.taesd_decoder, coded)
    for what, pictures in (("drawings", drawn), ("the same, encoded and decoded", again)):
        readings = read(judge, pictures, prompts)
        lines.append(f"{what}: words {share(readings['words'])}, prompts {share(readings['prompts'])}, sticker or not "
                     f"{share(readings['stickers'] == stickers)}")
    return f"The judge on {DRAWINGS} new {'; '.join(lines)}"


# ---- sheets

def sheet(path, runs, prompts, side=108, label=132, top=64, gap=3):
    """A row per method, a column per prompt, as a JPEG of at most SHEET_BYTES."""
    count = min(SHOWN, len(prompts))
    canvas = Image.new("RGB", (label + count * (side + gap), top + len(runs) * (side + gap)), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(13), ImageFont.load_default(10)
    for column, scene in enumerate(prompts[:count]):
        x = label + column * (side + gap)
        draw.multiline_text((x, 3), wrapped(scene.caption, small, side), "black", small, spacing=1)
    for i, (name, made) in enumerate(runs.items()):
        y = top + i * (side + gap)
        draw.multiline_text((4, y + 4), wrapped(ROWS[name].title, font, label - 10), "black", font)
        for column in range(count):
            picture = Image.fromarray((made.pictures[column] * 255).round().byte().numpy())
            canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (label + column * (side + gap), y))
    for quality in (92, 88, 84, 78, 70, 60):
        canvas.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= SHEET_BYTES:
            break


def wrapped(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


# ---- the command

@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".environment" / "training", metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=64, help="how many; default: %(default)s")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), metavar="NAME,NAME",
                        help=f"some of {', '.join(ROWS)}; default: all")
    parser.add_argument("--publish", action="store_true", help="the sheets also into docs/pictures")
    options = parser.parse_args()
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown or options.prompts < 1:
        parser.error(f"there are no rows {', '.join(unknown)}" if unknown else "--prompts needs 1 or more")
    chosen = [name for name in ROWS if name == REFERENCE or name in options.rows]
    files = Files(options.folder)
    autoencoder = files.trained("autoencoder", Autoencoder())
    judge = files.trained("judge", Judge({name: len(values) for name, values in scenes.LABELS.items()}))
    prompts = any_scenes(options.prompts, PROMPT_SEED)
    for title, lora, name in (("Without LoRA", None, "quality.jpg"),
                              ("With the sticker LoRA", files.lora, "quality-lora.jpg")):
        runs = {}
        for row in chosen:
            runs[row] = run(ROWS[row], files, lora, prompts, autoencoder.taesd_decoder, judge)
            print(f"{title}, {row}: {runs[row].seconds:.0f} s", file=sys.stderr)
        print(f"\n{title}\n\n{table(runs)}", flush=True)
        sheet(options.folder / name, runs, prompts)
        if options.publish:
            shutil.copy(options.folder / name, PICTURES / name)
    print(f"\n{judged(judge, autoencoder)}\n{len(prompts)} prompts, {STEPS} steps, guidance {GUIDANCE}, {SIZE} x {SIZE}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
