"""Every route of both servers, what they answer themselves, and what the gateway answers: the table in the docs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from serve.addresses import Ports
from serve.running import Running
from serve.up import Request, up
from tests.conftest import RED

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "frontend" / "nginx" / "ROUTES.md"
TITLES = {"torchserve": "TorchServe 0.12.0", "mms": "Multi Model Server 1.1.11"}

INFERENCE = [
    ("GET", "/ping"),
    ("POST", "/predictions/colours"),
    ("PUT", "/predictions/colours"),
    ("GET", "/predictions/colours"),
    ("POST", "/predictions/nothing"),
    ("POST", "/colours/predict"),
    ("POST", "/invocations"),
    ("POST", "/models/colours/invoke"),
    ("OPTIONS", "/"),
    ("OPTIONS", "/predictions/colours"),
    ("GET", "/api-description"),
]
MANAGEMENT = [
    ("GET", "/models"),
    ("GET", "/models/colours"),
    ("POST", "/models?url=nothing.mar"),
    ("PUT", "/models/nothing?min_worker=1"),
    ("DELETE", "/models/nothing"),
    ("OPTIONS", "/"),
    ("GET", "/api-description"),
]
# Only TorchServe has these.
TORCHSERVE = {
    "inference": [
        ("POST", "/predictions/colours/1.0"),
        ("POST", "/explanations/colours"),
        ("POST", "/v1/models/colours:predict"),
        ("POST", "/v1/models/colours:explain"),
        ("GET", "/v1/models/colours"),
        ("POST", "/v2/models/colours/infer"),
        ("GET", "/v2/health/ready"),
        ("POST", "/wfpredict/nothing"),
    ],
    "management": [
        ("GET", "/models/colours/1.0"),
        ("GET", "/models/colours/all"),
        ("PUT", "/models/nothing/1.0/set-default"),
        ("GET", "/workflows"),
        ("POST", "/workflows?url=nothing.war"),
        ("DELETE", "/workflows/nothing"),
        ("GET", "/token?type=management"),
    ],
    "metrics": [("GET", "/metrics")],
}
# The gateway's own, read-only.
OWN = [("GET", path) for path in ("/", "/index.html", "/catalog.json", "/catalog/colours/1.0.json", "/ping")]


@pytest.fixture(scope="module")
def running(colour_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    """Both servers, each behind nginx."""
    found = {}
    environ = {**os.environ, "BEELINE_STATE": str(tmp_path_factory.mktemp("state"))}
    try:
        for server in TITLES:
            asked = Request(server, (str(colour_archive),), colour_archive.parent, name=server, ports=Ports(0))
            found[server] = up(asked, print, environ)
        yield found
    finally:
        for each in found.values():
            each.stop()


def ask(method: str, url: str) -> requests.Response:
    return requests.request(method, url, data=RED if method in ("POST", "PUT") else None, timeout=60)


def rows(server: str, running: Running) -> list[str]:
    routes = {"inference": list(INFERENCE), "management": list(MANAGEMENT)}
    if server == "torchserve":
        routes = {port: routes.get(port, []) + more for port, more in TORCHSERVE.items()}
    addresses = {"inference": running.state.backend, "management": running.state.management}
    out = [f"## {TITLES[server]}", "", "| its port | route | itself | the gateway |", "|---|---|---|---|"]
    for port, wanted in routes.items():
        for method, route in wanted:
            own = str(ask(method, f"{addresses[port]}{route}").status_code) if port in addresses else "off"
            ours = ask(method, f"{running.state.inference}{route}")
            assert ours.status_code < 500, (method, route, ours.text)
            out.append(f"| {port} | `{method} {route}` | {own} | {ours.status_code} |")
    return [*out, ""]


def test_the_table_of_routes_is_what_they_answer(running: dict[str, Running]) -> None:
    text = "\n".join(
        [
            "# Routes",
            "",
            "What both servers answer themselves, asked on loopback, and what the gateway answers to the same",
            "request. Made and compared by `tests/serve/gateway/test_routes.py`; the bodies sent are a picture.",
            "",
            *(line for server, each in running.items() for line in rows(server, each)),
        ]
    )
    if os.environ.get("BEELINE_WRITE_ROUTES"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text, "write it anew with BEELINE_WRITE_ROUTES=1"


def test_only_predictions_ping_and_catalog_are_let_through(running: dict[str, Running]) -> None:
    allowed = ("/predictions/", "/ping")
    every = [*INFERENCE, *MANAGEMENT, *(route for more in TORCHSERVE.values() for route in more)]
    for server, each in running.items():
        for method, route in every:
            status = ask(method, f"{each.state.inference}{route}").status_code
            if route.startswith(allowed) and method in ("POST", "PUT", "GET"):
                continue
            assert status in (404, 405) or (method, route) in OWN, (server, method, route, status)
        for method, route in OWN:
            assert ask(method, f"{each.state.inference}{route}").status_code == 200, route


def test_management_is_reached_from_no_public_listener(running: dict[str, Running]) -> None:
    """By path, by a Host that names it, and by an absolute address."""
    for each in running.values():
        management = each.state.management
        before = requests.get(f"{management}/models/colours", timeout=30).json()
        public = [each.state.inference, *(filter(None, [each.state.addresses["page"]]))]
        for url in public:
            for path in ("/models/colours", "//models/colours", "/predictions/..;/models/colours", "/%6dodels/colours"):
                for headers in ({}, {"Host": management.removeprefix("http://")}, {"X-Original-URL": "/models"}):
                    answer = requests.put(f"{url}{path}?min_worker=0", headers=headers, timeout=30)
                    assert answer.status_code in (404, 405), (url, path, answer.text)
        assert requests.get(f"{management}/models/colours", timeout=30).json() == before
