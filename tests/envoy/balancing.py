"""Envoy as the load balancer of two gateways: who gets calls, who is left out, who returns."""

import asyncio
import time

from calls import Load, check_calls, check_no_failure, table
from checks import check, show
from envoy_config import ISTIO, NO_RETRY, health_checks

DRAIN_DELAY = 2.0
DRAINS = ("--drain-delay", f"{DRAIN_DELAY}s")
FAST_CHECKS = health_checks("0.25s")
# After the first check at the start there is none within a scenario.
ONE_CHECK = health_checks("300s")


async def until(condition, seconds):
    """How long it takes until something holds, or None if it takes too long."""
    begin = time.monotonic()
    while not await asyncio.to_thread(condition):
        if time.monotonic() - begin > seconds:
            return None
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


async def seconds_until_left_out(stand):
    """How long it takes until Envoy leaves one of two gateways out, and how many GOAWAYs it has
    got by then."""
    goaways = None

    def left_out():
        nonlocal goaways
        healthy, goaways = stand.stats("membership_healthy", "upstream_cx_close_notify")
        return healthy == 1

    return await until(left_out, DRAIN_DELAY), goaways


async def round_robin(stand):
    """Plaintext HTTP/2 with prior knowledge, two replicas."""
    stand.simulate()
    gateways = [stand.serve(), stand.serve()]
    stand.envoy(NO_RETRY)
    load = Load(stand.address)
    await load.many(1000)
    calls = await load.ended(stand, afterwards=0)
    table(stand, calls)
    check_no_failure(calls)
    shares = [gateway.calls() for gateway in gateways]
    check("both gateways got half of the calls", abs(shares[0] - shares[1]) <= 2, shares)
    check("together they got each call once", sum(shares) == 1000, shares)
    versions = stand.stats("upstream_cx_http1_total", "upstream_cx_http2_total")
    check("every connection was HTTP/2", versions[0] == 0 and versions[1] > 0, versions)


async def ejection(stand):
    """A gateway that drains is left out before its GOAWAY; in its place a new one gets calls. There
    are no calls while it is found out: their answers would tell as well."""
    stand.simulate("--latency", "50ms")
    stays, drains = stand.serve(*DRAINS), stand.serve(*DRAINS)
    stand.envoy(NO_RETRY, cluster=FAST_CHECKS)
    load = Load(stand.address)
    await load.many(100)
    await asyncio.gather(*load.calls)

    drains.drain()
    ejected, goaways = await seconds_until_left_out(stand)
    check("Envoy leaves out a gateway that drains", ejected is not None)
    show(f"{ejected or 0:.2f}", "seconds after SIGTERM")
    check("before its first GOAWAY", goaways == 0, goaways)
    check("/readyz is 503 then", drains.status("/readyz") == 503)
    check("/livez is 200 then", drains.status("/livez") == 200)
    done = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(load.steady(100, done))
    before = [drains.calls(), stays.calls()]
    await asyncio.sleep(0.5)
    after = [drains.calls(), stays.calls()]
    check("it gets no more calls", after[0] == before[0], before, after)
    check("the other one gets them", after[1] - before[1] > 20, before, after)
    code = await asyncio.to_thread(drains.end)
    check("it ends with 0", code == 0, code)
    goaways = stand.stat("upstream_cx_close_notify")
    check("no connection with calls ever got a GOAWAY", goaways == 0, goaways)

    returned = stand.serve_again(drains, *DRAINS)
    took = await until(lambda: stand.stat("membership_healthy") == 2, 5)
    check("Envoy takes the new one", took is not None)
    await asyncio.sleep(1)
    done.set_result(None)
    await loading
    check("the new one gets calls", returned.calls() > 30, returned.calls())
    calls = await load.ended(stand)
    table(stand, calls)
    check_no_failure(calls)


async def ejection_by_header(stand):
    """x-envoy-immediate-health-check-fail: Envoy hears it with the next answer, not at its next
    health check. It also hands the header on, so the route removes it: an Envoy further out would
    believe that this one fails."""
    header = "x-envoy-immediate-health-check-fail"
    stand.simulate("--latency", "50ms")
    stays, drains = stand.serve(*DRAINS), stand.serve(*DRAINS)
    stand.envoy(NO_RETRY, cluster=ONE_CHECK, host={"response_headers_to_remove": [header]})
    load = Load(stand.address)
    done = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(load.steady(100, done))
    await asyncio.sleep(1)

    drains.drain()
    ejected, goaways = await seconds_until_left_out(stand)
    check("Envoy leaves out a gateway that drains, without a health check", ejected is not None)
    show(f"{ejected or 0:.2f}", "seconds after SIGTERM")
    check("before its first GOAWAY", goaways == 0, goaways)
    code = await asyncio.to_thread(drains.end)
    check("it ends with 0", code == 0, code)
    done.set_result(None)
    await loading
    calls = await load.ended(stand)
    table(stand, calls)
    check_no_failure(calls)
    leaked = [c for c in calls if header in c.metadata]
    check("the header goes no further", not leaked, *leaked)
    check("the other one got calls", stays.calls() > 100, stays.calls())


