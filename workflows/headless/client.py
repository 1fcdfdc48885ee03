"""ComfyUI's HTTP and websocket interface, as far as running a workflow needs it. Standard library only."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

ANSWER = 60             # seconds a busy server may take to answer: loading a model can hold it up
SILENCE = 15            # seconds without an event before asking whether we missed the end
POLL = 0.25
ENDS = ("execution_success", "execution_error", "execution_interrupted")


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


class Client:
    """One prompt at a time: queue(prompt), follow(prompt_id, on_event), images(prompt_id)."""

    def __init__(self, url):
        try:
            parts = urllib.parse.urlsplit(url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0     # raises for impossible ones
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"server URL {url[:200]!r}: must look like http://127.0.0.1:8188")
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex
        self._socket = None
        # Straight to the server: the websocket could not use a proxy either.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def queue(self, prompt):
        self._connect()                     # first, so that no event is lost
        try:
            answer = self._json("/prompt", {"prompt": prompt, "client_id": self.id})
        except ServerError as error:
            if error.code == 400 and error.body.startswith(b"{"):
                raise Rejected(_refusal(json.loads(error.body), prompt)) from None
            raise
        except RecursionError:
            raise Rejected("the workflow is nested too deeply to be sent. No node takes such an input.") from None
        if answer.get("node_errors"):       # only the valid outputs would run, without a word about the others
            self.interrupt(answer["prompt_id"])
            raise Rejected(_refusal(answer, prompt))
        return answer["prompt_id"]

    def follow(self, prompt_id, on_event=lambda kind, data: None):
        """Report events until the prompt ends; raise Failed or Interrupted if it did not succeed.

        Events come over the websocket and may be lost with it. The verdict comes from the history, which is not.
        """
        for kind, data in self._events(prompt_id):
            on_event(kind, data)
        for kind, data in self._finished(prompt_id)["status"]["messages"]:
            if kind == "execution_error":
                raise Failed(f"node {data['node_id']} ({data['node_type']}) failed: "
                             f"{data['exception_type']}: {data['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise Interrupted(f"interrupted at node {data['node_id']} ({data['node_type']})")

    def images(self, prompt_id):
        """[(file name, bytes)] that a prompt has saved; its previews, where it saved nothing."""
        images = [image for output in self._finished(prompt_id)["outputs"].values() for image in output.get("images", [])]
        saved = [image for image in images if image.get("type") == "output"]
        return [(image["filename"], self._request("/view?" + urllib.parse.urlencode(image))) for image in saved or images]

    def texts(self, prompt_id):
        """What a prompt's nodes have shown as text."""
        return [text for output in self._finished(prompt_id)["outputs"].values() for text in output.get("text") or []
                if isinstance(text, str)]

    def interrupt(self, prompt_id):
        """Drop the prompt if it waits, stop it if it runs; leave everybody else's alone."""
        self._request("/queue", json.dumps({"delete": [prompt_id]}).encode(), "application/json")
        self._request("/interrupt", json.dumps({"prompt_id": prompt_id}).encode(), "application/json")

    def object_info(self):
        return self._json("/object_info")

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
                self._socket = WebSocket(f"{self.url}/ws?clientId={self.id}", ANSWER, SILENCE)
            except (OSError, ValueError) as error:      # ValueError: a host name that cannot be
                raise self._unreachable(error) from None

    def _events(self, prompt_id):
        while self._socket:
            try:
                message = self._socket.receive()
                event = json.loads(message) if isinstance(message, str) else {}     # bytes: a preview picture
            except TimeoutError:            # a long step, or a connection that died without a word
                if self._ended(prompt_id):
                    return
                continue
            except (OSError, ValueError):   # lost: _finished waits for the end
                self.close()
                return
            data = event.get("data") or {}
            if data.get("prompt_id") == prompt_id:
                yield event["type"], data
                if event["type"] in ENDS:
                    return

    def _finished(self, prompt_id):
        """The prompt's entry in the history, which appears a moment after its last event."""
        while True:
            entry = self._ended(prompt_id)
            if entry:
                return entry
            time.sleep(POLL)

    def _ended(self, prompt_id):
        """The entry, or None while the prompt waits or runs."""
        queue = self._json("/queue")        # asked first: a prompt goes from the queue into the history, never back
        entry = self._json(f"/history/{prompt_id}").get(prompt_id)
        if not entry and prompt_id not in [item[1] for item in queue["queue_running"] + queue["queue_pending"]]:
            raise ServerError(f"{self.url} no longer knows prompt {prompt_id}: it was restarted, or the prompt was "
                              "taken out of its queue. Run the workflow again.")
        return entry

    def _json(self, path, message=None):
        body = None if message is None else json.dumps(message).encode()
        answer = self._request(path, body, "application/json")
        try:
            return json.loads(answer)
        except ValueError:
            raise ServerError(f"{self.url}{path} did not answer JSON but {answer[:80]!r}. "
                              "The URL must be that of a ComfyUI server.") from None

    def _request(self, path, body=None, kind="application/json"):
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": kind})
        try:
            with self._opener.open(request, timeout=ANSWER) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            said = error.read()
            raise ServerError(f"{self.url}{path.split('?')[0]} answered HTTP {error.code}: "
                              f"{said[:300].decode(errors='replace').strip()}. The server's log may say why.",
                              error.code, said) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error):
        return ServerError(f"no ComfyUI answers at {self.url}: {getattr(error, 'reason', error)}. "
                           "Start it there, or correct the URL.")


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


