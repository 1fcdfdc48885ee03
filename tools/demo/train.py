#!/usr/bin/env python3
"""Train the demo model from nothing.

    python3 tools/demo/train.py [FOLDER]

One command, fixed seeds, about two and a half hours on two CPU cores. FOLDER (default: .environment/training) keeps what
each stage made; a later call goes on where an earlier one stopped. At its end stand the 16-bit model, the calibration, the
autoencoder and the judge in FOLDER, for tools/demo/quality.py, and the quantised demo with its LoRA in workflows/models.
"""

import argparse
import math
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
parent = types.ModuleType("svdq_pack")          # the pack's folder name is not ours to assume, so name its package here
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
if __name__ == "__main__":                      # with any Python; what follows wants ComfyUI's
    from svdq_pack.workflows.headless import environment
    environment.enter(__file__)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from svdq_pack.svdq.demo import CONTEXT, SLOTS, encode  # noqa: E402
from svdq_pack.svdq.kernels.variant import cpu_multiplies  # noqa: E402
from svdq_pack.svdq.quantize import quantize  # noqa: E402
from svdq_pack.svdq.quantize.calibration import Collector, Statistics, inputs  # noqa: E402
from svdq_pack.svdq.quantize.source import FileSource  # noqa: E402
from svdq_pack.tools.demo import scenes  # noqa: E402
from svdq_pack.tools.demo.models import Autoencoder, Flux, Judge  # noqa: E402

MODELS = ROOT / "workflows" / "models"
SIZE = 160                      # of the demo's pictures
STEPS = {"autoencoder": 1300, "flux": 8000, "lora": 600, "judge": 1200}
PICTURES = {"autoencoder": 3000, "flux": 30000, "lora": 6000, "judge": 12000, "calibration": 48}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def autocast():
    """bf16 where it is fast: a CPU without its instructions takes many times as long as in fp32."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE != "cpu" or cpu_multiplies(torch.bfloat16))


class Trainer:
    """Warm-up and a cosine to nothing, 16-bit activations, an average of the weights, a file to go on from.

    hidden   matrices inside the network, which Muon trains; AdamW has the rest
    """

    def __init__(self, folder, name, model, rate, average=0.998, report=100, hidden=()):
        self.path, self.steps = folder / f"{name}.pt", STEPS[name]
        self.model, self.rate, self.average, self.report = model, rate, average, report
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = set(hidden)
        rest = [p for p in self.parameters if p not in matrices]
        self.optimizers = [torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.01)]
        if hidden:
            self.optimizers.append(torch.optim.Muon(hidden, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.mean = [p.detach().clone() for p in self.parameters]
        self.step, self.losses = 0, []
        if self.path.exists():
            saved = torch.load(self.path)
            self.step, self.mean = saved["step"], [value.detach() for value in saved["mean"]]
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            for p, value in zip(self.parameters, saved["parameters"]):
                p.data.copy_(value)

    def run(self, loss_of):
        """loss_of(random): a loss, from numpy and torch generators seeded by the step. Leaves the averaged weights."""
        started, first = time.time(), self.step
        while self.step < self.steps:
            random = np.random.default_rng((self.step, self.steps))
            torch.manual_seed(self.step)
            rate = self.rate * min(1, (self.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            with autocast():
                loss = loss_of(random)
            self.model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            with torch.no_grad():
                torch._foreach_lerp_(self.mean, self.parameters, 1 - min(self.average, self.step / (self.step + 10)))
            self.losses.append(loss.item())
            if self.step % self.report == 0 or self.step == self.steps:
                print(f"  {self.path.stem} {self.step}/{self.steps} loss {np.mean(self.losses[-self.report:]):.4f}, "
                      f"{(time.time() - started) / (self.step - first):.3f} s a step", flush=True)
            if self.step % (5 * self.report) == 0:
                self.save()
        self.save()
        for p, value in zip(self.parameters, self.mean):
            p.data.copy_(value)

    def save(self):
        part = self.path.with_suffix(".part")
        torch.save({"step": self.step, "mean": self.mean, "optimizers": [each.state_dict() for each in self.optimizers],
                    "parameters": [p.data for p in self.parameters]}, part)
        part.replace(self.path)


def pictures(count, seed, stickers, size=SIZE):
    """([scene], uint8 [count, 3, size, size]); stickers: the share of scenes in the LoRA's style."""
    random = np.random.default_rng(seed)
    found, drawn = [], torch.empty(count, 3, size, size, dtype=torch.uint8)
    for i in range(count):
        scene = scenes.any_scene(random)
        found.append(scenes.as_sticker(scene) if random.random() < stickers else scene)
        drawn[i] = torch.from_numpy((scenes.draw(found[-1], random, size) * 255 + 0.5).astype(np.uint8)).permute(2, 0, 1)
    return found, drawn


