"""Pillow-SIMD in Pillow's place gives Pillow's pixels, and refuses what Pillow refuses: every awkward picture.

It has Pillow's name, so it is installed into a folder and runs in processes of its own; this one has Pillow.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from beeline import pixels
from beeline.errors import RequestError
from beeline.spec import Geometry
from tests.conftest import ROOT

GEOMETRY = Geometry(256, 224)
# Decodes every file that is named on stdin; prints what reads them, and writes crops and sentences by name.
_DECODE = """
import sys, warnings
from pathlib import Path
import numpy as np
from beeline import formats, pixels
from beeline.errors import RequestError
from beeline.spec import Geometry
warnings.simplefilter("ignore")
found = {}
for line in sys.stdin.read().splitlines():
    try:
        found[line] = pixels.decode(Path(line).read_bytes(), Geometry(256, 224))
    except RequestError as error:
        found[line] = np.array(f"{error.status} {error}")
np.savez(sys.argv[1], **found)
print(formats.pillow_version())
"""

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="Pillow-SIMD is for x86-64"),
]


@pytest.fixture(scope="module")
def simd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with Pillow-SIMD, built here, and its plugin for AVIF."""
    folder = tmp_path_factory.mktemp("simd")
    # A build of another compiler's flags may be in the usual cache, which does not tell them apart.
    environment = {**os.environ, "CC": "cc -msse4.2", "UV_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    command = [".venv/bin/uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder)]
    asked = ["--require-hashes", "--no-deps", "--no-build-isolation", "-r", "requirements/pillow-simd.txt"]
    subprocess.run([*command, *asked], cwd=ROOT, env=environment, check=True)
    return folder


def with_simd(folder: Path, words: list[str], text: str = "") -> str:
    """Run Python with the Pillow of a folder, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "handlers")])}
    command = [sys.executable, *words]
    done = subprocess.run(command, input=text, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_picture_is_the_same_or_refused_alike(simd: Path, shared_data: Path, tmp_path: Path) -> None:
    awkward = sorted(path for path in (shared_data / "awkward").rglob("*.*") if path.is_file())
    paths = awkward + sorted((shared_data / "imagenet_samples").glob("*.JPEG"))[:40]
    out, refused = tmp_path / "found.npz", 0
    version = with_simd(simd, ["-c", _DECODE, str(out)], "\n".join(map(str, paths)))
    assert ".post" in version
    assert "without" not in version
    with np.load(out) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    for path in paths:
        got = found[str(path)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                off = np.abs(pixels.decode(path.read_bytes(), GEOMETRY).astype(int) - got)
            assert (off.mean() < 0.6, off.max() <= 8) == (True, True), (path.name, off.mean(), off.max())
        except RequestError as error:
            assert str(got).startswith(str(error.status)), (path.name, got)
            refused += 1
    assert len(paths) - refused > 70


def test_drawn_pictures_decode_to_nearly_the_same_pixels(simd: Path) -> None:
    words = ["-m", "pytest", "-q", "-k", "drawn_pictures", "tests/handlers/test_geometry.py"]
    assert "1 passed" in with_simd(simd, words)