async def rolling_restart(stand, flags, cluster):
    """Each gateway is restarted in turn under load. Without a drain delay and health checks,
    Envoy's retries must do: GOAWAY and a closed port are all that it notices."""
    stand.simulate("--latency", "50ms")
    gateways = [stand.serve(*flags), stand.serve(*flags)]
    stand.envoy(ISTIO, cluster=cluster)
    codes = []

    def restart():
        for gateway in gateways:
            time.sleep(1)
            codes.append(gateway.end())
            stand.serve_again(gateway, *flags)
            time.sleep(1)
            if cluster:
                stand.wait_for_health()
        time.sleep(1)

    load = Load(stand.address)
    await load.steady(100, asyncio.ensure_future(asyncio.to_thread(restart)))
    shares = [gateway.calls() for gateway in stand.gateways]
    calls = await load.ended(stand)
    table(stand, calls)
    check_no_failure(calls)
    check("both gateways ended with 0", codes == [0, 0], codes)
    check("both new ones got calls", min(shares) > 30, shares)


async def upstream_down(stand):
    """No gateway leaves because the API is down: all would leave at once."""
    api = stand.simulate()
    gateways = [stand.serve(), stand.serve()]
    stand.envoy(ISTIO, cluster=FAST_CHECKS)
    api.kill()
    api.wait()
    load = Load(stand.address)
    await load.steady_for(20, 3)
    pages = [gateway.status(page) for gateway in gateways for page in ("/livez", "/readyz")]
    check("/livez and /readyz stay 200", pages == [200] * 4, pages)
    healthy, failures = stand.stats("membership_healthy", "health_check.failure")
    check("Envoy's health checks do not fail", (healthy, failures) == (2, 0), healthy, failures)
    calls = await asyncio.gather(*load.calls)
    honest = [c for c in calls if (c.code, c.outcome) == ("UNAVAILABLE", "NOT_APPLIED")]
    found = [c for c in calls if c not in honest]
    check("each call is told UNAVAILABLE and NOT_APPLIED", not found, *found)
    counted = [
        gateway.metric("aep_gateway_creates_total", reason="UPSTREAM_CONNECT_FAILED")
        for gateway in gateways
    ]
    check("a metric of each gateway shows it", min(counted) > 0, counted)

    stand.simulate(listen=stand.upstream["listen"])
    load = Load(stand.address)
    await load.many(20)
    calls = await load.ended(stand, afterwards=0)
    table(stand, calls)
    check_no_failure(calls)


async def outlier_detection(stand):
    """Envoy counts our codes as HTTP statuses, but only those that stand in headers: UNAVAILABLE
    is a 503. So a dead API makes healthy gateways leave for a while; an unknown outcome, told in
    trailers, does not."""
    api = stand.simulate(faults=["lost-502"], share=1)
    gateways = [stand.serve(), stand.serve()]
    outliers = {
        "consecutive_5xx": 5,
        "interval": "0.1s",
        "base_ejection_time": "1s",
        "max_ejection_time": "1s",
        "max_ejection_percent": 100,
    }
    stand.envoy(NO_RETRY, cluster={"outlier_detection": outliers})
    ejections = "outlier_detection.ejections_enforced_consecutive_5xx"

    load = Load(stand.address)
    await load.many(100)
    calls = await load.ended(stand, afterwards=0)
    table(stand, calls)
    check_calls(calls)
    check("100 unknown outcomes", {c.outcome for c in calls} == {"UNKNOWN"})
    check("eject no gateway", stand.stat(ejections) == 0)

    api.kill()
    api.wait()
    load = Load(stand.address)
    await load.many(100)
    calls = await asyncio.gather(*load.calls)
    found = [c for c in calls if (c.code, c.outcome) != ("UNAVAILABLE", "NOT_APPLIED")]
    check("100 times UNAVAILABLE", not found, *found)
    ejected = stand.stat(ejections)
    show(ejected, "ejections")
    check("eject both gateways", ejected >= 2, ejected)

    stand.simulate(listen=stand.upstream["listen"])
    active = "outlier_detection.ejections_active"
    check("both are let in again", await until(lambda: stand.stat(active) == 0, 10) is not None)
    before = [gateway.calls() for gateway in gateways]
    load = Load(stand.address)
    await load.many(100)
    calls = await load.ended(stand, afterwards=0)
    table(stand, calls)
    check_no_failure(calls)
    shares = [gateway.calls() - then for gateway, then in zip(gateways, before)]
    check("when the API is back, both return", shares == [50, 50], shares)


SCENARIOS = [
    ("round-robin", "two replicas over plaintext HTTP/2", round_robin, ()),
    ("ejection", "a gateway that drains, by health checks", ejection, ()),
    ("ejection-by-header", "a gateway that drains, by a header", ejection_by_header, ()),
    ("rolling-restart", "two replicas, one after the other", rolling_restart, (DRAINS, FAST_CHECKS)),
    ("restart-at-once", "the same without drain delay and health checks", rolling_restart, ((), ())),
    ("upstream-down", "the API is down", upstream_down, ()),
    ("outlier-detection", "five failures in a row eject a gateway", outlier_detection, ()),
]
