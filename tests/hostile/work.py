"""Hostile work folders: a run of the quantiser goes on in one that was damaged, mixed with another's, or is in use.

The result has the bytes of an undisturbed run, or there is none; what lies beside it stays as it is. The arithmetic is
remembered, so that the layers of these few models are made once.
"""

import contextlib
import errno
import json
import os
import shutil
import zlib

import torch

from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.quantize import FileSource, quantize, run
from svdq_pack.svdq.quantize.calibration import inputs
from svdq_pack.tests.hostile import containers, models
from svdq_pack.tests.hostile.frame import LOADED, REFUSED, Case, Fault, Hostile, data_bytes, full_disk

TARGET, WORK = "new.safetensors", "new.safetensors.svdq-work"


class Stop(Exception):
    """What a user's Cancel raises."""


class Source:
    """A model in memory, as the node's is."""
    name, fingerprint = "flux", "1"

    def __init__(self, path):
        file = FileSource(path)
        self.shape, self.values = file.shape, dict(file.plain())
        self.layers = {name: file.layer(name) for name in inputs(file.shape)}

    def layer(self, name):
        return self.layers[name]

    def plain(self):
        return self.values.items()


class WorkFolders(Hostile):
    name, share = "work", 1

    def __init__(self, folder):
        super().__init__(folder)
        for name in ("quantise_w4a4", "quantise_awq", "smoothing"):
            setattr(run, name, remembered(getattr(run, name)))
        self.source, self.statistics = Source(models.write_dense(folder / "flux.safetensors", folder)), models.statistics()
        self.fsync, os.fsync = os.fsync, lambda descriptor: None
        self.target, self.work = folder / TARGET, folder / WORK
        self.finished = {}                  # of a run with this seed and precision: {name in its work folder: bytes}
        for seed, precision in ((0, "int4"), (1, "int4"), (0, "nvfp4")):
            self.stopped_at("writing new", seed=seed, precision=precision)
            self.finished[seed, precision] = {path.name: path.read_bytes() for path in self.work.iterdir()}
            if not seed and precision == "int4":
                self.quantize(self.target)
                self.whole = self.target.read_bytes()
                self.target.unlink()
            shutil.rmtree(self.work, ignore_errors=True)
        self.mine = self.finished[0, "int4"]
        self.blocks = sorted(name for name in self.mine if name.endswith(".safetensors"))
        for name in (".other.safetensors.abc.part", "new.json", "other.safetensors", ".new.safetensors2.x.part", "notes.txt"):
            (folder / name).write_text("precious")
        (folder / "other.safetensors.svdq-work").mkdir()
        (folder / "other.safetensors.svdq-work" / ".x.part").write_text("precious")

    def close(self):
        os.fsync = self.fsync

    def quantize(self, target, precision="int4", **options):
        quantize(self.source, target, precision, 16, self.statistics, **options)

    def stopped_at(self, text, **options):
        def progress(now):
            if now.text.startswith(text):
                raise Stop

        with contextlib.suppress(Stop):
            self.quantize(self.target, progress=progress, **options)

    # ---- cases

    def resumed(self, files, target=None, outcome=None, progress=None):
        """files {name in the work folder: bytes, or function(path)}"""
        if files is not None:
            self.work.mkdir()
            for name, content in files.items():
                content(self.work / name) if callable(content) else (self.work / name).write_bytes(content)
        target = target or self.target

        def use():
            self.quantize(target, progress=progress)
            if target.read_bytes() != self.whole:
                raise Fault("another result than an undisturbed run")
            if self.work.is_dir() and files is not None:
                raise Fault("the work folder stays")

        name = os.path.basename(target)
        return Case(use, outcome=outcome, makes=(name,), keeps=(f"{name}.svdq-work",), touches=(WORK,))

    def good(self, rng):
        self.block = rng.choice(self.blocks)
        return self.mine[self.block]

    def of_bytes(self, rng, raw):
        return self.resumed(self.mine | {self.block: raw})

    @data_bytes
    def block_data(self, rng):
        return self.of_bytes(rng, containers.flip_data(rng, self.good(rng)))

    def block_of_another(self, rng):
        """Of a run with another seed or precision, or another block of this one."""
        name = rng.choice(self.blocks)
        content = self.finished[rng.choice(list(self.finished))][rng.choice((name, name, rng.choice(self.blocks)))]
        return self.resumed(self.mine | {name: content})

    def job(self, rng):
        text = self.mine["job.json"].decode()
        job = json.loads(text)
        key = rng.choice(list(job))
        at = rng.randrange(len(text))
        job[key] = rng.choice((None, 0, 1, -1, 10**400, "x", [], {}, "<img src=x onerror=alert(1)>", "\x1b[2J"))
        content = rng.choice((json.dumps(job), json.dumps(job), text[:at], text[:at] + "\x1b" + text[at + 1:], "[" * 100_000,
                              "", "null", "NaN", '{"a": ' + "9" * 5000 + "}", json.dumps({**json.loads(text), "more": 1})))
        return self.resumed(self.mine | {"job.json": rng.choice((content.encode(), content.encode("utf-16")))})

    def odd_files(self, rng):
        """Pipes, links, folders, files of others, leftovers of a killed run; missing blocks."""
        name = rng.choice((*self.blocks, "job.json"))
        odd = rng.choice((os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path), lambda path: os.symlink(path.name,
                                                                                                                 path),
                          lambda path: os.symlink("/dev/zero", path), lambda path: path.write_bytes(b""),
                          lambda path: os.symlink(self.folder / "other.safetensors", path)))
        files = dict(self.mine)
        kind = rng.randrange(4)
        if kind == 0:
            files[name] = odd
        elif kind == 1:
            del files[name]
        elif kind == 2:
            files[rng.choice((f".{name}.abc.part", "job.part", ".x.part"))] = rng.choice((odd, b"half"))
        else:
            files = {rng.choice(("notes.txt", ".x.part", "job.json", "a.safetensors", name)): rng.choice((odd, b"precious"))}
        return self.resumed(files)

    def odd_folder(self, rng):
        """Where the work folder should be: a file, a link to the folder of another run, a pipe."""
        rng.choice((lambda: self.work.write_text("precious"), lambda: self.work.symlink_to("other.safetensors.svdq-work"),
                    lambda: os.mkfifo(self.work), lambda: self.work.symlink_to("nowhere"), lambda: self.work.symlink_to("/"),
                    lambda: self.work.symlink_to(".")))()
        return self.resumed(None)

    def odd_target(self, rng):
        """Names that are patterns, or long, or there already."""
        name = rng.choice(("*", "?", "[a-z]*", "**", "*.safetensors", "new.safetensors2", "a\0b", "x" * 300, "x" * 240, "..",
                           "\x1b[2J",
                           "a\nb", "other", "flux", "\udcff", "ü", "no/a", "a ", "[new]", "{new}", "CON"))
        kind = rng.randrange(3)
        target = self.folder / (name if kind == 0 else f"{name}.safetensors")
        return self.resumed(None, target, outcome=REFUSED if set(name) & set("*?[]\0\n\x1b") else None)

    def two_runs(self, rng):
        """A second one begins in the middle of the first, which may be anywhere."""
        files = dict(self.mine)
        for name in rng.sample(self.blocks, rng.randrange(len(self.blocks) + 1)):
            del files[name]
        at, calls = rng.randrange(12), []

        def progress(now):
            calls.append(now)
            if len(calls) != at + 1:
                return
            try:
                self.quantize(self.target)
            except CheckpointError:
                return
            if self.target.read_bytes() != self.whole:
                raise Fault("another result than an undisturbed run")

        case = self.resumed(files, progress=progress)
        case.keeps = TARGET, WORK           # the second may be the one that finishes
        return case

    def full_disk(self, rng):
        """At any write. The message names a path, and nothing is left but finished blocks."""
        files = dict(self.mine)
        del files[rng.choice(self.blocks)]
        case, writes = self.resumed(files), rng.randrange(3)
        code = rng.choice((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG))

        def use(consume=case.consume):
            with full_disk(writes, code):
                consume()

        case.consume, case.named = use, self.folder.name
        return case

    def stopped(self, rng):
        """Anywhere, and run again: the same bytes."""
        files = dict(self.mine)
        for name in rng.sample(self.blocks, rng.randrange(len(self.blocks) + 1)):
            del files[name]
        at, case = rng.randrange(30), None
        calls = []

        def progress(now):
            calls.append(now)
            if len(calls) == at:
                raise Stop

        case = self.resumed(files, outcome=LOADED)

        def use(consume=case.consume):
            with contextlib.suppress(Stop):
                self.quantize(self.target, progress=progress)
                self.target.unlink()
            consume()

        case.consume = use
        return case

    def target_of_another(self, rng):
        """Somebody else makes a file of this name while the run goes on."""
        at, calls = rng.randrange(8), []

        def progress(now):
            calls.append(now)
            if len(calls) == at + 1 and not self.target.exists():
                self.target.write_text("precious")

        case = self.resumed(self.mine, progress=progress)

        def use(consume=case.consume):
            try:
                consume()
            except CheckpointError:
                if self.target.exists() and self.target.read_text() != "precious":
                    raise Fault("a file of others was overwritten") from None
                raise

        case.consume, case.keeps = use, (TARGET,)
        return case

    mutations = containers.of_files(2) | {block_data: 14, block_of_another: 12, job: 15, odd_files: 20, odd_folder: 4,
                                          odd_target: 12, two_runs: 4, full_disk: 4, stopped: 2, target_of_another: 4}


def remembered(function, values=True):
    """The same answer for the same arguments, or with values=False for those of the same shapes, computed once."""
    answers = {}

    def key(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype, values and zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy())
        if isinstance(value, (list, tuple)):
            return tuple(map(key, value))
        return tuple(map(key, vars(value).values())) if hasattr(value, "__dict__") else value

    def answer(*args, **options):
        asked = key(args), key(sorted(options.items()))
        if asked not in answers:
            answers[asked] = function(*args, **options)
        return answers[asked]

    return answer


CLASSES = (WorkFolders,)
