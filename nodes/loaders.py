"""Load an SVDQ FLUX model: from disk, or from Hugging Face to disk first."""

import logging
import os

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..svdq import hub
from ..svdq.kernels import build, registry
from ..svdq.kernels.variant import Target
from .host.load import compute_dtype, load_model
from .models import act_bits_input, compute_dtype_input, download_folder, listed, model_output, names, path_of, settings, stamp
from .prompt_server import teller

log = logging.getLogger(__name__)

# The page ranks by the shown name, the shorter first; aliases only make a hit, and all words searched for must be in one.
ALIASES = ["nunchaku", "svdquant", "svdq", "4bit", "4-bit", "int4", "nvfp4", "fp4", "quantized flux", "dit loader",
           "load svdq model", "nunchaku flux dit loader", "load diffusion model", "unet loader", "flux loader"]
NBYTES = 6.8e9      # of a published file


class SVDQModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/loaders", node_id="SVDQModelLoader", display_name="SVDQ Loader", search_aliases=ALIASES,
            description="Loads a 4-bit SVDQuant FLUX model (svdq-int4_... or svdq-fp4_...). The MODEL is ComfyUI's own "
                        "FLUX: samplers, ControlNet, LoRA and other nodes work with it as with any other.",
            inputs=[io.Combo.Input("model_name", options=names(),
                                   tooltip="A file of models/diffusion_models, or a legacy SVDQ folder in it."),
                    compute_dtype_input(), act_bits_input()],
            outputs=[model_output()], hidden=[io.Hidden.unique_id])

    @classmethod
    def fingerprint_inputs(cls, model_name, compute_dtype="auto", act_bits="auto"):
        """A file that was replaced under the same name is loaded again."""
        return model_name, compute_dtype, act_bits, stamp(path_of(model_name))

    @classmethod
    def execute(cls, model_name, compute_dtype="auto", act_bits="auto"):
        return io.NodeOutput(load_model(path_of(model_name), *settings(compute_dtype, act_bits), say=teller(cls)))


class SVDQHubLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/loaders", node_id="SVDQHubLoader", display_name="SVDQ Loader from Hugging Face",
            search_aliases=[*ALIASES, "download", "huggingface"],
            description="Downloads an SVDQ FLUX model into models/diffusion_models unless it is there already, then "
                        "loads it. Nothing is fetched before this node runs.",
            inputs=[io.Combo.Input("repo_id", options=hub.REPOSITORIES, default=hub.REPOSITORIES[0],
                                   tooltip="The repository on Hugging Face. Another one: write its name into other_repo_id."),
                    io.String.Input("filename", default="", optional=True,
                                    tooltip="The .safetensors file in it. Empty: the rank-32 file that is better here, as SVDQ "
                                            "Doctor says; the one in models/diffusion_models if it is there."),
                    io.String.Input("revision", default="main", optional=True, advanced=True,
                                    tooltip="Branch, tag or commit."),
                    compute_dtype_input(), act_bits_input(),
                    io.String.Input("other_repo_id", default="", optional=True, advanced=True,
                                    tooltip="owner/name of a repository that repo_id does not list. Empty: repo_id.")],
            outputs=[model_output(), io.String.Output(display_name="model_name",
                                                         tooltip="The file's name in models/diffusion_models.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, repo_id):
        """That repo_id is among its choices is not asked: graphs of the API name any repository."""
        return True

    @classmethod
    def execute(cls, repo_id, filename="", revision="main", compute_dtype="auto", act_bits="auto", other_repo_id=""):
        chosen, folder = settings(compute_dtype, act_bits), download_folder()
        repository, filename = str(other_repo_id or "").strip() or str(repo_id), str(filename or "").strip()
        path, notice = hub.download(repository, filename, str(revision or "main"), folder,
                                    wants_fp4=not filename and _wants_fp4(*chosen, teller(cls)), progress=_Progress(),
                                    say=teller(cls))
        if notice:
            log.warning("SVDQ: %s", notice)
        return io.NodeOutput(load_model(path, *chosen, say=teller(cls, notice)), listed(os.path.relpath(path, folder)))


def _wants_fp4(dtype, act_bits, say=lambda text: None):
    """Whether the fp4 file is the better one on the device that ComfyUI computes on."""
    device = comfy.model_management.get_torch_device()
    with build.telling(say):
        return registry.precision_for(Target.of(device), compute_dtype(device, NBYTES, dtype), act_bits) == "nvfp4"


class _Progress:
    """Feeds hub.download's byte counts to the node's progress bar; an interrupt in the UI ends the download."""
    bar = None

    def __call__(self, done, total):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total:
            self.bar = self.bar or comfy.utils.ProgressBar(total)
            self.bar.update_absolute(done, total)
