"""The contract over HTTP: real TorchServe, Multi Model Server and LitServe, concurrent clients, batches of 8."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from archive.build import build
from serve.addresses import Ports
from serve.config import Overrides
from serve.instance.child import Running
from serve.up import Request, up
from tests.conftest import BLUE, GREEN, RED, post_as_one_batch, post_together, until_one_batch

pytestmark = pytest.mark.server

GOOD = {RED: "red", GREEN: "green", BLUE: "blue"}
BROKEN = {b"": 400, b"no picture": 415, RED[:40]: 422, b'{"data": "?"}': 400, b"\xff\xd8\xff\xe0": 422}
CASES = 40


@pytest.fixture(scope="module", params=["torchserve", "mms", "litserve", "triton"])
def running(
    colour_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Running]:
    """One worker, which waits long enough for 8 concurrent requests to be one batch, most times."""
    store, overrides = tmp_path_factory.mktemp("store"), Overrides(batch_size=8, workers=1, max_batch_delay=300)
    build(colour_model, store)
    name = f"http-{request.param}"
    asked = Request(request.param, store=store, name=name, overrides=overrides, ports=Ports(0), gateway="none")
    with up(asked, print) as server:
        yield server


@pytest.fixture
def url(running: Running) -> Iterator[str]:
    """The model's URL; the test must leave the server's Python workers as they were."""
    assert running.state.server_process is not None
    java = psutil.Process(running.state.server_process)
    before = {child.pid for child in java.children(recursive=True) if "python" in child.name()}
    yield f"{running.state.inference}/predictions/colours"
    assert {child.pid for child in java.children(recursive=True) if "python" in child.name()} == before


def test_every_client_gets_its_own_answer_whatever_its_neighbours_send(url: str) -> None:
    for data, label in GOOD.items():
        assert next(iter(requests.post(url, data=data, timeout=60).json())) == label
    choose = random.Random(20)
    for broken in choose.sample(list(itertools.product([False, True], repeat=8)), CASES):
        sent = [choose.choice(list((BROKEN if flag else GOOD).items())) for flag in broken]
        responses = post_as_one_batch(url, [data for data, _ in sent], [wanted for _, wanted in sent])
        assert all(r.json()["message"] for r in responses if r.status_code != 200)


def test_every_encoding_that_the_servers_read_themselves(url: str) -> None:
    text = base64.b64encode(GREEN).decode()
    ways: list[dict[str, Any]] = [
        {"method": "PUT", "data": GREEN},
        {"data": GREEN, "headers": {"Content-Type": "image/png"}},
        {"files": {"any name": ("x.png", GREEN, "image/png")}},
        {"json": {"instances": [{"b64": text}]}},
        {"data": json.dumps({"data": text})},
    ]

    def send() -> list[requests.Response]:
        with ThreadPoolExecutor(len(ways)) as pool:
            return list(
                pool.map(lambda way: requests.request(**{"method": "POST", "url": url, "timeout": 60, **way}), ways)
            )

    for response in until_one_batch(send):
        assert response.status_code == 200, response.text
        assert next(iter(response.json())) == "green"
        assert response.headers["Content-Type"] == "application/json"
        assert "forward;dur=" in response.headers["Server-Timing"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        # Multi Model Server parses these bodies before any handler sees them, and dies of them.
        (b"{no json", "application/json"),
        (b"\xff\xfe\xfa", "text/plain"),
        (b"\xff\xfe\xfa", "text/html; charset=x"),
    ],
)
def test_a_body_that_is_not_what_it_says_harms_no_neighbour(url: str, body: bytes, kind: str) -> None:
    def send() -> list[requests.Response]:
        with ThreadPoolExecutor(8) as pool:
            bad = pool.submit(requests.post, url, data=body, headers={"Content-Type": kind}, timeout=60)
            good = [pool.submit(requests.post, url, data=RED, timeout=60) for _ in range(7)]
            assert bad.result().status_code in (400, 415), bad.result().text
            assert [response.result().status_code for response in good] == [200] * 7
            return [each.result() for each in (bad, *good)]

    until_one_batch(send)


def test_batches_between_lone_requests_are_read_whole(url: str) -> None:
    """Multi Model Server's front end takes headers that arrive in two reads for a corrupt frame.

    It sizes its reads by the answers before: short ones, then long ones.
    """
    with requests.Session() as session:
        for _ in range(6):
            post_together(url, [RED] * 2)
            assert session.post(url, data=GREEN, timeout=60).status_code == 200
            for count in (8, 5, 8, 7):
                assert {response.status_code for response in post_together(url, [BLUE] * count)} == {200}


def test_headers_that_reach_for_the_neighbours_change_nothing(url: str) -> None:
    for response in post_together(url, [BLUE] * 8, {"describe": "True", "explain": "True"}):
        assert response.status_code == 200
        assert next(iter(response.json())) == "blue"


def exchange(url: str, head: str, body: bytes) -> bytes:
    """Send a request as it is written; `head` is its first line's end and its headers."""
    host, _, port = url.split("/")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"POST /predictions/colours {head}\r\n\r\n".encode("latin-1") + body)
        # TorchServe keeps the connection whatever the client asks for: read to the body's end.
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
    return answer


def test_a_header_outside_ascii_harms_no_worker(url: str) -> None:
    answer = exchange(url, f"HTTP/1.1\r\nHost: x\r\nContent-Length: {len(RED)}\r\nX-Name: \xfc\xff\x80", RED)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]


@pytest.mark.parametrize(
    ("head", "chunked"),
    [
        ("HTTP/1.0\r\nContent-Length: {size}", False),
        ("HTTP/1.1\r\nhost: x\r\ncontent-length: {size}", False),
        ("HTTP/1.1\r\nHOST: x\r\nCONTENT-LENGTH: {size}", False),
        ("HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\nExpect: 100-continue", False),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked", True),
    ],
)
def test_the_way_a_request_is_written_changes_no_answer(url: str, head: str, chunked: bool) -> None:
    for data, status, start in ((GREEN, b"200", b'{"green"'), (gzip.compress(GREEN), b"415", b'{"code": 415')):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data) if chunked else data
        answer = exchange(url, head.format(size=len(data)), body)
        assert b" %s " % status in answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n")[0], answer
        assert answer.rpartition(b"\r\n")[2].startswith(start), answer
