"""Many calls through one Envoy: more than the gateway admits, more than a connection takes, on
connections that end all the time."""

import asyncio
import threading

import pytest
from recorder import Recorder, batch

import harness.envoy
from harness.envoy import EVERYTHING, ISTIO, NO_RETRY
from harness.load import Load, assert_all_ok, assert_safe

OVERLOADED = ("UNAVAILABLE", "NOT_APPLIED", "GATEWAY_OVERLOADED")


async def test_no_call_is_lost_when_connections_end(programs):
    simulator = programs.simulator("--latency", "50ms")
    gateway = programs.gateway(simulator, "--max-connection-age", "1s")
    envoy = programs.envoy([gateway], NO_RETRY)
    load = Load(envoy.address)
    await load.steady_for(500, 8)
    calls = await load.counted(simulator)
    print(*envoy.stats("upstream_cx_total"), "connections, one after the other")
    assert_all_ok(calls)
    assert envoy.stat("upstream_cx_close_notify") >= 5, "connections end by GOAWAY"
    assert envoy.stat("upstream_rq_total") == len(calls), "each call is sent once"


@pytest.mark.parametrize("policy", [NO_RETRY, ISTIO], ids=["no-retries", "istio-defaults"])
async def test_overload_is_refused_at_once(programs, policy):
    """Two gateways that make one call at once each, of 100 ms."""
    capacity, seconds = 20, 5
    simulator = programs.simulator("--latency", "100ms")
    gateways = programs.gateways(2, simulator, "--max-in-flight", 1)
    envoy = programs.envoy(gateways, policy)
    load = Load(envoy.address)
    await load.steady_for(10 * capacity, seconds)
    calls = await load.counted(simulator)
    tries = envoy.stat("upstream_rq_total")
    refused = [c for c in calls if c.code != "OK"]
    p99 = sorted(c.seconds for c in refused)[int(0.99 * (len(refused) - 1))]
    print(f"{tries / len(calls):.2f} tries per call; refused after {p99 * 1000:.0f} ms (p99)")
    assert_safe(calls)
    goodput = (len(calls) - len(refused)) / seconds
    assert goodput >= 0.8 * capacity
    assert {c.result() for c in refused} == {OVERLOADED}
    assert p99 < 1, "waiting for its turn would take a call 45 s"
    assert sum(gateway.calls() for gateway in gateways) == tries
    assert tries <= (1 + policy["num_retries"]) * len(calls)


@pytest.mark.parametrize("policy", [ISTIO, EVERYTHING], ids=["istio-defaults", "everything"])
async def test_a_rate_limit_of_the_api_is_not_retried(programs, policy):
    """Istio's default retries leave it alone; a mesh that is told to retry resource-exhausted
    learns by x-envoy-ratelimited that it had better not."""
    simulator = programs.simulator(faults=["status-429"], share=1)
    envoy = programs.envoy(programs.gateways(2, simulator), policy)
    load = Load(envoy.address)
    await load.many(100)
    calls = await load.counted(simulator, afterwards=0)
    limited = ("RESOURCE_EXHAUSTED", "NOT_APPLIED", "API_RATE_LIMITED")
    assert {c.result() for c in calls} == {limited}
    assert envoy.stat("upstream_rq_total") == len(calls)


async def test_5000_calls_at_once_get_enough_connections(programs):
    """Over one Envoy that knows the gateway's limit of streams. The gateway refuses only what is
    past its limit of creates."""
    total, limit, streams = 5000, 4000, 256
    simulator = programs.simulator("--latency", "8s")
    gateway = programs.gateway(simulator, "--max-in-flight", limit, request_timeout=20.0)
    envoy = programs.envoy([gateway], NO_RETRY, cluster=harness.envoy.streams(streams))
    load = Load(envoy.address)
    for _ in range(total):
        load.call(deadline=60.0)
    most = 0

    async def watch():
        nonlocal most
        while True:
            most = max(most, await asyncio.to_thread(envoy.stat, "upstream_rq_active"))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    calls = await load.counted(simulator, afterwards=0)
    watching.cancel()
    connections, resets = envoy.stats("upstream_cx_total", "http2.rx_reset")
    print(f"at most {most} calls in flight, on {connections} connections")
    assert_safe(calls)
    refused = [c for c in calls if c.code != "OK"]
    assert min(total - len(refused), most) >= limit
    assert {c.result() for c in refused} == {OVERLOADED}
    assert resets == 0
    assert connections * streams >= most
    assert gateway.calls() == total


async def test_a_burst_past_the_stream_limit_cuts_no_connection(programs):
    """2,500 calls at once over an Envoy that does not know the limit, and sends some 1,000 on its
    first connection before it is told. The gateway refuses those past the limit, which Envoy may
    repeat; cutting the connection would lose the calls that it took."""
    simulator = programs.simulator("--latency", "3s")
    gateway = programs.gateway(simulator, "--max-in-flight", 4000, request_timeout=20.0)
    envoy = programs.envoy([gateway], EVERYTHING)
    load = Load(envoy.address)
    for _ in range(2500):
        load.call(deadline=60.0)
    calls = await load.counted(simulator)
    assert_safe(calls)
    assert envoy.stat("http2.rx_reset") > 0, "more streams came than there may be"
    assert envoy.stat("upstream_cx_destroy_remote_with_active_rq") == 0
    assert not [c for c in calls if c.code != "OK" and c.batches]


async def test_a_drain_needs_no_new_connection_to_the_api(programs):
    """A sidecar that ends first refuses new connections."""
    release = threading.Event()

    def when_released(request):
        release.wait(10)
        return batch(request)

    recorder = Recorder(programs, when_released)
    gateway = programs.gateway(recorder)
    envoy = programs.envoy([gateway], NO_RETRY)
    load = Load(envoy.address)
    for _ in range(20):
        load.call()
    while len(recorder.creates()) < 20:
        await asyncio.sleep(0.02)
    gateway.terminate()
    recorder.refuse_connections()
    await asyncio.sleep(0.3)
    release.set()
    assert {c.code for c in await load.ended()} == {"OK"}
    assert len(recorder.creates()) == 20
    assert await asyncio.to_thread(gateway.end) == 0
