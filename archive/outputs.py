"""What a network takes and returns, made into one graph of uint8 pictures to float32 `[N, labels]`.

A network's outputs are judged on noise. What can be read in one way only is taken, and a note says so; everything else
is an `ArchiveError` that says what was found and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from archive.graph import Graph, Network
from beeline.errors import ArchiveError, short

# A worker's largest batch is far below.
_LARGEST_BATCH = 4096
# Sides that a network may have been traced or exported with.
_SIDES = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 336, 378, 384, 448, 512, 518)
# By format, what makes it again for height and width `{0}`.
AGAIN = {
    "exported_program": "torch.export.export(model.cpu().eval(), (torch.zeros(2, 3, {0}),), "
    "dynamic_shapes=({{0: torch.export.Dim('batch')}},))",
    "torchscript": "torch.jit.trace(model.cpu().eval(), torch.zeros(2, 3, {0}))",
    "onnx": "torch.onnx.export(model.eval(), (torch.zeros(2, 3, {0}),), 'model.onnx', dynamo=True, "
    "dynamic_shapes=({{0: torch.export.Dim('batch')}},))",
}
_FORMS = "a float tensor [N, classes], or a dict, tuple or list that holds one"


class Element(nn.Module):
    """Takes one entry of what a network returns."""

    def __init__(self, key: str | int) -> None:
        super().__init__()
        self.key = key

    def forward(self, found: Any) -> Tensor:
        """Return the entry."""
        entry: Tensor = found[self.key]
        return entry


class Entry(nn.Module):
    """Takes one entry of what a network of TorchScript returns, which may be Optional, whatever the others are."""

    __constants__ = ("key",)

    def __init__(self, network: nn.Module, key: str | int) -> None:
        super().__init__()
        self.network, self.key = network, key

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the entry."""
        found = self.network(pictures)[self.key]
        assert found is not None
        return found  # type: ignore[no-any-return]


class Rows(nn.Module):
    """Makes `[N, classes, 1, 1]` or another float type float32 `[N, classes]`."""

    def forward(self, found: Tensor) -> Tensor:
        """Return the rows."""
        return found.flatten(1).float()


class Both(nn.Module):
    """Makes one value for the second of two labels a value for each: logits 0 and x, or probabilities 1 - p and p."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first

    def forward(self, found: Tensor) -> Tensor:
        """Return `[N, 2]`."""
        return torch.cat([self.first * (1 - found), found], 1)


@dataclass
class Settled:
    """A graph's pixels of noise, its float32 outputs `[N, labels]`, what they are, and what was taken for granted."""

    noise: NDArray[np.uint8]
    rows: NDArray[np.float32]
    output: str
    notes: list[str] = field(default_factory=list)


