#!/usr/bin/env python3
"""What rounding activations changes in the pictures of the demo model that comes with the pack.

    python3 tools/demo/activations.py [--prompts 32]

The INT4 file paints captions of scenes that nobody trained on, in fp32, each from its own fixed noise: with exact activations,
which the other rows are compared with, and with rounded ones: 8 bits with a scale per token and 64 channels, as the CPU kernel
has them, by that kernel; 8 bits with a scale per token, as integers and, as on Hopper, in e4m3; 4 bits, as on RTX 30 and 40.
Prints a table of PSNR and SSIM, means over the prompts and their standard error, and seconds on this machine, where all rows
but the first two are simulated. One command, no files but the pack's.
"""

import argparse
import sys
import time
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
parent = types.ModuleType("svdq_pack")
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
if __name__ == "__main__":
    from svdq_pack.workflows.headless import environment
    environment.enter(__file__)

from svdq_pack.tools.demo import quality                # noqa: E402, first: it imports ComfyUI
import comfy.cli_args                                   # noqa: E402
import comfy.model_management                           # noqa: E402
import comfy.sd                                         # noqa: E402
import torch                                            # noqa: E402
from safetensors.torch import load_file                 # noqa: E402

from svdq_pack.nodes.host.load import load_model        # noqa: E402
from svdq_pack.svdq import compare                      # noqa: E402
from svdq_pack.svdq.demo import encode                  # noqa: E402
from svdq_pack.svdq.kernels import registry             # noqa: E402
from svdq_pack.svdq.kernels.variant import Target       # noqa: E402

MODELS = ROOT / "workflows" / "models"
SEED = 2411
KERNEL, = (variant for variant in registry.VARIANTS if variant.name == "w4a8_cpu")
comfy.cli_args.args.cpu = True
ROWS = {        # title -> (act_bits, context)
    "exact": (16, nullcontext),
    "8 bits, a scale per token and 64 channels: the CPU kernel": (8, nullcontext),
    "8 bits, a scale per token": (8, partial(quality.activations_rounded, "int8")),
    "8 bits, a scale per token, e4m3": (8, quality.activations_rounded),
    "4 bits, a scale per token and 64 channels": (4, quality.activations_rounded)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    options = parser.parse_args()
    scenes = quality.any_scenes(options.prompts, SEED)
    vae = comfy.sd.VAE(load_file(MODELS / "vae" / "svdq-demo-vae.safetensors"))
    lines = ["| | latent PSNR, dB | image PSNR, dB | SSIM | s |", "| --- | --- | --- | --- | --- |"]
    exact = None
    if not registry.trusted(KERNEL, Target("cpu")):
        sys.exit("activations.py: the CPU's kernels do not serve here; the log says why")
    with torch.inference_mode():
        for title, (act_bits, context) in ROWS.items():
            made = latents, pictures, seconds = painted(scenes, vae, act_bits, context)
            exact = exact or made
            close = ["-"] * 3 if exact is made else [
                quality.as_text(compare.latent_psnr(exact[0], latents), 2),
                quality.as_text(compare.psnr(exact[1], pictures), 2), quality.as_text(compare.ssim(exact[1], pictures), 4)]
            lines.append(f"| {title} | {' | '.join(close)} | {seconds:.0f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))


def painted(scenes, vae, act_bits, context):
    """(latents, pictures [N, H, W, 3], seconds of sampling)"""
    patcher = load_model(str(MODELS / "diffusion_models" / "svdq-int4_r16-demo.safetensors"), torch.float32, act_bits)
    latents, start = [], time.perf_counter()
    with context():
        for first in range(0, len(scenes), quality.BATCH):
            part = scenes[first:first + quality.BATCH]
            noise = torch.stack([torch.randn(16, quality.SIZE // 8, quality.SIZE // 8,
                                             generator=torch.Generator().manual_seed(first + i)) for i in range(len(part))])
            words = map(torch.cat, zip(*(encode(scene.caption) for scene in part)))
            latents.append(quality.sampled(patcher, noise, *words))
    seconds = time.perf_counter() - start
    comfy.model_management.unload_all_models()
    latents = torch.cat(latents)
    return latents, vae.decode(patcher.model.process_latent_out(latents)), seconds


if __name__ == "__main__":
    main()
