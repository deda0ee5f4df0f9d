"""One gateway in front of a name: real nginx in front of real gateways, and of stand-ins that misbehave."""

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
from pathlib import Path
from typing import Any

import pytest
import requests

from beeline.errors import ConfigError
from serve import instance
from serve.addresses import Ports
from serve.gateway import backends
from serve.gateway.settings import Name, Settings
from tests.serve.gateway.conftest import ROOT, Cluster, Peer, hosts, wait_for

# Both gateways set these on every answer.
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


def answered(url: str, status: int) -> Any:
    """Ask until the status is this one, and return the answer: nginx's old workers have a moment left."""
    return json.loads(wait_for(lambda: ask(url), lambda answer: answer[0] == status)[2])


def not_ready(url: str, method: str = "GET", body: bytes | None = None) -> bool:
    status, headers, body = ask(url, method, body)
    return (status, json.loads(body)["type"], headers.get_all("Retry-After")) == (503, "NotReady", ["2"])


@pytest.mark.server
def test_backends_join_and_leave(cluster: Cluster) -> None:
    site = cluster.gateway(wait=False)
    assert site.wait_until_reason("no backend") == "no backend is there"
    assert not_ready(f"{site.url}/predictions/fake", "POST", b"x")
    assert not_ready(f"{site.url}/catalog.json")
    assert not_ready(f"{site.settings.management}/models")

    first, second = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    second.ping = (503, {"reason": "starting"})
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    assert site.wait_until(ready=True)["models"] == {"fake": {"1.0": {"workers": 1, "ready": 1}}}
    assert {site.predict().json().get("from") for _ in range(4)} == {"127.0.0.2"}
    # The page has its catalog as soon as it is ready.
    assert requests.get(f"{site.url}/catalog.json", timeout=5).json()["models"][0]["name"] == "fake"

    second.ping = first.ping
    wait_for(lambda: {site.predict().json().get("from") for _ in range(4)} == {"127.0.0.2", "127.0.0.3"})
    cluster.resolve_to("127.0.0.3")
    wait_for(lambda: hosts(site) == ["127.0.0.3"])
    second.ping = (503, {"reason": "the gateway is stopping"})
    assert site.wait_until(ready=False)["reason"] == "the gateway is stopping"
    cluster.resolve_to()
    site.wait_until_reason("no backend is there")
    assert site.predict().status_code == 503


@pytest.mark.server
def test_the_catalog_is_any_ready_backends_and_stays_when_all_are_gone(cluster: Cluster) -> None:
    old, new = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    new.offer("2.0", card=b'{"spec": 2}')
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    site = cluster.gateway()
    # Nginx asks both only after it has reloaded.
    wait_for(lambda: {site.predict().json().get("from") for _ in range(4)} == {"127.0.0.2", "127.0.0.3"})
    # Either version's files are found, whichever backend is asked first.
    pages = ["/catalog/fake/1.0.json", "/catalog/fake/2.0.json", "/samples/fake/1.0/a.png", "/samples/fake/2.0/a.png"]
    answers = {page: ask(f"{site.url}{page}") for page in [*pages, "/catalog.json"]}
    assert {page: answer[0] for page, answer in answers.items()} == dict.fromkeys(answers, 200)
    assert answers["/catalog/fake/2.0.json"][2] == b'{"spec": 2}'
    assert answers["/samples/fake/1.0/a.png"][2] == b"a picture"
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
    # Now what nginx keeps is older than it uses without asking.
    time.sleep(2.5)
    for page, answer in answers.items():
        assert ask(f"{site.url}{page}")[::2] == answer[::2]


@pytest.mark.server
def test_a_catalog_is_the_bytes_of_a_backend_and_none_of_its_headers(cluster: Cluster) -> None:
    backend = cluster.peer("127.0.0.2")
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
    for page, kind in (("/catalog.json", "application/json"), ("/samples/fake/1.0/a.png", "image/png")):
        status, headers, body = ask(f"{site.url}{page}")
        assert (status, headers.get_all("Content-Type"), body) == (200, [kind], backend.pages[page])
        assert not {"set-cookie", "refresh", "vary"} & {name.lower() for name in headers}
        assert all(len(headers.get_all(name) or ()) == 1 for name in SECURITY)
    # nginx asks again after two seconds, whatever the backend says, and what it withdrew is gone.
    backend.pages = {"/catalog.json": b'{"models": []}'}
    wait_for(lambda: ask(f"{site.url}/catalog.json")[2] == b'{"models": []}')
    wait_for(lambda: ask(f"{site.url}/samples/fake/1.0/a.png")[0] == 404)
    # A redirection sends nobody elsewhere.
    backend.page_status, backend.page_headers = 302, {"Location": "http://127.0.0.9/"}
    wait_for(lambda: ask(f"{site.url}/catalog.json")[0] == 503)
    assert ask(f"{site.url}/catalog.json")[1]["Location"] is None


