"""Which model a URL means, and answers of servers and proxies that are not Beeline's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from beeline.errors import BeelineError, Undetermined
from beeline.spec import Artifact, Caption, Geometry, ModelSpec
from cli.main import app
from tests.conftest import RED, Site

HTML = b"<html>\n<h1>502 Bad Gateway</h1></html>"
GOOD = (200, b'{"red": 0.9, "blue": 0.1}')


@pytest.fixture(autouse=True)
def _own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.index.FOLDER", tmp_path / "index")


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


@pytest.mark.parametrize("place", [".", "export"])
def test_a_captioning_run_is_to_be_built_into_an_archive(place: str, data: Path, tmp_path: Path) -> None:
    artifact = Artifact("decoder.onnx", "onnx", "0" * 64)
    caption = Caption(artifact, "tokenizer.json", "0" * 64, 5, 3, 0)
    model, fixed = Artifact("encoder.onnx", "onnx", "0" * 64), Geometry(32, 32, fit="squash")
    spec = ModelSpec("x", "1", (), fixed, model, 1, "onnxruntime", task="caption", caption=caption)
    (tmp_path / "run" / place).mkdir(parents=True)
    spec.save(tmp_path / "run" / place / "model_spec.json")
    for words in (["predict", "--run", tmp_path / "run", data], ["evaluate", tmp_path / "run", "--data", data]):
        with pytest.raises(BeelineError, match=r"build an archive of it: beeline archive build .*run"):
            raise call(*words).exception or AssertionError


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


@pytest.fixture
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("train.runs.RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def test_predict_takes_every_picture_and_names_one_that_cannot_be_read(site: type[Site], tmp_path: Path) -> None:
    site.answers = [GOOD]
    folder = tmp_path / "mixed"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jfif", "b.png", "nameless", ".ipynb_checkpoints/b.png"):
        (folder / name).write_bytes(RED)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "list.csv").write_text("x")
    done = call("predict", "--url", f"{site.url}/predictions/x", folder, "--json")
    assert done.exit_code == 1, done.exception
    rows = json.loads(done.stdout.splitlines()[-1])["pictures"]
    assert [(Path(row["picture"]).name, row["status"]) for row in rows] == [
        ("a.jfif", 200),
        ("b.png", 200),
        ("gone.png", 0),
        ("nameless", 200),
    ]
    assert rows[2]["error"]["message"] == "the file cannot be read (No such file or directory)"
    assert "1 of 4 pictures got no prediction" in done.stderr
    assert "left out, hidden or no pictures: " in done.stderr
    assert "list.csv" in done.stderr


def test_a_grid_of_answers_is_a_png(site: type[Site], tmp_path: Path) -> None:
    site.answers = [GOOD]
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "broken $x$.jpg").write_bytes(b"no picture")
    words = ["predict", "--url", f"{site.url}/predictions/x", tmp_path / "red.png", tmp_path / "broken $x$.jpg"]
    assert call(*words, "--grid", tmp_path / "new" / "grid.png").exit_code == 0
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        assert grid.format == "PNG"
        assert grid.width > 5 * 150


def test_a_report_is_tried_before_anything_is_asked(site: type[Site], data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    words = ["evaluate", f"{site.url}/predictions/x", "--data", data, "--report"]
    for path, sentence in ((tmp_path / "file" / "r.html", "is a file"), (tmp_path, "is a folder; name a file")):
        error = call(*words, path).exception
        assert isinstance(error, BeelineError)
        assert sentence in str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("host.report.find_spec", lambda name: None if name == "matplotlib" else name)
        error = call(*words, tmp_path / "r.html").exception
        assert "a report needs matplotlib; install it" in str(error)
    assert site.asked == []


def test_two_servers_are_compared_and_a_url_cannot_be_calibrated(site: type[Site], data: Path, tmp_path: Path) -> None:
    url = f"{site.url}/predictions/x"
    done = call("evaluate", url, "--data", data, "--against", url, "--json", "--report", tmp_path / "r.html")
    assert done.exit_code == 0, done.exception
    values = json.loads(done.stdout.splitlines()[-1])
    assert (values["against"]["p"], values["against"]["top1"]) == (1, 1)
    assert "no more than chance explains" in values["notes"][0]
    assert "no more than chance explains" in (tmp_path / "r.html").read_text()
    error = call("evaluate", url, "--data", data, "--calibrate").exception
    assert str(error) == f"only a run can be calibrated, and {url} is none; name the run it was built from"


def test_latest_without_a_run_and_an_unknown_source_have_their_sentences(data: Path, runs_folder: Path) -> None:
    for words in (
        ["evaluate", "latest", "--data", data],
        ["predict", "--run", "latest", data],
        ["archive", "build", "latest"],
    ):
        assert "there is no finished run in" in str(call(*words).exception)
    assert "is no URL, no .mar file and no run's folder" in str(call("evaluate", "xyz", "--data", data).exception)
    assert "are given; name one of them" in str(call("predict", "--run", "latest", "--url", "x", data).exception)
