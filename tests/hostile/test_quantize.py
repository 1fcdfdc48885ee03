"""What cannot be quantised, or not there: one CheckpointError, before any work, and nothing left on the disk."""

import itertools
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.quantize import FileSource, quantize
from svdq_pack.svdq.quantize.calibration import Collector, Statistics, inputs
from svdq_pack.tests.unit.helpers import MODELS, limit, save


@pytest.fixture(scope="module")
def flux(golden_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    checkpoint.dequantize(golden_dir / f"{MODELS['nvfp4']}.safetensors", path, torch.bfloat16)
    return path


def refused(folder, source, *words, target="a.safetensors", error=CheckpointError, **options):
    """One message with all words, before any block is begun."""
    said, before = [], sorted(os.listdir(folder))
    with pytest.raises(error) as caught, limit(60):
        quantize(source, folder / target, **{"rank": 16} | options, progress=said.append)
    message = str(caught.value)
    assert all(word in message for word in words) and len(message) < 700 + 2 * len(str(folder)), message
    assert message.replace("\n", "").isprintable() and not any("block" in one.text for one in said)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("options, words", [
    ({"rank": 0}, ["rank 0", "multiple of 16 up to 32"]), ({"rank": 24}, ["rank 24"]), ({"rank": -16}, ["rank -16"]),
    ({"rank": 48}, ["rank 48", "up to 32", "128 channels"]), ({"precision": "int8"}, ["'int8'", "int4, nvfp4"]),
    ({"device": "cuda:99"}, ["device 'cuda:99'"]), ({"device": "gpu"}, ["device 'gpu'"]),
    ({"device": "meta"}, ["device 'meta'"]), ({"device": "hpu"}, ["device 'hpu'"]),
    ({"device": "privateuseone"}, ["device 'privateuseone'"]), ({"device": "x\x1b" * 999}, ["device '", "..."]),
    ({"seed": 10 ** 23}, ["seed 1000", "at most 18 digits"]), ({"seed": -10 ** 18}, ["at most 18 digits"]),
    ({"seed": 0.5}, ["seed 0.5"])])
def test_options(flux, tmp_path, options, words):
    refused(tmp_path, flux, *words, **options)


def test_target(flux, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    refused(tmp_path, flux, "a.safetensors: exists already")
    assert (tmp_path / "a.safetensors").read_bytes() == b"precious"
    refused(tmp_path, flux, "there is no folder", target="no/a.safetensors")
    refused(tmp_path, flux, "ends in .safetensors", target="a.ckpt")
    refused(tmp_path, flux, "exists already", target=".")
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    refused(tmp_path, flux, "exists already", target="link.safetensors")


@pytest.mark.parametrize("name", ["*", "a?", "[a]", "a|b", "a<b", 'a"b', "a\0b", "a\nb", "\x1b[2J", "a" * 300, "é" * 110,
                                  "nul", ".a", ""])
def test_names_of_targets(flux, tmp_path, name):
    (tmp_path / ".other.safetensors.abcdefgh.part").touch()
    refused(tmp_path, flux, target=f"{name}.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == [".other.safetensors.abcdefgh.part"]


def test_work_folder_somewhere_else(flux, tmp_path):
    for work in (tmp_path / "no" / "work", tmp_path / "a\0b", tmp_path / ("x" * 300)):
        refused(tmp_path, flux, work=work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"\xff", b" " * (2 << 20), b"9" * 5000, 1 << 40,
                                     None], ids=["empty", "deep", "list", "bytes", "long", "number", "terabyte", "folder"])
def test_damaged_job(flux, tmp_path, content):
    work = tmp_path / "a.safetensors.svdq-work"
    work.mkdir()
    (work / "transformer_blocks.0.safetensors").touch()
    if content is None:
        (work / "job.json").mkdir()
        refused(tmp_path, flux, "is not of this program")
    else:
        (work / "job.json").write_bytes(b"" if isinstance(content, int) else content)
        if isinstance(content, int):
            os.truncate(work / "job.json", content)             # all holes
        refused(tmp_path, flux, "its job.json is damaged", "Remove the folder to start anew")
    assert (work / "transformer_blocks.0.safetensors").exists()


def test_work_folder_that_is_none(flux, tmp_path):
    """A link would be written through, and could not be removed after an hour of work; a pipe would be waited for."""
    work = tmp_path / "a.safetensors.svdq-work"
    (tmp_path / "elsewhere").mkdir()
    work.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, flux, "is not of this program")
    work.unlink()
    work.symlink_to("nowhere")
    refused(tmp_path, flux, "is not of this program")
    work.unlink()
    work.mkdir()
    os.mkfifo(work / "job.json")
    refused(tmp_path, flux, "is not of this program")
    (work / "job.json").unlink()
    (work / "lock").mkdir()
    refused(tmp_path, flux, "svdq-work: cannot be locked")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("content, words", [
    (lambda folder: (folder / "b.safetensors.svdq-work").write_text("a file"), ["not of this program"]),
    (lambda folder: ((folder / "b.safetensors.svdq-work").mkdir(), (folder / "b.safetensors.svdq-work" / "x").touch()),
     ["not of this program"]),
    (lambda folder: ((folder / "b.safetensors.svdq-work").mkdir(),
                     (folder / "b.safetensors.svdq-work" / "job.json").write_text("{}")), ["another version, source"])])
def test_work_folder_of_others(flux, tmp_path, content, words):
    content(tmp_path)
    refused(tmp_path, flux, *words, target="b.safetensors")
    assert (tmp_path / "b.safetensors.svdq-work").exists()


def test_disk(flux, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 50_000_000, 50_000_000))
    refused(tmp_path, flux, "50 MB free", "70 MB while it runs", "Make room")


