"""Proxyless gRPC: no Envoy, but clients that learn gateways and retries from a control plane (xDS)
and balance by themselves."""

import asyncio
import base64
import json
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb

from calls import Load, check_calls, table
from checks import check, show
from envoy_config import FIVE
from faults import AFTERWARDS, HURRY, REFUSALS, REQUEST_TIMEOUT

PROGRAMS = Path(__file__).parent / ".run" / "bin"
TARGET = "xds:///gateways"
# Until a client that has one connection has the other ones too.
ALL_CONNECTED = 0.5


@asynccontextmanager
async def grpcio(external_ids):
    load = Load(TARGET, external_ids)
    await asyncio.wait_for(load.channel.channel_ready(), 10)
    await asyncio.sleep(ALL_CONNECTED)
    yield load


@asynccontextmanager
async def grpc_go(external_ids):
    process = await asyncio.create_subprocess_exec(
        PROGRAMS / "client", TARGET, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, limit=2**20,
    )  # fmt: skip
    try:
        await asyncio.wait_for(process.stdout.readline(), 10)
        await asyncio.sleep(ALL_CONNECTED)
        load = Load(TARGET, external_ids)
        load.stub = GoStub(process)
        yield load
    finally:
        process.kill()
        await process.wait()


class GoStub:
    """The stub of `Load`, by the program `client`."""

    def __init__(self, process):
        self.process = process
        self.ends = []
        self.reading = asyncio.create_task(self.read())

    async def read(self):
        while line := await self.process.stdout.readline():
            end = json.loads(line)
            self.ends[end["ID"]].set_result(end)

    def CreateBatch(self, request, timeout, metadata):
        call = {
            "ID": len(self.ends),
            "Method": "/aep.ingestion.v1.BatchService/CreateBatch",
            "Request": base64.b64encode(request.SerializeToString()).decode(),
            "Seconds": timeout,
            "Metadata": metadata,
        }
        self.process.stdin.write(json.dumps(call).encode() + b"\n")
        self.ends.append(asyncio.get_running_loop().create_future())
        return GoCall(self.ends[-1])


class GoCall:
    """A call, as grpc.aio has it."""

    def __init__(self, end):
        self.end = end

    def __await__(self):
        return self.answer().__await__()

    async def answer(self):
        end = await self.end
        if end["Code"] != 0:
            code = next(code for code in grpc.StatusCode if code.value[0] == end["Code"])
            both = await self.initial_metadata(), await self.trailing_metadata()
            raise grpc.aio.AioRpcError(code, *both, details=end["Message"])
        return pb.CreateBatchResponse.FromString(base64.b64decode(end["Response"]))

    async def initial_metadata(self):
        return pairs((await self.end)["Headers"])

    async def trailing_metadata(self):
        return pairs((await self.end)["Trailers"])


def pairs(encoded):
    for name, value in encoded or ():
        name, value = base64.b64decode(name).decode(), base64.b64decode(value)
        yield name, value if name.endswith("-bin") else value.decode()


def start(stand, retry_on, faults, share):
    """Two gateways, and the control plane that tells clients of them."""
    stand.simulate("--catalog-lag", "200ms", faults=faults, share=share)
    addresses = [stand.serve(request_timeout=REQUEST_TIMEOUT).address for _ in range(2)]
    process = stand.start("control", PROGRAMS / "control", "-retry-on", retry_on, *addresses)
    listen = stand.first_line(process)["listen"]
    server = {"server_uri": listen, "channel_creds": [{"type": "insecure"}]}
    # Both libraries read it when they need it for the first time in a process, and again when no
    # channel of the kind is left.
    os.environ["GRPC_XDS_BOOTSTRAP_CONFIG"] = json.dumps(
        {"xds_servers": [server], "node": {"id": "client"}}
    )


async def random_faults(stand, client, retry_on, external_ids):
    start(stand, retry_on, REFUSALS, 0.4)
    async with client(external_ids) as load:
        await load.many(300, hurry=HURRY)
        calls = await load.ended(stand, AFTERWARDS)
    table(stand, calls)
    check_calls(calls)
    handled = sum(gateway.calls() for gateway in stand.gateways)
    show(handled - len(calls), "retries by the client")
    if external_ids:  # else what was sent has its headers, and cannot be retried
        check("the client did retry", handled > len(calls), handled)


async def killed(stand, client, external_ids):
    """Every create hangs after it was made. Then the gateway with half of them is killed."""
    start(stand, "unavailable", ["silence-after-create"], 1)
    async with client(external_ids) as load:
        for _ in range(40):
            load.call()
        while len(stand.ledger()) < 30:
            await asyncio.sleep(0.001)
        stand.gateways[0].end(signal.SIGKILL)
        calls = await load.ended(stand, AFTERWARDS)
    table(stand, calls)
    misled = [c for c in calls if c.code == "UNAVAILABLE" and c.batches]
    show(len(misled), "told UNAVAILABLE by the library, though their batch exists")
    check_calls(calls)
    met = [c for c in calls if not c.outcome or c.origin == "FOUND"]
    check("the kill met calls", met, *calls)


SCENARIOS = [
    ("xds-grpcio", "faults, grpcio retries all five codes", random_faults, (grpcio, FIVE, False)),
    ("xds-grpcio-ids", "external ids, grpcio retries UNAVAILABLE", random_faults, (grpcio, "unavailable", True)),
    ("xds-grpcio-killed", "a gateway killed, grpcio", killed, (grpcio, False)),
    ("xds-grpcio-killed-ids", "the same with external ids", killed, (grpcio, True)),
    ("xds-go", "faults, grpc-go retries all five codes", random_faults, (grpc_go, FIVE, False)),
    ("xds-go-ids", "external ids, grpc-go retries UNAVAILABLE", random_faults, (grpc_go, "unavailable", True)),
    ("xds-go-killed", "a gateway killed, grpc-go", killed, (grpc_go, False)),
    ("xds-go-killed-ids", "the same with external ids", killed, (grpc_go, True)),
]  # fmt: skip
