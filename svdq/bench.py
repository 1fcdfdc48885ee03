"""How fast the linears of FLUX run on this GPU: each is checked first, and timed only if it is right.

A run is replayed from a CUDA graph, so launch overhead stays out; before each, the L2 cache is flushed and the outputs
are spoiled. Times are medians of CUDA events. TOPS count 2 M N K of the product, GB/s every operand and result once.
"""

import datetime
import importlib
import math
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from . import data_sheets, doctor
from .kernels import build, check, epilogues, reference, registry, tuner
from .kernels.errors import command
from .kernels.variant import HALVES, Target, usual_dtype
from .kernels.weights import PRECISIONS, example

# name -> K, N, kind of check.KINDS, that of an INT4 file; an NVFP4 file has one kind
LAYERS = {"qkv": (3072, 9216, "int4"), "out": (3072, 3072, "int4"), "fc1": (3072, 12288, "int4"),
          "fc2": (12288, 3072, "int4 unsigned")}
EPILOGUES = {"qkv": epilogues.QKV, "fc1": epilogues.Gelu, "fc2": epilogues.Gated}      # layer -> what FLUX does to its output
MODULATED = {"qkv", "fc1"}      # layers whose input FLUX normalises and modulates
# activations -> what multiplies them
UNITS = {"int4": "int4", "nvfp4": "fp4", "e4m3": "fp8", "int8": "int8", "int8_group": "int8", None: "bf16"}
MODULATION = 3072, (18432,) * 38 + (9216,) * 38     # K, and N of every modulation of a step
TOKENS = (4608, 512)
CHECKED_ROWS = 256                                  # of x, spread over all tiles
CODES_DIFFER = 5e-2                                 # limit where roundings lie elsewhere than in the format's arithmetic


@dataclass(frozen=True)
class Work:
    """Something to be checked and timed."""
    what: str
    variant: str
    whole: bool                 # whether it is all of a layer, and so comparable with bf16
    run: object                 # () -> the tensor or tensors it wrote
    check: object               # (those) -> [check.Check]; None for a baseline
    operations: float = 0       # of `unit`
    unit: str = "bf16"          # of data_sheets.RATES
    bytes: float = 0


class Wrong(Exception):
    """A result that may not be timed."""


def missing():
    """Why nothing can be measured here, or None."""
    if torch.cuda.is_available() and not torch.version.hip:
        return None
    return f"bench needs a CUDA GPU, and torch {torch.__version__} finds none here"


def measure(tokens=TOKENS, rank=32, runs=50, save=lambda facts: None):
    """All facts as a dict that JSON can hold: {"machine", "kernels", "fastest", "runs", "rows", "notices", "passed",
    "complete"}, see bench_file.py. Which of rivals is fastest is timed again, and remembered.

    save   called with what there is so far after every few rows: a run may be cut
    """
    tuner.forget()
    card, timer, notices = machine(), CudaTimer(), []
    limits, target = data_sheets.limits(card["card"]), Target.of("cuda")
    dtype = usual_dtype(target)
    variants = {precision: serving(precision, target) for precision in PRECISIONS}
    built = kernels_made_for(target)
    for precision in PRECISIONS:
        registry.plan(example(precision, dtype), target, dtype, repack=True)        # asks the tuner
    kitchen, reason = _kitchen()
    if kitchen is None:
        notices.append(f"No comfy-kitchen rows: {reason}.")
    if not any(variants.values()):
        notices.append(f"No kernels of ours serve here; `{command('doctor')}` says why.")
    rows = []

    def facts(complete=False):
        return {"machine": card, "kernels": built, "fastest": [asdict(choice) for choice in tuner.choices()], "runs": runs,
                "rows": rows, "notices": notices, "passed": all(row["passed"] for row in rows), "complete": complete}

    with torch.no_grad():
        for m in tokens:
            for name in LAYERS:
                about = {"layer": name, "M": m, "rank": rank}
                rows += timed(linear_works(name, m, rank, variants["int4"], kitchen, dtype), about, runs, timer, limits)
                save(facts())
                if variants["nvfp4"]:
                    about = about | {"layer": f"{name} nvfp4"}
                    rows += timed(linear_works(name, m, rank, variants["nvfp4"], None, dtype, kind="nvfp4"), about, runs, timer,
                                  limits)
                    save(facts())
        for count in (1, len(MODULATION[1])):
            about = {"layer": f"{count} modulation", "M": 1, "rank": 0}
            rows += timed(modulation_works(count, variants["awq"], dtype), about, runs, timer, limits)
            save(facts())
    save(facts(complete=True))
    return facts(complete=True)


