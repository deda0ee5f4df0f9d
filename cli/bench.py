"""`beeline bench`: measure, compare and tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure, compare and tune.", no_args_is_help=True, add_completion=False)
Out = Annotated[Path | None, typer.Option(help="Add the record to this file, as a line of JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="A server's root, or the full address of its predictions.")],
    picture: Annotated[Path | None, typer.Option(help="The one picture to send.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder whose pictures are sent in turn.")] = None,
    clients: Annotated[
        int | None, typer.Option(help="Closed loop: so many clients, each again when it has its answer. [default: 50]")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: so many arrivals a second, come what may.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 10.0,
    warm_up: Annotated[float, typer.Option(help="Seconds of the same load before, not counted.")] = 2.0,
    deadline: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 60.0,
    evenly: Annotated[bool, typer.Option("--evenly", help="Open loop: arrivals at equal distances.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of pictures and of the arrivals.")] = 0,
    model: Annotated[str | None, typer.Option(help="The model's name at a root. [default: its only one]")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="What must not be: 'p95>500ms', 'errors>0', 'rps<300'; repeat it.")
    ] = None,
    cross_check: Annotated[bool, typer.Option("--cross-check", help="Then let ab do the same.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure a running server from outside: rate, latency, failures, batch sizes; exit 1 past a threshold."""
    from bench.load import Plan
    from bench.load.measure import measure, parse, resolve
    from bench.pictures import choose
    from bench.record import append, check_writable, command_line
    from cli.console import err, fail, result

    check_writable(out)
    thresholds = tuple(parse(text) for text in fail_if or ())
    plan = Plan(
        url=resolve(url, model),
        pictures=choose(picture, pictures),
        seconds=seconds,
        warm_up=warm_up,
        clients=50 if clients is None and rate is None else clients,
        rate=rate,
        poisson=not evenly,
        deadline=deadline,
        seed=seed,
    )
    measured = measure(plan, err, thresholds, cross_check, command_line("beeline", sys.argv[1:]))
    append(out, measured.record)
    result(measured.record.result, as_json, measured.text)
    if measured.exit_code:
        fail(measured.exit_code)


