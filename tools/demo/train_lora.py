#!/usr/bin/env python3
"""Train a LoRA on the 4-bit demo model with ComfyUI's own 'Train LoRA', and see what it does.

    python3 tools/demo/train_lora.py [FOLDER] [--updates 100] [--publish]

It is to turn things into stickers, as the bundled one does, and sees 48 drawings, one at a time: ComfyUI computes every prompt
of a batch for every picture of it. Sixteen make an update. Prints how far the model is from drawings that nobody trained on, at
five noise levels, without the LoRA and with it: on the 4-bit model, and on the 16-bit model of the same weights. ComfyUI's
loader attaches it to both. FOLDER (default: .environment/training) gets the LoRA and training.jpg, with --publish docs/pictures
too: the loss beside that of a training at rate 0, which sees the same noise, and pictures of four prompts without and with it.
"""

import argparse
import inspect
import shutil
import sys
import time
import types
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
parent = types.ModuleType("svdq_pack")          # the pack's folder name is not ours to assume, so name its package here
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
if __name__ == "__main__":                      # with any Python; what follows wants ComfyUI's
    from svdq_pack.workflows.headless import environment
    environment.enter(__file__)

import torch                                    # noqa: E402
from PIL import Image, ImageDraw, ImageFont     # noqa: E402
from safetensors.torch import save_file         # noqa: E402

from svdq_pack.tests.comfy.inprocess import support                 # noqa: E402, first: it imports ComfyUI
from svdq_pack.svdq.demo import encode                              # noqa: E402
from svdq_pack.tools.demo import quality, scenes                    # noqa: E402

import comfy.model_management                   # noqa: E402, comes from the tree that support has chosen
import comfy.sd                                 # noqa: E402
import comfy.utils                              # noqa: E402
import nodes                                    # noqa: E402
from comfy_extras import nodes_train            # noqa: E402

MODELS = ROOT / "workflows" / "models"
DRAWN, HELD_OUT, SEEDS = 48, 48, (5, 6)         # drawings to learn from and to judge by, and the seeds of their scenes
ACCUMULATED, RATE, RANK = 16, 1e-4, 8
LEVELS = 0.05, 0.2, 0.4, 0.6, 0.8               # shares of a sampling that are done
SHOWN, SHOWN_SEED = 4, 7                     # prompts of pictures, and the seed of their scenes
WINDOW = 160                                    # drawings that a point of the curve is a mean of

# latents fp32 [N, 16, h, w]    prompts: ComfyUI's conditionings, one each
Drawings = namedtuple("Drawings", "latents prompts")


def drawings(vae, count, seed):
    found = [scenes.as_sticker(scene) for scene in quality.any_scenes(count, seed)]
    pictures = quality.drawings(found, seed).movedim(1, -1)
    encoded = [encode(scene.caption) for scene in found]
    return Drawings(vae.encode(pictures), [[cond, {"pooled_output": pooled}] for cond, pooled in encoded])


def trained(patcher, data, updates, rate=RATE):
    """(LoRA, the loss of every drawing seen) of ComfyUI's node."""
    settings = {"batch_size": 1, "steps": updates, "grad_accumulation_steps": ACCUMULATED, "learning_rate": rate, "rank": RANK,
                "optimizer": "AdamW", "loss_function": "MSE", "seed": 3, "training_dtype": "fp32", "lora_dtype": "fp32",
                "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1,
                "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": True}
    wanted = inspect.signature(nodes_train.TrainLoraNode.execute).parameters
    torch.manual_seed(0)
    with torch.inference_mode(), torch.enable_grad():
        lora, losses, *_ = nodes_train.TrainLoraNode.execute(
            model=[patcher], latents=[{"samples": data.latents}], positive=[data.prompts],
            **{name: [value] for name, value in settings.items() if name in wanted}).args
    return {name: tensor.detach().contiguous() for name, tensor in lora.items()}, losses["loss"]


def errors(patcher, data):
    """Mean squared error of the picture that the model foresees, at each of LEVELS, with the same noise each time."""
    comfy.model_management.load_models_gpu([patcher])
    model, found = patcher.model, []
    context = torch.cat([cond for cond, _ in data.prompts])
    pooled = torch.cat([given["pooled_output"] for _, given in data.prompts])
    latents = model.process_latent_in(data.latents)
    for seed, level in enumerate(LEVELS):
        sigma = model.model_sampling.percent_to_sigma(level)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        foreseen = model.apply_model(sigma * noise + (1 - sigma) * latents, torch.full((len(latents),), sigma),
                                     c_crossattn=context, y=pooled)
        found.append((foreseen - latents).square().mean().item())
    return found


