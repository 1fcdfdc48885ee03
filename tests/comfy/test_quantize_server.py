"""A 16-bit FLUX through the nodes of a running ComfyUI: watched, quantised, loaded, compared; stopped and taken up again."""

import json
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.svdq import checkpoint, report
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.quantize.calibration import Statistics
from svdq_pack.tests import random_models
from svdq_pack.workflows.headless.client import Failed, Interrupted, Rejected

SHAPE = flux1.Shape(hidden=256, depth=2, depth_single=3, in_features=64, context_dim=128, vec_dim=64, guidance=True)
FLUX = "flux-16-bit.safetensors"
NONE = "none (data-free)"


@pytest.fixture(scope="module", autouse=True)
def files(base):
    """A FLUX of five blocks in bf16, whose weights lie on no 4-bit grid, and the same with a NaN."""
    models, random = base / "models" / "diffusion_models", torch.Generator().manual_seed(5)
    random_models.write_model(models / "made.safetensors", random, SHAPE)
    checkpoint.dequantize(models / "made.safetensors", models / "dense.safetensors", torch.float32)
    tensors = load_file(models / "dense.safetensors")
    for name, value in tensors.items():
        if value.ndim == 2 and "_blocks" in name:
            value += 0.5 * value.std() * torch.randn(value.shape, generator=random)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, models / FLUX)
    for name in ("made", "dense"):
        (models / f"{name}.safetensors").unlink()
    tensors = load_file(models / FLUX)
    tensors["single_blocks.1.linear2.weight"][3, 4] = float("nan")
    save_file(tensors, models / "flux-nan.safetensors")
    return models


@pytest.fixture
def made(graph):
    """made(model, **inputs of the demo) -> the demo graph with this model."""
    def made(model=FLUX, **inputs):
        made = graph(**inputs)
        made["1"] = loader(model)
        return made
    return made


def loader(model):
    if model.startswith("svdq"):
        return node("SVDQModelLoader", model_name=model)
    return node("UNETLoader", unet_name=model, weight_dtype="default")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def quantise(model=FLUX, **inputs):
    inputs = {"precision": "int4", "rank": 16, "calibration": NONE, "filename": "svdq-{precision}_r{rank}-mine"} | inputs
    return {"1": loader(model), "2": node("SVDQQuantize", model=["1", 0], **inputs)}


def compared(reference, quantised, graph, batch=3):
    """The demo graph with each model, same seed, into the compare node."""
    one = graph(seed=21, batch_size=batch, width=96, height=80)
    save, = (name for name, entry in one.items() if entry["class_type"] == "SaveImage")
    del one[save]
    other = {f"1{name}": entry for name, entry in json.loads(json.dumps(one)).items()}
    for entry in other.values():
        entry["inputs"] |= {name: [f"1{value[0]}", value[1]] for name, value in entry["inputs"].items()
                            if isinstance(value, list)}
    one["1"], other["11"] = loader(reference), loader(quantised)
    sampler, = (name for name, entry in one.items() if entry["class_type"] == "KSampler")
    decode, = (name for name, entry in one.items() if entry["class_type"] == "VAEDecode")
    return one | other | {"50": node("SVDQCompare", reference=[decode, 0], quantised=[f"1{decode}", 0],
                                     reference_latent=[sampler, 0], quantised_latent=[f"1{sampler}", 0])}


def metrics(text):
    """{row: (quantised, other seed)} of a report's table."""
    rows = [line for line in text.splitlines() if line.startswith("  image") or line.startswith("  latent")]
    found = {}
    for row in rows:
        numbers = row[20:].replace("±", " ").split()
        if not row[20:].startswith("not measured"):
            found[row[2:20].strip()] = float(numbers[0]), float(numbers[-2])
    return found


def is_png(server, shown):
    """Whether a node has shown a picture."""
    return server.get(f"/view?filename={shown['filename']}&type=temp&subfolder={shown['subfolder']}").startswith(b"\x89PNG")


def calibrate(run, made, name, seeds=(31, 32)):
    pictures = []
    for seed in seeds:
        watched = made(seed=seed, batch_size=2)
        watched["20"] = node("SVDQCaptureCalibration", model=["1", 0], filename=name)
        sampler, = (entry for entry in watched.values() if entry["class_type"] == "KSampler")
        sampler["inputs"]["model"] = ["20", 0]
        pictures.append(run(watched))
    return pictures


