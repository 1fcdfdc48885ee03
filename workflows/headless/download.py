"""Fetch the files of models that a workflow needs and a ComfyUI on this machine lacks. Standard library only."""

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from . import graph
from .client import Rejected
from .environment import try_lock
from .messages import LONGEST, UsageError, printable, shown

HUB = "https://huggingface.co"          # HF_ENDPOINT names a mirror of it, HF_TOKEN who asks
SILENCE = 60                            # seconds without a byte
PIECE = 1 << 20                         # bytes
SPARE = 1 << 30                         # bytes that stay free on the disk


class DownloadError(Exception):
    """A file could not be had. What came of it is kept for the next time."""


def complete(prompt, client, progress, *, is_ours, wanted, agreed):
    """Have the server know the files of models that a graph names, as far as templates of ours name them.

    is_ours   whether the server was started for this
    wanted    whether to download what it lacks; agreed: without asking

    Raises Rejected, which says what is missing and where it can be had; UsageError where nobody agrees, DownloadError.
    """
    lacking = missing(prompt, client)
    if not lacking:
        return
    files = list({model.name: model for _, model, _ in lacking}.values())
    said = f"ComfyUI has not {'this file' if len(files) == 1 else 'these files'} of models:\n"
    for model in files:
        size = f" ({model.gigabytes:g} GB)" if model.gigabytes else ""
        said += f"  {model.directory}/{model.name}{size}: {address(model.url)}\n"
    for place, model, choices in lacking:
        for near in (choice for choice in choices if isinstance(choice, str) and Path(choice).name == model.name):
            said += f"It has {shown(near, LONGEST)}: --set {json.dumps(f'{place}={near}')}\n"
    if not wanted:
        raise Rejected(f"{said}Put {'it' if len(files) == 1 else 'them'} there below its models folder, or say --download.")
    folders = client.model_folders() if is_ours or is_here(client.url) else {}
    places = {model: folder_of(folders.get(model.directory) or [], model) for model in files}
    if None in places.values():
        raise Rejected(f"{said}The ComfyUI at {client.url} keeps its models on another machine: put them there.")
    if not agreed:
        ask(f"{said}They go to {', '.join(dict.fromkeys(str(folder) for folder in places.values()))}.")
    for model, folder in places.items():
        fetch(model.url, folder / model.name, Bytes(model.name, progress.step, progress.live))
        progress.end()
    client.forget()
    if lacking := missing(prompt, client):
        raise Rejected(f"{lacking[0][1].name} was saved in {places[lacking[0][1]]}, and the ComfyUI at {client.url} does not "
                       "see it there. Is it on another machine?")


def missing(prompt, client):
    """[(place, Model, choices)]"""
    return [(place, model, choices) for place, model, there, choices in graph.models(prompt, client) if there is False]


def is_here(url):
    host = urllib.parse.urlsplit(url).hostname
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def folder_of(folders, model):
    """Which of a server's folders for a kind of model takes a file: one that is on this machine, by the kind's own name."""
    here = [Path(folder) for folder in folders if os.path.isdir(os.path.dirname(folder))]
    return next((folder for folder in here if folder.name == model.directory), here[0] if here else None)


