"""nodes/prompt_server.py: the only way of a text to ComfyUI's page, where it is no markup. tests/comfy/test_markup.py shows
that in the page itself."""

import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "nodes"
# What the page makes links of: frontend 1.39 to 1.47, packages/shared-frontend-utils/src/formatUtil.ts, TextPreviewWidget.vue
LINKS = (r"\b(?:https?|ftp|file)://[-A-Z0-9+&@#/%?=~_|!:,.;]*[-A-Z0-9+&@#/%?=~_|]",
         r"\bwww\.[-A-Z0-9+&@#/%?=~_|!:,.;]*[-A-Z0-9+&@#/%?=~_|]", r"\[\[[^|\]]+\|[^\]]+\]\]", r"__LNK\d+__")
HOSTILE = ["<img src=x onerror=f()>", "</span><script>f()</script>", "<!-- -->", "&lt;b&gt; &#60;b&#x3e; &amp;lt;", "[[a|https://b]]",
           "[[[a|javascript:f()]]]", "__LNK0__", "a__LNK0__", "___LNK0___", "https://a.b", "FILE://a", "www.a.b", "WwW.a.b",
           "a@b.c", "[a](b)", "![a](//b/c.png)", "[a][b]\n[b]: //c", "*a* **a** ***a***", "_a_ __a__ ._a_.", "~~a~~ ~a~", "`a`"]


@pytest.fixture(scope="module")
def server():
    """The module, which imports nothing of ComfyUI though its folder does."""
    spec = importlib.util.spec_from_file_location("svdq_pack.nodes.prompt_server", NODES / "prompt_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text, shown", [
    ("<img src=x onerror=f()>", "‹img src=x onerror=f()›"),
    ("&lt;b&gt; & R&D", "& lt;b& gt; & R& D"),
    ("[[a|https://b]] [3, 4]", "[ [a|https: //b]] [3, 4]"),
    ("![a](b) [c][d] [e]: f", "![a] (b) [c] [d] [e] : f"),
    ("www.a.b a@b.c", "www. a.b a@ b.c"),
    ("__LNK0__", "_ _ LNK0__"),
    ("*a* ~~b~~ `c` _d_", "* a* ~ ~ b~ ~ 'c' _ d_"),
    ("line\n  line\r\x1b[2J\u202e\ud800", "line\n  line\\r\\x1b[2J\\u202e\\ud800"),
])
def test_plain(text, shown, server):
    """It reads as it was meant."""
    assert server.plain(text) == shown


@pytest.mark.parametrize("text", [
    "models/diffusion_models/svdq-int4_r32-flux.1-dev.safetensors\n  rank            32 (152 layers)\n  problems        none",
    "transformer_blocks.0.mlp_fc1.qweight: is I8 [3, 4]; needs I8 [3072, 1536]",
    "rank          0 + 4 on 2, 16 + 12 on 2 layers: of the model's file + of all LoRAs so far; error at most 1.2e-03, é ü 模型",
    "double block 1 of 19, img_mlp.2, 0:59 left (60%)"])
def test_ordinary_text_stays(text, server):
    assert server.plain(text) == text


@pytest.mark.parametrize("text", [*HOSTILE, " ".join(HOSTILE), "".join(HOSTILE), "".join(reversed(HOSTILE))])
def test_nothing_is_markup(text, server):
    """Neither for a parser of HTML nor for what the page looks for, nor when it is shown again."""
    shown, found = server.plain(text), []
    parser = HTMLParser(convert_charrefs=False)
    for kind in ("starttag", "endtag", "comment", "decl", "entityref", "charref", "pi"):
        setattr(parser, f"handle_{kind}", lambda *what: found.append(what))
    parser.feed(shown)
    parser.close()
    assert found == [] and not re.search("|".join(LINKS), shown, re.IGNORECASE)
    assert not re.search(r"[<>`]|\[\[|\]\(|\]\[|\]:|://|[*~@]\S", shown)
    assert server.plain(shown) == shown


def test_show(server, monkeypatch):
    """What a node puts out is what the page gets, but for what ends a line in Markdown."""
    said, node = [], SimpleNamespace(hidden=SimpleNamespace(unique_id="7"))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(
        send_progress_text=lambda *sent: said.append(sent)))))
    assert server.show("a <b>\n  c", node) == "a ‹b›\n  c"
    assert said == [("a ‹b›  \n  c", "7")]
    assert server.show("<b>", SimpleNamespace(hidden=None)) == "‹b›" and len(said) == 1
    monkeypatch.delitem(sys.modules, "server")
    assert server.show("<b>", node) == "‹b›" and len(said) == 1


def test_the_only_way_to_the_page():
    ways = re.compile(r"send_progress_text|send_sync|send_json|send_bytes|\bimport server\b|\bfrom server\b")
    assert {path.name for path in NODES.rglob("*.py") if ways.search(path.read_text(encoding="utf-8"))} == {"prompt_server.py"}
