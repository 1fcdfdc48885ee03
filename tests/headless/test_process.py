"""ComfyProcess with a few lines of Python in the place of ComfyUI."""

import json
import os
import select
import sys
import urllib.request

import pytest
from headless import process
from headless.environment import Environment, SetupError
from headless.process import ComfyProcess

SERVER = """
import http.server, json, os, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([sys.argv[1:], CHILD.pid]).encode())
CHILD = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("serving")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "sees_gpu", lambda python: False)
    monkeypatch.setattr(process, "HOME", tmp_path / "home")

    def start(code, base=None, **options):
        main = tmp_path / "main.py"
        main.write_text(code)
        return ComfyProcess(Environment(sys.executable, tmp_path, base, [sys.executable, str(main)]), **options)
    return start


def ask(server):
    with urllib.request.urlopen(server.url + "/system_stats", timeout=10) as answer:
        return json.load(answer)


def ends(pid, within=10):
    """Whether the process has ended or does so in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(handle):
        return bool(select.select([handle], [], [], within)[0])


linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd_open")


@linux
def test_start_and_stop_with_all_children(start):
    with start(SERVER) as server:
        arguments, child = ask(server)
        assert "--cpu" in arguments
        assert "--base-directory" not in arguments
        assert "serving" in server.log_tail()
        assert not ends(child, within=0)
    assert ends(server.process.pid)
    assert ends(child)
    assert not server.log.exists()


@linux
@pytest.mark.parametrize("error, keep", [(KeyboardInterrupt, False), (ValueError, True)])
def test_stops_on_exceptions(start, error, keep):
    with pytest.raises(error):
        with start(SERVER) as server:
            server.keep_log = keep
            raise error
    assert ends(server.process.pid)
    assert server.log.exists() == keep


@linux
def test_kills_what_does_not_stop(start, monkeypatch, capsys):
    monkeypatch.setattr(process, "STOPPING", 0.2)
    with start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER) as server:
        pass
    assert ends(server.process.pid)
    assert "is killed" in capsys.readouterr().err


def test_private_base(start, tmp_path):
    with start(SERVER, base=tmp_path / "base", arguments=["--verbose"]) as server:
        arguments, _ = ask(server)
    assert arguments[arguments.index("--base-directory") + 1] == str(tmp_path / "base")
    assert arguments[-1] == "--verbose"


def test_dies_before_it_is_ready(start, tmp_path):
    with pytest.raises(SetupError, match=r"ended with code 7 before it was ready(.|\n)*\| no such model"):
        with start("print('no such model'); raise SystemExit(7)"):
            pytest.fail("must not be entered")
    assert len(list((tmp_path / "home").glob("server-*.log"))) == 1


def test_nothing_may_be_written_beside_the_pack(start, tmp_path):
    (tmp_path / "home").touch()
    with pytest.raises(SetupError, match="ComfyUI cannot be started: .*home"):
        with start(SERVER):
            pytest.fail("must not be entered")


@linux
def test_never_ready(start):
    server = start("import threading; threading.Event().wait()", timeout=0.3)
    with pytest.raises(SetupError, match="not ready after 0.3 s"):
        with server:
            pytest.fail("must not be entered")
    assert ends(server.process.pid)


def test_a_log_of_ones_own_is_always_kept(start, tmp_path):
    with start(SERVER, log=tmp_path / "logs" / "mine.log") as server:
        pass
    assert "serving" in server.log.read_text()
