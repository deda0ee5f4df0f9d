"""The graph that an archive holds: it normalises uint8 pictures. The same network gives the same bytes."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from beeline.errors import ArchiveError, did_you_mean, short
from beeline.spec import Geometry

PROGRAM_FILE = "model.pt2"
TORCHSCRIPT_FILE = "model.pt"
ONNX_FILE = "model.onnx"
_MANGLED = re.compile(rb"(__torch__[./]archive[./][a-z]+)[./]___torch_mangle_[0-9]+")
Network = nn.Module | ExportedProgram
# Rows of RGB weights for each channel that a network takes; grey as ITU-R 601-2 defines luma.
MIXES = {"bgr": [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], "grey": [[0.299, 0.587, 0.114]]}
CHANNELS = ("rgb", "bgr")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Numbers of channels other than 3 that a network may take.
_COUNTS = (1, 2, 4, 5, 6, 8)
# Floats of 0..255, `[N, height, width, 3]`, to `[N, classes]`, with gradients.
Differentiable = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """What a network is given: geometry, and `mean` and `std` per RGB channel, of values scaled to 0..1.

    `channels` is the order in which it takes them, `rgb` or `bgr`. With `takes_uint8` it takes uint8 NHWC and
    normalises by itself. Raise `ArchiveError` for an impossible mean, deviation or order.
    """

    geometry: Geometry
    mean: Sequence[float]
    std: Sequence[float]
    channels: str = CHANNELS[0]
    takes_uint8: bool = False

    def __post_init__(self) -> None:
        for key, values, kind in (("mean", self.mean, "numbers"), ("std", self.std, "numbers over 0")):
            allowed = None
            if len(values) != 3 or (key == "std" and min(values) <= 0):
                allowed = f"three {kind}, one for each of R, G and B, as 0.5,0.5,0.5"
            elif not max(map(abs, values)) <= 1:
                scaled = ",".join(f"{value / 255:.4g}" for value in values)
                allowed = f"at most 1, since pixels are scaled to 0..1: divide by 255, as --{key} {scaled}"
            if allowed:
                raise ArchiveError(f"{key} is {list(values)}; allowed: {allowed}")
        if self.channels not in CHANNELS:
            raise ArchiveError(f"--channels is {self.channels!r}{did_you_mean(self.channels, CHANNELS)}")

    @property
    def is_imagenets(self) -> bool:
        """Whether pixels are normalised with ImageNet's numbers."""
        return (*self.mean, *self.std) == (*IMAGENET_MEAN, *IMAGENET_STD)

    def override(self, **values: Any) -> Preprocessing:
        """Return it with those values that are not None: its own fields, or the geometry's."""
        given = {key: value for key, value in values.items() if value is not None}
        geometry = {key: given.pop(key) for key in given.keys() & vars(self.geometry)}
        return replace(self, geometry=replace(self.geometry, **geometry), **given)


class Uint8Input(nn.Module):
    """Makes a network of normalised float32 NCHW one of uint8 `[N, height, width, 3]` RGB."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], shape: tuple[int, int]) -> None:
        super().__init__()
        deviation = torch.tensor(std, dtype=torch.float64)
        shift = -torch.tensor(mean, dtype=torch.float64) / deviation
        self.network = network
        self.high, self.wide = shape
        # A vector as long as a row of pixels: 224 x 224 pixels take 0.04 ms on one core, and 0.2 ms with three values.
        self.register_buffer("scale", (1 / (255 * deviation)).repeat(self.wide).float())
        self.register_buffer("shift", shift.repeat(self.wide).float())

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise `pixels` (uint8, or floats of 0..255 for gradients) and run the network."""
        rows = pixels.flatten(2).to(torch.float32)
        # TorchScript knows that buffers are tensors but cannot read an annotation that says so.
        rows = torch.addcmul(self.shift, rows, self.scale)  # type: ignore[arg-type]
        # The result is NCHW in channels-last order, in which convolutions are fastest.
        planes = rows.view(-1, self.high, self.wide, 3).permute(0, 3, 1, 2)
        scores: Tensor = self.network(planes)
        return scores


