"""What a client cannot show by itself: an API that answers anything, a proxy that answers for the
gateway, and the frames that pass."""

import base64
import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote

PREFACE = 24  # bytes with which an HTTP/2 client begins
DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4


class Api:
    """An API that answers a create by its dataset, shows batches that Catalog is asked for, and
    remembers what it was sent."""

    def __init__(self, responses: dict[str, tuple], batches: dict[str, dict]) -> None:
        self.received: list[dict] = []
        self.queries: list[dict[str, str]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                api.received.append(body)
                self.answer(*responses[body["datasetId"]])

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                batch_id = unquote(path.rpartition("/")[2])
                api.queries.append(dict(parse_qsl(query)))
                if api.queries[-1].get("orderBy") == "desc:created":  # a list
                    self.answer(200, batches)
                elif batch_id in batches:
                    self.answer(200, {batch_id: batches[batch_id]})
                else:  # also a look-up by external id, before a create
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
        url = f"http://127.0.0.1:{self.server.server_port}"
        self.upstream_url, self.catalog_url = f"{url}/import", f"{url}/catalog"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Proxy:
    """Says UNAVAILABLE to every call, with details of its own, and asks nobody."""

    REASON = "NO_BACKEND"

    def __init__(self) -> None:
        outcome = protobuf({1: "outcome", 2: "NOT_APPLIED"})
        info = protobuf({1: self.REASON, 2: "proxy.example", 3: outcome})
        detail = protobuf({1: "type.googleapis.com/google.rpc.ErrorInfo", 2: info})
        status = protobuf({1: 14, 2: "no backend", 3: detail})
        self.answer = b"\x88" + b"".join(  # :status 200, and headers with new names (HPACK)
            b"\x00" + prefixed(name, 127) + prefixed(value, 127)
            for name, value in {
                "content-type": "application/grpc",
                "grpc-status": "14",
                "grpc-message": "no backend",
                "grpc-status-details-bin": base64.b64encode(status),
            }.items()
        )
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        def send(kind: int, flags: int, stream: bytes, content: bytes = b"") -> None:
            client.sendall(len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream + content)

        frames = client.makefile("rb")
        frames.read(PREFACE)
        try:
            send(SETTINGS, 0, bytes(4))
            while len(head := frames.read(9)) == 9:
                content = frames.read(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], head[5:]
                if kind in (SETTINGS, PING) and not flags & ACK:
                    send(kind, ACK, stream, content if kind == PING else b"")
                elif kind in (DATA, HEADERS) and flags & END_STREAM:
                    send(HEADERS, END_HEADERS | END_STREAM, stream, self.answer)
        except OSError:
            pass
        client.close()

    def close(self) -> None:
        self.listener.close()


def protobuf(fields: dict[int, int | str | bytes]) -> bytes:
    """A message's bytes."""
    return b"".join(
        bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2]) + prefixed(value)
        for number, value in fields.items()
    )


def prefixed(text: str | bytes, most: int = 0) -> bytes:
    """Text after its length: as protobuf has it, or as HPACK, whose first byte holds up to `most`."""
    text = text.encode() if isinstance(text, str) else text
    length, result = len(text), b""
    if most:
        if length < most:
            return bytes([length]) + text
        length, result = length - most, bytes([most])
    while length > 127:
        length, result = length >> 7, result + bytes([length & 127 | 128])
    return result + bytes([length]) + text


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

    def close(self) -> None:
        self.listener.close()
