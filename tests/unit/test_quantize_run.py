"""A whole small FLUX through quantize(): what is written, that it is the model, and that a stopped run ends the same."""

import errno
import json
import subprocess
import sys
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.kernels import weights
from svdq_pack.svdq import checkpoint, cli
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.families.family import by_layer, swap_halves
from svdq_pack.svdq.quantize import FileSource, picture, quantize, run
from svdq_pack.svdq.quantize.calibration import Collector, Statistics, inputs
from svdq_pack.tests.unit.helpers import MODELS, metadata_of, relative, save

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
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors.svdq-work"]
    got, said = continued(small, tmp_path)
    assert got == whole
    if at.startswith("single block 3"):
        assert said[0].text == at.replace("linear2", "modulation.lin") and said[0].done > 0.8 * said[0].total


def test_damaged_blocks_are_made_again(small, whole, tmp_path):
    def stop(progress):
        if progress.text.startswith("single block 3"):
            raise Stop

    with pytest.raises(Stop):
        quantize(small[0], tmp_path / "a.safetensors", "int4", 16, small[1], progress=stop)
    work = tmp_path / "a.safetensors.svdq-work"
    cut = work / "transformer_blocks.1.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (work / "single_transformer_blocks.0.safetensors").write_bytes(b"")
    (work / ".transformer_blocks.0.safetensors.x.part").write_bytes(b"left by a killed run")
    (tmp_path / ".a.safetensors.x.part").write_bytes(b"left by a killed run")
    got, said = continued(small, tmp_path)
    assert got == whole and said[0].text.startswith("double block 2")


@pytest.mark.parametrize("change, words", [({"rank": 32}, "another rank"), ({"precision": "nvfp4"}, "another precision"),
                                           ({"statistics": None}, "another calibration"), ({"seed": 1}, "another seed")])
def test_another_run_is_not_continued(small, tmp_path, change, words):
    def stop(progress):
        raise Stop

    options = {"precision": "int4", "rank": 16, "statistics": small[1]}
    with pytest.raises(Stop):
        quantize(small[0], tmp_path / "a.safetensors", **options, progress=stop)
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


@pytest.mark.parametrize("at", ["double block 2 of 2, txt_mlp.0", "writing single_transformer_blocks.1"])
def test_killed(small, whole, tmp_path, at):
    """SIGKILL, from inside: no handler, no cleaning up."""
    script = f"""
import os, signal, sys, types
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
