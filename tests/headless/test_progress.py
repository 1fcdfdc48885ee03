import copy
import io

import pytest
from headless.progress import Progress

TWO = {"1": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "First v1.5"}},
       "2": {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "Second"}},
       "7": {"class_type": "SaveImage", "inputs": {}}}


@pytest.fixture
def two():
    return copy.deepcopy(TWO)


class Terminal(io.StringIO):
    def isatty(self):
        return True


EVENTS = [("execution_cached", {"nodes": ["7"]}), ("executing", {"node": "1"}),
          ("progress", {"node": "1", "value": 2, "max": 4}), ("executing", {"node": "new"}),
          ("executing", {"node": None}), ("progress", {"node": None, "value": 1, "max": 2})]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress(two, stream):
    progress = Progress(stream())
    progress.begin(two)
    for kind, data in EVENTS:
        progress.on_event(kind, data)
    progress.end()
    lines = ["[2/3] First v1.5", "[2/3] First v1.5, step 2/4", "[3/3] new"]
    text = progress.stream.getvalue()
    if stream is Terminal:
        assert [line.strip() for line in text.split("\r")] == ["", *lines]
        assert text.count("\n") == 1
    else:
        assert text == "\n".join(lines) + "\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_with_what_a_terminal_would_obey(two, stream):
    two["1"]["_meta"]["title"] = "\x1b]0;owned\x07"
    progress = Progress(stream())
    progress.begin(two)
    for node in ("1", "new\x1b[2J", "x" * 10_000):
        progress.on_event("executing", {"node": node})
    text = progress.stream.getvalue()
    assert r"[1/3] \x1b]0;owned\x07" in text and r"[2/3] new\x1b[2J" in text
    assert text.replace("\r", "").replace("\n", "").isprintable() and len(text) < 1000


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_waiting_and_words_between(stream):
    progress = Progress(stream())
    progress.on_event("queued", {"ahead": 2})
    progress.on_event("queued", {"ahead": 1})
    progress.say("two\nlines")
    text = progress.stream.getvalue()
    assert [line.strip() for line in text.replace("\r", "\n").split("\n") if line] == \
        ["queued, 2 ahead", "queued, 1 ahead", "two", "lines"]
    assert text.endswith("\ntwo\nlines\n")


def test_letters_that_are_two_cells_wide(two, monkeypatch):
    """A line that is wider than the terminal wraps, and the next one begins below it."""
    monkeypatch.setenv("COLUMNS", "30")
    two["1"]["_meta"]["title"], two["2"]["_meta"]["title"] = "\u52a0\u8f7d\u6a21\u578b", "\u91c7\u6837" * 20
    progress = Progress(Terminal())
    progress.begin(two)
    for node in "12":
        progress.on_event("executing", {"node": node})
    lines = progress.stream.getvalue().split("\r")[1:]
    assert lines == ["[1/3] \u52a0\u8f7d\u6a21\u578b" + " " * 15, "[2/3] " + "\u91c7\u6837" * 5 + "\u91c7 "]


def test_quiet(two):
    progress = Progress(Terminal(), quiet=True)
    progress.begin(two)
    for kind, data in [("queued", {"ahead": 2}), *EVENTS]:
        progress.on_event(kind, data)
    progress.say("x")
    progress.end()
    assert progress.stream.getvalue() == ""
