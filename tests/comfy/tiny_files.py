"""A small random file of the right kind under every name that the templates' loaders ask for."""

import torch
from safetensors.torch import save_file

from svdq_pack.svdq import checkpoint
from svdq_pack.svdq.families import flux1
from svdq_pack.tests import random_models
from svdq_pack.tools.templates import graphs

HIDDEN, CONTEXT, POOLED, RANK = 256, 4096, 768, 16      # text as wide as FLUX.1's, which Redux takes for granted
IN_FEATURES = {graphs.FILL.name: 384, graphs.CANNY.name: 128, graphs.DEPTH.name: 128}
LOW = torch.bfloat16


def shape(in_features=64, guidance=True):
    return flux1.Shape(HIDDEN, 1, 1, in_features, CONTEXT, POOLED, guidance)


def write(models):
    """Into the folders of a ComfyUI's models/. Returns the paths."""
    random, made = torch.Generator().manual_seed(29), []

    def path(file):
        made.append(models / file.directory / file.name)
        made[-1].parent.mkdir(exist_ok=True)
        return made[-1]

    for file in (graphs.DEV, graphs.SCHNELL, graphs.KREA, graphs.KONTEXT, graphs.FILL, graphs.CANNY, graphs.DEPTH):
        random_models.write_model(path(file), random, shape(IN_FEATURES.get(file.name, 64), file is not graphs.SCHNELL), RANK)
    checkpoint.dequantize(models / graphs.DEV.directory / graphs.DEV.name, path(graphs.DENSE), torch.bfloat16)
    save_file(random_models.vae(random), path(graphs.VAE))
    for file in (graphs.TURBO, graphs.REALISM, graphs.REMOVAL):
        save_file(lora(random), path(file))
    for file in (graphs.CANNY_LORA, graphs.DEPTH_LORA):
        save_file(control_lora(random), path(file))
    save_file(uso_lora(random), path(graphs.USO_LORA))
    save_file(uso_projector(random), path(graphs.USO_PROJECTOR))
    save_file(redux(), path(graphs.REDUX))
    for file in (graphs.UNION, graphs.UPSCALER):
        save_file(controlnet(random), path(file))
    for file in (*graphs.ENCODERS, graphs.VISION):      # stand_ins.py takes their place
        path(file).touch()
    return made


def linear(random, name, out, into, bias=True):
    weight = torch.randn(out, into, generator=random) / into ** 0.5
    return {f"{name}.weight": weight.to(LOW)} | ({f"{name}.bias": torch.zeros(out, dtype=LOW)} if bias else {})


def pair(random, name, out, into, down=".lora_A.weight", up=".lora_B.weight", rank=4):
    return {f"{name}{down}": (torch.randn(rank, into, generator=random) / into ** 0.5).to(LOW),
            f"{name}{up}": (torch.randn(out, rank, generator=random) * 0.1).to(LOW)}


def lora(random):
    return pair(random, "transformer.transformer_blocks.0.attn.to_out.0", HIDDEN, HIDDEN)


def control_lora(random):
    """As Black Forest Labs': img_in becomes wider, norms of q and k come with it."""
    return (pair(random, "img_in", HIDDEN, 128) | pair(random, "double_blocks.0.img_attn.qkv", 3 * HIDDEN, HIDDEN)
            | {"single_blocks.0.norm.key_norm.scale": torch.ones(128, dtype=LOW)})


def uso_lora(random):
    """ComfyUI knows it by the last blocks of a FLUX of full depth, which this one does not have."""
    sizes = {"double_blocks.0.processor.qkv_lora1": 3 * HIDDEN, "double_blocks.0.processor.proj_lora1": HIDDEN,
             "double_blocks.18.processor.qkv_lora2": 3 * HIDDEN, "single_blocks.37.processor.qkv_lora": 3 * HIDDEN}
    tensors = {}
    for name, out in sizes.items():
        tensors |= pair(random, name, out, HIDDEN, ".down.weight", ".up.weight")
    return tensors


def uso_projector(random, patches=729, style=64, seen=1152):
    tensors = {}
    for level in ("high", "mid", "low"):
        tensors |= linear(random, f"{level}_embedding_linear.0", style, patches)
        tensors |= {f"{level}_layer_norm.weight": torch.ones(seen, dtype=LOW),
                    f"{level}_layer_norm.bias": torch.zeros(seen, dtype=LOW)}
        tensors |= linear(random, f"{level}_projection", HIDDEN, seen)
    return {f"feature_embedder.{name}": tensor for name, tensor in tensors.items()}


def redux(seen=1152):
    """Constant: 64 million random numbers would take longer than all other files."""
    shapes = {"redux_up": (3 * CONTEXT, seen), "redux_down": (CONTEXT, 3 * CONTEXT)}
    return {f"{name}.{end}": torch.full(size[:1 if end == "bias" else 2], 1e-3, dtype=LOW)
            for name, size in shapes.items() for end in ("weight", "bias")}


def controlnet(random):
    """In diffusers' names, as Union Pro 2.0 and the upscaler are."""
    tensors, block = {}, "transformer_blocks.0"
    for name, out, into in (
            ("x_embedder", HIDDEN, 64), ("context_embedder", HIDDEN, CONTEXT), ("controlnet_x_embedder", HIDDEN, 64),
            ("controlnet_blocks.0", HIDDEN, HIDDEN), ("time_text_embed.timestep_embedder.linear_1", HIDDEN, 256),
            ("time_text_embed.timestep_embedder.linear_2", HIDDEN, HIDDEN),
            ("time_text_embed.guidance_embedder.linear_1", HIDDEN, 256),
            ("time_text_embed.guidance_embedder.linear_2", HIDDEN, HIDDEN),
            ("time_text_embed.text_embedder.linear_1", HIDDEN, POOLED),
            ("time_text_embed.text_embedder.linear_2", HIDDEN, HIDDEN),
            (f"{block}.norm1.linear", 6 * HIDDEN, HIDDEN), (f"{block}.norm1_context.linear", 6 * HIDDEN, HIDDEN),
            *((f"{block}.attn.{part}", HIDDEN, HIDDEN) for part in (
                "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")),
            *((f"{block}.{part}.net.0.proj", 4 * HIDDEN, HIDDEN) for part in ("ff", "ff_context")),
            *((f"{block}.{part}.net.2", HIDDEN, 4 * HIDDEN) for part in ("ff", "ff_context"))):
        tensors |= linear(random, name, out, into)
    norms = (f"{block}.attn.norm_{part}.weight" for part in ("q", "k", "added_q", "added_k"))
    return tensors | {name: torch.ones(128, dtype=LOW) for name in norms}
