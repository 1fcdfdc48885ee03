"""A whole small FLUX through quantize(): what is written, that it is the model, and that a stopped run ends the same."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.svdq import checkpoint, cli
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.families.family import by_layer, swap_halves
from svdq_pack.svdq.kernels import weights
from svdq_pack.svdq.quantize import FileSource, picture, quantize, run
from svdq_pack.svdq.quantize.calibration import Collector, Statistics, inputs
from svdq_pack.tests.unit.helpers import MODELS, limit, metadata_of, relative, save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sources(golden_dir, tmp_path_factory):
    """{precision: path of the golden model as an ordinary bf16 FLUX}"""
    folder = tmp_path_factory.mktemp("sources")
    for precision, name in MODELS.items():
        checkpoint.dequantize(golden_dir / f"{name}.safetensors", folder / f"{precision}.safetensors", torch.bfloat16)
    return {precision: folder / f"{precision}.safetensors" for precision in MODELS}


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    """{precision: (path of what quantize made, its report)}"""
    folder = tmp_path_factory.mktemp("made")
    outputs = {precision: folder / f"{precision}.safetensors" for precision in sources}
    return {precision: (out, quantize(sources[precision], out, precision, 16)) for precision, out in outputs.items()}


DRAFT = {"alternations": 1, "smooth_rounds": 1}


@pytest.fixture(scope="module")
def draft(made):
    """After `made`, which is about layers, the quantiser does one round of each kind: the rest is about runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Recipe", partial(run.Recipe, **DRAFT))
        yield


@pytest.fixture(scope="module")
def small(draft, tmp_path_factory):
    """A FLUX of 128 channels, the least there is, with two double blocks and three single ones, and statistics of it."""
    folder, random = tmp_path_factory.mktemp("small"), torch.Generator().manual_seed(1)
    shape = flux1.Shape(hidden=128, depth=2, depth_single=3, in_features=64, context_dim=32, vec_dim=16, guidance=False)
    tensors = {}
    sizes = {name: size for layer in by_layer(shape.comfy_places()) for name, size in layer.tensors().items()}
    for name, size in (sizes | {place.name: place.tensor.shape for place in shape.comfy_plain()}).items():
        values = torch.randn(size, generator=random)
        tensors[name] = (values / size[1] ** 0.5 if len(size) == 2 else 0.1 * values).bfloat16()
        if name.endswith(".scale"):
            tensors[name] = torch.ones(128).bfloat16()
    collectors = {layer: Collector(k) for layer, k in inputs(shape).items()}
    for collector in collectors.values():
        collector.update(torch.randn(80, collector.k, generator=random))
    Statistics.from_collectors(shape, collectors, calls=3).save(folder / "calibration.safetensors")
    return save(folder / "flux.safetensors", tensors), folder / "calibration.safetensors"


# What is written

def test_published_format(made, sources, precision, model):
    """The tensors of the golden file of this precision, names, dtypes, shapes and metadata; and it can be loaded."""
    path, _ = made[precision]
    got, want = Checkpoint(path).require(), Checkpoint(model)
    assert got.tensors == want.tensors and got.notices == [] and got.ranks == want.ranks == {16: 12}
    metadata = metadata_of(path)
    assert metadata.keys() == metadata_of(model).keys() | {"svdq_quantizer"}
    assert metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    for key in ("quantization_config", "config", "comfy_config"):
        mine, theirs = json.loads(metadata[key]), json.loads(metadata_of(model)[key])
        assert mine.keys() >= theirs.keys() - {"_name_or_path"}, key
    assert json.loads(metadata["quantization_config"]) == json.loads(metadata_of(model)["quantization_config"])
    stored = load_file(path)
    for slot in got.slots:
        if slot.kind == "w4a4":
            assert torch.equal(stored[f"{slot.module}.smooth"], stored[f"{slot.module}.smooth_orig"])
    single = "single_transformer_blocks.0."
    assert torch.equal(stored[f"{single}qkv_proj.smooth"], stored[f"{single}mlp_fc1.smooth"])      # kernels rely on it
    assert not path.with_name(f"{path.name}.svdq-work").exists() and not list(path.parent.glob(".*"))


def test_is_the_model(made, sources, precision):
    """Every layer stands for the weights and the bias of the source, the rest is the source's."""
    opened, source = Checkpoint(made[precision][0]), load_file(sources[precision])
    for layer, tiles, bias in opened.layers(opened.shape.comfy_places()):
        dense, shift = torch.zeros_like(source[f"{layer}.weight"]).float(), torch.zeros_like(bias)
        for tile in tiles:
            part, extra = weights.dequantize(tile.weight)
            dense[tile.row:tile.row + part.shape[0], tile.col:tile.col + part.shape[1]] = part
            shift[tile.row:tile.row + part.shape[0]] += extra
        weight = source[f"{layer}.weight"].float()
        # GPTQ of a modulation gives up directions its input never takes.
        assert relative(dense, weight) < (0.15 if layer.endswith("lin") else 0.1), layer
        assert relative(bias + shift, source[f"{layer}.bias"].float()) < 0.5, layer      # corrected, not another
    for name, tensor in opened.plain(opened.shape.comfy_plain()):
        assert torch.equal(tensor, source[name].to(torch.bfloat16)), name


def test_scale_halves_of_norm_out(made, sources):
    source = load_file(sources["int4"])["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(load_file(made["int4"][0])["norm_out.linear.weight"], swap_halves(source))


@pytest.mark.parametrize("variant, in_features, guidance, tensors, nbytes", [
    ("dev", 64, True, (2604, 2908), (6_767_999_104, 7_038_360_136)),
    ("schnell", 64, False, (2600, 2904), (6_747_539_584, 7_017_900_616)),
    ("canny", 128, True, (2604, 2908), (6_768_392_320, 7_038_753_352)),
    ("fill", 384, True, (2604, 2908), (6_769_965_184, 7_040_326_216))])
def test_sizes_of_flux_1(variant, in_features, guidance, tensors, nbytes):
    """checkpoint-format 3: tensor count and bytes of the published files, rank 32."""
    shape = flux1.Shape(3072, 19, 38, in_features, 4096, 768, guidance)
    for precision, count, size in zip(("int4", "nvfp4"), tensors, nbytes):
        specs = dict(run._slot_specs(shape.slots(), precision, 32)) | dict(run._plain_specs(shape))
        assert (len(specs), sum(info.nbytes for info in specs.values())) == (count, size)


def test_report(made, precision):
    path, report = made[precision]
    stored = json.loads(metadata_of(path)["svdq_quantizer"])
    assert stored == {name: value for name, value in report.items() if name != "seconds"}
    assert (report["precision"], report["rank"], report["calibration"], report["source"]) == (
        precision, 16, "data-free", f"{precision}.safetensors")
    assert [layer["module"] for layer in report["layers"]] == [slot.module for slot in Checkpoint(path).slots]
    for layer in report["layers"]:
        assert 14 < layer["sqnr"] < 60, layer
        if layer["kind"] == "w4a4":
            assert 0 < layer["smooth_min"] < layer["smooth_max"] and 0 < layer["rank_energy"] < 1
            assert 0.02 < layer["weight_error"] < 0.15
    text = picture.as_text(report)
    assert precision in text and "double mlp_context_fc1" in text and "single_transformer_blocks.0" in text
    drawing = xml.etree.ElementTree.fromstring(picture.svg(report | {"source": "<&\">"}))
    assert len(drawing.findall("{*}polyline")) == 15 and len(drawing.findall("{*}circle")) == 15


def test_calibration_changes_the_file(small, tmp_path):
    path, calibration = small
    report = quantize(path, tmp_path / "a.safetensors", "int4", 16, calibration)
    assert report["calibration"] == {"calls": 3, "tokens": 80 * 29, "note": "",
                                     "fingerprint": Statistics.load(calibration).fingerprint()}
    quantize(path, tmp_path / "b.safetensors", "int4", 16)
    one, other = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert not torch.equal(one["transformer_blocks.0.qkv_proj.smooth"], other["transformer_blocks.0.qkv_proj.smooth"])


def test_source_object(small, tmp_path):
    """Anything with the four members; it may have no biases, and other dtypes and strides."""
    file = FileSource(small[0])

    class Source:
        name, shape, fingerprint = "merged", file.shape, "1"

        def layer(self, name):
            weight, _ = file.layer(name)
            return torch.nn.Parameter(weight.float().t().contiguous().t()), None

        def plain(self):
            return ((name, tensor.half()) for name, tensor in file.plain())

    report = quantize(Source(), tmp_path / "a.safetensors", "nvfp4", 16)
    assert report["source"] == "merged"
    made = Checkpoint(tmp_path / "a.safetensors").layers(file.shape.comfy_places())
    bias = {layer: bias for layer, _, bias in made}
    assert bias["double_blocks.0.img_attn.qkv"].abs().max() < 0.2


def test_progress(small, tmp_path):
    said = []
    quantize(small[0], tmp_path / "a.safetensors", "int4", 16, progress=said.append)
    assert [one.done for one in said] == sorted(one.done for one in said)
    assert all(one.total == said[0].total >= one.done >= 0 for one in said) and said[-1].done == said[0].total
    assert "checking flux.safetensors" in said[0].text and said[0].seconds_left is None
    working = [one for one in said if "block " in one.text and "writing" not in one.text]
    assert [one.text for one in working[:2]] == ["double block 1 of 2, img_mod.lin", "double block 1 of 2, img_attn.qkv"]
    assert working[-1].text == "single block 3 of 3, linear2" and all(one.seconds_left > 0 for one in working[1:])


# Stopped and continued

class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The bytes a run makes that nobody stops."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    quantize(small[0], path, "int4", 16, small[1])
    return path.read_bytes()


def continued(small, tmp_path):
    said = []
    quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1], progress=said.append)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    return (tmp_path / "a.safetensors").read_bytes(), said


