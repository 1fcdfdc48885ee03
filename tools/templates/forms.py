"""From a template's data (graphs.py) and ComfyUI's definitions of its nodes to the files that ComfyUI opens.

Definitions are those of /object_info: {node type: {"input", "output", "output_name", "display_name", "python_module"}}. Which
inputs a node has, in which order, which of them are widgets and what they hold if nobody says otherwise comes from there.
"""

import uuid
from dataclasses import dataclass, field

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
REGISTRY_ID, CORE_ID = "svdq", "comfy-core"
OURS, TEXT, NOTE = ({"color": "#223", "bgcolor": "#335"}, {"color": "#232", "bgcolor": "#353"},
                    {"color": "#222", "bgcolor": "#000"})
GROUP_COLOUR = "#3f789e"
ACTIVE, MUTED = 0, 2

# Pixels: a title bar lies above a node's position, a heading above a group's nodes.
TITLE, HEADING, PAD, APART, GAP, WIDEST = 30, 80, 10, 20, 54, 2500
SLOT, WIDGET = 20, 24
WIDTHS = {"SVDQModelLoader": 340, "SVDQHubLoader": 340, "UNETLoader": 340, "DualCLIPLoader": 340, "VAELoader": 340,
          "CLIPTextEncode": 340, "SaveImage": 440, "PreviewImage": 440, "SVDQInfo": 440, "SVDQDoctor": 440,
          "SVDQCompare": 440, "PreviewAny": 440, "SVDQQuantize": 340, "FluxKontextMultiReferenceLatentMethod": 320}
# For what a node shows beside its slots and widgets
ROOM = {"SVDQModelLoader": 90, "SVDQHubLoader": 90, "SVDQLoraLoader": 160, "CLIPTextEncode": 160, "SaveImage": 320,
        "PreviewImage": 260, "LoadImage": 240, "SVDQInfo": 300, "SVDQDoctor": 300, "SVDQCompare": 300, "PreviewAny": 180,
        "SVDQQuantize": 120}
LINE, LETTER = 18, 6.5                                  # of a note, about


@dataclass
class Node:
    """A node in a template. values: {input: value of a widget, or for a slot "KEY" or "KEY.OUTPUT" of another node}."""
    type: str
    title: str | None
    values: dict
    mode: int = ACTIVE


@dataclass
class Group:
    """A step of a template: columns of nodes, from left to right, each {key: Node}."""
    title: str
    columns: tuple


@dataclass
class Template:
    """name: of its files.  about, change: Markdown of the two notes.  files: {name: File} of what it downloads.
    app: widgets and outputs of its app, ((key, widget), ...) and (key, ...).  picture: how pictures.py makes its thumbnail."""
    name: str
    title: str
    about: str
    change: str
    groups: list
    after: str = ""
    files: dict = field(default_factory=dict)
    app: tuple | None = None
    picture: dict | None = None

    def nodes(self):
        """{key: Node}, from left to right. A node's id is its place, from 1."""
        return {key: node for group in self.groups for column in group.columns for key, node in column.items()}


class TemplateError(ValueError):
    """A template that does not fit the nodes it names."""


def declared(info):
    """{input: (type, options)} of a node's definition."""
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {name: (kind, options[0] if options else {}) for name, (kind, *options) in inputs.items()}


def is_widget(kind):
    return isinstance(kind, list) or kind in WIDGETS


def default(kind, options):
    """What a widget holds at first."""
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options") or [""]
    return "" if kind == "STRING" else choices[0]


