"""grpcurl, grpcui and buf curl, as a person would use them."""

import base64
import json
import os
import re
import subprocess
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path

from examples import LIMIT, Run, assert_run, of_readme, run
from gateway import CREDENTIALS, PROCESSES, START, Gateway, time_limit
from report import Report

SERVICE = "aep.ingestion.v1.BatchService"
METHOD = f"{SERVICE}/CreateBatch"
REQUEST = '{"dataset_id": "5c8c3c555033b814b69f947f"}'
HEADERS = [part for name, value in CREDENTIALS for part in ["-H", f"{name}: {value}"]]
CREATED = r'"status": "BATCH_STATUS_LOADING"'
LOST = ["reset-after-create"]
LOST_IN_TEXT = r'Code: Unknown\n.*"outcome": "UNKNOWN".*"reason": "CONNECTION_LOST"'


def readme(has: str, gateway: Gateway, program: str, cwd: Path, page: str = "README.md") -> Run:
    """Runs the page's command."""
    command = of_readme(cwd / page, "sh", has, gateway)
    path = f"{Path(program).parent}:{os.environ['PATH']}"
    return run(gateway, [], ["sh", "-c", command], cwd, PATH=path)


def grpcurl(report: Report, gateway: Gateway, program: str, cwd: Path, descriptors: Path) -> None:
    def plain(*arguments: str, faults: list[str] = [], **environment):
        command = [program, "-plaintext", "-max-time", str(LIMIT), *arguments]
        return run(gateway, faults, command, cwd, **environment)

    address = gateway.address
    create = [*HEADERS, "-d", REQUEST, address, METHOD]
    without_reflection = ["-import-path", "proto", "-proto", "aep/ingestion/v1/batch_service.proto"]
    with report.check("README"):
        assert_run(readme("grpcurl -plaintext", gateway, program, cwd), 0, 1, CREATED)
    with report.check("README: a lost response"):
        assert_run(readme("simulator/fault", gateway, program, cwd), 64 + 2, 1, LOST_IN_TEXT)
    with report.check("list"):
        services = f"^{SERVICE}\ngrpc.health.v1.Health\ngrpc.reflection.v1.ServerReflection$"
        assert_run(plain(address, "list"), 0, 0, services)
    with report.check("describe the service, with its comments"):
        said = r"// Creates a batch, .*rpc CreateBatch \( \.aep\.ingestion\.v1\.CreateBatchRequest \)"
        assert_run(plain(address, "describe", SERVICE), 0, 0, said)
    with report.check("describe a message, with a template"):
        arguments = ["-msg-template", address, "describe", "aep.ingestion.v1.CreateBatchRequest"]
        assert_run(plain(*arguments), 0, 0, r'Message template:\n{\n  "datasetId": ""')
    with report.check("a call, with the schema of the source"):
        assert_run(plain(*without_reflection, *create), 0, 1, CREATED)
    with report.check("a call, with the schema of the binary"):
        assert_run(plain("-protoset", str(descriptors), *create), 0, 1, CREATED)
    with report.check("-expand-headers: the token comes from the environment"):
        token = ["-expand-headers", "-H", "authorization: Bearer ${TOKEN}"]
        arguments = [*token, *HEADERS[2:], "-d", REQUEST, address, METHOD]
        assert_run(plain(*arguments, TOKEN="demo"), 0, 1, CREATED)
        assert_run(plain(*arguments, TOKEN="expired"), 64 + 16, 0, '"API_UNAUTHENTICATED"')
    with report.check("-v: metadata can be read"):
        ran = plain("-v", "-H", "x-request-id: mine-1", *create)
        received = ran.said.partition("received:")[2]
        assert_run(ran, 0, 1, "aep-batch-outcome: APPLIED\n")
        assert "x-request-id: mine-1\n" in received, received
    with report.check("the details of an error in plain text"):
        assert_run(plain(*create, faults=LOST), 64 + 2, 1, LOST_IN_TEXT)
    with report.check("the details of an error as JSON"):
        ran = plain("-format-error", *HEADERS, "-d", "{}", address, METHOD)
        assert_run(ran, 64 + 3, 0, r'"code": 3,.*"field": "dataset_id"')
    with report.check("a name that the message does not have is refused"):
        ran = plain(*HEADERS, "-d", '{"dataset": "a"}', address, METHOD)
        assert_run(ran, 1, 0, "has no known field named dataset")
    with report.check("-max-time: a deadline"):
        ran = plain("-max-time", "1", *create, faults=["silence-after-create"])
        assert_run(ran, 64 + 4, 1, "Code: DeadlineExceeded\n")
    with report.check("health"):
        assert_run(plain(address, "grpc.health.v1.Health/Check"), 0, 0, '"status": "SERVING"')


