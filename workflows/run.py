#!/usr/bin/env python3
"""Run a workflow without a browser and save what comes out.

    python3 workflows/run.py                              the demo: the small SVDQ model that comes with the pack
    python3 workflows/run.py --set "Prompt.text=two red hearts on a blue background" --count 3
    python3 workflows/run.py --list                       bundled workflows: the number in front need not be said
    python3 workflows/run.py --show kontext-edit          what can be set in one, and which files of models it needs
    python3 workflows/run.py kontext-edit --set Picture.image=@photo.png --set "Prompt.text=make it night" --seed 7
    python3 workflows/run.py my.json --server gpu:8188 --json       also a picture that ComfyUI saved, with its graph

It uses the ComfyUI that runs at 127.0.0.1:8188. Where none does it starts the one this pack stands in (custom_nodes, or
COMFYUI_PATH), else a private one, which it makes once in .environment. The last lines on standard output are the paths of the
files that were saved, or what a workflow without any says; everything else goes to standard error. docs/headless.md has more.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
import urllib.parse
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path

from headless import download, environment, graph, outputs
from headless.client import HEADER, Client, Failed, Interrupted, Rejected, ServerError, TimedOut
from headless.messages import LONGEST, UsageError, first, printable, shown
from headless.process import ComfyProcess
from headless.progress import Progress

DEMO = "svdq-00-demo"
PORT = 8188                     # ComfyUI's own
PROBE = 30                      # seconds that a ComfyUI at the default address may take to answer: it may be loading a model
CHOICES = 12                    # of an input that --show names
EXIT_CODES = """exit codes:
  0    done
  1    a node failed, or nothing came out, or a download failed
  2    bad arguments or workflow, or ComfyUI refuses it: also where it lacks a file or a node
  3    no ComfyUI: none could be found, made, started or reached
  4    --timeout has passed
  130  interrupted; what was queued is taken out of ComfyUI's queue
  141  nobody reads the output any more
