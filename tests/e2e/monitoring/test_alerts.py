"""Alerts, dashboard and metrics, as a real Prometheus sees real gateways under faults."""

import asyncio
import json
import math
import re
import secrets
import time
from types import SimpleNamespace

import grpc
import pytest
from aep.ingestion.v1 import batch_service_pb2 as pb
from faulty_run import SECONDS, misbehave, start
from harness.load import DATASET
from harness.programs import Programs
from prometheus import ALERTS, Callers, Prometheus
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from rules import ALERT_RULES, DASHBOARD, OPERATIONS, RULES, promtool

BURN = {"AepGatewayErrorBudgetBurn critical", "AepGatewayErrorBudgetBurn warning"}

# What must be true of each at the end, and nothing else.
EXPECTED = {
    "healthy": set(),
    "lost": BURN | {"AepGatewayOutcomeUnknown warning", "AepGatewayUpstreamFailing warning"},
    "limited": {"AepGatewayRateLimited warning", "AepGatewayManyRetries warning"},
    "refused": {"AepGatewayNearlyAllRefused critical", "AepGatewayCredentialsRefused warning"},
    "down": BURN | {"AepGatewayUpstreamFailing warning", "AepGatewayManyRetries warning"},
    "slow": {"AepGatewayUpstreamSlow warning"},
    "hurried": BURN | {"AepGatewayOutcomeUnknown warning", "AepGatewayCallersLeave warning"},
    "lookups": BURN | {"AepGatewayLookUpsFailing warning", "AepGatewayManyRetries warning"},
    "full": BURN | {"AepGatewayOverloaded warning", "AepGatewayNearALimit warning"},
    "crowded": {"AepGatewayConnectionsRefused warning", "AepGatewayNearALimit warning"},
    "tls": {
        "AepGatewayCertificateExpiring critical", "AepGatewayCertificateExpiring warning",
        "AepGatewayTlsReloadFailed warning", "AepGatewayConnectionsRefused warning",
    },
    "stopped": {"AepGatewayDown critical", "AepGatewayInstanceDown warning"},
    "restarting": {"AepGatewayRestarting warning"},
}

# Would take 200 MB for half an hour.
NOT_PROVOKED = {"AepGatewayMemoryHigh warning"}


@pytest.fixture(scope="module")
def observed(binary):
    """The gateways, Prometheus, and the alerts at the end of the run."""
    with Programs(binary, "monitoring") as programs:
        gateways = start(programs)
        prometheus = Prometheus(programs, gateways)
        alerts = asyncio.run(misbehave(programs, gateways, prometheus))
        yield SimpleNamespace(gateways=gateways, prometheus=prometheus, alerts=alerts)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_gateway_has_its_alerts_and_no_others(observed, name):
    labels = [alert["labels"] for alert in observed.alerts]
    job = f"{name}-aep-batch-gateway"
    assert {f"{one['alertname']} {one['severity']}" for one in labels if one["job"] == job} == EXPECTED[name]


def test_no_alert_comes_from_elsewhere_and_every_text_is_filled_in(observed):
    for alert in observed.alerts:
        assert alert["labels"]["job"].removesuffix("-aep-batch-gateway") in EXPECTED
        for text in alert["annotations"].values():
            assert "<" not in text and "%!" not in text


def test_every_alert_is_provoked():
    every = {f"{rule['alert']} {rule['labels']['severity']}" for rule in ALERT_RULES}
    assert every - set().union(*EXPECTED.values()) == NOT_PROVOKED


def has_data(series):
    """Whether an answer of the API has a number."""
    values = [value for one in series for value in one.get("values") or [one["value"]]]
    return any(not math.isnan(float(value)) for _, value in values)


