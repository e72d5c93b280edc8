"""The gateway behind a real Envoy that retries, with faults upstream. Each call carries a tag, so
that the ledger of the simulated API tells how many batches it made. Started by run.sh."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2
from processes import ENVOY, REQUEST_TIMEOUT, Failed, Stand

GATEWAY, CALLS = sys.argv[1], int(sys.argv[2])

# The gateway itself repeats a 503 now and then: only many of them let Envoy see some.
FAULTS = 8 * ["status-503"] + """
status-429 status-500 status-400 proxy-502 proxy-503 lost-502 lost-503 lost-504
reset-before-create reset-after-create close-before-create close-after-create
half-answer empty-answer html-answer no-id-answer silence-after-create silence-before-create
delay-150 stale
""".split()

ISTIO = {
    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
    "num_retries": 2,
    "retriable_status_codes": [503],
}
FIVE = "cancelled,deadline-exceeded,internal,resource-exhausted,unavailable"
EVERYTHING = {"retry_on": f"{FIVE},connect-failure,refused-stream,reset", "num_retries": 2}


# From then on the gateway makes callers of a call that was sent stay.
COMMIT_AFTER = 0.1


def client_retries(*codes):
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": codes,
    }
    return {"methodConfig": [{"name": [{}], "retryPolicy": retry}]}


CREDENTIALS = [
    ("authorization", "Bearer test"), ("x-api-key", "test"),
    ("x-gw-ims-org-id", "test@AdobeOrg"), ("x-sandbox-name", "prod"),
]


@dataclass
class Call:
    """A call's answer, and what the ledger says of it."""

    number: int
    code: str
    outcome: str  # empty: no gateway said it
    reason: str = ""
    origin: str = ""
    batch_id: str = ""
    batches: list = field(default_factory=list)

    def is_duplicate(self):
        return len(self.batches) > 1

    def is_false(self):
        if self.code == "OK":
            return self.batch_id not in self.batches
        exists = {"NOT_CREATED": False, "CREATED": True}.get(self.outcome)
        return exists is not None and exists != bool(self.batches)

    def ending(self):
        last = self.origin if self.code == "OK" else self.outcome or "(no gateway's answer)"
        return f"{self.code} {last}"


async def call(stub, number, external_ids, deadline):
    request = pb.CreateBatchRequest(dataset_id="5c8c3c555033b814b69f947f")
    request.tags["call"].values.append(str(number))
    if external_ids:
        request.external_id = f"call-{number}"
    # The logs know a call by this.
    metadata = [*CREDENTIALS, ("x-request-id", f"call-{number}")]
    calling = stub.CreateBatch(request, timeout=deadline, metadata=metadata)
    try:
        answer = await calling
    except grpc.aio.AioRpcError as error:
        info = error_details_pb2.ErrorInfo()
        # Not by grpc_status: it raises if grpcio, at the very deadline, leaves the message encoded.
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        for detail in status_pb2.Status.FromString(details).details:
            detail.Unpack(info)
        return Call(number, error.code().name, info.metadata.get("outcome", ""), info.reason)
    origin = pb.BatchOrigin.Name(answer.origin).removeprefix("BATCH_ORIGIN_")
    return Call(number, "OK", "CREATED", origin=origin, batch_id=answer.batch.id)


