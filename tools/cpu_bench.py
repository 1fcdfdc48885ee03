#!/usr/bin/env python3
"""How fast the linears of FLUX run on this CPU, each variant beside F.linear, an earlier commit's and ggml's.

    python3 tools/cpu_bench.py [--results FILE] [--before REVISION] [--ggml FOLDER] [--threads 1 2] [--layers NAME ...]
                               [--tokens N ...]

A line is a layer, a number of tokens and a number of threads. All candidates of a line run in one process and in turn; a
figure is the median wall clock of 5 rounds, of up to 25 where they are short, of 3 at 4608 tokens. x is fp32, as ComfyUI has it
on a CPU. A candidate's weights have left the cache when its turn comes again, as they have in a model.

fp32, bf16   F.linear with the dequantised weight; bf16 up to 512 tokens where the CPU has no bf16 hardware
before       the layer as the commit REVISION runs it, which git brings: `--before c423482`
NAME         every variant of svdq/kernels that takes the layer here; checked first, and not timed if it is wrong
ggml         q4_0 as it lies, q4_0 repacked, q8_0: the product alone, without bias and low-rank branch

4608 tokens are for fp32, before and NAME alone. With --results every line is saved, and the next run with the same FILE
measures what is missing there: lines, or lines that lack a candidate. Prints each line when it is done, then all as a table.

FOLDER holds the shared libraries of ggml, for instance those of a package of the index, built here for this CPU:

    pip download --no-deps --no-binary llama-cpp-python -d SOURCE llama-cpp-python==0.3.36
    tar xzf SOURCE/*.tar.gz -C SOURCE
    cmake -S SOURCE/*/vendor/llama.cpp -B FOLDER -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF
    cmake --build FOLDER --target ggml
"""

import argparse
import ctypes
import importlib
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
parent = types.ModuleType("svdq_pack")          # the pack's folder name is not ours to assume, so name its package here
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
if __name__ == "__main__":                      # with any Python; what follows wants ComfyUI's
    from svdq_pack.workflows.headless import environment
    environment.enter(__file__)

import torch  # noqa: E402

from svdq_pack.svdq import bench  # noqa: E402
from svdq_pack.svdq.kernels import check, registry, weights  # noqa: E402
from svdq_pack.svdq.kernels.variant import Target  # noqa: E402

# name -> K, N, kind of check.KINDS
LAYERS = bench.LAYERS | {"out nvfp4": (3072, 3072, "nvfp4"), "modulation, double": (3072, 18432, "awq"),
                         "modulation, single": (3072, 9216, "awq")}
TOKENS = (1, 64, 512, 1280, 4608)
MANY = 4608                             # tokens from which on only fp32 and the pack are timed, and less often
BF16_TOKENS = 512                       # the most for bf16 on a CPU that has to emulate it
RANK = 32
ROUNDS, ROUNDS_OF_MANY, MOST_ROUNDS = 5, 3, 25
SECONDS = 0.2                           # a candidate has more rounds than ROUNDS while its own take no longer
SHORT = 0.1                             # seconds of a run whose first time is not like the others
CHECKED_ROWS = 64                       # of x
CPU = Target("cpu")
FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON, to go on with and to keep")
    parser.add_argument("--before", metavar="REVISION", help="a commit of this repository")
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="of ggml's shared libraries")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME", help=", ".join(LAYERS))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    options = parser.parse_args()
    layers = {name: LAYERS[name] for name in options.layers}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        candidates, about = [dense("fp32", torch.float32), dense("bf16", torch.bfloat16)], machine()
        try:
            if options.before:
                candidates.append(before(options.before, Path(scratch)))
            candidates += ours()
            if options.ggml:
                ggml = Ggml(options.ggml)
                candidates += ggml.candidates()
                about["ggml"] = ggml.about()
            results = Results(options.results, about | {"before": options.before}, partial(peaks, Path(scratch)))
        except Problem as error:
            sys.exit(f"cpu_bench.py: {error}")
        print(json.dumps(results.machine), flush=True)
        measure(layers, options.tokens, options.threads, candidates, results)
    print(as_markdown(results.machine, results.lines))


class Problem(Exception):
    """What keeps the whole run from its start, for people."""


# ---- candidates

