"""What this machine is, which implementation serves each operator and why no better one, and whether they are right.

Every question is asked on its own: on an odd machine one answer becomes {"error": why}, and the report goes on.
"""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels import build, fused, layout, ops, reference, weights

# tokens, N, K, rank: one row; a tail in the first tile; a second tile, FLUX's width and the widest fused branch.
SHAPES = ((1, 256, 1152, 0), (17, 256, 640, 32), (130, 128, 3072, 128))
KINDS = ("int4", "int4 unsigned", "nvfp4", "awq")
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}      # half a step of 16 bit, relative
ROUNDED = {torch.bfloat16: 2e-3, torch.float16: 3e-4}          # one rounding to 16 bit, relative to the norm
ROUNDED_OFTEN = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # weights, inputs and sums, as in a 16-bit layer
TIES = 1e-4                                                    # codes that may round the other way


class Device(NamedTuple):
    name: str                           # as torch calls it
    capability: tuple | None = None     # None: not CUDA
    index: int | None = None


class Check(NamedTuple):
    """One comparison with the specification. NaN never passes."""
    what: str
    error: float
    limit: float

    @property
    def passed(self):
        return self.error <= self.limit


def describe():
    """All facts as a dict that JSON can hold. "passed" is what the exit code says."""
    gpus = probe(_gpus)
    usable = [gpu for gpu in gpus if "error" not in gpu] if isinstance(gpus, list) else []
    devices = [Device(f"cuda:{gpu['index']}", tuple(gpu["capability"]), gpu["index"]) for gpu in usable]
    devices = devices or [Device("cpu")]
    facts = {
        "python": f"{platform.python_version()} {sys.executable}",
        "system": probe(platform.platform),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": probe(nvidia_smi, "driver_version"),
        "gpus": gpus,
        "compilers": {name: probe(ask) for name, ask in
                      (("nvcc", _nvcc), ("host compiler", _host_compiler), ("ninja", _ninja), ("nvrtc", _nvrtc))},
        "kernels": [probe(_kernels, kind) for kind in sorted({d.capability for d in devices if d.capability})],
        "dispatch": [row for device in devices for row in _listed(probe(_dispatch, device), device)],
        "self_test": [row for device in devices for row in _listed(probe(self_test, device), device)],
    }
    facts["cache"] = probe(_cache)                              # last: by now it holds what was built
    return facts | {"passed": all(row.get("passed") for row in facts["self_test"])}


def probe(ask, *arguments):
    """What `ask` answers, or {"error": what went wrong}."""
    try:
        return ask(*arguments)
    except Exception as error:
        return {"error": _shown(error)}


def _shown(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = "" if isinstance(error, (OSError, RuntimeError)) and lines else type(error).__name__ + ": " * bool(lines)
    return name + (lines[0][:300] if lines else "")


def _listed(rows, device):
    return [rows | {"device": device.name}] if isinstance(rows, dict) else rows


# ---- the machine

def _gpus():
    return [{"index": index} | probe(_gpu, index) for index in range(torch.cuda.device_count())]


def _gpu(index):
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory}


def nvidia_smi(*fields):
    """What nvidia-smi says of the first GPU, the fields joined by commas."""
    return _said("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()[0]


def _said(*command):
    """stdout of a command, which must be there, end within 20 seconds and say something."""
    path = shutil.which(command[0])
    if path is None:
        raise FileNotFoundError(f"no {command[0]} on the PATH")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, errors="replace", timeout=20)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout.strip()


def _nvcc():
    from torch.utils.cpp_extension import CUDA_HOME             # None in a torch without CUDA
    path = shutil.which(Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else "nvcc")
    if path is None:
        raise FileNotFoundError(f"no nvcc in {CUDA_HOME or 'the PATH'}")
    said = _said(path, "--version")
    version = re.search(r"V(\d[\d.]*)", said)
    return {"path": path, "version": version[1] if version else said.splitlines()[-1]}


