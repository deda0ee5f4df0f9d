"""The dashboard and its provisioning, by their files: no Grafana runs here."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml

from beeline.errors import RequestError
from tests.config.conftest import (
    GRAFANA,
    GRAFANA_VARIABLES,
    PROMETHEUS,
    REFUSALS,
    Names,
    Query,
    dashboard,
    panels,
    queries,
    variables,
)
from tests.conftest import ROOT

# Panels that are part of Grafana itself.
CORE = {"row", "stat", "timeseries", "heatmap", "bargauge", "table", "text"}
# The panels that must be there.
MANDATORY = {"Requests per second by status", "Mean batch size", "Batch sizes over time", "Batches by size"}
MANDATORY |= {"Queue", "Decode", "Forward", "Encode", "4xx by reason", "Share of 4xx and 5xx", "Not counted here"}
MANDATORY |= {"Workers ready", "Worker restarts", "Instances", "Alerts"}


def source() -> dict[str, Any]:
    """Return the only data source."""
    (path,) = (GRAFANA / "provisioning" / "datasources").iterdir()
    (found,) = yaml.safe_load(path.read_text())["datasources"]
    return found


def shown() -> list[dict[str, Any]]:
    """Return the panels that query something."""
    return [panel for panel in panels() if panel["type"] not in {"row", "text"}]


def test_the_data_source_and_the_folder_are_composes() -> None:
    found = source()
    assert (found["type"], found["url"], found["access"]) == ("prometheus", "http://prometheus:9090", "proxy")
    # From it Grafana computes the shortest interval over which a rate has enough samples.
    interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert found["jsonData"]["timeInterval"] == interval
    (path,) = (GRAFANA / "provisioning" / "dashboards").iterdir()
    (provider,) = yaml.safe_load(path.read_text())["providers"]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert mounted["./config/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./config/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_everything_asks_the_provisioned_data_source() -> None:
    wanted = {"type": "prometheus", "uid": source()["uid"]}
    asking = [
        *shown(),
        *(target for panel in shown() for target in panel["targets"]),
        *dashboard()["templating"]["list"],
    ]
    assert [one for one in asking if one["datasource"] != wanted] == []
    # A name that links can keep.
    assert (dashboard()["uid"], dashboard()["id"]) == ("beeline", None)
    assert 36 <= dashboard()["schemaVersion"] <= 39


def test_a_panel_has_its_own_id_queries_and_description_and_is_part_of_grafana() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    assert {panel["type"] for panel in panels()} <= CORE
    for panel in shown():
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters) > 0, panel["title"]
        assert panel["description"], panel["title"]


def test_panels_lie_side_by_side() -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in panels()]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for _, place in places)
    for (name, a), (other, b) in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (name, other)


def test_the_mandatory_panels_are_there_and_histograms_in_grafanas_format() -> None:
    assert {panel["title"] for panel in panels()} >= MANDATORY
    for panel in panels():
        if panel["type"] in {"heatmap", "bargauge"}:
            # It turns cumulative buckets into single ones, and sorts them by a legend that is the bound alone.
            (target,) = panel["targets"]
            assert (target["format"], target["legendFormat"]) == ("heatmap", "{{le}}"), panel["title"]


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.where)
def test_queries_name_only_what_is_exposed(query: Query, known: Names) -> None:
    assert query.faults(known) == []


@pytest.mark.parametrize("one", dashboard()["templating"]["list"], ids=lambda one: one["name"])
def test_variables_are_read_from_what_is_exposed(one: dict[str, Any], known: Names) -> None:
    found = re.fullmatch(r"label_values\((\w+(?:\{[^}]*\})?), (\w+)\)", one["query"]["query"])
    assert found is not None
    query = Query(one["name"], found[1])
    (metric,) = query.names
    assert query.faults(known) == []
    assert found[2] == one["name"]
    assert found[2] in known[metric]
    assert (one["definition"], one["multi"], one["includeAll"]) == (one["query"]["query"], True, True)
    # A variable may depend only on those before it: with a later one it would never settle.
    before = variables()[: variables().index(one["name"])]
    assert set(re.findall(r"\$(\w+)", one["query"]["query"])) == set(before)


def test_queries_use_only_variables_that_exist() -> None:
    assert variables() == ["service", "model", "version", "instance"]
    used = {name for query in queries() for name in re.findall(r"\$\{?(\w+)", query.expr)}
    assert used <= {*variables(), *GRAFANA_VARIABLES}


@pytest.mark.parametrize("query", [one for one in queries() if "ALERTS" not in one.expr], ids=lambda query: query.where)
def test_a_choice_holds_for_every_metric(query: Query, known: Names) -> None:
    """A query selects each metric by every variable whose label the metric has, or it would show others' numbers."""
    for name in query.names - {"beeline:queue_seconds:budget"}:
        wanted = {label for label in variables() if label in known[name]}
        bodies = re.findall(rf"(?<![\w:]){name}\{{([^}}]*)\}}", query.expr)
        assert bodies, f"{name} has no braces"
        for body in bodies:
            assert wanted <= set(re.findall(r'(\w+)=~"\$\1"', body)), f"{name}{{{body}}}"


def test_4xx_by_reason_leaves_out_what_is_the_servers_fault() -> None:
    (panel,) = (panel for panel in panels() if panel["title"] == "4xx by reason")
    left_out = re.findall(r'reason!="(\w+)"', panel["targets"][0]["expr"])
    assert {RequestError.status // 100, *(kind.status // 100 for kind in REFUSALS)} == {4, 5}
    assert left_out == [kind.reason for kind in REFUSALS if kind.status >= 500]
