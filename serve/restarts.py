"""Restarts: how many of one model's workers were lost without anybody having asked for fewer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Set

# A loss is seen at once and a smaller number of workers is told a moment later, so a loss that nothing
# explains is a restart after this many seconds, or as soon as another worker has taken the place.
GRACE = 10.0


class Restarts:
    """Counts lost workers of one model and version; told regularly which live and how many are wanted."""

    def __init__(self, before: Iterable[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """Begin at zero.

        Args:
            before: workers lost before anybody watched; they are not counted.
            clock: seconds, for tests.
        """
        self.count = 0
        self._clock = clock
        self._wanted: int | None = None
        self._living: Set[str] = frozenset()
        self._lost = set(before)
        # When each loss was seen that nothing explains yet, and how many losses are still asked for.
        self._unexplained: list[float] = []
        self._asked_for = 0

    def expect(self, wanted: int) -> None:
        """Take how many workers there are to be from now on."""
        if self._wanted is not None:
            self._asked_for += max(0, self._wanted - wanted)
        self._wanted = wanted
        self._explain()

    def observe(self, living: Set[str], dead: Set[str] = frozenset()) -> None:
        """Take which workers live.

        Args:
            living: their names.
            dead: those that lived at any time and do not any more, so that one that came and went between
                two looks is counted too.
        """
        lost = ((self._living - living) | dead) - self._lost
        new = living - self._living - self._lost
        now = self._clock()
        self._lost |= lost
        self._unexplained += [now] * len(lost)
        self._explain()
        overdue = sum(now - seen >= GRACE for seen in self._unexplained)
        restarted = max(overdue, min(len(new), len(self._unexplained)))
        del self._unexplained[:restarted]
        self.count += restarted
        self._living = frozenset(living)
        if self._wanted is not None and len(living) <= self._wanted:
            # No more than wanted are left: scaling down is done and excuses nothing that comes later.
            self._asked_for = 0

    def _explain(self) -> None:
        explained = min(self._asked_for, len(self._unexplained))
        self._asked_for -= explained
        del self._unexplained[:explained]
