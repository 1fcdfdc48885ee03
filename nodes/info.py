"""Say what an SVDQ model in the models folder is."""

from comfy_api.latest import io

from ..svdq import report
from .models import names, path_of, stamp
from .prompt_server import show


class SVDQInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQInfo", display_name="SVDQ Info", is_output_node=True,
            search_aliases=["inspect model", "model info", "what is this file"],
            description="Shows what an SVDQ file holds (model, precision, rank, size) and what is wrong with it, without "
                        "loading it.",
            inputs=[io.Combo.Input("model_name", options=names(),
                                   tooltip="A file of models/diffusion_models, or a legacy SVDQ folder in it.")],
            outputs=[io.String.Output(display_name="report", tooltip="What the file is, in words.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def fingerprint_inputs(cls, model_name):
        return model_name, stamp(path_of(model_name))

    @classmethod
    def execute(cls, model_name):
        text = show(report.as_text(report.describe(path_of(model_name))), cls)
        return io.NodeOutput(text, ui={"text": (text,)})
