"""What a worker may import: the packages of this environment that both servers' workers have."""

from __future__ import annotations

import re
import site
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOMS = ("archive", "bench", "cli", "host", "serve", "train")
# What the code in any archive may count on: what handlers/ imports, and psutil, which both servers require. An engine's
# runtime, and torchvision for JPEGs on a CUDA device, come with the archives that need them.
WORKER_PACKAGES = ("torch", "numpy", "pillow", "psutil")
# What brings the import PIL where it took Pillow's place, and what that one reads AVIF by.
_IN_PLACE = ("pillow-simd", "pillow-avif-plugin")

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def package_folders() -> list[str]:
    """Return the folders of installed packages that this process imports from; none of this repository."""
    installed = {str(Path(folder).resolve()) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return [folder for folder in sys.path if folder and str(Path(folder).resolve()) in installed]


def hidden_packages(runtime: Iterable[str] = ()) -> list[str]:
    """Return the top-level names that are installed here but that no worker can count on.

    Args:
        runtime: what the archive's engine imports besides `WORKER_PACKAGES`.
    """
    installed = dict(metadata.packages_distributions())
    if sys.version_info < (3, 11):
        # There it leaves out what has no top_level.txt.
        for each in metadata.distributions():
            if not each.read_text("top_level.txt"):
                for name in {path.parts[0].removesuffix(".py") for path in each.files or () if path.suffix == ".py"}:
                    installed.setdefault(name, []).append(each.metadata["Name"])
    # Some runtimes come in several distributions, as onnxruntime and onnxruntime-gpu.
    owned = (owner for name in runtime for owner in installed.get(name, (name,)))
    allowed = _with_requirements((*WORKER_PACKAGES, *_IN_PLACE, *owned))
    return sorted(name for name, owners in installed.items() if not any(_normal(owner) in allowed for owner in owners))


def _with_requirements(names: Iterable[str]) -> set[str]:
    """Return these distributions with everything they require, extras left out."""
    found: set[str] = set()
    waiting = [_normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            match = _NAME.match(line)
            if match and "extra ==" not in line:
                waiting.append(_normal(match.group()))
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
