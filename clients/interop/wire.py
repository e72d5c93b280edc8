"""What a client cannot show by itself: an API that answers anything, and the frames that pass."""

import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PREFACE = 24  # bytes with which an HTTP/2 client begins
PING, GOAWAY = 6, 7
ACK = 1


class Api:
    """An API that answers a create by its dataset, and remembers what it was sent.

    An answer is a status, a body and, where it has some, further headers."""

    def __init__(self, answers: dict[str, tuple]) -> None:
        self.received: list[dict] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                api.received.append(body)
                self.answer(*answers[body["datasetId"]])

            def do_GET(self) -> None:  # a look-up that finds nothing
                self.answer(200, {})

            def answer(self, status: int, body: dict, headers: dict | None = None) -> None:
                text = json.dumps(body, ensure_ascii=False).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Relay:
    """Passes connections on to the gateway, and counts the HTTP/2 frames."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self.target = (host, int(port))
        self.connections = 0
        self.from_client: Counter = Counter()  # of frames, by (type, is an ACK)
        self.from_gateway: Counter = Counter()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            gateway = socket.create_connection(self.target)
            self.connections += 1
            for end in (client, gateway):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink, skip, frames in [
                (client, gateway, PREFACE, self.from_client),
                (gateway, client, 0, self.from_gateway),
            ]:
                arguments = (source, sink, skip, frames)
                threading.Thread(target=self.pump, args=arguments, daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, skip: int, frames: Counter) -> None:
        unread = b""
        try:
            while passed := source.recv(65536):
                sink.sendall(passed)
                unread += passed
                if skip and len(unread) >= skip:
                    unread, skip = unread[skip:], 0
                while not skip and len(unread) >= 9:
                    length = int.from_bytes(unread[:3], "big")
                    if len(unread) < 9 + length:
                        break
                    kind, flags = unread[3], unread[4]
                    frames[kind, kind == PING and bool(flags & ACK)] += 1
                    unread = unread[9 + length :]
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def stop(self) -> None:
        self.listener.close()
