"""PyTorch's engine: precisions, and a refusal for each thing that it cannot do."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError, ConfigError
from beeline.spec import Artifact, ModelSpec


class Net(torch.nn.Module):
    """A filter and a normalisation between uint8 pictures and three scores."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = torch.nn.Conv2d(3, 3, 3)
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 `[N, H, W, 3]` into `[N, 3]`."""
        planes = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255
        return self.norm(self.filter(planes)).mean(dim=(2, 3))


@pytest.fixture(params=["exported_program", "torchscript"])
def folder(request: pytest.FixtureRequest, colour_model: Path, tmp_path: Path) -> Path:
    """The same network in both formats."""
    torch.manual_seed(0)
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


def test_fp16_on_a_cpu_is_refused_with_the_fix(colour_model: Path) -> None:
    spec = dataclasses.replace(ModelSpec.load(colour_model), precision="fp16")
    with pytest.raises(
        ConfigError, match=r"fp16, which is for CUDA devices, .*on a CUDA device, or .*--precision bf16"
    ):
        TorchEngine(colour_model, spec, device="cpu")


def test_a_precision_that_pytorch_has_not_is_refused(colour_model: Path) -> None:
    spec = dataclasses.replace(ModelSpec.load(colour_model), precision="int8")
    with pytest.raises(ArchiveError, match=r"torch int8; PyTorch computes in fp32, bf16, fp16 here"):
        TorchEngine(colour_model, spec, device="cpu")


def test_cuda_graphs_are_on_or_off_and_a_cpu_has_none(colour_model: Path) -> None:
    spec = ModelSpec.load(colour_model)
    TorchEngine(colour_model, spec, device="cpu", environ={"BEELINE_CUDA_GRAPHS": "on"})
    with pytest.raises(ConfigError, match=r"BEELINE_CUDA_GRAPHS is 'yes'; allowed: on, off"):
        TorchEngine(colour_model, spec, device="cpu", environ={"BEELINE_CUDA_GRAPHS": "yes"})
