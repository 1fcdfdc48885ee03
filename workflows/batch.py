#!/usr/bin/env python3
"""Paint many prompts on many GPUs or machines, in workers that Ray keeps alive.

    python3 workflows/batch.py prompts.txt --out pictures            one prompt a line; empty lines and those with # are none
    python3 workflows/batch.py prompts.jsonl --out pictures --workers 4 --model nunchaku-tech/nunchaku-flux.1-schnell

A line of a .jsonl file is {"prompt": "...", "seed": 7, "name": "hearts", "steps": 20, ...}, all but the prompt optional.
Pictures that are there already are not painted again: the same command goes on where it was stopped. docs/batch.md has more.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import platform
import re
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from headless import environment
from headless.messages import first, printable, shown
from headless.outputs import refusal

PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = "svdq"                  # keyword of the text in a picture: JSON of what it was painted from
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,119}")        # of a picture, without .png: fit for every file system
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", re.IGNORECASE)     # but for these on Windows
LONGEST, MOST = 300, 10         # of messages: characters of a path or a reason, bad lines that are listed
LOADING = "the model cannot be loaded"
EXIT_CODES = """exit codes:
  0    every picture is there
  1    some prompts failed, report.jsonl says which and why; or DIR is full
  2    bad arguments or a bad line in the list: nothing was painted
  3    nothing that paints: no Ray, no cluster, or the model cannot be loaded
  130  interrupted
