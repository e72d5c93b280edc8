"""Kubernetes with Istio, the gateway installed by its chart, and callers."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import yaml
from api import Refused, restricted
from calls import Call
from cluster import Cluster, Programs, wait_until
from node import HOST, Node, make_network, sh

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOLS = ROOT / "target" / "ci"
CHART = ROOT / "deploy" / "chart" / "aep-batch-gateway"
EXAMPLE = ROOT / "deploy" / "examples" / "istio.yaml"
SERVICE = "aep-batch-gateway.ingestion.svc.cluster.local"
ADDRESS = f"{SERVICE}:50051"
BIN = TOOLS / "kubernetes" / "bin"
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
    sh(
        'mkdir /run/tools; mount --bind "$1" /run/tools; touch /run/gateway; mount --bind "$2" /run/gateway',
        TOOLS, gateway,
    )  # fmt: skip
    for name, source in [("envoy", ENVOY), ("pilot-agent", BIN / "pilot-agent")]:
        program = Path("/usr/local/bin") / name
        program.unlink(missing_ok=True)
        program.symlink_to(Path("/run/tools") / source.relative_to(TOOLS))
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
        """Starts load.py in the pod."""
        inside = ["nsenter", "--target", str(self.app.process.pid), "--net", "--mount", "--"]
        with open(self.log, "a") as log:
            return subprocess.Popen(
                [*inside, sys.executable, HERE / "load.py", self.address, *map(str, arguments)],
                env={**os.environ, **self.app.environment()}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def ended(self, load):
        """What it says. It ends: each call has a deadline."""
        return json.loads(load.communicate(timeout=170)[0])

    def said(self, *arguments):
        return self.ended(self.start(*arguments))


class Mesh:
    """`with Mesh(...) as mesh`."""

    admin = None  # as calls.table wants it

    def __init__(self, gateway, istio):
        self.gateway, self.istio = gateway, Path(istio)
        self.folder = TOOLS / "istio" / "run"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.programs = Programs(self.folder)
        self.simulator = None
        self.helm = max((ROOT / "tests/e2e/.run/chart/bin").glob("helm-v*"))

    def __enter__(self):
        make_root()
        make_files(self.istio, self.gateway)
        make_network()
        self.cluster = Cluster(self.folder / "kubernetes", BIN, HOST)
        self.cluster.__enter__()
        self.api = self.cluster.api
        crds = self.istio / "manifests" / "charts" / "base" / "files" / "crd-all.gen.yaml"
        self.cluster.define([crds])
        self.node = Node(self.cluster, self.folder / "pods", {
            "gateway": ["/run/gateway"],
            "istio-proxy": ["/usr/local/bin/pilot-agent"],
            "discovery": [BIN / "pilot-discovery"],
            "app": ["sleep", "infinity"],
        })  # fmt: skip
        return self

    def __exit__(self, *_):
        self.node.over = True
        self.programs.__exit__()
        self.cluster.__exit__()

    def version(self):
        version = (self.istio / "VERSION").read_text().strip()
        envoy = self.run(ENVOY, "--version")[1]
        return f"Istio {version} ({self.istio.name}), Envoy {re.search(r'/([0-9.]+)/', envoy)[1]}"

    def run(self, *command, text=None):
        done = subprocess.run(
            [str(part) for part in command], input=text, capture_output=True, text=True, timeout=180
        )
        return done.returncode, done.stdout, done.stderr

    def install(self, name, chart, namespace, values, *flags):
        code, out, err = self.run(
            self.helm, "install", name, chart, "--namespace", namespace, "--values", "-",
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

    def apply_example(self, mark=True):
        """The example; without what it says of the header by which to retry, if `mark` is false."""
        for document in yaml.safe_load_all(EXAMPLE.read_text()):
            if document["kind"] == "VirtualService" and not mark:
                del document["spec"]["http"][0]["headers"]
            self.api.apply(document, "ingestion")
        time.sleep(2)  # until the sidecars have it

    def caller(self, name, account="exporter", labels=None, proxyless=False):
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
        return Caller(pod, f"xds:///{ADDRESS}" if proxyless else ADDRESS, self.folder / "load.log")

    def simulate(self, *flags, faults=(), share=0.4):
        """Starts the simulated API anew."""
        if self.simulator:
            self.simulator.kill()
            self.simulator.wait()
        self.simulator = self.programs.start(
            "simulator", self.gateway, "simulate", "--listen", UPSTREAM, "--share", share,
            "--seed", 1, *flags, *(flag for fault in faults for flag in ("--fault", fault)),
        )  # fmt: skip

        def listens():
            try:
                return self.ledger() == []
            except OSError:
                return False

        wait_until("the simulated API", listens)
        self.began = time.monotonic()

    def order(self, fault):
        """The next create, or look-up, meets it."""
        urllib.request.urlopen(f"http://{UPSTREAM}/_simulator/faults", fault.encode(), timeout=10).close()

    def ledger(self):
        with urllib.request.urlopen(f"http://{UPSTREAM}/_simulator/batches", timeout=10) as answer:
            return json.load(answer)

    def tries(self):
        """How many calls the gateways that live have ended."""
        total = 0
        for pod in self.node.ready("ingestion", "aep"):
            with urllib.request.urlopen(f"http://{pod.address}:9464/metrics", timeout=10) as answer:
                text = answer.read().decode()
            for labels, count in re.findall(r"^grpc_server_handled_total\{(.*?)\} (\d+)", text, re.M):
                total += int(count) if 'grpc_method="CreateBatch"' in labels else 0
        return total

    def calls(self, said):
        """The calls that load.py made, with their batches."""
        calls = [Call(**call) for call in said]
        for batch in self.ledger():
            (number,) = batch["tags"]["call"]
            calls[int(number)].batches.append(batch["id"])
        return calls
