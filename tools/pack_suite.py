#!/usr/bin/env python3
"""Nodes of public packs beside this one: what each does to the demo model, and to the same model dequantised and loaded by
ComfyUI itself.

    python3 tools/pack_suite.py PACKS_FOLDER [--pack NAME]

PACKS_FOLDER holds checkouts under the names of their repositories, fetched by hand; those that are not there are left out.
They and ComfyUI are copied to a temporary folder, so what a pack writes beside itself is gone afterwards. Packages that packs
need and the environment lacks go into a folder on PYTHONPATH. Another ComfyUI: SVDQ_COMFYUI=TREE PYTHON tools/pack_suite.py.

Each pack runs in a process of its own, on the CPU in fp32 with activations not rounded; a process that ends costs one row. A
row samples six steps, the same noise every time, without the node and with it: on the stock model, on ours, and on ours with
blocks that fuse as they do on a GPU that has such kernels. Columns, relative L2 the first four:

  stock, ours   effect of the node on either
  difference    of ours from the stock model, both with the node
  when fused    the same with fused blocks
  fused         how many of the calls of our blocks fused, with the node; - where the node brings its own blocks
  verdict       same: no more than 20 times the difference without the node, and there is an effect. A LoRA's factors are
                rounded to bf16 by us: 2e-3 of the effect more where the node loads one

Prints Markdown; the exit code is 1 when a row differs, or failed on ours only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL, LORA = "svdq-int4_r16-demo.safetensors", "svdq-demo-sticker.safetensors"
PROMPT = "a red star left of a blue ring on a yellow background"
OTHER = "a green moon above a pink heart on a black background"
STEPS, SEED = 6, 1
TIMES, LEAST = 20, 1e-5         # a row may differ TIMES as much as without the node; an effect below LEAST is none
WRONG = ("differs", "error on ours only", "the process ended")
HEAD = ("pack", "commit", "node", "stock", "ours", "difference", "when fused", "fused", "verdict")


# ---- the packs. A use changes the `Sampling` it is given; what a node's inputs leave out has its default

def patch(name, **inputs):
    """A node that takes a MODEL and gives one."""
    def use(at):
        at.model = at.call(name, model=at.model, **inputs)[0]
    return use


def sampler(name, **inputs):
    def use(at):
        at.sampler = at.call(name, **inputs)[0]
    return use


def around_sampler(name, **inputs):
    def use(at):
        at.sampler = at.call(name, sampler=at.sampler, **inputs)[0]
    return use


def chain(*uses, **changes):
    def use(at):
        vars(at).update(changes)
        for one in uses:
            one(at)
    return use


def block_loras(at):
    """Half of the LoRA on two of the four single blocks, none on the double one."""
    blocks = at.call("FluxBlockLoraSelect", **{"single_blocks.0.": 0.5, "single_blocks.2.": 1.0})[0]
    patch("DiTBlockLoraLoader", strength_model=1.0, lora_name=LORA, blocks=blocks)(at)


def scheduled_guidance(at):
    at.guider = at.call("ScheduledCFGGuidance", model=at.model, positive=at.positive, negative=at.negative, cfg=3.0)[0]


def scheduled_loras(at):
    model, _, hooks = at.call("PCLazyLoraLoaderAdvanced", model=at.model, text=at.text)
    at.model = model
    if hooks is not None:
        import comfy.hooks
        at.positive = comfy.hooks.set_hooks_for_conditioning(at.positive, hooks)


def conditional_patches(at):
    rescaled = at.call("RescaleCFG", model=at.model, multiplier=0.7)[0]
    at.model = at.call("BlehModelPatchConditional", model_default=at.model, model_matched=rescaled, start_percent=0.3)[0]


def refiner(at):
    with_lora = at.call("LoraLoaderModelOnly", model=at.model, lora_name=LORA, strength_model=1.0)[0]
    at.model = at.call("BlehRefinerAfter", model=at.model, refiner_model=with_lora, time_mode="percent", start_time=0.4)[0]


def here(use):
    """Tensors that a node wants on CUDA stay on the CPU."""
    def on_cpu(at):
        from torch import Tensor
        from torch.overrides import TorchFunctionMode

        class Here(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                kwargs = {name: value for name, value in (kwargs or {}).items()
                          if name != "device" or not str(value).startswith("cuda")}
                return args[0] if function is Tensor.cuda else function(*args, **kwargs)

        with Here():
            use(at)
    return on_cpu


@here
def regional_attention(at):
    """It replaces ComfyUI's attention for the whole process. Its mask is for 24 heads on CUDA: here for two, in fp32."""
    import comfy.ldm.flux.layers as layers
    region = at.call("FluxRegionBBOX", condition=at.other)[0]
    at.model, at.positive = at.call("RegionAttention", model=at.model, condition=at.positive,
                                    samples={"samples": at.latent}, region1=region)
    keywords = layers.attention.keywords
    if keywords["attn_mask"] is not None:
        keywords["attn_mask"] = keywords["attn_mask"][:, :2].float()


