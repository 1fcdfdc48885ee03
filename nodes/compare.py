"""Say how far the pictures of a quantised model are from those of the 16-bit one."""

from comfy_api.latest import io, ui

from ..svdq import compare
from .prompt_server import show


class SVDQCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQCompare", display_name="SVDQ Compare", is_output_node=True,
            search_aliases=["quality", "psnr", "ssim", "lpips", "difference", "side by side"],
            description="Compares pictures of a 16-bit model with those of its quantised version, made with the same "
                        "prompts and seeds: PSNR, SSIM, LPIPS, the same between two seeds as a yardstick, and a sheet.",
            inputs=[io.Image.Input("reference", tooltip="Pictures of the 16-bit model, a batch of four or more at best."),
                    io.Image.Input("quantised", tooltip="Pictures of the quantised model: same prompt, seed and size."),
                    io.Latent.Input("reference_latent", optional=True,
                                    tooltip="What the reference pictures were decoded from, for the latent metrics."),
                    io.Latent.Input("quantised_latent", optional=True,
                                    tooltip="What the quantised model's pictures were decoded from.")],
            outputs=[io.String.Output(display_name="report", tooltip="All numbers, in words."),
                     io.Image.Output(display_name="sheet",
                                     tooltip="A row per pair: reference, quantised, 8 times their difference.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo])

    @classmethod
    def execute(cls, reference, quantised, reference_latent=None, quantised_latent=None):
        if (reference_latent is None) != (quantised_latent is None):
            raise compare.CompareError("one latent is connected and the other is not. Connect both, or neither")
        latents = None if reference_latent is None else (reference_latent.get("samples"), quantised_latent.get("samples"))
        text = show(compare.as_text(compare.compare((reference, quantised), latents)), cls)
        sheet = compare.sheet(reference, quantised)[None]
        return io.NodeOutput(text, sheet, ui={"text": (text,), **ui.PreviewImage(sheet, cls=cls).as_dict()})