"""


class UsageError(Exception):
    """The arguments or the list of prompts are wrong."""


class NoWorkers(Exception):
    """Ray, its cluster or the model cannot be had."""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXIT_CODES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="a .txt or .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where pictures and report.jsonl go")
    parser.add_argument("--model", metavar="FILE|REPO", help="an SVDQ model; default: the demo model that comes with the pack")
    parser.add_argument("--lora", metavar="FILE", help="a LoRA for all of them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="what seeds of prompts without one follow from; "
                        "default: 0")
    parser.add_argument("--workers", type=at_least(1), metavar="N", help="default: one per GPU, else 1")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="torch's threads per worker; default: 1 on a CPU")
    parser.add_argument("--retries", type=at_least(0), default=2, metavar="N", help="how often a prompt is tried again after "
                        "an error or the death of its worker; default: 2")
    parser.add_argument("--address", metavar="ADDRESS", help="a Ray cluster, such as auto, the one of this machine; default: "
                        "start Ray here")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except UsageError as error:
        return complain(error, 2)
    except (environment.SetupError, NoWorkers) as error:
        return complain(error, 3)
    except OSError as error:
        return complain(f"{shown(error.filename or options.out, LONGEST)}: {error.strerror or shown(error)}. What is painted "
                        "is kept; the same command goes on", 1)
    except KeyboardInterrupt:
        return complain("interrupted. What is painted is kept; the same command goes on", 130)


def at_least(low):
    def number(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{shown(text)} needs to be a whole number from {low}")
        return int(text)
    return number


def complain(error, code):
    print(f"batch.py: {printable(error, lines=True)}", file=sys.stderr)
    return code


def run(options):
    """The exit code."""
    wanted = read(options.prompts, options.seed, model_name(options.model, "demo"), model_name(options.lora))
    make_room(options.out)
    enter()
    with alone(options.out):
        start, report = time.monotonic(), Report(options.out, wanted)
        there, left = [], []
        for job in wanted:
            differs = difference(options.out / f"{job.name}.png", job)
            if differs:
                print(f"{job.name}.png: {differs}; it is painted anew, what is there goes to replaced/", file=sys.stderr)
            (there if differs == "" else left).append(job)
        report.keep(there)
        workers = 0
        try:
            if left:
                with contextlib.redirect_stdout(sys.stderr):        # what Ray says of its workers
                    workers = paint(options, left, report)
        finally:
            report.write()
    failed = report.failed()
    print(f"{len(wanted)} prompts: {len(left) - len(failed)} painted, {len(there)} there already, {len(failed)} failed; "
          f"{time.monotonic() - start:.0f} s" + f", {workers} worker{'s' * (workers > 1)}" * bool(workers) +
          f"; {printable(report.path)}")
    return 1 if failed else 0


# ---- the list ----

@dataclass
class Job:
    """A picture that is wanted. `more`: steps and other arguments of Painter.paint."""
    line: int
    name: str
    prompt: str
    seed: int
    more: dict = field(default_factory=dict)
    model: str = "demo"
    lora: str = None

    def origin(self):
        """What a picture says it was painted from."""
        return {"prompt": self.prompt, "seed": self.seed, "model": self.model, **({"lora": self.lora} if self.lora else {}),
                **self.more}


def whole_number(low, high):
    return lambda value: type(value) is int and low <= value < high, f"a whole number from {low} to {high - 1}"


def number(value):
    return type(value) in (int, float) and math.isfinite(value)


# What a line of .jsonl may have besides its prompt.
FIELDS = {
    "seed": whole_number(0, 1 << 63),
    "name": (lambda value: isinstance(value, str) and NAME.fullmatch(value) and not RESERVED.fullmatch(value),
             "a file's name without .png, of letters, digits and _ . -"),
    "steps": whole_number(1, 1001),
    "width": whole_number(16, 8193),
    "height": whole_number(16, 8193),
    "guidance_scale": (number, "a number"),
    "true_cfg_scale": (number, "a number"),
    "max_sequence_length": whole_number(1, 513),
}


def read(path, base=0, model="demo", lora=None):
    """The jobs of a list. Raises UsageError that names its bad lines."""
    who = shown(path, LONGEST)
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{who}: a list of prompts ends in .txt (one prompt a line) or .jsonl (one JSON object a line).")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:              # ValueError: not UTF-8, or a NUL in the path
        raise UsageError(f"{who}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    jobs, bad, names, again = [], [], {}, []
    for place, text in enumerate(lines, 1):
        if not text.strip() or path.suffix == ".txt" and text.lstrip().startswith("#"):
            continue
        try:
            row = {"prompt": text.strip()} if path.suffix == ".txt" else parsed(text)
            job = job_of(row, place, base, model, lora)
        except UsageError as error:
            bad.append(f"line {place}: {error}")
            continue
        # Names are compared as file systems of Windows and macOS do.
        other = names.setdefault(job.name.lower(), job)
        if other is job:
            jobs.append(job)
        elif other.origin() == job.origin() and other.name == job.name:
            again.append(place)
        else:
            bad.append(f"line {place}: has the name of line {other.line}, {shown(job.name)}. Give it another \"name\"")
    if bad:
        raise UsageError(f"{who}: {len(bad)} bad line{'s' * (len(bad) > 1)}, nothing was painted.\n" +
                         "\n".join(f"  {text}" for text in first(bad, MOST)))
    if not jobs:
        raise UsageError(f"{who}: has no prompts.")
    if again:
        print(f"{who}: line{'s' * (len(again) > 1)} {', '.join(first(list(map(str, again)), MOST))} repeat earlier ones and "
              "are painted once", file=sys.stderr)
    return jobs


def parsed(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({shown(error)})") from None


def job_of(row, place, base, model, lora):
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UsageError('needs to be an object with a text as "prompt"')
    prompt = row["prompt"]
    try:
        prompt.encode()
    except UnicodeError:                                # half of a surrogate pair, which JSON can spell
        raise UsageError("the prompt is not Unicode text") from None
    for key, value in row.items():
        if key == "prompt":
            continue
        if key not in FIELDS:
            raise UsageError(f'"{shown(key)}" is unknown; known are prompt, {", ".join(FIELDS)}')
        is_right, needed = FIELDS[key]
        if not is_right(value):
            raise UsageError(f'"{key}" is {shown(json.dumps(value))}, needs to be {needed}')
    more = {key: value for key, value in row.items() if key not in ("prompt", "seed", "name")}
    seed = row.get("seed", seed_of(base, prompt, row.get("name", "")))
    return Job(place, row.get("name") or name_of(prompt, seed, more), prompt, seed, more, model, lora)


def seed_of(base, prompt, name=""):
    """From what a line says alone: where it stands, and which others there are, does not matter."""
    return int.from_bytes(hashlib.sha256(json.dumps([base, prompt, name]).encode()).digest()[:4], "big")


def name_of(prompt, seed, more):
    """Words of the prompt, and eight digits of all that a line asks for."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    digits = hashlib.sha256(json.dumps([prompt, seed, more], sort_keys=True).encode()).hexdigest()[:8]
    return f"{words or 'prompt'}-{digits}"


