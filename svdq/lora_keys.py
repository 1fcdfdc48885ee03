"""What the key names of a LoRA file tell: whose names they are, which model it is for, or that it is no LoRA.

Loading needs only `unwrapped` of this, ComfyUI knows the other names. The rest is for saying in words what came, and why it
cannot be used.

Source: checkpoint-format 8.2, and ComfyUI's model code for the names of other families. Test: tests/unit/test_lora_keys.py
"""

import re
from collections import Counter

from . import foreign
from .families import flux1, recognise
from .ways_out import way_out

XLABS = "XLabs"
_BFL = f"(?:{'|'.join(flux1.BFL_ROOTS)})"
_DIFFUSERS = f"(?:{'|'.join(flux1.DIFFUSERS_ROOTS)})"

# The first that matches a key is its style.
_STYLES = [(style, re.compile(pattern)) for style, pattern in (
    (XLABS, rf"{_BFL}\.\d+\.processor\."),
    ("OneTrainer", r"lora_transformer_"),
    ("LyCORIS (diffusers names)", r"lycoris_"),
    ("kohya (BFL names)", rf"lora_unet_{_BFL}_"),
    ("kohya", r"lora_unet_"),
    ("fal / PEFT on BFL names", rf"(?:transformer\.)?base_model\.model\.{_BFL}\."),
    ("BFL", rf"{_BFL}\."),
    ("ComfyUI (diffusion_model.)", r"(?:model\.)?diffusion_model\."),
    ("diffusers/PEFT", rf"(?:base_model\.model\.|transformer\.|unet\.)+|{_DIFFUSERS}\."))]

_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")       # before names with underscores for dots
_WRAPPERS = re.compile(r"^(?:base_model\.model\.|model\.(?=diffusion_model\.)|diffusion_model\.|transformer\.|unet\.)*")
_PROCESSOR = re.compile(r"(?<=\.attn)\.processor\.(\w+)_lora\.")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$")

_TEXT_ENCODER = re.compile(r"lora_te\d?_|lora_prior_te_|te\d?[._]|text_encoders?(?:_\d)?[._]|text_model\.|clip_[lgh][._]"
                           r"|t5xxl[._]")
_ADAPTER = re.compile(r"lora|lokr_|hada_|oft_blocks|\.(?:alpha|diff|diff_b|set_weight|[ab][12]\.weight|[wb]_norm)$")
_NUNCHAKU = re.compile(r"\.mlp_fc|mlp_context_fc1|_proj(?:_context)?\.lora_(?:down|up)$")
_EMBEDDING = re.compile(r"emb_params$|string_to_param$|clip_[lg]$|t5xxl$")

# Names FLUX.1 has none of. Some of these models share names, and even sizes, with FLUX, so part of a file may seem to fit.
_FAMILIES = [(family, re.compile(pattern)) for family, pattern in (
    ("SD 1.5 or SDXL", r"(?:down|up|input|output)_blocks[._]\d|mid(?:dle)?_block[._]"),
    ("SD3", r"joint_blocks[._]\d"),
    ("FLUX.2", r"to_qkv_mlp_proj|(?:double|single)_stream_modulation|single_blocks[._]47[._]"),
    ("Qwen-Image", r"transformer_blocks[._](?:\d+[._](?:img|txt)_m|59[._]attn)"),
    ("HunyuanVideo", r"(?:img|txt)_mlp[._]fc[12]|(?:_mod|modulation)[._]linear|double_blocks\.\d+\.(?:img|txt)_attn_"
                     r"|double_blocks[._]19[._]|single_blocks[._]39[._]"),
    ("HiDream", r"(?:double|single)_stream_blocks[._]"),
    ("Wan", r"(?<!transformer_)blocks[._]\d+[._](?:(?:self|cross)_attn[._][qkvo]\.|ffn[._]|attn[12]\.)"),
    ("LTX-Video, CogVideoX, Mochi or PixArt", r"transformer_blocks[._]\d+[._]attn[12][._]"),
    ("Z-Image or Lumina", r"(?:^|[._])layers[._]\d+[._](?:attention|feed_forward|adaLN_modulation)[._]"))]


# What tells the two factors of a pair apart in their keys.
_HALVES = [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")]


def is_half(key, keys):
    """Whether one factor of a pair, or what scales the pair, stands in a file without the (other) factor."""
    if _MAGNITUDE.search(key) or key.endswith((".dora_scale", ".alpha")):
        layer = _MAGNITUDE.sub("", key).removesuffix(".dora_scale").removesuffix(".alpha")
        return not any(other.startswith(f"{layer}.") and not other.endswith((".dora_scale", ".alpha"))
                       and not _MAGNITUDE.search(other) for other in keys)
    return any(f".{one}." in key and key.replace(f".{one}.", f".{other}.") not in keys
               for pair in _HALVES for one, other in (pair, pair[::-1]))


def is_text_encoder(key):
    return _TEXT_ENCODER.match(key) is not None


def style(keys):
    """Whose names most of the keys are, in words."""
    if {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"} <= set(keys):
        return "BFL control"
    found = Counter(next((style for style, pattern in _STYLES if pattern.match(key)), "unknown")
                    for key in keys if not is_text_encoder(key))
    return found.most_common(1)[0][0] if found else "unknown"


def unwrapped(key):
    """A key as ComfyUI knows it for FLUX: it does not expect wrappers there, nor BFL names alone, nor diffusers' names in
    kohya's spelling, the names of diffusers' old attention processors, or those PEFT has for DoRA."""
    key = _MAGNITUDE.sub(".dora_scale", key)
    layer, dot, rest = key.partition(".")
    if layer.startswith(_JOINED):
        return re.sub(rf"^lora_unet_(?={_DIFFUSERS}(?:_|$))", "lora_transformer_", layer.rstrip("_")) + dot + rest
    inner = _WRAPPERS.sub("", key)
    if re.match(rf"{_BFL}\.", inner):
        return f"diffusion_model.{inner}"
    if not re.match(rf"{_DIFFUSERS}\.", inner):
        return key
    inner = _PROCESSOR.sub(lambda old: ".to_out.0_lora." if old[1] == "to_out" else f".{old[1]}_lora.", inner)
    return inner if inner == key else f"transformer.{inner}"


def refusal(keys, dtypes):
    """Why a file can be no LoRA for FLUX.1, to follow "this is", and what to do with it; None if it may be one.

    keys   as stored        dtypes   safetensors dtype names present
    """
    keys = set(keys)
    if any(".qweight" in key for key in keys):
        family = recognise(keys)
        if family:
            return f"a whole SVDQ {family.NAME} model. {way_out('SVDQ model')}"
        return foreign.identify(keys, dtypes)
    if not any(map(_ADAPTER.search, keys)):
        if keys and all(map(_EMBEDDING.search, keys)) or "string_to_param" in keys:
            return f"an embedding, not a LoRA. {way_out('embedding')}"
        return foreign.identify(keys, dtypes)
    rest = [key for key in keys if not is_text_encoder(key)]
    if not rest:
        return f"a LoRA for text encoders alone, and {way_out('LoRA for text encoders')}"
    if any(map(_NUNCHAKU.search, rest)):
        return ("a LoRA in Nunchaku's own format: merged with the low-rank branch of one 4-bit model file and packed, so it "
                "contains that file's branch too. Load the original LoRA it was made from")
    for family, pattern in _FAMILIES:
        if any(map(pattern.search, rest)):
            return f"a LoRA for {family} with {style(rest)} keys, and the model is FLUX.1. Get this LoRA for FLUX.1"
    return None
