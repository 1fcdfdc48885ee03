"""What is published keeps the rules of ComfyUI's registry: docs.comfy.org/registry/standards, and what comfy-cli checks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from svdq_pack.tests import published

ROOT = published.ROOT
SECURITY = "S102,S307,E702"             # ruff's rules that `comfy node validate` runs: exec, eval, statements in one line
KINDS = {".py", ".md", ".json", ".jpg", ".png", ".svg", ".js", ".txt", ".toml", ".cuh", ".cpp", ".hpp", ".safetensors", ".cff"}
NAMES = {"LICENSE", ".comfyignore", ".gitignore"}


@pytest.fixture(scope="module")
def names():
    return published.names()


def sins(text):
    """What the registry refuses in Python, one line each."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen", "marshal.loads", "__import__"):
            found.add(called)
        if isinstance(node, ast.Constant) and node.value in ("pip", "pip3", "uv", "ensurepip"):
            found.add(f"runs {node.value}")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {f"imports {name}" for name in modules if name.split(".")[0] in ("pip", "ensurepip", "marshal")}
    return sorted(found)


def test_what_is_left_out(names):
    """Nothing of the tests and tools, and not what calls pip; all of the nodes, the library and the templates."""
    known = {name for name in published.names() if name.split("/")[0] in ("tests", "tools", ".ci", ".github")}
    assert not known and not {"workflows/headless/maker.py", "workflows/headless/comfy_main.py"} & set(names)
    here = {path.relative_to(ROOT).as_posix() for folder in ("nodes", "svdq", "web", "subgraphs")
            for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {"__init__.py", "install.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= set(names)
    untracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--others"], capture_output=True, text=True).stdout
    assert here - set(untracked.split("\0")) <= set(names)
    assert len([name for name in names if name.startswith("workflows/api/")]) > 20


@pytest.mark.parametrize("text, said", [
    ("eval(x)", ["eval"]), ("exec(compile(x, y, z))", ["exec"]), ("import os\nos.system(x)", ["os.system"]),
    ("run([python, '-m', 'pip', 'install', x])", ["runs pip"]), ("from pip._internal import main", ["imports pip._internal"]),
    ("model.eval()", []), ("say('python -m pip install x')", [])])
def test_sins_are_seen(text, said):
    assert sins(text) == said


def test_no_eval_and_no_pip(names):
    """maker.py, which is left out for it, would be seen."""
    found = {name: said for name in names if name.endswith(".py")
             if (said := sins((ROOT / name).read_text(encoding="utf-8")))}
    assert not found
    assert sins((ROOT / "workflows" / "headless" / "maker.py").read_text(encoding="utf-8")) == ["runs pip"]


def test_what_comfy_cli_warns_of():
    """In the whole checkout: the registry's action looks at that before it packs."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "-q", "--select", SECURITY,
                           "--output-format", "concise", str(ROOT)], capture_output=True, text=True)
    if "No module named ruff" in done.stderr:
        pytest.skip("no ruff")
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_hidden(names):
    """Only kinds of files that anybody can look into, no link, and none that is large but the demo model."""
    paths = [ROOT / name for name in names]
    assert not [path for path in paths if path.suffix not in KINDS and path.name not in NAMES]
    assert not [path for path in paths if path.is_symlink()]
    assert not [path for path in paths if path.stat().st_size > 1 << 20 and path.suffix != ".safetensors"]
    for path in paths:
        if path.suffix in (".py", ".js"):
            assert max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0) <= 400, path


def test_a_zip_is_small(tmp_path):
    published.pack(tmp_path / "node.zip")
    assert (tmp_path / "node.zip").stat().st_size < 20e6


def test_what_is_ignored_stays_ignored(tmp_path):
    """.comfyignore is read as git reads .gitignore: a pattern with a slash is a path from the top."""
    for name in ("tests/new", "svdq/tests.py", "workflows/headless/maker.py", "svdq/maker.py", "new/file.py"):
        Path(tmp_path, name).parent.mkdir(parents=True, exist_ok=True)
        Path(tmp_path, name).touch()
    Path(tmp_path, ".comfyignore").write_bytes((ROOT / ".comfyignore").read_bytes())
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert published.names(tmp_path) == [".comfyignore", "new/file.py", "svdq/maker.py", "svdq/tests.py"]
