"""Names out of files in ComfyUI's web page, the oldest's and the newest's: text there, whatever a file calls its parts.

Every name a file can carry is HTML, Markdown or an address here. Each file goes through each node that reads it, where that
works and where it ends in an error. Then the page may hold no element of it, have run no script and have asked for nothing.
"""

import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.quantize.calibration import KEY, Collector, Statistics, inputs
from svdq_pack.tests.comfy.test_browser import CHROMIUM, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

# Messages shorten names at 100 characters and give the first two or three of them, so a file has three.
NAMES = [
    ("<x-mark><img src=x onerror=xss()><svg onload=xss()><script>xss()</script>",
     "<iframe srcdoc='<script>top.xss()</script>'></iframe><a href=javascript:xss()>a</a><IMG/SRC=x/onerror=xss()>",
     "&lt;x-mark&gt;&#60;x-mark&#62;&amp;lt;x-mark&amp;gt;&lt;img src=x onerror=xss()&gt;"),
    ("[[a|https://evil.invalid]][[b|javascript:xss()]]__LNK0__ __LNK7__",
     "![a](//evil.invalid/a.png)[b](//evil.invalid)[c](javascript:xss())[d][e]",
     "https://evil.invalid <https://evil.invalid> www.evil.invalid WWW.evil.invalid ftp://evil.invalid a@evil.invalid"),
    ("\u202e\uff1cx-mark\uff1e\x00<x-mark>\x1b]8;;https://evil.invalid\x07a\x1b]8;;\x07",
     "<x-mark\n>\n[d]: //evil.invalid\n\n[d]\n\n<x-mark>",
     "[[<x-mark>|https://evil.invalid/\"><x-mark>]]'\"><x-mark><!--<x-mark>-->"),
    ("**mark** *mark* ***mark*** a*mark*b", "_mark_ __mark__ .._mark_..", "~~mark~~ ~mark~ `mark` ``mark``")]
FILE = "<x-mark><img src=x onerror=xss()>[[a|www.evil.invalid]]![b](evil.invalid)&lt;x-mark&gt;.safetensors"
OURS = re.compile("mark|evil|xss")      # in every name

BEFORE = "window.xss = () => { window.ran = true }"
RUN = """async graph => {
    await app.loadApiJson(graph, 'markup')
    app.canvas.ds.scale = 0.4
    app.canvas.ds.offset = [100, 100]
    const ended = new Promise(end => { for (const kind of ['execution_success', 'execution_error'])
        app.api.addEventListener(kind, event => end([kind, event.detail.exception_message ?? '']), { once: true }) })
    let refused, post = app.api.queuePrompt
    app.api.queuePrompt = (...given) => post.apply(app.api, given).catch(error => { refused = String(error); throw error })
    await app.queuePrompt(0)
    app.api.queuePrompt = post
    return refused ? ['refused', refused] : ended
}"""
FREE = "app.api.fetchApi('/free', { method: 'POST', body: '{\"free_memory\": true}' })"     # else a node shows nothing again
MODERN = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
MARKDOWN = """() => {
    for (const node of app.graph.nodes) if (node.type === 'PreviewAny')
        for (const widget of node.widgets) if (widget.type === 'toggle') { widget.value = true; widget.callback?.(true) } }"""
LISTS = """() => {
    LGraphCanvas.active_canvas = app.canvas
    for (const widget of app.graph.nodes.flatMap(node => node.widgets)) if (widget.type === 'combo')
        new LiteGraph.ContextMenu(widget.options.values, { event: new MouseEvent('click'), scale: 1, className: 'dark' }) }"""
SAY = """text => app.api.dispatchEvent(new CustomEvent('progress_text', {
    detail: { nodeId: String(app.graph.nodes[0].id), text } }))"""
SHOWN = "text => document.body.innerText.includes(text)"
DETAILS = """text => {
    for (const button of document.querySelectorAll('[data-testid=error-overlay-see-errors], .comfy-error-report button'))
        if (/^(Show Report|View details)$/.test(button.textContent.trim())) button.click()
    return document.body.textContent.includes(text) }"""
FOUND = """() => [...document.querySelectorAll('body *')].filter(element => element.matches('x-mark')
        || [...element.attributes].some(({ name, value }) => /^on|^(src|srcdoc|href|xlink:href|action|data)$/.test(name)
                                                             && /evil\\.invalid|xss\\(/.test(value))
        || element.matches('script, iframe, svg') && /xss\\(/.test(element.outerHTML)
        || element.matches('em, strong, del, s, code') && /mark/.test(element.textContent))
    .map(element => element.outerHTML.slice(0, 300)).concat(window.ran ? ['a script ran'] : [])"""
SEEN = f"text => ({FOUND})().some(found => found.includes(text))"


