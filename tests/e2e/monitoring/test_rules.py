"""The alert rules by promtool, and the headings of the runbook that they lead to."""

import re

import pytest
import yaml
from prometheus import ALERTS, MONITORING
from rules import ALERT_RULES, OPERATIONS, RULES, promtool

TESTS = MONITORING / "alerts_test.yaml"


def test_promtool_accepts_the_rules():
    code, printed = promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)
    assert code == 0, printed


def test_the_unit_tests_of_the_rules_pass():
    code, printed = promtool("test", "rules", TESTS)
    assert code == 0, printed


@pytest.mark.parametrize("expression", ["vector(1) < 0", "vector(1)"], ids=["never", "always"])
@pytest.mark.parametrize(
    "number",
    [number for number, rule in enumerate(RULES) if "alert" in rule],
    ids=[f"{rule['alert']} {rule['labels']['severity']}" for rule in ALERT_RULES],
)
def test_the_unit_tests_notice_an_alert_that_fires_never_or_always(tmp_path, number, expression):
    """Those tests that have the alert's name."""
    name = RULES[number]["alert"]
    rules = [dict(rule) for rule in RULES]
    rules[number]["expr"] = expression
    groups = {"groups": [{"name": "mutant", "rules": rules}]}
    (tmp_path / ALERTS.name).write_text(yaml.safe_dump(groups))
    tests = yaml.safe_load(TESTS.read_text())
    tests["tests"] = [test for test in tests["tests"] if name in test["name"]]
    (tmp_path / TESTS.name).write_text(yaml.safe_dump(tests))
    assert tests["tests"]
    code, printed = promtool("test", "rules", tmp_path / TESTS.name)
    assert code == 1, printed


def test_every_alert_has_its_heading_in_the_runbook_and_leads_there():
    headings = re.findall(r"^### (AepGateway\w+)$", OPERATIONS, re.M)
    assert sorted(headings) == sorted({rule["alert"] for rule in ALERT_RULES})
    for rule in ALERT_RULES:
        link = rule["annotations"]["runbook_url"]
        assert link == f"docs/operations.md#{rule['alert'].lower()}"


def test_alerts_are_critical_or_warning():
    assert {rule["labels"]["severity"] for rule in ALERT_RULES} == {"critical", "warning"}
