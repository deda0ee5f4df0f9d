"""The model files that users bring: what a file is, and what it holds.

No code of a state dict's file ever runs: objects of harmless types are replaced by empty ones, and a file with other
objects is refused. Every function raises `ArchiveError` for a file that it cannot take.
"""

from __future__ import annotations

import builtins
import re
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archive import hugging_face
from archive.graph import Network, quiet
from archive.weights import Weights, find_weights, to_torchscript
from beeline.errors import ArchiveError, short
from host import Say, silent
from host.files import write_whole

# Training programs put objects of these modules into their checkpoints: options, numbers, paths.
_HARMLESS = (
    "argparse", "collections", "datetime", "decimal", "easydict", "enum", "lightning", "lightning_fabric",
    "ml_collections", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "sklearn", "torch.nn.modules.loss",
    "torch.optim", "torchvision.transforms", "types", "typing", "uuid", "yacs"
)  # fmt: skip
# An ONNX file begins with the version of its form, from 1 to 32, and another field. The length that safetensors begins
# with may look the same, and is followed by a brace.
_ONNX = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42].{5}(?!\{)", re.DOTALL)
_UNSUPPORTED = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
# How files begin that hold no weights, and the way out.
_FOREIGN = (
    (rb"PK\x03\x04", "is cut off: its end is missing; download or copy it again"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml(?!.*<net))",
        "is a web page that was saved instead of the file; download the file itself, as with `curl -L -O`",
    ),
    (rb"\s*[{\[]\s*[\"{}\[\]]", "is JSON, which holds no weights; name the file of weights that belongs to it"),
    (rb"\x1f\x8b", "is compressed by gzip; unpack it with `gunzip`, a .tar.gz with `tar xzf`"),
    (rb"BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is compressed; unpack it, as with `bunzip2` or `unxz`"),
    (rb".{257}ustar", "is a tar archive; unpack it with `tar xf`"),
    (rb"\x89HDF", "is HDF5, as Keras saves weights; convert the model to PyTorch"),
    (rb"[^\x80]", "is no file that torch.save wrote; download or copy it again, or save model.state_dict()"),
)


def load_network(
    path: Path, architecture: str | None = None, transform_input: bool = False, say: Say = silent
) -> Network:
    """Load the network in `path`: TorchScript, an exported program, ONNX, or the weights of `architecture`.

    `transform_input`: see `archive.architectures.build`. `say` gets a sentence for each reading that is not plain.
    """
    kind = kind_of(path)
    if kind == "pickle":
        tensors = read_tensors(path)
        if why := hugging_face.refusal(path):
            raise ArchiveError(why)
        if architecture is None:
            raise ArchiveError(f"{path} is a state dict, which needs its architecture; add --architecture, as resnet18")
        weights = find_weights(path, tensors, architecture)
        network = weights.network(transform_input)
        for note in weights.notes:
            say(note)
        return network
    if kind == "onnx":
        from archive import onnx_graph

        return onnx_graph.load(path)  # type: ignore[no-any-return]
    try:
        with quiet():
            if kind == "exported_program":
                return torch.export.load(path)
            module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return module
    except Exception as error:
        why = f"looks like {kind} but does not load ({short(error)})"
        raise ArchiveError(f"{path} {why}; save it again with this version of torch") from error


def read_weights(path: Path, architecture: str) -> Weights:
    """Read the weights of `architecture` from `path`; a program has none to start from."""
    if (kind := kind_of(path)) != "pickle":
        fix = "save the state dict of the model that it was made from, with torch.save(model.state_dict(), ...)"
        raise ArchiveError(f"{path} is a program ({kind}), which cannot be trained; {fix}")
    return find_weights(path, read_tensors(path), architecture)


def kind_of(path: Path) -> str:
    """Return `exported_program`, `torchscript`, `onnx` or `pickle`, from the file's content and not from its name."""
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "is missing; name a file"
        why = f"the model file {path} {what}: TorchScript, .pt2, ONNX, state dict or safetensors"
        raise ArchiveError((path.is_dir() and hugging_face.refusal(path)) or why)
    start, names = _look(path)
    inside = [name.partition("/")[2] for name in names]
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in inside):
        return "exported_program"
    if "constants.pkl" in inside:
        return "torchscript"
    return "onnx" if _ONNX.match(start) else "pickle"


def read_tensors(path: Path) -> Any:
    """Return what a file of weights holds: mostly dictionaries, with tensors by name somewhere in them."""
    start, names = _look(path)
    if not start:
        raise ArchiveError(f"{path} is empty; download or copy it again")
    # The first eight bytes of safetensors are a length, and may look like anything.
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if names and not any(name.endswith("data.pkl") for name in names):
        some = ", ".join(names[:3])
        raise ArchiveError(f"{path} is a zip archive ({some}), not a state dict; unpack it with `unzip`")
    for beginning, about in () if names else _FOREIGN:
        if re.match(beginning, start, re.IGNORECASE | re.DOTALL):
            raise ArchiveError(f"{path} {about}")
    return _unpickle(path)


def _look(path: Path) -> tuple[bytes, list[str]]:
    """Return how a file begins, and the names in it if it is a zip archive."""
    try:
        with path.open("rb") as file:
            start = file.read(264)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read ({error.strerror or error}); restore it, or name another") from error
    if not zipfile.is_zipfile(path):
        return start, []
    with zipfile.ZipFile(path) as archive:
        return start, archive.namelist()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ArchiveError(f"{path} needs safetensors, which is not installed; run `make setup`") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArchiveError(f"{path} is damaged safetensors ({short(error)}); download or copy it again") from error


def write_safetensors(network: nn.Module, path: Path) -> None:
    """Write the weights of `network`, whole or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_whole(path, save(tensors, {"format": "pt"}))


def _unpickle(path: Path) -> Any:
    """Read what `torch.save` wrote, once more for each harmless type in it."""
    empty: dict[str, Any] = {}
    while True:
        try:
            replaced: list[Any] = [(kind, name) for name, kind in empty.items()]
            with torch.serialization.safe_globals(replaced), warnings.catch_warnings():
                # A file of another pickle protocol is either read or refused below.
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            match = _UNSUPPORTED.search(str(error))
            if match is None:
                # PyTorch puts the reason after its advice on how to load a file unsafely.
                why = re.split(r"\.\s|\s+Check the", str(error).rpartition("WeightsUnpickler error: ")[2])[0]
                what = f"is not a plain state dict ({short(why or type(error).__name__)})"
                fix = "save model.state_dict() with torch.save, or copy the file again"
                raise ArchiveError(f"{path} {what}; {fix}") from error
            # PyTorch names objects of `builtins` without their module.
            name = f"builtins.{match[1]}" if isinstance(getattr(builtins, match[1], None), type) else match[1]
            if not name.startswith((*_HARMLESS, "builtins.")) or name in empty:
                raise ArchiveError(
                    f"{path} holds a {name}, whose unpickling may run code, so it is refused; if you trust the file, "
                    f"save the state dict in it, or make TorchScript of a whole model: {to_torchscript(path.name)}"
                ) from error
            empty[name] = _empty(name.lower())


def _empty(name: str) -> type:
    """Return a class that replaces the type `name` and keeps nothing."""
    # PyTorch fills dictionaries and lists of only these types.
    made = Counter if name.endswith(("dict", "cfgnode")) else list if name.endswith((".list", "deque")) else None

    class Empty:
        def __new__(cls, *args: object) -> Any:
            return made() if made else object.__new__(cls)

        def __init__(self, *args: object) -> None: ...

        def __setstate__(self, state: object) -> None: ...

    return Empty