def serving(precision, target):
    """The variants that can serve weights of a precision on a device, whether they are its first choice or not."""
    dtype = usual_dtype(target)
    return registry.able(example(precision, dtype), target, dtype)


# ---- where

def machine():
    return {"card": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability()),
            "power_cap": _text(doctor.or_error(doctor.nvidia_smi, "power.limit")),
            "driver": _text(doctor.or_error(doctor.nvidia_smi, "driver_version")), "torch": torch.__version__,
            "cuda": torch.version.cuda, "commit": _text(doctor.or_error(_commit)),
            "date": datetime.date.today().isoformat(), "system": _text(doctor.or_error(platform.platform)),
            "python": platform.python_version(),
            "memory_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory}


def kernels_made_for(target):
    """Every variant made for a GPU, whether it is first choice or not: built or why not, and its self-test."""
    rows = []
    for variant in registry.VARIANTS:
        if variant.library is None or variant.on_request or not variant.made_for(target):
            continue
        built = build.build(variant.library, variant.library.arch(target.capability))
        row = {"variant": variant.name, "weights": list(variant.precisions), "act_bits": variant.act_bits,
               "library": variant.library.name, "route": built.route,
               "reasons": [reason.splitlines()[0][:200] for reason in built.reasons],
               "self_test": "passed" if registry.trusted(variant, target) else "failed"}
        if built.route is None:
            row["self_test"] = "not built"
        elif row["self_test"] == "failed":
            failed = doctor.or_error(check.small, variant, target.name)
            row["reasons"] += [failed["error"]] if isinstance(failed, dict) else [text[:200] for text in failed[:3]]
        rows.append(row)
    return rows


def _text(answer):
    return "unknown" if isinstance(answer, dict) else answer


def _commit():
    def git(*command):
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def share(work, seconds, limits):
    """The time the card's limits leave no way around, over the time taken. None where they are not known."""
    rate, memory = limits.get(work.unit), limits.get("memory")
    if memory is None or work.operations and rate is None:
        return None
    return max(work.operations / (rate * 1e12) if work.operations else 0, work.bytes / (memory * 1e9)) / seconds


# ---- checking and timing

def timed(works, about, runs, timer, limits):
    """The rows of several works on the same data. `vs_bf16`: how many times as fast as the one in 16 bit."""
    rows = [about | _row(work, runs, timer, limits) for work in works]
    bf16 = next((row.get("us") for row in rows if row["what"] in HALVES.values()), None)
    for row in rows:
        whole = row.pop("whole")
        row["vs_bf16"] = bf16 / row["us"] if bf16 and whole and row.get("us") else None
    return rows


def _row(work, runs, timer, limits):
    row = {"what": work.what, "variant": work.variant, "whole": work.whole, "passed": False}
    try:
        row["error"] = accepted(work)
        times, how, repeatable = timer(work, runs)
        if work.check and not repeatable:
            raise Wrong("two runs on the same data differ")
    except Exception as error:                                  # one row lost, and it says so
        return row | {"wrong": str(error) or type(error).__name__}
    us, spread = summary(times)
    return row | {"passed": True, "us": us, "spread": spread, "runs": len(times), "how": how,
                  "tops": work.operations / us / 1e6 if work.operations else None, "gbs": work.bytes / us / 1e3,
                  "share": share(work, us / 1e6, limits)}


def accepted(work):
    """The error of a work that is right, None for a baseline. Raises Wrong. Outputs are spoiled before it runs."""
    if work.check is None:
        return None
    spoil(work.run())                                           # frees it: the next run is given the same memory
    checks = work.check(work.run())
    for one in checks:
        if not one.passed:
            raise Wrong(str(one))
    return max(one.error for one in checks)


