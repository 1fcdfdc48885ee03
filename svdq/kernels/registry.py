"""All variants, and which one serves: the only list of implementations. Whoever builds, dispatches, tests or shows kernels
reads it here.

    plan(weight, target, dtype, act_bits)   -> Plan: the variant that serves this weight there, and why no better one
    precision_for(target, dtype, act_bits)  -> which of the published files is better there
    pack(weight, dtype, act_bits)           -> the weight in the order that the best variant of its device reads

Files of variants/ are found, not named. One that cannot be imported is left out and said; one whose kernels do not build,
or fail their self-test on a device, does not serve there; neither costs another variant anything. Of those that do the same job
the tuner says which is fastest.

Test: tests/unit/test_registry.py
"""

import importlib
import logging
import pkgutil
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from . import build, check, tuner, variants
from .errors import ShapeError, command
from .prologues import Modulated
from .variant import ACT_BITS, HALVES, Target, Variant, short, sm, usual_dtype
from .weights import example

log = logging.getLogger(__name__)


def _found():
    """(variants of all files, the preferred ones first, {file: why it cannot be used})"""
    rows, broken = [], {}
    for module in pkgutil.iter_modules(variants.__path__):
        try:
            found = tuple(importlib.import_module(f"{variants.__name__}.{module.name}").VARIANTS)
            if not all(isinstance(row, Variant) for row in found):
                raise TypeError("VARIANTS holds something else than Variant")
            taken = {(row.name, precision, row.activations) for row in rows for precision in row.precisions}
            twice = [row.name for row in found for precision in row.precisions
                     if (row.name, precision, row.activations) in taken]
            if twice:
                raise ValueError(f"the name {twice[0]} is taken by another file")
            rows += found
        except (Exception, SystemExit) as error:        # whatever is wrong with one file must not cost the others
            broken[f"{module.name}.py"] = f"{type(error).__name__}: {error}"
            log.warning("SVDQ: svdq/kernels/variants/%s.py cannot be used (%s: %s); the other variants serve", module.name,
                        type(error).__name__, error)
            log.debug("SVDQ: where", exc_info=True)
    return tuple(sorted(rows, key=lambda variant: -variant.preference)), broken     # a stable sort


VARIANTS, BROKEN = _found()
_requested = ContextVar("svdq_variant", default=None)
_asking = threading.RLock()


class Plan(NamedTuple):
    """Who serves a weight.

    variant    the Variant
    declined   ((Variant, why), ...) of the better ones that are meant for this kind of device
    unpack     whether the weight must be brought back into the file's order each time, because nobody reads its own here
    fallback   the Plan for more rows than variant.max_rows, or None
    """
    variant: object
    declined: tuple = ()
    unpack: bool = False
    fallback: object = None

    def for_rows(self, rows):
        """The Plan for x of so many rows."""
        most = self.variant.max_rows
        return self if most is None or rows <= most else self.fallback.for_rows(rows)

    def run(self, x, weight, out, bias=None, accumulate=False, epilogue=None, prepared=None):
        """ops.linear for whoever keeps the plan and knows that shapes, dtypes and devices fit together: nothing is checked."""
        plan = self if self.fallback is None else self.for_rows(len(x))
        plan.variant.run(x, weight.unpack() if plan.unpack else weight, out, bias, accumulate, epilogue, prepared)

    def shortfall(self, weight, target):
        """Why nothing better than weight-only serves the weight there, one clause for people; None where something does."""
        if not self.variant.weight_only:
            return None
        if target.type not in ("cuda", "cpu"):
            return "no kernel of this pack runs there"
        made = [f"{variant.name} {why}" for variant, why in self.declined if variant.made_for(target)]
        here = f" on {sm(target.capability)}" if target.capability else ""
        return "; ".join(made) or f"no kernel of this pack multiplies {weight.precision.upper()} weights{here}"

    @property
    def how(self):
        return "the checkpoint's order restored each time, which is very slow; then " * self.unpack + self.variant.how

    def __str__(self):
        """For the log: "'w4a4_sm80': fused kernels; not 'x', which needs y"."""
        return f"'{self.variant.name}': {self.how}" + "".join(f"; not '{v.name}', which {why}" for v, why in self.declined)


