"""Lost workers against those that were asked to go, in whatever order both are seen."""

from __future__ import annotations

from serve.metrics import GRACE, Restarts


class Watch:
    """Restarts under a clock that the test turns."""

    def __init__(self, wanted: int | None, *living: str) -> None:
        self.now = 0.0
        self.restarts = Restarts(clock=lambda: self.now)
        if wanted is not None:
            self.restarts.expect(wanted)
        self.see(*living)

    def see(self, *living: str, dead: str = "", after: float = 1) -> int:
        self.now += after
        self.restarts.observe(set(living), set(dead))
        return self.restarts.count

    def later(self, *living: str) -> int:
        return self.see(*living, after=GRACE)


def test_a_worker_whose_place_is_taken_is_one_restart_at_once() -> None:
    watch = Watch(2, "a", "b")
    assert watch.see("a", "b") == 0
    assert watch.see("b", "c") == 1
    assert watch.see("b", "c") == 1
    assert watch.later("b", "c") == 1


def test_a_worker_whose_place_stays_empty_is_one_restart_after_a_while() -> None:
    watch = Watch(2, "a", "b")
    assert watch.see("a") == 0
    assert watch.later("a") == 1
    # The one that comes late takes the place of one that is counted already.
    assert watch.later("a", "c") == 1


def test_scaling_down_is_none_whichever_is_seen_first() -> None:
    told_first = Watch(4, "a", "b", "c", "d")
    told_first.restarts.expect(2)
    told_first.see("a", "b", "c")
    assert told_first.later("a", "b") == 0
    assert told_first.later("a", "b") == 0

    seen_first = Watch(4, "a", "b", "c", "d")
    seen_first.see("a", "b")
    seen_first.restarts.expect(2)
    assert seen_first.later("a", "b") == 0


def test_scaling_down_excuses_no_more_than_were_asked_to_go() -> None:
    watch = Watch(4, "a", "b", "c", "d")
    watch.restarts.expect(2)
    watch.see("a")
    assert watch.later("a") == 1
    assert watch.see("a", "e") == 1
    assert watch.see("e", "f") == 2


def test_scaling_down_excuses_nothing_later() -> None:
    # One of the two that are to go had crashed before.
    watch = Watch(3, "a", "b", "c")
    assert watch.later("a", "b") == 0
    assert watch.later("a", "b") == 1
    watch.restarts.expect(1)
    assert watch.see("a") == 1
    assert watch.see("d") == 2


def test_scaling_down_and_up_between_two_looks_is_none() -> None:
    watch = Watch(2, "a", "b")
    watch.restarts.expect(1)
    watch.restarts.expect(2)
    assert watch.see("a", "c", dead="b") == 0


def test_scaling_up_is_none() -> None:
    watch = Watch(1, "a")
    watch.restarts.expect(3)
    assert watch.see("a", "b", "c") == 0
    assert watch.later("a", "b", "c") == 0


def test_one_that_came_and_went_between_two_looks_is_counted() -> None:
    watch = Watch(1, "a")
    assert watch.see("c", dead="ab") == 1
    assert watch.later("c") == 2


def test_a_worker_is_lost_only_once() -> None:
    watch = Watch(1, "a")
    assert watch.see("b", dead="a") == 1
    # Somebody else's process with its id may look like it for a moment.
    assert watch.see("b", "a") == 1
    assert watch.see("b", dead="a") == 1
    assert watch.see("b", dead="a", after=GRACE) == 1


def test_without_a_wanted_number_every_loss_counts() -> None:
    watch = Watch(None, "a", "b")
    watch.see("a")
    assert watch.later("a") == 1
