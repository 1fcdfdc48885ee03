"""The pack in ComfyUI's page in other languages: nodes, tooltips, search, templates, help. On a server of their own, whose pack
lies in a folder as git names it: the title of the templates goes by that."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from svdq_pack.tests.comfy.conftest import serving
from svdq_pack.tests.comfy.test_browser import CHROMIUM, STILL, browsing, open_template, set_up, sync_api
from svdq_pack.tests.comfy.test_workflows import DEMO, DEV, opened
from svdq_pack.tools import locales

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

# Nodes of ComfyUI that our help names -> as it names them in English
STOCK = {"UNETLoader": "Load Diffusion Model", "LoraLoader": "Load LoRA", "LoraLoaderModelOnly": "Load LoRA (Model)",
         "SaveLatent": "Save Latent", "LazyCache": "LazyCache"}
# What the page shows of a node: its title, {input: name}, [name of an output], its category
SHOWN = """type => { const node = LiteGraph.createNode(type), own = node.constructor
    return [node.title, Object.fromEntries(node.inputs.map(input => [input.name, input.label ?? input.localized_name])),
            Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.label])),
            node.outputs.map(output => output.label ?? output.localized_name), own.category, own.nodeData.description] }"""


@pytest.fixture(scope="module")
def server(newest, tmp_path_factory):
    base = tmp_path_factory.mktemp("languages")
    for folder in ("custom_nodes", "output", "user", "input", "models"):
        (base / folder).mkdir()
    (base / "custom_nodes" / locales.TEMPLATES).symlink_to(locales.ROOT, target_is_directory=True)
    with serving(base) as server:
        yield server


@pytest.fixture(scope="module", params=locales.LANGUAGES)
def language(request):
    return request.param


@pytest.fixture(scope="module")
def say(language):
    return locales.table(language)


@pytest.fixture(scope="module")
def page(server, language):
    set_up(server, "Comfy.Locale", language)
    with browsing(server) as page:
        yield page


@pytest.fixture
def dev(page):
    """The page with the graph of the dev template."""
    page.evaluate("graph => app.loadGraphData(graph)", opened(DEV))
    page.evaluate(STILL)
    return page


def keep(page, name, folder):
    """A screenshot for people to look at."""
    path = Path(os.environ.get("SVDQ_SCREENSHOTS") or folder, f"{name}.png")
    page.screenshot(path=path)
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_every_node(page, language, say):
    texts = json.loads((locales.ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node_id, node in texts.items():
        title, inputs, widgets, outputs, category, description = page.evaluate(SHOWN, node_id)
        names = {name: text["name"] for name, text in node["inputs"].items()}
        assert (title, description, inputs) == (node["display_name"], node["description"], names)
        assert widgets == {name: names[name] for name in widgets}
        assert [name for name, text in zip(outputs, node["outputs"].values()) if "name" in text] == [
            text["name"] for text in node["outputs"].values() if "name" in text]
        pack, part = category.split("/")
        assert pack == "svdq" and not part.isascii()


def test_nodes_of_comfyui_are_named_as_it_names_them(page, say):
    shown = {node: page.evaluate(SHOWN, node)[0] for node in STOCK}
    assert shown == {node: say(english) for node, english in STOCK.items()}


def test_templates(page, language, say, tmp_path):
    """Their category has a name in this language, and one that opens shows our nodes' names in it."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(say(locales.TEMPLATES), exact=True).first.click()
    dialog.get_by_test_id(f"template-workflow-{DEMO}").wait_for()
    keep(page, f"templates-{language}", tmp_path)
    open_template(page, dialog, DEV)
    titles = page.evaluate("app.graph.nodes.filter(node => node.type === 'SVDQModelLoader').map(node => node.title)")
    assert titles == [say("SVDQ Loader")]


def test_search(page, say):
    """By the name in this language, and still by ours."""
    for word in ("svdq", say("SVDQ Loader"), "nunchaku"):
        page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        search = page.get_by_role("dialog")
        search.get_by_role("combobox").first.fill(word)
        search.get_by_role("option").filter(has_text=say("SVDQ Loader")).first.wait_for()
        page.keyboard.press("Escape")
        sync_api.expect(search).to_have_count(0)


def test_tooltip(dev, say):
    """Of a widget under the mouse."""
    text, = (options["tooltip"] for name, (_, options) in dev.evaluate(
        "Object.entries(LiteGraph.registered_node_types.SVDQModelLoader.nodeData.input.optional)") if name == "act_bits")
    x, y = dev.evaluate("""() => {
        const node = app.graph.nodes.find(node => node.type === 'SVDQModelLoader')
        const widget = node.widgets.find(widget => widget.name === 'act_bits')
        return app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.y + 10]) }""")
    assert say(text) != text
    dev.mouse.move(x - 3, y)
    dev.mouse.move(x, y)
    dev.get_by_text(say(text), exact=True).wait_for()
    dev.mouse.move(800, 800)                # off it, over nothing


def test_help(dev, language, say, tmp_path):
    dev.evaluate("app.canvas.selectNode(app.graph.nodes.find(node => node.type === 'SVDQModelLoader'))")
    dev.get_by_test_id("info-button").click()
    dev.get_by_role("heading", name=say("Which file")).wait_for()
    wide = "[...document.querySelectorAll('table')].map(table => table.scrollWidth - table.parentElement.clientWidth)"
    widths = dev.evaluate(wide)
    assert len(widths) >= 3 and max(widths) <= 0, widths        # nothing is cut at the panel's edge
    assert dev.evaluate("[...document.querySelectorAll('td, p, li')].filter(cell => cell.innerText.includes('**')).length") == 0
    keep(dev, f"help-{language}", tmp_path)


def test_every_help_page_is_served(server, language):
    """Where the page looks for it."""
    for node in locales.english_pages():
        text = server.get(f"/extensions/{locales.TEMPLATES}/docs/{node}/{language}.md").decode()
        assert text == (locales.PAGES / node / f"{language}.md").read_text(encoding="utf-8")
