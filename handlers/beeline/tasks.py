"""Tasks: what a model does with a picture. Each has a module, from its part of the spec to its answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beeline.answer import Answer
    from beeline.batch import Batch
    from beeline.engines import Engine
    from beeline.spec import ModelSpec

# By the spec's name: module and class.
TASKS = {"classify": ("beeline.classification", "Classification"), "caption": ("beeline.caption", "Captioning")}


class Task:
    """What the handler asks of a task; one for each loaded model. `forward` runs it over uint8 `[N, crop, crop, 3]`."""

    forward: Callable[[Any], Any]

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def check(self) -> None:
        """Check the task's part of the spec; raise `SpecError`."""
        raise NotImplementedError

    def load(self, folder: Path, engine: Engine) -> None:
        """Take the loaded model, and load the rest of the archive in `folder`."""
        self.forward = engine.forward

    def run(self, batch: Batch) -> Any:
        """Run the model over the good rows of a batch, which may be none."""
        raise NotImplementedError

    def answers(self, results: Any, batch: Batch) -> list[Answer]:
        """Make one answer for each good row from what `run` returned."""
        raise NotImplementedError

    def top(self, body: dict[str, Any]) -> list[tuple[str, float]]:
        """Return the texts of an answer's body with their scores, the best first."""
        raise NotImplementedError

    def compare(self, expected: Sequence[Mapping[str, Any]], results: Any) -> None:
        """Compare what `forward` returned for the golden pictures with their entries; raise `SelfTestError`."""
        raise NotImplementedError


def of(spec: ModelSpec) -> Task:
    """Return the task that `spec` names, for which nothing is loaded yet."""
    module, name = TASKS[spec.task]
    kind: type[Task] = getattr(importlib.import_module(module), name)
    return kind(spec)