class ProtocolError(ConnectionError):
    """The other side does not speak RFC 6455."""


class WebSocket:
    """The client half of RFC 6455 that we need: receive messages, answer pings.

    frame   fin:1 rsv:3 opcode:4 | mask:1 size:7 [16 or 64 more bits of size] [4 bytes mask] payload
    """

    CONTINUED, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
    LARGEST = 1 << 28                       # bytes; a preview picture has some 100 kB

    def __init__(self, url, answer, silence):
        """`answer`: seconds the server may take to say yes; `silence`: seconds receive() waits."""
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._stream = socket.create_connection((parts.hostname, parts.port or (443 if secure else 80)), answer)
        self._received = bytearray()        # bytes of a frame stay here until it is complete: a timeout loses none
        self._parts, self._opcode = [], None
        try:
            if secure:
                self._stream = ssl.create_default_context().wrap_socket(self._stream, server_hostname=parts.hostname)
            self._shake_hands(f"{parts.path}?{parts.query}", f"{host}:{parts.port}" if parts.port else host)
            self._stream.settimeout(silence)
        except BaseException:
            self._stream.close()
            raise

    def receive(self):
        """The next message: str or bytes. TimeoutError when none came in time, another OSError when none will come."""
        while True:
            final, opcode, payload = self._frame()
            if opcode == self.PING:
                self._send(self.PONG, payload)
            elif opcode == self.CLOSE:
                raise ConnectionError("the server closed the websocket")
            elif opcode in (self.CONTINUED, self.TEXT, self.BINARY):
                if (opcode == self.CONTINUED) != bool(self._parts):
                    raise ProtocolError("a websocket message continues that did not begin, or begins inside another")
                self._opcode = opcode or self._opcode
                self._parts.append(payload)
                if final:
                    message, self._parts = b"".join(self._parts), []
                    return message.decode() if self._opcode == self.TEXT else message
            elif opcode != self.PONG:
                raise ProtocolError(f"websocket frame with unknown opcode {opcode}")

    def close(self):
        with self._stream, contextlib.suppress(OSError):            # it may be gone already
            self._send(self.CLOSE, b"")

    def _shake_hands(self, path, host):
        key = base64.b64encode(os.urandom(16)).decode()
        self._stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        while b"\r\n\r\n" not in self._received:
            self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        proof = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        if status.split(" ")[1:2] != ["101"] or headers.get("sec-websocket-accept") != base64.b64encode(proof).decode():
            raise ProtocolError(f"instead of a websocket the server offers {status!r}")

    def _frame(self):
        self._need(2)
        first, second = self._received[:2]
        if first & 0x70 or second & 0x80:
            raise ProtocolError("websocket frame with reserved bits or a mask, which no server may send")
        size, begin = second & 0x7F, 2
        if size >= 126:
            begin = 4 if size == 126 else 10
            self._need(begin)
            size = int.from_bytes(self._received[2:begin], "big")
        if size > self.LARGEST:
            raise ProtocolError(f"websocket frame of {size} bytes")
        self._need(begin + size)
        payload = bytes(self._received[begin:begin + size])
        del self._received[:begin + size]
        return first & 0x80, first & 0x0F, payload

    def _need(self, size):
        while len(self._received) < size:
            self._more()

    def _more(self):
        chunk = self._stream.recv(1 << 16)
        if not chunk:
            raise ConnectionError("the server went away")
        self._received += chunk

    def _send(self, opcode, payload):       # only control frames, so at most 125 bytes
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._stream.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)
