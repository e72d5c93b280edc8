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
# For a route: an Envoy further out would believe that this one fails.
FAIL_HEADER = "x-envoy-immediate-health-check-fail"


def left_out(envoy):
    """Waits until Envoy leaves one of two gateways out; returns how many GOAWAYs it has by then."""

    def goaways():
        healthy, goaways = envoy.stats("membership_healthy", "upstream_cx_close_notify")
        return healthy == 1 and [goaways]

    began = time.monotonic()
    (goaways,) = wait_until("a draining gateway is left out", goaways, DRAIN_DELAY)
    print(f"{time.monotonic() - began:.2f} seconds after SIGTERM")
    return goaways


async def test_two_replicas_share_the_calls_over_plaintext_http2(programs):
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


async def test_a_draining_gateway_is_left_out_by_health_checks_before_its_goaway(programs):
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
    done = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(load.steady(100, done))
    before = [drains.calls(), stays.calls()]
    await asyncio.sleep(0.5)
    after = [drains.calls(), stays.calls()]
    assert after[0] == before[0]
    assert after[1] - before[1] > 20
    assert await asyncio.to_thread(drains.end) == 0
    assert envoy.stat("upstream_cx_close_notify") == 0, "no connection with calls ever got a GOAWAY"

    drains.start()
    await asyncio.to_thread(envoy.wait_for_health, 2)
    await asyncio.sleep(1)
    done.set_result(None)
    await loading
    assert drains.calls() > 30
    assert_all_ok(await load.counted(simulator))
