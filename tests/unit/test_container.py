"""Safetensors files: written tensor by tensor, read back by us and by the library."""

import io

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.svdq import container
from svdq_pack.svdq.container import DTYPES, NAMES, TensorFile, TensorInfo, replacing, write_tensors
from svdq_pack.svdq.errors import CheckpointError, shown
from svdq_pack.tests.unit.helpers import assert_same_tensors


@pytest.fixture
def tensors():
    """Every dtype with random bits, and the shapes that go wrong: scalar, empty, odd sizes, not contiguous."""
    random = torch.Generator().manual_seed(0)
    made = {name: torch.randint(0, 2 if name == "BOOL" else 256, (3, 5, dtype.itemsize), generator=random,
                                dtype=torch.uint8).view(dtype)[..., 0] for name, dtype in DTYPES.items()}
    return made | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7), "transposed": torch.rand(4, 6).t(),
                   "strided": torch.arange(20.0)[::2], "ünï/コード": torch.ones(1, dtype=torch.bfloat16)}


def specs(tensors):
    return {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


METADATA = {"config": '{\n "a": "é"\n}', "empty": "", "quotes": '"\\\u2028\x00'}


def test_round_trip(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    write_tensors(path, specs(tensors), METADATA, tensors.items())
    assert_same_tensors(load_file(path), tensors)
    file = TensorFile(path)
    assert file.tensors == specs(tensors) and file.metadata == METADATA
    with file.reading() as get:
        assert_same_tensors({name: get(name).clone() for name in tensors}, tensors)
    assert sum(info.nbytes for info in file.tensors.values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_rows(tmp_path):
    """Of the first axis, into new memory, into memory of ours, and of another dtype."""
    tensor = torch.randn(10, 3)
    write_tensors(tmp_path / "x", specs({"a": torch.zeros(5), "b": tensor}), {}, {"a": torch.zeros(5), "b": tensor}.items())
    with TensorFile(tmp_path / "x").reading() as get:
        for rows in ((0, 10), (2, 7), (9, 10), (4, 4)):
            assert torch.equal(get("b", rows=rows), tensor[slice(*rows)])
            for dtype in (torch.float32, torch.bfloat16):
                out = torch.empty(rows[1] - rows[0], 3, dtype=dtype)
                assert get("b", out, rows) is out and torch.equal(out, tensor[slice(*rows)].to(dtype))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200])
def test_longer_than_what_is_read_at_a_time(size, tmp_path, monkeypatch):
    monkeypatch.setattr("svdq_pack.svdq.container.SCRATCH", 64)
    tensors = {"a": torch.arange(size, dtype=torch.uint8), "b": torch.arange(size).float()}
    write_tensors(tmp_path / "x", specs(tensors), {}, tensors.items())
    with TensorFile(tmp_path / "x").reading() as get:
        assert_same_tensors({name: get(name) for name in tensors}, tensors)


def test_disk_that_reads_less_than_it_is_asked_for(tmp_path, tensors, monkeypatch):
    class Slow(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    write_tensors(tmp_path / "x", specs(tensors), METADATA, tensors.items())
    monkeypatch.setattr(container, "open_regular", Slow)
    file = TensorFile(tmp_path / "x")
    assert file.tensors == specs(tensors) and file.metadata == METADATA
    with file.reading() as get:
        assert_same_tensors({name: get(name) for name in tensors}, tensors)


@pytest.mark.parametrize("error", [CheckpointError("ours"), KeyboardInterrupt()])
def test_a_part_that_is_taken_away(tmp_path, error):
    """While it is written: what ended the writing is said, not that the part is gone."""
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "x"):
        for part in tmp_path.iterdir():
            part.unlink()
        raise error
    assert caught.value is error and not list(tmp_path.iterdir())


def test_layout_on_disk(tmp_path):
    """The library's own file of one tensor is the same, byte for byte: header padded to 8, then the data."""
    tensors = {"a": torch.arange(4, dtype=torch.int8)}
    write_tensors(tmp_path / "ours", specs(tensors), {"k": "v"}, tensors.items())
    save_file(tensors, tmp_path / "theirs", {"k": "v"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_metadata_and_no_tensors(tmp_path):
    write_tensors(tmp_path / "x", {}, {}, [])
    file = TensorFile(tmp_path / "x")
    assert (file.tensors, file.metadata) == ({}, {})


def fails(tensors):
    yield from list(tensors.items())[:3]
    raise RuntimeError("quantiser died")


@pytest.mark.parametrize("stream, error", [
    (fails, "quantiser died"),
    (lambda t: list(t.items())[:-1], "ended before ünï/コード"),
    (lambda t: [*t.items(), ("more", torch.zeros(1))], "got more"),
    (lambda t: list(t.items())[::-1], "got ünï/コード"),
    (lambda t: [(name, tensor.double() if name == "F32" else tensor) for name, tensor in t.items()], "got F32"),
    (lambda t: [(name, tensor[:2] if name == "I8" else tensor) for name, tensor in t.items()], "got I8"),
])
@pytest.mark.parametrize("existing", [b"old", None])
def test_a_failed_write_changes_nothing(tmp_path, tensors, stream, error, existing):
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(existing)
    with pytest.raises((CheckpointError, RuntimeError), match=error):
        write_tensors(path, specs(tensors), METADATA, stream(tensors))
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if existing else [])
    assert not existing or path.read_bytes() == existing


def test_unwritable_dtype_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="x: a is F8_E8M0, which this pack cannot write"):
        write_tensors(tmp_path / "x", {"a": TensorInfo("F8_E8M0", (1,))}, {}, [])
    assert not any(tmp_path.iterdir())


def test_replaces_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    (plain := tmp_path / "plain").touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_interrupt_leaves_no_part(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


def test_reading_names_the_file(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors").reading() as get:
        with pytest.raises(CheckpointError, match="x.safetensors: .*missing"):
            get("missing")


def test_shown():
    assert shown("transformer_blocks.0.ä") == "transformer_blocks.0.ä"
    assert shown("\x1b[31m\n") == r"'\x1b[31m\n'"
    assert shown("x" * 10**7) == "x" * 100 + "..." and shown(64) == "64"
