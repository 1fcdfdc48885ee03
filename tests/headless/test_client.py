import json

import pytest
from headless import client as module
from headless.client import Client, Failed, Interrupted, Rejected, ServerError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "POLL", 0)


@pytest.fixture
def frame(fakes):
    return fakes.frame


@pytest.fixture
def event(fakes):
    return fakes.event


def follow(comfy, fakes):
    """Events of a run."""
    events = []
    with Client(comfy.url) as client:
        prompt_id = client.queue(fakes.GRAPH)
        client.follow(prompt_id, lambda kind, data: events.append((kind, data)))
    return events


def test_events_arrive_and_the_socket_is_there_first(comfy, fakes, frame, event):
    comfy.talk = lambda ws: ws.send(frame(1, event("executing", node="1")), frame(1, event("execution_success")))
    assert [kind for kind, _ in follow(comfy, fakes)] == ["executing", "execution_success"]
    assert comfy.paths()[0].startswith("/ws?clientId=")
    assert comfy.paths()[1] == "/prompt"
    sent = json.loads(comfy.seen[1][1])
    assert sent["prompt"] == fakes.GRAPH
    assert comfy.paths()[0].endswith(sent["client_id"])


def test_events_of_others_and_pictures_are_passed_over(comfy, fakes, frame, event):
    other = json.dumps({"type": "executing", "data": {"prompt_id": "other", "node": "9"}}).encode()
    strange = [json.dumps(said).encode() for said in (
        {"type": "status", "data": None}, {"type": "x", "data": "text"}, {"data": [1]}, ["x"], "x", 3, None)]
    comfy.talk = lambda ws: ws.send(frame(1, other), frame(2, b"\x00\x01picture"), *(frame(1, said) for said in strange),
                                    frame(1, event("execution_success")))
    assert [kind for kind, _ in follow(comfy, fakes)] == ["execution_success"]


def test_fragments_with_a_ping_between_them(comfy, fakes, frame, event):
    text = event("executing", node="ü")
    pongs = []

    def talk(ws):
        ws.send(frame(1, text[:7], final=False), frame(9, b"are you there"), frame(0, text[7:20], final=False))
        pongs.append(ws.read_frame())
        ws.send(frame(0, text[20:]), frame(1, event("execution_success")))

    comfy.talk = talk
    assert follow(comfy, fakes)[0] == ("executing", {"prompt_id": fakes.ID, "node": "ü"})
    assert pongs == [(10, b"are you there")]


@pytest.mark.parametrize("size", [125, 126, 65535, 65536, 200_000])
def test_sizes_of_frames(comfy, fakes, frame, event, size):
    empty = len(event("executing", node=""))
    text = event("executing", node="x" * (max(size, empty) - empty))
    comfy.talk = lambda ws: ws.send(frame(1, text), frame(1, event("execution_success")))
    assert len(text) >= size
    assert [len(data.get("node", "")) for _, data in follow(comfy, fakes)] == [max(size, empty) - empty, 0]


def test_a_timeout_inside_a_frame_loses_nothing(comfy, fakes, frame, event, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.05)
    comfy.running_for = 1 << 30
    data = frame(1, event("executing", node="1"))
    events = []

    def talk(ws):
        ws.send(data[:5])
        assert comfy.asked.wait(10)         # the client has timed out and looked into the queue
        ws.send(data[5:], frame(1, event("execution_success")))

    def on_event(kind, data):
        events.append(kind)
        if kind == "execution_success":
            comfy.running_for = 0           # not before: the history would tell the client to stop listening

    comfy.talk = talk
    with Client(comfy.url) as client:
        client.follow(client.queue(fakes.GRAPH), on_event)
    assert events == ["executing", "execution_success"]


def test_a_silent_connection_does_not_hide_the_end(comfy, fakes, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.05)
    comfy.talk = lambda ws: comfy.asked.wait(10)
    assert follow(comfy, fakes) == []
    assert comfy.asked.is_set()


def test_what_everybody_is_told_does_not_hide_the_end(comfy, fakes, frame, monkeypatch):
    """Such as the load of the machine, each second, by a pack that many have."""
    monkeypatch.setattr(module, "SILENCE", 0.1)

    def talk(ws):
        for _ in range(200):
            ws.send(frame(1, json.dumps({"type": "crystools.monitor", "data": {}}).encode()))
            if comfy.asked.wait(0.02):
                break
        heard.append(comfy.asked.is_set())

    heard = []
    comfy.talk = talk
    assert follow(comfy, fakes) == [] and heard == [True]