"""


@dataclass
class Result:
    """What --json prints of a run."""
    prompt_id: str | None = None
    seconds: float | None = None
    files: list = field(default_factory=list)
    seeds: dict = field(default_factory=dict)
    texts: list = field(default_factory=list)
    error: str | None = None


CODES = {UsageError: 2, Rejected: 2, Failed: 1, download.DownloadError: 1, environment.SetupError: 3, ServerError: 3,
         TimedOut: 4, Interrupted: 130, KeyboardInterrupt: 130}


def main(arguments=None):
    options = parser().parse_args(arguments)
    command = list_bundled if options.list else show if options.show else look if options.open else run
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # what Python would still write at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except tuple(CODES) as error:
        return complain(options, error)


def parser():
    new = argparse.ArgumentParser(description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("workflow", nargs="?", default=DEMO, metavar="WORKFLOW",
                     help=f"a bundled workflow, or a file in API format, JSON or a PNG of ComfyUI's; default: {DEMO}")
    what = new.add_argument_group("in the place of running it").add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the bundled workflows, with GB of the files they need")
    what.add_argument("--show", action="store_true", help="what can be set, to what, and which files of models are missing")
    what.add_argument("--open", action="store_true", help="open the workflow in ComfyUI in a browser, and print the address")

    inputs = new.add_argument_group("inputs")
    inputs.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="changes",
                        help="change an input; NODE is an id, a title, or a node type; VALUE is text for a text, else JSON, or "
                             "@FILE: a picture, sound or video to upload, or a text. NODE.mask=@FILE, white where it shall be "
                             "painted anew, for a Load Image")
    inputs.add_argument("--seed", type=seed, metavar="N|random", help="for all nodes that have a seed; default: the workflow's")
    inputs.add_argument("--count", type=whole, default=1, metavar="N", help="run it so often, each time with the next seed")
    inputs.add_argument("--prompts", metavar="FILE|NODE.INPUT=FILE",
                        help="run it for each line of a file (- is standard input; empty lines and those with # are none) as "
                             "the prompt, or as the input that is named")

    server = new.add_argument_group("ComfyUI")
    which = server.add_mutually_exclusive_group()
    which.add_argument("--server", metavar="URL", help="use this one: http(s)://[USER:PASSWORD@]HOST[:PORT] or HOST:PORT")
    which.add_argument("--new", action="store_true", help="start one, even where one runs")
    server.add_argument("--header", action="append", default=[], metavar="HEADER", dest="headers",
                        help='send this with each request, such as "Authorization: Bearer TOKEN"; @FILE: its lines')
    server.add_argument("--ca", metavar="FILE", help="trust the certificates of this authority (PEM), of an https server")
    server.add_argument("--timeout", type=seconds, metavar="SECONDS",
                        help="give up a run that takes longer, waiting in the queue included, starting a ComfyUI not")
    server.add_argument("--download", action="store_true", help="fetch files of models that are missing, after asking")
    server.add_argument("--yes", action="store_true", help="do not ask")

    said = new.add_argument_group("output")
    said.add_argument("--out", type=Path, default=environment.ROOT / "output", metavar="DIR",
                      help="where to save; default: output in this repository")
    said.add_argument("--json", action="store_true",
                      help="print one object per run: prompt_id, seconds, files, seeds, texts, error; of --list and --show one")
    said.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")
    return new


def whole(text):
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:20]) <= 10**9:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number from 1")
    return int(text)


def seed(text):
    if text == "random":
        return text
    if not text.isascii() or not text.isdecimal() or int(text[:21]) > graph.MAX_SEED:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be random, or 0 to {graph.MAX_SEED}")
    return int(text)


def seconds(text):
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number above 0")
    return number


def complain(options, error):
    """Say what went wrong. Returns the exit code."""
    text = str(error) or "interrupted"
    print(f"run.py: {printable(text, lines=True)}", file=sys.stderr, flush=True)
    if options.json:
        print_json(dataclasses.replace(getattr(error, "result", Result()), error=text))
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def print_json(something):
    print(json.dumps(dataclasses.asdict(something) if dataclasses.is_dataclass(something) else something), flush=True)


# ---- running a workflow ----

def run(options):
    """The exit code: 0, or that of the first run that failed where there are others."""
    prompt = loaded(options)
    lines = prompts(options, prompt)
    several = len(lines) * options.count > 1
    next(variants(options, prompt, lines))              # what is wrong with it is said before a ComfyUI is started
    if (why := outputs.refusal(options.out)) is not None:
        raise UsageError(f"--out {shown(options.out, LONGEST)}: cannot be written: {why}. Choose another folder.")
    progress, failed = Progress(quiet=options.quiet), 0
    with comfyui(options, progress, prompt) as (client, server):
        download.complete(prompt, client, progress, is_ours=server is not None, wanted=options.download, agreed=options.yes)
        graph.resolve(prompt, client)
        for made in variants(options, prompt, lines):
            result = Result(seeds=graph.seeds(made))
            try:
                execute(client, made, options, progress, result)
            except tuple(CODES) as error:
                error = explained(error, server)
                error.result = result
                if not several or not isinstance(error, (Failed, TimedOut)) or dead(server):
                    raise error from None
                code = complain(options, error)
                failed = failed or code
            else:
                report(options, result, progress)
    return failed


def loaded(options):
    prompt = graph.load(options.workflow)
    for change in options.changes:
        graph.apply(prompt, change)
    return prompt


def prompts(options, prompt):
    """[(id of a node, name of its input, text)] of the file of --prompts; without one [None]."""
    if options.prompts is None:
        return [None]
    where, equals, file = options.prompts.partition("=")
    if not equals or os.path.exists(options.prompts):
        where, file = graph.prompt_place(prompt), options.prompts
    if "." not in where:
        raise UsageError(f"--prompts {shown(options.prompts)}: must be FILE or NODE.INPUT=FILE")
    place = graph.locate(prompt, where, f"--prompts {shown(options.prompts)}")
    if file == "-" and sys.stdin is None:
        raise UsageError("--prompts -: standard input is closed.")
    data = sys.stdin.buffer.read() if file == "-" else graph.read(file)
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except ValueError:
        raise UsageError(f"--prompts {shown(file, LONGEST)}: is no text in UTF-8.") from None
    found = [(*place, line) for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"--prompts {shown(file, LONGEST)}: has no prompt in it.")
    return found


def variants(options, prompt, lines):
    """The graph of each run: every line, and for each as many seeds as --count says."""
    for line in lines:
        for number in range(options.count):
            made = copy.deepcopy(prompt)
            if line is not None:
                graph.put(made, *line, "--prompts")
            graph.reseed(made, options.seed, number)
            yield made


def execute(client, prompt, options, progress, result):
    """Run a graph and save what comes out. Fills in the result. What is queued is taken back when this ends early."""
    start = time.monotonic()
    client.deadline = options.timeout and start + options.timeout
    progress.begin(prompt)
    try:
        result.prompt_id = client.queue(prompt)
        client.follow(result.prompt_id, progress.on_event)
        for name, data in client.files(result.prompt_id):
            result.files.append(str(save(options.out, name, data)))
        result.texts = client.texts(result.prompt_id)
    except (KeyboardInterrupt, TimedOut, ServerError, BrokenPipeError) as error:        # the last: nobody reads how it goes on
        if result.prompt_id:
            with contextlib.suppress(ServerError):      # it may be gone; we are leaving anyway
                client.interrupt(result.prompt_id)
        if isinstance(error, TimedOut):
            raise TimedOut(f"not done after {options.timeout:g} s, which --timeout allows; given up.") from None
        raise
    finally:
        client.deadline = None
        progress.end()
        result.seconds = round(time.monotonic() - start, 3)
    if not result.files and not result.texts:
        raise Failed("the workflow ended without a picture and without a text. It needs a node that saves or shows something, "
                     "such as SaveImage.")


def save(out, name, data):
    """Write under the server's file name, numbered where something else has it."""
    wanted = out.absolute() / Path(name).name
    try:
        return outputs.save(wanted, data)
    except (OSError, ValueError) as error:
        raise Failed(f"{shown(wanted, LONGEST)}: cannot be written: {getattr(error, 'strerror', None) or error}. The file "
                     "is in ComfyUI's output folder, too.") from None


