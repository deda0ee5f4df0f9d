"""The saved graph: normalisation inside, any batch size, the network left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from archive.graph import Graph
from beeline.errors import ArchiveError
from tests.archive.conftest import TinyNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(count: int) -> torch.Tensor:
    pictures = np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(pictures)


def test_the_graph_normalises_as_torchvision_does() -> None:
    network = TinyNet().eval()
    planes = functional.to_dtype(noise(4).permute(0, 3, 1, 2), torch.float32, scale=True)
    wanted = network(functional.normalize(planes, list(MEAN), list(STD)))
    torch.testing.assert_close(Graph(network, MEAN, STD, 32)(noise(4)), wanted, rtol=1e-5, atol=1e-5)


def test_the_network_is_left_as_it_was() -> None:
    network = TinyNet().train()
    Graph(network, MEAN, STD, 32)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("scripted", [False, True])
def test_the_saved_file_answers_any_batch_size_as_the_graph_does(tmp_path: Path, scripted: bool, jit: None) -> None:
    network = torch.jit.script(TinyNet().eval()) if scripted else TinyNet()
    graph = Graph(network, MEAN, STD, 32)
    path = graph.save(tmp_path)
    assert path.name == ("model.pt" if scripted else "model.pt2")
    loaded = torch.jit.load(str(path)) if scripted else torch.export.load(path).module()
    for count in (1, 2, 7):
        torch.testing.assert_close(loaded(noise(count)), graph(noise(count)))


def test_torchscript_is_saved_alike_however_often_the_process_did_it(tmp_path: Path, jit: None) -> None:
    network = torch.jit.script(TinyNet().eval())
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    saved = [Graph(network, MEAN, STD, 32).save(folder).read_bytes() for folder in folders]
    assert saved[0] == saved[1] == saved[2]
    assert b"mangle" not in saved[0]
    assert torch.jit.load(str(folders[2] / "model.pt"))(noise(1)).shape == (1, 3)


def test_filters_are_stored_channels_last(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    path = Graph(network, MEAN, STD, 32).save(tmp_path)
    filters = next(p for p in torch.export.load(path).module().parameters() if p.ndim == 4)
    assert filters.is_contiguous(memory_format=torch.channels_last)


def test_a_network_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    class Fixed(TinyNet):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return super().forward(pictures.reshape(2, 3, 32, 32))

    with pytest.raises(ArchiveError, match="for every batch size"):
        Graph(Fixed(), MEAN, STD, 32).save(tmp_path)


@pytest.mark.parametrize("kind", ["module", "program", "script"])
def test_gradients_reach_the_pixels_of_a_network_that_takes_uint8_itself(kind: str, jit: None) -> None:
    inner = Graph(TinyNet(), MEAN, STD, 32)
    network: torch.nn.Module | torch.export.ExportedProgram = inner.module
    if kind == "program":
        batch = torch.export.Dim("batch", min=1)
        network = torch.export.export(inner.module, (noise(2),), dynamic_shapes=({0: batch},))
    if kind == "script":
        network = torch.jit.script(inner.module)
    graph = Graph(network, MEAN, STD, 32, takes_uint8=True)
    pixels = noise(2).float().requires_grad_()
    graph.differentiable(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    torch.testing.assert_close(graph(noise(2)), inner(noise(2)))
