"""One gateway before a name: real nginx before real gateways, and before stand-ins that misbehave."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from beeline.errors import ConfigError
from host import processes
from serve.addresses import Ports
from serve.gateway import backends
from serve.gateway.settings import Settings
from serve.ports import Address
from tests.serve.gateway.conftest import Cluster, Peer, Site
from tests.serve.gateway.test_discovery import wait_for

ROOT = Path(__file__).resolve().parents[3]
# What both gateways set, on every answer.
SECURITY = (
    "Content-Security-Policy",
    "X-Content-Type-Options",
    "Referrer-Policy",
    "Permissions-Policy",
    "Cross-Origin-Opener-Policy",
    "Cross-Origin-Resource-Policy",
)


def ask(
    url: str, method: str = "GET", body: bytes | None = None, source: str = "127.0.0.1", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send one request from an address of this machine; return status, every header and body."""
    _, host, path = re.split(r"(?<=:)//|(?<=\d)(?=/)", url, maxsplit=2)
    connection = http.client.HTTPConnection(host, timeout=30, source_address=(source, 0))
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def members(site: Site) -> list[str]:
    """Return who shares the load by nginx's configuration."""
    text = (site.settings.folder / "settings" / "upstream.conf").read_text(encoding="utf-8")
    return re.findall(r"server (\S+):\d+ max_conns", text)


def answered(url: str, status: int) -> Any:
    """Ask until it is answered so, and return that answer: nginx's workers of before have a moment left."""
    found: list[Any] = []

    def right() -> bool:
        got, _, body = ask(url)
        found.append(json.loads(body))
        return got == status

    wait_for(right)
    return found[-1]


def managed(settings: Settings) -> str:
    return f"{settings.management}/models"


@pytest.mark.server
def test_backends_join_and_leave(cluster: Cluster) -> None:
    site = cluster.gateway(wait=False)
    assert site.wait_until_reason("no backend") == "no backend is there"
    status, headers, body = ask(f"{site.url}/predictions/fake", "POST", b"x")
    assert (status, json.loads(body)["type"], headers.get_all("Retry-After")) == (503, "NotReady", ["2"])

    first, second = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    first.offer()
    second.ping = (503, {"reason": "starting"})
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    assert site.wait_until(ready=True)["models"] == {"fake": {"1.0": {"workers": 1, "ready": 1}}}
    assert {site.predict().json()["from"] for _ in range(4)} == {"127.0.0.2"}
    # The page has its catalog as soon as it is ready.
    assert requests.get(f"{site.url}/catalog.json", timeout=5).json()["models"][0]["name"] == "fake"
    assert requests.get(f"{site.url}/samples/fake/1.0/a.png", timeout=5).content == b"a picture"

    second.ping = first.ping
    wait_for(lambda: {site.predict().json()["from"] for _ in range(4)} == {"127.0.0.2", "127.0.0.3"})
    cluster.resolve_to("away")
    log = site.settings.folder.parent / "process.log"
    wait_for(lambda: "backends cannot be looked up now" in log.read_text())
    asked = first.pings
    wait_for(lambda: first.pings > asked + 2)
    assert members(site) == ["127.0.0.2", "127.0.0.3"]
    cluster.resolve_to("127.0.0.3")
    wait_for(lambda: members(site) == ["127.0.0.3"])
    second.ping = (503, {"reason": "the gateway is stopping"})
    assert site.wait_until(ready=False)["reason"] == "the gateway is stopping"
    cluster.resolve_to()
    site.wait_until_reason("no backend is there")
    assert site.predict().status_code == 503


@pytest.mark.server
def test_the_catalog_is_any_ready_backends_and_stays_when_all_are_gone(cluster: Cluster) -> None:
    old, new = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    old.offer("1.0")
    new.offer("2.0", content=b'{"spec": 2}')
    site = cluster.gateway(wait=False)
    site.wait_until_reason("no backend is there")
    status, headers, body = ask(f"{site.url}/catalog.json")
    assert (status, json.loads(body)["type"], headers.get_all("Retry-After")) == (503, "NotReady", ["2"])
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    wait_for(lambda: len(members(site)) == 2)
    site.wait_until(ready=True)
    # Either version's files are found, whichever backend is asked first.
    pages = ["/catalog/fake/1.0.json", "/catalog/fake/2.0.json", "/samples/fake/1.0/a.png", "/samples/fake/2.0/a.png"]
    answers = {page: ask(f"{site.url}{page}") for page in [*pages, "/catalog.json"]}
    assert {page: answer[0] for page, answer in answers.items()} == dict.fromkeys(answers, 200)
    assert answers["/catalog/fake/2.0.json"][2] == b'{"spec": 2}'
    assert answers["/samples/fake/1.0/a.png"][2] == b"a picture"
    assert all(len(answer[1].get_all(name) or ()) == 1 for answer in answers.values() for name in SECURITY)
    for status, method, page in (
        (405, "POST", "/catalog.json"),
        (404, "GET", "/samples/fake/1.0/.hidden.png"),
        (404, "GET", "/catalog/fake/3.0.json"),
    ):
        assert ask(f"{site.url}{page}", method)[0] == status
    old.stop()
    new.stop()
    site.wait_until(ready=False)
    cluster.resolve_to()
    site.wait_until_reason("no backend is there")
    # What nginx has is older now than it uses without asking.
    time.sleep(2.5)
    for page, answer in answers.items():
        assert ask(f"{site.url}{page}")[::2] == answer[::2]


