"""What a worker may import, worked out from what is installed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from archive import isolation

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_of_this_repository_is_on_the_workers_path() -> None:
    folders = [Path(folder).resolve() for folder in isolation.package_folders()]
    assert folders
    assert ROOT not in folders
    assert ROOT / "handlers" not in folders
    assert all(folder.name in ("site-packages", "dist-packages") for folder in folders)


def test_what_only_this_environment_has_is_hidden_and_what_torch_needs_is_not() -> None:
    hidden = set(isolation.hidden_packages())
    assert {"torchvision", "lightning", "typer", "yaml", "ts", "pytest"} <= hidden
    assert not {"torch", "numpy", "PIL", "sympy", "filelock", "typing_extensions", "psutil"} & hidden


def test_an_engines_runtime_is_seen_where_the_archive_needs_it() -> None:
    assert "openvino" in isolation.hidden_packages()
    assert "openvino" not in isolation.hidden_packages(("openvino",))


def test_pillow_simd_in_pillows_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {**metadata.packages_distributions(), "PIL": ["pillow-simd"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: owners)
    assert "PIL" not in isolation.hidden_packages()
