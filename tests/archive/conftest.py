"""A tiny network with its export and archive, and archives with any files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from archive.build import Built, build
from archive.export import ExportRequest, export_folder, find_preset
from archive.graph import quiet
from beeline.spec import Geometry, Provenance
from tests.serve.conftest import make_fake

__all__ = ["make_fake"]

LABELS = ("ants", "bees", "crickets")
Files = dict[str, bytes]
MakeMar = Callable[..., Path]
MakePlain = Callable[[str], Path]


class TinyNet(torch.nn.Module):
    """Float32 normalised `[N, 3, H, W]` to three logits, which depend on the place of each colour."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.pool = torch.nn.AdaptiveAvgPool2d(8)
        self.head = torch.nn.Linear(192, classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(classes, 192, generator=generator) / 4)
            self.head.bias.zero_()

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.pool(pictures).flatten(1))
        return scores


class Changed(TinyNet):
    """The tiny network with a change of its scores."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, pictures: torch.Tensor) -> Any:
        return self.change(super().forward(pictures))


def tiny_request(**changes: Any) -> ExportRequest:
    """Return the request that the tiny network is exported with; some changes are of its preprocessing."""
    own = {key: changes.pop(key) for key in ("geometry", "mean", "std", "channels") if key in changes}
    preprocessing = replace(find_preset("imagenet"), **{"geometry": Geometry(36, 32), **own})
    facts = {"name": "tiny", "version": "1.0", "labels": LABELS, "preprocessing": preprocessing, "architecture": "tiny"}
    origin = Provenance(data="none", weights="random", licence="MIT")
    return ExportRequest(**{**facts, "provenance": origin, **changes})


def tiny_program(batch: int = 2) -> torch.export.ExportedProgram:
    """Return the tiny network as a user's exported program; with a batch of 1 that size is fixed."""
    sizes = None if batch == 1 else ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(TinyNet().eval(), (torch.zeros(batch, 3, 32, 32),), dynamic_shapes=sizes)


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network's exported folder."""
    folder = tmp_path_factory.mktemp("tiny") / "export"
    export_folder(TinyNet(), tiny_request(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_built(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The tiny network's verified archive in a store of its own."""
    return build(tiny_export, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def tiny_files(tiny_built: Built) -> Files:
    """The archive's files by name."""
    with zipfile.ZipFile(tiny_built.path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def make_mar(tmp_path: Path) -> MakeMar:
    """Zip any files, valid or not."""

    def make(files: Files | list[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
        with zipfile.ZipFile(tmp_path / "made.mar", "w") as archive:
            for entry, data in files.items() if isinstance(files, dict) else files:
                archive.writestr(entry, data)
        return tmp_path / "made.mar"

    return make


@pytest.fixture
def make_plain(make_mar: MakeMar) -> MakePlain:
    """Zip a handler of a few lines, without a model."""

    def make(source: str) -> Path:
        manifest = {"runtime": "python", "model": {"modelName": "plain", "handler": "plain.py"}}
        return make_mar({"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), "plain.py": source.encode()})

    return make


@pytest.fixture
def jit() -> Iterator[None]:
    """Allow TorchScript, which PyTorch calls deprecated and users still have."""
    with quiet():
        yield
