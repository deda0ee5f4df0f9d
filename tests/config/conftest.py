"""Every query of the configuration, the metrics that queries may name, and Debian's Prometheus."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from beeline.answer import Answer, failure
from beeline.errors import RequestError
from beeline.metrics import Metrics
from serve.metrics import Collector
from tests.conftest import ROOT, worker

PROMETHEUS = ROOT / "config" / "prometheus"
GRAFANA = ROOT / "config" / "grafana"
RULES = PROMETHEUS / "rules"

# The labels that Prometheus adds to each series of a target, and its own series.
OF_TARGET = frozenset({"job", "instance", "service"})
OF_PROMETHEUS = {"up": OF_TARGET, "ALERTS": OF_TARGET | {"alertname", "alertstate", "severity", "model", "version"}}
REFUSALS = [kind for kind in RequestError.__subclasses__() if kind.__module__.startswith("beeline.")]
# Grafana's values for its own variables in a query.
GRAFANA_VARIABLES = {"__rate_interval": "20s", "__range": "900s"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([A-Za-z_:][\w:]*)\s*\{([^{}]*)\}")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPED = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_NAME = re.compile(r"(?<![\w:$])(?:beeline[\w:]*|up|ALERTS)(?![\w:])")
# A recording rule's own labels are those by which its expression is grouped.
_BY = re.compile(r"\bby\s*\(([^()]*)\)")

Names = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Query:
    """One PromQL expression and its place."""

    where: str
    expr: str
    instant: bool = True

    def faults(self, known: Names) -> list[str]:
        """Return the metrics and labels in it that nobody exposes."""
        # Without its strings, which may hold anything.
        plain = _STRING.sub('""', self.expr)
        found = [f"{self.where}: no such metric as {name}" for name in sorted(self.names - known.keys())]
        for name, body in _SELECTOR.findall(plain):
            missing = set(_LABEL.findall(body)) - known[name] if name in known else ()
            found += [f"{self.where}: {name} has no label {label}" for label in missing]
        grouped = {label.strip() for body in _GROUPED.findall(plain) for label in body.split(",") if label.strip()}
        any_of = frozenset().union(*(known.get(name, frozenset()) for name in self.names))
        return found + [f"{self.where}: grouped by {label}, which nothing has" for label in grouped - any_of]

    @property
    def names(self) -> set[str]:
        """Return every metric that it reads, of this project and of Prometheus itself."""
        plain = _GROUPED.sub("", _STRING.sub('""', self.expr))
        return {*_NAME.findall(plain), *(name for name, _ in _SELECTOR.findall(plain))}


def draw(metrics: Metrics, choose: random.Random, batches: int) -> None:
    """Count some batches as a worker does: predictions, and pictures refused for every reason."""
    for number in range(batches):
        answers = [Answer(200, "OK", "{}")] * choose.randint(1, 7) + [failure(choose.choice(REFUSALS)("no"))]
        # Each reason at least once, whatever is drawn.
        answers += [failure(REFUSALS[number % len(REFUSALS)]("no"))]
        queues = [choose.uniform(0, 400) for _ in answers]
        spans = {"decode": choose.uniform(1, 30), "forward": choose.uniform(5, 90), "encode": choose.uniform(0, 2)}
        metrics.count(answers, queues, spans)


def rules() -> list[dict[str, Any]]:
    """Return every rule of every file, alerts too."""
    return [
        rule
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def dashboard() -> dict[str, Any]:
    """Return the one dashboard."""
    (path,) = (GRAFANA / "dashboards").glob("*.json")
    return json.loads(path.read_text())


def panels() -> list[dict[str, Any]]:
    """Return every panel, those inside collapsed rows too."""
    return [panel for outer in dashboard()["panels"] for panel in (outer, *outer.get("panels", []))]


def queries(filled: Mapping[str, str] | None = None) -> list[Query]:
    """Return every query of the dashboard, with these values of variables."""
    return [
        Query(f"{panel['title']} {target['refId']}", fill(target["expr"], filled or {}), target["instant"])
        for panel in panels()
        for target in panel.get("targets", [])
    ]


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace `$name` as Grafana does."""
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), text)


def variables() -> list[str]:
    """Return the names of the dashboard's own variables."""
    return [one["name"] for one in dashboard()["templating"]["list"]]


def program(name: str) -> str:
    """Return where a program of Debian's package is, or skip the test."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}; install it (Debian: RUNLEVEL=1 apt-get install prometheus, which starts no server)")
    return found


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Names:
    """Every metric that a server exposes, the recording rules make or Prometheus adds, with all its labels."""
    folder = tmp_path_factory.mktemp("counts")
    draw(worker(folder), random.Random(3), 40)
    registry = CollectorRegistry()
    registry.register(Collector(folder))
    exposed: dict[str, frozenset[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            exposed[sample.name] = exposed.get(sample.name, OF_TARGET) | set(sample.labels)
    recorded = {
        rule["record"]: frozenset(label.strip() for body in _BY.findall(rule["expr"]) for label in body.split(","))
        - {"le"}
        for rule in rules()
        if "record" in rule
    }
    return {**exposed, **recorded, **OF_PROMETHEUS}
