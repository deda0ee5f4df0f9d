"""The model for other servers: the archive's answers, and the classifier around it, of both kinds."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from archive.graph import Graph, Preprocessing
from beeline.errors import ArchiveError
from beeline.spec import Artifact, Geometry, ModelSpec
from bench.compare import torchscript
from bench.peers import classifier
from tests.conftest import BLUE, GREEN, RED

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")


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


def spec(file: str, form: str, fit: str = "crop") -> ModelSpec:
    geometry = Geometry(resize=20, crop=16, interpolation="bicubic", fit=fit, width=18)
    return ModelSpec("m", "1.0", ("a", "b"), geometry, Artifact(file, form, "0" * 64), geometry_version=1)


@pytest.mark.parametrize("scripted", [False, True], ids=["exported", "scripted"])
def test_the_network_behind_the_archives_own_normalisation_is_taken_out(tmp_path: Path, scripted: bool) -> None:
    network = Network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.jit.trace(network, torch.zeros(2, 3, 16, 18)) if scripted else network
    graph = Graph(given, Preprocessing(Geometry(20, 16, width=18), MEAN, STD))
    file = graph.save(tmp_path)
    torchscript.write(tmp_path, spec(file.name, graph.format), tmp_path)
    about = json.loads((tmp_path / "documented.json").read_text())
    assert about["labels"] == ["a", "b"]
    assert (about["resize"], about["crop"], about["interpolation"]) == (20, [16, 18], "bicubic")
    assert about["mean"] == pytest.approx(MEAN, rel=1e-5)
    assert about["std"] == pytest.approx(STD, rel=1e-5)
    planes, model = torch.randn(5, 3, 16, 18), classifier.Documented(tmp_path).model
    with torch.no_grad():
        assert torch.allclose(model(planes), network(planes), atol=1e-5)
    # It holds the network alone: it turns nothing back into pixels.
    assert "uint8" not in str(model.graph)


@pytest.mark.parametrize("engine", ["documented", "beeline"])
def test_each_classifier_names_the_colours_of_a_model_that_normalises_in_its_own_way(
    engine: str, colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(colour_model, model)
    torchscript.write(model, ModelSpec.load(model), model)
    monkeypatch.setenv("PEER", json.dumps({"engine": engine, "model": str(model), "scratch": str(tmp_path)}))
    made = classifier.load()
    answers = made.predict([made.decode(data) for data in (RED, GREEN, BLUE)])
    assert [next(iter(answer)) for answer in answers] == ["red", "green", "blue"]
    assert all(sum(answer.values()) == pytest.approx(1, abs=1e-4) for answer in answers)
    assert (tmp_path / "threads").read_text() == str(torch.get_num_threads())


def test_what_cannot_be_converted_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no model")
    with pytest.raises(ArchiveError, match="name an fp32 archive of the same model with --reference"):
        torchscript.write(tmp_path, spec("model.pt2", "exported_program"), tmp_path)
    with pytest.raises(ArchiveError, match="its fit is 'pad', which other servers cannot do"):
        torchscript.write(tmp_path, spec("model.pt2", "exported_program", "pad"), tmp_path)
