"""`beeline serve` without a server: each mistake and each missing thing is one sentence and an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from beeline.errors import BeelineError
from cli.serve import app
from tests.serve.conftest import MakeArchive

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with its own state folder; return its standard output, or raise its error."""
    for name in ("BATCH_SIZE", "WORKERS", "LINGER_MS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return invoke


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "--server", "torchsever"], "--server is 'torchsever'; did you mean 'torchserve'?"),
        (["up", "--store", "."], "holds no archive; build one with `beeline archive build`"),
        (["up", "--mar", "nothing.mar"], "nothing.mar is missing"),
        (["up", "--name", "../x"], "--name is '../x'; allowed"),
        (["down"], "no server is running; start one with `beeline serve up`"),
        (["status", "--name", "x"], "no server is running"),
        (["scale", "fake", "--min", "1"], "no server is running"),
        (["logs"], "no server has run here yet"),
        (["gateway"], "name either servers of this machine, as in `beeline serve gateway one two`, or --backends"),
        (["gateway", "one", "--show-logs", "all"], "--show-logs goes with --backends"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, arguments: list[str], said: str) -> None:
    with pytest.raises(BeelineError) as caught:
        run(*arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the package torchserve is not installed here; run `make setup`"),
        (["--nginx", "/nothing"], "no nginx 1.22 or later: /nothing cannot be run"),
    ],
)
def test_a_missing_program_exits_2(
    run: Run, make_fake: MakeArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("serve.servers.torchserve.TorchServe.package", "torchserve_that_is_not_there")
    with pytest.raises(BeelineError) as caught:
        run("up", "--mar", str(make_fake(tmp_path)), *arguments)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_mistake_in_the_file_is_found_before_anything_starts(
    run: Run, make_fake: MakeArchive, tmp_path: Path
) -> None:
    config = tmp_path / "config.properties"
    config.write_text("job_queue_sise=1\n")
    with pytest.raises(BeelineError, match=r"config\.properties:1: unknown key job_queue_sise"):
        run("up", "--mar", str(make_fake(tmp_path)), "--config", str(config))
    assert not (tmp_path / "state").exists()


def test_without_a_server_status_says_what_to_do_and_there_is_nothing_to_stop(run: Run) -> None:
    assert "no server is running; start one with `beeline serve up`" in run("status")
    assert json.loads(run("status", "--json")) == {"servers": [], "ended": [], "swept": {}}
    assert json.loads(run("down", "--all", "--json")) == {"stopped": []}
