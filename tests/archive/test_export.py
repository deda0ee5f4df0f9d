"""Exporting: the folder's contents, the same bytes anywhere, and what is refused."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from archive.export import export_folder
from beeline import golden
from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError, SpecError
from beeline.spec import Geometry, ModelSpec
from tests.archive.conftest import LABELS, TinyNet, tiny_request

ROOT = Path(__file__).resolve().parents[2]


class Probable(TinyNet):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures).softmax(1)


class Sociable(TinyNet):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures - pictures.mean(0, keepdim=True))


class Endless(TinyNet):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures) / 0


class Pair(TinyNet):
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(pictures)
        return scores, scores


def test_the_folder_holds_what_a_worker_needs(tiny_export: Path) -> None:
    spec = ModelSpec.load(tiny_export)
    assert spec.labels == LABELS
    assert spec.geometry == Geometry(36, 32)
    names = {path.relative_to(tiny_export).as_posix() for path in tiny_export.rglob("*") if path.is_file()}
    assert names == {
        "model.pt2",
        "model_spec.json",
        "golden/0.jpg",
        "golden/1.png",
        "golden/2.jpg",
        "golden/3.jpg",
        "golden/expected.json",
    }
    assert golden.replay(tiny_export, spec, TorchEngine(tiny_export, spec, device="cpu").forward) == 4


def test_another_process_folder_umask_and_hash_seed_give_the_same_bytes(tiny_export: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; os.umask(0o077)\n"
        "from archive.export import export_folder\n"
        "from tests.archive.conftest import TinyNet, tiny_request\n"
        "export_folder(TinyNet(), tiny_request(), pathlib.Path('deeper/still'))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    again = tmp_path / "deeper" / "still"
    names = sorted(path.relative_to(tiny_export) for path in tiny_export.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert filecmp.cmp(tiny_export / name, again / name, shallow=False), name


@pytest.mark.parametrize("scripted", [False, True])
def test_the_model_file_names_no_path_of_this_machine(tmp_path: Path, scripted: bool, jit: None) -> None:
    network = torch.jit.script(TinyNet()) if scripted else TinyNet()
    spec = export_folder(network, tiny_request(), tmp_path / "export")
    with zipfile.ZipFile(tmp_path / "export" / spec.model.file) as archive:
        assert archive.namelist()[0].startswith("model/")
        for name in archive.namelist():
            data = archive.read(name)
            for trace in (str(ROOT), str(tmp_path), str(Path.home()), "site-packages", "stack_trace"):
                assert trace.encode() not in data, (name, trace)


@pytest.mark.parametrize(
    ("network", "changes", "told"),
    [
        (TinyNet(), {"labels": ("ants", "bees")}, "3 outputs and there are 2 labels"),
        (TinyNet(4), {}, "4 outputs and there are 3 labels"),
        (Endless(), {}, "not finite"),
        (Sociable(), {}, "depends on its neighbours"),
        (Pair(), {}, "returns tuple .*allowed: float32"),
        (TinyNet().double(), {}, "does not run"),
        (Probable(), {}, "say --output probabilities"),
        (TinyNet(), {"output": "probabilities"}, "say --output logits"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    tmp_path: Path, network: torch.nn.Module, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ArchiveError, match=told):
        export_folder(network, tiny_request(**changes), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_labels_that_occur_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="occurs twice"):
        export_folder(TinyNet(), tiny_request(labels=("ants", "bees", "bees")), tmp_path / "export")


def test_probabilities_are_exported_as_such(tmp_path: Path) -> None:
    spec = export_folder(Probable(), tiny_request(output="probabilities"), tmp_path / "export")
    assert spec.output == "probabilities"
    engine = TorchEngine(tmp_path / "export", spec, device="cpu")
    assert golden.replay(tmp_path / "export", spec, engine.forward) >= 2


def test_a_users_program_is_wrapped_and_exported_again(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 3, 32, 32)
    program = torch.export.export(TinyNet().eval(), (example,), dynamic_shapes=({0: batch},))
    spec = export_folder(program, tiny_request(), tmp_path / "export")
    assert spec.model.format == "exported_program"


def test_a_program_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(TinyNet().eval(), (torch.zeros(1, 3, 32, 32),))
    with pytest.raises(ArchiveError, match="batch size is not fixed"):
        export_folder(program, tiny_request(), tmp_path / "export")


def test_only_an_export_is_ever_replaced(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    with pytest.raises(ArchiveError, match="is no exported folder"):
        export_folder(TinyNet(), tiny_request(), out)
    assert (out / "chapter1.txt").read_text() == "years of work"


def test_the_number_of_threads_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ArchiveError):
        export_folder(TinyNet(4), tiny_request(), tmp_path / "export")
    assert torch.get_num_threads() == before
