"""The user's model files: the content says what a file is, and each misfit is one sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from archive.artifact import kind_of, load_network
from archive.build import build
from archive.export import export_folder
from archive.goldens.mistakes import MISTAKES
from archive.labels import read_labels
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


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        (None, {}, "add --architecture"),
        ("squeezenet1_0", {}, r"lacks 'features\.5\.squeeze\.weight', which squeezenet1_0 has .*name the right"),
        ("squeezenet1_1", {"features.0.bias": None}, r"lacks 'features\.0\.bias'"),
        ("squeezenet1_1", {"features.0.bias": torch.ones(2)}, r"'features\.0\.bias' of shape \[2\], .* has \[64\]"),
        ("squeezenet1_1", {"strange": torch.ones(2)}, "has 'strange', which squeezenet1_1 lacks"),
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
    with pytest.raises(ArchiveError, match=r"may run code|not a plain state dict"):
        load_network(path, "resnet18")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="is missing"):
        load_network(tmp_path / "none.pt")


PLAIN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "resample": 2}
SAME = "--mean 0.5,0.5,0.5 --std 0.2,0.2,0.2"
MIDDLE = {**PLAIN, "do_center_crop": True, "crop_size": 224}
TYPE = "feature_extractor_type"
DEIT = {**MIDDLE, TYPE: "DeiTFeatureExtractor", "resample": 3}
NOT = "; no option says that its own preprocessing"
SQUASHED = (
    f"{SAME} --interpolation bicubic --resize 256 --crop 224{NOT} squashes pictures to 256x256 before it crops, so "
)
SQUASHED += "these keep their proportions"
UNCUT = f"{NOT} does not crop, so these take the middle"
NEAREST = "--mean 0.5,0.5,0.5 --std 0.04,0.04,0.04 --fit squash --crop 224"
NEAREST += f"{NOT} resizes with the filter nearest, so these take bilinear"


@pytest.mark.parametrize(
    ("values", "size", "options"),
    [
        (None, "224, 224", ""),
        ({**PLAIN, "size": {"height": 192, "width": 256}}, "192, 256", f"{SAME} --fit squash --crop 256x192"),
        ({**PLAIN, "size": 224, "resample": 3}, "224, 224", f"{SAME} --interpolation bicubic --fit squash --crop 224"),
        ({**PLAIN, "size": {"shortest_edge": 224}, "crop_pct": 0.875}, "224, 224", f"{SAME} --resize 256 --crop 224"),
        ({**PLAIN, "size": {"shortest_edge": 384}, "crop_pct": 1.0}, "384, 384", f"{SAME} --fit squash --crop 384"),
        (
            {**MIDDLE, "size": {"shortest_edge": 288}, "crop_size": 256, "do_flip_channel_order": True},
            "256, 256",
            "--preset unit --channels bgr --resize 288 --crop 256",
        ),
        # Each image processor of transformers reads a size in its own way.
        ({**DEIT, "size": 256}, "224, 224", SQUASHED),
        ({**DEIT, "size": {"height": 256, "width": 256}}, "224, 224", SQUASHED),
        ({**MIDDLE, "size": 384, "crop_size": 384}, "384, 384", f"{SAME} --fit squash --crop 384"),
        ({**MIDDLE, TYPE: "CLIPImageProcessor", "size": 224}, "224, 224", f"{SAME} --resize 224 --crop 224"),
        ({**PLAIN, TYPE: "ConvNextFeatureExtractor", "size": 224}, "224, 224", f"{SAME} --resize 256 --crop 224"),
        ({**MIDDLE, TYPE: "LevitImageProcessor", "size": 224}, "224, 224", f"{SAME} --resize 256 --crop 224"),
        ({**MIDDLE, "size": 384, "crop_size": 384, "crop_pct": 0.95}, "384, 384", f"{SAME} --resize 404 --crop 384"),
        ({**MIDDLE, TYPE: "Perceiver", "size": 224, "crop_size": 256}, "224, 224", f"{SAME} --resize 256 --crop 224"),
        ({**PLAIN, "size": {"longest_edge": 512}}, "224, 224", SAME),
        ({**PLAIN, "size": {"shortest_edge": 640}}, "640, 640", f"{SAME} --resize 640 --crop 640{UNCUT}"),
        ({**PLAIN, "size": 224, "include_top": True, "resample": 0}, "224, 224", NEAREST),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [".", "model.safetensors", "pytorch_model.bin"])
def test_a_model_of_transformers_is_refused_with_the_lines_that_export_it(
    tmp_path: Path, values: dict[str, Any] | None, size: str, options: str, name: str
) -> None:
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "id2label": {"0": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    if values is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ArchiveError) as caught:
        load_network(tmp_path / name, "resnet18")
    said = str(caught.value)
    assert "is a ResNetForImageClassification of transformers" in said
    assert f"from_pretrained('{tmp_path}').eval()" in said
    assert f"torch.zeros(2, 3, {size})" in said
    assert said.endswith(f"--labels {tmp_path}/config.json{f' {options}' if options else ''}")
    assert read_labels(tmp_path / "config.json") == ("a",)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel of transformers, which is no image class"),
        # timm's weights have timm's names.
        ({"architecture": "resnet18", "num_classes": 3}, "is a state dict, which needs its architecture"),
        ([], "is a state dict, which needs its architecture"),
    ],
)
def test_another_configuration_beside_weights_is_no_image_classifier_of_transformers(
    tmp_path: Path, config: object, reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ArchiveError, match=reason):
        load_network(tmp_path / "model.safetensors")


def test_a_damaged_file_of_transformers_is_named_before_the_lines_that_would_read_it(tmp_path: Path) -> None:
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(9)}, path)
    for data, reason in ((path.read_bytes()[:-4], "is damaged"), (b"version https://git-lfs.github.com", "lfs pull")):
        path.write_bytes(data)
        with pytest.raises(ArchiveError, match=reason):
            load_network(path)


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
