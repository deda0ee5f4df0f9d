"""`beeline doctor` on this machine, and with everything wrong that can be."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import serve.up  # noqa: F401  # pydantic, which it imports, asks for the real distributions
from cli.main import app
from host import machine

KEYS = ("inference_address", "beeline_page_address", "management_address", "beeline_metrics_address")
Examine = Callable[..., tuple[int, dict[str, tuple[str, str]]]]


@pytest.fixture
def examine(colour_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examine a store with one archive, on free ports: return the exit code, and each check's state and text."""
    (tmp_path / "store").mkdir()
    shutil.copy(colour_archive, tmp_path / "store" / "colours.mar")
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "state"))

    def run(*words: str, port: int = 0) -> tuple[int, dict[str, tuple[str, str]]]:
        file = tmp_path / "config.properties"
        file.write_text("\n".join(f"{key}=http://127.0.0.1:{port if key == KEYS[0] else 0}" for key in KEYS))
        options = ["--store", str(tmp_path / "store"), "--config", str(file), "--json"]
        done = CliRunner().invoke(app, ["doctor", *options, *words])
        checks = json.loads(done.stdout.splitlines()[-1])["checks"]
        return done.exit_code, {each["name"]: (each["state"], each["text"]) for each in checks}

    return run


def test_a_machine_that_can_serve_and_one_without_nginx(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, checks = examine("--goldens")
    assert (code, {state for state, _ in checks.values()}) == (0, {"ok"}), checks
    assert checks["archives"][1] == "colours 1.0: golden pictures answered"
    assert len(checks) == 11
    assert not (tmp_path / "state").exists()
    monkeypatch.setenv("BEELINE_NGINX", "/none")
    # A fake, since root may read everything.
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Path("/none").stat())
    code, checks = examine()
    assert (code, checks["nginx"][0], checks["disk"][0]) == (2, "undetermined", "undetermined")


def test_each_thing_that_is_wrong_has_its_fix(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEELINE_STATE", str(tmp_path / "cpu.max" / "none"))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr("beeline.settings.cgroups", lambda *arguments: [tmp_path])
    # Fakes: these cannot be made here, or would break other tests.
    both = [SimpleNamespace(metadata={"Name": name}) for name in ("Pillow", "pillow-simd")]
    monkeypatch.setattr(metadata, "distributions", lambda: both)
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000_000))
    monkeypatch.setattr("cli.doctor.time.time", lambda: 0.0)
    monkeypatch.setattr("beeline.engines.runtime", lambda engine: "no_such_package")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, checks = examine(port=server.getsockname()[1])
    assert code == 1
    fixes = {
        "processor": "allows 0.50 of a core; allow one at least (cpu.max, --cpus)",
        "pillow": "run `make pillow` or `make simd`",
        "folders": f"{tmp_path / 'cpu.max'} is a file",
        "ports": "choose another port with --port",
        "memory": "start fewer (--workers, WORKERS, minWorkers)",
        "engines": "needs the package no_such_package, which is not installed; run `make setup`",
        "disk": "10 MB free, and a start needs about 216 MB; remove files",
        "clock": "the clock says 1970-01-01 00:00:00 UTC",
    }
    assert {name for name, (state, _) in checks.items() if state == "wrong"} == set(fixes)
    for name, fix in fixes.items():
        assert fix in checks[name][1]