class Load:
    """Calls that are made at the same time."""

    def __init__(self, address, external_ids=False, service_config=None):
        options = [("grpc.use_local_subchannel_pool", 1)]
        if service_config:
            options.append(("grpc.service_config", json.dumps(service_config)))
        self.channel = grpc.aio.insecure_channel(address, options)
        self.stub = batch_service_pb2_grpc.BatchServiceStub(self.channel)
        self.external_ids = external_ids
        self.calls = []

    def call(self, deadline=30.0):
        calling = call(self.stub, len(self.calls), self.external_ids, deadline)
        self.calls.append(asyncio.create_task(calling))
        return self.calls[-1]

    async def many(self, count, at_once=100, patience=30.0):
        """Every fifth call is in more of a hurry than the upstream's silences."""
        free = asyncio.Semaphore(at_once)
        for number in range(count):
            await free.acquire()
            deadline = REQUEST_TIMEOUT / 2 if number % 5 == 4 else patience
            self.call(deadline).add_done_callback(lambda _: free.release())

    async def steady(self, per_second, until):
        """Calls at a steady pace, until something else has happened."""
        begin, number = time.monotonic(), 0
        while not until.done():
            self.call()
            number += 1
            await asyncio.sleep(max(0.0, begin + number / per_second - time.monotonic()))
        await until

    async def ended(self, stand):
        calls = await asyncio.gather(*self.calls)
        await self.channel.close()
        # What was sent may still create a batch after its caller has left.
        await asyncio.sleep(REQUEST_TIMEOUT + 0.5)
        for batch in stand.ledger():
            tag = batch["tags"]["call"]
            tag = tag["values"] if isinstance(tag, dict) else tag  # by Envoy's transcoder
            calls[int(tag[0])].batches.append(batch["id"])
        return calls


passed = failed = 0


def check(what, holds, *shown):
    global passed, failed
    passed, failed = (passed + 1, failed) if holds else (passed, failed + 1)
    print(f"  {'ok     ' if holds else 'FAILED '} {what}")
    if not holds:
        for thing in shown[:5]:
            print(f"           {thing}")


def table(stand, calls, began):
    retries = stand.stat("upstream_rq_retry") if hasattr(stand, "admin") else "-"
    rows = [
        ("calls", len(calls)),
        ("OK", sum(c.code == "OK" for c in calls)),
        ("batches", sum(len(c.batches) for c in calls)),
        ("duplicates", sum(c.is_duplicate() for c in calls)),
        ("false answers", sum(c.is_false() for c in calls)),
        ("Envoy's retries", retries),
        ("seconds", f"{time.monotonic() - began:.1f}"),
    ]
    print("  " + " | ".join(name for name, _ in rows))
    print("  " + " | ".join(str(value).rjust(len(name)) for name, value in rows))
    for ending, count in Counter(c.ending() for c in calls).most_common():
        print(f"    {count:5} {ending}")
    return retries


def check_calls(calls, duplicates=True):
    if duplicates:
        found = [c for c in calls if c.is_duplicate()]
        check("no call made two batches", not found, *found)
    found = [c for c in calls if c.is_false()]
    check("no answer was false", not found, *found)
    found = [c for c in calls if c.reason == "GATEWAY_FAILED"]
    check("no gateway met a bug of its own", not found, *found)


async def random_faults(name, policy, external_ids):
    """1 to 3: 40 % of the creates meet a fault. Envoy retries, and clients retry UNAVAILABLE."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        stand.simulate("--catalog-lag", "200ms", faults=FAULTS)
        stand.serve()
        stand.serve()
        stand.envoy(policy)
        load = Load(stand.address, external_ids, client_retries("UNAVAILABLE"))
        await load.many(CALLS)
        calls = await load.ended(stand)
        retries = table(stand, calls, began)
        check_calls(calls)
        check("Envoy did retry", retries > 0)
        patient = [c for c in calls if c.number % 5 != 4]
        found = [c for c in patient if not c.outcome]
        check("every patient caller was told the outcome", not found, *found)
        if external_ids:
            found = [c for c in patient if c.batches and c.code != "OK"]
            check("every patient caller got the batch that exists", not found, *found)


async def per_try_timeout(name, timeout, external_ids, must_hold):
    """4: Envoy gives tries up, and makes the next one at the other gateway. Not those of which it
    has seen headers: the gateway sends them after COMMIT_AFTER."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        stand.simulate("--latency", "1s", "--catalog-lag", "200ms")
        stand.serve()
        stand.serve()
        retry_on = EVERYTHING["retry_on"] + ",gateway-error"
        times = {"num_retries": 2, "per_try_timeout": f"{timeout}s"}
        stand.envoy({"retry_on": retry_on, **times})
        load = Load(stand.address, external_ids)
        for _ in range(50):
            load.call()
        calls = await load.ended(stand)
        table(stand, calls, began)
        given_up = stand.stat("upstream_rq_per_try_timeout")
        print(f"    {given_up:5} tries that Envoy gave up")
        check_calls(calls, duplicates=must_hold)
        if timeout > COMMIT_AFTER:
            found = [c for c in calls if len(c.batches) != 1 or c.code != "OK"]
            check("every call made exactly one batch and told it", not found, *found)
        else:
            check("Envoy did give tries up", given_up > 0)


