"""The pack as ComfyUI's registry publishes it: what git has, without what .comfyignore names, as `comfy node pack` takes it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def names(root=ROOT):
    """Paths of the published files of a checkout. Skips the test where git does not know the folder."""
    def listed(*options):
        done = subprocess.run(["git", "-C", str(root), "ls-files", "-z", *options], capture_output=True, text=True) \
            if shutil.which("git") else None
        if done is None or done.returncode:
            pytest.skip("git does not know this folder")
        return {name for name in done.stdout.split("\0") if name and (root / name).is_file()}

    return sorted(listed() - listed("--cached", "--ignored", "--exclude-from", ".comfyignore"))


def pack(file):
    """Write the zip."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names():
            archive.write(ROOT / name, name)


def unpack(file, folder):
    """As an installer does: without the executable bits of scripts, which a zip need not carry."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)              # of our own making


def comfyui(tree, folder):
    """A ComfyUI of a user's in folder: a copy of a tree, with the running Python as the one of its venv."""
    from svdq_pack.workflows.headless import maker

    shutil.copytree(tree, folder, ignore=shutil.ignore_patterns("__pycache__", "user", "output"))
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    command = f'exec "{sys.executable}" "$@"'
    if maker.vision_cannot_load().exists():             # a user's torchvision fits his torch; here it is made to import
        (folder / "venv" / "sitecustomize.py").write_text(
            f"import sys; sys.path.append({str(ROOT / 'workflows' / 'headless')!r})\n"
            "import comfy_main; operators = comfy_main.declare_operators(); sys.path.pop()\n")
        command = f'PYTHONPATH="{folder / "venv"}" {command}'
    python.write_text(f"#!/bin/sh\n{command}\n")
    python.chmod(0o755)
    return folder


def start(*command, cwd, **environ):
    """(exit code, standard output, standard error) of a command in an environment that names none of ours."""
    ours = ("COMFYUI_PATH", "PYTHONPATH", "SVDQ_COMFYUI", "SVDQ_HF", "COMFYUI_DIR")
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env={name: value for name, value in os.environ.items() if name not in ours} | environ)
    return done.returncode, done.stdout, done.stderr
