"""Starting weights: the user's file, torchvision's, or none with a warning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from host.files import sha256
from train.download import fetch
from train.errors import Unavailable, WeightsError
from train.progress import Say

if TYPE_CHECKING:  # A plan is made, and found unchanged, without importing torch.
    from torch import Tensor

VARIABLE = "BEELINE_WEIGHTS"


@dataclass(frozen=True)
class Weights:
    """The starting weights of a network: `kind` is `file`, `torchvision` or `random`; `name` goes into the spec."""

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
            ArchiveError: when the file is no state dict, or holds code, which is never run.
        """
        from archive.artifact import read_state_dict

        assert self.path is not None
        return read_state_dict(self.path)


def find_weights(architecture: str, file: Path | None, say: Say, environ: Mapping[str, str] = os.environ) -> Weights:
    """Return the first weights of `file`, `BEELINE_WEIGHTS` and torchvision's for `architecture`; else none.

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
            f"WARNING: {architecture} starts from random weights, which needs more pictures and epochs; "
            f"set {VARIABLE} to a state dict of it"
        )
        return Weights("random", "none (random initialisation)")
    say(f"weights: torchvision's {found.name}")
    return found


def _torchvision(architecture: str, say: Say) -> Weights:
    """Download torchvision's default weights into PyTorch's own cache.

    PyTorch's downloader has no time limit and starts again from zero after an interruption, so ours is used. By
    PyTorch's convention the file's name ends in the first digits of its sha256.
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
