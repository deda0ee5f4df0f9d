"""Fake records of every kind, for reports: nothing of them was measured."""

from __future__ import annotations

import math
from typing import Any

from bench.record import Record

MACHINE = {
    "cpu": "Fake processor", "cores": 2, "features": ["amx_bf16", "avx2"], "memory_gb": 25.2, "python": "3.11.7",
    "system": "Linux 6.1 x86_64", "load_average": [0.3, 0.2, 0.1], "gpus": [],
}  # fmt: skip
PICTURES = {"source": "val", "count": 153, "bytes": 91_000, "sha256": "ab" * 32}
SETTINGS = ("batch_size", "workers", "max_batch_delay", "threads")


def record(kind: str, result: dict[str, Any], **changes: Any) -> Record:
    """Return a record of this machine that is not there."""
    values: dict[str, Any] = {
        "kind": kind, "command": f"beeline bench {kind} resnet18.mar --out {kind}.jsonl", "machine": MACHINE,
        "started": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}, "pictures": PICTURES, "result": result,
    }  # fmt: skip
    return Record(**{**values, **changes})


def sweep(a: float = 12.0, b: float = 6.0, most: int = 64, **changes: Any) -> Record:
    """Return a batch sweep of milliseconds(n) = a * n + b; the batch after `most` is out of memory."""
    more = {"forward": 0.0, "copied": 0.02, "decoded": 3.1, "handler": 3.3}
    rows: list[dict[str, Any]] = []
    for batch in (1 << i for i in range(most.bit_length())):
        forward = (a * batch + b) * (1 + 0.05 * max(0.0, math.log2(batch / 16)))
        times = {stage: forward + each * batch for stage, each in more.items()}
        stages = {
            stage: {"median_ms": ms, "low_ms": ms * 0.97, "high_ms": ms * 1.04, "ms_per_image": ms / batch}
            for stage, ms in times.items()
        }
        rows.append({"batch": batch, "error": None, "repeats": 7, **stages})
    rows.append({"batch": 2 * most, "error": "out of memory", "repeats": 0, **dict.fromkeys(more)})
    users = {"what": "ResNet-18, reported by users", "points": [[8, 17.5], [32, 13.75]]}
    result = {
        "model": "resnet18", "version": "1.0", "classes": 2, "device": "cpu", "precision": "fp32", "threads": 1,
        "reasons": {"device": "no CUDA device is there"}, "rows": rows, "knee": 8, "ended": "out of memory", "mix": 16,
        "fit": {}, "reference": [users], "differences": ["theirs gets faster, ours does not"],
        "not_run": [{"what": "CUDA", "why": "no CUDA device is there"}], **changes,
    }  # fmt: skip
    return record("sweep", result)


def load(rate: float | None = None, scale: float = 1.0, growing: bool = False, **changes: Any) -> Record:
    """Return a load, closed or at a rate; `scale` multiplies its latencies."""
    answers, p95 = min(rate, 140.0) if rate else 132.0, 260.0 * scale
    backlog = {"at_end": 812 if growing else 3, "growing": growing, "per_second": 80.0 if growing else 0.1}
    limits = [{"text": "p95>500ms", "value": p95, "holds": True}, {"text": "errors>0", "value": 2.0, "holds": False}]
    result = {
        "mode": "open" if rate else "closed", "clients": None if rate else 50, "rate": rate, "seconds": 10.0,
        "requests": 1320, "per_second": answers, "good_per_second": answers, "p50_ms": 180.0 * scale, "p95_ms": p95,
        "p99_ms": 310.0 * scale, "max_ms": 402.0 * scale, "statuses": {"200": 1318, "429": 1}, "errors": {"Timeout": 1},
        "failed": 2, "batch_sizes": {"1": 20, "4": 90, "7": 60, "8": 1148}, "client_cpu": 0.21,
        "timing_ms": {"queue": None, "decode": 21.2, "forward": 61.4, "encode": 0.4}, "thresholds": limits,
        "backlog": backlog if rate else None, "url": "http://127.0.0.1:8080/predictions/resnet18",
        "ceiling_per_second": 4312.0, "client_limited": False, "sentence": f"{answers:g} answers a second",
        "crosscheck": {"tool": "ab", "per_second": 134.1, "ratio": 0.984}, **changes,
    }  # fmt: skip
    return record("load", result)


