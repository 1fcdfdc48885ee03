"""Graphs of the earlier pack as API prompts, through ComfyUI's own replacement, and what is said of them."""

import copy
import logging
import re
from types import SimpleNamespace

import pytest

from svdq_pack.tests.comfy import earlier_graphs
from svdq_pack.tests.comfy.earlier_graphs import GRAPHS, RUN_AS_THEY_ARE, SAID
from svdq_pack.tests.comfy.inprocess import support      # noqa: F401, chooses the tree
from svdq_pack.nodes import NODES, replacements
from svdq_pack.nodes.loras import SLOTS

import nodes                    # noqa: E402
from app.node_replace_manager import NodeReplaceManager     # noqa: E402

OURS = {node.GET_SCHEMA().node_id: node for node in NODES}
STACK = "NunchakuFluxLoraStack"


@pytest.fixture
def replaced(monkeypatch):
    """replaced(prompt) -> the same prompt after ComfyUI made ours of the old nodes in it."""
    manager, handlers, asked = NodeReplaceManager(), [], []
    monkeypatch.setattr(replacements, "running", lambda: SimpleNamespace(node_replace_manager=manager,
                                                                         add_on_prompt_handler=handlers.append))
    monkeypatch.setattr(replacements, "answer_with_texts", lambda *given: asked.append(given))
    monkeypatch.setattr(replacements, "_said", set())
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", nodes.NODE_CLASS_MAPPINGS | OURS)
    replacements.register()
    handler, = handlers
    assert asked == [("/svdq/earlier_pack", replacements.notes_on_graph)]

    def apply(prompt):
        manager.apply_replacements(handler({"prompt": prompt})["prompt"])
        return prompt
    return apply


def prompt_of(found):
    """An API prompt of nodes as earlier_graphs has them."""
    prompt = {}
    for i, (kind, values) in enumerate(found):
        widgets = replacements.REPLACED[kind].widgets if kind in replacements.REPLACED else ()
        prompt[str(i)] = {"class_type": kind, "inputs": dict(zip(widgets, values))}
        if "Lora" in kind:
            prompt[str(i)]["inputs"]["model"] = [str(i - 1), 0]
    return prompt


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, replaced, caplog):
    """Types, values and links of all 16, and a word about what does not go over: in the log, once."""
    found, after = GRAPHS[name]
    caplog.set_level(logging.WARNING)
    prompt = replaced(prompt_of(found))
    assert [node["class_type"] for node in prompt.values()] == after
    for (kind, values), node in zip(found, prompt.values()):
        if kind == "NunchakuFluxDiTLoader":
            assert node["inputs"] == {"model_name": values[0], "compute_dtype": "bfloat16"}
        elif kind == "NunchakuFluxLoraLoader":
            assert node["inputs"].pop("model")[1] == 0 and node["inputs"] == {"lora_name": values[0], "strength": values[1]}
        elif "TextEncoder" in kind:
            assert node["inputs"] == {"clip_name1": values[1], "clip_name2": values[2], "t5_min_length": 512}
    said = caplog.text
    assert all(words in said for words in SAID.get(name, ())) and bool(said) == (name in SAID)
    caplog.clear()
    replaced(prompt_of(found))
    assert not caplog.text


def test_how_many_need_no_other_pack():
    assert len(GRAPHS) == 16
    assert sum(all(kind in OURS for kind in after) for _, after in GRAPHS.values()) == RUN_AS_THEY_ARE


@pytest.mark.parametrize("old", replacements.REPLACED)
def test_every_input_exists(old):
    """Of ours that values go to; of theirs that they come from, in the order in which graphs keep them."""
    ours = replacements.REPLACED[old]
    assert {new for new, _ in ours.inputs.values()} <= {given.id for given in OURS[ours.new].GET_SCHEMA().inputs}
    assert set(ours.inputs) <= {*ours.widgets, "model"}


@pytest.mark.parametrize("name", GRAPHS)
def test_opened_graphs(name):
    """What the page asks: values come by place, or by name."""
    found, _ = GRAPHS[name]
    texts = replacements.notes_on_graph([{"type": kind, "widgets_values": values} for kind, values in found])
    assert all(words in "\n".join(texts) for words in SAID.get(name, ())) and bool(texts) == (name in SAID)
    assert len(texts) == len(set(texts))
    by_name = [{"type": kind, "widgets_values": node["inputs"]} for (kind, _), node in zip(found, prompt_of(found).values())]
    assert replacements.notes_on_graph(by_name) == texts


def test_nothing_is_said_of_what_is_installed(monkeypatch):
    found, _ = GRAPHS["dev-pulid"]
    graph = [{"type": kind, "widgets_values": values} for kind, values in found]
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", dict.fromkeys(kind for kind, _ in found))
    assert replacements.notes_on_graph(graph) == []
    assert replacements.notes_on_graph([{"type": "DepthAnythingPreprocessor"}]) == []      # another pack's graph, no concern


@pytest.mark.parametrize("kind", sorted(earlier_graphs.NODES))
def test_every_node_has_a_replacement_or_a_way_out(kind):
    """Alone in a graph, too."""
    texts = replacements.notes_on_graph([{"type": kind, "widgets_values": []}])
    if kind in replacements.REPLACED:
        assert texts == []
    else:
        text, = texts
        assert text.startswith(f"{kind}: no replacement. This is ")


