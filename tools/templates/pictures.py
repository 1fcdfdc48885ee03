"""Thumbnails of the templates: what the demo model makes of a template's own graph, and says so at its lower edge.

What the demo model cannot do (follow edges, depth or a reference) is shown as what goes in, left, and what it paints for the
same words, right. Nothing here was painted by FLUX.1.
"""

import copy
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ...svdq import checkpoint
from ...svdq.quantize import FileSource, quantize
from ...svdq.quantize.picture import as_text
from ..demo import scenes
from . import forms, graphs

SIZE, SIDE, QUALITY = 400, 160, 88              # pixels of a thumbnail, and of what the demo model paints
STEPS = 12
LABEL = "demo model, not FLUX"
UPLOADED = "svdq-thumbnail.png"
OTHER_DEMO = "svdq-fp4_r16-demo.safetensors"
README = "docs/pictures/demo.png"               # the first template's, larger: dropped on the canvas it opens its graph


def paint(client, root, names):
    """Write workflows/NAME.jpg, and of an app its copy."""
    definitions = client.object_info()
    for template in graphs.TEMPLATES:
        if template.name in names:
            picture = labelled(thumbnail(client, root, template, definitions))
            for ending in ("", ".app") if template.app else ("",):
                picture.save(root / "workflows" / f"{template.name}{ending}.jpg", quality=QUALITY)
            if template.name == graphs.TEMPLATES[0].name:
                readme(client, root)
            print(template.name, flush=True)


def thumbnail(client, root, template, definitions):
    """[SIZE, SIZE] RGB, without its label."""
    said = template.picture
    if "info" in said:
        text = run(client, demo_graph(template, definitions, said), "text")
        return written(text.replace(text.partition("\n")[0], graphs.DEMO_FILE))       # the first line is a path
    if "quantise" in said:
        return written(quantised(root))
    if "control" in said or "pair" in said:
        plain = next(other for other in graphs.TEMPLATES if other.name == graphs.PLAIN)
        painted = run(client, demo_graph(plain, definitions, said))[-1]
        return halves(control(said), painted)
    if "input" in said:
        upload(client, holed(drawn(said["input"]), said.get("hole")))
    graph = demo_graph(template, definitions, said)
    return fitted(run(client, graph)[-1])


