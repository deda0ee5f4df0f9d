"""nginx's management listener before a stand-in: to look, and to scale one model; nothing of web pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import requests

from serve.ports import Address, settle
from tests.serve.gateway.conftest import MakeArchive, Site, both, start, stop

pytestmark = [pytest.mark.server, both]


@pytest.fixture(scope="module")
def managed(make_fake: MakeArchive, whose: str) -> Iterator[Site]:
    """A gateway whose `listen` is its management listener."""
    (at,) = settle([(Address("127.0.0.1", 0), "")])
    site = start(make_fake, whose=whose, management=at)
    yield site
    stop(site)


def asked(site: Site) -> list[tuple[str, str, str]]:
    """Return what a person asked of the server's own management; the prober's questions are none of these."""
    return [each for each in site.backends[0].managed if each[:2] != ("GET", "/models/fake")]


def test_it_is_to_look_and_to_scale(managed: Site) -> None:
    (model,) = requests.get(f"{managed.settings.management}/models/fake?a=%2F", timeout=30).json()
    assert model["modelName"] == "fake"
    scaled = requests.put(f"{managed.settings.management}/models/fake?min_worker=2", data="x", timeout=30)
    assert (scaled.status_code, scaled.headers["X-Content-Type-Options"]) == (202, "nosniff")
    assert asked(managed) == [
        ("GET", "/models/fake?a=%2F", "localhost"),
        ("PUT", "/models/fake?min_worker=2", "localhost"),
    ]
    managed.backends[0].managed.clear()


def test_a_body_without_a_length_is_refused_and_a_server_that_is_gone_is_502(
    make_fake: MakeArchive, whose: str
) -> None:
    (at,) = settle([(Address("127.0.0.1", 0), "")])
    site = start(make_fake, whose=whose, management=at)
    try:
        head = (
            b"PUT /models/fake HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        answer = site.raw(head + b"7d0\r\n" + bytes(2000) + b"\r\n0\r\n\r\n", port=at.port)
        assert answer.split()[1] == b"413"
        site.backends[0].stop()
        assert requests.get(f"{at}/models", timeout=30).json()["type"] == "BadGateway"
    finally:
        stop(site)


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
def test_it_takes_nothing_else_and_nothing_of_web_pages(
    managed: Site, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    at = managed.settings.management
    assert at is not None
    lines = {"Host": f"127.0.0.1:{at.port}", "Connection": "close", **headers}
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    answer = managed.raw(text.encode(), port=at.port)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer
    assert json.loads(body)["code"] == status
    assert (re.search(rb"\r\nAllow: ", head) is not None) == (status == 405)
    assert asked(managed) == []
