"""What every client library must see of the gateway."""

import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import samples
import wire
from gateway import CREDENTIALS, Gateway, Player
from report import Report, patiently

SERVICE = "aep.ingestion.v1.BatchService"
LIMIT = 256 * 1024  # bytes that a message may have
PINGS_EVERY = 10  # seconds: the shortest interval that all the libraries allow
IDLE = 24  # seconds without a call, so at least two pings
LONG = "Größe überschritten 🚫 100 %\n" * 500  # what an API may say of an error

ANSWERS = {
    "every-field": (201, samples.REST_ANSWER),
    "empty-tag": (201, {"id": "1", "tags": {"one": ["1"], "none": []}}),
    "long-error": (400, {"title": LONG, "detail": LONG, "report": LONG}),
    "limited": (429, {"error_code": "429001", "message": "Too many requests"}, {"retry-after": "30"}),
    "busy": (503, {"error_code": "503000", "message": "busy"}, {"retry-after": "30"}),
}


@dataclass
class Failure:
    """A call, what goes wrong with it, and what its caller must be told."""

    name: str
    code: str
    reason: str
    outcome: str = "NOT_APPLIED"
    order: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    batches: int = 0  # that it makes nevertheless
    tries: int = 1  # of the client
    fields: list[str] = field(default_factory=list)  # in BadRequest
    details: list[str] = field(default_factory=list)  # besides ErrorInfo
    retry: str | None = None  # in RetryInfo
    info: dict[str, str] = field(default_factory=dict)  # in ErrorInfo.metadata


def keyed() -> dict:
    """A request that a client may repeat: one without an external id gets its headers before
    anything is sent."""
    return {"datasetId": "a", "externalId": str(uuid.uuid4())}


def without(*names: str) -> list[list[str]]:
    return [pair for pair in CREDENTIALS if pair[0] not in names]


TOKEN_EXPIRED = [["authorization", "Bearer expired"], *without("authorization")]
TOO_LARGE = {"datasetId": "a", "tags": {"t": {"values": ["x" * LIMIT]}}}
# The gateway itself repeats a 429 or 503, as far as its budget of retries goes.
ENOUGH = 9

FAILURES = [
    Failure(
        "a bad message",
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        order={"request": {"partialIngestionPercent": 101}},
        fields=["dataset_id", "partial_ingestion_percent"],
    ),
    Failure(
        "missing credentials",
        "UNAUTHENTICATED",
        "CREDENTIALS_MISSING",
        order={"metadata": without("x-api-key", "x-sandbox-name")},
        fields=["x-api-key", "x-sandbox-name"],
    ),
    Failure(
        "a credential given twice",
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        order={"metadata": [*CREDENTIALS, ["x-api-key", "other"]]},
        fields=["x-api-key"],
    ),
    Failure(
        "an expired token",
        "UNAUTHENTICATED",
        "API_UNAUTHENTICATED",
        order={"metadata": TOKEN_EXPIRED},
        details=["Help"],
        info={"httpStatus": "401", "upstreamErrorCode": "401013"},
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
        "HTTP 429",
        "RESOURCE_EXHAUSTED",
        "API_RATE_LIMITED",
        # The API asks for 2 s, so neither gateway nor client has the time to repeat it.
        order={"seconds": 1.5},
        faults=["status-429"],
        details=["QuotaFailure", "Help"],
        retry="2s",
    ),
    Failure(
        "HTTP 503",
        "UNAVAILABLE",
        "API_UNAVAILABLE",
        order={"seconds": 30, "request": {"datasetId": "a", "externalId": "busy"}},
        faults=["status-503"] * ENOUGH,
        tries=3,
        details=["Help"],
        retry="1s",
    ),
    Failure("HTTP 503 of a proxy", "UNKNOWN", "UPSTREAM_FAILED", "UNKNOWN", faults=["proxy-503"]),
    Failure(
        "a batch whose answer a proxy lost",
        "UNKNOWN",
        "UPSTREAM_FAILED",
        "UNKNOWN",
        faults=["lost-504"],
        batches=1,
        info={"httpStatus": "504"},
    ),
    Failure(
        "a connection that breaks after the batch was created",
        "UNKNOWN",
        "CONNECTION_LOST",
        "UNKNOWN",
        faults=["reset-after-create"],
        batches=1,
    ),
    Failure(
        "an answer that is no batch",
        "UNKNOWN",
        "ANSWER_UNUSABLE",
        "APPLIED",
        faults=["empty-answer"],
        batches=1,
        info={"batchId": "(the last in the ledger)"},
    ),
    Failure(
        "a redirect",
        "FAILED_PRECONDITION",
        "API_REDIRECTED",
        faults=["redirect"],
        info={"redirectHost": "localhost"},
    ),
    Failure(
        "a look-up that is forbidden",
        "PERMISSION_DENIED",
        "LOOKUP_FORBIDDEN",
        order={"request": {"datasetId": "a", "externalId": "forbidden"}},
        faults=["lookup-403"],
        info={"externalId": "forbidden"},
    ),
    Failure(
        "a message that is too large",
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
        order={"request": TOO_LARGE},
    ),
    Failure(
        "an unknown method",
        "UNIMPLEMENTED",
        "UNSUPPORTED",
        order={"path": f"/{SERVICE}/DropBatch"},
    ),
    Failure(
        "an unknown service",
        "UNIMPLEMENTED",
        "UNSUPPORTED",
        order={"path": "/aep.ingestion.v2.BatchService/CreateBatch"},
    ),
]


