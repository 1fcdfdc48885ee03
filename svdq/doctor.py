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
from dataclasses import asdict
from pathlib import Path

import torch

from .kernels import build, check, registry, tuner
from .kernels.errors import printable
from .kernels.tuner import Choice
from .kernels.variant import FLOATS, HALVES, Target, short, sm, usual_dtype
from .kernels.weights import PRECISIONS, example
from .serving import drawback


def describe():
    """All facts as a dict that JSON can hold. "passed" is what the exit code says."""
    gpus = or_error(_gpus)
    usable = [gpu for gpu in gpus if "error" not in gpu] if isinstance(gpus, list) else []
    targets = [Target("rocm", tuple(gpu["capability"]), gpu["index"]) if torch.version.hip else
               Target.gpu(tuple(gpu["capability"]), gpu["index"], gpu["name"]) for gpu in usable]
    targets = targets or [Target("cpu")]
    facts = {
        "python": f"{platform.python_version()} {sys.executable}",
        "system": or_error(platform.platform),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": or_error(nvidia_smi, "driver_version"),
        "gpus": gpus,
        "compilers": {name: or_error(ask) for name, ask in
                      (("nvcc", _nvcc), ("host compiler", _host_compiler), ("ninja", _ninja), ("nvrtc", _nvrtc))},
        "kernels": [row for target in dict.fromkeys(target._replace(index=None) for target in targets)
                    for row in rows_of(or_error(_kernels, target))],
        "broken_variants": registry.BROKEN,
        "files": [row for target in targets for row in rows_of(or_error(_file, target), target)],
        "dispatch": [row for target in targets for row in rows_of(or_error(_dispatch, target), target)],
        "fastest": or_error(_fastest, {target.name for target in targets}),       # what dispatch has asked the tuner
        "self_test": [row for target in targets for row in rows_of(or_error(self_test, target), target)],
    }
    facts["cache"] = or_error(_cache)                              # last: by now it holds what was built
    return facts | {"passed": not registry.BROKEN and all(row.get("passed") for row in facts["self_test"])}


def or_error(ask, *arguments):
    """What `ask` answers, or {"error": what went wrong}."""
    try:
        return ask(*arguments)
    except Exception as error:
        return {"error": one_line(error)}


def one_line(error):
    """An exception in short: its first line, with its class where that says more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = "" if isinstance(error, (OSError, RuntimeError)) and lines else type(error).__name__ + ": " * bool(lines)
    return name + (lines[0][:300] if lines else "")


def rows_of(answer, target=None):
    """The rows of a list, or the one row that an {"error": why} is."""
    if not isinstance(answer, dict):
        return answer
    return [answer if target is None else answer | {"device": target.name}]


# ---- the machine

def _gpus():
    return [{"index": index} | or_error(_gpu, index) for index in range(torch.cuda.device_count())]


def _gpu(index):
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory}


def nvidia_smi(*fields):
    """What nvidia-smi says of the first GPU, the fields joined by commas."""
    return run_tool("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()[0]


def run_tool(*command):
    """stdout of a command, which must be there, end within 20 seconds and say something."""
    path = shutil.which(command[0])
    if path is None:
        raise FileNotFoundError(f"no {command[0]} on the PATH")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, errors="replace", timeout=20)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout.strip()


def _nvcc():
    from torch.utils.cpp_extension import CUDA_HOME  # None in a torch without CUDA
    path = shutil.which(Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else "nvcc")
    if path is None:
        raise FileNotFoundError(f"no nvcc in {CUDA_HOME or 'the PATH'}")
    said = run_tool(path, "--version")
    version = re.search(r"V(\d[\d.]*)", said)
    return {"path": path, "version": version[1] if version else said.splitlines()[-1]}


def _host_compiler():
    if sys.platform == "win32" and (cl := shutil.which("cl")):  # nvcc's, which has no --version
        return {"path": cl, "version": None}
    command = build.host_compiler()
    return {"path": shutil.which(command[0]) or command[0], "version": run_tool(*command, "--version").splitlines()[0]}


def _ninja():
    return {"path": shutil.which("ninja"), "version": run_tool("ninja", "--version")}


def _nvrtc():
    nvrtc = build.load_nvrtc()
    if nvrtc is None:
        raise FileNotFoundError("no NVRTC library beside torch or on the system")
    return {"path": getattr(nvrtc.library, "_name", None), "version": "{}.{}".format(*nvrtc.version)}


def _cache():
    folder = build.cache_folder()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"path": str(folder), "writable": os.access(folder, os.W_OK), "files": len(sizes), "bytes": sum(sizes)}


def _kernels(target):
    """How the libraries for one kind of device came to be, or why not: a row for each. Builds them if need be."""
    rows = []
    for library in registry.libraries(target):
        start, built = time.time(), build.build(library, library.arch(target.capability))
        paths = [Path(path) for path in built.paths]
        rows.append({"arch": built.arch, "library": library.name, "route": built.route, "paths": [str(path) for path in paths],
                     "cached": bool(paths) and all(path.stat().st_mtime < start for path in paths),
                     "seconds": round(built.seconds, 2), "reasons": list(built.reasons),
                     "body": getattr(build.kernels_for(library, None), "body", None) if target.type == "cpu" else None})
    return rows or [{"arch": sm(target.capability) if target.type == "cuda" else target.type, "library": None, "route": None,
                     "paths": [], "cached": False, "seconds": 0.0, "reasons": ["no variant is made for this device"],
                     "body": None}]


# ---- who serves

def dtypes_on(target):
    """Those that models compute in there."""
    return FLOATS if target.type == "cpu" else tuple(HALVES)


def _file(target):
    """Which of the published files is better served on a device."""
    dtype = usual_dtype(target)
    return [{"device": target.name, "take": registry.precision_for(target, dtype), "dtype": short(dtype)}]


def _dispatch(target):
    """Which variant serves on a device, per precision and dtype of x."""
    rows = []
    for precision in PRECISIONS:
        for dtype in dtypes_on(target):
            weight = example(precision, dtype if dtype in HALVES else torch.bfloat16)
            plan = registry.plan(weight, target, dtype, repack=True)
            rows.append({"device": target.name, "precision": precision, "dtype": short(dtype), "variant": plan.variant.name,
                         "how": plan.how, "act_bits": plan.variant.act_bits, "most_tokens": plan.variant.max_rows,
                         "shortfall": plan.shortfall(weight, target),
                         "declined": [{"variant": variant.name, "why": why} for variant, why in plan.declined]})
    return rows


def _fastest(devices):
    """The tuner's choices there."""
    return [asdict(choice) for choice in tuner.choices() if choice.device in devices]


