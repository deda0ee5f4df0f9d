"""The development proxy on real sockets, before stand-ins that can misbehave: nginx's rules without nginx."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from beeline.errors import Undetermined
from serve.gateway import nginx
from serve.gateway.development import Development
from tests.serve.gateway.conftest import StandIn, wait_for

UNREADY = {"status": "Unhealthy", "reason": "starting: 0 of 1 workers of fake are ready", "models": {}}


class Site:
    """A running proxy in a thread of its own, its stand-ins for servers, and its folder."""

    def __init__(self, folder: Path, backends: int = 1, **changes: Any) -> None:
        self.folder = folder
        self.backends = [StandIn() for _ in range(backends)]
        for name, text in (
            ("index.html", "<title>page</title>"),
            ("style.css", ""),
            ("scripts/main.js", "1"),
            ("catalog.json", '{"models": []}'),
            ("catalog/fake/1.0.json", "{}"),
            ("samples/fake/1.0/red-1.jpg", "a picture"),
            ("samples/fake/1.0/samples.json", "[]"),
            ("secret.txt", "not for everybody"),
        ):
            (folder / "web" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "web" / name).write_text(text)
        (folder / "unready").write_text(json.dumps(UNREADY))
        (folder / "ready").write_text('{"status": "Healthy", "models": {}}')
        values: dict[str, Any] = {
            "listen": (("127.0.0.1", 0),),
            "backends": lambda: [each.backend.inference for each in self.backends],
            "web": folder / "web",
            "ready": folder / "ready",
            "unready": folder / "unready",
            "max_bytes": 100_000,
            "in_flight": 4,
            "deadline": 5.0,
            "access_log": folder / "access.log",
        }
        self.proxy = Development(**{**values, **changes})
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self.proxy.start)
        self.port = self.proxy.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, what: Callable[[], Any]) -> None:
        asyncio.run_coroutine_threadsafe(what(), self.loop).result(20)

    def close(self) -> None:
        self.run(self.proxy.stop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        for each in self.backends:
            with contextlib.suppress(OSError):
                each.stop()

    def release(self) -> None:
        """Let every stand-in answer what it holds."""
        for each in self.backends:
            each.released.set()

    def predict(self, told: Any = "a picture", path: str = "/predictions/fake", **options: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", data=told, timeout=30, **options)

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are and return all that comes back until the connection ends or 3 s are over."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=3) as connection:
            connection.sendall(data)
            answer = b""
            with contextlib.suppress(TimeoutError):
                while piece := connection.recv(65_536):
                    answer += piece
        return answer

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Start one proxy with changed settings."""
    sites: list[Site] = []

    def begin(**changes: Any) -> Site:
        sites.append(Site(tmp_path, **changes))
        return sites[-1]

    yield begin
    for site in sites:
        site.close()


@pytest.fixture
def site(start: Callable[..., Site]) -> Site:
    return start()


def test_only_what_a_prediction_needs_travels_further(site: Site) -> None:
    sent = {
        "describe": "True",
        "X-Request-Start": "t=1",
        "X-Request-Id": "mine",
        "Cookie": "a=b",
        "url_path": "v2",
        "Authorization": "Bearer x",
        "Content-Type": "image/jpeg",
        "Accept": "application/vnd.beeline+json",
    }
    url = f"{site.url}/predictions/fake/1.0?describe=True"
    seen = requests.put(url, data=b"echo", headers=sent, timeout=30).json()
    assert seen["path"] == "/predictions/fake/1.0"
    assert abs(time.time() - float(seen["headers"].pop("X-Request-Start").removeprefix("t="))) < 60
    assert re.fullmatch("[0-9a-f]{32}", seen["headers"].pop("X-Request-Id"))
    assert seen["headers"].pop("Connection") == "close"
    assert seen["headers"] == {
        "Host": "beeline",
        "Content-Length": "4",
        "Content-Type": "application/octet-stream",
        "Accept": "application/vnd.beeline+json",
    }


