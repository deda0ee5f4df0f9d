"""PyTorch's engine: precisions, a refusal for each thing that it cannot do, and batches by recorded sizes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from beeline.engines.torch import BUCKETS, CudaGraphs, TorchEngine, by_buckets
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import Artifact, ModelSpec


class Net(torch.nn.Module):
    """A filter and a normalisation: uint8 `[N, H, W, 3]` to three scores `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels.permute(0, 3, 1, 2).to(torch.float32) / 255).mean(dim=(2, 3))


@pytest.fixture(params=["exported_program", "torchscript"])
def folder(request: pytest.FixtureRequest, colour_model: Path, tmp_path: Path) -> Path:
    """The same network in both formats."""
    net = Net().eval()
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    if request.param == "torchscript":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
            torch.jit.script(net).save(str(tmp_path / "model.pt"))
    else:
        batch = torch.export.Dim("batch", min=1)
        torch.export.save(torch.export.export(net, (example,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt")
    spec = ModelSpec.load(colour_model)
    dataclasses.replace(spec, model=Artifact("model.pt", request.param, spec.model.sha256)).save(
        tmp_path / "model_spec.json"
    )
    return tmp_path


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")
def test_bf16_computes_either_format_in_bf16(folder: Path) -> None:
    spec = ModelSpec.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    wanted = TorchEngine(folder, spec, device="cpu").forward(pixels)
    engine = TorchEngine(folder, dataclasses.replace(spec, precision="bf16"), device="cpu")
    found = engine.forward(pixels)
    assert found.dtype == np.float32
    assert not np.array_equal(found, wanted)
    assert np.allclose(found, wanted, atol=0.02)
    assert np.array_equal(engine.on_device(torch.from_numpy(pixels)).float().numpy(), found)
    kinds = {tuple(parameter.shape): parameter.dtype for parameter in engine._model.parameters()}
    assert kinds == {(3, 3, 3, 3): torch.bfloat16, (3,): torch.float32}
    assert engine.choice["precision"].value == "bf16"


@pytest.mark.parametrize(
    ("precision", "error", "sentence"),
    [
        ("fp16", ConfigError, r"fp16, which is for CUDA devices, .*on a CUDA device, or .*--precision bf16"),
        ("int8", ArchiveError, r"torch int8; PyTorch computes in fp32, bf16, fp16 here"),
    ],
)
def test_a_precision_that_a_cpu_does_not_have_is_refused_with_the_fix(
    colour_model: Path, precision: str, error: type[Exception], sentence: str
) -> None:
    spec = dataclasses.replace(ModelSpec.load(colour_model), precision=precision)
    with pytest.raises(error, match=sentence):
        TorchEngine(colour_model, spec, device="cpu")


def test_cuda_graphs_are_on_or_off_and_a_cpu_has_none(colour_model: Path) -> None:
    spec = ModelSpec.load(colour_model)
    TorchEngine(colour_model, spec, device="cpu", environ={"BEELINE_CUDA_GRAPHS": "on"})
    with pytest.raises(ConfigError, match=r"BEELINE_CUDA_GRAPHS is 'yes'; allowed: on, off"):
        TorchEngine(colour_model, spec, device="cpu", environ={"BEELINE_CUDA_GRAPHS": "yes"})


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1]), (2, [2]), (5, [8]), (64, [64]), (65, [64, 1]), (150, [64, 64, 32])]
)
def test_a_batch_runs_in_recorded_sizes_and_no_replay_overwrites_its_scores(count: int, expected: list[int]) -> None:
    memory = {size: torch.full((size, 2), -1.0) for size in BUCKETS}
    buckets: list[int] = []

    def replay(bucket: int, pixels: torch.Tensor) -> torch.Tensor:
        buckets.append(bucket)
        memory[bucket][: len(pixels)] = pixels.float()
        return memory[bucket]

    pixels = torch.arange(2 * count, dtype=torch.int32).reshape(count, 2)
    first = by_buckets(pixels, replay)
    assert buckets == expected
    by_buckets(pixels + 1000, replay)
    assert torch.equal(first, pixels.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_recordings_answer_as_the_model_itself() -> None:
    device = torch.device("cuda:0")
    model = Net().to(device).eval()
    with torch.inference_mode():
        graphs = CudaGraphs(model, device, (32, 32))
        for count in (1, 2, 5, 64, 70):
            pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, device=device)
            found = graphs(pixels)
            kept = found.clone()
            graphs(255 - pixels)
            assert torch.equal(found, kept)
            assert torch.allclose(found, model(pixels), atol=1e-4)


def test_a_device_that_the_driver_shows_and_pytorch_cannot_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = object.__new__(TorchEngine)
    engine.asked = "auto"
    assert engine._device(None).value == "cpu"
