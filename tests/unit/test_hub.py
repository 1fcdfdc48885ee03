"""Downloads against a Hugging Face of our own: a few routes of the real one, on localhost.

huggingface_hub reads its address when it is imported, so every download runs in a process of its own.
"""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from svdq_pack.svdq import hub
from svdq_pack.svdq.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
REPO = "owner/flux"
DATA, TWIN = bytes(range(256)) * 100, bytes(reversed(range(256))) * 100     # of one size
COMMIT, COMMIT_2 = "0" * 40, "2" * 40
REVISIONS = {"main": COMMIT, COMMIT: COMMIT, "v2": COMMIT_2, COMMIT_2: COMMIT_2}
FILES = ["README.md", "svdq-fp4_r32-flux.safetensors", "svdq-int4_r128-flux.safetensors",
         "svdq-int4_r32-flux.safetensors", "sub/svdq-int4_r32-other.safetensors"]
REPOS = {
    REPO: FILES,
    "owner/fp4-only": ["deep/svdq-fp4_r128-flux.safetensors"],
    "owner/bf16": ["flux1-dev.safetensors"],
    "owner/empty": ["README.md"],
    "owner/hostile": ["../../svdq-int4_r32-evil.safetensors"],
    "owner/markup": ["svdq-int4_r32-<img src=x>.safetensors"],
    "owner/escapes": ["svdq-\x1b[31m.safetensors"],
    "owner/twin": FILES, "owner/longer": FILES,         # the same names, other bytes
    "owner/cut": FILES, "owner/proxy": FILES, "owner/other-hash": FILES,
    "owner/numbers": [1, 2], "owner/no-list": None,
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
        if repo == "owner/silent":
            time.sleep(3)
            return self.answer(500)
        if repo == "owner/no-json":
            return self.answer(200, b"<html>Welcome to this hotel", Content_Type="text/html")
        if repo not in REPOS:
            return self.answer(404, X_Error_Code="RepoNotFound")
        revision, inside = rest[1] if len(rest) > 1 else "main", "/".join(rest[2:])
        commit = REVISIONS.get(revision)
        if commit is None or commit == COMMIT_2 and repo != REPO:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api:                                             # the list of files, as both versions of the API give it
            files = REPOS[repo] or []
            tree = [{"type": "file", "path": file, "size": len(DATA), "oid": "0" * 40} for file in files]
            siblings = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(tree if rest and rest[0] == "tree" else siblings).encode(),
                               Content_Type="application/json")
        if inside not in REPOS[repo]:
            return self.answer(404, X_Error_Code="EntryNotFound")
        data = TWIN if commit == COMMIT_2 else {"owner/twin": TWIN, "owner/longer": DATA + b"."}.get(repo, DATA)
        if repo == "owner/proxy":                           # no hub: it does not name a commit
            return self.answer(200, data, ETag='"proxy"')
        if repo == "owner/cut" and self.command == "GET":
            self.close_connection = True
            return self.answer(200, data[:999], Content_Length=len(data), ETag='"cut"', X_Repo_Commit=commit)
        tag = "md5-of-a-mirror" if repo == "owner/other-hash" else hashlib.sha256(data).hexdigest()
        self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.handle_error = lambda *_: None                   # of clients that do not wait for an answer
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
    seen, said, stop_after = [], [], request.pop("stop_after", None)
    stop = eval(request.pop("stop", "Stop"))()
    hub.TIMEOUT = request.pop("timeout", hub.TIMEOUT)
    def progress(done, total):
        seen.append((done, total))
        if stop_after is not None and done > stop_after:
            raise stop
    hub_chunk = request.pop("chunk", None)
    if hub_chunk:
        from huggingface_hub import constants
        constants.DOWNLOAD_CHUNK_SIZE = hub_chunk
    try:
        path, notice = hub.download(**request, progress=progress, say=said.append)
        results.append({"path": path, "notice": notice, "seen": seen, "said": said})
    except BaseException as error:
        results.append({"error": type(error).__name__, "message": str(error), "seen": seen, "untouched": error is stop})
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
    assert again["seen"] == [] and again["notice"] is int4["notice"] is None
    fetched = [line for line in FakeHub.requests if line.startswith("GET") and "resolve" in line]
    assert len(fetched) == len(set(fetched)) == 4


# ---- a file of that name is there

NAME = "sub/svdq-int4_r32-other.safetensors"
UNREACHABLE, OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}


