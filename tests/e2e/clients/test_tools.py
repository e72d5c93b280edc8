"""grpcurl, grpcui, buf curl and protoc, as a person would use them."""

import base64
import json
import os
import re
import sys
import urllib.request
from http.cookiejar import CookieJar
from importlib.util import find_spec
from pathlib import Path

import pytest
from client import install
from commands import LIMIT, documented, run
from harness import process
from harness.process import ROOT, Program, wait_until
from harness.programs import Programs
from player import CREDENTIALS

SERVICE = "aep.ingestion.v1.BatchService"
METHOD = f"{SERVICE}/CreateBatch"
REQUEST = '{"dataset_id": "5c8c3c555033b814b69f947f"}'
HEADERS = [part for name, value in CREDENTIALS for part in ["-H", f"{name}: {value}"]]
CREATED = r'"status": "BATCH_STATUS_LOADING"'
LOST = ["reset-after-create"]
LOST_IN_TEXT = r'Code: Unknown\n.*"outcome": "UNKNOWN".*"reason": "CONNECTION_LOST"'
PROTO = "aep/ingestion/v1/batch_service.proto"

@pytest.fixture(scope="module")
def programs(binary):
    with Programs(binary, "tools") as programs:
        yield programs


@pytest.fixture(scope="module")
def simulator(programs):
    return programs.simulator()


@pytest.fixture(scope="module")
def gateway(programs, simulator):
    return programs.gateway(simulator, request_timeout=20)


@pytest.fixture(scope="module")
def grpcurl(simulator):
    """Runs grpcurl: `grpcurl(*arguments, faults=(), **environment)`."""
    command = [str(install("grpcurl") / "bin/grpcurl"), "-plaintext", "-max-time", str(LIMIT)]
    return lambda *arguments, **how: run(simulator, [*command, *arguments], **how)


@pytest.fixture(scope="module")
def buf_curl(simulator):
    """Runs `buf curl`, as `grpcurl` does."""
    buf = str(install("buf") / "node_modules/.bin/buf")
    command = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    return lambda *arguments, **how: run(simulator, [*command, *arguments], **how)


@pytest.fixture(scope="module")
def create(gateway):
    """The end of grpcurl's command lines."""
    return [*HEADERS, "-d", REQUEST, gateway.address, METHOD]


@pytest.mark.parametrize("has, code, printed", [
    ("grpcurl -plaintext", 0, CREATED), ("simulator/fault", 64 + 2, LOST_IN_TEXT), ("buf curl", 0, CREATED),
])  # fmt: skip
def test_the_documented_command_makes_its_call(simulator, gateway, has, code, printed):
    tools = install("buf" if has == "buf curl" else "grpcurl")
    path = f"{tools}/bin:{tools}/node_modules/.bin:{os.environ['PATH']}"
    ran = run(simulator, ["sh", "-c", documented("sh", has, gateway)], PATH=path)
    ran.check(code, 1, printed)


def test_grpcurl_lists_the_services(grpcurl, gateway):
    services = f"^{SERVICE}\ngrpc.health.v1.Health\ngrpc.reflection.v1.ServerReflection$"
    grpcurl(gateway.address, "list").check(0, 0, services)


def test_grpcurl_describes_the_service_with_its_comments(grpcurl, gateway):
    printed = r"// Creates a batch, .*rpc CreateBatch \( \.aep\.ingestion\.v1\.CreateBatchRequest \)"
    grpcurl(gateway.address, "describe", SERVICE).check(0, 0, printed)


def test_grpcurl_makes_a_template_of_a_message(grpcurl, gateway):
    message = "aep.ingestion.v1.CreateBatchRequest"
    ran = grpcurl("-msg-template", gateway.address, "describe", message)
    ran.check(0, 0, r'Message template:\n{\n  "datasetId": ""')


def test_grpcurl_calls_with_the_schema_of_the_source(grpcurl, create):
    grpcurl("-import-path", "proto", "-proto", PROTO, *create).check(0, 1, CREATED)


def test_grpcurl_calls_with_the_schema_of_the_binary(grpcurl, create, descriptors):
    grpcurl("-protoset", str(descriptors), *create).check(0, 1, CREATED)


def test_grpcurl_takes_the_token_from_the_environment(grpcurl, create):
    token = ["-expand-headers", "-H", "authorization: Bearer ${TOKEN}"]
    grpcurl(*token, *create[2:], TOKEN="demo").check(0, 1, CREATED)
    grpcurl(*token, *create[2:], TOKEN="expired").check(64 + 16, 0, '"API_UNAUTHENTICATED"')


def test_grpcurl_shows_metadata(grpcurl, create):
    ran = grpcurl("-v", "-H", "x-request-id: mine-1", *create)
    ran.check(0, 1, "aep-batch-outcome: APPLIED\n")
    assert "x-request-id: mine-1\n" in ran.text.partition("received:")[2]


def test_grpcurl_shows_the_details_of_an_error_in_plain_text(grpcurl, create):
    grpcurl(*create, faults=LOST).check(64 + 2, 1, LOST_IN_TEXT)


def test_grpcurl_shows_the_details_of_an_error_as_json(grpcurl, gateway):
    ran = grpcurl("-format-error", *HEADERS, "-d", "{}", gateway.address, METHOD)
    ran.check(64 + 3, 0, r'"code": 3,.*"field": "dataset_id"')


