"""The model for other servers: the same answers, whichever way the archive normalises."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from beeline.errors import ArchiveError
from beeline.spec import Artifact, Geometry, ModelSpec
from bench.compare import torchscript

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Network(torch.nn.Module):
    """A small network of normalised planes, with filters, so that their layout matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = torch.nn.Conv2d(3, 4, 3)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """Filters, mean, linear."""
        features: torch.Tensor = self.last(self.filters(planes).relu().mean(dim=(2, 3)))
        return features


def spec(file: str, form: str, crop: int = 16) -> ModelSpec:
    geometry = Geometry(resize=18, crop=crop, interpolation="bicubic")
    return ModelSpec("m", "1.0", ("a", "b"), geometry, Artifact(file, form, "0" * 64), geometry_version=1)


@pytest.mark.parametrize("scripted", [False, True], ids=["exported", "scripted"])
def test_the_network_behind_the_archives_own_normalisation_is_taken_out(tmp_path: Path, scripted: bool) -> None:
    from archive.graph import Graph

    network = Network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.jit.trace(network, torch.zeros(2, 3, 16, 16)) if scripted else network
    graph = Graph(given, MEAN, STD, 16)
    file = graph.save(tmp_path)
    torchscript.write(tmp_path, spec(file.name, graph.format), tmp_path)
    told = json.loads((tmp_path / torchscript.TOLD).read_text())
    assert told["labels"] == ["a", "b"]
    assert (told["resize"], told["crop"], told["interpolation"]) == (18, 16, "bicubic")
    assert told["mean"] == pytest.approx(MEAN, rel=1e-5)
    assert told["std"] == pytest.approx(STD, rel=1e-5)
    planes = torch.randn(5, 3, 16, 16)
    model, _ = torchscript.load(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(planes), network(planes), atol=1e-5)
    # It holds the network alone: nothing of it turns anything back.
    assert "uint8" not in str(model.graph)


def test_a_model_that_normalises_in_its_own_way_gets_its_pixels_back(colour_model: Path, tmp_path: Path) -> None:
    torchscript.write(colour_model, ModelSpec.load(colour_model), tmp_path)
    told = json.loads((tmp_path / torchscript.TOLD).read_text())
    red = (torch.tensor([220, 30, 40]) / 255 - torch.tensor(told["mean"])) / torch.tensor(told["std"])
    model, _ = torchscript.load(tmp_path)
    with torch.no_grad():
        logits = model(red.reshape(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert torch.allclose(logits, torch.tensor([[220.0, 30.0, 40.0]]) / 16 - 4)


def test_what_cannot_be_converted_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no model")
    with pytest.raises(ArchiveError, match="name an fp32 archive of the same model with --reference"):
        torchscript.write(tmp_path, spec("model.pt2", "exported_program"), tmp_path)
