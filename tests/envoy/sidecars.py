"""A sidecar at both ends, as in a mesh: the caller's Envoy, an Envoy beside each gateway, the
gateway. When a gateway dies the Envoy beside it lives, and says UNAVAILABLE of its calls: the
caller's Envoy cannot tell that from what a gateway says."""

import asyncio
import random
import signal

import examples
from calls import Load, check_calls, table
from checks import check, check_known, show
from envoy_config import EVERYTHING, ISTIO
from faults import AFTERWARDS, EVERY_CODE, HURRY, REFUSALS, REQUEST_TIMEOUT, client_retries

NOT_SENT = {"retry_on": "connect-failure,refused-stream", "num_retries": 2}
# As Linkerd retries: no mark, no pause to speak of.
UNMARKED = {
    "retry_policy": {
        "retry_on": "unavailable",
        "num_retries": 2,
        "retry_back_off": {"base_interval": "0.001s"},
    },
    "host": {"include_request_attempt_count": False},
}


def start(stand, *flags, faults=(), share=1, catalog_lag="200ms", retries):
    """Two gateways, each with a sidecar, and Envoy in front of both. `retries` are as
    `Stand.envoy` takes them. Gives the simulated API's process."""
    api = stand.simulate("--catalog-lag", catalog_lag, *flags, faults=faults, share=share)
    for _ in range(2):
        stand.serve(request_timeout=REQUEST_TIMEOUT)
    stand.envoy(hosts=stand.sidecars(), **retries)
    return api


def check_killed(stand, calls, duplicates=True):
    """Some calls were retried, or no gateway answered them: else the kill proves nothing."""
    retried = table(stand, calls)
    misled = [c for c in calls if c.code == "UNAVAILABLE" and c.batches]
    show(len(misled), "told UNAVAILABLE by a sidecar, though their batch exists")
    check_calls(calls, duplicates)
    unanswered = [c for c in calls if not c.outcome]
    check("the kill met calls", len(unanswered) + retried > 0)


async def killed(stand, retries, external_ids, known=None):
    """Every create hangs after it was made. Then the gateway with half of them is killed."""
    # For as long as Catalog shows nothing, a look-up does not help who does not wait.
    start(stand, faults=["silence-after-create"], catalog_lag="1s", retries=retries)
    load = Load(stand.address, external_ids)
    # Few with external ids: their headers leave 100 ms after they were sent (faults.COMMIT_AFTER).
    count = 20 if external_ids else 40
    for _ in range(count):
        load.call()
    # Not when the calls were made, but when batches of both gateways' calls are there.
    while len(stand.ledger()) < 0.75 * count:
        await asyncio.sleep(0.001)
    stand.gateways[0].end(signal.SIGKILL)
    calls = await load.ended(stand, AFTERWARDS)
    check_killed(stand, calls, duplicates=not known)
    if known:
        found = [c for c in calls if c.is_duplicate()]
        check_known("no call made two batches", not found, known)


async def killed_at_random(stand, external_ids):
    """Gateways die and come back under load. Envoy and the client retry whatever they can be told
    to retry."""
    chance = random.Random(1)
    start(stand, "--latency", "50ms", retries={"retry_policy": EVERYTHING})
    load = Load(stand.address, external_ids, client_retries(*EVERY_CODE))
    kills = 0
    loading = asyncio.create_task(load.steady_for(100, 5))
    while not loading.done():
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        gateway = chance.choice(stand.gateways)
        await asyncio.to_thread(gateway.end, signal.SIGKILL)
        await asyncio.to_thread(stand.serve_again, gateway)
        kills += 1
    await loading
    calls = await load.ended(stand, AFTERWARDS)
    show(kills, "kills")
    check_killed(stand, calls)


async def random_faults(stand, retries):
    """40 % of the creates meet a fault; Envoy retries what the gateway marks."""
    start(stand, faults=REFUSALS, share=0.4, retries=retries)
    load = Load(stand.address, external_ids=True)
    await load.many(300, hurry=HURRY)
    calls = await load.ended(stand, AFTERWARDS)
    retried = table(stand, calls)
    check_calls(calls)
    check("Envoy did retry", retried > 0)


async def marked(stand, retries):
    """Envoy retries what carries aep-batch-retry, and nothing else."""
    api = start(stand, retries=retries)
    load = Load(stand.address)
    for fault, code, expected in [
        ("lost-502", "UNKNOWN", 1),
        ("status-400", "INVALID_ARGUMENT", 1),
        ("no API", "UNAVAILABLE", 3),
    ]:
        api.kill()
        api.wait()
        if fault != "no API":
            api = stand.simulate(faults=[fault], share=1, listen=stand.upstream["listen"])
        before = stand.stat("upstream_rq_total")
        call = await load.call()
        tries = stand.stat("upstream_rq_total") - before
        said = (call.code, tries)
        check(f"{fault}: {code} after {expected} tries", said == (code, expected), tries, call)
    await load.channel.close()


SCENARIOS = [
    ("marked-envoy", "the example for Envoy: what it retries", marked, (examples.envoy(),)),
    ("marked-istio", "the example for Istio: what it retries", marked, (examples.istio(),)),
    ("8a", "killed beside its sidecar, Istio's default retries", killed, ({"retry_policy": ISTIO}, False)),
    ("8b", "the same, as the example for Istio retries", killed, (examples.istio(), False)),
    ("8c", "the same, retries of what reached no gateway", killed, ({"retry_policy": NOT_SENT}, False)),
    ("8d", "the same, everything retried", killed, ({"retry_policy": EVERYTHING}, False)),
    ("8e", "external ids, Istio's default retries", killed, ({"retry_policy": ISTIO}, True)),
    ("8f", "external ids, as the example for Istio retries", killed, (examples.istio(), True)),
    ("8g", "external ids, everything retried", killed, ({"retry_policy": EVERYTHING}, True)),
    ("8h", "external ids, unmarked retries as Linkerd's", killed,
     (UNMARKED, True, "the other gateway looks up before Catalog shows the batch")),
    ("9a", "gateways killed at random, everything retried", killed_at_random, (False,)),
    ("9b", "the same with external ids", killed_at_random, (True,)),
    ("10", "random faults, external ids, as the example for Istio retries", random_faults, (examples.istio(),)),
]  # fmt: skip
