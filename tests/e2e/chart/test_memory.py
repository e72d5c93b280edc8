"""The gateway stays below the chart's memory limit when all is in use that the chart allows: every
connection open, and every create in flight as large as a message may be."""

import asyncio
import re
import resource
import socket

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from harness.chart import rendering
from harness.load import CREDENTIALS, DATASET

# A message may have 256 KiB.
LARGE = 250_000
# What begins a connection of HTTP/2: the preface, and empty SETTINGS.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
CHANNELS = 10


async def test_the_gateway_stays_below_the_memory_limit_with_all_in_use(programs):
    defaults = rendering("defaults")
    limit = re.fullmatch(r"(\d+)Mi", defaults.container["resources"]["limits"]["memory"])
    creates = int(defaults.environment["AEP_GATEWAY_MAX_IN_FLIGHT"]["value"])
    connections = int(defaults.environment["AEP_GATEWAY_MAX_CONNECTIONS"]["value"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most >= 8192, "a process may open too few files (ulimit -Hn)"
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    gateway = programs.gateway(
        programs.simulator("--latency", "15s"), "--max-in-flight", creates,
        "--max-connections", connections, request_timeout=60,
    )  # fmt: skip
    print(f"{megabytes(gateway)} MB at start")
    idle = [connect(gateway.address) for _ in range(connections - CHANNELS)]
    print(f"{megabytes(gateway)} MB with {connections} connections")
    in_flight, failed = await create_many(gateway, creates)
    print(f"{megabytes(gateway)} MB at most with {creates} creates of {LARGE} bytes in flight")
    for connection in idle:
        connection.close()
    assert not failed
    assert in_flight == creates
    assert megabytes(gateway) * 1e6 <= int(limit[1]) * 2**20


def connect(address):
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(HELLO)
    assert connection.recv(9), "the gateway's own SETTINGS: it has taken the connection"
    return connection


def megabytes(gateway):
    """The most memory that a process has had."""
    with open(f"/proc/{gateway.process.pid}/status") as status:
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024 / 1e6)


async def create_many(gateway, count):
    """Large creates, at the same time: how many were in flight at most, and those that failed."""
    request = pb.CreateBatchRequest(dataset_id=DATASET)
    request.tags["large"].values.append("x" * LARGE)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(gateway.address, options) for _ in range(CHANNELS)]
    stubs = [batch_service_pb2_grpc.BatchServiceStub(channel) for channel in channels]

    async def create(number):
        await stubs[number % CHANNELS].CreateBatch(request, timeout=90, metadata=CREDENTIALS)

    creates = [asyncio.create_task(create(number)) for number in range(count)]
    most = 0
    while not all(one.done() for one in creates):
        await asyncio.sleep(0.5)
        most = max(most, int(await asyncio.to_thread(gateway.metric, "aep_gateway_executions_in_flight")))
    ended = await asyncio.gather(*creates, return_exceptions=True)
    for channel in channels:
        await channel.close()
    return most, [end for end in ended if isinstance(end, Exception)]
