"""Which of several variants that do the same job is the fastest: only the user's GPU can tell, so they are timed on it, once.

Rivals are variants with the same `rivals`; the registry asks for their order when a plan is to have one of them. On a GPU they
run the MLP of a block of FLUX as blocks do, with all that they fuse, one after the other in each lap, in two seconds at most.
One that is wrong there serves no more, though it passed its self-test on small shapes. The order is remembered in the cache
(cache.py) under a name that hashes what it depends on: the GPU, its driver, torch, the binaries; `svdq bench` times again.
Where nothing can be timed, the order of their `preference` serves. Within a process the answer never changes, so that layers
agree.

Test: tests/unit/test_tuner.py
"""

import ctypes
import hashlib
import json
import logging
import math
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import build, check, epilogues
from .cache import store, stored
from .errors import command, printable
from .prologues import Modulated
from .variant import sm, usual_dtype

log = logging.getLogger(__name__)
SECONDS = 2.0                           # for all of it, operands and warm-up included
SHAPE = (4096, 3072, 12288, 32)         # tokens, width, width of the hidden, rank: of a picture of 1024 x 1024 in FLUX
LAPS, LEAST = 20, 3                     # laps of a race, and with how many it counts
FEW = 128                               # tokens of a first run, which says whether one of all may be tried
CHECKED_ROWS, CHECKED_COLUMNS = 64, 1024        # rows that are compared, spread over all; columns at a time
LEFT_BEHIND = 2.0                       # times the fastest: runs no further lap
EQUAL = 1.01                            # times the fastest: noise, so the preferred serves
FORMAT = 2                              # of what is remembered


@dataclass(frozen=True)
class Choice:
    """The order of rivals on a GPU.

    order      their names, the one to serve first
    how        "timed", "remembered", or "default"; `why` then says why nothing was timed
    us         {name: microseconds, the median} of those that were timed
    wrong      {name: what is wrong at this shape}: may not serve
    slow       {name: words}: not timed to the end
    seconds    that it took
    """
    rivals: str
    device: str
    order: tuple
    how: str
    why: str = ""
    us: dict = field(default_factory=dict)
    wrong: dict = field(default_factory=dict)
    slow: dict = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self):
        """For people: "w4a4_fp16n 812 us, w4a4_sm80 1034 us; timed"."""
        said = [f"{name} {self.us[name]:.0f} us" if name in self.us else name for name in self.order]
        said += [f"{name} {why}" for name, why in self.slow.items() if name not in self.us]
        said += [f"{name} WRONG: {why}" for name, why in self.wrong.items()]
        return f"{', '.join(said)}; {self.how}{self.why and f', because {self.why}'}"


_choices, _asking, _anew = {}, threading.RLock(), False


def choose(rivals, target):
    """The Choice among rivals on a device, the same in all of a process; who asks meanwhile waits. Never raises.

    rivals   two Variants or more that may serve there, the preferred first
    target   Target with an index
    """
    place = *rivals, target
    if place not in _choices:                   # no lock when there is an answer: torch.compile can read a dict
        if torch.compiler.is_compiling():
            _choices[place] = _default(rivals, target, "it was first asked for inside torch.compile")
        else:
            with _asking:
                if place not in _choices:
                    _choices[place] = _first_choice(rivals, target)
    return _choices[place]


def choices():
    """The Choices of this process."""
    return list(_choices.values())


def forget():
    """Time again what is asked from now on, whatever is remembered. For programs that have made no plan yet."""
    global _anew
    with _asking:
        _choices.clear()
        _anew = True


def _default(rivals, target, why="", wrong=()):
    return Choice(rivals[0].rivals, target.name, tuple(v.name for v in rivals if v.name not in wrong), "default", why,
                  wrong=dict(wrong))


def _first_choice(rivals, target):
    wrong = {}
    try:
        key = _key(rivals, target)
        path = build.cache_folder() / f"tuned_{key['rivals']}_{sm(target.capability)}_{_digest(key)}.json"
        choice = None if _anew else _read(path, key, target)
        if choice is None:
            choice = _timed(rivals, target, wrong)
            _write(path, key, choice)
    except Exception as error:                  # of whatever kind: what cannot be timed can still serve
        log.debug("SVDQ: timing %s", rivals[0].rivals, exc_info=True)
        said = printable(error).strip().splitlines()
        choice = _default(rivals, target, said[0][:200] if said else type(error).__name__, wrong)
    log.info("SVDQ: fastest on %s: %s", target.name, choice)
    for name, why in choice.wrong.items():
        log.warning("SVDQ: %s is wrong on %s (%s), so another variant serves. Please report this with the output of `%s`", name,
                    target.name, why, command("doctor"))
    return choice


# ---- timing

class NotTimed(Exception):
    """Nothing that could be compared came out."""


