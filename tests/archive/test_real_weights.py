"""A real state dict with ImageNet's thousand labels, from file to answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archive import presets
from archive.artifact import load_network
from archive.build import build
from archive.export import ExportRequest, export_folder
from archive.goldens.mistakes import MISTAKES
from archive.labels import read_labels
from archive.sandbox import Sandbox
from beeline.spec import Provenance


@pytest.mark.shared
def test_squeezenet_is_built_verified_and_names_pictures_it_never_saw(shared_data: Path, tmp_path: Path) -> None:
    weights = shared_data / "weights" / "squeezenet1_1-imagenet-fp16src.pth"
    samples = shared_data / "imagenet_samples"
    preset = presets.find_preset("imagenet")
    request = ExportRequest(
        name="squeezenet1_1",
        version="1.0",
        labels=read_labels(samples / "index_to_name.json"),
        geometry=preset.geometry,
        mean=preset.mean,
        std=preset.std,
        architecture="squeezenet1_1",
        provenance=Provenance(data="ImageNet", weights=weights.name, licence="BSD-2-Clause"),
    )
    export_folder(load_network(weights, "squeezenet1_1"), request, tmp_path / "export")
    expected = json.loads((tmp_path / "export" / "golden" / "expected.json").read_text())
    assert expected["detects"] == list(MISTAKES)
    assert {request.labels[0], request.labels[-1]} <= {picture["top"][0][0] for picture in expected["pictures"]}
    built = build(tmp_path / "export", tmp_path / "store")
    assert built.verified is not None
    truth = json.loads((samples / "labels.json").read_text())
    with Sandbox(built.path) as sandbox:
        answers = sandbox.predict([(samples / name).read_bytes() for name in truth])
    right = sum(
        next(iter(answer.json())) == request.labels[index]
        for answer, index in zip(answers, truth.values(), strict=True)
    )
    # Measured with torchvision's transforms and the same weights: 0.670.
    assert len(answers) == 200
    assert abs(right / len(answers) - 0.670) <= 0.01
