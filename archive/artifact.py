"""The files that users bring: a model as TorchScript, exported program or state dict, and its labels.

`kind_of` says what a model file is, `load_network` and `read_state_dict` read it, `read_labels` reads the labels. They
raise `ArchiveError` for a file that is missing, cannot be read, or does not fit.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archive.graph import Network, quiet
from beeline.errors import ArchiveError, did_you_mean

# The keys under which training programs put the weights into their checkpoints.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_LABEL_FORMS = 'one label a line, a JSON list, {"0": "ants", "1": "bees"} or {"0": ["n01440764", "tench"], ...}'


def load_network(path: Path, architecture: str | None = None) -> Network:
    """Load the network in `path`. A state dict needs the model's name in torchvision, `architecture`."""
    kind = kind_of(path)
    if kind == "pickle":
        return _from_state_dict(path, architecture)
    try:
        with quiet():
            if kind == "exported_program":
                return torch.export.load(path)
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return module
    except Exception as error:
        raise ArchiveError(
            f"{path} looks like {kind} but does not load ({_short(error)}); save it again with this version of torch"
        ) from error


def kind_of(path: Path) -> str:
    """Return `exported_program`, `torchscript` or `pickle`, from the file's content and not from its name."""
    if not path.is_file():
        raise ArchiveError(f"the model file {path} is missing; name a TorchScript, .pt2 or state dict file")
    if not zipfile.is_zipfile(path):
        return "pickle"
    with zipfile.ZipFile(path) as archive:
        inside = [name.partition("/")[2] for name in archive.namelist()]
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in inside):
        return "exported_program"
    return "torchscript" if "constants.pkl" in inside else "pickle"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, plain or inside a checkpoint. Code in the file is never run."""
    try:
        with warnings.catch_warnings():
            # A file of another pickle protocol is either read or refused below.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read ({error.strerror or error}); restore it, or name another") from error
    except Exception as error:
        raise ArchiveError(
            f"{path} is not a plain state dict ({_short(error)}); a pickled module runs code when it is loaded and is "
            "refused: save model.state_dict() instead"
        ) from error
    if isinstance(values, dict):
        values = next((values[key] for key in _NESTED if isinstance(values.get(key), dict)), values)
    if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise ArchiveError(f"{path} holds a {type(values).__name__}, not a state dict; save model.state_dict()")
    # DataParallel writes `module.` before every name.
    return {str(name).removeprefix("module."): tensor for name, tensor in values.items()}


def _from_state_dict(path: Path, architecture: str | None) -> nn.Module:
    state = read_state_dict(path)
    if architecture is None:
        raise ArchiveError(f"{path} is a state dict, which needs its architecture; add --architecture, as resnet18")
    network = _build(architecture, state)
    fix = "name the right --architecture"
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ArchiveError(f"{path} does not fit {architecture} ({_short(error)}); {fix}") from error
    # Batch counters came with torch 0.4.1 and change nothing in evaluation mode.
    if missing := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise ArchiveError(f"{path} lacks {missing[0]!r}, which {architecture} has; {fix}")
    if unexpected:
        raise ArchiveError(f"{path} has {unexpected[0]!r}, which {architecture} lacks; {fix}")
    return network.eval()


def _build(architecture: str, state: dict[str, Tensor]) -> nn.Module:
    """Build torchvision's model with as many classes as the last tensor of the state dict, its head, has rows."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        hint = did_you_mean(architecture, known) if len(architecture) > 2 else ""
        hint = hint if "did you mean" in hint else "; name one of torchvision.models, as resnet18"
        raise ArchiveError(f"the architecture is {architecture!r}{hint}")
    options: dict[str, Any] = {}
    if architecture in _WITH_AUXILIARY_HEADS:
        options = {"aux_logits": any(name.startswith(("aux", "AuxLogits")) for name in state), "init_weights": False}
    head = list(state.values())[-1]
    classes = int(head.shape[0]) if head.ndim else 1000
    model: nn.Module = torchvision.models.get_model(architecture, weights=None, num_classes=classes, **options)
    return model


def read_labels(path: Path) -> tuple[str, ...]:
    """Read the labels in the order of the model's outputs: a text file, a JSON list, or an `index_to_name.json`.

    A name that occurs twice (ImageNet has two cranes) gets its class id, or its index if the file has no ids:
    `crane (n02012849)`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArchiveError(f"the labels file {path} cannot be read ({error}); name a UTF-8 file") from error
    values: Any = [line.strip() for line in text.rstrip().splitlines()]
    if text.lstrip()[:1] in ("{", "["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ArchiveError(f"the labels file {path} is not JSON ({error}); allowed: {_LABEL_FORMS}") from error
    if isinstance(values, dict):
        numbers = [str(index) for index in range(len(values))]
        if missing := [number for number in numbers if number not in values]:
            stranger = next(key for key in values if key not in numbers)
            raise ArchiveError(
                f"the labels file {path} has {len(values)} entries but none for class {missing[0]} "
                f"(and one for {stranger!r}); number the classes 0 to {len(values) - 1}"
            )
        values = [values[number] for number in numbers]
    if not values:
        raise ArchiveError(f"the labels file {path} is empty; allowed: {_LABEL_FORMS}")
    pairs: list[tuple[str, str]] = []
    for index, value in enumerate(values):
        number, name = value if isinstance(value, list) and len(value) == 2 else (str(index), value)
        if not isinstance(number, str) or not isinstance(name, str):
            raise ArchiveError(f"class {index} of the labels file {path} is {value!r}; allowed: {_LABEL_FORMS}")
        if not name:
            raise ArchiveError(f"label {index + 1} of the labels file {path} is blank; name every class in order")
        pairs.append((number, name))
    counts = Counter(name for _, name in pairs)
    return tuple(name if counts[name] == 1 else f"{name} ({number})" for number, name in pairs)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
