"""The user's files: the content says what a model file is, labels may have three forms, each misfit is one sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from archive.artifact import kind_of, load_network, read_labels
from archive.build import build
from archive.export import export_folder
from archive.goldens.mistakes import MISTAKES
from archive.sandbox import Sandbox
from beeline.errors import ArchiveError
from beeline.spec import Geometry
from tests.archive.conftest import TinyNet, tiny_request


def squeezenet() -> torch.nn.Module:
    torch.manual_seed(0)
    network: torch.nn.Module = torchvision.models.squeezenet1_1(num_classes=4)
    return network.eval()


def test_the_content_decides_whatever_the_name(tmp_path: Path, jit: None) -> None:
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
    ("architecture", "change", "reason"),
    [
        (None, {}, "add --architecture"),
        ("squeezenet1_0", {}, r"does not fit squeezenet1_0 \(.*size mismatch for .*name the right --architecture"),
        ("squeeznet1_1", {}, "did you mean 'squeezenet1_1'"),
        ("x", {}, "name one of torchvision.models"),
        ("squeezenet1_1", {"features.0.bias": None}, r"lacks 'features\.0\.bias'"),
        ("squeezenet1_1", {"strange": torch.ones(1)}, "has 'strange'"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(
    tmp_path: Path, architecture: str | None, change: dict[str, torch.Tensor | None], reason: str
) -> None:
    state = {**change, **squeezenet().state_dict()} | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "weights.pth")
    with pytest.raises(ArchiveError, match=reason):
        load_network(tmp_path / "weights.pth", architecture)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickled_module_is_refused_and_never_run(tmp_path: Path, nested: bool) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Evil()))
    if nested:
        torch.save({"fc.weight": Evil()}, path)
    with pytest.raises(ArchiveError, match=r"refused: save model\.state_dict"):
        load_network(path, "resnet18")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off", None])
def test_a_file_that_is_not_a_model_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    torch.save(torch.zeros(3), tmp_path / "bad.pth")
    if content is not None:
        (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"bad\.pth .*not a (plain )?state dict.* save model\.state_dict") as caught:
        load_network(tmp_path / "bad.pth", "resnet18")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("ants\nbees\n", ("ants", "bees")),
        ("\ufeffants\r\nbees", ("ants", "bees")),
        ('["ants", "bees"]', ("ants", "bees")),
        ('{"1": "bees", "0": "ants"}', ("ants", "bees")),
        ('{"0": ["n1", "ants"], "1": ["n2", "bees"]}', ("ants", "bees")),
        # Ordered as numbers.
        (json.dumps({str(i): f"class {i}" for i in range(12)}, sort_keys=True), tuple(f"class {i}" for i in range(12))),
        # Duplicates get their id or their index.
        (
            '{"0": ["n02012849", "crane"], "1": ["n1", "ox"], "2": ["n03126707", "crane"]}',
            ("crane (n02012849)", "ox", "crane (n03126707)"),
        ),
        ("crane\nox\ncrane\n", ("crane (0)", "ox", "crane (2)")),
    ],
)
def test_labels_have_the_order_of_the_outputs(tmp_path: Path, text: str, labels: tuple[str, ...]) -> None:
    (tmp_path / "labels").write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / "labels") == labels


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("{}", "is empty"),
        ("ants\n\nbees\n", "label 2 .* is blank"),
        ('{"0": "ants", "2": "bees"}', "none for class 1 .*'2'.*; number the classes 0 to 1"),
        ('{"0": "ants", "one": "bees"}', "none for class 1 .*'one'"),
        ('["ants", 3]', "class 1 .* is 3; allowed"),
        ('["ants", [3, "bees"]]', r"class 1 .* is \[3, 'bees'\]; allowed"),
        ('["ants", ', "is not JSON"),
    ],
)
def test_labels_that_cannot_be_read_are_refused_with_their_place(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ArchiveError, match=reason):
        read_labels(tmp_path / "labels")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is missing"):
        load_network(tmp_path / "none.pt")
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_labels(tmp_path / "none.txt")


@pytest.mark.shared
def test_a_real_state_dict_with_imagenets_labels_becomes_an_archive(shared_data: Path, tmp_path: Path) -> None:
    pictures = shared_data / "imagenet_samples"
    labels = read_labels(pictures / "index_to_name.json")
    # ImageNet has two cranes and two maillots.
    assert len(labels) == len(set(labels)) == 1000
    assert [labels[0], labels[134], labels[517]] == ["tench", "crane (n02012849)", "crane (n03126707)"]
    assert {labels[638], labels[639]} == {"maillot (n03710637)", "maillot (n03710721)"}
    network = load_network(shared_data / "weights" / "squeezenet1_1-imagenet-fp16src.pth", "squeezenet1_1")
    export_folder(network, tiny_request(labels=labels, geometry=Geometry(256, 224)), tmp_path / "export")
    expected = json.loads((tmp_path / "export" / "golden" / "expected.json").read_text())
    assert expected["detects"] == list(MISTAKES)
    assert {labels[0], labels[-1]} <= {picture["top"][0][0] for picture in expected["pictures"]}
    built = build(tmp_path / "export", tmp_path / "store")
    truth = json.loads((pictures / "labels.json").read_text())
    with Sandbox(built.path) as sandbox:
        answers = sandbox.predict([(pictures / name).read_bytes() for name in truth])
    right = [next(iter(answer.json())) == labels[i] for answer, i in zip(answers, truth.values(), strict=True)]
    # Measured with torchvision's transforms and the same weights: 0.670.
    assert len(right) == 200
    assert abs(sum(right) / len(right) - 0.670) <= 0.01
