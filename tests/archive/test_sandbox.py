"""The sandbox: a handler in a clean process, what that may import, its answers, its real traceback, its times."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from archive.build import Built
from archive.sandbox import OutOfMemory, Sandbox, WorkerTraceback, hidden_packages, owners, package_folders
from beeline.errors import ArchiveError, Undetermined
from tests.archive.conftest import Files, MakeMar
from tests.conftest import BLUE, GREEN, RED, ROOT, pack

MakePlain = Callable[[str], Path]

ECHO = """
import json, sys

class Echo:
    def initialize(self, context):
        self.server = "torchserve" if hasattr(context, "model_yaml_config") else "mms"
        print("handlers print, and it must not break the protocol")

    def handle(self, data, context):
        for i, row in enumerate(data):
            if not row["body"]:
                context.set_response_status(400, "Bad Request", i)
            context.set_response_header(i, "X-Rows", str(len(data)))
        return [json.dumps([self.server, bytes(row["body"]).decode()]) for row in data]
"""


def test_an_archive_answers_pictures_like_a_server(tiny_built: Built) -> None:
    with Sandbox(tiny_built.path, batch_size=2) as sandbox:
        answers = sandbox.predict([RED, GREEN, b"no picture", BLUE, b""])
        again = sandbox.predict([BLUE])
    assert [answer.status for answer in answers] == [200, 200, 415, 200, 400]
    assert set(answers[0].json()) == {"ants", "bees", "crickets"}
    assert answers[2].json()["type"] == "NotAnImage"
    assert [answer.headers["X-Batch-Size"] for answer in answers] == ["2", "2", "2", "2", "1"]
    assert answers[0].headers["content-type"] == "application/json"
    assert again[0].json() == answers[3].json()
    assert sandbox.choice["threads"][1]


@pytest.mark.parametrize("server", ["torchserve", "mms"])
def test_the_handler_gets_the_context_of_the_server_that_was_asked_for(make_plain: MakePlain, server: str) -> None:
    with Sandbox(make_plain(ECHO), server=server, batch_size=2) as sandbox:
        answers = sandbox.predict([b"a", b"", b"c"])
    assert [answer.json() for answer in answers] == [[server, "a"], [server, ""], [server, "c"]]
    assert [answer.status for answer in answers] == [200, 400, 200]
    assert [answer.headers["X-Rows"] for answer in answers] == ["2", "2", "1"]


@pytest.mark.parametrize(
    ("source", "told", "shown"),
    [
        ("import nothing_of_that_name\n", "ModuleNotFoundError: .*a worker has torch", 'plain.py", line 1'),
        ("import torchvision\n", "No module named 'torchvision'", "import torchvision"),
        ("import train\n", "No module named 'train'", "import train"),
        ("import archive\n", "No module named 'archive'", "import archive"),
        ("import serve.client\n", "No module named 'serve'", "import serve"),
        ("class A: ...\nclass B: ...\n", "defines the classes A, B", "exactly one"),
        (
            "class A:\n    def initialize(self, context):\n        return 1 / 0\n",
            "does not load: ZeroDivisionError: division by zero",
            "return 1 / 0",
        ),
        (
            "class A:\n    def initialize(self, context): raise SystemExit('no')\n",
            "does not load: SystemExit: no",
            "no",
        ),
    ],
)
def test_a_handler_that_does_not_load_shows_its_real_traceback(
    make_plain: MakePlain, source: str, told: str, shown: str
) -> None:
    with pytest.raises(ArchiveError, match=told) as caught, Sandbox(make_plain(source)):
        raise AssertionError("it must not load")
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "Traceback (most recent call last)" in str(caught.value.__cause__)
    assert shown in str(caught.value.__cause__)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "told", "shown"),
    [
        ("return [self.missing for _ in data]", "AttributeError", "return [self.missing for _ in data]"),
        ("return []", "returned 0 answers for 1 requests", "ValueError"),
        ("return 'text'", "returned a str for 1 requests", "ValueError"),
        ("import os; os._exit(3)", "ended with exit code 3", "worker wrote nothing"),
        (
            "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            "SIGKILL",
            "last words",
        ),
    ],
)
def test_a_handler_that_fails_on_a_batch_shows_why(make_plain: MakePlain, body: str, told: str, shown: str) -> None:
    source = f"class A:\n    def initialize(self, context): ...\n    def handle(self, data, context):\n        {body}\n"
    with Sandbox(make_plain(source)) as sandbox, pytest.raises(ArchiveError, match=told) as caught:
        sandbox.predict([b"x"])
    assert shown in str(caught.value.__cause__)


def test_a_failed_self_test_is_its_own_sentence(tiny_files: Files, make_mar: MakeMar) -> None:
    mar = make_mar({**tiny_files, "golden/1.png": b"changed"})
    for server in ("torchserve", "mms"):
        with (
            pytest.raises(ArchiveError, match=r"golden/1\.png has sha256 [0-9a-f]{12}, expected [0-9a-f]{12}"),
            Sandbox(mar, server),
        ):
            raise AssertionError("it must not load")


def test_a_handler_that_hangs_is_ended(make_plain: MakePlain) -> None:
    source = "import time\nclass A:\n    def initialize(self, context): time.sleep(600)\n"
    with pytest.raises(Undetermined, match=r"no reply within 0\.5 s"), Sandbox(make_plain(source), load_seconds=0.5):
        raise AssertionError("it must not load")


def test_nothing_is_left_behind(make_plain: MakePlain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    child = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    source = f"{child}class A:\n    def initialize(self, context): ...\n"
    with Sandbox(make_plain(source)):
        started = psutil.Process().children(recursive=True)
        assert len(started) == 2
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert list(scratch.iterdir()) == []
    assert Path.cwd() == Path(os.getcwd())  # noqa: PTH109 - the sandbox's folder is gone, this process stays


def test_an_unknown_server_is_refused(make_plain: MakePlain) -> None:
    with pytest.raises(ArchiveError, match="'torchserv'; did you mean 'torchserve'"):
        Sandbox(make_plain(ECHO), server="torchserv")


def test_nothing_of_this_repository_is_on_the_workers_path() -> None:
    folders = [Path(folder).resolve() for folder in package_folders()]
    assert folders
    assert ROOT not in folders
    assert ROOT / "handlers" not in folders
    assert all(folder.name in ("site-packages", "dist-packages") for folder in folders)


def test_what_only_this_environment_has_is_hidden_and_what_torch_needs_is_not() -> None:
    hidden = set(hidden_packages())
    assert {"torchvision", "lightning", "typer", "yaml", "ts", "pytest"} <= hidden
    assert not {"torch", "numpy", "PIL", "sympy", "filelock", "typing_extensions", "psutil"} & hidden


def test_an_engines_runtime_is_seen_where_the_archive_needs_it() -> None:
    assert "openvino" in hidden_packages()
    assert "openvino" not in hidden_packages(("openvino",))


def test_pillow_simd_in_pillows_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**owners(), "PIL": {"pillow-simd"}}
    monkeypatch.setattr("archive.sandbox.owners", lambda: installed)
    assert "PIL" not in hidden_packages()


def test_batches_are_timed_and_what_a_worker_takes_is_told(tiny_built: Built) -> None:
    with Sandbox(tiny_built.path, environment={"BEELINE_THREADS": "1", "BEELINE_DEVICE": "cpu"}) as sandbox:
        about = sandbox.take([RED, b"no picture"])
        replies = list(sandbox.time_batches((1, 4), seconds=20.0, lone=2))
    assert (about["model"], about["version"], about["classes"]) == ("tiny", "1.0", 3)
    assert about["refused"].startswith("the body starts with")
    assert [reply.get("batch") for reply in replies] == [1, 4, None]
    assert all(reply["ms"] > 0 for reply in replies[:2])
    # On PyTorch there is no second model for lone pictures.
    assert replies[2]["cost"]["memory"] > 100 << 20
    assert replies[2]["cost"]["load_seconds"] > 0


@pytest.mark.parametrize(("threads", "lone", "models"), [(1, 2, 2), (2, 3, 2), (2, 2, 1)])
def test_a_worker_on_openvino_costs_a_second_model(
    openvino_model: Path, tmp_path: Path, threads: int, lone: int, models: int
) -> None:
    mar = pack(openvino_model, tmp_path / "colours.mar")
    told = {"BEELINE_THREADS": str(threads), "BEELINE_LONE_THREADS": str(threads)}
    with Sandbox(mar, environment=told) as sandbox:
        sandbox.take([RED])
        costs = [reply for reply in sandbox.time_batches((2,), seconds=20.0, lone=lone) if "cost" in reply]
    assert len(costs) == models
    assert "threads" not in costs[0]
    if models == 2:
        assert costs[1]["threads"] == str(lone)
        assert costs[1]["cost"]["load_seconds"] > costs[0]["cost"]["load_seconds"]


def test_a_process_that_the_kernel_kills_is_out_of_memory(make_plain: MakePlain) -> None:
    source = "import os\nclass A:\n    def initialize(self, context): os.kill(os.getpid(), 9)\n"
    with pytest.raises(OutOfMemory, match="ended with signal SIGKILL"), Sandbox(make_plain(source)):
        raise AssertionError("it must not load")
