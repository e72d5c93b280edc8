"""The chart and the examples, given to a real Kubernetes API server. Started by run.sh."""

import contextlib
import copy
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import checks
import yaml
from api import Refused, restricted
from checks import check
from cluster import Cluster, Failed, wait_until
from harness.chart import VALUE_SETS

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "target" / "ci"
CHART = ROOT / "deploy" / "chart" / "aep-batch-gateway"
EXAMPLES = ROOT / "deploy" / "examples"
HELMS = sorted((ROOT / "tests/e2e/.run/chart/bin").glob("helm-v*"))
# What those sets leave at its default.
THE_REST = [
    ("other names", {
        "image": {"tag": "1.2.3", "pullPolicy": "Always"}, "fullnameOverride": "batches",
        "serviceAccount": {"create": False, "name": "default"}, "listenHost": "[::]",
        "probes": {"grpc": True}, "replicas": 3, "autoscaling": {"enabled": False},
        "podDisruptionBudget": {"enabled": False}, "networkPolicy": {"enabled": False},
        "resources": {"requests": {"cpu": "50m"}, "limits": {"memory": "1Gi"}},
    }),
    ("monitoring", {
        "autoscaling": {"targetPercent": 50},
        "monitoring": {
            "podMonitor": {"enabled": True, "interval": "30s", "labels": {"a": "b"}},
            "prometheusRule": {"enabled": True, "labels": {"a": "b"}},
            "dashboard": {"enabled": True, "labels": {"grafana": "1"}},
        },
    }),
]  # fmt: skip


def run(*command, text=None):
    done = subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True, timeout=180
    )
    return done.returncode, done.stdout, done.stderr


def template(values, *flags):
    code, out, err = run(
        HELMS[-1], "template", "gw", CHART, "--values", "-", *flags, text=yaml.safe_dump(values)
    )
    if code:
        raise RuntimeError(err)
    return [d for d in yaml.safe_load_all(out) if d]


class Kubelet(threading.Thread):
    """Says of every pod that it runs and is ready, and lets it go. That is all there is of nodes."""

    def __init__(self, api):
        super().__init__(daemon=True)
        self.api, self.addresses = api, itertools.count(2)
        self.api.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}})
        self.start()

    def run(self):
        while True:
            try:
                pods = self.api.items("/api/v1/pods")
            except (OSError, Refused):
                return  # the API server has gone
            for pod in pods:
                metadata = pod["metadata"]
                path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
                with contextlib.suppress(Refused):  # it has gone meanwhile
                    if "deletionTimestamp" in metadata:
                        self.api.delete(path, gracePeriodSeconds=0)
                    elif "podIP" not in pod["status"]:
                        self.make_ready(path, metadata["name"])
            time.sleep(0.2)

    def make_ready(self, path, name):
        self.api.request("POST", f"{path}/binding", {
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": "node"},
        })  # fmt: skip
        number = next(self.addresses)
        address = f"10.244.{number // 256}.{number % 256}"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.api.patch(f"{path}/status", {"status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "startTime": now,
            "conditions": [
                {"type": name, "status": "True", "lastTransitionTime": now}
                for name in ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
            ],
        }})  # fmt: skip


def refusal(cluster, document, namespace, **query):
    """Why the API server does not take this, or nothing."""
    try:
        cluster.api.apply(document, namespace, **query)
        return ""
    except Refused as refused:
        return refused.message


def check_controls(cluster):
    """What must be refused; else the other checks say nothing."""
    cluster.api.namespace("controls", **restricted())
    bare = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"},
        "spec": {"containers": [{"name": "a", "image": "a"}]},
    }  # fmt: skip
    why = refusal(cluster, bare, "controls")
    check("refused: a bare pod in a restricted namespace", 'violates PodSecurity "restricted' in why, why)
    documents = template({"mesh": "istio"}) + example("istio.yaml") + example("linkerd.yaml")
    for kind, path, wrong in [
        ("Deployment", "spec.strategy.rollingUpdate", "maxUnavailabel"),
        ("NetworkPolicy", "spec.egress.0", "port"),
        ("VirtualService", "spec.http.0.retries", "retryWhen"),
        ("GRPCRoute", "spec.rules.0", "backendReference"),
    ]:
        document = copy.deepcopy(next(d for d in documents if d["kind"] == kind))
        inner = document
        for key in path.split("."):
            inner = inner[int(key) if key.isdigit() else key]
        inner[wrong] = "1"
        why = refusal(cluster, document, "controls", dryRun="All")
        check(f"refused: {kind} with {path}.{wrong}", wrong in why, why)


