"""Downloads against a Hugging Face of our own: a few routes of the real one, on localhost.

huggingface_hub reads its address when it is imported, so every download runs in a process of its own.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from svdq_pack.svdq import hub
from svdq_pack.svdq.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
REPO = "owner/flux"
DATA = bytes(range(256)) * 100
FILES = ["README.md", "svdq-fp4_r32-flux.safetensors", "svdq-int4_r128-flux.safetensors",
         "svdq-int4_r32-flux.safetensors", "sub/svdq-int4_r32-other.safetensors"]
REPOS = {
    REPO: FILES,
    "owner/fp4-only": ["deep/svdq-fp4_r128-flux.safetensors"],
    "owner/bf16": ["flux1-dev.safetensors"],
    "owner/empty": ["README.md"],
    "owner/hostile": ["../../svdq-int4_r32-evil.safetensors"],
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests = []

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.requests.append(f"{self.command} {path}")
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repo = f"{owner}/{name}"
        if repo == "owner/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if repo == "owner/broken":
            return self.answer(500)
        if repo not in REPOS:
            return self.answer(404, X_Error_Code="RepoNotFound")
        revision, inside = rest[1] if len(rest) > 1 else "main", "/".join(rest[2:])
        if revision != "main":
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api:                                             # the list of files, as both versions of the API give it
            tree = [{"type": "file", "path": file, "size": len(DATA), "oid": "0" * 40} for file in REPOS[repo]]
            siblings = {"id": repo, "sha": "0" * 40, "siblings": [{"rfilename": file} for file in REPOS[repo]]}
            return self.answer(200, json.dumps(tree if rest and rest[0] == "tree" else siblings).encode(),
                               Content_Type="application/json")
        if inside not in REPOS[repo]:
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.answer(200, DATA, ETag='"etag"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CLIENT = """
import json, sys, time, types
time.sleep = lambda seconds: None                           # retries need not wait here
pack = types.ModuleType("svdq_pack"); pack.__path__ = [sys.argv[1]]; sys.modules["svdq_pack"] = pack
from svdq_pack.svdq import hub
class Stop(Exception): pass
results = []
for request in json.loads(sys.argv[2]):
    seen, stop_after = [], request.pop("stop_after", None)
    def progress(done, total):
        seen.append((done, total))
        if stop_after is not None and done > stop_after:
            raise Stop
    hub_chunk = request.pop("chunk", None)
    if hub_chunk:
        from huggingface_hub import constants
        constants.DOWNLOAD_CHUNK_SIZE = hub_chunk
    try:
        results.append({"path": hub.download(**request, progress=progress), "seen": seen})
    except Exception as error:
        results.append({"error": type(error).__name__, "message": str(error), "seen": seen})
