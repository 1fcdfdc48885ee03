"""A workflow in API format: where it comes from (load), what is set in it (apply, reseed, resolve), and what can be (show).

    {node id: {"class_type": ..., "inputs": {name: value, or [id, number of an output]}, "_meta": {"title": ...}}}

Bundled ones stand in workflows/api. Of each there is the form for ComfyUI's canvas, too, which says what it is and which
files of models it needs, with address and size: Model, about, models.
"""

import functools
import json
import os
import random
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from .environment import ROOT
from .messages import LONGEST, MOST, UsageError, first, shown

BUNDLED = ROOT / "workflows" / "api"
NUMBER = re.compile(r"svdq-\d\d-")       # what the names of bundled workflows begin with and need not be said
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 64 << 20                      # bytes of a file; the longest workflows have some 0.1 MB
PICTURE_SIZE = 1 << 30                  # bytes of a picture, sound or video
SEEDS = ("seed", "noise_seed")          # what ComfyUI's nodes call it
MAX_SEED = 2**64 - 1
UPLOADS = ("image_upload", "audio_upload", "video_upload", "file_upload")       # inputs with a button for it in the browser
FILES = ("image", "audio", "video", "file")                                     # what such inputs are called
PICTURE, MASK = "LoadImage", "LoadImageMask"
PICTURE_MASK = 1                        # the number of LoadImage's output of its mask
# A line of a template's note: a file that it needs
NEEDED = re.compile(r"^- \*\*(?P<directory>[\w-]+)\*\* / \[(?P<name>[^]]+)\]\((?P<url>[^)]+)\)(?: \((?P<size>[\d.]+) GB\))?"
                    r"(?P<more>.*(?:\n  .*)?)", re.M)
OTHER = re.compile(r"\[(?P<name>[^]]+\.safetensors)\]\((?P<url>[^)]+)\)")       # one to take in its place


# ---- where it comes from ----

def bundled():
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def named(workflow):
    """The name of a bundled workflow that is called so, with or without its number, or None."""
    return next((name for name in bundled() if workflow in (name, NUMBER.sub("", name))), None)


def load(workflow):
    """The graph of a bundled workflow, or of a file: JSON, or a PNG that ComfyUI has saved. Raises UsageError."""
    name = named(workflow)
    path = BUNDLED / f"{name}.json" if name else Path(workflow)
    who = shown(path, LONGEST)
    if not os.path.isfile(path):
        raise UsageError(f"{shown(workflow, LONGEST)}: neither a file nor a bundled workflow. Bundled are "
                         f"{', '.join(first(bundled(), 5))}; --list names all.")
    data = read(path, PICTURE_SIZE if path.suffix.lower() == ".png" else LARGEST)
    try:
        prompt = json.loads((inside(data) if data.startswith(PNG) else data).decode("utf-8-sig"))
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


def read(path, largest=LARGEST):
    """Bytes of a file that a user names. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:              # ValueError: a NUL in the path
        raise UsageError(f"{shown(path, LONGEST)}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(data) > largest:
        raise UsageError(f"{shown(path, LONGEST)}: has more than {largest:,} bytes, which none of its kind needs.")
    return data


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


# ---- what its nodes are called ----

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


def place(prompt, id, name):
    """What --set calls an input: by its node's title, or where others have that, too, by its id."""
    node = title(prompt, id)
    return f"{node if matches(prompt, node) == [id] else id}.{name}"


def describe(prompt, id):
    return f"{shown(id)}: {shown(title(prompt, id))} ({shown(prompt[id]['class_type'])})"


# ---- what is set in it ----

@dataclass(frozen=True)
class File:
    """The value of an input until `resolve` gives its place to what the server makes of it."""
    path: str
    data: bytes


def apply(prompt, change):
    """Carry out one NODE.INPUT=VALUE. VALUE is JSON, else text; text alone where the input has a text, but for a string in
    quotes and a link; @PATH is a File; @PATH for the mask of a Load Image takes the place of its alpha channel. Raises
    UsageError."""
    where, equals, text = change.partition("=")
    said = f"--set {shown(change)}"
    if not equals or "." not in where:
        raise UsageError(f"{said}: must be NODE.INPUT=VALUE")
    id, name = locate(prompt, where, said)
    value = value_of(text, said)
    if isinstance(prompt[id]["inputs"].get(name), str) and not isinstance(value, (str, File)) and not is_link(prompt, value):
        value = text                        # a prompt of 1.50 is no number, and one of true no truth
    if (name, prompt[id]["class_type"]) == ("mask", PICTURE) and isinstance(value, File):
        use_mask(prompt, id, value, said)
    else:
        put(prompt, id, name, value, said)


