"""`beeline bench load` as a whole: record, thresholds, exit codes, and an end by Ctrl-C."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from beeline.errors import BeelineError, ConfigError, Undetermined
from bench import record
from bench.load import ceiling
from bench.load import measure as room
from bench.load.measure import Asked, Measured, measure
from bench.load.threshold import parse
from cli.bench import load
from tests.bench.load.conftest import Arrival, LocalServer, Serve, answer, good, plan
from tests.conftest import ROOT

# The command without a shell, as `beeline` runs it.
COMMAND = """
import sys
from pathlib import Path
import click, typer
from cli.bench import load
try:
    load(url=sys.argv[1], picture=Path(sys.argv[2]), clients=3, seconds=600, warm_up=0, as_json=True)
except (typer.Exit, click.exceptions.Exit) as ended:
    sys.exit(ended.exit_code)
"""


@pytest.fixture(autouse=True)
def _short_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_SECONDS", 0.3)


async def slow(arrival: Arrival) -> bytes:
    await asyncio.sleep(0.05)
    return answer(b"{}", "200 OK", "X-Batch-Size: 4")


def measured(server: LocalServer, *thresholds: str, **changes: Any) -> Measured:
    asked = Asked(plan(server, **{"clients": 2, **changes}), tuple(map(parse, thresholds)))
    return measure(asked, Console(file=io.StringIO()))


def test_the_record_has_the_figures_and_what_they_are_of(serve: Serve) -> None:
    server = serve(slow)
    found = measured(server, "p95>60s", "errors>0")
    assert found.exit_code == 0
    made = found.record
    assert made.kind == "load"
    assert made.command == (
        f"beeline bench load {server.url}/predictions/x --pictures pictures --clients 2 --seconds 0.5 --warm-up 0.1 "
        "--seed 0 --fail-if 'p95>60s' --fail-if 'errors>0'"
    )
    result = made.result
    assert result["url"] == f"{server.url}/predictions/x"
    assert [each["holds"] for each in result["thresholds"]] == [True, True]
    assert result["ceiling_per_second"] > result["per_second"] > 0
    assert result["client_limited"] is False
    assert result["crosscheck"] is None
    assert result["batch_sizes"] == {"4": result["requests"]}
    assert found.text.startswith("2 clients: ")
    assert "pass         fail if errors>0: it is 0" in found.text


def test_a_crossed_threshold_is_exit_code_1(serve: Serve) -> None:
    found = measured(serve(slow), "p50>1ms", "rps<0.1")
    assert found.exit_code == 1
    assert [each["holds"] for each in found.record.result["thresholds"]] == [False, True]
    assert "FAIL         fail if p50>1ms: it is " in found.text


def test_where_the_client_is_the_limit_nothing_is_said_of_the_server(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceiling, "measure", lambda plan, size: ceiling.Ceiling(1.0, 1.0))
    found = measured(serve(good), "rps<1000000")
    assert found.record.result["client_limited"] is True
    assert "the client is the limit" in found.record.result["sentence"]
    assert found.exit_code == 2


def test_errors_are_the_servers_whoever_is_the_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(arrival: Arrival) -> bytes:
        return answer(b"{}", "429 Too Many Requests" if arrival.index % 2 else "200 OK")

    monkeypatch.setattr(ceiling, "measure", lambda plan, size: ceiling.Ceiling(1.0, 1.0))
    assert measured(serve(refuse), "errors>0").exit_code == 1


def test_no_good_answer_at_all_is_exit_code_1(serve: Serve) -> None:
    async def fail(arrival: Arrival) -> bytes:
        return answer(b"{}", "500 Broken")

    assert measured(serve(fail)).exit_code == 1


def test_a_cross_check_that_cannot_be_made_leaves_the_figures(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise Undetermined("the tool broke")

    monkeypatch.setattr(room, "tool_for", lambda plan: "ab")
    monkeypatch.setattr(room, "cross_check", fail)
    shown = io.StringIO()
    found = measure(Asked(plan(serve(slow), clients=1), cross_check=True), Console(file=shown))
    assert "no cross-check: the tool broke" in shown.getvalue()
    assert found.record.result["crosscheck"] is None
    assert found.record.result["good_per_second"] > 0
    assert found.exit_code == 2


def test_the_command_writes_a_line_and_prints_json(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jpg").write_bytes(b"picture")
    out = tmp_path / "results.jsonl"
    server = serve(slow)
    options: dict[str, Any] = {"seconds": 0.4, "warm_up": 0, "out": out, "as_json": True}
    load(f"{server.url}/predictions/x", picture=tmp_path / "one.jpg", clients=1, **options)
    load(server.url, pictures=tmp_path, model="x", rate=20.0, evenly=True, **options)
    closed, opened = record.read(out)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [closed.result, opened.result] == printed
    assert (closed.result["mode"], opened.result["mode"]) == ("closed", "open")
    assert "--picture one.jpg --clients 1" in closed.command
    assert "--rate 20" in opened.command
    assert opened.command.endswith("--evenly")


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name what to send"):
        load("http://127.0.0.1:1/x")
    with pytest.raises(ConfigError, match="name what to send"):
        load("http://127.0.0.1:1/x", picture=tmp_path, pictures=tmp_path)
    (tmp_path / "one.jpg").write_bytes(b"picture")
    with pytest.raises(ConfigError, match="either clients"):
        load("http://127.0.0.1:1/x", picture=tmp_path / "one.jpg", clients=1, rate=1)
    with pytest.raises(BeelineError, match="is not there"):
        load("http://127.0.0.1:1/x", picture=tmp_path / "none.jpg")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_sums_up_and_leaves_nothing(serve: Serve, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "one.jpg").write_bytes(b"picture")
    reached: list[bool] = []

    async def respond(arrival: Arrival) -> bytes:
        await asyncio.sleep(0.02)
        # The first one came before the load.
        if arrival.index == 30:
            children = psutil.Process(process.pid).children(recursive=True)
            reached.append(not children)
            process.send_signal(number)
        return answer()

    server = serve(respond)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, f"{server.url}/predictions/x", str(tmp_path / "one.jpg")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    found = json.loads(out.splitlines()[-1])
    assert found["interrupted"] is True
    assert found["failed"] == 0
    assert 20 < found["statuses"]["200"] < len(server.arrivals)
    assert 0 < found["seconds"] < 600
    assert found["per_second"] > 0
    assert "; interrupted" in found["sentence"]
    assert reached == [True]  # the trivial server had ended
    assert [each for each in psutil.process_iter() if _session(each.pid) == process.pid] == []
    assert "Traceback" not in err


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None