def test_an_answer_passes_as_it_is(site: Site) -> None:
    answer = site.predict()
    assert answer.json() == {"red": 0.9, "other": 0.1}
    assert answer.headers["X-Batch-Size"] == "1"
    assert answer.headers["Server-Timing"] == "decode;dur=1.00, forward;dur=2.00, encode;dur=0.10"
    for status in (413, 415, 422, 500, 503):
        answer = site.predict(f"status {status}")
        assert (answer.status_code, answer.json()["type"]) == (status, "FromTheServer")
        assert ("Retry-After" in answer.headers) == (status == 503)


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("/", "text/html; charset=utf-8", "<title>page</title>"),
        ("/scripts/main.js", "text/javascript; charset=utf-8", "1"),
        ("/catalog.json", "application/json; charset=utf-8", '{"models": []}'),
        ("/catalog/fake/1.0.json?x=1", "application/json; charset=utf-8", "{}"),
        ("/samples/fake/1.0/red-1.jpg", "image/jpeg", "a picture"),
    ],
)
def test_page_catalog_and_samples_are_files(site: Site, path: str, kind: str, text: str) -> None:
    answer = requests.get(f"{site.url}{path}", timeout=30)
    assert (answer.status_code, answer.headers["Content-Type"], answer.text) == (200, kind, text)
    head = requests.head(f"{site.url}{path}", timeout=30)
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(len(text)), b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predictions/fake", 405),
        ("DELETE", "/predictions/fake", 405),
        ("OPTIONS", "/predictions/fake", 405),
        ("POST", "/ping", 405),
        ("POST", "/index.html", 405),
        ("POST", "/predictions/", 404),
        ("POST", "/predictions/fake/1.0/more", 404),
        ("POST", "/predictions/../models", 404),
        ("POST", "/predictions/%2e%2e/models", 404),
        ("POST", "/predictions/fake%0d%0aX:%20y", 404),
        ("POST", "/predictions/fake%2f..%2f..%2fmodels", 404),
        ("POST", "/models?url=x.mar", 404),
        ("GET", "/models", 404),
        ("GET", "/metrics", 404),
        ("POST", "http://127.0.0.1/predictions/fake", 404),
        ("GET", "/secret.txt", 404),
        ("GET", "/scripts/../secret.txt", 404),
        ("GET", "/catalog/../ready.json", 404),
        ("GET", "/samples/fake/1.0/samples.json", 404),
        ("GET", "/samples/fake/1.0/../red-1.jpg", 404),
        ("GET", "/scripts/none.js", 404),
        ("GET", "/catalog/fake/1.0.json/more.json", 404),
        ("no", "http", 400),
    ],
)
def test_every_refusal_is_json_that_says_what_to_do(site: Site, method: str, path: str, status: int) -> None:
    answer = site.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    if status == 400:
        answer = site.raw(b"no http at all\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    values = json.loads(body)
    assert (values["code"], set(values)) == (status, {"code", "type", "message"})
    assert (b"\r\nAllow: " in head) == (status == 405)
    assert b"nosniff" in head
    assert site.backends[0].seen == []


def test_the_security_headers_are_those_of_nginx(site: Site) -> None:
    text = (nginx.FILES / "security.conf").read_text()
    wanted = dict(re.findall(r'add_header (\S+) "?([^"$]+?)"? always;', text))
    assert "Content-Security-Policy" in wanted
    for path in ("/", "/ping", "/nothing", "/predictions/fake"):
        headers = requests.get(f"{site.url}{path}", timeout=30).headers
        assert {name: headers[name] for name in wanted} == wanted
        assert headers["Server"] == "beeline"


def test_ping_tells_what_the_state_says_and_predictions_wait_for_it(site: Site) -> None:
    healthy = requests.get(f"{site.url}/ping", timeout=30)
    assert (healthy.status_code, healthy.json()["status"]) == (200, "Healthy")
    (site.folder / "ready").unlink()
    unready = requests.get(f"{site.url}/ping", timeout=30)
    assert (unready.status_code, unready.json()) == (503, UNREADY)
    refused = site.predict()
    assert (refused.status_code, refused.json()["type"]) == (503, "NotReady")
    assert {unready.headers["Retry-After"], refused.headers["Retry-After"]} == {"2"}
    assert site.backends[0].seen == []


def test_no_ready_backend_is_503(start: Callable[..., Site]) -> None:
    assert start(backends=0).predict().json()["type"] == "NotReady"


def test_too_large_is_refused_with_and_without_a_length(start: Callable[..., Site]) -> None:
    site = start(max_image=70_000)
    for data in (bytes(100_001), iter([bytes(50_000)] * 3)):
        answer = site.predict(data)
        assert (answer.status_code, answer.json()["type"]) == (413, "TooManyBytes")
        assert "70000 bytes" in answer.json()["message"]
    assert site.backends[0].seen == []
    assert site.predict(bytes(100_000)).status_code == 200


def test_a_client_that_asks_first_is_told_to_go_on(site: Site) -> None:
    start = (
        b"POST /predictions/fake HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: "
    )
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as connection:
        connection.sendall(start + b"4\r\n\r\n")
        assert connection.recv(99).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"body")
        assert connection.recv(999).startswith(b"HTTP/1.1 200 ")
    assert site.raw(start + b"999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Content-Length: 4\r\nContent-Length: 5",
        "Content-Length: +4",
        "Transfer-Encoding: chunked\r\n\r\nzz",
    ],
)
def test_a_smuggled_request_is_refused_and_reaches_nobody(site: Site, head: str) -> None:
    hidden = "POST /models/hidden HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    text = f"POST /predictions/fake HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n0\r\n\r\n{hidden}"
    answer = site.raw(text.encode())
    assert answer.split()[1] == b"400", answer
    assert len(re.findall(rb"HTTP/1\.[01] \d", answer)) == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "BadRequest"
    assert site.backends[0].seen == []


