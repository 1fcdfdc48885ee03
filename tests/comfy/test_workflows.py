"""The bundled workflows: UI form, which users open, and API form, which /prompt takes. And the help pages.

Both forms agree, ComfyUI accepts them, and they say what they need.
"""

import contextlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from svdq_pack.tools.templates import forms, make
from svdq_pack.tools.templates.graphs import PICTURE, TEMPLATES
from svdq_pack.workflows.headless.client import Rejected

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
DEMO, DEV = "svdq-00-demo", "svdq-10-flux-dev-text-to-image"
DEMOS = {DEMO, DEMO + make.APP, "svdq-01-demo-lora"}            # their files come with the pack
PACKED = sorted((FOLDER / "models").rglob("*.safetensors"))
NOTES = {"Note", "MarkdownNote"}
MUTED = 2


@contextlib.contextmanager
def files_in_place(base):
    """An empty file under every name the workflows ask for, and their picture; the pack itself brings the demo's."""
    mine = {base / "models" / directory / model for name in NAMES for model, _, directory in needed(name)}
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    Image.new("RGB", (64, 64)).save(base / "input" / PICTURE)
    yield
    for path in (*mine, base / "input" / PICTURE):
        path.unlink()


@pytest.fixture(scope="module")
def client(server, base):
    with files_in_place(base):
        yield server.client


@pytest.fixture(scope="module")
def object_info(client):
    return client.object_info()


