"""A whole model, a block at a time: every finished block is a file in a work folder, so a run that was stopped goes on where
it was, and ends with the same bytes. The checkpoint is put together from those files at the end.

    <target>.svdq-work/job.json                 what is being made of what
    <target>.svdq-work/<block>.safetensors      one per block, its part of the report and a checksum in the metadata
    <target>.svdq-work/lock                     held by the run that is at work

Test: tests/unit/test_quantize_run.py, tests/hostile/test_quantize.py
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..checkpoint import PRECISIONS, Checkpoint, metadata_for
from ..container import TensorFile, TensorInfo, replacing, write_tensors
from ..errors import CheckpointError, shown
from ..families.family import by_layer, swap_halves
from ..files import disk_full, new_name, read_text, require_free, while_free, writing
from ..format import finite, slot_tensors
from ..kernels.layout import GROUP, RANK_ALIGN
from .assume import Assumed
from .calibration import Statistics
from .layer import Input, Recipe, quantise_awq, quantise_w4a4, smoothing
from .picture import TOOL
from .source import FileSource

log = logging.getLogger(__name__)

VERSION = 1             # of the algorithm: a run begun by another one is not continued
MOST_RANK = 256
MOST_SEED = 10 ** 18 - 1     # torch takes 64 bits, and others are counted up from it
SPARE = 64 << 20        # bytes of disk beyond the files themselves
COST = {"w4a4": 1.0, "awq": 0.5}    # of a weight
JOB, LOCK, PART = "job.json", "lock", ".part"
UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.part")      # what container.replacing calls a file until it is whole


@dataclass(frozen=True)
class Progress:
    """What `progress` is called with.

    done, total    units of work
    text           "double block 7 of 19, img_mlp.2"
    seconds_left   estimate; None until a layer is finished
    """
    done: int
    total: int
    text: str
    seconds_left: float | None = None


@torch.no_grad()
def quantize(source, target, precision="int4", rank=32, statistics=None, *, seed=0, device="cpu", progress=None, work=None):
    """Quantise a model.

    source      path of a safetensors file, of an index (*.safetensors.index.json) or of a folder with one; or an object with
                    name           what to call it in messages and in the report
                    shape          the Shape of its family
                    fingerprint    text that changes when any weight does: a run is resumed only if it is the same
                    layer(name)    (weight [N, K], bias [N] or None) of a ComfyUI layer (shape.comfy_places), any float
                                   dtype, any device; called when needed, more than once: keep nothing
                    plain()        iterable of (ComfyUI tensor name, tensor) for the rest (shape.comfy_plain)
    target      the new .safetensors file; must not exist
    statistics  calibration.Statistics, the path of a calibration file, or None for data-free
    device      where to compute: "cpu", "cuda", "cuda:1"
    progress    called with Progress; what it raises ends the run, passes through, and the run can be continued
    work        folder for finished blocks; default: <target>.svdq-work, removed at the end

    Returns the report, which JSON can hold; but for "seconds" it is in the metadata of the file, too. One entry per linear:
        {"layer", "module", "kind", "sqnr" dB, "weight_error", "gptq"} and, W4A4, {"smooth_min", "smooth_max", "rank_energy"}
    Raises CheckpointError for bad input, before work starts wherever that can be known.
    """
    started, target = time.monotonic(), Path(target)
    progress = progress or (lambda _: None)
    _check_target(target)
    if precision not in PRECISIONS:
        raise CheckpointError(f"precision '{precision}': needs one of {', '.join(PRECISIONS)}")
    if not hasattr(source, "layer"):
        source = FileSource(source)
    _check_rank(rank, source.shape)
    if not isinstance(seed, int) or abs(seed) > MOST_SEED:
        raise CheckpointError(f"seed {shown(seed)}: needs a whole number of at most {len(str(MOST_SEED))} digits")
    if statistics is not None and not isinstance(statistics, Statistics):
        statistics = Statistics.load(statistics, source.shape)
    elif statistics is not None and statistics.shape != source.shape:
        raise CheckpointError("the statistics are of another kind of model than the source. Capture them with this model")
    device = _device(device)
    job = {"version": VERSION, "source": _fingerprint(source), "precision": precision, "rank": rank, "seed": seed,
           "calibration": None if statistics is None else statistics.fingerprint()}
    work = Path(work) if work else target.with_name(f"{target.name}.svdq-work")
    blocks = [(block, list(places)) for block, places in groupby(source.shape.comfy_places(), key=_block_of)]
    specs = {block: dict(_slot_specs((place.slot for place in places), precision, rank)) for block, places in blocks}
    plain = dict(_plain_specs(source.shape))
    nbytes = sum(info.nbytes for part in (*specs.values(), plain) for info in part.values())
    with _locked(work):
        _check_target(target)           # another run may have made it, and let go of the lock
        _prepare(work, target, job)
        watch, finished = _Watch(progress, blocks), {}
        for block, places in blocks:
            facts = _finished(work, block, specs[block], job, watch)
            if facts is not None:
                finished[block] = facts
                watch.skip(places)
        kept = sum(info.nbytes for block in finished for info in specs[block].values())
        _check_disk(target.parent, work.parent, nbytes, kept)
        if not finished and hasattr(source, "check"):
            source.check(lambda share: watch.say(f"checking {shown(source.name, 255)}, {share:.0%}"))
        maker = _Maker(source, statistics, Recipe(precision=precision, rank=rank), seed, device, watch)
        try:
            for block, places in blocks:
                if block not in finished:
                    tensors, facts = maker.block(places)
                    _write_block(_file_of(work, block), specs[block], job, tensors, facts)
                    finished[block] = facts
            if _fingerprint(source) != job["source"]:
                raise CheckpointError(f"{source.name}: has changed while it was being quantised. Remove {work} and start again")
            watch.say(f"writing {target.name}")
            report = _report(source, job, statistics, [facts for block, _ in blocks for facts in finished[block]])
            metadata = metadata_for(source.shape, precision, rank) | {"svdq_quantizer": json.dumps(report)}
            everything = {name: info for part in (*specs.values(), plain) for name, info in part.items()}
            write_tensors(target, everything, metadata, while_free(target, _stream(source, work, specs, job, watch)))
        except (OSError, CheckpointError) as error:
            if not disk_full(error):
                raise
            full = work if len(finished) < len(blocks) else target
            raise CheckpointError(f"{full.parent}: the disk is full. Make {_size(nbytes)} free, then run this again: the "
                                  f"{len(finished)} of {len(blocks)} blocks in {work.name} are kept") from error
        Checkpoint(target).require()
    _remove(work, specs)
    return report | {"seconds": round(time.monotonic() - started, 1)}


# ---- before work starts

def _check_target(target):
    require_free(target)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: needs a name that ends in .safetensors, or no loader will find it")
    new_name(target.name, "svdq-int4_r32-mine", ".safetensors")


def _check_rank(rank, shape):
    most = min(MOST_RANK, shape.hidden // 4)
    if type(rank) is not int or rank % RANK_ALIGN or not 0 < rank <= most:
        raise CheckpointError(f"rank {shown(rank)}: needs a multiple of {RANK_ALIGN} up to {most} for a model of "
                              f"{shape.hidden} channels")


def _fingerprint(source):
    try:
        return source.fingerprint
    except OSError as error:
        raise CheckpointError(f"{source.name}: cannot be read: {shown(error, 200)}") from error


def _device(name):
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).item()
    except Exception as error:              # torch's backends raise anything
        why = shown(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise CheckpointError(f"device '{shown(name)}' cannot be used: {why}. Use cpu, or cuda with a torch made for "
                              "it") from error
    return device


def _check_disk(final, working, nbytes, kept):
    """Two copies for a while: the blocks, and the file they are put together to."""
    with writing(final):
        tempfile.TemporaryFile(dir=final).close()               # say now, not after an hour, that it cannot be written to
        free, needed = shutil.disk_usage(final).free, nbytes + SPARE
        if final.stat().st_dev == working.stat().st_dev:
            needed += nbytes - kept
        elif shutil.disk_usage(working).free < nbytes - kept + SPARE:
            raise CheckpointError(f"{working}: {_size(shutil.disk_usage(working).free)} free, the blocks take "
                                  f"{_size(nbytes - kept)}. Make room")
    if free < needed:
        raise CheckpointError(f"{final}: {_size(free)} free, quantising takes {_size(needed)} while it runs. Make room, or "
                              "choose another folder")


def _size(nbytes):
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{math.ceil(nbytes / 1e6)} MB"


@contextmanager
def _locked(work):
    """The work folder, which is made unless it is there, for this run alone. The lock of a killed run is free. A folder that
    this run made goes again if it fails before a block is finished."""
    _check_work(work)
    with writing(work):
        new = not os.path.lexists(work)
        work.mkdir(exist_ok=True)
    lock = FileLock(work / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{work}: another run is making this file now. Wait for it, or choose another name") from error
    except (OSError, NotImplementedError) as error:
        if new:
            _forget(work, LOCK)
        raise CheckpointError(f"{work}: cannot be locked against other runs: {shown(error, 200)}. Choose another name, or "
                              "a folder on another disk, for the new file") from error
    try:
        yield
    except BaseException:
        if new:
            _forget(work, JOB, LOCK)
        raise
    finally:
        lock.release()
        if new:
            _forget(work, LOCK)                                 # Windows keeps it while it is locked


def _forget(work, *names):
    """Remove a work folder that holds nothing but these: a run that failed before it kept anything."""
    with suppress(OSError):
        found = sorted(os.listdir(work))
        if set(found) <= set(names):
            _clear(work, found)
            work.rmdir()


def _check_work(work):
    """Raise CheckpointError for what stands where the work folder belongs and is none: it would be written to and removed."""
    if not os.path.lexists(work):
        return
    foreign = os.path.islink(work) or not os.path.isdir(work)
    if not foreign:
        with writing(work):                                     # the folder of another user
            names = os.listdir(work)
        foreign = (not os.path.isfile(work / JOB) if JOB in names else
                   any(name != LOCK and not name.endswith(PART) for name in names))
    if foreign:
        raise CheckpointError(f"{work}: exists and is not of this program. Remove it, or choose another name for the new "
                              "file")


def _prepare(work, target, job):
    """The work folder is new or of the same job; what a killed run left half written is removed."""
    described = work / JOB
    if os.path.lexists(described):
        try:
            before = json.loads(read_text(described))
        except (CheckpointError, ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise CheckpointError(f"{work}: its {JOB} is damaged, so nobody knows what the blocks are of. Remove the folder to "
                                  "start anew")
        differing = [field for field in job if before.get(field) != job[field]]
        if differing:
            raise CheckpointError(f"{work}: holds a run that was begun with another {', '.join(differing)}. Remove the "
                                  "folder to start anew, or choose another name for the new file")
    with writing(work):
        _clear(work, {name for name in os.listdir(work) if name.endswith(PART)})
        for name in os.listdir(target.parent):          # where others write, too
            if (found := UNFINISHED.fullmatch(name)) and found[1] == target.name:
                (target.parent / name).unlink()
    if not described.exists():
        with replacing(described) as file:
            file.write(json.dumps(job).encode())


def _remove(work, blocks):
    """Take away what is ours of a work folder. The file is made: what stays is only said."""
    ours = {_file_of(work, block).name for block in blocks} | {JOB, LOCK}
    try:
        _clear(work, {name for name in os.listdir(work) if name in ours or name.endswith(PART)})
        work.rmdir()
    except OSError as error:
        log.warning("SVDQ: %s is not needed any more and cannot be removed: %s", work, error)


def _clear(folder, names):
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _finished(work, block, specs, job, watch):
    """The report of a block that an earlier run finished; None if there is none, or if it is not what that run wrote."""
    path = _file_of(work, block)
    if not os.path.lexists(path):
        return None
    watch.say(f"checking {block}")
    why = "of another version of this pack"
    try:
        file = TensorFile(path)
        if file.tensors == specs:
            for _ in _checked(file, specs, job):
                pass
            return json.loads(file.metadata["report"])
    except CheckpointError as error:
        why = error
    log.warning("SVDQ: a finished block is made again. %s: %s", path.name, why)
    return None


def _file_of(work, block):
    return work / f"{block}.safetensors"


def _write_block(path, specs, job, tensors, facts):
    report = json.dumps(facts)
    digest = _digest(job, report)
    for name, tensor in tensors.items():
        _add(digest, name, tensor)
    write_tensors(path, specs, {"report": report, "sha256": digest.hexdigest()}, tensors.items())


def _digest(job, report):
    """A checksum that will be that of a block, and of no block of another run."""
    return hashlib.sha256(json.dumps([job, report]).encode())


def _add(digest, name, tensor):
    digest.update(name.encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _checked(file, names, job):
    """(name, tensor) of a block's file, then CheckpointError unless they and its report are as they were written for this
    job."""
    digest = _digest(job, file.metadata.get("report", ""))
    with file.reading() as get:
        for name in names:
            tensor = get(name)
            _add(digest, name, tensor)
            yield name, tensor
    if file.metadata.get("sha256") != digest.hexdigest():
        raise CheckpointError(f"{file.path}: is not what was written: the disk or another program has damaged it. Run this "
                              "again, and it will be made anew")


def _block_of(place):
    """The stack and the number that the slot's name begins with."""
    return ".".join(place.slot.module.split(".")[:2])


