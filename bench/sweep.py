"""An exhaustive sweep of configurations on the real server, to check the choice of `beeline bench tune` against.

Run it as `python -m bench.sweep model_store/resnet18.mar --p95 500ms --pictures FOLDER --tuned tune.jsonl`, after
`beeline bench tune` with the same goal, pictures and clients wrote that record. Each configuration gets one
turn; then the tuner's choice and the sweep's best are measured side by side, in turns, because the best of
many single turns is partly the luckiest one. Interrupted, it goes on with `--resume`.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from beeline.errors import BeelineError, ConfigError
from bench import record
from bench.pictures import Pictures
from bench.record import Record, command_line
from bench.tune import ladder, model
from bench.tune.goal import Goal, milliseconds
from bench.tune.model import Model
from bench.tune.settings import Settings
from bench.tune.stand import Stand
from bench.tune.standing import Standing, standings
from bench.tune.tune import Request, folder
from bench.tune.turns import Journal, Turn
from host import machine
from host.signals import Interrupted, as_exceptions

BATCHES = (1, 2, 4, 8, 16, 32)
DELAYS = (1, 2, 10)
LEAST = 60
# So many of the sweep's best are measured again beside the tuner's choice.
_BEST, _SIDE_SECONDS = 3, 10.0


@dataclass(frozen=True)
class Options:
    """How the sweep is made: seconds of a turn and its warm-up, rounds side by side, workers up at a time."""

    seconds: float = 6.0
    warm_up: float = 2.0
    rounds: int = 8
    together: int = 18


@dataclass
class Sweep:
    """One sweep on a stand; every turn is in the journal as it ends."""

    stand: Stand
    journal: Journal
    goal: Goal
    options: Options

    def run(self, grid: Sequence[Settings], tuned: Settings) -> tuple[list[Standing], list[Standing]]:
        """Return how all stand after a turn each, and how the best and `tuned` stand side by side."""
        done = {turn.settings for turn in self.journal.turns if turn.round == 1}
        left = [settings for settings in grid if settings not in done]
        typer.echo(f"{len(grid)} configurations, {len(left)} to measure")
        for group in groups(left, min(self.options.together, self.stand.room())):
            self._group(group)
        alone = standings([turn for turn in self.journal.turns if turn.round == 1], self.goal)
        rivals = [standing.settings for standing in alone if standing.settings != tuned][:_BEST]
        return alone, self._beside([tuned, *rivals])

    def _group(self, group: Sequence[Sequence[Settings]]) -> None:
        """Measure the configurations of one start: each ladder of workers from many to few."""
        self.stand.open([line[0] for line in group])
        for line in group:
            now = line[0]
            for settings in line:
                if settings != now:
                    now = self.stand.shrink(now, settings.workers)
                self._turn(settings, 1, self.options.seconds)
        self.stand.stop()

    def _beside(self, wanted: Sequence[Settings]) -> list[Standing]:
        """Measure a few in turns; what an interrupted sweep measured of them counts."""
        done = {(turn.round, turn.settings) for turn in self.journal.turns if turn.round > 1}
        if any(settings not in wanted for _, settings in done):
            raise BeelineError(f"{self.journal.path} compares other configurations; begin anew without --resume")
        due: list[tuple[int, Settings]] = []
        for number in range(2, self.options.rounds + 2):
            order = list(wanted)
            random.Random(number).shuffle(order)
            due += [(number, settings) for settings in order if (number, settings) not in done]
        if due:
            typer.echo(f"side by side, {self.options.rounds} rounds: {'; '.join(map(str, wanted))}")
            self.stand.open(wanted)
        for number, settings in due:
            self._turn(settings, number, _SIDE_SECONDS)
        return standings([turn for turn in self.journal.turns if turn.round > 1], self.goal)

    def _turn(self, settings: Settings, number: int, seconds: float) -> None:
        summary = self.stand.run(settings, seconds, self.options.warm_up)
        self.journal.add(Turn.of(settings, number, summary))
        typer.echo(f"  {len(self.journal.turns)}: {self.journal.turns[-1]}")


def grid(batches: Sequence[int], delays: Sequence[int], layouts: Sequence[tuple[int, int]]) -> list[Settings]:
    """Return every combination; `layouts` are workers with threads of each."""
    return [
        Settings(batch, workers, delay, threads)
        for (workers, threads), batch, delay in itertools.product(layouts, batches, delays)
    ]


def groups(left: Sequence[Settings], together: int) -> Iterator[list[list[Settings]]]:
    """Yield what shares a start of a server: lines of configurations that differ in their workers alone, most first.

    A server is started with the most workers of each line; taking some away is all that changes after that.
    The order is mixed, so that the machine's slow drift follows no number. At most `together` workers are up.
    """
    lines: dict[tuple[int, int, int], list[Settings]] = {}
    for settings in sorted(left, key=lambda each: -each.workers):
        lines.setdefault((settings.threads, settings.batch_size, settings.max_batch_delay), []).append(settings)
    order = list(lines.values())
    random.Random(0).shuffle(order)
    order.sort(key=lambda line: line[0].threads)
    group: list[list[Settings]] = []
    for line in order:
        up = sum(each[0].workers for each in group) + line[0].workers
        if group and (up > together or group[0][0].threads != line[0].threads):
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def result(
    name: str, goal: Goal, alone: Sequence[Standing], beside: Sequence[Standing], tuned: Settings
) -> dict[str, Any]:
    """Return the record's result: `share` is the tuner's choice over the sweep's best, side by side.

    At a rate it is the best's 95th percentile over the choice's.
    """
    choice = next(standing for standing in beside if standing.settings == tuned)
    best = beside[0]
    share = math.exp(best.delay - choice.delay if goal.open else choice.speed - best.speed)
    if best.holds and not choice.holds:
        share = 0.0
    return {
        "model": name,
        "goal": goal.to_dict(),
        "tried": [standing.to_dict() for standing in alone],
        "beside": [standing.to_dict() for standing in beside],
        "best": best.to_dict(),
        "tuned": choice.to_dict(),
        "share": round(min(share, 1.0), 4),
    }


def main(
    archive: Annotated[str, typer.Argument(help="The path of a .mar file, or an archive's name in the store.")],
    tuned: Annotated[Path, typer.Option(help="The tuner's record; its last one of this model and goal is checked.")],
    p95: Annotated[str | None, typer.Option(help="The budget, as in 500ms.")] = None,
    rate: Annotated[float | None, typer.Option(help="Instead: arrivals a second.")] = None,
    picture: Annotated[Path | None, typer.Option(help="The one picture to send.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="A folder to send.")] = None,
    clients: Annotated[int, typer.Option(help="With a budget: clients.")] = 50,
    server: Annotated[str, typer.Option(help="torchserve or mms.")] = "torchserve",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = ",".join(map(str, BATCHES)),
    delays: Annotated[str, typer.Option(help="Delays in milliseconds.")] = ",".join(map(str, DELAYS)),
    layouts: Annotated[
        str | None, typer.Option(help="Workers x threads. [default: 1x1, 2x1, 3x1, 1x2 on two cores]")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of a turn.")] = 6.0,
    warm_up: Annotated[float, typer.Option(help="Seconds of load before it.")] = 2.0,
    rounds: Annotated[int, typer.Option(help="Rounds side by side at the end.")] = 8,
    together: Annotated[int, typer.Option(help="Workers that are up at the same time, at most.")] = 18,
    resume: Annotated[Path | None, typer.Option(help="Go on with the file that an interrupted sweep told.")] = None,
    out: Annotated[Path | None, typer.Option(help="Add the record to this file, as a line of JSON.")] = None,
) -> None:
    """Measure every configuration and compare the best with the tuner's choice."""
    began, started = time.monotonic(), record.utc()
    goal = Goal(None if p95 is None else milliseconds(p95), rate, clients)
    defaults = Request(archive, goal)
    found = model.find(archive, defaults.store, defaults.config_file, {})
    sent = model.sent(found, picture, pictures)
    choice = _choice(tuned, found, goal)
    wanted = grid(_numbers(batches), _numbers(delays), _layouts(layouts))
    if len(wanted) < LEAST:
        typer.echo(f"only {len(wanted)} configurations; a check of the tuner has {LEAST} at least", err=True)
    journal = _journal(resume, found, goal, server, sent)
    options = Options(seconds, warm_up, rounds, together)
    try:
        with as_exceptions(), model.unpacked(found) as files:
            cost = ladder.climb(files, sent, 1, 0.5, lambda size, ms: None, (1,)) or ladder.UNKNOWN
            with Stand(found, goal, sent, server, cost, typer.echo) as stand:
                alone, beside = Sweep(stand, journal, goal, options).run(wanted, choice)
    except Interrupted as asked:
        typer.echo(f"interrupted ({asked}); --resume {journal.path} goes on from there", err=True)
        raise typer.Exit(asked.exit_code) from asked
    values = result(found.name, goal, alone, beside, choice) | {"seconds": round(time.monotonic() - began, 1)}
    made = Record.now("sweep", command_line("python -m bench.sweep", sys.argv[1:]), values, sent, started=started)
    if out is not None:
        record.append(out, made)
    for standing in beside:
        p95_ms = "no answer" if standing.p95_ms is None else f"p95 {standing.p95_ms:.0f} ms"
        typer.echo(f"{standing.settings}: {standing.per_second:.1f}/s, {p95_ms}")
    typer.echo(
        f"{found.name}: the tuner's choice ({choice}) reaches {values['share']:.1%} of the best of "
        f"{len(alone)} configurations ({beside[0].settings}) for {goal.text}"
    )