def locate(prompt, where, said):
    """(id, name) of NODE.INPUT. Titles and inputs may contain dots: the first split that names a node is taken."""
    dots = [i for i, letter in enumerate(where) if letter == "."]
    node, name = next(((where[:i], where[i + 1:]) for i in dots if matches(prompt, where[:i])),
                      (where[:dots[0]], where[dots[0] + 1:]))
    found = matches(prompt, node)
    if len(found) != 1:
        choices = "\n".join(f"  {text}" for text in first([describe(prompt, id) for id in found or prompt], MOST))
        raise UsageError(f"{said}: {'several nodes are' if found else 'no node is'} called {shown(node)}. "
                         f"Use the id of one of\n{choices}")
    return found[0], name


def put(prompt, id, name, value, said):
    inputs = prompt[id]["inputs"]
    if name not in inputs:
        raise UsageError(f"{said}: {describe(prompt, id)} has no input {shown(name)}. "
                         f"It has {', '.join(first(list(map(shown, inputs)), MOST)) or 'none'}.")
    inputs[name] = value


def value_of(text, said):
    if text.startswith("@"):
        try:
            return File(text[1:], read(text[1:], PICTURE_SIZE))
        except UsageError as error:
            raise UsageError(f'{said}: {error} For a text that begins with @ write it in quotes: "\\"@...\\"".') from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def use_mask(prompt, id, file, said):
    """The mask of a picture is a file of its own: white where it shall be painted anew."""
    takers = [(inputs, name) for inputs in (node["inputs"] for node in prompt.values()) for name, value in inputs.items()
              if value == [id, PICTURE_MASK]]
    if not takers:
        raise UsageError(f"{said}: no node of this workflow takes the mask of {describe(prompt, id)}.")
    mask = f"{id}:mask"
    prompt[mask] = {"class_type": MASK, "inputs": {"image": file, "channel": "red"},
                    "_meta": {"title": f"{title(prompt, id)} mask"}}
    for inputs, name in takers:
        inputs[name] = [mask, 0]


def is_seed(name, value):
    return name in SEEDS and isinstance(value, int) and not isinstance(value, bool)


def seeds(prompt):
    """{place: seed} of the nodes that have one, by whatever is linked to none."""
    return {place(prompt, id, name): value for id, node in prompt.items() for name, value in node["inputs"].items()
            if is_seed(name, value)}


def reseed(prompt, seed, number):
    """The seeds of picture `number` of several, from 0. seed: None counts on from the graph's own, "random" throws one, an
    int is the first picture's. All nodes that have a seed get it. Raises UsageError."""
    found = [(inputs, name) for inputs in (node["inputs"] for node in prompt.values()) for name, value in inputs.items()
             if is_seed(name, value)]
    if not found and (seed is not None or number):
        raise UsageError(f"the workflow has no input called {' or '.join(SEEDS)}, so every run would be the same. "
                         "Leave --seed and --count out.")
    if seed is None and not number:
        return                              # it may be one that means something to its node, such as -1
    thrown = random.SystemRandom().randrange(2**32)
    for inputs, name in found:
        inputs[name] = thrown if seed == "random" else ((inputs[name] if seed is None else seed) + number) % (MAX_SEED + 1)


def prompt_place(prompt):
    """Where the text stands that --prompts replaces: the input `text` of the node called Prompt, else of the only one that
    has such an input. Raises UsageError."""
    found = [id for id, node in prompt.items() if isinstance(node["inputs"].get("text"), str)]
    named = [id for id in found if title(prompt, id) == "Prompt"] or found
    if len(named) != 1:
        raise UsageError("--prompts: " + (f"several nodes have a text: {', '.join(describe(prompt, id) for id in named[:MOST])}"
                                          if named else "no node of this workflow has an input `text`")
                         + ". Say which: --prompts NODE.INPUT=FILE.")
    return f"{named[0]}.text"


def resolve(prompt, client):
    """Send the Files of a graph to the server, or set them as text where an input takes text. Raises UsageError."""
    for id, node in prompt.items():
        for name, file in node["inputs"].items():
            if isinstance(file, File):
                definition = client.definition(node["class_type"])
                if definition is None:
                    raise UsageError(f"the ComfyUI at {client.url} has no node {shown(node['class_type'])}. Is its pack "
                                     "installed there?")
                node["inputs"][name] = contents(place(prompt, id, name), file, declared(definition).get(name), client)
            elif name in FILES and isinstance(file, str) and os.path.isfile(file):
                widget = declared(client.definition(node["class_type"])).get(name)
                if takes_file(widget) and file not in (widget.choices or ()):
                    where = place(prompt, id, name)
                    raise UsageError(f"{shown(where)}: {shown(file, LONGEST)} is a file here, and none that the server has. To "
                                     f"upload it: --set {json.dumps(f'{where}=@{file}')}.")


