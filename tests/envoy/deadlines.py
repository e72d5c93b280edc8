"""Deadlines through Envoy: the gateway's own answer arrives first, and no one works on for long."""

import asyncio

from calls import Load, check_calls, table
from checks import check, show
from envoy_config import ISTIO, NO_RETRY
from recorder import Recorder

# Envoy's route gives up after a second, whatever the caller's deadline says. It tells the gateway
# so in x-envoy-expected-rq-timeout-ms.
ONE_SECOND = {"timeout": "1s", "max_stream_duration": None}


def told_by_the_gateway(calls):
    """After sending the outcome is open; Envoy's own answer would have none."""
    said = ("DEADLINE_EXCEEDED", "UNKNOWN", "DEADLINE_AFTER_SENDING")
    found = [c for c in calls if (c.code, c.outcome, c.reason) != said]
    check("the gateway's own status arrives", calls and not found, *found)


async def route_timeout(stand):
    stand.simulate("--latency", "3s")
    stand.serve("--request-timeout", "10s")
    stand.envoy(ISTIO, route=ONE_SECOND)
    load = Load(stand.address)
    for _ in range(40):
        load.call(deadline=10.0)
    calls = await load.ended(stand, afterwards=2.5)
    table(stand, calls)
    check_calls(calls)
    told_by_the_gateway(calls)
    found = [c for c in calls if not 0.8 < c.seconds < 1.3]
    check("after a second", not found, *found)
    timeouts = stand.stat("upstream_rq_timeout")
    check("Envoy's own timeout is not reached", timeouts == 0, timeouts)
    found = [c for c in calls if len(c.batches) != 1]
    check("each call made one batch in the end", not found, *found)


async def grpc_timeout(stand):
    """The caller's deadline; nothing of it may come back as CANCELLED, which Istio retries."""
    stand.simulate("--latency", "1500ms")
    stand.serve()
    stand.serve()
    stand.envoy(ISTIO)
    load = Load(stand.address)
    for _ in range(40):
        load.call(deadline=0.5)
    calls = await load.ended(stand, afterwards=1.5)
    retries = table(stand, calls)
    check_calls(calls)
    told_by_the_gateway(calls)
    found = [c for c in calls if len(c.batches) != 1]
    check("each call made one batch", not found, *found)
    check("Envoy retried nothing", retries == 0, retries)


async def total_time(stand):
    """Each try by Envoy brings the caller's whole deadline anew. The API takes 400 ms to refuse."""
    patience = 1.5

    def refuse(_):
        waiting.wait(0.4)
        return 503, {"type": "/", "status": 503, "title": "Unavailable", "detail": "later"}

    import threading

    waiting = threading.Event()
    recorder = Recorder(stand, refuse)
    stand.upstream = recorder.upstream
    stand.serve()
    stand.serve()
    # The caller's deadline ends the call at Envoy too.
    stand.envoy(ISTIO)
    for _ in range(5):
        load = Load(stand.address)
        before = len(recorder.requests)
        call = await load.call(deadline=patience)
        await asyncio.sleep(1)
        requests = recorder.requests[before:]
        print(call.code, call.outcome, call.reason, f"{call.seconds:.2f}", len(requests))


SCENARIOS = [
    ("route-timeout", "Envoy's route gives up after a second", route_timeout, ()),
    ("grpc-timeout", "the caller gives up after half a second", grpc_timeout, ()),
    ("total-time", "each try takes its time", total_time, ()),
]
