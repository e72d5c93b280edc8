"""The real gateway takes what the chart tells it, and runs as it says."""

import json
import re
import shutil
import time
import urllib.error
import urllib.request

import grpc
import pytest
import yaml
from harness import certificates
from harness.chart import ALL_NAMES, CHART, EVERY_SETTING, rendering, seconds
from harness.process import Program, get, run, wait_until


def snake(name):
    return re.sub("([A-Z])", r"_\1", name).lower()


# Flags of the gateway that are no key of `settings`.
OTHER_FLAGS = """
    listen admin_listen upstream_ca_file tls_cert_file tls_key_file tls_client_ca_file
    tls_allowed_clients default_token_file default_api_key default_org_id default_sandbox_name
    fixed_defaults callers_are_authenticated
""".split()


def configuration(binary, environment):
    """What `aep-batch-gateway config` prints: key -> (value, where from)."""
    code, out, problem = run(binary, "config", env=environment)
    assert code == 0, problem
    lines = re.findall(r'^(?:# )?(\w+)(?: = "(.*)" # (.*)| is not set| = (.*))$', out, re.M)
    return {key: (value or other, source) for key, value, source, other in lines}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has certificate, key, authority and token where the chart mounts them."""
    folder = tmp_path_factory.mktemp("mounted")
    base = folder / "etc/aep-batch-gateway"
    for name in ["tls", "client-ca", "upstream-ca", "default-token"]:
        (base / name).mkdir(parents=True)
    certificates.self_signed(base / "tls/tls.crt", base / "tls/tls.key")
    for authority in ["client-ca", "upstream-ca"]:
        shutil.copy(base / "tls/tls.crt", base / authority / "ca.crt")
    (base / "default-token/token").write_text("made-up\n")
    return folder


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


@pytest.fixture(scope="module")
def keys(binary):
    return configuration(binary, {})


@pytest.fixture(scope="module")
def settings():
    """The flags that the chart's schema has."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    return {snake(k) for k in schema["properties"]["settings"]["properties"]} | set(OTHER_FLAGS)


def test_every_flag_of_the_gateway_is_a_value_of_the_chart_and_the_other_way_round(keys, settings):
    assert keys.keys() - {"config"} == settings


def test_the_values_named_everything_have_every_setting(settings):
    assert {snake(k) for k in EVERY_SETTING} | set(OTHER_FLAGS) == settings


def test_values_yaml_has_the_gateways_own_defaults(keys):
    section = re.search(r"^settings:\n(.*?)^\S", (CHART / "values.yaml").read_text(), re.S | re.M)
    documented = re.findall(r"^  # (\w+): (.*)$", section.group(1), re.M)
    assert documented
    for name, value in documented:
        assert keys.get(snake(name)) == (value.strip('"'), "default"), name


def test_app_version_is_the_gateways_version(binary):
    version = run(binary, "--version")[1].split()[-1]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version


@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_gateway_takes_the_rendered_environment(binary, folder, name):
    r = rendering(name)
    environment = gateway_environment(r, folder)
    printed = configuration(binary, environment)
    for variable, value in environment.items():
        if variable.startswith("AEP_GATEWAY_"):
            got, source = printed[variable.removeprefix("AEP_GATEWAY_").lower()]
            assert got == value or "valueFrom" in r.environment[variable], variable  # is not printed
            assert "environment" in source + got, variable


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def health(address):
    """As kubelet's gRPC probe asks."""
    with grpc.insecure_channel(address) as channel:
        response = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
    return {b"\x08\x01": "SERVING"}.get(response, response)


SERVED = ["defaults", "everything", "mtls", "managed credentials", "gRPC probes"]


@pytest.mark.parametrize("name", SERVED)
def test_it_runs_with_the_rendered_ports_probes_metrics_and_grace_period(binary, programs, folder, name):
    """Does what kubelet and Prometheus would do. On another loopback address, because the ports are
    those of the chart."""
    r, host = rendering(name), f"127.77.0.{1 + SERVED.index(name)}"
    environment = gateway_environment(r, folder, host)
    gateway = Program(programs, "gateway", binary, *r.container["args"], env=environment)
    admin = f"{host}:{r.port('admin')}"
    assert gateway.first_line() == {"listen": f"{host}:{r.port('grpc')}", "admin": admin}
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
        probe = r.container[probe]
        if "grpc" in probe:
            assert health(f"{host}:{probe['grpc']['port']}") == "SERVING"
        else:
            assert status(f"http://{host}:{r.port(probe['httpGet']['port'])}{probe['httpGet']['path']}") == 200
    (test,) = r.one("Pod")["spec"]["containers"]
    assert run(binary, *[re.sub(r"\$\(\w+_SERVICE_HOST\)", host, arg) for arg in test["args"]])[0] == 0
    # The autoscaler asks for it.
    assert "\naep_gateway_executions_in_flight 0" in get(f"http://{admin}/metrics")

    delay = seconds(environment["AEP_GATEWAY_DRAIN_DELAY"])
    began = time.monotonic()
    gateway.terminate()
    wait_until("/readyz is 503 during the drain delay", lambda: status(f"http://{admin}/readyz") == 503, delay)
    assert gateway.process.wait(r.pod["spec"]["terminationGracePeriodSeconds"]) == 0
    assert time.monotonic() - began >= delay