# ---- the self-test: as the one before a variant may serve (check.small), wider and with its figures

def self_test(target, device=None):
    """Every variant that may serve on a device, whether trusted or not, against the specification on the CPU.

    device   where to run it, if not on the target itself
    """
    rows = []
    for variant in registry.VARIANTS:
        for kind in check.kinds_of(variant) if not variant.on_request else ():
            for dtype in dtypes_on(target):
                rules = variant.declines(target, dtype, example(kind.split()[0], dtype if dtype in HALVES else torch.bfloat16))
                if rules is None and (variant.library is None or build.kernels_for(variant.library, target.index) is not None):
                    rows.append({"device": target.name, "what": kind, "variant": variant.name, "dtype": short(dtype)}
                                | _tested(variant, kind, dtype, device or target.name))
    return rows


def _tested(variant, kind, dtype, device):
    try:
        with torch.autocast("cpu", enabled=False):
            worst = check.wide(variant, kind, dtype, device)
    except Exception as error:
        return {"passed": False, "error": one_line(error)}
    return {"passed": worst.passed, "check": worst.what, "limit": worst.limit,
            "relative_error": worst.error if math.isfinite(worst.error) else str(worst.error)}


# ---- as text

def as_text(facts):
    gpus = facts["gpus"]
    rows = [("python", facts["python"]), ("system", facts["system"]),
            ("torch", _torch_in_words(facts)),
            ("driver", facts["driver"])]
    if isinstance(gpus, dict) or not gpus:
        rows.append(("gpu", gpus or "none that torch can use; layers run where torch computes"))
    else:
        rows += [(f"gpu {gpu['index']}", gpu if "error" in gpu else _gpu_in_words(gpu)) for gpu in gpus]
    rows += [(name, found if "error" in found else f"{found['version'] or ''} {found['path'] or ''}".strip())
             for name, found in facts["compilers"].items()]
    cache = facts["cache"]
    rows.append(("cache", cache if "error" in cache else f"{cache['path']}, " + ("" if cache["writable"] else "not ")
                 + f"writable, {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB"))
    lines = ["machine", *(f"  {name:<15}{_unknown(value)}" for name, value in rows), "kernels"]
    lines += [line for row in facts["kernels"] for line in _kernel_lines(row)]
    lines += [f"  BROKEN {name}: {why}" for name, why in facts["broken_variants"].items()]
    lines += ["who serves", *_dispatch_lines(facts["dispatch"]), *_fastest_lines(facts["fastest"])]
    lines += ["self-test", *_test_lines(facts["self_test"])]
    return printable("\n".join(lines), lines=True)             # compilers and drivers colour what they say


