"""The same closed load by another tool, `ab` or `wrk`, in turns with ours: do the two agree?"""

from __future__ import annotations

import dataclasses
import re
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined
from bench.load import Plan, run

ROUNDS = 3
# Seconds, and answers' times, that a turn takes at least: the tools count from the first connection on, before any
# answer can be there. And seconds that it takes at most.
_SHORTEST, _TIMES, _LONGEST = 3.0, 10, 60.0
# Within this much of 1 the two agree.
CLOSE = 0.05
_PACKAGES = {"ab": "apache2-utils", "wrk": "wrk"}
# Every request is kept ready in memory, as libcurl's are.
_SCRIPT = """
local ready, next = {}, 0
function init(arguments)
  for index = 0, COUNT - 1 do
    local file = io.open("FOLDER/" .. index, "rb")
    ready[index] = file:read("*a")
    file:close()
  end
end
function request()
  next = next + 1
  return ready[(next - 1) % COUNT]
end
"""


@dataclass(frozen=True)
class Rate:
    """Requests a second, and how many were not answered 200."""

    per_second: float
    failed: int


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
    for tool in _PACKAGES:
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
    tool, clients = tool_for(plan), plan.clients or 1
    seconds = max(_SHORTEST, round(plan.seconds / rounds), round(_TIMES * latency))
    if seconds > _LONGEST:
        raise Undetermined(
            f"an answer takes {latency:.1f} s, too long for a cross-check by turns of {_LONGEST:g} s; use fewer clients"
        )
    turn = dataclasses.replace(plan, seconds=seconds, warm_up=0.5 + latency)
    rates, ratios = [], []
    for _ in range(rounds):
        ours = run(turn).summary()["per_second"]
        if tool == "wrk":
            other = wrk(turn).per_second
        else:
            with tempfile.NamedTemporaryFile() as picture:
                Path(picture.name).write_bytes(plan.pictures.bodies[0])
                other = ab(plan.url, Path(picture.name), max(clients, round(ours * seconds)), clients).per_second
        rates.append(other)
        ratios.append(ours / other if other else 0.0)
    return CrossCheck(tool, round(statistics.median(rates), 2), round(statistics.median(ratios), 3))


def ab(url: str, picture: Path, requests: int, clients: int, patience: float = 900) -> Rate:
    """Let ApacheBench send one picture so many times, by keep-alive clients that send again when they have an answer.

    Raises:
        Undetermined: where `ab` is not installed, or fails.
    """
    options = ["-q", "-k", "-l", "-n", str(requests), "-c", str(clients), "-T", "image/jpeg", "-p", str(picture)]
    patterns = (r"Failed requests: +(\d+)", r"Non-2xx responses: +(\d+)")
    return _turn(["ab", *options, url], patience, r"Requests per second: +([\d.]+)", *patterns)


def wrk(plan: Plan) -> Rate:
    """Let wrk send a plan's pictures in turn, in one thread and for whole seconds.

    Raises:
        Undetermined: where `wrk` is not installed, or fails.
    """
    seconds, requests = max(1, round(plan.seconds)), plan.requests()
    path = (plan.parts.path or "/") + (f"?{plan.parts.query}" if plan.parts.query else "")
    with tempfile.TemporaryDirectory(prefix="beeline-wrk-") as folder:
        for index, (headers, body) in enumerate(requests):
            host = f"Host: {plan.parts.netloc.rpartition('@')[2]}"
            head = [f"POST {path} HTTP/1.1", host, *headers, f"Content-Length: {len(body)}"]
            (Path(folder) / str(index)).write_bytes("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)
        script = Path(folder) / "requests.lua"
        script.write_text(_SCRIPT.replace("COUNT", str(len(requests))).replace("FOLDER", folder), encoding="utf-8")
        options = ["-t1", f"-c{plan.clients}", f"-d{seconds}s", "--timeout", "60s", "-s", str(script)]
        patterns = (
            r"Non-2xx or 3xx responses: +(\d+)",
            r"errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)",
        )
        return _turn(["wrk", *options, plan.url], seconds + 90, r"Requests/sec: +([\d.]+)", *patterns)


def _turn(command: list[str], patience: float, rate: str, *failures: str) -> Rate:
    """Run a tool; its rate, and its failures added up, are what the patterns' groups match."""
    tool = command[0]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=patience).stdout
    except FileNotFoundError as error:
        raise Undetermined(f"{tool} is not installed (Debian: apt-get install {_PACKAGES[tool]})") from error
    except subprocess.SubprocessError as error:
        raise Undetermined(f"{tool} at {command[-1]}: {error}") from error
    match = re.search(rate, text)
    if match is None:
        raise Undetermined(f"{tool} printed no rate: {text}")
    counts = (found for pattern in failures if (found := re.search(pattern, text)))
    return Rate(float(match[1]), sum(int(number) for found in counts for number in found.groups()))
