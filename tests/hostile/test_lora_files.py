"""LoRA files of strangers: tensors that can be trusted, or one LoraError, in time and within the memory of the file."""

import io
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save, save_file

from svdq_pack.svdq import lora_file, lora_keys
from svdq_pack.svdq.errors import LoraError
from svdq_pack.svdq.lora_file import LONGEST_KEY, MAX_TENSORS, read_lora
from svdq_pack.tests.unit.helpers import assert_same_tensors, join, limit, split

LAYER = "transformer.x_embedder"
GOOD = {f"{LAYER}.lora_A.weight": torch.arange(256.).view(4, 64).bfloat16(), f"{LAYER}.lora_B.weight": torch.ones(128, 4),
        f"{LAYER}.alpha": torch.tensor(4.0)}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "lora.safetensors")


@pytest.fixture
def archive(tmp_path):
    return str(tmp_path / "lora.pt")


def refused(path, *words, seconds=20):
    with pytest.raises(LoraError) as caught, limit(seconds):
        read_lora(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 700 and message.isprintable()


def saved(content, **options):
    """The bytes of torch.save's archive."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rezipped(raw, change=lambda name, content: content, **options):
    """The archive anew, every part changed."""
    source, file = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as target:
        for part in source.infolist():
            target.writestr(part.filename, change(part.filename.partition("/")[2], source.read(part)))
    return file.getvalue()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


# ---- good ones

def test_safetensors(path):
    save_file(GOOD, path)
    assert_same_tensors(read_lora(path), GOOD)


@pytest.mark.parametrize("content", [
    GOOD, OrderedDict(GOOD), {"state_dict": GOOD, "epoch": 3}, {"lora": GOOD}, GOOD | {"steps": 5, "name": ["x", 1.5, None]},
    {key: torch.nn.Parameter(tensor) for key, tensor in GOOD.items()}], ids=str.__call__)
@pytest.mark.parametrize("protocol", [2, 4])
def test_archive(archive, content, protocol):
    """As ComfyUI unwraps it."""
    write(archive, saved(content, pickle_protocol=protocol))
    assert_same_tensors(read_lora(archive), GOOD)


def test_archive_of_a_module(archive):
    module = torch.nn.Sequential(OrderedDict(lora_A=torch.nn.Linear(4, 2), lora_B=torch.nn.Linear(2, 4)))
    write(archive, saved(module.state_dict()))
    assert_same_tensors(read_lora(archive), module.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_of_archives(archive, dtype):
    good = {key: tensor.to(dtype) for key, tensor in GOOD.items()}
    write(archive, saved(good))
    assert_same_tensors(read_lora(archive), good)


def test_views_in_archives(archive):
    """Transposed, a part of a larger one, and one down for q, k and v."""
    down, big = torch.randn(4, 64), torch.randn(8, 8)
    good = {f"x.{i}.lora_A.weight": down for i in range(3)} | {"y.lora_A.weight": down.t(), "z.lora_A.weight": big[2:4, 1:]}
    write(archive, saved(good))
    tensors = read_lora(archive)
    assert_same_tensors(tensors, good)
    assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
    assert len({id(tensor) for tensor in tensors.values()}) == 5


def test_whole_numbers(path):
    """An alpha may be one, and so is the shape that a LoRA wants."""
    good = GOOD | {f"{LAYER}.alpha": torch.tensor(4), f"{LAYER}.reshape_weight": torch.tensor([128, 128])}
    save_file(good, path)
    assert_same_tensors(read_lora(path), good)


@pytest.mark.parametrize("name", [b"lora-\xff.safetensors", b"lora-\xff.pt"])
def test_a_name_that_is_no_text(tmp_path, name):
    path = os.path.join(tmp_path, os.fsdecode(name))
    write(path, saved(GOOD) if path.endswith(".pt") else save(GOOD))
    assert_same_tensors(read_lora(path), GOOD)


# ---- keys

def many(count, name="{}.lora_A.weight"):
    return join({name.format(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}, b"")


@pytest.mark.parametrize("name", ["{}.lora_A.weight", "transformer.transformer_blocks.{}.attn.to_q.lora_A.weight",
                                  "lora_unet_single_blocks_{}_linear1.lora_down.weight", "{}", "x" * 230 + "{}.alpha"])
def test_many_keys(path, name):
    """What a file may have takes 1 to 2 s of one core; anything quadratic would take minutes."""
    write(path, many(MAX_TENSORS, name))
    start = time.process_time()             # of other programs beside this
    try:
        lora_keys.style(read_lora(path))
    except LoraError:
        pass                            # of another family
    assert time.process_time() - start < 30


def test_too_many_keys(path, archive):
    write(path, many(MAX_TENSORS + 1))
    refused(path)
    write(archive, saved({f"{i}.lora_A": GOOD[f"{LAYER}.alpha"] for i in range(MAX_TENSORS + 1)}))
    refused(archive)


def test_long_key(path, archive):
    save_file({"x" * LONGEST_KEY + ".alpha": torch.ones(1)}, path)
    refused(path, "names of up to 256 characters")
    write(archive, saved({"x" * LONGEST_KEY + ".alpha": torch.ones(1)}))
    refused(archive, "names of up to 256 characters")


@pytest.mark.parametrize("key", ["\ud800.alpha", "\x1b[2J.alpha", "<img src=x onerror=alert(1)>.alpha", "", ".", "\0.alpha"])
def test_odd_keys(archive, key):
    write(archive, saved({key: torch.tensor(float("nan"))}))
    refused(archive, "NaN")


@pytest.mark.parametrize("content, words", [
    ({1: torch.ones(2), "x.alpha": torch.ones(1)}, "holds no tensors by name"), ({("x", "y"): torch.ones(2)}, "are no text"),
    ({"x": 5}, "holds no tensors"), ([torch.ones(3)], "holds no tensors"), (torch.ones(3), "holds no tensors"),
    (None, "holds no tensors"), ({"state_dict": 5}, "holds no tensors"), ({}, "holds no tensors"),
    ({"state_dict": [torch.ones(2)], "x": torch.ones(2)}, "holds no tensors")])
def test_no_tensors_by_name(archive, content, words):
    write(archive, saved(content))
    refused(archive, "not a readable LoRA file", words)


# ---- numbers

@pytest.mark.parametrize("dtype, size", [("I32", 4), ("BOOL", 1), ("C64", 8), ("I8", 1), ("U8", 1), ("F8_E8M0", 1)])
def test_dtypes(path, dtype, size):
    header, data = split(join({f"{LAYER}.lora_A.weight": {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, 8 * size]}},
                              bytes(8 * size)))
    write(path, join(header, data))
    refused(path, f"{LAYER}.lora_A.weight is {dtype} [4, 2], and the numbers of a LoRA are one of F32, F16, BF16")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "I128", ""])
def test_dtypes_that_nobody_has(path, dtype):
    write(path, join({f"{LAYER}.lora_A.weight": {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, 4]}}, bytes(4)))
    refused(path)


@pytest.mark.parametrize("tensor, words", [
    (torch.ones(4, 2, dtype=torch.complex64), "complex64 [4, 2], and the numbers"), (torch.ones(4, 2).bool(), "is BOOL [4, 2]"),
    (torch.ones(4, 2).int(), "is I32 [4, 2]"), (torch.ones(4, 2).to(torch.float8_e4m3fnuz), "float8_e4m3fnuz [4, 2]"),
    (torch.ones(4, 2, device="meta"), "and a LoRA holds plain tensors"),
    (torch.ones(4, 2).to_sparse(), "and a LoRA holds plain tensors"),
    (torch.quantize_per_tensor(torch.ones(4, 2), 0.1, 0, torch.qint8), "and a LoRA holds plain tensors"),
    (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "and a LoRA holds plain tensors"),
    (torch.zeros(1).expand(10**6, 10**6), "claim more numbers than the file has"),
    (torch.ones(2, 2).expand(9, 2, 2), "claim more numbers than the file has"),
    (torch.ones([1] * 9), "no such sizes"), (torch.tensor([1, float("inf")]), "NaN or Inf")])
@pytest.mark.filterwarnings("ignore")
def test_tensors_in_archives(archive, tensor, words):
    write(archive, saved({f"{LAYER}.lora_A.weight": tensor}))
    refused(archive, words)


def test_many_axes(path):
    for axes, words in (9, "is F32 [1, 1, 1"), (64, "is F32 [1, 1, 1"), (65, "what cannot be"):
        save_file({f"{LAYER}.lora_A.weight": torch.ones([1] * axes)}, path)
        refused(path, words)


@pytest.mark.parametrize("dtype", ["F32", "F4"])
@pytest.mark.parametrize("shape", [[10**4000] * 2000, [2**63, 0], [10**4299 - 1], [0, 10**4299 - 1]], ids=range(4))
def test_huge_numbers(path, shape, dtype):
    """Whose product takes for ever, or that nobody can print."""
    write(path, join({f"{LAYER}.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}, b""))
    refused(path, "what cannot be", seconds=10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_no_numbers(path, dtype, bad):
    save_file(GOOD | {"x.lora_A.weight": torch.tensor([[1.0, bad, 2.0]]).to(dtype)}, path)
    refused(path, "x.lora_A.weight contains NaN or Inf")


# ---- files

@pytest.mark.parametrize("content, words", [
    (b"<!DOCTYPE html><html></html>", "text page"), (b"", "0 bytes"), (b"GGUF" + bytes(100), "GGUF"), (saved(GOOD), "pickle"),
    (struct.pack("<Q", 2**40) + b"{}", "not a complete safetensors file")])
def test_no_safetensors(path, content, words):
    write(path, content)
    refused(path, "not a readable LoRA file: ", words, "get it again")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"", b"PK", b"PK\3\4", pickle.dumps(GOOD, 2),
                                     saved(GOOD, _use_new_zipfile_serialization=False)])
def test_no_archive(archive, content):
    write(archive, content)
    refused(archive, "not a readable LoRA file: ", "get it again")


def test_compressed_archive(archive):
    """24 kB would be 24 MB."""
    write(archive, rezipped(saved({"x.lora_A.weight": torch.zeros(6_000_000)}), compression=zipfile.ZIP_DEFLATED))
    refused(archive, "compressed or overlap")


def test_compressed_archive_of_what_does_not_get_smaller(archive):
    raw = rezipped(saved({"x.lora_A.weight": torch.rand(1000)}), compression=zipfile.ZIP_DEFLATED)
    assert sum(part.file_size for part in zipfile.ZipFile(io.BytesIO(raw)).infolist()) < len(raw)
    write(archive, raw)
    refused(archive, "compressed or overlap")


def test_an_archive_of_another_computer(archive):
    write(archive, rezipped(saved(GOOD), lambda name, content: b"big" if name == "byteorder" else content))
    refused(archive, "another order of bytes")


def test_an_archive_of_many_parts(archive):
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(20_101):
            file.writestr(f"a/{i}", "")
        file.writestr("a/data.pkl", "")
    refused(archive, "it has 20,102 parts")


def test_a_large_pickle(archive):
    write(archive, rezipped(saved(GOOD), lambda name, content: content + bytes(5 << 20) if name == "data.pkl" else content))
    refused(archive, "its data.pkl has 5,24", "4,194,304 at most")


def test_a_large_storage(archive, monkeypatch):
    """Read in pieces, the last one shorter."""
    monkeypatch.setattr(lora_file, "MOST_TEXT", 4000)
    good = {"x.lora_A.weight": torch.randn(5, 1000)}
    write(archive, saved(good))
    assert_same_tensors(read_lora(archive), good)


def test_parts_that_overlap(archive):
    """Two tensors in one place of the archive, by its directory."""
    raw = saved({"a.lora_A": torch.zeros(100_000), "b.lora_A": torch.zeros(50)})
    parts = zipfile.ZipFile(io.BytesIO(raw)).infolist()
    big, small = (next(part for part in parts if part.filename.endswith(name)) for name in ("data/0", "data/1"))
    assert big.file_size == 400_000
    entry = raw.rindex(b"PK\1\2", 0, raw.rindex(small.filename.encode()))
    raw = raw[:entry + 16] + struct.pack("<III", big.CRC, big.file_size, big.file_size) + raw[entry + 28:]
    raw = raw[:entry + 42] + struct.pack("<I", big.header_offset) + raw[entry + 46:]
    write(archive, raw)
    refused(archive, "compressed or overlap")


@pytest.mark.parametrize("again", [lambda tensor: tensor, lambda tensor: tensor[:]])
def test_a_storage_for_everything(archive, again):
    """A tensor of a file may be used a few times, for q, k and v, and no more."""
    whole = torch.zeros(1000, 100)
    write(archive, saved({f"{i}.lora_A.weight": again(whole) for i in range(100)}))
    refused(archive, "claim more numbers")


@pytest.mark.parametrize("many, words", [(torch.zeros(100_000), "claim more numbers"), (torch.zeros(1), "claim more numbers")])
def test_tensors_that_nobody_can_name(archive, many, words):
    """In a list, where ComfyUI does not look: too much memory, or too many."""
    write(archive, saved(GOOD | {"list": [many[:] for _ in range(5 if len(many) > 1 else 20_001)]}))
    refused(archive, words)


@pytest.mark.parametrize("old, new", [(b"K\x40", b"J\0\0\0\x40"), (b"K\x40", b"J\0\0\0\xc0"), (b"K\x04", b"K\xff")])
def test_sizes_that_lie(archive, old, new):
    """In the shape, the strides and the size of the storage; a storage of torch.load may end before its tensor."""
    write(archive, rezipped(saved({"x.lora_A.weight": torch.ones(4, 64)}), lambda name, content: (
        content.replace(old, new) if name == "data.pkl" else content)))
    refused(archive)


def packed(*codes):
    """An archive of these opcodes."""
    return rezipped(saved(GOOD), lambda name, content: b"".join(codes) if name == "data.pkl" else content)


def test_nothing_is_called(archive, tmp_path):
    class Call:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    write(archive, packed(pickle.dumps({"x.lora_A": Call()}, 2)))
    refused(archive, "open, and a LoRA holds plain tensors")
    assert not (tmp_path / "made").exists()


# A rebuilt tensor of the archive's first storage, whose offset, size, strides and the rest come next
TENSOR = (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000"
          b"X\3\0\0\0cpuK\x01tQ")


def test_the_tensor_of_opcodes(archive):
    """The cases below are refused for what is wrong with them."""
    write(archive, packed(b"\x80\x02}X\1\0\0\0x" + TENSOR[2:], b"K\x00K\x01\x85K\x01\x85\x89NtRs."))
    assert read_lora(archive)["x"].shape == (1,)


@pytest.mark.parametrize("code", [
    pickle.LONG4, pickle.LONG, pickle.INT, pickle.FLOAT, pickle.STRING, pickle.BINSTRING, pickle.UNICODE, pickle.BINUNICODE8,
    pickle.BINBYTES8, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.DICT, pickle.EMPTY_SET,
    pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.DUP,
    pickle.POP, pickle.POP_MARK, pickle.PERSID, pickle.GET, pickle.PUT])
def test_opcodes_that_nobody_needs(code):
    assert code[0] not in lora_file._Archive.dispatch


@pytest.mark.parametrize("codes", [
    (b"\x80\x02}", b")\x85" + b"2\x86" * 60, b"K\x01s."),               # a name of pairs of pairs: 2^60 to hash
    (b"\x80\x02)\x85" + b"2\x86" * 60, b"q\0(h\0K\x01d."), (b"\x80\x04)\x85" + b"2\x86" * 60, b"q\0\x8f(h\0\x90."),
    (b"\x80\x04)\x85" + b"2\x86" * 60, b"q\0(h\0\x91."),
    (b"\x80\x02ccollections\nOrderedDict\n]", b")\x85" + b"2\x86" * 60, b"K\x01\x86a\x85R."),
    (b"\x80\x02Nr\xff\xff\xff\xff.",),                                  # the memo of an unpickler in C: 64 GB
    (b"\x80\x02" + b"(" * (3 << 20),), (b"\x80\x02" + b"]" * (3 << 20) + b"a" * (3 << 20) + b".",),
    (b"\x80\x02" + b"N0" * (2 << 20), b"N."), (b"",), (b".",), (b"\x80\x02X\xff\xff\xff\xffx.",),
    (b"\x80\x04\x8e" + b"\xff" * 8,), (b"\x80\x05\x96" + struct.pack("<Q", 3 << 30) + b".",),
    *((b"\x80\x02(NN", name, b"NNtQ.") for name in (b"N" + b"\x85" * 2_000_000, b"N2\x86" + b"2\x86" * 60, b"K\x01")),
    (b"\x80\x02N.",), *((TENSOR, b"K\x00", size, b")\x89NtR.") for size in (
        b"J\0\0\0\x11(" + b"N" * 100 + b"t\x86", b"\x8a\x05\0\0\0\0\x10X\1\0\0\0a\x86",
        b"(" + b"\x8a\xfe" * 0 + (b"\x8a\xff" + b"\x7f" * 255) * 9000 + b"t", b"K\x01", b"J\xff\xff\xff\xff\x85")),
    (TENSOR, b"K\x00))\x89NtR" + b"]" * 1_000_000 + b"a" * 999_999 + b"K\x01s.")],
    ids=range(24))
def test_pickles_that_take_for_ever(archive, codes):
    write(archive, packed(*codes))
    refused(archive, seconds=10)


@pytest.mark.parametrize("function", ["tensor", "find_class", "part"])
def test_memory_is_short(archive, monkeypatch, function):
    def short(*_, **__):
        raise MemoryError

    write(archive, saved(GOOD))
    monkeypatch.setattr(lora_file._Archive, function, short)
    refused(archive, "MemoryError")


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    refused(str(tmp_path / "pipe.pt"), "device or a pipe")


@pytest.mark.parametrize("change", ["cut", "overwritten"])
def test_changed_while_read(archive, monkeypatch, change):
    raw, tensor = saved(GOOD), lora_file._Archive.tensor

    def late(*arguments):
        write(archive, raw[:len(raw) // 2] if change == "cut" else raw)
        return tensor(*arguments)

    write(archive, raw)
    monkeypatch.setattr(lora_file._Archive, "tensor", late)
    time.sleep(0.02)                                    # the clock of the file system has to move
    refused(archive, "not a readable LoRA file")


def test_cut_archives(archive):
    raw = saved(GOOD)
    for end in range(0, len(raw), 37):
        write(archive, raw[:end])
        refused(archive, "not a readable LoRA file")


@pytest.mark.parametrize("seed", range(4))
def test_flipped_archives(archive, seed):
    """Bytes anywhere: the checksums of the parts find most of them. What still loads has the names that were there."""
    raw, random_ = saved(GOOD), random.Random(seed)
    for _ in range(150):
        spoilt = bytearray(raw)
        for _ in range(random_.choice((1, 1, 3))):
            spoilt[random_.randrange(len(raw))] ^= 1 << random_.randrange(8)
        write(archive, spoilt)
        try:
            assert set(read_lora(archive)) == set(GOOD)
        except LoraError as error:
            assert len(str(error)) < 700


@pytest.mark.parametrize("seed", range(4))
def test_flipped_pickles(archive, seed):
    """With checksums that are right."""
    raw, random_ = saved(GOOD), random.Random(seed)

    def flip(name, content):
        content = bytearray(content)
        for _ in range(random_.choice((1, 2, 4)) * (name == "data.pkl")):
            content[random_.randrange(len(content))] = random_.randrange(256)
        return bytes(content)

    for _ in range(150):
        write(archive, rezipped(raw, flip))
        try:
            with limit(60):
                tensors = read_lora(archive)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= 4 * len(raw)
        except LoraError as error:
            assert len(str(error)) < 700