def model_name(where, default=None):
    """As pictures carry it: a file's name without its folder, or the repository's."""
    if where is None:
        return default
    return Path(where).name if os.path.exists(where) else where


# ---- pictures ----

def make_room(out):
    """The folder for the pictures. Whether it can be written to is said now, not after hours."""
    if (why := refusal(out)) is not None:
        raise UsageError(f"--out {shown(out, LONGEST)}: cannot be written: {why}. Choose another folder.")


@contextlib.contextmanager
def alone(out):
    """One run at a time paints into a folder; the system drops the lock of one that dies."""
    with open(out / ".batch.lock", "w") as file:
        if not environment.try_lock(file):
            raise UsageError(f"--out {shown(out, LONGEST)}: another run is painting into it. Wait for it, or choose another "
                             "folder.")
        yield


def difference(path, job):
    """None: no whole picture is there. "": it is the one of the job. Else what is different, for people."""
    try:
        origin = inside(path.read_bytes())
    except (OSError, ValueError):
        return None
    if origin is None:
        return "is another picture, without a word of where it is from"
    wanted = job.origin()
    keys = [key for key in wanted | origin if wanted.get(key) != origin.get(key)]
    return ", ".join(f"was painted with {key} {shown(json.dumps(origin.get(key), ensure_ascii=False))}" for key in keys)


def inside(picture):
    """What a PNG file says it was painted from, None if nothing. Raises ValueError unless it is whole: every chunk
    (`size, kind, bytes, checksum`) to the last, and nothing after that."""
    if not picture.startswith(PNG):
        raise ValueError("no PNG file")
    at, kind, origin = len(PNG), b"", None
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", picture, at) if at + 8 <= len(picture) else (len(picture), b"")
        data, check = picture[at + 8:at + 8 + size], picture[at + 8 + size:at + 12 + size]
        if check != struct.pack(">I", zlib.crc32(kind + data)):
            raise ValueError("not whole")
        if kind == b"tEXt" and data.startswith(CHUNK.encode() + b"\0"):
            with contextlib.suppress(ValueError, RecursionError):
                origin = json.loads(data[len(CHUNK) + 1:])
        at += 12 + size
    if at != len(picture):
        raise ValueError("more than a picture")
    return origin if isinstance(origin, dict) else None


def save(out, job, png):
    """Write NAME.png, at once or not at all. Another whole picture of that name goes to replaced/NAME-NUMBER.png."""
    path = out / f"{job.name}.png"
    if difference(path, job):
        (out / "replaced").mkdir(exist_ok=True)
        number = 1
        while os.path.lexists(aside := out / "replaced" / f"{job.name}-{number}.png"):
            number += 1
        os.replace(path, aside)
    write(path, png)


def write(path, data):
    part = path.with_name(".batch.part")                # one for all: what a killed run leaves is overwritten by the next
    part.write_bytes(data)
    os.replace(part, path)