def test_sources(flux, tmp_path, golden_dir):
    for name in MODELS.values():
        refused(tmp_path, golden_dir / f"{name}.safetensors", "SVDQ model already")
    refused(tmp_path, tmp_path / "none.safetensors", "no such file")
    broken = load_file(flux)
    broken["single_blocks.0.linear2.weight"][3, 5] = float("nan")
    refused(tmp_path, save(tmp_path / "nan.safetensors", broken), "0.linear2.weight has NaN or Inf in 1 places")
    odd = dict(broken, **{"img_in.weight": torch.zeros(192, 64)})
    refused(tmp_path, save(tmp_path / "odd.safetensors", odd), "[192, 64]", "multiple of 128")


def test_calibration(flux, tmp_path):
    shape = FileSource(flux).shape
    wrong = flux1.Shape(**vars(shape) | {"in_features": 384})
    collectors = {layer: Collector(k) for layer, k in inputs(wrong).items()}
    for collector in collectors.values():
        collector.update(torch.ones(3, collector.k))
    statistics = Statistics.from_collectors(wrong, collectors)
    statistics.save(tmp_path / "fill.safetensors")
    refused(tmp_path, flux, "captured from another kind of model", "in_features 384, the model has 64",
            statistics=tmp_path / "fill.safetensors")
    refused(tmp_path, flux, "of another kind of model", statistics=statistics)
    refused(tmp_path, flux, "not a calibration file", statistics=flux)


def test_source_that_changes(flux, tmp_path):
    """While it is read: found before the file gets its name."""
    path = tmp_path / "flux.safetensors"
    shutil.copy(flux, path)

    def change(progress):
        if progress.text.startswith("single block"):
            os.utime(path, (1, 1))

    with pytest.raises(CheckpointError, match="has changed while it was being read"):
        quantize(path, tmp_path / "a.safetensors", "int4", 16, progress=change)
    with pytest.raises(CheckpointError, match="svdq-work: holds a run that was begun with another source. Remove the folder"):
        quantize(path, tmp_path / "a.safetensors", "int4", 16)
    assert not (tmp_path / "a.safetensors").exists()


def test_source_object_that_changes(flux, tmp_path):
    turns = itertools.count()

    class Source(FileSource):
        fingerprint = property(lambda self: str(next(turns)))

    with pytest.raises(CheckpointError, match="flux.safetensors: has changed while it was being quantised. Remove "):
        quantize(Source(flux), tmp_path / "a.safetensors", "int4", 16)
    assert not (tmp_path / "a.safetensors").exists()


def test_source_that_vanishes(flux, tmp_path):
    """FileSource reads a part of its file for its fingerprint; another source may fail in its own way."""
    path = tmp_path / "flux.safetensors"
    shutil.copy(flux, path)
    source = FileSource(path)
    path.unlink()
    refused(tmp_path, source, "flux.safetensors: cannot be read", "No such file")


def test_nan_of_a_source_object(flux, tmp_path):
    """A MODEL in a graph cannot be checked beforehand: the layer is named when it comes."""
    file = FileSource(flux)

    class Source:
        name, shape, fingerprint, plain = "the MODEL", file.shape, "1", file.plain

        def layer(self, name):
            weight, bias = file.layer(name)
            return weight * (float("inf") if name == "single_blocks.0.linear1" else 1), bias

    with pytest.raises(CheckpointError, match="the MODEL: single_blocks.0.linear1 has NaN or Inf"):
        quantize(Source(), tmp_path / "a.safetensors", "int4", 16)


def test_extreme_weights(flux, tmp_path):
    """Layers of zeros, of one number, of huge and of tiny ones still make a file that loads and holds no NaN."""
    tensors = load_file(flux)
    for name, value in (("double_blocks.0.img_attn.qkv.weight", 0.0), ("double_blocks.0.img_mlp.0.weight", 1.0),
                        ("double_blocks.0.txt_mlp.2.weight", 1e4), ("single_blocks.0.linear1.weight", 1e-12),
                        ("double_blocks.0.img_mod.lin.weight", 0.0), ("double_blocks.0.txt_mod.lin.weight", 0.0)):
        tensors[name].fill_(value)
    source = save(tmp_path / "odd.safetensors", tensors)
    for precision in ("int4", "nvfp4"):
        quantize(source, tmp_path / f"{precision}.safetensors", precision, 16)
        opened = checkpoint.Checkpoint(tmp_path / f"{precision}.safetensors").require()
        for layer, tiles, bias in opened.layers(opened.shape.comfy_places()):
            assert bias.isfinite().all(), layer
            for tile in tiles:
                for field, value in vars(tile.weight).items():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        assert value.float().isfinite().all(), (layer, field)
