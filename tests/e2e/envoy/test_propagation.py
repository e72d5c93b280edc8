"""What travels with a call: the request id and the trace, and nothing else."""

import asyncio
import uuid

from google.rpc import error_details_pb2
from recorder import Recorder

from harness.envoy import ISTIO, collector, opentelemetry, zipkin
from harness.load import Load, detail

CARRIED = {
    "accept", "accept-encoding", "authorization", "content-length", "content-type", "host",
    "user-agent", "x-api-key", "x-gw-ims-org-id", "x-request-id", "x-sandbox-name",
}  # fmt: skip
# What Envoy puts there or a caller may forge. Envoy itself drops some of a stranger's.
FOREIGN = [
    ("cookie", "session=1"), ("x-forwarded-for", "10.0.0.1"), ("x-custom", "1"),
    ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/a/sa/admin"),
    ("x-envoy-original-path", "/admin"), ("x-envoy-upstream-rq-timeout-ms", "60000"),
    ("grpc-previous-rpc-attempts", "0"), ("baggage", "user=alice"),
]  # fmt: skip


async def test_only_known_headers_reach_the_api(programs):
    recorder = Recorder(programs)
    # Two hop headers by name: that they arrive shows that Envoy did add them.
    hops = {"x-envoy-attempt-count", "x-forwarded-proto"}
    gateway = programs.gateway(recorder, "--forward-metadata", ",".join(hops))
    envoy = programs.envoy([gateway], ISTIO)
    load = Load(envoy.address, external_ids=True)

    mine = str(uuid.uuid4())
    call = await load.call(metadata=[("x-request-id", mine), *FOREIGN])
    assert call.code == "OK"
    lookup, create = recorder.requests
    assert (lookup.method, create.method) == ("GET", "POST")
    assert set(create.headers) == CARRIED | hops
    assert set(lookup.headers) == CARRIED - {"content-length", "content-type"} | hops
    ids = {lookup.headers["x-request-id"], create.headers["x-request-id"], call.metadata["x-request-id"]}
    assert ids == {mine}

    recorder.requests.clear()
    call = await load.call(metadata=FOREIGN)
    ids = {r.headers["x-request-id"] for r in recorder.requests} | {call.metadata["x-request-id"]}
    assert len(ids) == 1, "Envoy's own request id goes there and back"

    recorder.create = lambda _: (400, {"status": 400, "title": "BadRequest", "detail": "no"})
    call = await load.call(metadata=[("x-request-id", mine), *FOREIGN])
    assert call.code == "INVALID_ARGUMENT"
    assert detail(error_details_pb2.RequestInfo(), call.metadata).request_id == mine
    await load.ended()


class Traced:
    """A gateway and an Envoy that send their spans to one collector, which is the API too. `read`
    returns the trace, the span and the flag that a request's headers carry."""

    def __init__(self, programs, tracer, read):
        self.recorder, self.read = Recorder(programs), read
        address = self.recorder.address
        self.gateway = programs.gateway(self.recorder, env={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}", "OTEL_BSP_SCHEDULE_DELAY": "100",
        })  # fmt: skip
        envoy = programs.envoy(
            [self.gateway], ISTIO, manager=tracer(address), clusters=[collector(address)]
        )
        self.load = Load(envoy.address, external_ids=True)

    async def call(self, **headers):
        """Makes a call, and returns the spans and requests that it caused."""
        self.recorder.spans.clear()
        self.recorder.requests.clear()
        metadata = [(name.replace("_", "-"), value) for name, value in headers.items()]
        call = await self.load.call(metadata=metadata or [("x-custom", "1")])
        assert call.code == "OK"
        await asyncio.sleep(0.7)  # spans that should not come had the time to
        return self.recorder.spans, self.recorder.requests

    async def sampled(self, **headers):
        """Envoy's span → the gateway's → one for each request to the API, whose context it carries.
        Returns Envoy's span and the requests."""
        spans, requests = await self.call(**headers)
        assert sorted(s.service for s in spans) == [*["aep-batch-gateway"] * 3, "sidecar"]
        (of_envoy,) = [s for s in spans if s.service == "sidecar"]
        (server,) = [s for s in spans if s.service != "sidecar" and s.kind == "SERVER"]
        clients = {s.name: s for s in spans if s.service != "sidecar" and s.kind == "CLIENT"}
        assert len({s.trace for s in spans}) == 1
        assert server.parent == of_envoy.id
        assert server.name == "aep.ingestion.v1.BatchService/CreateBatch"
        assert set(clients) == {"GET /catalog/batches", "POST /batches"}
        assert {s.parent for s in clients.values()} == {server.id}
        carried = {r.method: self.read(r.headers) for r in requests}
        assert carried == {n.split()[0]: (s.trace, s.id, True) for n, s in clients.items()}
        return of_envoy, requests

    async def unsampled(self, trace, **headers):
        """No one sends a span, and the API is told the trace."""
        spans, requests = await self.call(**headers)
        assert not spans
        assert {self.read(r.headers)[::2] for r in requests} == {(trace, False)}


def w3c(headers):
    version, trace, span, flags = headers.get("traceparent", "---").split("-")
    return int(trace or "0", 16), int(span or "0", 16), flags == "01"


def b3(headers):
    names = ("x-b3-traceid", "x-b3-spanid")
    return (*(int(headers.get(name, "0"), 16) for name in names), headers.get("x-b3-sampled") == "1")


async def test_one_w3c_trace_from_envoy_to_the_api(programs):
    """Envoy with the OpenTelemetry tracer: traceparent."""
    traced = Traced(programs, opentelemetry, w3c)
    root, requests = await traced.sampled()
    assert root.parent == 0
    assert [r.headers.get("tracestate") for r in requests] == [None] * 2, "no empty one is made up"

    trace, span = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
    root, requests = await traced.sampled(
        traceparent=f"00-{trace:032x}-{span:016x}-01", tracestate="vendor=value"
    )
    assert (root.trace, root.parent) == (trace, span), "the caller's trace continues"
    assert [r.headers.get("tracestate") for r in requests] == ["vendor=value"] * 2
    logged = [line.get("trace_id") for line in traced.gateway.log_lines("access")]
    assert logged[1:] == [f"{trace:032x}"]

    await traced.unsampled(trace, traceparent=f"00-{trace:032x}-{span:016x}-00")
    await traced.load.ended()


async def test_one_b3_trace_from_envoy_to_the_api(programs):
    """Envoy with the Zipkin tracer: x-b3-…, sent on in this form."""
    traced = Traced(programs, zipkin, b3)
    root, _ = await traced.sampled()
    assert root.parent == 0
    trace, span = 0x463AC35C9F6413AD48485A3953BB6124, 0xA2FB4A1D1A96D312
    ids = {"x_b3_traceid": f"{trace:032x}", "x_b3_spanid": f"{span:016x}"}
    root, _ = await traced.sampled(**ids, x_b3_sampled="1")
    assert root.trace == trace, "the caller's trace continues"
    await traced.unsampled(trace, **ids, x_b3_sampled="0")
    await traced.load.ended()
