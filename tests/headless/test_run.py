import copy
import io
import json
import os
import struct
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

TWO = {"1": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "First v1.5"}},
       "2": {"class_type": "KSampler", "inputs": {"seed": 1, "images.image0": 0}, "_meta": {"title": "Second"}},
       "7": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}


@pytest.fixture
def two():
    return copy.deepcopy(TWO)


# ---- --set ----

@pytest.mark.parametrize("change, id, name, value", [
    ("1.seed=7", "1", "seed", 7),
    ("Second.seed=-1.5", "2", "seed", -1.5),
    ("First v1.5.seed=[\"2\", 0]", "1", "seed", ["2", 0]),
    ("Second.images.image0=true", "2", "images.image0", True),
    ("SaveImage.filename_prefix=a=b.c", "7", "filename_prefix", "a=b.c"),
    ("SaveImage.filename_prefix=", "7", "filename_prefix", ""),
    ("SaveImage.filename_prefix=\"7\"", "7", "filename_prefix", "7"),
])
def test_set(run, two, change, id, name, value):
    run.apply(two, change)
    expected = copy.deepcopy(TWO)
    expected[id]["inputs"][name] = value
    assert two == expected


@pytest.mark.parametrize("change, message", [
    ("seed=1", "must be NODE.INPUT=VALUE"),
    ("1.seed", "must be NODE.INPUT=VALUE"),
    ("KSampler.seed=1", r"several nodes are called KSampler(.|\n)*1: First v1.5 \(KSampler\)\n  2: Second \(.*\)$"),
    ("Third.seed=1", r"no node is called Third(.|\n)*7: SaveImage \(SaveImage\)$"),
    ("1.sed=1", r"1: First v1.5 \(KSampler\) has no input sed. It has seed\."),
])
def test_set_refuses(run, two, change, message):
    with pytest.raises(run.UsageError, match=message):
        run.apply(two, change)
    assert two == TWO


# ---- workflow files ----