@pytest.mark.server
def test_a_catalog_is_the_bytes_of_a_backend_and_nothing_else_of_it(cluster: Cluster) -> None:
    backend = cluster.peer("127.0.0.2")
    backend.offer()
    backend.page_headers = {
        "Content-Type": "text/html",
        "Set-Cookie": "a=b",
        "Refresh": "0; url=/elsewhere",
        "Vary": "*",
        "X-Accel-Expires": "86400",
        "X-Accel-Redirect": "/index.html",
    }
    cluster.resolve_to("127.0.0.2")
    site = cluster.gateway()
    site.wait_until(ready=True)
    for page, kind, content in (
        ("/catalog.json", "application/json", backend.pages["/catalog.json"]),
        ("/samples/fake/1.0/a.png", "image/png", b"a picture"),
    ):
        status, headers, body = ask(f"{site.url}{page}")
        assert (status, headers.get_all("Content-Type"), body) == (200, [kind], content)
        assert not {"set-cookie", "refresh", "vary"} & {name.lower() for name in headers}
        assert all(len(headers.get_all(name) or ()) == 1 for name in SECURITY)
    # It is asked again after two seconds, whatever it says, and what it withdrew is gone.
    backend.pages = {"/catalog.json": b'{"models": []}'}
    wait_for(lambda: ask(f"{site.url}/catalog.json")[2] == b'{"models": []}')
    wait_for(lambda: ask(f"{site.url}/samples/fake/1.0/a.png")[0] == 404)
    # Nobody is sent elsewhere.
    backend.page_status, backend.page_headers = 302, {"Location": "http://127.0.0.9/"}
    wait_for(lambda: ask(f"{site.url}/catalog.json")[0] == 503)
    assert ask(f"{site.url}/catalog.json")[1]["Location"] is None


@pytest.mark.server
def test_a_backend_that_was_ready_before_the_gateway_started(cluster: Cluster) -> None:
    """The first thing that nginx is told then comes before it has workers."""
    peer = cluster.peer("127.0.0.2")
    peer.offer()
    cluster.resolve_to("127.0.0.2")
    for _ in range(3):
        site = cluster.gateway()
        assert site.predict().json() == {"from": "127.0.0.2"}
        assert site.process.poll() is None


@pytest.mark.server
def test_a_backend_that_falls_silent_or_talks_nonsense_is_left_out(cluster: Cluster) -> None:
    good, bad = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    good.offer()
    bad.offer()
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    site = cluster.gateway()
    wait_for(lambda: len(members(site)) == 2)
    bad.silent = True
    wait_for(lambda: members(site) == ["127.0.0.2"])
    bad.silent = False
    wait_for(lambda: len(members(site)) == 2)
    bad.ping = (200, {"models": {"fake": 3}})
    wait_for(lambda: members(site) == ["127.0.0.2"])
    assert site.predict().json() == {"from": "127.0.0.2"}
    assert site.process.poll() is None


@pytest.mark.server
@pytest.mark.parametrize("status", [429, 502, 503])
def test_what_one_backend_refuses_another_answers(cluster: Cluster, status: int) -> None:
    full, free = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    full.offer()
    free.offer()
    full.answers, full.headers = status, {"Retry_After": "30"}
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    site = cluster.gateway()
    wait_for(lambda: len(members(site)) == 2)
    wait_for(lambda: site.predict().ok and "/predictions/fake" in full.seen)
    answers = [site.predict() for _ in range(12)]
    assert {(each.status_code, each.json()["from"]) for each in answers} == {(200, "127.0.0.3")}

    free.answers, free.headers = status, full.headers
    got, headers, body = ask(f"{site.url}/predictions/fake", "POST", b"x")
    assert got == status
    assert json.loads(body)["from"] in ("127.0.0.2", "127.0.0.3"), "the last one's own words"
    assert headers.get_all("Retry-After") == {429: ["1"], 503: ["2"]}.get(status)
    # An answer of the model is one, also where it is an error.
    full.answers = free.answers = 500
    before = full.seen.count("/predictions/fake") + free.seen.count("/predictions/fake")
    assert site.predict().status_code == 500
    assert full.seen.count("/predictions/fake") + free.seen.count("/predictions/fake") == before + 1