def summary(times):
    """(median, spread): the middle 80 % of the times, relative to the median."""
    median = statistics.median(times)
    if len(times) < 2:
        return median, math.nan
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return median, (cuts[-1] - cuts[0]) / median


def tensors_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def spoil(result):
    """Fill results with what no check passes."""
    for tensor in tensors_of(result):
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)


class CudaTimer:
    """timer(work, runs) -> ([microseconds], "graph" | "launches", whether first and last results are the same bits)"""

    def __init__(self):
        cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
        self.flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device="cuda")

    def __call__(self, work, runs):
        run, how = self._replayed(work)
        for _ in range(3):
            result = run()
        first = [tensor.clone() for tensor in tensors_of(result)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for start, end in events:
            spoil(result)
            del result                                          # what a run allocates, the next one reuses
            self.flush.zero_()
            start.record()
            result = run()
            end.record()
        torch.cuda.synchronize()
        same = all(torch.equal(a, b) for a, b in zip(first, tensors_of(result)))
        return [1000 * start.elapsed_time(end) for start, end in events], how, same

    @staticmethod
    def _replayed(work):
        graph = torch.cuda.CUDAGraph()
        work.run()                                              # what loads and allocates once must not be captured
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                result = work.run()
        except RuntimeError:                                    # not ours to capture
            return work.run, "launches"

        def replay():
            graph.replay()
            return result
        return replay, "graph"


# ---- what

def linear_works(name, tokens, rank, variants, kitchen, dtype=torch.bfloat16, device="cuda", kind=None):
    """Everything that is measured of one linear, on the same data: 16 bit, weight-only, each of these variants.

    kind   of check.KINDS; None: that of the layer in an INT4 file
    """
    k, n, usual = LAYERS[name]
    kind = kind or usual
    weight, bias = check.random_weight(kind, dtype, n, k, rank, device)
    x = check.random_x(tokens, k, dtype, weight.unsigned, device)
    out = torch.empty(tokens, n, dtype=dtype, device=device)
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).long()
    product = 2 * tokens * n * k
    exact = reference.linear_weight_only(x[rows], weight.logical(bias))
    dense = torch.randn(n, k, dtype=dtype, device=device)

    yield Work(HALVES[dtype], "F.linear", True, partial(torch.nn.functional.linear, x, dense, bias), None, product, "bf16",
               _bytes(x, dense, bias, out))
    with registry.using("weight_only"):
        weight_only = registry.plan(weight, Target.of(x.device), dtype).variant
    yield Work("weight_only", "weight_only", True, lambda: _written(weight_only, x, weight, out, bias),
               lambda got: _close(got, rows, exact, check.ROUNDED_OFTEN[dtype]), product, "bf16",
               _bytes(x, *weight.tensors().values(), bias, out))
    epilogue = EPILOGUES[name] if name in EPILOGUES else None
    for variant in variants:
        yield from _variant_works(variant, x, weight, bias, out, rows, epilogue)
        if name in MODULATED and variant.modulates is not None:
            modulated = check.random_modulated(tokens, k, dtype, device=device)
            yield from _modulated_works(variant, modulated, weight, bias, out, rows)
    if kitchen:
        yield _kitchen_work(kitchen, x, weight, bias, rows, product)