def report(options, result, progress):
    """Standard output has the paths alone, or where there are none the texts."""
    for text in dict.fromkeys(result.texts) if result.files else ():
        progress.say(text)
    seeds = "".join(f", {place}={value}" for place, value in result.seeds.items())
    progress.say(f"done in {result.seconds:.1f} s{seeds}")
    if options.json:
        return print_json(result)
    for path in result.files:
        print(printable(path), flush=True)              # a path is one line
    for text in () if result.files else result.texts:
        print(printable(text, lines=True), flush=True)


# ---- which ComfyUI ----

@contextlib.contextmanager
def comfyui(options, progress, prompt=None, port=0):
    """(Client, the ComfyProcess that was started for it or None): the one of --server, the one that runs at the default
    address and has the nodes of the graph, or one that is started."""
    client = connect(options, options.server) if options.server else running(options, progress, prompt)
    if client:
        with client:
            yield client, None
        return
    with contextlib.redirect_stderr(io.StringIO()) if options.quiet else contextlib.nullcontext():
        comfy = environment.find() or environment.make()
    progress.say(f"starting ComfyUI in {comfy.comfy}")
    with ComfyProcess(comfy, port=port) as server, Client(server.url) as client:
        yield client, server


def connect(options, url):
    """A Client with what the options say of login and certificates. Raises UsageError."""
    headers = []
    for line in options.headers:
        for text in graph.read(line[1:]).decode("latin-1").splitlines() if line.startswith("@") else [line]:
            found = HEADER.fullmatch(text.strip())
            if text.strip() and not found:              # not shown: it may be half a secret
                raise UsageError('--header: must be "NAME: VALUE", or @FILE with such lines.')
            headers += [found.groups()] if found else []
    if options.ca and not url.startswith("https://"):
        raise UsageError(f"--ca is for a --server that begins with https://, and this is {shown(url.rpartition('@')[2])}.")
    try:
        return Client(url, headers, options.ca)
    except ValueError as error:
        raise UsageError(error) from None
    except OSError as error:
        raise UsageError(f"--ca {shown(options.ca, LONGEST)}: no file of certificates in PEM: "
                         f"{error.strerror or error}.") from None


def running(options, progress, prompt=None):
    """A Client of the ComfyUI at the default address, or None where there is none, or it does not know a node of the graph."""
    if options.new:
        return None
    client = connect(options, f"http://127.0.0.1:{PORT}")
    if not client.is_comfyui(PROBE):
        return None
    if lacking := graph.missing_nodes(prompt, client) if prompt else []:
        progress.say(f"the ComfyUI at {client.url} has no node {', '.join(first(list(map(shown, lacking)), 3))}: "
                     "another one serves")
        return None
    progress.say(f"using the ComfyUI at {client.url}; --new would start another")
    return client


