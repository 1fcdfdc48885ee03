"""ComfyUI inside this process, on the CPU, and what the checks need of it. Importing this imports ComfyUI."""

import dataclasses
import os
import sys

import torch
from safetensors.torch import save_file

from svdq_pack.workflows.headless import comfy_main, maker

if maker.vision_cannot_load().exists():
    operators = comfy_main.declare_operators()
sys.path.insert(0, os.environ["SVDQ_COMFYUI"])

import comfy.cli_args           # noqa: E402
import utils.extra_config       # noqa: E402, F401  as main.py does, before nodes.py makes `utils` mean comfy/utils.py

comfy.cli_args.args.cpu = True                  # before anything else of comfy looks for a device

import comfy.hooks                  # noqa: E402
import comfy.model_management       # noqa: E402
import comfy.sample                 # noqa: E402
import comfy.sd                     # noqa: E402
import comfy.sd1_clip               # noqa: E402

from svdq_pack.svdq.kernels import launch as kernel_launch       # noqa: E402
from svdq_pack.svdq.kernels import registry                      # noqa: E402
from svdq_pack.svdq.kernels.variant import Target                # noqa: E402
from svdq_pack.nodes import loras                           # noqa: E402
from svdq_pack.nodes.host.load import load_model            # noqa: E402
from svdq_pack.svdq import checkpoint                       # noqa: E402
from svdq_pack.tests.kernels.executors import Emulator      # noqa: E402


STRENGTH = 0.75                                 # that of the golden results with a LoRA
# A golden result in fp32 was made on another CPU: an exp that is an ulp off moves the angles of a timestep in the thousands,
# and with them everything by 7e-6.
GOLDEN = 2e-5
ROUNDED = 2e-3                                  # what rounding the factors of LoRAs to bf16 does to a result
# Relative L2 errors of the change an adapter makes in a layer's output.
LAYER = 4e-3            # two factors rounded to 16 bit: bf16 is off by 2^-8 at most, 1.7e-3 on average, so 2.4e-3 for two
FLOAT_LAYER = 2e-5      # fp32 holds the sum, of which the change is a tenth or less


class Case:
    """A checkpoint `path`, and `io`: the golden inputs and results, where there are any."""

    def __init__(self, path, io=None):
        self.path, self.io = path, io

    def load(self, dtype=torch.float32, act_bits=16):
        """16: golden results are of activations that nobody rounds, whatever kernels there are."""
        return load_model(self.path, dtype, act_bits)

    def stock(self, folder):
        """ComfyUI's own model of the dequantised weights, fp32."""
        path = folder / f"dense-{self.path.name}"
        if not path.exists():
            checkpoint.dequantize(self.path, path, torch.float32)
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})

    def run(self, patcher, dtype=torch.float32):
        """The network's output for the golden input, after ComfyUI loaded the model as it does before sampling."""
        comfy.model_management.load_models_gpu([patcher])
        return self.network(patcher, dtype)

    def network(self, patcher, dtype=torch.float32):
        """The same, loaded as it is."""
        names = {"x": "latent", "timestep": "timestep", "context": "txt", "y": "y", "guidance": "guidance"}
        given = {ours: self.io[f"input.{name}"] for ours, name in names.items() if f"input.{name}" in self.io}
        given = {name: value if name in ("timestep", "guidance") else value.to(dtype) for name, value in given.items()}
        return patcher.model.diffusion_model(**given)


def emulate_kernels(monkeypatch, *variants):
    """Serve models that are loaded from now on by the kernels of these variants, run by the CPU emulator, and by none that a
    CPU has. Returns a list of the names of the kernels launched, which grows."""
    emulator = Emulator()
    monkeypatch.setattr(kernel_launch, "launch", emulator.launch)
    monkeypatch.setattr(registry, "VARIANTS", tuple(
        dataclasses.replace(variant, device=None, last_resort=True) if variant.name in variants else variant
        for variant in registry.VARIANTS if variant.device != ("cpu",)))
    return emulator.launched


def pretend_gpu(monkeypatch, capability):
    """Serve models that are loaded from now on as a GPU of this compute capability would: the registry says by what, ComfyUI in
    which dtype; the CPU emulator runs its kernels. Returns a list of their names, which grows."""
    emulator, management = Emulator(), comfy.model_management
    monkeypatch.setattr(management, "should_use_fp16", lambda *given, **more: True)
    monkeypatch.setattr(management, "should_use_bf16", lambda *given, **more: capability >= (8, 0))
    monkeypatch.setattr(kernel_launch, "launch", emulator.launch)
    monkeypatch.setattr(kernel_launch, "shared_memory", lambda device: (164 if capability == (8, 0) else 100) << 10)
    monkeypatch.setattr(Target, "of", lambda device: Target("cuda", capability))
    return emulator.launched


def sample(patcher, latent=None, steps=2, hooks=None, **options):
    """What KSampler does. `options` go beside the prompt in the conditioning."""
    params = patcher.model.diffusion_model.params
    latent = noise(1, 16, 12, 10) if latent is None else latent
    prompt = [[noise(1, 7, params.context_in_dim, seed=1),
               {"pooled_output": noise(1, params.vec_in_dim, seed=2), "guidance": 3.5, **options}]]
    if hooks is not None:
        prompt = comfy.hooks.set_hooks_for_conditioning(prompt, hooks)
    return comfy.sample.sample(patcher, latent, steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(latent),
                               disable_pbar=True, seed=1)


def with_lora(patcher, tensors, strength=STRENGTH):
    """What 'Load LoRA (Model)' does."""
    return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]


def stack(model, *chosen):
    """(MODEL, report) of 'SVDQ LoRA Stack' with these (name, strength)."""
    slots = {f"{what}_{i}": value for i, pair in enumerate(chosen, 1) for what, value in zip(("lora", "strength"), pair)}
    return loras.SVDQLoraStack.execute(model, **slots).args


def hooks(lora, *keyframes):
    """A LoRA hook as 'Create Hook LoRA' makes it, with (start percent, strength) keyframes."""
    group = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for start, strength in keyframes:
        frames.add(comfy.hooks.HookKeyframe(strength, start_percent=start, guarantee_steps=1))
    group.set_keyframes_on_hooks(frames)
    return group


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(actual, expected):
    """Relative L2."""
    actual, expected = actual.double().reshape(-1), expected.double().reshape(-1)
    return ((actual - expected).norm() / expected.norm()).item()


def write_clip_l(path, random):
    """A CLIP-L file of random numbers."""
    stock = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32, return_projected_pooled=False)
    save_file({name: (torch.randn(value.shape, generator=random) * 0.05).half()
               for name, value in stock.transformer.state_dict().items()}, path)
