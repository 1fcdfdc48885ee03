"""Hostile requests: prompts posted to a real ComfyUI server, with values for our nodes' inputs that no frontend would send.

A prompt is refused by ComfyUI, ends in an error of ours, or succeeds. The server lives, never answers 500, and the next good
prompt has the picture it had before.
"""

import copy
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

from svdq_pack.svdq.errors import PackError
from svdq_pack.tests import random_models
from svdq_pack.tests.hostile import containers, models
from svdq_pack.tests.hostile.frame import ROOT, Case, Fault, Hostile, _anonymous
from svdq_pack.workflows.headless import environment, maker
from svdq_pack.workflows.headless.client import Client, Failed, Rejected, ServerError
from svdq_pack.workflows.headless.process import ComfyProcess

LOADER = {"class_type": "SVDQModelLoader", "inputs": {"model_name": "demo.safetensors", "act_bits": "16"}}
DENSE = {"class_type": "UNETLoader", "inputs": {"unet_name": "dense.safetensors", "weight_dtype": "default"}}
EMPTY = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}}


def _shown(*source):
    return {"class_type": "PreviewAny", "inputs": {"source": list(source)}}


# name: (the graph, which of its nodes is ours)
GRAPHS = {
    "info": ({"1": {"class_type": "SVDQInfo", "inputs": {"model_name": "demo.safetensors"}}}, "1"),
    "load": ({"1": LOADER, "2": _shown("1", 0)}, "1"),
    "lora": ({"1": LOADER, "2": {"class_type": "SVDQLoraLoader", "inputs": {
        "model": ["1", 0], "lora_name": "good.safetensors", "strength": 1.0}}, "3": _shown("2", 1)}, "2"),
    "stack": ({"1": LOADER, "2": {"class_type": "SVDQLoraStack", "inputs": {
        "model": ["1", 0], "lora_1": "good.safetensors", "strength_1": 1.0, "lora_2": "None", "strength_2": 1.0}},
        "3": _shown("2", 1)}, "2"),
    "capture": ({"1": DENSE, "2": {"class_type": "SVDQCaptureCalibration", "inputs": {
        "model": ["1", 0], "filename": "flux", "add_to_file": True}}, "3": _shown("2", 0)}, "2"),
    "quantize": ({"1": DENSE, "2": {"class_type": "SVDQQuantize", "inputs": {
        "model": ["1", 0], "precision": "int4", "rank": 128, "calibration": "none (data-free)", "filename": "new"}}}, "2"),
    "compare": ({"1": EMPTY, "2": {"class_type": "SVDQCompare", "inputs": {"reference": ["1", 0], "quantised": ["1", 0]}}},
                "2"),
    "demo": ({"1": {"class_type": "SVDQDemoPrompt", "inputs": {"text": "a red star"}}, "2": {
        "class_type": "SVDQSaveConditioning", "inputs": {"conditioning": ["1", 0], "filename_prefix": "prompt"}}}, "1"),
    "save": ({"1": {"class_type": "SVDQLoadConditioning", "inputs": {"file": "conditioning.safetensors"}}, "2": {
        "class_type": "SVDQSaveConditioning", "inputs": {"conditioning": ["1", 0], "filename_prefix": "prompt"}}}, "2"),
    "conditioning": ({"1": {"class_type": "SVDQLoadConditioning", "inputs": {"file": "conditioning.safetensors"}},
                      "2": _shown("1", 0)}, "1"),
    "hub": ({"1": {"class_type": "SVDQHubLoader", "inputs": {"repo_id": "a/b", "filename": "demo.safetensors",
                                                             "revision": "main"}}, "2": _shown("1", 1)}, "1")}
GRAPH_INPUTS = {name for graph, ours in GRAPHS.values() for name in graph[ours]["inputs"]}
NUMBERS = (0, -1, 1, 1.5, 16, 17, 10**9, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), -float("inf"), 1e-300, -0.0,
           10.01)
TEXTS = (*containers.ODD_NAMES, " ", "None", "../x", "/etc/passwd", "a\\b", "*", "CON", "%date%", "{rank}", "{0}", "a" * 300,
         "\ud800", "nan",
         "1", "true", "demo.safetensors", "good.safetensors", "conditioning.safetensors [output]", ".hidden", "a/b", "<script>")
OTHERS = (None, True, False, [], {}, [1], ["1"], ["1", 0], ["1", 7], ["9", 0], ["1", "0"], [["1", 0]], {"__value__": ["1", 0]},
          {"__value__": None}, {"a": 1}, [None, None], [[[[]]]])


