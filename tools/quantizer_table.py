"""How good the quantiser is beside others, and how fast.

    python tools/quantizer_table.py [--json FILE]                                     the table; exit code 1 if ours loses
    python tools/quantizer_table.py --full-size [--device cuda] [--precision nvfp4]   time and memory of FLUX.1's blocks

Prints the relative output error |y - Wx| / |Wx| of one linear per kind of FLUX layer, on inputs no method has seen, with
weights and activations in 4 bits, and the time each method took. Weights and inputs are made to look like a diffusion
transformer's; no real checkpoint is here. Every random number is seeded: two runs differ in the times only.

    RTN                 round to nearest, one scale per group
    smooth + RTN        s = sqrt(max|x| / max|W|) first
    rotation            block Hadamard of 64 channels on both sides, then RTN: no low-rank branch, none of the format's
    reference           SVDQuant as its authors' quantiser has it: 39 smoothings tried by their output error, an SVD each;
                        then rounding and SVD in turn until the output error rises. Errors are the layer's own, where
                        the original takes those of a whole attention for qkv and out_proj
    reference + GPTQ    the same with GPTQ on the residual
    ours                what `svdq quantize` does with a calibration file: mean, mean square and 64 tokens
    ours + GPTQ         with the covariance of all calibration tokens, which a calibration file does not hold

All but "ours" see all calibration tokens. Every layer is made in one thread; times are sums over the kinds of layer.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
parent = types.ModuleType("svdq_pack")          # the pack's folder name is not ours to assume, so name its package here
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)

from svdq_pack.svdq.families import flux1  # noqa: E402
from svdq_pack.svdq.families.family import by_layer  # noqa: E402
from svdq_pack.svdq.kernels import reference  # noqa: E402
from svdq_pack.svdq.quantize import layer, quantize  # noqa: E402
from svdq_pack.svdq.quantize.calibration import MOST_TOKENS  # noqa: E402
from svdq_pack.svdq.quantize.rounding import AWQ_GROUP, Int4, Nvfp4, restore, round_to  # noqa: E402

SIZE = 512
IMAGES, TEST_IMAGES, TOKENS = 32, 12, 64
RANKS = 16, 32, 64, 128
SEED = 2411


# ---- layers that look like a diffusion transformer's

KINDS = {"adaln": "qkv and fc1 of the image stream: LayerNorm, modulated",
         "adaln_hard": "the same with a few loud channels",
         "text": "the text stream: louder channels, and loud tokens",
         "attn": "out_proj: averages of values, heads of different loudness",
         "gelu": "fc2: after GELU",
         "gelu_hard": "fc2 with a few neurons that burst"}


@dataclass(frozen=True, eq=False)
class Case:
    """A linear, and tokens of its input: for calibration, and of other images for the test."""
    weight: torch.Tensor
    calibration: torch.Tensor
    test: torch.Tensor
    unsigned: bool


def make(kind, seed, n=SIZE, k=SIZE, images=IMAGES):
    """A Case of one of KINDS."""
    random = torch.Generator().manual_seed(seed * 1009 + list(KINDS).index(kind))

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    stream = _stream(kind, k, normal, random)
    if kind.startswith("gelu"):
        first = _matrix(k, k, normal) * 1.3
        bias = 0.5 * normal(k) - 0.6
        if kind == "gelu_hard":
            first[:6] *= 5
            bias[:6] += 2

        def draw(count):
            return reference.gelu_tanh(stream(count) @ first.t() + bias)
    elif kind == "attn":
        value, head = _matrix(k, k, normal), (0.5 * normal(k // 64)).exp().repeat_interleave(64)

        def draw(count):
            h = stream(count).view(count, TOKENS, k)
            attention = torch.softmax(3 * normal(count, TOKENS, TOKENS), -1)
            return ((attention @ h).view(-1, k) @ value.t()) * head * (0.3 * value[:, 0] * k ** 0.5).exp()
    else:
        draw = stream
    calibration, test = draw(images), draw(TEST_IMAGES)
    # Training lets weights shrink where inputs are loud, though not enough to even them out.
    loud = calibration.square().mean(0).sqrt()
    weight = _matrix(n, k, normal) * (loud / loud.mean()).clamp(min=0.05).pow(-0.35)
    return Case(weight, calibration, test, kind.startswith("gelu"))


def _stream(kind, k, normal, random):
    """A function: number of images -> tokens of a modulated LayerNorm of a residual stream."""
    mixing = normal(48, k) * torch.arange(1, 49).float().pow(-0.6)[:, None]
    spread = (0.35 * normal(k)).exp()
    offset = 0.3 * normal(k)
    loud = torch.randperm(k, generator=random)[:6]
    if kind in ("adaln_hard", "text", "gelu_hard"):
        offset[loud] += (25 if kind == "text" else 12) * normal(6).sign() * (0.4 * normal(6)).exp()
    base_scale, base_shift = 0.4 * normal(k), 0.25 * normal(k)
    by_time = 0.25 * normal(4, k), 0.1 * normal(4, k)

    def draw(images):
        tokens = []
        for _ in range(images):
            h = normal(TOKENS, 48) @ mixing * 0.6 + normal(TOKENS, k)
            h = h * spread + offset
            if kind == "text":
                h[:2, loud[:2]] *= 4
            phase = normal(4) * 0.7
            scale, shift = base_scale + phase @ by_time[0], base_shift + phase @ by_time[1]
            tokens.append(torch.nn.functional.layer_norm(h, (k,)) * (1 + scale) + shift)
        return torch.cat(tokens)

    return draw


def _matrix(n, k, normal):
    """Heavy-tailed entries, a decaying spectrum on top, rows of unequal size."""
    entries = normal(n, k) * (0.25 * normal(n, k)).exp()
    strong = 24
    top = (normal(n, strong) * torch.arange(1, strong + 1).float().pow(-0.5)) @ normal(strong, k)
    return (entries + 0.5 * top) * (0.2 * normal(n, 1)).exp() / k ** 0.5


# ---- methods: (case, precision, rank) -> a function x -> y

def run_time(weight, x, smooth, precision, unsigned):
    """The 4-bit part of a layer, weight [n, k] in smoothed space."""
    half, divisor = x.to(torch.bfloat16), smooth.to(torch.bfloat16)
    unsigned = unsigned and precision == "int4"
    if precision == "int4":
        shift = reference.SHIFT if unsigned else 0
        codes, scales = reference.quantize_act_int4(half, divisor, unsigned=unsigned, shift=shift)
    else:
        codes, scales = reference.quantize_act_nvfp4(half, divisor)
    return reference.dequantize_act(codes, scales, precision) @ weight.t()


def rtn(weight, precision):
    """As the original rounds: the scale reaches the largest weight, INT4 codes are -7..7."""
    grid = (Int4(symmetric=True) if precision == "int4" else Nvfp4()).fit(weight)
    scales = grid.absmax(weight)
    return restore(grid, round_to(grid, weight, scales), scales)


def plain(case, precision, rank, smooth=None):
    smooth = torch.ones(case.weight.shape[1]) if smooth is None else smooth.to(torch.bfloat16).float()
    rounded = rtn(case.weight * smooth, precision)
    bias = shift_bias(case, case.weight, precision)
    return lambda x: run_time(rounded, x, smooth, precision, case.unsigned) + bias


def smooth_rtn(case, precision, rank):
    shifted = case.calibration + (reference.SHIFT if case.unsigned and precision == "int4" else 0)
    return plain(case, precision, rank, (shifted.abs().amax(0) / case.weight.abs().amax(0)).sqrt())


def rotation(case, precision, rank):
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))) / math.sqrt(2)

    def turn(matrix):
        return (matrix.unflatten(1, (-1, 64)) @ hadamard).flatten(1)

    rounded, ones = rtn(turn(case.weight), precision), torch.ones(case.weight.shape[1])
    return lambda x: run_time(rounded, turn(x), ones, precision, unsigned=False)


def shift_bias(case, residual, precision):
    """The original takes the shift back with the weights before they are rounded."""
    return -reference.SHIFT * residual.sum(1) if case.unsigned and precision == "int4" else 0.0


def svd(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def reference_layer(case, precision, smooth, up, down, rounded=None):
    residual = case.weight * smooth - up @ down
    rounded = rtn(residual, precision) if rounded is None else rounded
    bias, low = shift_bias(case, residual / smooth, precision), (down / smooth).t()
    return lambda x: run_time(rounded, x, smooth, precision, case.unsigned) + x @ low @ up.t() + bias


@functools.lru_cache(maxsize=1)
def reference_search(case, precision, rank):
    """(smooth, up, down) as the original's search finds them, and the seconds it took."""
    start, x, exact = time.perf_counter(), case.calibration, case.calibration @ case.weight.t()
    shifted = x + (reference.SHIFT if case.unsigned and precision == "int4" else 0)
    a, b = shifted.abs().amax(0), case.weight.abs().amax(0)

    def score(*parts):
        return (reference_layer(case, precision, *parts)(x) - exact).square().sum()

    best = None
    for alpha, beta in [(0, 0)] + [(i / 20, 0) for i in range(1, 20)] + [(i / 20, 1 - i / 20) for i in range(1, 20)]:
        smooth = a ** alpha / b ** beta
        smooth = torch.where(smooth.isfinite() & (smooth > 0), smooth, 1.0).to(torch.bfloat16).float()
        parts = smooth, *svd(case.weight * smooth, rank)
        error = score(*parts)
        if best is None or error < best[0]:
            best = error, *parts
    least, smooth, up, down = best
    target = case.weight * smooth
    rounded = rtn(target - up @ down, precision)
    for _ in range(100):
        next_up, next_down = svd(target - rounded, rank)
        error = score(smooth, next_up, next_down)
        if error > least:
            break
        least, up, down = error, next_up, next_down
        rounded = rtn(target - up @ down, precision)
    return smooth, up, down, time.perf_counter() - start


