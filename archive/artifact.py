"""A user's model file: TorchScript, exported program, or state dict with its architecture."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archive.graph import Network
from beeline.errors import ArchiveError, did_you_mean

# The keys under which training programs put the weights into their checkpoints.
_NESTED = ("state_dict", "model_state_dict", "model", "net")
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def load_network(path: Path, architecture: str | None = None) -> Network:
    """Load the network in `path`, in any of the three forms.

    Args:
        path: the file.
        architecture: torchvision's name of the model; needed for a state dict, ignored otherwise.

    Raises:
        ArchiveError: when the file is of no such form or does not fit the architecture.
    """
    kind = kind_of(path)
    try:
        if kind == "exported_program":
            return torch.export.load(path)
        if kind == "torchscript":
            return _load_torchscript(path)
    except Exception as error:
        raise ArchiveError(
            f"{path} looks like {kind} but does not load ({_short(error)}); save it again with this version of torch"
        ) from error
    return _from_state_dict(path, architecture)


def kind_of(path: Path) -> str:
    """Return `exported_program`, `torchscript` or `pickle`, by the file's content and not by its name.

    Raises:
        ArchiveError: when there is no such file.
    """
    if not path.is_file():
        raise ArchiveError(f"the model file {path} is missing; name a TorchScript, .pt2 or state dict file")
    if not zipfile.is_zipfile(path):
        return "pickle"
    with zipfile.ZipFile(path) as archive:
        inside = [name.partition("/")[2] for name in archive.namelist()]
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in inside):
        return "exported_program"
    return "torchscript" if "constants.pkl" in inside else "pickle"


def _load_torchscript(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        # PyTorch calls it deprecated, and many users have such files.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return module


def _from_state_dict(path: Path, architecture: str | None) -> nn.Module:
    state = read_state_dict(path)
    if architecture is None:
        raise ArchiveError(f"{path} is a state dict, which needs its architecture; add --architecture, as resnet18")
    network = _build(architecture, state)
    expected = network.state_dict()
    for name, tensor in expected.items():
        # Batch counters came with torch 0.4.1 and change nothing in evaluation.
        if name not in state and not name.endswith("num_batches_tracked"):
            raise ArchiveError(f"{path} lacks {name!r}, which {architecture} has; name the right --architecture")
        if name in state and state[name].shape != tensor.shape:
            raise ArchiveError(
                f"{path} has {name!r} of shape {list(state[name].shape)}, {architecture} has "
                f"{list(tensor.shape)}; name the right --architecture"
            )
    for name in state:
        if name not in expected:
            raise ArchiveError(f"{path} has {name!r}, which {architecture} lacks; name the right --architecture")
    network.load_state_dict(state, strict=False)
    return network.eval()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, plain or inside a checkpoint; code in the file is never run.

    Raises:
        ArchiveError: for anything else.
    """
    try:
        with warnings.catch_warnings():
            # A file of another pickle protocol is read anyway, or refused below.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read ({error.strerror or error}); restore it, or name another") from error
    except Exception as error:
        raise ArchiveError(
            f"{path} is no plain state dict ({_short(error)}); a pickled module runs code when it is loaded and is "
            "refused: save model.state_dict() instead"
        ) from error
    for key in _NESTED:
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
            break
    if not isinstance(values, dict) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise ArchiveError(f"{path} holds a {type(values).__name__} that is no state dict; save model.state_dict()")
    # DataParallel writes `module.` before every name.
    return {str(name).removeprefix("module."): tensor for name, tensor in values.items()}


def _build(architecture: str, state: dict[str, Tensor]) -> nn.Module:
    """Build torchvision's model with as many classes as the last tensor of the state dict, its head."""
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


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
