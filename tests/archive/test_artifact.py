"""What users bring: the form is found by content, and each misfit is one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from archive.artifact import kind_of, load_network
from beeline.errors import ArchiveError
from tests.archive.conftest import TinyNet


def squeezenet(classes: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    network: torch.nn.Module = torchvision.models.squeezenet1_1(num_classes=classes)
    return network.eval()


def test_the_form_is_found_by_content_whatever_the_name(tmp_path: Path, jit: None) -> None:
    path = tmp_path / "model.bin"
    torch.save(TinyNet().state_dict(), path)
    assert kind_of(path) == "pickle"
    torch.jit.script(TinyNet()).save(str(path))
    assert kind_of(path) == "torchscript"
    assert isinstance(load_network(path), torch.jit.ScriptModule)
    torch.export.save(torch.export.export(TinyNet(), (torch.zeros(2, 3, 32, 32),)), tmp_path / "model.pt2")
    assert kind_of(tmp_path / "model.pt2") == "exported_program"
    assert isinstance(load_network(tmp_path / "model.pt2"), torch.export.ExportedProgram)


@pytest.mark.parametrize("form", ["plain", "nested", "parallel"])
def test_a_state_dict_fills_its_architecture_with_its_own_number_of_classes(tmp_path: Path, form: str) -> None:
    network = squeezenet()
    state: dict[str, Any] = dict(network.state_dict())
    if form == "nested":
        state = {"epoch": 3, "state_dict": state}
    if form == "parallel":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_network(tmp_path / "weights.pth", "squeezenet1_1")
    assert isinstance(loaded, torch.nn.Module)
    pictures = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(pictures), network(pictures))


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        (None, "add --architecture"),
        ("squeezenet1_0", "name the right --architecture"),
        ("squeeznet1_1", "did you mean 'squeezenet1_1'"),
        ("x", "name one of torchvision.models"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(tmp_path: Path, architecture: str | None, told: str) -> None:
    torch.save(squeezenet().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ArchiveError, match=told):
        load_network(tmp_path / "weights.pth", architecture)


def test_a_lost_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    state = dict(squeezenet().state_dict())
    lost = {name: tensor for name, tensor in state.items() if name != "features.0.bias"}
    torch.save(lost, tmp_path / "weights.pth")
    with pytest.raises(ArchiveError, match=r"lacks 'features\.0\.bias'"):
        load_network(tmp_path / "weights.pth", "squeezenet1_1")
    torch.save({"strange": torch.ones(1), **state}, tmp_path / "weights.pth")
    with pytest.raises(ArchiveError, match="has 'strange'"):
        load_network(tmp_path / "weights.pth", "squeezenet1_1")


def test_a_pickled_module_is_refused_and_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArchiveError, match=r"refused: save model\.state_dict"):
        load_network(path, "resnet18")
    torch.save({"fc.weight": Evil()}, path)
    with pytest.raises(ArchiveError, match=r"refused: save model\.state_dict"):
        load_network(path, "resnet18")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_model_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"bad\.pth is no TorchScript.* save model\.state_dict\(\)") as caught:
        load_network(tmp_path / "bad.pth", "resnet18")
    assert "\n" not in str(caught.value)


def test_a_tensor_alone_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "bad.pth")
    with pytest.raises(ArchiveError, match="holds a Tensor that is no state dict"):
        load_network(tmp_path / "bad.pth", "resnet18")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is missing"):
        load_network(tmp_path / "none.pt")