class Requests(Hostile):
    name, share = "http", 1

    def __init__(self, folder):
        super().__init__(folder)
        placed = folder / "models"
        for name in ("custom_nodes", "output", "user", "temp", "models/diffusion_models", "models/loras",
                     "models/svdq_calibration"):
            (folder / name).mkdir(parents=True)
        (folder / "custom_nodes" / "svdq-under-test").symlink_to(ROOT, target_is_directory=True)
        random_models.make_files(placed)
        (placed / "input").rename(folder / "input")
        models.write_dense(placed / "diffusion_models" / "dense.safetensors", folder)
        models.golden("lora_model_nvfp4_flux_dev_like_peft", placed / "loras" / "good.safetensors")
        shutil.copy(folder / "input" / "conditioning.safetensors", folder / "input" / "another.safetensors")
        tree = Path(os.environ["SVDQ_COMFYUI"])
        starter = [sys.executable, str(tree / "main.py")]
        if maker.vision_cannot_load().exists():
            starter = [sys.executable, str(ROOT / "workflows" / "headless" / "comfy_main.py"), str(tree)]
        self.process = ComfyProcess(environment.Environment(Path(sys.executable), tree, folder, starter), arguments=["--cpu"],
                                    log=folder.parent / "server.log")
        self.process.__enter__()
        self.client, self.pictures = None, {}
        self.sampled = json.loads((ROOT / "tests" / "comfy" / "graph.json").read_text())
        self.sampled["5"]["inputs"] |= {"width": 32, "height": 32}
        self.sampled["6"]["inputs"]["steps"] = 1
        for node in self.sampled.values():
            node["inputs"] |= {"model_name": "demo.safetensors"} if "model_name" in node["inputs"] else {}
        for seed in (1, 2):
            self.pictures[seed] = self.sample(seed)
        self.client.close()
        self.client = None                      # every process of cases has its own

    def memory(self):
        return _anonymous(self.process.process.pid)

    def close(self):
        self.process.__exit__()

    # ---- one prompt

    def post(self, graph):
        """Its end. Raises PackError where it is refused."""
        self.client = self.client or Client(self.process.url)
        try:
            prompt = self.client.queue(graph)
            self.client.follow(prompt)
            return prompt
        except Rejected as error:
            raise PackError(f"refused by ComfyUI: {error}"[:500]) from error
        except ServerError as error:
            text = f"HTTP {error.code}" if error.code else "the server is gone"
            raise Fault(text, f"{error} {self.process.log_tail(6)}") from error
        except Failed as error:
            node, kind = re.search(r"\((\w+)\) failed: (\S+?): ", f"{error} ").groups()
            if "SVDQ" in node and not kind.startswith("svdq."):
                raise Fault(f"{kind} in {node}", str(error)[:300]) from error
            message = str(error).partition(f"{kind}: ")[2]
            if not message.replace("\n", "").isprintable():
                raise Fault("message not printable", message) from error
            raise PackError(message) from error

    def sample(self, seed):
        self.sampled["6"]["inputs"]["seed"] = seed
        prompt = self.post(self.sampled)
        return [zlib.crc32(data) for _, data in self.client.files(prompt)]

    def of_graph(self, rng, graph, checks=False):
        seed = rng.choice((1, 2))

        def use():
            try:
                self.post(graph)
            finally:
                if checks:
                    found = self.sample(seed)
                    if found != self.pictures[seed]:
                        raise Fault("the next good prompt has another picture")

        below = ("output/", "temp", "user/", "models/svdq_calibration/", "models/diffusion_models/new",
                 "models/diffusion_models/.cache")
        return Case(use, makes=below, keeps=below, touches=("models/svdq_calibration", "user/"))

    def values(self, rng):
        """Of other types, huge, missing, with markup; links that lead nowhere."""
        graph, ours = copy.deepcopy(rng.choice([GRAPHS[name] for name in GRAPHS if name != "quantize" or rng.random() < 0.3]))
        inputs = graph[ours]["inputs"]
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice([*inputs, *inputs, *inputs, "extra", ""])
            if rng.random() < 0.1:
                inputs.pop(name, None)
            else:
                # A link into nowhere in an input that no node has ends ComfyUI's worker for good, whoever's node it is
                known = name in GRAPH_INPUTS
                inputs[name] = rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS if known else OTHERS[:4])))
        return self.of_graph(rng, graph, checks=rng.random() < 0.01)

    def texts(self, rng):
        """For inputs that are text: all of them reach the node."""
        name, field = rng.choice((("capture", "filename"), ("demo", "text"), ("save", "filename_prefix"), ("hub", "filename"),
                                  ("hub", "repo_id"), ("hub", "revision")))
        graph, ours = copy.deepcopy(GRAPHS[name])
        graph[ours]["inputs"][field] = rng.choice(TEXTS) + rng.choice(("", "", *TEXTS))
        return self.of_graph(rng, graph)

    def strengths(self, rng):
        name = rng.choice(("lora", "stack"))
        graph, ours = copy.deepcopy(GRAPHS[name])
        field = "strength" if name == "lora" else rng.choice(("strength_1", "strength_2"))
        graph[ours]["inputs"][field] = rng.choice((*NUMBERS, *TEXTS[-8:], *OTHERS[:6]))
        return self.of_graph(rng, graph)

    def replaced_nodes(self, rng):
        """Of the earlier pack, which ComfyUI replaces by ours: without inputs, without _meta."""
        kind = rng.choice(("NunchakuFluxDiTLoader", "NunchakuFluxLoraLoader"))
        inputs = {"model_path": "demo.safetensors", "cache_threshold": 0, "attention": "flash", "cpu_offload": "auto",
                  "device_id": 0,
                  "data_type": "bfloat16"} if kind.endswith("DiTLoader") else {
            "model": ["1", 0], "lora_name": "good.safetensors", "lora_strength": 1.0}
        for name in list(inputs):
            if rng.random() < 0.2:
                del inputs[name]
            elif rng.random() < 0.1:
                inputs[name] = rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS)))
        graph = {"1": LOADER, "2": {"class_type": kind, "inputs": inputs}, "3": _shown("2", 0)}
        if rng.random() < 0.5:
            graph["2"]["_meta"] = rng.choice(({"title": "x"}, {"title": "x"}, {}))
        return self.of_graph(rng, copy.deepcopy(graph))

    mutations = {values: 60, texts: 20, strengths: 12, replaced_nodes: 8}


CLASSES = (Requests,)