class Report:
    """DIR/report.jsonl: a line per prompt of the list, added as pictures come and brought into the list's order at the end."""

    def __init__(self, out, wanted):
        self.path, self.wanted, self.rows = out / "report.jsonl", wanted, {}

    def keep(self, there):
        """Rows of pictures from earlier runs; what the file says of others is dropped."""
        old = {}
        with contextlib.suppress(OSError):
            for line in self.path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):     # a killed run's last line
                    row = json.loads(line)
                    old[row["name"]] = row["seconds"] if row["error"] is None else None
        for job in there:
            self.rows[job.name] = self.row(job, old.get(job.name), None)
        self.write()

    def add(self, job, seconds, error):
        row = self.rows[job.name] = self.row(job, seconds, error)
        with open(self.path, "ab") as file:
            file.write(encoded(row))

    def row(self, job, seconds, error):
        return {"name": job.name, "prompt": job.prompt, "seed": job.seed, "seconds": seconds, "error": error}

    def write(self):
        write(self.path, b"".join(encoded(self.rows[job.name]) for job in self.wanted if job.name in self.rows))

    def failed(self):
        return [row for row in self.rows.values() if row["error"] is not None]


def encoded(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


# ---- painting ----

def paint(options, jobs, report):
    """Paint them all; returns the number of workers. Raises NoWorkers."""
    for where in filter(None, (options.model, options.lora)):
        if not os.path.exists(where):
            print(f"workers look for {shown(where, LONGEST)} in Hugging Face's cache, else they fetch it", file=sys.stderr)
    ray = cluster(options)
    try:
        workers, threads, resources = plan(options, ray.cluster_resources())
        print(f"{len(jobs)} to paint, {workers} worker{'s' * (workers > 1)}" +
              (f" of {threads} thread{'s' * (threads > 1)}" if threads else ""), file=sys.stderr, flush=True)
        # Closed before Ray ends: its data would start another Ray to end itself.
        with contextlib.closing(results(ray, options, jobs, workers, threads, resources)) as answers:
            collect(options, jobs, report, answers)
    except ray.exceptions.RayError as error:
        raise NoWorkers(f"Ray stopped: {shown(error, LONGEST)}. What is painted is kept; the same command goes on") from None
    finally:
        ray.shutdown()
    return workers


def enter():
    """Returns where this Python has what painting takes; else runs this script in one that has, and exits as it did."""
    missing = {name for name in ("torch", "diffusers", "ray", "pyarrow") if importlib.util.find_spec(name) is None}
    if missing and missing <= {"ray", "pyarrow"}:
        raise environment.SetupError(f"this Python has diffusers, but no Ray. Install it: {sys.executable} -m pip install "
                                     f'"{environment.RAY}"')
    if missing:
        environment.enter_hf(__file__, environment.make_ray)
    folders = str(environment.ROOT / "workflows"), str(environment.ROOT)          # an installed svdq goes first
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def cluster(options):
    """The module ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")          # nothing is reported to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")        # nor said here about Ray's own affairs
    import ray
    try:
        if options.address:
            probe(options.address)
            ray.init(options.address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init("local", num_cpus=max(os.cpu_count() or 1, (options.workers or 1) * (options.threads or 1)),
                     include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise NoWorkers(f"Ray{f' at {options.address}' * bool(options.address)} cannot be reached or started: "
                        f"{shown(error, LONGEST)}") from None
    stop_in_order()                                     # Ray has put its own way in place of ours
    return ray


def probe(address):
    """Ray tries for many minutes where nobody listens. Raises OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), 10).close()


def plan(options, has):
    """(workers, torch's threads in each or None, what Ray is to give each) on a cluster that has so much."""
    gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
    workers = options.workers or gpus or 1
    threads = options.threads or (None if gpus else 1)
    resources = {"num_cpus": threads or 1, "num_gpus": 1 / math.ceil(workers / gpus) if gpus else 0}
    if workers * resources["num_cpus"] > cpus:
        raise UsageError(f"{workers} workers with {resources['num_cpus']} CPUs each need more than the {cpus} CPUs that the "
                         "cluster has. Lower --workers or --threads.")
    return workers, threads, resources