# ---- the work

class _Watch:
    """Counts finished work and says so."""

    def __init__(self, progress, blocks):
        self.progress = progress
        self.total = sum(self.cost(place) for _, places in blocks for place in places)
        self.done = self.before = 0
        self.started = None

    @staticmethod
    def cost(place):
        return int(place.n * place.k * COST[place.slot.kind])

    def say(self, text):
        left = None
        if self.started is not None and self.done > self.before:
            left = (time.monotonic() - self.started) / (self.done - self.before) * (self.total - self.done)
        self.progress(Progress(self.done, self.total, text, left))

    def skip(self, places):
        """An earlier run has done these."""
        self.done += sum(map(self.cost, places))
        self.before = self.done

    def begin(self, layer, shape):
        self.started = self.started or time.monotonic()
        self.say(shape.layer_in_words(layer))

    def end(self, place):
        self.done += self.cost(place)


class _Maker:
    """Makes blocks."""

    def __init__(self, source, statistics, recipe, seed, device, watch):
        self.source, self.recipe, self.seed, self.device, self.watch = source, recipe, seed, device, watch
        self.statistics = Assumed(source, seed, device) if statistics is None else statistics

    def block(self, places):
        """({tensor name: tensor}, [facts]) of the linears of one block."""
        tensors, facts = {}, []
        for layer in by_layer(places):
            for slot, packed, bias, about in self._layer(layer):
                tensors |= slot_tensors(slot, packed, bias)
                facts.append({"layer": layer.name, "module": slot.module, "kind": slot.kind, **_rounded(about)})
        return tensors, facts

    def _layer(self, layer):
        """Of each linear that shares a ComfyUI layer: (slot, packed, bias, facts)."""
        self.watch.begin(layer.name, self.source.shape)
        weight, bias = self.source.layer(layer.name)
        if not finite(weight) or bias is not None and not finite(bias):
            raise CheckpointError(f"{self.source.name}: {layer.name} has NaN or Inf. The model is broken: a merge or a LoRA "
                                  "that went wrong, or a damaged file")
        bias = torch.zeros(weight.shape[0]) if bias is None else bias.detach().float().cpu()
        seen = self.statistics[layer.name]
        smooth = {}
        for place in layer.places:
            slot, given, part = place.slot, self._input(seen, place), self._part(weight, place)
            # A bias belongs to a row, and of the tiles of a row the one that covers the last column has it.
            last = place.col + place.k == weight.shape[1]
            mine = (bias[place.row:place.row + place.n] if last else torch.zeros(place.n)).to(self.device)
            if slot.kind == "awq":
                yield slot, *quantise_awq(part, mine, given)
            else:
                unsigned = slot.unsigned(self.recipe.precision)
                if place.col not in smooth:         # kernels quantise an input once for all that share it
                    sharing = [part if other is place else self._part(weight, other) for other in layer.places
                               if other.col == place.col]
                    smooth[place.col] = smoothing(sharing, given, self.recipe, unsigned, self.seed)
                    del sharing
                yield slot, *quantise_w4a4(part, mine, given, self.recipe, smooth=smooth[place.col], unsigned=unsigned,
                                           blocks=slot.parts, seed=self.seed)
            self.watch.end(place)

    def _part(self, weight, place):
        part = weight[place.row:place.row + place.n, place.col:place.col + place.k]
        return part.detach().to(self.device).float().contiguous()

    def _input(self, seen, place):
        seen = seen.columns(place.col, place.col + place.k)
        return Input(*(tensor.to(self.device).float() for tensor in (seen.mean, seen.square, seen.tokens)))


