import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
from headless import client as client_module
from headless import maker
from headless.environment import ROOT


@pytest.fixture(autouse=True)
def default(run, nobody, monkeypatch):
    """What stands at the default address: nobody, and never the ComfyUI of whoever runs the tests."""
    def set(url):
        monkeypatch.setattr(run, "PORT", int(url.rpartition(":")[2]))
    set(nobody)
    monkeypatch.setattr(client_module, "POLL", 0)
    return set


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


def test_nobody_reads_how_it_goes_on(run, comfy, graph, fakes, monkeypatch):
    """`2>&1 | head`: what was queued is taken back."""
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(run.Progress, "on_event", closed)
    monkeypatch.setattr(run.sys, "stdout", open(os.devnull, "w"))
    comfy.talk = lambda ws: ws.send(fakes.frame(1, fakes.event("executing", node="1")))
    assert run.main([str(graph), "--server", comfy.url, "--out", str(graph.parent)]) == 141
    assert ("/interrupt", json.dumps({"prompt_id": fakes.ID}).encode()) in comfy.seen


def test_a_server_that_is_lost_for_a_moment(run, comfy, graph, fakes, capsys):
    """Whoever runs it again does not have it twice."""
    comfy.queue = ["a page of a proxy"]
    fails(run, capsys, 3, "did not answer JSON", str(graph), "--server", comfy.url)
    assert ("/interrupt", json.dumps({"prompt_id": fakes.ID}).encode()) in comfy.seen


def test_files_that_came_before_one_did_not(run, comfy, graph, tmp_path, capsys):
    comfy.outputs["2"]["images"].append({"filename": "x" * 300, "subfolder": "", "type": "output"})
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "a b.png")]


# ---- which ComfyUI ----

@pytest.fixture
def start(run, monkeypatch):
    """start(FakeComfy): what a ComfyUI that is started is. Returns the list of the ports it was asked for."""
    def start(comfy):
        ports = []

        class Started:
            url, log, keep_log = comfy.url, "server.log", False

            def __init__(self, environment, port=0):
                ports.append(port)
                self.process = self
                self.returncode = None

            def poll(self):
                return self.returncode

            def log_tail(self):
                return "  | last words"

            def wait(self):
                raise KeyboardInterrupt

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(run, "ComfyProcess", Started)
        monkeypatch.setattr(run.environment, "find", lambda: run.environment.Environment("python", "tree", None, []))
        return ports
    return start


def saved(capsys):
    """(standard output's lines, standard error)"""
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


def test_the_one_that_runs_is_used(run, comfy, default, start, graph, tmp_path, capsys):
    ports = start(comfy)
    default(comfy.url)
    arguments = [str(graph), "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0 and ports == []
    assert f"using the ComfyUI at {comfy.url}; --new would start another" in capsys.readouterr().err
    assert run.main([*arguments, "--new"]) == 0 and ports == [0]
    assert "starting ComfyUI" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"system": []}, {"system": {"other": 1}}, {"definitions": {"EmptyImage": {}}}])
def test_what_runs_there_does_not_fit(run, comfy, default, start, graph, tmp_path, capsys, change):
    """No ComfyUI, or one without a node of the workflow."""
    ports = start(comfy)
    default(comfy.url)
    for name, value in change.items():
        setattr(comfy, name, value)
    assert run.main([str(graph), "--out", str(tmp_path / "out")]) == 0 and ports == [0]
    assert ("has no node SaveImage: another one serves" in capsys.readouterr().err) == ("definitions" in change)


def test_host_and_port_are_enough(run, comfy, graph, tmp_path):
    assert run.main([str(graph), "--out", str(tmp_path), "--server", comfy.url.removeprefix("http://")]) == 0


def test_login(run, comfy, graph, tmp_path, capsys):
    (tmp_path / "headers").write_text("X-Two: b\n\n")
    server = comfy.url.replace("://", "://me:p%40ss@")
    arguments = [str(graph), "--out", str(tmp_path), "--header", "X-One: a: b", "--header", f"@{tmp_path / 'headers'}"]
    assert run.main([*arguments, "--server", server]) == 0
    for sent in comfy.headers:                          # the websocket's, too
        assert (sent["Authorization"], sent["X-One"], sent["X-Two"]) == ("Basic bWU6cEBzcw==", "a: b", "b"), sent
    comfy.headers.clear()
    assert run.main([*arguments, "--server", server, "--header", "authorization: Bearer x"]) == 0
    for sent in comfy.headers:                          # one login, whichever is said last
        assert [value for name, value in sent.items() if name.lower() == "authorization"] == ["Bearer x"]
    assert "bWU6cEBzcw" not in (said := capsys.readouterr().err) and "p%40ss" not in said
    for bad in ("secret", "X y: secret", "X: secret\r\nEvil: 1", "@/nowhere", ": secret"):
        fails(run, capsys, 2, "", *arguments, "--server", server, "--header", bad)


