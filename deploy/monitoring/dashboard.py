#!/usr/bin/env python3
"""Prints dashboard.json, which is what Grafana imports:

    python3 dashboard.py >dashboard.json

The panels are the list ROWS below: a title, what to do about it, a unit, and
pairs of a legend and a query. SEL and BATCHES stand for the dashboard's
variables."""

import json

SEL = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
BATCHES = SEL + ', grpc_service="aep.ingestion.v1.BatchService"'
BAD = 'grpc_code=~"Unknown|Unavailable|DeadlineExceeded|Internal"'
COUNTED = 'grpc_code=~"OK|Unknown|Unavailable|DeadlineExceeded|Internal"'
FAILED = 'reason!~"CREATED|FOUND|RECOVERED|OK"'


def rate(metric, by="", also="", labels=SEL, window="$__rate_interval"):
    """The sum of a counter's rate."""
    group = f" by ({by}) " if by else ""
    return f"sum{group}(rate({metric}{{{labels}{', ' + also if also else ''}}}[{window}]))"


def quantile(q, metric, by="", labels=SEL):
    return f"histogram_quantile({q}, {rate(metric + '_bucket', 'le' + by, labels=labels)})"


def increase(metric, also, labels=SEL):
    """How much a counter has grown in the time that is shown."""
    return rate(metric, also=also, labels=labels, window="$__range").replace("rate(", "increase(", 1)


def share(part, whole):
    return f"{part} / {whole}"


# Panels. `red`: from this value on the panel is red; below it where it is negative.


def stat(title, do, unit, query, red=None):
    return dict(kind="stat", title=title, do=do, unit=unit, queries=[("", query)], red=red)


def graph(title, do, unit, *queries, red=None, stack=False):
    return dict(
        kind="timeseries", title=title, do=do, unit=unit, queries=queries, red=red, stack=stack
    )


