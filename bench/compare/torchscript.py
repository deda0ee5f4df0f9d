"""The archive's model as tutorials serve one: TorchScript in fp32 that takes normalised floats, NCHW."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from beeline import pixels
from beeline.errors import ArchiveError, RequestError, Undetermined, short
from beeline.spec import ModelSpec
from bench.peers.classifier import Documented
from bench.pictures import Pictures

# ImageNet's mean and deviation a channel, which the stock handler normalises with.
_IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
# The largest difference from the archive's own outputs, relative to the largest output; TorchScript's other order of
# operations costs 1e-6.
_TOLERANCE = 1e-3


def write(folder: Path, spec: ModelSpec, out: Path) -> None:
    """Write an archive's model as TorchScript, with labels and preprocessing; raise `ArchiveError` if that fails."""
    size = spec.geometry
    # `Resize` of one number keeps the proportions, of two it does not.
    resize = {"crop": size.resize, "squash": size.shape}.get(size.fit)
    if resize is None:
        raise ArchiveError(f"its fit is {size.fit!r}, which other servers cannot do; compare one of crop or squash")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # TorchScript is deprecated, and TorchServe's documentation serves it; tracing warns about constants.
            warnings.simplefilter("ignore")
            model, photometry = _convert(folder, spec)
            torch.jit.save(model, str(out / "documented.pt"))
    except Exception as error:
        what = f"{spec.model.file} cannot be converted to TorchScript for other servers ({short(error)})"
        raise ArchiveError(f"{what}; name an fp32 archive of the same model with --reference") from error
    geometry = {"resize": resize, "crop": size.shape, "interpolation": size.interpolation}
    description = geometry | {"labels": spec.labels} | dict(zip(("mean", "std"), photometry.tolist(), strict=True))
    (out / "documented.json").write_text(json.dumps(description), encoding="utf-8")
    # The stock handler's file of labels.
    (out / "index_to_name.json").write_text(json.dumps(dict(enumerate(spec.labels))), encoding="utf-8")


def labels(folder: Path, spec: ModelSpec, pictures: Pictures) -> list[str]:
    """Return each picture's first label by the model that `write` wrote; raise `Undetermined` if one is unreadable."""
    reference, found = Documented(folder), []
    for name, body in zip(pictures.names, pictures.bodies, strict=True):
        try:
            crop = pixels.decode(body, replace(spec.geometry, decoding="full"))
        except RequestError as error:
            raise Undetermined(f"{name} cannot be decoded ({error}); leave it out of --pictures") from error
        found.append(next(iter(reference.predict([reference.normalise(crop.copy())])[0])))
    return found


def _convert(folder: Path, spec: ModelSpec) -> tuple[Any, Tensor]:
    """Return the traced model, and the mean and deviation of its inputs, `[2, 3]`.

    It is the network behind the archive's own normalisation. Where the archive's graph does not begin with one, it is
    the whole graph behind the inverse of ImageNet's normalisation.
    """
    path, shape = folder / spec.model.file, (3, *spec.geometry.shape, 3)
    if spec.model.format == "torchscript":
        source: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        whole, network = source, getattr(source, "network", source)
    else:
        program = torch.export.load(path)
        source = program.module(check_guards=False)
        whole, network = (_traceable(program, takes_planes) for takes_planes in (False, True))
    crops = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = whole(crops)
    scale, shift = getattr(source, "scale", None), getattr(source, "shift", None)
    if isinstance(scale, Tensor) and isinstance(shift, Tensor):
        # The archive's `value * scale + shift`, of values up to 255.
        std = 1 / (255 * scale[:3].double())
        photometry = torch.stack([-shift[:3].double() * std, std]).float()
    else:
        network, photometry = nn.Sequential(_Denormalise(), whole), _IMAGENET
    mean, std = photometry
    planes = ((crops.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    model: Any = torch.jit.trace(network, planes[:2], check_trace=False)  # type: ignore[no-untyped-call]
    if (model(planes) - expected).abs().max() > _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError("its outputs differ")
    return model, photometry


def _traceable(program: torch.export.ExportedProgram, takes_planes: bool) -> fx.GraphModule:
    """Return a program's module for a trace: without its checks, which a trace would keep, for batches of any size.

    With `takes_planes` it takes normalised NCHW instead of pixels.
    """
    module = program.module(check_guards=False)
    for tensor in (*module.parameters(), *module.buffers()):
        # Filters in the plain layout, as in a tutorial's weights.
        tensor.data = tensor.data.contiguous()
        tensor.requires_grad_(False)
    graph = module.graph
    (given,) = graph.find_nodes(op="placeholder")
    if takes_planes:
        for permute in graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)[:1]:
            permute.replace_all_uses_with(given)
    for node in reversed(graph.nodes):
        if any(word in str(node.target) for word in ("_assert", "sym_constrain")):
            graph.erase_node(node)
        elif node.target is torch.ops.aten.sym_size.int:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_method("size", node.args))
    graph.eliminate_dead_code()
    # A module of its own, without the original's checks of shapes and types.
    return fx.GraphModule(module, graph)


class _Denormalise(nn.Module):
    """Turns ImageNet's normalised NCHW back into uint8 NHWC."""

    def forward(self, planes: Tensor) -> Tensor:
        """Return the pixels."""
        mean, std = _IMAGENET.reshape(2, 1, 3, 1, 1)
        values: Tensor = (planes * std + mean) * 255
        return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