def settle(graph: Graph, network: Network, labels: int, output: str | None, key: str | None = None) -> Settled:
    """Make the graph return float32 `[N, labels]` of a known kind.

    `output` is one of `beeline.spec.OUTPUTS`, or None for what the outputs show: rows that sum to 1 are
    `probabilities`, rows with a value outside 0..1 `logits`. `key` names the entry of a dict, tuple or list.
    """
    _check_batch(network)
    noise = np.random.default_rng(0).integers(0, 256, (3, *graph.shape, 3), dtype=np.uint8)
    pixels = torch.from_numpy(noise)
    notes = list(graph.notes)
    found = _run(graph, pixels)
    if not isinstance(found, Tensor):
        chosen, entry = _entry(found, labels, key)
        if graph.format == "torchscript":
            graph.plain = Entry(graph.plain, chosen)
        graph.append(nn.Identity() if graph.format == "torchscript" else Element(chosen))
        found = entry
        notes.append(f"its output {chosen!r} is taken")
    elif key is not None:
        raise ArchiveError(f"--output-key is {key!r} and the network returns one tensor; leave it out")
    if not _fits(found, labels):
        got = f"{found.dtype} {list(found.shape)}".removeprefix("torch.")
        if found.ndim == 2 and found.is_floating_point():
            outputs = found.shape[1]
            raise ArchiveError(
                f"the model has {outputs} outputs and there are {labels} labels; name one for each output"
            )
        raise ArchiveError(f"the network returns {got} for 3 pictures; allowed: {_FORMS}")
    if found.ndim != 2 or found.dtype != torch.float32:
        graph.append(Rows())
    alone, rows = graph(pixels[:1]), graph(pixels)
    if not torch.isfinite(rows).all():
        raise ArchiveError("the network returns numbers that are not finite for noise; check its weights")
    if alone.shape != rows[:1].shape:
        why = f"the network returns {list(alone.shape)} for one picture and {list(rows.shape)} for three"
        raise ArchiveError(f"{why}; keep the dimension of the batch, with flatten(1) in place of squeeze()")
    if not torch.allclose(alone[0], rows[0], rtol=1e-3, atol=1e-3):
        apart = float((alone[0] - rows[0]).abs().max())
        raise ArchiveError(
            f"the answer for a picture depends on its neighbours in the batch ({apart:.3g} apart), as in training "
            "mode; call eval() on the network before you save it"
        )
    settled = _kind(graph, rows, labels, output, notes)
    return Settled(noise, graph(pixels).numpy(), settled, notes)


def _kind(graph: Graph, rows: Tensor, labels: int, output: str | None, notes: list[str]) -> str:
    """Return what the rows are, after a last step where the network lacks it."""
    inside = bool(rows.min() >= 0) and bool(rows.max() <= 1 + 1e-6)
    if rows.shape[1] < labels:
        return _pair(graph, inside, output, notes)
    sums = bool((rows.sum(1) - 1).abs().max() < 1e-3)
    why = "each row sums to 1" if sums else f"rows sum to {rows[0].sum():.3g}"
    if inside and sums:
        if output not in (None, "probabilities"):
            raise ArchiveError(
                f"--output is {output!r}, the network returns probabilities ({why}); say that, or nothing"
            )
        return "probabilities"
    if bool(rows.max() <= 1e-6) and bool((rows.exp().sum(1) - 1).abs().max() < 1e-3):
        if output not in (None, "logits"):
            raise ArchiveError(
                f"--output is {output!r}, the network ends in log-softmax; say --output logits, or nothing"
            )
        notes.append("it ends in log-softmax, and is served as logits, which gives the same probabilities")
        return "logits"
    if output == "probabilities":
        fix = "scores, if its labels are independent" if inside else "logits"
        raise ArchiveError(f"--output is 'probabilities', the network returns none ({why}); say --output {fix}")
    if inside and output is None:
        raise ArchiveError(
            f"the network returns numbers of 0 to 1 that are no probabilities ({why}); say --output scores if it ends "
            "in a sigmoid, since its labels are independent, or --output logits if it does not"
        )
    if output == "scores" and not inside:
        graph.append(nn.Sigmoid())
        notes.append("a sigmoid makes its outputs scores")
    return output or "logits"


def _pair(graph: Graph, inside: bool, output: str | None, notes: list[str]) -> str:
    """Settle a network with one output for two labels."""
    if inside and output is None:
        raise ArchiveError(
            "the network's one output for two labels is 0 to 1 for noise; say --output probabilities if it ends in a "
            "sigmoid, or --output logits if it does not"
        )
    if output == "scores" or (output == "probabilities" and not inside):
        raise ArchiveError(f"--output is {output!r}, the network returns one logit for two labels; say --output logits")
    output = output or "logits"
    graph.append(Both(1.0 if output == "probabilities" else 0.0))
    notes.append(f"its one output is taken as the second label's ({output})")
    return output


def _fits(found: Tensor, labels: int) -> bool:
    """Whether a tensor can be the outputs for three pictures."""
    width = found.shape[1] if found.ndim in (2, 4) and found.shape[2:].numel() == 1 else 0
    return found.is_floating_point() and found.shape[0] == 3 and (width == labels or (width, labels) == (1, 2))