def demo_graph(template, definitions, said):
    """The template's API form, with the demo model in the place of FLUX.1 and what belongs to it."""
    graph = copy.deepcopy(forms.api_form(template, definitions))
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("SVDQModelLoader", "SVDQHubLoader", "SVDQInfo"):
            node["class_type"] = "SVDQInfo" if kind == "SVDQInfo" else "SVDQModelLoader"
            node["inputs"] = {"model_name": graphs.DEMO_FILE}
        elif kind == "UNETLoader":
            node |= {"class_type": "SVDQModelLoader", "inputs": {"model_name": OTHER_DEMO}}
        elif kind == "VAELoader":
            node |= {"class_type": "SVDQDemoVAE", "inputs": {}}
        elif kind == "CLIPTextEncode":
            node |= {"class_type": "SVDQDemoPrompt", "inputs": {"text": said["prompt"]}}
        elif kind == "EmptySD3LatentImage":
            inputs |= {"width": SIDE, "height": SIDE, "batch_size": 1}
        elif kind == "KSampler" and inputs["cfg"] == 1:         # not the demo's own
            inputs |= {"cfg": 3.0, "steps": STEPS, "scheduler": "simple"}
            if inputs["denoise"] < 1:
                inputs["denoise"] = said.get("denoise", inputs["denoise"])
        elif kind == "LoraLoaderModelOnly":
            node |= {"class_type": "SVDQLoraLoader", "inputs": {"model": inputs["model"], "lora_name": graphs.DEMO_LORA,
                                                                "strength": said.get("lora", 0.0)}}
        elif kind == "LoadImage":
            inputs["image"] = UPLOADED
        elif kind == "ImageScaleToTotalPixels":
            node |= {"class_type": "ImageScale", "inputs": {"image": inputs["image"], "upscale_method": "lanczos",
                                                            "width": SIDE, "height": SIDE, "crop": "disabled"}}
        elif kind == "ImagePadForOutpaint":
            inputs |= {"left": SIDE // 2, "right": SIDE // 2, "feathering": 8}
    return {id: node for id, node in graph.items() if node["class_type"] not in ("DualCLIPLoader", "SVDQDoctor")}


def run(client, graph, what="images"):
    """Pictures, in the order of their nodes, or text."""
    prompt_id = client.queue(graph)
    client.follow(prompt_id)
    if what == "text":
        outputs = client._json(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return "\n".join(text for output in outputs.values() for text in output.get("text", []))
    return [Image.open(io.BytesIO(data)).convert("RGB") for _, data in client.files(prompt_id)]


def upload(client, picture):
    data, edge = io.BytesIO(), "svdq-edge"
    picture.save(data, "PNG")
    head = (f'--{edge}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{UPLOADED}"\r\n'
            "Content-Type: image/png\r\n\r\n")
    client._request("/upload/image", head.encode() + data.getvalue() + f"\r\n--{edge}--\r\n".encode(),
                    f"multipart/form-data; boundary={edge}")


# What goes in

def scene_of(caption):
    """The Scene that a caption of scenes.py says."""
    what, ground = caption.removesuffix(" background").rsplit(" on a ", 1)
    *pattern, ground_colour = ground.split()
    second = place = size = None
    if " left of " in what or " above " in what:
        layout, joint = ("beside", " left of ") if " left of " in what else ("above", " above ")
        first, second = (thing_of(part.split()[1:]) for part in what.split(joint))
    elif what.split()[0] in scenes.NUMBERS:
        layout, first = what.split()[0], thing_of(what.split()[1:])
    else:
        layout = "one"
        what, place = what.replace(" in the ", " at the ").split(" at the ")
        _, size, *words = what.split()
        first = thing_of(words)
    found = scenes.Scene(layout, first, second, place, size, pattern[0] if pattern else "plain", ground_colour)
    assert found.caption == caption
    return found


def thing_of(words):
    *texture, colour, shape = words
    shape = next(known for known in scenes.SHAPES if shape in (known, known + "s", known + "es"))
    return scenes.Thing(shape, colour, texture[0] if texture else "plain")


def drawn(caption, size=SIDE):
    return as_picture(scenes.draw(scene_of(caption), np.random.default_rng(1), size))


def as_picture(values):
    return Image.fromarray((values * 255).round().astype(np.uint8))


def holed(picture, hole):
    """hole: (left, top, right, bottom) in 0..1, where the mask is."""
    picture = picture.convert("RGBA")
    if hole:
        picture.putalpha(255)
        picture.paste((128, 128, 128, 0), tuple(round(part * side) for part, side in zip(hole, 2 * picture.size)))
    return picture


def control(said):
    """[SIZE, SIZE]: edges, depth, a small version or the reference itself of the scene that the prompt says."""
    kind = said.get("control", "reference")
    scene = scene_of(said.get("input", said["prompt"]))
    if kind == "depth":
        white = {name: replace(thing, colour="white", texture="plain") for name, thing in
                 (("first", scene.first), ("second", scene.second)) if thing}
        scene = replace(scene, ground="faded", ground_colour="black", **white)
    values = scenes.draw(scene, np.random.default_rng(1), SIZE)
    if kind == "edges":
        steps = [np.abs(np.diff(values.mean(2), axis=axis, append=0)) for axis in (0, 1)]
        values = np.repeat((np.maximum(*steps) > 0.06)[..., None], 3, 2).astype(np.float32)
        values[-1], values[:, -1] = 0, 0
    picture = as_picture(values)
    return picture.resize((48, 48), Image.BILINEAR).resize((SIZE, SIZE), Image.BILINEAR) if kind == "small" else picture


# What comes out

def fitted(picture):
    """Into the square, on black where it is wide."""
    scale = SIZE / max(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE))
    square.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return square


def halves(left, right):
    square = fitted(right)
    square.paste(left.crop((0, 0, SIZE // 2, SIZE)), (0, 0))
    ImageDraw.Draw(square).line((SIZE // 2, 0, SIZE // 2, SIZE), "white", 2)
    return square


def quantised(root):
    """The quantiser's report on the demo model, from a 16-bit copy of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "demo.safetensors")
        checkpoint.dequantize(root / "workflows" / "models" / "diffusion_models" / graphs.DEMO_FILE, dense, torch.float32)
        return as_text(quantize(FileSource(dense), Path(folder, "svdq-int4_r32-demo.safetensors"), "int4", 32))


def written(text):
    square = Image.new("RGB", (SIZE, SIZE), "#202020")
    ImageDraw.Draw(square).multiline_text((16, 16), text, "#e0e0e0", ImageFont.load_default(12), spacing=4)
    return square


def labelled(picture):
    draw, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(13)
    draw.rectangle((0, SIZE - 22, SIZE, SIZE), (0, 0, 0, 150))
    draw.text((SIZE - 8, SIZE - 11), LABEL, "white", font, anchor="rm")
    return picture


def readme(client, root):
    """The README's picture, which carries its graph as every picture that ComfyUI saves."""
    definitions, template = client.object_info(), graphs.TEMPLATES[0]
    prompt = forms.api_form(template, definitions)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(prompt))
    info.add_text("workflow", json.dumps(forms.canvas_form(template, definitions)))
    run(client, prompt)[-1].resize((2 * SIDE, 2 * SIDE), Image.LANCZOS).save(root / README, pnginfo=info, optimize=True)