def test_capture(server, base, run, made):
    """Two prompts of two steps grow one file, which is then in the node's list; the pictures are those without the node."""
    pictures = calibrate(run, made, "captured")
    path = base / "models" / "svdq_calibration" / "captured.safetensors"
    found = Statistics.load(path, SHAPE)
    assert found.calls == 4 and found.tokens > 0
    assert all((numpy.asarray(mine) == numpy.asarray(plain)).all()
               for mine, plain in zip(pictures[1], run(made(seed=32, batch_size=2))))


def test_compare(server, run, graph, files):
    """What 'python -m svdq dequantize' wrote is the same model: far closer than another seed."""
    shutil.copy(files / "nvfp4.safetensors", files / "svdq-nvfp4-copy.safetensors")
    run(compared("nvfp4-dense.safetensors", "svdq-nvfp4-copy.safetensors", graph))
    output = server.outputs()["50"]
    text, = output["text"]
    assert text.startswith("3 pairs of 96 x 80\n") and "image LPIPS" in text
    found = metrics(text)
    assert found["image PSNR, dB"][0] > 40 > 30 > found["image PSNR, dB"][1]
    assert found["latent error"][0] < 1e-2 < found["latent error"][1]
    sheet, = output["images"]
    assert is_png(server, sheet)


def test_quantise_load_compare(server, base, run, graph, made, files):
    """The whole way: captured, quantised with the file, loaded, sampled with both, the metrics reported."""
    calibrate(run, made, "whole")
    run(quantise(calibration="whole.safetensors", rank=32, filename="svdq-whole"))
    output = server.outputs()["2"]
    text, = output["text"]
    assert text.startswith("svdq-whole.safetensors, ") and "4 calls" in text
    told = json.loads((files / "svdq-whole.json").read_text())
    assert told["precision"] == "int4" and told["rank"] == 32 and told["source"] == FLUX
    facts = report.describe(files / "svdq-whole.safetensors")
    assert facts["problems"] == [] and facts["ranks"] == {"32": 28} and facts["double_blocks"] == 2
    assert not (files / "svdq-whole.safetensors.svdq-work").exists()
    picture, = output["images"]
    assert is_png(server, picture)

    run(compared(FLUX, "svdq-whole.safetensors", graph))
    text, = server.outputs()["50"]["text"]
    print(text)
    found = metrics(text)
    assert found["image PSNR, dB"][0] > found["image PSNR, dB"][1] + 5
    assert found["latent error"][0] < 0.5 * found["latent error"][1]


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_data_free_with_lora(precision, server, run, graph, files):
    """The LoRA is in the file: closer to the 16-bit model with it than to the one without."""
    key, random = "diffusion_model.single_blocks.{}.linear2", torch.Generator().manual_seed(6)
    lora = {f"{key.format(i)}.lora_{way}.weight": torch.randn(shape, generator=random) * 0.1
            for i in range(3) for way, shape in (("A", (4, 1280)), ("B", (256, 4)))}
    save_file(lora, files.parent / "loras" / "quantise.safetensors")
    lora = node("LoraLoaderModelOnly", model=["1", 0], lora_name="quantise.safetensors", strength_model=1.0)
    with_it = quantise(precision=precision, filename="svdq-lora-{precision}_r{rank}")
    with_it |= {"60": lora, "2": node("SVDQQuantize", **{**with_it["2"]["inputs"], "model": ["60", 0]})}
    run(with_it)
    name = f"svdq-lora-{'fp4' if precision == 'nvfp4' else 'int4'}_r16.safetensors"
    assert report.describe(files / name)["precision"] == precision
    errors = []
    for reference in (["60", 0], ["1", 0]):
        both = compared(FLUX, name, graph)
        both["60"] = lora
        both["6"]["inputs"]["model"] = reference
        run(both)
        errors.append(metrics(server.outputs()["50"]["text"][0])["latent error"][0])
    print(errors)
    assert errors[0] < 0.7 * errors[1]


