"""How close the pictures and latents of a quantised model are to those of the 16-bit one: in numbers, and side by side.

Pairs only: picture i of both batches has the same prompt, seed and noise. The yardstick beside every number is the *other
seed* column: the same metric between neighbouring pictures of the reference. A quantised model whose pictures are as far
from the reference as another seed's has kept the style and lost the picture.
"""

import importlib
import importlib.util
import json
import math
import os
import warnings
from pathlib import Path

import torch
from torch.nn.functional import conv2d, interpolate

from .container import MAX_AXES, TensorFile, replacing
from .errors import CheckpointError, PackError, shown
from .files import open_regular

# Pillow knows many more formats, one of which runs another program
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
PICTURES, LATENTS = tuple(FORMATS), (".latent", ".safetensors")
MAX_PIXELS = 64 << 20           # of a picture file: 8192 x 8192, for which SSIM takes 5 GB; a file of 24 kB can unpack to more
MAX_NUMBERS = 3 << 29           # of all files of one side: 512 pictures of 1024 x 1024, 6.4 GB
WINDOW, SIGMA = 11, 1.5         # of SSIM: Wang et al. 2004
GAIN = 8                        # of the difference on the sheet, or nobody would see it
LONGEST, ROWS, GAP = 768, 8, 8  # of the sheet: pixels of a picture, pictures, pixels between them
ALEXNET = "alexnet-owt-7be5be79.pth"    # what LPIPS reads, from torch's folder of downloaded models

# name -> (title, decimals, which way is better)
METRICS = {"psnr": ("image PSNR, dB", 2, "higher"), "ssim": ("image SSIM", 4, "higher"),
           "lpips": ("image LPIPS", 4, "lower"), "latent_psnr": ("latent PSNR, dB", 2, "higher"),
           "latent_error": ("latent error", 4, "lower")}


class CompareError(PackError):
    """Two sets that cannot be compared."""


# ---- metrics: batches [N, ...] -> fp64 [N]

def psnr(reference, other, peak=1.0):
    """10 log10(peak² / mean squared error); inf for equal pictures. `peak` is a number or one per picture."""
    error = (reference.double() - other.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(torch.as_tensor(peak, dtype=torch.float64).square() / error)


def ssim(reference, other):
    """Structural similarity of pictures [N, H, W, C] in 0...1: mean over the channels and all places of the 11 x 11 Gaussian
    window that lie inside. Source: Wang et al., Image Quality Assessment, 2004."""
    height, width = reference.shape[1:3]
    if min(height, width) < WINDOW:
        raise CompareError(f"pictures of {width} x {height} pixels are too small for SSIM, which needs {WINDOW} x {WINDOW}. "
                           "Compare larger ones")
    return torch.stack([_ssim(*planes) for planes in zip(reference.unbind(-1), other.unbind(-1))]).mean(0)


def _ssim(x, y):
    """Of one channel [N, H, W]: all at once are several gigabytes more for a large picture."""
    x, y = x.double()[:, None], y.double()[:, None]
    taps = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2 / (2 * SIGMA ** 2))
    taps = (taps / taps.sum())[None, None, None]

    def blur(maps):
        return conv2d(conv2d(maps, taps), taps.mT)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    places = ((2 * mean_x * mean_y + c1) * (2 * both + c2)
              / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2)))
    return places.flatten(1).mean(1)


def relative_error(reference, other):
    """‖other - reference‖ / ‖reference‖"""
    reference, other = reference.double().flatten(1), other.double().flatten(1)
    return (other - reference).norm(dim=1) / reference.norm(dim=1)


def latent_psnr(reference, other):
    """PSNR with the range of the reference as its peak, as latents have no other."""
    flat = reference.double().flatten(1)
    return psnr(reference, other, flat.amax(1) - flat.amin(1))


def load_lpips():
    """(metric, None), or (None, why there is none). Nothing is downloaded, though the package would."""
    if importlib.util.find_spec("lpips") is None:
        return None, "the package 'lpips' is not installed ('pip install lpips')"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        return None, f"the weights it needs are not at {weights}, and nothing is downloaded here"
    try:
        network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    except Exception as error:      # of a package that is not ours, of torchvision or of a damaged weights file
        return None, f"the package 'lpips' does not work: {shown(error)}"

    def lpips(reference, other):
        """Learned perceptual distance, AlexNet. Source: Zhang et al. 2018."""
        with torch.no_grad():
            pairs = ((picture.float().movedim(-1, 0)[None] * 2 - 1 for picture in pair) for pair in zip(reference, other))
            return torch.tensor([float(network(*pair)) for pair in pairs], dtype=torch.float64)

    return lpips, None