@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"),
    ('{"nodes": [], "links": []}', r"Export \(API\)"),
    ("[]", "not a workflow in API format"),
    ("{}", "not a workflow in API format"),
    ('{"1": {"inputs": {}}}', "not a workflow in API format"),
    ('{"1": {"class_type": "A", "inputs": []}}', "not a workflow in API format"),
    ("[" * 200_000, "not JSON"), ('{"1":' * 200_000, "not JSON"), ("9" * 5000, "not JSON"),
])
def test_bad_workflow_files(run, tmp_path, text, message):
    file = tmp_path / "w.json"
    file.write_text(text)
    with pytest.raises(run.UsageError, match=message):
        run.load(str(file))


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", "\x1b]0;owned\x07", "/dev/zero"])
def test_no_such_workflow(run, name):
    with pytest.raises(run.UsageError, match="neither a file nor a bundled workflow") as caught:
        run.load(name)
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def test_enormous_workflow(run, tmp_path):
    """All holes: nothing on the disk, a terabyte to read."""
    with open(tmp_path / "w.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(run.UsageError, match="w.json: has more than 67,108,864 bytes"):
        run.load(str(tmp_path / "w.json"))


@pytest.mark.parametrize("meta", [[], ["title"], "title", 7, None, {"title": ["x"]}, {"title": None}, {"title": ""}])
def test_nodes_without_a_title(run, two, meta):
    two["7"]["_meta"] = meta
    run.apply(two, "SaveImage.filename_prefix=a")
    assert two["7"]["inputs"] == {"filename_prefix": "a"} and run.describe(two, "7") == "7: SaveImage (SaveImage)"


def test_a_value_too_deep_for_json_is_text(run, two):
    run.apply(two, "7.filename_prefix=" + "[" * 5000)
    assert two["7"]["inputs"]["filename_prefix"] == "[" * 5000


def test_messages_of_large_workflows(run):
    prompt = {f"{i}{'x' * 500}": {"class_type": "A" * 5000, "inputs": {f"{i}{'y' * 500}": 0 for i in range(200)}}
              for i in range(200)}
    for change in ("B.seed=1", f"{'z' * 5000}.seed=1", "A" * 5000 + ".seed=1", f"0{'x' * 500}.{'z' * 5000}=1", "z" * 5000):
        with pytest.raises(run.UsageError) as caught:
            run.apply(prompt, change)
        assert len(str(caught.value)) < 50_000 and ("100 more" in str(caught.value) or change[0] == "z")


def chunk(kind, data):
    return struct.pack(">I4s", len(data), kind) + data + b"sum."


def test_a_picture_is_the_graph_that_painted_it(run, tmp_path):
    """As PNG files of ComfyUI are: the canvas form beside the API form, and numbers of the picture before both."""
    file, head = tmp_path / "painted.png", run.PNG + chunk(b"IHDR", bytes(13)) + chunk(b"tEXt", b"workflow\0{}")
    file.write_bytes(head + chunk(b"tEXt", b"prompt\0" + json.dumps(TWO).encode()) + chunk(b"IEND", b""))
    assert run.load(str(file)) == TWO
    for other in (head, head + chunk(b"IEND", b""), head + b"\xff\xff\xff\xfftEXtprompt", run.PNG,
                  head + chunk(b"zTXt", b"prompt\0" + json.dumps(TWO).encode())):
        file.write_bytes(other)
        with pytest.raises(run.UsageError, match="not JSON"):
            run.load(str(file))


@pytest.mark.parametrize("ending", [".json", ".app.json"])
def test_the_file_of_a_template(run, ending):
    """What completing a path in a terminal gives is for the canvas; its name is for here."""
    with pytest.raises(run.UsageError, match="canvas saves. It is bundled in API format: say svdq-00-demo.$"):
        run.load(str(run.environment.ROOT / "workflows" / f"svdq-00-demo{ending}"))


def test_bundled_workflows(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "BUNDLED", tmp_path)
    for name in ("svdq-01-b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps(TWO))
    assert run.load("a") == run.load("b") == run.load("svdq-01-b") == TWO
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out == "a\nsvdq-01-b\n"


def test_names_that_bundled_workflows_had(run):
    """In scripts they are spelt as they once were."""
    for name in ("demo", "demo-lora", "flux-dev-text-to-image", "flux-schnell-text-to-image"):
        assert run.load(name)


# ---- the command, against a fake server ----

def test_pictures_are_saved_and_named_last(run, comfy, graph, tmp_path, capsys):
    arguments = [str(graph), "--server", comfy.url, "--out", str(tmp_path / "out"), "--set", "Empty.width=32"]
    for subfolder, name in (("s", "a b.png"), ("s", "a b.png"), ("other", "a b-1.png")):
        comfy.outputs["2"]["images"][0]["subfolder"] = subfolder
        assert run.main(arguments) == 0
        picture = tmp_path / "out" / name
        assert capsys.readouterr().out == f"{picture}\n"
        assert picture.read_bytes() == f"pixels of /view?filename=a+b.png&subfolder={subfolder}&type=output".encode()
    assert len(list((tmp_path / "out").iterdir())) == 2             # neither doubled nor overwritten
    sent = [json.loads(body) for path, body in comfy.seen if path == "/prompt"]
    assert sent[0]["prompt"]["1"]["inputs"] == {"width": 32}


def test_a_file_name_from_the_server_stays_inside(run, comfy, graph, tmp_path):
    comfy.outputs = {"2": {"images": [{"filename": "../../evil.png", "subfolder": "", "type": "output"}]}}
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path / "a" / "b")]) == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["evil.png"]