@pytest.fixture
def there(tmp_path):
    """The file, put there by hand: nothing is noted beside it."""
    path = tmp_path / "models" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("other", ["owner/twin", "owner/longer"])
def test_the_file_of_another_repository_is_refused(download, tmp_path, other):
    """Same name, same size even: what was fetched of one is not taken for the other's, and stays."""
    its = {"filename": NAME, "repo_id": other}
    first, second, back = download(its, {"filename": NAME}, its)
    path = tmp_path / "models" / NAME
    assert second["error"] == "CheckpointError" and first["path"] == back["path"] == str(path) and back["notice"] is None
    for words in (str(path), f"is not {NAME} of {REPO} (main)", "left as it is", "rename or move", "'SVDQ Loader'",
                  "another hash" if other == "owner/twin" else "25,601 bytes, that one 25,600"):
        assert words in second["message"]
    assert path.read_bytes() == (TWIN if other == "owner/twin" else DATA + b".")


@pytest.mark.parametrize("first, second", [("main", "v2"), (COMMIT, COMMIT_2), ("v2", COMMIT)])
def test_the_file_of_another_revision_is_refused(download, tmp_path, first, second):
    """Same name and size; the branch and the commit it stands at are one."""
    kept, other, same = download(*({"filename": NAME, "revision": one} for one in (first, second, REVISIONS[first])))
    assert f"is not {NAME} of {REPO} ({second}): it has another hash" in other["message"]
    assert kept["notice"] is same["notice"] is None
    assert (tmp_path / "models" / NAME).read_bytes() == (TWIN if first == "v2" else DATA)


@pytest.mark.parametrize("repo_id, words", [("owner/missing", "no such repository"), ("owner/twin", "no such revision"),
                                            ("owner/bf16", "no such revision")])
def test_a_commit_of_another_repository(download, repo_id, words):
    """What was noted beside the file names no repository, so this one is asked for the commit."""
    _, other = download({"filename": NAME, "revision": "v2"}, {"filename": NAME, "revision": COMMIT_2, "repo_id": repo_id})
    assert other["error"] == "CheckpointError" and words in other["message"]


def test_a_file_put_there_by_hand(download, there):
    """Of the right size it is used, and said not to have been compared; of another it is not the repository's."""
    right, = download({"filename": NAME})
    assert right["path"] == str(there) and right["seen"] == []
    assert "it is not certain that" in right["notice"] and "size is right, its content was not compared" in right["notice"]
    there.write_bytes(DATA[:1000])
    cut, = download({"filename": NAME})
    assert cut["error"] == "CheckpointError" and "1,000 bytes, that one 25,600" in cut["message"]
    assert there.read_bytes() == DATA[:1000]


@pytest.mark.parametrize("change", ["later", "kept mtime", "moved"])
def test_a_file_that_changed_after_its_download(download, tmp_path, change):
    """What huggingface_hub noted is of the bytes it wrote."""
    path = tmp_path / "models" / NAME
    download({"filename": NAME})
    stat = path.stat()
    if change == "later":
        path.write_bytes(TWIN)
        os.utime(path, (stat.st_atime, stat.st_mtime + 5))
    else:
        time.sleep(1.2)                                     # clocks of files are coarse: a second is forgiven
        fresh = path if change == "kept mtime" else path.with_name("krea.safetensors")
        fresh.write_bytes(TWIN)
        os.utime(fresh, (stat.st_atime, stat.st_mtime - 100))
        fresh.replace(path)
    result, = download({"filename": NAME})
    assert "content was not compared" in result["notice"] and path.read_bytes() == TWIN


@pytest.mark.parametrize("note", ["", "x", f"{COMMIT}\netag\nsoon\n", f"{COMMIT}\netag\nnan\n", "\0" * 99,
                                  "x" * (2 << 20), None])
def test_a_note_that_cannot_be_read(download, tmp_path, note):
    path = tmp_path / "models" / NAME
    download({"filename": NAME})
    beside = tmp_path / "models" / ".cache" / "huggingface" / "download" / f"{NAME}.metadata"
    beside.unlink()
    if note is None:
        os.mkfifo(beside)
    else:
        beside.write_text(note)
    result, = download({"filename": NAME})
    assert result["path"] == str(path) and "content was not compared" in result["notice"]