def test_a_busy_server_may_take_longer_to_connect(comfy, fakes, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.05)
    comfy.busy = 0.3
    follow(comfy, fakes)                    # a connection given up would be a ServerError
    assert comfy.paths()[:2] == [f"/ws?clientId={json.loads(comfy.seen[1][1])['client_id']}", "/prompt"]


@pytest.mark.parametrize("last", [
    b"",                                    # dropped
    b"\x88\x02\x03\xe8",                    # closed politely
    b"\x81\x7e\x00",                        # dropped inside a header
])
def test_a_lost_connection_falls_back_on_the_history(comfy, fakes, frame, event, last):
    comfy.running_for = 3
    comfy.talk = lambda ws: ws.send(frame(1, event("executing", node="1")), last)
    assert [kind for kind, _ in follow(comfy, fakes)] == ["executing"]
    assert comfy.running_for == 0


@pytest.mark.parametrize("bad", [
    b"\x83\x00",                            # an opcode that does not exist
    b"\xc1\x02{}",                          # a reserved bit
    b"\x81\x82\0\0\0\0{}",                  # masked
    b"\x80\x02{}",                          # continues nothing
    b"\x01\x01{\x81\x01}",                  # begins inside another
    b"\x81\x7f" + b"\x7f" * 8,              # absurdly large
    b"\x81\x02{]",                          # not JSON
    b"\x81\x01\xff",                        # not UTF-8
])
def test_nothing_after_a_bad_frame_is_trusted(comfy, fakes, frame, event, bad):
    comfy.running_for = 3
    comfy.talk = lambda ws: ws.send(frame(1, event("executing", node="1")), bad, frame(1, event("executing", node="2")))
    assert [data["node"] for _, data in follow(comfy, fakes)] == ["1"]
    assert comfy.running_for == 0


def test_failure_survives_a_lost_connection(comfy, fakes):
    comfy.messages = [["execution_error", {"node_id": "1", "node_type": "EmptyImage", "exception_type": "ValueError",
                                           "exception_message": "too wide\n"}]]
    with pytest.raises(Failed, match=r"^node 1 \(EmptyImage\) failed: ValueError: too wide$"):
        follow(comfy, fakes)


def test_interrupted_by_somebody(comfy, fakes):
    comfy.messages = [["execution_interrupted", {"node_id": "1", "node_type": "EmptyImage"}]]
    with pytest.raises(Interrupted, match="node 1"):
        follow(comfy, fakes)


def test_a_server_that_forgot_the_prompt(comfy, fakes):
    comfy.known = False
    with pytest.raises(ServerError, match="no longer knows prompt"):
        follow(comfy, fakes)


def test_a_server_that_goes_away(comfy, fakes):
    def talk(ws):
        comfy.gone = True
    comfy.talk = talk
    with pytest.raises(ServerError, match="no ComfyUI answers"):
        follow(comfy, fakes)


def test_a_server_that_is_not_there(nobody, fakes):
    with pytest.raises(ServerError, match=f"no ComfyUI answers at {nobody}: .*refused"):
        Client(nobody).queue(fakes.GRAPH)


def test_a_server_that_is_no_comfyui(comfy):
    with pytest.raises(ServerError, match="HTTP 404: nothing here"):
        Client(comfy.url).object_info()
    with pytest.raises(ServerError, match="did not answer JSON"):
        Client(comfy.url)._json("/view")
    for answer in ([], {}, {"prompt_id": 7}, "x", None, 3):
        comfy.prompt_answer = 200, answer
        with pytest.raises(ServerError, match="must be that of a ComfyUI server"):
            Client(comfy.url).queue({})
    for system in ([], {}, 3, None, "x"):
        comfy.system = system
        assert not Client(comfy.url).is_comfyui(5)


def test_a_server_without_websocket(comfy, fakes):
    with pytest.raises(ServerError, match="instead of a websocket the server offers 'HTTP/1.0 404"):
        Client(comfy.url + "/elsewhere").queue(fakes.GRAPH)


@pytest.mark.parametrize("code, helps", [(10, "The server needs another certificate."), (20, "name its PEM file: --ca FILE."),
                                         (62, "Use a name that is in its certificate.")])
def test_what_helps_against_a_certificate(code, helps):
    """Of one that has expired no authority is to blame."""
    error = module.ssl.SSLCertVerificationError(1, "why")
    error.verify_code = code
    assert str(Client("https://host")._unreachable(error)).endswith(helps)