@pytest.mark.parametrize("at", ["checking", "double block 1 of 2, img_mod.lin", "double block 2 of 2, txt_mlp.0",
                                "single block 3 of 3, linear2", "writing a.safetensors",
                                "writing single_transformer_blocks.1"])
def test_cancel(small, whole, tmp_path, at):
    """What progress raises passes through, nothing has the final name, and the next run makes the same bytes."""
    def stop(progress):
        if progress.text.startswith(at):
            raise Stop

    with pytest.raises(Stop):
        quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1], progress=stop)
    kept = ["a.safetensors.svdq-work"] * (not at.startswith(("checking", "double block 1")))
    assert [entry.name for entry in tmp_path.iterdir()] == kept
    got, said = continued(small, tmp_path)
    assert got == whole
    if at.startswith("single block 3"):
        resumed = next(one for one in said if not one.text.startswith("checking"))
        assert resumed.text == at.replace("linear2", "modulation.lin") and resumed.done > 0.8 * resumed.total


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A work folder with four of five blocks."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_at("single block 3", small, folder / "a.safetensors")
    return folder / "a.safetensors.svdq-work"


def stop_at(place, small, target, **options):
    def stop(progress):
        if progress.text.startswith(place):
            raise Stop

    with pytest.raises(Stop):
        quantize(small[0], target, **{"precision": "int4", "rank": 16, "statistics": small[1]} | options, progress=stop)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    """One bit of a tensor."""
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(raw)


def forge(path):
    """Another report."""
    raw = path.read_bytes()
    assert raw.count(b'sqnr\\": ') >= 1
    path.write_bytes(raw.replace(b'sqnr\\": ', b'sqnr\\":9', 1))


