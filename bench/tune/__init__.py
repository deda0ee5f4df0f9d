"""Find batch size, workers, delay and threads for a latency budget or a rate, on the real server, within a time.

A batch is timed outside of any server; what that makes one expect prunes the grid of configurations; what is left is
measured on real servers, a turn each, and the finalists again and again. Whatever interrupts it, there is an answer.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError, ConfigError, Undetermined
from bench import pictures as files
from bench.pictures import Pictures
from bench.record import Journal, Record, state_folder, utc
from bench.sweep import Fit, fit
from bench.tune.grid import Forecast, Goal, Settings, candidates, counted, thread_counts
from bench.tune.search import SAME, Score, Search, choose, p95_text, rank, turns_of
from bench.tune.server import MOST_PICTURES, MOST_WORKERS, Cost, Model, Servers, find_model, numbers_of, time_batches
from host import ROOT, machine
from host.signals import Interrupted, as_exceptions
from serve import properties, servers

__all__ = ["Goal", "Request", "Tuned", "answer", "lines", "tune"]

# The share of the time for batches outside of any server, at most so many seconds for a number of threads; and for
# stopping the servers at the end, at most so many seconds.
_TIMING, _TIMING_SECONDS, _STOP, _STOP_SECONDS = 0.2, 6.0, 0.1, 8.0
# Beyond its deadline the search is ended by an alarm: a server that does not start is no reason to wait on.
_ALARM = 1.0
# Reasons on a terminal; the record has them all.
_MOST_REASONS = 16


@dataclass(frozen=True)
class Request:
    """What to tune: an archive by its path or its name in the store.

    One `picture` or a folder of `pictures` is sent, else the archive's golden pictures. `minutes` is how long all of it
    may take; 0 answers from what `resume` has, the journal of an interrupted tuning. `config_file` says what is
    configured now, and is what is changed.
    """

    wanted: str
    goal: Goal
    command: str = ""
    picture: Path | None = None
    pictures: Path | None = None
    minutes: float = 5.0
    server: str = "torchserve"
    store: Path = ROOT / "model_store"
    config_file: Path = ROOT / "config" / "config.properties"
    resume: Path | None = None


@dataclass(frozen=True)
class Tuned:
    """What came of it; `change` is of the configuration file, where a measurement says so."""

    record: Record
    change: properties.Change | None
    journal: Path
    interruption: Interrupted | None


def tune(request: Request, say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> Tuned:
    """Find the best configuration and return it with all that led to it.

    Raises:
        BeelineError: where the archive, the configuration, the pictures or the server do not do.
        Undetermined: when it was interrupted before even a batch was timed.
    """
    if request.minutes < 0 or (request.minutes == 0 and request.resume is None):
        raise ConfigError(f"--minutes is {request.minutes:g}; give more than 0, or 0 with --resume to only answer")
    started, begun, goal = utc(), time.monotonic(), request.goal
    servers.named(request.server)
    model = find_model(request.wanted, request.store, request.config_file, environ)
    name, sent = model.archive.model, files.choose(request.picture, request.pictures, model.archive, MOST_PICTURES)
    about = {
        "model": name,
        "archive": model.sha256,
        "goal": goal.to_dict(),
        "clients": None if goal.rate else goal.clients,
        "server": request.server,
        "pictures": sent.to_dict()["sha256"],
        "cores": machine.cores(),
        "device": environ.get("BEELINE_DEVICE", "auto"),
        "numbers": {key: value for key, value in model.properties.numbers.items() if key != "beeline_threads"},
        "vmargs": model.properties.texts.get("vmargs"),
    }
    path = state_folder(environ) / f"tune-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.journal"
    journal = Journal.resume(request.resume, about) if request.resume else Journal.begin(path, about)
    say(f"{name}: {goal}; configured now: {model.configured}; {len(sent.bodies)} pictures")
    tuning = _Tuning(request, model, sent, journal, say)
    interruption = tuning.measure(begun) if request.minutes else None
    result = answer(name, model.configured, tuning.forecast(), tuning.room, journal)
    journal.add("seconds", round(time.monotonic() - begun, 1))
    seconds = round(sum(journal.of("seconds")), 1)
    result |= {"server": request.server, "seconds": seconds, "interrupted": interruption is not None}
    change = None
    if result["holds"]:
        best = Settings.of(result["best"])
        # Of the file alone: what this shell's environment says is not there where it serves.
        written = properties.load(request.config_file, {}).numbers
        usual = written.get("beeline_threads", max(1, machine.cores() // best.workers))
        threads = None if best.threads == usual else best.threads
        change = properties.change(request.config_file, name, model.archive.version, numbers_of(best), threads)
    record = Record.now("tune", request.command, result, sent, started=started)
    return Tuned(record, change, journal.path, interruption)


@dataclass
class _Tuning:
    """One tuning while it runs."""

    request: Request
    model: Model
    pictures: Pictures
    journal: Journal
    say: Callable[[str], None]
    room: int = MOST_WORKERS

    def measure(self, begun: float) -> Interrupted | None:
        """Measure until it is decided or time is up; return the signal that interrupted it."""
        request, configured, whole = self.request, self.model.configured, 60 * self.request.minutes
        deadline = begun + whole - min(_STOP_SECONDS, _STOP * whole)
        try:
            with as_exceptions(deadline + _ALARM - time.monotonic()):
                cost = self._time_batches(whole)
                with Servers(self.model, request.goal, self.pictures, request.server, cost, self.say) as opened:
                    self.room = max(1, opened.room())
                    promising, pruned = candidates(self.forecast(), self.room, configured)
                    self.say(f"  {len(promising)} configurations are worth measuring, {len(pruned)} kinds are not")
                    places = (opened, self.journal, time.monotonic, deadline, self.say)
                    Search(self.forecast(), promising, configured, *places).run()
        except Interrupted as interruption:
            self.say("time is up" if interruption.is_alarm else f"interrupted ({interruption})")
            return None if interruption.is_alarm else interruption
        except (BeelineError, OSError) as error:
            # With an answer at hand, a server that failed late is no reason to keep it back.
            if not self.journal.of("turn"):
                raise
            self.say(f"ended early: {error}")
        return None

    def _time_batches(self, whole: float) -> Cost:
        """Time batches outside of the server, for each number of threads; return what a worker costs."""
        counts = sorted({*thread_counts(machine.cores()), self.model.configured.threads})
        for threads in counts:
            if sum(point[0] == threads for point in self.journal.of("batch")) > 1:
                continue
            seconds = min(_TIMING_SECONDS, _TIMING * whole / len(counts))
            for reply in time_batches(self.model, self.pictures, threads, seconds):
                if "batch" in reply:
                    self.journal.add("batch", [threads, reply["batch"], reply["ms"]])
                else:
                    self.journal.add("cost", reply["cost"])
            line, name = self.forecast().lines[threads], counted(threads, "thread")
            self.say(f"  {name}: a batch of n takes {line.a_ms:.1f} n + {line.b_ms:.1f} ms ({line.error:.0%} off)")
        return Cost(**next(iter(self.journal.of("cost")), {}))

    def forecast(self) -> Forecast:
        """Return what the times of a batch make one expect; raise `Undetermined` when there is none."""
        points: dict[int, list[tuple[int, float]]] = {}
        for threads, size, milliseconds in self.journal.of("batch"):
            points.setdefault(threads, []).append((size, milliseconds))
        if not points:
            raise Undetermined("it was interrupted before a single batch was timed; run it again")
        # Interrupted before its turn came: what the fewest threads take is the best guess there is.
        points.setdefault(self.model.configured.threads, points[min(points)])
        # Two points, a noisy one among them, say nothing of large batches: then the line is without a fixed cost.
        alone = {threads: Fit(own[-1][1] / own[-1][0], 0.0, 1.0) for threads, own in sorted(points.items())}
        lines = {key: (fit(points[key]) if len(points[key]) > 2 else None) or line for key, line in alone.items()}
        return Forecast(lines, self.request.goal, machine.cores())


def answer(model: str, configured: Settings, forecast: Forecast, room: int, journal: Journal) -> dict[str, Any]:
    """Return the record's result as a journal has it so far, but for how the measuring went."""
    goal, (promising, pruned) = forecast.goal, candidates(forecast, room, configured)
    ranked = rank(turns_of(journal), goal)
    forecast = forecast.learned([(each.settings, each.speed, each.latency) for each in ranked])
    for settings in set(promising) - {each.settings for each in ranked}:
        pruned[str(settings)] = f"{forecast.text(settings)}, and nothing near it was in the lead"
    chosen, expected = choose(ranked, goal, configured), promising[0]
    per_second, p95_ms = forecast.of(expected)
    figures = {"per_second": round(per_second, 2), "p95_ms": round(p95_ms, 1) if math.isfinite(p95_ms) else None}
    best = (
        chosen.to_dict() if chosen else {**asdict(expected), **figures, "failed": 0, "holds": False, "expected": True}
    )
    sentence = _sentence(chosen, ranked, configured, goal, f"{expected}: {forecast.text(expected)}")
    fits = [{"threads": threads, **line.to_dict()} for threads, line in forecast.lines.items()]
    return {
        "model": model,
        "goal": goal.to_dict(),
        "clients": None if goal.rate else goal.clients,
        "cores": forecast.cores,
        "fit": next(line for line in fits if line["threads"] == best["threads"]),
        "fits": fits,
        "configured": asdict(configured),
        "tried": [score.to_dict() for score in ranked],
        "pruned": [{"what": what, "why": why} for what, why in pruned.items()],
        "best": best,
        "holds": best["holds"],
        "sentence": f"{model}: {sentence}.",
    }


