"""ComfyUI's HTTP and websocket interface, as far as running a workflow needs it. Standard library only."""

import base64
import contextlib
import http.client
import json
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

from .websocket import WebSocket

ANSWER = 60             # seconds a busy server may take to answer: loading a model can hold it up
LEAVING = 15            # seconds to tell a server that we leave
SILENCE = 15            # seconds without an event before asking whether we missed the end
POLL = 0.25
PIECE = 1 << 20         # bytes
WRONG_NAME = (62, 64)   # OpenSSL's codes: the certificate is for other hosts, or other addresses
UNTRUSTED = (7, 18, 19, 20, 21)         # nobody who is trusted has signed it
ENDS = ("execution_success", "execution_error", "execution_interrupted")
HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+): *([\x20-\x7e\xa0-\xff]*)")       # of HTTP: no line breaks


class ServerError(Exception):
    """The server cannot be reached, or does not behave like a ComfyUI."""

    def __init__(self, message, code=None, body=b""):
        super().__init__(message)
        self.code, self.body = code, body


class Rejected(Exception):
    """The server refuses the workflow."""


class Failed(Exception):
    """A node raised an error."""


class Interrupted(Exception):
    """The workflow was interrupted."""


class TimedOut(Exception):
    """The deadline has passed."""


class Client:
    """One prompt at a time: queue(prompt), follow(prompt_id, on_event), files(prompt_id), texts(prompt_id).

    url       http://127.0.0.1:8188, or without http://; one with https:// and USER:PASSWORD@ too
    headers   [(name, value)] to send with each request
    ca        PEM file of the authorities whose certificates an https server may have, in the place of the system's

    deadline, of time.monotonic(): nothing is waited for beyond it, and TimedOut raised; None: no end.
    Raises ValueError for a url that can be none, OSError for a ca that cannot be read.
    """

    def __init__(self, url, headers=(), ca=None):
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            fits = parts.scheme in ("http", "https") and len(parts.hostname or "") in range(1, 254) \
                and not parts.query and not parts.fragment and parts.port != 0                  # raises for impossible ones
        except ValueError:
            fits = False
        if not fits:
            said = url.rpartition("@")[2][:200]             # what stands before it is a secret
            raise ValueError(f"server URL {said!r}: must look like http://127.0.0.1:8188 or 127.0.0.1:8188")
        user, at, place = parts.netloc.rpartition("@")
        self.url = urllib.parse.urlunsplit(parts._replace(netloc=place)).rstrip("/")
        self.headers = list(headers)
        if at and not any(name.lower() == "authorization" for name, _ in headers):
            login = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            self.headers.insert(0, ("Authorization", f"Basic {login}"))
        self.id = uuid.uuid4().hex
        self.deadline = None
        self._socket, self._definitions = None, {}
        self._tls = ssl.create_default_context(cafile=ca) if parts.scheme == "https" else None
        self._has_ca = ca is not None
        if self._tls and ca:                # Python 3.13 wants extensions that few authorities of one's own write
            self._tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
        # Straight to the server: the websocket could not use a proxy either. And to no other: headers may be secrets.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay,
                                                   *([urllib.request.HTTPSHandler(context=self._tls)] if self._tls else []))

    def queue(self, prompt):
        self._connect()                     # first, so that no event is lost
        ours = str(uuid.uuid4())
        try:
            answer = self._json("/prompt", {"prompt": prompt, "client_id": self.id, "prompt_id": ours})
        except (KeyboardInterrupt, TimedOut):           # it may have come there
            with contextlib.suppress(ServerError):
                self.interrupt(ours)
            raise
        except ServerError as error:
            if error.code == 400 and (refusal := _refusal_in(error.body, prompt)):
                raise Rejected(refusal) from None
            raise
        except RecursionError:
            raise Rejected("the workflow is nested too deeply to be sent. No node takes such an input.") from None
        if not isinstance(answer.get("prompt_id"), str):
            raise ServerError(f"{self.url}/prompt did not answer as ComfyUI does. The URL must be that of a ComfyUI server.")
        if answer.get("node_errors"):       # only the valid outputs would run, without a word about the others
            self.interrupt(answer["prompt_id"])
            raise Rejected(_refusal(answer, prompt))
        return answer["prompt_id"]

    def follow(self, prompt_id, on_event=lambda kind, data: None):
        """Report events until the prompt ends; raise Failed or Interrupted if it did not succeed.

        Events come over the websocket and may be lost with it. The verdict comes from the history, which is not. One is ours:
        ("queued", {"ahead": so many prompts}) while it waits behind others.
        """
        for kind, data in self._events(prompt_id):
            on_event(kind, data)
        for kind, data in self._finished(prompt_id)["status"]["messages"]:
            if kind == "execution_error":
                raise Failed(f"node {data['node_id']} ({data['node_type']}) failed: "
                             f"{data['exception_type']}: {data['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise Interrupted(f"interrupted at node {data['node_id']} ({data['node_type']})")

    def files(self, prompt_id):
        """(file name, bytes) of what a prompt's nodes have saved: pictures, sound, latents; of its previews, where that is
        nothing. Each is fetched when it is asked for."""
        files = [file for shown in self._shown(prompt_id) for file in shown
                 if isinstance(file, dict) and isinstance(file.get("filename"), str) and file.get("type") != "input"]
        for file in [file for file in files if file.get("type") == "output"] or files:
            place = {key: file[key] for key in ("filename", "subfolder", "type") if isinstance(file.get(key), str)}
            yield file["filename"], self._request("/view?" + urllib.parse.urlencode(place))

    def texts(self, prompt_id):
        """What a prompt's nodes have shown as text."""
        return [text for shown in self._shown(prompt_id) for text in shown if isinstance(text, str)]

    def interrupt(self, prompt_id):
        """Drop the prompt if it waits, stop it if it runs; leave everybody else's alone."""
        self.deadline = None                # which this may come after
        self._request("/queue", json.dumps({"delete": [prompt_id]}).encode(), seconds=LEAVING)
        self._request("/interrupt", json.dumps({"prompt_id": prompt_id}).encode(), seconds=LEAVING)

    def upload(self, name, data):
        """Put a file into ComfyUI's input folder. Returns what an input calls it there: another file of that name stays."""
        name = re.sub(r'[\\/"\x00-\x1f\x7f]', "_", name).encode(errors="replace").decode()
        border = uuid.uuid4().hex
        body = (f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n").encode() + data + f"\r\n--{border}--\r\n".encode()
        said = self._json("/upload/image", body, f"multipart/form-data; boundary={border}")
        return f"{said['subfolder']}/{said['name']}" if said.get("subfolder") else said["name"]

    def object_info(self):
        return self._json("/object_info")

    def definition(self, kind):
        """What /object_info says of a type of node, None of one that the server has not. Asked once: forget() to ask again."""
        if kind not in self._definitions:
            self._definitions[kind] = self._json(f"/object_info/{urllib.parse.quote(kind, '', errors='replace')}").get(kind)
        return self._definitions[kind]

    def forget(self):
        self._definitions.clear()

    def is_comfyui(self, seconds):
        """Whether one answers within so many seconds at each step."""
        try:
            return "system" in json.loads(self._request("/system_stats", seconds=seconds))
        except (ServerError, ValueError, TypeError):
            return False

    def model_folders(self):
        """{directory of ComfyUI's models: [folders on the server]}"""
        return {found["name"]: found["folders"] for found in self._json("/experiment/models", shape=list)}

    def templates(self):
        """{folder of a pack: [names of its templates]}"""
        return self._json("/workflow_templates")

    def close(self):
        if self._socket:
            self._socket.close()
            self._socket = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _connect(self):
        if self._socket is None:
            try:
                self._socket = WebSocket(f"{self.url}/ws?clientId={self.id}", self._patience(ANSWER), SILENCE, self.headers,
                                         self._tls)
            except (OSError, ValueError) as error:      # ValueError: a host name that cannot be
                self._patience(0)
                raise self._unreachable(error) from None

    def _events(self, prompt_id):
        ahead, started, heard = 0, False, time.monotonic()
        while self._socket:
            if time.monotonic() - heard >= SILENCE:     # what the server says to everybody hides no silence about this one
                if self._ended(prompt_id):
                    return
                heard = time.monotonic()
            try:
                self._socket.wait(self._patience(SILENCE))
                message = self._socket.receive()
                event = json.loads(message) if isinstance(message, str) else None   # bytes: a preview picture
            except TimeoutError:            # a long step, or a connection that died without a word
                continue
            except (OSError, ValueError):   # lost: _finished waits for the end
                self.close()
                return
            event = event if isinstance(event, dict) else {}
            data = event["data"] if isinstance(event.get("data"), dict) else {}     # of other packs anything
            if data.get("prompt_id") == prompt_id:
                started, heard = True, time.monotonic()
                yield event["type"], data
                if event["type"] in ENDS:
                    return
            elif event.get("type") == "status" and not started:                     # the queue has changed
                before, ahead = ahead, self._ahead(prompt_id, data)
                if ahead != before and ahead:
                    yield "queued", {"ahead": ahead}

    def _ahead(self, prompt_id, status):
        """How many prompts the server takes before this one."""
        if (status.get("status") or {}).get("exec_info", {}).get("queue_remaining", 0) < 2:
            return 0                        # ours alone
        queue = self._json("/queue")
        ids = [item[1] for item in queue["queue_running"] + sorted(queue["queue_pending"], key=lambda item: item[0])]
        return ids.index(prompt_id) if prompt_id in ids else 0

    def _shown(self, prompt_id):
        """The lists that a prompt's nodes have shown."""
        outputs = self._finished(prompt_id)["outputs"].values()
        return [shown for output in outputs if isinstance(output, dict) for shown in output.values() if isinstance(shown, list)]

    def _finished(self, prompt_id):
        """The prompt's entry in the history, which appears a moment after its last event."""
        while True:
            entry = self._ended(prompt_id)
            if entry:
                return entry
            time.sleep(self._patience(POLL))

    def _ended(self, prompt_id):
        """The entry, or None while the prompt waits or runs."""
        queue = self._json("/queue")        # asked first: a prompt goes from the queue into the history, never back
        entry = self._json(f"/history/{prompt_id}").get(prompt_id)
        if not entry and prompt_id not in [item[1] for item in queue["queue_running"] + queue["queue_pending"]]:
            raise ServerError(f"{self.url} no longer knows prompt {prompt_id}: it was restarted, or the prompt was "
                              "taken out of its queue. Run the workflow again.")
        return entry

    def _json(self, path, message=None, kind="application/json", shape=dict):
        body = message if message is None or isinstance(message, bytes) else json.dumps(message).encode()
        answer = self._request(path, body, kind)
        try:
            said = json.loads(answer)
            if not isinstance(said, shape):
                raise ValueError
            return said
        except (ValueError, RecursionError):
            raise ServerError(f"{self.url}{path} did not answer JSON of ComfyUI's but {answer[:80]!r}. "
                              "The URL must be that of a ComfyUI server.") from None

    def _request(self, path, body=None, kind="application/json", seconds=ANSWER):
        try:
            request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": kind, **dict(self.headers)})
            with self._opener.open(request, timeout=self._patience(seconds)) as answer:
                return b"".join(self._pieces(answer))
        except urllib.error.HTTPError as error:
            said, to = _body(error), error.headers.get("Location")
            words = f"go to {to[:200]}" if to else said[:300].decode(errors="replace").strip()
            raise ServerError(f"{self.url}{path.split('?')[0]} answered HTTP {error.code}: {words}. {_what_helps(error.code)}",
                              error.code, said) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._patience(0)
            raise self._unreachable(error) from None

    def _pieces(self, answer):
        """Of an answer's body, as they come: a slow one does not outlast the deadline."""
        while piece := answer.read1(PIECE):
            yield piece
            self._patience(0)
        if answer.length:                   # of what was announced
            raise http.client.IncompleteRead(b"", answer.length)

    def _patience(self, seconds):
        """So many seconds, or what is left of them before the deadline; TimedOut where it has passed."""
        if self.deadline is None:
            return seconds
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("the time is up")
        return min(seconds, left)

    def _unreachable(self, error):
        reason, code = error.reason if isinstance(error, urllib.error.URLError) else error, getattr(error, "code", None)
        helps = "Start it there, or correct the URL."
        if isinstance(reason, ssl.SSLCertVerificationError):
            helps = "Use a name that is in its certificate." if reason.verify_code in WRONG_NAME else \
                "The server needs another certificate." if reason.verify_code not in UNTRUSTED else \
                "The authority of --ca has not signed the server's certificate." if self._has_ca else \
                "If an authority of your own has signed the server's certificate, name its PEM file: --ca FILE."
        elif code:
            helps = _what_helps(code)
        return ServerError(f"no ComfyUI answers at {self.url}: {reason}. {helps}", code)


class _Stay(urllib.request.HTTPRedirectHandler):
    """ComfyUI sends nobody elsewhere; what does is the login page of a proxy."""

    def redirect_request(self, *_):
        return None


def _what_helps(code):
    if code in (401, 403, 407) or 300 <= code < 400:
        return 'A proxy stands before it: say who you are, by --header "Authorization: Bearer TOKEN" or as it wants it.'
    if code == 413:
        return "It takes no file of that size: start ComfyUI with a larger --max-upload-size, which is in MB."
    return "The server's log may say why."


def _body(answer):
    """Of an answer that is an error; nothing of one that breaks off."""
    try:
        return answer.read()
    except (OSError, http.client.HTTPException):
        return b""


def _refusal_in(body, prompt):
    """_refusal of an answer of ComfyUI's; None where something else said no."""
    try:
        return _refusal(json.loads(body), prompt)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _refusal(answer, prompt):
    """What /prompt said, one line per bad input."""
    error = answer.get("error") or {"message": "some outputs of the workflow are not valid"}
    lines = ["ComfyUI refuses the workflow: " + _sentence(error)]
    for node, found in dict(answer.get("node_errors") or {}).items():
        for error in found["errors"]:
            name = (error.get("extra_info") or {}).get("input_name")
            lines.append(f"  node {node} ({prompt.get(node, {}).get('class_type')})"
                         f"{f', input {name}' if name else ''}: {_sentence(error)}")
    return "\n".join(lines)


def _sentence(error):
    return ": ".join(part for part in (error["message"], error.get("details")) if part)