def _variant_works(variant, x, weight, bias, out, rows, epilogue):
    """A variant's linear, its two halves if `decode` shows what is between them, and the linear with an epilogue: in the
    kernel, if it does it, and in torch after it."""
    (tokens, k), n = x.shape, len(bias)
    packed = weight if variant.layout is None else variant.layout.pack(weight)
    product, unit = 2 * tokens * n * k, variant.unit or UNITS[variant.activations]
    tensors = packed.tensors()
    first = [tensors.pop(name) for name in packed.read_first if name in tensors]
    moved = _bytes(x, *first, *tensors.values(), bias, out)

    def both(epilogue=None):
        return _written(variant, x, packed, out, bias, epilogue)

    if variant.decode is None:
        exact = check.wanted(variant, x[rows], weight, bias)

        def checks(got):
            return _close(got, rows, exact, check.ROUNDED_OFTEN[x.dtype])
    else:
        prepare = partial(variant.prepare, x, packed)
        prepared = prepare()
        between = _bytes(*prepared)
        moved += 2 * between

        def multiply():
            variant.product(prepared, packed, out, bias, False, None)
            return out

        def checks(got):
            return check.check_product(variant, prepared, weight, bias, got, rows)

        yield Work("quantise", variant.name, False, prepare,
                   lambda got: check.check_prepared(variant, x, weight, got, rows), 2 * tokens * weight.rank * k, "bf16",
                   _bytes(x, *first) + between)
        yield Work("product", variant.name, False, multiply, checks, product, unit,
                   _bytes(*tensors.values(), bias, out) + between)
    yield Work("both", variant.name, True, both, checks, product, unit, moved)
    if epilogue is None:
        return
    operands = check.random_epilogue(epilogue, tokens, n, x.dtype, x.device)
    name, moved = epilogue.__name__, moved + _bytes(*(t for t in vars(operands).values() if isinstance(t, torch.Tensor)))
    wanted = replace(operands, **{field: getattr(operands, field)[rows] for field in ("residual", "rotation")
                                  if hasattr(operands, field)}).of(both()[rows])

    def check_epilogue(got):
        return _close(got, rows, wanted, check.LIMIT)

    if epilogue in variant.epilogues:
        yield Work(f"both with {name}", variant.name, True, lambda: both(operands), check_epilogue, product, unit, moved)
    yield Work(f"both, then {name}", variant.name, True, lambda: _in_torch(operands, both()), check_epilogue, product, unit,
               moved)


def _modulated_works(variant, modulated, weight, bias, out, rows):
    """A variant's linear of a normalised and modulated x: in the quantiser, and in torch before it."""
    packed = weight if variant.layout is None else variant.layout.pack(weight)
    wanted = _written(variant, modulated.of(), packed, torch.empty_like(out), bias)[rows]
    operands = modulated.x, modulated.scale, modulated.shift, *packed.tensors().values(), bias, out
    for what, x in (("both with Modulated", lambda: modulated), ("Modulated, then both", modulated.of)):
        yield Work(what, variant.name, True, lambda x=x: _written(variant, x(), packed, out, bias),
                   lambda got: _close(got, rows, wanted, check.LIMIT), 2 * len(modulated) * weight.shape[0] * weight.shape[1],
                   variant.unit or UNITS[variant.activations], _bytes(*operands))


def _in_torch(epilogue, y):
    """An epilogue as ComfyUI does it, in 16 bit but for rotations. q and k are written back: a host would concatenate."""
    if isinstance(epilogue, epilogues.Gelu):
        return torch.nn.functional.gelu(y, approximate="tanh")
    if isinstance(epilogue, epilogues.Gated):
        return torch.addcmul(epilogue.residual, epilogue.gate, y)
    q, k, _ = y.view(len(y), 3, -1, 128).unbind(1)
    turn = epilogue.rotation[:, None]
    for x, weight in ((q, epilogue.query), (k, epilogue.key)):
        pairs = torch.nn.functional.rms_norm(x, (128,), weight, epilogue.eps).float().unflatten(-1, (-1, 1, 2))
        x.copy_(torch.addcmul(turn[..., 0] * pairs[..., 0], turn[..., 1], pairs[..., 1]).flatten(-2))
    return y


def modulation_works(layers, variants, dtype=torch.bfloat16, device="cuda"):
    """The first `layers` modulations of a step, one row of x, as a model runs them: in one launch where a variant has one."""
    k, widths = MODULATION
    made = [check.random_weight("awq", dtype, n, k, 0, device, seed=i) for i, n in enumerate(widths[:layers])]
    x = check.random_x(1, k, dtype, device=device)
    outs = [torch.empty(1, len(bias), dtype=dtype, device=device) for _, bias in made]
    operands = [tensor for weight, bias in made for tensor in (*weight.tensors().values(), bias)]
    for variant in variants:
        def run(variant=variant):
            if variant.products is not None:
                return variant.products(x, *map(list, zip(*made)))
            for (weight, bias), out in zip(made, outs):
                variant.run(x, weight, out, bias)
            return outs

        def checks(got, variant=variant):
            return [one for (weight, bias), out in zip(made, got) for one in check.check_linear(variant, x, weight, bias, out)]

        yield Work("modulation", variant.name, True, run, checks, 0, "bf16", _bytes(x, *operands, *outs))


