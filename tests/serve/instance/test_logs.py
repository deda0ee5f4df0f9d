"""Why a server did not start, from real lines of both servers' logs; and following through rotation."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from queue import Queue
from threading import Timer

import pytest

from beeline.errors import BeelineError
from serve.instance import logs

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


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("worker", TRACEBACK, "RuntimeError: the gate is shut"),
        ("worker", REFUSAL + TRACEBACK, "golden/0.png is answered 'red'"),
        ("worker", MASKED, "ModuleNotFoundError: No module named 'missing'"),
        (
            "server",
            "2026-11-21T06:53:23,644 [WARN ] main ModelServer - Failed to load model: x.mar\n",
            "Failed to load model: x.mar",
        ),
        ("console", "Invalid configuration: For input string\n", "Invalid configuration: For input string"),
    ],
)
def test_the_reason_is_the_first_cause(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / f"{name}.log").write_text(text)
    assert logs.failure(tmp_path) == said


def test_a_quiet_log_gives_no_reason(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("2026-11-21T06:52:27,077 W-fake-1-stdout loaded\n")
    assert logs.failure(tmp_path) is None


def test_following_goes_on_after_rotation(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("old\n")
    with closing(logs.follow([path], pause=0.01)) as lines, path.open("a") as file:
        # Only after the first look: what was there before is no news.
        timer = Timer(0.2, print, ["one"], {"file": file, "flush": True})
        timer.start()
        assert next(lines) == (path, "one")
        timer.join()
        path.rename(tmp_path / "worker.log.1")
        path.write_text("two\n")
        assert next(lines) == (path, "two")


def test_tail_is_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("a\nb\nc\n")
    assert logs.tail(path, 2) == ["b", "c"]


def test_an_unknown_log_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match=r"no log is named 'workers'; did you mean 'worker'\?"):
        logs.paths(tmp_path, "workers")
    with pytest.raises(BeelineError, match="holds no worker log yet"):
        logs.paths(tmp_path, "worker")


def test_a_log_that_comes_into_being_later_is_shown_from_its_first_line(tmp_path: Path) -> None:
    early, late = tmp_path / "logs" / "worker.log", tmp_path / "logs" / "access.log"
    early.parent.mkdir()
    early.write_text("of the last start\n")
    with closing(logs.follow([early, late], pause=0.01)) as lines, early.open("a") as file:
        timer = Timer(0.2, print, ["one"], {"file": file, "flush": True})
        timer.start()
        assert next(lines) == (early, "one")
        timer.join()
        late.write_text("first\nsecond\n")
        assert [next(lines), next(lines)] == [(late, "first"), (late, "second")]
        # The next start puts the whole folder aside.
        early.parent.rename(tmp_path / "logs.previous")
        early.parent.mkdir()
        early.write_text("of this start\n")
        late.write_text("third\n")
        assert sorted([next(lines), next(lines)]) == [(late, "third"), (early, "of this start")]


def test_nothing_is_lost_when_a_log_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("")
    with closing(logs.follow([path], pause=0.01)) as lines:
        timer = Timer(0.2, path.write_text, ["one\n"])
        timer.start()
        assert next(lines) == (path, "one")
        timer.join()
        # All between two looks: lines in the old file, one that is not ended, and a new file.
        with path.open("a") as file:
            file.write("two\nthree\nfour")
        path.rename(tmp_path / "worker.log.1")
        path.write_text("five\n")
        assert [next(lines)[1] for _ in range(4)] == ["two", "three", "four", "five"]


def test_a_line_is_shown_when_it_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_text("")
    parts = (b'{"status": ', b"200}\nd\xc3", b"\xa9j\xff\n")
    with closing(logs.follow([path], pause=0.01)) as lines, path.open("ab") as file:

        def write() -> None:
            for part in parts:
                file.write(part)
                file.flush()
                time.sleep(0.1)

        timer = Timer(0.2, write)
        timer.start()
        assert next(lines) == (path, '{"status": 200}')
        assert next(lines) == (path, "d\u00e9j\ufffd")
        timer.join()


def test_logs_are_shown_with_their_names_and_an_access_log_stays_json(tmp_path: Path) -> None:
    shown: Queue[str] = Queue()
    # Nothing is there yet, not even the folder.
    logs.show(tmp_path / "logs", ["worker", "access"], shown.put)
    (tmp_path / "logs").mkdir()
    for name in ("worker", "access", "server"):
        (tmp_path / "logs" / f"{name}.log").write_text('{"a": 1}\n')
    assert sorted(shown.get(timeout=10) for _ in range(2)) == ['worker: {"a": 1}\n', '{"a": 1}\n']
    assert shown.empty()


def test_logs_that_nobody_writes_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match=r"no log is named 'acess'; did you mean 'access'\?"):
        logs.show(tmp_path, ["worker", "acess"], print)