def play(report: Report, gateway: Gateway, api_gateway: Gateway, api: wire.Api, player: Player):
    with report.check("UNAVAILABLE is retried until the call succeeds"):
        patiently(lambda: retried_until_ok(gateway, player))
    for failure in FAILURES:
        with report.check(f"{failure.code}: {failure.name}"):
            if failure.tries > 1:
                patiently(lambda: fails(gateway, player, failure))
            else:
                fails(gateway, player, failure)
    with report.check("ALREADY_EXISTS: an external id with other content"):
        external_id_taken(gateway, player)
    with report.check("DEADLINE_EXCEEDED: an API that is silent"):
        deadline_passes(gateway, player)
    with report.check("CANCELLED: the batch of a caller who left is logged"):
        cancelled(gateway, player)
    with report.check("an error longer than metadata may be, and not in ASCII"):
        long_error(api_gateway, player)

    with report.check("RESOURCE_EXHAUSTED: a call with a long deadline is not repeated"):
        rate_limited(api_gateway, api, player)
    with report.check("UNAVAILABLE: an API that asks for more time than there is"):
        told = player.create({"datasetId": "busy"}, address=api_gateway.address, seconds=3)
        assert_failure(told, Failure("", "UNAVAILABLE", "API_UNAVAILABLE", retry="30s"))

    with report.check("every field of the request and of the answer"):
        every_field(api_gateway, api, player)
    with report.check("a tag without values"):
        told = player.create({"datasetId": "empty-tag"}, address=api_gateway.address)
        batch = assert_ok(told)["batch"]
        assert_equal(batch["tags"], {"one": {"values": ["1"]}}, "tags")
        assert_equal(batch["extra"], {"tags": {"one": ["1"], "none": []}}, "extra")
    with report.check("an answer equals the ledger, and is not in ASCII"):
        equals_ledger(gateway, player)
    with report.check("the same external id: the batch is found"):
        found(gateway, player)
    with report.check("a lost answer with an idempotency key: the batch is recovered"):
        recovered(gateway, player)
    with report.check("metadata: request id, outcome"):
        metadata(gateway, player)
    with report.check("metadata of 16 KiB"):
        big = [["authorization", "Bearer " + "t" * 15_500], *without("authorization")]
        assert_ok(player.create(metadata=big))
    with report.check("an answer that takes its time"):
        slow_answer(gateway, player)
    with report.check("a message of 255 KiB"):
        large(gateway, player)
    with report.check("a compressed message"):
        compressed(gateway, player)
    health(report, player)
    reflection(report, player)
    with report.check("the gateway is as it was"):
        assert_equal(gateway.metric("aep_gateway_calls_in_flight"), 0, "calls in flight")
        failed = gateway.metric("aep_gateway_creates_total", reason="GATEWAY_FAILED")
        assert_equal(failed, 0, "GATEWAY_FAILED")
        assert_ok(player.create())


class Keepalive:
    """A connection that has no call for a while, during which other checks may run."""

    def __init__(self, gateway: Gateway, player: Player) -> None:
        self.relay = wire.Relay(gateway.address)
        self.player = player
        self.first = self.call()
        self.idle_since = time.monotonic()

    def call(self) -> dict:
        return self.player.create(address=self.relay.address, keepalive=PINGS_EVERY)

    def end(self, report: Report) -> None:
        name = f"keepalive: pings every {PINGS_EVERY} s, then a call on the same connection"
        with report.check(name):
            assert_ok(self.first)
            time.sleep(max(0, self.idle_since + IDLE - time.monotonic()))
            pings = self.relay.from_client[wire.PING, False]
            pongs = self.relay.from_gateway[wire.PING, True]
            assert 2 <= pongs == pings, f"{pings} pings, of which {pongs} were answered"
            assert_ok(self.call())
            assert_equal(self.relay.connections, 1, "connections")
            assert_equal(self.relay.from_gateway[wire.GOAWAY, False], 0, "GOAWAY")
        self.relay.stop()


