"""Answers from a run without a server, by its exported model or its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from beeline import pixels
from beeline.answer import Answer, failure, prediction, probabilities
from beeline.engines.torch import TorchEngine
from beeline.errors import RequestError
from beeline.spec import Artifact, ModelSpec
from train.export import description, network
from train.learner import normalised
from train.runs import Run, open_run

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class RunPredictor:
    """Classifies pictures as the worker would, by a run's export, an exported folder or a run's checkpoint.

    `source` is the folder or file that answers.
    """

    def __init__(self, folder: Path, checkpoint: bool = False) -> None:
        """Open a run, or an exported folder.

        Args:
            folder: a run's folder, its id, or a folder with `model_spec.json`.
            checkpoint: use the run's checkpoint even where there is an export.

        Raises:
            RunError: when it is neither. SpecError, ArchiveError: for a damaged export.
        """
        run = None if (folder / "model_spec.json").is_file() else open_run(folder)
        exported = folder if run is None else run.export
        if run is not None and (checkpoint or not (exported / "model_spec.json").is_file()):
            self.spec, self._forward, self.source = _spec(run), _checkpoint(run), run.checkpoint
        else:
            self.spec = ModelSpec.load(exported)
            self._forward = TorchEngine(exported, self.spec, threads=torch.get_num_threads()).forward
            self.source = exported

    def predict(self, pictures: list[bytes]) -> list[Answer]:
        """Answer every picture, in order; a bad one gets its own 4xx."""
        answers: dict[int, Answer] = {}
        decoded: dict[int, NDArray[np.uint8]] = {}
        for index, data in enumerate(pictures):
            try:
                decoded[index] = pixels.decode(data, self.spec.geometry)
            except RequestError as error:
                answers[index] = failure(error)
        if decoded:
            rows = probabilities(self._forward(np.stack(list(decoded.values()))), self.spec.output)
            for index, row in zip(decoded, rows, strict=True):
                try:
                    answers[index] = prediction(row, self.spec)
                except RequestError as error:
                    answers[index] = failure(error)
        return [answers[index] for index in range(len(pictures))]


def _checkpoint(run: Run) -> Forward:
    model, config = network(run), run.config().model

    def forward(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            output: Any = model(normalised(torch.from_numpy(batch).permute(0, 3, 1, 2), config.mean, config.std))
            return np.asarray(output.numpy())

    return forward


def _spec(run: Run) -> ModelSpec:
    """Return the spec that an export would have; a checkpoint is no artifact, so its digest is all zeros."""
    artifact = Artifact(run.checkpoint.name, "exported_program", "0" * 64, run.config().model.name)
    return ModelSpec(model=artifact, geometry_version=pixels.GEOMETRY, **description(run))
