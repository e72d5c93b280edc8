"""What travels along with a call: the request id and the trace, and nothing else."""

import asyncio
import json
import uuid

from google.rpc import error_details_pb2

import envoy_config
from calls import Load, detail
from checks import check
from envoy_config import ISTIO
from recorder import Recorder

CARRIED = {
    "accept", "accept-encoding", "authorization", "content-length", "content-type", "host",
    "user-agent", "x-api-key", "x-gw-ims-org-id", "x-request-id", "x-sandbox-name",
}
# What Envoy puts there or a caller may forge. Envoy itself drops some of a stranger's.
FOREIGN = [
    ("cookie", "session=1"), ("x-forwarded-for", "10.0.0.1"), ("x-custom", "1"),
    ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/a/sa/admin"),
    ("x-envoy-original-path", "/admin"), ("x-envoy-upstream-rq-timeout-ms", "60000"),
    ("grpc-previous-rpc-attempts", "0"), ("baggage", "user=alice"),
]


async def headers(stand):
    recorder = Recorder(stand)
    stand.upstream = recorder.upstream
    # Two hop headers by name: that they arrive shows that Envoy did add them.
    hops = ["x-envoy-attempt-count", "x-forwarded-proto"]
    stand.serve("--forward-metadata", ",".join(hops))
    stand.envoy(ISTIO)
    load = Load(stand.address, external_ids=True)

    mine = str(uuid.uuid4())
    call = await load.call(metadata=[("x-request-id", mine), *FOREIGN])
    check("the call succeeds", call.code == "OK", call)
    methods = [request.method for request in recorder.requests]
    check("it made a look-up and a create", methods == ["GET", "POST"], methods)
    for request in recorder.requests:
        usual = CARRIED - ({"content-length", "content-type"} if request.method == "GET" else set())
        names = set(request.headers)
        check(f"{request.method}: no other header goes upstream", names == usual | set(hops),
              sorted(names ^ (usual | set(hops))))
        check(f"{request.method}: the request id goes upstream",
              request.headers.get("x-request-id") == mine, request.headers)
    check("and comes back", call.metadata.get("x-request-id") == mine, call.metadata)

    recorder.requests.clear()
    call = await load.call(metadata=FOREIGN)
    ids = {r.headers["x-request-id"] for r in recorder.requests} | {call.metadata["x-request-id"]}
    check("Envoy's own request id goes there and back", len(ids) == 1, ids)

    recorder.create = lambda _: (400, {"status": 400, "title": "BadRequest", "detail": "no"})
    call = await load.call(metadata=[("x-request-id", mine), *FOREIGN])
    named = detail(error_details_pb2.RequestInfo(), call.metadata).request_id
    check("a failure names it too", call.code == "INVALID_ARGUMENT" and named == mine, call)
    await load.channel.close()


class Traced:
    """A gateway and an Envoy that send their spans to one collector, which is the API too."""

    def __init__(self, stand, tracer):
        self.stand = stand
        self.recorder = Recorder(stand)
        stand.upstream = self.recorder.upstream
        address = self.recorder.address
        self.gateway = stand.serve(env={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}", "OTEL_BSP_SCHEDULE_DELAY": "100",
        })
        collector = envoy_config.collector(address)
        stand.envoy(ISTIO, manager=tracer(address), clusters=[collector])
        self.load = Load(stand.address, external_ids=True)

    async def call(self, **headers):
        """Makes a call, and gives the spans and requests that came of it."""
        self.recorder.spans.clear()
        self.recorder.requests.clear()
        metadata = [(name.replace("_", "-"), value) for name, value in headers.items()]
        call = await self.load.call(metadata=metadata or [("x-custom", "1")])
        check("the call succeeds", call.code == "OK", call)
        await asyncio.sleep(0.7)  # spans that should not come had the time to
        return self.recorder.spans, self.recorder.requests

    async def end(self):
        await self.load.channel.close()


