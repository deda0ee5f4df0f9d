"""Clients: both servers' answers become the same values, and a refused picture is sent again."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest

from beeline.errors import Undetermined
from serve.client import InferenceClient, ManagementClient, Model, WorkerStatus, parse_describe
from tests.conftest import Site

DESCRIBED: dict[str, Any] = {
    "modelName": "fake", "modelVersion": "1.0", "minWorkers": 2, "maxWorkers": 3, "batchSize": 8, "maxBatchDelay": 20
}  # fmt: skip
TORCHSERVE = [
    {"id": "9000", "status": "READY", "pid": 9196},
    {"id": "9001", "status": "UNLOADING", "pid": -1},
]  # fmt: skip
MMS = [{"id": "9000-be6f411b", "status": "READY", "gpu": False, "memoryUsage": 0}]


class Clock:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("serve.client.time", clock)
    return clock


def test_torchserve_describes_with_a_list_and_mms_with_an_object() -> None:
    model = parse_describe([{**DESCRIBED, "workers": TORCHSERVE}])
    workers = (WorkerStatus("9000", "READY", 9196), WorkerStatus("9001", "UNLOADING", None))
    assert model == Model("fake", "1.0", 2, 3, 8, 20, workers)
    assert model.ready == 1
    lone = (WorkerStatus("9000-be6f411b", "READY", None),)
    assert parse_describe({**DESCRIBED, "workers": MMS}) == Model("fake", "1.0", 2, 3, 8, 20, lone)


@pytest.mark.parametrize("values", [None, [], {}, [{"modelName": "x"}], "text", [{**DESCRIBED, "workers": [{}]}]])
def test_another_form_is_undetermined(values: object) -> None:
    with pytest.raises(Undetermined, match="in an unknown form"):
        parse_describe(values)


def test_any_status_is_an_answer_and_the_connection_is_kept(site: type[Site]) -> None:
    site.answers = [(200, b"good"), (415, b"bad")]
    with InferenceClient(site.url) as client:
        good, bad = client.predict("fake", b"picture"), client.predict("fake", b"hello", "1.0")
    assert (good.status, good.body, good.headers["Content-Length"]) == (200, "good", "4")
    assert (bad.status, bad.body) == (415, "bad")
    assert site.asked == ["/predictions/fake", "/predictions/fake/1.0"]
    assert len(site.ports) == 1


def test_an_address_without_a_management_api_is_undetermined(site: type[Site]) -> None:
    with ManagementClient(site.url) as client, pytest.raises(Undetermined, match="is that a management address"):
        client.list()


def test_nothing_and_silence_are_undetermined() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with InferenceClient(url, timeout=0.1) as client, pytest.raises(Undetermined, match="did not answer within"):
            client.predict("fake", b"")
    with InferenceClient(url) as client, pytest.raises(Undetermined, match="nothing answers at"):
        client.predict("fake", b"")


class Broken(BaseHTTPRequestHandler):
    """Reads the first line of every request and hangs up."""

    raw_requestline: bytes
    seen: ClassVar[list[str]] = []

    def parse_request(self) -> bool:
        self.seen.append(self.raw_requestline.decode().split()[0])
        return False


def test_only_a_request_that_changes_nothing_is_sent_twice() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with ManagementClient(url) as management, InferenceClient(url) as inference:
            for ask, methods in (
                (lambda: management.scale("fake", 1, 1), ["PUT"]),
                (lambda: management.register({"url": "fake.mar"}, timeout=5), ["POST"]),
                (lambda: management.unregister("fake", timeout=5), ["DELETE"]),
                (lambda: management.describe("fake"), ["GET", "GET"]),
                (lambda: inference.predict("fake", b"x"), ["POST", "POST"]),
            ):
                Broken.seen.clear()
                with pytest.raises(Undetermined, match="nothing answers"):
                    ask()
                assert Broken.seen == methods
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "after", "pause"),
    [
        (503, "2", 2),
        (429, "0", 0),
        # Without a number it is a second, and never more than ten.
        *((429, after, 1) for after in (None, "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1")),
        (429, "86400", 10),
    ],
)
def test_it_waits_as_long_as_the_answer_says(
    site: type[Site], clock: Clock, status: int, after: str | None, pause: float
) -> None:
    site.answers = [(status, b"{}", after), (200, b"{}")]
    with InferenceClient(site.url) as client:
        assert client.predict("fake", b"picture").status == 200
    # A random part keeps clients apart that were refused together.
    assert clock.pauses == [pytest.approx(pause, abs=max(pause, 1) / 2)]
    assert clock.pauses[0] >= pause


@pytest.mark.parametrize(("status", "after"), [(503, None), (502, "1"), (500, "1"), (413, None), (200, "1")])
def test_any_other_answer_is_the_answer(site: type[Site], clock: Clock, status: int, after: str | None) -> None:
    site.answers = [(status, b"{}", after)]
    with InferenceClient(site.url) as client:
        assert client.predict("fake", b"picture").status == status
    assert clock.pauses == []


def test_its_patience_lasts_over_several_pictures_until_one_is_taken(site: type[Site], clock: Clock) -> None:
    site.answers = [(503, b'{"code": 503}', "0")]
    with InferenceClient(site.url, patience=5) as client:
        answer = client.predict("fake", b"picture")
        assert (answer.status, answer.json(), answer.headers["Retry-After"]) == (503, {"code": 503}, "0")
        assert 4 < clock.monotonic() <= 5
        assert [client.predict("fake", b"picture").status for _ in range(5)] == [503] * 5
        assert clock.monotonic() <= 5
        site.asked.clear()
        site.answers = [(200, b"{}"), (503, b"{}", "0"), (200, b"{}")]
        assert [client.predict("fake", b"picture").status for _ in range(2)] == [200, 200]
    with InferenceClient(site.url, patience=0) as client:
        site.asked.clear()
        site.answers = [(429, b"{}", "0"), (200, b"{}")]
        assert client.predict("fake", b"picture").status == 429


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ((200, b'{"models": [{"name": "b"}, {"name": "a", "version": "1"}, {"name": "a"}]}'), ["a", "b"]),
        ((200, b'{"models": []}'), []),
        *((page, None) for page in ((404, b'{"code": 404}'), (200, b"<html>"), (200, b"[]"), (200, b'{"models": 3}'))),
    ],
)
def test_the_served_models_are_the_catalogs(site: type[Site], page: tuple[int, bytes], names: list[str] | None) -> None:
    site.page = page
    with InferenceClient(site.url) as client:
        assert client.served() == names
