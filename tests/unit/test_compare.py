"""svdq/compare.py: the metrics against their formulas written out in float64, the table, the sheet, files, the command."""

import json
import math
import os
import struct
import sys
import types
import warnings
import zlib
from importlib.machinery import ModuleSpec

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from svdq_pack.svdq import cli, compare
from svdq_pack.svdq.compare import CompareError
from svdq_pack.tests.unit.helpers import join


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


@pytest.mark.parametrize("shape", [(), (4,), (4, 20, 24), (4, 3, 20, 24), (4, 20, 24, 2), (4, 20, 24, 0), (0, 20, 24, 3),
                                   (4, 0, 24, 3), (1, 4, 20, 24, 3)], ids=str)
def test_what_is_no_batch_of_pictures(shape):
    with pytest.raises(CompareError, match="the reference pictures are .*(which is not|which is empty)"):
        compare.compare((torch.zeros(shape), torch.zeros(shape)))
    with pytest.raises(CompareError, match="the quantised model's pictures are"):
        compare.sheet(torch.zeros(1, 20, 24, 3), torch.zeros(shape))


NO_TENSORS = [None, [torch.zeros(1, 20, 24, 3)], numpy.zeros((1, 20, 24, 3)), torch.zeros(1, 20, 24, 3, device="meta"),
              torch.zeros(1, 20, 24, 3).to_sparse(), torch.zeros(1, 20, 24, 3, dtype=torch.uint8),
              torch.zeros(1, 20, 24, 3, dtype=torch.bool), torch.zeros(1, 20, 24, 3, dtype=torch.complex64)]


@pytest.mark.parametrize("batch", NO_TENSORS, ids=lambda batch: f"{type(batch).__name__} {getattr(batch, 'dtype', '')}")
def test_what_is_no_batch_of_numbers(batch):
    good = torch.rand(1, 20, 24, 3)
    for pair in ((batch, good), (good, batch)):
        for given in ({"pictures": pair}, {"latents": pair}):
            with pytest.raises(CompareError, match="no plain tensor|no floating-point type"):
                compare.compare(**given)


def test_channels(pictures):
    """One is grey, the fourth is not looked at, whatever the other batch has."""
    reference, other = pictures
    expected = compare.compare(pictures)
    alpha = torch.full_like(other[..., :1], 0.5)
    assert compare.compare((torch.cat((reference, 0 * alpha), 3), torch.cat((other, alpha), 3))) == expected
    assert compare.compare((reference, torch.cat((other, alpha), 3))) == expected
    grey = reference[..., :1], other[..., :1]
    assert compare.compare(grey) == compare.compare(tuple(batch.expand(-1, -1, -1, 3) for batch in grey))
    assert torch.equal(compare.sheet(*grey), compare.sheet(*(batch.expand(-1, -1, -1, 3) for batch in grey)))


def test_pictures_as_they_would_be_saved(pictures):
    """Of any floating type, with what lies outside 0...1 cut off; SSIM of huge numbers has no meaning."""
    reference, other = pictures
    wild = torch.where(other > 0.9, 1e30, torch.where(other < 0.1, -1e30, other))
    tame = wild.clamp(0, 1)
    assert compare.compare((reference, wild)) == compare.compare((reference, tame))
    assert torch.equal(compare.sheet(reference, wild), compare.sheet(reference, tame))
    half = other.bfloat16().requires_grad_()
    assert compare.compare((reference.double(), half)) == compare.compare((reference, half.detach().float()))
    assert not compare.sheet(reference, half).requires_grad


def test_pair_by_pair(pictures, monkeypatch):
    """A batch of a thousand takes no more memory than one pair beside itself."""
    seen = []
    monkeypatch.setattr(compare, "psnr", lambda x, y: seen.append((len(x), len(y))) or torch.zeros(1, dtype=torch.float64))
    compare.compare(pictures)
    assert seen == [(1, 1)] * 8


