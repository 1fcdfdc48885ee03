"""What the tests do to files behind the back of the code they test. Import as `svdq_pack.tests.unit.helpers`."""

import json
import signal
import struct
import time
from contextlib import contextmanager

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MODELS = {"int4": "model_int4_flux_schnell_like", "nvfp4": "model_nvfp4_flux_dev_like"}
BLOCKS, REST = "transformer_blocks.safetensors", "unquantized_layers.safetensors"


def metadata_of(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def save(path, tensors, metadata=None):
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def save_legacy(folder, tensors, metadata):
    """As published before v1: two files of tensors, two of JSON (checkpoint-format 1.4)."""
    folder.mkdir()
    blocks = {name for name in tensors if name.startswith(("transformer_blocks.", "single_transformer_blocks."))}
    save(folder / BLOCKS, {name: tensors[name] for name in blocks})
    save(folder / REST, {name: tensor for name, tensor in tensors.items() if name not in blocks})
    for key in ("config", "comfy_config"):
        (folder / f"{key}.json").write_text(metadata[key])
    return folder


def split(raw):
    """The bytes of a safetensors file -> (header dict, data bytes)."""
    length, = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def assert_same_tensors(got, want):
    """Names, dtypes, shapes, bytes."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(got[name]), bits(tensor)), name


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@contextmanager
def limit(seconds):
    """Python that loops is interrupted; native code that returns late is reported."""
    def late(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before, start = signal.signal(signal.SIGALRM, late), time.monotonic()
    signal.alarm(seconds)
    try:
        yield
        assert time.monotonic() - start < seconds, f"took {time.monotonic() - start:.0f} s"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
