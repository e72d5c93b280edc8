"""Kubernetes with Istio, the gateway installed by its chart, and callers."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import yaml
from node import HOST, Node, make_network, sh

from harness.chart import CHART, HELM, program
from harness.gateway import Simulator
from harness.kubernetes import BIN, Cluster, Refused, restricted
from harness.load import Call, count_batches
from harness.process import E2E, ROOT, RUN, get, run, wait_until

EXAMPLE = ROOT / "deploy" / "examples" / "istio.yaml"
SERVICE = "aep-batch-gateway.ingestion.svc.cluster.local"
ADDRESS = f"{SERVICE}:50051"
# Not the script of that name, which needs a Python that others may read.
ENVOY = Path(find_spec("envoy").origin).parent / "_bin" / "envoy"
UPSTREAM = f"{HOST}:8600"

# Envoy comes from PyPI. These are what istiod needs to be told because it is not Istio's build.
STOCK_ENVOY = {
    "telemetry": {"enabled": False},
    "pilot": {
        "env": {"PILOT_ENABLE_METADATA_EXCHANGE": "false", "PILOT_ENABLE_ALPN_FILTER": "false"},
        # As a restricted namespace needs it; node.py does the plugin's work.
        "cni": {"enabled": True},
    },
}  # fmt: skip


def make_files(istio, gateway):
    """What images hold, where they hold it. Other users must see it, wherever the project lies."""
    for source in [gateway, ENVOY, BIN / "pilot-agent"]:
        sh('rm -f "$1"; touch "$1"; mount --bind "$2" "$1"', f"/usr/local/bin/{source.name}", source)
    Path("/var/lib/istio/envoy").mkdir(parents=True)
    shutil.copy(
        f"{istio}/tools/packaging/common/envoy_bootstrap.json",
        "/var/lib/istio/envoy/envoy_bootstrap_tmpl.json",
    )


def make_root():
    """Makes the folders writable that images and volumes have something in. What is written stays in
    memory, and in this mount namespace."""
    sh(
        "mount -t tmpfs -o mode=755 tmpfs /run;"
        "for name in etc var/lib usr/local/bin; do"
        "  mkdir -p /run/over/$name/upper /run/over/$name/work;"
        "  mount -t overlay overlay -o"
        "    lowerdir=/$name,upperdir=/run/over/$name/upper,workdir=/run/over/$name/work /$name;"
        "done;"
        # Nobody answers there, and a sidecar that asks for a name hears it at once.
        "rm -f /etc/resolv.conf; echo nameserver 127.0.0.1 >/etc/resolv.conf"
    )


class Caller:
    """A pod that makes calls."""

    def __init__(self, pod, address, log):
        self.pod, self.address, self.log = pod, address, log
        (self.app,) = [c for c in pod.containers if c.name == "app"]

    def start(self, *arguments):
        """Starts caller.py in the pod."""
        inside = ["nsenter", "--target", str(self.app.process.pid), "--net", "--mount", "--"]
        script = Path(__file__).parent / "caller.py"
        path = {"PYTHONPATH": f"{E2E}:{RUN / 'proto'}"}
        with open(self.log, "a") as log:
            return subprocess.Popen(
                [*inside, sys.executable, script, self.address, *map(str, arguments)],
                env={**os.environ, **self.app.environment(), **path}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def output(self, process):
        """What it prints. It ends: each call has a deadline."""
        return json.loads(process.communicate(timeout=170)[0])

    def run(self, *arguments):
        return self.output(self.start(*arguments))


class Mesh:
    """Kubernetes, Istio, two gateways, and the simulated API on the host of the node."""

    def __init__(self, programs, istio):
        self.programs, self.istio, self.folder = programs, istio, programs.folder
        self.rules, self.callers = "istio-defaults", 0
        make_root()
        make_files(istio, programs.binary)
        make_network()
        self.cluster = Cluster(programs, HOST)
        self.api = self.cluster.api
        self.cluster.define([istio / "manifests" / "charts" / "base" / "files" / "crd-all.gen.yaml"])
        self.node = Node(self.cluster, self.folder / "pods", {
            "gateway": [f"/usr/local/bin/{programs.binary.name}"],
            "istio-proxy": ["/usr/local/bin/pilot-agent"],
            "discovery": [BIN / "pilot-discovery"],
            "app": ["sleep", "infinity"],
        })  # fmt: skip
        self.simulator = Simulator(programs, listen=UPSTREAM)
        self.install_istio()
        self.install_gateway()

    def version(self):
        version = (self.istio / "VERSION").read_text().strip()
        envoy = re.search(r"/([0-9.]+)/", run(ENVOY, "--version")[1])[1]
        return f"Kubernetes {self.cluster.version()}, Istio {version} ({self.istio.name}), Envoy {envoy}"

    def install(self, name, chart, namespace, values, *flags):
        code, out, err = run(
            program(f"helm-{HELM}"), "install", name, chart, "--namespace", namespace, "--values", "-",
            "--kubeconfig", self.cluster.kubeconfig, *flags, text=yaml.safe_dump(values),
        )  # fmt: skip
        if code:
            raise RuntimeError(f"helm install {name}: {out} {err}")

    def install_istio(self):
        self.api.namespace("istio-system")
        charts = self.istio / "manifests" / "charts"
        values = {
            "autoscaleEnabled": False,
            "meshConfig": {"accessLogFile": "/dev/stdout"},
            **STOCK_ENVOY,
        }
        self.install("istiod", charts / "istio-control" / "istio-discovery", "istio-system", values)
        wait_until("istiod is ready", lambda: self.node.ready("istio-system", "istiod"), 90)

        def injects():
            """Only then does the API server know its address and its certificate."""
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "orders"}}
            pod["spec"] = {"containers": [{"name": "app", "image": "app"}]}
            try:
                return len(self.api.apply(pod, "orders", dryRun="All")[0]["spec"]["initContainers"]) > 0
            except (Refused, KeyError):
                return False

        self.api.namespace("orders", **{"istio-injection": "enabled"})
        wait_until("istiod's injector works", injects)

    def install_gateway(self):
        self.api.namespace("ingestion", **{"istio-injection": "enabled"}, **restricted())
        url = f"http://{UPSTREAM}/data/foundation"
        values = {
            "mesh": "istio", "autoscaling": {"enabled": False}, "replicas": 2,
            "settings": {
                "upstreamUrl": f"{url}/import", "catalogUrl": f"{url}/catalog",
                "requestTimeout": "2s",
            },
        }  # fmt: skip
        self.install("aep-batch-gateway", CHART, "ingestion", values)
        service = self.api.get("/api/v1/namespaces/ingestion/services/aep-batch-gateway")
        self.node.add_name(service["spec"]["clusterIP"], SERVICE)
        self.gateways()

    def gateways(self):
        """Both gateways, when they are ready."""
        wait_until("two gateways", lambda: len(self.node.ready("ingestion", "aep")) == 2, 90)
        return self.node.ready("ingestion", "aep")

    def use(self, rules):
        """`istio-defaults`, or `istio-example`: what deploy/examples has; or the same `unmarked`:
        without what it says of the header by which to retry."""
        if rules == self.rules:
            return
        for document in yaml.safe_load_all(EXAMPLE.read_text()):
            if document["kind"] == "VirtualService" and rules == "unmarked":
                del document["spec"]["http"][0]["headers"]
            if rules == "istio-defaults":
                self.api.delete(self.api.path(document, "ingestion"))
            else:
                self.api.apply(document, "ingestion")
        self.rules = rules
        time.sleep(2)  # until the sidecars have it

    def caller(self, account="exporter", labels=None, proxyless=False):
        """A pod that knows nothing of what was before: its sidecar may have ejected a gateway."""
        self.callers += 1
        name = f"caller-{self.callers}"
        metadata = {"name": account}
        self.api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}, "orders")
        annotations = {"inject.istio.io/templates": "grpc-agent"} if proxyless else {}
        self.api.apply({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": labels or {}, "annotations": annotations},
            "spec": {
                "serviceAccountName": account, "terminationGracePeriodSeconds": 10,
                "containers": [{"name": "app", "image": "app"}],
            },
        }, "orders")  # fmt: skip
        wait_until(f"the pod {name}", lambda: self.node.ready("orders", name), 60)
        (pod,) = self.node.ready("orders", name)
        return Caller(pod, f"xds:///{ADDRESS}" if proxyless else ADDRESS, self.folder / "callers.log")

    def simulate(self, *flags, faults=(), share=0.4):
        """Starts the simulated API anew."""
        self.simulator.kill()
        self.simulator.start(*flags, faults=faults, share=share)

    def tries(self):
        """How many calls the gateways that live have ended."""
        total = 0
        for pod in self.node.ready("ingestion", "aep"):
            text = get(f"http://{pod.address}:9464/metrics")
            for labels, count in re.findall(r"^grpc_server_handled_total\{(.*?)\} (\d+)", text, re.M):
                total += int(count) if 'grpc_method="CreateBatch"' in labels else 0
        return total

    def counted(self, printed):
        """The calls that caller.py printed, with their batches."""
        return count_batches([Call(**call) for call in printed], self.simulator.ledger())
