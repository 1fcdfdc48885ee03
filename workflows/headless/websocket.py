"""The client half of a websocket. Standard library only."""

import base64
import contextlib
import hashlib
import os
import socket
import urllib.parse


class ProtocolError(ConnectionError):
    """The other side does not speak RFC 6455. code: of the HTTP answer that came instead, if one did."""

    def __init__(self, message, code=None):
        super().__init__(message)
        self.code = code


class WebSocket:
    """The client half of RFC 6455 that we need: receive messages, answer pings.

    frame   fin:1 rsv:3 opcode:4 | mask:1 size:7 [16 or 64 more bits of size] [4 bytes mask] payload
    """

    CONTINUED, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
    LARGEST = 1 << 28                       # bytes; a preview picture has some 100 kB

    def __init__(self, url, answer, silence, headers=(), tls=None):
        """`answer`: seconds the server may take to say yes; `silence`: seconds receive() waits; `headers`: [(name, value)] to
        ask with; `tls`: the ssl.SSLContext of an https URL."""
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._stream = socket.create_connection((parts.hostname, parts.port or (443 if secure else 80)), answer)
        self._received = bytearray()        # bytes of a frame stay here until it is complete: a timeout loses none
        self._parts, self._opcode = [], None
        try:
            if secure:
                self._stream = tls.wrap_socket(self._stream, server_hostname=parts.hostname)
            self._shake_hands(f"{parts.path}?{parts.query}", f"{host}:{parts.port}" if parts.port else host, headers)
            self.wait(silence)
        except BaseException:
            self._stream.close()
            raise

    def wait(self, silence):
        """From now on receive() waits so many seconds."""
        self._stream.settimeout(silence)

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

    def _shake_hands(self, path, host, headers):
        key = base64.b64encode(os.urandom(16)).decode()
        self._stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n".encode() +
                             b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers) + b"\r\n")
        while b"\r\n\r\n" not in self._received:
            self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        proof = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        code = status.split(" ")[1:2]
        if code != ["101"] or headers.get("sec-websocket-accept") != base64.b64encode(proof).decode():
            to = f", which leads to {headers['location'][:200]!r}" if "location" in headers else ""
            raise ProtocolError(f"instead of a websocket the server offers {status!r}{to}",
                                int(code[0]) if code and code[0].isdecimal() else None)

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
