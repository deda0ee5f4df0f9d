"""From a network to an exported folder: preprocessing, the uint8 graph, model_spec.json and golden pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archive import goldens, outputs
from archive.architectures import TIMM, timm_preprocessing
from archive.goldens.mistakes import check_names
from archive.graph import CHANNELS, ONNX_FILE, PROGRAM_FILE, TORCHSCRIPT_FILE, Graph, Network
from beeline import engines, pixels
from beeline.errors import ArchiveError, did_you_mean, short
from beeline.spec import FILE_NAME, GOLDEN, NAME, NAMES, OUTPUTS, Accuracy, Artifact, Geometry, ModelSpec, Provenance
from host.files import sha256, whole_folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The result of a parallel sum depends on how it is split. With a fixed number of threads the same model gives the same
# golden pictures on any number of cores.
_THREADS = 2


@dataclass(frozen=True)
class Preset:
    """Geometry in pixels; `mean` and `std` per RGB channel, of values scaled to 0..1."""

    geometry: Geometry
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def is_imagenets(self) -> bool:
        """Whether pixels are normalised with ImageNet's numbers."""
        return (*self.mean, *self.std) == (*IMAGENET_MEAN, *IMAGENET_STD)

    def override(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **geometry: Any
    ) -> Preset:
        """Return the preset with the values that are given; `geometry` are fields of `Geometry`."""
        changes = {key: value for key, value in geometry.items() if value is not None}
        return Preset(replace(self.geometry, **changes), mean or self.mean, std or self.std)


