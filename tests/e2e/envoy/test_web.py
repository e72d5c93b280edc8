"""gRPC-Web: translated by Envoy, or passed on by it to a gateway with --grpc-web."""

import base64
import http.client
import struct

import pytest
from aep.ingestion.v1 import batch_service_pb2 as pb
from google.rpc import error_details_pb2

from harness.envoy import NO_RETRY, grpc_web
from harness.load import CREDENTIALS, DATASET, detail

PATH = "/aep.ingestion.v1.BatchService/CreateBatch"
BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text+proto"
PAGE, OTHER_PAGE = "https://app.example", "https://other.example"

both_forms = pytest.mark.parametrize("form", [BINARY, TEXT], ids=["binary", "text"])


def post(address, form, more=()):
    """One call as a browser makes it, over HTTP/1.1: status, headers, message, trailers."""
    message = pb.CreateBatchRequest(dataset_id=DATASET).SerializeToString()
    body = b"\0" + struct.pack(">I", len(message)) + message
    if form == TEXT:
        body = base64.b64encode(body)
    headers = {"content-type": form, "accept": form, "x-grpc-web": "1"}
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", PATH, body, {**headers, **dict(CREDENTIALS), **dict(more)})
    response = connection.getresponse()
    head = {name.lower(): value for name, value in response.getheaders()}
    content = response.read()
    connection.close()
    if response.status != 200:
        return response.status, head, None, head  # with a sentence, for people
    if form == TEXT:
        # Each piece may end with padding of its own.
        fours = (content[i : i + 4] for i in range(0, len(content), 4))
        content = b"".join(map(base64.b64decode, fours))
    message, trailers = None, {}
    while content:
        kind, length = struct.unpack(">BI", content[:5])
        frame, content = content[5 : 5 + length], content[5 + length :]
        if kind & 0x80:
            lines = frame.decode().strip().split("\r\n")
            trailers = {n.lower(): v.strip() for n, v in (line.split(":", 1) for line in lines)}
        else:
            message = pb.CreateBatchResponse.FromString(frame)
    return response.status, head, message, {**head, **trailers}


def assert_translated(envoy, simulator, form):
    """Four calls: a success, a failure that may be repeated, one that must not, one that is late."""
    before = len(simulator.ledger())
    status, head, message, trailers = post(envoy.address, form)
    assert status == 200 and trailers.get("grpc-status") == "0"
    assert [message.batch.id] == [batch["id"] for batch in simulator.ledger()[before:]]
    assert head.get("content-type") == form

    for fault, code, reason in [
        ("status-400", "3", "API_INVALID_REQUEST"),
        ("lost-502", "2", "UPSTREAM_FAILED"),
        ("silence-after-create", "2", "UPSTREAM_TIMEOUT"),
    ]:
        simulator.inject(fault)
        _, _, message, trailers = post(envoy.address, form)
        assert message is None
        details = trailers.get("grpc-status-details-bin", "")
        details = base64.b64decode(details + "=" * (-len(details) % 4))
        info = detail(error_details_pb2.ErrorInfo(), {"grpc-status-details-bin": details})
        told = (trailers.get("grpc-status"), info.reason, trailers.get("aep-batch-outcome"))
        assert told == (code, reason, info.metadata["outcome"]), fault


@both_forms
def test_envoy_translates_grpc_web(programs, form):
    """The gateway knows nothing of it."""
    simulator = programs.simulator()
    gateway = programs.gateway(simulator, request_timeout=1.0)
    envoy = programs.envoy([gateway], NO_RETRY, filters=[grpc_web()])
    assert_translated(envoy, simulator, form)


@both_forms
@pytest.mark.parametrize("version", [1, 2], ids=["http1", "http2"])
def test_the_gateway_translates_grpc_web_behind_envoy(programs, form, version):
    simulator = programs.simulator()
    gateway = programs.gateway(
        simulator, "--grpc-web", "true", "--grpc-web-origins", PAGE, request_timeout=1.0
    )
    envoy = programs.envoy([gateway], NO_RETRY, http=version)
    assert_translated(envoy, simulator, form)
    for page, expected in [(PAGE, (200, PAGE)), (OTHER_PAGE, (403, None))]:
        status, head, *_ = post(envoy.address, form, [("origin", page)])
        assert (status, head.get("access-control-allow-origin")) == expected
    assert gateway.calls() == 5, "it counts each call"


@both_forms
def test_grpc_web_is_off_by_default(programs, form):
    simulator = programs.simulator()
    envoy = programs.envoy([programs.gateway(simulator)], NO_RETRY)
    assert post(envoy.address, form)[0] == 415
    assert simulator.ledger() == []
