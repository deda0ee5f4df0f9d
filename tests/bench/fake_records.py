"""Fake records of every kind, for reports: nothing of them was measured."""

from __future__ import annotations

import math
from typing import Any

from bench.record import Record
from bench.sweep import OUT_OF_MEMORY, REFERENCES, STAGES, Row, Timing, differences, knee

MACHINE = {
    "cpu": "Fake processor",
    "cores": 2,
    "features": ["amx_bf16", "avx2"],
    "memory_gb": 25.2,
    "system": "Linux 6.1 x86_64",
    "python": "3.11.7",
    "load_average": [0.3, 0.2, 0.1],
    "gpus": [],
}
VERSIONS = {"torch": "2.13.0", "numpy": "2.4.0"}
PICTURES = {"source": "val", "count": 153, "bytes": 91_000, "sha256": "ab" * 32}


def record(kind: str, result: dict[str, Any], **changes: Any) -> Record:
    """Return a record of this machine that is not there."""
    values: dict[str, Any] = {
        "kind": kind,
        "command": f"beeline bench {kind} resnet18.mar --out {kind}.jsonl",
        "started": "2026-01-02T03:04:05+00:00",
        "machine": MACHINE,
        "versions": VERSIONS,
        "pictures": PICTURES,
        "result": result,
    }
    return Record(**{**values, **changes})


def table(a: float = 12.0, b: float = 6.0, most: int = 64, precision: str = "fp32", memory: bool = True) -> Record:
    """Return a ladder of milliseconds(n) = a * n + b; the batch after `most` is out of memory, if `memory`."""
    rows = []
    for batch in (1 << i for i in range(most.bit_length())):
        slow = 1 + 0.05 * max(0.0, math.log2(batch / 16))
        forward = (a * batch + b) * slow
        each = dict(
            zip(STAGES, (forward, forward + 0.02 * batch, forward + 3.1 * batch, forward + 3.3 * batch), strict=True)
        )
        rows.append(
            Row(batch, {name: Timing(ms, ms * 0.97, ms * 1.04, ms / batch) for name, ms in each.items()}, repeats=7)
        )
    ended = "plateau"
    if memory:
        rows.append(Row(2 * most, {}, error=OUT_OF_MEMORY))
        ended = OUT_OF_MEMORY
    result = {
        "model": "resnet18",
        "version": "1.0",
        "classes": 2,
        "device": "cpu",
        "precision": precision,
        "threads": 1,
        "reasons": {"device": "no CUDA device is there"},
        "rows": [row.to_dict() for row in rows],
        "knee": knee(rows),
        "ended": ended,
        "mix": 16,
        "fit": {},
        "reference": [dict(reference) for reference in REFERENCES],
        "differences": differences(rows),
        "not_run": [{"what": "CUDA", "why": "no CUDA device is there"}],
    }
    return record("table", result)


def load(rate: float | None = None, scale: float = 1.0, growing: bool = False, **changes: Any) -> Record:
    """Return a load, closed or at a rate; `scale` multiplies its latencies."""
    answers = min(rate, 140.0) if rate else 132.0
    result = {
        "mode": "open" if rate else "closed",
        "clients": None if rate else 50,
        "rate": rate,
        "seconds": 10.0,
        "requests": 1320,
        "per_second": answers,
        "good_per_second": answers,
        "p50_ms": 180.0 * scale,
        "p95_ms": 260.0 * scale,
        "p99_ms": 310.0 * scale,
        "max_ms": 402.0 * scale,
        "statuses": {"200": 1318, "429": 1},
        "errors": {"Timeout": 1},
        "failed": 2,
        "batch_sizes": {"1": 20, "4": 90, "7": 60, "8": 1148},
        "timing_ms": {"queue": None, "decode": 21.2, "forward": 61.4, "encode": 0.4},
        "client_cpu": 0.21,
        "backlog": {"at_end": 812 if growing else 3, "growing": growing, "per_second": 80.0 if growing else 0.1}
        if rate
        else None,
        "url": "http://127.0.0.1:8080/predictions/resnet18",
        "thresholds": [
            {"text": "p95>500ms", "value": 260.0 * scale, "holds": 260 * scale <= 500},
            {"text": "errors>0", "value": 2.0, "holds": False},
        ],
        "ceiling_per_second": 4312.0,
        "client_limited": False,
        "crosscheck": {"tool": "wrk", "per_second": 134.1, "ratio": 0.984},
        **changes,
    }
    return record("load", result)


