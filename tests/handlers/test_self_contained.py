"""A built archive holds all of the project that its code imports, engines that it imports later too."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from archive.build import build
from tests.conftest import ROOT

# Imports every module in the archive, and prints the files of all modules that are loaded then.
_IMPORT_ALL = """
import importlib, pathlib, sys
archive, packages = pathlib.Path(sys.argv[1]), sys.argv[2:]
sys.path[:] = [str(archive), *sys.path, *packages]
for file in sorted(archive.rglob("*.py")):
    name = ".".join(file.relative_to(archive).with_suffix("").parts)
    importlib.import_module(name.removesuffix(".__init__"))
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None) or "")
"""


def test_every_module_of_an_archive_loads_with_the_repository_off_the_path(colour_model: Path, tmp_path: Path) -> None:
    built = build(colour_model, tmp_path / "store", check=False)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(unpacked)
    # Without the site module no .pth file, such as that of an editable install, puts the repository on the path.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    command = [sys.executable, "-I", "-S", "-c", _IMPORT_ALL, str(unpacked), *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines() if line]
    ours = [file for file in files if file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)]
    assert ours == []
    code = set(unpacked.rglob("*.py"))
    assert code <= set(files)
    assert unpacked / "beeline" / "engines" / "openvino.py" in code


def test_the_worker_imports_neither_the_repository_outside_handlers_nor_torch() -> None:
    names = ("archive", "host", "train", "serve", "cli", "torch", "torchvision", "matplotlib", "jinja2")
    code = f"import sys, vision_handler; print([name for name in {names} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "handlers", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
