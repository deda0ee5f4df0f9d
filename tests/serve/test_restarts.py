"""Lost workers and workers that were asked to go, in whatever order both are seen."""

from __future__ import annotations

from serve.metrics import GRACE, Restarts


class Watch:
    """Restarts under a clock that the test moves."""

    def __init__(self, wanted: int | None, living: str) -> None:
        self.now = 0.0
        self.restarts = Restarts(clock=lambda: self.now)
        if wanted is not None:
            self.restarts.expect(wanted)
        self.see(living)

    def see(self, living: str, dead: str = "", after: float = 1) -> int:
        """Report workers, each a letter; return the restarts."""
        self.now += after
        self.restarts.observe(set(living), set(dead))
        return self.restarts.count

    def later(self, living: str) -> int:
        return self.see(living, after=GRACE)


def test_a_lost_worker_is_one_restart_when_a_new_one_comes_or_after_a_while() -> None:
    replaced = Watch(2, "ab")
    assert [replaced.see("ab"), replaced.see("bc"), replaced.see("bc"), replaced.later("bc")] == [0, 1, 1, 1]
    missing = Watch(2, "ab")
    assert [missing.see("a"), missing.later("a")] == [0, 1]
    # A worker that comes late replaces one that is counted already.
    assert missing.later("ac") == 1
    nothing_wanted = Watch(None, "ab")
    assert [nothing_wanted.see("a"), nothing_wanted.later("a")] == [0, 1]


def test_scaling_is_no_restart_in_whatever_order_it_is_seen() -> None:
    asked_first = Watch(4, "abcd")
    asked_first.restarts.expect(2)
    assert [asked_first.see("abc"), asked_first.later("ab"), asked_first.later("ab")] == [0, 0, 0]
    seen_first = Watch(4, "abcd")
    seen_first.see("ab")
    seen_first.restarts.expect(2)
    assert seen_first.later("ab") == 0
    down_and_up = Watch(2, "ab")
    down_and_up.restarts.expect(1)
    down_and_up.restarts.expect(2)
    assert down_and_up.see("ac", dead="b") == 0
    up = Watch(1, "a")
    up.restarts.expect(3)
    assert [up.see("abc"), up.later("abc")] == [0, 0]


def test_scaling_down_explains_as_many_losses_as_were_asked_for_and_none_later() -> None:
    watch = Watch(4, "abcd")
    watch.restarts.expect(2)
    assert [watch.see("a"), watch.later("a"), watch.see("ae"), watch.see("ef")] == [0, 1, 1, 2]
    # One of the two that are to go has crashed before.
    crashed = Watch(3, "abc")
    assert [crashed.later("ab"), crashed.later("ab")] == [0, 1]
    crashed.restarts.expect(1)
    assert [crashed.see("a"), crashed.see("d")] == [1, 2]


def test_a_worker_that_comes_and_goes_between_two_looks_counts_and_only_once() -> None:
    watch = Watch(1, "a")
    assert [watch.see("c", dead="ab"), watch.later("c")] == [1, 2]
    once = Watch(1, "a")
    assert once.see("b", dead="a") == 1
    # Another process with its id may look like it for a moment.
    assert [once.see("ba"), once.see("b", dead="a"), once.see("b", dead="a", after=GRACE)] == [1, 1, 1]
