"""What networks return, and what they take, is read as PyTorch means it, or refused with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from archive import outputs
from archive.export import export_folder
from archive.graph import Graph, Network, Preprocessing, quiet
from beeline import golden
from beeline.classification import probabilities
from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError
from beeline.spec import Geometry, ModelSpec
from tests.archive.conftest import Changed, TinyNet, tiny_request

SIDE = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def settled(network: Network, labels: int = 3, output: str | None = None, key: str | None = None) -> tuple[Graph, Any]:
    graph = Graph(network, Preprocessing(Geometry(SIDE, SIDE), MEAN, STD))
    return graph, outputs.settle(graph, network, labels, output, key)


def planes(noise: Any) -> Tensor:
    """Return pixels as PyTorch's own tools normalise them."""
    scaled = torch.from_numpy(noise).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def scripted(network: nn.Module) -> torch.jit.ScriptModule:
    with quiet():
        return torch.jit.trace(network.eval(), torch.zeros(2, 3, SIDE, SIDE), strict=False)


def program(network: nn.Module, training: bool = False, **bounds: int) -> ExportedProgram:
    shapes = ({0: Dim("batch", **bounds)},)
    return export(network.train(training), (torch.zeros(2, 3, SIDE, SIDE),), dynamic_shapes=shapes, strict=False)


WAYS: dict[str, Callable[[nn.Module], Network]] = {"module": lambda each: each, "traced": scripted, "program": program}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "key", "note"),
    [
        (lambda rows: {"logits": rows}, None, "its output 'logits' is taken"),
        (lambda rows: (rows,), None, "its output 0 is taken"),
        (lambda rows: [rows, rows[:, :2]], None, "its output 0 is taken"),
        (lambda rows: {"main": rows, "aux": rows / 2}, "main", "its output 'main' is taken"),
        (lambda rows: rows[:, :, None, None], None, None),
        (lambda rows: (rows[:, :, None, None], rows), "0", "its output 0 is taken"),
    ],
)
def test_an_output_of_another_form_is_taken(
    way: str, change: Callable[[Tensor], Any], key: str | None, note: str | None, tmp_path: Path, jit: None
) -> None:
    graph, found = settled(WAYS[way](Changed(change)), key=key)
    right = TinyNet()(planes(found.noise)).detach()
    assert torch.allclose(torch.from_numpy(found.rows), right, atol=1e-4)
    assert found.notes == ([note] if note else [])
    assert found.output == "logits"
    # What is saved returns the rows too.
    assert graph.save(tmp_path).stat().st_size > 0