@pytest.fixture(scope="module", params=["oldest", "newest"])
def page(request, servers, files):
    if request.param == "oldest" and not os.environ.get("COMFYUI_OLD_FRONTEND"):
        pytest.skip("COMFYUI_OLD_FRONTEND is not set; tests/run.py sets it where the oldest web page can be had")
    with browsing(servers(request.param), BEFORE) as page:
        page.which, page.asked = request.param, []
        page.on("dialog", lambda dialog: (page.asked.append(f"evil dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.asked.append(f"evil error: {error}"))
        yield page


@pytest.fixture
def clean(page):
    """Looks at the page at the end of a test."""
    page.asked.clear()
    yield
    assert page.evaluate(FOUND) == []
    assert [asked for asked in page.asked if "evil" in asked] == []


@pytest.fixture(scope="module")
def files(base):
    """The files, for as long as these tests run; other tests list the folders too."""
    models, loras = base / "models" / "diffusion_models", base / "models" / "loras"
    calibration, conditioning = base / "models" / "svdq_calibration", base / "input"
    whole, lora = load_file(models / "nvfp4.safetensors"), load_file(loras / "peft.safetensors")
    statistics, written = seen(Checkpoint(models / "int4.safetensors").shape), []
    about = json.loads(statistics.description())

    def save(folder, name, tensors, others=(), metadata=None):
        folder.mkdir(exist_ok=True)
        written.append(folder / f"{name.removesuffix('.safetensors')}.safetensors")
        save_file(tensors | {other: torch.ones(2, 2) for other in others}, written[-1], metadata)

    for i, names in enumerate(NAMES):
        said = {name: name for name in names}
        weight = {"dtype": names[0], "group_size": names[1]}
        save(models, f"extra-{i}", whole, names, said | {"quantization_config": json.dumps({"weight": weight})})
        save(models, f"gap-{i}", whole, [f"transformer_blocks.{name.replace('.', '')}.x" for name in names])
        save(models, f"foreign-{i}", {}, names, said)
        save(loras, f"left-{i}", lora, names, said)
        save(loras, f"none-{i}", {}, [f"{name}.lora_A.weight" for name in names], said)
        save(loras, f"nan-{i}", lora | {f"{names[0]}.alpha": torch.tensor(float("nan"))})
        save(conditioning, f"names-{i}", {}, names, said)
        save(calibration, f"version-{i}", {}, names, said | {KEY: json.dumps(about | {"version": names[0]})})
        save(calibration, f"sizes-{i}", {}, names, said | {KEY: json.dumps(about | {"hidden": names[0]})})
    save(models, FILE, load_file(models / "sixteen-bit.safetensors"))
    save(models, f"svdq-{FILE}", whole)
    save(loras, FILE, lora, [FILE])
    save(calibration, FILE, statistics.tensors(), NAMES[0], {KEY: json.dumps(about | {"note": NAMES[0][0]}), FILE: FILE})
    for folder in (models, loras, calibration, conditioning):
        header = json.dumps({NAMES[0][0]: {"dtype": NAMES[0][0], "shape": [1], "data_offsets": [0, 4]}}).encode()
        written.append(folder / f"damaged-{FILE}")
        written[-1].write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    yield
    for path in (*written, *models.glob("made-*.*")):
        path.unlink()


def seen(shape):
    """Statistics of random inputs."""
    collectors = {layer: Collector(k) for layer, k in inputs(shape).items()}
    for collector in collectors.values():
        collector.update(torch.randn(4, collector.k))
    return Statistics.from_collectors(shape, collectors, 1)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph_of(*nodes):
    """A graph in API form; the nodes are called "0", "1", ..."""
    return {str(i): made for i, made in enumerate(nodes)}


def reports():
    """A graph of what works and shows names, each report also in a 'Preview as Text'."""
    nodes = [node("SVDQModelLoader", model_name="extra-0.safetensors"), node("SVDQModelLoader", model_name=f"svdq-{FILE}"),
             node("SVDQLoraLoader", model=["0", 0], lora_name="left-0.safetensors", strength=1.0),
             node("SVDQLoraLoader", model=["1", 0], lora_name="left-1.safetensors", strength=1.0),
             node("SVDQLoraStack", model=["1", 0], lora_1=FILE, lora_2="left-2.safetensors", lora_3="left-3.safetensors")]
    for name in (*(f"extra-{i}.safetensors" for i in range(len(NAMES))), "gap-0.safetensors", f"svdq-{FILE}"):
        nodes.append(node("SVDQInfo", model_name=name))
    shown = [node("PreviewAny", source=[str(i), int("Lora" in made["class_type"])]) for i, made in enumerate(nodes) if i > 1]
    return graph_of(*nodes, *shown)


def test_reports(page, clean):
    """In both designs of nodes, and as Markdown where a user asks 'Preview as Text' for it."""
    for modern in (False, True):
        page.evaluate(MODERN, modern)
        page.evaluate(FREE)
        assert page.evaluate(RUN, reports()) == ["execution_success", ""]
        page.wait_for_function(SHOWN, arg="single file\nprecision nvfp4")               # lines are lines in both
        page.evaluate(MARKDOWN)
        page.wait_for_timeout(500)                      # what a page makes of a text, it makes in later frames
        assert page.evaluate(FOUND) == [], f"modern: {modern}"
    page.evaluate(MODERN, False)


def test_quantise(page, clean):
    """Its progress and its report name the source."""
    graph = graph_of(node("UNETLoader", unet_name=FILE, weight_dtype="default"),
                     node("SVDQQuantize", model=["0", 0], precision="int4", rank=16, calibration=FILE,
                          filename=f"made-{page.which}"), node("PreviewAny", source=["1", 1]))
    assert page.evaluate(RUN, graph) == ["execution_success", ""]
    page.wait_for_function(SHOWN, arg="median signal to noise")


def failures():
    """(how it ends, nodes) of what cannot be used."""
    def load(name):
        return [node("SVDQModelLoader", model_name=name)]

    def lora(**inputs):
        kind = "SVDQLoraLoader" if "lora_name" in inputs else "SVDQLoraStack"
        return [node("SVDQModelLoader", model_name="nvfp4.safetensors"), node(kind, model=["0", 0], **inputs)]

    def flux(kind, **inputs):
        return [node("UNETLoader", unet_name=FILE, weight_dtype="default"), node(kind, model=["0", 0], **inputs)]

    def quantise(name):
        return flux("SVDQQuantize", precision="int4", rank=16, calibration=name, filename="made-never")

    def capture(name):
        return flux("SVDQCaptureCalibration", filename=name, add_to_file=True)

    damaged, strength = f"damaged-{FILE}", 1.0
    for nodes in (
            load("gap-0.safetensors"), load("gap-3.safetensors"), load("foreign-1.safetensors"), load("foreign-2.safetensors"),
            lora(lora_name="none-0.safetensors", strength=strength), lora(lora_1="none-1.safetensors"),
            lora(lora_1="nan-2.safetensors"), [node("SVDQLoadConditioning", file="names-1.safetensors")],
            capture("version-0"), quantise("version-1.safetensors"), quantise("sizes-2.safetensors"),
            load(damaged), [node("SVDQInfo", model_name=damaged)], lora(lora_name=damaged, strength=strength),
            quantise(damaged), [node("SVDQLoadConditioning", file=damaged)], capture(NAMES[0][0])):
        yield "execution_error", nodes
    yield "refused", load(NAMES[0][0])                  # not in the list: no node runs
    yield "refused", lora(lora_name=NAMES[0][0], strength=strength)


def test_errors(page, clean):
    for how, nodes in failures():
        ended, said = page.evaluate(RUN, graph_of(*nodes, node("PreviewAny", source=[str(len(nodes) - 1), 0])))
        assert ended == how, said
        if ended == "execution_error":
            assert OURS.search(said), said
            page.wait_for_function(DETAILS, arg=said.splitlines()[0])
        assert page.evaluate(FOUND) == [], said
        page.keyboard.press("Escape")
        page.wait_for_function("!document.querySelector('.comfy-error-report')")        # the next would go with it


def test_lists(page, clean):
    """Names of files, in the lists of every node that has one."""
    page.evaluate("graph => app.loadApiJson(graph, 'lists')", graph_of(
        node("SVDQModelLoader", model_name=f"svdq-{FILE}"), node("SVDQInfo", model_name=f"svdq-{FILE}"),
        node("SVDQLoraStack", model=["0", 0]), node("SVDQLoraLoader", model=["0", 0], lora_name=FILE),
        node("SVDQQuantize", model=["0", 0]), node("SVDQLoadConditioning", file=f"damaged-{FILE}")))
    page.evaluate(LISTS)
    assert page.evaluate(SHOWN, FILE)


def test_texts_past_us_are_markup(page):
    """What the others find nothing of is found: elements and requests in both pages, and a script in the oldest."""
    page.asked.clear()
    page.evaluate("graph => app.loadApiJson(graph, 'raw')", graph_of(node("SVDQInfo", model_name="nvfp4.safetensors")))
    try:
        for modern, text, element in ((False, NAMES[0][0], "<x-mark>"), (True, NAMES[1][1], 'src="//evil.invalid/a.png"'),
                                      (False, NAMES[1][2], 'href="http://www.evil.invalid"')):
            page.evaluate(MODERN, modern)
            page.evaluate(SAY, text)
            if page.which == "oldest" or text != NAMES[0][0]:
                page.wait_for_function(SEEN, arg=element)
        assert page.evaluate("window.ran ?? false") == (page.which == "oldest")
        assert any("evil" in asked for asked in page.asked)
        page.evaluate(MODERN, True)
        raw = graph_of(node("PrimitiveString", value=NAMES[3][0]), node("PreviewAny", source=["0", 0]))
        assert page.evaluate(RUN, raw) == ["execution_success", ""]
        page.evaluate(MARKDOWN)
        page.wait_for_function(SEEN, arg="<strong>")
    finally:
        page.evaluate(MODERN, False)
        page.evaluate("app.graph.clear(); window.ran = false")
