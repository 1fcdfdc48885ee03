"""Old workflows: nodes of the earlier SVDQuant pack that ours replace, offered by ComfyUI under 'Swap Nodes'."""

from comfy_api.latest import io

from .prompt_server import running


def register():
    """Tell the server, if there is one."""
    server = running()
    if server is None:
        return
    manager = server.node_replace_manager
    manager.register(io.NodeReplace(
        new_node_id="SVDQModelLoader", old_node_id="NunchakuFluxDiTLoader",
        old_widget_ids=["model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type"],
        input_mapping=[{"new_id": "model_name", "old_id": "model_path"},
                       {"new_id": "compute_dtype", "old_id": "data_type"}],
        output_mapping=[{"new_idx": 0, "old_idx": 0}]))
    manager.register(io.NodeReplace(
        new_node_id="SVDQLoraLoader", old_node_id="NunchakuFluxLoraLoader",
        old_widget_ids=["lora_name", "lora_strength"],
        input_mapping=[{"new_id": "model", "old_id": "model"}, {"new_id": "lora_name", "old_id": "lora_name"},
                       {"new_id": "strength", "old_id": "lora_strength"}],
        output_mapping=[{"new_idx": 0, "old_idx": 0}]))
    # Its stack stays to be replaced by hand: it has fifteen slots, and what ours have no place for would be lost unseen.
