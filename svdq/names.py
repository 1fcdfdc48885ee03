"""FLUX under its several names: SVDQ checkpoints, diffusers, BFL/ComfyUI. The one file that knows other projects' names;
those of LoRAs are ComfyUI's business, and lora_keys.py tells them apart for messages.

Source: checkpoint-format 2, 3, 3.1, 4.
"""

import re
from dataclasses import dataclass

HEAD_DIM = 128
LATENT_FEATURES = 64            # one output token: 16 latent channels x 2 x 2


@dataclass(frozen=True)
class FluxShape:
    """What sets one FLUX apart from another. `in_features` counts token features: 4 x latent channels."""
    hidden: int
    depth: int
    depth_single: int
    in_features: int
    context_dim: int
    vec_dim: int
    guidance: bool

    @property
    def variant(self):
        """The published model family these sizes belong to; dev, Krea and Kontext share one architecture."""
        kind = {64: "dev, Krea or Kontext" if self.guidance else "schnell", 128: "Canny or Depth",
                384: "Fill"}.get(self.in_features, f"{self.in_features // 4} latent channels")
        full = (self.hidden, self.depth, self.depth_single) == (3072, 19, 38)
        return f"FLUX.1 {kind}" if full else f"FLUX-like ({kind})"

    @property
    def model_class(self):
        return "Flux" if self.guidance else "FluxSchnell"


@dataclass(frozen=True)
class Slot:
    """One quantised linear of a checkpoint and the rectangle it fills in a ComfyUI layer's weight."""
    module: str                 # checkpoint name
    layer: str                  # ComfyUI name
    n: int                      # output features
    k: int                      # input features
    row: int = 0                # where its outputs start in the ComfyUI layer
    col: int = 0                # where its inputs start
    kind: str = "w4a4"          # or "awq"
    after_gelu: bool = False    # INT4 files: unsigned activation codes (checkpoint-format 6.4)
    chunks: int = 0             # awq: interleaved modulation chunks (checkpoint-format 5.8)


def slots(shape):
    """Every quantised linear of a FLUX of this shape, ComfyUI layer by ComfyUI layer."""
    h = shape.hidden
    for i in range(shape.depth):
        ours, comfy = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for stream, context in (("img", ""), ("txt", "_context")):
            to = comfy + stream
            yield Slot(f"{ours}norm1{context}.linear", f"{to}_mod.lin", 6 * h, h, kind="awq", chunks=6)
            yield Slot(f"{ours}qkv_proj{context}", f"{to}_attn.qkv", 3 * h, h)
            yield Slot(f"{ours}out_proj{context}", f"{to}_attn.proj", h, h)
            yield Slot(f"{ours}mlp{context}_fc1", f"{to}_mlp.0", 4 * h, h)
            yield Slot(f"{ours}mlp{context}_fc2", f"{to}_mlp.2", h, 4 * h, after_gelu=True)
    for i in range(shape.depth_single):
        ours, comfy = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield Slot(f"{ours}norm.linear", f"{comfy}modulation.lin", 3 * h, h, kind="awq", chunks=3)
        yield Slot(f"{ours}qkv_proj", f"{comfy}linear1", 3 * h, h)
        yield Slot(f"{ours}mlp_fc1", f"{comfy}linear1", 4 * h, h, row=3 * h)
        yield Slot(f"{ours}out_proj", f"{comfy}linear2", h, h)
        yield Slot(f"{ours}mlp_fc2", f"{comfy}linear2", h, 4 * h, col=h, after_gelu=True)


def plain_modules(shape):
    """(checkpoint module, ComfyUI module, weight shape) of every linear that stays in 16 bit."""
    h, time = shape.hidden, "time_text_embed."
    yield "x_embedder", "img_in", (h, shape.in_features)
    yield "context_embedder", "txt_in", (h, shape.context_dim)
    yield time + "timestep_embedder.linear_1", "time_in.in_layer", (h, 256)
    yield time + "timestep_embedder.linear_2", "time_in.out_layer", (h, h)
    if shape.guidance:
        yield time + "guidance_embedder.linear_1", "guidance_in.in_layer", (h, 256)
        yield time + "guidance_embedder.linear_2", "guidance_in.out_layer", (h, h)
    yield time + "text_embedder.linear_1", "vector_in.in_layer", (h, shape.vec_dim)
    yield time + "text_embedder.linear_2", "vector_in.out_layer", (h, h)
    yield "norm_out.linear", "final_layer.adaLN_modulation.1", (2 * h, h)
    yield "proj_out", "final_layer.linear", (LATENT_FEATURES, h)


def norms(shape):
    """(checkpoint tensor, ComfyUI tensor) of every q/k RMSNorm scale, [128] each.

    ComfyUI's name is BFL's `.scale`: older ComfyUI knows only that one, newer ones rename it while loading.
    """
    for i in range(shape.depth):
        for stream, added in (("img", ""), ("txt", "added_")):
            for ours, bfl in (("q", "query"), ("k", "key")):
                yield (f"transformer_blocks.{i}.norm_{added}{ours}.weight",
                       f"double_blocks.{i}.{stream}_attn.norm.{bfl}_norm.scale")
    for i in range(shape.depth_single):
        for ours, bfl in (("q", "query"), ("k", "key")):
            yield f"single_transformer_blocks.{i}.norm_{ours}.weight", f"single_blocks.{i}.norm.{bfl}_norm.scale"