def _choice(path: Path, found: Model, goal: Goal) -> Settings:
    """Return what the tuner chose for this model and goal."""
    for each in reversed(record.read(path)):
        if each.kind == "tune" and each.result["model"] == found.name and each.result["goal"] == goal.to_dict():
            return Settings.of(each.result["best"])
    raise ConfigError(f"{path} has no tuning of {found.name} for {goal.text}; run `beeline bench tune --out {path}`")


def _journal(resume: Path | None, found: Model, goal: Goal, server: str, sent: Pictures) -> Journal:
    about = {
        "sweep": found.name,
        "archive": found.sha256,
        "goal": goal.to_dict(),
        "clients": goal.clients,
        "server": server,
        "pictures": sent.to_dict()["sha256"],
    }
    if resume is not None:
        return Journal.resume(resume, about)
    path = folder(os.environ) / f"sweep-{found.name}-{time.strftime('%Y%m%d-%H%M%S')}.journal"
    typer.echo(f"every turn is kept in {path}")
    return Journal.begin(path, about)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is no list of whole numbers; give one like 1,2,4") from None


def _layouts(text: str | None) -> list[tuple[int, int]]:
    """Return workers with threads: those in `text`, else those that suit the cores."""
    if text is None:
        cores = machine.cores()
        one = [(workers, 1) for workers in range(1, cores + 2)]
        return one + [(max(1, cores // threads), threads) for threads in (2, 4, 8) if threads <= cores]
    try:
        pairs = [part.lower().split("x") for part in text.split(",")]
        return [(int(workers), int(threads)) for workers, threads in pairs]
    except ValueError:
        raise ConfigError(f"--layouts is {text!r}; give workers x threads, as in 1x1,2x1,1x2") from None


if __name__ == "__main__":
    typer.run(main)
