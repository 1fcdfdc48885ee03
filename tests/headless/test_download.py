"""Files of models come whole or not at all, from a server that plays the hub and where it keeps its bytes."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from headless import download

DATA = bytes(range(256)) * 40_000       # 10 MB
PLACE = "nobody/model/resolve/main/a.safetensors"


class Hub(ThreadingHTTPServer):
    """HF_ENDPOINT. It leads to /bytes, as the hub does."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.digest = hashlib.sha256(DATA).hexdigest()
        self.asked = []                 # [(path, headers)]
        self.code = 302                 # of the hub
        self.stops_after = None         # bytes, after which the connection ends
        self.knows_ranges = True
        self.kind = None                # Content-Type of the bytes
        self.says_size = True           # False: in chunks, so that only their end tells where the file ends

    def handle_error(self, request, address):
        """A dropped connection is what the test asked for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"       # of chunks

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        if not self.path.startswith("/bytes"):
            self.send_response(self.server.code)
            self.send_header("Location", f"{self.server.url}/bytes")
            self.send_header("X-Linked-Etag", f'"{self.server.digest}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.close_connection = True
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.knows_ranges else 0
        if start >= len(DATA):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(DATA)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        if self.server.kind:
            self.send_header("Content-Type", self.server.kind)
        if not self.server.says_size:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(DATA) + DATA[:self.server.stops_after])
            self.wfile.write(b"\r\n0\r\n\r\n" * (self.server.stops_after is None))
            return
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        self.wfile.write(DATA[start:self.server.stops_after])

    def log_message(self, *_):
        """Keep the test output quiet."""


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "vae" / "a.safetensors"


def fetch(target, **options):
    download.fetch(f"{download.HUB}/{PLACE}", target, **options)


def test_a_file(hub, target):
    steps = []
    fetch(target, on_bytes=lambda *step: steps.append(step))
    assert target.read_bytes() == DATA and list(target.parent.iterdir()) == [target]
    assert steps[-1] == (len(DATA), len(DATA)) and len(steps) > 5
    assert [path for path, _ in hub.asked] == [f"/{PLACE}", "/bytes"]


def test_only_the_hub_has_a_mirror(hub):
    assert download.address(f"{download.HUB}/x") == f"{hub.url}/x"
    assert download.address("https://huggingface.co.evil.invalid/x") == "https://huggingface.co.evil.invalid/x"


def test_a_token_is_for_the_hub_alone(hub, target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    fetch(target)
    assert [headers.get("Authorization") for _, headers in hub.asked] == ["Bearer s3cret", None]


@pytest.mark.parametrize("ranges", [True, False])
def test_it_goes_on_where_it_stopped(hub, target, ranges):
    hub.stops_after = len(DATA) // 3
    with pytest.raises(download.DownloadError, match="ended after 3,413,333 of 10,240,000 bytes. Run this again"):
        fetch(target)
    assert not target.exists()
    hub.stops_after, hub.knows_ranges = None, ranges
    fetch(target)
    assert target.read_bytes() == DATA and hub.asked[-1][1]["Range"] == f"bytes={len(DATA) // 3}-"


def test_a_mirror_that_does_not_say_how_much_is_to_come(hub, target):
    """And does not tell the SHA-256: what ends too soon is not taken for the file."""
    hub.digest, hub.says_size, hub.stops_after = "", False, len(DATA) // 3
    with pytest.raises(download.DownloadError, match="Run this again to continue"):
        fetch(target)
    assert not target.exists()
    target.with_name("a.safetensors.part").unlink()
    hub.stops_after = None
    fetch(target)
    assert target.read_bytes() == DATA


def test_a_web_page_is_no_file(hub, target):
    hub.kind = "text/html; charset=utf-8"
    with pytest.raises(download.DownloadError, match="a web page came in the place of the file"):
        fetch(target)
    assert not target.exists()


def test_all_of_it_was_there(hub, target):
    target.parent.mkdir()
    target.with_name("a.safetensors.part").write_bytes(DATA)
    fetch(target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("left", [DATA + b"more", b"x" * 99, b"x" * len(DATA)])
def test_another_file_under_this_name(hub, target, left):
    """What was left of an earlier one does not become part of it."""
    target.parent.mkdir()
    target.with_name("a.safetensors.part").write_bytes(left)
    with pytest.raises(download.DownloadError, match="Run this again"):
        fetch(target)
    assert not list(target.parent.iterdir())
    fetch(target)
    assert target.read_bytes() == DATA


def test_two_at_once(hub, target):
    target.parent.mkdir()
    with open(target.with_name("a.safetensors.part"), "ab") as other:
        assert download.try_lock(other)
        with pytest.raises(download.DownloadError, match="another process is downloading it"):
            fetch(target)
    fetch(target)


@pytest.mark.parametrize("code, message", [(401, "Accept the license at https://huggingface.co/nobody/model, and set HF_TOKEN"),
                                           (404, "HTTP 404. See https://huggingface.co/nobody/model.")])
def test_what_the_hub_refuses(hub, target, code, message):
    hub.code = code
    with pytest.raises(download.DownloadError, match=message):
        fetch(target)


def test_a_full_disk(hub, target, monkeypatch):
    monkeypatch.setattr(download, "SPARE", 1 << 60)
    with pytest.raises(download.DownloadError, match="0.0 GB are to come, and .* GB of the disk are free"):
        fetch(target)
    assert not target.exists()


def test_nobody_there(nobody, target, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    with pytest.raises(download.DownloadError, match="refused"):
        fetch(target)


@pytest.mark.parametrize("live, total, expected", [(False, 100, 11), (True, 100, 1), (False, None, 1)])
def test_how_often_it_is_said(live, total, expected):
    said = []
    progress = download.Bytes("a", said.append, live)
    for done in range(101):
        progress(done, total)
    assert len(said) == expected and said[0].startswith("a: 0.00")
