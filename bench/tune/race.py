"""The race: short turns for many configurations, longer ones for the few that lead, until time is up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.tune.candidates import neighbours, spread
from bench.tune.forecast import Forecaster
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.standing import Standing, choose, loss, standings
from bench.tune.turns import Round, Turn

# Seconds of a turn in the rounds that look for candidates, then in those that decide.
_TURNS = (4.0, 5.0, 6.0)
_LONG = 6.0
# After each of these rounds, one that is worse than the best by more than this part is out.
_MARGINS = (0.25, 0.15, 0.10)
_FINALISTS = 3
# So many are measured first, which gives some answer and tells what a start takes; then so many that differ most;
# in each later round, so many that may be better than the best.
_FIRST, _WAVE, _AGAIN = 2, 6, 5
# What a doubling of the batch may change beyond the forecast, as a part of one.
_UNKNOWN = 0.03
# A share of the time is kept for the rounds that decide.
_DECIDING = 0.35
_MOST_ROUNDS = 8
# A turn lasts this many times as long as a client waits for one answer, or its percentile says nothing;
# at a rate, it has so many arrivals. Slow models get longer turns, up to this factor.
_CYCLES, _ARRIVALS, _LONGER = 4.0, 300, 6.0
# Less cannot be measured.
_LEAST_SECONDS = 1.0
# Over the budget by less than this, a longer turn may tell otherwise.
_OVER_BUDGET = 1.25


class Course(Protocol):
    """Where configurations are measured: the real server, or a fake one in tests."""

    def open(self, wanted: Sequence[Settings]) -> None:
        """Make configurations answer, beside those that do already."""

    def close(self, settings: Settings) -> None:
        """Let go of one that is out of the race."""

    def run(self, settings: Settings, seconds: float, warm_up: float) -> dict[str, Any]:
        """Make the load on one and return its summary."""

    def opening_seconds(self, wanted: Sequence[Settings]) -> float:
        """Return how long opening them will take, about."""

    def room(self) -> int:
        """Return how many more workers memory holds."""


class Log(Protocol):
    """Where rounds and turns are kept: a journal."""

    turns: list[Turn]
    rounds: list[Round]

    def add(self, turn: Turn) -> None:
        """Keep a turn, in `turns` too."""

    def plan(self, planned: Round) -> None:
        """Keep what a round will measure, in `rounds` too."""


@dataclass
class Race:
    """One tuning's measurements.

    Attributes:
        goal: what decides.
        forecaster: what is expected before it is measured.
        promising: the configurations to choose from, best forecast first.
        configured: what is configured now; measured in any case.
        course: where they are measured.
        log: what was measured before, and what will be.
        clock: seconds; any monotonic clock.
        deadline: of that clock.
        say: takes lines for people.
    """

    goal: Goal
    forecaster: Forecaster
    promising: Sequence[Settings]
    configured: Settings
    course: Course
    log: Log
    clock: Callable[[], float]
    deadline: float
    say: Callable[[str], None]
    _opened: set[Settings] = field(default_factory=set)

    def run(self) -> None:
        """Measure until it is decided or time is up; what was measured is in the log whenever it ends."""
        until = self.clock() + (1 - _DECIDING) * self.left()
        running, stage = self._resume()
        while stage < len(_TURNS):
            fresh = self._explore(stage, running, until)
            if not fresh:
                break
            running = self._cut([*running, *fresh], _MARGINS[stage])
            stage += 1
        self._decide(max(stage, len(_TURNS)), running)

    def _explore(self, stage: int, running: Sequence[Settings], until: float) -> list[Settings]:
        """Measure those still in the race and some new ones; return the new ones."""
        # Nothing is to be decided between less than two.
        end = until if len(running) > 1 else self.deadline
        fresh = self._affordable(self._fresh(), running, _TURNS[stage], end)
        if not fresh:
            return []
        begins = not self.log.turns
        self._round(stage, [*running, *fresh])
        if begins:
            # The first ones told what a start takes, and are some answer whatever becomes of the others.
            others = self._affordable(self._fresh(), fresh, _TURNS[stage], until)
            if others:
                self._round(stage, others)
                fresh += others
        return fresh

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - self.clock()

    def turn_seconds(self, settings: Settings, seconds: float) -> tuple[float, float, float]:
        """Return how long to measure a configuration, to warm it up before, to await the last answers after it."""
        if self.goal.rate is not None:
            needed, cycle = _ARRIVALS / self.goal.rate, 0.5
        else:
            cycle = self.goal.clients / max(self._forecaster().of(settings).per_second, 0.1)
            needed = _CYCLES * cycle
        first = all(turn.settings != settings for turn in self.log.turns)
        warm_up = max(2.0, min(1.5 * cycle, 2 * seconds)) if first else max(1.0, min(cycle, 2 * seconds))
        return max(seconds, min(needed, _LONGER * seconds)), warm_up, max(cycle, 0.5)

    def _resume(self) -> tuple[list[Settings], int]:
        """End the round that was interrupted; return who is still in the race, and the next stage."""
        if not self.log.rounds:
            return [], 0
        last = self.log.rounds[-1]
        done = {turn.settings for turn in self.log.turns if turn.round >= last.number}
        missing = [each for each in last.wanted if each not in done]
        if missing:
            self._round(last.stage, missing)
        wanted = [each for planned in self.log.rounds if planned.stage == last.stage for each in planned.wanted]
        return self._cut(wanted, _MARGINS[min(last.stage, len(_MARGINS) - 1)]), last.stage + 1

    def _decide(self, stage: int, running: Sequence[Settings]) -> None:
        """Measure the leaders in long turns until one is clearly best, or cannot be told from the next."""
        finalists = self._leaders(running)
        for number in range(_MOST_ROUNDS):
            # What is configured now is what they must beat.
            also = [] if number or self.configured in finalists else [self.configured]
            if not finalists or self.left() < self._cost(finalists[:2], _LONG):
                return
            self._round(stage + number, [*finalists, *also])
            if number > 0 and self._decided(finalists):
                return
            finalists = self._leaders(finalists)

    def _leaders(self, running: Sequence[Settings]) -> list[Settings]:
        return [each.settings for each in self._ranked() if each.settings in running][:_FINALISTS]

    def _decided(self, finalists: Sequence[Settings]) -> bool:
        ranked = [each for each in self._ranked() if each.settings in finalists]
        if len(ranked) < 2:
            return True
        apart = abs(ranked[0].speed - ranked[1].speed)
        unsure = math.hypot(ranked[0].error, ranked[1].error)
        return ranked[0].holds and (apart > 3 * unsure or max(apart, unsure) < 0.02)

    def _fresh(self) -> list[Settings]:
        """Return what to measure for the first time: first what differs most, then the leaders' neighbours."""
        measured = {turn.settings for turn in self.log.turns}
        left = [each for each in self.promising if each not in measured]
        if len(measured) <= _FIRST:
            different = spread(self.promising, self.forecaster.cores)
            if not measured:
                return list(dict.fromkeys([different[0], self.configured]))
            others = [each for each in different if each not in measured]
            # Where the clients just fill the workers' batches, waiting for all of them decides.
            leader = choose(self._ranked(), self.goal)
            assert leader is not None
            waiting = [
                each
                for each in neighbours(leader.settings, left)
                if each.max_batch_delay > leader.settings.max_batch_delay and not self.goal.open
            ]
            return list(dict.fromkeys([*others[:1], *waiting, *others[1:]]))[:_WAVE]
        by, best = self._forecaster(), choose(self._ranked(), self.goal)
        assert best is not None
        hopes = {each: self._hope(each, best, by) for each in left}
        order = [each for each in sorted(left, key=lambda each: (-hopes[each], each)) if hopes[each] > 0]
        # Of a layout that nobody tried, one configuration says enough.
        new = [each for each in order if (each.workers, each.threads) not in by.paces]
        order = [each for each in order if each not in new[1:]]
        # The effect of delay no forecast tells.
        return list(dict.fromkeys([*order[:_AGAIN], *neighbours(best.settings, left)]))[: _AGAIN + 2]

    def _hope(self, settings: Settings, best: Standing, by: Forecaster) -> float:
        """Return by which part it may be better than the best so far, as far as its neighbours tell."""
        expected = by.of(settings)
        gain = best.delay - math.log(expected.p95_ms) if self.goal.open else math.log(expected.per_second) - best.speed
        return gain + best.error + _UNKNOWN * min(2.0, by.steps_from_measured(settings))

    def _affordable(
        self, fresh: Sequence[Settings], running: Sequence[Settings], seconds: float, until: float
    ) -> list[Settings]:
        """Return as many as time and memory allow; a first round measures one at least."""
        kept: list[Settings] = []
        room = self.course.room()
        for each in fresh:
            wanted = [*kept, each]
            if sum(one.workers for one in wanted) > room and (kept or running):
                continue
            cost = self.course.opening_seconds(wanted) + self._cost([*running, *wanted], seconds)
            if self.clock() + cost > until and (running or kept):
                break
            kept.append(each)
        return kept

    def _cost(self, wanted: Sequence[Settings], seconds: float) -> float:
        return sum(sum(self.turn_seconds(each, seconds)) for each in wanted)

    def _round(self, stage: int, wanted: Sequence[Settings]) -> None:
        """Give each one turn, in an order that no round repeats."""
        number = max((turn.round for turn in self.log.turns), default=0) + 1
        order = list(dict.fromkeys(wanted))
        random.Random(number).shuffle(order)
        self.log.plan(Round(number, stage, tuple(order)))
        closed = [each for each in order if each not in self._opened]
        if closed:
            self.course.open(closed)
            self._opened.update(closed)
        length = _TURNS[stage] if stage < len(_TURNS) else _LONG
        for settings in order:
            seconds, warm_up, last = self.turn_seconds(settings, length)
            seconds = min(seconds, self.left() - warm_up - last)
            if seconds < _LEAST_SECONDS:
                return
            self.log.add(Turn.of(settings, number, self.course.run(settings, seconds, warm_up)))
            self.say(f"  {self.log.turns[-1]}")

    def _ranked(self) -> list[Standing]:
        return standings(self.log.turns, self.goal)

    def _forecaster(self) -> Forecaster:
        return self.forecaster.learned(self._ranked()) if self.log.turns else self.forecaster

    def _cut(self, wanted: Sequence[Settings], margin: float) -> list[Settings]:
        """Return those of a round that may still win, half of them at most, and let go of the others."""
        ranked = self._ranked()
        best = choose(ranked, self.goal)
        if best is None:
            return []
        alive = [each.settings for each in ranked if each is best or self._alive(each, best, margin)]
        kept = [each for each in alive if each in wanted][: max(_FINALISTS, (len(set(wanted)) + 1) // 2)]
        for settings in sorted(self._opened - {*kept, self.configured}):
            self.course.close(settings)
            self._opened.discard(settings)
        return kept

    def _alive(self, standing: Standing, best: Standing, margin: float) -> bool:
        if standing.failed > best.failed:
            return False
        if best.holds and not standing.holds:
            # A budget that is missed by little may be kept in a longer turn; a rate is held or not.
            limit = _OVER_BUDGET * (self.goal.p95_ms or 0.0)
            if standing.p95_ms is None or standing.p95_ms > limit:
                return False
        allowed = 2 * margin if self.goal.open else margin
        return loss(standing, best, self.goal) <= max(allowed, 2 * standing.error)
