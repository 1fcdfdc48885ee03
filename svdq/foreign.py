"""Files that are no SVDQ checkpoint of a family we know: told apart by the names of their tensors, to say what loads them."""

from .families import FAMILIES, FAMILY_NAMES
from .ways_out import way_out


def identify(names, dtypes):
    """What a file is and what loads it; None when nobody knows.

    names   tensor names as stored        dtypes   safetensors dtype names present, e.g. {"BF16", "F8_E4M3"}
    """
    names = set(names)

    def has(*parts):
        return any(all(part in name for part in parts) for name in names)

    if has(".qweight"):
        if has("encoder.block."):
            return f"a 4-bit T5 text encoder; {way_out('4-bit T5')}"
        for parts, family in (
                (("transformer_blocks.", "img_mlp."), "Qwen-Image"), (("layers.", "attention.to_qkv."), "Z-Image"),
                (("transformer_blocks.", "inverted_conv"), "Sana"), (("attn2.to_q.",), "SDXL")):
            if has(*parts):
                return f"an SVDQ {family} file, and this pack loads {FAMILY_NAMES} only"
        return "a 4-bit file of a model this pack does not know"
    if has("lora_A.") or has("lora_down.") or has(".lora_up") or has("_lora.down"):
        return f"a LoRA; {way_out('LoRA')}"
    if has("model.diffusion_model.") and (has("first_stage_model.") or has("vae.") or has("cond_stage_model.")
                                          or has("text_encoders.")):
        return f"an all-in-one checkpoint; {way_out('all in one')}"
    if has("controlnet_blocks.") or has("controlnet_x_embedder."):
        return f"a ControlNet; {way_out('ControlNet')}"
    family = next((family for family in FAMILIES if family.is_16_bit(names)), None)
    if family:
        kind = "an fp8" if any(d.startswith("F8_") for d in dtypes) else "a 16-bit" if dtypes & {"BF16", "F16"} else "a"
        return f"{kind} {family.NAME} model that is not SVDQ; {way_out('16-bit model')}"
    if has("encoder.block.") and has("SelfAttention"):
        return f"a T5 text encoder; {way_out('T5')}"
    if has("text_model.encoder."):
        return f"a CLIP text encoder; {way_out('CLIP')}"
    if has("decoder.conv_in") or has("taesd_decoder."):
        return f"a VAE; {way_out('VAE')}"
    if has("diffusion_model.") or has("transformer_blocks.") or has("blocks.0."):
        return f"a diffusion model that is not SVDQ {FAMILY_NAMES}; {way_out('another model')}"
    return None
