"""What every client library must see of the gateway."""

import functools
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime

import pytest
import samples
import wire
from client import each_client
from harness.process import ROOT, wait_until
from player import CREDENTIALS

SERVICE = "aep.ingestion.v1.BatchService"
METHODS = ["CreateBatch", "GetBatch", "ListBatches"]
LIMIT = 256 * 1024  # bytes that a message may have
IDLE = 24  # seconds without a call, so at least two pings


@dataclass
class Failure:
    """A call, what goes wrong with it, and what its caller must be told."""

    name: str
    code: str
    reason: str
    outcome: str | None = "NOT_APPLIED"  # None: none is told
    order: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    batches: int = 0  # that it makes nevertheless
    tries: int = 1  # of the client
    fields: list[str] = field(default_factory=list)  # in BadRequest
    details: list[str] = field(default_factory=list)  # besides ErrorInfo
    retry: str | None = None  # in RetryInfo
    info: dict[str, str] = field(default_factory=dict)  # in ErrorInfo.metadata


def without(*names):
    return [pair for pair in CREDENTIALS if pair[0] not in names]


TOKEN_EXPIRED = [["authorization", "Bearer expired"], *without("authorization")]
TOO_LARGE = {"datasetId": "a", "tags": {"t": {"values": ["x" * LIMIT]}}}
# The gateway itself repeats a 429 or 503, as far as its budget of retries goes.
ENOUGH = 9

FAILURES = [
    Failure(
        "a bad message", "INVALID_ARGUMENT", "INVALID_REQUEST",
        order={"request": {"partialIngestionPercent": 101}},
        fields=["dataset_id", "partial_ingestion_percent"],
    ),
    Failure(
        "missing credentials", "UNAUTHENTICATED", "CREDENTIALS_MISSING",
        order={"metadata": without("x-api-key", "x-sandbox-name")}, fields=["x-api-key", "x-sandbox-name"],
    ),
    Failure(
        "a credential given twice", "INVALID_ARGUMENT", "INVALID_REQUEST",
        order={"metadata": [*CREDENTIALS, ["x-api-key", "other"]]}, fields=["x-api-key"],
    ),
    Failure(
        "an expired token", "UNAUTHENTICATED", "API_UNAUTHENTICATED", order={"metadata": TOKEN_EXPIRED},
        details=["Help"], info={"httpStatus": "401", "upstreamErrorCode": "401013"},
    ),
    Failure("HTTP 400", "INVALID_ARGUMENT", "API_INVALID_REQUEST", faults=["status-400"]),
    Failure("HTTP 403", "PERMISSION_DENIED", "API_PERMISSION_DENIED", faults=["status-403"]),
    Failure("HTTP 404", "NOT_FOUND", "API_NOT_FOUND", faults=["status-404"]),
    Failure("HTTP 409", "ALREADY_EXISTS", "API_CONFLICT", faults=["status-409"]),
    Failure("HTTP 412", "FAILED_PRECONDITION", "API_PRECONDITION_FAILED", faults=["status-412"]),
    Failure("HTTP 421", "FAILED_PRECONDITION", "API_REFUSED", faults=["status-421"]),
    Failure("HTTP 418", "UNKNOWN", "UPSTREAM_UNPROVEN", "UNKNOWN", faults=["status-418"]),
    Failure("HTTP 501", "UNIMPLEMENTED", "API_NOT_IMPLEMENTED", faults=["status-501"]),
    Failure(
        # The API asks for 2 s, so neither gateway nor client has the time to repeat it.
        "HTTP 429", "RESOURCE_EXHAUSTED", "API_RATE_LIMITED", order={"seconds": 1.5},
        faults=["status-429"], details=["QuotaFailure", "Help"], retry="2s",
    ),
    Failure(
        "HTTP 503", "UNAVAILABLE", "API_UNAVAILABLE",
        order={"seconds": 30, "request": {"datasetId": "a", "externalId": "busy"}},
        faults=["status-503"] * ENOUGH, tries=3, details=["Help"], retry="1s",
    ),
    Failure("HTTP 503 of a proxy", "UNKNOWN", "UPSTREAM_FAILED", "UNKNOWN", faults=["proxy-503"]),
    Failure(
        "a batch whose response a proxy lost", "UNKNOWN", "UPSTREAM_FAILED", "UNKNOWN",
        faults=["lost-504"], batches=1, info={"httpStatus": "504"},
    ),
    Failure(
        "a connection that breaks after the batch was created", "UNKNOWN", "CONNECTION_LOST", "UNKNOWN",
        faults=["reset-after-create"], batches=1,
    ),
    Failure(
        "a response that is no batch", "UNKNOWN", "ANSWER_UNUSABLE", "APPLIED",
        faults=["empty-answer"], batches=1, info={"batchId": "(the last in the ledger)"},
    ),
    Failure(
        "a redirect", "FAILED_PRECONDITION", "API_REDIRECTED",
        faults=["redirect"], info={"redirectHost": "localhost"},
    ),
    Failure(
        "a lookup that is forbidden", "PERMISSION_DENIED", "LOOKUP_FORBIDDEN",
        order={"request": {"datasetId": "a", "externalId": "forbidden"}},
        faults=["lookup-403"], info={"externalId": "forbidden"},
    ),
    Failure(
        "a message that is too large", "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE",
        order={"request": TOO_LARGE},
    ),
    Failure(
        "an unknown method", "UNIMPLEMENTED", "UNSUPPORTED", order={"path": f"/{SERVICE}/DropBatch"}
    ),
    Failure(
        "an unknown service", "UNIMPLEMENTED", "UNSUPPORTED", None,
        order={"path": "/aep.ingestion.v2.BatchService/CreateBatch"},
    ),
]  # fmt: skip


