"""Every template runs, on tiny random models of its kind: the way through its nodes, not the picture.

Replaced are, by tests/comfy/stand_ins.py: CLIPTextEncode with its encoders, CLIPVisionEncode with its model, and the width of
USO's projector, because ComfyUI fixes their sizes; FluxKontextImageScale, which makes a megapixel of everything, by
ImageScale. Sizes and steps are small. Everything else is what the template says.
"""

import copy
import json

import pytest
from PIL import Image, ImageChops

from svdq_pack.tests.comfy import tiny_files
from svdq_pack.tools.templates import forms
from svdq_pack.tools.templates.graphs import DEV, PICTURE, TEMPLATES

SMALL = {"width": 64, "height": 64, "steps": 2, "megapixels": 0.01, "left": 32, "right": 32, "batch_size": 1}
BATCHES = {"svdq-82-compare": 2}
SHOWN = {"images": {"SaveImage", "PreviewImage", "SVDQCompare", "SVDQQuantize"},
         "text": {"SVDQLoraLoader", "SVDQSaveConditioning", "SVDQQuantize", "SVDQCompare", "SVDQInfo", "SVDQDoctor",
                  "PreviewAny"}}
OTHER = "other.png"
CHANGES = {"LoadImage": {"image": OTHER}, "LoraLoaderModelOnly": {"strength_model": -3.0},
           "SVDQLoraLoader": {"strength": 0.0}}
CAPTURED = "svdq-81-calibrate-and-quantize"


@pytest.fixture(scope="module")
def zoo(base):
    """All files, and the picture that every ComfyUI has in its input folder, here with a hole that is a mask. And another."""
    made = tiny_files.write(base / "models")
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGBA")
    picture.paste((200, 40, 40, 0), (16, 16, 40, 40))
    picture.save(base / "input" / PICTURE)
    other = Image.radial_gradient("L").resize((64, 64)).point(lambda value: 255 * (value > 90)).convert("RGB")
    other.save(base / "input" / OTHER)
    yield
    for path in (*made, base / "input" / PICTURE, base / "input" / OTHER):
        path.unlink()


@pytest.fixture(scope="module", params=["newest", "oldest"])
def tree(request, servers, zoo, base):
    """(Server, its definitions)"""
    server = servers(request.param)
    yield server, server.client.object_info()
    for path in (base / "models").glob("*/*mine.*"):    # what was quantised, and what was captured for it
        path.unlink()


def small(graph):
    """The graph with stand-ins and little to compute."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "CLIPTextEncode":
            node |= {"class_type": "StandInText", "inputs": {"text": inputs["text"]}}
        elif node["class_type"] == "CLIPVisionEncode":
            node |= {"class_type": "StandInVision", "inputs": {"image": inputs["image"]}}
        elif node["class_type"] == "FluxKontextImageScale":
            node |= {"class_type": "ImageScale", "inputs": {"image": inputs["image"], "upscale_method": "area", "width": 96,
                                                            "height": 96, "crop": "center"}}
        elif node["class_type"] == "SVDQHubLoader":
            inputs["filename"] = DEV.name               # nobody is asked for a file that is there
        if inputs.get("denoise", 1) < 1:
            inputs["denoise"] = 0.2                     # at more, random weights leave nothing of what is painted over
        inputs |= {name: SMALL[name] for name in inputs.keys() & SMALL.keys()}
    gone = [id for id, node in graph.items() if node["class_type"] in ("DualCLIPLoader", "CLIPVisionLoader")]
    return {id: node for id, node in graph.items() if id not in gone}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_template_runs(template, tree):
    server, definitions = tree
    graph = small(forms.api_form(template, definitions))
    for node in graph.values():
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"]["batch_size"] = BATCHES.get(template.name, 1)
    pictures = server.run(graph)
    shown = {graph[id]["class_type"]: output for id, output in server.outputs().items()}
    for what, kinds in SHOWN.items():
        assert {node["class_type"] for node in graph.values()} & kinds == {kind for kind in shown if shown[kind].get(what)}
    assert all(len(picture.getcolors(1 << 20)) > 1 for picture in pictures)
    for id, node in graph.items():                      # each picture and LoRA that comes in tells in what comes out
        if node["class_type"] in CHANGES:
            changed = copy.deepcopy(graph)
            changed[id]["inputs"] |= CHANGES[node["class_type"]]
            *_, picture = server.run(changed)
            assert ImageChops.difference(picture, pictures[-1]).getbbox(), node


def test_calibrated_model_is_quantised(tree):
    """The second half of its template, which is muted when it is opened."""
    server, definitions = tree
    template = next(template for template in TEMPLATES if template.name == CAPTURED)
    graph = small(forms.api_form(template, definitions, muted=True))
    captured = server.json("/object_info/SVDQQuantize")["SVDQQuantize"]["input"]["required"]["calibration"][1]["options"]
    assert "mine.safetensors" in captured
    quantize, = (id for id, node in graph.items() if node["class_type"] == "SVDQQuantize")
    graph[quantize]["inputs"] |= {"calibration": "mine.safetensors", "filename": "svdq-calibrated-mine"}
    server.run({id: node for id, node in graph.items() if node["class_type"] in ("UNETLoader", "SVDQQuantize", "PreviewAny")})
    assert "calibrat" in json.dumps(server.outputs())