@pytest.mark.server
def test_a_backend_that_falls_silent_or_sends_nonsense_is_left_out(cluster: Cluster) -> None:
    cluster.peer("127.0.0.2")
    bad = cluster.peer("127.0.0.3")
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    site = cluster.gateway()
    wait_for(lambda: len(hosts(site)) == 2)
    bad.silent = True
    wait_for(lambda: hosts(site) == ["127.0.0.2"])
    bad.silent = False
    wait_for(lambda: len(hosts(site)) == 2)
    bad.ping = (200, {"models": {"fake": 3}})
    wait_for(lambda: hosts(site) == ["127.0.0.2"])
    # Until its reload nginx knows both.
    wait_for(lambda: all(site.predict().json() == {"from": "127.0.0.2"} for _ in range(4)))
    assert site.process.poll() is None


@pytest.mark.server
def test_what_one_backend_refuses_another_answers(cluster: Cluster) -> None:
    full, free = cluster.peer("127.0.0.2"), cluster.peer("127.0.0.3")
    full.headers = free.headers = {"Retry_After": "30"}
    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    site = cluster.gateway()
    # Until its reload nginx knows only the first of them, whatever /ping says.
    wait_for(lambda: {site.predict().json().get("from") for _ in range(12)} == {"127.0.0.2", "127.0.0.3"})
    for status, retry in ((429, ["1"]), (502, ["1"]), (503, ["2"])):
        full.answers, free.answers = status, 200
        answers = [site.predict() for _ in range(12)]
        assert {(each.status_code, each.json()["from"]) for each in answers} == {(200, "127.0.0.3")}
        free.answers = status
        got, headers, body = ask(f"{site.url}/predictions/fake", "POST", b"x")
        assert (got, headers.get_all("Retry-After")) == (status, retry)
        assert json.loads(body)["from"] in ("127.0.0.2", "127.0.0.3"), "the last one's own words"
    # An answer of the model is an answer, also where it is an error.
    full.answers = free.answers = 500
    before = (full.seen + free.seen).count("/predictions/fake")
    assert site.predict().status_code == 500
    assert (full.seen + free.seen).count("/predictions/fake") == before + 1


@pytest.mark.server
def test_through_two_gateways_each_header_is_there_once(cluster: Cluster) -> None:
    backend = cluster.backend("127.0.0.2", in_flight=1)
    cluster.resolve_to("127.0.0.2")
    site = cluster.gateway()
    page, management = f"{site.url}/predictions/fake", f"{site.settings.management}/models"
    answers = {
        ("an answer", 200): ask(page, "POST", b"x"),
        ("an error of the model", 422): ask(page, "POST", b"status 422"),
        ("too large for both", 413): ask(page, "POST", bytes(200_000)),
        ("another method", 405): ask(page, "DELETE"),
        ("nothing there", 404): ask(f"{site.url}/nothing"),
        ("its state", 200): ask(f"{site.url}/ping"),
        ("another method there", 405): ask(f"{site.url}/ping", "POST", b"x"),
        ("full, as the server says", 429): ask(page, "POST", b"status 429"),
        ("not ready, as the server says", 503): ask(page, "POST", b"status 503"),
        ("management", 200): ask(management),
        ("management by another method", 405): ask(management, "DELETE"),
    }
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(site.predict, "hold")
        wait_for(lambda: backend.backends[0].busy > 0)
        # The only place is taken, so the backend's own gateway refuses.
        answers["full, as its gateway says", 429] = ask(page, "POST", b"x")
        backend.release()
        assert busy.result().status_code == 200
    for (what, expected), (status, headers, _) in answers.items():
        assert status == expected, what
        for name in (*SECURITY, "Content-Type"):
            assert len(headers.get_all(name) or ()) == 1, (what, name)
        assert headers.get_all("Retry-After") == {429: ["1"], 502: ["1"], 503: ["2"]}.get(status), what
        assert len(headers.get_all("Allow") or ()) == (status == 405), what
    assert answers["an answer", 200][1].get_all("X-Batch-Size") == ["1"]


