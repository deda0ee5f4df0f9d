"""What real nginx lets pass, refuses, limits and repeats with the project's configuration: predictions, management."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import socket
import time

import pytest
import requests

from tests.conftest import post_together
from tests.serve.gateway.conftest import Gateway, Site, both, wait_for

pytestmark = [pytest.mark.server, both]


def test_only_what_a_prediction_needs_goes_further(gateway_once: Site) -> None:
    sent = {
        "describe": "True",
        "explain": "True",
        "X-Request-Start": "t=1",
        "X-Forwarded-For": "1.2.3.4",
        "Cookie": "a=b",
        "url_path": "v2",
        "Authorization": "Bearer x",
        "Content-Type": "image/jpeg",
        "Accept": "application/vnd.beeline+json",
    }
    url = f"{gateway_once.url}/predictions/fake/1.0?describe=True"
    seen = requests.put(url, data=b"echo", headers=sent, timeout=30).json()
    assert seen["path"] == "/predictions/fake/1.0"
    started = float(seen["headers"].pop("X-Request-Start").removeprefix("t="))
    assert abs(time.time() - started) < 60
    assert len(seen["headers"].pop("X-Request-Id")) == 32
    assert seen["headers"] == {
        "Host": "beeline",
        "Content-Length": "4",
        "Content-Type": "application/octet-stream",
        "Accept": "application/vnd.beeline+json",
    }


@pytest.mark.parametrize("kind", [" application/x-www-form-urlencoded", "\tmultipart/form-data; boundary=b"])
def test_no_body_is_a_form_to_the_servers(gateway_once: Site, kind: str) -> None:
    """`curl --data-binary` calls every body a form, to which both servers answer 500; nginx leaves a tab in place."""
    head = f"{START}Connection: close\r\nContent-Length: 4\r\nContent-Type:{kind}\r\n\r\necho"
    answer = gateway_once.raw(head.encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["headers"]["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predictions/other", 405),
        ("DELETE", "/predictions/other", 405),
        ("OPTIONS", "/predictions/other", 405),
        ("POST", "/predictions/", 404),
        ("POST", "/predictions/fake/1.0/more", 404),
        ("POST", "/predictions/../models", 404),
        ("POST", "/predictions/%2e%2e/models", 404),
        ("POST", "/predictions/fake%0d%0aX:%20y", 404),
        ("POST", "/predictions/fake%0a", 404),
        ("POST", "/predictions/fake/1.0%0A", 404),
        ("GET", "/index.html%0a", 404),
        ("GET", "/catalog.json%0a", 404),
        ("POST", "/ping", 405),
        ("OPTIONS", "/ping", 405),
        ("POST", "/index.html", 405),
        ("GET", "/settings.json", 404),
        ("GET", "/state/ready", 404),
        ("GET", "/unready", 404),
        ("GET", "/errors/404.json", 404),
        ("GET", "/scripts/../../settings.json", 400),
        ("TRACE", "/", 405),
    ],
)
def test_every_refusal_is_json_that_says_what_to_do(gateway_once: Site, method: str, path: str, status: int) -> None:
    before = len(reached(gateway_once))
    answer = gateway_once.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    assert json.loads(body)["code"] == status
    allowed = b"POST, PUT" if path.startswith("/predictions") else b"GET, HEAD"
    assert (b"\r\nAllow: " + allowed + b"\r\n" in head + b"\r\n") == (status == 405)
    assert len(reached(gateway_once)) == before


def reached(site: Site) -> list[str]:
    """Return the requests that reached the server, without golden pictures."""
    return [path for path in site.backends[0].seen if path != "/predictions/fake"]


@pytest.mark.parametrize("path", ["/", "/ping", "/nothing", "/predictions/fake"])
def test_every_answer_has_the_security_headers(gateway_once: Site, path: str) -> None:
    headers = requests.get(f"{gateway_once.url}{path}", timeout=30).headers
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "camera=(self)" in headers["Permissions-Policy"]
    assert "nginx/" not in headers["Server"]


def test_the_servers_own_errors_pass(gateway_once: Site) -> None:
    # A server that loses a worker says 500 or 507; no handler has written these.
    for status, after in ((400, None), (413, None), (415, None), (422, None), (500, "2"), (503, "2"), (507, "1")):
        answer = gateway_once.predict(f"status {status}")
        assert (answer.status_code, answer.json()["type"]) == (status, "FromTheServer")
        assert answer.headers.get("Retry-After") == after


def test_too_large_is_refused_with_and_without_a_length(gateway_once: Site) -> None:
    for data in (bytes(100_001), iter([bytes(50_000)] * 3)):
        answer = gateway_once.predict(data, model="large")
        assert (answer.status_code, answer.json()["type"]) == (413, "TooManyBytes")
        assert "70000 bytes" in answer.json()["message"]
    assert gateway_once.count("/predictions/large") == 0


START = "POST /predictions/fake HTTP/1.1\r\nHost: x\r\n"
END = "\r\n\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "request_text",
    [
        # Two lengths, two codings, a length and a coding: where servers disagree on where a request ends.
        f"{START}Content-Length: 4\r\nTransfer-Encoding: chunked{END}",
        f"{START}Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        f"{START}Transfer-Encoding: xchunked{END}",
        f"{START}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity{END}",
        f"{START}Transfer-Encoding : chunked{END}",
        f"{START}Content-Length: +4\r\n\r\nabcd",
        f"{START}Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n0\r\n\r\n",
        "no http at all\r\n\r\n",
    ],
)
def test_a_smuggled_request_is_refused_and_reaches_nobody(gateway_once: Site, request_text: str) -> None:
    hidden = "POST /models/hidden HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    answer = gateway_once.raw((request_text + hidden).encode())
    assert answer.split()[1] in (b"400", b"501"), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] in (400, 501)
    assert gateway_once.predict().json() == {"red": 0.9, "other": 0.1}
    assert "/models/hidden" not in gateway_once.backends[0].seen


def test_a_client_that_expects_100_continue_gets_it(gateway_once: Site) -> None:
    start = f"{START}Connection: close\r\nExpect: 100-continue\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", gateway_once.port), timeout=5) as connection:
        connection.sendall(f"{start}4\r\n\r\n".encode())
        assert connection.recv(99).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"body")
        assert connection.recv(999).startswith(b"HTTP/1.1 200 ")
    assert gateway_once.raw(f"{start}999999\r\n\r\n".encode()).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_cut_does_not_reach_the_server(gateway_once: Site) -> None:
    with socket.create_connection(("127.0.0.1", gateway_once.port), timeout=5) as connection:
        connection.sendall(b"POST /predictions/cut HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf of it")
    assert gateway_once.predict().status_code == 200
    assert gateway_once.count("/predictions/cut") == 0


def test_the_server_gets_no_more_than_it_holds_and_a_client_that_disconnects_keeps_its_place(gateway: Gateway) -> None:
    """The server's queue does not know that a client is gone: otherwise it would overflow."""
    site = gateway(in_flight=3, deadline=60)
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as connection:
        connection.sendall(b"POST /predictions/held HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nhold")
        wait_for(lambda: site.count("/predictions/held") == 1)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        held = [pool.submit(site.predict, "hold", "held") for _ in range(2)]
        wait_for(lambda: site.count("/predictions/held") == 3)
        for _ in range(8):
            refused = site.predict(model="held")
            assert (refused.status_code, refused.json()["type"]) == (429, "TooManyRequests")
            assert refused.headers["Retry-After"] == "1"
        assert site.count("/predictions/held") == 3
        site.release()
        assert [each.result().status_code for each in held] == [200] * 2
    wait_for(lambda: site.predict().status_code == 200)
    assert site.ping()[0] == 200