def assert_ok(told: dict) -> dict:
    assert told["code"] == "OK", f"{told['code']}: {told.get('message')}"
    return told["answer"]


def assert_equal(got, wanted, what: str) -> None:
    assert got == wanted, f"{what}: got {short(got)}, not {short(wanted)}"


def short(value) -> str:
    text = repr(value)
    return text if len(text) < 3000 else text[:3000] + "…"


def details_of(told: dict) -> dict[str, dict]:
    """The details of an error by their short names."""
    assert "status" in told, f"no details: {short(told)}"
    details = told["status"]["details"]
    return {detail["@type"].rpartition(".")[2]: detail for detail in details}


def started(gateway: Gateway) -> float:
    return gateway.metric("grpc_server_started_total")


def fails(gateway: Gateway, player: Player, failure: Failure) -> None:
    calls, batches = started(gateway), len(gateway.batches())
    gateway.order(*failure.faults)
    request_id = str(uuid.uuid4())
    order = {"metadata": CREDENTIALS, **failure.order}
    order["metadata"] = [*order["metadata"], ["x-request-id", request_id]]
    try:
        told = player.create(**order)
    finally:
        gateway.forget_faults()
    ledger = gateway.batches()
    assert_failure(told, failure)
    assert_equal(len(ledger) - batches, failure.batches, "new batches")
    if "aep.ingestion.v2" not in order.get("path", ""):  # is not counted
        assert_equal(started(gateway) - calls, failure.tries, "tries")

    details = details_of(told)
    for name, value in failure.info.items():
        wanted = ledger[-1]["id"] if name == "batchId" else value
        assert_equal(details["ErrorInfo"]["metadata"].get(name), wanted, name)
    if "aep.ingestion.v2" not in order.get("path", ""):  # no service that has ids
        assert_equal(details["RequestInfo"]["requestId"], request_id, "RequestInfo")
        assert_equal(every_metadata(told)["x-request-id"], request_id, "x-request-id")


def every_metadata(told: dict) -> dict[str, str]:
    return {**(told["headers"] or {}), **told["trailers"]}


def assert_failure(told: dict, failure: Failure) -> None:
    assert_equal(told["code"], failure.code, "code")
    details = details_of(told)
    info = details["ErrorInfo"]
    assert_equal(info["reason"], failure.reason, "reason")
    assert_equal(info["domain"], "aep-batch-gateway", "domain")
    assert_equal(info["metadata"]["outcome"], failure.outcome, "outcome")
    assert_equal(every_metadata(told)["aep-batch-outcome"], failure.outcome, "aep-batch-outcome")
    assert_equal(told["message"], told["status"]["message"], "message")
    if told["headers"] is not None:  # the library tells them apart
        twice = {"aep-batch-outcome", "x-request-id"} & {*told["headers"]} & {*told["trailers"]}
        assert_equal(twice, set(), "told in headers and trailers")
        # What may be repeated comes as Trailers-Only, all else as headers that say "do not". An
        # answer that took 100 ms (a busy machine) has got its headers early, with the request id.
        if "x-request-id" not in told["headers"]:
            assert_equal(bool(told["headers"]), failure.outcome != "NOT_APPLIED", "has headers")
    violations = details.get("BadRequest", {}).get("fieldViolations", [])
    assert_equal([violation["field"] for violation in violations], failure.fields, "BadRequest")
    assert_equal(details.get("RetryInfo", {}).get("retryDelay"), failure.retry, "RetryInfo")
    for name in failure.details:
        assert name in details, f"no {name}: {short(told)}"


def retried_until_ok(gateway: Gateway, player: Player) -> None:
    unavailable = {"grpc_code": "Unavailable"}
    before = gateway.metric("grpc_server_handled_total", **unavailable)
    batches = len(gateway.batches())
    gateway.order("status-503", "status-503")
    assert_ok(player.create(keyed(), seconds=30))
    assert gateway.metric("grpc_server_handled_total", **unavailable) > before, "no retry"
    assert_equal(len(gateway.batches()) - batches, 1, "new batches")


