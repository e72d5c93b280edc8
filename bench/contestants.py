"""The programs that are measured, and the API that they all call."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
RUN = HERE / ".run"
LOGS = RUN / "logs"
ENVOY = Path(sys.executable).parent / "envoy"
BRIDGE = Path(os.environ["BRIDGE"])
UPSTREAM = Path(os.environ["UPSTREAM"])
EVEN = Path(os.environ["EVEN"])
GATEWAY = Path(os.environ["GATEWAY"])
VANGUARD = os.environ.get("VANGUARD")  # none without Go
OTHER = os.environ.get("OTHER")  # another build of the gateway, to compare with
BASE = "data/foundation/import"

CALL = "/aep.ingestion.v1.BatchService/CreateBatch"
CALL_AS_TEXT = "/aep.ingestion.v1.TextService/CreateBatch"


class Failed(Exception):
    """Something did not do what it must do before anything can be measured."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def takes_connections(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Program:
    """A running program. Standard error goes to a file, which is emptied before it grows large."""

    def __init__(self, name, command, log_to_pipe=False, **environment):
        self.name, self.port, self.call = name, None, CALL
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        log = open(self.log, "a")
        log.truncate(0)
        self.reader = None
        stderr = subprocess.PIPE if log_to_pipe else log
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=stderr,
            env={**os.environ, **environment},
        )
        if log_to_pipe:
            self.reader = subprocess.Popen(
                ["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL
            )
            self.process.stderr.close()
        self.pid = self.process.pid
        log.close()

    def serves(self, port, seconds=60):
        """Waits until it takes connections there."""
        end = time.monotonic() + seconds
        while not takes_connections(port):
            if self.process.poll() is not None or time.monotonic() > end:
                raise Failed(f"{self.name} does not serve; see {self.log}")
            time.sleep(0.01)
        self.port = port
        return self

    def first_line(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.name} did not start; see {self.log}")
        return json.loads(line)

    def processor_seconds(self):
        """What all of its threads have used, to the nanosecond."""
        used = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                used += int((task / "schedstat").read_text().split()[0])
            except FileNotFoundError:
                pass  # a thread that has just ended
        return used / 1e9

    def memory(self):
        """KiB of memory: now and at most."""
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
        )
        return int(fields["VmRSS"].split()[0]), int(fields["VmHWM"].split()[0])

    def stop(self):
        for process in filter(None, (self.process, self.reader)):
            process.kill()
            process.wait()


class Api(Program):
    """The API: `upstream` of this benchmark."""

    def __init__(self):
        super().__init__("upstream", [UPSTREAM, RUN / "ca.pem"])
        self.addresses = self.first_line()
        self.set("0.6", 0)

    def get(self, path):
        with urllib.request.urlopen(f"http://{self.addresses['plain']}/{path}") as answer:
            return answer.read().decode()

    def set(self, kilobytes, latency_ms):
        self.get(f"_set/{kilobytes}/{latency_ms}")

    def creates(self):
        return int(self.get("_creates"))

    def address(self, kind):
        return self.addresses["tls" if kind == "tls" else "plain"]

    def url(self, kind):
        return f"{'https' if kind == 'tls' else 'http'}://{self.address(kind)}"


def gateway_command(binary, api, kind, port, admin_port):
    """`serve` with its defaults, but for limits: the most that scenarios need."""
    http = {"http1": "auto", "h2c": "2", "tls": "auto"}[kind]
    command = [
        binary, "serve", "--listen", f"127.0.0.1:{port}",
        "--admin-listen", f"127.0.0.1:{admin_port}",
        "--upstream-url", f"{api.url(kind)}/{BASE}", "--upstream-http", http,
        "--max-in-flight", "20000", "--max-connections", "20000", "--request-timeout", "60s",
    ]
    return command + (["--upstream-ca-file", RUN / "ca.pem"] if kind == "tls" else [])


def gateway(api, kind, binary=GATEWAY, name="gateway", log_to_pipe=False):
    port = free_port()
    command = gateway_command(binary, api, kind, port, free_port())
    return Program(name, command, log_to_pipe).serves(port)


