"""The demo model that comes with the pack: its files, which loaders list, and its text encoder."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..svdq.demo import encode

MODELS = Path(__file__).resolve().parents[1] / "workflows" / "models"
for kind in ("diffusion_models", "vae", "loras"):
    folder_paths.add_model_folder_path(kind, str(MODELS / kind))


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
