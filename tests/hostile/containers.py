"""Damage to safetensors files: function(rng, bytes of a good file) -> bytes.

STRUCTURE is of headers, names, shapes and metadata, DATA of the numbers behind them; {function: weight}.
"""

import math

from svdq_pack.tests.unit.helpers import join, split

SIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1,
        "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}
FOREIGN = ("C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "Q8", "", None, 7)
ODD_NAMES = ("<img src=x onerror=alert(1)>", "[[x|javascript:alert(1)]]", "https://example.org/", "\x1b[2J", "\u202e",
             "a\nb", "\0", "x" * 3000, "\U0001f600", "..", "")


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
            entry[field] = rng.choice((*SIZE, *FOREIGN))
        elif rng.random() < 0.2:
            entry[field] = rng.choice(([], None, "x", {}, [0], [-1], [1.5], [2**64], [[1]], [1] * 1000))
        elif entry[field] and isinstance(entry[field], list):
            entry[field][rng.randrange(len(entry[field]))] = number(rng, rng.choice(entry[field]))
    return join(header, data)


def edit_metadata(rng, raw):
    header, data = split(raw)
    metadata = header.setdefault("__metadata__", {"format": "pt"})
    key = rng.choice(list(metadata))
    text = metadata[key]
    at, size = rng.randrange(len(text) + 1), rng.choice((0, 1, 20, len(text)))
    new = rng.choice(("", "[", "{", '"', "null", "-1", "1e999", "\x00", "\ud83d\ude00", "[" * 5000, "9" * 5000))
    metadata[key] = text[:at] + new + text[at + size:]
    if rng.random() < 0.2:
        metadata[rng.choice(ODD_NAMES) + key] = metadata.pop(key)
    if rng.random() < 0.1:
        header["__metadata__"] = rng.choice(({}, None, [], "x", {"a": None}, {key: new}))
    if rng.random() < 0.1:
        del header["__metadata__"]
    return join(header, data)


def number(rng, old):
    old = old if isinstance(old, int) else 1
    return rng.choice((0, 1, -1, old + 1, old - 1, old * 2, old // 2, 2**31, 2**53, 2**63, 2**64 - 1,
                       rng.randrange(5000)))


def tensor_name(rng, header):
    return rng.choice([name for name in header if name != "__metadata__"])


# Whole files again, with other tensors in them

def rebuild(rng, raw):
    """Tensors are dropped, renamed, retyped, reshaped or resized; header and data fit each other."""
    header, data = split(raw)
    metadata = header.pop("__metadata__", {})
    tensors = {name: [e["dtype"], e["shape"], data[slice(*e["data_offsets"])]] for name, e in header.items()}
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if tensors:
            rng.choice((drop, rename, retype, reshape, resize))(rng, tensors, tensor_name(rng, tensors))
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
                      name.rpartition(".")[0] + "." + other.rpartition(".")[2], rng.choice(ODD_NAMES) + name,
                      rng.choice(ODD_NAMES),
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
    if not shape:
        shape = [1]
    axis = rng.randrange(len(shape))
    size = rng.choice((0, 1, shape[axis] - 1, shape[axis] + 1, shape[axis] // 2, shape[axis] * 2, 16, 128))
    shape = [*shape[:axis], size, *shape[axis + 1:]]
    total = math.prod(shape) * SIZE[dtype]
    tensors[name] = [dtype, shape, (piece * (total // max(len(piece), 1) + 1))[:total].ljust(total, b"\1")]


def markup(rng, raw):
    """A tensor more, or a renamed one, whose name a page would run."""
    header, data = split(raw)
    name, odd = tensor_name(rng, header), rng.choice(ODD_NAMES)
    entry = header.pop(name) if rng.random() < 0.3 else {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    header[rng.choice((odd, odd + name, f"{name}{odd}", f"{name.split('.')[0]}.{odd}"))] = entry
    return join(header, data)


STRUCTURE = {flip_header: 3, splice: 3, truncate: 1, relength: 1, edit_entries: 4, edit_metadata: 3, rebuild: 6, markup: 1}
DATA = {flip_data: 1}


def of_files(scale=1):
    """All of these for a class that has good(rng) -> bytes and of_bytes(rng, bytes) -> Case: {function(self, rng): weight}."""
    def bind(mutation, structural):
        def make(self, rng):
            return self.of_bytes(rng, mutation(rng, self.good(rng)))
        make.__name__, make.structural = mutation.__name__, structural
        return make
    return ({bind(mutation, True): scale * weight for mutation, weight in STRUCTURE.items()}
            | {bind(mutation, False): scale * weight for mutation, weight in DATA.items()})