def test_stopped_and_taken_up_again(server, run, files):
    """Interrupted from the UI: no model, but finished blocks; run again, the very file of a run in one go."""
    asked, seen = [], []
    work, target = files / "svdq-stopped.safetensors.svdq-work", files / "svdq-stopped.safetensors"

    def stop(kind, data):                   # as soon as one block is done, so that some are left for however slow a client
        if kind == "progress" and data["node"] == "2" and list(work.glob("*.safetensors")) and not asked:
            asked.append(data["value"])
            server.client.interrupt(data["prompt_id"])

    with pytest.raises(Interrupted, match="SVDQQuantize"):
        run(quantise(filename="svdq-stopped"), stop)
    finished = sorted(path.name for path in work.glob("*.safetensors"))
    assert asked and not target.exists() and 1 <= len(finished) < 5
    before = {name: (work / name).stat().st_mtime_ns for name in finished}

    with pytest.raises(Failed, match="was begun with another rank"):
        run(quantise(filename="svdq-stopped", rank=32))
    assert {name: (work / name).stat().st_mtime_ns for name in finished} == before

    run(quantise(filename="svdq-stopped"),
        lambda kind, data: seen.append(data["value"] / data["max"]) if kind == "progress" and data["node"] == "2" else None)
    # a finished block is done at once, and no layer is a tenth of the work
    assert max(later - earlier for earlier, later in zip(seen, seen[1:])) > 0.1 and not work.exists()
    run(quantise(filename="svdq-in-one-go"))
    assert target.read_bytes() == (files / "svdq-in-one-go.safetensors").read_bytes()


def test_refused(run, files, base):
    """Each before any work: no file and no work folder is left."""
    (files / "svdq-there.safetensors").touch()
    shutil.copy(files / "int4.safetensors", files / "svdq-four-bit.safetensors")
    torn = base / "models" / "svdq_calibration" / "torn.safetensors"
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"\x10")
    before = {path.name for path in files.iterdir()}
    for graph, message in (
            (quantise(filename="svdq-there"), "svdq-there.safetensors: exists already. Choose another name"),
            (quantise(filename="../out"), "'../out' is no name for a new file"),
            (quantise("svdq-four-bit.safetensors"), "a 4-bit SVDQ model already. Load the bf16, fp16 or fp8 original"),
            (quantise("flux-nan.safetensors"), "single_blocks.1.linear2.weight contains NaN or Inf"),
            (quantise(calibration="torn.safetensors"), "torn.safetensors: not a complete safetensors file"),
            (quantise(rank=80), "rank 80: needs a multiple of 16 up to 64")):
        with pytest.raises(Failed, match=f"(?s)node 2 .SVDQQuantize. failed: .*CheckpointError: .*{message}"):
            run(graph)
    assert {path.name for path in files.iterdir()} == before
    with pytest.raises(Rejected, match="(?s)calibration.*not in list"):
        run(quantise(calibration="nowhere.safetensors"))


def test_wrong_calibration(run, made):
    """A file of another FLUX is refused by its sizes."""
    small = made("sixteen-bit.safetensors", seed=41)
    small["20"] = node("SVDQCaptureCalibration", model=["1", 0], filename="small")
    small["6"]["inputs"]["model"] = ["20", 0]
    run(small)
    with pytest.raises(Failed, match="small.safetensors: captured from another kind of model: depth 1, the model has 2"):
        run(quantise(calibration="small.safetensors", filename="svdq-never"))
    with pytest.raises(Failed, match=r"node 20 \(SVDQCaptureCalibration\) failed: .*captured from another kind of model"):
        calibrate(run, made, "small")


def test_oldest_comfyui(servers, made, files):
    """Captured, quantised, stopped and taken up again there, too; and the file is the same as in the newest."""
    oldest, asked = servers("oldest"), []
    calibrate(oldest.run, made, "oldest", seeds=[33])
    work = files / "svdq-oldest.safetensors.svdq-work"

    def stop(kind, data):
        if kind == "progress" and data["node"] == "2" and list(work.glob("*.safetensors")) and not asked:
            asked.append(data["value"])
            oldest.client.interrupt(data["prompt_id"])

    with pytest.raises(Interrupted, match="SVDQQuantize"):
        oldest.run(quantise(filename="svdq-oldest", calibration="oldest.safetensors"), stop)
    oldest.run(quantise(filename="svdq-oldest", calibration="oldest.safetensors"))
    assert oldest.outputs()["2"]["text"][0].startswith("svdq-oldest.safetensors, ")
    servers("newest").run(quantise(filename="svdq-newest", calibration="oldest.safetensors"))
    assert (files / "svdq-oldest.safetensors").read_bytes() == (files / "svdq-newest.safetensors").read_bytes()
    assert oldest.run(made("svdq-oldest.safetensors", seed=34))
