"""gRPC-Web: translated by Envoy, or passed on by it to a gateway with --grpc-web."""

import asyncio
import base64
import http.client
import struct
import urllib.request

from aep.ingestion.v1 import batch_service_pb2 as pb
from google.rpc import error_details_pb2

import envoy_config
from calls import CREDENTIALS, DATASET, detail
from checks import check
from envoy_config import NO_RETRY

PATH = "/aep.ingestion.v1.BatchService/CreateBatch"
BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text+proto"
PAGE = "https://app.example"


def post(address, content_type, more=()):
    """One call as a browser makes it, over HTTP/1.1: status, headers, message, trailers."""
    message = pb.CreateBatchRequest(dataset_id=DATASET).SerializeToString()
    body = b"\0" + struct.pack(">I", len(message)) + message
    if content_type == TEXT:
        body = base64.b64encode(body)
    headers = {"content-type": content_type, "accept": content_type, "x-grpc-web": "1"}
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", PATH, body, {**headers, **dict(CREDENTIALS), **dict(more)})
    response = connection.getresponse()
    head = {name.lower(): value for name, value in response.getheaders()}
    content = response.read()
    connection.close()
    if response.status != 200:
        return response.status, head, None, head  # with a sentence, for people
    if content_type == TEXT:
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


def order_fault(stand, fault):
    url = f"http://{stand.upstream['listen']}/_simulator/faults"
    urllib.request.urlopen(url, fault.encode(), timeout=10).close()


def check_calls(stand, content_type):
    kind = "text" if content_type == TEXT else "binary"
    before = len(stand.ledger())
    status, head, message, said = post(stand.address, content_type)
    check(f"{kind}: a batch is created", status == 200 and said.get("grpc-status") == "0", status, said)
    ids = [batch["id"] for batch in stand.ledger()[before:]]
    check(f"{kind}: and named", message is not None and [message.batch.id] == ids, message, ids)
    check(f"{kind}: in the form that was asked for", head.get("content-type") == content_type, head)

    # A failure that may be repeated, one that must not, and one that comes late.
    for fault, code, reason in [
        ("status-400", "3", "API_INVALID_REQUEST"),
        ("lost-502", "2", "UPSTREAM_FAILED"),
        ("silence-after-create", "2", "UPSTREAM_TIMEOUT"),
    ]:
        order_fault(stand, fault)
        _, _, message, said = post(stand.address, content_type)
        details = said.get("grpc-status-details-bin", "")
        details = base64.b64decode(details + "=" * (-len(details) % 4))
        info = detail(error_details_pb2.ErrorInfo(), {"grpc-status-details-bin": details})
        found = (said.get("grpc-status"), info.reason, said.get("aep-batch-outcome"))
        expected = (code, reason, info.metadata.get("outcome"))
        check(f"{kind}: {fault} is told with its details", message is None and found == expected, said)


async def by_envoy(stand):
    """Envoy's filter; the gateway knows nothing of it."""
    stand.simulate()
    stand.serve(request_timeout=1.0)
    stand.envoy(NO_RETRY, filters=[envoy_config.grpc_web()])
    for content_type in (BINARY, TEXT):
        await asyncio.to_thread(check_calls, stand, content_type)


async def through_envoy(stand):
    """Envoy hands gRPC-Web on as it is, over HTTP/1.1 and over HTTP/2."""
    stand.simulate()
    gateway = stand.serve("--grpc-web", "true", "--grpc-web-origins", PAGE, request_timeout=1.0)
    for version in (1, 2):
        print(f"  HTTP/{version} to the gateway")
        stand.envoy(NO_RETRY, http=version)
        for content_type in (BINARY, TEXT):
            await asyncio.to_thread(check_calls, stand, content_type)
        name = "access-control-allow-origin"
        answers = [post(stand.address, BINARY, [("origin", page)])[:2]
                   for page in (PAGE, "https://other.example")]
        told = [(status, head.get(name)) for status, head in answers]
        check("its page may call, another may not", told == [(200, PAGE), (403, None)], told)
    seen = gateway.calls()
    check("the gateway counted each call", seen == 2 * (2 * 4 + 1), seen)


async def off(stand):
    """By default a gateway is not for browsers."""
    stand.simulate()
    stand.serve()
    stand.envoy(NO_RETRY)
    for content_type in (BINARY, TEXT):
        status, *_ = post(stand.address, content_type)
        check(f"{content_type} is refused", status == 415, status)
    check("and makes no batch", stand.ledger() == [])


SCENARIOS = [
    ("web-by-envoy", "gRPC-Web that Envoy translates", by_envoy, ()),
    ("web-through-envoy", "gRPC-Web that the gateway translates", through_envoy, ()),
    ("web-off", "gRPC-Web that nobody switched on", off, ()),
]
