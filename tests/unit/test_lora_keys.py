"""Whose keys a LoRA has, what it is for, and what is no LoRA for FLUX: keys alone, as trainers and converters write them."""

import re

import pytest
from safetensors import safe_open

from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.lora_keys import is_text_encoder, refusal, style, unwrapped

PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
LOKR = ("lokr_w1", "lokr_w2", "alpha")

STYLES = {                      # style: [(layers, suffixes)]
    "diffusers/PEFT": [
        (("transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.37.proj_mlp",
          "transformer.x_embedder", "transformer.time_text_embed.guidance_embedder.linear_1"), PEFT),
        (("transformer_blocks.18.ff_context.net.2", "single_transformer_blocks.0.attn.to_k", "norm_out.linear"),
         ("lora_A.default.weight", "lora_B.default.weight")),
        (("transformer.base_model.model.single_transformer_blocks.13.attn.to_k",), ("lora.down.weight", "lora.up.weight"))],
    "kohya (BFL names)": [
        (("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_18_txt_mod_lin", "lora_unet_img_in",
          "lora_unet_single_blocks_37_linear2", "lora_unet_single_blocks_0_modulation_lin"), KOHYA),
        (("lora_unet_double_blocks_3_img_mlp_0", "lora_unet_final_layer_adaLN_modulation_1"), LOKR)],
    "kohya": [(("lora_unet_transformer_blocks_10_attn_to_k",), KOHYA)],
    "OneTrainer": [(("lora_transformer_transformer_blocks_0_attn_to_q",
                     "lora_transformer_single_transformer_blocks_0_proj_out"), (*KOHYA, "dora_scale"))],
    "LyCORIS (diffusers names)": [(("lycoris_transformer_blocks_0_attn_to_q",
                                    "lycoris_single_transformer_blocks_9_proj_mlp"), LOKR)],
    "XLabs": [(("double_blocks.0.processor.qkv_lora1", "double_blocks.18.processor.proj_lora2",
                "single_blocks.37.processor.qkv_lora"), ("down.weight", "up.weight"))],
    "fal / PEFT on BFL names": [(("base_model.model.double_blocks.0.img_attn.qkv", "base_model.model.final_layer.linear",
                                  "base_model.model.single_blocks.37.linear1"), PEFT)],
    "BFL": [(("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "img_in"), PEFT)],
    "BFL control": [(("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "img_in"), (*PEFT, "lora_B.bias")),
                    (("single_blocks.0.norm.key_norm", "single_blocks.0.norm.query_norm"), ("scale",))],
    "ComfyUI (diffusion_model.)": [(("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.img_in"), PEFT),
                                   (("diffusion_model.single_blocks.0.linear2",), ("diff", "diff_b"))],
    "unknown": [(("some.layer", "another"), PEFT)]}

FAMILIES = {                    # what the refusal calls it: [layers], each a file of its own
    "SD 1.5 or SDXL": [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
         "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",)],
    "SD3": [("lora_unet_joint_blocks_0_context_block_attn_qkv",), ("diffusion_model.joint_blocks.37.x_block.mlp.fc1",)],
    "FLUX.2": [("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",),
               ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_47_linear1")],
    "Qwen-Image": [
        ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.img_mlp.net.0.proj"),
        ("lora_unet_transformer_blocks_0_txt_mod_1",),
        tuple(f"transformer_blocks.{i}.attn.to_q" for i in range(60))],
    "HunyuanVideo": [
        ("transformer.single_blocks.0.linear1", "transformer.single_blocks.0.modulation.linear"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mlp_fc1"),
        tuple(f"lora_unet_single_blocks_{i}_linear1" for i in range(40)), ("transformer.double_blocks.0.img_attn_qkv",)],
    "HiDream": [("diffusion_model.double_stream_blocks.0.block.ff_i.w1",)],
    "Wan": [("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"), ("lora_unet_blocks_0_cross_attn_k",),
            ("lora_unet__blocks_39_self_attn_o",), ("transformer.blocks.0.attn1.to_q",)],
    "LTX-Video, CogVideoX, Mochi or PixArt": [("transformer.transformer_blocks.0.attn1.to_q",)],
    "Z-Image or Lumina": [("diffusion_model.layers.0.attention.to_q",), ("lora_unet_layers_3_feed_forward_w1",)]}

TEXT_ENCODERS = ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te_text_model_encoder_layers_0_mlp_fc1",
                 "lora_te2_encoder_block_0_layer_0_SelfAttention_q", "text_encoder.text_model.encoder.layers.0.mlp.fc2",
                 "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo", "text_encoders.clip_l.transformer.text_model.x"]


def keys(layers, suffixes):
    return [f"{layer}.{suffix}" for layer in layers for suffix in suffixes]


@pytest.mark.parametrize("name", STYLES)
def test_style(name):
    """Recognised, text encoders in the file or not, and never refused."""
    files = [STYLES[name]] if name == "BFL control" else [[part] for part in STYLES[name]]
    for parts in files:
        file = [key for part in parts for key in keys(*part)]
        for more in ([], keys(TEXT_ENCODERS, KOHYA)):
            assert style([*more, *file]) == name
            assert refusal([*more, *file], {"BF16"}) is None


@pytest.mark.parametrize("lora", ["peft", "kohya_bfl"])
def test_golden_files(lora, golden_dir):
    with safe_open(golden_dir / f"lora_model_nvfp4_flux_dev_like_{lora}.safetensors", framework="pt") as file:
        assert style(file.keys()) == {"peft": "diffusers/PEFT", "kohya_bfl": "kohya (BFL names)"}[lora]
        assert refusal(file.keys(), {"BF16"}) is None


def test_every_layer_of_flux_is_let_through():
    """As BFL and as diffusers names with dots and with underscores: nothing in FLUX looks like another family."""
    flux = flux1.Shape(3072, 19, 38, 64, 4096, 768, True)
    bfl = {place.layer for place in flux.comfy_places()} | set(flux1.BFL.values())
    parts = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff_context.net.2",
             "norm1.linear", "norm1_context.linear", "attn.norm_added_q")
    diffusers = {f"transformer_blocks.{i}.{part}" for i in range(19) for part in parts} | {
        f"single_transformer_blocks.{i}.{part}" for i in range(38)
        for part in ("attn.to_v", "proj_mlp", "proj_out", "norm.linear")} | set(flux1.BFL)
    for layer in bfl | diffusers:
        joined = layer.replace(".", "_")
        for spelt in (layer, f"transformer.{layer}", f"diffusion_model.{layer}", f"base_model.model.{layer}",
                      f"lora_unet_{joined}", f"lora_transformer_{joined}", f"lycoris_{joined}"):
            assert refusal(keys([spelt], PEFT), {"BF16"}) is None, spelt


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family(family):
    """Named even where some of its names and sizes are those of FLUX."""
    for layers in FAMILIES[family]:
        for suffixes in (PEFT, KOHYA, LOKR):
            why = refusal(keys(layers, suffixes), {"BF16"})
            assert f"a LoRA for {family} with " in why and why.endswith("Get this LoRA for FLUX.1"), layers


def test_text_encoders_alone():
    file = keys(TEXT_ENCODERS, KOHYA)
    assert all(map(is_text_encoder, file))
    assert "text encoders alone" in refusal(file, {"F16"}) and "'Load LoRA'" in refusal(file, {"F16"})
    assert not any(is_text_encoder(key) for parts in STYLES.values() for part in parts for key in keys(*part))


@pytest.mark.parametrize("suffix", ["down", "up"])
def test_nunchakus_own_format(suffix):
    """As its converter writes it: the names of the model file's own low-rank branch."""
    file = [f"{slot.module}.lora_{suffix}" for slot in flux1.Shape(3072, 1, 1, 64, 4096, 768, True).slots()]
    assert "Nunchaku's own format" in refusal(file, {"BF16"})
    assert "original LoRA" in refusal([key for key in file if "qkv_proj" in key], {"BF16"})


@pytest.mark.parametrize("file, what", [
    (["transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.lora_down",
      "single_transformer_blocks.0.mlp_fc1.qweight"], "a whole SVDQ FLUX model.*'SVDQ Loader'"),
    (["transformer_blocks.0.attn.to_qkv.qweight", "transformer_blocks.0.attn.to_qkv.proj_down",
      "single_transformer_blocks.0.mlp_fc1.qweight"], "a whole SVDQ FLUX model.*'SVDQ Loader'"),
    (["transformer_blocks.0.img_mlp.net.0.proj.qweight"], "SVDQ Qwen-Image"),
    (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "16-bit FLUX model.*'Load Diffusion Model'"),
    (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "ControlNet"),
    (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"], "checkpoint"),
    (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5 text encoder"),
    (["emb_params"], "an embedding.*models/embeddings"),
    (["clip_l", "t5xxl"], "an embedding"),
    (["string_to_token", "string_to_param", "name", "step"], "an embedding")])
def test_no_lora_at_all(file, what):
    assert re.search(what, refusal(file, {"BF16"}))


def test_nothing_known():
    """Nobody knows what it is: that no key matches is then all there is to say."""
    assert refusal([], set()) is None and style([]) == "unknown"
    assert refusal(["weight"], {"F32"}) is None


@pytest.mark.parametrize("key, name", [
    ("base_model.model.double_blocks.0.img_attn.qkv.lora_A", "diffusion_model.double_blocks.0.img_attn.qkv.lora_A"),
    ("transformer.base_model.model.single_transformer_blocks.0.proj_out.lora.up.weight",
     "transformer.single_transformer_blocks.0.proj_out.lora.up.weight"),
    ("single_blocks.0.linear1.lora_B.weight", "diffusion_model.single_blocks.0.linear1.lora_B.weight"),
    ("transformer.final_layer.linear.lora_A.weight", "diffusion_model.final_layer.linear.lora_A.weight"),
    ("unet.transformer_blocks.3.attn.to_q.lora_A.weight", "transformer.transformer_blocks.3.attn.to_q.lora_A.weight"),
    ("unet.base_model.model.x_embedder.lora_A.weight", "transformer.x_embedder.lora_A.weight"),
    ("model.diffusion_model.single_blocks.0.linear2.lora_A.weight", "diffusion_model.single_blocks.0.linear2.lora_A.weight"),
    ("unet.double_blocks.0.img_mlp.0.lora_down.weight", "diffusion_model.double_blocks.0.img_mlp.0.lora_down.weight"),
    ("diffusion_model.single_transformer_blocks.0.proj_out.lora_A.weight",
     "transformer.single_transformer_blocks.0.proj_out.lora_A.weight"),
    ("lora_unet_single_transformer_blocks_0_attn_to_q.alpha", "lora_transformer_single_transformer_blocks_0_attn_to_q.alpha"),
    ("lora_unet_transformer_blocks_9_ff_net_0_proj_.lora_up.weight",
     "lora_transformer_transformer_blocks_9_ff_net_0_proj.lora_up.weight"),
    ("lora_unet_x_embedder.lora_up.weight", "lora_transformer_x_embedder.lora_up.weight"),
    ("lora_unet_single_blocks_0_linear1_.alpha", "lora_unet_single_blocks_0_linear1.alpha"),
    ("transformer.transformer_blocks.0.attn.processor.to_q_lora.down.weight",
     "transformer.transformer_blocks.0.attn.to_q_lora.down.weight"),
    ("unet.transformer_blocks.0.attn.processor.to_out_lora.up.weight",
     "transformer.transformer_blocks.0.attn.to_out.0_lora.up.weight"),
    ("transformer_blocks.0.attn.processor.add_k_proj_lora.up.weight",
     "transformer.transformer_blocks.0.attn.add_k_proj_lora.up.weight"),
    ("base_model.model.transformer_blocks.0.attn.to_q.lora_magnitude_vector",
     "transformer.transformer_blocks.0.attn.to_q.dora_scale"),
    ("transformer.x_embedder.lora_magnitude_vector.default.weight", "transformer.x_embedder.dora_scale"),
    ("single_blocks.0.linear1.lora_magnitude_vector.weight", "diffusion_model.single_blocks.0.linear1.dora_scale")])
def test_unwrapped(key, name):
    assert unwrapped(key) == name


@pytest.mark.parametrize("key", [
    "transformer.x_embedder.lora_A.weight", "lora_unet_img_in.alpha", "diffusion_model.img_in.diff",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "transformer.unheard.lora_A.weight", "lora_te1_x_.alpha",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "single_transformer_blocks.0.proj_mlp.lora_A.weight"])
def test_nothing_to_unwrap(key):
    assert unwrapped(key) == key