class Wiring:
    """A template's nodes with ids, resolved inputs and links."""

    def __init__(self, template, definitions):
        self.template, self.nodes = template, template.nodes()
        self.ids = {key: i for i, key in enumerate(self.nodes, 1)}
        self.infos = {}
        for key, node in self.nodes.items():
            if node.type not in definitions:
                raise TemplateError(f"{template.name}: ComfyUI has no node {node.type}")
            self.infos[key] = definitions[node.type]
            unknown = node.values.keys() - declared(self.infos[key]).keys()
            if unknown:
                raise TemplateError(f"{template.name}: {key} ({node.type}) has no input {', '.join(sorted(unknown))}")
        self.links = []                         # (number, from key, from slot, to key, to slot, type)
        for key in self.nodes:
            for slot, name in enumerate(self.slots(key)):
                if name in self.nodes[key].values:
                    origin, output = self.origin(key, name)
                    kind = self.infos[origin]["output"][output]
                    self.links.append((len(self.links) + 1, origin, output, key, slot, kind))

    def slots(self, key):
        """Names of the inputs that take links, in order."""
        return [name for name, (kind, _) in declared(self.infos[key]).items() if not is_widget(kind)]

    def widgets(self, key):
        """{name: value} of the inputs that are set on the node, in order."""
        values = self.nodes[key].values
        return {name: values[name] if name in values else default(kind, options)
                for name, (kind, options) in declared(self.infos[key]).items() if is_widget(kind)}

    def origin(self, key, name):
        """(key, number of the output) that feeds a slot."""
        said = self.nodes[key].values[name]
        origin, _, wanted = said.partition(".")
        if origin not in self.nodes:
            raise TemplateError(f"{self.template.name}: {key}.{name} comes from {said}, which is not there")
        names, kind = self.infos[origin]["output_name"], declared(self.infos[key])[name][0]
        kinds = self.infos[origin]["output"]
        output = names.index(wanted) if wanted else 0
        if kind not in (kinds[output], "*"):
            raise TemplateError(f"{self.template.name}: {key}.{name} takes {kind}, {said} is {kinds[output]}")
        return origin, output

    def title(self, key):
        return self.nodes[key].title or self.infos[key]["display_name"] or self.nodes[key].type


def api_form(template, definitions, muted=False):
    """What /prompt takes: {id: {"class_type", "_meta", "inputs"}}. muted: with the nodes that are off when it is opened."""
    wiring, graph = Wiring(template, definitions), {}
    for key, node in wiring.nodes.items():
        if node.mode == MUTED and not muted:
            continue
        inputs = {}
        for name in wiring.slots(key):
            if name in node.values:
                origin, output = wiring.origin(key, name)
                inputs[name] = [str(wiring.ids[origin]), output]
        graph[str(wiring.ids[key])] = {"class_type": node.type, "_meta": {"title": wiring.title(key)},
                                       "inputs": inputs | wiring.widgets(key)}
    return graph


def canvas_form(template, definitions, app=False):
    """What the frontend opens. app: as an app, which shows chosen widgets and outputs in place of the graph."""
    wiring = Wiring(template, definitions)
    places, boxes, right = layout(template, wiring)
    nodes = [canvas_node(wiring, key, places[key]) for key in wiring.nodes]
    nodes += notes(template, right, len(nodes))
    extra = {"ds": {"scale": 0.6, "offset": [150, 560]}}
    if app:
        widgets, outputs = template.app
        extra |= {"linearMode": True, "linearData": {"inputs": [[wiring.ids[key], name] for key, name in widgets],
                                                     "outputs": [wiring.ids[key] for key in outputs]}}
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, template.name + ".app" * app)), "revision": 0,
            "last_node_id": len(nodes), "last_link_id": len(wiring.links), "nodes": nodes,
            "links": [[number, wiring.ids[a], i, wiring.ids[b], j, kind] for number, a, i, b, j, kind in wiring.links],
            "groups": groups(template, boxes), "config": {}, "extra": extra, "version": 0.4}


def groups(template, boxes):
    return [{"id": i, "title": f"{i}  {group.title}", "bounding": list(box), "color": GROUP_COLOUR, "font_size": 24,
             "flags": {}} for i, (group, box) in enumerate(zip(template.groups, boxes), 1)]


def layout(template, wiring):
    """({key: (x, y, width, height)}, [(x, y, width, height)] of the groups, right edge)

    Groups stand side by side, all of a row as high as the highest. A row ends where it would be so wide that the page shows
    the whole graph without letters.
    """
    places, boxes, row, left, top, bottom = {}, [], [], 0, 0, 0

    def end_row():
        boxes.extend((x, top - HEADING, width, bottom - top + HEADING) for x, width in row)
        row.clear()

    for group in template.groups:
        widths = [max(width_of(wiring.nodes[key].type) for key in column) for column in group.columns]
        wide = 2 * PAD + sum(widths) + APART * (len(widths) - 1)
        if row and left + wide > WIDEST:
            end_row()
            left, top = 0, bottom + HEADING + APART
        x = left + PAD
        for column, width in zip(group.columns, widths):
            y = top
            for key in column:
                places[key] = (x, y, width, height_of(wiring, key))
                y += places[key][3] + TITLE + GAP
            bottom = max(bottom, y - TITLE - GAP + APART)
            x += width + APART
        row.append((left, wide))
        left += wide + APART
    end_row()
    return places, boxes, max(x + width for x, _, width, _ in boxes)