class Channels(nn.Module):
    """Makes normalised RGB planes the channels of a network: blue first, or grey as Pillow's mode L."""

    def __init__(self, channels: str) -> None:
        super().__init__()
        self.register_buffer("mix", torch.tensor(MIXES[channels]))

    def forward(self, planes: Tensor) -> Tensor:
        """Return `[N, channels, H, W]`."""
        return torch.einsum("nchw,kc->nkhw", planes, self.mix)


class Chain(nn.Module):
    """Runs one module after the other."""

    def __init__(self, first: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, pixels: Tensor) -> Tensor:
        """Return what the second makes of what the first returns."""
        found: Tensor = self.then(self.first(pixels))
        return found


class Graph:
    """A network that is ready to be saved. `plain` is the network itself, in float32; it takes `planes` channels.

    `shape` is height and width of the pictures. `differentiable` runs the graph on floats of 0..255, `[N, height,
    width, 3]`, with gradients to them. `notes` say what was changed to run it.
    """

    def __init__(self, network: Network, preprocessing: Preprocessing) -> None:
        """Wrap a copy of `network`: a module, a scripted or traced module, or an exported program.

        A network of one channel gets grey. Raise `ArchiveError` for one of two channels, or of four and more.
        """
        self.shape = preprocessing.geometry.shape
        self.format = "torchscript" if isinstance(network, torch.jit.ScriptModule) else "exported_program"
        self.notes: list[str] = []
        inner = network.module() if isinstance(network, ExportedProgram) else _frozen_copy(network)
        _flush_denormals(inner)
        kinds = {parameter.dtype for parameter in inner.parameters() if parameter.is_floating_point()}
        if other := kinds - {torch.float32}:
            # The guards of a program ask for its own type.
            inner = network.module(check_guards=False) if isinstance(network, ExportedProgram) else inner
            inner = inner.float()
            self.notes.append(f"its {str(other.pop()).removeprefix('torch.')} weights are made float32")
        self.plain, self.planes = inner, 3
        takes_uint8 = preprocessing.takes_uint8
        if not takes_uint8 and not any(self.takes(self.shape, pictures=count) for count in (1, 2, 3)):
            self.planes = next((count for count in _COUNTS if self.takes(self.shape, count)), 3)
        self.notes += check_planes(self.planes)
        self._preprocessing = preprocessing
        self._unchecked: Differentiable | None = None
        if takes_uint8 and isinstance(network, ExportedProgram):
            self._unchecked = _WithoutChecks(network.module(check_guards=False)).run
        self._wrap()

    def _wrap(self) -> None:
        self.module, own = self.plain, self._preprocessing
        if not own.takes_uint8:
            channels = "grey" if self.planes == 1 else own.channels
            shown = self.plain if channels == "rgb" else Chain(Channels(channels), self.plain)
            self.module = Uint8Input(shown, own.mean, own.std, self.shape)
        self.differentiable: Differentiable = self._unchecked or self.module

    def takes(self, shape: tuple[int, int], planes: int | None = None, pictures: int = 1) -> bool:
        """Return whether the network itself runs on so many pictures of so many pixels and channels."""
        with suppress(Exception), torch.no_grad():
            self.plain(torch.zeros(pictures, planes or self.planes, *shape))
            return True
        return False

    def append(self, last: nn.Module) -> None:
        """Let a module make something else of the outputs."""
        self.plain = Chain(self.plain, last)
        if (before := self._unchecked) is not None:
            self._unchecked = lambda pixels: last(before(pixels))
        self._wrap()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run on uint8 `[N, height, width, 3]`, without gradients."""
        with torch.no_grad():
            scores: Tensor = self.module(pixels)
        return scores

    def save(self, folder: Path) -> Path:
        """Write the model file into `folder` and return its path.

        Raise `ArchiveError` for a network that cannot be exported for every batch size.
        """
        with quiet():
            if self.format == "torchscript":
                return _save_torchscript(self.module, folder / TORCHSCRIPT_FILE)
            # Two pictures, since PyTorch treats a dimension of 1 as a constant.
            example = torch.zeros(2, *self.shape, 3, dtype=torch.uint8)
            try:
                sizes = ({0: Dim("batch", min=1)},)
                program = torch.export.export(self.module, (example,), dynamic_shapes=sizes, strict=False)
            except Exception as error:
                why = f"the network cannot be exported for every batch size ({short(error)})"
                fix = "make its batch dimension dynamic, or bring it as TorchScript"
                raise ArchiveError(f"{why}; {fix}") from error
            _remove_origin(program)
            torch.export.save(program, folder / PROGRAM_FILE)
        return folder / PROGRAM_FILE


def check_planes(planes: int) -> list[str]:
    """Return what is to say of a network of so many channels; raise `ArchiveError` if pictures have another number."""
    if planes not in (1, 3):
        raise ArchiveError(f"the network takes {planes} channels; pictures have 3 (RGB) or 1 (grey)")
    return ["its one channel gets grey pictures"] if planes == 1 else []


class _WithoutChecks(torch.fx.Interpreter):
    """Runs a program on floats. The program itself checks that its input is uint8, which has no gradients."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run everything except checks of types."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        return super().call_function(target, args, kwargs)