def reference_svdquant(case, precision, rank):
    return reference_layer(case, precision, *reference_search(case, precision, rank)[:3])


def reference_gptq(case, precision, rank):
    smooth, up, down, _ = reference_search(case, precision, rank)
    fed = (case.calibration + (reference.SHIFT if case.unsigned and precision == "int4" else 0)) / smooth
    residual = case.weight * smooth - up @ down
    grid = (Int4(symmetric=True) if precision == "int4" else Nvfp4()).fit(residual)
    scales = grid.absmax(residual)
    values, _ = layer.gptq(residual, fed.t() @ fed / len(fed), layer.columns_of(grid, scales), damping=0.01)
    return reference_layer(case, precision, smooth, up, down, restore(grid, values, scales))


def ours(case, precision, rank, with_gptq=False, **changes):
    x = case.calibration
    drawn = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:MOST_TOKENS]].to(torch.bfloat16).float()
    given = layer.Input(x.mean(0), x.square().mean(0), drawn)
    centred = x - x.mean(0)
    covariance = centred.t() @ centred / len(x) if with_gptq else None
    recipe = layer.Recipe(precision=precision, rank=rank, **changes)
    packed, bias, _ = layer.quantise_w4a4(case.weight, torch.zeros(len(case.weight)), given, recipe,
                                          unsigned=case.unsigned, covariance=covariance)
    return lambda x: layer.run_packed(packed, bias, x.to(torch.bfloat16))


