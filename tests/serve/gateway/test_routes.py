"""Every route of both servers, what they answer themselves, and what the gateway answers: the table in the docs."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.ports import Address, settle
from serve.servers.torchserve import TorchServe
from serve.up import Request, up
from tests.conftest import RED
from tests.serve.gateway.conftest import both, certificate, environment

pytestmark = [
    pytest.mark.server,
    both,
    # The certificate is this test's own.
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
]
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
        ("POST", "/explanations/colours/1.0"),
        ("POST", "/v1/models/colours:predict"),
        ("POST", "/v1/models/colours:explain"),
        ("GET", "/v1/models/colours"),
        ("POST", "/v2/models/colours/infer"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("POST", "/wfpredict/nothing"),
    ],
    "management": [
        ("GET", "/models/colours/1.0"),
        ("GET", "/models/colours/all"),
        ("PUT", "/models/nothing/1.0?min_worker=1"),
        ("DELETE", "/models/nothing/1.0"),
        ("PUT", "/models/nothing/1.0/set-default"),
        ("GET", "/workflows"),
        ("GET", "/workflows/nothing"),
        ("POST", "/workflows?url=nothing.war"),
        ("DELETE", "/workflows/nothing"),
        ("GET", "/token?type=management"),
    ],
    "metrics": [("GET", "/metrics")],
}
# The gateway's own, read-only.
OWN = [("GET", path) for path in ("/", "/index.html", "/catalog.json", "/catalog/colours/1.0.json", "/ping")]


@pytest.fixture(scope="module")
def metrics_port() -> int:
    """The port of TorchServe's own metrics."""
    (address,) = settle([(Address("127.0.0.1", 0), "")])
    return address.port


@contextlib.contextmanager
def metrics_on(port: int) -> Iterator[None]:
    """Switch TorchServe's third port on, which is off otherwise."""
    switched = {"enable_metrics_api": "true", "metrics_address": f"http://127.0.0.1:{port}"}
    before = TorchServe.properties
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchServe, "properties", lambda *given: {**before(*given), **switched})
        yield


@pytest.fixture(scope="module")
def running(
    colour_archive: Path, tmp_path_factory: pytest.TempPathFactory, metrics_port: int, whose: str
) -> Iterator[dict[str, Running]]:
    """Both servers behind nginx, with every port that there is."""
    found = {}
    folder = tmp_path_factory.mktemp("state")
    environ = {**environment(whose), "BEELINE_STATE": str(folder)}
    chain, key = certificate(folder)
    tls = f"beeline_tls_address=https://127.0.0.1:0\nbeeline_tls_certificate={chain}\nbeeline_tls_key={key}\n"
    (folder / "tls.properties").write_text(tls)
    try:
        for name in TITLES:
            asked = Request(
                name,
                (str(colour_archive),),
                colour_archive.parent,
                folder / "tls.properties",
                name,
                Overrides(workers=1),
                Ports(0, page=0),
            )
            with metrics_on(metrics_port) if name == "torchserve" else contextlib.nullcontext():
                found[name] = up(asked, print, environ)
        yield found
    finally:
        for each in found.values():
            each.stop()


def ask(method: str, url: str) -> requests.Response:
    return requests.request(method, url, data=RED if method in ("POST", "PUT") else None, timeout=60)


def rows(server: str, running: Running, metrics_port: int) -> list[str]:
    routes = {"inference": list(INFERENCE), "management": list(MANAGEMENT)}
    if server == "torchserve":
        routes = {port: routes.get(port, []) + more for port, more in TORCHSERVE.items()}
    addresses = {
        "inference": running.state.backend,
        "management": running.state.management,
        "metrics": f"http://127.0.0.1:{metrics_port}",
    }
    out = [f"## {TITLES[server]}", "", "| its port | route | itself | the gateway | its management listener |"]
    out.append("|---|---|---|---|---|")
    for port, wanted in routes.items():
        for method, route in wanted:
            own = ask(method, f"{addresses[port]}{route}")
            ours = ask(method, f"{running.state.inference}{route}")
            managed = ask(method, f"{running.state.addresses['management']}{route}")
            assert ours.status_code < 500, (method, route, ours.text)
            statuses = " | ".join(str(each.status_code) for each in (own, ours, managed))
            out.append(f"| {port} | `{method} {route}` | {statuses} |")
    return [*out, ""]


def test_the_table_of_routes_is_what_they_answer(running: dict[str, Running], metrics_port: int) -> None:
    text = "\n".join(
        [
            "# Routes",
            "",
            "What both servers answer themselves, asked on loopback, and what the gateway answers to the same",
            "request: its public listeners, and its management listener on loopback. TorchServe's metrics are off",
            "unless, as here, somebody switches them on; the gateway has its own. Made and compared by",
            "`tests/serve/gateway/test_routes.py`; the bodies sent are a picture.",
            "",
            *(line for server in TITLES for line in rows(server, running[server], metrics_port)),
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


def test_management_is_reached_from_no_published_port(running: dict[str, Running]) -> None:
    """By path, by a Host that names it, and by an absolute address; page, API, TLS and metrics."""
    for each in running.values():
        state = each.state
        before = requests.get(f"{state.management}/models/colours", timeout=30).json()
        for url in (state.addresses[port] for port in ("inference", "page", "metrics", "tls")):
            assert url is not None
            for path in ("/models/colours", "//models/colours", "/predictions/..;/models/colours", "/%6dodels/colours"):
                for host in (state.management, str(state.addresses["management"])):
                    for headers in ({}, {"Host": host.removeprefix("http://")}, {"X-Original-URL": "/models"}):
                        target = f"{url}{path}?min_worker=0"
                        answer = requests.put(target, headers=headers, timeout=30, verify=False)
                        assert answer.status_code in (404, 405), (target, headers, answer.text)
            absolute = f"PUT {state.management}/models/colours?min_worker=0 HTTP/1.1\r\nHost: x\r\n"
            assert raw(url, f"{absolute}Connection: close\r\nContent-Length: 0\r\n\r\n") in (400, 404, 405), url
        assert requests.get(f"{state.management}/models/colours", timeout=30).json() == before


def raw(url: str, text: str) -> int:
    """Send a request as it is written and return the answer's status."""
    parts = urlsplit(url)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", parts.port or 0), timeout=30))
        if parts.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = stack.enter_context(context.wrap_socket(connection))
        connection.sendall(text.encode())
        return int(connection.makefile("rb").readline().split()[1])
