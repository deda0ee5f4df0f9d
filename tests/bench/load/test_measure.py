"""`beeline bench load` as a whole: record, thresholds, exit codes, and an end by Ctrl-C."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from beeline.errors import BeelineError, ConfigError, Undetermined
from bench import record
from bench.load import Outcome, Plan
from bench.load import measure as room
from bench.load.measure import check_address, cross_check, limits, measure, parse, resolve, rows, text, watching
from bench.pictures import Pictures
from cli.bench import load
from tests.bench.load.conftest import Arrival, LocalServer, Respond, Serve, always, answer, good, outcome, plan
from tests.conftest import ROOT

slow = always(answer(b"{}", "200 OK", "X-Batch-Size: 4"), 0.05)
broken = always(answer(b"{}", "500 Broken"))
missing = always(answer(b'{"message": "Model not found: x"}', "404 Not Found"))


def measured(server: LocalServer, *thresholds: str, **changes: Any) -> tuple[dict[str, Any], int, str]:
    """Return the result of a load, the exit code, and the text for people."""
    load = plan(server, **{"clients": 2, **changes})
    made, code = measure(load, Console(file=io.StringIO()), tuple(map(parse, thresholds)), False, "again")
    assert (made.kind, made.command) == ("load", "again")
    return made.result, code, text(made.result)


def test_the_record_has_the_figures_and_what_they_are_of(serve: Serve) -> None:
    server = serve(slow)
    result, code, said = measured(server, "p95>60s", "errors>0")
    assert code == 0
    assert result["url"] == f"{server.url}/predictions/x"
    assert [each["holds"] for each in result["thresholds"]] == [True, True]
    assert result["ceiling_per_second"] > result["per_second"] > 0
    assert result["client_limited"] is False
    assert result["crosscheck"] is None
    assert result["batch_sizes"] == {"4": result["requests"]}
    low, high = result["intervals_ms"]["p50_ms"]
    assert low <= result["p50_ms"] <= high
    # Of so few answers nobody knows where the 99th percentile is.
    assert result["intervals_ms"]["p99_ms"] is None
    assert said.startswith("2 clients: ")
    assert "pass         fail if errors>0: it is 0" in said


async def refusing(arrival: Arrival) -> bytes:
    return answer(b"{}", "429 Too Many Requests" if arrival.index % 2 else "200 OK")


@pytest.mark.parametrize(
    ("respond", "busy", "thresholds", "expected", "words"),
    [
        (slow, 1.0, ("p50>1ms", "rps<0.1"), 1, "FAIL         fail if p50>1ms: it is "),
        (broken, 1.0, (), 1, "no answer of 200"),
        # The server is not to blame for a slow client, but for its errors.
        (good, 0.0, ("rps<1000000",), 2, "the client is the limit"),
        (refusing, 0.0, ("errors>0",), 1, "FAIL         fail if errors>0: it is "),
    ],
)
def test_the_exit_code_is_1_where_the_server_fails_and_2_where_the_client_is_the_limit(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, respond: Respond, busy: float, thresholds: tuple[str, ...],
    expected: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(room, "_BUSY", busy)
    result, code, said = measured(serve(respond), *thresholds)
    assert code == expected
    assert words in said
    assert result["client_limited"] is (busy == 0)


def test_a_cross_check_that_cannot_be_made_leaves_the_figures(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise Undetermined("the tool broke")

    monkeypatch.setattr(room, "check_possible", lambda plan: None)
    monkeypatch.setattr(room, "cross_check", fail)
    shown = io.StringIO()
    made, code = measure(plan(serve(slow), clients=1), Console(file=shown), (), True, "")
    assert "no cross-check: the tool broke" in shown.getvalue()
    assert made.result["crosscheck"] is None
    assert made.result["good_per_second"] > 0
    assert code == 2


def test_the_command_writes_a_line_and_prints_json(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jpg").write_bytes(b"picture")
    out = tmp_path / "results.jsonl"
    server = serve(slow)
    options: dict[str, Any] = {"seconds": 0.4, "warm_up": 0, "out": out, "as_json": True}
    load(f"{server.url}/predictions/x", picture=tmp_path / "one.jpg", clients="1", **options)
    load(server.url, pictures=tmp_path, model="x", rate=20.0, evenly=True, **options)
    closed, opened = record.read(out)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [closed.result, opened.result] == printed
    assert (closed.result["mode"], opened.result["mode"]) == ("closed", "open")


def test_a_sweep_is_a_record_and_a_row_for_each_number_of_clients(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jpg").write_bytes(b"picture")
    url, out = f"{serve(slow).url}/predictions/x", tmp_path / "results.jsonl"
    load(url, picture=tmp_path / "one.jpg", clients="1:3:2", seconds=0.3, warm_up=0, out=out)
    assert [each.result["clients"] for each in record.read(out)] == [1, 3]
    titles, *rows = capsys.readouterr().out.splitlines()
    assert titles.split() == ["concurrency", "inferences/s", "p50", "ms", "p90", "ms", "p95", "ms", "p99", "ms"]
    figures = [[float(each) for each in row.split()] for row in rows]
    assert [row[0] for row in figures] == [1, 3]
    for _, rate, *times in figures:
        assert rate > 0
        assert times == sorted(times)
        assert times[0] >= 50
    for wrong in ("0", "3:1", "1:8:0", "1:901", "many"):
        with pytest.raises(typer.BadParameter, match="is none of: 1 to 900, a sweep as 1:8"):
            load(url, clients=wrong)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_load_gives_its_figures_and_leaves_no_process(
    serve: Serve, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "one.jpg").write_bytes(b"picture")

    async def respond(arrival: Arrival) -> bytes:
        await asyncio.sleep(0.02)
        # The first one came before the load.
        if arrival.index == 30:
            process.send_signal(number)
        return answer()

    server = serve(respond)
    options = ["--picture", str(tmp_path / "one.jpg"), "--clients=3", "--seconds=600", "--warm-up=0", "--json"]
    command = [sys.executable, "-m", "cli", "bench", "load", f"{server.url}/predictions/x", *options]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    found = json.loads(out.splitlines()[-1])
    assert (found["interrupted"], found["failed"]) == (True, 0)
    assert 20 < found["statuses"]["200"] < len(server.arrivals)
    assert 0 < found["seconds"] < 600
    assert "; interrupted" in found["sentence"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert "Traceback" not in err


def answered(answers: int = 40, cpu: float = 0.1, **changes: float) -> Outcome:
    """Return an outcome at four of ten seconds: of each four answers three are good, of batches of 3 and 8."""
    made = outcome(104.0, **changes)
    made.cpu = 4 * cpu
    for index in range(answers):
        status, size = (429, {}) if index % 4 == 3 else (200, {b"x-batch-size": b"3" if index % 4 == 2 else b"8"})
        made.add(101.0, 101.1, status, size)
    return made


def test_the_client_is_the_limit_where_its_processor_time_or_its_lateness_says_so() -> None:
    assert limits(answered(1000, cpu=0.7).summary()) is None
    # A server that answers few of many arrivals is no fault of the client's.
    assert limits(answered(100, cpu=0.2, rate=1000.0).summary()) is None
    busy = str(limits(answered(1000, cpu=0.85).summary()))
    assert "it used 85% of the one core that it can use, enough for 294 requests/s" in busy
    late = answered(100, rate=30.0)
    late.late.extend([1.0] * 100)
    assert limits(late.summary()) is None
    late.late.extend([40.0] * 100)
    assert "its own lateness" in str(limits(late.summary()))


# Addresses.


def catalog(*names: str) -> Respond:
    async def respond(arrival: Arrival) -> bytes:
        assert arrival.head.startswith("GET /catalog.json ")
        return answer(json.dumps({"models": [{"name": name} for name in names]}).encode())

    return respond


def test_a_full_address_is_kept_and_a_root_gets_the_named_or_only_model(serve: Serve) -> None:
    for url in ("http://127.0.0.1:1/predict", "http://127.0.0.1:1/predictions/x", "http://127.0.0.1:1/a/b?c=d"):
        assert resolve(url) == url
    assert resolve("http://127.0.0.1:1/predictions/x/2.0", "x") == "http://127.0.0.1:1/predictions/x/2.0"
    assert resolve("http://127.0.0.1:1/", "a b") == "http://127.0.0.1:1/predictions/a%20b"
    server = serve(catalog("ants"))
    assert resolve(server.url) == f"{server.url}/predictions/ants"


@pytest.mark.parametrize(
    ("respond", "url", "model", "message"),
    [
        (catalog("ants", "bees"), "", None, "serves ants, bees; add --model NAME"),
        (missing, "", None, "has no catalog"),
        (None, "http://127.0.0.1:1/predictions/x", "y", "--model is 'y'"),
        (None, "http://127.0.0.1:1", None, "nothing answers"),
    ],
)
def test_an_address_that_cannot_be_decided_is_an_error(
    serve: Serve, respond: Respond | None, url: str, model: str | None, message: str
) -> None:
    with pytest.raises(BeelineError, match=message):
        resolve(serve(respond).url if respond else url, model)


def test_the_loads_first_picture_is_sent_to_an_address_before_any_load(serve: Serve) -> None:
    server = serve(good)
    load = Plan(f"{server.url}/predictions/x?y=z", ONE, clients=1)
    check_address(load)
    assert server.arrivals[0].head.startswith("POST /predictions/x?y=z ")
    assert server.arrivals[0].body == load.requests()[0][1]
    with pytest.raises(BeelineError, match=r"answers 404 .*Model not found: x"):
        check_address(Plan(f"{serve(missing).url}/predictions/x", ONE, clients=1))
    with pytest.raises(Undetermined, match=r"nothing answers at http://127\.0\.0\.1:1;"):
        check_address(Plan("http://127.0.0.1:1/predictions/x", ONE, clients=1))


# The same load by `ab`.

ONE = Pictures("a.jpg", ("a.jpg",), (b"picture" * 1000,))


@pytest.mark.server
@pytest.mark.skipif(shutil.which("ab") is None, reason="ab is not installed")
def test_ab_sends_the_same_picture_and_takes_turns(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    free = asyncio.Semaphore(2)

    async def respond(arrival: Arrival) -> bytes:
        # Two at a time, each after 20 ms: the rate is the same for every client.
        async with free:
            await asyncio.sleep(0.02)
        return answer(b"{}", "200 OK", "Connection: keep-alive")

    monkeypatch.setattr(room, "_SHORTEST", 1.0)
    server = serve(respond)
    # Not a timing: a tool that counts wrongly, or sends something else, is far off.
    assert 0.5 < cross_check(plan(server, pictures=ONE, clients=4), latency_ms=40, rounds=1)["ratio"] < 2
    assert {arrival.body for arrival in server.arrivals} == set(ONE.bodies)
    assert any("ApacheBench" in arrival.head for arrival in server.arrivals)


def test_ab_gets_the_pictures_own_type_and_its_failure_is_an_error(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ab = tmp_path / "ab"
    ab.write_text('#!/bin/sh\necho "$@"\necho refused >&2\nexit 1\n')
    ab.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    png = Pictures("a.png", ("a.png",), (b"picture",))
    with pytest.raises(Undetermined, match=r"printed no rate: .* -n2 -c2 -T image/png .* refused"):
        room.ab(plan(serve(good), pictures=png, clients=2), 1)


def test_a_load_that_ab_cannot_make_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(good)
    one = plan(server, clients=1, pictures=ONE)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    room.check_possible(one)
    for other in (plan(server, rate=1.0, pictures=ONE), plan(server, clients=1)):
        with pytest.raises(Undetermined, match="one --picture"):
            room.check_possible(other)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Undetermined, match="apt-get install"):
        room.check_possible(one)


@pytest.mark.parametrize(("rate", "ratio", "agree"), [(100.0, 1.05, True), (100.0, 0.94, False)])
def test_within_five_per_cent_they_agree(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, rate: float, ratio: float, agree: bool
) -> None:
    class Ours:
        def summary(self) -> dict[str, float]:
            return {"per_second": rate * ratio}

    monkeypatch.setattr(room, "run", lambda plan: Ours())
    monkeypatch.setattr(room, "ab", lambda plan, requests: rate)
    assert cross_check(plan(serve(good), clients=1, pictures=ONE), latency_ms=1) == {
        **{"tool": "ab", "per_second": rate, "ratio": ratio, "agree": agree}
    }


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
    assert parse(text)(SUMMARY) == {"text": text, "value": value, "holds": holds}


def test_a_backlog_is_that_at_the_end() -> None:
    figures = SUMMARY | {"backlog": {"at_end": 40, "growing": True, "per_second": 4.0}}
    assert parse("backlog>40")(figures)["holds"]
    assert not parse("backlog>39")(figures)["holds"]


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


def test_lines_for_people_have_percentiles_codes_and_a_bar_for_each_batch_size() -> None:
    made = answered(rate=10.0)
    made.waiting = [(101.0, 3), (102.0, 4)]
    lines = rows(made.summary())
    assert ("answers", "30 times 200, 10 times 429") in lines
    assert ("latency", "p50 100.0 ms, p95 100.0 ms, p99 100.0 ms") in lines
    assert ("backlog", "4 requests, +0.0 a second") in lines
    assert [value.split() for name, value in lines if name == "batches of"] == [
        ["3", "█" * 20, "33.3%"],
        ["8", "█" * 40, "66.7%"],
    ]
    assert ("batch sizes", "no answer had X-Batch-Size") in rows(answered(0).summary())


def test_a_terminal_is_redrawn_and_elsewhere_there_are_plain_lines() -> None:
    shown = []
    for terminal in (True, False):
        out = io.StringIO()
        with watching(Console(file=out, force_terminal=terminal, width=120, color_system=None)) as watch:
            for now in (99.0, 100.5, 102.5, 103.0, 105.0):
                made = answered()
                made.now = now
                watch(made)
        shown.append(out.getvalue())
    redrawn, plain = shown
    assert all(words in redrawn for words in ("warming up", "2 of 10 s", "5 of 10 s", "answers/s now", "\x1b["))
    assert [line.partition(":")[0] for line in plain.splitlines()] == ["2 of 10 s", "5 of 10 s"]
    assert "30 times 200, 10 times 429" in plain
    assert "\x1b" not in plain
    made.now = 110.0
    assert room.phase(made) == "waiting for the last answers"
