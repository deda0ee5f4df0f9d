"""`beeline doctor` on this machine, and with one thing wrong at a time."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from host import machine

CONFIG = "\n".join(
    ["beeline_page_address=http://127.0.0.1:0", "inference_address=http://127.0.0.1:{port}"]
    + [f"{name}=http://127.0.0.1:0" for name in ("management_address", "beeline_metrics_address")]
)
Examine = Callable[..., tuple[int, dict[str, tuple[str, str]]]]


@pytest.fixture
def examine(colour_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examine a store with one archive, on free ports: return the exit code, and each check's state and text."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(colour_archive, store / "colours.mar")
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "state"))
    # Pytest's own temporary folders have long paths.
    monkeypatch.setattr("tempfile.tempdir", "/tmp")

    def run(*words: str, port: int = 0) -> tuple[int, dict[str, tuple[str, str]]]:
        (tmp_path / "config.properties").write_text(CONFIG.format(port=port))
        options = ["--store", str(store), "--config", str(tmp_path / "config.properties"), "--json"]
        done = CliRunner().invoke(app, ["doctor", *options, *words])
        checks = json.loads(done.stdout.splitlines()[-1])["checks"]
        return done.exit_code, {each["name"]: (each["state"], each["text"]) for each in checks}

    return run


def test_a_machine_that_can_serve(examine: Examine) -> None:
    code, checks = examine("--goldens")
    assert {state for state, _ in checks.values()} == {"ok"}, checks
    assert code == 0
    assert checks["archives"][1] == "colours 1.0: golden pictures answered"
    assert list(checks) == [
        *("server", "nginx", "processor", "pillow", "folders", "archives"),
        *("ports", "memory", "engines", "disk", "clock"),
    ]


def test_a_long_temporary_folder(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ("x" * 60)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 60)))
    assert wrong(examine(), "folders").endswith("has a long path; set TMPDIR to one of 50 bytes at most")


def test_a_taken_port(examine: Examine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = wrong(examine(port=server.getsockname()[1]), "ports")
    assert "is taken by" in text
    assert "choose another port with --port" in text


def test_a_folder_that_cannot_be_written(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "file" / "state"))
    assert wrong(examine(), "folders").endswith("file is a file; name another folder")


def test_two_pillows_in_one_folder(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fake: two installed packages would break the Pillow of every other test.
    both = [SimpleNamespace(metadata={"Name": name}) for name in ("Pillow", "pillow-simd")]
    monkeypatch.setattr(metadata, "distributions", lambda: both)
    assert wrong(examine(), "pillow").endswith("run `make pillow` or `make simd`")


def test_little_memory_and_a_full_disk(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fakes: neither can be made here.
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000_000))
    code, checks = examine()
    assert code == 1
    assert "start fewer (--workers, WORKERS, minWorkers)" in checks["memory"][1]
    assert "10 MB free, and a start needs about 216 MB; remove files" in checks["disk"][1]


def test_a_quota_of_part_of_a_core(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr("beeline.settings.cgroups", lambda *arguments: [tmp_path])
    assert wrong(examine(), "processor").endswith("allows 0.50 of a core; allow one at least (cpu.max, --cpus)")


def test_a_clock_that_is_behind(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.doctor.time.time", lambda: 0.0)
    assert "the clock says 1970-01-01 00:00:00 UTC" in wrong(examine(), "clock")


def test_a_changed_archive_and_an_engine_that_is_missing(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beeline.engines.runtime", lambda engine: "no_such_package")
    assert "needs the package no_such_package, which is not installed" in wrong(examine(), "engines")
    (tmp_path / "store" / "colours.mar").write_bytes(b"no archive")
    assert "cannot be read as a model archive" in wrong(examine(), "archives")


def test_what_cannot_be_determined_has_exit_code_2(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEELINE_NGINX", str(tmp_path / "none"))
    code, checks = examine()
    assert (code, checks["nginx"][0]) == (2, "undetermined")
    assert "install it" in checks["nginx"][1]


def wrong(outcome: tuple[int, dict[str, tuple[str, Any]]], name: str) -> str:
    """Return the text of the only check that is wrong."""
    code, checks = outcome
    assert code == 1
    assert [each for each, (state, _) in checks.items() if state != "ok"] == [name], checks
    return str(checks[name][1])