def _sentence(best: Score | None, ranked: Sequence[Score], configured: Settings, goal: Goal, expected: str) -> str:
    """Return what, how much, under which goal, and against what is configured now."""
    if best is None:
        return f"no turn was measured; from the time of a batch alone, {expected} ({goal})"
    figures = f"{best.settings}: {best.per_second:.1f} requests a second, {p95_text(best.p95_ms)}"
    if best.failed:
        figures += f", {best.failed} requests failed or took over {goal.deadline:g} s"
    if not best.holds:
        instead = "lower the rate, or serve it from more cores"
        if goal.p95_ms and (not best.p95_ms or (best.failed and best.p95_ms <= goal.p95_ms)):
            instead = "look into why requests fail with `beeline bench load`"
        elif goal.p95_ms and best.p95_ms:
            clients = max(1, int(goal.clients * goal.p95_ms / best.p95_ms))
            instead = f"about {clients} clients at a time would be within the budget, or serve it from more cores"
        return f"nothing measured holds {goal}; the nearest is {figures}; {instead}"
    now = next((each for each in ranked if each.settings == configured), None)
    text = f"what is configured now ({configured})"
    if now is None:
        against = f"{text} was not measured"
    elif now is best:
        against = "it is what is configured now"
    else:
        text = f"{text[:-1]}: {now.per_second:.1f} a second, {p95_text(now.p95_ms)})"
        times = math.exp(now.latency - best.latency if goal.rate else best.speed - now.speed)
        against = f"{text} has {times:.2f} times its p95" if goal.rate else f"{times:.2f} times {text}"
        if not now.holds:
            against = f"{text} does not hold it"
        elif not goal.rate and abs(times - 1) <= SAME:
            against = f"no faster than {text}, but quicker to answer"
    return f"{figures}, which holds {goal}; {against}"


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return a result's table of what was tried, and why the rest was not."""
    rows = [("requests/s", "p95 ms", "failed", "batch seen", "turns", "goal", "configuration")]
    for row in result["tried"]:
        p95, batch = (("-" if row[key] is None else f"{row[key]:.{n}f}") for key, n in (("p95_ms", 0), ("batch", 1)))
        best, now, settings = (Settings.of(values) for values in (result["best"], result["configured"], row))
        marks = " <- chosen" * (settings == best) + " <- configured now" * (settings == now)
        figures = (f"{row['per_second']:.1f}", p95, str(row["failed"]), batch, str(row["turns"]))
        rows.append((*figures, "holds" if row["holds"] else "no", f"{settings}{marks}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows] if len(rows) > 1 else []
    reasons = [f"  {one['what']}: {one['why']}" for one in result["pruned"]]
    more = (
        [f"  and {len(reasons) - _MOST_REASONS} more, whose reasons the record has"] if reasons[_MOST_REASONS:] else []
    )
    return [*table, "not measured:", *reasons[:_MOST_REASONS], *more]
