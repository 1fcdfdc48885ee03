"""The demo's own Flux, which trains, computes what ComfyUI's does, which samples; and what its table of quality rests on."""

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from svdq_pack.svdq.kernels import registry
from svdq_pack.svdq.families import flux1
from svdq_pack.tests.comfy.inprocess.support import distance, noise
from svdq_pack.tools.demo import quality, train, train_lora
from svdq_pack.tools.demo.models import Flux

import comfy.model_management   # noqa: E402, comes from the tree that support has chosen
import comfy.sd                 # noqa: E402

FLOAT = 1e-5
SHAPE = flux1.Shape(hidden=256, depth=1, depth_single=2, in_features=64, context_dim=96, vec_dim=64, guidance=False)


@pytest.fixture
def plain():
    """A small Flux without a zero in it: as it is made, blocks are identities and the output is nothing."""
    torch.manual_seed(1)
    model = Flux(SHAPE.hidden, SHAPE.depth, SHAPE.depth_single, SHAPE.context_dim, SHAPE.vec_dim)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return model


@pytest.mark.parametrize("rows, cols, text", [(8, 8, 7), (6, 12, 20)])
def test_the_plain_flux_is_comfyuis(plain, tmp_path, rows, cols, text):
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    patcher = comfy.sd.load_diffusion_model(str(tmp_path / "plain.safetensors"), model_options={"dtype": torch.float32})
    comfy.model_management.load_models_gpu([patcher])
    x, context, pooled = noise(2, 16, rows, cols), noise(2, text, 96, seed=1), noise(2, 64, seed=2)
    sigma = torch.tensor([0.9, 0.25])
    ours = plain(x, sigma, context, pooled)
    assert ours.shape == x.shape and ours.std() > 0.1
    assert distance(ours, patcher.model.diffusion_model(x, sigma, context=context, y=pooled)) < FLOAT


@pytest.mark.parametrize("precision, act_bits", [("int4", None), ("int4", 8), ("nvfp4", None)])
def test_unpacked_layers_are_the_reference(make_model, precision, act_bits):
    layers = quality.load_model(make_model(precision, hidden=256).path, torch.float32, act_bits).layers()
    for key, layer in layers.items():
        x = noise(9, layer.in_features).to(torch.bfloat16).float()
        with registry.using("reference"):
            wanted = layer(x)
        with quality.activations_rounded():
            for _ in range(2):                          # the second call takes what the first unpacked
                assert distance(layer(x), wanted) < FLOAT, key
        if not key.endswith("lin.weight"):              # modulation rounds no activation anywhere
            assert distance(layer(x), wanted) > 1e-3, key
    assert not any(variant.name == "unpacked" for variant in registry.VARIANTS)


@pytest.mark.parametrize("method", ["RTN", "rotation"])
@pytest.mark.parametrize("layer", ["double_blocks.0.img_mlp.2", "single_blocks.0.linear1", "single_blocks.0.linear2"])
def test_rounded_layers(plain, method, layer):
    linear, places = plain.get_submodule(layer), [place for place in SHAPE.comfy_places() if place.layer == layer]
    x = noise(2, 9, linear.in_features)
    for place in places:
        if place.slot.activation == "gelu":
            part = x[..., place.col:place.col + place.k]
            part.copy_(torch.nn.functional.gelu(part))
    wanted = linear(x)
    rounded = quality.rounded_forward(linear, places, method, None)(x)
    assert 0.02 < distance(rounded, wanted) < 0.3
    pair = noise(8, linear.in_features), noise(linear.out_features, 8, seed=1)
    with_pair = quality.rounded_forward(linear, places, method, pair)(x)
    assert distance(with_pair - rounded, x @ pair[0].t() @ pair[1].t()) < FLOAT


def test_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    """Both commands with two steps a network: the pictures are noise, but each stage takes what the one before left."""
    monkeypatch.setattr(train, "MODELS", tmp_path / "models")
    monkeypatch.setattr(train, "STEPS", dict.fromkeys(train.STEPS, 2))
    monkeypatch.setattr(train, "PICTURES", dict.fromkeys(train.PICTURES, 4))
    with torch.enable_grad():
        train.main(tmp_path)
    made = {path.relative_to(tmp_path / "models").as_posix() for path in (tmp_path / "models").rglob("*.safetensors")}
    shipped = {path.relative_to(quality.ROOT / "workflows" / "models").as_posix()
               for path in (quality.ROOT / "workflows" / "models").rglob("*.safetensors")}
    assert made == shipped
    monkeypatch.setattr(quality, "LORA", tmp_path / "models" / "loras" / "svdq-demo-sticker.safetensors")
    monkeypatch.setattr(quality, "DRAWINGS", 4)
    monkeypatch.setattr(quality, "STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["quality.py", str(tmp_path), "--prompts", "2", "--rows", "int4-r32,rtn"])
    capsys.readouterr()
    quality.main()
    said = capsys.readouterr().out
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
              for text in said.split("With the sticker LoRA")]
    assert [[row[0] for row in rows] for rows in tables] == 2 * [["", "---", "16-bit", "RTN W4A4", "SVDQ INT4, rank 32"]]
    for rows in tables:
        assert rows[2][1:4] == ["-"] * 3                        # nothing to compare the reference with
        assert all(float(row[1].split()[0]) > 20 for row in rows[3:])
    for name in ("quality.jpg", "quality-lora.jpg"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == "JPEG" and (tmp_path / name).stat().st_size <= quality.SHEET_BYTES


def test_a_lora_trained_on_the_demo(tmp_path, monkeypatch, capsys):
    """A few drawings: the LoRA is a file, changes both models alike, and the sheet has both."""
    for name, value in {"DRAWN": 2, "HELD_OUT": 2, "ACCUMULATED": 1, "WINDOW": 2, "SHOWN": 1, "RATE": 1e-3}.items():
        monkeypatch.setattr(train_lora, name, value)
    monkeypatch.setattr(quality, "STEPS", 2)
    monkeypatch.setitem(train_lora.nodes.NODE_CLASS_MAPPINGS, "TrainLoraNode", None)        # gone again afterwards
    monkeypatch.setattr(sys, "argv", ["train_lora.py", str(tmp_path), "--updates", "4"])
    train_lora.main()
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("| ")]
    errors = {row[0]: [float(cell) for cell in row[1:]] for row in rows[2:]}
    assert list(errors) == ["4-bit", "4-bit, LoRA", "16-bit", "16-bit, LoRA"]
    for plain, changed in (("4-bit", "4-bit, LoRA"), ("16-bit", "16-bit, LoRA")):
        assert len(errors[plain]) == len(train_lora.LEVELS) and errors[plain] != errors[changed]
    assert errors["4-bit, LoRA"] == pytest.approx(errors["16-bit, LoRA"], abs=2e-4)
    assert {path.name for path in tmp_path.iterdir()} >= {"sticker-trained.safetensors", "training.jpg"}
    with Image.open(tmp_path / "training.jpg") as sheet:
        assert sheet.format == "JPEG"
