"""The frame of the hostile tests: what a class of hostile input is, and who judges what the pack made of a case.

A case loads completely, or ends in one of the pack's own errors: one printable message, not long, that names the file.
Anything else is a fault: another exception, more than SECONDS, a signal, files left behind, files of others changed, text
for ComfyUI's page with markup in it, and whatever a class says of its own cases.

Cases of a class are numbered, and its number makes a case again: random.Random("lora 1234"). They run in a fork of this
process that notes the number before it begins, so a crash names its case and costs one fork. tools/fuzz.py is the
command, tests/hostile/test_fuzz.py runs a few of each class.
"""

import contextlib
import ctypes
import errno
import faulthandler
import functools
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from svdq_pack.svdq.errors import PackError
from svdq_pack.svdq.kernels.errors import BuildError, ShapeError, printable

ROOT = Path(__file__).resolve().parents[2]
OURS = (PackError, ShapeError, BuildError)
LOADED, REFUSED = "loaded", "refused"
SECONDS = int(os.environ.get("SVDQ_FUZZ_SECONDS", 5))           # that a case may take
HANG = 2 * SECONDS              # after so many even native code is ended
LONGEST = 1500                  # characters of a message, the file's name apart
MORE_MEMORY = 2 << 30           # bytes a process of cases may take: a file that claims terabytes meets a full memory
WARM_UP = 500                   # cases before memory is measured
PACK = ("svdq/", "nodes/")
MARKUP = re.compile(r"<[A-Za-z/!?]|\[\[|://")       # what ComfyUI's page would render in a node's text


@dataclass
class Case:
    """consume()   what a user does with the input: returns when all is well
    named       what a refusal has to name
    outcome     LOADED or REFUSED, where only one of them is right
    makes       beginnings of the names of files that may be there after it, where it loads
    keeps       the same, where it is refused
    touches     the same, of files there before it that it may change"""
    consume: callable
    named: str = ""
    outcome: str | None = None
    makes: tuple = ()
    keeps: tuple = ()
    touches: tuple = ()


class Hostile:
    """A class of hostile input; `folder` is its own, and what is there after __init__ are the files of others."""
    name = ""
    share = 1                   # of all cases, beside the other classes'
    mutations = {}              # {function(self, rng) -> Case: weight}

    def __init__(self, folder):
        self.folder = folder

    def memory(self):
        """Bytes of the process that may grow."""
        return _anonymous("self")

    def close(self):
        """After the last case."""


class Fault(AssertionError):
    """Something a class says the pack must not do. kind: the same for all of its kind, without numbers."""

    def __init__(self, kind, detail=""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class Late(BaseException):
    """Not an Exception: nobody may catch it by the way."""


def data_bytes(mutation):
    """Marks a mutation of plain data. The others are of headers, names, shapes and metadata."""
    mutation.structural = False
    return mutation


@contextlib.contextmanager
def full_disk(writes=0, code=errno.ENOSPC):
    """After so many files."""
    fsync = os.fsync

    def full(descriptor):
        nonlocal writes
        writes -= 1
        if writes < 0:
            raise OSError(code, os.strerror(code))

    os.fsync = full
    try:
        yield
    finally:
        os.fsync = fsync


def pick(rng, weights):
    """A key of {key: weight}."""
    return rng.choices(list(weights), list(weights.values()))[0]


# ---- ComfyUI's page

class Page:
    """Stands where ComfyUI's server would, and keeps what nodes send to its page."""

    def __init__(self):
        self.sent = []

    def install(self):
        sys.modules["server"] = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=self))

    def send_progress_text(self, text, *rest, **more):
        self.sent.append(text)

    def send_sync(self, *event):
        pass

    client_id = last_node_id = None


page = Page()


def node(kind):
    """A node's class as ComfyUI runs it, with an id to send texts to."""
    return type(kind.__name__, (kind,), {"hidden": types.SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)})


# ---- one case

def judge(hostile, seed, tell=lambda text: None):
    """(mutation's name, structural, LOADED or REFUSED or None, fault {"kind", "place", "message"} or None, seconds)"""
    rng = random.Random(f"{hostile.name} {seed}")
    chosen = pick(rng, hostile.mutations)
    case = chosen(hostile, rng)
    page.sent.clear()
    before, started = _listing(hostile.folder), time.perf_counter()
    outcome, fault, message = LOADED, None, ""
    try:
        with _limit():
            case.consume()
    except OURS as error:
        outcome, message, refusal = REFUSED, str(error), error
        tell(f"{chosen.__name__}: {message}")
    except BaseException as error:              # a panic of a Rust library is no Exception
        outcome, fault = None, _foreign(error)
        tell(f"{chosen.__name__}: {''.join(traceback.format_exception(error))}")
    seconds = time.perf_counter() - started
    fault = (fault or _about_files(hostile, case, outcome, before) or _about_page()
             or _about_outcome(chosen, outcome, case, message)
             or outcome == REFUSED and _about_message(refusal, message, case.named) or None)
    if fault is None and seconds > SECONDS:
        fault = {"kind": "slow", "place": chosen.__name__, "message": f"{seconds:.1f} s"}
    _tidy(hostile, before)
    if fault:
        fault["mutation"] = chosen.__name__
    return getattr(chosen, "structural", True), outcome if fault is None else None, fault, seconds


