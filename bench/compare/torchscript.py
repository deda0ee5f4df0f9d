"""The archive's model as tutorials serve one: TorchScript in fp32 that takes normalised floats, NCHW."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from beeline import pixels
from beeline.errors import ArchiveError, RequestError, Undetermined
from beeline.spec import Geometry, ModelSpec
from bench.pictures import Pictures

FILE, TOLD = "documented.pt", "documented.json"
# Where an archive normalises by itself in a way of its own, the stock handler's numbers, a channel each.
_IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
# Between this and the archive's own outputs, relative to the largest; what TorchScript reorders costs 1e-6.
_APART = 1e-3
_BATCH = 16


def write(folder: Path, spec: ModelSpec, out: Path) -> None:
    """Write the model, its labels and preprocessing, and the stock handler's list of labels into `out`.

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
            model, (mean, std) = _convert(folder, spec)
            torch.jit.save(model, str(out / FILE))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArchiveError(
            f"{spec.model.file} cannot be turned into TorchScript for other servers ({reason}); "
            "name an fp32 archive of the same model with --reference"
        ) from error
    geometry = {"resize": spec.geometry.resize, "crop": crop, "interpolation": spec.geometry.interpolation}
    told = {"labels": list(spec.labels), **geometry, "mean": mean.tolist(), "std": std.tolist()}
    (out / TOLD).write_text(json.dumps(told), encoding="utf-8")
    names = {str(index): label for index, label in enumerate(spec.labels)}
    (out / "index_to_name.json").write_text(json.dumps(names), encoding="utf-8")


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model that `write` wrote, and its labels and preprocessing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        model = torch.jit.load(str(folder / FILE), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return model, json.loads((folder / TOLD).read_text(encoding="utf-8"))


def labels(folder: Path, pictures: Pictures) -> list[str]:
    """Return the fp32 model's first label of each picture, its pixels decoded in full.

    Args:
        folder: that `write` wrote into.
        pictures: to classify.

    Raises:
        Undetermined: for a picture that cannot be decoded.
    """
    model, told = load(folder)
    geometry = Geometry(told["resize"], told["crop"], told["interpolation"])
    photometry = torch.tensor([told["mean"], told["std"]])
    rows, found = [], []
    for name, body in zip(pictures.names, pictures.bodies, strict=True):
        try:
            rows.append(pixels.decode(body, geometry))
        except RequestError as error:
            raise Undetermined(f"{name} cannot be decoded ({error}); leave it out of --pictures") from error
    for start in range(0, len(rows), _BATCH):
        planes = _normalised(torch.from_numpy(np.stack(rows[start : start + _BATCH])), photometry)
        with torch.inference_mode():
            found += [told["labels"][int(index)] for index in model(planes).argmax(1)]
    return found


def _convert(folder: Path, spec: ModelSpec) -> tuple[Any, Tensor]:
    """Return the traced network behind the archive's own normalisation, else the whole behind its inverse.

    And mean and deviation of its inputs, `[2, 3]`.
    """
    path, crop = folder / spec.model.file, spec.geometry.crop
    if spec.model.format == "torchscript":
        script: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        whole, inner = script, getattr(script, "network", script)
    else:
        script = torch.export.load(path).module(check_guards=False)
        whole, inner = (_Program(script, crop, from_planes) for from_planes in (False, True))
    pixels = torch.randint(0, 256, (3, crop, crop, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = whole(pixels)
    attempts: list[tuple[nn.Module, Tensor]] = [(_Denormalised(whole), _IMAGENET)]
    scale, shift = getattr(script, "scale", None), getattr(script, "shift", None)
    if isinstance(scale, Tensor) and isinstance(shift, Tensor):
        # The archive's `value * scale + shift`, of values up to 255.
        std = 1 / (255 * scale[:3].double())
        attempts.insert(0, (inner, torch.stack([-shift[:3].double() * std, std]).float()))
    for network, photometry in attempts:
        planes = _normalised(pixels, photometry)
        model: Any = torch.jit.trace(network, planes[:2], check_trace=False)  # type: ignore[no-untyped-call]
        if (model(planes) - expected).abs().max() <= _APART * max(1.0, float(expected.abs().max())):
            return model, photometry
    raise ValueError("its outputs differ")


class _Program(nn.Module):
    """An exported program that can be traced, from its pixels or from where they have become planes."""

    def __init__(self, module: nn.Module, crop: int, from_planes: bool) -> None:
        super().__init__()
        self.module, self.crop, self.from_planes = module, crop, from_planes
        for tensor in (*module.parameters(), *module.buffers()):
            # In the plain layout that a tutorial's weights have.
            tensor.data = tensor.data.contiguous()
            tensor.requires_grad_(False)

    def forward(self, given: Tensor) -> Tensor:
        """Run it; what is before the permutation to NCHW does not matter where planes are given."""
        graph = cast(torch.fx.GraphModule, self.module)
        if self.from_planes:
            pixels = torch.zeros((given.shape[0], self.crop, self.crop, 3), dtype=torch.uint8)
            out = _Cut(graph, given).run(pixels, enable_io_processing=False)
        else:
            out = _Cut(graph, None).run(given, enable_io_processing=False)
        return cast(Tensor, out[0] if isinstance(out, (tuple, list)) else out)


class _Cut(torch.fx.Interpreter):
    """Runs a graph without its checks, with given planes instead of its own."""

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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("photometry", _IMAGENET.clone())

    def forward(self, planes: Tensor) -> Tensor:
        """Undo the normalisation and run the model."""
        mean, std = cast(Tensor, self.photometry).reshape(2, 1, 3, 1, 1)
        values = (planes * std + mean) * 255
        return cast(Tensor, self.model(values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()))


def _normalised(pixels: Tensor, photometry: Tensor) -> Tensor:
    values = (pixels.float() / 255 - photometry[0]) / photometry[1]
    return values.permute(0, 3, 1, 2).contiguous()
