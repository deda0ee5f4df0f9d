"""The sandbox: a handler in a clean process, its context, imports, answers, traceback and times."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from archive.build import Built
from archive.sandbox import OutOfMemory, Sandbox, WorkerTraceback, hidden_packages, owners
from archive.sandbox_context import FakeMetrics, FakeRequest, FakeTorchServeContext
from archive.sandbox_worker import forward_of, out_of_memory
from beeline.errors import ArchiveError, Undetermined
from beeline.settings import Choice
from tests.archive.conftest import Files, MakeMar, MakePlain
from tests.conftest import BLUE, GREEN, RED, pack

ECHO = """
import json, sys

class Echo:
    def initialize(self, context):
        self.server = "torchserve" if hasattr(context, "model_yaml_config") else "mms"
        assert (context.metrics is None) == (self.server == "mms")
        print("handlers print, and it must not break the protocol")

    def handle(self, data, context):
        for i, row in enumerate(data):
            if not row["body"]:
                context.set_response_status(400, "Bad Request", i)
            context.set_response_header(i, "X-Rows", str(len(data)))
            assert context.get_request_header(i, "Accept") is None
        assert context.metrics.request_ids == context.request_ids
        return [json.dumps([self.server, bytes(row["body"]).decode()]) for row in data]
"""


def initialises(line: str) -> str:
    return f"import os, time\nclass A:\n    def initialize(self, context):\n        {line}\n"


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
def test_the_handler_gets_the_context_of_the_server(make_plain: MakePlain, server: str) -> None:
    with Sandbox(make_plain(ECHO), server=server, batch_size=2) as sandbox:
        answers = sandbox.predict([b"a", b"", b"c"])
    assert [answer.json() for answer in answers] == [[server, "a"], [server, ""], [server, "c"]]
    assert [answer.status for answer in answers] == [200, 400, 200]
    assert [answer.headers["X-Rows"] for answer in answers] == ["2", "2", "1"]


@pytest.mark.parametrize(
    ("source", "reason", "shown"),
    [
        ("import nothing_of_that_name\n", "ModuleNotFoundError: .*a worker has torch", 'plain.py", line 1'),
        ("import torchvision\n", "No module named 'torchvision'", "import torchvision"),
        ("import train\n", "No module named 'train'", "import train"),
        ("class A: ...\nclass B: ...\n", "defines the classes A, B", "exactly one"),
        (initialises("raise SystemExit('no')"), "does not load: SystemExit: no", "no"),
    ],
)
def test_a_handler_that_does_not_load_shows_its_own_traceback(
    make_plain: MakePlain, source: str, reason: str, shown: str
) -> None:
    with pytest.raises(ArchiveError, match=reason) as caught, Sandbox(make_plain(source)):
        raise AssertionError("it must not load")
    assert isinstance(caught.value.__cause__, WorkerTraceback)
    assert "Traceback (most recent call last)" in str(caught.value.__cause__)
    assert shown in str(caught.value.__cause__)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason", "shown"),
    [
        ("return [self.missing for _ in data]", "AttributeError", "return [self.missing for _ in data]"),
        ("return []", "returned 0 answers for 1 requests", "ValueError"),
        ("return 'text'", "returned a str for 1 requests", "ValueError"),
        ("import os; os._exit(3)", "ended with exit code 3", "worker wrote nothing"),
        ("import os; print('last words', flush=True); os.kill(os.getpid(), 9)", "SIGKILL", "last words"),
    ],
)
def test_a_handler_that_fails_on_a_batch_shows_why(make_plain: MakePlain, body: str, reason: str, shown: str) -> None:
    source = f"class A:\n    def initialize(self, context): ...\n    def handle(self, data, context):\n        {body}\n"
    with Sandbox(make_plain(source)) as sandbox, pytest.raises(ArchiveError, match=reason) as caught:
        sandbox.predict([b"x"])
    assert shown in str(caught.value.__cause__)


def test_an_archive_that_was_changed_does_not_run(tiny_files: Files, make_mar: MakeMar) -> None:
    mar = make_mar({**tiny_files, "golden/1.png": b"changed"})
    with pytest.raises(ArchiveError, match=r"golden/1\.png has sha256 [0-9a-f]{12}, expected"), Sandbox(mar):
        raise AssertionError("it must not load")


@pytest.mark.parametrize(
    ("line", "error", "reason"),
    [
        ("time.sleep(600)", Undetermined, r"no reply within 0\.5 s"),
        ("os.kill(os.getpid(), 9)", OutOfMemory, "ended with signal SIGKILL"),
    ],
)
def test_a_handler_that_hangs_or_that_the_kernel_kills(
    make_plain: MakePlain, line: str, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason), Sandbox(make_plain(initialises(line)), load_seconds=0.5):
        raise AssertionError("it must not load")


def test_the_handler_and_its_children_end_with_the_sandbox(
    make_plain: MakePlain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    child = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    with Sandbox(make_plain(child + initialises("pass"))) as sandbox:
        started = psutil.Process().children(recursive=True)
        assert len(started) == 2
        assert sandbox.predict([]) == []
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert list(scratch.iterdir()) == []
    with pytest.raises(ArchiveError, match="is closed"):
        sandbox.predict([b"x"])


def test_an_unknown_server_is_refused() -> None:
    with pytest.raises(ArchiveError, match="'torchserv'; did you mean 'torchserve'"):
        Sandbox(Path("any.mar"), server="torchserv")


def test_a_worker_sees_what_torch_and_the_archives_engine_need_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = set(hidden_packages())
    assert {"torchvision", "lightning", "typer", "yaml", "ts", "pytest", "openvino"} <= hidden
    assert not {"torch", "numpy", "PIL", "sympy", "filelock", "typing_extensions", "psutil"} & hidden
    assert "openvino" not in hidden_packages(("openvino",))
    simd = {**owners(), "PIL": {"pillow-simd"}}
    monkeypatch.setattr("archive.sandbox.owners", lambda: simd)
    assert "PIL" not in hidden_packages()


def test_batches_are_timed_and_the_cost_of_a_worker_is_measured(tiny_built: Built) -> None:
    with Sandbox(tiny_built.path, environment={"BEELINE_THREADS": "1", "BEELINE_DEVICE": "cpu"}) as sandbox:
        about = sandbox.take([RED, b"no picture"])
        replies = list(sandbox.time_batches((1, 4), seconds=20.0, lone=2))
    assert (about["model"], about["version"], about["classes"]) == ("tiny", "1.0", 3)
    assert about["refused"].startswith("the body starts with")
    # One cost: on PyTorch there is no second model for lone pictures.
    assert [reply.get("batch") for reply in replies] == [1, 4, None]
    assert all(reply["ms"] > 0 for reply in replies[:2])
    assert replies[2]["cost"]["memory"] > 100 << 20
    assert replies[2]["cost"]["load_seconds"] > 0


def test_a_worker_on_openvino_costs_a_second_model_for_lone_pictures(openvino_model: Path, tmp_path: Path) -> None:
    mar = pack(openvino_model, tmp_path / "colours.mar")
    with Sandbox(mar, environment={"BEELINE_THREADS": "1", "BEELINE_LONE_THREADS": "1"}) as sandbox:
        sandbox.take([RED])
        first, second = [reply for reply in sandbox.time_batches((2,), seconds=20.0, lone=2) if "cost" in reply]
    assert (first.get("threads"), second["threads"]) == (None, "2")
    assert second["cost"]["load_seconds"] > first["cost"]["load_seconds"]


def parameters(function: object) -> list[tuple[str, object]]:
    assert callable(function)
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def public(kind: type) -> dict[str, object]:
    return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}


def compare(fake: type, real: type) -> None:
    fakes, reals = public(fake), public(real)
    for name, member in reals.items():
        assert name in fakes, f"the fake lacks {name}"
        if isinstance(member, property):
            assert isinstance(fakes[name], property)
        elif callable(member):
            assert parameters(fakes[name]) == parameters(member), name
    assert {name for name in fakes if callable(fakes[name])} - set(reals) <= {"begin_batch"}


def test_it_has_the_methods_and_attributes_of_torchserves_context() -> None:
    from ts.context import Context, RequestProcessor

    compare(FakeTorchServeContext, Context)
    compare(FakeRequest, RequestProcessor)
    assert [name for name, _ in parameters(FakeTorchServeContext)] == [name for name, _ in parameters(Context)]
    real = Context("model", "/folder", {}, 8, None, "1")
    fake = FakeTorchServeContext("model", "/folder", {}, 8, None, "1")
    unused = {"header_key_sequence_id", "header_key_sequence_start", "header_key_sequence_end"}
    attributes = {name for name in vars(real) if not name.startswith("_")} - unused
    assert attributes <= {name for name in vars(fake) if not name.startswith("_")}
    assert fake.system_properties == real.system_properties


def test_the_metrics_have_the_parameters_of_torchserves() -> None:
    from ts.metrics.metric_cache_abstract import MetricCacheAbstract

    for name, member in public(FakeMetrics).items():
        if callable(member):
            real = [key for key, _ in parameters(getattr(MetricCacheAbstract, name))]
            assert [key for key, _ in parameters(member)] == real[: len(parameters(member))], name


def engine(device: str, **more: object) -> SimpleNamespace:
    """Return a stand-in. Only an engine with `on_device` takes pixels on its device; others copy them by themselves."""
    return SimpleNamespace(choice={"device": Choice(device, "asked for")}, forward=len, **more)


def test_the_forward_pass_is_timed_without_copies_where_the_engine_can() -> None:
    for each in (engine("cuda:0"), engine("cpu"), engine("cpu", on_device=len)):
        forward, place = forward_of(each)
        assert (forward, place(7)) == (each.forward, 7)
    assert forward_of(engine("cuda:0", on_device=len))[0] != len


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ],
)
def test_the_words_of_libraries_for_too_little_memory(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert not out_of_memory(ValueError(text))
    assert not out_of_memory(RuntimeError("shape '[2, 3]' is invalid"))
