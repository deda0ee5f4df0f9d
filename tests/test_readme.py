"""Every command block of the README is run, in order, as a newcomer would, and its output compared.

`make test` is the one block that is not run from here: it is what runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from tests.conftest import ROOT

pytestmark = pytest.mark.readme

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A set-up from an empty cache, and a fit on a slow and busy machine.
PATIENCE = 1800


def blocks() -> list[tuple[str, str]]:
    """Return the README's fenced blocks: language and content."""
    return [(match[1], match[2]) for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))]


@contextmanager
def serving(command: str, log: Path, environ: dict[str, str]) -> Iterator[None]:
    """Run `make serve` as a terminal would, until it is ready; end it with Ctrl-C."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while "\nready: " not in log.read_text():
                assert process.poll() is None, f"`{command}` ended:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"`{command}` is not ready:\n{log.read_text()}"
                time.sleep(0.2)
            print(log.read_text())  # noqa: T201 - what a newcomer sees, in the run's log
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=60)
    assert leftovers() == []


def leftovers() -> list[str]:
    """Return the servers and workers of this checkout that still run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(ROOT) in line and ("java" in line or "model_service_worker" in line or "-m cli" in line):
            found.append(line)
    return found


def run(command: str, environ: dict[str, str]) -> str:
    """Run one block and return what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    print(f"$ {command}{done.stdout}{done.stderr}")  # noqa: T201
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compare(output: str, shown: str) -> None:
    """Compare JSON by its keys and their order, numbers within a tenth: another machine's last digits differ."""
    values, wanted = json.loads(output), json.loads(shown)
    assert list(values) == list(wanted)
    for key, value in wanted.items():
        assert values[key] == (pytest.approx(value, abs=0.1) if isinstance(value, float) else value)


def pictures(shared_data: Path) -> dict[str, str]:
    """Return this environment with the pictures and weights that `make serve` takes."""
    return {
        **os.environ,
        "BEELINE_DATA": str(shared_data / "hymenoptera_data"),
        "BEELINE_WEIGHTS": str(shared_data / "weights" / "resnet18-imagenet-pq.pth"),
    }


def test_make_serve_by_itself(shared_data: Path, tmp_path: Path) -> None:
    """It calls no other program, so that it runs where there is none."""
    with serving("make serve", tmp_path / "serve.log", pictures(shared_data)):
        url = "http://127.0.0.1:8080/predictions/resnet18"
        for label in ("ants", "bees"):
            data = (ROOT / ".beeline" / "samples" / f"{label}.jpg").read_bytes()
            answer = requests.post(url, data=data, timeout=60).json()
            assert max(answer, key=answer.get) == label


def test_every_block(shared_data: Path, tmp_path: Path) -> None:
    environ = {
        **pictures(shared_data),
        "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
        "WEIGHTS": str(shared_data / "weights" / "squeezenet1_1-imagenet-fp16src.pth"),
        "LABELS": str(shared_data / "imagenet_samples" / "index_to_name.json"),
        "STORE": str(tmp_path / "store"),
        "DATA": str(shared_data / "hymenoptera_data" / "val"),
    }
    todo = blocks()
    ran = 0
    while todo:
        language, text = todo.pop(0)
        if language != "sh" or text == "make test\n":
            continue
        assert text.startswith("make serve"), f"a server must run before\n{text}"
        with serving(text, tmp_path / f"serve{ran}.log", environ):
            ran += 1
            while todo and not todo[0][1].startswith("make serve"):
                language, text = todo.pop(0)
                if language == "sh" and text != "make test\n":
                    output = run(text, environ)
                    ran += 1
                    if todo and todo[0][0] == "json":
                        compare(output, todo[0][1])
    assert ran >= 8


def test_the_transcript_is_what_make_serve_prints() -> None:
    shown = next(text for language, text in blocks() if language == "text" and "ready: " in text)
    source = (ROOT / "cli" / "quickstart.py").read_text() + (ROOT / "cli" / "train.py").read_text()
    for line in shown.split("\n\n")[0].splitlines():
        assert f'"{line.split()[0]}"' in source, line


def test_every_link_to_a_file_leads_somewhere() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert "frontend/screenshot.png" in links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_no_figure_is_missing() -> None:
    assert not re.search(r"\| [A-Z]{3,} \|", (ROOT / "README.md").read_text(encoding="utf-8"))
