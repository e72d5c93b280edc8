"""Deadlines through Envoy: the gateway's own answer arrives first, and no one works on for long."""

import asyncio
import socket

from calls import Load, check_calls, table
from checks import check, show
from envoy_config import EVERYTHING, ISTIO, timeout
from recorder import CATALOG, IMPORT


def told_by_the_gateway(calls):
    """After sending the outcome is open; Envoy's own answer would have none. On a busy machine that
    is first now and then: the gateway leaves 20 ms."""
    said = ("DEADLINE_EXCEEDED", "UNKNOWN", "DEADLINE_AFTER_SENDING")
    found = [c for c in calls if (c.code, c.outcome, c.reason) != said]
    show(len(found), "calls that Envoy or the client answered first")
    check("the gateway's own status arrives", len(found) <= len(calls) / 2, *found)
    check("none is told CANCELLED", all(c.code != "CANCELLED" for c in calls))


async def route_timeout(stand):
    """Whatever the caller's deadline says, Envoy waits a second, and tells the gateway so."""
    stand.simulate("--latency", "3s")
    stand.serve()
    stand.envoy(ISTIO, route=timeout("1s"))
    load = Load(stand.address)
    for _ in range(40):
        load.call(deadline=10.0)
        await asyncio.sleep(0.02)
    calls = await load.ended(stand, afterwards=2.5)
    table(stand, calls)
    check_calls(calls)
    told_by_the_gateway(calls)
    found = [c for c in calls if not 0.8 < c.seconds < 1.3]
    check("after a second", not found, *found)
    timeouts = stand.stat("upstream_rq_timeout")
    check("before Envoy's own timeout", timeouts <= len(calls) / 2, timeouts)
    found = [c for c in calls if len(c.batches) != 1]
    check("each call made one batch in the end", not found, *found)


async def per_try_timeout(stand):
    """Envoy gives each try half a second, and says so. The gateway answers before that, so that no
    try is given up and repeated while it may still make its batch."""
    stand.simulate("--latency", "1500ms")
    stand.serve()
    stand.serve()
    stand.envoy({**EVERYTHING, "per_try_timeout": "0.5s"})
    load = Load(stand.address)
    for _ in range(40):
        load.call()
        await asyncio.sleep(0.02)
    calls = await load.ended(stand, afterwards=1.5)
    table(stand, calls)
    check_calls(calls)
    told_by_the_gateway(calls)
    given_up = stand.stat("upstream_rq_per_try_timeout")
    check("before Envoy gives the try up", given_up <= len(calls) / 2, given_up)


async def grpc_timeout(stand):
    """The caller's deadline; nothing of it may come back as CANCELLED, which Istio retries."""
    stand.simulate("--latency", "1500ms")
    stand.serve()
    stand.serve()
    stand.envoy(ISTIO)
    load = Load(stand.address)
    for _ in range(40):
        load.call(deadline=0.5)
        await asyncio.sleep(0.02)
    calls = await load.ended(stand, afterwards=1.5)
    retries = table(stand, calls)
    check_calls(calls)
    told_by_the_gateway(calls)
    found = [c for c in calls if len(c.batches) != 1]
    check("each call made one batch", not found, *found)
    check("Envoy retried nothing", retries == 0, retries)


class Nowhere:
    """A port where connections do not come about: as many wait as may."""

    def __init__(self, stand):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        address = self.listener.getsockname()
        self.waiting = [socket.socket() for _ in range(3)]
        for waits in self.waiting:
            waits.setblocking(False)
            waits.connect_ex(address)
        stand.servers.append(self)
        url = f"http://127.0.0.1:{address[1]}"
        self.upstream = {"upstream_url": url + IMPORT, "catalog_url": url + CATALOG}

    def close(self):
        for end in [self.listener, *self.waiting]:
            end.close()

    def received(self):
        """Takes all who wait, and gives what they send."""
        self.listener.settimeout(1.5)  # SYNs come again after 1 s
        received = b""
        try:
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    connection.settimeout(0.2)
                    try:
                        received += connection.recv(1000)
                    except TimeoutError:
                        pass
        except TimeoutError:
            return received


async def total_time(stand):
    """Each try by Envoy brings the caller's whole deadline anew, and takes long: 0.7 s without a
    connection to the API. The caller's time is over within the third."""
    patience = 1.8
    nowhere = Nowhere(stand)
    stand.upstream = nowhere.upstream
    stand.serve("--connect-timeout", "700ms")
    stand.serve("--connect-timeout", "700ms")
    stand.envoy(ISTIO)
    load = Load(stand.address)
    for _ in range(10):
        load.call(deadline=patience)
    calls = await asyncio.gather(*load.calls)
    tries = stand.stat("upstream_rq_total")
    show(tries, "tries by Envoy")
    found = [c for c in calls if c.seconds > patience + 0.3]
    check("no caller waits longer than it said", not found, *found)
    check("Envoy did retry", len(calls) < tries <= 3 * len(calls), tries)
    sent = await asyncio.to_thread(nowhere.received)
    check("nothing is sent after that", sent == b"", sent)


SCENARIOS = [
    ("route-timeout", "Envoy's route gives up after a second", route_timeout, ()),
    ("per-try-timeout", "Envoy gives each try half a second", per_try_timeout, ()),
    ("grpc-timeout", "the caller gives up after half a second", grpc_timeout, ()),
    ("total-time", "each try takes its time", total_time, ()),
]
