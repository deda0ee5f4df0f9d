"""`beeline bench report`: files of records in, a page and Markdown out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from beeline.errors import BeelineError
from bench.record import append
from bench.report import files
from cli.bench import app
from tests.bench import fake_records as fake


@pytest.fixture
def before(tmp_path: Path) -> Path:
    path = tmp_path / "before.jsonl"
    append(path, fake.table())
    append(path, fake.load())
    return path


@pytest.fixture
def after(tmp_path: Path) -> Path:
    path = tmp_path / "after.jsonl"
    append(path, fake.table(4, 3))
    return path


def test_one_file_has_no_labels_and_several_their_names(before: Path, after: Path) -> None:
    assert files.read([before])[1] == ["", ""]
    records, labels = files.read([before, after])
    assert [record.kind for record in records] == ["table", "load", "table"]
    assert labels == ["before", "before", "after"]


def test_files_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        append(tmp_path / folder / "table.jsonl", fake.table())
    assert files.read([tmp_path / "one/table.jsonl", tmp_path / "two/table.jsonl"])[1] == ["one/table", "two/table"]


def test_an_empty_file_is_no_report(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(BeelineError, match="holds no record"):
        files.read([empty])


def test_the_command_writes_what_is_asked_for(before: Path, after: Path, tmp_path: Path) -> None:
    html, text = tmp_path / "new" / "report.html", tmp_path / "report.md"
    words = ["report", str(before), str(after), "--html", str(html), "--markdown", str(text), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"records": 3, "html": str(html), "markdown": str(text)}
    assert html.read_text().startswith("<!doctype html>")
    assert text.read_text().startswith("# Beeline: ladder, load of resnet18")


def test_without_a_file_markdown_is_printed(before: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(before)])
    assert done.stdout.startswith("# Beeline: ladder, load of resnet18")


def test_a_file_that_cannot_be_written_is_named(before: Path, tmp_path: Path) -> None:
    records, labels = files.read([before])
    with pytest.raises(BeelineError, match="cannot be written"):
        files.write(records, labels, tmp_path, None)


def test_a_comparison_that_was_interrupted_before_a_servers_first_turn_is_drawn(tmp_path: Path) -> None:
    found = fake.compare()
    found.result["interrupted"] = True
    for row in found.result["rows"][1:]:
        row.update(per_second=[], p95_ms=[], ratio=None, interval=None, verdict=None, error=None)
    path = tmp_path / "interrupted.jsonl"
    append(path, found)
    _, said = files.write(*files.read([path]), tmp_path / "page.html", None)
    assert "litserve" in said
    assert "not measured" in said
