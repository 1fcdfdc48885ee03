"""Hostile checkpoints: one file, and the legacy folder of two with JSON beside them."""

import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from svdq_pack.nodes.host.load import load_model
from svdq_pack.nodes.info import SVDQInfo
from svdq_pack.svdq import checkpoint, report
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.tests.hostile import containers, models
from svdq_pack.tests.hostile.frame import Case, Fault, Hostile, data_bytes, full_disk, node
from svdq_pack.tests.unit.helpers import BLOCKS, REST, join, split

INFO = node(SVDQInfo)
SELDOM = 0.05           # share of what loads that becomes a MODEL, too, which takes three times as long


def read_all(path, whole=False):
    """All a loader, a node and the command line do with a file."""
    text = INFO.execute(Path(path).name).args[0]
    if whole:
        json.dumps(report.describe(path), allow_nan=False)
    opened = Checkpoint(path)
    if ("  PROBLEM  " in text) != bool(opened.problems):
        raise Fault("the report and the loader do not agree", text)
    opened.require()
    layers = 0
    for name, tiles, bias in opened.layers(opened.shape.comfy_places()):
        layers += len(tiles)
        values = [value for tile in tiles for value in vars(tile.weight).values() if isinstance(value, torch.Tensor)]
        if not all(value.isfinite().all() for value in (bias, *values)
                   if value is not None and value.dtype in (torch.float32, torch.bfloat16, torch.float16)):
            raise Fault("NaN or Inf in a layer", name)
    if layers != len(opened.slots):
        raise Fault("layers are missing", f"{layers} of {len(opened.slots)}")
    for name, tensor in opened.plain(opened.shape.comfy_plain()):
        if not tensor.isfinite().all():
            raise Fault("NaN or Inf in a tensor", name)
    if whole:
        load_model(path, torch.float32, 16)