SELECTOR = re.compile(r"([a-zA-Z_][\w:]*)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|=|!~|!=)"([^"]*)"')
THRESHOLD = re.compile(r"(>=|==|>|<) [\d.e]+( \* [\d.e]+)?")


def name_of(rule):
    return f"{rule.get('alert') or rule['record']} {rule.get('labels', {}).get('severity', '')}".strip()


# One is about what is absent.
@pytest.mark.parametrize("rule", [r for r in RULES if r.get("alert") != "AepGatewayDown"], ids=name_of)
def test_a_rule_has_data_without_its_threshold(observed, rule):
    assert has_data(observed.prometheus.query(THRESHOLD.sub("", rule["expr"])))


def queries():
    """The dashboard's: title and expression."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield "annotation", annotation["target"]["expr"]


def substituted(expression):
    """With what Grafana puts in place of the variables."""
    for variable, value in [
        ("$namespace", ".*"), ("$job", ".*-aep-batch-gateway"), ("$instance", ".+"),
        ("$__rate_interval", "10s"), ("$__range", f"{SECONDS}s"),
    ]:  # fmt: skip
        expression = expression.replace(variable, value)
    return expression


EXPRESSIONS = [rule["expr"] for rule in RULES] + [query for _, query in queries()]
SELECTORS = sorted({m.group() for e in EXPRESSIONS for m in SELECTOR.finditer(substituted(e))})
MATCHERS = sorted({m.groups() for selector in SELECTORS for m in MATCHER.finditer(selector)})


def test_every_selector_of_the_rules_and_the_dashboard_finds_something(observed):
    empty = [s for s in SELECTORS if not has_data(observed.prometheus.over_the_run(s))]
    assert SELECTORS and not empty


def test_every_label_value_that_they_name_exists(observed):
    values = {label: observed.prometheus.api(f"label/{label}/values") for label, _, _ in MATCHERS}
    missing = [
        f"{label}{operator}{value}"
        for label, operator, value in MATCHERS
        for one in value.split("|")
        if one and re.fullmatch(r"[\w .]+", one) and "[" not in value and ".." not in value
        and one not in values[label]
    ]  # fmt: skip
    assert MATCHERS and not missing


@pytest.mark.parametrize("query", [q for _, q in queries()], ids=[title for title, _ in queries()])
def test_a_query_of_the_dashboard_has_data(observed, query):
    assert has_data(observed.prometheus.over_the_run(substituted(query)))


VARIABLES = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable["name"])
def test_a_variable_of_the_dashboard_has_values(observed, variable):
    series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
    assert any(label in one for one in observed.prometheus.api("series", **{"match[]": substituted(series)}))


def test_latencies_have_exemplars_with_a_trace_id(observed):
    exemplars = observed.prometheus.api(
        "query_exemplars", query="grpc_server_handling_seconds_bucket",
        start=observed.prometheus.began, end=time.time(),
    )  # fmt: skip
    assert any("trace_id" in one["labels"] for found in exemplars for one in found["exemplars"])


def families(gateway):
    """The metrics of a gateway, read by a parser that is strict about OpenMetrics."""
    page = gateway.metrics("application/openmetrics-text; version=1.0.0")
    return list(text_string_to_metric_families(page))


@pytest.fixture(scope="module")
def served(observed):
    """Each metric's type and labels, of all gateways that run."""
    suffix = {"counter": "_total", "info": "_info"}
    served = {}
    for name, gateway in observed.gateways.items():
        for family in families(gateway) if name != "stopped" else ():
            assert family.documentation, family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            metric = family.name + suffix.get(family.type, "")
            served.setdefault(metric, (family.type, set()))[1].update(labels)
    return served


def test_promtool_finds_nothing_wrong_with_the_metrics(observed):
    """Of the page for those who do not ask for OpenMetrics."""
    code, printed = promtool("check", "metrics", text=observed.gateways["tls"].metrics())
    assert code == 0, printed


def test_the_runbook_has_every_metric_with_its_type_and_labels_and_no_other(served):
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", OPERATIONS, re.M)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == served


def test_every_metric_that_is_used_is_served(served):
    pages = ALERTS.read_text() + json.dumps(DASHBOARD)
    used = set(re.findall(r"(?:aep_gateway|grpc_server|http_client|process)_\w+", pages))
    used = {re.sub(r"_(bucket|count)$", "", name) for name in used}
    used -= {name for rule in RULES for name in re.findall(r"\w+", rule.get("record", ""))}
    assert used and used <= served.keys()


def series(gateway):
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in families(gateway) for sample in family.samples
    }  # fmt: skip


async def test_nothing_that_a_caller_says_becomes_a_label(observed):
    gateway = observed.gateways["healthy"]
    callers = Callers(gateway)

    def odd():
        return secrets.token_hex(8)

    for number in range(50):
        metadata = [
            ("authorization", f"Bearer {odd()}"), ("x-api-key", odd()),
            ("x-gw-ims-org-id", f"{odd()}@AdobeOrg"), ("x-sandbox-name", odd()),
            ("x-request-id", odd()), (f"x-{odd()}", odd()),
            ("traceparent", f"00-{secrets.token_hex(16)}-{odd()}-01"),
        ]  # fmt: skip
        message = pb.CreateBatchRequest(dataset_id=odd(), external_id=odd())
        message.tags[odd()].values.append(odd())
        await callers.call(message, metadata)
        await callers.call(pb.CreateBatchRequest(dataset_id=DATASET, external_id=odd()), metadata)
        for path in [f"/aep.ingestion.v1.BatchService/{odd()}", f"/{odd()}.Service/{odd()}"]:
            method = callers.channel.unary_unary(path)
            try:
                await method(b"", metadata=metadata, timeout=5)
            except grpc.aio.AioRpcError:
                pass
        if number == 0:  # each kind of call has its series now
            before = series(gateway)
    await callers.end()
    new = series(gateway) - before
    assert not new
    assert not re.search(r"test@AdobeOrg|Bearer|" + DATASET, gateway.metrics()), "a secret is on the page"
