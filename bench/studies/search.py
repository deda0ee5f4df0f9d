"""The tuner's choice against a search without a forecast: the settings nearest to the choice, and others at random.

Run it as `python -m bench.studies.search model_store/resnet18.mar --tuned tune.jsonl --pictures FOLDER`, after `beeline
bench tune` wrote that record. Each configuration gets one turn. Then the tuner's choice and the search's best are
measured in turns, because the best of many single turns is partly the luckiest one.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from beeline.errors import ConfigError
from bench import pictures as files
from bench import record
from bench.record import Journal, Record, command_line
from bench.studies import job
from bench.tune import CONFIG, STORE, rank, turns_of
from bench.tune.grid import BATCHES, DELAYS, Goal, Settings, Turn
from bench.tune.server import MOST_PICTURES, Servers, find_model
from host import machine

NEAR, RANDOM = 24, 12
# Seconds of a single turn, of one of the best, and of the warm-up.
_SECONDS, _LONG, _WARM_UP = 6.0, 10.0, 3.0
# The search's best that are measured again, and their rounds.
_BEST, _ROUNDS = 3, 12
# The tuner's choice should reach this share of the best.
_SHARE = 0.95
Sent = Annotated[Path | None, typer.Option(help="What the tuner was given to send.")]


def main(
    archive: Annotated[str, typer.Argument(help="The path of a .mar file, or an archive's name in the store.")],
    tuned: Annotated[Path, typer.Option(help="The tuner's records; the last one of this model is checked.")],
    picture: Sent = None,
    pictures: Sent = None,
) -> None:
    """Measure the configurations, compare the best with the tuner's choice, and add the record to `--tuned`."""
    began, started = time.monotonic(), record.utc()
    model = find_model(archive, STORE, CONFIG, {})
    name, sent = model.archive.model, files.choose(picture, pictures, model.archive, MOST_PICTURES)
    digest = sent.to_dict()["sha256"]
    tunings = [each for each in record.read(tuned) if each.kind == "tune" and each.result["model"] == name]
    if not tunings or tunings[-1].pictures["sha256"] != digest:
        raise ConfigError(f"{tuned} has no tuning of {name} on these pictures; run `beeline bench tune --out {tuned}`")
    tuning = tunings[-1].result
    goal, choice = Goal(**tuning["goal"], clients=tuning["clients"] or 50), Settings.of(tuning["best"])
    about = {"archive": model.sha256, "tuned": tunings[-1].started, "pictures": digest}
    with job(tuned.with_suffix(f".{name}.json"), about) as journal:
        with Servers(model, goal, sent, tuning["server"], journal) as servers:
            alone, finalists = compare(servers, journal, goal, choice, around(choice, machine.cores()))
        values = result(name, goal, alone, finalists, choice) | {"seconds": round(time.monotonic() - began, 1)}
        command = command_line("python -m bench.studies.search", sys.argv[1:])
        record.append(tuned, Record.now("search", command, values, sent, started))
        typer.echo(values["sentence"])


def around(choice: Settings, cores: int) -> list[Settings]:
    """Return the settings nearest to the choice, counted in steps of each number, and others drawn at random."""
    layouts = [(w, t) for t in (1, 2, 4, 8, 16) for w in (1, 2, 3, 4, 6, 8, 12, 16) if cores / 4 < w * t <= 2 * cores]
    # A delay matters only where there are batches.
    batches = [(size, delay) for size in BATCHES for delay in DELAYS if size > 1 or delay == 2]
    grid = [Settings(size, w, delay, t) for w, t in layouts for size, delay in batches]

    def steps(each: Settings) -> tuple[float, Settings]:
        pairs = ((each.batch_size, choice.batch_size), (each.workers, choice.workers), (each.threads, choice.threads))
        delay = abs(DELAYS.index(each.max_batch_delay) - sum(value < choice.max_batch_delay for value in DELAYS))
        return sum(abs(math.log2(one / other)) for one, other in pairs) + delay, each

    order = sorted((each for each in grid if each != choice), key=steps)
    near, rest = order[:NEAR], order[NEAR:]
    return [*near, *random.Random(0).sample(rest, min(RANDOM, len(rest)))]


def compare(
    servers: Servers, journal: Journal, goal: Goal, choice: Settings, wanted: Sequence[Settings]
) -> tuple[list[Turn], list[Turn]]:
    """Return the scores of all after one turn each, and those of the choice and the best after turns of their own."""

    def take(settings: Settings, number: int, seconds: float) -> None:
        """Measure a turn, unless the journal has so many turns of these settings."""
        if sum(turn.settings == settings for turn in turns_of(journal)) < number:
            servers.open([settings])
            turn = servers.run(settings, seconds, _WARM_UP)
            journal.add("turn", asdict(turn))
            typer.echo(f"  {turn}")

    # From here on, `open` stops running servers if memory does not hold all.
    servers.room()
    # Shuffled, so that the machine's drift follows no number; always alike, so that a job goes on.
    for each in random.Random(1).sample([choice, *wanted], len(wanted) + 1):
        take(each, 1, _SECONDS)
    servers.stop()
    alone = rank(turns_of(journal)[: len(wanted) + 1], goal)
    rivals = [choice, *[score.settings for score in alone if score.settings != choice][:_BEST]]
    servers.open(rivals)
    for number in range(_ROUNDS):
        for each in random.Random(number).sample(rivals, len(rivals)):
            take(each, number + 2, _LONG)
    return alone, rank(turns_of(journal)[len(wanted) + 1 :], goal)


def result(name: str, goal: Goal, alone: Sequence[Turn], finalists: Sequence[Turn], tuned: Settings) -> dict[str, Any]:
    """Return the record's result: `share` is the throughput of the tuner's choice over the best's, measured in turns.

    At a rate it is the best's 95th percentile over the choice's.
    """
    choice, best = next(score for score in finalists if score.settings == tuned), finalists[0]
    share = 0.0 if goal.holds(best) and not goal.holds(choice) else round(min(best.cost / choice.cost, 1.0), 4)
    return {
        "model": name,
        "goal": goal.to_dict(),
        "tried": [score.row(goal) for score in alone],
        "beside": [score.row(goal) for score in finalists],
        "best": best.row(goal),
        "tuned": choice.row(goal),
        "share": share,
        "holds": share >= _SHARE,
        "sentence": f"{name}: the tuner's choice ({tuned}) reaches {share:.1%} of the best of {len(alone)} "
        f"configurations ({best.settings}) for {goal}.",
    }


if __name__ == "__main__":
    typer.run(main)
