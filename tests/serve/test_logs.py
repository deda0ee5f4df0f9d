"""Why a server did not start, from real lines of both servers' logs; and following through rotation."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from threading import Timer

import pytest

from beeline.errors import BeelineError
from serve import logs

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
