"""Progress: a bar on a terminal, removed at the end; plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from host import Say, silent

Step = Callable[[int], None]

# In a log, a line now and then shows that a long step still runs.
_LINE_EVERY_SECONDS = 30.0


@contextmanager
def progress(text: str, total: int, say: Say, unit: str = "", scale: float = 1.0) -> Iterator[Step]:
    """Yield a function that is called with what is done so far, of `total`.

    On a terminal it draws a bar on stderr, elsewhere it says a line every thirty seconds. `unit` and `scale` turn
    counts into what is shown (`scale=1e6, unit="MB"`).
    """
    console = Console(stderr=True)
    if console.is_terminal and say is not silent:
        columns = BarColumn(), TaskProgressColumn(), _Rate(unit, scale), TimeRemainingColumn()
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(text, total=total or None)
            yield lambda done: bar.update(task, completed=done)
        return
    said = time.monotonic()

    def step(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _LINE_EVERY_SECONDS:
            said = time.monotonic()
            whole = f" of {total / scale:.0f}" if total else ""
            say(f"{text}: {done / scale:.0f}{whole}{' ' + unit if unit else ''}")

    yield step


class _Rate(ProgressColumn):
    """How much is done in a second."""

    def __init__(self, unit: str, scale: float) -> None:
        super().__init__()
        self._unit, self._scale = unit, scale

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / self._scale:.1f} {self._unit}/s".replace(" /", "/"))
