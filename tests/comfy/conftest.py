"""Real ComfyUI servers, on the CPU, for all tests over HTTP: the newest, and where a test asks for it the oldest.

They share a base folder that is thrown away afterwards.
"""

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from svdq_pack.svdq import checkpoint
from svdq_pack.tests import random_models

collect_ignore = [] if "SVDQ_COMFYUI" in os.environ else ["inprocess"]      # test_inprocess.py runs that folder
ROOT = Path(__file__).resolve().parents[2]
PACK = "svdq-under-test"                        # the folder's name is not ours to choose, so nothing may depend on it
TREES = {"newest": "COMFYUI_DIR", "oldest": "COMFYUI_OLD_DIR"}
GRAPH = json.loads((ROOT / "tests" / "comfy" / "graph.json").read_text())


@pytest.fixture(scope="session")
def newest():
    """The tree of the newest ComfyUI."""
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is not set; tests/run.py sets it")
    return os.environ["COMFYUI_DIR"]


@pytest.fixture(scope="session")
def base(tmp_path_factory, golden_dir, newest):
    """ComfyUI's base directory: the pack, and models good and bad."""
    base = tmp_path_factory.mktemp("base")
    models, loras = base / "models" / "diffusion_models", base / "models" / "loras"
    for folder in (base / "custom_nodes", base / "output", base / "user", models, loras):
        folder.mkdir(parents=True)
    (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    shutil.copy(Path(__file__).with_name("stand_ins.py"), base / "custom_nodes")
    random_models.make_files(base / "models")
    (base / "models" / "input").rename(base / "input")
    shutil.copy(models / "demo.safetensors", models / "demo-copy.safetensors")
    for precision, name in (("int4", "int4_flux_schnell_like"), ("nvfp4", "nvfp4_flux_dev_like")):
        shutil.copy(golden_dir / f"model_{name}.safetensors", models / f"{precision}.safetensors")
        dense = models / f"{precision}-dense.safetensors"
        checkpoint.dequantize(models / f"{precision}.safetensors", dense, torch.float32)
    for name in ("peft", "kohya_bfl"):
        shutil.copy(golden_dir / f"lora_model_nvfp4_flux_dev_like_{name}.safetensors", loras / f"{name}.safetensors")

    tensors, legacy = load_file(models / "demo.safetensors"), models / "old" / "svdq-legacy"
    legacy.mkdir(parents=True)
    inside = {name for name in tensors if "transformer_blocks." in name}
    save_file({name: tensors[name] for name in inside}, legacy / "transformer_blocks.safetensors")
    save_file({name: tensors[name] for name in tensors.keys() - inside}, legacy / "unquantized_layers.safetensors")

    whole = (models / "int4.safetensors").read_bytes()
    (models / "truncated.safetensors").write_bytes(whole[:len(whole) // 2])
    tensors = load_file(models / "int4.safetensors")
    tensors["single_transformer_blocks.0.mlp_fc2.wscales"][0, 0] = float("nan")
    save_file(tensors, models / "nan.safetensors")
    checkpoint.dequantize(models / "int4.safetensors", models / "sixteen-bit.safetensors", torch.bfloat16)
    return base


@pytest.fixture(scope="session")
def servers(base):
    """servers("newest" or "oldest") -> Server, started when first asked for."""
    with contextlib.ExitStack() as running:
        yield functools.cache(lambda which: running.enter_context(serving(base, which)))


@contextlib.contextmanager
def serving(base, which="newest"):
    """A Server with this base directory, of one of TREES."""
    from svdq_pack.workflows.headless import environment, maker
    from svdq_pack.workflows.headless.client import Client
    from svdq_pack.workflows.headless.process import ComfyProcess

    if not os.environ.get(TREES[which]):
        pytest.skip(f"{TREES[which]} is not set; tests/run.py sets it")
    tree = Path(os.environ[TREES[which]])
    starter = [sys.executable, str(tree / "main.py")]
    if maker.vision_cannot_load().exists():
        starter.insert(1, str(ROOT / "workflows" / "headless" / "comfy_main.py"))
        starter[2] = str(tree)
    comfy = environment.Environment(Path(sys.executable), tree, base, starter)
    arguments = ["--cpu"]
    if which == "oldest" and os.environ.get("COMFYUI_OLD_FRONTEND"):
        arguments += ["--front-end-root", os.environ["COMFYUI_OLD_FRONTEND"]]
    with ComfyProcess(comfy, arguments=arguments, log=base / f"server-{which}.log") as process, Client(process.url) as client:
        yield Server(process, client)


@pytest.fixture(scope="session")
def server(servers):
    return servers("newest")


@pytest.fixture
def run(server):
    return server.run


class Server:
    def __init__(self, process, client):
        self.process, self.client = process, client

    def run(self, graph, on_event=lambda kind, data: None):
        """Queue a graph, wait for its end, return its pictures. Raises what Client.queue and Client.follow raise."""
        self.prompt_id = self.client.queue(graph)
        self.client.follow(self.prompt_id, on_event)
        return [Image.open(io.BytesIO(data)).convert("RGB") for name, data in self.client.files(self.prompt_id)
                if name.endswith((".png", ".jpg", ".webp"))]

    def outputs(self):
        """{node id: ui output} of the last run."""
        return self.json(f"/history/{self.prompt_id}")[self.prompt_id]["outputs"]

    def get(self, path):
        return self.client._request(path)

    def json(self, path):
        return json.loads(self.get(path))


@pytest.fixture
def graph():
    """graph(model_name, **inputs) -> graph.json, smaller, with these inputs of whichever node has them."""
    def make(model_name="demo.safetensors", **inputs):
        made = copy.deepcopy(GRAPH)
        inputs["model_name"] = model_name
        made["5"]["inputs"] |= {"width": 64, "height": 64}
        made["6"]["inputs"]["steps"] = 2
        for name, value in inputs.items():
            node, = (node for node in made.values() if name in node["inputs"])
            node["inputs"][name] = value
        return made
    return make
