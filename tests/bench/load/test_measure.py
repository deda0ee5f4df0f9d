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
from bench.load import Outcome, Plan
from bench.load import measure as room
from bench.load.measure import Measured, bars, check_address, limits, measure, parse, phase, resolve, view, watching
from cli.bench import load
from tests.bench.load.conftest import PICTURES, Arrival, LocalServer, Respond, Serve, answer, good, plan
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


async def slow(arrival: Arrival) -> bytes:
    await asyncio.sleep(0.05)
    return answer(b"{}", "200 OK", "X-Batch-Size: 4")


def measured(server: LocalServer, *thresholds: str, **changes: Any) -> Measured:
    console = Console(file=io.StringIO())
    return measure(plan(server, **{"clients": 2, **changes}), console, tuple(map(parse, thresholds)), command="again")


def test_the_record_has_the_figures_and_what_they_are_of(serve: Serve) -> None:
    server = serve(slow)
    found = measured(server, "p95>60s", "errors>0")
    assert found.exit_code == 0
    made = found.record
    assert made.kind == "load"
    assert made.command == "again"
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
    monkeypatch.setattr(room, "_BUSY", 0.0)
    found = measured(serve(good), "rps<1000000")
    assert found.record.result["client_limited"] is True
    assert "the client is the limit" in found.record.result["sentence"]
    assert found.exit_code == 2


def test_errors_are_the_servers_whoever_is_the_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(arrival: Arrival) -> bytes:
        return answer(b"{}", "429 Too Many Requests" if arrival.index % 2 else "200 OK")

    monkeypatch.setattr(room, "_BUSY", 0.0)
    assert measured(serve(refuse), "errors>0").exit_code == 1


def test_no_good_answer_at_all_is_exit_code_1(serve: Serve) -> None:
    async def fail(arrival: Arrival) -> bytes:
        return answer(b"{}", "500 Broken")

    assert measured(serve(fail)).exit_code == 1


def test_a_cross_check_that_cannot_be_made_leaves_the_figures(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise Undetermined("the tool broke")

    monkeypatch.setattr(room, "check_possible", lambda plan: None)
    monkeypatch.setattr(room, "cross_check", fail)
    shown = io.StringIO()
    found = measure(plan(serve(slow), clients=1), Console(file=shown), other=True)
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

    async def respond(arrival: Arrival) -> bytes:
        await asyncio.sleep(0.02)
        # The first one came before the load.
        if arrival.index == 30:
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
    assert [each for each in psutil.process_iter() if _session(each.pid) == process.pid] == []
    assert "Traceback" not in err


def outcome(answers: int = 40, cpu: float = 0.1, **changes: float) -> Outcome:
    """Return one at four of ten seconds; of each four answers three are good, of batches of 3 and 8."""
    made = Outcome(Plan("http://127.0.0.1:1/predictions/x", PICTURES, **(changes or {"clients": 2})))  # type: ignore[arg-type]
    made.begin, made.end, made.now, made.cpu = 100.0, 110.0, 104.0, 4 * cpu
    for index in range(answers):
        status, size = (429, {}) if index % 4 == 3 else (200, {b"x-batch-size": b"3" if index % 4 == 2 else b"8"})
        made.add(101.0, 101.1, status, size)
    return made


def test_the_client_is_the_limit_where_its_processor_time_or_its_lateness_says_so() -> None:
    assert limits(outcome(1000, cpu=0.7)) is None
    # A server that answers few of many arrivals is no fault of the client's.
    assert limits(outcome(100, cpu=0.2, rate=1000.0)) is None
    assert "it used 85% of one core, which is enough for 294 requests/s" in str(limits(outcome(1000, cpu=0.85)))
    late = outcome(100, rate=30.0)
    late.late.extend([1.0] * 100)
    assert limits(late) is None
    late.late.extend([40.0] * 100)
    assert "its own lateness" in str(limits(late))


# Addresses.


def catalog(*names: str) -> Respond:
    async def respond(arrival: Arrival) -> bytes:
        assert arrival.head.startswith("GET /catalog.json ")
        return answer(json.dumps({"models": [{"name": name} for name in names]}).encode())

    return respond


async def missing(arrival: Arrival) -> bytes:
    return answer(b'{"message": "Model not found: x"}', "404 Not Found")


def test_a_full_address_is_kept_and_a_root_goes_with_the_named_or_only_model(serve: Serve) -> None:
    for url in ("http://127.0.0.1:1/predict", "http://127.0.0.1:1/predictions/x", "http://127.0.0.1:1/a/b?c=d"):
        assert resolve(url) == url
    assert resolve("http://127.0.0.1:1/predictions/x/2.0", "x") == "http://127.0.0.1:1/predictions/x/2.0"
    assert resolve("http://127.0.0.1:1/", "a b") == "http://127.0.0.1:1/predictions/a%20b"
    server = serve(catalog("ants"))
    assert resolve(server.url) == f"{server.url}/predictions/ants"


def test_an_address_that_cannot_be_decided_is_an_error(serve: Serve) -> None:
    with pytest.raises(BeelineError, match="serves ants, bees; add --model NAME"):
        resolve(serve(catalog("ants", "bees")).url)
    with pytest.raises(BeelineError, match="has no catalog"):
        resolve(serve(missing).url)
    with pytest.raises(BeelineError, match="--model is 'y'"):
        resolve("http://127.0.0.1:1/predictions/x", "y")
    with pytest.raises(Undetermined, match="nothing answers"):
        resolve("http://127.0.0.1:1")


def test_an_address_is_asked_for_the_first_picture_before_any_load(serve: Serve) -> None:
    server = serve(good)
    check_address(Plan(f"{server.url}/predictions/x?y=z", PICTURES, clients=1))
    assert server.arrivals[0].head.startswith("POST /predictions/x?y=z ")
    assert server.arrivals[0].body == PICTURES.bodies[0]
    with pytest.raises(BeelineError, match=r"answers 404 .*Model not found: x"):
        check_address(Plan(f"{serve(missing).url}/predictions/x", PICTURES, clients=1))


# Thresholds.

SUMMARY: dict[str, Any] = {
    **{"p50_ms": 100.0, "p95_ms": 500.0, "p99_ms": 1000.0, "max_ms": None, "per_second": 300.0},
    **{"good_per_second": 290.0, "failed": 5, "requests": 500, "backlog": None},
}


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("p95>500ms", 500, True),
        ("p95>=500ms", 500, False),
        ("p95 > 499.9 ms", 500, False),
        ("p99>=1s", 1, False),
        ("p50>.2s", 0.1, True),
        ("rps<300", 300, True),
        ("rps<=300/s", 300, False),
        ("good<300", 290, False),
        ("errors>0", 5, False),
        ("errors>0.9%", 1, False),
        ("errors>1%", 1, True),
        # What was not measured does not hold: no good answer has no slowest one.
        ("max>10s", None, False),
        ("backlog>0", None, False),
    ],
)
def test_each_threshold_is_judged_in_its_own_unit(text: str, value: float | None, holds: bool) -> None:
    verdict = parse(text).judge(SUMMARY)
    assert (verdict.text, verdict.value, verdict.holds) == (text, value, holds)