def long(at):
    """The 256 tokens of FLUX.1-schnell, for a node that takes no other number."""
    at.positive, at.negative = at.long(at.positive), at.long(at.negative)


def inversion(at):
    """From a latent to noise."""
    from svdq_pack.tests.comfy.inprocess.support import noise
    patch("InFluxModelSamplingPred", width=160, height=160)(at)
    at.sigmas = at.call("FlipSigmas", sigmas=at.steps())[0]         # the pack's own takes no tensor of today's torch
    at.latent = noise(1, 16, 20, 20, seed=2)
    sampler("FluxForwardODESampler")(at)


def reverse_ode(at):
    from svdq_pack.tests.comfy.inprocess.support import noise
    latent = {"samples": noise(1, 16, 20, 20, seed=2)}
    patch("OutFluxModelSamplingPred", width=160, height=160, reverse_ode=True)(at)
    sampler("FluxReverseODESampler", model=at.model, latent_image=latent, end_step=3)(at)
    at.latent = at.noise


def negated_tokens(at):
    """What its text encoder gives: each token twice, the second one negated where it counts against the prompt."""
    from unittest.mock import MagicMock

    import torch
    at.model = at.call("CLIPNegPip", model=at.model, clip=MagicMock())[0]
    cond, options = at.positive[0]
    signs = torch.ones(cond.shape[1], 1)
    signs[1:3] = -1
    at.positive = [[torch.stack((cond, signs * cond), dim=2).flatten(1, 2), options]]


def regional_conds(at):
    import torch
    mask = torch.zeros(1, 10, 10)
    mask[..., :5] = 1
    region = at.call("CreateRegionalCond", cond=at.long(at.other), mask=mask)[0]
    chain(long, patch("ConfigureModifiedFlux"),
          patch("ApplyRegionalConds", region_conds=region, latent={"samples": at.latent}, end_percent=1.0,
                attn_override={"double": [0], "single": [1, 3]}))(at)


