"""A network to an exported folder: uint8 graph, model_spec.json and golden pictures, proved to work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from archive import goldens
from archive.goldens.mistakes import check_names
from archive.graph import PROGRAM_FILE, TORCHSCRIPT_FILE, Graph, Network
from archive.presets import rgb
from beeline import pixels
from beeline.engines.torch import TorchEngine
from beeline.errors import ArchiveError
from beeline.spec import FILE_NAME, GOLDEN, Accuracy, Artifact, Geometry, ModelSpec, Provenance
from host.files import sha256, whole_folder

# Parallel sums depend on how they are split. With a fixed number of threads the same model gives the same golden
# pictures on any number of cores.
_THREADS = 2


@dataclass(frozen=True)
class ExportRequest:
    """What an exported folder says about its network that the network itself does not show.

    `mean` and `std` are per RGB channel, of pixel values scaled to 0..1. `output` says what the network
    returns, `logits` or `probabilities`. `golden_pictures` is a folder of the user's own pictures, instead of
    made ones; `blind_to` names mistakes that the goldens need not notice (see `archive.goldens.mistakes`).
    """

    name: str
    version: str
    labels: tuple[str, ...]
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    architecture: str = "unknown"
    output: str = "logits"
    top_k: int = 5
    accuracy: Accuracy | None = None
    provenance: Provenance = field(default_factory=Provenance)
    golden_pictures: Path | None = None
    blind_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Turn lists into tuples; raise `ArchiveError` for an impossible mean or deviation, or an unknown mistake."""
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "mean", rgb("mean", self.mean))
        object.__setattr__(self, "std", rgb("std", self.std))
        check_names(self.blind_to)


def export_folder(network: Network, request: ExportRequest, out: Path, *, takes_uint8: bool = False) -> ModelSpec:
    """Write `out` with the model, `model_spec.json` and `golden/`; replaces an earlier export there.

    The same network and request give the same bytes, in every process and folder of one machine.

    Args:
        network: float32 normalised NCHW to `[N, classes]`; a module, a TorchScript module or an exported
            program. It is not changed.
        request: everything else.
        out: the folder.
        takes_uint8: the network takes uint8 `[N, crop, crop, 3]` and normalises by itself.

    Returns:
        The spec that was written.

    Raises:
        ArchiveError: naming what does not fit: labels and outputs, a number that is not finite, a fixed
            batch size, goldens that would not notice a mistake.
        SpecError: when the request breaks the schema.
    """
    _check_replaceable(out)
    # Everything in the request is checked before anything takes time.
    _spec(request, Artifact(PROGRAM_FILE, "exported_program", "0" * 64))
    with _fixed_threads(), whole_folder(out) as draft:
        graph = Graph(network, request.mean, request.std, request.geometry.crop, takes_uint8)
        _check_outputs(graph, request)
        model = graph.save(draft)
        spec = _spec(request, Artifact(model.name, graph.format, sha256(model), request.architecture))
        spec.save(draft / FILE_NAME)
        engine = TorchEngine(draft, spec, device="cpu", threads=_THREADS)
        _check_saved(graph, engine, request.geometry.crop)
        goldens.make(
            draft,
            spec,
            engine.forward,
            graph.differentiable,
            photometry=(request.mean, request.std),
            pictures=request.golden_pictures,
            blind_to=request.blind_to,
        )
    return spec


def _check_replaceable(out: Path) -> None:
    """Let an earlier export be replaced, and nothing else be lost with it."""
    ours = {PROGRAM_FILE, TORCHSCRIPT_FILE, FILE_NAME, GOLDEN}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise ArchiveError(f"{out} exists and is no exported folder; name another, or remove it")


def _spec(request: ExportRequest, artifact: Artifact) -> ModelSpec:
    return ModelSpec(
        name=request.name,
        version=request.version,
        labels=request.labels,
        geometry=request.geometry,
        model=artifact,
        geometry_version=pixels.GEOMETRY,
        output=request.output,
        top_k=request.top_k,
        accuracy=request.accuracy,
        provenance=request.provenance,
    )


def _check_outputs(graph: Graph, request: ExportRequest) -> None:
    """Run noise through the network, one picture alone and among others, and judge what comes out."""
    crop = request.geometry.crop
    noise = np.random.default_rng(0).integers(0, 256, (3, crop, crop, 3), dtype=np.uint8)
    try:
        alone, together = graph(torch.from_numpy(noise[:1])), graph(torch.from_numpy(noise))
    except Exception as error:
        why = " ".join(str(error).split())[-200:]
        raise ArchiveError(
            f"the network does not run on 1 and 3 pictures of {crop} x {crop} ({why}); check --crop, that the batch "
            "size is not fixed, and --uint8-input when the network takes uint8 NHWC itself"
        ) from error
    if not isinstance(together, Tensor) or together.ndim != 2 or together.dtype != torch.float32:
        got = f"{together.dtype} {list(together.shape)}" if isinstance(together, Tensor) else type(together).__name__
        raise ArchiveError(f"the network returns {got} for 3 pictures; allowed: float32 [3, classes]")
    if together.shape[1] != len(request.labels):
        raise ArchiveError(
            f"the model has {together.shape[1]} outputs and there are {len(request.labels)} labels; "
            "name one label for each output, in order"
        )
    if not torch.isfinite(together).all():
        raise ArchiveError("the network returns numbers that are not finite for noise; check its weights")
    if not torch.allclose(alone[0], together[0], rtol=1e-3, atol=1e-3):
        raise ArchiveError(
            "the network's answer for a picture depends on its neighbours in the batch "
            f"({(alone[0] - together[0]).abs().max():.3g} apart); put it into evaluation mode before saving it"
        )
    _check_kind(together, request.output)


def _check_kind(rows: Tensor, output: str) -> None:
    """Tell logits from probabilities: rows of probabilities lie in 0..1 and sum to 1."""
    sums = bool((rows.sum(1) - 1).abs().max() < 1e-3)
    probable = sums and bool(rows.min() >= 0) and bool(rows.max() <= 1 + 1e-6)
    if probable != (output == "probabilities"):
        found = (
            "probabilities (each row sums to 1)" if probable else f"no probabilities (rows sum to {rows[0].sum():.3g})"
        )
        fix = "probabilities" if probable else "logits"
        raise ArchiveError(f"the output is said to be {output!r} but the network returns {found}; say --output {fix}")


def _check_saved(graph: Graph, engine: TorchEngine, crop: int) -> None:
    """Compare the saved file with the network in memory on noise."""
    noise = np.random.default_rng(1).integers(0, 256, (2, crop, crop, 3), dtype=np.uint8)
    wanted = graph(torch.from_numpy(noise)).numpy()
    apart = float(np.abs(engine.forward(noise) - wanted).max())
    if apart > 1e-3 * max(1.0, float(np.abs(wanted).max())):
        raise ArchiveError(
            f"the saved model's outputs are {apart:.3g} away from the network's; report this with the architecture"
        )


@contextmanager
def _fixed_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
