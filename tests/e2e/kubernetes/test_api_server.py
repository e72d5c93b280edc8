"""The chart and the examples, given to a real Kubernetes API server."""

import contextlib
import copy
import itertools
import json
import re
import threading
import time

import pytest
import yaml

from harness.chart import CHART, EXAMPLES, HELM, OLDER_HELMS, VALUE_SETS, definitions, program, template
from harness.kubernetes import Cluster, Refused, install, restricted
from harness.process import run, wait_until
from harness.programs import Programs

# What the sets of the chart's own suite leave at its default.
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
SETS = VALUE_SETS + THE_REST


@pytest.fixture(scope="module")
def cluster():
    install("etcd", "kube-apiserver", "kube-controller-manager")
    with Programs(None, "kubernetes") as programs:
        cluster = Cluster(programs)
        cluster.define(file for folder in definitions() for file in folder.glob("*.yaml"))
        cluster.api.apply({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": "high"}, "value": 1000,
        })  # fmt: skip
        Kubelet(cluster.api)
        yield cluster


class Kubelet(threading.Thread):
    """Reports every pod as running and ready, and lets it go. That is all there is of nodes."""

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


def rendered(values, *flags):
    code, text, problem = template(values, *flags)
    assert code == 0, problem
    return [document for document in yaml.safe_load_all(text) if document]


def example(name):
    (path,) = [path for path in EXAMPLES if path.name == name]
    return list(yaml.safe_load_all(path.read_text()))


def refusal(cluster, document, namespace, **query):
    """Why the API server does not take this."""
    with pytest.raises(Refused) as refused:
        cluster.api.apply(document, namespace, **query)
    return refused.value.message


def test_a_restricted_namespace_refuses_a_bare_pod(cluster):
    """What must be refused; else the other tests prove nothing."""
    cluster.api.namespace("bare", **restricted())
    bare = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare"},
        "spec": {"containers": [{"name": "a", "image": "a"}]},
    }  # fmt: skip
    assert 'violates PodSecurity "restricted' in refusal(cluster, bare, "bare")


@pytest.mark.parametrize(
    "kind, path, wrong",
    [
        ("Deployment", "spec.strategy.rollingUpdate", "maxUnavailabel"),
        ("NetworkPolicy", "spec.egress.0", "port"),
        ("VirtualService", "spec.http.0.retries", "retryWhen"),
        ("GRPCRoute", "spec.rules.0", "backendReference"),
    ],
)
def test_a_field_that_does_not_exist_is_refused(cluster, kind, path, wrong):
    documents = rendered({"mesh": "istio"}) + example("istio.yaml") + example("linkerd.yaml")
    inner = document = copy.deepcopy(next(d for d in documents if d["kind"] == kind))
    for key in path.split("."):
        inner = inner[int(key) if key.isdigit() else key]
    inner[wrong] = "1"
    assert wrong in refusal(cluster, document, "default", dryRun="All")


@pytest.mark.parametrize("name", [name for name, *_ in SETS])
def test_a_set_of_values_is_taken_without_a_warning_and_its_pods_are_made(cluster, name):
    """In a restricted namespace of its own."""
    values, *flags = next(row for row_name, *row in SETS if row_name == name)
    namespace = re.sub(r"\W+", "-", name).lower()
    cluster.api.namespace(namespace, **restricted(), **restricted("warn"))
    documents = rendered(values, *flags, "--namespace", namespace)
    assert len(documents) > 1
    for document in documents:
        _, warnings = cluster.api.apply(document, namespace)
        assert not warnings, document["kind"]
    (deployment,) = [d for d in documents if d["kind"] == "Deployment"]
    path = cluster.api.path(deployment, namespace)

    def available():
        status = cluster.api.get(path)["status"]
        for condition in status.get("conditions", []):
            assert condition["type"] != "ReplicaFailure", condition["message"]
        return status.get("availableReplicas", 0)

    wait_until(f"pods of {name}", available)


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


def test_each_value_of_the_chart_is_set_to_something_else_in_one_of_the_sets():
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    # `global` is Helm's own, for subcharts.
    every = [path for path in leaves(schema["properties"]) if path != ("global",)]
    assert every
    assert not [
        ".".join(path)
        for path in every
        if all(value(v, path) in (None, value(defaults, path)) for _, v, *_ in SETS)
    ]


