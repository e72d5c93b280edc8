"""Envoy as the load balancer of two gateways: which one gets calls, is left out, and returns."""

import asyncio
import time

import pytest

from harness.envoy import ISTIO, NO_RETRY, health_checks
from harness.load import Load, assert_all_ok, assert_safe
from harness.process import wait_until

DRAIN_DELAY = 2.0
DRAINS = ("--drain-delay", f"{DRAIN_DELAY}s")
FAST_CHECKS = health_checks("0.25s")
# After the first check at the start there is none within a test.
ONE_CHECK = health_checks("300s")


def left_out(envoy):
    """Waits until Envoy leaves one of two gateways out; returns how many GOAWAYs it has by then."""

    def goaways():
        healthy, goaways = envoy.stats("membership_healthy", "upstream_cx_close_notify")
        return healthy == 1 and [goaways]

    began = time.monotonic()
    (goaways,) = wait_until("a draining gateway is left out", goaways, DRAIN_DELAY)
    print(f"{time.monotonic() - began:.2f} seconds after SIGTERM")
    return goaways


async def test_two_replicas_share_the_calls(programs):
    simulator = programs.simulator()
    gateways = programs.gateways(2, simulator)
    envoy = programs.envoy(gateways, NO_RETRY)
    load = Load(envoy.address)
    await load.many(1000)
    assert_all_ok(await load.counted(simulator, afterwards=0))
    shares = [gateway.calls() for gateway in gateways]
    assert abs(shares[0] - shares[1]) <= 2
    assert sum(shares) == 1000
    http1, http2 = envoy.stats("upstream_cx_http1_total", "upstream_cx_http2_total")
    assert http1 == 0 and http2 > 0


async def test_a_draining_gateway_is_left_out_by_health_checks(programs):
    """There are no calls while it is found out: their responses would tell as well."""
    simulator = programs.simulator("--latency", "50ms")
    stays, drains = gateways = programs.gateways(2, simulator, *DRAINS)
    envoy = programs.envoy(gateways, NO_RETRY, cluster=FAST_CHECKS)
    load = Load(envoy.address)
    await load.many(100)
    await asyncio.gather(*load.calls)

    drains.terminate()
    assert await asyncio.to_thread(left_out, envoy) == 0
    assert drains.status("/readyz") == 503
    assert drains.status("/livez") == 200
    async with load.steadily(100):
        before = [drains.calls(), stays.calls()]
        await asyncio.sleep(0.5)
        after = [drains.calls(), stays.calls()]
        assert after[0] == before[0]
        assert after[1] - before[1] > 20
        assert await asyncio.to_thread(drains.end) == 0
        goaways = envoy.stat("upstream_cx_close_notify")
        assert goaways == 0, "no connection with calls ever got a GOAWAY"

        drains.start()
        await asyncio.to_thread(envoy.wait_for_health, 2, 5)
        await asyncio.sleep(1)
    assert drains.calls() > 30
    assert_all_ok(await load.counted(simulator))


async def test_a_draining_gateway_is_left_out_by_a_header(programs):
    """Envoy learns it from the next response, not at its next health check. It also hands the
    header on, so the route removes it: an Envoy further out would believe that this one fails."""
    header = "x-envoy-immediate-health-check-fail"
    simulator = programs.simulator("--latency", "50ms")
    stays, drains = gateways = programs.gateways(2, simulator, *DRAINS)
    host = {"response_headers_to_remove": [header]}
    envoy = programs.envoy(gateways, NO_RETRY, cluster=ONE_CHECK, host=host)
    load = Load(envoy.address)
    async with load.steadily(100):
        await asyncio.sleep(1)
        drains.terminate()
        assert await asyncio.to_thread(left_out, envoy) == 0
        assert await asyncio.to_thread(drains.end) == 0
    calls = await load.counted(simulator)
    assert_all_ok(calls)
    assert not [c for c in calls if header in c.metadata]
    assert stays.calls() > 100


