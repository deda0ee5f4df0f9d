"""The configuration file gets new numbers and keeps everything else, byte for byte."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from beeline.errors import ConfigError
from serve.properties import Change, change, load
from tests.conftest import ROOT

TUNED = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 32, "maxBatchDelay": 10}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of the project's own file."""
    path = tmp_path / "config.properties"
    path.write_bytes((ROOT / "config" / "config.properties").read_bytes())
    return path


def numbers(path: Path, model: str = "resnet18", version: str = "1.0") -> dict[str, int]:
    return dict(load(path).models[model][version].numbers)


def test_only_the_numbers_of_the_model_change_and_only_when_they_are_written(own: Path) -> None:
    before = own.read_text()
    made = change(own, "resnet18", "1.0", TUNED, None)
    assert own.read_text() == before
    assert made.diff.startswith("--- config.properties (now)")
    assert {'-      "batchSize": 8,\\', '+      "batchSize": 32,\\'} <= set(made.diff.splitlines())
    made.write()
    changed = {
        ('      "minWorkers": 1,\\', '      "minWorkers": 2,\\'),
        ('      "maxWorkers": 4,\\', '      "maxWorkers": 2,\\'),
        ('      "batchSize": 8,\\', '      "batchSize": 32,\\'),
        ('      "maxBatchDelay": 2,\\', '      "maxBatchDelay": 10,\\'),
    }
    pairs = zip(before.splitlines(), own.read_text().splitlines(), strict=True)
    assert {pair for pair in pairs if pair[0] != pair[1]} == changed
    assert numbers(own)["responseTimeout"] == 120
    assert change(own, "resnet18", "1.0", TUNED, None).diff == ""


def test_threads_are_written_below_their_comment_or_in_place_of_the_old_ones(own: Path) -> None:
    change(own, "resnet18", "1.0", TUNED, 3).write()
    text = own.read_text()
    assert "#beeline_threads=1\nbeeline_threads=3\n\n# Threads for a picture that comes alone" in text
    assert load(own).numbers["beeline_threads"] == 3
    change(own, "resnet18", "1.0", TUNED, 1).write()
    assert "#beeline_threads=1\nbeeline_threads=1\n" in own.read_text()
    assert own.read_text().count("\nbeeline_threads=") == 1


def test_a_model_gets_an_entry_unless_its_only_one_is_of_another_version(own: Path) -> None:
    change(own, "squeezenet", "2.0", TUNED, None).write()
    assert numbers(own, "squeezenet", "2.0") == TUNED
    assert numbers(own)["batchSize"] == 8
    assert "# Requests that the server holds" in own.read_text()
    change(own, "resnet18", "3.0", TUNED, None).write()
    assert numbers(own)["batchSize"] == 32
    assert set(load(own).models["resnet18"]) == {"1.0"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing but this",
        "job_queue_size=5\n",
        "models={}\n",
        'models = {"fake": {}}\n# after\n',
        'models:{"fake":{"1.0":{"batchSize":8}}}',
        'models={"other": {"1.0": {"batchSize": 3}},\\\n  "fake": {"1.0": {\\\n "batchSize" : 8 }}}\n',
        'models={\\\r\n  "fake": {\\\r\n    "1.0": {\\\r\n  "batchSize": 8\\\r\n    }}\\\r\n}\r\njob_queue_size=5\r\n',
        'models={"f\\u0061ke": {"1.0": {"batchSize": 8}}}\n',
        'beeline_threads = 4\nmodels={"fake": {"1.0": {"minWorkers": 1, "maxWorkers": 9}}}\n',
    ],
)
def test_every_form_of_the_file_is_changed_to_the_same_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.properties"
    path.write_bytes(text.encode())
    known = load(path).numbers
    change(path, "fake", "1.0", TUNED, 1).write()
    assert numbers(path, "fake") == TUNED
    assert load(path).numbers == {**known, "beeline_threads": 1}
    written = path.read_bytes().decode()
    for line in text.splitlines():
        if line.startswith(("#", "job")):
            assert line in written
    if "\r\n" in text:
        assert written.count("\n") == written.count("\r\n")


def test_the_file_is_replaced_in_one_step_and_keeps_its_mode(own: Path) -> None:
    own.chmod(0o640)
    link = own.with_name("link.properties")
    link.symlink_to(own)
    change(link, "resnet18", "1.0", TUNED, None).write()
    assert link.is_symlink()
    assert numbers(own)["batchSize"] == 32
    assert stat.S_IMODE(own.stat().st_mode) == 0o640
    assert {path.name for path in own.parent.iterdir()} == {own.name, link.name}


def test_a_file_that_changed_meanwhile_or_cannot_be_written_is_one_sentence(own: Path, tmp_path: Path) -> None:
    made = change(own, "resnet18", "1.0", TUNED, None)
    own.write_text(own.read_text() + "vmargs=-Xmx1g\n")
    with pytest.raises(ConfigError, match="changed while it was tuned"):
        made.write()
    assert "vmargs" in own.read_text()
    gone = Change(tmp_path / "gone" / "config.properties", "a", "b")
    with pytest.raises(ConfigError, match="cannot be written"):
        gone.write()