@pytest.mark.server
def test_management_is_of_one_backend_for_the_named_addresses_and_not_for_web_pages(cluster: Cluster) -> None:
    cluster.backend("127.0.0.2")
    other = cluster.peer("127.0.0.3")
    cluster.resolve_to("127.0.0.2")
    site = cluster.gateway(management_from=("127.0.0.1", "127.0.0.8"))
    url = f"{site.settings.management}/models"
    assert answered(url, 200)[0]["modelName"] == "fake"
    assert ask(url, source="127.0.0.8")[0] == 200
    assert ask(f"{url}/fake?min_worker=2", "PUT", source="127.0.0.9")[0] == 403
    refusals: list[dict[str, Any]] = [{"source": "127.0.0.9"}, {"Origin": "http://a.example"}, {"Origin": "null"}]
    for options in (*refusals, {"Host": "backend"}):
        status, headers, body = ask(url, **options)
        assert (status, json.loads(body)["type"]) == (403, "Forbidden")
        assert headers.get_all("Content-Type") == ["application/json; charset=utf-8"]
    # Predictions are for everybody.
    assert ask(f"{site.url}/predictions/fake", "POST", b"x", source="127.0.0.9")[0] == 200

    cluster.resolve_to("127.0.0.2", "127.0.0.3")
    assert answered(url, 409)["type"] == "SeveralBackends"
    # Also where only one of them is ready: the other has workers too.
    other.ping = (503, {"reason": "starting"})
    wait_for(lambda: hosts(site) == ["127.0.0.2"])
    assert ask(url)[0] == 409
    cluster.resolve_to("127.0.0.2")
    assert answered(url, 200)[0]["modelName"] == "fake"


@pytest.mark.server
def test_the_command_in_front_of_the_name_in_a_variable(tmp_path: Path) -> None:
    peer = Peer("127.0.0.1")
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
        assert re.search(rf"gateway: nginx .*, in front of {re.escape(peer.url)}$", next(lines).strip())
        found = re.search(r"page and API: (\S+); ready when /ping says so", next(lines))
        assert found is not None
        assert "beeline_deadline_seconds 7" in next(lines)
        assert any("gateway Healthy" in line for line in lines)
        assert requests.post(f"{found[1]}/predictions/fake", data=b"x", timeout=30).json() == {"from": "127.0.0.1"}
        line = next(line for line in lines if '"request":"POST' in line)
        assert json.loads(line)["status"] == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        peer.stop()
    assert process.returncode == 0


@pytest.mark.parametrize(
    "url",
    ["backend", "backend:8080", "http://backend", "https://backend:8443", "http://backend:0", "http://a..b:80", ""],
)
def test_backends_that_are_no_name_and_port(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--backends is {url!r}; allowed: http://NAME:PORT")):
        backends.discover(url, tmp_path / "config.properties", Ports(), print, {})


@pytest.mark.parametrize(
    ("rows", "routers"),
    [
        ("eth0\t00000000\t010012AC\t0003\t0\t0\t0\t00000000\t0\t0\t0", ["172.18.0.1"]),
        ("eth0\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0", []),
        # Half of all addresses, as some VPNs have it, is no default.
        ("tun0\t00000000\t0100000A\t0003\t0\t0\t0\t00000080\t0\t0\t0", []),
        ("", []),
    ],
)
def test_the_router_is_in_the_kernels_table(tmp_path: Path, rows: str, routers: list[str]) -> None:
    assert backends.default_route(tmp_path / "nothing") == []
    table = tmp_path / "route"
    table.write_text(f"Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n{rows}")
    assert backends.default_route(table) == routers


@pytest.mark.server
@pytest.mark.parametrize(
    ("variables", "allowed"),
    [({}, ()), ({"BEELINE_MANAGEMENT_ADDRESS": "http://0.0.0.0:0"}, ("127.0.0.1", "172.18.0.1"))],
)
def test_only_management_that_others_may_reach_needs_a_list_of_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], allowed: tuple[str, ...]
) -> None:
    class Stop(Exception):
        """Ends the command before it starts anything."""

    def stop(settings: Settings) -> None:
        raise Stop(settings)

    monkeypatch.setattr("serve.gateway.runtime.lay_out", stop)
    monkeypatch.setattr(backends, "default_route", lambda: ["172.18.0.1"])
    environ = {**os.environ, "BEELINE_STATE": str(tmp_path), **variables}
    file = ROOT / "config" / "config.properties"
    with pytest.raises(Stop) as caught:
        backends.discover("http://backend:8080", file, Ports(0), print, environ)
    (settings,) = caught.value.args
    assert settings.name == Name("backend", 8080, 8081)
    assert settings.management_from == allowed
    # Systems remove old files from /tmp. Below pytest's folders, root's nginx may not enter.
    assert settings.folder.parent.parent == instance.scratch(f"{tmp_path}:").parent
