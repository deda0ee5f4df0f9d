"""nginx's management listener in front of a stand-in: to look and to scale one model, and nothing for web pages."""

from __future__ import annotations

import json
import re

import pytest
import requests

from tests.serve.gateway.conftest import Gateway, Site, both

pytestmark = [pytest.mark.server, both]


def managed(site: Site) -> list[tuple[str, str, str]]:
    """Return what reached the server's own management, without the prober's questions."""
    return [each for each in site.backends[0].managed if each[:2] != ("GET", "/models/fake")]


def test_it_is_to_look_and_to_scale(gateway: Gateway) -> None:
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
def test_it_takes_nothing_else_and_nothing_from_web_pages(
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
