"""The architecture, read off the imports: workflows -> hosts -> svdq -> svdq/kernels; each host in its folder only."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ["svdq/kernels", "svdq", "svdq/hf", "nodes", "workflows"]  # each may use what comes before it, but no host another
ROOMS = ("svdq", "nodes", "workflows")
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution",
        "latent_preview", "node_helpers"}
SECOND_HOST = {"diffusers", "peft", "accelerate", "transformers"}
HOSTS = [LEVELS.index("svdq/hf"), LEVELS.index("nodes")]
RUN_TIME = {"torch", "huggingface_hub", "einops", "numpy",
            "tqdm", "filelock"}         # these two come with huggingface_hub


def files(*rooms):
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def level(parts):
    """The index in LEVELS of where a file or dotted name belongs, by the parts of its name; -1 for what is not ours."""
    return max((i for i, room in enumerate(LEVELS) if list(parts[:len(room.split("/"))]) == room.split("/")), default=-1,
               key=lambda i: len(LEVELS[i]))


def imports(path):
    """Absolute dotted names of what a file imports, relative ones resolved to the root of the pack: "svdq.format"."""
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
    assert {"svdq.kernels.layout.GROUP", "svdq.foreign", "svdq.container.TensorFile", "torch", "json"} <= found


@pytest.mark.parametrize("path", files(*ROOMS), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    here, used = level(path.relative_to(ROOT).parts), set(imports(path))
    levels = {name: level(name.removeprefix("svdq_pack.").split(".")) for name in used}
    above = {name for name, theirs in levels.items() if theirs > here or (here, theirs) == (HOSTS[1], HOSTS[0])}
    assert not above, f"imports {above}, which is built on it, or another host"
    if here <= HOSTS[0]:
        used = {top(name) for name in used}
        assert not used & HOST, "only nodes/ may know ComfyUI"
        foreign = used - set(sys.stdlib_module_names) - RUN_TIME - {"svdq"} - (SECOND_HOST if here == HOSTS[0] else set())
        assert not foreign, f"{foreign} would be a new dependency"


def test_no_module_bears_the_name_of_a_package():
    """`python PACK/svdq` looks for modules in svdq/ first, and so does whoever has such a folder on his path."""
    packages = {top(name) for path in files(*ROOMS) for name in imports(path)} - set(LEVELS) | SECOND_HOST
    assert {"json", "statistics", "torch", "filelock", "comfy"} <= packages
    ours = {name for room in ROOMS[:2] for path in (ROOT / room).rglob("*.py")
            for name in path.relative_to(ROOT / room).with_suffix("").parts}
    assert {"calibration", "families", "flux1"} <= ours and not ours & packages


# Fragments of tensor names that are FLUX.1's own, and where in svdq/ they may stand beside families/.
FLUX_WORDS = ("double_blocks", "single_blocks", "transformer_blocks", "img_attn", "txt_mlp", "linear1", "linear2", "qkv_proj",
              "mlp_fc", "norm_out", "x_embedder", "context_embedder", "time_text_embed", "vector_in", "adaLN_modulation")
WORDS_ELSEWHERE = {
    "svdq/foreign.py": "other models share stems with FLUX: these tell them apart",
    "svdq/lora_keys.py": "the same for LoRAs, and the dialects of FLUX LoRAs, which have suffixes and parts of their own",
    "svdq/hf/blocks.py": "a function of diffusers' is called _get_qkv_projections",
    "svdq/hf/model.py": "a method of diffusers' is called fuse_qkv_projections",
}
LEGACY_FILE = "transformer_blocks.safetensors"              # a file's name in every legacy folder, no tensor's


def flux_words(path):
    text = path.read_text().replace(LEGACY_FILE, "")
    return {word for word in FLUX_WORDS if word in text}


def test_flux_is_known_in_its_family_only():
    """What FLUX.1 is called and how it is built stands in families/flux1.py: another family touches no other file."""
    assert flux_words(ROOT / "svdq" / "families" / "flux1.py") == set(FLUX_WORDS)
    found = {str(path.relative_to(ROOT)): words for path in files("svdq")
             if path.parent.name != "families" and (words := flux_words(path))}
    assert found.keys() == WORDS_ELSEWHERE.keys(), found


def test_host_only_in_nodes():
    users = {path.relative_to(ROOT).parts[0] for path in files(*ROOMS) if {top(name) for name in imports(path)} & HOST}
    assert users <= {"nodes"} | {"workflows"}
    knows = [path for path in files("workflows") if {top(name) for name in imports(path)} & HOST]
    assert all("headless" in path.parts for path in knows), f"{knows}: a workflow talks to ComfyUI over HTTP"


def test_import_is_lean():
    """Importing svdq/ makes no CUDA context and no connection, and brings no compiler and no ComfyUI."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files("svdq")
               if path.parent.name != "hf" and path.stem not in ("__init__", "__main__", "hub")]
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


