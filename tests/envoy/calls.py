"""Calls of the gateway. Each carries a tag, so that the ledger of the simulated API tells how many
batches it made."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

from checks import check

CREDENTIALS = [
    ("authorization", "Bearer test"), ("x-api-key", "test"),
    ("x-gw-ims-org-id", "test@AdobeOrg"), ("x-sandbox-name", "prod"),
]
DATASET = "5c8c3c555033b814b69f947f"


@dataclass
class Call:
    """A call's answer, and what the ledger says of it."""

    number: int
    code: str = "OK"
    outcome: str = ""  # empty: no gateway said it
    reason: str = ""
    origin: str = ""
    batch_id: str = ""
    message: str = ""
    metadata: dict = field(default_factory=dict)  # headers and trailers
    seconds: float = 0.0
    batches: list = field(default_factory=list)

    def is_duplicate(self):
        return len(self.batches) > 1

    def is_false(self):
        if self.code == "OK":
            return self.batch_id not in self.batches
        exists = {"NOT_APPLIED": False, "APPLIED": True}.get(self.outcome)
        return exists is not None and exists != bool(self.batches)

    def ending(self):
        last = self.origin if self.code == "OK" else self.outcome or "(no gateway's answer)"
        return f"{self.code} {last}"


async def call(stub, number=0, external_id=None, deadline=30.0, metadata=()):
    request = pb.CreateBatchRequest(dataset_id=DATASET)
    request.tags["call"].values.append(str(number))
    if external_id:
        request.external_id = external_id
    began = time.monotonic()
    calling = stub.CreateBatch(request, timeout=deadline, metadata=[*CREDENTIALS, *metadata])
    result = Call(number)
    try:
        answer = await calling
        result.outcome, result.batch_id = "APPLIED", answer.batch.id
        result.origin = pb.BatchOrigin.Name(answer.origin).removeprefix("BATCH_ORIGIN_")
        both = [*await calling.initial_metadata(), *await calling.trailing_metadata()]
    except grpc.aio.AioRpcError as error:
        both = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
        # Not by grpc_status: it raises if grpcio, at the very deadline, leaves the message encoded.
        info = detail(error_details_pb2.ErrorInfo(), dict(both))
        result.code, result.message = error.code().name, error.details()
        result.outcome, result.reason = info.metadata.get("outcome", ""), info.reason
    result.metadata, result.seconds = dict(both), time.monotonic() - began
    return result


def detail(message, metadata):
    """The detail of this type that an error's metadata holds, or an empty one."""
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    for any_detail in status.details:
        any_detail.Unpack(message)
    return message


class Load:
    """Calls that are made at the same time."""

    def __init__(self, address, external_ids=False, service_config=None):
        options = [("grpc.use_local_subchannel_pool", 1)]
        if service_config:
            options.append(("grpc.service_config", json.dumps(service_config)))
        self.channel = grpc.aio.insecure_channel(address, options)
        self.stub = batch_service_pb2_grpc.BatchServiceStub(self.channel)
        self.external_ids = external_ids
        self.calls = []

    def call(self, deadline=30.0, metadata=()):
        number = len(self.calls)
        name = f"call-{number}"
        # The logs know a call by its request id.
        calling = call(
            self.stub, number, name if self.external_ids else None, deadline,
            metadata or [("x-request-id", name)],
        )
        self.calls.append(asyncio.create_task(calling))
        return self.calls[-1]

    async def many(self, count, at_once=100, patience=30.0, hurry=None):
        """Every fifth call has only `hurry` seconds, if that is given."""
        free = asyncio.Semaphore(at_once)
        for number in range(count):
            await free.acquire()
            deadline = hurry if hurry and number % 5 == 4 else patience
            self.call(deadline).add_done_callback(lambda _: free.release())

    async def steady(self, per_second, until):
        """Calls at a steady pace, until something else has happened."""
        begin, number = time.monotonic(), 0
        while not until.done():
            self.call()
            number += 1
            await asyncio.sleep(max(0.0, begin + number / per_second - time.monotonic()))
        await until

    async def steady_for(self, per_second, seconds):
        await self.steady(per_second, asyncio.ensure_future(asyncio.sleep(seconds)))

    async def ended(self, stand, afterwards=0.5):
        """All calls with their batches. `afterwards`: how long what was sent may still create a
        batch after its caller has left."""
        calls = await asyncio.gather(*self.calls)
        await self.channel.close()
        await asyncio.sleep(afterwards)
        for batch in stand.ledger():
            tag = batch["tags"]["call"]
            tag = tag["values"] if isinstance(tag, dict) else tag  # by Envoy's transcoder
            calls[int(tag[0])].batches.append(batch["id"])
        return calls


def table(stand, calls):
    """Prints how calls ended, and gives Envoy's retries."""
    retries = stand.stat("upstream_rq_retry") if stand.admin else "-"
    rows = [
        ("calls", len(calls)),
        ("OK", sum(c.code == "OK" for c in calls)),
        ("batches", sum(len(c.batches) for c in calls)),
        ("duplicates", sum(c.is_duplicate() for c in calls)),
        ("false answers", sum(c.is_false() for c in calls)),
        ("Envoy's retries", retries),
        ("seconds", f"{time.monotonic() - stand.began:.1f}"),
    ]
    print("  " + " | ".join(name for name, _ in rows))
    print("  " + " | ".join(str(value).rjust(len(name)) for name, value in rows))
    for ending, count in Counter(c.ending() for c in calls).most_common():
        print(f"    {count:7} {ending}")
    return retries


def check_calls(calls, duplicates=True):
    if duplicates:
        found = [c for c in calls if c.is_duplicate()]
        check("no call made two batches", not found, *found)
    found = [c for c in calls if c.is_false()]
    check("no answer was false", not found, *found)
    found = [c for c in calls if c.reason == "GATEWAY_FAILED"]
    check("no gateway met a bug of its own", not found, *found)


def check_no_failure(calls):
    check_calls(calls)
    found = [c for c in calls if c.code != "OK"]
    check(f"none of {len(calls)} calls failed", calls and not found, *found)
