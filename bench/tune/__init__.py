"""Find batch size, workers, delay and threads for a latency budget or a rate, on the real server, within a time.

Batches are timed outside of any server, and a forecast from their times prunes the grid of configurations. The others
are measured on real servers, a turn each, best forecast first; then the finalists in turns, and each round halves them.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beeline.errors import Undetermined
from bench import pictures as files
from bench.record import Journal, Record, utc
from bench.sweep import Fit, fit
from bench.tune.grid import THREADS, Forecast, Goal, Settings, Turn, candidates, delays
from bench.tune.server import MOST_PICTURES, Servers, find_model, numbers_of
from host import ROOT, machine
from host.signals import Interrupted, as_exceptions
from serve import properties, servers
from serve.servers.protocol import Say

STORE, CONFIG = ROOT / "model_store", ROOT / "config" / "config.properties"
# Shares of the time, and seconds at most: for stopping servers, and for batches outside of any.
_STOP, _STOP_SECONDS, _TIMING, _TIMING_SECONDS = 0.1, 14.0, 0.2, 6.0
# Seconds of a turn of new configurations, and of the finalists, and of warm-up before each (first turns: half more).
_TURN, _LONG, _WARM_UP = 4.0, 6.0, 1.5
# A percentile needs so many answers in a turn. Slow models get longer turns, up to this factor.
_ANSWERS, _LONGER = 200, 6.0
# New configurations at a time, and seconds of their start, since TorchServe gives up longer ones; they may be slower
# than the best by their forecast, up to this share.
_WAVE, _BOOT_SECONDS, _HOPE = 6, 60.0, 0.2
# The finalists, their share of the time, and their rounds.
_FINALISTS, _DECIDING, _ROUNDS = 6, 0.35, 6
# Noise of a turn of so many seconds, and the machine's drift, as shares; turns over which drift is forgotten.
_SECONDS, _NOISE, _DRIFT, _MEMORY = 5.0, 0.05, 0.12, 4.0


def tune(
    archive: str,
    goal: Goal,
    say: Say,
    picture: Path | None,
    pictures: Path | None,
    minutes: float,
    server: str,
    store: Path,
    config_file: Path,
    command: str,
) -> tuple[Record, properties.Change | None, Path, Interrupted | None]:
    """Find the best configuration within so many minutes; go on where the same tuning was interrupted.

    `archive` is its path or its name in the store; without pictures its golden ones are sent. With 0 minutes nothing
    more is measured. Return the record; the change of the configuration file, None if nothing holds the goal; the
    journal; the interruption. Raise `BeelineError` if archive, configuration, pictures or server cannot be used,
    `Undetermined` if it ended before anything was measured.
    """
    started, start = utc(), time.monotonic()
    servers.named(server)
    model = find_model(archive, store, config_file, os.environ)
    name, sent = model.archive.model, files.choose(picture, pictures, model.archive, MOST_PICTURES)
    about = {"archive": model.sha256, "goal": asdict(goal), "server": server, "cores": machine.cores()}
    about |= {"pictures": sent.to_dict()["sha256"], "device": os.environ.get("BEELINE_DEVICE", "auto")}
    about |= {"properties": [model.properties.numbers, model.properties.texts.get("vmargs")]}
    journal = Journal.job(f"tune-{name}", about)
    say(f"{name}: {goal}; configured now: {model.configured}; {len(sent.bodies)} pictures")
    if before := len(journal.of("turn")):
        say(f"  it was interrupted after {before} turns and goes on from there; delete {journal.path} to start again")
    interruption, change, whole = None, None, 60 * minutes
    deadline = start + whole - min(_STOP_SECONDS, _STOP * whole)
    try:
        # The alarm is off while servers stop.
        with Servers(model, goal, sent, server, journal) as opened, as_exceptions(deadline - time.monotonic()):
            Search(opened, model.configured, say, deadline).run()
    except Interrupted as signal:
        say("time is up" if signal.is_alarm else f"interrupted ({signal})")
        interruption = None if signal.is_alarm else signal
    result = answer(name, model.configured, goal, journal)
    journal.add("seconds", round(time.monotonic() - start))
    result |= {"server": server, "seconds": sum(journal.of("seconds")), "interrupted": interruption is not None}
    if result["holds"]:
        best = Settings.of(result["best"])
        # Of the file alone: where the file serves, this shell's environment is not there.
        numbers, usual = properties.load(config_file, {}).numbers, max(1, machine.cores() // best.workers)
        threads = best.threads if best.threads != numbers.get("beeline_threads", usual) else None
        change = properties.change(config_file, name, model.archive.version, numbers_of(best), threads)
    return Record.now("tune", command, result, sent, started), change, journal.path, interruption


def turns_of(journal: Journal) -> list[Turn]:
    """Return a journal's turns."""
    return [Turn(**{**values, "settings": Settings.of(values["settings"])}) for values in journal.of("turn")]


