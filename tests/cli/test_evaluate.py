"""`beeline evaluate` of captions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from beeline.answer import Answer
from beeline.errors import BeelineError
from cli import sources
from cli.main import app

CAPTIONS = {"0.png": "a red circle", "1.png": ["a blue square", "one blue square"], "2.png": "two cats"}
ANSWERS = [
    Answer(200, "OK", json.dumps({"caption": "a red circle", "tokens": 4, "score": 0.9})),
    Answer(200, "OK", json.dumps({"caption": "one blue square", "tokens": 4, "score": 0.9})),
    Answer(415, "Unsupported Media Type", "{}"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in CAPTIONS:
        (tmp_path / name).write_bytes(b"a picture")
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    return tmp_path


def _answered(monkeypatch: pytest.MonkeyPatch, answers: list[Answer], folder: Path, *more: str) -> Any:
    @contextmanager
    def opened(*_: object) -> Iterator[sources.Source]:
        yield sources.Source(lambda bodies: answers[: len(bodies)])

    monkeypatch.setattr(sources, "open_source", opened)
    return CliRunner().invoke(app, ["evaluate", "some.mar", "--data", str(folder), "--json", *more])


@pytest.mark.parametrize("more", [("--against", "x.mar"), ("--report", "x.html"), ("--calibrate",)])
def test_what_compares_labels_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path, more: tuple[str, ...]) -> None:
    outcome = _answered(monkeypatch, ANSWERS, folder, *more)
    assert "--calibrate compare labels" in str(outcome.exception)
    assert isinstance(outcome.exception, BeelineError)


def test_captions_are_right_if_they_are_one_of_those_given(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    values = json.loads(_answered(monkeypatch, ANSWERS, folder).stdout.splitlines()[-1])
    assert values["pictures"] == 3
    assert values["exact"] == pytest.approx(2 / 3)
    if importlib.util.find_spec("pycocoevalcap"):
        assert values["cider"] > 0
    else:
        assert "pycocoevalcap is not installed" in values["notes"][0]


def test_a_source_without_captions_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    outcome = _answered(monkeypatch, [Answer(200, "OK", '{"bees": 0.9}')] * 3, folder)
    assert "name a captioning model" in str(outcome.exception)


@pytest.mark.parametrize("text", ['{"3.png": "a red circle"}', "{}", '{"0.png": []}'])
def test_damaged_captions_get_a_sentence(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "captions.json").write_text(text)
    outcome = _answered(monkeypatch, ANSWERS, folder)
    assert "captions.json cannot be used" in str(outcome.exception)