def train_autoencoder(folder, batch=24, size=192, crop=96):
    torch.manual_seed(1)
    model = Autoencoder().to(DEVICE, memory_format=torch.channels_last)
    trainer = Trainer(folder, "autoencoder", model, 2e-3)
    if trainer.step < trainer.steps:
        _, drawn = pictures(PICTURES["autoencoder"], 11, 0.3, size)
    channels = (0, 2, 3)

    def loss(random):
        top, left = random.integers(0, size - crop + 1, 2)
        x = drawn[random.integers(0, len(drawn), batch), :, top:top + crop, left:left + crop].to(DEVICE).float() / 255
        latent = model.taesd_encoder(x.contiguous(memory_format=torch.channels_last)).float()
        spread = latent.std(channels).sub(1).square().mean() + latent.mean(channels).square().mean()
        y = model.taesd_decoder(latent + 0.1 * torch.randn_like(latent)).float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return (y - x).abs().mean() + 4 * (y - x).square().mean() + 0.5 * edges + 0.01 * spread

    trainer.run(loss)
    return model.eval()


def encoded(folder, name, autoencoder, count, seed, stickers):
    """(latents fp16 [count, 16, h, w], context bf16 [count, TOKENS, CONTEXT]) of new pictures, kept in a file."""
    path = folder / name
    if not path.exists():
        found, drawn = pictures(count, seed, stickers)
        latents = torch.empty(count, 16, SIZE // 8, SIZE // 8, dtype=torch.float16)
        with torch.no_grad(), autocast():
            for part in range(0, count, 64):
                x = drawn[part:part + 64].to(DEVICE, memory_format=torch.channels_last).float() / 255
                latents[part:part + 64] = autoencoder.taesd_encoder(x)
        words = torch.stack([encode(scene.caption)[0][0] for scene in found]).to(torch.bfloat16)
        torch.save((latents, words), path)
    return torch.load(path)


def flow_loss(model, latents, context, batch):
    """loss_of(random) for a Trainer: the flow from a picture to noise at a random point between, as FLUX was trained."""
    def loss(random):
        rows = torch.from_numpy(random.integers(0, len(latents), batch))
        x, text = latents[rows].to(DEVICE).float(), context[rows].to(DEVICE).float()
        text = text * (torch.rand(batch, 1, 1, device=DEVICE) > 0.1)                # for guidance: one in ten without words
        sigma = torch.sigmoid(1.2 * torch.randn(batch, device=DEVICE) + 1)     # noisy: that is where shapes are decided
        noise = torch.randn_like(x)
        at = sigma[:, None, None, None]
        flow = model(x + at * (noise - x), sigma, text, pooled(text))
        return (flow.float() - (noise - x)).square().mean()

    return loss


def pooled(context):
    """The set of words, as `encode` gives it."""
    return context[..., :SLOTS].amax(1)


def flux():
    torch.manual_seed(2)
    return Flux(hidden=256, depth=1, depth_single=4, context_dim=CONTEXT, vec_dim=SLOTS).to(DEVICE)


def train_flux(folder, autoencoder, batch=64):
    model = flux()
    hidden = [p for name, p in model.named_parameters() if "_blocks." in name and p.ndim == 2]
    trainer = Trainer(folder, "flux", model, 1e-3, hidden=hidden)
    latents, context = encoded(folder, "latents.pt", autoencoder, PICTURES["flux"], 21, stickers=0)
    trainer.run(flow_loss(model, latents, context, batch))
    return model.eval()


class Delta(torch.nn.Module):
    """up @ down added to a weight: a LoRA while it is trained."""
    def __init__(self, weight, rank):
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight):
        return weight + self.up @ self.down


def train_lora(folder, autoencoder, base, batch=64, rank=8):
    """{tensor name: value} of a LoRA that turns things into stickers, under the names ComfyUI's trainers write."""
    torch.manual_seed(3)
    model = flux()
    model.load_state_dict(base.state_dict())
    model.requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, torch.nn.Linear) and "_blocks." in name and not name.endswith("lin")}
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", Delta(layer.weight, rank).to(DEVICE))
    trainer = Trainer(folder, "lora", model, 2e-3, average=0.99)
    latents, context = encoded(folder, "stickers.pt", autoencoder, PICTURES["lora"], 31, stickers=1)
    trainer.run(flow_loss(model, latents, context, batch))
    tensors = {}
    for name, layer in layers.items():
        delta = layer.parametrizations.weight[0]
        tensors[f"diffusion_model.{name}.lora_A.weight"], tensors[f"diffusion_model.{name}.lora_B.weight"] = \
            delta.down.detach(), delta.up.detach()
    return tensors


