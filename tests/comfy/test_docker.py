"""The README's Docker line: its steps, in a fresh folder and in their order, as far as they go without an engine. Packages are
not installed, which the stand-ins for apt-get and pip write down, and ComfyUI is cloned from a tree that is here."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from svdq_pack.tests import published

ROOT = published.ROOT
COMFYUI = "https://github.com/Comfy-Org/ComfyUI"
IDENTITY = "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="steps of a Linux image")


@pytest.fixture(scope="module")
def command():
    """The words of the docker command; the last is the script."""
    block, = re.findall(r"^```\n(docker run .*?)\n```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return shlex.split(block)


def test_the_command(command):
    """One command over a public image with nvcc, which leaves nothing behind but what it paints."""
    *options, image, shell, flags, script = command
    assert options == ["docker", "run", "--rm", "--gpus", "all", "-v", "$PWD/pictures:/pictures"]
    assert re.fullmatch(r"pytorch/pytorch:\d+\.\d+\.\d+-cuda[\d.]+-cudnn9-devel", image)
    assert (shell, flags) == ("bash", "-ec") and "'" not in script and '"' not in script


def git(*arguments):
    subprocess.run(["git", *IDENTITY, *map(str, arguments)], check=True, capture_output=True)


def stand_in(file, text):
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_the_steps(command, newest, tmp_path):
    published.names()                           # skips where git does not know this folder
    if not shutil.which("bash"):
        pytest.skip("no bash")
    comfyui = published.comfyui(newest, tmp_path / "tree")
    python = f'exec "{comfyui / "venv" / "bin" / "python"}" "$@"'
    (comfyui / ".gitignore").write_text("venv/\n")
    git("init", "-q", comfyui)
    git("-C", comfyui, "add", "-A")
    git("-C", comfyui, "commit", "-q", "-m", "a tree")

    bin, work, pictures, log = (tmp_path / name for name in ("bin", "work", "pictures", "log"))
    bin.mkdir()
    work.mkdir()
    stand_in(bin / "apt-get", f'echo "apt-get $*" >> "{log}"')
    stand_in(bin / "python", f'[ "$2" = pip ] || {python}\necho "$*" >> "{log}"\nshift 3\n'
             'while [ $# -gt 0 ]; do [ "$1" = -r ] && [ -s "$2" ] || exit 9; shift 2; done')
    script = re.sub(r"(?<=git clone )(?:<this repository>|\S+)(?= ComfyUI/custom_nodes/)", f"file://{ROOT}", command[-1])
    assert f"file://{ROOT}" in script and COMFYUI in script and "/pictures" in script
    code, said, errors = published.start(
        "bash", "-ec", script.replace("/pictures", str(pictures)) + " --set Sampler.steps=4", cwd=work,
        PATH=f"{bin}{os.pathsep}{os.environ['PATH']}", GIT_CONFIG_COUNT="2",
        GIT_CONFIG_KEY_0=f"url.file://{comfyui}.insteadOf", GIT_CONFIG_VALUE_0=COMFYUI,
        GIT_CONFIG_KEY_1="safe.directory", GIT_CONFIG_VALUE_1="*")
    assert code == 0, errors
    assert log.read_text().splitlines() == [
        "apt-get update", "apt-get install -y git g++", "-m pip install -r ComfyUI/requirements.txt -r "
        "ComfyUI/custom_nodes/ComfyUI-SVDQ/requirements.txt"]
    picture, = pictures.iterdir()
    assert Path(said.splitlines()[-1]) == picture and Image.open(picture).size == (160, 160)
    assert f"starting ComfyUI in {work / 'ComfyUI'}" in errors