def opened(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def queued(name):
    return json.loads((FOLDER / "api" / f"{name.removesuffix(make.APP)}.json").read_text(encoding="utf-8"))


def nodes(name):
    return [node for node in opened(name)["nodes"] if node["type"] not in NOTES]


def needed(name):
    """[(name, url, directory)] of the models a workflow asks for."""
    return [(model["name"], model["url"], model["directory"])
            for node in nodes(name) for model in node["properties"].get("models", [])]


def to_api(graph, object_info):
    """The frontend's graphToPrompt, for graphs without subgraphs and reroutes.

    The UI form stores widget values by position only; a seed is followed by its "control after generate", a picture's name by
    the upload button.
    """
    origins = {link: [str(node), slot] for link, node, slot, *_ in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES or node["mode"] == MUTED:
            continue
        info = object_info[node["type"]]
        links = {entry["name"]: origins[entry["link"]] for entry in node["inputs"] if entry.get("link") is not None}
        values, inputs = iter(node["widgets_values"]), {}
        for name, (kind, options) in forms.declared(info).items():
            if forms.is_widget(kind):
                inputs[name] = next(values)
                if options.get("control_after_generate") or options.get("image_upload"):
                    next(values)
            if name in links:
                inputs[name] = links[name]
        assert not list(values), f"node {node['id']} has more values than widgets"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs,
                                   "_meta": {"title": node.get("title", info["display_name"])}}
    return prompt


def test_every_workflow_has_both_forms_and_a_picture():
    names = {template.name for template in TEMPLATES}
    assert set(NAMES) == names | {template.name + make.APP for template in TEMPLATES if template.app} and len(names) == 29
    assert sorted(names) == sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
    assert NAMES == sorted(path.stem for path in FOLDER.glob("*.jpg"))


def test_files_are_what_the_generator_writes(object_info):
    made = make.files(object_info)
    assert made.keys() == make.present()
    stale = [path for path, text in made.items() if (make.ROOT / path).read_text(encoding="utf-8") != text]
    assert not stale, "python3 tools/templates/make.py writes them anew"


def test_the_oldest_comfyui_takes_the_same(servers, object_info):
    """Its nodes have the same inputs. A few had no outputs yet; nothing is linked to those."""
    older = servers("oldest").client.object_info()
    for template in TEMPLATES:
        assert forms.api_form(template, older, muted=True) == forms.api_form(template, object_info, muted=True)
        here, there = (forms.canvas_form(template, definitions) for definitions in (object_info, older))
        for node, other in zip(here["nodes"], there["nodes"]):
            missing = node["outputs"][len(other["outputs"]):]
            assert node | {"outputs": node["outputs"][:len(other["outputs"])], "size": 0} == other | {"size": 0}
            assert not any(output["links"] for output in missing)


def test_a_template_that_does_not_fit_is_refused(object_info):
    def form(**values):
        made = forms.Template("t", "", "", "", [forms.Group("", ({"a": forms.Node("VAEDecode", None, values),
                                                                 "b": forms.Node("VAELoader", None, {})},))])
        return forms.api_form(made, object_info)

    assert form(vae="b")["1"]["inputs"] == {"vae": ["2", 0]}
    for values, message in (({"seed": 1}, "no input seed"), ({"vae": "c"}, "not there"), ({"samples": "b"}, "takes LATENT")):
        with pytest.raises(forms.TemplateError, match=message):
            form(**values)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(name):
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.size == (400, 400)
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_forms_are_where_they_belong(name):
    """The template browser lists every JSON file of the top level; an API form there opens as a heap of nodes."""
    assert {"nodes", "links", "groups", "version"} <= opened(name).keys()
    assert all({"class_type", "inputs"} <= node.keys() for node in queued(name).values())


@pytest.mark.parametrize("name", NAMES)
def test_forms_agree(name, object_info):
    assert to_api(opened(name), object_info) == queued(name)


def test_comfyui_refuses_it_without_its_model(client):
    """That each runs with its files: test_templates_run.py."""
    prompt = queued(DEV)
    loader, = (node for node in prompt.values() if node["class_type"] == "SVDQModelLoader")
    loader["inputs"]["model_name"] = "svdq-int4_r32-no-such-file.safetensors"
    with pytest.raises(Rejected, match=r"\(SVDQModelLoader\), input model_name: Value not in list"):
        client.queue(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_name_their_pack(name, object_info):
    for node in nodes(name):
        ours = object_info[node["type"]]["python_module"].startswith("custom_nodes.")
        assert node["properties"]["cnr_id"] == (forms.REGISTRY_ID if ours else forms.CORE_ID), node["type"]


def test_registry_id():
    project = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^\[project\]\nname = "(.+)"$', project, re.MULTILINE)[1] == forms.REGISTRY_ID


@pytest.mark.parametrize("name", NAMES)
def test_models_can_be_fetched_by_name(name):
    """The frontend offers to download what a loader names in properties.models and the folders lack."""
    values = {value for node in nodes(name) for value in node["widgets_values"] if str(value).endswith(".safetensors")}
    if name in DEMOS:
        assert needed(name) == [] and values <= {path.name for path in PACKED}
        return
    assert {model for model, _, _ in needed(name)} == values - {path.name for path in PACKED}
    note = "".join(node["widgets_values"][0] for node in opened(name)["nodes"] if node["type"] in NOTES)
    for model, url, directory in needed(name):
        found = re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/(?:.+/)?([^/]+)", url)
        assert f"**{directory}** / [{model}]({url})" in note
        assert found[1] == model or f"there called {found[1]}: save it under this name" in note


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_fixed(name):
    """A template gives the same picture twice."""
    samplers = [node for node in nodes(name) if node["type"] == "KSampler"]
    assert all(node["widgets_values"][1] == "fixed" for node in samplers)


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    """Nothing overlaps, every node lies in the group that names its step, and links lead to the right or to a later row."""
    graph = opened(name)
    title = 30                                  # a node's title bar lies above its position
    boxes = {node["id"]: (node["pos"][0], node["pos"][1] - title, node["size"][0], node["size"][1] + title)
             for node in graph["nodes"]}
    groups = [group["bounding"] for group in graph["groups"]]
    for some in (list(boxes.values()), groups):
        assert not [(a, b) for i, a in enumerate(some) for b in some[:i] if overlap(a, b)]
    for node in nodes(name):
        assert any(contains(group, boxes[node["id"]]) for group in groups), node["type"]
    position = {node["id"]: (next(group[1] for group in groups if contains(group, boxes[node["id"]])), node["pos"][0])
                for node in nodes(name)}
    assert all(position[origin] <= position[target] for _, origin, _, target, *_ in graph["links"])


def overlap(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def contains(outer, inner):
    return (outer[0] <= inner[0] and outer[1] <= inner[1] and outer[0] + outer[2] >= inner[0] + inner[2]
            and outer[1] + outer[3] >= inner[1] + inner[3])


@pytest.mark.parametrize("name", ["SVDQModelLoader", "SVDQHubLoader", "SVDQInfo", "SVDQDoctor",
                                  "SVDQLoadConditioning", "SVDQSaveConditioning"])
def test_help_page(name, object_info, server):
    """It is served where the frontend looks, has the node's title, and explains exactly its inputs and outputs."""
    info = object_info[name]
    folder = info["python_module"].removeprefix("custom_nodes.")
    page = server.get(f"/extensions/{folder}/docs/{name}.md").decode()
    assert page.startswith(f"# {info['display_name']}\n")
    inputs, outputs = (page.split(f"## {heading}\n")[1].split("\n## ")[0] for heading in ("Inputs", "Outputs"))
    assert rows(inputs) == list(forms.declared(info))
    assert rows(outputs) == info["output_name"]


def test_every_node_has_a_help_page(object_info):
    ours = {name for name, info in object_info.items() if info["category"].startswith(f"{forms.REGISTRY_ID}/")}
    assert ours == {path.stem for path in (FOLDER.parent / "web" / "docs").glob("*.md")}


def rows(table):
    """First column of a Markdown table."""
    return re.findall(r"^\| (\S+) \|", table, re.MULTILINE)[1:]
