"""The gateway's own answers are counted from its log, however that is rotated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway.__main__ import ErrorCounts
from serve.gateway.settings import Settings
from tests.serve.gateway.conftest import Gateway, wait_for

Follow = Callable[[Path], ErrorCounts]


def line(status: int, who: str = "gateway", asked: str = "GET / HTTP/1.1") -> str:
    values = {"time": "now", "request": asked, "status": status, "from": who, "backend": ""}
    return json.dumps(values, separators=(",", ":")) + "\n"


def counted(own: ErrorCounts) -> dict[str, float]:
    (family,) = own.collect()
    return {one.labels["status"]: one.value for one in family.samples if one.value}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


@pytest.fixture
def follow() -> Iterator[Follow]:
    """Follow a log until the test ends."""
    followed: list[ErrorCounts] = []

    def begin(path: Path) -> ErrorCounts:
        followed.append(ErrorCounts(path))
        return followed[-1]

    yield begin
    for each in followed:
        each.log.close()


def test_only_errors_of_its_own_are_counted(follow: Follow, log: Path) -> None:
    log.write_text(line(429))
    own = follow(log)
    assert counted(own) == {}
    poisoned = line(404, "server", '"status":429,"from":"gateway"')
    with log.open("a") as file:
        file.write(line(429) + line(404) + line(503, "server") + line(200) + line(499) + poisoned + line(429)[:-9])
        file.flush()
        assert counted(own) == {"429": 1, "404": 1}
        file.write(line(429)[-9:])
    assert counted(own) == {"429": 2, "404": 1}


def test_a_renamed_log_is_read_to_its_end(follow: Follow, log: Path) -> None:
    own = follow(log)
    assert counted(own) == {}
    log.write_text(line(404))
    with log.open("a") as old:
        assert counted(own) == {"404": 1}
        log.rename(log.with_name("access.log.1"))
        log.write_text(line(413))
        assert counted(own) == {"404": 1}
        old.write(line(404))
        old.flush()
        assert counted(own) == {"404": 2}
    own.log.late = 0.0
    assert counted(own) == {"404": 2, "413": 1}


@pytest.mark.server
def test_metrics_tell_them(gateway: Gateway) -> None:
    site = gateway(in_flight=1, deadline=4)
    told = own_of(site.settings)
    assert set(told().values()) == {0.0}
    assert requests.get(f"{site.url}/nothing", timeout=30).status_code == 404
    assert site.predict("status 404").status_code == 404
    assert site.predict("status 504").status_code == 504
    assert site.predict("hold").status_code == 504
    assert site.predict("hang up").status_code == 502
    assert site.predict(bytes(100_001)).status_code == 413
    assert requests.get(f"{site.url}/predictions/fake", timeout=30).status_code == 405
    wanted = {"404": 1.0, "405": 1.0, "413": 1.0, "502": 1.0, "504": 1.0}
    wait_for(lambda: {status: count for status, count in told().items() if count}, lambda seen: seen == wanted)


def own_of(settings: Settings) -> Callable[[], dict[str, float]]:
    """Return what asks a gateway's metrics for its own answers, by status."""

    def ask() -> dict[str, float]:
        families = text_string_to_metric_families(requests.get(f"{settings.metrics}/metrics", timeout=30).text)
        return {
            sample.labels["status"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "beeline_gateway_answers_total"
        }

    return ask
