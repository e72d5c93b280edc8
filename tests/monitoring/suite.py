"""Alerts, dashboard and docs/operations.md against a real Prometheus that scrapes real gateways.
Started by run.sh."""

import asyncio
import json
import math
import re
import secrets
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import certificates
import grpc
import yaml
from aep.ingestion.v1 import batch_service_pb2 as pb
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models import dashboard as grafana
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from stand import ALERTS, DATASET, ROOT, RUN, Callers, Gateway, Programs, Prometheus, get

MONITORING = ROOT / "deploy" / "monitoring"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
RULES = [r for group in yaml.safe_load(ALERTS.read_text())["groups"] for r in group["rules"]]
ALERT_RULES = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())

passed = failed = 0


def check(what, holds, *shown):
    global passed, failed
    passed, failed = (passed + 1, failed) if holds else (passed, failed + 1)
    print(f"{'ok     ' if holds else 'FAILED '} {what}", flush=True)
    if not holds:
        for thing in shown[:10]:
            print(f"          {thing}")


def check_none(what, found):
    """Passes if nothing was found that breaks it."""
    found = list(found)
    check(what, not found, *found)


# --- The files


def promtool(*args, text=None):
    return subprocess.run(
        ["promtool", *map(str, args)], input=text, capture_output=True, text=True, timeout=120
    )


def check_rules():
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)
    check("promtool accepts the rules", done.returncode == 0, done.stdout, done.stderr)
    done = promtool("test", "rules", MONITORING / "alerts_test.yaml")
    check("the unit tests of the rules pass", done.returncode == 0, done.stdout, done.stderr)
    mutants = [
        (number, expression)
        for number, rule in enumerate(RULES) if "alert" in rule
        for expression in (NEVER, ALWAYS)
    ]
    with ThreadPoolExecutor(2) as pool:
        missed = [RULES[number]["alert"] + (" never fires" if how == NEVER else " always fires")
                  for (number, how), noticed in zip(mutants, pool.map(is_noticed, mutants))
                  if not noticed]
    check(f"the unit tests notice all of {len(mutants)} alerts that fire never or always",
          not missed, *missed)


NEVER, ALWAYS = "vector(1) < 0", "vector(1)"


def is_noticed(mutant):
    """Whether the tests with the name of an alert fail when it has this expression instead."""
    number, expression = mutant
    name = RULES[number]["alert"]
    place = RUN / "mutants" / f"{number}-{'never' if expression == NEVER else 'always'}"
    place.mkdir(parents=True, exist_ok=True)
    rules = [dict(rule) for rule in RULES]
    rules[number]["expr"] = expression
    groups = {"groups": [{"name": "mutant", "rules": rules}]}
    (place / "alerts.yaml").write_text(yaml.safe_dump(groups))
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())
    tests["tests"] = [test for test in tests["tests"] if name in test["name"]]
    (place / "alerts_test.yaml").write_text(yaml.safe_dump(tests))
    return bool(tests["tests"]) and promtool("test", "rules", place / "alerts_test.yaml").returncode == 1


def check_runbook():
    named = {rule["alert"] for rule in ALERT_RULES}
    headings = set(re.findall(r"^### (AepGateway\w+)$", OPERATIONS, re.M))
    check_none("every alert has its heading in docs/operations.md", named - headings)
    check_none("docs/operations.md explains no alert that is not there", headings - named)
    check_none("every alert leads to its heading", (
        rule["alert"] for rule in ALERT_RULES
        if rule["annotations"]["runbook_url"] != f"docs/operations.md#{rule['alert'].lower()}"
    ))
    check_none("every link of docs/operations.md leads somewhere", broken_links())
    severities = {rule["labels"]["severity"] for rule in ALERT_RULES}
    check("alerts are critical or warning", severities == {"critical", "warning"}, severities)


def broken_links():
    for file, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", OPERATIONS):
        page = ROOT / "docs" / (file or "operations.md")
        if not page.exists():
            yield file
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            if anchor not in anchors:
                yield f"{file}#{anchor}"