def width_of(kind):
    return WIDTHS.get(kind, 300)


def height_of(wiring, key):
    """As litegraph makes a node at least."""
    slots = max(len(wiring.slots(key)), len(wiring.infos[key]["output"]), 1)
    widgets = len(wiring.widgets(key)) + len(companions(wiring.infos[key]))
    return slots * SLOT + (widgets * WIDGET + 8 if widgets else 0) + 6 + ROOM.get(wiring.nodes[key].type, 0)


def companions(info):
    """{widget: (what the widget that the frontend adds behind it holds)}"""
    found = {}
    for name, (_, options) in declared(info).items():
        if options.get("control_after_generate"):
            found[name] = "fixed"
        elif options.get("image_upload"):
            found[name] = "image"
    return found


def canvas_node(wiring, key, place):
    node, info = wiring.nodes[key], wiring.infos[key]
    incoming = {wiring.slots(key)[slot]: number for number, _, _, target, slot, _ in wiring.links if target == key}
    inputs, required = [], info["input"].get("required", {})
    for name, (kind, _) in sorted(declared(info).items(), key=lambda item: is_widget(item[1][0])):      # links first
        entry = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": incoming.get(name)}
        entry |= {} if name in required else {"shape": 7}
        inputs.append(entry | ({"widget": {"name": name}} if is_widget(kind) else {}))
    outputs = [{"name": name, "type": kind,
                "links": [number for number, origin, output, *_ in wiring.links if (origin, output) == (key, i)]}
               for i, (name, kind) in enumerate(zip(info["output_name"], info["output"]))]
    values, added = [], companions(info)
    for name, value in wiring.widgets(key).items():
        values += [value, added[name]] if name in added else [value]
    ours = info["python_module"].startswith("custom_nodes.")
    properties = {"Node name for S&R": node.type, "cnr_id": REGISTRY_ID if ours else CORE_ID}
    files = wiring.template.files
    models = [files[value].as_model() for value in wiring.widgets(key).values() if value in files]
    colours = OURS if ours else TEXT if wiring.title(key).startswith("Prompt") else {}
    own_title = {} if wiring.title(key) == info["display_name"] else {"title": wiring.title(key)}
    return {"id": wiring.ids[key], "type": node.type, **own_title, "pos": list(place[:2]),      # without, it is the user's
            "size": list(place[2:]), "flags": {}, "order": wiring.ids[key] - 1, "mode": node.mode, "inputs": inputs,
            "outputs": outputs, "properties": properties | ({"models": models} if models else {}),
            "widgets_values": values, **colours}


def notes(template, right, count):
    """What the template is and needs, and what to change, side by side above the groups."""
    wide = round(right * 0.6) - PAD
    texts = {"Read me": (0, wide, template.about), "What to change": (wide + APART, right - wide - APART, template.change)}
    height = max(note_height(text, width) for _, width, text in texts.values())
    return [{"id": count + i, "type": "MarkdownNote", "title": title, "pos": [x, -HEADING - TITLE - height], "flags": {},
             "size": [width, height], "order": count + i - 1, "mode": ACTIVE, "inputs": [], "outputs": [], "properties": {},
             "widgets_values": [text], **NOTE}
            for i, (title, (x, width, text)) in enumerate(texts.items(), 1)]


