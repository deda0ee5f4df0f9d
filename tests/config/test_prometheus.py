"""Prometheus' configuration, the recording rules and the alerts, by their files and by promtool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.config.conftest import PROMETHEUS, RULES, Names, Query, program, rules
from tests.conftest import ROOT

CONFIG = PROMETHEUS / "prometheus.yml"
UNIT_TESTS = ROOT / "tests" / "config" / "rules.yml"
ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDS = [rule for rule in rules() if "record" in rule]


def run(*command: str | Path) -> str:
    """Return what promtool says; a failure shows it."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_replica_and_rule_file_is_found_and_nothing_is_sent_anywhere() -> None:
    values = yaml.safe_load(CONFIG.read_text())
    (job,) = values["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    assert (names["names"], names["type"], names["port"]) == (["backend", "mms"], "A", 8082)
    assert names["refresh_interval"] == "5s"
    assert job.get("metrics_path", "/metrics") == "/metrics"
    # Rules and alerts ask for the job by this name.
    assert job["job_name"] == "beeline"
    assert {path for name in values["rule_files"] for path in PROMETHEUS.glob(name)} == set(RULES.iterdir()) != set()
    assert not {"remote_write", "remote_read", "alerting", "tracing"} & values.keys()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_name_only_what_is_exposed(rule: dict[str, str], known: Names) -> None:
    assert Query(rule.get("record") or rule["alert"], rule["expr"]).faults(known) == []


@pytest.mark.parametrize(
    "expr", ["beeline_answer_total", 'beeline_workers{reason="x"}', "sum by (stage) (up)", "node_x{}"]
)
def test_a_wrong_name_or_label_is_noticed(expr: str, known: Names) -> None:
    assert len(Query("here", expr).faults(known)) == 1


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert len(rule["annotations"]["summary"]) < 150 < len(rule["annotations"]["description"])


def test_every_rule_has_a_unit_test() -> None:
    """An alert has a silent and a firing test, a recorded value has a number."""
    assert len(ALERTS) == 5
    assert all(rule["record"].startswith("beeline:") for rule in RECORDS)
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    tried = [(one["alertname"], bool(one["exp_alerts"])) for test in tests for one in test.get("alert_rule_test", [])]
    assert {(rule["alert"], fires) for rule in ALERTS for fires in (True, False)} == set(tried)
    asked = [Query("", one["expr"]) for test in tests for one in test.get("promql_expr_test", [])]
    # A recorded name has a colon; a name without one belongs to a query of another file.
    names = set().union(*(query.names for query in asked))
    assert {rule["record"] for rule in RECORDS} == {name for name in names if ":" in name}


@pytest.mark.server
def test_promtool_accepts_configuration_and_rules_and_their_unit_tests_pass() -> None:
    promtool = program("promtool")
    assert "2 rule files found" in run(promtool, "check", "config", CONFIG)
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *sorted(RULES.iterdir()))
    assert "SUCCESS" in run(promtool, "test", "rules", UNIT_TESTS)