# ---- the report

def compare(pictures=None, latents=None):
    """Facts as a dict that JSON can hold. Raises CompareError.

    pictures   (reference, quantised), [N, H, W, 3] each, or None. What lies outside 0...1 is cut off, as when it is saved;
               one channel is taken for grey, the fourth is left out
    latents    (reference, quantised), [N, C, ...] each, or None

    Both of any floating dtype, on any device, not both of the same.
    """
    facts = {"pairs": None, "size": None, "metrics": {}, "missing": {}}
    if pictures is None and latents is None:
        raise CompareError("nothing to compare. Give pictures, latents or both, of both models")
    if pictures is not None:
        reference, other = _matched("pictures", *pictures)
        facts["pairs"], facts["size"] = len(reference), [reference.shape[2], reference.shape[1]]
        for name, metric in (("psnr", psnr), ("ssim", ssim)):
            facts["metrics"][name] = _measured(metric, reference, other)
        lpips, facts["missing"]["lpips"] = load_lpips()
        try:
            if lpips:
                facts["metrics"]["lpips"] = _measured(lpips, reference, other)
        except Exception as error:      # a network that is not ours: it needs 35 pixels or so, and memory
            facts["missing"]["lpips"] = f"the package 'lpips' does not take these pictures: {shown(error)}"
    if latents is not None:
        reference, other = _matched("latents", *latents)
        flat = reference.flatten(1)
        if (flat.amax(1) == flat.amin(1)).any():
            raise CompareError("a reference latent is the same number everywhere, which nothing can be measured by. Give what "
                               "a sampler made")
        if facts["pairs"] not in (None, len(reference)):
            raise CompareError(f"there are {facts['pairs']} pairs of pictures and {len(reference)} of latents. Give those "
                               "the pictures were decoded from")
        facts["pairs"] = len(reference)
        for name, metric in (("latent_psnr", latent_psnr), ("latent_error", relative_error)):
            facts["metrics"][name] = _measured(metric, reference, other)
    facts["missing"] = {name: why for name, why in facts["missing"].items() if why}
    return facts


def _matched(what, reference, other):
    """Both on the CPU, in fp32 or fp64, fit for the metrics."""
    prepare = {"pictures": _as_pictures, "latents": _as_latents}[what]
    reference, other = prepare("the reference", reference), prepare("the quantised model's", other)
    if reference.shape != other.shape:
        raise CompareError(f"the reference {what} are {list(reference.shape)}, the quantised model's {list(other.shape)}. "
                           "Use the same size and batch in both samplers")
    for whose, batch in (("the reference", reference), ("the quantised model's", other)):
        if not batch.float().isfinite().all():          # fp64 may hold what has no square
            raise CompareError(f"{whose} {what} contain NaN or Inf, so that model or its VAE is broken. Load it in "
                               "bfloat16, or get it again")
    return (reference.clamp(0, 1), other.clamp(0, 1)) if what == "pictures" else (reference, other)


def _as_pictures(whose, batch):
    batch = _as_floats(f"{whose} pictures", batch)
    if batch.ndim != 4 or batch.shape[3] not in (1, 3, 4):
        raise CompareError(f"{whose} pictures are {list(batch.shape)}, which is not [pictures, height, width, 3 colours]. "
                           "Connect an IMAGE")
    return batch.expand(-1, -1, -1, 3) if batch.shape[3] == 1 else batch[..., :3]


def _as_latents(whose, batch):
    batch = _as_floats(f"{whose} latents", batch)
    if batch.ndim < 3:
        raise CompareError(f"{whose} latents are {list(batch.shape)}, which is not [latents, channels, height, width] or of "
                           "more axes. Give what a sampler made")
    return batch


def _as_floats(what, batch):
    if not isinstance(batch, torch.Tensor) or batch.layout != torch.strided or batch.is_meta:
        raise CompareError(f"{what} are no plain tensor but {shown(type(batch).__name__)}. Compare pictures or latents of one "
                           "kind, each a batch of one size")
    if batch.ndim > MAX_AXES:
        raise CompareError(f"{what} have {batch.ndim} axes, and torch computes with {MAX_AXES} at most. Give what a VAE or a "
                           "sampler made")
    if not batch.is_floating_point():
        raise CompareError(f"{what} are {str(batch.dtype).removeprefix('torch.')}, which is no floating-point type. Give what "
                           "a VAE or a sampler made")
    if not batch.numel():
        raise CompareError(f"{what} are {list(batch.shape)}, which is empty. Give at least one")
    batch = batch.detach().cpu()
    return batch if batch.dtype == torch.float64 else batch.float()         # exact, from 16 and 8 bits too


