"""Starting weights: the user's file, torchvision's, or none with a warning."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision import models

from archive.artifact import read_state_dict
from train.errors import DownloadError, WeightsError
from train.model import build, start_from
from train.weights import find_weights


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(build("squeezenet1_1", 1000).state_dict(), path)
    return path


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Any) -> Any:
    """Torchvision's weights API, whose files lie on the local server; PyTorch's cache is a new folder."""

    def choose(url: str) -> None:
        entry = SimpleNamespace(url=url)
        monkeypatch.setattr(models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=entry))

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server.choose = choose
    return server


def test_a_named_file_comes_first(file: Path) -> None:
    said: list[str] = []
    found = find_weights("squeezenet1_1", file, said.append, {"BEELINE_WEIGHTS": "/missing"})
    assert (found.kind, found.name, found.path) == ("file", "squeezenet.pth", file)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert said == [f"weights: the file {file}"]


def test_the_environment_names_a_file(file: Path) -> None:
    assert find_weights("squeezenet1_1", None, print, {"BEELINE_WEIGHTS": str(file)}).path == file
    with pytest.raises(WeightsError, match="the weights file /missing is missing; name a state dict of squeezenet1_1"):
        find_weights("squeezenet1_1", None, print, {"BEELINE_WEIGHTS": "/missing"})


def test_torchvisions_weights_are_downloaded_once_into_its_own_cache(
    torchvision: Any, file: Path, tmp_path: Path
) -> None:
    torchvision.content = file.read_bytes()
    name = f"net-{hashlib.sha256(torchvision.content).hexdigest()[:8]}.pth"
    torchvision.choose(torchvision.url.replace("set.zip", name))
    for _ in range(2):
        found = find_weights("squeezenet1_1", None, print, {})
        assert (found.kind, found.path) == ("torchvision", tmp_path / "hub" / "checkpoints" / name)
    assert len(torchvision.seen) == 1
    assert found.read().keys() == read_state_dict(file).keys()


def test_torchvisions_weights_must_have_the_digest_in_their_name(torchvision: Any) -> None:
    torchvision.content = b"something else"
    torchvision.choose(torchvision.url.replace("set.zip", "net-01234567.pth"))
    with pytest.raises(DownloadError, match="expected 01234567"):
        find_weights("squeezenet1_1", None, print, {})


def test_without_a_network_random_weights_come_with_a_warning(torchvision: Any) -> None:
    torchvision.choose("http://127.0.0.1:1/net-01234567.pth")
    said: list[str] = []
    found = find_weights("squeezenet1_1", None, said.append, {})
    assert (found.kind, found.pretrained, found.sha256) == ("random", False, None)
    assert any(line.startswith("WARNING: squeezenet1_1 starts from random weights") for line in said)


def test_the_body_is_loaded_and_the_head_left_alone(file: Path) -> None:
    network = build("squeezenet1_1", 2)
    head = network.state_dict()["classifier.1.weight"].clone()
    start_from(network, read_state_dict(file), "the file")
    assert torch.equal(network.state_dict()["features.0.weight"], read_state_dict(file)["features.0.weight"])
    assert torch.equal(network.state_dict()["classifier.1.weight"], head)


def test_weights_of_another_architecture_have_their_sentence(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit ResNet: \d+ missing \(bn1\.bias.*; \d+ unknown") as caught:
        start_from(build("resnet18", 2), read_state_dict(file), "the file")
    assert str(caught.value).endswith("set model.name to the architecture that the file was made for")
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_have_their_sentence() -> None:
    with pytest.raises(WeightsError, match=r"VisionTransformer: 1 of another shape \(encoder\.pos_embedding\)"):
        start_from(
            models.VisionTransformer(64, 16, 1, 1, 8, 8, num_classes=2),
            models.VisionTransformer(32, 16, 1, 1, 8, 8, num_classes=9).state_dict(),
            "it",
        )