@pytest.mark.parametrize("backends", [1, 2])
def test_each_server_gets_no_more_than_it_holds(start: Callable[..., Site], backends: int) -> None:
    site = start(backends=backends, deadline=60.0)
    with concurrent.futures.ThreadPoolExecutor(4 * backends) as pool:
        held = [pool.submit(site.predict, "hold") for _ in range(4 * backends)]
        wait_for(lambda: [each.busy for each in site.backends], lambda busy: busy == [4] * backends)
        for _ in range(3):
            refused = site.predict()
            assert (refused.status_code, refused.json()["type"]) == (429, "TooManyRequests")
            assert refused.headers["Retry-After"] == "1"
        site.release()
        assert [each.result().status_code for each in held] == [200] * 4 * backends
    assert [each.most_busy for each in site.backends] == [4] * backends
    assert site.predict().status_code == 200


def test_a_dead_server_gives_its_places_to_nobody(start: Callable[..., Site]) -> None:
    site = start(backends=2, in_flight=2, deadline=60.0)
    site.backends[1].stop()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        held = [pool.submit(site.predict, "hold") for _ in range(2)]
        wait_for(lambda: site.backends[0].busy == 2)
        answer = site.predict()
        assert (answer.status_code, answer.json()["type"]) == (429, "TooManyRequests")
        site.release()
        assert [each.result().status_code for each in held] == [200, 200]


def test_slow_clients_hold_none_of_the_servers_places(site: Site) -> None:
    slow = [socket.create_connection(("127.0.0.1", site.port), timeout=30) for _ in range(6)]
    for connection in slow:
        connection.sendall(b"POST /predictions/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nx")
    assert site.predict().status_code == 200
    assert "/predictions/slow" not in site.backends[0].seen
    slow[0].sendall(b"x")
    assert slow[0].recv(999).split()[1] == b"200"
    for connection in slow:
        connection.close()


