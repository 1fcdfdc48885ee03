"""Graphs of the earlier SVDQuant pack (ComfyUI-nunchaku): its nodes that ours replace, and what is said of the rest.

ComfyUI replaces a node that is not installed by another with a table of inputs: on the page when its user asks for it ('Swap
Nodes'), in an API prompt by itself. What such a table cannot carry over, and nodes that nothing replaces, are named with a way
out: on the page after the swap (web/earlier_pack.js), in the log when an API prompt comes.

Test: tests/comfy/inprocess/checks_replacements.py, tests/comfy/test_earlier_graphs.py
"""

import logging
import sys
from dataclasses import dataclass

from comfy_api.latest import io

from ..svdq.errors import shown
from .loras import NONE, SLOTS
from .prompt_server import answer_with_texts, plain, running

log = logging.getLogger(__name__)

OLD_SLOTS = 15          # of its LoRA stack
MOST_NODES = 10_000     # of a graph that are looked at
MOST_SET = 1e9          # of a number: a larger one is no threshold and no device, and an int may be too large to be formatted
_said = set()


@dataclass(frozen=True)
class Replacement:
    """A node of ours for one of theirs.

    new       its id
    inputs    {what they call an input: (what ours does, what stands for one that an API prompt lacks)}
    widgets   their widgets in order: a graph has their values by place
    """
    new: str
    inputs: dict
    widgets: tuple

    def mapping(self):
        return [{"new_id": new, "old_id": old} for old, (new, _) in self.inputs.items()]


TEXT_ENCODERS = {"text_encoder1": ("clip_name1", ""), "text_encoder2": ("clip_name2", ""),
                 "t5_min_length": ("t5_min_length", 512)}
TEXT_WIDGETS = ("model_type", *TEXT_ENCODERS)
STACK = {"model": ("model", "")}
for slot in range(1, SLOTS + 1):
    STACK |= {f"lora_name_{slot}": (f"lora_{slot}", NONE), f"lora_strength_{slot}": (f"strength_{slot}", 1.0)}
REPLACED = {
    "NunchakuFluxDiTLoader": Replacement(
        "SVDQModelLoader", {"model_path": ("model_name", ""), "data_type": ("compute_dtype", "auto")},
        ("model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type", "i2f_mode")),
    "NunchakuFluxLoraLoader": Replacement(
        "SVDQLoraLoader", {"model": ("model", ""), "lora_name": ("lora_name", ""), "lora_strength": ("strength", 1.0)},
        ("lora_name", "lora_strength")),
    "NunchakuFluxLoraStack": Replacement("SVDQLoraStack", STACK, tuple(
        f"lora_{what}_{i}" for i in range(1, OLD_SLOTS + 1) for what in ("name", "strength"))),
    "NunchakuTextEncoderLoader": Replacement(
        "SVDQTextEncoderLoader", TEXT_ENCODERS, (*TEXT_WIDGETS, "use_4bit_t5", "int4_model")),
    "NunchakuTextEncoderLoaderV2": Replacement("SVDQTextEncoderLoader", TEXT_ENCODERS, TEXT_WIDGETS)}

PULID = ("PuLID for FLUX. Nothing in ComfyUI or here does that. Take a PuLID pack made for ComfyUI's own FLUX, which an SVDQ "
         "model is, or remove its nodes and connect the model past them")
IP_ADAPTER = ("the IP-Adapter of FLUX. A picture as a prompt is also what ComfyUI's own Redux nodes do (Load Style Model, CLIP "
              "Vision Encode, Apply Style Model). Take them, or an IP-Adapter pack made for ComfyUI's own FLUX")
DEPTH = ("a depth map. Install comfyui_controlnet_aux from the Manager and use its Depth Anything, or load a depth picture "
         "with Load Image")
# Nodes that nothing replaces -> what they are and a way out. The last two are of other packs, in graphs of that one
STAY = {
    "NunchakuPulidApply": PULID, "NunchakuPulidLoader": PULID,
    "NunchakuPuLIDLoaderV2": PULID, "NunchakuFluxPuLIDApplyV2": PULID,
    "NunchakuIPAdapterLoader": IP_ADAPTER, "NunchakuFluxIPAdapterApply": IP_ADAPTER, "NunchakuDepthPreprocessor": DEPTH,
    "NunchakuModelMerger": "a tool that makes one file of a folder. SVDQ Loader reads such folders as they are",
    "NunchakuWheelInstaller": "an installer of that pack, which is not needed here. Remove it",
    "NunchakuQwenImageDiTLoader": "the loader of Qwen-Image, which this pack does not run: it runs FLUX.1",
    "DepthAnythingPreprocessor": DEPTH,
    "ImageAndMaskResizeNode": "of ComfyUI-InpaintEasy. Install that from the Manager, or take ComfyUI's own Resize Image/Mask, "
                              "one for the picture and one for its mask"}


def register():
    """Tell the server, if there is one."""
    server = running()
    if server is None:
        return
    for old, ours in REPLACED.items():
        server.node_replace_manager.register(io.NodeReplace(
            new_node_id=ours.new, old_node_id=old, old_widget_ids=list(ours.widgets), input_mapping=ours.mapping(),
            output_mapping=[{"new_idx": 0, "old_idx": 0}]))
    server.add_on_prompt_handler(complete)
    answer_with_texts("/svdq/earlier_pack", notes_on_graph)


# ---- what is said