_PRESETS = {
    # The evaluation transform of most ImageNet models.
    "imagenet": Preset(Geometry(256, 224), IMAGENET_MEAN, IMAGENET_STD),
    # Pixels scaled to -1..1, as TensorFlow models take them.
    "half": Preset(Geometry(256, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # Pixels scaled to 0..1.
    "unit": Preset(Geometry(256, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    # OpenAI's CLIP image encoders.
    "clip": Preset(
        Geometry(224, 224, "bicubic"), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}


def find_preset(name: str | None, architecture: str | None = None) -> Preset:
    """Return the preset `name`.

    Args:
        name: `imagenet`, `half`, `unit` or `clip`; `torchvision` for the preprocessing of the default weights of
            `architecture`; a torchvision weights name such as `ResNet50_Weights.IMAGENET1K_V2`; or `timm` for what timm
            names for `architecture`. Nothing is downloaded. None is `timm` for `timm:NAME`, else `imagenet`.
        architecture: the name of a torchvision model, or `timm:NAME`.

    Raises:
        ArchiveError: for an unknown name or architecture.
    """
    name = name or ("timm" if architecture and architecture.startswith(TIMM) else "imagenet")
    if name in _PRESETS:
        return _PRESETS[name]
    if name not in ("torchvision", "timm") and "." not in name:
        raise ArchiveError(f"the preset is {name!r}{did_you_mean(name, (*_PRESETS, 'torchvision', 'timm'))}")
    if name in ("torchvision", "timm") and architecture is None:
        raise ArchiveError(f"the preset {name!r} needs an architecture; add --architecture, as resnet18")
    if name == "timm":
        return Preset(*timm_preprocessing(str(architecture)))
    import torchvision

    try:
        if name == "torchvision":
            weights = torchvision.models.get_model_weights(architecture).DEFAULT
        else:
            weights = torchvision.models.get_weight(name)
        transform = weights.transforms()
        geometry = Geometry(transform.resize_size[0], transform.crop_size[0], transform.interpolation.value)
        return Preset(geometry, tuple(transform.mean), tuple(transform.std))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        source = architecture if name == "torchvision" else name
        raise ArchiveError(
            f"torchvision knows no classification preprocessing for {source!r} ({short(error)}); give --resize, "
            "--crop, --mean and --std with --preset imagenet"
        ) from error


@dataclass(frozen=True)
class ExportRequest:
    """What the network itself does not show about an export.

    `mean` and `std` are per RGB channel, of pixel values scaled to 0..1; `channels` is the order in which the network
    takes them, `rgb` or `bgr`. `output` is what the network returns, one of `beeline.spec.OUTPUTS`, or None for what
    its outputs show; `output_key` names the entry of a dict, tuple or list. `golden_pictures` is a folder of the user's
    own pictures. `blind_to` names mistakes that the golden pictures need not notice (see `archive.goldens.mistakes`).
    """

    name: str
    version: str
    labels: tuple[str, ...]
    geometry: Geometry
    mean: Sequence[float]
    std: Sequence[float]
    architecture: str = "unknown"
    channels: str = "rgb"
    output: str | None = None
    output_key: str | None = None
    top_k: int = 5
    accuracy: Accuracy | None = None
    provenance: Provenance = field(default_factory=Provenance)
    golden_pictures: Path | None = None
    blind_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise `ArchiveError` for an impossible name, mean, deviation or order of channels, or an unknown mistake."""
        for key, word in (("name", self.name), ("version", self.version)):
            if not re.fullmatch(NAME, word):
                why = f"the model's {key} is {short(word)!r}; allowed: {NAMES}"
                raise ArchiveError(f"{why}; give another with --{key}")
        for key, values, allowed in (("mean", self.mean, "numbers"), ("std", self.std, "numbers over 0")):
            if len(values) != 3 or (key == "std" and min(values) <= 0):
                raise ArchiveError(
                    f"{key} is {list(values)}; allowed: three {allowed}, one for each of R, G and B, as 0.5,0.5,0.5"
                )
            if not max(map(abs, values)) <= 1:
                scaled = ",".join(f"{value / 255:.4g}" for value in values)
                raise ArchiveError(
                    f"{key} is {list(values)}; allowed: at most 1, since pixels are scaled to 0..1: divide by 255, as "
                    f"--{key} {scaled}"
                )
        if self.channels not in CHANNELS:
            raise ArchiveError(f"--channels is {self.channels!r}{did_you_mean(self.channels, CHANNELS)}")
        check_names(self.blind_to)


def export_folder(
    network: Network,
    request: ExportRequest,
    out: Path,
    *,
    takes_uint8: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ModelSpec:
    """Write the model, `model_spec.json` and `golden/` into `out`, over an earlier export; return the spec.

    The same network and request give the same bytes, in every process and folder of one machine.

    `network` maps normalised float32 NCHW to `[N, classes]` and is not changed. It may be a module, a TorchScript
    module or an exported program. With `takes_uint8` it takes uint8 `[N, crop, crop, 3]` and normalises by itself.
    `say` is told what was taken for granted.

    Raises:
        ArchiveError: names what does not fit: labels and outputs, a number that is not finite, a fixed batch size,
            golden pictures that would not notice a mistake.
        SpecError: when the request breaks the schema.
    """
    own = {PROGRAM_FILE, TORCHSCRIPT_FILE, ONNX_FILE, FILE_NAME, GOLDEN}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - own):
        raise ArchiveError(f"{out} exists and is not an exported folder; name another, or remove it")
    # The spec checks the whole request before anything takes time.
    spec = ModelSpec(
        name=request.name,
        version=request.version,
        labels=tuple(request.labels),
        geometry=request.geometry,
        model=Artifact(PROGRAM_FILE, "exported_program", "0" * 64),
        geometry_version=pixels.GEOMETRY,
        output=request.output or OUTPUTS[0],
        top_k=request.top_k,
        accuracy=request.accuracy,
        provenance=request.provenance,
    )
    with _fixed_threads(), whole_folder(out) as draft:
        kind: Any = Graph
        if not isinstance(network, (torch.nn.Module, torch.export.ExportedProgram)):
            from archive import onnx_graph

            kind = onnx_graph.OnnxGraph
        graph = kind(network, request.mean, request.std, request.geometry.shape, takes_uint8, request.channels)
        settled = outputs.settle(graph, network, len(spec.labels), request.output, request.output_key)
        for note in settled.notes:
            say(f"  {note}")
        model = graph.save(draft)
        artifact = Artifact(model.name, graph.format, sha256(model), request.architecture)
        engine = "onnxruntime" if graph.format == "onnx" else "torch"
        spec = replace(spec, model=artifact, output=settled.output, engine=engine)
        spec.save(draft / FILE_NAME)
        forward = engines.load(draft, spec, device="cpu", threads=_THREADS).forward
        apart = float(np.abs(forward(settled.noise) - settled.rows).max())
        if apart > 1e-3 * max(1.0, float(np.abs(settled.rows).max())):
            raise ArchiveError(
                f"the saved model's outputs differ from the network's by {apart:.3g}; report this network"
            )
        exported = goldens.Model(spec, forward, graph.differentiable, (request.mean, request.std))
        # Grey has almost no red and blue to swap.
        blind_to = (*request.blind_to, *(["channels"] if graph.planes == 1 else []))
        goldens.make(draft, exported, request.golden_pictures, blind_to, say)
    return spec


@contextmanager
def _fixed_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
