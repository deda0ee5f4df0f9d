"""The exhaustive sweep: what shares a server's start, and how the tuner's choice is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from beeline.errors import BeelineError, ConfigError
from bench import sweep
from bench.sweep import BATCHES, DELAYS, Options, Sweep, grid, groups, result
from bench.tune.goal import Goal
from bench.tune.settings import Settings
from bench.tune.standing import standings
from bench.tune.turns import Journal, Turn
from tests.bench.tune.conftest import FakeServer, Machine

LAYOUTS = ((1, 1), (2, 1), (3, 1), (1, 2))
GOAL = Goal(p95_ms=5000)


class FakeStand(FakeServer):
    """A fake of the stand: the fake server, whose configurations lose workers, and which stops."""

    starts = 0

    def open(self, wanted: object) -> None:
        self.starts += 1
        super().open(wanted)  # type: ignore[arg-type]

    def shrink(self, settings: Settings, workers: int) -> Settings:
        self.opened.remove(settings)
        smaller = Settings(settings.batch_size, workers, settings.max_batch_delay, settings.threads)
        self.opened.add(smaller)
        return smaller

    def stop(self) -> None:
        self.opened.clear()


def test_the_default_grid_is_large_enough() -> None:
    assert len(grid(BATCHES, DELAYS, LAYOUTS)) == 72 >= sweep.LEAST


def test_every_configuration_is_in_one_group_and_few_starts_do() -> None:
    wanted = grid(BATCHES, DELAYS, LAYOUTS)
    found = list(groups(wanted, 18))
    assert sorted(settings for group in found for line in group for settings in line) == sorted(wanted)
    assert len(found) <= 5
    for group in found:
        assert sum(line[0].workers for line in group) <= 18
        assert len({settings.threads for line in group for settings in line}) == 1
        for line in group:
            assert [settings.workers for settings in line] == sorted((each.workers for each in line), reverse=True)
            assert len({(each.batch_size, each.max_batch_delay) for each in line}) == 1


def swept(tmp_path: Path, tuned: Settings, **options: float) -> tuple[Sweep, FakeStand, list[Settings]]:
    stand = FakeStand(Machine(), GOAL, noise=0.01, drift=0.02, **options)  # type: ignore[arg-type]
    path = tmp_path / "a.journal"
    journal = Journal.resume(path, {}) if path.exists() else Journal.begin(path, {})
    return Sweep(stand, journal, GOAL, Options()), stand, grid(BATCHES, DELAYS, LAYOUTS)  # type: ignore[arg-type]


def test_a_good_choice_has_a_share_near_one_and_a_bad_one_its_own(tmp_path: Path) -> None:
    for name, tuned, low, high in (("good", Settings(16, 2, 2, 1), 0.97, 1.0), ("bad", Settings(2, 1, 2, 1), 0.4, 0.6)):
        folder = tmp_path / name
        folder.mkdir()
        made, stand, wanted = swept(folder, tuned)
        values = result("colours", GOAL, *made.run(wanted, tuned), tuned)
        assert low <= values["share"] <= high, values["share"]
        assert len(values["tried"]) == 72
        assert Settings.of(values["tuned"]) == tuned
        assert stand.starts <= 6
        json.dumps(values, allow_nan=False)


def test_an_interrupted_sweep_measures_nothing_twice(tmp_path: Path) -> None:
    tuned = Settings(16, 2, 2, 1)
    runs: list[Settings] = []
    for second in (100.0, 150.0, 200.0, 250.0):
        made, stand, wanted = swept(tmp_path, tuned, interrupt_at=second)
        with pytest.raises(KeyboardInterrupt):
            made.run(wanted, tuned)
        runs += stand.runs[: len(made.journal.turns)]
    made, stand, wanted = swept(tmp_path, tuned)
    made.run(wanted, tuned)
    alone = [turn.settings for turn in made.journal.turns if turn.round == 1]
    assert sorted(alone) == sorted(wanted)
    beside = [(turn.round, turn.settings) for turn in made.journal.turns if turn.round > 1]
    assert len(beside) == len(set(beside)) == Options().rounds * 4
    with pytest.raises(BeelineError, match="compares other configurations"):
        swept(tmp_path, tuned)[0].run(wanted, Settings(4, 1, 1, 1))


def test_a_choice_that_does_not_hold_is_worth_nothing_where_the_best_does() -> None:
    best, tuned = Settings(16, 2, 2, 1), Settings(32, 2, 2, 1)
    turns = [Turn(best, 2, 5.0, 90.0, 400.0, 0), Turn(tuned, 2, 5.0, 100.0, 600.0, 0)]
    ranked = standings(turns, Goal(p95_ms=500))
    assert result("colours", Goal(p95_ms=500), ranked, ranked, tuned)["share"] == 0.0


def test_lists_are_numbers() -> None:
    with pytest.raises(ConfigError, match="is no list of whole numbers"):
        sweep._numbers("1,x")
    with pytest.raises(ConfigError, match="give workers x threads"):
        sweep._layouts("1,2")
    assert sweep._layouts("1x1, 2X3") == [(1, 1), (2, 3)]