def forecast_of(journal: Journal, goal: Goal) -> Forecast:
    """Return the forecast from a journal's batch times."""
    lines = {}
    for threads in sorted({threads for threads, _, _ in journal.of("batch")}):
        own = [(size, milliseconds) for count, size, milliseconds in journal.of("batch") if count == threads]
        # Two points, one of them noisy, say nothing about large batches: then the line has no fixed cost.
        line = (fit(own) if len(own) > 2 else None) or Fit(own[-1][1] / own[-1][0], 0.0, 1.0)
        lines[threads] = Fit(max(line.a_ms, 1e-3), max(line.b_ms, 0.0), line.error)
    return Forecast(lines, goal, machine.cores())


def rank(turns: Sequence[Turn], goal: Goal, configured: Settings | None = None) -> list[Turn]:
    """Return every measured configuration with its turns as one, the best for the goal first, else the nearest to it.

    Among those within 1 % of the best, `configured` comes first, else the lowest latency.
    """
    order = sorted({turn.settings for turn in turns})
    ranked = []
    for settings, cost in zip(order, _costs(turns, order), strict=True):
        own = [turn for turn in turns if turn.settings == settings]
        # A turn without an answer is slower than any other.
        p95_ms = statistics.median(math.inf if turn.p95_ms is None else turn.p95_ms for turn in own)
        ranked.append(
            Turn(
                settings,
                seconds=sum(turn.seconds for turn in own),
                per_second=statistics.median(turn.per_second for turn in own),
                p95_ms=None if p95_ms == math.inf else p95_ms,
                failed=sum(turn.failed for turn in own),
                cost=cost,
                growing=2 * sum(turn.growing for turn in own) > len(own),
                turns=len(own),
            )
        )
    ranked.sort(key=lambda turn: (turn.failed > 0, turn.p95_ms or math.inf))
    ranked.sort(key=lambda turn: turn.cost if goal.holds(turn) else math.inf)
    same = [turn for turn in ranked if goal.holds(turn) and turn.cost <= 1.01 * ranked[0].cost]
    same.sort(key=lambda turn: (turn.settings != configured, turn.p95_ms, turn.settings.workers))
    return [*same, *ranked[len(same) :]]


def _costs(turns: Sequence[Turn], order: Sequence[Settings]) -> list[float]:
    """Return each configuration's cost, by generalised least squares on the logarithms: level + drift + noise.

    Turns that are near in time have a similar drift, so a turn is compared mostly with its neighbours.
    """
    places = np.arange(len(turns))
    drift = _DRIFT**2 * np.exp(-np.abs(places[:, None] - places) / _MEMORY)
    noise = _NOISE**2 * np.diag([_SECONDS / max(turn.seconds, 0.1) for turn in turns])
    design = np.eye(len(order))[np.array([order.index(turn.settings) for turn in turns], int)]
    weights = np.linalg.solve(drift + noise, design).T
    levels = np.linalg.solve(weights @ design, weights @ np.log([turn.cost for turn in turns]))
    return np.exp(levels).tolist()  # type: ignore[no-any-return]


