"""Records to sections: one a kind, runs of the same kind overlaid, and last how they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from beeline.errors import BeelineError
from bench.record import Record
from bench.report import compare, load, origin, table, tune
from bench.report.block import Section
from bench.report.run import Run, of_kind

_KINDS = {"load": "load", "table": "ladder", "compare": "comparison", "tune": "tuning", "sweep": "sweep"}


def sections(records: Sequence[Record], labels: Sequence[str] | None = None) -> tuple[Section, ...]:
    """Return the report's sections.

    Args:
        records: what was measured, of any kinds.
        labels: what tells the records apart, one each (the name of its file); None where nothing needs to.

    Raises:
        BeelineError: when there is no record.
    """
    if not records:
        raise BeelineError("there is no record to report; measure with `beeline bench ... --out FILE.jsonl` first")
    labels = [""] * len(records) if labels is None else labels
    out = []
    for kind, section in (("compare", compare.section), ("load", load.section), ("table", table.section)):
        runs = of_kind(records, labels, kind)
        if runs:
            out.append(section(runs))
    for runs in _by_model(of_kind(records, labels, "tune")):
        out.append(tune.section(runs, runs[0].result["model"]))
    out += [tune.sweep(replace(run, number=0)) for run in of_kind(records, labels, "sweep")]
    return (*out, origin.section(records, labels))


def heading(records: Sequence[Record]) -> str:
    """Return the report's title."""
    models = dict.fromkeys(str(record.result["model"]) for record in records if record.result.get("model"))
    about = f" of {', '.join(models)}" if models else ""
    kinds = dict.fromkeys(_KINDS[record.kind] for record in records)
    return f"Beeline: {', '.join(kinds)}{about}"


def _by_model(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each model; models apart are not to be laid over each other."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        own = groups.setdefault(run.result["model"], [])
        own.append(replace(run, number=len(own)))
    return list(groups.values())