class Data(NamedTuple):
    """One layer. dense and dense_bias are the fp32 layer that computes the same."""
    weight: object
    bias: torch.Tensor
    dense: torch.Tensor
    dense_bias: torch.Tensor

    @classmethod
    def random(cls, k, n, kind):
        weight, bias = check.random_weight(kind, torch.bfloat16, n, k, RANK)
        dense, shift = weights.dequantize(weight)
        return cls(weight, bias.float(), dense, bias.float() + shift)


class Candidate(NamedTuple):
    """Something that can run a layer.

    name    a column
    takes   (precision, tokens) -> whether it is timed there
    load    Data -> work; work(x, threads) -> run; run() -> out [tokens, N], or a function that returns it
    right   (x, Data, out) -> [check.Check] of some rows, which it must pass to be timed; None for a baseline
    """
    name: str
    takes: object
    load: object
    right: object = None


def dense(name, dtype):
    """F.linear in a dtype."""
    hardware = dtype == torch.float32 or bf16_hardware()

    def takes(precision, tokens):
        return dtype == torch.float32 or tokens < MANY and (hardware or tokens <= BF16_TOKENS)

    def load(data):
        weight, bias = data.dense.to(dtype), data.dense_bias.to(dtype)
        return lambda x, threads: partial(torch.nn.functional.linear, x.to(dtype), weight, bias)

    return Candidate(name, takes, load)


def bf16_hardware():
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def ours():
    """A Candidate of every variant that can run something here, the specification apart."""
    found = []
    for variant, precisions in serving().items():
        if variant.last_resort or registry.trusted(variant, CPU):
            found.append(Candidate(label(variant), partial(_fits, variant, precisions), partial(_packed, variant),
                                   partial(_right, variant)))
        else:
            print(f"{variant.name} cannot be used here; `python svdq doctor` says why", flush=True)
    return found


@cache
def serving():
    """{variant: the precisions it takes here}"""
    takes = {variant: {precision for precision in weights.PRECISIONS if variant.meant_for(CPU) and variant.declines(
        CPU, torch.float32, weights.example(precision)) is None} for variant in registry.VARIANTS}
    return {variant: precisions for variant, precisions in takes.items() if precisions and variant.name != "reference"}


def label(variant):
    """Its name, with its activations where another one of this name takes the same weights."""
    twins = [other for other, precisions in serving().items() if other.name == variant.name
             and precisions & serving().get(variant, set())]
    return f"{variant.name} {variant.activations or 'exact'}" if len(twins) > 1 else variant.name


def _fits(variant, precisions, precision, tokens):
    return precision in precisions and (variant.max_rows is None or tokens <= variant.max_rows)


def _packed(variant, data):
    packed = data.weight if variant.layout is None else variant.layout.pack(data.weight)
    return lambda x, threads: partial(_run, variant, x, packed, data.bias)


def _run(who, x, weight, bias):
    out = torch.empty(len(x), len(bias))
    who.run(x, weight, out, bias)
    return out


def _right(variant, x, data, out):
    return check.check_linear(variant, x, data.weight, data.bias, out)


def served(precision, tokens):
    """The label of the variant that the pack itself picks."""
    plan = registry.plan(weights.example(precision), CPU, torch.float32, repack=True)
    return label(plan.for_rows(tokens).variant)


