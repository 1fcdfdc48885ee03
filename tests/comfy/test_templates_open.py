"""Every template in ComfyUI's web page, the newest's and the oldest's: opened as the file is, without the template browser."""

import pytest

from svdq_pack.tests.comfy.test_browser import CHROMIUM, browsing, is_open
from svdq_pack.tests.comfy.test_workflows import NAMES, files_in_place, opened

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module", params=["newest", "oldest"])
def frontend(request, servers, base):
    """(page of that ComfyUI, what its console complained about)"""
    complaints = []
    server = servers(request.param)
    server.client._request("/history", b'{"clear": true}', "application/json")      # it lists what other tests sent: NaN
    with files_in_place(base), browsing(server) as page:
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page, complaints


@pytest.mark.parametrize("name", NAMES)
def test_template_opens(name, frontend):
    """Every node is known, the console says nothing, and what would be queued is the API form."""
    page, complaints = frontend
    complaints.clear()
    page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [opened(name), name])
    assert is_open(page, name)
    assert complaints == []
