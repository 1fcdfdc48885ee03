"""What ComfyUI sees. Only nodes/ imports comfy or folder_paths."""

from . import replacements
from .calibration import SVDQCaptureCalibration
from .compare import SVDQCompare
from .conditioning import SVDQLoadConditioning, SVDQSaveConditioning
from .demo import SVDQDemoPrompt, SVDQDemoVAE
from .doctor import SVDQDoctor
from .info import SVDQInfo
from .loaders import SVDQHubLoader, SVDQModelLoader
from .loras import SVDQLoraLoader, SVDQLoraStack
from .quantize import SVDQQuantize
from .text_encoder import SVDQTextEncoderLoader

NODES = [SVDQModelLoader, SVDQHubLoader, SVDQLoraLoader, SVDQLoraStack, SVDQCaptureCalibration, SVDQQuantize, SVDQCompare,
         SVDQInfo, SVDQDoctor, SVDQTextEncoderLoader, SVDQLoadConditioning, SVDQSaveConditioning, SVDQDemoPrompt, SVDQDemoVAE]

NODE_CLASS_MAPPINGS = {node.GET_SCHEMA().node_id: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node_id: node.GET_SCHEMA().display_name for node_id, node in NODE_CLASS_MAPPINGS.items()}

replacements.register()