def check_spans(spans, requests, read):
    """Envoy's span → the gateway's → one for each request to the API, whose context it carries.
    `read` gives the trace, span and flag that a request's headers carry. Gives Envoy's span."""
    shown = [*spans, *(r.headers for r in requests)]
    of_envoy = [s for s in spans if s.service == "sidecar"]
    of_gateway = [s for s in spans if s.service == "aep-batch-gateway"]
    check("Envoy sent one span, the gateway three", (len(of_envoy), len(of_gateway)) == (1, 3), *shown)
    if len(of_envoy) != 1 or len(of_gateway) != 3:
        return None
    server = next((s for s in of_gateway if s.kind == "SERVER"), of_gateway[0])
    clients = {s.name: s for s in of_gateway if s.kind == "CLIENT"}
    check("all are of one trace", len({s.trace for s in spans}) == 1, *shown)
    check("the call's span is below Envoy's", server.parent == of_envoy[0].id, *shown)
    name = "aep.ingestion.v1.BatchService/CreateBatch"
    check("and is named after the method", (server.kind, server.name) == ("SERVER", name), server)
    names = {"GET /catalog/batches", "POST /batches"}
    check("each request to the API has a span", set(clients) == names, *clients)
    found = [s for s in clients.values() if s.parent != server.id]
    check("below the call's", not found, *found)
    carried = {r.method: read(r.headers) for r in requests}
    expected = {n.split()[0]: (s.trace, s.id, True) for n, s in clients.items()}
    check("and the API is told that span", carried == expected, carried, expected)
    return of_envoy[0]


def w3c(headers):
    version, trace, span, flags = headers.get("traceparent", "---").split("-")
    return int(trace or "0", 16), int(span or "0", 16), flags == "01"


def b3(headers):
    names = ("x-b3-traceid", "x-b3-spanid")
    return (*(int(headers.get(name, "0"), 16) for name in names), headers.get("x-b3-sampled") == "1")


def check_unsampled(spans, requests, read, trace):
    check("no one sends a span", not spans, *spans)
    found = [r.headers for r in requests if read(r.headers)[::2] != (trace, False)]
    check("the API is told the trace, unsampled", requests and not found, *found)


async def traces_w3c(stand):
    """Envoy with the OpenTelemetry tracer: traceparent."""
    traced = Traced(stand, envoy_config.opentelemetry)
    spans, requests = await traced.call()
    root = check_spans(spans, requests, w3c)
    check("Envoy's span is the root", root is not None and root.parent == 0, root)
    states = [r.headers.get("tracestate") for r in requests]
    check("no empty tracestate is made up", states == [None] * 2, states)

    trace, span = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
    spans, requests = await traced.call(
        traceparent=f"00-{trace:032x}-{span:016x}-01", tracestate="vendor=value",
    )
    root = check_spans(spans, requests, w3c)
    came = root and (root.trace, root.parent)
    check("a caller's trace is gone on with", came == (trace, span), came)
    states = [r.headers.get("tracestate") for r in requests]
    check("tracestate goes along", states == ["vendor=value"] * 2, states)
    lines = [json.loads(line) for line in traced.gateway.log.read_text().splitlines()]
    logged = [line.get("trace_id") for line in lines if line.get("target") == "access"]
    check("the access log names the trace", logged[1:] == [f"{trace:032x}"], logged)

    spans, requests = await traced.call(traceparent=f"00-{trace:032x}-{span:016x}-00")
    check_unsampled(spans, requests, w3c, trace)
    await traced.end()


async def traces_b3(stand):
    """Envoy with the Zipkin tracer: x-b3-…, sent on in this form."""
    traced = Traced(stand, envoy_config.zipkin)
    root = check_spans(*await traced.call(), b3)
    check("Envoy's span is the root", root is not None and root.parent == 0, root)
    trace, span = 0x463AC35C9F6413AD48485A3953BB6124, 0xA2FB4A1D1A96D312
    ids = {"x_b3_traceid": f"{trace:032x}", "x_b3_spanid": f"{span:016x}"}
    root = check_spans(*await traced.call(**ids, x_b3_sampled="1"), b3)
    check("a caller's trace is gone on with", root is not None and root.trace == trace, root)
    check_unsampled(*await traced.call(**ids, x_b3_sampled="0"), b3, trace)
    await traced.end()


SCENARIOS = [
    ("headers", "which headers go to the API and back", headers, ()),
    ("traces-w3c", "one trace from Envoy to the API, W3C", traces_w3c, ()),
    ("traces-b3", "one trace from Envoy to the API, B3", traces_b3, ()),
]