def ours_gptq(case, precision, rank):
    return ours(case, precision, rank, with_gptq=True)


METHODS = {"RTN": plain, "smooth + RTN": smooth_rtn, "rotation": rotation, "reference": reference_svdquant,
           "reference + GPTQ": reference_gptq, "ours": ours, "ours + GPTQ": ours_gptq}
WITHOUT_RANK = "RTN", "smooth + RTN", "rotation"


def measure(method, case, precision, rank):
    """(relative error on the test tokens, seconds)"""
    start = time.perf_counter()
    run = METHODS[method](case, precision, rank)
    seconds = time.perf_counter() - start
    if method == "reference + GPTQ":                    # it shares the search of "reference"
        seconds += reference_search(case, precision, rank)[3]
    exact = case.test @ case.weight.t()
    return float((run(case.test) - exact).norm() / exact.norm()), seconds


def measure_case(job):
    """The rows of one kind of layer at one rank: [{"method", "precision", "rank", "kind", "error", "seconds"}]"""
    kind, seed, precision, rank, methods = job
    torch.set_num_threads(1)
    case, rows = make(kind, seed), []
    for method in methods:
        error, seconds = measure(method, case, precision, rank)
        rows.append({"method": method, "precision": precision, "rank": None if method in WITHOUT_RANK else rank,
                     "kind": kind, "seed": seed, "error": error, "seconds": seconds})
    return rows


