"""Thousands of damaged files. Each loads completely or ends in a CheckpointError, in time; nothing else may happen.

A failure prints the case; `case(mutation, kind, seed)` makes the same bytes again.
"""

import json
import math
import random

import pytest

from svdq_pack.svdq import report
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.tests.unit.helpers import MODELS, join, limit, split

SECONDS = 20
SIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1,
        "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}


@pytest.fixture(scope="module")
def whole(golden_dir):
    return {kind: (golden_dir / f"{name}.safetensors").read_bytes() for kind, name in MODELS.items()}


# Bytes

def flip_header(rng, raw):
    end = 8 + int.from_bytes(raw[:8], "little")
    return flip(rng, raw, rng.choice((0, 8, 8, 8)), end, rng.choice((1, 1, 2, 8)))


def flip_data(rng, raw):
    start = 8 + int.from_bytes(raw[:8], "little")
    if rng.random() < 0.5:
        return flip(rng, raw, start, len(raw), rng.choice((1, 4, 64)))
    at, size = rng.randrange(start, len(raw)), rng.choice((1, 2, 64, 4096))
    return raw[:at] + (bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * size)[:len(raw) - at] + raw[at + size:]


def flip(rng, raw, start, end, times):
    spoilt = bytearray(raw)
    for _ in range(times):
        spoilt[rng.randrange(start, end)] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    return bytes(spoilt)


def splice(rng, raw):
    """A piece of the header goes elsewhere, vanishes or is doubled; the length field follows, mostly."""
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8:8 + length], raw[8 + length:]
    a, b, to = (rng.randrange(length) for _ in range(3))
    b = min(b, a + rng.choice((1, 10, 200, length)))
    piece, text = text[a:b], rng.choice((text, text[:a] + text[b:]))
    text = text[:to] + rng.choice((piece, piece * 2, b"")) + text[to:]
    return join(text, data) if rng.random() < 0.8 else raw[:8] + text + data


def truncate(rng, raw):
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[:rng.choice((rng.randrange(16), rng.randrange(end), rng.randrange(len(raw)), len(raw) - 1))]


def relength(rng, raw):
    length = int.from_bytes(raw[:8], "little")
    new = rng.choice((0, 1, length - 1, length + 1, length + 8, len(raw) - 8, len(raw), 2**31, 2**63, 2**64 - 1,
                      rng.randrange(len(raw)), rng.randrange(2**64)))
    return new.to_bytes(8, "little") + raw[8:]


# Valid JSON that lies

def edit_entries(rng, raw):
    header, data = split(raw)
    for _ in range(rng.choice((1, 1, 3))):
        entry = header[tensor_name(rng, header)]
        field = rng.choice(("dtype", "shape", "data_offsets"))
        if field == "dtype":
            entry[field] = rng.choice((*SIZE, "F4", "Q8", "", None, 7))
        elif rng.random() < 0.2:
            entry[field] = rng.choice(([], None, "x", {}, [0], [-1], [1.5], [2**64], [[1]], [1] * 1000))
        elif entry[field]:
            entry[field][rng.randrange(len(entry[field]))] = number(rng, rng.choice(entry[field]))
    return join(header, data)


def edit_metadata(rng, raw):
    header, data = split(raw)
    metadata = header["__metadata__"]
    key = rng.choice((*metadata, "quantization_config", "quantization_config"))
    text = metadata[key]
    at, size = rng.randrange(len(text)), rng.choice((0, 1, 20, len(text)))
    new = rng.choice(("", "[", "{", '"', "null", "-1", "1e999", "\x00", "\ud83d\ude00", "[" * 5000, "9" * 5000))
    metadata[key] = text[:at] + new + text[at + size:]
    if rng.random() < 0.1:
        header["__metadata__"] = rng.choice(({}, None, [], "x", {"a": None}, {"quantization_config": new}))
    if rng.random() < 0.1:
        del header["__metadata__"]
    return join(header, data)


def number(rng, old):
    return rng.choice((0, 1, -1, old + 1, old - 1, old * 2, old // 2, 2**31, 2**53, 2**63, 2**64 - 1,
                       rng.randrange(5000)))


def tensor_name(rng, header):
    return rng.choice([name for name in header if name != "__metadata__"])


# Whole files again, with other tensors in them