LOADED = "(nothing but loading it)"             # what a pack replaces when it is imported
LORA_ROW = {"on": True, "lora": LORA, "strength": 0.8}
PACKS = {
    "Comfy-WaveSpeed": {
        "ApplyFBCacheOnModel": patch("ApplyFBCacheOnModel", residual_diff_threshold=0.6),
    },
    "ComfyUI-Detail-Daemon": {
        "DetailDaemonSamplerNode": around_sampler("DetailDaemonSamplerNode", detail_amount=0.5),
        "LyingSigmaSampler": around_sampler("LyingSigmaSampler", dishonesty_factor=-0.2),
    },
    "ComfyUI-FluxRegionAttention": {
        "RegionAttention": regional_attention,
    },
    "ComfyUI-Fluxtapoz": {
        "ConfigureModifiedFlux": patch("ConfigureModifiedFlux"),
        "PAGAttention": chain(patch("ConfigureModifiedFlux"), patch("PAGAttention")),
        "SEGAttention": chain(long, patch("ConfigureModifiedFlux"), patch("SEGAttention")),
        "ApplyRegionalConds": regional_conds,
        "InFluxModelSamplingPred, FluxForwardODESampler": inversion,
        "OutFluxModelSamplingPred, FluxReverseODESampler": reverse_ode,
    },
    "ComfyUI-GGUF": {},
    "ComfyUI-KJNodes": {
        "DiTBlockLoraLoader, FluxBlockLoraSelect": block_loras,
        "CFGZeroStarAndInit": chain(patch("CFGZeroStarAndInit"), cfg=3.0),
        "ScheduledCFGGuidance": scheduled_guidance,
        "ModelPatchTorchSettings": patch("ModelPatchTorchSettings"),
        "CheckpointPerturbWeights": patch("CheckpointPerturbWeights"),
    },
    "ComfyUI-TeaCache": {
        "TeaCache": patch("TeaCache", model_type="flux", rel_l1_thresh=2.0, cache_device="cpu"),
    },
    "ComfyUI-bleh": {
        "BlehModelPatchConditional": chain(conditional_patches, cfg=3.0),
        "BlehRefinerAfter": refiner,
        "BlehContrastiveOrthoCFG": chain(patch("BlehContrastiveOrthoCFG"), cfg=3.0),
        "BlehCFGInitSampler": around_sampler("BlehCFGInitSampler"),
    },
    "ComfyUI-ppm": {
        "CLIPNegPip": negated_tokens,
        "ModelAttentionSelector": patch("ModelAttentionSelector"),
        "Guidance Limiter": chain(patch("Guidance Limiter", sigma_end=0.5), cfg=3.0),
    },
    "ComfyUI_Patches_ll": {
        "ApplyTeaCachePatch": chain(patch("FluxForwardOverrider"), patch("ApplyTeaCachePatch", rel_l1_thresh=2.0)),
        "ApplyFirstBlockCachePatch": chain(patch("FluxForwardOverrider"),
                                           patch("ApplyFirstBlockCachePatch", residual_diff_threshold=0.6)),
        "FluxForwardOverrider": patch("FluxForwardOverrider"),
    },
    "RES4LYF": {
        "ReFluxPatcher": here(patch("ReFluxPatcher")),
        "ClownSampler_Beta": sampler("ClownSampler_Beta", seed=SEED),
        "ReFluxPatcher, ClownSampler_Beta": chain(here(patch("ReFluxPatcher")), sampler("ClownSampler_Beta", seed=SEED)),
        "ModelSamplingAdvanced": patch("ModelSamplingAdvanced"),
        "FluxOrthoCFGPatcher": chain(patch("FluxOrthoCFGPatcher"), cfg=3.0),
    },
    "comfyui-prompt-control": {
        "PCLazyLoraLoaderAdvanced": chain(scheduled_loras, text=f"<lora:{LORA.removesuffix('.safetensors')}:0.8>"),
        "PCLazyLoraLoaderAdvanced, scheduled": chain(
            scheduled_loras, text=f"[<lora:{LORA.removesuffix('.safetensors')}:0.8>::0.5]"),
    },
    "rgthree-comfy": {
        "Power Lora Loader": patch("Power Lora Loader (rgthree)", lora_1=LORA_ROW),
        "Lora Loader Stack": patch("Lora Loader Stack (rgthree)", clip=None, lora_01=LORA, strength_01=0.8),
    },
    "sd-perturbed-attention": {
        "SlidingWindowGuidanceAdvanced": patch("SlidingWindowGuidanceAdvanced", scale=2.0, tile_width=96, tile_height=96,
                                               tile_overlap=32, sigma_end=-1.0),
        "MomentumGuidance": chain(patch("MomentumGuidance"), cfg=3.0),
        "FrequencyDecoupledGuidance": chain(patch("FrequencyDecoupledGuidance"), cfg=3.0),
    },
}
SILENT = {LOADED, "ConfigureModifiedFlux", "ModelPatchTorchSettings", "FluxForwardOverrider", "ReFluxPatcher",
          "ModelAttentionSelector"}             # no effect is meant