def _frozen_copy(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode on the CPU, without gradients, with filters in channels-last order.

    In that order ResNet-18 takes 22 ms instead of 38 for one picture on one core, with equal results.
    """
    if isinstance(network, torch.jit.ScriptModule):
        # The parameters of a deep copy are not leaves. Those of a copy that was saved and loaded are.
        buffer = io.BytesIO()
        with quiet():
            torch.jit.save(network, buffer)
            buffer.seek(0)
            inner: nn.Module = torch.jit.load(buffer, map_location="cpu")  # type: ignore[no-untyped-call]
    else:
        inner = copy.deepcopy(network).cpu()
        inner = inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    return inner.eval()


def _flush_denormals(network: nn.Module) -> None:
    """Set denormal weights to zero, since they make a processor ten times slower."""
    flushed = {}
    for name, tensor in network.state_dict().items():
        denormal = (tensor != 0) & (tensor.abs() < torch.finfo(torch.float32).tiny)
        if tensor.is_floating_point() and denormal.any():
            flushed[name] = tensor.masked_fill(denormal, 0)
    if flushed:
        # The weights of a program are the user's own: they are replaced and not changed.
        network.load_state_dict(flushed, strict=False, assign=not isinstance(network, torch.jit.ScriptModule))


def _remove_origin(program: ExportedProgram) -> None:
    """Remove what depends on the machine: stack traces with paths, module stacks, the example's pixels."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
    program.example_inputs = None


def _save_torchscript(module: nn.Module, path: Path) -> Path:
    """Save a scripted module without its debug records, which hold the paths of its sources; return `path`.

    A second `Uint8Input` that a process compiles has a number in its name, which is removed.
    """
    draft = path.with_name("draft.pt")
    try:
        scripted = module if isinstance(module, torch.jit.ScriptModule) else torch.jit.script(module)
    except RuntimeError as error:
        why = f"TorchScript sees another type than a tensor in what the network returns ({short(error)})"
        raise ArchiveError(f"{why}; make it again with torch.jit.trace") from error
    if any(isinstance(each, Chain) for each in module.modules()):
        # Several classes of ours would be saved under names that depend on what this process compiled before.
        scripted = torch.jit.freeze(scripted.eval())
    scripted.save(str(draft))
    reader = torch._C.PyTorchFileReader(str(draft))
    writer = torch._C.PyTorchFileWriter(str(path))
    written_by_torch = ("version", "byteorder", ".data/serialization_id")
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in written_by_torch:
            record = reader.get_record(name)
            if name == "data.pkl" or name.endswith(".py"):
                record = _MANGLED.sub(rb"\1", record)
            name = _MANGLED.sub(rb"\1", name.encode()).decode()
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    del reader
    draft.unlink()
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """Silence two known warnings of PyTorch.

    TorchScript is deprecated, but users have such files. Channels-last filters are "no complete tensor" when they are
    saved, which matters only off the CPU (and the saved file is run before it is used).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        yield
