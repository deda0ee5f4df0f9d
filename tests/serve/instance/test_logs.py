"""Why a server did not start, from real lines of both servers' logs; and following through rotation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Timer

import psutil
import pytest

from beeline.errors import BeelineError, Undetermined
from serve.instance import Instance, logs

TRACEBACK = """\
2026-11-21T06:52:27,077 W-9000-fake_1.0-stdout RuntimeError: the gate is shut
2026-11-21T06:52:27,077 W-9000-fake_1.0-stdout Backend worker process died.
2026-11-21T06:52:27,078 W-9000-fake_1.0-stdout     raise RuntimeError("{} - {}".format(code, result))
2026-11-21T06:52:27,078 W-9000-fake_1.0-stdout RuntimeError: 500 - Unknown exception
"""
REFUSAL = "2026-11-21T06:52:27,077 W-fake-1-stdout this worker refuses to serve: golden/0.png is answered 'red'\n"
MASKED = """\
2026-11-21T06:52:27,077 W-9000-fake_1.0-stdout ModuleNotFoundError: No module named 'missing'
2026-11-21T06:52:27,078 W-9000-fake_1.0-stdout ModuleNotFoundError: No module named 'ts.torch_handler.fake_handler'
"""
NOT_LOADED = "2026-11-21T06:53:23,644 [WARN ] main ModelServer - Failed to load model: x.mar\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("worker", TRACEBACK, "RuntimeError: the gate is shut"),
        ("worker", REFUSAL + TRACEBACK, "golden/0.png is answered 'red'"),
        ("worker", MASKED, "ModuleNotFoundError: No module named 'missing'"),
        ("server", NOT_LOADED, "Failed to load model: x.mar"),
        ("console", "Invalid configuration: For input string\n", "Invalid configuration: For input string"),
        ("worker", "2026-11-21T06:52:27,077 W-fake-1-stdout loaded\n", None),
    ],
)
def test_the_reason_is_the_first_cause(tmp_path: Path, name: str, text: str, said: str | None) -> None:
    (tmp_path / f"{name}.log").write_text(text)
    assert logs.failure(tmp_path) == said


def test_a_models_reason_is_none_of_another_model_or_version(tmp_path: Path) -> None:
    masked = MASKED.replace("fake_1.0", "fake_2.0")
    (tmp_path / "worker.log").write_text(REFUSAL.replace("fake-1", "9001-other") + TRACEBACK + masked)
    for model, version, reason in (
        ("fake", "1.0", "RuntimeError: the gate is shut"),
        ("fake", "2.0", "ModuleNotFoundError: No module named 'missing'"),
        ("other", "1.0", "golden/0.png is answered 'red'"),
        ("othe", "1.0", None),
    ):
        assert logs.worker_failure(tmp_path, logs.worker_threads(model, version)) == reason


@contextmanager
def following(*paths: Path) -> Iterator[Iterator[tuple[Path, str]]]:
    """Follow logs; lines that exist already are not shown."""
    lines = logs.follow(list(paths), pause=0.01)
    yield lines
    lines.close()


def test_following_goes_on_through_rotation_and_a_new_start(tmp_path: Path) -> None:
    early, late = tmp_path / "logs" / "worker.log", tmp_path / "logs" / "access.log"
    early.parent.mkdir()
    early.write_text("of the last start\n")
    with following(early, late) as lines:
        with early.open("a") as file:
            file.write("one\n")
        assert next(lines) == (early, "one")
        # A log that appears later is shown from its first line.
        late.write_text("first\nsecond\n")
        assert [next(lines), next(lines)] == [(late, "first"), (late, "second")]
        # Between two looks: lines in the old file, one without an end, and a new file.
        with early.open("a") as file:
            file.write("two\nthree\nfour")
        early.rename(early.with_name("worker.log.1"))
        early.write_text("five\n")
        assert [next(lines)[1] for _ in range(4)] == ["two", "three", "four", "five"]
        # The next start renames the whole folder.
        early.parent.rename(tmp_path / "logs.previous")
        early.parent.mkdir()
        early.write_text("of this start\n")
        late.write_text("third\n")
        assert sorted([next(lines), next(lines)]) == [(late, "third"), (early, "of this start")]


def test_a_line_is_shown_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.touch()
    with following(path) as lines, path.open("ab") as file:

        def write() -> None:
            for part in (b'{"status": ', b"200}\nd\xc3", b"\xa9j\xff\n"):
                file.write(part)
                file.flush()
                time.sleep(0.1)

        timer = Timer(0, write)
        timer.start()
        assert [next(lines), next(lines)] == [(path, '{"status": 200}'), (path, "d\u00e9j\ufffd")]
        timer.join()


def test_the_last_lines_of_a_log_and_an_unknown_log(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="holds no worker log yet"):
        logs.paths(tmp_path, "worker")
    path = tmp_path / "worker.log"
    path.write_text("a\nb\nc\n")
    assert logs.tail(path, 2) == ["b", "c"]
    with pytest.raises(BeelineError, match=r"no log is named 'workers'; did you mean 'worker'\?"):
        logs.paths(tmp_path, "workers")
    with pytest.raises(BeelineError, match=r"no log is named 'acess'; did you mean 'access'\?"):
        logs.show(tmp_path, ["worker", "acess"], print)


def test_logs_are_shown_with_their_names_and_an_access_log_stays_json(tmp_path: Path) -> None:
    shown: Queue[str] = Queue()
    # Nothing is there yet, not even the folder.
    logs.show(tmp_path / "logs", ["worker", "access"], shown.put)
    (tmp_path / "logs").mkdir()
    for name in ("worker", "access", "server"):
        (tmp_path / "logs" / f"{name}.log").write_text('{"a": 1}\n')
    assert sorted(shown.get(timeout=10) for _ in range(2)) == ['worker: {"a": 1}\n', '{"a": 1}\n']
    assert shown.empty()


def test_a_change_is_a_line_with_its_result_and_a_new_start_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = Instance(tmp_path / "default")
    instance.folder.mkdir()
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    with instance.audited("up resnet18.mar"):
        instance.clear()
    monkeypatch.setenv("SUDO_USER", "ann")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("SSH_CONNECTION", "10.1.2.3 5000 10.1.2.4 22")
    with pytest.raises(Undetermined), instance.audited("scale resnet18 to 1-4"):
        raise Undetermined("nothing\nanswers")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with instance.audited("down"):
        instance.clear()
    lines = [json.loads(line) for line in (instance.folder / "audit.log").read_text().splitlines()]
    assert [{key: line[key] for key in line if key != "time"} for line in lines] == [
        {"who": psutil.Process().username(), "from": "this machine", "what": "up resnet18.mar", "result": "done"},
        {"who": "ann", "from": "10.1.2.3", "what": "scale resnet18 to 1-4", "result": "nothing answers"},
        {"who": psutil.Process().username(), "from": "10.1.2.3", "what": "down", "result": "done"},
    ]
    (instance.folder / "audit.log").unlink()
    (instance.folder / "audit.log").mkdir()
    with pytest.raises(Undetermined), instance.audited("down"):
        raise Undetermined("it does not end")
    with pytest.raises(IsADirectoryError), instance.audited("down"):
        pass
