"""How fast the linears of FLUX run on this GPU: each is checked first, and timed only if it is right.

A run is replayed from a CUDA graph, so launch overhead stays out; before each, the L2 cache is flushed and the outputs
are spoiled. Times are medians of CUDA events. TOPS count 2 M N K of the product, GB/s every operand and result once.
"""

import datetime
import importlib
import math
import os
import statistics
import subprocess
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..kernels import build, epilogues, fused, hopper, ops, reference
from . import doctor

# name -> K, N, kind of doctor.KINDS
LAYERS = {"qkv": (3072, 9216, "int4"), "out": (3072, 3072, "int4"), "fc1": (3072, 12288, "int4"),
          "fc2": (12288, 3072, "int4 unsigned")}
# layer -> (tokens, N, device) -> what FLUX does to its output
EPILOGUES = {
    "qkv": lambda tokens, n, device: epilogues.QKV(*(torch.rand(2, 128, device=device).to(DTYPE) + 0.5),
                                             torch.randn(tokens, 64, 2, 2, device=device)),
    "fc1": lambda tokens, n, device: epilogues.Gelu(),
    "fc2": lambda tokens, n, device: epilogues.Gated(torch.randn(tokens, n, dtype=DTYPE, device=device),
                                               torch.randn(n, dtype=DTYPE, device=device)),
}
MODULATION = 3072, (18432,) * 38 + (9216,) * 38     # K, and N of every modulation of a step
TOKENS = (4608, 512)
DTYPE = torch.bfloat16
CHECKED_ROWS = 256                                  # of x, spread over all tiles
CODES_DIFFER = 5e-2                                 # limit where roundings lie elsewhere than in the format's arithmetic

# Data-sheet rates, dense: teraoperations per second by unit, and GB/s. A name must end so: an "RTX 4090 Laptop GPU" and
# an "H200 NVL" are other cards. int4 None: no such unit.
CARDS = {
    "RTX 3090": {"bf16": 71, "int4": 569, "memory": 936},
    "RTX 4090": {"bf16": 165, "int4": 1321, "memory": 1008},
    "RTX 5090": {"bf16": 209.5, "int4": None, "memory": 1792},
    "A100-SXM4-80GB": {"bf16": 312, "int4": 1248, "memory": 2039},
    "H200": {"bf16": 989, "int4": None, "fp8": 1979, "memory": 4800},
}


@dataclass(frozen=True)
class Work:
    """Something to be checked and timed."""
    what: str
    variant: str
    run: object                 # () -> the tensor or tensors it wrote
    check: object               # (those) -> [doctor.Check]; None for a baseline
    operations: float = 0       # of `unit`
    unit: str = "bf16"          # of CARDS
    bytes: float = 0


class Wrong(Exception):
    """A result that may not be timed."""


def missing():
    """Why nothing can be measured here, or None."""
    if torch.cuda.is_available() and not torch.version.hip:
        return None
    return f"bench needs a CUDA GPU, and torch {torch.__version__} finds none here"


def measure(tokens=TOKENS, rank=32, runs=50):
    """All facts as a dict that JSON can hold: {"machine", "rows", "notices", "passed"}."""
    card, timer, notices = machine(), CudaTimer(), []
    limits = limits_of(card["card"])
    kernels = kernel_variant(tuple(card["capability"])) if build.kernels_for(torch.cuda.current_device()) else None
    if kernels is None:
        notices.append("No fused kernels here; python -m svdq doctor says why.")
    kitchen, reason = _kitchen()
    if kitchen is None:
        notices.append(f"No comfy-kitchen rows: {reason}.")
    rows = []
    with torch.no_grad():
        for m in tokens:
            for name in LAYERS:
                about = {"layer": name, "M": m, "rank": rank}
                hopper_too = kernels is not None and card["capability"] == [9, 0]
                rows += timed(linear_works(name, m, rank, kernels, kitchen, hopper_too), about, runs, timer, limits)
        for count in (1, len(MODULATION[1])) if kernels else ():
            about = {"layer": f"{count} modulation", "M": 1, "rank": 0}
            rows += timed(modulation_works(count), about, runs, timer, limits)
    return {"machine": card, "runs": runs, "rows": rows, "notices": notices,
            "passed": all(row["passed"] for row in rows)}


# ---- where

