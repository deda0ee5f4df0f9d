"""From a network to an exported folder: preprocessing, the uint8 graph, model_spec.json and golden pictures."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archive import goldens, graph, outputs
from archive.architectures import TIMM, timm_preprocessing
from archive.goldens.mistakes import check_names
from archive.graph import IMAGENET_MEAN, IMAGENET_STD, Network, Preprocessing
from beeline import engines, pixels
from beeline.errors import ArchiveError, did_you_mean, short
from beeline.spec import FILE_NAME, GOLDEN, NAME, NAMES, OUTPUTS, Accuracy, Artifact, Geometry, ModelSpec, Provenance
from host import Say, silent
from host.files import sha256, whole_folder

# The result of a parallel sum depends on how it is split. With a fixed number of threads the same model gives the same
# golden pictures on any number of cores.
_THREADS = 2


_PRESETS = {
    # The evaluation transform of most ImageNet models.
    "imagenet": Preprocessing(Geometry(256, 224), IMAGENET_MEAN, IMAGENET_STD),
    # Pixels scaled to -1..1, as TensorFlow models take them.
    "half": Preprocessing(Geometry(256, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    # Pixels scaled to 0..1.
    "unit": Preprocessing(Geometry(256, 224), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    # OpenAI's CLIP image encoders.
    "clip": Preprocessing(
        Geometry(224, 224, "bicubic"), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
}


def find_preset(name: str | None, architecture: str | None = None) -> Preprocessing:
    """Return a preset by name; raise `ArchiveError` for an unknown name or architecture. Nothing is downloaded.

    `name` is `imagenet`, `half`, `unit` or `clip`; `torchvision` for the preprocessing of the default weights of
    `architecture`; a torchvision weights name such as `ResNet50_Weights.IMAGENET1K_V2`; or `timm` for what timm names
    for `architecture`. None is `timm` for `timm:NAME`, else `imagenet`.
    """
    name = name or ("timm" if architecture and architecture.startswith(TIMM) else "imagenet")
    if name in _PRESETS:
        return _PRESETS[name]
    if name not in ("torchvision", "timm") and "." not in name:
        raise ArchiveError(f"the preset is {name!r}{did_you_mean(name, (*_PRESETS, 'torchvision', 'timm'))}")
    if name in ("torchvision", "timm") and architecture is None:
        raise ArchiveError(f"the preset {name!r} needs an architecture; add --architecture, as resnet18")
    if name == "timm":
        return Preprocessing(*timm_preprocessing(str(architecture)))
    import torchvision

    try:
        if name == "torchvision":
            weights = torchvision.models.get_model_weights(architecture).DEFAULT
        else:
            weights = torchvision.models.get_weight(name)
        transform = weights.transforms()
        geometry = Geometry(transform.resize_size[0], transform.crop_size[0], transform.interpolation.value)
        return Preprocessing(geometry, tuple(transform.mean), tuple(transform.std))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        source = architecture if name == "torchvision" else name
        what = f"torchvision knows no classification preprocessing for {source!r} ({short(error)})"
        raise ArchiveError(f"{what}; give --resize, --crop, --mean and --std with --preset imagenet") from error


@dataclass(frozen=True)
class ExportRequest:
    """What the network itself does not show about an export.

    `output` is what the network returns, one of `beeline.spec.OUTPUTS`, or None for what its outputs show; `output_key`
    names the entry of a dict, tuple or list. `golden_pictures` is a folder of the user's own pictures. `blind_to` names
    mistakes that the golden pictures need not notice (see `archive.goldens.mistakes`). Raise `ArchiveError` for an
    impossible name or version, or an unknown mistake.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    architecture: str = "unknown"
    output: str | None = None
    output_key: str | None = None
    top_k: int = 5
    temperature: float | None = None
    not_sure_under: float | None = None
    accuracy: Accuracy | None = None
    provenance: Provenance = field(default_factory=Provenance)
    golden_pictures: Path | None = None
    blind_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, word in (("name", self.name), ("version", self.version)):
            if not re.fullmatch(NAME, word):
                why = f"the model's {key} is {short(word)!r}; allowed: {NAMES}"
                raise ArchiveError(f"{why}; give another with --{key}")
        check_names(self.blind_to)


def export_folder(network: Network, request: ExportRequest, out: Path, say: Say = silent) -> ModelSpec:
    """Write the model, `model_spec.json` and `golden/` into `out`, over an earlier export; return the spec.

    The same network and request give the same bytes, in every process and folder of one machine. `network` maps
    normalised float32 NCHW to `[N, classes]` and is not changed. It may be a module, a TorchScript module, an exported
    program or an ONNX model. `say` is told what was taken for granted.

    Raises:
        ArchiveError: names what does not fit: labels and outputs, a number that is not finite, a fixed batch size,
            golden pictures that would not notice a mistake.
        SpecError: when the request breaks the schema.
    """
    own = {graph.PROGRAM_FILE, graph.TORCHSCRIPT_FILE, graph.ONNX_FILE, FILE_NAME, GOLDEN}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - own):
        raise ArchiveError(f"{out} exists and is not an exported folder; name another, or remove it")
    # The spec checks the whole request before anything takes time.
    spec = ModelSpec(
        name=request.name,
        version=request.version,
        labels=tuple(request.labels),
        geometry=request.preprocessing.geometry,
        model=Artifact(graph.PROGRAM_FILE, "exported_program", "0" * 64),
        geometry_version=pixels.GEOMETRY,
        output=request.output or OUTPUTS[0],
        top_k=request.top_k,
        temperature=request.temperature,
        not_sure_under=request.not_sure_under,
        accuracy=request.accuracy,
        provenance=request.provenance,
    )
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(_THREADS)
        draft = stack.enter_context(whole_folder(out))
        kind: Any = graph.Graph
        if not isinstance(network, (torch.nn.Module, torch.export.ExportedProgram)):
            from archive import onnx_graph

            kind = onnx_graph.OnnxGraph
        made = kind(network, request.preprocessing)
        settled = outputs.settle(made, network, len(spec.labels), request.output, request.output_key)
        for note in settled.notes:
            say(f"  {note}")
        model = made.save(draft)
        artifact = Artifact(model.name, made.format, sha256(model), request.architecture)
        engine = "onnxruntime" if made.format == "onnx" else "torch"
        spec = replace(spec, model=artifact, output=settled.output, engine=engine)
        spec.save(draft / FILE_NAME)
        forward = engines.load(draft, spec, device="cpu", threads=_THREADS).forward
        apart = float(np.abs(forward(settled.noise) - settled.rows).max())
        if apart > 1e-3 * max(1.0, float(np.abs(settled.rows).max())):
            raise ArchiveError(f"the saved model's outputs differ from the network's by {apart:.3g}; report it")
        photometry = request.preprocessing.mean, request.preprocessing.std
        exported = goldens.Model(spec, forward, made.differentiable, photometry)
        # Grey has almost no red and blue to swap.
        blind_to = (*request.blind_to, *(["channels"] if made.planes == 1 else []))
        goldens.make(draft, exported, request.golden_pictures, blind_to, say)
    return spec