# ---- modulation layers: 4-bit weights, 16-bit input

def modulation(seed):
    """{method: relative error} of a linear fed with silu(vec), a smooth function of timestep, guidance and text."""
    random = torch.Generator().manual_seed(seed)
    weight = 0.3 * _matrix(SIZE, SIZE, lambda *shape: torch.randn(*shape, generator=random))
    curves = torch.randn(12, SIZE, generator=random) * torch.arange(1, 13).float().pow(-0.7)[:, None]
    text = 0.3 * torch.randn(6, SIZE, generator=random)

    def draw(count):
        t = torch.rand(count, 1, generator=random)
        return torch.nn.functional.silu(torch.cos(math.pi * t * torch.arange(12)) @ curves
                                        + torch.randn(count, 6, generator=random) @ text)

    x, test = draw(MOST_TOKENS), draw(256)
    exact = test @ weight.t()
    groups = weight.unflatten(1, (-1, AWQ_GROUP))
    scales = (groups.abs().amax(2, keepdim=True) / 7).to(torch.bfloat16).float()
    rounded = ((groups / scales).round() * scales).flatten(1)
    packed, bias, _ = layer.quantise_awq(weight, torch.zeros(SIZE), layer.Input(x.mean(0), x.square().mean(0), x))
    return {name: float((y - exact).norm() / exact.norm())
            for name, y in (("reference (RTN)", test @ rounded.t()), ("ours", layer.run_packed(packed, bias, test)))}


# ---- the table

NVFP4_KINDS = "adaln_hard", "attn", "gelu"