@pytest.mark.server
def test_a_backend_that_is_killed_under_load_costs_nobody_an_answer(cluster: Cluster) -> None:
    sites = [cluster.backend(host) for host in cluster.HOSTS[:2]]
    cluster.resolve_to(*cluster.HOSTS[:2])
    site = cluster.gateway(in_flight=50)
    wait_for(lambda: len(members(site)) == 2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(site.predict, "sleep 0.02") for _ in range(200)]
        wait_for(lambda: all(each.backends[0].seen.count("/predictions/fake") >= 10 for each in sites))
        for process in processes.marked("no such variable", "-", sites[0].settings.folder):
            process.kill()
        sites[0].process.kill()
        assert {each.result().status_code for each in under_way} == {200}
    wait_for(lambda: members(site) == ["127.0.0.3"])


@pytest.mark.server
def test_headers_are_said_once_through_two_gateways(cluster: Cluster) -> None:
    backend = cluster.backend("127.0.0.2", in_flight=1)
    cluster.resolve_to("127.0.0.2")
    site = cluster.gateway()
    page = f"{site.url}/predictions/fake"
    answers = {
        "an answer": ask(page, "POST", b"x"),
        "an error of the model": ask(page, "POST", b"status 422"),
        "too large for both": ask(page, "POST", bytes(200_000)),
        "another method": ask(page, "DELETE"),
        "nothing there": ask(f"{site.url}/nothing"),
        "its state": ask(f"{site.url}/ping"),
        "another method there": ask(f"{site.url}/ping", "POST", b"x"),
        "full, as the server says": ask(page, "POST", b"status 429"),
        "not ready, as the server says": ask(page, "POST", b"status 503"),
        "management": ask(managed(site.settings)),
        "management by another method": ask(managed(site.settings), "DELETE"),
    }
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(site.predict, "hold")
        wait_for(lambda: backend.backends[0].busy > 0)
        # Its one place is taken: the backend's own gateway says so, and no server.
        answers["full, as its gateway says"] = ask(page, "POST", b"x")
        backend.backends[0].released.set()
        assert busy.result().status_code == 200
    assert {what: answer[0] for what, answer in answers.items()} == {
        "an answer": 200,
        "an error of the model": 422,
        "too large for both": 413,
        "another method": 405,
        "nothing there": 404,
        "its state": 200,
        "another method there": 405,
        "full, as the server says": 429,
        "not ready, as the server says": 503,
        "management": 200,
        "management by another method": 405,
        "full, as its gateway says": 429,
    }
    for what, (status, headers, _) in answers.items():
        for name in (*SECURITY, "Content-Type"):
            assert len(headers.get_all(name) or ()) == 1, (what, name)
        wanted = {429: ["1"], 503: ["2"]}.get(status)
        assert headers.get_all("Retry-After") == wanted, what
        assert len(headers.get_all("Allow") or ()) == (status == 405), what
    assert answers["an answer"][1].get_all("X-Batch-Size") == ["1"]


@pytest.mark.server
def test_management_of_one_backend_of_several_and_of_none(cluster: Cluster) -> None:
    cluster.backend("127.0.0.2")
    other = cluster.peer("127.0.0.3")
    other.offer()
    site = cluster.gateway(wait=False)
    url = managed(site.settings)
    site.wait_until_reason("no backend is there")
    status, headers, body = ask(url)
    assert (status, json.loads(body)["type"], headers.get_all("Retry-After")) == (503, "NotReady", ["2"])
    cluster.resolve_to("127.0.0.2")
    assert answered(url, 200)[0]["modelName"] == "fake"
    site.wait_until(ready=True)
    status, headers, body = ask(url, "POST", b"x")
    assert (status, json.loads(body)["type"], headers.get_all("Allow")) == (405, "MethodNotAllowed", ["GET"])
    for headers_sent in ({"Origin": "http://a.example"}, {"Origin": "null"}, {"Host": "backend"}):
        status, _, body = ask(url, "GET", None, "127.0.0.1", **headers_sent)
        assert (status, json.loads(body)["type"]) == (403, "Forbidden")

    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    assert answered(url, 409)["type"] == "SeveralBackends"
    # Also where only one of them is ready: the other has workers too.
    other.ping = (503, {"reason": "starting"})
    wait_for(lambda: members(site) == ["127.0.0.2"])
    assert ask(url)[0] == 409
    cluster.resolve_to("127.0.0.2")
    assert answered(url, 200)[0]["modelName"] == "fake"


