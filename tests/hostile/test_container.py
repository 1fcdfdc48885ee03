"""The reader of safetensors beside the library's: both take the same files, and say the same of them. And a file that somebody
writes to while it is read is an error, never a signal or other numbers."""

import json
import os
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from svdq_pack.svdq import container
from svdq_pack.svdq.container import DTYPES, TensorFile, TensorInfo, write_tensors
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.tests.unit.helpers import bits, join

CASES = 3000
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5),
           "d": torch.tensor(7, dtype=torch.uint8), "é": torch.tensor([True, False, True])}
RAW = save(TENSORS, {"format": "pt", "note": "é\n"})
PIECES = ['"', "{", "}", "[", "]", ",", ":", "0", "1", "-", "+", ".", "e", "1e2", "true", "null", "NaN", "Infinity", " ", "\t",
          "\n", "\\", "\\u00e9", "\\ud800", "\0", "\x7f", "é", "\ufeff", "F32", "BF16", "U8", "BOOL", '"a"', '"c"', '"x":{}',
          '"shape":[],', '"dtype":"F32",', "9" * 30, "__metadata__"]


def mutated(seed):
    """The header with a few characters replaced, dropped, doubled or moved, and its length to match."""
    rng, text = random.Random(seed), RAW[8:8 + int.from_bytes(RAW[:8], "little")].decode()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, end, size = rng.randrange(len(text)), rng.randrange(len(text)), rng.choice((0, 0, 1, 2, 8))
        piece = rng.choice((rng.choice(PIECES), text[end:end + size], ""))
        text = text[:at] + piece + text[at + size:]
    data = RAW[8 + int.from_bytes(RAW[:8], "little"):]
    return join(text.encode(), rng.choice((data, data, data, data[:-1], data + b"\0")))


def by_library(path):
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, OverflowError, UnicodeError, TypeError):
        return None


def by_us(path):
    try:
        file = TensorFile(path)
        with file.reading() as get:
            return {name: get(name) for name in file.tensors}, file.metadata
    except CheckpointError:
        return None


def test_the_library_agrees(tmp_path):
    path, taken, differing = tmp_path / "x.safetensors", 0, []
    for seed in range(CASES):
        path.write_bytes(mutated(seed))
        theirs, ours = by_library(path), by_us(path)
        taken += ours is not None
        same = (theirs is None) == (ours is None) and (ours is None or (
            ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
            and all(ours[0][name].dtype == tensor.dtype and ours[0][name].shape == tensor.shape
                    and torch.equal(bits(ours[0][name]), bits(tensor)) for name, tensor in theirs[0].items())))
        if not same:
            differing.append((seed, theirs is not None, ours is not None))
    assert not differing and 0.05 * CASES < taken < 0.8 * CASES


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path, dtype):
    stored = torch.arange(1, 1 + 3 * 4 * DTYPES[dtype].itemsize, dtype=torch.uint8)
    tensor = (stored % 2 == 1 if dtype == "BOOL" else stored.view(DTYPES[dtype])).view(3, 4)
    write_tensors(tmp_path / "x", {"a": TensorInfo(dtype, (3, 4))}, {}, [("a", tensor)])
    for read in (by_us, by_library):
        found, = read(tmp_path / "x")[0].values()
        assert found.dtype == tensor.dtype and torch.equal(bits(found), bits(tensor))


def test_new_dtype_of_the_format(tmp_path):
    """Somebody else's tensor is no reason to refuse ours."""
    header = {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
              "b": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]}}
    (tmp_path / "x").write_bytes(join(header, b"123456"))
    with TensorFile(tmp_path / "x").reading() as get:
        assert get("b").tolist() == [0x35, 0x36]
        with pytest.raises(CheckpointError, match="a is F4, which this pack cannot read"):
            get("a")


def test_into_a_tensor(tmp_path):
    (tmp_path / "x").write_bytes(RAW)
    with TensorFile(tmp_path / "x").reading() as get:
        out = torch.zeros(3, 2)
        assert get("a", out) is out and out.tolist() == [[0, 1], [2, 3], [4, 5]]
        assert get("a", half := torch.zeros(6, dtype=torch.float16)) is half and half.tolist() == [0, 1, 2, 3, 4, 5]