def ask(question):
    """Returns when the user agrees. Raises UsageError."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"{question}\nNobody is there to agree: say --yes, too.")
    print(f"{printable(question, lines=True)}\nDownload? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was downloaded.")


def address(url):
    """Where a file of the hub is fetched from."""
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return mirror + url.removeprefix(HUB) if mirror and url.startswith(f"{HUB}/") else url


def fetch(url, target, on_bytes=lambda done, total: None):
    """Download a file to the path target, going on where target.part ends. `on_bytes` is called with (bytes done, bytes in all
    or None). The size must be the announced one, and the SHA-256 where the hub tells it. Raises DownloadError."""
    part, who = target.with_name(f"{target.name}.part"), shown(address(url), LONGEST)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            if not try_lock(file):
                raise DownloadError(f"{who}: another process is downloading it.")
            total, digest = _receive(url, file, on_bytes)
        if total is not None and part.stat().st_size > total:
            part.unlink()
            raise DownloadError(f"{who}: what an earlier download left was another file, and is removed. Run this again.")
        if total is not None and part.stat().st_size != total:
            raise DownloadError(f"{who}: the connection ended after {part.stat().st_size:,} of {total:,} bytes. Run this again "
                                "to continue.")
        if digest and _sha256(part) != digest:
            part.unlink()
            raise DownloadError(f"{who}: what came is not the file: its SHA-256 is not {digest}. Run this again.")
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{who}: answered HTTP {error.code}. {_what_helps(error.code, url)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:       # URLError is an OSError
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DownloadError(f"{who}: {shown(why)}. Run this again to continue.") from None


def _receive(url, file, on_bytes):
    """Append what is left of a file. Returns (bytes in all or None, its SHA-256 or None)."""
    done = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(address(url), headers={"User-Agent": "ComfyUI-SVDQ"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    if os.environ.get("HF_TOKEN") and url.startswith(f"{HUB}/"):
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    noted = _Noting()
    try:
        answer = urllib.request.build_opener(noted).open(request, timeout=SILENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:                  # nothing is left: it was complete
            return _size(error.headers.get("Content-Range", "")), noted.digest
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":                # a login, or what a hotel has to say
            raise DownloadError(f"{shown(address(url), LONGEST)}: a web page came in the place of the file. Look at it in a "
                                "browser.")
        if answer.status != 206:                        # the server knows no parts: from the beginning
            file.truncate(done := 0)
        length = answer.headers.get("Content-Length")
        total = _size(answer.headers.get("Content-Range", "")) if answer.status == 206 else length and int(length)
        free = shutil.disk_usage(Path(file.name).parent).free
        if total and total - done > free - SPARE:
            raise DownloadError(f"{shown(file.name, LONGEST)}: {(total - done) / 1e9:.1f} GB are to come, and {free / 1e9:.1f} "
                                "GB of the disk are free.")
        with contextlib.suppress(*[http.client.IncompleteRead] if total is not None else []):      # the size tells
            while piece := answer.read(PIECE):
                file.write(piece)
                done += len(piece)
                on_bytes(done, total)
    return total, noted.digest


class _Noting(urllib.request.HTTPRedirectHandler):
    """Notes the SHA-256 that the hub tells before it leads to where the bytes are."""
    digest = None

    def redirect_request(self, request, file, code, message, headers, url):
        tag = (headers.get("X-Linked-Etag") or "").strip('"')
        self.digest = tag if re.fullmatch("[0-9a-f]{64}", tag) else self.digest
        return super().redirect_request(request, file, code, message, headers, url)


def _size(content_range):
    """The total of "bytes 5-9/10" or "bytes */10"."""
    total = content_range.rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _what_helps(code, url):
    page = urllib.parse.urlsplit(url)._replace(path=urllib.parse.urlsplit(url).path.partition("/resolve/")[0]).geturl()
    if code in (401, 403):
        return f"Accept the license at {page}, and set HF_TOKEN to a token of yours."
    return f"See {page}."


class Bytes:
    """Says how much of a file has come: twice a second on a terminal, at each tenth elsewhere."""

    def __init__(self, name, say, live):
        self.name, self.say, self.live = name, say, live
        self.next_time, self.next_tenth = 0.0, 0

    def __call__(self, done, total):
        now, tenth = time.monotonic(), 10 * done // total if total else done >> 30
        if now >= self.next_time if self.live else tenth >= self.next_tenth:
            self.next_time, self.next_tenth = now + 0.5, tenth + 1
            self.say(f"{self.name}: {done / 1e9:.2f}{f' of {total / 1e9:.2f}' if total else ''} GB")