def check_dashboard():
    made = subprocess.run(
        [sys.executable, MONITORING / "dashboard.py"], capture_output=True, text=True, check=True
    )
    check("dashboard.json is what dashboard.py prints", json.loads(made.stdout) == DASHBOARD)
    plugins.register_default_plugins()
    understood = encoder.JSONEncoder().encode(grafana.Dashboard.from_json(DASHBOARD))
    lost = [at for at in differences(DASHBOARD, json.loads(understood))
            # The SDK knows no annotation by a query of Prometheus.
            if not at.startswith("/annotations/list/0/target")]
    check("Grafana's SDK knows everything that the dashboard says", not lost, *lost)
    panels = DASHBOARD["panels"]
    check("panels have different ids", len({p["id"] for p in panels}) == len(panels))
    check_none("every panel says what to do", (
        p["title"] for p in panels if p["type"] != "row" and not p.get("description")
    ))
    cells = [(x, y) for p in panels for x, y in cells_of(p["gridPos"])]
    check("panels do not overlap", len(set(cells)) == len(cells))
    check("panels stay within 24 columns", max(x for x, _ in cells) < 24)
    known = {rule["alert"] for rule in ALERT_RULES}
    mentioned = set(re.findall(r"AepGateway[A-Z]\w+", json.dumps(panels)))
    check_none("the dashboard mentions no alert that is not there", mentioned - known)


def cells_of(place):
    return [
        (x, y)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]


