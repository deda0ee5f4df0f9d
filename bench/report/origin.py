"""Where the figures come from: the command, the time, the machine, the versions, the pictures of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.record import Record
from bench.report.block import Section, Table
from bench.report.run import describe, when


def section(records: Sequence[Record], labels: Sequence[str]) -> Section:
    """Return a table of runs, and one of everything that they ran on; what several share is said once."""
    names = [
        f"{i}. {': '.join(filter(None, (label, record.kind)))}"
        for i, (record, label) in enumerate(zip(records, labels, strict=True), 1)
    ]
    runs = tuple(
        (name, describe(record), when(record.started), record.command)
        for name, record in zip(names, records, strict=True)
    )
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, record in zip(names, records, strict=True):
        groups.setdefault(tuple(_surroundings(record).items()), []).append(name)
    keys = list(dict.fromkeys(key for group in groups for key, _ in group))
    heads = ("", *("all runs" if len(groups) == 1 else "; ".join(members) for members in groups.values()))
    surroundings = tuple((key, *(dict(group).get(key, "-") for group in groups)) for key in keys)
    loads = tuple((name, _load(record.machine)) for name, record in zip(names, records, strict=True))
    return Section(
        "How it was measured",
        (
            Table("Runs", ("run", "what", "started (UTC)", "command"), runs, words=True),
            Table("Machine, versions and pictures", heads, surroundings, words=True),
            Table("Load average at the end: 1, 5, 15 minutes", ("run", "load"), loads, words=True),
        ),
    )


def _surroundings(record: Record) -> dict[str, str]:
    machine, pictures = record.machine, record.pictures
    out = {
        "processor": str(machine.get("cpu", "unknown")),
        "cores": str(machine.get("cores", "unknown")),
        "features": ", ".join(machine.get("features", ())) or "none of those that matter",
        "memory": f"{machine['memory_gb']:g} GB" if "memory_gb" in machine else "unknown",
        "GPUs": ", ".join(map(str, machine.get("gpus") or ())) or "none",
        "system": str(machine.get("system", "unknown")),
        "Python": str(machine.get("python", "unknown")),
    }
    out |= {name: str(version) for name, version in record.versions.items()}
    if pictures:
        out["pictures"] = f"{pictures['count']} of {pictures['source']}, {pictures['bytes'] / 1000:.1f} kB on average"
        out["pictures' sha256"] = str(pictures["sha256"])
    return out


def _load(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" for value in machine.get("load_average", ())) or "unknown"
