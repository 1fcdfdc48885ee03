#!/usr/bin/env python3
"""The pack in other languages: what ComfyUI reads in locales/, and the nodes' help pages.

    SVDQ_COMFYUI=TREE python tools/locales.py            what lacks a translation, is translated in vain, or has a fault
    SVDQ_COMFYUI=TREE python tools/locales.py --write    writes locales/LANGUAGE/*.json and web/docs/NODE/LANGUAGE.md

`python` is one that ComfyUI runs with, TREE a ComfyUI: the English is what the nodes' schemas say in it, and web/docs/NODE.md.

The table is tools/translations/*.json, one {English: translation} per language. The English is the key, so a text that changes
has no translation until somebody has looked at it again. Of a help page each heading, paragraph, item and cell is a text, its
lines joined by spaces.

ComfyUI translates, and so the table has: names of nodes, their descriptions, names and tooltips of inputs and outputs, parts of
categories, the title of the pack's templates, help. It translates no choices of a COMBO, no search aliases, and of packs no
titles of templates or blueprints; notes in a graph are part of it.

Test: tests/unit/test_locales.py, tests/comfy/inprocess/checks_locales.py, tests/comfy/test_languages.py
"""

import argparse
import json
import os
import re
import sys
import types
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
pack = types.ModuleType("svdq_pack")            # the pack's folder name is not ours to assume, so name its package here
pack.__path__ = [str(ROOT)]
sys.modules.setdefault(pack.__name__, pack)

TRANSLATIONS, PAGES = ROOT / "tools" / "translations", ROOT / "web" / "docs"
# language of ComfyUI's setting -> a letter of its own script
LANGUAGES = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "ko": r"[\uac00-\ud7a3]"}
TEMPLATES = "ComfyUI-SVDQ"                      # their category, by the name of the pack's folder where git made it,
FOLDERS = (TEMPLATES, "svdq")                   # or a manager, by the registry's id
LEFT = ("svdq", "loaders")                      # parts of categories: our name, and one that ComfyUI translates itself
SYNTAX = "@{}|%"                                # of vue-i18n's messages: what has none of these is said as it stands
WIDEST = 50                                     # columns of a row in a table of help; the panel cuts what is wider
WORDS = 3                                       # more than these are a sentence, which no language leaves in English

ITEM = re.compile(r"(#+|-|\d+\.) ")
SPAN = re.compile(r"\*\*(.+?)\*\*|\*(?!\s)(.+?)\*")
CODE = re.compile(r"`[^`]+`|\]\([^)\s]+\)")


class Table(dict):
    """{English: translation} of a language. Called with a text it gives its translation, or the text itself where there is
    none, and remembers both: `used`, `missing`."""

    def __init__(self, entries):
        super().__init__(entries)
        self.used, self.missing = set(), {}

    def __call__(self, english):
        (self.used.add if english in self else self.missing.setdefault)(english)
        return self.get(english, english)


def table(language):
    return Table(json.loads((TRANSLATIONS / f"{language}.json").read_text(encoding="utf-8")))


def definitions():
    """{node id: what /object_info says of it} of our nodes, in English."""
    from svdq_pack.nodes import NODES
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in NODES}


def node_texts(node, say):
    """A node's entry in nodeDefs.json. An output that is named as its type has a name of ComfyUI's."""
    inputs = {name: {"name": say(name)} | ({"tooltip": say(options[0]["tooltip"])} if "tooltip" in (options or [{}])[0] else {})
              for kind in ("required", "optional") for name, (_, *options) in node["input"].get(kind, {}).items()}
    outputs = {str(i): ({"name": say(name)} if name != kind else {}) | ({"tooltip": say(tooltip)} if tooltip else {})
               for i, (kind, name, tooltip) in enumerate(zip(node["output"], node["output_name"], node["output_tooltips"]))}
    return {"display_name": say(node["display_name"]), "description": say(node["description"]),
            "inputs": inputs, "outputs": outputs}


def main_texts(nodes, say):
    """main.json: what is of no single node."""
    parts = {part: None for node in nodes.values() for part in node["category"].split("/") if part not in LEFT}
    return {"nodeCategories": {part: say(part) for part in parts},
            "templateWorkflows": {"category": {folder: say(TEMPLATES) for folder in FOLDERS}}}


def blocks(text):
    """The lines of a help page, those that are one text joined: each [mark, text ...], or [] for an empty line. A mark is that
    of a heading or an item, "|" for a row with its cells, "" for a paragraph."""
    found = []
    for line in text.splitlines():
        mark = ITEM.match(line)
        if not line:
            found.append([])
        elif line.startswith("|"):
            found.append(["|", *(cell.strip() for cell in line.strip("|").split("|"))])
        elif mark:
            found.append([mark[0], line[mark.end():]])
        elif found and len(found[-1]) == 2 and not found[-1][0].startswith("#"):
            found[-1][1] += f" {line.strip()}"
        else:
            found.append(["", line])
    return found


