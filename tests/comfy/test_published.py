"""The pack as the registry publishes it, unpacked into a ComfyUI's custom_nodes: it loads and paints; elsewhere it says where
to go."""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from svdq_pack.tests import published
from svdq_pack.workflows.headless.client import Client
from svdq_pack.workflows.headless.environment import Environment
from svdq_pack.workflows.headless.process import ComfyProcess

ROOT = published.ROOT
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell script stands for ComfyUI's Python")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "node.zip"
    published.pack(file)
    return file


@pytest.fixture(scope="module")
def comfyui(newest, archive, tmp_path_factory):
    """The folder of a ComfyUI with the published pack and no other."""
    folder = published.comfyui(newest, tmp_path_factory.mktemp("user") / "ComfyUI")
    published.unpack(archive, folder / "custom_nodes" / "ComfyUI-SVDQ")
    return folder


def test_the_nodes_load(comfyui, tmp_path):
    """Each with its help page, the templates and the blueprints."""
    python = comfyui / "venv" / "bin" / "python"
    environment = Environment(python, comfyui, None, [str(python), str(comfyui / "main.py")])
    with ComfyProcess(environment, arguments=["--cpu"], log=tmp_path / "log") as process, Client(process.url) as client:
        nodes = {name for name, node in json.loads(client._request("/object_info")).items()
                 if node["python_module"] == "custom_nodes.ComfyUI-SVDQ"}
        templates = json.loads(client._request("/workflow_templates"))["ComfyUI-SVDQ"]
    assert nodes == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert set(templates) == {path.stem for path in (ROOT / "workflows").glob("*.json")}


def test_run_takes_the_comfyui_around_it(comfyui, tmp_path):
    """And ends it; a server's log does not stay, nor does anything else in the pack's folder."""
    pack = comfyui / "custom_nodes" / "ComfyUI-SVDQ"
    words = "a large red circle in the middle on a white background"
    arguments = "--set", f"Prompt.text={words}", "--set", "Sampler.steps=8", "--out", tmp_path
    code, said, errors = published.start(sys.executable, pack / "workflows" / "run.py", *arguments, cwd=tmp_path)
    assert code == 0, errors
    picture, = tmp_path.glob("*.png")
    assert said == f"{picture}\n" and f"starting ComfyUI in {comfyui}" in errors
    red, green, blue = Image.open(picture).convert("RGB").resize((3, 3), Image.Resampling.BOX).getpixel((1, 1))
    assert red > 1.5 * max(green, blue)
    home = pack / ".environment"
    assert not home.exists() or not list(home.iterdir())


@pytest.mark.parametrize("script, said", [
    ("run.py", "stands in no ComfyUI's custom_nodes, and only a clone of the repository makes a private ComfyUI. "
     "Move it there, set COMFYUI_PATH"),
    ("diffusers_demo.py", "only a clone of the repository makes a Python with diffusers. Take one that has torch")])
def test_elsewhere_it_says_what_to_do(archive, tmp_path, script, said):
    """In a Python that has the standard library alone; and makes nothing."""
    published.unpack(archive, tmp_path / "pack")
    before = sorted(tmp_path.rglob("*"))
    code, out, errors = published.start(sys.executable, "-S", tmp_path / "pack" / "workflows" / script, cwd=tmp_path,
                                        PYTHONDONTWRITEBYTECODE="1")
    assert (code, out) == (3, "") and errors.startswith(f"{script}: ") and said in errors and errors.count("\n") == 1
    made = {path for path in tmp_path.rglob("*") if path not in before}
    assert made <= {tmp_path / "pack" / "output"} and not any(Path(path).is_file() for path in made)
