"""The pack in other languages: each is whole, for the English that nodes and pages have now, and its files are what the table
gives."""

import pytest

from svdq_pack.tests.comfy.inprocess import support
from svdq_pack.tools import locales

assert support                              # ComfyUI, which the nodes ask for their schemas


@pytest.fixture(scope="module")
def english():
    return locales.definitions(), locales.english_pages()


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_language_is_whole(language, english):
    assert not locales.problems(language, *english, locales.table(language))


def test_files_are_what_the_table_gives(english):
    made = {path: text for language in locales.LANGUAGES
            for path, text in locales.files(language, *english, locales.table(language)).items()}
    assert made.keys() == locales.present()
    stale = [path for path, text in made.items() if (locales.ROOT / path).read_text(encoding="utf-8") != text]
    assert not stale, "SVDQ_COMFYUI=TREE python tools/locales.py --write writes them anew"


def test_every_node_has_all(english):
    """Names of all inputs and outputs, and of what has a tooltip its translation."""
    nodes, pages = english
    assert nodes.keys() == pages.keys()
    for language in locales.LANGUAGES:
        for node in nodes.values():
            said = locales.node_texts(node, locales.table(language))
            inputs = {name: options for kind in ("required", "optional") for name, (_, options) in
                      node["input"].get(kind, {}).items()}
            assert said["inputs"].keys() == inputs.keys()
            assert {name for name, texts in said["inputs"].items() if "tooltip" in texts} == {
                name for name, options in inputs.items() if options.get("tooltip")}
            assert len(said["outputs"]) == len(node["output"]) and said["display_name"] != node["display_name"]


@pytest.mark.parametrize("change", ["name", "tooltip", "description", "display name", "page"])
def test_a_change_of_the_english_is_seen(change, english):
    """Planted in the schema or page of a node as it is."""
    nodes, pages = ({**part} for part in english)
    node = nodes["SVDQInfo"] = {**nodes["SVDQInfo"]}
    if change == "page":
        pages["SVDQInfo"] = pages["SVDQInfo"].replace("odd but harmless", "odd and harmless")
    elif change in ("name", "tooltip"):
        (name, (kind, options)), = node["input"]["required"].items()
        entry = {"new_name": (kind, options)} if change == "name" else {name: (kind, options | {"tooltip": "Another file."})}
        node["input"] = node["input"] | {"required": entry}
    else:
        node[change.replace(" ", "_")] += " Now"
    for language in locales.LANGUAGES:
        assert any(problem.endswith("no translation") for problem in
                   locales.problems(language, nodes, pages, locales.table(language)))