@pytest.mark.parametrize("name", ["istio.yaml", "gateway-api.yaml", "linkerd.yaml"])
def test_an_example_is_taken_without_a_warning(cluster, name):
    cluster.api.namespace("examples", **restricted())
    # No package registry has Linkerd's definitions.
    known = [d for d in example(name) if not d["apiVersion"].startswith("policy.linkerd.io/")]
    assert known
    for document in known:
        _, warnings = cluster.api.apply(document, "examples")
        assert not warnings, document["kind"]


class Release:
    """The chart, installed by Helm into a namespace."""

    def __init__(self, cluster, namespace):
        self.api, self.kubeconfig, self.namespace = cluster.api, cluster.kubeconfig, namespace

    def helm(self, version, *command, values=None):
        given = ("--values", "-") if values is not None else ()
        code, out, problem = run(
            program(f"helm-{version}"), *command, *given, "--namespace", self.namespace,
            "--kubeconfig", self.kubeconfig, "--wait", "--timeout", "90s",
            text=yaml.safe_dump(values or {}),
        )  # fmt: skip
        assert code == 0, problem
        # Warnings of the API server, such as those of PodSecurity.
        assert not re.findall(r".*(?:[Ww]arning|WARN).*", problem)

    def list(self, group, kind):
        return self.api.items(f"/{group}/namespaces/{self.namespace}/{kind}")

    def one(self, group, kind):
        (found,) = self.list(group, kind)
        return found

    def disruptions(self):
        return self.one("apis/policy/v1", "poddisruptionbudgets")["status"].get("disruptionsAllowed")

    def deployment(self):
        return self.one("apis/apps/v1", "deployments")["spec"]

    def endpoints(self):
        slices = self.list("apis/discovery.k8s.io/v1", "endpointslices")
        ready = {e["addresses"][0] for s in slices for e in s["endpoints"] or [] if e["conditions"]["ready"]}
        ports = {(p["name"], p["port"]) for s in slices for p in s["ports"] or []}
        return len(ready), ports

    def remains(self):
        kinds = [
            ("api/v1", "services"), ("api/v1", "pods"), ("api/v1", "secrets"),
            ("apis/apps/v1", "deployments"), ("apis/apps/v1", "replicasets"),
            ("apis/autoscaling/v2", "horizontalpodautoscalers"),
            ("apis/policy/v1", "poddisruptionbudgets"),
            ("apis/networking.k8s.io/v1", "networkpolicies"),
            ("apis/discovery.k8s.io/v1", "endpointslices"),
        ]  # fmt: skip
        accounts = self.list("api/v1", "serviceaccounts")
        own = [a for a in accounts if a["metadata"]["name"] != "default"]
        return own + [item for kind in kinds for item in self.list(*kind)]


@pytest.mark.parametrize(
    "first, second", [*((helm, helm) for helm in [HELM, *OLDER_HELMS]), (OLDER_HELMS[-1], HELM)]
)
def test_helm_installs_upgrades_rolls_back_and_uninstalls(cluster, first, second):
    """Installed by one Helm, upgraded by the same or by a later one."""
    release = Release(cluster, f"ingestion-{first}-{second}".replace(".", "-"))
    cluster.api.namespace(release.namespace, **restricted(), **restricted("warn"))
    release.helm(first, "install", "gw", CHART, values={})

    def settled():
        ports = {("grpc", 50051), ("admin", 9464)}
        return release.deployment()["replicas"] == 2 and release.endpoints() == (2, ports)

    wait_until("the autoscaler's minimum of 2, both endpoints", settled)
    wait_until("one pod may go", lambda: release.disruptions() == 1)
    limit = {"settings": {"maxInFlight": 100}, "mesh": "istio"}
    release.helm(second, "upgrade", "gw", CHART, values=limit)
    deployment = release.deployment()
    (container,) = deployment["template"]["spec"]["containers"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["AEP_GATEWAY_MAX_IN_FLIGHT"] == "100"
    assert deployment["replicas"] == 2, "the autoscaler's replicas are left alone"
    release.helm(second, "rollback", "gw", "1")
    annotations = release.deployment()["template"]["metadata"]["annotations"]
    assert not [a for a in annotations if "istio" in a]
    release.helm(second, "uninstall", "gw")
    wait_until("nothing is left of the release", lambda: not release.remains())