def table(seeds):
    """All rows: INT4 at every rank, NVFP4 at rank 32 for half of the kinds."""
    jobs = []
    for rank in RANKS:
        methods = [name for name in METHODS if rank == RANKS[0] or name not in WITHOUT_RANK]
        jobs += [(kind, seed, "int4", rank, methods) for kind in KINDS for seed in range(seeds)]
    jobs += [(kind, seed, "nvfp4", 32, list(METHODS)) for kind in NVFP4_KINDS for seed in range(seeds)]
    rows = []
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), 8)) as pool:
        for done, found in enumerate(pool.imap_unordered(measure_case, jobs), 1):
            rows += found
            print(f"\r{done} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def mean(rows):
    return math.exp(sum(math.log(row["error"]) for row in rows) / len(rows))


def as_markdown(rows):
    lines = [f"Relative output error, K = N = {SIZE}, {1 + max(row['seed'] for row in rows)} seeds (geometric mean)", ""]
    for kind, what in KINDS.items():
        lines.append(f"    {kind:<11} {what}")
    for precision, kinds in (("int4", tuple(KINDS)), ("nvfp4", NVFP4_KINDS)):
        lines += ["", f"| {precision} | rank | {' | '.join(kinds)} | mean | to reference | s |",
                  "| --- |" + " ---: |" * (len(kinds) + 4)]
        groups = {}
        for row in rows:
            if row["precision"] == precision:
                groups.setdefault((row["rank"] or 0, list(METHODS).index(row["method"]), row["method"]), []).append(row)
        for (rank, _, method), group in sorted(groups.items()):
            base = next((other for (r, _, name), other in groups.items() if r == rank and name == "reference"), None)
            by_kind = [mean([row for row in group if row["kind"] == kind]) for kind in kinds]
            against = f"{mean(group) / mean(base) - 1:+.1%}" if base else "-"
            lines.append(f"| {method} | {rank or '-'} | {' | '.join(f'{error:.4f}' for error in by_kind)} | "
                         f"{mean(group):.4f} | {against} | {sum(row['seconds'] for row in group):.1f} |")
    return "\n".join(lines)


def losses(rows):
    """Where ours is worse than the reference of equal rank, each against its like."""
    errors = {(row["method"], row["precision"], row["rank"], row["kind"], row["seed"]): row["error"] for row in rows}
    pairs = ("ours", "reference"), ("ours + GPTQ", "reference + GPTQ")
    return [key for key, error in errors.items() for mine, theirs in pairs
            if key[0] == mine and error > errors[(theirs, *key[1:])]]


# ---- full size

FULL = flux1.Shape(hidden=3072, depth=1, depth_single=1, in_features=64, context_dim=4096, vec_dim=768, guidance=True)


class RandomSource:
    """A FLUX of random weights, each layer made when asked for."""
    name, fingerprint, shape = "random weights", "random weights", FULL

    def layer(self, name):
        rows, cols = next((layer.n, layer.k) for layer in by_layer(self.shape.comfy_places()) if layer.name == name)
        random = torch.Generator().manual_seed(sum(map(ord, name)))
        return (torch.randn(rows, cols, generator=random).mul_(cols ** -0.5).to(torch.bfloat16),
                torch.zeros(rows, dtype=torch.bfloat16))

    def plain(self):
        random = torch.Generator().manual_seed(SEED)
        for place in self.shape.comfy_plain():
            size = place.tensor.shape
            if len(size) == 2:
                yield place.name, torch.randn(size, generator=random) * size[1] ** -0.5
            else:
                yield place.name, torch.zeros(size) if place.name.endswith(".bias") else torch.ones(size)


def full_size(precision, device):
    """Quantise one double and one single block of FLUX.1's size, data-free; say how long all 19 + 38 would take."""
    times, current = {}, [None, time.perf_counter()]

    def watch(progress):
        now = time.perf_counter()
        if current[0]:
            times[current[0]] = times.get(current[0], 0) + now - current[1]
        current[:] = progress.text.partition(" block ")[0] if " block " in progress.text else None, now
        print(f"  {progress.text}", file=sys.stderr, flush=True)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with tempfile.TemporaryDirectory() as folder:
        quantize(RandomSource(), Path(folder, "svdq.safetensors"), precision, 32, device=device, progress=watch)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"{precision}, rank 32, data-free, on {where}, load average {os.getloadavg()[0]:.1f} at the end")
    print(f"one double block {times['double']:.1f} s, one single block {times['single']:.1f} s (making the random weights "
          f"included); FLUX.1: {(19 * times['double'] + 38 * times['single']) / 60:.0f} min and the writing of 6.8 GB twice")
    print(f"peak memory {after:.2f} GB, {before:.2f} GB before it began", end="")
    print(f"; of the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB" if device.startswith("cuda") else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="time and memory of one double and one single block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    parser.add_argument("--seeds", type=int, default=2, help="layers of each kind; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write all rows to this file, too")
    options = parser.parse_args()
    if options.full_size:
        full_size(options.precision, options.device)
        return 0
    start = time.perf_counter()
    rows = table(options.seeds)
    print(as_markdown(rows))
    print("\nmodulation (W4A16): " + ", ".join(f"{name} {error:.4f}" for name, error in modulation(SEED).items()))
    worse = losses(rows)
    print(f"\nours worse than the reference of equal rank: {worse or 'nowhere'}. {time.perf_counter() - start:.0f} s, load "
          f"average {os.getloadavg()[0]:.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
