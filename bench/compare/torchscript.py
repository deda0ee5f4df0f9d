"""The archive's model as tutorials serve one: TorchScript in fp32 that takes normalised floats, NCHW."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from beeline.errors import ArchiveError
from beeline.spec import ModelSpec

FILE, TOLD = "documented.pt", "documented.json"
# Where an archive normalises by itself in a way of its own, the stock handler's numbers.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Between this and the archive's own outputs, relative to the largest; what TorchScript reorders costs 1e-6.
_APART = 1e-3


@dataclass(frozen=True)
class Photometry:
    """What the inputs are normalised with, a channel each, of values scaled to 0..1."""

    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD


def write(folder: Path, spec: ModelSpec, out: Path) -> None:
    """Write `documented.pt` and `documented.json` into `out`: the model, and its labels and preprocessing.

    Args:
        folder: the unpacked archive.
        spec: its spec.
        out: where to.

    Raises:
        ArchiveError: when the model cannot be converted, or answers otherwise afterwards.
    """
    crop = spec.geometry.crop
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Deprecated upstream, and still what TorchServe's documentation serves; tracing notes constants.
            warnings.simplefilter("ignore")
            whole, parts = _load(folder, spec)
            pixels = torch.randint(0, 256, (3, crop, crop, 3), generator=_seed(), dtype=torch.uint8)
            model, photometry = _plain(whole, parts, crop, pixels)
            torch.jit.save(model, str(out / FILE))
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ArchiveError(
            f"{spec.model.file} cannot be turned into TorchScript for other servers ({why}); "
            "name an fp32 archive of the same model with --reference"
        ) from error
    told = {
        "labels": list(spec.labels),
        "resize": spec.geometry.resize,
        "crop": crop,
        "interpolation": spec.geometry.interpolation,
        "mean": photometry.mean,
        "std": photometry.std,
    }
    (out / TOLD).write_text(json.dumps(told), encoding="utf-8")


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model that `write` wrote, and its labels and preprocessing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        model = torch.jit.load(str(folder / FILE), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return model, json.loads((folder / TOLD).read_text(encoding="utf-8"))


def _plain(whole: nn.Module, parts: tuple[nn.Module, Any], crop: int, pixels: Tensor) -> tuple[Any, Photometry]:
    """Return the traced network behind the archive's own normalisation, else the whole behind its inverse."""
    wanted = whole(pixels)
    inner, photometry = parts
    if photometry is not None:
        planes = _normalised(pixels, photometry)
        model = torch.jit.trace(inner, planes[:2], check_trace=False)  # type: ignore[no-untyped-call]
        if _same(model(planes), wanted):
            return model, photometry
    photometry = Photometry()
    planes = _normalised(pixels, photometry)
    model = torch.jit.trace(_Denormalised(whole, photometry), planes[:2], check_trace=False)  # type: ignore[no-untyped-call]
    if not _same(model(planes), wanted):
        raise ValueError("its outputs differ")
    return model, photometry


def _load(folder: Path, spec: ModelSpec) -> tuple[nn.Module, tuple[nn.Module, Photometry | None]]:
    """Return the archive's model, and the network inside it with the normalisation that is before it."""
    path = folder / spec.model.file
    if spec.model.format == "torchscript":
        script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        inner = getattr(script, "network", script)
        return script, (inner, _photometry(script))
    program = torch.export.load(path)
    whole, inner = (_Program(program.module(check_guards=False), spec.geometry.crop, cut) for cut in (False, True))
    return whole, (inner, _photometry(whole.module))


def _photometry(module: Any) -> Photometry | None:
    """Read mean and deviation off the archive's `value * scale + shift`."""
    scale, shift = getattr(module, "scale", None), getattr(module, "shift", None)
    if not isinstance(scale, Tensor) or not isinstance(shift, Tensor):
        return None
    std = 1 / (255 * scale[:3].double())
    return Photometry(tuple((-shift[:3].double() * std).tolist()), tuple(std.tolist()))


class _Program(nn.Module):
    """An exported program that can be traced, from its pixels or from where they have become planes."""

    def __init__(self, module: nn.Module, crop: int, from_planes: bool) -> None:
        super().__init__()
        self.module = module
        self.crop = crop
        self.from_planes = from_planes
        for tensor in (*module.parameters(), *module.buffers()):
            # In the plain layout that a tutorial's weights have.
            tensor.data = tensor.data.contiguous()
            tensor.requires_grad_(False)

    def forward(self, given: Tensor) -> Tensor:
        """Run it; what is before the permutation to NCHW does not matter where planes are given."""
        graph = cast(torch.fx.GraphModule, self.module)
        pixels = given
        if self.from_planes:
            pixels = torch.zeros((given.shape[0], self.crop, self.crop, 3), dtype=torch.uint8)
        out = _Cut(graph, given if self.from_planes else None).run(pixels, enable_io_processing=False)
        return cast(Tensor, out[0] if isinstance(out, (tuple, list)) else out)


class _Cut(torch.fx.Interpreter):
    """Runs a graph without its checks, with given planes in place of its own."""

    def __init__(self, module: torch.fx.GraphModule, planes: Tensor | None) -> None:
        super().__init__(module)
        self.planes = planes
        permute = torch.ops.aten.permute.default
        self.cut = next((node for node in module.graph.nodes if node.target is permute), None)

    def run_node(self, node: torch.fx.Node) -> Any:
        """Put the planes in."""
        return self.planes if self.planes is not None and node is self.cut else super().run_node(node)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Skip the checks, ask sizes as tracing can follow them, run everything else."""
        if target is torch.ops.aten.sym_size.int:
            return args[0].size(args[1])
        if any(word in str(target) for word in ("_assert", "sym_constrain")):
            return None
        return super().call_function(target, args, kwargs)


class _Denormalised(nn.Module):
    """A model of uint8 NHWC, for callers who normalise."""

    def __init__(self, model: nn.Module, photometry: Photometry) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(photometry.mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(photometry.std).reshape(1, 3, 1, 1))

    def forward(self, planes: Tensor) -> Tensor:
        """Undo the normalisation and run the model."""
        values = (planes * cast(Tensor, self.std) + cast(Tensor, self.mean)) * 255
        return cast(Tensor, self.model(values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()))


def _normalised(pixels: Tensor, photometry: Photometry) -> Tensor:
    values = (pixels.float() / 255 - torch.tensor(photometry.mean)) / torch.tensor(photometry.std)
    return values.permute(0, 3, 1, 2).contiguous()


def _same(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= _APART * max(1.0, float(wanted.abs().max())))


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
