"""The profile `observability`: Prometheus of this machine in a container finds every backend by its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.docker.conftest import PROJECT, Compose, predict, run, wait_until

pytestmark = pytest.mark.docker
# The maker's image cannot be had where no registry is reached; Debian's package is the same program.
IMAGE = f"{PROJECT}-prometheus:debian"
URL = "http://localhost:9090"
_DOCKERFILE = """
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus \\
    && mkdir /prometheus && chown nobody:nogroup /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
"""


@pytest.fixture(scope="module")
def watched(site: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Two backends and Prometheus."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    (folder / "Dockerfile").write_text(_DOCKERFILE)
    run("docker", "build", "--quiet", "--tag", IMAGE, str(folder))
    site("up", "--detach", "--scale", "backend=2", "--no-recreate")
    site("up", "--detach", "--no-deps", "prometheus", PROMETHEUS_IMAGE=IMAGE)
    yield site
    site("rm", "--stop", "--force", "--volumes", "prometheus", PROMETHEUS_IMAGE=IMAGE)
    site("up", "--detach", "--scale", "backend=1", "--no-recreate")
    run("docker", "rmi", "--force", IMAGE)
    shutil.rmtree(folder)


def query(what: str) -> list[dict[str, Any]]:
    """Return the series that Prometheus has for a query now."""
    try:
        found: list[dict[str, Any]] = requests.get(f"{URL}/api/v1/query", {"query": what}, timeout=10).json()["data"][
            "result"
        ]
    except requests.RequestException:
        return []
    return found


def test_it_finds_both_backends_and_what_they_count(watched: Compose) -> None:
    wait_until(lambda: [each["value"][1] for each in query('up{service="backend"}')] == ["1", "1"], "both are scraped")
    for _ in range(12):
        assert predict().status_code == 200
    wait_until(lambda: len(query("beeline_batch_size_count > 0")) == 2, "both have counted batches")
    for series in query("beeline_queue_seconds_count"):
        assert series["metric"]["model"] == "resnet18"


def test_metrics_are_published_nowhere(watched: Compose) -> None:
    for url in ("http://localhost:8000/metrics", "http://localhost:8080/metrics"):
        assert requests.get(url, timeout=10).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get("http://localhost:8082/metrics", timeout=5)
