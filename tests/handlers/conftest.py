"""The ImageNet network that real photographs are sent through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from archive.export import ExportRequest, export_folder, find_preset
from archive.labels import read_labels
from beeline.spec import ModelSpec
from tests.conftest import write_checksums


@pytest.fixture(scope="session")
def network(shared_data: Path) -> torch.nn.Module:
    network: torch.nn.Module = torchvision.models.resnet18()
    network.load_state_dict(torch.load(shared_data / "weights" / "resnet18-imagenet-pq.pth", weights_only=True))
    return network.eval()


@pytest.fixture(scope="session")
def model_folder(network: torch.nn.Module, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet") / "export"
    labels = read_labels(shared_data / "imagenet_samples" / "index_to_name.json")
    request = ExportRequest("resnet18", "1.0", labels, find_preset("imagenet"), "resnet18")
    export_folder(network, request, folder)
    write_checksums(folder, ModelSpec.load(folder))
    return folder
