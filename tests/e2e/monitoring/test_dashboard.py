"""The dashboard's file."""

import json
import re
import sys

import pytest
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models import dashboard as grafana
from harness.process import run
from prometheus import MONITORING
from rules import ALERT_RULES, DASHBOARD

PANELS = DASHBOARD["panels"]


def test_dashboard_json_is_what_dashboard_py_prints():
    code, out, problem = run(sys.executable, MONITORING / "dashboard.py")
    assert code == 0, problem
    assert json.loads(out) == DASHBOARD


def test_grafanas_sdk_knows_everything_that_the_dashboard_says():
    plugins.register_default_plugins()
    understood = encoder.JSONEncoder().encode(grafana.Dashboard.from_json(DASHBOARD))
    lost = differences(DASHBOARD, json.loads(understood))
    # The SDK knows no annotation by a query of Prometheus.
    assert not [at for at in lost if not at.startswith("/annotations/list/0/target")]


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


def test_panels_have_different_ids():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


@pytest.mark.parametrize("panel", [p for p in PANELS if p["type"] != "row"], ids=lambda p: p["title"])
def test_a_panel_says_what_to_do(panel):
    assert panel.get("description")


def test_panels_do_not_overlap_and_stay_within_24_columns():
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_dashboard_names_no_alert_that_is_not_there():
    named = set(re.findall(r"AepGateway[A-Z]\w+", json.dumps(PANELS)))
    assert named <= {rule["alert"] for rule in ALERT_RULES}