def machine():
    return {"card": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability()),
            "power_cap": _text(doctor.probe(doctor.nvidia_smi, "power.limit")),
            "driver": _text(doctor.probe(doctor.nvidia_smi, "driver_version")), "torch": torch.__version__,
            "cuda": torch.version.cuda, "commit": _text(doctor.probe(_commit)),
            "date": datetime.date.today().isoformat()}


def _text(answer):
    return "unknown" if isinstance(answer, dict) else answer


def _commit():
    def git(*command):
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def limits_of(card):
    """The data-sheet rates of a card; none of an unknown one."""
    return next((limits for name, limits in CARDS.items() if card.endswith(name)), {})


def share(work, seconds, limits):
    """The time the card's limits leave no way around, over the time taken. None where they are not known."""
    rate, memory = limits.get(work.unit), limits.get("memory")
    if memory is None or work.operations and rate is None:
        return None
    return max(work.operations / (rate * 1e12) if work.operations else 0, work.bytes / (memory * 1e9)) / seconds


# ---- checking and timing

def timed(works, about, runs, timer, limits):
    """The rows of several works on the same data. `vs_bf16`: how many times as fast as the one called bf16."""
    rows = [about | _row(work, runs, timer, limits) for work in works]
    bf16 = next((row.get("us") for row in rows if row["what"] == "bf16"), None)
    for row in rows:
        whole = row["what"] not in ("quant_down", "gemm_w4a4", "quant_fp8", "gemm_fp8")
        row["vs_bf16"] = bf16 / row["us"] if bf16 and whole and row.get("us") else None
    return rows


def _row(work, runs, timer, limits):
    row = {"what": work.what, "variant": work.variant, "passed": False}
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
    for check in checks:
        if not check.passed:
            raise Wrong(f"{check.what}: error {check.error:.1e} of at most {check.limit:.1e}")
    return max(check.error for check in checks)


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

def kernel_variant(capability):
    """The first variant of the table whose W4A4 kernels a GPU can run, fast or not; None below all."""
    return next((variant.name for variant in ops.VARIANTS if variant.op == "linear_w4a4" and variant.capability
                 and variant.capability[0] <= capability <= variant.capability[1]), None)


def linear_works(name, tokens, rank, kernels, kitchen, hopper_too=False, device="cuda"):
    """Everything that is measured of one linear, on the same data.

    kernels      the name of their variant, or None
    hopper_too   whether the kernels that only Hopper has are there
    """
    k, n, kind = LAYERS[name]
    weight, bias = doctor.random_layer(kind, DTYPE, n, k, rank, device)
    x = doctor.random_x(tokens, k, DTYPE, weight.unsigned, device)
    out = torch.empty(tokens, n, dtype=DTYPE, device=device)
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).long()
    product, branch = 2 * tokens * n * k, 2 * tokens * rank
    exact = reference.linear_weight_only(x[rows], replace(weight.logical(), bias=bias))
    dense = torch.randn(n, k, dtype=DTYPE, device=device)

    yield Work("bf16", "F.linear", partial(torch.nn.functional.linear, x, dense, bias), None, product, "bf16",
               _bytes(x, dense, bias, out))
    run, = (variant.run for variant in ops.VARIANTS if (variant.op, variant.name) == ("linear_w4a4", "weight_only"))
    yield Work("weight_only", "weight_only", lambda: _written(run, x, weight, out, bias),
               lambda got: _close(got, rows, exact, doctor.ROUNDED_OFTEN[DTYPE]), product, "bf16",
               _bytes(x, *_tensors(weight), bias, out))
    if kernels:
        yield from _kernel_works(kernels, x, weight, bias, out, rows, product, branch)
    if hopper_too:
        epilogue = EPILOGUES[name](tokens, n, device) if name in EPILOGUES else None
        for act, per_group in (("e4m3", False), (None, True)):
            wanted = reference.linear_w4a4(x[rows], replace(weight.logical(), bias=bias), act=act)
            yield from _hopper_works(per_group, x, hopper.repack(weight), bias, out, rows, wanted, product, branch, epilogue)
    if kitchen:
        yield _kitchen_work(kitchen, x, weight, bias, rows, product)


