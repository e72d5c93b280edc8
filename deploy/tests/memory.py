"""The gateway stays below the chart's memory limit when all is in use that the chart allows: every
connection open, and every create in flight as large as a message may be."""

import asyncio
import json
import re
import resource
import socket
import tempfile

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from envoy import CREDENTIALS, running
from gateway import http
from report import GATEWAY, check

# A message may have 256 KiB.
LARGE = 250_000
# What begins a connection of HTTP/2: the preface, and empty SETTINGS.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
CHANNELS = 10


def check_memory(rendered):
    defaults = next(r for r in rendered if r.name == "defaults")
    limit = re.fullmatch(r"(\d+)Mi", defaults.container["resources"]["limits"]["memory"])
    creates = int(defaults.environment["AEP_GATEWAY_MAX_IN_FLIGHT"]["value"])
    connections = int(defaults.environment["AEP_GATEWAY_MAX_CONNECTIONS"]["value"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    with tempfile.TemporaryFile() as log:
        port0 = ["--listen", "127.0.0.1:0"]
        with running(GATEWAY, "simulate", *port0, "--latency", "15s", log=log) as simulator:
            api = json.loads(simulator.stdout.readline())
            with running(
                GATEWAY, "serve", *port0, "--admin-listen", "127.0.0.1:0",
                "--upstream-url", api["upstream_url"], "--catalog-url", api["catalog_url"],
                "--max-in-flight", creates, "--max-connections", connections,
                "--request-timeout", "60s", log=log,
            ) as gateway:  # fmt: skip
                listens = json.loads(gateway.stdout.readline())
                before = megabytes(gateway.pid)
                idle = [connect(listens["listen"]) for _ in range(connections - CHANNELS)]
                held = megabytes(gateway.pid)
                in_flight, problems = asyncio.run(create_many(listens, creates))
                peak = megabytes(gateway.pid)
                for one in idle:
                    one.close()
    if in_flight != creates:
        problems.append(f"only {in_flight} creates were in flight at once")
    if peak * 1e6 > int(limit[1]) * 2**20:
        problems.append("too much")
    check(
        f"below {limit[1]} MiB with all in use: {before} MB at start, {held} MB with {connections}"
        f" connections, {peak} MB at most with {creates} creates of {LARGE // 1000} KB in flight",
        problems,
    )


def connect(address):
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(HELLO)
    # The gateway's own SETTINGS: it has taken the connection.
    assert connection.recv(9)
    return connection


def megabytes(pid):
    """The most memory that a process has had."""
    with open(f"/proc/{pid}/status") as status:
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) * 1024 / 1e6)


async def create_many(listens, count):
    """Large creates, at the same time: how many the gateway had in flight at most, and those that failed."""
    request = pb.CreateBatchRequest(dataset_id="5c8c3c555033b814b69f947f")
    request.tags["large"].values.append("x" * LARGE)
    channels = [
        grpc.aio.insecure_channel(listens["listen"], [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]
    stubs = [batch_service_pb2_grpc.BatchServiceStub(channel) for channel in channels]

    async def create(number):
        await stubs[number % CHANNELS].CreateBatch(request, timeout=90, metadata=CREDENTIALS)

    creates = [asyncio.create_task(create(number)) for number in range(count)]
    most = 0
    while not all(one.done() for one in creates):
        await asyncio.sleep(0.5)
        page = (await asyncio.to_thread(http, f"http://{listens['admin']}/metrics"))[1]
        now = re.search(r"^aep_gateway_creates_in_flight (\d+)", page, re.M)
        most = max(most, int(now[1]) if now else 0)
    ended = await asyncio.gather(*creates, return_exceptions=True)
    for channel in channels:
        await channel.close()
    return most, [end for end in ended if isinstance(end, Exception)]
