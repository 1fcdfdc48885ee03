"""A picture of a prompt by an SVDQ model in diffusers' stock pipeline: the demo model, which downloads nothing, or a FLUX.1.

Runs in a Python that has diffusers, such as environment.make_hf's.
"""

import re
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.utils import logging
from safetensors.torch import load_file

from svdq import SVDQFluxTransformer2DModel, demo
from svdq.errors import CheckpointError, shown

MODELS = Path(__file__).absolute().parents[1] / "models"
DEMO = MODELS / "diffusion_models" / "svdq-int4_r16-demo.safetensors"
VAE = MODELS / "vae" / "svdq-demo-vae.safetensors"
STICKER = MODELS / "loras" / "svdq-demo-sticker.safetensors"
DEMO_OPTIONS = {"height": 160, "width": 160, "num_inference_steps": 20, "true_cfg_scale": 3.0}

# Where the text encoders and the VAE of a FLUX.1 that paints from a prompt alone are, and how it is asked for a picture.
SCHNELL = "black-forest-labs/FLUX.1-schnell", {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}
DEV = "black-forest-labs/FLUX.1-dev", {"num_inference_steps": 28, "guidance_scale": 3.5}
PAINTS_ALONE = 64       # in_channels of a model that takes no picture beside its latents
T5 = 4096               # dimensions of a token of their text encoder
WHOLE = 24e9            # bytes of a GPU that holds a 4-bit FLUX.1, its text encoders and a picture in work


class Painter:
    """A model that is loaded once and paints as often as it is asked.

    model     path of an SVDQ file, or its name on Hugging Face as SVDQFluxTransformer2DModel.from_pretrained takes it; none:
              the demo model. For a FLUX.1, what it needs besides is fetched from Hugging Face, which standard error says
    lora      path of a LoRA file, or its name there; True: the demo model's sticker LoRA
    device    none: the first CUDA device, else the CPU

    Raises CheckpointError, LoraError; OSError from Hugging Face.
    """

    def __init__(self, model=None, lora=None, device=None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if re.fullmatch(r"[\w.-]+/[\w.-]+(/.*)?", str(model)) and not str(model).startswith(".") and not Path(model).exists():
            say(f"looking for {shown(model, 300)} in Hugging Face's cache, else fetching it: 7 GB for a FLUX.1")
        path = DEMO if model is None else model
        # A CPU is faster in fp32, at twice the memory, which the text encoders of a FLUX.1 would feel.
        small = self.device.type == "cpu" and Path(path).absolute().parent == DEMO.parent
        transformer = SVDQFluxTransformer2DModel.from_pretrained(path, dtype=torch.float32 if small else torch.bfloat16,
                                                                 device=self.device)
        self.is_demo = transformer.config.joint_attention_dim == demo.CONTEXT
        if lora is True and not self.is_demo:
            raise CheckpointError("the sticker LoRA is the demo model's, and this is another model. Name the file of a LoRA")
        if self.is_demo:
            self.pipeline, self.options = demo_pipeline(transformer), DEMO_OPTIONS
            self.pipeline.to(self.device)
        else:
            self.pipeline, self.options = flux_pipeline(transformer)
            self._place()
        self.pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
        if lora is not None:
            self._load_lora(str(STICKER if lora is True else lora))

    def _load_lora(self, lora):
        """By the pipeline, which also knows the text encoders' part of a LoRA; the demo has none, and would be warned of it."""
        if self.is_demo:
            self.pipeline.transformer.load_lora_adapter(lora)
        else:
            self.pipeline.load_lora_weights(lora)

    def _place(self):
        if self.device.type == "cuda" and torch.cuda.get_device_properties(self.device).total_memory < WHOLE:
            self.pipeline.enable_model_cpu_offload(device=self.device)
        else:
            self.pipeline.to(self.device)

    def paint(self, prompt, seed=0, steps=None, **more):
        """The PIL.Image of a prompt; for the same seed on the same machine the same one.

        steps    none: as many as suit the model
        more     of the pipeline's own arguments, such as height, width and guidance_scale

        Raises svdq.demo.PromptError for words that the demo model does not know.
        """
        options = self.options | ({} if steps is None else {"num_inference_steps": steps}) | more
        said = self._encoded(prompt) if self.is_demo else {"prompt": prompt}
        # Noise of the CPU's generator is the same wherever the model runs.
        return self.pipeline(**said, **options, generator=torch.Generator("cpu").manual_seed(seed)).images[0]

    def _encoded(self, prompt):
        where = {"device": self.device, "dtype": self.pipeline.transformer.dtype}
        (cond, pooled), (nothing, no_pooled) = demo.encode(prompt), demo.encode("")
        return {"prompt_embeds": cond.to(**where), "pooled_prompt_embeds": pooled.to(**where),
                "negative_prompt_embeds": nothing.to(**where), "negative_pooled_prompt_embeds": no_pooled.to(**where)}


def demo_pipeline(transformer):
    """diffusers' pipeline around the demo model, which has no text encoders: prompts come encoded."""
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=demo_vae(transformer.dtype),
                        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer)


def demo_vae(dtype):
    """The demo's VAE, a TAESD of 16 channels. Its file has ComfyUI's names, where the decoder's first module has no number of
    its own, and a scale and a shift that cancel FLUX's."""
    vae = AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0)
    tensors = {}
    for name, tensor in load_file(VAE).items():
        part, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if part == "taesd_encoder":
            tensors[f"encoder.layers.{number}.{rest}"] = tensor.to(dtype)
        elif part == "taesd_decoder":
            tensors[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor.to(dtype)
    vae.load_state_dict(tensors, assign=True)
    return vae.eval()


def flux_pipeline(transformer):
    """(diffusers' pipeline around a FLUX.1 that paints from a prompt alone, arguments that suit it)"""
    config = transformer.config
    if config.in_channels != PAINTS_ALONE or config.joint_attention_dim != T5:
        what = "a Fill, Canny or Depth model, which needs a picture" if config.in_channels != PAINTS_ALONE else \
            "no FLUX.1 of the usual width, and no text encoder fits it"
        raise CheckpointError(f"{transformer.svdq_path}: is {what}. Load it with SVDQFluxTransformer2DModel and give it to "
                              "a pipeline of yours")
    repository, options = DEV if config.guidance_embeds else SCHNELL
    say(f"text encoders and VAE are those of {repository}: fetching what of them is not in Hugging Face's cache, 10 GB in all")
    level = logging.get_verbosity()
    logging.set_verbosity_error()       # of the empty place of the transformer, which is ours
    try:
        return FluxPipeline.from_pretrained(repository, transformer=transformer, torch_dtype=transformer.dtype), options
    finally:
        logging.set_verbosity(level)


def say(text):
    print(text, file=sys.stderr, flush=True)
