"""A comparison's rows for people at a terminal, a class at a time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

_COLUMNS = (
    "server", "req/s", "p95 ms", "against", "verdict", "threads", "precision", "batch", "workers", "agree", "MB",
    "ready", "failed",
)  # fmt: skip


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the table, and beneath it what the same server entered twice came to."""
    out: list[str] = []
    classes = dict.fromkeys(row["class"] for row in result["rows"])
    for name in classes:
        rows = [row for row in result["rows"] if row["class"] == name]
        out += [f"{name}:", *_aligned([_COLUMNS, *(_cells(row) for row in rows if row["per_second"])])]
        out += [f"  {row['server']}: {row['error']}" for row in rows if row["error"]]
    again = result["aa"]
    if again["verdict"]:
        low, high = again["interval"]
        out.append(
            f"the same server twice ({again['server']}): {again['verdict']}, {again['ratio']:.2f} of itself "
            f"({low:.2f} to {high:.2f})"
        )
    return out


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    p95 = [value for value in row["p95_ms"] if value is not None]
    low, high = row["interval"] or (0, 0)
    return (
        str(row["server"]),
        f"{statistics.median(row['per_second']):.1f}",
        f"{statistics.median(p95):.0f}" if p95 else "-",
        f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})" if row["ratio"] else "-",
        str(row["verdict"] or "-"),
        str(row["threads"] or "default"),
        str(row["precision"]),
        str(row["batch"]),
        str(row["workers"]),
        f"{row['agreement']:.3f}" if row["agreement"] is not None else "-",
        f"{row['memory_mb']:.0f}",
        f"{row['ready_s']:.1f} s",
        str(row["failed"]),
    )


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
