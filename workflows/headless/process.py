"""A ComfyUI server for as long as a with block lasts."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from .environment import HOME, SetupError, sees_gpu

STARTING, STOPPING = 300, 10            # seconds; a first start on a slow disk takes minutes
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))     # the server is on this machine


class ComfyProcess:
    """with ComfyProcess(environment.make()) as server: Client(server.url) ...

    arguments  more arguments of main.py
    log        file for the server's output; without one, .environment/server-PORT.log, which is removed at the end unless
               the start failed or the caller sets keep_log
    port       the one to take if it is free
    """

    def __init__(self, environment, arguments=(), log=None, timeout=STARTING, port=0):
        self.environment, self.arguments, self.timeout = environment, arguments, timeout
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.keep_log = log is not None
        self.log = Path(log or HOME / f"server-{self.port}.log")
        self.process = None

    def command(self):
        python, _, base, starter = self.environment
        command = [*starter, "--listen", "127.0.0.1", "--port", str(self.port),
                   "--disable-auto-launch", "--disable-api-nodes"]
        if not sees_gpu(python):
            command.append("--cpu")
        if base:                        # a private ComfyUI leaves no database behind and shares none
            command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        return [*command, *self.arguments]

    def __enter__(self):
        try:
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "wb") as log:
                    self.process = subprocess.Popen(
                        self.command(), cwd=self.environment.comfy, stdin=subprocess.DEVNULL, stdout=log,
                        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **_own_group())
            except OSError as error:                    # a folder where nothing may be written
                raise SetupError(f"ComfyUI cannot be started: {error}.") from None
            self._wait_until_ready()
        except BaseException as error:
            self.keep_log |= isinstance(error, SetupError)
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        try:
            self.stop()
        finally:                        # a second Ctrl-C interrupts stop, which then kills
            if not self.keep_log:
                self.log.unlink(missing_ok=True)

    def stop(self):
        """Ask, then kill: the server and everything it started."""
        if self.process is None:
            return
        try:
            self._signal(hard=False)
            self.process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            print(f"ComfyUI did not stop within {STOPPING} s and is killed", file=sys.stderr, flush=True)
        finally:
            self._signal(hard=True)
            self.process.wait()

    def log_tail(self, lines=15):
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return "\n".join("  | " + line for line in text.strip().splitlines()[-lines:])

    def _wait_until_ready(self):
        deadline = time.monotonic() + self.timeout
        while True:
            if self.process.poll() is not None:
                raise SetupError(f"ComfyUI ended with code {self.process.returncode} before it was ready, "
                                 f"see {self.log}. It said last:\n{self.log_tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):       # not listening yet
                with NO_PROXY.open(f"{self.url}/system_stats", timeout=5) as answer:
                    if answer.status == 200:
                        return
            if time.monotonic() > deadline:
                raise SetupError(f"ComfyUI was not ready after {self.timeout} s, see {self.log}. "
                                 f"It said last:\n{self.log_tail()}")
            time.sleep(0.2)

    def _signal(self, hard):
        if os.name == "nt":
            if self.process.poll() is None:                         # /T: its children too
                subprocess.run(["taskkill", "/T", "/F", "/PID", str(self.process.pid)], capture_output=True)
        else:
            with contextlib.suppress(ProcessLookupError):           # the whole group has ended
                os.killpg(self.process.pid, signal.SIGKILL if hard else signal.SIGTERM)


def _own_group():
    """The terminal's Ctrl-C reaches us alone; we stop the server."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _free_port(wanted):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:                     # somebody else has it
            probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
