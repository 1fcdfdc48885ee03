"""Old workflows: nodes of the earlier SVDQuant pack that ours replace, offered by ComfyUI under 'Swap Nodes'."""

import logging
import sys

from comfy_api.latest import io

log = logging.getLogger(__name__)


def register():
    """Tell ComfyUI, where it is new enough to listen and a server runs."""
    server = sys.modules.get("server")                  # importing it here would build routes nobody serves
    try:
        manager, replace = server.PromptServer.instance.node_replace_manager, io.NodeReplace
    except AttributeError as missing:
        log.debug("SVDQ: node replacements are not offered: %s", missing)
        return
    manager.register(replace(
        new_node_id="SVDQModelLoader", old_node_id="NunchakuFluxDiTLoader",
        old_widget_ids=["model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type"],
        input_mapping=[{"new_id": "model_name", "old_id": "model_path"},
                       {"new_id": "compute_dtype", "old_id": "data_type"}],
        output_mapping=[{"new_idx": 0, "old_idx": 0}]))
    manager.register(replace(
        new_node_id="LoraLoaderModelOnly", old_node_id="NunchakuFluxLoraLoader",
        old_widget_ids=["lora_name", "lora_strength"],
        input_mapping=[{"new_id": "model", "old_id": "model"}, {"new_id": "lora_name", "old_id": "lora_name"},
                       {"new_id": "strength_model", "old_id": "lora_strength"}],
        output_mapping=[{"new_idx": 0, "old_idx": 0}]))