class Watch:
    """The clock, and how long runs take on a GPU by its events."""

    def __init__(self, index):
        self.index = index
        torch.cuda.synchronize(index)           # what others left to do is no part of it

    def now(self):
        """Seconds."""
        return time.perf_counter()

    def times(self, runs):
        """The seconds of each, run in this order. The first runs twice: while it does, the others are queued."""
        runs[0]()
        events = []
        for run in runs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.index)
        return [start.elapsed_time(end) / 1000 for start, end in events]


def _timed(rivals, target, wrong):
    if torch.cuda.is_current_stream_capturing():
        raise NotTimed("a CUDA graph is being captured")
    with (torch.cuda.device(target.index), torch.no_grad(), torch.autocast("cuda", enabled=False),
          torch.autocast("cpu", enabled=False)):
        return race(rivals, target, Watch(target.index), wrong)


class MLP:
    """What rivals run, as a block does: out = residual + gate * second(gelu(first(LayerNorm(x) * (1 + scale) + shift))).

    kinds    of the two weights, see check.py
    Tensors are random. `x` is a Modulated; `hidden`, what stands between the layers, takes numbers of variants without `feeds`.
    """

    def __init__(self, kinds, dtype, device):
        tokens, width, wide, rank = SHAPE
        self.weights, self.biases = zip(*(check.random_weight(kind, dtype, n, k, rank, device) for kind, n, k in zip(
            kinds, (wide, width), (width, wide))))
        self.x = check.random_modulated(tokens, width, dtype, device=device)
        self.gated = check.random_epilogue(epilogues.Gated, tokens, width, dtype, device)
        self.hidden, self.out = (torch.empty(tokens, n, dtype=dtype, device=device) for n in (wide, width))
        self.rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).long()

    def packed(self, variant):
        """The two weights as a variant reads them."""
        return [weight if variant.layout is None else variant.layout.pack(weight) for weight in self.weights]

    def run(self, variant, weights, tokens=None):
        """`out` of all tokens, or of the first of them, by a variant that packed the weights."""
        part = slice(tokens)
        x, hidden, gated = self._modulated(part), self.hidden[part], self._gated(part, slice(None))
        prepared, = variant.prepared([(x, weights[0])])
        x = x.of() if prepared is None else x
        fed, prepared = variant.fed(x, weights[0], self.biases[0], weights[1], prepared)
        if fed is None:
            variant.run(x, weights[0], hidden, self.biases[0], epilogue=epilogues.Gelu(), prepared=prepared)
        variant.run(hidden, weights[1], self.out[part], self.biases[1], epilogue=gated, prepared=fed)

    def problem(self, variant, weights):
        """What is wrong with `out` as a run left it, which was all NaN before, or None. Rows of either layer are compared with
        the reference: the first one's as numbers, which `hidden` then has, the second one's with these as its input."""
        variant.run(self.x, weights[0], self.hidden.fill_(math.nan), self.biases[0], epilogue=epilogues.Gelu())
        rows = self.rows
        return (self._problem(variant, 0, self._modulated(rows).of(), self.hidden, lambda columns: epilogues.Gelu())
                or self._problem(variant, 1, self.hidden[rows], self.out, lambda columns: self._gated(rows, columns)))

    def _problem(self, variant, i, x, out, epilogue):
        name, weight, bias = ("first", "second")[i], self.weights[i], self.biases[i]
        if not bool(out.isfinite().all()):
            return f"{name} layer: leaves numbers that are not finite"
        for start in range(0, out.shape[1], CHECKED_COLUMNS):   # what is wrong in a few columns shall not drown in the others
            part = slice(start, min(start + CHECKED_COLUMNS, out.shape[1]))
            for one in check.check_linear(variant, x, weight.cut(part.start, part.stop), bias[part], out[self.rows, part],
                                          epilogue(part)):
                if not one.passed:
                    return (f"{name} layer: {one}, tokens {out.shape[0]}, {x.shape[1]} -> {out.shape[1]}, columns {part.start} "
                            f"to {part.stop}")
        return None

    def _modulated(self, rows):
        return Modulated(self.x.x[rows], self.x.scale, self.x.shift)

    def _gated(self, rows, columns):
        return epilogues.Gated(self.gated.residual[rows, columns], self.gated.gate[columns])