@pytest.mark.parametrize("graph", [
    None, 3, "x", {}, [None, 3, [], {}], [{"type": ["x"]}], [{"type": "NunchakuFluxDiTLoader"}],
    [{"type": "NunchakuFluxDiTLoader", "widgets_values": ["a", value]}
     for value in (None, "0.1", [], float("nan"), float("inf"), 10 ** 400, -1, 0)],
    [{"type": "NunchakuFluxDiTLoader", "widgets_values": "abc"}, {"type": STACK, "widgets_values": [None] * 40}]], ids=str)
def test_any_graph_may_be_asked_about(graph):
    assert replacements.notes_on_graph(graph) == []


@pytest.mark.parametrize("kind, values, words", [
    ("NunchakuFluxDiTLoader", ["a", 0, "nunchaku-fp16", "auto", 1, "bfloat16"], "device_id is not carried over.*--cuda-device"),
    ("NunchakuTextEncoderLoader", ["flux", "a", "b", 512, "enable", "t5-folder"], "choose awq-int4-flux.1-t5xxl.safetensors"),
    (STACK, [value for i in range(1, 8) for value in (f"{i}.safetensors", 1.0)], "6.safetensors, 7.safetensors of slot 6"),
    (STACK, ["None", 1.0] * 5 + ["a\nb" + "x" * 500, 1.0], r": 'a\\nbx{90,100}\.\.\. of slot 6")])
def test_values_that_are_lost(kind, values, words):
    text, = replacements.notes_on_graph([{"type": kind, "widgets_values": values}])
    assert re.search(words, text)


@pytest.mark.parametrize("count", range(16))
@pytest.mark.parametrize("gaps", [False, True])
def test_stack(count, gaps, replaced, caplog):
    """However many of its fifteen slots are in use, every LoRA comes, in their order: in stacks of ours, one behind another."""
    slots = range(1, 16)[16 - count - 1 if gaps else 0:][:count]
    names = {f"lora_name_{i}": f"{i}.safetensors" if i in slots else "None" for i in range(1, 16)}
    strengths = {f"lora_strength_{i}": i / 10 for i in range(1, 16)}
    prompt = replaced({"1": {"class_type": "Loader", "inputs": {}},
                       "9": {"class_type": "Sampler", "inputs": {"model": ["2", 0]}},
                       "2": {"class_type": STACK, "inputs": {"model": ["1", 0], **names, **strengths}}})
    order, at = [], prompt["9"]["inputs"]["model"]
    while at != ["1", 0]:
        node = prompt[at[0]]
        assert node["class_type"] == "SVDQLoraStack" and at[1] == 0 and "_meta" in node
        used = [(node["inputs"][f"lora_{i}"], node["inputs"][f"strength_{i}"]) for i in range(1, SLOTS + 1)
                if node["inputs"].get(f"lora_{i}", "None") != "None"]
        order, at = used + order, node["inputs"]["model"]
    assert order == [(f"{i}.safetensors", i / 10) for i in slots] and "lost" not in caplog.text


def test_stack_without_inputs(replaced):
    assert replaced({"1": {"class_type": STACK, "inputs": {}}})["1"]["inputs"] == {"model": ""} | {
        name: value for i in range(1, SLOTS + 1) for name, value in ((f"lora_{i}", "None"), (f"strength_{i}", 1.0))}


@pytest.mark.parametrize("kind, inputs, wanted", [
    ("NunchakuFluxDiTLoader", {"model_path": "a"}, {"model_name": "a", "compute_dtype": "auto"}),
    ("NunchakuFluxDiTLoader", {"model_path": "a", "data_type": "float16", "attention": "x"},
     {"model_name": "a", "compute_dtype": "float16"}),
    ("NunchakuFluxDiTLoader", {}, {"model_name": "", "compute_dtype": "auto"}),
    ("NunchakuFluxLoraLoader", {"model": ["1", 0], "lora_name": "a"}, {"model": ["1", 0], "lora_name": "a", "strength": 1.0}),
    ("NunchakuFluxLoraLoader", {"model": ["1", 0], "lora_name": "a", "lora_strength": 0.0},
     {"model": ["1", 0], "lora_name": "a", "strength": 0.0}),
    ("NunchakuFluxLoraLoader", {}, {"model": "", "lora_name": "", "strength": 1.0}),
    ("NunchakuTextEncoderLoaderV2", {"text_encoder1": "a"}, {"clip_name1": "a", "clip_name2": "", "t5_min_length": 512})])
@pytest.mark.parametrize("about", [{}, {"_meta": None}, {"_meta": {"title": "x"}}])
def test_what_scripts_leave_out(kind, inputs, wanted, about, replaced):
    prompt = replaced({"1": {"class_type": kind, "inputs": inputs, **about}})
    assert prompt["1"] == {"class_type": replacements.REPLACED[kind].new, "inputs": wanted, "_meta": about.get("_meta") or {}}


@pytest.mark.parametrize("request_", [
    None, [], {}, {"prompt": None}, {"prompt": ["1"]},
    {"prompt": {"1": None, "2": {}, "3": {"class_type": ["x"], "inputs": {}}}},
    {"prompt": {"1": {"class_type": "NunchakuFluxLoraLoader"}}}, {"prompt": {"1": {"class_type": "KSampler", "inputs": {}}}},
    {"prompt": {"1": {"class_type": "NunchakuFluxLoraLoader", "inputs": []}}}], ids=str)
def test_prompts_without_such_nodes_stay(request_):
    before = copy.deepcopy(request_)
    assert replacements.complete(request_) is request_ and request_ == before


def test_prompts_of_an_installed_pack_stay(monkeypatch):
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {STACK: object})
    request = {"prompt": {"1": {"class_type": STACK, "inputs": {f"lora_name_{i}": "a" for i in range(1, 16)}}}}
    before = copy.deepcopy(request)
    assert replacements.complete(request) == before
