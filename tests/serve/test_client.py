"""Describing and predicting: what each server answers becomes the same values."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest

from beeline.errors import Undetermined
from serve.client import InferenceClient, ManagementClient, WorkerStatus, parse_describe

TORCHSERVE = [
    {
        "modelName": "fake",
        "modelVersion": "1.0",
        "minWorkers": 2,
        "maxWorkers": 3,
        "batchSize": 8,
        "maxBatchDelay": 20,
        "workers": [{"id": "9000", "status": "READY", "pid": 9196}, {"id": "9001", "status": "UNLOADING", "pid": -1}],
    }
]
MMS = {
    "modelName": "fake",
    "modelVersion": "1.0",
    "minWorkers": 2,
    "maxWorkers": 3,
    "batchSize": 8,
    "maxBatchDelay": 20,
    "workers": [{"id": "9000-be6f411b", "status": "READY", "gpu": False, "memoryUsage": 0}],
}


class Echo(BaseHTTPRequestHandler):
    """Answers a prediction with its path and body, 415 to `bad`, and DESCRIBE with what is no JSON."""

    protocol_version = "HTTP/1.1"
    connections: set[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).connections.add(self.client_address[1])
        self.answer(415 if body == b"bad" else 200, f"{self.path} {body.decode()}".encode())

    def do_GET(self) -> None:
        self.answer(200, b"<html>")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Batch-Size", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    Echo.connections = set()
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_torchserve_describes_with_a_list() -> None:
    model = parse_describe(TORCHSERVE)
    assert model.workers == (WorkerStatus("9000", "READY", 9196), WorkerStatus("9001", "UNLOADING", None))
    assert (model.ready, model.min_workers, model.max_workers, model.batch_size) == (1, 2, 3, 8)


def test_mms_describes_with_an_object() -> None:
    model = parse_describe(MMS)
    assert model.workers == (WorkerStatus("9000-be6f411b", "READY", None),)
    assert (model.max_batch_delay, model.version) == (20, "1.0")


@pytest.mark.parametrize("values", [None, [], {}, [{"modelName": "x"}], "text", [{**MMS, "workers": [{}]}]])
def test_another_form_is_undetermined(values: object) -> None:
    with pytest.raises(Undetermined, match="in an unknown form"):
        parse_describe(values)


def test_any_status_is_an_answer_and_the_connection_is_kept(url: str) -> None:
    with InferenceClient(url) as client:
        good, bad = client.predict("fake", b"picture"), client.predict("fake", b"bad", "1.0")
    assert (good.status, good.body, good.headers["X-Batch-Size"]) == (200, "/predictions/fake picture", "1")
    assert (bad.status, bad.body) == (415, "/predictions/fake/1.0 bad")
    assert len(Echo.connections) == 1


def test_what_is_no_management_api_is_undetermined(url: str) -> None:
    with ManagementClient(url) as client, pytest.raises(Undetermined, match="is that a management address"):
        client.list()


def test_nothing_there_is_undetermined() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with InferenceClient(f"http://127.0.0.1:{port}") as client, pytest.raises(Undetermined, match="nothing answers at"):
        client.predict("fake", b"")


def test_silence_is_undetermined() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with InferenceClient(url, timeout=0.1) as client, pytest.raises(Undetermined, match="did not answer within"):
            client.predict("fake", b"")


class Broken(BaseHTTPRequestHandler):
    """Reads the first line of every request and hangs up."""

    protocol_version = "HTTP/1.1"
    raw_requestline: bytes
    seen: ClassVar[list[str]] = []

    def parse_request(self) -> bool:
        self.seen.append(self.raw_requestline.decode().split()[0])
        return False


def test_only_what_changes_nothing_is_asked_for_twice() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with ManagementClient(url) as management, InferenceClient(url) as inference:
                for ask, method, times in (
                    (lambda: management.scale("fake", 1, 1), "PUT", 1),
                    (lambda: management.register({"url": "fake.mar"}, timeout=5), "POST", 1),
                    (lambda: management.unregister("fake", timeout=5), "DELETE", 1),
                    (lambda: management.describe("fake"), "GET", 2),
                    (lambda: inference.predict("fake", b"x"), "POST", 2),
                ):
                    Broken.seen.clear()
                    with pytest.raises(Undetermined, match="nothing answers"):
                        ask()
                    assert Broken.seen == [method] * times
        finally:
            server.shutdown()
            thread.join()


class Busy(BaseHTTPRequestHandler):
    """Answers predictions with `script`, a list of (status, Retry-After), its last entry for ever; and a catalog."""

    protocol_version = "HTTP/1.1"
    script: list[tuple[int, str | None]]
    times: list[float]
    catalog: tuple[int, bytes]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.times.append(time.monotonic())
        status, after = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.answer(status, json.dumps({"code": status}).encode(), after)

    def do_GET(self) -> None:
        self.answer(*self.catalog if self.path == "/catalog.json" else (404, b""))

    def answer(self, status: int, body: bytes, after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if after is not None:
            self.send_header("Retry-After", after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


@pytest.fixture
def busy() -> Iterator[tuple[str, type[Busy]]]:
    handler = type("Bound", (Busy,), {"script": [(200, None)], "times": [], "catalog": (404, b"")})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()
        thread.join()


def test_it_waits_as_it_is_told_and_asks_again(busy: tuple[str, type[Busy]]) -> None:
    url, server = busy
    server.script = [(503, "1"), (429, "0"), (200, None)]
    with InferenceClient(url) as client:
        assert client.predict("fake", b"picture").status == 200
    first, second, third = server.times
    assert 1.0 <= second - first <= 3.0
    assert third - second <= 2.0


def test_a_429_that_says_nothing_is_waited_for_too(
    busy: tuple[str, type[Busy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.client._PAUSE", 0.05)
    url, server = busy
    for after in (None, "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1"):
        server.script = [(429, after), (200, None)]
        with InferenceClient(url) as client:
            assert client.predict("fake", b"picture").status == 200


def test_whatever_is_told_no_pause_is_longer_than_the_longest(
    busy: tuple[str, type[Busy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.client._LONGEST_PAUSE", 0.05)
    url, server = busy
    server.script = [(429, "86400"), (200, None)]
    with InferenceClient(url) as client:
        assert client.predict("fake", b"picture").status == 200


@pytest.mark.parametrize(("status", "after"), [(503, None), (502, "1"), (500, "1"), (413, None), (200, "1")])
def test_any_other_answer_is_the_answer(busy: tuple[str, type[Busy]], status: int, after: str | None) -> None:
    url, server = busy
    server.script = [(status, after)]
    with InferenceClient(url) as client:
        assert client.predict("fake", b"picture").status == status
    assert len(server.times) == 1


def test_patience_ends_with_the_last_answer_and_is_not_begun_anew_for_each_picture(
    busy: tuple[str, type[Busy]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.client._PAUSE", 0.1)
    url, server = busy
    server.script = [(503, "0")]
    with InferenceClient(url, patience=0.5) as client:
        begun = time.monotonic()
        answer = client.predict("fake", b"picture")
        assert (answer.status, answer.json(), answer.headers["Retry-After"]) == (503, {"code": 503}, "0")
        assert time.monotonic() - begun < 5
        assert len(server.times) > 2
        asked = len(server.times)
        for _ in range(5):
            # Its patience is used up: at most what was left of it is waited.
            assert client.predict("fake", b"picture").status == 503
        assert len(server.times) <= asked + 5 + 20
        server.script = [(200, None), (503, "0"), (200, None)]
        assert [client.predict("fake", b"picture").status for _ in range(2)] == [200, 200]


def test_without_patience_nothing_is_waited_for(busy: tuple[str, type[Busy]]) -> None:
    url, server = busy
    server.script = [(429, "0"), (200, None)]
    with InferenceClient(url, patience=0) as client:
        assert client.predict("fake", b"picture").status == 429
    assert len(server.times) == 1


@pytest.mark.parametrize(
    ("catalog", "names"),
    [
        ((200, b'{"models": [{"name": "b"}, {"name": "a", "version": "1"}, {"name": "a"}]}'), ["a", "b"]),
        ((200, b'{"models": []}'), []),
        ((404, b'{"code": 404}'), None),
        ((200, b"<html>"), None),
        ((200, b"[]"), None),
        ((200, b'{"models": 3}'), None),
    ],
)
def test_the_served_models_are_the_catalogs(
    busy: tuple[str, type[Busy]], catalog: tuple[int, bytes], names: list[str] | None
) -> None:
    url, server = busy
    server.catalog = catalog
    with InferenceClient(url) as client:
        assert client.served() == names