def notes_on_graph(nodes):
    """Of the nodes of an opened graph, [{"type", "widgets_values"}], as notes() gives it. Anything may come from a page."""
    found = []
    for node in nodes[:MOST_NODES] if isinstance(nodes, list) else ():
        kind, values = (node.get("type"), node.get("widgets_values")) if isinstance(node, dict) else (None, None)
        if isinstance(kind, str):
            widgets = REPLACED[kind].widgets if kind in REPLACED else ()
            found.append((kind, values if isinstance(values, dict) else
                          dict(zip(widgets, values)) if isinstance(values, list) else {}))
    return notes(found)


def notes(nodes):
    """What to tell the user of these [(type, {input: value})]: texts, each once. Nothing of nodes that are installed."""
    nodes = [(kind, inputs) for kind, inputs in nodes if kind not in _installed()]
    if not any(kind in REPLACED or kind in STAY and kind.startswith("Nunchaku") for kind, _ in nodes):
        return []
    texts, stay = [], {}
    for kind, inputs in nodes:
        texts += [f"{kind}: {text}" for text in _lost(kind, inputs)]
        if kind in STAY:
            stay.setdefault(STAY[kind], {})[kind] = None
    texts += [f"{' and '.join(kinds)}: no replacement. This is {what}." for what, kinds in stay.items()]
    return list(dict.fromkeys(texts))


def _lost(kind, inputs):
    """What of a node's values its replacement does without."""
    if kind == "NunchakuFluxDiTLoader":
        if _is_set(inputs.get("cache_threshold")):
            yield (f"cache_threshold {inputs['cache_threshold']:.3g} is not carried over, so every step is computed. ComfyUI's "
                   "own EasyCache or LazyCache, put behind SVDQ Loader, skips steps. Its reuse_threshold is another "
                   "measure.")
        if _is_set(inputs.get("device_id")):
            yield ("device_id is not carried over. ComfyUI computes on the GPU that it was started with, see its option "
                   "--cuda-device.")
    if kind == "NunchakuFluxLoraStack":
        beyond = [name for i, name, _ in _loras(inputs) if i > SLOTS]
        if beyond:
            yield (f"{_listed(beyond)} of slot {SLOTS + 1} and above would be lost: SVDQ LoRA Stack has {SLOTS}. Put a second "
                   "stack behind the first for these.")
    if kind == "NunchakuTextEncoderLoader" and inputs.get("use_4bit_t5") == "enable":
        yield ("the 4-bit T5 of a folder is not carried over, and the T5 named beside it is loaded. For less memory choose "
               "awq-int4-flux.1-t5xxl.safetensors in SVDQ Text Encoder Loader.")


def _is_set(value):
    return isinstance(value, (int, float)) and 0 < value < MOST_SET


def _loras(inputs):
    """[(slot, name, strength)] in use; either may be a link."""
    slots = [(i, inputs.get(f"lora_name_{i}"), inputs.get(f"lora_strength_{i}", 1.0)) for i in range(1, OLD_SLOTS + 1)]
    return [(i, name, strength) for i, name, strength in slots if name not in (None, NONE, "")]


def _listed(names):
    return ", ".join(shown(name) if isinstance(name, str) else "a linked LoRA" for name in names)


def _installed():
    """Of ComfyUI, as it has them now."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


# ---- API prompts

def complete(request):
    """Give old nodes in an API prompt what ComfyUI's replacement takes for granted, `_meta` and every input; without it the
    answer would be HTTP 500. What they then lack, ComfyUI's validation names. LoRAs that one stack of ours has no slot for get
    stacks of their own in front of it.
    """
    prompt = request.get("prompt") if isinstance(request, dict) else None
    found = []
    for key, node in list(prompt.items()) if isinstance(prompt, dict) else ():
        kind = node.get("class_type") if isinstance(node, dict) else None
        if not isinstance(kind, str) or not isinstance(node.get("inputs"), dict):
            continue
        old = REPLACED.get(kind)
        if old and kind not in _installed():
            if not isinstance(node.get("_meta"), dict):
                node["_meta"] = {}
            if kind == "NunchakuFluxLoraStack":
                _split_stack(prompt, key, node)
            node["inputs"] = {name: value for name, (_, value) in old.inputs.items()} | node["inputs"]
        found.append((kind, node["inputs"]))
    for text in notes(found):
        if text not in _said:
            _said.add(text)
            log.warning("SVDQ: a graph of ComfyUI-nunchaku: %s", plain(text))
    return request


def _split_stack(prompt, key, node):
    """Leave a stack its last LoRAs, as many as ours has slots; those before them go into new stacks of ours."""
    loras, model = _loras(node["inputs"]), node["inputs"].get("model", "")
    while len(loras) > SLOTS:
        new = next(name for i in range(len(prompt) + 1) if (name := f"{key}.{i}") not in prompt)
        inputs = {"model": model}
        for i, (_, name, strength) in enumerate(loras[:SLOTS], 1):
            inputs |= {f"lora_{i}": name, f"strength_{i}": strength}
        prompt[new] = {"class_type": REPLACED["NunchakuFluxLoraStack"].new, "inputs": inputs, "_meta": dict(node["_meta"])}
        loras, model = loras[SLOTS:], [new, 0]
    node["inputs"] = {"model": model}
    for i, (_, name, strength) in enumerate(loras, 1):
        node["inputs"] |= {f"lora_name_{i}": name, f"lora_strength_{i}": strength}