def example(name):
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def check_value_sets(cluster):
    """Each in a restricted namespace of its own, where the controllers make pods of it."""
    cluster.api.apply({
        "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
        "metadata": {"name": "high"}, "value": 1000,
    })  # fmt: skip
    total = 0
    sets = [*VALUE_SETS, *THE_REST]
    for number, (name, values, *flags) in enumerate(sets):
        namespace = f"values-{number}"
        cluster.api.namespace(namespace, **restricted(), **restricted("warn"))
        documents = template(values, *flags, "--namespace", namespace)
        found = []
        for document in documents:
            try:
                _, warnings = cluster.api.apply(document, namespace)
                found += warnings
            except Refused as refused:
                found.append(f"{document['kind']}: {refused.message}")
        total += len(documents)
        (deployment,) = [d for d in documents if d["kind"] == "Deployment"]
        path = cluster.api.path(deployment, namespace)

        def available():
            status = cluster.api.get(path)["status"]
            states = {c["type"]: c for c in status.get("conditions", [])}
            return status.get("availableReplicas", 0) or states.get("ReplicaFailure")

        said = found or wait_until(f"pods of {name}", available)
        if isinstance(said, dict):
            found.append(said["message"])
        check(f"taken without a warning, and its pods: {name} ({len(documents)} objects)", not found, *found)
    check(f"{total} objects of {len(sets)} sets of values", total > len(sets))


def leaves(properties, *path):
    for name, schema in properties.items():
        if "properties" in schema:
            yield from leaves(schema["properties"], *path, name)
        else:
            yield *path, name


def value(values, path):
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    return values


def check_every_value():
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    # Helm's own, for subcharts.
    every = [path for path in leaves(schema["properties"]) if path != ("global",)]
    never = [
        ".".join(path)
        for path in every
        if all(value(v, path) in (None, value(defaults, path)) for _, v, *_ in VALUE_SETS + THE_REST)
    ]
    check(f"each of the {len(every)} values is set to something else in one of them", not never, *never)


def check_examples(cluster):
    cluster.api.namespace("examples", **restricted())
    for name in ["istio.yaml", "gateway-api.yaml", "linkerd.yaml"]:
        # No package registry has Linkerd's definitions.
        known = [d for d in example(name) if not d["apiVersion"].startswith("policy.linkerd.io/")]
        found = []
        for document in known:
            try:
                found += cluster.api.apply(document, "examples")[1]
            except Refused as refused:
                found.append(f"{document['kind']}: {refused.message}")
        what = f"taken: {len(known)} of {len(example(name))} objects of {name}"
        check(what, known and not found, *found)


class Release:
    """The chart, installed by Helm."""

    def __init__(self, cluster, namespace):
        self.api, self.kubeconfig, self.namespace = cluster.api, cluster.kubeconfig, namespace

    def helm(self, program, *command, values=None):
        given = ("--values", "-") if values is not None else ()
        code, out, err = run(
            program, *command, *given, "--namespace", self.namespace, "--kubeconfig", self.kubeconfig,
            text=yaml.safe_dump(values or {}),
        )  # fmt: skip
        # Warnings of the API server, such as those of PodSecurity.
        found = re.findall(r".*(?:[Ww]arning|WARN).*", err)
        check(f"  {program.name} {command[0]}", code == 0 and not found, out, err)
        return code == 0

    def list(self, group, kind):
        return self.api.items(f"/{group}/namespaces/{self.namespace}/{kind}")

    def one(self, group, kind):
        (found,) = self.list(group, kind)
        return found


