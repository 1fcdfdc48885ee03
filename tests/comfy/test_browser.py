"""The pack in ComfyUI's own web page: templates, help, search, and one run from the Run button."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from svdq_pack.tests.comfy.test_workflows import DEMO, DEV, FOLDER, NAMES, files_in_place, opened, queued
from svdq_pack.tools.templates.make import APP
from svdq_pack.workflows.headless.process import NO_PROXY

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

# --no-sandbox: CI runs as root. The rest keeps the browser from calling home.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
PATIENCE = 180_000      # ms, for each wait; a whole test took 37 s beside three busy loops on two cores
LOADED = """window.app?.extensionManager?.workflow?.activeWorkflow && app.graph.nodes.length
            && !document.querySelector('#splash-loader, .p-blockui-mask')"""
STILL = """new Promise(done => { let last, calm = 0
    const look = () => { const now = JSON.stringify(app.canvas.ds.state); calm = now === last ? calm + 1 : 0; last = now
                         calm > 20 ? done() : requestAnimationFrame(look) }
    look() })"""


@contextlib.contextmanager
def browsing(server, script=""):
    """A page of ComfyUI in Chromium. script: JavaScript that runs before its own."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield page_of(server, browser, script)
        browser.close()


def set_up(server, setting, value):
    """One of the page's settings, which the server keeps for all pages that open after it."""
    request = urllib.request.Request(f"{server.process.url}/api/settings/{setting}", data=json.dumps(value).encode(),
                                     headers={"Content-Type": "application/json"})
    NO_PROXY.open(request).close()


def page_of(server, browser, script=""):
    set_up(server, "Comfy.TutorialCompleted", True)             # else the tutorial opens and covers everything
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE)
    sync_api.expect.set_options(timeout=PATIENCE)
    page.add_init_script(script)
    page.goto(server.process.url)
    page.wait_for_function(LOADED)
    return page


@pytest.fixture(scope="module")
def page(server, base):
    """One page for all tests; each loads the graph it needs."""
    with files_in_place(base), browsing(server) as page:
        yield page