def note_height(text, width):
    lines = 0
    for line in text.splitlines():
        shown = sum(len(part.partition("](")[0] if "](" in part else part) for part in line.split(")"))
        lines += 1 + int(shown * LETTER // (width - 30)) if line else 0.5
    return 20 + LINE * round(lines + 1)


def blueprint(template, definitions, name, category, description, inputs, widgets, outputs):
    """A template as one node, for subgraphs/: its pictures come in and go out by links.

    inputs: {name shown: "KEY.SLOT"}    widgets: {name shown: "KEY.WIDGET"}    outputs: {name shown: "KEY.OUTPUT"}
    What only feeds an input, or takes an output, stays outside.
    """
    wiring = Wiring(template, definitions)
    places, *_ = layout(template, wiring)
    inner = {key for key, node in wiring.nodes.items() if node.type not in ("LoadImage", "SaveImage")}
    identity = uuid.uuid5(uuid.NAMESPACE_URL, f"blueprint {name}")
    nodes = {key: canvas_node(wiring, key, places[key]) for key in wiring.nodes if key in inner}
    links = [{"id": number, "origin_id": wiring.ids[a], "origin_slot": i, "target_id": wiring.ids[b], "target_slot": j,
              "type": kind} for number, a, i, b, j, kind in wiring.links if {a, b} <= inner]
    kept, last = {link["id"] for link in links}, len(wiring.links)
    for node in nodes.values():
        for entry in node["inputs"]:
            entry["link"] = entry["link"] if entry["link"] in kept else None
        for entry in node["outputs"]:
            entry["links"] = [number for number in entry["links"] if number in kept]

    left, right = (edge(place[0] for place in places.values()) for edge in (min, max))
    incoming, outgoing, outside = [], [], []
    for place, (shown, target) in enumerate({**inputs, **widgets}.items()):
        key, _, slot = target.partition(".")
        entry, last = next(entry for entry in nodes[key]["inputs"] if entry["name"] == slot), last + 1
        entry["link"] = last
        links.append({"id": last, "origin_id": -10, "origin_slot": place, "target_id": wiring.ids[key],
                      "target_slot": nodes[key]["inputs"].index(entry), "type": entry["type"]})
        incoming.append({"id": str(uuid.uuid5(identity, f"in {shown}")), "name": slot, "label": shown, "type": entry["type"],
                         "linkIds": [last], "pos": [left - 160, 20 * place]})
        outside.append({"name": slot, "label": shown, "type": entry["type"], "link": None}
                       | ({"widget": {"name": slot}} if shown in widgets else {}))
    for place, (shown, target) in enumerate(outputs.items()):
        key, _, output = target.partition(".")
        slot, last = wiring.infos[key]["output_name"].index(output), last + 1
        nodes[key]["outputs"][slot]["links"].append(last)
        kind = wiring.infos[key]["output"][slot]
        links.append({"id": last, "origin_id": wiring.ids[key], "origin_slot": slot, "target_id": -20, "target_slot": place,
                      "type": kind})
        outgoing.append({"id": str(uuid.uuid5(identity, f"out {shown}")), "name": shown, "type": kind, "linkIds": [last],
                         "pos": [right + 500, 20 * place]})
    number = len(wiring.nodes) + 1
    instance = {"id": number, "type": str(identity), "title": name, "pos": [0, 0], "size": [400, 90 + 30 * len(outside)],
                "flags": {}, "order": 0, "mode": ACTIVE, "inputs": outside,
                "outputs": [{"name": end["name"], "type": end["type"], "links": []} for end in outgoing],
                "properties": {"cnr_id": REGISTRY_ID, "proxyWidgets": [
                    [str(wiring.ids[target.partition(".")[0]]), target.partition(".")[2]] for target in widgets.values()]},
                "widgets_values": [], **OURS}
    subgraph = {"id": str(identity), "version": 1, "revision": 0, "config": {}, "name": name, "category": category,
                "description": description, "inputs": incoming, "outputs": outgoing, "widgets": [],
                "state": {"lastGroupId": 0, "lastNodeId": number, "lastLinkId": last, "lastRerouteId": 0},
                "inputNode": {"id": -10, "bounding": [left - 280, -20, 120, 20 * len(incoming) + 40]},
                "outputNode": {"id": -20, "bounding": [right + 500, -20, 120, 60]},
                "nodes": list(nodes.values()), "groups": [], "links": links, "extra": {}}
    return {"revision": 0, "last_node_id": number, "last_link_id": 0, "nodes": [instance], "links": [], "version": 0.4,
            "definitions": {"subgraphs": [subgraph]}, "extra": {}}