def age(path):
    """As versions without a checksum wrote it."""
    save_file(load_file(path), path, {"report": metadata_of(path)["report"]})


@pytest.mark.parametrize("damage", [cut, flip, forge, age, lambda path: path.write_bytes(b""),
                                    lambda path: (path.unlink(), path.mkdir(), path.rmdir(), path.symlink_to("/dev/zero"))])
def test_damaged_blocks_are_made_again(damage, small, whole, stopped, tmp_path, caplog):
    """These and no others, and the log says which."""
    work = tmp_path / "a.safetensors.svdq-work"
    shutil.copytree(stopped, work)
    damage(work / "transformer_blocks.1.safetensors")
    got, said = continued(small, tmp_path)
    assert got == whole
    made = {one.text.partition(",")[0] for one in said if one.text.startswith(("double", "single"))}
    assert made == {"double block 2 of 2", "single block 3 of 3"}
    assert caplog.text.count("is made again") == 1 and "transformer_blocks.1.safetensors" in caplog.text


def test_blocks_of_another_run_are_made_again(small, whole, stopped, tmp_path):
    """Same names, same shapes, whole: of another seed."""
    stop_at("single block 1", small, tmp_path / "b.safetensors", seed=1)
    other = tmp_path / "b.safetensors.svdq-work"
    shutil.copytree(stopped, tmp_path / "a.safetensors.svdq-work")
    shutil.copy(other / "transformer_blocks.0.safetensors", tmp_path / "a.safetensors.svdq-work")
    shutil.rmtree(other)
    got, said = continued(small, tmp_path)
    assert got == whole and any(one.text.startswith("double block 1") for one in said)


def test_a_block_damaged_before_it_is_put_in_its_place(small, whole, stopped, tmp_path):
    work, target = tmp_path / "a.safetensors.svdq-work", tmp_path / "a.safetensors"
    shutil.copytree(stopped, work)

    def damage(progress):
        if progress.text == "writing a.safetensors":
            flip(work / "single_transformer_blocks.1.safetensors")

    with pytest.raises(CheckpointError, match=r"single_transformer_blocks.1.safetensors: is not what was written.*made anew"):
        quantize(small[0], target, "int4", 16, small[1], progress=damage)
    assert not target.exists()
    assert continued(small, tmp_path)[0] == whole


@pytest.mark.parametrize("at", ["writing a.safetensors", "writing single_transformer_blocks.1"])
def test_a_file_that_is_made_meanwhile(small, whole, stopped, tmp_path, at):
    """It stays, and so do the blocks."""
    target = tmp_path / "a.safetensors"
    shutil.copytree(stopped, tmp_path / "a.safetensors.svdq-work")

    def put(progress):
        if progress.text == at:
            target.write_bytes(b"precious")

    with pytest.raises(CheckpointError, match="a.safetensors: exists already"):
        quantize(small[0], target, "int4", 16, small[1], progress=put)
    assert target.read_bytes() == b"precious" and not list(tmp_path.glob("*.part"))
    target.unlink()
    assert continued(small, tmp_path)[0] == whole


