"""The architecture, read off the imports: workflows -> nodes -> svdq -> kernels, and the host in nodes/ only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ["kernels", "svdq", "nodes", "workflows"]          # each may use what comes before it
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution",
        "latent_preview", "node_helpers"}
RUN_TIME = {"torch", "safetensors", "huggingface_hub", "einops", "numpy", "tqdm"}   # tqdm comes with huggingface_hub


def files(*levels):
    return [path for level in levels for path in sorted((ROOT / level).rglob("*.py"))]


def imports(path):
    """Absolute dotted names of what a file imports, relative ones resolved to the root of the pack: "svdq.names"."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package) + 1, f"{path}: reaches out of the pack"
            base = [*package[:len(package) + 1 - node.level], *(node.module or "").split(".")]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def top(name):
    return name.removeprefix("svdq_pack.").split(".")[0]


def test_reads_imports():
    """The reader of imports sees what it must see."""
    found = set(imports(ROOT / "svdq" / "checkpoint.py"))
    assert {"kernels.layout.GROUP", "svdq.names", "svdq.container.TensorFile", "torch", "json"} <= found


@pytest.mark.parametrize("path", files(*LEVELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    level = LEVELS.index(path.relative_to(ROOT).parts[0])
    used = {top(name) for name in imports(path)}
    above = used & set(LEVELS[level + 1:])
    assert not above, f"imports {above}, which is built on it"
    if LEVELS[level] in ("kernels", "svdq"):
        assert not used & HOST, "only nodes/ may know ComfyUI"
        foreign = used - set(sys.stdlib_module_names) - RUN_TIME - set(LEVELS)
        assert not foreign, f"{foreign} would be a new dependency"


def test_host_only_in_nodes():
    users = {path.relative_to(ROOT).parts[0] for path in files(*LEVELS) if {top(name) for name in imports(path)} & HOST}
    assert users <= {"nodes"} | {"workflows"}
    knows = [path for path in files("workflows") if {top(name) for name in imports(path)} & HOST]
    assert all("headless" in path.parts for path in knows), f"{knows}: a workflow talks to ComfyUI over HTTP"


def test_import_is_lean():
    """Importing svdq/ and kernels/ makes no CUDA context and no connection, and brings no compiler and no ComfyUI."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("kernels", "svdq")
               if path.stem not in ("__init__", "__main__", "hub")]
    script = f"""
import importlib, socket, sys, types
pack = types.ModuleType("svdq_pack"); pack.__path__ = [{str(ROOT)!r}]; sys.modules["svdq_pack"] = pack
socket.socket.connect = lambda *_: sys.exit("connects")
for module in ["svdq.hub", *{modules!r}]:
    importlib.import_module("svdq_pack." + module)
    if module == "svdq.hub":
        print("torch" in sys.modules)
import torch
print(torch.cuda.is_initialized())
heavy = {{"huggingface_hub", "triton", "torch.utils.cpp_extension", "torch._inductor", *{HOST!r}}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=ROOT.parent)
    assert done.stdout.split("\n") == ["False", "False", "[]", ""], done.stderr
