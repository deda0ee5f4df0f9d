"""What real nginx lets through, refuses, limits and repeats, with the project's configuration."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import socket
import time

import pytest
import requests

from tests.serve.gateway.conftest import Gateway, Site, at_once, both, wait_for

pytestmark = [pytest.mark.server, both]


def reached(site: Site, path: str, times: int) -> bool:
    return site.backends[0].seen.count(path) == times


def test_only_what_a_prediction_needs_travels_further(gateway: Gateway) -> None:
    site = gateway()
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
    answer = requests.put(f"{site.url}/predictions/fake/1.0?describe=True", data=b"echo", headers=sent, timeout=30)
    seen = answer.json()
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
    answer = gateway_once.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    assert json.loads(body)["code"] == status
    allowed = b"POST, PUT" if path.startswith("/predictions") else b"GET, HEAD"
    assert (b"\r\nAllow: " + allowed + b"\r\n" in head + b"\r\n") == (status == 405)
    assert not {seen for seen in gateway_once.backends[0].seen if seen != "/predictions/fake"}


@pytest.mark.parametrize("path", ["/", "/ping", "/nothing", "/predictions/fake"])
def test_every_answer_has_the_security_headers(gateway_once: Site, path: str) -> None:
    headers = requests.get(f"{gateway_once.url}{path}", timeout=30).headers
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "camera=(self)" in headers["Permissions-Policy"]
    assert "nginx/" not in headers["Server"]


def test_the_servers_own_words_pass(gateway_once: Site) -> None:
    for status in (413, 415, 422, 500, 503):
        answer = gateway_once.predict(f"status {status}")
        assert (answer.status_code, answer.json()["type"]) == (status, "FromTheServer")
        assert ("Retry-After" in answer.headers) == (status == 503)


def test_too_large_is_refused_with_and_without_a_length(gateway_once: Site) -> None:
    seen = len(gateway_once.backends[0].seen)
    for data in (bytes(100_001), iter([bytes(50_000)] * 3)):
        answer = gateway_once.predict(data)
        assert (answer.status_code, answer.json()["type"]) == (413, "TooManyBytes")
        assert "70000 bytes" in answer.json()["message"]
    assert len(gateway_once.backends[0].seen) == seen


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
    before = len(gateway_once.backends[0].seen)
    answer = gateway_once.raw((request_text + hidden).encode())
    assert answer.split()[1] in (b"400", b"501"), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] in (400, 501)
    assert gateway_once.predict().json() == {"red": 0.9, "other": 0.1}
    since = gateway_once.backends[0].seen[before:]
    assert set(since) == {"/predictions/fake"}


def test_a_client_that_asks_first_is_told_to_go_on(gateway_once: Site) -> None:
    start = f"{START}Connection: close\r\nExpect: 100-continue\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", gateway_once.port), timeout=5) as connection:
        connection.sendall(f"{start}4\r\n\r\n".encode())
        assert connection.recv(99).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"body")
        assert connection.recv(999).startswith(b"HTTP/1.1 200 ")
    assert gateway_once.raw(f"{start}999999\r\n\r\n".encode()).startswith(b"HTTP/1.1 413 ")


def test_a_body_goes_on_only_when_it_is_complete(gateway_once: Site) -> None:
    """Cut in the middle: the server behind never hears of it."""
    seen = gateway_once.backends[0].seen.count("/predictions/cut")
    with socket.create_connection(("127.0.0.1", gateway_once.port), timeout=5) as connection:
        connection.sendall(b"POST /predictions/cut HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf of it")
    assert gateway_once.predict().status_code == 200
    assert gateway_once.backends[0].seen.count("/predictions/cut") == seen


def test_the_server_gets_no_more_than_it_holds(gateway: Gateway) -> None:
    site = gateway(in_flight=4, deadline=60)
    url = f"{site.url}/predictions/held"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        held = [pool.submit(requests.post, url, data="hold", timeout=60) for _ in range(4)]
        wait_for(functools.partial(reached, site, "/predictions/held", 4))
        for _ in range(8):
            refused = requests.post(url, data="x", timeout=30)
            assert (refused.status_code, refused.json()["type"]) == (429, "TooManyRequests")
            assert refused.headers["Retry-After"] == "1"
        assert reached(site, "/predictions/held", 4)
        site.release()
        assert [each.result().status_code for each in held] == [200] * 4
    assert site.predict().status_code == 200


def test_whoever_hangs_up_keeps_his_place_until_the_server_has_answered(gateway: Gateway) -> None:
    """The server's queue does not know that nobody waits any more: otherwise it would overflow."""
    site = gateway(in_flight=2, deadline=60)
    for number in (1, 2):
        with socket.create_connection(("127.0.0.1", site.port), timeout=5) as connection:
            connection.sendall(b"POST /predictions/gone HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nhold")
            wait_for(functools.partial(reached, site, "/predictions/gone", number))
    assert site.predict().status_code == 429
    site.release()
    wait_for(lambda: site.predict().status_code == 200)
    assert requests.get(f"{site.url}/ping", timeout=5).status_code == 200


