"""Makes `headless` importable, and a ComfyUI server that says whatever a test wants."""

import base64
import copy
import hashlib
import importlib.util
import json
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "workflows"))

ID = "11111111-2222-3333-4444-555555555555"
GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64}, "_meta": {"title": "Empty"}},
         "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}
DEFINITIONS = {
    "EmptyImage": {"input": {"required": {"width": ["INT", {"min": 1, "max": 16384}]}}},
    "SaveImage": {"input": {"required": {"images": ["IMAGE", {}]}}},
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}},
    "LoadImageMask": {"input": {"required": {"image": [["example.png"], {"image_upload": True}],
                                             "channel": [["alpha", "red"]]}}},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {"multiline": True}], "clip": ["CLIP"]}}},
    "KSampler": {"input": {"required": {"seed": ["INT", {"min": 0, "max": 2**64 - 1}]},
                           "optional": {"scheduler": ["COMBO", {"options": [f"s{i}" for i in range(40)]}]}}},
    "VAELoader": {"input": {"required": {"vae_name": ["COMBO", {"options": ["old/ae.safetensors"]}]}}}}


def frame(opcode, payload, final=True):
    size = len(payload)
    extended = bytes([size]) if size < 126 else bytes([126]) + size.to_bytes(2, "big") if size < 1 << 16 \
        else bytes([127]) + size.to_bytes(8, "big")
    return bytes([opcode | (0x80 if final else 0)]) + extended + payload


def event(kind, **data):
    return json.dumps({"type": kind, "data": {"prompt_id": ID, **data}}).encode()


class FakeComfy(ThreadingHTTPServer):
    """Attributes are what it answers; `seen` is what it was asked, in order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen = []                      # [(path, body)]
        self.prompt_answer = 200, {"prompt_id": ID, "number": 1, "node_errors": {}}
        self.upload_answer = 200, {"name": "as named there.png", "subfolder": "", "type": "input"}
        self.talk = lambda websocket: None  # what the websocket does once a prompt is queued; then it closes
        self.busy = 0                       # seconds until it answers who wants a websocket
        self.queued = threading.Event()
        self.asked = threading.Event()      # somebody looked into the queue
        self.running_for = 0                # so many looks into the history find the prompt still running
        self.known = True                   # False: the server has forgotten the prompt
        self.breaks_off = False             # True: a file ends before its announced size
        self.dribbles = 0                   # seconds between the bytes of a file
        self.leads_to = None                # address that whoever wants a websocket is sent to
        self.gone = False                   # True: drops every connection
        self.messages = [["execution_success", {"prompt_id": ID}]]
        self.definitions = copy.deepcopy(DEFINITIONS)
        self.folders = {}                   # {directory of models: folder}
        self.system = {"system": {}}        # what /system_stats says
        self.queue = None                   # what /queue says, where it is not about this prompt alone
        self.templates = {}                 # {pack: [names]}
        self.headers = []                   # those of each request
        self.outputs = {"2": {"images": [{"filename": "a b.png", "subfolder": "s", "type": "output"}]}}

    def paths(self):
        return [path for path, _ in self.seen]

    def handle_error(self, request, address):
        """A dropped connection is what the test asked for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        if self.server.gone:
            return
        self.server.seen.append((self.path, b""))
        self.server.headers.append(dict(self.headers))
        if self.server.leads_to:
            self.send_response(301)
            self.send_header("Location", self.server.leads_to)
            self.end_headers()
        elif self.path.startswith("/ws"):
            self.websocket()
        elif self.path == "/queue":
            queue = self.server.queue or {"queue_running": [[0, ID]] if self.server.running_for else [], "queue_pending": []}
            self.server.asked.set()         # before the answer: the client may be done before this thread goes on
            self.answer(200, queue)
        elif self.path.startswith("/history"):
            if self.server.running_for or not self.server.known:
                self.server.running_for = max(0, self.server.running_for - 1)
                self.answer(200, {})
            else:
                self.answer(200, {ID: {"status": {"messages": self.server.messages}, "outputs": self.server.outputs}})
        elif self.path.startswith("/view"):
            self.answer(200, b"pixels of " + self.path.encode(), len(self.path) if self.server.breaks_off else None)
        elif self.path.startswith("/object_info/"):
            kind = urllib.parse.unquote(self.path.rpartition("/")[2])
            self.answer(200, {kind: self.server.definitions[kind]} if kind in self.server.definitions else {})
        elif self.path == "/workflow_templates":
            self.answer(200, self.server.templates)
        elif self.path == "/system_stats":
            self.answer(200, self.server.system)
        elif self.path == "/experiment/models":
            self.answer(200, [{"name": name, "folders": [str(path)]} for name, path in self.server.folders.items()])
        else:
            self.answer(404, b"nothing here")

    def do_POST(self):
        if self.server.gone:
            return
        self.server.seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.headers.append(dict(self.headers))
        if self.path == "/prompt":
            self.answer(*self.server.prompt_answer)
            self.server.queued.set()
        elif self.path == "/upload/image":
            self.answer(*self.server.upload_answer)
        else:
            self.answer(200, b"")

    def answer(self, status, body, sent=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not (self.server.dribbles and self.path.startswith("/view")):
            self.wfile.write(body[:sent])
            return
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(self.server.dribbles)

    def websocket(self):
        time.sleep(self.server.busy)
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        self.server.queued.wait(10)
        self.server.talk(self)
        self.close_connection = True

    def send(self, *frames):
        for data in frames:
            self.wfile.write(data)

    def read_frame(self):
        """(opcode, payload) of a frame from the client, which must be masked."""
        first, second = self.rfile.read(2)
        assert second & 0x80, "a client must mask its frames"
        mask = self.rfile.read(4)
        return first & 0x0F, bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(second & 0x7F)))

    def log_message(self, *_):
        """Keep the test output quiet."""


@pytest.fixture
def comfy():
    server = FakeComfy()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.queued.set()                     # lets a websocket that still waits come to its end
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nobody():
    """URL of a port where nobody listens."""
    server = FakeComfy()
    server.server_close()
    return server.url


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(GRAPH))
    return path


def script(path):
    """A script as a module. Both folders have a run.py, so it needs a name of its own."""
    spec = importlib.util.spec_from_file_location("script_" + path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run():
    return script(ROOT / "workflows" / "run.py")


@pytest.fixture(scope="session")
def batch():
    return script(ROOT / "workflows" / "batch.py")


@pytest.fixture(scope="session")
def run_tests():
    return script(ROOT / "tests" / "run.py")


@pytest.fixture
def fakes():
    """The names above, which a test module cannot import from here."""
    return sys.modules[__name__]