def test_a_server_that_is_elsewhere(comfy, fakes):
    """Such as the same one behind https."""
    comfy.leads_to = "https://host/ws"
    with pytest.raises(ServerError, match="'HTTP/1.0 301 Moved Permanently', which leads to 'https://host/ws'"):
        Client(comfy.url).queue(fakes.GRAPH)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "", "http://127.0.0.1:99999",
                                 "http://127.0.0.1:-1", "http://127.0.0.1:0", "http://host:port", "http://[", "x" * 5000,
                                 f"http://{'a' * 300}", "host:port", ":8188", "http://host/?token=x", "http://host#x", "http://me:s3cret@host:99999"])
def test_bad_urls(url):
    with pytest.raises(ValueError, match="must look like") as caught:
        Client(url)
    assert len(str(caught.value)) < 300 and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://a..b", "http://127.0.0.1:1/é", "http://a b", "http://\udcff"])
def test_urls_that_lead_nowhere(url, fakes):
    with pytest.raises(ServerError, match="no ComfyUI answers at"):
        Client(url).queue(fakes.GRAPH)
    with pytest.raises(ServerError, match="no ComfyUI answers at"):
        Client(url).object_info()


def test_a_workflow_too_deep_to_be_sent(comfy, fakes):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Rejected, match="nested too deeply"):
        Client(comfy.url).queue({"1": {"class_type": "EmptyImage", "inputs": {"width": deep}}})
    assert "/prompt" not in comfy.paths()


BAD_INPUT = {"1": {"class_type": "EmptyImage", "dependent_outputs": ["2"], "errors": [
    {"type": "value_bigger_than_max", "message": "Value 99999 bigger than max of 16384", "details": "width",
     "extra_info": {"input_name": "width"}}]}}


def test_refused(comfy, fakes):
    error = {"message": "Prompt outputs failed validation", "details": ""}
    comfy.prompt_answer = 400, {"error": error, "node_errors": BAD_INPUT}
    with pytest.raises(Rejected) as caught:
        Client(comfy.url).queue(fakes.GRAPH)
    assert str(caught.value) == ("ComfyUI refuses the workflow: Prompt outputs failed validation\n"
                                 "  node 1 (EmptyImage), input width: Value 99999 bigger than max of 16384: width")


@pytest.mark.parametrize("body", [b"{", b'{"error": "no"}', b'{"node_errors": {"1": 2}}', b"[1]", b"bad", b"{" * 100_000])
def test_somebody_else_says_400(comfy, fakes, body):
    comfy.prompt_answer = 400, body
    with pytest.raises(ServerError, match="answered HTTP 400: "):
        Client(comfy.url).queue(fakes.GRAPH)


def test_a_file_that_the_server_finds_too_large(comfy, monkeypatch):
    comfy.upload_answer = 413, b"Maximum request body size 104857600 exceeded"
    with pytest.raises(ServerError, match="104857600 exceeded. It takes no file of that size: .*--max-upload-size"):
        Client(comfy.url).upload("a.png", b"x")


def test_an_error_that_breaks_off(comfy, fakes, monkeypatch):
    def breaks_off(answer):
        raise module.http.client.IncompleteRead(b"")

    monkeypatch.setattr(module.urllib.error.HTTPError, "read", breaks_off, raising=False)
    with pytest.raises(ServerError, match="answered HTTP 404: "):
        Client(comfy.url).object_info()


def test_refused_in_part_runs_nothing(comfy, fakes):
    comfy.prompt_answer = 200, {"prompt_id": fakes.ID, "node_errors": BAD_INPUT}
    with pytest.raises(Rejected, match="input width"):
        Client(comfy.url).queue(fakes.GRAPH)
    assert comfy.seen[-2:] == [("/queue", json.dumps({"delete": [fakes.ID]}).encode()),
                               ("/interrupt", json.dumps({"prompt_id": fakes.ID}).encode())]


def test_a_server_error_is_no_refusal(comfy, fakes):
    comfy.prompt_answer = 500, b"Internal Server Error"
    with pytest.raises(ServerError, match="/prompt answered HTTP 500: Internal Server Error"):
        Client(comfy.url).queue(fakes.GRAPH)


def test_a_file_that_breaks_off(comfy, fakes):
    comfy.breaks_off = True
    with pytest.raises(ServerError, match="IncompleteRead"):
        list(Client(comfy.url).files(fakes.ID))


def test_files(comfy, fakes):
    assert list(Client(comfy.url).files(fakes.ID)) == [
        ("a b.png", b"pixels of /view?filename=a+b.png&subfolder=s&type=output")]