@pytest.mark.parametrize(
    "said",
    [" application/x-www-form-urlencoded", " multipart/form-data; boundary=b", "\tmultipart/form-data; boundary=b"],
)
def test_no_body_is_a_form_to_the_servers(gateway: Gateway, said: str) -> None:
    """So curl --data-binary calls it one, to which both servers answer 500; and nginx leaves a tab where it was."""
    site = gateway()
    head = (
        f"POST /predictions/fake HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\nContent-Type:{said}"
    )
    answer = site.raw(head.encode() + b"\r\n\r\necho")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["headers"]["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [("/index.html", {"If-Match": '"x"'}, 412), ("/index.html", {"Range": "bytes=999999-"}, 416)],
)
def test_conditions_that_fail_are_answered_in_json(
    gateway_once: Site, path: str, header: dict[str, str], status: int
) -> None:
    answer = requests.get(f"{gateway_once.url}{path}", headers=header, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (status, status)


def test_ping_knows_no_conditions(gateway_once: Site) -> None:
    first = requests.get(f"{gateway_once.url}/ping", timeout=30)
    assert "ETag" not in first.headers
    for header in (
        {"Range": "bytes=0-3"},
        {"If-Modified-Since": "Fri, 01 Jan 2038 00:00:00 GMT"},
        {"If-None-Match": '"x"'},
    ):
        again = requests.get(f"{gateway_once.url}/ping", headers=header, timeout=30)
        assert (again.status_code, again.text) == (200, first.text), header


def test_one_address_has_a_rate(gateway: Gateway) -> None:
    """At once, so that none is earned meanwhile; the first few are let through as long as the servers hold them."""
    site = gateway(per_second=1, in_flight=10, deadline=60)
    codes = [answer.status_code for answer in at_once([site.predict] * 60)]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 10


def test_a_deadline_ends_in_504(gateway: Gateway) -> None:
    site = gateway(deadline=4)
    answer = site.predict("hold")
    assert (answer.status_code, answer.json()["type"]) == (504, "DeadlineExceeded")
    assert "no answer within 4 seconds" in answer.json()["message"]
    site.release()
    assert site.predict().status_code == 200


def test_a_broken_connection_is_tried_elsewhere_and_then_502(gateway: Gateway) -> None:
    site = gateway(backends=2)
    site.wait_until_members(2)
    before = [each.seen.count("/predictions/other") for each in site.backends]
    answer = requests.post(f"{site.url}/predictions/other", data="hang up", timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (502, "BadGateway")
    # nginx tries a connection that it had kept open once more, as it may have been closed in that instant.
    assert [
        each.seen.count("/predictions/other") - was > 0 for each, was in zip(site.backends, before, strict=True)
    ] == [True, True]


def test_a_second_try_that_finds_every_place_taken_is_429(gateway: Gateway) -> None:
    site = gateway(backends=2, in_flight=1, deadline=60)
    site.wait_until_members(2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        held = pool.submit(requests.post, f"{site.url}/predictions/held", data="hold", timeout=60)
        wait_for(lambda: any("/predictions/held" in each.seen for each in site.backends))
        answer = site.predict("hang up")
        assert (answer.status_code, answer.json()["type"]) == (429, "TooManyRequests")
        assert answer.headers["Retry-After"] == "1"
        for each in site.backends:
            each.released.set()
        assert held.result().status_code == 200


def test_broken_connections_of_some_turn_nobody_else_away(gateway: Gateway) -> None:
    site = gateway(backends=2)
    site.wait_until_members(2)
    for _ in range(4):
        assert site.predict("hang up").status_code == 502
        assert site.predict().status_code == 200


def test_the_deadline_holds_over_a_second_try(gateway: Gateway) -> None:
    """The first server breaks off late: there is no time left for another."""
    site = gateway(backends=2, deadline=5)
    site.wait_until_members(2)
    began = time.monotonic()
    assert site.predict("late hang up").status_code in (502, 504)
    # A loose bound of twice the deadline, which it would have been if each try had all of it.
    assert time.monotonic() - began < 10


def test_an_answer_is_never_asked_for_twice(gateway: Gateway) -> None:
    site = gateway(backends=2)
    site.wait_until_members(2)
    answer = requests.post(f"{site.url}/predictions/other", data="status 500", timeout=30)
    assert answer.status_code == 500
    assert sum(each.seen.count("/predictions/other") for each in site.backends) == 1


def test_the_access_log_is_json_with_the_timings(gateway: Gateway) -> None:
    site = gateway()
    requests.post(
        f"{site.url}/predictions/fake?q=%22%7D", data="a picture", headers={"User-Agent": 'quo"te\\'}, timeout=30
    )
    line = next(line for line in site.log() if line["request"].startswith("POST"))
    assert line["request"] == "POST /predictions/fake?q=%22%7D HTTP/1.1"
    assert (line["status"], line["batch_size"], line["agent"]) == (200, "1", 'quo"te\\')
    assert line["timing"] == "decode;dur=1.00, forward;dur=2.00, encode;dur=0.10"
    assert line["seconds"] >= 0
    assert line["backend"] == site.backends[0].backend.inference.removeprefix("http://")


def test_the_access_log_is_json_whatever_bytes_come(gateway: Gateway) -> None:
    site = gateway()
    head = b"Host: x\r\nConnection: close\r\nContent-Length: 1\r\nUser-Agent: \xff\xc3(\r\n\r\nx"
    assert site.raw(b"POST /predictions/fake HTTP/1.1\r\n" + head).split()[1] == b"200"
    odd = site.raw(b"POST /predictions/fake?\xe4\xff HTTP/1.1\r\n" + head).split()[1]
    assert odd in (b"200", b"400")
    assert site.raw(b"\x16\x03\x01\xff\xe4\r\n\r\n").split()[1] == b"400"
    assert site.predict().status_code == 200
    lines = [line for line in site.log(2) if "/predictions/fake" in line["request"]]
    assert {line["from"] for line in lines if line["status"] == 200} == {"server"}


def test_logs_are_rotated_and_go_on(gateway: Gateway) -> None:
    site = gateway(log_megabytes=0, log_files=2)
    oldest = site.settings.logs / "access.log.2"

    def went_on(replaced: int) -> bool:
        """Whether the oldest file is there, and another one than that."""
        site.predict()
        return oldest.is_file() and oldest.stat().st_ino != replaced

    wait_for(lambda: went_on(0))
    first = oldest.stat().st_ino
    # A third old file would have come in its place.
    wait_for(lambda: went_on(first))
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
