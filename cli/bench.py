"""`beeline bench`: measure, compare and tune."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beeline.errors import Undetermined
from cli.console import Json, err, fail, result, say

if TYPE_CHECKING:
    from bench.record import Record

app = typer.Typer(help="Measure, compare and tune.", no_args_is_help=True, add_completion=False)
Out = Annotated[Path | None, typer.Option(help="Add the record to this file, as a line of JSON.")]
Picture = Annotated[Path | None, typer.Option(help="The one picture to send.")]
Config = Annotated[Path | None, typer.Option(help="What is configured now. [default: config/config.properties]")]
_MOST = 900  # The client's `select` takes no descriptor over 1023.
Clients = Annotated[int, typer.Option(min=1, max=_MOST, help="Each client sends again when it has its answer.")]


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="A server's root, or the full address of its predictions.")],
    picture: Picture = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder whose pictures are sent in turn.")] = None,
    clients: Annotated[str | None, typer.Option(help="Clients, closed loop; a sweep as 1:8. [default: 50]")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Instead: arrivals a second, open loop.")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long to measure.")] = 10.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of the same load before, not counted.")] = 2.0,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request has failed.")] = 60.0,
    evenly: Annotated[bool, typer.Option("--evenly", help="Open loop: arrivals at equal distances.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of pictures and of the arrivals.")] = 0,
    model: Annotated[str | None, typer.Option(help="The model's name at a root. [default: its only one]")] = None,
    fail_if: Annotated[list[str] | None, typer.Option(help="Fail if 'p95>500ms', 'errors>0' ...; repeat it.")] = None,
    cross_check: Annotated[bool, typer.Option("--cross-check", help="Then let ab make the same load.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure a running server from outside: rate, latency, failures, batch sizes; exit 1 past a threshold."""
    from dataclasses import replace

    from bench.load import Plan
    from bench.load.measure import measure, parse, resolve, table, text
    from bench.pictures import choose
    from bench.record import append, check_writable, command_line

    check_writable(out)
    thresholds = tuple(parse(text) for text in fail_if or ())
    counts = [None] if clients is None and rate is not None else _steps(clients or "50")
    sent, command = choose(picture, pictures, None), command_line("beeline", sys.argv[1:])
    plan = Plan(resolve(url, model), sent, seconds, warm_up, counts[0], rate, not evenly, deadline, seed)
    measured = []
    for count in counts:
        record, code = measure(replace(plan, clients=count), err, thresholds, cross_check, command)
        append(out, record)
        measured.append((record.result, code))
        # Not a threshold, but a signal.
        if code > 2:
            break
    values = measured[0][0] if len(counts) == 1 else {"sweep": [each for each, _ in measured]}
    result(values, as_json, text(values) if len(counts) == 1 else table(values["sweep"]))
    if code := max(code for _, code in measured):
        fail(code)