def _entry(found: Any, labels: int, key: str | None) -> tuple[str | int, Tensor]:
    """Return the key and the tensor of the one entry that fits."""
    if not isinstance(found, (Mapping, tuple, list)):
        raise ArchiveError(f"the network returns a {type(found).__name__} for 3 pictures; allowed: {_FORMS}")
    entries: dict[str | int, Any] = dict(found) if isinstance(found, Mapping) else dict(enumerate(found))
    fitting = {name: value for name, value in entries.items() if isinstance(value, Tensor) and _fits(value, labels)}
    places = {str(place): name for place, name in enumerate(entries)} | {str(name): name for name in entries}
    chosen = fitting if key is None else {name: fitting[name] for name in fitting if name == places.get(key)}
    if len(chosen) == 1:
        return next(iter(chosen.items()))
    held = ", ".join(f"{name!r} {list(getattr(value, 'shape', [type(value)]))}" for name, value in entries.items())
    asked = "" if key is None else f", and --output-key is {key!r}"
    fix = f"name one with --output-key {next(iter(fitting))}" if fitting else f"return one tensor [N, {labels}]"
    raise ArchiveError(f"the network returns {held} for 3 pictures and {labels} labels{asked}; {fix}")


def _check_batch(network: Network) -> None:
    """Raise `ArchiveError` for an exported program that takes only some batch sizes."""
    if not isinstance(network, ExportedProgram):
        return
    names = network.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in network.graph.nodes if node.name in names and "val" in node.meta]
    shape = next((each.shape for each in inputs if isinstance(each, Tensor) and each.ndim == 4), None)
    if shape is None:
        return
    again = AGAIN["exported_program"].format(
        ", ".join(str(side) if isinstance(side, int) else "224" for side in shape[2:])
    )
    if isinstance(shape[0], int):
        raise ArchiveError(f"the program takes batches of exactly {shape[0]}; export it for every size: {again}")
    for symbol, bounds in network.range_constraints.items():
        if symbol in shape[0].node.expr.free_symbols and (bounds.lower > 2 or bounds.upper < _LARGEST_BATCH):
            raise ArchiveError(
                f"the program takes batches of {bounds.lower} to {bounds.upper}; export it without bounds: {again}"
            )


def _run(graph: Graph, pixels: Tensor) -> Any:
    """Run the network on one picture and on three; raise `ArchiveError` with what keeps it from running."""
    try:
        graph(pixels[:1])
        return graph(pixels)
    except Exception as error:
        # TorchScript tells where in the code before it tells what.
        why, (high, wide) = short(str(error).rpartition("RuntimeError: ")[2], 240, end=True), graph.shape
        again = AGAIN[graph.format].format(f"{high}, {wide}")
        takes = [graph.takes(graph.shape, pictures=count) for count in (1, 3, 2, 4, 8, 16, 32)]
        if re.search("same device|cuda", str(error), re.IGNORECASE):
            reason = f"the model was saved on a GPU and holds constants of it ({why}); save it on the CPU: {again}"
        elif re.search("^(?!.*(unsigned char|Byte)).*(scalar type|Input type)", why):
            reason = f"the network computes in another type than float32 ({why}); call float() on it first: {again}"
        elif not takes[0] and (fitting := [side for side in _SIDES if graph.takes((side, side))]):
            reason = (
                f"the network does not take pictures of {wide} x {high}, and takes {fitting[0]} x {fitting[0]}; add "
                f"--resize {fitting[0]} --crop {fitting[0]}, or what it was trained with"
            )
        elif any(takes) and not all(takes[:2]):
            reason = f"the network does not take both one picture and three ({why}); its batch size is fixed: {again}"
        else:
            reason = (
                f"the network does not run on 1 and 3 pictures of {wide} x {high} ({why}); check --crop, that the "
                "batch size is not fixed, and --uint8-input if the network takes uint8 NHWC itself"
            )
        raise ArchiveError(reason) from error
