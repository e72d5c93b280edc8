"""Many calls of the gateway. Each carries a tag, by which the ledger of the simulated API tells how
many batches it made."""

import asyncio
import itertools
import json
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

CREDENTIALS = [
    ("authorization", "Bearer test"), ("x-api-key", "test"),
    ("x-gw-ims-org-id", "test@AdobeOrg"), ("x-sandbox-name", "prod"),
]  # fmt: skip
DATASET = "5c8c3c555033b814b69f947f"
EVERY_CODE = [code.name for code in grpc.StatusCode if code.name != "OK"]


def client_retries(*codes):
    """A service config with which the client itself retries these codes."""
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": codes,
    }
    return {"methodConfig": [{"name": [{}], "retryPolicy": retry}]}


@dataclass
class Call:
    """A call's result, and what the ledger says of it."""

    number: int
    code: str = "OK"
    outcome: str = ""  # empty: the response is not the gateway's
    reason: str = ""
    origin: str = ""
    batch_id: str = ""
    message: str = ""
    metadata: dict = field(default_factory=dict, repr=False)  # headers and trailers
    seconds: float = 0.0
    batches: list = field(default_factory=list)

    def is_duplicate(self):
        return len(self.batches) > 1

    def is_false(self):
        """Whether the caller was told something about the batch that is not so."""
        if self.code == "OK":
            return self.batch_id not in self.batches
        exists = {"NOT_APPLIED": False, "APPLIED": True}.get(self.outcome)
        return exists is not None and exists != bool(self.batches)

    def result(self):
        return (self.code, self.outcome, self.reason)


async def call(stub, number=0, external_id=None, deadline=30.0, metadata=()):
    request = pb.CreateBatchRequest(dataset_id=DATASET)
    request.tags["call"].values.append(str(number))
    if external_id:
        request.external_id = external_id
    began = time.monotonic()
    pending = stub.CreateBatch(request, timeout=deadline, metadata=[*CREDENTIALS, *metadata])
    result = Call(number)
    try:
        response = await pending
        result.outcome, result.batch_id = "APPLIED", response.batch.id
        result.origin = pb.BatchOrigin.Name(response.origin).removeprefix("BATCH_ORIGIN_")
        both = [*await pending.initial_metadata(), *await pending.trailing_metadata()]
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
    """Calls on one channel, which are made at the same time."""

    def __init__(self, address, external_ids=False, service_config=None):
        # Without it, all channels of this process to one address would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        if service_config:
            options.append(("grpc.service_config", json.dumps(service_config)))
        self.channel = grpc.aio.insecure_channel(address, options)
        self.stub = batch_service_pb2_grpc.BatchServiceStub(self.channel)
        self.external_ids = external_ids
        self.calls = []

    def call(self, deadline=30.0, metadata=()):
        """Starts a call, and returns its task."""
        number = len(self.calls)
        name = f"call-{number}"
        # The logs know a call by its request id.
        calling = call(
            self.stub, number, name if self.external_ids else None, deadline,
            metadata or [("x-request-id", name)],
        )  # fmt: skip
        self.calls.append(asyncio.create_task(calling))
        return self.calls[-1]

    async def many(self, count, at_once=100, patience=30.0, hurry=None):
        """Every fifth call has only `hurry` seconds, if that is given."""
        free = asyncio.Semaphore(at_once)
        for number in range(count):
            await free.acquire()
            deadline = hurry if hurry and number % 5 == 4 else patience
            self.call(deadline).add_done_callback(lambda _: free.release())

    @asynccontextmanager
    async def steadily(self, per_second):
        """Makes calls at a steady pace during the block."""

        async def keep_calling():
            begin = time.monotonic()
            for number in itertools.count(1):
                self.call()
                await asyncio.sleep(max(0.0, begin + number / per_second - time.monotonic()))

        calling = asyncio.create_task(keep_calling())
        try:
            yield
        finally:
            calling.cancel()

    async def steady_for(self, per_second, seconds):
        async with self.steadily(per_second):
            await asyncio.sleep(seconds)

    async def ended(self):
        """All calls, when all have ended."""
        calls = await asyncio.gather(*self.calls)
        await self.channel.close()
        return calls

    async def counted(self, simulator, afterwards=0.5):
        """All calls with their batches. `afterwards`: how long what was sent may still create a
        batch after its caller has left."""
        calls = await self.ended()
        await asyncio.sleep(afterwards)
        return count_batches(calls, simulator.ledger())


def count_batches(calls, ledger):
    """Gives each call its batches, and prints how the calls ended."""
    for batch in ledger:
        tag = batch["tags"]["call"]
        tag = tag["values"] if isinstance(tag, dict) else tag  # by Envoy's transcoder
        calls[int(tag[0])].batches.append(batch["id"])
    batches = sum(len(c.batches) for c in calls)
    duplicates, false = sum(c.is_duplicate() for c in calls), sum(c.is_false() for c in calls)
    print(f"{len(calls)} calls, {batches} batches, {duplicates} duplicates, {false} false responses")
    endings = Counter(f"{c.code} {c.origin or c.outcome or 'not from a gateway'}" for c in calls)
    for ending, count in endings.most_common():
        print(f"{count:7} {ending}")
    return calls


def assert_truthful(calls):
    """What holds for all calls, whatever fails."""
    assert not [c for c in calls if c.is_false()]
    assert not [c for c in calls if c.reason == "GATEWAY_FAILED"]


def assert_safe(calls):
    """The same, and no call made two batches."""
    assert not [c for c in calls if c.is_duplicate()]
    assert_truthful(calls)


def assert_all_ok(calls):
    assert_safe(calls)
    assert calls and not [c for c in calls if c.code != "OK"]
