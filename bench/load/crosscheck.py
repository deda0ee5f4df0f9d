"""The same closed load by ApacheBench (`ab`), in turns with ours: do the two agree?"""

from __future__ import annotations

import dataclasses
import re
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass

from beeline.errors import Undetermined
from bench.load import Plan, run

ROUNDS = 3
# Seconds, and answers' times, that a turn takes at least: ab counts from the first connection on, before any answer
# can be there.
_SHORTEST, _TIMES = 3.0, 10
# Within this much of 1 the two agree.
CLOSE = 0.05
# Seconds after which ab has hung.
_PATIENCE = 900.0


@dataclass(frozen=True)
class CrossCheck:
    """The other's answers a second, and ours over its; both medians of the turns."""

    per_second: float
    ratio: float
    tool: str = "ab"

    @property
    def close(self) -> bool:
        """Whether the two agree."""
        return round(abs(self.ratio - 1), 6) <= CLOSE


def check_possible(plan: Plan) -> None:
    """Raise `Undetermined` where `ab` cannot make this load: an open one, several pictures, or it is not installed."""
    if plan.clients is None or len(plan.pictures.bodies) > 1:
        raise Undetermined("--cross-check is for --clients and one --picture, which is all that ab can do")
    if shutil.which("ab") is None:
        raise Undetermined("--cross-check needs ab (Debian: apt-get install apache2-utils)")


def cross_check(plan: Plan, latency: float, rounds: int = ROUNDS) -> CrossCheck:
    """Let ours and ab take turns, together about as long as the plan or longer.

    Args:
        plan: the load.
        latency: seconds that an answer takes.
        rounds: turns of each.

    Raises:
        Undetermined: as `check_possible`, or when ab fails.
    """
    check_possible(plan)
    clients, body = plan.clients or 1, plan.pictures.bodies[0]
    seconds = max(_SHORTEST, plan.seconds / rounds, _TIMES * latency)
    turn = dataclasses.replace(plan, seconds=seconds, warm_up=0.5 + latency)
    rates, ratios = [], []
    for _ in range(rounds):
        ours = run(turn).summary()["per_second"]
        other, _ = ab(plan.url, body, max(clients, round(ours * seconds)), clients)
        rates.append(other)
        ratios.append(ours / other if other else 0.0)
    return CrossCheck(round(statistics.median(rates), 2), round(statistics.median(ratios), 3))


def ab(url: str, body: bytes, requests: int, clients: int) -> tuple[float, int]:
    """Let ApacheBench send a picture so many times, by keep-alive clients that send again when they have an answer.

    Returns:
        Answers a second, and how many requests were not answered 200.

    Raises:
        Undetermined: where `ab` is not installed, or fails.
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