def page(text, say):
    """A help page in another language. A paragraph is one line: Chinese and Japanese have no spaces to end lines at."""
    lines = []
    for mark, *texts in (block or [""] for block in blocks(text)):
        if set(texts) == {"---"}:
            lines.append("|---" * len(texts) + "|")
        elif mark == "|":
            lines.append(f"| {' | '.join(map(say, texts))} |")
        else:
            lines.append(mark + "".join(map(say, texts)))
    return "\n".join(lines) + "\n"


def english_pages():
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}


def files(language, nodes, pages, say):
    """{path from the repository's root: text} of a language."""
    made = {f"locales/{language}/nodeDefs.json": {node_id: node_texts(node, say) for node_id, node in nodes.items()},
            f"locales/{language}/main.json": main_texts(nodes, say)}
    made = {path: json.dumps(texts, indent=1, ensure_ascii=False) + "\n" for path, texts in made.items()}
    return made | {f"web/docs/{node}/{language}.md": page(text, say) for node, text in pages.items()}


def present():
    """Paths of such files as they are, from the repository's root."""
    return {path.relative_to(ROOT).as_posix() for pattern in ("locales/*/*", "web/docs/*/*") for path in ROOT.glob(pattern)}


def columns(text):
    """How wide a text is, in Latin letters."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def without_code(text):
    return re.sub(r"`[^`]+`", "``", text)


def spans(text):
    """([bold], [italic]) of a Markdown text."""
    found = SPAN.findall(without_code(text))
    return [bold for bold, _ in found if bold], [italic for _, italic in found if italic]


def not_emphasised(text):
    """Spans whose * stay as they are: beside punctuation inside, one opens or closes only with a space or punctuation outside,
    and a letter of Chinese is a letter."""
    text = without_code(text)
    for match in SPAN.finditer(text):
        span, before, after = match[1] or match[2], text[:match.start()][-1:], text[match.end():][:1]
        if not span[0].isalnum() and before.isalnum() or not span[-1].isalnum() and after.isalnum():
            yield span


def faults(say, nodes, language):
    """What is wrong with translations, a line each. Emphasised are names of nodes and inputs, which read as they do on the
    canvas, and messages and labels of reports, which nobody translates."""
    ids = {name for node in nodes.values() for kind in ("required", "optional") for name in node["input"].get(kind, {})}
    ids |= {name for node in nodes.values() for name in node["output_name"]}
    for english, text in say.items():
        if not text or text != " ".join(text.split()):
            yield f"{english}: empty, or with spaces to spare: {text!r}"
        if sorted(CODE.findall(text)) != sorted(CODE.findall(english)):
            yield f"{english}: other code or links in {text!r}"
        if len(re.findall(r"\b[a-z]+\b", SPAN.sub("", english))) > WORDS and not re.search(LANGUAGES[language], text):
            yield f"{english}: in English, {text!r}"
        yield from (f"{english}: Markdown does not emphasise {span!r} in {text!r}" for span in not_emphasised(text))
        for kind, given, found in zip(("**", "*"), spans(english), spans(text)):
            for span in given:
                name = say(span) if span in say else span
                if name not in found and not (kind == "**" and span in ids and span in found):      # a label of a report
                    yield f"{english}: emphasises {kind}{span}{kind}, and its translation no {kind}{name}{kind}"


def node_faults(made):
    """The same of what locales/ has, where a text is a message of vue-i18n."""
    for path, text in made.items():
        if path.startswith("locales/"):
            for line in text.splitlines():
                said = json.loads(f'"{value[1]}"') if (value := re.search(r'": "(.*)",?$', line)) else ""
                if set(said) & set(SYNTAX):
                    yield f"{path}: {said!r} has one of {SYNTAX}"
        else:
            yield from (f"{path}: wider than {WIDEST} columns: {row}" for row in re.findall(r"^\|.*", text, re.M)
                        if columns(row) > WIDEST)


def problems(language, nodes, pages, say):
    """Why a language is not complete, a line each."""
    made = files(language, nodes, pages, say)
    found = [*faults(say, nodes, language), *node_faults(made)]         # names that they look up are in use, too
    for span in {span for text in say for span in sum(spans(text), [])} & say.keys():
        say(span)
    return [*(f"{text}: no translation" for text in say.missing),
            *(f"{text}: translated, and nobody says it" for text in say.keys() - say.used), *found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files")
    options = parser.parse_args()
    if "SVDQ_COMFYUI" not in os.environ:
        parser.error("SVDQ_COMFYUI is not set, to the folder of a ComfyUI")
    from svdq_pack.tools.count_step import host
    declared = host(os.environ["SVDQ_COMFYUI"])         # noqa: F841, declared operators live as long as it
    nodes, pages, wrong, made = definitions(), english_pages(), [], {}
    for language in LANGUAGES:
        say = table(language)
        wrong += (f"{language}: {problem}" for problem in problems(language, nodes, pages, say))
        made |= files(language, nodes, pages, say)
    if options.write:
        for path in present() - made.keys():
            (ROOT / path).unlink()
        for path, text in made.items():
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
    print("\n".join(wrong) or f"{len(made)} files, nothing wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
