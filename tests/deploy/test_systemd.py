"""The unit for systemd: systemd takes every line of it, and calls it confined."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.server


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit that the page's first command writes, for this checkout."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here; install it (Debian: apt-get install systemd)")
    page = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^(sed .* deploy/beeline.service) \|", page, re.MULTILINE)
    path = tmp_path / "beeline.service"
    with path.open("w") as file:
        subprocess.run(command, shell=True, cwd=ROOT, stdout=file, check=True)
    return path


def test_systemd_takes_every_line_and_calls_it_confined(unit: Path) -> None:
    assert f"ExecStart={ROOT}/.venv/bin/beeline serve up\n" in unit.read_text()
    # 1.7 of 10; a unit without these lines has 9.6.
    for words in ("verify --man=no", "security --offline=true --threshold=20 --no-pager"):
        done = subprocess.run(
            ["systemd-analyze", *words.split(), str(unit)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