def _host_compiler():
    from torch.utils.cpp_extension import get_cxx_compiler
    name = get_cxx_compiler()
    if sys.platform == "win32":                                 # cl has no --version
        path = shutil.which(name)
        if path is None:
            raise FileNotFoundError(f"no {name} on the PATH")
        return {"path": path, "version": None}
    return {"path": shutil.which(name) or name, "version": _said(name, "--version").splitlines()[0]}


def _ninja():
    return {"path": shutil.which("ninja"), "version": _said("ninja", "--version")}


def _nvrtc():
    nvrtc = build.load_nvrtc()
    if nvrtc is None:
        raise FileNotFoundError("no NVRTC library beside torch or on the system")
    return {"path": getattr(nvrtc.library, "_name", None), "version": "{}.{}".format(*nvrtc.version)}


def _cache():
    folder = build.cache_folder()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"path": str(folder), "writable": os.access(folder, os.W_OK), "files": len(sizes), "bytes": sum(sizes)}


def _kernels(capability):
    """How the kernels of one kind of GPU came to be, or why not. Builds them if need be."""
    arch, start = build.arch_of(capability), time.time()
    if arch is None:
        return {"arch": _sm(capability), "route": None, "paths": [], "cached": False, "seconds": 0.0,
                "reasons": [f"the kernels begin at {_sm(build.LOWEST)}"]}
    built = build.build(arch)
    paths = built.path if isinstance(built.path, list) else [built.path] if built.path else []
    paths = [Path(path) for path in paths]
    return {"arch": arch, "route": built.route, "paths": [str(path) for path in paths],
            "cached": bool(paths) and all(path.stat().st_mtime < start for path in paths),
            "seconds": round(built.seconds, 2), "reasons": list(built.reasons)}


def _sm(capability):
    return f"sm_{capability[0]}{capability[1]}"


# ---- who serves

def _dispatch(device):
    """What the table of ops.py chooses on a device, per operator, precision and dtype."""
    rows = []
    for op in dict.fromkeys(variant.op for variant in ops.VARIANTS):
        for precision in layout.GROUP if op == "linear_w4a4" else (None,):
            for dtype in fused.HALVES:
                request = ops.Request(op, dtype, device.capability, device.index, precision)
                chosen = ops.choose(request)
                rows.append({"device": device.name, "op": op, "precision": precision, "dtype": _short(dtype),
                             "variant": chosen.name, "how": chosen.how, "most_tokens": chosen.tokens,
                             "declined": [{"variant": v.name, "why": why} for v, why in ops.declined(request)]})
    return rows


def _short(dtype):
    return str(dtype).removeprefix("torch.")


# ---- random layers

