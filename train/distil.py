"""A teacher for a smaller network or input: a finished run, whose answers to the same pictures a student learns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from beeline.errors import ConfigError
from host import Say
from train.config import FitConfig
from train.data import DataSet
from train.runs import Run, open_run

if TYPE_CHECKING:  # A plan is made without importing torch.
    from torch import Tensor

# Answers are compared at this temperature, and count as much as the labels (Hinton et al. 2015, "Distilling the
# Knowledge in a Neural Network").
_TEMPERATURE, _SHARE = 2.0, 0.5


def find_teacher(fit: FitConfig, data: DataSet, say: Say) -> Run | None:
    """Return the run that `fit.distil` names, or None.

    Raise `ConfigError` for a teacher of other labels, or one that was trained on validation pictures; `RunError` for a
    run that is not finished.
    """
    if fit.distil is None:
        return None
    if not fit.epochs:
        raise ConfigError(
            f"fit.distil is {fit.distil}, but fit.epochs is 0; leave it out (and --quick), or train epochs"
        )
    teacher = open_run(Path(fit.distil).expanduser())
    if teacher.labels != data.labels:
        few = ", ".join(teacher.labels[:3])
        raise ConfigError(f"fit.distil is {fit.distil}, whose labels differ ({few}); train a teacher on these pictures")
    # Pictures in both of the student's halves say nothing about the teacher's.
    val = {each.sha256 for each in data.val.pictures} - {each.sha256 for each in data.train.pictures}
    if both := len(val & (teacher.seen or frozenset())):
        what = f"{teacher.id}, which was trained on {both} of the {len(val)} validation pictures"
        raise ConfigError(f"fit.distil is {what}; train a teacher with the same halves")
    say(f"teacher: {teacher.id}, accuracy {teacher.accuracy:.4f}")
    return teacher


class Teacher:
    """The network of a run in evaluation mode; `geometry` is that of its input."""

    def __init__(self, run: Run, device: str) -> None:
        from archive.artifact import read_weights

        self._model = run.config().model
        self.geometry = self._model.geometry
        self._network = read_weights(run.checkpoint, self._model.name).network().to(device).eval()

    def loss(self, pictures: Tensor, logits: Tensor, loss: Tensor, share: float = 1.0) -> Tensor:
        """Add to the loss of a batch's labels how far its logits are from the teacher's for the uint8 pictures.

        `share` is what these pictures count among those of all processes.
        """
        import torch
        from torch.nn.functional import kl_div

        from train.model import normalised

        with torch.no_grad():
            theirs = shrunk(pictures, self.geometry.shape)
            answers = self._network(normalised(theirs, self._model.mean, self._model.std))
        own, wanted = (each.float().div(_TEMPERATURE).log_softmax(1) for each in (logits, answers))
        apart = kl_div(own, wanted, reduction="batchmean", log_target=True) * _TEMPERATURE**2
        return (1 - _SHARE) * loss + _SHARE * apart * share


def shrunk(pictures: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return pictures `[N, 3, H, W]` at another height and width, filtered as Pillow does; as they are at the same."""
    from torch.nn.functional import interpolate

    is_same = tuple(pictures.shape[2:]) == shape
    return pictures if is_same else interpolate(pictures.float(), shape, mode="bilinear", antialias=True)
