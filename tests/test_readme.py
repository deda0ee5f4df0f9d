"""Every command block of the README and of docs/ runs as a newcomer would run it, and its output is compared.

Not here: `make test`, which runs the tests, and `shell` blocks, which need a container engine: tests/docker runs them.
"""

from __future__ import annotations

import itertools
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
from typer.main import get_command

from cli.main import app
from tests.conftest import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A set-up from an empty cache, and a fit on a slow and busy machine.
PATIENCE = 1800


def blocks() -> list[tuple[str, str]]:
    """Return the fenced blocks of all pages: language and content."""
    return [(match[1], match[2]) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def served_blocks() -> dict[str, list[tuple[str, str]]]:
    """Return by `make serve` command the blocks that follow it, each with the JSON that it must print."""
    by_server: dict[str, list[tuple[str, str]]] = {}
    command = ""
    for (language, text), (following, shown) in itertools.pairwise([*blocks(), ("", "")]):
        if language != "sh" or text == "make test\n":
            continue
        if text.startswith("make serve"):
            command = text
        else:
            assert command, f"a server must run before\n{text}"
            # A block that the README repeats from a page runs once.
            commands, block = by_server.setdefault(command, []), (text, shown if following == "json" else "")
            if block not in commands:
                commands.append(block)
    return by_server


@contextmanager
def serving(command: str, log: Path, environ: dict[str, str]) -> Iterator[None]:
    """Run `make serve` as a terminal does, until it is ready; end it with Ctrl-C."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while "\nready: " not in log.read_text():
                assert process.poll() is None, f"`{command}` ended:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"`{command}` is not ready:\n{log.read_text()}"
                time.sleep(0.2)
            print(log.read_text())  # noqa: T201
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=60)
    # No server and no worker of this checkout still runs.
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    names = ("java", "model_service_worker", "litapi", "translator", "tritonserver", "-m cli")
    assert not [line for line in lines if str(ROOT) in line and any(name in line for name in names)]


def run(command: str, environ: dict[str, str]) -> str:
    """Run one block and return what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    print(f"$ {command}{done.stdout}{done.stderr}")  # noqa: T201
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compare(output: str, shown: str) -> None:
    """Compare JSON by keys and their order, and numbers within a tenth, because other machines' last digits differ."""
    values, expected = json.loads(output), json.loads(shown)
    assert list(values) == list(expected)
    for key, value in expected.items():
        assert values[key] == (pytest.approx(value, abs=0.1) if isinstance(value, float) else value)


def pictures(shared_data: Path) -> dict[str, str]:
    """Return this environment with the pictures and weights for `make serve`."""
    return {
        **os.environ,
        "BEELINE_DATA": str(shared_data / "hymenoptera_data"),
        "BEELINE_WEIGHTS": str(shared_data / "weights" / "resnet18-imagenet-pq.pth"),
    }


@pytest.mark.readme
def test_make_serve_by_itself(shared_data: Path, tmp_path: Path) -> None:
    """It calls no other program, so that it runs on a PATH without any."""
    with serving("make serve", tmp_path / "serve.log", pictures(shared_data)):
        url = "http://127.0.0.1:8080/predictions/resnet18"
        for label in ("ants", "bees"):
            data = (ROOT / ".beeline" / "samples" / f"{label}.jpg").read_bytes()
            answer = requests.post(url, data=data, timeout=60).json()
            assert max(answer, key=answer.get) == label


@pytest.mark.readme
def test_every_block(shared_data: Path, tmp_path: Path) -> None:
    environ = {
        **pictures(shared_data),
        "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
        "WEIGHTS": str(shared_data / "weights" / "squeezenet1_1-imagenet-fp16src.pth"),
        "LABELS": str(shared_data / "imagenet_samples" / "index_to_name.json"),
        "STORE": str(tmp_path / "store"),
        "DATA": str(shared_data / "hymenoptera_data" / "val"),
    }
    for number, (command, commands) in enumerate(served_blocks().items()):
        with serving(command, tmp_path / f"serve{number}.log", environ):
            for text, shown in commands:
                output = run(text, environ)
                if shown:
                    compare(output, shown)


def test_the_transcript_is_what_make_serve_prints() -> None:
    shown = next(text for language, text in blocks() if language == "text" and "ready: " in text)
    source = (ROOT / "cli" / "quickstart.py").read_text() + (ROOT / "cli" / "train.py").read_text()
    for line in shown.split("\n\n")[0].splitlines():
        assert f'"{line.split()[0]}"' in source, line


def test_a_test_runs_or_reads_every_kind_of_block() -> None:
    """A test runs the `shell` blocks of docs/containers.md; the README repeats some."""
    assert {language for language, _ in blocks()} == {"sh", "shell", "json", "text"}
    containers = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    lines = {line for match in BLOCK.finditer(containers) for line in match[2].splitlines()}
    assert {line for language, text in blocks() if language == "shell" for line in text.splitlines()} <= lines
    assert sum(len(commands) for commands in served_blocks().values()) >= 10


def test_every_command_within_a_sentence_exists() -> None:
    """`beeline VERB... --option` by the command line's own tree, `make VERB` by the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = get_command(app)
    names = []
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            words = code.split()
            if words[0] == "make" and len(words) > 1:
                assert re.search(rf"(?m)^{re.escape(words[1])}:", makefile), code
                names.append(code)
            if words[0] == "beeline" and len(words) > 1:
                command = known
                for word in words[1:]:
                    # Typer has a click of its own, so a group is known by what it has.
                    if hasattr(command, "commands"):
                        assert word in command.commands, f"{page.name}: {code}"
                        command = command.commands[word]
                options = {option for parameter in command.params for option in parameter.opts}
                assert options.issuperset(word for word in words if word.startswith("--")), f"{page.name}: {code}"
                names.append(code)
    assert len(names) >= 15


def test_every_link_to_a_file_leads_somewhere() -> None:
    pages = (*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md")))
    links = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    }
    assert ROOT / "frontend" / "screenshot.png" in links
    assert links.issuperset(PAGES[1:]), "a page that no other page leads to"
    assert [link for link in links if not link.is_file()] == []


def test_the_readme_is_short_and_lacks_no_figure() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert not re.search(r"\| [A-Z]{3,} \|", text)


def test_every_file_that_the_architecture_and_the_contributing_pages_name_exists() -> None:
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
        names = [name for name in re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", text) if not name.startswith("runs/")]
        assert len(names) >= 10
        assert [name for name in names if not (ROOT / name).is_file()] == []


def test_the_layers_of_the_architecture_are_those_that_are_checked() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| (\d) \| ([^|]+) \|", text[text.index("## The layers") :])
    (contract,) = re.findall(r"(?m)^layers = (.+)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = json.loads(contract)
    assert [re.findall(r"`(\w+)`", rooms) for _, rooms in rows] == [layer.split(" | ") for layer in layers]
    assert [number for number, _ in rows] == [str(index + 1) for index in range(len(layers))]
