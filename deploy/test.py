"""The Helm chart and the examples: rendered, checked against schemas and against the real
gateway and Envoy. Started by test.sh."""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import grpc
import schemas
import yaml
from aep.ingestion.v1 import batch_service_pb2 as pb
from aep.ingestion.v1 import batch_service_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

GATEWAY, CRDS = sys.argv[1], [Path(path) for path in sys.argv[2:]]
DEPLOY = Path(__file__).resolve().parent
TOOLS = DEPLOY / ".test"
CHART = DEPLOY / "chart" / "aep-batch-gateway"
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))
KUBERNETES = ["1.29.0", "1.31.0", "1.33.0", "1.35.0", "1.37.0"]

EVERY_SETTING = {
    "requestTimeout": "30s", "drainDelay": "3s", "drainTimeout": "40s",
    # Go would print it with an exponent.
    "maxInFlight": 1000000, "maxConnections": 1000,
    "upstreamUrl": "https://api.example.com/import", "catalogUrl": "https://api.example.com/catalog",
    "upstreamHttp": 1, "lookUp": "on-retry", "connectTimeout": "500ms", "maxConnectionAge": "5m",
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
    ("default API key alone", {"defaultCredentials": {"secretName": "a", "apiKeyKey": "key"}}),
    ("gRPC probes", {"probes": {"grpc": True}}),
    ("no autoscaling", {"autoscaling": {"enabled": False}}),
    ("autoscaling on what is in flight", {"autoscaling": {"metric": "in-flight"}}),
    ("autoscaling on CPU", {"autoscaling": {"metric": "cpu"}}, *CUSTOM_METRICS),
    ("a metrics adapter", {}, *CUSTOM_METRICS),
    ("istio", {"mesh": "istio"}),
    ("istio ambient", {"mesh": "istio-ambient"}),
    ("linkerd", {"mesh": "linkerd"}),
    ("all namespaces", {"networkPolicy": {"callers": ["*"], "metrics": []}}),
    ("upstream CA", {"upstreamCa": {"configMapName": "proxy-ca"}}),
    ("IPv6", {"listenHost": "[::]"}),
    ("long drain", {"settings": {"requestTimeout": "100s", "drainDelay": "30s", "drainTimeout": "120s"}}),
    ("least grace", {"terminationGracePeriodSeconds": 32}),
    ("own name", {"fullnameOverride": "batches", "image": {"tag": "1.2.3"}}),
]  # fmt: skip

