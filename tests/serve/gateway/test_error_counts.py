"""The gateway counts its own errors from its access log, through rotation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway.__main__ import ErrorCounts
from tests.serve.gateway.conftest import Gateway, wait_for


def line(status: int, who: str = "gateway", request: str = "GET / HTTP/1.1") -> str:
    values = {"time": "now", "request": request, "status": status, "from": who, "backend": ""}
    return json.dumps(values, separators=(",", ":")) + "\n"


def counted(own: ErrorCounts) -> dict[str, float]:
    (family,) = own.collect()
    return {one.labels["status"]: one.value for one in family.samples if one.value}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with a line of an earlier gateway."""
    (tmp_path / "access.log").write_text(line(429))
    return tmp_path / "access.log"


@pytest.fixture
def own(log: Path) -> Iterator[ErrorCounts]:
    """The counts of that log."""
    found = ErrorCounts(log)
    yield found
    found.log.close()


def test_only_the_gateways_new_errors_count(own: ErrorCounts, log: Path) -> None:
    assert counted(own) == {}
    poisoned = line(404, "server", '"status":429,"from":"gateway"')
    with log.open("a") as file:
        file.write(line(429) + line(404) + line(503, "server") + line(200) + line(499) + poisoned + line(429)[:-9])
        file.flush()
        assert counted(own) == {"429": 1, "404": 1}
        file.write(line(429)[-9:])
    assert counted(own) == {"429": 2, "404": 1}


def test_a_renamed_log_is_read_to_its_end(own: ErrorCounts, log: Path) -> None:
    with log.open("a") as old:
        log.rename(log.with_name("access.log.1"))
        log.write_text(line(413))
        assert counted(own) == {}
        old.write(line(404))
    assert counted(own) == {"404": 1}
    own.log.late = 0.0
    assert counted(own) == {"404": 1, "413": 1}


@pytest.mark.server
def test_metrics_have_the_gateways_errors_and_no_error_of_a_server(gateway: Gateway) -> None:
    site = gateway(in_flight=1, deadline=4)

    def answers() -> dict[str, float]:
        families = text_string_to_metric_families(requests.get(f"{site.settings.metrics}/metrics", timeout=30).text)
        samples = [sample for family in families for sample in family.samples]
        return {one.labels["status"]: one.value for one in samples if one.name == "beeline_gateway_answers_total"}

    assert set(answers().values()) == {0.0}
    assert requests.get(f"{site.url}/nothing", timeout=30).status_code == 404
    bodies = ("status 404", "status 504", "hold", "hang up", bytes(100_001))
    assert [site.predict(body).status_code for body in bodies] == [404, 504, 504, 502, 413]
    assert requests.get(f"{site.url}/predictions/fake", timeout=30).status_code == 405
    expected = {"404": 1.0, "405": 1.0, "413": 1.0, "502": 1.0, "504": 1.0}
    wait_for(lambda: {status: count for status, count in answers().items() if count}, lambda seen: seen == expected)
