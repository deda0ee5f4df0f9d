"""One record in a report: its name beside other runs, and the number that gives it colour and marker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.record import Record


@dataclass(frozen=True)
class Run:
    """A record, its name among the records of its kind, which of them it is (from 0), and its file's label."""

    record: Record
    name: str
    number: int
    label: str = ""

    @property
    def result(self) -> dict[str, Any]:
        """The record's figures."""
        return self.record.result


def of_kind(records: Sequence[Record], labels: Sequence[str], *kinds: str) -> list[Run]:
    """Return the runs of these kinds in their order, each with a name that no other one has.

    Args:
        records: of any kind.
        labels: what tells them apart, one a record: the name of their file, or nothing.
        kinds: which to take.
    """
    found = [(record, label) for record, label in zip(records, labels, strict=True) if record.kind in kinds]
    often = Counter(label for _, label in found)
    # A file's only record of a kind is named by the file alone.
    names = [
        label if label and often[label] == 1 else ": ".join(filter(None, (label, describe(record))))
        for record, label in found
    ]
    names = _distinct(names)
    return [Run(record, name, i, label) for i, ((record, label), name) in enumerate(zip(found, names, strict=True))]


def describe(record: Record) -> str:
    """Return in a few words what was measured."""
    result = record.result
    if record.kind == "load":
        return f"{result['rate']:g} arrivals/s" if result.get("rate") else f"{result.get('clients')} clients"
    if record.kind == "table":
        parts = (result["model"], result["device"], result["precision"], counted(result["threads"], "thread"))
        return ", ".join(map(str, parts))
    if record.kind == "compare":
        return f"{result['rounds']} rounds of {result['seconds']:g} s, {result['clients']} clients"
    return str(result["model"])


def when(started: str) -> str:
    """Return a record's time for people, to the minute; it is in UTC."""
    return started[:16].replace("T", " ")


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 thread`, `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _distinct(names: Iterable[str]) -> list[str]:
    """Number the names that occur more than once."""
    names = list(names)
    often = Counter(names)
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(f"{name} ({seen[name]})" if often[name] > 1 else name)
    return out