def fails(run, capsys, code, message, *arguments):
    """With a workflow's path first; its folder is where pictures go unless there is another --out."""
    assert run.main([arguments[0], "--out", str(Path(arguments[0]).parent), *arguments[1:]]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_exit_1_a_node_fails(run, comfy, graph, capsys):
    comfy.messages = [["execution_error", {"node_id": "1", "node_type": "EmptyImage", "exception_type": "E",
                                           "exception_message": "out of paint"}]]
    fails(run, capsys, 1, "out of paint", str(graph), "--server", comfy.url)


def test_exit_1_no_picture(run, comfy, graph, capsys):
    comfy.outputs = {}
    fails(run, capsys, 1, "without a picture", str(graph), "--server", comfy.url)


def test_a_text_is_printed_where_there_is_no_picture(run, comfy, graph, tmp_path, capsys):
    comfy.outputs = {"2": {"text": ["int4 weights\nrank 32", 7]}, "3": {"text": None}}
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "int4 weights\nrank 32\n"


def test_exit_2_refused(run, comfy, graph, capsys):
    comfy.prompt_answer = 400, {"error": {"message": "node X does not exist"}, "node_errors": {}}
    fails(run, capsys, 2, "node X does not exist", str(graph), "--server", comfy.url)


@pytest.mark.parametrize("out", ["/dev/null/x", "file", "file/x", "a\0b", "x" * 300])
def test_exit_2_no_place_for_the_pictures(run, comfy, graph, tmp_path, monkeypatch, capsys, out):
    """Said before anything is queued, and before a server of our own is started."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(run.environment, "find", None)
    fails(run, capsys, 2, "cannot be written: ", str(graph), "--server", comfy.url, "--out", str(tmp_path / out))
    fails(run, capsys, 2, "cannot be written: ", str(graph), "--out", str(tmp_path / out))
    assert comfy.seen == []


def test_exit_1_a_picture_that_cannot_be_saved(run, comfy, graph, tmp_path, capsys):
    comfy.outputs["2"]["images"][0]["filename"] = "x" * 300
    fails(run, capsys, 1, "cannot be written: ", str(graph), "--server", comfy.url, "--out", str(tmp_path))


def test_nothing_is_written_through_a_link(run, comfy, graph, tmp_path):
    (tmp_path / "a b.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a b-1.png")
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "a b-2.png").is_file() and not (tmp_path / "nowhere").exists()


def test_what_a_terminal_would_obey(run, comfy, graph, tmp_path, capsys):
    """Titles, names of pictures, and what the server says are shown, not obeyed."""
    evil = "\x1b]0;owned\x07"
    prompt = json.loads(graph.read_text())
    prompt["1"]["_meta"]["title"] = evil
    graph.write_text(json.dumps(prompt))
    arguments = [str(graph), "--server", comfy.url, "--out", str(tmp_path / "out")]
    comfy.outputs["2"]["images"][0]["filename"] = f"{evil}.png"
    assert run.main(arguments) == 0
    said = capsys.readouterr()
    assert r"\x1b]0;owned\x07.png" in said.out
    comfy.messages = [["execution_error", {"node_id": evil, "node_type": evil, "exception_type": "E",
                                           "exception_message": f"out of\npaint{evil}"}]]
    assert run.main(arguments) == 1 and "of\npaint" in (failed := capsys.readouterr().err)
    assert run.main([*arguments, "--set", f"{evil}.seed=1"]) == 2
    assert run.main([*arguments, "--set", "nobody.seed=1"]) == 2
    for text in (said.err, said.out, failed, capsys.readouterr().err):
        assert text.replace("\n", "").isprintable(), text


def test_exit_2_bad_url(run, graph, capsys):
    fails(run, capsys, 2, "must look like", str(graph), "--server", "ftp://localhost:8188")


def test_exit_3_nobody_there(run, nobody, graph, capsys):
    fails(run, capsys, 3, "no ComfyUI answers at", str(graph), "--server", nobody)


def test_exit_130_interrupts_the_server_too(run, comfy, graph, fakes, monkeypatch, capsys):
    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Progress, "on_event", ctrl_c)
    comfy.talk = lambda ws: ws.send(fakes.frame(1, fakes.event("executing", node="1")))
    fails(run, capsys, 130, "interrupted", str(graph), "--server", comfy.url)
    assert ("/interrupt", json.dumps({"prompt_id": fakes.ID}).encode()) in comfy.seen


# ---- progress ----

class Terminal(io.StringIO):
    def isatty(self):
        return True


EVENTS = [("execution_cached", {"nodes": ["7"]}), ("executing", {"node": "1"}),
          ("progress", {"node": "1", "value": 2, "max": 4}), ("executing", {"node": "new"}),
          ("executing", {"node": None})]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress(run, two, stream):
    progress = run.Progress(two, stream())
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
def test_progress_with_what_a_terminal_would_obey(run, two, stream):
    two["1"]["_meta"]["title"] = "\x1b]0;owned\x07"
    progress = run.Progress(two, stream())
    for node in ("1", "new\x1b[2J", "x" * 10_000):
        progress.on_event("executing", {"node": node})
    text = progress.stream.getvalue()
    assert r"[1/3] \x1b]0;owned\x07" in text and r"[2/3] new\x1b[2J" in text
    assert text.replace("\r", "").replace("\n", "").isprintable() and len(text) < 1000


# ---- tests/run.py ----

def test_summary_counts_reasons(run_tests):
    report = xml.ElementTree(xml.fromstring("""<testsuites><testsuite>
        <testcase name="a"/><testcase name="b"/>
        <testcase name="c"><failure/></testcase><testcase name="d"><error/></testcase>
        <testcase name="e"><skipped message="no GPU"/></testcase>
        <testcase name="f"><skipped message="no GPU"/></testcase>
        <testcase name=""><skipped message="collection skipped">('t.py', 3, 'Skipped: no nvcc')</skipped></testcase>
        </testsuite></testsuites>"""))
    assert run_tests.summary(report) == "2 passed, 2 failed, 3 skipped (2: no GPU; 1: no nvcc)"