class Checkpoints(Hostile):
    name, share = "checkpoint", 3

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        self.path = folder / "diffusion_models" / "svdq-int4_r32-new.safetensors"
        names = {"int4": models.write, "nvfp4": partial(models.golden, "model_nvfp4_flux_dev_like")}
        self.files = [make(folder / "diffusion_models" / f"{name}.safetensors").read_bytes() for name, make in names.items()]

    def good(self, rng):
        return rng.choice(self.files)

    def of_bytes(self, rng, raw, outcome=None):
        self.path.write_bytes(raw)
        return Case(partial(read_all, self.path, rng.random() < SELDOM), self.path.name, outcome)

    def header_of_one_kind(self, rng):
        """Very many tensors, very deep names, a header near the limit."""
        header, data = split(self.good(rng))
        text = json.dumps(header).encode()
        header = rng.choice((
            lambda: text[:-1] + b"," + b",".join(rng.choice((
                b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}',
                b'"%d":{"dtype":"F32","shape":[0],"data_offset\\u0073":[0,0]}', b'"%d":{}', b'"%d":[]')) % i
                                                 for i in range(rng.choice((1000, 20_000, 60_000)))) + b"}",
            lambda: text + b" " * rng.choice((1, 1 << 20, 17 << 20)),
            lambda: text[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            lambda: text.replace(b'"__metadata__"', b'"__metadata__":{},"__metadata__"', 1)))()
        return self.of_bytes(rng, join(header, data))

    def beginning_of_another(self, rng):
        """What other programs write, under this name."""
        raw = self.good(rng)
        return self.of_bytes(rng, rng.choice((b"GGUF", b"PK\3\4", b"\x80\2", b"<!DOCTYPE html>", b"<html", b'{"', b"version ht",
                                              b"", bytes(8), b"\xff" * 8)) + raw[rng.choice((0, 4, 8)):][:rng.choice((0, 9,
                                                                                                                      5000))])

    def replaced_while_read(self, rng):
        """Cut, or written over by numbers as good as the first. Two files must not be mixed."""
        raw = self.good(rng)
        self.path.write_bytes(raw)
        header, data = split(raw)
        begin, end = header[rng.choice([name for name in header if name.endswith(".qweight")])]["data_offsets"]
        at, cut, start = rng.randrange(6), rng.random() < 0.1, len(raw) - len(data)

        def read_meanwhile():
            opened = Checkpoint(self.path).require()
            for done, (_, tiles, _) in enumerate(opened.layers(opened.shape.comfy_places())):
                before = [tile.weight.qweight.clone() for tile in tiles]
                if done == at:
                    with open(self.path, "r+b") as file:
                        if cut:
                            file.truncate(start + len(data) // 2)
                        else:
                            file.seek(start + begin)
                            file.write(bytes(byte ^ 0x11 for byte in data[begin:end]))
                    if not all(torch.equal(tile.weight.qweight, one) for tile, one in zip(tiles, before)):
                        raise Fault("a layer changes with its file")
            for _ in opened.plain(opened.shape.comfy_plain()):
                pass
            raise Fault("loads though its file changed")

        return Case(read_meanwhile, self.path.name, touches=(os.path.relpath(self.path, self.folder),))

    @data_bytes
    def numbers_at_the_ends(self, rng):
        """The largest, the smallest and the odd ones of a dtype: what a published file never holds may be refused, NaN must."""
        tensors = load(self.good(rng))
        name = rng.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
        values = tensors[name].reshape(-1).clone()
        values[rng.randrange(len(values))] = rng.choice((float("nan"), float("inf"), -float("inf"), 3.3e38, -3.3e38, 9e-41,
                                                         -0.0, 0.0, 1e-30, 6e4))
        tensors[name] = values.reshape(tensors[name].shape)
        return self.of_bytes(rng, save(tensors))

    mutations = containers.of_files(10) | {header_of_one_kind: 2, beginning_of_another: 4, replaced_while_read: 2,
                                           numbers_at_the_ends: 10}


class LegacyFolders(Hostile):
    name, share = "legacy", 1

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        source = models.write(folder / "diffusion_models" / "int4.safetensors")
        tensors = load(source.read_bytes())
        inside = {name for name in tensors if "transformer_blocks." in name}
        self.path, self.out = folder / "diffusion_models" / "svdq-old", folder / "merged.safetensors"
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        self.good_files = {BLOCKS: save({name: tensors[name] for name in inside}),
                           REST: save({name: tensors[name] for name in tensors.keys() - inside}),
                           "config.json": metadata["config"].encode(), "comfy_config.json": metadata["comfy_config"].encode()}

    def case(self, rng, files):
        """files {name: bytes, or function(path) that makes it}"""
        self.path.mkdir()
        for name, content in files.items():
            (content if callable(content) else partial(_write, content))(self.path / name)
        named, disk = rng.choice((self.path, self.path, self.path / BLOCKS)), rng.random() < 0.03

        def use():
            if disk:
                with full_disk():
                    checkpoint.merge(named, self.out)
            if named == self.path:
                read_all(named)
            checkpoint.merge(named, self.out)
            Checkpoint(self.out).require()

        return Case(use, self.folder.name if disk else self.path.name, makes=("merged.safetensors",))

    def good(self, rng):
        return self.good_files[BLOCKS if rng.random() < 0.6 else REST]

    def of_bytes(self, rng, raw):
        mine = min((BLOCKS, REST), key=lambda name: abs(len(self.good_files[name]) - len(raw)))
        return self.case(rng, self.good_files | {mine: raw})

    def files(self, rng):
        """Missing, in each other's place, the same twice."""
        files = dict(self.good_files)
        for _ in range(rng.choice((1, 1, 2))):
            name, other = rng.choice(list(files)), rng.choice(list(self.good_files))
            if rng.random() < 0.4 and len(files) > 1:
                del files[name]
            else:
                files[name] = self.good_files[other]
        return self.case(rng, files)

    def odd_files(self, rng):
        """A pipe, a folder, a link into nowhere or to itself, a file nobody may read."""
        name = rng.choice(list(self.good_files))
        odd = rng.choice((os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path), lambda path: os.symlink(path.name,
                                                                                                                 path),
                          lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("/dev/null", path)))
        return self.case(rng, self.good_files | {name: odd})

    def texts(self, rng):
        """JSON files that are none, or are long, deep, in another encoding."""
        name = rng.choice(("config.json", "comfy_config.json"))
        good = self.good_files[name]
        at = rng.randrange(len(good))
        big = 20 << 20 if rng.random() < 0.3 else 2 << 20
        text = rng.choice((b"", b"{", b"null", b"[" * 100_000, good[:at],
                           good[:at] + bytes([rng.randrange(256)]) + good[at + 1:],
                           b"\xff\xfe" + good, good.decode().encode("utf-16"), b"\0" * 100, b'"' + b"x" * big + b'"',
                           good[:at] + b"<img src=x onerror=alert(1)>\x1b[2J" + good[at:], good + good))
        return self.case(rng, self.good_files | {name: text})

    mutations = containers.of_files(2) | {files: 6, odd_files: 6, texts: 20}


def _write(content, path):
    path.write_bytes(content)


CLASSES = (Checkpoints, LegacyFolders)