@pytest.mark.parametrize("request_, environment, reason", [
    ({}, UNREACHABLE, "Hugging Face could not be asked"), ({}, OFFLINE, "offline"),
    ({"repo_id": "owner/broken"}, {}, "500"), ({"repo_id": "owner/gated"}, {}, "could not be asked"),
    ({"repo_id": "owner/silent", "timeout": 0.2}, {}, "could not be asked"),
    ({"repo_id": "owner/proxy"}, {}, "a proxy or a login page"), ({"repo_id": "owner/other-hash"}, {}, "not compared")],
    ids=["unreachable", "offline", "500", "gated", "silent", "proxy", "other kind of hash"])
def test_nobody_can_say(download, tmp_path, request_, environment, reason):
    """The file is used, and the notice says what is not known. Even one that huggingface_hub did fetch: from where, it does
    not note."""
    download({"filename": NAME})
    result, = download({"filename": NAME, **request_}, **environment)
    assert result["path"] == str(tmp_path / "models" / NAME) and reason in result["notice"]
    assert result["notice"].isprintable() and len(result["notice"]) < 800


def test_a_commit_is_known_offline(download):
    """One commit has one file of that name."""
    download({"filename": NAME})
    pinned, other = download({"filename": NAME, "revision": COMMIT}, {"filename": NAME, "revision": "1" * 40}, **OFFLINE)
    assert pinned["notice"] is None and "could not be asked" in other["notice"]


@pytest.mark.parametrize("request_, words", [
    ({"repo_id": "owner/missing"}, "no such repository"), ({"revision": "v9"}, "no such revision"),
    ({"repo_id": "owner/bf16"}, f"has no file {NAME}")])
def test_of_what_is_not_on_the_hub_it_cannot_be(download, there, request_, words):
    result, = download({"filename": NAME, **request_})
    assert result["error"] == "CheckpointError" and words in result["message"] and there.read_bytes() == DATA


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")],
                         ids=["folder", "pipe", "link"])
def test_something_else_has_the_name(download, there, make):
    there.unlink()
    make(there)
    before = there.lstat().st_ino, there.lstat().st_mode
    result, = download({"filename": NAME})
    assert result["error"] == "CheckpointError" and f"{there}: a folder, a device or a broken link" in result["message"]
    assert (there.lstat().st_ino, there.lstat().st_mode) == before


# ---- downloading

def test_leftovers_of_a_download(download, tmp_path):
    """Of one that was killed, and of one whose file is gone: neither is taken for the file."""
    first, = download({"filename": NAME})
    Path(first["path"]).unlink()
    notes = tmp_path / "models" / ".cache" / "huggingface" / "download" / "sub"
    beside = notes / f"{Path(NAME).name}.metadata"
    for stem in (beside.name, base64.urlsafe_b64encode(hashlib.sha1(beside.name.encode()).digest()).decode()):
        (notes / f"{stem}.{hashlib.sha256(DATA).hexdigest()}.incomplete").write_bytes(TWIN)
    again, = download({"filename": NAME})
    assert again["notice"] is None and again["seen"] and Path(again["path"]).read_bytes() == DATA


def test_a_download_that_is_cut(download, tmp_path):
    result, = download({"filename": NAME, "repo_id": "owner/cut"})
    assert result["error"] == "CheckpointError" and files(tmp_path) == []


@pytest.mark.parametrize("stop", ["Stop", "OSError", "ConnectionError", "KeyboardInterrupt", "hub.CheckpointError"])
def test_what_progress_raises_passes_untouched(download, tmp_path, stop):
    if stop == "hub.CheckpointError":
        stop = "lambda: hub.CheckpointError('stop')"
    result, = download({"stop_after": 0, "stop": stop, "chunk": 10_000})
    assert result["untouched"] and files(tmp_path) == []


def test_what_progress_raises_is_not_lost(tmp_path, monkeypatch):
    """Xet's downloads call from a thread of their own, which swallows it."""
    class Stop(Exception):
        pass

    def fetch(repo_id, filename, revision, folder, progress):
        with pytest.raises(Stop):
            progress(1, 2)
        return "path"

    def progress(done, total):
        raise Stop

    monkeypatch.setattr(hub, "_fetch", fetch)
    with pytest.raises(Stop):
        hub.download(REPO, NAME, "main", tmp_path, wants_fp4=False, progress=progress)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a\nb"), MemoryError(), RecursionError(), UnicodeError(),
                                   AssertionError(), ImportError("hf_xet"), AttributeError("\x1b[31m" * 999)], ids=repr)
