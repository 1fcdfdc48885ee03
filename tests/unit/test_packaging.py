"""The library that pip installs: svdq, all of it and nothing beside it, at work away from the checkout."""

import importlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import sys, setuptools.build_meta as backend
print(getattr(backend, "build_" + sys.argv[1])(sys.argv[2]))
"""


def run(*command, cwd, **environ):
    """The output of a command of the running Python; the test fails with what it said if it does."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", **environ})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def known():
    """Paths of the files in this checkout that git has."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True) \
        if shutil.which("git") else None
    if done is None or done.returncode:
        pytest.skip("git does not know this folder")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(known, tmp_path_factory):
    """(wheel, sdist), built of the files that git has in a folder of their own, the wheel of the unpacked sdist."""
    setuptools = pytest.importorskip("setuptools", "77", reason="no setuptools 77 to build with")
    assert setuptools
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in known:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    sdist = out / run("-c", BUILD, "sdist", out, cwd=tree).split()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(tree / "unpacked")               # of our own making
    wheel = out / run("-c", BUILD, "wheel", out, cwd=next((tree / "unpacked").iterdir())).split()[-1]
    return wheel, sdist


def test_an_sdist_is_the_library(built, known):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.split("/")[0] for name in names} - {""} == {
        "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "svdq", "svdq.egg-info"}
    assert {name for name in known if name.startswith("svdq/")} <= names


def test_a_wheel_is_svdq_alone(built, known):
    """Above all no `kernels`, which is Hugging Face's, and no `nodes`, which is ComfyUI's."""
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
        meta, = {name.split("/")[0] for name in names if ".dist-info/" in name}
        assert archive.read(f"{meta}/top_level.txt").decode().split() == ["svdq"]
        assert archive.read(f"{meta}/entry_points.txt").decode() == "[console_scripts]\nsvdq = svdq.__main__:main\n"
    ours = {name for name in names if not name.startswith(f"{meta}/")}
    assert built[0].name.endswith("-py3-none-any.whl") and f"{meta}/licenses/LICENSE" in names
    assert ours == {name for name in known if name.startswith("svdq/")}
    assert {"svdq/kernels/cuda/ptx.cuh", "svdq/hf/model.py"} <= ours


def test_what_managers_install_has_its_languages(known):
    """.comfyignore leaves out what only a clone needs: folders, files, and one pattern of what git never has."""
    lines = (ROOT / ".comfyignore").read_text().splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    assert all(pattern.endswith("/") or pattern in known for pattern in ignored)
    left = [name for name in known if not name.startswith(tuple(ignored))]
    assert {"locales/zh/nodeDefs.json", "web/docs/SVDQInfo/zh.md", "README.zh.md", "install.py"} <= set(left)
    assert not [name for name in left if name.startswith(("tools/", "tests/"))]


def test_a_wheel_works_away_from_the_checkout(built, tmp_path, golden_dir):
    there, elsewhere = tmp_path / "packages", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", there, built[0],
        cwd=elsewhere)
    assert {path.name for path in there.iterdir()} == {"svdq", "bin", next(there.glob("*.dist-info")).name}
    said = run("-c", "import svdq, svdq.kernels; print(svdq.__file__)", cwd=elsewhere, PYTHONPATH=str(there))
    assert Path(said.strip()) == there / "svdq" / "__init__.py"
    said = run("-m", "svdq", "info", golden_dir / "model_int4_flux_schnell_like.safetensors", cwd=elsewhere,
               PYTHONPATH=str(there))
    assert "FLUX-like (schnell)" in said and "int4" in said


def test_importing_the_package_is_light(tmp_path):
    """diffusers and its company take seconds, and who wants the format alone may not have them."""
    heavy = {"diffusers", "peft", "transformers", "accelerate", "torch"}
    said = run("-c", f"import sys, svdq; print(sorted({heavy} & set(sys.modules)))", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert said == "[]\n"


def test_the_extra_is_what_the_error_says(monkeypatch):
    """pip install svdq[diffusers] brings what the ImportError of an absent diffusers says to install."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "999")       # importing it asks for diffusers
    before = set(sys.modules)
    hf = importlib.import_module("svdq_pack.svdq.hf")
    for name in set(sys.modules) - before:              # others may import it without diffusers, and want its error
        monkeypatch.delitem(sys.modules, name)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.findall(r'"([^"]+)"', re.search(r"^diffusers = \[(.*?)\]", text, re.M)[1])
    assert extra == shlex.split(hf.INSTALL)[4:] and shlex.split(hf.INSTALL)[:4] == ["python", "-m", "pip", "install"]
    assert {wanted for wanted in extra if ">=" in wanted} == {f"{name}>={lowest}" for name, lowest in hf.LOWEST.items()}


def test_what_comfyui_installs_is_what_pip_installs():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)\]", text, re.M)[1])
    assert needed == (ROOT / "requirements.txt").read_text().split() and "torch" not in needed