@pytest.mark.parametrize("name", ["state/open", "state/ready", "state", "temporary/bodies", "temporary"])
def test_what_is_removed_of_its_folder_is_made_again(gateway_once: Site, name: str) -> None:
    """A system's cleaner of /tmp takes empty files and folders that nobody has changed for days."""
    path = gateway_once.settings.folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_for(path.exists)
    wait_for(lambda: gateway_once.ping()[0] == 200)
    # So large that nginx writes it to a file first.
    large = requests.post(f"{gateway_once.url}/predictions/fake", data=iter([bytes(50_000)] * 2), timeout=30)
    assert large.status_code == 200


def test_a_clients_own_deadline_passes(gateway_once: Site) -> None:
    headers = {"X-Deadline-Ms": "250"}
    seen = requests.put(f"{gateway_once.url}/predictions/fake", data=b"echo", headers=headers, timeout=30).json()
    assert seen["headers"]["X-Deadline-Ms"] == "250"


def test_each_class_of_size_has_places_of_its_own_and_an_unknown_length_is_of_the_largest(gateway: Gateway) -> None:
    site = gateway(in_flight=3, places={0: 1}, deadline=60)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        url = f"{site.url}/predictions/held"
        held = pool.submit(requests.post, url, data=iter([b"hold"]), timeout=60)
        wait_for(lambda: site.count("/predictions/held") == 1)
        refused = requests.post(url, data=iter([b"echo"]), timeout=30)
        assert (refused.status_code, refused.json()["type"]) == (429, "TooManyRequests")
        assert refused.headers["Retry-After"] == "1"
        assert site.predict().status_code == 200
        site.release()
        assert held.result().status_code == 200


