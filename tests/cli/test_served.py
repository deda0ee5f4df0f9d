"""`beeline predict` and `beeline evaluate`, the commands themselves, through a real gateway before both servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up
from tests.conftest import BLUE, GREEN, LABELS, RED, ROOT, picture

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["torchserve", "mms"])
def url(
    request: pytest.FixtureRequest, colour_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a gateway before a server with the colour model."""
    asked = Request(
        request.param,
        (str(colour_archive),),
        colour_archive.parent,
        name=request.param,
        overrides=Overrides(workers=1, batch_size=8, max_batch_delay=20),
        ports=Ports(0),
        gateway="nginx",
    )
    with up(asked, print, {**os.environ, "BEELINE_STATE": str(tmp_path_factory.mktemp("state"))}) as running:
        yield running.state.inference


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty pictures a label; of the red ones, one is green in truth."""
    for label, colour in zip(LABELS, ((220, 30, 40), (20, 200, 60), (30, 40, 210)), strict=True):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(40):
            (tmp_path / "data" / label / f"{number:02}.png").write_bytes(picture(colour, (40 + number, 50)))
    (tmp_path / "data" / "red" / "07.png").write_bytes(GREEN)
    return tmp_path / "data"


def call(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does."""
    command = [sys.executable, "-m", "cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def values(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    """Return the JSON object on the last line of a command that ended with this code."""
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_predict(url: str, tmp_path: Path) -> None:
    sent = {"red.png": RED, "green.png": GREEN, "blue.png": BLUE}
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    found = values(call("predict", "--url", url, "--json", *(tmp_path / name for name in sent)))
    assert found["source"] == url
    assert [next(iter(row["predictions"])) for row in found["pictures"]] == ["red", "green", "blue"]
    assert [Path(row["picture"]).name for row in found["pictures"]] == list(sent)
    table = call("predict", "--url", f"{url}/predictions/colours", tmp_path / "red.png")
    assert table.returncode == 0, table.stderr
    assert "red.png  red 1.000" in table.stdout


def test_predict_with_a_broken_picture_among_others(url: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(RED)
    (tmp_path / "2.png").write_bytes(b"hello")
    (tmp_path / "3.png").write_bytes(BLUE)
    found = values(call("predict", "--url", url, "--json", tmp_path), code=1)
    assert [row["status"] for row in found["pictures"]] == [200, 415, 200]
    assert found["pictures"][1]["error"]["type"] == "NotAnImage"
    assert found["failed"] == 1


def test_evaluate(url: str, data: Path, tmp_path: Path) -> None:
    (data / "blue" / "broken.png").write_bytes(b"hello")
    report = tmp_path / "report.html"
    found = values(call("evaluate", url, "--data", data, "--report", report, "--json"))
    assert found["source"] == url
    assert (found["pictures"], found["right"]) == (121, 119)
    assert [Path(one["path"]).name for one in found["mistakes"]] == ["07.png"]
    assert [Path(one["path"]).name for one in found["failures"]["415"]] == ["broken.png"]
    assert "07.png" in report.read_text(encoding="utf-8")


def test_a_model_that_is_not_served_is_a_sentence(url: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(RED)
    found = values(call("predict", "--url", url, "--model", "nobody", "--json", tmp_path / "1.png"), code=1)
    assert found["pictures"][0]["status"] == 404
    assert "nobody" in found["pictures"][0]["error"]["message"]