def diffusers_modules(shape):
    """(ComfyUI module, diffusers modules whose rows it stacks) of every quantised linear.

    Those of plain_modules have the same names in diffusers as in SVDQ files.
    """
    for i in range(shape.depth):
        theirs, comfy = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for stream, context, qkv, out, ff in (("img", "", "to_{}", "to_out.0", "ff"),
                                              ("txt", "_context", "add_{}_proj", "to_add_out", "ff_context")):
            to = comfy + stream
            yield f"{to}_mod.lin", [f"{theirs}norm1{context}.linear"]
            yield f"{to}_attn.qkv", [f"{theirs}attn.{qkv.format(part)}" for part in "qkv"]
            yield f"{to}_attn.proj", [f"{theirs}attn.{out}"]
            yield f"{to}_mlp.0", [f"{theirs}{ff}.net.0.proj"]
            yield f"{to}_mlp.2", [f"{theirs}{ff}.net.2"]
    for i in range(shape.depth_single):
        theirs, comfy = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield f"{comfy}modulation.lin", [f"{theirs}norm.linear"]
        yield f"{comfy}linear1", [*(f"{theirs}attn.to_{part}" for part in "qkv"), f"{theirs}proj_mlp"]
        yield f"{comfy}linear2", [f"{theirs}proj_out"]


# The suffixes of one W4A4 layer: file's word -> our word (style: "lora" is kept for a user's adapter).
SUFFIXES = {"qweight": "qweight", "wscales": "wscales", "wcscales": "wcscales", "wtscale": "wtscale", "bias": "bias",
            "smooth": "smooth", "smooth_orig": "smooth_orig", "lora_down": "proj_down", "lora_up": "proj_up"}

# Class V2 spells some names differently. Order matters: the first match of each group wins.
_V2 = [(re.compile(pattern), name) for pattern, name in (
    (r"\.proj_down$", ".lora_down"), (r"\.proj_up$", ".lora_up"),
    (r"\.smooth_factor$", ".smooth"), (r"\.smooth_factor_orig$", ".smooth_orig"),
    (r"\.attn\.to_qkv\.", ".qkv_proj."), (r"\.attn\.add_qkv_proj\.", ".qkv_proj_context."),
    (r"\.attn\.to_out\.0\.", ".out_proj."), (r"\.attn\.to_out\.", ".out_proj."),
    (r"\.attn\.to_add_out\.", ".out_proj_context."),
    (r"\.ff\.net\.0\.proj\.", ".mlp_fc1."), (r"\.ff\.net\.2\.", ".mlp_fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".mlp_context_fc1."), (r"\.ff_context\.net\.2\.", ".mlp_context_fc2."),
    (r"\.attn\.norm_", ".norm_"))]


def canonical(name):
    """A tensor name of any SVDQ FLUX file -> the name published files use."""
    if name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        for pattern, plain in _V2:
            name = pattern.sub(plain, name)
    return name


def is_svdq_flux(names):
    return ("transformer_blocks.0.qkv_proj.qweight" in names
            and "single_transformer_blocks.0.mlp_fc1.qweight" in names)


def identify_foreign(names, dtypes):
    """What a file that is no SVDQ FLUX checkpoint is, and what loads it; None when nobody knows.

    names   tensor names as stored        dtypes   safetensors dtype names present, e.g. {"BF16", "F8_E4M3"}
    """
    names = set(names)

    def has(*parts):
        return any(all(part in name for part in parts) for name in names)

    if has(".qweight"):
        for parts, family in (
                (("transformer_blocks.", "img_mlp."), "Qwen-Image"), (("layers.", "attention.to_qkv."), "Z-Image"),
                (("transformer_blocks.", "inverted_conv"), "Sana"), (("attn2.to_q.",), "SDXL"),
                (("encoder.block.",), "T5 text encoder"), (("decoder.block.",), "T5 text encoder")):
            if has(*parts):
                return f"an SVDQ {family} file, and this pack loads FLUX only"
        return "a 4-bit file of a model this pack does not know"
    if has("lora_A.") or has("lora_down.") or has(".lora_up") or has("_lora.down"):
        return "a LoRA; put it in models/loras and load it with 'Load LoRA' (LoraLoaderModelOnly)"
    if has("model.diffusion_model.") and (has("first_stage_model.") or has("vae.") or has("cond_stage_model.")
                                          or has("text_encoders.")):
        return "an all-in-one checkpoint; load it with 'Load Checkpoint' (CheckpointLoaderSimple)"
    if has("controlnet_blocks.") or has("controlnet_x_embedder."):
        return "a ControlNet; put it in models/controlnet and load it with 'Load ControlNet Model' (ControlNetLoader)"
    flux = has("double_blocks.", "img_attn.qkv") or (has("transformer_blocks.", "attn.add_q_proj")
                                                     and has("single_transformer_blocks."))
    if flux:
        kind = "an fp8" if any(d.startswith("F8_") for d in dtypes) else "a 16-bit" if dtypes & {"BF16", "F16"} else "a"
        return f"{kind} FLUX model that is not SVDQ; load it with 'Load Diffusion Model' (UNETLoader)"
    if has("encoder.block.") and has("SelfAttention"):
        return "a T5 text encoder; load it with 'DualCLIPLoader'"
    if has("text_model.encoder."):
        return "a CLIP text encoder; load it with 'DualCLIPLoader'"
    if has("decoder.conv_in") or has("taesd_decoder."):
        return "a VAE; load it with 'Load VAE' (VAELoader)"
    if has("diffusion_model.") or has("transformer_blocks.") or has("blocks.0."):
        return "a diffusion model that is not SVDQ FLUX; try 'Load Diffusion Model' (UNETLoader)"
    return None
