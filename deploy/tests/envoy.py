"""The example for Envoy: checked by Envoy, and run in front of the real gateway."""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import grpc
import yaml
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from gateway import http
from google.rpc import error_details_pb2, status_pb2
from report import DEPLOY, GATEWAY, check, run


@contextmanager
def running(*command, log):
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(what, condition, limit=30):
    end = time.monotonic() + limit
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {limit} s")
        time.sleep(0.1)
    return found


CREDENTIALS = [
    ("authorization", "Bearer test"), ("x-api-key", "test"),
    ("x-gw-ims-org-id", "test@AdobeOrg"), ("x-sandbox-name", "prod"),
]  # fmt: skip


def create_batch(address, external_id=""):
    """A call without retries of its own: code and outcome."""
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    request = pb.CreateBatchRequest(dataset_id="5c8c3c555033b814b69f947f", external_id=external_id)
    with grpc.insecure_channel(address, options) as channel:
        try:
            stub = batch_service_pb2_grpc.BatchServiceStub(channel)
            stub.CreateBatch(request, timeout=20, metadata=CREDENTIALS)
            return "OK", "APPLIED"
        except grpc.RpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            info = error_details_pb2.ErrorInfo()
            for detail in status_pb2.Status.FromString(details).details:
                detail.Unpack(info)
            return error.code().name, info.metadata["outcome"]


def check_envoy():
    """The example as it is, by Envoy's own check; and run, with other addresses."""
    example = DEPLOY / "examples/envoy.yaml"
    envoy = Path(sys.executable).parent / "envoy"
    code, _, err = run(envoy, "--mode", "validate", "-c", example)
    check("Envoy takes the example", [err] if code else [])
    wrong = example.read_text().replace("retry_on:", "retry_when:")
    code, _, err = run(envoy, "--mode", "validate", "--config-yaml", wrong)
    check("Envoy finds `retry_when:`", code == 0 or "retry_when" not in err)

    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        port0 = ["--listen", "127.0.0.1:0"]
        with running(GATEWAY, "simulate", *port0, log=log) as simulator:
            api = json.loads(simulator.stdout.readline())
            with running(
                GATEWAY, "serve", *port0, "--admin-listen", "127.0.0.1:0",
                "--upstream-url", api["upstream_url"], "--catalog-url", api["catalog_url"], log=log,
            ) as gateway:  # fmt: skip
                listens = json.loads(gateway.stdout.readline())["listen"]
                config = yaml.safe_load(example.read_text())
                static = config["static_resources"]
                (endpoint,) = static["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
                to = endpoint["endpoint"]["address"]["socket_address"]
                to["address"], to["port_value"] = listens.split(":")[0], int(listens.split(":")[1])
                static["listeners"][0]["address"]["socket_address"]["port_value"] = 0
                config["admin"]["address"]["socket_address"]["port_value"] = 0
                file = Path(folder) / "envoy.json"
                file.write_text(json.dumps(config))
                where = Path(folder) / "admin"
                with running(
                    envoy, "-c", file, "--concurrency", 1, "--use-dynamic-base-id",
                    "--admin-address-path", where, log=log,
                ) as proxy:  # fmt: skip
                    calls_through_envoy(api, proxy, where)


def calls_through_envoy(api, proxy, where):
    wait_until("Envoy's admin address", lambda: proxy.poll() or where.exists() and where.read_text())
    admin = f"http://{where.read_text()}"

    def stat(name):
        page = http(f"{admin}/stats?filter=^cluster.aep-batch-gateway.{name}$")[1]
        return int(page.split()[-1]) if page else 0

    wait_until("Envoy finds the gateway healthy", lambda: stat("membership_healthy") == 1)
    listener = json.loads(http(f"{admin}/listeners?format=json")[1])["listener_statuses"][0]
    address = "127.0.0.1:%d" % listener["local_address"]["socket_address"]["port_value"]
    simulator = f"http://{api['listen']}/_simulator"

    def batches():
        return len(json.loads(http(f"{simulator}/batches")[1]))

    for fault, external_id, expected, retried in [
        ("", "", ("OK", "APPLIED", 1), False),
        ("reset-after-create", "", ("UNKNOWN", "UNKNOWN", 1), False),
        ("lookup-503", "a", ("OK", "APPLIED", 1), True),
    ]:
        urllib.request.urlopen(f"{simulator}/faults", data=fault.encode(), timeout=5).close()
        before, tried = batches(), stat("upstream_rq_retry")
        answer = create_batch(address, external_id)
        got = (*answer, batches() - before)
        retries = stat("upstream_rq_retry") - tried
        what = f"through Envoy, {fault or 'no fault'}: {' '.join(map(str, expected))} batch"
        wrong = got != expected or bool(retries) != retried
        check(f"{what}, {'retried' if retried else 'not retried'} by Envoy",
              [f"got {got}, {retries} retries"] if wrong else [])  # fmt: skip
