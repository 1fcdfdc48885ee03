"""How close the pictures and latents of a quantised model are to those of the 16-bit one: in numbers, and side by side.

Pairs only: picture i of both batches has the same prompt, seed and noise. The yardstick beside every number is the *other
seed* column: the same metric between neighbouring pictures of the reference. A quantised model whose pictures are as far
from the reference as another seed's has kept the style and lost the picture.
"""

import importlib
import importlib.util
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import conv2d, interpolate

from .errors import PackError, shown

PICTURES, LATENTS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), (".latent", ".safetensors")
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
    x, y = (picture.double().movedim(-1, 1) for picture in (reference, other))
    if min(x.shape[2:]) < WINDOW:
        raise CompareError(f"pictures of {x.shape[3]} x {x.shape[2]} pixels are too small for SSIM, which needs {WINDOW} x "
                           f"{WINDOW}. Compare larger ones")
    taps = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2 / (2 * SIGMA ** 2))
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, WINDOW)

    def blur(maps):
        return conv2d(conv2d(maps, taps, groups=len(taps)), taps.mT, groups=len(taps))

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
    except (ImportError, RuntimeError, OSError) as error:
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

    pictures   (reference, quantised), [N, H, W, 3] in 0...1 each, or None
    latents    (reference, quantised), [N, ...] each, or None
    """
    facts = {"pairs": None, "size": None, "metrics": {}, "missing": {}}
    if pictures is None and latents is None:
        raise CompareError("nothing to compare. Give pictures, latents or both, of both models")
    if pictures is not None:
        reference, other = _matched("pictures", *pictures)
        facts["pairs"], facts["size"] = len(reference), [reference.shape[2], reference.shape[1]]
        lpips, facts["missing"]["lpips"] = load_lpips()
        for name, metric in (("psnr", psnr), ("ssim", ssim), ("lpips", lpips)):
            if metric:
                facts["metrics"][name] = _measured(metric, reference, other)
    if latents is not None:
        reference, other = _matched("latents", *latents)
        if facts["pairs"] not in (None, len(reference)):
            raise CompareError(f"there are {facts['pairs']} pairs of pictures and {len(reference)} of latents. Give those "
                               "the pictures were decoded from")
        facts["pairs"] = len(reference)
        for name, metric in (("latent_psnr", latent_psnr), ("latent_error", relative_error)):
            facts["metrics"][name] = _measured(metric, reference, other)
    facts["missing"] = {name: why for name, why in facts["missing"].items() if why}
    return facts


def _matched(what, reference, other):
    if reference.shape != other.shape:
        raise CompareError(f"the reference {what} are {list(reference.shape)}, the quantised model's {list(other.shape)}. "
                           "Use the same size and batch in both samplers")
    for whose, batch in (("the reference", reference), ("the quantised model's", other)):
        if not batch.isfinite().all():
            raise CompareError(f"{whose} {what} contain NaN or Inf, so that model or its VAE is broken. Load it in "
                               "bfloat16, or get it again")
    return reference, other


def _measured(metric, reference, other):
    values = metric(reference, other)
    finite = values[values.isfinite()]                          # the PSNR of equal pictures is not
    floor = metric(reference, reference.roll(1, 0)) if len(reference) > 1 else values[:0]
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
    reference, other = (batch[:ROWS, ..., :3].float().clamp(0, 1) for batch in _matched("pictures", reference, other))
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
    """{"pictures": (reference, other)} or {"latents": ...} of two files, or of two folders with as many of one kind, paired
    in the order of their names. Raises CompareError."""
    pairs = [_files(Path(path)) for path in (reference, other)]
    if len(pairs[0]) != len(pairs[1]):
        raise CompareError(f"{reference} has {len(pairs[0])} files and {other} has {len(pairs[1])}. Every picture needs its "
                           "partner of the same prompt and seed")
    kinds = {path.suffix.lower() in LATENTS for paths in pairs for path in paths}
    if len(kinds) > 1:
        raise CompareError(f"{reference} and {other}: pictures cannot be compared with latents. Give two of a kind")
    load, what = (_latent, "latents") if kinds.pop() else (_picture, "pictures")
    batches = []
    for paths in pairs:
        loaded = [load(path) for path in paths]
        odd = next((path for path, one in zip(paths, loaded) if one.shape[1:] != loaded[0].shape[1:]), None)
        if odd:
            raise CompareError(f"{odd}: has another size than {paths[0].name}. Compare sets of one size")
        batches.append(torch.cat(loaded))
    return {what: tuple(batches)}


def write_picture(path, picture):
    """A picture [H, W, 3] in 0...1 as a file."""
    try:
        _pillow().fromarray((picture * 255).round().byte().numpy()).save(path)
    except ValueError as error:
        raise CompareError(f"{path}: {shown(error)}. Give a name that ends in .png") from error


def _files(path):
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in (*PICTURES, *LATENTS))
        if not found:
            raise CompareError(f"{path}: no pictures ({', '.join(PICTURES)}) or latents ({', '.join(LATENTS)}) in it. Name "
                               "the folder they are in")
        return found
    if not path.is_file():
        raise CompareError(f"{path}: no such file or folder. Check the name")
    if path.suffix.lower() not in (*PICTURES, *LATENTS):
        raise CompareError(f"{path}: neither a picture ({', '.join(PICTURES)}) nor a latent ({', '.join(LATENTS)})")
    return [path]


def _picture(path):
    try:
        with _pillow().open(path) as picture:
            picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:             # what Pillow raises about damaged files
        raise CompareError(f"{path}: not a readable picture ({shown(error)})") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).double() / 255


def _latent(path):
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CompareError(f"{path}: not a readable latent ({shown(error)})") from error
    if "latent_tensor" not in tensors:
        raise CompareError(f"{path}: holds no latent_tensor. Give a file that 'Save Latent' wrote")
    return tensors["latent_tensor"]


def _pillow():
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise CompareError("reading and writing pictures takes the package 'Pillow'. Install it ('pip install pillow'), or "
                           "use ComfyUI's Python, which has it") from error