def bridge_command(api, kind, port, threads):
    http = {"http1": 1, "h2c": 2, "tls": 1}[kind]  # with TLS, ALPN decides
    ca = [RUN / "ca.pem"] if kind == "tls" else []
    return [BRIDGE, f"127.0.0.1:{port}", f"{api.url(kind)}/{BASE}", threads, http, *ca]


def bridge(api, kind, threads=1):
    port = free_port()
    command = bridge_command(api, kind, port, threads)
    return Program(f"bridge-{threads}", command).serves(port)


def envoy_command(api, kind, port, workers):
    config = RUN / f"envoy-{kind}-{workers}-{port}.json"
    config.write_text(json.dumps(envoy_config(api, kind, port), indent=1))
    return [ENVOY, "-c", config, "--concurrency", workers, "--use-dynamic-base-id",
            "--disable-hot-restart", "--log-level", "warning"]


def envoy(api, kind, workers=1, as_text=False):
    port = free_port()
    name = f"envoy-{workers}{'-text' if as_text else ''}"
    program = Program(name, envoy_command(api, kind, port, workers)).serves(port)
    program.call = CALL_AS_TEXT if as_text else CALL
    return program


def vanguard(api, kind):
    port = free_port()
    command = [VANGUARD, f"127.0.0.1:{port}", api.url(kind), kind]
    return Program("vanguard", command, SSL_CERT_FILE=str(RUN / "ca.pem")).serves(port)


# Name -> how it starts, given the API and how it is spoken to.
CONTESTANTS = {
    "gateway": gateway,
    "gateway, log to a pipe": lambda *a: gateway(*a, name="gateway-pipe", log_to_pipe=True),
    "bridge": bridge,
    "bridge, 2 threads": lambda *a: bridge(*a, threads=2),
    "Envoy": envoy,
    "Envoy, 2 workers": lambda *a: envoy(*a, workers=2),
    "Envoy, answer as text": lambda *a: envoy(*a, as_text=True),
    "vanguard-go": vanguard,
}
if not VANGUARD:
    del CONTESTANTS["vanguard-go"]
if OTHER:
    CONTESTANTS["other gateway"] = lambda *a: gateway(*a, binary=OTHER, name="other-gateway")


def extension(name, kind, **fields):
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{kind}", **fields}}


def envoy_config(api, kind, port):
    """One plaintext HTTP/2 listener, one route, one cluster, and none of Envoy's limits. No access
    log and no tracing: Envoy's own defaults."""
    most = 4294967295
    transcoder = "envoy.extensions.filters.http.grpc_json_reverse_transcoder.v3"
    manager = extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="calls",
        codec_type="HTTP2",
        http_filters=[
            extension(
                "envoy.filters.http.grpc_json_reverse_transcoder",
                f"{transcoder}.GrpcJsonReverseTranscoder",
                descriptor_path=str(RUN / "transcoded.bin"),
            ),
            extension("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router"),
        ],
        route_config={
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "api", "timeout": "0s"}}
                    ],
                }
            ]
        },
    )
    version = "http_protocol_options" if kind == "http1" else "http2_protocol_options"
    cluster = {
        "name": "api",
        "type": "STATIC",
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": most,
                    "max_pending_requests": most,
                    "max_requests": most,
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": extension(
                "", "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config={version: {}},
            )["typed_config"]
        },
        "load_assignment": {
            "cluster_name": "api",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(api.address(kind))}}]}],
        },
    }
    if kind == "tls":
        cluster["transport_socket"] = extension(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            sni="localhost",
            common_tls_context={
                "alpn_protocols": ["h2"],
                "validation_context": {"trusted_ca": {"filename": str(RUN / "ca.pem")}},
            },
        )
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "calls",
                    "address": address(f"127.0.0.1:{port}"),
                    "filter_chains": [{"filters": [manager]}],
                }
            ],
            "clusters": [cluster],
        },
    }


def address(text):
    host, port = text.rsplit(":", 1)
    return {"socket_address": {"address": host, "port_value": int(port)}}
