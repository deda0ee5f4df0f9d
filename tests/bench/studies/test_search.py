"""The search without a forecast: what it measures, what it goes on with, and how the tuner's choice is judged."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from bench.record import Journal
from bench.studies.search import NEAR, RANDOM, around, compare, result
from bench.tune import rank, turns_of
from bench.tune.grid import Goal, Settings, Turn
from bench.tune.server import Servers
from tests.bench.tune.conftest import FakeServer, Machine

GOAL = Goal(p95_ms=5000)


def test_it_takes_what_is_nearest_to_the_choice_and_others() -> None:
    choice = Settings(16, 2, 2, 1)
    wanted = around(choice, 2)
    assert len(set(wanted)) == NEAR + RANDOM
    assert choice not in wanted
    near = wanted[:NEAR]
    assert {Settings(16, 2, 10, 1), Settings(12, 2, 2, 1), Settings(16, 1, 2, 1)} <= set(near)
    assert wanted == around(choice, 2)
    # What somebody configured by hand is near something too.
    assert len(around(Settings(5, 3, 0, 1), 2)) == NEAR + RANDOM


def searched(tmp_path: Path, choice: Settings, interrupt_at: float = 1e9) -> tuple[dict[str, object], FakeServer]:
    server = FakeServer(Machine(), GOAL, noise=0.01, drift=0.02, interrupt_at=interrupt_at)
    journal = Journal.job(tmp_path / f"{choice.label}.journal", {})
    scores = compare(cast(Servers, server), journal, GOAL, choice, around(choice, 2))
    return result("colours", GOAL, *scores, choice), server


@pytest.mark.parametrize(("choice", "low"), [(Settings(16, 2, 2, 1), 0.97), (Settings(2, 1, 2, 1), 0.3)])
def test_a_good_choice_has_a_share_near_one_and_a_bad_one_its_own(tmp_path: Path, choice: Settings, low: float) -> None:
    values, _ = searched(tmp_path, choice)
    assert low <= cast(float, values["share"]) <= low + 0.3
    assert values["holds"] is (low > 0.9)
    assert len(cast(list[object], values["tried"])) == NEAR + RANDOM + 1
    json.dumps(values, allow_nan=False)


def test_an_interrupted_job_measures_nothing_twice(tmp_path: Path) -> None:
    choice = Settings(16, 2, 2, 1)
    for second in (100.0, 200.0, 300.0):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path, choice, second)
    _, server = searched(tmp_path, choice)
    turns = turns_of(Journal.job(tmp_path / f"{choice.label}.journal", {}))
    assert sorted(Counter(turn.settings for turn in turns).values()) == [1] * (NEAR + RANDOM - 3) + [13] * 4
    assert len(server.runs) < len(turns)


def test_a_choice_that_does_not_hold_is_worth_nothing_where_the_best_does() -> None:
    best, choice = Settings(16, 2, 2, 1), Settings(32, 2, 2, 1)
    ranked = rank([Turn(best, 5.0, 90.0, 400.0, 0, 550.0), Turn(choice, 5.0, 100.0, 600.0, 0, 500.0)], Goal(p95_ms=500))
    assert result("colours", Goal(p95_ms=500), ranked, ranked, choice)["share"] == 0.0
