"""ApacheBench: one turn of keep-alive clients that send one picture, each again when it has its answer."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from beeline.errors import Undetermined


@dataclass(frozen=True)
class Turn:
    """Requests a second, and how many were not answered 200."""

    per_second: float
    failed: int


def run(url: str, picture: Path, requests: int, clients: int, patience: float = 900) -> Turn:
    """Send so many requests.

    Raises:
        Undetermined: where `ab` is not installed, or fails.
    """
    command = ["ab", "-q", "-k", "-l", "-n", str(requests), "-c", str(clients), "-T", "image/jpeg", "-p", str(picture)]
    try:
        said = subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=patience).stdout
    except FileNotFoundError as error:
        raise Undetermined("ab is not installed (Debian: apt-get install apache2-utils)") from error
    except subprocess.SubprocessError as error:
        raise Undetermined(f"ab at {url}: {error}") from error
    failed = int(_found(r"Failed requests: +(\d+)", said)) + int(_found(r"Non-2xx responses: +(\d+)", said, "0"))
    return Turn(float(_found(r"Requests per second: +([\d.]+)", said)), failed)


def _found(pattern: str, text: str, default: str | None = None) -> str:
    found = re.search(pattern, text)
    if found is None and default is None:
        raise Undetermined(f"ab said no {pattern!r}: {text}")
    return found[1] if found else str(default)