def before(revision, folder):
    """What the pack of another commit picks: its package svdq runs beside this one, under names of its own."""
    archive = subprocess.run(["git", "archive", revision, "svdq"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise Problem(f"--before {revision}: {archive.stderr.decode(errors='replace').strip()}. Needs a commit of {ROOT}.")
    tarfile.open(fileobj=io.BytesIO(archive.stdout)).extractall(folder, filter="data")
    for path in (folder / "svdq").rglob("*.py"):                # an operator registered twice would be the later one's
        said = path.read_text(encoding="utf-8")
        path.write_text(said.replace("svdq::", "svdq_before::").replace("torch.ops.svdq.", "torch.ops.svdq_before."),
                        encoding="utf-8")
    package = types.ModuleType("svdq_before")
    package.__path__ = [str(folder / "svdq")]
    sys.modules["svdq_before"] = package
    theirs, classes, variants = (importlib.import_module(f"svdq_before.kernels.{module}")
                                 for module in ("registry", "weights", "variant"))

    def load(data):
        weight = getattr(classes, type(data.weight).__name__)(**vars(data.weight))      # the file's order is the same
        packed = theirs.pack(weight, torch.float32)
        plan = theirs.plan(packed, variants.Target("cpu"), torch.float32)
        return lambda x, threads: partial(_run, plan, x, packed, data.bias)

    return Candidate("before", lambda precision, tokens: True, load)


# ---- ggml

class Ggml:
    """ggml's CPU backend, by its C interface."""
    Q4_0, Q8_0 = 2, 8                   # enum ggml_type, which files hold: it does not change
    F32 = 0

    class Init(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    class Feature(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]

    def __init__(self, folder):
        libraries = [ctypes.CDLL(str(self._path(folder, part)), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")]
        here, size, number, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
        for name, result, *arguments in (
                ("ggml_init", here, self.Init), ("ggml_free", None, here), ("ggml_version", ctypes.c_char_p),
                ("ggml_tensor_overhead", size), ("ggml_graph_overhead", size), ("ggml_nbytes", size, here),
                ("ggml_new_tensor_2d", here, here, number, long, long), ("ggml_mul_mat", here, here, here, here),
                ("ggml_new_graph", here, here), ("ggml_build_forward_expand", None, here, here),
                ("ggml_quantize_chunk", size, number, here, here, long, long, long, here),
                ("ggml_backend_alloc_ctx_tensors_from_buft", here, here, here), ("ggml_backend_buffer_free", None, here),
                ("ggml_backend_tensor_set", None, here, here, size, size),
                ("ggml_backend_tensor_get", None, here, here, size, size),
                ("ggml_backend_cpu_buffer_type", here), ("ggml_backend_buft_name", ctypes.c_char_p, here),
                ("ggml_backend_cpu_init", here), ("ggml_backend_cpu_set_n_threads", None, here, number),
                ("ggml_backend_graph_compute", number, here, here), ("ggml_backend_cpu_reg", here),
                ("ggml_backend_reg_dev_get", here, here, size),
                ("ggml_backend_reg_get_proc_address", here, here, ctypes.c_char_p)):
            library = next((library for library in libraries if hasattr(library, name)), None)
            if library is None:
                raise Problem(f"--ggml {folder}: its libraries have no {name}. Needs a ggml of 2026.")
            function = library[name]                            # a fresh one: its types are nobody else's
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend, self.plain = self.backend_cpu_init(), self.backend_cpu_buffer_type()
        self.registered = self.backend_cpu_reg()
        self.repacked = self._repacked()

    @staticmethod
    def _path(folder, part):
        found = sorted(path for path in folder.rglob(f"*ggml-{part}*")
                       if path.is_file() and any(end in path.name for end in (".so", ".dylib", ".dll")))
        if not found:
            raise Problem(f"--ggml {folder}: no libggml-{part} there. Needs the folder that ggml was built in, with shared "
                          "libraries; --help says how.")
        return found[0]

    def _asked(self, name, result, *arguments):
        """What the function of the backend with this name returns, or None without one."""
        address = self.backend_reg_get_proc_address(self.registered, name)
        return address and ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * len(arguments))(address)(*arguments)

    def _repacked(self):
        """The buffer type whose weights are repacked, or None."""
        types = self._asked(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p),
                            self.backend_reg_dev_get(self.registered, 0))
        found = []
        while types and types[len(found)]:
            found.append(types[len(found)])
        return next((kind for kind in found if self.backend_buft_name(kind) == b"CPU_REPACK"), None)

    def about(self):
        """Its version, and what it was built with."""
        features = self._asked(b"ggml_backend_get_features", ctypes.POINTER(self.Feature), self.registered)
        said = []
        while features and features[len(said)].name:
            said.append(features[len(said)].name.decode())
        return " ".join([self.version().decode(), *said])

    def candidates(self):
        kinds = [("ggml q4_0", self.Q4_0, self.plain), ("ggml q4_0 repacked", self.Q4_0, self.repacked),
                 ("ggml q8_0", self.Q8_0, self.plain)]
        return [Candidate(name, self._takes, partial(self._load, kind, buft)) for name, kind, buft in kinds if buft]

    @staticmethod
    def _takes(precision, tokens):
        return precision != "nvfp4" and tokens < MANY

    def _load(self, kind, buft, data):
        n, k = data.dense.shape
        held = Held(self)
        weight = self.new_tensor_2d(held.context, kind, k, n)
        held.allocate(buft)
        bytes = ctypes.create_string_buffer(self.nbytes(weight))
        self.quantize_chunk(kind, data.dense.data_ptr(), bytes, 0, n, k, None)
        self.backend_tensor_set(weight, bytes, 0, len(bytes))
        return partial(self._work, held, weight, n, data.dense_bias)

    def _work(self, weight_held, weight, n, bias, x, threads):
        held = Held(self)
        inputs = self.new_tensor_2d(held.context, self.F32, x.shape[1], len(x))
        outputs, graph = self.mul_mat(held.context, weight, inputs), self.new_graph(held.context)
        self.build_forward_expand(graph, outputs)
        held.allocate(self.plain)
        self.backend_tensor_set(inputs, x.data_ptr(), 0, x.nbytes)

        def read():
            out = torch.empty(len(x), n)
            self.backend_tensor_get(outputs, out.data_ptr(), 0, out.nbytes)
            return out + bias

        def run(held=(held, weight_held)):                      # memory lives as long as what uses it
            self.backend_cpu_set_n_threads(self.backend, threads)
            status = self.backend_graph_compute(self.backend, graph)
            if status:
                raise RuntimeError(f"ggml_backend_graph_compute returns {status}")
            return read

        return run


class Held:
    """A context of ggml and the memory of its tensors, given back with this."""

    def __init__(self, ggml):
        self.ggml, self.buffer = ggml, None
        self.context = ggml.init(ggml.Init(8 * ggml.tensor_overhead() + ggml.graph_overhead(), None, True))

    def allocate(self, buft):
        self.buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(self.context, buft)

    def __del__(self):
        if self.buffer:
            self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.context)


# ---- checking and timing

def measure(layers, tokens, threads, candidates, results):
    """Adds to results the lines that they lack. layers: as LAYERS."""
    for name, (k, n, kind) in layers.items():
        precision, lines = kind.split()[0], []
        for m in tokens if precision != "awq" else [m for m in tokens if m == 1]:
            fit = [candidate for candidate in candidates if candidate.takes(precision, m)]
            lines += [(m, count, fit) for count in threads if not results.have(name, m, count, fit)]
        if not lines:
            continue
        data, works = Data.random(k, n, kind), {}
        for m, count, fit in lines:
            torch.set_num_threads(count)
            for candidate in fit:
                if candidate.name not in works:
                    works[candidate.name] = candidate.load(data)
            line = {"layer": name, "K": k, "N": n, "tokens": m, "threads": count, "serves": served(precision, m)}
            line |= timed(check.random_x(m, k, torch.float32, data.weight.unsigned), data, fit, works, count)
            results.add(line)
            print(as_text(line), flush=True)


def timed(x, data, candidates, works, threads):
    """{"ms", "rounds", "errors", "wrong"} by candidate: medians, of how many, relative errors, and why one was not timed."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).long()
    exact = check.wanted(next(variant for variant in registry.VARIANTS if variant.last_resort), x[rows], data.weight, data.bias)
    runs, rounds, errors, wrong = {}, {}, {}, {}
    for candidate in candidates:
        try:
            run = works[candidate.name](x, threads)
            seconds, out = clocked(run)
            if seconds < SHORT:
                seconds, out = clocked(run)
            out = (out if isinstance(out, torch.Tensor) else out())[rows]
            errors[candidate.name] = check.relative(out, exact)
            checks = [] if candidate.right is None else candidate.right(x[rows], data, out)
            failed = [str(one) for one in checks if not one.passed]
            if failed:
                raise RuntimeError("; ".join(failed))
            more = sorted((ROUNDS, int(SECONDS / seconds), MOST_ROUNDS))[1]
            runs[candidate.name], rounds[candidate.name] = run, ROUNDS_OF_MANY if len(x) >= MANY else more
        except Exception as error:                              # one figure lost, and it says so
            wrong[candidate.name] = str(error) or type(error).__name__
            errors.pop(candidate.name, None)
    times = {name: [] for name in runs}
    for turn in range(max(rounds.values(), default=0)):
        for name, run in runs.items():
            if turn < rounds[name]:
                times[name].append(clocked(run)[0])
    return {"ms": {name: 1000 * statistics.median(taken) for name, taken in times.items()}, "rounds": rounds, "errors": errors,
            "wrong": wrong}


def clocked(run):
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


class Results:
    """The lines so far, in a file if there is one.

    machine   {...}: what must be the same for lines to stand in one table; "peaks" are added to it, by `measured()` if the file
              has none
    """

    def __init__(self, path, machine, measured=dict):
        self.path, self.lines = path, []
        kept = {}
        if path is not None and path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                self.lines, theirs = kept["lines"], kept["machine"]
            except (ValueError, KeyError, TypeError) as error:
                raise Problem(f"{path} holds no results ({type(error).__name__}: {error}). Give a new name.") from error
            other = [f"{key} {theirs.get(key)}, here {machine.get(key)}" for key in sorted({*theirs, *machine} - {"peaks"})
                     if theirs.get(key) != machine.get(key)]
            if other:
                raise Problem(f"{path} has figures of something else: {'; '.join(other)}. Give a new name, or the same again.")
        self.machine = machine | {"peaks": kept["machine"]["peaks"] if kept else measured()}

    def have(self, layer, tokens, threads, candidates):
        """Whether there is such a line with all these candidates."""
        known = next((line for line in self.lines if _key(line) == (layer, tokens, threads)), None)
        return known is not None and {candidate.name for candidate in candidates} <= {*known["ms"], *known["wrong"]}

    def add(self, line):
        self.lines = [known for known in self.lines if _key(known) != _key(line)] + [line]
        if self.path is not None:
            scratch = self.path.with_name(self.path.name + ".part")
            scratch.write_text(json.dumps({"machine": self.machine, "lines": self.lines}, indent=1), encoding="utf-8")
            scratch.replace(self.path)


def _key(line):
    return line["layer"], line["tokens"], line["threads"]


# ---- where

def machine():
    """What the figures depend on, without a date: a run may go on tomorrow."""
    said = ""
    if Path("/proc/cpuinfo").exists():
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in said.splitlines() if ":" in line]))
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {"cpu": fields.get("model name") or platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(), "flags": [flag for flag in FLAGS if flag in flags],
            "bf16 hardware": bf16_hardware(), "torch": torch.__version__, "commit": commit()}


def commit():
    """That of this folder, "-dirty" with changes; None where there is no git."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"], cwd=ROOT, text=True,
                          capture_output=True)
    return done.stdout.strip() or None