def results(ray, options, jobs, workers, threads, resources):
    """Yields (answer of a Worker, PNG file or None), each as soon as it is there."""
    import ray.data
    for handler in logging.getLogger("ray.data").handlers:         # its file in Ray's session folder has it all
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1     # a prompt that costs its worker's life again and again is left out; we say so
    tasks = [json.dumps({"job": i, "prompt": job.prompt, "seed": job.seed, "more": job.more, "origin": job.origin()})
             for i, job in enumerate(jobs)]
    # One prompt a block and one block on its way to each worker: what dies with a worker is one prompt.
    warnings.simplefilter("ignore", DeprecationWarning)            # max_task_retries has no other way before Ray 2.64
    pictures = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        Worker, batch_size=1, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=[list(sys.path), here(options.model), here(options.lora), threads, options.retries],
        max_restarts=-1, max_task_retries=options.retries, **resources)
    for batch in pictures.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for answer, png in zip(batch["answer"].to_pylist(), batch["png"].to_pylist()):
            yield json.loads(answer), png


def here(where):
    """A path that workers find, whatever folder they run in."""
    return os.path.abspath(where) if where and os.path.exists(where) else where


def collect(options, jobs, report, answers):
    """Save what comes, and say what never came."""
    missing = dict(enumerate(jobs))
    for answer, png in answers:
        if "fatal" in answer:
            raise NoWorkers(f"{LOADING}: {answer['fatal']}")
        job = missing.pop(answer["job"], None)
        if job is None:                 # a machine was lost with a picture that had come, and Ray made it again
            continue
        if png is not None:
            save(options.out, job, png)
        report.add(job, answer["seconds"], answer["error"])
        told(len(jobs) - len(missing), len(jobs), job, answer["seconds"], answer["error"])
    for job in list(missing.values()):
        error = f"its worker died {options.retries + 1} time{'s' * (options.retries > 0)} on it"
        report.add(job, None, error)
        told(len(jobs), len(jobs), job, None, error)


def told(done, of, job, seconds, error):
    time_taken = "" if seconds is None else f" {seconds:.1f} s"
    print(printable(f"[{done}/{of}] {job.name}{time_taken}" + (f": {shown(error, LONGEST)}" if error else "")),
          file=sys.stderr, flush=True)


class Worker:
    """What Ray runs in a process of its own. All that goes wrong comes back as an answer."""

    def __init__(self, path, model, lora, threads, retries):
        self.retries, self.fatal = retries, None
        try:
            sys.path.extend(folder for folder in path if folder not in sys.path)
            import torch
            if threads:
                torch.set_num_threads(threads)
            from headless.painter import Painter
            self.painter = Painter(model=model, lora=lora)
        except Exception as error:
            self.fatal = f"{said(error)} (on {platform.node()})"

    def __call__(self, batch):
        import pyarrow
        answers, pictures = [], []
        for task in map(json.loads, batch["item"].to_pylist()):
            answer, png = ({"fatal": self.fatal}, None) if self.fatal else self.paint(task)
            answers.append(json.dumps(answer))
            pictures.append(png)
        return pyarrow.table({"answer": pyarrow.array(answers, pyarrow.string()),
                              "png": pyarrow.array(pictures, pyarrow.large_binary())})

    def paint(self, task):
        from PIL.PngImagePlugin import PngInfo
        start, png = time.monotonic(), None
        for _ in range(self.retries + 1):
            try:
                image = self.painter.paint(task["prompt"], seed=task["seed"], **task["more"])
                file, info = io.BytesIO(), PngInfo()
                info.add_text("svdq", json.dumps(task["origin"]))
                image.save(file, "PNG", pnginfo=info)
                png, error = file.getvalue(), None
                break
            except Exception as caught:
                error = said(caught)
                if refuses(caught):                     # another try says the same
                    break
        return {"job": task["job"], "seconds": round(time.monotonic() - start, 2), "error": error}, png


def refuses(error):
    """Whether it is one of svdq's, which may not be there to ask: a PackError, one line for people."""
    return any(base.__name__ == "PackError" for base in type(error).__mro__)


def said(error):
    return str(error) if refuses(error) else traceback.format_exception_only(error)[-1].strip()


def stop_in_order():
    """The first signal ends the run with the workers and the report in order; another Ctrl-C ends it at once."""
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]          # which nohup says

    def stop(*_):
        for number in signals:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, stop)


if __name__ == "__main__":
    stop_in_order()
    sys.exit(main())
