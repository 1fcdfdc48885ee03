import copy
import io
import json
import xml.etree.ElementTree as xml

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
])
def test_bad_workflow_files(run, tmp_path, text, message):
    file = tmp_path / "w.json"
    file.write_text(text)
    with pytest.raises(run.UsageError, match=message):
        run.load(str(file))


def test_no_such_workflow(run):
    with pytest.raises(run.UsageError, match="nowhere: neither a file nor a bundled workflow"):
        run.load("nowhere")


def test_bundled_workflows(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "BUNDLED", tmp_path)
    for name in ("b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps(TWO))
    assert run.load("a") == TWO
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out == "a\nb\n"


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
    assert run.main(list(arguments)) == code
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


def test_exit_2_refused(run, comfy, graph, capsys):
    comfy.prompt_answer = 400, {"error": {"message": "node X does not exist"}, "node_errors": {}}
    fails(run, capsys, 2, "node X does not exist", str(graph), "--server", comfy.url)


def test_exit_2_bad_url(run, graph, capsys):
    fails(run, capsys, 2, "must look like", str(graph), "--server", "localhost:8188")


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
