"""The FLUX graphs of the earlier pack in ComfyUI's web page: 'Swap Nodes', and what is then said of the rest."""

import pytest

from svdq_pack.tests.comfy.earlier_graphs import GRAPHS, SAID, STOCK
from svdq_pack.tests.comfy.test_browser import browsing, page_of, pytestmark, sync_api  # noqa: F401

ON_PAGE = """app.graph.nodes.map(node => [node.type, (node.widgets ?? []).map(widget => widget.value),
             (node.inputs ?? []).filter(input => input.link)
             .map(input => Number(app.graph.links.get(input.link).origin_id))])"""
TOAST = ".p-toast-message:has-text('ComfyUI-nunchaku')"


@pytest.fixture(scope="module")
def page(server):
    with browsing(server) as page:
        yield page


def graph_of(found):
    """A graph as the page saves it: nodes in a row, each linked to the one before where it takes a model."""
    nodes, links = [], []
    for i, (kind, values) in enumerate(found, 1):
        takes = "model" if "Lora" in kind or "Apply" in kind or "PuLIDLoader" in kind or "IPAdapterLoader" in kind else None
        gives = "CLIP" if "TextEncoder" in kind else "MODEL" if kind.startswith("Nunchaku") else "IMAGE"
        nodes.append({"id": i, "type": kind, "pos": [400 * i, 0], "size": [300, 200], "mode": 0, "properties": {},
                      "inputs": [], "outputs": [{"name": gives, "type": gives, "links": []}], "widgets_values": values})
        before = next((node for node in reversed(nodes[:-1]) if node["outputs"][0]["type"] == "MODEL"), None)
        if takes and before:
            links.append([len(links) + 1, before["id"], 0, i, 0, "MODEL"])
            before["outputs"][0]["links"].append(len(links))
            nodes[-1]["inputs"] = [{"name": takes, "type": "MODEL", "link": len(links)}]
    return {"last_node_id": len(nodes), "last_link_id": len(links), "links": links, "version": 0.4, "nodes": nodes}


def swapped(page, graph):
    """Open a graph and press Replace All, which nothing of ours covers. What is on the page (before, after), our toasts."""
    for close in page.locator(f"{TOAST} button").all():
        close.click()
    sync_api.expect(page.locator(TOAST)).to_have_count(0)
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    before = page.evaluate(ON_PAGE)
    page.get_by_test_id("error-overlay-see-errors").click()
    page.get_by_text("Replace All", exact=True).click()
    page.wait_for_function("app.graph.nodes[0].type === 'SVDQModelLoader'")
    page.wait_for_function("new Promise(done => setTimeout(() => done(true), 100))")
    return before, page.evaluate(ON_PAGE), page.locator(TOAST)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, page):
    """Replace All leaves the types of the table, with their values and links, and nothing is lost unsaid."""
    found, after = GRAPHS[name]
    before, now, toasts = swapped(page, graph_of(found))
    assert [kind for kind, _, _ in now] == after and [links for _, _, links in now] == [links for _, _, links in before]
    for (kind, values), (_, shown, _) in zip(found, now):
        if kind == "NunchakuFluxDiTLoader":
            assert shown == [values[0], "bfloat16", "auto"]
        elif kind == "NunchakuFluxLoraLoader":
            assert shown == values
        elif "TextEncoder" in kind:
            assert shown == [values[1], values[2], 512, "default"]
    sync_api.expect(toasts).to_have_count(int(name in SAID))
    if name in SAID:
        text = toasts.inner_text()
        assert all(words in text for words in SAID[name]), text


def test_stack(page):
    """The first five LoRAs go over; what is said names the others."""
    values = [value for i in range(1, 8) for value in (f"{i}.safetensors", i / 10)] + ["None", 1.0] * 8
    _, now, toasts = swapped(page, graph_of([("NunchakuFluxDiTLoader", ["a", 0]), ("NunchakuFluxLoraStack", values)]))
    assert now[1] == ["SVDQLoraStack", values[:10], [1]]
    assert "6.safetensors, 7.safetensors of slot 6 and above would be lost" in toasts.inner_text()


def test_stock_nodes_of_these_graphs(page):
    """The rest of them is ComfyUI's own, or its page's."""
    assert page.evaluate("names => names.filter(name => !(name in LiteGraph.registered_node_types))", sorted(STOCK)) == []


def test_said_to_whoever_swaps_by_hand(page):
    """Nothing is said before; the texts of a graph are forgotten with it."""
    graph, toasts = graph_of(GRAPHS["ip-adapter"][0]), page.locator(TOAST)
    for close in page.locator(f"{TOAST} button").all():
        close.click()
    sync_api.expect(toasts).to_have_count(0)            # they fade
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.evaluate("app.loadGraphData({version: 0.4, nodes: [], links: []})")
    page.evaluate("app.graph.add(LiteGraph.createNode('SVDQModelLoader'))")
    page.wait_for_timeout(300)
    assert toasts.count() == 0
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(300)
    assert toasts.count() == 0
    page.evaluate("app.graph.add(LiteGraph.createNode('SVDQModelLoader'))")
    sync_api.expect(toasts).to_have_count(1)


@pytest.mark.parametrize("body, status", [("{", 400), ("null", 200), ("[[], 3]", 200), ('{"a": 1}', 200)])
def test_any_body(body, status, page):
    assert page.evaluate("""body => fetch('/api/svdq/earlier_pack', {method: 'POST', body}).then(
                            async answer => [answer.status, await answer.json()])""", body) == [status, []]


def test_oldest_page(servers, page):
    """It says the same."""
    page = page_of(servers("oldest"), page.context.browser)
    page.evaluate("graph => app.loadGraphData(graph)", graph_of(GRAPHS["dev-pulid"][0]))
    page.evaluate("app.graph.add(LiteGraph.createNode('SVDQModelLoader'))")
    text = page.locator(TOAST).inner_text()
    assert all(words in text for words in SAID["dev-pulid"]), text