@pytest.mark.server
def test_management_is_for_the_addresses_that_are_named(cluster: Cluster) -> None:
    cluster.backend("127.0.0.2")
    cluster.resolve_to("127.0.0.2")
    site = cluster.gateway(management_from=("127.0.0.1", "127.0.0.8"))
    url = managed(site.settings)
    assert [ask(url, source=f"127.0.0.{last}")[0] for last in (1, 8)] == [200, 200]
    status, headers, body = ask(url, source="127.0.0.9")
    assert (status, json.loads(body)["type"]) == (403, "Forbidden")
    assert headers.get_all("Content-Type") == ["application/json; charset=utf-8"]
    assert ask(f"{url}/fake?min_worker=2", "PUT", source="127.0.0.9")[0] == 403
    # Predictions are for everybody.
    assert ask(f"{site.url}/predictions/fake", "POST", b"x", source="127.0.0.9")[0] == 200


@pytest.mark.server
def test_the_command_stands_before_what_a_variable_names(tmp_path: Path) -> None:
    peer = Peer("127.0.0.1")
    peer.offer()
    port = re.escape(str(peer.server.server_port))
    variables = {
        "BEELINE_STATE": str(tmp_path / "state"),
        "BEELINE_BACKENDS": peer.url,
        "BEELINE_DEADLINE_SECONDS": "7",
        "BEELINE_DRAIN_SECONDS": "0",
    }
    command = [sys.executable, "-m", "cli", "serve", "gateway", "--port", "0", "--show-logs", "access"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        first = next(lines)
        assert re.search(rf"gateway: nginx .*, in front of http://127\.0\.0\.1:{port}$", first.strip()), first
        found = re.search(r"page and API: (\S+); ready when /ping says so", next(lines))
        assert found is not None
        assert "beeline_deadline_seconds 7" in next(lines)
        url = found[1]
        # Ready is what the log says, on the same stream as everything else.
        assert any("gateway Healthy" in line for line in lines)
        assert requests.post(f"{url}/predictions/fake", data=b"x", timeout=30).json() == {"from": "127.0.0.1"}
        line = next(line for line in lines if '"request":"POST' in line)
        assert json.loads(line)["status"] == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        peer.stop()
    assert process.returncode == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/ping", timeout=5)


@pytest.mark.parametrize(
    "url",
    ["backend", "backend:8080", "http://backend", "https://backend:8443", "http://backend:0", "http://a..b:80", ""],
)
def test_backends_that_are_no_name_and_port(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--backends is {url!r}; allowed: http://NAME:PORT")):
        backends.discover(url, tmp_path / "config.properties", Ports(), print, {})


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("eth0\t00000000\t010012AC\t0003\t0\t0\t0\t00000000\t0\t0\t0", ["172.18.0.1"]),
        ("eth0\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0", []),
        # Half of all addresses, as some VPNs have it, is no default.
        ("tun0\t00000000\t0100000A\t0003\t0\t0\t0\t00000080\t0\t0\t0", []),
        ("", []),
    ],
)
def test_the_router_is_in_the_kernels_table(tmp_path: Path, rows: str, found: list[str]) -> None:
    table = tmp_path / "route"
    table.write_text(f"Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n{rows}")
    assert backends.default_route(table) == found


def test_no_table_is_no_router(tmp_path: Path) -> None:
    assert backends.default_route(tmp_path / "nothing") == []


@pytest.mark.server
def test_loopback_needs_no_list_of_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert management_from(tmp_path, monkeypatch, {}) == ()
    variable = {"BEELINE_MANAGEMENT_ADDRESS": "http://0.0.0.0:0"}
    assert management_from(tmp_path, monkeypatch, variable) == ("127.0.0.1", "172.18.0.1")


def management_from(folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> tuple[str, ...]:
    """Return who may ask for management; nothing is started."""
    kept: list[Settings] = []

    def keep(settings: Settings) -> None:
        kept.append(settings)
        raise KeyboardInterrupt

    lay_out: Callable[[Settings], None] = keep
    monkeypatch.setattr("serve.gateway.runtime.lay_out", lay_out)
    monkeypatch.setattr(backends, "default_route", lambda: ["172.18.0.1"])
    environ = {**os.environ, "BEELINE_STATE": str(folder), **variables}
    file = ROOT / "config" / "config.properties"
    with pytest.raises(KeyboardInterrupt):
        backends.discover("http://backend:8080", file, Ports(0), print, environ)
    assert kept[0].name is not None
    assert (kept[0].name.host, kept[0].name.port, kept[0].name.management_port) == ("backend", 8080, 8081)
    assert isinstance(kept[0].management, Address)
    return kept[0].management_from
