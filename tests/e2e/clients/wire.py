"""What a client cannot show by itself: an API that answers anything, a proxy that answers for the
gateway, and the frames that pass."""

import json
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote

import grpc
from google.rpc import error_details_pb2, status_pb2

PREFACE = 24  # bytes with which an HTTP/2 client begins
PING, GOAWAY, ACK = 6, 7, 1  # types of frames, and a flag


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
                else:  # also a lookup by external id, before a create
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


class Proxy(grpc.GenericRpcHandler):
    """Says UNAVAILABLE to every call, with details of its own, and asks nobody."""

    REASON = "NO_BACKEND"

    def __init__(self) -> None:
        outcome = {"outcome": "NOT_APPLIED"}
        info = error_details_pb2.ErrorInfo(reason=self.REASON, domain="proxy.example", metadata=outcome)
        status = status_pb2.Status(code=14, message="no backend")
        status.details.add().Pack(info)
        self.details = status.SerializeToString()
        self.server = grpc.server(ThreadPoolExecutor(), handlers=[self])
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def service(self, _call) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self.refuse)

    def refuse(self, _request, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata([("grpc-status-details-bin", self.details)])
        context.abort(grpc.StatusCode.UNAVAILABLE, "no backend")

    def close(self) -> None:
        self.server.stop(None)


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