def server(name: str, kind: str, rate: float, verdict: str | None, base: float, **changes: Any) -> dict[str, Any]:
    """Return a row of a comparison; without a rate one that could not be measured."""
    rates = [rate * part for part in (0.97, 1.0, 1.02, 0.99, 1.03)] if rate else []
    ratios = sorted(each / base for each in rates)
    return {
        "server": name, "class": kind, "pattern": f"{name}, two workers and batches as its documentation has them",
        "threads": None, "precision": "fp32", "batch": 8, "workers": 2, "delay_ms": 5, "per_second": rates,
        "p95_ms": [50_000 / each for each in rates], "compared_with": "ours-torchserve", "verdict": verdict,
        "failed": 0, "ratio": ratios[2] if rates else None, "interval": [ratios[0], ratios[-1]] if rates else None,
        "agreement": 1.0, "memory_mb": 1411.0, "ready_s": 21.4, "error": None, **changes,
    }  # fmt: skip


def compare() -> Record:
    """Return a comparison in two classes, one peer of which wins and one fails."""
    wheel = {"error": "its environment cannot be made (no wheel)", "agreement": None, "memory_mb": None}
    rows = [
        server("torchserve", "as documented", 11.7, "no difference", 11.7, compared_with="torchserve"),
        server("litserve", "as documented", 12.0, "no difference", 11.7),
        server("mosec", "as documented", 26.2, "faster", 11.7),
        server("ray", "as documented", 0, None, 1, **wheel),
        server("ours-torchserve", "our engine", 131.0, "no difference", 131.0),
        server("ours-<b>flask</b> & gunicorn-one-thread", "our engine", 58.0, "slower", 131.0),
    ]
    again = server("ours-torchserve", "our engine", 130.1, "no difference", 131.0)
    result = {"clients": 50, "rounds": 5, "seconds": 8.0, "interrupted": False, "rows": rows, "aa": again}
    return record("compare", result)


def tried() -> list[dict[str, Any]]:
    """Return configurations with throughputs and latencies that grow with the batch size."""
    rows = []
    for index in range(24):
        batch, workers, delay = 2 ** (index % 6), 1 + (index // 6) % 2, 5 * (index // 12)
        rate = 140 * workers * batch / (batch + 2.5) / 2
        p95 = 50_000 / rate * (0.8 + 0.02 * delay) + batch * 6
        row = dict(zip(SETTINGS, (batch, workers, delay, 3 - workers), strict=True))
        more = {"failed": 0, "holds": p95 <= 500, "batch": batch / 2, "turns": 1}
        rows.append({**row, "per_second": rate, "p95_ms": p95, **more})
    return rows


def tune(goal: dict[str, float] | None = None, model: str = "resnet18") -> Record:
    """Return a tuning."""
    best = max((row for row in tried() if row["holds"]), key=lambda row: row["per_second"])
    pruned = [{"what": f"batch size {2**i}", "why": "4 workers on 2 cores take turns"} for i in range(30)]
    result = {
        "model": model, "goal": goal or {"p95_ms": 500.0}, "clients": 50, "cores": 2, "tried": tried(), "best": best,
        "fits": [{"threads": 1, "a_ms": 12.1, "b_ms": 6.2, "error": 0.031}], "configured": tried()[3],
        "pruned": pruned, "seconds": 288.0, "interrupted": False, "holds": True,
        "sentence": f"{model}: batch size {best['batch_size']}, {best['workers']} workers: as the goal wants.",
    }  # fmt: skip
    return record("tune", result)


def search() -> Record:
    """Return an exhaustive search in which the tuner's choice is nearly the best."""
    best, tuned = sorted((row for row in tried() if row["holds"]), key=lambda row: -row["per_second"])[:2]
    result = {
        "model": "resnet18", "goal": {"p95_ms": 500.0}, "tried": tried(), "beside": [tuned, best], "best": best,
        "tuned": tuned, "share": 0.98, "holds": True,
        "sentence": "resnet18: the tuner's choice reaches 98.0% of the best.",
    }  # fmt: skip
    return record("search", result)
