"""The demo picture by both hosts: the same model, prompt, noise and steps through ComfyUI's sampler and through diffusers'.

Each host needs a Python of its own; they meet in files.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PARENT = f"""
import sys, types
sys.modules["svdq_pack"] = types.ModuleType("svdq_pack")
sys.modules["svdq_pack"].__path__ = [{str(ROOT)!r}]
"""
DEMO = str(ROOT / "workflows" / "models" / "diffusion_models" / "svdq-int4_r16-demo.safetensors")
PROMPT, STEPS, CFG = "a green moon above a blue ring on a checkered orange background", 20, 3.0

COMFYUI = f"""
{PARENT}
import torch
from svdq_pack.tests.comfy.inprocess import support
import comfy.sample, comfy.samplers
from safetensors.torch import load_file, save_file
from svdq_pack.svdq.demo import encode
noise, lora, out = load_file(sys.argv[1])["noise"], sys.argv[2], sys.argv[3]
model = support.load_model({DEMO!r}, torch.float32)
if lora:
    model = support.with_lora(model, load_file(lora), 1.0)
positive, negative = ([[cond, {{"pooled_output": pooled}}]] for cond, pooled in (encode({PROMPT!r}), encode("")))
found = comfy.sample.sample_custom(
    model, noise, {CFG}, comfy.samplers.sampler_object("euler"), torch.linspace(1, 0, {STEPS} + 1), positive, negative,
    torch.zeros_like(noise), disable_pbar=True)
save_file({{"latent": model.model.process_latent_in(found).float().contiguous()}}, out)
"""

DIFFUSERS = f"""
import sys
sys.path.insert(0, {str(ROOT / "workflows")!r})
import torch
from diffusers import FluxPipeline
from headless.painter import Painter
from safetensors.torch import load_file, save_file
noise, lora, out = load_file(sys.argv[1])["noise"], sys.argv[2], sys.argv[3]
painter = Painter(lora=lora or None, device="cpu")
latents = FluxPipeline._pack_latents(noise, *noise.shape)
with torch.no_grad():
    found = painter.paint({PROMPT!r}, steps={STEPS}, true_cfg_scale={CFG}, latents=latents, output_type="latent")
    latent = FluxPipeline._unpack_latents(found[None], 160, 160, 8)
    theirs = load_file(sys.argv[4])["latent"]
    pictures = [painter.pipeline.vae.decode(one).sample[0].clamp(-1, 1) / 2 + 0.5 for one in (latent, theirs)]
save_file({{"latent": latent.contiguous(), "picture": pictures[0].contiguous(), "theirs": pictures[1].contiguous()}}, out)
"""


@pytest.mark.parametrize("lora", ["", str(ROOT / "workflows/models/loras/svdq-demo-sticker.safetensors")], ids=["", "lora"])
def test_the_same_picture(lora, tmp_path, record_property):
    if not os.environ.get("SVDQ_HF_PYTHON") or not os.environ.get("COMFYUI_DIR"):
        pytest.skip("SVDQ_HF_PYTHON or COMFYUI_DIR is not set; tests/run.py sets them")
    noise, comfyui, diffusers = (str(tmp_path / f"{name}.safetensors") for name in ("noise", "comfyui", "diffusers"))
    save_file({"noise": torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(0))}, noise)
    for python, script, arguments in ((sys.executable, COMFYUI, [noise, lora, comfyui]),
                                      (os.environ["SVDQ_HF_PYTHON"], DIFFUSERS, [noise, lora, diffusers, comfyui])):
        done = subprocess.run([python, "-c", script, *arguments], capture_output=True, text=True, timeout=600, cwd=tmp_path,
                              env={**os.environ, "SVDQ_COMFYUI": os.environ["COMFYUI_DIR"], "PYTHONPATH": "",
                                   "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-4000:]
    theirs, ours = load_file(comfyui)["latent"], load_file(diffusers)
    error = ((ours["latent"].double() - theirs.double()).norm() / theirs.double().norm()).item()
    worst = (ours["picture"] - ours["theirs"]).abs().max().item() * 255
    record_property("relative L2 of the latents", error)
    record_property("largest difference of a pixel, of 255", worst)
    assert theirs.std() > 0.3 and ours["picture"].std() > 0.1
    assert error <= 2e-5 and worst <= 0.1
