"""A small HTTP server that keeps the requests it gets: the API, for tests that look at its requests,
and a collector of spans."""

import json
import threading
import time
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

IMPORT, CATALOG = "/data/foundation/import", "/data/foundation/catalog"


@dataclass
class Request:
    """A request as it came."""

    at: float
    method: str
    path: str
    headers: dict  # names in lower case
    body: bytes


@dataclass
class Span:
    """A span, as OTLP and Zipkin both have it."""

    service: str
    name: str
    kind: str
    trace: int
    id: int
    parent: int


def batch(_):
    now = int(time.time() * 1000)
    body = {"id": uuid.uuid4().hex, "imsOrg": "test@AdobeOrg", "status": "loading",
            "created": now, "updated": now, "version": "1.0.0"}
    return 201, body


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Recorder:
    """Answers creates by `create`, lookups with nothing, and keeps all requests and spans."""

    def __init__(self, programs, create=batch):
        self.create = create
        self.requests = []
        self.spans = []
        self.server = Server(("127.0.0.1", 0), handler(self))
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        programs.started.append(self)
        self.address = f"127.0.0.1:{self.server.server_port}"
        url = f"http://{self.address}"
        self.upstream_url, self.catalog_url = url + IMPORT, url + CATALOG

    def refuse_connections(self):
        """From now on; those that exist stay."""
        self.server.shutdown()
        self.server.socket.close()

    close = refuse_connections

    def creates(self):
        return [r for r in self.requests if r.method == "POST"]

    def respond(self, request):
        if request.path == "/v1/traces":
            self.spans += otlp_spans(request.body)
            return 200, {}
        if request.path == "/api/v2/spans":
            self.spans += zipkin_spans(request.body)
            return 202, {}
        self.requests.append(request)
        return (200, {}) if request.method == "GET" else self.create(request)


def handler(recorder):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # a response leaves as one packet

        def do_POST(self):
            names = {name.lower() for name in self.headers}
            headers = {name: ", ".join(self.headers.get_all(name)) for name in names}
            request = Request(time.monotonic(), self.command, self.path, headers, self.body())
            status, body = recorder.respond(request)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def body(self):
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *_):
            pass

    return Handler


def otlp_spans(body):
    kinds = {2: "SERVER", 3: "CLIENT"}
    export = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
    for resource in export.resource_spans:
        names = {a.key: a.value.string_value for a in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    names.get("service.name", ""), span.name, kinds.get(span.kind, ""),
                    *(int.from_bytes(i, "big")
                      for i in (span.trace_id, span.span_id, span.parent_span_id)),
                )


def zipkin_spans(body):
    for span in json.loads(body):
        ids = (int(span.get(name, "0"), 16) for name in ("traceId", "id", "parentId"))
        service = span.get("localEndpoint", {}).get("serviceName", "")
        yield Span(service, span.get("name", ""), span.get("kind", ""), *ids)
