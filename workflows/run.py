#!/usr/bin/env python3
"""Run a workflow without a browser and save its pictures.

    python3 workflows/run.py                              the demo: the small SVDQ model that comes with the pack
    python3 workflows/run.py --set "Prompt.text=two red hearts on a blue background"
    python3 workflows/run.py demo-lora --set Sampler.seed=7     one of workflows/api, "svdq-01-" left out, with another seed
    python3 workflows/run.py my.json --server http://127.0.0.1:8188     also a picture that ComfyUI saved, with its graph

Without --server it starts the ComfyUI this pack stands in (custom_nodes, or COMFYUI_PATH), else a private one, which it
makes once in .environment. The last lines printed are the paths of the pictures, or what a workflow without pictures says;
what nodes say beside pictures goes to standard error.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

from headless import environment, outputs
from headless.client import Client, Failed, Interrupted, Rejected, ServerError
from headless.messages import LONGEST, MOST, UsageError, first, printable, shown
from headless.process import ComfyProcess

BUNDLED = environment.ROOT / "workflows" / "api"
DEMO = "svdq-00-demo"
NUMBER = re.compile(r"svdq-\d\d-")       # what the names of bundled workflows begin with and need not be said
PNG = b"\x89PNG\r\n\x1a\n"
MAX_WORKFLOW = 64 << 20         # bytes of a file; the longest have some 0.1 MB
EXIT_CODES = """exit codes:
  0    done
  1    the workflow failed
  2    bad arguments or workflow, or ComfyUI refuses it
  3    no ComfyUI: none could be found, made, started or reached
  130  interrupted
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXIT_CODES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", nargs="?", default=DEMO, metavar="WORKFLOW",
                        help=f"a bundled workflow (see --list) or a file in API format; default: {DEMO}")
    parser.add_argument("--server", metavar="URL", help="use this running ComfyUI instead of starting one")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="changes",
                        help="change an input; NODE is an id, a title, or a node type; VALUE is JSON, else text")
    parser.add_argument("--out", type=Path, default=environment.ROOT / "output", metavar="DIR",
                        help="where to save the pictures; default: output in this repository")
    parser.add_argument("--list", action="store_true", help="list the bundled workflows")
    options = parser.parse_args(arguments)
    try:
        if options.list:
            print("\n".join(bundled()))
        else:
            for said in run(options):
                print(printable(said, lines=isinstance(said, str)))         # a path is one line
        return 0
    except (UsageError, Rejected) as error:
        return complain(error, 2)
    except Failed as error:
        return complain(error, 1)
    except (environment.SetupError, ServerError) as error:
        return complain(error, 3)
    except (Interrupted, KeyboardInterrupt) as error:
        return complain(str(error) or "interrupted", 130)


def complain(error, code):
    print(f"run.py: {printable(error, lines=True)}", file=sys.stderr)
    return code


def run(options):
    """Paths of the pictures; of a workflow without any, the texts that its nodes show."""
    prompt = load(options.workflow)
    for change in options.changes:
        apply(prompt, change)
    if options.server:
        try:
            server = Client(options.server)
        except ValueError as error:
            raise UsageError(error) from None
        make_room(options.out)
        with server as client:
            return execute(client, prompt, options.out)

    make_room(options.out)
    comfy = environment.find() or environment.make()
    print(f"starting ComfyUI in {comfy.comfy}", file=sys.stderr, flush=True)
    with ComfyProcess(comfy) as server, Client(server.url) as client:
        try:
            return execute(client, prompt, options.out)
        except (Failed, ServerError) as error:
            server.keep_log, code = True, server.process.poll()
            what = error if code is None else f"ComfyUI ended with code {code} while it ran the workflow."
            raise type(error)(f"{what}\nThe server's log, {server.log}, ends with:\n{server.log_tail()}") from None