@app.command()
def tune(
    archive: Annotated[str, typer.Argument(help="The path of a .mar file, or an archive's name in the store.")],
    p95: Annotated[
        str | None, typer.Option(help="Budget: most throughput whose 95th percentile holds it, as in 500ms.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Instead: lowest 95th percentile at so many arrivals/s.")] = None,
    picture: Annotated[Path | None, typer.Option(help="The one picture to send.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder to send. [default: golden pictures]")] = None,
    clients: Annotated[int, typer.Option(help="With a budget: clients, each again when it has its answer.")] = 50,
    minutes: Annotated[
        float, typer.Option(help="How long all of it may take; 0 answers from an interrupted run.", min=0)
    ] = 5.0,
    server: Annotated[str, typer.Option(help="torchserve or mms.")] = "torchserve",
    store: Annotated[Path | None, typer.Option(help="Folder of archives. [default: model_store]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="What is configured now, and is changed. [default: config/config.properties]")
    ] = None,
    write: Annotated[bool, typer.Option("--write", "--yes", help="Change the file without asking.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find batch size, workers, delay and threads for a latency budget or a rate, on the real server."""
    from bench import tune as tuner
    from bench.record import append, check_writable, command_line
    from bench.report import page, text
    from bench.tune.grid import Goal
    from cli.console import fail, result, say
    from host.report import write as write_page

    check_writable(out)
    path = (config or tuner.CONFIG).resolve()
    tuned = tuner.tune(
        archive,
        Goal.parse(p95, rate, clients),
        say,
        picture=picture,
        pictures=pictures,
        minutes=minutes,
        server=server,
        store=(store or tuner.STORE).resolve(),
        config_file=path,
        command=command_line("beeline", sys.argv[1:]),
    )
    append(out, tuned.record)
    plot = tuned.journal.with_suffix(".html")
    write_page(page([tuned.record]).html(), plot)
    say(text(tuned.record))
    diff, is_written = tuned.change.diff if tuned.change else "", False
    if tuned.change and diff:
        say(diff)
        # An interruption is no moment for a question, nor for a change.
        if tuned.interruption is None:
            is_written = write or (sys.stdin.isatty() and typer.confirm(f"write this to {path}?", err=True))
        if is_written:
            tuned.change.write()
    how = "--minutes 0 --write" if tuned.interruption else "--write"
    about = f"{path} is as it was; {how} makes the change shown above"
    if tuned.change is None:
        about = "the configuration file stays as it is: nothing measured holds the goal"
    elif is_written or not diff:
        about = f"{path} is changed" if is_written else f"{path} says so already"
    ending = [tuned.record.result["sentence"], f"plot: {plot}", about]
    ending += ["interrupted; the same command goes on from there"] * (tuned.interruption is not None)
    result({**tuned.record.result, "diff": diff, "written": is_written, "plot": str(plot)}, as_json, "\n".join(ending))
    if tuned.interruption is None:
        tuned.journal.unlink()
    if tuned.interruption is not None or not tuned.record.result["holds"]:
        fail(tuned.interruption.exit_code if tuned.interruption else 1)


@app.command()
def compare(
    archive: Annotated[Path, typer.Argument(help="The .mar file that every server serves.")],
    picture: Annotated[
        Path, typer.Option(help="What is sent: a picture, or a folder whose pictures are sent in turn.")
    ],
    pictures: Annotated[
        Path | None, typer.Option(help="Pictures on which each server's first label must be the fp32 reference's.")
    ] = None,
    servers: Annotated[str | None, typer.Option(help="Which, with commas. [default: all; 'list' names them]")] = None,
    clients: Annotated[int, typer.Option(min=1, help="So many, each again when it has its answer.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each server; fewer than 5 prove nothing.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each turn is measured.")] = 8.0,
    batch_size: Annotated[int | None, typer.Option(help="Of every server with our engine.")] = None,
    workers: Annotated[int | None, typer.Option(help="Of every server with our engine.")] = None,
    max_batch_delay: Annotated[int | None, typer.Option(help="Milliseconds; of every server with our engine.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="An fp32 archive of the same model, for the others. [default: the archive]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Numbers of our engine. [default: config/config.properties]")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare servers in turn on the same model and pictures: as their documentation has it, and with our engine."""
    from bench.compare.comparison import Request
    from bench.compare.comparison import compare as measure
    from bench.record import append, check_writable, command_line
    from bench.report import text
    from cli.console import fail, result, say
    from host import signals
    from serve.config import Overrides

    request = Request(
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
        config_file=config.resolve() if config else Request.config_file,
    )
    if request.servers == ("list",):
        known = {peer.name: peer.pattern for peer in request.peers()}
        result({"servers": known}, as_json, "\n".join(f"{name}: {pattern}" for name, pattern in known.items()))
        return
    check_writable(out)
    with signals.as_exceptions():
        record, journal = measure(request, say)
    append(out, record)
    result(record.result, as_json, text(record))
    if record.result["interrupted"]:
        fail(130)
    journal.unlink()


@app.command()
def sweep(
    source: Annotated[Path, typer.Argument(help="A .mar file, an archive's name in the store, or a run's folder.")],
    picture: Annotated[Path | None, typer.Option(help="The one picture to decode.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder; pictures are taken evenly from all of it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:index].")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Of the forward pass, and of the decoding.")] = 1,
    least: Annotated[int, typer.Option(min=1, help="Go on to this batch size at least, plateau or not.")] = 1,
    most: Annotated[int, typer.Option(min=1, help="The largest batch size.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each stage at each batch size.")] = 7,
    seconds: Annotated[float, typer.Option(help="Time after which three samples are enough.")] = 20.0,
    memory: Annotated[
        int | None, typer.Option(min=1, help="MB for the CPU's worker. [default: 90 % of what is free]")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure what an image costs at batch 1, 2, 4 ...: forward alone, with copy, with decode, the whole handler."""
    from bench.pictures import choose
    from bench.record import Record, append, check_writable, command_line, utc
    from bench.report import text
    from bench.sweep import Plan, measure
    from cli.console import fail, result, say
    from cli.sources import archive_of
    from host import signals

    check_writable(out)
    started, read = utc(), choose(picture, pictures)
    with signals.as_exceptions(), archive_of(source, say) as archive:
        plan = Plan(archive, read, device, threads, least, most, repeats, seconds, memory_mb=memory)
        values, interruption = measure(plan, lambda row: say(str(row)))
    record = Record.now("sweep", command_line("beeline", sys.argv[1:]), values, read, started=started)
    append(out, record)
    result(values, as_json, text(record))
    if interruption is not None:
        fail(interruption.exit_code)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def table() -> None:
    """Give the new name of this command."""
    from beeline.errors import Undetermined

    raise Undetermined("`beeline bench table` is now `beeline bench sweep`, with the same options; use that")


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="A file of records, or two that are laid over each other.")],
    html: Annotated[Path | None, typer.Option(help="Write one page here that needs nothing else.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write Markdown here. [default, without --html: printed]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a page or Markdown of what was measured; runs of the same kind share their charts."""
    from bench.report import page, read
    from cli.console import result
    from host.report import write

    found, labels = read(records)
    made = page(found, labels)
    text = made.markdown()
    written = [*([write(made.html(), html)] if html else []), *([write(text, markdown)] if markdown else [])]
    values = {"records": len(found), "html": html and str(html), "markdown": markdown and str(markdown)}
    result(values, as_json, "\n".join(map(str, written)) or text)
