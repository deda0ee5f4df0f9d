"""Which model a URL means, and answers of servers and proxies that are none of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner, Result

from beeline.errors import BeelineError, Undetermined
from cli.main import app
from tests.conftest import RED

HTML = b"<html>\n<h1>502 Bad Gateway</h1></html>"


class Site(BaseHTTPRequestHandler):
    """A stand-in for a gateway: answers /catalog.json with `catalog` and predictions with `answers`, in turn."""

    protocol_version = "HTTP/1.1"
    catalog: tuple[int, bytes]
    answers: list[tuple[int, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        self.reply(*self.catalog)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        self.reply(*self.answers[min(len(self.asked), len(self.answers)) - 1])

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


@pytest.fixture
def site() -> Iterator[tuple[str, type[Site]]]:
    answers = [(200, b'{"red": 0.9, "blue": 0.1}')]
    handler = type("Bound", (Site,), {"catalog": (404, b""), "answers": answers, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()
        thread.join()


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A folder with one folder a label, one picture in it."""
    (tmp_path / "data" / "red").mkdir(parents=True)
    (tmp_path / "data" / "red" / "red.png").write_bytes(RED)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own with an index of one model."""
    folder = tmp_path / "store"
    folder.mkdir()
    entry = {"sha256": "", "name": "local", "version": "1.0", "fingerprint": "", "bytes": 1}
    (folder / "index.json").write_text(json.dumps({"schema": 1, "archives": {"local.mar": entry}}))
    monkeypatch.setattr("cli.sources.STORE", folder)
    return folder


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def names(*models: str) -> tuple[int, bytes]:
    return 200, json.dumps({"models": [{"name": name} for name in models]}).encode()


def test_the_urls_own_catalog_names_the_model(site: tuple[str, type[Site]], red: Path) -> None:
    url, server = site
    server.catalog = names("resnet18", "resnet18")
    assert call("predict", "--url", url, red).exit_code == 0
    assert server.asked == ["/predictions/resnet18"]


def test_several_models_are_named_in_the_error(site: tuple[str, type[Site]], red: Path) -> None:
    url, server = site
    server.catalog = names("resnet18", "efficientnet_b0")
    error = call("evaluate", url, "--data", red).exception
    assert isinstance(error, BeelineError)
    assert str(error) == (f"the URL names no model, and {url} serves efficientnet_b0, resnet18; add --model NAME")
    assert call("predict", "--url", url, "--model", "resnet18", red).exit_code == 0
    assert call("predict", "--url", f"{url}/predictions/resnet18/1.0/", red).exit_code == 0
    assert server.asked == ["/predictions/resnet18", "/predictions/resnet18/1.0"]


@pytest.mark.parametrize("catalog", [(404, b'{"code": 404}'), (200, HTML)])
def test_without_a_catalog_the_local_index_does(
    site: tuple[str, type[Site]], red: Path, catalog: tuple[int, bytes]
) -> None:
    url, server = site
    server.catalog = catalog
    assert call("predict", "--url", url, red).exit_code == 0
    assert server.asked == ["/predictions/local"]


def test_with_neither_the_error_says_so(site: tuple[str, type[Site]], red: Path, store: Path) -> None:
    (store / "index.json").unlink()
    error = call("predict", "--url", site[0], red).exception
    assert f"{site[0]} has no catalog and model_store lists none; add --model NAME" in str(error)


def test_an_error_page_of_a_proxy_is_the_pictures_error(site: tuple[str, type[Site]], red: Path) -> None:
    url, server = site
    server.answers = [(502, HTML)]
    done = call("predict", "--url", f"{url}/predictions/x", red, "--json")
    assert done.exit_code == 1
    row = json.loads(done.stdout.splitlines()[-1])["pictures"][0]
    assert row["error"] == {
        "code": 502,
        "type": "NoJson",
        "message": "the answer is no JSON object: '<html> <h1>502 Bad Gateway</h1></html>'",
    }
    shown = call("predict", "--url", f"{url}/predictions/x", red)
    assert "502 NoJson: the answer is no JSON object" in shown.stdout


@pytest.mark.parametrize("body", [HTML, b"[]", b'"red"', b'{"red": "high"}', b""])
def test_a_200_that_is_no_prediction_is_one_sentence(site: tuple[str, type[Site]], red: Path, body: bytes) -> None:
    url, server = site
    server.answers = [(200, body)]
    for words in (["predict", "--url", f"{url}/predictions/x", red], ["evaluate", url, "--data", red, "--model", "x"]):
        error = call(*words).exception
        assert isinstance(error, Undetermined), error
        assert "; name " in str(error)


def test_predict_and_evaluate_come_back_when_they_are_sent_away(site: tuple[str, type[Site]], red: Path) -> None:
    url, server = site
    for words in (["predict", "--url", f"{url}/predictions/x", red], ["evaluate", url, "--data", red, "--model", "x"]):
        server.asked = []
        server.answers = [(429, b"{}"), (200, b'{"red": 0.9, "blue": 0.1}')]
        done = call(*words, "--json")
        assert done.exit_code == 0, done.exception
        assert len(server.asked) == 2