@app.command()
def tune(
    archive: Annotated[str, typer.Argument(help="The path of a .mar file, or an archive's name in the store.")],
    p95: Annotated[str | None, typer.Option(help="Most throughput within this 95th percentile, as in 500ms.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Instead: lowest latency at so many arrivals/s.")
    ] = None,
    picture: Picture = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder to send. [default: golden pictures]")] = None,
    clients: Clients = 50,
    minutes: Annotated[float, typer.Option(min=0, help="Time for all of it; 0 answers from an interrupted run.")] = 5.0,
    server: Annotated[str, typer.Option(help="The kind of server, as docs/operate.md names it.")] = "torchserve",
    store: Annotated[Path | None, typer.Option(help="Folder of archives. [default: model_store]")] = None,
    config: Config = None,
    write: Annotated[bool, typer.Option("--write", "--yes", help="Change --config without asking.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Find batch size, workers, delay and threads for a latency budget or a rate, on the real server."""
    from bench import tune as tuner
    from bench.record import append, check_writable, command_line
    from bench.report import Run, page, text
    from bench.tune.grid import Goal
    from host.report import write as write_page

    check_writable(out)
    goal, path = Goal.parse(p95, rate, clients), (config or tuner.CONFIG).resolve()
    store, command = (store or tuner.STORE).resolve(), command_line("beeline", sys.argv[1:])
    outcome = tuner.tune(archive, goal, say, picture, pictures, minutes, server, store, path, command)
    record, change, journal, interruption = outcome
    append(out, record)
    plot = write_page(page([Run(record)]).html(), journal.with_suffix(".html"))
    say(text(record))
    diff, is_written = change.diff if change else "", False
    if change and diff:
        say(diff)
        # An interruption is no moment for a question or a change.
        if interruption is None:
            is_written = write or (sys.stdin.isatty() and typer.confirm(f"write this to {path}?", err=True))
        if is_written:
            change.write()
    if change is None:
        about = "the configuration file stays as it is: nothing measured holds the goal"
    elif is_written or not diff:
        about = f"{path} is changed" if is_written else f"{path} already has these numbers"
    else:
        about = f"{path} is unchanged; {'--minutes 0 ' if interruption else ''}--write makes the change shown above"
    lines = [record.result["sentence"], f"plot: {plot}", about]
    if interruption is None:
        journal.unlink()
    else:
        lines.append("interrupted; the same command goes on from there")
    code = interruption.exit_code if interruption else 0 if record.result["holds"] else 1
    result({**record.result, "diff": diff, "written": is_written, "plot": str(plot)}, as_json, "\n".join(lines))
    if code:
        fail(code)


@app.command()
def compare(
    archive: Annotated[Path, typer.Argument(help="The .mar file that every server serves.")],
    picture: Annotated[Path, typer.Option(help="The picture to send, or a folder whose pictures are sent in turn.")],
    pictures: Annotated[Path | None, typer.Option(help="Pictures to check labels on, by an fp32 reference.")] = None,
    servers: Annotated[str | None, typer.Option(help="Which, with commas. [default: all; 'list' names them]")] = None,
    clients: Clients = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each server; fewer than 5 prove nothing.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long each turn is measured.")] = 8.0,
    batch_size: Annotated[int | None, typer.Option(help="Of every server with our engine.")] = None,
    workers: Annotated[int | None, typer.Option(help="Of every server with our engine.")] = None,
    max_batch_delay: Annotated[int | None, typer.Option(help="Milliseconds; of every server with our engine.")] = None,
    reference: Annotated[Path | None, typer.Option(help="An fp32 archive for the others. [default: ARCHIVE]")] = None,
    config: Config = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compare servers in turn on the same model and pictures: as their documentation has it, and with our engine."""
    from bench.compare import comparison
    from bench.record import check_writable, command_line
    from bench.report import text
    from host import signals
    from serve.config import Overrides

    request = comparison.Request(
        archive=archive.resolve(),
        picture=picture,
        agreement=pictures,
        servers=tuple(name.strip() for name in (servers or "").split(",") if name.strip()),
        clients=clients,
        rounds=rounds,
        seconds=seconds,
        overrides=Overrides(batch_size, workers, max_batch_delay),
        reference=reference,
        command=command_line("beeline", sys.argv[1:]),
        config_file=config.resolve() if config else comparison.Request.config_file,
    )
    if request.servers == ("list",):
        known = {peer.name: peer.pattern for peer in request.peers()}
        result({"servers": known}, as_json, "\n".join(f"{name}: {pattern}" for name, pattern in known.items()))
        return
    check_writable(out)
    with signals.as_exceptions():
        record, journal = comparison.compare(request, say)
    _end(record, out, text(record), as_json, 130 if record.result["interrupted"] else 0)
    journal.unlink()


@app.command()
def sweep(
    source: Annotated[Path, typer.Argument(help="A .mar file, an archive's name in the store, or a run's folder.")],
    picture: Picture = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder; pictures are taken evenly from all of it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:index].")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Of the forward pass, and of the decoding.")] = 1,
    least: Annotated[int, typer.Option(min=1, help="Go on to this batch size at least, plateau or not.")] = 1,
    most: Annotated[int, typer.Option(min=1, help="The largest batch size.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each stage at each batch size.")] = 7,
    seconds: Annotated[float, typer.Option(help="Time after which three samples are enough.")] = 20.0,
    memory: Annotated[int | None, typer.Option(min=1, help="MB for a worker on a CPU. [default: 90 % of free]")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure what an image costs at batch 1, 2, 4 ...: forward alone, with copy, with decode, the whole handler."""
    from bench.pictures import choose
    from bench.record import Record, check_writable, command_line, utc
    from bench.report import text
    from bench.sweep import Plan, measure, progress
    from cli.sources import archive_of
    from host import signals

    check_writable(out)
    started, sent = utc(), choose(picture, pictures, None)
    with signals.as_exceptions(), archive_of(source, say) as archive:
        plan = Plan(archive, sent, device, threads, least, most, repeats, seconds, memory_mb=memory)
        values, interruption = measure(plan, lambda row: say(progress(row)))
    record = Record.now("sweep", command_line("beeline", sys.argv[1:]), values, sent, started)
    _end(record, out, text(record), as_json, interruption.exit_code if interruption else 0)


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="A file of records, or several that share charts.")],
    html: Annotated[Path | None, typer.Option(help="Write one page here that needs nothing else.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here; printed without --html.")] = None,
    as_json: Json = False,
) -> None:
    """Make a page or Markdown of what was measured; runs of the same kind share their charts."""
    from bench.report import page, read
    from host.report import write

    runs = read(records)
    report = page(runs)
    text = report.markdown()
    written = [*([write(report.html(), html)] if html else []), *([write(text, markdown)] if markdown else [])]
    values = {"records": len(runs), "html": html and str(html), "markdown": markdown and str(markdown)}
    result(values, as_json, "\n".join(map(str, written)) or text)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def table() -> None:
    """Refuse the old name of `sweep`."""
    raise Undetermined("`beeline bench table` is now `beeline bench sweep`, with the same options; use that")


def _steps(text: str) -> list[int]:
    """Return the numbers of clients of `50`, or of a sweep: `1:8`, or `10:50:10` with a step."""
    match = re.fullmatch(r"(\d+)(?::(\d+)(?::(\d+))?)?", text)
    low, high, step = (int(match[1]), int(match[2] or match[1]), int(match[3] or 1)) if match else (0, 0, 0)
    if not 1 <= low <= high <= _MOST or step < 1:
        allowed = f"{text!r} is none of: 1 to {_MOST}, a sweep as 1:8, or 10:50:10 with a step"
        raise typer.BadParameter(allowed, param_hint="'--clients'")
    return [*range(low, high + 1, step)]


def _end(record: Record, out: Path | None, text: str, as_json: bool, code: int) -> None:
    """Add a record to the file, print its result and end with the exit code."""
    from bench.record import append

    append(out, record)
    result(record.result, as_json, text)
    if code:
        fail(code)