# No circles: not between files, not inside a folder, not through an import that waits in a function

DYNAMIC = {"svdq/kernels/registry.py": "svdq/kernels/variants/*.py"}        # what a file imports by names that it computes


LAZY = {"svdq/__init__.py"}          # what users alone ask for by name


def graph():
    """{file: files that importing it imports}, by paths from the root of the pack."""
    known = {str(path.relative_to(ROOT)) for path in files(*ROOMS)}
    return {name: {path for target in (*imports(ROOT / name), *imports_by_name(ROOT / name))
                   for path in files_of(target, Path(name).parent.parts, known)} for name in known}


def imports_by_name(path):
    """What a file gives to import_module, as `imports` gives it; a computed name stands in DYNAMIC."""
    name = str(path.relative_to(ROOT))
    if name in LAZY:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module",
                                                                                                      "__import__"):
            if isinstance(node.args[0], ast.Constant):
                yield node.args[0].value
            else:
                assert name in DYNAMIC, f"{name}: say in DYNAMIC what it imports"
                yield from (".".join(found.relative_to(ROOT).with_suffix("").parts) for found in ROOT.glob(DYNAMIC[name]))


def files_of(target, here, known):
    """The files that importing a dotted name runs. The packages that hold the importing file are being imported already, so
    they count only where the name is one of their own."""
    parts, found, deepest = target.removeprefix("svdq_pack.").split("."), set(), None
    for end in range(1, len(parts) + 1):
        for path in ("/".join(parts[:end]) + ".py", "/".join([*parts[:end], "__init__.py"])):
            if path in known:
                deepest = path
                if here[:end] != tuple(parts[:end]):
                    found.add(path)
    return found | {deepest} - {None}


def circle(edges):
    """The files of a circle of imports in their order, or None."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return None


def test_no_circles():
    edges = graph()
    assert {"svdq/kernels/variants/awq_gemv.py", "svdq/kernels/check.py"} <= edges["svdq/kernels/registry.py"]
    assert "svdq/kernels/registry.py" in edges["svdq/doctor.py"] and "svdq/cli.py" in edges["svdq/__main__.py"]
    assert circle(edges) is None, "a circle of imports: " + " -> ".join(circle(edges))


@pytest.mark.parametrize("texts, found", [
    ({"svdq/a.py": "from . import b", "svdq/b.py": "import json"}, None),
    ({"svdq/a.py": "from .b import name", "svdq/b.py": "def f():\n    from . import a"}, {"svdq/a.py", "svdq/b.py"}),
    ({"svdq/a.py": "import svdq_pack.svdq.a.b"}, {"svdq/a.py"}),
    ({"svdq/p/__init__.py": "from .a import x", "svdq/p/a.py": "from . import b", "svdq/p/b.py": ""}, None),
    ({"svdq/p/__init__.py": "from .a import x", "svdq/p/a.py": "from . import x"}, {"svdq/p/__init__.py", "svdq/p/a.py"}),
    ({"svdq/p/__init__.py": "from . import a", "svdq/p/a.py": "from .. import c", "svdq/p/b.py": "",
      "svdq/c.py": "from .p import b"}, {"svdq/p/__init__.py", "svdq/p/a.py", "svdq/c.py"}),
    ({"svdq/a.py": "import importlib\nimportlib.import_module('svdq_pack.svdq.b')", "svdq/b.py": "from . import a"},
     {"svdq/a.py", "svdq/b.py"}),
    ({"svdq/kernels/registry.py": "def f(name):\n    import_module(name)",
      "svdq/kernels/variants/v.py": "from .. import registry"}, {"svdq/kernels/registry.py", "svdq/kernels/variants/v.py"})])
def test_circles_are_seen(tmp_path, monkeypatch, texts, found):
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert (circle(graph()) and set(circle(graph()))) == found
