"""Say what of this pack runs on this machine."""

from comfy_api.latest import io

from ..svdq import doctor
from ..svdq.kernels import build
from .prompt_server import show, teller


class SVDQDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/tools", node_id="SVDQDoctor", display_name="SVDQ Doctor", is_output_node=True,
            search_aliases=["diagnostics", "self-test", "is it fast here", "gpu info", "which kernels"],
            description="Says what this machine is, which path SVDQ files of each kind run on here and why, and whether "
                        "the kernels pass their self-test.",
            inputs=[], outputs=[io.String.Output(display_name="report", tooltip="All of it, in words.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def fingerprint_inputs(cls):
        """Unequal to itself: each run looks again."""
        return float("nan")

    @classmethod
    def execute(cls):
        say = teller(cls)
        say("building kernels if need be, and testing them")
        with build.telling(say):
            text = show(doctor.summary(doctor.describe()), cls)
        return io.NodeOutput(text, ui={"text": (text,)})
