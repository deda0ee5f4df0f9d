"""`beeline bench tune`: ladder, forecast, race on the real server, answer; within a time, whatever interrupts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from beeline.errors import BeelineError, ConfigError, Undetermined
from bench import record
from bench.pictures import Pictures
from bench.tune import candidates, ladder, model, written
from bench.tune.answer import Answer
from bench.tune.forecast import Curve, Forecaster
from bench.tune.goal import Goal
from bench.tune.ladder import Cost
from bench.tune.model import Model
from bench.tune.race import Race
from bench.tune.settings import counted
from bench.tune.stand import MOST_WORKERS, Stand
from bench.tune.turns import Journal
from host import ROOT, machine
from host.signals import Interrupted, as_exceptions
from serve import servers

Say = Callable[[str], None]

# Parts of the time: for the ladder of all numbers of threads, and for stopping the servers at the end.
_LADDER, _STOP = 0.2, 0.04
_LADDER_SECONDS, _STOP_SECONDS = 6.0, 8.0
# Beyond its deadline the race is ended by an alarm: a server that does not start is no reason to wait on.
_ALARM = 1.0


@dataclass(frozen=True)
class Request:
    """What to tune.

    Attributes:
        wanted: the path of an archive, or its name in the store.
        goal: the budget or the rate.
        command: the command line, for the record.
        picture: what is sent; the archive's golden pictures where neither this nor `pictures` is given.
        pictures: a folder of what is sent.
        minutes: how long all of it may take; 0 answers from what `resume` has.
        server: `torchserve` or `mms`.
        store: the folder of archives.
        config_file: what is configured now, and what is changed.
        resume: the file of an interrupted tuning.
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
    """What came of it.

    Attributes:
        answer: the configuration and its reasons.
        record: the measurement, for a file and a report.
        change: what would be written to the configuration file; None where no measurement says so.
        journal: the file of turns, with which it can go on.
        asked: the signal that interrupted it; None where it ended by itself or with its time.
    """

    answer: Answer
    record: record.Record
    change: written.Change | None
    journal: Path
    asked: Interrupted | None


def folder(environ: Mapping[str, str]) -> Path:
    """Return where journals and plots are kept: `BEELINE_STATE`, else `.beeline/bench` in the repository."""
    given = environ.get("BEELINE_STATE")
    return Path(given).resolve() / "bench" if given else ROOT / ".beeline" / "bench"