async def rolling_restart(name):
    """5: each gateway is restarted in turn under load."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        flags = ["--drain-delay", "2s"]
        stand.simulate("--latency", "50ms")
        addresses = [stand.serve(*flags), stand.serve(*flags)]
        stand.envoy(ISTIO, health_checks=True)
        codes = []

        def restart():
            for address in addresses:
                time.sleep(1)
                codes.append(stand.end(address))
                stand.serve(*flags, listen=address)
                time.sleep(1)
                stand.wait_for_health()
            time.sleep(1)

        load = Load(stand.address)
        await load.steady(100, asyncio.ensure_future(asyncio.to_thread(restart)))
        calls = await load.ended(stand)
        table(stand, calls, began)
        check_calls(calls)
        found = [c for c in calls if c.code != "OK"]
        check("no call failed", not found, *found)
        check("both gateways ended with 0", codes == [0, 0], codes)


async def connection_age(name):
    """6: connections that are told to go away under load."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        stand.simulate("--latency", "50ms")
        stand.serve("--max-connection-age", "1s")
        stand.envoy(ISTIO)
        load = Load(stand.address)
        await load.steady(100, asyncio.ensure_future(asyncio.sleep(10)))
        calls = await load.ended(stand)
        table(stand, calls, began)
        connections = stand.stat("upstream_cx_total")
        print(f"    {connections:5} connections, one after the other")
        check_calls(calls)
        found = [c for c in calls if c.code != "OK"]
        check("no call failed", not found, *found)
        check("connections did end", connections >= 5)


async def retrying_client(name):
    """7: no Envoy; a gRPC client that retries whatever it can be told to retry."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        stand.simulate(faults=FAULTS)
        address = stand.serve()
        everything = [code.name for code in grpc.StatusCode if code.name != "OK"]
        load = Load(address, service_config=client_retries(*everything))
        await load.many(CALLS)
        calls = await load.ended(stand)
        table(stand, calls, began)
        check_calls(calls)


async def killed_gateway(name, policy, after, external_ids, must_hold):
    """8: a gateway dies while its calls are upstream; their batches exist. If Envoy repeats what
    was reset, only headers that came before, or an external id, prevent a second batch."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        stand.simulate("--catalog-lag", "200ms", faults=["silence-after-create"], share=1)
        address = stand.serve()
        stand.serve()
        stand.envoy(policy)
        load = Load(stand.address, external_ids)
        for _ in range(40):
            load.call()
        # Not when the calls were made, but when most have arrived.
        while len(stand.ledger()) < 30:
            await asyncio.sleep(0.001)
        await asyncio.sleep(after)
        stand.end(address, signal.SIGKILL)
        calls = await load.ended(stand)
        table(stand, calls, began)
        check_calls(calls, duplicates=must_hold)


async def envoys_transcoder(name):
    """9: for comparison, Envoy's own transcoder instead of the gateway, on the same faults."""
    began = time.monotonic()
    with Stand(GATEWAY, name) as stand:
        stand.simulate(faults=FAULTS)
        stand.envoy(ISTIO, transcoder=annotated_descriptor(stand.logs))
        load = Load(stand.address, service_config=client_retries("UNAVAILABLE"))
        method = "/aep.ingestion.v1.BatchService/CreateBatch"
        load.stub = types.SimpleNamespace(
            CreateBatch=load.channel.unary_unary(
                method, pb.CreateBatchRequest.SerializeToString, transcoded_answer
            )
        )
        await load.many(CALLS, patience=2 * REQUEST_TIMEOUT)
        calls = await load.ended(stand)
        table(stand, calls, began)
        check("batches were made", any(c.batches for c in calls))


