"""What the room imports: the gateway's image has no PyTorch and no numpy."""

from __future__ import annotations

import os
import subprocess
import sys

from host import ROOT

ALL = """
import importlib, pkgutil, sys
import serve
for module in pkgutil.walk_packages(serve.__path__, "serve."):
    importlib.import_module(module.name)
print(*sorted({"numpy", "torch", "PIL", "lightning", "matplotlib", "jinja2"} & set(sys.modules)))
print(*sorted(name for name in sys.modules if name.startswith("archive.")))
"""

STAYING = 'import sys, serve.gateway.__main__, serve.instance.supervisor; print("pydantic" in sys.modules)'


def said(code: str) -> list[str]:
    """Return the lines that a fresh Python prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_every_module_is_imported_without_torch_and_numpy_and_reads_archives_by_two() -> None:
    assert said(ALL) == ["", "archive.mar archive.store"]


def test_processes_that_stay_hold_no_pydantic() -> None:
    """It takes 8 MB, and only commands read settings that people write."""
    assert said(STAYING) == ["False"]
