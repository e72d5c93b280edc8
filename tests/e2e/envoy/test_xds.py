"""Proxyless gRPC: no Envoy, but clients that learn gateways and retries from a control plane (xDS)
and balance by themselves."""

import asyncio
import base64
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from aep.ingestion.v1 import batch_service_pb2 as pb

from harness.envoy import FIVE
from harness.faults import AFTERWARDS, HURRY, REFUSALS, REQUEST_TIMEOUT
from harness.load import Load, assert_safe
from harness.process import RUN, go_build

TARGET = "xds:///gateways"
# Until a client that has one connection has the other ones too.
ALL_CONNECTED = 0.5


@pytest.fixture(scope="module")
def go_programs():
    """The folder with the programs `client` and `control`."""
    return go_build(Path(__file__).parent / "xds", RUN / "bin")


@asynccontextmanager
async def grpcio(external_ids, _):
    load = Load(TARGET, external_ids)
    await asyncio.wait_for(load.channel.channel_ready(), 10)
    await asyncio.sleep(ALL_CONNECTED)
    yield load


@asynccontextmanager
async def grpc_go(external_ids, go_programs):
    process = await asyncio.create_subprocess_exec(
        go_programs / "client", TARGET, stdin=asyncio.subprocess.PIPE,
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
        return self.response().__await__()

    async def response(self):
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


def start(programs, go_programs, retry_on, faults, share):
    """Two gateways, and the control plane that tells clients of them: (simulator, gateways)."""
    simulator = programs.simulator("--catalog-lag", "200ms", faults=faults, share=share)
    gateways = programs.gateways(2, simulator, request_timeout=REQUEST_TIMEOUT)
    addresses = [gateway.address for gateway in gateways]
    control = programs.program("control", go_programs / "control", "-retry-on", retry_on, *addresses)
    server = {
        "server_uri": control.first_line()["listen"], "channel_creds": [{"type": "insecure"}],
    }  # fmt: skip
    # Both libraries read it when they need it for the first time in a process, and again when no
    # channel of the kind is left.
    bootstrap = {"xds_servers": [server], "node": {"id": "client"}}
    os.environ["GRPC_XDS_BOOTSTRAP_CONFIG"] = json.dumps(bootstrap)
    return simulator, gateways


clients = pytest.mark.parametrize("client", [grpcio, grpc_go])


@clients
@pytest.mark.parametrize(
    "retry_on, external_ids",
    [pytest.param(FIVE, False, id="five-codes"), pytest.param("unavailable", True, id="external-ids")],
)
async def test_random_faults_and_xds_clients_make_no_duplicate(
    programs, go_programs, client, retry_on, external_ids
):
    simulator, gateways = start(programs, go_programs, retry_on, REFUSALS, 0.4)
    async with client(external_ids, go_programs) as load:
        await load.many(300, hurry=HURRY)
        calls = await load.counted(simulator, AFTERWARDS)
    assert_safe(calls)
    handled = sum(gateway.calls() for gateway in gateways)
    print(handled - len(calls), "retries by the client")
    if external_ids:  # else what was sent has its headers, and cannot be retried
        assert handled > len(calls)


@clients
@pytest.mark.parametrize("external_ids", [False, True], ids=["no-ids", "external-ids"])
async def test_a_killed_gateway_and_xds_clients_make_no_duplicate(
    programs, go_programs, client, external_ids
):
    """Every create hangs after it was made. Then the gateway with half of them is killed."""
    simulator, gateways = start(
        programs, go_programs, "unavailable", ["silence-after-create"], 1
    )
    async with client(external_ids, go_programs) as load:
        for _ in range(40):
            load.call()
        while len(simulator.ledger()) < 30:
            await asyncio.sleep(0.001)
        gateways[0].kill()
        calls = await load.counted(simulator, AFTERWARDS)
    misled = [c for c in calls if c.code == "UNAVAILABLE" and c.batches]
    print(len(misled), "told UNAVAILABLE by the library, though their batch exists")
    assert_safe(calls)
    assert [c for c in calls if not c.outcome or c.origin == "FOUND"], "the kill met calls"