ROWS = [
    ("Are we fine?", [
        (4, [
            stat("Alerts", "Each firing alert is a heading in docs/operations.md.", "none",
                 'count(ALERTS{alertname=~"AepGateway.*", alertstate="firing", namespace=~"$namespace"}) or vector(0)',
                 red=1),
            stat("Gateways ready", "Fewer than you run: AepGatewayInstanceDown.", "none",
                 f"sum(aep_gateway_ready{{{SEL}}})", red=-1),
            stat("Good calls",
                 "Of the calls in the time shown that are not their caller's own mistake: those that "
                 "ended with OK. The objective is 99.5 %. Below it, see which reason grows.",
                 "percentunit",
                 share(increase("grpc_server_handled_total", 'grpc_code="OK"', BATCHES),
                       increase("grpc_server_handled_total", COUNTED, BATCHES)), red=-0.995),
            stat("Outcome not known",
                 "Creates in the time shown whose callers could not be told whether the batch exists. "
                 "AepGatewayOutcomeUnknown says how to find it.", "short",
                 increase("aep_gateway_outcomes_total", f'outcome=~"UNKNOWN|APPLIED", {FAILED}'), red=1),
            stat("Calls", "0 while callers are at work: look at the Service and the mesh before this.", "reqps",
                 rate("grpc_server_handled_total", labels=BATCHES)),
            stat("99 of 100 calls take less than",
                 "Compare with the upstream's p99 below: what is more than that is ours.", "s",
                 quantile(0.99, "grpc_server_handling_seconds", labels=BATCHES)),
        ]),
        (8, [
            graph("Calls by code",
                  "Unknown: AepGatewayOutcomeUnknown. Unavailable: the reasons at the right say whether "
                  "it is Adobe or us. InvalidArgument and Unauthenticated: a caller's mistake; the access log names it.",
                  "reqps", ("{{grpc_code}}", rate("grpc_server_handled_total", "grpc_code", labels=BATCHES) + " > 0"),
                  stack=True),
            graph("Failed creates by reason",
                  "Each reason is explained in docs/errors.md. UPSTREAM_… and API_UNAVAILABLE: Adobe or the "
                  "way there. GATEWAY_OVERLOADED: add gateways. GATEWAY_FAILED: a bug, report it.",
                  "reqps", ("{{reason}}", rate("aep_gateway_outcomes_total", "reason", FAILED) + " > 0"), stack=True),
            graph("How long calls take",
                  "Dots are single calls with their trace. Higher than the upstream below: the gateway "
                  "waits (lookups, retries) or is short of CPU.", "s",
                  *[(f"p{q * 100:g}", quantile(q, "grpc_server_handling_seconds", labels=BATCHES))
                    for q in (0.5, 0.9, 0.99)]),
        ]),
        (7, [
            graph("Share of bad calls",
                  "Callers' own mistakes do not count. Red: over the objective of 99.5 %. "
                  "AepGatewayErrorBudgetBurn wakes you from 7.2 % on.", "percentunit",
                  ("bad", share(rate("grpc_server_handled_total", also=BAD, labels=BATCHES),
                                rate("grpc_server_handled_total", also=COUNTED, labels=BATCHES))), red=0.005),
            graph("Creates by outcome",
                  "What is neither APPLIED nor NOT_APPLIED has to be looked for.", "reqps",
                  ("{{outcome}}", rate("aep_gateway_outcomes_total", "outcome", 'outcome!=""')), stack=True),
        ]),
    ]),
    ("Upstream: Adobe's API", [
        (8, [
            graph("Requests by status",
                  "/batches: creates. /catalog/batches: lookups. 5xx or a word: AepGatewayUpstreamFailing. "
                  "429: AepGatewayRateLimited. 401 and 403: AepGatewayCredentialsRefused.", "reqps",
                  ("{{url_template}} {{http_response_status_code}}",
                   rate("http_client_request_duration_seconds_count", "url_template, http_response_status_code",
                        'http_response_status_code!=""')),
                  ("{{url_template}} {{error_type}}",
                   rate("http_client_request_duration_seconds_count", "url_template, error_type",
                        'http_response_status_code=""')), stack=True),
            graph("How long Adobe takes",
                  "Near --request-timeout (20 s): creates end with UPSTREAM_TIMEOUT. AepGatewayUpstreamSlow.", "s",
                  *[("{{url_template}} " + f"p{q * 100:g}",
                     quantile(q, "http_client_request_duration_seconds", ", url_template")) for q in (0.5, 0.99)],
                  red=10),
            graph("Share of requests that fail",
                  "5xx and no answer. Lookups that fail make calls with an external id fail.", "percentunit",
                  ("{{url_template}}",
                   share(rate("http_client_request_duration_seconds_count", "url_template",
                              'http_response_status_code!~"[234].."'),
                         rate("http_client_request_duration_seconds_count", "url_template"))), red=0.1),
        ]),
        (7, [
            graph("Requests under way", "As many as creates in flight. Much more: lookups are slow.", "short",
                  ("{{url_template}}", f"sum by (url_template) (http_client_active_requests{{{SEL}}})")),
            graph("New connections",
                  "Failed: name, route, firewall, proxy or TLS; the log says which (UPSTREAM_…). Many that "
                  "are ok: something closes them.", "cps",
                  ("{{result}}", rate("aep_gateway_upstream_connects_total", "result"))),
            graph("How long connections take to come about", "Near --connect-timeout (2 s): the network or a proxy.",
                  "s", ("p99", quantile(0.99, "aep_gateway_upstream_connect_seconds")), red=1),
        ]),
    ]),
    ("Exactly once", [
        (8, [
            graph("Lookups by external id",
                  "failed: AepGatewayLookUpsFailing. found: callers tried again, and a duplicate was prevented.",
                  "reqps", ("{{result}}", rate("aep_gateway_lookups_total", "result"))),
            graph("Batches found and recovered",
                  "FOUND: the batch was there before the call. RECOVERED: the answer was lost, the batch was found. "
                  "Both are good ends. Many RECOVERED: Adobe loses answers.", "reqps",
                  ("{{reason}}", rate("aep_gateway_outcomes_total", "reason", 'reason=~"FOUND|RECOVERED"'))),
            graph("Requests sent again",
                  "As a share of the creates. The budget ends at 7 %: then callers see the failures. "
                  "AepGatewayManyRetries.", "percentunit",
                  ("repeated", share(rate("aep_gateway_retries_total"), rate("aep_gateway_outcomes_total"))), red=0.03),
        ]),
        (7, [
            graph("Outcome not known, by reason",
                  "Creates without an external id among these have to be looked for: AepGatewayOutcomeUnknown.", "reqps",
                  ("{{reason}}", rate("aep_gateway_outcomes_total", "reason", f'outcome=~"UNKNOWN|APPLIED", {FAILED}'))),
            graph("Callers who left",
                  "APPLIED: the batch exists, its caller does not know; the log has the id. Many: callers' "
                  "deadlines are shorter than Adobe takes. AepGatewayCallersLeave.", "reqps",
                  ("{{outcome}}", rate("aep_gateway_abandoned_calls_total", "outcome"))),
        ]),
    ]),
    ("Saturation", [
        (8, [
            graph("Creates in flight",
                  "At the maximum (--max-in-flight) further ones are refused. Rising with Adobe's latency is "
                  "normal; rising alone needs more gateways. AepGatewayNearALimit.", "short",
                  ("{{instance}}", f"aep_gateway_executions_in_flight{{{SEL}}}"),
                  ("maximum {{instance}}", f"aep_gateway_max_in_flight{{{SEL}}}")),
            graph("Calls in flight", "Those that wait for their create, and those that are being refused.", "short",
                  ("{{instance}}", f"aep_gateway_calls_in_flight{{{SEL}}}")),
            graph("Calls refused because full", "Not created, so they may be repeated. AepGatewayOverloaded.", "reqps",
                  ("{{instance}}", rate("aep_gateway_outcomes_total", "instance", 'reason="GATEWAY_OVERLOADED"'))),
        ]),
        (7, [
            graph("Connections",
                  "At the maximum (--max-connections) new ones are closed. One instance has most of them: "
                  "balance calls, not connections.", "short",
                  ("{{instance}}", f"aep_gateway_connections{{{SEL}}}"),
                  ("maximum {{instance}}", f"aep_gateway_max_connections{{{SEL}}}")),
            graph("Connections accepted and refused",
                  "limit: too many. tls: certificates do not fit. silent: said nothing (a port check). "
                  "AepGatewayConnectionsRefused.", "cps",
                  ("accepted", rate("aep_gateway_accepted_connections_total")),
                  ("refused: {{reason}}", rate("aep_gateway_refused_connections_total", "reason"))),
            graph("Size of messages", "Requests above 256 KiB are refused (MESSAGE_TOO_LARGE).", "bytes",
                  ("received p99",
                   quantile(0.99, "grpc_server_call_rcvd_total_compressed_message_size_bytes", labels=BATCHES)),
                  ("sent p99",
                   quantile(0.99, "grpc_server_call_sent_total_compressed_message_size_bytes", labels=BATCHES))),
        ]),
    ]),
    ("Process and build", [
        (7, [
            graph("CPU", "In cores. At its limit: add gateways.", "none",
                  ("{{instance}}", f"rate(process_cpu_seconds_total{{{SEL}}}[$__rate_interval])")),
            graph("Memory", "20 MB under load, 80 MB under abuse. AepGatewayMemoryHigh.", "bytes",
                  ("{{instance}}", f"process_resident_memory_bytes{{{SEL}}}"), red=200e6),
            graph("Open files, share of the limit", "AepGatewayNearALimit.", "percentunit",
                  ("{{instance}}", f"process_open_fds{{{SEL}}} / process_max_fds{{{SEL}}}"), red=0.8),
        ]),
        (6, [
            graph("Versions", "Two for longer than a roll-out: it is stuck.", "short",
                  ("{{version}}", f"count by (version) (aep_gateway_build_info{{{SEL}}})")),
            graph("Age of the process", "Falls to 0 at each restart. AepGatewayRestarting.", "s",
                  ("{{instance}}", f"time() - process_start_time_seconds{{{SEL}}}")),
            graph("Calls of each gateway", "Should be alike; if not, connections are balanced and not calls.", "reqps",
                  ("{{instance}}", rate("grpc_server_handled_total", "instance", labels=BATCHES))),
        ]),
    ]),
    ("TLS: empty without --tls-cert-file", [
        (6, [
            graph("Certificate valid for", "AepGatewayCertificateExpiring.", "s",
                  ("{{instance}}", f"aep_gateway_tls_certificate_not_after_seconds{{{SEL}}} - time()")),
            graph("Reloads", "failed: the log names the file. AepGatewayTlsReloadFailed.", "short",
                  ("{{instance}} {{result}}",
                   f"increase(aep_gateway_tls_reloads_total{{{SEL}}}[$__rate_interval])")),
        ]),
    ]),
]

PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}


def thresholds(red):
    """Green and red; for a negative `red` it is the values below that are red."""
    if red is None:
        return [{"color": "green", "value": None}]
    below, above = ("red", "green") if red < 0 else ("green", "red")
    return [{"color": below, "value": None}, {"color": above, "value": abs(red)}]


def panel(number, spec, x, y, width, height):
    is_stat = spec["kind"] == "stat"
    targets = []
    for name, (legend, query) in zip("ABCDEF", spec["queries"]):
        target = {"refId": name, "datasource": PROMETHEUS, "expr": query, "editorMode": "code"}
        target |= {"legendFormat": legend} if legend else {}
        target |= {"instant": True, "range": False} if is_stat else {"range": True}
        target |= {"exemplar": True} if "grpc_server_handling" in query and not is_stat else {}
        targets.append(target)
    defaults = {"unit": spec["unit"], "thresholds": {"mode": "absolute", "steps": thresholds(spec["red"])}}
    defaults |= {} if is_stat else {
        "min": 0,
        "color": {"mode": "palette-classic"},
        "custom": {
            "fillOpacity": 30 if spec["stack"] else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if spec["stack"] else "none"},
            "thresholdsStyle": {"mode": "off" if spec["red"] is None else "dashed"},
        },
    }
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "colorMode": "none" if spec["red"] is None else "value",
        "graphMode": "none",
    } if is_stat else {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return {
        "id": number,
        "type": spec["kind"],
        "title": spec["title"],
        "description": spec["do"],
        "datasource": PROMETHEUS,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def panels():
    y, made = 0, []
    for title, lines in ROWS:
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        made.append({"id": len(made) + 1, "type": "row", "title": title, "collapsed": False,
                     "gridPos": place, "panels": []})
        y += 1
        for height, specs in lines:
            width = 24 // len(specs)
            for column, spec in enumerate(specs):
                made.append(panel(len(made) + 1, spec, column * width, y, width, height))
            y += height
    return made


def variable(name, query):
    query = f"label_values({query}, {name})"
    return {
        "name": name, "type": "query", "datasource": PROMETHEUS,
        "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1,
        "multi": True, "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"], "selected": True},
    } | ({"allValue": ".*"} if name == "namespace" else {})  # a namespace may be missing


DASHBOARD = {
    "uid": "aep-batch-gateway",
    "title": "AEP batch gateway",
    "description": "What to do about each alert: docs/operations.md of aep-batch-gateway.",
    "tags": ["grpc", "adobe-experience-platform"],
    "schemaVersion": 41,
    "editable": True,
    "graphTooltip": 1,
    "refresh": "30s",
    "time": {"from": "now-1h", "to": "now"},
    "templating": {"list": [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "refresh": 1},
        variable("namespace", "aep_gateway_ready"),
        variable("job", 'aep_gateway_ready{namespace=~"$namespace"}'),
        variable("instance", 'aep_gateway_ready{namespace=~"$namespace", job=~"$job"}'),
    ]},
    "annotations": {"list": [{
        "name": "Alerts", "enable": True, "iconColor": "red", "datasource": PROMETHEUS,
        "target": {
            "refId": "Anno",
            "expr": 'ALERTS{alertname=~"AepGateway.*", alertstate="firing", namespace=~"$namespace"}',
        },
    }]},
    "panels": panels(),
}

if __name__ == "__main__":
    print(json.dumps(DASHBOARD, indent=1))
