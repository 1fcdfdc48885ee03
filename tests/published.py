"""The pack as ComfyUI's registry publishes it: what git has, without what .comfyignore names, as `comfy node pack` takes it."""

import shutil
import subprocess
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
