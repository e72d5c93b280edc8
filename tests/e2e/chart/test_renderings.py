"""What helm makes of the chart: what must hold for every rendering, and what is refused."""

import json
import re

import pytest
import yaml
from harness.chart import (
    CHART, HELM, KUBERNETES, NAMES, OLDER_HELMS, TLS, helm, rendering, seconds, template,
)  # fmt: skip

# Built without its makefile, Helm 3 takes itself for one of Kubernetes 1.20.
NEWEST = ("--kube-version", KUBERNETES[-1])


@pytest.fixture(params=NAMES)
def r(request):
    """A rendering."""
    return rendering(request.param)


def test_every_rendering_has_documents_and_no_warning_of_helm_lint(r):
    code, out, problem = helm(["lint", "--strict"], r.values)
    assert code == 0, out + problem
    assert r.documents


def test_the_services_have_a_port_of_h2c_or_https_and_the_gateways_pods_alone(r):
    services = r.all("Service")
    assert len(services) == 1 + r.value("service.headless")
    for service in services:
        port, *admin = service["spec"]["ports"]
        if admin:
            assert (admin[0]["port"], admin[0]["targetPort"]) == (r.port("admin"), "admin")
        assert (port["name"], port["targetPort"]) == ("grpc", "grpc")
        assert port["appProtocol"] == ("https" if r.value("tls.secretName") else "kubernetes.io/h2c")
        selector = service["spec"]["selector"].items()
        assert selector <= r.pod["metadata"]["labels"].items()
        for test in r.all("Pod"):
            assert not selector <= test["metadata"]["labels"].items()


def test_probes_ask_the_admin_port_or_kubelet_asks_the_grpc_port(r):
    assert {p["name"] for p in r.container["ports"]} == {"grpc", "admin"}
    paths = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for name, path in paths.items():
        probe = r.container[name]
        if r.value("probes.grpc") and name != "livenessProbe":
            assert probe.get("grpc") == {"port": r.port("grpc")} and "httpGet" not in probe
        else:
            assert probe.get("httpGet") == {"path": path, "port": "admin"} and "grpc" not in probe