@dataclass
class Search:
    """Measures promising settings, best forecast first, and the `configured` ones, until the `deadline` by `clock`."""

    servers: Servers
    configured: Settings
    say: Say
    deadline: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.goal, self.journal = self.servers.goal, self.servers.journal

    def run(self) -> None:
        """Measure until the best is decided; after an interruption the journal has the turns so far."""
        counts = sorted({count for count in THREADS if count <= machine.cores()} | {self.configured.threads})
        for threads in counts:
            if sum(point[0] == threads for point in self.journal.of("batch")) < 2:
                left = self.deadline - self.clock()
                self.servers.time_batches(threads, min(_TIMING_SECONDS, _TIMING * left / len(counts)))
                line = forecast_of(self.journal, self.goal).lines[threads]
                self.say(f"  threads {threads}: a batch costs {line} ({line.error:.0%} off)")
        self.room = self.servers.room()
        self.journal.add("room", self.room)
        self._learn()
        self.promising, _ = candidates(self.forecast, self.room, self.configured)
        until = self.clock() + (1 - _DECIDING) * (self.deadline - self.clock())
        while wave := self._wave(until):
            # The best so far is measured again in each wave, which shows the machine's drift.
            self._measure([*wave, *(turn.settings for turn in self.ranked[:1])], _TURN)
        # As many as half of the time left can give a turn.
        turns = (self.deadline - self.clock()) / sum(self._lengths(self.ranked[0].settings, _LONG))
        finalists = [turn.settings for turn in self.ranked[: max(2, min(_FINALISTS, int(turns / 2)))]]
        for number in range(_ROUNDS):
            # They must beat what is configured now.
            self._measure([*finalists, *([] if number else [self.configured])], _LONG)
            # At least two: one alone is compared with nothing.
            left = max(2, len(finalists) // 2)
            finalists = [turn.settings for turn in self.ranked if turn.settings in finalists][:left]

    def _wave(self, until: float) -> list[Settings]:
        """Return what to measure for the first time, as far as time and memory allow; at least one if there is none."""
        wave: list[Settings] = []
        for settings in self._hopeful() if self.ranked else dict.fromkeys([self.promising[0], self.configured]):
            more = [*wave, settings]
            opening = self.servers.opening_seconds(more)
            seconds = opening + sum(sum(self._lengths(each, _TURN)) for each in more)
            fits = sum(each.workers for each in more) <= self.room and opening <= _BOOT_SECONDS
            if (fits and self.clock() + seconds <= until) or not (self.ranked or wave):
                wave = more
        return wave[:_WAVE]

    def _hopeful(self) -> list[Settings]:
        """Return unmeasured settings that may beat the best, best forecast first; the best's other delays third."""
        best, tried = self.ranked[0], {each.settings for each in self.ranked}
        layouts = {each.layout for each in tried}
        hopeful: dict[object, Settings] = {}
        for settings in sorted(set(self.promising) - tried, key=lambda each: (self.forecast.of(each), each)):
            if self.forecast.of(settings) < (1 + _HOPE) * best.cost:
                # One configuration is enough for a new layout.
                hopeful.setdefault(settings if settings.layout in layouts else settings.layout, settings)
        order, others = list(hopeful.values()), [each for each in delays(best.settings, self.goal) if each not in tried]
        return [*order[:2], *others, *order[2:]]

    def _measure(self, configurations: Sequence[Settings], seconds: float) -> None:
        order = sorted(set(configurations))
        random.Random(len(self.journal.rows)).shuffle(order)
        self.servers.open(order)
        for settings in order:
            turn = self.servers.run(settings, *self._lengths(settings, seconds))
            self.journal.add("turn", asdict(turn))
            self.say(f"  {turn}")
        self._learn()

    def _lengths(self, settings: Settings, seconds: float) -> tuple[float, float]:
        """Return the seconds of a configuration's turn, and of the warm-up before it."""
        # How long a client waits for an answer.
        cycle = min(self.forecast.of(settings) / 1000, 2 * seconds)
        needed = _ANSWERS / (self.goal.rate or self.goal.clients / cycle)
        warm_up = max(_WARM_UP, min(1.5 * cycle, 2 * seconds))
        first = all(turn.settings != settings for turn in self.ranked)
        return max(seconds, min(needed, _LONGER * seconds)), warm_up * (1.5 if first else 1.0)

    def _learn(self) -> None:
        self.ranked = rank(turns_of(self.journal), self.goal)
        self.forecast = forecast_of(self.journal, self.goal).learned(self.ranked)


def answer(model: str, configured: Settings, goal: Goal, journal: Journal) -> dict[str, Any]:
    """Return the record's result from the journal so far; raise `Undetermined` when it has no turn."""
    ranked = rank(turns_of(journal), goal, configured)
    if not ranked:
        raise Undetermined("it ended before anything was measured; run it again, with more --minutes where it had few")
    forecast, best = forecast_of(journal, goal), ranked[0]
    promising, why = candidates(forecast, journal.of("room")[-1], configured)
    forecast = forecast.learned(ranked)
    for settings in sorted(set(promising) - {turn.settings for turn in ranked}):
        why[str(settings)] = f"{forecast.text(settings)}, and nothing near it was in the lead"
    return {
        "model": model,
        "goal": goal.to_dict(),
        "clients": None if goal.rate else goal.clients,
        "cores": forecast.cores,
        "fits": [{"threads": threads, **line.to_dict()} for threads, line in forecast.lines.items()],
        "configured": asdict(configured),
        "tried": [turn.row(goal) for turn in ranked],
        "pruned": [{"what": what, "why": reason} for what, reason in why.items()],
        "best": best.row(goal),
        "holds": goal.holds(best),
        "sentence": f"{model}: {_sentence(best, ranked, configured, goal)}.",
    }


def _sentence(best: Turn, ranked: Sequence[Turn], configured: Settings, goal: Goal) -> str:
    if not goal.holds(best):
        fix = "lower the rate, or serve it from more cores"
        if best.failed:
            fix = "look into why requests fail with `beeline bench load`"
        elif goal.p95_ms and best.p95_ms:
            fix = f"about {max(1, int(goal.clients * goal.p95_ms / best.p95_ms))} clients at a time would be within it"
        return f"nothing measured holds {goal}; the nearest is {best}; {fix}"
    against = f"what is configured now ({configured}) was not measured"
    for now in (turn for turn in ranked if turn.settings == configured):
        times = f"it takes {now.cost / best.cost:.2f} times as long" if goal.holds(now) else "it does not hold that"
        against = f"configured now is {now}: {times}" if now is not best else "it is what is configured now"
    return f"{best}, which holds {goal}; {against}"