def _rounded(facts):
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in facts.items()}


def _report(source, job, statistics, layers):
    calibration = "data-free" if statistics is None else {"calls": statistics.calls, "tokens": statistics.tokens,
                                                          "note": statistics.note, "fingerprint": job["calibration"]}
    return {"tool": TOOL, "version": VERSION, "source": shown(source.name, 255),
            "source_dtypes": getattr(source, "dtypes", None), "model": source.shape.variant,
            "precision": job["precision"], "rank": job["rank"], "seed": job["seed"],
            "calibration": calibration, "layers": layers}


# ---- the file

def _slot_specs(slots, precision, rank):
    """(tensor name, TensorInfo) of the linears of a block, as slot_tensors makes them."""
    for slot in slots:
        n, k, at = slot.n, slot.k, f"{slot.module}."
        if slot.kind == "awq":
            yield at + "qweight", TensorInfo("I32", (n // 4, k // 2))
            yield at + "bias", TensorInfo("BF16", (n,))
            for name in ("wscales", "wzeros"):
                yield at + name, TensorInfo("BF16", (k // 64, n))
            continue
        fp4 = precision == "nvfp4"
        yield at + "qweight", TensorInfo("I8", (n, k // 2))
        yield at + "wscales", TensorInfo("F8_E4M3" if fp4 else "BF16", (k // GROUP[precision], n))
        for name, shape in (("bias", (n,)), ("smooth", (k,)), ("smooth_orig", (k,)), ("lora_down", (k, rank)),
                            ("lora_up", (n, rank))):
            if name != "bias" or slot.bias:
                yield at + name, TensorInfo("BF16", shape)
        if fp4:
            per_row = slot.parts > 1
            yield (at + "wcscales", TensorInfo("BF16", (n,))) if per_row else (at + "wtscale", TensorInfo("BF16", (1,)))


def _plain_specs(shape):
    for name, size in shape.plain():
        yield name, TensorInfo("BF16", size)


def _stream(source, work, specs, job, watch):
    """(name, tensor) of the whole file: the blocks, then what is not quantised."""
    for block in specs:
        watch.say(f"writing {block}")
        yield from _checked(TensorFile(_file_of(work, block)), specs[block], job)
    plain = dict(source.plain())
    for place in source.shape.comfy_plain():
        tensor = plain[place.name]
        yield place.tensor.name, _half(source, place.name, swap_halves(tensor) if place.swapped else tensor)


def _half(source, name, tensor):
    half = tensor.detach().to(torch.bfloat16)
    if not finite(half):
        raise CheckpointError(f"{source.name}: {name} has NaN or Inf. The model is broken: get it again")
    return half
