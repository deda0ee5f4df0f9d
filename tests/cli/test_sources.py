"""Which model a URL means, and answers of servers and proxies that are not Beeline's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from beeline.errors import BeelineError, Undetermined
from cli.main import app
from tests.conftest import RED, Site

HTML = b"<html>\n<h1>502 Bad Gateway</h1></html>"
GOOD = (200, b'{"red": 0.9, "blue": 0.1}')


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose index has one model."""
    folder = tmp_path / "store"
    folder.mkdir()
    entry = {"sha256": "", "name": "local", "version": "1.0", "fingerprint": "", "bytes": 1}
    (folder / "index.json").write_text(json.dumps({"schema": 1, "archives": {"local.mar": entry}}))
    monkeypatch.setattr("cli.sources.STORE", folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, site: type[Site]) -> Path:
    """A folder with one folder a label, one picture in it; the site answers it."""
    site.answers = [GOOD]
    (tmp_path / "data" / "red").mkdir(parents=True)
    (tmp_path / "data" / "red" / "red.png").write_bytes(RED)
    return tmp_path / "data"


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def both(url: str, data: Path) -> list[list[object]]:
    """Return the two commands that ask a URL."""
    return [["predict", "--url", f"{url}/predictions/x", data], ["evaluate", url, "--data", data, "--model", "x"]]


@pytest.mark.parametrize(
    ("page", "model"),
    [
        ((200, b'{"models": [{"name": "resnet18"}, {"name": "resnet18"}]}'), "resnet18"),
        # Without a catalog the local index names it.
        ((404, b'{"code": 404}'), "local"),
        ((200, HTML), "local"),
    ],
)
def test_the_urls_only_model_is_asked(site: type[Site], data: Path, page: tuple[int, bytes], model: str) -> None:
    site.page = page
    done = call("predict", "--url", site.url, data)
    assert (done.exit_code, done.stdout.split()[-4:]) == (0, ["red", "0.900", "blue", "0.100"])
    assert site.asked == [f"/predictions/{model}"]


def test_several_models_or_none_are_an_error_and_one_may_be_named(site: type[Site], data: Path, store: Path) -> None:
    site.page = (200, b'{"models": [{"name": "resnet18"}, {"name": "efficientnet_b0"}]}')
    error = call("evaluate", site.url, "--data", data).exception
    assert isinstance(error, BeelineError)
    assert str(error) == f"the URL names no model, and {site.url} serves efficientnet_b0, resnet18; add --model NAME"
    assert call("predict", "--url", site.url, "--model", "resnet18", data).exit_code == 0
    assert call("predict", "--url", f"{site.url}/predictions/resnet18/1.0/", data).exit_code == 0
    assert site.asked == ["/predictions/resnet18", "/predictions/resnet18/1.0"]
    site.page = (404, b"")
    (store / "index.json").unlink()
    error = call("predict", "--url", site.url, data).exception
    assert f"{site.url} has no catalog and model_store lists none; add --model NAME" in str(error)


def test_a_proxys_error_page_is_the_pictures_error(site: type[Site], data: Path) -> None:
    site.answers = [(502, HTML)]
    done = call(*both(site.url, data)[0], "--json")
    assert done.exit_code == 1
    message = "the answer is no JSON object: '<html> <h1>502 Bad Gateway</h1></html>'"
    error = json.loads(done.stdout.splitlines()[-1])["pictures"][0]["error"]
    assert error == {"code": 502, "type": "NoJson", "message": message}
    assert f"502 NoJson: {message}" in call(*both(site.url, data)[0]).stdout.replace("\n", "")


@pytest.mark.parametrize("body", [HTML, b"[]", b'"red"', b'{"red": "high"}', b""])
def test_a_200_that_is_no_prediction_is_one_sentence(site: type[Site], data: Path, body: bytes) -> None:
    site.answers = [(200, body)]
    for words in both(site.url, data):
        error = call(*words).exception
        assert isinstance(error, Undetermined), error
        assert "; name " in str(error)


def test_predict_and_evaluate_send_a_refused_picture_again(site: type[Site], data: Path) -> None:
    for words in both(site.url, data):
        site.asked.clear()
        site.answers = [(429, b"{}", "0"), GOOD]
        done = call(*words, "--json")
        assert done.exit_code == 0, done.exception
        assert len(site.asked) == 2