def _measured(metric, reference, other):
    """Pair by pair, or a large batch would take many times its memory."""
    def measure(batch, against):
        return torch.cat([metric(*pair) for pair in zip(batch.split(1), against)])

    values = measure(reference, other.split(1))
    finite = values[values.isfinite()]                          # the PSNR of equal pictures is not
    neighbours = reference.split(1)
    floor = measure(reference, neighbours[-1:] + neighbours[:-1]) if len(reference) > 1 else values[:0]
    floor = floor[floor.isfinite()]
    return {"values": [float(value) if math.isfinite(value) else None for value in values],
            "mean": float(finite.mean()) if len(finite) else None,
            "standard_error": float(finite.std() / len(finite) ** 0.5) if len(finite) > 1 else None,
            "other_seed": float(floor.mean()) if len(floor) else None}


def as_text(facts):
    """The facts as a table for people."""
    size = "" if facts["size"] is None else " of {} x {}".format(*facts["size"])
    lines = [f"{facts['pairs']} pairs{size}", "", f"  {'':<18}{'quantised':<20}{'other seed':<13}better"]
    for name, (title, decimals, better) in METRICS.items():
        if name in facts["missing"]:
            lines.append(f"  {title:<18}not measured: {facts['missing'][name]}")
        elif name in facts["metrics"]:
            measured = facts["metrics"][name]
            mean, spread, floor = (measured[key] for key in ("mean", "standard_error", "other_seed"))
            text = "equal" if mean is None else f"{mean:.{decimals}f}"
            text += "" if spread is None else f" ± {spread:.{decimals}f}"
            lines.append(f"  {title:<18}{text:<20}{'-' if floor is None else f'{floor:.{decimals}f}':<13}{better}")
            equal = measured["values"].count(None)
            if equal and mean is not None:
                lines.append(f"  {'':<18}without {equal} pairs that are equal")
    if facts["pairs"] == 1:
        lines += ["", "  One pair says little: use a batch of four or more, which also gives the 'other seed' column."]
    return "\n".join(lines)


def sheet(reference, other):
    """One picture [H, W, 3]: a row per pair, reference | quantised | 8 x difference. Large pictures are made smaller."""
    reference, other = (batch[:ROWS].float() for batch in _matched("pictures", reference, other))
    columns = torch.stack((reference, other, (GAIN * (other - reference).abs()).clamp(max=1)), 1)      # [N, 3, H, W, C]
    count, _, height, width, _ = columns.shape
    scale = min(1.0, LONGEST / max(height, width))
    if scale < 1:
        small = max(1, round(height * scale)), max(1, round(width * scale))
        columns = interpolate(columns.flatten(0, 1).movedim(-1, 1), small, mode="area").movedim(1, -1)
        columns = columns.unflatten(0, (count, 3))
        height, width = small
    made = torch.ones(count * (height + GAP) - GAP, 3 * (width + GAP) - GAP, 3)
    for row in range(count):
        for column in range(3):
            top, left = row * (height + GAP), column * (width + GAP)
            made[top:top + height, left:left + width] = columns[row, column]
    return made


# ---- files

def read(reference, other):
    """{"pictures": (reference, other)}, fp32 [N, H, W, 3] in 0...1, or {"latents": ...}, fp32 or fp64 [N, C, ...], of two
    files, or of two folders with as many of one kind, paired in the order of their names. Raises CompareError."""
    pairs = [_files(Path(path)) for path in (reference, other)]
    if len(pairs[0]) != len(pairs[1]):
        raise CompareError(f"{reference} has {len(pairs[0])} files and {other} has {len(pairs[1])}. Every picture needs its "
                           "partner of the same prompt and seed")
    kinds = {path.suffix.lower() in LATENTS for paths in pairs for path in paths}
    if len(kinds) > 1:
        raise CompareError(f"{reference} and {other}: pictures cannot be compared with latents. Give two of a kind")
    load, what = (_latent, "latents") if kinds.pop() else (_picture, "pictures")
    return {what: tuple(_batch(paths, load) for paths in pairs)}


def _batch(paths, load):
    loaded, total = [], 0
    for path in paths:
        one = load(path)
        loaded.append(one)
        total += one.numel()
        if one.shape[1:] != loaded[0].shape[1:]:
            raise CompareError(f"{path}: has another size than {paths[0].name}. Compare sets of one size")
        if max(total, loaded[0].numel() * len(paths)) > MAX_NUMBERS:        # seen at the first of many
            raise CompareError(f"{path}: with the {len(paths)} files to compare it makes more than {MAX_NUMBERS:,} numbers. "
                               "Compare fewer at a time")
    batch = torch.cat(loaded)
    return batch.float().div_(255) if batch.dtype == torch.uint8 else batch