def rebuild(rng, raw):
    """Tensors are dropped, renamed, retyped, reshaped or resized; header and data fit each other."""
    header, data = split(raw)
    metadata = header.pop("__metadata__")
    tensors = {name: [e["dtype"], e["shape"], data[slice(*e["data_offsets"])]] for name, e in header.items()}
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        name = tensor_name(rng, tensors)
        rng.choice((drop, rename, retype, reshape, resize))(rng, tensors, name)
    header, pieces, end = {"__metadata__": metadata}, [], 0
    for name, (dtype, shape, piece) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(piece)]}
        pieces.append(piece)
    return join(header, b"".join(pieces))


def drop(rng, tensors, name):
    del tensors[name]


def rename(rng, tensors, name):
    other = tensor_name(rng, tensors)
    new = rng.choice((other, name + "x", name[1:], name.replace(".0.", f".{rng.choice((1, 2, 10**9, -1, ''))}."),
                      name.replace("lora_down", "proj_down").replace("lora_up", "proj_up"),
                      name.replace("qkv_proj", "attn.to_qkv"), "single_" + name, name.replace("single_", ""),
                      name.rpartition(".")[0] + "." + other.rpartition(".")[2], "\x1b[2J" + name, "\u202e" + name,
                      "transformer_blocks." + name, "transformer_blocks.0." + name, "model." + name))
    tensors[new] = tensors.pop(name)


def retype(rng, tensors, name):
    dtype, shape, piece = tensors[name]
    tensors[name] = [rng.choice([other for other in SIZE if SIZE[other] == SIZE[dtype]]), shape, piece]


def reshape(rng, tensors, name):
    dtype, shape, piece = tensors[name]
    total = math.prod(shape)
    divisor = rng.choice([d for d in (1, 2, 3, 4, 16, 128, 256, total) if d and total % d == 0])
    shape = rng.choice((shape[::-1], [total], [1, *shape], [*shape, 1], [divisor, total // divisor],
                        [total // divisor, divisor]))
    tensors[name] = [dtype, shape, piece]


def resize(rng, tensors, name):
    dtype, shape, piece = tensors[name]
    axis = rng.randrange(len(shape))
    size = rng.choice((0, 1, shape[axis] - 1, shape[axis] + 1, shape[axis] // 2, shape[axis] * 2, 16, 128))
    shape = [*shape[:axis], size, *shape[axis + 1:]]
    total = math.prod(shape) * SIZE[dtype]
    tensors[name] = [dtype, shape, (piece * (total // max(len(piece), 1) + 1))[:total].ljust(total, b"\1")]


# mutation: cases per golden model. Those that mostly load cost 20 ms each, the others 2
CASES = {flip_header: 400, splice: 300, truncate: 100, relength: 60, edit_entries: 300, edit_metadata: 150,
         rebuild: 450, flip_data: 120}
MAY_LOAD = {flip_header, splice, edit_entries, edit_metadata, rebuild, flip_data}


def case(mutation, kind, seed, whole):
    return mutation(random.Random(f"{mutation.__name__} {kind} {seed}"), whole[kind])


def consume(path):
    """All a loader, a node and the command line do with a file."""
    facts = report.describe(path)
    assert report.as_text(facts) and json.dumps(facts)
    opened = Checkpoint(path).require()
    assert not facts["problems"]
    layers = 0
    for _, tiles, bias in opened.layers(opened.shape.comfy_places()):
        assert bias.isfinite().all()
        layers += len(tiles)
    assert layers == len(opened.slots)
    assert all(tensor.isfinite().all() for _, tensor in opened.plain(opened.shape.comfy_plain()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mutation", CASES, ids=lambda mutation: mutation.__name__)
def test_fuzz(tmp_path, whole, mutation, kind):
    loaded = 0
    for seed in range(CASES[mutation]):
        path = tmp_path / f"{seed}.safetensors"             # stays behind if the interpreter itself dies
        path.write_bytes(case(mutation, kind, seed, whole))
        try:
            with limit(SECONDS):
                consume(path)
            loaded += 1
        except CheckpointError as error:
            assert str(path) in str(error), f"{mutation.__name__} {kind} {seed}: no path in: {error}"
            assert len(str(error)) < len(str(path)) + 1000, f"{mutation.__name__} {kind} {seed}: too long: {error}"
        except BaseException as error:                      # a panic of the library's Rust is no Exception
            raise AssertionError(f"case({mutation.__name__}, {kind!r}, {seed}): {error!r}") from error
        path.unlink()
    assert loaded < CASES[mutation] and (loaded > 0) == (mutation in MAY_LOAD), f"{loaded} loaded: this fuzzes nothing"