@pytest.mark.parametrize(("header", "status"), [({"If-Match": '"x"'}, 412), ({"Range": "bytes=999999-"}, 416)])
def test_conditions_that_fail_are_answered_in_json(gateway_once: Site, header: dict[str, str], status: int) -> None:
    answer = requests.get(f"{gateway_once.url}/index.html", headers=header, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (status, status)


def test_ping_knows_no_conditions(gateway_once: Site) -> None:
    first = requests.get(f"{gateway_once.url}/ping", timeout=30)
    assert "ETag" not in first.headers
    since = "Fri, 01 Jan 2038 00:00:00 GMT"
    for header in ({"Range": "bytes=0-3"}, {"If-Modified-Since": since}, {"If-None-Match": '"x"'}):
        again = requests.get(f"{gateway_once.url}/ping", headers=header, timeout=30)
        assert (again.status_code, again.text) == (200, first.text), header


def test_one_address_has_a_rate(gateway: Gateway) -> None:
    """At once, so that no request is earned meanwhile; the first pass as long as the server holds them."""
    site = gateway(per_second=1, in_flight=10, deadline=60)
    statuses = [answer.status_code for answer in post_together(f"{site.url}/predictions/fake", [b"x"] * 60)]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 10


def test_a_deadline_ends_in_504(gateway: Gateway) -> None:
    site = gateway(deadline=4)
    answer = site.predict("hold")
    assert (answer.status_code, answer.json()["type"]) == (504, "DeadlineExceeded")
    assert "no answer within 4 seconds" in answer.json()["message"]
    site.release()
    assert site.predict().status_code == 200


def test_a_broken_connection_is_tried_elsewhere_within_the_deadline_and_an_answer_never(gateway: Gateway) -> None:
    site = gateway(backends=2, deadline=5)
    site.wait_until_members(2)
    answer = site.predict("hang up", "broken")
    assert (answer.status_code, answer.json()["type"]) == (502, "BadGateway")
    assert all("/predictions/broken" in each.seen for each in site.backends)
    # A broken connection takes no backend out of the group.
    for _ in range(3):
        assert site.predict("hang up").status_code == 502
        assert site.predict().status_code == 200
    # The first server breaks off late. The deadline would be over twice if each try had all of it.
    began = time.monotonic()
    assert site.predict("late hang up").status_code in (502, 504)
    assert time.monotonic() - began < 10
    assert site.predict("status 500", "once").status_code == 500
    assert site.count("/predictions/once") == 1


def test_a_second_try_that_finds_every_place_taken_is_429(gateway: Gateway) -> None:
    site = gateway(backends=2, in_flight=1, deadline=60)
    site.wait_until_members(2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        held = pool.submit(site.predict, "hold", "held")
        wait_for(lambda: site.count("/predictions/held"))
        answer = site.predict("hang up")
        assert (answer.status_code, answer.json()["type"]) == (429, "TooManyRequests")
        assert answer.headers["Retry-After"] == "1"
        site.release()
        assert held.result().status_code == 200


def test_the_access_log_is_json_with_the_timings_whatever_bytes_come(gateway: Gateway) -> None:
    site = gateway()
    site.predict(model="fake?q=%22%7D", headers={"User-Agent": 'quo"te\\'})
    head = b"Host: x\r\nConnection: close\r\nContent-Length: 1\r\nUser-Agent: \xff\xc3(\r\n\r\nx"
    assert site.raw(b"POST /predictions/fake HTTP/1.1\r\n" + head).split()[1] == b"200"
    assert site.raw(b"POST /predictions/fake?\xe4\xff HTTP/1.1\r\n" + head).split()[1] in (b"200", b"400")
    assert site.raw(b"\x16\x03\x01\xff\xe4\r\n\r\n").split()[1] == b"400"
    lines = site.log(2)
    line = next(line for line in lines if line["request"].startswith("POST"))
    assert line["request"] == "POST /predictions/fake?q=%22%7D HTTP/1.1"
    assert (line["status"], line["batch_size"], line["agent"]) == (200, "1", 'quo"te\\')
    assert line["timing"] == "decode;dur=1.00, forward;dur=2.00, encode;dur=0.10"
    assert line["seconds"] >= 0
    assert line["backend"] == site.backends[0].backend.inference.removeprefix("http://")
    assert {line["from"] for line in lines if "/predictions/" in line["request"] and line["status"] == 200} == {
        "server"
    }


def test_logs_are_rotated_and_go_on(gateway: Gateway) -> None:
    site = gateway(log_megabytes=0, log_files=2)
    oldest = site.settings.logs / "access.log.2"

    def another(than: int) -> int:
        """Return the number of the oldest file, if it is not that one."""
        site.predict()
        number = oldest.stat().st_ino if oldest.is_file() else than
        return 0 if number == than else number

    first = wait_for(lambda: another(0))
    # The oldest is removed, and not renamed to a third.
    wait_for(lambda: another(first))
    assert not (site.settings.logs / "access.log.3").exists()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/scripts/page.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ],
)
def test_files_have_their_types_and_head_has_no_body(gateway_once: Site, path: str, kind: str) -> None:
    for method in ("GET", "HEAD"):
        answer = requests.request(method, f"{gateway_once.url}{path}", timeout=30)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, kind)
        assert bool(answer.content) == (method == "GET")


