"""The configurations to consider, and those that are out before they are measured, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench.tune.forecast import Forecaster
from bench.tune.goal import Goal
from bench.tune.settings import Settings, counted

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
DELAYS = (1, 2, 10, 30)
# The first configurations are measured with this one; then the best ones' neighbours with the others.
FIRST_DELAY = 2
# How a reason begins that is a forecast.
EXPECTED = "expected"
_WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# A forecast over the budget by less than this, or under the best throughput by less, may be a wrong forecast.
_OVER, _UNDER = 1.5, 0.6
# Latency at a rate is forecast worse than throughput.
_SLOWER = 2.5
# So many stay whatever is forecast: where nothing holds, the answer is what comes nearest.
_LEAST = 4


@dataclass(frozen=True)
class Pruned:
    """One configuration, or several, that are not measured, and why."""

    what: str
    why: str

    def to_dict(self) -> dict[str, str]:
        """Return JSON values."""
        return {"what": self.what, "why": self.why}


@dataclass(frozen=True)
class Field:
    """What is worth measuring, best forecast first, and what is not."""

    promising: tuple[Settings, ...]
    pruned: tuple[Pruned, ...]


def thread_counts(cores: int) -> tuple[int, ...]:
    """Return the numbers of threads a worker may get: 1, 2, 4 ... up to the cores, and at most 16."""
    counts = [2**power for power in range(5) if 2**power <= cores]
    return tuple(sorted({*counts, min(cores, 16)}))


def layouts(cores: int, threads: Iterable[int], room: int) -> tuple[list[tuple[int, int]], list[Pruned]]:
    """Return workers with threads that suit the machine, and why the others do not.

    Args:
        cores: processor cores.
        threads: numbers of threads that were measured.
        room: how many workers memory holds.
    """
    kept, pruned = [], []
    for each in sorted(threads):
        for workers in _WORKERS:
            what = f"{counted(workers, 'worker')} of {counted(each, 'thread')}"
            if workers * each > 2 * cores:
                pruned.append(
                    Pruned(f"{what}, and more workers", f"{workers * each} threads would share {cores} cores")
                )
                break
            if workers > room:
                pruned.append(Pruned(f"{what}, and more workers", f"memory holds {counted(room, 'worker')}"))
                break
            if 4 * workers * each <= cores:
                pruned.append(Pruned(what, f"{workers * each} threads leave most of {cores} cores idle"))
                continue
            kept.append((workers, each))
    return kept, pruned


def field(forecaster: Forecaster, room: int, also: Sequence[Settings] = ()) -> Field:
    """Return every configuration that is worth measuring.

    Args:
        forecaster: what is expected of each.
        room: how many workers memory holds.
        also: configurations that stay whatever is forecast.
    """
    goal = forecaster.goal
    kept, pruned = layouts(forecaster.cores, forecaster.curves, room)
    grid = []
    for workers, threads in kept:
        sizes, out = _sizes(workers, threads, goal)
        pruned += out
        alike: dict[str, list[int]] = {}
        for size in sizes:
            delays, why = _delays(size, workers, goal)
            grid += [Settings(size, workers, delay, threads) for delay in delays]
            if why:
                alike.setdefault(why, []).append(size)
        layout = f"{counted(workers, 'worker')} of {counted(threads, 'thread')}"
        pruned += [Pruned(f"other delays with batch {_listed(own)}, {layout}", why) for why, own in alike.items()]
    promising, hopeless = _sift([*grid, *(each for each in also if each not in grid)], forecaster, also)
    return Field(tuple(promising), (*pruned, *hopeless))


def _sizes(workers: int, threads: int, goal: Goal) -> tuple[list[int], list[Pruned]]:
    """Return the batch sizes that the load can fill."""
    if goal.open:
        return list(BATCHES), []
    share = goal.clients / workers
    fill = next((size for size in BATCHES if size >= share), BATCHES[-1])
    out = [size for size in BATCHES if size > fill]
    if not out:
        return list(BATCHES), []
    what = f"batch {_listed(out)} with {counted(workers, 'worker')} of {counted(threads, 'thread')}"
    why = f"{goal.clients} clients are {share:.3g} for each worker, which {fill} hold already"
    return [size for size in BATCHES if size <= fill], [Pruned(what, why)]


def _delays(size: int, workers: int, goal: Goal) -> tuple[list[int], str]:
    """Return the delays that can make a difference, and why others cannot; no reason where all can."""
    if size == 1:
        return [FIRST_DELAY], "a batch of 1 never waits"
    if not goal.open and goal.clients >= (workers + 1) * size:
        return [FIRST_DELAY], f"{goal.clients} clients keep a whole batch waiting, so that no delay begins"
    if goal.p95_ms is not None:
        within = [delay for delay in DELAYS if 2 * delay < goal.p95_ms] or [DELAYS[0]]
        return within, "" if len(within) == len(DELAYS) else f"they would take half of the {goal.p95_ms:g} ms alone"
    return list(DELAYS), ""


def _listed(numbers: Sequence[int]) -> str:
    """Return `1`, or `1, 2 and 4`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _sift(
    grid: Sequence[Settings], forecaster: Forecaster, also: Sequence[Settings]
) -> tuple[list[Settings], list[Pruned]]:
    """Divide into promising and hopeless ones, by what is forecast."""
    goal = forecaster.goal
    expected = {settings: forecaster.of(settings) for settings in grid}
    if goal.open:
        order = sorted(grid, key=lambda each: (expected[each].p95_ms, -expected[each].per_second, each))
    else:
        order = sorted(grid, key=lambda each: (-expected[each].per_second, each))
    best = expected[order[0]]
    promising: list[Settings] = []
    hopeless: list[Pruned] = []
    for place, settings in enumerate(order):
        why = None
        found = expected[settings]
        if math.isinf(found.p95_ms):
            why = f"{EXPECTED} to answer {found.per_second:.0f} a second at most, fewer than arrive ({goal.rate:g})"
        elif goal.open:
            if found.p95_ms > _SLOWER * best.p95_ms:
                why = f"{EXPECTED} p95 {found.p95_ms:.0f} ms, far over the best expected ({best.p95_ms:.0f} ms)"
        elif goal.p95_ms is not None and found.p95_ms > _OVER * max(goal.p95_ms, best.p95_ms):
            why = (
                f"{EXPECTED} {found.per_second:.0f} answers a second, so that {goal.clients} clients wait "
                f"{found.p95_ms:.0f} ms (p95), far over {goal.p95_ms:g} ms"
            )
        elif found.per_second < _UNDER * best.per_second:
            why = f"{EXPECTED} {found.per_second:.0f} answers a second, far under the best ({best.per_second:.0f})"
        if why is None or place < _LEAST or settings in also:
            promising.append(settings)
        else:
            hopeless.append(Pruned(str(settings), why))
    return promising, hopeless