def check_helm(cluster, number, first, second):
    """Installed by one Helm, upgraded by the same or by a later one, gone at last."""
    print(f"  {first.name} and then {second.name}", flush=True)
    release = Release(cluster, f"ingestion-{number}")
    cluster.api.namespace(release.namespace, **restricted(), **restricted("warn"))
    wait = ("--wait", "--timeout", "90s")
    if not release.helm(first, "install", "gw", CHART, *wait, values={}):
        return

    def disruptions():
        return release.one("apis/policy/v1", "poddisruptionbudgets")["status"].get("disruptionsAllowed")

    def replicas():
        return release.one("apis/apps/v1", "deployments")["spec"]["replicas"]

    def endpoints():
        slices = release.list("apis/discovery.k8s.io/v1", "endpointslices")
        ready = {e["addresses"][0] for s in slices for e in s["endpoints"] or [] if e["conditions"]["ready"]}
        ports = {(p["name"], p["port"]) for s in slices for p in s["ports"] or []}
        return len(ready), ports

    def settled(count):
        return replicas() == count and endpoints() == (count, {("grpc", 50051), ("admin", 9464)})

    wait_until("the autoscaler's minimum of 2, both endpoints", lambda: settled(2))
    wait_until("one pod may go", lambda: disruptions() == 1)
    check("  2 pods by the autoscaler, both endpoints of the Service, one pod may go", True)
    limit = {"settings": {"maxInFlight": 100}, "mesh": "istio"}
    if not release.helm(second, "upgrade", "gw", CHART, *wait, values=limit):
        return
    deployment = release.one("apis/apps/v1", "deployments")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    told = {e["name"]: e.get("value") for e in container["env"]}
    check("  the upgrade reached the pods", told["AEP_GATEWAY_MAX_IN_FLIGHT"] == "100", told)
    check("  the upgrade left the autoscaler's 2 pods alone", replicas() == 2, replicas())
    release.helm(second, "rollback", "gw", "1", *wait)
    annotations = release.one("apis/apps/v1", "deployments")["spec"]["template"]["metadata"]["annotations"]
    check("  the rollback took the mesh away", not [a for a in annotations if "istio" in a], annotations)
    release.helm(second, "uninstall", "gw", *wait)

    def left():
        kinds = [
            ("api/v1", "services"), ("api/v1", "pods"), ("api/v1", "secrets"),
            ("apis/apps/v1", "deployments"), ("apis/apps/v1", "replicasets"),
            ("apis/autoscaling/v2", "horizontalpodautoscalers"),
            ("apis/policy/v1", "poddisruptionbudgets"),
            ("apis/networking.k8s.io/v1", "networkpolicies"),
            ("apis/discovery.k8s.io/v1", "endpointslices"),
        ]  # fmt: skip
        accounts = release.list("api/v1", "serviceaccounts")
        own = [a for a in accounts if a["metadata"]["name"] != "default"]
        return own + [item for kind in kinds for item in release.list(*kind)]

    wait_until("nothing is left of the release", lambda: not left())
    check("  nothing is left of it", True)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    shutil.rmtree(TOOLS / "kubernetes" / "run", ignore_errors=True)
    with Cluster(TOOLS / "kubernetes" / "run", TOOLS / "kubernetes" / "bin") as cluster:
        Kubelet(cluster.api)
        count = cluster.define(sys.argv[1:])
        print(f"Kubernetes {cluster.version()}, {count} definitions, {' '.join(h.name for h in HELMS)}")
        check_controls(cluster)
        check_value_sets(cluster)
        check_every_value()
        check_examples(cluster)
        oldest, *_, newest = HELMS
        for number, pair in enumerate([*((h, h) for h in HELMS), (oldest, newest)]):
            try:
                check_helm(cluster, number, *pair)
            except Failed as failure:
                check(str(failure), False)
    print(f"{checks.passed} passed, {checks.failed} failed")
    return checks.failed != 0 or checks.passed == 0


if __name__ == "__main__":
    sys.exit(main())
