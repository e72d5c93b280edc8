"""The alert rules, the dashboard and the runbook, as they are in the repository."""

import json

import yaml
from harness.process import ROOT, run
from prometheus import ALERTS, MONITORING, install

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
RULES = [r for group in yaml.safe_load(ALERTS.read_text())["groups"] for r in group["rules"]]
ALERT_RULES = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())


def promtool(*args, text=None):
    """Runs promtool: exit code, and what it printed."""
    install()
    code, out, problem = run("promtool", *args, text=text)
    return code, out + problem