def external_id_taken(gateway: Gateway, player: Player) -> None:
    external_id = str(uuid.uuid4())
    first = assert_ok(player.create({"datasetId": "a", "externalId": external_id}))
    info = {"batchId": first["batch"]["id"], "externalId": external_id}
    order = {"request": {"datasetId": "b", "externalId": external_id}}
    told = player.create(**order)
    assert_failure(told, Failure("", "ALREADY_EXISTS", "EXTERNAL_ID_TAKEN"))
    got = details_of(told)["ErrorInfo"]["metadata"]
    assert_equal({name: got.get(name) for name in info}, info, "ErrorInfo.metadata")


def deadline_passes(gateway: Gateway, player: Player) -> None:
    """The gateway answers shortly before the deadline, so that its answer is there in time:
    on a machine that is busy with other things, not always."""
    for attempt in range(3):
        batches = len(gateway.batches())
        gateway.order("silence-after-create")
        begun = time.monotonic()
        told = player.create(seconds=1)
        took = time.monotonic() - begun
        assert_equal(told["code"], "DEADLINE_EXCEEDED", "code")
        assert 0.9 < took < 3, f"after {took} s"
        assert_equal(len(gateway.batches()) - batches, 1, "new batches")
        if "status" in told:
            failure = Failure("", "DEADLINE_EXCEEDED", "DEADLINE_AFTER_SENDING", "UNKNOWN")
            return assert_failure(told, failure)
    raise AssertionError("three times the client's own deadline was faster than the gateway")


def cancelled(gateway: Gateway, player: Player) -> None:
    batches = len(gateway.batches())
    gateway.order("delay-1500")
    told = player.create(cancelAfter=0.3)
    assert_equal(told["code"], "CANCELLED", "code")
    line = wait_for_line(gateway.log, "create completed after the client disconnected")
    ledger = gateway.batches()
    assert_equal(len(ledger) - batches, 1, "new batches")
    assert ledger[-1]["id"] in line, f"the log does not name the batch: {line}"
    assert_equal(
        gateway.metric("aep_gateway_abandoned_creates_total", outcome="APPLIED"), 1, "abandoned"
    )
    assert_ok(player.create())


def wait_for_line(log: Path, text: str) -> str:
    for _ in range(100):
        for line in log.read_text().splitlines():
            if text in line:
                return line
        time.sleep(0.05)
    raise AssertionError(f"not in the log: {text}")


def long_error(api_gateway: Gateway, player: Player) -> None:
    told = player.create({"datasetId": "long-error"}, address=api_gateway.address)
    assert_failure(told, Failure("", "INVALID_ARGUMENT", "API_INVALID_REQUEST"))
    assert "Größe überschritten 🚫 100 %" in told["message"], told["message"]
    got = details_of(told)["ErrorInfo"]["metadata"]
    assert got["upstreamDetail"].startswith("Größe überschritten 🚫 100 % Größe"), short(got)


def rate_limited(api_gateway: Gateway, api: wire.Api, player: Player) -> None:
    """A pushback would order a retry, whatever the service config says (grpc-java)."""
    calls, requests, begun = started(api_gateway), len(api.received), time.monotonic()
    told = player.create({"datasetId": "limited"}, address=api_gateway.address, seconds=120)
    took = time.monotonic() - begun
    assert_failure(told, Failure("", "RESOURCE_EXHAUSTED", "API_RATE_LIMITED", retry="30s"))
    assert_equal(started(api_gateway) - calls, 1, "calls")
    assert_equal(len(api.received) - requests, 1, "requests to the API")
    assert took < 15, f"after {took} s"


def every_field(api_gateway: Gateway, api: wire.Api, player: Player) -> None:
    answer = assert_ok(player.create(samples.REQUEST, address=api_gateway.address))
    assert_equal(api.received[-1], samples.REST_REQUEST, "what the API got")
    assert_equal(answer, samples.ANSWER, "what the client got")


