"""Starting weights: the user's file, torchvision's, or none with a warning."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchvision import models

from train.errors import DownloadError, WeightsError
from train.model import build, start_from
from train.weights import find_weights, read


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
    assert found.read().keys() == read(file).keys()


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


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_is_read_plain_or_wrapped(tmp_path: Path, wrapped: bool) -> None:
    state = {"fc.weight": torch.ones(2, 3)}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "net.pth")
    assert torch.equal(read(tmp_path / "net.pth")["fc.weight"], state["fc.weight"])


class Evil:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"fc.weight": Evil(mark)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth cannot be read"):
        read(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(WeightsError, match=r"plain\.pth cannot be read"):
        read(tmp_path / "plain.pth")
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_state_dict_has_its_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"bad\.pth cannot be read .*save it with torch\.save\(") as caught:
        read(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)


def test_a_tensor_alone_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read(tmp_path / "bad.pth")


def test_the_body_is_loaded_and_the_head_left_alone(file: Path) -> None:
    network = build("squeezenet1_1", 2)
    head = network.state_dict()["classifier.1.weight"].clone()
    start_from(network, read(file), "the file")
    assert torch.equal(network.state_dict()["features.0.weight"], read(file)["features.0.weight"])
    assert torch.equal(network.state_dict()["classifier.1.weight"], head)


def test_weights_of_another_architecture_have_their_sentence(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit ResNet: \d+ missing \(bn1\.bias.*; \d+ unknown") as caught:
        start_from(build("resnet18", 2), read(file), "the file")
    assert str(caught.value).endswith("set model.name to the architecture that the file was made for")
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_have_their_sentence() -> None:
    with pytest.raises(WeightsError, match=r"VisionTransformer: 1 of another shape \(encoder\.pos_embedding\)"):
        start_from(
            models.VisionTransformer(64, 16, 1, 1, 8, 8, num_classes=2),
            models.VisionTransformer(32, 16, 1, 1, 8, 8, num_classes=9).state_dict(),
            "it",
        )