print(json.dumps(results))
"""


@pytest.fixture
def download(endpoint, tmp_path):
    """download({...}, {...}) -> one result per call of hub.download, all in one process."""
    def call(*requests, **environment):
        defaults = {"repo_id": REPO, "filename": None, "revision": "main", "folder": str(tmp_path / "models"),
                    "wants_fp4": False}
        FakeHub.requests.clear()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
                 and not name.lower().endswith("_proxy")}
        done = subprocess.run([sys.executable, "-c", CLIENT, str(ROOT), json.dumps([defaults | r for r in requests])],
                              capture_output=True, text=True, timeout=120,
                              env={**clean, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"),
                                   "HF_HUB_DISABLE_TELEMETRY": "1", **environment})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return call


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def test_picks_and_fetches(download, tmp_path):
    """One download of each kind; asking again does not download again."""
    int4, fp4, only, again, explicit = download(
        {}, {"wants_fp4": True}, {"repo_id": "owner/fp4-only"}, {},
        {"filename": "sub/svdq-int4_r32-other.safetensors", "chunk": 10_000})
    models = tmp_path / "models"
    assert int4["path"] == again["path"] == str(models / "svdq-int4_r32-flux.safetensors")
    assert fp4["path"] == str(models / "svdq-fp4_r32-flux.safetensors")
    assert only["path"] == str(models / "deep" / "svdq-fp4_r128-flux.safetensors")
    assert explicit["path"] == str(models / "sub" / "svdq-int4_r32-other.safetensors")
    for result in (int4, fp4, only, explicit):
        assert Path(result["path"]).read_bytes() == DATA and result["seen"][-1] == [len(DATA), len(DATA)]
    assert explicit["seen"] == [[done, len(DATA)] for done in (10_000, 20_000, 25_600)]
    assert again["seen"] == []
    fetched = [line for line in FakeHub.requests if line.startswith("GET") and "resolve" in line]
    assert len(fetched) == len(set(fetched)) == 4


def test_a_file_that_is_there_needs_no_network(download, tmp_path):
    path = tmp_path / "models" / "svdq-int4_r32-mine.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    result, = download({"filename": path.name})
    assert result == {"path": str(path), "seen": []} and FakeHub.requests == [] and path.read_bytes() == b"mine"


def test_progress_can_stop_it(download, tmp_path):
    """The Cancel button: progress raises, the download ends, and a second try completes it."""
    stopped, second = download({"stop_after": 15_000, "chunk": 10_000}, {})
    assert (stopped["error"], stopped["seen"][-1]) == ("Stop", [20_000, len(DATA)])
    assert Path(second["path"]).read_bytes() == DATA
    download({"stop_after": 15_000, "chunk": 10_000, "folder": str(tmp_path / "other")})
    assert files(tmp_path / "other") == []


ANSWERS = [
    ({"repo_id": "owner/missing"}, ["owner/missing (main)", "no such repository", "owner/name"]),
    ({"repo_id": "owner/missing", "filename": "a.safetensors"}, ["owner/missing (main)", "no such repository"]),
    ({"filename": "nope.safetensors"}, [REPO, "has no file nope.safetensors", "Leave filename empty"]),
    ({"revision": "v9"}, [f"{REPO} (v9)", "no such revision", "'main'"]),
    ({"revision": "v9", "filename": FILES[1]}, [f"{REPO} (v9)", "no such revision"]),
    ({"repo_id": "owner/gated"}, ["owner/gated", "gated", "hf auth login"]),
    ({"repo_id": "owner/gated", "filename": "a.safetensors"}, ["owner/gated", "gated", "hf auth login"]),
    ({"repo_id": "owner/bf16"}, ["owner/bf16", "no file named svdq-int4_", "flux1-dev.safetensors", "Set filename"]),
    ({"repo_id": "owner/empty"}, ["owner/empty", "no .safetensors file"]),
    ({"repo_id": "owner/hostile"}, ["../../svdq-int4_r32-evil.safetensors", "inside the repository"]),
    ({"repo_id": "owner/broken"}, ["owner/broken", "failed", "500"]),
    ({"repo_id": "owner/broken", "filename": "a.safetensors"}, ["owner/broken"]),
    ({"repo_id": "owner/what a name"}, ["repo_id 'owner/what a name'", "alphanumeric"]),
    ({"repo_id": "--/.."}, ["repo_id '--/..'"]),
]


def test_messages(download, tmp_path):
    results = download(*(request for request, _ in ANSWERS))
    for (request, words), result in zip(ANSWERS, results):
        assert result.get("error") == "CheckpointError", (request, result)
        assert all(word in result["message"] for word in words), (request, result["message"])
    assert files(tmp_path) == []


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}],
                         ids=["unreachable", "offline"])
def test_no_network(download, tmp_path, environment):
    (tmp_path / "models").mkdir()
    picked, named = download({}, {"filename": "a.safetensors"}, **environment)
    for result in (picked, named):
        assert result.get("error") == "CheckpointError", result
        assert "Hugging Face cannot be reached" in result["message"] and "Load SVDQ Model" in result["message"]
        assert str(tmp_path / "models") in result["message"]
    assert "a.safetensors is not in" in named["message"] and FakeHub.requests == []


@pytest.mark.parametrize("repo_id", ["", "flux", "/flux", "owner/", "a/b/c", "https://hub.test/owner/flux", " / "])
def test_bad_repo_id(tmp_path, repo_id):
    with pytest.raises(CheckpointError, match="needs the form owner/name"):
        hub.download(repo_id, None, "main", tmp_path, wants_fp4=False, progress=None)


@pytest.mark.parametrize("filename", [
    "../a.safetensors", "a/../../b.safetensors", "/etc/a.safetensors", "a//b.safetensors", "..\\a.safetensors",
    "C:\\a.safetensors", "C:a.safetensors", "a.ckpt", "a.safetensors.exe", "a.safetensors/", "", "a\0.safetensors"])
def test_bad_filename(tmp_path, filename):
    with pytest.raises(CheckpointError, match="needs the name of a .safetensors file"):
        hub.download(REPO, filename, "main", tmp_path, wants_fp4=False, progress=None)
    assert not any(tmp_path.iterdir())