def managed(site: Site) -> list[tuple[str, str, str]]:
    """Return what reached the server's own management, without the prober's questions."""
    return [each for each in site.backends[0].managed if each[:2] != ("GET", "/models/fake")]


def test_management_is_to_look_and_to_scale(gateway: Gateway) -> None:
    site = gateway()
    (model,) = requests.get(f"{site.settings.management}/models/fake?a=%2F", timeout=30).json()
    assert model["modelName"] == "fake"
    scaled = requests.put(f"{site.settings.management}/models/fake?min_worker=2", data="x", timeout=30)
    assert (scaled.status_code, scaled.headers["X-Content-Type-Options"]) == (202, "nosniff")
    assert managed(site) == [
        ("GET", "/models/fake?a=%2F", "localhost"),
        ("PUT", "/models/fake?min_worker=2", "localhost"),
    ]
    head = b"PUT /models/fake HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert site.settings.management is not None
    answer = site.raw(head + b"7d0\r\n" + bytes(2000) + b"\r\n0\r\n\r\n", port=site.settings.management.port)
    assert answer.split()[1] == b"413"
    site.backends[0].stop()
    assert requests.get(f"{site.settings.management}/models", timeout=30).json()["type"] == "BadGateway"


def test_a_change_needs_the_token_and_is_audited_and_no_rotation_loses_the_audit(gateway: Gateway) -> None:
    token = "secret-secret-secret"
    site = gateway(management_token=token, log_megabytes=0, log_files=1)
    url = f"{site.settings.management}/models/fake"
    assert requests.get(url, timeout=30).status_code == 200
    for number, (header, status) in enumerate(
        {"": 401, f"Bearer {token.upper()}": 401, f"Bearer {token}": 202}.items()
    ):
        answer = requests.put(url, params={"min_worker": number}, headers={"Authorization": header}, timeout=30)
        assert (answer.status_code, answer.headers["Content-Type"][:16]) == (status, "application/json")
    assert managed(site) == [("PUT", "/models/fake?min_worker=2", "localhost")]

    def log() -> list[int]:
        # For a moment there is none.
        return [each.inode() for each in os.scandir(site.settings.logs) if each.name == "access.log"]

    before = log()
    wait_for(lambda: site.predict() and log() != before)
    lines = [json.loads(line) for line in (site.settings.logs.parent / "audit.log").read_text().splitlines()]
    assert [(line["who"], line["from"], line["what"], line["result"]) for line in lines] == [
        ("", "127.0.0.1", "PUT /models/fake?min_worker=0 HTTP/1.1", "401"),
        ("", "127.0.0.1", "PUT /models/fake?min_worker=1 HTTP/1.1", "401"),
        ("token", "127.0.0.1", "PUT /models/fake?min_worker=2 HTTP/1.1", "202"),
    ]
    for path in (site.settings.folder / "settings.json", site.settings.folder / "settings" / "zones.conf"):
        assert token in path.read_text()
        assert path.stat().st_mode & 0o077 == 0


def test_refused_changes_do_not_fill_the_audit(gateway: Gateway) -> None:
    site = gateway(management_token="secret-secret-secret")
    url = f"{site.settings.management}/models/fake"
    with requests.Session() as client:
        answers = [client.put(url, params={"min_worker": number}, timeout=30) for number in range(150)]
        assert client.put(url, params={"long": "x" * 1100}, timeout=30).status_code in (414, 429)
    assert {each.status_code for each in answers} == {401, 429}
    assert answers[-1].json()["type"] == "TooManyRequests"
    assert requests.get(url, timeout=30).status_code == 200
    file = site.settings.logs.parent / "audit.log"
    written = [json.loads(line)["result"] for line in file.read_text().splitlines()]
    assert written == ["401"] * sum(each.status_code == 401 for each in answers)


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
        ("POST", "/predictions/fake", {}, 404),
        ("PUT", "/models/fake", {"Content-Length": "2000"}, 413),
    ],
)
def test_management_takes_nothing_else_and_nothing_from_web_pages(
    gateway_once: Site, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    at = gateway_once.settings.management
    assert at is not None
    lines = {"Host": f"127.0.0.1:{at.port}", "Connection": "close", **headers}
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    answer = gateway_once.raw(text.encode(), port=at.port)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    assert json.loads(body)["code"] == status
    assert (re.search(rb"\r\nAllow: ", head) is not None) == (status == 405)
    assert managed(gateway_once) == []
