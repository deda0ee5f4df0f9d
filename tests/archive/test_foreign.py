"""Archives of TorchServe's own handler, made by its archiver: taken with their model, labels and version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archive import foreign
from archive.export import export_folder
from archive.graph import quiet
from beeline.errors import ArchiveError
from beeline.spec import Geometry
from tests.archive.conftest import LABELS, TinyNet, tiny_request

MODEL = """
import torch


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d(8)
        self.head = torch.nn.Linear(192, 3)

    def forward(self, pictures):
        return self.head(self.pool(pictures).flatten(1))
"""


def archived(folder: Path, kind: str = "model.py", handler: str = "image_classifier") -> Path:
    """Make `old.mar` with torch-model-archiver."""
    weights, extra = folder / "old.pt", []
    if kind == "model.py":
        torch.save(TinyNet().state_dict(), weights)
        (folder / "model.py").write_text(MODEL)
        extra = ["--model-file", str(folder / "model.py")]
    else:
        with quiet():
            torch.jit.script(TinyNet().eval()).save(weights)
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(LABELS))))
    words = ["-m", "model_archiver.model_packaging", "--model-name", "old", "--version", "1.4", "--handler", handler]
    files = ["--serialized-file", str(weights), "--extra-files", str(folder / "index_to_name.json")]
    subprocess.run([sys.executable, *words, *files, *extra, "--export-path", str(folder)], check=True)
    return folder / "old.mar"


@pytest.mark.parametrize("kind", ["model.py", "torchscript"])
def test_its_model_labels_and_version_are_taken_and_its_own_handler_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, jit: None
) -> None:
    taken = foreign.unpack(archived(tmp_path, kind), tmp_path / "unpacked")
    assert (taken.name, taken.version) == ("old", "1.4")
    assert taken.labels is not None
    noise = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    network = taken.network()
    assert torch.equal(network(noise), TinyNet()(noise))
    request = tiny_request(geometry=Geometry(256, 224), version=taken.version)
    export_folder(network, request, tmp_path / "export")
    # Of captum that handler needs only the explanations, which nobody asks for here: this one is a fake.
    (tmp_path / "captum").mkdir()
    (tmp_path / "captum" / "__init__.py").touch()
    (tmp_path / "captum" / "attr.py").write_text("class IntegratedGradients:\n    def __init__(self, model): ...\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said: list[str] = []
    taken.compare(tmp_path / "export", said.append)
    assert said == ["  its own handler gives the same answers to 3 golden pictures"]
    export_folder(network, tiny_request(geometry=Geometry(256, 224), labels=LABELS[::-1]), tmp_path / "swapped")
    with pytest.raises(ArchiveError, match=r"old answers .* and its own handler with"):
        taken.compare(tmp_path / "swapped", said.append)


def test_without_captum_nothing_is_compared_and_that_is_said(tmp_path: Path, tiny_export: Path) -> None:
    taken = foreign.unpack(archived(tmp_path), tmp_path / "unpacked")
    said: list[str] = []
    taken.compare(tiny_export, said.append)
    assert said == [
        "  its own handler does not run here (ModuleNotFoundError: No module named 'captum'), so nothing is compared "
        "with it"
    ]


def test_another_handler_and_another_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="has the handler 'image_segmenter'; taken are archives of image_classifier"):
        foreign.unpack(archived(tmp_path, handler="image_segmenter"), tmp_path / "unpacked")
    (tmp_path / "old.mar").unlink()
    taken = foreign.unpack(archived(tmp_path), tmp_path / "again")
    (taken.folder / "model.py").write_text(MODEL + "\n\nclass Other: ...\n")
    with pytest.raises(ArchiveError, match=r"model\.py defines the classes Tiny, Other, expected one"):
        taken.network()
