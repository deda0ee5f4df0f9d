"""What the room imports: the gateway's image has no PyTorch and no numpy."""

from __future__ import annotations

import os
import subprocess
import sys

from host import ROOT

IMPORT_ALL = """
import importlib, pkgutil, sys
import serve
for module in pkgutil.walk_packages(serve.__path__, "serve."):
    importlib.import_module(module.name)
print(*sorted({"numpy", "torch", "PIL", "lightning", "matplotlib", "jinja2"} & set(sys.modules)))
print(*sorted(name for name in sys.modules if name.startswith("archive.")))
"""


def test_every_module_is_imported_without_torch_and_numpy_and_reads_archives_by_two() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    heavy, of_archive = done.stdout.splitlines()
    assert heavy == ""
    assert of_archive == "archive.mar archive.store"