def shared_inputs(jobs):
    """What jobs of layers run on: kernels make it of each Modulated in few launches, those with the same object share a read
    of it; where no kernel does, they share one tensor.

    jobs   [(Plan, x, weight)] -> [(x, prepared)], arguments of Plan.run
    """
    given, by_variant, tensors = [(x, None) for _, x, _ in jobs], {}, {}
    for place, (plan, x, _) in enumerate(jobs):
        if isinstance(x, Modulated) and not plan.unpack:
            by_variant.setdefault(plan.for_rows(len(x)).variant, []).append(place)
    for variant, places in by_variant.items():
        for place, prepared in zip(places, variant.prepared([jobs[place][1:] for place in places])):
            given[place] = jobs[place][1], prepared
    for place, (x, prepared) in enumerate(given):
        if isinstance(x, Modulated) and prepared is None:
            tensors[x] = x.of() if x not in tensors else tensors[x]
            given[place] = tensors[x], None
    return given


def plan(weight, target, dtype, act_bits=None, repack=False):
    """The Plan for a weight and x of a dtype.

    weight     a Weight; weights.example(precision) for questions without numbers
    target     Target
    act_bits   the bits that activations are rounded to: 4, 8, 16 (never); None: the fastest variant decides. Where none does
               what is asked, one that rounds nothing serves
    repack     answer for the weight as `pack` would bring it into order, not as it lies

    Raises ShapeError when no variant serves, or act_bits is none of these.
    """
    if act_bits is not None and (not isinstance(act_bits, int) or act_bits not in ACT_BITS):
        raise ShapeError(f"linear: act_bits is {act_bits!r}. Needs 4, 8 or 16 (never rounded), the bits that "
                         "activations are rounded to, or None for the fastest.")
    asked = requested()
    rows = [variant for variant in VARIANTS if weight.precision in variant.precisions]
    rows = [variant for variant in rows if repack or variant.reads(weight) or variant.layout is None]

    def found(rows):
        if not repack:
            rows = sorted(rows, key=lambda variant: not variant.reads(weight))      # whoever reads it as it lies, first
        return _first(sorted(rows, key=lambda variant: variant.name != asked), weight, target, dtype, act_bits, repack)

    usual = found(rows)
    if usual.variant.rivals is None or usual.variant.name == asked or target.index is None:
        return usual
    return found(_by_speed(rows, usual.variant.rivals, target))


def _first(rows, weight, target, dtype, act_bits, repack):
    """The Plan of the first of these variants that serves."""
    declined = []
    for place, variant in enumerate(rows):
        why = _declines(variant, target, dtype, weight, act_bits) or _untrusted(variant, target)
        if why is None:
            rest = (None if variant.max_rows is None else
                    _first(rows[place + 1:], weight, target, dtype, act_bits, repack))
            if not variant.weight_only:             # whose kernels serve asks for no others that another GPU would have
                declined = [(other, why) for other, why in declined
                            if other.made_for(target) and weight.precision in other.precisions]
            return Plan(variant, tuple(declined), not repack and not variant.reads(weight), rest)
        if variant.meant_for(target) and not variant.on_request:
            declined.append((variant, why))
    raise ShapeError(f"linear: no variant serves {weight.precision} weights and x in {short(dtype)} on {target.name}: "
                     + ("; ".join(f"{variant.name} {why}" for variant, why in declined) or "none is known") + ".")


def _by_speed(rows, group, target):
    """These variants, those of a group of rivals in the tuner's order, in the places that they have; without the wrong ones."""
    half = usual_dtype(target)
    rivals = [variant for variant in VARIANTS if variant.rivals == group and not variant.on_request
              and _declines(variant, target, half, example(variant.precisions[0], half)) is None and trusted(variant, target)]
    if len(rivals) < 2:
        return rows
    choice = tuner.choose(rivals, target)
    rows = [variant for variant in rows if variant.name not in choice.wrong]
    ranks = {name: rank for rank, name in enumerate(choice.order)}
    ranked = iter(sorted((v for v in rows if v.rivals == group), key=lambda v: ranks.get(v.name, len(ranks))))
    return [next(ranked) if variant.rivals == group else variant for variant in rows]


