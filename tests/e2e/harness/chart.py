"""The Helm chart: sets of values, and what helm makes of them."""

import functools
import os
import re
from pathlib import Path

import yaml

from harness.process import E2E, ROOT, RUN, HarnessError, run

CHART = ROOT / "deploy" / "chart" / "aep-batch-gateway"
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
KUBERNETES = ["1.29.0", "1.31.0", "1.33.0", "1.35.0", "1.37.0"]
INSTALL = E2E / "chart" / "install.sh"
HELM, *OLDER_HELMS = re.findall(r"/cmd/helm@(\S+)", INSTALL.read_text())

EVERY_SETTING = {
    "requestTimeout": "30s", "drainDelay": "3s", "drainTimeout": "40s",
    # Go would print it with an exponent.
    "maxInFlight": 1000000, "maxConnections": 1000,
    "upstreamUrl": "https://api.example.com/import", "catalogUrl": "https://api.example.com/catalog",
    "upstreamHttp": 1, "lookup": "on-retry", "generateExternalIds": True,
    "connectTimeout": "500ms", "maxConnectionAge": "5m",
    "forwardMetadata": "x-one,x-two", "reflection": False, "grpcWeb": True,
    "grpcWebOrigins": "https://app.example.com", "logFormat": "text", "logLevel": "info,h2=debug",
}  # fmt: skip
TLS = {"secretName": "gateway-tls"}
MTLS = {
    **TLS, "clientCaSecretName": "callers-ca", "clientCaKey": "ca.pem",
    "allowedClients": ["spiffe://cluster.local/ns/orders/sa/exporter", "billing.example.com"],
}  # fmt: skip
MANAGED = {
    "secretName": "adobe", "tokenKey": "token", "apiKeyKey": "api-key",
    "orgId": "5C1328435BF324E90A49402A@AdobeOrg", "sandboxName": "prod",
    "fixed": True, "callersAreAuthenticated": True,
}  # fmt: skip
CUSTOM_METRICS = ("--api-versions", "custom.metrics.k8s.io/v1beta2")

# name, values, further flags of helm template
VALUE_SETS = [
    ("defaults", {}),
    ("minimal", {
        "autoscaling": {"enabled": False}, "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False}, "replicas": 1,
        "serviceAccount": {"create": False}, "resources": {},
    }),
    ("everything", {
        "image": {"repository": "registry.example.com/gateway", "digest": "sha256:" + "a" * 64},
        "imagePullSecrets": [{"name": "registry"}],
        "settings": EVERY_SETTING, "tls": MTLS, "defaultCredentials": MANAGED,
        "upstreamCa": {"configMapName": "proxy-ca", "key": "proxy.pem"},
        "mesh": "istio",
        "service": {"port": 443, "headless": True, "annotations": {"a": "b"}},
        "autoscaling": {"metric": "in-flight", "minReplicas": 3, "maxReplicas": 9},
        "podDisruptionBudget": {"maxUnavailable": "20%"},
        "networkPolicy": {
            "callers": ["orders", "billing"], "metrics": ["monitoring", "agents"],
            "extraEgress": [{"ports": [{"port": 4318}]}],
        },
        "extraEnv": [
            {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"},
            {"name": "PROXY", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "url"}}},
        ],
        "monitoring": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
        "serviceAccount": {"annotations": {"a": "b"}},
        "podAnnotations": {"a": "b"}, "podLabels": {"c": "d"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "high", "terminationGracePeriodSeconds": 60,
    }),
    ("tls", {"tls": TLS}),
    ("mtls", {"tls": MTLS}),
    ("managed credentials", {"defaultCredentials": MANAGED}),
    ("a default token for allowed clients", {
        "tls": MTLS, "defaultCredentials": {"secretName": "a", "tokenKey": "t"},
    }),
    ("default API key alone", {"defaultCredentials": {"secretName": "a", "apiKeyKey": "key"}}),
    ("gRPC probes", {"probes": {"grpc": True}}),
    ("no autoscaling", {"autoscaling": {"enabled": False}}),
    ("autoscaling on what is in flight", {"autoscaling": {"metric": "in-flight"}}),
    ("autoscaling on CPU", {"autoscaling": {"metric": "cpu"}}, *CUSTOM_METRICS),
    ("a metrics adapter", {}, *CUSTOM_METRICS),
    ("istio", {"mesh": "istio"}),
    ("istio, gRPC probes", {"mesh": "istio", "probes": {"grpc": True}}),
    ("istio ambient", {"mesh": "istio-ambient"}),
    ("linkerd", {"mesh": "linkerd"}),
    ("all namespaces", {"networkPolicy": {"callers": ["*"], "metrics": []}}),
    ("upstream CA", {"upstreamCa": {"configMapName": "proxy-ca"}}),
    ("IPv6", {"listenHost": "[::]"}),
    ("long drain", {"settings": {"requestTimeout": "100s", "drainDelay": "30s", "drainTimeout": "120s"}}),
    ("least grace", {"terminationGracePeriodSeconds": 32}),
    ("own name", {"fullnameOverride": "batches", "image": {"tag": "1.2.3"}}),
]  # fmt: skip
MONITORING_SETS = [
    ("prometheusRule", {"monitoring": {"prometheusRule": {"enabled": True}}}),
    ("dashboard", {"monitoring": {"dashboard": {"enabled": True}}}),
]
NAMES = [name for name, *_ in VALUE_SETS]
ALL_NAMES = NAMES + [name for name, _ in MONITORING_SETS]


