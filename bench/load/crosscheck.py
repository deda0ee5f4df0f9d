"""The same closed load by ApacheBench (`ab`), in turns with ours: do the two agree?"""

from __future__ import annotations

import dataclasses
import re
import shutil
import statistics
import subprocess
import tempfile
from typing import Any

from beeline.errors import Undetermined
from bench.load import Plan, run

# Seconds, and times an answer, that a turn takes at least: ab counts from its first connection, before any answer.
_SHORTEST, _TIMES = 3.0, 10
# The two agree where their ratio is within this much of 1.
_CLOSE = 0.05
# Seconds after which ab hangs.
_PATIENCE = 900.0


def check_possible(plan: Plan) -> None:
    """Raise `Undetermined` where `ab` cannot make this load: an open one, several pictures, or it is not installed."""
    if plan.clients is None or len(plan.pictures.bodies) > 1:
        raise Undetermined("--cross-check is for --clients and one --picture, which is all that ab can do")
    if shutil.which("ab") is None:
        raise Undetermined("--cross-check needs ab (Debian: apt-get install apache2-utils)")


def cross_check(plan: Plan, latency_ms: float | None, rounds: int = 3) -> dict[str, Any]:
    """Let ours and ab take turns, together about as long as the plan or longer; `latency_ms` is that of an answer.

    Returns:
        `tool`; medians of the turns, `per_second` of its answers and `ratio` of ours to them; whether the two `agree`.

    Raise `Undetermined` when there was no answer, or ab fails.
    """
    if latency_ms is None:
        raise Undetermined("there was no good answer, and so nothing to cross-check")
    clients, latency = plan.clients or 1, latency_ms / 1000
    seconds = max(_SHORTEST, plan.seconds / rounds, _TIMES * latency)
    turn = dataclasses.replace(plan, seconds=seconds, warm_up=0.5 + latency)
    rates, ratios = [], []
    for _ in range(rounds):
        ours = run(turn).summary()["per_second"]
        other, _ = ab(plan.url, plan.pictures.bodies[0], max(clients, round(ours * seconds)), clients)
        rates.append(other)
        ratios.append(ours / other if other else 0.0)
    ratio = round(statistics.median(ratios), 3)
    agree = round(abs(ratio - 1), 3) <= _CLOSE
    return {"tool": "ab", "per_second": round(statistics.median(rates), 2), "ratio": ratio, "agree": agree}


def ab(url: str, body: bytes, requests: int, clients: int) -> tuple[float, int]:
    """Let ApacheBench send a picture so many times from keep-alive clients, in a closed loop.

    Returns:
        Answers a second, and how many requests were not answered 200.

    Raise `Undetermined` where `ab` is not installed, or fails.
    """
    with tempfile.NamedTemporaryFile() as picture:
        picture.write(body)
        picture.flush()
        options = ["-q", "-k", "-l", "-n", str(requests), "-c", str(clients), "-T", "image/jpeg", "-p", picture.name]
        try:
            text = subprocess.check_output(
                ["ab", *options, url], stderr=subprocess.STDOUT, text=True, timeout=_PATIENCE
            )
        except (OSError, subprocess.SubprocessError) as error:
            words = " ".join((getattr(error, "output", None) or str(error)).split())
            raise Undetermined(f"ab (Debian: apache2-utils) at {url}: {words}") from error
    counts = dict(re.findall(r"(?m)^([\w -]+): +([\d.]+)", text))
    if "Requests per second" not in counts:
        raise Undetermined(f"ab printed no rate: {text}")
    failed = (int(counts.get(name, 0)) for name in ("Failed requests", "Non-2xx responses"))
    return float(counts["Requests per second"]), sum(failed)