def race(rivals, target, watch, wrong, device=None):
    """The Choice by times. Raises NotTimed, and what torch raises where there is no memory.

    watch    see Watch
    wrong    {} that takes those that are wrong, also where it raises
    device   where to run them, if not on the target itself
    """
    start, device = watch.now(), device or target.name
    end, kinds = start + SECONDS, check.kinds_of(rivals[0])
    mlp = MLP((kinds[0], kinds[:2][-1]), usual_dtype(target), device)      # signed, then unsigned, as INT4 files have them
    runs, first, lap, slow = {}, {}, 0.0, {}

    for variant in rivals:
        try:
            weights = mlp.packed(variant)

            def run(tokens=None, variant=variant, weights=weights):
                mlp.run(variant, weights, tokens)

            most = watch.times([lambda run=run: run(FEW)])[0] * math.ceil(SHAPE[0] / FEW)
            if most > (end - watch.now()) / 4:
                slow[variant.name] = f"would take up to {most:.1f} s a run"
                continue
            mlp.out.fill_(math.nan)
            run()
            problem = mlp.problem(variant, weights)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:              # a launch that the driver refuses
            problem = f"{type(error).__name__}: {error}"
        if problem:
            wrong[variant.name] = problem
            continue
        runs[variant], first[variant], lap = run, mlp.out[mlp.rows].clone(), lap + 2 * most

    times, racing = {variant: [] for variant in runs}, list(runs)
    for turn in range(LAPS if racing else 0):
        if watch.now() + lap > end:
            break
        at = turn % len(racing)
        racing = [*racing[at:], *racing[:at]]
        for variant, seconds in zip(racing, watch.times([runs[variant] for variant in racing])):
            times[variant].append(seconds)
        best = {variant: min(times[variant]) for variant in racing}
        fastest = min(best.values())
        slow |= {variant.name: f"is {best[variant] / fastest:.1f} times as slow" for variant in racing
                 if best[variant] > LEFT_BEHIND * fastest}
        racing = [variant for variant in racing if variant.name not in slow]
        lap = 2 * sum(times[variant][-1] for variant in racing)
    if any(len(times[variant]) < LEAST for variant in racing):
        raise NotTimed(f"{SECONDS:.0f} s are too short to compare {', '.join(variant.name for variant in racing)}")

    if not runs:
        raise NotTimed("every one is wrong" if len(wrong) == len(rivals) else "every right one is too slow")
    medians = {variant: statistics.median(taken) for variant, taken in times.items()}
    best = min(medians.values())
    order = sorted(runs, key=lambda variant: max(medians[variant], EQUAL * best))           # of equals, the preferred
    while order and not _same(runs[order[0]], mlp, first[order[0]]):
        wrong[order.pop(0).name] = "two runs on the same data differ"
    if not order:
        raise NotTimed("every one is wrong")
    names = [*order, *(variant for variant in rivals if variant.name in slow and variant not in runs)]
    return Choice(rivals[0].rivals, target.name, tuple(variant.name for variant in names), "timed",
                  us={variant.name: 1e6 * medians[variant] for variant in order}, wrong=dict(wrong), slow=slow,
                  seconds=watch.now() - start)


def _same(run, mlp, first):
    mlp.out.fill_(math.nan)
    run()
    return torch.equal(mlp.out[mlp.rows], first)


# ---- what is remembered

def _key(rivals, target):
    """All that the order depends on, as JSON has it."""
    return {"format": FORMAT, "rivals": rivals[0].rivals, "device": torch.cuda.get_device_name(target.index),
            "capability": list(target.capability), "driver": driver(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "shape": list(SHAPE), "kernels": {variant.name: _binaries(variant, target) for variant in rivals}}


def _binaries(variant, target):
    """Names of its binaries, which hash sources, compilers and options."""
    if variant.library is None:
        return []
    built = build.build(variant.library, variant.library.arch(target.capability))
    return [Path(path).name for path in built.paths]


def driver():
    """The version of NVIDIA's driver: "580.95.05"; where NVML does not say, the CUDA version that it brings."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if not nvml.nvmlInit_v2() and not nvml.nvmlSystemGetDriverVersion(text, len(text)):
            return text.value.decode(errors="replace")
    except (OSError, AttributeError) as error:
        log.debug("SVDQ: no NVML: %s", error)
    return f"CUDA {torch._C._cuda_getDriverVersion()}"


def _digest(key):
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


def _read(path, key, target):
    """The Choice that lies there, or None: there is none, or it is damaged, which the log says."""
    data = stored(path)
    if data is None:
        return None
    try:
        facts = json.loads(data)
        choice = Choice(**facts["choice"] | {"device": target.name, "how": "remembered",
                                             "order": tuple(facts["choice"]["order"])})
        if (facts["key"] == key and choice.rivals == key["rivals"] and choice.order and choice.order[0] in choice.us
                and sorted([*choice.order, *choice.wrong]) == sorted(key["kernels"]) and isinstance(choice.slow, dict)
                and isinstance(choice.wrong, dict) and all(0 < us < math.inf for us in choice.us.values())):
            return choice
        log.info("SVDQ: %s says something else than was asked, so it is timed again", path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.info("SVDQ: %s cannot be read (%s), so it is timed again", path, error)
    return None


def _write(path, key, choice):
    try:
        store(path, json.dumps({"key": key, "choice": asdict(choice)}, indent=1).encode())
    except OSError as error:
        log.info("SVDQ: which variant is fastest cannot be remembered, so it is timed at every start: %s", error)
