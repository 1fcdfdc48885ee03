"""Every pipeline of diffusers that takes a FLUX transformer takes ours, and gives what it gives with the same numbers dense."""

import diffusers
import numpy
import PIL.Image
import pytest
import torch

from svdq_pack.tests.hf.inside.support import dense_twin, distance, noise, random_model

TEXT = {"prompt_embeds": noise(1, 7, 128, seed=1), "pooled_prompt_embeds": noise(1, 64, seed=2)}
STEPS = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.5}


def picture(seed=0, mode="RGB"):
    pixels = numpy.random.default_rng(seed).integers(0, 255, (64, 64) if mode == "L" else (64, 64, 3), dtype=numpy.uint8)
    return PIL.Image.fromarray(pixels, mode)


def vae():
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False,
        use_post_quant_conv=False).eval()


def made(kind, transformer, **more):
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = kind(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(), transformer=transformer, **parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet():
    torch.manual_seed(4)
    net = diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=128,
                                        pooled_projection_dim=64, guidance_embeds=True)
    for parameter in net.parameters():              # the last layers of an untrained one are zero
        parameter.data = torch.randn_like(parameter) * 0.02
    return net.eval()


CASES = {
    "text": (diffusers.FluxPipeline, {}, lambda: {}),
    "image to image": (diffusers.FluxImg2ImgPipeline, {}, lambda: {"image": picture(), "strength": 1.0}),
    "inpaint": (diffusers.FluxInpaintPipeline, {},
                lambda: {"image": picture(), "mask_image": picture(1, "L"), "strength": 1.0}),
    "kontext": (diffusers.FluxKontextPipeline, {}, lambda: {"image": picture(), "max_area": 64 * 64, "_auto_resize": False}),
    "fill": (diffusers.FluxFillPipeline, {"in_features": 384}, lambda: {"image": picture(), "mask_image": picture(1, "L")}),
    "control": (diffusers.FluxControlPipeline, {"in_features": 128}, lambda: {"control_image": picture()}),
    "control image to image": (diffusers.FluxControlImg2ImgPipeline, {"in_features": 128},
                               lambda: {"image": picture(), "control_image": picture(1), "strength": 1.0}),
    "controlnet": (diffusers.FluxControlNetPipeline, {}, lambda: {"control_image": picture()})}


@pytest.mark.parametrize("name", CASES)
def test_like_dense(name, tmp_path):
    kind, changes, inputs = CASES[name]
    transformer, more = random_model(tmp_path, **changes), {}
    if name == "controlnet":
        more = {"controlnet": controlnet()}
    results = [made(kind, one, **more)(**TEXT, **STEPS, **inputs(), height=64, width=64,
                                       generator=torch.Generator().manual_seed(0)).images
               for one in (transformer, dense_twin(transformer))]
    assert distance(*results) <= 1e-5
    if name == "controlnet":                        # and it had a say
        for parameter in more["controlnet"].parameters():
            parameter.data.zero_()
        assert distance(made(kind, transformer, **more)(**TEXT, **STEPS, **inputs(), height=64, width=64,
                                                        generator=torch.Generator().manual_seed(0)).images, results[0]) > 1e-3


def test_ip_adapter_processors(tmp_path):
    """Image tokens beside the text, by diffusers' own processor on our layers."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
    transformer = random_model(tmp_path)
    twin = dense_twin(transformer)
    processors = {}
    torch.manual_seed(5)
    for name, stock in transformer.attn_processors.items():
        processors[name] = stock if name.startswith("single") else FluxIPAdapterAttnProcessor(256, 128)
    given = dict(hidden_states=noise(1, 16, 64), encoder_hidden_states=noise(1, 7, 128), pooled_projections=noise(1, 64),
                 timestep=torch.tensor([0.5]), guidance=torch.tensor([3.5]), img_ids=torch.zeros(16, 3),
                 txt_ids=torch.zeros(7, 3),
                 joint_attention_kwargs={"ip_hidden_states": [noise(1, 4, 128, seed=6)], "ip_adapter_masks": None})
    results = []
    for one in (transformer, twin):
        one.set_attn_processor(dict(processors))
        results.append(one(**given).sample)
    assert distance(*results) <= 2e-6


def test_caches(tmp_path):
    """First-block cache and pyramid attention broadcast hook blocks and attentions of ours as of any FLUX."""
    for config in (diffusers.FirstBlockCacheConfig(threshold=10.0), diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500)):
        transformer = random_model(tmp_path)
        pipe, results = made(diffusers.FluxPipeline, transformer), []
        for one in (transformer, dense_twin(transformer)):
            pipe.transformer = one
            one.enable_cache(config)
            results.append(pipe(**TEXT, **STEPS | {"num_inference_steps": 4}, height=64, width=64,
                                generator=torch.Generator().manual_seed(0)).images)
            one.disable_cache()
        assert distance(*results) <= 1e-5
        pipe.transformer = transformer
        plain = pipe(**TEXT, **STEPS | {"num_inference_steps": 4}, height=64, width=64,
                     generator=torch.Generator().manual_seed(0)).images
        assert distance(results[0], plain) > 1e-4           # it has left something out


def test_attention_backend(tmp_path):
    transformer = random_model(tmp_path)
    transformer.set_attention_backend("native")
    made(diffusers.FluxPipeline, transformer)(**TEXT, **STEPS, height=64, width=64)
