"""A load as it runs: a view that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.load.generator import Watch
from bench.load.outcome import Outcome

_BAR = 40
# Seconds between two plain lines.
_LINES = 2.0


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Yield what a load is watched with; the view is gone at the end, where the result takes its place."""
    rate = Rate()
    if not console.is_terminal:
        yield _Lines(rate, lambda text: console.print(text, markup=False))
        return
    # It draws when it is told: a thread of its own would take the processor from the load at any moment.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def draw(outcome: Outcome) -> None:
            live.update(view(outcome, rate(outcome)), refresh=True)

        yield draw


class Rate:
    """Answers a second between two looks."""

    def __init__(self) -> None:
        self._seen: tuple[float, int] = (0.0, 0)

    def __call__(self, outcome: Outcome) -> float:
        """Return it since the last look; 0 at the first."""
        (time, answers), self._seen = self._seen, (outcome.seconds, outcome.answers)
        passed = outcome.seconds - time
        return (outcome.answers - answers) / passed if passed > 0 else 0.0


class _Lines:
    """One plain line every two seconds."""

    def __init__(self, rate: Rate, say: Callable[[str], None]) -> None:
        self._rate, self._say, self._next = rate, say, _LINES

    def __call__(self, outcome: Outcome) -> None:
        if outcome.seconds >= self._next:
            self._next = outcome.seconds + _LINES
            found = outcome.summary()
            self._say(f"{phase(outcome)}: {self._rate(outcome):.0f} answers/s, {latency(found)}, {counts(found)}")


def phase(outcome: Outcome) -> str:
    """Return where the load is."""
    if outcome.now < outcome.begin:
        return "warming up"
    if outcome.now >= outcome.end:
        return "waiting for the last answers"
    return f"{outcome.seconds:.0f} of {outcome.plan.seconds:g} s"


def latency(found: Mapping[str, Any]) -> str:
    """Return a summary's percentiles."""
    if found["p95_ms"] is None:
        return "no answer of 200"
    return ", ".join(f"{name} {found[f'{name}_ms']:.1f} ms" for name in ("p50", "p95", "p99"))


def counts(found: Mapping[str, Any]) -> str:
    """Return a summary's answers by status, and its errors by name."""
    said = [f"{count} times {name}" for name, count in {**found["statuses"], **found["errors"]}.items()]
    return ", ".join(said) or "no answer yet"


def bars(sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Return a line for each batch size: the size, its bar, its share of the answers."""
    most, total = max(sizes.values(), default=1), sum(sizes.values())
    return [
        (size, "█" * max(1, round(_BAR * count / most)), f"{count / total:.1%}")
        for size, count in sorted(sizes.items(), key=lambda item: int(item[0]))
    ]


def view(outcome: Outcome, rate: float) -> Group:
    """Return the view of this moment."""
    found = outcome.summary()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    rows = {
        "load": outcome.plan.url,
        "time": phase(outcome),
        "requests": f"{rate:.0f} answers/s now, {found['per_second']:.1f} on average",
        "latency": latency(found),
        "answers": counts(found),
    }
    if found["backlog"] is not None and outcome.waiting:
        rows["waiting"] = f"{outcome.waiting[-1][1]} requests"
    for name, text in rows.items():
        grid.add_row(name, Text(text, style="red" if name == "answers" and found["failed"] else ""))
    histogram = Table.grid(padding=(0, 2))
    histogram.add_column(justify="right")
    for size, bar, share in bars(found["batch_sizes"]):
        histogram.add_row(size, Text(bar, style="cyan"), share)
    title = Text("batch sizes" if found["batch_sizes"] else "no batch sizes: no answer had X-Batch-Size", style="dim")
    return Group(grid, title, histogram)