def test_a_body_that_stops_is_given_up(start: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.development._PAUSE", 0.2)
    answer = start().raw(b"POST /predictions/fake HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_deadline_ends_in_504_and_frees_the_place(start: Callable[..., Site]) -> None:
    site = start(deadline=4.0, in_flight=1)
    answer = site.predict("hold")
    assert (answer.status_code, answer.json()["type"]) == (504, "DeadlineExceeded")
    assert site.predict().status_code == 200


def test_a_client_that_leaves_keeps_its_place_until_the_server_has_answered(start: Callable[..., Site]) -> None:
    """The server's queue does not know that nobody waits any more."""
    site = start(in_flight=1, deadline=60.0)
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        connection.sendall(b"POST /predictions/fake HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nhold")
        wait_for(lambda: site.backends[0].busy)
        assert site.predict().status_code == 429
    wait_for(lambda: 499 in [line["status"] for line in site.log()])
    assert site.predict().status_code == 429
    site.release()
    wait_for(lambda: site.predict().status_code == 200)


def test_a_dead_server_is_passed_over_and_the_load_is_shared(start: Callable[..., Site]) -> None:
    site = start(backends=3)
    site.backends[1].stop()
    assert {site.predict().status_code for _ in range(12)} == {200}
    assert [len(each.seen) >= 4 for each in site.backends] == [True, False, True]


def test_a_broken_connection_is_tried_elsewhere_and_then_502(start: Callable[..., Site]) -> None:
    site = start(backends=2)
    answer = site.predict("hang up")
    assert (answer.status_code, answer.json()["type"]) == (502, "BadGateway")
    assert [len(each.seen) for each in site.backends] == [1, 1]


def test_an_answer_is_never_asked_for_twice(start: Callable[..., Site]) -> None:
    site = start(backends=2)
    assert site.predict("status 500").status_code == 500
    assert sum(len(each.seen) for each in site.backends) == 1


def test_the_access_log_is_json_with_the_timings(site: Site) -> None:
    site.predict(path="/predictions/fake?q=%22%7D", headers={"User-Agent": 'quo"te\\'})
    site.predict(path="/nothing")
    line, other = site.log()
    assert line["request"] == "POST /predictions/fake?q=%22%7D HTTP/1.1"
    assert (line["status"], line["batch_size"], line["agent"], line["bytes_in"]) == (200, "1", 'quo"te\\', 9)
    assert line["timing"] == "decode;dur=1.00, forward;dur=2.00, encode;dur=0.10"
    assert line["backend"] == site.backends[0].backend.inference.removeprefix("http://")
    assert (other["status"], other["backend"]) == (404, "")


def test_what_is_on_its_way_is_answered_before_the_end(site: Site) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        last = pool.submit(site.predict, "sleep 1")
        wait_for(lambda: site.backends[0].busy)
        site.run(site.proxy.stop)
        assert last.result().status_code == 200
    with pytest.raises(requests.ConnectionError):
        site.predict()


@pytest.fixture
def managed(start: Callable[..., Site]) -> Site:
    """A proxy with a management listener, whose port is its `port`."""
    control = StandIn()
    site = start(management=("127.0.0.1", 0), control=control.backend.management)
    site.backends.append(control)
    assert site.proxy.managed is not None
    site.port = site.proxy.managed[1]
    site.url = f"http://127.0.0.1:{site.port}"
    return site


def test_management_is_to_look_and_to_scale(managed: Site) -> None:
    control = managed.backends[-1]
    (model,) = requests.get(f"{managed.url}/models/fake?a=%2F", timeout=30).json()
    assert model["modelName"] == "fake"
    scaled = requests.put(f"{managed.url}/models/fake?min_worker=2", data="x", timeout=30)
    assert (scaled.status_code, scaled.headers["X-Content-Type-Options"]) == (202, "nosniff")
    assert control.managed == [
        ("GET", "/models/fake?a=%2F", "localhost"),
        ("PUT", "/models/fake?min_worker=2", "localhost"),
    ]
    control.stop()
    assert requests.get(f"{managed.url}/models", timeout=30).json()["type"] == "BadGateway"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/models?url=http://127.0.0.1:9/evil.mar", {}, 405),
        ("PUT", "/models", {}, 405),
        ("DELETE", "/models/fake", {}, 405),
        ("OPTIONS", "/models/fake", {}, 405),
        ("POST", "/models?url=x.mar", {"Origin": "http://evil.example"}, 403),
        ("GET", "/models", {"Origin": "null"}, 403),
        ("GET", "/models", {"Host": "evil.example"}, 403),
        ("GET", "/models", {"Host": "localhost.evil.example:8081"}, 403),
        ("POST", "/workflows?url=evil.war", {}, 404),
        ("PUT", "/models/fake/1.0/set-default", {}, 404),
        ("GET", "/models/../token", {}, 404),
        ("GET", "/models/%2e%2e/token", {}, 404),
        ("GET", "//models", {}, 404),
        ("POST", "/predictions/fake", {}, 404),
        ("PUT", "/models/fake", {"Content-Length": "2000"}, 413),
        ("PUT", "/models/fake", {"Transfer-Encoding": "chunked"}, 413),
    ],
)
def test_management_takes_nothing_else_and_nothing_of_web_pages(
    managed: Site, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    lines = {"Host": f"127.0.0.1:{managed.port}", "Connection": "close", **headers}
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    answer = managed.raw(text.encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    assert json.loads(body)["code"] == status
    assert (b"\r\nAllow: " in head) == (status == 405)
    assert managed.backends[-1].managed == []


def test_a_taken_port_is_one_sentence(site: Site, tmp_path: Path) -> None:
    proxy = Development(
        (("127.0.0.1", 0), ("127.0.0.1", site.port)), list, tmp_path, tmp_path / "a", tmp_path / "b", 1, 1, 1.0
    )
    with pytest.raises(Undetermined, match=rf"127\.0\.0\.1:{site.port} cannot be listened on"):
        asyncio.run(proxy.start())
    assert proxy.addresses == []