def spread(promising: Sequence[Settings], cores: int) -> list[Settings]:
    """Return a few that differ most: of each layout the best forecast, then one of half its batch or less, and so on.

    Args:
        promising: best forecast first.
        cores: processor cores; layouts with many more threads come only where those with fewer lead.
    """
    layouts: dict[tuple[int, int], list[Settings]] = {}
    for each in promising:
        if each.workers * each.threads > max(1.5 * cores, cores + 1):
            continue
        chosen = layouts.setdefault((each.workers, each.threads), [])
        if each.max_batch_delay == FIRST_DELAY and (not chosen or 2 * each.batch_size <= chosen[-1].batch_size):
            chosen.append(each)
    longest = max(map(len, layouts.values()), default=0)
    found = [chosen[place] for place in range(longest) for chosen in layouts.values() if place < len(chosen)]
    return found or list(promising)


def neighbours(settings: Settings, among: Sequence[Settings]) -> list[Settings]:
    """Return those of `among` that are one step away in delay or workers, and else the same."""
    found = []
    for name in ("max_batch_delay", "workers"):
        value = getattr(settings, name)
        line = [each for each in among if replace(each, **{name: value}) == settings]
        found += sorted((each for each in line if getattr(each, name) < value), reverse=True)[:1]
        found += sorted(each for each in line if getattr(each, name) > value)[:1]
    return found