def summary(facts):
    """The same in a few lines: what is here, what serves which kind of file and why, whether it is right."""
    gpus, found = facts["gpus"], {name: "error" not in answer for name, answer in facts["compilers"].items()}
    gpus = gpus if isinstance(gpus, list) else [gpus]
    lines = [f"GPU: {_unknown(gpu) if 'error' in gpu else _gpu_in_words(gpu)}" for gpu in gpus]
    lines += [] if gpus else ["GPU: none that torch can use"]
    lines.append(f"torch: {_torch_in_words(facts)}" + (f", driver {_unknown(facts['driver'])}" if gpus else ""))
    lines.append("compilers: " + ", ".join(name if there else f"no {name}" for name, there in found.items()))
    lines += [f"kernels: {_unknown(row)}" if "error" in row else f"kernels: {row['library']} not built: "
              f"{'; '.join(reason.splitlines()[0] for reason in row['reasons'])}"
              for row in facts["kernels"] if "error" in row or row["library"] and not row["route"]]
    lines += [f"kernels: {name} is broken: {why}" for name, why in facts["broken_variants"].items()]
    many = len({row["device"] for row in facts["dispatch"]}) > 1
    best = {(row["device"], row["dtype"]): row["take"] for row in facts["files"] if "error" not in row}
    for row in facts["dispatch"]:
        place = f" on {row['device']}" if many else ""
        if "error" in row:
            lines.append(f"files{place}: {_unknown(row)}")
        elif row["precision"] != "awq" and (row["device"], row["dtype"]) in best:
            slow = row["shortfall"] and f"weight-only, {drawback(row['device'])}, because {row['shortfall']}"
            lines.append(f"{row['precision'].upper()} files{place}: {slow or row['how']}")
    lines += [f"best {f'on {device}' if many else 'here'}: {take.upper()} files" for (device, _), take in best.items()]
    lines.append(f"self-test: {_verdict(facts['self_test'])}")
    lines += [f"  {line.strip()}" for line in _test_lines(facts["self_test"]) if line.startswith("  FAILED")]
    return printable("\n".join(lines), lines=True)


def _torch_in_words(facts):
    return f"{facts['torch']}, " + (f"CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA")


def _gpu_in_words(gpu):
    return f"{gpu['name']}, {sm(gpu['capability'])}, {gpu['memory_bytes'] / 2**30:.1f} GiB"


def _unknown(value):
    return f"unknown: {value['error']}" if isinstance(value, dict) else value


def _kernel_lines(built):
    if "error" in built:
        return [f"  {_unknown(built)}"]
    state = "from the cache" if built["cached"] else f"built in {built['seconds']:.1f} s"
    body = f", {built['body']}" if built["body"] else ""
    answer = f"{built['route']}{body}, {state}: {built['paths'][0]}" if built["route"] else "none"
    refused = "not " if built["route"] else ""
    return [f"  {built['arch']:<9}{built['library'] or '':<14}{answer}",
            *(f"{'':<25}{refused}{reason.splitlines()[0]}" for reason in built["reasons"])]


def _dispatch_lines(rows):
    """One entry per answer: dtypes with the same one share it."""
    answers = {}
    for row in rows:
        if "error" in row:
            answers[f"  {row['device']:<8}{_unknown(row)}"] = ((), [])
            continue
        limit = f", up to {row['most_tokens']} rows" if row["most_tokens"] else ""
        why = tuple(f"{'':<10}not {no['variant']}: {no['why']}" for no in row["declined"])
        head = f"  {row['device']:<8}{row['precision']:<7}{row['variant']:<13}{row['how']}{limit}"
        answers.setdefault((head, why), (why, []))[1].append(row["dtype"])
    lines = []
    for key, (why, dtypes) in answers.items():
        lines += [key if isinstance(key, str) else f"{key[0]} ({', '.join(dtypes)})", *why]
    return lines


def _fastest_lines(choices):
    if isinstance(choices, dict):
        return [f"  fastest: {_unknown(choices)}"]
    return [f"  {choice['device']:<8}fastest of {choice['rivals']}: {Choice(**choice)}" for choice in choices]


def _test_lines(rows):
    lines = []
    for row in rows:
        if "what" not in row:                                   # the test itself could not start
            lines.append(f"  FAILED {row['device']:<8}{row['error']}")
            continue
        said = row.get("error") or f"{float(row['relative_error']):.1e} of {row['limit']:.1e} ({row['check']})"
        lines.append(f"  {'ok' if row['passed'] else 'FAILED':<7}{row['device']:<8}{row['what']:<16}"
                     f"{row['variant']:<15}{row['dtype']:<10}{said}")
    if all(row["device"] == "cpu" for row in rows):
        lines.append("  On the CPU: no CUDA kernel ran.")
    return [*lines, f"  {_verdict(rows)}"]


def _verdict(rows):
    failed = sum(not row.get("passed") for row in rows)
    return f"{failed} of {len(rows)} failed" if failed else f"all {len(rows)} passed"