def train_judge(folder, batch=64):
    """Reads the caption's words off a picture; scored on drawings it has not seen."""
    torch.manual_seed(4)
    judge = Judge({name: len(options) for name, options in scenes.LABELS.items()}).to(DEVICE)
    trainer = Trainer(folder, "judge", judge, 2e-3)
    found, drawn = pictures(PICTURES["judge"], 41, stickers=0.5)
    targets = {name: torch.tensor([scenes.labels(scene)[name] for scene in found]) for name in scenes.LABELS}

    def loss(random):
        rows = torch.from_numpy(random.integers(0, len(found), batch))
        x = drawn[rows].to(DEVICE).float() / 255
        logits = judge(x + 0.04 * torch.randn_like(x))
        return sum(F.cross_entropy(logits[name].float(), targets[name][rows].to(DEVICE)) for name in logits)

    trainer.run(loss)
    return judge.eval()


@torch.no_grad()
def sample(model, noise, context, steps=20, cfg=3.0):
    """Latents, as ComfyUI's euler sampler with the simple scheduler paints them; the negative prompt is zeros."""
    x, both = noise, torch.cat((context, torch.zeros_like(context)))
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, after in zip(sigmas, sigmas[1:]):
        with autocast():
            flow = model(torch.cat((x, x)), sigma.to(DEVICE).expand(len(both)), both, pooled(both)).float()
        with_words, without = flow.chunk(2)
        x = x + (after - sigma) * (without + cfg * (with_words - without))
    return x


def calibrate(model, shape):
    """Statistics of every layer's input while the model paints captions nobody else uses."""
    random, collectors, prompts = np.random.default_rng(51), {}, PICTURES["calibration"]
    hooks = []
    for layer, k in inputs(shape).items():
        collectors[layer] = Collector(k)
        hooks.append(model.get_submodule(layer).register_forward_pre_hook(
            lambda module, given, c=collectors[layer]: c.update(given[0].reshape(-1, c.k))))
    context = torch.cat([encode(scenes.any_scene(random).caption)[0] for _ in range(prompts)]).to(DEVICE)
    noise = torch.randn(prompts, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(51))
    sample(model, noise.to(DEVICE), context)
    for hook in hooks:
        hook.remove()
    return Statistics.from_collectors(shape, collectors, calls=20)


def publish(folder, autoencoder, model, lora):
    """The files that others use: in 16 bit in `folder`, quantised in workflows/models."""
    dense, calibration = folder / "demo-bf16.safetensors", folder / "calibration.safetensors"
    save_file({name: value.bfloat16().cpu() for name, value in model.state_dict().items()}, dense)
    calibrate(model, FileSource(dense).shape).save(calibration)
    for precision, name in (("int4", "svdq-int4_r16-demo"), ("nvfp4", "svdq-fp4_r16-demo")):
        target = MODELS / "diffusion_models" / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        quantize(dense, target, precision, rank=16, statistics=calibration)
    for name, tensors in (("vae/svdq-demo-vae", vae(autoencoder)), ("loras/svdq-demo-sticker", lora)):
        path = MODELS / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.to(torch.float16).cpu().contiguous() for key, value in tensors.items()}, path)
    total = sum(path.stat().st_size for path in MODELS.rglob("*.safetensors"))
    print(f"{MODELS}: {total / 1e6:.2f} MB", flush=True)


def vae(autoencoder):
    """As ComfyUI's 'Load VAE' wants it. Scale and shift undo what ComfyUI does to FLUX's latents on their way out."""
    flux1 = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}
    return autoencoder.widened() | flux1


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    print("autoencoder", flush=True)
    autoencoder = train_autoencoder(folder)
    print("transformer", flush=True)
    model = train_flux(folder, autoencoder)
    print("LoRA", flush=True)
    lora = train_lora(folder, autoencoder, model)
    print("quantised demo", flush=True)
    publish(folder, autoencoder, model, lora)
    print("judge", flush=True)
    train_judge(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".environment" / "training", metavar="FOLDER")
    main(parser.parse_args().folder)
