"""A reverse proxy as it stands before a ComfyUI on the net: TLS, and a login. Websockets go through it, too."""

import contextlib
import socket
import ssl
import threading


class Proxy:
    """with Proxy(port of the server behind it, certificate, "Bearer x") as proxy: proxy.url

    asked   the heads of the requests, in order
    login   what Authorization must be; None: whoever asks is sent to a page to log in
    """

    def __init__(self, port, certificate, login):
        self.port, self.login, self.asked, self.open = port, login, [], []
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self.socket.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def cut(self):
        """End what is still open, as when the server behind it dies. Call when nobody else comes in."""
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with contextlib.suppress(OSError):              # closed: the end
            while True:
                threading.Thread(target=self._serve, args=(self.socket.accept()[0],), daemon=True).start()

    def _serve(self, raw):
        """One request per connection, which is how the client asks; of a websocket all that follows."""
        with contextlib.suppress(OSError), raw, self.tls.wrap_socket(raw, server_side=True) as browser:
            received = b""
            while b"\r\n\r\n" not in received:
                received += (piece := browser.recv(1 << 16))
                if not piece:
                    return
            head = received.partition(b"\r\n\r\n")[0].decode("latin-1")
            self.asked.append(head)
            if self.login is None:
                browser.sendall(b"HTTP/1.1 302 Found\r\nLocation: https://login.invalid/\r\nContent-Length: 0\r\n\r\n")
            elif f"\r\nauthorization: {self.login}\r\n".lower() not in f"{head}\r\n".lower():
                browser.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 12\r\n\r\nwho are you?")
            else:
                with socket.create_connection(("127.0.0.1", self.port)) as server:
                    self.open += [browser, server]
                    server.sendall(received)
                    back = threading.Thread(target=pump, args=(server, browser), daemon=True)
                    back.start()
                    pump(browser, server)
                    back.join()


def pump(source, target):
    with contextlib.suppress(OSError, ValueError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
