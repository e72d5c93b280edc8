"""Faults upstream, retries by Envoy and by clients: no duplicate, and no false response."""

import asyncio
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from aep.ingestion.v1 import batch_service_pb2 as pb
from google.api import httpbody_pb2

from harness.envoy import EVERYTHING, ISTIO, UNTOLD, transcoder
from harness.faults import AFTERWARDS, FAULTS, HURRY, REFUSALS, REQUEST_TIMEOUT
from harness.load import EVERY_CODE, Load, assert_safe, client_retries
from harness.process import ROOT

# From then on the gateway makes callers of a call with an external id stay, once it was sent.
EARLY_HEADERS_AFTER = 0.1

POLICIES = {"istio-defaults": ISTIO, "everything": EVERYTHING}
retry_policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
with_and_without_ids = pytest.mark.parametrize("external_ids", [False, True], ids=["no-ids", "external-ids"])


@retry_policies
@with_and_without_ids
async def test_random_faults_and_retries_make_no_duplicate(programs, calls, policy, external_ids):
    """40 % of the creates meet a fault. Envoy retries, and clients retry UNAVAILABLE. Without an
    external id nothing that was sent is retried, since it has its headers."""
    simulator = programs.simulator(
        "--catalog-lag", "200ms", faults=REFUSALS if external_ids else FAULTS
    )
    gateways = programs.gateways(2, simulator, request_timeout=REQUEST_TIMEOUT)
    envoy = programs.envoy(gateways, policy)
    load = Load(envoy.address, external_ids, client_retries("UNAVAILABLE"))
    await load.many(calls, hurry=HURRY)
    ended = await load.counted(simulator, AFTERWARDS)
    assert_safe(ended)
    patient = [c for c in ended if c.number % 5 != 4]
    assert not [c for c in patient if not c.outcome], "every patient caller is told the outcome"
    if external_ids:
        assert envoy.stat("upstream_rq_retry") > 0
        assert not [c for c in patient if c.batches and c.code != "OK"]


@pytest.mark.parametrize("timeout", [0.5, 0.05], ids=["500ms", "50ms"])
@with_and_without_ids
async def test_a_try_that_envoy_gives_up_makes_no_duplicate(programs, timeout, external_ids):
    """Envoy makes the next try at the other gateway. Not of calls whose headers it has seen: the
    gateway sends them before it sends anything to the API, and with an external id after
    EARLY_HEADERS_AFTER. Envoy keeps to itself how long it waits, as other meshes do;
    test_deadlines.py has what happens if it does not."""
    simulator = programs.simulator("--latency", "1s", "--catalog-lag", "200ms")
    gateways = programs.gateways(2, simulator, request_timeout=REQUEST_TIMEOUT)
    policy = {
        "retry_on": EVERYTHING["retry_on"] + ",gateway-error",
        "num_retries": 2,
        "per_try_timeout": f"{timeout}s",
    }
    envoy = programs.envoy(
        gateways, policy, router={"suppress_envoy_headers": True}, route=UNTOLD
    )
    load = Load(envoy.address, external_ids)
    for _ in range(50):
        load.call()
    calls = await load.counted(simulator, AFTERWARDS)
    given_up = envoy.stat("upstream_rq_per_try_timeout")
    print(given_up, "tries that Envoy gave up")
    assert_safe(calls)
    if timeout > EARLY_HEADERS_AFTER:
        assert not [c for c in calls if len(c.batches) != 1 or c.code != "OK"]
    elif external_ids:
        assert given_up > 0


async def test_a_client_that_retries_every_code_makes_no_duplicate(programs, calls):
    """Without Envoy."""
    simulator = programs.simulator(faults=FAULTS)
    gateway = programs.gateway(simulator, request_timeout=REQUEST_TIMEOUT)
    load = Load(gateway.address, service_config=client_retries(*EVERY_CODE))
    await load.many(calls, hurry=HURRY)
    assert_safe(await load.counted(simulator, AFTERWARDS))


@pytest.mark.parametrize(
    "policy, after, external_ids",
    [
        pytest.param(ISTIO, 0.0, False, id="at-once-istio-defaults"),
        pytest.param(EVERYTHING, 0.0, False, id="at-once-everything"),
        pytest.param(EVERYTHING, 0.3, False, id="after-300ms-everything"),
        pytest.param(EVERYTHING, 0.0, True, id="at-once-everything-external-ids"),
    ],
)
async def test_a_killed_gateway_leaves_no_duplicate(programs, policy, after, external_ids):
    """It dies while its calls are upstream; their batches exist. If Envoy repeats what was reset,
    only headers that came before, or an external id, prevent a second batch."""
    simulator = programs.simulator("--catalog-lag", "200ms", faults=["silence-after-create"], share=1)
    gateways = programs.gateways(2, simulator, request_timeout=REQUEST_TIMEOUT)
    envoy = programs.envoy(gateways, policy)
    load = Load(envoy.address, external_ids)
    for _ in range(40):
        load.call()
    # Not when the calls were made, but when most have arrived.
    while len(simulator.ledger()) < 30:
        await asyncio.sleep(0.001)
    await asyncio.sleep(after)
    gateways[0].kill()
    assert_safe(await load.counted(simulator, AFTERWARDS))


async def test_for_comparison_envoys_transcoder_instead_of_the_gateway(programs, calls):
    """The same faults; -rP shows the duplicates and false responses."""
    simulator = programs.simulator(faults=FAULTS)
    to_rest = transcoder(annotated_descriptor(programs.folder))
    envoy = programs.envoy([simulator], ISTIO, filters=[to_rest], http=1)
    load = Load(envoy.address, service_config=client_retries("UNAVAILABLE"))
    method = "/aep.ingestion.v1.BatchService/CreateBatch"
    load.stub = types.SimpleNamespace(
        CreateBatch=load.channel.unary_unary(
            method, pb.CreateBatchRequest.SerializeToString, transcoded_response
        )
    )
    await load.many(calls, patience=2 * REQUEST_TIMEOUT, hurry=HURRY)
    assert any(c.batches for c in await load.counted(simulator, AFTERWARDS))


def transcoded_response(data):
    """Envoy cannot read the API's responses into a Batch: it hands the JSON over as it is."""
    text = httpbody_pb2.HttpBody.FromString(data).data
    try:
        batch_id = json.loads(text).get("id", "")
    except ValueError:
        batch_id = ""
    return pb.CreateBatchResponse(batch=pb.Batch(id=batch_id))


def annotated_descriptor(folder):
    """The API's descriptor with the annotation that tells Envoy what to call."""
    proto = "aep/ingestion/v1/batch_service.proto"
    text = (ROOT / "proto" / proto).read_text()
    rpc = "rpc CreateBatch(CreateBatchRequest) returns (CreateBatchResponse);"
    call = 'option (google.api.http) = { post: "/data/foundation/import/batches" body: "*" };'
    assert rpc in text
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
    )  # fmt: skip
    return descriptor