def test_a_backlog_is_that_at_the_end() -> None:
    figures = SUMMARY | {"backlog": {"at_end": 40, "growing": True, "per_second": 4.0}}
    assert parse("backlog>40").judge(figures).holds
    assert not parse("backlog>39").judge(figures).holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p59>500ms", "quantity 'p59'; did you mean 'p99'"),
        ("latency>5ms", "known are backlog, errors, good, max, p50, p95, p99, rps"),
        ("p95>500", "write 'p95>500ms' or 'p95>500s'"),
        ("rps<300ms", "write 'rps<300' or 'rps<300/s'"),
        ("p95>fast", "give a quantity"),
        ("", "give a quantity"),
    ],
)
def test_a_threshold_that_is_not_understood_says_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)


# The live view.


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, color_system=None), out


def test_the_view_has_rate_percentiles_codes_and_the_histogram() -> None:
    screen, out = console(terminal=True)
    made = outcome(rate=10.0)
    made.waiting = [(101.0, 3), (102.0, 4)]
    screen.print(view(made, 12.0))
    text = out.getvalue()
    for words in ("12 answers/s now, 10.0 on average", "p50 100.0 ms, p95 100.0 ms, p99 100.0 ms", "4 of 10 s"):
        assert words in text
    assert "30 times 200, 10 times 429" in text
    assert "4 requests" in text
    assert text.index("\n3  █") < text.index("\n8  ██")
    assert "66.7%" in text
    assert [size for size, _, _ in bars({"16": 10, "8": 5})] == ["8", "16"]


def test_a_terminal_is_redrawn_and_elsewhere_there_are_plain_lines() -> None:
    shown = []
    for terminal in (True, False):
        screen, out = console(terminal)
        with watching(screen) as watch:
            for now in (99.0, 100.5, 102.5, 103.0, 105.0):
                made = outcome()
                made.now = now
                watch(made)
        shown.append(out.getvalue())
    redrawn, plain = shown
    assert all(words in redrawn for words in ("warming up", "2 of 10 s", "5 of 10 s", "\x1b["))
    assert [line.partition(":")[0] for line in plain.splitlines()] == ["2 of 10 s", "5 of 10 s"]
    assert "30 times 200, 10 times 429" in plain
    assert "\x1b" not in plain
    made.now = 110.0
    assert phase(made) == "waiting for the last answers"


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None