# values, and what helm says
BAD_VALUES = [
    ({"tlss": {}}, "additional properties 'tlss' not allowed"),
    ({"tls": {"secret": "a"}}, "additional properties 'secret' not allowed"),
    ({"defaultCredentials": {"token": "eyJ"}}, "additional properties 'token' not allowed"),
    ({"defaultCredentials": {"apiKey": "a"}}, "additional properties 'apiKey' not allowed"),
    ({"settings": {"listen": "0.0.0.0:1"}}, "additional properties 'listen' not allowed"),
    ({"settings": {"defaultApiKey": "a"}}, "additional properties 'defaultApiKey' not allowed"),
    ({"settings": {"requestTimeout": 20}}, "/settings/requestTimeout': got number, want string"),
    ({"settings": {"requestTimeout": "1m"}}, "/settings/requestTimeout': '1m' does not match"),
    ({"settings": {"requestTimeout": "0s"}}, "/settings/requestTimeout': '0s' does not match"),
    ({"settings": {"drainDelay": "500ms"}}, "/settings/drainDelay': '500ms' does not match"),
    ({"settings": {"drainTimeout": None}}, "missing property 'drainTimeout'"),
    ({"settings": {"maxInFlight": 0}}, "/settings/maxInFlight': minimum: got 0, want 1"),
    ({"settings": {"maxInFlight": 1000001}}, "/settings/maxInFlight': maximum"),
    ({"settings": {"maxInFlight": "250"}}, "/settings/maxInFlight': got string, want integer"),
    ({"settings": {"connectTimeout": "2"}}, "/settings/connectTimeout': '2' does not match"),
    ({"settings": {"lookUp": "sometimes"}}, "/settings/lookUp': value must be one of"),
    ({"settings": {"upstreamHttp": 3}}, "/settings/upstreamHttp': value must be one of"),
    ({"settings": {"upstreamUrl": "platform.adobe.io"}}, "/settings/upstreamUrl'"),
    ({"settings": {"reflection": "no"}}, "/settings/reflection': got string, want boolean"),
    ({"settings": {"logFormat": "xml"}}, "/settings/logFormat': value must be one of"),
    ({"mesh": "consul"}, "/mesh': value must be one of"),
    ({"image": {"digest": "latest"}}, "/image/digest': 'latest' does not match"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy': value must be one of"),
    ({"service": {"port": 70000}}, "/service/port': maximum: got 70,000, want 65,535"),
    ({"listenHost": "127.0.0.1"}, "/listenHost': value must be one of"),
    ({"replicas": 0}, "/replicas': minimum: got 0, want 1"),
    ({"autoscaling": {"metric": "memory"}}, "/autoscaling/metric': value must be one of"),
    ({"autoscaling": {"targetPercent": 0}}, "/autoscaling/targetPercent': minimum"),
    ({"podDisruptionBudget": {"maxUnavailable": 0}}, "/podDisruptionBudget/maxUnavailable'"),
    ({"networkPolicy": {"callers": "orders"}}, "/networkPolicy/callers': got string, want array"),
    ({"networkPolicy": {"callers": ["Orders"]}}, "/networkPolicy/callers/0': 'Orders' does not"),
    ({"resources": {"limit": {}}}, "additional properties 'limit' not allowed"),
    ({"podAnnotations": {"a": True}}, "/podAnnotations/a': got boolean, want string"),
    ({"terminationGracePeriodSeconds": "60s"}, "/terminationGracePeriodSeconds'"),
    # What only the templates can compare.
    ({"terminationGracePeriodSeconds": 31}, "must be at least 32"),
    ({"terminationGracePeriodSeconds": 60, "settings": {"drainTimeout": "60s"}}, "at least 67"),
    ({"settings": {"drainTimeout": "20s"}}, "drainTimeout (20s) must be more than"),
    ({"settings": {"requestTimeout": "60s"}}, "must be more than settings.requestTimeout (60s)"),
    ({"defaultCredentials": {"secretName": "a", "tokenKey": "t"}}, "callersAreAuthenticated"),
    ({"defaultCredentials": {"apiKeyKey": "a"}}, "need defaultCredentials.secretName"),
    ({"defaultCredentials": {"secretName": "a"}}, "tokenKey or apiKeyKey"),
    ({"tls": {"clientCaSecretName": "a"}}, "needs tls.secretName"),
    ({"tls": {"secretName": "a", "allowedClients": ["b"]}}, "needs tls.clientCaSecretName"),
    ({"tls": TLS, "probes": {"grpc": True}}, "kubelet speaks no TLS"),
    ({"autoscaling": {"minReplicas": 7}}, "must not be less than autoscaling.minReplicas"),
    ({"extraEnv": [{"name": "AEP_GATEWAY_LISTEN", "value": "a"}]}, "is set by other values"),
]  # fmt: skip

passed = failed = 0


def check(what, problems):
    """`problems`: a list of what is wrong, or whether something is."""
    global passed, failed
    passed, failed = (passed, failed + 1) if problems else (passed + 1, failed)
    print(f"{'FAILED ' if problems else 'ok     '} {what}", flush=True)
    if isinstance(problems, list):
        for problem in problems[:10]:
            print("          " + str(problem).replace("\n", "\n          "))


def run(*command, text=None):
    done = subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def helm(command, values, *flags):
    given = yaml.safe_dump(values)
    return run(TOOLS / "bin/helm", *command, CHART, "--values", "-", *flags, text=given)


def template(values, *flags):
    return helm(["template", "gw"], values, "--namespace", "ingestion", *flags)


# Rendering


class Rendered:
    """What a set of values becomes, and how to find things in it."""

    def __init__(self, name, values, *flags):
        self.name, self.values = name, values
        code, self.text, self.error = template(values, *flags)
        self.documents = [d for d in yaml.safe_load_all(self.text) if d] if code == 0 else []

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


# Each says what is wrong with a rendered set; nothing, if it is right.


def service(r):
    pod_labels = r.pod["metadata"]["labels"]
    for found in r.all("Service"):
        spec = found["spec"]
        port, *admin = spec["ports"]
        if admin and (admin[0]["port"], admin[0]["targetPort"]) != (r.port("admin"), "admin"):
            yield f"port is {admin}"
        if port["name"] != "grpc" or port["targetPort"] != "grpc":
            yield f"port is {port}"
        if port["appProtocol"] != ("https" if r.value("tls.secretName") else "kubernetes.io/h2c"):
            yield f"appProtocol is {port['appProtocol']}"
        if not spec["selector"].items() <= pod_labels.items():
            yield "does not select the pods"
        for test in r.all("Pod"):
            if spec["selector"].items() <= test["metadata"]["labels"].items():
                yield "sends calls to the test's pod"
    if len(r.all("Service")) != 1 + r.value("service.headless"):
        yield "number of Services"


def probes(r):
    ports = {p["name"] for p in r.container["ports"]}
    if ports != {"grpc", "admin"}:
        yield f"ports are {ports}"
    paths = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for name, path in paths.items():
        probe = r.container[name]
        if r.value("probes.grpc") and name != "livenessProbe":
            if probe.get("grpc") != {"port": r.port("grpc")} or "httpGet" in probe:
                yield f"{name} is {probe}"
        elif probe.get("httpGet") != {"path": path, "port": "admin"} or "grpc" in probe:
            yield f"{name} is {probe}"


def restricted(r):
    """The Pod Security Standard `restricted`, and a read-only root."""
    for pod in [r.pod, *r.all("Pod")]:
        spec = pod["spec"]
        context = spec["securityContext"]
        if not context["runAsNonRoot"] or context["runAsUser"] != 65532:
            yield "may be root"
        if context["seccompProfile"] != {"type": "RuntimeDefault"}:
            yield "seccomp"
        if spec["automountServiceAccountToken"]:
            yield "token of the service account"
        if any(spec.get(field) for field in ["hostNetwork", "hostPID", "hostIPC"]):
            yield "host namespaces"
        for container in spec["containers"]:
            if container["securityContext"] != {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }:
                yield f"securityContext is {container['securityContext']}"
            if "command" in container:
                yield "a command, though the image has no shell"
    for account in r.all("ServiceAccount"):
        if account["automountServiceAccountToken"]:
            yield "token of the service account"


def drain(r):
    env = {name: e.get("value") for name, e in r.environment.items()}
    delay, timeout, request = (
        seconds(env[f"AEP_GATEWAY_{name}"])
        for name in ["DRAIN_DELAY", "DRAIN_TIMEOUT", "REQUEST_TIMEOUT"]
    )
    grace = r.pod["spec"]["terminationGracePeriodSeconds"]
    if not request < timeout < delay + timeout + 2 <= grace:
        yield f"{request}, {timeout}, {delay} + {timeout} + 2, {grace} do not grow"


def scaling(r):
    deployment = r.one("Deployment")
    name = deployment["metadata"]["name"]
    replicas = deployment["spec"].get("replicas")
    if r.value("autoscaling.enabled"):
        spec = r.one("HorizontalPodAutoscaler")["spec"]
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        if spec["scaleTargetRef"] != target:
            yield f"scales {spec['scaleTargetRef']}"
        if replicas is not None:
            yield "the Deployment has replicas, which would undo the scaling at each upgrade"
        least = spec["minReplicas"]
        (metric,) = spec["metrics"]
        wants = {"auto": r.name == "a metrics adapter", "in-flight": True, "cpu": False}
        if wants[r.value("autoscaling.metric")]:
            if metric["pods"]["metric"]["name"] != "aep_gateway_creates_in_flight":
                yield f"scales on {metric}"
            limit = r.value("settings.maxInFlight")
            if not 0 < int(metric["pods"]["target"]["averageValue"]) < limit:
                yield f"target {metric} with a limit of {limit}"
        elif metric["containerResource"]["container"] != r.container["name"]:
            yield f"scales on {metric}"
    else:
        if r.all("HorizontalPodAutoscaler"):
            yield "has a HorizontalPodAutoscaler"
        least = replicas
    for budget in r.all("PodDisruptionBudget"):
        labels = budget["spec"]["selector"]["matchLabels"]
        if not labels.items() <= r.pod["metadata"]["labels"].items():
            yield "the PodDisruptionBudget does not select the pods"
        allowed = budget["spec"]["maxUnavailable"]
        if isinstance(allowed, int) and allowed >= least:
            yield f"{least} replicas, of which {allowed} may go at once"


def secrets(r):
    if r.all("Secret") or r.all("ConfigMap"):
        yield "has a Secret or a ConfigMap"
    for name, entry in r.environment.items():
        secret = re.search("TOKEN$|API_KEY$|PASSWORD|SECRET", name)
        if secret and set(entry) != {"name", "valueFrom"}:
            yield f"{entry}"


def files(r):
    """Every file that the gateway is told of is mounted, whole, and read-only."""
    volumes = {v["name"]: v for v in r.pod["spec"].get("volumes", [])}
    mounted = set()
    for mount in r.container.get("volumeMounts", []):
        volume = volumes.pop(mount["name"])
        source = volume.get("secret") or volume["configMap"]
        if "subPath" in mount or not mount["readOnly"]:
            yield f"{mount}"
        if "secret" in volume and source["defaultMode"] != 0o440:
            yield f"{volume}"
        mounted |= {f"{mount['mountPath']}/{item['path']}" for item in source["items"]}
    if volumes:
        yield f"not mounted: {volumes}"
    told = {e["value"] for e in r.environment.values() if e.get("value", "").startswith("/")}
    if mounted != told:
        yield f"mounted are {mounted}, told {told}"


def network(r):
    policies = r.all("NetworkPolicy")
    if not r.value("networkPolicy.enabled"):
        if policies:
            yield "has a NetworkPolicy"
        return
    spec = r.one("NetworkPolicy")["spec"]
    if spec["policyTypes"] != ["Ingress", "Egress"]:
        yield "policyTypes"
    if not spec["podSelector"]["matchLabels"].items() <= r.pod["metadata"]["labels"].items():
        yield "does not select the pods"
    mesh = r.value("mesh")
    calls, metrics = spec["ingress"]
    for rule, port, more in [
        (calls, "grpc", {"istio-ambient": {15008}}),
        (metrics, "admin", {"istio": {15090}, "linkerd": {4191}}),
    ]:
        if {p["port"] for p in rule["ports"]} != {r.port(port)} | more.get(mesh, set()):
            yield f"ingress {rule}"
        if not rule["from"] or {} in rule["from"]:
            yield f"ingress from anywhere: {rule}"
    callers = r.value("networkPolicy.callers")
    if "*" not in callers and {"namespaceSelector": {}} in calls["from"]:
        yield "calls from every namespace"
    if len(calls["from"]) != 1 + len(callers):
        yield f"calls from {calls['from']}"
    test, *namespaces = metrics["from"]
    if not all(
        test["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        for pod in r.all("Pod")
    ):
        yield "does not let the test's pod in"
    if len(namespaces) != len(r.value("networkPolicy.metrics")):
        yield f"metrics for {namespaces}"
    out = {
        "istio": {15012}, "linkerd": {8080, 8086, 8090}, "istio-ambient": {15008},
    }.get(mesh, set()) | {p["port"] for e in r.value("networkPolicy.extraEgress") for p in e["ports"]}
    if {p["port"] for rule in spec["egress"] for p in rule["ports"]} != {53, 443} | out:
        yield f"egress {spec['egress']}"


def mesh(r):
    """The admin port is not the sidecar's, and the sidecar outlives the gateway."""
    name, admin = r.value("mesh"), str(r.port("admin"))
    wanted = {
        "none": {},
        "istio": {
            "sidecar.istio.io/nativeSidecar": "true",
            "traffic.sidecar.istio.io/excludeInboundPorts": admin,
        },
        "istio-ambient": {},
        "linkerd": {
            "linkerd.io/inject": "enabled",
            "config.beta.linkerd.io/proxy-enable-native-sidecar": "true",
            "config.linkerd.io/skip-inbound-ports": admin,
        },
    }[name]
    annotations = r.pod["metadata"]["annotations"]
    found = {k: v for k, v in annotations.items() if "istio.io" in k or "linkerd.io" in k}
    if found != wanted:
        yield f"annotations are {found}"


def bounds(r):
    limits = r.container["resources"].get("limits", {})
    if "cpu" in limits:
        yield "a CPU limit"
    if r.value("resources") and "memory" not in limits:
        yield "no memory limit"


EVERY_RENDERING = [
    (service, "the Service has a port grpc of h2c (https with TLS), and no pod but the gateway's"),
    (probes, "probes ask the admin port, or kubelet's gRPC probe the gRPC port"),
    (restricted, "pods are restricted, have a read-only root and no token"),
    (drain, "request timeout < drain timeout < drain delay + drain timeout + 2 <= grace period"),
    (scaling, "autoscaler, replicas and disruption budget fit together"),
    (secrets, "no secret is in a value of the environment or in a ConfigMap"),
    (files, "every file that the gateway is told of is mounted, and no other"),
    (network, "the NetworkPolicy lets in gRPC and metrics, and out DNS and 443"),
    (mesh, "the annotations of the mesh"),
    (bounds, "memory is bounded, CPU is not"),
]


def check_chart():
    rendered = [Rendered(*row) for row in VALUE_SETS]
    for r, row in zip(rendered, VALUE_SETS):
        code, out, err = helm(["lint", "--strict"], row[1])
        check(f"lint and render: {r.name}", [out, err] if code else [] if r.documents else [r.error])
    rendered = [r for r in rendered if r.documents]
    for wrong, what in EVERY_RENDERING:
        found = [f"{r.name}: {problem}" for r in rendered for problem in wrong(r)]
        check(f"{what} ({len(rendered)} renderings)", found)
    for values, message in BAD_VALUES:
        code, _, err = template(values)
        wrong = code == 0 or message not in err
        check(f"refused: {json.dumps(values)}", [f"not {message!r}, but exit {code}: {err}"] if wrong else [])
    code, _, err = template({}, "--kube-version", "1.28.0")
    check("refused: Kubernetes 1.28", code == 0 or "incompatible with Kubernetes" not in err)
    check_monitoring()
    return rendered


def check_monitoring():
    """Alerts and dashboard are in the chart, or helm says that they are not."""
    for value, file, kind in [
        ("prometheusRule", "alerts.yaml", "PrometheusRule"),
        ("dashboard", "dashboard.json", "ConfigMap"),
    ]:
        r = Rendered(value, {"monitoring": {value: {"enabled": True}}})
        if (CHART / "files" / file).exists():
            wrong = not r.documents or len(r.all(kind)) != 1
            check(f"{kind} with {file}", [r.error] if wrong else [])
            RULES.append(r)
        else:
            check(f"{kind}: helm says that there is no {file}", f"no files/{file}" not in r.error)


RULES = []


# Schemas


def kubeconform(version, locations, folder):
    """What does not fit, as `file kind/name: why`, and how many documents there were."""
    flags = [flag for location in locations[version] for flag in ("-schema-location", location)]
    _, out, err = run(
        TOOLS / "bin/kubeconform", "-strict", "-summary", "-output", "json", "-n", 2,
        "-kubernetes-version", version, *flags, folder,
    )  # fmt: skip
    if not out:
        return [err], 0
    said = json.loads(out)
    found = [
        f"{Path(r['filename']).name} {r['kind']}/{r['name']}: {r['msg']}" for r in said["resources"]
    ]
    return found, sum(said["summary"].values()) - said["summary"]["skipped"]


# A misspelling that each schema must find: file, what to replace, by what
MISSPELT = [
    ("defaults", "maxUnavailable: 0", "maxUnavailabel: 0"),
    ("defaults", "appProtocol:", "appProtokoll:"),
    ("defaults", "automountServiceAccountToken: false", "automountServiceAccountToken: never"),
    ("everything", "podMetricsEndpoints:", "podMetricEndpoints:"),
    ("istio", "retryOn:", "retryWhen:"),
    ("istio", "mode: STRICT", "mode: STRONG"),
    ("gateway-api", "gatewayClassName:", "className:"),
    ("linkerd", "retry.linkerd.io/limit: \"2\"", "retry.linkerd.io/limit: 2"),
    ("linkerd", "identities:", "identity:"),
    ("linkerd", "backendRefs:", "backendReference:"),
]  # fmt: skip


def check_schemas(rendered):
    locations = schemas.write(TOOLS / "schemas", KUBERNETES, CRDS)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "right").mkdir()
        for r in rendered + RULES:
            (folder / "right" / f"chart {r.name}.yaml").write_text(r.text)
        for example in EXAMPLES:
            if example.stem != "envoy":
                (folder / "right" / f"example {example.name}").write_text(example.read_text())
        documents = sum(len(r.documents) for r in rendered + RULES) + sum(
            len(list(yaml.safe_load_all(e.read_text()))) for e in EXAMPLES if e.stem != "envoy"
        )
        for version in KUBERNETES:
            found, count = kubeconform(version, locations, folder / "right")
            if count != documents:
                found.append(f"{count} documents were checked, not {documents}")
            check(f"schemas of Kubernetes {version}, meshes and monitoring: {count} documents", found)
        for number, (name, right, wrong) in enumerate(MISSPELT):
            (wrong_folder := folder / str(number)).mkdir()
            source = "chart" if name in ("defaults", "everything") else "example"
            text = (folder / "right" / f"{source} {name}.yaml").read_text()
            assert right in text, (name, right)
            (wrong_folder / "wrong.yaml").write_text(text.replace(right, wrong))
            found, _ = kubeconform(KUBERNETES[-1], locations, wrong_folder)
            check(f"the schema finds `{wrong}`", not found)
    istio = yaml.safe_load((CRDS[0].parent / "annotation/annotations.yaml").read_text())
    istio = istio["annotations"] + yaml.safe_load((CRDS[0].parent / "label/labels.yaml").read_text())["labels"]
    known = {entry["name"] for entry in istio}
    used = set()
    for r in rendered:
        for pod in [r.pod, *r.all("Pod")]:
            used |= pod["metadata"]["annotations"].keys() | pod["metadata"]["labels"].keys()
    used = {name for name in used if "istio.io/" in name}
    check(f"Istio knows {', '.join(sorted(used))}", sorted(used - known) or not used)


# The gateway


def snake(name):
    return re.sub("([A-Z])", r"_\1", name).lower()


# Flags of the gateway that are no key of `settings`.
OTHER_FLAGS = """
    listen admin_listen upstream_ca_file tls_cert_file tls_key_file tls_client_ca_file
    tls_allowed_clients default_token_file default_api_key default_org_id default_sandbox_name
    fixed_defaults callers_are_authenticated
""".split()


def configuration(environment):
    """What `aep-batch-gateway config` says: key -> (value, where from)."""
    done = subprocess.run(
        [GATEWAY, "config"], env=environment, capture_output=True, text=True, timeout=30
    )
    lines = re.findall(r'^(?:# )?(\w+)(?: = "(.*)" # (.*)| is not set| = (.*))$', done.stdout, re.M)
    return done, {key: (value or other, source) for key, value, source, other in lines}


def gateway_environment(r, folder, host=None):
    """The environment of the container, with its files in a folder and its Secrets made up."""
    environment = {}
    for name, entry in r.environment.items():
        value = entry.get("value", "made-up")
        if value.startswith("/"):
            value = f"{folder}{value}"
        elif host and name.endswith("LISTEN"):
            value = value.replace(r.value("listenHost"), host)
        environment[name] = value
    return environment


def write_files(folder):
    """Certificate, key, authority and token, where the chart mounts them."""
    base = Path(f"{folder}/etc/aep-batch-gateway")
    for name in ["tls", "client-ca", "upstream-ca", "default-token"]:
        (base / name).mkdir(parents=True)
    code, _, err = run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-days", 1, "-subj", "/CN=gateway", "-addext", "subjectAltName=DNS:gateway",
        "-keyout", base / "tls/tls.key", "-out", base / "tls/tls.crt",
    )  # fmt: skip
    assert code == 0, err
    certificate = (base / "tls/tls.crt").read_text()
    (base / "client-ca/ca.crt").write_text(certificate)
    (base / "upstream-ca/ca.crt").write_text(certificate)
    (base / "default-token/token").write_text("made-up\n")