def dead(server):
    return server is not None and server.process.poll() is not None


def explained(error, server):
    """With the log of a ComfyUI of ours, where it failed."""
    if server is None or not isinstance(error, (Failed, ServerError)):
        return error
    server.keep_log = True
    what = f"ComfyUI ended with code {server.process.returncode} while it ran the workflow." if dead(server) else error
    return type(error)(f"{what}\nThe server's log, {server.log}, ends with:\n{server.log_tail()}")


# ---- in the place of running it ----

def list_bundled(options):
    found = []
    for name in graph.bundled():
        about, files = graph.about(name)
        found.append({"name": name, "about": about, "gigabytes": round(sum(file.gigabytes or 0 for file in files), 1),
                      "models": [dataclasses.asdict(file) for file in files]})
    if options.json:
        print_json({"workflows": found})
    else:
        wide = max(len(one["name"]) for one in found)
        for one in found:
            more = "+" if any(model["gigabytes"] is None for model in one["models"]) else " "
            print(f"{one['name']:{wide}}  {one['gigabytes']:4.1f} GB{more} {one['about']}".rstrip())
    return 0


def show(options):
    """What can be set in a workflow. Choices, and which files are there, is asked of a ComfyUI that runs, or is to."""
    prompt, progress = loaded(options), Progress(quiet=options.quiet)
    with contextlib.ExitStack() as stack:
        client = None
        if options.server or options.new:
            client, _ = stack.enter_context(comfyui(options, progress))
        elif found := running(options, progress):
            client = stack.enter_context(found)
        settings, models = graph.settings(prompt, client), graph.models(prompt, client)
    name = graph.named(options.workflow)
    said = {"name": name or options.workflow, "about": graph.about(name)[0] if name else "",
            "server": client and client.url, "inputs": settings,
            "models": [{**dataclasses.asdict(model), "set": place, "there": there} for place, model, there, _ in models]}
    if options.json:
        print_json(said)
    else:
        print(printable("\n".join(lines_of(said)), lines=True))
    return 0


def lines_of(said):
    yield f"{shown(said['name'], LONGEST)}  {said['about']}".rstrip()
    yield ""
    for one in said["inputs"]:
        yield f"{shown(one['set'])}={shown(json.dumps(one['value'], ensure_ascii=False))}{shown_range(one)}"
    yield ""
    for model in said["models"]:
        state = {True: "there", False: "missing", None: "needed"}[model["there"]]
        yield f"{state:7}  {model['directory']}/{model['name']}" + f"  {model['gigabytes']} GB" * bool(model["gigabytes"]) + \
              f"  {model['url']}" * (not model["there"])
    if said["server"] is None:
        yield f"What else can be chosen, and which files are there, a ComfyUI would say, and none runs at 127.0.0.1:{PORT}: " \
              "--new starts one, --server names one."


def shown_range(one):
    """"   0 to 100", or the first of the choices."""
    if one["choices"] is not None:
        return f"   {', '.join(first([shown(choice) for choice in one['choices']], CHOICES))}"
    if one["min"] is not None and one["max"] is not None:
        return f"   {one['min']} to {one['max']}"
    return f"   {one['type']}" if one["type"] else ""


def look(options):
    """Show a ComfyUI in a browser; one that was started for it runs until Ctrl-C."""
    name, progress = graph.named(options.workflow), Progress(quiet=options.quiet)
    if name is None:
        raise UsageError(f"--open {shown(options.workflow, LONGEST)}: no bundled workflow. Leave it out, and drop the file on "
                         "ComfyUI's canvas.")
    with comfyui(options, progress, graph.load(name), PORT) as (client, server):
        pack = next((pack for pack, names in client.templates().items() if name in names), None)
        page = f"{client.url}/?{urllib.parse.urlencode({'template': name, 'source': pack})}" if pack else client.url
        print(page, flush=True)
        if os.name == "nt" or sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(page)                       # elsewhere it would be one in the terminal
        if server:
            progress.say("Ctrl-C ends it.")
            with contextlib.suppress(KeyboardInterrupt):
                server.process.wait()
                raise explained(ServerError(""), server)
    return 0


def interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):                  # stop the server on these too; Windows has no SIGHUP
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:      # which nohup says
            signal.signal(getattr(signal, name), interrupt)
    for stream in (sys.stdout, sys.stderr):             # a console of Windows, or LC_ALL=C, has not every letter
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