def _kernel_works(variant, x, weight, bias, out, rows, product, branch):
    quant = partial(fused.quant_down, x, weight.smooth, weight.proj_down, weight.unsigned)
    operands = quant()

    def gemm(operands):
        fused.gemm_w4a4(*operands, weight.qweight, weight.wscales, weight.proj_up, bias, out, weight.unsigned, False)
        return out

    def check(got):
        return doctor.check_gemm(operands, weight, bias, got, rows)

    down = [tensor for tensor in (weight.smooth, weight.proj_down) if tensor is not None]
    rest = [tensor for tensor in (weight.qweight, weight.wscales, weight.proj_up, bias, out) if tensor is not None]
    yield Work("quant_down", variant, quant, lambda got: doctor.check_quant_down(x, weight, got, rows),
               branch * x.shape[1], "bf16", _bytes(x, *down, *operands))
    yield Work("gemm_w4a4", variant, lambda: gemm(operands), check, product, "int4", _bytes(*operands, *rest))
    yield Work("both", variant, lambda: gemm(quant()), check, product, "int4",
               _bytes(x, *down, *operands, *operands, *rest))


def _hopper_works(per_group, x, weight, bias, out, rows, wanted, product, branch, epilogue=None):
    """The quantiser is right if what the two compute together is: its codes lie in an order of their own.

    With an epilogue, also both with it in the kernel, and both with it in torch after them.
    """
    variant = "fp8_w4a4" if per_group else "fp8_w4a8"
    quant = partial(fused.quant_fp8, x, weight.inverse, weight.proj_down, weight.unsigned, per_group)
    operands = quant()

    def gemm(operands, epilogue=None):
        fused.gemm_fp8(*operands, weight.qweight, weight.wscales, weight.proj_up, bias, out, False,
                       **ops.operands_of(epilogue))
        return out

    def check(got, wanted=wanted):
        return _close(got, rows, wanted, CODES_DIFFER)

    down = [tensor for tensor in (weight.inverse, weight.proj_down) if tensor is not None]
    rest = [tensor for tensor in (weight.qweight, weight.wscales, weight.proj_up, bias, out) if tensor is not None]
    yield Work("quant_fp8", variant, quant, lambda got: check(gemm(got)), branch * x.shape[1], "bf16",
               _bytes(x, *down, *operands))
    yield Work("gemm_fp8", variant, lambda: gemm(operands), check, product, "fp8", _bytes(*operands, *rest))
    moved = _bytes(x, *down, *operands, *operands, *rest)
    yield Work("both", variant, lambda: gemm(quant()), check, product, "fp8", moved)
    if epilogue is not None:
        name, moved = type(epilogue).__name__, moved + _bytes(*_tensors(epilogue))
        of_rows = replace(epilogue, **{field: getattr(epilogue, field)[rows] for field in ("residual", "rotation")
                                       if hasattr(epilogue, field)})
        check = partial(check, wanted=of_rows.of(wanted))
        yield Work(f"both with {name}", variant, lambda: gemm(quant(), epilogue), check, product, "fp8", moved)
        yield Work(f"both, then {name}", variant, lambda: _in_torch(epilogue, gemm(quant())), check, product, "fp8", moved)


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


def modulation_works(layers, device="cuda"):
    """awq_gemv for the first `layers` modulations of a step, in one launch."""
    k, widths = MODULATION
    made = [doctor.random_layer("awq", DTYPE, n, k, 0, device) for n in widths[:layers]]
    x = doctor.random_x(1, k, DTYPE, device=device)
    weights, biases = [weight for weight, _ in made], [bias for _, bias in made]

    def run():
        return fused.awq_gemv(x, *([getattr(weight, name) for weight in weights]
                                   for name in ("qweight", "wscales", "wzeros")), biases)

    def check(got):
        return [check for (weight, bias), out in zip(made, got) for check in doctor.check_awq(x, weight, bias, out)]

    operands = [tensor for weight in weights for tensor in _tensors(weight)]
    yield Work("awq_gemv", "fused", run, check, 0, "bf16", _bytes(x, *operands, *biases, *biases))  # out is like bias


def _written(run, x, weight, out, bias):
    run(x, weight, out, bias, False)
    return out


def _close(got, rows, exact, limit):
    return [doctor.Check("output", doctor.relative(got[rows], exact), limit), doctor.check_finite(got)]


def _tensors(weight):
    return [value for value in vars(weight).values() if isinstance(value, torch.Tensor)]


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
    return Work("both", "comfy-kitchen", run, lambda got: _close(got, rows, exact, CODES_DIFFER), product, "int4",
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
    notices = list(facts["notices"])
    if any(row["variant"] == "fused_emulated" for row in facts["rows"]):
        notices.append("fused_emulated: this GPU has no 4-bit integer MMA; the compiler emulates it.")
    return "\n".join([*lines, *([""] if notices else []), *notices])


def _number(value, form):
    return "" if value is None else format(value, form)
