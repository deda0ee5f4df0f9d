"""Describing and predicting: what each server answers becomes the same values."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from beeline.errors import Undetermined
from serve.client import InferenceClient, ManagementClient, Worker, parse_describe

TORCHSERVE = [
    {
        "modelName": "fake",
        "modelVersion": "1.0",
        "minWorkers": 2,
        "maxWorkers": 3,
        "batchSize": 8,
        "maxBatchDelay": 20,
        "workers": [
            {"id": "9000", "status": "READY", "pid": 9196},
            {"id": "9001", "status": "UNLOADING", "pid": -1},
        ],
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
    (model,) = parse_describe(TORCHSERVE)
    assert model.workers == (Worker("9000", "READY", 9196), Worker("9001", "UNLOADING", None))
    assert (model.ready, model.min_workers, model.max_workers, model.batch_size) == (1, 2, 3, 8)


def test_mms_describes_with_an_object() -> None:
    (model,) = parse_describe(MMS)
    assert model.workers == (Worker("9000-be6f411b", "READY", None),)
    assert (model.max_batch_delay, model.version) == (20, "1.0")


@pytest.mark.parametrize("values", [None, [], {}, [{"modelName": "x"}], "text", [{**MMS, "workers": [{}]}]])
def test_another_form_is_undetermined(values: object) -> None:
    if values == []:
        assert parse_describe(values) == []
        return
    with pytest.raises(Undetermined, match="in a form not known here"):
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
        with (
            InferenceClient(url, timeout=0.1) as client,
            pytest.raises(Undetermined, match="did not answer within"),
        ):
            client.predict("fake", b"")
