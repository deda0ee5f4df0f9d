"""wrk: one turn of keep-alive clients in one thread, each of which sends again when it has its answer."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from beeline.errors import Undetermined
from bench.ab import Turn

# Every request is kept ready in memory, as in this room's own client.
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


def run(url: str, requests: list[bytes], clients: int, seconds: float) -> Turn:
    """Send ready requests in turn for so many seconds, of which wrk takes whole ones.

    Raises:
        Undetermined: where `wrk` is not installed, or fails.
    """
    whole = max(1, round(seconds))
    with tempfile.TemporaryDirectory(prefix="beeline-wrk-") as folder:
        for index, request in enumerate(requests):
            (Path(folder) / str(index)).write_bytes(request)
        script = Path(folder) / "requests.lua"
        script.write_text(_SCRIPT.replace("COUNT", str(len(requests))).replace("FOLDER", folder), encoding="utf-8")
        command = ["wrk", "-t1", f"-c{clients}", f"-d{whole}s", "--timeout", "60s", "-s", str(script), url]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=whole + 90).stdout
        except FileNotFoundError as error:
            raise Undetermined("wrk is not installed (Debian: apt-get install wrk)") from error
        except subprocess.SubprocessError as error:
            raise Undetermined(f"wrk at {url}: {error}") from error
    rate = re.search(r"Requests/sec: +([\d.]+)", said)
    if rate is None:
        raise Undetermined(f"wrk said no rate: {said}")
    refused = re.search(r"Non-2xx or 3xx responses: +(\d+)", said)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    failed = sum(int(number) for found in (refused, broken) if found for number in found.groups())
    return Turn(float(rate[1]), failed)