def _written(variant, x, weight, out, bias, epilogue=None):
    variant.run(x, weight, out, bias, epilogue=epilogue)
    return out


def _close(got, rows, exact, limit):
    return [check.Check("output", check.relative(got[rows], exact), limit), check.finite(got)]


def _bytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


# ---- comfy-kitchen, when it is there

def _kitchen():
    """(comfy_kitchen, None) if its CUDA backend serves, else (None, why not)."""
    os.environ.setdefault("COMFY_KITCHEN_SVDQUANT_REUSE_WORKSPACE", "0")    # what it keeps must not come from a graph
    try:
        kitchen = importlib.import_module("comfy_kitchen")
        cuda = kitchen.list_backends()["cuda"]
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    needed = {"quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"}
    if not cuda["available"] or cuda["disabled"] or not needed <= set(cuda["capabilities"]):
        return None, cuda["unavailable_reason"] or "its CUDA backend is off or lacks the operators"
    return kitchen, None


def _kitchen_work(kitchen, x, weight, bias, rows, product):
    """Its two operators on the same layer, in its natural layout."""
    layer = weight.logical()
    qweight = (layer.codes[:, 0::2] | layer.codes[:, 1::2] << 4).view(torch.int8).contiguous()
    wscales, smooth = layer.wscales.t().contiguous(), layer.smooth.contiguous()
    down, up = layer.proj_down.contiguous(), layer.proj_up.contiguous()
    shifted = x + reference.SHIFT if weight.unsigned else x     # in a model the producer of x adds it: not timed

    def run():
        with kitchen.use_backend("cuda"):
            qact, ascales, low = kitchen.quantize_svdquant_w4a4(shifted, smooth, down, act_unsigned=weight.unsigned,
                                                                lora_x=x)
            return kitchen.scaled_mm_svdquant_w4a4(qact, qweight, ascales, wscales, low, up, bias=bias,
                                                   act_unsigned=weight.unsigned)[:len(x)]

    exact = reference.linear_w4a4(x[rows], replace(layer, bias=bias))
    return Work("both", "comfy-kitchen", True, run, lambda got: _close(got, rows, exact, CODES_DIFFER), product, "int4",
                _bytes(shifted, x, smooth, down, qweight, wscales, up, bias) + x.shape[0] * len(bias) * 2)


# ---- as text

def as_markdown(facts):
    where = facts["machine"]
    lines = [f"{where['card']}, power cap {where['power_cap']}, driver {where['driver']}, torch {where['torch']}, "
             f"CUDA {where['cuda']}, commit {where['commit']}, {where['date']}. Median of {facts['runs']} runs; spread "
             "is the middle 80 %.", "",
             "| layer | M | what | variant | us | spread | TOPS | GB/s | of the limit | vs bf16 | error |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in facts["rows"]:
        head = f"| {row['layer']} | {row['M']} | {row['what']} | {row['variant']} | "
        if not row["passed"]:
            lines.append(head + "WRONG: " + row["wrong"].splitlines()[0].replace("|", "/") + " | | | | | | |")
            continue
        lines.append(head + " | ".join((
            f"{row['us']:.1f}", f"{row['spread']:.1%}", _number(row["tops"], ".0f"), f"{row['gbs']:.0f}",
            _number(row["share"], ".0%"), _number(row["vs_bf16"], ".2f"), _number(row["error"], ".1e"))) + " |")
    return "\n".join([*lines, *([""] if facts["notices"] else []), *facts["notices"]])


def _number(value, form):
    return "" if value is None else format(value, form)
