"""The rendered chart, and what must hold for every rendering."""

import re

import yaml
from report import CHART, HELM, run


def helm(command, values, *flags, program=HELM):
    given = yaml.safe_dump(values)
    return run(program, *command, CHART, "--values", "-", *flags, text=given)


def template(values, *flags, program=HELM):
    return helm(["template", "gw"], values, "--namespace", "ingestion", *flags, program=program)


class Rendered:
    """What a set of values becomes, and how to find things in it."""

    def __init__(self, name, values, *flags):
        self.name, self.values, self.flags = name, values, flags
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
        (calls, "grpc", {"istio-ambient": {15008}, "linkerd": {4143}}),
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
            "prometheus.istio.io/merge-metrics": "false",
            # A probe of the gRPC port would meet the sidecar, which wants mTLS.
            **({} if r.value("probes.grpc") else {"sidecar.istio.io/rewriteAppHTTPProbers": "false"}),
        },
        "istio-ambient": {},
        "linkerd": {
            "linkerd.io/inject": "enabled",
            "config.beta.linkerd.io/proxy-enable-native-sidecar": "true",
            "config.linkerd.io/skip-inbound-ports": admin,
        },
    }[name]
    for test in r.all("Pod"):
        metadata = test["metadata"]
        out = {"sidecar.istio.io/inject": "false", "istio.io/dataplane-mode": "none"}
        if not out.items() <= metadata["labels"].items():
            yield "the test's pod is in the mesh"
        if metadata["annotations"]["linkerd.io/inject"] != "disabled":
            yield "the test's pod is in the mesh"
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
