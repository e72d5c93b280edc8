"""A Prometheus that scrapes gateways, and callers at a steady pace."""

import asyncio
import json
import os
import random
import shutil
import time
import urllib.error
import urllib.parse

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from harness.load import DATASET
from harness.process import ROOT, RUN, HarnessError, Program, free_port, get, run, wait_until

MONITORING = ROOT / "deploy" / "monitoring"
ALERTS = MONITORING / "alerts.yaml"
FOLDER = RUN / "prometheus"


def install():
    """Puts prometheus and promtool on the PATH: Debian's package, unpacked and not installed, since
    that would start a service."""
    os.environ["PATH"] += f":{FOLDER}/usr/bin"
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    if not shutil.which("apt-get"):
        raise HarnessError("cannot run: Prometheus is not installed")
    download = "apt-get download -qq prometheus"
    unpack = "dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb"
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = f"{{ {download} || {{ apt-get update -qq && {download}; }} }} && {unpack}"
    code, _, problem = run("sh", "-c", command, cwd=FOLDER, timeout=600)
    if code != 0:
        raise HarnessError(f"cannot run: no Debian package of Prometheus: {problem}")


class Prometheus(Program):
    """Scrapes gateways each second, and evaluates the alert rules as they are. A gateway's name
    becomes part of its job."""

    def __init__(self, programs, gateways):
        super().__init__(programs, "prometheus")
        install()
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {
                    "job_name": f"{name}-aep-batch-gateway",
                    "static_configs": [{"targets": [gateway.admin], "labels": {"namespace": "test"}}],
                }
                for name, gateway in gateways.items()
            ],
        }
        file = programs.folder / "prometheus.yaml"
        file.write_text(json.dumps(config, indent=1))  # JSON is YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        self.launch(
            "prometheus", f"--config.file={file}", f"--storage.tsdb.path={programs.folder}/data",
            f"--web.listen-address={self.url[7:]}", "--enable-feature=exemplar-storage",
            "--log.level=warn",
        )  # fmt: skip
        wait_until("Prometheus is ready", self.is_ready)
        self.began = time.time()
        wait_until("Prometheus scrapes", lambda: len(self.query("aep_gateway_ready")) == len(gateways))

    def is_ready(self):
        self.check_alive()
        try:
            return get(f"{self.url}/-/ready")
        except OSError:
            return False

    def api(self, path, **parameters):
        """What the HTTP API answers. Raises where it refuses a query."""
        data = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            return json.loads(get(f"{self.url}/api/v1/{path}", data))["data"]
        except urllib.error.HTTPError as error:
            raise HarnessError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression):
        return self.api("query", query=expression)["result"]

    def over_the_run(self, expression, step=1.0):
        """The series of an expression from the start until now."""
        times = {"start": self.began, "end": time.time(), "step": step}
        return self.api("query_range", query=expression, **times)["result"]


class Callers:
    """Make calls at a steady pace."""

    def __init__(self, gateway, token="good", api_key="good", seed=1):
        # Without it, all channels of this process to one address would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(gateway.address, options)
        self.stub = batch_service_pb2_grpc.BatchServiceStub(self.channel)
        self.metadata = [
            ("authorization", f"Bearer {token}"), ("x-api-key", api_key),
            ("x-gw-ims-org-id", "test@AdobeOrg"), ("x-sandbox-name", "prod"),
        ]  # fmt: skip
        self.random = random.Random(seed)
        self.under_way = set()

    async def call(self, message=None, metadata=None, deadline=30.0):
        """Makes a call, whatever its end."""
        message = message or pb.CreateBatchRequest(dataset_id=DATASET)
        metadata = self.metadata if metadata is None else metadata
        try:
            await self.stub.CreateBatch(message, timeout=deadline, metadata=metadata)
        except grpc.aio.AioRpcError:
            pass

    async def steady(self, per_second, seconds, external_ids=0.0, mistakes=0.0, deadline=30.0):
        """`external_ids` is the share of calls that have one, `mistakes` the share of bad ones. A
        call does not wait for those before it."""
        began = time.monotonic()
        for number in range(round(per_second * seconds)):
            message = pb.CreateBatchRequest(dataset_id=DATASET)
            if self.random.random() < external_ids:
                message.external_id = f"id-{self.random.random()}"
            if self.random.random() < mistakes:
                message.dataset_id = ""
            task = asyncio.create_task(self.call(message, deadline=deadline))
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))

    async def end(self, patience=5.0):
        """Waits for the calls under way, and gives up on those that take longer."""
        if self.under_way:
            await asyncio.wait(self.under_way, timeout=patience)
        for task in self.under_way:
            task.cancel()
        await self.channel.close()
