"""Faults upstream, retries by Envoy and by clients: no duplicate, and no false answer."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from google.api import httpbody_pb2

import envoy_config
from calls import Load, check_calls, table
from checks import check, show
from envoy_config import EVERYTHING, ISTIO

# For each scenario with random faults.
CALLS = int(os.environ["CALLS"])


def everybody_in_between():
    """Before the API has processed the request, and after: the last table of docs/simulator.md."""
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    forms = re.findall(r"^\| `([^`]+)` \| (before|after|either) \| \d+ \|", page, re.M)
    return [
        name + ending
        for name, when in forms
        for ending in {"before": [""], "after": ["-after"], "either": ["", "-after"]}[when]
    ]


OWN_FAULTS = """
status-429 status-500 status-400 proxy-502 proxy-503 lost-502 lost-503 lost-504
reset-before-create reset-after-create close-before-create close-after-create
half-answer unfinished-answer empty-answer html-answer no-id-answer gzip-answer
many-headers-answer gzip-503 silence-after-create silence-before-create delay-150 stale
""".split()

# Half of them are of everybody in between. The gateway itself repeats a 503 of the API now and
# then: only many of them let Envoy see some.
BETWEEN = everybody_in_between()
FAULTS = 40 * ["status-503"] + len(BETWEEN) // len(OWN_FAULTS) * OWN_FAULTS + BETWEEN

# And where it matters that retries come.
REFUSALS = FAULTS + len(FAULTS) * ["status-503"]

# From then on the gateway makes callers of a call with an external id stay, once it was sent.
COMMIT_AFTER = 0.1

# How long one request upstream may take: short, because silences last that long.
REQUEST_TIMEOUT = 2.0

# A batch may still be created after its caller has left.
AFTERWARDS = REQUEST_TIMEOUT + 0.5

# Less than the upstream's silences: the deadline of every fifth call.
HURRY = REQUEST_TIMEOUT / 2

EVERY_CODE = [code.name for code in grpc.StatusCode if code.name != "OK"]


def client_retries(*codes):
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.05s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": codes,
    }
    return {"methodConfig": [{"name": [{}], "retryPolicy": retry}]}


async def random_faults(stand, policy, external_ids):
    """1 to 3: 40 % of the creates meet a fault. Envoy retries, and clients retry UNAVAILABLE. Without
    an external id nothing that was sent is retried, since it has its headers."""
    faults = REFUSALS if external_ids else FAULTS
    stand.simulate("--catalog-lag", "200ms", faults=faults)
    stand.serve(request_timeout=REQUEST_TIMEOUT)
    stand.serve(request_timeout=REQUEST_TIMEOUT)
    stand.envoy(policy)
    load = Load(stand.address, external_ids, client_retries("UNAVAILABLE"))
    await load.many(CALLS, hurry=HURRY)
    calls = await load.ended(stand, AFTERWARDS)
    retries = table(stand, calls)
    check_calls(calls)
    patient = [c for c in calls if c.number % 5 != 4]
    found = [c for c in patient if not c.outcome]
    check("every patient caller was told the outcome", not found, *found)
    if external_ids:
        check("Envoy did retry", retries > 0)
        found = [c for c in patient if c.batches and c.code != "OK"]
        check("every patient caller got the batch that exists", not found, *found)


async def per_try_timeout(stand, timeout, external_ids):
    """4: Envoy gives tries up, and makes the next one at the other gateway. Not those of which it
    has seen headers: the gateway sends them before it sends anything to the API, and with an
    external id after COMMIT_AFTER. Envoy keeps to itself how long it waits, as other meshes do;
    deadlines.py has what comes of it if it does not."""
    stand.simulate("--latency", "1s", "--catalog-lag", "200ms")
    stand.serve(request_timeout=REQUEST_TIMEOUT)
    stand.serve(request_timeout=REQUEST_TIMEOUT)
    retry_on = EVERYTHING["retry_on"] + ",gateway-error"
    times = {"num_retries": 2, "per_try_timeout": f"{timeout}s"}
    stand.envoy(
        {"retry_on": retry_on, **times}, router={"suppress_envoy_headers": True},
        route=envoy_config.UNTOLD,
    )
    load = Load(stand.address, external_ids)
    for _ in range(50):
        load.call()
    calls = await load.ended(stand, AFTERWARDS)
    table(stand, calls)
    given_up = stand.stat("upstream_rq_per_try_timeout")
    show(given_up, "tries that Envoy gave up")
    check_calls(calls)
    if timeout > COMMIT_AFTER:
        found = [c for c in calls if len(c.batches) != 1 or c.code != "OK"]
        check("every call made exactly one batch and told it", not found, *found)
    elif external_ids:
        check("Envoy did give tries up", given_up > 0)


async def retrying_client(stand):
    """5: no Envoy; a gRPC client that retries whatever it can be told to retry."""
    stand.simulate(faults=FAULTS)
    gateway = stand.serve(request_timeout=REQUEST_TIMEOUT)
    load = Load(gateway.address, service_config=client_retries(*EVERY_CODE))
    await load.many(CALLS, hurry=HURRY)
    calls = await load.ended(stand, AFTERWARDS)
    table(stand, calls)
    check_calls(calls)


async def killed_gateway(stand, policy, after, external_ids):
    """6: a gateway dies while its calls are upstream; their batches exist. If Envoy repeats what
    was reset, only headers that came before, or an external id, prevent a second batch."""
    stand.simulate("--catalog-lag", "200ms", faults=["silence-after-create"], share=1)
    gateway = stand.serve(request_timeout=REQUEST_TIMEOUT)
    stand.serve(request_timeout=REQUEST_TIMEOUT)
    stand.envoy(policy)
    load = Load(stand.address, external_ids)
    for _ in range(40):
        load.call()
    # Not when the calls were made, but when most have arrived.
    while len(stand.ledger()) < 30:
        await asyncio.sleep(0.001)
    await asyncio.sleep(after)
    gateway.end(signal.SIGKILL)
    calls = await load.ended(stand, AFTERWARDS)
    table(stand, calls)
    check_calls(calls)


async def envoys_transcoder(stand):
    """7: for comparison, Envoy's own transcoder instead of the gateway, on the same faults."""
    stand.simulate(faults=FAULTS)
    to_rest = envoy_config.transcoder(annotated_descriptor(stand.logs))
    stand.envoy(ISTIO, [stand.upstream["listen"]], filters=[to_rest], http=1)
    load = Load(stand.address, service_config=client_retries("UNAVAILABLE"))
    method = "/aep.ingestion.v1.BatchService/CreateBatch"
    load.stub = types.SimpleNamespace(
        CreateBatch=load.channel.unary_unary(
            method, pb.CreateBatchRequest.SerializeToString, transcoded_answer
        )
    )
    await load.many(CALLS, patience=2 * REQUEST_TIMEOUT, hurry=HURRY)
    calls = await load.ended(stand, AFTERWARDS)
    table(stand, calls)
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
    ("4a", "per-try timeout 500 ms, external ids", per_try_timeout, (0.5, True)),
    ("4b", "per-try timeout 50 ms, external ids", per_try_timeout, (0.05, True)),
    ("4c", "per-try timeout 500 ms, no external ids", per_try_timeout, (0.5, False)),
    ("4d", "per-try timeout 50 ms, no external ids", per_try_timeout, (0.05, False)),
    ("5", "a gRPC client that retries every code", retrying_client, ()),
    ("6a", "a gateway killed at once, Istio's default retries", killed_gateway, (ISTIO, 0.0, False)),
    ("6b", "a gateway killed at once, retries of resets", killed_gateway, (EVERYTHING, 0.0, False)),
    ("6c", "a gateway killed after 300 ms, retries of resets", killed_gateway, (EVERYTHING, 0.3, False)),
    ("6d", "a gateway killed at once, retries of resets, external ids", killed_gateway, (EVERYTHING, 0.0, True)),
    ("7", "for comparison: Envoy's transcoder instead of the gateway", envoys_transcoder, ()),
]