def patiently(test):
    """For what a client must retry: on a busy machine a response takes 100 ms, so it gets its headers
    early and is not retried."""

    @functools.wraps(test)
    def repeated(*args, **kwargs):
        for _ in range(2):
            try:
                return test(*args, **kwargs)
            except AssertionError as error:
                print(f"again, after {error}")
        return test(*args, **kwargs)

    return repeated


def response_of(result):
    assert result["code"] == "OK", f"{result['code']}: {result.get('message')}"
    return result["answer"]


def details_of(result):
    """The details of an error by their short names."""
    details = result["status"]["details"]
    return {detail["@type"].rpartition(".")[2]: detail for detail in details}


def metadata_of(result):
    return {**(result["headers"] or {}), **result["trailers"]}


def assert_failure(result, failure):
    assert result["code"] == failure.code
    details = details_of(result)
    info = details["ErrorInfo"]
    assert info["reason"] == failure.reason
    assert info["domain"] == "aep-batch-gateway"
    assert info.get("metadata", {}).get("outcome") == failure.outcome
    assert metadata_of(result).get("aep-batch-outcome") == failure.outcome
    assert result["message"] == result["status"]["message"]
    if result["headers"] is not None:  # the library tells them apart
        assert not {"aep-batch-outcome", "x-request-id"} & {*result["headers"]} & {*result["trailers"]}
        # What may be repeated comes as Trailers-Only, all else as headers that say "do not". A
        # response that took 100 ms (a busy machine) has got its headers early, with the request id.
        if "x-request-id" not in result["headers"]:
            assert bool(result["headers"]) == (failure.outcome in ("UNKNOWN", "APPLIED"))
    violations = details.get("BadRequest", {}).get("fieldViolations", [])
    assert [violation["field"] for violation in violations] == failure.fields
    assert details.get("RetryInfo", {}).get("retryDelay") == failure.retry
    assert {*failure.details} <= {*details}


def started(gateway):
    return gateway.metric("grpc_server_started_total")


def test_the_samples_have_every_field_of_the_proto():
    assert not samples.missing_fields(ROOT / "proto/aep/ingestion/v1/batch_service.proto")


@each_client()
@patiently
def test_unavailable_is_retried_until_the_call_succeeds(client):
    before = client.gateway.metric("grpc_server_handled_total", grpc_code="Unavailable")
    batches = len(client.simulator.ledger())
    client.simulator.inject("status-503", "status-503")
    # Only with an external id: other calls get their headers before anything is sent.
    request = {"datasetId": "a", "externalId": str(uuid.uuid4())}
    response_of(client.player.create(request, seconds=30))
    assert client.gateway.metric("grpc_server_handled_total", grpc_code="Unavailable") > before
    assert len(client.simulator.ledger()) - batches == 1


def fails(client, failure):
    calls, batches = started(client.gateway), len(client.simulator.ledger())
    client.simulator.inject(*failure.faults)
    request_id = str(uuid.uuid4())
    order = {"metadata": CREDENTIALS, **failure.order}
    order["metadata"] = [*order["metadata"], ["x-request-id", request_id]]
    try:
        result = client.player.create(**order)
    finally:
        client.simulator.clear_faults()
    ledger = client.simulator.ledger()
    assert_failure(result, failure)
    assert len(ledger) - batches == failure.batches
    details = details_of(result)
    for name, value in failure.info.items():
        expected = ledger[-1]["id"] if name == "batchId" else value
        assert details["ErrorInfo"]["metadata"].get(name) == expected
    if "aep.ingestion.v2" not in order.get("path", ""):  # no service that counts calls and has ids
        assert started(client.gateway) - calls == failure.tries
        assert details["RequestInfo"]["requestId"] == request_id
        assert metadata_of(result)["x-request-id"] == request_id