class Mixed(TinyNet):
    """Returns what only scripted networks can: another type beside the rows, as torchvision's GoogLeNet does."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # type: ignore[override]
        return self.head(self.pool(pictures).flatten(1)), None, [pictures]


def test_a_scripted_network_may_return_other_types_beside_its_rows(tmp_path: Path, jit: None) -> None:
    graph, found = settled(torch.jit.script(Mixed().eval()))
    right = TinyNet()(planes(found.noise)).detach()
    assert torch.allclose(torch.from_numpy(found.rows), right, atol=1e-4)
    saved = torch.jit.load(str(graph.save(tmp_path)))
    assert torch.allclose(saved(torch.from_numpy(found.noise)), right, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "labels", "output", "kind", "right"),
    [
        (TinyNet(), 3, None, "logits", lambda rows: rows),
        (Changed(lambda rows: rows.log_softmax(1)), 3, None, "logits", lambda rows: rows.log_softmax(1)),
        (Changed(lambda rows: rows.softmax(1)), 3, None, "probabilities", lambda rows: rows.softmax(1)),
        (Changed(lambda rows: rows.sigmoid()), 3, "scores", "scores", lambda rows: rows.sigmoid()),
        (TinyNet(), 3, "scores", "scores", lambda rows: rows.sigmoid()),
        (
            Changed(lambda rows: 9 * rows[:, :1]),
            2,
            None,
            "logits",
            lambda rows: functional.pad(9 * rows[:, :1], (1, 0)),
        ),
        (
            Changed(lambda rows: rows[:, :1].sigmoid()),
            2,
            "probabilities",
            "probabilities",
            lambda rows: torch.cat([1 - rows[:, :1].sigmoid(), rows[:, :1].sigmoid()], 1),
        ),
    ],
)
def test_the_kind_of_output_is_told_by_its_numbers(
    network: Network, labels: int, output: str | None, kind: str, right: Callable[[Tensor], Tensor]
) -> None:
    _, found = settled(network, labels, output)
    rows = TinyNet()(planes(found.noise)).detach()
    assert found.output == kind
    assert torch.allclose(torch.from_numpy(found.rows), right(rows), atol=1e-4)


@pytest.mark.parametrize("output", [None, "logits"])
@pytest.mark.parametrize("way", WAYS)
def test_log_softmax_is_named_and_gives_the_same_probabilities(way: str, output: str | None, jit: None) -> None:
    _, found = settled(WAYS[way](Changed(lambda rows: rows.log_softmax(1))), output=output)
    assert found.notes == ["it ends in log-softmax, and is served as logits, which gives the same probabilities"]
    right = TinyNet()(planes(found.noise)).softmax(1).detach().numpy()
    assert np.allclose(probabilities(found.rows, found.output), right, atol=1e-5)
    _, negative = settled(Changed(lambda rows: rows - 9))
    assert (negative.output, negative.notes) == ("logits", [])


@pytest.mark.parametrize(
    ("network", "labels", "output", "reason"),
    [
        (
            Changed(lambda rows: rows.sigmoid()),
            3,
            None,
            "0 to 1 that are no probabilities .* --output scores .* logits",
        ),
        (Changed(lambda rows: rows.sigmoid()), 3, "probabilities", "say --output scores"),
        (Changed(lambda rows: rows.softmax(1)), 3, "scores", "the network returns probabilities"),
        (Changed(lambda rows: rows.log_softmax(1)), 3, "scores", "ends in log-softmax; say --output logits"),
        (Changed(lambda rows: rows.log_softmax(1)), 3, "probabilities", "ends in log-softmax; say --output logits"),
        (Changed(lambda rows: rows[:, :1].sigmoid()), 2, None, "--output probabilities if it ends in a sigmoid"),
        (Changed(lambda rows: {"a": rows, "b": -rows}), 3, None, r"'a' \[3, 3\], 'b' \[3, 3\].*--output-key a"),
        (Changed(lambda rows: {"a": rows[:, :2]}), 3, None, r"'a' \[3, 2\].* and 3 labels; return one tensor \[N, 3\]"),
        (Changed(lambda rows: rows.argmax(1)), 3, None, r"returns int64 \[3\] for 3 pictures"),
        (nn.Sequential(nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, None, "takes 4 channels"),
        (
            Changed(lambda rows: rows.squeeze(0)),
            3,
            None,
            r"\[3\] for one picture and \[3, 3\] for three; .*flatten\(1\)",
        ),
        (Changed(lambda rows: rows.reshape(2, 3)), 3, None, "its batch size is fixed"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3)), 3, None, "takes 64 x 64; add --resize 64 --crop 64"),
    ],
)
def test_what_can_be_read_in_two_ways_or_not_at_all_is_refused(
    network: Network, labels: int, output: str | None, reason: str
) -> None:
    with pytest.raises(ArchiveError, match=reason):
        settled(network, labels, output)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            lambda: export(TinyNet(), (torch.zeros(1, 3, SIDE, SIDE),)),
            "batches of exactly 1; export it for every size: ",
        ),
        (lambda: program(TinyNet(), min=2, max=16), "batches of (1|2) to 16; export it without bounds: "),
        (lambda: program(nn.Sequential(nn.BatchNorm2d(3), TinyNet()), training=True), "as in training mode; call eval"),
    ],
)
def test_a_program_with_a_bound_batch_says_how_to_export_it_again(made: Callable[[], Network], reason: str) -> None:
    with pytest.raises(ArchiveError, match=reason):
        settled(made())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_converted_and_said(way: str, kind: torch.dtype, jit: None) -> None:
    if way == "program":
        example, shapes = (torch.zeros(2, 3, SIDE, SIDE, dtype=kind),), ({0: Dim("batch")},)
        network: Network = export(TinyNet().to(kind), example, dynamic_shapes=shapes, strict=False)
    else:
        network = torch.jit.script(TinyNet().to(kind)) if way == "traced" else TinyNet().to(kind)
    _, found = settled(network)
    right = TinyNet().to(kind).float()(planes(found.noise)).detach()
    assert torch.allclose(torch.from_numpy(found.rows), right, atol=1e-4)
    assert found.notes == [f"its {str(kind).removeprefix('torch.')} weights are made float32"]


def test_one_channel_gets_grey_and_bgr_gets_blue_first() -> None:
    torch.manual_seed(0)
    grey = nn.Sequential(nn.Conv2d(1, 3, 5, stride=5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph, found = settled(grey)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose(torch.from_numpy(found.rows), grey((planes(found.noise) * luma).sum(1, True)), atol=1e-5)
    assert graph.notes == ["its one channel gets grey pictures"]
    blue_first = Graph(TinyNet(), Preprocessing(Geometry(SIDE, SIDE), MEAN, STD, "bgr"))
    assert torch.allclose(blue_first(torch.from_numpy(found.noise)), TinyNet()(planes(found.noise).flip(1)), atol=1e-5)


@pytest.mark.parametrize("ends", ["logits", "sigmoid"])
def test_scores_are_exported_proved_and_answered_as_they_are(tmp_path: Path, ends: str) -> None:
    network = TinyNet() if ends == "logits" else Changed(lambda rows: rows.sigmoid())
    said: list[str] = []
    spec = export_folder(network, tiny_request(output="scores"), tmp_path / "export", say=said.append)
    assert spec.output == "scores"
    engine = TorchEngine(tmp_path / "export", spec, device="cpu")
    assert golden.replay(tmp_path / "export", spec, engine.forward) >= 2
    pictures = json.loads((tmp_path / "export" / "golden" / "expected.json").read_text())["pictures"]
    # With two labels at the same score, rounding would decide which one is first.
    assert all(first - second > 0.25 for (_, first), (_, second), *_ in (picture["top"] for picture in pictures))
    rows = probabilities(engine.forward(settled(TinyNet())[1].noise), spec.output)
    assert rows.min() >= 0
    assert rows.max() <= 1
    assert abs(rows.sum(1) - 1).max() > 0.05
    assert ("  a sigmoid makes its outputs scores" in said) is (ends == "logits")


@pytest.mark.parametrize("fit", ["crop", "squash", "pad", "centre"])
def test_a_rectangle_of_each_fit_is_exported_and_proved(tmp_path: Path, fit: str) -> None:
    geometry = Geometry(48, 32, fit=fit, width=40)
    spec = export_folder(TinyNet(), tiny_request(geometry=geometry), tmp_path / "export")
    assert ModelSpec.load(tmp_path / "export").geometry == geometry
    engine = TorchEngine(tmp_path / "export", spec, device="cpu")
    assert engine.forward(np.zeros((3, 32, 40, 3), np.uint8)).shape == (3, 3)
    assert golden.replay(tmp_path / "export", spec, engine.forward) >= 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, r"divide by 255, as --mean 0\.485,0\.456,0\.406"),
        ({"std": (58.395, 57.12, 57.375)}, r"divide by 255, as --std 0\.229,0\.224,0\.225"),
        ({"channels": "bgrr"}, "did you mean 'bgr'"),
    ],
)
def test_numbers_of_0_to_255_and_other_channels_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArchiveError, match=reason):
        tiny_request(**changes)