def check_gateway(rendered):
    done, keys = configuration({})
    chart_keys = {snake(k) for k in EVERY_SETTING} | set(OTHER_FLAGS)
    schema = json.loads((CHART / "values.schema.json").read_text())
    in_schema = {snake(k) for k in schema["properties"]["settings"]["properties"]} | set(OTHER_FLAGS)
    check("every flag of the gateway is a value of the chart, and the other way round",
          sorted((keys.keys() - {"config"}) ^ in_schema))  # fmt: skip
    check("the set `everything` has every setting", sorted(chart_keys ^ in_schema))
    section = re.search(r"^settings:\n(.*?)^\S", (CHART / "values.yaml").read_text(), re.S | re.M)
    told = re.findall(r"^  # (\w+): (.*)$", section.group(1), re.M)
    wrong = [
        f"{name}: {value}, but the gateway has {keys.get(snake(name))}"
        for name, value in told
        if (value.strip('"'), "default") != keys.get(snake(name))
    ]
    check(f"values.yaml tells the gateway's own defaults ({len(told)} of them)", wrong or not told)
    version = run(GATEWAY, "--version")[1].split()[-1]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    check("appVersion is the gateway's version", version != chart["appVersion"])

    with tempfile.TemporaryDirectory() as folder:
        write_files(folder)
        for r in rendered:
            environment = gateway_environment(r, folder)
            done, said = configuration(environment)
            problems = [done.stderr] if done.returncode else []
            for name, value in environment.items():
                if not name.startswith("AEP_GATEWAY_"):
                    continue
                key = name.removeprefix("AEP_GATEWAY_").lower()
                got, source = said.get(key, ("(unknown)", ""))
                redacted = "valueFrom" in r.environment[name]
                if (got != value and not redacted) or "environment" not in source + got:
                    problems.append(f"{name}={value} is {got!r} {source}")
            check(f"the gateway takes the environment: {r.name}", problems)
        chosen = ["defaults", "everything", "mtls", "managed credentials", "gRPC probes"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            runs = [
                pool.submit(serve_as_rendered, r, folder, f"127.77.0.{number}")
                for number, r in enumerate(rendered, 1)
                if r.name in chosen
            ]
            for one in runs:
                check(*one.result())


def http(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError as error:
        return 0, str(error)


def health(address):
    """As kubelet's gRPC probe asks."""
    with grpc.insecure_channel(address) as channel:
        try:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            answer = check(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return "SERVING" if answer == b"\x08\x01" else answer


def serve_as_rendered(r, folder, host):
    """Runs the gateway as the pod would, and does what kubelet and Prometheus would do. On another
    loopback address, because the ports are those of the chart."""
    what = f"runs as rendered, with the ports, probes, metrics and grace period: {r.name}"
    problems = []
    log = open(f"{folder}/{host}.log", "w+")
    gateway = subprocess.Popen(
        [GATEWAY, *r.container["args"]], env=gateway_environment(r, folder, host),
        stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    try:
        first = gateway.stdout.readline()
        if not first:
            gateway.wait(10)
            log.seek(0)
            return what, [log.read()]
        listens = json.loads(first)
        expected = {"listen": f"{host}:{r.port('grpc')}", "admin": f"{host}:{r.port('admin')}"}
        if listens != expected:
            problems.append(f"listens at {listens}, not {expected}")
        for name in ["startupProbe", "readinessProbe", "livenessProbe"]:
            probe = r.container[name]
            if "grpc" in probe:
                serving = health(f"{host}:{probe['grpc']['port']}")
                if serving != "SERVING":
                    problems.append(f"{name}: {serving}")
            else:
                url = f"http://{host}:{r.port(probe['httpGet']['port'])}{probe['httpGet']['path']}"
                if http(url)[0] != 200:
                    problems.append(f"{name}: {http(url)}")
        (container,) = r.one("Pod")["spec"]["containers"]
        args = [re.sub(r"\$\(\w+_SERVICE_HOST\)", host, arg) for arg in container["args"]]
        if asked := run(GATEWAY, *args)[0]:
            problems.append(f"{args} exits with {asked}")
        status, page = http(f"http://{host}:{r.port('admin')}/metrics")
        if status != 200 or "\naep_gateway_creates_in_flight 0" not in page:
            problems.append("no aep_gateway_creates_in_flight, which the autoscaler asks for")
        asked = time.monotonic()
        gateway.send_signal(signal.SIGTERM)
        while gateway.poll() is None and time.monotonic() < asked + 1:
            if http(f"http://{host}:{r.port('admin')}/readyz")[0] == 503:
                break
            time.sleep(0.05)
        else:
            problems.append("/readyz is not 503 within a second of SIGTERM")
        grace = r.pod["spec"]["terminationGracePeriodSeconds"]
        code = gateway.wait(grace)
        took = time.monotonic() - asked
        delay = seconds(r.environment["AEP_GATEWAY_DRAIN_DELAY"]["value"])
        if code != 0 or took < delay:
            problems.append(f"ended with {code} after {took:.1f} s; the drain delay is {delay} s")
    except subprocess.TimeoutExpired:
        problems.append("did not end within the grace period")
    finally:
        gateway.kill()
        gateway.wait()
        log.close()
    return what, problems


# Envoy


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
            return "OK", "CREATED"
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
        ("", "", ("OK", "CREATED", 1), False),
        ("reset-after-create", "", ("UNKNOWN", "UNKNOWN", 1), False),
        ("lookup-503", "a", ("OK", "CREATED", 1), True),
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


def main():
    rendered = check_chart()
    check_schemas(rendered)
    check_gateway(rendered)
    check_envoy()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