def test_any_exception_of_the_library_is_one_line(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", broken)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    for filename in (None, NAME):
        with pytest.raises(CheckpointError, match=r"owner/flux \(main\): the download of .* failed: .") as caught:
            hub.download(REPO, filename, "main", tmp_path, wants_fp4=False, progress=None)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600 and caught.value.__cause__ is error


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
    ({"repo_id": "owner/hostile"}, ["../../svdq-int4_r32-evil.safetensors", "no name for a new file"]),
    ({"repo_id": "owner/markup"}, ["no name for a new file", "holds one of"]),
    ({"repo_id": "owner/escapes"}, ["holds no file named svdq-int4_", "x1b[31m"]),
    ({"repo_id": "owner/numbers"}, ["owner/numbers", "the file list failed"]),
    ({"repo_id": "owner/no-list"}, ["no .safetensors file"]),
    ({"repo_id": "owner/no-json"}, ["owner/no-json", "the file list failed"]),
    ({"repo_id": "owner/no-json", "filename": "a.safetensors"}, ["owner/no-json", "cannot be reached"]),
    ({"repo_id": "owner/proxy", "filename": NAME}, ["owner/proxy", "cannot be reached"]),
    ({"repo_id": "owner/silent", "timeout": 0.2}, ["owner/silent", "cannot be reached to pick a file"]),
    ({"filename": "x/" * 3000 + "a.safetensors"}, ["300 characters"]),
    ({"revision": " main ", "repo_id": " owner/missing "}, ["owner/missing (main)"]),
    ({"repo_id": "owner/broken"}, ["owner/broken", "failed", "500"]),
    ({"repo_id": "owner/broken", "filename": "a.safetensors"}, ["owner/broken"]),
    ({"repo_id": "owner/what a name"}, ["repo_id 'owner/what a name'", "owner/name"]),
    ({"repo_id": "--/.."}, ["--/.."]),
]


def test_messages(download, tmp_path):
    results = download(*(request for request, _ in ANSWERS))
    for (request, words), result in zip(ANSWERS, results):
        assert result.get("error") == "CheckpointError", (request, result)
        assert all(word in result["message"] for word in words), (request, result["message"])
        assert result["message"].isprintable() and len(result["message"]) < 800, result["message"]
    assert files(tmp_path) == []


@pytest.mark.parametrize("environment", [UNREACHABLE, OFFLINE], ids=["unreachable", "offline"])
def test_no_network(download, tmp_path, environment):
    (tmp_path / "models" / "kept").mkdir(parents=True)
    picked, named, *_ = download({}, {"filename": "a.safetensors"}, {"filename": "sub/deep/a.safetensors"},
                                 {"filename": "kept/deep/a.safetensors"}, **environment)
    for result in (picked, named):
        assert result.get("error") == "CheckpointError", result
        assert "Hugging Face cannot be reached" in result["message"] and "put the file there" in result["message"]
        assert str(tmp_path / "models") in result["message"]
    assert "a.safetensors is not in" in named["message"] and "to pick a file" in picked["message"] and FakeHub.requests == []
    assert {path.name for path in (tmp_path / "models").rglob("*") if ".cache" not in path.parts} == {"kept"}


MINE, OTHER = "svdq-int4_r32-flux.safetensors", "svdq-fp4_r128-flux.safetensors"


@pytest.mark.parametrize("environment", [{}, UNREACHABLE, OFFLINE], ids=["online", "unreachable", "offline"])
def test_an_empty_filename_takes_the_file_that_is_there(download, tmp_path, environment):
    """Under the published name, without a list of the repository; owner/nunchaku-flux calls its file as owner/flux does."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / MINE).write_bytes(DATA)
    ours, theirs = download({}, {"repo_id": "owner/nunchaku-flux"}, **environment)
    assert ours["path"] == str(tmp_path / "models" / MINE) and "not certain" in ours["notice"]
    assert ours["said"] == [f"asking Hugging Face whether {MINE} is the one of {REPO}"]
    assert not [line for line in FakeHub.requests if "api/" in line]
    if environment:
        assert theirs["path"] == ours["path"]
    else:
        assert "no such repository" in theirs["message"]


@pytest.mark.parametrize("environment", [UNREACHABLE, OFFLINE], ids=["unreachable", "offline"])
def test_without_the_hub_another_rank_or_precision_serves(download, tmp_path, environment):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / OTHER).write_bytes(DATA)
    start = time.monotonic()
    result, other = download({}, {"repo_id": "owner/other"}, **environment)
    assert time.monotonic() - start < 20
    assert result["path"] == str(tmp_path / "models" / OTHER) and "could not be asked" in result["notice"]
    assert result["said"][0] == f"asking Hugging Face which files {REPO} has"
    assert "cannot be reached to pick a file, and none of this model is in" in other["message"]


@pytest.mark.parametrize("name, words", [("gated", "gated"), ("missing", "no such repository"), ("broken", "500")])
def test_an_answer_is_not_taken_for_silence(download, tmp_path, name, words):
    """Another rank or precision that is there serves only where nobody answers."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"svdq-fp4_r128-{name}.safetensors").write_bytes(DATA)
    result, = download({"repo_id": f"owner/{name}"})
    assert result.get("error") == "CheckpointError" and words in result["message"]