def server(
    name: str,
    kind: str,
    rates: list[float],
    verdict: str | None = "slower",
    against: float | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a row of a comparison."""
    base = against or (rates[0] if rates else 1.0)
    ratios = sorted(rate / base for rate in rates)
    return {
        "server": name,
        "class": kind,
        "pattern": f"{name}, two workers and batches as its documentation's page on vision models has them",
        "threads": 1,
        "precision": "fp32",
        "batch": 8,
        "workers": 2,
        "delay_ms": 5,
        "per_second": rates,
        "p95_ms": [50_000 / rate for rate in rates],
        "compared_with": "torchserve",
        "ratio": ratios[len(ratios) // 2] if ratios else None,
        "interval": [ratios[0], ratios[-1]] if ratios else None,
        "verdict": verdict,
        "failed": 0,
        "agreement": 1.0,
        "memory_mb": 1411.0,
        "ready_s": 21.4,
        "error": None,
        **changes,
    }


def compare(scale: float = 1.0) -> Record:
    """Return a comparison in two classes, one peer of which wins and one fails."""

    def around(rate: float) -> list[float]:
        return [rate * scale * part for part in (0.97, 1.0, 1.02, 0.99, 1.03)]

    documented, engine = "as documented", "our engine"
    against: dict[str, Any] = {"compared_with": "ours-torchserve", "precision": "bf16"}
    lost: dict[str, Any] = {"agreement": None, "memory_mb": None, "ready_s": None}
    rows = [
        server("torchserve", documented, around(11.7), "no difference"),
        server("litserve", documented, around(12.0), "no difference", 11.7 * scale),
        server("mosec", documented, around(26.2), "faster", 11.7 * scale),
        server("ray", documented, [], None, error="its environment cannot be made (no wheel)", **lost),
        server("ours-torchserve", engine, around(131.0), "no difference", **against),
        server("ours-mosec", engine, around(139.0), "faster", 131.0 * scale, **against),
        server("ours-<b>flask</b> & gunicorn-one-thread", engine, around(58.0), "slower", 131.0 * scale, **against),
    ]
    again = server("ours-torchserve", engine, around(130.1), "no difference", 131.0 * scale)
    result = {"clients": 50, "rounds": 5, "seconds": 8.0, "interrupted": False, "rows": rows, "aa": again}
    return record("compare", result)


def tried(count: int = 24) -> list[dict[str, Any]]:
    """Return configurations with throughputs and latencies that grow with the batch size."""
    rows = []
    for index in range(count):
        batch, workers = 2 ** (index % 6), 1 + (index // 6) % 2
        per_second = 140 * workers * batch / (batch + 2.5) / 2
        p95 = 50_000 / per_second * (0.8 + 0.1 * (index // 12)) + batch * 6
        row = {"batch_size": batch, "workers": workers, "max_batch_delay": 5 * (index // 12), "threads": 3 - workers}
        row |= {"per_second": per_second, "p95_ms": p95, "failed": 0, "holds": p95 <= 500}
        rows.append(row)
    return rows


def tune(goal: dict[str, float] | None = None, model: str = "resnet18") -> Record:
    """Return a tuning."""
    rows = tried()
    best = max((row for row in rows if row["holds"]), key=lambda row: row["per_second"])
    result = {
        "model": model,
        "goal": goal or {"p95_ms": 500.0},
        "clients": 50,
        "cores": 2,
        "fit": {"a_ms": 12.1, "b_ms": 6.2, "error": 0.031},
        "tried": rows,
        "pruned": [
            {"what": f"batch size {2**i} with 4 workers", "why": "4 workers on 2 cores take turns"} for i in range(15)
        ],
        "best": best,
        "sentence": f"{model}: batch size {best['batch_size']}, {best['workers']} workers: as the goal wants.",
        "seconds": 288.0,
        "interrupted": False,
    }
    return record("tune", result)


def sweep() -> Record:
    """Return a sweep in which the tuner's choice is nearly the best."""
    rows = [{**row, "per_second": row["per_second"] * (1 + 0.001 * i)} for i, row in enumerate(tried(60))]
    holding = sorted((row for row in rows if row["holds"]), key=lambda row: -row["per_second"])
    best, tuned = holding[0], holding[1]
    share = tuned["per_second"] / best["per_second"]
    result = {
        "model": "resnet18",
        "goal": {"p95_ms": 500.0},
        "tried": rows,
        "beside": [{**tuned, "per_second": tuned["per_second"] * 0.99}, best],
        "best": best,
        "tuned": tuned,
        "share": share,
    }
    return record("sweep", result)