def rewrite(path):
    """In place, as a program does that saves again: same size."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:8] + data[8:][::-1])


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def replace(path):
    new = path.with_name("new")
    new.write_bytes(path.read_bytes() + b"\0")
    os.replace(new, path)


@pytest.mark.parametrize("change", [rewrite, cut, empty, replace, os.unlink])
def test_changed_before_it_is_read(tmp_path, change):
    path = tmp_path / "x.safetensors"
    path.write_bytes(RAW)
    os.utime(path, (1, 1))
    file = TensorFile(path)
    change(path)
    with pytest.raises(CheckpointError, match="x.safetensors: (has changed while|cannot be read: .*No such file)"):
        with file.reading() as get:
            get("a")


@pytest.mark.parametrize("change", [rewrite, cut, empty])
def test_changed_while_it_is_read(tmp_path, change):
    path = tmp_path / "x.safetensors"
    path.write_bytes(RAW)
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="x.safetensors: has changed while it was being read. Wait"):
        with TensorFile(path).reading() as get:
            first = get("a")
            change(path)
            kept = first.clone()
            for name in TENSORS:
                get(name)
    assert torch.equal(first, kept)


def test_replaced_while_it_is_read(tmp_path):
    """The old file is still there for whoever has it open: nothing to complain of."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(RAW)
    with TensorFile(path).reading() as get:
        replace(path)
        assert torch.equal(get("a"), TENSORS["a"])


def test_header_too_long_to_be_read(tmp_path):
    """Refused before anything is written."""
    with pytest.raises(CheckpointError, match="its header would have 17,000,"):
        write_tensors(tmp_path / "x", {}, {"a": "x" * 17_000_000}, [])
    assert not any(tmp_path.iterdir())


def test_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="x.safetensors: cannot be written: the disk is full. Make room"):
        write_tensors(tmp_path / "x.safetensors", {}, {}, [])
    with pytest.raises(CheckpointError, match="none/x.safetensors: cannot be written: .*No such file"):
        write_tensors(tmp_path / "none" / "x.safetensors", {}, {}, [])
    with pytest.raises(CheckpointError, match="cannot be written: .*null"):
        write_tensors(tmp_path / "a\0b", {}, {}, [])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["_parse", "TensorFile._fill"])
def test_memory_is_short(tmp_path, monkeypatch, function):
    def short(*_, **__):
        raise MemoryError

    path = tmp_path / "x.safetensors"
    path.write_bytes(RAW)
    monkeypatch.setattr(f"svdq_pack.svdq.container.{function}", short)
    with pytest.raises(CheckpointError, match="x.safetensors: cannot be read: out of memory"):
        with TensorFile(path).reading() as get:
            get("a")


def test_header_is_read_once(tmp_path, monkeypatch):
    """Parsing FLUX.1's takes as long as reading a layer."""
    (tmp_path / "x").write_bytes(RAW)
    file = TensorFile(tmp_path / "x")
    monkeypatch.setattr(json, "loads", None)
    for _ in range(3):
        with file.reading() as get:
            assert torch.equal(get("a"), TENSORS["a"])


def test_file_that_is_being_written(tmp_path, monkeypatch):
    """A change so soon after another that the time of the file would not tell: wait, but not for ever."""
    path, waits = tmp_path / "x.safetensors", []
    path.write_bytes(RAW)
    monkeypatch.setattr(container, "CLOCK_STEP", 10**15)
    monkeypatch.setattr(container.time, "sleep", waits.append)
    with pytest.raises(CheckpointError, match="has changed while it was being read"):
        TensorFile(path)
    assert len(waits) == 20
    monkeypatch.setattr(container.time, "sleep", lambda _: os.utime(path, (1, 1)))      # the writer has ended
    with TensorFile(path).reading() as get:
        assert torch.equal(get("a"), TENSORS["a"])
