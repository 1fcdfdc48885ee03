"""svdq/files.py: opening what others wrote, and names that users give."""

import errno
import os

import pytest

from svdq_pack.svdq import files
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.tests.unit.helpers import limit

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def test_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("é", encoding="utf-8")
    assert files.read_text(path) == "é" == files.read_text(path, limit=2)
    with pytest.raises(CheckpointError, match="more than 1 bytes"):
        files.read_text(path, limit=1)
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="a.json: cannot be read: .*utf-8"):
        files.read_text(path)


@pytest.mark.parametrize("name", ["none.json", "", "a\0b", "x" * 5000])
def test_text_of_no_file(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be read|a device or a pipe"):
        files.read_text(tmp_path / name)


@needs_pipes
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with limit(60), pytest.raises(CheckpointError, match="pipe: this is a device or a pipe"):
        files.read_text(tmp_path / "pipe")
    with limit(60), pytest.raises(CheckpointError, match="a device or a pipe"):
        files.open_regular("/dev/zero")


@needs_pipes
def test_what_is_refused_is_closed(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    def free():
        """The number that the next file to be opened gets."""
        with open(os.devnull) as file:
            return file.fileno()

    before = free()
    for _ in range(3):
        with pytest.raises(CheckpointError):
            files.open_regular(tmp_path / "pipe")
    assert free() == before


def test_names_that_are_free(tmp_path):
    files.require_free(tmp_path / "new")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", ".", ".."):
        with pytest.raises(CheckpointError, match="exists already"):
            files.require_free(tmp_path / name)
    for path in (tmp_path / "no" / "new", tmp_path / "file" / "new", f"{tmp_path}/a\0b/new"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            files.require_free(path)


def test_a_name_that_is_taken_meanwhile(tmp_path):
    got, items = [], files.while_free(tmp_path / "new", range(2))
    with pytest.raises(CheckpointError, match="new: exists already"):
        for item in items:
            got.append(item)
            (tmp_path / "new").touch()
    assert got == [0, 1]


@pytest.mark.parametrize("text, name", [
    ("flux", "flux.safetensors"), (" flux.safetensors ", "flux.safetensors"), ("flux v1.0", "flux v1.0.safetensors"),
    ("フラックス", "フラックス.safetensors"), ("console", "console.safetensors"), ("a" * 200, "a" * 200 + ".safetensors")])
def test_names(text, name):
    assert files.new_name(text, "mine", ".safetensors").as_posix() == name


def test_names_with_folders():
    assert files.new_name("a/b/c", "mine", ".x", folders=True).as_posix() == "a/b/c.x"
    with pytest.raises(CheckpointError, match="no folders in front.*without folders"):
        files.new_name("a/b", "mine")


@pytest.mark.parametrize("text, why", [
    ("", "empty"), ("  ", "empty"), (".safetensors", "empty"), ("/etc/x", "empty"), ("a//b", "empty"), ("a/", "empty"),
    (".", "dot"), ("..", "dot"), ("../x", "dot"), ("a/../b", "dot"), (".hidden", "dot"), ("a.", "ends with a dot"),
    ("a /b", "space"), ("*", "holds one of"), ("a?b", "holds one of"), ("[a]", "holds one of"), ("a<b", "holds one of"),
    ("a|b", "holds one of"), ('a"b', "holds one of"), ("C:x", "holds one of"), ("a\\b", "holds one of"),
    ("a\0b", "control"), ("a\nb", "control"), ("\x1b[2J", "holds one of"), ("a\u202eb", "control"), ("\udcff", "control"),
    ("CON", "device"), ("nul.safetensors", "device"), ("a/com1", "device"), ("Lpt9.txt", "device"),
    ("a" * 201, "longer"), ("é" * 150, "longer"), (5, "no text"), (None, "no text"), (["a"], "no text")])
def test_bad_names(text, why):
    with pytest.raises(CheckpointError) as caught:
        files.new_name(text, "svdq-int4_r32-mine", ".safetensors", folders=True)
    message = str(caught.value)
    assert why in message and "'svdq-int4_r32-mine'" in message and len(message) < 400 and message.isprintable()


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full. Make room"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied"), "make this one"),
    (OSError("odd\x1b"), "odd"), (ValueError("embedded null byte"), "embedded null byte")])
def test_what_the_system_refuses(error, words):
    with pytest.raises(CheckpointError) as caught, files.writing("/a/b"):
        raise error
    assert str(caught.value).startswith("/a/b: cannot be written: ") and words in str(caught.value)
    assert files.disk_full(caught.value) == ("full" in words) and str(caught.value).isprintable()
    with pytest.raises(CheckpointError, match="^ours$"), files.writing("/a/b"):
        raise CheckpointError("ours")