def test_leftovers(small, whole, stopped, tmp_path):
    """What a killed run left half written of these names goes; what others are writing stays."""
    work = tmp_path / "a.safetensors.svdq-work"
    shutil.copytree(stopped, work)
    (work / ".transformer_blocks.0.safetensors.abcd_123.part").write_bytes(b"left")
    (work / ".job.json.abcd_123.part").write_bytes(b"left")
    (work / "job.part").write_bytes(b"left by an older version")
    (tmp_path / ".a.safetensors.abcd_123.part").write_bytes(b"left")
    others = [".a.safetensors.b.safetensors.abcd_123.part", ".ba.safetensors.abcd_123.part", ".a.safetensors.part",
              ".aXsafetensors.abcd_123.part", ".a.safetensors.long_name.part", "a.safetensors.abcd_123.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"precious")
    quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.safetensors", *others}
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_files_of_others_in_the_work_folder(small, stopped, tmp_path, caplog):
    work = tmp_path / "a.safetensors.svdq-work"
    shutil.copytree(stopped, work)
    (work / "notes.txt").write_text("precious")
    quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
    assert [entry.name for entry in work.iterdir()] == ["notes.txt"] and "cannot be removed" in caplog.text


# One run at a time

BUSY = "a.safetensors.svdq-work: another run is making this file now. Wait for it, or choose another name"


def test_another_run_of_this_process(small, whole, tmp_path):
    """From the same thread and from another."""
    refused = []

    def again():
        try:
            quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
        except CheckpointError as error:
            refused.append(str(error))

    def begin(progress):
        if progress.text.startswith(("single block 2", "writing a.safetensors")):
            again()
            thread = threading.Thread(target=again)
            thread.start()
            thread.join()

    quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1], progress=begin)
    assert len(refused) >= 4 and all(BUSY in text for text in refused)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_two_threads_at_once(small, whole, tmp_path):
    said, start = [], threading.Barrier(2)

    def one():
        start.wait()
        try:
            said.append(quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1]))
        except CheckpointError as error:
            said.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refusal, = (text for text in said if isinstance(text, str))
    assert (BUSY in refusal or "exists already" in refusal) and (tmp_path / "a.safetensors").read_bytes() == whole


def test_another_process(small, whole, tmp_path):
    """While the lock is held elsewhere the run is refused; once its holder is killed, it is not."""
    script = ("import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
              "print('held', flush=True); time.sleep(100)")
    work = tmp_path / "a.safetensors.svdq-work"
    work.mkdir()
    with subprocess.Popen([sys.executable, "-c", script, str(work / "lock")], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=BUSY):
            quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
        holder.kill()
    assert continued(small, tmp_path)[0] == whole


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_no_locks(small, tmp_path, monkeypatch, error):
    monkeypatch.setattr(run.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError, match="svdq-work: cannot be locked against other runs: .*another disk"):
        quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
    assert not os.listdir(tmp_path)


# What a disk refuses


@pytest.mark.parametrize("change, words", [({"rank": 32}, "another rank"), ({"precision": "nvfp4"}, "another precision"),
                                           ({"statistics": None}, "another calibration"), ({"seed": 1}, "another seed")])
def test_another_run_is_not_continued(small, stopped, tmp_path, change, words):
    options = {"precision": "int4", "rank": 16, "statistics": small[1]}
    shutil.copytree(stopped, tmp_path / "a.safetensors.svdq-work")
    with pytest.raises(CheckpointError, match=words):
        quantize(small[0], tmp_path / "a.safetensors", **options | change)


@pytest.mark.parametrize("number", [0, 3, 5])
def test_full_disk(small, whole, tmp_path, monkeypatch, number):
    """In a block, or in the final file: said in words, nothing half written stays, the next run ends the same."""
    real, calls = run.write_tensors, []

    def full(path, specs, metadata, tensors):
        def until_full():
            for i, item in enumerate(tensors):
                if len(calls) == number + 1 and i == 7:
                    raise OSError(errno.ENOSPC, "No space left on device")
                yield item

        calls.append(path)
        real(path, specs, metadata, until_full())

    monkeypatch.setattr(run, "write_tensors", full)
    with pytest.raises(CheckpointError, match=f"the disk is full.*the {number} of 5 blocks"):
        quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
    assert not (tmp_path / "a.safetensors").exists() and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert continued(small, tmp_path)[0] == whole


FULL_WORDS = "disk is full|No space left on device"
FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("error, words", [(FULL, "the disk is full. Make room"),
                                          (READ_ONLY, "Read-only file system. Choose another place, or make this one writable"),
                                          (PermissionError(errno.EACCES, "Permission denied"), "Permission denied. Choose")])
