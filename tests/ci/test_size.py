"""`make size`: what it counts, what it refuses, and how many modules a running server holds."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SIZE, MODULES = ROOT / ".ci" / "size", ROOT / ".ci" / "modules"
# Of command line, supervisor, prober and worker together, before TorchServe.
MOST_MODULES = 72


def measured(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `.ci/size` in a folder."""
    return subprocess.run([sys.executable, SIZE], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a file of every kind; git tracks all but one."""
    files = {
        "serve/up.py": "\n" + "x" * 250 + "\nlast line without an end",
        ".ci/run": "#!/bin/sh\n",
        "tests/test_up.py": "assert True\n",
        "frontend/app.js": "1\n" * 9,
        "frontend/nginx/nginx.conf": "1\n" * 8,
        "deploy/swarm.yml": "1\n" * 7,
        "docker/cpu.Dockerfile": "1\n" * 6,
        "README.md": "1\n" * 5,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for words in (("init", "--quiet"), ("add", ".")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "untracked.py").write_text("1\n" * 30_000)
    return tmp_path


@pytest.mark.server
def test_lines_count_as_wrapped_and_only_code_counts(repository: Path) -> None:
    done = measured(repository)
    assert done.returncode == 0, done.stderr
    rows = {row[0]: (row[1], row[2]) for row in re.findall(r"(?m)^(.+?) +([\d,]+) lines +(\d+) files$", done.stdout)}
    assert rows == {
        ".ci/": ("1", "0"),
        "serve/": ("5", "1"),
        "outside tests": ("6", "1"),
        "tests": ("1", "1"),
        "(the page)": ("9", "0"),
        "(nginx's files)": ("8", "0"),
        "(YAML)": ("7", "0"),
        "(Dockerfiles)": ("6", "0"),
    }


@pytest.mark.server
def test_over_a_budget_is_exit_code_1_and_one_sentence(repository: Path) -> None:
    most = runpy.run_path(str(SIZE))["BUDGETS"]["outside tests"][0]
    (repository / "serve" / "up.py").write_text("1\n" * most)
    done = measured(repository)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"outside tests: {most + 1:,} lines, at most {most:,}" in done.stderr


def test_without_git_it_says_that_nothing_was_counted(tmp_path: Path) -> None:
    done = measured(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "so nothing was counted" in done.stderr


@pytest.mark.server
def test_a_server_that_answers_holds_no_more_modules_than_this(colour_archive: Path) -> None:
    done = subprocess.run(
        [sys.executable, MODULES, colour_archive], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    held = {name: set(modules.split()) for name, modules in re.findall(r"(?m)^(.+): \d+ modules: (.+)$", done.stdout)}
    # Each has at least this module, or nothing was measured.
    for process, module in {
        "command line": "serve.up",
        "supervisor": "serve.instance.supervisor",
        "prober": "serve.gateway.prober",
        "worker": "vision_handler",
    }.items():
        assert module in held[process], done.stdout
    together = set().union(*held.values())
    assert len(together) <= MOST_MODULES, (
        f"{len(together)} modules of the project on the way to an answer, at most {MOST_MODULES}: merge some, import "
        f"later, or raise MOST_MODULES and say why in the commit:\n{done.stdout}"
    )
