"""Many calls through one Envoy: more than there is room for, more than a connection takes, on
connections that end all the time."""

import asyncio
import threading

import envoy_config
from calls import Load, check_calls, check_no_failure, table
from checks import check, show
from envoy_config import EVERYTHING, ISTIO, NO_RETRY
from recorder import Recorder, batch


def shed(call):
    said = (call.code, call.outcome, call.reason)
    return said == ("UNAVAILABLE", "NOT_APPLIED", "GATEWAY_OVERLOADED")


def slowest(calls, share=0.99):
    """What that share of the calls did not take longer than, in seconds."""
    return sorted(c.seconds for c in calls)[int(share * (len(calls) - 1))]


async def connection_age(stand):
    """Connections that are told to go away each second, under 500 calls per second."""
    stand.simulate("--latency", "50ms")
    stand.serve("--max-connection-age", "1s")
    stand.envoy(NO_RETRY)
    load = Load(stand.address)
    await load.steady_for(500, 8)
    calls = await load.ended(stand)
    table(stand, calls)
    connections, goaways = stand.stats("upstream_cx_total", "upstream_cx_close_notify")
    show(connections, "connections, one after the other")
    check_no_failure(calls)
    check("connections did end by GOAWAY", goaways >= 5, goaways)
    check("each call was sent once", stand.stat("upstream_rq_total") == len(calls))


async def overload(stand, policy):
    """Ten times the calls that two gateways can make: one at once each, of 100 ms."""
    capacity, seconds = 20, 5
    stand.simulate("--latency", "100ms")
    gateways = [stand.serve("--max-in-flight", 1), stand.serve("--max-in-flight", 1)]
    stand.envoy(policy)
    load = Load(stand.address)
    await load.steady_for(10 * capacity, seconds)
    calls = await load.ended(stand)
    table(stand, calls)
    tries = stand.stat("upstream_rq_total")
    show(f"{tries / len(calls):.2f}", "tries per call")
    refused = [c for c in calls if c.code != "OK"]
    show(f"{slowest(refused) * 1000:.0f}", "ms: p99 until a call was refused")
    check_calls(calls)
    goodput = (len(calls) - len(refused)) / seconds
    check("goodput is at least 80 % of the capacity", goodput >= 0.8 * capacity, goodput)
    found = [c for c in refused if not shed(c)]
    check("every other call is told that it was refused", refused and not found, *found)
    check("at once: waiting for one's turn would take 45 s", slowest(refused) < 1)
    seen = sum(gateway.calls() for gateway in gateways)
    check("the gateways saw as many tries as Envoy made", seen == tries, seen, tries)
    most = 1 + policy["num_retries"]
    check(f"no call was tried more than {most} times", tries <= most * len(calls), tries)


async def rate_limited(stand):
    """The API limits creates. Istio's default retries leave that alone; a mesh that is told to
    retry resource-exhausted hears by x-envoy-ratelimited that it had better not."""
    stand.simulate(faults=["status-429"], share=1)
    stand.serve()
    stand.serve()
    for policy in (ISTIO, EVERYTHING):
        stand.envoy(policy)
        load = Load(stand.address)
        await load.many(100)
        calls = await load.ended(stand, afterwards=0)
        table(stand, calls)
        said = ("RESOURCE_EXHAUSTED", "NOT_APPLIED", "API_RATE_LIMITED")
        found = [c for c in calls if (c.code, c.outcome, c.reason) != said]
        check("each call is told so", not found, *found)
        tries = stand.stat("upstream_rq_total")
        show(f"{tries / len(calls):.2f}", "tries per call")
        check("each call is tried once", tries == len(calls), tries)


async def many_in_flight(stand):
    """5,000 calls at once over one Envoy that knows the gateway's limit of streams: it opens as
    many connections as that asks for. The gateway refuses only what is past its limit of creates.
    """
    total, limit, streams = 5000, 4000, 256
    stand.simulate("--latency", "8s")
    gateway = stand.serve("--max-in-flight", limit, request_timeout=20.0)
    stand.envoy(NO_RETRY, cluster=envoy_config.streams(streams))
    load = Load(stand.address)
    for _ in range(total):
        load.call(deadline=60.0)
    most = 0

    async def watch():
        nonlocal most
        while True:
            # What Envoy has sent and not had answered.
            most = max(most, await asyncio.to_thread(stand.stat, "upstream_rq_active"))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    calls = await load.ended(stand, afterwards=0)
    watching.cancel()
    table(stand, calls)
    connections, resets = stand.stats("upstream_cx_total", "http2.rx_reset")
    show(most, "calls in flight at the most")
    show(connections, "connections")
    check_calls(calls)
    made = [c for c in calls if c.code == "OK"]
    check(f"{limit} creates were made at once", min(len(made), most) >= limit, len(made), most)
    refused = [c for c in calls if c.code != "OK"]
    found = [c for c in refused if not shed(c)]
    check("the others were refused, without a batch", refused and not found, *found)
    check("no stream was reset", resets == 0, resets)
    check("no connection had more streams than it may", connections * streams >= most, connections)
    check("the gateway saw each call once", gateway.calls() == total, gateway.calls())


async def burst(stand):
    """2,500 calls at once over an Envoy that does not know the limit, and sends some 1,000 on its
    first connection before it is told. The gateway refuses those past the limit, which Envoy may
    repeat; it must not cut the connection off, which would lose the calls that it took."""
    stand.simulate("--latency", "3s")
    stand.serve("--max-in-flight", 4000, request_timeout=20.0)
    stand.envoy(EVERYTHING)
    load = Load(stand.address)
    for _ in range(2500):
        load.call(deadline=60.0)
    calls = await load.ended(stand)
    table(stand, calls)
    refused, cut = stand.stats("http2.rx_reset", "upstream_cx_destroy_remote_with_active_rq")
    show(refused, "streams refused")
    check_calls(calls)
    check("more streams came than there may be", refused > 0, refused)
    check("no connection was cut off", cut == 0, cut)
    found = [c for c in calls if c.code != "OK" and c.batches]
    check("no failed call left a batch", not found, *found)


async def drain_without_connections(stand):
    """A sidecar that goes first refuses new connections: calls in flight must not need one."""
    release = threading.Event()

    def when_released(request):
        release.wait(10)
        return batch(request)

    recorder = Recorder(stand, when_released)
    stand.upstream = recorder.upstream
    gateway = stand.serve()
    stand.envoy(NO_RETRY)
    load = Load(stand.address)
    for _ in range(20):
        load.call()
    while len(recorder.creates()) < 20:
        await asyncio.sleep(0.02)
    gateway.drain()
    recorder.refuse_connections()
    await asyncio.sleep(0.3)
    release.set()
    calls = await asyncio.gather(*load.calls)
    found = [c for c in calls if c.code != "OK"]
    check("20 calls in flight at SIGTERM end well", not found, *found)
    check("each made one request", len(recorder.creates()) == 20, len(recorder.creates()))
    code = await asyncio.to_thread(gateway.end)
    check("the gateway ended with 0", code == 0, code)


SCENARIOS = [
    ("connection-age", "connections that last a second", connection_age, ()),
    ("overload", "ten times too many calls", overload, (NO_RETRY,)),
    ("overload-retried", "ten times too many calls, Istio's default retries", overload, (ISTIO,)),
    ("rate-limited", "the API allows no more creates", rate_limited, ()),
    ("many-in-flight", "5,000 calls at once", many_in_flight, ()),
    ("burst", "more streams than a connection may have", burst, ()),
    ("drain-without-connections", "no new connection to the API while draining", drain_without_connections, ()),
]