def test_pods_fit_the_standard_restricted_and_have_a_read_only_root_and_no_token(r):
    for pod in [r.pod, *r.all("Pod")]:
        spec = pod["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] == 65532
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        assert not any(spec.get(field) for field in ["hostNetwork", "hostPID", "hostIPC"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "command" not in container, "the image has no shell"
    for account in r.all("ServiceAccount"):
        assert not account["automountServiceAccountToken"]


def test_request_timeout_drain_and_grace_period_fit_together(r):
    env = {name: e.get("value") for name, e in r.environment.items()}
    delay, timeout, request = (
        seconds(env[f"AEP_GATEWAY_{name}"])
        for name in ["DRAIN_DELAY", "DRAIN_TIMEOUT", "REQUEST_TIMEOUT"]
    )
    grace = r.pod["spec"]["terminationGracePeriodSeconds"]
    assert request < timeout < delay + timeout + 2 <= grace


def test_autoscaler_replicas_and_disruption_budget_fit_together(r):
    deployment = r.one("Deployment")
    replicas = deployment["spec"].get("replicas")
    if r.value("autoscaling.enabled"):
        spec = r.one("HorizontalPodAutoscaler")["spec"]
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
        assert spec["scaleTargetRef"] == target
        assert replicas is None, "each upgrade would undo the scaling"
        least = spec["minReplicas"]
        (metric,) = spec["metrics"]
        by_calls = {"auto": r.name == "a metrics adapter", "in-flight": True, "cpu": False}
        if by_calls[r.value("autoscaling.metric")]:
            assert metric["pods"]["metric"]["name"] == "aep_gateway_executions_in_flight"
            limit = r.value("settings.maxInFlight")
            assert 0 < int(metric["pods"]["target"]["averageValue"]) < limit
        else:
            assert metric["containerResource"]["container"] == r.container["name"]
    else:
        assert not r.all("HorizontalPodAutoscaler")
        least = replicas
    for budget in r.all("PodDisruptionBudget"):
        labels = budget["spec"]["selector"]["matchLabels"]
        assert labels.items() <= r.pod["metadata"]["labels"].items()
        allowed = budget["spec"]["maxUnavailable"]
        assert not isinstance(allowed, int) or allowed < least


def test_no_secret_is_in_a_value_of_the_environment_or_in_a_config_map(r):
    assert not r.all("Secret") and not r.all("ConfigMap")
    for name, entry in r.environment.items():
        if re.search("TOKEN$|API_KEY$|PASSWORD|SECRET", name):
            assert set(entry) == {"name", "valueFrom"}


def test_every_file_that_the_gateway_is_told_of_is_mounted_read_only_and_no_other(r):
    """Whole volumes, so that Kubernetes updates them."""
    volumes = {v["name"]: v for v in r.pod["spec"].get("volumes", [])}
    mounted = set()
    for mount in r.container.get("volumeMounts", []):
        volume = volumes.pop(mount["name"])
        source = volume.get("secret") or volume["configMap"]
        assert "subPath" not in mount and mount["readOnly"]
        if "secret" in volume:
            assert source["defaultMode"] == 0o440
        mounted |= {f"{mount['mountPath']}/{item['path']}" for item in source["items"]}
    assert not volumes
    assert mounted == {e["value"] for e in r.environment.values() if e.get("value", "").startswith("/")}


def test_the_network_policy_lets_in_calls_and_metrics_and_out_dns_and_443(r):
    if not r.value("networkPolicy.enabled"):
        assert not r.all("NetworkPolicy")
        return
    spec = r.one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["podSelector"]["matchLabels"].items() <= r.pod["metadata"]["labels"].items()
    mesh = r.value("mesh")
    calls, metrics = spec["ingress"]
    for rule, port, more in [
        (calls, "grpc", {"istio-ambient": {15008}, "linkerd": {4143}}),
        (metrics, "admin", {"istio": {15090}, "linkerd": {4191}}),
    ]:
        assert {p["port"] for p in rule["ports"]} == {r.port(port)} | more.get(mesh, set())
        assert rule["from"] and {} not in rule["from"]
    callers = r.value("networkPolicy.callers")
    assert "*" in callers or {"namespaceSelector": {}} not in calls["from"]
    assert len(calls["from"]) == 1 + len(callers)
    test, *namespaces = metrics["from"]
    for pod in r.all("Pod"):
        assert test["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert len(namespaces) == len(r.value("networkPolicy.metrics"))
    out = {"istio": {15012}, "linkerd": {8080, 8086, 8090}, "istio-ambient": {15008}}.get(mesh, set())
    out |= {p["port"] for e in r.value("networkPolicy.extraEgress") for p in e["ports"]}
    assert {p["port"] for rule in spec["egress"] for p in rule["ports"]} == {53, 443} | out


def test_the_admin_port_is_not_the_sidecars_which_outlives_the_gateway(r):
    admin = str(r.port("admin"))
    expected = {
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
    }[r.value("mesh")]
    annotations = r.pod["metadata"]["annotations"]
    assert {k: v for k, v in annotations.items() if "istio.io" in k or "linkerd.io" in k} == expected
    for test in r.all("Pod"):
        metadata = test["metadata"]
        out = {"sidecar.istio.io/inject": "false", "istio.io/dataplane-mode": "none"}
        assert out.items() <= metadata["labels"].items(), "the test's pod is in the mesh"
        assert metadata["annotations"]["linkerd.io/inject"] == "disabled"


def test_memory_is_bounded_and_cpu_is_not(r):
    limits = r.container["resources"].get("limits", {})
    assert "cpu" not in limits
    assert "memory" in limits or not r.value("resources")


@pytest.mark.parametrize("version", OLDER_HELMS)
def test_an_older_helm_renders_the_same(r, version):
    """Each has another version of what reads the schema: 3.21.4 and 4.2.4 take `1` and `"1"` in an
    enum for the same value twice, and then refuse the chart."""
    code, out, problem = helm(["lint", "--strict"], r.values, *NEWEST, version=version)
    assert code == 0, out + problem
    code, out, problem = template(r.values, *NEWEST, *r.flags, version=version)
    assert code == 0, problem
    assert [d for d in yaml.safe_load_all(out) if d] == r.documents


@pytest.mark.parametrize(
    "value, file, kind",
    [("prometheusRule", "alerts.yaml", "PrometheusRule"), ("dashboard", "dashboard.json", "ConfigMap")],
)
def test_alerts_and_dashboard_are_in_the_chart(value, file, kind):
    content = yaml.safe_load((CHART / "files" / file).read_text())
    found = rendering(value).one(kind)
    assert (found.get("spec") or json.loads(*found["data"].values())) == content


def test_kubernetes_1_28_is_refused():
    code, _, problem = template({}, "--kube-version", "1.28.0")
    assert code != 0 and "incompatible with Kubernetes" in problem


# Values, and what helm says of them.
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
    ({"settings": {"lookup": "sometimes"}}, "/settings/lookup': value must be one of"),
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
    ({"tls": {**TLS, "clientCaSecretName": "b"},
      "defaultCredentials": {"secretName": "a", "tokenKey": "t"}}, "callersAreAuthenticated"),
    ({"defaultCredentials": {"apiKeyKey": "a"}}, "need defaultCredentials.secretName"),
    ({"defaultCredentials": {"secretName": "a"}}, "tokenKey or apiKeyKey"),
    ({"tls": {"clientCaSecretName": "a"}}, "needs tls.secretName"),
    ({"tls": {"secretName": "a", "allowedClients": ["b"]}}, "needs tls.clientCaSecretName"),
    ({"tls": TLS, "probes": {"grpc": True}}, "kubelet speaks no TLS"),
    ({"autoscaling": {"minReplicas": 7}}, "must not be less than autoscaling.minReplicas"),
    ({"extraEnv": [{"name": "AEP_GATEWAY_LISTEN", "value": "a"}]}, "is set by other values"),
]  # fmt: skip


@pytest.mark.parametrize("version", [HELM, *OLDER_HELMS])
@pytest.mark.parametrize("values, message", BAD_VALUES, ids=[json.dumps(bad) for bad, _ in BAD_VALUES])
def test_wrong_values_are_refused(values, message, version):
    code, _, problem = template(values, *NEWEST, version=version)
    assert code != 0 and message in problem