def _foreign(error):
    kind = error.kind if isinstance(error, Fault) else type(error).__qualname__
    frames = traceback.extract_tb(error.__traceback__)
    return {"kind": "late" if isinstance(error, Late) else kind, "place": _place(frames),
            "message": printable(str(error))[:300]}


def _place(frames):
    """The innermost line of the pack, else of the test that looked."""
    tests = str(ROOT / "tests")
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT)) and ".environment" not in frame.filename]
    frame = next((frame for frame in reversed(ours) if not frame.filename.startswith(tests)), ours[-1] if ours else frames[-1])
    return f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno} {frame.name}"


def _about_message(error, message, named):
    kind = None
    if not message.replace("\n", "").isprintable():
        kind = "message not printable"
    elif len(message) > LONGEST + 3 * len(printable(named)):
        kind = "message too long"
    elif named and printable(named) not in message:
        kind = "message without the name"
    return kind and {"kind": kind, "place": _place(traceback.extract_tb(error.__traceback__)), "message": message[:300]}


def _about_outcome(chosen, outcome, case, message):
    if case.outcome and outcome != case.outcome:
        return {"kind": f"{outcome}, must be {case.outcome}", "place": chosen.__name__, "message": message[:300]}
    return None


def _about_page():
    bad = next((text for text in page.sent if MARKUP.search(text)), None)
    return bad and {"kind": "markup sent to the page", "place": "send_progress_text", "message": printable(bad)[:300]}


# ---- files