def bundled():
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def load(workflow):
    """The graph {node id: {class_type, inputs, _meta}} of a bundled workflow, with or without its number, or of a file."""
    name = next((name for name in bundled() if workflow in (name, NUMBER.sub("", name))), None)
    path = BUNDLED / f"{name}.json" if name else Path(workflow)
    who = shown(path, LONGEST)
    if not os.path.isfile(path):
        raise UsageError(f"{shown(workflow, LONGEST)}: neither a file nor a bundled workflow. Bundled are "
                         f"{', '.join(first(bundled(), 5))}; --list names all.")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_WORKFLOW + 1)
        if len(data) > MAX_WORKFLOW:
            raise UsageError(f"{who}: has more than {MAX_WORKFLOW:,} bytes, which no workflow needs.")
        prompt = json.loads((inside(data) if data.startswith(PNG) else data).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{who}: cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{who}: not JSON ({shown(error)}). A workflow in API format is needed.") from None
    if isinstance(prompt, dict) and isinstance(prompt.get("nodes"), list):
        name = path.stem.removesuffix(".app")
        raise UsageError(f"{who}: this is the format ComfyUI's canvas saves. " + (
            f"It is bundled in API format: say {name}." if name in bundled() else
            "API format is needed; open the file in ComfyUI and choose Export (API) in its menu."))
    if not isinstance(prompt, dict) or not prompt or not all(
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
            for node in prompt.values()):
        raise UsageError(f"{who}: not a workflow in API format, which is {{id: {{class_type, inputs}}, ...}}. "
                         "Choose Export (API) in ComfyUI's menu.")
    return prompt


def inside(picture):
    """The graph that ComfyUI writes into the PNG files it saves: text chunks, each `size, kind, bytes, checksum`."""
    at = len(PNG)
    while at + 8 <= len(picture):
        size, kind = struct.unpack(">I4s", picture[at:at + 8])
        key, _, text = picture[at + 8:at + 8 + size].partition(b"\0")
        if (kind, key) == (b"tEXt", b"prompt"):
            return text
        at += 12 + size
    raise ValueError("a picture without a graph of ComfyUI in it")


def apply(prompt, change):
    """Carry out one NODE.INPUT=VALUE."""
    place, equals, text = change.partition("=")
    dots = [i for i, letter in enumerate(place) if letter == "."]
    said = f"--set {shown(change)}"
    if not equals or not dots:
        raise UsageError(f"{said}: must be NODE.INPUT=VALUE")
    # Titles and inputs may contain dots: take the first split that names a node.
    node, name = next(((place[:i], place[i + 1:]) for i in dots if matches(prompt, place[:i])),
                      (place[:dots[0]], place[dots[0] + 1:]))
    found = matches(prompt, node)
    if len(found) != 1:
        choices = "\n".join(f"  {text}" for text in first([describe(prompt, id) for id in found or prompt], MOST))
        raise UsageError(f"{said}: {'several nodes are' if found else 'no node is'} called {shown(node)}. "
                         f"Use the id of one of\n{choices}")
    inputs = prompt[found[0]]["inputs"]
    if name not in inputs:
        raise UsageError(f"{said}: {describe(prompt, found[0])} has no input {shown(name)}. "
                         f"It has {', '.join(first(list(map(shown, inputs)), MOST)) or 'none'}.")
    try:
        inputs[name] = json.loads(text)
    except (ValueError, RecursionError):
        inputs[name] = text


def matches(prompt, node):
    """Ids of the nodes with this id, else with this title, else of this type."""
    if node in prompt:
        return [node]
    return [id for id in prompt if title(prompt, id) == node] or \
           [id for id in prompt if prompt[id]["class_type"] == node]


def title(prompt, id):
    meta = prompt[id].get("_meta")
    found = meta.get("title") if isinstance(meta, dict) else None
    return found if isinstance(found, str) and found else prompt[id]["class_type"]


def describe(prompt, id):
    return f"{shown(id)}: {shown(title(prompt, id))} ({shown(prompt[id]['class_type'])})"


def make_room(out):
    """The folder for the pictures. Whether it can be written to is said now, not after minutes."""
    if (why := outputs.refusal(out)) is not None:
        raise UsageError(f"--out {shown(out, LONGEST)}: cannot be written: {why}. Choose another folder.")


def execute(client, prompt, out):
    start, prompt_id = time.monotonic(), client.queue(prompt)
    progress = Progress(prompt)
    try:
        client.follow(prompt_id, progress.on_event)
    except (KeyboardInterrupt, SystemExit):
        with contextlib.suppress(ServerError):          # it may be gone; we are leaving anyway
            client.interrupt(prompt_id)
        raise
    finally:
        progress.end()
    found, texts = [save(out, name, data) for name, data in client.files(prompt_id)], client.texts(prompt_id)
    if not found and not texts:
        raise Failed("the workflow ended without a picture and without a text. It needs a SaveImage node.")
    for text in dict.fromkeys(texts) if found else ():          # standard output has the paths alone
        print(printable(text, lines=True), file=sys.stderr)
    print(f"done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return found or texts


def save(out, name, data):
    """Write under the server's file name, numbered where something else has it."""
    wanted = out.absolute() / Path(name).name
    try:
        return outputs.save(wanted, data)
    except (OSError, ValueError) as error:
        raise Failed(f"{shown(wanted, LONGEST)}: cannot be written: {getattr(error, 'strerror', None) or error}. The picture "
                     "is in ComfyUI's output folder, too.") from None


class Progress:
    """One line that changes on a terminal, a line per event elsewhere."""

    def __init__(self, prompt, stream=sys.stderr):
        self.prompt, self.stream, self.live = prompt, stream, stream.isatty()
        self.started = set()

    def on_event(self, kind, data):
        if kind == "execution_cached":
            self.started.update(data["nodes"])
        elif kind == "executing" and data.get("node"):
            self.started.add(data["node"])
            self.show(data["node"])
        elif kind == "progress":
            self.show(data["node"], f", step {data['value']}/{data['max']}")

    def show(self, id, step=""):
        name = title(self.prompt, id) if id in self.prompt else id          # nodes may add nodes while they run
        line = printable(f"[{len(self.started)}/{len(self.prompt)}] {name[:LONGEST]}{step}")
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r{line[:width]:<{width}}" if self.live else line + "\n")
        self.stream.flush()

    def end(self):
        if self.live and self.started:
            self.stream.write("\n")


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):                  # stop the server on these too; Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(130))
    sys.exit(main())