@each_client()
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure.code} {failure.name}")
def test_a_failure_is_reported_with_its_details(client, failure):
    (patiently(fails) if failure.tries > 1 else fails)(client, failure)


@each_client()
def test_an_external_id_with_other_content_already_exists(client):
    external_id = str(uuid.uuid4())
    first = response_of(client.player.create({"datasetId": "a", "externalId": external_id}))
    result = client.player.create({"datasetId": "b", "externalId": external_id})
    assert_failure(result, Failure("", "ALREADY_EXISTS", "EXTERNAL_ID_TAKEN"))
    info = details_of(result)["ErrorInfo"]["metadata"]
    assert (info["batchId"], info["externalId"]) == (first["batch"]["id"], external_id)


@each_client()
def test_a_silent_api_is_deadline_exceeded(client):
    """The gateway answers shortly before the deadline, so that its response is there in time: on a
    machine that is busy with other things, not always."""
    for _ in range(3):
        batches = len(client.simulator.ledger())
        client.simulator.inject("silence-after-create")
        began = time.monotonic()
        result = client.player.create(seconds=1)
        took = time.monotonic() - began
        assert result["code"] == "DEADLINE_EXCEEDED"
        assert 0.9 < took < 3
        assert len(client.simulator.ledger()) - batches == 1
        if "status" in result:
            failure = Failure("", "DEADLINE_EXCEEDED", "DEADLINE_AFTER_SENDING", "UNKNOWN")
            return assert_failure(result, failure)
    raise AssertionError("three times the client's own deadline was faster than the gateway")


@each_client()
def test_the_batch_of_a_caller_who_left_is_logged(client):
    batches = len(client.simulator.ledger())
    client.simulator.inject("delay-1500")
    assert client.player.create(cancelAfter=0.3)["code"] == "CANCELLED"
    wait_until("the batch", lambda: len(client.simulator.ledger()) > batches, 5)
    ledger = client.simulator.ledger()
    assert len(ledger) - batches == 1

    def warning():
        lines = client.gateway.log.read_text().splitlines()
        return any("WARN" in line and ledger[-1]["id"] in line for line in lines)

    wait_until("a warning that names the batch", warning, 5)
    assert client.gateway.metric("aep_gateway_abandoned_calls_total", outcome="APPLIED") == 1
    response_of(client.player.create())


@each_client()
def test_an_error_may_be_longer_than_metadata_and_not_in_ascii(client):
    result = client.player.create({"datasetId": "long-error"}, address=client.api_gateway.address)
    assert_failure(result, Failure("", "INVALID_ARGUMENT", "API_INVALID_REQUEST"))
    assert "Größe überschritten 🚫 100 %" in result["message"]
    detail = details_of(result)["ErrorInfo"]["metadata"]["upstreamDetail"]
    assert detail.startswith("Größe überschritten 🚫 100 % Größe")


@each_client()
def test_resource_exhausted_is_not_retried_within_a_long_deadline(client):
    """A pushback would order a retry, whatever the service config says (grpc-java)."""
    calls, requests = started(client.api_gateway), len(client.api.received)
    began = time.monotonic()
    result = client.player.create(
        {"datasetId": "limited"}, address=client.api_gateway.address, seconds=120
    )
    took = time.monotonic() - began
    assert_failure(result, Failure("", "RESOURCE_EXHAUSTED", "API_RATE_LIMITED", retry="30s"))
    assert started(client.api_gateway) - calls == 1
    assert len(client.api.received) - requests == 1
    assert took < 15


@each_client()
def test_an_api_that_asks_for_more_time_than_there_is_is_unavailable(client):
    result = client.player.create({"datasetId": "busy"}, address=client.api_gateway.address, seconds=3)
    assert_failure(result, Failure("", "UNAVAILABLE", "API_UNAVAILABLE", retry="30s"))


@each_client()
def test_every_field_of_the_request_and_of_the_response_arrives(client):
    response = response_of(client.player.create(samples.REQUEST, address=client.api_gateway.address))
    assert client.api.received[-1] == samples.REST_REQUEST
    assert response == samples.RESPONSE