@pytest.mark.parametrize("call, place", [("os.mkdir", "a.safetensors.svdq-work"), ("tempfile.TemporaryFile", ""),
                                         ("os.listdir", ""), ("shutil.disk_usage", "")])
def test_refusals_of_the_system(small, tmp_path, monkeypatch, call, place, error, words):
    """Before any work: one error that names the place."""
    module, name = call.split(".")
    monkeypatch.setattr(sys.modules[module], name, lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError) as caught:
        quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
    monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith(str(tmp_path / place)) and f"cannot be written: {words}" in message, message
    assert not os.listdir(tmp_path) or call == "os.listdir"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number, name", [(0, "job.json"), (1, "transformer_blocks.0.safetensors"), (6, "a.safetensors")])
def test_disk_that_fills_up(small, tmp_path, monkeypatch, call, number, name):
    """At each file that a run writes, also as its last byte goes to the disk."""
    real, calls = getattr(os, call), []

    def full(*given):
        calls.append(given)
        if len(calls) == number + 1:
            raise FULL
        return real(*given)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError) as caught:
        quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1])
    monkeypatch.undo()
    assert str(tmp_path) in str(caught.value) and re.search(FULL_WORDS, str(caught.value))
    assert (name == "job.json" or f"the {number - 1} of 5 blocks in a.safetensors.svdq-work are kept" in str(caught.value))
    assert not (tmp_path / "a.safetensors").exists() and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("at", ["double block 2 of 2, txt_mlp.0", "writing single_transformer_blocks.1"])