@pytest.mark.parametrize(
    "flags, cluster",
    [
        pytest.param(DRAINS, FAST_CHECKS, id="drain-delay-and-health-checks"),
        # Envoy's retries must do: GOAWAY and a closed port are all that it notices.
        pytest.param((), {}, id="neither"),
    ],
)
async def test_no_call_fails_in_a_rolling_restart(programs, flags, cluster):
    simulator = programs.simulator("--latency", "50ms")
    gateways = programs.gateways(2, simulator, *flags)
    envoy = programs.envoy(gateways, ISTIO, cluster=cluster)

    def restart():
        for gateway in gateways:
            time.sleep(1)
            assert gateway.end() == 0
            gateway.start()
            time.sleep(1)
            if cluster:
                envoy.wait_for_health(2)
        time.sleep(1)

    load = Load(envoy.address)
    async with load.steadily(100):
        await asyncio.to_thread(restart)
    assert min(gateway.calls() for gateway in gateways) > 30
    assert_all_ok(await load.counted(simulator))


async def test_no_gateway_leaves_because_the_api_is_down(programs):
    """All would leave at once."""
    simulator = programs.simulator()
    gateways = programs.gateways(2, simulator)
    envoy = programs.envoy(gateways, ISTIO, cluster=FAST_CHECKS)
    simulator.kill()
    load = Load(envoy.address)
    await load.steady_for(20, 3)
    pages = [gateway.status(page) for gateway in gateways for page in ("/livez", "/readyz")]
    assert pages == [200] * 4
    assert envoy.stats("membership_healthy", "health_check.failure") == [2, 0]
    calls = await load.ended()
    assert {(c.code, c.outcome) for c in calls} == {("UNAVAILABLE", "NOT_APPLIED")}
    for gateway in gateways:
        assert gateway.metric("aep_gateway_outcomes_total", reason="UPSTREAM_CONNECT_FAILED") > 0

    simulator.start()
    load = Load(envoy.address)
    await load.many(20)
    assert_all_ok(await load.counted(simulator, afterwards=0))


async def test_outlier_detection_ejects_for_unavailable_only(programs):
    """Envoy counts our codes as HTTP statuses, but only those that are in headers: UNAVAILABLE is a
    503. So a dead API makes healthy gateways leave for a while; an unknown outcome, which is told
    in trailers, does not."""
    simulator = programs.simulator(faults=["lost-502"], share=1)
    gateways = programs.gateways(2, simulator)
    outliers = {
        "consecutive_5xx": 5,
        "interval": "0.1s",
        "base_ejection_time": "1s",
        "max_ejection_time": "1s",
        "max_ejection_percent": 100,
    }
    # Without a window: Envoy would wait up to a second before it lets the second one in again.
    at_once = {"update_merge_window": "0s"}
    cluster = {"outlier_detection": outliers, "common_lb_config": at_once}
    envoy = programs.envoy(gateways, NO_RETRY, cluster=cluster)
    ejections = "outlier_detection.ejections_enforced_consecutive_5xx"

    load = Load(envoy.address)
    await load.many(100)
    calls = await load.counted(simulator, afterwards=0)
    assert_safe(calls)
    assert {c.outcome for c in calls} == {"UNKNOWN"}
    assert envoy.stat(ejections) == 0

    simulator.kill()
    load = Load(envoy.address)
    await load.many(100)
    assert {(c.code, c.outcome) for c in await load.ended()} == {("UNAVAILABLE", "NOT_APPLIED")}
    assert envoy.stat(ejections) >= 2

    simulator.start()
    active = "outlier_detection.ejections_active"
    back = lambda: envoy.stat(active) == 0
    await asyncio.to_thread(wait_until, "both gateways are let in again", back, 10)
    await asyncio.sleep(0.2)  # Envoy's worker thread learns it a little later
    before = [gateway.calls() for gateway in gateways]
    load = Load(envoy.address)
    await load.many(100)
    assert_all_ok(await load.counted(simulator, afterwards=0))
    assert [gateway.calls() - then for gateway, then in zip(gateways, before)] == [50, 50]