# Registers alone: 10 sums in flight, so that neither latency nor memory is what is measured.
PEAKS = r"""
#include <immintrin.h>
#define KEEP(v) asm volatile("" : "+v"(v))      // as if it were read and changed here: nothing before it can be left out
#define TEN _Pragma("GCC unroll 10") for (int i = 0; i < 10; i++)
#define PEAK(name, V, zero, macs, step)                 \
  extern "C" long name(long rounds) {                   \
    V a = zero, b = zero, ones = zero, s[10];           \
    TEN s[i] = zero;                                    \
    KEEP(b); KEEP(ones);                                \
    for (long r = 0; r < rounds; r++)                   \
      TEN { KEEP(a); V sum = s[i]; s[i] = step; }       \
    TEN KEEP(s[i]);                                     \
    (void)ones;                                         \
    return rounds * 10 * macs;                          \
  }
#if defined(__AVX512F__)
PEAK(fp32, __m512, _mm512_setzero_ps(), 16, _mm512_fmadd_ps(a, b, sum))
#elif defined(__FMA__)
PEAK(fp32, __m256, _mm256_setzero_ps(), 8, _mm256_fmadd_ps(a, b, sum))
#endif
#if defined(__AVX512BW__)
PEAK(int16, __m512i, _mm512_setzero_si512(), 64, _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b)))
PEAK(int32, __m512i, _mm512_setzero_si512(), 64, _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), ones)))
#elif defined(__AVX2__)
PEAK(int16, __m256i, _mm256_setzero_si256(), 32, _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)))
PEAK(int32, __m256i, _mm256_setzero_si256(), 32, _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones)))
#endif
#if defined(__AVX512VNNI__)
PEAK(vnni, __m512i, _mm512_setzero_si512(), 64, _mm512_dpbusd_epi32(sum, a, b))
#elif defined(__AVXVNNI__)
PEAK(vnni, __m256i, _mm256_setzero_si256(), 32, _mm256_dpbusd_avx_epi32(sum, a, b))
#endif
"""
INSTRUCTIONS = {"fp32": "fp32 FMA", "int16": "int8 vpmaddubsw + vpaddw", "int32": "int8 vpmaddubsw + vpmaddwd + vpaddd",
                "vnni": "int8 vpdpbusd"}