def test_killed(small, whole, tmp_path, at):
    """SIGKILL, from inside: no handler, no cleaning up."""
    script = f"""
import os, signal, sys, torch, types
torch.set_num_threads(1)                # as unit/conftest.py has it: on some CPUs sums differ with their number
pack = types.ModuleType("svdq_pack"); pack.__path__ = [{str(ROOT)!r}]; sys.modules["svdq_pack"] = pack
from svdq_pack.svdq.quantize import quantize, run
recipe = run.Recipe
run.Recipe = lambda **options: recipe(**options, **{DRAFT!r})
def kill(progress):
    if progress.text.startswith({at!r}):
        os.kill(os.getpid(), signal.SIGKILL)
quantize({str(small[0])!r}, {str(tmp_path / "a.safetensors")!r}, "int4", 16, {str(small[1])!r}, progress=kill)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, cwd=tmp_path)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "a.safetensors").exists()
    assert list(tmp_path.glob(".a.safetensors.*.part")) or at.startswith("double")
    assert continued(small, tmp_path)[0] == whole


# The command

def test_command(small, whole, tmp_path, capsys):
    out, report = tmp_path / "a.safetensors", tmp_path / "report"
    arguments = ["quantize", str(small[0]), str(out), "--rank", "16", "--calibration", str(small[1]), "--device", "cpu"]
    assert cli.main([*arguments, "--report", str(report)]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"{out}\n") and "median signal to noise" in text and "3 calls, 2,320 tokens" in text
    assert out.read_bytes() == whole
    assert json.loads((report / "report.json").read_text())["rank"] == 16
    assert (report / "report.svg").read_text().startswith("<svg")
    assert cli.main(arguments) == 1 and "exists already" in capsys.readouterr().err


def test_command_interrupted(small, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.safetensors"
    arguments = ["quantize", str(small[0]), str(out), "--rank", "16", "--calibration", str(small[1]), "--device", "cpu"]

    def press(line, progress):
        if progress.text.startswith("single block 2"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli._Line, "__call__", press)
        assert cli.main(arguments) == 3
    assert "the same command goes on" in capsys.readouterr().err and not out.exists()
    assert cli.main(arguments) == 0 and out.read_bytes() == whole


FOREIGN = ["", "precious", "[]", "{}", '{"tool": "another"}', '{"tool": ["ComfyUI-SVDQ"]}', "[" * 100_000, "9" * 5000, b"\xff",
           " " * (2 << 20), "<svg>precious</svg>"]


@pytest.mark.parametrize("name", ["report.json", "report.svg"])
@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_reports_of_others_stay(small, tmp_path, capsys, name, content):
    """Refused before any work."""
    out, report = tmp_path / "a.safetensors", tmp_path / "report"
    report.mkdir()
    (report / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = (report / name).read_bytes()
    assert cli.main(["quantize", str(small[0]), str(out), "--rank", "16", "--device", "cpu", "--report", str(report)]) == 1
    assert f"{report / name}: exists already and is no report of this program" in capsys.readouterr().err
    assert (report / name).read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("name", ["report.json", "report.svg"])
def test_a_report_that_came_during_the_run_stays(made, tmp_path, capsys, monkeypatch, name):
    out, report = tmp_path / "\x1b[31mred.safetensors", tmp_path / "report"

    def run_of_an_hour(*_, **__):
        (report / name).write_text("precious")
        return made["int4"][1]

    monkeypatch.setattr(cli.quantize, "quantize", run_of_an_hour)
    assert cli.main(["quantize", "flux.safetensors", str(out), "--report", str(report)]) == 1
    told = capsys.readouterr()
    assert f"{report / name}: exists already and is no report of this program" in told.err
    assert (report / name).read_text() == "precious" and told.out.endswith(f"{tmp_path}/\\x1b[31mred.safetensors\n")


def test_odd_things_in_the_place_of_a_report(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.svg").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with limit(5), pytest.raises(CheckpointError, match="is no report of this program"):
            picture.require_ours(path)
    picture.require_ours(tmp_path / "free.json")


def test_command_where_the_report_cannot_be_written(small, stopped, tmp_path, capsys, monkeypatch):
    """Ours is replaced, whole or not at all; a folder that cannot be made is said before any work."""
    out, report = tmp_path / "a.safetensors", tmp_path / "report"
    arguments = ["quantize", str(small[0]), str(out), "--rank", "16", "--calibration", str(small[1]), "--device", "cpu",
                 "--report", str(report)]
    report.write_text("a file")
    assert cli.main(arguments) == 1 and f"{report}: cannot be written: " in capsys.readouterr().err
    report.unlink()
    shutil.copytree(stopped, tmp_path / "a.safetensors.svdq-work")
    assert cli.main(arguments) == 0
    kept = [(report / name).read_bytes() for name in ("report.json", "report.svg")]
    out.unlink()
    shutil.copytree(stopped, tmp_path / "a.safetensors.svdq-work")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: replace(old, new) if Path(new).parent != report else
                        (_ for _ in ()).throw(FULL))
    assert cli.main(arguments) == 1
    assert "report.json: " in (said := capsys.readouterr().err) and re.search(FULL_WORDS, said) and out.exists()
    assert [(report / name).read_bytes() for name in ("report.json", "report.svg")] == kept
    assert sorted(entry.name for entry in report.iterdir()) == ["report.json", "report.svg"]


def test_names_that_are_no_text(small, stopped, tmp_path, capsysbinary):
    """A model whose name no console can print is quantised to the end, report and all."""
    source = os.fsdecode(os.fsencode(tmp_path / "fl") + b"\xff\x1b[2Jux.safetensors")
    shutil.copy2(small[0], source)
    assert cli.main(["quantize", source, str(tmp_path / "a.safetensors"), "--rank", "16", "--calibration", str(small[1]),
                     "--device", "cpu", "--report", str(tmp_path / "report")]) == 0
    assert rb"fl\udcff\x1b[2Jux.safetensors" in capsysbinary.readouterr().out
    xml.etree.ElementTree.parse(tmp_path / "report" / "report.svg")
