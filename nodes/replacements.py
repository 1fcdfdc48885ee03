"""Old workflows: nodes of the earlier SVDQuant pack that ours replace, offered by ComfyUI under 'Swap Nodes'."""

from comfy_api.latest import io

from .prompt_server import running

# What the old nodes call their inputs, what ours do, and what stands for one that an API prompt lacks
MODEL_INPUTS = {"model_path": ("model_name", ""), "data_type": ("compute_dtype", "auto")}
LORA_INPUTS = {"model": ("model", ""), "lora_name": ("lora_name", ""), "lora_strength": ("strength", 1.0)}
REPLACED = {"NunchakuFluxDiTLoader": MODEL_INPUTS, "NunchakuFluxLoraLoader": LORA_INPUTS}


def register():
    """Tell the server, if there is one."""
    server = running()
    if server is None:
        return
    manager = server.node_replace_manager
    manager.register(io.NodeReplace(
        new_node_id="SVDQModelLoader", old_node_id="NunchakuFluxDiTLoader",
        old_widget_ids=["model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type"],
        input_mapping=_mapping(MODEL_INPUTS), output_mapping=[{"new_idx": 0, "old_idx": 0}]))
    manager.register(io.NodeReplace(
        new_node_id="SVDQLoraLoader", old_node_id="NunchakuFluxLoraLoader",
        old_widget_ids=["lora_name", "lora_strength"],
        input_mapping=_mapping(LORA_INPUTS), output_mapping=[{"new_idx": 0, "old_idx": 0}]))
    # Its stack stays to be replaced by hand: it has fifteen slots, and what ours have no place for would be lost unseen.
    server.add_on_prompt_handler(complete)


def _mapping(inputs):
    return [{"new_id": new, "old_id": old} for old, (new, _) in inputs.items()]


def complete(request):
    """Give old nodes in an API prompt what ComfyUI's replacement takes for granted, `_meta` and every input; without it the
    answer would be HTTP 500. What they then lack, ComfyUI's validation names.
    """
    prompt = request.get("prompt") if isinstance(request, dict) else None
    for node in prompt.values() if isinstance(prompt, dict) else ():
        old = REPLACED.get(str(node.get("class_type"))) if isinstance(node, dict) else None
        if old and isinstance(node.get("inputs"), dict):
            if not isinstance(node.get("_meta"), dict):
                node["_meta"] = {}
            node["inputs"] = {name: value for name, (_, value) in old.items()} | node["inputs"]
    return request
