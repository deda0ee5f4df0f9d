"""The classifier inside the peers: both of its kinds see the same pictures the same way."""

import shutil
from pathlib import Path

import pytest
import torch

from beeline.spec import ModelSpec
from bench.compare import torchscript
from bench.peers import classifier
from tests.conftest import BLUE, GREEN, RED

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")


@pytest.fixture
def model(colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the comparison gives it to a peer, and the environment around it."""
    folder = tmp_path / "model"
    shutil.copytree(colour_model, folder)
    torchscript.write(folder, ModelSpec.load(folder), folder)
    monkeypatch.setenv("PEER_MODEL", str(folder))
    monkeypatch.setenv("PEER_THREADS_FILE", str(tmp_path / "threads"))
    return folder


@pytest.mark.parametrize("engine", ["documented", "beeline"])
def test_each_classifier_names_the_colours(
    engine: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PEER_ENGINE", engine)
    made = classifier.load()
    pictures = [made.decode(data) for data in (RED, GREEN, BLUE)]
    answers = made.predict(pictures)
    assert [max(answer, key=lambda label: answer[label]) for answer in answers] == ["red", "green", "blue"]
    assert all(sum(answer.values()) == pytest.approx(1, abs=1e-4) for answer in answers)
    assert (tmp_path / "threads").read_text() == str(torch.get_num_threads())


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PORT", "1234"), ("BATCH_SIZE", "8"), ("WORKERS", "2"), ("DELAY_MS", "50")):
        monkeypatch.setenv(f"PEER_{name}", value)
    assert classifier.settings() == classifier.Settings(1234, 8, 2, 0.05)