def random_layer(kind, dtype, n, k, rank, device="cpu"):
    """(weight, bias) of one of KINDS, packed; outputs are of the order of 1 for a unit x."""
    random = torch.Generator(device).manual_seed(n + k + rank)

    def uniform(*shape, scale=1.0):
        return (torch.rand(shape, generator=random, device=device) + 0.5) * scale

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=random, device=device) * scale).to(dtype)

    codes = torch.randint(0, 16, (n, k), generator=random, device=device, dtype=torch.uint8)
    bias, size = normal(n), 1 / (4 * math.sqrt(k))
    if kind == "awq":
        scales = uniform(k // 64, n, scale=size).to(dtype)
        return weights.AWQWeight(layout.pack_awq(codes), scales, (scales * -7.5).to(dtype)), bias
    int4 = kind != "nvfp4"
    scales = uniform(n, k // layout.GROUP["int4" if int4 else "nvfp4"], scale=size if int4 else 1.0)
    return weights.W4A4Weight(
        precision="int4" if int4 else "nvfp4", unsigned=kind == "int4 unsigned", qweight=layout.pack_codes(codes),
        wscales=layout.pack_scales(scales.to(dtype if int4 else torch.float8_e4m3fn)),
        smooth=layout.pack_vector(uniform(k).to(dtype)), wtscale=1.0 if int4 else size,
        proj_down=layout.pack_down(normal(k, rank, scale=k**-0.5)) if rank else None,
        proj_up=layout.pack_up(normal(n, rank, scale=rank**-0.5)) if rank else None), bias


def random_x(tokens, k, dtype, unsigned=False, device="cpu"):
    x = torch.randn(tokens, k, generator=torch.Generator(device).manual_seed(tokens), device=device)
    return (reference.gelu_tanh(x) if unsigned else x).to(dtype)


def _moved(weight, device):
    return replace(weight, **{name: value.to(device) for name, value in vars(weight).items()
                              if isinstance(value, torch.Tensor)})


# ---- checks

def relative(got, want):
    """||got - want|| / ||want||. NaN wherever one is NaN."""
    got, want = got.double(), want.to(got.device).double()
    return float((got - want).norm() / want.norm())


def unpack_qact(qact, unsigned):
    """Codes as quant_down.cuh lays them out, [M/64][K/64][m16][g][t][k half][row half] words of 8 -> [M, K] int8."""
    words = qact.view(*qact.shape[:2], 4, 8, 4, 2, 2)
    codes = torch.stack([(words >> 4 * i & 15).to(torch.int8) for i in range(8)], -1)
    codes = codes.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(qact.shape[0] * 64, -1)
    return codes if unsigned else (codes ^ 8) - 8


def unpack_ascales(ascales):
    """[M/64][K/64][m16][g][row half] -> [M, K/64]."""
    return ascales.permute(0, 2, 4, 3, 1).reshape(ascales.shape[0] * 64, -1)


def unpack_low(low):
    """[M/16][R/16][g][t][k half][row half][2] -> [M, R]."""
    return low.view(*low.shape[:2], 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(low.shape[0] * 16, -1)


def check_quant_down(x, weight, result, rows):
    """Results of the kernel at `rows` of x against reference.quant_down: codes but for ties, scales within a step."""
    layer, tokens = weight.logical(), x.shape[0]
    qact, ascales, low = unpack_qact(result[0], weight.unsigned), unpack_ascales(result[1]), unpack_low(result[2])
    codes, scales, exact = reference.quant_down(x[rows], layer.smooth, layer.proj_down, precision="int4",
                                                unsigned=weight.unsigned)
    wrong = (qact[rows].int() - codes.int()).abs()
    ties = max(int((wrong > 0).sum()) - 1, 0) / wrong.numel()   # a single one proves nothing on a small shape
    step = float(((ascales[rows] - scales.float()).abs() / scales.float()).max())
    tail = sum(int(part[tokens:].ne(0).sum()) for part in (qact, ascales, low))
    checks = [Check("codes", ties if int(wrong.max()) <= 1 else math.inf, TIES),
              Check("scales", step, 2 * STEP[x.dtype]), Check("rows past the end", float(tail), 0.0)]
    return [*checks, Check("low rank", relative(low[rows], exact), ROUNDED[x.dtype])] if weight.rank else checks


def check_gemm(operands, weight, bias, out, rows):
    """Rows of out against float64 on the same quantised operands: one rounding apart."""
    qact, ascales, low = operands
    layer = weight.logical()
    values = layout.signed(layer.codes).double() * layer.wscales.double().repeat_interleave(64, 1)
    scales = unpack_ascales(ascales)[rows].double().repeat_interleave(64, 1)
    act = unpack_qact(qact, weight.unsigned)[rows].double() * scales
    exact = act @ values.T + unpack_low(low)[rows].double() @ layer.proj_up.double().T + bias.double()
    return [Check("output", relative(out[rows], exact), ROUNDED[out.dtype]), check_finite(out)]


def check_awq(x, weight, bias, out):
    codes = layout.unpack_awq(weight.qweight)
    dense = reference.dequantize_awq(codes, weight.wscales.t(), weight.wzeros.t())
    return [Check("output", relative(out, x.double() @ dense.double().T + bias.double()), ROUNDED[out.dtype])]


def check_finite(out):
    return Check("not finite", float((~out.isfinite()).sum()), 0.0)


# ---- the self-test: wider and with its figures; whether kernels may serve is decided by kernels/selftest.py

def self_test(device):
    """Every variant that the device can run against reference.py on the CPU, then each kernel by itself."""
    rows = []
    for kind in KINDS:
        for dtype in fused.HALVES:
            for variant in ops.VARIANTS:
                if _testable(variant, kind, dtype, device):
                    rows.append(_row(device, f"{variant.op} {kind}", variant.name, dtype, _test_variant, variant, kind))
    for name, kind in (("quant_down", "int4"), ("quant_down", "int4 unsigned"), ("gemm_w4a4", "int4"),
                       ("gemm_w4a4", "int4 unsigned"), ("awq_gemv", "awq")):
        for dtype in fused.HALVES:
            served = [v.name for v in ops.VARIANTS if v.capability and _testable(v, kind, dtype, device)]
            if served:
                rows.append(_row(device, f"{name} {kind}", served[0], dtype, _test_kernel, name, kind))
    return rows


def _testable(variant, kind, dtype, device):
    """Whether it can run there at all. Kernels the dispatcher does not trust are tested, too: their errors say why."""
    op, precision = ("linear_awq", None) if kind == "awq" else ("linear_w4a4", kind.split()[0])
    if variant.op != op or variant.capability and (device.index is None or build.kernels_for(device.index) is None):
        return False
    with ops.using(variant.name):
        return variant.declines(ops.Request(op, dtype, device.capability, None, precision, dtype)) is None


def _row(device, what, variant, dtype, test, *arguments):
    """The check that came closest to its limit, or beyond it, over SHAPES."""
    row = {"device": device.name, "what": what, "variant": variant, "dtype": _short(dtype)}
    try:
        checks = [check for shape in SHAPES for check in test(device, dtype, shape, *arguments)]
    except Exception as error:
        return row | {"passed": False, "error": _shown(error)}
    worst = max(checks, key=lambda check: (not check.passed, check.error / check.limit if check.limit else 0))
    return row | {"passed": worst.passed, "check": worst.what, "limit": worst.limit,
                  "relative_error": worst.error if math.isfinite(worst.error) else str(worst.error)}


def _test_variant(device, dtype, shape, variant, kind):
    tokens, n, k, rank = shape
    tokens = min(tokens, variant.tokens or tokens)
    weight, bias = random_layer(kind, dtype, n, k, rank)
    x = random_x(tokens, k, dtype, kind == "int4 unsigned")
    if kind == "awq":
        want = reference.awq_gemv(x, layout.unpack_awq(weight.qweight), weight.wscales.t(), weight.wzeros.t(), bias)
    else:
        spec = reference.linear_weight_only if variant.name == "weight_only" else reference.linear_w4a4
        want = spec(x, replace(weight.logical(), bias=bias))
    out = torch.full((tokens, n), math.nan, dtype=dtype, device=device.name)
    variant.run(x.to(device.name), _moved(weight, device.name), out, bias.to(device.name), False)
    return [Check(f"tokens {tokens}, {k} -> {n}, rank {rank}", relative(out, want), ROUNDED_OFTEN[dtype])]


def _test_kernel(device, dtype, shape, name, kind):
    tokens, n, k, rank = shape
    weight, bias = random_layer(kind, dtype, n, k, rank)
    weight, bias = _moved(weight, device.name), bias.to(device.name)
    if kind == "awq":
        x = random_x(min(tokens, fused.MAX_BATCH), k, dtype).to(device.name)
        out, = fused.awq_gemv(x, [weight.qweight], [weight.wscales], [weight.wzeros], [bias])
        return check_awq(x, weight, bias, out)
    x, rows = random_x(tokens, k, dtype, weight.unsigned).to(device.name), slice(0, tokens)
    quantised = fused.quant_down(x, weight.smooth, weight.proj_down, weight.unsigned)
    if name == "quant_down":
        return check_quant_down(x, weight, quantised, rows)
    out = torch.full((tokens, n), math.nan, dtype=dtype, device=device.name)
    fused.gemm_w4a4(*quantised, weight.qweight, weight.wscales, weight.proj_up, bias, out, weight.unsigned, False)
    return check_gemm(quantised, weight, bias, out, rows)


# ---- as text

def as_text(facts):
    gpus = facts["gpus"]
    rows = [("python", facts["python"]), ("system", facts["system"]),
            ("torch", f"{facts['torch']}, " + (f"CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA")),
            ("driver", facts["driver"])]
    if isinstance(gpus, dict) or not gpus:
        rows.append(("gpu", gpus or "none that torch can use; layers run where torch computes"))
    else:
        rows += [(f"gpu {gpu['index']}", gpu if "error" in gpu else f"{gpu['name']}, {_sm(gpu['capability'])}, "
                  f"{gpu['memory_bytes'] / 2**30:.1f} GiB") for gpu in gpus]
    rows += [(name, found if "error" in found else f"{found['version'] or ''} {found['path'] or ''}".strip())
             for name, found in facts["compilers"].items()]
    cache = facts["cache"]
    rows.append(("cache", cache if "error" in cache else f"{cache['path']}, " + ("" if cache["writable"] else "not ")
                 + f"writable, {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB"))
    lines = ["machine", *(f"  {name:<15}{_or_error(value)}" for name, value in rows), "kernels"]
    built = [line for arch in facts["kernels"] for line in _kernel_lines(arch)]
    lines += built or ["  none: no CUDA GPU to build for"]
    return "\n".join([*lines, "who serves", *_dispatch_lines(facts["dispatch"]), "self-test",
                      *_test_lines(facts["self_test"])])


def _or_error(value):
    return f"unknown: {value['error']}" if isinstance(value, dict) else value


def _kernel_lines(built):
    if "error" in built:
        return [f"  {_or_error(built)}"]
    state = "from the cache" if built["cached"] else f"built in {built['seconds']:.1f} s"
    answer = f"{built['route']}, {state}: {built['paths'][0]}" if built["route"] else "none"
    refused = "not " if built["route"] else ""
    return [f"  {built['arch']:<15}{answer}",
            *(f"{'':<17}{refused}{reason.splitlines()[0]}" for reason in built["reasons"])]


def _dispatch_lines(rows):
    """One entry per answer: dtypes with the same one share it."""
    answers = {}
    for row in rows:
        if "error" in row:
            answers[f"  {row['device']:<8}{_or_error(row)}"] = ((), [])
            continue
        limit = f", up to {row['most_tokens']} rows" if row["most_tokens"] else ""
        why = tuple(f"{'':<10}not {no['variant']}: {no['why']}" for no in row["declined"])
        what = f"{row['op']} {row['precision'] or ''}"
        head = f"  {row['device']:<8}{what:<19}{row['variant']:<12}{row['how']}{limit}"
        answers.setdefault((head, why), (why, []))[1].append(row["dtype"])
    lines = []
    for key, (why, dtypes) in answers.items():
        lines += [key if isinstance(key, str) else f"{key[0]} ({', '.join(dtypes)})", *why]
    return lines


def _test_lines(rows):
    lines = []
    for row in rows:
        if "what" not in row:                                   # the test itself could not start
            lines.append(f"  FAILED {row['device']:<8}{row['error']}")
            continue
        said = row.get("error") or f"{float(row['relative_error']):.1e} of {row['limit']:.1e} ({row['check']})"
        lines.append(f"  {'ok' if row['passed'] else 'FAILED':<7}{row['device']:<8}{row['what']:<27}"
                     f"{row['variant']:<15}{row['dtype']:<10}{said}")
    if all(row["device"] == "cpu" for row in rows):
        lines.append("  On the CPU: the torch path and the reference. No CUDA kernel ran.")
    failed = sum(not row.get("passed") for row in rows)
    return [*lines, f"  {failed} of {len(rows)} failed" if failed else f"  all {len(rows)} passed"]
