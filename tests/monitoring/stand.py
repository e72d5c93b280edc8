"""What the suite and the plot share: gateways with their simulated APIs, a Prometheus that scrapes
them, and callers. All on 127.0.0.1."""

import asyncio
import json
import random
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import grpc
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "monitoring" / "alerts.yaml"
RUN = Path(__file__).parent / ".run"
DATASET = "5c8c3c555033b814b69f947f"


class Failed(Exception):
    """A program did not do what it must do before anything can be tested."""


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def get(url, data=None, method=None, headers=()):
    request = urllib.request.Request(url, data, dict(headers), method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def wait_until(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.1)


class Programs:
    """Starts programs, and ends all of them: `with Programs(...) as programs`."""

    def __init__(self, gateway, name):
        self.gateway = gateway
        self.dir = RUN / name
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()

    def start(self, name, *args):
        out = self.dir / f"{name}.out"
        with open(out, "w") as stdout, open(self.dir / f"{name}.log", "a") as stderr:
            process = subprocess.Popen([str(arg) for arg in args], stdout=stdout, stderr=stderr)
        process.out = out
        self.running.append(process)
        return process

    def end(self, process):
        process.kill()
        process.wait()
        self.running.remove(process)

    def listen(self, name, *args):
        """Starts a command of the gateway; gives it and what its first line says."""
        process = self.start(name, self.gateway, *args)

        def said():
            if process.poll() is not None:
                raise Failed(f"{args} ended; see {self.dir}/{name}.log")
            return process.out.read_text().endswith("\n")

        wait_until(f"start of {args}", said)
        return process, json.loads(process.out.read_text().splitlines()[0])


class Gateway:
    """A gateway, its own simulated API, and its callers. `name` becomes part of its job."""

    def __init__(self, programs, name, serve=(), simulate=(), upstream=True):
        self.programs, self.name, self.serve_flags = programs, name, serve
        self.job = f"{name}-aep-batch-gateway"
        self.simulate_flags = simulate
        self.simulator = "127.0.0.1:0" if upstream else f"127.0.0.1:{free_port()}"
        if upstream:
            self.start_upstream()
        self.listen = self.admin = "127.0.0.1:0"
        self.start()

    def start_upstream(self):
        self.upstream, said = self.programs.listen(
            f"{self.name}-upstream", "simulate", "--listen", self.simulator, *self.simulate_flags
        )
        self.simulator = said["listen"]

    def start(self):
        base = f"http://{self.simulator}/data/foundation"
        self.process, said = self.programs.listen(
            self.name, "serve", "--listen", self.listen, "--admin-listen", self.admin,
            "--upstream-url", f"{base}/import", "--catalog-url", f"{base}/catalog",
            *self.serve_flags,
        )
        self.listen, self.admin = said["listen"], said["admin"]

    def restart(self):
        """At the same addresses."""
        self.programs.end(self.process)
        self.start()

    def order(self, *faults):
        get(f"http://{self.simulator}/_simulator/faults", "\n".join(faults).encode())

    def metrics(self):
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        return get(f"http://{self.admin}/metrics", headers=accept)


class Prometheus:
    """A Prometheus that scrapes gateways each second, and evaluates the alert rules as they are."""

    def __init__(self, programs, gateways):
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {
                    "job_name": gateway.job,
                    "static_configs": [
                        {"targets": [gateway.admin], "labels": {"namespace": "test"}}
                    ],
                }
                for gateway in gateways
            ],
        }
        file = programs.dir / "prometheus.yaml"
        file.write_text(json.dumps(config, indent=1))  # JSON is YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        process = programs.start(
            "prometheus", "prometheus", f"--config.file={file}",
            f"--storage.tsdb.path={programs.dir}/data", f"--web.listen-address={self.url[7:]}",
            "--enable-feature=exemplar-storage", "--log.level=warn",
        )

        def ready():
            if process.poll() is not None:
                raise Failed(f"Prometheus ended; see {programs.dir}/prometheus.log")
            try:
                return get(f"{self.url}/-/ready")
            except OSError:
                return False

        wait_until("Prometheus is ready", ready)
        self.began = time.time()
        count = len(gateways)
        wait_until("Prometheus scrapes", lambda: len(self.query("aep_gateway_ready")) == count)

    def api(self, path, **parameters):
        """What the HTTP API answers. Raises where it refuses a query."""
        data = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            return json.loads(get(f"{self.url}/api/v1/{path}", data))["data"]
        except urllib.error.HTTPError as error:
            raise Failed(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression):
        return self.api("query", query=expression)["result"]

    def over_the_run(self, expression, step=1.0):
        """The series of an expression from the start until now."""
        found = self.api(
            "query_range", query=expression, start=self.began, end=time.time(), step=step
        )
        return found["result"]

    def alerts(self):
        """The alerts whose expression is true, whether or not for long enough."""
        return self.api("alerts")["alerts"]


class Callers:
    """Make calls at a steady pace."""

    def __init__(self, gateway, token="good", api_key="good", seed=1):
        # Without it, all channels of this process to one address would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(gateway.listen, options)
        self.stub = batch_service_pb2_grpc.BatchServiceStub(self.channel)
        self.metadata = [
            ("authorization", f"Bearer {token}"), ("x-api-key", api_key),
            ("x-gw-ims-org-id", "test@AdobeOrg"), ("x-sandbox-name", "prod"),
        ]
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