def contents(where, file, widget, client):
    if takes_file(widget):
        return client.upload(Path(file.path).name, file.data)
    if widget and widget.kind == "STRING":
        try:
            return file.data.decode("utf-8-sig").rstrip("\r\n")
        except ValueError:
            raise UsageError(f"--set {shown(where)}: {shown(file.path, LONGEST)} is no text in UTF-8.") from None
    raise UsageError(f"--set {shown(where)}: takes {widget.kind if widget else 'no such input'}, and no file. Pictures, sound, "
                     "video and text can come from one.")


def takes_file(widget):
    return widget is not None and any(widget.options.get(upload) for upload in UPLOADS)


# ---- what its inputs are ----

@dataclass(frozen=True)
class Widget:
    """What the server says of an input. choices: None where it is no list to choose from."""
    kind: str
    choices: list | None
    options: dict


def declared(definition):
    """{input: Widget} of a node's entry in /object_info, or of None."""
    groups = (definition or {}).get("input") or {}
    found = {}
    for name, (kind, *options) in {**groups.get("required", {}), **groups.get("optional", {})}.items():
        options = options[0] if options and isinstance(options[0], dict) else {}
        choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
        found[name] = Widget("COMBO" if isinstance(kind, list) else kind, choices if isinstance(choices, list) else None,
                             options)
    return found


def settings(prompt, client=None):
    """[{set, value, type, choices, min, max}] of the inputs that no link fills; the last four from the server, if any."""
    found = []
    for id, node in prompt.items():
        widgets = declared(client.definition(node["class_type"])) if client else {}
        for name, value in node["inputs"].items():
            if not is_link(prompt, value):
                widget = widgets.get(name, Widget(None, None, {}))
                shows = f"@{value.path}" if isinstance(value, File) else value
                found.append({"set": place(prompt, id, name), "value": shows, "type": widget.kind, "choices": widget.choices,
                              "min": widget.options.get("min"), "max": widget.options.get("max")})
    return found


def is_link(prompt, value):
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in prompt


def missing_nodes(prompt, client):
    """Types of nodes that the server has not."""
    return [kind for kind in dict.fromkeys(node["class_type"] for node in prompt.values()) if client.definition(kind) is None]


# ---- which files of models it needs ----

@dataclass(frozen=True)
class Model:
    """A file that templates name: its directory in ComfyUI's models, where it can be had, GB where known."""
    name: str
    directory: str
    url: str
    gigabytes: float | None


def about(name):
    """(a sentence, [Model]) of a bundled workflow, out of the note of its canvas form."""
    path = BUNDLED.parent / f"{name}.json"
    if not path.is_file():
        return "", []
    texts = [node["widgets_values"][0] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]
             if node["type"] == "MarkdownNote"]
    head, _, rest = texts[0].partition("\n\n")
    head, said = head.removeprefix("## "), re.match(r".*?[.?!](?=\s|$)", rest.replace("*", ""))
    files = [Model(found["name"], found["directory"], found["url"], found["size"] and float(found["size"]))
             for found in NEEDED.finditer(texts[0])]
    return f"{head}{'' if head.endswith('?') else ':'} {said[0] if said else ''}".strip(), files


@functools.cache
def known_models():
    """{file name: Model} of all that bundled workflows name, and of what their notes name to take in its place."""
    found = {}
    for name in bundled():
        path = BUNDLED.parent / f"{name}.json"
        for model in about(name)[1]:
            found[model.name] = model
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"] if path.is_file() else ():
            for needed in NEEDED.finditer(node["widgets_values"][0]) if node["type"] == "MarkdownNote" else ():
                for other in OTHER.finditer(needed["more"]):
                    found.setdefault(other["name"], Model(other["name"], needed["directory"], other["url"], None))
    return found


def models(prompt, client=None):
    """[(place, Model, whether the server has it, its choices there)] of the files that a graph names and known_models knows;
    the last two None without a server, or where that has no such node."""
    found = []
    for id, node in prompt.items():
        for name, value in node["inputs"].items():
            model = known_models().get(value) if isinstance(value, str) else None
            if model:
                widget = declared(client.definition(node["class_type"])).get(name) if client else None
                choices = widget.choices if widget else None
                found.append((place(prompt, id, name), model, None if choices is None else value in choices, choices))
    return found