@pytest.mark.parametrize("shape", [(2, 16, 8), (2, 16, 8, 6), (2, 16, 3, 8, 6), (1, 2, 16, 3, 8, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_latents_of_any_model(shape, dtype, tmp_path):
    """Sound, pictures, video; of any two floating types, exactly."""
    random = torch.Generator().manual_seed(4)
    reference, other = torch.randn(shape, generator=random), torch.randn(shape, generator=random).to(dtype)
    expected = [numpy.linalg.norm(y - x) / numpy.linalg.norm(x) for x, y in arrays((reference, other.double()))]
    for name, batch in (("a", reference), ("b", other)):
        save_file({"latent_tensor": batch}, tmp_path / f"{name}.latent")
    for given in ({"latents": (reference, other)}, compare.read(tmp_path / "a.latent", tmp_path / "b.latent")):
        assert numpy.allclose(compare.compare(**given)["metrics"]["latent_error"]["values"], expected, rtol=1e-12)


BAD_LATENTS = [(torch.tensor(1.0), "which is not"), (torch.ones(4), "which is not"), (torch.ones(4, 4), "which is not"),
               (torch.ones(1, 0, 4, 4), "empty"), (torch.zeros(0, 16, 4, 4), "empty"),
               (torch.ones(1, 4, 4, 4, dtype=torch.int64), "no floating-point type"),
               (torch.ones(1, 4, 4, 4, dtype=torch.bool), "no floating-point type"),
               (torch.full((1, 4, 4, 4), float("nan")), "NaN or Inf"),
               (torch.full((1, 4, 4, 4), 1e300, dtype=torch.float64), "NaN or Inf"),
               (torch.zeros(2, 4, 4, 4), "the same number everywhere")]


@pytest.mark.parametrize("batch, message", BAD_LATENTS, ids=lambda value: None if isinstance(value, str) else
                         f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}")
def test_bad_latents(batch, message, tmp_path):
    path = tmp_path / "a.latent"
    save_file({"latent_tensor": batch}, path)
    with pytest.raises(CompareError, match=message):
        compare.compare(latents=(batch, batch))
    with pytest.raises(CompareError, match=message):
        compare.compare(**compare.read(path, path))


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


def test_lpips_of_small_pictures(pictures, package, hub):
    """The real network's pooling leaves nothing of them."""
    hub.parent.mkdir()
    hub.touch()

    def broken(self, x, y):
        raise RuntimeError("Output size is too small")

    package.LPIPS.forward = broken
    facts = compare.compare(pictures)
    assert facts["missing"]["lpips"].endswith("does not take these pictures: Output size is too small")
    assert "psnr" in facts["metrics"] and "not measured: the package" in compare.as_text(facts)


@pytest.mark.parametrize("what", ["pictures", "latents"])
@pytest.mark.parametrize("axes", [65, 70])
def test_many_axes(what, axes):
    """Before torch, which takes 64, says no in its own words."""
    with pytest.raises(CompareError, match=f"{what} have {axes} axes, and torch computes with 64"):
        compare.compare(**{what: (torch.ones((1,) * axes).half(),) * 2})
    with pytest.raises(CompareError, match="the same number everywhere|not .pictures, height"):
        compare.compare(**{what: (torch.ones((1,) * 64).half(),) * 2})


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


# ---- files that are not what they seem

PNG, TWO_FRAMES = b"\x89PNG\r\n\x1a\n", {"save_all": True, "append_images": [Image.new("RGB", (24, 20), 9)]}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def refused(path, message, *others):
    """One CompareError, without a word on the console."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CompareError, match=message) as caught:
            compare.read(path, *(others or (path,)))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


@pytest.mark.parametrize("side, message", [(8193, "67,125,249|has 8193 x 8193 pixels"), (10_000, "10000|pixels"),
                                           (20_000, "pixels")])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_few_bytes_of_many_pixels(side, message, suffix, tmp_path):
    """Nothing is unpacked, whether Pillow would, would warn or would refuse."""
    path = tmp_path / f"bomb{suffix}"
    data = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    if suffix == ".png":
        path.write_bytes(PNG + chunk(b"IHDR", data) + b"\0\0\0\0IDAT")
    else:
        side = min(side, 16383)
        Image.new("RGB", (1, 1)).save(path, lossless=True)
        found = path.read_bytes()
        start = found.index(b"VP8L") + 9
        bits = int.from_bytes(found[start:start + 4], "little") & ~((1 << 28) - 1) | (side - 1) | (side - 1) << 14
        path.write_bytes(found[:start] + struct.pack("<I", bits) + found[start + 4:])
    refused(path, message)


def test_the_bound_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "MAX_PIXELS", 600)
    for size in ((20, 30), (20, 31)):
        Image.new("RGB", size).save(tmp_path / f"{size[1]}.png")
    assert compare.read(tmp_path / "30.png", tmp_path / "30.png")["pictures"][0].shape == (1, 30, 20, 3)
    refused(tmp_path / "31.png", "has 20 x 31 pixels, more than the 600")


def test_the_bound_of_a_set(folders, latents, tmp_path, monkeypatch):
    """Seen before the second picture is read."""
    opened, read = [], compare._picture
    monkeypatch.setattr(compare, "_picture", lambda path: opened.append(path) or read(path))
    monkeypatch.setattr(compare, "MAX_NUMBERS", 4 * 20 * 24 * 3 - 1)
    refused(folders[0], "with the 4 files to compare it makes more than 5,759 numbers", folders[1])
    assert len(opened) == 1
    save_file({"latent_tensor": latents[0].repeat(4, 1, 1, 1)}, tmp_path / "a.latent")
    refused(tmp_path / "a.latent", "7,680 numbers")


def test_the_bound_of_a_set_of_unlike_files(latents, tmp_path, monkeypatch):
    """The numbers of all files count, not of the first or the last."""
    monkeypatch.setattr(compare, "MAX_NUMBERS", 2000)
    save_file({"latent_tensor": latents[0][:1].contiguous()}, tmp_path / "a.latent")       # 480 numbers
    save_file({"latent_tensor": latents[0]}, tmp_path / "b.latent")                        # 1,920
    refused(tmp_path, "b.latent: with the 2 files to compare it makes more than 2,000 numbers")


def test_a_latent_of_many_axes(tmp_path):
    header = {"latent_tensor": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}
    (tmp_path / "a.latent").write_bytes(join(header, bytes(4)))
    refused(tmp_path / "a.latent", "70 axes|not a readable latent")


@pytest.mark.parametrize("save, message", [
    (lambda path, one: one.save(path.with_suffix(".png"), **TWO_FRAMES), "2 frames"),
    (lambda path, one: one.save(path.with_suffix(".webp"), **TWO_FRAMES), "2 frames"),
    (lambda path, one: Image.fromarray(numpy.full((20, 24), 40_000, numpy.uint16)).save(path.with_suffix(".png")), "16 bits"),
    (lambda path, one: path.with_suffix(".png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot identify"),
    (lambda path, one: one.save(path.with_suffix(".png"), "TIFF"), "not a readable"),
    (lambda path, one: path.with_suffix(".png").write_bytes(b""), "not a readable"),
    (lambda path, one: path.with_suffix(".latent").write_bytes(b""), "not a readable latent"),
    (lambda path, one: path.with_suffix(".latent").write_bytes(b"\xff" * 99), "not a readable latent"),
    (lambda path, one: path.with_suffix(".latent").write_bytes(b"\x89PNG" * 99), "not a readable latent")])
def test_odd_files(save, message, tmp_path):
    save(tmp_path / "odd", Image.new("RGB", (24, 20)))
    path, = tmp_path.iterdir()
    refused(path, message)


def test_16_bit_colours(tmp_path):
    """Pillow would drop half of each without a word. It cannot write such a file."""
    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 24 for _ in range(20))
    (tmp_path / "deep.png").write_bytes(PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 20, 16, 2, 0, 0, 0))
                                        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    refused(tmp_path / "deep.png", "has 16 bits per colour")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "P with transparency"])
def test_kinds_of_colours(mode, pictures, tmp_path):
    """As they look, without their transparency."""
    made = Image.fromarray((pictures[0][0] * 255).byte().numpy())
    path, more = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), {}
    if mode.startswith("P"):
        made, more = made.quantize(16), {"transparency": bytes(range(16))} if "with" in mode else {}
    else:
        made = made.convert(mode)
    made.save(path, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare.read(path, path)["pictures"][0]
    assert found.shape == (1, 20, 24, 3) and found.dtype == torch.float32
    expected = torch.from_numpy(numpy.array(made.convert("RGB")).astype(numpy.float32) / 255)
    assert (found[0] - expected).abs().max() <= (0.2 if mode == "CMYK" else 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".latent"])
def test_damaged_anywhere(suffix, pictures, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".latent":
        save_file({"latent_tensor": pictures[0]}, path, {"prompt": "x" * 200})
    else:
        compare.write_picture(path, pictures[0][0])
    whole = path.read_bytes()
    random = numpy.random.default_rng(5)
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 400), 3):
            data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data[:int(random.integers(1, len(data)))] if random.random() < 0.3 else data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                compare.compare(**compare.read(path, path))
            except CompareError as error:
                assert str(error).isprintable()


@pytest.mark.parametrize("error", [struct.error("x"), MemoryError(), KeyError("x"), RecursionError(),
                                   OverflowError("x\x1b[31m"), AttributeError("x"), Image.DecompressionBombError("x")],
                         ids=repr)
def test_whatever_the_readers_raise(error, folders, latents, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise error

    save_file({"latent_tensor": latents[0]}, tmp_path / "a.latent")
    monkeypatch.setattr(Image, "open", broken)
    monkeypatch.setattr(compare, "TensorFile", broken)
    refused(folders[0], "not a readable picture [(].", folders[1])
    refused(tmp_path / "a.latent", "not a readable latent [(].")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path),
                                  lambda path: os.symlink("nowhere", path)], ids=["pipe", "folder", "device", "broken link"])
@pytest.mark.parametrize("name", ["a.png", "a.latent"])
def test_no_regular_file(make, name, tmp_path):
    """Nothing is waited for, nothing read without an end."""
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / name)
    refused(folder, "a[.](png|latent): ")
    refused(folder / name, "a[.](png|latent): ")


@pytest.mark.parametrize("name", ["a\n\x1b[31mb", "\udcff", "a\0b", "x" * 300, "\u202eb"], ids=ascii)
def test_odd_names(name, tmp_path):
    for suffix in (".png", ".latent", "", ".txt"):
        path = tmp_path / f"{name}{suffix}"
        refused(path, "no such file|cannot be read")
        if "\0" not in name and len(name) < 200:
            path.write_bytes(b"damaged")
            refused(path, "not a readable|neither a picture")


def test_a_latent_is_no_map_of_its_file(latents, tmp_path):
    """Whoever writes into the file later changes no number that was read."""
    path = tmp_path / "a.latent"
    save_file({"latent_tensor": latents[0]}, path)
    found, size = compare._latent(path), path.stat().st_size
    with open(path, "r+b") as file:
        file.write(bytes(size))
    assert torch.equal(found, latents[0])


@pytest.mark.parametrize("option", ["--sheet", "--json"])
@pytest.mark.parametrize("make", [None, os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/null", path),
                                  "nowhere/a.png", "a\0.png", "x" * 300 + ".png"],
                         ids=["fine", "folder", "pipe", "device", "no folder", "NUL", "long"])
def test_where_to_write(option, make, folders, tmp_path, capsys, monkeypatch):
    """Said before anything is measured, if it can be told; never waited for, never in the place of a device."""
    path = tmp_path / "out.png" if make is None or callable(make) else tmp_path / make
    if make:
        measured = []
        if callable(make) or make == "nowhere/a.png":
            monkeypatch.setattr(compare, "compare", measured.append)
    if callable(make):
        make(path)
    before = path.lstat() if callable(make) else None
    assert cli.main(["compare", *map(str, folders), option, str(path)]) == (1 if make else 0)
    err = capsys.readouterr().err
    if make:
        assert err.startswith("svdq: ") and err.count("\n") == 1 and not measured
        assert before is None or path.lstat().st_mode == before.st_mode
    assert not list(tmp_path.rglob("*.part"))


def test_a_sheet_that_cannot_be_written_leaves_what_was_there(pictures, tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")

    def full(self, file, kind):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CompareError, match="sheet.png: cannot be written: the disk is full. Make room"):
        compare.write_picture(path, pictures[0][0])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
