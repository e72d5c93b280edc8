"""Envoy, and its configuration: one plaintext listener, one route, one cluster. A test names only
what it changes."""

import json
import re
import sys
from pathlib import Path

from harness.process import HarnessError, Program, get, run, wait_until

BINARY = Path(sys.executable).parent / "envoy"


class Envoy(Program):
    """Envoy in front of `hosts`: gateways, other Envoys, or simulators. `address` is where it takes
    calls, `admin` the URL of its admin page; `changes` are those of `config`."""

    def __init__(self, programs, hosts, retry_policy, **changes):
        super().__init__(programs, "envoy")
        self.start(config([host.address for host in hosts], retry_policy, **changes))
        if "health_checks" in changes.get("cluster", ()):
            self.wait_for_health(len(hosts))

    def start(self, content):
        number = len(self.programs.started)
        file = self.programs.folder / f"envoy-{number}.json"
        file.write_text(json.dumps(content, indent=1))
        code, _, problem = run(BINARY, "--mode", "validate", "-c", file)
        if code != 0:
            raise HarnessError(f"Envoy refuses {file}: {problem.strip().splitlines()[-1]}")
        admin = self.programs.folder / f"envoy-{number}-admin"
        self.launch(
            BINARY, "-c", file, "--concurrency", 1, "--use-dynamic-base-id",
            "--admin-address-path", admin, "--log-level", "warning",
        )  # fmt: skip

        def ready():
            self.check_alive()
            try:
                return get(f"http://{admin.read_text()}/ready").strip() == "LIVE"
            except OSError:
                return False

        wait_until("Envoy is ready", ready)
        self.admin = f"http://{admin.read_text()}"
        listeners = json.loads(get(f"{self.admin}/listeners?format=json"))
        socket = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        self.address = f"{socket['address']}:{socket['port_value']}"

    def wait_for_health(self, count, seconds=30):
        healthy = lambda: self.stat("membership_healthy") == count
        wait_until("Envoy finds every gateway healthy", healthy, seconds)

    def stats(self, *names):
        """Counters and gauges for the cluster of the gateways, read at one moment."""
        pattern = f"^cluster.gateways.({'|'.join(names)})$"
        found = dict(re.findall(r"([\w.]+): (\d+)", get(f"{self.admin}/stats?filter={pattern}")))
        return [int(found.get(f"cluster.gateways.{name}", 0)) for name in names]

    def stat(self, name):
        return self.stats(name)[0]


class Sidecar(Envoy):
    """The sidecar beside a gateway, with the route and retries that istiod 1.31 gives to inbound
    calls of a port with appProtocol kubernetes.io/h2c."""

    def __init__(self, programs, gateway):
        super().__init__(
            programs, [gateway], {"retry_on": "reset-before-request", "num_retries": 2},
            route=UNTOLD, host={"include_request_attempt_count": False},
        )  # fmt: skip



NO_LIMIT = 4294967295

# As istiod 1.31 writes it: retriable-status-codes without any code, and no back-off (Envoy's own
# 25 ms).
ISTIO = {
    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
    "num_retries": 2,
}
FIVE = "cancelled,deadline-exceeded,internal,resource-exhausted,unavailable"
EVERYTHING = {"retry_on": f"{FIVE},connect-failure,refused-stream,reset", "num_retries": 2}
NO_RETRY = {"num_retries": 0}


def timeout(duration):
    """For a route, as istiod writes it. 0s: the call's own deadline alone. In any case Envoy tells
    the gateway in grpc-timeout and x-envoy-expected-rq-timeout-ms how long it will wait."""
    return {"timeout": duration, "max_grpc_timeout": duration}


# For a route: Envoy keeps that to itself, as other meshes do.
UNTOLD = {
    "max_grpc_timeout": None,
    "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
}


def config(
    hosts, retry_policy, filters=(), router=(), route=(), request_headers=(), host=(), manager=(),
    cluster=(), clusters=(), http=2,
):
    """Envoy in front of `hosts`; limits as Istio sets them. `router`, `route`, `host`, `manager`
    and `cluster` change what is said of these here; `request_headers` are set by the route;
    `clusters` are further ones; `http` is the version that is spoken to the hosts."""
    routed = {
        "cluster": "gateways",
        **timeout("0s"),
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
        **dict(route),
    }
    everything = {
        "name": "all",
        "domains": ["*"],
        "routes": [
            {
                "match": {"prefix": "/"},
                "route": routed,
                "request_headers_to_add": [
                    {
                        "header": {"key": name, "value": value},
                        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                    }
                    for name, value in dict(request_headers).items()
                ],
            }
        ],
        "include_request_attempt_count": True,
        **dict(host),
    }
    last = extension(
        "envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router",
        **dict(router),
    )
    filter_chain = extension(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        **{
            "stat_prefix": "calls",
            "codec_type": "AUTO",
            "http2_protocol_options": {"max_concurrent_streams": 20_000},
            "preserve_external_request_id": True,
            "http_filters": [*filters, last],
            "route_config": {"virtual_hosts": [everything]},
            **dict(manager),
        },
    )
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    gateways = {
        "name": "gateways",
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [dict.fromkeys(limits, NO_LIMIT)]},
        "typed_extension_protocol_options": speaks(http),
        "load_assignment": assignment("gateways", hosts),
        **dict(cluster),
    }
    listener = {
        "name": "calls",
        "address": socket("127.0.0.1:0"),
        "filter_chains": [{"filters": [filter_chain]}],
    }
    return {
        "node": {"id": "sidecar", "cluster": "sidecar"},
        "admin": {"address": socket("127.0.0.1:0")},
        "static_resources": {"listeners": [listener], "clusters": [gateways, *clusters]},
        # Spans leave at once, not five by five.
        "layered_runtime": {
            "layers": [
                {
                    "name": "spans",
                    "static_layer": {
                        "tracing.opentelemetry.min_flush_spans": 1,
                        "tracing.zipkin.min_flush_spans": 1,
                    },
                }
            ]
        },
    }