def differences(ours, theirs, at=""):
    """Where something of ours is not in theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key in theirs:
                yield from differences(value, theirs[key], f"{at}/{key}")
            else:
                yield f"{at}/{key}"
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (one, other) in enumerate(zip(ours, theirs)):
            yield from differences(one, other, f"{at}/{number}")
    elif ours != theirs:
        yield f"{at}: {ours!r} became {theirs!r}"


# --- The run: a gateway for each thing that can go wrong, and one where nothing does

SECONDS = 30

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


def start(programs):
    def gateway(name, *serve, simulate=(), upstream=True):
        return name, Gateway(programs, name, serve, simulate, upstream)

    certificate, key = programs.dir / "tls.pem", programs.dir / "tls.key"
    certificates.write(certificate, key, -3600, 90 * 86400)
    half = ("--share", "0.5", "--seed", "1")
    return dict([
        gateway("healthy"),
        gateway("lost", simulate=("--fault", "reset-after-create", *half)),
        gateway("limited", simulate=("--fault", "status-429", *half)),
        gateway("refused"),
        gateway("down", upstream=False),
        gateway("slow", simulate=("--latency", "11s")),
        gateway("hurried", simulate=("--latency", "1s")),
        gateway("lookups"),
        gateway("full", "--max-in-flight", "10", simulate=("--latency", "2s")),
        gateway("crowded", "--max-connections", "10"),
        gateway("tls", "--tls-cert-file", certificate, "--tls-key-file", key),
        gateway("stopped"),
        gateway("restarting"),
    ])


async def misbehave(programs, gateways, prometheus):
    """All callers and all faults at the same time, for SECONDS. Gives the alerts at the end of it,
    while two gateways are still full."""

    async def call(name, per_second, seconds=SECONDS, patience=5.0, token="good", api_key="good", **how):
        callers = Callers(gateways[name], token, api_key)
        await callers.steady(per_second, seconds, **how)
        await callers.end(patience)

    async def crowd():
        callers = [Callers(gateways["crowded"]) for _ in range(10)]
        for one in callers:
            await one.channel.channel_ready()
        while True:
            socket.create_connection(address(gateways["crowded"])).close()
            await asyncio.sleep(1)

    async def renew():
        certificate, key = programs.dir / "tls.pem", programs.dir / "tls.key"
        for _ in range(8):
            await secure_call(gateways["tls"], certificate.read_bytes())
            with socket.create_connection(address(gateways["tls"])) as plaintext:
                plaintext.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            await asyncio.sleep(0.5)
        certificates.write(certificate, key, -3600, 100)
        await asyncio.to_thread(wait_for_reload, gateways["tls"], "ok")
        await secure_call(gateways["tls"], certificate.read_bytes())
        certificate.write_text("no certificate")
        await asyncio.to_thread(wait_for_reload, gateways["tls"], "failed")

    async def stop():
        await call("stopped", 5, 10)
        await asyncio.to_thread(programs.end, gateways["stopped"].process)

    async def restart():
        for _ in range(3):
            await asyncio.sleep(4)
            await asyncio.to_thread(gateways["restarting"].restart)

    gateways["lookups"].order(*["lookup-500"] * 1000)
    lasting = [
        asyncio.create_task(crowd()), asyncio.create_task(call("full", 15, 10 * SECONDS))
    ]
    await asyncio.gather(
        call("healthy", 15, external_ids=0.5, mistakes=0.1),
        found(gateways["healthy"]),
        call("lost", 6, external_ids=0.5),
        call("limited", 6),
        call("refused", 3, token="expired"),
        call("refused", 3, api_key="invalid"),
        call("down", 6),
        call("slow", 2, SECONDS - 12, patience=15.0),
        call("hurried", 6, deadline=0.3),
        call("lookups", 6, external_ids=1.0),
        renew(), stop(), restart(),
    )
    await asyncio.sleep(3)  # the last scrapes and evaluations
    alerts = await asyncio.to_thread(prometheus.alerts)
    for task in lasting:
        task.cancel()
    await asyncio.wait(lasting)
    return alerts


async def found(gateway):
    """The same external id again: the batch is found. With a trace, for the exemplars."""
    callers = Callers(gateway)
    for number in range(20):
        trace = ("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")
        message = pb.CreateBatchRequest(dataset_id=DATASET, external_id=f"same-{number // 2}")
        await callers.call(message, [*callers.metadata, trace])
        await asyncio.sleep(0.5)
    await callers.end()


async def secure_call(gateway, certificate):
    callers = Callers(gateway)
    await callers.channel.close()
    callers.channel = grpc.aio.secure_channel(
        gateway.listen, grpc.ssl_channel_credentials(certificate)
    )
    create = "/aep.ingestion.v1.BatchService/CreateBatch"
    method = callers.channel.unary_unary(create, pb.CreateBatchRequest.SerializeToString)
    await method(pb.CreateBatchRequest(dataset_id=DATASET), metadata=callers.metadata, timeout=10)
    await callers.channel.close()


def wait_for_reload(gateway, result):
    sample = f'aep_gateway_tls_reloads_total{{result="{result}"}} '
    end = time.monotonic() + 60
    while not re.search(re.escape(sample) + "[1-9]", gateway.metrics()):
        if time.monotonic() > end:
            return  # the alerts will miss it
        time.sleep(0.5)


def address(gateway):
    host, port = gateway.listen.split(":")
    return host, int(port)


# --- What Prometheus has seen


def check_alerts(alerts):
    true, broken = {name: set() for name in EXPECTED}, []
    for alert in alerts:
        labels = alert["labels"]
        name = labels["job"].removesuffix("-aep-batch-gateway")
        true[name].add(f"{labels['alertname']} {labels['severity']}")
        for text in alert["annotations"].values():
            if "<" in text or "%!" in text:
                broken.append(f"{labels['alertname']}: {text}")
    for name, expected in EXPECTED.items():
        missing = [f"missing: {alert}" for alert in sorted(expected - true[name])]
        surplus = [f"surplus: {alert}" for alert in sorted(true[name] - expected)]
        what = ", ".join(sorted(expected)).replace("AepGateway", "") or "no alert"
        check(f"{name}: {what}", not missing and not surplus, *missing, *surplus)
    check_none("every alert's text can be filled in", broken)
    provoked = set().union(*EXPECTED.values())
    every = {f"{rule['alert']} {rule['labels']['severity']}" for rule in ALERT_RULES}
    check_none("every alert was provoked", every - provoked - NOT_PROVOKED)


def has_data(series):
    """Whether an answer of the API has a number."""
    values = [value for one in series for value in one.get("values") or [one["value"]]]
    return any(not math.isnan(float(value)) for _, value in values)


SELECTOR = re.compile(r"([a-zA-Z_][\w:]*)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|=|!~|!=)"([^"]*)"')
THRESHOLD = re.compile(r"(>=|==|>|<) [\d.e]+( \* [\d.e]+)?")


def check_expressions(prometheus):
    """Each part of each rule finds something, also where no alert fires."""
    for rule in RULES:
        name = rule.get("alert") or rule["record"]
        severity = rule.get("labels", {}).get("severity", "")
        if name == "AepGatewayDown":
            continue  # is about what is absent
        left = THRESHOLD.sub("", rule["expr"])
        check(f"{name} {severity}: has data without its threshold", has_data(prometheus.query(left)))
    expressions = [rule["expr"] for rule in RULES] + [query for _, query in queries()]
    selectors = {m.group() for e in expressions for m in SELECTOR.finditer(substituted(e))}
    check_none("every selector of the rules and the dashboard finds something", (
        selector for selector in sorted(selectors)
        if not has_data(prometheus.over_the_run(selector))
    ))
    matchers = {m.groups() for s in selectors for m in MATCHER.finditer(s)}
    values = {label: set(prometheus.api(f"label/{label}/values")) for label, _, _ in matchers}
    check_none("every label value that they name exists", (
        f"{label}{operator}{value}"
        for label, operator, value in sorted(matchers)
        for one in value.split("|")
        if one and re.fullmatch(r"[\w .]+", one) and "[" not in value and ".." not in value
        and one not in values[label]
    ))


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
    ]:
        expression = expression.replace(variable, value)
    return expression


def check_queries(prometheus):
    for title, query in queries():
        found = has_data(prometheus.over_the_run(substituted(query)))
        check(f"dashboard: {title} has data", found, query)
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(
                r"label_values\((.*), (\w+)\)", variable["query"]["query"]
            ).groups()
            found = prometheus.api("series", **{"match[]": substituted(series)})
            check(f"dashboard: ${label} has values", any(label in one for one in found), variable)


def families(text):
    """The metrics of a page, read by a parser that is strict about OpenMetrics."""
    return list(text_string_to_metric_families(text))


def check_metrics(pages, text_page):
    """`pages` are OpenMetrics; `text_page` is what who does not ask for that gets."""
    everything = [family for page in pages for family in families(page)]

    done = promtool("check", "metrics", text=text_page)
    check("promtool finds nothing wrong with the metrics", done.returncode == 0, done.stdout, done.stderr)
    suffix = {"counter": "_total", "info": "_info"}
    served = {}
    for family in everything:
        name = family.name + suffix.get(family.type, "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        served.setdefault(name, (family.type, set()))[1].update(labels)
        if not family.documentation:
            check(f"{name} has a help text", False)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", OPERATIONS, re.M)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    check_none("every metric is in docs/operations.md", served.keys() - documented.keys())
    check_none("docs/operations.md names no metric that is not there", documented.keys() - served.keys())
    check_none("docs/operations.md has each metric's type and labels", (
        f"{name}: {documented[name]}, not {served[name]}"
        for name in served.keys() & documented.keys() if served[name] != documented[name]
    ))
    used = set(re.findall(r"(?:aep_gateway|grpc_server|http_client|process)_\w+",
                          ALERTS.read_text() + json.dumps(DASHBOARD)))
    used = {re.sub(r"_(bucket|count)$", "", name) for name in used}
    used -= {name for rule in RULES for name in re.findall(r"\w+", rule.get("record", ""))}
    check_none("every metric that is used is served", used - served.keys())


def series(gateway):
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in families(gateway.metrics()) for sample in family.samples
    }


async def check_cardinality(gateway):
    """Nothing that a caller says becomes a label."""
    callers = Callers(gateway)
    before = series(gateway)

    def odd():
        return secrets.token_hex(8)

    for _ in range(50):
        metadata = [
            ("authorization", f"Bearer {odd()}"), ("x-api-key", odd()),
            ("x-gw-ims-org-id", f"{odd()}@AdobeOrg"), ("x-sandbox-name", odd()),
            ("x-request-id", odd()), (f"x-{odd()}", odd()),
            ("traceparent", f"00-{secrets.token_hex(16)}-{odd()}-01"),
        ]
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
    await callers.end()
    new = series(gateway) - before
    check("nothing that callers say becomes a label", not new, *new)
    secret = re.search(r"test@AdobeOrg|Bearer|" + DATASET, gateway.metrics())
    check("no credential, organization or dataset is on the page", not secret, secret)


def main():
    check_rules()
    check_runbook()
    check_dashboard()
    with Programs(sys.argv[1], "run") as programs:
        gateways = start(programs)
        prometheus = Prometheus(programs, gateways.values())
        print(f"{len(gateways)} gateways run for {SECONDS} s", flush=True)
        check_alerts(asyncio.run(misbehave(programs, gateways, prometheus)))
        check_expressions(prometheus)
        check_queries(prometheus)
        exemplars = prometheus.api(
            "query_exemplars", query="grpc_server_handling_seconds_bucket",
            start=prometheus.began, end=time.time(),
        )
        check("latencies have exemplars with a trace id", any(
            "trace_id" in one["labels"] for found in exemplars for one in found["exemplars"]
        ))
        alive = [g for name, g in gateways.items() if name != "stopped"]
        text_page = get(f"http://{gateways['tls'].admin}/metrics")
        check_metrics([gateway.metrics() for gateway in alive], text_page)
        asyncio.run(check_cardinality(gateways["healthy"]))
        scrapes = prometheus.query('scrape_duration_seconds{job="healthy-aep-batch-gateway"}')
        print(f"a scrape takes {float(scrapes[0]['value'][1]) * 1e3:.1f} ms, and has "
              f"{len(series(gateways['healthy']))} series")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
