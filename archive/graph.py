"""The graph that is saved: it takes uint8 pictures and normalises them; saving it twice gives the same bytes."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from beeline.errors import ArchiveError

PROGRAM_FILE = "model.pt2"
TORCHSCRIPT_FILE = "model.pt"
_MANGLED = re.compile(rb"(__torch__[./]archive[./]graph)[./]___torch_mangle_[0-9]+")
Network = nn.Module | ExportedProgram
# Floats of 0..255, `[N, crop, crop, 3]`, to `[N, classes]`, with gradients.
Differentiable = Callable[[Tensor], Tensor]


class Uint8Input(nn.Module):
    """Wraps a network of float32 normalised NCHW into one that takes uint8 `[N, crop, crop, 3]` RGB."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], crop: int) -> None:
        super().__init__()
        deviation = torch.tensor(std, dtype=torch.float64)
        shift = -torch.tensor(mean, dtype=torch.float64) / deviation
        self.network = network
        self.crop = crop
        # One vector for a row of pixels takes 0.04 ms a picture of 224 x 224 on one core; three values at a time take
        # 0.2 ms.
        self.register_buffer("scale", (1 / (255 * deviation)).repeat(crop).float())
        self.register_buffer("shift", shift.repeat(crop).float())

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise `pixels` (uint8, or floats of 0..255 for gradients) and run the network."""
        rows = pixels.flatten(2).to(torch.float32)
        # TorchScript knows that buffers are tensors, and cannot read an annotation of them here.
        rows = torch.addcmul(self.shift, rows, self.scale)  # type: ignore[arg-type]
        # As NCHW this is channels-last, the layout in which convolutions are fastest.
        planes = rows.view(-1, self.crop, self.crop, 3).permute(0, 3, 1, 2)
        scores: Tensor = self.network(planes)
        return scores


class Graph:
    """A network that is ready to be saved, with the function whose gradients move the golden pictures."""

    def __init__(
        self, network: Network, mean: Sequence[float], std: Sequence[float], crop: int, takes_uint8: bool = False
    ) -> None:
        """Wrap `network`, which is not changed.

        Args:
            network: a module, a scripted or traced module, or an exported program.
            mean: per RGB channel, of values scaled to 0..1.
            std: likewise.
            crop: the side of the input in pixels.
            takes_uint8: the network takes uint8 NHWC itself, so it is not wrapped.
        """
        self.crop = crop
        self.scripted = isinstance(network, torch.jit.ScriptModule)
        self.file = TORCHSCRIPT_FILE if self.scripted else PROGRAM_FILE
        self.format = "torchscript" if self.scripted else "exported_program"
        inner = network.module() if isinstance(network, ExportedProgram) else _frozen_copy(network)
        self.module = inner if takes_uint8 else Uint8Input(inner, mean, std, crop)
        self._float_input: Differentiable = self.module
        if takes_uint8 and isinstance(network, ExportedProgram):
            self._float_input = _WithoutChecks(network.module(check_guards=False)).run

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run on uint8 `[N, crop, crop, 3]`, without gradients."""
        with torch.no_grad():
            scores: Tensor = self.module(pixels)
        return scores

    def differentiable(self, pixels: Tensor) -> Tensor:
        """Run on floats of 0..255, `[N, crop, crop, 3]`, with gradients to them."""
        scores: Tensor = self._float_input(pixels)
        return scores

    def save(self, folder: Path) -> Path:
        """Write the model file into `folder` and return its path.

        Raises:
            ArchiveError: when the network cannot be exported for any batch size.
        """
        path = folder / self.file
        with _quiet():
            if self.scripted:
                _save_torchscript(self.module, path)
            else:
                torch.export.save(self._program(), path)
        return path

    def _program(self) -> ExportedProgram:
        # Two pictures, since PyTorch takes a dimension of 1 for a constant.
        example = torch.zeros(2, self.crop, self.crop, 3, dtype=torch.uint8)
        try:
            program = torch.export.export(
                self.module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
            )
        except Exception as error:
            raise ArchiveError(
                f"the network cannot be exported for every batch size ({_first_line(error)}); make its batch "
                "dimension dynamic, or bring it as TorchScript"
            ) from error
        _forget_origin(program)
        return program


class _WithoutChecks(torch.fx.Interpreter):
    """Runs a program's graph on floats: the graph itself accepts only uint8, which has no gradients."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run everything but the checks of types."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        return super().call_function(target, args, kwargs)


def _frozen_copy(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode on the CPU, without gradients, its filters in channels-last order.

    In that order ResNet-18 takes 22 ms instead of 38 for one picture on one core, with equal results.
    """
    if isinstance(network, torch.jit.ScriptModule):
        # The parameters of a deep copy are not leaves; those of a saved and loaded copy are.
        buffer = io.BytesIO()
        with _quiet():
            torch.jit.save(network, buffer)
            buffer.seek(0)
            inner: nn.Module = torch.jit.load(buffer, map_location="cpu")  # type: ignore[no-untyped-call]
    else:
        inner = copy.deepcopy(network).cpu()
        inner = inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    return inner.eval()


def _forget_origin(program: ExportedProgram) -> None:
    """Remove what depends on the machine: stack traces with paths, module stacks, the example's pixels."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                kept = {key: node.meta[key] for key in ("val",) if key in node.meta}
                node.meta.clear()
                node.meta.update(kept)
    program.example_inputs = None


def _save_torchscript(module: nn.Module, path: Path) -> None:
    """Save a scripted module without its debug records, which hold the paths of its sources.

    The name of the second `Uint8Input` that a process compiles has a number, which is removed.
    """
    draft = path.with_name("draft.pt")
    scripted = module if isinstance(module, torch.jit.ScriptModule) else torch.jit.script(module)
    scripted.save(str(draft))
    reader = torch._C.PyTorchFileReader(str(draft))
    writer = torch._C.PyTorchFileWriter(str(path))
    written_anyway = ("version", "byteorder", ".data/serialization_id")
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in written_anyway:
            record = reader.get_record(name)
            if name == "data.pkl" or name.endswith(".py"):
                record = _MANGLED.sub(rb"\1", record)
            name = _MANGLED.sub(rb"\1", name.encode()).decode()
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    del reader
    draft.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two known warnings.

    TorchScript is deprecated, but users bring it. When PyTorch saves channels-last filters, it calls them "no complete
    tensor", which matters only off the CPU (and the saved file is run before it is used).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