def tune(request: Request, say: Say, environ: Mapping[str, str] = os.environ) -> Tuned:
    """Find the best configuration and return it with all that led to it.

    Raises:
        BeelineError: where the archive, the configuration, the pictures or the server do not do.
        Undetermined: when it was interrupted before even a batch was timed.
    """
    if request.minutes < 0 or (request.minutes == 0 and request.resume is None):
        raise ConfigError(f"--minutes is {request.minutes:g}; give more than 0, or 0 with --resume to only answer")
    started, begun = record.utc(), time.monotonic()
    servers.named(request.server)
    found = model.find(request.wanted, request.store, request.config_file, environ)
    sent = model.sent(found, request.picture, request.pictures)
    journal = _journal(request, found, sent, environ)
    study = _Study(request, found, sent, journal, say, begun + 60 * request.minutes)
    if not journal.turns:
        say(f"{found.name}: {request.goal.text}; configured now: {found.configured}; {len(sent.bodies)} pictures")
    asked = study.measure()
    answer = study.answer()
    result = {
        **answer.to_dict(),
        "server": request.server,
        "seconds": round(time.monotonic() - begun + float(journal.notes.get("seconds", 0.0)), 1),
        "interrupted": asked is not None,
    }
    journal.note("seconds", result["seconds"])
    changed = None
    if answer.holds:
        threads = max(1, machine.cores() // answer.settings.workers)
        changed = written.change(request.config_file, found.name, found.archive.version, answer.settings, threads)
    made = record.Record.now("tune", request.command, result, sent, started=started)
    return Tuned(answer, made, changed, journal.path, asked)


def _journal(request: Request, found: Model, sent: Pictures, environ: Mapping[str, str]) -> Journal:
    """Return the file to keep turns in: the one to resume, else a new one."""
    about: dict[str, Any] = {
        "model": found.name,
        "archive": found.sha256,
        "goal": request.goal.to_dict(),
        "clients": None if request.goal.open else request.goal.clients,
        "server": request.server,
        "pictures": sent.to_dict()["sha256"],
        "cores": machine.cores(),
    }
    if request.resume is not None:
        return Journal.resume(request.resume, about)
    name = f"tune-{found.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.journal"
    return Journal.begin(folder(environ) / name, about)


@dataclass
class _Study:
    """One tuning while it runs."""

    request: Request
    model: Model
    pictures: Pictures
    journal: Journal
    say: Say
    end: float

    def measure(self) -> Interrupted | None:
        """Measure until it is decided or time is up; return the signal that interrupted it."""
        whole = 60 * self.request.minutes
        deadline = self.end - max(min(_STOP_SECONDS, 0.1 * whole), _STOP * whole)
        if self.request.minutes == 0:
            return None
        rung: list[int] = []
        try:
            with as_exceptions(), _alarm(deadline + _ALARM - time.monotonic(), rung):
                cost = self._climb(whole)
                with Stand(self.model, self.request.goal, self.pictures, self.request.server, cost, self.say) as stand:
                    self._race(stand, deadline)
        except Interrupted as asked:
            if not rung:
                self.say(f"interrupted ({asked})")
                return asked
            self.say("time is up")
        except (BeelineError, OSError) as error:
            # With an answer at hand, a server that failed late is no reason to keep it back.
            if not self.journal.turns:
                raise
            self.say(f"ended early: {error}")
        return None

    def answer(self) -> Answer:
        """Return the answer from what is in the journal."""
        forecaster = self._forecaster()
        considered = candidates.field(forecaster, self._room(), (self.model.configured,))
        return Answer.of(self.model.name, self.model.configured, forecaster, considered, self.journal.turns)

    def _climb(self, whole: float) -> Cost:
        """Time batches outside of the server, for each number of threads; return what a worker costs."""
        counts = candidates.thread_counts(machine.cores())
        counts = (*counts, *({self.model.configured.threads} - set(counts)))
        begun = time.monotonic()
        with model.unpacked(self.model) as folder:
            for threads in counts:
                known = [size for each, size, _ in self.journal.points if each == threads]
                late = self.journal.points and time.monotonic() - begun > 2 * _LADDER * whole
                if len(known) > 1 or (late and threads != self.model.configured.threads):
                    continue
                seconds = min(_LADDER_SECONDS, _LADDER * whole / len(counts))
                lone = self.model.properties.numbers.get("beeline_lone_threads")
                cost = ladder.climb(folder, self.pictures, threads, seconds, self._point(threads), lone=lone)
                if cost is not None and "cost" not in self.journal.notes:
                    self.journal.note("cost", vars(cost))
                found = self._forecaster().curves[threads].line
                self.say(
                    f"  {counted(threads, 'thread')}: a batch of n takes {found.a_ms:.1f} n + {found.b_ms:.1f} ms "
                    f"({found.error:.0%} off at most)"
                )
        return self._cost()

    def _point(self, threads: int) -> Callable[[int, float], None]:
        return lambda size, milliseconds: self.journal.climb(threads, size, milliseconds)

    def _race(self, stand: Stand, deadline: float) -> None:
        forecaster = self._forecaster()
        self.journal.note("room", stand.room())
        considered = candidates.field(forecaster, self._room(), (self.model.configured,))
        self.say(
            f"  {len(considered.promising)} configurations are worth measuring, {len(considered.pruned)} kinds are not"
        )
        Race(
            goal=self.request.goal,
            forecaster=forecaster,
            promising=considered.promising,
            configured=self.model.configured,
            course=stand,
            log=self.journal,
            clock=time.monotonic,
            deadline=deadline,
            say=self.say,
        ).run()

    def _cost(self) -> Cost:
        return Cost(**self.journal.notes["cost"]) if "cost" in self.journal.notes else ladder.UNKNOWN

    def _room(self) -> int:
        return max(int(self.journal.notes.get("room", MOST_WORKERS)), 1)

    def _forecaster(self) -> Forecaster:
        """Return what the ladder's points make one expect.

        Raises:
            Undetermined: when there is none.
        """
        points: dict[int, list[tuple[int, float]]] = {}
        for threads, size, milliseconds in self.journal.points:
            points.setdefault(threads, []).append((size, milliseconds))
        if not points:
            raise Undetermined("it was interrupted before a single batch was timed; run it again")
        curves = {threads: Curve.through(own) for threads, own in points.items()}
        if self.model.configured.threads not in curves:
            # Interrupted before its turn came: what one thread takes is the best guess there is.
            curves[self.model.configured.threads] = curves[min(curves)]
        return Forecaster(curves, self.request.goal, machine.cores())


@contextmanager
def _alarm(seconds: float, rung: list[int]) -> Iterator[None]:
    """Ask this process to end after so many seconds, and say in `rung` that it was this and nobody else."""

    def ring(number: int, frame: FrameType | None) -> None:
        rung.append(number)
        signal.raise_signal(signal.SIGTERM)

    kept = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
