"""svdq/compare.py: the metrics against their formulas written out in float64, the table, the sheet, files, the command."""

import json
import math
import sys
import types
from importlib.machinery import ModuleSpec

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from svdq_pack.svdq import cli, compare
from svdq_pack.svdq.compare import CompareError


@pytest.fixture
def pictures():
    """(reference, other): four pictures of 20 x 24 with structure, and the same with noise, fp32 as ComfyUI has them."""
    random = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    wave = torch.stack([torch.sin(rows / (2 + i) + columns * (1 + i) / 7) for i in range(4)])[..., None] * 0.4 + 0.5
    reference = (wave * torch.tensor([1.0, 0.8, 0.5])).clamp(0, 1)
    return reference, (reference + 0.05 * torch.randn(reference.shape, generator=random)).clamp(0, 1)


@pytest.fixture
def latents():
    random = torch.Generator().manual_seed(2)
    reference = 3 * torch.randn(4, 16, 6, 5, generator=random)
    return reference, reference + torch.randn(reference.shape, generator=random) * torch.tensor([0.1, 0.2, 0.3, 0.4]).view(
        4, 1, 1, 1)


def arrays(pair):
    return zip(*(batch.numpy().astype(numpy.float64) for batch in pair))


def ssim_of_one_channel(x, y):
    """Wang et al. 2004, equations 13 to 16, place by place with weighted moments around the local mean."""
    offset = numpy.arange(-5, 6)
    weights = numpy.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5 ** 2))
    weights /= weights.sum()
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (z[top:top + 11, left:left + 11] for z in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            found.append((2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                         / ((mean_a ** 2 + mean_b ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
    return numpy.mean(found)


# ---- metrics

def test_psnr(pictures):
    expected = [10 * math.log10(1 / numpy.mean((x - y) ** 2)) for x, y in arrays(pictures)]
    assert numpy.allclose(compare.psnr(*pictures), expected, rtol=1e-12)
    assert 20 < min(expected) < max(expected) < 35
    assert compare.psnr(torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 0.1)).item() == pytest.approx(20)


def test_ssim(pictures):
    expected = [numpy.mean([ssim_of_one_channel(x[..., c], y[..., c]) for c in range(3)]) for x, y in arrays(pictures)]
    assert numpy.allclose(compare.ssim(*pictures), expected, rtol=1e-10)
    assert 0.3 < min(expected) < max(expected) < 0.99
    assert compare.ssim(pictures[0], pictures[0]).tolist() == pytest.approx([1] * 4)


def test_latent_metrics(latents):
    expected = [numpy.linalg.norm(y - x) / numpy.linalg.norm(x) for x, y in arrays(latents)]
    assert numpy.allclose(compare.relative_error(*latents), expected, rtol=1e-12)
    assert expected == sorted(expected) and expected[0] < 0.05
    expected = [20 * math.log10(x.max() - x.min()) - 10 * math.log10(numpy.mean((x - y) ** 2)) for x, y in arrays(latents)]
    assert numpy.allclose(compare.latent_psnr(*latents), expected, rtol=1e-12)


# ---- the report

def test_facts(pictures, latents):
    facts = json.loads(json.dumps(compare.compare(pictures, latents), allow_nan=False))
    assert facts["pairs"] == 4 and facts["size"] == [24, 20]
    psnr = facts["metrics"]["psnr"]
    assert psnr["values"] == compare.psnr(*pictures).tolist()
    assert psnr["mean"] == pytest.approx(numpy.mean(psnr["values"]))
    assert psnr["standard_error"] == pytest.approx(numpy.std(psnr["values"], ddof=1) / 2)
    neighbours = [3, 0, 1, 2]
    assert psnr["other_seed"] == pytest.approx(float(compare.psnr(pictures[0], pictures[0][neighbours]).mean()))
    assert facts["metrics"]["latent_error"]["mean"] < facts["metrics"]["latent_error"]["other_seed"]
    text = compare.as_text(facts)
    assert text.startswith("4 pairs of 24 x 20\n") and f"{psnr['mean']:.2f} ± " in text
    assert "latent error" in text and "One pair" not in text


def test_equal_pictures(pictures):
    """Their PSNR is infinite, which JSON and a mean cannot hold."""
    reference, other = pictures
    facts = compare.compare((reference, reference))
    assert facts["metrics"]["psnr"] | {"other_seed": 0} == {
        "values": [None] * 4, "mean": None, "standard_error": None, "other_seed": 0}
    assert "equal" in compare.as_text(facts)
    mixed = torch.cat((reference[:1], other[1:]))
    facts = compare.compare((reference, mixed))
    assert facts["metrics"]["psnr"]["mean"] == pytest.approx(float(compare.psnr(reference, mixed)[1:].mean()))
    assert "without 1 pairs that are equal" in compare.as_text(facts)


def test_one_pair_has_no_yardstick(pictures):
    facts = compare.compare(tuple(batch[:1] for batch in pictures))
    assert facts["metrics"]["psnr"]["other_seed"] is None and facts["metrics"]["psnr"]["standard_error"] is None
    assert "One pair says little" in compare.as_text(facts)


@pytest.mark.parametrize("change, message", [
    (lambda a, b: (a, b[:3]), r"reference pictures are \[4, 20, 24, 3\], the quantised model's \[3, 20, 24, 3\]"),
    (lambda a, b: (a, b * float("nan")), "quantised model's pictures contain NaN or Inf"),
    (lambda a, b: (a / 0, b), "the reference pictures contain NaN or Inf"),
    (lambda a, b: (a[:, :9], b[:, :9]), "24 x 9 pixels are too small for SSIM")])
def test_refused(change, message, pictures):
    with pytest.raises(CompareError, match=message):
        compare.compare(change(*pictures))


def test_batches_must_agree(pictures, latents):
    with pytest.raises(CompareError, match="4 pairs of pictures and 3 of latents"):
        compare.compare(pictures, tuple(batch[:3] for batch in latents))
    with pytest.raises(CompareError, match="nothing to compare"):
        compare.compare()


# ---- LPIPS, whose package is not among the tests' own

@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / compare.ALEXNET


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package: mean absolute difference."""
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, x, y):
            assert x.shape == y.shape == (1, 3, 20, 24) and x.dtype == torch.float32 and x.min() >= -1 and x.min() < 0
            return (x - y).abs().mean().view(1, 1, 1, 1)

    module = types.ModuleType("lpips")
    module.LPIPS, module.__spec__ = LPIPS, ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", module)
    return module


def test_lpips(pictures, package, hub):
    hub.parent.mkdir()
    hub.touch()
    facts = compare.compare(pictures)
    expected = [2 * numpy.abs(x - y).mean() for x, y in arrays(pictures)]
    assert numpy.allclose(facts["metrics"]["lpips"]["values"], expected, rtol=1e-5) and "lpips" not in facts["missing"]


def test_lpips_downloads_nothing(pictures, package, hub):
    package.LPIPS = None
    facts = compare.compare(pictures)
    assert "lpips" not in facts["metrics"] and "nothing is downloaded" in facts["missing"]["lpips"]
    assert "image LPIPS       not measured: the weights" in compare.as_text(facts)


def test_lpips_not_installed(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert "'lpips' is not installed" in compare.compare(pictures)["missing"]["lpips"]


def test_lpips_broken(pictures, package, hub):
    """As where torchvision does not fit torch."""
    hub.parent.mkdir()
    hub.touch()

    def broken(**_):
        raise RuntimeError("operator torchvision::nms does not exist")

    package.LPIPS = broken
    assert compare.compare(pictures)["missing"]["lpips"] == \
        "the package 'lpips' does not work: operator torchvision::nms does not exist"


# ---- the sheet

def test_sheet(pictures):
    reference, other = pictures
    made = compare.sheet(reference, other)
    assert made.shape == (4 * 20 + 3 * 8, 3 * 24 + 2 * 8, 3)
    assert torch.equal(made[28:48, :24], reference[1]) and torch.equal(made[28:48, 32:56], other[1])
    assert torch.equal(made[28:48, 64:], ((other[1] - reference[1]).abs() * 8).clamp(max=1))
    assert (made[20:28] == 1).all() and (made[:, 24:32] == 1).all()


def test_sheet_of_many_large_pictures():
    reference = torch.rand(10, 1024, 512, 3, generator=torch.Generator().manual_seed(3))
    made = compare.sheet(reference, reference)
    assert made.shape == (8 * 768 + 7 * 8, 3 * 384 + 2 * 8, 3)
    assert (made[:768, -384:] == 0).all() and made[:768, :384].mean() == pytest.approx(0.5, abs=0.01)


# ---- files and the command

@pytest.fixture
def folders(pictures, tmp_path):
    for name, batch in zip(("reference", "quantised"), pictures):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(batch):
            compare.write_picture(tmp_path / name / f"{name}_{i:05}_.png", picture)
    return tmp_path / "reference", tmp_path / "quantised"


def test_command(folders, pictures, tmp_path, capsys):
    sheet, facts = tmp_path / "sheet.png", tmp_path / "facts.json"
    assert cli.main(["compare", *map(str, folders), "--sheet", str(sheet), "--json", str(facts)]) == 0
    stored = tuple((batch * 255).round() / 255 for batch in pictures)
    expected = compare.compare(stored)
    found = json.loads(facts.read_text())
    assert found["metrics"]["psnr"]["mean"] == pytest.approx(expected["metrics"]["psnr"]["mean"], rel=1e-6)
    assert found["metrics"]["ssim"]["values"] == pytest.approx(expected["metrics"]["ssim"]["values"], rel=1e-6)
    assert capsys.readouterr().out.startswith("4 pairs of 24 x 20\n")
    with Image.open(sheet) as picture:
        assert picture.size == (88, 104)
    assert cli.main(["compare", *map(str, folders), "--sheet", str(tmp_path / "sheet")]) == 1
    assert capsys.readouterr().err.endswith("Give a name that ends in .png\n")


def test_command_with_files(folders, latents, tmp_path, capsys):
    one, other = (next(iter(sorted(folder.iterdir()))) for folder in folders)
    assert cli.main(["compare", str(one), str(other)]) == 0
    assert "One pair says little" in capsys.readouterr().out
    for name, batch in zip("ab", latents):
        save_file({"latent_tensor": batch}, tmp_path / f"{name}.latent")
    latent = [str(tmp_path / f"{name}.latent") for name in "ab"]
    assert cli.main(["compare", *latent]) == 0
    out = capsys.readouterr().out
    assert f"{compare.relative_error(*latents).mean():.4f} ± " in out and "image" not in out
    assert cli.main(["compare", *latent, "--sheet", str(tmp_path / "s.png")]) == 1
    assert "--sheet takes pictures" in capsys.readouterr().err and not (tmp_path / "s.png").exists()


def test_bad_files(folders, latents, tmp_path, capsys):
    reference, quantised = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(sorted(reference.iterdir())[0].read_bytes()[:60])
    (tmp_path / "cut.latent").write_bytes(b"no latent")
    save_file({"weight": latents[0]}, tmp_path / "other.safetensors")
    Image.new("RGB", (30, 30)).save(tmp_path / "square.png")
    for pair, message in (
            ((tmp_path / "nowhere", quantised), "nowhere: no such file or folder"),
            ((reference, tmp_path / "empty"), "empty: no pictures"),
            ((tmp_path / "text.txt", quantised), "text.txt: neither a picture"),
            ((tmp_path / "cut.png",) * 2, "cut.png: not a readable picture"),
            ((tmp_path / "cut.latent",) * 2, "cut.latent: not a readable latent"),
            ((tmp_path / "other.safetensors",) * 2, "holds no latent_tensor"),
            ((tmp_path / "square.png", tmp_path / "other.safetensors"), "pictures cannot be compared with latents"),
            ((tmp_path / "square.png", sorted(quantised.iterdir())[0]), "Use the same size and batch"),
            ((reference, tmp_path / "square.png"), "has 4 files and .*square.png has 1")):
        assert cli.main(["compare", *map(str, pair)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("svdq: ") and err.count("\n") == 1
        with pytest.raises(CompareError, match=message):
            loaded = compare.read(*pair)
            compare.compare(**loaded)
    Image.new("RGB", (9, 9)).save(quantised / "a.png")
    (sorted(quantised.iterdir())[-1]).unlink()
    assert cli.main(["compare", str(reference), str(quantised)]) == 1
    assert "has another size than a.png" in capsys.readouterr().err


def test_without_pillow(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(CompareError, match="takes the package 'Pillow'"):
        compare.read(*folders)
