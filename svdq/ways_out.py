"""What to do about what came, in words of the host: what a file is, is the same everywhere, and what takes it is not.

A message says what came where that is found, and takes what follows from this table. ComfyUI's words are also the command
line's. A call from diffusers says so for its own length: both hosts may live in one process.

Test: tests/unit/test_ways_out.py
"""

from contextlib import contextmanager
from contextvars import ContextVar

COMFYUI, DIFFUSERS = range(2)       # columns
_host = ContextVar("svdq_host", default=COMFYUI)

WAYS_OUT = {
    # files, see container.py and foreign.py
    "GGUF": ("load it with 'Unet Loader (GGUF)' of the ComfyUI-GGUF pack",
             "load it with FluxTransformer2DModel.from_single_file and GGUFQuantizationConfig"),
    "4-bit T5": ("put it in models/text_encoders and load it with 'SVDQ Text Encoder Loader'",
                 "no pipeline of diffusers takes it. Take text_encoder_2 of the base repository, such as "
                 "black-forest-labs/FLUX.1-dev"),
    "LoRA": ("put it in models/loras and load it with 'Load LoRA' (LoraLoaderModelOnly)",
             "load the model first, then give this to the pipeline's load_lora_weights"),
    "all in one": ("load it with 'Load Checkpoint' (CheckpointLoaderSimple)",
                   "load it with from_single_file of its pipeline, such as FluxPipeline"),
    "ControlNet": ("put it in models/controlnet and load it with 'Load ControlNet Model' (ControlNetLoader)",
                   "load the folder it is from with from_pretrained of its class, such as FluxControlNetModel"),
    "16-bit model": ("load it with 'Load Diffusion Model' (UNETLoader)",
                     "load it with FluxTransformer2DModel.from_single_file"),
    "T5": ("load it with 'DualCLIPLoader'",
           "load it with T5EncoderModel.from_pretrained of transformers, from a folder with its config.json"),
    "CLIP": ("load it with 'DualCLIPLoader'",
             "load it with CLIPTextModel.from_pretrained of transformers, from a folder with its config.json"),
    "VAE": ("load it with 'Load VAE' (VAELoader)",
            "load it with from_single_file of its class, such as AutoencoderKL"),
    "another model": ("try 'Load Diffusion Model' (UNETLoader)", "try from_single_file of its class"),

    # what came for a LoRA, see lora_keys.py
    "SVDQ model": ("Put it in models/diffusion_models and load it with 'SVDQ Loader'",
                   "Load it with SVDQFluxTransformer2DModel.from_pretrained"),
    "embedding": ("Put it in models/embeddings and write embedding:NAME in the prompt",
                  "Give it to the pipeline's load_textual_inversion"),
    "LoRA for text encoders": (
        "this node loads the part for the model. Load it with 'Load LoRA' (LoraLoader), which has a CLIP input",
        "none of it is for the transformer. Read it with the pipeline's lora_state_dict, and give that to its "
        "load_lora_into_text_encoder"),

    # answers of Hugging Face, see hub.py
    "gated": ("log in with 'hf auth login' on this machine and restart ComfyUI",
              "log in with 'hf auth login' on this machine, or pass token"),
    "private": ("log in with 'hf auth login' on this machine", "log in with 'hf auth login' on this machine, or pass token"),
    "no such file": ("Leave filename empty to pick one", "Leave filename out to pick one"),
}


def way_out(of):
    """What to do, in the words of the host that asks."""
    return WAYS_OUT[of][_host.get()]


@contextmanager
def said_in(host):
    """For a block, or as a decorator for each call: messages speak to people at this host, DIFFUSERS or COMFYUI."""
    before = _host.set(host)
    try:
        yield
    finally:
        _host.reset(before)