LORAS = {"DiTBlockLoraLoader, FluxBlockLoraSelect", "BlehRefinerAfter", "PCLazyLoraLoaderAdvanced", "Power Lora Loader",
         "PCLazyLoraLoaderAdvanced, scheduled", "Lora Loader Stack"}
# What a pack imports, no ComfyUI of the tests has and its FLUX does not use: put there after it has failed to import
ABSENT = {"ComfyUI-TeaCache": ("comfy.ldm.lightricks.model", "precompute_freqs_cis")}


# ---- outside

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, metavar="PACKS_FOLDER")
    parser.add_argument("--pack", metavar="NAME", help="one of them alone")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)        # a pack, and its first row
    options = parser.parse_args()
    if options.inside:
        return inside(options.inside[0], int(options.inside[1]))
    if options.pack and options.pack not in PACKS:
        parser.error(f"--pack is one of {', '.join(PACKS)}")
    sys.path.insert(0, str(ROOT / "workflows"))
    from headless import environment
    environment.enter(__file__)
    folder = options.packs.resolve()
    names = [name for name in PACKS if (folder / name).is_dir() and options.pack in (None, name)]
    if not names:
        parser.error(f"{options.packs} has none of {options.pack or ', '.join(PACKS)}")
    print("| " + " | ".join(HEAD) + " |\n" + "| --- " * len(HEAD) + "|", flush=True)
    wrong = False
    for name in names:
        for found in rows(name, folder / name):
            print("| " + " | ".join([name, commit(folder / name), *found]) + " |", flush=True)
            wrong |= found[-1].startswith(WRONG)
    return int(wrong)


