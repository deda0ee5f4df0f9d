"""Starting weights: the user's file, torchvision's, or none with a warning."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host.files import sha256
from train.download import fetch
from train.errors import Unavailable, WeightsError
from train.progress import Say

if TYPE_CHECKING:  # a plan is made, and found unchanged, without importing torch
    from torch import Tensor

VARIABLE = "BEELINE_WEIGHTS"


@dataclass(frozen=True)
class Weights:
    """What a network starts from: `kind` is `file`, `torchvision` or `random`; `name` goes into the spec."""

    kind: str
    name: str
    path: Path | None = None
    sha256: str | None = None

    @property
    def pretrained(self) -> bool:
        """Whether there is something to fine-tune."""
        return self.path is not None

    def read(self) -> dict[str, Tensor]:
        """Return the state dict.

        Raises:
            WeightsError: when the file is no state dict, or holds code.
        """
        assert self.path is not None
        return read(self.path)


def find_weights(
    architecture: str,
    file: Path | None,
    say: Say,
    environ: Mapping[str, str] = os.environ,
) -> Weights:
    """Return the first weights there are: `file`, `BEELINE_WEIGHTS`, torchvision's for `architecture`, none.

    Raises:
        WeightsError: for a named file that is not there. DownloadError: for a download that began and did
            not end well.
    """
    named = file or (Path(environ[VARIABLE]) if environ.get(VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            raise WeightsError(f"the weights file {named} is missing; name a state dict of {architecture}")
        say(f"weights: the file {named}")
        return Weights("file", named.name, named, sha256(named))
    try:
        found = _torchvision(architecture, say)
    except Unavailable as error:
        say(f"no weights to download: {error}")
        say(
            f"WARNING: {architecture} starts from random weights, which takes more pictures and epochs; "
            f"set {VARIABLE} to a state dict of it"
        )
        return Weights("random", "none (random initialisation)")
    say(f"weights: torchvision's {found.name}")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict, plain or under the key `state_dict`; code in the file is never run.

    Raises:
        WeightsError: for anything else.
    """
    import torch

    try:
        with warnings.catch_warnings():
            # A file of another pickle protocol is read all the same, or refused below.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        why = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"the weights file {path} cannot be read ({why}); save it with torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(value, torch.Tensor) for value in loaded.values())
    ):
        raise WeightsError(
            f"the weights file {path} holds no state dict; save it with torch.save(model.state_dict(), path)"
        )
    return loaded


def _torchvision(architecture: str, say: Say) -> Weights:
    """Get the weights that torchvision names as the default, into PyTorch's own cache.

    Its own downloader has no time limit and starts anew after a cut, hence ours; the file's name ends in
    the first digits of its sha256, by PyTorch's convention.
    """
    import torch
    from torchvision import models

    try:
        entry = models.get_model_weights(architecture).DEFAULT
    except (AttributeError, ValueError):
        raise Unavailable(f"torchvision has no weights for {architecture}") from None
    name = entry.url.rpartition("/")[2]
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.is_file():
        say(f"downloading {entry.url}")
        fetch(entry.url, target, say, _digits(name))
    return Weights("torchvision", f"torchvision {entry}", target, sha256(target))


def _digits(name: str) -> str | None:
    digits = name.rpartition("-")[2].partition(".")[0]
    return digits if len(digits) >= 8 and set(digits) <= set("0123456789abcdef") else None