def grpcui(report: Report, gateway: Gateway, program: str, descriptors: Path) -> None:
    schemas = {"reflection": [], "the schema of the binary": ["-protoset", str(descriptors)]}
    for name, arguments in schemas.items():
        with report.check(f"an error, with {name}: its details can be read"):
            process = subprocess.Popen(
                [program, "-plaintext", "-port", "0", *arguments, gateway.address],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            PROCESSES.append(process)
            try:
                with time_limit(process, START):
                    page = re.search(r"http://\S+/", process.stdout.readline()).group()
                gateway.order(*LOST)
                told = invoke(page)
            finally:
                process.kill()
            details = [detail["message"] for detail in told["error"]["details"]]
            assert told["error"]["name"] == "Unknown", told
            assert details[0].get("reason") == "CONNECTION_LOST", details
            assert [*details[0]["metadata"]] == ["outcome"], details
            assert all("@value" not in detail for detail in details), details


def invoke(page: str) -> dict:
    """Makes a call, as grpcui's page does."""
    cookies = CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(cookies))
    browser.open(page, timeout=LIMIT).read()
    [token] = [cookie.value for cookie in cookies]
    metadata = [{"name": name, "value": value} for name, value in CREDENTIALS]
    form = json.dumps({"metadata": metadata, "data": [json.loads(REQUEST)]})
    headers = {"content-type": "application/json", "x-grpcui-csrf-token": token}
    request = urllib.request.Request(f"{page}invoke/{SERVICE}.CreateBatch", form.encode(), headers)
    return json.load(browser.open(request, timeout=LIMIT))


def buf_curl(report: Report, gateway: Gateway, program: str, cwd: Path, descriptors: Path) -> None:
    def curl(*arguments: str, faults: list[str] = []):
        command = [program, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
        return run(gateway, faults, command, cwd)

    server = f"http://{gateway.address}"
    create = [*HEADERS, "-d", REQUEST, f"{server}/{METHOD}"]
    with report.check("README"):
        assert_run(readme("buf curl", gateway, program, cwd, "clients/README.md"), 0, 1, CREATED)
    with report.check("--list-methods"):
        said = f"^{METHOD}\n.*grpc.health.v1.Health/Check\n"
        assert_run(curl("--list-methods", server), 0, 0, said)
    for version in ["v1", "v1alpha"]:
        with report.check(f"a call by reflection {version}"):
            ran = curl("--reflect-protocol", f"grpc-{version}", *create)
            assert_run(ran, 0, 1, CREATED)
    with report.check("a call, with the schema of the source"):
        assert_run(curl("--schema", "proto", *create), 0, 1, CREATED)
    with report.check("a call, with the schema of the binary"):
        assert_run(curl("--schema", str(descriptors), *create), 0, 1, CREATED)
    with report.check("an error, with its details"):
        ran = curl("--schema", "proto", *create, faults=LOST)
        assert_run(ran, 8 * 2, 1, '"code": "unknown".*A batch may have been created')
        details = json.loads(ran.said)["details"]
        [info] = [detail["value"] for detail in details if detail["type"] == "google.rpc.ErrorInfo"]
        assert b"CONNECTION_LOST" in base64.b64decode(info + "=="), info
    with report.check("health"):
        ran = curl(f"{server}/grpc.health.v1.Health/Check")
        assert_run(ran, 0, 0, r'"status": "SERVING"')
