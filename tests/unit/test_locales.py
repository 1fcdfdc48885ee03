"""What tools/locales.py makes of a table, and sees in it. That ours is whole: tests/comfy/inprocess/checks_locales.py."""

import json
import re

import pytest

from svdq_pack.tools import locales

NODE = {"input": {"required": {"model": ("MODEL", {}), "rank": ("INT", {"tooltip": "Width of it."})},
                  "optional": {"file": (["a"], {"tooltip": "Any."})}, "hidden": {"prompt": ("PROMPT",)}},
        "output": ["MODEL", "STRING"], "output_name": ["MODEL", "report"], "output_tooltips": [None, "In words."],
        "display_name": "Loader", "description": "Loads.", "category": "svdq/tools"}
PAGE = """# Loader

Loads a file
of any kind.

| Input | What |
|---|---|
| file | a file |

1. One
   and more.
2. Two.
- **rank**: see *rank*.
"""
TABLE = {english: f"译：{english}" for english in (
    "Width of it.", "Any.", "In words.", "Loads.", "Loads a file of any kind.", "Input", "What", "a file", "One and more.",
    "Two.", "model", "file", "report", "Loader", "tools", locales.TEMPLATES)} | {
    "rank": "秩", "**rank**: see *rank*.": "**rank**：见 *秩*。"}


def problems(table=TABLE, node=NODE, page=PAGE):
    return locales.problems("zh", {"N": node}, {"N": page}, locales.Table(table))


def test_files():
    made = locales.files("zh", {"N": NODE}, {"N": PAGE}, locales.Table(TABLE))
    assert json.loads(made["locales/zh/nodeDefs.json"]) == {"N": {
        "display_name": "译：Loader", "description": "译：Loads.",
        "inputs": {"model": {"name": "译：model"}, "rank": {"name": "秩", "tooltip": "译：Width of it."},
                   "file": {"name": "译：file", "tooltip": "译：Any."}},
        "outputs": {"0": {}, "1": {"name": "译：report", "tooltip": "译：In words."}}}}
    category = {folder: f"译：{locales.TEMPLATES}" for folder in locales.FOLDERS}
    assert json.loads(made["locales/zh/main.json"]) == {"nodeCategories": {"tools": "译：tools"},
                                                        "templateWorkflows": {"category": category}}
    assert made["web/docs/N/zh.md"] == """# 译：Loader

译：Loads a file of any kind.

| 译：Input | 译：What |
|---|---|
| 译：file | 译：a file |

1. 译：One and more.
2. 译：Two.
- **rank**：见 *秩*。
"""


@pytest.mark.parametrize("node, text", locales.english_pages().items())
def test_a_page_is_taken_apart_whole(node, text):
    """Said in its own language it is itself, but for where lines end."""
    assert locales.page(text, str).split() == text.split()


def test_a_whole_table_has_no_problem():
    assert problems() == []


@pytest.mark.parametrize("english", ["Any.", "rank", "tools", "Two.", "a file"])
def test_a_text_without_a_translation(english):
    assert f"{english}: no translation" in problems({key: value for key, value in TABLE.items() if key != english})


@pytest.mark.parametrize("change", [{"node": NODE | {"description": "Loads it."}}, {"page": PAGE.replace("Two.", "2.")},
                                    {"node": NODE | {"category": "svdq/toys"}}])
def test_english_that_changed(change):
    """Its translation is of something else: what there is now has none, and what was translated nobody says."""
    missing, vain = sorted(problems(**change))
    assert "no translation" in missing + vain and "nobody says it" in missing + vain


@pytest.mark.parametrize("english, text, wrong", [
    ("Any.", "", "empty"), ("Any.", "任何 ", "spaces to spare"), ("Any.", "50% @ {n}", "one of @{}|%"),
    ("Loads a file of any kind.", "Loads any file.", "in English"),
    ("**rank**: see *rank*.", "**rank**：见 *rank*。", "no *秩*"), ("**rank**: see *rank*.", "rank：见 *秩*。", "no **秩**"),
    ("What", "x" * 60, "wider than 50"), ("What", "宽" * 30, "wider than 50")])
def test_a_fault_is_found(english, text, wrong):
    found, = problems(TABLE | {english: text})
    assert wrong in found


@pytest.mark.parametrize("english, good, bad", [
    ("See `rank 4`.", "见 `rank 4`。", "见 `rank 5`。"),
    ("See [it](https://a.b/c).", "见[它](https://a.b/c)。", "见[它](https://a.b/)。"),
    ("Use **SVDQ (more)** now.", "现在用 **SVDQ (more)** 吧。", "现在用 **SVDQ (more)**吧。")])
def test_what_a_page_needs_as_it_stands(english, good, bad):
    page = PAGE + f"\n{english}\n"
    assert problems(TABLE | {english: good}, page=page) == []
    assert len(problems(TABLE | {english: bad}, page=page)) == 1


def test_templates_are_those_of_these_folders():
    """What git makes of the repository's name, and managers of the registry's id."""
    project = (locales.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert locales.FOLDERS == (re.search(r'^DisplayName = "(.+)"', project, re.M)[1],
                               re.search(r'^\[project\]\nname = "(.+)"', project, re.M)[1])


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_help_fits_its_panel(language):
    """As test_docs.py asks of the English."""
    pages = list(locales.PAGES.glob(f"*/{language}.md"))
    assert {path.parent.name for path in pages} == locales.english_pages().keys()
    assert not [row for path in pages for row in re.findall(r"^\|.*", path.read_text(encoding="utf-8"), re.M)
                if locales.columns(row) > locales.WIDEST]


def test_the_chinese_readme_names_nodes_as_the_page_does():
    text, say = (locales.ROOT / "README.zh.md").read_text(encoding="utf-8"), locales.table("zh")
    lines = [line for line in text.splitlines() if not line.startswith("```")]
    names = {name for line in lines for name in locales.spans(line)[0] if "SVDQ" in name}
    assert len(names) >= 5 and names <= set(say.values())
    assert f"*模板 → {say(locales.TEMPLATES)}*" in text
    assert not [span for line in lines for span in locales.not_emphasised(line)]
