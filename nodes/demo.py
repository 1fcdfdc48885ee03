"""The demo model that comes with the pack: its files, its text encoder and its VAE.

Its files are in no folder of ComfyUI's, so that lists of stock loaders hold the user's files alone, and the demo's graphs run
whatever these are. Loaders of this pack list them after the user's.
"""

from pathlib import Path

import comfy.sd
import comfy.utils
from comfy_api.latest import io

from ..svdq.demo import encode
from ..svdq.errors import CheckpointError

MODELS = Path(__file__).resolve().parents[1] / "workflows" / "models"
VAE = "svdq-demo-vae.safetensors"


def files(kind):
    """{name: path} of the demo's files of a kind: "diffusion_models", "loras", "vae"."""
    return {path.name: str(path) for path in sorted((MODELS / kind).glob("*.safetensors"))}


class SVDQDemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQDemoPrompt", display_name="Demo Prompt",
            search_aliases=["demo text encode", "demo conditioning"],
            description="Encodes a prompt for the demo model that comes with this pack, which paints simple things: 'a "
                        "striped red star left of a blue ring on a dotted yellow background'.",
            inputs=[io.String.Input("text", default="a green moon above a blue ring on a checkered orange background",
                                    multiline=True,
                                    tooltip="Numbers, sizes, textures, colours, shapes, places. A word it does not know is "
                                            "an error that lists those it does.")],
            outputs=[io.Conditioning.Output(tooltip="The prompt, for a sampler.")])

    @classmethod
    def execute(cls, text):
        cond, pooled = encode(text)
        return io.NodeOutput([[cond, {"pooled_output": pooled}]])


class SVDQDemoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQDemoVAE", display_name="Demo VAE",
            search_aliases=["demo vae", "load demo vae"],
            description="Loads the VAE of the demo model that comes with this pack. Every other model has its own.",
            inputs=[], outputs=[io.Vae.Output(tooltip="The VAE, for VAE Decode.")])

    @classmethod
    def execute(cls):
        path = files("vae").get(VAE)
        if path is None:
            raise CheckpointError(f"{MODELS / 'vae' / VAE}: is not there, it comes with this pack. Install the pack again")
        tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
        vae.throw_exception_if_invalid()
        return io.NodeOutput(vae)