@pytest.fixture
def templates(page):
    """The template browser, showing this pack's category; closed afterwards."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(pack(page), exact=True).first.click()
    dialog.get_by_test_id(f"template-workflow-{DEMO}").wait_for()
    yield dialog
    page.keyboard.press("Escape")
    sync_api.expect(dialog).to_have_count(0)


def pack(page):
    """The pack's folder name, which is also the name of its templates' category."""
    folder, = page.evaluate("fetch('/api/workflow_templates').then(answer => answer.json())")
    return folder


def open_template(page, dialog, name):
    dialog.get_by_test_id(f"template-workflow-{name}").click()
    page.wait_for_function(f"""([name, isApp]) => {{
        const {{ filename, path }} = app.extensionManager.workflow.activeWorkflow ?? {{}}
        return filename?.startsWith(name) && path.endsWith('{APP}.json') === isApp }}""",
                           arg=[name.removesuffix(APP), name.endswith(APP)])
    sync_api.expect(dialog).to_have_count(0)
    page.evaluate(STILL)


def test_templates_are_listed_with_pictures(templates):
    cards = templates.locator("[data-testid^=template-workflow-]")
    sync_api.expect(cards).to_have_count(len(NAMES))
    assert {card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()} == set(NAMES)
    for card in cards.all():
        card.scroll_into_view_if_needed()               # pictures further down are loaded late
        sync_api.expect(card.locator("img").first).to_have_js_property("naturalWidth", 400)


@pytest.mark.parametrize("name", [DEMO, DEMO + APP, DEV])
def test_template_opens_from_the_browser(name, page, templates):
    """The template browser, that is. Without a complaint, as the API form says."""
    open_template(page, templates, name)
    assert is_open(page, name)
    sync_api.expect(page.get_by_test_id("error-overlay")).to_have_count(0)


def test_the_address_that_run_py_opens(page, server):
    """By run.py --open WORKFLOW."""
    page.goto(f"{server.process.url}/?template={DEV}&source={pack(page)}")
    page.wait_for_function(LOADED)
    page.wait_for_function("name => app.extensionManager.workflow.activeWorkflow?.filename.startsWith(name)", arg=DEV)
    page.evaluate(STILL)
    assert is_open(page, DEV)


def is_open(page, name):
    assert page.evaluate("app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).length") == 0
    graph = page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
    for node in graph.values():
        if node["class_type"] == "PreviewAny":          # the old page sends what it shows, which the server passes over
            node["inputs"] = {"source": node["inputs"]["source"]}
    return graph == queued(name)


def test_screenshot(page, templates, tmp_path):
    open_template(page, templates, DEV)
    path = Path(os.environ.get("SVDQ_SCREENSHOTS") or tmp_path, "dev-template.png")
    page.screenshot(path=path)
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_demo_runs_from_the_run_button(page, templates, server):
    open_template(page, templates, DEMO)
    page.evaluate("""for (const kind of ['execution_success', 'execution_error'])
                         app.api.addEventListener(kind, event => window.ended = [kind, event.detail.prompt_id])""")
    page.get_by_test_id("queue-button").click()
    kind, prompt_id = page.wait_for_function("window.ended").json_value()
    assert kind == "execution_success"
    (_, data), = server.client.files(prompt_id)
    with Image.open(io.BytesIO(data)) as picture, Image.open(FOLDER / f"{DEMO}.jpg") as thumbnail:
        assert picture.size == (160, 160)
        small = [image.convert("RGB").resize((40, 40)) for image in (picture, thumbnail)]
    off = ImageStat.Stat(ImageChops.difference(*small)).mean
    assert max(off) < 12, f"{DEMO}.jpg no longer shows what the demo paints: {off}"
    page.wait_for_function("app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.length === 1")


def test_info_shows_its_report_on_the_node(page):
    graph = {"1": {"class_type": "SVDQInfo", "inputs": {"model_name": "svdq-int4_r16-demo.safetensors"}}}
    page.evaluate("graph => app.loadApiJson(graph, 'info')", graph)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("app.graph.nodes[0].widgets.some(widget => /int4 weights/.test(widget.value))")


def test_help_opens(page):
    page.evaluate("graph => app.loadGraphData(graph)", opened(DEV))
    page.evaluate("app.canvas.selectNode(app.graph.nodes.find(node => node.type === 'SVDQModelLoader'))")
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name="Which file").wait_for()
    wide = "[...document.querySelectorAll('table')].map(table => table.scrollWidth - table.parentElement.clientWidth)"
    widths = page.evaluate(wide)
    assert len(widths) >= 3 and max(widths) <= 0, widths        # nothing is cut at the panel's edge


def test_picture_of_the_readme_opens_its_graph(page):
    """Dropped on the canvas, that is."""
    picture = base64.b64encode((FOLDER.parent / "docs" / "pictures" / "demo.png").read_bytes()).decode()
    page.evaluate("""async picture => {
        const data = Uint8Array.from(atob(picture), letter => letter.charCodeAt(0))
        await app.handleFile(new File([data], 'dropped.png', { type: 'image/png' })) }""", picture)
    page.wait_for_function("app.extensionManager.workflow.activeWorkflow?.filename.startsWith('dropped')")
    assert is_open(page, DEMO)


@pytest.mark.parametrize("path", sorted((FOLDER.parent / "subgraphs").glob("*.json")), ids=lambda path: path.stem)
def test_blueprint(path, page):
    """Found by its name, and a node whose widgets and links reach the nodes inside."""
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    search = page.get_by_role("dialog")
    search.get_by_role("combobox").fill(re.search(r"FLUX\.1 \w+", path.stem)[0])
    search.filter(has_text=path.stem).wait_for()
    page.keyboard.press("Escape")
    sync_api.expect(search).to_have_count(0)

    page.evaluate("graph => app.loadGraphData(graph)", json.loads(path.read_text(encoding="utf-8")))
    unknown = "app.graph.nodes[0].subgraph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).length"
    assert page.evaluate(unknown) == 0
    assert page.evaluate("""() => {
        const prompt = app.graph.nodes[0].widgets.find(widget => /prompt|text/.test(widget.label ?? widget.name))
        prompt.value = 'a red fox'
        return app.graphToPrompt().then(prompt => Object.values(prompt.output).map(node => node.inputs.text).find(Boolean))
    }""") == "a red fox"


@pytest.mark.parametrize("word, node, place", [
    ("nunchaku", "SVDQ Loader", 1), ("svdquant", "SVDQ Loader", 1), ("4bit", "SVDQ Loader", 1),
    ("flux loader", "SVDQ Loader", 1), ("load diffusion model", "SVDQ Loader", 2), ("unet loader", "SVDQ Loader", 3),
    ("svdq", "SVDQ Loader", 3),
    ("svdquant lora", "SVDQ LoRA Loader", 1), ("nunchaku lora", "SVDQ LoRA Loader", 1), ("svdq lora", "SVDQ LoRA Loader", 2)])
def test_search_finds_the_loader(word, node, place, page):
    """At this place at the latest: after ComfyUI's own loaders, and shorter names that begin with the word."""
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    search = page.get_by_role("dialog")
    search.get_by_role("combobox").fill(word)
    search.get_by_role("option").filter(has_text=node).first.wait_for()
    hits = [text.splitlines()[0] for text in search.get_by_role("option").all_inner_texts()]
    assert node in hits[:place], hits
    page.keyboard.press("Escape")
    sync_api.expect(search).to_have_count(0)
