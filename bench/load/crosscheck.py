"""The same closed load by another tool, `ab` or `wrk`, in turns with ours: do the two agree?"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined
from bench import ab, wrk
from bench.load.plan import Plan
from bench.load.run import run

ROUNDS = 3
# Seconds, and answers' times, that a turn takes at least: the tools count from the first connection on, before any
# answer can be there. And seconds that it takes at most.
_SHORTEST, _TIMES, _LONGEST = 3.0, 10, 60.0
# Within this much of 1 the two agree.
CLOSE = 0.05


@dataclass(frozen=True)
class CrossCheck:
    """The tool, its answers a second, and ours over its; both medians of the turns."""

    tool: str
    per_second: float
    ratio: float

    @property
    def close(self) -> bool:
        """Whether the two agree."""
        return round(abs(self.ratio - 1), 6) <= CLOSE


def tool_for(plan: Plan) -> str:
    """Return which tool can make this load: `ab` sends one picture, `wrk` any mix.

    Raises:
        Undetermined: where the load is open loop, or the tool is not installed.
    """
    if plan.clients is None:
        raise Undetermined("--cross-check is for --clients: neither ab nor wrk counts from an intended start")
    for tool in ("ab", "wrk"):
        if (tool == "wrk" or len(plan.pictures.bodies) == 1) and shutil.which(tool):
            return tool
    raise Undetermined("--cross-check needs ab (one picture) or wrk (Debian: apt-get install apache2-utils wrk)")


def cross_check(plan: Plan, latency: float, rounds: int = ROUNDS) -> CrossCheck:
    """Let ours and the other take turns, each of whole seconds, together about as long as the plan or longer.

    Args:
        plan: the load.
        latency: seconds that an answer takes.
        rounds: turns of each.

    Raises:
        Undetermined: as `tool_for`, when answers take too long for that, or when the tool fails.
    """
    tool = tool_for(plan)
    seconds = max(_SHORTEST, round(plan.seconds / rounds), round(_TIMES * latency))
    if seconds > _LONGEST:
        raise Undetermined(
            f"an answer takes {latency:.1f} s, too long for a cross-check by turns of {_LONGEST:g} s; use fewer clients"
        )
    turn = dataclasses.replace(plan, seconds=seconds, warm_up=0.5 + latency)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(run(turn).summary()["per_second"])
        theirs.append(_other(tool, turn, ours[-1]))
    ratios = [mine / other if other else 0.0 for mine, other in zip(ours, theirs, strict=True)]
    return CrossCheck(tool, round(statistics.median(theirs), 2), round(statistics.median(ratios), 3))


def _other(tool: str, turn: Plan, expected: float) -> float:
    """Return the tool's answers a second, of whatever status, as ours are counted."""
    assert turn.clients is not None
    if tool == "wrk":
        return wrk.run(turn.url, turn.requests(), turn.clients, turn.seconds).per_second
    with tempfile.TemporaryDirectory(prefix="beeline-ab-") as folder:
        picture = Path(folder) / "picture"
        picture.write_bytes(turn.pictures.bodies[0])
        requests = max(turn.clients, round(expected * turn.seconds))
        return ab.run(turn.url, picture, requests, turn.clients).per_second