def painted(patcher, vae, found):
    """fp32 [N, H, W, 3] in 0..1: pictures of scenes, picture i from noise of seed i."""
    side = quality.SIZE // 8
    noise = torch.stack([torch.randn(16, side, side, generator=torch.Generator().manual_seed(i)) for i in range(len(found))])
    latents = quality.sampled(patcher, noise, *map(torch.cat, zip(*(encode(scene.caption) for scene in found))))
    return vae.decode(patcher.model.process_latent_out(latents)).clamp(0, 1)


def curve(losses, untrained):
    """What is left of the loss: means over WINDOW drawings, as shares of what the model as it was has on the same ones."""
    windows = range(0, len(losses) - WINDOW + 1, WINDOW)
    return [sum(losses[at:at + WINDOW]) / sum(untrained[at:at + WINDOW]) for at in windows]


def sheet(path, losses, untrained, rows, side=160, gap=6, label=150):
    """The curve over rows of (title, pictures), as a JPEG."""
    width, top = label + SHOWN * (side + gap), 200
    canvas = Image.new("RGB", (width, top + len(rows) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    shares = [1.0, *curve(losses, untrained)]
    left, low, high = label + 40, min(shares) - 0.05, max(shares) + 0.05

    def at(i, share):
        return left + i * (width - left - gap) / (len(shares) - 1), 10 + (high - share) / (high - low) * (top - 20)

    draw.multiline_text((4, 4), f"loss, as a share of\nthat at rate 0\n\n{len(losses)} drawings", "black", font)
    for share in (1.0, shares[-1]):
        draw.text((label, at(0, share)[1] - 8), f"{share:.2f}", "black", font)
        draw.line([at(0, share), at(len(shares) - 1, share)], "lightgray")
    draw.line([at(i, share) for i, share in enumerate(shares)], "blue", 2)
    for i, (title, pictures) in enumerate(rows):
        y = top + i * (side + gap)
        draw.multiline_text((4, y + 4), title, "black", font)
        for column, picture in enumerate(pictures):
            shown = Image.fromarray((picture * 255).round().byte().numpy())
            canvas.paste(shown.resize((side, side), Image.Resampling.LANCZOS), (label + column * (side + gap), y))
    canvas.save(path, quality=88, optimize=True)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".environment" / "training", metavar="FOLDER")
    parser.add_argument("--updates", type=int, default=100, help="of the LoRA; default: %(default)s")
    parser.add_argument("--publish", action="store_true", help="training.jpg also into docs/pictures")
    options = parser.parse_args()
    if options.updates * ACCUMULATED < 2 * WINDOW:
        parser.error(f"--updates needs {2 * WINDOW // ACCUMULATED} or more")
    options.folder.mkdir(parents=True, exist_ok=True)
    nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"] = nodes_train.TrainLoraNode          # as a server has it
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae" / "svdq-demo-vae.safetensors")))
    learnt, held_out = (drawings(vae, count, seed) for count, seed in zip((DRAWN, HELD_OUT), SEEDS))
    case = support.Case(MODELS / "diffusion_models" / "svdq-int4_r16-demo.safetensors")
    models = {"4-bit": case.load(), "16-bit": case.stock(options.folder)}
    start = time.perf_counter()
    lora, losses = trained(models["4-bit"], learnt, options.updates)
    seconds = time.perf_counter() - start
    _, untrained = trained(models["4-bit"], learnt, options.updates, rate=0.0)
    save_file(lora, options.folder / "sticker-trained.safetensors")
    found, rows = quality.any_scenes(SHOWN, SHOWN_SEED), []
    print("| error with so much of a sampling done | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |")
    print("| --- |" + " --- |" * len(LEVELS))
    for name, patcher in models.items():
        for title, changed in ((name, patcher), (f"{name}, LoRA", support.with_lora(patcher, lora, 1.0))):
            print(f"| {title} | " + " | ".join(f"{error:.4f}" for error in errors(changed, held_out)) + " |")
            rows.append((title.replace(", ", ",\n"), painted(changed, vae, found)))
    change = support.distance(rows[1][1] - rows[0][1], rows[3][1] - rows[2][1])
    print(f"\nThe change it makes in pictures, 4-bit beside 16-bit: {change:.3f} apart, where changes that have nothing in "
          f"common are 1.414. The last {WINDOW} drawings have {curve(losses, untrained)[-1]:.3f} of the loss at rate 0. "
          f"{options.updates} updates of {ACCUMULATED}, {seconds:.0f} s, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    sheet(options.folder / "training.jpg", losses, untrained, rows)
    if options.publish:
        shutil.copy(options.folder / "training.jpg", quality.PICTURES / "training.jpg")


if __name__ == "__main__":
    main()