def transcoded_answer(data):
    """Envoy cannot read the API's answers into a Batch: it hands the JSON over as it is."""
    text = httpbody_pb2.HttpBody.FromString(data).data
    try:
        batch_id = json.loads(text).get("id", "")
    except ValueError:
        batch_id = ""
    return pb.CreateBatchResponse(batch=pb.Batch(id=batch_id))


def annotated_descriptor(folder):
    """The API's descriptor with the annotation that tells Envoy what to call."""
    proto = "aep/ingestion/v1/batch_service.proto"
    text = (Path(__file__).parents[2] / "proto" / proto).read_text()
    rpc = "rpc CreateBatch(CreateBatchRequest) returns (CreateBatchResponse);"
    call = 'option (google.api.http) = { post: "/data/foundation/import/batches" body: "*" };'
    text = text.replace(rpc, rpc.replace("CreateBatchResponse);", f"google.api.HttpBody) {{ {call} }}"))
    imports = 'import "google/api/annotations.proto";\nimport "google/api/httpbody.proto";\n'
    text = text.replace("import ", imports + "import ", 1)
    (folder / proto).parent.mkdir(parents=True)
    (folder / proto).write_text(text)
    descriptor = folder / "annotated.bin"
    google = Path(httpbody_pb2.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"-I{google}",
         "--include_imports", f"--descriptor_set_out={descriptor}", proto],
        check=True,
    )
    return descriptor


SCENARIOS = [
    ("1", "Istio's default retries", random_faults, (ISTIO, False)),
    ("2", "retries of every gRPC condition and of resets", random_faults, (EVERYTHING, False)),
    ("3a", "external ids, Istio's default retries", random_faults, (ISTIO, True)),
    ("3b", "external ids, retries of every gRPC condition and of resets", random_faults, (EVERYTHING, True)),
    ("4a", "per-try timeout 200 ms, external ids", per_try_timeout, (0.2, True, True)),
    ("4b", "per-try timeout 50 ms, external ids", per_try_timeout, (0.05, True, True)),
    ("4c", "per-try timeout 200 ms, no external ids", per_try_timeout, (0.2, False, True)),
    ("4d", "per-try timeout 50 ms, no external ids", per_try_timeout, (0.05, False, False)),
    ("5", "rolling restart", rolling_restart, ()),
    ("6", "connections that last a second", connection_age, ()),
    ("7", "a gRPC client that retries every code", retrying_client, ()),
    ("8a", "a gateway killed at once, Istio's default retries", killed_gateway, (ISTIO, 0.0, False, True)),
    ("8b", "a gateway killed at once, retries of resets", killed_gateway, (EVERYTHING, 0.0, False, False)),
    ("8c", "a gateway killed after 300 ms, retries of resets", killed_gateway, (EVERYTHING, 0.3, False, True)),
    ("8d", "a gateway killed at once, retries of resets, external ids", killed_gateway, (EVERYTHING, 0.0, True, True)),
    ("9", "for comparison: Envoy's transcoder instead of the gateway", envoys_transcoder, ()),
]


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    wanted = os.environ.get("SCENARIOS", "").split()
    version = subprocess.run([ENVOY, "--version"], capture_output=True, text=True).stdout
    envoy = re.search(r"/(\d+\.\d+\.\d+)/", version).group(1)
    print(f"Envoy {envoy}, grpcio {grpc.__version__}, {CALLS} calls with random faults")
    for number, title, scenario, args in SCENARIOS:
        if wanted and number not in wanted and number.rstrip("abcd") not in wanted:
            continue
        print(f"\n{number}: {title}", flush=True)
        try:
            asyncio.run(scenario(number, *args))
        except Failed as failure:
            check("the scenario runs", False, failure)
    print(f"\n{passed} passed, {failed} failed")
    return failed != 0 or passed == 0


if __name__ == "__main__":
    sys.exit(main())