def _listing(folder):
    """{path: (size, mtime, inode)} of all files and folders."""
    found, todo = {}, [os.fspath(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                found[entry.path] = None if is_folder else (about.st_size, about.st_mtime_ns, about.st_ino)
                if is_folder:
                    todo.append(entry.path)
    return found


def _about_files(hostile, case, outcome, before):
    after = _listing(hostile.folder)

    def relative(paths):
        return sorted(os.path.relpath(path, hostile.folder) for path in paths)

    allowed = case.makes if outcome == LOADED else case.keeps
    changed = [name for name in relative(path for path in before if before[path] != after.get(path, ...))
               if not name.startswith(case.touches)]
    left = [name for name in relative(after.keys() - before.keys()) if not name.startswith(allowed)]
    for kind, names in (("file of others changed or gone", changed), (f"left behind when {outcome}", left)):
        if names:
            return {"kind": kind, "place": type(hostile).__name__, "message": printable(str(names[:3]))}
    return None


def _tidy(hostile, before):
    """As it was after __init__."""
    for path in sorted(_listing(hostile.folder).keys() - hostile.kept.keys(), reverse=True):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.lexists(path):
            os.unlink(path)
    now = _listing(hostile.folder)
    for path, about in hostile.kept.items():
        if now.get(path, ...) != about:
            spare = hostile.spare / os.path.relpath(path, hostile.folder)
            if about is None:
                os.makedirs(path, exist_ok=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)             # it may be a pipe by now
                shutil.copy2(spare, path)
            hostile.kept[path] = _listing(os.path.dirname(path))[path]


# ---- many cases

def run(kind, folder, first, count):
    """The facts of `count` cases of a class, from number `first`: what the table shows, and the faults."""
    folder = Path(folder)
    own = folder / "files"
    own.mkdir(parents=True)
    hostile, started = kind(own), time.monotonic()
    try:
        hostile.kept, hostile.spare = _listing(own), folder / "spare"
        shutil.copytree(own, hostile.spare, symlinks=True)
        state = _State(folder / "state")
        with open(folder / "faults", "w+b") as faults, open(folder / "traceback", "w+b") as trace:
            seed = first
            while seed < first + count:
                process = os.fork()
                if process == 0:
                    _run_forked(hostile, range(seed, first + count), state, faults, trace)
                _, status = os.waitpid(process, 0)
                seed = state.get("seed") + 1
                if status:                      # its last case ended it
                    rng = random.Random(f"{kind.name} {state.get('seed')}")
                    mutation = pick(rng, hostile.mutations).__name__
                    _write_fault(faults, state.get("seed"), {**_crash(status, trace), "mutation": mutation})
                    state.add("faults", 1)
                    _tidy(hostile, {})
            faults.seek(0)
            found = [json.loads(line) for line in faults]
    finally:
        hostile.close()
    return {"name": kind.name, "cases": count, "seconds": round(time.monotonic() - started), **state.facts(),
            "found": _distinct(found)}


def show(kind, folder, seed):
    """One case alone, in this process, with everything it says. Returns 1 for a fault, else 0."""
    own = Path(folder) / "files"
    own.mkdir(parents=True)
    hostile = kind(own)
    _confine(hostile, sys.stderr)
    try:
        hostile.kept, hostile.spare = _listing(own), Path(folder) / "spare"
        shutil.copytree(own, hostile.spare, symlinks=True)
        _, outcome, fault, seconds = judge(hostile, seed, tell=lambda text: print(text, file=sys.stderr))
    finally:
        hostile.close()
    print(f"{kind.name} {seed}: {outcome or 'fault'} in {seconds:.2f} s", *(fault or {}).items(), sep="\n  ", file=sys.stderr)
    return int(fault is not None)


def _run_forked(hostile, seeds, state, faults, trace):
    """Ends the process: with 0 when all cases are done, or one that may have broken this process."""
    code = 1
    try:
        _confine(hostile, trace)
        for done, seed in enumerate(seeds):
            state.set("seed", seed)
            faulthandler.dump_traceback_later(HANG, exit=True, file=trace)
            structural, outcome, fault, seconds = judge(hostile, seed)
            state.add("structural", structural)
            state.add(outcome or "faults", 1)
            state.set("slowest", max(state.get("slowest"), int(seconds * 1e6)))
            if fault:
                _write_fault(faults, seed, fault)
                if fault["kind"] == "late":
                    break
            if done == WARM_UP or done > WARM_UP and done % 500 == 0:
                gc.collect()
                _give_back()
                if done == WARM_UP:
                    start = hostile.memory()
                state.set("grown", max(state.get("grown"), hostile.memory() - start))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.stderr.flush()
        os._exit(code)


def _confine(hostile, trace):
    """This process may take so much memory, dies telling where, and leaves what it leaves where it is seen."""
    resource.setrlimit(resource.RLIMIT_DATA, (_anonymous("self") + MORE_MEMORY, resource.RLIM_INFINITY))
    faulthandler.enable(trace)
    signal.signal(signal.SIGALRM, _late)
    os.chdir(hostile.folder)


def _write_fault(faults, seed, fault):
    os.write(faults.fileno(), json.dumps({"seed": seed, **fault}).encode() + b"\n")


def _crash(status, trace):
    """What ended a process of cases, by what faulthandler wrote of it."""
    trace.seek(0)
    text = trace.read().decode(errors="replace")
    trace.seek(0)
    trace.truncate()
    places = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', text)
    frames = [types.SimpleNamespace(filename=file, lineno=line, name=name) for file, line, name in reversed(places)]
    kind = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else (
        "hang" if "Timeout" in text else f"ended with code {os.waitstatus_to_exitcode(status)}")
    return {"kind": kind, "place": _place(frames) if frames else "?", "message": ""}


def _distinct(found):
    """One of each kind, with how many there were, the most frequent first."""
    firsts, counts = {}, Counter()
    for fault in found:
        # The pack's own line tells kinds apart; of what a class says, the mutation does
        key = fault["kind"], fault["place"], "" if fault["place"].startswith(PACK) else fault["mutation"]
        firsts.setdefault(key, fault)
        counts[key] += 1
    return [{"count": count, **firsts[key]} for key, count in counts.most_common()]


class _State:
    """Numbers that outlive the process which writes them."""
    FIELDS = ("seed", "structural", LOADED, REFUSED, "faults", "slowest", "grown")

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.write(self.file, bytes(8 * len(self.FIELDS)))

    def get(self, field):
        return struct.unpack("q", os.pread(self.file, 8, 8 * self.FIELDS.index(field)))[0]

    def set(self, field, value):
        os.pwrite(self.file, struct.pack("q", value), 8 * self.FIELDS.index(field))

    def add(self, field, value):
        self.set(field, self.get(field) + value)

    def facts(self):
        return {field: self.get(field) for field in self.FIELDS[1:]}


def _late(*_):
    raise Late(f"not done in {SECONDS} s")


class _limit:
    """Python that loops or waits is interrupted."""

    def __enter__(self):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    def __exit__(self, *error):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _give_back():
    """Memory that is free already goes back to the system: what is left is in use."""
    with contextlib.suppress(AttributeError):           # of another library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _anonymous(process):
    """Bytes of memory of a process that no file stands for."""
    with open(f"/proc/{process}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


# ---- the classes

@functools.cache
def classes():
    """{name: class}. Importing them imports ComfyUI."""
    import torch

    from svdq_pack.tests.comfy.inprocess import support  # ComfyUI, on the CPU
    from svdq_pack.tests.hostile import checkpoints, files, loras, names, over_http, work
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    support.comfy.model_management.throw_exception_if_processing_interrupted()
    page.install()
    return {kind.name: kind for module in (checkpoints, files, loras, names, over_http, work) for kind in module.CLASSES}