@pytest.mark.parametrize("ca, url, message", [("", "http://a", "is for a --server that begins with https"),
                                              ("/nowhere", "https://a", "no file of certificates in PEM"),
                                              ("no.pem", "https://a", "no file of certificates in PEM")])
def test_authorities_that_are_none(run, graph, tmp_path, capsys, ca, url, message):
    (tmp_path / "no.pem").write_text("nothing")
    fails(run, capsys, 2, message, str(graph), "--server", url, "--ca", str(tmp_path / ca if ca else graph))


def test_a_server_of_ours_that_fails_shows_its_log(run, comfy, start, graph, fakes, tmp_path, capsys):
    start(comfy)
    comfy.messages = [["execution_error", {"node_id": "1", "node_type": "E", "exception_type": "E", "exception_message": "x"}]]
    fails(run, capsys, 1, "The server's log, server.log, ends with:\n  | last words", str(graph))


def test_open(run, comfy, start, default, capsys, monkeypatch):
    monkeypatch.setattr(run.webbrowser, "open", None)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    ports = start(comfy)
    comfy.definitions |= {node["class_type"]: {} for node in run.graph.load("demo").values()}
    comfy.templates = {"other": [], "the pack": ["svdq-00-demo"]}
    page = f"{comfy.url}/?template=svdq-00-demo&source=the+pack"
    assert run.main(["--open", "demo"]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert ports == [run.PORT]
    default(comfy.url)                                  # where one runs it is that, and nothing ends with this command
    opened = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(run.webbrowser, "open", opened.append)
    assert run.main(["--open"]) == 0 and len(ports) == 1 and opened == [page]
    capsys.readouterr()
    fails(run, capsys, 2, "no bundled workflow", "nowhere", "--open")


# ---- several runs ----

def sent(comfy):
    return [json.loads(body)["prompt"] for path, body in comfy.seen if path == "/prompt"]


@pytest.fixture
def painting(tmp_path):
    path = tmp_path / "painting.json"
    path.write_text(json.dumps({"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "old"}, "_meta": {"title": "Prompt"}},
                                "2": {"class_type": "KSampler", "inputs": {"seed": 5}},
                                "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}}}))
    return path


def test_every_prompt_with_every_seed(run, comfy, painting, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a fox\n# none\n\n @owl \n")
    assert run.main([str(painting), "--server", comfy.url, "--out", str(tmp_path / "out"), "--count", "2", "--seed", "8",
                     "--prompts", str(tmp_path / "p.txt")]) == 0
    assert [(prompt["1"]["inputs"]["text"], prompt["2"]["inputs"]["seed"]) for prompt in sent(comfy)] == \
        [("a fox", 8), ("a fox", 9), ("@owl", 8), ("@owl", 9)]
    out, err = saved(capsys)
    assert out == [str(tmp_path / "out" / "a b.png")] * 4       # the fake's pictures are the same file
    assert [line.partition(" s")[2] for line in err.splitlines() if "done in" in line] == \
        [", KSampler.seed=8", ", KSampler.seed=9"] * 2


def test_prompts_of_another_input(run, comfy, painting, tmp_path, monkeypatch):
    monkeypatch.setattr(run.sys, "stdin", open(os.devnull))
    (tmp_path / "a=b.txt").write_text("x")
    arguments = [str(painting), "--server", comfy.url, "--out", str(tmp_path / "out"), "--prompts"]
    assert run.main([*arguments, f"CLIPTextEncode.text={tmp_path / 'a=b.txt'}"]) == 0
    assert run.main([*arguments, str(tmp_path / "a=b.txt")]) == 0
    assert [prompt["1"]["inputs"]["text"] for prompt in sent(comfy)] == ["x", "x"]


@pytest.mark.parametrize("arguments, message", [
    (["--prompts", "/nowhere"], "cannot be read"), (["--prompts", "-"], "has no prompt in it"),
    (["--prompts", "Nobody.text=-"], "no node is called Nobody"), (["--prompts", "Prompt.txt=-"], "has no input txt"),
    (["--prompts", "a=-"], "must be FILE or NODE.INPUT=FILE")])
def test_exit_2_no_prompts(run, comfy, painting, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(run.sys, "stdin", open(os.devnull))
    if "Prompt.txt=-" in arguments:
        painting.with_name("p").write_text("x")
        arguments = ["--prompts", f"Prompt.txt={painting.with_name('p')}"]
    fails(run, capsys, 2, message, str(painting), "--server", comfy.url, *arguments)
    assert sent(comfy) == []


@pytest.mark.parametrize("arguments", [
    ["--seed", "-1"], ["--seed", str(2**64)], ["--seed", "x"], ["--seed", "\u0663"], ["--count", "0"], ["--count", "9" * 5000],
    ["--timeout", "0"], ["--timeout", "nan"], ["--timeout", "inf"], ["--timeout", "x"], ["--new", "--server", "x"],
    ["--list", "--show"], ["--seed", "9" * 5000]])
def test_exit_2_arguments(run, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2 and len(capsys.readouterr().err) < 2000


def test_runs_go_on_after_one_that_failed(run, comfy, painting, tmp_path, capsys):
    """And the exit code is that of the first that did."""
    ok, bad = comfy.messages, [["execution_error", {"node_id": "1", "node_type": "T", "exception_type": "E",
                                                    "exception_message": "unknown word"}]]
    answers = iter([ok, bad, ok])
    comfy.talk = lambda ws: setattr(comfy, "messages", next(answers))
    assert run.main([str(painting), "--server", comfy.url, "--out", str(tmp_path / "out"), "--count", "3", "--json"]) == 1
    out, err = saved(capsys)
    runs = [json.loads(line) for line in out]
    assert [one["error"] for one in runs] == [None, "node 1 (T) failed: E: unknown word", None]
    assert [one["seeds"] for one in runs] == [{"KSampler.seed": seed} for seed in (5, 6, 7)]
    assert [len(one["files"]) for one in runs] == [1, 0, 1] and err.count("unknown word") == 1


def test_the_exit_code_is_the_first_failures(run, comfy, painting, tmp_path, capsys):
    def talk(ws):
        comfy.running_for = 0 if bad else 1 << 30
        comfy.messages = bad.pop() if bad else []

    bad = [[["execution_error", {"node_id": "1", "node_type": "T", "exception_type": "E", "exception_message": "x"}]]]
    comfy.talk = talk
    assert run.main([str(painting), "--server", comfy.url, "--out", str(tmp_path), "--count", "2", "--timeout", "0.5"]) == 1
    err = capsys.readouterr().err
    assert "failed: E: x" in err and "not done after 0.5 s" in err


# ---- what is said ----

def test_json_of_a_run(run, comfy, graph, fakes, tmp_path, capsys):
    comfy.outputs["1"] = {"text": ["int4", 7]}
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    one = json.loads(said.out)
    assert 0 <= one.pop("seconds") < 60 and said.err == ""
    assert one == {"prompt_id": fakes.ID, "files": [str(tmp_path / "out" / "a b.png")], "seeds": {}, "texts": ["int4"],
                   "error": None}


@pytest.mark.parametrize("arguments, code, message", [
    (["--server", "ftp://x"], 2, "must look like"), (["--set", "x"], 2, "must be NODE.INPUT=VALUE"),
    (["--seed", "3"], 2, "no input called seed")])
def test_json_of_an_error_before_any_run(run, graph, tmp_path, capsys, arguments, code, message):
    assert run.main([str(graph), "--out", str(tmp_path), "--json", *arguments]) == code
    said = capsys.readouterr()
    one = json.loads(said.out)
    assert message in one.pop("error") and message in said.err
    assert one == {"prompt_id": None, "seconds": None, "files": [], "seeds": {}, "texts": []}


def test_quiet_is_silent_but_for_errors(run, comfy, default, start, graph, tmp_path, capsys, fakes):
    start(comfy)
    comfy.outputs["1"] = {"text": ["a text beside the picture"]}
    comfy.talk = lambda ws: ws.send(fakes.frame(1, fakes.event("executing", node="1")))
    arguments = [str(graph), "--out", str(tmp_path / "out"), "--quiet"]
    assert run.main(arguments) == 0
    default(comfy.url)
    assert run.main(arguments) == 0
    assert capsys.readouterr().err == ""
    comfy.outputs = {}
    assert run.main(arguments) == 1 and "run.py: the workflow ended without" in capsys.readouterr().err


def test_files_and_texts_of_any_node(run, comfy, graph, tmp_path, capsys):
    kinds = {"images": "a.png", "audio": "b.flac", "gifs": "c.mp4", "latents": "d.latent"}
    comfy.outputs = {str(i): {kind: [{"filename": name, "subfolder": "", "type": "output"}]}
                     for i, (kind, name) in enumerate(kinds.items())}
    comfy.outputs |= {"7": {"images": [{"filename": "preview.png", "type": "temp"}, {"filename": "in.png", "type": "input"}],
                            "animated": [True], "text": ["said"]}, "8": None, "9": {"x": [{"filename": 3}, None]}}
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path / "out")]) == 0
    out, err = saved(capsys)
    assert [Path(line).name for line in out] == list(kinds.values()) and "said\n" in err
    comfy.outputs = {"7": comfy.outputs["7"]}           # previews, where nothing is saved
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path / "out")]) == 0
    assert [Path(line).name for line in saved(capsys)[0]] == ["preview.png"]


def test_list(run, capsys):
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(run.graph.bundled())
    assert "svdq-10-flux-dev-text-to-image      12.2 GB  FLUX.1 dev in 4 bits: A picture from a text." in lines
    assert any(" GB+ " in line for line in lines), "where a size is not known"
    assert run.main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["workflows"]
    assert [line.split()[0] for line in lines] == [one["name"] for one in listed]
    assert all(one["about"] for one in listed) and listed[2]["models"][0]["gigabytes"] == 6.8


def test_show(run, comfy, default, capsys):
    arguments = ["--show", "flux-dev-text-to-image", "--set", "Sampler.seed=9"]
    assert run.main(arguments) == 0
    said = capsys.readouterr().out
    assert "\nSampler.seed=9\n" in said and "\nneeded   vae/ae.safetensors  0.3 GB  https://" in said
    assert f"none runs at 127.0.0.1:{run.PORT}: --new starts one" in said
    default(comfy.url)
    assert run.main(arguments) == 0
    said = capsys.readouterr().out
    assert "\nSampler.seed=9   0 to 18446744073709551615\n" in said
    assert "\nmissing  vae/ae.safetensors  0.3 GB  https://" in said
    assert "\nSampler.scheduler=\"simple\"   s0, s1, s2" in said and "s11, and 28 more\n" in said
    comfy.definitions["VAELoader"]["input"]["required"]["vae_name"][1]["options"] = ["ae.safetensors"]
    assert run.main([*arguments, "--json", "--server", comfy.url]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "svdq-10-flux-dev-text-to-image" and shown["server"] == comfy.url
    assert {model["name"]: model["there"] for model in shown["models"]}["ae.safetensors"] is True
    fails(run, capsys, 3, "no ComfyUI answers", "demo", "--show", "--server", "127.0.0.1:9")


# ---- a server that is busy, silent, or gone ----

def test_the_place_in_the_queue(run, comfy, graph, fakes, tmp_path, capsys):
    def status(remaining):
        return fakes.frame(1, json.dumps({"type": "status", "data": {"status": {"exec_info": {
            "queue_remaining": remaining}}}}).encode())

    def talk(ws):
        def asks(said):
            comfy.asked.clear()
            ws.send(said)
            assert comfy.asked.wait(10)

        comfy.queue = {"queue_running": [[1, "other"]], "queue_pending": [[9, "a"], [8, "b"], [3, fakes.ID], [2, "before"]]}
        asks(status(4))
        comfy.queue = {"queue_running": [[2, "before"]], "queue_pending": [[9, "a"], [3, fakes.ID]]}
        asks(status(3))
        asks(status(3))                     # nothing new
        comfy.queue = None
        ws.send(status(1), fakes.frame(1, fakes.event("executing", node="1")), fakes.frame(1, fakes.event("execution_success")))

    comfy.talk = talk
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.splitlines()[:-1] == ["queued, 2 ahead", "queued, 1 ahead", "[1/2] Empty"]


def test_exit_4_the_time_is_up(run, comfy, graph, fakes, tmp_path, capsys):
    """While it runs: it is stopped there, and nothing else is."""
    comfy.running_for = 1 << 30
    comfy.talk = lambda ws: time.sleep(2)
    start = time.monotonic()
    assert run.main([str(graph), "--server", comfy.url, "--out", str(tmp_path), "--json", "--timeout", "0.5"]) == 4
    assert 0.4 < time.monotonic() - start < 10
    said = json.loads(capsys.readouterr().out)
    assert said["error"] == "not done after 0.5 s, which --timeout allows; given up." and said["prompt_id"] == fakes.ID
    assert [seen for seen in comfy.seen if seen[1]][1:] == [("/queue", json.dumps({"delete": [fakes.ID]}).encode()),
                                                           ("/interrupt", json.dumps({"prompt_id": fakes.ID}).encode())]


def test_exit_4_a_file_that_comes_slowly(run, comfy, graph, tmp_path, capsys):
    comfy.dribbles = 0.1                                # 6 s and more of it
    start = time.monotonic()
    fails(run, capsys, 4, "not done after 0.5 s", str(graph), "--server", comfy.url, "--timeout", "0.5")
    assert time.monotonic() - start < 4 and list(graph.parent.iterdir()) == [graph]


def test_exit_4_a_server_that_says_nothing(run, comfy, graph, tmp_path, capsys):
    """Before the run has an id. Without --timeout this is no ComfyUI that answers, after a minute."""
    comfy.busy = 3
    fails(run, capsys, 4, "not done after 0.3 s", str(graph), "--server", comfy.url, "--timeout", "0.3")


def test_a_run_that_was_cut_off_while_it_was_queued(comfy, fakes, monkeypatch):
    """Whether the server has it is unknown: the id is ours, so it can be taken back."""
    def ctrl_c(*_, **__):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with client_module.Client(comfy.url) as client:
        client._connect()
        monkeypatch.setattr(client, "_json", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            client.queue(fakes.GRAPH)
    assert comfy.paths()[1:] == ["/queue", "/interrupt"]


def test_exit_141_nobody_reads(run, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            raise ValueError

    monkeypatch.setattr(run.sys, "stdout", Closed())
    assert run.main(["--list"]) == 141


@pytest.mark.parametrize("environ", [{}, {"PYTHONIOENCODING": "ascii"}])
def test_from_a_shell(environ, tmp_path):
    """With no packages, into a pipe that nobody reads, and where not every letter can be said."""
    command = [sys.executable, "-S", str(ROOT / "workflows" / "run.py")]
    options = {"cwd": tmp_path, "env": os.environ | environ, "stderr": subprocess.PIPE, "text": True}
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([*command, "--list"], stdout=writes, **options)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
    done = subprocess.run([*command, "\u6ce8.json", "--json"], stdout=subprocess.PIPE, **options)
    assert done.returncode == 2 and "neither a file nor a bundled workflow" in done.stderr
    assert json.loads(done.stdout)["error"].startswith("\u6ce8.json: ")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("ignored", [True, False])
def test_nohup(comfy, graph, fakes, tmp_path, ignored):
    """Who has it ignored, as nohup has, keeps the run when the terminal closes; else what is queued is taken back."""
    done = threading.Event()
    comfy.running_for = 1 << 30
    comfy.talk = lambda ws: done.wait(10)
    command = [sys.executable, "-S", ROOT / "workflows" / "run.py", graph, "--server", comfy.url, "--out", tmp_path]
    with subprocess.Popen(command,
                          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert comfy.queued.wait(10)
        time.sleep(0.3)                                 # it follows the run by then
        process.send_signal(signal.SIGHUP)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        comfy.running_for = 0
        done.set()
        out, err = process.communicate(timeout=20)
    assert process.returncode == (0 if ignored else 130), err
    assert ("/interrupt" in comfy.paths()) == (not ignored) and bool(out) == ignored


def test_two_at_once_into_one_folder(run, tmp_path, monkeypatch):
    """Of two servers that give their pictures the same name, neither's is lost."""
    def late(path):
        if path == tmp_path / "a.png" and not path.exists():
            path.write_bytes(b"the other's")
            return False
        return os.path.exists(path)

    monkeypatch.setattr(run.outputs.os.path, "lexists", late)
    assert run.outputs.save(tmp_path / "a.png", b"ours") == tmp_path / "a-1.png"
    assert (tmp_path / "a.png").read_bytes() == b"the other's" and (tmp_path / "a-1.png").read_bytes() == b"ours"


def test_a_file_is_whole_or_not_there(run, tmp_path):
    with pytest.raises(TypeError):
        run.outputs.save(tmp_path / "a.png", None)
    assert not list(tmp_path.iterdir())


def test_the_documented_exit_codes(run):
    """In --help and in docs/headless.md, and those that errors end in are among them."""
    documented = {int(line.split()[0]) for line in run.EXIT_CODES.splitlines()[1:]}
    page = (ROOT / "docs" / "headless.md").read_text(encoding="utf-8")
    assert documented == {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)} == {0, 141, *run.CODES.values()}


def test_the_line_for_a_container(run):
    """As far as it can be checked without an engine: its Python is one that torch has a build for, it runs in the clone, and
    what it runs is there and takes its arguments."""
    line, = re.findall(r"^docker run .*", (ROOT / "docs" / "headless.md").read_text(encoding="utf-8"), re.M)
    options, image, command = re.fullmatch(r"docker run (.*) (python:[\d.]+) python3 (.*)", line).groups()
    low, high = (tuple(map(int, version.split("."))) for version in maker.TORCH_PYTHONS.split(" to "))
    assert low <= tuple(map(int, image.partition(":")[2].split("."))) <= high
    assert '-v "$PWD:/svdq" -w /svdq' in options
    script, *arguments = command.split()
    assert (ROOT / script).is_file() and run.parser().parse_args(arguments)


# ---- files of models ----

@pytest.fixture
def lacking(tmp_path):
    """A workflow whose VAE the server lacks."""
    path = tmp_path / "lacking.json"
    path.write_text(json.dumps({"1": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}}))
    return path


URL = "https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"


def test_exit_2_a_file_is_missing(run, comfy, lacking, capsys):
    fails(run, capsys, 2, f"  vae/ae.safetensors (0.3 GB): {URL}\n", str(lacking), "--server", comfy.url)
    assert sent(comfy) == []
    fails(run, capsys, 2, 'It has old/ae.safetensors: --set "VAELoader.vae_name=old/ae.safetensors"', str(lacking),
          "--server", comfy.url)


@pytest.fixture
def download(run, comfy, tmp_path, monkeypatch):
    """Where a file goes, and what was fetched; the server then lists it."""
    fetched = []

    def fetch(url, target, on_bytes):
        fetched.append((url, target))
        comfy.definitions["VAELoader"] = {"input": {"required": {"vae_name": [[target.name]]}}}

    monkeypatch.setattr(run.download, "fetch", fetch)
    monkeypatch.setattr(run.sys, "stdin", io.StringIO(""))
    comfy.folders = {"vae": tmp_path / "models" / "vae"}
    (tmp_path / "models").mkdir()
    return fetched


def test_missing_files_are_fetched(run, comfy, lacking, download, tmp_path, monkeypatch, capsys):
    arguments = [str(lacking), "--server", comfy.url, "--download"]
    fails(run, capsys, 2, "Nobody is there to agree: say --yes, too", *arguments)
    for answer, code in (("n\n", 2), ("\n", 2), ("", 2), ("y\n", 0)):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True
        monkeypatch.setattr(run.sys, "stdin", stdin)
        assert not download
        assert run.main([*arguments, "--out", str(tmp_path / "out")]) == code
        assert f"They go to {tmp_path / 'models' / 'vae'}.\nDownload? [y/N] " in capsys.readouterr().err
    assert download == [(URL, tmp_path / "models" / "vae" / "ae.safetensors")]


def test_missing_files_are_fetched_unasked(run, comfy, lacking, download, tmp_path):
    assert run.main([str(lacking), "--server", comfy.url, "--download", "--yes", "--out", str(tmp_path / "out")]) == 0
    assert len(download) == 1


def test_a_server_on_another_machine(run, comfy, lacking, download, tmp_path, monkeypatch, capsys):
    """By its name, by folders that are not here, and, where they look the same, by what it says afterwards."""
    arguments = [str(lacking), "--server", comfy.url, "--download", "--yes"]
    with monkeypatch.context() as patch:
        patch.setattr(run.download, "is_here", lambda url: False)
        fails(run, capsys, 2, "keeps its models on another machine", *arguments)
    comfy.folders = {"vae": tmp_path / "elsewhere" / "vae"}
    fails(run, capsys, 2, "keeps its models on another machine", *arguments)
    assert download == []
    comfy.folders = {"vae": tmp_path / "models" / "vae"}
    monkeypatch.setattr(run.download, "fetch", lambda *_: None)
    fails(run, capsys, 2, "does not see it there. Is it on another machine?", *arguments)


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
