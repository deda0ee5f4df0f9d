"""A tiny network with its export and archive, and a way to change archives without anybody's help."""

from __future__ import annotations

import json
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from archive.build import Built, build
from archive.export import ExportRequest, export_folder
from beeline.spec import Geometry, Provenance
from tests.serve.conftest import make_fake

__all__ = ["make_fake"]

LABELS = ("ants", "bees", "crickets")
HANDLER = "vision_handler.py"
Files = dict[str, bytes]
MakeMar = Callable[..., Path]


class TinyNet(torch.nn.Module):
    """Float32 normalised `[N, 3, H, W]` to three logits; looks at where which colour is, as real ones do."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.pool = torch.nn.AdaptiveAvgPool2d(8)
        self.head = torch.nn.Linear(192, classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(classes, 192, generator=generator) / 4)
            self.head.bias.zero_()

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        scores: torch.Tensor = self.head(self.pool(pictures).flatten(1))
        return scores


def tiny_request(**changes: object) -> ExportRequest:
    """Return the request that the tiny network is exported with."""
    facts: dict[str, object] = {
        "name": "tiny",
        "version": "1.0",
        "labels": LABELS,
        "geometry": Geometry(36, 32),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "architecture": "tiny",
        "provenance": Provenance(data="none", weights="random", licence="MIT"),
    }
    return ExportRequest(**{**facts, **changes})  # type: ignore[arg-type]


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
    """Zip files as they are given, honest or not."""

    def make(files: Files | list[tuple[zipfile.ZipInfo | str, bytes]], name: str = "made.mar") -> Path:
        entries = list(files.items()) if isinstance(files, dict) else files
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in entries:
                info = zipfile.ZipInfo(entry) if isinstance(entry, str) else entry
                if isinstance(entry, str):
                    info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, data)
        return path

    return make


@pytest.fixture
def make_plain(make_mar: MakeMar) -> Callable[[str], Path]:
    """Zip a handler of a few lines, without a model, as a runner loads it."""

    def make(source: str) -> Path:
        manifest = {"runtime": "python", "model": {"modelName": "plain", "handler": "plain.py"}}
        return make_mar({"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), "plain.py": source.encode()})

    return make


@pytest.fixture
def jit() -> Iterator[None]:
    """Let a test use TorchScript, which PyTorch calls deprecated and users still bring."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield
