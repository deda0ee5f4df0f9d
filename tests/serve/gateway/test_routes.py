"""Every route of both servers, the servers' answers and the gateway's: the table in ROUTES.md."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterator
from functools import partial
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
from tests.serve.gateway.conftest import ROOT, WHOSE, certificate, environment

TITLES = {"torchserve": "TorchServe 0.12.0", "mms": "Multi Model Server 1.1.11"}
# The certificate is this test's own.
pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("ignore:Unverified HTTPS request")]
TABLE = ROOT / "frontend" / "nginx" / "ROUTES.md"
ROW = re.compile(r"\| (\w+) \| `(\w+) (\S+)` \| .*")


@pytest.fixture(scope="module")
def metrics_port() -> int:
    """The port of TorchServe's own metrics."""
    (address,) = settle([(Address("127.0.0.1", 0), "")])
    return address.port


@pytest.fixture(scope="module")
def running(
    colour_archive: Path, tmp_path_factory: pytest.TempPathFactory, metrics_port: int
) -> Iterator[dict[str, Running]]:
    """Both servers, each behind another nginx, with every port that there is."""
    found = {}
    folder = tmp_path_factory.mktemp("state")
    chain, key = certificate(folder)
    config = folder / "tls.properties"
    config.write_text(
        f"beeline_tls_address=https://127.0.0.1:0\nbeeline_tls_certificate={chain}\nbeeline_tls_key={key}\n"
    )
    # TorchServe's third port is off otherwise.
    metrics = {"enable_metrics_api": "true", "metrics_address": f"http://127.0.0.1:{metrics_port}"}
    before = TorchServe.properties
    wanted, overrides, ports = (str(colour_archive),), Overrides(workers=1), Ports(0, page=0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchServe, "properties", lambda *given: {**before(*given), **metrics})
            for name, whose in zip(TITLES, WHOSE, strict=True):
                request = Request(name, wanted, colour_archive.parent, config, name, overrides, ports)
                found[name] = up(request, print, {**environment(whose), "BEELINE_STATE": str(folder)})
        yield found
    finally:
        for each in found.values():
            each.stop()


def ask(method: str, url: str) -> requests.Response:
    return requests.request(method, url, data=RED if method in ("POST", "PUT") else None, timeout=60)


def row(match: re.Match[str], running: Running, metrics_port: int) -> str:
    """Return a row of the table with what the server and the gateway answer now."""
    port, method, route = match.groups()
    state = running.state
    own = {"inference": state.backend, "management": state.management, "metrics": f"http://127.0.0.1:{metrics_port}"}
    urls = (own[port], state.inference, state.addresses["management"])
    statuses = [ask(method, f"{url}{route}").status_code for url in urls]
    can_pass = route.startswith(("/predictions/", "/ping")) and method in ("POST", "PUT", "GET")
    assert statuses[1] < 500 if can_pass else statuses[1] in (404, 405), (match[0], statuses)
    return f"| {port} | `{method} {route}` | {' | '.join(map(str, statuses))} |"


def test_the_table_of_routes_is_true_and_only_predictions_ping_and_catalog_pass(
    running: dict[str, Running], metrics_port: int
) -> None:
    text = TABLE.read_text(encoding="utf-8")
    head, *sections = re.split(r"(?m)^(?=## )", text)
    answers = [head]
    for section, (name, each) in zip(sections, running.items(), strict=True):
        assert TITLES[name] in section
        answers.append(ROW.sub(partial(row, running=each, metrics_port=metrics_port), section))
        for path in ("/", "/index.html", "/catalog.json", "/catalog/colours/1.0.json"):
            assert ask("GET", f"{each.state.inference}{path}").status_code == 200, path
    if os.environ.get("BEELINE_WRITE_ROUTES"):
        TABLE.write_text("".join(answers), encoding="utf-8")
    assert len(ROW.findall(text)) == 57
    assert "".join(answers) == text, "write it again with BEELINE_WRITE_ROUTES=1"


def test_management_is_reached_from_no_published_port(running: dict[str, Running]) -> None:
    """By path, by its name in Host, and by an absolute address; on page, API, TLS and metrics."""
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
