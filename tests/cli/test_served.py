"""`beeline predict` and `beeline evaluate` through a real gateway in front of Multi Model Server.

In front of TorchServe, the test of the README runs the same commands of docs/models.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.addresses import Ports
from serve.config import Overrides
from serve.up import Request, up
from tests.cli.test_main import beeline
from tests.conftest import BLUE, GREEN, LABELS, RED, picture

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def url(colour_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a gateway in front of a server with the colour model."""
    overrides = Overrides(workers=1, batch_size=8, max_batch_delay=20)
    asked = Request("mms", (str(colour_archive),), name="mms", overrides=overrides, ports=Ports(0), gateway="nginx")
    with up(asked, print, {**os.environ, "BEELINE_STATE": str(tmp_path_factory.mktemp("state"))}) as running:
        yield running.state.inference


def values(code: int, *words: object) -> dict[str, Any]:
    """Run a command that ends with this code; return the JSON object on its last line."""
    done = beeline(*map(str, words), "--json")
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_predict_answers_each_picture_and_a_broken_one_harms_no_other(url: str, tmp_path: Path) -> None:
    for name, content in (("1.png", RED), ("2.png", b"hello"), ("3.png", BLUE), ("4.png", GREEN)):
        (tmp_path / name).write_bytes(content)
    found = values(1, "predict", "--url", url, tmp_path)
    assert (found["source"], found["failed"]) == (url, 1)
    assert [row["status"] for row in found["pictures"]] == [200, 415, 200, 200]
    assert found["pictures"][1]["error"]["type"] == "NotAnImage"
    firsts = [next(iter(found["pictures"][index]["predictions"])) for index in (0, 2, 3)]
    assert firsts == ["red", "blue", "green"]
    (row,) = values(1, "predict", "--url", url, "--model", "nobody", tmp_path / "1.png")["pictures"]
    assert row["status"] == 404
    assert "nobody" in row["error"]["message"]


def test_evaluate_counts_mistakes_and_failures(url: str, tmp_path: Path) -> None:
    data, report = tmp_path / "data", tmp_path / "report.html"
    for label, colour in zip(LABELS, ((220, 30, 40), (20, 200, 60), (30, 40, 210)), strict=True):
        (data / label).mkdir(parents=True)
        for number in range(40):
            (data / label / f"{number:02}.png").write_bytes(picture(colour, (40 + number, 50)))
    (data / "red" / "07.png").write_bytes(GREEN)
    (data / "blue" / "broken.png").write_bytes(b"hello")
    found = values(0, "evaluate", url, "--data", data, "--report", report)
    assert (found["source"], found["pictures"], found["right"]) == (url, 121, 119)
    assert [Path(one["path"]).name for one in found["mistakes"]] == ["07.png"]
    assert [Path(one["path"]).name for one in found["failures"]["415"]] == ["broken.png"]
    assert "07.png" in report.read_text(encoding="utf-8")