def check_new(path, suffixes=None):
    """Say now, not after minutes, that a file cannot be written there. `suffixes`: what its name may end in."""
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise CompareError(f"{path}: no kind of picture by its name. Give a name that ends in {suffixes[0]}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise CompareError(f"{path}: a folder or a device has this name. Choose another")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise CompareError(f"{path}: there is no such folder. Make it first, or choose another name")


def write_picture(path, picture):
    """A picture [H, W, 3] in 0...1 as a file. Raises CompareError."""
    check_new(path, PICTURES)
    pixels = _pillow().fromarray((picture * 255).round().byte().numpy())
    _write(path, lambda file: pixels.save(file, FORMATS[Path(path).suffix.lower()]))


def write_json(path, facts):
    """The facts as a file. Raises CompareError."""
    check_new(path)
    _write(path, lambda file: file.write((json.dumps(facts, indent=2) + "\n").encode()))


def _write(path, into):
    try:
        with replacing(path) as file:
            into(file)
    except CheckpointError as error:    # of the file system, with the path in it
        raise CompareError(error) from error
    except Exception as error:          # Pillow's encoders raise anything; no folder, no permission, no space
        raise CompareError(f"{path}: cannot be written: {shown(error, 200)}. Choose another name") from error


def _files(path):
    try:
        return _listed(path)
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {shown(error, 200)}. Check the name") from error


def _listed(path):
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in (*PICTURES, *LATENTS))
        if not found:
            raise CompareError(f"{path}: no pictures ({', '.join(PICTURES)}) or latents ({', '.join(LATENTS)}) in it. Name "
                               "the folder they are in")
        return found
    if not path.exists():
        raise CompareError(f"{path}: no such file or folder. Check the name")
    if path.suffix.lower() not in (*PICTURES, *LATENTS):
        raise CompareError(f"{path}: neither a picture ({', '.join(PICTURES)}) nor a latent ({', '.join(LATENTS)})")
    return [path]


def _picture(path):
    """uint8 [1, H, W, 3]"""
    pillow = _pillow()
    try:
        with warnings.catch_warnings(), open_regular(path) as file:
            warnings.simplefilter("ignore")                                 # of odd palettes and sizes
            with pillow.open(file, formats=sorted(set(FORMATS.values()))) as picture:
                _check_picture(path, picture)
                picture = picture.convert("RGB")
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            return pixels.view(1, picture.height, picture.width, 3)
    except CompareError:
        raise
    except Exception as error:          # Pillow's readers of damaged files raise anything
        raise CompareError(f"{path}: not a readable picture ({_why(path, error)})") from error


def _check_picture(path, picture):
    """Before its pixels are unpacked."""
    if picture.width * picture.height > MAX_PIXELS:
        raise CompareError(f"{path}: has {picture.width} x {picture.height} pixels, more than the {MAX_PIXELS:,} that are read "
                           "here. Compare a part of it, or smaller ones")
    if getattr(picture, "n_frames", 1) > 1:
        raise CompareError(f"{path}: has {picture.n_frames} frames. Save those to compare as pictures of their own")
    if picture.format == "PNG" and ";16" in str(picture.tile):
        raise CompareError(f"{path}: has 16 bits per colour, and 8 would be compared. Save it with 8")


def _latent(path):
    """fp32 or fp64 [n, C, ...]"""
    try:
        file = TensorFile(path)
        info = file.tensors.get("latent_tensor")
        if info is None:
            raise CompareError(f"{path}: holds no latent_tensor. Give a file that 'Save Latent' wrote")
        if math.prod(info.shape) > MAX_NUMBERS:
            raise CompareError(f"{path}: holds {math.prod(info.shape):,} numbers, more than the {MAX_NUMBERS:,} that are read "
                               "here. Compare a part of them")
        with file.reading() as get:
            return _as_latents(f"{path}: the", get("latent_tensor"))
    except CompareError:
        raise
    except Exception as error:          # the safetensors library, about a header, a dtype or a path of its dislike
        raise CompareError(f"{path}: not a readable latent ({_why(path, error)})") from error


def _why(path, error):
    text = str(error).removeprefix(f"{path}: ") if isinstance(error, CheckpointError) else str(error)
    return shown(text or type(error).__name__, 200)


def _pillow():
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise CompareError("reading and writing pictures takes the package 'Pillow'. Install it ('pip install pillow'), or "
                           "use ComfyUI's Python, which has it") from error
