"""A gateway for each thing that can go wrong, and one where nothing does; all at the same time."""

import asyncio
import contextlib
import secrets
import socket
from types import SimpleNamespace

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from harness import certificates
from harness.load import CREDENTIALS, DATASET
from harness.process import HarnessError, free_port, wait_until
from prometheus import Callers

SECONDS = 30


def start(programs):
    """The gateways by name, each with a simulated API of its own."""

    def gateway(*flags, simulate=(), inject=(), **faults):
        simulator = programs.simulator(*simulate, **faults)
        simulator.inject(*inject)
        return programs.gateway(simulator, *flags, request_timeout=20)

    certificate, key = programs.folder / "tls.pem", programs.folder / "tls.key"
    certificates.self_signed(certificate, key, -3600, 90 * 86400)
    nowhere = f"http://127.0.0.1:{free_port()}"
    nobody = SimpleNamespace(upstream_url=f"{nowhere}/import", catalog_url=f"{nowhere}/catalog")
    return {
        "healthy": gateway(),
        "lost": gateway(faults=["reset-after-create"], share=0.5),
        "limited": gateway(faults=["status-429"], share=0.5),
        "refused": gateway(),
        "down": programs.gateway(nobody, request_timeout=20),
        "slow": gateway(simulate=["--latency", "11s"]),
        "hurried": gateway(simulate=["--latency", "1s"]),
        "lookups": gateway(inject=["lookup-500"] * 1000),
        "full": gateway("--max-in-flight", 10, simulate=["--latency", "2s"]),
        "crowded": gateway("--max-connections", 10),
        "tls": gateway("--tls-cert-file", certificate, "--tls-key-file", key),
        "stopped": gateway(),
        "restarting": gateway(),
    }


async def misbehave(programs, gateways, prometheus):
    """All callers and all faults at the same time, for SECONDS. Returns the alerts at its end, while
    two gateways are still full: those whose expression is true, whether or not for long enough."""

    async def call(name, per_second, seconds=SECONDS, patience=5.0, token="good", api_key="good", **how):
        callers = Callers(gateways[name], token, api_key)
        await callers.steady(per_second, seconds, **how)
        await callers.end(patience)

    async def crowd():
        callers = [Callers(gateways["crowded"]) for _ in range(10)]
        for one in callers:
            await one.channel.channel_ready()
        while True:
            socket.create_connection(address(gateways["crowded"])).close()
            await asyncio.sleep(1)

    async def renew():
        certificate, key = programs.folder / "tls.pem", programs.folder / "tls.key"
        for _ in range(8):
            await secure_call(gateways["tls"], certificate.read_bytes())
            with socket.create_connection(address(gateways["tls"])) as plaintext:
                plaintext.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            await asyncio.sleep(0.5)
        certificates.self_signed(certificate, key, -3600, 100)
        await asyncio.to_thread(wait_for_reload, gateways["tls"], "ok")
        await secure_call(gateways["tls"], certificate.read_bytes())
        certificate.write_text("no certificate")
        await asyncio.to_thread(wait_for_reload, gateways["tls"], "failed")

    async def stop():
        await call("stopped", 5, 10)
        gateways["stopped"].close()

    async def restart():
        for _ in range(3):
            await asyncio.sleep(4)
            gateways["restarting"].close()
            await asyncio.to_thread(gateways["restarting"].start)

    lasting = [
        asyncio.create_task(crowd()), asyncio.create_task(call("full", 15, 10 * SECONDS))
    ]  # fmt: skip
    await asyncio.gather(
        call("healthy", 15, external_ids=0.5, mistakes=0.1),
        found(gateways["healthy"]),
        call("lost", 6, external_ids=0.5),
        call("limited", 6),
        call("refused", 3, token="expired"),
        call("refused", 3, api_key="invalid"),
        call("down", 6),
        call("slow", 2, SECONDS - 12, patience=15.0),
        call("hurried", 6, deadline=0.3),
        call("lookups", 6, external_ids=1.0),
        renew(), stop(), restart(),
    )  # fmt: skip
    await asyncio.sleep(3)  # the last scrapes and evaluations
    alerts = await asyncio.to_thread(prometheus.api, "alerts")
    for task in lasting:
        task.cancel()
    await asyncio.wait(lasting)
    return alerts["alerts"]


async def found(gateway):
    """The same external id again: the batch is found. With a trace, for the exemplars."""
    callers = Callers(gateway)
    for number in range(20):
        trace = ("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")
        message = pb.CreateBatchRequest(dataset_id=DATASET, external_id=f"same-{number // 2}")
        await callers.call(message, [*callers.metadata, trace])
        await asyncio.sleep(0.5)
    await callers.end()


async def secure_call(gateway, certificate):
    credentials = grpc.ssl_channel_credentials(certificate)
    async with grpc.aio.secure_channel(gateway.address, credentials) as channel:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        request = pb.CreateBatchRequest(dataset_id=DATASET)
        await stub.CreateBatch(request, metadata=CREDENTIALS, timeout=10)


def wait_for_reload(gateway, result):
    with contextlib.suppress(HarnessError):  # else the alerts miss it
        wait_until("a reload", lambda: gateway.metric("aep_gateway_tls_reloads_total", result=result), 60)


def address(gateway):
    host, port = gateway.address.split(":")
    return host, int(port)