def commit(pack):
    done = subprocess.run(["git", "-C", str(pack), "log", "-1", "--format=%h, %cs"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() or "-"


def rows(name, pack):
    """The columns of each row of a pack, from `node` on."""
    nodes, first = [LOADED, *PACKS[name]], 0
    while first < len(nodes):
        with tempfile.TemporaryDirectory(prefix="svdq-packs-") as folder:
            comfy = Path(folder) / "ComfyUI"
            shutil.copytree(os.environ["SVDQ_COMFYUI"], comfy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            shutil.copytree(pack, comfy / "custom_nodes" / name, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            command = [sys.executable, str(Path(__file__).resolve()), ".", "--inside", name, str(first)]
            env = os.environ | {"SVDQ_COMFYUI": str(comfy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                                "PYTHONDONTWRITEBYTECODE": "1"}
            with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=env) as process:
                for line in process.stdout:
                    row = json.loads(line)
                    if row is None:
                        return
                    first += 1
                    yield row
        yield [nodes[first], *["-"] * 5, f"the process ended with code {process.returncode}"]   # below 0: a signal
        first += 1


# ---- inside: a process with ComfyUI and one pack

def inside(name, first):
    """A line of JSON for each row, and null when all is said."""
    pack = types.ModuleType("svdq_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["svdq_pack"] = pack
    sys.argv = sys.argv[:1]
    sys.path.pop(0)                                 # this folder
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                   # what packs print

    def answer(row):
        print(json.dumps(row), file=answers, flush=True)

    from svdq_pack.tests.comfy.inprocess import support  # noqa: F401   ComfyUI, on the CPU
    suite = Suite()
    without = suite.measure(lambda at: None)
    reason = suite.load(name)
    if reason and first == 0:
        answer([LOADED, *["-"] * 5, f"does not import: {reason}"])
        first = 1
    if not reason or name in ABSENT and not suite.load(name, *ABSENT[name]):
        uses = {LOADED: lambda at: None} | PACKS[name]
        for node in list(uses)[first:]:
            answer([node, *suite.row(node, uses[node], without)])
    answer(None)


class Suite:
    """The two models, and the nodes of ComfyUI, of this pack and of another one."""

    def __init__(self):
        import asyncio

        import folder_paths
        import server
        import torch

        import nodes
        import svdq_pack.nodes
        from svdq_pack.nodes import demo
        from svdq_pack.svdq import checkpoint

        self.nodes, self.torch = nodes, torch
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        server.PromptServer(self.loop)
        self.loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        nodes.NODE_CLASS_MAPPINGS.update(svdq_pack.nodes.NODE_CLASS_MAPPINGS)
        folder_paths.add_model_folder_path("loras", str(demo.MODELS / "loras"))     # of other packs' loaders
        self.path, self.dense = demo.MODELS / "diffusion_models" / MODEL, Path.cwd() / "dense.safetensors"
        if not self.dense.exists():
            checkpoint.dequantize(self.path, self.dense, torch.float32)

    def load(self, name, module=None, absent=None):
        """The pack by ComfyUI's own loader; returns why it could not, or None. absent: what to put into a module before."""
        import importlib
        import logging
        if module:
            setattr(importlib.import_module(module), absent, None)
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        folder = Path(os.environ["SVDQ_COMFYUI"]) / "custom_nodes" / name
        loaded = self.loop.run_until_complete(self.nodes.load_custom_node(str(folder)))
        logging.getLogger().removeHandler(handler)
        reasons = [line.partition(" module for custom nodes: ")[2] for line in said if line.startswith("Cannot import ")]
        return None if loaded else short((reasons or ["no nodes"])[-1])

    def measure(self, use):
        """{model: (latent, share of fused blocks), or the error}"""
        return {model: self.sample(model, use) for model in ("stock", "ours", "fused")}

    def sample(self, model, use):
        import comfy.model_management
        with self.torch.inference_mode(), Fusing(model == "fused") as fusing:
            try:
                at = Sampling(self, model)
                use(at)
                latent = at.sample()
                if not latent.isfinite().all():
                    raise ArithmeticError("the latent is not finite")
                return latent, fusing.share()
            except Exception as error:
                traceback.print_exc()
                return error
            finally:
                comfy.model_management.unload_all_models()

    def row(self, node, use, without):
        """effect on stock, on ours, difference, the same fused, share of fused blocks, verdict"""
        from svdq_pack.tests.comfy.inprocess.support import ROUNDED, distance
        found = self.measure(use)
        failed = {model: error for model, error in found.items() if isinstance(error, Exception)}
        cells, differs = dict.fromkeys(("stock", "ours", "difference", "fused"), "-"), []
        if "stock" not in failed:
            effect = distance(found["stock"][0], without["stock"][0])
            cells["stock"] = figure(effect)
            for model, name in (("ours", "difference"), ("fused", "fused")):
                if model not in failed:
                    allowed = TIMES * distance(without[model][0], without["stock"][0]) + ROUNDED * effect * (node in LORAS)
                    difference = distance(found[model][0], found["stock"][0])
                    cells[name] = figure(difference)
                    differs += [name] if not difference <= allowed else []
        if "ours" not in failed:
            cells["ours"] = figure(distance(found["ours"][0], without["ours"][0]))
        share = "-" if "fused" in failed else found["fused"][1]
        if "stock" in failed:
            verdict = ("error on both: " if "ours" in failed else "error on stock only: ") + message(failed["stock"])
        elif failed:
            verdict = "error on ours only: " + message(next(iter(failed.values())))
        elif differs:
            verdict = "differs"
        elif effect < LEAST:
            verdict = "same" if node in SILENT else "same, but no effect"
        else:
            verdict = "same" if node not in SILENT else "same, and an effect nobody meant"
        return *cells.values(), share, verdict


class Fusing:
    """Blocks fuse, as if the CPU's kernels had epilogues (tests/comfy/inprocess/checks_blocks.py); counts those that do."""

    def __init__(self, wanted):
        self.wanted, self.asked = wanted, []

    def __enter__(self):
        import pytest

        from svdq_pack.nodes.host import blocks
        from svdq_pack.nodes.host.layer import SVDQLinear
        self.patch, can_fuse = pytest.MonkeyPatch(), blocks._can_fuse

        def counted(*args):
            self.asked.append(can_fuse(*args))
            return self.asked[-1]

        self.patch.setattr(blocks, "_can_fuse", counted)
        self.patch.setattr(SVDQLinear, "kernels_do_epilogues", lambda layer, x: self.wanted)
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def share(self):
        return f"{100 * sum(self.asked) // len(self.asked)} %" if self.asked else "-"


class Sampling:
    """One picture about to be sampled: model, sampler, sigmas, positive, negative, cfg, guider, latent."""

    def __init__(self, suite, model):
        import comfy.samplers
        import comfy.sd
        import torch

        from svdq_pack.nodes.host.load import load_model
        from svdq_pack.tests.comfy.inprocess.support import noise
        self.suite = suite
        if model == "stock":
            self.model = comfy.sd.load_diffusion_model(str(suite.dense), model_options={"dtype": torch.float32})
        else:
            self.model = load_model(suite.path, torch.float32, 16)
        self.positive, self.other, self.negative = (self.encode(prompt) for prompt in (PROMPT, OTHER, ""))
        self.sampler, self.sigmas, self.guider, self.cfg = comfy.samplers.sampler_object("euler"), None, None, 1.0
        self.latent, self.noise = torch.zeros(1, 16, 20, 20), noise(1, 16, 20, 20)

    @staticmethod
    def encode(prompt):
        from svdq_pack.svdq.demo import encode
        cond, pooled = encode(prompt)
        return [[cond, {"pooled_output": pooled}]]

    @staticmethod
    def long(conditioning):
        import torch.nn.functional as F
        return [[F.pad(cond, (0, 0, 0, 256 - cond.shape[1])), options] for cond, options in conditioning]

    def steps(self):
        import comfy.samplers
        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", STEPS)

    def sample(self):
        import comfy.samplers
        import torch
        torch.manual_seed(SEED)
        guider = self.guider
        if guider is None:
            guider = comfy.samplers.CFGGuider(self.model)
            guider.set_conds(self.positive, self.negative)
            guider.set_cfg(self.cfg)
        sigmas = self.steps() if self.sigmas is None else self.sigmas
        return guider.sample(self.noise, self.latent, self.sampler, sigmas, disable_pbar=True, seed=SEED).clone()

    def call(self, name, **inputs):
        """A node's outputs, as ComfyUI calls it; links of a graph that it expands to are followed."""
        node = self.suite.nodes.NODE_CLASS_MAPPINGS[name]
        kinds = node.INPUT_TYPES()
        given, links = {}, {}
        for field, (kind, *options) in {**kinds.get("required", {}), **kinds.get("optional", {})}.items():
            options = options[0] if options else {}
            if field in inputs and options.get("rawLink"):
                given[field] = ["given", len(links)]
                links["given", len(links)] = inputs[field]
            elif field not in inputs and (kind == "CLIP" or "default" in options):
                given[field] = options.get("default")       # the text encoder is none of ComfyUI's
            elif field not in inputs and isinstance(kind, list) and kind:
                given[field] = kind[0]
        given = inputs | given
        if hasattr(node, "PREPARE_CLASS_CLONE"):
            run = getattr(node.PREPARE_CLASS_CLONE(None), node.FUNCTION)
        else:
            run = getattr(node(), node.FUNCTION)
        out = run(**given)
        if hasattr(out, "__await__"):
            out = self.suite.loop.run_until_complete(out)
        graph = getattr(out, "expand", None) or {}
        outputs = getattr(out, "result", out)
        outputs = outputs["result"] if isinstance(outputs, dict) else outputs

        def follow(value):
            if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)):
                return value
            if tuple(value) not in links:
                made = self.call(graph[value[0]]["class_type"], **{
                    field: follow(link) for field, link in graph[value[0]]["inputs"].items()})
                links.update({(value[0], at): one for at, one in enumerate(made)})
            return links[tuple(value)]

        return [follow(value) for value in outputs]


def figure(value):
    return f"{value:.1e}" if value else "0"


def message(error):
    return short(f"{type(error).__name__}: {error}")


def short(text):
    text = " ".join(str(text).replace(os.environ["SVDQ_COMFYUI"], "ComfyUI").replace("|", "/").split())
    return text if len(text) <= 150 else text[:147] + "..."


if __name__ == "__main__":
    sys.exit(main())
