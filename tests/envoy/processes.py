"""The programs that a scenario needs: the simulated API, gateways, and Envoy in front of them."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ENVOY = Path(sys.executable).parent / "envoy"
LOGS = Path(__file__).parent / ".run" / "logs"

# How long one request upstream may take: short, because silences last that long.
REQUEST_TIMEOUT = 2.0


class Failed(Exception):
    """A program did not do what it must do before anything can be tested."""


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_until(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.05)


class Stand:
    """Starts programs for one scenario and ends them: `with Stand(...) as stand`."""

    def __init__(self, gateway, name):
        self.gateway_binary = gateway
        self.logs = LOGS / name
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.processes = []
        self.gateways = {}  # address -> process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def start(self, name, *args):
        out = self.logs / f"{name}.out"
        with open(out, "w") as stdout, open(self.logs / f"{name}.log", "a") as stderr:
            process = subprocess.Popen([str(arg) for arg in args], stdout=stdout, stderr=stderr)
        self.processes.append(process)
        process.out = out
        return process

    def first_line(self, process):
        """What the gateway's commands say when they listen."""

        def said():
            if process.poll() is not None:
                raise Failed(f"{process.args} ended; see {self.logs}")
            return process.out.read_text().endswith("\n")

        wait_until(f"start of {process.args}", said)
        return json.loads(process.out.read_text().splitlines()[0])

    def simulate(self, *flags, faults=(), share=0.4):
        with_faults = [flag for fault in faults for flag in ("--fault", fault)]
        process = self.start(
            "simulator", self.gateway_binary, "simulate", "--listen", "127.0.0.1:0",
            "--share", share, "--seed", 1, *with_faults, *flags,
        )
        self.upstream = self.first_line(process)

    def serve(self, *flags, listen="127.0.0.1:0"):
        process = self.start(
            f"gateway-{len(self.processes)}", self.gateway_binary, "serve",
            "--listen", listen, "--admin-listen", "127.0.0.1:0",
            "--upstream-url", self.upstream["upstream_url"],
            "--catalog-url", self.upstream["catalog_url"],
            "--request-timeout", f"{REQUEST_TIMEOUT}s", *flags,
        )
        address = self.first_line(process)["listen"]
        self.gateways[address] = process
        return address

    def ledger(self):
        return json.loads(get(f"http://{self.upstream['listen']}/_simulator/batches"))

    def envoy(self, retry_policy, health_checks=False, transcoder=None):
        """Starts Envoy in front of all gateways, or with its own transcoder and this descriptor
        in front of the simulated API; `self.address` is where it takes calls."""
        config = self.logs / "envoy.json"
        hosts = [self.upstream["listen"]] if transcoder else self.gateways
        settings = envoy_config(hosts, retry_policy, health_checks, transcoder)
        config.write_text(json.dumps(settings, indent=1))
        checked = subprocess.run(
            [ENVOY, "--mode", "validate", "-c", config], capture_output=True, text=True
        )
        if checked.returncode != 0:
            raise Failed(f"Envoy refuses {config}: {checked.stderr}")
        where = self.logs / "envoy-admin"
        process = self.start(
            "envoy", ENVOY, "-c", config, "--concurrency", 1, "--use-dynamic-base-id",
            "--admin-address-path", where, "--log-path", self.logs / "envoy-own.log",
        )

        def ready():
            if process.poll() is not None:
                raise Failed(f"Envoy ended; see {self.logs}")
            try:
                return get(f"http://{where.read_text()}/ready").strip() == "LIVE"
            except OSError:
                return False

        wait_until("Envoy is ready", ready)
        self.admin = f"http://{where.read_text()}"
        listeners = json.loads(get(f"{self.admin}/listeners?format=json"))
        socket = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        self.address = f"{socket['address']}:{socket['port_value']}"
        if health_checks:
            self.wait_for_health()

    def wait_for_health(self):
        def healthy():
            return self.stat("membership_healthy") == len(self.gateways)

        wait_until("Envoy finds every gateway healthy", healthy)

    def stat(self, name):
        """A counter of Envoy for the cluster of the gateways."""
        text = get(f"{self.admin}/stats?filter=^cluster.gateways.{name}$")
        found = re.search(r": (\d+)", text)
        return int(found.group(1)) if found else 0

    def end(self, address, how=signal.SIGTERM):
        """Ends a gateway with a signal, and gives its exit code."""
        process = self.gateways[address]
        process.send_signal(how)
        return process.wait(timeout=60)


def extension(name, kind, **fields):
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{kind}", **fields}}


def envoy_config(hosts, retry_policy, health_checks, transcoder):
    """One plaintext HTTP/2 listener, one route, one cluster; limits as Istio sets them."""
    most = 4294967295
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "gateways",
            # The call's own deadline counts.
            "timeout": "0s",
            "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
            "retry_policy": {
                **retry_policy,
                "retry_host_predicate": [
                    extension(
                        "envoy.retry_host_predicates.previous_hosts",
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                    )
                ],
                "host_selection_retry_max_attempts": 5,
            },
        },
    }
    filters = [
        extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router")
    ]
    if transcoder:
        reverse = extension(
            "envoy.filters.http.grpc_json_reverse_transcoder",
            "envoy.extensions.filters.http.grpc_json_reverse_transcoder.v3"
            ".GrpcJsonReverseTranscoder",
            descriptor_path=str(transcoder),
            request_json_print_options={"use_canonical_field_names": True},
        )
        filters.insert(0, reverse)
    manager = extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="calls",
        codec_type="HTTP2",
        preserve_external_request_id=True,
        http_filters=filters,
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [route],
                    "include_request_attempt_count": True,
                }
            ]
        },
    )
    cluster = {
        "name": "gateways",
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": most,
                    "max_pending_requests": most,
                    "max_requests": most,
                    "max_retries": most,
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": extension(
                "", "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config=(
                    {"http_protocol_options": {}} if transcoder else {"http2_protocol_options": {}}
                ),
            )["typed_config"]
        },
        "load_assignment": {
            "cluster_name": "gateways",
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": socket(a)}} for a in hosts]}
            ],
        },
    }
    if health_checks:
        check = {"grpc_health_check": {}, "interval": "0.25s", "no_traffic_interval": "0.25s"}
        limits = {"timeout": "1s", "healthy_threshold": 1, "unhealthy_threshold": 1}
        cluster["health_checks"] = [{**check, **limits}]
    return {
        "admin": {"address": socket("127.0.0.1:0")},
        "static_resources": {
            "listeners": [
                {
                    "name": "calls",
                    "address": socket("127.0.0.1:0"),
                    "filter_chains": [{"filters": [manager]}],
                }
            ],
            "clusters": [cluster],
        },
    }


def socket(address):
    host, port = address.rsplit(":", 1)
    return {"socket_address": {"address": host, "port_value": int(port)}}