@pytest.mark.parametrize("kind", ["ConnectionError", "ReadTimeout", "ProxyError", "SSLError"])
def test_no_answer_in_the_words_of_huggingface_hub_0(tmp_path, monkeypatch, kind):
    """Its HTTP library is requests, which calls all of them OSErrors."""
    requests = pytest.importorskip("requests")

    def silent(*_, **__):
        raise getattr(requests.exceptions, kind)("Max retries exceeded")

    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(CheckpointError, match="cannot be reached to pick a file, and none of this model is in"):
        hub.download(REPO, None, "main", tmp_path, wants_fp4=False, progress=None)
    (tmp_path / OTHER).write_bytes(DATA)
    path, notice = hub.download(REPO, None, "main", tmp_path, wants_fp4=False, progress=None)
    assert path == str(tmp_path / OTHER) and "could not be asked (Max retries exceeded)" in notice
    assert hub._answer(requests.exceptions.JSONDecodeError("Expecting value", "<", 0), "").startswith("the download of")


def test_the_hub_is_asked_where_only_another_file_is_there(download, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / OTHER).write_bytes(DATA)
    result, = download({})
    assert result["path"] == str(tmp_path / "models" / MINE) and result["notice"] is None
    assert result["said"] == [f"asking Hugging Face which files {REPO} has", f"downloading {MINE} of {REPO}"]


LONG = "x" * 5000


@pytest.mark.parametrize("repo_id", ["", "flux", "/flux", "owner/", "a/b/c", "https://hub.test/owner/flux", " / ", "a\0/b",
                                     "a/b\x1b[31m", "a/\ud800", "a\\b", "<img src=x>/b", f"a/{LONG}", "a/b?x#y", "a/b%2e%2e"])
def test_bad_repo_id(tmp_path, repo_id):
    with pytest.raises(CheckpointError, match="needs the form owner/name"):
        hub.download(repo_id, None, "main", tmp_path, wants_fp4=False, progress=None)


@pytest.mark.parametrize("revision", ["", "a b", "..", "a/../b", "a\0", "\x1b[31m", "\ud800", "a\\b", "<b>", LONG, "a?b",
                                      "a%2f"])
def test_bad_revision(tmp_path, revision):
    with pytest.raises(CheckpointError, match="revision '.*': needs the name of a branch") as caught:
        hub.download(REPO, None, revision, tmp_path, wants_fp4=False, progress=None)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("filename", [
    "../a.safetensors", "a/../../b.safetensors", "/etc/a.safetensors", "a//b.safetensors", "..\\a.safetensors",
    "C:\\a.safetensors", "C:a.safetensors", "a.ckpt", "a.safetensors.exe", "a.safetensors/", "a\0.safetensors",
    "a\x1b[31m.safetensors", "\ud800.safetensors", f"{LONG}.safetensors", "<b>.safetensors", ".safetensors",
    "con.safetensors", ".cache/a.safetensors"])
def test_bad_filename(tmp_path, filename):
    with pytest.raises(CheckpointError, match="^filename '.*(needs the name of a .safetensors file|is no name for)") as caught:
        hub.download(REPO, filename, "main", tmp_path, wants_fp4=False, progress=None)
    assert not any(tmp_path.iterdir()) and str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("filename, what", [(None, "the model"), ("a.safetensors", "a.safetensors")])
def test_nothing_is_asked_of_the_network_where_only_the_cache_may_answer(tmp_path, filename, what):
    with pytest.raises(CheckpointError) as caught:
        hub.cached(REPO, filename, "main", cache_dir=tmp_path, local_files_only=True)
    assert str(caught.value) == (f"{REPO} (main): {what} is not in the cache of this machine, and local_files_only is set. "
                                 "Leave that out, or give the path of the file")