def socket(address):
    host, port = address.rsplit(":", 1)
    return {"socket_address": {"address": host, "port_value": int(port)}}


def assignment(name, hosts):
    endpoints = [{"endpoint": {"address": socket(host)}} for host in hosts]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def typed(kind, **fields):
    return {"@type": f"type.googleapis.com/{kind}", **fields}


def extension(name, kind, **fields):
    return {"name": name, "typed_config": typed(kind, **fields)}


def speaks(http, **options):
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    name = {1: "http_protocol_options", 2: "http2_protocol_options"}[http]
    return {kind: typed(kind, explicit_http_config={name: options})}


def streams(limit):
    """For a cluster: so many streams on a connection, known before the gateway says it."""
    return {"typed_extension_protocol_options": speaks(2, max_concurrent_streams=limit)}


def health_checks(interval):
    """For a cluster: its hosts are asked for their health, as BatchService."""
    return {
        "health_checks": [
            {
                "grpc_health_check": {"service_name": "aep.ingestion.v1.BatchService"},
                "interval": interval,
                "no_traffic_interval": interval,
                "timeout": "1s",
                "healthy_threshold": 1,
                "unhealthy_threshold": 1,
            }
        ]
    }


def transcoder(descriptor):
    """A filter: Envoy's own gRPC-to-REST transcoder."""
    return extension(
        "envoy.filters.http.grpc_json_reverse_transcoder",
        "envoy.extensions.filters.http.grpc_json_reverse_transcoder.v3.GrpcJsonReverseTranscoder",
        descriptor_path=str(descriptor),
        request_json_print_options={"use_canonical_field_names": True},
    )


def grpc_web():
    """A filter: gRPC-Web in, gRPC out."""
    return extension(
        "envoy.filters.http.grpc_web", "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"
    )


def collector(address):
    """A cluster that takes spans."""
    return {
        "name": "collector",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": assignment("collector", [address]),
    }


def opentelemetry(address):
    """For a manager: spans to a collector over OTLP; W3C trace context."""
    uri = {"uri": f"http://{address}/v1/traces", "cluster": "collector", "timeout": "1s"}
    provider = extension(
        "envoy.tracers.opentelemetry", "envoy.config.trace.v3.OpenTelemetryConfig",
        http_service={"http_uri": uri}, service_name="sidecar",
    )
    return {"tracing": {"provider": provider}}


def zipkin(address):
    """For a manager: spans to a collector in Zipkin's JSON; B3."""
    provider = extension(
        "envoy.tracers.zipkin", "envoy.config.trace.v3.ZipkinConfig",
        collector_cluster="collector", collector_endpoint="/api/v2/spans",
        collector_endpoint_version="HTTP_JSON", collector_hostname=address,
    )
    return {"tracing": {"provider": provider}}


def tls(client, authority, gateway_name):
    """For a cluster: mTLS with the secrets in these two files, to hosts of this URI SAN."""
    name = {"san_type": "URI", "matcher": {"exact": gateway_name}}

    def secret(name, path):
        source = {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
        return {"name": name, "sds_config": source}

    context = {
        "alpn_protocols": ["h2"],
        "tls_certificate_sds_secret_configs": [secret("client", client)],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": [name]},
            "validation_context_sds_secret_config": secret("authority", authority),
        },
    }
    return {
        "transport_socket": extension(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            common_tls_context=context,
        )
    }


def tls_secrets(folder):
    """The two secrets; Envoy reads their files again when something in the folder is renamed."""
    kind = "envoy.extensions.transport_sockets.tls.v3.Secret"

    def file(name):
        return {"filename": str(folder / name)}

    watched = {"watched_directory": {"path": str(folder)}}
    certificate = {"certificate_chain": file("tls.crt"), "private_key": file("tls.key"), **watched}
    authority = {"trusted_ca": file("ca.crt"), **watched}
    return (
        {"resources": [typed(kind, name="client", tls_certificate=certificate)]},
        {"resources": [typed(kind, name="authority", validation_context=authority)]},
    )