@functools.cache
def definitions():
    """The folders of the definitions (CRDs), of Istio first. When they are there, Helm is too."""
    code, out, problem = run(INSTALL, timeout=2700)
    if code != 0:
        raise HarnessError(problem[-3000:])
    return [Path(line) for line in out.splitlines()]


def program(name):
    definitions()
    return RUN / "chart" / "bin" / name


def helm(command, values, *flags, version=HELM):
    """Runs a command for the chart with these values: exit code, standard output, standard error."""
    home = {f"HELM_{kind}_HOME": str(RUN / "chart" / "helm") for kind in ("CACHE", "CONFIG", "DATA")}
    return run(
        program(f"helm-{version}"), *command, CHART, "--values", "-", *flags,
        text=yaml.safe_dump(values), env={**os.environ, **home, "KUBECONFIG": os.devnull},
    )  # fmt: skip


def template(values, *flags, version=HELM):
    return helm(["template", "gw"], values, "--namespace", "ingestion", *flags, version=version)


@functools.cache
def rendering(name):
    """What the set of values with this name becomes."""
    return next(Rendering(*row) for row in VALUE_SETS + MONITORING_SETS if row[0] == name)


class Rendering:
    """A rendered chart, and how to find things in it."""

    def __init__(self, name, values, *flags):
        self.name, self.values, self.flags = name, values, flags
        code, self.text, problem = template(values, *flags)
        assert code == 0, problem
        self.documents = [d for d in yaml.safe_load_all(self.text) if d]

    def all(self, kind):
        return [d for d in self.documents if d["kind"] == kind]

    def one(self, kind):
        (document,) = self.all(kind)
        return document

    @property
    def pod(self):
        return self.one("Deployment")["spec"]["template"]

    @property
    def container(self):
        (container,) = self.pod["spec"]["containers"]
        return container

    @property
    def environment(self):
        return {e["name"]: e for e in self.container["env"]}

    def port(self, name):
        return next(p["containerPort"] for p in self.container["ports"] if p["name"] == name)

    def value(self, path):
        """The value that holds: the set's own, or the chart's."""
        found = [self.values, yaml.safe_load((CHART / "values.yaml").read_text())]
        for key in path.split("."):
            found = [v[key] for v in found if isinstance(v, dict) and key in v]
        return found[0]


def seconds(text):
    return int(text.removesuffix("s"))