def equals_ledger(gateway: Gateway, player: Player) -> None:
    request = {**samples.REQUEST, "datasetId": "日本", "externalId": f"🦀 {uuid.uuid4()}"}
    answer = assert_ok(player.create(request))
    batch, row = answer["batch"], gateway.batches()[-1]
    assert_equal(answer["origin"], "BATCH_ORIGIN_CREATED", "origin")
    for name in ["id", "imsOrg", "externalId", "inputFormat", "replay", "version"]:
        assert_equal(batch[name], row[name], name)
    for name in ["inputFormat", "replay"]:
        assert_equal(row[name], request[name], name)
    assert_equal({tag: of.get("values", []) for tag, of in batch["tags"].items()}, row["tags"], "tags")
    assert_equal(row["tags"][samples.FAMILY], samples.REST_REQUEST["tags"][samples.FAMILY], "tags")
    assert_equal(batch["relatedObjects"], [{"type": "dataSet", "id": "日本"}], "relatedObjects")
    for name in ["created", "updated"]:
        instant = datetime.fromisoformat(batch[name].replace("Z", "+00:00"))
        assert_equal(round(instant.timestamp() * 1000), row[name], name)


def found(gateway: Gateway, player: Player) -> None:
    request = {"datasetId": "a", "externalId": str(uuid.uuid4())}
    batches = len(gateway.batches())
    first, second = (assert_ok(player.create(request)) for _ in range(2))
    assert_equal(second["batch"]["id"], first["batch"]["id"], "id")
    assert_equal(second["origin"], "BATCH_ORIGIN_FOUND", "origin")
    assert_equal(len(gateway.batches()) - batches, 1, "new batches")


def recovered(gateway: Gateway, player: Player) -> None:
    batches = len(gateway.batches())
    gateway.order("reset-after-create")
    key = ["idempotency-key", str(uuid.uuid4())]
    answer = assert_ok(player.create(metadata=[*CREDENTIALS, key]))
    ledger = gateway.batches()
    assert_equal(answer["origin"], "BATCH_ORIGIN_RECOVERED", "origin")
    assert_equal(answer["batch"]["id"], ledger[-1]["id"], "id")
    assert_equal(len(ledger) - batches, 1, "new batches")


def metadata(gateway: Gateway, player: Player) -> None:
    told = player.create(metadata=[*CREDENTIALS, ["x-request-id", "my-own-1"]])
    assert_ok(told)
    assert_equal(told["headers"]["x-request-id"], "my-own-1", "x-request-id")
    assert_equal(every_metadata(told)["aep-batch-outcome"], "APPLIED", "aep-batch-outcome")
    told = player.create()
    assert_ok(told)
    uuid.UUID(told["headers"]["x-request-id"])  # one is made up


def slow_answer(gateway: Gateway, player: Player) -> None:
    """Its headers leave before its end is known, so the outcome comes later."""
    gateway.order("delay-300")
    told = player.create(metadata=[*CREDENTIALS, ["x-request-id", "slow-1"]])
    assert_ok(told)
    assert_equal(told["headers"]["x-request-id"], "slow-1", "x-request-id")
    assert_equal(told["trailers"]["aep-batch-outcome"], "APPLIED", "aep-batch-outcome")


def large(gateway: Gateway, player: Player) -> None:
    value = "日本" * (255 * 1024 // 6)
    answer = assert_ok(player.create({"datasetId": "a", "tags": {"t": {"values": [value]}}}))
    assert answer["batch"]["tags"]["t"]["values"] == [value], "the tag is another"
    assert gateway.batches()[-1]["tags"]["t"] == [value], "the tag in the ledger is another"


def compressed(gateway: Gateway, player: Player) -> None:
    size = 100_000
    request = {"datasetId": "a", "tags": {"t": {"values": ["x" * size]}}}
    name = "grpc_server_call_rcvd_total_compressed_message_size_bytes_sum"
    before = gateway.metric(name)
    answer = assert_ok(player.create(request, compression="gzip"))
    assert_equal(len(answer["batch"]["tags"]["t"]["values"][0]), size, "length")
    came = gateway.metric(name) - before
    assert 0 < came < size / 10, f"{came} bytes came"


def health(report: Report, player: Player) -> None:
    for service in ["", SERVICE]:
        with report.check(f"health: Check {service or 'of the server'}"):
            assert_equal(player.tell("check", service=service), {"status": "SERVING"}, "answer")
        with report.check(f"health: Watch {service or 'of the server'}"):
            assert_equal(player.tell("watch", service=service), {"status": "SERVING"}, "answer")
    with report.check("health: NOT_FOUND for an unknown service"):
        assert_equal(player.tell("check", service="nothing")["code"], "NOT_FOUND", "code")


def reflection(report: Report, player: Player) -> None:
    for version in player.reflection:
        with report.check(f"reflection {version}"):
            told = player.tell("reflect", version=version, service=SERVICE)
            assert_equal(told.get("methods"), ["CreateBatch"], "methods")
            assert {SERVICE, "grpc.health.v1.Health"} <= set(told["services"]), short(told)