def test_grpcurl_refuses_a_name_that_the_message_does_not_have(grpcurl, gateway):
    ran = grpcurl(*HEADERS, "-d", '{"dataset": "a"}', gateway.address, METHOD)
    ran.check(1, 0, "has no known field named dataset")


def test_grpcurl_sets_a_deadline(grpcurl, create):
    ran = grpcurl("-max-time", "1", *create, faults=["silence-after-create"])
    ran.check(64 + 4, 1, "Code: DeadlineExceeded\n")


def test_grpcurl_asks_for_health(grpcurl, gateway):
    grpcurl(gateway.address, "grpc.health.v1.Health/Check").check(0, 0, '"status": "SERVING"')


@pytest.mark.parametrize("schema", ["reflection", "the binary"])
def test_grpcui_shows_the_details_of_an_error(programs, simulator, gateway, descriptors, schema):
    protoset = [] if schema == "reflection" else ["-protoset", descriptors]
    program = install("grpcui") / "bin/grpcui"
    grpcui = Program(programs, "grpcui", program, "-plaintext", "-port", 0, *protoset, gateway.address)
    page = wait_until("grpcui", lambda: re.search(r"http://\S+/", grpcui.out.read_text())).group()
    simulator.inject(*LOST)
    error = invoke(page)["error"]
    grpcui.close()
    assert error["name"] == "Unknown"
    details = [detail["message"] for detail in error["details"]]
    assert details[0].get("reason") == "CONNECTION_LOST"
    assert [*details[0]["metadata"]] == ["outcome"]
    assert all("@value" not in detail for detail in details), details


def invoke(page):
    """Makes a call, as grpcui's page does."""
    cookies = CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(cookies))
    browser.open(page, timeout=LIMIT).read()
    [token] = [cookie.value for cookie in cookies]
    metadata = [{"name": name, "value": value} for name, value in CREDENTIALS]
    form = json.dumps({"metadata": metadata, "data": [json.loads(REQUEST)]})
    headers = {"content-type": "application/json", "x-grpcui-csrf-token": token}
    request = urllib.request.Request(f"{page}invoke/{METHOD.replace('/', '.')}", form.encode(), headers)
    return json.load(browser.open(request, timeout=LIMIT))


@pytest.fixture(scope="module")
def server(gateway):
    """The URL of the gateway, for `buf curl`."""
    return f"http://{gateway.address}"


def test_buf_curl_lists_the_methods(buf_curl, server):
    printed = f"^{METHOD}\n.*grpc.health.v1.Health/Check\n"
    buf_curl("--list-methods", server).check(0, 0, printed)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_buf_curl_calls_by_reflection(buf_curl, server, version):
    reflection = ["--reflect-protocol", f"grpc-{version}"]
    buf_curl(*reflection, *HEADERS, "-d", REQUEST, f"{server}/{METHOD}").check(0, 1, CREATED)


@pytest.mark.parametrize("schema", ["the source", "the binary"])
def test_buf_curl_calls_with_a_schema(buf_curl, server, descriptors, schema):
    file = "proto" if schema == "the source" else str(descriptors)
    buf_curl("--schema", file, *HEADERS, "-d", REQUEST, f"{server}/{METHOD}").check(0, 1, CREATED)


def test_buf_curl_shows_the_details_of_an_error(buf_curl, server):
    call = ["--schema", "proto", *HEADERS, "-d", REQUEST, f"{server}/{METHOD}"]
    ran = buf_curl(*call, faults=LOST)
    ran.check(8 * 2, 1, '"code": "unknown".*A batch may have been created')
    details = {detail["type"]: detail["value"] for detail in json.loads(ran.text)["details"]}
    assert b"CONNECTION_LOST" in base64.b64decode(details["google.rpc.ErrorInfo"] + "==")


def test_buf_curl_asks_for_health(buf_curl, server):
    buf_curl(f"{server}/grpc.health.v1.Health/Check").check(0, 0, r'"status": "SERVING"')


def protoc(*arguments):
    """Runs protoc, and returns its warnings."""
    command = [sys.executable, "-m", "grpc_tools.protoc"]
    code, _, problem = process.run(*command, *arguments, cwd=ROOT)
    assert code == 0, problem
    return problem


def test_protoc_takes_the_source_without_a_warning(tmp_path):
    assert protoc("-I", "proto", f"--python_out={tmp_path}", PROTO) == ""


def test_protoc_takes_the_descriptor_set(tmp_path, descriptors):
    protoc(f"--descriptor_set_in={descriptors}", f"--python_out={tmp_path}", PROTO)


def test_protoc_takes_the_descriptor_set_beside_googles(tmp_path, descriptors):
    rpc = ["google/rpc/status.proto", "google/rpc/error_details.proto"]
    google = Path(find_spec("google.rpc").submodule_search_locations[0]).parents[1]
    googles = tmp_path / "google.binpb"
    protoc("-I", google, "--include_imports", "-o", googles, *rpc)
    for both in [f"{descriptors}:{googles}", f"{googles}:{descriptors}"]:
        protoc(f"--descriptor_set_in={both}", f"--python_out={tmp_path}", PROTO, *rpc)