def peaks(folder):
    """{instructions: GMAC/s of one core}, or {"not measured": why}."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        return {"not measured": "no g++ here"}
    source, library = folder / "peaks.cpp", folder / "peaks.so"
    source.write_text(PEAKS, encoding="utf-8")
    done = subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)],
                          capture_output=True, text=True)
    if done.returncode:
        return {"not measured": f"{compiler}: {(done.stderr.strip().splitlines() or ['failed'])[0]}"}
    loaded, found = ctypes.CDLL(str(library)), {}
    for name, words in INSTRUCTIONS.items():
        if hasattr(loaded, name):
            loop = loaded[name]
            loop.restype, loop.argtypes = ctypes.c_long, [ctypes.c_long]
            done = [clocked(partial(loop, 1 << 20)) for _ in range(20)]
            found[words] = round(max(macs / seconds for seconds, macs in done) / 1e9, 1)
    return found


def int8_peak(machine):
    """The highest of those measured, GMAC/s of one core, or None."""
    return max((rate for words, rate in machine["peaks"].items() if words.startswith("int8")), default=None)


# ---- as text

def rate(line):
    """GMAC/s of the variant that serves, None where it was not timed."""
    ms = line["ms"].get(line["serves"])
    return line["tokens"] * line["K"] * line["N"] / ms / 1e6 if ms else None


def as_text(line):
    fp32 = line["ms"].get("fp32", math.nan)
    said = [f"{name} {ms:.2f} ms ({ms / fp32:.2f}, error {line['errors'][name]:.1e})" for name, ms in line["ms"].items()]
    said += [f"{name} WRONG: {why}" for name, why in line["wrong"].items()]
    return f"{line['layer']}, {line['tokens']} tokens, {line['threads']} threads: " + "; ".join(said)


def as_markdown(machine, lines):
    """Milliseconds of fp32, and of the others how many times as long they take."""
    names = list(dict.fromkeys(name for line in lines for part in ("ms", "wrong") for name in line[part] if name != "fp32"))
    peak = int8_peak(machine)
    rows = [["layer", "tokens", "threads", "fp32, ms", *names, "GMAC/s", "of int8"]]
    for line in sorted(lines, key=lambda line: (list(LAYERS).index(line["layer"]) if line["layer"] in LAYERS else -1,
                                                line["tokens"], line["threads"])):
        ms, fast = line["ms"], rate(line)
        fp32 = ms.get("fp32", math.nan)
        rows.append([line["layer"], str(line["tokens"]), str(line["threads"]), f"{fp32:.2f}",
                     *("WRONG" if name in line["wrong"] else _short(ms[name] / fp32) if name in ms else "" for name in names),
                     f"{fast:.1f}" if fast else "", f"{fast / peak / line['threads']:.0%}" if fast and peak else ""])
    rows.insert(1, ["---"] * len(rows[0]))
    errors = [f"{name} {max(found):.1e}" for name in ["fp32", *names]
              if (found := [line["errors"][name] for line in lines if name in line["errors"]])]
    wrong = [f"WRONG: {', '.join(map(str, _key(line)))}, {name}: {why}"
             for line in lines for name, why in line["wrong"].items()]
    about = ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in machine.items()
                      if key != "peaks" and value is not None)
    return "\n".join([
        f"{about}.", "",
        "Peaks of one core, GMAC/s: " + ", ".join(f"{words} {rate}" for words, rate in machine["peaks"].items()) + ".", "",
        "Candidates: their time over that of fp32 in the same line, below 1 is faster. GMAC/s: of the variant that the pack "
        "picks, and their share of the highest int8 peak.", "",
        *("| " + " | ".join(row) + " |" for row in rows), "",
        f"Largest relative error against exact activations: {', '.join(errors)}.", *wrong])


def _short(ratio):
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


if __name__ == "__main__":
    main()
