"""The demo that comes with the pack, over HTTP: it paints what its prompt says, and its LoRA does what it is for."""

import json
from pathlib import Path

import numpy as np
import pytest

from svdq_pack.workflows.headless.client import Failed

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "workflows" / "models"
FILES = sorted(path.name for path in MODELS.rglob("*.safetensors"))
DEMO, LORA = "svdq-00-demo", "svdq-01-demo-lora"
PLAIN = "a large red circle in the middle on a white background"


@pytest.fixture(params=["newest", "oldest"])
def paint(request, servers):
    """paint(text, workflow=DEMO, **inputs of whichever node has them) -> picture, float [160, 160, 3] in 0..1"""
    def paint(text, workflow=DEMO, **inputs):
        graph = json.loads((ROOT / "workflows" / "api" / f"{workflow}.json").read_text())
        for name, value in {"text": text, "steps": 12, **inputs}.items():
            node, = (node for node in graph.values() if name in node["inputs"])
            node["inputs"][name] = value
        picture, = servers(request.param).run(graph)
        return np.asarray(picture, float) / 255
    return paint


def colour(picture, x, y):
    """Mean of a small square around (x, y), both in 0..1."""
    column, row = int(x * picture.shape[1]), int(y * picture.shape[0])
    return picture[row - 4:row + 4, column - 4:column + 4].mean((0, 1))


def is_red(rgb):
    return rgb[0] > 1.8 * max(rgb[1:])


def is_white(rgb):
    return min(rgb) > 0.7 and max(rgb) - min(rgb) < 0.15


def is_blue(rgb):
    return rgb[2] > 1.5 * max(rgb[:2])


def is_yellow(rgb):
    return min(rgb[:2]) > 1.4 * rgb[2]


@pytest.mark.parametrize("model", ["svdq-int4_r16-demo.safetensors", "svdq-fp4_r16-demo.safetensors"])
def test_paints_what_the_prompt_says(model, paint):
    """Colours and places: the same prompt with other words must paint something else."""
    picture = paint(PLAIN, model_name=model)
    assert picture.shape == (160, 160, 3)
    assert is_red(colour(picture, 0.5, 0.5)) and is_white(colour(picture, 0.1, 0.1)) and is_white(colour(picture, 0.9, 0.9))
    picture = paint("a large blue square at the left on a yellow background", model_name=model)
    assert is_blue(colour(picture, 0.26, 0.5)) and is_yellow(colour(picture, 0.8, 0.5))


def test_lora(paint):
    """Strength 0 is the model itself; at 1 a white border, drawn on yellow, surrounds the thing."""
    text = "a large blue square in the middle on a yellow background"
    without = paint(text)
    assert (paint(text, LORA, strength=0) == without).all()
    border, plain = ((picture.min(2) > 0.8).mean() for picture in (paint(text, LORA), without))
    assert plain < 0.02 and border > plain + 0.03


def test_same_seed_same_picture(paint):
    first, other, again = (paint(PLAIN, seed=seed) for seed in (3, 4, 3))
    assert (first == again).all() and (first != other).any()


def test_word_it_does_not_know(paint):
    with pytest.raises(Failed, match="does not know 'cat'. It knows a, above, at"):
        paint("a red cat on a white background")


def test_everything_shipped_is_small():
    assert {"svdq-int4_r16-demo.safetensors", "svdq-fp4_r16-demo.safetensors", "svdq-demo-vae.safetensors",
            "svdq-demo-sticker.safetensors"} == set(FILES)
    assert sum(path.stat().st_size for path in MODELS.rglob("*.*")) < 16e6
