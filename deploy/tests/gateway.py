"""The real gateway takes what the chart tells it, and runs as it says."""

import concurrent.futures
import json
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import yaml
from renderings import seconds
from report import CHART, GATEWAY, check, run
from values import EVERY_SETTING


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
        delay = seconds(r.environment["AEP_GATEWAY_DRAIN_DELAY"]["value"])
        asked = time.monotonic()
        gateway.send_signal(signal.SIGTERM)
        while http(f"http://{host}:{r.port('admin')}/readyz")[0] != 503:
            if gateway.poll() is not None or time.monotonic() > asked + delay:
                problems.append("/readyz is not 503 during the drain delay")
                break
            time.sleep(0.05)
        grace = r.pod["spec"]["terminationGracePeriodSeconds"]
        code = gateway.wait(grace)
        took = time.monotonic() - asked
        if code != 0 or took < delay:
            problems.append(f"ended with {code} after {took:.1f} s; the drain delay is {delay} s")
    except subprocess.TimeoutExpired:
        problems.append("did not end within the grace period")
    finally:
        gateway.kill()
        gateway.wait()
        log.close()
    return what, problems