@each_client()
def test_a_tag_without_values_is_kept(client):
    result = client.player.create({"datasetId": "empty-tag"}, address=client.api_gateway.address)
    batch = response_of(result)["batch"]
    assert batch["tags"] == {"one": {"values": ["1"]}}
    assert batch["extra"] == {"tags": {"one": ["1"], "none": []}}


@each_client()
def test_a_response_equals_the_ledger_and_is_not_in_ascii(client):
    request = {**samples.REQUEST, "datasetId": "日本", "externalId": f"🦀 {uuid.uuid4()}"}
    response = response_of(client.player.create(request))
    batch, row = response["batch"], client.simulator.ledger()[-1]
    assert response["origin"] == "BATCH_ORIGIN_CREATED"
    for name in ["id", "imsOrg", "externalId", "inputFormat", "replay", "version"]:
        assert batch[name] == row[name]
    for name in ["inputFormat", "replay"]:
        assert row[name] == request[name]
    assert {tag: of.get("values", []) for tag, of in batch["tags"].items()} == row["tags"]
    assert row["tags"][samples.FAMILY] == samples.REST_REQUEST["tags"][samples.FAMILY]
    assert batch["relatedObjects"] == [{"type": "dataSet", "id": "日本"}]
    for name in ["created", "updated"]:
        instant = datetime.fromisoformat(batch[name].replace("Z", "+00:00"))
        assert round(instant.timestamp() * 1000) == row[name]


@each_client()
def test_the_same_external_id_finds_the_batch(client):
    request = {"datasetId": "a", "externalId": str(uuid.uuid4())}
    batches = len(client.simulator.ledger())
    first, second = (response_of(client.player.create(request)) for _ in range(2))
    assert second["batch"]["id"] == first["batch"]["id"]
    assert second["origin"] == "BATCH_ORIGIN_FOUND"
    assert len(client.simulator.ledger()) - batches == 1


@each_client()
def test_a_lost_response_with_an_idempotency_key_is_recovered(client):
    batches = len(client.simulator.ledger())
    client.simulator.inject("reset-after-create")
    key = ["idempotency-key", str(uuid.uuid4())]
    response = response_of(client.player.create(metadata=[*CREDENTIALS, key]))
    ledger = client.simulator.ledger()
    assert response["origin"] == "BATCH_ORIGIN_RECOVERED"
    assert response["batch"]["id"] == ledger[-1]["id"]
    assert len(ledger) - batches == 1


@each_client()
def test_a_batch_can_be_read(client):
    created = response_of(client.player.create({"datasetId": "a", "externalId": str(uuid.uuid4())}))
    result = client.player.call("GetBatch", {"batchId": created["batch"]["id"]})
    assert response_of(result) == {"batch": created["batch"]}
    assert "aep-batch-outcome" not in metadata_of(result)


@each_client()
def test_every_field_of_a_batch_can_be_read(client):
    order = {"address": client.api_gateway.address}
    result = client.player.call("GetBatch", {"batchId": samples.REST_BATCH["id"]}, **order)
    assert response_of(result) == {"batch": samples.RESPONSE["batch"]}


@each_client()
def test_a_batch_that_does_not_exist_is_not_found(client):
    """Catalog answers 404; an empty object, as `api_gateway` gets it, is understood too."""
    for address in (client.gateway.address, client.api_gateway.address):
        result = client.player.call("GetBatch", {"batchId": "nothing"}, address=address)
        assert_failure(result, Failure("", "NOT_FOUND", "BATCH_NOT_FOUND", None))


@each_client()
def test_batches_are_listed_by_pages(client):
    """The newest first. A token of other filters is refused."""
    dataset = str(uuid.uuid4())
    created = [response_of(client.player.create({"datasetId": dataset}))["batch"] for _ in range(3)]
    filters = {"datasetId": dataset, "pageSize": 2}
    first = response_of(client.player.call("ListBatches", filters))
    token = {"pageToken": first["nextPageToken"]}
    last = response_of(client.player.call("ListBatches", {**filters, **token}))
    assert len(first["batches"]) == 2
    assert first["batches"] + last["batches"] == created[::-1]
    assert not last.get("nextPageToken")

    result = client.player.call("ListBatches", {**filters, **token, "datasetId": "other"})
    assert_failure(
        result, Failure("", "INVALID_ARGUMENT", "INVALID_REQUEST", None, fields=["page_token"])
    )