def _declines(variant, target, dtype, weight, act_bits=None):
    """Variant.declines, whatever it raises."""
    try:
        return variant.declines(target, dtype, weight, act_bits)
    except Exception as error:
        return f"cannot be asked ({type(error).__name__}: {error})"


def pack(weight, dtype, act_bits=None):
    """The weight as the variant that is best for it on its device reads it: repacked, or the weight itself.

    weight   in the file's order, on the device where it will run
    dtype    of the x to come
    """
    layout = plan(weight, Target.of(weight.device), dtype, act_bits, repack=True).variant.layout
    return weight if layout is None or isinstance(weight, layout) else layout.pack(weight)


def precision_for(target, dtype, act_bits=None):
    """The precision of the published file that is better on a target: whose plan has the preferred variant. Of equals INT4, the
    smaller one. A dtype of other than 16 bit counts as the usual one."""
    half = dtype if dtype in HALVES else usual_dtype(target)
    return max(("int4", "nvfp4"), key=lambda precision: plan(example(precision, half), target, half, act_bits,
                                                             repack=True).variant.preference)


def able(weight, target, dtype):
    """The variants made for a kind of device that can serve a weight there, first choice or not, to whatever they round
    activations; the preferred first."""
    return [variant for variant in VARIANTS if variant.device is not None
            and (_declines(variant, target, dtype, weight) or _untrusted(variant, target)) is None]


def libraries(target):
    """What variants may call on such a device without being asked for by name: build.Library or CPULibrary."""
    return list(dict.fromkeys(
        variant.library for variant in VARIANTS if variant.library is not None and not variant.on_request
        and any(_declines(variant, target, dtype, example(precision, dtype)) is None
                for precision in variant.precisions for dtype in variant.dtypes)))


# ---- trust

def _untrusted(variant, target):
    """Why a variant whose rules fit may not serve yet, or None."""
    if variant.on_request:
        return None if variant.name == requested() else "runs only on request, for tests and comparisons"
    if variant.last_resort or target.type == "cuda" and target.index is None:
        return None                             # or there is no device that could be asked
    if not trusted(variant, target):
        return f"did not build, or failed its self-test; `{command('doctor')}` says why"
    return None


def trusted(variant, target):
    """Whether a variant computes what the reference says on a device; asked once, said once. Never raises."""
    with _asking:
        try:
            return _asked(variant, target)
        except (torch.OutOfMemoryError, MemoryError) as error:      # says nothing of the variant: the next to ask asks again
            log.warning("SVDQ: %s could not be tested on %s (%s), so another variant serves for now", variant.name, target.name,
                        error)
            return False


@cache
def _asked(variant, target):
    if variant.library is not None and build.kernels_for(variant.library, target.index) is None:
        return False                            # build.py has said why
    try:
        with torch.autocast("cpu", enabled=False):          # whoever asks may have it on
            failed = check.small(variant, target.name)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:                  # of whatever kind: a variant that cannot be tested cannot serve
        log.debug("SVDQ: %s", variant.name, exc_info=True)
        failed = [f"{type(error).__name__}: {error}"]
    if failed:
        log.warning("SVDQ: %s fails its self-test on %s (%s), so another variant serves. Please report this with the output of "
                    "`%s`", variant.name, target.name, "; ".join(failed[:3]), command("doctor"))
    return not failed


trusted.cache_clear = _asked.cache_clear


# ---- on request

def requested():
    """The name that `using` prefers now, or None."""
    return _requested.get()


@contextmanager
def using(name):
    """Prefer the variants of this name inside the block: `with using("reference"): ...`. Raises ValueError for another name."""
    if name not in {variant.name for variant in VARIANTS}:
        raise ValueError(f"using: there is no variant {name!r}, but {', '.join(sorted({v.name for v in VARIANTS}))}.")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)