@each_client()
def test_every_filter_of_a_list_arrives(client):
    order = {"address": client.api_gateway.address}
    first = response_of(client.player.call("ListBatches", samples.LIST_REQUEST, **order))
    assert samples.LIST_QUERY.items() <= client.api.queries[-1].items()
    assert first["batches"] == [samples.RESPONSE["batch"]]
    request = {**samples.LIST_REQUEST, "pageToken": first["nextPageToken"]}
    # The API shows the same batch again.
    assert response_of(client.player.call("ListBatches", request, **order)) == {}


@each_client()
def test_request_id_and_outcome_are_metadata(client):
    result = client.player.create(metadata=[*CREDENTIALS, ["x-request-id", "my-own-1"]])
    response_of(result)
    assert result["headers"]["x-request-id"] == "my-own-1"
    assert metadata_of(result)["aep-batch-outcome"] == "APPLIED"
    result = client.player.create()
    response_of(result)
    uuid.UUID(result["headers"]["x-request-id"])  # one is made up


@each_client()
def test_metadata_may_have_16_kib(client):
    token = ["authorization", "Bearer " + "t" * 15_500]
    response_of(client.player.create(metadata=[token, *without("authorization")]))


@each_client()
def test_a_slow_response_has_its_outcome_in_trailers(client):
    """Its headers leave before its end is known."""
    client.simulator.inject("delay-300")
    result = client.player.create(metadata=[*CREDENTIALS, ["x-request-id", "slow-1"]])
    response_of(result)
    assert result["headers"]["x-request-id"] == "slow-1"
    assert result["trailers"]["aep-batch-outcome"] == "APPLIED"


@each_client()
def test_a_message_may_have_255_kib(client):
    value = "日本" * (255 * 1024 // 6)
    request = {"datasetId": "a", "tags": {"t": {"values": [value]}}}
    response = response_of(client.player.create(request))
    # Without the messages of a failed comparison, which would take minutes.
    assert bool(response["batch"]["tags"]["t"]["values"] == [value])
    assert bool(client.simulator.ledger()[-1]["tags"]["t"] == [value])


@each_client()
def test_a_message_may_be_compressed(client):
    size = 100_000
    request = {"datasetId": "a", "tags": {"t": {"values": ["x" * size]}}}
    name = "grpc_server_call_rcvd_total_compressed_message_size_bytes_sum"
    before = client.gateway.metric(name)
    response = response_of(client.player.create(request, compression="gzip"))
    assert len(response["batch"]["tags"]["t"]["values"][0]) == size
    assert 0 < client.gateway.metric(name) - before < size / 10


@each_client()
@pytest.mark.parametrize("service", ["", SERVICE], ids=["server", "service"])
@pytest.mark.parametrize("call", ["check", "watch"])
def test_health_is_serving(client, service, call):
    assert client.player.do(call, service=service) == {"status": "SERVING"}


@each_client()
def test_the_health_of_an_unknown_service_is_not_found(client):
    assert client.player.do("check", service="nothing")["code"] == "NOT_FOUND"


@each_client("reflection")
def test_reflection_shows_the_services(client):
    for version in client.language.reflection:
        result = client.player.do("reflect", version=version, service=SERVICE)
        assert result["methods"] == METHODS, version
        assert {SERVICE, "grpc.health.v1.Health"} <= {*result["services"]}, version


@each_client("loads_descriptors")
def test_the_descriptor_set_loads_where_google_rpc_is_known(client, descriptors):
    files = {
        "aep.ingestion.v1.BatchService": "aep/ingestion/v1/batch_service.proto",
        "google.rpc.ErrorInfo": "google/rpc/error_details.proto",
        "google.rpc.Status": "google/rpc/status.proto",
    }
    assert client.player.do("load", set=str(descriptors), names=[*files]) == files


@each_client()
def test_after_all_that_the_gateway_has_no_call_in_flight_and_met_no_bug(client):
    assert client.gateway.metric("aep_gateway_calls_in_flight") == 0
    assert client.gateway.metric("aep_gateway_outcomes_total", reason="GATEWAY_FAILED") == 0
    response_of(client.player.create())


@each_client()
def test_an_idle_connection_lives_on_keepalive_pings(client):
    """A ping every 10 s while other tests run, then a call on the same connection."""
    response_of(client.first_call)
    time.sleep(max(0, client.idle_since + IDLE - time.monotonic()))
    pings, pongs = client.relay.from_client[wire.PING, False], client.relay.from_gateway[wire.PING, True]
    assert 2 <= pongs == pings
    response_of(client.call_through_relay())
    assert client.relay.connections == 1
    assert client.relay.from_gateway[wire.GOAWAY, False] == 0
